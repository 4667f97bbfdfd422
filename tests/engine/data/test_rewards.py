"""Reward functions beside the training thread: together, in order, and with their errors where they can be seen."""

import asyncio
import gc
import random
import signal
import subprocess
import sys
import threading
import time
import traceback

import numpy
import pytest
import torch
from engine.conftest import build_tokenizer
from engine.training.test_trainer import build_trainer, log_of, low_words
from transformers import AutoModelForSequenceClassification, Gemma3Config

from clp_engine.data.rewards import ClassifierReward, RewardSet
from clp_engine.training.collecting import reference_states
from clp_engine.training.collecting.dealt import Rewarded

BATCH = (["p"] * 3, ["a", "b", "c"], [[1], [2], [3]], {})


def constant(value, name="reward"):
    def function(completions, **_):
        return [value] * len(completions)

    function.__name__ = name
    return function


def test_the_reference_is_computed_while_the_reward_functions_run(tmp_path, monkeypatch):
    computing, met = threading.Event(), []

    def waits_for_the_reference(completions, **_):
        met.append(computing.wait(20))
        return [0.0] * len(completions)

    async def waits_too(completions, **_):
        while not computing.is_set():
            await asyncio.sleep(0.001)
        return [0.0] * len(completions)

    def reference_hidden(*args):
        computing.set()
        return original(*args)

    original = reference_states.reference_hidden
    monkeypatch.setattr(reference_states, "reference_hidden", reference_hidden)
    build_trainer(tmp_path, rewards=[waits_for_the_reference, waits_too], max_steps=1).train()
    assert met == [True]


def test_functions_run_together_as_far_as_there_are_workers():
    barrier, arrived = threading.Barrier(2, timeout=20), []

    def meets(completions, **_):
        barrier.wait()
        return [1.0] * len(completions)

    async def comes(completions, **_):
        arrived.append(len(arrived))
        while len(arrived) < 2:
            await asyncio.sleep(0.001)
        return [2.0] * len(completions)

    rewards = RewardSet({"a": meets, "b": meets, "c": comes, "d": comes}, workers=2)
    assert rewards(*BATCH).tolist() == [[1.0, 1.0, 2.0, 2.0]] * 3


def test_one_worker_keeps_the_order_of_the_functions_and_of_what_they_draw():
    def draws(completions, **_):
        return [random.random() for _ in completions]

    found = []
    for workers in (0, 1):
        random.seed(5)
        rewards = RewardSet({name: draws for name in "abcd"}, workers=workers)
        found.append(torch.stack([rewards(*BATCH) for _ in range(3)]))
    assert torch.equal(*found)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_and_logs_come_in_the_order_of_the_functions(workers):
    def slow(completions, log_extra, log_metric, **_):
        time.sleep(0.05)
        log_extra("slow", [1] * len(completions))
        log_metric("shared", 1.0)
        return [0.1] * len(completions)

    async def quick(completions, log_extra, log_metric, **_):
        log_extra("quick", [2] * len(completions))
        log_metric("shared", 2.0)
        log_metric("own", 5)
        return [None, 0.2, 0.3]

    pending = RewardSet([slow, quick], workers=workers).start(*BATCH)
    result = pending.result()
    torch.testing.assert_close(
        result, torch.tensor([[0.1, torch.nan], [0.1, 0.2], [0.1, 0.3]]), equal_nan=True
    )
    assert list(pending.columns) == ["slow", "quick"]
    assert Rewarded.of(pending).metrics == {"shared": 1.5, "own": 5.0}
    assert list(pending.seconds) == ["slow", "quick"] and pending.seconds["slow"] >= 0.05
    assert 0.05 <= pending.busy <= sum(pending.seconds.values()) + 1e-6


def test_a_function_that_returns_an_awaitable_and_an_object_with_an_async_call_are_async():
    async def later(value, completions):
        await asyncio.sleep(0)
        return [value] * len(completions)

    class Judge:
        async def __call__(self, completions, **_):
            return [threading.current_thread().name == "clp-loop"] * len(completions)

    def delegates(completions, **_):
        return later(3.0, completions)

    for workers in (0, 1):
        rewards = RewardSet({"delegates": delegates, "judge": Judge()}, workers=workers)
        assert rewards(*BATCH).tolist() == [[3.0, 1.0]] * 3
        assert rewards(*BATCH).tolist() == [[3.0, 1.0]] * 3  # the loop is there for the next batch


