"""The estimators against exact expectations: every group of completions of a tiny policy is enumerated."""

import dataclasses
from dataclasses import dataclass
from itertools import product

import pytest
import torch

from clp_engine.objectives.advantages import group_mean, leave_one_out, rescale_rewards, scalarise
from clp_engine.objectives.coefficients import (
    RewardedTokens,
    Tokens,
    coefficients,
    objective_scales,
    returns_to_go,
)
from clp_engine.objectives.losses import loss_weights
from clp_engine.objectives.variance_mix import MixController

NAN = float("nan")


@dataclass
class Enumerated:
    """A policy over 3 tokens and at most 2 steps, float64; token 0 ends a completion, so lengths differ."""

    logits: torch.Tensor  # (4, 3): the empty prefix, then the prefixes 0 (never read), 1, 2
    reference: torch.Tensor
    rewards: torch.Tensor  # (7,) one per outcome

    outcomes = [(0,), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]

    @classmethod
    def random(cls, seed=0):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        return cls(draw(4, 3).requires_grad_(), draw(4, 3), 2 * draw(7))

    def tokens(self) -> Tokens:
        """Every outcome once: (7, 2), with gradients."""
        policy, reference = self.logits.log_softmax(-1), self.reference.log_softmax(-1)
        kl = (policy.exp() * (policy - reference)).sum(-1)
        prefixes = torch.tensor([(0, y[0] + 1) if len(y) > 1 else (0, 1) for y in self.outcomes])
        token = torch.tensor([y if len(y) > 1 else (y[0], 0) for y in self.outcomes])
        mask = torch.tensor([[True, len(y) > 1] for y in self.outcomes])
        return Tokens(policy[prefixes, token], reference[prefixes, token], kl[prefixes], mask)

    def objective(self, reward_scale, kl_coef) -> torch.Tensor:
        """J itself, from outcome probabilities: no per-token decomposition is involved."""
        tokens = self.tokens()
        logprob = (tokens.logprob * tokens.mask).sum(-1)
        log_ratio = ((tokens.logprob - tokens.ref_logprob) * tokens.mask).sum(-1)
        return (logprob.exp() * (reward_scale * self.rewards - kl_coef * log_ratio)).sum()

    def expected_gradient(
        self, group_size, reward_scale, kl_coef, change=lambda c: c, values=None, **options
    ):
        """Mean over all 7**group_size groups, by their probability, of the gradient per completion.

        values: (7, 2), of each outcome, for baseline "value".
        """
        groups = torch.tensor(list(product(range(7), repeat=group_size)))
        rows = groups.flatten()
        each = self.tokens()
        tokens = Tokens(*(value[rows] for value in (each.logprob, each.ref_logprob, each.kl, each.mask)))
        outcome = (each.logprob.detach() * each.mask).sum(-1).exp()
        probability = outcome[groups].prod(-1).repeat_interleave(group_size) / group_size
        scale = torch.full((len(rows),), reward_scale, dtype=torch.float64)
        coef = torch.full((len(rows),), kl_coef, dtype=torch.float64)
        values = None if values is None else values[rows]
        batch = RewardedTokens(tokens, self.rewards[rows], coef, scale, group_size, values)
        c = change(coefficients(batch, **options))
        surrogate = c.logprob * tokens.logprob + (0 if c.kl is None else c.kl * tokens.kl)
        return torch.autograd.grad((probability.unsqueeze(-1) * surrogate).sum(), self.logits)[0]

    def gradient(self, reward_scale, kl_coef) -> torch.Tensor:
        return torch.autograd.grad(self.objective(reward_scale, kl_coef), self.logits)[0]


UNBIASED = [("return", 0.5), ("exact", 0.5), ("mixed", 0.0), ("mixed", 0.3), ("mixed", 1.0)]


@pytest.mark.parametrize(
    "baseline, group_size", [("none", 1), ("none", 2), ("leave_one_out", 2), ("leave_one_out", 3)]
)
@pytest.mark.parametrize("estimator, mix", UNBIASED)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_expected_gradient_is_the_gradient_of_the_objective(estimator, mix, baseline, group_size, alpha):
    policy = Enumerated.random()
    expected = policy.expected_gradient(
        group_size, 1 - alpha, alpha, estimator=estimator, mix=mix, baseline=baseline
    )
    torch.testing.assert_close(expected, policy.gradient(1 - alpha, alpha), atol=1e-10, rtol=0)


