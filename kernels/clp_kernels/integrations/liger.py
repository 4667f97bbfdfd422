"""Liger's fused linear GRPO loss on clp_kernels, and `patch_liger`.

Liger goes through the batch a few sequences at a time and computes the gradients of each in the forward pass, from log-probs of
every position. Here one call scores the unmasked positions of the whole batch, the loss is `grpo_objective`'s, and backward is
autograd's, so that a forward without gradients costs no backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from clp_kernels.integrations.grpo_objective import GRPOObjective
from clp_kernels.integrations.heads import compute_dtype, head_as, refuse_partitioned
from clp_kernels.integrations.patching import Replacement, patched
from clp_kernels.linear_logprob import linear_logprob

TESTED = ("0.8.5",)
_CALLER = "LigerFusedLinearGRPOFunction"


class LigerFusedLinearGRPOFunction:
    """Stands for the class of that name in `liger_kernel.chunked_loss.grpo_loss`, of which `apply` alone is called."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        beta: float = 0.04,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        vllm_is_ratio: Tensor | None = None,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """-> loss (), float32, and its metrics: the mean KL where beta is not 0, the share of clipped tokens (see
        `GRPOObjective`, whose formulas the options from beta on belong to).

        _input              (B, T, H); weight (V, H), bias (V,) or None, cast to its dtype, or to autocast's
        selected_token_ids  (B, T) int64, looked at where attention_mask (B, T) is not 0; advantages (B,)
        ref_input           (B, T, H'), ref_weight (V, H'), ref_bias: the reference, scored in the same pass where beta is not
                            0, use_ref_model is set and ref_per_token_logps (B, T) is not given
        temperature         of policy and reference
        compiled, chunk_size
                            how Liger computes it; they change nothing here

        Gradients reach _input, weight and bias, the head's only where it is trained.

        Raises ValueError for a combination of options without meaning, for a reference that beta needs and that is missing, and
        for what linear_logprob refuses; RuntimeError for DeepSpeed ZeRO-3 parameters.
        """
        objective = GRPOObjective(
            loss_type, beta, epsilon_low, epsilon_high, delta, importance_sampling_level, max_completion_length,
            use_bias_correction_kl, sapo_temperature_pos, sapo_temperature_neg, vespo_k_pos, vespo_lambda_pos,
            vespo_k_neg, vespo_lambda_neg)  # fmt: skip
        refuse_partitioned(_CALLER, weight)
        given = ref_per_token_logps if use_ref_model else None
        score_reference = use_ref_model and beta != 0 and given is None
        if score_reference and ref_input is None:
            raise ValueError(
                f"{_CALLER}: use_ref_model is set, beta is {beta}, and neither ref_per_token_logps nor ref_input is given; "
                "expected one of them, or use_ref_model=False"
            )
        # luspo takes the mean over padding too.
        rows = (
            torch.ones_like(attention_mask, dtype=torch.bool) if loss_type == "luspo" else attention_mask != 0
        )
        dtype = compute_dtype(_input)
        if score_reference:
            dtype = torch.promote_types(dtype, compute_dtype(ref_input))
        hidden, weight, bias = head_as(dtype, _input[rows], weight, bias)
        outputs, reference = ["logprob"], {}
        if score_reference:
            ref_hidden, ref_weight, ref_bias = head_as(dtype, ref_input[rows], ref_weight, ref_bias)
            if bias is not None and ref_bias is None:
                ref_bias = torch.zeros_like(bias)  # None would stand for the policy's
            outputs.append("ref_logprob")
            reference = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
        stats = linear_logprob(
            hidden,
            weight,
            selected_token_ids[rows].long(),
            bias=bias,
            temperature=temperature,
            outputs=outputs,
            **reference,
        )

        def spread(values: Tensor) -> Tensor:
            return values.new_zeros(rows.shape).masked_scatter(rows, values)

        def unmasked(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.masked_fill(~rows, 0)

        return objective(
            spread(stats.logprob), attention_mask, advantages, old_logprob=unmasked(old_per_token_logps),
            ref_logprob=spread(stats.ref_logprob) if score_reference else unmasked(given),
            vllm_is_ratio=vllm_is_ratio, num_items_in_batch=num_items_in_batch)  # fmt: skip


def liger_fused_linear_grpo(*arguments, **options) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`LigerFusedLinearGRPOFunction.apply`: `liger_kernel.chunked_loss.functional.liger_fused_linear_grpo`."""
    return LigerFusedLinearGRPOFunction.apply(*arguments, **options)


REPLACEMENTS = (
    Replacement("liger_kernel.chunked_loss.grpo_loss", _CALLER, LigerFusedLinearGRPOFunction),
    Replacement("liger_kernel.chunked_loss.functional", "liger_fused_linear_grpo", liger_fused_linear_grpo),
)


@contextlib.contextmanager
def patch_liger(*, skip: Collection[str] = (), allow_untested: bool = False) -> Iterator[None]:
    """`LigerFusedLinearGRPOLoss` is computed with clp_kernels in the block; undone at its end, also by an exception.

    skip            names that stay Liger's own: LigerFusedLinearGRPOFunction, liger_fused_linear_grpo
    allow_untested  try another version than those in TESTED

    Blocks may be nested; a loss module made before serves too, as it looks the function up at each call.

    Raises RuntimeError for a version of Liger this was not tested with, ImportError where it is missing.
    """
    with patched("patch_liger", "liger_kernel", TESTED, REPLACEMENTS, skip, allow_untested):
        yield
