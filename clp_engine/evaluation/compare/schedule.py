"""The order of the work of a comparison, in this process or in several.

A piece of work is a training or an evaluation. It starts when the pieces that it needs are done. A finished piece is not
repeated, and a failed one is recorded. Pieces come seed by seed, and each evaluation follows its runs, so that an unfinished
comparison can report whole methods.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clp_engine.core.errors import ConfigError
from clp_engine.core.files import write_text
from clp_engine.evaluation.compare import work
from clp_engine.evaluation.compare.plan import Evaluation, Plan, Run
from clp_engine.training.running import Interrupted
from clp_engine.training.runs.run_folder import checkpoints

BUSY, INTERRUPTED = 75, 130  # exit codes of a worker
_POLL = 0.2  # seconds between looks at the workers
_PATIENCE = 2.0  # seconds between looks at a piece that another process holds


@dataclass(frozen=True)
class Piece:
    """A training or an evaluation, and the keys of the pieces that it needs. what: None is the evaluation of the base model."""

    key: str
    what: Run | Evaluation | None
    needs: tuple[str, ...] = ()

    def is_done(self, plan: Plan) -> bool:
        if isinstance(self.what, Run):
            return work.is_trained(plan, self.what)
        return work.is_evaluated(plan, self.what)

    def do(self, plan: Plan, progress: bool) -> None:
        """Train or evaluate. Raises the errors of `work.train` and `work.evaluate`."""
        if isinstance(self.what, Run):
            work.train(plan, self.what, progress)
        else:
            work.evaluate(plan, self.what, progress)

    def log(self, plan: Plan) -> Path:
        """The file for its traceback, or for all output where it runs in a process of its own."""
        return plan.output_dir / "logs" / f"{self.key.replace(':', '-').replace('/', '-')}.log"


@dataclass
class Outcome:
    """failed: (reason in a line, log) by the key of a piece. blocked: keys of the pieces that needed a failed one."""

    failed: dict[str, tuple[str, Path]] = field(default_factory=dict)
    blocked: list[str] = field(default_factory=list)


def pieces(
    plan: Plan, only: Collection[str] | None = None, seeds: Collection[int] | None = None
) -> list[Piece]:
    """The pieces of work that these methods and seeds need, by default all, in the order in which they are done."""
    base = f"evaluate:{work.BASE}"
    found = {base: Piece(base, None)}
    for seed in plan.seeds if seeds is None else seeds:
        for method in plan.methods:
            if only is not None and method.name not in only:
                continue
            for evaluation in plan.of(method.name, seed):
                needs = tuple(f"train:{name}" for name in evaluation.runs)
                for key, name in zip(needs, evaluation.runs):
                    found.setdefault(key, Piece(key, plan.runs[name]))
                key = f"evaluate:{evaluation.name}"
                found[key] = Piece(key, evaluation, (base, *needs))
    return list(found.values())


def state(plan: Plan, piece: Piece) -> str:
    """The state of a piece: "done", "checkpoint-N" for an interrupted training, or "to do"."""
    if piece.is_done(plan):
        return "done"
    saved = checkpoints(plan.run_folder(piece.what.name)) if isinstance(piece.what, Run) else []
    return saved[-1].name if saved else "to do"


def execute(plan: Plan, todo: Sequence[Piece], jobs: int, say: Callable[[str], None]) -> Outcome:
    """Do every piece that is not done. Raises KeyboardInterrupt when the user interrupts, after all processes have stopped."""
    waiting = [piece for piece in todo if not piece.is_done(plan)]
    done = {piece.key for piece in todo} - {piece.key for piece in waiting}
    outcome = Outcome()
    running: dict[str, _Worker] = {}
    counter, total, retry_at = 0, len(waiting), 0.0
    try:
        while waiting or running:
            for piece in list(waiting):
                if any(need in outcome.failed or need in outcome.blocked for need in piece.needs):
                    waiting.remove(piece)
                    outcome.blocked.append(piece.key)
            ready = [p for p in waiting if done.issuperset(p.needs)] if time.monotonic() >= retry_at else []
            if ready and len(running) < jobs:
                piece = ready[0]
                waiting.remove(piece)
                counter += 1
                say(f"[{counter}/{total}] {title(plan, piece)}")
                running[piece.key] = _Worker(plan, piece, jobs) if jobs > 1 else _Here(plan, piece)
            elif running or waiting:
                time.sleep(_POLL)
            for key, worker in list(running.items()):
                code = worker.poll()
                if code is None:
                    continue
                del running[key]
                if code == 0:
                    done.add(key)
                elif code == BUSY:
                    # It queues behind the other pieces: they may keep this process busy until it is free.
                    waiting.append(worker.piece)
                    counter -= 1
                    if not any(done.issuperset(p.needs) for p in waiting[:-1]):
                        say(f"waiting for another process: {title(plan, worker.piece)}")
                        retry_at = time.monotonic() + _PATIENCE
                elif code in (INTERRUPTED, -signal.SIGINT):
                    raise KeyboardInterrupt
                else:
                    outcome.failed[key] = (worker.reason(), worker.piece.log(plan))
                    say(f"failed: {title(plan, worker.piece)}: {worker.reason()}")
    except KeyboardInterrupt:
        _stop(running)
        raise
    return outcome


def title(plan: Plan, piece: Piece) -> str:
    """A piece as a line of text."""
    if piece.what is None:
        return "evaluate the base model"
    if isinstance(piece.what, Evaluation):
        return f"evaluate {piece.what.name}"
    return f"train {piece.what.name} ({piece.what.budget}; {', '.join(plan.users(piece.what.name))})"


class _Here:
    """A piece that is done in this process, at once."""

    def __init__(self, plan: Plan, piece: Piece):
        self.piece, self._reason = piece, ""
        try:
            piece.do(plan, progress=sys.stderr.isatty())
            piece.log(plan).unlink(missing_ok=True)  # of an earlier failure
            self.code = 0
        except work.Busy:
            self.code = BUSY
        except (KeyboardInterrupt, Interrupted):
            raise KeyboardInterrupt from None
        except Exception as error:
            write_text(piece.log(plan), traceback.format_exc())
            self.code, self._reason = 1, describe_error(error)

    def poll(self) -> int:
        return self.code

    def reason(self) -> str:
        return self._reason


class _Worker:
    """A piece that is done by a process in a session of its own. Ctrl-C reaches this process through `stop` alone, once."""

    def __init__(self, plan: Plan, piece: Piece, jobs: int):
        self.piece, self._log = piece, piece.log(plan)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with open(self._log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "clp_engine.evaluation.compare.worker",
                    str(plan_file(plan)),
                    piece.key,
                ],
                stdin=subprocess.PIPE,  # never written to: its end tells the worker that this process has ended
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads_per_job(jobs))},
            )

    def poll(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def reason(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self.process.returncode}"


def _stop(running: dict[str, _Worker]) -> None:
    """Ask every worker to finish its step and write a checkpoint. A second Ctrl-C asks again, and they stop at once."""
    for _ in range(2):
        for worker in running.values():
            worker.stop()
        try:
            for worker in running.values():
                worker.process.wait()
            return
        except KeyboardInterrupt:
            continue


def describe_error(error: BaseException) -> str:
    """An error as one line, with its type unless it is a ConfigError."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ConfigError) else f"{type(error).__name__}: {text}"


def plan_file(plan: Plan) -> Path:
    """The file from which workers read the configuration."""
    return plan.output_dir / "config.json"


def threads_per_job(jobs: int) -> int:
    """The number of cores divided by the jobs, and at most OMP_NUM_THREADS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores // jobs, int(allowed) if allowed.isdigit() else cores))
