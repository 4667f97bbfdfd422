"""Decoders of causal language models, driven through their own stack of layers; see `base`."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from clp_kernels import PrefixLayout
from clp_kernels.launch_errors import launch_errors
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from clp_engine.core.errors import ConfigError
from clp_engine.core.transformers_releases import cache_argument
from clp_engine.models.backbones import packing
from clp_engine.models.backbones.base import Backbone, Context, difference
from clp_engine.models.backbones.kv_cache import join_with_room, repeat_rows, repeat_with_room
from clp_engine.models.backbones.packing import Packed
from clp_engine.models.text_path import text_stack

logger = logging.getLogger(__name__)
# Held during a pass through a decoder: the model's config selects the attention function, and threads share the config.
_ATTENTION = threading.RLock()


class _Recomputing(AbstractContextManager):
    """Contexts that can be entered any number of times, since a retained graph is recomputed in every backward pass."""

    def __init__(self, make: Callable[[], Iterable[AbstractContextManager]]):
        self._make = make

    def __enter__(self) -> None:
        with contextlib.ExitStack() as stack:
            for context in self._make():
                stack.enter_context(context)
            self._stack = stack.pop_all()

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)


class CausalContext(Context):
    """Keys and values of prompts and of the tokens after them.

    cache: keeps every position of every layer.
    valid: (rows, >= length) bool, False for padding. The first `length` positions are filled.
    positions: (rows, 1), position of the next token. Padding is not counted. padded: whether there is any padding.
    """

    def __init__(self, rows: int, padded: bool, device: torch.device):
        # Without a config the cache keeps whole layers. The masks apply the sliding windows.
        self.cache = DynamicCache()
        self.valid = torch.empty(rows, 0, dtype=torch.bool, device=device)
        self.length = 0
        self.positions = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.padded = padded

    def repeat(self, times: int, room: int | None = None) -> None:
        if room is None:
            repeat_rows(self.cache, times)
        else:
            repeat_with_room(self.cache, times, room)
        self.valid = self.valid.repeat_interleave(times, 0)
        self.positions = self.positions.repeat_interleave(times, 0)
        if room is not None:
            self._make_room(room)

    def select(self, rows: torch.Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.valid, self.positions = self.valid[rows], self.positions[rows]

    def join(self, other: CausalContext, room: int) -> None:
        # All rows end at one position. Shorter rows begin later, behind padding, and common leading padding is dropped.
        skip = int(self.valid[:, : self.length].any(0).long().argmax())
        length = max(self.length - skip, other.length)
        join_with_room(self.cache, other.cache, skip, length, room)
        parts = (self.valid[:, skip : self.length], other.valid[:, : other.length])
        self.valid = torch.cat([functional.pad(v, (length - v.shape[1], 0)) for v in parts])
        self.padded = self.padded or other.padded or bool(parts[0].shape[1] != parts[1].shape[1])
        self.positions = torch.cat([self.positions, other.positions])
        self.length = length
        self._make_room(room)

    def _make_room(self, count: int) -> None:
        self.valid = torch.cat([self.valid, self.valid.new_ones(self.valid.shape[0], count)], 1)

    def admit(self, count: int, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Admit `count` new tokens. Returns (valid positions (rows, length) bool, positions of the new tokens)."""
        start, self.length = self.length, self.length + count
        if self.length > self.valid.shape[1]:
            self._make_room(self.length - self.valid.shape[1])
        if valid is None:
            steps = torch.arange(count, device=self.valid.device)
            positions = self.positions if count == 1 else self.positions + steps
            self.positions = self.positions + count
        else:
            self.valid[:, start : self.length] = valid
            positions = (self.positions + valid.long().cumsum(-1) - 1).clamp_min(0)
            self.positions = self.positions + valid.sum(-1, keepdim=True)
        return self.valid[:, : self.length], positions


