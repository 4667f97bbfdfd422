"""The weight of each token in the loss, by `loss_type`."""

from __future__ import annotations

import torch

LOSS_TYPES = ("sequence", "grpo", "dapo", "dr_grpo")


@torch.no_grad()
def loss_weights(
    mask: torch.Tensor, loss_type: str = "sequence", max_completion_length: int | None = None
) -> torch.Tensor:
    """Weight of each token's term in the loss: (B, T) float32, 0 outside the mask.

    With n_b the tokens of row b that count:

        sequence   1 / B                            sum over a sequence, averaged over rows: unbiased for J
        grpo       1 / (B * n_b)                    mean over a sequence, averaged over rows
        dapo       1 / sum_b n_b                    mean over all tokens of the batch
        dr_grpo    1 / (B * max_completion_length)  `sequence` divided by a constant

    `sequence` and `dr_grpo` weigh every token of every row alike and so have the direction of the gradient
    of J. `grpo` gives a token of a long completion less: among good completions it prefers short ones,
    among bad ones long ones. `dapo` keeps the tokens equal within a batch, but its factor depends on the
    lengths that were sampled in the batch.

    The batch is that of a whole optimiser step: compute the weights once, then cut them into micro-batches.
    Raises ValueError for an unknown type, or dr_grpo without max_completion_length.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r}: expected one of {', '.join(LOSS_TYPES)}")
    weights = mask.float()
    lengths = weights.sum(-1, keepdim=True)
    if loss_type == "sequence":
        return weights / mask.shape[0]
    if loss_type == "grpo":
        return weights / (mask.shape[0] * lengths.clamp_min(1))
    if loss_type == "dapo":
        return weights / lengths.sum().clamp_min(1)
    if not max_completion_length or max_completion_length < 0:
        raise ValueError(f"loss_type='dr_grpo' divides by max_completion_length; got {max_completion_length}")
    return weights / (mask.shape[0] * max_completion_length)