def test_modules_run_in_the_thread_that_asks():
    threads = {}

    class Module(torch.nn.Module):
        def forward(self, completions, **_):
            threads["module"] = threading.current_thread()
            return torch.ones(len(completions))

    class Classifier(ClassifierReward):
        def __init__(self):
            pass

        def __call__(self, prompts, completions, **_):
            threads["classifier"] = threading.current_thread()
            return [0.0] * len(completions)

    def function(completions, **_):
        threads["function"] = threading.current_thread()
        return [0.0] * len(completions)

    rewards = RewardSet({"m": Module(), "c": Classifier(), "f": function}, workers=2)
    assert rewards(*BATCH).tolist() == [[1.0, 0.0, 0.0]] * 3
    here = threading.current_thread()
    assert threads["module"] is here and threads["classifier"] is here and threads["function"] is not here


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_names_the_function_and_keeps_where_it_was_raised(workers):
    def helper():
        raise KeyError("x")

    def broken(**_):
        helper()

    async def broken_later(**_):
        await asyncio.sleep(0)
        helper()

    for function in (broken, broken_later):
        rewards = RewardSet([constant(1.0), function], workers=workers)
        with pytest.raises(
            RuntimeError, match=rf"reward function '{function.__name__}' failed: KeyError"
        ) as info:
            rewards(*BATCH)
        frames = [frame.name for frame in traceback.extract_tb(info.value.__cause__.__traceback__)]
        assert frames[-2:] == [function.__name__, "helper"]
    with pytest.raises(ValueError, match="reward function 'short' returned 1 rewards for 3 completions"):
        RewardSet({"short": lambda **_: [1.0]}, workers=workers)(*BATCH)


def test_a_function_that_needs_the_main_thread_is_told_how_to_get_it():
    def with_alarm(completions, **_):
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        return [1.0] * len(completions)

    with pytest.raises(RuntimeError, match="reward_workers=0 calls it in the main one"):
        RewardSet([with_alarm], workers=1)(*BATCH)
    before = signal.getsignal(signal.SIGALRM)
    try:
        assert RewardSet([with_alarm])(*BATCH).tolist() == [[1.0]] * 3
    finally:
        signal.signal(signal.SIGALRM, before)


def test_threads_end_with_the_rewards_they_served():
    async def later(completions, **_):
        return [1.0] * len(completions)

    before = set(threading.enumerate())
    rewards = RewardSet([constant(1.0, "a"), constant(2.0, "b"), later], workers=2)
    rewards(*BATCH)
    new = set(threading.enumerate()) - before
    assert sorted(t.name for t in new) == ["clp-loop", "clp-worker-1", "clp-worker-2"]
    del rewards
    gc.collect()
    for thread in new:
        thread.join(timeout=20)
        assert not thread.is_alive()


HANGS = """
import os, signal, threading, time
from clp_engine.data.rewards import RewardSet

def hangs(**_):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    time.sleep(600)

RewardSet([hangs], workers=1)(["p"], ["c"], [[1]], {})
"""


