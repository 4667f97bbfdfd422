"""prefix_attention: packed sequences that continue one prompt, their gradients, layouts, and what does not change a bit."""

import clp_kernels
import pytest
import torch
from accuracy import assert_as_accurate
from clp_kernels import PrefixLayout, prefix_attention, use_backend
from clp_kernels.backends import interpreting
from clp_kernels.reference.prefix_attention import allowed
from devices import default_device

NAMES = ("q", "k", "v")
LAYOUTS = {  # lengths, parents
    "one group": ([30, 9, 4, 11], [-1, 0, 0, 0]),
    "many groups": ([20, 5, 7, 33, 6, 1, 2], [-1, 0, 0, -1, 3, 3, 3]),
    "groups interleaved": ([20, 33, 5, 6, 7, 12], [-1, -1, 0, 1, 0, 1]),
    "no parents": ([17, 1, 40], [-1, -1, -1]),
    "empty sequences": ([0, 12, 0, 5, 0, 8, 0, 3, 0], [-1, -1, 1, 1, 0, 0, -1, 6, 6]),
    "single tokens": ([1, 1, 1, 1, 1], [-1, 0, 0, -1, -1]),
    "past a panel and a chunk": ([330, 70, 0, 1, 65, 290], [-1, 0, 0, -1, 3, 0]),
}
GROUP = LAYOUTS["many groups"]


def layout_of(lengths, parents):
    return PrefixLayout.from_lengths(lengths, parents)


def inputs(layout, heads=4, kv_heads=2, dim=24, dtype=torch.float32):
    shapes = {"q": heads, "k": kv_heads, "v": kv_heads}
    return {name: torch.randn(layout.tokens, count, dim).to(dtype) for name, count in shapes.items()}


def in_torch(tensors, layout, scale=None, softcap=None, window=None):
    """The formula in the tensors' own dtype, keys and values repeated for the heads that share them."""
    q, k, v = (t.transpose(0, 1) for t in tensors.values())
    k, v = (t.repeat_interleave(q.shape[0] // k.shape[0], 0) for t in (k, v))
    z = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    sequence = torch.repeat_interleave(torch.arange(len(layout.parents)), layout.lengths)
    token, position = torch.arange(layout.tokens), layout.positions()
    mask = torch.zeros(layout.tokens, layout.tokens, dtype=torch.bool)
    for i in token:
        own = (sequence == sequence[i]) & (token <= i)
        mask[i] = own | (sequence == layout.parents[sequence[i]])
        if window is not None:
            mask[i] &= position > position[i] - window
    return (z.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def ours(tensors, layout, **options):
    return prefix_attention(*tensors.values(), layout, **options)


def run(function, tensors, layout, d_out, wanted=NAMES, **options):
    """out and the gradient of each wanted tensor."""
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in tensors.items()}
    out = function(leaves, layout, **options)
    grads = torch.autograd.grad(out, [leaves[name] for name in wanted], d_out.to(out.dtype))
    return {"out": out.detach(), **dict(zip(wanted, grads))}


def assert_right(layout, tensors, wanted=NAMES, **options):
    """The back-end in force against float64, and torch doing the same in the tensors' own dtype."""
    d_out = torch.randn(tensors["q"].shape).to(tensors["q"])
    got = run(ours, tensors, layout, d_out, wanted, **options)
    plain = run(in_torch, tensors, layout, d_out, wanted, **options)
    wide = {name: t.double() for name, t in tensors.items()}
    exact = run(in_torch, wide, layout, d_out.double(), wanted, **options)
    # ds = p (d_out . v - d_out . out): two sums of their own, so that of a row with one key, where plain torch has exactly 0, a
    # rounding of the terms is left, times a key or a query.
    terms = d_out.double().norm(dim=-1).max() * wide["v"].norm(dim=-1).max()
    factors = max(wide["q"].abs().max(), wide["k"].abs().max()) * options.get(
        "scale", wide["q"].shape[-1] ** -0.5
    )
    rounding = torch.finfo(d_out.dtype).eps / 2 * float(terms * factors)
    for name, value in got.items():
        assert value.dtype == tensors["q"].dtype and value.is_contiguous()
        slack = rounding if name in ("q", "k") else 0.0
        assert_as_accurate(value, plain[name], exact[name], name, slack=slack)


def assert_right_on_average(dim, **options):
    """Over many rows, and with nothing allowed for."""
    layout = layout_of([200, 60, 60, 80], [-1, 0, 0, 0])
    tensors = inputs(layout, 4, 2, dim)
    d_out = torch.randn(tensors["q"].shape)
    got, plain = (run(function, tensors, layout, d_out, **options) for function in (ours, in_torch))
    wide = {name: t.double() for name, t in tensors.items()}
    exact = run(in_torch, wide, layout, d_out.double(), **options)
    for name, value in got.items():
        assert (value - exact[name]).norm() <= 1.5 * (plain[name] - exact[name]).norm(), name


@pytest.fixture(
    params=["reference", "cpu", *(["triton"] if torch.cuda.is_available() and not interpreting() else [])]
)
def backend(request):
    with use_backend(request.param), default_device(request.param):
        yield request.param


@pytest.mark.parametrize("name", LAYOUTS, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "scale": 0.7}, {"window": 8}], ids=str)
def test_output_and_every_gradient_for_every_layout(backend, name, options):
    layout = layout_of(*LAYOUTS[name])
    assert_right(layout, inputs(layout), **options)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"window": 100}], ids=str)
