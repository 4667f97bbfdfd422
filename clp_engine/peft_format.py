"""A blend as a PEFT LoRA directory: adapter_model.safetensors and adapter_config.json, as peft's LoraConfig reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from clp_kernels import expand_gate
from safetensors.torch import save_file

from clp_engine.adapters import ConditionedLayer, ConditionedLinear
from clp_engine.errors import ConfigError
from clp_engine.files import write_directory
from clp_engine.full_weight import InterpolatedLinear

if TYPE_CHECKING:
    from clp_engine.policy import ConditionedPolicy


def save(
    path: str | Path, policy: ConditionedPolicy, coefficients: torch.Tensor, rank: int | None = None
) -> float:
    """Write the blend `coefficients` (D,) as one adapter, atomically; returns |written - delta| / |delta|.

    `sum_i c_i s_i B_i A_i` is A stacked as it is and B's columns times c_i s_i; lora_alpha is the rank, layer by layer, so that
    PEFT's own scaling lora_alpha / r is one. A whole delta is cut to `rank` singular values; its bias is that of lora_B, which
    peft and transformers load and vLLM does not.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"rank={rank}: expected at least 1")
    if rank is not None and not any(_is_whole(layer) for layer in policy.layers.values()):
        raise ConfigError(
            f"rank={rank}: this policy's deltas have low rank already and are written exactly; leave it out"
        )
    factors, lost, total = {}, 0.0, 0.0
    for name, layer in policy.layers.items():
        factors[name], error, size = _factors(name, layer, coefficients, rank)
        lost, total = lost + error, total + size
    tensors, ranks = {}, {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.cpu().contiguous()
        ranks[name] = a.shape[0]
    biases = {name: getattr(layer, "delta_bias", None) for name, layer in policy.layers.items()}
    biased = any(bias is not None for bias in biases.values())
    if biased:  # PEFT has them for every layer or for none
        for name, (_, b) in factors.items():
            bias = (
                b.new_zeros(b.shape[0])
                if biases[name] is None
                else coefficients.to(biases[name]) @ biases[name].detach()
            )
            tensors[f"base_model.model.{name}.lora_B.bias"] = bias.cpu().contiguous()
    common = max(ranks.values(), key=list(ranks.values()).count)
    different = {name: r for name, r in ranks.items() if r != common}
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if policy.config.is_encoder_decoder else "CAUSAL_LM",
        "base_model_name_or_path": policy.spec.base_model,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": different,
        "alpha_pattern": different,
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": biased,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": sorted(policy.layers),
        "fan_in_fan_out": any(layer.transposed for layer in policy.layers.values()),
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    with write_directory(path) as temporary:
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return (lost / total) ** 0.5 if lost else 0.0


def _is_whole(layer: ConditionedLayer) -> bool:
    return not isinstance(layer, ConditionedLinear) or layer.whole


def _factors(
    name: str, layer: ConditionedLayer, coefficients: torch.Tensor, rank: int | None
) -> tuple[tuple[torch.Tensor, torch.Tensor], float, float]:
    """((A, B), squared error, squared size of the delta) of one layer."""
    if isinstance(layer, ConditionedLinear) and not layer.whole:
        gate = expand_gate(coefficients.to(layer.lora_a).unsqueeze(0), layer.ranks, layer.scalings)[0]
        return (layer.lora_a.detach(), layer.lora_b.detach() * gate), 0.0, 0.0
    if not isinstance(layer, InterpolatedLinear | ConditionedLinear):
        raise ConfigError(
            f"the delta of {name} ({type(layer.base).__name__}) has no LoRA form; write a whole model instead: "
            "merge(weights).save_pretrained(...), or clp-engine export --merged"
        )
    if rank is None:
        raise ConfigError(
            f"the delta of {name} is a whole weight; give a rank to cut it to (rank=, --rank; the error is reported), "
            "or write a whole model: merge(weights), --merged"
        )
    delta = layer.weight_delta(coefficients).detach().float()
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    kept = min(rank, len(s))
    error = s[kept:].square().sum().item()
    return (v[:kept], u[:, :kept] * s[:kept]), error, s.square().sum().item()
