"""multi_lora_linear's Triton back-end: each way of doing its products is right, and rows do not feel their batch."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from accuracy import TRITON_DTYPES, TRITON_HALVES
from clp_kernels import batch_invariant
from later import later
from test_multi_lora import assert_right, call, inputs, run

pytest.importorskip("triton")

from clp_kernels.triton_kernels import base_product, launch, low_rank, multi_lora  # noqa: E402
from clp_kernels.triton_kernels import multi_lora_strategy as strategy  # noqa: E402

pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)
TRAINED = ("x", "lora_a", "lora_b", "gate")


def calls_of(monkeypatch, module, name):
    seen, inner = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: seen.append(args) or inner(*args, **kwargs))
    return seen


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("product", ["fused", "blas"])
@pytest.mark.parametrize("dy", ["once", "twice"])
def test_every_strategy_is_right(backend, dtype, product, dy, monkeypatch):
    both = calls_of(monkeypatch, low_rank, "both")
    fused = calls_of(monkeypatch, base_product, "linear")
    with strategy.force(product=product, dy=dy):
        assert_right(
            inputs((131,), k=150, n=89, ranks=(16, 11), groups=4, dtype=dtype),
            wanted=TRAINED,
            gate_index=torch.arange(131) * 7 % 4,
        )
        assert_right(inputs((3, 45), k=96, n=80, ranks=(8, 16), groups=3, dtype=dtype), wanted=TRAINED)
    assert bool(both) == (dy == "once") and bool(fused) == (product == "fused")


@pytest.mark.check
@pytest.mark.parametrize("dy", ["once", "twice"])
def test_sizes_of_real_layers_and_sizes_that_no_tile_divides(backend, dy):
    with strategy.force(dy=dy):
        assert_right(
            inputs((70,), k=896, n=1937, ranks=(27,), groups=70, dtype=torch.float16), wanted=TRAINED
        )
        assert_right(inputs((1937,), k=96, n=45, ranks=(27,), groups=1), wanted=TRAINED)


@pytest.mark.parametrize("ranks", [(), (8,), (16, 24), (8, 16, 64)], ids=str)
def test_tensor_descriptors_with_ragged_edges_and_more_tiles_than_programs(backend, ranks, monkeypatch):
    """(300, 136) x (136, 264): no tile divides any of them; two programs take all tiles. Forward and dX, each once in
    the reference's two passes besides."""
    described = calls_of(monkeypatch, base_product, "_launch_described")
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 2)
    assert_right(inputs((300,), k=136, n=264, ranks=ranks, groups=300, dtype=torch.float16), wanted=TRAINED)
    assert len(described) == 2


@pytest.mark.parametrize(
    "change", ["rank of 27", "odd width", "few rows", "float32", "offset of one element"]
)
def test_what_a_descriptor_cannot_describe_goes_through_pointers(backend, change, monkeypatch):
    described = calls_of(monkeypatch, base_product, "_launch_described")
    dtype = torch.float32 if change == "float32" else torch.float16
    tensors = inputs(
        (16,) if change == "few rows" else (80,),
        k=65 if change == "odd width" else 64,
        n=48,
        ranks=(27,) if change == "rank of 27" else (24,),
        dtype=dtype,
    )
    if change == "offset of one element":
        padded = torch.zeros(tensors["x"].numel() + 1, dtype=dtype)
        tensors["x"] = padded[1:].view(80, 64).copy_(tensors["x"])
    y = call(tensors)
    exact = call({name: t.double().float() for name, t in tensors.items()})
    torch.testing.assert_close(
        y.float(), exact, rtol=0, atol=(1e-4 if dtype is torch.float32 else 4e-3) * exact.abs().max()
    )
    assert not described


@pytest.mark.parametrize("dy", ["once", "twice"])
def test_a_gate_index_out_of_range_reaches_the_gradient_of_the_adapters_as_nan(backend, dy):
    index = torch.zeros(37, dtype=torch.int64)
    index[20] = 4
    with strategy.force(dy=dy):
        grads = run(inputs(ranks=(8,), groups=4), torch.randn(37, 45), ("x", "lora_b"), index)
    assert grads["lora_b"].isnan().all() and grads["x"][20].isnan().all()
    assert grads["x"].isnan().any(-1).sum() == 1


