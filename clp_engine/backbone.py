"""The parts of a causal language model the engine drives itself: decoder stack, attention masks, caches, output projection.

New tokens run against what a cache holds, with gradients where they are asked for: a prompt can run once and its keys and
values serve the whole group of its completions (`repeat_cache`), in rollout, scoring and training alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from clp_engine.errors import ConfigError


@dataclass(frozen=True)
class Head:
    """logits = softcap * tanh(logit_scale * (hidden W^T + b) / softcap); softcap None leaves out the tanh."""

    module: nn.Module
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.module(hidden)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def _find_head(model: PreTrainedModel) -> Head:
    module = model.get_output_embeddings()
    if module is None:
        raise ConfigError(
            f"{type(model).__name__} has no output projection; a causal language model is needed"
        )
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return Head(module, float(scale), getattr(config, "final_logit_softcapping", None))


class _RolloutLayer(DynamicLayer):
    """Keys and values in a buffer allocated once for the whole rollout; attention reads only the filled part."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, repeats: int, capacity: int):
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._length = keys.shape[-2]
        self._keys, self._values = (_grown(t, repeats, capacity) for t in (keys, values))
        self._show()

    def _show(self) -> None:
        self.keys = self._keys[:, :, : self._length]
        self.values = self._values[:, :, : self._length]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        start, self._length = self._length, self._length + key_states.shape[-2]
        self._keys[:, :, start : self._length] = key_states
        self._values[:, :, start : self._length] = value_states
        self._show()
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._keys, self._values = self._keys[indices], self._values[indices]
        self._show()


def _grown(states: torch.Tensor, repeats: int, capacity: int) -> torch.Tensor:
    rows, heads, length, width = states.shape
    buffer = states.new_empty(rows * repeats, heads, capacity, width)
    buffer.view(rows, repeats, heads, capacity, width)[:, :, :, :length] = states.unsqueeze(1)
    return buffer


class Backbone:
    """A transformers causal language model, split at the last hidden state."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.decoder = model.base_model
        if self.decoder is model:
            raise ConfigError(
                f"{type(model).__name__} has no decoder stack under it; a causal language model is needed"
            )
        self.head = _find_head(model)
        config = model.config.get_text_config()
        types = getattr(config, "layer_types", None)
        self._layer_types = set(types) if types else None
        windowed = not types or "sliding_attention" in types
        self._window = getattr(config, "sliding_window", None) if windowed else None
        unsupported = (self._layer_types or set()) - {"full_attention", "sliding_attention"}
        if unsupported:
            raise ConfigError(
                f"{type(model).__name__} has layers of type {', '.join(sorted(unsupported))}; "
                "only full and sliding-window attention are supported"
            )

    def check_head(self) -> None:
        """Raise ConfigError where our split does not reproduce the model's own logits."""
        device = self.model.device
        ids = torch.arange(1, 5, device=device).unsqueeze(0) % self.model.config.get_text_config().vocab_size
        with torch.no_grad():
            expected = self.model(ids).logits
            ours = self.head.logits(self.decoder(ids, use_cache=False).last_hidden_state)
        if not torch.allclose(ours.float(), expected.float(), rtol=1e-3, atol=1e-3):
            raise ConfigError(
                f"{type(self.model).__name__} does something between its last hidden state and its logits that "
                f"is not a projection with scale and softcap (difference {(ours - expected).abs().max():.3g}); "
                "it cannot be used"
            )

    def empty_cache(self) -> DynamicCache:
        # Without the config every layer keeps everything; the masks below cut the sliding windows.
        return DynamicCache()

    @staticmethod
    def repeat_cache(cache: DynamicCache, times: int) -> None:
        """Each row of the cache `times` times in a row; differentiable, so a prompt computed once gets every gradient."""
        if times > 1:
            for layer in cache.layers:
                layer.keys = layer.keys.repeat_interleave(times, 0)
                layer.values = layer.values.repeat_interleave(times, 0)

    def rollout_cache(self, prefilled: DynamicCache, repeats: int, capacity: int) -> DynamicCache:
        """The prompt's cache repeated for a group and given room for `capacity` positions in all."""
        cache = DynamicCache()
        cache.layer_class_to_replicate = None
        cache.layers = [
            _RolloutLayer(layer.keys, layer.values, repeats, capacity) for layer in prefilled.layers
        ]
        return cache

    def _mask(self, keys_valid: torch.Tensor, queries: int, padded: bool) -> torch.Tensor | dict | None:
        """Additive attention mask for the last `queries` of the positions in keys_valid (B, S) bool; None where plain
        causal attention over all keys says the same."""
        rows, length = keys_valid.shape
        over_window = self._window is not None and length > self._window
        if (queries == 1 or queries == length) and not over_window and not padded:
            return None
        device, dtype = keys_valid.device, self.model.dtype
        key = torch.arange(length, device=device)
        query = key[length - queries :].unsqueeze(-1)
        causal = key <= query
        full = self._additive(keys_valid[:, None, None, :] & causal, dtype)
        if not over_window:
            return full
        sliding = self._additive(keys_valid[:, None, None, :] & causal & (key > query - self._window), dtype)
        return {"full_attention": full, "sliding_attention": sliding} if self._layer_types else sliding

    @staticmethod
    def _additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
            ~allowed, torch.finfo(dtype).min
        )

    def extend(
        self,
        ids: torch.Tensor,
        keys_valid: torch.Tensor,
        cache: DynamicCache,
        *,
        positions: torch.Tensor | None = None,
        padded: bool | None = None,
    ) -> torch.Tensor:
        """Hidden states (B, T, H) of the new tokens ids (B, T), which follow what `cache` holds.

        keys_valid: (B, S) bool over cached and new positions together; padding does not count as a position.
        positions, padded: position ids (B, T) and whether keys_valid has padding, where the caller knows them already.
        """
        queries = ids.shape[1]
        if positions is None:
            positions = (keys_valid.long().cumsum(-1) - 1).clamp_min(0)[:, -queries:]
        if padded is None:
            padded = not bool(keys_valid.all())
        return self.decoder(
            input_ids=ids,
            attention_mask=self._mask(keys_valid, queries, padded),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
