"""PEFT's LoRA layer with several adapters on it.

It scales each active adapter by one number, so it can do a blend that all rows share. Rows with an adapter each
(`adapter_names`) it serves without gradients only. A blend of its own for every row it cannot do.
"""

from __future__ import annotations

import torch

from bench.core.case import Case, Prepare, Prepared, Refused, Tensors
from bench.core.environment import why_not_importable

NAME = "peft"
PACKAGE = "peft"


def unavailable(device: str) -> str | None:
    return why_not_importable("peft")


def multi_lora_linear(case: Case) -> dict[str, Prepare]:
    blend = case.options["blend"]
    if blend == "one-hot" and case.wanted:
        raise Refused("adapter_names, an adapter for each row, is for inference only")
    if blend not in ("one-hot", "shared"):
        raise Refused("scales an adapter by one number for the whole batch; no blend per row")
    return {NAME: _prepare}


def _layer(case: Case, inputs: Tensors):
    """The LoRA layer that holds the case's adapters, all active, and their names."""
    from peft import LoraConfig, get_peft_model

    ranks, weight = case.options["ranks"], inputs["weight"]
    names = [f"adapter{i}" for i in range(len(ranks))]
    base = torch.nn.Module()
    base.layer = torch.nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    base.layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    model = None
    for name, rank in zip(names, ranks):
        config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=["layer"])
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.base_model.set_adapter(names)
    layer = model.base_model.model.layer
    starts = [sum(ranks[:i]) for i in range(len(ranks))]
    for name, start, rank in zip(names, starts, ranks):
        layer.lora_A[name].weight.data = inputs["lora_a"][start : start + rank].clone()
        layer.lora_B[name].weight.data = inputs["lora_b"][:, start : start + rank].clone()
    return layer, names, starts


def _prepare(case: Case, inputs: Tensors) -> Prepared:
    layer, names, starts = _layer(case, inputs)
    x = inputs["x"]
    if case.options["blend"] == "one-hot":
        layer.eval()
        rows = inputs["gate"][:, starts].argmax(-1).tolist()
        for name, start in zip(names, starts):
            layer.set_scale(name, float(inputs["gate"][:, start].max()))
        chosen = [names[i] for i in rows]
        return Prepared(torch.no_grad()(lambda: {"y": layer(x, adapter_names=chosen)}))
    for name, start in zip(names, starts):
        layer.set_scale(name, float(inputs["gate"][0, start]))
    if not case.wanted:
        return Prepared(torch.no_grad()(lambda: {"y": layer(x)}))
    x = x.detach().requires_grad_()
    factors = [layer.lora_A[n].weight for n in names] + [layer.lora_B[n].weight for n in names]

    def call():
        y = layer(x)
        return y, torch.autograd.grad(y, [x, *factors], inputs["grad_y"])

    def outputs(result) -> Tensors:
        y, (d_x, *d_factors) = result
        count = len(names)
        return {
            "y": y.detach(),
            "d_x": d_x,
            "d_lora_a": torch.cat(d_factors[:count], 0),
            "d_lora_b": torch.cat(d_factors[count:], 1),
        }

    return Prepared(call, outputs)
