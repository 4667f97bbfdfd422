"""The extra memory that a call needs at its peak, beyond what was there before it.

On a GPU: torch.cuda.max_memory_allocated, which sees everything that torch's allocator handed out.

On a CPU: the high-water mark of the process's resident memory (VmHWM), set back by writing 5 to /proc/self/clear_refs just
before the call, less the resident memory at that moment. It sees what an allocator hook does not: the scratch memory of C++
kernels and of the BLAS. Free memory that the C library keeps would hide an allocation, so it is given back to the system
first (malloc_trim), and only pages that were touched count. The resolution is that of huge pages, 2 MiB.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

LOGITS = 1 << 28  # what the plain formulas hold of them at a time


def extra_peak(call: Callable[[], object], device: str) -> int | None:
    """Bytes; None where the system has no such counter."""
    return _cuda(call) if device == "cuda" else _resident(call)


def _cuda(call: Callable[[], object]) -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del kept
    return peak - before


def _resident(call: Callable[[], object]) -> int | None:
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (AttributeError, OSError):
        return None
    before = _status("VmRSS")
    kept = call()
    peak = _status("VmHWM")
    del kept
    return None if before is None or peak is None else max(0, peak - before)


def _status(name: str) -> int | None:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None


def available(device: str) -> int:
    """Bytes that can still be allocated."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 1 << 62
