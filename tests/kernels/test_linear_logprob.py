"""linear_logprob: statistics of softmax(hidden W^T) are right, and so is every gradient, without the logits."""

import functools

import pytest
import torch
from accuracy import TRITON_HALVES, here
from clp_kernels import HeadLoRA, TokenStats, linear_logprob, use_backend
from later import later
from token_cases import (
    CONSTANT,
    DIFFERENTIABLE,
    FUSED,
    OUTPUTS,
    assert_right,
    call_linear,
    head_tensors,
    incoming_gradients,
    run,
    run_all,
    targets_for,
)

# The interpreter's numpy warns of -inf - -inf in columns beyond the vocabulary, whose result is selected away.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton")
ALL = ("hidden", "weight", "bias", "a", "b", "gate")
NATIVE = pytest.mark.parametrize("backend", ["cpu"], indirect=True)


@FUSED
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 5.0, "logit_scale": 1.3}, {"temperature": torch.linspace(0.5, 1.5, 40)}],
    ids=lambda o: "-".join(o),
)
def test_outputs_and_gradients_are_as_accurate_as_torch(backend, options):
    tensors = head_tensors(40, 24, 700, bias=True, lora=6)
    options = {name: here(value) for name, value in options.items()}
    assert_right(call_linear, tensors, targets_for(40, 700), wanted=ALL, **options)


@NATIVE
def test_bfloat16_is_as_accurate_as_torch(backend):
    tensors = head_tensors(40, 64, 1500, bias=True, lora=6, dtype=torch.bfloat16)
    assert_right(call_linear, tensors, targets_for(40, 1500), wanted=ALL, softcap=20.0)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_float16_is_as_accurate_as_torch(backend):
    tensors = head_tensors(40, 24, 700, bias=True, lora=6, dtype=torch.float16)
    assert_right(call_linear, tensors, targets_for(40, 700), wanted=ALL)


@FUSED
@pytest.mark.parametrize("output", DIFFERENTIABLE)
def test_each_output_alone(backend, output):
    assert_right(call_linear, head_tensors(12, 16, 300), targets_for(12, 300), outputs=(output,))


@FUSED
def test_any_subset_of_the_outputs_equals_all_of_them(backend):
    tensors, targets = head_tensors(5, 8, 90), targets_for(5, 90)
    together = run_all(call_linear, tensors, targets, OUTPUTS)
    for outputs in (
        ("kl",),
        ("reverse_kl", "entropy"),
        ("ref_logprob",),
        ("top1", "lse"),
        ("entropy", "kl"),
        ("logprob", "top1"),
    ):
        stats = call_linear(tensors, targets, outputs)
        assert {name for name in OUTPUTS if getattr(stats, name) is not None} == set(outputs)
        for name in outputs:
            torch.testing.assert_close(getattr(stats, name), together[name], rtol=0, atol=1e-6)


@NATIVE
@pytest.mark.parametrize(
    "rows, vocabulary, width",
    [(3, 50257, 8), (2, 129920, 4), (1937, 1500, 16), (1, 700, 16), (1, 1, 4), (600, 513, 8)],
)
def test_sizes_that_no_tile_divides(backend, rows, vocabulary, width):
    assert_right(
        call_linear,
        head_tensors(rows, width, vocabulary),
        targets_for(rows, vocabulary, rows > 5),
        wanted=ALL[:2],
    )


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize(
    "rows, vocabulary, width", [(130, 1500, 36), (1, 1, 4), *later((2, 50257, 4), (1, 129920, 4))]
)
def test_sizes_that_no_triton_tile_divides(backend, rows, vocabulary, width, monkeypatch):
    """With wide tiles, as the interpreter takes a millisecond for each operation on a tile, however large it is."""
    from clp_kernels.triton_kernels import head_logits, launch, products

    wide = launch.Tile(16, 1024, 32, 4, 2)
    monkeypatch.setitem(head_logits._TILES, "plain", {"single": wide, "pair": wide})
    monkeypatch.setitem(products._TILES, "plain", launch.Tile(512, 16, 512, 4, 2))
    assert_right(
        call_linear,
        head_tensors(rows, width, vocabulary),
        targets_for(rows, vocabulary, rows > 5),
        wanted=ALL[:2],
    )


