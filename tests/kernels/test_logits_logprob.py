"""logits_logprob: the statistics of linear_logprob for stacks that hold the logits."""

import pytest
import torch
from accuracy import TRITON_DTYPES, here
from clp_kernels import linear_logprob, logits_logprob
from later import later
from token_cases import DIFFERENTIABLE, FUSED, OUTPUTS, assert_right, call_logits, run_all, targets_for

# The interpreter's numpy warns of -inf - -inf in columns beyond the vocabulary, whose result is selected away.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton")


def logit_tensors(rows, vocabulary, *, spread=2.0, apart=0.1, dtype=torch.float32):
    logits = torch.randn(rows, vocabulary) * spread
    return {
        "logits": logits.to(dtype),
        "ref_logits": (logits + apart * torch.randn(rows, vocabulary)).to(dtype),
    }


@FUSED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 5.0, "logit_scale": 1.3}, {"temperature": torch.linspace(0.5, 1.5, 20)}],
    ids=lambda o: "-".join(o),
)
def test_outputs_and_gradients_are_as_accurate_as_torch(backend, dtype, options):
    if (backend, dtype) == ("cpu", torch.float16) or (backend == "triton" and dtype not in TRITON_DTYPES):
        pytest.skip("served by the reference (cpu), wrong in the interpreter (triton)")
    assert_right(
        call_logits,
        logit_tensors(20, 1500, dtype=dtype),
        targets_for(20, 1500),
        wanted=("logits",),
        **{name: here(value) for name, value in options.items()},
    )


@FUSED
@pytest.mark.parametrize("output", DIFFERENTIABLE)
def test_each_output_alone(backend, output):
    assert_right(
        call_logits, logit_tensors(12, 300), targets_for(12, 300), outputs=(output,), wanted=("logits",)
    )


@FUSED
@pytest.mark.parametrize(
    "rows, vocabulary", [(97, 1500), (1, 700), (1, 1), (1937, 33), *later((3, 50257), (2, 129920))]
)
def test_sizes_that_no_block_divides(backend, rows, vocabulary):
    if backend == "triton" and rows == 1937:
        pytest.skip("hundreds of programs: too slow in the interpreter")
    assert_right(
        call_logits,
        logit_tensors(rows, vocabulary),
        targets_for(rows, vocabulary, rows > 5),
        wanted=("logits",),
    )


@FUSED
@pytest.mark.parametrize("case", ["peaked", "far below zero"])
def test_extreme_logits(backend, case):
    tensors = logit_tensors(8, 5000, spread=40.0 if case == "peaked" else 1.0)
    if case == "far below zero":
        tensors = {name: value - 100 for name, value in tensors.items()}
    assert_right(call_logits, tensors, targets_for(8, 5000), wanted=("logits",))


@FUSED
def test_masked_vocabulary_counts_for_nothing(backend):
    """Also where the first block is masked throughout, as the running maximum is -inf then."""
    tensors, targets = logit_tensors(6, 6000), torch.randint(4500, 6000, (6,))
    for name in tensors:
        tensors[name][:, :4500] = -torch.inf
    got = run_all(call_logits, tensors, targets, OUTPUTS, ("logits",))
    want = run_all(
        call_logits, {n: t[:, 4500:] for n, t in tensors.items()}, targets - 4500, OUTPUTS, ("logits",)
    )
    for name in (*DIFFERENTIABLE, "ref_logprob"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=2e-6, msg=name)
    assert torch.equal(got["top1"], want["top1"] + 4500)
    assert not got["d_logits"][:, :4500].any()
    torch.testing.assert_close(got["d_logits"][:, 4500:], want["d_logits"], rtol=1e-5, atol=1e-6)


@FUSED
def test_policy_equal_to_the_reference_has_no_kl_and_no_kl_gradient(backend):
    got = run_all(
        call_logits,
        logit_tensors(9, 3000, apart=0.0),
        targets_for(9, 3000),
        ("kl", "reverse_kl"),
        ("logits",),
    )
    assert (
        got["kl"].abs().max() < 1e-7
        and got["reverse_kl"].abs().max() < 1e-7
        and got["d_logits"].abs().max() < 1e-8
    )


@FUSED
def test_kl_near_the_reference(backend):
    tensors, targets = logit_tensors(16, 2000, apart=0.014), targets_for(16, 2000, False)
    got = assert_right(call_logits, tensors, targets, ("kl",), ("logits",))
    assert 2e-5 < got["kl"].mean() < 5e-4


@FUSED
def test_zero_and_ignored_rows(backend):
    empty = run_all(call_logits, logit_tensors(0, 50), targets_for(0, 50), OUTPUTS, ("logits",))
    assert empty["kl"].shape == (0,) and empty["d_logits"].shape == (0, 50)
    tensors = logit_tensors(4, 50)
    tensors["logits"][1] = torch.nan
    got = run_all(call_logits, tensors, torch.tensor([3, -100, 5, 7]), OUTPUTS, ("logits",))
    assert all(not value[1].any() for value in got.values())
    assert all(value.isfinite().all() for value in got.values())


