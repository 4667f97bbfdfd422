"""What is asked of vLLM, and what comes back: the words that `VllmEngine` and the two ways to vLLM share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from clp_engine.core.seeds import derive
from clp_engine.rollouts.engines.vllm.stacks import Stack
from clp_engine.rollouts.types import RolloutRequest, SamplingParams


@dataclass(frozen=True)
class Draw:
    """One completion to draw. prompt: its tokens. clp: weights and KL coefficient as the plug-in takes them, None for the base
    model. seed: at least 0."""

    prompt: list[int]
    clp: dict[str, Any] | None
    seed: int


@dataclass(frozen=True)
class Drawn:
    """A completion: its tokens with the end token, their log-probs as they were drawn, and whether it ended by itself."""

    tokens: list[int]
    logprobs: list[float]
    ended: bool


class Vllm(Protocol):
    """A way to vLLM. Where several processes draw, one of them loads and unloads, and all complete."""

    def load(self, stack: Stack) -> None:
        """Serve a stack. Raises ConfigError where vLLM refuses it, and DrawingFailed where vLLM does not answer."""

    def unload(self, stack: Stack) -> None: ...

    def complete(self, draws: Sequence[Draw], options: dict[str, Any], stack: Stack) -> list[Drawn]:
        """options: of all draws, see `options_of`. Raises as `load`."""

    def close(self, stack: Stack | None) -> None:
        """Give back what vLLM holds of this process, the stack among it. The next `load` starts anew."""


def draws_of(request: RolloutRequest) -> list[Draw]:
    """The draws of a request, one for each completion.

    A completion that goes on draws from a stream of its own: vLLM begins a seed's stream anew with every request.
    """
    blend = request.blend
    moved = [False] * len(request.conditions) if blend is None else blend.any(-1).tolist()
    lengths = request.prompt_mask.sum(-1).tolist()
    begun = [0] * len(lengths) if request.begun is None else [len(tokens) for tokens in request.begun]
    seeds = request.row_seeds.view(-1, request.group).cpu()
    draws = []
    for i, (ids, length) in enumerate(zip(request.prompt_ids.tolist(), lengths)):
        condition = request.conditions[i : i + 1]
        clp = {"weights": condition.weights[0].tolist(), "kl": condition.kl[0].item()} if moved[i] else None
        own = derive(seeds[i], begun[i]) if begun[i] else seeds[i]
        draws += [Draw(ids[len(ids) - length :], clp, seed & (2**63 - 1)) for seed in own.tolist()]
    return draws


def parameters_of(sampling: SamplingParams) -> dict[str, Any]:
    """Parameters of vLLM that say how a token is drawn, all of them, so that no generation config adds its own."""
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or 0,
        "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
        "min_p": sampling.min_p or 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def options_of(sampling: SamplingParams, stop_token_ids: Sequence[int]) -> dict[str, Any]:
    """Parameters of vLLM for completions that are trained on. The policy's end tokens end one."""
    return parameters_of(sampling) | {
        "stop": list(sampling.stop_strings),
        "stop_token_ids": list(stop_token_ids),
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs": 0,
    }
