"""Decoding with a whole Llama-like decoder on the CPU.

`Decoding.step` computes one token of a whole batch in one call. `Decoding.write` also draws the tokens, and runs until rows
have ended.

    x = s_e embedding[token]
    for each layer:
        n = norm_1(x);  q, k, v = W_q n, W_k n, W_v n;  q, k = rope(norm_q(q)), rope(norm_k(k))
        x += s_r norm_2(W_o softmax(cap(s_a q K^T)) V)              K, V: the prompt's, shared by its rows, then the row's own
        x += s_r norm_4(W_down (f(W_gate n) * W_up n)),  n = norm_3(x)
    logits = cap(s_l (W_head norm(x) + b))                          cap(z) = c tanh(z / c)

    norm(x) = x / sqrt(mean x^2 + eps) * gain;  every W x is  W x + b + B (gate * (A x))  if the layer has low-rank factors

Norms, biases, caps and scales that are None are left out. All computation is in float32. Weights, biases and keys may be given
as bfloat16, whose numbers float32 represents exactly. A row's logits have the same bits whatever other rows are in the batch,
and on any number of threads.

Weights are packed once into the panels that the micro-kernels read, and kept beside the model's own. The copy takes 4 bytes a
parameter. With AMX tiles it takes 6 bytes, because a float32 number becomes three bfloat16 parts (csrc/cpu/matmul.hpp explains
why that is float32), or 2 bytes for a matrix of bfloat16 numbers, as in most checkpoints. Low-rank factors change with every
optimiser step and are packed for each rollout. Prompts' keys and values are stored once, whatever the number of rows.

A step of `rows` rows over N parameters of matrices and C cached elements takes at least
max(2 rows N / rate, (packed bytes of N + 4 C) / bandwidth). Each low-rank layer adds rank (n + k) to N.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from clp_kernels.sampling import checked_number

ACTIVATIONS = ("silu", "gelu_tanh")
# Linear layers that read the same input, in the order of the native layer.
_INPUTS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
_ALIGN, _PARTS, _LARGE_PAGE = 16, 3, 1 << 21
_STORED = (torch.float32, torch.bfloat16)  # dtypes in which weights and keys may be given


@dataclass(frozen=True)
class Linear:
    """weight (n, k), bias (n,) or None."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class LowRank:
    """a (R, k), b (n, R), gate (prompts, R): the low-rank factors that a rollout adds to a linear layer."""

    a: Tensor
    b: Tensor
    gate: Tensor


@dataclass(frozen=True)
class DecoderLayer:
    """The norms and linear layers of one decoder layer.

    Gains are (hidden,) for the norms in front of attention and MLP and behind them. The gains for queries and keys are
    (head_dim,), or as long as all heads together.

    window: the number of keys that a query sees, itself included; None for all. rope: the index of the layer's rope table.
    """

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear
    up: Linear
    down: Linear
    norm_attention: Tensor | None = None
    norm_attended: Tensor | None = None
    norm_mlp: Tensor | None = None
    norm_out: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    window: int | None = None
    rope: int = 0


@dataclass(frozen=True)
class DecoderWeights:
    """A decoder: embedding (V, hidden), layers, norm (hidden,), head (V, hidden). Scales and softcaps are as in the formula."""

    embedding: Tensor
    layers: Sequence[DecoderLayer]
    norm: Tensor
    head: Linear
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    activation: str = "silu"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float = 1.0
    attention_softcap: float | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def linears(self) -> dict[tuple[int, str], Linear]:
        """The linear layers by (layer, name). The head is (-1, "head")."""
        named = {
            (i, name): getattr(layer, name)
            for i, layer in enumerate(self.layers)
            for names in _INPUTS
            for name in names
        }
        return named | {(-1, "head"): self.head}


def _refuse(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
) -> None:
    if tensor.dtype not in dtypes or tensor.device.type != "cpu":
        raise TypeError(
            f"Decoder: {name} is {tensor.dtype} on {tensor.device}; expected {' or '.join(map(str, dtypes))} on a CPU"
        )
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"Decoder: {name} is {tuple(tensor.shape)}; expected {shape}")


