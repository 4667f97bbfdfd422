"""`accelerate launch` with the files of examples/accelerate, as docs/scaling.md has it, on this machine's CPU."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from launch import ROOT

from clp_engine import RewardSet

SETTINGS = {
    "task": "docsum",
    "max_steps": 2,
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "max_completion_length": 6,
    "rank": 2,
    "log_completions": True,
    "save_strategy": "no",
    "disable_tqdm": True,
}
FILES = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))


def trained(folder, command, **more):
    """(exit code, what was said, the completions) of a run of `command train`."""
    (folder / "config.yaml").write_text(
        yaml.safe_dump({**SETTINGS, **more, "output_dir": str(folder / "run")})
    )
    done = subprocess.run(
        [sys.executable, "-m", *command, "clp_engine", "train", str(folder / "config.yaml")],
        # A sharded base is decoded by these modules, whose rounding can draw another token than the C++ decoder's.
        env={**os.environ, "OMP_NUM_THREADS": "1", "CLP_ENGINE_DECODING": "torch"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    written = folder / "run" / "completions.jsonl"
    lines = written.read_text().splitlines() if written.is_file() else []
    return done.returncode, done.stdout + done.stderr, [json.loads(line)["completion"] for line in lines]


def accelerate(file):
    return ["accelerate.commands.launch", "--config_file", str(file), "--num_processes", "2", "-m"]


@pytest.mark.check
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_accelerate_launch_starts_two_processes_that_are_one_run(file, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    _, _, one = trained(tmp_path / "one", [], per_device_train_batch_size=8)
    code, said, two = trained(tmp_path / "two", accelerate(file))
    assert code == 0, said[-3000:]
    assert two == one and len(one) == 16  # 8, had a single process been started
    assert said.count("policy: ") == 1  # the main process speaks


@pytest.mark.check
def test_the_file_for_fsdp_shards(tmp_path):
    """Whole-weight deltas, too."""
    code, said, _ = trained(tmp_path, accelerate(FILES[1]), conditioning="attention", rank=16)
    assert code == 0 and said.count("the base model is sharded") == 1, said


def test_the_files_differ_in_sharding_alone():
    plain, sharded = (yaml.safe_load(path.read_text()) for path in FILES)
    options = sharded.pop("fsdp_config")
    assert options["fsdp_version"] == 2 and sharded.pop("distributed_type") == "FSDP"
    assert plain.pop("distributed_type") == "MULTI_GPU" and plain == sharded


def test_the_reward_function_of_the_page_runs_on_the_main_process():
    page, names = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8"), {}
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(example, "docs/scaling.md", "exec"), names)
    assert RewardSet([names["rare"]]).of_main == ("rare",) and names["rare"](["a", "a", "b"])[2] == 1 - 1 / 3
