"""One small call of every public op: what the tests of torch's own machinery (compile, autocast, checkpoints, FSDP2) run."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from clp_kernels import (
    PrefixLayout,
    ema_,
    interpolate,
    merge_sign_consensus,
    prefix_attention,
    slerp,
    sparsify,
)

from bench.calls import multi_lora, sampling, token_stats, weight_space


@dataclass(frozen=True)
class OpCase:
    """call(**tensors) -> the outputs; `shapes` makes the tensors, for any number of rows; `trained` take gradients.

    autocast  the dtype of the outputs under bfloat16 autocast of float32 tensors, in the order of the outputs
    """

    name: str
    call: Callable
    shapes: Callable
    trained: tuple[str, ...]
    autocast: tuple[torch.dtype, ...]
    rounds: bool = True  # autocast casts the products' operands

    def tensors(self, rows=6, requires_grad=True):
        made = {name: torch.randn(shape) for name, shape in self.shapes(rows).items()}
        return {n: t.requires_grad_(requires_grad and n in self.trained) for n, t in made.items()}


def by_name(call, **more):
    """A call of the catalogue, with tensors as keywords and the outputs in their order. more: tensors that it makes by rows."""

    def called(**tensors):
        rows = next(iter(tensors.values())).shape[0]
        return tuple(call({**tensors, **{name: made(rows) for name, made in more.items()}}).values())

    return called


def _targets(rows):
    return torch.arange(rows) % 30


_SCORED = token_stats.statistics(("logprob", "entropy", "kl"))
_LOGITS = token_stats.logits_statistics(("logprob", "entropy"), temperature=0.8)


def _layout(tokens):
    return PrefixLayout.from_lengths([2, 1, tokens - 3], [-1, 0, 0])


_kept_layout = functools.cache(_layout)


def _prefix_attention(q, k, v):
    # One layout for every call, as for the layers of a model; torch.compile looks into no cache.
    layout = _layout if torch.compiler.is_compiling() else _kept_layout
    return (prefix_attention(q, k, v, layout(q.shape[0])),)


def _ema(average, params):
    return (ema_(average.clone(), params, 0.9),)


F32, BF16 = torch.float32, torch.bfloat16
DIFFERENTIABLE = [
    OpCase("multi_lora_linear", by_name(multi_lora.call),
           lambda rows: {"x": (rows, 16), "weight": (12, 16), "lora_a": (6, 16), "lora_b": (12, 6), "gate": (1, 6),
                         "bias": (12,)},
           ("x", "weight", "lora_a", "lora_b", "gate", "bias"), (BF16,)),
    OpCase("interpolated_linear", by_name(weight_space.linear),
           lambda rows: {"x": (rows, 16), "stack": (3, 12, 16), "blend": (1, 3), "bias": (12,)},
           ("x", "stack", "blend", "bias"), (BF16,)),
    OpCase("linear_logprob", by_name(_SCORED, targets=_targets),
           lambda rows: {"hidden": (rows, 16), "weight": (30, 16), "bias": (30,), "ref_hidden": (rows, 16)},
           ("hidden", "weight", "bias"), (F32, F32, F32)),
    OpCase("logits_logprob", by_name(_LOGITS, targets=_targets), lambda rows: {"logits": (rows, 30)}, ("logits",), (F32, F32),
           rounds=False),
    OpCase("prefix_attention", _prefix_attention, lambda rows: {"q": (rows, 4, 8), "k": (rows, 2, 8), "v": (rows, 2, 8)},
           ("q", "k", "v"), (BF16,)),
    OpCase("interpolate", lambda stack, weights, base: (interpolate(stack, weights, base=base),),
           lambda rows: {"stack": (3, rows, 7), "weights": (3,), "base": (rows, 7)}, ("stack", "weights", "base"), (F32,),
           rounds=False),
    OpCase("slerp", lambda a, b: (slerp(a, b, 0.3),), lambda rows: {"a": (rows, 7), "b": (rows, 7)}, ("a", "b"), (F32,),
           rounds=False),
]  # fmt: skip
CONSTANT = [
    OpCase("sample_tokens", by_name(sampling.drawn({"top_k": 9}), seeds=_targets),
           lambda rows: {"logits": (rows, 30)}, (), (torch.int64, F32), rounds=False),
    OpCase("merge_sign_consensus", lambda stack: (merge_sign_consensus(stack, [1.0, 2.0]),),
           lambda rows: {"stack": (2, rows, 7)}, (), (F32,), rounds=False),
    OpCase("sparsify", lambda delta: (sparsify(delta, 0.5, seed=3),), lambda rows: {"delta": (rows, 7)}, (), (F32,),
           rounds=False),
    OpCase("ema_", _ema, lambda rows: {"average": (rows, 7), "params": (rows, 7)}, (), (F32,), rounds=False),
]  # fmt: skip
ALL = DIFFERENTIABLE + CONSTANT


def outputs_and_gradients(call, tensors, incoming=None):
    """-> the outputs, and the gradients of all of them in what asks, by name."""
    outputs = call(**tensors)
    leaves = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    if not leaves:
        return list(outputs), {}
    asked = [output for output in outputs if output.requires_grad]
    incoming = [torch.linspace(-1, 2, o.numel(), dtype=o.dtype).reshape(o.shape) for o in asked]
    return [o.detach() for o in outputs], dict(
        zip(leaves, torch.autograd.grad(asked, list(leaves.values()), incoming))
    )
