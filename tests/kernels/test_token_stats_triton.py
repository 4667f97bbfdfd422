"""linear_logprob's Triton back-end: descriptors or pointers, kept or recomputed, in any blocks: the same statistics."""

import functools

import pytest
import torch
from accuracy import TRITON_HALVES, here
from clp_kernels import token_stats, use_backend
from later import later
from token_cases import (
    OUTPUTS,
    assert_as_accurate,
    assert_right,
    call_linear,
    head_tensors,
    incoming_gradients,
    run,
    run_all,
    targets_for,
)

pytest.importorskip("triton")

from clp_kernels.triton_kernels import directions as along  # noqa: E402
from clp_kernels.triton_kernels import head_logits, launch  # noqa: E402
from clp_kernels.triton_kernels import token_stats as back_end  # noqa: E402

pytestmark = [
    pytest.mark.parametrize("backend", ["triton"], indirect=True),
    # The interpreter's numpy warns of -inf - -inf in columns beyond the vocabulary, whose result is selected away.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton"),
]
ALL = ("hidden", "weight", "bias", "a", "b", "gate")


@pytest.fixture
def described(monkeypatch):
    """Whether each call's operands went through descriptors."""
    seen, inner = [], head_logits.HeadLogits.__init__

    def init(self, *args):
        inner(self, *args)
        seen.append(self.described)

    monkeypatch.setattr(head_logits.HeadLogits, "__init__", init)
    return seen