# Any function of the prefix: one number for the empty one, one for each first token that goes on.
OF_PREFIX = torch.tensor([[1.3, 0.0], *[[1.3, -2.1]] * 3, *[[1.3, 0.8]] * 3], dtype=torch.float64)
OF_TOKEN = OF_PREFIX + torch.tensor([[1.0], *[[-1.0]] * 3, *[[0.5]] * 3], dtype=torch.float64)


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("estimator, mix", UNBIASED)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_value_of_the_prefix_leaves_the_expected_gradient_as_it_is(estimator, mix, alpha, group_size):
    policy = Enumerated.random()
    options = dict(estimator=estimator, mix=mix, baseline="value")
    expected = policy.expected_gradient(group_size, 1 - alpha, alpha, values=OF_PREFIX, **options)
    torch.testing.assert_close(expected, policy.gradient(1 - alpha, alpha), atol=1e-10, rtol=0)


@pytest.mark.parametrize("estimator", ["return", "exact"])
def test_a_value_that_has_seen_the_token_is_biased(estimator):
    policy = Enumerated.random()
    truth = policy.gradient(0.7, 0.3)
    options = dict(estimator=estimator, baseline="value")
    error = policy.expected_gradient(1, 0.7, 0.3, values=OF_TOKEN, **options) - truth
    assert error.norm() > 0.1 * truth.norm()


@pytest.mark.parametrize("estimator", ["return", "exact", "mixed", "k2", "k3"])
def test_the_advantage_is_the_return_that_is_still_to_come_less_its_value(estimator):
    tokens = random_tokens(2, 4)
    rewards, kl_coef, scale = torch.tensor([2.0, NAN], dtype=torch.float64), row(0.3, 2), row(0.7, 2)
    options = dict(estimator=estimator, mix=0.25)
    values = torch.arange(8.0, dtype=torch.float64).view(2, 4)
    batch = RewardedTokens(tokens, rewards, kl_coef, scale, 1, values)
    c = coefficients(batch, baseline="value", **options)
    goal = returns_to_go(batch, **options)
    share = {"return": (1.0, 0.0), "exact": (0.0, 1.0), "mixed": (0.75, 0.25)}.get(estimator, (0.0, 0.0))
    log_ratio = tokens.logprob - tokens.ref_logprob
    length = int(tokens.mask[0].sum())
    for t in range(length):
        penalty = share[0] * log_ratio[0, t:length].sum() + share[1] * tokens.kl[0, t + 1 : length].sum()
        torch.testing.assert_close(goal[0, t], 0.7 * 2.0 - 0.3 * penalty)
    torch.testing.assert_close(c.advantage[0], torch.where(tokens.mask[0], goal[0] - values[0], 0.0))
    assert (c.advantage[1] == 0).all() and (c.logprob[1] == 0).all()  # no reward, no objective
    assert c.kl is None or (c.kl[1] == 0).all()


def test_group_mean_shrinks_the_gradient_by_the_share_of_the_others():
    policy = Enumerated.random()
    expected = policy.expected_gradient(3, 0.7, 0.3, estimator="return", baseline="group_mean")
    torch.testing.assert_close(expected, policy.gradient(0.7, 0.3) * 2 / 3, atol=1e-10, rtol=0)


def test_group_mean_shrinks_the_score_term_but_not_the_differentiated_kl():
    policy = Enumerated.random()
    whole = policy.expected_gradient(2, 0.7, 0.3, estimator="exact", baseline="group_mean")
    without_kl = policy.expected_gradient(
        2,
        0.7,
        0.3,
        estimator="exact",
        baseline="group_mean",
        change=lambda c: type(c)(c.logprob, None, c.advantage),
    )
    restored = 2 * without_kl + (whole - without_kl)
    torch.testing.assert_close(restored, policy.gradient(0.7, 0.3), atol=1e-10, rtol=0)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_in_the_loss_is_biased(estimator):
    policy = Enumerated.random()
    truth = policy.gradient(0.7, 0.3)
    error = policy.expected_gradient(2, 0.7, 0.3, estimator=estimator) - truth
    assert error.norm() > 0.05 * truth.norm()


