"""Differences between the releases of transformers that the engine supports."""

from __future__ import annotations

import functools
import inspect

from torch import nn
from transformers import PreTrainedModel


def keep_softcap(model: PreTrainedModel) -> None:
    """Switch a model whose layers cap their attention scores (Gemma 2) from sdpa to eager attention.

    sdpa has no cap. Before transformers 5.23 such a model loads with sdpa and silently leaves the cap out.
    """
    config = model.config.get_text_config()
    if config._attn_implementation == "sdpa" and any(
        getattr(module, "attn_logit_softcapping", None) for module in model.modules()
    ):
        model.set_attn_implementation("eager")


@functools.cache  # called for every token that transformers' modules decode
def cache_argument(kind: type[nn.Module]) -> str:
    """The keyword of a layer stack for its KV cache: `past_key_values` until transformers 5.24, then `cache`."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def quiet_transformers() -> None:
    """Silence transformers' loading messages and progress bars. The commands print what the user needs to know."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
