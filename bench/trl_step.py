"""One whole training step (rollout, rewards, scoring, update): TRL's GRPOTrainer with PEFT against CLPTrainer.

    python -m bench.trl_step [--steps 6] [--rounds 3] [--out FILE]

Both train the model shipped with DocSum on the same prompts (cut to exactly --prompt tokens) and sample exactly --new tokens
per completion, with the same reward function, rank, optimiser and KL to the reference. Each round times some steps of the
one, then of the other, in one process; the figure is the median over all timed steps but the first of each round. Two
variants of ours are measured: one objective (what TRL does too) and two with a weighting per prompt (what it cannot do).
Needs the `bench` extra: pip install -e .[bench].
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from bench.environment import describe


def prompts_of(tokenizer, count: int, tokens: int) -> list[dict[str, str]]:
    """Prompts of exactly `tokens` tokens, from the text of the training split."""
    from clp_engine.tasks.docsum import load_dataset

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
    raise SystemExit(f"the corpus has fewer than {count} prompts of {tokens} tokens")


def length_reward(completions, **_) -> list[float]:
    """Cheap and never constant: what is timed is the trainer."""
    return [len(set(c.split())) / 40 for c in completions]


def other_reward(completions, **_) -> list[float]:
    return [sum(map(str.isalpha, c)) / max(len(c), 1) for c in completions]


def trl_seconds(options, rows, model_path: str, folder: str) -> list[float]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=options.batch,
        num_generations=options.group,
        max_steps=options.steps,
        max_completion_length=options.new,
        beta=0.1,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        generation_kwargs={"min_new_tokens": options.new},
        optim="adamw_torch_fused",
        seed=1,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32),
        reward_funcs=length_reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model_path),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    return _step_times(trainer.state.log_history, options.new)


def our_seconds(options, rows, model_path: str, folder: str, rewards) -> list[float]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from clp_engine.config import CLPConfig
    from clp_engine.trainer import CLPTrainer

    config = CLPConfig(
        output_dir=folder,
        per_device_train_batch_size=options.batch,
        num_generations=options.group,
        max_steps=options.steps,
        max_completion_length=options.new,
        beta=0.1,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        rank=16,
        lora_alpha=32,
        seed=1,
    )
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    # No end token: every completion runs to its full length, as min_new_tokens makes TRL's.
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.eos_token = None
    trainer = CLPTrainer(model, rewards, config, rows, processing_class=tokenizer)
    trainer.train()
    return _step_times(trainer.state.log_history, options.new)


def _step_times(history: list[dict], new_tokens: int) -> list[float]:
    steps = [entry for entry in history if "step_time" in entry]
    for entry in steps:
        if entry["completions/mean_length"] != new_tokens:
            raise SystemExit(
                f"completions of {entry['completions/mean_length']} tokens instead of {new_tokens}: not comparable"
            )
    return [entry["step_time"] for entry in steps[1:]]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=6, help="steps a round, the first of which is not counted"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32, help="completions per step")
    parser.add_argument("--group", type=int, default=8, help="completions per prompt")
    parser.add_argument("--prompt", type=int, default=120, help="tokens per prompt")
    parser.add_argument("--new", type=int, default=40, help="tokens per completion")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", help="write the result as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        import trl
    except ImportError:
        raise SystemExit("trl is not installed; pip install -e .[bench]") from None
    from transformers import AutoTokenizer

    from clp_engine.tasks.docsum import checkpoint_path

    path = str(checkpoint_path())
    rows = prompts_of(AutoTokenizer.from_pretrained(path), 256, options.prompt)
    variants = {
        "trl + peft": lambda folder: trl_seconds(options, rows, path, folder),
        "clp-engine, one objective": lambda folder: our_seconds(options, rows, path, folder, length_reward),
        "clp-engine, two objectives": lambda folder: our_seconds(
            options, rows, path, folder, [length_reward, other_reward]
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        for round_number in range(options.rounds):
            for name, measure in variants.items():
                seconds = measure(folder)
                times[name] += seconds
                print(
                    f"round {round_number + 1}  {name:28s} {statistics.median(seconds):7.3f} s",
                    file=sys.stderr,
                )
    baseline = statistics.median(times["trl + peft"])
    result = {
        "benchmark": "trl_step",
        "environment": describe({"trl": trl.__version__}),
        "shape": {k: getattr(options, k) for k in ("batch", "group", "prompt", "new", "threads")},
        "model": "docsum, float32",
        "seconds_per_step": {
            name: {"median": statistics.median(v), "low": min(v), "high": max(v), "steps": len(v)}
            for name, v in times.items()
        },
        "speedup_over_trl": {
            name: baseline / statistics.median(v) for name, v in times.items() if name != "trl + peft"
        },
    }
    print(json.dumps(result, indent=2))
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
