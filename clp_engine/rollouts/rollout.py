"""Sampling completions: one prompt prefill per group, keys and values in buffers allocated once, finished rows dropped.

Rows of one batch may have different conditions; a row whose weights are all zero is the base model. The log-prob of each
token is kept as it was sampled, and row i of prompt p draws from a seed of its own, so that what a row says does not
depend on what else is in the batch, or on when it joined.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from clp_engine.core.conditions import Conditions
from clp_engine.core.seeds import derive
from clp_engine.core.sizes import BOOKKEEPING, check_size
from clp_engine.rollouts.engines.modules import Decoding
from clp_engine.rollouts.engines.native import NativeDecoding
from clp_engine.rollouts.rows import Drawing
from clp_engine.rollouts.types import Rollout, SamplingParams, pad_left

if TYPE_CHECKING:
    from clp_engine.policy.policy import ConditionedPolicy

# Buffers of decoding belong to a policy: threads that draw from the same one take turns.
_TURNS: weakref.WeakKeyDictionary[ConditionedPolicy, threading.RLock] = weakref.WeakKeyDictionary()

# Steps between looks at who has ended, where looking makes the host wait for the device.
_LOOK_EVERY = 8


@torch.no_grad()
def rollout(
    policy: ConditionedPolicy,
    prompt_ids: Sequence[Sequence[int]],
    conditions: Conditions,
    *,
    num_generations: int = 1,
    sampling: SamplingParams | None = None,
    seed: int = 0,
    row_seeds: torch.Tensor | None = None,
    prompts: Sequence | None = None,
    max_rows: int | None = None,
    begun: Sequence[Sequence[int]] | None = None,
) -> Rollout:
    """Draw `num_generations` completions of each of P prompts, each prompt under its own condition.

    conditions: P rows. row_seeds: (P * num_generations,) int64, one stream of random numbers per completion; by default
    derived from `seed` and the completion's index. Equal row seeds give common random numbers. prompts: what prompt_ids were
    made from, where prompt conditioning has to find its place in chat messages. max_rows: completions that are decoded at
    once (at least a group); prompts wait and take the places of completions that have ended, so that a long one holds up
    nobody. None is all at once.

    begun: of the one completion of each prompt (num_generations=1), the tokens that are there already. It goes on after them,
    read as a part of the prompt, with the random numbers of the positions that follow; only what follows is returned.

    Any thread may call this; calls for one policy run one after another.
    """
    sampling = sampling or SamplingParams()
    if len(conditions) != len(prompt_ids):
        raise ValueError(
            f"conditions has {len(conditions)} rows for {len(prompt_ids)} prompts; expected one per prompt"
        )
    rows = len(prompt_ids) * num_generations
    check_size(
        f"{rows:,} completions of up to {sampling.max_new_tokens:,} tokens",
        rows * sampling.max_new_tokens * BOOKKEEPING,
        policy.device,
    )
    if begun is not None and num_generations != 1:
        raise ValueError(f"begun continues one completion per prompt; got num_generations={num_generations}")
    device = policy.device
    shown = policy.shown_prompts(prompt_ids, conditions, prompts)
    for i, ids in enumerate(prompt_ids if shown is None else shown):
        policy.room.check_prompt(ids, sampling.max_new_tokens, f"prompt {i}", policy.tokenizer)
    policy.room.check_ids([policy.pad_token_id], "padding", policy.tokenizer)
    if begun is not None:
        shown, prompt_ids = (
            None if ids is None else [[*prompt, *tokens] for prompt, tokens in zip(ids, begun, strict=True)]
            for ids in (shown, prompt_ids)
        )
    plain = pad_left(prompt_ids, policy.pad_token_id, device)
    read_ids, read_mask = plain if shown is None else pad_left(shown, policy.pad_token_id, device)
    if row_seeds is None:
        row_seeds = derive(seed, torch.arange(rows))
    drawing = Drawing(policy, sampling, row_seeds.to(device), begun)
    with _TURNS.setdefault(policy, threading.RLock()):
        if policy.shares_prompts:
            at_once = len(prompt_ids) if max_rows is None else max(1, max_rows // num_generations)
            decoding = policy.decoding(
                read_ids, read_mask, conditions, num_generations, sampling.max_new_tokens, at_once
            )
            _decode(drawing, decoding, len(prompt_ids), num_generations)
        else:
            _generate(drawing, policy, read_ids, read_mask, conditions, num_generations)

    tokens, mask, logprobs, terminated = drawing.completions()
    return Rollout(
        read_ids, read_mask, tokens, mask, logprobs, terminated, *((None, None) if shown is None else plain)
    )


def _decode(drawing: Drawing, decoding: Decoding, prompts: int, group: int) -> None:
    """Every completion of every prompt, as places come free."""
    device = drawing.running.device
    every = 1 if device.type == "cpu" else _LOOK_EVERY
    logits, waiting = None, 0  # the first prompt that has not joined
    left = 0  # steps after which whoever is in the batch has ended, whatever it says
    while True:
        if waiting < prompts and (places := decoding.places):
            stop = min(prompts, waiting + places)
            first = decoding.add(slice(waiting, stop))
            logits = first if logits is None else torch.cat([logits, first])
            drawing.join(torch.arange(waiting * group, stop * group, device=device))
            waiting, left = stop, drawing.limit
        if isinstance(decoding, NativeDecoding) and not drawing.reads_text:
            logits = drawing.hand_to(decoding, logits, waiting < prompts)
            if len(logits) == 0 and waiting == prompts:
                return
            continue
        drawn = drawing.draw(logits)
        left -= 1
        if left % every == 0:
            finished = int(drawing.done.sum())  # the host waits for the device here
            if finished == len(drawn) and waiting == prompts:
                return
            if finished and finished >= decoding.drop_share * len(drawn):
                keep = (~drawing.done).nonzero().squeeze(-1)
                decoding.keep(keep)
                drawing.keep(keep)
                drawn = drawn[keep]
        logits = decoding.step(drawn) if len(drawn) else None


def _generate(
    drawing: Drawing,
    policy: ConditionedPolicy,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    conditions: Conditions,
    group: int,
) -> None:
    """Every completion by transformers' generate, prompt after prompt: nothing is padded, whatever the model makes of it."""
    blend = policy.coefficients(conditions)
    for p in range(len(prompt_ids)):
        rows = torch.arange(p * group, (p + 1) * group, device=prompt_ids.device)
        drawing.keep(rows[:0])
        drawing.join(rows)

        def draw(logits: torch.Tensor) -> tuple[torch.Tensor, bool]:
            drawn = drawing.draw(logits)
            return drawn, bool(drawing.done.all())

        with policy.blend.use(None if blend is None else blend[p : p + 1].expand(group, -1)):
            policy.backbone.generate(prompt_ids[p : p + 1, prompt_mask[p]], group, drawing.limit, draw)
