"""interpolate, slerp, ema_, sparsify, merge_sign_consensus: against float64, their gradients, their errors, and the systems
that are made of them."""

import math

import clp_kernels
import pytest
import torch
from accuracy import assert_as_accurate, half_of
from clp_kernels import ema_, interpolate, merge_sign_consensus, slerp, sparsify, use_backend

# Sizes of one element, none, odd ones, a block, and several chunks of every back-end (C++ 1024, Triton 16384).
SHAPES = [(7, 11), (1,), (0, 3), (2, 1024), (3, 5, 7), (16384 * 2 + 2048 + 5,), ()]


def tensors(shapes=SHAPES, models=3, dtype=torch.float32):
    return [[torch.randn(shape).to(dtype) for _ in range(models)] for shape in shapes]


def plain_blend(stack, weights, base=None):
    """What plain torch does in the tensors' own dtype."""
    total = sum(w.to(t.dtype) * t for w, t in zip(weights, stack))
    return total if base is None else base + total.to(base.dtype)


def exact_blend(stack, weights, base=None):
    total = sum(w.double() * t.double() for w, t in zip(weights, stack))
    return total if base is None else base.double() + total


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request, backend):
    if backend == "cpu" and request.param is torch.float16:
        pytest.skip("the reference serves float16 on a CPU")
    return request.param


@pytest.mark.parametrize("models", [1, 2, 3, 4, 7, 9])
def test_a_blend_of_one_tensor_is_as_accurate_as_torch(backend, dtype, models):
    stack, weights = torch.randn(models, 37, 61).to(dtype), torch.randn(models) * 2
    got = interpolate(stack, weights)
    assert got.dtype is dtype and got.shape == (37, 61)
    assert_as_accurate(got, plain_blend(stack, weights), exact_blend(stack, weights))
    assert torch.equal(got, interpolate(list(stack.unbind(0)), weights.tolist()))


def test_several_blends_of_one_stack_are_those_blends(backend, dtype):
    for shape in ((37, 61), (48, 2048)):  # the second is where a GPU uses 16-byte accesses
        stack, weights, base = (
            torch.randn(3, *shape).to(dtype),
            torch.randn(5, 3),
            torch.randn(shape).to(dtype),
        )
        got = interpolate(stack, weights, base=base)
        assert got.shape == (5, *shape)
        for g in range(5):
            assert_as_accurate(
                got[g],
                plain_blend(stack, weights[g], base),
                exact_blend(stack, weights[g], base),
                f"blend {g}",
            )
    assert interpolate(stack, weights[:0]).shape == (0, *shape)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_a_list_is_the_blend_of_each(backend, dtype, per_tensor):
    stacks = tensors(dtype=dtype)
    base = [torch.randn_like(stack[0]) for stack in stacks]
    weights = torch.randn(len(stacks), 3) if per_tensor else torch.randn(3)
    for p, got in enumerate(interpolate(stacks, weights, base=base)):
        own = weights[p] if per_tensor else weights
        assert_as_accurate(
            got, plain_blend(stacks[p], own, base[p]), exact_blend(stacks[p], own, base[p]), f"tensor {p}"
        )
    grouped = interpolate(stacks, torch.stack([weights, weights * 2], -2), base=base) if per_tensor else None
    if grouped is not None:
        for two, one in zip(grouped, interpolate(stacks, weights, base=base)):
            assert torch.equal(two[0], one)


def test_a_list_of_several_dtypes_keeps_each(backend):
    half = half_of(backend)
    stacks = [*tensors([(5, 6)], 2, half), *tensors([(7,)], 2, torch.float32), *tensors([(9,)], 2, half)]
    base = [torch.randn(5, 6), torch.randn(7), torch.randn(9).to(half)]
    got = interpolate(stacks, [0.25, -1.5], base=base)
    assert [t.dtype for t in got] == [torch.float32, torch.float32, half]
    weights = torch.tensor([0.25, -1.5])
    for p, result in enumerate(got):
        exact = exact_blend(stacks[p], weights, base[p])
        assert_as_accurate(result, exact.to(result.dtype), exact, f"tensor {p}")


