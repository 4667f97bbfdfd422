"""TRL's log-prob functions on clp_kernels, and `patch_trl`.

What TRL 1.16 computes from hidden states goes through `add_fused_lm_head` (SFT, DPO, KTO, RLOO, GRPO trainers), which calls
`ChunkedLogProbFunction`; its distillation trainer calls `ChunkedDivergenceFunction`; what holds logits calls
`selective_log_softmax`, `entropy_from_logits` or `selective_log_softmax_and_entropy`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from clp_kernels.integrations.heads import compute_dtype, head_as, refuse_partitioned
from clp_kernels.integrations.patching import Replacement, patched
from clp_kernels.linear_logprob import linear_logprob
from clp_kernels.logits_logprob import logits_logprob

TESTED = ("1.16.0",)
OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_ROWS = 1024  # of the tile of logits that mean_logits needs where there is a softcap


class ChunkedLogProbFunction:
    """Stands for `trl.kernels.ChunkedLogProbFunction`, of which TRL calls `apply` alone."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """-> log p_target, entropy, log sum_v p_v^2, mean_v z_v, target is argmax z; each (N,), None where not asked for.

        z = softcap * tanh((hidden W^T + bias) * logit_scale / softcap) / temperature,  p = softmax(z)

        hidden   (N, H); weight (V, H), bias (V,) or None: cast to hidden's dtype, or to autocast's
        targets  (N,) int64; -100 gives zeros and no gradient (TRL would index with it)
        outputs  which of the last four; the first is always there
        returns  float32 (float64 for float64 hidden), and bool; gradients of the first two reach hidden, weight and bias

        chunk_size is TRL's tile of the vocabulary: the back-end has its own, and no value changes the result. log_sum_sq_probs
        (DPO's use_weighting) takes two more passes over the vocabulary, 2 log p_j(z) - log p_j(2 z) with j the argmax, where
        neither is large; mean_logits with a softcap one, in tiles of 1024 rows; without one it is the product with the mean
        row of the weight. Products are not rounded to 16 bits before the softmax, which TRL's are.

        Raises ValueError for an unknown output; RuntimeError for DeepSpeed ZeRO-3 parameters; what linear_logprob raises.
        """
        caller = "ChunkedLogProbFunction"
        # Named as the fields of TRL's fused head are, "log_probs" among them, which is always computed.
        unknown = set(outputs).difference(OPTIONAL_OUTPUTS, ("log_probs",))
        if unknown:
            raise ValueError(
                f"{caller}: outputs has {sorted(unknown)}; expected some of {', '.join(OPTIONAL_OUTPUTS)}"
            )
        refuse_partitioned(caller, weight)
        dtype = compute_dtype(hidden)
        hidden, weight, bias = head_as(dtype, hidden, weight, bias)
        options = {"bias": bias, "softcap": final_logit_softcapping, "logit_scale": logit_scale}
        with_top1 = "is_top1" in outputs or "log_sum_sq_probs" in outputs
        asked = ["logprob"] + ["entropy"] * ("entropy" in outputs) + ["top1"] * with_top1
        stats = linear_logprob(hidden, weight, targets, temperature=temperature, outputs=asked, **options)
        log_sum_sq_probs = mean_logits = None
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            if "log_sum_sq_probs" in outputs:
                once, twice = (
                    linear_logprob(
                        hidden, weight, stats.top1, temperature=temperature / power, **options
                    ).logprob
                    for power in (1, 2)
                )
                log_sum_sq_probs = (2 * once - twice).masked_fill(targets == -100, 0)
            if "mean_logits" in outputs:
                mean_logits = _mean_logits(
                    hidden, weight, bias, final_logit_softcapping, logit_scale, chunk_size
                )
                mean_logits = (mean_logits / temperature).masked_fill(targets == -100, 0)
        is_top1 = stats.top1 == targets if "is_top1" in outputs else None
        return stats.logprob, stats.entropy, log_sum_sq_probs, mean_logits, is_top1


def _mean_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    columns: int,
) -> Tensor:
    """(N,): the mean over the vocabulary of the capped logits."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    hidden = hidden.to(wide)
    if softcap is None:
        total = hidden @ weight.mean(0, dtype=wide)
        return (total if bias is None else total + bias.mean(dtype=wide)) * logit_scale
    total = hidden.new_zeros(hidden.shape[0])
    for start in range(0, weight.shape[0], columns):
        tile = slice(start, start + columns)
        head = weight[tile].to(wide)
        for first in range(0, hidden.shape[0], _ROWS):
            rows = slice(first, first + _ROWS)
            logits = hidden[rows] @ head.T
            if bias is not None:
                logits += bias[tile]
            total[rows] += (softcap * (logits * (logit_scale / softcap)).tanh()).sum(-1)
    return total / weight.shape[0]


class ChunkedDivergenceFunction:
    """Stands for `trl.kernels.chunked_divergence.ChunkedDivergenceFunction`, of which TRL calls `apply` alone."""

    @staticmethod
    def apply(
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """-> divergence (N,), the student's entropy (N,) without gradient; float32, float64 for float64 hidden.

        beta 0: KL(teacher || student);  beta 1: KL(student || teacher); exact over the vocabulary. With z as in
        `ChunkedLogProbFunction`, of each model.

        student_hidden (N, H_s), teacher_hidden (N, H_t); weights (V, H_s), (V, H_t); biases (V,) or None. Gradients reach the
        student's three. The product is made in autocast's dtype, or the wider of the two hidden dtypes.

        Raises NotImplementedError for a beta between 0 and 1 (the generalised Jensen-Shannon divergence has no kernel here)
        and where student and teacher differ in logit scale or softcap; RuntimeError for DeepSpeed ZeRO-3 parameters.
        """
        caller = "ChunkedDivergenceFunction"
        if beta not in (0.0, 1.0):
            raise NotImplementedError(
                f"{caller}: beta is {beta}; expected 0 (KL(teacher || student)) or 1 (KL(student || teacher)). For the "
                f"generalised Jensen-Shannon divergence use patch_trl(skip=[{caller!r}])"
            )
        ours = (student_logit_scale, student_final_logit_softcapping)
        theirs = (teacher_logit_scale, teacher_final_logit_softcapping)
        if ours != theirs:
            raise NotImplementedError(
                f"{caller}: logit scale and softcap are {ours} for the student and {theirs} for the teacher; expected the "
                f"same: use patch_trl(skip=[{caller!r}])"
            )
        refuse_partitioned(caller, student_weight)
        refuse_partitioned(caller, teacher_weight)
        dtype = torch.promote_types(compute_dtype(student_hidden), compute_dtype(teacher_hidden))
        hidden, weight, bias = head_as(dtype, student_hidden, student_weight, student_bias)
        ref_hidden, ref_weight, ref_bias = head_as(dtype, teacher_hidden, teacher_weight, teacher_bias)
        if bias is not None and ref_bias is None:
            ref_bias = torch.zeros_like(bias)  # None would stand for the student's
        divergence = "reverse_kl" if beta == 0 else "kl"
        stats = linear_logprob(
            hidden, weight, None, bias=bias, temperature=temperature, softcap=ours[1], logit_scale=ours[0],
            ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias, outputs=(divergence, "entropy"),
            differentiable=(divergence,))  # fmt: skip
        return getattr(stats, divergence), stats.entropy


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """log softmax(logits / temperature) at index: `trl.trainer.utils.selective_log_softmax`.

    logits    (..., V)
    index     (...), one column per row, or (..., K), K of them; integers
    row_mask  index's shape; what is 0 there gives 0 and no gradient, and its index is not looked at where there is one per row
    returns   index's shape; float32 (float64 for float64 logits), as TRL's Triton kernel gives; its torch code gives 16-bit
              results for 16-bit logits

    Raises what logits_logprob raises; IndexError for an index outside the vocabulary, on a CPU.
    """
    if index.dim() == logits.dim() - 1:
        return _one_per_row(logits, index, temperature, row_mask, ("logprob",), None).logprob
    lse = logits_logprob(logits, None, temperature=temperature, outputs=("lse",)).lse
    chosen = logits.gather(-1, index.long()).to(lse.dtype) / temperature - lse[..., None]
    return chosen if row_mask is None else chosen.masked_fill(row_mask == 0, 0)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """-sum p log p, p = softmax(logits): `trl.trainer.utils.entropy_from_logits`.

    logits (..., V) -> (...), float32 (float64 for float64), differentiable. chunk_size is TRL's tile of rows: nothing here is
    as large as the logits, whatever it is.
    """
    return logits_logprob(logits, None, outputs=("entropy",)).entropy


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob at index and entropy of softmax(logits / temperature), in one pass over the logits.

    `trl.trainer.utils.selective_log_softmax_and_entropy`. logits (..., V); index and row_mask (...), as above -> two of (...),
    float32 (float64 for float64), 0 where row_mask is; the entropy without gradient unless entropy_requires_grad.
    """
    wanted = None if entropy_requires_grad else ("logprob",)
    stats = _one_per_row(logits, index, temperature, row_mask, ("logprob", "entropy"), wanted)
    return stats.logprob, stats.entropy


def _one_per_row(logits, index, temperature, row_mask, outputs, differentiable):
    targets = index.long()
    if row_mask is not None:
        targets = targets.masked_fill(row_mask == 0, -100)
    return logits_logprob(
        logits, targets, temperature=temperature, outputs=outputs, differentiable=differentiable
    )


def unmasked_rows_alone(device: torch.device) -> bool:
    """Where TRL asks whether there is Triton, to choose whether its fused head takes masked rows out before it scores.

    Without Triton it scores prompts and padding as well, to keep the shapes of its tiles. The kernels here take any number of
    rows, so they are always left out.
    """
    return True


REPLACEMENTS = (
    Replacement("trl.kernels.chunked_logprob", "ChunkedLogProbFunction", ChunkedLogProbFunction),
    Replacement("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction", ChunkedDivergenceFunction),
    Replacement("trl.trainer.utils", "selective_log_softmax", selective_log_softmax),
    Replacement("trl.trainer.utils", "entropy_from_logits", entropy_from_logits),
    Replacement("trl.trainer.utils", "selective_log_softmax_and_entropy", selective_log_softmax_and_entropy),
    Replacement("trl.trainer.utils", "_use_triton", unmasked_rows_alone,
                only=("trl.trainer.utils", "trl.trainer.distillation_trainer")),
)  # fmt: skip


@contextlib.contextmanager
def patch_trl(*, skip: Collection[str] = (), allow_untested: bool = False) -> Iterator[None]:
    """TRL computes log-probs, entropies and divergences with clp_kernels in the block; undone at its end, also by an exception.

    skip            names that stay TRL's own: ChunkedLogProbFunction, ChunkedDivergenceFunction, selective_log_softmax,
                    entropy_from_logits, selective_log_softmax_and_entropy, and _use_triton (see `unmasked_rows_alone`)
    allow_untested  try another version than those in TESTED

    Blocks may be nested. Trainers made before or in the block are both served: TRL looks the functions up at each call.

    Raises RuntimeError for a version of TRL this was not tested with, ImportError where it is missing.
    """
    with patched("patch_trl", "trl", TESTED, REPLACEMENTS, skip, allow_untested):
        yield
