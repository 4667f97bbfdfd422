"""Decoding on the CPU without Python that scales with layers: a policy's model as `clp_kernels.decoder` computes it.

`plan(policy)` says whether a policy can be decoded natively, and why not. It takes Llama and what has its structure (Mistral,
Qwen2, Qwen3, Gemma, Gemma 2 and 3, OLMo 2, Granite, ...): recognised by the modules there are and their names, then tried: a
few random tokens through the native decoder and through transformers must give the same logits. What differs is decoded by
transformers, as everything else is.

    policy                  a base in float32 or bfloat16 on a CPU, computed in float32; "lora", "logit", "none", with "prompt"
                            or without. Of "full" and "attention", whose layers have whole weights that differ by row,
                            transformers' modules serve.
    prefill                 by transformers; its keys and values are kept once for each prompt.
    CLP_ENGINE_DECODING     torch: transformers' modules for everything; native: an error where the native path cannot serve.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from clp_kernels.backends import backends
from clp_kernels.decoder import Decoding, Draws, LowRank, PackedDecoder
from torch import nn

from clp_engine.core.errors import ConfigError
from clp_engine.models.low_rank_layers import ConditionedLinear
from clp_engine.rollouts.engines.llama_weights import (
    base_dtype,
    check_modules,
    frozen_weights,
    read,
    rope_tables,
)
from clp_engine.rollouts.engines.trials import Trial, Unsupported, check_alike, current, made_or_refused

if TYPE_CHECKING:
    from clp_engine.policy.policy import ConditionedPolicy

SWITCH = "CLP_ENGINE_DECODING"
# Logits of the native decoder and of transformers, as a share of the largest: float32 products in another order; of a bfloat16
# model, transformers rounds every result, which the native decoder does not.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}

@dataclass(frozen=True)
class Plan:
    """How a policy is decoded: natively with `packed` weights and `layers` by their place in it, or not, for `reason`."""

    packed: PackedDecoder | None
    layers: dict[tuple[int, str], nn.Module]
    reason: str | None
    identity: tuple = ()


# Plans made, and policies that were told why there is none; a policy itself stays free of what cannot be copied.
_PLANS: weakref.WeakKeyDictionary[nn.Module, Plan] = weakref.WeakKeyDictionary()


# -- reading a model ------------------------------------------------------------------------------------------------------


# -- rotary embeddings ----------------------------------------------------------------------------------------------------


# -- the plan of a policy -------------------------------------------------------------------------------------------------


def _stored(policy: ConditionedPolicy) -> torch.dtype:
    """`base_dtype` where the native decoder takes it, else float32."""
    dtype = base_dtype(policy)
    return dtype if dtype in _TOLERANCE else torch.float32


def _identity(policy: ConditionedPolicy) -> tuple:
    """Changes when the base weights do, or other kernels are in force."""
    return _isa(), *frozen_weights(policy)


def plan(policy: ConditionedPolicy) -> Plan:
    """How this policy is decoded. Worked out, and the weights packed, at the first call, and kept while the base weights are
    the same; hooks and such are looked for every time."""
    kept = current(_PLANS, policy, _identity(policy), _make)
    try:
        if kept.packed is not None:
            check_modules(policy, _stored(policy))
    except Unsupported as error:
        return Plan(None, {}, str(error))
    return kept


def _isa() -> str:
    return backends()["cpu"].reason


def _make(policy: ConditionedPolicy, identity: tuple) -> Plan:
    def make() -> Plan:
        weights, modules = read(policy, _stored(policy))
        rope_tables(policy, 1)
        made = Plan(PackedDecoder(weights), modules, None, identity)
        _verify(policy, made)
        return made

    return made_or_refused(policy, make, lambda reason: Plan(None, {}, reason, identity))


def _verify(policy: ConditionedPolicy, made: Plan) -> None:
    """Raises Unsupported where the native decoder and transformers differ."""
    from clp_engine.rollouts.engines.modules import BlendDecoding

    trial = Trial.of(policy)
    ours = NativeDecoding(policy, *trial.arguments, made)
    theirs = BlendDecoding(policy, *trial.arguments)
    ours.add(slice(None)), theirs.add(slice(None))
    for tokens in trial.tokens:
        check_alike(policy, ours.step(tokens), theirs.step(tokens), _TOLERANCE[_stored(policy)])


# -- what every plan is made and tried by -----------------------------------------------------------------------------------


def choose(policy: ConditionedPolicy) -> Plan | None:
    """The plan of a policy that is decoded natively, or None; `ConditionedPolicy.detours` tells why not."""
    switch = os.environ.get(SWITCH, "")
    if switch not in ("", "auto", "torch", "native"):
        raise ConfigError(f"{SWITCH}={switch}: expected torch, native or auto")
    if switch == "torch":
        return None
    made = plan(policy)
    if made.reason is None:
        return made
    if switch == "native":
        raise ConfigError(f"{SWITCH}=native: {made.reason}")
    return None


class NativeDecoding:
    """`modules.Decoding` by the native decoder; arguments as of `BlendDecoding`."""

    drop_share = 0.0

    def __init__(
        self,
        policy: ConditionedPolicy,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        blend: torch.Tensor | None,
        group: int,
        room: int,
        at_once: int,
        made: Plan,
    ):
        self._policy, self._blend, self._prompts, self._group = (
            policy,
            blend,
            (prompt_ids, prompt_mask),
            group,
        )
        longest = int(prompt_mask.sum(-1).max())
        self._slots = at_once * group
        self._decoding = Decoding(
            made.packed,
            room=room,
            slots=self._slots,
            rope=rope_tables(policy, longest + -(-room // 16) * 16),
            low_rank=self._low_rank(made),
        )

    def _low_rank(self, made: Plan) -> dict[tuple[int, str], LowRank]:
        """A gate row for each prompt, in the order in which they will be added."""
        if self._blend is None:
            return {}
        with self._policy.blend.use(self._blend):
            return {
                key: LowRank(layer.lora_a, layer.lora_b, self._policy.blend.gate(layer.ranks, layer.scalings))
                for key, layer in made.layers.items()
                if isinstance(layer, ConditionedLinear)
            }

    @property
    def places(self) -> int:
        return (self._slots - len(self._decoding)) // self._group

    def add(self, prompts: slice) -> torch.Tensor:
        policy, (ids, mask) = self._policy, (t[prompts] for t in self._prompts)
        skip = ids.shape[1] - int(mask.sum(-1).max())
        with policy.blend.use(None if self._blend is None else self._blend[prompts]):
            hidden, context = policy.backbone.prefill(ids[:, skip:], mask[:, skip:])
            logits = policy.backbone.head.logits(hidden[:, -1]).float()
        layers = context.cache.layers
        numbers = [
            self._decoding.add_prompt(
                [layer.keys[p, :, -length:] for layer in layers],
                [layer.values[p, :, -length:] for layer in layers],
            )
            for p, length in enumerate(mask.sum(-1).tolist())
        ]
        self._decoding.add(torch.tensor(numbers).repeat_interleave(self._group))
        return logits.repeat_interleave(self._group, 0)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._decoding.step(tokens)

    def keep(self, rows: torch.Tensor) -> None:
        self._decoding.keep(rows)

    def write(self, logits: torch.Tensor, draws: Draws, others_wait: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """`clp_kernels.decoder.Decoding.write`, until there is a place for a prompt if others wait for one."""
        missing = self._group - (self._slots - len(self._decoding))
        return self._decoding.write(logits, draws, missing if others_wait else 0)