@FUSED
@pytest.mark.parametrize("case", ["peaked", "far below zero", "first tile far below the rest"])
def test_extreme_logits(backend, case):
    tensors = head_tensors(12, 16, 1100, bias=True, spread=30.0 if case == "peaked" else 1.0)
    if case == "far below zero":
        tensors["bias"] -= 100
    if case == "first tile far below the rest":
        tensors["bias"][:600] -= 200
    assert_right(call_linear, tensors, targets_for(12, 1100), wanted=ALL[:3])


@FUSED
def test_masked_vocabulary_counts_for_nothing(backend):
    """Logits of -inf: the statistics are those of the vocabulary without them, and no gradient passes."""
    tensors, targets = head_tensors(6, 8, 1200, bias=True), torch.randint(1000, 1200, (6,))
    masked = torch.arange(1200) < 1000
    tensors["bias"][masked] = -torch.inf
    got = run_all(call_linear, tensors, targets, OUTPUTS, ALL[:3])
    small = {n: t if n in ("hidden", "ref_hidden") or t is None else t[~masked] for n, t in tensors.items()}
    with use_backend("reference"):
        want = run_all(call_linear, small, targets - 1000, OUTPUTS, ALL[:3])
    for name in DIFFERENTIABLE + ("ref_logprob",):
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=2e-6, msg=name)
    assert torch.equal(got["top1"], want["top1"] + 1000)
    torch.testing.assert_close(got["d_hidden"], want["d_hidden"], rtol=1e-4, atol=2e-6)
    assert not got["d_weight"][masked].any() and not got["d_bias"][masked].any()


@FUSED
def test_policy_equal_to_the_reference_has_no_kl_and_no_kl_gradient(backend):
    tensors, targets = head_tensors(20, 16, 900, apart=0.0, spread=3.0), targets_for(20, 900)
    got = run_all(call_linear, tensors, targets, ("kl", "reverse_kl"), ("hidden",))
    assert got["kl"].abs().max() < 1e-7 and got["reverse_kl"].abs().max() < 1e-7
    assert got["d_hidden"].abs().max() < 1e-6


@pytest.mark.parametrize(
    "backend, dtype, apart, tolerance",
    [("cpu", torch.float32, 5e-3, 0.005), ("cpu", torch.bfloat16, 2e-2, 0.01), ("triton", torch.float32, 5e-3, 0.005),
     *(("triton", dtype, 2e-2, 0.01) for dtype in TRITON_HALVES)],
    indirect=["backend"],
)  # fmt: skip
def test_kl_and_its_gradient_near_the_reference(backend, dtype, apart, tolerance):
    """KL about 1e-4 (float32) and 1e-3 (16 bits), relative errors against float64: logits rounded to bfloat16 before they
    are subtracted would be wrong by tens of percent. In 16 bits the gradient is rounded once more when it is returned."""
    tensors, targets = (
        head_tensors(24, 64, 700, spread=2.0, apart=apart, dtype=dtype),
        targets_for(24, 700, False),
    )
    got = run_all(call_linear, tensors, targets, ("kl",), ("hidden",))
    with use_backend("reference"):
        exact = run_all(
            call_linear,
            {n: t if t is None else t.double() for n, t in tensors.items()},
            targets,
            ("kl",),
            ("hidden",),
        )
    low, high = (2e-5, 5e-4) if dtype is torch.float32 else (2e-4, 5e-3)
    assert low < exact["kl"].mean() < high
    for name in ("kl", "d_hidden"):
        error = (got[name].double() - exact[name]).norm() / exact[name].norm()
        assert error < tolerance, f"{name}: {error:.2g}"


@FUSED
def test_zero_rows(backend):
    got = run_all(call_linear, head_tensors(0, 8, 50, bias=True, lora=2), targets_for(0, 50), OUTPUTS, ALL)
    assert all(got[name].shape == (0,) for name in OUTPUTS)
    assert got["d_hidden"].shape == (0, 8) and not got["d_weight"].any() and not got["d_b"].any()


