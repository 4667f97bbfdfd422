"""Properties of the ops over shapes, strides, dtypes, ranks and groups that hypothesis chooses, on every back-end.

The examples are the same in every run. CLP_EXPLORE=20 takes new ones instead, twenty times as many.
"""

import contextlib
import math
import os
from dataclasses import dataclass

import clp_kernels
import pytest
import torch
from accuracy import TRITON_HALVES, assert_as_accurate
from clp_kernels import (
    HeadLoRA,
    linear_logprob,
    logits_logprob,
    multi_lora_linear,
    sample_tokens,
    use_backend,
)
from clp_kernels.token_stats import Sums, statistics
from devices import default_device

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

# The interpreter's numpy warns of -inf - -inf in columns beyond the vocabulary, whose result is selected away.
pytestmark = [
    pytest.mark.check,
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton"),
]
EXPLORE = int(os.environ.get("CLP_EXPLORE", "0"))
INSTRUCTION_SETS = ("portable", "avx2", "avx512")
EVERYWHERE = pytest.mark.parametrize("target", ["reference", *INSTRUCTION_SETS, "triton"])
FAST = pytest.mark.parametrize("target", [*INSTRUCTION_SETS, "triton"])
OUTPUTS = ("logprob", "entropy", "ref_logprob", "kl", "reverse_kl", "lse", "top1")
CONSTANT = ("ref_logprob", "top1")


def dtypes_of(target):
    halves = {"reference": (torch.bfloat16, torch.float16), "triton": TRITON_HALVES}.get(
        target, (torch.bfloat16,)
    )
    return st.sampled_from((torch.float32, *halves))


@contextlib.contextmanager
def serving(target):
    """The back-end, or the C++ back-end with the instruction set, of this name."""
    if target not in INSTRUCTION_SETS:
        with use_backend(target), default_device(target):
            yield
        return
    before = clp_kernels._native.isa()
    try:
        clp_kernels._native.select_isa(target)
        with use_backend("cpu"):
            yield
    finally:
        clp_kernels._native.select_isa(before)


def holds(target, cases, claim, examples=40):
    """claim(case) for cases of the strategy, with `target` in force."""
    if target in INSTRUCTION_SETS:
        pytest.importorskip("clp_kernels._native")
    try:
        with serving(target):
            pass
    except ValueError as error:  # this processor cannot run it
        pytest.skip(str(error))
    if target == "triton":
        examples = max(examples // 3, 5)

    @settings(max_examples=examples * max(EXPLORE, 1), derandomize=not EXPLORE, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(cases)
    def run(case):
        with serving(target):
            claim(case)

    run()


SIZES = st.sampled_from((0, 1, 1, 2, 3, 5, 7, 13, 16, 17, 31, 33, 64, 67))
LAYOUTS = st.sampled_from(("dense", "dense", "transposed", "window", "step", "expanded"))


def laid_out(tensor, layout):
    """The tensor's values in memory of another form; "expanded" repeats its first row instead."""
    if tensor.dim() == 0 or tensor.numel() == 0:
        return tensor
    # oneDNN's bfloat16 products read a few columns past the contraction and multiply them with zero: NaN would stay NaN.
    around = 1e4 if tensor.dtype is torch.bfloat16 else math.nan
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.mT.contiguous().mT
    if layout == "window":
        wide = torch.full([size + 3 for size in tensor.shape], around).to(tensor.dtype)
        return wide[tuple(slice(1, size + 1) for size in tensor.shape)].copy_(tensor)
    if layout == "step":
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), around).to(tensor.dtype)
        return wide[..., ::2].copy_(tensor)
    if layout == "expanded":
        return tensor[:1].expand_as(tensor)
    return tensor