def test_the_result_is_rounded_once(backend):
    # In bfloat16 the terms cancel to a last bit that any rounding in between would lose.
    half = half_of(backend)
    x = torch.full((64,), 1.0, dtype=half)
    small = torch.full((64,), 2.0**-12, dtype=half)
    assert torch.equal(interpolate([x, small, x], [1.0, 1.0, -1.0]), small)


def test_nothing_of_what_out_held_remains_and_nothing_around_it_is_written(backend):
    for count in (5, 2048, 16384 + 7):
        room = torch.full((count + 64,), torch.nan)
        out = room[32 : 32 + count]
        stack = torch.randn(2, count)
        assert interpolate(stack, [0.5, 0.5], out=out) is out
        torch.testing.assert_close(out, stack.mean(0))
        assert room[:32].isnan().all() and room[32 + count :].isnan().all()


def test_in_place_on_base_and_on_one_of_the_stack(backend):
    base, deltas = [torch.randn(40, 50), torch.randn(20000)], [[torch.randn(40, 50)], [torch.randn(20000)]]
    expected = interpolate(deltas, [0.3], base=base)
    given = [t.clone() for t in base]
    assert interpolate(deltas, [0.3], base=given, out=given) is given
    assert all(torch.equal(x, y) for x, y in zip(given, expected))
    a, b = torch.randn(20000), torch.randn(20000)
    expected = interpolate([a, b], [0.3, 0.7])
    assert torch.equal(interpolate([a, b], [0.3, 0.7], out=b), expected) and torch.equal(b, expected)


def test_strided_tensors_in_and_out(backend):
    stack = torch.randn(3, 20, 30).permute(0, 2, 1)
    base, out = torch.randn(20, 30).t(), torch.full((20, 30), torch.nan).t()
    weights = torch.tensor([0.2, 0.3, 0.5])
    expected = base + torch.einsum("m,mij->ij", weights, stack)
    assert interpolate(stack, weights, base=base, out=out) is out
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(interpolate(list(stack), weights, base=base), expected)
    average = torch.randn(20, 30).t()
    expected = 0.75 * average + 0.25 * base
    ema_([average], [base], 0.75)
    torch.testing.assert_close(average, expected)


def test_nan_and_infinity_pass_through(backend):
    stack = torch.randn(2, 3000)
    stack[0, 5], stack[1, 2999] = torch.nan, torch.inf
    for got in (interpolate(stack, [0.5, 0.5]), merge_sign_consensus(stack, [0.5, 0.5])):
        assert got[5].isnan() and got[2999] == torch.inf
        assert got.isfinite().sum() == 2998


def gradients(call, leaves, seed=1):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    results = call(*leaves)
    results = results if isinstance(results, list) else [results]
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    dys = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
    return torch.autograd.grad(results, leaves, dys)


def in_torch(stack, weights, base):
    """interpolate, written out, for torch's own gradients."""
    if isinstance(base, list):
        rows = weights if weights.dim() == 2 else [weights] * len(base)
        return [plain_blend(*each) for each in zip(stack, rows, base)]
    if weights.dim() == 2:
        return torch.stack([plain_blend(stack, row, base) for row in weights])
    return plain_blend(stack, weights, base)


FORMS = {  # of (weights (2, 3), base, the stack as one tensor or three): stack, weights, base
    "stacked": lambda w, base, s: (s, w[0], base),
    "listed": lambda w, base, *s: (list(s), w[0], base),
    "several blends": lambda w, base, *s: (list(s), w, base),
    "list of tensors": lambda w, base, *s: ([s, s[::-1]], w[0], [base, base]),
    "list, coefficients for each": lambda w, base, *s: ([s, s[::-1]], w, [base, base]),
}