@FUSED
def test_ignored_rows_are_zero_and_touch_nothing(backend):
    """Neither their own gradients nor what is summed over the rows."""
    tensors, targets = head_tensors(10, 8, 60, bias=True, lora=3), torch.randint(0, 60, (10,))
    targets[[0, 4, 9]] = -100
    ignored = targets == -100
    got = run_all(call_linear, tensors, targets, OUTPUTS, ALL)
    for name in OUTPUTS:
        assert not got[name][ignored].any() and got[name][~ignored].any()
    assert not got["d_hidden"][ignored].any() and not got["d_gate"][ignored].any()
    kept = {n: t if n in ("weight", "bias", "a", "b") else t[~ignored] for n, t in tensors.items()}
    incoming = {n: g[~ignored] for n, g in incoming_gradients(tensors, OUTPUTS).items()}
    want = run(call_linear, kept, targets[~ignored], OUTPUTS, ALL, incoming)
    for name in ("d_weight", "d_bias", "d_a", "d_b"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, msg=name)
    everything = run_all(call_linear, tensors, torch.full((10,), -100), OUTPUTS, ALL)
    assert not any(value.any() for value in everything.values())


@NATIVE
def test_an_ignored_row_may_hold_nan(backend):
    tensors, targets = head_tensors(6, 8, 60), torch.randint(0, 60, (6,))
    targets[2] = -100
    tensors["hidden"][2] = torch.nan
    got = run_all(call_linear, tensors, targets, OUTPUTS, ALL[:2])
    assert all(value.isfinite().all() for value in got.values())


@FUSED
def test_layouts_and_leading_dimensions(backend):
    """Strided hidden and bias, transposed weight, expanded temperature and gate: as their dense copies."""
    hidden, weight = torch.randn(3, 16, 5).transpose(1, 2), torch.randn(16, 90).t()
    targets, temperature = torch.randint(0, 90, (5, 3)).t(), torch.rand(5) + 0.5
    lora = HeadLoRA(torch.randn(16, 4).t(), torch.randn(4, 90).t(), torch.rand(3, 1, 4))
    reference = hidden + 0.1
    bias, ref_bias = torch.randn(90, 2)[:, 0], torch.randn(1).expand(90)
    options = {"temperature": temperature, "outputs": OUTPUTS}
    got = linear_logprob(
        hidden, weight, targets, bias=bias, lora=lora, ref_hidden=reference, ref_bias=ref_bias, **options
    )
    dense = HeadLoRA(lora.a.contiguous(), lora.b.contiguous(), lora.gate.expand(3, 5, 4).contiguous())
    want = linear_logprob(hidden.contiguous(), weight.contiguous(), targets.contiguous(), lora=dense,
                          bias=bias.contiguous(), ref_hidden=reference.contiguous(), ref_bias=ref_bias.contiguous(),
                          **options)  # fmt: skip
    for name in OUTPUTS:
        assert getattr(got, name).shape == (3, 5)
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-5)


@FUSED
def test_the_reference_may_have_a_head_of_its_own(backend):
    tensors = head_tensors(10, 8, 70, bias=True)
    tensors["ref_hidden"], tensors["ref_weight"] = torch.randn(10, 12), torch.randn(70, 12)
    got = assert_right(call_linear, tensors, targets_for(10, 70), ref_bias=None)
    assert got["kl"].max() > 0.5


@FUSED
def test_the_reference_is_a_constant(backend):
    hidden, weight = torch.randn(4, 8), torch.randn(30, 8)
    reference = torch.randn(4, 8, requires_grad=True)
    ref_weight = torch.randn(30, 8, requires_grad=True)
    hidden.requires_grad_()
    linear_logprob(
        hidden, weight, None, ref_hidden=reference, ref_weight=ref_weight, outputs=("kl",)
    ).kl.sum().backward()
    assert hidden.grad is not None and reference.grad is None and ref_weight.grad is None


