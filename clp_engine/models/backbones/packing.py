"""Groups of completions packed into one row of tokens, with every token once and without padding.

    [ prompt 1 | completion 1.1 | completion 1.2 | ... | prompt 2 | completion 2.1 | ... ]

A completion attends to its prompt and to itself (`clp_kernels.prefix_attention`). A prompt is therefore computed once for its
whole group, forward and backward, in one pass through the model together with all other tokens. Positions restart at each
prompt, and each completion continues its prompt's positions. The last token of a completion predicts nothing and is left out.

transformers' models look up their attention function by name in a registry. `shared_prefix` is registered there as NAME. It
attends over the layout in force (`attending`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from clp_kernels import PrefixLayout, prefix_attention
from transformers import AttentionInterface

NAME = "clp_shared_prefix"
_layout: ContextVar[PrefixLayout | None] = ContextVar("layout", default=None)


@dataclass(frozen=True)
class Packed:
    """N tokens of P prompts and their completions, and the predictors of M completion tokens.

    ids, positions: (N,) int64. layout: which tokens attend to which.
    prompts: (N,) int64, the prompt of each token, 0 to P - 1.
    predictors: (M,) int64, the token whose hidden state predicts each completion token, completion after completion.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    layout: PrefixLayout
    prompts: torch.Tensor
    predictors: torch.Tensor


def pack(
    prompt_ids: torch.Tensor,
    prompt_lengths: torch.Tensor,
    completion_ids: torch.Tensor,
    predicted: torch.Tensor,
) -> Packed:
    """Pack completions (B, T) of prompts (P, S), B / P each. Prompts are left-padded, completions right-padded.

    prompt_lengths: (P,), on the host. predicted: (B,), on the host, the number of tokens of each completion, from its first
        one on, that are to be predicted. A completion with none is left out.
    """
    device = prompt_ids.device
    (prompts, width), (rows, room) = prompt_ids.shape, completion_ids.shape
    group = rows // prompts
    # Lengths of the sequences in the order of the pack: (P, 1 + group), flattened.
    lengths = torch.cat(
        [prompt_lengths.unsqueeze(1), (predicted - 1).clamp_min(0).view(prompts, group)], 1
    ).flatten()
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    parents = torch.arange(prompts).mul(1 + group).repeat_interleave(1 + group)
    is_prompt = torch.arange(len(lengths)) == parents
    layout = PrefixLayout(starts, torch.where(is_prompt, -1, parents))

    # The start of each sequence in [prompt_ids, completion_ids], both flattened.
    source = torch.cat(
        [
            (torch.arange(1, prompts + 1) * width - prompt_lengths).unsqueeze(1),
            (prompts * width + torch.arange(rows) * room).view(prompts, group),
        ],
        1,
    ).flatten()
    total = int(starts[-1])
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths, output_size=total)
    within = torch.arange(total) - starts[sequence]
    positions = within + torch.where(is_prompt, 0, lengths[parents])[sequence]

    # The last token of its prompt predicts token 0 of a completion. Token t - 1 predicts token t.
    row = torch.repeat_interleave(torch.arange(rows), predicted)
    step = torch.arange(len(row)) - (predicted.cumsum(0) - predicted)[row]
    own = row // group * (1 + group) + 1 + row % group
    predictors = torch.where(step == 0, starts[parents[own] + 1] - 1, starts[own] + step - 1)

    index = torch.stack([source[sequence] + within, positions, sequence // (1 + group)]).to(device)
    ids = torch.cat([prompt_ids.flatten(), completion_ids.flatten()])[index[0]]
    return Packed(ids, index[1], layout, index[2], predictors.to(device))


def join(first: Packed, second: Packed) -> Packed:
    """Both packs in one row. The prompts of `second` are numbered after those of `first`."""
    tokens, sequences = len(first.ids), len(first.layout.parents)
    behind = second.layout.parents
    return Packed(
        torch.cat([first.ids, second.ids]),
        torch.cat([first.positions, second.positions]),
        PrefixLayout(
            torch.cat([first.layout.starts, second.layout.starts[1:] + tokens]),
            torch.cat([first.layout.parents, torch.where(behind < 0, -1, behind + sequences)]),
        ),
        torch.cat([first.prompts, second.prompts + first.prompts[-1] + 1]),
        torch.cat([first.predictors, second.predictors + tokens]),
    )


@contextlib.contextmanager
def attending(layout: PrefixLayout | None) -> Iterator[None]:
    """Make `shared_prefix` attend over this layout inside the block."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def layout_in_force() -> PrefixLayout | None:
    return _layout.get()


def shared_prefix(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unknown,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over the layout in force.

    query (1, Hq, N, D), key and value (1, Hkv, N, D) -> ((1, N, Hq, D), None). Raises ValueError for dropout, masks, sinks,
    biases, and attention that is not causal.
    """
    odd = [name for name in ("s_aux", "sinks", "position_bias", "head_mask") if unknown.get(name) is not None]
    odd += ["attention_mask"] * (attention_mask is not None) + ["dropout"] * bool(dropout)
    causal = unknown.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        odd.append("attention that is not causal")
    layout = _layout.get()
    if odd or layout is None:
        raise ValueError(
            f"{NAME}: {', '.join(odd) if odd else 'no layout is in force'}; it attends causally over packed sequences "
            "only, inside `packing.attending`"
        )
    out = prefix_attention(
        *(t[0].transpose(0, 1) for t in (query, key, value)),
        layout,
        scale=scaling,
        softcap=softcap,
        window=sliding_window,
    )
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, shared_prefix)
