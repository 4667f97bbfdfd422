"""PEFT's LoRA adapters as the function they compute: on each layer y = x W^T + s * (x A^T) B^T.

An adapter is read from a directory (adapter_config.json and adapter_model.safetensors), or from a model that holds it (a
PeftModel, or a transformers model after add_adapter or load_adapter). An adapter that is not a sum of such products on linear
layers is refused, by name: DoRA, modules_to_save, biases, embeddings, adapters whose start changed the base model. Layers and
ranks come from the tensors, so that every way in which a LoraConfig can name layers is supported. The factors of GPT-2's Conv1D
(fan_in_fan_out) have the same layout as those of nn.Linear.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from clp_engine.core.errors import ConfigError, shown
from clp_engine.core.files import read_json, read_tensors
from clp_engine.core.ranges import COUNT, MAPPINGS, Range
from clp_engine.models.blend import place

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<part>[AB])\.weight$")
_BASE_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<layer>(?:(?!lora_).)+?)(?:\.base_layer)?\.weight$")

_NAME = re.compile(r"[\w.-]+")
_PATIENCE = 10
_MATCH = """import json, re, sys
keys, layers = json.load(sys.stdin)
patterns = [re.compile(rf"(.*\\.)?({key})$") for key in keys]
print(json.dumps([next((i for i, p in enumerate(patterns) if p.match(layer)), None) for layer in layers]))
"""

# Fields of a LoraConfig that change no number once an adapter is trained, or that this module reads.
_FOLLOWED = frozenset(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r lora_alpha rank_pattern "
    "alpha_pattern use_rslora lora_dropout target_modules exclude_modules layers_to_transform layers_pattern fan_in_fan_out "
    "init_lora_weights loftq_config eva_config corda_config lora_ga_config qalora_group_size megatron_core "
    "ensure_weight_tying runtime_config".split()
)
_MERGE = "merge it into a base model of its own (merge_and_unload), or train it without"
_REFUSED = {
    "use_dora": f"DoRA scales whole columns of the weight, which is no sum of low-rank products; {_MERGE}",
    "modules_to_save": f"it replaces whole modules, which cannot be blended with those of another adapter; {_MERGE}",
    "lora_bias": f"lora_B has a bias, and deltas here have none; {_MERGE}",
    "trainable_token_indices": f"it replaces rows of the embedding; {_MERGE}",
    "target_parameters": "it adapts parameters outside linear layers (experts); train it with target_modules",
    "layer_replication": "it repeats layers, so that its base is another model; write that model out and train on it",
    "alora_invocation_tokens": "it acts from certain tokens on (activated LoRA), and deltas here act on all",
}
# Initialisations that subtract the initial value of B A from the base model's weights.
_MOVED_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class Factors:
    """One layer's delta, scaling * b @ a, with a (r, K) and b (N, r) in float32."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    source: its name in messages. base_model: the model that its configuration names, "" for none.
    layers: factors by the layer's name in the transformers model.
    base_weights: weights of the base model that PEFT saved with the adapter, as it does for an embedding or output projection
        that is adapted or was resized.
    """

    source: str
    base_model: str
    layers: dict[str, Factors]
    base_weights: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(f.a.shape[0] for f in self.layers.values())

    @property
    def scaling(self) -> float:
        """The most frequent scaling among the layers whose delta is not zero."""
        return Counter(f.scaling for f in self.layers.values() if f.scaling).most_common(1)[0][0]


def read_adapter(location: str | Path) -> Adapter:
    """The adapter in a directory or a repository of the model hub.

    Raises ConfigError for a missing file, and for an adapter that cannot be represented.
    """
    source = f"adapter {str(location)!r}"
    path = _file(location, CONFIG_FILE)
    config = read_json(path)
    _check_config(source, config)
    _check_numbers(path, config)
    tensors = read_tensors(_file(location, WEIGHTS_FILE))
    parts: dict[str, dict[str, torch.Tensor]] = {}
    base_weights = {}
    for key, tensor in tensors.items():
        if found := _KEY.match(key):
            parts.setdefault(found["layer"], {})[found["part"]] = tensor
        elif found := _BASE_KEY.match(key):
            base_weights[found["layer"]] = tensor
        else:
            raise ConfigError(
                f"{source}: {key} is no factor of a linear layer and cannot be blended with those of other adapters; {_MERGE}"
            )
    layers = {}
    ranks = _by_layer(path, config, "rank_pattern", "r", list(parts))
    alphas = _by_layer(path, config, "alpha_pattern", "lora_alpha", list(parts))
    for name, pair in parts.items():
        matrices = pair.keys() == {"A", "B"} and all(t.dim() == 2 for t in pair.values())
        if not matrices or pair["A"].shape[0] != pair["B"].shape[1]:
            shapes = ", ".join(f"lora_{part} {tuple(t.shape)}" for part, t in sorted(pair.items()))
            raise ConfigError(f"{source}: {name} has {shapes}; expected lora_A (r, K) and lora_B (N, r)")
        rank = pair["A"].shape[0]
        if rank != ranks[name]:
            raise ConfigError(f"{source}: {name} has rank {rank}, its {CONFIG_FILE} says {ranks[name]}")
        layers[name] = _factors(
            pair["A"], pair["B"], alphas[name] / (rank**0.5 if config.get("use_rslora") else rank)
        )
    return _adapter(source, config, layers, base_weights)


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The adapters in a model, by name, with the scaling in force.

    Raises ConfigError as `read_adapter`, and if an adapter is merged into the weights.
    """
    from peft.tuners.lora import LoraLayer

    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not (
        isinstance(model, PreTrainedModel) or hasattr(model, "get_base_model")
    ):
        raise ConfigError(
            f"{type(model).__name__} holds adapters in a way that is not known here; give the model that "
            "PeftModel.from_pretrained, get_peft_model or add_adapter made"
        )
    found = {}
    for name, config in configs.items():
        source = f"adapter {name!r}"
        _check_config(source, config.to_dict())
        layers = {}
        for path, layer in _transformers_model(model).named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            if layer.merged:
                raise ConfigError(
                    f"{path}: adapters are merged into its weight; call unmerge_adapter() on the model first"
                )
            if name in layer.lora_embedding_A:
                raise ConfigError(
                    f"{source}: {path} is an embedding, whose factors cannot be blended; {_MERGE}"
                )
            if name in layer.lora_A:
                layers[path] = _factors(
                    layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
                )
        found[name] = _adapter(source, config.to_dict(), layers)
    return found


