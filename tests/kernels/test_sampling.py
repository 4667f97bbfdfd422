"""sample_tokens draws from the truncated softmax and returns the untruncated log-prob, everywhere alike."""

import clp_kernels
import pytest
import torch
from clp_kernels import sample_tokens, use_backend
from later import later

OPTIONS = {
    "plain": {},
    "cooled": {"temperature": 0.7},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 10},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 1.3, "top_k": 30, "top_p": 0.8, "min_p": 0.02},
}


def draw(name, logits, **options):
    with use_backend(name):
        return sample_tokens(logits, **options)


def kept(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """What the truncations leave of one row, by sorting: the definition, once more and independently."""
    order = logits.double().sort(descending=True)
    z = order.values / (temperature or 1.0)
    keep = torch.ones_like(z, dtype=torch.bool)
    if top_k:
        keep &= z >= z[top_k - 1]
    if top_p:
        mass = z.masked_fill(~keep, -torch.inf).softmax(-1)
        keep &= mass.cumsum(-1) - mass < top_p
    if min_p:
        keep &= z >= z[0] + torch.tensor(min_p).log()
    return set(order.indices[keep].tolist())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("vocab", [1, 300, *later(1500)])
def test_every_backend_draws_the_reference_tokens(backend, vocab, options):
    rows = 16 if backend == "triton" else 200
    logits, seeds = torch.randn(rows, vocab) * 3, torch.arange(rows)
    tokens, logprob = sample_tokens(logits, seeds=seeds, **options)
    expected, expected_logprob = draw("reference", logits, seeds=seeds, **options)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logprob, expected_logprob, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(backend, dtype):
    logits, seeds = (torch.randn(16, 700) * 3).to(dtype), torch.arange(16)
    tokens, logprob = sample_tokens(logits, seeds=seeds, temperature=0.8, top_p=0.9)
    expected, expected_logprob = draw("reference", logits.float(), seeds=seeds, temperature=0.8, top_p=0.9)
    assert torch.equal(tokens, expected) and logprob.dtype == torch.float32
    torch.testing.assert_close(logprob, expected_logprob, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_only_kept_tokens_are_drawn_and_all_of_them_are(options):
    logits = torch.randn(1, 40).mul(1.5)
    tokens, _ = draw("cpu", logits.expand(20000, -1), seeds=torch.arange(20000), **options)
    if options.get("temperature") == 0:
        assert set(tokens.tolist()) == {logits.argmax().item()}
    else:
        drawn, allowed = set(tokens.tolist()), kept(logits[0], **options)
        assert drawn <= allowed
        # 20000 draws miss a token of probability 1e-3 once in 5e8.
        likely = (logits[0] / options.get("temperature", 1.0)).softmax(-1) > 1e-3
        assert {t for t in allowed if likely[t]} <= drawn


def test_frequencies_are_the_softmax():
    logits, count = torch.randn(1, 30), 200_000
    tokens, _ = draw(
        "cpu",
        logits.expand(count, -1),
        temperature=0.9,
        generator=torch.Generator(torch.get_default_device()).manual_seed(3),
    )
    seeded, _ = draw("cpu", logits.expand(count, -1), temperature=0.9, seeds=torch.arange(count))
    p = (logits[0].double() / 0.9).softmax(-1)
    for drawn in (tokens, seeded):
        frequency = torch.bincount(drawn, minlength=30) / count
        # Five standard deviations; Pearson's statistic (29 degrees of freedom) has mean 29, deviation 7.6.
        assert ((frequency - p).abs() <= 5 * (p * (1 - p) / count).sqrt()).all()
        assert count * ((frequency - p) ** 2 / p).sum() < 29 + 5 * 7.6


def test_logprob_is_the_untruncated_one_at_the_temperature(backend):
    logits = torch.randn(12, 200) * 4
    temperature = torch.linspace(0.0, 2.0, 12)
    tokens, logprob = sample_tokens(logits, temperature=temperature, top_k=3, seeds=torch.arange(12))
    temperature[0] = 1.0  # greedy: the largest logit, with its log-prob at temperature 1
    exact = (logits.double() / temperature[:, None]).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprob, exact.float(), rtol=1e-5, atol=2e-6)
    assert tokens[0] == logits[0].argmax()


def test_options_may_differ_by_row(backend):
    logits, seeds = torch.randn(5, 300) * 3, torch.arange(5)
    per_row = {
        "temperature": torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0]),
        "top_k": torch.tensor([0, 5, 300, 4, 1]),
        "top_p": torch.tensor([1.0, 0.5, 0.5, 0.9, 1.0]),
        "min_p": torch.tensor([0.0, 0.0, 0.3, 0.0, 0.1]),
    }
    tokens, logprob = sample_tokens(logits, seeds=seeds, **per_row)
    for row in range(5):
        single = {name: value[row].item() for name, value in per_row.items()}
        token, value = sample_tokens(logits[row : row + 1], seeds=seeds[row : row + 1], **single)
        assert token == tokens[row] and value == logprob[row]


