"""Compiles what a run of `bench tune` will launch, in parallel and before it: afterwards Triton finds it in its cache on disk.

Launchers run on tensors without memory, each launch is noted, and processes forked from this one compile them by Triton's own
way of compiling at a launch, for the device's target, without touching the device.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
from clp_kernels.triton_kernels import aot, launch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

PATIENCE = 150  # seconds: of a run of four minutes, what is not compiled by then had better be measured
Launch = tuple[Any, tuple, Any, dict]  # kernel, arguments, grid, keywords

_launches: list[Launch] = []  # inherited by the processes: a kernel cannot be pickled


class _Target:
    """Stands in for Triton's driver where kernels are compiled and not launched."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def noted(calls: Iterable[Callable[[], object]], major: int) -> tuple[list[Launch], list[str]]:
    """The launches of `calls`, each compilation once, and why calls could not be made."""
    found: dict[tuple, Launch] = {}
    problems = []

    def run(kernel, *args, grid, warmup, **kwargs):
        spec = aot._spec("", kernel, "", args, dict(kwargs), lambda *_: False)
        found.setdefault(spec.key, (kernel, args, grid, kwargs))

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(launch, "major", lambda device: major):
        for call in calls:
            try:
                call()
            except Exception as error:  # the choice fails again when it is measured, and is recorded there
                problems.append(f"{type(error).__name__}: {error}")
    return list(found.values()), problems


def _compile(place: int) -> str | None:
    kernel, args, grid, kwargs = _launches[place]
    try:
        kernel.warmup(*args, grid=grid, **kwargs)
    except Exception as error:  # likewise
        return f"{kernel.__name__}: {type(error).__name__}: {error}"
    return None


def _begin(target: GPUTarget) -> None:
    torch.set_num_threads(1)
    driver.set_active(_Target(target))


def compile_ahead(launches: list[Launch], target: GPUTarget, processes: int | None = None) -> list[str]:
    """Compiles all launches; returns what failed."""
    _launches[:] = launches
    try:
        context = multiprocessing.get_context("fork")
        with context.Pool(processes or os.cpu_count() or 1, _begin, (target,)) as pool:
            done = pool.map_async(_compile, range(len(launches)), chunksize=1)
            return [problem for problem in done.get(PATIENCE) if problem]
    except multiprocessing.TimeoutError:
        return [f"not all were compiled within {PATIENCE} s; the rest is compiled when it is launched"]
    finally:
        _launches.clear()