def test_root_mean_square_errors_are_those_of_plain_torch(backend, options):
    assert_right_on_average(32, **options)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (2, 2), (8, 2), (6, 2), (5, 1), (7, 1)])
def test_query_heads_share_key_heads(backend, heads, kv_heads):
    layout = layout_of([50, 20, 33], [-1, 0, 0])
    assert_right(layout, inputs(layout, heads, kv_heads, 16))


@pytest.mark.parametrize("dim", [1, 7, 16, 32, 48, 64, 80, 100, 128, 200, 256])
def test_heads_of_any_size(backend, dim):
    layout = layout_of([70, 20], [-1, 0])
    assert_right(layout, inputs(layout, 2, 1, dim))


@pytest.mark.parametrize("window", [1, 2, 20, 64, 69, 300, 10**9])
def test_windows_smaller_than_the_prompt_and_larger_than_everything(backend, window):
    layout = layout_of([300, 40, 5, 9], [-1, 0, 0, -1])
    assert_right(layout, inputs(layout, 2, 1, 16), window=window)


@pytest.mark.parametrize("wanted", [("q",), ("k",), ("v",), ("q", "v"), ("k", "v")], ids=",".join)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_gradient_of_some_inputs_alone(backend, wanted, softcap):
    layout = layout_of(*GROUP)
    assert_right(layout, inputs(layout), wanted=wanted, softcap=softcap)


def test_bfloat16(backend):
    layout = layout_of([70, 20, 9], [-1, 0, 0])
    assert_right(layout, inputs(layout, dtype=torch.bfloat16))
    assert_right(layout, inputs(layout, dtype=torch.bfloat16), softcap=2.0, window=30)


def test_any_strides(backend):
    """Transformers holds (1, H, N, D); d_out comes as autograd makes it."""
    layout = layout_of(*GROUP)
    tensors = inputs(layout)
    d_out = torch.randn(tensors["q"].shape)
    views = {name: t.transpose(0, 1).contiguous().transpose(0, 1) for name, t in tensors.items()}
    sparse = {name: t.repeat_interleave(2, -1)[..., ::2] for name, t in tensors.items()}
    expected = run(ours, tensors, layout, d_out)
    for strided in (views, sparse):
        assert not any(t.is_contiguous() for t in strided.values())
        for d in (
            d_out,
            d_out.transpose(0, 1).contiguous().transpose(0, 1),
            d_out.repeat_interleave(2, -1)[..., ::2],
        ):
            got = run(ours, strided, layout, d)
            assert all(torch.equal(got[name], expected[name]) for name in got)
    broadcast = run(ours, tensors, layout, torch.ones(()).expand(d_out.shape))
    assert all(t.isfinite().all() for t in broadcast.values())


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"window": 3}], ids=str)
def test_gradcheck(options):
    layout = layout_of([4, 3, 0, 1, 2, 5], [-1, 0, 0, -1, 0, 3])
    leaves = [t.requires_grad_() for t in inputs(layout, 4, 2, 3, torch.float64).values()]
    assert torch.autograd.gradcheck(lambda q, k, v: prefix_attention(q, k, v, layout, **options), leaves)


