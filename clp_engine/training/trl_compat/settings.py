"""TRL's keyword arguments turned into settings of CLPConfig, by the table in `fields`."""

from __future__ import annotations

import difflib
import enum
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

from clp_engine.core.errors import ConfigError, shown
from clp_engine.core.ranges import COUNT
from clp_engine.training.parallel.processes import world_size
from clp_engine.training.trl_compat.fields import ACCEPTED, FIELDS, TRANSLATED

# Names in scripts for earlier versions of TRL and transformers, with today's names.
FORMER = {
    "logging_dir": "gone from transformers, too: TENSORBOARD_LOGGING_DIR in the environment",
    "evaluation_strategy": "its name is eval_strategy",
    "no_cuda": "its name is use_cpu",
    "save_safetensors": "gone from transformers, too: everything is written as safetensors",
    "use_peft": "give peft_config= to the trainer",
    "ref_model": "the reference is the base model of the policy",
}

# The values that scripts read for TRANSLATED fields.
_READ: dict[str, Callable[[Any], Any]] = {
    "activation_checkpointing": lambda config: config.gradient_checkpointing,
    "generation_batch_size": lambda config: config.rollout_size,
    "world_size": lambda _: world_size(),
    "process_index": lambda _: int(os.environ.get("RANK", "0")),
    "local_process_index": lambda _: int(os.environ.get("LOCAL_RANK", "0")),
    "use_bias_correction_kl": lambda config: config.kl_estimator != "k3",
    "vllm_importance_sampling_cap": lambda _: None,
}


def understood(
    given: Mapping[str, Any], defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings of CLPConfig, allowed values of ACCEPTED and REFUSED fields) for keyword arguments that may be TRL's.

    defaults: CLPConfig's settings by name. Raises ConfigError for values that cannot be honoured, and for unknown names.
    """
    settings: dict[str, Any] = {}
    passed: dict[str, Any] = {}
    for name, value in given.items():
        value = _plain(value)
        if name in defaults:
            settings[name] = value
        elif name in FIELDS:
            if FIELDS[name].fate == TRANSLATED:
                continue
            _check_passes(name, value)
            passed[name] = value
        else:
            _unknown(sorted(set(given) - set(defaults) - set(FIELDS)), defaults)
    _translate(
        settings, {name: _plain(value) for name, value in given.items() if name not in defaults}, defaults
    )
    return settings, passed


def read(config: Any, name: str, passed: Mapping[str, Any]) -> Any:
    """The value of a field of GRPOConfig that is no setting of `config`, for scripts and callbacks that read it.

    passed: the values given for such fields. Raises AttributeError for other names.
    """
    if name in _READ:
        return _READ[name](config)
    if name not in FIELDS:
        raise AttributeError(f"{type(config).__name__!r} object has no attribute {name!r}")
    if name in passed:
        return passed[name]
    field = FIELDS[name]
    return field.default if field.takes(field.default) or not field.accepts else field.accepts[0]


def _plain(value: Any) -> Any:
    """A plain value: an enum's value (SchedulerType, IntervalStrategy, ...), or a torch dtype's name."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    return value


def _check_passes(name: str, value: Any) -> None:
    field = FIELDS[name]
    if field.takes(value):
        return
    if field.fate == ACCEPTED:
        expected = " or ".join(map(repr, field.accepts))
        raise ConfigError(f"{name}={shown(value)}: expected {expected}; {field.note}")
    raise ConfigError(f"{name}={shown(value)} (a setting of TRL's) is not here: {field.note}")


def _unknown(names: list[str], known: Collection[str]) -> None:
    for name in names:
        if name in FORMER:
            raise ConfigError(f"{name} (of earlier TRL and transformers): {FORMER[name]}")
    close = difflib.get_close_matches(str(names[0])[:60], [*known, *FIELDS], 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(f"unknown setting{'s' if len(names) > 1 else ''} {', '.join(names)}{hint}")


def _translate(settings: dict[str, Any], trl: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Add TRL's TRANSLATED fields to `settings`, in this project's terms, in place."""
    for name, nothing in (("top_k", 0), ("top_p", 1.0)):
        if name in settings and settings[name] == nothing and not isinstance(settings[name], bool):
            settings[name] = None
    for name in ("disable_tqdm", "output_dir"):
        if name in settings and settings[name] is None:
            settings[name] = defaults[name]
    if isinstance(settings.get("fsdp"), list):
        settings["fsdp"] = " ".join(map(str, settings["fsdp"]))
    if (asked := str(settings.get("fsdp")).lower()) in ("true", "false", ""):
        settings["fsdp"] = "full_shard" if asked == "true" else None
    if "eval_steps" in settings and settings["eval_steps"] is None:
        settings["eval_steps"] = settings.get("logging_steps", defaults["logging_steps"])
    if isinstance(settings.get("scale_rewards"), bool):
        settings["scale_rewards"] = "group" if settings["scale_rewards"] else "none"
    warmup = settings.get("warmup_steps")
    if isinstance(warmup, float) and 0 < warmup < 1:
        if settings.get("warmup_ratio"):
            raise ConfigError(
                f"warmup_steps={warmup} is a share of all steps, and so is warmup_ratio; give one"
            )
        settings |= {"warmup_steps": 0, "warmup_ratio": warmup}
    if (asked := trl.get("activation_checkpointing")) is not None:
        if settings.get("gradient_checkpointing", asked) != asked:
            raise ConfigError("activation_checkpointing and gradient_checkpointing are one thing; give one")
        settings["gradient_checkpointing"] = asked
    if (size := trl.get("generation_batch_size")) is not None:
        _translate_generation_batch(size, settings, defaults)
    if (cap := trl.get("vllm_importance_sampling_cap")) is not None:
        if settings.setdefault("vllm_importance_sampling_clip_max", cap) != cap:
            raise ConfigError(
                "vllm_importance_sampling_cap and vllm_importance_sampling_clip_max are one thing; give one"
            )
    if "use_bias_correction_kl" in trl:
        _translate_kl(trl["use_bias_correction_kl"], settings, defaults)


def _translate_generation_batch(size: Any, settings: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    rows = settings.get("per_device_train_batch_size", defaults["per_device_train_batch_size"])
    if rows in COUNT:
        rows *= world_size()
    if settings.get("steps_per_generation") is not None:
        raise ConfigError(
            "generation_batch_size and steps_per_generation were both given; they say one thing, give one"
        )
    if size not in COUNT or rows not in COUNT or size % rows:
        raise ConfigError(
            f"generation_batch_size={shown(size)}: expected a multiple of per_device_train_batch_size, times the number of "
            f"processes: {shown(rows)}"
        )
    settings["steps_per_generation"] = size // rows


def _translate_kl(corrected: Any, settings: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    estimator = settings.get("kl_estimator")
    if estimator is None:
        settings["kl_estimator"] = defaults["kl_estimator"] if corrected else "k3"
    elif corrected == (estimator == "k3"):
        raise ConfigError(
            f"use_bias_correction_kl={corrected!r} contradicts kl_estimator={estimator!r}: k3 is the uncorrected one; give "
            "kl_estimator alone"
        )
