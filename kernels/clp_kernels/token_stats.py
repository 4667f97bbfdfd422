"""The result of linear_logprob and logits_logprob, and the algebra between running sums, statistics and gradients.

With z the policy's logits and z' the reference's (after bias, scale, softcap and temperature), p = softmax(z), q = softmax(z'):

    logprob = z[target] - lse(z)      entropy = -sum p log p      kl = sum p (log p - log q)
    ref_logprob = z'[target] - lse(z')      reverse_kl = sum q (log q - log p)      lse = log sum e^z      top1 = argmax z

A back-end reduces each row to `Sums`. The sums of two pieces of the vocabulary merge associatively: with m = max(m1, m2) and
k_i = e^(m_i - m), s = sum k_i s_i, a = sum k_i (a_i + (m_i - m) s_i), d = sum k_i d_i, t = sum t_i (`merge`).
`statistics` turns sums into outputs, and `coefficients` turns the outputs' incoming gradients into five numbers per row:

    dz_v = p_v (c0 + c1 (z_v - m_p) + c2 (z_v - z'_v)) + c3 q_v + ct [v is the target]
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from clp_kernels.backends import Implementation, launching_on, select

OUTPUTS = ("logprob", "entropy", "ref_logprob", "kl", "reverse_kl", "lse", "top1")
DIFFERENTIABLE = ("logprob", "entropy", "kl", "reverse_kl", "lse")
NEED_TARGETS = ("logprob", "ref_logprob")
NEED_REFERENCE = ("ref_logprob", "kl", "reverse_kl")


class TokenStats(NamedTuple):
    """One number per token for each output that was asked for, in the shape of the rows. None for the others.

    float32 (float64 if the inputs are), top1 int64. All outputs are 0 if the target is ignore_index. Logits that are not finite
    are treated as in torch: top1 is the first NaN if there is one; lse is NaN if a logit is NaN, and inf if one is +inf; the
    other outputs are NaN in both cases.
    """

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    ref_logprob: Tensor | None = None
    kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    lse: Tensor | None = None
    top1: Tensor | None = None


class HeadLoRA(NamedTuple):
    """A low-rank change of the output projection, blended per row: logits += ((hidden a^T) * gate) b^T.

    a (R, H) and b (V, R) stack all adapters' factors. gate is (rows, R), or broadcasts to hidden's leading dimensions and R.
    Each is floating point, in float32 or hidden's dtype. Products accumulate in float32, on a GPU with a and b rounded to
    hidden's dtype.
    """

    a: Tensor
    b: Tensor
    gate: Tensor


@dataclass(frozen=True)
class Head:
    """A linear_logprob call with flattened rows: hidden (T, H), weight (V, H), biases (V,), and row options as for `Rows`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    lora: HeadLoRA | None

    def block(self, rows: slice) -> Head:
        """The call for some of the rows."""
        ref_hidden = None if self.ref_hidden is None else self.ref_hidden[rows]
        lora = None if self.lora is None else self.lora._replace(gate=self.lora.gate[rows])
        return replace(self, hidden=self.hidden[rows], ref_hidden=ref_hidden, lora=lora)


@dataclass(frozen=True)
class Rows:
    """The options of rows: targets (T,) int64 or None, inv_temperature (T,), and the map from logits to z."""

    targets: Tensor | None
    inv_temperature: Tensor
    softcap: float | None
    logit_scale: float
    ignore_index: int
    shard: bool = False  # the columns are a shard of the vocabulary; a target of -1 lies in another shard

    def block(self, rows: slice) -> Rows:
        """The options of some of the rows."""
        targets = None if self.targets is None else self.targets[rows]
        return replace(self, targets=targets, inv_temperature=self.inv_temperature[rows])


@dataclass(frozen=True)
class Keep:
    """The data that a fused forward keeps for the backward pass beside `saved`: logits, directions, or nothing.

    rows, copies  the raw logits of the first `rows` rows, of `copies` heads (2: the reference's too)
    directions    names of outputs whose derivative in hidden is kept, one vector (H + R,) per row each, for the whole call.
                  The backward pass only multiplies it by the incoming gradient
    """

    rows: int = 0
    copies: int = 1
    directions: tuple[str, ...] = ()

    def shape(self, head: Head) -> tuple[int, int, int]:
        """The shape of the float32 tensor that holds the data."""
        if not self.directions:
            return self.copies, self.rows, head.weight.shape[0]
        return len(self.directions), head.hidden.shape[0], direction_width(head)


