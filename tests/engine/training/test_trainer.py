"""The trainer: TRL's conventions, a policy that heeds its weights, exact resume, and errors that say what to do."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from engine.conftest import build_classifier, build_model, build_policy, build_tokenizer
from peft import LoraConfig
from transformers import TrainerCallback

from clp_engine.core.errors import ConfigError
from clp_engine.data.rewards import RewardSet
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.training.checkpoints import checkpoint
from clp_engine.training.settings.config import CLPConfig
from clp_engine.training.trainer import CLPTrainer

ROWS = [{"prompt": f"w{i} w{i + 1} w{2 * i % 50}", "tag": i} for i in range(12)]


def low_words(completions, **_):
    """Share of words below w30."""
    return [
        sum(int(w[1:]) < 30 for w in c.split() if w[1:].isdigit()) / max(len(c.split()), 1)
        for c in completions
    ]


def high_words(completions, **_):
    return [1 - x for x in low_words(completions)]


def settings(tmp_path, **changes):
    return CLPConfig(
        **{
            "output_dir": str(tmp_path),
            "num_generations": 4,
            "per_device_train_batch_size": 16,
            "max_steps": 4,
            "max_completion_length": 8,
            "logging_steps": 1,
            "learning_rate": 5e-3,
            "rank": 4,
            "disable_tqdm": True,
            "save_strategy": "no",
            "lr_scheduler_type": "constant",
            **changes,
        }
    )


def build_trainer(tmp_path, *, family="qwen2", rewards=None, model=None, **changes):
    extra = {
        k: changes.pop(k)
        for k in (
            "callbacks",
            "condition_sampler",
            "eval_dataset",
            "objective",
            "peft_config",
            "processing_class",
            "reference",
        )
        if k in changes
    }
    extra.setdefault("processing_class", build_tokenizer(family))
    if "peft_config" in extra:
        changes.setdefault("rank", CLPConfig.rank)  # the config has one of its own
    return CLPTrainer(
        model or build_model(family),
        {"low": low_words, "high": high_words} if rewards is None else rewards,
        settings(tmp_path, **changes),
        ROWS,
        **extra,
    )


def log_of(path):
    """Of steps and evaluations, without the last line, the totals of a run that ended."""
    entries = [json.loads(line) for line in (Path(path) / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "train_runtime" not in entry]


def timeless(metrics):
    return {k: v for k, v in metrics.items() if "time" not in k and not k.endswith("per_second")}


def test_training_makes_the_policy_heed_its_weights(tmp_path):
    trainer = build_trainer(
        tmp_path,
        max_steps=60,
        per_device_train_batch_size=32,
        alpha=0.005,
        learning_rate=3e-2,
        max_grad_norm=0,
    )
    trainer.train()
    prompts = [row["prompt"] for row in ROWS] * 2
    means = [
        sum(low_words(trainer.policy.generate(prompts, w, max_new_tokens=8))) / len(prompts)
        for w in ({"low": 1.0}, {"low": 0.5, "high": 0.5}, {"high": 1.0})
    ]
    assert means[0] > means[1] > means[2] and means[0] - means[2] > 0.25, means
    reloaded = ConditionedPolicy.load(tmp_path / "policy", base_model=build_model("qwen2"))
    assert reloaded.generate(prompts, {"low": 1.0}, max_new_tokens=8) == trainer.policy.generate(
        prompts, {"low": 1.0}, max_new_tokens=8
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_estimator": "exact"},
        {"kl_estimator": "mixed"},
        {"kl_estimator": "k2"},
        {"kl_estimator": "k3"},
        {"num_iterations": 2},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
        {"beta": 0.1},
        {"alpha_range": [0.05, 0.5], "kl_conditioning": "odds"},
        {"alpha_grid": [0.05, 0.3, 1.0], "kl_conditioning": "linear"},
        {"alpha_grid": [1.0, 0.05], "kl_conditioning": "odds", "kl_estimator": "exact"},
        {"alpha_grid": [0.05, 1.0], "kl_estimator": "mixed"},
        {"beta_grid": [0.02, 0.5], "kl_conditioning": "odds"},
        {"weight_sampler": "uniform", "stratified_weights": True},
        {"loss_type": "dapo", "scale_rewards": "group"},
        {"mask_truncated_completions": True, "loss_type": "dr_grpo"},
        {"weight_sampler": "grid"},
        {"baseline": "none"},
        {"weight_sampler": "fixed", "fixed_weights": [0.3, 0.7]},
        {"target_modules": ["q_proj", "down_proj"]},
    ],
    ids=lambda c: next(iter(c)) + "=" + str(next(iter(c.values()))),
)
def test_every_option_trains(tmp_path, changes):
    trainer = build_trainer(tmp_path, **changes)
    before = {n: p.clone() for n, p in trainer.policy.adapter_parameters().items()}
    result = trainer.train()
    assert result.global_step == 4 and math.isfinite(result.training_loss)
    assert any(not torch.equal(before[n], p) for n, p in trainer.policy.adapter_parameters().items())
    assert all(math.isfinite(v) for entry in log_of(tmp_path) for v in entry.values())


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "llama-tied", "t5-v1.1"])
def test_other_families_train(tmp_path, family):
    assert build_trainer(tmp_path, family=family, max_steps=2).train().global_step == 2


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path):
    adapters = []
    for split in (
        {"per_device_train_batch_size": 16},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    ):
        trainer = build_trainer(tmp_path, max_steps=2, max_grad_norm=0, overwrite_output_dir=True, **split)
        trainer.train()
        adapters.append(
            torch.cat([p.detach().flatten() for p in trainer.policy.adapter_parameters().values()])
        )
    # Adam's first steps are sign-like, so compare where the gradient is not negligible.
    assert (adapters[0] - adapters[1]).abs().median() < 1e-6


def test_metrics_have_trl_s_names_and_ours(tmp_path):
    build_trainer(tmp_path, max_steps=2).train()
    names = set(log_of(tmp_path)[0])
    trl = {
        "num_tokens",
        "step_time",
        "completions/mean_length",
        "completions/min_length",
        "completions/max_length",
        "completions/clipped_ratio",
        "rewards/low/mean",
        "rewards/low/std",
        "rewards/high/mean",
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "kl",
        "entropy",
        "sampling/sampling_logp_difference/mean",
        "loss",
        "grad_norm",
        "sampling/sampling_logp_difference/max",
        "learning_rate",
        "epoch",
        "step",
    }
    ours = {"time/rollout", "time/reward", "time/update", "time/optimizer", "kl_sequence"}
    assert trl | ours <= names, (trl | ours) - names
    assert any(n.startswith("rewards/low/weight_") for n in names)
    first = log_of(tmp_path)[0]
    assert first["sampling/sampling_logp_difference/max"] < 1e-3
    assert abs(first["kl"]) < 1e-6  # the policy starts at the reference


def test_reward_functions_are_called_as_trl_calls_them(tmp_path):
    seen = {}

    def recording(**kwargs):
        seen.update(kwargs)
        kwargs["log_extra"]("note", ["x"] * len(kwargs["completions"]))
        kwargs["log_metric"]("my_metric", 3.0)
        return [1.0] * len(kwargs["completions"])

    async def asynchronous(completions, **_):
        return [None if i % 2 else 0.5 for i in range(len(completions))]

    trainer = build_trainer(tmp_path, rewards=[recording, asynchronous], max_steps=1, log_completions=True)
    trainer.train()
    assert {
        "prompts",
        "completions",
        "completion_ids",
        "tag",
        "trainer_state",
        "log_extra",
        "log_metric",
    } <= set(seen)
    assert len(seen["prompts"]) == len(seen["completions"]) == len(seen["tag"]) == 16
    assert seen["tag"][:4] == [seen["tag"][0]] * 4 and seen["trainer_state"] is trainer.state
    entry = log_of(tmp_path)[0]
    assert entry["my_metric"] == 3.0 and entry["rewards/asynchronous/mean"] == 0.5
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and rows[1]["rewards"]["asynchronous"] is None and rows[0]["note"] == "x"


def test_a_sequence_classifier_is_a_reward(tmp_path):
    model = build_classifier(pad_token_id=0).eval()
    model.save_pretrained(tmp_path / "judge")
    build_tokenizer().save_pretrained(tmp_path / "judge")
    texts = (["w1 w2", "w3"], [" w4", " w5 w6"])
    scores = RewardSet(str(tmp_path / "judge"))(*texts, [[1], [1]], {})
    with torch.no_grad():
        expected = [
            model(**build_tokenizer()(p + c, return_tensors="pt")).logits[0, 0].item() for p, c in zip(*texts)
        ]
    torch.testing.assert_close(scores[:, 0], torch.tensor(expected))
    assert RewardSet(str(tmp_path / "judge")).names == ("judge",)


def test_chat_prompts_go_through_the_template_and_rewards_see_messages(tmp_path):
    tokenizer, seen = build_tokenizer(), []
    tokenizer.chat_template = (
        "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w2{% endif %}"
    )

    def judge(prompts, completions, **_):
        seen.append((prompts[0], completions[0]))
        return [float(len(c[0]["content"])) for c in completions]

    rows = [{"prompt": [{"role": "user", "content": "w9 w8"}]}] * 4
    trainer = CLPTrainer(
        build_model("qwen2"), judge, settings(tmp_path, max_steps=1), rows, processing_class=tokenizer
    )
    trainer.train()
    assert trainer.train_dataset.batch([0]).token_ids == [tokenizer("w1 w9 w8 w2").input_ids]
    assert seen[0][0] == rows[0]["prompt"] and seen[0][1][0]["role"] == "assistant"


def test_transformers_callbacks_are_heard_and_can_stop_the_run(tmp_path):
    class Recorder(TrainerCallback):
        events = []

        def __getattribute__(self, name):
            if name.startswith("on_"):
                Recorder.events.append(name)
            return super().__getattribute__(name)

        def on_step_end(self, args, state, control, **kwargs):
            assert kwargs["model"] is not None and args.learning_rate == 5e-3
            control.should_training_stop = state.global_step >= 2
            return control

    result = build_trainer(tmp_path, max_steps=6, callbacks=[Recorder]).train()
    assert result.global_step == 2
    assert {
        "on_init_end",
        "on_train_begin",
        "on_epoch_begin",
        "on_step_begin",
        "on_pre_optimizer_step",
        "on_optimizer_step",
        "on_step_end",
        "on_log",
        "on_train_end",
    } <= set(Recorder.events)


def test_evaluate_reports_under_eval_and_changes_nothing(tmp_path):
    trainer = build_trainer(tmp_path, eval_dataset=ROWS[:5], eval_strategy="steps", eval_steps=2, max_steps=2)
    trainer.train()
    logged = [e for e in log_of(tmp_path) if "eval_reward" in e]
    assert len(logged) == 1 and {"eval_rewards/low/mean", "eval_kl", "eval_entropy"} <= set(logged[0])
    assert timeless(trainer.evaluate()) == {k: v for k, v in timeless(logged[0]).items() if k != "step"}


def test_peft_config_is_honoured(tmp_path):
    from peft import LoraConfig

    trainer = build_trainer(tmp_path, peft_config=LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj"]))
    assert trainer.policy.spec.ranks == (3, 3) and trainer.policy.spec.scalings == (4.0, 4.0)
    assert all(n.endswith("q_proj") for n in trainer.policy.layers)


# -- checkpoints -------------------------------------------------------------------------------------------------------

RUN = """
import random, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from engine.training.test_trainer import ROWS, low_words, high_words, settings
from engine.conftest import build_model, build_tokenizer
from clp_engine.training.trainer import CLPTrainer

