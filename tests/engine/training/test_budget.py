"""The token budget: training lasts until so many completion tokens are generated, and the schedule runs over them."""

import math
import shutil

import pytest
from engine.training.test_trainer import build_trainer, log_of, settings
from transformers import TrainerCallback

from clp_engine.core.errors import ConfigError
from clp_engine.training.budget import Budget


def tokens_of_steps(log):
    totals = [entry["num_generated_tokens"] for entry in log]
    return [b - a for a, b in zip([0, *totals], totals)]


def test_training_ends_with_the_step_that_reaches_the_budget(tmp_path):
    result = build_trainer(tmp_path, max_generated_tokens=300, max_steps=-1, num_train_epochs=0).train()
    log = log_of(tmp_path)
    totals = [entry["num_generated_tokens"] for entry in log]
    assert totals[-1] >= 300 > totals[-2] and len(log) == result.global_step
    assert result.metrics["num_generated_tokens"] == totals[-1]
    # Rows of a step times their mean length, as logged: prompts and evaluation do not count.
    for entry, tokens in zip(log, tokens_of_steps(log)):
        assert tokens == round(16 * entry["completions/mean_length"])


def test_max_steps_still_ends_a_run_before_the_budget(tmp_path):
    assert build_trainer(tmp_path, max_generated_tokens=10**9, max_steps=2).train().global_step == 2


def test_the_schedule_runs_over_the_share_of_the_budget_used(tmp_path):
    budget = 600
    build_trainer(
        tmp_path,
        max_generated_tokens=budget,
        max_steps=-1,
        lr_scheduler_type="linear",
        warmup_ratio=0.25,
        learning_rate=1e-2,
    ).train()
    log = log_of(tmp_path)
    used = [0, *(entry["num_generated_tokens"] for entry in log)]
    warmup = math.ceil(0.25 * budget)
    for before, entry in zip(used, log):
        share = before / warmup if before < warmup else (budget - before) / (budget - warmup)
        assert entry["learning_rate"] == pytest.approx(1e-2 * share)
    assert len(log) > 3


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2}, {"baseline": "value", "num_generations": 1}])
def test_resuming_is_exact_with_a_token_budget(tmp_path, changes):
    changes = {
        "max_generated_tokens": 500,
        "max_steps": -1,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "save_strategy": "steps",
        "save_steps": 2,
        **changes,
    }
    result = build_trainer(tmp_path / "whole", **changes).train()
    last = f"checkpoint-{result.global_step}"
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    again = build_trainer(tmp_path / "parts", **changes).train(resume_from_checkpoint=True)
    assert (
        again.global_step == result.global_step > 2
        and result.global_step % changes.get("num_iterations", 1) == 0
    )
    for name in ("training.safetensors", "policy/adapters.safetensors"):
        whole, parts = (tmp_path / kind / last / name for kind in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes(), name
    timeless = [
        [{k: v for k, v in e.items() if "time" not in k} for e in log_of(tmp_path / kind)]
        for kind in ("whole", "parts")
    ]
    assert timeless[0] == timeless[1]


def test_callbacks_see_an_estimate_that_never_ends_the_run_early(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((state.global_step, state.max_steps, control.should_training_stop))

    build_trainer(tmp_path, max_generated_tokens=500, max_steps=-1, callbacks=[Watch]).train()
    assert all(most > step and not stop for step, most, stop in seen[:-1])
    assert seen[-1][0] == seen[-1][1] and seen[-1][2]
    assert abs(seen[2][1] - seen[-1][0]) <= 2  # after three steps the estimate is near what it comes to


def test_the_budget_by_itself():
    budget = Budget(None, 100, 40, num_iterations=2)
    assert budget.max_steps(0, 0) == 6 and not budget.spent(0, 0)
    assert (
        not budget.spent(3, 100) and budget.max_steps(3, 100) == 4
    )  # the passes over a batch are not cut in two
    assert budget.spent(4, 100) and budget.max_steps(4, 100) == 4
    assert Budget(3, 100, 40).max_steps(1, 10) == 3 and Budget(3, 100, 40).spent(3, 10)
    assert Budget(7, None, 40).max_steps(2, 5) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_generated_tokens": 0}, "max_generated_tokens=0: expected a whole number, at least 1"),
        ({"max_generated_tokens": 10, "warmup_steps": 3}, "give warmup_ratio, a share of them"),
        ({"max_steps": -1, "num_train_epochs": 0}, "one must be positive"),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, **changes)
