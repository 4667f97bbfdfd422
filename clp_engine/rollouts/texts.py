"""Completions of texts as texts: encode prompts, draw completions, decode them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from clp_engine.core import ranges
from clp_engine.core.errors import ConfigError
from clp_engine.data.prompts import encode_prompts
from clp_engine.rollouts.rollout import rollout
from clp_engine.rollouts.types import Samplable, SamplingParams


def generate(
    source: Samplable,
    prompts: str | Sequence,
    weights=None,
    kl=None,
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop_strings: Sequence[str] = (),
    num_return_sequences: int = 1,
    max_rows: int | None = None,
    seed: int = 0,
) -> list:
    """Completions of prompts, each under its own weighting, from a policy or a mixture.

    prompts: a text or a chat (a list of messages), or a list of either.
    weights, kl: one for all prompts or one per prompt (see `conditions`).
    stop_strings: texts that end a completion.
    max_rows: the most completions decoded at once, see `rollout`.

    Returns one string per prompt or, for num_return_sequences > 1, one list of strings per prompt. Any thread may call this.
    Calls run one after another.
    """
    profile = source.profile
    if profile.tokenizer is None:
        raise ConfigError("this policy has no tokenizer; give one to from_pretrained(tokenizer=...)")
    ranges.check(ranges.GENERATION, num_return_sequences=num_return_sequences, seed=seed)
    if max_rows is not None:
        ranges.check(ranges.GENERATION, max_rows=max_rows)
    one = isinstance(prompts, str) or bool(prompts) and isinstance(prompts[0], Mapping)
    prompts = [prompts] if one else list(prompts)
    if not prompts:
        return []
    encoded = encode_prompts(prompts, profile.tokenizer)
    drawn = rollout(
        source,
        encoded,
        source.conditions(weights, kl, len(prompts)),
        num_generations=num_return_sequences,
        sampling=SamplingParams(max_new_tokens, temperature, top_k, top_p, min_p, stop_strings),
        seed=seed,
        prompts=prompts,
        max_rows=max_rows,
    )
    said = profile.tokenizer.batch_decode(drawn.token_lists(), skip_special_tokens=True)
    if num_return_sequences == 1:
        return said
    return [said[i : i + num_return_sequences] for i in range(0, len(said), num_return_sequences)]