def test_exact_kl_without_its_score_term_is_biased_exactly_like_k2():
    policy = Enumerated.random()
    rewards_only = policy.expected_gradient(2, 1.0, 0.0, estimator="return")
    k2 = policy.expected_gradient(2, 0.0, 1.0, estimator="k2")
    exact = policy.expected_gradient(
        2,
        0.0,
        1.0,
        estimator="exact",
        change=lambda c: type(c)(torch.zeros_like(c.logprob), c.kl, c.advantage),
    )
    torch.testing.assert_close(k2, exact, atol=1e-10, rtol=0)
    assert (rewards_only + exact - policy.gradient(1.0, 1.0)).norm() > 0.05


def test_k3_follows_the_kl_of_the_other_direction():
    policy = Enumerated.random()
    expected = policy.expected_gradient(2, 0.0, 1.0, estimator="k3")
    p, q = policy.logits.log_softmax(-1), policy.reference.log_softmax(-1)
    reverse = (q.exp() * (q - p)).sum(-1)
    first = p[0].exp().detach()
    visited = reverse[0] + first[1] * reverse[2] + first[2] * reverse[3]
    torch.testing.assert_close(expected, -torch.autograd.grad(visited, policy.logits)[0], atol=1e-10, rtol=0)


def test_return_has_no_variance_at_the_optimum():
    """There reward and log-ratio cancel in every single completion."""
    policy = Enumerated.random()
    tokens, alpha = policy.tokens(), 0.4
    log_reference = (tokens.ref_logprob * tokens.mask).sum(-1)
    optimum = (log_reference + (1 - alpha) / alpha * policy.rewards).softmax(-1).detach()
    first = torch.stack([optimum[0], optimum[1:4].sum(), optimum[4:].sum()])
    at_optimum = Enumerated(
        torch.stack([first, first, optimum[1:4], optimum[4:]]).log().requires_grad_(),
        policy.reference,
        policy.rewards,
    )
    tokens = at_optimum.tokens()
    assert at_optimum.gradient(1 - alpha, alpha).abs().max() < 1e-12
    one = torch.ones(7, dtype=torch.float64)
    batch = RewardedTokens(tokens, policy.rewards, alpha * one, (1 - alpha) * one, 7)
    assert coefficients(batch, estimator="return").logprob.abs().max() < 1e-12
    assert coefficients(batch, estimator="exact").logprob.abs().max() > 0.1


