"""The choice of the back-end for a call: the reference (plain torch), the C++ CPU kernels, Triton, or CUDA C++.

The choice is made per call from device, dtype and shape. `CLP_KERNELS_BACKEND` (environment) or `use_backend(...)` force one. A
forced back-end that cannot serve a call raises, says which could, and never falls back to another. `batch_invariant()` asks the
back-ends for results that do not depend on the number of rows.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

NAMES = ("reference", "cpu", "triton", "cuda")
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


@dataclass(frozen=True)
class Backend:
    """One back-end, and whether it can be used in this process. reason: why it cannot, and what to do."""

    name: str
    available: bool
    reason: str


class Implementation(Protocol):
    """A back-end's module for one op. `unsupported(**call)` returns the reason if it cannot serve a call."""

    def unsupported(self, **call) -> str | None: ...


def interpreting() -> bool:
    """True if Triton kernels run in its interpreter, which takes CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _native() -> Backend:
    try:
        native = importlib.import_module("clp_kernels._native")
    except ImportError as error:
        return Backend(
            "cpu",
            False,
            f"the native extension is not built or does not load ({error}); "
            "reinstall clp-engine or clp-kernels with a C++ compiler, or use a wheel",
        )
    return Backend("cpu", True, f"C++ kernels, {native.isa()}")


def _triton() -> Backend:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return Backend("triton", False, f"triton cannot be imported ({error}); pip install 'triton>=3.6'")
    if interpreting():
        return Backend("triton", True, f"triton {triton.__version__}, interpreter (slow; for tests)")
    if not torch.cuda.is_available():
        return Backend(
            "triton",
            False,
            "no CUDA or ROCm device is visible to torch; "
            "TRITON_INTERPRET=1 runs the kernels on the CPU for tests",
        )
    return Backend("triton", True, f"triton {triton.__version__} on {torch.cuda.get_device_name()}")


def _cuda() -> Backend:
    native = _native()
    if not native.available:
        return Backend("cuda", False, native.reason)
    if not importlib.import_module("clp_kernels._native").has_cuda():
        return Backend(
            "cuda",
            False,
            "the native extension was built without CUDA; reinstall clp-engine or clp-kernels from source where "
            "nvcc 12.8 or newer is on the PATH",
        )
    if torch.version.hip is not None:
        return Backend("cuda", False, "this torch is built for ROCm, and the CUDA C++ kernels are not")
    if not torch.cuda.is_available():
        return Backend("cuda", False, "no CUDA device is visible to torch")
    return Backend("cuda", True, f"CUDA C++ kernels on {torch.cuda.get_device_name()}")


def backends() -> dict[str, Backend]:
    """Every back-end by name. Each says whether it can be used here, and why not."""
    return {
        "reference": Backend("reference", True, "plain torch, any device and dtype"),
        "cpu": _native(),
        "triton": _triton(),
        "cuda": _cuda(),
    }


def _checked(name: str | None, source: str) -> str | None:
    if name in (None, "", "auto"):
        return None
    if name not in NAMES:
        raise ValueError(f"{source}: unknown back-end {name!r}; expected one of {', '.join(NAMES)} or 'auto'")
    return name


# Process-wide instead of per thread, because autograd runs backward passes on its own threads.
_forced: list[str | None] = []


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one back-end inside the block: "reference", "cpu", "triton" or "cuda". "auto" or None lifts an outer force.

    Raises ValueError for an unknown name, and RuntimeError if the back-end is not available in this process.
    """
    name = _checked(name, "use_backend")
    if name is not None and not (status := backends()[name]).available:
        raise RuntimeError(f"use_backend({name!r}): {status.reason}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def forced_backend() -> str | None:
    """The back-end forced by `use_backend` or CLP_KERNELS_BACKEND, or None."""
    if _forced:
        return _forced[-1]
    # A membership test is three times as fast as a get() of a missing name.
    if "CLP_KERNELS_BACKEND" not in os.environ:
        return None
    return _checked(os.environ["CLP_KERNELS_BACKEND"], "CLP_KERNELS_BACKEND")


# Process-wide, for the same reason as _forced.
_invariant: list[bool] = []


@contextlib.contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Inside the block, a row gives the same bits whatever else is in its batch. False lifts an outer True.

    The order of summation within a row then depends on the layer's shape and the dtype, never on the number of rows. Kernels
    that would choose a tile by rows use a fixed one, and no product is left to a BLAS, which would choose by rows itself. Calls
    with few rows pay for it (their tiles are made for many), and calls with many rows hardly do. Sums over the rows (gradients
    of weights, adapters and shared gates) depend on all rows by definition. They are only reproducible.

    The switch is read when a kernel is launched: for an invariant backward pass, run it inside the block, too.
    The docstring of each back-end's module says how it follows the switch.
    """
    _invariant.append(bool(enabled))
    try:
        yield
    finally:
        _invariant.pop()


def is_batch_invariant() -> bool:
    """Whether `batch_invariant` is in force."""
    return bool(_invariant) and _invariant[-1]


_PLAIN = {torch.Tensor, torch.nn.Parameter}


def plain_eager(*tensors: torch.Tensor) -> bool:
    """True if an op may call its implementation directly: no tracing is active, and every tensor has memory.

    torch's dispatcher passes a call to whatever intercepts it (torch.compile, FakeTensorMode, functorch, tensor subclasses). It
    takes 4 to 30 microseconds for that, more than a decode-size kernel.
    """
    watched = (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
    return not watched and {*map(type, tensors)} <= _PLAIN


def select(op: str, table: Mapping[str, str], device: torch.device, **call) -> Implementation:
    """The implementation module that serves this call, with its launches on `device` (`launching_on`).

    table: back-end name -> module name. A module is imported on first use, so that a missing Triton costs nothing.
    call: the arguments of the op's `unsupported(device=..., **call)`. They must be hashable and have few different values (a
        dtype, not a shape), as the choice is made once for each combination.

    Raises RuntimeError if the forced back-end cannot serve the call.
    """
    forced = forced_backend()
    key = (op, device, forced, *call.values())
    if key in _CHOSEN:
        return _CHOSEN[key]
    names = (forced,) if forced else _PREFERENCE.get(device.type, ("reference",))
    refusals = []
    for name in names:
        if name not in table:
            refusals.append(f"{name}: has no {op}")
            continue
        status = _AVAILABLE.get(name) or _AVAILABLE.setdefault(name, backends()[name])
        if not status.available:
            refusals.append(f"{name}: {status.reason}")
            continue
        module = importlib.import_module(table[name])
        reason = module.unsupported(device=device, **call)
        if reason is None:
            return _CHOSEN.setdefault(key, launching_on(module, device))
        refusals.append(f"{name}: {reason}")
    raise RuntimeError(
        f"{op}: no back-end serves this call. "
        + "; ".join(refusals)
        + ". Use clp_kernels.use_backend('auto'), or 'reference' for the plain-torch version."
    )


class _OnDevice:
    """A back-end's module whose functions run with `device` as the current device."""

    def __init__(self, module: Implementation, device: torch.device) -> None:
        self._module, self._device = module, device

    def __getattr__(self, name: str):
        value = getattr(self._module, name)
        if not callable(value):
            return value

        @functools.wraps(value)
        def there(*args, **kwargs):
            with torch.cuda.device(self._device):
                return value(*args, **kwargs)

        return there


def launching_on(module: Implementation, device: torch.device) -> Implementation:
    """The module, launching on `device`: Triton and CUDA launch on the current device, wherever their arguments are.

    The module itself where the device cannot be another one: a guard takes a microsecond of Python.
    """
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return module
    return _OnDevice(module, device)


_CHOSEN: dict[tuple, Implementation] = {}
_AVAILABLE: dict[str, Backend] = {}
