"""multi_lora_linear's Triton back-end: each way of doing its products is right, and rows do not feel their batch."""

import pytest
import torch
from accuracy import TRITON_DTYPES, TRITON_HALVES
from clp_kernels import batch_invariant
from later import later
from test_multi_lora import assert_right, call, inputs, run

pytest.importorskip("triton")

from clp_kernels.triton_kernels import base_product, launch, low_rank  # noqa: E402
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
