"""Callbacks hear from CLPTrainer what they hear from TRL's GRPOTrainer: the same events, things and moments."""

import pytest

pytest.importorskip("trl")
from datasets import Dataset
from peers.both_trainers import BOTH, ROWS, our_trainer, trl_trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, TrainerCallback

EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


def reward(completions, **_):
    return [float(len(set(c.split()))) for c in completions]


class Recorder(TrainerCallback):
    """Every event: its name, the step, what it was called with, and the control as it was."""

    def __init__(self):
        self.heard = []

    def __getattribute__(self, name):
        if name not in EVENTS:
            return super().__getattribute__(name)

        def event(args, state, control, **kwargs):
            flags = {n: getattr(control, n) for n in ("should_log", "should_evaluate", "should_save")}
            self.heard.append((name, state.global_step, kwargs, flags, round(state.epoch or 0, 4)))

        return event


def run(name, folder, **options):
    recorder = Recorder()
    callbacks = [recorder, *options.pop("callbacks", [])]
    trainer = BOTH[name](folder / name, reward, callbacks=callbacks, **options)
    result = trainer.train()
    return trainer, result, recorder.heard


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 5},
        {"max_steps": 3, "logging_steps": 2, "logging_first_step": True},
        {"max_steps": 5, "save_strategy": "steps", "save_steps": 2},
        {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 3, "eval_delay": 1},
        {"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"max_steps": 4, "num_iterations": 2},
        {"max_steps": 4, "steps_per_generation": 2},
        {"max_steps": -1, "num_train_epochs": 2},
    ],
    ids=str,
)
def test_the_same_events_at_the_same_steps_with_the_same_flags_and_epochs(tmp_path, options):
    if "eval_strategy" in options:
        options = {**options, "eval_dataset": ROWS[:4], "per_device_eval_batch_size": 8}
    heard = {name: run(name, tmp_path, **options)[2] for name in BOTH}
    ours, theirs = ([(e[0], e[1], e[3], e[4]) for e in heard[name]] for name in ("clp", "trl"))
    assert [e[:2] for e in ours] == [e[:2] for e in theirs]
    assert ours == theirs


def test_events_come_with_the_same_things(tmp_path):
    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "eval_dataset": ROWS[:4]}
    options |= {"save_strategy": "steps", "save_steps": 1, "per_device_eval_batch_size": 8}
    heard = {name: run(name, tmp_path, **options)[2] for name in BOTH}
    for (event, _, ours, *_), (_, _, theirs, *_) in zip(heard["clp"], heard["trl"]):
        assert list(ours) == list(theirs), event
        assert {n for n, v in ours.items() if v is None} == {n for n, v in theirs.items() if v is None}, event
    (_, _, last, *_), (_, _, theirs, *_) = heard["clp"][-1], heard["trl"][-1]
    for thing in (last, theirs):
        assert isinstance(thing["processing_class"], PreTrainedTokenizerBase) and hasattr(
            thing["model"], "generate"
        )
    assert isinstance(last["optimizer"], Optimizer) and isinstance(last["lr_scheduler"], LRScheduler)
    for loader in ("train_dataloader", "eval_dataloader"):
        assert len(last[loader]) == len(theirs[loader]), loader


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"num_iterations": 3},
        {"steps_per_generation": 2},
        {"per_device_train_batch_size": 12},
    ],
    ids=str,
)
def test_the_training_batches_are_those_of_trl_s_loader(tmp_path, options):
    ours, theirs = (
        run(name, tmp_path, max_steps=1, **options)[2][-1][2]["train_dataloader"] for name in ("clp", "trl")
    )
    assert len(ours) == len(theirs)
    assert [[row["number"] for row in batch] for batch in ours] == [
        [row["number"] for row in batch] for batch in theirs
    ]


