"""Several optimiser steps on one rollout: what they are trained on, and against which log-probs their ratios are."""

import shutil

import pytest
import torch
from engine.training.test_trainer import build_trainer, log_of, settings

from clp_engine.core.errors import ConfigError
from clp_engine.training.collecting import collector
from clp_engine.training.stepping.update import backward, micro_batches


def watched(trainer):
    """What every update was given: (completions, old log-probs), in order."""
    seen, original = [], trainer._update

    def update(batch):
        seen.append((batch.rollout, batch.old_logprob))
        return original(batch)

    trainer._update = update
    return seen


def test_the_first_pass_has_no_ratio_and_the_others_have_the_log_probs_of_sampling(tmp_path):
    trainer = build_trainer(tmp_path, num_iterations=3, max_steps=6)
    seen = watched(trainer)
    trainer.train()
    for start in (0, 3):
        rollouts, old = zip(*seen[start : start + 3])
        assert rollouts[0] is rollouts[1] is rollouts[2] and old[0] is None
        assert torch.equal(old[1], rollouts[0].logprobs) and torch.equal(old[2], rollouts[0].logprobs)
    assert seen[0][0] is not seen[3][0]


def test_a_larger_rollout_serves_several_steps(tmp_path, monkeypatch):
    drawn, original = [], collector.rollout
    monkeypatch.setattr(
        collector, "rollout", lambda *args, **kwargs: drawn.append(original(*args, **kwargs)) or drawn[-1]
    )
    trainer = build_trainer(
        tmp_path,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        steps_per_generation=6,
        num_iterations=2,
        max_steps=12,
    )
    seen = watched(trainer)
    trainer.train()
    assert [d.completion_ids.shape[0] for d in drawn] == [48, 48]
    for step, (part, old) in enumerate(seen):
        whole, third = drawn[step // 6], step % 3
        assert part.token_lists() == whole.token_lists()[16 * third : 16 * (third + 1)]
        assert (old is None) == (step % 6 == 0)
        if old is not None:
            assert torch.equal(old, part.logprobs)
    log = log_of(tmp_path)
    assert ["rewards/low/mean" in e for e in log] == [s % 6 == 0 for s in range(12)]
    clipped = [e["clip_ratio/region_mean"] for e in log]
    assert clipped[0] == clipped[6] == 0 and all(0 <= share <= 1 for share in clipped)
    assert ["sampling/sampling_logp_difference/mean" in e for e in log] == [s % 6 == 0 for s in range(12)]
    assert log[-1]["num_generated_tokens"] == sum(int(d.completion_mask.sum()) for d in drawn)


def test_prompts_are_arranged_by_length_within_each_step_only(tmp_path):
    rows = [{"prompt": " ".join(["w5"] * n)} for n in (9, 2, 7, 4, 1, 8, 3, 6)]
    trainer = build_trainer(
        tmp_path, steps_per_generation=2, shuffle_dataset=False, max_steps=2, num_generations=4
    )
    trainer.train_dataset = trainer._training_prompts(rows)
    seen = watched(trainer)
    trainer.train()
    assert [part.prompt_mask.sum(-1).tolist() for part, _ in seen] == [[2, 4, 7, 9], [1, 3, 6, 8]]


def test_with_a_policy_that_has_not_moved_the_ratio_changes_nothing(tmp_path):
    """The ratio is exp(gap between training and sampling) then, 1 up to rounding."""
    trainer = build_trainer(tmp_path, max_steps=2, alpha=0.3)
    trainer.train()
    batch = trainer.collector.training_batch(trainer.train_dataset, 7, trainer.state)
    gradients = []
    for old in (None, batch.rollout.logprobs):
        batch.old_logprob = old
        for p in trainer.policy.adapter_parameters().values():
            p.grad = None
        for _, part in micro_batches(batch, trainer.objective, trainer.args.micro_batching):
            result = backward(trainer.policy, part, trainer.objective)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.policy.adapter_parameters().values()]))
    assert result.coefficients.clip_low == result.coefficients.clip_high == 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


def test_one_optimiser_step_per_rollout_is_the_default(tmp_path):
    adapters = []
    for steps in (None, 2):
        trainer = build_trainer(
            tmp_path / str(steps),
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            steps_per_generation=steps,
        )
        trainer.train()
        adapters.append(torch.cat([p.flatten() for p in trainer.policy.adapter_parameters().values()]))
    assert torch.equal(*adapters)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps_per_generation": 2},
        {"steps_per_generation": 2, "num_iterations": 2, "kl_estimator": "mixed"},
        {"steps_per_generation": 2, "baseline": "value", "num_generations": 1},
        {"steps_per_generation": 2, "max_generated_tokens": 900, "max_steps": -1},
    ],
    ids=str,
)
def test_resuming_is_exact_and_rollouts_are_not_cut_in_two(tmp_path, changes):
    changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 8, **changes}
    result = build_trainer(tmp_path / "whole", **changes).train()
    cycle = 2 * changes.get("num_iterations", 1)
    saved = sorted(int(p.name.split("-")[1]) for p in (tmp_path / "whole").glob("checkpoint-*"))
    assert saved == list(range(cycle, result.global_step + 1, cycle)) and len(saved) > 1
    first = f"checkpoint-{cycle}"
    shutil.copytree(tmp_path / "whole" / first, tmp_path / "parts" / first)
    build_trainer(tmp_path / "parts", **changes).train(resume_from_checkpoint=True)
    for name in ("training.safetensors", "policy/adapters.safetensors"):
        whole, parts = (tmp_path / k / f"checkpoint-{result.global_step}" / name for k in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes(), name


def test_a_rollout_that_is_no_whole_number_of_steps_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected a multiple of gradient_accumulation_steps = 2"):
        settings(tmp_path, gradient_accumulation_steps=2, steps_per_generation=3)