@pytest.mark.parametrize("dtype", [*TRITON_HALVES, *later(torch.float32)], ids=str)
def test_a_row_has_the_same_bits_in_any_batch_where_that_is_asked_for(backend, dtype, monkeypatch):
    # A GPU so small that at these sizes the number of rows decides how often a contraction is cut.
    monkeypatch.setattr(low_rank, "_FILL", 8)
    tensors = inputs((140,), k=1504, n=48, ranks=(8, 16), groups=140, dtype=dtype)
    dy = torch.randn(140, 48).to(dtype)

    def some(rows):
        part = {name: t[:rows] if name in ("x", "gate") else t for name, t in tensors.items()}
        return run(part, dy[:rows], TRAINED)

    differs = []
    whole, invariant = some(140), None
    with batch_invariant():
        invariant = some(140)
    for rows in (1, 17, 66):
        plain = some(rows)
        with batch_invariant():
            part = some(rows)
        for name in ("y", "x", "gate"):
            assert torch.equal(part[name], invariant[name][:rows]), (rows, name)
            differs.append(not torch.equal(plain[name], whole[name][:rows]))
    assert any(differs), "the switch has nothing to do here: choose sizes whose tiles depend on the rows"


def test_batch_invariance_leaves_no_product_to_the_blas(backend, monkeypatch):
    monkeypatch.setattr(strategy, "interpreting", lambda: False)
    arguments = dict(rows=8192, depth=14336, rank=48, dtype=torch.bfloat16, major=9, family="tma")
    assert strategy.product(**arguments) == "blas"
    with batch_invariant():
        assert strategy.product(**arguments) == "fused"


def test_the_cost_model_weighs_the_second_pass_over_y_against_the_blas_rate(backend, monkeypatch):
    monkeypatch.setattr(strategy, "interpreting", lambda: False)

    def chosen(depth, rows=8192, rank=48, dtype=torch.bfloat16, family="tma"):
        return strategy.product(rows, depth, rank, dtype, 9, family)

    assert [chosen(depth) for depth in (896, 2048, 14336)] == ["fused", "fused", "blas"]
    assert chosen(14336, rows=8) == "fused" and chosen(896, rank=0) == "blas"
    assert chosen(4096, dtype=torch.float32, family="plain") == "blas"


def test_the_cost_model_reads_dy_once_where_the_partial_sums_are_small(backend):
    def chosen(rank, blocks, pieces, possible=True):
        return strategy.dy(rank, possible, blocks, pieces, 8192, 4096, torch.bfloat16)

    assert chosen(16, 8, 16) == "once"
    assert chosen(64, 16, 8) == "twice" and chosen(16, 8, 16, possible=False) == "twice"


def test_forcing_nests_and_checks(backend):
    with strategy.force(product="blas"), strategy.force(dy="once"):
        assert strategy.product(1, 1, 1, torch.float32, 9, "plain") == "blas"
        assert strategy.dy(1, True, 1, 1, 1, 1, torch.float32) == "once"
    with pytest.raises(ValueError, match="product is 'cublas'; expected one of"):
        with strategy.force(product="cublas"):
            pass
    with strategy.force(dy="once"), pytest.raises(ValueError, match="no tile for rank 88"):
        run(inputs(), torch.randn(37, 45), TRAINED)


@pytest.mark.parametrize(
    "product, dy", [("fused", "once"), ("fused", "twice"), ("blas", "once"), ("blas", "twice")]
)
def test_the_environment_forces_every_pair_for_a_process(backend, product, dy, monkeypatch):
    monkeypatch.setenv(strategy.SWITCH, f"{product},{dy}")
    both = calls_of(monkeypatch, low_rank, "both")
    fused = calls_of(monkeypatch, base_product, "linear")
    assert_right(inputs((40,), k=64, n=48, ranks=(16,), dtype=torch.float32), wanted=TRAINED)
    assert bool(both) == (dy == "once") and bool(fused) == (product == "fused")
    with strategy.force(
        product="fused" if product == "blas" else "blas"
    ):  # inside a block, `force` comes first
        assert strategy.product(1, 1, 1, torch.float32, 9, "plain") != product
        assert strategy.dy(1, True, 1, 1, 1, 1, torch.float32) == dy


