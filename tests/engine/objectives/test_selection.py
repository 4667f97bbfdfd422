"""What is trained on: the subset of largest variance, the tokens that say most, and where that leads."""

import dataclasses
import itertools
import json
import math
import shutil

import pytest
import torch
from engine.tasks.test_closed_form import BOUND, THREE_TOKENS, distance, one_thread  # noqa: F401
from engine.training.test_trainer import build_trainer, log_of, settings

from clp_engine.core.errors import ConfigError
from clp_engine.objectives.coefficients import Coefficients, advantages, coefficients
from clp_engine.objectives.selection import largest_in_group, max_variance, scheduled, select_tokens
from clp_engine.training.stepping.update import backward, micro_batches


def best_by_trying_all(values, count):
    return max(
        torch.tensor([values[i] for i in subset]).double().var(unbiased=False).item()
        for subset in itertools.combinations(range(len(values)), count)
    )


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 8])
@pytest.mark.parametrize("kind", ["normal", "ties", "skewed", "far from zero"])
def test_no_subset_has_a_larger_variance(count, kind):
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(20, 8, generator=generator)
    if kind == "ties":
        values = values.round()
    elif kind == "skewed":
        values = values.exp().square()
    elif kind == "far from zero":
        values = values + 1e4
    chosen = max_variance(values, count)
    assert (chosen.diff(dim=1) > 0).all() and chosen.shape == (20, count)
    for row, indices in zip(values, chosen):
        found = row[indices].double().var(unbiased=False).item()
        assert found == pytest.approx(best_by_trying_all(row.tolist(), count), rel=1e-6, abs=1e-9)


def test_a_completion_without_an_advantage_is_chosen_last():
    nan = math.nan
    values = torch.tensor(
        [
            [nan, 1.0, nan, 5.0, 2.0, nan],
            [nan, 1.0, nan, nan, 2.0, nan],
            [nan] * 6,
            [3.0, nan, 1.0, 2.0, 9.0, 9.0],
        ]
    )
    chosen = max_variance(values, 3)
    assert chosen[0].tolist() == [1, 3, 4]
    assert {1, 4} < set(chosen[1].tolist()) and len(set(chosen[2].tolist())) == 3
    assert best_by_trying_all([3.0, 1.0, 2.0, 9.0, 9.0], 3) == pytest.approx(
        values[3][chosen[3]].double().var(unbiased=False).item()
    )
    assert not values[3][chosen[3]].isnan().any()


def test_the_largest_of_each_group_are_kept_whatever_else_is_there():
    generator = torch.Generator().manual_seed(0)
    groups = torch.tensor([0, 2, 0, 1, 2, 2])
    scores = torch.rand(6, 5, generator=generator)
    candidates = torch.rand(6, 5, generator=generator) > 0.3
    for share in (0.1, 0.34, 0.5, 1.0):
        kept = largest_in_group(scores, candidates, groups, share)
        assert not (kept & ~candidates).any()
        for g in range(3):
            inside = candidates & (groups == g).unsqueeze(-1)
            wanted = sorted(scores[inside].tolist(), reverse=True)[
                : math.ceil(share * int(inside.sum()) - 1e-9)
            ]
            assert sorted(scores[kept & inside].tolist(), reverse=True) == wanted
        alone = largest_in_group(scores[groups == 2], candidates[groups == 2], torch.zeros(3).long(), share)
        assert torch.equal(alone, kept[groups == 2])
    thirty = torch.ones(1, 30, dtype=torch.bool)
    assert largest_in_group(torch.zeros(1, 30), thirty, torch.zeros(1).long(), 0.1).sum() == 3
    none = torch.zeros(2, 3, dtype=torch.bool)
    assert not largest_in_group(torch.zeros(2, 3), none, torch.tensor([0, 1]), 0.5).any()


