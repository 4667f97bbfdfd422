"""Reward functions receive from CLPTrainer what TRL's GRPOTrainer gives them, and what they return and log means the same."""

import asyncio
import functools
import json
import re

import pytest
import torch

pytest.importorskip("trl")
from engine.conftest import build_classifier, build_model, build_tokenizer
from peers.both_trainers import BOTH, ROWS, our_trainer, trl_trainer
from transformers import LlamaForSequenceClassification

from clp_engine.data.rewards import RewardSet

COMPLETIONS = ["w3 w4", "w5", "w6 w7 w8", "w9"]
IDS = [[5, 6], [7, 2], [8, 9, 10], [11, 2]]
COLUMNS = {name: [row[name] for row in ROWS[:4]] for name in ("answer", "number")}
PROMPTS = [row["prompt"] for row in ROWS[:4]]
CHATS = [[{"role": "system", "content": "w30"}, {"role": "user", "content": p}] for p in PROMPTS]
TEMPLATE = (
    "{% for m in messages %}w{{ m['role'] | length }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w2{% endif %}"
)


def plain(completions, **_):
    return [float(len(c)) for c in completions]


def sometimes(completions, number, **_):
    return [None if n % 2 else 0.5 for n in number]


async def asynchronous(completions, answer, **_):
    await asyncio.sleep(0)
    return [float(len(a)) for a in answer]


def scaled(completions, factor, **_):
    return [factor * len(c) for c in completions]


class Judge:
    def __call__(self, completion_ids, **_):
        return [float(sum(ids)) for ids in completion_ids]


class AsyncJudge:
    async def __call__(self, completion_ids, **_):
        return [float(len(ids)) for ids in completion_ids]


FUNCTIONS = {
    "plain": lambda: plain,
    "None": lambda: sometimes,
    "async": lambda: asynchronous,
    "partial": lambda: functools.partial(scaled, factor=2.0),
    "partial of async": lambda: functools.partial(asynchronous),
    "object": Judge,
    "async object": AsyncJudge,
    "partial of an async object": lambda: functools.partial(AsyncJudge()),
}


def theirs_of(trainer, prompts, completions):
    inputs = [{**row, "prompt": prompt} for row, prompt in zip(ROWS, prompts)]
    return trainer._calculate_rewards(inputs, prompts, completions, IDS)


