"""sample_tokens: one token per row, with its log-probability.

    p_v = exp(z_v) / sum exp(z),  z = logits / temperature
    token = first v, in index order, at which  sum_{j <= v, j kept} p_j  >  u * sum_{j kept} p_j
    logprob = log p_token

u is one uniform number per row. The log-prob is that of the untruncated distribution at the temperature, with or without top_k,
top_p and min_p. A training pass computes the same log-prob from the same logits, so that importance ratios are right.

The kept tokens are those with a logit above a threshold, so that they do not depend on the order of equal logits:
    top_k  logits no smaller than the k-th largest (ties at the k-th are all kept)
    top_p  the fewest largest logits, after top_k, whose share of the mass that top_k kept reaches p (and all their ties)
    min_p  p_v >= min_p * max p

For the same u, the C++ and Triton back-ends draw the same token as the reference, unless u lies within rounding (about 1e-6 of
the row's mass) of the border between two tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clp_kernels.arguments import refuse_wrapped
from clp_kernels.backends import plain_eager, select
from clp_kernels.registration import register

_TABLE = {
    "reference": "clp_kernels.reference.sampling",
    "cpu": "clp_kernels.cpu.sampling",
    "triton": "clp_kernels.triton_kernels.sampling",
}


def sample_tokens(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    generator: torch.Generator | None = None,
    seeds: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """token ~ softmax(logits / temperature), truncated by top_k, top_p and min_p; log p_token, untruncated.

    logits       (rows, V), floating point; rows may be strided
    temperature  a float or (rows,); 0 takes the largest logit (the first of equals), with its log-prob at
                 temperature 1
    top_k        an int or (rows,); None, 0 or V keeps all
    top_p        in (0, 1], a float or (rows,); None or 1 keeps all
    min_p        in [0, 1], a float or (rows,); None or 0 keeps all
    generator    gives one uniform number per row: the same state gives the same tokens
    seeds        (rows,) int64, instead of a generator. A row's token then depends only on its logits and its seed, whatever
                 else is in the batch. Each draw needs a seed of its own; consecutive integers are good seeds
    out          (tokens, logprob) to write into, contiguous
    returns      tokens (rows,) int64, logprob (rows,) float32

    Not differentiable. Under torch.compile use seeds or the default generator.

    Raises ValueError (shapes, values given as numbers, both generator and seeds; on a CPU also a row whose largest logit is not
    finite) and TypeError (dtypes). On a GPU a check for such a row would stall the stream: its token is -1 and its log-prob
    NaN. Values of per-row options are not checked.
    """
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"sample_tokens: logits is {tuple(logits.shape)}; expected (rows, V) with V > 0")
    if not logits.dtype.is_floating_point:
        raise TypeError(f"sample_tokens: logits is {logits.dtype}; expected a floating-point dtype")
    rows = logits.shape[0]
    temperature = _option("temperature", temperature, 1.0, torch.float32, logits)
    top_k = _option("top_k", top_k, 0, torch.int64, logits)
    top_p = _option("top_p", top_p, 1.0, torch.float32, logits)
    min_p = _option("min_p", min_p, 0.0, torch.float32, logits)
    if seeds is None:
        draws = torch.rand(rows, dtype=torch.float64, device=logits.device, generator=generator)
    else:
        if generator is not None:
            raise ValueError("sample_tokens: both generator and seeds are given; expected one of them")
        if tuple(seeds.shape) != (rows,) or seeds.dtype is not torch.int64 or seeds.device != logits.device:
            raise ValueError(
                f"sample_tokens: seeds is {tuple(seeds.shape)} {seeds.dtype} on {seeds.device}; expected "
                f"({rows},) torch.int64 on {logits.device}"
            )
        draws = seeds.contiguous()
    logits = logits.detach()
    if not plain_eager(logits, draws):
        refuse_wrapped("sample_tokens", logits=logits, seeds=seeds)
        options = []
        for value, unused in ((temperature, 1.0), (top_k, 0), (top_p, 1.0), (min_p, 0.0)):
            options += (unused, value) if isinstance(value, Tensor) else (value, None)
        tokens, logprob = torch.ops.clp_kernels.sample_tokens(logits, draws, *options)
        return (tokens, logprob) if out is None else (out[0].copy_(tokens), out[1].copy_(logprob))
    if out is None:
        tokens, logprob = _outputs(logits)
    else:
        tokens, logprob = out
        for name, tensor, dtype in (("out[0]", tokens, torch.int64), ("out[1]", logprob, torch.float32)):
            if (
                tuple(tensor.shape) != (rows,)
                or tensor.dtype is not dtype
                or tensor.device != logits.device
                or not tensor.is_contiguous()
            ):
                raise ValueError(
                    f"sample_tokens: {name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, "
                    f"strides {tensor.stride()}; expected ({rows},) {dtype} on {logits.device}, contiguous"
                )
    _run(logits, draws, temperature, top_k, top_p, min_p, tokens, logprob)
    return tokens, logprob


_MOST, _LEAST = torch.finfo(torch.float32).max, 2.0**-149  # the largest and the least positive float32
_NUMBERS = {
    "temperature": (lambda t: 0 <= t <= _MOST, "0 (greedy) or more"),
    "top_k": (lambda k: k >= 0 and k == int(k), "a whole number, 0 or more"),
    "top_p": (lambda p: 0 < p <= 1, "0 < top_p <= 1"),
    "min_p": (lambda p: 0 <= p <= 1, "0 <= min_p <= 1"),
}


def checked_number(op: str, name: str, value: float) -> float:
    """An option given as a number, in the form that every back-end takes: an int64 for top_k, otherwise a number that a float32
    holds, still positive if it was. Raises ValueError."""
    allowed, expected = _NUMBERS[name]
    try:
        fine = allowed(value)
    except (TypeError, ValueError, OverflowError):
        fine = False
    if not fine:
        raise ValueError(f"{op}: {name} is {value}; expected {expected}")
    if name == "top_k":
        return min(int(value), 2**63 - 1)
    return max(float(value), _LEAST) if value > 0 else 0.0


def _option(name, value, unset, dtype, logits):
    """The option as a number, or as a contiguous (rows,) tensor of `dtype`."""
    if value is None:
        return unset
    if not isinstance(value, Tensor):
        return checked_number("sample_tokens", name, value)
    if tuple(value.shape) != (logits.shape[0],) or value.device != logits.device or value.dtype is torch.bool:
        raise ValueError(
            f"sample_tokens: {name} is {tuple(value.shape)} {value.dtype} on {value.device}; "
            f"expected a number or ({logits.shape[0]},) on {logits.device}"
        )
    return value.detach().to(dtype).contiguous()


def _outputs(logits):
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.float32)


def _run(logits, draws, temperature, top_k, top_p, min_p, tokens, logprob):
    module = select("sample_tokens", _TABLE, logits.device, dtype=logits.dtype)
    bad = module.sample(logits, draws, temperature, top_k, top_p, min_p, tokens, logprob)
    if bad is not None:
        raise ValueError(
            f"sample_tokens: the largest of logits[{bad}] is not finite (NaN, +inf, or every entry -inf); "
            "expected at least one finite logit and none that is NaN or +inf"
        )


def _sample(
    logits, draws, temperature, temperature_rows, top_k, top_k_rows, top_p, top_p_rows, min_p, min_p_rows
):
    given = ((temperature, temperature_rows), (top_k, top_k_rows), (top_p, top_p_rows), (min_p, min_p_rows))
    outputs = _outputs(logits)
    _run(logits, draws, *(number if rows is None else rows for number, rows in given), *outputs)
    return outputs


register(
    "sample_tokens(Tensor logits, Tensor draws, float temperature, Tensor? temperature_rows, int top_k, "
    "Tensor? top_k_rows, float top_p, Tensor? top_p_rows, float min_p, Tensor? min_p_rows) "
    "-> (Tensor, Tensor)",
    _sample,
    lambda logits, *_: _outputs(logits),
)
