"""The parts of a language model that the engine drives itself: attention masks, caches, the layer stack, output projection.

A prompt runs once. Its result, a context, serves the whole group of its completions, in rollout, scoring and training. It
carries gradients if they are enabled:

    hidden, context = backbone.prefill(prompt_ids, prompt_mask)     # predicts the first token of the completion
    context.repeat(group)                                           # each prompt's rows for its whole group
    hidden = backbone.extend(context, completion_ids)               # predicts the token after each

If no state is needed for later tokens and the model takes packed tokens (`packing_fault` is None), prompts and completions run
in one pass as one row of packed tokens:

    hidden = backbone.packed(packed)                                # `packing.Packed` -> hidden state of each token

`choice.make_backbone` chooses the backbone for a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from clp_engine.core.errors import ConfigError
from clp_engine.models.backbones.packing import Packed

# Families that scale the last hidden state exactly if the projection is tied, unless their config says otherwise.
_SCALED_WHERE_TIED = ("t5", "longt5", "umt5", "switch_transformers")


@dataclass(frozen=True)
class Head:
    """logits = softcap * tanh(logit_scale * (hidden W^T + b) / softcap). With softcap None there is no tanh.

    offset: (V,), a vector that the model adds to its logits beside the projection's bias (BART's final_logits_bias), or None.
    """

    module: nn.Module
    logit_scale: float = 1.0
    softcap: float | None = None
    offset: torch.Tensor | None = None

    @property
    def bias(self) -> torch.Tensor | None:
        """`b` (V,): the sum of the projection's own bias and the offset."""
        own = self.module.bias
        if self.offset is None or own is None:
            return own if self.offset is None else self.offset
        return own + self.offset

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.module(hidden)
        if self.offset is not None:
            logits = logits + self.offset
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def find_head(model: PreTrainedModel) -> Head:
    module = model.get_output_embeddings()
    if module is None:
        raise ConfigError(
            f"{type(model).__name__} has no output projection; a causal language model or an encoder-decoder "
            "with a language modelling head is needed"
        )
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    if getattr(
        config,
        "scale_decoder_outputs",
        config.model_type in _SCALED_WHERE_TIED and config.tie_word_embeddings,
    ):
        scale *= config.d_model**-0.5
    offset = getattr(model, "final_logits_bias", None)
    return Head(
        module,
        float(scale),
        getattr(config, "final_logit_softcapping", None),
        None if offset is None else offset[0],
    )


class Context(ABC):
    """The state of rows after the tokens they have read, as later tokens need it. `Backbone.extend` appends to it in place."""

    @abstractmethod
    def repeat(self, times: int, room: int | None = None) -> None:
        """Repeat each row `times` times in succession.

        room: None makes the result differentiable. A number copies the rows to buffers that take so many further tokens without
            a new allocation.
        """

    @abstractmethod
    def select(self, rows: torch.Tensor) -> None:
        """Keep the rows with these indices, in this order."""

    def join(self, other: Context, room: int) -> None:
        """Append the other context's rows, with room for `room` further tokens. Both must come from repeat(room=...)."""
        raise NotImplementedError


class Backbone(ABC):
    """A transformers language model, split after the last hidden state."""

    # The reason why the model does not take packed tokens, or None if it takes them.
    packing_fault: str | None = "it has an encoder, whose tokens all attend to each other"
    # Whether a prompt's context can serve all of its completions.
    shares_prompts = True
    # Whether rows can join a context when they have read another number of tokens.
    contexts_join = False

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.head = find_head(model)

    def packed(self, batch: Packed) -> torch.Tensor:
        """Hidden states (N, H) of packed tokens. Each predicts the token after it."""
        raise NotImplementedError

    @abstractmethod
    def prefill(self, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor) -> tuple[torch.Tensor, Context]:
        """Run left-padded prompts (P, S) with their mask. Returns (hidden (P, 1, H), context).

        hidden predicts the first token after each prompt.
        """

    @abstractmethod
    def extend(self, context: Context, ids: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states (rows, T, H) of the new tokens ids (rows, T). Each predicts the token after it.

        valid: (rows, T) bool, False for padding, which may only follow a row's tokens. None means that there is no padding.
        """

    @abstractmethod
    def _plain_logits(self, prompt_ids: torch.Tensor, completion_ids: torch.Tensor) -> torch.Tensor:
        """Logits (rows, T, V) of completions (rows, T) after unpadded prompts, from one pass of the model itself."""

    def check_head(self) -> None:
        """Raises ConfigError if the split at the hidden state does not reproduce the model's own logits.

        The tolerance allows for the model's dtype: one pass and a pass in two parts round differently, and so do a scaled
        hidden state and a scaled logit.
        """
        kind, ids = type(self.model).__name__, self._probe()
        prompt, completion = ids[:, :3], ids[:, 3:]
        with torch.no_grad():
            expected = self._plain_logits(prompt, completion)
            try:
                first, context = self.prefill(prompt, torch.ones_like(prompt, dtype=torch.bool))
                context.repeat(1)
                ours = self.head.logits(torch.cat([first, self.extend(context, completion[:, :-1])], 1))
            except (RuntimeError, TypeError, ValueError, AttributeError) as error:
                raise ConfigError(
                    f"{kind} does not take masks and caches as other models of transformers do, and cannot be used: "
                    f"{error}"
                ) from error
        self._compare(ours, expected)

    def _probe(self) -> torch.Tensor:
        """(1, 6) tokens for trying the model."""
        vocabulary = self.model.config.get_text_config().vocab_size
        return torch.arange(1, 7, device=self.model.device).unsqueeze(0) % vocabulary

    def _compare(self, ours: torch.Tensor, expected: torch.Tensor) -> None:
        if found := difference(ours, expected):
            raise ConfigError(
                f"{type(self.model).__name__} does something between its tokens and its logits that is not a stack of "
                f"layers with a cache, then a projection with bias, scale and softcap (difference {found:.3g}); "
                "it cannot be used"
            )

    def additive_mask(self, allowed: torch.Tensor) -> torch.Tensor:
        """An additive mask in the model's dtype: 0 where attention is allowed, the dtype's least number elsewhere."""
        dtype = self.model.dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
            ~allowed, torch.finfo(dtype).min
        )


def difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference between logits, or 0 if rounding explains it."""
    found = (ours.float() - expected.float()).abs().max().item()
    tolerance = max(1e-3, 8 * torch.finfo(expected.dtype).eps)
    return 0.0 if found <= tolerance * max(1.0, expected.abs().max().item()) else found
