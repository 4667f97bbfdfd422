"""A round on a GPU machine: stages in turn, each with a limit, logs and an exit code.

python -m bench.gpu.round short OUTDIR [STAGE ...]                   what a lease of fifteen minutes holds
python -m bench.gpu.round long OUTDIR [STAGE[:SECONDS[:LIMIT]] ...]  everything

The short round has a timetable: a stage may run until its moment, so what one stage saves is the next one's. The long round has
a limit for each stage; SECONDS is what a stage may measure, LIMIT when it is stopped. Without names all stages of the plan run.
One that fails does not stop the others, but for `setup`: what came after it would not measure what it says.

OUTDIR/all.tgz and OUTDIR/summary.txt are made anew after every stage, and hold everything: two files that bring a round home.
The same command goes on where it was stopped: a stage, and of a stage with many jobs a job, that succeeded is not run again.
Logs and results lie in --work (default: a folder in --scratch, for the short round, and OUTDIR for the long one).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.cases import GROUPS
from bench.gpu import carried
from bench.gpu.stages import STAGES, Job, Setting, Steps

# The short round: seconds after the start until which a stage may run.
SHORT = {
    "setup": 40,
    "smoke": 110,
    "figures": 255,
    "decoding": 340,
    "step": 475,
    "counted": 530,
    "memcheck": 570,
}
# The long one, NAME:SECONDS:LIMIT: first what targets are judged by, then everything.
LONG = """
setup tests:70 linear_logprob:60:100 multi_lora:35:60 decode:35:50 interpolate:25:45 e2e:20:200 rollout:30:90 docsum:240
ceilings:60 kernel_tests:400 engine_tests:200 counters:200 sanitizer:300 logits_logprob:60 sampling:60 tune:300
traced_tests:400 racecheck:400
linear_logprob:300 multi_lora:300 decode:200 interpolate:150 e2e:400 rollout:200 logits_logprob:150 sampling:100 profile:300
""".split()
_LEAST = 10  # seconds: a stage with less than these is left for the next call
_STOPPED = 124
_GRACE = 15  # seconds between an interrupt, after which pytest says what it has seen, and a kill


@dataclass(frozen=True)
class Turn:
    """A stage of a plan: how long it may measure, and the moment (seconds after the start) or the seconds that end it."""

    name: str
    seconds: float = 400.0
    limit: float | None = None
    until: float | None = None

    @classmethod
    def read(cls, text: str) -> Turn:
        name, *numbers = text.split(":")
        if name not in STAGES:
            raise SystemExit(f"unknown stage {name}; known: {', '.join(STAGES)}")
        try:
            return cls(name, *map(float, numbers))
        except (ValueError, TypeError):
            raise SystemExit(f"{text}: expected STAGE, STAGE:SECONDS or STAGE:SECONDS:LIMIT") from None

    def room(self, clock: float, deadline: float) -> tuple[float, float]:
        """(seconds to measure, seconds until it is stopped), `clock` seconds after the start."""
        left = deadline - clock
        if self.until is not None:
            stop = min(left, self.until - clock)
            return stop - 5, stop
        # A case that has begun when the seconds are over may take a minute more.
        stop = min(left, self.seconds + 60 if self.limit is None else self.limit)
        return min(self.seconds, max(1.0, stop - 20)), stop


@dataclass
class Round:
    setting: Setting
    shipped: Path
    variables: Mapping[str, str]
    deadline: float
    begun: float

    @property
    def clock(self) -> float:
        return time.monotonic() - self.begun

    def turn(self, turn: Turn) -> bool:
        """Whether the stage is done."""
        out, name = self.setting.out, turn.name
        if name == "setup":  # another machine may go on
            for path in out.glob("setup*.done"):
                path.unlink()
        if (out / f"{name}.done").exists():
            return True
        seconds, limit = turn.room(self.clock, self.deadline)
        if limit < _LEAST:
            print(f"{name}: left for the next call", flush=True)
            return False
        start = time.monotonic()
        code = self._steps(name, STAGES[name](self.setting, seconds), start + limit)
        spent = time.monotonic() - start
        (out / f"{name}.rc").write_text(f"{code} {spent:.0f}\n", encoding="utf-8")
        if code == 0:
            (out / f"{name}.done").touch()
        print(f"{self.clock:6.0f} s  {name}: exit code {code} after {spent:.0f} s", flush=True)
        if code:
            print(_tail(out / f"{name}.log"), flush=True)
        self.ship()
        return code == 0

    def _steps(self, name: str, steps: Steps, end: float) -> int:
        """The first exit code that is not 0, or 0. A step that fails ends the stage."""
        out = self.setting.out
        several = sum(map(len, steps)) > 1
        (out / f"{name}.log").unlink(missing_ok=True)
        for jobs in steps:
            waiting = [job for job in jobs if not (several and (out / f"{name}.{job.name}.done").exists())]
            codes = self._beside_each_other(name, waiting, several, end)
            for job in waiting:
                log = out / f"{name}.{job.name}.log"
                if several and codes[job.name] == 0:
                    (out / f"{name}.{job.name}.done").touch()
                if several and log.exists():
                    with open(out / f"{name}.log", "a", encoding="utf-8") as whole:
                        whole.write(f"{job.name}: exit code {codes[job.name]}\n{_tail(log)}\n")
            if wrong := [code for code in codes.values() if code]:
                return wrong[0]
        return 0

    def _beside_each_other(self, name: str, jobs: Sequence[Job], several: bool, end: float) -> dict[str, int]:
        """Exit codes by job: as many at once as the machine has cores, for most of their time is compiling on the host."""
        out, queue, codes = self.setting.out, list(jobs), {}
        running: dict[str, tuple[Job, subprocess.Popen]] = {}
        most = max(2, os.cpu_count() or 1)
        try:
            while queue or running:
                while queue and len(running) < most and time.monotonic() < end:
                    job = queue.pop(0)
                    log = out / (f"{name}.{job.name}.log" if several else f"{name}.log")
                    with open(log, "wb") as file:
                        process = subprocess.Popen(
                            job.argv, stdout=file, stderr=subprocess.STDOUT, cwd=carried.ROOT,
                            env={**os.environ, **self.variables, **job.variables}, preexec_fn=os.setpgrp,
                        )  # fmt: skip
                    running[job.name] = job, process
                for key, (job, process) in list(running.items()):
                    if (code := process.poll()) is not None:
                        codes[key] = 0 if code in job.right else code
                        del running[key]
                if time.monotonic() >= end:
                    codes |= dict.fromkeys([*running, *(job.name for job in queue)], _STOPPED)
                    return codes
                time.sleep(0.05)
        finally:
            _end([process for _, process in running.values()])
        return codes

    def ship(self) -> None:
        """all.tgz and summary.txt, in OUTDIR."""
        out, archive = self.setting.out, self.shipped / "all.tgz"
        temporary = archive.with_name("all.tgz.tmp")
        with tarfile.open(temporary, "w:gz") as tar:
            for path in sorted(out.rglob("*")):
                inside = path.relative_to(out)
                if inside.parts[0] == "docsum" and len(inside.parts) > 2 and (out / "docsum.done").exists():
                    continue  # its policy and checkpoints, which nothing reads again
                if path.is_file() and len(inside.parts) <= 3 and path.suffix not in (".tmp", ".tgz"):
                    tar.add(path, f"./{inside.as_posix()}")
        temporary.replace(archive)
        (self.shipped / "summary.txt").write_text("\n".join(self.summary()) + "\n", encoding="utf-8")

    def summary(self) -> Iterator[str]:
        """Exit codes and seconds of all stages that ran, and the targets that the results bear on."""
        out = self.setting.out
        yield f"{'stage':16s} {'exit':>5s} {'seconds':>8s}"
        for name in STAGES:
            if (path := out / f"{name}.rc").exists():
                code, seconds = path.read_text(encoding="utf-8").split()
                yield f"{name:16s} {code:>5s} {seconds:>8s}"
        results = [out / f"{name}.json" for name in ("figures", *GROUPS)]
        if results := [path for path in results if path.exists()]:
            found = subprocess.run(
                self.setting.bench("targets", *results), capture_output=True, text=True, cwd=carried.ROOT,
                env={**os.environ, **self.variables},
            )  # fmt: skip
            yield from ("", found.stdout.strip() or found.stderr.strip()[-300:])


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """Interrupts the processes and whatever they started; after some seconds, kills what is left of both."""
    for process in processes:
        _signal(process, signal.SIGINT)
    end = time.monotonic() + _GRACE
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        time.sleep(0.05)
    for process in processes:
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen, how: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


def _tail(log: Path, lines: int = 5) -> str:
    if not log.exists():
        return "it wrote nothing"
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _place(work: Path, archive: Path | None, name: str) -> Path:
    """The folder of this device's results: one holds those of one device. An archive is unpacked into an empty one."""
    work.mkdir(parents=True, exist_ok=True)
    if archive is not None and not any(work.glob("*.rc")):
        with tarfile.open(archive) as tar:
            tar.extractall(work, filter="data")
    device = work / "device"
    if device.exists() and device.read_text(encoding="utf-8").strip() != name:
        work = work / re.sub(r"[^A-Za-z0-9]+", "-", name)
        work.mkdir(exist_ok=True)
        print(f"this is {name}; its results go to {work}")
    (work / "device").write_text(name + "\n", encoding="utf-8")
    return work