def test_large_scores_overflow_nothing(backend):
    layout = layout_of(*LAYOUTS["past a panel and a chunk"])
    tensors = inputs(layout, 2, 1, 32)
    for factor in (30.0, 1e4):
        scaled = tensors | {"q": factor * tensors["q"]}
        assert all(
            t.isfinite().all() for t in run(ours, scaled, layout, torch.randn(tensors["q"].shape)).values()
        )
    assert_right(layout, tensors | {"q": 30.0 * tensors["q"]}, wanted=("v",))


def test_nan_reaches_those_who_see_it_and_nobody_else(backend):
    layout = layout_of([6, 3, 4, 5], [-1, 0, 0, -1])
    tensors = inputs(layout)
    tensors["k"][7] = torch.nan  # the second token of the first completion
    hit = ours(tensors, layout).isnan().flatten(1).any(1)
    assert hit.nonzero().flatten().tolist() == [7, 8]


def test_every_element_is_written(backend, monkeypatch):
    layout = layout_of(*LAYOUTS["empty sequences"])
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
    tensors = inputs(layout)
    assert all(
        t.isfinite().all() for t in run(ours, tensors, layout, torch.randn(tensors["q"].shape)).values()
    )


def test_no_tokens(backend):
    for layout in (PrefixLayout([0], []), layout_of([0, 0], [-1, 0])):
        tensors = inputs(layout)
        got = run(ours, tensors, layout, torch.empty(tensors["q"].shape))
        assert all(t.shape == tensors[name].shape for name, t in got.items() if name != "out")


def test_the_same_bits_for_any_number_of_threads():
    layout = layout_of([120, 40, 40, 33, 300, 14, 9, 60], [-1, 0, 0, 0, -1, 4, 4, -1])
    tensors = inputs(layout, 8, 4, 32)
    d_out, before, found = torch.randn(tensors["q"].shape), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            with use_backend("cpu"):
                found.append(run(ours, tensors, layout, d_out))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other[name], found[0][name]) for other in found[1:] for name in other)


def test_a_group_gives_the_same_bits_whatever_else_is_in_the_row():
    group, d_out = layout_of([90, 40, 0, 13], [-1, 0, 0, 0]), torch.randn(143, 6, 20)
    tensors = inputs(group, 6, 2, 20)
    row = layout_of(
        [300, 90, 7, 40, 0, 13, 80], [-1, -1, 0, 1, 1, 1, 0]
    )  # its sequences between those of another
    mine = torch.cat([torch.arange(300, 390), torch.arange(397, 450)])
    packed = inputs(row, 6, 2, 20)
    d_packed = torch.randn(packed["q"].shape).index_copy(0, mine, d_out)
    packed = {name: t.index_copy(0, mine, tensors[name]) for name, t in packed.items()}
    for options in ({}, {"softcap": 2.0}, {"window": 50}):
        with use_backend("cpu"):
            alone, among = (
                run(ours, tensors, group, d_out, **options),
                run(ours, packed, row, d_packed, **options),
            )
        assert all(torch.equal(among[name][mine], alone[name]) for name in alone)


def test_a_completion_gives_the_same_bits_whatever_its_siblings():
    """out and dq; dk and dv of the prompt are sums over the siblings."""
    two, three = layout_of([90, 40, 13], [-1, 0, 0]), layout_of([90, 40, 71, 13], [-1, 0, 0, 0])
    tensors, d_out = inputs(three), torch.randn(214, 4, 24)
    kept = torch.cat([torch.arange(130), torch.arange(201, 214)])
    with use_backend("cpu"):
        few = run(ours, {name: t[kept] for name, t in tensors.items()}, two, d_out[kept])
        many = run(ours, tensors, three, d_out)
    assert torch.equal(few["out"], many["out"][kept]) and torch.equal(few["q"], many["q"][kept])


def test_one_prompt_serves_its_completions_as_copies_of_it_would(backend):
    shared = layout_of([12, 5, 7], [-1, 0, 0])
    copies = layout_of([17, 19], [-1, -1])
    index = torch.cat([torch.arange(17), torch.arange(12), torch.arange(17, 24)])
    tensors = inputs(shared)
    y = ours(tensors, shared)
    z = ours({name: t[index] for name, t in tensors.items()}, copies)
    torch.testing.assert_close(y[index], z, atol=1e-5, rtol=1e-5)


def test_instruction_sets_agree(instruction_sets):
    for isa in instruction_sets:
        clp_kernels._native.select_isa(isa)
        with use_backend("cpu"):
            for dim in (20, 32, 48, 64):
                assert_right_on_average(dim)
            assert_right_on_average(40, softcap=2.0, window=60)


