"""A training step as a case: its model and sizes, its prompts and rewards, and this project's trainer that makes it.

Models: "docsum", the trained one that is shipped; "qwen2-30m", Qwen2-shaped, 28 million parameters, a vocabulary of 32,000;
"qwen2.5-0.5b" and "qwen2.5-7b", the shapes of those. All but the first have random weights (from a fixed seed), since
nothing can be downloaded where this runs: a step takes the same time whatever the weights are. They write tokens that the
tokenizer has no text for, so rewards are nearly constant there.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from bench.core import schema

FLOAT32 = ("docsum", "tiny", "qwen2-30m", "smollm2-135m")


@dataclass(frozen=True)
class StepCase:
    """batch completions in groups of `group`, prompts of `prompt` tokens, `new` tokens each."""

    model: str
    device: str
    batch: int
    group: int
    prompt: int
    new: int
    targets: tuple[str, ...] = ()
    steps: int = 6

    op = "step"
    title = "training step"

    @property
    def dtype(self) -> str:
        return "float32" if self.model in FLOAT32 else "bfloat16"

    @property
    def shape(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("batch", "group", "prompt", "new")}

    @property
    def tokens(self) -> int:
        """Of a step: a prompt counts once for each of its completions, as both trainers count `num_tokens`."""
        return self.batch * (self.prompt + self.new)

    @property
    def id(self) -> str:
        return schema.case_id("e2e", self.title, self.shape, self.dtype, {"model": self.model})


Case = TypeVar("Case", bound=StepCase)


def cases(device: str, sizes: str, kind: type[Case] = StepCase) -> list[Case]:
    """Of the group e2e, main case first. kind: what they are made as, StepCase or a subclass of it."""
    if sizes == "tiny":
        return [kind("tiny", device, batch=4, group=2, prompt=12, new=4)]
    on_cpu = ("step-cpu", "engine-cpu") if device == "cpu" else ()
    docsum = kind("docsum", device, 32, 8, 120, 40, on_cpu)
    small = kind("qwen2-30m", device, 32, 8, 120, 40, on_cpu, steps=4)
    if sizes == "cpu":
        return [docsum, small, kind("smollm2-135m", device, 32, 8, 40, 32, on_cpu, steps=3)]
    on_gpu = ("step-gpu", "step-gpu-memory", "engine-gpu")
    return [
        kind("qwen2.5-0.5b", device, 64, 8, 256, 128, on_gpu, steps=4),
        kind("qwen2.5-7b", device, 32, 8, 256, 128, on_gpu, steps=3),
        docsum,
        small,
    ]


def case_of(model: str, device: str) -> StepCase:
    """The case of a model's name, on any device. Raises ValueError naming those there are."""
    known = {case.model: case for sizes in ("tiny", "gpu") for case in cases(device, sizes)}
    if model not in known:
        raise ValueError(f"unknown model {model!r}; known: {', '.join(known)}")
    return known[model]


@functools.cache
def prompts_of(count: int, tokens: int) -> list[dict[str, str]]:
    """Prompts of exactly `tokens` tokens, from the text of the training split."""
    from clp_engine.tasks.docsum import load_dataset

    tokenizer = load_tokenizer()
    rows, pool = [], []
    for row in load_dataset("train"):
        pool += tokenizer(row["document"]).input_ids
        while len(pool) >= tokens and len(rows) < count:
            text = tokenizer.decode(pool[:tokens])
            pool = pool[tokens:]
            # Decoding and encoding again may merge differently; keep the prompts that come back as they were.
            if len(tokenizer(text).input_ids) == tokens:
                rows.append({"prompt": text, "reference": row["reference"]})
        if len(rows) == count:
            return rows
    raise RuntimeError(f"the corpus has fewer than {count} prompts of {tokens} tokens")


def length_reward(completions, **_) -> list[float]:
    """Cheap and, with a trained model, never constant: what is timed is the trainer."""
    return [len(set(c.split())) / 40 for c in completions]


def other_reward(completions, **_) -> list[float]:
    return [sum(map(str.isalpha, c)) / max(len(c), 1) for c in completions]


def refuse_detours(device: str) -> None:
    """On a GPU: decoding, or attention, that takes another way than it is measured for raises from here on."""
    if device == "cuda":
        os.environ.setdefault("CLP_ENGINE_DECODING", "native")


def load_tokenizer():
    from transformers import AutoTokenizer

    from clp_engine.tasks.docsum import checkpoint_path

    return AutoTokenizer.from_pretrained(checkpoint_path())


def load_model(name: str, device: str):
    from transformers import AutoModelForCausalLM, Qwen2Config

    from clp_engine.tasks.docsum import checkpoint_path

    if name == "docsum":
        return AutoModelForCausalLM.from_pretrained(checkpoint_path(), dtype=torch.float32).to(device)
    shapes = {
        "qwen2.5-0.5b": dict(
            hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
        ),
        "qwen2.5-7b": dict(
            hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
        ),
        "smollm2-135m": dict(
            hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
        ),
        "qwen2-30m": dict(
            hidden_size=384, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=6,
            num_key_value_heads=2, vocab_size=32000, tie_word_embeddings=True,
        ),
        "tiny": dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=5000, tie_word_embeddings=True,
        ),
    }  # fmt: skip
    # The shipped tokenizer's special tokens: the ids that prompts are padded and ended with.
    config = Qwen2Config(**shapes[name], max_position_embeddings=4096, eos_token_id=0, pad_token_id=1)
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if name in FLOAT32 else torch.bfloat16
        )


def our_trainer(
    case: StepCase, steps: int, rewards: Sequence[Callable], folder: str, callbacks: Sequence = ()
):
    from clp_engine.training.settings.config import CLPConfig
    from clp_engine.training.trainer import CLPTrainer

    refuse_detours(case.device)
    tokenizer = load_tokenizer()
    config = CLPConfig(
        output_dir=folder,
        per_device_train_batch_size=case.batch,
        num_generations=case.group,
        max_steps=steps,
        max_completion_length=case.new,
        beta=0.1,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        rank=16,
        lora_alpha=32,
        seed=1,
    )
    model = load_model(case.model, case.device)
    # No end token: every completion runs to its full length, as min_new_tokens makes TRL's.
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    tokenizer.eos_token = None
    rows = prompts_of(256, case.prompt)
    return CLPTrainer(
        model, list(rewards), config, rows, processing_class=tokenizer, callbacks=list(callbacks)
    )
