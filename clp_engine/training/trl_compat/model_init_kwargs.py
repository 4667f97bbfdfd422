"""TRL's `model_init_kwargs`: the arguments of transformers' from_pretrained that may be given for the base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from clp_engine.core.errors import ConfigError

# Packed training has its own attention. transformers' attention decodes with its modules, where these two accept a given mask.
_ATTENTION = ("eager", "sdpa")
_REFUSED = {
    "torch_dtype": "its name is dtype",
    "device_map": "the model is on one device, which use_cpu=True or CUDA_VISIBLE_DEVICES chooses",
    "quantization_config": "quantised base models are not supported; use bf16=True",
    "load_in_4bit": "quantised base models are not supported; use bf16=True",
    "load_in_8bit": "quantised base models are not supported; use bf16=True",
    "trust_remote_code": "code that comes with a checkpoint is not run; load the model yourself and give it as model=",
    "revision": "a saved policy names its base model without one; download that revision and give its folder as model=",
    "cache_dir": "a saved policy is loaded without one; set HF_HUB_CACHE in the environment",
    "local_files_only": "a saved policy is loaded without it; set HF_HUB_OFFLINE=1 in the environment",
    "use_kernels": "the engine's own kernels do that work; leave it out",
    "use_cache": "rollouts keep a cache of their own; leave it out",
}


def check(kwargs: Mapping[str, Any] | None) -> None:
    """Raises ConfigError for arguments that cannot be honoured. None and False ask for nothing and are valid."""
    for name, value in (kwargs or {}).items():
        if value is None or value is False:
            continue
        given = f"model_init_kwargs: {name}={value!r}"
        if name == "attn_implementation":
            if value not in _ATTENTION:
                raise ConfigError(
                    f"{given}: expected {' or '.join(_ATTENTION)}; training has attention of its own, over packed tokens"
                )
        elif name == "dtype":
            if value != "auto" and not isinstance(getattr(torch, str(value), None), torch.dtype):
                raise ConfigError(f"{given}: expected auto, or a dtype such as bfloat16")
        else:
            otherwise = (
                "only dtype and attn_implementation are taken; load the model yourself and give it as model="
            )
            raise ConfigError(f"{given}: {_REFUSED.get(name, otherwise)}")


def attention(kwargs: Mapping[str, Any] | None) -> str | None:
    """The attention implementation asked for, or None."""
    return (kwargs or {}).get("attn_implementation")
