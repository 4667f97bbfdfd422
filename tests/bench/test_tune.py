"""`python -m bench tune`: candidates are checked, timed and ranked; the table in the code is made of them, and looked up."""

import contextlib
import json
import os
import random
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from clp_kernels.backends import interpreting

pytest.importorskip("triton")

from clp_kernels.triton_kernels import base_product, tuned, tuning  # noqa: E402

from bench.__main__ import main  # noqa: E402
from bench.core import schema  # noqa: E402
from bench.core.case import Case, Work  # noqa: E402
from bench.core.measure import Timer  # noqa: E402
from bench.tuning import tune, tuned_table  # noqa: E402
from bench.tuning.trials import Trial, first, name_of, second, third, tiny  # noqa: E402
from bench.tuning.tuned_table import Measured  # noqa: E402

ROOT = Path(__file__).parents[2]
in_the_interpreter = pytest.mark.skipif(
    not interpreting(), reason="launches in Triton's interpreter, on the CPU"
)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- one trial

state: list[str] = []


def made_up(calls, default="right", candidates=("right", "wrong", "raises", "also right"), estimate=None):
    """y = 2 x, which the choices do in the ways that `calls` says."""

    def call(t):
        return {"y": calls[state[-1]](t["x"])}

    @contextlib.contextmanager
    def forced(choice):
        state.append(choice)
        yield
        state.pop()

    tunable = tuning.Tunable("made_up", ("rows",), {"f": candidates})
    case = Case(
        "tune", "made_up", "made_up", {"rows": 8}, torch.float32, "cpu",
        lambda generator: {"x": torch.randn(8, 4, generator=generator)}, lambda t, dtype: {"y": 2 * t["x"].to(dtype)}, Work(),
        options={"family": "f"},
    )  # fmt: skip
    return Trial(case, tunable, call, default, forced, estimate=estimate)


def raises(x):
    raise RuntimeError("no such luck")


CALLS = {
    "right": lambda x: time.sleep(2e-3) or 2 * x,
    "wrong": lambda x: 2.001 * x,
    "raises": raises,
    "also right": lambda x: x + x,
}


def test_what_is_wrong_or_raises_is_recorded_and_never_chosen():
    case = tune.measured(made_up(CALLS), Timer("cpu", 1 << 12), 20.0, 0)
    found = {v.name: v for v in case.variants}
    assert {name: v.status for name, v in found.items()} == {
        "right": "ok", "also right": "ok", "wrong": "wrong", "raises": "unavailable",
    }  # fmt: skip
    assert (
        "torch has" in found["wrong"].reason and found["raises"].reason == "raised RuntimeError: no such luck"
    )
    assert found["wrong"].times is None and case.options["default"] == "right"
    result = schema.Result(1, {"versions": {"torch": "2", "triton": "3"}, "date": "d", "commit": "c"},
                           {"table": "GPU", "capability": "sm_90"}, {}, [], [case])  # fmt: skip
    entries = tuned_table.devices([result])["GPU"].entries
    (measured,) = entries["made_up", "f", 4].values()
    assert set(measured.ratios) == {"right", "also right"} and measured.winner == "also right"
    assert tuned_table.tables(tuned_table.devices([result]))["GPU"]["choices"] == {
        ("made_up", "f", 4): {(8,): "also right"}
    }


def test_of_a_trial_without_time_the_default_and_the_most_promising_are_measured():
    seconds = {"right": 3.0, "wrong": 10.0, "raises": 2.0, "also right": 1.0}
    trial = made_up(CALLS, estimate=seconds.get)
    # The default first though its estimate is not the best; nothing that is thought three times as slow as the best.
    assert [choice for choice, _ in trial.ranked()] == ["right", "also right", "raises"]
    case = tune.measured(trial, Timer("cpu", 1 << 12), 0.0, 0)
    assert [v.status for v in case.variants] == ["ok", "ok", "unavailable"]
    assert case.variants[2].reason == "left out: the trial's time was used up"
    assert case.variants[1].measures == {"estimate": 1.0} and case.variants[1].times.runs >= 5


def test_what_ends_the_process_is_named_first_and_not_tried_again():
    def ends(x):
        raise SystemExit("the device is in a failed state")

    trial, failed = made_up({**CALLS, "also right": ends}), []
    with pytest.raises(SystemExit):
        tune.measured(trial, Timer("cpu", 1 << 12), 20.0, 0, failed)
    state.clear()
    assert failed == ["also right"]
    case = tune.measured(trial, Timer("cpu", 1 << 12), 20.0, 0, failed)
    assert {v.name: v.reason for v in case.variants}["also right"] == tune.FAILED


# --- the table


def entry(default="d", **ratios):
    return Measured(default, ("rows", "depth"), {"d": 1.0, **ratios})


