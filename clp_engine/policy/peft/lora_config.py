"""peft's LoraConfig as a description of the adapters to train: the fields that take effect, and those that are refused.

    r, lora_alpha, use_rslora       rank and scaling: lora_alpha / r, or lora_alpha / sqrt(r)
    target_modules, exclude_modules, layers_to_transform, layers_pattern
                                    the layers, chosen by peft's own rules: names, a regular expression, "all-linear", or None
                                    for peft's choice for the model's type
    task_type                       must be the model's
    rank_pattern, alpha_pattern     allowed if they change no chosen layer: an adapter has one rank and one scaling here

Every other field of a LoraConfig, fields of later versions included, must have peft's default: nothing is ignored silently.
Each objective gets an adapter of its own of this form, with peft's initial values (init_lora_weights=True).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from clp_engine.core import ranges
from clp_engine.core.errors import ConfigError
from clp_engine.models.targets import check_targets, find_targets, refuse_beside_text
from clp_engine.models.text_path import beside_text

if TYPE_CHECKING:
    from peft import LoraConfig

_HONOURED = {
    "r",
    "lora_alpha",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "task_type",
}
# Fields without effect on the adapters: the origin of the config, and fields that peft corrects by itself (it sets
# fan_in_fan_out to the value that the layer needs). The group size belongs to use_qalora, which is refused.
_WITHOUT_MEANING = {
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "megatron_core",
    "qalora_group_size",
}
_REASONS = {
    "lora_dropout": "dropout would make rollout and training different networks; use lora_dropout=0.0",
    "use_dora": "a magnitude per column cannot be blended as sum_i w_i Delta_i; use use_dora=False",
    "bias": "biases are part of whole layers: use conditioning='full', or bias='none'",
    "lora_bias": "adapters have no bias; use lora_bias=False",
    "modules_to_save": "whole modules are trained by conditioning='full', 'attention' or 'logit' (joined by +: 'lora+logit'); "
    "leave it out",
    "init_lora_weights": "every objective's adapter starts at the base model, A Kaiming-uniform and B zero; use True",
    "inference_mode": "it freezes the adapters that are to be trained; use False",
    "trainable_token_indices": "rows of the embedding are not trained apart; use conditioning='full'",
    "target_parameters": "adapters are on linear layers; use target_modules",
    "layer_replication": "the base model is left as it is; leave it out",
    "revision": "a saved policy names its base model without a revision; leave it out",
}


def described(config: LoraConfig) -> dict[str, Any]:
    """`rank`, `lora_alpha` and `target_modules` for `ConditionedPolicy.from_pretrained`.

    Raises ConfigError for a field that could not take effect exactly. The message says what to do instead.
    """
    _check(config)
    ranges.check({"r": ranges.COUNT, "lora_alpha": ranges.POSITIVE}, r=config.r, lora_alpha=config.lora_alpha)
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    return {
        "rank": config.r,
        "lora_alpha": scaling * config.r,
        "target_modules": _chooser(config),
    }


def _check(config: LoraConfig) -> None:
    kind = getattr(config, "peft_type", None)
    kind = str(getattr(kind, "value", kind))
    if kind != "LORA":
        raise ConfigError(f"peft_config is a {type(config).__name__} ({kind}); expected peft's LoraConfig")
    for field in dataclasses.fields(config):
        if field.name in _HONOURED | _WITHOUT_MEANING:
            continue
        value = getattr(config, field.name)
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if value == default or not value and not default:
            continue
        reason = _REASONS.get(field.name, f"expected {default!r}: it would have no effect here; leave it out")
        raise ConfigError(f"peft_config has {field.name}={value!r}: {reason}")


def _chooser(config: LoraConfig) -> Callable[[PreTrainedModel], list[str]]:
    """A function that returns the names of the layers of a model that peft would adapt."""
    from peft.tuners.tuners_utils import check_target_module_exists

    def choose(model: PreTrainedModel) -> list[str]:
        _check_task(config, model)
        rules = dataclasses.replace(config, target_modules=_targets(config, model))
        modules = {
            name: m for name, m in model.named_modules() if name and check_target_module_exists(rules, name)
        }
        if not modules:
            raise ConfigError(
                f"peft_config: target_modules={config.target_modules!r} with what else it says leaves no layer of "
                f"{type(model).__name__}"
            )
        modules = _on_text_path(config, model, modules)
        odd = {name: type(m).__name__ for name, m in modules.items() if not isinstance(m, nn.Linear | Conv1D)}
        if odd:
            name, kind = next(iter(odd.items()))
            raise ConfigError(
                f"peft_config: target_modules chooses {name}, a {kind}; adapters are on nn.Linear and Conv1D; use "
                "exclude_modules, or conditioning='full'"
            )
        _check_patterns(config, list(modules))
        _warn_of_idle(rules, config, model, list(modules))
        check_targets(model, list(modules))
        return list(modules)

    return choose


def _on_text_path(
    config: LoraConfig, model: PreTrainedModel, modules: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    """`modules` without the layers that text does not pass. Raises ConfigError or warns if they were asked for by name."""
    beside = beside_text(model)
    left = {name: module for name, module in modules.items() if not beside(name)}
    if not left:
        refuse_beside_text(model, f"peft_config: target_modules={config.target_modules!r}")
    if config.target_modules is not None and len(left) < len(modules):
        warnings.warn(
            f"peft_config: {len(modules) - len(left)} of the {len(modules)} layers that it chooses get no adapter: text passes "
            f"them by (a tower or projector of images of {type(model).__name__})",
            stacklevel=4,
        )
    return left


def _targets(config: LoraConfig, model: PreTrainedModel) -> Any:
    targets = config.target_modules
    if targets is None:
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOICES

        kinds = model.config.model_type, model.config.get_text_config().model_type
        kind = next((kind for kind in kinds if kind in CHOICES), kinds[0])
        if kind not in CHOICES:
            raise ConfigError(
                f"peft_config: target_modules is missing, and peft has no choice of its own for {kind!r}; give names, or "
                "'all-linear'"
            )
        return set(CHOICES[kind])
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return set(find_targets(model, None))
    return targets


def _check_task(config: LoraConfig, model: PreTrainedModel) -> None:
    task = config.task_type
    expected = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    if task is not None and str(getattr(task, "value", task)) != expected:
        raise ConfigError(f"peft_config has task_type={task!r}; {type(model).__name__} is a {expected}")


def _warn_of_idle(rules: LoraConfig, config: LoraConfig, model: PreTrainedModel, chosen: list[str]) -> None:
    """Warn of each entry that chooses, excludes or describes no layer: it may be misspelt, or meant for another model.

    rules: `config` with the names of its target_modules. chosen: the layers.
    """
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    def chooses(**changed) -> bool:
        one = dataclasses.replace(rules, **changed)
        return any(check_target_module_exists(one, name) for name in names)

    names = [name for name, _ in model.named_modules() if name]
    idle: list[str] = []
    for field in ("target_modules", "layers_to_transform", "layers_pattern"):
        entries = getattr(config, field)
        if isinstance(entries, list | tuple | set):
            without = {} if field != "target_modules" else {"exclude_modules": None}
            idle += [
                f"{field} {e!r}" for e in sorted(entries, key=str) if not chooses(**{field: [e]}, **without)
            ]
    excluded = config.exclude_modules
    for entry in [excluded] if isinstance(excluded, str) else sorted(excluded or ()):
        alone = dataclasses.replace(
            rules,
            target_modules=entry if isinstance(excluded, str) else [entry],
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )
        if not any(check_target_module_exists(alone, name) for name in names):
            idle.append(f"exclude_modules {entry!r}")
    for field in ("rank_pattern", "alpha_pattern"):
        keys = getattr(config, field) or {}
        idle += [f"{field} {k!r}" for k in keys if all(get_pattern_key([k], n) == n != k for n in chosen)]
    if idle:
        warnings.warn(
            f"peft_config: {', '.join(idle)} match{'es' if len(idle) == 1 else ''} no layer of {type(model).__name__}; leave "
            "out what is not meant for it",
            stacklevel=4,
        )


def _check_patterns(config: LoraConfig, names: list[str]) -> None:
    """Raises ConfigError if a pattern gives a chosen layer another rank or lora_alpha."""
    from peft.utils.other import get_pattern_key

    for field, common in (("rank_pattern", config.r), ("alpha_pattern", config.lora_alpha)):
        pattern = getattr(config, field) or {}
        for name in names:
            value = pattern.get(get_pattern_key(pattern.keys(), name), common)
            if value != common:
                raise ConfigError(
                    f"peft_config: {field} gives {name} {value} instead of {common}; an objective's adapter has one rank "
                    "and one scaling for all its layers: leave the pattern out"
                )
