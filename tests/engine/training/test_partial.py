"""Partial rollouts: a completion that goes on is the one that would have been drawn at one go, and none is lost."""

import dataclasses
import math
import shutil

import pytest
import torch
from engine.conftest import CAUSAL, build_model, build_policy
from engine.rollouts.test_rollout import MIXED, PROMPTS
from engine.training import test_trainer
from engine.training.test_trainer import ROWS, log_of, settings
from safetensors.torch import load_file

from clp_engine.core.errors import ConfigError
from clp_engine.core.seeds import derive
from clp_engine.rollouts.rollout import rollout
from clp_engine.rollouts.types import SamplingParams
from clp_engine.training.checkpoints import checkpoint
from clp_engine.training.collecting import partial_rollouts
from clp_engine.training.stepping.update import backward, micro_batches

PARTIAL = {"partial_rollouts": True, "max_completion_length_per_step": 3, "max_completion_length": 12}


def build_trainer(tmp_path, *, family="qwen2", **changes):
    """Of a model with so many end tokens that completions of any length occur."""
    model = build_model(family)
    model.generation_config.eos_token_id = [2, *range(50, 60)]
    return test_trainer.build_trainer(tmp_path, family=family, model=model, **changes)


def in_pieces(policy, sizes, row_seeds, **options):
    """One completion of each prompt, drawn in several calls."""
    tokens, logprobs = [[] for _ in PROMPTS], [[] for _ in PROMPTS]
    running = list(range(len(PROMPTS)))
    for size in sizes:
        part = rollout(
            policy,
            [PROMPTS[i] for i in running],
            MIXED[running],
            sampling=SamplingParams(size, **options),
            row_seeds=row_seeds[running],
            begun=[tokens[i] for i in running],
        )
        for i, new, values in zip(running, part.token_lists(), part.logprobs.tolist()):
            tokens[i] += new
            logprobs[i] += values[: len(new)]
        running = [i for i, ended in zip(running, part.terminated.tolist()) if not ended]
    return tokens, logprobs


@pytest.mark.parametrize("family", sorted(CAUSAL))
def test_a_completion_drawn_in_pieces_is_the_one_drawn_at_once(family):
    policy = build_policy(family)
    row_seeds = derive(11, torch.arange(len(PROMPTS)))
    options = {"temperature": 0.8, "top_p": 0.95}
    whole = rollout(policy, PROMPTS, MIXED, sampling=SamplingParams(14, **options), row_seeds=row_seeds)
    tokens, logprobs = in_pieces(policy, (5, 1, 8), row_seeds, **options)
    assert tokens == whole.token_lists() and max(map(len, tokens)) == 14
    for found, expected in zip(logprobs, whole.logprobs):
        torch.testing.assert_close(torch.tensor(found), expected[: len(found)], rtol=1e-4, atol=1e-4)


def test_with_a_weighting_in_the_prompt_too():
    policy = build_policy("llama", conditioning="prompt", prompt_template="{weights} ")
    row_seeds = derive(3, torch.arange(len(PROMPTS)))
    whole = rollout(policy, PROMPTS, MIXED, sampling=SamplingParams(9), row_seeds=row_seeds)
    assert in_pieces(policy, (4, 5), row_seeds)[0] == whole.token_lists()


def test_what_goes_on_is_one_completion_per_prompt():
    policy = build_policy("llama")
    with pytest.raises(ValueError, match="one completion per prompt; got num_generations=2"):
        rollout(policy, PROMPTS, MIXED, num_generations=2, begun=[[5]] * 4)


# -- batches -----------------------------------------------------------------------------------------------------------


def collected(trainer, steps):
    """The batches of a run whose policy does not move, by prompt number in the ordinary order of the stream."""
    source = trainer.collector
    return [source.training_batch(trainer.train_dataset, step, trainer.state) for step in range(steps)]


def by_seed(batches):
    """Completions with their log-probs and condition, by prompt and tokens: what was drawn, wherever it is."""
    found = {}
    for batch in batches:
        drawn = batch.rollout
        for i, tokens in enumerate(drawn.token_lists()):
            p = i // drawn.group
            prompt = tuple(drawn.prompt_ids[p][drawn.prompt_mask[p]].tolist())
            key = prompt, round(batch.conditions.weights[p, 0].item(), 6), tuple(tokens)
            found.setdefault(key, []).append((drawn.logprobs[i, : len(tokens)], bool(drawn.terminated[i])))
    return found


