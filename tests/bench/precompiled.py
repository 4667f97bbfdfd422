"""Compiles one launch ahead for an H100 and then launches it as far as that goes without one: prints how many files Triton's
cache held after the first and after the second. A process of its own, without Triton's interpreter.
"""

import os
import sys
from pathlib import Path
from unittest import mock

from bench.tuning import trials
from bench.tuning.precompile import _Target, compile_ahead, noted


def main() -> None:
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    target = GPUTarget("cuda", 90, 32)
    trial = trials.skinny("cpu", "half", 64, 64, 16, torch.float16)
    choice = trial.default

    def call(inputs):
        with trial.forced(choice):
            trial.call(inputs)

    launches, problems = noted([lambda: call(trials.ahead(trial.inputs))], 9)
    problems += compile_ahead(launches, target, 1)
    assert launches and not problems, problems
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    before = len([path for path in cache.rglob("*") if path.is_file()])

    driver.set_active(_Target(target))
    inner, launched = JITFunction.run, []

    def run(self, *args, grid, warmup, **kwargs):
        launched.append(inner(self, *args, grid=grid, warmup=True, **kwargs))

    with mock.patch.object(JITFunction, "run", run):
        call(trial.case.make(torch.Generator().manual_seed(0)))
    assert len(launched) == len(launches) and all(launched)
    print(before, len([path for path in cache.rglob("*") if path.is_file()]), file=sys.stdout)


if __name__ == "__main__":
    main()
