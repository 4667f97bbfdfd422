"""The value baseline: it knows the prefix and the condition, nothing of the token; it is fitted, saved and resumed."""

import json

import pytest
import torch
from engine.conftest import build_policy
from engine.training.test_trainer import ROWS, build_trainer, high_words, log_of, low_words

from clp_engine.core.conditions import Conditions
from clp_engine.core.errors import ConfigError
from clp_engine.objectives.coefficients import objective_scales
from clp_engine.objectives.policy_gradient import LossSettings, PolicyGradient
from clp_engine.objectives.value_head import ValueHead, explained_variance
from clp_engine.rollouts.types import Rollout
from clp_engine.training.checkpoints import checkpoint
from clp_engine.training.stepping.update import MicroBatch, forward


def spoken(head: ValueHead) -> ValueHead:
    """A head that says something: its output layer starts at zero."""
    with torch.no_grad():
        head.output.weight.normal_(0, 1.0, generator=torch.Generator().manual_seed(2))
        head.observe(torch.tensor([1.0, 3.0]))
    return head


def values_of(policy, head, completions, weights=(0.3, 0.7), kl=0.2):
    """V at each token of completions (B, T) of one prompt."""
    rows, width = completions.shape
    drawn = Rollout(
        torch.tensor([[5, 6, 7]]),
        torch.ones(1, 3, dtype=torch.bool),
        completions,
        torch.ones(rows, width, dtype=torch.bool),
        torch.zeros(rows, width),
        torch.ones(rows, dtype=torch.bool),
    )
    condition = Conditions(torch.tensor([weights]), torch.tensor([kl]))
    batch = MicroBatch(drawn, condition, torch.zeros(rows), torch.ones(rows, width))
    with torch.no_grad():
        return forward(policy, batch, PolicyGradient(LossSettings(baseline="value"), head)).values


def test_the_value_of_a_token_depends_on_what_lies_before_it_and_on_the_condition_alone():
    policy, head = build_policy(), spoken(ValueHead(32, 2))
    first = torch.tensor([[9, 12, 15, 20, 2]])
    for t in range(5):
        other = first.clone()
        other[0, t:] = torch.tensor([31, 32, 33, 34, 35])[t:]
        one, two = values_of(policy, head, torch.cat([first, other]))
        torch.testing.assert_close(one[: t + 1], two[: t + 1])  # token t itself changed
        assert t == 4 or (one[t + 1 :] - two[t + 1 :]).abs().max() > 1e-3
    whole = values_of(policy, head, first)
    assert (values_of(policy, head, first, weights=(0.7, 0.3)) - whole).abs().max() > 1e-3
    assert (values_of(policy, head, first, kl=0.6) - whole).abs().max() > 1e-3


def test_the_head_is_told_the_condition_where_the_hidden_states_do_not_know_it():
    head, hidden = spoken(ValueHead(8, 2)), torch.randn(1, 8)
    scale, coef = objective_scales(torch.tensor([0.1, 0.5]))
    features = head.features(torch.tensor([[0.5, 0.5], [0.5, 0.5]]), scale, coef)
    at_low, at_high = head(hidden.expand(2, -1), features)
    assert (at_low - at_high).abs() > 1e-3


def test_a_fitted_head_explains_what_the_hidden_state_tells():
    torch.manual_seed(0)
    head, hidden = ValueHead(16, 1), torch.randn(512, 16)
    features = head.features(torch.ones(512, 1), torch.ones(512), torch.zeros(512))
    returns = 100 + 20 * torch.nn.functional.rms_norm(hidden, (16,))[:, 0]
    assert (head(hidden, features) == 0).all()
    head.observe(returns)
    # Before the first fit it is the mean of the returns before, whatever their size.
    torch.testing.assert_close(head(hidden, features), returns.mean().expand(512))
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        (head.loss(head(hidden, features), returns) / 512).backward()
        optimizer.step()
    assert explained_variance(head(hidden, features), returns) > 0.95
    assert explained_variance(returns.mean().expand(512), returns) == pytest.approx(0, abs=1e-6)


def test_equal_returns_leave_the_spread_at_1():
    head = ValueHead(4, 1)
    head.observe(torch.full((7,), 0.1))
    assert head.location == pytest.approx(0.1) and head.spread == 1.0


@pytest.mark.parametrize("estimator", ["return", "exact", "mixed", "k3"])
@pytest.mark.parametrize("generations", [1, 4])
def test_it_trains_with_one_completion_per_prompt_and_with_several(tmp_path, estimator, generations):
    trainer = build_trainer(
        tmp_path, baseline="value", num_generations=generations, kl_estimator=estimator, max_steps=3
    )
    before = {n: p.clone() for n, p in trainer.policy.adapter_parameters().items()}
    trainer.train()
    assert any(not torch.equal(before[n], p) for n, p in trainer.policy.adapter_parameters().items())
    log = log_of(tmp_path)
    assert all(entry["value_loss"] > 0 and "explained_variance" in entry for entry in log)
    assert trainer.objective.value_head.output.weight.abs().max() > 0
    saved = {p.name for p in (tmp_path / "policy").iterdir()}
    assert not any("value" in name or "training" in name for name in saved)


