"""What the C++ kernels take: the mirror of DType in csrc/cpu/kernels.hpp, and the refusal of everything else."""

from __future__ import annotations

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def unsupported(*, device: torch.device, dtype: torch.dtype, **call) -> str | None:
    if device.type != "cpu":
        return f"the C++ kernels take CPU tensors, not {device.type}"
    if dtype not in DTYPES:
        return f"the C++ kernels take float32 and bfloat16, not {dtype}"
    return None
