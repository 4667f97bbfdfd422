"""What callbacks and scripts for transformers' Trainer find here: events, flags, attributes, reasons for what is absent."""

import json

import pytest
from engine.conftest import build_model, build_tokenizer
from engine.training.test_trainer import ROWS, build_trainer, high_words, log_of, low_words, settings
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback

from clp_engine.core.errors import ConfigError
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.training.checkpoints import best
from clp_engine.training.trainer import CLPTrainer
from clp_engine.training.trl_compat.surface import ABSENT


class At(TrainerCallback):
    """Sets flags of the control at an event of a step."""

    def __init__(self, event, step, **flags):
        self.step, self.flags = step, flags
        setattr(self, event, self._set)

    def _set(self, args, state, control, **_):
        if state.global_step == self.step:
            for name, value in self.flags.items():
                setattr(control, name, value)


def events_of(trainer):
    """Names of the events from here on, as they come."""
    heard, original = [], trainer.callback_handler.call_event
    trainer.callback_handler.call_event = lambda event, *a, **k: (
        heard.append(event),
        original(event, *a, **k),
    )[1]
    return heard


def test_flags_are_heeded_whatever_the_settings_say(tmp_path):
    trainer = build_trainer(
        tmp_path,
        max_steps=5,
        logging_steps=100,
        eval_dataset=ROWS[:2],
        callbacks=[
            At("on_step_end", 1, should_log=True),
            At("on_step_end", 2, should_save=True),
            At("on_step_end", 3, should_evaluate=True),
            At("on_optimizer_step", 3, should_training_stop=True),
        ],
    )
    assert trainer.train().global_step == 4
    entries = log_of(tmp_path)
    assert [e["step"] for e in entries if "reward" in e] == [1]
    assert [e["step"] for e in entries if "eval_reward" in e] == [3]
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_flag_that_cannot_be_heeded_is_refused(tmp_path):
    trainer = build_trainer(tmp_path, callbacks=[At("on_step_end", 1, should_epoch_stop=True)])
    with pytest.raises(ConfigError, match="ends with should_training_stop alone"):
        trainer.train()


def test_epochs_begin_and_end_once_each_also_where_a_run_is_resumed(tmp_path):
    """4 prompts a step, 12 rows."""
    changes = {"max_steps": 5, "save_strategy": "steps", "save_steps": 4}
    trainer = build_trainer(tmp_path / "whole", **changes)
    heard = events_of(trainer)
    trainer.train()
    epochs = [event for event in heard if event in ("on_epoch_begin", "on_epoch_end", "on_step_end")]
    begin, step, end = "on_epoch_begin", "on_step_end", "on_epoch_end"
    assert epochs == [begin, step, step, step, end, begin, step, step, end]
    resumed = build_trainer(tmp_path / "resumed", **changes)
    heard = events_of(resumed)
    resumed.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-4")
    assert [event for event in heard if event in (begin, step, end)] == [begin, step, end]
    assert heard[-2:] == ["on_log", "on_train_end"] and resumed.state.log_history[-1]["train_runtime"] >= 0


def test_a_micro_batch_but_the_last_ends_a_substep(tmp_path):
    trainer = build_trainer(
        tmp_path, max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=4
    )
    heard = events_of(trainer)
    trainer.train()
    begin, end = heard.index("on_step_begin"), heard.index("on_step_end")
    assert heard[begin : end + 1] == [
        "on_step_begin",
        *["on_substep_end"] * 3,
        "on_pre_optimizer_step",
        "on_optimizer_step",
        "on_step_end",
    ]


def test_early_stopping_stops_and_the_best_policy_is_the_one_that_remains(tmp_path):
    kept = {}

    def scored(completions, trainer_state, log_metric, **_):
        log_metric("score", {2: 0.5, 3: 0.4, 4: 0.3}.get(trainer_state.global_step, 0.1))
        return low_words(completions)

    class Keep(TrainerCallback):
        def on_evaluate(self, args, state, control, **_):
            adapters = trainer.policy.adapter_parameters()
            kept[state.global_step] = {name: p.detach().clone() for name, p in adapters.items()}

    trainer = build_trainer(
        tmp_path,
        rewards=[scored],
        eval_dataset=ROWS[:2],
        callbacks=[Keep(), EarlyStoppingCallback(early_stopping_patience=2)],
        max_steps=8,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="score",
        load_best_model_at_end=True,
    )
    trainer.train()
    state = trainer.state
    assert (state.global_step, state.best_metric, state.best_global_step) == (4, 0.5, 2)
    written = ConditionedPolicy.load(tmp_path / "policy", base_model=build_model("qwen2"))
    for policy in (trainer.policy, written):
        assert all(p.equal(kept[2][name]) for name, p in policy.adapter_parameters().items())
    assert any(not p.equal(kept[2][name]) for name, p in kept[4].items())


