"""`python -m bench`: run writes a valid file case by case, goes on where it was, and fails where this project is wrong."""

import functools
import json

import pytest
import torch

from bench import cases, suite
from bench.__main__ import main
from bench.core import schema
from bench.core.case import Refused, differentiated
from bench.pages import report
from bench.peers import clp

pytestmark = pytest.mark.check
QUICK = ["--device", "cpu", "--sizes", "tiny", "--quick", "--flush", "1", "--peers", "plain"]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(tmp_path):
    def call(*arguments, out="r.json"):
        code = main(["run", *QUICK, "--threads", "1", "--out", str(tmp_path / out), *arguments])
        return code, schema.load(tmp_path / out)

    return call


def test_a_run_measures_checks_and_says_what_is_missing(run, capsys):
    code, result = run("multi_lora", "interpolate")
    assert code == 0
    first = result.cases[0]
    assert {v.name for v in first.variants} == {
        "bare library products",
        "clp-engine",
        "torch",
        "torch, addmm",
        "peft-like loop (torch)",
    }
    assert all(v.status == "ok" and v.times.runs >= 3 for v in first.variants)
    assert {"y", "d_x", "d_lora_a", "d_lora_b"} == set(first.variant("clp-engine").errors)
    assert first.floor.seconds > 0 and result.ceilings["matmul_flops"]["float32"] > 0
    assert result.environment["threads"] == 1 and result.settings["flush_bytes"] == 1 << 20
    printed = capsys.readouterr().out
    assert "faster than torch" in printed and "of the floor (" in printed
    assert [case.op for case in result.cases].count("ema_") == 1


def test_an_op_that_the_build_lacks_is_reported_as_such(run, monkeypatch):
    monkeypatch.delattr("clp_kernels.slerp", raising=False)
    code, result = run("interpolate", "--only", "slerp")
    variant = result.cases[0].variant("clp-engine")
    assert code == 0 and (variant.status, variant.reason) == ("unavailable", "not in this build")


def test_an_interrupted_run_goes_on_where_it_was(run, tmp_path):
    _, before = run("multi_lora", "--only", "forward+backward")
    _, after = run("multi_lora", "--resume")
    assert len(after.cases) > len(before.cases)
    for old, new in zip(before.cases, after.cases):
        assert old.variants == new.variants  # not measured again
    with pytest.raises(SystemExit, match="--resume goes on with it"):
        run("multi_lora")
    data = json.loads((tmp_path / "r.json").read_text())
    data["environment"]["device"] = "another"
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(SystemExit, match="one environment"):
        run("multi_lora", "--resume")


def test_a_used_up_budget_leaves_cases_out_and_says_which(run):
    code, result = run("linear_logprob", "--budget", "0")
    assert code == 3 and not result.cases and len(result.settings["left_out"]) == 7


def test_what_a_target_is_judged_by_comes_first_then_the_first_of_each_kind():
    listed = cases.group("multi_lora").cases("cpu", "gpu")
    order = suite._by_worth(listed)
    judged = [case for case in listed if case.targets]
    assert len(judged) >= 2 and order[: len(judged)] == judged
    assert (
        order[len(judged)] is listed[1] and listed[1].title == "forward"
    )  # the first forward pass, which no target judges
    assert sorted(order, key=listed.index) == listed


def test_a_file_lists_cases_in_their_order_whatever_was_measured_first(run, monkeypatch):
    monkeypatch.setattr(suite, "_by_worth", lambda selected: selected[::-1])
    _, result = run("multi_lora", "sampling")
    _, before = run("sampling", out="other.json")
    titles = [case.title for case in result.cases]
    assert titles == ["forward+backward", "forward", *(case.title for case in before.cases)]


def break_multi_lora(monkeypatch, forward):
    monkeypatch.setattr(clp, "multi_lora_linear", lambda case: {clp.NAME: differentiated(forward)})


def test_a_wrong_variant_shows_no_speedup_and_fails_the_run(run, monkeypatch, capsys):
    from bench.cases import formulas

    break_multi_lora(monkeypatch, lambda t: {"y": formulas.multi_lora(t)["y"] * 1.001})
    code, result = run("multi_lora", "--only", "/ forward /")
    variant = result.cases[0].variant("clp-engine")
    assert code == 1 and variant.status == "wrong" and "torch has" in variant.reason
    row = next(line for line in report.case_table(result.cases[0]) if line.startswith("| clp-engine"))
    assert "but wrong" in row and row.endswith("|  |  |  |  |  |")
    assert "WRONG" in capsys.readouterr().err


def test_a_variant_that_raises_is_a_result_and_ours_fails_the_run(run, monkeypatch):
    def raising(t):
        raise RuntimeError("no such luck")

    break_multi_lora(monkeypatch, raising)
    code, result = run("multi_lora", "--only", "/ forward /")
    assert code == 1
    assert result.cases[0].variant("clp-engine").reason == "raised RuntimeError: no such luck"
    assert result.cases[0].variant("torch").status == "ok"


def test_running_out_of_memory_and_refusing_are_told_apart(run, monkeypatch):
    from bench.peers import plain

    def prepare(kind, case, inputs):
        raise kind("bfloat16 only")

    offered = {
        "torch": functools.partial(prepare, Refused),
        "torch, addmm": functools.partial(prepare, torch.OutOfMemoryError),
    }
    monkeypatch.setattr(plain, "multi_lora_linear", lambda case: offered)
    code, result = run("multi_lora", "--only", "/ forward /")
    reasons = {v.name: v.reason for v in result.cases[0].variants if v.status == "unavailable"}
    assert code == 0 and reasons == {"torch": "bfloat16 only", "torch, addmm": "out of memory"}


def test_the_back_ends_asked_for_are_variants_of_their_own(run):
    _, result = run("decode", "--backends", "reference,nonesuch", "--only", "multi-LoRA")
    names = {v.name: v.status for v in result.cases[0].variants}
    assert names["clp-engine [reference]"] == "ok" and names["clp-engine [nonesuch]"] == "unavailable"


def test_list_names_every_case_and_why_a_peer_is_missing(capsys):
    assert main(["list", "decode", "--device", "cpu", "--sizes", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "decode / sampling / T=256 V=32000 / float32" in printed
    assert "cce" in printed and "needs CUDA" in printed


def test_an_unknown_group_or_peer_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="unknown group 'nonesuch'"):
        main(["list", "nonesuch"])
    with pytest.raises(SystemExit, match="unknown peer 'nonesuch'"):
        main(["list", "decode", "--peers", "nonesuch"])


@pytest.mark.check
def test_a_training_step_is_measured_with_its_memory(run):
    code, result = run("e2e")
    (case,) = result.cases
    ours = case.variant("clp-engine, one objective")
    assert code == 0 and ours.status == "ok" and ours.times.runs == 2, ours.reason
    assert ours.extra_peak_bytes is None or ours.extra_peak_bytes > 0
    assert case.shape == {"batch": 4, "group": 2, "prompt": 12, "new": 4} and case.tokens == 64
    assert {"rollout", "reward", "update", "optimizer", "rest"} <= ours.phases.keys()
    # What the phases do not say of a step, its rest does.
    assert sum(ours.phases.values()) == pytest.approx(ours.times.median, rel=0.5)
    assert 0 < ours.measures["engine_share"] < 1 and ours.measures["logprob_gap_max"] < 1e-4
    table = "\n".join(report.case_table(case))
    assert "tokens/s" in table and "engine's own" in table and "| phase |" in table
