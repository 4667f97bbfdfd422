"""Trained policies against optima that are known exactly.

Everything but the policy is the trainer's own: estimators, samplers, blends. Distances are KL(policy ||
optimum) in nats, by enumeration. The bound of 0.01 leaves room for the noise of the last steps; a biased
estimator stays further away however long it trains. Measured on the three conditions of THREE_TOKENS:

    return  0.0003  0.0009  0.0000        k2                        0.20  0.12  0.034
    exact   0.0028  0.0057  0.0014        k3                        0.27  0.54  0.070
    mixed   0.0003  0.0009  0.0000        exact, no score term      0.19  0.12  0.038

Over seeds exact varies between 0.0014 and 0.0057, return between 0.0000 and 0.0009.
"""

import pytest
import torch

from clp_engine.estimators import Coefficients, coefficients
from clp_engine.samplers import build_sampler
from clp_engine.tasks.tabular import TabularTask, train

BOUND = 0.01
THREE_TOKENS = [((0.5, 0.5), 0.2), ((0.2, 0.8), 0.2), ((0.8, 0.2), 0.4)]


@pytest.fixture(autouse=True)
def one_thread():
    """Tables of a few hundred numbers: more threads only get in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def distance(weights, alpha, estimator, **options):
    """From the optimum of 4 tokens, 3 steps and one (w, alpha), after training for it."""
    task = TabularTask.random(4, 3, 2, seed=1)
    sampler = build_sampler(2, "fixed", fixed_weights=weights, kl=alpha)
    return train(task, sampler, estimator=estimator, **options).kl_to_optimum(torch.tensor(weights), alpha)


@pytest.mark.parametrize("estimator", ["return", "exact", "mixed"])
@pytest.mark.parametrize("weights, alpha", THREE_TOKENS)
def test_unbiased_estimators_reach_the_optimum(weights, alpha, estimator):
    assert distance(weights, alpha, estimator) < BOUND


@pytest.mark.parametrize("weights, alpha", THREE_TOKENS)
def test_k3_in_the_loss_misses_the_optimum(weights, alpha):
    assert distance(weights, alpha, "k3") > 5 * BOUND


def exact_without_score_term(tokens, rewards, kl_coef, reward_scale, group_size, **options):
    """Differentiates the KL of each step, but lets no token answer for the KL of the steps after it."""
    options["estimator"] = "k2"
    rewards_only = coefficients(tokens, rewards, 0 * kl_coef, reward_scale, group_size, **options)
    return Coefficients(rewards_only.logprob, -kl_coef.unsqueeze(-1) * tokens.mask, rewards_only.advantage)


@pytest.mark.parametrize("weights, alpha", THREE_TOKENS)
def test_the_exact_kl_without_its_score_term_misses_the_optimum(weights, alpha):
    assert distance(weights, alpha, "exact", estimate=exact_without_score_term) > 2 * BOUND


def one_token(sampler, **options):
    """One conditioned run, eight outcomes, two rewards: two tables blended for every condition at once."""
    return train(TabularTask.random(8, 1, 2), sampler, steps=1000, prompts=64, **options)


@pytest.mark.parametrize("estimator", ["return", "exact"])
def test_one_run_over_all_weightings_reaches_every_optimum(estimator):
    trained = one_token(build_sampler(2, "uniform", kl=0.2), estimator=estimator)
    distances = [trained.kl_to_optimum(torch.tensor([i / 10, 1 - i / 10]), 0.2) for i in range(11)]
    assert max(distances) < BOUND


def over_alpha_and_weights(kl_conditioning):
    trained = one_token(build_sampler(2, "uniform", kl=(0.1, 0.6)), kl_conditioning=kl_conditioning)
    return torch.tensor(
        [
            [trained.kl_to_optimum(torch.tensor([i / 4, 1 - i / 4]), alpha) for i in range(5)]
            for alpha in (0.1, 0.25, 0.4, 0.6)
        ]
    )


def test_one_run_over_all_weightings_and_alphas_reaches_every_optimum_with_odds():
    assert over_alpha_and_weights("odds").max() < BOUND


def test_the_linear_form_cannot_represent_the_optima_of_several_alphas():
    """Measured 0.5 at most and 0.13 on average: a gap of the blend, not of the training."""
    gap = over_alpha_and_weights("linear")
    assert gap.max() > 0.2 and gap.mean() > 0.05


# ---- the testbed itself


def test_the_optimum_is_the_policy_no_other_policy_beats():
    task, weights, alpha = TabularTask.random(3, 2, 2, seed=2), torch.tensor([0.3, 0.7]), 0.3
    reference = task.outcome_logprobs(task.reference.double())

    def objective(logprob):
        gain = (1 - alpha) * (weights.double() @ task.rewards.double()) - alpha * (logprob - reference)
        return (logprob.exp() * gain).sum()

    best = task.optimum(weights, alpha).requires_grad_()
    logits = best.log_softmax(-1)
    assert torch.autograd.grad(objective(logits), best)[0].abs().max() < 1e-12
    noise = torch.randn(100, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    others = (best.detach() + 0.1 * noise).log_softmax(-1)
    assert all(objective(other) < objective(best) for other in others)


def test_outcome_probabilities_are_products_over_prefixes():
    task = TabularTask.random(3, 2, 1, seed=3)
    logprob = task.reference.log_softmax(-1)
    expected = [logprob[0, first] + logprob[1 + first, second] for first in range(3) for second in range(3)]
    torch.testing.assert_close(task.outcome_logprobs(task.reference), torch.stack(expected))


def test_training_is_deterministic():
    task, sampler = TabularTask.random(3, 2, 2), build_sampler(2, kl=(0.1, 0.6))
    first, second = (train(task, sampler, estimator="mixed", steps=20).deltas for _ in range(2))
    assert torch.equal(first, second)


def test_distance_to_the_optimum_starts_at_that_of_the_reference_and_is_zero_at_the_optimum():
    task, weights = TabularTask.random(8, 1, 2), torch.tensor([0.5, 0.5])
    assert task.kl_to_optimum(task.reference, weights, 0.2) > 1
    best = task.optimum(weights, 0.2).unsqueeze(0)
    assert task.kl_to_optimum(best, weights, 0.2) == pytest.approx(0, abs=1e-12)
