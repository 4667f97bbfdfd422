"""multi_lora_linear and expand_gate: y = x W^T + bias + ((x A^T) * gate) B^T, its gradients, its errors."""

import clp_kernels
import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate, half_of, here
from clp_kernels import batch_invariant, expand_gate, merged_weight, multi_lora_linear, use_backend
from clp_kernels.arguments import rows_of
from clp_kernels.multi_lora import merge_pays

NAMES = ("x", "weight", "lora_a", "lora_b", "gate", "bias")
MIXED = (8, 16, 64)


def inputs(
    rows=(37,), k=70, n=45, ranks=MIXED, groups=1, dtype=torch.float32, gate_dtype=torch.float32, device=None
):
    rank = sum(ranks)
    shapes = ((*rows, k), (n, k), (rank, k), (n, rank), (groups, rank), (n,))
    dtypes = (dtype, dtype, dtype, dtype, gate_dtype, dtype)
    return {name: torch.randn(shape, device=device).to(d) for name, shape, d in zip(NAMES, shapes, dtypes)}


def call(tensors, gate_index=None):
    return multi_lora_linear(
        *(tensors[name] for name in NAMES[:-1]), bias=tensors["bias"], gate_index=gate_index
    )


def in_torch(tensors, gate_index=None):
    """The formula with torch's products in the tensors' own dtype; the gate is applied, and its gradient summed, in float32."""
    x, weight, a, b, gate, bias = (tensors[name] for name in NAMES)
    flat = rows_of(x)
    gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
    if gate_index is not None:
        gate = gate[gate_index.reshape(-1)]
    elif gate.shape[0] != flat.shape[0]:
        gate = gate.repeat_interleave(flat.shape[0] // max(gate.shape[0], 1), 0)
    y = F.linear(flat, weight, bias) + F.linear((F.linear(flat, a) * gate).to(x.dtype), b)
    return y.view(*x.shape[:-1], weight.shape[0])


def run(tensors, dy, wanted=NAMES, gate_index=None, function=call):
    """y and the gradient of each wanted tensor."""
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in tensors.items()}
    y = function(leaves, gate_index)
    grads = torch.autograd.grad(y, [leaves[name] for name in wanted], dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(wanted, grads))}


def assert_right(tensors, wanted=NAMES, gate_index=None):
    """Output and gradients of the back-end in force against the reference in float64 and torch in their dtype."""
    dy = torch.randn(*tensors["x"].shape[:-1], tensors["weight"].shape[0]).to(tensors["x"])
    got = run(tensors, dy, wanted, gate_index)
    plain = run(tensors, dy, wanted, gate_index, in_torch)
    with use_backend("reference"):
        exact = run({name: t.double() for name, t in tensors.items()}, dy.double(), wanted, gate_index)
    for name, value in got.items():
        assert value.dtype == plain[name].dtype
        assert_as_accurate(value, plain[name], exact[name], name)


def assert_layout_does_not_matter(got, tensors, dy):
    """`got` was computed from other layouts of `tensors` and `dy`. BLAS may choose its order of summation by the layout, and on
    aarch64 does: results then differ by the rounding of both, so that each is held to float64."""
    plain = run(tensors, dy)
    with use_backend("reference"):
        exact = run({name: t.double() for name, t in tensors.items()}, dy.double())
    for name, value in got.items():
        assert_as_accurate(value, plain[name], exact[name], name)


GATES = {  # x's leading dimensions, gate rows, gate_index
    "one gate for all": ((37,), 1, None),
    "one gate per row": ((37,), 37, None),
    "one gate per sequence": ((3, 5), 3, None),
    "one gate per position": ((3, 5), 15, None),
    "indexed": ((37,), 4, torch.arange(37) * 7 % 4),
    "indexed by position": ((3, 5), 6, (torch.arange(15) * 7 % 5).reshape(3, 5).int()),
}


@pytest.mark.parametrize("gates", GATES, ids=lambda name: name.replace(" ", "-"))
def test_output_and_every_gradient_for_every_form_of_the_gate(backend, gates):
    rows, groups, gate_index = GATES[gates]
    assert_right(inputs(rows, groups=groups), gate_index=here(gate_index))


@pytest.mark.parametrize("gate_dtype", ["float32", "same"])
def test_half_precision(backend, gate_dtype):
    dtype = half_of(backend)
    assert_right(
        inputs((3, 19), groups=3, dtype=dtype, gate_dtype=torch.float32 if gate_dtype == "float32" else dtype)
    )


