"""csrc/cpu/matmul.cpp: every instruction set's product is as accurate as torch's, reads no more than its operands and gives a
row the same bits wherever it stands."""

import itertools

import pytest
import torch
from later import later

pytest.importorskip("clp_kernels._native")

from clp_kernels import _native, batch_invariant, linear_logprob, multi_lora_linear  # noqa: E402
from clp_kernels.cpu import products  # noqa: E402
from clp_kernels.token_stats import HeadLoRA  # noqa: E402

SHAPES = ((1, 1, 1), (3, 7, 5), (37, 45, 70), (300, 600, 2100), (65, 1100, 33), (1, 700, 2500))  # m, k, n
DTYPES = (torch.float32, torch.bfloat16)


def operand(rows, columns, dtype, transposed):
    return (
        torch.randn(columns, rows, dtype=dtype).t() if transposed else torch.randn(rows, columns, dtype=dtype)
    )


def exactly(a, b, more, bias, start):
    total = a.double() @ b.double() + start.double()
    if more is not None:
        total = total + more[0].double() @ more[1].double()
    return total if bias is None else total + bias.double()


@pytest.mark.parametrize("m, k, n", [*SHAPES[:3], *later(*SHAPES[3:])])
def test_product_is_as_accurate_as_torchs(instruction_sets, m, k, n):
    for isa, threads, a_dtype, b_dtype in itertools.product(instruction_sets, (1, 2), DTYPES, DTYPES):
        _native.select_isa(isa)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        for transposed, extra, accumulate in itertools.product((False, True), (0, 5), (False, True)):
            a, b = operand(m, k, a_dtype, transposed), operand(k, n, b_dtype, not transposed)
            more = (operand(m, extra, a_dtype, False), operand(extra, n, b_dtype, True)) if extra else None
            bias = torch.randn(n) if extra else None
            out = torch.full((m, n + 3), float("nan"))[:, :n]  # rows further apart than they are long
            start = torch.zeros(m, n)
            if accumulate:
                start = out.copy_(torch.randn(m, n)).clone()
            products.matmul(a, b, out, accumulate=accumulate, more=more, bias=bias)
            plain = start + a.float() @ b.float()
            if more is not None:
                plain = plain + more[0].float() @ more[1].float() + bias
            exact = exactly(a, b, more, bias, start)
            size = exactly(
                a.abs(),
                b.abs(),
                more and [x.abs() for x in more],
                bias if bias is None else bias.abs(),
                start.abs(),
            )
            error, torchs = ((x.double() - exact).norm().item() for x in (out, plain))
            allowed = 1.5 * torchs + torch.finfo(torch.float32).eps * size.norm().item()  # and one rounding
            what = f"{isa} {threads} threads {a_dtype} {b_dtype} transposed={transposed} extra={extra} accumulate={accumulate}"
            assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
        torch.set_num_threads(before)


def test_precision_setting_takes_fewer_parts(instruction_sets):
    if "amx" not in instruction_sets:
        pytest.skip("this processor has no AMX tiles")
    _native.select_isa("amx")
    a, b = torch.randn(64, 256), torch.randn(256, 64)
    exact, errors = a.double() @ b.double(), []
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            out = products.matmul(a, b, torch.empty(64, 64))
            errors.append(((out - exact).norm() / exact.norm()).item())
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors[0] < 3e-7 < errors[1] < 1e-5 < 1e-3 < errors[2] < 1e-2, errors


def test_no_dimension_is_taken_for_granted(instruction_sets):
    for isa in instruction_sets:
        _native.select_isa(isa)
        out = torch.full((3, 4), float("nan"))
        products.matmul(torch.empty(3, 0), torch.empty(0, 4), out)
        assert (out == 0).all(), isa
        products.matmul(torch.empty(0, 5), torch.empty(5, 4), torch.empty(0, 4))
        products.matmul(torch.empty(3, 5), torch.empty(5, 0), torch.empty(3, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_batch_invariant_rows_do_not_depend_on_their_batch(instruction_sets, backend, dtype):
    """Bits of scoring and of the layer: alone, among 300, elsewhere in the batch, with one thread and with two."""
    rows, width, vocabulary, rank = 300, 257, 4099, 6
    x = torch.randn(rows, width).to(dtype)
    weight, a, b = (
        torch.randn(s).to(dtype) for s in ((vocabulary, width), (rank, width), (vocabulary, rank))
    )
    bias = torch.randn(vocabulary).to(dtype)
    gate, targets = torch.rand(rows, rank), torch.randint(vocabulary, (rows,))
    names = ("logprob", "entropy", "kl", "reverse_kl", "lse", "ref_logprob", "top1")

    def results(index):
        lora = HeadLoRA(a, b, gate[index])
        reference = x[index].flip(1)
        stats = linear_logprob(
            x[index], weight, targets[index], bias=bias, ref_hidden=reference, lora=lora, outputs=names
        )
        return [multi_lora_linear(x[index], weight, a, b, gate[index], bias=bias), *stats]

    before = torch.get_num_threads()
    for isa in instruction_sets:
        _native.select_isa(isa)
        with batch_invariant():
            torch.set_num_threads(2)
            whole = results(torch.arange(rows))
            for threads, index in ((1, [7]), (2, [299]), (1, [299, 7, 0]), (2, list(range(298, 100, -1)))):
                torch.set_num_threads(threads)
                for name, part, full in zip(("layer", *names), results(torch.tensor(index)), whole):
                    assert torch.equal(part, full[index]), f"{isa} {name} rows {index[:3]} of {len(index)}"
    torch.set_num_threads(before)


def test_other_users_of_the_tiles_find_them_as_they_left_them(instruction_sets):
    """oneDNN configures the tiles once and remembers that it did: its bfloat16 products around ours stay right."""
    _native.select_isa(instruction_sets[-1])
    a, b = torch.randn(256, 512), torch.randn(512, 384)
    half = a.bfloat16(), b.bfloat16()
    theirs, ours = half[0] @ half[1], products.matmul(a, b, torch.empty(256, 384)).clone()
    small = half[0][:5] @ half[1]
    for _ in range(3):
        assert torch.equal(products.matmul(a, b, torch.empty(256, 384)), ours)
        assert torch.equal(half[0] @ half[1], theirs)
        assert torch.equal(
            products.matmul(*half, torch.empty(256, 384)), products.matmul(*half, torch.empty(256, 384))
        )
        assert torch.equal(half[0][:5] @ half[1], small)