def noisy(completions, **_):
    return [x + random.random() for x in low_words(completions)]

config = settings({out!r}, max_steps={steps}, save_steps=3, save_strategy="steps", kl_estimator="mixed",
                  logging_steps=2, lr_scheduler_type="linear")
trainer = CLPTrainer(build_model("qwen2"), {{"low": noisy, "high": high_words}}, config, ROWS,
                     processing_class=build_tokenizer())
trainer.train(resume_from_checkpoint={resume!r})
"""


def launch(out, steps, resume=None):
    code = RUN.format(tests=str(Path(__file__).parents[2]), out=str(out), steps=steps, resume=resume)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output


@pytest.mark.check
def test_n_steps_a_kill_and_n_more_are_2n_steps_to_the_bit(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    straight, victim = launch(whole, 12), launch(killed, 12)
    while not checkpoint.checkpoints(killed) and victim.poll() is None:
        time.sleep(0.005)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    finish(straight)
    found = checkpoint.checkpoints(killed)
    assert found and not (killed / "policy").exists(), "the run ended before it could be killed"
    finish(launch(killed, 12, resume=True))
    for name in (
        "policy/adapters.safetensors",
        "checkpoint-12/training.safetensors",
        "checkpoint-12/policy/adapters.safetensors",
    ):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    logs = [[timeless(e) for e in log_of(p)] for p in (whole, killed)]
    assert logs[0] == logs[1]


def test_a_checkpoint_is_safetensors_and_json_only_and_old_ones_go(tmp_path):
    build_trainer(tmp_path, max_steps=5, save_strategy="steps", save_steps=1, save_total_limit=2).train()
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-5"]
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} <= {".safetensors", ".json", ".jsonl"}
    assert not list(tmp_path.glob(".*"))


def test_a_failed_write_leaves_the_checkpoint_before_it_whole(tmp_path, monkeypatch):
    trainer = build_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)

    def save_file(*args, **kwargs):
        if trainer.state.global_step == 2:
            raise OSError("disk full")
        return original(*args, **kwargs)

    original = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(OSError, match="disk full"):
        trainer.train()
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-1"]
    monkeypatch.undo()
    assert build_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=True).global_step == 2


def test_resuming_with_other_settings_is_refused(tmp_path):
    build_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ConfigError, match="other settings for learning_rate"):
        build_trainer(tmp_path, max_steps=2, learning_rate=1.0).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="no checkpoint to resume from"):
        build_trainer(tmp_path / "elsewhere").train(resume_from_checkpoint=True)


def test_ctrl_c_finishes_the_step_and_saves(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_trainer(tmp_path, callbacks=[Interrupt]).train()
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-2"]


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.1, "beta": 0.1}, "alpha and beta were both given"),
        ({"scale_rewards": "group", "num_generations": 1, "baseline": "none"}, "the spread within a group"),
        ({"alpha": 1.5}, "alpha=1.5: expected a number from 0 to 1"),
        ({"beta": -1.0}, "beta=-1.0: expected a number, at least 0"),
        ({"alpha_range": [0.5, 0.1]}, "low before high"),
        ({"alpha_range": [0.0, 0.1]}, "alpha_range is drawn log-uniformly and must start above 0"),
        ({"alpha_range": [0.1, 0.2, 0.3]}, "has two ends"),
        ({"alpha_grid": [0.1], "alpha": 0.1}, "alpha and alpha_grid were both given"),
        ({"alpha_grid": [0.1], "beta_grid": [0.1]}, "alpha_grid and beta_grid were both given"),
        ({"alpha_grid": []}, r"alpha_grid=\[\]: expected a number"),
        ({"alpha_grid": [0.1, 1.5]}, r"alpha_grid=\[0.1, 1.5\]: expected a number from 0 to 1"),
        ({"beta_grid": [0.1, -1.0]}, r"beta_grid=\[0.1, -1.0\]: expected a number, at least 0"),
        ({"alpha_grid": [0.1, 0.1]}, "a value occurs twice"),
        ({"alpha_grid": [0.0, 0.1], "kl_conditioning": "odds"}, "needs a KL coefficient above 0"),
        ({"alpha_grid": [1.0], "kl_conditioning": "odds"}, "needs an alpha below 1"),
        ({"stratified_weights": True}, "for weight_sampler='uniform'; got weight_sampler='dirichlet'"),
        ({"kl_estimator": "k9"}, "kl_estimator='k9': expected one of return, exact, mixed, k2, k3"),
        ({"num_generations": 3}, "16 completions do not divide into groups of num_generations = 3"),
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"weight_sampler": "fixed"}, "needs fixed_weights"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"alpha_grid": 0.1}, "alpha_grid=0.1: expected list"),
        ({"conditioning": "full", "target_modules": ["q_proj"]}, "target_modules is for 'lora'"),
        ({"conditioning": "full", "lora_alpha": 8.0}, "lora_alpha scales low-rank factors"),
        ({"conditioning": "magic"}, "conditioning='magic'"),
        (
            {"conditioning": "prompt", "prompt_template": "{weights}", "alpha_range": [0.1, 0.5]},
            "nothing tells the policy: put {kl} into prompt_template",
        ),
        ({"kl_conditioning": "odds", "alpha": 0.0}, "needs a KL coefficient above 0"),
    ],
)
def test_settings_are_checked_where_they_are_made(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, **changes)


@pytest.mark.parametrize(
    ("given", "kl", "default", "smallest"),
    [
        ({}, 0.1, 0.1, 0.1),
        ({"alpha": 0.3}, 0.3, 0.3, 0.3),
        ({"beta_range": [0.04, 0.25]}, (0.04, 0.25), 0.1, 0.04),
        ({"alpha_grid": [1.0, 0.01, 0.1]}, [1.0, 0.01, 0.1], 0.1, 0.01),
        ({"beta_grid": [2.0, 0.5]}, [2.0, 0.5], 0.5, 0.5),
    ],
)
def test_a_policy_knows_the_kl_coefficients_it_was_trained_on(tmp_path, given, kl, default, smallest):
    trainer = build_trainer(tmp_path, **given)
    spec = trainer.policy.spec
    assert trainer.args.kl == kl and (spec.min_kl, spec.kl_is_beta) == (smallest, "beta" in "".join(given))
    assert spec.default_kl == pytest.approx(default)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 1}, "unknown setting learning_rat; did you mean learning_rate?"),
        ({"max_steps": "many"}, "max_steps='many': expected int"),
        ({"alpha_range": 3}, "alpha_range=3: expected list"),
    ],
)
def test_settings_from_a_file_are_checked(values, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        CLPConfig.from_dict(values)


def test_a_tuple_is_the_list_that_a_checkpoint_gives_back(tmp_path):
    grid = {
        "alpha_grid": (0.1, 0.5),
        "target_modules": ("q_proj", "v_proj"),
        "save_strategy": "steps",
        "save_steps": 2,
    }
    build_trainer(tmp_path, **grid).train()
    build_trainer(tmp_path, **grid).train(resume_from_checkpoint=tmp_path / "checkpoint-2")


def test_settings_from_a_file_take_what_yaml_gives():
    config = CLPConfig.from_dict(
        {"learning_rate": "1e-4", "max_steps": 3, "alpha": 1, "target_modules": ["q_proj"]}
    )
    assert (config.learning_rate, config.alpha, config.target_modules) == (1e-4, 1.0, ["q_proj"])
    assert CLPConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: build_trainer(p, rewards=[]), "reward_funcs is empty"),
        (lambda p: build_trainer(p, rewards=[low_words, low_words]), "the same name"),
        (lambda p: build_trainer(p, rewards=[3]), "neither a function, a model"),
        (
            lambda p: build_trainer(p, model=build_policy(objectives=("high", "low"))),
            "the same in the same order",
        ),
        (
            lambda p: CLPTrainer(
                build_model("qwen2"), low_words, settings(p), [], processing_class=build_tokenizer()
            ),
            "dataset is empty",
        ),
        (
            lambda p: CLPTrainer(
                build_model("qwen2"),
                low_words,
                settings(p),
                [{"text": 1}],
                processing_class=build_tokenizer(),
            ),
            "needs a 'prompt'; row 0 of the dataset has the columns text",
        ),
        (lambda p: CLPTrainer(build_model("qwen2"), low_words, settings(p), ROWS), "no tokenizer"),
        (
            lambda p: build_trainer(
                p, model=build_policy(objectives=("low", "high")), kl_conditioning="odds"
            ),
            "args has kl_conditioning='odds', the policy was built with none",
        ),
        (
            lambda p: build_trainer(p, model=build_policy(objectives=("low", "high")), rank=8),
            "args has rank=8, the policy was built with 4",
        ),
        (
            lambda p: build_trainer(p, conditioning="full", peft_config=LoraConfig(r=4)),
            "peft_config describes low-rank factors; conditioning='full' has none",
        ),
        (lambda p: CLPTrainer(build_model("qwen2"), None, settings(p), ROWS), "reward_funcs is missing"),
    ],
)
def test_construction_errors_say_what_to_do(tmp_path, make, message):
    with pytest.raises(ConfigError, match=message):
        make(tmp_path)


def test_a_failing_reward_function_is_named(tmp_path):
    def broken(**_):
        raise KeyError("x")

    async def broken_later(**_):
        raise KeyError("y")

    for reward in (broken, broken_later):
        with pytest.raises(RuntimeError, match=f"reward function '{reward.__name__}' failed"):
            build_trainer(tmp_path, rewards=[reward]).train()
    with pytest.raises(ValueError, match="returned 1 rewards for 16 completions"):
        build_trainer(tmp_path, rewards={"short": lambda **_: [1.0]}).train()


def test_a_reward_that_is_not_finite_stops_the_run_with_the_cause(tmp_path):
    with pytest.raises(
        ValueError, match="reward function 'bad' returned inf for completion 0; expected a number"
    ):
        build_trainer(
            tmp_path, rewards={"bad": lambda completions, **_: [float("inf")] * len(completions)}
        ).train()


def test_a_gradient_that_is_not_finite_stops_the_run_with_the_cause(tmp_path):
    trainer = build_trainer(tmp_path)
    next(iter(trainer.policy.adapter_parameters().values())).register_hook(
        lambda gradient: gradient * float("nan")
    )
    with pytest.raises(RuntimeError, match="gradient norm is nan at step 0"):
        trainer.train()
