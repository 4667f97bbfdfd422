"""Write a blend, or each objective's delta, as PEFT LoRA directories: adapter_model.safetensors and adapter_config.json.

An adapter has one rank and one scaling on all of its layers, because vLLM reads r and lora_alpha and no patterns. Layers with
fewer products are padded with zeros. vLLM takes r up to its max_lora_rank, one of VLLM_RANKS (16 by default). It refuses
modules_to_save and DoRA, and does not support a bias of lora_B.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from clp_kernels import expand_gate
from safetensors.torch import save_file
from torch.nn import functional

from clp_engine.core.conditions import BLEND_FILE
from clp_engine.core.errors import ConfigError
from clp_engine.core.files import refuse_overlap, write_directory
from clp_engine.models import fingerprint
from clp_engine.models.blend import ConditionedLayer
from clp_engine.models.low_rank_layers import ConditionedLinear
from clp_engine.models.whole_weight_layers import InterpolatedLinear
from clp_engine.policy.peft.svd_cut import Cut, cut_matrix, cut_product
from clp_engine.policy.steerable import SteerableModel

# Settings of a policy that determine how its adapters are blended.
BLEND_SETTINGS = ("kl_conditioning", "min_kl", "default_kl", "kl_is_beta", "prompt_template")
_C_OF_ALPHA = {
    "none": "1",
    "linear": "1 - alpha",
    "odds": "((1 - alpha) / alpha) / ((1 - alpha_min) / alpha_min), alpha_min from min_kl",
}
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_rank(rank: int) -> int | None:
    """The least max_lora_rank with which vLLM takes an adapter of this rank, or None if no value is enough."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def read_rank(path: str | Path) -> int:
    """The rank of the adapter in a directory that `save` wrote."""
    return json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8"))["r"]


def save(
    path: str | Path, policy: SteerableModel, coefficients: torch.Tensor, rank: int | None = None
) -> float:
    """Write the blend `coefficients` (D,) as one adapter. Returns |written - delta| / |delta| over all layers (Frobenius).

    `sum_i c_i s_i B_i A_i` is written as A, stacked without the adapters of coefficient 0, and B with its columns multiplied by
    c_i s_i. The error is then 0. lora_alpha equals the rank, so that PEFT's own scaling lora_alpha / r is one.

    rank: the most products per layer. The largest singular values are kept. A whole delta needs a rank; its bias is written as
        lora_B's bias.
    """
    return _save(path, policy, coefficients, policy.spec.scalings, 1.0, rank)


def save_each(directory: Path, policy: SteerableModel, rank: int | None = None) -> dict[str, float]:
    """Write each delta as an adapter with the policy's scaling, into its own folder of `directory` (see `folders`).

    BLEND_FILE says how the adapters are blended. Returns the error of each folder, as `save`.
    """
    spec, errors = policy.spec, {}
    for i, name in enumerate(folders(policy)):
        one = torch.zeros(len(spec.ranks))
        one[i] = 1.0
        errors[name] = _save(directory / name, policy, one, (1.0,) * len(spec.ranks), spec.scalings[i], rank)
    names = list(errors) if len(errors) > 1 else list(errors) * len(policy.objectives)
    write_blend(directory, policy, {"adapters": dict(zip(policy.objectives, names))})
    return errors


def write_blend(directory: Path, policy: SteerableModel, entries: Mapping[str, object]) -> None:
    """Write BLEND_FILE: how deltas are blended, and the entries of one kind of export."""
    spec = policy.spec
    blend = {
        "blend": "theta(w, kl) = theta_ref + c * sum_i w_i * Delta_i",
        "c": _C_OF_ALPHA[spec.kl_conditioning],
        "alpha": "kl / (1 + kl)" if spec.kl_is_beta else "kl",
        "base_model": spec.base_model,
        **entries,
        "conditioning": spec.conditioning,
        "carrier": spec.carrier,
        **{name: getattr(spec, name) for name in BLEND_SETTINGS if name not in entries},
    }
    (directory / BLEND_FILE).write_text(json.dumps(blend, indent=2) + "\n", encoding="utf-8")


def export(policy: SteerableModel, path: str | Path, weights, kl, rank: int | None) -> float:
    """See `ConditionedPolicy.export_adapter`."""
    refuse_overlap(path, policy.read_from)
    warn_of_tied_head(policy)
    coefficients = policy.coefficients(policy.conditions(weights, kl))
    with write_directory(path) as temporary:
        error = save(temporary, policy, coefficients[0], rank)
        _describe_blend(temporary, policy, weights, kl)
        complete(temporary, policy)
    return error


def export_each(policy: SteerableModel, directory: str | Path, rank: int | None) -> dict[str, float]:
    """See `ConditionedPolicy.save_adapters`."""
    refuse_overlap(directory, policy.read_from)
    warn_of_tied_head(policy)
    with write_directory(directory) as temporary:
        errors = save_each(temporary, policy, rank)
        complete(temporary, policy)
    return errors


