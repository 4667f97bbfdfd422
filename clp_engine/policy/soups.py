"""Rewarded Soups: one policy with the deltas of models that were fine-tuned one by one (Rame et al., 2023)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from clp_engine.core.errors import ConfigError
from clp_engine.models.base import same_weights
from clp_engine.policy.steerable import SteerableModel


def soup(
    kind: type[SteerableModel], specialists: Sequence[SteerableModel], objectives: Sequence[str] | None
) -> SteerableModel:
    """See `ConditionedPolicy.from_specialists`. kind: the class of the new policy."""
    if not specialists:
        raise ConfigError("no specialists were given; expected one per objective")
    first = specialists[0]
    objectives = tuple(first.objectives if objectives is None else objectives)
    if len(objectives) != len(specialists):
        raise ConfigError(
            f"{len(specialists)} specialists for {len(objectives)} objectives ({', '.join(objectives)}); expected one each"
        )
    for specialist in specialists:
        spec = specialist.spec
        if specialist.conditioning.blended or specialist.conditioning.prompt:
            raise ConfigError(f"a specialist has conditioning='none'; one of these has {spec.conditioning!r}")
        for name in ("base_model", "carrier", "kl_conditioning", "kl_is_beta"):
            ours, theirs = getattr(first.spec, name), getattr(spec, name)
            if ours != theirs:
                raise ConfigError(
                    "the specialists must have the same base model, carrier and form of the KL coefficient; "
                    f"{name} is {ours!r} and {theirs!r}"
                )
        if specialist.adapter_parameters().keys() != first.adapter_parameters().keys():
            raise ConfigError(
                "the specialists' deltas lie on different layers, or one has a whole output projection "
                "and another has factors"
            )
        if not spec.base_model and not same_weights(specialist.model, first.model):
            raise ConfigError("the specialists were trained from models whose weights differ")
    spec = dataclasses.replace(
        first.spec,
        objectives=objectives,
        conditioning=first.spec.carrier,
        carrier="lora",
        ranks=tuple(s.spec.ranks[0] for s in specialists),
        lora_alphas=tuple(s.spec.lora_alphas[0] for s in specialists),
    )
    policy = kind(first.plain_copy(), spec, first.tokenizer)
    theirs = [s.adapter_parameters() for s in specialists]
    with torch.no_grad():
        for name, parameter in policy.adapter_parameters().items():
            layer, _, part = name.rpartition(".")
            parts = [parameters[name] for parameters in theirs]
            parameter.copy_(torch.cat(parts, policy.layers[layer].delta_dim(part)))
    policy.loaded_from = [folder for s in specialists for folder in s.loaded_from]
    return policy
