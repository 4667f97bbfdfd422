"""bench/gpu.sh and bench/gpu_long.sh, rehearsed on the CPU: stages run, one that fails does not stop the rest, what is done is
not run again."""

import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from bench.cases import GROUPS
from bench.core import schema
from bench.gpu import carried, figures, round, smoke, stages

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """An interpreter that prints its arguments, fails for ceilings, and sleeps for decode."""
    path = tmp_path / "python"
    path.write_text("""#!/bin/sh
echo called with $*
case "$*" in
    *ceilings*) exit 7 ;;
    *"run decode"*) exec sleep ${FAKE_SLEEP:-0} ;;
    *"clp_engine info"*) exit ${FAKE_INFO:-0} ;;
    *"sanitize ema_"*) [ ! -e "$FAIL" ] || exit 9 ;;
esac
""")
    path.chmod(0o755)
    monkeypatch.setenv("FAIL", str(tmp_path / "fail"))
    return str(path)


@pytest.fixture
def going(tmp_path, fake, capsys):
    """going(plan, out, *stages, ...) -> (exit code, what was printed), with the fake interpreter."""

    def run(plan, out, *names, device="cpu", **options):
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        place = ["--scratch", str(tmp_path / "scratch"), "--python", fake, "--device", device]
        code = round.main([plan, str(out), *names, *place, *words])
        return code, capsys.readouterr().out

    return run


