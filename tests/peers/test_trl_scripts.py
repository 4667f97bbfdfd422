"""Scripts for TRL run with both libraries: the import is all that changes."""

import math

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

from engine.conftest import build_model, build_tokenizer

from clp_engine.tasks import docsum

IMPORTS = {
    "trl": "from trl import GRPOConfig, GRPOTrainer",
    "clp_engine": "from clp_engine import CLPConfig as GRPOConfig, CLPTrainer as GRPOTrainer",
}

# TRL's quick start, with a small model and data set in the place of those it downloads.
QUICK_START = """
from datasets import load_dataset

dataset = load_dataset("json", data_files=DATA, split="train")


def reward_num_unique_letters(completions, **kwargs):
    return [float(len(set(completion))) for completion in completions]


training_args = GRPOConfig(
    output_dir=OUTPUT,
    bf16=False,
    use_cpu=True,
    max_steps=2,
    logging_steps=1,
    num_generations=4,
    max_completion_length=8,
    save_strategy="no",
    report_to="none",
)
trainer = GRPOTrainer(
    model=MODEL,
    reward_funcs=reward_num_unique_letters,
    args=training_args,
    train_dataset=dataset,
)
trainer.train()
"""

# Several rewards with weights, an evaluation, LoRA; prompts in order and a learning rate of 0, so that both draw the same.
SEVERAL_REWARDS = """
from datasets import Dataset
from peft import LoraConfig

dataset = Dataset.from_list([{"prompt": f"w{i} w{2 * i} w{i + 9}", "wanted": f"w{i + 3}"} for i in range(8)])


def share_of_low_words(completions, **kwargs):
    return [sum(int(word[1:]) < 30 for word in text.split()) / 6 for text in completions]


def has_wanted_digit(completions, wanted, **kwargs):
    return [float(word[-1] in text) for text, word in zip(completions, wanted)]


training_args = GRPOConfig(
    output_dir=OUTPUT,
    bf16=False,
    use_cpu=True,
    disable_dropout=True,
    gradient_checkpointing=False,
    learning_rate=0.0,
    max_steps=3,
    logging_steps=1,
    per_device_train_batch_size=4,
    generation_batch_size=8,
    gradient_accumulation_steps=2,
    num_generations=4,
    num_generations_eval=2,
    max_completion_length=6,
    shuffle_dataset=False,
    remove_unused_columns=False,
    beta=0.04,
    scale_rewards=False,
    loss_type="dapo",
    reward_weights=[2.0, 0.5],
    eval_strategy="steps",
    eval_steps=2,
    per_device_eval_batch_size=8,
    save_strategy="no",
    report_to="none",
    use_vllm=False,
    push_to_hub=False,
    optim="adamw_torch",
    dataloader_num_workers=0,
    lr_scheduler_type="cosine",
    warmup_steps=0.1,
)
trainer = GRPOTrainer(
    model=MODEL,
    reward_funcs=[share_of_low_words, has_wanted_digit],
    args=training_args,
    train_dataset=dataset,
    eval_dataset=dataset.select(range(4)),
    peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
"""

# What TRL logs and this project does not, and why; docs/migrating-from-trl.md says so.
LEFT_OUT = {
    # Not counted.
    "total_flos",
    # A loss has no meaning where rewards are what is evaluated, and nothing is clipped there.
    "eval_loss",
    *(f"eval_clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")),
    # The training entry of the same step has it.
    "eval_num_tokens",
}
# Same name, same number for the same completions.
SAME_NUMBERS = (
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "num_tokens",
    *(f"completions/{kind}_length" for kind in ("mean", "min", "max")),
    *(f"completions/{kind}_terminated_length" for kind in ("mean", "min", "max")),
    "completions/clipped_ratio",
    *(
        f"rewards/{name}/{kind}"
        for name in ("share_of_low_words", "has_wanted_digit")
        for kind in ("mean", "std")
    ),
    "entropy",
    "learning_rate",
    "epoch",
    *(f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")),
)


def run(script, library, **names):
    """The history of what a script's trainer logged."""
    space = dict(names)
    exec(f"{IMPORTS[library]}\n{script}", space)
    return space["trainer"].state.log_history


def names_of(history):
    return {name for entry in history for name in entry}


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick-start")
    rows = docsum.load_dataset("validation", limit=8)
    from datasets import Dataset

    Dataset.from_list([{"prompt": row["prompt"]} for row in rows]).to_json(folder / "data.json")
    return {
        library: run(
            QUICK_START,
            library,
            DATA=str(folder / "data.json"),
            MODEL=str(docsum.checkpoint_path()),
            OUTPUT=str(folder / library),
        )
        for library in IMPORTS
    }


def test_the_quick_start_runs_and_logs_what_trl_logs(quick_start):
    missing = names_of(quick_start["trl"]) - names_of(quick_start["clp_engine"])
    assert missing <= LEFT_OUT, missing - LEFT_OUT
    ours = [entry for entry in quick_start["clp_engine"] if "loss" in entry]
    assert [entry["step"] for entry in ours] == [1, 2]
    assert all(math.isfinite(value) for entry in ours for value in entry.values())


@pytest.fixture(scope="module")
def several_rewards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several-rewards")
    model = build_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(300.0)  # so peaked that sampling leaves no choice
    model.save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    return {
        library: run(SEVERAL_REWARDS, library, MODEL=str(folder / "model"), OUTPUT=str(folder / library))
        for library in IMPORTS
    }


def test_a_script_with_reward_weights_logs_what_trl_logs(several_rewards):
    missing = names_of(several_rewards["trl"]) - names_of(several_rewards["clp_engine"])
    assert missing <= LEFT_OUT, missing - LEFT_OUT
    never = LEFT_OUT - names_of(several_rewards["trl"])
    assert not never, f"TRL does not log {never}; take them off the list"


@pytest.mark.parametrize("part", ["train", "eval"])
def test_the_same_completions_have_the_same_numbers(several_rewards, part):
    prefix = "eval_" if part == "eval" else ""
    ours, theirs = (
        [entry for entry in several_rewards[library] if f"{prefix}reward" in entry]
        for library in ("clp_engine", "trl")
    )
    assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs]
    rewards = ("reward", "rewards/share_of_low_words/mean", "rewards/has_wanted_digit/mean")
    assert all(any(entry[prefix + name] > 0.1 for entry in theirs) for name in rewards)
    compared = 0
    for one, other in zip(ours, theirs):
        for name in SAME_NUMBERS:
            name = name if name == "epoch" else prefix + name
            if name in other and name not in LEFT_OUT:
                expected = pytest.approx(other[name], rel=1e-4, abs=1e-4, nan_ok=True)
                assert one.get(name, math.nan) == expected, (name, one, other)
                compared += 1
    assert compared >= 10 * len(theirs)