class CausalBackbone(Backbone):
    """A decoder without encoder: prompt and completion are one sequence. For text and images, the language model's decoder.

    Packed tokens are tried when `packing_fault` is first read on a kind of device: a CPU and a GPU have different kernels.
    """

    contexts_join = True
    _tried_on = _fault = None

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        self.decoder = text_stack(model)
        if self.decoder is model:
            raise ConfigError(
                f"{type(model).__name__} has no decoder stack under it; a causal language model is needed"
            )
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

    @property
    def packing_fault(self) -> str | None:
        device = self.model.device.type
        if device != self._tried_on:
            self.packing_fault = self._try_packing()
            if self._fault is not None and device == "cuda":
                logger.warning(
                    "%s on a GPU: %s. Batches are therefore padded, prompts and completions run in two passes, and "
                    "decoding has neither slots nor CUDA graphs",
                    type(self.model).__name__,
                    self._fault,
                )
        return self._fault

    @packing_fault.setter
    def packing_fault(self, reason: str | None) -> None:
        self._fault, self._tried_on = reason, self.model.device.type

    def prefill(
        self, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor
    ) -> tuple[torch.Tensor, CausalContext]:
        padded = not bool(prompt_mask.all())
        context = CausalContext(prompt_ids.shape[0], padded, prompt_ids.device)
        return self.extend(context, prompt_ids, prompt_mask if padded else None)[:, -1:], context

    def extend(
        self, context: CausalContext, ids: torch.Tensor, valid: torch.Tensor | None = None
    ) -> torch.Tensor:
        keys_valid, positions = context.admit(ids.shape[1], valid)
        mask = self._mask(keys_valid, ids.shape[1], context.padded)
        context.padded = context.padded or valid is not None
        with _ATTENTION:
            return self.decoder(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                **{cache_argument(type(self.decoder)): context.cache},
            ).last_hidden_state

    def packed(self, batch: Packed) -> torch.Tensor:
        with self._attending(batch.layout):
            return self.decoder(
                input_ids=batch.ids.unsqueeze(0), position_ids=batch.positions.unsqueeze(0), use_cache=False
            ).last_hidden_state[0]

    @contextlib.contextmanager
    def attention(self, name: str) -> Iterator[None]:
        """Use the attention function registered with transformers under `name` inside the block."""
        config = self.decoder.config
        with _ATTENTION:
            before = config._attn_implementation_internal
            config._attn_implementation_internal = name
            try:
                yield
            finally:
                config._attn_implementation_internal = before

    @contextlib.contextmanager
    def _attending(self, layout: PrefixLayout) -> Iterator[None]:
        """Use the attention over packed tokens, with this layout, inside the block."""
        with self.attention(packing.NAME), packing.attending(layout):
            yield

    def checkpoint_layers(self, in_force: Callable[[], Callable[[], AbstractContextManager]]) -> None:
        """Make packed passes keep only the inputs of layers, and recompute each layer in the backward pass.

        transformers' own switch would turn dropout on.

        in_force: called when a layer runs, under any blend. It returns a function that makes contexts with the same blend in
            force.
        """
        if self.packing_fault is not None:
            raise ConfigError(
                f"gradient_checkpointing needs a model that takes packed tokens; {type(self.model).__name__}: "
                f"{self.packing_fault}"
            )

        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            again, layout = in_force(), packing.layout_in_force()
            return contextlib.nullcontext(), _Recomputing(lambda: (again(), self._attending(layout)))

        def checkpointed(forward: Callable) -> Callable:
            @functools.wraps(forward)
            def run(*args, **kwargs):
                if packing.layout_in_force() is None or not torch.is_grad_enabled():
                    return forward(*args, **kwargs)
                return checkpoint(
                    forward,
                    *args,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=contexts,
                    **kwargs,
                )

            run.changes_no_numbers = True
            return run

        layers = [m for m in self.decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            raise ConfigError(f"{type(self.model).__name__} has no layers that transformers can checkpoint")
        for layer in layers:
            layer.forward = checkpointed(layer.forward)

    def _try_packing(self) -> str | None:
        """The reason why the model does not take packed tokens; None if their logits are those of plain tokens."""
        device = self.model.device
        # Two prompts with two completions each: the result for one must not depend on another. On a GPU there are more tokens
        # than a block of flex_attention has, so that what is compiled here serves later passes, too.
        length = 3 if device.type == "cpu" else 24
        vocabulary = self.model.config.get_text_config().vocab_size
        ids = torch.arange(1, 1 + 6 * length, device=device) * 7 % vocabulary
        prompts, completions = ids[: 2 * length].view(2, length), ids[2 * length :].view(4, length)
        lengths = torch.tensor([length, length - 1])
        batch = packing.pack(prompts, lengths, completions, torch.full((4,), length))
        with torch.no_grad():
            expected = [
                self._plain_logits(prompts[b // 2 : b // 2 + 1, b // 2 :], completions[b : b + 1])
                for b in range(4)
            ]
            try:
                ours = self.head.logits(self.packed(batch)[batch.predictors])
            except (*launch_errors(), TypeError, ValueError, AttributeError, KeyError) as error:
                return f"it does not take packed tokens ({error})"
        if found := difference(ours, torch.cat(expected, 1)[0]):
            return f"its packed tokens have other logits than plain ones (difference {found:.3g})"
        return None

    def _plain_logits(self, prompt_ids: torch.Tensor, completion_ids: torch.Tensor) -> torch.Tensor:
        logits = self.model(torch.cat([prompt_ids, completion_ids], 1)).logits
        return logits[:, prompt_ids.shape[1] - 1 : -1]

    def _mask(self, keys_valid: torch.Tensor, queries: int, padded: bool) -> torch.Tensor | dict | None:
        """Additive attention mask for the last `queries` positions of keys_valid (B, S) bool.

        None if plain causal attention over all keys is equivalent.
        """
        rows, length = keys_valid.shape
        over_window = self._window is not None and length > self._window
        if (queries == 1 or queries == length) and not over_window and not padded:
            return None
        device = keys_valid.device
        key = torch.arange(length, device=device)
        query = key[length - queries :].unsqueeze(-1)
        causal = key <= query
        full = self.additive_mask(keys_valid[:, None, None, :] & causal)
        if not over_window:
            return full
        sliding = self.additive_mask(keys_valid[:, None, None, :] & causal & (key > query - self._window))
        return {"full_attention": full, "sliding_attention": sliding} if self._layer_types else sliding
