"""What TRL's settings do in a run: reward_weights, dtypes, epochs, shares of steps, two-sided clipping, peft's LoraConfig."""

import json
import logging

import pytest
import torch
from engine.conftest import build_model, build_policy, build_tokenizer
from engine.training.test_trainer import ROWS, build_trainer, high_words, log_of, low_words
from peft import LoraConfig, PromptTuningConfig
from transformers import TrainerCallback

from clp_engine import CLPConfig, CLPTrainer, ConditionedPolicy, ConfigError
from clp_engine.cli.info import describe
from clp_engine.training.runs.run_spec import RunSpec


def adapters(trainer):
    return {name: p.detach().clone() for name, p in trainer.policy.adapter_parameters().items()}


# -- reward_weights ----------------------------------------------------------------------------------------------------


def test_reward_weights_train_what_one_reward_of_their_sum_trains(tmp_path):
    def both(completions, **_):
        return [3.0 * x + 0.5 * y for x, y in zip(low_words(completions), high_words(completions))]

    weighted = build_trainer(tmp_path / "two", reward_weights=[3.0, 0.5], beta=0.1, learning_rate=1e-2)
    single = build_trainer(
        tmp_path / "one", rewards={"both": both}, conditioning="none", beta=0.1, learning_rate=1e-2
    )
    for trainer in (weighted, single):
        trainer.train()
    for name, value in adapters(single).items():
        torch.testing.assert_close(adapters(weighted)[name], value, rtol=0, atol=1e-6)
    logs = [log_of(tmp_path / name) for name in ("two", "one")]
    for ours, theirs in zip(*logs):
        assert ours["reward"] == pytest.approx(theirs["reward"], abs=1e-6)
        assert ours["reward_std"] == pytest.approx(theirs["reward_std"], abs=1e-6)
        assert ours["reward"] == pytest.approx(
            3 * ours["rewards/low/mean"] + 0.5 * ours["rewards/high/mean"], abs=1e-5
        )


def test_a_run_with_reward_weights_says_once_what_it_gives_up(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "clp_engine"):
        build_trainer(tmp_path, reward_weights=[1.0, 2.0])
    said = [record.message for record in caplog.records if "reward_weights" in record.message]
    assert len(said) == 1 and "steerable between low, high" in said[0]


def test_a_policy_with_a_delta_per_objective_can_be_trained_on_with_reward_weights(tmp_path):
    trainer = build_trainer(
        tmp_path, model=build_policy(objectives=("low", "high")), reward_weights=[3, 1], max_steps=1
    )
    trainer.train()
    assert trainer.policy.spec.conditioning == "lora"
    assert torch.equal(trainer.sampler.sample(2, torch.Generator()).weights, torch.tensor([[0.75, 0.25]] * 2))


def test_reward_weights_must_fit_the_rewards(tmp_path):
    with pytest.raises(ConfigError, match=r"reward_weights has 3 entries for 2 rewards \(low, high\)"):
        build_trainer(tmp_path, reward_weights=[1, 2, 3])


def test_reward_weights_are_resumed(tmp_path):
    options = {"reward_weights": [2, 1], "save_strategy": "steps", "save_steps": 2}
    build_trainer(tmp_path, **options).train()
    build_trainer(tmp_path, **options).train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    with pytest.raises(ConfigError, match="other settings for reward_weights"):
        build_trainer(tmp_path, **options | {"reward_weights": [1, 1]}).train(resume_from_checkpoint=True)


# -- the base model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build_model("llama").save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return str(path)


def test_bf16_keeps_the_base_in_bfloat16_and_the_adapters_in_float32(tmp_path, checkpoint):
    trainer = build_trainer(tmp_path, model=checkpoint, bf16=True, max_steps=2, use_cpu=True)
    before = adapters(trainer)
    trainer.train()
    assert trainer.policy.model.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in before.values())
    assert any(not torch.equal(before[name], p) for name, p in adapters(trainer).items())


def test_model_init_kwargs_reach_the_loading_of_the_base(tmp_path, checkpoint):
    trainer = build_trainer(
        tmp_path, model=checkpoint, model_init_kwargs={"dtype": "float64", "attn_implementation": "eager"}
    )
    assert trainer.policy.model.dtype == torch.float64
    assert trainer.policy.config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match="loaded already"):
        build_trainer(tmp_path, model_init_kwargs={"dtype": "float64"})
    with pytest.raises(ConfigError, match="loaded already, in torch.float32"):
        build_trainer(tmp_path, bf16=True)


def test_info_counts_the_base_in_the_dtype_that_is_asked_for(checkpoint):
    spec = RunSpec(checkpoint, ("low",))
    whole, half = (describe(spec, CLPConfig(bf16=bf16))["memory"]["base_bytes"] for bf16 in (False, True))
    assert whole == 2 * half > 0