def _device_name(device: str) -> str:
    if device != "cuda":
        return device
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise SystemExit("nvidia-smi names no GPU; --device cpu rehearses a round without one") from None


def turns_of(plan: str, names: Sequence[str]) -> list[Turn]:
    """Raises SystemExit for a stage that there is not, and for seconds in the short round, which has a timetable."""
    if plan == "long":
        return [Turn.read(text) for text in names or LONG]
    timetable = [Turn(name, until=until) for name, until in SHORT.items()]
    if unknown := [name for name in names if name not in SHORT]:
        raise SystemExit(f"the short round has no stage {', '.join(unknown)}; it has {', '.join(SHORT)}")
    return [turn for turn in timetable if not names or turn.name in names]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.round", description=__doc__.splitlines()[0])
    parser.add_argument("plan", choices=("short", "long"))
    parser.add_argument("outdir", type=Path)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="default: all of the plan")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=os.environ.get("CLP_GPU_SH_DEVICE", "cuda"),
                        help="cpu rehearses the round with tiny shapes (default: CLP_GPU_SH_DEVICE, or cuda)")  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="start no stage later, and cut the running one short"
    )
    parser.add_argument("--from", dest="archive", type=Path, metavar="ALL_TGZ", help="go on from such a file")
    scratch = Path(tempfile.gettempdir()) / "clp-gpu-round"
    parser.add_argument(
        "--scratch", type=Path, default=scratch, help="packages and caches (default %(default)s)"
    )
    parser.add_argument("--work", type=Path, help="where logs and results lie")
    parser.add_argument(
        "--python", default=sys.executable, help=argparse.SUPPRESS
    )  # of the stages; for tests
    options = parser.parse_args(arguments)
    begun, short = time.monotonic(), options.plan == "short"
    turns = turns_of(options.plan, options.stages)
    outdir, scratch = options.outdir.resolve(), options.scratch.resolve()
    outdir.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(parents=True, exist_ok=True)
    archive = options.archive or (outdir / "all.tgz" if (outdir / "all.tgz").exists() else None)
    work = options.work or (scratch / "results" if short else outdir)
    work = _place(work.resolve(), archive, _device_name(options.device))
    if options.device == "cuda" and options.python == sys.executable:
        carried.install(scratch)
    deadline = options.seconds or (max(SHORT.values()) if short else float("inf"))
    setting = Setting(options.device, options.python, work)
    going = Round(setting, outdir, carried.environment(scratch), deadline, begun)
    undone = []
    for turn in turns:
        if not going.turn(turn):
            undone.append(turn.name)
            if turn.name == "setup":
                print("without its setup the round would measure something else; it ends here")
                break
    going.ship()
    print((outdir / "summary.txt").read_text(encoding="utf-8"))
    # A stage that was cut short and is named again later may be done by now.
    return 1 if any(not (work / f"{name}.done").exists() for name in undone) else 0


if __name__ == "__main__":
    sys.exit(main())