def op(form):
    def call(*leaves):
        stack, weights, base = FORMS[form](*leaves)
        return interpolate(stack, weights, base=base)

    return call


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_stack_weights_and_base(backend, form):
    weights, base = torch.randn(2, 3), torch.randn(33, 70)
    stack = [torch.randn(3, 33, 70)] if form == "stacked" else list(torch.randn(3, 33, 70).unbind(0))
    leaves = [weights, base, *stack]
    got = gradients(op(form), leaves)
    plain = gradients(lambda *leaves: in_torch(*FORMS[form](*leaves)), leaves)
    exact = gradients(lambda *leaves: in_torch(*FORMS[form](*leaves)), [leaf.double() for leaf in leaves])
    for g, p, e in zip(got, plain, exact):
        assert_as_accurate(g, p, e)


@pytest.mark.parametrize("form", FORMS)
def test_derivatives_of_first_and_second_order_in_float64(form):
    size = (2, 3)
    weights, base = torch.randn(2, 3), torch.randn(size)
    stack = [torch.randn(3, *size)] if form == "stacked" else list(torch.randn(3, *size).unbind(0))
    leaves = [leaf.double().requires_grad_() for leaf in (weights, base, *stack)]
    assert torch.autograd.gradcheck(op(form), leaves)
    assert torch.autograd.gradgradcheck(op(form), leaves)


def test_only_the_wanted_gradients_are_made(backend):
    stack = [torch.randn(5, 6, requires_grad=wanted) for wanted in (False, True, False)]
    dy = torch.randn(5, 6)
    interpolate(stack, [0.5, 0.25, 2.0]).backward(dy)
    assert [t.grad is None for t in stack] == [True, False, True]
    torch.testing.assert_close(stack[1].grad, 0.25 * dy)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        interpolate(stack, [0.5, 0.25, 2.0])
    assert sum(t.numel() for t in saved) == 3  # the weights: their gradient alone needs the stack


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_opcheck(backend):
    ops = torch.ops.clp_kernels
    parts = [torch.randn(1, 4, 5, requires_grad=True) for _ in range(4)]
    weights, base = torch.randn(2, 3, 2, requires_grad=True), [torch.randn(4, 5), torch.randn(4, 5)]
    torch.library.opcheck(ops.interpolate.default, (parts, 2, weights, base))
    torch.library.opcheck(
        ops.interpolate.default, ([torch.randn(2, 4, 5, requires_grad=True)], 1, weights[:1].detach(), [])
    )
    torch.library.opcheck(ops.inner_products.default, (parts, 2, parts, 2))
    plain = [part.detach() for part in parts]
    torch.library.opcheck(ops.merge_sign_consensus.default, (plain, 2, weights.detach(), base, True))
    torch.library.opcheck(ops.ema_.default, ([t.clone() for t in base], [t.clone() for t in base], 0.9))
    torch.library.opcheck(ops.sparsify.default, (base, 0.5, False, 2.0, 7))


@pytest.mark.check
def test_compiles_without_graph_breaks():
    def merge(a, b, base, w):
        sparse = sparsify([a.detach(), b.detach()], 0.5, seed=3)
        return interpolate([a, b], w, base=base), slerp(a, b, 0.3), merge_sign_consensus(sparse, [1.0, 2.0])

    def step(average, params):
        return ema_(average, params, 0.5)

    a, b, base = (torch.randn(6, 7, requires_grad=True) for _ in range(3))
    w = torch.tensor([0.25, 0.5], requires_grad=True)
    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
    got, expected = compiled(a, b, base, w), merge(a, b, base, w)
    for x, y in zip(got, expected):
        torch.testing.assert_close(x, y)
    for x, y in zip(
        torch.autograd.grad(got[0].sum() + got[1].square().sum(), (a, b, base, w)),
        torch.autograd.grad(expected[0].sum() + expected[1].square().sum(), (a, b, base, w)),
    ):
        torch.testing.assert_close(x, y)
    own, other = [torch.zeros(3), torch.zeros(2)], [torch.ones(3), torch.ones(2)]
    torch.compile(step, fullgraph=True, backend="aot_eager")(own, other)
    assert torch.equal(own[0], torch.full((3,), 0.5)) and torch.equal(own[1], torch.full((2,), 0.5))