@dataclass(frozen=True)
class LoRACase:
    seed: int
    lead: tuple
    k: int
    n: int
    rank: int
    groups: int
    indexed: torch.dtype | None
    dtype: torch.dtype
    wide_gate: bool
    needs: tuple
    layouts: tuple
    bias: bool

    def tensors(self):
        generator = torch.Generator(torch.get_default_device()).manual_seed(self.seed)
        shapes = {"x": (*self.lead, self.k), "weight": (self.n, self.k), "lora_a": (self.rank, self.k),
                  "lora_b": (self.n, self.rank), "gate": (self.groups, self.rank), "bias": (self.n,)}  # fmt: skip
        tensors = {}
        for (name, shape), layout in zip(shapes.items(), self.layouts):
            kind = torch.float32 if name == "gate" and self.wide_gate else self.dtype
            tensors[name] = laid_out(torch.randn(shape, generator=generator).to(kind), layout)
        if not self.bias:
            tensors["bias"] = None
        rows = math.prod(self.lead)
        index = None
        if self.indexed:
            index = torch.randint(0, self.groups, (rows,), generator=generator).to(self.indexed)
        dy = laid_out(torch.randn((*self.lead, self.n), generator=generator).to(self.dtype), self.layouts[-1])
        return tensors, index, dy


@st.composite
def lora_cases(draw, target, needs=None, most=67):
    size = SIZES.map(lambda n: min(n, most))
    width = (
        size.map(lambda n: max(n, 1)) if target == "triton" else size
    )  # no layer without inputs or outputs there
    lead = draw(st.one_of(st.tuples(size), st.tuples(st.sampled_from((0, 1, 2, 3, 5)), size), st.just(())))
    rows, indexed = math.prod(lead), draw(st.sampled_from((None, None, torch.int64, torch.int32)))
    if indexed:
        groups = draw(st.integers(1, 2 * rows + 2))  # more groups than rows too
    else:
        groups = draw(st.sampled_from((1, rows, *lead[:1])))
        assume(groups or not rows)
    return LoRACase(
        seed=draw(st.integers(0, 999)), lead=lead, k=draw(width), n=draw(width), rank=draw(size), groups=groups,
        indexed=indexed, dtype=draw(dtypes_of(target)), wide_gate=draw(st.booleans()),
        needs=needs or draw(st.tuples(*[st.booleans()] * 6)),
        layouts=draw(st.tuples(*[LAYOUTS] * 7)), bias=draw(st.booleans()),
    )  # fmt: skip


def lora_results(tensors, index, dy, needs):
    leaves = {name: None if t is None else t.detach().requires_grad_(need)
              for (name, t), need in zip(tensors.items(), needs)}  # fmt: skip
    bias = leaves.pop("bias")
    y = multi_lora_linear(*leaves.values(), bias=bias, gate_index=index)
    asking = {name: t for name, t in {**leaves, "bias": bias}.items() if t is not None and t.requires_grad}
    results = {"y": y.detach()}
    if asking:
        results |= dict(zip(asking, torch.autograd.grad(y, list(asking.values()), dy.to(y.dtype))))
    return results


def wide(tensors, change=lambda t: t):
    return {name: None if t is None else change(t.double()) for name, t in tensors.items()}


@EVERYWHERE
def test_multi_lora_linear_and_its_gradients_equal_the_specification(target):
    def claim(case):
        tensors, index, dy = case.tensors()
        got = lora_results(tensors, index, dy, case.needs)
        with use_backend("reference"):
            plain = lora_results(tensors, index, dy, case.needs)
            exact = lora_results(wide(tensors), index, dy.double(), case.needs)
            scale = lora_results(wide(tensors, torch.abs), index, dy.double().abs(), case.needs)
        for name, value in got.items():
            assert value.dtype is plain[name].dtype
            # torch may be exact by luck where there are few numbers: four roundings of the sum of the terms' sizes.
            eps = torch.finfo(case.dtype).eps
            slack = 4 * eps * scale[name].max().item() if value.numel() else 0.0
            assert_as_accurate(value, plain[name], exact[name], name, slack=slack)

    holds(target, lora_cases(target, most=33 if target == "triton" else 67), claim, 100)


