"""What breaks kernels and is not in the tests of one op: addresses beyond 32 bits, KL at 1e-4 in bfloat16, ragged counts."""

import mmap
import sys

import pytest
import torch
from accuracy import TRITON_HALVES
from clp_kernels import linear_logprob, logits_logprob, multi_lora_linear, sample_tokens, use_backend
from token_cases import (
    DIFFERENTIABLE,
    FUSED,
    OUTPUTS,
    assert_right,
    call_linear,
    head_tensors,
    run_all,
    targets_for,
)

# The interpreter's numpy warns of -inf - -inf in columns beyond the vocabulary, whose result is selected away.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton")
FAR = 1 << 30  # elements between two rows: the third starts beyond 2^31


@pytest.fixture
def far_apart():
    """Makes (rows, columns) tensors whose rows are FAR elements apart, in address space of which only they are ever touched.
    An address cut off to 32 bits, which may be negative then, falls into that space too."""

    def make(values):
        before = 2 * FAR
        count = before + (values.shape[0] - 1) * FAR + values.shape[1]
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        try:
            memory = mmap.mmap(-1, count * values.element_size(), flags=flags)
        except OSError:
            pytest.skip("no such address space")
        flat = torch.frombuffer(memory, dtype=values.dtype)
        if values.is_cuda:
            # Whose memory is not given out by the page: all of it is there, if there is as much.
            if count * values.element_size() > torch.cuda.mem_get_info()[0] // 4:
                pytest.skip(f"{count * values.element_size() >> 30} GiB are wanted")
            flat = torch.empty(count, dtype=values.dtype, device=values.device)
        return flat.as_strided(values.shape, (FAR, 1), before).copy_(values)

    return make


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reserves no memory for the address space")
def test_rows_whose_addresses_need_more_than_32_bits(backend, far_apart):
    logits, targets, seeds = torch.randn(4, 300), torch.tensor([5, 299, 0, 7]), torch.arange(4)
    far = far_apart(logits)
    for options in ({}, {"top_k": 5, "top_p": 0.9, "min_p": 0.01}):
        got, want = (sample_tokens(each, seeds=seeds, **options) for each in (far, logits))
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    stats = []
    for each in (far, logits):
        leaf = each.detach().requires_grad_()
        values = logits_logprob(leaf, targets, ref_logits=each, outputs=("logprob", "entropy", "kl"))
        (gradient,) = torch.autograd.grad(sum(v.sum() for v in values if v is not None), leaf)
        stats.append((values.logprob, values.entropy, values.kl, gradient))
    for one, other in zip(*stats):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reserves no memory for the address space")
def test_operands_whose_addresses_need_more_than_32_bits(backend, far_apart):
    x, weight, a, b, gate = (torch.randn(*s) for s in ((4, 9), (4, 9), (3, 9), (4, 3), (4, 3)))
    want = multi_lora_linear(x, weight, a, b, gate)
    torch.testing.assert_close(
        multi_lora_linear(far_apart(x), far_apart(weight), far_apart(a), far_apart(b), gate), want
    )
    targets, options = torch.tensor([1, 0, 3, 2]), {"ref_hidden": x + 0.1, "outputs": OUTPUTS}
    want = linear_logprob(x, weight, targets, **options)
    got = linear_logprob(
        far_apart(x), far_apart(weight), targets, **options | {"ref_hidden": far_apart(x + 0.1)}
    )
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "backend, dtype",
    [("cpu", torch.bfloat16), *(("triton", dtype) for dtype in TRITON_HALVES)],
    indirect=["backend"],
)
def test_kl_of_1e_4_and_its_gradient_in_16_bits(backend, dtype):
    """Policy and reference differ by little more than the rounding of the hidden states; errors against float64."""
    tensors, targets = (
        head_tensors(64, 64, 700, spread=2.0, apart=0.007, dtype=dtype),
        targets_for(64, 700, False),
    )
    got = run_all(call_linear, tensors, targets, ("kl", "reverse_kl"), ("hidden",))
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    with use_backend("reference"):
        exact = run_all(call_linear, wide, targets, ("kl", "reverse_kl"), ("hidden",))
    assert 3e-5 < exact["kl"].mean() < 3e-4
    for name in got:
        error = (got[name].double() - exact[name]).norm() / exact[name].norm()
        assert error < 0.03, f"{name}: {error:.2g}"