@FUSED
def test_ties_go_to_the_first_column(backend):
    logits = torch.zeros(3, 5000)
    logits[1, [4200, 4100, 17]] = 1.0
    logits[2, [4999, 4998]] = 1.0
    assert logits_logprob(logits, None, outputs=("top1",)).top1.tolist() == [0, 17, 4998]


@FUSED
def test_layouts_and_leading_dimensions(backend):
    wide = torch.randn(2, 3, 200)
    targets = torch.randint(0, 90, (2, 3))
    for logits in (
        wide[..., 5:95],
        torch.randn(90, 3, 2).permute(2, 1, 0),
        wide[:, ::2, 5:95].expand(2, 2, 90)[:, :1].expand(2, 3, 90),
    ):
        got = logits_logprob(logits, targets, ref_logits=logits * 0.9, outputs=OUTPUTS)
        want = logits_logprob(
            logits.contiguous(), targets, ref_logits=(logits * 0.9).contiguous(), outputs=OUTPUTS
        )
        for name in OUTPUTS:
            assert torch.equal(getattr(got, name), getattr(want, name)) and getattr(got, name).shape == (2, 3)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_every_instruction_set_agrees(backend, instruction_sets):
    from clp_kernels import _native

    for isa in instruction_sets:
        _native.select_isa(isa)
        for dtype in (torch.float32, torch.bfloat16):
            assert_right(
                call_logits,
                logit_tensors(20, 1500, dtype=dtype),
                targets_for(20, 1500),
                wanted=("logits",),
                softcap=6.0,
            )


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_agrees_with_linear_logprob(backend):
    hidden, weight, reference = torch.randn(40, 16), torch.randn(700, 16) / 4, torch.randn(40, 16)
    targets = targets_for(40, 700)
    a = linear_logprob(hidden, weight, targets, ref_hidden=reference, outputs=OUTPUTS)
    b = logits_logprob(hidden @ weight.t(), targets, ref_logits=reference @ weight.t(), outputs=OUTPUTS)
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_the_reference_back_end_passes_gradcheck():
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(4, 7, dtype=torch.float64)
    for outputs in [*((name,) for name in DIFFERENTIABLE), DIFFERENTIABLE]:

        def function(x, outputs=outputs):
            stats = logits_logprob(
                x, torch.tensor([1, -100, 3, 6]), ref_logits=reference, softcap=4.0, outputs=outputs
            )
            return tuple(getattr(stats, name) for name in outputs)

        assert torch.autograd.gradcheck(function, [logits])


@pytest.mark.traced
@pytest.mark.parametrize("backend", ["cpu", "triton"], indirect=True)
def test_the_op_is_registered_rightly(backend):
    module = {"cpu": "clp_kernels.cpu.token_stats", "triton": "clp_kernels.triton_kernels.token_stats"}[
        backend
    ]
    op = torch.ops.clp_kernels.logits_logprob.default
    logits = torch.randn(6, 50, requires_grad=True)
    for reference, asked in ((torch.randn(6, 50), "logprob,kl,top1"), (None, "entropy,lse")):
        arguments = (
            logits,
            reference,
            torch.randint(0, 50, (6,)),
            torch.ones(6),
            9.0,
            1.0,
            -100,
            asked,
            ",".join(name for name in asked.split(",") if name != "top1"),
            module,
        )
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("backend", ["cpu", "reference"], indirect=True)
def test_compiles_without_graph_breaks(backend):
    logits, targets = torch.randn(2, 3, 40, requires_grad=True), torch.randint(0, 40, (2, 3))

    def function(logits, targets):
        stats = logits_logprob(logits * 2, targets, outputs=("logprob", "entropy"))
        return (stats.logprob + stats.entropy).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(logits, targets), logits),
                               torch.autograd.grad(function(logits, targets), logits))  # fmt: skip


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"logits": torch.zeros(2, 0)}, ValueError, r"logits is \(2, 0\).*at least one column"),
        ({"logits": torch.zeros(2, 9).long()}, TypeError, r"logits is torch.int64"),
        (
            {"ref_logits": torch.zeros(2, 8)},
            ValueError,
            r"ref_logits is \(2, 8\); expected logits' shape \(2, 9\)",
        ),
        (
            {"ref_logits": torch.zeros(2, 9).half()},
            TypeError,
            r"ref_logits is torch.float16; expected logits' dtype",
        ),
        ({"targets": torch.tensor([0, 9])}, IndexError, r"targets\[1\].*is 9; expected 0 to 8"),
        ({"targets": torch.tensor([0])}, ValueError, r"targets is \(1,\); expected \(2,\)"),
        ({"outputs": ("kl",)}, ValueError, r"'kl' and ref_logits is None"),
    ],
)
def test_errors_name_the_argument_and_what_was_expected(change, error, message):
    arguments = {"logits": torch.zeros(2, 9), "targets": torch.tensor([0, 1])} | change
    with pytest.raises(error, match=message):
        logits_logprob(arguments.pop("logits"), arguments.pop("targets"), **arguments)