@EVERYWHERE
def test_rows_permuted_give_the_result_permuted(target):
    def claim(case):
        tensors, index, _ = case.tensors()
        assume(len(case.lead) == 1 and (index is not None or case.groups in (1, case.lead[0])))
        bias = tensors.pop("bias")
        order = torch.randperm(
            case.lead[0], generator=torch.Generator(torch.get_default_device()).manual_seed(case.seed)
        )
        moved = dict(tensors, x=tensors["x"][order])
        if index is None and case.groups > 1:
            moved["gate"] = tensors["gate"][order]
        y = multi_lora_linear(*tensors.values(), bias=bias, gate_index=index)
        got = multi_lora_linear(
            *moved.values(), bias=bias, gate_index=None if index is None else index[order]
        )
        # BLAS may take other kernels for rows at the edge of a block: to rounding, not to the bit.
        eps = torch.finfo(case.dtype).eps
        torch.testing.assert_close(
            got, y[order], rtol=4 * eps, atol=16 * eps * (1 + y.abs().max().item() if y.numel() else 1)
        )

    holds(target, lora_cases(target, needs=(False,) * 6, most=33), claim)


@EVERYWHERE
def test_the_gate_acts_linearly_and_a_zero_gate_is_the_frozen_layer_to_the_bit(target):
    def claim(case):
        tensors, index, _ = case.tensors()
        bias, gate = tensors.pop("bias"), tensors.pop("gate").float()
        other = torch.randn(
            gate.shape, generator=torch.Generator(torch.get_default_device()).manual_seed(case.seed + 1)
        )

        def y(gate):
            return multi_lora_linear(*tensors.values(), gate, bias=bias, gate_index=index).double()

        zero = y(torch.zeros_like(gate))
        parts = [y(gate + other), y(gate), y(other), zero]
        size = max((part.abs().max().item() for part in parts if part.numel()), default=0.0)
        # (h * gate) is rounded to the dtype before the second product, whose terms may be larger than their sum.
        with use_backend("reference"):
            terms = multi_lora_linear(*(t.double().abs() for t in tensors.values()),
                                      (gate.abs() + other.abs()).double(), gate_index=index)  # fmt: skip
        size += terms.max().item() if terms.numel() else 0.0
        combined = parts[0] - parts[1] - parts[2] + parts[3]
        assert not combined.numel() or combined.abs().max() <= 8 * torch.finfo(case.dtype).eps * size
        frozen = multi_lora_linear(tensors["x"], tensors["weight"], tensors["lora_a"][:0], tensors["lora_b"][:, :0],
                                   gate.new_zeros(1, 0), bias=bias)  # fmt: skip
        assert torch.equal(zero, frozen.double())

    holds(target, lora_cases(target, needs=(False,) * 6, most=33), claim)


@dataclass(frozen=True)
class StatsCase:
    seed: int
    lead: tuple
    width: int
    vocabulary: int
    rank: int | None
    reference: str | None
    bias: bool
    softcap: float | None
    logit_scale: float
    per_row: bool
    ignored: bool
    spread: float
    outputs: tuple
    dtype: torch.dtype
    needs: tuple
    layouts: tuple

    def generator(self):
        return torch.Generator(torch.get_default_device()).manual_seed(self.seed)

    def options(self):
        temperature = 0.5 + torch.rand(self.lead, generator=self.generator()) if self.per_row else 0.8
        return {
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "temperature": temperature,
            "outputs": self.outputs,
        }

    def targets(self):
        targets = torch.randint(0, self.vocabulary, self.lead, generator=self.generator())
        if self.ignored:
            targets[torch.rand(self.lead, generator=self.generator()) < 0.3] = -100
        return targets

    def tensors(self):
        generator = self.generator()
        apart = self.reference == "apart"
        rank, width, ref_width = self.rank or 0, self.width, self.width + apart
        shapes = {"hidden": (*self.lead, width), "weight": (self.vocabulary, width), "bias": (self.vocabulary,),
                  "a": (rank, width), "b": (self.vocabulary, rank), "gate": (*self.lead, rank),
                  "ref_hidden": (*self.lead, ref_width), "ref_weight": (self.vocabulary, ref_width)}  # fmt: skip
        scales = dict.fromkeys(("weight", "ref_weight"), self.spread / max(width, 1) ** 0.5)
        made = {}
        for (name, shape), layout in zip(shapes.items(), self.layouts):
            value = torch.randn(shape, generator=generator) * scales.get(name, 1.0)
            if name == "ref_hidden" and not apart:
                value = made["hidden"].float() + 0.1 * value
            made[name] = laid_out(value.to(self.dtype), layout)
        if not self.bias:
            made["bias"] = None
        if self.rank is None:
            made["a"] = made["b"] = made["gate"] = None
        if not apart:
            made["ref_weight"] = None
        if self.reference is None:
            made["ref_hidden"] = None
        return made

    def incoming(self):
        generator = self.generator()
        return {name: torch.randn(self.lead, generator=generator, dtype=torch.float64) for name in OUTPUTS}


