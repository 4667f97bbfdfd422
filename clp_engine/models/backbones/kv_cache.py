"""Operations on transformers' caches of keys and values: repeat rows for a group, reserve room for a rollout, select rows.

A cache is a `DynamicCache` of layers with `keys` and `values` (rows, heads, length, width).
"""

from __future__ import annotations

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RolloutLayer(DynamicLayer):
    """Keys and values in buffers allocated once for a whole rollout. Attention reads only the filled part."""

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

    def join(self, other: RolloutLayer, skip: int, length: int, room: int) -> None:
        """Append the other layer's rows, and drop the first `skip` positions of the own rows. All rows end at `length`."""
        parts = [(self.keys[:, :, skip:], self.values[:, :, skip:]), (other.keys, other.values)]
        rows, (_, heads, _, width) = sum(len(k) for k, _ in parts), self.keys.shape
        # Empty positions hold zeros: a masked position is multiplied by a weight of zero, which would not remove a NaN.
        buffers = [self.keys.new_zeros(rows, heads, length + room, width) for _ in range(2)]
        start = 0
        for part in parts:
            stop = start + len(part[0])
            for buffer, states in zip(buffers, part):
                buffer[start:stop, :, length - states.shape[2] : length] = states
            start = stop
        self._keys, self._values = buffers
        self._length = length
        self._show()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._keys, self._values = self._keys[indices], self._values[indices]
        self._show()


def _grown(states: torch.Tensor, repeats: int, capacity: int) -> torch.Tensor:
    rows, heads, length, width = states.shape
    buffer = states.new_empty(rows * repeats, heads, capacity, width)
    buffer.view(rows, repeats, heads, capacity, width)[:, :, :, :length] = states.unsqueeze(1)
    return buffer


def repeat_rows(cache: DynamicCache, times: int) -> None:
    """Repeat each row `times` times in succession. Differentiable: a shared row gets the gradients of all its copies."""
    if times > 1:
        for layer in cache.layers:
            layer.keys = layer.keys.repeat_interleave(times, 0)
            layer.values = layer.values.repeat_interleave(times, 0)


def join_with_room(cache: DynamicCache, other: DynamicCache, skip: int, length: int, room: int) -> None:
    """Join the rows of two caches from `repeat_with_room` in buffers with `room` positions after the first `length`."""
    for layer, more in zip(cache.layers, other.layers, strict=True):
        layer.join(more, skip, length, room)


def repeat_with_room(cache: DynamicCache, times: int, room: int) -> None:
    """Repeat each row `times` times in succession, in buffers with room for `room` further positions. Not differentiable."""
    cache.layers = [
        RolloutLayer(layer.keys, layer.values, times, layer.keys.shape[-2] + room) for layer in cache.layers
    ]