def exact_slerp(a, b, t):
    a, b = a.double(), b.double()
    cos = (a * b).sum() / (a.norm() * b.norm())
    angle = cos.acos()
    return torch.sin((1 - t) * angle) / angle.sin() * a + torch.sin(t * angle) / angle.sin() * b


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, -0.5, 1.5])
def test_slerp_follows_the_arc(backend, dtype, t):
    shapes = [(7, 11), (40000,), (3, 5, 7)]
    a, b = ([torch.randn(shape).to(dtype) for shape in shapes] for _ in range(2))
    for got, x, y in zip(slerp(a, b, t), a, b):
        exact = exact_slerp(x, y, t)
        assert_as_accurate(got, exact.to(dtype), exact)
    torch.testing.assert_close(slerp(a[0], b[0], t), slerp(a, b, t)[0])
    base = [torch.randn(shape).to(dtype) for shape in shapes]
    for got, x, y, z in zip(slerp(a, b, t, base=base), a, b, base):
        exact = z.double() + exact_slerp(x, y, t)
        assert_as_accurate(got, exact.to(dtype), exact)


def test_slerp_keeps_the_norm_where_a_line_does_not(backend):
    a = torch.nn.functional.normalize(torch.randn(5000), dim=0)
    b = torch.nn.functional.normalize(torch.randn(5000), dim=0)
    assert slerp(a, b, 0.5).norm().item() == pytest.approx(1.0, abs=1e-5)
    assert interpolate([a, b], [0.5, 0.5]).norm().item() < 0.8


def test_slerp_is_linear_where_there_is_no_arc(backend):
    x = torch.randn(300)
    zero = torch.zeros(300)
    for a, b in ((x, 2 * x), (x, -x), (zero, x), (x, zero), (zero, zero)):
        torch.testing.assert_close(slerp(a, b, 0.25), 0.75 * a + 0.25 * b)
    assert slerp(torch.zeros(0), torch.zeros(0), 0.5).shape == (0,)
    assert slerp([], [], 0.5) == []


@pytest.mark.parametrize("angle", [9.9e-4, 1.01e-3, math.pi - 0.05, math.pi / 2])
def test_slerp_is_continuous_at_its_threshold(backend, angle):
    a, b = torch.zeros(2, dtype=torch.float32), torch.zeros(2)
    a[0], b[0], b[1] = 1.0, math.cos(angle), math.sin(angle)
    expected = torch.tensor([math.cos(0.3 * angle), math.sin(0.3 * angle)])
    torch.testing.assert_close(slerp(a, b, 0.3), expected, atol=3e-6, rtol=0)


def test_slerp_has_gradients():
    a, b = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(slerp, (a, b, t))
    per_tensor = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: slerp([a, b], [b, a], t), (per_tensor,))
    (grad,) = torch.autograd.grad(slerp(a, a.detach(), 0.25).sum(), a)  # the linear branch
    torch.testing.assert_close(grad, torch.full_like(a, 0.75))


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9999, 1.0])
def test_ema_in_place_of_a_list(backend, decay):
    half = half_of(backend)
    params = [torch.randn(shape, requires_grad=shape != ()) for shape in SHAPES] + [torch.randn(9).to(half)]
    average = [torch.randn(p.shape) for p in params]
    exact = [decay * a.double() + (1 - decay) * p.detach().double() for a, p in zip(average, params)]
    plain = [torch.lerp(a, p.detach().float(), 1 - decay) for a, p in zip(average, params)]
    version = average[0]._version
    assert ema_(average, params, decay) is average
    for got, p, e in zip(average, plain, exact):
        assert_as_accurate(got, p, e)
    assert average[0]._version > version