@FUSED
def test_kl_apart_from_the_policy_by_one_column_alone(backend):
    """The last column of the vocabulary, which a kernel that forgets it would miss altogether."""
    logits = torch.zeros(3, 1025)
    reference = logits.clone()
    reference[:, -1] = 5.0
    targets = torch.full((3,), 1024)
    stats = logits_logprob(logits, targets, ref_logits=reference, outputs=OUTPUTS)
    with use_backend("reference"):
        exact = logits_logprob(logits.double(), targets, ref_logits=reference.double(), outputs=OUTPUTS)
    for name in OUTPUTS:
        torch.testing.assert_close(
            getattr(stats, name).double(), getattr(exact, name).double(), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("output", [*DIFFERENTIABLE, "all"])
def test_every_output_with_everything_at_once_over_a_ragged_number_of_tokens(backend, dtype, output):
    """Each gradient alone and all together: temperature, softcap, scale, bias, LoRA, ignored targets, 1937 tokens."""
    options = {"temperature": torch.rand(1937) + 0.5, "softcap": 9.0, "logit_scale": 1.2}
    tensors = head_tensors(1937, 16, 150, bias=True, lora=3, dtype=dtype)
    outputs = OUTPUTS if output == "all" else (output,)
    wanted = ("hidden", "weight", "bias", "a", "b", "gate")
    assert_right(call_linear, tensors, targets_for(1937, 150), outputs, wanted, **options)


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("rows, vocabulary", [(1937, 1500), (2, 50257), (2, 129920)])
def test_sampling_over_large_vocabularies_and_ragged_rows(backend, rows, vocabulary):
    logits, seeds = torch.randn(rows, vocabulary) - 100, torch.arange(rows)
    tokens, logprob = sample_tokens(logits, seeds=seeds, top_p=0.9, temperature=0.7)
    exact = (logits.double() / 0.7).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprob.double(), exact, rtol=1e-5, atol=1e-5)
    with use_backend("reference"):
        expected, _ = sample_tokens(logits, seeds=seeds, top_p=0.9, temperature=0.7)
    assert (tokens != expected).sum() <= rows // 500


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_sampling_over_a_large_vocabulary_in_triton(backend):
    logits, seeds = torch.randn(1, 50257) - 100, torch.arange(1)
    got = sample_tokens(logits, seeds=seeds, temperature=0.7)
    with use_backend("reference"):
        expected = sample_tokens(logits, seeds=seeds, temperature=0.7)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-5)


def test_a_temperature_near_zero_is_greedy(backend):
    """1 / temperature is infinite in float32 below 3e-39."""
    logits = torch.randn(3, 300)
    for temperature in (1e-6, 1e-30, 1e-39, 1e-45):
        tokens, logprob = sample_tokens(logits, temperature=temperature, seeds=torch.arange(3))
        assert torch.equal(tokens, logits.argmax(-1)), temperature
        assert (logprob.abs() < 1e-6).all(), temperature


# -- NaN and the infinities --------------------------------------------------------------------------------------------


