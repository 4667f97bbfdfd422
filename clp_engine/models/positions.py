"""How many tokens a model reads, prompt and completion together.

Learned positions end where their table ends. Rotary embeddings of the kinds `dynamic` and `longrope` take other frequencies
once one row of the batch is longer than the model's original length: every other row would change with it, and keys that lie
in a cache would keep the old ones. Their original length is therefore the limit here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from clp_engine.core.errors import ConfigError

# Rotary embeddings whose frequencies depend on the length of what was read so far.
MOVING_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class Room:
    """tokens: how many a row may have, None for any number; cause: what limits them. apart: prompt and completion are counted
    each by itself (an encoder-decoder)."""

    tokens: int | None
    cause: str = ""
    apart: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel) -> Room:
        config = model.config.get_text_config()
        limits = [
            (_original_length(module), f"the original length of its rotary embedding, {kinds[0]}")
            for module in model.modules()
            if (kinds := moving_rope(module))
        ]
        if isinstance(count := getattr(config, "max_position_embeddings", None), int) and count > 0:
            limits.append((count, "max_position_embeddings of its config"))
        tokens, cause = min(limits, key=lambda limit: limit[0], default=(None, ""))
        return cls(tokens, cause, bool(getattr(config, "is_encoder_decoder", False)))

    def check(self, prompt: int, new: int, where: str = "a prompt") -> None:
        """Raises ConfigError where a prompt of `prompt` tokens and a completion of `new` find no room."""
        if self.tokens is not None and (max(prompt, new) if self.apart else prompt + new) > self.tokens:
            raise ConfigError(
                f"{where} has {prompt} tokens and its completion up to {new}; this model has room for {self.tokens} "
                f"({self.cause}): shorten the prompt (max_prompt_length) or the completion (max_completion_length, "
                "max_new_tokens)"
            )


def moving_rope(rotary: nn.Module) -> list[str]:
    """The kinds of this rotary embedding whose frequencies move; empty for another module."""
    kinds = getattr(rotary, "rope_type", None) or "default"
    return sorted(set(kinds.values() if isinstance(kinds, dict) else [kinds]) & set(MOVING_ROPE))


def _original_length(rotary: nn.Module) -> int:
    parameters = getattr(rotary.config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    given = [p["original_max_position_embeddings"] for p in nested if p.get("original_max_position_embeddings")]
    return min([*given, rotary.original_max_seq_len])
