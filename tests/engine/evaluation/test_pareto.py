"""Pareto metrics: hand values, an independent estimate, and the properties that define them."""

import time

import numpy as np
import pytest

from clp_engine.core import statistics
from clp_engine.evaluation import pareto


def lattice(num_objectives, edge):
    """All weightings with entries that are multiples of 1 / edge."""
    axes = np.meshgrid(*[np.arange(edge + 1)] * num_objectives, indexing="ij")
    grid = np.stack(axes, -1).reshape(-1, num_objectives)
    return grid[grid.sum(1) == edge] / edge


# --- hypervolume -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "points, reference, volume",
    [
        ([[2.0, 3.0]], [0.0, 0.0], 6.0),
        ([[2.0, 3.0]], [1.0, 1.0], 2.0),
        # Staircase of (1, 3), (2, 2), (3, 1): 3 + 2 + 1.
        ([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]], [0.0, 0.0], 6.0),
        # The same with a dominated and a repeated point, in another order.
        ([[3.0, 1.0], [1.0, 1.0], [2.0, 2.0], [1.0, 3.0], [2.0, 2.0]], [0.0, 0.0], 6.0),
        ([[5.0, -1.0]], [0.0, 0.0], 0.0),  # worse than the reference in one objective: no box
        ([[5.0, -1.0], [1.0, 1.0]], [0.0, 0.0], 1.0),
        ([[0.5], [2.0], [1.0]], [0.25], 1.75),
        ([[1.0, 2.0, 3.0]], [0.0, 0.0, 0.0], 6.0),
        # Two unit-thick boxes 2x1x1 and 1x2x1 share a unit cube, the third adds one on top of it.
        ([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 2.0]], [0.0, 0.0, 0.0], 4.0),
        ([[2.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 2.0]], [0.0] * 4, 3.0),
    ],
)
def test_hypervolume_has_the_value_computed_by_hand(points, reference, volume):
    assert pareto.hypervolume(points, reference) == pytest.approx(volume, abs=1e-12)


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_hypervolume_agrees_with_the_share_of_random_points_that_are_dominated(objectives):
    rng = np.random.default_rng(objectives)
    points = rng.random((9, objectives))
    samples = rng.random((200_000, objectives))
    dominated = np.zeros(len(samples), dtype=bool)
    for p in points:
        dominated |= (samples <= p).all(1)
    # Four standard errors of a proportion of 200,000 draws are at most 4 * 0.5 / sqrt(200000) = 0.0045.
    assert pareto.hypervolume(points, np.zeros(objectives)) == pytest.approx(dominated.mean(), abs=0.0045)


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_hypervolume_of_many_fronts_at_once_is_that_of_each(objectives):
    fronts = np.random.default_rng(0).normal(size=(4, 5, 7, objectives))
    reference = np.full(objectives, -0.5)
    together = pareto.hypervolume(fronts, reference)
    each = [[pareto.hypervolume(front, reference) for front in row] for row in fronts]
    np.testing.assert_allclose(together, each, rtol=1e-12)


def test_hypervolume_is_not_changed_by_order_dominated_points_or_renaming_objectives():
    rng = np.random.default_rng(1)
    points, reference = rng.random((12, 3)), np.array([-0.1, 0.0, 0.1])
    volume = pareto.hypervolume(points, reference)
    assert pareto.hypervolume(points[rng.permutation(12)], reference) == pytest.approx(volume)
    assert pareto.hypervolume(points[pareto.non_dominated(points)], reference) == pytest.approx(volume)
    axes = [2, 0, 1]
    assert pareto.hypervolume(points[:, axes], reference[axes]) == pytest.approx(volume)


def test_hypervolume_grows_with_a_point_that_no_other_dominates():
    points = np.array([[0.2, 0.8], [0.8, 0.2]])
    more = np.vstack([points, [0.6, 0.6]])
    assert pareto.hypervolume(more, [0, 0]) > pareto.hypervolume(points, [0, 0])


