"""CLPConfig takes the arguments of TRL's GRPOConfig: each takes effect, or is refused with reason and alternative."""

import copy
import dataclasses
import pickle

import pytest
import torch
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from clp_engine.cli import main
from clp_engine.core.errors import ConfigError
from clp_engine.data import chat_template
from clp_engine.training.settings.config import CLPConfig
from clp_engine.training.trl_compat.fields import (
    ACCEPTED,
    ANYTHING,
    DEFAULT,
    FIELDS,
    REFUSED,
    SAME,
    TRANSLATED,
)

SETTINGS = {option.name: option.default for option in dataclasses.fields(CLPConfig)}
FOREIGN = sorted(name for name, field in FIELDS.items() if field.fate in (ACCEPTED, REFUSED))
NOT_HERE = "no such value"


def test_a_field_is_a_setting_exactly_where_the_table_says_so():
    assert {n for n, f in FIELDS.items() if f.fate in (SAME, DEFAULT)} <= SETTINGS.keys()
    assert not SETTINGS.keys() & set(FOREIGN)


def test_a_setting_that_is_said_to_be_the_same_has_trl_s_default_and_another_has_not():
    assert {n for n, f in FIELDS.items() if f.fate == SAME and SETTINGS[n] != f.default} == set()
    # bf16's None means something else, see its note.
    same = {n for n, f in FIELDS.items() if f.fate == DEFAULT and SETTINGS[n] == f.default}
    assert same == {"bf16"}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_field_without_a_setting_takes_what_asks_for_nothing_and_refuses_the_rest(name):
    field = FIELDS[name]
    if field.accepts == ANYTHING:
        assert getattr(CLPConfig(**{name: NOT_HERE}), name) == NOT_HERE
        return
    for value in field.accepts:
        assert getattr(CLPConfig(**{name: value}), name) == value
    with pytest.raises(ConfigError) as error:
        CLPConfig(**{name: NOT_HERE})
    assert name in str(error.value) and field.note in str(error.value) and len(field.note) > 15
    with pytest.raises(ConfigError, match=name):
        CLPConfig.from_dict({name: NOT_HERE})


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({"top_k": 0, "top_p": 1.0}, {"top_k": None, "top_p": None}),
        ({"top_k": 5, "top_p": 0.9}, {"top_k": 5, "top_p": 0.9}),
        ({"scale_rewards": True}, {"scale_rewards": "group"}),
        ({"scale_rewards": False}, {"scale_rewards": "none"}),
        ({"generation_batch_size": 32}, {"steps_per_generation": 4}),
        ({"activation_checkpointing": True}, {"gradient_checkpointing": True}),
        ({"use_bias_correction_kl": False, "beta": 0.1}, {"kl_estimator": "k3"}),
        ({"use_bias_correction_kl": True}, {"kl_estimator": "return"}),
        ({"use_bias_correction_kl": True, "kl_estimator": "k2"}, {"kl_estimator": "k2"}),
        ({"warmup_steps": 0.25}, {"warmup_steps": 0, "warmup_ratio": 0.25}),
        ({"warmup_steps": 3.0}, {"warmup_steps": 3}),
        ({"eval_steps": None, "logging_steps": 7}, {"eval_steps": 7}),
        (
            {"disable_tqdm": None, "output_dir": None, "report_to": None},
            {"disable_tqdm": False, "output_dir": "runs/clp"},
        ),
        ({"lr_scheduler_type": SchedulerType.COSINE}, {"lr_scheduler_type": "cosine"}),
        ({"eval_strategy": IntervalStrategy.EPOCH}, {"eval_strategy": "epoch"}),
        ({"model_init_kwargs": {"dtype": torch.bfloat16}}, {"base_dtype": "bfloat16"}),
        ({"model_init_kwargs": '{"dtype": "float32"}'}, {"base_dtype": "float32"}),
        ({"bf16": True}, {"base_dtype": "bfloat16"}),
        ({"vllm_importance_sampling_cap": 2.0}, {"vllm_importance_sampling_clip_max": 2.0}),
        ({"vllm_server_host": "gpu", "vllm_server_port": 1}, {"vllm_url": "http://gpu:1"}),
        ({"bf16": False}, {"base_dtype": "float32"}),
        ({"bf16": False, "model_init_kwargs": {"dtype": "bfloat16"}}, {"base_dtype": "bfloat16"}),
        ({}, {"base_dtype": None}),
        ({"reward_weights": [1, 3]}, {"conditioning": "none", "reward_scale": 4.0}),
        ({"reward_weights": [1, 3], "conditioning": "full"}, {"conditioning": "none", "carrier": "full"}),
        ({"reward_weights": [1, 3], "carrier": "logit"}, {"conditioning": "none", "carrier": "logit"}),
    ],
    ids=lambda v: ",".join(v),
)
def test_trl_s_values_are_translated(given, settings):
    config = CLPConfig(**given)
    assert {name: getattr(config, name) for name in settings} == settings
    assert CLPConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size=2 .* vllm_mode='server'"),
        ({"vllm_mode": "remote"}, "vllm_mode='remote': expected one of colocate, server"),
        ({"vllm_importance_sampling_mode": "none"}, "expected one of token_truncate, token_mask"),
        ({"vllm_importance_sampling_clip_max": None}, "truncates at a bound"),
        ({"vllm_importance_sampling_clip_min": 4.0}, "expected less than .*clip_max = 3"),
        (
            {"vllm_importance_sampling_cap": 2.0, "vllm_importance_sampling_clip_max": 3.0},
            "one thing; give one",
        ),
        ({"use_vllm": True, "vllm_server_base_url": "http://x"}, "is for vllm_mode='server'"),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_engine_args": {"seed": 1}},
            "is for vllm_mode='colocate'",
        ),
        ({"vllm_engine_args": {"max_loras": 2}}, "vllm_engine_args: max_loras is given already"),
        ({"learning_rat": 1}, r"unknown setting learning_rat; did you mean learning_rate\?"),
        ({"use_vlm": True}, r"did you mean use_vllm\?"),
        ({"logging_dir": "x"}, "TENSORBOARD_LOGGING_DIR"),
        ({"optim": "sgd"}, "'adamw_torch_fused' or 'adamw_torch'.*optimizers="),
        ({"dataloader_num_workers": True}, "expected 0"),
        (
            {"generation_batch_size": 12},
            "a multiple of per_device_train_batch_size, times the number of processes: 8",
        ),
        ({"generation_batch_size": 8, "steps_per_generation": 1}, "give one"),
        ({"warmup_steps": 0.1, "warmup_ratio": 0.1}, "give one"),
        ({"activation_checkpointing": True, "gradient_checkpointing": False}, "give one"),
        ({"use_bias_correction_kl": True, "kl_estimator": "k3"}, "give kl_estimator alone"),
        ({"loss_type": "cispo"}, "loss_type='cispo': expected one of"),
        ({"max_completion_length": None}, "max_completion_length=None: expected int"),
        ({"logging_steps": 2.5}, "whole steps, or a share"),
        ({"save_steps": 0.5, "max_generated_tokens": 100}, "max_generated_tokens leaves open"),
        ({"delta": 1.1}, r"expected more than 1 \+ epsilon_high = 1.2"),
        ({"bf16": True, "model_init_kwargs": {"dtype": "float32"}}, "give one of the two"),
        ({"model_init_kwargs": {"device_map": "auto"}}, "device_map='auto': the model is on one device"),
        ({"model_init_kwargs": {"attn_implementation": "flash_attention_2"}}, "expected eager or sdpa"),
        ({"model_init_kwargs": {"dtype": "float31"}}, "expected auto, or a dtype"),
        ({"model_init_kwargs": {"novel": 1}}, "only dtype and attn_implementation"),
        ({"reward_weights": [1, -1]}, "a reward function that returns minus it"),
        ({"reward_weights": [0, 0]}, "one above 0"),
        ({"reward_weights": []}, r"reward_weights=\[\]: expected a number"),
        (
            {"reward_weights": [1, 1], "conditioning": "lora+prompt"},
            "is for several; give conditioning='none'",
        ),
        ({"model_init_kwargs": "{x"}, "model_init_kwargs='{x': expected dict"),
        ({"reward_weights": [1, 1], "fixed_weights": [0.5, 0.5]}, "fixed_weights draw it"),
        ({"reward_weights": [1, 1], "weight_sampler": "grid"}, "weight_sampler draw it"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_the_reason(given, message):
    for make in (lambda: CLPConfig(**given), lambda: CLPConfig.from_dict(given)):
        with pytest.raises(ConfigError, match=message):
            make()


def test_a_config_stays_a_dataclass():
    config = CLPConfig("runs/here", push_to_hub=False, do_train=True, reward_weights=[2.0, 1.0])
    assert config.output_dir == "runs/here" and config.do_train and not config.push_to_hub
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
        assert other == config
    assert copy.deepcopy(config).do_train
    assert "do_train" not in config.to_dict() and not hasattr(config, "no_such_field")
    with pytest.raises(TypeError, match="output_dir"):
        CLPConfig("runs/here", output_dir="there")


def test_a_script_can_read_what_holds_of_a_field_that_is_no_setting():
    config = CLPConfig(steps_per_generation=2, gradient_checkpointing=True)
    assert (config.generation_batch_size, config.activation_checkpointing) == (16, True)
    assert (config.use_vllm, config.disable_dropout, config.use_bias_correction_kl) == (False, True, True)


def test_settings_that_are_mappings_are_flags_as_yaml_and_as_json(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("clp_engine.training.running.train", lambda spec, config, **_: seen.append(config))
    flags = {
        "--lr-scheduler-kwargs": "{num_cycles: 2}",
        "--model-init-kwargs": '{"dtype": "float32"}',
        "--eval-steps": "0.5",
        "--reward-weights": "1,3",
    }
    words = [word for pair in flags.items() for word in pair]
    assert main.main(["train", "--task", "docsum", "--output-dir", str(tmp_path / "run"), *words]) == 0
    assert seen[0].lr_scheduler_kwargs == {"num_cycles": 2} and seen[0].eval_steps == 0.5
    assert seen[0].base_dtype == "float32" and seen[0].reward_weights == [1.0, 3.0]


class _Tokenizer:
    chat_template = "{{ thinking }}|{{ note }}|{{ many }}"


def test_values_of_the_chat_template_are_written_into_it_and_leave_the_tokenizer_given_alone():
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    tokenizer = _Tokenizer()
    changed = chat_template.with_values(
        tokenizer, {"thinking": False, "note": "it's %}", "many": [1, {"a": None}]}
    )
    shown = ImmutableSandboxedEnvironment().from_string(changed.chat_template).render(thinking=True)
    assert shown == "False|it's %}|[1, {'a': None}]"
    assert tokenizer.chat_template == _Tokenizer.chat_template
    assert chat_template.with_values(tokenizer, None) is tokenizer
    with pytest.raises(ConfigError, match="the tokenizer has none"):
        chat_template.with_values(object(), {"thinking": False})
    with pytest.raises(ConfigError, match="expected text, numbers, lists"):
        chat_template.with_values(tokenizer, {"thinking": object()})


def test_every_field_has_a_fate():
    assert {field.fate for field in FIELDS.values()} == {SAME, DEFAULT, TRANSLATED, ACCEPTED, REFUSED}
