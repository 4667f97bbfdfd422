"""linear_logprob: what `differentiable` leaves out, and the gradients that a frozen head's forward pass prepares, are right.

With a frozen head a back-end may keep d(output)/d(hidden) of each differentiable output ("directions") instead of logits: the
CPU's those of logprob, kl and lse, Triton's those of logprob and lse.
"""

import functools
import importlib
import itertools
import sys

import pytest
import torch
from clp_kernels import HeadLoRA, batch_invariant, linear_logprob, logits_logprob, token_stats, use_backend
from clp_kernels.backends import forced_backend
from token_cases import (
    DIFFERENTIABLE,
    OUTPUTS,
    assert_as_accurate,
    call_linear,
    head_tensors,
    run,
    targets_for,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning:triton"),
]
NATIVE = pytest.mark.parametrize("backend", ["cpu"], indirect=True)
BOTH = pytest.mark.parametrize("backend", ["cpu", "triton"], indirect=True)
WITH_DIRECTIONS = token_stats.DIRECTED
SUBSETS = [s for n in range(1, 4) for s in itertools.combinations(WITH_DIRECTIONS, n)]
ON = [("cpu", s) for s in SUBSETS] + [("triton", s) for s in SUBSETS if "kl" not in s]
EACH = pytest.mark.parametrize(
    "backend, names", ON, indirect=["backend"], ids=[f"{b}-{'-'.join(s)}" for b, s in ON]
)
PACKAGE = {"cpu": "cpu", "triton": "triton_kernels"}
ALL_SUBSETS = [s for n in range(6) for s in itertools.combinations(DIFFERENTIABLE, n)]


@pytest.fixture
def along(backend, monkeypatch):
    """Grows with each backward pass along directions."""
    module = importlib.import_module(f"clp_kernels.{PACKAGE[backend]}.token_stats")
    calls, original = [], module.linear_backward_along
    monkeypatch.setattr(
        module, "linear_backward_along", lambda *args: calls.append(args[4]) or original(*args)
    )
    return calls


@pytest.fixture
def directions(along, monkeypatch):
    """Every call keeps directions, whatever the cost model says."""
    monkeypatch.setattr(
        sys.modules["clp_kernels.linear_logprob"],
        "what_to_keep",
        lambda module, head, names, *_, **__: token_stats.Keep(directions=tuple(names)),
    )
    return along


def gradients(tensors, targets, names, wanted=("hidden",), call=call_linear, rows=slice(None), **options):
    """Every output, and gradients where `names` alone are differentiable."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    incoming = {n: torch.randn(targets.shape, dtype=torch.float64, generator=generator) for n in names}
    part = {
        n: t if t is None or n not in ("hidden", "ref_hidden", "gate") else t[rows]
        for n, t in tensors.items()
    }
    incoming = {n: g[rows] for n, g in incoming.items()}
    return run(call, part, targets[rows], OUTPUTS, wanted, incoming, **options)


def assert_right_alone(tensors, targets, names, wanted=("hidden",), **options):
    """The gradients where `names` alone are differentiable are as accurate as plain torch's; the outputs do not change."""
    got = gradients(
        tensors, targets, names, wanted, functools.partial(call_linear, differentiable=names), **options
    )
    with use_backend("reference"):
        plain = gradients(tensors, targets, names, wanted, **options)
        wide = {name: None if t is None else t.double() for name, t in tensors.items()}
        exact = gradients(wide, targets, names, wanted, **options)
    with torch.no_grad():
        usual = gradients(tensors, targets, (), (), **options)
    room = 5e-6 if forced_backend() == "triton" else 1e-6  # the tiles of a row are added up in another order
    for name in OUTPUTS:
        torch.testing.assert_close(got[name], usual[name], rtol=room, atol=room)
    for name in (f"d_{name}" for name in wanted):
        assert_as_accurate(got[name], plain[name], exact[name], name)
    return got


@EACH
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 5.0, "logit_scale": 1.3}, {"temperature": torch.linspace(0.5, 1.5, 40)}],
    ids=lambda o: "-".join(o) or "plain",
)
@pytest.mark.parametrize("case", ["head", "bias", "lora", "peaked"])
def test_gradients_along_directions_are_as_accurate_as_torch(backend, directions, names, options, case):
    tensors = head_tensors(
        40, 24, 700, bias=case in ("bias", "lora"), lora=6 * (case == "lora"), spread=20.0 if case == "peaked" else 1.0
    )  # fmt: skip
    if backend == "triton" and case == "lora":
        pytest.skip("without LoRA, says what_to_keep")
    wanted = ("hidden", "a", "gate") if case == "lora" else ("hidden",)
    assert_right_alone(tensors, targets_for(40, 700), names, wanted, **options)
    assert directions == [list(names)]


