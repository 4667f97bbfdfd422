"""Whatever ends one process ends all, within seconds, with the cause told once and what was written kept."""

import json
import re
import time

import pytest
from launch import launched, torchrun

SECONDS = 90  # of the whole command, most of it the start of two interpreters


def ended(tmp_path, fault, options=(), **settings):
    """(output, exit code, last step with a checkpoint)"""
    started = time.monotonic()
    done = launched(2, "faulty.py", fault, str(tmp_path / "run"), settings, seconds=SECONDS, options=options)
    assert time.monotonic() - started < SECONDS
    steps = [int(path.name.rpartition("-")[2]) for path in (tmp_path / "run").glob("checkpoint-*")]
    return done.stdout + done.stderr, done.returncode, max(steps, default=0)


def causes(said):
    """What processes say of themselves, one for each that says something."""
    return re.findall(r"^\[rank\d\]: \S*(?:ProcessFailed|ConfigError): (.*)$", said, re.MULTILINE)


def test_a_reward_that_raises_on_one_rank(tmp_path):
    said, code, step = ended(tmp_path, "raises")
    assert code != 0 and step == 2
    (cause,) = causes(said)
    assert cause.startswith("process 1 of 2: ") and "the judge has gone home" in cause


LAYERWISE = {"fsdp": "full_shard", "fsdp_config": {"gather_for_generation": False}}


@pytest.mark.check
def test_a_layer_that_raises_on_one_rank_in_the_middle_of_drawing(tmp_path):
    """The other process waits for the next layer, in a collective of torch's FSDP."""
    said, code, step = ended(tmp_path, "raises in a layer", **LAYERWISE)
    assert code != 0 and step == 2
    (cause,) = causes(said)
    assert cause.startswith("process 1 of 2: ") and "the layer has gone home" in cause


def test_a_killed_process_and_a_launcher_that_starts_again(tmp_path):
    said, code, step = ended(tmp_path, "killed", options=["--max-restarts=1"])
    assert code == 0 and step == 5, said[-2000:]
    assert "exitcode: -9" in said and said.count("at the end, step 5") == 2
    steps = [
        json.loads(line).get("step") for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    ]
    assert steps[:5] == [1, 2, 3, 4, 5]


@pytest.mark.check
@pytest.mark.parametrize(
    "fault, step, words",
    [
        ("nan", 2, "process 1 is nan"),
        ("infinite", 2, "returned inf for completion 0"),
        ("memory", 2, "process 1 of 2: OutOfMemoryError"),
        ("disk", 2, "process 0 of 2: "),
        ("other data", 0, "process 1 of 2 reads other prompts"),
    ],
)
def test_the_first_cause_is_told_once(tmp_path, fault, step, words):
    said, code, last = ended(tmp_path, fault)
    assert code != 0 and last == step
    (cause,) = causes(said)
    assert words in cause, cause


@pytest.mark.check
def test_a_killed_process_without_another_start(tmp_path):
    said, code, step = ended(tmp_path, "killed")
    assert code != 0 and step == 2 and "exitcode: -9" in said
    assert len(causes(said)) <= 1


@pytest.mark.check
def test_an_interrupt_of_one_process_ends_all_with_a_checkpoint(tmp_path):
    said, code, step = ended(tmp_path, "interrupted")
    assert code != 0 and step == 3 and "KeyboardInterrupt" in said
    assert not causes(said)


@pytest.mark.check
@pytest.mark.parametrize("fault, settings", [("hangs", {}), ("hangs in a layer", LAYERWISE)])
def test_a_process_that_hangs_ends_the_run_at_the_limit(tmp_path, fault, settings):
    said, code, step = ended(tmp_path, fault, ddp_timeout=8, **settings)
    assert code != 0 and step == 2
    (cause,) = causes(said)
    assert "ddp_timeout = 8 seconds" in cause and "reward function may hang" in cause


def test_the_command_line_says_one_line(tmp_path):
    asked = ["train", "--task", "docsum", "--max-steps", "nonsense", "--output-dir", str(tmp_path / "run")]
    done = torchrun(2, ["-m", "clp_engine", *asked], SECONDS)
    said = [line for line in done.stderr.splitlines() if line.startswith("clp-engine: ")]
    assert done.returncode != 0 and len(said) == 1 and "max_steps" in said[0], done.stderr[-2000:]
