"""What a measurement was made on: device, versions, commit, threads."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "liger-kernel", "cut-cross-entropy", "numpy")
_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "KMP_AFFINITY", "GOMP_CPU_AFFINITY",
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "CLP_KERNELS_BACKEND", "CLP_KERNELS_ISA", "TRITON_INTERPRET",
    "MKL_ENABLE_INSTRUCTIONS", "CUDA_VISIBLE_DEVICES",
    "NVIDIA_TF32_OVERRIDE", "CLP_ENGINE_DECODING", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
)  # fmt: skip


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def instruction_set() -> str | None:
    """The one that the C++ kernels use; None where they are not built."""
    try:
        from clp_kernels import _native
    except ImportError:
        return None
    return _native.isa()


def last_level_cache() -> int:
    """Bytes of the largest cache that core 0 sees; 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes, default=32 << 20)


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def pin(cpus: Sequence[int] | None, threads: int | None) -> None:
    """Bind the process to these cores and let torch use as many threads as there are cores (or `threads`)."""
    import torch

    if cpus:
        os.sched_setaffinity(0, cpus)
    if threads is None and hasattr(os, "sched_getaffinity"):
        threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads or torch.get_num_threads())


def describe(device: str) -> dict:
    import torch

    from clp_engine.core.provenance import source_commit

    on_gpu = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else cpu_name(),
        "device_type": device,
        # Of processors of one name, as those of a cloud are, this tells what their cores can do.
        "instruction_set": None if on_gpu else instruction_set(),
        "cuda": _cuda_facts() if on_gpu else None,
        "threads": torch.get_num_threads(),
        "cpus": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "last_level_cache": torch.cuda.get_device_properties(0).L2_cache_size
        if on_gpu
        else last_level_cache(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "date": date.today().isoformat(),
        # A copy of the sources without their history is told its commit.
        "commit": source_commit() or os.environ.get("CLP_SOURCE_COMMIT"),
        "versions": {package: package_version(package) for package in _PACKAGES},
    }


def _cuda_facts() -> dict:
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "version": torch.version.cuda or torch.version.hip,
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def why_not_importable(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # an import may fail in a package's own ways; the reason is reported
        first = (str(error).splitlines() or [""])[0]
        return f"not importable ({type(error).__name__}: {first})"
    return None
