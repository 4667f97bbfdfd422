"""The tokens a model can read: the largest number in a row, prompt and completion together, and the valid token ids.

Learned positions end with their table. Rotary embeddings of the kinds `dynamic` and `longrope` change their frequencies once
one row of the batch is longer than the model's original length. That would change every other row of the batch, and keys in a
cache would keep the old frequencies. The original length is therefore the limit here.

A token id is a row of the input embedding. If tokens were added to a tokenizer and the model was not resized, the added tokens
have no row. An embedding with more rows than the tokenizer has tokens (padded to a round number) is valid.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from clp_engine.core.errors import ConfigError

# Rotary embeddings whose frequencies depend on the number of tokens read so far.
MOVING_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class Room:
    """The limits of a model's input.

    tokens: the most tokens of a row, None for any number. cause: the reason for that limit.
    apart: prompt and completion are counted separately (an encoder-decoder).
    ids: the number of rows of the input embedding, None if unknown.
    """

    tokens: int | None
    cause: str = ""
    apart: bool = False
    ids: int | None = None

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
        weight = getattr(model.get_input_embeddings(), "weight", None)
        apart = bool(getattr(config, "is_encoder_decoder", False))
        return cls(tokens, cause, apart, None if weight is None else weight.shape[0])

    def check(self, prompt: int, new: int, where: str = "a prompt") -> None:
        """Raises ConfigError if a prompt of `prompt` tokens with a completion of `new` tokens exceeds the limit."""
        if self.tokens is not None and (max(prompt, new) if self.apart else prompt + new) > self.tokens:
            raise ConfigError(
                f"{where} has {prompt} tokens and its completion up to {new}; this model has room for {self.tokens} "
                f"({self.cause}): shorten the prompt (max_prompt_length) or the completion (max_completion_length, "
                "max_new_tokens)"
            )

    def check_prompt(self, ids: Sequence[int], new: int, where: str, tokenizer=None) -> None:
        """Raises ConfigError if a prompt has a token without an embedding, or exceeds the limit with a completion of `new`
        tokens."""
        self.check_ids(ids, where, tokenizer)
        self.check(len(ids), new, where)

    def check_ids(self, ids: Sequence[int], where: str, tokenizer=None) -> None:
        """Raises ConfigError for a token without an embedding."""
        if self.ids is None or not ids or 0 <= min(ids) and (highest := max(ids)) < self.ids:
            return
        if min(ids) < 0:
            raise ConfigError(
                f"{where} has the token {min(ids)}; tokens are numbers from 0 to {self.ids - 1}"
            )
        size = highest + 1 if tokenizer is None else max(len(tokenizer), highest + 1)
        name = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(highest)!r})"
        raise ConfigError(
            f"{where} has the token {highest}{name}, and the model's embedding {self.ids} rows: before training, "
            f"call model.resize_token_embeddings({size}), or use the tokenizer that belongs to the model"
        )

    def check_tokenizer(self, tokenizer) -> None:
        """Check that the tokenizer's tokens have embeddings.

        Raises ConfigError if the padding, beginning or end token has none, since these are always used. Warns if another token
        has none; a prompt with such a token is refused later.
        """
        if self.ids is None or (size := len(tokenizer)) <= self.ids:
            return
        remedy = f"call model.resize_token_embeddings({size}) first"
        for kind in ("pad", "eos", "bos"):
            number = getattr(tokenizer, f"{kind}_token_id", None)
            if number is not None and number >= self.ids:
                raise ConfigError(
                    f"the tokenizer's {kind}_token {getattr(tokenizer, f'{kind}_token')!r} is token {number}, and the model's "
                    f"embedding has {self.ids} rows: {remedy}, or choose a {kind}_token that the model knows"
                )
        warnings.warn(
            f"the tokenizer has {size} tokens and the model's embedding {self.ids} rows: prompts with one of the others are "
            f"refused; to use them, {remedy}",
            stacklevel=2,
        )


def moving_rope(rotary: nn.Module) -> list[str]:
    """The kinds of this rotary embedding whose frequencies depend on length. Empty for any other module."""
    kinds = getattr(rotary, "rope_type", None) or "default"
    return sorted(set(kinds.values() if isinstance(kinds, dict) else [kinds]) & set(MOVING_ROPE))


def _original_length(rotary: nn.Module) -> int:
    parameters = getattr(rotary.config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    given = [
        p["original_max_position_embeddings"] for p in nested if p.get("original_max_position_embeddings")
    ]
    return min([*given, rotary.original_max_seq_len])
