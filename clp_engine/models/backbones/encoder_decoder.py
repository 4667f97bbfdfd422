"""Encoder-decoder models (T5, BART, ...) with the interface of `base`.

The prompt runs through the encoder once, and its keys and values for the decoder's attention are computed once. The decoder's
start token predicts the completion's first token. No token is forced: `forced_bos_token_id` of the generation config is
ignored, since a policy draws every token.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from clp_engine.core.errors import ConfigError
from clp_engine.core.transformers_releases import cache_argument
from clp_engine.models.backbones.base import Backbone, Context
from clp_engine.models.backbones.kv_cache import repeat_rows, repeat_with_room

# Their attention takes (positions, rows, H), so that a layer could not match rows with blends.
_POSITIONS_FIRST = ("led", "fsmt")


class EncoderDecoderContext(Context):
    """Keys and values of the decoder's own tokens, and of the prompt.

    prompt_mask: additive (rows, 1, 1, S), or None if no prompt is padded.
    states: the encoder's output (rows, S, H) until its keys and values exist. After that, a tensor of NaN with the same shape:
        decoders only test whether they get one.
    """

    def __init__(self, states: torch.Tensor, prompt_mask: torch.Tensor | None):
        self.own, self.prompt = DynamicCache(), DynamicCache()
        self.states, self.prompt_mask = states, prompt_mask

    def repeat(self, times: int, room: int | None = None) -> None:
        repeat_rows(self.prompt, times)
        if room is None:
            repeat_rows(self.own, times)
        else:
            repeat_with_room(self.own, times, room)
        self._resize(self.states.shape[0] * times)
        if self.prompt_mask is not None:
            self.prompt_mask = self.prompt_mask.repeat_interleave(times, 0)

    def select(self, rows: torch.Tensor) -> None:
        self.own.batch_select_indices(rows)
        self.prompt.batch_select_indices(rows)
        self._resize(len(rows))
        if self.prompt_mask is not None:
            self.prompt_mask = self.prompt_mask[rows]

    def _resize(self, rows: int) -> None:
        self.states = self.states.new_full((), torch.nan).expand(rows, *self.states.shape[1:])


class EncoderDecoderBackbone(Backbone):
    """An encoder for the prompt and a decoder for the completion."""

    def __init__(self, model: PreTrainedModel):
        if model.config.model_type in _POSITIONS_FIRST:
            raise ConfigError(
                f"{type(model).__name__} puts positions before rows inside its attention, so that rows cannot have "
                "blends of their own; use another model, such as BART, T5 or LongT5"
            )
        super().__init__(model)
        self.encoder, self.decoder = model.get_encoder(), model.get_decoder()
        if self.encoder is model or self.decoder is model:
            raise ConfigError(
                f"{type(model).__name__} has no encoder and decoder under it; an encoder-decoder language model "
                "is needed"
            )
        self.start_token_id = _start_token_id(model)

    def prefill(
        self, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor
    ) -> tuple[torch.Tensor, EncoderDecoderContext]:
        mask = None
        if not bool(prompt_mask.all()):
            # Encoders with absolute positions (BART) count from the left, so padding must be on the right.
            order = (~prompt_mask).long().argsort(dim=-1, stable=True)
            prompt_ids, prompt_mask = prompt_ids.gather(1, order), prompt_mask.gather(1, order)
            mask = self.additive_mask(prompt_mask[:, None, None, :])
        states = self.encoder(
            input_ids=prompt_ids, attention_mask=None if mask is None else prompt_mask.long()
        ).last_hidden_state
        context = EncoderDecoderContext(states, mask)
        start = prompt_ids.new_full((prompt_ids.shape[0], 1), self.start_token_id)
        return self.extend(context, start), context

    def extend(
        self, context: EncoderDecoderContext, ids: torch.Tensor, valid: torch.Tensor | None = None
    ) -> torch.Tensor:
        # All rows start at the same position, and attention is causal: padding behind a completion affects no other token.
        length = context.own.get_seq_length() + ids.shape[1]
        key = torch.arange(length, device=ids.device)
        causal = key <= key[length - ids.shape[1] :].unsqueeze(-1)
        return self.decoder(
            input_ids=ids,
            attention_mask=self.additive_mask(causal[None, None]),
            encoder_hidden_states=context.states,
            encoder_attention_mask=context.prompt_mask,
            use_cache=True,
            **{cache_argument(type(self.decoder)): EncoderDecoderCache(context.own, context.prompt)},
        ).last_hidden_state

    def _plain_logits(self, prompt_ids: torch.Tensor, completion_ids: torch.Tensor) -> torch.Tensor:
        start = completion_ids.new_full((completion_ids.shape[0], 1), self.start_token_id)
        return self.model(
            input_ids=prompt_ids, decoder_input_ids=torch.cat([start, completion_ids[:, :-1]], 1)
        ).logits


def _start_token_id(model: PreTrainedModel) -> int:
    """The token that a decoder starts with, found as in transformers' generate."""
    for name in ("decoder_start_token_id", "bos_token_id"):
        for source in (model.generation_config, model.config):
            value = getattr(source, name, None)
            if value is not None:
                return int(value[0] if isinstance(value, list) else value)
    raise ConfigError(
        f"{type(model).__name__} has no decoder_start_token_id; set model.config.decoder_start_token_id"
    )
