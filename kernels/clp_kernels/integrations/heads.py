"""What the replacements that take an output projection do alike: dtypes, and parameters that are not there in backward."""

from __future__ import annotations

import torch
from torch import Tensor


def head_as(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Weight and bias in the dtype that the product is made in. Gradients come back in their own dtypes.

    The libraries cast a tile at a time; here a head in another dtype is copied whole.
    """
    return tuple(tensor if tensor is None else tensor.to(dtype) for tensor in tensors)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on, or hidden's."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def refuse_partitioned(caller: str, weight: Tensor) -> None:
    """Raises RuntimeError for a parameter of DeepSpeed ZeRO-3: gathered now, partitioned again by the time of backward."""
    if hasattr(weight, "ds_id") and torch.is_grad_enabled():
        raise RuntimeError(
            f"{caller}: weight is a DeepSpeed ZeRO-3 parameter, which is partitioned again before the backward pass reads it; "
            "use ZeRO-2 or FSDP2, or leave this one unpatched with skip="
        )
