"""clp-engine compare: what is shared, what is repeated, what is reported; on a random two-layer model."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine.conftest import build_model, build_tokenizer

from clp_engine.cli.main import main
from clp_engine.core.errors import ConfigError
from clp_engine.core.statistics import Estimate, Interval, t_probability, t_quantile
from clp_engine.evaluation.compare import compare, make_plan, report, schedule, work
from clp_engine.evaluation.compare.methods import Method
from clp_engine.evaluation.compare.summary import Front, dominated, summarise
from clp_engine.evaluation.front import Base
from clp_engine.evaluation.report import ParetoReport
from clp_engine.policy.logit_mixture import LogitMixture
from clp_engine.training import running
from clp_engine.training.runs import run_spec
from clp_engine.training.runs.run_folder import checkpoints
from clp_engine.training.trainer import CLPTrainer

REWARDS = """
def even(completion_ids, **_):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]

def small(completion_ids, **_):
    return [sum(i < 20 for i in ids) / len(ids) for ids in completion_ids]

def broken(completion_ids, **_):
    raise ArithmeticError("no reward today")
"""
CONFIG = {
    "model": "base",
    "dataset": "prompts.jsonl",
    "eval_dataset": "prompts.jsonl",
    "rewards": {"even": "toy_rewards.py:even", "small": "toy_rewards.py:small"},
    "output_dir": "out",
    "seeds": [0, 1],
    "max_steps": 4,
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "max_completion_length": 5,
    "learning_rate": 1e-2,
    "rank": 2,
    "save_steps": 1,
    "methods": {
        "CLP": {"conditioning": "lora"},
        "specialists": {"kind": "specialists", "weightings": [[1, 0], [0.5, 0.5], [0, 1]]},
        "soup": {"kind": "soup"},
        "rich soup": {"kind": "soup", "budget": "each"},
    },
    "evaluation": {"prompts": 4, "grid": 2, "bootstrap": 10, "batch_rows": 64},
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a base model, prompts and rewards."""
    folder = tmp_path_factory.mktemp("work")
    build_model("llama").save_pretrained(folder / "base")
    build_tokenizer().save_pretrained(folder / "base")
    rows = [{"prompt": " ".join(f"w{(i * j) % 60}" for j in range(1, 3 + i % 3))} for i in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "toy_rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture(autouse=True)
def in_workplace(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.delenv("CLP_DEBUG", raising=False)


@pytest.fixture(scope="module")
def finished(workplace):
    """(config, comparison) of an uninterrupted comparison."""
    before = Path.cwd()
    os.chdir(workplace)
    try:
        return CONFIG, compare(CONFIG, say=lambda line: None)
    finally:
        os.chdir(before)


def changed(**values):
    return {**CONFIG, **values}


def methods(**entries):
    return changed(methods=entries)


# --- the plan ----------------------------------------------------------------------------------------------


def test_runs_that_two_methods_need_are_planned_once():
    plan = make_plan(CONFIG)
    runs_of = {
        name: {run for e in plan.of(name, 0) for run in e.runs}
        for name in ("CLP", "specialists", "soup", "rich soup")
    }
    assert {name: len(found) for name, found in runs_of.items()} == {
        "CLP": 1,
        "specialists": 3,
        "soup": 2,
        "rich soup": 2,
    }
    assert runs_of["rich soup"] < runs_of["specialists"]  # the corners
    assert not runs_of["soup"] & runs_of["specialists"]  # half the budget is another training
    assert len(plan.runs) == 2 * (1 + 3 + 2)
    steps = {name: {plan.runs[run].config["max_steps"] for run in found} for name, found in runs_of.items()}
    assert steps == {"CLP": {4}, "specialists": {4}, "soup": {2}, "rich soup": {4}}


def test_a_specialist_is_a_plain_run_at_its_weighting():
    plan = make_plan(CONFIG)
    (evaluation,) = [e for e in plan.of("specialists", 1) if e.grid == ((0.5, 0.5),)]
    config = plan.runs[evaluation.runs[0]].config
    assert config["conditioning"] == "none" and config["seed"] == 1
    assert config["weight_sampler"] == "fixed" and config["fixed_weights"] == [0.5, 0.5]


def test_what_has_no_effect_on_training_changes_no_digest_and_what_has_one_does():
    def names(**values):
        return set(make_plan(changed(**values)).runs)

    before = names()
    assert (
        names(output_dir="elsewhere", logging_steps=1, save_steps=3, title="x", reference_methods=[])
        == before
    )
    for values in (
        {"rank": 3},
        {"max_steps": 6},
        {"alpha": 0.2},
        {"rewards": {"even": "toy_rewards.py:even"}},
    ):
        if "rewards" in values:
            values["methods"] = {"CLP": {"conditioning": "lora"}}
        assert not names(**values) & before
    # The sampler of w means nothing to a specialist.
    both = names(concentration=0.5) & before
    assert both == {name for name in before if name.startswith("specialist")}


def test_the_digest_follows_the_content_of_data_and_reward_files(tmp_path, monkeypatch):
    for name in ("prompts.jsonl", "toy_rewards.py"):
        (tmp_path / name).write_text(Path(name).read_text())
    (tmp_path / "base").symlink_to(Path("base").resolve())
    before = set(make_plan(CONFIG).runs)
    monkeypatch.chdir(tmp_path)
    assert set(make_plan(CONFIG).runs) == before
    for name in ("prompts.jsonl", "toy_rewards.py"):
        text = Path(name).read_text()
        Path(name).write_text(text + "\n")
        assert not set(make_plan(CONFIG).runs) & before
        Path(name).write_text(text)


def test_conditioned_methods_are_evaluated_at_the_grid_and_at_every_weighting_of_a_specialist():
    plan = make_plan(CONFIG)
    for name in ("CLP", "soup", "rich soup"):
        (evaluation,) = plan.of(name, 0)
        assert evaluation.grid == ((0.0, 1.0), (0.5, 0.5), (1.0, 0.0))
    assert plan.references == ("soup", "specialists")


def test_a_budget_of_tokens_is_shared_by_the_specialists_of_an_equal_soup():
    values = {k: v for k, v in CONFIG.items() if k != "max_steps"} | {"budget_tokens": 1001}
    plan = make_plan(values)
    budgets = {
        name: {plan.runs[run].config["max_generated_tokens"] for run in plan.of(name, 0)[0].runs}
        for name in ("CLP", "soup")
    }
    assert budgets == {"CLP": {1001}, "soup": {501}}  # rounded up, to the baseline's advantage


def test_one_run_over_several_kl_coefficients_beside_one_run_for_each():
    values = changed(
        rewards={"even": "toy_rewards.py:even"},
        alpha_range=[0.05, 0.5],
        methods={
            "multi-KL": {"kl_conditioning": "linear"},
            "single": {"kind": "kl_specialists", "alphas": [0.05, 0.5]},
        },
    )
    plan = make_plan(values)
    (conditioned,) = plan.of("multi-KL", 0)
    assert conditioned.kl == (0.05, 0.5) and conditioned.grid == ((1.0,),)
    singles = plan.of("single", 0)
    assert [e.kl for e in singles] == [0.05, 0.5] and plan.references == ("single",)
    config = plan.runs[singles[0].runs[0]].config
    assert config["alpha"] == 0.05 and config["alpha_range"] is None and config["kl_conditioning"] == "none"


@pytest.mark.parametrize(
    "values, complaint",
    [
        ({"seeds": None}, "seeds is missing"),
        ({"seeds": []}, "expected a list of different whole numbers"),
        ({"seeds": [0, 0]}, "different whole numbers"),
        ({"seed": 1}, "takes a list: seeds"),
        ({"methods": None}, "methods is missing"),
        ({"methods": ["CLP"]}, "methods: expected names and values"),
        ({"methods": {"a": {"kind": "magic"}}}, "kind 'magic'; expected one of clp, specialists, soup"),
        ({"methods": {"a": {"learning_rat": 1}}}, "method 'a': unknown setting learning_rat; did you mean"),
        ({"methods": {"a": {"kind": "soup", "budget": "all"}}}, "budget 'all'; expected equal or each"),
        (
            {"methods": {"a": {"kind": "soup", "conditioning": "lora"}}},
            "conditioning is set by the comparison",
        ),
        ({"methods": {"a": {"seed": 1}}}, "seed is set by the comparison"),
        ({"methods": {"a": {"kind": "specialists", "weightings": [[1, 1]]}}}, "must sum to 1"),
        ({"methods": {"a": {"kind": "specialists", "weightings": [[1, 0], [1, 0]]}}}, "occurs twice"),
        ({"methods": {"a": {"kind": "kl_specialists", "alphas": [0.1]}}}, "takes one objective"),
        ({"methods": {"a": {"kind": "kl_specialists"}}}, r"expected alphas: \[0.01"),
        ({"methods": {"A b": {}, "a-b": {}}}, "would share a folder"),
        ({"evaluation": {"promts": 3}}, "unknown setting promts"),
        ({"evaluation": {"prompts": 0}}, "whole number, at least 1"),
        ({"evaluation": {"grid": 1}}, "grid=1: expected a whole number, at least 2"),
        ({"evaluation": {"margin": "abc"}}, "margin='abc': expected a number"),
        ({"evaluation": {"temperature": "hot"}}, "temperature='hot'"),
        ({"evaluation": {"kl_limit": -1}}, "kl_limit=-1"),
        ({"evaluation": {"split": 3}}, "split=3"),
        ({"methods": {"a": {"max_steps": 7}}}, "max_steps is set by the comparison itself"),
        ({"reference_methods": 3}, "reference_methods=3: expected names"),
        ({"reference_methods": ["soups"]}, "unknown method 'soups'; the methods are CLP"),
        ({"learning_rte": 1}, "the shared settings: unknown setting learning_rte"),
        ({"output_dir": None}, "output_dir is missing"),
        ({"max_steps": -1}, "give budget_tokens"),
        ({"budget_tokens": 10}, "budget_tokens and max_steps were both given"),
        ({"eval_dataset": None}, "eval_dataset is missing"),
        ({"max_generated_tokens": 5}, "takes budget_tokens"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused_by_name(values, complaint):
    with pytest.raises(ConfigError, match=complaint):
        make_plan(changed(**values))


# --- doing it ----------------------------------------------------------------------------------------------


def essence(folder):
    """Everything in comparison.json but times."""
    raw = json.loads((Path(folder) / "comparison.json").read_text())
    for method in raw["methods"]:
        del method["seconds"]
    return {name: raw[name] for name in ("methods", "contrasts", "reference_point", "missing", "objectives")}


def test_every_run_and_report_is_an_ordinary_one_and_training_is_accounted_for(finished):
    _, comparison = finished
    plan = make_plan(CONFIG)
    for name, run in plan.runs.items():
        folder = plan.run_folder(name)
        assert (
            running.is_finished(folder)
            and run_spec.RunSpec.load(folder).config["max_steps"] == run.config["max_steps"]
        )
        assert not checkpoints(folder)  # nothing to go on from any more
        took = work.Training.load(plan.training_record(name))
        assert took.steps == run.config["max_steps"] and took.completions == took.steps * 4
        assert took.steps * 4 <= took.generated_tokens <= took.steps * 4 * 5 and took.seconds > 0
    for evaluation in plan.evaluations.values():
        loaded = ParetoReport.load(plan.evaluation_folder(evaluation.name))
        assert len(loaded.points) == len(evaluation.grid)
        assert loaded.reference_point == comparison.reference_point
    base = ParetoReport.load(plan.evaluation_folder("base"))
    for name in base.objectives:
        assert comparison.reference_point[name] == pytest.approx(base.base.rewards[name].mean - 0.1)
    assert comparison.method("soup").steps.mean == comparison.method("CLP").steps.mean == 4
    assert comparison.method("specialists").steps.mean == 12 and comparison.missing == []


def test_records_and_reports_are_enough_to_go_on_from(workplace, finished):
    folder = workplace / "moved"
    for part in ("trainings", "evaluations"):
        shutil.copytree(Path(CONFIG["output_dir"]) / part, folder / part)
    config = changed(output_dir=str(folder))
    plan = make_plan(config)
    assert all(piece.is_done(plan) for piece in schedule.pieces(plan))
    compare(config)
    assert essence(folder) == essence(CONFIG["output_dir"]) and not (folder / "runs").exists()
    # what is evaluated in another way needs the policies again
    other = make_plan({**config, "evaluation": {**CONFIG["evaluation"], "prompts": 2}})
    assert not any(piece.is_done(other) for piece in schedule.pieces(other))


def test_tokens_are_counted_to_the_last_one(workplace, finished):
    """Against the lengths in completions.jsonl, with a logging interval that does not divide the steps."""
    folder = workplace / "counted"
    spec = dataclasses.replace(make_plan(CONFIG).spec, command="train")
    from clp_engine.training.settings.config import CLPConfig

    values = {n: v for n, v in CONFIG.items() if n in {f.name for f in dataclasses.fields(CLPConfig)}}
    config = CLPConfig.from_dict(
        {
            **values,
            "output_dir": str(folder),
            "logging_steps": 3,
            "log_completions": True,
            "disable_tqdm": True,
        }
    )
    lengths = []
    rewards = {"even": lambda completion_ids, **_: [lengths.append(len(i)) or 0.0 for i in completion_ids]}
    trainer = CLPTrainer(spec.model, rewards, config, spec.train_rows())
    trainer.train()
    took = work._training(trainer)
    # A stop token is generated, but no part of completion_ids.
    assert took.completions == len(lengths) == 16
    assert sum(lengths) <= took.generated_tokens <= sum(lengths) + len(lengths)
    first = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    assert took.generated_tokens != pytest.approx(
        first["completions/mean_length"] * 12
    )  # the fourth step is in it


def test_a_soup_at_a_corner_is_the_specialist_of_that_corner(finished):
    """Same deltas, same random numbers: the same rewards, completion for completion."""
    plan = make_plan(CONFIG)
    (soup,) = plan.of("rich soup", 0)
    points = {tuple(p.weights.values()): p for p in work.report_of(plan, soup).points}
    for evaluation in plan.of("specialists", 0):
        (single,) = work.report_of(plan, evaluation).points
        if max(single.weights.values()) == 1:
            assert points[tuple(single.weights.values())].rewards == single.rewards


def test_doing_it_again_does_nothing_and_reports_the_same(finished, monkeypatch):
    before = essence("out")
    monkeypatch.setattr(work, "train", pytest.fail)
    monkeypatch.setattr(work, "evaluate", pytest.fail)
    said = []
    compare(CONFIG, say=said.append)
    assert said == [] and essence("out") == before


@pytest.mark.check
def test_a_comparison_killed_in_the_middle_of_runs_ends_as_one_that_never_was(
    finished, workplace, monkeypatch
):
    config = changed(output_dir="killed")
    (workplace / "killed.json").write_text(json.dumps(config))
    code = """
import json, os
from clp_engine.training import trainer
from clp_engine.evaluation.compare import compare
step = trainer.CLPTrainer._step
def dying(self, bar):
    result = step(self, bar)
    if self.state.global_step == 3 and "specialist-0-1" in self.args.output_dir:
        os.kill(os.getpid(), 9)
    return result
trainer.CLPTrainer._step = dying
compare(json.load(open("killed.json")))
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    plan = make_plan(config)
    done = {name for name, run in plan.runs.items() if work.is_trained(plan, run)}
    (cut,) = [name for name in plan.runs if name not in done and checkpoints(plan.run_folder(name))]
    assert 1 < len(done) < len(plan.runs) and cut.startswith("specialist-0-1")
    trained = []
    original = work.running.train
    monkeypatch.setattr(
        work.running,
        "train",
        lambda spec, config, **more: (
            trained.append((Path(config.output_dir).name, more["resume"])) or original(spec, config, **more)
        ),
    )
    compare(config, say=lambda line: None)
    assert (cut, True) in trained and not done & {name for name, _ in trained}
    assert len(trained) == len(plan.runs) - len(done)
    assert essence("killed") == essence("out")


@pytest.mark.check
def test_processes_give_what_one_gives(finished):
    config = methods(soup={"kind": "soup"}) | {"output_dir": "parallel", "seeds": [0]}
    said = []
    parallel = compare(config, jobs=2, say=said.append).method("soup")
    alone = finished[1].method("soup")
    # Other numbers of threads may sum in another order.
    assert parallel.hypervolume.mean == pytest.approx(alone.hypervolume.values[0], rel=1e-3)
    assert parallel.generated_tokens.mean == alone.generated_tokens.values[0]
    assert len(said) == 2 + 2 and all(line.startswith("[") for line in said)


def test_what_another_process_is_at_is_left_to_it(finished, workplace):
    plan = make_plan(changed(output_dir="locked"))
    folder = plan.output_dir / "runs"
    folder.mkdir(parents=True)
    lock = folder / f".{next(iter(plan.runs))}.lock"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()",
            str(lock),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "\n"
    run = next(iter(plan.runs.values()))
    with pytest.raises(work.Busy, match="another process is at"):
        work.train(plan, run)
    holder.kill()  # whatever becomes of the holder, the lock is free
    holder.wait()
    with work.exclusive(plan.run_folder(run.name)):
        pass


@pytest.mark.check
def test_an_interrupt_stops_all_processes_with_a_checkpoint_each(workplace):
    config = changed(
        output_dir="stopped", seeds=[0], max_steps=2000, methods={"CLP": {}, "wide": {"rank": 3}}
    )
    (workplace / "stopped.yaml").write_text(json.dumps(config))  # JSON is YAML
    command = [sys.executable, "-m", "clp_engine", "compare", "stopped.yaml", "--jobs", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        plan = make_plan(config)
        deadline = time.monotonic() + 120
        while not all(checkpoints(plan.run_folder(name)) for name in plan.runs):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()  # its workers end with it
    assert process.returncode == 130 and "nothing is lost; go on with: clp-engine compare" in errors
    for name in plan.runs:
        with work.exclusive(plan.run_folder(name)):  # nobody holds it any more
            assert checkpoints(plan.run_folder(name)) and not work.is_trained(plan, plan.runs[name])


@pytest.mark.check
def test_a_failing_run_is_named_with_its_log_and_stops_nothing_else(finished, capsys):
    config = methods(
        good={"conditioning": "lora"}, bad={"conditioning": "lora", "target_modules": ["nowhere"]}
    )
    config |= {"output_dir": "failing", "seeds": [0]}
    Path("failing.yaml").write_text(json.dumps(config))
    assert main(["compare", "failing.yaml"]) == 1
    captured = capsys.readouterr()
    assert "1 failed; 1 more waited for them" in captured.err and "nowhere" in captured.err
    plan = make_plan(config)
    (bad,) = [r for r in plan.runs if plan.users(r) == ["bad"]]
    log = Path(f"failing/logs/train-{bad}.log")
    assert str(log) in captured.err and "Traceback" in log.read_text()
    assert "good" in captured.out and "bad, seed 0" in Path("failing/comparison.md").read_text()


@pytest.mark.check
def test_a_report_is_made_again_where_its_settings_changed_and_runs_are_not(finished, monkeypatch):
    config = methods(CLP={"conditioning": "lora"}) | {"output_dir": "again", "seeds": [0]}
    first = compare(config, say=lambda line: None)
    monkeypatch.setattr(work, "train", pytest.fail)
    config["evaluation"] = {**config["evaluation"], "prompts": 6}
    second = compare(config, say=lambda line: None)
    assert first.setup["prompts"] == 4 and second.setup["prompts"] == 6
    assert first.method("CLP").hypervolume != second.method("CLP").hypervolume


def test_a_run_made_under_another_default_is_noticed(finished):
    plan = make_plan(CONFIG)
    name, run = next(iter(plan.runs.items()))
    folder = plan.run_folder(name)
    saved = (folder / "run.json").read_text()
    (folder / "run.json").write_text(saved.replace('"epsilon": 0.2', '"epsilon": 0.3'))
    try:
        with pytest.raises(ConfigError, match="trained with another epsilon"):
            work.is_trained(plan, run)
    finally:
        (folder / "run.json").write_text(saved)


def test_logit_mixing_evaluates_the_mixture_of_the_soups_specialists(finished):
    config = methods(
        mixing={"kind": "logit_mixing", "budget": "each"}, soup={"kind": "soup", "budget": "each"}
    )
    plan = make_plan(config)
    (mixing,), (soup,) = plan.of("mixing", 0), plan.of("soup", 0)
    assert mixing.runs == soup.runs and mixing.assembly == "logit_mixing"
    mixture = work._assemble(plan, mixing)
    assert isinstance(mixture, LogitMixture)
    theirs, mine = work._assemble(plan, soup).adapter_parameters(), mixture.policy.adapter_parameters()
    assert all(torch.equal(theirs[name], mine[name]) for name in mine)


# --- figures -----------------------------------------------------------------------------------------------


def test_students_quantiles_are_those_of_the_tables():
    table = {1: 12.706205, 2: 4.302653, 3: 3.182446, 4: 2.776445, 9: 2.262157, 10: 2.228139, 30: 2.042272}
    for df, value in table.items():
        assert t_quantile(0.95, df) == pytest.approx(value, abs=1e-6)
    # df 1 and 2 have closed forms.
    for t in (0.3, 1.7, 25.0):
        assert t_probability(t, 1) == pytest.approx(2 / math.pi * math.atan(t))
        assert t_probability(t, 2) == pytest.approx(t / math.sqrt(2 + t * t))


def test_an_estimate_is_the_mean_with_students_interval_and_has_none_with_one_seed():
    estimate = Estimate.of([1.0, 2.0, 6.0])
    half = 4.302653 * math.sqrt(7) / math.sqrt(3)
    assert estimate.mean == pytest.approx(3) and estimate.high - 3 == pytest.approx(half, rel=1e-6)
    assert 3 - estimate.low == pytest.approx(half, rel=1e-6) and estimate.values == (1.0, 2.0, 6.0)
    alone = Estimate.of([2.5])
    assert (alone.mean, alone.low, alone.high, alone.half_width) == (2.5, None, None, None)


GRID = [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]


def front(rewards, weights=GRID, kl=1.0, kl_coef=0.1):
    count = len(rewards)
    weights = np.array(weights, float).reshape(count, -1)
    kl_coefs = np.broadcast_to(np.asarray(kl_coef, float), count)
    kls = np.broadcast_to(np.asarray(kl, float), count)
    return Front(weights, kl_coefs, np.array(rewards, float).reshape(count, -1), kls, np.full(count, 7.0))


def synthetic(**more):
    """Two seeds: CLP at five weightings, specialists at three, a soup at five."""
    fine = [(0.0, 1.0), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25), (1.0, 0.0)]
    clp = [[0, 4], [1, 3.5], [2.5, 2.5], [3.5, 1], [4, 0]]
    soup = [[0, 3], [1, 2.5], [2, 2], [2.5, 1], [3, 0]]
    special = [[0, 4], [3, 3], [4, 0]]
    chosen = [
        Method("CLP", "clp"),
        Method("specialists", "specialists", weightings=tuple(GRID)),
        Method("soup", "soup"),
    ]
    fronts = {
        "CLP": {s: front(np.array(clp) * (1 + s), fine, kl=2 + s) for s in (0, 1)},
        "specialists": {s: front(np.array(special) * (1 + s), kl=3.0) for s in (0, 1)},
        "soup": {s: front(np.array(soup) * (1 + s), fine, kl=1.0) for s in (0, 1)},
    }
    took = work.Training(10.0, 4, 16, 60, 100, 1, "cpu", {}, "abc")
    trainings = {
        name: {s: [took] * n for s in (0, 1)} for name, n in (("CLP", 1), ("specialists", 3), ("soup", 2))
    }
    point = Interval(0.0, 0.0, 0.0)
    base = Base({"a": point, "b": point}, 0.0, point, 7.0, 0.0)
    stand_in = SimpleNamespace(reference_point={"a": 0.0, "b": 0.0}, base=base, commit="abc")
    about = dict(
        objectives=["a", "b"],
        references=["soup", "specialists"],
        missing=[],
        task=None,
        model="toy",
        seeds=[0, 1],
        setup={"prompts": 4, "num_generations": 1, "temperature": 1.0, "margin": 0.1, "kl_limit": None},
        config={"max_steps": 4, "seeds": [0, 1], "methods": {}},
        command="clp-engine compare toy.yaml",
    )
    return summarise(chosen, fronts, trainings, stand_in, **{**about, **more})


def test_metrics_are_those_of_each_seed_averaged_and_volumes_also_at_the_specialists_weightings():
    result = synthetic()
    clp, special = result.method("CLP"), result.method("specialists")
    # Unions of boxes by hand; the second seed's rewards are twice the first's, its areas four times.
    assert clp.hypervolume.values == pytest.approx((8.25, 33.0))  # 1 * 3.5 + 1.5 * 2.5 + 1 * 1
    assert clp.hypervolume_matched.values == pytest.approx((6.25, 25.0))
    assert special.hypervolume.values == special.hypervolume_matched.values == pytest.approx((9.0, 36.0))
    assert clp.realised_utility.values == pytest.approx(
        tuple(np.array([4, 2.875, 2.5, 2.875, 4]).mean() * s for s in (1, 2))
    )
    assert clp.realised_utility_matched.values == pytest.approx((3.5, 7.0))
    assert clp.kl.values == (2.0, 3.0) and clp.steerability["a"].values == pytest.approx((1.0, 1.0))
    assert (
        special.seconds.mean == 30.0
        and special.generated_tokens.mean == 180
        and special.trained_parameters == 300
    )
    assert [p.matched for p in clp.points] == [True, False, True, False, True]


def test_contrasts_are_paired_over_seeds_and_weightings():
    result = synthetic()
    contrast = next(c for c in result.contrasts if (c.method, c.reference) == ("CLP", "soup"))
    soup = result.method("soup")
    assert soup.hypervolume.values == pytest.approx((5.0, 20.0))  # 1 * 2.5 + 1 * 2 + 0.5 * 1
    assert contrast.volume_ratio.values == pytest.approx((1.65, 1.65))
    assert contrast.volume_ratio_matched.values == pytest.approx((6.25 / 4, 6.25 / 4))
    # (0, 3) and (3, 0) are beaten by (0, 4) and (4, 0), (1, 2.5) by (1, 3.5), (2, 2) and (2.5, 1) by (2.5, 2.5).
    assert contrast.dominated.values == (5, 5) and contrast.reference_points == 5
    gains = [1.0, 0.75, 0.5, 0.75, 1.0]
    assert [d.utility.values[0] for d in contrast.differences] == pytest.approx(gains)
    assert contrast.utility.values == pytest.approx((np.mean(gains), 2 * np.mean(gains)))
    # (1 - 0.1) w.R - 0.1 KL, with a KL of 2 and 3 against 1.
    expected = [0.9 * np.mean(gains) - 0.1 * 1, 1.8 * np.mean(gains) - 0.1 * 2]
    assert contrast.objective.values == pytest.approx(expected)
    three = next(c for c in result.contrasts if (c.method, c.reference) == ("CLP", "specialists"))
    assert len(three.differences) == 3 and three.volume_ratio_matched.values == pytest.approx(
        (6.25 / 9, 6.25 / 9)
    )


def test_domination_needs_one_reward_to_be_better():
    assert dominated(np.array([[1.0, 1.0]]), np.array([[1.0, 1.0], [1.0, 0.5], [2.0, 0.0]])) == 1


def test_with_beta_the_objective_is_trls():
    contrast = next(
        c for c in synthetic(kl_is_beta=True).contrasts if (c.method, c.reference) == ("CLP", "soup")
    )
    assert contrast.objective.values[0] == pytest.approx(contrast.utility.values[0] - 0.1)


def test_reward_against_kl_is_the_area_above_the_base_up_to_the_limit():
    chosen = [Method("multi", "clp"), Method("single", "kl_specialists", kls=(0.1, 0.5))]
    kl_coefs = [0.1, 0.5]
    fronts = {
        "multi": {0: front([[3.0], [2.0]], [[1.0], [1.0]], kl=[4.0, 1.0], kl_coef=kl_coefs)},
        "single": {0: front([[3.5], [2.0]], [[1.0], [1.0]], kl=[5.0, 1.0], kl_coef=kl_coefs)},
    }
    took = work.Training(1.0, 1, 1, 1, 1, 1, "cpu", {}, None)
    interval = Interval(1.0, 1.0, 1.0)
    base = SimpleNamespace(
        reference_point={"a": 0.9}, base=Base({"a": interval}, 0.0, interval, 7.0, 0.0), commit=None
    )
    result = summarise(
        chosen,
        fronts,
        {"multi": {0: [took]}, "single": {0: [took] * 2}},
        base,
        objectives=["a"],
        references=["single"],
        missing=[],
        task=None,
        model="toy",
        seeds=[0],
        setup={"prompts": 4, "num_generations": 1, "temperature": 1.0, "margin": 0.1, "kl_limit": None},
        config={"max_steps": 4, "seeds": [0], "methods": {}},
        command="",
    )
    assert result.kl_limit == 5.0 and result.varies_kl
    # From KL 1 the gain over the base's 1.0 is 1, from KL 4 it is 2.
    assert result.method("multi").kl_volume.mean == pytest.approx(3 * 1 + 1 * 2)
    assert result.method("single").kl_volume.mean == pytest.approx(4 * 1)
    assert result.method("multi").kl_steerability.mean == pytest.approx(-1)
    (contrast,) = result.contrasts
    assert contrast.volume_ratio_matched.mean == pytest.approx(5 / 4)
    # (2, KL 1) is there twice, (3.5, KL 5) is the best of its reward: nothing is dominated, though 3 beats 2 in reward.
    assert contrast.dominated.mean == 0
    text = report.markdown(result)
    assert "objective less that of single, point by point" in text and "w.R less" not in text
    assert "KL coefficient" in text and "KL steerability" in text and "no intervals" in text


# --- the report --------------------------------------------------------------------------------------------


@pytest.mark.check
@pytest.mark.parametrize("count", [1, 2, 3])
def test_report_and_pictures_are_written_for_any_number_of_objectives(tmp_path, count):
    from clp_engine.objectives.weightings import simplex_lattice

    names = ["a", "b", "c"][:count]
    grid = simplex_lattice(count, 3).tolist()
    rng = np.random.default_rng(0)
    chosen = [
        Method("one", "clp"),
        Method("two", "soup"),
        Method("best", "specialists", weightings=tuple(map(tuple, grid))),
    ]
    fronts = {m.name: {s: front(rng.random((len(grid), count)), grid) for s in (0, 1)} for m in chosen}
    took = work.Training(1.0, 1, 1, 1, 1, 1, "cpu", {}, None)
    interval = Interval(0.2, 0.1, 0.3)
    base = SimpleNamespace(
        reference_point=dict.fromkeys(names, 0.1),
        base=Base(dict.fromkeys(names, interval), 0.0, interval, 7.0, 0.0),
        commit=None,
    )
    result = summarise(
        chosen,
        fronts,
        {m.name: {s: [took] for s in (0, 1)} for m in chosen},
        base,
        objectives=names,
        references=["two"],
        missing=[],
        task="toy",
        model="toy",
        seeds=[0, 1],
        setup={"prompts": 4, "num_generations": 1, "temperature": 1.0, "margin": 0.1, "kl_limit": None},
        config={"max_steps": 4, "seeds": [0, 1], "methods": {}, "title": "A title"},
        command="clp-engine compare toy.yaml",
    )
    written = report.write(result, tmp_path)
    assert [p.name for p in written] == ["comparison.json", "comparison.md", "fronts.png", "metrics.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written[2:])
    raw = json.loads(written[0].read_text())
    assert len(raw["methods"]) == 3 and raw["methods"][0]["hypervolume"]["values"]
    text = written[1].read_text()
    assert (
        text.startswith("# A title")
        and "## Against two" in text
        and "](fronts.png)" in text
        and "](metrics.png)" in text
    )


def test_every_figure_of_the_page_has_its_interval_and_every_table_is_whole():
    result = synthetic()
    text = report.markdown(result, pictures=False)
    assert ".png" not in text
    for line in report.method_table(result).splitlines()[2:]:
        assert line.count("±") == 9  # volumes, utilities, IGD+, steerability twice, KL, tokens
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1
    assert "1.650 ± 0.000" in text  # the ratio is the same at both seeds: 8.25 / 5
    (line,) = [line for line in text.splitlines() if line.startswith("- **CLP**: against soup")]
    assert "1.56 ± 0.00 times the volume at the same weightings" in line
    assert "(within the luck of seeds)" in line and "for 0.50 times the tokens" in line
    assert "clp-engine compare toy.yaml" in text and "max_steps: 4" in text


def test_without_matplotlib_the_page_is_written_and_a_line_says_so(tmp_path, monkeypatch, capsys):
    for name in [
        n
        for n in sys.modules
        if n.partition(".")[0] == "matplotlib" or n == "clp_engine.evaluation.compare.plots"
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written = report.write(synthetic(), tmp_path)
    assert [p.name for p in written] == ["comparison.json", "comparison.md"]
    assert "pip install 'clp-engine[plot]'" in capsys.readouterr().err


# --- the command -------------------------------------------------------------------------------------------


def test_dry_run_says_what_there_is_to_do_and_what_is_done(finished, capsys):
    Path("config.yaml").write_text(json.dumps(CONFIG))
    assert main(["compare", "config.yaml", "--dry-run"]) == 0
    done = capsys.readouterr().out
    assert "12 of 12 runs and 13 of 13 evaluations are done" in done
    assert (
        main(
            [
                "compare",
                "config.yaml",
                "--output-dir",
                "nowhere",
                "--dry-run",
                "--only",
                "soup",
                "--seeds",
                "1",
            ]
        )
        == 0
    )
    fresh = capsys.readouterr().out
    assert "0 of 2 runs and 0 of 2 evaluations" in fresh and not Path("nowhere").exists()
    assert "2 steps; soup" in fresh and "specialists" not in fresh


def test_report_only_prints_the_tables(finished, capsys):
    Path("config.yaml").write_text(json.dumps(CONFIG))
    assert main(["compare", "config.yaml", "--report-only"]) == 0
    printed = capsys.readouterr().out
    assert "against soup" in printed and "against specialists" in printed and "out/comparison.md" in printed


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--only", "soups"], "unknown method 'soups'"),
        (["--seeds", "7"], "seed 7 is not among the seeds 0, 1"),
        (["--seeds", "one"], "expected whole numbers"),
        (["--jobs", "0"], "--jobs: 0: expected a whole number, at least 1"),
        (["--output-dir", "nothing", "--report-only"], "no method has been evaluated yet"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(arguments, complaint, capsys):
    Path("config.yaml").write_text(json.dumps(CONFIG))
    assert main(["compare", "config.yaml", *arguments]) == 2
    errors = capsys.readouterr().err
    assert complaint in errors and errors.count("\n") == 1


def test_a_configuration_file_that_is_missing_is_one_line(capsys):
    assert main(["compare", "missing.yaml"]) == 2
    assert "cannot read missing.yaml" in capsys.readouterr().err
