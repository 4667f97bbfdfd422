"""bench/gpu.sh, rehearsed on the CPU: stages run, a failing one does not stop the rest, a finished one is not run again."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bench.cases import GROUPS
from bench.core import schema

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"


def rehearse(out, *stages, **environment):
    variables = {"CLP_GPU_SH_DEVICE": "cpu", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [str(SCRIPT), str(out), *stages],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def fake(tmp_path):
    """An interpreter that prints its arguments, fails for ceilings, and sleeps for decode."""
    path = tmp_path / "python"
    path.write_text(
        "#!/bin/sh\necho called with $*\n"
        'case "$*" in *ceilings*) exit 7 ;; *"run decode"*) sleep ${FAKE_SLEEP:-0} ;; esac\n'
    )
    path.chmod(0o755)
    return str(path)


def stages_of(plan: str) -> list[str]:
    return [stage.partition(":")[0] for stage in plan.split()]


def plan() -> str:
    return SCRIPT.read_text(encoding="utf-8").partition('plan="')[2].partition('"')[0]


@pytest.mark.check
def test_a_round_goes_through_its_stages_and_on_from_its_archive(tmp_path):
    out = tmp_path / "out"
    names = ("build", "sanitizer", "ceilings", "decode", "rollout", "tune", "counters", "docsum", "profile")
    done = rehearse(out, *names)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stage" in done.stdout and (out / "all.tgz").exists()
    assert schema.load(out / "decode.json").cases and not schema.load(out / "ceilings.json").cases
    assert json.loads((out / "tiny.profile.json").read_text())["model"] == "tiny"
    assert json.loads((out / "fronts.json").read_text())["agree"] is True
    assert json.loads((out / "docsum_demo.json").read_text())["setup"]["prompts"] == 4
    assert "ncu is not on this machine" in (out / "counters.log").read_text()
    assert json.loads((out / "memcheck.all.record.json").read_text())["kernels"]
    if "rollout" in GROUPS:
        assert schema.load(out / "rollout.json").cases
    else:
        assert "there is no group rollout" in (out / "rollout.log").read_text()
    before = (out / "decode.json").stat().st_mtime_ns
    assert rehearse(out, "ceilings", "decode").returncode == 0
    assert (out / "decode.json").stat().st_mtime_ns == before  # done stages are skipped

    other = tmp_path / "other"
    other.mkdir()
    (out / "all.tgz").rename(other / "all.tgz")
    assert rehearse(other, "decode").returncode == 0
    assert (other / "decode.log").read_bytes() == (out / "decode.log").read_bytes()
    assert (other / "docsum" / "report.json").exists()


def test_a_failing_stage_is_recorded_and_does_not_stop_the_others(tmp_path, fake):
    done = rehearse(tmp_path / "out", "ceilings", "decode", PYTHON=fake)
    assert done.returncode == 1
    assert (tmp_path / "out" / "ceilings.rc").read_text().split()[0] == "7"
    assert not (tmp_path / "out" / "ceilings.done").exists() and (tmp_path / "out" / "decode.done").exists()
    assert "run decode --device cpu" in (tmp_path / "out" / "decode.log").read_text()


def test_a_stage_gets_its_budget_and_is_stopped_at_its_limit(tmp_path, fake):
    out = tmp_path / "out"
    done = rehearse(out, "decode:300:2", "multi_lora:33", PYTHON=fake, FAKE_SLEEP="30")
    assert done.returncode == 1 and "decode: exit code 124" in done.stdout
    assert int((out / "decode.rc").read_text().split()[1]) < 15
    assert "--budget 33" in (out / "multi_lora.log").read_text()
    # What came of it is kept, and the next call goes on with it.
    (out / "decode.json").write_text("{}")
    assert rehearse(out, "decode:60", "multi_lora", PYTHON=fake).returncode == 0
    assert "--resume --budget 60" in (out / "decode.log").read_text() and (out / "decode.json").exists()


def test_a_stage_named_again_goes_on_unless_it_is_done(tmp_path, fake):
    out = tmp_path / "out"
    assert rehearse(out, "sampling:20", "sampling:50", PYTHON=fake).returncode == 0
    assert "--budget 20" in (out / "sampling.log").read_text()


def test_two_files_hold_a_round_after_every_stage(tmp_path, fake):
    out, ship = tmp_path / "out", tmp_path / "ship"
    rehearse(out, "ceilings", "decode", PYTHON=fake, CLP_GPU_SH_SHIP=str(ship))
    assert sorted(p.name for p in ship.iterdir()) == ["all.tgz", "summary.txt"]
    with tarfile.open(ship / "all.tgz") as archive:
        assert {"./ceilings.rc", "./decode.done", "./decode.log", "./device"} <= set(archive.getnames())
    assert "ceilings             7" in (ship / "summary.txt").read_text()

    other = tmp_path / "other"
    done = rehearse(other, "decode", PYTHON=fake, CLP_GPU_SH_FROM=str(ship / "all.tgz"))
    assert done.returncode == 0 and (other / "ceilings.log").read_text() == (out / "ceilings.log").read_text()


def test_another_device_gets_a_folder_of_its_own(tmp_path, fake):
    out = tmp_path / "out"
    rehearse(out, "decode", PYTHON=fake)
    (out / "device").write_text("NVIDIA H200\n")
    done = rehearse(out, "decode", PYTHON=fake)
    assert done.returncode == 0 and f"this is cpu; its results go to {out}/cpu" in done.stdout
    assert (out / "cpu" / "decode.done").exists()


def test_the_plan_reaches_every_stage_and_its_targets_within_one_call():
    listed = SCRIPT.read_text(encoding="utf-8").partition('every="')[2].partition('"')[0]
    groups = SCRIPT.read_text(encoding="utf-8").partition('groups="')[2].partition('"')[0].split()
    every = [name for word in listed.split() for name in (groups if word == "$groups" else [word])]
    assert set(stages_of(plan())) == set(every) and set(GROUPS) <= set(groups)
    # Until the last group that a target is judged by, budgets (of a group) and limits (of the others) fit into 560 seconds,
    # and leave 100 for cases that end after their budget, a training step most of all.
    first = plan().split()[: stages_of(plan()).index("rollout") + 1]
    assert sum(int(stage.split(":")[1]) for stage in first) <= 460
    assert {"multi_lora", "decode", "linear_logprob", "interpolate", "e2e"} <= set(stages_of(" ".join(first)))


def test_an_unknown_stage_is_refused_before_anything_runs(tmp_path, fake):
    done = rehearse(tmp_path / "out", "decode", "nonesuch", PYTHON=fake)
    assert done.returncode == 2 and "unknown stage nonesuch; known: build tests" in done.stderr
    assert not (tmp_path / "out" / "decode.log").exists()


def test_no_stage_starts_after_the_deadline(tmp_path):
    done = rehearse(tmp_path / "out", "decode", CLP_GPU_SH_SECONDS="10")
    assert done.returncode == 1 and "decode: left for the next call" in done.stdout
    assert not (tmp_path / "out" / "decode.log").exists()


@pytest.fixture
def gpu_machine(tmp_path):
    """Stand-ins for the tools of a machine with a GPU: what is called with what is all that they show."""
    tools = tmp_path / "tools"
    tools.mkdir()
    scripts = {
        "nvidia-smi": "echo NVIDIA Stand-in",
        "compute-sanitizer": 'echo "watched: $*, uncached ${PYTORCH_NO_CUDA_MEMORY_CACHING:-no}"\n'
        'while [ "$1" != "$PYTHON" ]; do shift; done; exec "$@"',
        "ncu": 'while [ "$1" != --log-file ]; do shift; done; echo "==ERROR== ERR_NVGPUCTRPERM" >"$2"; exit 1',
        "python": 'echo "python $*"\ncase "$*" in *--list*) printf "slerp\\nema_\\n" ;; *"counters read"*) exit 1 ;;\n'
        '*"sanitize ema_"*) [ ! -e "$FAIL" ] || exit 9 ;; *"tune --help"*) exit 2 ;; esac',
    }
    for name, script in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    variables = {
        "CLP_GPU_SH_DEVICE": "cuda", "PYTHON": str(tools / "python"), "PATH": f"{tools}:{os.environ['PATH']}",
        "FAIL": str(tmp_path / "fail"),
    }  # fmt: skip
    return tmp_path / "out", variables


def test_on_a_gpu_every_op_is_watched_in_a_process_of_its_own(gpu_machine, tmp_path):
    out, variables = gpu_machine
    (tmp_path / "fail").touch()
    done = rehearse(out, "sanitizer", "racecheck:300", **variables)
    assert done.returncode == 1 and "sanitizer: exit code" in done.stdout
    assert "watched: --tool memcheck" in (out / "memcheck.slerp.log").read_text()
    assert "uncached 1" in (out / "memcheck.slerp.log").read_text()
    assert "uncached no" in (out / "memcheck.graphs.log").read_text()
    assert "sanitize --graphs --thin 2" in (out / "racecheck.graphs.log").read_text()
    assert (out / "device").read_text() == "NVIDIA Stand-in\n"

    # What was right is not watched again; what failed is.
    (tmp_path / "fail").unlink()
    before = (out / "memcheck.slerp.log").stat().st_mtime_ns
    assert rehearse(out, "sanitizer", **variables).returncode == 0
    assert (out / "memcheck.slerp.log").stat().st_mtime_ns == before and (
        out / "memcheck.ema_.right"
    ).exists()
    assert "--judge" in (out / "sanitizer.log").read_text()


def test_a_profiler_that_refuses_and_a_command_that_is_not_there_are_said_and_pass(gpu_machine):
    out, variables = gpu_machine
    done = rehearse(out, "counters", "tune", "tests", "docsum", **variables)
    assert done.returncode == 1  # docsum: the stand-in leaves no report
    assert "ncu gave no counters: ==ERROR== ERR_NVGPUCTRPERM" in (out / "counters.log").read_text()
    assert "there is no python -m bench tune" in (out / "tune.log").read_text()
    assert "-m gpu and not traced" in (out / "tests.log").read_text()
    assert "clp_engine demo --out" in (out / "docsum.log").read_text() and not (out / "docsum.done").exists()