@pytest.mark.parametrize("wanted", NAMES)
def test_the_gradient_of_each_input_alone(backend, wanted):
    assert_right(inputs(groups=37), wanted=(wanted,))


def test_the_output_may_be_changed_in_place(backend):
    """As a residual stream does: y += attention."""
    tensors = {name: t.requires_grad_() for name, t in inputs(rows=(2, 5)).items()}
    y = call(tensors)
    y += 1.0
    y.sum().backward()
    assert tensors["x"].grad.abs().sum() > 0


@pytest.mark.parametrize("rows", [(0,), (1,), (0, 4), (2, 0)], ids=str)
def test_no_rows_and_one_row(backend, rows):
    assert_right(inputs(rows))


@pytest.mark.parametrize("ranks", [(), (1,), (16, 16, 16), MIXED], ids=str)
def test_any_total_rank(backend, ranks):
    assert_right(inputs(ranks=ranks, groups=37))


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("rows", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("k, n", [(0, 5), (5, 0), (0, 0)])
def test_layers_without_inputs_or_outputs(backend, rows, k, n):
    assert_right(inputs(rows, k=k, n=n, ranks=(2,)))


def test_many_rows_and_sizes_that_no_tile_divides():
    # Above the size from which the C++ kernels use several threads.
    assert_right(inputs((1937,), k=150, n=896, groups=7), gate_index=torch.randint(0, 7, (1937,)))
    assert_right(inputs((13, 149), k=896, n=150, groups=13))
    assert_right(inputs((1937,), k=150, n=89, groups=1937))
    assert_right(inputs((1937,), k=150, n=89, groups=1))


def test_contractions_long_enough_to_be_split_over_programs(backend):
    # The Triton launchers cut the contraction over K (few rows), over the rows, and over one gate's rows.
    assert_right(inputs((5,), k=1500, n=33, ranks=(4, 3), groups=5))
    assert_right(inputs((2, 300), k=33, n=17, ranks=(4, 3), groups=2))
    assert_right(inputs((600,), k=33, n=17, ranks=(4, 3), groups=40), gate_index=torch.arange(600) // 19)


def test_rows_with_a_zero_gate_equal_the_frozen_layer_bit_for_bit(backend):
    tensors = inputs((64,), k=96, n=80, groups=64)
    zero = torch.arange(64) % 2 == 0
    tensors["gate"][zero] = 0
    if (
        backend == "triton"
    ):  # a product of its own, summed in another order than torch's: compare with itself, gate off
        frozen = call({**tensors, "gate": torch.zeros_like(tensors["gate"])})
    else:
        frozen = F.linear(tensors["x"], tensors["weight"], tensors["bias"])
    y = call(tensors)
    assert torch.equal(y[zero], frozen[zero])
    assert not torch.equal(y[~zero], frozen[~zero])


def test_non_contiguous_inputs(backend):
    tensors = inputs((6, 7), k=40, n=33, groups=6)
    strided = {
        name: t.mT.contiguous().mT if t.dim() > 1 else torch.stack([t, t], -1)[..., 0]
        for name, t in tensors.items()
    }
    strided["x"] = tensors["x"].transpose(0, 1).contiguous().transpose(0, 1)
    assert not any(t.is_contiguous() for t in strided.values())
    assert_right(strided)
    dy = torch.randn(33, 7, 6).permute(2, 1, 0)
    assert_layout_does_not_matter(run(strided, dy), tensors, dy.contiguous())


def test_nothing_around_the_operands_is_read(backend):
    tensors = inputs((37,), k=70, n=45, ranks=(5, 6), groups=37)
    inside = {}
    for name, t in tensors.items():
        padded = torch.full([size + 70 for size in t.shape], torch.nan)
        inside[name] = padded[tuple(slice(0, size) for size in t.shape)].copy_(t)
    dy = torch.full((107, 115), torch.nan)[:37, :45].copy_(torch.randn(37, 45))
    assert_layout_does_not_matter(run(inside, dy), tensors, dy.contiguous())


def test_memory_that_is_nan_before_the_call_leaves_no_trace(backend):
    torch.use_deterministic_algorithms(True)  # and torch.empty is then filled with NaN
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        assert_right(inputs((37,), ranks=(5, 6), groups=4), gate_index=torch.arange(37) % 3)
        assert_right(inputs((2, 300), k=33, n=17, ranks=(4, 3), groups=2))
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_frozen_weight_costs_no_gradient_product(backend, monkeypatch):
    asked = []
    module = clp_kernels.multi_lora.select(
        "multi_lora_linear", clp_kernels.multi_lora._TABLE, torch.device("cpu"), dtype=torch.float32
    )
    backward = module.backward
    monkeypatch.setattr(module, "backward", lambda *args: asked.append(args[-1]) or backward(*args))
    tensors = inputs()
    run(tensors, torch.randn(37, 45), wanted=("x", "lora_a", "lora_b", "gate"))
    assert asked == [[True, False, False, True, True, True]]


def test_nothing_is_saved_that_the_wanted_gradients_do_not_need():
    saved = []
    tensors = inputs()
    tensors["gate"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(tensors)
    kept = {t.data_ptr() for t in saved}
    assert tensors["x"].data_ptr() not in kept and tensors["weight"].data_ptr() not in kept


def test_gradcheck_in_float64():
    tensors = {
        name: t.double().requires_grad_()
        for name, t in inputs((2, 3), k=4, n=3, ranks=(1, 2), groups=2).items()
    }
    index = torch.tensor([1, 0, 0, 1, 1, 1])
    for gate_index in (None, index):
        assert torch.autograd.gradcheck(
            lambda *t, gate_index=gate_index: call(dict(zip(NAMES, t)), gate_index), tuple(tensors.values())
        )
    direct = [tensors[name] for name in ("x", "weight", "bias", "lora_a", "lora_b", "gate")]
    assert torch.autograd.gradcheck(lambda *t: torch.ops.clp_kernels.multi_lora_linear(*t, None)[0], direct)


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_opcheck(backend):
    for rows, groups, gate_index in (
        ((5,), 1, None),
        ((2, 3), 2, None),
        ((5,), 3, torch.tensor([0, 2, 1, 1, 0])),
    ):
        t = {
            name: v.requires_grad_()
            for name, v in inputs(rows, k=6, n=4, ranks=(1, 2), groups=groups).items()
        }
        args = (t["x"], t["weight"], t["bias"], t["lora_a"], t["lora_b"], t["gate"], gate_index)
        torch.library.opcheck(torch.ops.clp_kernels.multi_lora_linear.default, args)
        detached = [v if v is None else v.detach() for v in args]
        y, h = torch.ops.clp_kernels.multi_lora_linear(*detached)
        x, weight, _, a, b, gate, _ = detached
        torch.library.opcheck(
            torch.ops.clp_kernels.multi_lora_linear_backward.default,
            (torch.randn_like(y), x, weight, a, b, gate, gate_index, h, [True] * 6),
        )


def test_compiles_without_graph_breaks_and_for_any_number_of_rows():
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for rows in (5, 9, 12):
        tensors = {name: t.requires_grad_() for name, t in inputs((rows,), groups=rows).items()}
        got, expected = compiled(tensors), call(tensors)
        torch.testing.assert_close(got, expected)
        dy = torch.randn_like(expected)
        for g, e in zip(
            torch.autograd.grad(got, tensors.values(), dy),
            torch.autograd.grad(expected, tensors.values(), dy),
        ):
            torch.testing.assert_close(g, e)


def test_autocast_casts_like_linear_and_leaves_the_gate():
    tensors = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = call(tensors)
        assert got.dtype == F.linear(tensors["x"], tensors["weight"]).dtype == torch.bfloat16
    cast = {name: t if name == "gate" else t.bfloat16() for name, t in tensors.items()}
    assert torch.equal(got, call(cast))


def test_second_derivatives_are_refused(backend):
    tensors = {name: t.requires_grad_() for name, t in inputs().items()}
    (dx,) = torch.autograd.grad(call(tensors).sum(), tensors["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        dx.sum().backward()


def test_instruction_sets_agree(instruction_sets):
    native = clp_kernels._native
    for dtype in (torch.float32, torch.bfloat16):
        for isa in instruction_sets:
            native.select_isa(isa)
            with use_backend("cpu"):
                assert_right(inputs((3, 19), groups=3, dtype=dtype))
                assert_right(
                    inputs((19,), groups=5, dtype=dtype, gate_dtype=dtype), gate_index=torch.arange(19) % 5
                )


def test_the_same_bits_every_time(backend):
    tensors = inputs((64,), groups=4)
    dy, index = torch.randn(64, 45), torch.randint(0, 4, (64,))
    first, second = run(tensors, dy, gate_index=index), run(tensors, dy, gate_index=index)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")
def test_a_gate_index_out_of_range_is_nan_where_it_cannot_be_an_error():
    index = torch.zeros(37, dtype=torch.int64)
    index[20], index[30] = 4, -1
    with use_backend("triton"):
        y = call(inputs(groups=4), index)
    assert y[[20, 30]].isnan().all() and y.isnan().any(-1).sum() == 2


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(3, 71)), ValueError, r"x is \(3, 71\) float32 on cpu; expected \(\.\.\., 70\)"),
        (dict(weight=torch.zeros(70)), ValueError, r"weight is \(70,\).*two dimensions"),
        (dict(lora_a=torch.zeros(88, 71)), ValueError, r"lora_a is \(88, 71\).*expected \(88, 70\)"),
        (dict(lora_b=torch.zeros(88, 45)), ValueError, r"lora_b is \(88, 45\).*expected \(45, 88\)"),
        (dict(gate=torch.zeros(1, 3)), ValueError, r"gate is \(1, 3\).*expected \(G, 88\).*expand_gate"),
        (dict(gate=torch.zeros(5, 88)), ValueError, r"gate has 5 rows.*expected 1, 37 .*gate_index"),
        (dict(bias=torch.zeros(44)), ValueError, r"bias is \(44,\).*expected \(45,\)"),
        (
            dict(lora_a=torch.zeros(88, 70).bfloat16()),
            TypeError,
            r"lora_a is torch.bfloat16 and x is torch.float32.*autocast",
        ),
        (dict(gate=torch.zeros(1, 88).double()), TypeError, r"gate is torch.float64"),
        (
            dict(gate_index=torch.zeros(36, dtype=torch.int64)),
            ValueError,
            r"gate_index is \(36,\); expected \(37,\)",
        ),
        (dict(gate_index=torch.zeros(37)), TypeError, r"gate_index is torch.float32; expected torch.int64"),
        (dict(lora_b=torch.zeros(45, 88, device="meta")), ValueError, r"lora_b is on meta and x on cpu"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors_say_what_was_given_and_what_was_expected(change, error, message):
    change = dict(change)
    gate_index = change.pop("gate_index", None)
    with pytest.raises(error, match=message):
        call({**inputs(), **change}, gate_index)


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_a_gate_index_out_of_range_is_an_error(backend):
    for wrong in (4, -5):
        index = torch.zeros(37, dtype=torch.int64)
        index[20] = wrong
        with pytest.raises(IndexError):
            call(inputs(groups=4), index)


def merged(tensors):
    weight = merged_weight(*(tensors[name] for name in ("weight", "lora_a", "lora_b")), tensors["gate"][0])
    return F.linear(tensors["x"], weight, tensors["bias"])


def test_a_merged_weight_is_the_layer_under_one_gate_row():
    tensors = inputs((37,), k=1030, n=45, groups=1)
    exact = call({name: t.double() for name, t in tensors.items()})
    assert_as_accurate(merged(tensors), call(tensors), exact)
    frozen = {**tensors, "gate": torch.zeros(1, 88)}
    assert torch.equal(merged(frozen), F.linear(tensors["x"], tensors["weight"], tensors["bias"]))
    for name in ("weight", "lora_a"):
        tensors[name] = tensors[name].requires_grad_()
    assert not merged_weight(
        *(tensors[n] for n in ("weight", "lora_a", "lora_b")), tensors["gate"][0]
    ).requires_grad


@pytest.mark.parametrize("scale", [0.02, 0.1, 1.0])
def test_what_merging_costs_in_bfloat16(scale):
    """One rounding of the weight beside the one of y: sqrt(2) of a single rounding, which is what two roundings of y cost."""
    tensors = inputs((200,), k=512, n=256, ranks=(16, 16, 16), dtype=torch.float32)
    for name, size in (
        ("weight", 512**-0.5),
        ("lora_a", 512**-0.5),
        ("lora_b", scale * 48**-0.5),
        ("bias", 0),
    ):
        tensors[name] = tensors[name] * size
    tensors["gate"] = tensors["gate"].abs()
    half = {name: t if name == "gate" else t.bfloat16() for name, t in tensors.items()}
    with use_backend("reference"):
        exact = call({name: t.double() for name, t in half.items()})
    once = (exact.bfloat16().double() - exact).square().mean().sqrt()
    factored, whole = ((y.double() - exact).square().mean().sqrt() / once for y in (call(half), merged(half)))
    assert 1.2 < whole < 1.6 and whole < 1.2 * factored


def test_merging_pays_from_the_row_on_at_which_it_saves_more_than_it_costs():
    size, rank = 4096, 48
    even = size * size / (2 * size) * (1 + 2 * 184 / rank)
    assert not merge_pays(int(even), size, size, rank, 184.0) and merge_pays(
        int(even) + 2, size, size, rank, 184.0
    )
    assert 17_000 < even < 18_000  # the module's docstring
    assert not merge_pays(10**9, size, size, 0, 184.0)


def test_only_calls_without_gradient_under_one_gate_row_are_merged(monkeypatch):
    merges = []
    monkeypatch.setattr(clp_kernels.multi_lora, "_merges", lambda *_: merges.append(1) or True)
    tensors = inputs(groups=1)
    torch.testing.assert_close(call(tensors), merged(tensors), rtol=0, atol=0)
    assert merges == [1]
    call(inputs(groups=37))
    call(tensors, torch.zeros(37, dtype=torch.int64))
    call({**tensors, "lora_a": tensors["lora_a"].requires_grad_()})
    assert merges == [1]


def test_a_cpu_and_a_batch_invariant_call_merge_nothing_by_themselves(monkeypatch):
    monkeypatch.setattr(clp_kernels.multi_lora, "merge_pays", lambda *_: True)
    merges = clp_kernels.multi_lora._merges
    assert not merges(torch.empty(8, 8, dtype=torch.bfloat16), (8, 8), 4)

    class OnGpu:
        is_cuda, dtype, shape = True, torch.bfloat16, (8, 8)

    assert merges(OnGpu(), (8, 8), 4)
    with batch_invariant():
        assert not merges(OnGpu(), (8, 8), 4)


def test_expand_gate_repeats_and_scales():
    blend = torch.tensor([[0.5, 2.0, 1.0], [1.0, 0.0, 3.0]])
    gate = expand_gate(blend, ranks=(1, 3, 0), scalings=(2.0, 0.5, 9.0))
    assert torch.equal(gate, torch.tensor([[1.0, 1, 1, 1], [2, 0, 0, 0]]))
    assert expand_gate(torch.zeros(4, 0), [], []).shape == (4, 0)


def test_expand_gate_is_differentiable():
    blend = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b: expand_gate(b, (2, 3), (0.5, 2.0)), (blend,))
    compiled = torch.compile(expand_gate, fullgraph=True, backend="eager")
    assert torch.equal(compiled(blend, (2, 3), (0.5, 2.0)), expand_gate(blend, (2, 3), (0.5, 2.0)))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.zeros(3), (1,), (1.0,)), ValueError, r"blend is \(3,\); expected \(G, M\)"),
        ((torch.zeros(3, 2), (1,), (1.0, 1.0)), ValueError, "ranks has 1 entries"),
        ((torch.zeros(3, 2), (1, 1), (1.0,)), ValueError, "scalings has 1 entries"),
        ((torch.zeros(3, 1), (-1,), (1.0,)), ValueError, "no negative rank"),
        ((torch.zeros(3, 1, dtype=torch.int64), (1,), (1.0,)), TypeError, "blend is torch.int64"),
    ],
)
def test_expand_gate_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        expand_gate(*arguments)


def test_several_layers_of_one_input_are_each_what_multi_lora_linear_gives(backend):
    tensors = [inputs((3, 5), n=n, ranks=(8, 4), groups=3) for n in (45, 7)]
    x, gate = tensors[0]["x"], tensors[0]["gate"]
    layers = [(t["weight"], t["lora_a"], t["lora_b"], t["bias"]) for t in tensors]
    layers[1] = (*layers[1][:3], None)
    with torch.no_grad():
        ys = clp_kernels.multi_lora.multi_lora_linears(x, layers, gate)
    for y, (weight, a, b, bias) in zip(ys, layers, strict=True):
        assert torch.equal(y, multi_lora_linear(x, weight, a, b, gate, bias=bias))
    with pytest.raises(ValueError, match="gate is"):
        clp_kernels.multi_lora.multi_lora_linears(x, layers, gate[:, 1:])
