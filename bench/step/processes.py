"""python -m bench processes --out FILE: a step by two processes of a core each, by one process of one core, and by one of two.

The batch is the same: two processes have half of it each. Beside them two runs that know nothing of each other, each with a
core and a whole batch: as fast as two processes could be on this machine, whose cores share caches and memory. The variants
take turns. A worker is bound to as many cores as it has threads. Counted beside the times: the collectives of a step, and the
bytes that a process gives to each kind. The least possible is the adapters' gradient once, in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.core import environment, schema
from bench.core.measure import summary
from bench.step.step_case import case_of

# name -> (processes, threads of each)
VARIANTS = {
    "one process, one core": (1, 1),
    "two processes, one core each": (2, 1),
    "one process, two cores": (1, 2),
}
APART = "two runs apart, one core each"
WARM = 2  # steps before those that count
COUNTED = ("all_reduce", "all_gather", "reduce_scatter_single", "reduce_scatter_tensor")


def measure(model: str, steps: int, rounds: int) -> schema.Result:
    found: dict[str, list[dict]] = {name: [] for name in (*VARIANTS, APART)}
    for _ in range(rounds):
        for name in found:
            if name == APART:
                with ThreadPoolExecutor(2) as pool:
                    found[name] += pool.map(lambda core: _launched(model, steps, 1, 1, core), range(2))
            else:
                found[name].append(_launched(model, steps, *VARIANTS[name]))
            print(f"{name}: {statistics.median(found[name][-1]['steps']):.3f} s a step", flush=True)
    case = case_of(model, "cpu")
    variants = [
        schema.Variant(
            name,
            "ok",
            times=summary([seconds for run in runs for seconds in run["steps"]]),
            timing=f"steps of a run, the first {WARM} left out",
            measures=_collectives(runs[0]),
        )
        for name, runs in found.items()
    ]
    record = schema.Case(
        case.id, "e2e", case.op, case.title, case.shape, case.dtype, variants, {"model": model}
    )
    settings = {"steps": steps, "rounds": rounds}
    return schema.Result(schema.VERSION, environment.describe("cpu"), settings, {}, [], [record])


def _collectives(run: dict) -> dict[str, float]:
    """Of the main process in a run's last step; nothing for a process alone."""
    sizes = run["collectives"].items()
    counts = {f"{name}_calls": float(len(given)) for name, given in sizes}
    given = {f"{name}_bytes": float(sum(given)) for name, given in sizes}
    return {**counts, **given, "adapter_bytes": float(run["adapter_bytes"])} if counts else {}


def _launched(model: str, steps: int, processes: int, threads: int, core: int = 0) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        worker = ["-m", "bench.step.processes", model, str(steps), str(threads), str(out), str(core)]
        environ = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(
            [sys.executable, *launcher, *worker], check=True, env=environ, stderr=subprocess.DEVNULL
        )
        return json.loads(out.read_text(encoding="utf-8"))


def worker(model: str, steps: int, threads: int, out: str, core: int) -> None:
    """Trains in this process, one of those that the launcher started, on cores from `core` on. The main one writes what it
    found."""
    rank, count = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    os.sched_setaffinity(0, range(core + rank * threads, core + (rank + 1) * threads))
    import torch
    from transformers import TrainerCallback

    from bench.step.step_case import length_reward, other_reward, our_trainer

    torch.set_num_threads(threads)
    seconds: list[float] = []
    seen: list[tuple[str, int]] = []
    counts: dict[str, list[int]] = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            seconds.append(time.perf_counter())
            counts.update({name: [size for n, size in seen if n == name] for name, _ in seen})
            seen.clear()

    case = case_of(model, "cpu")
    with counting(seen):
        case = dataclasses.replace(case, batch=case.batch // count)
        trainer = our_trainer(case, WARM + steps, [length_reward, other_reward], f"{out}.run", [Clock])
        trainer.train()
    if rank == 0:
        numbers = sum(p.numel() for p in trainer.policy.adapter_parameters().values())
        times = [after - before for before, after in zip(seconds[WARM - 1 :], seconds[WARM:])]
        found = {"steps": times, "collectives": counts, "adapter_bytes": 4 * numbers}
        Path(out).write_text(json.dumps(found), encoding="utf-8")


@contextlib.contextmanager
def counting(seen: list[tuple[str, int]]) -> Iterator[None]:
    """Inside the block every collective of COUNTED adds (name, bytes that this process gives) to `seen`."""
    import torch.distributed as dist

    originals = {name: getattr(dist, name) for name in COUNTED if hasattr(dist, name)}
    if "reduce_scatter_single" in originals:  # since torch 2.13, which calls it by its former name, too
        del originals["reduce_scatter_tensor"]

    def counted(name: str):
        said, place = name.removesuffix("_single").removesuffix("_tensor"), 0 if name == "all_reduce" else 1

        def call(*arguments, **options):  # the first argument of all but all_reduce is filled
            own = arguments[place] if len(arguments) > place else options["input"]
            seen.append((said, own.numel() * own.element_size()))
            return originals[name](*arguments, **options)

        return call

    def put(made: Callable[[str], Callable]) -> None:
        for module in (dist, dist.distributed_c10d):
            for name in originals:
                setattr(module, name, made(name))

    put(counted)
    try:
        yield
    finally:
        put(originals.__getitem__)


def main(arguments: argparse.Namespace) -> int:
    found = measure(arguments.model, arguments.steps, arguments.rounds)
    schema.save(found, arguments.out)
    (case,) = found.cases
    one, two, whole, apart = (v.times.median for v in case.variants if v.times)
    print(f"two processes over one of one core: {one / two:.2f}x; over one of two cores: {whole / two:.2f}x")
    print(
        f"two runs apart over one: {2 * one / apart:.2f}x, of which two processes reach {apart / 2 / two:.1%}"
    )
    print(f"of the main process in a step: {case.variants[1].measures}")
    return 0


if __name__ == "__main__":
    asked: Sequence[str] = sys.argv[1:]
    worker(asked[0], int(asked[1]), int(asked[2]), asked[3], int(asked[4]))
