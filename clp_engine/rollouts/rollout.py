"""Sampling completions: one prefill per group, keys and values in buffers allocated once, finished rows dropped.

Rows of one batch may have different conditions. A row whose weights are all zero is the base model. The log-prob of each token
is kept from sampling. Row i of prompt p draws from a seed of its own, so that a row's tokens do not depend on the other rows of
the batch, or on when the row joined.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Sequence

import torch

from clp_engine.core.conditions import Conditions
from clp_engine.core.seeds import derive
from clp_engine.core.sizes import BOOKKEEPING, check_size
from clp_engine.models.conditioned import ConditionedModel
from clp_engine.rollouts.engines.choice import engine_of
from clp_engine.rollouts.types import (
    OWN_ENGINE,
    Rollout,
    RolloutEngine,
    RolloutRequest,
    Samplable,
    SamplingParams,
    pad_left,
)

# The decoding buffers belong to a model, so threads that draw from the same model take turns.
_TURNS: weakref.WeakKeyDictionary[ConditionedModel, threading.RLock] = weakref.WeakKeyDictionary()


@torch.no_grad()
def rollout(
    source: Samplable,
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
    engine: RolloutEngine | None = None,
) -> Rollout:
    """Draw `num_generations` completions of each of P prompts from a policy or a mixture, each prompt under its own condition.

    conditions: P rows.
    row_seeds: (P * num_generations,) int64, one stream of random numbers per completion. By default they are derived from
        `seed` and the completion's index. Equal row seeds give common random numbers.
    prompts: the texts or chats that prompt_ids were made from. Prompt conditioning needs them for chat messages.
    max_rows: the most completions decoded at once (at least a group). Further prompts wait, and take the places of completions
        that have ended, so that one long completion delays no other. None decodes all at once.
    begun: the existing tokens of the one completion of each prompt (num_generations=1). They are read as a part of the prompt,
        and the completion continues after them, with the random numbers of its later positions. Only new tokens are returned.
    engine: the engine that draws. By default the source's own, or the fastest that serves its model (`engines.choice`).

    Any thread may call this. Calls for one model run one after another.
    """
    sampling, model, profile = sampling or SamplingParams(), source.conditioned, source.profile
    if len(conditions) != len(prompt_ids):
        raise ValueError(
            f"conditions has {len(conditions)} rows for {len(prompt_ids)} prompts; expected one per prompt"
        )
    rows = len(prompt_ids) * num_generations
    check_size(
        f"{rows:,} completions of up to {sampling.max_new_tokens:,} tokens",
        rows * sampling.max_new_tokens * BOOKKEEPING,
        model.device,
    )
    if begun is not None and num_generations != 1:
        raise ValueError(f"begun continues one completion per prompt; got num_generations={num_generations}")
    shown = source.shown_prompts(prompt_ids, conditions, prompts)
    for i, ids in enumerate(prompt_ids if shown is None else shown):
        profile.room.check_prompt(ids, sampling.max_new_tokens, f"prompt {i}", profile.tokenizer)
    profile.room.check_ids([profile.pad_token_id], "padding", profile.tokenizer)
    if begun is not None:
        shown, prompt_ids = (
            None if ids is None else [[*prompt, *tokens] for prompt, tokens in zip(ids, begun, strict=True)]
            for ids in (shown, prompt_ids)
        )
    plain = pad_left(prompt_ids, profile.pad_token_id, model.device)
    request = RolloutRequest(
        source,
        conditions,
        *(plain if shown is None else pad_left(shown, profile.pad_token_id, model.device)),
        None if shown is None else plain,
        num_generations,
        sampling,
        derive(seed, torch.arange(rows)) if row_seeds is None else row_seeds,
        begun,
        len(prompt_ids) if max_rows is None else max(1, max_rows // num_generations),
        prompts,
    )
    with _TURNS.setdefault(model, threading.RLock()):
        drawn = (engine or engine_of(source)).run(request)
    return drawn if drawn.engine == OWN_ENGINE else dataclasses.replace(drawn, sampled=drawn.logprobs)