@st.composite
def stats_cases(draw, target, outputs=None):
    small = target == "triton"
    rows = st.sampled_from((0, 1, 2, 3, 5, 7, 13) if small else (0, 1, 2, 3, 7, 31, 67))
    vocabulary = st.sampled_from(
        (1, 2, 3, 17, 64, 67, 257) if small else (1, 2, 3, 17, 67, 1021, 1024, 1025, 2053)
    )
    reference = draw(st.sampled_from((None, "shared", "apart") if outputs is None else ("shared", "apart")))
    allowed = [name for name in OUTPUTS if reference or name not in ("ref_logprob", "kl", "reverse_kl")]
    return StatsCase(
        seed=draw(st.integers(0, 999)), lead=draw(st.one_of(st.tuples(rows), st.tuples(st.sampled_from((1, 2)), rows))),
        width=draw(st.sampled_from((0, 1, 3, 16, 33))), vocabulary=draw(vocabulary),
        rank=draw(st.sampled_from((None, None, 0, 1, 5))), reference=reference, bias=draw(st.booleans()),
        softcap=draw(st.sampled_from((None, None, 3.0))), logit_scale=draw(st.sampled_from((1.0, 0.7))),
        per_row=draw(st.booleans()), ignored=draw(st.booleans()), spread=draw(st.sampled_from((1.0, 10.0))),
        outputs=outputs or tuple(draw(st.lists(st.sampled_from(allowed), min_size=1, unique=True))),
        dtype=draw(dtypes_of(target)), needs=draw(st.tuples(*[st.booleans()] * 6)), layouts=draw(st.tuples(*[LAYOUTS] * 8)),
    )  # fmt: skip


LEAVES = ("hidden", "weight", "bias", "a", "b", "gate")


def linear_results(case, tensors):
    leaves = dict(tensors)
    for name, need in zip(LEAVES, case.needs):
        if leaves[name] is not None:
            leaves[name] = leaves[name].detach().requires_grad_(need)
    lora = None if leaves["a"] is None else HeadLoRA(leaves["a"], leaves["b"], leaves["gate"])
    stats = linear_logprob(leaves["hidden"], leaves["weight"], case.targets(), bias=leaves["bias"], lora=lora,
                           ref_hidden=leaves["ref_hidden"], ref_weight=leaves["ref_weight"], **case.options())  # fmt: skip
    return collected(case, stats, {name: leaves[name] for name in LEAVES})


def collected(case, stats, leaves):
    """The outputs, and the gradients of the leaves that ask, with an incoming gradient for each row and output."""
    results = {name: getattr(stats, name) for name in case.outputs}
    asking = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
    incoming = case.incoming()
    differentiated = [name for name in case.outputs if name not in CONSTANT]
    if asking and differentiated:
        grads = torch.autograd.grad([results[name] for name in differentiated], list(asking.values()),
                                    [incoming[name].to(results[name].dtype) for name in differentiated],
                                    allow_unused=True)  # fmt: skip
        results |= {
            f"d_{name}": torch.zeros_like(t) if g is None else g
            for (name, t), g in zip(asking.items(), grads)
        }
    return {name: value.detach() for name, value in results.items()}


def assert_statistics_right(case, got, plain, exact, logits, sizes):
    """logits: the largest sum of the sizes of a logit's terms, for the slack where plain torch is right by luck; sizes:
    the same for what a gradient of each leaf multiplies d(loss)/d(logits) with."""
    half = case.dtype is not torch.float32
    for name, value in got.items():
        assert value.dtype is plain[name].dtype and value.shape == exact[name].shape
        if name == "top1":
            continue
        # A logit has 2^-16 of itself from two bfloat16 products; what enters a gradient's product has the dtype's rounding.
        eps = 2.0**-16 if half else 2.0**-23
        slack = 4 * eps * (1 + logits)
        if name.startswith("d_"):
            eps = torch.finfo(case.dtype).eps
            slack = 8 * eps * (1 + logits) * sizes[name[2:]] * len(case.outputs) * case.logit_scale * 2
        assert_as_accurate(value, plain[name], exact[name], name, slack=slack)