def test_averages_of_half_precision_and_of_nothing(backend):
    half = half_of(backend)
    average, params = torch.randn(70).to(half), torch.randn(70)
    exact = 0.5 * average.double() + 0.5 * params.double()
    ema_(average, params, 0.5)
    assert_as_accurate(average, exact.to(half), exact)
    assert ema_([], [], 0.5) == [] == sparsify([], 0.5, seed=1, out=[])


def test_masks_depend_on_seed_place_and_index_alone(dtype):
    """Against the formula of the docstring, in Python's integers."""
    mask = (1 << 64) - 1

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    ones = [torch.ones(shape, dtype=dtype) for shape in ((3, 5), (0,), (2100,))]
    for seed in (0, 7, -1, 2**63 + 5):
        for p, got in enumerate(sparsify(ones, 0.4, seed=seed, rescale=False)):
            state = mix((mix(seed & mask) + p) & mask)
            expected = [
                (mix((state + j * 0x9E3779B97F4A7C15) & mask) >> 11) / 2**53 < 0.4 for j in range(got.numel())
            ]
            assert got.flatten().tolist() == [float(keep) for keep in expected]


def test_random_sparsification_keeps_the_expectation(backend):
    delta = torch.randn(60000)
    kept = sparsify(delta, 0.1, seed=1)
    share = (kept != 0).double().mean().item()
    assert share == pytest.approx(0.1, abs=5 * math.sqrt(0.09 / 60000))  # five standard deviations
    torch.testing.assert_close(kept[kept != 0], delta[kept != 0] / 0.1)
    other = sparsify([delta, delta], 0.1, seed=1)
    both = ((other[0] != 0) & (other[1] != 0)).double().mean().item()  # two tensors of a list: independent
    assert both == pytest.approx(0.01, abs=5 * math.sqrt(0.0099 / 60000))
    assert torch.equal(sparsify(delta, 1.0, seed=1), delta)
    strided = torch.randn(100, 30).t()
    assert torch.equal(sparsify(strided, 0.3, seed=5), sparsify(strided.contiguous(), 0.3, seed=5))


