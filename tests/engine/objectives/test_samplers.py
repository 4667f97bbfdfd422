"""The distributions are what their names say, and draws depend on the generator alone."""

import math

import pytest
import torch

from clp_engine.objectives.weightings import ConditionSampler, build_sampler, simplex_lattice

ROWS = 20000
KINDS = [
    dict(kind="dirichlet"),
    dict(kind="dirichlet", concentration=[0.2, 1.0, 5.0]),
    dict(kind="dirichlet", corner_probability=0.3),
    dict(kind="uniform"),
    dict(kind="uniform", stratified=True),
    dict(kind="grid"),
    dict(kind="fixed", fixed_weights=[0.2, 0.3, 0.5]),
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(rows=ROWS, num_objectives=3, seed=0, **options):
    return build_sampler(num_objectives, **options).sample(rows, generator(seed))


@pytest.mark.parametrize("options", KINDS)
def test_every_row_is_on_the_simplex(options):
    weights = draw(**options).weights
    assert weights.shape == (ROWS, 3) and weights.dtype == torch.float32
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(ROWS))


@pytest.mark.parametrize("options", KINDS)
def test_draws_depend_on_the_given_generator_alone(options):
    sampler = build_sampler(3, kl=(0.1, 0.6), **options)
    source = generator(7)
    sampler.sample(5, source)
    state = source.get_state()
    expected = sampler.sample(5, source)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    resumed = torch.Generator()
    resumed.set_state(state)
    again = build_sampler(3, kl=(0.1, 0.6), **options).sample(5, resumed)
    assert torch.equal(expected.weights, again.weights) and torch.equal(expected.kl, again.kl)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "options", [dict(kind="dirichlet"), dict(kind="uniform"), dict(kind="uniform", stratified=True)]
)
@pytest.mark.parametrize("num_objectives", [2, 3, 4])
def test_uniform_on_the_simplex(options, num_objectives):
    """The marginal of one entry is P(w_i > t) = (1 - t)^(M - 1); tolerance: 4 standard errors."""
    weights = draw(num_objectives=num_objectives, **options).weights
    for threshold in (0.1, 0.3, 0.7):
        expected = torch.full((num_objectives,), (1 - threshold) ** (num_objectives - 1))
        torch.testing.assert_close(
            (weights > threshold).float().mean(0), expected, atol=4 * 0.5 / math.sqrt(ROWS), rtol=0
        )


def test_dirichlet_has_the_moments_of_its_concentration():
    concentration = torch.tensor([0.2, 1.0, 5.0])
    weights = draw(concentration=concentration.tolist()).weights
    mean = concentration / concentration.sum()
    torch.testing.assert_close(weights.mean(0), mean, atol=0.01, rtol=0)
    variance = mean * (1 - mean) / (concentration.sum() + 1)
    torch.testing.assert_close(weights.var(0), variance, atol=0.003, rtol=0)


def test_a_tiny_concentration_gives_corners_and_not_nan():
    weights = draw(concentration=1e-3).weights
    assert (weights.amax(-1) > 0.99).float().mean() > 0.98
    torch.testing.assert_close(weights.mean(0), torch.full((3,), 1 / 3), atol=0.02, rtol=0)


def test_grid_draws_every_lattice_point_equally_often():
    weights = draw(kind="grid", resolution=4, rows=15000).weights
    points, counts = weights.mul(4).round().unique(dim=0, return_counts=True)
    assert len(points) == 15
    torch.testing.assert_close(weights * 4, (weights * 4).round())
    assert counts.min() > 850 and counts.max() < 1150  # 1000 each, standard deviation 31


def test_corners_are_mixed_in_with_their_probability():
    weights = draw(kind="uniform", corner_probability=0.3).weights
    corner = weights.amax(-1) == 1
    assert corner.float().mean().item() == pytest.approx(0.3, abs=0.015)
    torch.testing.assert_close(weights[corner].mean(0), torch.full((3,), 1 / 3), atol=0.03, rtol=0)