def test_the_default_stays_where_nothing_is_faster_by_the_margin():
    assert entry(a=0.99).winner == "d" and entry(a=0.9, b=0.95).winner == "a" and entry(a=1.2).winner == "d"
    assert tuned_table.reduced({(64, 64): entry(a=0.99), (64, 128): entry(a=1.1)}) == {}


def test_the_table_keeps_what_neighbours_do_not_say():
    measured = {
        (1024, 64): entry(a=0.8, b=0.9),
        (2048, 64): entry(a=0.8, b=0.805),
        (4096, 64): entry(a=0.9, b=0.8),
        (8192, 64): entry(a=1.5, b=1.1),
        (8192, 4096): entry(a=0.7),
    }
    table = tuned_table.reduced(measured)
    # 1024 is as well served by its neighbour; 8192 has to say that it keeps the default, which its neighbour would not.
    assert table == {(2048, 64): "a", (4096, 64): "b", (8192, 64): "d", (8192, 4096): "a"}
    for sizes, m in measured.items():
        assert m.loss(tuning.nearest(table, sizes)) <= tuned_table.SAME


def test_the_report_says_what_the_table_and_its_neighbours_would_miss():
    measured = {(64, 64): entry(a=0.5), (128, 64): entry(a=1.25)}
    device = tuned_table.Device("sm_90", "a test", {("multi_lora_dy", "half", 2): measured})
    lines = tuned_table.report({"GPU": device})
    assert (
        "| multi_lora_dy, half, 16 bits | 2 | 2 | 1 / 2 / 0 | 50.0% / 100.0% | 0.0% / 0.0% | 62.5% / 100.0% |"
        in lines
    )
    assert "| rows=64 depth=64 | d | a | - | 0.50 |" in lines
    assert "a wins at 1 of 2 shapes, by 2.00 at (64, 64)" in lines and "d wins at 1 of 2" in lines


def test_a_way_that_wins_nowhere_is_named():
    device = tuned_table.Device("sm_90", "a test", {("multi_lora_dy", "half", 2): {(64, 64): entry(a=0.5)}})
    assert "- multi_lora_dy, half, 16 bits: d wins at none of 1 shapes" in tuned_table.report({"GPU": device})


def test_the_table_in_the_code_is_what_the_committed_measurements_make():
    files = sorted((ROOT / "bench" / "results").glob("tune*.json"))
    rendered = tuned_table.rendered(tuned_table.devices(map(schema.load, files)))
    assert Path(tuned.__file__).read_text(encoding="utf-8") == rendered, (
        "python -m bench tune --write bench/results/tune*.json"
    )


def test_a_rendered_table_reads_as_it_was_written(tmp_path):
    entries = {("linear", "tma", 2): {(64, 64): Measured((1, 2), ("a", "b"), {(1, 2): 1.0, (3, 4): 0.5})}}
    entries["multi_lora_dy", "half", 2] = {(8,): Measured("once", ("rows",), {"once": 1.0, "twice": 0.5})}
    found = {"GPU": tuned_table.Device("sm_90", "one; another", entries)}
    (tmp_path / "t.py").write_text(tuned_table.rendered(found))
    assert runpy.run_path(str(tmp_path / "t.py"))["DEVICES"] == tuned_table.tables(found)
    assert "(64, 64): (3, 4),  # 0.50 of the default's time" in (tmp_path / "t.py").read_text()


def test_all_of_a_gpus_trials_make_a_table_of_candidates(tmp_path):
    """Random times for every choice of every trial, into a scratch file."""
    draw, cases, trials = random.Random(0), [], [t for tier in (first, second, third) for t in tier("cuda")]
    for trial in trials:
        variants = []
        for choice, _ in trial.ranked():
            seconds = draw.uniform(0.9, 1.2)
            variants.append(schema.Variant(name_of(choice), "ok", times=schema.Times(*[seconds] * 5, 7)))
        case = trial.case
        options = {
            **{name: str(value) for name, value in case.options.items()},
            "default": name_of(trial.default),
        }
        cases.append(
            schema.Case(
                case.id, "tune", case.op, case.title, dict(case.shape), case.dtype_name, variants, options
            )
        )
    facts = {"date": "2000-01-01", "commit": "0" * 40 + "-dirty", "versions": {"torch": "2", "triton": "3"}}
    settings = {"table": "a GPU", "capability": "sm_90"}
    schema.save(schema.Result(1, facts, settings, {}, [], cases), tmp_path / "r.json")
    report = tuned_table.write([tmp_path / "r.json"], tmp_path / "t.py")
    text = (tmp_path / "t.py").read_text()
    assert max(map(len, text.splitlines())) <= 128 and "nan" not in report
    choices = runpy.run_path(str(tmp_path / "t.py"))["DEVICES"]["a GPU"]["choices"]
    tunables = {trial.tunable.kernel: trial.tunable for trial in trials}
    assert {kernel for kernel, *_ in choices} == set(tunables)
    for (kernel, family, _), entries in choices.items():
        defaults = [t.default for t in trials if t.tunable.kernel == kernel and t.family == family]
        assert set(entries.values()) <= {*tunables[kernel].candidates[family], *defaults}