@pytest.mark.check
def test_the_short_round_is_rehearsed(tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        [ROOT / "bench" / "gpu.sh", out, "--scratch", tmp_path / "scratch", "--seconds", "900"],
        env={**os.environ, "CLP_GPU_SH_DEVICE": "cpu", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        "all.tgz",
        "summary.txt",
    ]  # of eight that a device tool returns
    results = tmp_path / "results"
    with tarfile.open(out / "all.tgz") as archive:
        archive.extractall(results, filter="data")
    kept = schema.load(results / "figures.json")
    assert [case.group for case in kept.cases] == [
        "multi_lora",
        "linear_logprob",
        "decode",
        "interpolate",
        "rollout",
        "e2e",
    ]
    assert kept.ceilings["copy_bytes"] > 0
    profile = json.loads((results / "figures.tokens.json").read_text())
    assert profile["tokens"] == figures.TOKENS and profile["kernels"]
    for family in stages.FAMILIES:
        found = json.loads((results / f"smoke.{family}.json").read_text())
        assert found["checks"] or family.startswith("attention"), family
    assert json.loads((results / "memcheck.multi_lora_linear.record.json").read_text())["ops"]
    for name in round.SHORT:
        assert f"{name:16s}     0" in done.stdout


@pytest.mark.check
def test_the_long_round_is_rehearsed_and_goes_on_from_its_archive(tmp_path):
    def rehearse(out, *names):
        return subprocess.run(
            [ROOT / "bench" / "gpu_long.sh", out, *names, "--scratch", tmp_path / "scratch"],
            env={**os.environ, "CLP_GPU_SH_DEVICE": "cpu", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )

    out = tmp_path / "out"
    names = ("setup", "tests", "sanitizer", "decode", "tune", "counters", "docsum", "profile")
    done = rehearse(out, *names)
    assert done.returncode == 0, done.stdout + done.stderr
    assert schema.load(out / "decode.json").cases
    assert json.loads((out / "tiny.profile.json").read_text())["model"] == "tiny"
    assert json.loads((out / "fronts.json").read_text())["agree"] is True
    assert json.loads((out / "docsum_demo.json").read_text())["setup"]["prompts"] == 4
    assert "ncu is not on this machine" in (out / "counters.log").read_text()
    assert json.loads((out / "memcheck.all.record.json").read_text())["kernels"]
    before = (out / "decode.json").stat().st_mtime_ns
    assert rehearse(out, "decode").returncode == 0
    assert (out / "decode.json").stat().st_mtime_ns == before  # done stages are skipped

    other = tmp_path / "other"
    other.mkdir()
    (out / "all.tgz").rename(other / "all.tgz")
    assert rehearse(other, "decode").returncode == 0
    assert (other / "decode.log").read_bytes() == (out / "decode.log").read_bytes()
    assert (other / "docsum" / "report.json").exists() and not (other / "docsum" / "policy").exists()


def test_a_failing_stage_is_recorded_and_does_not_stop_the_others(tmp_path, going):
    code, said = going("long", tmp_path / "out", "ceilings", "decode")
    assert code == 1 and "ceilings: exit code 7" in said
    assert (tmp_path / "out" / "ceilings.rc").read_text().split()[0] == "7"
    assert not (tmp_path / "out" / "ceilings.done").exists() and (tmp_path / "out" / "decode.done").exists()
    assert "run decode --device cpu" in (tmp_path / "out" / "decode.log").read_text()


def test_without_its_setup_a_round_ends(tmp_path, going, monkeypatch):
    monkeypatch.setenv("FAKE_INFO", "3")
    code, said = going("short", tmp_path / "out")
    assert code == 1 and "it ends here" in said and "setup                3" in said
    assert not (tmp_path / "scratch" / "results" / "smoke.rc").exists()


def test_a_stage_gets_its_seconds_and_is_stopped_at_its_limit(tmp_path, going, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setenv("FAKE_SLEEP", "30")
    code, said = going("long", out, "decode:300:11", "multi_lora:33")
    assert code == 1 and "decode: exit code 124" in said
    assert int((out / "decode.rc").read_text().split()[1]) < 15
    assert "--budget 33" in (out / "multi_lora.log").read_text()
    # What came of it is kept, and the next call goes on with it.
    (out / "decode.json").write_text("{}")
    monkeypatch.setenv("FAKE_SLEEP", "0")
    assert going("long", out, "decode:60", "multi_lora")[0] == 0
    assert "--resume --budget 60" in (out / "decode.log").read_text() and (out / "decode.json").exists()


def test_what_a_stage_started_ends_with_it(tmp_path, going, fake):
    """Children, too: they would hold the GPU."""
    started = tmp_path / "started"
    Path(fake).write_text(f"#!/bin/sh\nsleep 60 &\necho $! >{started}\nwait\n")
    assert going("long", tmp_path / "out", "decode:1:10.5")[0] == 1
    child = int(started.read_text())
    for _ in range(50):
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child is still there")


def test_a_stage_named_again_goes_on_unless_it_is_done(tmp_path, going):
    out = tmp_path / "out"
    assert going("long", out, "sampling:20", "sampling:50")[0] == 0
    assert "--budget 20" in (out / "sampling.log").read_text()


def test_two_files_hold_a_round_after_every_stage(tmp_path, going):
    out = tmp_path / "out"
    going("short", out, "setup", "smoke")
    assert sorted(p.name for p in out.iterdir()) == ["all.tgz", "summary.txt"]
    with tarfile.open(out / "all.tgz") as archive:
        assert {"./setup.rc", "./smoke.done", "./smoke.decode.log", "./device"} <= set(archive.getnames())
    assert "smoke                0" in (out / "summary.txt").read_text()

    other = tmp_path / "other"
    code, _ = going("long", other, "decode", **{"from": out / "all.tgz"})
    assert code == 0 and (other / "smoke.decode.log").exists()


def test_another_device_gets_a_folder_of_its_own(tmp_path, going):
    out = tmp_path / "out"
    going("long", out, "decode")
    (out / "device").write_text("NVIDIA H200\n")
    code, said = going("long", out, "decode")
    assert code == 0 and f"this is cpu; its results go to {out}/cpu" in said
    assert (out / "cpu" / "decode.done").exists()


def test_the_plans_reach_every_stage_and_the_short_one_fits_into_one_command():
    listed = {round.Turn.read(text).name for text in round.LONG} | set(round.SHORT)
    assert listed == set(stages.STAGES) and set(GROUPS) <= listed
    moments = list(round.SHORT.values())
    assert moments == sorted(moments) and moments[-1] <= 575  # of the 600 seconds of a command, with its end
    first = round.LONG[: round.LONG.index("rollout:30:90") + 1]
    assert {"multi_lora", "decode", "linear_logprob", "interpolate", "e2e"} <= {
        t.partition(":")[0] for t in first
    }


def test_every_family_of_the_smoke_has_its_process():
    assert {*smoke.FAMILIES, "rollout"} == set(stages.FAMILIES)


def test_what_a_stage_saves_is_the_next_ones():
    turn = round.turns_of("short", ["step"])[0]
    early, late = (turn.room(clock, 570)[1] for clock in (100.0, round.SHORT["decoding"]))
    assert early == round.SHORT["step"] - 100 and late == round.SHORT["step"] - round.SHORT["decoding"]
    assert turn.room(200.0, 210.0)[1] == 10  # the deadline counts, too


@pytest.mark.parametrize(
    "plan, name, complaint",
    [("long", "nonesuch", "unknown stage nonesuch; known: setup"), ("short", "docsum", "the short round has no stage docsum"),
     ("long", "decode:soon", "expected STAGE")],
)  # fmt: skip
def test_an_unknown_stage_is_refused_before_anything_runs(tmp_path, going, plan, name, complaint):
    with pytest.raises(SystemExit, match=complaint):
        going(plan, tmp_path / "out", "setup", name)
    assert not (tmp_path / "out" / "setup.log").exists()


def test_no_stage_starts_after_the_deadline(tmp_path, going):
    code, said = going("long", tmp_path / "out", "decode", seconds=5)
    assert code == 1 and "decode: left for the next call" in said
    assert not (tmp_path / "out" / "decode.log").exists()


@pytest.fixture
def gpu_machine(tmp_path, monkeypatch):
    """Stand-ins for the tools of a machine with a GPU: what is called with what is all that they show."""
    tools = tmp_path / "tools"
    tools.mkdir()
    scripts = {
        "nvidia-smi": "echo NVIDIA Stand-in",
        "compute-sanitizer": 'echo "watched: $*, uncached ${PYTORCH_NO_CUDA_MEMORY_CACHING:-no}"\n'
        'while [ "$1" != "$INTERPRETER" ]; do shift; done; exec "$@"',
    }
    for name, script in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("INTERPRETER", str(tmp_path / "python"))
    return tmp_path / "out"


def test_on_a_gpu_every_op_is_watched_in_a_process_of_its_own(gpu_machine, going, tmp_path):
    out = gpu_machine
    (tmp_path / "fail").touch()
    code, said = going("long", out, "sanitizer", "racecheck:300", device="cuda")
    assert code == 1 and "sanitizer: exit code 9" in said
    assert "watched: --tool memcheck" in (out / "sanitizer.slerp.log").read_text()
    assert "uncached 1" in (out / "sanitizer.slerp.log").read_text()
    assert "uncached no" in (out / "sanitizer.graphs.log").read_text()
    assert "sanitize --graphs --device cuda --thin 2" in (out / "racecheck.graphs.log").read_text()
    assert (out / "device").read_text() == "NVIDIA Stand-in\n"

    # What was right is not watched again; what failed is.
    (tmp_path / "fail").unlink()
    before = (out / "sanitizer.slerp.log").stat().st_mtime_ns
    assert going("long", out, "sanitizer", device="cuda")[0] == 0
    assert (out / "sanitizer.slerp.log").stat().st_mtime_ns == before and (
        out / "sanitizer.ema_.done"
    ).exists()
    assert "--judge" in (out / "sanitizer.judge.log").read_text()


def test_on_a_gpu_the_cuda_kernels_are_asked_for(gpu_machine, going, tmp_path):
    code, _ = going("short", gpu_machine, "setup", device="cuda")
    with tarfile.open(gpu_machine / "all.tgz") as archive:
        said = archive.extractfile("./setup.cuda.log").read().decode()
    assert code == 0 and "not cuda.available" in said

    # Another machine may go on: what is there is looked at again.
    log = tmp_path / "scratch" / "results" / "setup.cuda.log"
    log.unlink()
    assert going("short", gpu_machine, "setup", device="cuda")[0] == 0 and log.exists()


def test_the_figures_that_are_measured_first_are_those_of_targets():
    chosen = figures.kernel_cases("cuda", "gpu")
    judged = {name for case in chosen for name in case.targets}
    assert judged == {
        "multi-lora-4096", "multi-lora-896", "logprob-forward", "logprob-backward", "one-pass", "decode", "interpolate",
    }  # fmt: skip
    assert sorted(c.shape["T"] for c in chosen if c.group == "decode") == [1] * 3 + [8] * 3 + [64] * 3
    assert [case.model for case in figures.rollout_cases("cuda", "gpu")] == ["qwen2.5-0.5b", "qwen2.5-7b"]
    steps = list(figures.step_variants("cuda", "gpu"))
    assert {case.model for case in steps} == {"qwen2.5-0.5b"} and len({case.id for case in steps}) == 1


# ---- what is carried to the machine ----------------------------------------------------------------


def wheel(folder, name, *needs):
    with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as file:
        lines = [f"Name: {name}", "Version: 1", *(f"Requires-Dist: {need}" for need in needs)]
        file.writestr(f"{name}-1.dist-info/METADATA", "\n".join(lines) + "\n")


def test_a_package_that_nobody_brings_is_missed(tmp_path):
    wheel(tmp_path, "msgspec")
    assert carried.missing_needs(tmp_path) == []
    wheel(tmp_path, "Peer_One", "torch>=2", "rare-thing (>=1)", 'of-no-use; extra == "more"')
    assert carried.missing_needs(tmp_path) == ["Peer_One-1-py3-none-any.whl needs rare-thing (>=1)"]
    (tmp_path / "msgspec-1-py3-none-any.whl").unlink()
    assert "this project needs msgspec>=0.23" in carried.missing_needs(tmp_path)


def test_an_extension_of_other_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(carried, "FOLDER", tmp_path)
    (tmp_path / f"_native{importlib.machinery.EXTENSION_SUFFIXES[0]}").touch()
    (tmp_path / "SOURCES.json").write_text(json.dumps({"commit": "c", "sources": "", "built_from": ""}))
    with pytest.raises(SystemExit, match="built from other sources"):
        carried.install(tmp_path)
    assert carried.environment(tmp_path)["CLP_SOURCE_COMMIT"] == "c-dirty"


def test_the_digest_is_of_names_and_contents(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.py").write_text("1")
    (tmp_path / "b.txt").write_text("2")
    before = carried.digest(["a", "b.txt"], tmp_path)
    (tmp_path / "a" / "_native.so").touch()
    assert carried.digest(["a", "b.txt"], tmp_path) == before
    (tmp_path / "a" / "one.py").rename(tmp_path / "a" / "two.py")
    assert carried.digest(["a", "b.txt"], tmp_path) != before


def test_a_build_that_asks_for_cuda_fails_without_nvcc(tmp_path):
    pybind11 = pytest.importorskip("pybind11")
    folders = [f for f in os.environ["PATH"].split(os.pathsep) if not (Path(f) / "nvcc").exists()]
    path = os.pathsep.join(folders)
    cmake = shutil.which("cmake", path=path)
    if cmake is None or not shutil.which("c++", path=path):
        pytest.skip("cmake and a compiler are not there without nvcc")
    defined = {
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "CLP_CUDA": "ON",
    }
    environment = {n: v for n, v in os.environ.items() if n not in ("CUDACXX", "CUDA_PATH", "CUDA_HOME")}
    done = subprocess.run(
        [cmake, "-S", ROOT, "-B", tmp_path, *(f"-D{name}={value}" for name, value in defined.items())],
        env={**environment, "PATH": path},
        capture_output=True,
        text=True,
    )
    said = " ".join(done.stderr.split())
    assert done.returncode != 0 and "nvcc was not found" in said and "and CLP_CUDA is ON" in said, said
