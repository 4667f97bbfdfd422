"""The base model that a policy starts from: its location, and loading it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from clp_engine.core.errors import ConfigError, shown
from clp_engine.models.text_path import is_composite


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether the base models of two policies are equal, parameter by parameter."""
    frozen = [[p for p in model.parameters() if not p.requires_grad] for model in (one, other)]
    return len(frozen[0]) == len(frozen[1]) and all(torch.equal(a, b.to(a.device)) for a, b in zip(*frozen))


def model_location(name_or_path: str | Path) -> str | Path:
    """The location of a model: the shipped model for a task's name, any other name unchanged."""
    if str(name_or_path) == "docsum" and not Path(name_or_path).exists():
        from clp_engine.tasks import docsum

        return docsum.checkpoint_path()
    return name_or_path


def auto_class(config: PretrainedConfig) -> type:
    """The transformers class for the language model of a configuration.

    Some models of text and images have a class of their own, because transformers does not count them as causal.
    """
    if getattr(config, "is_encoder_decoder", False):
        return AutoModelForSeq2SeqLM
    known = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if known or not is_composite(config) else AutoModelForImageTextToText


# Packages whose layers store weights in few bits, in part under the name nn.Linear.
_QUANTISERS = (
    "aqlm",
    "auto_gptq",
    "awq",
    "bitsandbytes",
    "compressed_tensors",
    "eetq",
    "fp_quant",
    "gptqmodel",
    "hqq",
    "optimum.quanto",
    "quark",
    "quanto",
    "torchao",
    "vptq",
)


def refuse_quantised(model: nn.Module | PretrainedConfig) -> None:
    """Raises ConfigError for a model, or its configuration, with quantised weights: kernels and exports read plain weights."""
    config = getattr(model, "config", model)
    settings = getattr(config, "quantization_config", None)
    found = None
    if settings is not None:
        method = dict(settings if isinstance(settings, dict) else vars(settings)).get("quant_method")
        found = f"its configuration has quantization_config ({getattr(method, 'value', method)})"
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        weight = getattr(module, "weight", None)
        origins = [type(part).__module__ + "." for part in (module, weight)]
        package = next((q for q in _QUANTISERS if any(o.startswith(q + ".") for o in origins)), None)
        if package is not None:
            found = f"{name} is a {type(module).__name__} of {package}"
        elif isinstance(module, nn.Linear) and isinstance(weight, torch.Tensor):
            if not weight.is_floating_point() or weight.element_size() == 1:
                found = f"{name} has weights of {weight.dtype}"
        if found:
            break
    if found:
        raise ConfigError(
            f"the base model is quantised: {found}; expected weights in float32, bfloat16 or float16. Load the unquantised "
            "checkpoint (without quantization_config), or call dequantize() on the loaded model"
        )


def usable_device(device: str | torch.device) -> torch.device:
    """The device. Raises ConfigError if this machine, or this build of torch, does not have it."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ConfigError(
            f"device={shown(device)} cannot be used ({str(error).splitlines()[0][:100]}); this machine has "
            + ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
        ) from error
    return found


def load_base(
    name_or_path, tokenizer, dtype, device, attention: str | None = None
) -> tuple[PreTrainedModel, object, str]:
    """(model, tokenizer, name to save). attention: transformers' attn_implementation; None leaves the choice to transformers.

    Raises ConfigError for a model that cannot be loaded or is quantised.
    """
    if isinstance(name_or_path, PreTrainedModel):
        model = name_or_path
        if holds_adapters(model):
            raise ConfigError(
                "the base model holds adapters of PEFT; give it to ConditionedPolicy.from_pretrained, whose objectives then "
                "begin at them, or merge or unload them first"
            )
        refuse_quantised(model)
        if device is not None:
            model = model.to(usable_device(device))
        return model, tokenizer, model.config.name_or_path or ""
    if not isinstance(name_or_path, str | Path):
        raise ConfigError(
            f"the base model is a {type(name_or_path).__name__}; expected a name, a path, or a loaded transformers model"
        )
    path = model_location(name_or_path)
    device = usable_device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    try:
        config = AutoConfig.from_pretrained(path)
        refuse_quantised(config)
        model = auto_class(config).from_pretrained(
            path,
            dtype=dtype or (torch.float32 if device.type == "cpu" else "auto"),
            **({} if attention is None else {"attn_implementation": attention}),
        )
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(path)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if (Path(path) / "adapter_config.json").is_file():
            reason = "it is a LoRA adapter; give its base model, and the adapter to ConditionedPolicy.from_adapters"
        raise ConfigError(f"cannot load the model {str(name_or_path)!r}: {reason}") from error
    return model.to(device), tokenizer, str(name_or_path)


def holds_adapters(model: Any) -> bool:
    """Whether the given model holds PEFT adapters."""
    if "peft" not in sys.modules or not isinstance(model, nn.Module):
        return False
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(model, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in model.modules())
