"""Steer a chat model between three rewards.

    python examples/chat_three_rewards.py [--quick] [--out runs/chat]

The chat model is the shipped summariser with a chat template: the user sends a piece of Python documentation, the assistant
answers with a summary. The three rewards disagree: a short answer, one that stays with the document's words, one that reads as
a whole sentence. With a model of your own, give its name instead of "docsum" and leave the template out: its tokenizer has one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from clp_engine import CLPConfig, CLPTrainer
from clp_engine.tasks import docsum

TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['content'] }}{{ '<|summary|>' if message['role'] == 'user' else '<|endoftext|>' }}"
    "{% endfor %}"
)


# A reward function gets the chats as lists of messages, and returns one number for each completion.


def short(completions, **_) -> list[float]:
    """An empty answer is not a short one: whatever earns a reward is what the model will learn to write."""
    lengths = [len(answer(chat).split()) for chat in completions]
    return [1 / (1 + length / 8) if length else 0.0 for length in lengths]


def on_topic(prompts, completions, **_) -> list[float]:
    """The share of the answer's words that the user used, too."""
    scores = []
    for prompt, chat in zip(prompts, completions):
        said, asked = answer(chat).lower().split(), set(prompt[-1]["content"].lower().split())
        scores.append(sum(word in asked for word in said) / max(len(said), 1))
    return scores


def whole_sentence(completions, **_) -> list[float]:
    texts = [answer(chat).strip() for chat in completions]
    return [0.5 * text[:1].isupper() + 0.5 * text.endswith(".") for text in texts]


def answer(chat: list[dict[str, str]]) -> str:
    return chat[-1]["content"]


def chats(split: str, limit: int) -> list[dict]:
    """Dataset rows: a prompt is a list of messages."""
    rows = docsum.load_dataset(split, limit=limit)
    return [
        {"prompt": [{"role": "user", "content": row["prompt"].removesuffix("<|summary|>")}]} for row in rows
    ]


def main(out: Path, quick: bool = False) -> dict[tuple[float, ...], list[str]]:
    """Train, print what the policy says at some weightings, and return it."""
    tokenizer = AutoTokenizer.from_pretrained(docsum.checkpoint_path())
    tokenizer.chat_template = TEMPLATE
    trainer = CLPTrainer(
        model="docsum",
        reward_funcs=[short, on_topic, whole_sentence],
        args=CLPConfig(
            output_dir=str(out),
            max_steps=4 if quick else 120,
            num_generations=4 if quick else 8,
            per_device_train_batch_size=16 if quick else 64,
            max_completion_length=16 if quick else 40,
            learning_rate=3e-3,
            alpha=0.02,
            corner_probability=0.3,
            disable_tqdm=quick,
        ),
        train_dataset=chats("validation", 32 if quick else 400),
        processing_class=tokenizer,
    )
    trainer.train()

    prompts = [row["prompt"] for row in chats("test", 2)]
    weightings = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.4, 0.3, 0.3)]
    said = {}
    for weights in weightings:
        said[weights] = trainer.policy.generate(prompts, weights, temperature=0, max_new_tokens=40)
    for i, prompt in enumerate(prompts):
        print(f"\n{prompt[-1]['content'][:200]} ...")
        for weights, answers in said.items():
            print(
                f"  short {weights[0]:.1f}, on_topic {weights[1]:.1f}, whole_sentence {weights[2]:.1f}: {answers[i]}"
            )
    print(f"\nclp-engine steer {out}   # the same with sliders")
    return said


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/chat"))
    arguments = parser.parse_args()
    main(arguments.out, arguments.quick)
