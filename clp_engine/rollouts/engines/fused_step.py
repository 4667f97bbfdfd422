"""A decode step over slots with few launches: the policy's own linear layers, and one kernel for each thing between them.

transformers' modules, over the same slots, take some fifty launches a layer (counted for Qwen2) for what is here twelve: seven
products, two norms with the residual before them, rotary embeddings with the cache, attention, the gated activation
(`clp_kernels.decode_step`), and one more where rows are so few that their keys are cut into pieces. Small
launches are what a decode step on a GPU is made of, once its products are at the bandwidth of their weights.

Which policies: those that `native` reads (Llama and what has its structure), of one dtype, where Triton is there. A
plan is tried before it is used: random tokens through this step and through transformers' must give the same logits.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from clp_kernels import decode_step
from clp_kernels.backends import backends, forced_backend
from clp_kernels.decoder import DecoderLayer, DecoderWeights
from torch import nn

from clp_engine.rollouts.engines import native
from clp_engine.rollouts.engines.native import Unsupported

if TYPE_CHECKING:
    from clp_engine.policy.policy import ConditionedPolicy
    from clp_engine.rollouts.engines.cuda_graphs import Step

# Logits of this step and of transformers' modules, as a share of the largest: other orders of sums, other roundings.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class FusedStep:
    """How a policy's step is computed; `reason` says why not, where it is not."""

    weights: DecoderWeights | None
    modules: dict[tuple[int, str], nn.Module]
    reason: str | None
    identity: tuple = ()


_PLANS: weakref.WeakKeyDictionary[nn.Module, FusedStep] = weakref.WeakKeyDictionary()


def plan(policy: ConditionedPolicy) -> FusedStep:
    """How this policy's step is computed. Worked out at the first call and kept while the base weights are the same; hooks and
    such are looked for every time."""
    kept = native.current(_PLANS, policy, tuple(native.frozen_weights(policy)), _make)
    try:
        if kept.reason is None:
            native.check_modules(policy, native.base_dtype(policy), policy.device)
    except Unsupported as error:
        return FusedStep(None, {}, str(error))
    return kept


def choose(policy: ConditionedPolicy) -> FusedStep | None:
    """The plan of a policy whose step is fused, or None. CLP_ENGINE_DECODING=torch: transformers' modules for everything; so do
    back-ends forced that are not a GPU's."""
    if os.environ.get(native.SWITCH, "") == "torch" or forced_backend() in ("reference", "cpu"):
        return None
    made = plan(policy)
    return made if made.reason is None else None


def _make(policy: ConditionedPolicy, identity: tuple) -> FusedStep:
    def make() -> FusedStep:
        triton = backends()["triton"]
        if not triton.available:
            raise Unsupported(triton.reason)
        if (dtype := native.base_dtype(policy)) not in _TOLERANCE:
            raise Unsupported(f"the base model is {dtype}, not float32, float16 or bfloat16")
        weights, modules = native.read(policy, dtype, policy.device)
        native.rope_tables(policy, 1)
        for layer in weights.layers:
            for gain in (layer.q_norm, layer.k_norm):
                if gain is not None and gain.shape != (weights.head_dim,):
                    raise Unsupported("the norms of its queries and keys are over all heads at once")
            if (layer.q_norm is None) != (layer.k_norm is None):
                raise Unsupported("one of queries and keys has a norm, the other has none")
        made = FusedStep(weights, modules, None, identity)
        _verify(policy, made)
        return made

    return native.made_or_refused(policy, make, lambda reason: FusedStep(None, {}, reason, identity))


def _verify(policy: ConditionedPolicy, made: FusedStep) -> None:
    """Raises Unsupported where this step and transformers' modules differ over the same slots."""
    from clp_engine.rollouts.engines.cuda_graphs import SlotDecoding

    trial = native.Trial.of(policy)
    before, policy.slots = policy.slots, None
    try:
        decoding = SlotDecoding(policy, *trial.arguments, fused=made)
        decoding.add(slice(None))
        for tokens in trial.tokens:
            native.check_alike(policy, *decoding.compared(tokens), _TOLERANCE[native.base_dtype(policy)])
    finally:
        policy.slots = before


def logits(policy: ConditionedPolicy, made: FusedStep, step: Step) -> torch.Tensor:
    """(rows, V): as transformers' modules compute them over the step's slots, with its blend in force."""
    w, slots, rows = made.weights, step.slots, step.rows
    group, lengths, before = slots.group, slots.lengths[:rows], slots.prompt_lengths[: step.count]
    tables = slots.rope(policy)

    def linear(i: int, name: str, x: torch.Tensor) -> torch.Tensor:
        # The interface of a sequence of one token: what a conditioned layer looks its rows up by.
        return made.modules[i, name](x.unsqueeze(1)).squeeze(1)

    first = w.layers[0]
    x, n = decode_step.embed(
        slots.tokens[:rows, 0], w.embedding, w.embedding_scale, first.norm_attention, w.eps
    )
    for i, layer in enumerate(w.layers):
        q = linear(i, "q", n).view(rows, w.heads, w.head_dim)
        k, v = (linear(i, name, n).view(rows, w.kv_heads, w.head_dim) for name in "kv")
        (keys, values), gains = slots.own[i], _gains(layer)
        decode_step.rope_and_store(
            q, k, v, keys, values, lengths, before, *tables[layer.rope], gains, group, w.eps
        )
        prompts = tuple(buffer[: step.count] for buffer in slots.prompts[i])
        attended = decode_step.attend(
            q,
            prompts,
            (keys, values),
            lengths,
            before,
            group,
            w.attention_scale,
            w.attention_softcap,
            layer.window,
        )
        y = linear(i, "o", attended.view(rows, -1))
        n = decode_step.add_norm(x, y, layer.norm_attended, layer.norm_mlp, w.residual_scale, w.eps)
        hidden = decode_step.gated(linear(i, "gate", n), linear(i, "up", n), w.activation)
        after = w.layers[i + 1].norm_attention if i + 1 < len(w.layers) else w.norm
        n = decode_step.add_norm(x, linear(i, "down", hidden), layer.norm_out, after, w.residual_scale, w.eps)
    return policy.backbone.head.logits(n)


def _gains(layer: DecoderLayer) -> tuple[torch.Tensor, torch.Tensor] | None:
    return None if layer.q_norm is None else (layer.q_norm, layer.k_norm)