def largest(tensor):
    return 0.0 if tensor is None or tensor.numel() == 0 else tensor.abs().max().item()


@EVERYWHERE
def test_linear_logprob_and_its_gradients_equal_the_specification(target):
    def claim(case):
        tensors = case.tensors()
        got = linear_results(case, tensors)
        with use_backend("reference"):
            plain, exact = linear_results(case, tensors), linear_results(case, wide(tensors))
        t = wide(tensors)
        logits = (
            (t["hidden"].abs() @ t["weight"].abs().t()).max().item()
            if case.width and math.prod(case.lead)
            else 0.0
        )
        low = largest(t["a"]) * case.width * largest(t["hidden"])  # of hidden a^T
        logits += largest(t["bias"]) + (case.rank or 0) * largest(t["b"]) * largest(t["gate"]) * low
        if t["ref_hidden"] is not None and t["ref_hidden"].numel():
            head = t["weight"] if t["ref_weight"] is None else t["ref_weight"]
            logits = max(logits, (t["ref_hidden"].abs() @ head.abs().t()).max().item() + largest(t["bias"]))
        rows, incoming = math.prod(case.lead), max(largest(g) for g in case.incoming().values())
        sizes = {"hidden": largest(t["weight"]) + (case.rank or 0) * largest(t["b"]) * largest(t["gate"]) * largest(t["a"]),
                 "weight": rows * largest(t["hidden"]), "bias": rows, "gate": largest(t["b"]) * low,
                 "a": rows * largest(t["b"]) * largest(t["gate"]) * largest(t["hidden"]),
                 "b": rows * low * largest(t["gate"])}  # fmt: skip
        assert_statistics_right(
            case, got, plain, exact, logits, {name: size * incoming for name, size in sizes.items()}
        )

    holds(target, stats_cases(target), claim, 60)


@EVERYWHERE
def test_logits_logprob_and_its_gradient_equal_the_specification(target):
    def claim(case):
        generator = case.generator()
        shape = (*case.lead, case.vocabulary)
        logits = laid_out(
            (torch.randn(shape, generator=generator) * case.spread).to(case.dtype), case.layouts[0]
        )
        reference = None
        if case.reference:
            noise = torch.randn(shape, generator=generator) * (1.0 if case.reference == "apart" else 0.05)
            reference = laid_out((logits + noise).to(case.dtype), case.layouts[1])

        def results(logits, reference):
            leaf = logits.detach().requires_grad_(case.needs[0])
            stats = logits_logprob(leaf, case.targets(), ref_logits=reference, **case.options())
            return collected(case, stats, {"logits": leaf})

        got = results(logits, reference)
        with use_backend("reference"):
            plain = results(logits, reference)
            exact = results(logits.double(), None if reference is None else reference.double())
        assert_statistics_right(case, got, plain, exact, max(largest(logits), largest(reference)),
                                {"logits": max(largest(g) for g in case.incoming().values())})  # fmt: skip

    holds(target, stats_cases(target), claim, 60)


@EVERYWHERE
def test_statistics_stay_in_their_bounds(target):
    """0 <= entropy <= log V, log-probs <= 0, both divergences >= 0, and 0 where policy and reference are one."""

    def claim(case):
        generator = case.generator()
        logits = torch.randn((*case.lead, case.vocabulary), generator=generator) * case.spread
        other = logits + torch.randn(logits.shape, generator=generator) * (
            3.0 if case.reference == "apart" else 1e-3
        )
        stats = logits_logprob(logits, case.targets(), ref_logits=other, **case.options())
        rounding = 4e-6 * case.spread
        assert (stats.entropy >= -rounding).all() and (
            stats.entropy <= math.log(case.vocabulary) + rounding
        ).all()
        for name in ("logprob", "ref_logprob"):
            assert (getattr(stats, name) <= rounding).all()
        assert (stats.kl >= -rounding).all() and (stats.reverse_kl >= -rounding).all()
        same = logits_logprob(logits, case.targets(), ref_logits=logits, **case.options())
        assert largest(same.kl) < 1e-6 and largest(same.reverse_kl) < 1e-6
        assert torch.equal(same.logprob, same.ref_logprob)

    holds(target, stats_cases(target, outputs=OUTPUTS), claim)