def test_with_a_policy_that_does_not_move_the_completions_are_those_of_an_ordinary_run(tmp_path):
    """Other batches, the same completions: each prompt has its own condition and random numbers."""
    ordinary = by_seed(collected(build_trainer(tmp_path, max_completion_length=12), 9))
    trainer = build_trainer(tmp_path, **PARTIAL)
    batches = collected(trainer, 6)
    assert all(b.rollout.completion_ids.shape[0] == 16 for b in batches)
    found = by_seed(batches)
    assert len(found) > 40 and found.keys() <= ordinary.keys()
    for key, completions in found.items():
        for (logprobs, ended), (expected, expected_ended) in zip(completions, ordinary[key]):
            torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-4)
            assert ended == expected_ended
    assert max(len(tokens) for _, _, tokens in found) == 12


def test_nothing_is_lost(tmp_path):
    """Groups are trained once, in batches of the same size; what is not yet trained is waiting."""
    trainer = build_trainer(tmp_path, **PARTIAL)
    trained, phases = [], []
    for step in range(8):
        waiting = {g.number for g in trainer.collector._groups}
        batch = trainer.collector.training_batch(trainer.train_dataset, step, trainer.state)
        still = {g.number for g in trainer.collector._groups}
        new = set(range(trainer.collector._planned)) - still - set(trained)
        assert len(new) == 4 and not waiting & set(trained)
        trained += sorted(new)
        phases.append(batch.metrics["partial/phases"])
        unfinished = [g for g in trainer.collector._groups if not trainer.collector._is_done(g)]
        assert sum(g.tokens > 0 for g in unfinished) <= 4
        assert len(trainer.collector._groups) - len(unfinished) < 4
    assert sorted(trained + list(still)) == list(range(trainer.collector._planned))
    # The first batch needs several phases; after that, each step has at least one and few have more.
    assert phases[0] > 1 and min(phases) == 1 and sum(phases[1:]) / 7 < phases[0]


def test_a_phase_draws_at_most_so_many_tokens_of_each_completion(tmp_path, monkeypatch):
    calls, original = [], partial_rollouts.rollout

    def rollout_(*args, begun=None, **kwargs):
        drawn = original(*args, begun=begun, **kwargs)
        calls.append((int(drawn.lengths.max()), begun is not None))
        return drawn

    monkeypatch.setattr(partial_rollouts, "rollout", rollout_)
    batches = collected(build_trainer(tmp_path, **PARTIAL), 3)
    assert max(length for length, _ in calls) == 3 and any(goes_on for _, goes_on in calls)
    # An ordinary rollout of these batches would have taken 12 decode steps each.
    assert all(b.rollout.lengths.max() > 3 for b in batches)


def test_with_the_whole_length_at_once_a_run_is_an_ordinary_run_with_ratios_of_one(tmp_path):
    ordinary, whole = (
        build_trainer(tmp_path),
        build_trainer(tmp_path, partial_rollouts=True, max_completion_length_per_step=8),
    )
    for step in range(3):
        first, second = (
            source.training_batch(ordinary.train_dataset, step, ordinary.state)
            for source in (ordinary.collector, whole.collector)
        )
        for field in dataclasses.fields(first.rollout):
            ours, theirs = getattr(first.rollout, field.name), getattr(second.rollout, field.name)
            same = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
            assert same, field.name
        assert torch.equal(first.conditions.weights, second.conditions.weights)
        assert torch.equal(first.rewards, second.rewards)
        assert second.metrics["partial/stale_tokens"] == 0 and second.metrics["partial/phases"] == 1


