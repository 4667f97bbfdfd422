"""Prompt and completion fit into the positions that the model has; nobody's row changes another's rotary embedding."""

import asyncio

import pytest
import torch
from engine.conftest import VOCAB, build_classifier, build_model, build_policy, build_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from clp_engine.core.errors import ConfigError
from clp_engine.data.positions import Room
from clp_engine.data.rewards import ClassifierReward
from clp_engine.evaluation.evaluate import evaluate
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.rollouts.rollout import rollout
from clp_engine.rollouts.scoring import score
from clp_engine.rollouts.types import SamplingParams
from clp_engine.serving.requests import GenerateRequest
from clp_engine.serving.served import Served
from clp_engine.serving.session import Session
from clp_engine.training.settings.config import CLPConfig
from clp_engine.training.trainer import CLPTrainer

SMALL = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1,
}  # fmt: skip


REWARDS = {
    "a": lambda completion_ids, **_: [float(len(c)) for c in completion_ids],
    "b": lambda prompts, **_: [1.0] * len(prompts),
}


def longrope():
    """Phi-3's: other factors for every row once the longest has more than 16 tokens."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [8.0] * 8,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    return Phi3Config(
        **SMALL, max_position_embeddings=64, original_max_position_embeddings=16, rope_parameters=rope
    )


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
        return rollout(
            policy, [[5] * 9, [6, 7]], one, num_generations=2, sampling=SamplingParams(new), seed=1
        )

    with pytest.raises(
        ConfigError, match="prompt 0 has 9 tokens and its completion up to 8; this model has room for 16"
    ):
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
    with pytest.raises(
        ConfigError, match=rf"up to {limit}; this model has room for {limit} \(max_position_embeddings"
    ):
        policy.generate("w1 w2", max_new_tokens=limit)


# -- tokens that the model has no embedding of ----------------------------------------------------------------------------


def with_tokens(count: int, **special):
    """A tokenizer with `count` tokens more than the model knows."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(count)])
    tokenizer.add_special_tokens(special)
    return tokenizer


@pytest.fixture
def larger():
    """A policy whose tokenizer has one token that the model has not."""
    with pytest.warns(
        UserWarning, match=rf"{VOCAB + 1} tokens .* embedding {VOCAB} rows: .*resize_token_embeddings"
    ):
        return ConditionedPolicy.from_pretrained(build_model("qwen2"), ["a", "b"], tokenizer=with_tokens(1))


UNKNOWN = rf"has the token {VOCAB} \('<new0>'\), and the model's embedding {VOCAB} rows: .*embeddings\({VOCAB + 1}\)"


@pytest.mark.parametrize("kind", ["pad", "eos", "bos"])
def test_a_special_token_without_an_embedding_is_refused_where_the_policy_is_made(kind):
    tokenizer = with_tokens(0, **{f"{kind}_token": "<other>"})
    with pytest.raises(
        ConfigError,
        match=rf"{kind}_token '<other>' is token {VOCAB}, and .* {VOCAB} rows: .*embeddings\({VOCAB + 1}\)",
    ):
        ConditionedPolicy.from_pretrained(build_model("qwen2"), ["a"], tokenizer=tokenizer)
    policy = build_policy("qwen2")
    with pytest.raises(ConfigError, match=f"{kind}_token"):
        policy.tokenizer = tokenizer


def test_after_resizing_the_same_tokenizer_is_taken_and_so_is_a_larger_embedding(recwarn):
    for size in (VOCAB + 1, 2 * VOCAB):
        model = build_model("qwen2")
        model.resize_token_embeddings(size)
        policy = ConditionedPolicy.from_pretrained(
            model, ["a"], tokenizer=with_tokens(0, pad_token="<other>"), rank=2
        )
        assert len(policy.generate("w1 <other>", max_new_tokens=2)) == 1
    assert not [w for w in recwarn if "resize" in str(w.message)]