def test_a_token_is_worth_its_advantage_times_its_entropy():
    c = Coefficients(torch.ones(2, 3), -torch.ones(2, 3), torch.tensor([-3.0, 1.0]))
    entropy = torch.tensor([[0.1, 1.0, 0.5], [0.2, 2.0, 1.8]])
    everything = torch.ones(2, 3, dtype=torch.bool)
    kept = select_tokens(c, entropy, everything, torch.zeros(2).long(), 0.5)
    expected = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 1.0]])  # 0.3, 3, 1.5 and 0.2, 2, 1.8
    assert torch.equal(kept.logprob, expected) and torch.equal(kept.kl, -expected)
    by_token = dataclasses.replace(c, advantage=torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.1, 0.1]]))
    kept = select_tokens(by_token, entropy, everything, torch.zeros(2).long(), 1 / 3)
    assert torch.equal(kept.logprob, torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))


def test_the_schedule_ends_with_everything():
    assert [scheduled(0.2, "linear", p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.2, 0.6, 1.0])
    assert scheduled(0.2, "constant", 0.9) == 0.2
    with pytest.raises(ValueError, match="selection_schedule='cosine': expected one of constant, linear"):
        scheduled(0.2, "cosine", 0.5)


# -- in a step ---------------------------------------------------------------------------------------------------------


def trained_a_little(tmp_path, **changes):
    """A trainer whose policy is away from the reference, and a new batch of its."""
    trainer = build_trainer(tmp_path, **{"max_steps": 2, "num_generations": 8, **changes})
    trainer.train()
    return trainer, trainer.collector.training_batch(trainer.train_dataset, 7, trainer.state)


def gradient(trainer, batches):
    parameters = list(trainer.policy.adapter_parameters().values())
    for p in parameters:
        p.grad = None
    for batch in batches:
        backward(trainer.policy, batch, trainer.objective)
    return torch.cat([p.grad.flatten() for p in parameters])