def test_opcheck(backend):
    layout = layout_of([4, 3, 2], [-1, 0, 0])
    t = inputs(layout, 4, 2, 8)
    for options in ((0.5, None, None), (0.5, 2.0, 3)):
        args = (*(v.clone().requires_grad_() for v in t.values()), layout.starts, layout.parents, *options)
        torch.library.opcheck(torch.ops.clp_kernels.prefix_attention.default, args)
        detached = (*t.values(), layout.starts, layout.parents, *options)
        out, lse = torch.ops.clp_kernels.prefix_attention(*detached)
        torch.library.opcheck(
            torch.ops.clp_kernels.prefix_attention_backward.default,
            (
                torch.randn_like(out),
                *t.values(),
                out,
                lse,
                layout.starts,
                layout.parents,
                *options,
                [True] * 3,
            ),
        )


def test_compiles_without_graph_breaks_and_for_any_layout():
    compiled = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
    for lengths, parents in (([4, 3], [-1, 0]), ([6, 2, 5], [-1, 0, 0]), ([9], [-1])):
        layout = layout_of(lengths, parents)
        leaves = [t.requires_grad_() for t in inputs(layout).values()]
        got, expected = compiled(*leaves, layout), prefix_attention(*leaves, layout)
        torch.testing.assert_close(got, expected)
        d_out = torch.randn_like(expected)
        for g, e in zip(
            torch.autograd.grad(got, leaves, d_out), torch.autograd.grad(expected, leaves, d_out)
        ):
            torch.testing.assert_close(g, e)


