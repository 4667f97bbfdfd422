"""prefix_attention on the CPU: csrc/cpu/prefix_attention.cpp, in float32 inside.

bfloat16 is widened where blocks of queries, keys and values are packed, and rounded where results are written: scores and sums
never are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clp_kernels import _native
from clp_kernels.cpu import dtypes
from clp_kernels.cpu.dtypes import DTYPES


def unsupported(*, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    most = _native.PREFIX_ATTENTION_MAX_DIM
    if head_dim > most:
        return f"the C++ kernels take heads of size {most} at most, not {head_dim}"
    return dtypes.unsupported(device=device, dtype=dtype)


def _dense_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where the elements of a row are not side by side."""
    return tensor if tensor.stride(2) == 1 or tensor.shape[2] == 1 else tensor.contiguous()


def _address(tensor: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _call(
    tensors,
    lse: Tensor,
    starts: Tensor,
    parents: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> None:
    """tensors: q, k, v, out, and for the backward pass d_out, dq, dk, dv (None: not asked for)."""
    q, k = tensors[:2]
    starts, parents = starts.contiguous(), parents.contiguous()
    _native.prefix_attention(
        tuple(_address(tensor) for tensor in tensors),
        lse.data_ptr(),
        DTYPES[q.dtype],
        (*q.shape[:2], k.shape[1], q.shape[2], len(parents)),
        starts.data_ptr(),
        parents.data_ptr(),
        scale,
        softcap or 0.0,
        window or 0,
        torch.get_num_threads(),
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    parents: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """As reference.prefix_attention.forward."""
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:2], dtype=torch.float32)
    inputs = [_dense_rows(tensor) for tensor in (q, k, v)]
    _call([*inputs, out], lse, starts, parents, scale, softcap, window)
    return out, lse


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    parents: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    needs: list[bool],
) -> list[Tensor]:
    """As reference.prefix_attention.backward."""
    inputs = [_dense_rows(tensor) for tensor in (q, k, v, out, d_out)]
    grads = [torch.empty(t.shape, dtype=t.dtype) if need else None for t, need in zip((q, k, v), needs)]
    _call([*inputs, *grads], lse.contiguous(), starts, parents, scale, softcap, window)
    return [grad for grad in grads if grad is not None]