def test_every_prompt_is_checked_before_anything_is_computed(larger, tmp_path, monkeypatch):
    monkeypatch.setattr("clp_engine.training.running.load_policy", lambda *_: larger)
    rows = [{"prompt": "w1 w2"}, {"prompt": "w3 <new0>"}]
    with pytest.raises(ConfigError, match="prompt 1 " + UNKNOWN):
        larger.generate(["w1", "w2 <new0>"], max_new_tokens=2)
    with pytest.raises(ConfigError, match="row 1 of the dataset " + UNKNOWN):
        evaluate(larger, REWARDS, rows)
    with pytest.raises(ConfigError, match="input_ids " + UNKNOWN):
        larger(torch.tensor([[5, VOCAB]]))
    with pytest.raises(ConfigError, match="prompt 0 " + UNKNOWN):
        rollout(larger, [[5, VOCAB]], larger.conditions())
    session = Session(Served(tmp_path))
    with pytest.raises(ConfigError, match="the text " + UNKNOWN):
        asyncio.run(session.generate(GenerateRequest("w2 <new0>", {"a": 0.5, "b": 0.5})))
    with pytest.raises(ConfigError, match="row 1 of the dataset " + UNKNOWN):
        trainer_of(larger, tmp_path, rows)


def test_rows_that_the_model_cannot_read_can_be_left_out(larger, tmp_path):
    rows = [
        {"prompt": "w1 <new0>"},
        {"prompt": "w1 w2"},
        {"prompt": "w3 w4"},
        {"prompt": " ".join(["w1"] * 126)},
    ]
    trainer = trainer_of(larger, tmp_path, rows, skip_bad_rows=True)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_prompt_too_long_is_said_before_the_first_step_with_its_row(tmp_path):
    rows = [{"prompt": "w1 w2"}] * 5 + [{"prompt": " ".join(["w1"] * 126)}]
    policy = build_policy("qwen2")
    message = r"row 5 of the dataset has 126 tokens and its completion up to 4; this model has room for 128"
    for dataset in (rows, [{"prompt": "w1"}]):
        with pytest.raises(ConfigError, match=message):
            trainer_of(policy, tmp_path, dataset, eval_dataset=rows)
    trainer = trainer_of(policy, tmp_path, iter([rows[0], rows[5]]))
    with pytest.raises(ConfigError, match=message.replace("5", "1", 1)):  # a stream's row where it is reached
        trainer.train()
    with pytest.raises(ConfigError, match="row 5 of the dataset has 126 tokens"):
        evaluate(policy, REWARDS, rows, sampling=SamplingParams(4))


def test_padding_without_an_embedding_is_refused_where_no_tokenizer_says_it():
    policy = ConditionedPolicy.from_pretrained(build_model("qwen2"), ["a"])
    policy.model.generation_config.pad_token_id = VOCAB
    with pytest.raises(
        ConfigError, match=f"padding has the token {VOCAB}, and the model's embedding {VOCAB} rows"
    ):
        rollout(policy, [[5, 6], [7]], policy.conditions(rows=2))


def test_a_reward_model_s_tokenizer_is_checked_as_the_policy_s_is():
    model = build_classifier(pad_token_id=0)
    with pytest.raises(ConfigError, match=rf"reward model 'LlamaFor.*pad_token '<other>' is token {VOCAB}"):
        ClassifierReward(model, with_tokens(0, pad_token="<other>"))
    with pytest.warns(UserWarning, match="resize_token_embeddings"):
        reward = ClassifierReward(model, with_tokens(1))
    assert len(reward(["w1"], [" w2"])) == 1
    with pytest.raises(ConfigError, match="a text for the reward model 'LlamaFor.*' " + UNKNOWN):
        reward(["w1"], [" <new0>"])


@pytest.mark.parametrize(
    "part", [{"type": "image", "url": "x.png"}, {"type": "image_url"}, {"type": "video"}, {}]
)
def test_a_message_with_anything_but_text_is_refused_wherever_prompts_are_read(part):
    policy = build_policy("qwen2")
    policy.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    chat = [{"role": "user", "content": [{"type": "text", "text": "w1"}, part]}]
    with pytest.raises(
        ConfigError, match=r"prompt 1: a message has a part of type .*; prompts are text here"
    ):
        policy.generate([[{"role": "user", "content": "w1"}], chat], max_new_tokens=2)
    with pytest.raises(ConfigError, match=r"row 0 of the dataset: a message has a part of type"):
        evaluate(policy, REWARDS, [{"prompt": chat}])


def trainer_of(policy, folder, rows, eval_dataset=None, **options):
    args = CLPConfig(
        output_dir=str(folder), per_device_train_batch_size=4, max_completion_length=4,
        max_steps=1, save_strategy="no", disable_tqdm=True, **{"num_generations": 2, **options},
    )  # fmt: skip
    return CLPTrainer(policy, REWARDS, args, rows, eval_dataset=eval_dataset)