def test_values_for_the_chat_template_are_used_and_saved_with_the_policy(tmp_path, checkpoint):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{{ 'w1 ' if thinking else 'w2 ' }}{% for m in messages %}{{ m['content'] }} {% endfor %}"
    )
    rows = [{"prompt": [{"role": "user", "content": "w9 w8"}]}] * 4
    args = CLPConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        max_completion_length=4,
        chat_template_kwargs={"thinking": True},
        disable_tqdm=True,
    )
    trainer = CLPTrainer(
        checkpoint, lambda completions, **_: [0.0] * len(completions), args, rows, None, tokenizer
    )
    assert trainer.train_dataset.batch([0]).token_ids == [tokenizer("w1 w9 w8").input_ids]
    trainer.train()
    kept = ConditionedPolicy.load(tmp_path / "policy").tokenizer
    assert kept.apply_chat_template(rows[0]["prompt"], tokenize=False).split() == ["w1", "w9", "w8"]


# -- when things happen ------------------------------------------------------------------------------------------------


class Recorder(TrainerCallback):
    """Events as (name, step)."""

    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            return lambda args, state, control, **_: self.events.append((name, state.global_step))
        return super().__getattribute__(name)


def steps_of(recorder, event):
    return [step for name, step in recorder.events if name == event]


def test_an_epoch_ends_with_the_step_that_reaches_its_end_and_the_last_one_with_the_run(tmp_path):
    recorder = Recorder()
    build_trainer(tmp_path, max_steps=8, callbacks=[recorder]).train()  # 12 prompts, 4 a step
    assert steps_of(recorder, "on_epoch_begin") == [0, 3, 6]
    assert steps_of(recorder, "on_epoch_end") == [3, 6, 8]


def test_a_finished_run_that_is_resumed_ends_no_epoch_again(tmp_path):
    build_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    recorder = Recorder()
    trainer = build_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2, callbacks=[recorder])
    trainer.train(resume_from_checkpoint=True)
    assert steps_of(recorder, "on_epoch_end") == [] and steps_of(recorder, "on_train_end") == [2]


def test_epochs_are_logged_evaluated_and_saved(tmp_path):
    recorder = Recorder()
    build_trainer(
        tmp_path,
        max_steps=6,
        callbacks=[recorder],
        eval_dataset=ROWS[:2],
        **{f"{what}_strategy": "epoch" for what in ("logging", "eval", "save")},
    ).train()
    assert steps_of(recorder, "on_evaluate") == steps_of(recorder, "on_save") == [3, 6]
    assert [(e["step"], "loss" in e) for e in log_of(tmp_path)] == [
        (3, True),
        (3, False),
        (6, True),
        (6, False),
    ]
    assert (tmp_path / "checkpoint-6").is_dir()


def test_nothing_is_logged_with_logging_strategy_no(tmp_path):
    build_trainer(tmp_path, logging_strategy="no", max_steps=2).train()
    assert log_of(tmp_path) == []


def test_steps_below_one_are_a_share_of_all(tmp_path):
    recorder = Recorder()
    build_trainer(
        tmp_path,
        max_steps=8,
        callbacks=[recorder],
        logging_steps=0.25,
        eval_strategy="steps",
        eval_steps=0.5,
        save_strategy="steps",
        save_steps=0.4,
        warmup_steps=0.5,
        lr_scheduler_type="linear",
        eval_dataset=ROWS[:2],
    ).train()
    assert steps_of(recorder, "on_evaluate") == [4, 8] and steps_of(recorder, "on_save") == [4, 8]
    logged = [e for e in log_of(tmp_path) if "loss" in e]
    assert [e["step"] for e in logged] == [2, 4, 6, 8]
    rates = [5e-3 * rate for rate in (0, 1 / 4, 2 / 4, 3 / 4)]  # the first four steps warm up
    assert [e["learning_rate"] for e in logged[:2]] == pytest.approx([sum(rates[:2]) / 2, sum(rates[2:]) / 2])


def test_a_schedule_has_its_own_settings(tmp_path):
    options = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 4e-3}}
    build_trainer(tmp_path, **options).train()
    assert 4e-3 < log_of(tmp_path)[-1]["learning_rate"] < 5e-3


def test_eval_on_start_evaluates_before_the_first_step_with_generations_of_its_own(tmp_path):
    sizes = []

    def counting(completions, **_):
        sizes.append(len(completions))
        return low_words(completions)

    build_trainer(
        tmp_path,
        rewards={"low": counting},
        eval_on_start=True,
        eval_dataset=ROWS[:3],
        num_generations_eval=1,
        max_steps=1,
    ).train()
    assert sizes == [3, 16]
    assert [e["step"] for e in log_of(tmp_path)] == [0, 1]
    with pytest.raises(ConfigError, match="there is no eval_dataset"):
        build_trainer(tmp_path, eval_on_start=True)


