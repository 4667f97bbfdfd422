"""Kernels for conditioned language policies: per-row blends of LoRA adapters and token statistics. Needs torch alone."""

from clp_kernels.backends import Backend, backends, use_backend

__all__ = ["Backend", "backends", "use_backend"]
