"""A decode step over slots with few launches: the model's own linear layers, and one kernel for each operation between them.

Over the same slots, transformers' modules take about fifty launches a layer (counted for Qwen2). This step takes nine with the
CUDA kernels: four of products (query, key and value in one, gate and up in one, `clp_kernels.multi_lora.multi_lora_linears`),
two norms with the residual before them, rotary embeddings with the cache, attention, and the gated activation
(`clp_kernels.decode_step`). Without the CUDA kernels, or without a blend, the products are seven. One more launch is needed if
there are so few rows that their keys are split. Small launches dominate a decode step on a GPU once its products run at the
bandwidth of their weights.

The step serves the models that `llama_weights` reads, with weights of one dtype, if Triton is available. It is tried before its
use: random tokens through it and through transformers' modules must give the same logits (`cuda_graphs.plan`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from clp_kernels import decode_step
from clp_kernels.backends import backends
from clp_kernels.decoder import DecoderLayer, DecoderWeights
from torch import nn

from clp_engine.models.conditioned import ConditionedModel
from clp_engine.models.low_rank_layers import of_one_input
from clp_engine.rollouts.engines import llama_weights
from clp_engine.rollouts.engines.slots import Step
from clp_engine.rollouts.engines.trials import Unsupported

# The largest difference of logits from transformers' modules, relative to the largest logit: sums and roundings differ.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class FusedStep:
    """The plan for computing a model's step, or the `reason` why there is none."""

    weights: DecoderWeights | None
    modules: dict[tuple[int, str], nn.Module]
    reason: str | None
    identity: tuple = ()


def read(model: ConditionedModel, identity: tuple) -> FusedStep:
    """The plan of a model's step, before its trial. Raises Unsupported."""
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
    """(rows, V) logits, as transformers' modules compute them over the step's slots, with the step's blend in force."""
    w, slots, rows = made.weights, step.slots, step.rows
    group, lengths, before = slots.group, slots.lengths[:rows], slots.prompt_lengths[: step.count]
    tables = slots.rope(model)

    def linears(i: int, names: tuple[str, ...], x: torch.Tensor) -> list[torch.Tensor]:
        # x takes the shape of sequences of one token, since a conditioned layer looks up its rows by that shape.
        return [y.squeeze(1) for y in of_one_input([made.modules[i, name] for name in names], x.unsqueeze(1))]

    first = w.layers[0]
    x, n = decode_step.embed(
        slots.tokens[:rows, 0], w.embedding, w.embedding_scale, first.norm_attention, w.eps
    )
    for i, layer in enumerate(w.layers):
        q, k, v = (y.view(rows, -1, w.head_dim) for y in linears(i, ("q", "k", "v"), n))
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
        [y] = linears(i, ("o",), attended.view(rows, -1))
        n = decode_step.add_norm(x, y, layer.norm_attended, layer.norm_mlp, w.residual_scale, w.eps)
        hidden = decode_step.gated(*linears(i, ("gate", "up"), n), w.activation)
        [y] = linears(i, ("down",), hidden)
        after = w.layers[i + 1].norm_attention if i + 1 < len(w.layers) else w.norm
        n = decode_step.add_norm(x, y, layer.norm_out, after, w.residual_scale, w.eps)
    return model.backbone.head.logits(n)


def _gains(layer: DecoderLayer) -> tuple[torch.Tensor, torch.Tensor] | None:
    return None if layer.q_norm is None else (layer.q_norm, layer.k_norm)