@pytest.mark.check
def test_ctrl_c_ends_a_program_whose_reward_function_hangs():
    process = subprocess.run(
        [sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode != 0 and "KeyboardInterrupt" in process.stderr


# -- in a step ---------------------------------------------------------------------------------------------------------


def test_phase_times_say_how_long_rewards_took_and_how_long_the_step_waited(tmp_path, monkeypatch):
    def slow(completions, **_):
        time.sleep(0.5)
        return [float(len(c)) for c in completions]

    original = reference_states.reference_hidden
    monkeypatch.setattr(
        reference_states, "reference_hidden", lambda *args: (time.sleep(0.4), original(*args))[1]
    )
    for workers, name in ((1, "beside"), (0, "inline")):
        build_trainer(tmp_path / name, rewards=[slow], max_steps=1, reward_workers=workers).train()
    beside, inline = (log_of(tmp_path / name)[0] for name in ("beside", "inline"))
    assert beside["time/reward"] >= 0.5 and beside["time/reward/slow"] >= 0.5
    # 0.5 s of work, 0.4 s of them beside the reference; the rest is for a busy machine.
    assert beside["time/reward_wait"] <= 0.35 < 0.5 <= inline["time/reward_wait"]
    assert beside["time/reference"] >= 0.4


def test_workers_change_nothing_that_is_learned(tmp_path):
    def waits(completions, **_):
        time.sleep(0.01)
        return low_words(completions)

    async def waits_too(completions, **_):
        await asyncio.sleep(0.005)
        return [1 - x for x in low_words(completions)]

    adapters = []
    for workers in (0, 1, 3):
        trainer = build_trainer(
            tmp_path / str(workers), rewards={"low": waits, "high": waits_too}, reward_workers=workers
        )
        trainer.train()
        adapters.append(torch.cat([p.flatten() for p in trainer.policy.adapter_parameters().values()]))
    assert torch.equal(adapters[0], adapters[1]) and torch.equal(adapters[0], adapters[2])


def count_reference_rows(policy, monkeypatch):
    rows, original = [], policy.completion_hidden

    def completion_hidden(batch, conditions, mask=None):
        if conditions is None:
            rows.append(batch.completion_ids.shape[0])
        return original(batch, conditions, mask)

    monkeypatch.setattr(policy, "completion_hidden", completion_hidden)
    return rows


@pytest.mark.parametrize("most, expected", [(1 << 30, 16), (0, 4 + 2 * 12)])
def test_the_reference_is_computed_once_for_all_passes_and_up_to_a_limit(
    tmp_path, monkeypatch, most, expected
):
    """16 completions in micro-batches of 4, two passes; with no room only the first micro-batch is kept."""
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    monkeypatch.setattr(reference_states, "MAX_BYTES", most)
    trainer = build_trainer(tmp_path, max_steps=2, num_iterations=2, **split)
    rows = count_reference_rows(trainer.policy, monkeypatch)
    trainer.train()
    assert sum(rows) == expected


def test_what_is_kept_of_the_reference_does_not_change_the_gradient(tmp_path, monkeypatch):
    adapters = []
    for most in (1 << 30, 0):
        monkeypatch.setattr(reference_states, "MAX_BYTES", most)
        trainer = build_trainer(
            tmp_path / str(most), max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=4
        )
        trainer.train()
        adapters.append(torch.cat([p.flatten() for p in trainer.policy.adapter_parameters().values()]))
    assert torch.equal(*adapters)


def test_ctrl_c_during_a_reward_function_finishes_the_step(tmp_path):
    def interrupted(completions, **_):
        import os

        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        return [1.0] * len(completions)

    with pytest.raises(KeyboardInterrupt):
        build_trainer(tmp_path, rewards=[interrupted], processing_class=build_tokenizer()).train()
    assert (tmp_path / "checkpoint-1").is_dir()


def returning(value):
    return RewardSet({"given": lambda **_: value})(*BATCH)


@pytest.mark.parametrize(
    "value",
    [
        [1, 2.0, None],
        (1.0, 2.0, None),
        iter([1.0, 2.0, None]),
        numpy.array([1.0, 2.0, numpy.nan]),
        numpy.array([[1.0], [2.0], [numpy.nan]]),
        torch.tensor([1.0, 2.0, torch.nan]),
        torch.tensor([[1.0], [2.0], [torch.nan]], requires_grad=True),
        [numpy.float32(1), torch.tensor([2.0]), torch.tensor(torch.nan)],
    ],
    ids=lambda value: type(value).__name__,
)
def test_rewards_are_read_from_whatever_holds_one_number_for_each_row(value):
    torch.testing.assert_close(returning(value), torch.tensor([[1.0], [2.0], [torch.nan]]), equal_nan=True)


@pytest.mark.parametrize(
    "value, message",
    [
        (None, "returned None; expected a list.* of 3 numbers.*is its return statement missing"),
        (1.5, "returned 1.5; expected a list"),
        (True, "returned True; expected a list"),
        ("123", "returned a str; expected a list"),
        (b"123", "returned a bytes; expected a list"),
        ({"r": 1.0, "s": 1.0, "t": 1.0}, "returned a dict; expected a list"),
        ({1.0, 2.0, 3.0}, "returned a set; expected a list"),
        (torch.tensor(1.0), "returned a Tensor; expected a list"),
        (numpy.float64(1.0), "returned 1.0; expected a list|returned np.float64.1.0.; expected a list"),
        (([1.0, 2.0, 3.0], {"info": 1}), "returned 2 rewards for 3 completions"),
        (
            ([1.0] * 3, [2.0] * 3, [3.0] * 3),
            r"returned \[1.0, 1.0, 1.0\] for completion 0; expected a number",
        ),
        (torch.ones(3, 2), r"returned \[1.0, 1.0\] for completion 0; expected a number"),
        (torch.ones(1, 3), "returned 1 rewards for 3 completions"),
        ([1.0, "0.5", 1.0], "returned '0.5' for completion 1; expected a number"),
        ([1.0, 1.0, float("inf")], "returned inf for completion 2; expected a number of at most 1e[+]18"),
        ([1.0, -3e38, 1.0], "returned -3e[+]38 for completion 1; expected a number"),
        ([10**400, 1, 1], "returned 1000.* for completion 0; expected a number"),
    ],
)
def test_what_is_no_list_of_finite_numbers_is_refused_by_function_and_row(value, message):
    with pytest.raises(ValueError, match=f"reward function 'given' {message}"):
        returning(value)


def test_nan_counts_as_none_and_is_said_once(caplog):
    rewards = RewardSet({"broken": lambda **_: [1.0, float("nan"), 1.0], "other": constant(1.0)})
    for _ in range(2):
        assert rewards(*BATCH)[:, 0].isnan().tolist() == [False, True, False]
    assert len(caplog.messages) == 1
    assert "'broken' returned NaN for completion 1" in caplog.text and "rewards/broken/missing" in caplog.text


def test_a_function_that_edits_what_it_is_given_edits_its_own_copy():
    def editing(prompts, completions, completion_ids, extra, **_):
        completions[0][0]["content"] = "edited"
        completions.pop(), completion_ids[0].clear(), prompts.clear(), extra[0]["seen"].append(1)
        return [0.0] * 3

    seen = {}

    def reading(**given):
        seen.update(given)
        return [0.0] * 3

    completions = [[{"role": "assistant", "content": text}] for text in "abc"]
    batch = ["p"] * 3, completions, [[1], [2], [3]], {"extra": [{"seen": []} for _ in "abc"]}
    RewardSet([editing, reading])(*batch)
    assert (
        [c[0]["content"] for c in seen["completions"]]
        == ["a", "b", "c"]
        == [c[0]["content"] for c in completions]
    )
    assert seen["completion_ids"] == [[1], [2], [3]] and seen["prompts"] == ["p"] * 3
    assert seen["extra"] == [{"seen": []}] * 3


@pytest.mark.parametrize("logged", [[1.0], "abc", 1.0, [1.0] * 4])
def test_a_logged_column_of_another_length_is_refused_by_name(logged):
    def function(log_extra, **_):
        log_extra("score", logged)
        return [0.0] * 3

    with pytest.raises(
        ValueError, match="'function' gave log_extra .* values for 'score' .*; expected a list of 3"
    ):
        RewardSet([function])(*BATCH)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cancelled_function_is_named_like_any_that_fails(workers):
    def at_once(**_):
        raise asyncio.CancelledError

    async def later(**_):
        asyncio.current_task().cancel()
        await asyncio.sleep(0)

    for function in (at_once, later):
        with pytest.raises(
            RuntimeError, match=f"reward function '{function.__name__}' failed: CancelledError"
        ):
            RewardSet([function], workers=workers)(*BATCH)


def test_a_classifier_of_text_and_images_reads_a_short_text_as_it_does_alone():
    """The padding id belongs to the config of its text model."""
    text = {
        "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": None, "sliding_window": 8, "query_pre_attn_scalar": 16,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8,
    }  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(
        Gemma3Config(text_config=text, vision_config=vision, num_labels=1, mm_tokens_per_image=4)
    )
    torch.nn.init.normal_(model.score.weight)
    reward = ClassifierReward(model, build_tokenizer())
    together = reward(["w1 w2", "w1 w2 w3 w4 w5"], [" w6", " w7 w8"])
    assert together[0] == pytest.approx(reward(["w1 w2"], [" w6"])[0], abs=1e-5)