@NATIVE
@pytest.mark.parametrize("chunk, rows", [(3000, 30), (1 << 20, 2048), (40 * 1500, 2048)])
def test_the_maximum_may_move_in_every_chunk_and_within_one(backend, directions, chunk, rows, monkeypatch):
    """Logits that climb with the column: what earlier columns added is worth less and less, until it is worth nothing."""
    import clp_kernels.cpu.token_stats as native

    monkeypatch.setattr(native, "CHUNK", chunk)
    monkeypatch.setattr(native, "ROWS", rows)
    for climb in (3.0, 300.0):
        tensors = head_tensors(40, 16, 3300, bias=True)
        tensors["bias"] += torch.linspace(-climb, 0, 3300)
        assert_right_alone(tensors, targets_for(40, 3300), ("logprob", "kl"))
    assert len(directions) == 2


@BOTH
def test_masked_columns_have_no_part_in_directions(backend, directions):
    names = WITH_DIRECTIONS if backend == "cpu" else ("logprob", "lse")
    tensors, targets = head_tensors(6, 8, 1200, bias=True), torch.randint(1000, 1200, (6,))
    masked = torch.arange(1200) < 1000
    tensors["bias"][masked] = -torch.inf
    tensors["bias"][~masked] -= 100  # lower than where an empty tile might put the centre
    got = gradients(tensors, targets, names, call=functools.partial(call_linear, differentiable=names))
    small = {n: t if n in ("hidden", "ref_hidden") or t is None else t[~masked] for n, t in tensors.items()}
    with use_backend("reference"):
        want = gradients(small, targets - 1000, names)
    torch.testing.assert_close(got["d_hidden"], want["d_hidden"], rtol=1e-4, atol=2e-6)
    assert len(directions) == 1


@NATIVE
@pytest.mark.parametrize("masked", [0, 1500])
def test_a_constant_between_policy_and_reference_costs_no_more_than_it_does_recomputing(
    backend, masked, monkeypatch
):
    """z - z' is about 100 everywhere, and what it is beside that is the gradient of KL."""
    tensors, targets, errors = head_tensors(30, 16, 2900, bias=True), targets_for(30, 2900), []
    ref_bias = tensors["bias"] - 100
    tensors["bias"][:masked] = -torch.inf
    with use_backend("reference"):
        wide = {name: None if t is None else t.double() for name, t in tensors.items()}
        exact = gradients(wide, targets, ("kl",), ref_bias=ref_bias.double())["d_hidden"]
    for keep in (token_stats.Keep(directions=("kl",)), token_stats.Keep()):
        monkeypatch.setattr(
            sys.modules["clp_kernels.linear_logprob"], "what_to_keep", lambda *_, keep=keep, **__: keep
        )
        call = functools.partial(call_linear, differentiable=("kl",))
        got = gradients(tensors, targets, ("kl",), call=call, ref_bias=ref_bias)["d_hidden"]
        errors.append((got - exact).norm())
    assert errors[0] < 1.5 * errors[1] and errors[1] < 1e-3 * exact.norm()


@BOTH
def test_a_probability_near_one_leaves_the_gradient_of_the_others(backend, directions):
    """Every target has nearly all of the mass: the gradient is small, and none of it is what a sum close to W_y has lost."""
    tensors, targets = head_tensors(30, 16, 900), torch.randint(0, 900, (30,))
    rows = tensors["weight"][targets]
    tensors["hidden"] = 40 * rows / rows.square().sum(1, keepdim=True)
    got = assert_right_alone(tensors, targets, ("logprob",))
    assert got["logprob"].exp().median() > 0.99


@NATIVE
@pytest.mark.parametrize("names", [("logprob",), ("logprob", "lse"), ("kl",)], ids="-".join)
def test_bfloat16_directions_are_of_one_term(backend, along, names):
    tensors = head_tensors(40, 64, 1500, bias=True, dtype=torch.bfloat16)
    assert_right_alone(tensors, targets_for(40, 1500), names, softcap=20.0)
    assert bool(along) == ("kl" not in names)


@BOTH
def test_the_head_of_the_reference_may_differ_and_ignored_rows_may_hold_nan(backend, directions):
    names = WITH_DIRECTIONS if backend == "cpu" else ("logprob", "lse")
    tensors, targets = head_tensors(10, 8, 70, bias=True), targets_for(10, 70)
    tensors["ref_hidden"], tensors["ref_weight"] = torch.randn(10, 12), torch.randn(70, 12)
    assert_right_alone(tensors, targets, names[1:], ref_bias=None)
    tensors["hidden"][1] = torch.nan
    got = gradients(tensors, targets, names, call=functools.partial(call_linear, differentiable=names))
    assert not got["d_hidden"][1].any() and got["d_hidden"].isfinite().all() and len(directions) == 2


