"""Decoding on a CPU by `clp_kernels.decoder`, which computes a whole step in one native call.

`plan(model)` says whether a model can be decoded natively, and why it cannot. Llama and models of its structure can (Mistral,
Qwen2, Qwen3, Gemma, Gemma 2 and 3, OLMo 2, Granite, ...): `llama_weights` recognises them by their modules' names. Each model
is tried before its use: a few random tokens through the native decoder and through transformers must give the same logits.
Transformers' modules decode every other model.

    model                   a base in float32 or bfloat16 on a CPU, computed in float32, with low-rank factors or without any.
                            Transformers' modules decode models with whole weights that differ by row.
    prefill                 by transformers. A prompt's keys and values are kept once for all its rows.
    CLP_ENGINE_DECODING     torch: transformers' modules for all models. native: an error if the native decoder cannot serve.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from clp_kernels.backends import backends
from clp_kernels.decoder import Decoding, Draws, LowRank, PackedDecoder
from torch import nn

from clp_engine.models.conditioned import ConditionedModel
from clp_engine.models.low_rank_layers import ConditionedLinear
from clp_engine.rollouts.engines.base import DecoderRequest
from clp_engine.rollouts.engines.llama_weights import (
    base_dtype,
    check_modules,
    frozen_weights,
    read,
    rope_tables,
)
from clp_engine.rollouts.engines.modules import ModulesDecoder
from clp_engine.rollouts.engines.trials import (
    Trial,
    Unsupported,
    check_alike,
    current,
    made_or_refused,
    unless_refused,
)

# The largest difference of logits from transformers, relative to the largest logit. Float32 products are summed in another
# order. For a bfloat16 model, transformers rounds every result and the native decoder does not.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Plan:
    """The plan for decoding a model: `packed` weights, and `layers` by their place in it, or the `reason` why there is none."""

    packed: PackedDecoder | None
    layers: dict[tuple[int, str], nn.Module]
    reason: str | None
    identity: tuple = ()


# Plans of models, including those not served. They are kept outside the model, which must stay copyable.
_PLANS: weakref.WeakKeyDictionary[nn.Module, Plan] = weakref.WeakKeyDictionary()


# -- the plan of a model --------------------------------------------------------------------------------------------------


def _stored(model: ConditionedModel) -> torch.dtype:
    """`base_dtype` if the native decoder takes it, otherwise float32."""
    dtype = base_dtype(model)
    return dtype if dtype in _TOLERANCE else torch.float32


def _identity(model: ConditionedModel) -> tuple:
    """A key that changes with the base weights and with the kernels in use."""
    return _isa(), *frozen_weights(model)


def plan(model: ConditionedModel) -> Plan:
    """The plan for decoding this model.

    The plan is made, and the weights are packed, at the first call. Both are kept while the base weights stay the same. Hooks
    and other changes to the modules are checked at every call.
    """
    kept = current(_PLANS, model, _identity(model), _make)
    try:
        if kept.packed is not None:
            check_modules(model, _stored(model))
    except Unsupported as error:
        return Plan(None, {}, str(error))
    return kept


def _isa() -> str:
    return backends()["cpu"].reason


def _make(model: ConditionedModel, identity: tuple) -> Plan:
    def make() -> Plan:
        weights, modules = read(model, _stored(model))
        rope_tables(model, 1)
        made = Plan(PackedDecoder(weights), modules, None, identity)
        _verify(model, made)
        return made

    return made_or_refused(model, make, lambda reason: Plan(None, {}, reason, identity))


def _verify(model: ConditionedModel, made: Plan) -> None:
    """Raises Unsupported if the logits of the native decoder and of transformers differ."""
    trial = Trial.of(model)
    ours = NativeDecoder(trial.request, made)
    theirs = ModulesDecoder(trial.request)
    ours.add(*trial.prompts), theirs.add(*trial.prompts)
    for tokens in trial.tokens:
        check_alike(model, ours.step(tokens), theirs.step(tokens), _TOLERANCE[_stored(model)])


def choose(model: ConditionedModel) -> Plan | None:
    """The plan of a model that is decoded natively, or None. `choice.detours` gives the reason."""
    return unless_refused(lambda: plan(model))


class NativeDecoder:
    """Logits from the native decoder; see `base.StepDecoder`. made: the model's plan."""

    drop_share = 0.0

    def __init__(self, request: DecoderRequest, made: Plan):
        self._request, self._model = request, request.model
        self._slots = request.at_once * request.group
        self._decoding = Decoding(
            made.packed,
            room=request.room,
            slots=self._slots,
            rope=rope_tables(self._model, request.longest + -(-request.room // 16) * 16),
            low_rank=self._low_rank(made),
        )

    def _low_rank(self, made: Plan) -> dict[tuple[int, str], LowRank]:
        """Low-rank factors by layer. Layers of the same ranks share a gate, with a row for each prompt that has rows."""
        self._gates: dict[tuple, torch.Tensor] = {}
        if not self._request.blended:
            return {}
        layers = {key: layer for key, layer in made.layers.items() if isinstance(layer, ConditionedLinear)}
        for layer in layers.values():
            form = layer.ranks, layer.scalings
            if form not in self._gates:
                self._gates[form] = torch.zeros(self._slots, sum(layer.ranks))
        return {
            key: LowRank(layer.lora_a, layer.lora_b, self._gates[layer.ranks, layer.scalings])
            for key, layer in layers.items()
        }

    @property
    def places(self) -> int:
        return (self._slots - len(self._decoding)) // self._request.group

    def add(self, ids: torch.Tensor, mask: torch.Tensor, blend: torch.Tensor | None) -> torch.Tensor:
        backbone, in_force = self._model.backbone, self._model.blend
        with in_force.use(blend):
            hidden, context = backbone.prefill(ids, mask)
            gates = {form: in_force.gate(*form) for form in self._gates}
            logits = backbone.head.logits(hidden[:, -1]).float()
        layers = context.cache.layers
        numbers = [
            self._decoding.add_prompt(
                [layer.keys[p, :, -length:] for layer in layers],
                [layer.values[p, :, -length:] for layer in layers],
            )
            for p, length in enumerate(mask.sum(-1).tolist())
        ]
        for form, gate in gates.items():
            self._gates[form][numbers] = gate
        self._decoding.add(torch.tensor(numbers).repeat_interleave(self._request.group))
        return logits.repeat_interleave(self._request.group, 0)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._decoding.step(tokens)

    def keep(self, rows: torch.Tensor) -> None:
        self._decoding.keep(rows)
        self._decoding.forget_prompts()

    def write(
        self, logits: torch.Tensor, draws: Draws, others_wait: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`clp_kernels.decoder.Decoding.write`. If other prompts wait, it stops when there is a place for one."""
        missing = self._request.group - (self._slots - len(self._decoding))
        left = self._decoding.write(logits, draws, missing if others_wait else 0)
        self._decoding.forget_prompts()
        return left
