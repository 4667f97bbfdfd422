"""The ops of interpolation.py on the CPU: one C++ call for a list (csrc/cpu/interpolation.hpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clp_kernels import _native
from clp_kernels.cpu import dtypes
from clp_kernels.cpu.dtypes import DTYPES
from clp_kernels.tensor_lists import MERGES, Blends, Pairs, Sparse, dense

_BUCKETS = 2048  # magnitude_buckets in csrc/cpu/interpolation.hpp
_SERIAL = 1 << 15  # elements that one thread handles sooner than two would start


def unsupported(*, device: torch.device, dtype: torch.dtype, other: torch.dtype, **call) -> str | None:
    return dtypes.unsupported(device=device, dtype=dtype) or dtypes.unsupported(device=device, dtype=other)


def _threads(elements: int) -> int:
    return torch.get_num_threads() if elements > _SERIAL else 1


def blend(call: Blends) -> None:
    weights = call.weights.to(torch.float32).contiguous()
    _, blends, models = weights.shape
    alive: list[Tensor] = []
    table, elements = [], 0
    for p, (parts, out) in enumerate(zip(call.stacks, call.outs)):
        size = out.numel() // blends
        base = dense([call.bases[p][None]], alive)[0] if call.bases is not None else 0
        table += (size, call.rows[p], base, out.data_ptr(), *dense(parts, alive))
        elements += size
    rows = torch.tensor(table, dtype=torch.int64)
    _native.blend(
        rows.data_ptr(),
        len(call.stacks),
        models,
        blends,
        weights.data_ptr(),
        call.base_scale,
        DTYPES[call.stacks[0][0].dtype],
        DTYPES[call.outs[0].dtype],
        MERGES.index(call.merge),
        _threads(elements * blends),
    )


def inner_products(call: Pairs) -> Tensor:
    """As reference.interpolation.inner_products."""
    left, right = call.counts()
    alive: list[Tensor] = []
    table, elements = [], 0
    for a, b in zip(call.left, call.right):
        size = a[0][0].numel()
        table += (size, *dense(a, alive), *dense(b, alive))
        elements += size
    items, rows = len(call.left), torch.tensor(table, dtype=torch.int64)
    blocks = _native.pair_blocks(rows.data_ptr(), items, 1 + left + right)
    partial = torch.empty(blocks, left, right, dtype=torch.float64)
    out = torch.empty(items, left, right, dtype=torch.float64)
    _native.inner_products(
        rows.data_ptr(),
        items,
        left,
        right,
        DTYPES[call.left[0][0].dtype],
        DTYPES[call.right[0][0].dtype],
        partial.data_ptr(),
        out.data_ptr(),
        _threads(elements * left * right),
    )
    return out


def thresholds(tensors: Sequence[Tensor], kept: Sequence[int]) -> Tensor:
    """As reference.interpolation.thresholds."""
    alive: list[Tensor] = []
    table = []
    for tensor, count in zip(tensors, kept):
        table += (tensor.numel(), dense([tensor[None]], alive)[0], count)
    rows, out = torch.tensor(table, dtype=torch.int64), torch.empty(len(tensors), dtype=torch.float32)
    threads = torch.get_num_threads()
    counts = torch.empty(threads * _BUCKETS, dtype=torch.int32)
    _native.thresholds(
        rows.data_ptr(),
        len(tensors),
        DTYPES[tensors[0].dtype],
        counts.data_ptr(),
        out.data_ptr(),
        _SERIAL,
        threads,
    )
    return out


def sparsify(call: Sparse) -> None:
    alive: list[Tensor] = []
    if call.states is None:
        keys = call.thresholds.contiguous().view(torch.int32).tolist()
    else:
        keys = call.states
    table, elements = [], 0
    for tensor, out, key in zip(call.tensors, call.outs, keys):
        table += (out.numel(), dense([tensor[None]], alive)[0], out.data_ptr(), key)
        elements += out.numel()
    rows = torch.tensor(table, dtype=torch.int64)
    _native.sparsify(
        rows.data_ptr(),
        len(call.outs),
        DTYPES[call.outs[0].dtype],
        call.states is not None,
        call.kept,
        call.scale,
        _threads(elements),
    )