@FUSED
def test_targets_are_needed_by_log_probs_only(backend):
    stats = linear_logprob(torch.randn(4, 8), torch.randn(30, 8), None, outputs=("entropy", "lse", "top1"))
    assert stats.entropy.shape == (4,) and stats.logprob is None


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"], indirect=True)
def test_a_row_does_not_depend_on_its_batch(backend):
    """In Triton to the last bit; BLAS on a CPU takes other kernels for other shapes."""
    tensors, targets = head_tensors(70, 16, 600), targets_for(70, 600, False)
    whole = run_all(call_linear, tensors, targets, OUTPUTS)
    part = run_all(call_linear, {n: t if n in ("weight", "bias") or t is None else t[40:43] for n, t in tensors.items()},
                   targets[40:43], OUTPUTS)  # fmt: skip
    for name in OUTPUTS:
        torch.testing.assert_close(
            part[name], whole[name][40:43], rtol=0, atol=0 if backend == "triton" else 3e-6
        )


@NATIVE
def test_every_instruction_set_agrees(backend, instruction_sets):
    from clp_kernels import _native

    tensors, targets = head_tensors(30, 16, 1100, bias=True), targets_for(30, 1100)
    for isa in instruction_sets:
        _native.select_isa(isa)
        assert_right(call_linear, tensors, targets, wanted=ALL[:3], softcap=8.0)


@FUSED
def test_memory_that_is_nan_before_the_call_leaves_no_trace(backend):
    torch.use_deterministic_algorithms(True)  # and torch.empty is then filled with NaN
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        assert_right(
            call_linear, head_tensors(20, 8, 600, bias=True, lora=3), targets_for(20, 600), wanted=ALL
        )
        assert_right(call_linear, head_tensors(3, 8, 70), targets_for(3, 70), ("logprob",))
    finally:
        torch.use_deterministic_algorithms(False)


@FUSED
def test_nothing_around_the_operands_is_read(backend):
    tensors, targets = head_tensors(20, 9, 300, bias=True, lora=3), targets_for(20, 300)
    inside = {}
    for name, t in tensors.items():
        padded = torch.full([size + 70 for size in t.shape], torch.nan)
        inside[name] = padded[tuple(slice(0, size) for size in t.shape)].copy_(t)
    got = run_all(call_linear, inside, targets, OUTPUTS)
    stats = call_linear(inside, targets, OUTPUTS)
    for name in OUTPUTS:
        torch.testing.assert_close(getattr(stats, name), got[name], rtol=1e-5, atol=1e-5)


@NATIVE
@pytest.mark.parametrize("rows, chunk", [(0, 1 << 21), (0, 3000), (7, 3000), (33, 1 << 21), (40, 3000)])
def test_kept_or_recomputed_logits_and_any_chunks_give_the_same(backend, rows, chunk, monkeypatch):
    """Whatever the memory bound: logits of no row, of some rows (within a block of 30 and beyond it) and of all."""
    import clp_kernels.cpu.token_stats as native
    from clp_kernels import token_stats

    tensors, targets = head_tensors(40, 16, 700, bias=True, lora=2), targets_for(40, 700)
    usual = run_all(call_linear, tensors, targets, OUTPUTS, ALL)
    monkeypatch.setitem(token_stats._WORTH_KEEPING, "cpu", 0)
    monkeypatch.setattr(native, "CHUNK", chunk)
    monkeypatch.setattr(native, "ROWS", 30)
    call = functools.partial(call_linear, keep_bytes=rows * 700 * 4 * 2 + 5)
    got = run_all(call, tensors, targets, OUTPUTS, ALL)
    for name, value in usual.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=2e-6, msg=name)


