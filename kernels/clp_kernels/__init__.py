"""Kernels for conditioned language policies: per-row blends of LoRA adapters and token statistics. Needs torch alone."""

from clp_kernels.backends import Backend, backends, use_backend
from clp_kernels.multi_lora import expand_gate, multi_lora_linear
from clp_kernels.sampling import sample_tokens

__all__ = ["Backend", "backends", "expand_gate", "multi_lora_linear", "sample_tokens", "use_backend"]
