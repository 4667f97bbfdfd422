"""A user's own engine: TRL's `rollout_func`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from clp_engine.core.errors import ConfigError, shown
from clp_engine.data.prompts import TAKEN
from clp_engine.rollouts.engines.whole import of_lists
from clp_engine.rollouts.rows import stop_criteria
from clp_engine.rollouts.types import Rollout, RolloutRequest, pad_left
from clp_engine.training.settings.config import CLPConfig

if TYPE_CHECKING:
    from clp_engine.policy.policy import ConditionedPolicy

NAME = "rollout_func"
_NEEDED = ("prompt_ids", "completion_ids", "logprobs")
_NOT_HERE = "logprob_token_ids"


class RolloutFunction:
    """A `RolloutEngine` that calls `function(prompts, trainer)`, which returns a dict with one entry for each prompt:

    prompt_ids        tokens that the completion was drawn after; equal for the completions of one prompt
    completion_ids    tokens, with the end token, at most max_completion_length
    logprobs          of each token as it was drawn (a number, or a list that begins with it); None or NaN where it is unknown
    env_mask          1 for each token that the policy wrote, 0 for one that an environment wrote; optional
    others            columns for the reward functions: one value for each completion, or one for all

    prompts: as the dataset has them, each num_generations times in succession; of this process.
    While the function runs, `trainer.rollout_request` is the request: its `conditions` and `blend`, one row for each prompt of
    the dataset (not repeated), `row_seeds` and `sampling`.

    Raises ConfigError for another form of answer.
    """

    def __init__(self, function: Callable, policy: ConditionedPolicy, a: CLPConfig, trainer: Any):
        if not callable(function):
            raise ConfigError(f"rollout_func={shown(function)}: expected a function of (prompts, trainer)")
        if policy.conditioning.prompt:
            raise ConfigError(
                "rollout_func writes its own prompts, and conditioning 'prompt' writes the weighting into them; use another "
                "conditioning"
            )
        if a.partial_rollouts:
            raise ConfigError(
                "rollout_func draws whole completions, and partial_rollouts goes on with them; leave it out"
            )
        self._function, self._policy, self._trainer = function, policy, trainer
        self._length = a.max_completion_length

    def run(self, request: RolloutRequest) -> Rollout:
        assert request.prompts is not None  # of a trainer's rollouts
        rows = [prompt for prompt in request.prompts for _ in range(request.group)]
        self._trainer.rollout_request = request
        try:
            answer = self._function(rows, self._trainer)
        finally:
            self._trainer.rollout_request = None
        if not isinstance(answer, Mapping) or (missing := [n for n in _NEEDED if n not in answer]):
            lacks = "no dict" if not isinstance(answer, Mapping) else f"no {', '.join(missing)}"
            raise ConfigError(f"rollout_func returned {lacks}; expected a dict with {', '.join(_NEEDED)}")
        columns = {
            name: values for name, values in answer.items() if name not in (*_NEEDED, _NOT_HERE, "env_mask")
        }
        tokens = self._tokens("completion_ids", answer["completion_ids"], len(rows))
        request = self._with_prompts(request, self._tokens("prompt_ids", answer["prompt_ids"], len(rows)))
        logprobs = _of_tokens("logprobs", answer["logprobs"], tokens, math.nan)
        stops = set(self._policy.stop_token_ids)
        texts = stop_criteria(self._policy.tokenizer, request.sampling.stop_strings)
        ended = [
            row[-1] in stops or texts is not None and bool(texts(torch.tensor([row]), None)[0])
            for row in tokens
        ]
        drawn = of_lists(request, tokens, logprobs, ended, NAME)
        if (mask := answer.get("env_mask")) is not None:
            flags = _of_tokens("env_mask", mask, tokens, 1)
            if (silent := next((i for i, row in enumerate(flags) if not any(row)), None)) is not None:
                raise ConfigError(
                    f"rollout_func: env_mask[{silent}] is 0 for every token; the policy has to write at least one of each "
                    "completion"
                )
            written = torch.zeros_like(drawn.completion_mask)
            for row, values in enumerate(flags):
                written[row, : len(values)] = torch.tensor(values, dtype=torch.bool)
            drawn = replace(drawn, written=written)
        return replace(drawn, columns=_columns(columns, len(rows)))

    def _tokens(self, name: str, given: Any, rows: int) -> list[list[int]]:
        if len(given) != rows:
            raise ConfigError(
                f"rollout_func returned {len(given)} {name} for {rows} prompts; expected one for each, a prompt that is there "
                "several times included"
            )
        found = [[int(token) for token in row] for row in given]
        for i, row in enumerate(found):
            if not row or name == "completion_ids" and len(row) > self._length:
                raise ConfigError(
                    f"rollout_func: {name}[{i}] has {len(row)} tokens; expected at least one"
                    + (
                        f", at most max_completion_length = {self._length}"
                        if name == "completion_ids"
                        else ""
                    )
                )
            self._policy.room.check_ids(
                [min(row), max(row)], f"rollout_func: {name}[{i}]", self._policy.tokenizer
            )
        return found

    def _with_prompts(self, request: RolloutRequest, of_rows: list[list[int]]) -> RolloutRequest:
        """The request with the prompts that the completions were drawn after."""
        own = of_rows[:: request.group]
        for i, ids in enumerate(of_rows):
            if ids != own[i // request.group]:
                raise ConfigError(
                    f"rollout_func: prompt_ids[{i}] differ from those of the same prompt's other completions; a group has one "
                    "prompt (what an environment adds for one of them belongs into completion_ids, with env_mask 0)"
                )
        for i, ids in enumerate(own):
            self._policy.room.check_prompt(
                ids, self._length, f"rollout_func: prompt {i}", self._policy.tokenizer
            )
        ids, mask = pad_left(own, request.source.profile.pad_token_id, request.prompt_ids.device)
        return replace(request, prompt_ids=ids, prompt_mask=mask)


def _of_tokens(name: str, given: Any, tokens: Sequence[Sequence[int]], unknown: float) -> list[list[float]]:
    """A number for each token. A list in its place begins with it (TRL's, of the likeliest tokens); None is `unknown`."""
    if given is None:
        return [[unknown] * len(row) for row in tokens]
    if len(given) != len(tokens) or any(
        row is not None and len(row) != len(ids) for row, ids in zip(given, tokens)
    ):
        raise ConfigError(f"rollout_func: {name} must have an entry for each token of completion_ids")

    def number(value: Any) -> float:
        if isinstance(value, Sequence):
            value = value[0] if value else None
        return unknown if value is None else float(value)

    return [
        [unknown] * len(ids) if row is None else [number(value) for value in row]
        for row, ids in zip(given, tokens)
    ]


def _columns(given: Mapping[str, Any], rows: int) -> dict[str, list]:
    found = {}
    for name, values in given.items():
        if name in TAKEN:
            raise ConfigError(
                f"rollout_func: reward functions get {name!r} of the trainer; give the column another name"
            )
        if hasattr(values, "tolist"):  # an array, or a tensor
            values = values.tolist()
        values = (
            list(values) if isinstance(values, Sequence) and not isinstance(values, str | bytes) else values
        )
        if isinstance(values, list) and len(values) != rows:
            raise ConfigError(
                f"rollout_func: column {name!r} has {len(values)} values for {rows} completions; expected one for each, or "
                "one for all that is no sequence"
            )
        found[name] = values if isinstance(values, list) else [values] * rows
    return found