def test_patience_goes_on_in_a_resumed_run(tmp_path):
    """greater_is_better=False and a reward that is never below the first one's: no later evaluation is better."""
    changes = {
        "max_steps": 9,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "eval_constant",
        "greater_is_better": False,
        "save_strategy": "steps",
        "save_steps": 2,
    }

    def constant(completions, log_metric, **_):
        log_metric("constant", 1.0)
        return low_words(completions)

    def trainer(name):
        return build_trainer(
            tmp_path / name,
            rewards=[constant],
            eval_dataset=ROWS[:2],
            callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
            **changes,
        )

    assert trainer("whole").train().global_step == 4
    resumed = trainer("resumed").train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2")
    assert resumed.global_step == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_best_model_at_end": True}, "give a metric of evaluate"),
        ({"load_best_model_at_end": True, "metric_for_best_model": "reward"}, "eval_strategy='no'"),
    ],
)
def test_a_best_model_needs_a_metric_and_evaluations(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, **changes)


def test_more_of_a_metric_is_better_unless_it_is_a_loss(tmp_path):
    assert settings(tmp_path, metric_for_best_model="reward").greater_is_better is True
    assert settings(tmp_path, metric_for_best_model="value_loss").greater_is_better is False
    assert settings(tmp_path).greater_is_better is None


def test_a_metric_that_no_evaluation_has_is_named_beside_those_there_are(tmp_path):
    trainer = build_trainer(tmp_path, metric_for_best_model="rewrd")
    with pytest.raises(ConfigError, match="an evaluation has no eval_rewrd; it has eval_kl, eval_reward"):
        best.note({"eval_reward": 1.0, "eval_kl": 0.0}, trainer.args, trainer.state, trainer.policy)


def test_callbacks_are_added_popped_and_removed(tmp_path, capsys):
    trainer = build_trainer(tmp_path, max_steps=1)
    trainer.add_callback(PrinterCallback)
    assert isinstance(trainer.pop_callback(PrinterCallback), PrinterCallback)
    assert trainer.pop_callback(PrinterCallback) is None
    early = EarlyStoppingCallback(2)
    trainer.add_callback(early)
    trainer.remove_callback(early)
    trainer.add_callback(PrinterCallback())
    trainer.train()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert (
        len(printed) == 2
        and "'reward'" in printed[0]
        and "'epoch'" in printed[0]
        and "train_runtime" in printed[1]
    )


def test_what_scripts_ask_a_trainer_for_is_there(tmp_path, capsys):
    trainer = build_trainer(tmp_path, max_steps=1, eval_dataset=ROWS[:2])
    result = trainer.train()
    assert {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"} <= set(
        result.metrics
    )
    assert result.metrics["train_loss"] == result.training_loss
    assert trainer.state.log_history[-1]["train_loss"] == result.training_loss
    assert {"eval_reward", "eval_runtime", "eval_samples_per_second", "epoch"} <= set(trainer.evaluate())
    trainer.accelerator.print("only once")
    assert "only once" in capsys.readouterr().out
    assert trainer.accelerator.is_main_process and trainer.accelerator.num_processes == 1
    assert trainer.accelerator.unwrap_model(trainer.model) is trainer.policy.model
    assert trainer.processing_class is trainer.tokenizer and trainer.is_world_process_zero()
    assert trainer.train_dataset[0] == ROWS[0] and len(trainer.train_dataset) == len(ROWS)
    trainer.save_model(tmp_path / "elsewhere")
    assert ConditionedPolicy.load(tmp_path / "elsewhere", base_model=build_model("qwen2")).objectives == (
        "low",
        "high",
    )
    trainer.log({"mine": 1.0})
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["mine"] == 1.0
    trainer.end()


@pytest.mark.parametrize("name", sorted(ABSENT))
def test_what_is_absent_says_why(tmp_path, name):
    trainer = build_trainer(tmp_path)
    assert not hasattr(trainer, name)
    with pytest.raises(AttributeError, match=f"CLPTrainer has no {name}: "):
        getattr(trainer, name)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        trainer.nonsense  # noqa: B018
    with pytest.raises(AttributeError, match="does not go through accelerate"):
        trainer.accelerator.split_between_processes  # noqa: B018


@pytest.mark.parametrize("name", ["tools", "environment_factory"])
def test_tools_and_environments_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=f"{name}: completions are text, without calls of tools"):
        CLPTrainer(
            build_model("qwen2"),
            high_words,
            settings(tmp_path),
            ROWS,
            processing_class=build_tokenizer(),
            **{name: [print]},
        )


def test_callbacks_receive_what_transformers_trainer_gives_them(tmp_path):
    seen = {}

    class Watching(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.update(kwargs)

        def on_prediction_step(self, args, state, control, eval_dataloader=None, **_):
            seen["batches"] = len(eval_dataloader)

    trainer = build_trainer(
        tmp_path,
        max_steps=1,
        callbacks=[Watching()],
        eval_dataset=ROWS[:5],
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=8,
    )
    trainer.train()
    assert seen["model"] is trainer.model and seen["processing_class"] is trainer.tokenizer
    assert seen["optimizer"] is trainer.optimizer and seen["lr_scheduler"] is trainer.lr_scheduler
    assert len(seen["train_dataloader"]) == 3 and len(next(iter(seen["train_dataloader"]))) == 16
    assert seen["batches"] == 3