def test_stratified_draws_vary_less_from_step_to_step_and_are_still_uniform():
    spread, mean = {}, {}
    for stratified in (False, True):
        sampler, source = build_sampler(2, "uniform", stratified=stratified), generator()
        steps = torch.stack([sampler.sample(8, source).weights[:, 0] for _ in range(2000)])
        spread[stratified], mean[stratified] = steps.mean(1).std().item(), steps.mean(0)
    assert spread[True] < 0.5 * spread[False]
    torch.testing.assert_close(mean[True], torch.full((8,), 0.5), atol=4 * 0.29 / math.sqrt(2000), rtol=0)


@pytest.mark.parametrize("kl, smallest", [(0.1, 0.1), ((0.05, 0.8), 0.05), ([0.4, 0.2, 0.1], 0.1), (0, 0.0)])
def test_kl_is_drawn_from_what_was_given(kl, smallest):
    sampler = build_sampler(2, kl=kl)
    drawn = sampler.sample(ROWS, generator()).kl
    assert drawn.dtype == torch.float32 and drawn.shape == (ROWS,)
    assert sampler.min_kl == smallest
    if isinstance(kl, tuple):
        assert drawn.min() >= kl[0] - 1e-7 and drawn.max() <= kl[1] + 1e-7
        middle = math.sqrt(kl[0] * kl[1])
        assert (drawn < middle).float().mean().item() == pytest.approx(0.5, abs=0.015)
    elif isinstance(kl, list):
        torch.testing.assert_close(drawn.unique(), torch.tensor(sorted(kl)))
    else:
        assert (drawn == torch.tensor(float(kl))).all()


def test_lattices_of_the_evaluation():
    two, three = simplex_lattice(2, 11), simplex_lattice(3, 11)
    torch.testing.assert_close(two[:, 0], torch.arange(11) / 10)
    assert two.shape == (11, 2) and three.shape == (66, 3)
    assert len(three.unique(dim=0)) == 66
    torch.testing.assert_close(three.sum(-1), torch.ones(66))
    assert simplex_lattice(1, 5).tolist() == [[1.0]]


@pytest.mark.parametrize("kind", ["dirichlet", "uniform", "grid"])
def test_a_single_objective_has_weight_one(kind):
    assert (draw(num_objectives=1, kind=kind, rows=5).weights == 1).all()


def test_a_sampler_without_state_refuses_the_state_of_another():
    sampler = build_sampler(2)
    assert isinstance(sampler, ConditionSampler) and sampler.state_dict() == {}
    sampler.load_state_dict({})
    with pytest.raises(ValueError, match="keeps no state; the checkpoint has visits"):
        sampler.load_state_dict({"visits": [1, 2]})


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(kind="gaussian"), "expected one of dirichlet, uniform, grid, fixed"),
        (dict(concentration=0.0), "concentration must be positive; got 0, 0"),
        (dict(concentration=[1.0]), "concentration has 1 entries; expected one for each of 2 objectives"),
        (dict(kind="fixed"), "needs fixed_weights"),
        (dict(kind="fixed", fixed_weights=[0.5, 0.7]), "must sum to 1; got 0.5, 0.7"),
        (dict(kind="fixed", fixed_weights=[1.5, -0.5]), "must not be negative"),
        (dict(kind="fixed", fixed_weights=[1.0, 0.0], corner_probability=0.1), "contradicts kind='fixed'"),
        (dict(corner_probability=1.5), r"corner_probability must be in \[0, 1\]; got 1.5"),
        (dict(kind="grid", resolution=0), "resolution must be at least 1"),
        (dict(kind="grid", stratified=True), "stratified draws exist for kind='uniform'; got kind='grid'"),
        (dict(kl=-0.1), "kl must not be negative; got -0.1"),
        (dict(kl=(0.6, 0.1)), r"0 < low <= high; got \(0.6, 0.1\)"),
        (dict(kl=(0.1, 0.2, 0.3)), "For values to choose from give a list"),
        (dict(kl=[]), "at least one value"),
        (dict(num_objectives=0), "num_objectives must be at least 1; got 0"),
    ],
)
def test_errors_say_what_was_given_and_what_was_expected(options, message):
    with pytest.raises(ValueError, match=message):
        build_sampler(**{"num_objectives": 2, **options})
