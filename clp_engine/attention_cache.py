"""Keys and values of attention layers: repeated for a group, with room for a rollout, rows taken out. For transformers' caches.

A cache is `DynamicCache` of layers with `keys` and `values` (rows, heads, length, width).
"""

from __future__ import annotations

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RolloutLayer(DynamicLayer):
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


def repeat_rows(cache: DynamicCache, times: int) -> None:
    """Each row `times` times in a row; differentiable, so what was computed once gets the gradients of all that use it."""
    if times > 1:
        for layer in cache.layers:
            layer.keys = layer.keys.repeat_interleave(times, 0)
            layer.values = layer.values.repeat_interleave(times, 0)


def repeat_with_room(cache: DynamicCache, times: int, room: int) -> None:
    """Each row `times` times in a row, in buffers that have room for `room` further positions; not differentiable."""
    cache.layers = [
        RolloutLayer(layer.keys, layer.values, times, layer.keys.shape[-2] + room) for layer in cache.layers
    ]