def complete(directory: Path, policy: SteerableModel) -> None:
    """Write the files beside the adapters: the base model's fingerprint, and the tokenizer."""
    fingerprint.write(directory, policy.model)
    if policy.tokenizer is not None:
        policy.tokenizer.save_pretrained(directory)


def warn_of_tied_head(policy: SteerableModel) -> None:
    if policy.splits_tied_head:
        warnings.warn(
            "this adapter changes an output projection that shares its weight with the input embedding: use it as an "
            "adapter, or write a merged model with merge(); peft's merge_and_unload would change both",
            stacklevel=4,
        )


def _describe_blend(path: Path, policy: SteerableModel, weights, kl) -> None:
    condition = policy.conditions(weights, kl)
    blend = {
        "weights": dict(zip(policy.objectives, condition.weights[0].tolist())),
        "kl": condition.kl[0].item(),
        "conditioning": policy.spec.conditioning,
        "prompt_text": policy.prompt_text(weights, kl),
    }
    (path / "blend.json").write_text(json.dumps(blend, indent=2) + "\n", encoding="utf-8")


def folders(policy: SteerableModel) -> list[str]:
    """A folder name for each delta: the objective's, or "adapter" if there is a single delta for all objectives."""
    if not policy.conditioning.blended:
        return ["adapter"]
    names: list[str] = []
    for objective in policy.objectives:
        name = re.sub(r"[^\w\-]", "_", objective) or "_"
        while name in names:
            name += "_"
        names.append(name)
    return names


def _save(
    path: str | Path,
    policy: SteerableModel,
    coefficients: torch.Tensor,
    scalings: Sequence[float],
    scaling: float,
    rank: int | None,
) -> float:
    """Write an adapter that PEFT scales by `scaling`.

    Layers with factors have the delta sum_i c_i scalings_i B_i A_i, whole layers sum_i c_i Delta_i / scaling.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"rank={rank}: expected at least 1")
    cuts = {
        name: cut_layer(name, layer, coefficients, scalings, scaling, rank)
        for name, layer in policy.layers.items()
    }
    biases = {name: getattr(layer, "delta_bias", None) for name, layer in policy.layers.items()}
    common = write_adapter(
        path,
        policy,
        {name: (cut.a, cut.b) for name, cut in cuts.items()},
        scaling,
        {
            name: coefficients.to(bias) @ bias.detach() / scaling
            for name, bias in biases.items()
            if bias is not None
        },
    )
    lost, size = (sum(getattr(cut, part) for cut in cuts.values()) for part in ("lost", "size"))
    if vllm_rank(common) is None:
        warnings.warn(
            f"rank {common} is more than vLLM takes ({VLLM_RANKS[-1]} at most): give rank={VLLM_RANKS[-1]} or less to cut the "
            "adapter by SVD (the error is reported), or serve merge(weights); peft and transformers take it as it is",
            stacklevel=4,
        )
    return (lost / size) ** 0.5 if lost else 0.0


def write_adapter(
    path: str | Path,
    policy: SteerableModel,
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    scaling: float,
    biases: Mapping[str, torch.Tensor] | None = None,
    rank: int | None = None,
) -> int:
    """Write an adapter that PEFT scales by `scaling`. Returns its rank: `rank`, or that of the largest factors.

    factors: (A (r, K), B (N, r)) by layer; fewer products than the adapter's rank are padded with zeros.
    biases: lora_B's, by layer. PEFT has biases for every layer or for none, and scales them, too.
    """
    common = max(a.shape[0] for a, _ in factors.values()) if rank is None else rank
    tensors = {}
    for name, (a, b) in factors.items():
        missing = common - a.shape[0]
        parts = {"A": functional.pad(a, (0, 0, 0, missing)), "B": functional.pad(b, (0, missing))}
        for part, tensor in parts.items():
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = tensor.cpu().contiguous()
        if biases:
            bias = biases.get(name, b.new_zeros(b.shape[0]))
            tensors[f"base_model.model.{name}.lora_B.bias"] = bias.cpu().contiguous()
    alpha = scaling * common
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if policy.config.is_encoder_decoder else "CAUSAL_LM",
        "base_model_name_or_path": policy.spec.base_model,
        "inference_mode": True,
        "r": common,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": bool(biases),
        "use_rslora": False,
        "use_dora": False,
        "target_modules": sorted(policy.layers),
        "fan_in_fan_out": any(layer.transposed for layer in policy.layers.values()),
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return common


def cut_layer(
    name: str,
    layer: ConditionedLayer,
    coefficients: torch.Tensor,
    scalings: Sequence[float],
    scaling: float,
    rank: int | None,
) -> Cut:
    if isinstance(layer, ConditionedLinear) and not layer.whole:
        gate = expand_gate(coefficients.to(layer.lora_a).unsqueeze(0), layer.ranks, scalings)[0]
        kept = gate != 0 if bool(gate.any()) else torch.arange(len(gate), device=gate.device) == 0
        return cut_product(layer.lora_a.detach()[kept], (layer.lora_b.detach() * gate)[:, kept], rank)
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
    return cut_matrix(layer.weight_delta(coefficients).detach() / scaling, rank)