def random_tokens(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logprob = -torch.rand(rows, length, generator=generator, dtype=torch.float64) * 3
    reference = logprob + 0.3 * torch.randn(rows, length, generator=generator, dtype=torch.float64)
    kl = torch.rand(rows, length, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    return Tokens(logprob, reference, kl, torch.arange(length) < lengths)


def row(value, rows=4):
    return torch.full((rows,), value, dtype=torch.float64)


@pytest.mark.parametrize("estimator", ["return", "exact", "mixed", "k2", "k3"])
def test_masked_entries_are_never_read(estimator):
    tokens = random_tokens(4, 5)
    values = (tokens.logprob, tokens.ref_logprob, tokens.kl, tokens.logprob + 0.1)
    rewards = torch.tensor([1.0, 2.0, 0.0, 5.0])

    def run(logprob, ref_logprob, kl, old_logprob):
        each = Tokens(logprob, ref_logprob, kl, tokens.mask)
        batch = RewardedTokens(each, rewards, row(0.1), row(0.9), 2, old_logprob=old_logprob)
        return coefficients(batch, estimator=estimator)

    clean, dirty = run(*values), run(*(value.masked_fill(~tokens.mask, NAN) for value in values))
    assert torch.equal(clean.logprob, dirty.logprob)
    assert (dirty.logprob[~tokens.mask] == 0).all()
    if clean.kl is not None:
        assert torch.equal(clean.kl, dirty.kl)
        assert (dirty.kl[~tokens.mask] == 0).all()


def test_coefficients_differ_by_row_as_their_conditions_do():
    """A batch of rows with different (reward scale, KL coefficient) is its groups, one by one."""
    tokens = random_tokens(4, 5)
    rewards, coef = torch.tensor([1.0, 2.0, 0.0, 5.0]), torch.tensor([0.1, 0.1, 0.6, 0.6])
    scale = 1 - coef
    together = coefficients(RewardedTokens(tokens, rewards, coef, scale, 2), estimator="exact")
    for rows in (slice(0, 2), slice(2, 4)):
        part = Tokens(*(v[rows] for v in (tokens.logprob, tokens.ref_logprob, tokens.kl, tokens.mask)))
        batch = RewardedTokens(part, rewards[rows], coef[rows], scale[rows], 2)
        alone = coefficients(batch, estimator="exact")
        assert torch.equal(together.logprob[rows], alone.logprob)
        assert torch.equal(together.kl[rows], alone.kl)


# ---- rewards, baselines, scaling


def test_a_missing_reward_renormalises_the_weights_of_its_row():
    rewards = torch.tensor([[1.0, 3.0], [NAN, 3.0], [1.0, NAN], [NAN, NAN], [NAN, 3.0]])
    weights = torch.tensor([[0.25, 0.75]] * 4 + [[1.0, 0.0]])
    result = scalarise(rewards, weights)
    torch.testing.assert_close(result, torch.tensor([2.5, 3.0, 1.0, NAN, NAN]), equal_nan=True)


def test_scalarise_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"\(B, M\); got \(3, 2\) and \(2,\)"):
        scalarise(torch.zeros(3, 2), torch.ones(2))


def test_leave_one_out_subtracts_the_mean_of_the_others():
    values = torch.tensor([1.0, 2.0, 6.0, 10.0, 10.0, 10.0])
    torch.testing.assert_close(leave_one_out(values, 3), torch.tensor([-3.0, -1.5, 4.5, 0, 0, 0]))
    torch.testing.assert_close(group_mean(values, 3), torch.tensor([-2.0, -1.0, 3.0, 0, 0, 0]))


def test_a_member_without_reward_neither_counts_nor_gets_an_advantage():
    values = torch.tensor([1.0, NAN, 5.0, NAN, 7.0, NAN])
    assert leave_one_out(values, 3).tolist() == [-4.0, 0.0, 4.0, 0.0, 0.0, 0.0]
    assert group_mean(values, 3).tolist() == [-2.0, 0.0, 2.0, 0.0, 0.0, 0.0]


def test_leave_one_out_of_equal_rewards_is_exactly_zero_even_when_they_are_large():
    assert (leave_one_out(torch.full((8,), 123456.7), 8) == 0).all()


@pytest.mark.parametrize("estimator", ["return", "exact", "k2", "k3"])
def test_a_row_without_reward_has_no_objective_at_all(estimator):
    tokens = random_tokens(4, 3)
    rewards = torch.tensor([NAN, 1.0, 2.0, 3.0])
    c = coefficients(RewardedTokens(tokens, rewards, row(0.3), row(0.7), 2), estimator=estimator)
    assert (c.logprob[:2] == 0).all()  # row 0 has no reward, row 1 nobody to be compared with
    assert (c.kl is None) or (c.kl[:2] == 0).all()
    assert (c.logprob[2:][tokens.mask[2:]] != 0).all()


def test_scaling_by_the_standard_deviation_is_torchs_plus_trls_epsilon():
    rewards = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0], dtype=torch.float64)
    group = rescale_rewards(rewards, 3, "group")
    torch.testing.assert_close(group[:3], rewards[:3] / (rewards[:3].std() + 1e-4))
    torch.testing.assert_close(group[3:], rewards[3:] / 1e-4)
    torch.testing.assert_close(rescale_rewards(rewards, 3, "batch"), rewards / (rewards.std() + 1e-4))
    assert rescale_rewards(rewards, 3, "none") is rewards


def test_scaling_ignores_missing_rewards():
    scaled = rescale_rewards(torch.tensor([1.0, 2.0, NAN, 6.0]), 4, "group")
    expected = torch.tensor([1.0, 2.0, 6.0])
    torch.testing.assert_close(scaled[[0, 1, 3]], expected / (expected.std() + 1e-4))
    assert scaled[2].isnan()


def test_scaled_advantages_are_those_of_trl():
    """Group mean and group std, KL out of the return: the advantage GRPOTrainer computes."""
    rewards = torch.tensor([1.0, 2.0, 6.0, 3.0, 3.5, 9.0])
    scaled = rescale_rewards(rewards.double(), 3, "group")
    batch = RewardedTokens(random_tokens(6, 3), scaled, row(0.1, 6), row(1.0, 6), 3)
    c = coefficients(batch, estimator="k3", baseline="group_mean")
    groups = rewards.double().view(2, 3)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(c.advantage, expected.flatten())


def test_scaling_moves_the_optimum():
    """Dividing rewards by s is the objective of another KL coefficient: kl_coef * s."""
    tokens, rewards = random_tokens(4, 3), torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    std = rewards.std() + 1e-4
    scaled = rescale_rewards(rewards, 4, "group")
    scaled = coefficients(RewardedTokens(tokens, scaled, row(0.3), row(0.7), 4))
    other = coefficients(RewardedTokens(tokens, rewards, row(0.3) * std, row(0.7), 4))
    torch.testing.assert_close(scaled.logprob * std, other.logprob)


