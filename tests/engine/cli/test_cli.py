"""The command line: a run from training to export, and one line with exit code 2 for every mistake."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from engine.conftest import build_model, build_tokenizer
from safetensors.torch import load_file

from clp_engine.cli.main import main
from clp_engine.core.errors import ConfigError
from clp_engine.core.ranges import parse_assignments
from clp_engine.data import sources
from clp_engine.training import running
from clp_engine.training.runs import run_spec
from clp_engine.training.settings.config import CLPConfig

REWARDS = """
def even(completion_ids, **_):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]

def small(completion_ids, **_):
    return [sum(i < 20 for i in ids) / len(ids) for ids in completion_ids]
"""
CONFIG = """
model: base
dataset: prompts.jsonl
eval_dataset: prompts.jsonl
rewards: {even: "toy_rewards.py:even", small: "toy_rewards.py:small"}
output_dir: run
max_steps: 4
num_generations: 2
per_device_train_batch_size: 4
max_completion_length: 5
learning_rate: 1e-2
rank: 2
save_steps: 2
disable_tqdm: true
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a base model, prompts, rewards and a configuration."""
    folder = tmp_path_factory.mktemp("work")
    build_model("llama").save_pretrained(folder / "base")
    build_tokenizer().save_pretrained(folder / "base")
    rows = [{"prompt": " ".join(f"w{(i * j) % 60}" for j in range(1, 3 + i % 3))} for i in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.txt").write_text("w1 w2\n\nw3\n")
    (folder / "toy_rewards.py").write_text(REWARDS)
    (folder / "config.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def trained(workplace):
    """The run that `clp-engine train config.yaml` leaves."""
    before = Path.cwd()
    os.chdir(workplace)
    try:
        assert main(["train", "config.yaml"]) == 0
    finally:
        os.chdir(before)
    return workplace / "run"


@pytest.fixture(autouse=True)
def in_workplace(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.delenv("CLP_DEBUG", raising=False)


def refused(argv, capsys) -> str:
    """The line on stderr of a command that must end with exit code 2."""
    capsys.readouterr()
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("clp-engine: error: ") and captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


# --- from training to export
# ------------------------------------------------------------------------------------------


def test_train_writes_a_policy_and_what_is_needed_to_evaluate_it(trained):
    spec = run_spec.RunSpec.load(trained)
    assert spec.objectives == ("even", "small") and spec.train_seconds > 0 and spec.config["max_steps"] == 4
    assert running.is_finished(trained) and [p.name for p in running.checkpoints(trained)] == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    adapters = load_file(trained / "policy" / "adapters.safetensors")
    assert any(t.abs().max() > 0 for name, t in adapters.items() if name.endswith("lora_b"))


def test_evaluate_writes_the_report_into_the_run_and_prints_the_table(trained, capsys):
    assert main(["evaluate", "run", "--prompts", "3", "--bootstrap", "20", "--grid", "3"]) == 0
    printed = capsys.readouterr().out
    raw = json.loads((trained / "report.json").read_text())
    assert len(raw["points"]) == 3 and raw["setup"]["prompts"] == 3 and raw["seconds"]["train"] > 0
    assert "| base |" in " ".join(printed.split()) and "hypervolume" in printed and "run/report.md" in printed


def test_evaluate_at_several_kl_coefficients(trained, tmp_path, capsys):
    small = ["--prompts", "2", "--bootstrap", "5", "--grid", "2", "--out", str(tmp_path)]
    assert main(["evaluate", "run", "--kl", "0.01,0.3", "--kl-limit", "4", *small]) == 0
    assert "alpha" in capsys.readouterr().out
    raw = json.loads((tmp_path / "report.json").read_text())
    assert [p["kl_coef"] for p in raw["points"]] == [0.01, 0.01, 0.3, 0.3] and raw["kl_limit"] == 4


def test_evaluate_takes_a_policy_alone_with_dataset_and_rewards(trained, tmp_path):
    assert (
        main(
            [
                "evaluate",
                "run/policy",
                "--dataset",
                "prompts.jsonl",
                "--prompts",
                "2",
                "--bootstrap",
                "5",
                "--max-new-tokens",
                "8",
                "--grid",
                "2",
                "--rewards",
                "small=toy_rewards.py:small",
                "even=toy_rewards.py:even",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "report.json").read_text())["objectives"] == ["even", "small"]


def test_variance_measures_the_estimators_along_the_run(trained, capsys):
    small = [
        "--batches",
        "3",
        "--bootstrap",
        "10",
        "--estimators",
        "return,k3",
        "--baselines",
        "leave_one_out",
    ]
    before = (trained / "run.json").read_bytes(), (trained / "log.jsonl").read_bytes()
    assert main(["variance", "run", *small]) == 0
    shown = capsys.readouterr().out
    raw = json.loads((trained / "variance.json").read_text())
    assert [m["step"] for m in raw["moments"]] == [0, 2, 4]
    assert [n["estimator"] for n in raw["moments"][1]["noise"]] == ["return", "k3"]
    assert len([line for line in shown.splitlines() if line.startswith("|")]) == 2 + 3 * 2
    # At the start the policy is the reference: every estimator of its KL is exactly zero.
    assert raw["moments"][0]["noise"][1]["bias"]["mean"] == pytest.approx(0, abs=1e-6)
    assert before == ((trained / "run.json").read_bytes(), (trained / "log.jsonl").read_bytes())


def test_generate_prints_one_completion_per_prompt_and_depends_on_the_weights(trained, capsys):
    printed = {}
    for weights in ("even=1", "even=1,small=0", "1,0", "even=0,small=1"):
        assert main(["generate", "run", "--weights", weights, "--prompts", "prompts.txt", "--seed", "3"]) == 0
        printed[weights] = capsys.readouterr().out
    assert printed["even=1"] == printed["even=1,small=0"] == printed["1,0"]
    assert len(printed["even=1"].splitlines()) == 2


def test_generate_as_json_and_from_the_standard_input(trained, capsys, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("w1 w2"))
    assert main(["generate", "run", "--prompt", "-", "--json", "--num-return-sequences", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["w1 w2"] * 2 and all(row["completion"] for row in rows)


def test_export_writes_an_adapter_or_a_model_and_does_not_replace_a_folder_unasked(trained, tmp_path, capsys):
    target = str(tmp_path / "out")
    assert main(["export", "run", "--weights", "even=0.25,small=0.75", "--to", target]) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4
    assert "exists" in refused(["export", "run", "--weights", "0.5,0.5", "--to", target], capsys)
    assert main(["export", "run", "--weights", "0.5,0.5", "--to", target, "--merged", "--overwrite"]) == 0
    from transformers import AutoModelForCausalLM

    merged, base = (AutoModelForCausalLM.from_pretrained(p) for p in (target, "base"))
    assert not torch.equal(merged.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)


def test_export_writes_a_stack_whose_defaults_are_the_given_weights(trained, tmp_path, capsys):
    arguments = [
        "export",
        "run",
        "--stack",
        "--weights",
        "even=0.25,small=0.75",
        "--to",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "stack: " in printed and "rank: 8 (for vLLM: --max-lora-rank 8)" in printed
    blend = json.loads((tmp_path / "out" / "clp_blend.json").read_text())
    assert (blend["ranks"], blend["default_weights"]) == ([2, 2], {"even": 0.25, "small": 0.75})


EXPORTS = {
    "adapter": ["--weights", "0.5,0.5"],
    "model": ["--weights", "0.5,0.5", "--merged"],
    "each": ["--each"],
    "stack": ["--stack"],
}


@pytest.mark.parametrize("kind", EXPORTS)
def test_overwriting_an_export_keeps_other_files(trained, tmp_path, kind):
    target = tmp_path / "out"
    (target / "even").mkdir(parents=True)
    for name in ("notes.txt", "even/notes.txt", "adapter_model.bin"):
        (target / name).write_text("mine")
    arguments = ["export", "run", *EXPORTS[kind], "--to", str(target), "--overwrite"]
    for _ in range(2):
        assert main(arguments) == 0
    for name in ("notes.txt", "even/notes.txt", "adapter_model.bin"):
        assert (target / name).read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", EXPORTS)
@pytest.mark.parametrize(
    ("target", "how"),
    [("run", "holds"), ("run/policy", "is"), ("run/policy/out", "lies in"), ("base", "is"), (".", "holds")],
)
def test_an_export_into_what_it_reads_is_refused_and_changes_nothing(
    workplace, trained, capsys, kind, target, how
):
    before = {path: path.stat().st_mtime_ns for path in workplace.rglob("*") if path.is_file()}
    message = refused(["export", "run", *EXPORTS[kind], "--to", target, "--overwrite"], capsys)
    assert f"{target} {how} {workplace}" in message and "is being read; give another folder" in message
    assert before == {path: path.stat().st_mtime_ns for path in workplace.rglob("*") if path.is_file()}


def test_a_merged_model_replaces_the_weights_of_an_earlier_export_and_no_adapter_of_somebody_else(
    trained, tmp_path, capsys
):
    target, model = tmp_path / "out", [*EXPORTS["model"], "--overwrite"]
    assert main(["export", "run", *EXPORTS["adapter"], "--to", str(target)]) == 0
    (target / "model.safetensors.index.json").write_text("{}")  # of a model in parts
    assert main(["export", "run", "--to", str(target), *model]) == 0
    assert not {"adapter_config.json", "model.safetensors.index.json"} & {p.name for p in target.iterdir()}
    (target / "adapter_config.json").write_text("mine")
    before = (target / "model.safetensors").stat().st_mtime_ns
    assert "holds an adapter" in refused(["export", "run", "--to", str(target), *model], capsys)
    assert (target / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("wrong", [["--model", "no-such-model"], ["--rewards", "even=toy_rewards.py:od"]])
def test_overwriting_with_a_mistake_costs_nothing(trained, capsys, wrong):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    refused(["train", "config.yaml", "--overwrite", *wrong], capsys)
    assert before == {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}


def test_a_refused_resume_leaves_the_description_of_the_run(trained, capsys):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    message = refused(["train", "config.yaml", "--resume", "--learning-rate", "1"], capsys)
    assert "other settings for learning_rate" in message
    assert before == {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}


def test_overwriting_replaces_run_and_reports_and_keeps_other_files(trained, tmp_path, workplace):
    folder = tmp_path / "run"
    train = ["train", "config.yaml", "--output-dir", str(folder), "--max-steps", "2"]
    small = ["--prompts", "2", "--bootstrap", "10", "--grid", "2"]
    assert main(train) == 0 and main(["evaluate", str(folder), *small]) == 0
    first = run_spec.RunSpec.load(folder).run
    for name in ("notes.txt", "policy/notes.txt"):
        (folder / name).write_text("mine")
    assert main(["export", str(folder), *EXPORTS["adapter"], "--to", str(folder / "brief")]) == 0
    assert (folder / "report.md").is_file()
    assert main([*train, "--overwrite", "--max-steps", "1", "--save-strategy", "no"]) == 0
    left = {path.relative_to(folder).as_posix() for path in folder.iterdir()}
    assert left == {"brief", "log.jsonl", "clp_manifest.json", "notes.txt", "policy", "run.json"}
    assert (folder / "policy" / "notes.txt").read_text() == (folder / "notes.txt").read_text() == "mine"
    assert run_spec.RunSpec.load(folder).run not in (None, first)


@pytest.mark.check
def test_two_trainings_at_once_in_one_folder_are_refused(workplace, trained, capsys):
    slow = "import time\n" + REWARDS.replace("    return [sum(i <", "    time.sleep(0.3); return [sum(i <")
    (workplace / "slow_rewards.py").write_text(slow)
    command = ["train", "config.yaml", "--output-dir", "shared", "--max-steps", "200"]
    rewards = ["--rewards", "even=slow_rewards.py:even", "small=slow_rewards.py:small"]
    first = subprocess.Popen(
        [sys.executable, "-m", "clp_engine", *command, *rewards], stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not (workplace / "shared" / "run.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        message = refused([*command, "--overwrite"], capsys)
        assert f"process {first.pid} on" in message and "is training in this folder; wait" in message
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    assert (workplace / "shared" / ".lock").exists()
    assert main([*command, "--max-steps", "1", "--overwrite"]) == 0
    assert not (workplace / "shared" / ".lock").exists()


def test_a_flag_overrides_the_file_and_an_earlier_run_is_not_replaced_unasked(workplace, trained, capsys):
    assert "earlier run" in refused(["train", "config.yaml"], capsys)
    arguments = [
        "train",
        "config.yaml",
        "--output-dir",
        "other",
        "--max-steps",
        "1",
        "--no-disable-tqdm",
        "--target-modules",
        "q_proj,v_proj",
        "--objectives",
        "small",
    ]
    assert main(arguments) == 0
    spec = run_spec.RunSpec.load("other")
    assert spec.config["max_steps"] == 1 and spec.config["disable_tqdm"] is False
    assert spec.config["target_modules"] == ["q_proj", "v_proj"] and spec.objectives == ("small",)
    assert main([*arguments, "--overwrite"]) == 0


@pytest.mark.check
def test_interrupting_says_where_the_checkpoint_is_and_resuming_gives_the_same_policy(workplace, trained):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "clp_engine", "train", "config.yaml", "--output-dir", "stopped"]
    # A step must last long enough for the signal to arrive in it.
    slow = "import time\n" + REWARDS.replace("    return [sum(i <", "    time.sleep(0.3); return [sum(i <")
    (workplace / "slow_rewards.py").write_text(slow)
    process = subprocess.Popen(
        [*command, "--rewards", "even=slow_rewards.py:even", "small=slow_rewards.py:small"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    deadline = time.monotonic() + 60
    while not (workplace / "stopped" / "checkpoint-2").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130, message
    assert re.search(r"stopped/checkpoint-[23]; go on with: clp-engine train config.yaml .*--resume", message)
    assert "Traceback" not in message and not running.is_finished("stopped")
    # Only the rewards' names are part of the settings: the fast ones compute the same.
    assert main(["train", "config.yaml", "--output-dir", "stopped", "--resume"]) == 0
    whole, resumed = (load_file(Path(run, "policy", "adapters.safetensors")) for run in ("run", "stopped"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# --- the demo ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_demo(workplace, monkeypatch, tmp_path):
    """The demo on a tiny model and a made-up task; returns its run folder."""
    from clp_engine.cli import demo
    from clp_engine.tasks import docsum, registry

    def share(remainder):
        return lambda completion_ids, **_: [
            sum(i % 3 == remainder for i in ids) / len(ids) for ids in completion_ids
        ]

    def load_dataset(split, limit=None, seed=0):
        return [
            {
                "prompt": f"w{i} w{i + 1}",
                "document": f"text {i} of {split}",
                "reference": f"summary {i}",
                "name": f"module.name{i}",
            }
            for i in range(20)
        ][:limit]

    task = registry.Task(
        name="docsum",
        objectives={n: share(i) for i, n in enumerate(("coverage", "brevity", "faithfulness"))},
        default_objectives=("coverage", "brevity"),
        checkpoint_path=workplace / "base",
        load_dataset=load_dataset,
        rl_split="validation",
        max_prompt_length=16,
        max_completion_length=5,
    )
    monkeypatch.setattr(registry, "get_task", lambda name: task)
    monkeypatch.setattr(docsum, "checkpoint_path", lambda: workplace / "base")
    monkeypatch.setattr(
        demo,
        "TRAINING",
        demo.TRAINING | {"max_steps": 2, "num_generations": 2, "rank": 2, "per_device_train_batch_size": 4},
    )
    monkeypatch.setattr(demo, "EVALUATION", demo.EVALUATION | {"prompts": 3, "bootstrap": 10})
    return tmp_path / "demo"


def test_the_demo_shows_front_and_summaries_and_what_to_type_next(small_demo, capsys):
    assert main(["demo", "--out", str(small_demo)]) == 0
    shown = capsys.readouterr().out
    raw = json.loads((small_demo / "report.json").read_text())
    assert raw["task"] == "docsum" and len(raw["points"]) == 11 and raw["setup"]["prompts"] == 3
    assert shown.count("its own summary: summary") == 3
    assert shown.count("coverage 1.00:") == shown.count("coverage 0.50, brevity 0.50:") == 3
    commands = [
        shlex.split(line, comments=True)[1:] for line in shown.splitlines() if line.startswith("  clp-engine")
    ]
    assert [command[0] for command in commands] == ["steer", "generate", "generate", "export"]
    assert running.policy_directory(
        commands[0][1]
    )  # steer serves until it is interrupted: test_steer.py has it
    for command in commands[1:]:
        assert (
            main([str(small_demo.parent / "adapter") if word == "adapter" else word for word in command]) == 0
        )


def test_the_demo_goes_on_with_an_unfinished_run_and_replaces_a_finished_one(small_demo, capsys):
    assert main(["demo", "--out", str(small_demo)]) == 0
    first = load_file(small_demo / "policy" / "adapters.safetensors")
    capsys.readouterr()
    assert main(["demo", "--out", str(small_demo)]) == 0
    assert "holds an earlier demo: starting over" in " ".join(capsys.readouterr().out.split())
    shutil.rmtree(small_demo / "policy")
    assert main(["demo", "--out", str(small_demo)]) == 0
    assert "going on at checkpoint-2" in " ".join(capsys.readouterr().out.split())
    again = load_file(small_demo / "policy" / "adapters.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_demo_with_three_objectives_prints_the_corners_of_the_front(small_demo, capsys):
    assert main(["demo", "--out", str(small_demo), "--faithfulness", "--prompts", "1", "--steps", "1"]) == 0
    shown = capsys.readouterr().out
    assert len([line for line in shown.splitlines() if line.startswith("|")]) == 2 + 3 + 1
    assert len(json.loads((small_demo / "report.json").read_text())["points"]) == 66


# --- mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (["generate", "run", "--prompt", "w1", "--weights", "even=0.5,tone=0.5"], "unknown objective 'tone'"),
        (["generate", "run", "--prompt", "w1", "--weights", "even=1.5,small=-0.5"], "must not be negative"),
        (["generate", "run", "--prompt", "w1", "--weights", "even=0.5,small=0.2"], "must sum to 1"),
        (["generate", "run", "--prompt", "w1", "--weights", "0.5"], "1 entries; expected 2"),
        (["generate", "run", "--prompt", "w1", "--weights", "even"], "expected numbers by objective"),
        (["generate", "run", "--prompt", "w1", "--kl", "7"], "alpha between 0 and 1"),
        (
            ["generate", "run", "--prompt", "w1", "--temperature", "-1"],
            "--temperature: -1.0: expected a number from 0",
        ),
        (["generate", "run"], "give --prompt TEXT or --prompts FILE"),
        (["generate", "run", "--prompts", "nowhere.txt"], "cannot read nowhere.txt"),
        (["generate", "nowhere", "--prompt", "w1"], "there is no folder nowhere"),
        (["generate", "base", "--prompt", "w1"], "base holds no trained policy"),
        (["export", "run", "--weights", "even=2,small=-1", "--to", "x"], "must not be negative"),
        (["export", "run", "--to", "x"], "--weights is missing; the objectives are even, small"),
        (["export", "run", "--weights", "1,0"], "required: --to"),
        (
            ["export", "run", "--to", "x", "--each", "--kl", "0.1"],
            "--each writes every objective's adapter unblended",
        ),
        (
            ["export", "run", "--to", "x", "--each", "--stack"],
            "--each writes an adapter per objective, --stack one of all; leave one out",
        ),
        (
            ["export", "run", "--to", "x", "--each", "--merged"],
            "--rank, --each and --stack are of adapters; --merged writes",
        ),
        (
            ["evaluate", "run", "--reference-point", "even=0"],
            "reference_point is for even; expected even, small",
        ),
        (
            ["evaluate", "run/policy", "--rewards", "even=toy_rewards.py:even", "--dataset", "prompts.jsonl"],
            "unknown objective 'small'",
        ),
        (["evaluate", "run", "--prompts", "many"], "--prompts: 'many': expected a whole number, at least 1"),
        (["evaluate", "run", "--kl", "0.1,much"], "--kl: 'much': expected a number, at least 0"),
        (["variance", "base"], "base has no run.json"),
        (
            ["variance", "run", "--steps", "0,3"],
            "run has no checkpoint of step 3; there are 0 (the start) and 2, 4",
        ),
        (["variance", "run", "--steps", "all"], "expected step numbers such as 0,100"),
        (
            ["variance", "run", "--estimators", "k4"],
            "estimator 'k4': this run can be measured with return, exact",
        ),
        (["variance", "run", "--baselines", "value"], "with leave_one_out, group_mean, none"),
        (["variance", "run", "--estimators", "k3"], "measured against return and exact"),
        (
            ["variance", "run", "--steps", "0", "--batches", "2"],
            "--batches: 2: expected a whole number, at least 3",
        ),
        (["train"], "model is missing; give a task, or model, dataset and rewards"),
        (["train", "nowhere.yaml"], "cannot read nowhere.yaml: No such file"),
        (["train", "prompts.txt"], "expected names and values"),
        (["train", "config.yaml", "--task", "docsum"], "task and dataset were both given"),
        (["train", "--task", "chess"], "unknown task 'chess'"),
        (["train", "--task", "docsum", "--objectives", "coverage,rhyme"], "unknown objective 'rhyme'"),
        (["train", "config.yaml", "--objectives", "even,rhyme"], "unknown objective 'rhyme'; the rewards"),
        (["train", "config.yaml", "--alpha", "0.1", "--beta", "0.1"], "alpha and beta were both given"),
        (["train", "config.yaml", "--alpha", "1.5"], "alpha=1.5: expected a number from 0 to 1"),
        (["train", "config.yaml", "--max-steps", "many"], "max_steps='many': expected int"),
        (["train", "config.yaml", "--kl-estimator", "k4"], "kl_estimator='k4': expected one of return"),
        (["train", "config.yaml", "--dataset", "nowhere.jsonl"], "dataset: there is no file nowhere.jsonl"),
        (["train", "config.yaml", "--rewards", "nowhere:even", "--output-dir", "x"], "cannot import nowhere"),
        (
            ["train", "config.yaml", "--rewards", "toy_rewards.py:odd", "--output-dir", "x"],
            "no function 'odd'",
        ),
        (["train", "config.yaml", "--output-dir", "x", "--resume"], "no checkpoint to resume from"),
        (["train", "config.yaml", "--learning-rat", "1"], "did you mean --learning-rate?"),
        (["train", "config.yaml", "--kl_estimator=k4"], "kl_estimator='k4': expected one of return"),
        (["demo", "--objectives", "coverage,rhyme"], "unknown objective 'rhyme'"),
        (["demo", "--out", "base"], "base is not empty and holds no run"),
        (["demo", "--out", "run"], "run holds a run of yours"),
        (["demo", "--steps", "0"], "--steps: 0: expected a whole number, at least 1"),
        (["evaluate", "run", "--prompts", "-5"], "--prompts: -5: expected a whole number, at least 1"),
        (["evaluate", "run", "--batch-rows", "0"], "--batch-rows: 0: expected a whole number, at least 1"),
        (["evaluate", "run", "--margin", "nan"], "--margin: nan: expected a number, at least 0"),
        (["evaluate", "run", "--margin", "1e999"], "--margin: inf: expected"),
        (["evaluate", "run", "--kl", "0.1,nan"], "--kl: nan: expected"),
        (["evaluate", "run", "--kl-limit", "0"], "--kl-limit: 0.0: expected a number above 0"),
        (["evaluate", "run", "--grid", "1"], "--grid: 1: expected a whole number, at least 2"),
        (["evaluate", "run", "--grid", "1000000000000"], "a lattice of 1,000,000,000,000 points per edge"),
        (["evaluate", "run", "--bootstrap", "1000000000000"], "bootstrap=1,000,000,000,000 resamples"),
        (["evaluate", "run", "--seed", "-1"], "--seed: -1: expected"),
        (["evaluate", "run", "--split", "nope"], "split 'nope': splits are of a task's data"),
        (["evaluate", "run", "--dataset", ""], "cannot read"),
        (
            ["evaluate", "run", "--dataset", "prompts.txt", "--split", "x"],
            "--dataset and --split were both given",
        ),
        (["evaluate", "run", "--device", "nope"], "device='nope' cannot be used"),
        (["evaluate", "run", "--device", "cuda:99"], "device='cuda:99' cannot be used"),
        (["evaluate", "run", "--device", "meta"], "device='meta' cannot be used"),
        (
            ["evaluate", "run", "--out", "prompts.txt"],
            "out='prompts.txt': cannot write there (Not a directory)",
        ),
        (["evaluate", "run", "--out", "prompts.txt/x"], "cannot write there (Not a directory)"),
        (
            ["evaluate", "run", "--reference-point", "even=nan,small=0"],
            "reference_point=nan: expected a number",
        ),
        (["variance", "run", "--out", "run"], "out='run' is a folder; expected a file"),
        (["variance", "run", "--completions", "0"], "--completions: 0: expected"),
        (["generate", "run", "--prompt", "w1", "--num-return-sequences", "0"], "--num-return-sequences: 0"),
        (["generate", "run", "--prompt", "w1", "--max-new-tokens", "0"], "--max-new-tokens: 0: expected"),
        (["generate", "run", "--examples", "-1"], "--examples: -1: expected a whole number, at least 1"),
        (["generate", "run", "--examples", "0"], "--examples: 0: expected"),
        (["generate", "run", "--prompt", "w1", "--top-p", "0"], "--top-p: 0.0: expected a number above 0"),
        (["generate", "run", "--prompt", "w1", "--top-k", "-1"], "--top-k: -1: expected"),
        (["generate", "run", "--prompt", "w1", "--kl", "nan"], "--kl: nan: expected"),
        (["generate", "run", "--prompt", "w1", "--seed", "9" * 5000], "--seed: '99999"),
        (["generate", "run", "--prompt", "w1", "--device", ""], "device='' cannot be used"),
        (["generate", "x" * 300, "--prompt", "w1"], "File name too long"),
        (
            ["export", "run", "--weights", "1,0", "--to", "prompts.txt/x"],
            "to='prompts.txt': cannot write there",
        ),
        (["export", "run", "--weights", "1,0", "--to", "x", "--rank", "0"], "--rank: 0: expected"),
        (["steer", "run", "--port", "-1"], "--port: -1: expected a whole number from 0 to 65535"),
        (["steer", "run", "--device", "nope", "--no-browser", "--port", "0"], "device='nope' cannot be used"),
        (["demo", "--prompts", "0"], "--prompts: 0: expected"),
        (["demo", "--out", "prompts.txt"], "out='prompts.txt': cannot write there"),
        (["demo", "--seed", "x"], "--seed: 'x': expected a whole number from 0"),
        (["train", "config.yaml", "--rank", "["], "rank is not YAML"),
        (
            ["train", "config.yaml", "--rank", "2024-99-99"],
            "'2024-99-99' cannot be read (month must be in 1..12)",
        ),
        (["train", "config.yaml", "--rank", "2024-09-09"], "rank=datetime.date(2024, 9, 9): expected int"),
        (["train", "config.yaml", "--rank", "[" * 5000], "nested too deeply"),
        (["train", "config.yaml", "--lr-scheduler-kwargs", "{a: 1, a: 2}"], "lines 1 and 1 both give 'a'"),
        (["train", "config.yaml", "--output-dir", ""], "output_dir='': expected a folder"),
        (["train", "config.yaml", "--output-dir", "prompts.txt"], "cannot write there (Not a directory)"),
        (["train", "config.yaml", "--output-dir", "prompts.txt/x"], "cannot write there (Not a directory)"),
        (["train", "config.yaml", "--output-dir", "x" * 300], "cannot write there (File name too long)"),
        (["train", "config.yaml", "--output-dir", "/proc/x"], "output_dir='/proc/x': cannot write there"),
        (["train", "config.yaml", "--top-p", "nan"], "top_p=nan: expected a number above 0"),
        (
            ["train", "config.yaml", "--rewards", "a,b=toy_rewards.py:even", "--output-dir", "x"],
            "objective 'a,b'",
        ),
        (
            ["train", "config.yaml", "--max-completion-length", "9999999999", "--output-dir", "x"],
            "more than this machine has",
        ),
        (["dmeo"], "invalid choice: 'dmeo'"),
        ([], "required: COMMAND"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, complaint, trained, capsys):
    assert complaint in refused(argv, capsys)


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("max_stepps: 3", "unknown setting max_stepps; did you mean max_steps?"),
        ("alpha: 0.1\nbeta: 0.2", "alpha and beta were both given"),
        ("task: [", "is not YAML"),
        ("rank: 4\nalpha: 0.1\nrank: 8", "lines 1 and 3 both give 'rank'"),
        ("lr_scheduler_kwargs:\n  a: 1\n  a: 1", "lines 2 and 3 both give 'a'"),
        ("1: a\n1: b", "lines 1 and 2 both give 1"),
        ("task: docsum\nrank: 2024-99-99", "line 2: '2024-99-99' cannot be read"),
        ("rank: " + "9" * 5000, "line 1: '999"),
        ("rank: 0x" + "f" * 5000, "rank=a number of 6,000 digits: expected a whole number"),
        ("rank: " + "[" * 5000, "nested too deeply"),
        ("rank: " + "[" * 100 + "]" * 100, "rank=[[[[...]]]]: expected int"),
        ("rank: &x [*x]", "more than 100,000 values"),
        (
            "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + "".join(f"{n}: &{n} [{', '.join(['*' + m] * 10)}]\n" for m, n in zip("abcdefgh", "bcdefghi")),
            "more than 100,000",
        ),
        ("? [1, 2]\n: 3", "unhashable key"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("<<: 5", "is not YAML"),
        ("rank: .nan", "rank=nan: expected int"),
        ("model: m\ndataset: prompts.jsonl\nrewards: 5", "rewards=5: expected a reward by name"),
        ("model: m\ndataset: prompts.jsonl\nrewards: [5]", "rewards=[5]: expected a reward by name"),
        ("model: m\ndataset: prompts.jsonl\nrewards: {a: }", "rewards={'a': None}: expected"),
        ("model: m\ndataset: prompts.jsonl\nrewards: []", "rewards is empty"),
        ("model: [m]\ndataset: prompts.jsonl\nrewards: a", "model=['m']: expected a text"),
        ("model: ''\ndataset: prompts.jsonl\nrewards: a", "model='': expected a text"),
        ("model: m\ndataset: 5\nrewards: a", "dataset=5: expected a text"),
        ("task: {a: 1}", "task={'a': 1}: expected a text"),
        ("task: docsum\nobjectives: 5", "objectives=5: expected names"),
        ("task: docsum\nobjectives: [[a]]", "objectives=[['a']]: expected names"),
        ("output_dir: 5", "output_dir=5: expected str"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_too(line, complaint, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(line)
    assert complaint in refused(["train", str(tmp_path / "c.yaml")], capsys)


@pytest.mark.parametrize(
    "content, complaint",
    [
        ('{"prompt": "w1"}\nw2\n', "line 2: not JSON"),
        ('{"prompt": "w1"}\n{"text": "w2"}\n', "line 2: expected an object with a 'prompt'"),
        ("\n", "is empty"),
    ],
)
def test_a_mistake_in_a_dataset_names_the_line(content, complaint, tmp_path):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        sources.read_rows(tmp_path / "rows.jsonl")


def test_a_split_that_the_task_does_not_have_is_named_with_those_it_has():
    spec = run_spec.RunSpec.from_values({"task": "docsum"})
    with pytest.raises(ConfigError, match="unknown split 'nope': DocSum has .*test"):
        spec.eval_rows(2, split="nope")
    assert spec.eval_rows(2) == spec.eval_rows(2, split="test")


def test_an_output_folder_that_cannot_be_written_is_found_before_anything_is_loaded(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(running, "load_policy", None)
    (tmp_path / "file").write_text("")
    for argv in (
        ["train", "config.yaml", "--model", "nowhere", "--output-dir", str(tmp_path / "file" / "run")],
        ["evaluate", "run", "--out", str(tmp_path / "file")],
        ["export", "run", "--weights", "1,0", "--to", str(tmp_path / "file" / "adapter")],
    ):
        assert "cannot write there (Not a directory)" in refused(argv, capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_traceback_is_shown_where_it_is_asked_for(monkeypatch):
    with pytest.raises(ConfigError):
        main(["generate", "nowhere", "--prompt", "w1", "--traceback"])
    monkeypatch.setenv("CLP_DEBUG", "1")
    with pytest.raises(ConfigError):
        main(["generate", "nowhere", "--prompt", "w1"])


@pytest.mark.parametrize("text", ["a=0.5,0.5", "", "a=x", "a=1,a=0", "=", "a"])
def test_weights_that_cannot_be_read_are_refused(text):
    with pytest.raises(ConfigError):
        parse_assignments(text, "weights")


# --- help, info, pipes -------------------------------------------------------------------------------------


def test_help_and_version_need_neither_torch_nor_numpy():
    code = (
        "import sys; from clp_engine.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'yaml'} & set(sys.modules)"
    )
    for argv in (["--help"], ["--version"], ["generate", "--help"], ["demo", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "clp-engine" in done.stdout


def test_every_setting_of_training_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    for option in fields(CLPConfig):
        assert f"--{option.name.replace('_', '-')}" in shown
    assert "examples:" in shown


def test_info_names_versions_devices_and_every_back_end(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for word in ("torch", "transformers", "reference", "triton", "docsum", "threads"):
        assert word in shown
    assert main(["info", "--json"]) == 0
    raw = json.loads(capsys.readouterr().out)
    assert set(raw["backends"]) == {"reference", "cpu", "cuda", "triton"}
    assert all(b["reason"] for b in raw["backends"].values())


def test_info_says_what_a_training_needs_before_it_starts(workplace, trained, capsys):
    assert main(["info", "config.yaml"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"lora +[\d,]+ .*\n  full +[\d,]+ ", shown) and "without activations" in shown
    assert main(["info", "run", "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["training"]["memory"]
    saved = load_file("run/policy/adapters.safetensors")
    assert memory["trained_parameters"] == sum(t.numel() for t in saved.values())


def test_a_reader_that_leaves_early_is_not_an_error():
    much = (
        "import sys; from clp_engine.cli import info, main; info.run = lambda arguments: print('x' * 100000); "
        "sys.exit(main.main(['info']))"
    )
    for command in ([sys.executable, "-m", "clp_engine", "--help"], [sys.executable, "-c", much]):
        shell = f"{shlex.join(command)} | true; echo ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
        # 0 where everything was written before `true` ended.
        assert done.stderr == "" and done.stdout.strip() in ("0", "141"), command


def test_a_full_disk_is_one_line_that_names_the_file_and_the_remedy(monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/checkpoint-2")

    monkeypatch.setattr(running, "train", full)
    line = refused(["train", "config.yaml", "--output-dir", "full-disk"], capsys)
    assert "run/checkpoint-2: No space left on device; make room" in line and "--resume" in line
