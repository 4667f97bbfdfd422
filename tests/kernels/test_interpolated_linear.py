"""interpolated_linear: y_row = x_row (base + sum_i blend[g, i] stack_i)^T + bias, its gradients, its choice, its errors."""

import importlib
import math

import clp_kernels
import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate, half_of, here
from clp_kernels import interpolate, interpolated_linear, row_groups, use_backend
from clp_kernels.backends import forced_backend

NAMES = ("x", "stack", "blend", "bias")
STRATEGIES = {"weights": True, "products": False}


def inputs(rows=(37,), k=70, n=45, models=3, groups=1, dtype=torch.float32, blend_dtype=torch.float32):
    shapes = {
        "x": (*rows, k),
        "stack": (models, n, k),
        "blend": (groups, models),
        "base": (n, k),
        "bias": (n,),
    }
    return {
        name: torch.randn(shape).to(blend_dtype if name == "blend" else dtype)
        for name, shape in shapes.items()
    }


def call(tensors, gate_index=None):
    return interpolated_linear(
        tensors["x"],
        tensors["stack"],
        tensors["blend"],
        base=tensors["base"],
        bias=tensors["bias"],
        gate_index=gate_index,
    )


def in_torch(way):
    """The formula in the tensors' own dtype: a layer for each blend's weight, or a product for each weight of the stack."""

    def function(tensors, gate_index=None):
        x, stack, blend = tensors["x"], tensors["stack"], tensors["blend"].to(tensors["x"].dtype)
        flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        index = gate_index
        if index is None:
            span = flat.shape[0] // blend.shape[0]
            index = torch.arange(blend.shape[0]).repeat_interleave(span)
        index = index.reshape(-1).long()
        if way == "products":
            y = sum(blend[index, i][:, None] * F.linear(flat, weight) for i, weight in enumerate(stack))
            if tensors["base"] is not None:
                y = y + F.linear(flat, tensors["base"])
        else:
            y = torch.zeros(flat.shape[0], stack.shape[1], dtype=x.dtype)
            for g, row in enumerate(blend):
                weight = torch.einsum("m,mnk->nk", row, stack)
                if tensors["base"] is not None:
                    weight = weight + tensors["base"]
                y = y.index_put((torch.nonzero(index == g)[:, 0],), F.linear(flat[index == g], weight))
        if tensors["bias"] is not None:
            y = y + tensors["bias"]
        return y.view(*x.shape[:-1], stack.shape[1])

    return function


def run(function, tensors, dy, wanted=NAMES, gate_index=None):
    """y and the gradient of each wanted tensor."""
    leaves = {
        name: None if t is None else t.detach().requires_grad_(name in wanted) for name, t in tensors.items()
    }
    y = function(leaves, gate_index)
    grads = torch.autograd.grad(y, [leaves[name] for name in wanted], dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(wanted, grads))}


def assert_right(strategy, tensors, wanted=NAMES, gate_index=None):
    """The back-end in force against float64, and torch doing the same in the tensors' own dtype."""
    function = in_torch("products" if forced_backend() == "reference" else strategy)
    dy = torch.randn(*tensors["x"].shape[:-1], tensors["stack"].shape[1]).to(tensors["x"])
    got = run(call, tensors, dy, wanted, gate_index)
    plain = run(function, tensors, dy, wanted, gate_index)
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    exact = run(function, wide, dy.double(), wanted, gate_index)
    for name, value in got.items():
        assert value.dtype == plain[name].dtype
        assert_as_accurate(value, plain[name], exact[name], name)


@pytest.fixture(params=STRATEGIES)
def strategy(request, monkeypatch):
    """Both ways to compute it, whatever the cost model would choose (the reference has one)."""
    choose(monkeypatch, request.param)
    return request.param


def choose(monkeypatch, strategy):
    for backend, package in (("cpu", "cpu"), ("triton", "triton_kernels")):
        if clp_kernels.backends()[backend].available:
            module = importlib.import_module(f"clp_kernels.{package}.interpolated_linear")
            monkeypatch.setattr(module, "blends_weights", lambda *_: STRATEGIES[strategy])