@NATIVE
def test_every_instruction_set_agrees_on_directions(backend, directions, instruction_sets):
    from clp_kernels import _native

    tensors, targets = head_tensors(30, 16, 1100, bias=True), targets_for(30, 1100)
    for isa in instruction_sets:
        _native.select_isa(isa)
        assert_right_alone(tensors, targets, WITH_DIRECTIONS, softcap=8.0)
    assert len(directions) == len(instruction_sets)


@BOTH
def test_directions_serve_backward_after_backward_and_need_no_targets(backend, directions):
    tensors = head_tensors(12, 8, 300)
    hidden, last = tensors["hidden"].requires_grad_(), "kl" if backend == "cpu" else "lse"
    options = {"outputs": ("lse", "kl"), "differentiable": ("lse", "kl") if backend == "cpu" else ("lse",)}
    stats = linear_logprob(hidden, tensors["weight"], None, ref_hidden=tensors["ref_hidden"], **options)
    once, twice = (
        torch.autograd.grad(getattr(stats, last).sum(), hidden, retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(once, twice) and once.any()
    (lse,) = torch.autograd.grad(stats.lse.sum(), hidden)
    torch.testing.assert_close(lse, (hidden @ tensors["weight"].t()).softmax(-1) @ tensors["weight"])


@NATIVE
def test_a_row_of_directions_does_not_depend_on_its_batch(backend, directions):
    tensors, targets, names = head_tensors(70, 16, 600), targets_for(70, 600, False), ("logprob", "kl")
    call = functools.partial(call_linear, differentiable=names)
    with batch_invariant():
        whole = gradients(tensors, targets, names, call=call)
        part = gradients(tensors, targets, names, call=call, rows=slice(40, 43))
    assert torch.equal(part["d_hidden"], whole["d_hidden"][40:43])


@NATIVE
@pytest.mark.parametrize(
    "outputs, differentiable, room, count",
    [
        (("logprob", "entropy"), ("logprob",), False, 2),
        (("logprob", "entropy"), ("logprob", "entropy"), False, 3),
        (("logprob", "ref_logprob", "kl", "entropy"), ("logprob",), False, 3),
        (("logprob", "ref_logprob", "kl", "entropy"), ("logprob", "kl"), False, 4),
        (("logprob", "ref_logprob", "kl", "entropy"), ("kl",), False, 4),
        (("logprob", "kl", "entropy"), ("logprob", "kl", "entropy"), False, 5),
        (("logprob", "reverse_kl"), ("reverse_kl",), False, 5),
        (("logprob", "kl"), ("logprob",), True, 3),
        (("logprob", "kl"), ("logprob", "kl"), True, 3),
        (("logprob", "kl"), (), True, 2),
    ],
)
def test_number_of_products(backend, outputs, differentiable, room, count, monkeypatch):
    """As `what_to_keep` counts them, with room for all logits between forward and backward and without."""
    from clp_kernels.cpu import products

    monkeypatch.setitem(token_stats._WORTH_KEEPING, "cpu", 0)
    if not room:
        monkeypatch.setattr(token_stats, "KEEP_BYTES", 0)
    counted, (rows, width, vocabulary) = [], (60, 16, 800)
    for name in ("multiply", "accumulate"):
        original = getattr(products, name)

        def product(a, b, out, original=original):
            counted.append(a.shape[0] * a.shape[1] * b.shape[1])
            original(a, b, out)

        monkeypatch.setattr(products, name, product)
    incoming = {name: torch.ones(rows) for name in differentiable}
    call = functools.partial(call_linear, differentiable=differentiable)
    tensors, targets = head_tensors(rows, width, vocabulary), targets_for(rows, vocabulary, False)
    run(call, tensors, targets, outputs, ("hidden",), incoming)
    assert sum(counted) == pytest.approx(count * rows * width * vocabulary)


def test_directions_respect_the_memory_bound_and_need_a_frozen_head():
    cpu, tensors = "clp_kernels.cpu.token_stats", head_tensors(100, 128, 4000, lora=4)
    lora = HeadLoRA(tensors["a"], tensors["b"], tensors["gate"])
    plain, with_lora = (
        token_stats.Head(tensors["hidden"], tensors["weight"], None, None, None, None, each)
        for each in (None, lora)
    )

    def keep(names=("logprob",), needs=("hidden",), keep_bytes=None, head=plain, module=cpu):
        return token_stats.what_to_keep(module, head, names, set(needs), keep_bytes)

    size = 4 * 100 * 128
    assert keep() == token_stats.Keep(directions=("logprob",))
    assert keep(keep_bytes=size).directions and not keep(keep_bytes=size - 1).directions
    assert keep(keep_bytes=0) == token_stats.Keep(0, 1)
    wide = head_tensors(100, 512, 4000)
    wide = token_stats.Head(wide["hidden"], wide["weight"], None, None, None, None, None)
    assert keep(("logprob", "kl"), head=wide) == token_stats.Keep(
        100, 2
    )  # room for all logits, and one product left
    assert keep(("logprob", "kl")).directions  # whose width is less than that of the traffic
    assert keep(("logprob", "kl"), head=wide, keep_bytes=0) == token_stats.Keep(0, 2)
    assert keep(("logprob", "kl"), keep_bytes=2 * size).directions == ("logprob", "kl")
    assert not keep(needs=("hidden", "weight")).directions and not keep(needs=("lora_a",)).directions
    gpu = {"module": "clp_kernels.triton_kernels.token_stats"}
    assert keep(**gpu).directions == ("logprob",) and keep(("logprob", "lse"), **gpu).directions
    assert not keep(**gpu, keep_bytes=size - 1).directions and not keep(("logprob", "kl"), **gpu).directions
    assert not keep(**gpu, head=with_lora).directions and not keep(**gpu, head=wide).directions
    assert keep(**gpu, head=wide, keep_bytes=4 * size).directions
    assert not keep(**gpu, needs=("hidden", "bias")).directions
    assert keep(head=with_lora, needs=("hidden", "lora_a", "gate")).shape(with_lora) == (1, 100, 132)
    assert not keep(head=with_lora, needs=("hidden", "lora_b")).directions


@BOTH
def test_a_trained_head_gets_its_gradients_all_the_same(backend, along):
    tensors, targets = head_tensors(20, 16, 300, bias=True, lora=3), targets_for(20, 300)
    assert_right_alone(tensors, targets, ("logprob", "kl"), ("hidden", "weight", "bias", "a", "b", "gate"))
    assert not along


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"], indirect=True)
@pytest.mark.parametrize("op", ["linear", "logits"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton")
def test_only_the_differentiable_outputs_carry_gradients(backend, op):
    tensors, targets = head_tensors(5, 8, 90), targets_for(5, 90)
    leaf = (tensors["hidden"] if op == "linear" else torch.randn(5, 90)).requires_grad_()

    def call(names):
        options = {"outputs": OUTPUTS, "differentiable": names}
        if op == "linear":
            return linear_logprob(
                leaf, tensors["weight"], targets, ref_hidden=tensors["ref_hidden"], **options
            )
        return logits_logprob(leaf, targets, ref_logits=torch.zeros(5, 90), **options)

    def gradient(stats, name):
        return torch.autograd.grad(getattr(stats, name).sum(), leaf, retain_graph=True)[0]

    everything = call(None)
    for names in (("logprob",), ("entropy", "kl"), ()) if backend == "triton" else ALL_SUBSETS:
        stats = call(names)
        assert {name for name in OUTPUTS if getattr(stats, name).requires_grad} == set(names)
        for name in OUTPUTS:
            torch.testing.assert_close(getattr(stats, name), getattr(everything, name))
        for name in names:
            torch.testing.assert_close(
                gradient(stats, name), gradient(everything, name), rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize(
    "differentiable, message",
    [
        ("logprob", r"differentiable is the string 'logprob'"),
        (("kl",), r"differentiable has 'kl'; expected some of the outputs logprob, entropy, or None"),
        (("top1",), r"differentiable has 'top1'"),
    ],
)
def test_differentiable_must_be_among_the_outputs(differentiable, message):
    with pytest.raises(ValueError, match=message):
        logits_logprob(torch.zeros(2, 9), torch.zeros(2, dtype=torch.int64), outputs=("logprob", "entropy", "top1"),
                       differentiable=differentiable)  # fmt: skip


def _compiled_call(hidden, weight, targets):
    stats = linear_logprob(
        hidden * 2,
        weight,
        targets,
        ref_hidden=hidden.detach(),
        outputs=("logprob", "kl"),
        differentiable=("logprob",),
    )
    return stats.logprob.mean(), stats.kl


@NATIVE
def test_directions_compile_without_graph_breaks(backend, along):
    hidden, weight = torch.randn(2, 5, 16, requires_grad=True), torch.randn(100, 16)
    targets, results = torch.randint(0, 100, (2, 5)), []
    for function in (_compiled_call, torch.compile(_compiled_call, fullgraph=True, backend="aot_eager")):
        loss, kl = function(hidden, weight, targets)
        assert not kl.requires_grad
        results.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager)
    assert len(along) == 2
