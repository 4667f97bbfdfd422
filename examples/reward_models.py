"""Reward models as checkpoints: sequence classifiers in folders, given to the trainer by path.

    python examples/reward_models.py [--quick] [--out runs/reward-models]

First two reward models are fitted and saved as transformers saves them (with yours, this part is not needed):

    relevance   1 for a document with its own summary, 0 for one with another document's
    concise     how short a summary is

Both read prompt and completion and answer with `logits[:, 0]`. Then one policy is trained against both, and steered.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from clp_engine import CLPConfig, CLPTrainer
from clp_engine.data.rewards import ClassifierReward
from clp_engine.tasks import docsum

PROMPT_TOKENS = 64  # documents are cut here, so that two CPU cores will do
Example = tuple[str, float]  # prompt with completion, the reward it should get


def relevance_examples(rows: list[dict], seed: int = 0) -> list[Example]:
    others = rows[1:] + rows[:1]
    examples = [(row["prompt"] + row["reference"], 1.0) for row in rows]
    examples += [(row["prompt"] + other["reference"], 0.0) for row, other in zip(rows, others)]
    random.Random(seed).shuffle(examples)
    return examples


def concise_examples(rows: list[dict], seed: int = 0) -> list[Example]:
    """Summaries whole, cut, and with another one behind them, so that there is something to tell apart."""
    draw = random.Random(seed)
    examples = []
    for row, other in zip(rows, rows[1:] + rows[:1]):
        words = f"{row['reference']} {other['reference']}".split()
        kept = words[: draw.randint(1, len(words))]
        examples.append((row["prompt"] + " ".join(kept), 1 / (1 + len(kept) / 8)))
    return examples


def fit(folder: Path, examples: list[Example], steps: int, batch: int = 16) -> Path:
    """A regression on the shipped model's body; saved with its tokenizer, so that the folder is all there is to know."""
    tokenizer = AutoTokenizer.from_pretrained(docsum.checkpoint_path())
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        docsum.checkpoint_path(), num_labels=1, dtype=torch.float32
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for step in range(steps):
        taken = [examples[(step * batch + i) % len(examples)] for i in range(batch)]
        inputs = tokenizer(
            [text for text, _ in taken], return_tensors="pt", padding=True, padding_side="right"
        )
        wanted = torch.tensor([reward for _, reward in taken])
        loss = (model(**inputs).logits[:, 0] - wanted).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def error(folder: Path, examples: list[Example]) -> float:
    """Mean squared error of a saved reward model, read as the trainer reads it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reward = ClassifierReward(AutoModelForSequenceClassification.from_pretrained(folder), tokenizer)
    scores = torch.tensor(reward([text for text, _ in examples], [""] * len(examples)))
    return (scores - torch.tensor([wanted for _, wanted in examples])).square().mean().item()


def main(out: Path, quick: bool = False) -> tuple[CLPTrainer, dict[str, float]]:
    """Fit the reward models, train the policy; returns its trainer and the reward models' errors on held-out pairs."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = docsum.load_dataset("train", limit=64 if quick else 1200, max_prompt_tokens=PROMPT_TOKENS)
    held_out = docsum.load_dataset("validation", limit=16 if quick else 200, max_prompt_tokens=PROMPT_TOKENS)
    errors = {}
    for name, examples in (("relevance", relevance_examples), ("concise", concise_examples)):
        folder = fit(out / name, examples(rows), steps=16 if quick else 150)
        errors[name] = error(folder, examples(held_out))
        print(f"{folder}: mean squared error {errors[name]:.3f} on held-out summaries")

    trainer = CLPTrainer(
        model="docsum",
        reward_funcs=[str(out / "relevance"), str(out / "concise")],  # the folders' names are the objectives
        args=CLPConfig(
            output_dir=str(out / "policy-run"),
            max_steps=3 if quick else 100,
            num_generations=4 if quick else 8,
            per_device_train_batch_size=16 if quick else 64,
            max_completion_length=16 if quick else 40,
            learning_rate=3e-3,
            alpha=0.05,
            logging_steps=1,
            disable_tqdm=quick,
        ),
        train_dataset=held_out,
    )
    trainer.train()
    document = docsum.load_dataset("test", limit=1, max_prompt_tokens=PROMPT_TOKENS)[0]["prompt"]
    for weights in ({"relevance": 1.0}, {"relevance": 0.5, "concise": 0.5}, {"concise": 1.0}):
        print(weights, trainer.policy.generate(document, weights, temperature=0, max_new_tokens=40)[0])
    return trainer, errors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/reward-models"))
    arguments = parser.parse_args()
    main(arguments.out, arguments.quick)
