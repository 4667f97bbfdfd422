"""Prompt and completion fit into the positions that the model has; nobody's row changes another's rotary embedding."""

import pytest
import torch
from engine.conftest import build_model, build_policy, build_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from clp_engine.core.errors import ConfigError
from clp_engine.models.positions import Room
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.rollouts.rollout import rollout
from clp_engine.rollouts.scoring import score
from clp_engine.rollouts.types import SamplingParams

SMALL = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1,
}  # fmt: skip


def longrope():
    """Phi-3's: other factors for every row once the longest has more than 16 tokens."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [8.0] * 8,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    return Phi3Config(**SMALL, max_position_embeddings=64, original_max_position_embeddings=16, rope_parameters=rope)


def dynamic():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return LlamaConfig(**SMALL, max_position_embeddings=16, rope_parameters=rope)


@pytest.mark.parametrize("make", [longrope, dynamic])
def test_lengths_at_which_one_row_s_factors_are_another_s_are_refused(make):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make())
    policy = ConditionedPolicy.from_pretrained(model, ["a"], tokenizer=build_tokenizer(), rank=2)
    assert policy.room.tokens == 16 and "rotary embedding" in policy.room.cause
    one = policy.conditions([1.0], rows=2)

    def drawn(new):
        return rollout(policy, [[5] * 9, [6, 7]], one, num_generations=2, sampling=SamplingParams(new), seed=1)

    with pytest.raises(ConfigError, match="prompt 0 has 9 tokens and its completion up to 8; this model has room for 16"):
        drawn(8)
    # Up to there a row is read as it is read alone.
    together = drawn(7)
    alone = rollout(
        policy, [[6, 7]], one[:1], num_generations=2, sampling=SamplingParams(7), row_seeds=seeds_of(2)[2:]
    )
    assert together.token_lists()[2:] == alone.token_lists()
    scores = score(policy, together, one).logprob
    torch.testing.assert_close(scores, together.logprobs, rtol=1e-4, atol=1e-4)


def seeds_of(prompts, seed=1, group=2):
    from clp_engine.core.seeds import derive

    return derive(seed, torch.arange(prompts * group))


def test_an_encoder_decoder_counts_prompt_and_completion_apart():
    assert Room.of(build_model("t5")).tokens is None
    room = Room.of(build_model("bart"))
    assert room.apart
    room.check(room.tokens, room.tokens)
    with pytest.raises(ConfigError, match=f"room for {room.tokens}"):
        room.check(1, room.tokens + 1)


def test_a_model_s_own_limit_is_said_with_both_numbers():
    policy = build_policy("gpt2")
    limit = policy.model.config.n_positions
    with pytest.raises(ConfigError, match=rf"up to {limit}; this model has room for {limit} \(max_position_embeddings"):
        policy.generate("w1 w2", max_new_tokens=limit)