def _rounded(n: int) -> int:
    return -(-n // _ALIGN) * _ALIGN


def _buffer(count: int) -> Tensor:
    """(count,) uint8 at an address that is a multiple of 64, in large pages if the system has them.

    Weights are read from one end to the other, and processors do not prefetch across the end of a page.
    """
    if count < _LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        buffer, align = torch.empty(count + 64, dtype=torch.uint8), 64
    else:
        pages = mmap.mmap(-1, count + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # the operating system may have no large pages
            pages.madvise(mmap.MADV_HUGEPAGE)
        buffer, align = torch.frombuffer(pages, dtype=torch.uint8), _LARGE_PAGE
    start = -buffer.data_ptr() % align
    return buffer[start : start + count]


def _packed(native, weight: Tensor, parts: int = _PARTS) -> Tensor:
    n, k = weight.shape
    weight = weight.float()
    packed = _buffer(native.packed_bytes(n, k, parts))
    native.pack_weight(
        weight.data_ptr(), *weight.stride(), n, k, parts, packed.data_ptr(), torch.get_num_threads()
    )
    return packed


def _parts(native, weight: Tensor) -> int:
    """The number of bfloat16 parts that hold the weight exactly: 1 if possible and supported, otherwise all parts."""
    exact = native.packs_parts() and torch.equal(weight, weight.bfloat16().to(weight.dtype))
    return 1 if exact else _PARTS


def _padded(x: Tensor | None) -> Tensor | None:
    """x in float32, padded with zeros to a multiple of 16."""
    if x is None:
        return None
    out = torch.zeros(_rounded(x.shape[0]))
    out[: x.shape[0]] = x.detach()
    return out


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class PackedDecoder:
    """`weights` in the layout of the kernels, for any number of rollouts. Valid until the weights change.

    Raises TypeError for a dtype or device that the kernels do not take, ValueError for shapes that do not fit each other, and
    RuntimeError if the native extension is missing.
    """

    def __init__(self, weights: DecoderWeights):
        from clp_kernels.backends import backends

        if not (status := backends()["cpu"]).available:
            raise RuntimeError(f"Decoder: {status.reason}")
        from clp_kernels import _native

        self.weights, self._native, self.isa = weights, _native, _native.isa()
        self._check()
        with torch.no_grad():
            # A matrix that is used twice (tied projections of several layers) is packed once.
            by_storage: dict[tuple, tuple[Tensor, int]] = {}
            self.packed: dict[tuple[int, str], tuple[Tensor, int]] = {}
            for key, linear in weights.linears().items():
                w = linear.weight
                identity = (w.data_ptr(), w.shape, w.stride())
                if identity not in by_storage:
                    parts = _parts(_native, w)
                    by_storage[identity] = _packed(_native, w, parts), parts
                self.packed[key] = by_storage[identity]
            self.biases = {key: _padded(linear.bias) for key, linear in weights.linears().items()}
            self.embedding = weights.embedding.detach().float().contiguous()
            self.gains = [
                {f.name: _padded(getattr(layer, f.name)) for f in fields(layer) if "norm" in f.name}
                for layer in weights.layers
            ]
            self.norm = _padded(weights.norm)

    @property
    def memory(self) -> int:
        """Bytes of the packed copy."""
        return sum(p.numel() for p in {id(p): p for p, _ in self.packed.values()}.values())

    def _check(self) -> None:
        w = self.weights
        hidden, inner, inner_kv = w.embedding.shape[1], w.heads * w.head_dim, w.kv_heads * w.head_dim
        if w.heads % w.kv_heads or not w.layers:
            raise ValueError(
                f"Decoder: {w.heads} heads of queries, {w.kv_heads} of keys and {len(w.layers)} layers; expected a multiple, "
                "and at least one layer"
            )
        if w.activation not in ACTIVATIONS:
            raise ValueError(
                f"Decoder: activation {w.activation!r}; expected one of {', '.join(ACTIVATIONS)}"
            )
        middle = w.layers[0].gate.weight.shape[0]
        shapes = {
            "q": (inner, hidden),
            "k": (inner_kv, hidden),
            "v": (inner_kv, hidden),
            "o": (hidden, inner),
            "gate": (middle, hidden),
            "up": (middle, hidden),
            "down": (hidden, middle),
            "head": (w.embedding.shape[0], hidden),
        }
        _refuse("embedding", w.embedding, None, _STORED)
        _refuse("norm", w.norm, (hidden,))
        for (i, name), linear in w.linears().items():
            where = name if i < 0 else f"layers[{i}].{name}"
            _refuse(f"{where}.weight", linear.weight, shapes[name], _STORED)
            if linear.bias is not None:
                _refuse(f"{where}.bias", linear.bias, shapes[name][:1], _STORED)
        whole = {self._whole(layer.q_norm, inner) for layer in w.layers} - {None}
        if len(whole) > 1:
            raise ValueError("Decoder: q_norm is over one head in some layers and over all heads in others")
        self.whole_qk_norm = whole == {True}
        for i, layer in enumerate(w.layers):
            for f in fields(layer):
                gain = getattr(layer, f.name)
                if "norm" not in f.name or gain is None:
                    continue
                size = hidden
                if f.name in ("q_norm", "k_norm"):
                    size = (inner if f.name == "q_norm" else inner_kv) if self.whole_qk_norm else w.head_dim
                _refuse(f"layers[{i}].{f.name}", gain, (size,))

    def _whole(self, gain: Tensor | None, inner: int) -> bool | None:
        return None if gain is None or self.weights.heads == 1 else gain.shape[0] == inner


@dataclass
class _Rows:
    """Three int64 values per row of the batch: its prompt, its slot in the buffers, and the number of its own tokens."""

    prompt: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    slot: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    filled: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def select(self, rows: Tensor) -> _Rows:
        return _Rows(self.prompt[rows], self.slot[rows], self.filled[rows])

    def join(self, other: _Rows) -> _Rows:
        return _Rows(*(torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))


@dataclass
class Draws:
    """The buffers and options of `Decoding.write`, and of others that draw by themselves.

    place, last (n,) int64, one for each row of the batch: the place of the row's next token, and of its last possible token.
    seeds, tokens (S,) int64, logprobs (S,) float32, valid, ended (S,) bool, by place: the seed for drawing a token
        (`sample_tokens`), the token, its log-prob, whether it was drawn, and whether it ended its row.
    stop_ids (k,) int64: tokens that end a row. temperature, top_k, top_p, min_p: as for `sample_tokens`.
    All tensors are contiguous; those of `Decoding.write` are on the CPU.
    """

    place: Tensor
    last: Tensor
    seeds: Tensor
    tokens: Tensor
    logprobs: Tensor
    valid: Tensor
    ended: Tensor
    stop_ids: Tensor
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class Decoding:
    """The rows of a rollout: `add` prompts and rows, `step` through their tokens, `keep` the rows that continue.

    room: the most tokens a row may add. slots: the most rows at a time.
    rope: a table (cos, sin) for each kind of layer, (positions, rotary) float32, for prompts and the tokens after them.
    low_rank: low-rank factors by (layer, name), with (-1, "head") for the head. A layer without factors is used alone.
    Adjacent rows of one prompt read the prompt's keys and values together.
    """

    def __init__(
        self,
        packed: PackedDecoder,
        *,
        room: int,
        slots: int,
        rope: Sequence[tuple[Tensor, Tensor]],
        low_rank: Mapping[tuple[int, str], LowRank] | None = None,
    ):
        self._packed, self._native, w = packed, packed._native, packed.weights
        if self._native.isa() != packed.isa:
            raise RuntimeError(
                f"Decoding: the weights were packed for {packed.isa}, and {self._native.isa()} is in force; pack them again"
            )
        self._room = _rounded(room)
        self._rope = [(cos.float().contiguous(), sin.float().contiguous()) for cos, sin in rope]
        layers, heads, width = len(w.layers), w.kv_heads, w.head_dim
        # Attention multiplies empty positions as well and masks them afterwards, so buffers must be finite.
        self._keys = torch.zeros(slots, layers, heads, width, self._room)
        self._values = torch.zeros(slots, layers, heads, self._room, _rounded(width))
        self._free = list(range(slots))
        # By number: length, keys and values. None for a prompt that was forgotten, whose number a new one may take.
        self._prompts: list[tuple[int, Tensor, Tensor] | None] = []
        self._lengths = self._prompt_keys = self._prompt_values = torch.empty(0, dtype=torch.long)
        self._rows = _Rows()
        self._logits = torch.empty(_rounded(slots), _rounded(w.embedding.shape[0]))
        self._alive: list[Tensor] = []
        self._pack_low_rank(low_rank or {})
        self._native_decoder = self._native.Decoder(self._description())

    # -- the description for the native decoder ------------------------------------------------------------------------

    def _pack_low_rank(self, low_rank: Mapping[tuple[int, str], LowRank]) -> None:
        linears = self._packed.weights.linears()
        unknown = set(low_rank) - set(linears)
        if unknown:
            raise ValueError(f"Decoding: low_rank has {sorted(unknown)}, which are no layers of this decoder")
        self._low_rank = {}
        for key, given in low_rank.items():
            n, k = linears[key].weight.shape
            rank = given.a.shape[0]
            _refuse(f"low_rank[{key}].a", given.a, (rank, k))
            _refuse(f"low_rank[{key}].b", given.b, (n, rank))
            _refuse(f"low_rank[{key}].gate", given.gate, (given.gate.shape[0], rank))
            packed_b = _packed(self._native, given.b.detach())
            self._low_rank[key] = (packed_b, given.gate.detach().contiguous(), rank, given.a.detach())

    def _input(self, layer: int, names: Sequence[str]) -> tuple:
        p, described, factors = self._packed, [], []
        for name in names:
            key = (layer, name)
            weight, (packed, parts) = self._linears[key].weight, p.packed[key]
            packed_b, gate, rank, a = self._low_rank.get(key, (None, None, 0, None))
            if rank:
                factors.append(a)
            described.append(
                (
                    packed.data_ptr(),
                    _address(p.biases[key]),
                    *weight.shape,
                    parts,
                    _address(packed_b),
                    _address(gate),
                    rank,
                )
            )
        if not factors:
            return described, 0, 0
        stacked = _packed(self._native, factors[0] if len(factors) == 1 else torch.cat(factors))
        self._alive.append(stacked)
        return described, stacked.data_ptr(), sum(a.shape[0] for a in factors)

    def _description(self) -> dict:
        p, w = self._packed, self._packed.weights
        self._linears = w.linears()
        layers = []
        for i, (layer, gains) in enumerate(zip(w.layers, p.gains)):
            cos, sin = self._rope[layer.rope]
            layers.append(
                (
                    *(_address(gains[f"norm_{n}"]) for n in ("attention", "attended", "mlp", "out")),
                    *(_address(gains[n]) for n in ("q_norm", "k_norm")),
                    *(self._input(i, names) for names in _INPUTS),
                    cos.data_ptr(),
                    sin.data_ptr(),
                    layer.window or 0,
                )
            )
        return {
            "hidden": w.embedding.shape[1],
            "heads": w.heads,
            "kv_heads": w.kv_heads,
            "head_dim": w.head_dim,
            "rotary": self._rope[0][0].shape[1],
            "intermediate": w.layers[0].gate.weight.shape[0],
            "vocab": w.embedding.shape[0],
            "activation": ACTIVATIONS.index(w.activation),
            "whole_qk_norm": p.whole_qk_norm,
            "eps": w.eps,
            "embedding_scale": w.embedding_scale,
            "residual_scale": w.residual_scale,
            "attention_scale": w.attention_scale,
            "attention_softcap": w.attention_softcap or 0.0,
            "logit_scale": w.logit_scale,
            "logit_softcap": w.logit_softcap or 0.0,
            "embedding": p.embedding.data_ptr(),
            "norm": p.norm.data_ptr(),
            "head": self._input(-1, ("head",)),
            "layers": layers,
        }

    # -- rows ----------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._rows.slot)

    def add_prompt(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> int:
        """Add a prompt and return its number. keys, values: (kv_heads, length, head_dim) per layer, with keys rotated."""
        w = self._packed.weights
        heads, length, width = keys[0].shape
        padded = _rounded(length)
        own_keys = torch.zeros(len(keys), heads, width, padded)
        own_values = torch.zeros(len(keys), heads, padded, _rounded(width))
        for i, (k, v) in enumerate(zip(keys, values, strict=True)):
            for name, x in (("keys", k), ("values", v)):
                _refuse(f"{name}[{i}]", x, (w.kv_heads, length, w.head_dim), _STORED)
            own_keys[i, :, :, :length] = k.transpose(1, 2)
            own_values[i, :, :length, :width] = v
        number = next((i for i, p in enumerate(self._prompts) if p is None), len(self._prompts))
        self._prompts[number : number + 1] = [(length, own_keys, own_values)]
        return number

    def forget_prompts(self) -> None:
        """Free the keys and values of prompts without rows. Later prompts take their numbers."""
        kept = set(self._rows.prompt.tolist())
        self._prompts = [p if number in kept else None for number, p in enumerate(self._prompts)]

    def add(self, prompts: Tensor) -> None:
        """Add a row for each prompt number, behind the present rows.

        Raises ValueError if there are too few free slots, or if the rope table is shorter than a row may become.
        """
        prompts = prompts.to(torch.long)
        if len(prompts) > len(self._free):
            raise ValueError(f"Decoding: {len(prompts)} rows for {len(self._free)} free slots")
        if len(prompts):
            places = [
                (0, 0, 0) if p is None else (p[0], p[1].data_ptr(), p[2].data_ptr()) for p in self._prompts
            ]
            self._lengths, self._prompt_keys, self._prompt_values = torch.tensor(places).T.contiguous()
            needed, there = int(self._lengths[prompts].max()) + self._room, self._rope[0][0].shape[0]
            if there < needed:
                raise ValueError(
                    f"Decoding: the rope tables have {there} positions; these rows may need {needed}"
                )
            few = [
                key for key, (_, gate, *_) in self._low_rank.items() if gate.shape[0] <= int(prompts.max())
            ]
            if few:
                raise ValueError(f"Decoding: the gate of {few[0]} has no row for prompt {int(prompts.max())}")
        slots, self._free = self._free[: len(prompts)], self._free[len(prompts) :]
        own = torch.tensor(slots, dtype=torch.long)
        self._rows = self._rows.join(_Rows(prompts, own, torch.zeros(len(prompts), dtype=torch.long)))

    def keep(self, rows: Tensor) -> None:
        """Continue only with the present rows at these indices, in this order. Nothing is copied; other slots become free."""
        kept = self._rows.select(rows)
        self._free += sorted(set(self._rows.slot.tolist()) - set(kept.slot.tolist()))
        self._rows = kept

    def step(self, tokens: Tensor) -> Tensor:
        """The logits (rows, V) float32 after tokens (rows,) int64. The next step writes to the same memory."""
        rows = self._rows
        count = len(rows.slot)
        if tuple(tokens.shape) != (count,) or tokens.dtype is not torch.long:
            raise ValueError(
                f"Decoding: tokens is {tuple(tokens.shape)} {tokens.dtype}; expected ({count},) torch.int64"
            )
        tokens = tokens.contiguous()
        self._native_decoder.step(
            count,
            tokens.data_ptr(),
            rows.prompt.data_ptr(),
            rows.slot.data_ptr(),
            rows.filled.data_ptr(),
            self._lengths.data_ptr(),
            self._prompt_keys.data_ptr(),
            self._prompt_values.data_ptr(),
            self._keys.data_ptr(),
            self._values.data_ptr(),
            self._room,
            self._logits.data_ptr(),
            self._logits.stride(0),
            torch.get_num_threads(),
        )
        rows.filled += 1
        return self._logits[:count, : self._packed.weights.embedding.shape[0]]

    def write(self, logits: Tensor, draws: Draws, leave: int = 0) -> tuple[Tensor, Tensor]:
        """Draw and step repeatedly, without Python between two tokens, until `leave` rows have ended (0: until all have).

        logits: (n, V) float32, for drawing each row's next token.
        Returns the indices (n',) of the rows left among the former rows, and their logits (n', V), in this object's memory.
        `draws.place` and `draws.last` are reduced to the rows left. The tokens have the same bits as from `sample_tokens` and
        `step`.
        Raises ValueError if no logit of a row is finite. An interrupt is raised between two tokens.
        """
        count, vocab = len(self), self._packed.weights.embedding.shape[0]
        _refuse("logits", logits, (count, vocab))
        for name in ("place", "last"):
            given = getattr(draws, name)
            if tuple(given.shape) != (count,):
                raise ValueError(
                    f"Decoding: {name} is {tuple(given.shape)}; expected ({count},), one for each row"
                )
        here = self._logits[:count, :vocab]
        if logits.data_ptr() != here.data_ptr():
            here.copy_(logits)
        rows, slots = self._rows, self._rows.slot.tolist()
        state = {
            "prompt": rows.prompt,
            "slot": rows.slot,
            "filled": rows.filled,
            "place": draws.place,
            "last": draws.last,
        }
        state = {name: t.clone() for name, t in state.items()}
        given = state | {
            n: getattr(draws, n) for n in ("seeds", "tokens", "logprobs", "valid", "ended", "stop_ids")
        }
        given |= {
            "length": self._lengths,
            "prompt_keys": self._prompt_keys,
            "prompt_values": self._prompt_values,
        }
        given |= {"keys": self._keys, "values": self._values, "logits": self._logits}
        numbers = {
            "room": self._room,
            "logit_stride": self._logits.stride(0),
            "stop_count": len(draws.stop_ids),
        }
        options = ("temperature", "top_k", "top_p", "min_p")
        numbers |= {n: checked_number("Decoding", n, getattr(draws, n)) for n in options}
        left = self._native_decoder.write(
            {name: t.data_ptr() for name, t in given.items()} | numbers, count, leave, torch.get_num_threads()
        )
        kept = {name: t[:left] for name, t in state.items()}
        self._rows = _Rows(kept["prompt"], kept["slot"], kept["filled"])
        going_on = kept["slot"].tolist()
        self._free += sorted(set(slots) - set(going_on))
        draws.place, draws.last = kept["place"], kept["last"]
        at = {slot: row for row, slot in enumerate(slots)}
        return torch.tensor([at[slot] for slot in going_on], dtype=torch.long), self._logits[:left, :vocab]