def test_hypervolume_names_the_shape_that_is_wrong():
    with pytest.raises(ValueError, match=r"reference has shape \(3,\); expected \(2,\)"):
        pareto.hypervolume([[1.0, 2.0]], [0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="points has shape"):
        pareto.hypervolume([], [0.0])


# --- dominance, utilities, steerability --------------------------------------------------------------------


def test_non_dominated_keeps_ties_and_drops_what_is_worse_in_one_and_better_in_none():
    points = [[1, 3], [3, 1], [2, 2], [2, 2], [2, 1], [1, 2.9], [3, 0]]
    assert pareto.non_dominated(points).tolist() == [True, True, True, True, False, False, False]


def test_expected_utility_is_the_mean_of_the_best_choice_per_weighting():
    # v = (1,0): 3; (1/2,1/2): 2 whichever is taken; (0,1): 3.
    assert pareto.expected_utility([[3.0, 1.0], [1.0, 3.0]], lattice(2, 2)) == pytest.approx(8 / 3)


def test_realised_utility_punishes_ignoring_and_inverting_the_weighting_where_expected_utility_does_not():
    weights = lattice(2, 10)
    obedient = np.stack([weights[:, 0], weights[:, 1]], 1)
    inverted = obedient[::-1]
    expected = pareto.expected_utility(obedient, weights)
    assert pareto.expected_utility(inverted, weights) == pytest.approx(expected)
    # mean of w^2 + (1-w)^2 over 0, .1 ... 1 is 0.7; of 2 w (1-w) it is 0.3
    assert pareto.realised_utility(obedient, weights) == pytest.approx(0.7)
    assert pareto.realised_utility(inverted, weights) == pytest.approx(0.3)


def test_regret_is_zero_exactly_where_the_point_asked_for_is_the_best_and_never_negative():
    weights = lattice(3, 4)
    # v . R(pi_u) = v.u - |u|^2 / 2 is largest at u = v.
    points = weights - 0.5 * (weights**2).sum(1, keepdims=True)
    np.testing.assert_allclose(pareto.regret(points, weights), 0.0, atol=1e-15)
    shuffled = points[np.random.default_rng(0).permutation(len(weights))]
    assert (pareto.regret(shuffled, weights) >= 0).all()
    lost = pareto.expected_utility(shuffled, weights) - pareto.realised_utility(shuffled, weights)
    assert pareto.regret(shuffled, weights).mean() == pytest.approx(lost) and lost > 0


def test_ranks_share_ties():
    assert pareto.ranks([10.0, 20.0, 20.0, 5.0]).tolist() == [1.0, 2.5, 2.5, 0.0]


def test_steerability_is_one_for_any_increasing_response_and_minus_one_for_a_decreasing_one():
    weights = lattice(2, 10)
    points = np.stack([np.exp(3 * weights[:, 0]), -np.exp(weights[:, 1])], 1)
    np.testing.assert_allclose(pareto.steerability(points, weights), [1.0, -1.0])


def test_steerability_with_ties_is_pearson_of_average_ranks():
    weights = lattice(2, 3)  # w_0 = 0, 1/3, 2/3, 1
    points = np.stack([[0.0, 1.0, 1.0, 2.0], [3.0, 2.0, 1.0, 0.0]], 1)
    # ranks (0,1,2,3) against (0,1.5,1.5,3): 4.5 / sqrt(5 * 4.5)
    np.testing.assert_allclose(pareto.steerability(points, weights), [4.5 / np.sqrt(22.5), 1.0])


def test_steerability_of_a_constant_response_is_undefined_not_zero():
    weights = lattice(2, 4)
    rho = pareto.steerability(np.stack([np.ones(5), weights[:, 1]], 1), weights)
    assert np.isnan(rho[0]) and rho[1] == pytest.approx(1.0)


# --- reward against KL -------------------------------------------------------------------------------------


def test_kl_steerability_is_minus_one_where_a_larger_coefficient_means_less_kl_at_every_weighting():
    alphas = np.array([0.5, 0.01, 0.1])
    kl = 1 / alphas * np.array([[1.0], [3.0]])
    assert pareto.kl_steerability(kl, alphas) == pytest.approx(-1.0)
    # Pooled over weightings the ranks would mix: each weighting is correlated by itself, then averaged.
    assert pareto.kl_steerability(np.stack([kl[0], -kl[1]]), alphas) == pytest.approx(0.0)
    # ranks (2, 0, 1) against (0, 1, 2): -1 / 2
    assert pareto.kl_steerability([[1.0, 2.0, 3.0]], alphas) == pytest.approx(-0.5)
    assert pareto.kl_steerability([[1.0, 1.0, 1.0], [1.0, 3.0, 2.0]], alphas) == pytest.approx(-1.0)
    assert np.isnan(pareto.kl_steerability([[1.0], [2.0]], [0.1]))


@pytest.mark.parametrize(
    "utility, kl, volume",
    [
        ([0.5], [2.0], 0.3 * 8.0),  # from KL 2 to the limit of 10, a gain of 0.5 - 0.2
        ([0.3, 0.5], [2.0, 6.0], 0.1 * 4.0 + 0.3 * 4.0),
        ([0.5, 0.3], [6.0, 2.0], 0.1 * 4.0 + 0.3 * 4.0),  # in any order
        ([0.5, 0.4], [2.0, 6.0], 0.3 * 8.0),  # more KL for less reward adds nothing
        ([0.1, 0.9], [1.0, 12.0], 0.0),  # below the base; beyond the limit
        ([0.2, 0.2], [0.0, 0.0], 0.0),  # the base itself
    ],
)
def test_kl_hypervolume_has_the_value_computed_by_hand(utility, kl, volume):
    assert pareto.kl_hypervolume([utility], [kl], [0.2], 10.0) == pytest.approx(volume, abs=1e-12)


def test_kl_hypervolume_is_the_mean_over_weightings_of_the_hypervolume_of_each_and_takes_resamples():
    rng = np.random.default_rng(0)
    utility, kl, base = rng.random((5, 3, 4)), 8 * rng.random((5, 3, 4)), 0.5 * rng.random((5, 3))
    each = [
        [pareto.hypervolume(np.stack([utility[b, w], -kl[b, w]], -1), [base[b, w], -6.0]) for w in range(3)]
        for b in range(5)
    ]
    np.testing.assert_allclose(pareto.kl_hypervolume(utility, kl, base, 6.0), np.mean(each, 1))
    with pytest.raises(ValueError, match="of one shape and a limit of 0 or more"):
        pareto.kl_hypervolume(utility, kl[..., :2], base, 6.0)


# --- bootstrap ---------------------------------------------------------------------------------------------


def test_bootstrap_mean_and_spread_are_those_of_the_sample():
    rewards = np.random.default_rng(3).normal(size=(2, 50, 2))
    means = statistics.bootstrap_means(rewards, 4000, seed=1)
    error = rewards.std(1) / np.sqrt(50)
    # Of 4000 draws the mean is known to error / 63 and the spread to 1.1 %: five standard errors each.
    np.testing.assert_allclose(means.mean(0), pareto.mean_rewards(rewards), atol=5 * error.max() / 63)
    np.testing.assert_allclose(means.std(0), error, rtol=0.06)


def test_bootstrap_is_paired_so_a_constant_difference_between_policies_has_no_spread():
    base = np.random.default_rng(4).normal(size=(30, 2))
    means = statistics.bootstrap_means(np.stack([base, base + 0.25]), 200)
    assert means[:, 0].std() > 0.1
    np.testing.assert_allclose(means[:, 1] - means[:, 0], 0.25)


def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say():
    rng, covered = np.random.default_rng(5), 0
    for trial in range(200):
        low, high = statistics.interval(
            statistics.bootstrap_means(rng.normal(size=(1, 80, 1)), 300, seed=trial)
        )
        covered += bool(low[0, 0] <= 0.0 <= high[0, 0])
    # 95 % intervals of 80 prompts cover about 94 %; 200 trials give a standard error of 1.7 %.
    assert 0.88 <= covered / 200 <= 0.99


def test_a_front_no_better_than_the_base_exceeds_the_chance_hypervolume_about_one_time_in_twenty():
    rng, exceeded, misled, trials = np.random.default_rng(7), 0, 0, 300
    for trial in range(trials):
        rewards = rng.normal(size=(12, 60, 2))  # eleven points and the base, all with the same true mean
        means = pareto.mean_rewards(rewards)
        front, base, reference = means[:-1], means[-1], means[-1] - 0.3
        resampled = statistics.bootstrap_means(rewards, 300, seed=trial)
        gains = resampled[:, :-1] - resampled[:, -1:]
        chance = pareto.chance_hypervolume(gains, front - base, base, reference)
        exceeded += bool(pareto.hypervolume(front, reference) > np.quantile(chance, 0.95))
        volumes = [pareto.hypervolume(part, reference) for part in (resampled[:, :-1], resampled[:, -1:])]
        misled += bool(statistics.interval(volumes[0] - volumes[1])[0] > 0)
    # 5 % with a standard error of 1.3 %; the bootstrap of 60 prompts is a little too narrow.
    assert exceeded / trials < 0.1
    assert misled / trials > 0.5, "the interval of the gain alone calls most of these fronts better"


def test_rewards_that_do_not_apply_are_left_out_of_the_mean_rather_than_counted_as_zero():
    rewards = np.array([[[1.0, 4.0], [np.nan, 2.0], [3.0, 0.0]]])
    np.testing.assert_allclose(pareto.mean_rewards(rewards), [[2.0, 2.0]])
    means = statistics.bootstrap_means(rewards, 500)
    assert np.nanmin(means[..., 0]) >= 1.0 and np.nanmax(means[..., 0]) <= 3.0


def test_the_same_seed_gives_the_same_resamples_and_another_seed_others():
    rewards = np.random.default_rng(6).normal(size=(3, 20, 2))
    assert (
        statistics.bootstrap_means(rewards, 50, seed=7) == statistics.bootstrap_means(rewards, 50, seed=7)
    ).all()
    assert (
        statistics.bootstrap_means(rewards, 50, seed=7) != statistics.bootstrap_means(rewards, 50, seed=8)
    ).any()


@pytest.mark.parametrize("objectives, edge, seconds", [(2, 10, 1.0), (3, 10, 10.0)])
def test_a_thousand_resamples_of_the_default_grid_take_about_a_second_or_less(objectives, edge, seconds):
    weights = lattice(objectives, edge)
    rewards = np.random.default_rng(0).random((len(weights), 100, objectives))
    start = time.perf_counter()
    means = statistics.bootstrap_means(rewards, 1000)
    volumes = pareto.hypervolume(means, np.zeros(objectives))
    pareto.steerability(means, weights)
    elapsed = time.perf_counter() - start
    assert volumes.shape == (1000,) and elapsed < seconds, f"{elapsed:.2f} s"


# --- other measures of a front --------------------------------------------------------------------------------------------


def test_kendalls_tau_counts_pairs_in_order_and_leaves_ties_out():
    weights = np.array([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])
    points = np.array([[1.0, 3.0], [2.0, 2.0], [0.0, 2.0], [3.0, 2.0]])
    # Objective 0: pairs (0,1)+ (0,2)- (0,3)+ (1,3)+ (2,3)+, and (1,2) ties in w: 3 / sqrt(5 * 6).
    # Objective 1: (0,1), (0,2), (0,3) in order, (1,3) and (2,3) tie in R: 3 / sqrt(5 * 3).
    assert pareto.kendall_tau(points, weights) == pytest.approx([3 / 30**0.5, 3 / 15**0.5])
    both = pareto.kendall_tau(np.stack([points, -points]), weights)
    assert both[1] == pytest.approx(-both[0])
    assert np.isnan(pareto.kendall_tau(np.ones((4, 2)), weights)).all()


def test_sparsity_is_the_mean_squared_gap_between_neighbours_that_no_other_point_dominates():
    front = [[0.0, 3.0], [3.0, 0.0], [1.0, 2.0], [0.5, 0.5]]  # the last is dominated
    # Sorted in each objective 0, 1, 3 and 0, 2, 3: (1 + 4) + (4 + 1), over two gaps.
    assert pareto.sparsity(front) == pytest.approx(5.0)
    assert pareto.sparsity([[1.0, 2.0]]) == 0.0


def test_igd_plus_counts_what_a_target_has_more_than_the_nearest_point():
    target = [[0.0, 2.0], [2.0, 0.0]]
    assert pareto.igd_plus(target, target) == 0.0
    assert pareto.igd_plus([[5.0, 5.0]], target) == 0.0  # beyond the target: nothing is missing
    # (0, 2) lacks 1 in the second objective at (1, 1), (2, 0) lacks 1 in the first.
    assert pareto.igd_plus([[1.0, 1.0]], target) == pytest.approx(1.0)
    # The nearest for (0, 2) is (0, 1.5), which lacks 0.5; (2, 0) is reached.
    assert pareto.igd_plus([[2.0, 0.0], [0.0, 1.5]], target) == pytest.approx(0.25)
    assert pareto.igd_plus(np.zeros((3, 1, 2)), target) == pytest.approx([2.0] * 3)