def direction_width(head: Head) -> int:
    """The width of a direction: H, plus R for the LoRA factors."""
    return head.hidden.shape[1] + (0 if head.lora is None else head.lora.a.shape[0])


@dataclass
class HeadGradients:
    """Gradients of a linear_logprob call. None if not asked for. The caller casts them to the arguments' dtypes."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    gate: Tensor | None = None


class Sums(NamedTuple):
    """A row's running sums, each (rows,). The reference's are None without a reference.

    m = max z   s = sum e^(z-m)   a = sum e^(z_p-m_p) (z_p-m_p)   d_p = sum e^(z_p-m_p) (z_p-z_q)
    d_q = sum e^(z_q-m_q) (z_q-z_p)   t = z at the target
    In the exponents 0 replaces an infinite m: s is inf if m is +inf, and NaN if a z is NaN.
    """

    m_p: Tensor
    s_p: Tensor
    a_p: Tensor
    d_p: Tensor
    m_q: Tensor
    s_q: Tensor
    d_q: Tensor
    t_p: Tensor
    t_q: Tensor


_LEAST_TEMPERATURE = 2.0**-126  # the least number whose inverse a float32 holds
KEEP_BYTES = (
    64 << 20
)  # bytes that the CPU back-end keeps between forward and backward by default, if all fits
# The width (H) from which keeping a logit is faster than computing it again: 8 bytes of traffic against 2 H operations, at
# 10 GB/s and 0.3 TFLOP/s on two CPU cores, and 4.3 TB/s and 790 TFLOP/s on an H200.
_WORTH_KEEPING = {"cpu": 128, "triton_kernels": 768}
DIRECTED = ("logprob", "kl", "lse")  # the outputs whose derivative in hidden may be kept (`what_to_keep`)
SAVED = (
    6  # rows of the tensor kept for the backward pass: m_p, 1/s_p, m_q, 1/s_q, E_p[z_p - m_p], E_p[z_p - z_q]
)


def merge(pieces: Sums) -> Sums:
    """The sums of a whole vocabulary from those of its pieces, every field (pieces, rows), added in the given order.

    An empty or fully masked piece has m = -inf and does not contribute. Differentiable, with the maxima as constants.
    """

    def finite(m: Tensor) -> Tensor:
        return m.masked_fill(m.isinf(), 0)  # 0 replaces infinities, whose difference would be NaN

    def added(*fields: Tensor) -> tuple[Tensor, ...]:
        return functools.reduce(torch.add, torch.stack(fields, 1).unbind()).unbind()

    m_p = pieces.m_p.amax(0)
    k = (pieces.m_p - finite(m_p)).exp()
    a = pieces.a_p + (finite(pieces.m_p) - finite(m_p)) * pieces.s_p
    s_p, a_p, d_p, t_p = added(k * pieces.s_p, k * a, k * pieces.d_p, pieces.t_p)
    if pieces.m_q is None:
        return Sums(m_p, s_p, a_p, d_p, None, None, None, t_p, None)
    m_q = pieces.m_q.amax(0)
    k = (pieces.m_q - finite(m_q)).exp()
    s_q, d_q, t_q = added(k * pieces.s_q, k * pieces.d_q, pieces.t_q)
    return Sums(m_p, s_p, a_p, d_p, m_q, s_q, d_q, t_p, t_q)


def merge_top1(m_p: Tensor, s_p: Tensor, top1: Tensor) -> Tensor:
    """The column of each row's largest z, from the pieces' top1, m_p and s_p, each (pieces, rows).

    A NaN counts as larger than all numbers. The lowest column wins a tie.
    """
    nan = s_p.isnan()
    m_p = m_p.masked_fill(nan, torch.inf)
    others = (m_p < m_p.amax(0)) | (nan.any(0) & ~nan)
    return top1.masked_fill(others, torch.iinfo(top1.dtype).max).amin(0)


def statistics(
    sums: Sums,
    top1: Tensor,
    asked: frozenset[str] | set[str],
    ignored: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], Tensor]:
    """The outputs in the order of OUTPUTS (empty if not asked for), and the (SAVED, rows) tensor for the backward pass."""
    lse = sums.m_p + sums.s_p.log()
    # If a z is +inf, only lse is defined.
    sums = sums._replace(
        s_p=sums.s_p.masked_fill(sums.s_p == torch.inf, torch.nan),
        s_q=None if sums.s_q is None else sums.s_q.masked_fill(sums.s_q == torch.inf, torch.nan),
    )
    log_s_p = sums.s_p.log()
    mean_a, mean_d = sums.a_p / sums.s_p, sums.d_p / sums.s_p
    log_ratio = None
    if asked.intersection(NEED_REFERENCE):
        log_s_q = sums.s_q.log()
        log_ratio = (sums.m_p - sums.m_q) + (
            log_s_p - log_s_q
        )  # lse_p - lse_q, which is small if the two are close
    formulas = {
        "logprob": lambda: (sums.t_p - sums.m_p) - log_s_p,
        "entropy": lambda: log_s_p - mean_a,
        "ref_logprob": lambda: (sums.t_q - sums.m_q) - log_s_q,
        "kl": lambda: mean_d - log_ratio,
        "reverse_kl": lambda: sums.d_q / sums.s_q + log_ratio,
        "lse": lambda: lse,
        "top1": lambda: top1,
    }
    outputs = []
    for name in OUTPUTS:
        kind = torch.int64 if name == "top1" else dtype
        if name not in asked:
            outputs.append(top1.new_empty(0, dtype=kind))
            continue
        value = formulas[name]().to(kind)
        outputs.append(value if ignored is None else value.masked_fill(ignored, 0))
    saved = torch.stack((sums.m_p, 1 / sums.s_p, sums.m_q, 1 / sums.s_q, mean_a, mean_d)).to(dtype)
    return outputs, saved


def coefficients(grads: dict[str, Tensor | None], saved: Tensor) -> Tensor:
    """(5, rows): c0, c1, c2, c3, ct of the module's formula. A missing gradient is None.

    logprob: [target] - p     entropy: -p (log p + H)     lse: p     kl: p (log p - log q - KL)     reverse_kl: p - q
    with log p + H = (z - m_p) - E_p[z - m_p] and log p - log q - KL = (z - z') - E_p[z - z'].
    """
    coefs = torch.zeros(5, saved.shape[1], dtype=saved.dtype, device=saved.device)
    mean_a, mean_d = saved[4], saved[5]
    if (g := grads.get("logprob")) is not None:
        coefs[0] -= g
        coefs[4] += g
    if (g := grads.get("entropy")) is not None:
        coefs[0] += g * mean_a
        coefs[1] -= g
    if (g := grads.get("lse")) is not None:
        coefs[0] += g
    if (g := grads.get("kl")) is not None:
        coefs[0] -= g * mean_d
        coefs[2] += g
    if (g := grads.get("reverse_kl")) is not None:
        coefs[0] += g
        coefs[3] -= g
    return coefs


@torch.compiler.assume_constant_result
def backend_module(op: str, table: tuple[tuple[str, str], ...], device: str, dtype: torch.dtype) -> str:
    """Name of the module that serves the call. torch.compile keeps the choice made during tracing."""
    return select(op, dict(table), torch.device(device), dtype=dtype).__name__


def implementation(module: str, device: torch.device) -> Implementation:
    """The module that `backend_module` named, for tensors on `device`."""
    return launching_on(importlib.import_module(module), device)


def check_outputs(
    op: str, outputs: Sequence[str], targets: Tensor | None, reference: Tensor | None, name: str
) -> tuple[str, ...]:
    """`outputs` in the order of OUTPUTS. Raises ValueError for an unknown output, or one whose input is missing."""
    if isinstance(outputs, str):
        raise ValueError(
            f"{op}: outputs is the string {outputs!r}; expected a sequence of names, such as ({outputs!r},)"
        )
    if not outputs:
        raise ValueError(f"{op}: outputs is empty; expected some of {', '.join(OUTPUTS)}")
    for output in outputs:
        if output not in OUTPUTS:
            raise ValueError(f"{op}: outputs has {output!r}; expected some of {', '.join(OUTPUTS)}")
        if output in NEED_TARGETS and targets is None:
            raise ValueError(f"{op}: outputs has {output!r} and targets is None; pass targets")
        if output in NEED_REFERENCE and reference is None:
            raise ValueError(f"{op}: outputs has {output!r} and {name} is None; pass {name}")
    return tuple(output for output in OUTPUTS if output in outputs)


def check_differentiable(
    op: str, differentiable: Sequence[str] | None, names: Sequence[str]
) -> tuple[str, ...]:
    """The outputs in `names` that pass gradients, in the order of OUTPUTS. Raises ValueError for a name that cannot."""
    able = tuple(name for name in names if name in DIFFERENTIABLE)
    if differentiable is None:
        return able
    if isinstance(differentiable, str):
        raise ValueError(
            f"{op}: differentiable is the string {differentiable!r}; expected a sequence of names, such as "
            f"({differentiable!r},)"
        )
    for name in differentiable:
        if name not in able:
            raise ValueError(
                f"{op}: differentiable has {name!r}; expected some of the outputs {', '.join(able) or 'none'}, or None for "
                "all of them"
            )
    return tuple(name for name in able if name in differentiable)


def check_rows(
    op: str,
    lead: Sequence[int],
    device: torch.device,
    targets: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
) -> tuple[Tensor | None, Tensor]:
    """targets (T,) or None, and 1 / temperature (T,) float32, both contiguous. Raises ValueError, TypeError."""
    rows = math.prod(lead)
    if targets is not None:
        if tuple(targets.shape) != tuple(lead):
            raise ValueError(f"{op}: targets is {tuple(targets.shape)}; expected {tuple(lead)}, one per row")
        if targets.dtype is not torch.int64:
            raise TypeError(f"{op}: targets is {targets.dtype}; expected torch.int64: use targets.long()")
        if targets.device != device:
            raise ValueError(f"{op}: targets is on {targets.device}; expected {device}")
        targets = targets.reshape(-1).contiguous()
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap is {softcap}; expected a positive number, or None for no cap")
    if isinstance(temperature, Tensor):
        try:
            per_row = temperature.detach().to(torch.float32).expand(*lead)
        except RuntimeError:
            raise ValueError(
                f"{op}: temperature is {tuple(temperature.shape)}; expected a number, or a tensor that "
                f"broadcasts to {tuple(lead)}, one per row"
            ) from None
        return targets, per_row.reshape(-1).reciprocal().contiguous()
    if not _LEAST_TEMPERATURE <= temperature < math.inf:
        raise ValueError(
            f"{op}: temperature is {temperature}; expected a positive number, at least {_LEAST_TEMPERATURE:.3g} (top1 gives "
            "the greedy token)"
        )
    return targets, torch.full((rows,), 1.0 / temperature, dtype=torch.float32, device=device)


def kept_rows(
    module: str, rows: int, vocabulary: int, width: int, copies: int, keep_bytes: int | None
) -> int:
    """The number of rows, from the first one on, whose float32 logits are kept between forward and backward.

    A kept logit saves the backward pass its product (`copies` is 2 if the product needs the reference's logit too). It costs
    4 bytes, written once and read once. As many rows as fit in keep_bytes are kept if the width makes it worth the traffic.
    Without keep_bytes, a CPU keeps all rows if they fit in KEEP_BYTES, and otherwise none. A GPU then keeps none, because its
    callers want to save memory.
    """
    backend = module.split(".")[1]
    row_bytes = max(vocabulary, 1) * 4 * copies
    if keep_bytes is None:
        return rows if backend == "cpu" and rows * row_bytes <= KEEP_BYTES else 0
    return min(rows, keep_bytes // row_bytes) if width >= _WORTH_KEEPING.get(backend, 0) else 0


def what_to_keep(
    module: str,
    head: Head,
    names: Sequence[str],
    needs: set[str],
    keep_bytes: int | None,
    *,
    shard: bool = False,
) -> Keep:
    """The data that a call whose differentiable outputs are `names` keeps for the gradients in `needs` (of HeadGradients).

    The count is of products of T V H multiplications after the logits are computed, since computing them costs the same in all
    cases:

        kept logits   1   d(loss)/d(logits) times W. A kept logit's traffic counts as a product of width _WORTH_KEEPING
        recomputed    2   the policy's logits again, and that product; 3 with kl or reverse_kl, which need the reference's too
        directions    1   sum e^(z - m) W beside the running sums of the forward pass, rescaled as the maximum moves (as in
                          flash attention); 2 with kl, for sum e (z - z') W

    logprob alone thus takes 2 products in all without a reference and 3 with one. With kl as well it takes 4 (5 if recomputed).
    The fewest products win: with logprob and kl and room for both heads' logits, directions win up to H = 256. entropy has no
    direction: its sum e (z - m) W would be one product more, which makes 2, as many as recomputing takes. reverse_kl has none:
    near the reference, the difference of sum p W and sum q W would lose the precision that sum (p - q) W keeps.

    Directions have these conditions. The head is frozen: a gradient of weight, bias or lora_b is a sum over rows, which needs
    the incoming gradients first. The vocabulary is not sharded: a shard's maximum is not that of the whole. With products of
    16-bit operands there is only a single term: the difference of two rounded sums would lose the precision of a difference
    that is rounded once. On a GPU there is a single term in any dtype, and no LoRA: other sums have no kernel. Directions count
    towards keep_bytes. Without it they may take KEEP_BYTES on a CPU, or a tenth of the logits, whichever is more.
    """
    backend = module.split(".")[1]
    count, vocabulary = head.hidden.shape[0], head.weight.shape[0]
    with_reference = "kl" in names or "reverse_kl" in names
    copies = 2 if with_reference else 1
    kept = Keep(kept_rows(module, count, vocabulary, head.hidden.shape[1], copies, keep_bytes), copies)
    terms = 2 if "kl" in names else 1
    size = 4 * count * len(names) * direction_width(head)
    bound = (
        max(KEEP_BYTES * (backend == "cpu"), 4 * count * vocabulary // 10)
        if keep_bytes is None
        else keep_bytes
    )
    on_cpu, frozen = backend == "cpu", not needs.intersection(("weight", "bias", "lora_b"))
    possible = (
        set(names).issubset(DIRECTED)
        and "hidden" in needs
        and frozen
        and not shard
        and (terms == 1 or (on_cpu and head.hidden.dtype is torch.float32))
        and (on_cpu or head.lora is None)
    )
    if backend not in _WORTH_KEEPING or not possible or size > bound:
        return kept
    traffic = copies * _WORTH_KEEPING[backend] / max(head.hidden.shape[1], 1)
    others = kept.rows * (1 + traffic) + (count - kept.rows) * (1 + copies)
    return Keep(directions=tuple(names)) if terms * count <= others else kept


def empty_outputs(asked: str, like: Tensor, rows: int) -> list[Tensor]:
    """Empty tensors of the shapes and dtypes that a forward op returns: OUTPUTS, then `saved`."""
    names = asked.split(",")
    outputs = [
        like.new_empty(rows if name in names else 0, dtype=torch.int64 if name == "top1" else torch.float32)
        for name in OUTPUTS
    ]
    return [*outputs, like.new_empty(SAVED, rows, dtype=torch.float32)]


def constant_outputs(differentiable: str, outputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs that pass no gradient."""
    names = differentiable.split(",")
    return [t for name, t in zip(OUTPUTS, outputs) if name not in names]


def as_token_stats(
    outputs: Sequence[Tensor],
    names: Sequence[str],
    lead: Sequence[int],
    differentiable: Sequence[str] = OUTPUTS,
) -> TokenStats:
    """The outputs `names`, in the rows' shape, detached unless they are `differentiable`."""
    asked = {name: value.reshape(lead) for name, value in zip(OUTPUTS, outputs) if name in names}
    return TokenStats(**{n: v if n in differentiable else v.detach() for n, v in asked.items()})
