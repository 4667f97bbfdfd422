"""Training whose completions vLLM draws, in this process. test_server.py has a server that dies in the middle of a step."""

import pytest
import torch
from rollouts_from_vllm import GAP, GAPS, log_of, trainer_of
from served import NEW_TOKENS, POLICIES, prepare, prompt

from clp_engine import ConditionedPolicy, rollout, score
from clp_engine.core.conditions import Conditions
from clp_engine.core.errors import ConfigError
from clp_engine.rollouts.engines.vllm.stacks import Stack
from clp_engine.rollouts.types import SamplingParams


class Run:
    """A policy of a family, vLLM in this process, and what it draws for four prompts, each under its own condition."""

    def __init__(self, folder, family):
        self.folder, self.policy = folder, prepare(folder, family).policy
        small = {"enforce_eager": True, "max_num_seqs": 16, "num_gpu_blocks_override": 32, "block_size": 32}
        self.trainer = trainer_of(
            self.policy,
            folder / "run",
            vllm_engine_args=small,
            vllm_max_model_length=64,
            vllm_gpu_memory_utilization=0.05,
        )
        self.engine, self.versions = self.trainer.rollout_engine, []
        publish = self.engine.publish

        def watched():
            publish()
            self.versions.append((self.engine._stack.number, len(list((folder / "run" / "vllm").iterdir()))))

        self.engine.publish = watched
        own = self.policy.conditions([[1.0, 0.0], [0.3, 0.7], [0.5, 0.5]], [0.2, 0.3, 0.9], 3)
        self.conditions = Conditions.cat([own, Conditions.reference(1, 2)])
        self.prompts = [prompt(5 + i, i) for i in range(4)]

    def draw(self, temperature=0.8, group=3, engine=True, **more):
        sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=temperature, **more)
        return rollout(
            self.policy,
            self.prompts,
            self.conditions,
            num_generations=group,
            sampling=sampling,
            seed=5,
            engine=self.engine if engine else None,
        )

    def own(self, drawn, temperature=0.8):
        stats = score(self.policy, drawn, self.conditions, outputs=("logprob",), temperature=temperature)
        return stats.logprob


@pytest.fixture(scope="module", params=sorted(POLICIES))
def run(request, tmp_path_factory):
    made = Run(tmp_path_factory.mktemp(request.param), request.param)
    yield made
    made.engine.close()


@pytest.mark.parametrize("temperature", [0.8, 1.4])
def test_log_probs_of_sampling_are_the_trainers_own(run, temperature):
    drawn = run.draw(temperature)
    assert drawn.engine == "vllm" and len(set(map(tuple, drawn.token_lists()))) == 12
    torch.testing.assert_close(drawn.logprobs, run.own(drawn, temperature), rtol=0, atol=GAP)
    ended = [tokens[-1] == 2 for tokens in drawn.token_lists()]
    assert drawn.terminated.tolist() == ended


def test_the_same_seeds_give_the_same_completions_and_greedy_ones_are_the_engines_own(run):
    assert run.draw().token_lists() == run.draw().token_lists()
    assert run.draw(0.0, 1).token_lists() == run.draw(0.0, 1, engine=False).token_lists()


@pytest.mark.parametrize("run", ["llama"], indirect=True)  # vLLM reads another tokenizer from Qwen's folder
def test_a_stop_string_ends_a_completion_with_its_last_token(run):
    drawn, plain = run.draw(stop_strings=("w1", "w2", "w3")), run.draw()
    texts = [run.policy.tokenizer.decode(tokens) for tokens in drawn.token_lists()]
    stopped = [any(word in text for word in ("w1", "w2", "w3")) for text in texts]
    assert any(stopped)
    for tokens, whole, ended, found in zip(
        drawn.token_lists(), plain.token_lists(), drawn.terminated.tolist(), stopped
    ):
        assert tokens == whole[: len(tokens)] and ended == (found or tokens[-1] == 2)


def test_each_step_draws_from_the_policy_as_it_is(run):
    """The policy moves by far more than the gap: log-probs of an older version would differ by as much."""
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    run.engine.close()
    before = run.draw()  # vLLM starts again, and leaves the numbers of reward functions alone
    assert torch.equal(torch.rand(1), expected)
    stale = run.own(before)
    run.versions.clear()
    run.trainer.train()
    assert (run.own(before) - stale).abs().max() > 100 * GAP
    log = log_of(run.folder / "run")
    assert len(log) == 3 and all(entry[GAPS] < GAP for entry in log)
    for entry in log:
        for kind in ("min", "mean", "max"):
            assert abs(entry[f"sampling/importance_sampling_ratio/{kind}"] - 1) < 2 * GAP
    numbers, folders = zip(*run.versions)
    assert [n - numbers[0] for n in numbers] == [0, 1, 2] and set(folders) == {1}
    assert not list((run.folder / "run" / "vllm").iterdir())


def test_a_completion_that_vllm_has_no_room_for_is_refused_and_not_cut(run):
    with pytest.raises(
        ConfigError, match="its completion up to 60, and vLLM has room for 64; raise vllm_max_model_length"
    ):
        rollout(
            run.policy,
            run.prompts,
            run.conditions,
            sampling=SamplingParams(max_new_tokens=60),
            engine=run.engine,
        )


def test_layers_that_vllm_has_no_adapters_for_are_refused(run, tmp_path):
    family = run.policy.model.config.model_type
    base = run.folder / "base"
    policy = ConditionedPolicy.from_pretrained(base, ("a", "b"), conditioning="lora+logit", rank=3)
    policy.export_stack(tmp_path / "stack")
    run.engine.publish()
    stack = Stack("other", tmp_path / "stack", 99)
    if family == "llama":  # has them
        run.engine._vllm.load(stack)
        run.engine._vllm.unload(stack)
        return
    with pytest.raises(ConfigError, match="vLLM refused the adapters .*lm_head.*target_modules"):
        run.engine._vllm.load(stack)
