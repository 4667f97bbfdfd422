"""Whether a variant computed the right thing: its error against float64 beside plain torch's in the same dtype.

    error = ||output - exact|| / ||exact||          allowed = 1.5 * torch's error + one rounding of the output's dtype

The one rounding is for where torch happens to be exact. A variant above that on any output, or with a value that is not
finite, is wrong, and no speed-up is shown for it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bench.core.schema import Error

FACTOR = 1.5


def relative(output: Tensor, exact: Tensor) -> float | None:
    """None where it is not finite."""
    scale = torch.linalg.vector_norm(exact.double())
    error = torch.linalg.vector_norm(output.double() - exact.double())
    value = (error / scale if scale > 0 else error).item()
    return value if value == value and value != float("inf") else None


def errors(
    outputs: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> dict[str, Error]:
    """Of every floating-point output that `exact` has too."""
    found = {}
    for name, value in outputs.items():
        if name not in exact or not value.dtype.is_floating_point:
            continue
        truth = exact[name].reshape(-1)
        torchs = relative(plain[name].reshape(-1), truth) or 0.0
        rounding = torch.finfo(value.dtype).eps if value.dtype is not torch.float64 else 1e-15
        found[name] = Error(relative(value.reshape(-1), truth), torchs, FACTOR * torchs + rounding)
    return found


def complaint(found: Mapping[str, Error], expected: tuple[str, ...]) -> str | None:
    """Why the variant is wrong, if it is; `expected` are outputs it must have returned."""
    missing = [name for name in expected if name not in found]
    if missing:
        return f"did not return {', '.join(missing)}"
    for name, error in found.items():
        if error.own is None:
            return f"{name} is not finite"
        if error.own > error.allowed:
            return f"{name}: error {error.own:.2g} where torch has {error.torch:.2g}"
    return None