def test_the_logs_that_callbacks_read_have_trl_s_names(tmp_path):
    options = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "eval_dataset": ROWS[:4]}
    names = {}
    for name in BOTH:
        _, _, heard = run(name, tmp_path, per_device_eval_batch_size=8, **options)
        names[name] = [set(e[2]["logs"]) for e in heard if e[0] == "on_log"]
    assert len(names["clp"]) == len(names["trl"]) == 3  # a step, an evaluation, the whole run
    # Clip ratios are logged where something can be clipped, lengths of ended completions where any ended.
    leave_out = ("clip_ratio/", "terminated_length", "total_flos", "eval_loss", "eval_num_tokens")
    for ours, theirs in zip(names["clp"], names["trl"]):
        assert {n for n in theirs if not any(part in n for part in leave_out)} <= ours


def test_what_train_and_evaluate_return_has_trl_s_names(tmp_path):
    returned = {}
    for name in BOTH:
        trainer, result, _ = run(
            name, tmp_path, max_steps=1, eval_dataset=ROWS[:4], per_device_eval_batch_size=8
        )
        assert result.metrics["train_loss"] == result.training_loss and result.global_step == 1
        returned[name] = set(result.metrics), set(trainer.evaluate())
        assert trainer.state.log_history[-2]["train_runtime"] > 0
    assert returned["trl"][0] - returned["clp"][0] <= {"total_flos"}
    assert "eval_reward" in returned["trl"][1] & returned["clp"][1]


class Asks(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_log |= state.global_step == 1
        control.should_save |= state.global_step == 2
        control.should_evaluate |= state.global_step == 3
        control.should_training_stop |= state.global_step == 4
        return control


def test_flags_have_the_same_effect_whatever_the_settings_say(tmp_path):
    found = {}
    for name in BOTH:
        trainer, _, heard = run(
            name,
            tmp_path,
            callbacks=[Asks],
            max_steps=9,
            logging_steps=50,
            eval_dataset=ROWS[:4],
            per_device_eval_batch_size=8,
        )
        events = [(e[0], e[1]) for e in heard if e[0] in ("on_log", "on_save", "on_evaluate", "on_train_end")]
        found[name] = (
            events,
            sorted(p.name for p in (tmp_path / name).glob("checkpoint-*")),
            trainer.state.global_step,
        )
    assert found["clp"] == found["trl"]
    assert found["clp"][0] == [
        ("on_log", 1),
        ("on_save", 2),
        ("on_log", 3),
        ("on_evaluate", 3),
        ("on_log", 4),
        ("on_train_end", 4),
    ]


def test_early_stopping_stops_at_trl_s_step(tmp_path):
    """On a metric that reward functions log: best at the second evaluation, patience of two."""

    def scored(completions, trainer_state, log_metric, **_):
        log_metric("score", {2: 0.9, 3: 0.7, 4: 0.8}.get(trainer_state.global_step, 0.1))
        return reward(completions)

    found = {}
    for name, build in BOTH.items():
        trainer = build(
            tmp_path / name,
            scored,
            callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
            max_steps=9,
            eval_strategy="steps",
            eval_steps=1,
            eval_dataset=ROWS[:4],
            per_device_eval_batch_size=8,
            metric_for_best_model="score",
            greater_is_better=True,
        )
        trainer.train()
        found[name] = trainer.state.global_step, trainer.state.best_metric
    for stopped, best in found.values():
        assert stopped == 4 and best == pytest.approx(0.9)


def test_callbacks_are_added_and_removed_by_trl_s_methods(tmp_path):
    for build in (trl_trainer, our_trainer):
        trainer = build(tmp_path, reward, rows=Dataset.from_list(ROWS))
        recorder = Recorder()
        trainer.add_callback(recorder)
        trainer.add_callback(Asks)
        assert isinstance(trainer.pop_callback(Asks), Asks) and trainer.pop_callback(Asks) is None
        trainer.remove_callback(recorder)
        trainer.train()
        assert recorder.heard == []