def test_magnitude_keeps_the_largest(backend, dtype):
    deltas = [torch.randn(5001).to(dtype), torch.randn(4, 5).to(dtype), torch.zeros(0, dtype=dtype)]
    for delta, kept in zip(deltas, sparsify(deltas, 0.2, method="magnitude")):
        count = math.ceil(0.2 * delta.numel())
        assert (kept != 0).sum() >= count  # ties with the smallest kept are kept
        if count:
            threshold = delta.abs().flatten().topk(count).values[-1]
            assert torch.equal(kept, delta.where(delta.abs() >= threshold, 0))
    delta = torch.randn(300).to(dtype)
    assert torch.equal(
        sparsify(delta, 0.5, method="magnitude", rescale=True), 2 * sparsify(delta, 0.5, method="magnitude")
    )
    assert torch.equal(sparsify(delta, 1.0, method="magnitude"), delta)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_thresholds_are_those_of_a_sort(backend):
    module = pytest.importorskip("clp_kernels.cpu.interpolation")
    draws = (
        torch.randn,
        lambda n: torch.randint(-3, 4, (n,)).float(),
        torch.zeros,
        lambda n: torch.full((n,), torch.inf),
    )
    for dtype in (torch.float32, torch.bfloat16):
        for n in (1, 2, 7, 1000, 70001):  # the last with several threads
            deltas = [draw(n).to(dtype) for draw in draws]
            for kept in {1, n, (n + 1) // 2, (n + 6) // 7}:
                expected = [t.abs().sort(descending=True).values[kept - 1].item() for t in deltas]
                assert module.thresholds(deltas, [kept] * len(deltas)).tolist() == expected
    delta = torch.randn(100)
    delta[3] = torch.nan
    assert module.thresholds([delta], [1]).isnan().all()
    assert module.thresholds([delta], [2]).item() == delta[delta == delta].abs().max().item()


@pytest.mark.check
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_results_too_large_for_the_caches(backend):
    """They are written around them, and where out is one of the inputs they are not."""
    for dtype in (torch.float32, torch.bfloat16):
        count = (16 << 20) // torch.finfo(dtype).bits * 8 + 1029
        a, b = torch.randn(count).to(dtype), torch.randn(count).to(dtype)
        exact = 0.5 * a.double() - 0.25 * b.double()
        got = interpolate([a, b], [0.5, -0.25])
        assert_as_accurate(got, exact.to(dtype), exact)
        with use_backend("reference"):
            expected = sparsify(a, 0.5, seed=4)
        assert torch.equal(sparsify(a, 0.5, seed=4), expected)
        interpolate([a, b], [0.5, -0.25], out=a)
        assert torch.equal(a, got)
        shifted = torch.empty(count + 1, dtype=dtype)[1:]  # not on a cache line
        assert torch.equal(sparsify(b, 0.5, seed=4, out=shifted), sparsify(b, 0.5, seed=4))


def test_sparsify_in_place(backend):
    delta = [torch.randn(2000), torch.randn(30, 20).t()]
    expected = sparsify(delta, 0.5, seed=2)
    assert sparsify(delta, 0.5, seed=2, out=delta) is delta
    assert all(torch.equal(x, y) for x, y in zip(delta, expected))


def exact_consensus(stack, weights, normalize):
    terms = [w.double() * t.double() for w, t in zip(weights, stack)]
    elected = sum(terms).sign()
    agree = [(term.sign() == elected) & (elected != 0) for term in terms]
    total = sum(term * a for term, a in zip(terms, agree))
    taken = sum(w.double().abs() * a for w, a in zip(weights, agree))
    return torch.where(taken > 0, total / taken.clamp(min=1e-300), 0.0) if normalize else total


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("models", [1, 3, 6])
def test_sign_consensus(backend, dtype, models, normalize):
    stack, weights = torch.randn(models, 61, 41).to(dtype), torch.randn(models)
    whole = sum(w.double() * t.double() for w, t in zip(weights, stack))
    stack[:, whole.abs() < 1e-3] = 0  # where rounding would elect
    exact = exact_consensus(stack, weights, normalize)
    got = merge_sign_consensus(stack, weights, normalize=normalize)
    assert_as_accurate(got, exact.to(dtype), exact)
    base = torch.randn(61, 41).to(dtype)
    got = merge_sign_consensus([list(stack)], weights, base=[base], normalize=normalize)[0]
    assert_as_accurate(got, (base + exact).to(dtype), base.double() + exact)


def test_sign_consensus_of_disagreeing_elements(backend):
    stack = torch.tensor([[1.0, 1.0, 0.0, -2.0], [-3.0, -1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 4.0]])
    # sums -1, 0, 0, 3: the elected are {-3}, none, none, {1, 4}
    assert merge_sign_consensus(stack, [1.0, 1.0, 1.0]).tolist() == [-3.0, 0.0, 0.0, 2.5]
    assert merge_sign_consensus(stack, [1.0, 1.0, 1.0], normalize=False).tolist() == [-3.0, 0.0, 0.0, 5.0]


def test_instruction_sets_agree_and_threads_do_not_matter(instruction_sets):
    native = clp_kernels._native
    threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        stacks = tensors([(70001,), (30, 50), (5,)], 5, dtype)
        base, weights = [torch.randn_like(stack[0]) for stack in stacks], torch.randn(5)
        results = []
        for isa in instruction_sets:
            native.select_isa(isa)
            with use_backend("cpu"):
                for count in (1, 3):
                    torch.set_num_threads(count)
                    found = [
                        *interpolate(stacks, weights, base=base),
                        *merge_sign_consensus(stacks, weights),
                        *sparsify(base, 0.3, seed=1),
                        *sparsify(base, 0.3, method="magnitude"),
                        *slerp(base, [stack[0] for stack in stacks], 0.3),
                    ]
                    if count == 3:
                        assert all(torch.equal(x, y) for x, y in zip(found, results[-1]))
                    results.append(found)
        torch.set_num_threads(threads)
        for found in results[1:]:
            for p in range(3):
                exact = exact_blend(stacks[p], weights, base[p])
                assert_as_accurate(found[p], plain_blend(stacks[p], weights, base[p]), exact)
            for x, y in zip(found[6:12], results[0][6:12]):
                assert torch.equal(x, y)


def test_a_merge_of_weights_of_warp_in_three_stages(backend):
    """WARP: the KL anchor is an average of the policy; deltas of two runs are merged along the arc; then towards the start."""
    start = [torch.randn(20, 30), torch.randn(30)]
    policies = [[p + 0.1 * torch.randn_like(p) for p in start] for _ in range(2)]

    anchor = [p.clone() for p in start]
    ema_(anchor, policies[0], decay=0.99)
    deltas = [interpolate([[p, s] for p, s in zip(policy, start)], [1.0, -1.0]) for policy in policies]
    merged = slerp(*deltas, 0.5, base=start)
    following = interpolate([[s, m] for s, m in zip(start, merged)], [0.7, 0.3])

    for p, s in enumerate(start):
        torch.testing.assert_close(anchor[p], 0.99 * s + 0.01 * policies[0][p])
        a, b = policies[0][p] - s, policies[1][p] - s
        torch.testing.assert_close(
            following[p], (s + 0.3 * exact_slerp(a, b, 0.5)).float(), atol=1e-5, rtol=1e-5
        )


def test_a_step_of_online_merging(backend):
    """Online Merging: the optimiser's update and the SFT delta, sparsified, merged by sign consensus and applied."""
    params = [torch.randn(20, 30), torch.randn(30)]
    update, sft_delta = ([0.1 * torch.randn_like(p) for p in params] for _ in range(2))
    expected = [p.clone() for p in params]

    sparse = [sparsify(delta, 0.5, seed=10 + i) for i, delta in enumerate((update, sft_delta))]
    merge_sign_consensus(list(zip(*sparse)), [0.9, 0.1], normalize=False, base=params, out=params)

    for p, (own, other) in enumerate(zip(*sparse)):
        expected[p] += exact_consensus([own, other], torch.tensor([0.9, 0.1]), False).float()
        torch.testing.assert_close(params[p], expected[p])


def test_one_coefficient_per_layer_is_found_by_gradient():
    """Adaptive model averaging: the coefficients of each layer are searched for, here by descent, as they have gradients."""
    before, after = ([torch.randn(4, 5) for _ in range(3)] for _ in range(2))
    wanted = torch.tensor([[0.2], [0.9], [0.5]])
    target = interpolate([[y - x] for x, y in zip(before, after)], wanted, base=before)
    found = torch.zeros(3, 1, requires_grad=True)
    optimizer = torch.optim.Adam([found], lr=0.1)
    for _ in range(200):
        mixed = interpolate([[y - x] for x, y in zip(before, after)], found, base=before)
        loss = sum((m - t).square().mean() for m, t in zip(mixed, target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(found.detach(), wanted, atol=1e-3, rtol=0)


A, B = torch.zeros(3, 4), torch.zeros(3, 4)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: interpolate([A, torch.zeros(4)], [1.0, 1.0]),
            ValueError,
            r"stack\[1\] is \(4,\).*one shape",
        ),
        (
            lambda: interpolate([A, B.bfloat16()], [1.0, 1.0]),
            TypeError,
            r"stack\[1\] is torch.bfloat16.*cast",
        ),
        (
            lambda: interpolate([A, B.to("meta")], [1.0, 1.0]),
            ValueError,
            r"stack\[1\] is on meta.*one device",
        ),
        (lambda: interpolate([A.long()], [1.0]), TypeError, r"stack is torch.int64; expected a floating"),
        (lambda: interpolate(torch.zeros(0, 3), []), ValueError, r"stack is \(0, 3\).*M > 0"),
        (lambda: interpolate([[]], [1.0]), ValueError, r"stack\[0\] holds 0 tensors"),
        (
            lambda: interpolate([[A, B], [A]], [1.0, 1.0]),
            ValueError,
            r"stack\[1\] holds 1 tensors; expected 2",
        ),
        (lambda: interpolate([[A, B], A], [1.0, 1.0]), ValueError, r"stack\[1\] is a tensor.*unbind"),
        (lambda: interpolate([A, B], [1.0]), ValueError, r"weights is \(1,\); expected \(2,\) or \(G, 2\)"),
        (
            lambda: interpolate([[A, B]], torch.zeros(3, 2)),
            ValueError,
            r"weights is \(3, 2\); expected \(2,\), \(1, 2\) or \(1 or 1, G, 2\)",
        ),
        (lambda: interpolate([A, B], torch.zeros(2).long()), TypeError, r"weights is torch.int64.*float\(\)"),
        (lambda: interpolate([A], [1.0], base=torch.zeros(4)), ValueError, r"base\[0\] is \(4,\).*\(3, 4\)"),
        (lambda: interpolate([[A]], [1.0], base=A), ValueError, r"base is one tensor; expected a list of 1"),
        (lambda: interpolate([A], [1.0], base=[A]), ValueError, "expected one tensor, as there is one stack"),
        (
            lambda: interpolate([A], [1.0], out=A.double()),
            ValueError,
            r"out\[0\] is \(3, 4\) float64.*float32",
        ),
        (lambda: interpolate([[A]], [1.0], out=A), ValueError, "out is Tensor; expected what is returned"),
        (
            lambda: interpolate([[A], [A]], [1.0], base=[A, A], out=[A, A]),
            ValueError,
            "out holds a tensor twice.*tied weights once",
        ),
        (
            lambda: interpolate([A.clone().requires_grad_()], [1.0], out=B),
            RuntimeError,
            r"out is given and a gradient is asked for.*no_grad",
        ),
        (lambda: slerp(A, [B], 0.5), ValueError, "one of a and b is a tensor"),
        (lambda: slerp([A, A], [B], 0.5), ValueError, "a has 2 tensors and b 1"),
        (
            lambda: slerp([A, A], [B, B], torch.zeros(3)),
            ValueError,
            r"t is \(3,\); expected a number, \(\) or \(2,\)",
        ),
        (lambda: ema_([A], [B], 1.5), ValueError, "decay is 1.5; expected 0 <= decay <= 1"),
        (lambda: ema_([A], [B.long()], 0.5), TypeError, r"params\[0\] is torch.int64"),
        (
            lambda: ema_([A], [torch.zeros(4)], 0.5),
            ValueError,
            r"average\[0\] is \(3, 4\).*params\[0\] \(4,\)",
        ),
        (lambda: ema_([A, A], [B, B], 0.5), ValueError, "average holds a tensor twice"),
        (lambda: sparsify(A, 0.0, seed=1), ValueError, "density is 0.0; expected 0 < density <= 1"),
        (lambda: sparsify(A, 0.5), ValueError, "'random' needs a seed"),
        (lambda: sparsify(A, 0.5, method="magnitude", seed=1), ValueError, "leave seed out"),
        (lambda: sparsify(A, 0.5, method="largest"), ValueError, "method is 'largest'"),
        (
            lambda: sparsify(A.clone().requires_grad_(), 0.5, seed=1),
            RuntimeError,
            "not differentiable.*no_grad",
        ),
        (
            lambda: merge_sign_consensus([A.clone().requires_grad_()], [1.0]),
            RuntimeError,
            "merge_sign_consensus: not differentiable",
        ),
    ],
)
def test_errors_say_what_was_given_and_what_was_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_back_end_that_cannot_serve_says_what_would():
    with use_backend("cpu"), pytest.raises(RuntimeError, match="float32 and bfloat16, not torch.float16"):
        interpolate([A.half()], [1.0])
    assert interpolate([A.half()], [1.0]).dtype is torch.float16
