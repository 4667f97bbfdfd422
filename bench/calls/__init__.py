"""Awkward calls of every op, in one catalogue: for sanitising (bench.gpu.sanitize) and for the kernels' tests (tests/kernels).

CHECKS[op]()              calls whose results are compared with float64: ragged sizes and aligned ones, every kernel and tile
SWEEPS[op](dtype, large)  (label, make) of small calls with every choice that the op's code makes; make() is a Call
small.ALL                 one call of every public op, for torch's own machinery

A module for each family of ops has what its calls share: how an op is called with tensors by name, and how these are made.
Nothing but torch is needed to import it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.calls import attention, multi_lora, sampling, token_stats, weight_space
from bench.calls.call import inputs, outputs

CHECKS = {
    "multi_lora_linear": multi_lora.checks,
    "linear_logprob": token_stats.linear_checks,
    "vocab_parallel_linear_logprob": token_stats.vocab_parallel_checks,
    "logits_logprob": token_stats.logits_checks,
    "interpolate": weight_space.interpolate_checks,
    "slerp": weight_space.slerp_checks,
    "ema_": weight_space.ema_checks,
    "sparsify": weight_space.sparsify_checks,
    "interpolated_linear": weight_space.linear_checks,
    "sample_tokens": sampling.checks,
    "prefix_attention": attention.checks,
    "decode_step": attention.decode_step_checks,
}
SWEEPS = {
    "multi_lora_linear": multi_lora.sweep,
    "linear_logprob": token_stats.linear_sweep,
    "logits_logprob": token_stats.logits_sweep,
    "sample_tokens": sampling.sweep,
    "prefix_attention": attention.sweep,
}


def every_call(
    dtype: torch.dtype, large: bool = True, thin: int = 1, first: int = 0
) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """(label, function) of the sweeps: the function makes the inputs and returns every result, each of which has to be finite.

    large: also sizes at which the C++ kernels use several threads. thin: only every thin-th call of each op.
    """

    def run(make: Callable) -> list[Tensor]:
        call = make()
        with call.context():
            return list(outputs(call, inputs(call, dtype)).values())

    for op, sweep in SWEEPS.items():
        for label, make in itertools.islice(sweep(dtype, large), first % thin, None, thin):
            yield f"{op} {label}", lambda make=make: run(make)