def test_tokens_keep_the_log_probs_of_the_policies_that_drew_them(tmp_path):
    """After an update only what was drawn before it has a ratio other than one."""
    trainer = build_trainer(tmp_path, **PARTIAL, learning_rate=3e-2, max_steps=3)
    trainer.train()
    before = {
        tuple(c.tokens): list(c.logprobs)
        for g in trainer.collector._groups
        for c in g.completions
        if c.tokens
    }
    assert before
    batch = trainer.collector.training_batch(trainer.train_dataset, 3, trainer.state)
    ((_, part),) = micro_batches(batch, trainer.objective, trainer.args.micro_batching)
    now = backward(trainer.policy, part, trainer.objective).logprob
    fresh = stale = 0
    for i, tokens in enumerate(batch.rollout.token_lists()):
        gap = (now[i, : len(tokens)] - batch.rollout.logprobs[i, : len(tokens)]).abs()
        begun = max((n for n in range(len(tokens) + 1) if tuple(tokens[:n]) in before), default=0)
        assert batch.rollout.logprobs[i, :begun].tolist() == before.get(tuple(tokens[:begun]), [])
        assert begun == len(tokens) or gap[begun:].max() < 1e-4
        fresh, stale = fresh + len(tokens) - begun, stale + int((gap[:begun] > 1e-3).sum())
    assert fresh > 10 and stale > 10
    assert batch.metrics["partial/stale_tokens"] == pytest.approx(
        1 - fresh / batch.num_generated_tokens, abs=1e-6
    )
    assert batch.new_tokens >= fresh


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_iterations": 2, "kl_estimator": "mixed"},
        {"steps_per_generation": 2},
        {"baseline": "value", "num_generations": 1},
        {"max_generated_tokens": 900, "max_steps": -1},
        {"conditioning": "lora+prompt", "log_completions": True},
    ],
    ids=str,
)
def test_partial_rollouts_train_and_resume_to_the_bit(tmp_path, changes):
    changes = {**PARTIAL, "save_strategy": "steps", "save_steps": 2, "max_steps": 8, **changes}
    result = build_trainer(tmp_path / "whole", **changes).train()
    log = log_of(tmp_path / "whole")
    assert all(math.isfinite(v) for entry in log for v in entry.values())
    assert any(entry.get("partial/stale_tokens") for entry in log)
    (first, *_, last) = checkpoint.checkpoints(tmp_path / "whole")
    assert load_file(first / "training.safetensors")["unfinished.tokens"].numel() > 0
    assert {p.suffix for p in first.rglob("*") if p.is_file()} == {".safetensors", ".json"}
    shutil.copytree(first, tmp_path / "parts" / first.name)
    again = build_trainer(tmp_path / "parts", **changes).train(resume_from_checkpoint=True)
    assert again.global_step == result.global_step
    for name in ("training.safetensors", "policy/adapters.safetensors"):
        assert (last / name).read_bytes() == (tmp_path / "parts" / last.name / name).read_bytes(), name
    timeless = [
        [{k: v for k, v in e.items() if "time" not in k} for e in log_of(tmp_path / kind)]
        for kind in ("whole", "parts")
    ]
    assert timeless[0] == timeless[1]


def test_the_first_update_has_the_log_probs_of_sampling_already(tmp_path):
    trainer = build_trainer(tmp_path, **PARTIAL, learning_rate=3e-2)
    seen, original = [], trainer._update
    trainer._update = lambda batch: seen.append(batch) or original(batch)
    trainer.train()
    assert all(torch.equal(batch.old_logprob, batch.rollout.logprobs) for batch in seen)
    log = log_of(tmp_path)
    assert all("clip_ratio/region_mean" in entry for entry in log)
    assert not any("sampling/sampling_logp_difference/mean" in entry for entry in log)


def test_generated_tokens_are_counted_when_they_are_drawn(tmp_path):
    trainer = build_trainer(tmp_path, **PARTIAL)
    trained = []
    original = trainer._update
    trainer._update = lambda batch: trained.append(batch.num_generated_tokens) or original(batch)
    trainer.train()
    waiting = sum(g.tokens for g in trainer.collector._groups)
    assert waiting > 0 and trainer.num_generated_tokens == sum(trained) + waiting


def test_other_prompts_under_completions_on_their_way_are_refused(tmp_path):
    changes = {**PARTIAL, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    build_trainer(tmp_path, **changes).train()
    trainer = build_trainer(tmp_path, **{**changes, "max_steps": 2})
    trainer.train_dataset = trainer._training_prompts(
        [{**row, "prompt": row["prompt"] + " w1"} for row in ROWS]
    )
    with pytest.raises(ConfigError, match="is not what it was when the checkpoint was written"):
        trainer.train(resume_from_checkpoint=True)


def test_an_encoder_decoder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="an encoder-decoder does not; use partial_rollouts=False"):
        build_trainer(tmp_path, family="t5", **PARTIAL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partial_rollouts": True}, "max_completion_length_per_step=None: give both or neither"),
        (
            {"max_completion_length_per_step": 4},
            "partial_rollouts=False and max_completion_length_per_step=4",
        ),
        (
            {"partial_rollouts": True, "max_completion_length_per_step": 3},
            "expected a number that divides max_completion_length = 8",
        ),
        ({"partial_rollouts": True, "max_completion_length_per_step": 0}, "max_completion_length_per_step=0"),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, **changes)
