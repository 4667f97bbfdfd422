"""Decoding plans: made once for a model's weights, compared with transformers before their use, and kept."""

from __future__ import annotations

import os
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from clp_kernels.launch_errors import launch_errors
from torch import nn

from clp_engine.core.errors import ConfigError
from clp_engine.models.conditioned import ConditionedModel
from clp_engine.rollouts.engines.base import DecoderRequest
from clp_engine.rollouts.types import pad_left

# torch: transformers' modules for all models. native: an error if this project's own decoder cannot serve a model: on a CPU the
# one in C++, on a GPU the fused step in CUDA graphs.
SWITCH = "CLP_ENGINE_DECODING"


class Unsupported(Exception):
    """A model cannot be decoded by this project's own decoder. The message says why."""


class Planned(Protocol):
    """A plan with the identity of the base weights it was made for, or the reason why there is none."""

    identity: tuple
    reason: str | None


P = TypeVar("P", bound=Planned)


def insisted() -> bool:
    """Whether a model that this project's own decoder cannot serve is an error."""
    return os.environ.get(SWITCH, "") == "native"


def unless_refused(plan: Callable[[], P]) -> P | None:
    """The plan, or None if it has a reason against it or the switch asks for transformers' modules.

    Raises ConfigError for an unknown value of the switch, and for a reason that the switch makes an error.
    """
    switch = os.environ.get(SWITCH, "")
    if switch not in ("", "auto", "torch", "native"):
        raise ConfigError(f"{SWITCH}={switch}: expected torch, native or auto")
    if switch == "torch":
        return None
    made = plan()
    if made.reason is not None and insisted():
        raise ConfigError(f"{SWITCH}=native: {made.reason}")
    return made if made.reason is None else None


def current(
    plans: MutableMapping[nn.Module, P],
    model: ConditionedModel,
    identity: tuple,
    make: Callable[[ConditionedModel, tuple], P],
) -> P:
    """The model's plan. It is made anew if the identity of the base weights has changed."""
    kept = plans.get(model)
    if kept is None or kept.identity != identity:
        with torch.no_grad():
            kept = plans[model] = make(model, identity)
    return kept


def made_or_refused(model: ConditionedModel, make: Callable[[], P], refused: Callable[[str], P]) -> P:
    """The result of `make`, or `refused(reason)` if the model cannot be read. Transformers then decodes the model."""
    try:
        return make()
    except Unsupported as error:
        return refused(str(error))
    except (*launch_errors(), ValueError, TypeError, AttributeError) as error:
        return refused(f"{type(model.model).__name__}: {error}")


@dataclass(frozen=True)
class Trial:
    """Random prompts of different lengths with different blends, and random tokens, for comparing two decoders of a model.

    prompts: (ids, mask, blend), what a decoder adds. tokens: (rows,) for each step.
    """

    request: DecoderRequest
    prompts: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    tokens: list[torch.Tensor]

    @classmethod
    def of(cls, model: ConditionedModel) -> Trial:
        generator, device = torch.Generator(device="cpu").manual_seed(0), model.device
        vocab, steps, group = model.model.config.get_text_config().vocab_size, 3, 2

        def drawn(count: int) -> torch.Tensor:
            return torch.randint(vocab, (count,), generator=generator, device="cpu")

        prompts = [drawn(length).tolist() for length in (3, 7, 5)]
        blend = torch.rand(len(prompts), model.deltas, generator=generator, device="cpu")
        blend[0] = 0
        ids, mask = pad_left(prompts, 0, device)
        request = DecoderRequest(model, True, ids.shape[1], group, steps, len(prompts))
        return cls(
            request,
            (ids, mask, blend.to(device)),
            [drawn(len(prompts) * group).to(device) for _ in range(steps)],
        )


def check_alike(
    model: ConditionedModel, given: torch.Tensor, expected: torch.Tensor, tolerance: float
) -> None:
    """Raises Unsupported if logits differ by more than `tolerance` times the largest logit, taken as at least 1."""
    given, expected = given.float(), expected.float()
    difference = (given - expected).abs().max().item()
    if not difference <= tolerance * max(1.0, expected.abs().max().item()):
        raise Unsupported(
            f"{type(model.model).__name__} looks like Llama and computes something else (its logits differ by "
            f"{difference:.3g})"
        )