def test_memory_bound_of_the_kept_logits():
    """Rows within the bound, where a product costs more than the traffic; all or nothing without a bound."""
    from clp_kernels.token_stats import KEEP_BYTES, kept_rows

    cpu, gpu = "clp_kernels.cpu.token_stats", "clp_kernels.triton_kernels.token_stats"
    assert kept_rows(cpu, 1000, 1 << 15, 512, 2, 10 << 20) == 40
    assert kept_rows(cpu, 1000, 1 << 15, 512, 1, 1 << 40) == 1000
    assert kept_rows(cpu, 1000, 1 << 15, 512, 2, 0) == 0
    assert kept_rows(cpu, 1000, 1 << 15, 32, 2, 10 << 20) == 0
    assert kept_rows(cpu, KEEP_BYTES >> 17, 1 << 15, 512, 1, None) == KEEP_BYTES >> 17
    assert kept_rows(cpu, (KEEP_BYTES >> 17) + 1, 1 << 15, 512, 1, None) == 0
    assert kept_rows(gpu, 10, 1 << 15, 4096, 1, None) == 0
    assert kept_rows(gpu, 100, 1 << 15, 4096, 1, 10 << 20) == 80


@NATIVE
def test_scoring_takes_a_few_chunks_of_memory(backend):
    """No gradient: what is allocated stays below a twentieth of the logits."""
    rows, vocabulary = 2048, 30000
    tensors, targets = head_tensors(rows, 8, vocabulary), targets_for(rows, vocabulary)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        call_linear(tensors, targets, OUTPUTS)
    allocated = [e.self_cpu_memory_usage for e in profile.events() if e.self_cpu_memory_usage > 0]
    assert max(allocated) < rows * vocabulary * 4 / 20


@NATIVE
def test_a_frozen_head_gets_no_gradient_and_no_product(backend, monkeypatch):
    from clp_kernels.cpu import products

    shapes = []
    original = products.accumulate
    monkeypatch.setattr(
        products, "accumulate", lambda a, b, out: (shapes.append(out.shape), original(a, b, out))
    )
    run_all(call_linear, head_tensors(6, 8, 60), targets_for(6, 60), ("logprob",), ("hidden",))
    assert shapes == [(5, 8)]


@NATIVE
def test_bfloat16_products_keep_the_digits_of_a_small_kl(backend, instruction_sets):
    """Near the reference z - z' is smaller than a bfloat16 logit's rounding: on every instruction set the sums are float32."""
    rows, width, vocabulary = 40, 96, 700
    from clp_kernels import _native as native

    hidden, weight = torch.randn(rows, width).bfloat16(), (torch.randn(vocabulary, width) / 8).bfloat16()
    reference = torch.where(torch.rand(rows, width) < 0.1, hidden + hidden.abs() / 64, hidden)
    targets, outputs = torch.randint(vocabulary, (rows,)), ("kl", "logprob", "entropy")

    def statistics(dtype):
        stats = linear_logprob(
            hidden.to(dtype), weight.to(dtype), targets, ref_hidden=reference.to(dtype), outputs=outputs
        )
        return [getattr(stats, name).double().detach() for name in outputs]

    with use_backend("reference"):
        exact = statistics(torch.float64)
        plain = statistics(torch.float32)
    assert 1e-5 < exact[0].mean() < 1e-2
    for isa in instruction_sets:
        native.select_isa(isa)
        for name, truth, torchs, own in zip(outputs, exact, plain, statistics(torch.bfloat16)):
            allowed = 3 * (torchs - truth).norm() + torch.finfo(torch.float32).eps * truth.norm()
            assert (own - truth).norm() <= allowed, (isa, name, (own - truth).norm(), allowed)


def test_the_reference_back_end_passes_gradcheck():
    """In float64: each output alone, and all together with an incoming gradient per token."""
    tensors = head_tensors(4, 5, 7, bias=True, lora=2, dtype=torch.float64)
    targets = targets_for(4, 7)
    leaves = [tensors[name].requires_grad_() for name in ALL]
    temperature = torch.tensor([0.7, 1.0, 1.3, 2.0])
    ref_weight, ref_bias = tensors["weight"].detach() + 0.1, torch.randn(7, dtype=torch.float64)

    def function(outputs):
        def inner(hidden, weight, bias, a, b, gate):
            stats = linear_logprob(
                hidden, weight, targets, bias=bias, ref_hidden=tensors["ref_hidden"], ref_weight=ref_weight,
                ref_bias=ref_bias, lora=HeadLoRA(a, b, gate), softcap=4.0, logit_scale=0.9, temperature=temperature,
                outputs=outputs)  # fmt: skip
            return tuple(getattr(stats, name) for name in outputs)

        return inner

    for outputs in [*((name,) for name in DIFFERENTIABLE), DIFFERENTIABLE]:
        assert torch.autograd.gradcheck(function(outputs), leaves)


