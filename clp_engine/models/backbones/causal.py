"""Decoders of a causal language model, driven by their own stack of layers; see `base`."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from clp_kernels import PrefixLayout
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

# Held by a pass through a decoder: which attention it runs stands in the model's config, which threads share.
_ATTENTION = threading.RLock()


class _Recomputing(AbstractContextManager):
    """Contexts that can be entered any number of times: a graph that is kept is computed again at every pass."""

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
    """Keys and values of prompts and what follows them.

    cache: every layer keeps everything. valid: (rows, >= length) bool, which positions are not padding; `length` of them are
    filled. positions: (rows, 1), of the next token: padding does not count as a position. padded: whether any is padding.
    """

    def __init__(self, rows: int, padded: bool, device: torch.device):
        # Without the config no layer cuts its sliding window: the masks do.
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
        # Rows end at one position: the shorter ones begin later, behind padding that the longer ones do not have.
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
        """Take in `count` new tokens -> (which positions are valid (rows, length), positions of the new ones)."""
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
    """A decoder alone: prompt and completion are one sequence. Of a model of text and images, its language model's."""

    contexts_join = True

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        self.decoder = text_stack(model)
        self.packing_fault = None
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
        """Inside, the decoder's attention is the function registered with transformers under this name."""
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
        """Inside, it is that of packed tokens."""
        with self.attention(packing.NAME), packing.attending(layout):
            yield

    def checkpoint_layers(self, in_force: Callable[[], Callable[[], AbstractContextManager]]) -> None:
        """From now on packed passes keep the inputs of layers alone and compute the rest again in the backward pass, each layer
        when its turn comes.

        in_force: called where a layer runs, under whatever blend; what it returns makes contexts in which the same is in force.
        transformers' own switch would turn dropout on.
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

    def check_packing(self) -> None:
        """Set `packing_fault`: nothing is known of a model's attention until packed tokens give the logits of plain ones."""
        # Two prompts, one with two completions: what is computed of one must not depend on another.
        vocabulary = self.model.config.get_text_config().vocab_size
        ids = torch.arange(1, 19, device=self.model.device) * 7 % vocabulary
        prompts, completions = ids[:6].view(2, 3), ids[6:].view(4, 3)
        batch = packing.pack(prompts, torch.tensor([3, 2]), completions, torch.full((4,), 3))
        with torch.no_grad():
            expected = [
                self._plain_logits(prompts[b // 2 : b // 2 + 1, b // 2 :], completions[b : b + 1])
                for b in range(4)
            ]
            try:
                ours = self.head.logits(self.packed(batch)[batch.predictors])
            except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
                self.packing_fault = f"it does not take packed tokens ({error})"
                return
        if found := difference(ours, torch.cat(expected, 1)[0]):
            self.packing_fault = (
                f"its packed tokens have other logits than plain ones (difference {found:.3g})"
            )

    def _plain_logits(self, prompt_ids: torch.Tensor, completion_ids: torch.Tensor) -> torch.Tensor:
        logits = self.model(torch.cat([prompt_ids, completion_ids], 1)).logits
        return logits[:, prompt_ids.shape[1] - 1 : -1]

    def _mask(self, keys_valid: torch.Tensor, queries: int, padded: bool) -> torch.Tensor | dict | None:
        """Additive attention mask for the last `queries` of the positions in keys_valid (B, S) bool; None where plain
        causal attention over all keys says the same."""
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
