"""multi_lora_linear for decoding: up to 256 rows, no gradients, one launch (csrc/cuda/multi_lora_decode.hpp).

Training calls, and everything else that this kernel does not take, are Triton's. There is no backward here: a
call that needs one is not one of decoding, and `unsupported` refuses it.
"""

from __future__ import annotations

import functools

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
def _workspace(rows: int, columns: int, depth: int, rank: int, sms: int) -> int:
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
    (columns, depth), rank = weight.shape, lora_a.shape[0]
    flat = x if x.dim() == 2 else x.reshape(-1, depth)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    rows = flat.shape[0]
    gate = gate.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    if gate_index is not None:
        gate_index = gate_index.reshape(-1).contiguous()
    with torch.cuda.device_of(x):
        sms = _properties(x.device.index)[2]
        y = x.new_empty((rows, columns))
        workspace = torch.empty(
            _workspace(rows, columns, depth, rank, sms), dtype=torch.uint8, device=x.device
        )
        _native.multi_lora_decode(
            flat.data_ptr(),
            weight.data_ptr(),
            lora_a.data_ptr(),
            lora_b.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            gate.data_ptr(),
            0 if gate_index is None else gate_index.data_ptr(),
            y.data_ptr(),
            workspace.data_ptr(),
            flat.stride(0),
            weight.stride(0),
            lora_a.stride(0),
            lora_b.stride(0),
            rows,
            columns,
            depth,
            rank,
            gate.shape[0],
            gate.dtype is torch.float32,
            gate_index is not None and gate_index.dtype is torch.int64,
            _DTYPES[x.dtype],
            x.device.index,
            sms,
            torch.cuda.current_stream().cuda_stream,
        )
    return y.view(*x.shape[:-1], columns), x.new_empty(0)