# --- the command


@pytest.mark.check
@in_the_interpreter
def test_a_rehearsal_goes_from_measuring_to_the_launcher(tmp_path, capsys):
    out, to = tmp_path / "tune.json", tmp_path / "scratch.py"
    command = ["tune", "linear", "multi_lora_product", "--device", "cpu", "--out", str(out)]
    assert main([*command, "--budget", "0"]) == 3
    assert len(schema.load(out).settings["left_out"]) == 3 and not schema.load(out).cases
    with pytest.raises(SystemExit, match="--resume goes on with it"):
        main(command)
    codes = [main([*command, "--budget", "4", "--resume"]) for _ in range(3)]  # a trial each at the least
    assert codes[-1] == 0
    result = schema.load(out)
    assert not result.settings["left_out"] and not result.settings["failed"]
    assert [case.op for case in result.cases] == ["linear", "linear", "multi_lora_product"]
    assert all(v.status == "ok" or "used up" in v.reason for case in result.cases for v in case.variants)
    assert result.settings["table"] == tuning.SIMULATED
    assert main([*command, "--resume"]) == 0
    assert schema.load(out).cases == result.cases

    with pytest.raises(SystemExit, match="does not belong in tuned.py"):
        main(["tune", "--write", str(out)])
    # A faster tile than the default, whatever this machine's interpreter makes of them.
    data = json.loads(out.read_text())
    for variant in data["cases"][0]["variants"]:
        if variant["name"] == "(64, 64, 128, 4, 4)" or variant["name"] == "(128, 64, 64, 4, 5)":
            times = dict.fromkeys(("median", "q1", "q3", "min", "max"), 1e-6)
            variant.update(status="ok", reason=None, times=times | {"runs": 5})
    out.write_text(json.dumps(data))
    capsys.readouterr()
    assert main(["tune", "--write", str(out), "--to", str(to)]) == 0
    assert "| linear, tma, 16 bits |" in capsys.readouterr().out
    devices = runpy.run_path(str(to))["DEVICES"]
    chosen = devices[tuning.SIMULATED]["choices"]["linear", "tma", 2][80, 48, 64]
    with tuning.installed(devices):
        x = torch.zeros(80, 64, dtype=torch.float16)
        assert base_product.LINEAR.choice("tma", x, 96, 48, 64) == chosen
        assert chosen in ((64, 64, 128, 4, 4), (128, 64, 64, 4, 5))


@pytest.mark.check
@in_the_interpreter
@pytest.mark.parametrize("trial", tiny("cpu"), ids=lambda trial: trial.case.id)
def test_every_kernels_trial_is_right(trial):
    case = tune.measured(trial, Timer("cpu", 1 << 12), 0.0, 0)
    assert [v.status for v in case.variants[:2]] == ["ok", "ok"], [v.reason for v in case.variants]


def test_the_gpus_trials_begin_with_the_targets_and_name_each_entry_once():
    trials = [trial for tier in (first, second, third) for trial in tier("cuda")]
    ids = [trial.case.id for trial in trials]
    assert len(set(ids)) == len(ids)
    assert {"rows": 8192, "columns": 4096, "depth": 4096} == trials[0].case.shape
    for trial in trials:
        ranked = trial.ranked()
        assert ranked[0][0] == trial.default and len(ranked) > 1, trial.case.id
        assert tuple(trial.case.shape) == trial.tunable.sizes
    rehearsed = {trial.tunable.kernel for trial in tiny("cpu")}
    assert {trial.tunable.kernel for trial in trials} == rehearsed | {
        "attention"
    }  # which needs a GPU's compiler


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="expected --out FILE"):
        main(["tune"])
    with pytest.raises(SystemExit, match="expected --out FILE"):
        main(["tune", "--out", "a", "--write", "b"])
    with pytest.raises(SystemExit, match="unknown kernel 'nonesuch'; known: attention"):
        main(["tune", "nonesuch", "--device", "cpu", "--sizes", "gpu", "--out", str(tmp_path / "x")])
    with pytest.raises(ValueError, match="another command"):
        main(
            [
                "tune",
                "--write",
                str(ROOT / "bench" / "results" / "cpu_kernels.json"),
                "--to",
                str(tmp_path / "t.py"),
            ]
        )


@pytest.mark.check
def test_what_was_compiled_ahead_is_what_a_launch_finds(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    script = [sys.executable, str(Path(__file__).parent / "precompiled.py")]
    process = subprocess.run(script, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    before, after = map(int, process.stdout.split())
    assert 0 < before == after
