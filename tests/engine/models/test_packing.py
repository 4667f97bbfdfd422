"""Packed scoring: every token once, the numbers of one completion at a time, and what is not needed is not computed."""

import dataclasses
import logging

import pytest
import torch
from engine.conftest import CAUSAL, build_policy
from transformers import AutoModelForCausalLM, XGLMConfig

from clp_engine.core.conditions import Conditions
from clp_engine.core.errors import ConfigError
from clp_engine.models.backbones.packing import join, pack
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.rollouts.rollout import rollout
from clp_engine.rollouts.scoring import (
    completion_stats,
    hidden_states,
    joint_hidden_states,
    pack_rollout,
    score,
    within_budget,
)
from clp_engine.rollouts.types import SamplingParams
from clp_engine.training.settings.config import CLPConfig

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [20], [30, 31, 32, 33]]
MIXED = Conditions(torch.tensor([[0.0, 0.0], [0.4, 0.6], [1.0, 0.0], [0.2, 0.8]]), torch.full((4,), 0.1))


def drawn_by(policy, group: int = 3, tokens: int = 10):
    return rollout(policy, PROMPTS, MIXED, num_generations=group, sampling=SamplingParams(tokens), seed=2)


@pytest.fixture(params=sorted(CAUSAL))
def causal(request):
    return request.param


def padded(policy) -> ConditionedPolicy:
    """The same policy, made to pad and to run prompts and completions one after the other."""
    policy.backbone.packing_fault = "the test says so"
    return policy


def test_a_pack_holds_each_token_once_but_the_last_ones():
    prompts = torch.tensor([[0, 3, 4], [5, 6, 7]])
    completions = torch.tensor([[10, 11, 12], [20, 0, 0], [30, 31, 0], [40, 41, 42]])
    packed = pack(prompts, torch.tensor([2, 3]), completions, torch.tensor([3, 1, 2, 0]))
    assert packed.ids.tolist() == [3, 4, 10, 11, 5, 6, 7, 30]
    assert packed.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert packed.prompts.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert packed.layout.starts.tolist() == [0, 2, 4, 4, 7, 8, 8]
    assert packed.layout.parents.tolist() == [-1, 0, 0, -1, 3, 3]
    # 10 after 4, 11 after 10, 12 after 11, 20 after 4, 30 after 7, 31 after 30; the last row is left out.
    assert packed.predictors.tolist() == [1, 2, 3, 1, 6, 7]


def test_packed_hidden_states_and_gradients_are_those_of_two_padded_passes(causal):
    policies = build_policy(causal), padded(build_policy(causal))
    assert policies[0].backbone.packing_fault is None
    batch = drawn_by(policies[0])
    hidden = [policy.completion_hidden(batch, MIXED) for policy in policies]
    torch.testing.assert_close(*hidden, rtol=1e-4, atol=1e-4)
    weights = torch.randn(hidden[0].shape, generator=torch.Generator().manual_seed(0))
    for h in hidden:
        (h * weights).sum().backward()
    for name, parameter in policies[0].adapter_parameters().items():
        other = policies[1].adapter_parameters()[name].grad
        assert (parameter.grad - other).abs().max() <= 2e-4 * other.abs().max().clamp_min(1e-3), name


