"""Products with packed weights: float32, and the same bits for a row whatever else is in the call, on any number of threads."""

import pytest
import torch

native = pytest.importorskip("clp_kernels._native")
from clp_kernels.decoder import _PARTS, _packed, _parts, _rounded  # noqa: E402

SHAPES = [(1, 1), (7, 5), (16, 32), (33, 31), (48, 64), (50, 257), (97, 520), (130, 1025)]


def product(x, weight, threads=1, parts=None):
    """y (rows, n), the memory around it filled with NaN before."""
    n, k = weight.shape
    parts = _parts(native, weight) if parts is None else parts
    packed = _packed(native, weight, parts)
    y = torch.full((_rounded(x.shape[0]), _rounded(n)), float("nan"))
    native.packed_product(
        x.data_ptr(),
        x.stride(0),
        x.shape[0],
        packed.data_ptr(),
        n,
        k,
        parts,
        y.data_ptr(),
        y.stride(0),
        threads,
    )
    return y[: x.shape[0], :n]


@pytest.mark.parametrize("n, k", SHAPES)
def test_products_are_float32_products(instruction_sets, n, k):
    weight = torch.randn(n, k)
    for isa in instruction_sets:
        native.select_isa(isa)
        for rows in (1, 3, 8, 17, 32, 45):
            x = torch.randn(rows, k)
            exact = x.double() @ weight.double().t()
            theirs = (torch.nn.functional.linear(x, weight).double() - exact).abs().max()
            # What the order of k additions may cost: a few units of the largest sum of absolute values.
            bound = 2e-7 * (x.abs().double() @ weight.abs().double().t()).max()
            assert (product(x, weight).double() - exact).abs().max() <= max(1.5 * theirs, bound), (isa, rows)


def test_a_transposed_weight_is_packed_as_it_is(instruction_sets):
    weight, x = torch.randn(70, 40).t(), torch.randn(5, 70)
    for isa in instruction_sets:
        native.select_isa(isa)
        assert torch.equal(product(x, weight), product(x, weight.contiguous()))


@pytest.mark.parametrize("n, k", [(50, 257), (97, 520)])
def test_a_row_has_the_same_bits_whatever_else_is_there(instruction_sets, n, k):
    weight, x = torch.randn(n, k), torch.randn(45, k)
    for isa in instruction_sets:
        native.select_isa(isa)
        together = product(x, weight)
        assert torch.equal(product(x, weight, threads=2), together)
        for rows in (slice(0, 1), slice(3, 8), slice(20, 45), slice(44, 45)):
            assert torch.equal(product(x[rows].contiguous(), weight), together[rows]), (isa, rows)


def test_bfloat16_weights_are_packed_small_and_give_the_same_numbers(instruction_sets):
    weight, x = torch.randn(64, 96).bfloat16().float(), torch.randn(20, 96)
    for isa in instruction_sets:
        native.select_isa(isa)
        parts = _parts(native, weight)
        assert parts == (1 if isa == "amx" else _PARTS)
        assert _parts(native, weight + 1e-6) == _PARTS
        torch.testing.assert_close(product(x, weight), product(x, weight, parts=_PARTS), rtol=1e-6, atol=1e-5)
        if isa == "amx":
            assert native.packed_bytes(64, 96, 1) * 3 == native.packed_bytes(64, 96, 3) == 64 * 96 * 6