def test_a_seeded_row_does_not_depend_on_the_batch(backend):
    logits, seeds = torch.randn(9, 500), torch.arange(9) * 31
    tokens, logprob = sample_tokens(logits, seeds=seeds)
    order = torch.randperm(9)[:4]
    again = sample_tokens(logits[order], seeds=seeds[order])
    assert torch.equal(again[0], tokens[order]) and torch.equal(again[1], logprob[order])


def test_the_same_generator_state_draws_the_same_tokens(backend):
    logits = torch.randn(8, 100)
    first, second, third = (
        sample_tokens(logits, generator=torch.Generator(torch.get_default_device()).manual_seed(s))[0]
        for s in (5, 5, 6)
    )
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_masked_and_extreme_logits(backend):
    masked = torch.full((6, 400), -torch.inf)
    masked[:, 399] = -5.0
    assert (sample_tokens(masked, seeds=torch.arange(6))[0] == 399).all()
    masked[:, 0] = -5.0
    tokens, logprob = sample_tokens(masked, seeds=torch.arange(6), top_p=0.99)
    assert set(tokens.tolist()) <= {0, 399}
    torch.testing.assert_close(logprob, torch.full((6,), 0.5).log())
    for shift in (-100.0, 1e4):
        logits = torch.randn(6, 400)
        torch.testing.assert_close(
            sample_tokens(logits + shift, seeds=torch.arange(6)),
            draw("reference", (logits + shift), seeds=torch.arange(6)),
            rtol=1e-5,
            atol=2e-6,
        )
    peaked = torch.zeros(6, 400)
    peaked[:, 7] = 200.0
    tokens, logprob = sample_tokens(peaked, seeds=torch.arange(6))
    assert (tokens == 7).all() and (logprob == 0).all()


# Logits that a threshold is hard to find in: all in one bin, ties, both signs of zero, the whole range of the floats.
HARD = {
    "equal": lambda: torch.full((8, 500), 0.7),
    "steps": lambda: torch.randn(8, 500).round(),
    "near zero": lambda: torch.randn(8, 500) * 1e-33,  # Triton's interpreter reads subnormal numbers of bfloat16 wrongly
    "zeros of both signs": lambda: torch.tensor([0.0, -0.0, -1.0, 1e-30]).repeat(8, 125),
    "wide": lambda: torch.randn(8, 500).sign() * 10.0 ** torch.empty(8, 500).uniform_(-30, 37),
    "negative": lambda: -100.0 - torch.rand(8, 500),
    "neighbours": lambda: (torch.full((8, 500), 8.0).view(torch.int32) + torch.randint(0, 9, (8, 500))).view(torch.float32),
    "masked": lambda: torch.randn(8, 500).masked_fill(torch.rand(8, 500) < 0.9, -torch.inf),
}  # fmt: skip


@pytest.mark.parametrize(
    "options", [{"top_k": 7}, {"top_k": 400}, {"top_p": 0.6}, {"top_k": 300, "top_p": 0.9}], ids=str
)
@pytest.mark.parametrize("kind", ["steps", *later(*sorted(set(HARD) - {"steps"}))])
def test_thresholds_are_exact(backend, kind, options):
    logits, seeds = HARD[kind](), torch.arange(8) * 7919
    for dtype in (torch.float32, torch.bfloat16):
        given = logits.to(dtype)
        tokens, _ = sample_tokens(given, seeds=seeds, **options)
        expected, _ = draw("reference", given.float(), seeds=seeds, **options)
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("options", [OPTIONS[name] for name in ("plain", "greedy", "min_p", "all")], ids=str)
def test_however_the_vocabulary_is_cut(backend, options):
    from clp_kernels.triton_kernels import tuning

    logits, seeds = torch.randn(6, 700) * 3, torch.arange(6) + 5
    logits[1, 400:] = -torch.inf  # parts without any weight, in front and behind
    logits[2, :300] = -torch.inf
    logits[3] = logits[3].round()
    logits[4, 333] = torch.nan
    expected, expected_logprob = draw(
        "reference", logits[[0, 1, 2, 3, 5]], seeds=seeds[[0, 1, 2, 3, 5]], **options
    )
    for block in (32, 256):
        with tuning.force("sample", "whole", (block, 1)), tuning.force("sample", "truncated", (block, 1)):
            out = torch.empty(6, dtype=torch.int64), torch.empty(6)
            with pytest.raises(ValueError, match=r"logits\[4\] is not finite"):
                sample_tokens(logits, seeds=seeds, out=out, **options)
        tokens, logprob = (t[[0, 1, 2, 3, 5]] for t in out)
        assert torch.equal(tokens, expected) and out[0][4] == -1 and out[1][4].isnan()
        torch.testing.assert_close(logprob, expected_logprob, rtol=1e-5, atol=2e-6)


