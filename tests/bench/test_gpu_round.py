"""bench/gpu.sh, rehearsed on the CPU: stages run, a failing one does not stop the rest, a finished one is not run again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import schema

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


@pytest.mark.slow
def test_a_round_goes_through_its_stages_and_on_from_its_archive(tmp_path):
    out = tmp_path / "out"
    done = rehearse(out, "build", "sanitizer", "ceilings", "decode", "profile")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stage" in done.stdout and (out / "all.tgz").exists()
    assert schema.load(out / "decode.json").cases and not schema.load(out / "ceilings.json").cases
    assert json.loads((out / "tiny.profile.json").read_text())["model"] == "tiny"
    before = (out / "decode.json").stat().st_mtime_ns
    assert rehearse(out, "ceilings", "decode").returncode == 0
    assert (out / "decode.json").stat().st_mtime_ns == before  # done stages are skipped

    other = tmp_path / "other"
    other.mkdir()
    (out / "all.tgz").rename(other / "all.tgz")
    assert rehearse(other, "decode").returncode == 0
    assert (other / "decode.log").read_bytes() == (out / "decode.log").read_bytes()


def test_a_failing_stage_is_recorded_and_does_not_stop_the_others(tmp_path):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho called with $*\ncase "$*" in *ceilings*) exit 7 ;; esac\n')
    fake.chmod(0o755)
    done = rehearse(tmp_path / "out", "ceilings", "decode", PYTHON=str(fake))
    assert done.returncode == 1
    assert (tmp_path / "out" / "ceilings.rc").read_text().split()[0] == "7"
    assert not (tmp_path / "out" / "ceilings.done").exists() and (tmp_path / "out" / "decode.done").exists()
    assert "run decode --device cpu" in (tmp_path / "out" / "decode.log").read_text()


def test_no_stage_starts_after_the_deadline(tmp_path):
    done = rehearse(tmp_path / "out", "decode", CLP_GPU_SH_SECONDS="10")
    assert done.returncode == 1 and "decode: left for the next call" in done.stdout
    assert not (tmp_path / "out" / "decode.log").exists()