def test_a_step_uses_the_values_from_before_its_own_update_and_they_do_not_move_the_policy(tmp_path):
    """A new head says 0 everywhere, so the first step is that of no baseline, however fast the head learns."""
    adapters = []
    for name, changes in {
        "none": {"baseline": "none"},
        "slow": {"baseline": "value"},
        "fast": {"baseline": "value", "value_learning_rate": 1.0},
    }.items():
        trainer = build_trainer(tmp_path / name, max_steps=1, gradient_accumulation_steps=2, **changes)
        trainer.train()
        adapters.append(torch.cat([p.flatten() for p in trainer.policy.adapter_parameters().values()]))
    assert torch.equal(adapters[0], adapters[1]) and torch.equal(adapters[1], adapters[2])


def test_values_of_the_first_pass_serve_the_passes_after_it(tmp_path):
    trainer = build_trainer(
        tmp_path, baseline="value", num_iterations=2, max_steps=2, value_learning_rate=1.0, epsilon=1e9
    )
    trainer.train()
    generation = trainer._batch
    assert (generation.values == 0).all()  # those of the new head, though it has been fitted twice since
    assert trainer.objective.value_head.output.weight.abs().max() > 0


def test_training_fits_the_head_to_what_the_prompt_tells(tmp_path):
    def by_prompt(prompts, **_):
        return [float(int(p.split()[0][1:]) % 3) for p in prompts]

    trainer = build_trainer(
        tmp_path,
        rewards={"r": by_prompt},
        baseline="value",
        num_generations=1,
        max_steps=60,
        max_completion_length=1,  # the hidden state of a small random model soon forgets the prompt
        value_learning_rate=1e-2,
        alpha=0.01,
    )
    trainer.train()
    explained = [entry["explained_variance"] for entry in log_of(tmp_path)]
    assert sum(explained[-5:]) / 5 > 0.9, explained


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2, "kl_estimator": "mixed"}])
def test_resuming_is_exact_with_a_value_head(tmp_path, changes):
    changes = {"baseline": "value", "save_strategy": "steps", "save_steps": 2, "max_steps": 6, **changes}
    build_trainer(tmp_path / "whole", **changes).train()
    build_trainer(tmp_path / "parts", **changes).train()
    for step in (4, 6):
        for file in sorted((tmp_path / "parts" / f"checkpoint-{step}").rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        (tmp_path / "parts" / f"checkpoint-{step}").rmdir()
    build_trainer(tmp_path / "parts", **changes).train(resume_from_checkpoint=True)
    for name in ("training.safetensors", "policy/adapters.safetensors"):
        whole, parts = (tmp_path / kind / "checkpoint-6" / name for kind in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes(), name


def test_a_checkpoint_from_before_there_was_a_value_head_resumes(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    build_trainer(tmp_path, **changes).train()
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    for name in (
        "value_learning_rate",
        "max_generated_tokens",
        "alpha_grid",
        "beta_grid",
        "stratified_weights",
    ):
        del state["config"][name]
    del state["num_generated_tokens"], state["reference"]
    path.write_text(json.dumps(state))
    changes["max_steps"] = 2
    assert build_trainer(tmp_path, **changes).train(resume_from_checkpoint=True).global_step == 2
    with pytest.raises(ConfigError, match="other settings for baseline"):
        build_trainer(tmp_path, baseline="value", **changes).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="other settings for max_generated_tokens"):
        build_trainer(tmp_path, max_generated_tokens=9, **changes).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="holds no value.hidden.bias, a part of the objective's state"):
        checkpoint.load_objective(tmp_path / "checkpoint-2", PolicyGradient(value_head=ValueHead(32, 2)))


def test_an_optimiser_of_ones_own_takes_the_head_in_and_a_schedule_of_ones_own_is_refused(tmp_path):
    from engine.training.test_trainer import settings

    from clp_engine.training.trainer import CLPTrainer

    def build(with_schedule):
        policy = build_policy(objectives=("low", "high"), trained=False)
        optimizer = torch.optim.SGD(policy.adapter_parameters().values(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0) if with_schedule else None
        rewards = {"low": low_words, "high": high_words}
        return CLPTrainer(
            policy, rewards, settings(tmp_path, baseline="value"), ROWS, optimizers=(optimizer, schedule)
        )

    trainer = build(False)
    trainer.train()
    assert trainer.objective.value_head.output.weight.abs().max() > 0
    with pytest.raises(ConfigError, match="a scheduler of your own knows nothing of the value head"):
        build(True).train()
