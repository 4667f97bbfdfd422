"""Which back-end serves a call: the reference (plain torch), the C++ CPU kernels, Triton, or CUDA C++.

The choice is made per call from device, dtype and shape. `CLP_KERNELS_BACKEND` (environment) or
`use_backend(...)` force one; a forced back-end that cannot serve a call raises and says what would, and never
hands the call on. `batch_invariant()` asks the back-ends for results that do not depend on the number of rows.
"""

from __future__ import annotations

import contextlib
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
    """One back-end and whether it can be used in this process; `reason` says why not, and what to do."""

    name: str
    available: bool
    reason: str


class Implementation(Protocol):
    """A back-end's module for one op: `unsupported(**call)` says why it cannot serve a call, if so."""

    def unsupported(self, **call) -> str | None: ...


def interpreting() -> bool:
    """True where Triton kernels run in its interpreter, which takes CPU tensors (TRITON_INTERPRET=1)."""
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
    """Every back-end by name, with whether it is usable here and why it is not."""
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


# Process-wide, not per thread: autograd runs backward passes on threads of its own.
_forced: list[str | None] = []


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one back-end ("reference", "cpu", "triton", "cuda"; "auto" or None lifts an outer force) in the block.

    Raises ValueError for an unknown name; RuntimeError where the back-end is not available in this process.
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
    """The back-end in force by `use_backend` or CLP_KERNELS_BACKEND, or None."""
    if _forced:
        return _forced[-1]
    # Asking first is three times as fast as a get() that finds nothing.
    if "CLP_KERNELS_BACKEND" not in os.environ:
        return None
    return _checked(os.environ["CLP_KERNELS_BACKEND"], "CLP_KERNELS_BACKEND")


# Process-wide as _forced is, and for the same reason.
_invariant: list[bool] = []


@contextlib.contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """In the block, the same row gives the same bits whatever else is in its batch; False lifts an outer True.

    Order of summation within a row is then a matter of the layer's shape and the dtype, never of the number of rows:
    kernels keep to one tile where they would choose by rows, and no product is left to a BLAS, which chooses by rows
    itself. Few rows pay for it (tiles made for many), many rows hardly do. What sums over the rows (gradients of
    weights, adapters and shared gates) depends on all of them by its nature, and is merely the same every time.

    The switch is read when a kernel is launched: a backward pass that is to be invariant runs in the block, too.
    A back-end says in its module's docstring what it does about the switch.
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
    """True where an op may call its implementation itself: nobody is tracing, and every tensor has memory.

    torch's dispatcher hands a call to whoever watches (torch.compile, FakeTensorMode, functorch, tensor
    subclasses) and takes 4 to 30 microseconds to do so, more than a decode-size kernel.
    """
    watched = (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
    return not watched and {*map(type, tensors)} <= _PLAIN


def select(op: str, table: Mapping[str, str], device: torch.device, **call) -> Implementation:
    """The implementation module that serves this call.

    table: back-end name -> module name; imported on first use, so that a missing Triton costs nothing.
    call: whatever the op's implementations look at in `unsupported(device=..., **call)`; hashable, and few
    different values (a dtype, not a shape), as the choice is made once for each.
    Raises RuntimeError where the forced back-end cannot serve the call.
    """
    forced = forced_backend()
    key = (op, device.type, forced, *call.values())
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
            _CHOSEN[key] = module
            return module
        refusals.append(f"{name}: {reason}")
    raise RuntimeError(
        f"{op}: no back-end serves this call. "
        + "; ".join(refusals)
        + ". Use clp_kernels.use_backend('auto'), or 'reference' for the plain-torch version."
    )


_CHOSEN: dict[tuple, Implementation] = {}
_AVAILABLE: dict[str, Backend] = {}