def test_objective_scales_of_alpha_and_beta_are_one_family():
    alpha = torch.tensor([0.0, 0.2, 0.6])
    scale, coef = objective_scales(alpha)
    beta_scale, beta_coef = objective_scales(alpha / (1 - alpha), kl_is_beta=True)
    torch.testing.assert_close(coef / scale, beta_coef / beta_scale)


# ---- clipped ratios


@pytest.mark.parametrize(
    "epsilon, epsilon_high, delta", [(0.2, None, None), (0.1, 0.4, None), (0.2, None, 1.5)]
)
def test_clipped_coefficients_are_the_gradient_of_the_ppo_surrogate(epsilon, epsilon_high, delta):
    tokens = random_tokens(32, 6)
    generator = torch.Generator().manual_seed(3)
    old = tokens.logprob + 0.4 * torch.randn(32, 6, dtype=torch.float64, generator=generator)
    rewards = torch.randn(32, dtype=torch.float64, generator=generator)
    batch = RewardedTokens(tokens, rewards, row(0.0, 32), row(1.0, 32), 4, old_logprob=old)
    c = coefficients(batch, epsilon=epsilon, epsilon_high=epsilon_high, delta=delta)

    logprob = tokens.logprob.clone().requires_grad_()
    ratio = (logprob - old).exp()
    advantage = leave_one_out(rewards, 4).unsqueeze(-1)
    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    capped = ratio if delta is None else ratio.clamp(max=delta)
    surrogate = torch.minimum(capped * advantage, clipped * advantage)
    expected = torch.autograd.grad((surrogate * tokens.mask).sum(), logprob)[0]
    torch.testing.assert_close(c.logprob, expected)

    binding = (clipped * advantage < ratio * advantage) & tokens.mask
    counted = tokens.mask.sum().item()
    assert c.clip_low.item() == pytest.approx(((ratio < clipped) & binding).sum().item() / counted)
    assert c.clip_high.item() == pytest.approx(((ratio > clipped) & binding).sum().item() / counted)
    assert c.clip_low > 0 and c.clip_high > 0
    lengths = tokens.mask.sum(-1)
    low, high = (
        ((beyond & binding).sum(-1) / lengths)[lengths > 0] for beyond in (ratio < clipped, ratio > clipped)
    )
    assert (c.clip_low_min.item(), c.clip_high_max.item()) == pytest.approx(
        (low.min().item(), high.max().item())
    )


@pytest.mark.parametrize("estimator", ["return", "exact", "mixed", "k2", "k3"])
def test_a_policy_that_has_not_moved_is_not_clipped(estimator):
    tokens, rewards = random_tokens(4, 3), torch.tensor([1.0, 2.0, 4.0, 8.0])
    given = (tokens, rewards, row(0.3), row(0.7), 2)
    fresh = coefficients(RewardedTokens(*given), estimator=estimator)
    ratio_one = coefficients(RewardedTokens(*given, old_logprob=tokens.logprob), estimator=estimator)
    assert torch.equal(fresh.logprob, ratio_one.logprob)
    assert ratio_one.clip_low == 0 and ratio_one.clip_high == 0
    assert fresh.clip_low is None and fresh.clip_high is None


@pytest.mark.parametrize(
    "estimator, value", [("k2", lambda d: d.square() / 2), ("k3", lambda d: (-d).exp() + d - 1)]
)
def test_kl_in_the_loss_is_the_derivative_of_its_value(estimator, value):
    tokens = random_tokens(4, 3)
    c = coefficients(RewardedTokens(tokens, row(0.0), row(0.3), row(1.0), 2), estimator=estimator)
    logprob = tokens.logprob.clone().requires_grad_()
    loss = 0.3 * (value(logprob - tokens.ref_logprob) * tokens.mask).sum()
    torch.testing.assert_close(-c.logprob, torch.autograd.grad(loss, logprob)[0])


# ---- loss types


def test_loss_types_are_the_formulas_they_name():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    on = mask.float()
    torch.testing.assert_close(loss_weights(mask), on / 2)
    torch.testing.assert_close(loss_weights(mask, "grpo"), on * torch.tensor([[1 / 6], [1 / 2]]))
    torch.testing.assert_close(loss_weights(mask, "dapo"), on / 4)
    torch.testing.assert_close(loss_weights(mask, "dr_grpo", 10), on / 20)


