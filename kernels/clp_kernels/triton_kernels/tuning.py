"""Choices that were measured on a device: the tile a kernel takes, and which of several kernels does a product.

A module of kernels declares a `Tunable` for each such choice: the sizes it depends on, and what may be chosen instead of the
module's default. `python -m bench tune` times the candidates and writes the winners to `tuned.py`; launchers ask for them:

    choice(family, x, *sizes)     that of the nearest shape measured, or None: the default

An entry serves shapes whose sizes are all within a factor of REACH of its own; the nearest has the least sum of |log2| of the
ratios, the first of equals. A device that was not measured takes the tiles of one with its compute capability, but not its
choices between kernels: those depend on bandwidth and library, too. The answer is kept for each shape: asking takes 0.9
microseconds of Python, 0.2 where the table is empty (by hand, on a shared machine).

Rows that must not feel their batch: a launcher inside `batch_invariant()` asks for MANY rows, whatever it has (`counted`), and
one that gives the same bits in any batch has no rows among its sizes.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clp_kernels.backends import interpreting, is_batch_invariant
from clp_kernels.triton_kernels import tuned

REACH = 4.0
MANY = 8192
SIMULATED = "interpreter"  # the name and compute capability of what is not a device
CANDIDATES_FOR = "sm_90"  # the targets that candidates are made for, and compiled for ahead of time

_devices: Mapping[str, Mapping] = tuned.DEVICES
_forced: list[dict[tuple[str, str], Any]] = []


@dataclass(frozen=True, eq=False)
class Tunable:
    """What may be chosen for `kernel`.

    sizes       names of the sizes that the choice depends on
    candidates  family of operands -> choices: tuples of numbers, or names
    make        the launcher's form of a choice
    shared      whether a device may take what another one of its compute capability chose
    """

    kernel: str
    sizes: tuple[str, ...]
    candidates: Mapping[str, tuple]
    make: Callable[[Any], Any] = lambda choice: choice
    shared: bool = True

    def choice(self, family: str, like: Tensor, *sizes: int) -> Any | None:
        """Of `like`'s device and size of element; None leaves the launcher its default."""
        if _forced and (self.kernel, family) in _forced[-1]:
            return self.make(_forced[-1][self.kernel, family])
        if not _devices:
            return None
        return _nearest(self, family, like.dtype.itemsize, like.device, sizes)

    def possible(self) -> list[tuple[str, str, Any]]:
        """(target, family, choice) for all that a launcher may be told: what is to be compiled ahead of time."""
        found = [
            (CANDIDATES_FOR, family, choice)
            for family in self.candidates
            for choice in self.candidates[family]
        ]
        for device in _devices.values():
            for (kernel, family, _), entries in device["choices"].items():
                if kernel == self.kernel:
                    found += [
                        (target_of(device["capability"]), family, choice) for choice in entries.values()
                    ]
        return list(dict.fromkeys(found))


def counted(rows: int) -> int:
    """The number of rows that a choice may depend on."""
    return MANY if is_batch_invariant() else rows


def target_of(capability: str) -> str:
    """The generation whose code a device of this compute capability runs here: "sm_89" -> "sm_80"."""
    return capability[:-1] + "0" if capability.startswith("sm_") else capability


@functools.cache
def identity(device: torch.device) -> tuple[str, str] | None:
    """(name, compute capability) under which choices are kept; None where no kernel runs (meta tensors)."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return properties.name, properties.gcnArchName.split(":")[0]
        return properties.name, f"sm_{properties.major}{properties.minor}"
    return (SIMULATED, SIMULATED) if device.type == "cpu" and interpreting() else None


@functools.lru_cache(maxsize=1 << 16)
def _nearest(
    tunable: Tunable, family: str, itemsize: int, device: torch.device, sizes: tuple[int, ...]
) -> Any | None:
    if (mine := identity(device)) is None:
        return None
    name, capability = mine
    own = _devices.get(name)
    alike = [d for d in _devices.values() if d["capability"] == capability] if tunable.shared else []
    for table in [own] if own is not None else alike:
        choice = nearest(table["choices"].get((tunable.kernel, family, itemsize), {}), sizes)
        if choice is not None:
            return tunable.make(choice)
    return None


def nearest(entries: Mapping[tuple[int, ...], Any], sizes: tuple[int, ...]) -> Any | None:
    """The choice of the entry that serves these sizes, or None."""
    best, distance = None, math.inf
    for shape, choice in entries.items():
        apart = [abs(math.log2(max(a, 1) / max(b, 1))) for a, b in zip(shape, sizes)]
        if max(apart) <= math.log2(REACH) and sum(apart) < distance:
            best, distance = choice, sum(apart)
    return best


@contextlib.contextmanager
def force(kernel: str, family: str, choice: Any) -> Iterator[None]:
    """For tests and benchmarks: in the block the kernel takes this choice for operands of this family, at any shape."""
    _forced.append({**(_forced[-1] if _forced else {}), (kernel, family): choice})
    try:
        yield
    finally:
        _forced.pop()


@contextlib.contextmanager
def installed(devices: Mapping[str, Mapping]) -> Iterator[None]:
    """For tests and benchmarks: this table instead of tuned.py's, in the block."""
    global _devices
    before, _devices = _devices, devices
    _nearest.cache_clear()
    try:
        yield
    finally:
        _devices = before
        _nearest.cache_clear()
