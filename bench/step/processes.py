"""python -m bench processes --out FILE: a step by two processes of a core each, by one process of one core, and by one of two.

The batch is the same: two processes have half of it each. Runs of the three take turns. A worker is bound to as many cores as
it has threads. Counted beside the times: the collectives of a step, and the bytes that a process gives to each kind. The least
possible is the adapters' gradient once, in float32.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.core import environment
from bench.core.measure import summary

# name -> (processes, threads of each)
VARIANTS = {
    "one process, one core": (1, 1),
    "two processes, one core each": (2, 1),
    "one process, two cores": (1, 2),
}
WARM = 2  # steps before those that count
COUNTED = ("all_reduce", "all_gather")


def measure(model: str, steps: int, rounds: int) -> dict:
    found: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name, (processes, threads) in VARIANTS.items():
            found[name].append(_launched(model, steps, processes, threads))
            print(f"{name}: {statistics.median(found[name][-1]['steps']):.3f} s a step", flush=True)
    times = {name: summary([s for run in runs for s in run["steps"]]) for name, runs in found.items()}
    one, two, whole = (times[name].median for name in VARIANTS)
    return {
        "model": model,
        "environment": environment.describe("cpu"),
        "times": {name: dataclasses.asdict(t) for name, t in times.items()},
        "two processes over one of one core": one / two,
        "two processes over one of two cores": whole / two,
        "collectives": found["two processes, one core each"][0]["collectives"],
        "adapter_bytes": found["two processes, one core each"][0]["adapter_bytes"],
    }


def _launched(model: str, steps: int, processes: int, threads: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        worker = ["-m", "bench.step.processes", model, str(steps), str(threads), str(out)]
        environ = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(
            [sys.executable, *launcher, *worker], check=True, env=environ, stderr=subprocess.DEVNULL
        )
        return json.loads(out.read_text(encoding="utf-8"))


def worker(model: str, steps: int, threads: int, out: str) -> None:
    """Trains in this process, one of those that the launcher started; the main one writes what it found."""
    rank, count = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    os.sched_setaffinity(0, range(rank * threads, (rank + 1) * threads))
    import torch
    from transformers import TrainerCallback

    from bench.step.step_case import case_of, length_reward, other_reward, our_trainer

    torch.set_num_threads(threads)
    seconds, seen = [], collections.defaultdict(list)
    counts: dict[str, list[int]] = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            seconds.append(time.perf_counter())
            counts.update({name: list(sizes) for name, sizes in seen.items()})
            seen.clear()

    case = case_of(model, "cpu")
    with _counting(seen):
        case = dataclasses.replace(case, batch=case.batch // count)
        trainer = our_trainer(case, WARM + steps, [length_reward, other_reward], f"{out}.run", [Clock])
        trainer.train()
    if rank == 0:
        numbers = sum(p.numel() for p in trainer.policy.adapter_parameters().values())
        times = [after - before for before, after in zip(seconds[WARM - 1 :], seconds[WARM:])]
        found = {"steps": times, "collectives": counts, "adapter_bytes": 4 * numbers}
        Path(out).write_text(json.dumps(found), encoding="utf-8")


def _counting(seen: dict[str, list[int]]):
    import contextlib

    import torch.distributed as dist

    @contextlib.contextmanager
    def counting() -> Iterator[None]:
        originals = {name: getattr(dist, name) for name in COUNTED}

        def counted(name: str):
            def call(tensor, *arguments, **options):
                own = arguments[0] if name == "all_gather" else tensor
                seen[name].append(own.numel() * own.element_size())
                return originals[name](tensor, *arguments, **options)

            return call

        for module in (dist, dist.distributed_c10d):
            for name in COUNTED:
                setattr(module, name, counted(name))
        try:
            yield
        finally:
            for module in (dist, dist.distributed_c10d):
                for name, original in originals.items():
                    setattr(module, name, original)

    return counting()


def main(arguments: argparse.Namespace) -> int:
    found = measure(arguments.model, arguments.steps, arguments.rounds)
    Path(arguments.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name in ("two processes over one of one core", "two processes over one of two cores"):
        print(f"{name}: {found[name]:.2f}x")
    given = {name: (len(sizes), sum(sizes)) for name, sizes in found["collectives"].items()}
    print(f"collectives of a step (calls, bytes): {given}; the adapters are {found['adapter_bytes']} bytes")
    return 0


if __name__ == "__main__":
    asked: Sequence[str] = sys.argv[1:]
    worker(asked[0], int(asked[1]), int(asked[2]), asked[3])