def sums_of(z, z_ref, targets, first):
    """Sums of one piece of the vocabulary, whose first column is `first`."""
    m_p, m_q = z.max(-1).values, z_ref.max(-1).values
    e, f = (z - m_p[:, None]).exp(), (z_ref - m_q[:, None]).exp()
    inside = (targets >= first) & (targets < first + z.shape[1])
    column = torch.where(inside, targets - first, 0)[:, None]
    at = [torch.where(inside, each.gather(1, column)[:, 0], 0.0) for each in (z, z_ref)]
    return Sums(m_p, e.sum(-1), (e * (z - m_p[:, None])).sum(-1), (e * (z - z_ref)).sum(-1), m_q, f.sum(-1),
                (f * (z_ref - z)).sum(-1), *at)  # fmt: skip


def merged(one, two):
    """As clp_kernels.token_stats says that sums of two pieces merge."""
    m_p, m_q = torch.maximum(one.m_p, two.m_p), torch.maximum(one.m_q, two.m_q)
    s_p = a_p = d_p = s_q = d_q = 0.0
    for each in (one, two):
        k, k_ref = (each.m_p - m_p).exp(), (each.m_q - m_q).exp()
        s_p = s_p + k * each.s_p
        a_p = a_p + k * (each.a_p + (each.m_p - m_p) * each.s_p)
        d_p = d_p + k * each.d_p
        s_q = s_q + k_ref * each.s_q
        d_q = d_q + k_ref * each.d_q
    return Sums(m_p, s_p, a_p, d_p, m_q, s_q, d_q, one.t_p + two.t_p, one.t_q + two.t_q)


@st.composite
def pieces(draw):
    count = draw(st.integers(1, 6))
    widths = draw(st.lists(st.sampled_from((1, 2, 7, 40)), min_size=count, max_size=count))
    return (
        draw(st.integers(0, 999)),
        widths,
        draw(st.permutations(range(count))),
        draw(st.sampled_from((1.0, 30.0))),
    )


def test_sums_of_pieces_merge_in_any_order_and_any_grouping_to_the_statistics_of_the_whole():
    def claim(case):
        seed, widths, order, spread = case
        generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
        z = spread * torch.randn(5, sum(widths), generator=generator, dtype=torch.float64)
        z_ref = z + torch.randn(z.shape, generator=generator, dtype=torch.float64)
        targets = torch.randint(0, z.shape[1], (5,), generator=generator)
        starts = [sum(widths[:i]) for i in range(len(widths))]
        parts = [sums_of(z[:, s : s + w], z_ref[:, s : s + w], targets, s) for s, w in zip(starts, widths)]
        left = parts[order[0]]
        for i in order[1:]:
            left = merged(left, parts[i])
        right = parts[order[-1]]
        for i in reversed(order[:-1]):
            right = merged(parts[i], right)
        top1 = z.argmax(-1)
        with use_backend("reference"):
            exact = logits_logprob(z, targets, ref_logits=z_ref, outputs=OUTPUTS)
        for sums in (left, right):
            outputs, _ = statistics(sums, top1, frozenset(OUTPUTS), None, torch.float64)
            for name, value in zip(OUTPUTS, outputs):
                torch.testing.assert_close(value, getattr(exact, name), rtol=1e-10, atol=1e-10 * spread)

    holds("reference", pieces(), claim)