@pytest.mark.parametrize("loss_type", ["sequence", "grpo", "dapo", "dr_grpo"])
def test_a_row_of_masked_tokens_weighs_nothing(loss_type):
    weights = loss_weights(torch.tensor([[0, 0], [0, 0]]).bool(), loss_type, 2)
    assert (weights == 0).all()


# ---- the mix


def test_mix_is_the_variance_minimising_coefficient():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20000, 3, 4, generator=generator)
    mean = torch.tensor([1.0, -2.0, 0.5, 0.0])
    g1, g2 = mean + 2 * noise[:, 0] + noise[:, 2], mean + noise[:, 1] + noise[:, 2]
    controller = MixController()
    controller.update((g1 * (g1 - g2)).sum(), (g1 - g2).square().sum())
    variances = {c: (g1 + c * (g2 - g1)).var(0).sum().item() for c in (0.7, 0.75, 0.8, 0.85, 0.9)}
    assert min(variances, key=variances.get) == 0.8  # Var 4 and 1, common part aside
    assert controller.mix == pytest.approx(0.8, abs=0.01)


def test_mix_depends_on_earlier_steps_only_and_survives_a_checkpoint():
    controller = MixController(initial=0.3, decay=0.5)
    assert controller.mix == 0.3
    controller.update(1.0, 4.0)
    assert controller.mix == 0.25
    controller.update(3.0, 4.0)
    assert controller.mix == pytest.approx((0.5 * 1 + 3) / (0.5 * 4 + 4))
    resumed = MixController(initial=0.3, decay=0.5)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.update(0.7, 1.3) == controller.update(0.7, 1.3)


@pytest.mark.parametrize("dot, expected", [(-1.0, 0.0), (9.0, 1.0)])
def test_mix_stays_between_the_two_estimators(dot, expected):
    assert MixController().update(dot, 2.0) == expected


# ---- errors


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(estimator="k1"), "expected one of return, exact, mixed, k2, k3"),
        (dict(baseline="mean"), "expected one of leave_one_out, group_mean, none"),
        (dict(mix=1.5), r"mix must be in \[0, 1\]; got 1.5"),
        (dict(group_size=3), "4 rows do not divide into groups of 3"),
        (dict(group_size=1), "group_size of at least 2; got 1. Use more completions, or baseline='none'"),
        (dict(baseline="value"), "values belong to baseline='value' and it needs them"),
        (dict(values=torch.zeros(4, 3)), "got baseline='leave_one_out' with values"),
        (dict(baseline="value", values=torch.zeros(4)), r"the shape of tokens.logprob, \(4, 3\); got \(4,\)"),
        (dict(rewards=torch.zeros(4, 1)), r"rewards must be \(4,\), one per row; got \(4, 1\)"),
        (dict(old_logprob=torch.zeros(4, 2)), r"have the shape of logprob, \(4, 3\); got \(4, 2\)"),
    ],
)
def test_errors_say_what_was_given_and_what_was_expected(options, message):
    batch = RewardedTokens(random_tokens(4, 3), row(0.0), row(0.1), row(0.9), 2)
    given = {name: value for name, value in options.items() if hasattr(batch, name)}
    rest = {name: value for name, value in options.items() if name not in given}
    with pytest.raises(ValueError, match=message):
        coefficients(dataclasses.replace(batch, **given), **rest)


def test_an_unknown_scale_is_an_error():
    with pytest.raises(ValueError, match="expected one of none, group, batch"):
        rescale_rewards(row(0.0), 2, True)


def test_exact_without_the_exact_kl_is_an_error():
    tokens = random_tokens(4, 3)
    tokens = Tokens(tokens.logprob, tokens.ref_logprob, None, tokens.mask)
    with pytest.raises(ValueError, match="estimator='exact' needs tokens.kl"):
        coefficients(RewardedTokens(tokens, row(0.0), row(0.1), row(0.9), 2), estimator="exact")


def test_loss_type_errors():
    mask = torch.ones(1, 1).bool()
    with pytest.raises(ValueError, match="expected one of sequence, grpo, dapo, dr_grpo"):
        loss_weights(mask, "bnpo")
    with pytest.raises(ValueError, match="divides by max_completion_length; got None"):
        loss_weights(mask, "dr_grpo")
    with pytest.raises(ValueError, match="finite sums"):
        MixController().update(NAN, 1.0)
