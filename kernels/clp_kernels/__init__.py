"""Kernels for conditioned language policies: per-row blends of LoRA adapters, and token statistics. They need only torch."""

from clp_kernels.averaging import ema_, slerp
from clp_kernels.backends import Backend, backends, batch_invariant, use_backend
from clp_kernels.interpolated_linear import interpolated_linear
from clp_kernels.interpolation import interpolate, merge_sign_consensus
from clp_kernels.linear_logprob import linear_logprob
from clp_kernels.logits_logprob import logits_logprob
from clp_kernels.multi_lora import expand_gate, merged_weight, multi_lora_linear
from clp_kernels.prefix_attention import prefix_attention
from clp_kernels.prefix_layout import PrefixLayout
from clp_kernels.sampling import sample_tokens
from clp_kernels.sparsify import sparsify
from clp_kernels.token_stats import HeadLoRA, TokenStats
from clp_kernels.vocab_parallel import vocab_parallel_linear_logprob

__version__ = "0.1.0"  # the version of clp-kernels, and of the clp-engine that contains the same files
__all__ = [
    "Backend",
    "HeadLoRA",
    "PrefixLayout",
    "TokenStats",
    "backends",
    "batch_invariant",
    "ema_",
    "expand_gate",
    "interpolate",
    "interpolated_linear",
    "linear_logprob",
    "logits_logprob",
    "merge_sign_consensus",
    "merged_weight",
    "multi_lora_linear",
    "prefix_attention",
    "sample_tokens",
    "slerp",
    "sparsify",
    "use_backend",
    "vocab_parallel_linear_logprob",
]
