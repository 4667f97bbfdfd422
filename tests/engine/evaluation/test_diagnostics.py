"""Noise and bias of the gradient: the formulas against an enumerable policy, and what is measured on a small model."""

import dataclasses
from itertools import product

import pytest
import torch
from engine.objectives.test_estimators import Enumerated
from engine.training.test_trainer import build_trainer

from clp_engine.core.errors import ConfigError
from clp_engine.evaluation.gradient_noise import gradient_noise, gradients_of, measure, variants_of
from clp_engine.objectives.coefficients import RewardedTokens, Tokens, coefficients, returns_to_go

ALPHA = 0.4


def gradients_of_groups(policy: Enumerated, estimator: str, size: int = 2):
    """(groups, P) gradients of every group of completions, and the probability of each."""
    each = policy.tokens()
    jacobian = {
        name: torch.stack(
            [
                torch.autograd.grad(v, policy.logits, retain_graph=True)[0]
                for v in getattr(each, name).flatten()
            ]
        ).view(7, 2, -1)
        for name in ("logprob", "kl")
    }
    groups = torch.tensor(list(product(range(7), repeat=size)))
    rows = groups.flatten()
    tokens = Tokens(*(v[rows].detach() for v in (each.logprob, each.ref_logprob, each.kl, each.mask)))
    kl = torch.full((len(rows),), ALPHA, dtype=torch.float64)
    c = coefficients(RewardedTokens(tokens, policy.rewards[rows], kl, 1 - kl, size), estimator=estimator)
    g = (c.logprob.unsqueeze(-1) * jacobian["logprob"][rows]).sum(1)
    if c.kl is not None:
        g = g + (c.kl.unsqueeze(-1) * jacobian["kl"][rows]).sum(1)
    probability = (each.logprob.detach() * each.mask).sum(-1).exp()[groups].prod(-1)
    return g.view(len(groups), size, -1).mean(1), probability


@pytest.mark.check
def test_variance_norm_and_bias_are_those_of_an_enumerable_policy():
    policy, estimators = Enumerated.random(3), ("return", "exact", "k2", "k3")
    every = {name: gradients_of_groups(policy, name) for name in estimators}
    probability = every["return"][1]
    truth = policy.gradient(1 - ALPHA, ALPHA).flatten()
    drawn = torch.multinomial(probability, 3000, replacement=True, generator=torch.Generator().manual_seed(0))
    noise = gradient_noise({(n, "leave_one_out"): g[drawn] for n, (g, _) in every.items()}, bootstrap=100)
    for measured in noise:
        g = every[measured.estimator][0]
        mean = probability @ g
        variance = probability @ (g - mean).square().sum(-1)
        bias = (mean - truth).norm().item()
        assert measured.variance.mean == pytest.approx(variance.item(), rel=0.1)
        assert measured.norm.mean == pytest.approx(mean.norm().item(), rel=0.1)
        if measured.estimator in ("return", "exact"):
            assert bias < 1e-10 and measured.bias.low == 0
        else:
            assert measured.bias.low > 0 and measured.bias.mean == pytest.approx(bias, rel=0.15)
    # 200 of 3000 batches: the intervals are those of a mean over batches, and cover what is true.
    few = gradient_noise({(n, "leave_one_out"): g[drawn[:200]] for n, (g, _) in every.items()}, bootstrap=500)
    for measured, many in zip(few, noise):
        assert measured.variance.low < many.variance.mean < measured.variance.high
        assert measured.bias.low <= many.bias.mean + 1e-3 and many.bias.mean <= measured.bias.high + 1e-3


def test_the_mean_over_pairs_is_the_unbiased_sample_variance():
    g = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    (first, second) = gradient_noise({("return", "none"): g, ("k2", "none"): 2 * g}, bootstrap=20)
    assert first.variance.mean == pytest.approx(g.var(0).sum().item(), rel=1e-5)
    assert second.relative.mean == second.relative.low == pytest.approx(4.0)
    with pytest.raises(ValueError, match="at least 3"):
        gradient_noise({("return", "none"): g[:2]})
    with pytest.raises(ValueError, match="measured against return and exact"):
        gradient_noise({("k3", "none"): g})


@pytest.mark.parametrize("estimator", ["return", "exact", "mixed", "k3"])
@pytest.mark.parametrize("baseline", ["leave_one_out", "group_mean", "none", "value"])
def test_what_is_measured_is_the_gradient_that_training_takes(tmp_path, estimator, baseline):
    trainer = build_trainer(
        tmp_path,
        baseline="value",
        alpha=0.3,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_steps=2,
    )
    trainer.train()  # away from the reference
    trainer.objective.settings = dataclasses.replace(
        trainer.objective.settings, kl_estimator=estimator, baseline=baseline
    )
    generation = trainer.collector.training_batch(trainer.train_dataset, 7, trainer.state)
    (measured,) = gradients_of(trainer, generation, [(estimator, baseline)])
    taken = []
    trainer.optimizer.step = lambda: taken.extend(p.grad.flatten().clone() for p in parameters)
    parameters = list(trainer.policy.adapter_parameters().values())
    trainer.args.max_grad_norm = 0
    trainer._update(generation)
    torch.testing.assert_close(measured, torch.cat(taken), rtol=1e-4, atol=1e-6)


@pytest.mark.check
def test_a_value_baseline_is_unbiased_on_a_model_and_one_that_knows_the_return_is_not(tmp_path, monkeypatch):
    """60 batches: with the value head, whatever it says, the mean gradient is that of leave-one-out within the noise."""
    from clp_engine.training.stepping import update

    trainer = build_trainer(tmp_path, baseline="value", alpha=0.3, max_steps=2, max_completion_length=4)
    trainer.train()
    with torch.no_grad():
        trainer.objective.value_head.output.weight.normal_(
            0, 0.02, generator=torch.Generator().manual_seed(0)
        )
    variants = [("return", "leave_one_out"), ("return", "value")]
    fair = measure(trainer, variants, batches=60, bootstrap=200)
    assert fair[1].bias.low == 0 and fair[0].bias.mean == 0
    assert fair[1].bias.high < 0.5 * fair[0].norm.mean  # small enough to see a bias

    original = update.forward

    def foreseeing(*given):
        scored = original(*given)
        scored.values.copy_(returns_to_go(scored.rewarded))
        return scored

    monkeypatch.setattr("clp_engine.evaluation.gradient_noise.forward", foreseeing)
    unfair = measure(trainer, variants, batches=60, bootstrap=200)
    assert unfair[1].bias.low > fair[1].bias.high


def test_measuring_leaves_the_trainer_as_it_was_and_refuses_what_the_run_lacks(tmp_path):
    trainer = build_trainer(tmp_path)
    before = {n: p.clone() for n, p in trainer.policy.adapter_parameters().items()}
    assert len(variants_of(trainer)) == 5 * 3
    noise = measure(trainer, [("return", "none"), ("exact", "none")], batches=3, bootstrap=10)
    assert noise[0].relative.mean == 1 and not list(tmp_path.iterdir())
    assert all(
        torch.equal(before[n], p) and p.grad is None for n, p in trainer.policy.adapter_parameters().items()
    )
    with pytest.raises(ConfigError, match="measured with leave_one_out, group_mean, none"):
        variants_of(trainer, baselines=["value"])
    with pytest.raises(ConfigError, match="batches=2"):
        measure(trainer, batches=2)
    alone = build_trainer(tmp_path, num_generations=1, baseline="none")
    assert {b for _, b in variants_of(alone)} == {"none"}