BLENDS = {  # x's leading dimensions, blend rows, gate_index
    "one blend for all": ((37,), 1, None),
    "one blend per row": ((37,), 37, None),
    "one blend per sequence": ((3, 5), 3, None),
    "one blend per position": ((3, 5), 15, None),
    "indexed": ((37,), 4, torch.arange(37) * 7 % 4),
    "indexed in order": ((37,), 4, torch.arange(37) // 13),
    "indexed by position": ((3, 5), 6, (torch.arange(15) * 7 % 5).reshape(3, 5).int()),
}


@pytest.mark.parametrize("form", BLENDS, ids=lambda name: name.replace(" ", "-"))
def test_output_and_every_gradient_for_every_form_of_the_blend(backend, strategy, form):
    rows, groups, gate_index = BLENDS[form]
    assert_right(strategy, inputs(rows, models=8, groups=groups), gate_index=here(gate_index))


@pytest.mark.parametrize("blend_dtype", ["float32", "same"])
def test_half_precision(backend, strategy, blend_dtype):
    dtype = half_of(backend)
    blend_dtype = torch.float32 if blend_dtype == "float32" else dtype
    assert_right(strategy, inputs((16, 5), groups=16, dtype=dtype, blend_dtype=blend_dtype))
    assert_right(
        strategy,
        inputs((57,), groups=20, dtype=dtype, blend_dtype=blend_dtype),
        gate_index=torch.arange(57) * 7 % 19,
    )


@pytest.mark.parametrize("without", [("base",), ("bias",), ("base", "bias")], ids=str)
def test_without_base_and_without_bias(backend, strategy, without):
    wanted = tuple(name for name in NAMES if name not in without)
    tensors = inputs((4, 9), groups=4) | dict.fromkeys(without)
    assert_right(strategy, tensors, wanted)


@pytest.mark.parametrize("wanted", NAMES)
def test_the_gradient_of_each_input_alone(backend, strategy, wanted):
    assert_right(strategy, inputs((37,), groups=4), wanted=(wanted,), gate_index=torch.arange(37) % 4)


def test_the_output_may_be_changed_in_place(backend):
    """As a residual stream does: y += attention."""
    tensors = inputs(rows=(2, 5))
    y = call({**tensors, **{name: tensors[name].requires_grad_() for name in NAMES}})
    y += 1.0
    y.sum().backward()
    assert tensors["stack"].grad.abs().sum() > 0


@pytest.mark.parametrize("rows", [(0,), (1,), (0, 4), (2, 0)], ids=str)
def test_no_rows_and_one_row(backend, strategy, rows):
    assert_right(strategy, inputs(rows))


@pytest.mark.parametrize("size", [dict(k=0), dict(n=0), dict(models=1), dict(models=6)], ids=str)
def test_empty_weights_and_any_number_of_models(backend, strategy, size):
    assert_right(strategy, inputs((12,), groups=3, **size), gate_index=torch.arange(12) % 2)


@pytest.mark.parametrize("scratch", [1, 45 * 70 * 4 * 2])
def test_blends_in_batches_of_what_fits(backend, monkeypatch, scratch):
    """One blend at a time, and two: d_stack is then added up over the batches."""
    monkeypatch.setattr(row_groups.Machine, "batch", lambda self, stack: max(1, scratch // (45 * 70 * 4)))
    choose(monkeypatch, "weights")
    assert_right("weights", inputs((5, 7), groups=5))
    assert_right("weights", inputs((37,), groups=7), gate_index=torch.arange(37) * 5 % 6)
    assert_right("weights", inputs((3, 19), groups=3, dtype=half_of(backend)))


def test_sizes_past_one_tile_and_one_thread(backend, strategy):
    assert_right(
        strategy, inputs((67,), k=150, n=131, models=2, groups=5), gate_index=torch.arange(67) * 3 % 5
    )


def test_a_linear_layer_with_the_blended_weight(backend, strategy):
    tensors = inputs((6, 7), groups=6)
    y = call(tensors)
    weights = interpolate(tensors["stack"], tensors["blend"], base=tensors["base"])
    for g, weight in enumerate(weights):
        torch.testing.assert_close(
            y[g], F.linear(tensors["x"][g], weight, tensors["bias"]), atol=1e-4, rtol=1e-4
        )


def test_a_zero_blend_is_the_base(backend, strategy):
    tensors = inputs((64,), k=96, n=80, groups=64)
    tensors["blend"][::2] = 0
    expected = F.linear(tensors["x"], tensors["base"], tensors["bias"])
    torch.testing.assert_close(call(tensors)[::2], expected[::2], atol=1e-4, rtol=1e-4)


def test_non_contiguous_inputs(backend, strategy):
    tensors = inputs((6, 7), k=40, n=33, groups=6)
    strided = {
        name: t.mT.contiguous().mT if t.dim() > 1 else torch.stack([t, t], -1)[..., 0]
        for name, t in tensors.items()
    }
    strided["x"] = tensors["x"].transpose(0, 1).contiguous().transpose(0, 1)
    assert not any(t.is_contiguous() for t in strided.values())
    dy = torch.randn(33, 7, 6).permute(2, 1, 0)
    got, plain = run(call, strided, dy), run(call, tensors, dy.contiguous())
    for name in got:
        torch.testing.assert_close(got[name], plain[name])


def test_memory_that_is_nan_before_the_call_leaves_no_trace(backend, strategy):
    torch.use_deterministic_algorithms(True)  # and torch.empty is then filled with NaN
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        assert_right(strategy, inputs((37,), groups=5), gate_index=torch.arange(37) * 2 % 3)
        assert_right(strategy, inputs((3, 9), groups=3))
    finally:
        torch.use_deterministic_algorithms(False)


def test_gradcheck_in_float64():
    tensors = {
        name: t.double().requires_grad_(name != "base") for name, t in inputs((2, 3), 4, 3, 2, 2).items()
    }
    index = torch.tensor([1, 0, 0, 1, 1, 1])
    leaves = tuple(tensors[name] for name in NAMES)
    for gate_index in (None, index):

        def function(x, stack, blend, bias, gate_index=gate_index):
            return interpolated_linear(
                x, stack, blend, base=tensors["base"], bias=bias, gate_index=gate_index
            )

        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_opcheck(backend):
    ops = torch.ops.clp_kernels
    for rows, groups, gate_index in (
        ((5,), 1, None),
        ((2, 3), 2, None),
        ((5,), 3, torch.tensor([0, 2, 1, 1, 0])),
    ):
        t = {name: v.requires_grad_(name != "base") for name, v in inputs(rows, 6, 4, 2, groups).items()}
        args = (t["x"], t["stack"], t["blend"], t["base"], t["bias"], gate_index)
        torch.library.opcheck(ops.interpolated_linear.default, args)
        x, stack, blend, base, _, _ = (None if v is None else v.detach() for v in args)
        dy = torch.randn(*rows, 4)
        torch.library.opcheck(
            ops.interpolated_linear_backward.default, (dy, x, stack, blend, base, gate_index, [True] * 4)
        )


def test_compiles_without_graph_breaks_and_for_any_number_of_rows():
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for rows in (5, 9, 12):
        tensors = {name: t.requires_grad_(name != "base") for name, t in inputs((rows,), groups=rows).items()}
        leaves = [tensors[name] for name in NAMES]
        got, expected = compiled(tensors), call(tensors)
        torch.testing.assert_close(got, expected)
        dy = torch.randn_like(expected)
        for g, e in zip(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(expected, leaves, dy)):
            torch.testing.assert_close(g, e)


def test_autocast_casts_like_linear_and_leaves_the_blend():
    tensors = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = call(tensors)
    assert got.dtype is torch.bfloat16
    cast = {name: t if name == "blend" else t.bfloat16() for name, t in tensors.items()}
    assert torch.equal(got, call(cast))


def test_second_derivatives_are_refused(backend):
    tensors = {name: t.requires_grad_(name != "base") for name, t in inputs().items()}
    (dx,) = torch.autograd.grad(call(tensors).sum(), tensors["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives.*interpolate"):
        dx.sum().backward()


def test_instruction_sets_agree(instruction_sets, strategy):
    native = clp_kernels._native
    for dtype in (torch.float32, torch.bfloat16):
        for isa in instruction_sets:
            native.select_isa(isa)
            with use_backend("cpu"):
                assert_right(strategy, inputs((3, 19), groups=3, dtype=dtype))


def test_the_same_bits_every_time(backend, strategy):
    tensors, dy, index = inputs((64,), groups=4), torch.randn(64, 45), torch.randint(0, 4, (64,))
    first, second = (run(call, tensors, dy, gate_index=index) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_choice_follows_rows_per_blend():
    stack, base = torch.empty(3, 1024, 1024), torch.empty(1024, 1024)
    machine = row_groups.Machine(balance=8.0, scratch=64 << 20)

    def chosen(rows, groups):
        return row_groups.blends_weights(machine, rows, groups, stack, base)

    assert chosen(2048, 1) and chosen(2048, 8) and chosen(8192, 64)
    assert not chosen(8, 8) and not chosen(64, 64) and not chosen(1, 1) and not chosen(2048, 2048)
    one = torch.empty(1, 1024, 1024)
    assert not row_groups.blends_weights(
        machine, 10**6, 1, one, None
    )  # one weight: there is nothing to blend


def test_the_chosen_way_is_the_one_taken(monkeypatch):
    blended = []
    forward = row_groups.forward
    monkeypatch.setattr(row_groups, "forward", lambda *args: blended.append(1) or forward(*args))
    with use_backend("cpu"):
        call(inputs((256,), groups=1))
        assert len(blended) == 1
        call(inputs((256,), groups=256))
        assert len(blended) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")
def test_a_gate_index_out_of_range_is_nan_where_it_cannot_be_an_error(strategy):
    index = torch.zeros(37, dtype=torch.int64)
    index[20], index[30] = 4, -1
    with use_backend("triton"):
        y = call(inputs(groups=4), index)
    assert y[[20, 30]].isnan().all() and y.isnan().any(-1).sum() == 2


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_a_gate_index_out_of_range_is_an_error(backend, strategy):
    for wrong in (4, -5):
        index = torch.zeros(37, dtype=torch.int64)
        index[20] = wrong
        with pytest.raises(IndexError):
            call(inputs(groups=4), index)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(3, 71)), ValueError, r"x is \(3, 71\) float32 on cpu; expected \(\.\.\., 70\)"),
        (dict(stack=torch.zeros(45, 70)), ValueError, r"stack is \(45, 70\).*expected \(M, N, K\)"),
        (
            dict(blend=torch.zeros(1, 4)),
            ValueError,
            r"blend is \(1, 4\).*expected \(G, 3\), a column for each",
        ),
        (dict(blend=torch.zeros(5, 3)), ValueError, r"blend has 5 rows.*expected 1, 37 .*gate_index"),
        (dict(base=torch.zeros(70, 45)), ValueError, r"base is \(70, 45\).*expected \(45, 70\)"),
        (
            dict(base=torch.zeros(45, 70, requires_grad=True)),
            ValueError,
            r"base asks for a gradient.*detach\(\)",
        ),
        (dict(bias=torch.zeros(44)), ValueError, r"bias is \(44,\).*expected \(45,\)"),
        (
            dict(stack=torch.zeros(3, 45, 70).bfloat16()),
            TypeError,
            r"stack is torch.bfloat16 and x is.*autocast",
        ),
        (dict(blend=torch.zeros(1, 3).double()), TypeError, r"blend is torch.float64; expected"),
        (
            dict(gate_index=torch.zeros(36, dtype=torch.int64)),
            ValueError,
            r"gate_index is \(36,\); expected \(37,\)",
        ),
        (dict(gate_index=torch.zeros(37)), TypeError, r"gate_index is torch.float32; expected torch.int64"),
        (dict(blend=torch.zeros(1, 3, device="meta")), ValueError, r"blend is on meta and x on cpu"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors_say_what_was_given_and_what_was_expected(change, error, message):
    change = dict(change)
    gate_index = change.pop("gate_index", None)
    with pytest.raises(error, match=message):
        call({**inputs(), **change}, gate_index)
