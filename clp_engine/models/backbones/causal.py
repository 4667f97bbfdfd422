"""The parts of a language model the engine drives itself: attention masks, caches, the stack of layers, output projection.

A prompt runs once and what it leaves behind, a context, serves the whole group of its completions, in rollout, scoring and
training alike, with gradients where they are asked for:

    hidden, context = backbone.prefill(prompt_ids, prompt_mask)     # predicts the first token of the completion
    context.repeat(group)                                           # each prompt's rows for its whole group
    hidden = backbone.extend(context, completion_ids)               # predicts the token after each

Where nothing has to be kept for later tokens, prompts and completions run in one pass as one row of packed tokens, if the model
takes it (`packing_fault` is None):

    hidden = backbone.packed(packed)                                # `packing.Packed` -> the state of each token

`CausalBackbone` is here, `EncoderDecoderBackbone` in `encoder_decoder`; `make_backbone` takes the one that fits.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from clp_kernels import PrefixLayout
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from clp_engine.core.errors import ConfigError
from clp_engine.core.transformers_releases import cache_argument, keep_softcap
from clp_engine.models.backbones import packing
from clp_engine.models.backbones.kv_cache import join_with_room, repeat_rows, repeat_with_room
from clp_engine.models.backbones.packing import Packed
from clp_engine.models.text_path import text_stack

# Held by a pass through a decoder: which attention it runs stands in the model's config, which threads share.
_ATTENTION = threading.RLock()

# Families that scale the last hidden state exactly where the projection is tied, if their config does not say more.
_SCALED_WHERE_TIED = ("t5", "longt5", "umt5", "switch_transformers")


@dataclass(frozen=True)
class Head:
    """logits = softcap * tanh(logit_scale * (hidden W^T + b) / softcap); softcap None leaves out the tanh.

    offset: (V,), what the model adds to its logits beside the bias of the projection (BART's final_logits_bias), or None.
    """

    module: nn.Module
    logit_scale: float = 1.0
    softcap: float | None = None
    offset: torch.Tensor | None = None

    @property
    def bias(self) -> torch.Tensor | None:
        """`b` (V,): the projection's own bias and the offset."""
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
    """What rows have read so far, as far as the tokens that follow need it; `Backbone.extend` adds to it in place."""

    @abstractmethod
    def repeat(self, times: int, room: int | None = None) -> None:
        """Each row `times` times in a row. Differentiable, or, given `room`, in buffers that take that many further tokens
        without being allocated again."""

    @abstractmethod
    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows (indices), in this order."""

    def join(self, other: Context, room: int) -> None:
        """Take the other's rows behind one's own, all with room for `room` further tokens; both made by repeat(room=...)."""
        raise NotImplementedError


class Backbone(ABC):
    """A transformers language model, split at the last hidden state."""

    # Why the model does not take packed tokens, or None where it does.
    packing_fault: str | None = "it has an encoder, whose tokens all attend to each other"
    # Whether a prompt's context can serve all of its completions.
    shares_prompts = True
    # Whether contexts of other lengths can join one that rows are on their way in.
    contexts_join = False

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.head = find_head(model)

    def packed(self, batch: Packed) -> torch.Tensor:
        """Hidden states (N, H) of packed tokens, each of which predicts the token after it."""
        raise NotImplementedError

    @abstractmethod
    def prefill(self, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor) -> tuple[torch.Tensor, Context]:
        """(hidden (P, 1, H) that predicts the first token after each prompt, context). prompt_ids, prompt_mask (P, S),
        left-padded."""

    @abstractmethod
    def extend(self, context: Context, ids: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states (rows, T, H) of the new tokens ids (rows, T), each of which predicts the token after it.

        valid: (rows, T) bool, False for padding, which may only follow a row's tokens; None where there is none.
        """

    @abstractmethod
    def _plain_logits(self, prompt_ids: torch.Tensor, completion_ids: torch.Tensor) -> torch.Tensor:
        """Logits (rows, T, V) of completions (rows, T) after unpadded prompts, by one pass of the model itself."""

    def check_head(self) -> None:
        """Raise ConfigError where our split does not reproduce the model's own logits, to what its dtype can tell: one pass
        and a pass in two parts round differently, and so do a scaled hidden state and a scaled logit."""
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
        """(1, 6), tokens to try the model with."""
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
        """0 where attention is allowed and the least number elsewhere, in the model's dtype."""
        dtype = self.model.dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
            ~allowed, torch.finfo(dtype).min
        )


def difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference between logits, 0 where it is what rounding makes."""
    found = (ours.float() - expected.float()).abs().max().item()
    tolerance = max(1e-3, 8 * torch.finfo(expected.dtype).eps)
    return 0.0 if found <= tolerance * max(1.0, expected.abs().max().item()) else found


def make_backbone(model: PreTrainedModel) -> Backbone:
    """The backbone for a causal or an encoder-decoder language model, tried out. Raises ConfigError for others."""
    keep_softcap(model)
    if getattr(model.config, "is_encoder_decoder", False):
        from clp_engine.models.backbones.encoder_decoder import EncoderDecoderBackbone

        backbone = EncoderDecoderBackbone(model)
        backbone.check_head()
        return backbone
    try:
        backbone = CausalBackbone(model)
        backbone.check_head()
        backbone.check_packing()
    except ConfigError as error:
        from clp_engine.models.backbones.whole_sequences import WholeSequenceBackbone

        backbone = WholeSequenceBackbone(model, str(error))
        backbone.check_head()
    return backbone


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
