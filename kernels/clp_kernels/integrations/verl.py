"""verl's log-prob functions on clp_kernels, and `patch_verl`.

From hidden states verl 0.9 calls `linear_cross_entropy` (fused kernels "triton", and Megatron) or `FusedLinearForPPO` (fused
kernels "torch"); from logits `logprobs_from_logits`, which dispatches to FlashAttention's cross-entropy, an NPU's, or torch's
(`_v2`), and `entropy_from_logits`, whole or in chunks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from clp_kernels.integrations.heads import compute_dtype, head_as
from clp_kernels.integrations.patching import Replacement, patched
from clp_kernels.linear_logprob import linear_logprob
from clp_kernels.logits_logprob import logits_logprob
from clp_kernels.vocab_parallel import vocab_parallel_linear_logprob

TESTED = ("0.9.1",)
_REDUCTIONS = {"none": lambda logprob: logprob, "sum": torch.sum, "mean": torch.mean}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """-> log p_label and entropy of p = softmax(hidden W^T / temperature): `verl.utils.kernel.linear_cross_entropy`.

    hidden      (..., H), T rows in all; any H and device (verl's Triton kernels take multiples of 128, on CUDA)
    weight      (V, H), cast to hidden's dtype or autocast's
    labels      T of them, in any shape, int64; -100 gives zeros and no gradient (verl: minus the log-sum-exp)
    temperature a float; here also a tensor that broadcasts to the rows
    reduction   of the log-prob alone: "none" (T,), "sum" or "mean" (), over all T
    dist_process_group
                the weight is this rank's (V / ranks, H) of a vocabulary that is split evenly over the group, in the order of
                its ranks; labels are ids of the whole. The gradient of hidden is then this rank's term, as verl's is: the
                caller sums over the group (Megatron does, where it gathers the sequence). The weight's is whole
    returns     float32 (float64 for float64); the entropy (T,). Gradients of both reach hidden and weight

    Raises ValueError for another reduction; what linear_logprob raises.
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"linear_cross_entropy: reduction is {reduction!r}; expected one of {', '.join(_REDUCTIONS)}"
        )
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    hidden, weight = head_as(compute_dtype(hidden), hidden, weight)
    options = {"temperature": temperature, "outputs": ("logprob", "entropy")}
    if dist_process_group is None:
        stats = linear_logprob(hidden, weight, labels, **options)
    else:
        shard = weight.shape[0]
        stats = vocab_parallel_linear_logprob(
            hidden, weight, labels, group=dist_process_group, reduce_gradients=False,
            vocab_start=shard * dist.get_rank(dist_process_group),
            vocab_size=shard * dist.get_world_size(dist_process_group), **options)  # fmt: skip
    return _REDUCTIONS[reduction](stats.logprob), stats.entropy


class FusedLinearForPPOFunction:
    """Stands for `verl.utils.experimental.torch_functional.FusedLinearForPPOFunction`, of which verl calls `apply` alone."""

    @staticmethod
    def apply(
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
        chunk_size: int = 512,
    ) -> tuple[Tensor, Tensor]:
        """-> log p of input_ids, float32, and the entropy, in hidden's dtype; p = softmax(hidden W^T / temperature).

        hidden_states (T, H) or (B, T, H), vocab_weights (V, H) in their dtype or cast to it, input_ids (T,) or (B, T) -> the
        shape of input_ids, with gradients to the first two (verl's are added up in hidden's dtype over chunks of chunk_size
        rows; here in float32, and no logits are held). float64 stays float64.
        """
        hidden, weight = head_as(compute_dtype(hidden_states), hidden_states, vocab_weights)
        options = {"temperature": temperature, "outputs": ("logprob", "entropy")}
        stats = linear_logprob(hidden, weight, input_ids.long(), **options)
        return stats.logprob, stats.entropy.to(hidden.dtype)


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """log softmax(logits) at labels: `verl.utils.torch_functional.logprobs_from_logits`, whichever way it would dispatch.

    logits (..., V), labels (...) -> (...), float32 (float64 for float64), as with FlashAttention's cross-entropy; verl's torch
    code gives 16-bit results for 16-bit logits. Differentiable in logits. inplace_backward is a permission, to overwrite the
    logits with their gradient, which is not made use of: the gradient takes memory of its own.

    Raises what logits_logprob raises; labels of -100 give 0 and no gradient.
    """
    return logits_logprob(logits, labels.long()).logprob


def logprobs_from_logits_flash_attn(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """`logprobs_from_logits` of (T, V) logits; verl's needs flash-attn >= 2.4.3 and a GPU."""
    return logprobs_from_logits(logits, labels, inplace_backward)


def logprobs_from_logits_v2(logits: Tensor, labels: Tensor) -> Tensor:
    """`logprobs_from_logits` by another name."""
    return logprobs_from_logits(logits, labels)


def logprobs_from_logits_naive(logits: Tensor, labels: Tensor) -> Tensor:
    """`logprobs_from_logits` by another name."""
    return logprobs_from_logits(logits, labels)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """-sum p log p, p = softmax(logits): logits (..., V) -> (...), float32 (float64 for float64), differentiable."""
    return logits_logprob(logits, None, outputs=("entropy",)).entropy


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """`entropy_from_logits` of (T, V) logits; chunk_size is verl's tile of rows, and changes nothing here."""
    return entropy_from_logits(logits)


_FUNCTIONS = (
    logprobs_from_logits, logprobs_from_logits_flash_attn, logprobs_from_logits_v2, logprobs_from_logits_naive,
    entropy_from_logits, entropy_from_logits_with_chunking)  # fmt: skip
REPLACEMENTS = (
    Replacement("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy", linear_cross_entropy),
    Replacement(
        "verl.utils.experimental.torch_functional", "FusedLinearForPPOFunction", FusedLinearForPPOFunction
    ),
    *(Replacement("verl.utils.torch_functional", function.__name__, function) for function in _FUNCTIONS),
)


@contextlib.contextmanager
def patch_verl(*, skip: Collection[str] = (), allow_untested: bool = False) -> Iterator[None]:
    """verl computes log-probs and entropies with clp_kernels in the block; undone at its end, also by an exception.

    skip            names that stay verl's own: linear_cross_entropy, FusedLinearForPPOFunction, logprobs_from_logits and its
                    forms _flash_attn, _v2 and _naive, entropy_from_logits, entropy_from_logits_with_chunking
    allow_untested  try another version than those in TESTED

    Blocks may be nested. Begin before an engine is made: it compiles and keeps the entropy function that it finds. In a
    process per worker (Ray), each worker needs the patch. `impl_backend="liger"` of FusedLinearForPPO is not touched.

    Raises RuntimeError for a version of verl this was not tested with, ImportError where it is missing.
    """
    with patched("patch_verl", "verl", TESTED, REPLACEMENTS, skip, allow_untested):
        yield