def as_messages(texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def shape(value):
    """Types all the way down; a dict by its keys."""
    if isinstance(value, dict):
        return {name: shape(part) for name, part in value.items()}
    if isinstance(value, list):
        return [shape(part) for part in value]
    return "function" if callable(value) else type(value).__name__


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_a_function_is_called_with_what_trl_calls_it_with_in_its_order(tmp_path, chat):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    calls = {}
    rows = [{**row, "prompt": c if chat else row["prompt"]} for row, c in zip(ROWS, CHATS)]
    for name, build in BOTH.items():

        def recording(_into=name, **kwargs):
            calls[_into] = kwargs
            return [0.0] * len(kwargs["completions"])

        async def later(_into=f"{name}, async", **kwargs):
            calls[_into] = kwargs
            return [0.0] * len(kwargs["completions"])

        build(tmp_path / name, [recording, later], rows, tokenizer=tokenizer, max_steps=1).train()
    for suffix in ("", ", async"):
        theirs, ours = calls["trl" + suffix], calls["clp" + suffix]
        assert list(ours) == list(theirs)
        for column in ("prompts", "answer", "number"):
            assert ours[column] == theirs[column], column
        for column in ("completions", "completion_ids"):  # drawn anew: their form
            assert len(ours[column]) == len(theirs[column]) == 8
            assert (
                shape(ours[column][0])[:1] == shape(theirs[column][0])[:1]
                or not chat
                and shape(ours[column][0]) == "str"
            )
        assert shape(ours["trainer_state"]) == shape(theirs["trainer_state"]) == "TrainerState"


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_every_kind_of_function_gives_trl_s_rewards_under_trl_s_name(tmp_path, kind):
    trainer = trl_trainer(tmp_path, FUNCTIONS[kind]())
    expected = theirs_of(trainer, PROMPTS, COMPLETIONS)
    for workers in (0, 1):
        rewards = RewardSet(FUNCTIONS[kind](), workers=workers)
        assert list(rewards.names) == trainer.reward_func_names
        torch.testing.assert_close(rewards(PROMPTS, COMPLETIONS, IDS, COLUMNS), expected, equal_nan=True)


@pytest.fixture
def judge(tmp_path):
    """A tiny sequence classifier on disk, with a tokenizer that adds an end token where it is let."""
    model = build_classifier()
    torch.nn.init.normal_(model.score.weight)
    path = tmp_path / "judge"
    model.save_pretrained(path)
    tokenizer = build_tokenizer("t5")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def given_as(kind, path):
    """(model, tokenizer) as both constructors take them, made anew."""
    if kind == "path":
        return str(path), None
    model = LlamaForSequenceClassification.from_pretrained(path)
    if kind == "module":
        return model, None
    tokenizer = build_tokenizer("t5")
    tokenizer.chat_template = TEMPLATE.replace("w2", "w3")
    if (
        kind == "compiled module"
    ):  # for which TRL neither loads a tokenizer nor tells the model what padding is
        model.config.pad_token_id = tokenizer.pad_token_id
        model = torch.compile(model, backend="eager")
    return model, tokenizer


@pytest.mark.parametrize(
    ("kind", "chat"),
    [
        ("path", False),
        ("path", True),
        ("module", False),
        ("module", True),
        ("module and tokenizer", True),
        ("compiled module", False),
    ],
)
def test_a_reward_model_scores_as_in_trl(tmp_path, judge, kind, chat):
    model, tokenizer = given_as(kind, judge)
    trainer = trl_trainer(tmp_path / "trl", model, reward_processing_classes=tokenizer)
    prompts = CHATS if chat else PROMPTS
    completions = as_messages(COMPLETIONS) if chat else [" " + c for c in COMPLETIONS]
    expected = theirs_of(trainer, prompts, completions)
    assert len(set(expected.flatten().tolist())) == 4
    ours = RewardSet(*given_as(kind, judge))
    assert list(ours.names) == trainer.reward_func_names == ["judge"]
    torch.testing.assert_close(ours(prompts, completions, IDS, COLUMNS), expected, rtol=1e-4, atol=1e-5)


def test_models_and_functions_mix_and_each_model_has_its_tokenizer(tmp_path, judge):
    model = LlamaForSequenceClassification.from_pretrained(judge)
    functions, tokenizers = [plain, str(judge), sometimes], [None, build_tokenizer("t5"), None]
    trainer = trl_trainer(tmp_path / "trl", list(functions), reward_processing_classes=list(tokenizers))
    expected = theirs_of(trainer, PROMPTS, COMPLETIONS)
    ours = RewardSet([plain, model, sometimes], tokenizers)
    assert list(ours.names) == trainer.reward_func_names == ["plain", "judge", "sometimes"]
    torch.testing.assert_close(
        ours(PROMPTS, COMPLETIONS, IDS, COLUMNS), expected, equal_nan=True, rtol=1e-4, atol=1e-5
    )


def test_what_functions_log_has_trl_s_names(tmp_path):
    def logging(completions, log_extra, log_metric, **_):
        log_extra("seen", [len(c) for c in completions])
        log_metric("mean_characters", sum(map(len, completions)) / len(completions))
        return plain(completions)

    rewards = [logging, sometimes, asynchronous, Judge()]
    found, columns = {}, {}
    for name, build in BOTH.items():
        trainer = build(tmp_path / name, list(rewards), max_steps=1, log_completions=True)
        trainer.train()
        found[name] = {
            key
            for key in trainer.state.log_history[0]
            if key.startswith(("reward", "mean_", "completions/"))
            and not re.search("/weight_|/missing$", key)
        }
    terminated = {
        f"completions/{kind}_terminated_length" for kind in ("mean", "min", "max")
    }  # ours: where any did
    assert found["clp"] | terminated == found["trl"] | terminated
    assert "mean_characters" in found["clp"] and "rewards/Judge/mean" in found["clp"]

    import pandas

    (table,) = (tmp_path / "trl" / "completions").glob("*.parquet")
    columns["trl"] = set(pandas.read_parquet(table).columns)
    row = json.loads((tmp_path / "clp" / "completions.jsonl").read_text().splitlines()[0])
    columns["clp"] = set(row) | set(row["rewards"])
    assert columns["trl"] - {"advantage"} <= columns["clp"] and "seen" in columns["clp"]


def test_the_rewards_of_a_batch_are_summed_up_as_in_trl(tmp_path):
    """Means, standard deviations and the share of groups without contrast, of the same rewards."""
    from clp_engine.core.conditions import Conditions
    from clp_engine.training.metrics import reward_metrics

    rewards = torch.tensor([[1.0], [3.0], [2.0], [7.0], [4.0], [4.0], [4.0], [4.0]])
    trainer = trl_trainer(
        tmp_path, lambda completions, **_: rewards.flatten().tolist(), model=build_model("llama")
    )
    trainer.reward_func_names = ["r"]
    trainer.model.train()
    trainer._generate_and_score_completions([dict(row) for row in ROWS[:2] for _ in range(4)])
    theirs = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    ours = reward_metrics(["r"], rewards, rewards[:, 0], Conditions(torch.ones(8, 1), torch.zeros(8)), 4)
    for name in ("rewards/r/mean", "rewards/r/std", "reward", "reward_std", "frac_reward_zero_std"):
        assert ours[name] == pytest.approx(theirs[name]), name


def test_a_row_that_no_function_rewards_is_reported(tmp_path, caplog):
    def never(completions, **_):
        return [None] * len(completions)

    trainer = our_trainer(tmp_path, [never], max_steps=1)
    trainer.train()
    assert "every reward function returned None for 8 of 8 completions" in caplog.text
    assert all(
        torch.count_nonzero(p) == 0
        for n, p in trainer.policy.adapter_parameters().items()
        if n.endswith("lora_b")
    )