@dataclass(frozen=True)
class DrawCase:
    seed: int
    rows: int
    vocabulary: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    ties: bool
    layout: str
    dtype: torch.dtype

    def logits(self):
        logits = (
            torch.randn(
                self.rows,
                self.vocabulary,
                generator=torch.Generator(torch.get_default_device()).manual_seed(self.seed),
            )
            * 3
        )
        return laid_out((logits.round() if self.ties else logits).to(self.dtype), self.layout)

    def options(self):
        return {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")}

    def seeds(self):
        return torch.randint(
            -(2**62),
            2**62,
            (self.rows,),
            generator=torch.Generator(torch.get_default_device()).manual_seed(self.seed + 1),
        )


@st.composite
def draw_cases(draw, target):
    vocabulary = draw(st.sampled_from((1, 2, 3, 17, 255, 256, 257, 1021)))
    return DrawCase(
        seed=draw(st.integers(0, 999)), rows=draw(st.sampled_from((0, 1, 2, 5) if target == "triton" else (0, 1, 2, 7, 19))),
        vocabulary=vocabulary, temperature=draw(st.sampled_from((0.0, 1e-3, 0.3, 1.0, 2.5))),
        top_k=draw(st.sampled_from((None, 0, 1, 3, vocabulary - 1, vocabulary, vocabulary + 5))),
        top_p=draw(st.sampled_from((None, 1e-6, 0.5, 0.95, 1.0))), min_p=draw(st.sampled_from((None, 0.0, 0.1, 1.0))),
        ties=draw(st.booleans()), layout=draw(LAYOUTS), dtype=draw(dtypes_of(target)),
    )  # fmt: skip


@EVERYWHERE
def test_sampled_tokens_lie_in_the_support_and_have_their_log_prob(target):
    def claim(case):
        logits, seeds = case.logits(), case.seeds()
        tokens, logprob = sample_tokens(logits, seeds=seeds, **case.options())
        again = sample_tokens(logits.contiguous(), seeds=seeds, **case.options())
        assert torch.equal(tokens, again[0]) and torch.equal(logprob, again[1])
        temperature = case.temperature or 1.0
        z = logits.double()
        log_p = (z / temperature).log_softmax(-1)
        size = 1 + largest(z) / temperature
        torch.testing.assert_close(
            logprob.double(), log_p.gather(1, tokens[:, None])[:, 0], rtol=1e-5, atol=1e-6 * size
        )
        with use_backend("reference"):
            scored = logits_logprob(logits.float(), tokens, temperature=temperature).logprob
        torch.testing.assert_close(logprob, scored, rtol=1e-5, atol=1e-6 * size)
        chosen = z.gather(1, tokens[:, None])[:, 0]
        top = z.max(-1).values if case.rows else chosen
        if case.temperature == 0:
            assert torch.equal(tokens, z.argmax(-1))
        if case.top_k == 1 or case.temperature == 0 or case.min_p == 1 or case.top_p == 1e-6:
            assert torch.equal(chosen, top)
        if case.temperature and case.top_k and case.top_k < case.vocabulary:
            assert ((z > chosen[:, None]).sum(-1) < case.top_k).all()
        if case.temperature and case.min_p:
            assert (chosen >= top + temperature * math.log(case.min_p) - 1e-6 * (1 + top.abs())).all()
        if case.temperature and case.top_p:
            # What is strictly more likely weighs less than top_p of what top_k keeps.
            kept = (
                z
                >= z.sort(-1, descending=True).values[
                    :, [min(case.top_k or case.vocabulary, case.vocabulary) - 1]
                ]
            )
            mass = (log_p.exp() * kept).sum(-1)
            above = (log_p.exp() * (kept & (z > chosen[:, None]))).sum(-1)
            assert (above < case.top_p * mass + 1e-6).all()

    holds(target, draw_cases(target), claim, 60)


@FAST
def test_sampled_tokens_are_the_references_but_at_borders(target):
    def claim(case):
        logits, seeds = case.logits(), case.seeds()
        tokens, _ = sample_tokens(logits, seeds=seeds, **case.options())
        with use_backend("reference"):
            expected, _ = sample_tokens(logits, seeds=seeds, **case.options())
        # A uniform within rounding of a border between two tokens: once in thousands of draws.
        assert (tokens != expected).sum() <= (1 if case.temperature else 0)

    holds(target, draw_cases(target), claim)
