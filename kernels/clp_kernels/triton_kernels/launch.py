"""What the kernels and their launchers share: tiles, what the device offers, descriptors for the bulk copy engine (TMA).

A tensor descriptor carries a tile's address, bounds and layout: one thread asks for a tile and the copy engine fetches it,
zeros beyond the edges, where pointers cost every thread addresses and masks. It needs compute capability 9 and rows that
start on 16 bytes; everything else loads through pointers.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from clp_kernels.backends import interpreting

SLICE = 64  # columns of a wide tile that are finished together, where its registers or its shared memory are scarce
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def cdiv(size: int, block: int) -> int:
    """Blocks that cover `size`. triton.cdiv is also a function of kernels, and takes the host 2 microseconds a call."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """The least power of two that is `size` or more."""
    return 1 << (size - 1).bit_length()


class Tile(NamedTuple):
    rows: int
    columns: int
    depth: int  # of the contraction
    num_warps: int
    num_stages: int


def unsupported(*, device: torch.device, dtype: torch.dtype, **call) -> str | None:
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"the Triton kernels take CUDA or ROCm tensors, not {device.type}"
    if dtype not in DTYPES:
        return f"the Triton kernels take float32, float16 and bfloat16, not {dtype}"
    if interpreting() and dtype is torch.bfloat16:
        return "Triton's interpreter computes bfloat16 products wrongly; use float16 or float32 there"
    return None


@functools.cache
def _properties(device: torch.device):
    return torch.cuda.get_device_properties(device)


def major(device: torch.device) -> int:
    """The device's compute capability (its first digit); 9 where the kernels do not run on a GPU."""
    return _properties(device).major if device.type == "cuda" else 9


def multiprocessors(device: torch.device) -> int:
    """How many programs of a persistent kernel to start: one for each multiprocessor; 132 without a GPU."""
    return _properties(device).multi_processor_count if device.type == "cuda" else 132


def cache_bytes(device: torch.device) -> int:
    """The size of the device's L2 cache; an H100's or H200's without a GPU."""
    return _properties(device).L2_cache_size if device.type == "cuda" else 50 << 20


def family(*operands: Tensor) -> str:
    """Which row of a table of tiles serves a kernel that loads through pointers: "half", "ampere", "hip" or "plain".

    "plain" is for float32, which has no tensor cores here, and for rows that do not start on 16 elements: those are loaded
    one by one, with an address each in a register.
    """
    first = operands[0]
    aligned = all(stride == 1 or stride % 16 == 0 for operand in operands for stride in operand.stride())
    if first.dtype is torch.float32 or not aligned:
        return "plain"
    if torch.version.hip:
        return "hip"
    return "half" if major(first.device) >= 9 else "ampere"


def describable(*operands: Tensor) -> bool:
    """Whether tensor descriptors can point at the 16-bit matrices, or at their transposes."""
    if torch.version.hip or operands[0].dtype is torch.float32 or major(operands[0].device) < 9:
        return False
    return all(map(_describable, operands))


def _describable(matrix: Tensor) -> bool:
    outer, inner = sorted(matrix.stride(), reverse=True)
    in_bytes = outer * matrix.element_size()
    return inner == 1 and in_bytes % 16 == 0 and matrix.data_ptr() % 16 == 0 and matrix.numel() > 0


def descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tiles of (rows, columns) of a matrix whose last dimension is contiguous."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


@triton.jit
def _halves(tile):
    """The left and the right half of the columns: a choice of registers where tiles lie as the tensor cores leave them."""
    pairs = tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2])
    return tl.split(tl.permute(pairs, [0, 2, 1]))
