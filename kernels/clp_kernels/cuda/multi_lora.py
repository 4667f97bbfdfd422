"""multi_lora_linear for decoding: up to 256 rows, no gradients, one launch (csrc/cuda/multi_lora_decode.hpp), of several layers
with one input where there are such (`multi_lora_linears`).

Training calls, and everything else that this kernel does not take, are Triton's. There is no backward here: a
call that needs one is not one of decoding, and `unsupported` refuses it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clp_kernels import _native

_DTYPES = {torch.bfloat16: 0, torch.float16: 1}
_SHARED = 160 * 1024  # of the kernel for 17 to 32 and for 65 to 128 rows; the others need less


def unsupported(*, device: torch.device, dtype: torch.dtype, decode: bool = False, **call) -> str | None:
    if device.type != "cuda":
        return f"the CUDA C++ kernels take CUDA tensors, not {device.type}"
    if dtype not in _DTYPES:
        return f"the CUDA C++ kernels take bfloat16 and float16, not {dtype}; Triton's take float32 too"
    if not decode:
        return (
            "the CUDA C++ kernel takes calls that need no gradient, of at most 256 rows, with weight, lora_a and "
            "lora_b whose rows are dense (stride 1 in the last dimension); Triton's take the others"
        )
    major, minor, _, shared = _properties(device.index)
    if major not in (8, 9, 10):
        return f"the CUDA C++ kernels are built for compute capabilities 8, 9 and 10, not {major}.{minor}"
    if shared < _SHARED:
        return (
            f"the CUDA C++ kernel needs {_SHARED // 1024} KB of shared memory for a block, and compute "
            f"capability {major}.{minor} has {shared // 1024}"
        )
    return None


@functools.cache
def _properties(index: int | None) -> tuple[int, int, int, int]:
    """Compute capability (major, minor), multiprocessors, and bytes of shared memory a block may have."""
    return _native.cuda_properties(torch.cuda.current_device() if index is None else index)


# A decoding loop has a few shapes, again and again.
@functools.lru_cache(4096)
def _workspace(rows: int, columns: tuple[int, ...], depth: int, rank: int, sms: int) -> int:
    return _native.multi_lora_decode_workspace(rows, columns, depth, rank, sms)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    gate_index: Tensor | None,
    keep_h: bool = False,
) -> tuple[Tensor, Tensor]:
    """As reference.multi_lora.forward without keep_h. Allocates y and a workspace, before the launch."""
    assert not keep_h, "the decode kernel keeps nothing for a backward pass"
    return forward_layers(x, [(weight, bias, lora_a, lora_b)], gate, gate_index)[0], x.new_empty(0)


def forward_layers(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor | None, Tensor, Tensor]],
    gate: Tensor,
    gate_index: Tensor | None,
) -> list[Tensor]:
    """y of each layer (weight, bias, lora_a, lora_b), of one depth and rank, in one launch of at most three layers."""
    depth, rank = x.shape[-1], layers[0][2].shape[0]
    flat = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), depth)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    rows = flat.shape[0]
    gate = gate.contiguous()
    layers = [(w, None if bias is None else bias.contiguous(), a, b) for w, bias, a, b in layers]
    if gate_index is not None:
        gate_index = gate_index.reshape(-1).contiguous()
    sms = _properties(x.device.index)[2]
    columns = tuple(w.shape[0] for w, *_ in layers)
    ys = [x.new_empty((rows, n)) for n in columns]
    workspace = torch.empty(_workspace(rows, columns, depth, rank, sms), dtype=torch.uint8, device=x.device)
    _native.multi_lora_decode(
        flat.data_ptr(),
        gate.data_ptr(),
        0 if gate_index is None else gate_index.data_ptr(),
        workspace.data_ptr(),
        flat.stride(0),
        rows,
        depth,
        rank,
        gate.shape[0],
        gate.dtype is torch.float32,
        gate_index is not None and gate_index.dtype is torch.int64,
        [
            (
                w.data_ptr(),
                a.data_ptr(),
                b.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                y.data_ptr(),
                w.stride(0),
                a.stride(0),
                b.stride(0),
                n,
            )
            for (w, bias, a, b), y, n in zip(layers, ys, columns)
        ],
        _DTYPES[x.dtype],
        x.device.index,
        sms,
        torch.cuda.current_stream().cuda_stream,
    )
    return [y.view(*x.shape[:-1], y.shape[1]) for y in ys]
