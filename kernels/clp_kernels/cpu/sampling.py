"""sample_tokens on the CPU: one C++ call, no sort. Rows are shared out among torch's threads."""

from __future__ import annotations

import torch
from torch import Tensor

from clp_kernels import _native
from clp_kernels.cpu.dtypes import DTYPES


def unsupported(*, device: torch.device, dtype: torch.dtype, **call) -> str | None:
    if device.type != "cpu":
        return f"the C++ kernels take CPU tensors, not {device.type}"
    if dtype not in DTYPES and dtype is not torch.float16:
        return f"the C++ kernels take float32, bfloat16 and float16, not {dtype}"
    return None


def sample(
    logits: Tensor,
    draws: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    tokens: Tensor,
    logprob: Tensor,
) -> int | None:
    """As reference.sampling.sample."""
    if logits.dtype is torch.float16:
        logits = logits.float()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows, vocab = logits.shape
    seeds = 0 if draws.dtype.is_floating_point else draws.data_ptr()
    options = []
    for value in (temperature, top_k, top_p, min_p):
        options += (value.data_ptr(), 0) if isinstance(value, Tensor) else (0, value)
    bad = _native.sample(
        logits.data_ptr(),
        DTYPES[logits.dtype],
        rows,
        vocab,
        logits.stride(0),
        0 if seeds else draws.data_ptr(),
        seeds,
        *options,
        tokens.data_ptr(),
        logprob.data_ptr(),
        torch.get_num_threads(),
    )
    return None if bad < 0 else bad