def test_saving_into_the_run_s_folder_as_trl_s_scripts_do_leaves_the_run_there(tmp_path):
    trainer = build_trainer(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    before = {path.name for path in tmp_path.iterdir()}
    assert {"checkpoint-4", "log.jsonl", "policy"} <= before
    for _ in range(2):
        trainer.save_model(trainer.args.output_dir)
    after = {path.name for path in tmp_path.iterdir()}
    assert after > before and "clp_config.json" in after
    loaded = ConditionedPolicy.load(tmp_path, base_model=build_model("qwen2"))
    for name, value in loaded.adapter_parameters().items():
        assert torch.equal(value, trainer.policy.adapter_parameters()[name])


# -- peft_config -------------------------------------------------------------------------------------------------------


def test_peft_s_scaling_is_used_whichever_form_it_has(tmp_path):
    plain, stabilised = (
        build_trainer(
            tmp_path, peft_config=LoraConfig(r=4, lora_alpha=6, use_rslora=rs, target_modules="all-linear")
        )
        for rs in (False, True)
    )
    assert plain.policy.spec.scalings == (1.5, 1.5) and stabilised.policy.spec.scalings == (3.0, 3.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout=0.1: dropout would"),
        ({"use_dora": True}, "use_dora=True: a magnitude"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"init_lora_weights": "gaussian"}, "A Kaiming-uniform and B zero"),
        ({"inference_mode": True}, "freezes the adapters"),
        ({"layer_replication": [(0, 1)]}, "layer_replication"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying=True: expected False"),
        ({"task_type": "SEQ_CLS"}, "Qwen2ForCausalLM is a CAUSAL_LM"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens, a Embedding"),
        ({"target_modules": ["lm_head"]}, "shares its weight with the input embedding"),
        ({"target_modules": ["nothing"]}, "leaves no layer"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "leaves no layer"),
        (
            {"rank_pattern": {"q_proj": 2}},
            "rank_pattern gives model.layers.0.self_attn.q_proj 2 instead of 4",
        ),
        ({"alpha_pattern": {"layers.1.*": 2}}, "alpha_pattern gives model.layers.1"),
        ({"lora_alpha": 0}, "lora_alpha=0: expected a number above 0"),
        ({"lora_alpha": -4}, "lora_alpha=-4: expected a number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan: expected"),
    ],
)
def test_what_a_lora_config_asks_for_and_cannot_have_is_refused(tmp_path, options, message):
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", **options})
    with pytest.raises(ConfigError, match=message):
        build_trainer(tmp_path, peft_config=config)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": ["q_proj", "qproj"]}, "target_modules 'qproj' matches no layer"),
        ({"target_modules": ["q_proj", "b", "a"]}, "target_modules 'a', target_modules 'b' match no layer"),
        ({"exclude_modules": ["lm_haed"]}, "exclude_modules 'lm_haed' matches no layer"),
        ({"exclude_modules": ".*haed"}, r"exclude_modules '\.\*haed' matches no layer"),
        ({"rank_pattern": {"qproj": 2}}, "rank_pattern 'qproj' matches no layer"),
        ({"alpha_pattern": {r"layers\.9\..*": 2}}, "alpha_pattern '.*' matches no layer"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [1, 99]},
            "layers_to_transform 99 matches no layer",
        ),
        (
            {
                "target_modules": ["q_proj"],
                "layers_to_transform": [1],
                "layers_pattern": ["layers", "blocks"],
            },
            "layers_pattern 'blocks' matches no layer",
        ),
    ],
)
def test_a_part_of_a_lora_config_that_matches_nothing_is_said(tmp_path, options, said):
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options})
    with pytest.warns(UserWarning, match=said):
        build_trainer(tmp_path, peft_config=config)


@pytest.mark.filterwarnings("error:peft_config")
def test_a_lora_config_that_matches_is_taken_without_a_word(tmp_path):
    for options in (
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"target_modules": "all-linear", "exclude_modules": ["lm_head", "k_proj"]},
        {"target_modules": r".*\.q_proj", "rank_pattern": {"q_proj": 4, r".*\.1\..*q_proj": 4}},
        {"target_modules": None},
    ):
        build_trainer(tmp_path, peft_config=LoraConfig(r=4, **options))


def test_adapters_are_described_once(tmp_path):
    for own in ({"rank": 8}, {"lora_alpha": 8.0}, {"target_modules": ["q_proj"]}):
        with pytest.raises(ConfigError, match=f"{next(iter(own))} in args and peft_config"):
            build_trainer(tmp_path, peft_config=LoraConfig(r=4), **own)
    with pytest.raises(ConfigError, match="expected peft's LoraConfig"):
        build_trainer(tmp_path, peft_config=PromptTuningConfig(num_virtual_tokens=2))


def test_a_policy_of_a_lora_config_is_saved_and_loaded_with_its_layers(tmp_path):
    config = LoraConfig(r=2, target_modules=r".*layers\.1\..*(q|down)_proj", use_rslora=True)
    trainer = build_trainer(tmp_path, peft_config=config)
    trainer.save_model()
    loaded = ConditionedPolicy.load(tmp_path / "policy", base_model=build_model("qwen2"))
    assert (
        list(loaded.layers)
        == list(trainer.policy.layers)
        == [
            "model.layers.1.self_attn.q_proj",
            "model.layers.1.mlp.down_proj",
        ]
    )
    assert json.loads((tmp_path / "policy" / "clp_config.json").read_text())["ranks"] == [2, 2]