@pytest.mark.parametrize("conditioning", ["full", "attention+prompt", "logit", "full+prompt"])
def test_packed_statistics_are_the_padded_ones_in_every_form_of_conditioning(conditioning):
    policies = (build_policy("qwen2", conditioning=conditioning) for _ in range(2))
    ours, theirs = next(policies), padded(next(policies))
    batch = drawn_by(ours)
    for a, b in zip(score(ours, batch, MIXED), score(theirs, batch, MIXED), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_completions_that_are_left_out_are_not_computed_and_do_not_matter(causal):
    policy = build_policy(causal)
    batch = drawn_by(policy)
    kept = torch.arange(12) % 3 != 1
    mask = batch.completion_mask & kept.unsqueeze(-1)
    all_of_them, some = (policy.completion_hidden(batch, MIXED, m) for m in (None, mask))
    torch.testing.assert_close(some, all_of_them[mask[batch.completion_mask]], rtol=1e-4, atol=1e-5)
    tokens = batch.prompt_mask.sum() + (batch.lengths - 1)[kept].sum()
    assert len(pack_rollout(batch, mask).ids) == tokens


def test_policy_and_reference_in_one_pass_are_those_of_two(causal):
    policy = build_policy(causal)
    batch = drawn_by(policy)
    with torch.no_grad():
        together = joint_hidden_states(policy, batch, policy.coefficients(MIXED))
        apart = policy.completion_hidden(batch, MIXED), policy.completion_hidden(batch, None)
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_scoring_joins_policy_and_reference_where_the_policy_says_so(monkeypatch):
    policy = build_policy("llama")
    batch = drawn_by(policy)
    expected = score(policy, batch, MIXED)
    monkeypatch.setattr(ConditionedPolicy, "joins_reference", True)
    passes = count_passes(policy, monkeypatch)
    ours = score(policy, batch, MIXED)
    assert passes == [2 * len(pack_rollout(batch).ids)]
    for name in ("logprob", "ref_logprob", "kl", "entropy"):
        torch.testing.assert_close(getattr(ours, name), getattr(expected, name), rtol=1e-4, atol=1e-5)


def count_passes(policy, monkeypatch) -> list[int]:
    """The tokens of every packed pass from now on."""
    passes, packed = [], policy.backbone.packed

    def counted(batch):
        passes.append(len(batch.ids))
        return packed(batch)

    monkeypatch.setattr(policy.backbone, "packed", counted)
    return passes


def test_joined_packs_keep_their_prompts_apart():
    batch = drawn_by(build_policy("qwen2"))
    one = pack_rollout(batch)
    both = join(one, one)
    assert both.prompts.tolist() == [*one.prompts.tolist(), *(one.prompts + 4).tolist()]
    parents = both.layout.parents.tolist()
    assert parents[len(parents) // 2] == -1 and parents[-1] == len(parents) // 2 + 12


def test_parts_within_a_budget_cover_all_prompts_and_exceed_it_only_alone():
    batch = drawn_by(build_policy("qwen2"))
    sizes = [len(p) + n for p, n in zip(PROMPTS, batch.lengths.view(4, 3).sum(-1).tolist())]
    for budget in (1, max(sizes), sum(sizes[:2]), 10_000):
        parts = list(within_budget(batch, budget))
        assert [i for start, stop in parts for i in range(start, stop)] == [0, 1, 2, 3]
        assert all(sum(sizes[a:b]) <= budget or b - a == 1 for a, b in parts)
    assert list(within_budget(batch, sum(sizes[:2])))[0] == (0, 2)


def test_a_model_with_attention_of_its_own_is_padded_and_says_so_once(tmp_path, caplog):
    torch.manual_seed(0)
    config = XGLMConfig(
        vocab_size=67, d_model=32, num_layers=2, attention_heads=4, ffn_dim=64, eos_token_id=2
    )
    policy = ConditionedPolicy.from_pretrained(AutoModelForCausalLM.from_config(config), ["a", "b"])
    assert "plain ones" in policy.backbone.packing_fault
    batch = drawn_by(policy)
    # Every completion alone: what it is next to must not matter.
    stats = score(policy, batch, MIXED)
    alone = score(policy, batch.prompts(2, 3), MIXED[2:3])
    torch.testing.assert_close(
        stats.logprob[6:9, : alone.logprob.shape[1]], alone.logprob, rtol=1e-4, atol=1e-4
    )
    with caplog.at_level(logging.WARNING, "clp_engine.training.building"):
        trainer_of(policy, tmp_path)
    assert len([r for r in caplog.records if "two passes" in r.message]) == 1
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        policy.checkpoint_layers()


def trainer_of(policy, folder, **options):
    from engine.conftest import build_tokenizer

    from clp_engine.training.trainer import CLPTrainer

    policy.tokenizer = policy.tokenizer or build_tokenizer("qwen2")
    config = CLPConfig(
        output_dir=str(folder), per_device_train_batch_size=8, num_generations=4, max_completion_length=6,
        max_steps=2, logging_steps=1, save_strategy="no", disable_tqdm=True, learning_rate=1e-2, **options,
    )  # fmt: skip
    rewards = {
        "a": lambda completion_ids, **_: [float(len(c)) for c in completion_ids],
        "b": lambda completion_ids, **_: [float(c[0] % 5) for c in completion_ids],
    }
    rows = [{"prompt": f"w{i} w{i + 1}"} for i in range(5, 30)]
    return CLPTrainer(policy, rewards, config, rows, processing_class=policy.tokenizer)


def adapters(policy) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in policy.adapter_parameters().items()}


def test_micro_batches_by_tokens_give_the_gradient_of_the_whole_batch(tmp_path):
    trained = []
    for tokens in (None, 30):
        policy = build_policy("qwen2")
        trainer = trainer_of(policy, tmp_path / str(tokens), max_tokens_per_microbatch=tokens)
        trainer.train()
        trained.append(adapters(policy))
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], rtol=1e-3, atol=1e-4)