def take_out_adapters(model: nn.Module) -> PreTrainedModel:
    """The transformers model with its own layers in place of PEFT's. `model` shares this change."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = _transformers_model(model)
    wrapped = {name: m for name, m in base.named_modules() if isinstance(m, BaseTunerLayer)}
    place(base, {name: layer.get_base_layer() for name, layer in wrapped.items()})
    for left in ("peft_config", "_hf_peft_config_loaded"):  # attributes that add_adapter leaves on a model
        base.__dict__.pop(left, None)
    return base


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def _factors(a: torch.Tensor, b: torch.Tensor, scaling: float) -> Factors:
    return Factors(a.detach().float().clone(), b.detach().float().clone(), float(scaling))


def _adapter(
    source: str, config: Mapping[str, Any], layers: dict[str, Factors], base_weights: dict | None = None
) -> Adapter:
    if not layers:
        raise ConfigError(f"{source} has no factors of linear layers")
    if not any(f.scaling for f in layers.values()):
        raise ConfigError(
            f"{source} computes nothing: its lora_alpha is 0; leave it out (None for its objective), or write what it was "
            "trained with"
        )
    base = config.get("base_model_name_or_path") or ""
    if not isinstance(base, str):
        raise ConfigError(
            f"{source}: base_model_name_or_path={shown(base)}: expected the name of a model, or null"
        )
    return Adapter(source, base, layers, base_weights or {})


def _file(location: str | Path, name: str) -> Path:
    try:
        return Path(cached_file(str(location), name))
    except OSError as error:
        pickled = (Path(location) / "adapter_model.bin").is_file()
        remedy = (
            "only adapter_model.bin is there, a pickle, which is not opened: load it with PeftModel.from_pretrained and "
            "write it with save_pretrained(safe_serialization=True)"
            if pickled and name == WEIGHTS_FILE
            else "expected a directory that PEFT's save_pretrained wrote (one for each adapter), or a repository of the hub"
        )
        raise ConfigError(f"adapter {str(location)!r}: no {name}; {remedy}") from error


def _check_numbers(path: Path, config: Mapping[str, Any]) -> None:
    for name, pattern, values in (
        ("r", "rank_pattern", COUNT),
        ("lora_alpha", "alpha_pattern", Range(float)),
    ):
        if name not in config:
            raise ConfigError(
                f"{path}: {name} is missing; expected a configuration that PEFT's save_pretrained wrote"
            )
        values.check(f"{path}: {name}", config[name])
        if entries := config.get(pattern):
            if not isinstance(entries, Mapping):
                raise ConfigError(
                    f"{path}: {pattern}={shown(entries)}: expected a number for each expression"
                )
            values.check(f"{path}: {pattern}", entries, MAPPINGS)


def _by_layer(
    path: Path, config: Mapping[str, Any], pattern: str, common: str, layers: Sequence[str]
) -> dict[str, Any]:
    """The value of rank_pattern or alpha_pattern for each layer.

    It is the value of the first key, a regular expression, that matches the end of the layer's name after a dot, or else the
    common value.
    """
    entries = dict(config.get(pattern) or {})
    if all(_NAME.fullmatch(key) for key in entries):
        found = [next((i for i, key in enumerate(entries) if _ends_in(layer, key)), None) for layer in layers]
    else:
        found = _matched(f"{path}: {pattern}", list(entries), layers)
    values = list(entries.values())
    return {layer: config[common] if i is None else values[i] for layer, i in zip(layers, found)}


def _ends_in(layer: str, key: str) -> bool:
    """Whether `(.*\\.)?(key)$` matches the layer, for a key that is a name. A dot in the key stands for any character."""
    before, tail = layer[: -len(key)], layer[-len(key) :]
    same = len(tail) == len(key) and all(k in (".", c) for k, c in zip(key, tail))
    return same and (not before or before.endswith("."))


def _matched(where: str, keys: Sequence[str], layers: Sequence[str]) -> list[int | None]:
    """The index of the first expression that matches each layer, or None.

    Matching an expression can take practically forever, and Python's matching cannot be interrupted. Another process therefore
    does it, for at most _PATIENCE seconds.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH],
            input=json.dumps([keys, layers]),
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{where}: matching its expressions takes more than {_PATIENCE} s; write the names of layers instead"
        ) from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it ended early"])[-1]
        raise ConfigError(f"{where}: {shown(list(keys))} are no regular expressions ({reason})")
    return json.loads(done.stdout)


def _check_config(source: str, config: Mapping[str, Any]) -> None:
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if kind != "LORA":
        raise ConfigError(
            f"{source}: peft_type is {kind}; expected LORA, the one whose products can be blended"
        )
    for name, value in config.items():
        if not value or name in _FOLLOWED:
            continue
        if name == "bias":
            if value != "none":
                raise ConfigError(
                    f"{source}: bias={value!r}, it changes biases of the base model, and deltas here have none; {_MERGE}"
                )
        elif name in _REFUSED:
            raise ConfigError(f"{source}: {name}={value!r}: {_REFUSED[name]}")
        else:
            raise ConfigError(
                f"{source}: {name}={value!r} is no part of plain LoRA and cannot be followed; {_MERGE}"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVED_BASE):
        raise ConfigError(
            f"{source}: init_lora_weights={start!r} changed the base model's weights when training began; save the adapter "
            "again as a plain one, with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    if config.get("lora_dropout"):
        warnings.warn(
            f"{source}: lora_dropout={config['lora_dropout']} is left out: there is no dropout here, so that rollout and "
            "training have the same log-probs",
            stacklevel=4,
        )