def test_the_reference_back_end_is_torchs_own_arithmetic():
    """The specification against torch's distributions and cross-entropy, which share no line with it."""
    hidden, weight, reference = (
        torch.randn(9, 6).double(),
        torch.randn(20, 6).double(),
        torch.randn(9, 6).double(),
    )
    targets = targets_for(9, 20)
    stats = linear_logprob(hidden, weight, targets, ref_hidden=reference, outputs=OUTPUTS, temperature=2.0)
    counted = targets != -100
    p, q = (
        torch.distributions.Categorical(logits=(h @ weight.t() / 2.0)[counted]) for h in (hidden, reference)
    )
    expected = {
        "logprob": p.log_prob(targets[counted]), "ref_logprob": q.log_prob(targets[counted]), "entropy": p.entropy(),
        "kl": torch.distributions.kl_divergence(p, q), "reverse_kl": torch.distributions.kl_divergence(q, p),
        "top1": p.probs.argmax(-1)}  # fmt: skip
    for name, value in expected.items():
        torch.testing.assert_close(getattr(stats, name)[counted], value)
    nll = torch.nn.functional.cross_entropy(
        hidden @ weight.t() / 2.0, targets, ignore_index=-100, reduction="none"
    )
    torch.testing.assert_close(stats.logprob, -nll)


def _compiled_call(hidden, weight, targets, lora):
    stats = linear_logprob(
        hidden * 2, weight, targets, ref_hidden=hidden.detach(), lora=lora, outputs=("logprob", "kl", "top1")
    )
    return (stats.logprob - stats.kl).mean(), stats


@pytest.mark.parametrize("backend", ["cpu", "reference"], indirect=True)
def test_compiles_without_graph_breaks(backend):
    leaves = [torch.randn(*s, requires_grad=True) for s in ((2, 5, 16), (100, 16), (3, 16), (100, 3), (5, 3))]
    targets = torch.randint(0, 100, (2, 5))
    grads = []
    for function in (_compiled_call, torch.compile(_compiled_call, fullgraph=True, backend="aot_eager")):
        loss, stats = function(*leaves[:2], targets, HeadLoRA(*leaves[2:]))
        assert isinstance(stats, TokenStats)
        grads.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for eager, compiled in zip(*grads):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.traced
@pytest.mark.parametrize("backend", ["cpu", "triton"], indirect=True)
def test_the_op_is_registered_rightly(backend):
    module = {"cpu": "clp_kernels.cpu.token_stats", "triton": "clp_kernels.triton_kernels.token_stats"}[
        backend
    ]
    leaves = [torch.randn(*s, requires_grad=True) for s in ((6, 8), (30, 8), (30,), (3, 8), (30, 3), (6, 3))]
    arguments = (
        *leaves,
        torch.randn(6, 8),
        leaves[1].detach(),
        None,
        torch.randint(0, 30, (6,)),
        torch.ones(6),
        None,
        1.0,
        -100,
    )
    op = torch.ops.clp_kernels.linear_logprob.default
    rows = 6 if backend == "cpu" else 0
    for asked, differentiable, copies in (
        ("logprob,entropy,kl,top1", "logprob,entropy,kl", 2),
        ("logprob,entropy,kl,top1", "entropy", 1),
        ("lse", "lse", 1),
    ):
        torch.library.opcheck(op, (*arguments, asked, differentiable, rows, copies, False, module))
    if backend == "cpu":
        for leaf in (leaves[1], leaves[2], leaves[4]):
            leaf.requires_grad_(False)
        torch.library.opcheck(op, (*arguments, "logprob,kl,top1", "logprob,kl", 0, 1, True, module))