def broken_rows(vocabulary):
    """Rows with NaN, +inf and -inf in the first and last columns, in one block of columns and in several."""
    nan, inf, last = torch.nan, torch.inf, vocabulary - 1
    places = [
        {}, {3: nan}, {3: inf}, {3: -inf}, {2: inf, last: nan}, {2: nan, last: inf}, {5: inf, 9: inf}, {last: nan},
        {last: inf}, {0: nan, last: nan}, {0: -inf, last: -inf}, {2: -inf, 4: nan, 6: inf}, {last // 2: nan, last: inf},
    ]  # fmt: skip
    rows = torch.randn(len(places) + 4, vocabulary)
    for row, at in zip(rows, places):
        for column, value in at.items():
            row[column] = value
    for row, value in zip(rows[len(places) :], (nan, inf, -inf, 0.0)):
        row[:] = value
    return rows


def assert_as_reference(backend, op, *arguments, **options):
    with use_backend("reference"):
        want = op(*arguments, **options)
    with use_backend(backend):
        got = op(*arguments, **options)
    for name in options["outputs"]:
        one, other = getattr(got, name), getattr(want, name)
        assert torch.allclose(one, other, equal_nan=True, rtol=1e-4, atol=1e-4), (name, one, other)


@pytest.mark.parametrize("vocabulary", [37, 1500, 9000])
def test_statistics_of_logits_that_are_not_finite_are_the_reference_s(backend, vocabulary):
    logits = broken_rows(vocabulary)
    targets = torch.full((len(logits),), 7)
    for outputs in (("top1",), ("lse",), ("lse", "top1", "logprob", "entropy")):
        for temperature in (1.0, 2e-38) if vocabulary == 37 else (1.0,):
            assert_as_reference(
                backend, logits_logprob, logits, targets, temperature=temperature, outputs=outputs
            )
    outputs = ("logprob", "ref_logprob", "kl", "reverse_kl", "lse", "top1")
    finite = torch.randn_like(logits)
    for policy, reference in ((logits, finite), (finite, logits)):
        assert_as_reference(backend, logits_logprob, policy, targets, ref_logits=reference, outputs=outputs)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_so_are_those_of_a_projection(backend, value):
    hidden, weight = torch.randn(5, 24), torch.randn(1500, 24)
    targets = torch.tensor([0, 4, 700, 1499, -100])
    for column in (4, 1499):
        bias = torch.zeros(1500)
        bias[column] = value
        outputs = ("lse", "top1", "logprob", "entropy")
        assert_as_reference(backend, linear_logprob, hidden, weight, targets, bias=bias, outputs=outputs)


def test_a_gradient_of_logits_that_are_not_finite_is_not_finite_either(backend):
    for value in (torch.nan, torch.inf):
        logits = torch.randn(2, 50)
        logits[0, 3] = value
        logits.requires_grad_()
        with use_backend(backend):
            stats = logits_logprob(logits, torch.tensor([1, 1]), outputs=("logprob", "lse"))
            (stats.logprob.sum() + stats.lse.sum()).backward()
        assert not logits.grad[0].isfinite().all() and logits.grad[1].isfinite().all()


@pytest.mark.parametrize("temperature", [1e-39, 1e-300, 0.0, -1.0, torch.nan, torch.inf])
def test_a_temperature_whose_inverse_no_float32_holds_is_refused(backend, temperature):
    with (
        use_backend(backend),
        pytest.raises(ValueError, match="expected a positive number, at least 1.18e-38"),
    ):
        logits_logprob(torch.randn(2, 5), torch.tensor([1, 1]), temperature=temperature)
    with (
        use_backend(backend),
        pytest.raises(ValueError, match="expected a positive number, at least 1.18e-38"),
    ):
        linear_logprob(torch.randn(2, 5), torch.randn(7, 5), torch.tensor([1, 1]), temperature=temperature)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 1e-39}, {"temperature": 1e-300}, {"temperature": 3e38}, {"top_k": 2**63}, {"top_k": 10**30},
     {"top_k": 2**63 - 1}, {"top_p": 1e-300}, {"min_p": 1e-300}, {"top_p": 1e-45}],
    ids=str,
)  # fmt: skip
def test_numbers_at_the_ends_of_their_types_draw_as_in_the_reference(backend, options):
    logits, seeds = torch.randn(6, 300), torch.arange(6)
    with use_backend("reference"):
        want = sample_tokens(logits, seeds=seeds, **options)
    with use_backend(backend):
        got = sample_tokens(logits, seeds=seeds, **options)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {name: value}
        for name in ("temperature", "top_k", "top_p", "min_p")
        for value in (torch.nan, torch.inf, -1, "3")
    ]
    + [{"top_k": 1.5}, {"top_p": 0}, {"min_p": 1.5}, {"temperature": 1e39}],
    ids=str,
)
def test_numbers_outside_are_a_value_error_that_names_the_option(backend, options):
    (name,) = options
    with use_backend(backend), pytest.raises(ValueError, match=f"sample_tokens: {name} is .*expected"):
        sample_tokens(torch.randn(2, 5), seeds=torch.arange(2), **options)
