"""Exponentials per second of a GPU: every thread computes many of them from registers, so that memory plays no part."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bench.core.measure import Timer


@triton.jit
def _exp_loop(x_ptr, REPEATS: tl.constexpr, BLOCK: tl.constexpr):  # x_ptr: (programs * BLOCK,) float32
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    for _ in range(REPEATS):
        x = tl.exp(-x)  # stays in (0, 1]; each depends on the last, the many warps hide that
    tl.store(x_ptr + offsets, x)


def launch(x: torch.Tensor, repeats: int, block: int = 1024) -> None:
    _exp_loop[(x.numel() // block,)](x, REPEATS=repeats, BLOCK=block, num_warps=8)


def exponentials_per_second(timer: Timer, runs: int, size: int = 1 << 22, repeats: int = 256) -> float:
    x = torch.rand(size, device="cuda")
    for _ in range(2):
        launch(x, repeats)
    return size * repeats / min(timer.seconds(lambda: launch(x, repeats)) for _ in range(runs))
