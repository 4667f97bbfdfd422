"""What differs between the releases of transformers that the engine runs on."""

from __future__ import annotations

import functools
import inspect

from torch import nn
from transformers import PreTrainedModel


def keep_softcap(model: PreTrainedModel) -> None:
    """Runs attention eagerly where a layer caps its scores (Gemma 2) and would be given to sdpa, which has no cap: before
    transformers 5.23 such a model loads with sdpa and leaves the cap out without a word."""
    config = model.config.get_text_config()
    if config._attn_implementation == "sdpa" and any(
        getattr(module, "attn_logit_softcapping", None) for module in model.modules()
    ):
        model.set_attn_implementation("eager")


@functools.cache  # asked for every token that is decoded by transformers' modules
def cache_argument(kind: type[nn.Module]) -> str:
    """What a stack of layers calls its cache of keys and values: `past_key_values` until transformers 5.24, then `cache`."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def quiet_transformers() -> None:
    """No notes about loading on the terminal: what matters to the user is said by the command itself."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