@pytest.mark.check
def test_ties_at_the_threshold_are_all_kept(backend):
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]]).repeat(60, 1)
    for options in ({"top_k": 2}, {"top_p": 0.6}):
        tokens, _ = sample_tokens(logits, seeds=torch.arange(60), **options)
        assert set(tokens.tolist()) == {1, 2, 3, 4}


def test_the_largest_uniform_draws_the_last_token_of_any_weight(backend):
    logits = torch.zeros(2, 300)
    logits[1, 290:] = -torch.inf
    draws = torch.full((2,), 1 - 2.0**-53, dtype=torch.float64)
    tokens, _ = torch.ops.clp_kernels.sample_tokens(logits, draws, 1.0, None, 0, None, 1.0, None, 0.0, None)
    assert tokens.tolist() == [299, 289]
    tokens, _ = torch.ops.clp_kernels.sample_tokens(
        logits, draws * 0, 1.0, None, 0, None, 1.0, None, 0.0, None
    )
    assert tokens.tolist() == [0, 0]


def test_strided_rows_no_rows_and_given_outputs(backend):
    wide = torch.randn(7, 900)
    seeds = torch.arange(7)
    for view in (wide[:, :450], wide[:, ::2]):
        out = (torch.full((7,), -7), torch.full((7,), torch.nan))
        result = sample_tokens(view, seeds=seeds, out=out)
        assert result[0] is out[0] and result[1] is out[1]
        expected = sample_tokens(view.contiguous(), seeds=seeds)
        assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])
    tokens, logprob = sample_tokens(torch.zeros(0, 5))
    assert tokens.shape == logprob.shape == (0,)


def test_instruction_sets_draw_the_same_tokens(instruction_sets):
    logits, seeds = torch.randn(300, 1500) * 2, torch.arange(300)
    expected = draw("reference", logits, seeds=seeds, top_p=0.95)
    for isa in instruction_sets:
        clp_kernels._native.select_isa(isa)
        tokens, logprob = draw("cpu", logits, seeds=seeds, top_p=0.95)
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(logprob, expected[1], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_a_row_with_no_finite_maximum_is_an_error(backend):
    for value in (torch.nan, torch.inf):
        logits = torch.zeros(4, 300)
        logits[2, 270] = value
        with pytest.raises(ValueError, match=r"largest of logits\[2\] is not finite"):
            sample_tokens(logits)
    with pytest.raises(ValueError, match="not finite"):
        sample_tokens(torch.full((1, 10), -torch.inf))


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_opcheck_and_compile(backend):
    logits, seeds = torch.randn(4, 50), torch.arange(4)
    torch.library.opcheck(
        torch.ops.clp_kernels.sample_tokens.default,
        (logits, seeds, 0.9, None, 5, None, 1.0, None, 0.0, torch.zeros(4)),
    )

    def drawn(logits, seeds):
        return sample_tokens(logits, temperature=0.9, top_k=5, seeds=seeds)

    compiled = torch.compile(drawn, fullgraph=True, backend="aot_eager")(logits, seeds)
    torch.testing.assert_close(compiled, drawn(logits, seeds), rtol=0, atol=0)


def test_no_gradient_is_recorded():
    tokens, logprob = sample_tokens(torch.randn(3, 20, requires_grad=True))
    assert not logprob.requires_grad


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(logits=torch.zeros(5)), ValueError, r"logits is \(5,\); expected \(rows, V\)"),
        (dict(logits=torch.zeros(2, 0)), ValueError, r"V > 0"),
        (dict(logits=torch.zeros(2, 5, dtype=torch.int64)), TypeError, "logits is torch.int64"),
        (dict(temperature=-1.0), ValueError, "temperature is -1.0; expected 0"),
        (dict(top_k=-1), ValueError, "top_k is -1"),
        (dict(top_k=1.5), ValueError, "top_k is 1.5"),
        (dict(top_p=0.0), ValueError, "top_p is 0.0; expected 0 < top_p <= 1"),
        (dict(min_p=2.0), ValueError, "min_p is 2.0"),
        (dict(top_p=torch.ones(3)), ValueError, r"top_p is \(3,\).*expected a number or \(2,\)"),
        (dict(seeds=torch.zeros(3, dtype=torch.int64)), ValueError, r"seeds is \(3,\)"),
        (dict(seeds=torch.zeros(2)), ValueError, "seeds is .*torch.float32"),
        (
            dict(seeds=torch.zeros(2, dtype=torch.int64), generator=torch.Generator()),
            ValueError,
            "both generator and seeds",
        ),
        (dict(out=(torch.zeros(2), torch.zeros(2))), ValueError, r"out\[0\] is \(2,\) torch.float32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors_say_what_was_given_and_what_was_expected(arguments, error, message):
    with pytest.raises(error, match=message):
        sample_tokens(**{"logits": torch.zeros(2, 5), **arguments})