@pytest.mark.parametrize("lora", [8, *later(0, 72)])
@pytest.mark.parametrize("reference", ["none", "shares the weight", "has its own"])
def test_descriptors_with_ragged_edges(backend, lora, reference, described, monkeypatch):
    """(137, 72) x (72, 700): no tile divides any of them; a rank above one step of the contraction and its two parts."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 2)
    tensors = head_tensors(137, 72, 700, bias=True, lora=lora, dtype=torch.float16)
    outputs = OUTPUTS
    if reference == "none":
        tensors["ref_hidden"], outputs = None, ("logprob", "entropy", "lse", "top1")
    if reference == "has its own":
        tensors["ref_hidden"], tensors["ref_weight"] = (
            torch.randn(137, 40).half(),
            (torch.randn(700, 40) / 6).half(),
        )
    assert_right(call_linear, tensors, targets_for(137, 700), outputs, ALL if lora else ALL[:3])
    assert described == [True, True]


@pytest.mark.parametrize("change", ["width", "rank", "transposed weight", "float32"])
def test_what_a_descriptor_cannot_describe_goes_through_pointers(backend, change, described):
    dtype = torch.float32 if change == "float32" else torch.float16
    width, rank = (27 if change == "width" else 32), (3 if change == "rank" else 8)
    tensors = head_tensors(20, width, 300, lora=rank, dtype=dtype)
    if change == "transposed weight":
        tensors["weight"] = tensors["weight"].t().contiguous().t()
    assert_right(call_linear, tensors, targets_for(20, 300))
    assert not any(described)


@pytest.mark.parametrize("dtype", [*TRITON_HALVES, *later(torch.float32)], ids=str)
def test_d_hidden_of_a_row_has_the_same_bits_in_any_batch_and_any_block_of_rows(backend, dtype, monkeypatch):
    monkeypatch.setattr(back_end, "CHUNK", 256)
    tensors, targets = head_tensors(300, 16, 600, dtype=dtype), targets_for(300, 600, False)
    whole = run_all(call_linear, tensors, targets, OUTPUTS, ("hidden",))
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)
    assert back_end._row_block(300, 16, torch.device("cpu")) == 128
    blocked = run_all(call_linear, tensors, targets, OUTPUTS, ("hidden",))
    assert torch.equal(blocked["d_hidden"], whole["d_hidden"])
    few = {n: t if n == "weight" or t is None else t[140:143] for n, t in tensors.items()}
    incoming = {n: g[140:143] for n, g in incoming_gradients(tensors, OUTPUTS).items()}
    part = run(call_linear, few, targets[140:143], OUTPUTS, ("hidden",), incoming)
    assert torch.equal(part["d_hidden"], whole["d_hidden"][140:143])


@pytest.mark.parametrize(
    "dtype, outputs, wanted",
    [
        (torch.float32, ("logprob",), ALL),
        *later(
            (torch.float32, OUTPUTS, ("hidden",)),
            (torch.float16, ("logprob", "entropy"), ("hidden",)),
            (torch.float16, OUTPUTS, ALL),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, torch.dtype) else str(len(value)),
)
def test_kept_logits_of_some_rows_give_what_recomputed_ones_give(
    backend, dtype, outputs, wanted, monkeypatch
):
    """150 of 200 rows are kept: one block of 128 rows entirely, another in part, and no product is done for them."""
    monkeypatch.setitem(token_stats._WORTH_KEEPING, "triton_kernels", 0)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)
    tensors = head_tensors(200, 24, 400, bias=True, lora=8, dtype=dtype)
    targets = targets_for(200, 400)
    recomputed = run_all(call_linear, tensors, targets, outputs, wanted, softcap=8.0)
    products, inner = [], head_logits.HeadLogits.gradient

    def gradient(self, rows, saved, coefs, entropy, out, top, first):
        products.append((top, out.shape[0]))
        inner(self, rows, saved, coefs, entropy, out, top, first)

    monkeypatch.setattr(head_logits.HeadLogits, "gradient", gradient)
    bound = 150 * 400 * 4 * (2 if "kl" in outputs else 1)
    kept = run_all(call_linear, tensors, targets, outputs, wanted, softcap=8.0, keep_bytes=bound)
    assert products == [(150, 50)]
    for name, value in recomputed.items():
        # Narrower slices where logits are kept: sums in another order, and in 16 bits the rounding after those.
        room = 1e-3 if dtype is torch.float16 and name.startswith("d_") else 1e-6
        torch.testing.assert_close(
            kept[name], value, rtol=room, atol=room * value.abs().max().item(), msg=name
        )


def test_kept_logits_keep_the_kl_gradient_right_near_the_reference(backend, monkeypatch):
    """float32, so that the difference of two logits is not that of two roundings; KL is about 1e-4."""
    monkeypatch.setitem(token_stats._WORTH_KEEPING, "triton_kernels", 0)
    tensors, targets = head_tensors(24, 64, 700, spread=2.0, apart=5e-3), targets_for(24, 700, False)
    got = run_all(call_linear, tensors, targets, ("kl",), ("hidden",), keep_bytes=1 << 30)
    exact = {n: t if t is None else t.double() for n, t in tensors.items()}
    p, q = ((exact[name] @ exact["weight"].t()).log_softmax(-1) for name in ("hidden", "ref_hidden"))
    kl = (p.exp() * (p - q)).sum(-1)
    incoming = incoming_gradients(tensors, ("kl",))["kl"]
    d_hidden = (incoming[:, None] * p.exp() * (p - q - kl[:, None])) @ exact["weight"]
    assert 2e-5 < kl.mean() < 5e-4
    assert (got["d_hidden"].double() - d_hidden).norm() < 0.005 * d_hidden.norm()


def test_a_frozen_head_costs_no_product_and_a_trained_one_one_for_each_chunk(backend, monkeypatch):
    shapes, inner = [], back_end.multiply

    def multiply(x, w, out, add):
        shapes.append((*x.shape, w.shape[1]))
        inner(x, w, out, add)

    monkeypatch.setattr(back_end, "multiply", multiply)
    monkeypatch.setattr(back_end, "CHUNK", 256)
    tensors, targets = head_tensors(20, 16, 300), targets_for(20, 300)
    run_all(call_linear, tensors, targets, ("logprob",), ("hidden",), keep_bytes=0)
    assert shapes == [(20, 256, 16), (20, 44, 16)]
    shapes.clear()
    run_all(call_linear, tensors, targets, ("logprob",), ("weight",))
    assert shapes == [(256, 20, 16), (44, 20, 16)]


# --- directions: a frozen head's gradient, prepared by the forward pass


@pytest.fixture
def in_chunks(monkeypatch):
    """Chunks of 256 columns and blocks of 128 rows; (rows, columns) of the terms that are multiplied, and their factors."""
    monkeypatch.setattr(back_end, "CHUNK", 256)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)
    seen, inner = [], along.multiply

    def multiply(x, w, out, add, factor):
        seen.append((tuple(x.shape), factor.clone() if add else None))
        inner(x, w, out, add, factor)

    monkeypatch.setattr(along, "multiply", multiply)
    return seen


def along_directions(tensors, targets, names, outputs=OUTPUTS, **options):
    """Every output and d_hidden, of a call whose outputs `names` alone are differentiable, along directions."""
    incoming = {n: g for n, g in incoming_gradients(tensors, outputs).items() if n in names}
    call = functools.partial(call_linear, differentiable=names, keep_bytes=1 << 30)
    return run(call, tensors, targets, outputs, ("hidden",), incoming, **options)


def assert_along_right(tensors, targets, names, outputs=OUTPUTS, **options):
    got = along_directions(tensors, targets, names, outputs, **options)
    incoming = {n: g for n, g in incoming_gradients(tensors, outputs).items() if n in names}
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    with use_backend("reference"):
        plain, exact = (
            run(call_linear, each, targets, outputs, ("hidden",), incoming, **options)
            for each in (tensors, wide)
        )
    for name in got:
        if name == "top1":
            assert torch.equal(got[name], exact[name])
        else:
            assert_as_accurate(got[name], plain[name], exact[name], name)


@pytest.mark.parametrize("dtype", [*TRITON_HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        *later(
            {"softcap": 5.0, "logit_scale": 1.3},
            {"logit_scale": -0.8},
            {"temperature": torch.linspace(0.5, 1.5, 137)},
        ),
    ],
    ids=lambda o: "-".join(o) or "plain",
)
@pytest.mark.parametrize("case", ["reference", *later("alone", "bias", "peaked")])
def test_directions_with_ragged_edges(backend, in_chunks, dtype, options, case):
    """(137, 72) x (72, 700): no tile divides any of them; two blocks of rows, three chunks."""
    options = {name: here(value) for name, value in options.items()}
    tensors = head_tensors(
        137, 72, 700, bias=case == "bias", spread=20.0 if case == "peaked" else 1.0, dtype=dtype
    )
    outputs = OUTPUTS
    if case == "alone":
        tensors["ref_hidden"], outputs = None, ("logprob", "lse", "entropy")
    if case == "peaked":
        outputs = outputs[:-1]  # logits that a softcap has made equal
    assert_along_right(tensors, targets_for(137, 700), ("logprob", "lse"), outputs, **options)
    assert [shape for shape, _ in in_chunks] == [
        (rows, columns) for rows in (128, 9) for columns in (256, 256, 188)
    ]


@pytest.mark.parametrize("dtype", [*TRITON_HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("climb", [30.0, *later(3.0, 300.0)])
def test_the_centre_of_the_terms_is_raised_as_logits_climb(backend, in_chunks, dtype, climb):
    """What earlier columns added is worth less and less. float16 holds no e^11, and of tiles of one chunk some are raised."""
    tensors = head_tensors(40, 16, 900, bias=True, dtype=dtype)
    tensors["bias"] += torch.linspace(-climb, 0, 900).to(dtype)
    assert_along_right(tensors, targets_for(40, 900), ("logprob",))
    factors = torch.stack([factor for _, factor in in_chunks if factor is not None])
    assert (factors < 1).any() == (dtype is torch.float16 or climb > 100) and (factors <= 1).all()


def test_d_hidden_along_directions_has_the_same_bits_in_any_batch(backend, in_chunks):
    tensors, targets = head_tensors(300, 16, 600, dtype=torch.float16), targets_for(300, 600, False)
    whole = along_directions(tensors, targets, ("logprob",))
    few = {n: t if n == "weight" or t is None else t[140:143] for n, t in tensors.items()}
    incoming = {"logprob": incoming_gradients(tensors, OUTPUTS)["logprob"][140:143]}
    call = functools.partial(call_linear, differentiable=("logprob",), keep_bytes=1 << 30)
    part = run(call, few, targets[140:143], OUTPUTS, ("hidden",), incoming)
    assert torch.equal(part["d_hidden"], whole["d_hidden"][140:143])


def test_directions_take_two_products_and_the_backward_pass_none(backend, in_chunks, monkeypatch):
    tensors, targets = head_tensors(20, 16, 300), targets_for(20, 300)
    monkeypatch.setattr(back_end, "multiply", None)
    monkeypatch.setattr(head_logits.HeadLogits, "fold", None)
    along_directions(tensors, targets, ("logprob",), ("logprob", "entropy"))
    assert [shape for shape, _ in in_chunks] == [(20, 256), (20, 44)]