def test_a_switch_that_says_nothing_known_or_two_things_at_once_is_an_error(backend, monkeypatch):
    for value in ("cublas", "fused,blas", "once,once"):
        monkeypatch.setenv(strategy.SWITCH, value)
        with pytest.raises(ValueError, match=f"{strategy.SWITCH}={value}: expected one of each pair"):
            strategy.product(1, 1, 1, torch.float32, 9, "plain")
    monkeypatch.setenv(strategy.SWITCH, " side , ")
    assert strategy.stream(1, 1, 1, torch.float32, True) == "side"
    assert strategy.stream(1, 1, 1, torch.float32, False) == "same"  # there are no streams on a CPU


def test_long_products_have_a_stream_beside_them(backend):
    def chosen(rows, side, dtype=torch.bfloat16):
        return strategy.stream(rows, side, side, dtype, True)

    assert chosen(8192, 4096) == chosen(2048, 4096) == "side" and chosen(8192, 896) == "same"
    assert chosen(2048, 1024, torch.float32) == "side" != chosen(2048, 1024)


@pytest.mark.parametrize("product, dy", [("fused", "once"), ("blas", "twice")])
def test_what_dx_does_not_need_runs_beside_it_and_is_waited_for(backend, product, dy, monkeypatch):
    log = []

    def noted(what, result=None):
        return lambda *_: log.append(what) or result

    main = SimpleNamespace(record_event=noted("fork", "event"), wait_stream=noted("join"))
    side = SimpleNamespace(wait_event=noted("side waits"), device=torch.device("cpu"))

    @contextlib.contextmanager
    def on(stream):
        assert stream is side
        log.append("beside:")
        yield
        log.append(".")

    monkeypatch.setattr(multi_lora, "_side_stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    launches = launches_of(monkeypatch, log)
    monkeypatch.setattr(strategy, "stream", lambda *_: "side")
    tensors, index = inputs((96,), k=64, n=48, ranks=(16,), groups=4), torch.arange(96) % 4
    with strategy.force(product=product, dy=dy):
        assert_right(tensors, wanted=TRAINED, gate_index=index)
        log.clear()
        run(tensors, torch.randn(96, 48), TRAINED, index)
    assert launches is log
    waits = ["side waits", "beside:"]
    if product == "blas":
        assert log == ["fork", *waits, "_skinny", ".", "join", "_skinny", "fork", *waits, "_rank_grad", "_rank_grad",
                       "_group_sum", ".", "join"]  # fmt: skip
    else:
        assert log == ["_skinny", "_linear", "_both", "_skinny_end", "fork", "_linear", *waits, "_rank_grad", "_group_sum",
                       "_sum_splits", ".", "join"]  # fmt: skip


def launches_of(monkeypatch, log):
    """The names of the kernels launched from now on, in `log`."""
    from triton.runtime import interpreter

    launched = interpreter.GridExecutor.__call__
    monkeypatch.setattr(
        interpreter.GridExecutor,
        "__call__",
        lambda self, *args, **kwargs: log.append(self.fn.__name__) or launched(self, *args, **kwargs),
    )
    return log


def test_a_layer_of_training_has_nine_launches(backend, monkeypatch):
    """Contractions cut as on a GPU. `_group_sum` is the gradient of the gate, which only a trained blend needs."""
    monkeypatch.setattr(low_rank, "_splits", lambda programs, steps: 2)
    tensors, index = (
        inputs((256,), k=144, n=128, ranks=(16,), groups=4, dtype=torch.float16),
        torch.arange(256) % 4,
    )
    log = launches_of(monkeypatch, [])
    with strategy.force(product="fused", dy="once"):
        run(tensors, torch.randn(256, 128).half(), TRAINED, index)
    assert log == ["_skinny", "_skinny_end", "_linear_described", "_both", "_skinny_end", "_linear_described", "_rank_grad",
                   "_group_sum", "_sum_splits"]  # fmt: skip
