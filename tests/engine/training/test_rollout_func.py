"""A user's own function draws: TRL's rollout_func, with columns for the rewards, and tokens that an environment wrote."""

import math
import types

import numpy
import pytest
import torch
from engine.conftest import build_model, build_tokenizer
from engine.training.test_trainer import ROWS, high_words, log_of, low_words, settings

from clp_engine import ConditionedPolicy, Rollout, SamplingParams, rollout, score
from clp_engine.core.errors import ConfigError, DrawingFailed
from clp_engine.rollouts.engines.choice import engine_of
from clp_engine.training.collecting.dealt import _joined
from clp_engine.training.collecting.rollout_function import RolloutFunction
from clp_engine.training.trainer import CLPTrainer

REWARDS = {"low": low_words, "high": high_words}


def trainer_of(folder, function, rewards=REWARDS, eval_dataset=None, **changes):
    more = {"max_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, **changes}
    config = settings(folder, **more)
    return CLPTrainer(
        build_model("qwen2"),
        rewards,
        config,
        ROWS,
        eval_dataset,
        processing_class=build_tokenizer(),
        rollout_func=function,
    )


def own(prompts, trainer, **more):
    """What the engine itself would draw, as TRL's dict."""
    request, ids = trainer.rollout_request, build_tokenizer()(prompts)["input_ids"]
    drawn = rollout(
        trainer.policy,
        ids[:: request.group],
        request.conditions,
        num_generations=request.group,
        sampling=request.sampling,
        row_seeds=request.row_seeds,
    )
    logprobs = [row[:n] for row, n in zip(drawn.logprobs.tolist(), drawn.lengths.tolist())]
    return {"prompt_ids": ids, "completion_ids": drawn.token_lists(), "logprobs": logprobs, **more}


def test_a_function_that_draws_as_the_engine_trains_the_same_policy(tmp_path):
    trainer = trainer_of(tmp_path / "own", own)
    trainer.train()
    plain = trainer_of(tmp_path / "plain", None)
    plain.train()
    ours, theirs = trainer.policy.adapter_parameters(), plain.policy.adapter_parameters()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-3, atol=1e-5)
    [first, *_] = [e for e in log_of(tmp_path / "own") if "reward" in e]
    assert first["sampling/sampling_logp_difference/max"] < 1e-4
    assert first["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
    assert trainer.rollout_request is None


def test_columns_reach_the_rewards_and_prompts_come_once_for_each_completion(tmp_path):
    seen = []

    def function(prompts, trainer):
        assert len(prompts) == 16 and prompts[0] == prompts[3] != prompts[4]
        return own(prompts, trainer, turn=list(range(len(prompts))), game="chess")

    def reward(completions, turn, game, **_):
        seen.append((turn, game))
        return [float(t % 3) for t in turn]

    trainer_of(tmp_path, function, {"low": low_words, "won": reward}, max_steps=1).train()
    assert seen == [(list(range(16)), ["chess"] * 16)]


def test_log_probs_may_be_lists_or_unknown(tmp_path):
    def listed(prompts, trainer):
        answer = own(prompts, trainer)
        answer["logprobs"] = [[[value] for value in row] for row in answer["logprobs"]]
        return answer | {"logprob_token_ids": [[[t] for t in row] for row in answer["completion_ids"]]}

    def unknown(prompts, trainer):
        return own(prompts, trainer) | {"logprobs": None}

    norms = []
    for name, function in (("listed", listed), ("unknown", unknown)):
        trainer_of(tmp_path / name, function, max_steps=1).train()
        [entry] = [e for e in log_of(tmp_path / name) if "grad_norm" in e]
        norms.append(entry["grad_norm"])
        assert math.isfinite(entry["loss"])
    assert entry["sampling/importance_sampling_ratio/max"] == 1
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def two_turns(prompts, trainer):
    """Every completion is answered by an environment: four tokens that the policy did not write."""
    answer = own(prompts, trainer)
    masks = []
    for i, row in enumerate(answer["completion_ids"]):
        cut = max(1, len(row) // 2)
        answer["completion_ids"][i] = [*row[:cut], 9, 8, 7, 6, *row[cut:]][:12]
        masks.append([*[1] * cut, 0, 0, 0, 0, *[1] * (len(row) - cut)][:12])
        answer["logprobs"][i] = [-1.0] * len(masks[-1])
    return answer | {"env_mask": masks}


@pytest.mark.parametrize("baseline", ["leave_one_out", "value"])
def test_what_an_environment_wrote_is_read_and_not_trained(tmp_path, baseline):
    seen = []

    def function(prompts, trainer):
        answer = two_turns(prompts, trainer)
        seen.append(answer)
        return answer

    trainer = trainer_of(
        tmp_path,
        function,
        max_steps=1,
        baseline=baseline,
        max_completion_length=12,
        vllm_importance_sampling_correction=False,
    )
    update, batches = trainer._update, []
    trainer._update = lambda batch: batches.append(batch) or update(batch)
    trainer.train()
    [batch], [answer] = batches, seen
    written = sum(map(sum, answer["env_mask"]))
    read = sum(map(len, answer["completion_ids"]))
    assert batch.num_generated_tokens == written < read == int(batch.rollout.completion_mask.sum())
    [entry] = [e for e in log_of(tmp_path) if "loss" in e]
    assert entry["completions/mean_length"] == pytest.approx(written / 16)
    assert entry["num_generated_tokens"] == written


@pytest.mark.parametrize("loss_type", ["sequence", "dapo"])
def test_the_gradient_is_that_of_the_written_tokens_after_all_that_was_read(tmp_path, loss_type):
    """Against autograd: sum over the written tokens of A log pi, with A from the rewards alone."""
    trainer = trainer_of(
        tmp_path,
        two_turns,
        max_steps=1,
        max_completion_length=12,
        beta=0.0,
        max_grad_norm=0.0,
        loss_type=loss_type,
        vllm_importance_sampling_correction=False,
    )
    update, found = trainer._update, {}

    def watched(batch):
        policy, drawn = trainer.policy, batch.rollout
        scores = batch.scalar.view(-1, drawn.group)
        rest = (scores.sum(-1, keepdim=True) - scores) / (drawn.group - 1)
        advantage = (scores - rest).flatten()
        total, weighed = 0.0, len(advantage) if loss_type == "sequence" else int(drawn.written.sum())
        for b in range(len(advantage)):
            p = b // drawn.group
            prompt = drawn.prompt_ids[p, drawn.prompt_mask[p]]
            tokens = drawn.completion_ids[b, drawn.completion_mask[b]]
            logits = policy(torch.cat([prompt, tokens])[None], conditions=batch.conditions[p : p + 1]).logits[
                0, len(prompt) - 1 : -1
            ]
            logp = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            mask = drawn.written[b, : len(tokens)]
            total = total - advantage[b] * logp[mask].sum() / weighed
        grads = torch.autograd.grad(total, list(policy.adapter_parameters().values()))
        found["norm"] = torch.stack([g.square().sum() for g in grads]).sum().sqrt().item()
        return update(batch)

    trainer._update = watched
    trainer.train()
    [entry] = [e for e in log_of(tmp_path) if "grad_norm" in e]
    assert entry["grad_norm"] == pytest.approx(found["norm"], rel=1e-4)


def spoiled(**changes):
    def function(prompts, trainer):
        answer = own(prompts, trainer) | {n: v for n, v in changes.items() if not callable(v)}
        answer |= {n: v(answer) for n, v in changes.items() if callable(v)}
        return {name: value for name, value in answer.items() if value != "none"}

    return function


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda prompts, trainer: [], "returned no dict; expected a dict with prompt_ids, completion_ids"),
        (spoiled(logprobs="none"), "returned no logprobs"),
        (spoiled(completion_ids=lambda a: a["completion_ids"][:-1]), "15 completion_ids for 16 prompts"),
        (spoiled(prompt_ids=lambda a: [[5, 4], *a["prompt_ids"][1:]]), r"prompt_ids\[1\] differ"),
        (spoiled(completion_ids=lambda a: [[9999], *a["completion_ids"][1:]]), r"completion_ids\[0\].*9999"),
        (
            spoiled(completion_ids=lambda a: [[5] * 99, *a["completion_ids"][1:]]),
            "at most max_completion_length",
        ),
        (spoiled(completion_ids=lambda a: [[], *a["completion_ids"][1:]]), "has 0 tokens"),
        (spoiled(env_mask=[[1]] * 16), "env_mask must have an entry for each token"),
        (spoiled(trainer_state=1), "get 'trainer_state' of the trainer"),
        (spoiled(env_mask=lambda a: [[0] * len(row) for row in a["completion_ids"]]), "at least one of each"),
        (spoiled(extra=[1, 2]), "column 'extra' has 2 values for 16 completions"),
    ],
)
def test_another_answer_is_refused_with_what_is_wrong(tmp_path, function, message):
    with pytest.raises(ConfigError, match=message):
        trainer_of(tmp_path, function).train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_vllm": True}, "rollout_func and use_vllm were both given"),
        ({"conditioning": "lora+prompt"}, "writes its own prompts"),
        (
            {"partial_rollouts": True, "max_completion_length_per_step": 4, "max_completion_length": 8},
            "whole compl",
        ),
    ],
)
def test_what_a_function_cannot_be_combined_with(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        trainer_of(tmp_path, own, **changes)


def test_several_passes_have_the_policys_own_log_probs_of_the_drawing(tmp_path):
    def halved(prompts, trainer):
        answer = own(prompts, trainer)
        answer["logprobs"] = [[value - math.log(2) for value in row] for row in answer["logprobs"]]
        return answer

    trainer = trainer_of(tmp_path, halved, num_iterations=2, learning_rate=1e-3)
    trainer.train()
    log = [e for e in log_of(tmp_path) if "grad_norm" in e]
    for entry in (
        log
    ):  # both passes weigh by the gap at the time of drawing; the clipped ratio is to the policy of then
        assert entry["sampling/importance_sampling_ratio/min"] == pytest.approx(2, rel=1e-3)
        assert entry["clip_ratio/region_mean"] == 0


def test_a_sequence_of_any_kind_is_a_value_for_each_completion(tmp_path):
    seen = []

    def function(prompts, trainer):
        rows = len(prompts)
        return own(prompts, trainer, a=tuple(range(rows)), b=torch.arange(rows), c=numpy.ones(rows), d="text")

    def reward(completions, a, b, c, d, **_):
        seen.append((a, b, c, d))
        return [0.0] * len(completions)

    trainer_of(tmp_path, function, {"low": low_words, "seen": reward}, max_steps=1).train()
    assert seen == [(list(range(16)), list(range(16)), [1.0] * 16, ["text"] * 16)]


def test_a_completion_that_ends_with_a_stop_string_is_whole(tmp_path):
    policy = ConditionedPolicy.from_pretrained("docsum", ["a", "b"])
    texts = ["Return the number", "Return the sum", "Return the number of", "Return"]
    ids = [policy.tokenizer(text).input_ids for text in texts]
    read = policy.tokenizer("Count them.").input_ids
    answer = {"prompt_ids": [read] * 4, "completion_ids": ids, "logprobs": None}
    engine = RolloutFunction(lambda *_: answer, policy, settings(tmp_path), types.SimpleNamespace())
    drawn = rollout(
        policy,
        [read],
        policy.conditions(),
        num_generations=4,
        sampling=SamplingParams(16, stop_strings=("number", "he sum")),
        engine=engine,
        prompts=["Count them."],
    )
    assert drawn.terminated.tolist() == [True, True, False, False]


def test_a_mask_of_one_process_alone_leaves_the_others_as_they_are():
    def part(written):
        ids = torch.tensor([[5, 6], [7, 2]])
        mask = torch.ones(2, 2, dtype=torch.bool)
        ended = torch.tensor([False, True])
        return Rollout(ids[:1], mask[:1], ids, mask, torch.zeros(2, 2), ended, written=written)

    mask = torch.tensor([[True, False], [True, True]])
    for parts, expected in (
        ((part(None), part(mask)), [[1, 1], [1, 1], [1, 0], [1, 1]]),
        ((part(mask), part(None)), [[1, 0], [1, 1], [1, 1], [1, 1]]),
    ):
        whole = _joined(parts, [[0], [1]], 0, torch.device("cpu"))
        assert whole.written.int().tolist() == expected
    assert _joined((part(None), part(None)), [[0], [1]], 0, torch.device("cpu")).written is None


def test_an_evaluation_counts_what_the_policy_wrote(tmp_path, monkeypatch):
    def masked(prompts, trainer):
        answer = own(prompts, trainer)
        flags = [[1] + [0] * (len(row) - 1) for row in answer["completion_ids"]]
        return answer | ({"env_mask": flags} if trainer.masks else {})

    trainer, firsts = trainer_of(tmp_path, masked, max_steps=1), []

    def watched(*arguments, **options):
        stats = score(*arguments, **options)
        firsts.append(stats.entropy[:, 0])
        return stats

    monkeypatch.setattr("clp_engine.training.evaluating.score", watched)
    entropies = []
    for trainer.masks in (False, True):
        firsts.clear()
        entropies.append(trainer.evaluate(ROWS)["eval_entropy"])
    assert entropies[1] == pytest.approx(torch.cat(firsts).mean().item(), rel=1e-4)
    assert entropies[0] != pytest.approx(entropies[1], rel=1e-3)


def test_what_is_lost_in_the_last_epochs_evaluation_leaves_a_checkpoint(tmp_path):
    def function(prompts, trainer):
        if trainer.state.global_step == 2:
            raise DrawingFailed("the server is lost")
        return own(prompts, trainer)

    trainer = trainer_of(
        tmp_path, function, max_steps=2, eval_strategy="epoch", save_strategy="no", eval_dataset=ROWS
    )
    with pytest.raises(DrawingFailed, match="the server is lost"):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()


def test_an_evaluation_outside_train_takes_back_what_it_published(tmp_path, monkeypatch):
    calls = []

    class Elsewhere:
        def __init__(self, policy):
            self.policy = policy

        def run(self, request):
            calls.append("run")
            return engine_of(self.policy).run(request)

        def publish(self):
            calls.append("publish")

        def close(self):
            calls.append("close")

    monkeypatch.setattr("clp_engine.training.trainer.engine_for", lambda a, policy, *_: Elsewhere(policy))
    trainer = trainer_of(tmp_path, None, max_steps=1, eval_strategy="steps", eval_steps=1, eval_dataset=ROWS)
    trainer.train()
    assert calls.count("close") == 1 and calls[-1] == "close" and calls.count("run") > 1
    calls.clear()
    trainer.evaluate()
    assert calls.count("close") == 1 and calls[-1] == "close"
