"""A decode step over slots with few launches: the model's own linear layers, and one kernel for each thing between them.

transformers' modules, over the same slots, take some fifty launches a layer (counted for Qwen2) for what is here twelve: seven
products, two norms with the residual before them, rotary embeddings with the cache, attention, the gated activation
(`clp_kernels.decode_step`), and one more where rows are so few that their keys are cut into pieces. Small
launches are what a decode step on a GPU is made of, once its products are at the bandwidth of their weights.

Which models: those that `llama_weights` reads, of one dtype, where Triton is there. A step is tried before it is used: random
tokens through it and through transformers' modules must give the same logits (`cuda_graphs.plan`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from clp_kernels import decode_step
from clp_kernels.backends import backends
from clp_kernels.decoder import DecoderLayer, DecoderWeights
from torch import nn

from clp_engine.models.conditioned import ConditionedModel
from clp_engine.rollouts.engines import llama_weights
from clp_engine.rollouts.engines.slots import Step
from clp_engine.rollouts.engines.trials import Unsupported

# Logits of this step and of transformers' modules, as a share of the largest: other orders of sums, other roundings.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class FusedStep:
    """How a model's step is computed; `reason` says why it is not, where it is not."""

    weights: DecoderWeights | None
    modules: dict[tuple[int, str], nn.Module]
    reason: str | None
    identity: tuple = ()


def read(model: ConditionedModel, identity: tuple) -> FusedStep:
    """The step of a model, not tried yet. Raises Unsupported."""
    triton = backends()["triton"]
    if not triton.available:
        raise Unsupported(triton.reason)
    if (dtype := llama_weights.base_dtype(model)) not in TOLERANCE:
        raise Unsupported(f"the base model is {dtype}, not float32, float16 or bfloat16")
    weights, modules = llama_weights.read(model, dtype, model.device)
    llama_weights.rope_tables(model, 1)
    for layer in weights.layers:
        for gain in (layer.q_norm, layer.k_norm):
            if gain is not None and gain.shape != (weights.head_dim,):
                raise Unsupported("the norms of its queries and keys are over all heads at once")
        if (layer.q_norm is None) != (layer.k_norm is None):
            raise Unsupported("one of queries and keys has a norm, the other has none")
    return FusedStep(weights, modules, None, identity)


def logits(model: ConditionedModel, made: FusedStep, step: Step) -> torch.Tensor:
    """(rows, V): as transformers' modules compute them over the step's slots, with its blend in force."""
    w, slots, rows = made.weights, step.slots, step.rows
    group, lengths, before = slots.group, slots.lengths[:rows], slots.prompt_lengths[: step.count]
    tables = slots.rope(model)

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
    return model.backbone.head.logits(n)


def _gains(layer: DecoderLayer) -> tuple[torch.Tensor, torch.Tensor] | None:
    return None if layer.q_norm is None else (layer.q_norm, layer.k_norm)
