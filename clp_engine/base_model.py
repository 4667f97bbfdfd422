"""The model a policy starts from: where it is, and loading it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from clp_engine.errors import ConfigError


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two policies' base models are equal, parameter by parameter."""
    frozen = [[p for p in model.parameters() if not p.requires_grad] for model in (one, other)]
    return len(frozen[0]) == len(frozen[1]) and all(torch.equal(a, b.to(a.device)) for a, b in zip(*frozen))


def model_location(name_or_path: str | Path) -> str | Path:
    """Where the model of this name is: a shipped one by its task's name, everything else as it is."""
    if str(name_or_path) == "docsum" and not Path(name_or_path).exists():
        from clp_engine.tasks import docsum

        return docsum.checkpoint_path()
    return name_or_path


def auto_class(config: PretrainedConfig) -> type:
    """The transformers class that makes the language model of a configuration."""
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    return AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM


def load_base(
    name_or_path, tokenizer, dtype, device, attention: str | None = None
) -> tuple[PreTrainedModel, object, str]:
    """(model, tokenizer, name to save). attention: transformers' attn_implementation, None for its choice."""
    if isinstance(name_or_path, PreTrainedModel):
        model = name_or_path
        if device is not None:
            model = model.to(device)
        return model, tokenizer, model.config.name_or_path or ""
    path = model_location(name_or_path)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        model = auto_class(AutoConfig.from_pretrained(path)).from_pretrained(
            path,
            dtype=dtype or (torch.float32 if device.type == "cpu" else "auto"),
            **({} if attention is None else {"attn_implementation": attention}),
        )
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"cannot load the model {str(name_or_path)!r}: {reason}") from error
    return model.to(device), tokenizer, str(name_or_path)