def test_checkpointed_layers_train_the_same_policy_and_are_computed_twice(tmp_path):
    trained, calls = [], []
    for checkpointing in (False, True):
        policy = build_policy("llama")
        count = [0]
        layer = policy.model.model.layers[0].mlp

        def forward(x, layer=layer, inner=layer.forward, count=count):
            count[0] += torch.is_grad_enabled()
            return inner(x)

        layer.forward = forward
        trainer_of(policy, tmp_path / str(checkpointing), gradient_checkpointing=checkpointing).train()
        trained.append(adapters(policy))
        calls.append(count[0])
    assert calls[1] == 2 * calls[0] > 0
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name]), name


def test_checkpointed_layers_keep_fewer_tensors():
    kept = []
    for checkpointing in (False, True):
        policy = build_policy("llama")
        if checkpointing:
            policy.checkpoint_layers()
        batch, size = drawn_by(policy), [0]

        def pack_hook(tensor, size=size):
            size[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda t: t):
            policy.completion_hidden(batch, MIXED)
        kept.append(size[0])
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize(("beta", "log_kl", "passes"), [(0.0, False, 1), (0.0, True, 2), (0.1, False, 2)])
def test_the_reference_runs_only_where_something_needs_it(tmp_path, monkeypatch, beta, log_kl, passes):
    policy = build_policy("qwen2")
    trainer = trainer_of(policy, tmp_path, beta=beta, log_kl=log_kl)
    counted = count_passes(policy, monkeypatch)
    trainer.train()
    assert len(counted) == 2 * passes
    assert ("kl_sequence" in trainer.state.log_history[-2]) == (passes == 2)


def test_statistics_of_a_subset_are_those_of_the_whole():
    policy = build_policy("llama")
    batch = drawn_by(policy)
    mask = batch.completion_mask & (torch.arange(12) % 2 == 0).unsqueeze(-1)
    _, whole = completion_stats(policy, batch, MIXED)
    _, part = completion_stats(policy, batch, MIXED, mask=mask)
    picked = mask[batch.completion_mask]
    for name in ("logprob", "ref_logprob", "kl", "entropy"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name)[picked], rtol=1e-4, atol=1e-5)


def test_one_token_completions_are_predicted_by_prompts_alone():
    policy = build_policy("qwen2")
    batch = dataclasses.replace(drawn_by(policy, tokens=1))
    assert len(pack_rollout(batch).ids) == sum(map(len, PROMPTS))
    hidden = hidden_states(policy, batch, policy.coefficients(MIXED))
    expected = hidden_states(padded(policy), batch, policy.coefficients(MIXED))
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