def test_second_derivatives_are_refused():
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = linear_logprob(hidden, torch.randn(9, 4), torch.tensor([1, 2, 3])).logprob.sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()


HIDDEN, WEIGHT, TARGETS = torch.zeros(2, 3, 8), torch.zeros(10, 8), torch.zeros(2, 3, dtype=torch.int64)


def lora(**change):
    return HeadLoRA(torch.zeros(4, 8), torch.zeros(10, 4), torch.zeros(4))._replace(**change)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"weight": torch.zeros(10, 9)}, ValueError, r"weight \(10, 9\).*expected \(\.\.\., H\) and \(V, H\)"),
        ({"weight": torch.zeros(0, 8)}, ValueError, r"weight is \(0, 8\).*at least one row"),
        ({"weight": WEIGHT.bfloat16()}, TypeError, r"weight is torch.bfloat16 and hidden torch.float32.*autocast"),
        ({"hidden": HIDDEN.long()}, TypeError, r"hidden is torch.int64.*floating-point"),
        ({"bias": torch.zeros(9)}, ValueError, r"bias is \(9,\); expected \(10,\)"),
        ({"targets": TARGETS[0]}, ValueError, r"targets is \(3,\); expected \(2, 3\)"),
        ({"targets": TARGETS.int()}, TypeError, r"targets is torch.int32.*targets.long\(\)"),
        ({"targets": TARGETS + 10}, IndexError, r"targets\[0\].*is 10; expected 0 to 9"),
        ({"targets": TARGETS - 1}, IndexError, r"is -1; expected 0 to 9"),
        ({"targets": None}, ValueError, r"'logprob' and targets is None"),
        ({"outputs": ("kl",)}, ValueError, r"'kl' and ref_hidden is None"),
        ({"outputs": ("nll",)}, ValueError, r"outputs has 'nll'; expected some of logprob"),
        ({"outputs": "kl"}, ValueError, r"outputs is the string 'kl'"),
        ({"outputs": ()}, ValueError, r"outputs is empty"),
        ({"temperature": 0.0}, ValueError, r"temperature is 0.0; expected a positive number"),
        ({"temperature": torch.ones(4)}, ValueError, r"temperature is \(4,\).*broadcasts to \(2, 3\)"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, ValueError, r"temperature.*positive"),
        ({"softcap": -1.0}, ValueError, r"softcap is -1.0"),
        ({"ref_hidden": torch.zeros(3, 8)}, ValueError, r"ref_hidden is \(3, 8\).*expected rows \(2, 3\)"),
        ({"ref_hidden": HIDDEN, "ref_weight": torch.zeros(11, 8)}, ValueError, r"ref_weight \(11, 8\).*vocabulary of 10"),
        ({"lora": lora(b=torch.zeros(9, 4))}, ValueError, r"lora.b \(9, 4\); expected \(R, 8\) and \(10, R\)"),
        ({"lora": lora(gate=torch.zeros(5))}, ValueError, r"lora.gate is \(5,\)"),
        ({"lora": lora(gate=torch.zeros(4).half())}, TypeError, r"lora.gate is torch.float16"),
    ],
)  # fmt: skip
def test_errors_name_the_argument_and_what_was_expected(change, error, message):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS} | change
    with pytest.raises(error, match=message):
        linear_logprob(
            arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("targets"), **arguments
        )


def test_a_back_end_that_cannot_serve_says_so():
    with (
        use_backend("cpu"),
        pytest.raises(RuntimeError, match="take float32 and bfloat16, not torch.float64"),
    ):
        linear_logprob(
            torch.zeros(2, 4).double(), torch.zeros(3, 4).double(), torch.zeros(2, dtype=torch.int64)
        )


def test_constant_outputs_do_not_require_grad():
    hidden = torch.randn(3, 4, requires_grad=True)
    stats = linear_logprob(
        hidden, torch.randn(9, 4), torch.tensor([1, 2, 3]), ref_hidden=hidden, outputs=OUTPUTS
    )
    assert all(getattr(stats, name).requires_grad == (name not in CONSTANT) for name in OUTPUTS)
