"""A blend as a PEFT LoRA directory: adapter_model.safetensors and adapter_config.json, as peft's LoraConfig reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from clp_kernels import expand_gate
from safetensors.torch import save_file

from clp_engine.adapters import ConditionedLinear
from clp_engine.files import write_directory

if TYPE_CHECKING:
    from clp_engine.policy import PolicySpec


def save(
    path: str | Path,
    spec: PolicySpec,
    layers: Mapping[str, ConditionedLinear],
    coefficients: torch.Tensor,
    task_type: str = "CAUSAL_LM",
) -> None:
    """Write `sum_i c_i s_i B_i A_i` as one adapter of rank R = sum r_i: A stacked as it is, B's columns times c_i s_i, and
    lora_alpha = R, so that PEFT's own scaling lora_alpha / R is one. coefficients: (M,). Atomic."""
    tensors = {}
    for name, layer in layers.items():
        gate = expand_gate(coefficients.to(layer.lora_a).unsqueeze(0), layer.ranks, layer.scalings)[0]
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_a.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = (layer.lora_b.detach() * gate).cpu().contiguous()
    total = sum(spec.ranks)
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": spec.base_model,
        "inference_mode": True,
        "r": total,
        "lora_alpha": total,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "target_modules": sorted(layers),
        "fan_in_fan_out": any(layer.transposed for layer in layers.values()),
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    with write_directory(path) as temporary:
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