@pytest.mark.parametrize("estimator, baseline", [("return", "leave_one_out"), ("k3", "group_mean")])
def test_the_gradient_is_that_of_the_chosen_rows_with_the_advantages_of_whole_groups(
    tmp_path, estimator, baseline
):
    trainer, whole = trained_a_little(
        tmp_path,
        rollout_selection="max_variance",
        selected_rollouts=3,
        kl_estimator=estimator,
        baseline=baseline,
        scale_rewards="group",
        alpha=0.3,
    )
    chosen = trainer.selector.selected(whole, 0.0)
    assert chosen.rollout.completion_ids.shape[0] == 6 and chosen.rollout.group == 3
    measured = gradient(
        trainer, [batch for _, batch in micro_batches(chosen, trainer.objective, trainer.args.micro_batching)]
    )

    # The same by zeroing the weights of the rows that variance over the returns leaves out.
    ((_, everything),) = micro_batches(whole, trainer.objective, trainer.args.micro_batching)
    returns = whole.scalar / (whole.scalar.view(2, 8).std(1).repeat_interleave(8) + 1e-4) * 0.7
    if estimator == "return":
        rows = torch.zeros(16, dtype=torch.bool)
        from clp_engine.rollouts.scoring import score

        stats = score(trainer.policy, whole.rollout, whole.conditions, outputs=("logprob", "ref_logprob"))
        returns = returns - 0.3 * (stats.logprob - stats.ref_logprob).sum(-1)
    rows = torch.zeros(2, 8)
    rows.scatter_(1, max_variance(returns.view(2, 8), 3), 1.0)
    weights = everything.weights * rows.view(-1, 1) * (16 / 6)
    expected = gradient(trainer, [dataclasses.replace(everything, weights=weights)])
    torch.testing.assert_close(measured, expected, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(measured, gradient(trainer, [everything]), rtol=0.1)


def test_rows_that_are_not_chosen_never_run_through_the_policy(tmp_path, monkeypatch):
    trainer = build_trainer(
        tmp_path,
        num_generations=8,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        max_steps=1,
        rollout_selection="max_variance",
        selected_rollouts=0.25,
    )
    rows, original = {"policy": 0, "reference": 0}, trainer.policy.completion_hidden

    def completion_hidden(batch, conditions, mask=None):
        rows["reference" if conditions is None else "policy"] += batch.completion_ids.shape[0]
        return original(batch, conditions, mask)

    monkeypatch.setattr(trainer.policy, "completion_hidden", completion_hidden)
    trainer.train()
    assert rows == {"policy": 8, "reference": 32}
    (entry,) = log_of(tmp_path)
    assert entry["selection/rollouts"] == 0.25
    # What was generated and rewarded is all of it.
    assert entry["completions/max_length"] * 32 >= entry["num_generated_tokens"] > 32


def test_truncated_completions_that_are_masked_are_not_chosen(tmp_path):
    trainer, whole = trained_a_little(
        tmp_path,
        rollout_selection="max_variance",
        selected_rollouts=4,
        mask_truncated_completions=True,
        max_completion_length=20,
    )
    ended = whole.rollout.terminated.view(2, 8).sum(1)
    assert 0 < int(ended.min()) and int(ended.max()) < 8
    chosen = trainer.selector.selected(whole, 0.0).rollout.terminated.view(2, 4).sum(1)
    assert torch.equal(chosen, ended.clamp_max(4))


@pytest.mark.parametrize("split", [{"per_device_train_batch_size": 32}, {"per_device_train_batch_size": 8}])
def test_the_tokens_that_are_kept_do_not_depend_on_the_micro_batches(tmp_path, split):
    split["gradient_accumulation_steps"] = 32 // split["per_device_train_batch_size"]
    chosen = {"token_selection": "advantage_entropy", "selected_tokens": 0.4}
    trainer, whole = trained_a_little(tmp_path, num_generations=8, alpha=0.3, **split, **chosen)
    whole = trainer.selector.selected(whole, 0.0)
    assert whole.token_share == 0.4

    def whole_gradient():
        cut = micro_batches(whole, trainer.objective, trainer.args.micro_batching)
        return gradient(trainer, [batch for _, batch in cut])

    measured = whole_gradient()
    trainer.args.per_device_train_batch_size = 16
    torch.testing.assert_close(measured, whole_gradient(), rtol=1e-3, atol=1e-6)
    whole.token_share = 1.0
    everything = whole_gradient()
    assert not torch.allclose(measured, everything, rtol=0.05)


BOTH = {
    "num_generations": 8,
    "rollout_selection": "max_variance",
    "selected_rollouts": 0.25,
    "token_selection": "advantage_entropy",
    "selected_tokens": 0.3,
    "selection_schedule": "linear",
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kl_estimator": "k3", "loss_type": "dapo"},
        {"baseline": "none", "num_iterations": 2},
        {"steps_per_generation": 2},
        {"mask_truncated_completions": True, "scale_rewards": "batch"},
        {"partial_rollouts": True, "max_completion_length_per_step": 4},
        {"conditioning": "logit"},
    ],
    ids=str,
)
def test_selections_train_and_relax_on_the_way(tmp_path, changes):
    trainer = build_trainer(tmp_path, **BOTH, **changes)
    before = {n: p.clone() for n, p in trainer.policy.adapter_parameters().items()}
    trainer.train()
    assert any(not torch.equal(before[n], p) for n, p in trainer.policy.adapter_parameters().items())
    log = log_of(tmp_path)
    assert all(math.isfinite(v) for entry in log for v in entry.values())
    tokens = [entry["selection/tokens"] for entry in log if "selection/tokens" in entry]
    steps = [entry["step"] - 1 for entry in log if "selection/tokens" in entry]
    assert tokens == pytest.approx([0.3 + 0.7 * s / 4 for s in steps])
    rollouts = [entry["selection/rollouts"] for entry in log if "selection/rollouts" in entry]
    assert rollouts == sorted(rollouts) and rollouts[0] == 0.25 < rollouts[-1]