def test_autocast_casts():
    layout = layout_of([4, 3], [-1, 0])
    tensors = inputs(layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ours(tensors, layout)
    assert got.dtype is torch.bfloat16
    assert torch.equal(got, ours({name: t.bfloat16() for name, t in tensors.items()}, layout))


def test_the_output_may_be_changed_in_place(backend):
    layout = layout_of([4, 3], [-1, 0])
    tensors = {name: t.requires_grad_() for name, t in inputs(layout).items()}
    y = ours(tensors, layout) * 1.0
    y += 1.0
    y.sum().backward()
    assert tensors["v"].grad.abs().sum() > 0


def test_second_derivatives_are_refused(backend):
    layout = layout_of([4, 3], [-1, 0])
    tensors = {name: t.requires_grad_() for name, t in inputs(layout).items()}
    (dq,) = torch.autograd.grad(ours(tensors, layout).sum(), tensors["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        dq.sum().backward()


# ---- the layout ------------------------------------------------------------------------------------------------------------


def test_positions_count_through_the_parent():
    layout = PrefixLayout(torch.tensor([0, 4, 7, 7, 8, 10]), (-1, 0, 0, -1, 0))
    assert layout.tokens == 10
    assert layout.lengths.tolist() == [4, 3, 0, 1, 2]
    assert layout.positions().tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 4, 5]
    assert layout.sequences.tolist() == [0, 0, 0, 0, 1, 1, 1, 3, 4, 4]
    assert layout.positions("cpu").dtype is torch.int64


@pytest.mark.parametrize(
    "starts, parents, error, message",
    [
        ([0, 3], [-1, 0], ValueError, "starts has 2 entries and parents 2; expected one more"),
        ([1, 3], [-1], ValueError, "starts begins with 1; expected 0"),
        ([0, 3, 2], [-1, -1], ValueError, "sequence 1 is tokens 3 to 2; expected .*from_lengths"),
        (
            [0, 3, 4],
            [-1, 1],
            ValueError,
            "the parent of sequence 1 is 1; expected -1 or a sequence before it",
        ),
        ([0, 3, 4], [-2, 0], ValueError, "the parent of sequence 0 is -2"),
        ([0, 3, 4, 5], [-1, 0, 1], ValueError, "which continues 0 itself; .*join the two"),
        ([0, 3.0], [-1], TypeError, "starts holds 3.0; expected integers"),
        (torch.tensor([0.0, 3.0]), [-1], TypeError, r"starts is \(2,\) torch.float32; expected"),
        (torch.tensor([[0, 3]]), [-1], TypeError, r"starts is \(1, 2\) torch.int64; expected one dimension"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(starts, parents, error, message):
    with pytest.raises(error, match=message):
        PrefixLayout(starts, parents)


@pytest.mark.parametrize(
    "starts, parents",
    [
        ([0, 7], [0]),
        ([0, 9], [-1]),
        ([1, 7], [-1]),
        ([0, 8, 7], [-1, -1]),
        ([0, 3, 7], [-1, 7]),
        ([0, 3, 3, 7], [-1, 0, 1]),
    ],
)
def test_the_registered_op_reads_no_memory_that_its_layout_does_not_have(starts, parents):
    tensors = inputs(layout_of([7], [-1]))
    with use_backend("cpu"), pytest.raises(ValueError, match="PrefixLayout makes what fits"):
        torch.ops.clp_kernels.prefix_attention(
            *tensors.values(), torch.tensor(starts), torch.tensor(parents), 1.0, None, None
        )


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(q=torch.zeros(7, 4)), ValueError, r"q is \(7, 4\).*expected \(N, Hq, D\)"),
        (dict(k=torch.zeros(6, 2, 24)), ValueError, r"k is \(6, 2, 24\).*expected \(7, Hkv, 24\)"),
        (dict(k=torch.zeros(7, 2, 25)), ValueError, r"k is \(7, 2, 25\)"),
        (dict(v=torch.zeros(7, 1, 24)), ValueError, r"v is \(7, 1, 24\).*expected \(7, 2, 24\), as k is"),
        (dict(q=torch.zeros(7, 3, 24)), ValueError, "q has 3 heads and k 2; expected a multiple"),
        (
            dict(v=torch.zeros(7, 2, 24).double()),
            TypeError,
            "v is torch.float64 and q is torch.float32.*autocast",
        ),
        (dict(k=torch.zeros(7, 2, 24, device="meta")), ValueError, "k is on meta and q on cpu"),
        (dict(q=torch.zeros(7, 4, 24).long()), TypeError, "q is torch.int64; expected a floating-point"),
        (dict(layout=[0, 7]), TypeError, "layout is list; expected a clp_kernels.PrefixLayout"),
        (dict(layout=layout_of([8], [-1])), ValueError, "layout has 8 tokens and q is"),
        (dict(softcap=0.0), ValueError, "softcap is 0.0; expected a positive number"),
        (dict(window=0), ValueError, "window is 0; expected at least 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors_say_what_was_given_and_what_was_expected(change, error, message):
    layout = layout_of([7], [-1])
    with pytest.raises(error, match=message):
        prefix_attention(**{**inputs(layout), "layout": layout, **change})


def test_a_backend_that_cannot_serve_says_why():
    layout = layout_of([7], [-1])
    with use_backend("cpu"), pytest.raises(RuntimeError, match="size 256 at most, not 257"):
        ours(inputs(layout, dim=257), layout)
    assert ours(inputs(layout, dim=257), layout).isfinite().all()  # the reference serves it
    if clp_kernels.backends()["triton"].available and not torch.cuda.is_available():
        with (
            use_backend("triton"),
            pytest.raises(RuntimeError, match="compiled for CUDA tensors here, not cpu"),
        ):
            ours(inputs(layout), layout)


# ---- flex_attention, which serves GPUs: uncompiled, on the CPU ---------------------------------------------------------------


@pytest.fixture
def flex():
    pytest.importorskip("torch.nn.attention.flex_attention")
    from clp_kernels.triton_kernels import prefix_attention as module

    return module


@pytest.mark.parametrize("window", [None, 1, 8, 150])
@pytest.mark.parametrize("name", LAYOUTS, ids=lambda name: name.replace(" ", "-"))
def test_flex_blocks_are_those_of_the_mask(flex, name, window):
    layout = layout_of(*LAYOUTS[name])
    mask, tokens = allowed(layout.starts, layout.parents, window), layout.tokens
    for size in (4, 16, 128):
        partial, full = flex.block_lists(layout, window, size)
        padded = torch.zeros(len(full) * size, len(full) * size, dtype=torch.bool)
        padded[:tokens, :tokens] = mask
        blocks = padded.view(len(full), size, len(full), size)
        assert torch.equal(partial | full, blocks.any(3).any(1))
        assert not (full & ~blocks.all(3).all(1)).any() and not (full & partial).any()
        if size == 4 and name == "past a panel and a chunk" and window is None:
            assert full.sum() > partial.sum()
    made = flex.block_mask(layout, window, torch.device("cpu"))
    assert flex.block_mask(layout, window, torch.device("cpu")) is made
    index = torch.arange(tokens)
    assert torch.equal(made.mask_mod(0, 0, index[:, None], index), mask)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("options", [(0.5, None, None), (0.2, 2.0, None), (0.3, None, 20)], ids=str)
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (6, 2)])
def test_flex_computes_the_same(flex, options, heads, kv_heads):
    """Its output: it has no backward pass on a CPU."""
    layout = layout_of([150, 40, 0, 21, 64, 9], [-1, 0, 0, 0, -1, 4])
    tensors = inputs(layout, heads, kv_heads, 16)
    scale, softcap, window = options
    got = flex.attention(*tensors.values(), layout, *options, compiled=False)
    expected = ours(tensors, layout, scale=scale, softcap=softcap, window=window)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


LARGE = layout_of([150, 40, 0, 21, 64, 9], [-1, 0, 0, 0, -1, 4])
OTHER = layout_of([140, 9, 77, 33], [-1, 0, 0, 0])


@pytest.mark.traced
@pytest.mark.check
@pytest.mark.parametrize(
    "options", [(0.5, None, None), (0.2, 2.0, None), (0.3, None, 20), (0.3, 2.0, 20)], ids=str
)
def test_flex_is_compiled_with_a_softcap_and_a_window(flex, options):
    """Through inductor, for the CPU: a Python number that a score or a mask function captures is a symbol, which no code is
    generated for."""
    torch.compiler.reset()
    scale, softcap, window = options
    for layout in (LARGE, OTHER):
        tensors = inputs(layout, 4, 2, 16)
        got = flex.attention(*tensors.values(), layout, *options)
        expected = ours(tensors, layout, scale=scale, softcap=softcap, window=window)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


# Ten, of which dynamo compiles eight by itself: dtypes, heads that share keys or not, softcap, window.
VARIANTS = [
    (dtype, kv_heads, softcap, window)
    for dtype in (torch.float32, torch.bfloat16)
    for kv_heads in (2, 4)
    for softcap, window in ((None, None), (2.0, None), (2.0, 20))
][:10]


def attend_with(flex, dtype, kv_heads, softcap, window):
    tensors = inputs(LARGE, 4, kv_heads, 16)
    return flex.attention(*(t.to(dtype) for t in tensors.values()), LARGE, 0.3, softcap, window)


@pytest.fixture
def compilations(flex, monkeypatch):
    """How often flex_attention has been compiled; by aot_eager, which takes no seconds."""
    torch.compiler.reset()
    compiled = flex._compiled
    monkeypatch.setattr(flex, "_compiled", lambda: compiled("aot_eager"))
    count = lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]  # noqa: E731
    before = count()
    return lambda: count() - before


@pytest.mark.traced
def test_ten_variants_of_flex_are_compiled_in_one_process(flex, compilations):
    for number, variant in enumerate(VARIANTS, 1):
        attend_with(flex, *variant)
        assert compilations() == number
    for variant in VARIANTS:
        attend_with(flex, *variant)
    assert compilations() == len(VARIANTS)


@pytest.mark.traced
def test_flex_beyond_its_limit_is_an_error(flex, compilations, monkeypatch):
    """Uncompiled, it would form the scores of all pairs of tokens."""
    monkeypatch.setattr(flex, "LIMIT", 2)
    for variant in VARIANTS[:2]:
        attend_with(flex, *variant)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        attend_with(flex, *VARIANTS[2])
    attend_with(flex, *VARIANTS[0])


def test_one_compilation_serves_layouts_of_any_size():
    """Token counts and numbers of sequences differ from step to step; a GPU takes seconds for a compilation. Layouts of one
    block have one of their own."""
    triton_kernels = pytest.importorskip("clp_kernels.triton_kernels.prefix_attention")
    flex = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    torch.compiler.reset()
    compiled = torch.compile(flex, dynamic=True, backend="aot_eager")
    compilations = []
    for completions in (3, 4, 2, 6, 3):
        layout = layout_of([140 + 7 * completions, *range(9, 9 + completions)], [-1] + [0] * completions)
        mask = triton_kernels.block_mask(layout, None, torch.device("cpu"))
        q, k, v = (torch.randn(1, heads, layout.tokens, 16) for heads in (4, 2, 2))
        compiled(q, k, v, block_mask=mask, scale=0.25, enable_gqa=True)
        compilations.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(compilations)) == 1, compilations