def test_resuming_is_exact_with_a_schedule(tmp_path):
    changes = {**BOTH, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    build_trainer(tmp_path / "whole", **changes).train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    build_trainer(tmp_path / "parts", **changes).train(resume_from_checkpoint=True)
    for name in ("training.safetensors", "policy/adapters.safetensors"):
        whole, parts = (tmp_path / kind / "checkpoint-6" / name for kind in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes(), name
    config = json.loads((tmp_path / "parts" / "checkpoint-6" / "trainer_state.json").read_text())["config"]
    assert (config["selected_rollouts"], config["selected_tokens"]) == (0.25, 0.3)


# -- where it leads ----------------------------------------------------------------------------------------------------


def of_chosen_rollouts(batch, **options):
    """Two of every four completions, the mean over them."""
    options.pop("mix")
    found = advantages(batch, **options).view(-1, batch.group_size)
    rows = torch.zeros(found.shape).scatter_(1, max_variance(found, batch.group_size // 2), 2.0)
    c = coefficients(batch, **options)
    return dataclasses.replace(c, logprob=c.logprob * rows.view(-1, 1))


def of_chosen_tokens(batch, **options):
    """Half the tokens of every group; the entropy's place is taken by -log p, which it is the mean of."""
    c = coefficients(batch, **options)
    groups = torch.arange(len(batch.rewards)) // batch.group_size
    return select_tokens(c, -batch.tokens.logprob.detach(), batch.tokens.mask, groups, 0.5)


@pytest.mark.check
@pytest.mark.parametrize("choose", [of_chosen_rollouts, of_chosen_tokens])
@pytest.mark.parametrize("weights, alpha", THREE_TOKENS)
def test_with_the_return_estimator_selections_still_reach_the_optimum(weights, alpha, choose):
    """Biased on the way, but at the optimum every advantage is zero, whatever is chosen."""
    assert distance(weights, alpha, "return", estimate=choose) < BOUND


@pytest.mark.check
def test_with_the_exact_kl_a_selection_of_tokens_stops_elsewhere():
    assert distance(*THREE_TOKENS[0], "exact", estimate=of_chosen_tokens) > 2 * BOUND


def test_the_advantages_of_sampling_are_those_of_training(tmp_path):
    trainer, whole = trained_a_little(
        tmp_path, rollout_selection="max_variance", selected_rollouts=4, alpha=0.4
    )
    chosen = trainer.selector.selected(whole, 0.0)
    ((_, batch),) = micro_batches(whole, trainer.objective, trainer.args.micro_batching)
    from clp_engine.training.stepping.update import forward

    scored = forward(trainer.policy, batch, trainer.objective)
    expected = trainer.objective.coefficients(scored.rewarded, "return", "leave_one_out").advantage
    rows = [
        i for i, tokens in enumerate(whole.rollout.token_lists()) if tokens in chosen.rollout.token_lists()
    ]
    assert len(rows) >= 8
    for value, tokens in zip(chosen.advantage.tolist(), chosen.rollout.token_lists()):
        i = whole.rollout.token_lists().index(tokens)
        assert value == pytest.approx(expected[i].item(), abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rollout_selection": "max_variance"},
            "rollout_selection='max_variance' and selected_rollouts=None",
        ),
        ({"selected_rollouts": 2}, "rollout_selection='none' and selected_rollouts=2: give both or neither"),
        ({"rollout_selection": "best", "selected_rollouts": 2}, "expected one of none, max_variance"),
        (
            {"rollout_selection": "max_variance", "selected_rollouts": 1},
            "a single completion has no variance",
        ),
        ({"rollout_selection": "max_variance", "selected_rollouts": 5}, "expected 2 to num_generations = 4"),
        (
            {"rollout_selection": "max_variance", "selected_rollouts": 1.5},
            "expected a share, above 0 and at most",
        ),
        (
            {"token_selection": "advantage_entropy", "selected_tokens": 0.0},
            "expected a number above 0 and up to 1",
        ),
        ({"token_selection": "advantage_entropy"}, "selected_tokens=None: give both or neither"),
        ({"selection_schedule": "linear"}, "selection_schedule='linear': nothing is selected"),
        (
            {"rollout_selection": "max_variance", "selected_rollouts": 2, "kl_estimator": "exact"},
            "needs the advantage before the policy's pass",
        ),
        (
            {"rollout_selection": "max_variance", "selected_rollouts": 2, "baseline": "value"},
            "needs the advantage before the policy's pass",
        ),
        (
            {
                "rollout_selection": "max_variance",
                "selected_rollouts": 0.5,
                "num_generations": 1,
                "baseline": "none",
            },
            "chooses within a group",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, **changes)


@pytest.mark.parametrize("given, expected", [("0.5", 0.5), (3, 3), (0.5, 0.5)])
def test_a_count_and_a_share_are_told_apart(tmp_path, given, expected):
    config = settings(tmp_path, rollout_selection="max_variance", selected_rollouts=given)
    assert config.selected_rollouts == expected and type(config.selected_rollouts) is type(expected)
    assert config.rollout_share == (0.75 if expected == 3 else 0.5)
