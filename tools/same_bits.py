"""python tools/same_bits.py FILE [NAME ...]: short runs of every kind, and the bits that come out of them, as JSON.

Before a change that moves code and must not change what it computes, and after it, on one machine:

    python tools/same_bits.py before.json && ... && python tools/same_bits.py after.json && diff before.json after.json

A run is two to four optimiser steps of a model with 30,000 weights. Recorded of each: SHA-256 of every tensor file that it left
(policy, checkpoints, exported adapters), its log without times, what it generates, and its report. Only public names of the
engine are used, so that the files of two versions can be compared. Takes about a minute of one core.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    T5Config,
    set_seed,
)

from clp_engine import CLPConfig, CLPTrainer, ConditionedPolicy, LogitMixture, SamplingParams, evaluate

COMMON = {"vocab_size": 67, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
}
MODELS = {
    "qwen2": lambda: Qwen2Config(**SMALL),
    "llama": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(**SMALL, sliding_window=6, query_pre_attn_scalar=8),
    "gpt2": lambda: GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "t5": lambda: T5Config(
        **COMMON, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
    "bart": lambda: BartConfig(
        **COMMON,
        d_model=32,
        max_position_embeddings=128,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        **{
            f"{part}_{what}": n
            for part in ("encoder", "decoder")
            for what, n in (("layers", 2), ("ffn_dim", 48))
        },
        **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    ),
}
SETTINGS = {
    "max_steps": 2,
    "num_generations": 2,
    "per_device_train_batch_size": 6,
    "max_completion_length": 6,
    "learning_rate": 1e-2,
    "alpha": 0.05,
    "rank": 4,
    "save_strategy": "no",
    "logging_steps": 1,
    "log_completions": True,
    "disable_tqdm": True,
}
KL = {"alpha": None, "alpha_range": [0.05, 0.5]}
# name -> (model, settings)
RUNS: dict[str, tuple[str, dict]] = {
    **{
        f"form {form}": ("llama", {"conditioning": form})
        for form in (
            "lora",
            "full",
            "attention",
            "logit",
            "prompt",
            "attention+prompt",
            "lora+logit",
            "full+prompt",
        )
    },
    "form none": ("llama", {"conditioning": "none", "weight_sampler": "fixed", "fixed_weights": [0.3, 0.7]}),
    "form none carried by full": (
        "qwen2",
        {"conditioning": "none", "carrier": "full", "weight_sampler": "fixed", "fixed_weights": [0.3, 0.7]},
    ),
    "reward_weights": ("qwen2", {"reward_weights": [1.0, 0.5]}),
    **{f"model {family}": (family, {}) for family in MODELS},
    **{f"model {family} full": (family, {"conditioning": "full"}) for family in ("t5", "gemma2", "gpt2")},
    **{
        f"estimator {name}": ("qwen2", {"kl_estimator": name})
        for name in ("return", "exact", "mixed", "k2", "k3")
    },
    **{
        f"baseline {name}": ("qwen2", {"baseline": name, "kl_estimator": "mixed"})
        for name in ("leave_one_out", "group_mean", "none", "value")
    },
    "value baseline of an encoder-decoder": ("t5", {"baseline": "value"}),
    **{f"scale {name}": ("qwen2", {"scale_rewards": name}) for name in ("group", "batch")},
    **{f"loss {name}": ("qwen2", {"loss_type": name}) for name in ("grpo", "dapo", "dr_grpo")},
    **{f"sampler {name}": ("qwen2", {"weight_sampler": name}) for name in ("uniform", "grid")},
    "stratified": ("qwen2", {"weight_sampler": "uniform", "stratified_weights": True}),
    "kl linear": ("llama", {"kl_conditioning": "linear", **KL}),
    "kl odds": ("llama", {"kl_conditioning": "odds", **KL}),
    "kl grid, prompt": ("llama", {"conditioning": "prompt", "alpha": None, "alpha_grid": [0.05, 0.5, 1.0]}),
    "beta": ("qwen2", {"alpha": None, "beta": 0.1}),
    "beta range": ("qwen2", {"alpha": None, "beta_range": [0.05, 0.5], "kl_conditioning": "odds"}),
    "iterations": ("qwen2", {"num_iterations": 2, "max_steps": 4, "epsilon": 0.01}),
    "several steps on a rollout": ("qwen2", {"steps_per_generation": 2, "max_steps": 4, "delta": 1.5}),
    "accumulation": ("qwen2", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
    "tokens a micro-batch": ("qwen2", {"max_tokens_per_microbatch": 24}),
    "checkpointing": ("llama", {"gradient_checkpointing": True}),
    "mask truncated": ("qwen2", {"mask_truncated_completions": True}),
    "selected rollouts": (
        "qwen2",
        {
            "rollout_selection": "max_variance",
            "selected_rollouts": 2,
            "num_generations": 3,
            "selection_schedule": "linear",
        },
    ),
    "selected tokens": ("qwen2", {"token_selection": "advantage_entropy", "selected_tokens": 0.5}),
    "partial rollouts": (
        "qwen2",
        {"partial_rollouts": True, "max_completion_length_per_step": 3, "max_steps": 4},
    ),
    "slots": ("qwen2", {"rollout_rows": 2}),
    "slots of an encoder-decoder": ("bart", {"rollout_rows": 2}),
    "sampling": ("qwen2", {"top_k": 30, "top_p": 0.9, "min_p": 0.01, "temperature": 0.8}),
    "long prompts are cut": ("qwen2", {"max_prompt_length": 2}),
    "log_kl": ("qwen2", {"alpha": 0.0, "log_kl": True}),
    "no reward threads": ("qwen2", {"reward_workers": 0}),
    "epochs": ("qwen2", {"max_steps": -1, "num_train_epochs": 1.0}),
    "budget": ("qwen2", {"max_steps": -1, "max_generated_tokens": 60, "warmup_steps": 0}),
    "schedule": (
        "qwen2",
        {"lr_scheduler_type": "cosine", "warmup_steps": 1, "weight_decay": 0.1, "max_grad_norm": 0.1},
    ),
    "evaluations": (
        "qwen2",
        {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "eval_on_start": True},
    ),
    "best": (
        "qwen2",
        {
            "eval_strategy": "steps",
            "eval_steps": 1,
            "metric_for_best_model": "eval_reward",
            "load_best_model_at_end": True,
            "max_steps": 3,
        },
    ),
    "checkpoints": (
        "qwen2",
        {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "kl_estimator": "mixed"},
    ),
}
RESUMED = {
    "lora": ("qwen2", {}),
    "full": ("llama", {"conditioning": "full"}),
    "value": ("qwen2", {"baseline": "value", "kl_estimator": "mixed"}),
    "partial rollouts": ("qwen2", {"partial_rollouts": True, "max_completion_length_per_step": 3}),
    "several steps on a rollout": ("qwen2", {"steps_per_generation": 2}),
    "encoder-decoder": ("t5", {}),
}


def even(completion_ids, **_):
    return [sum(i % 2 == 0 for i in ids) / max(1, len(ids)) for ids in completion_ids]


def small(completions, completion_ids, **_):
    return [None if not ids else sum(i < 20 for i in ids) / len(ids) for ids in completion_ids]


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i + 3 for i in range(64)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if family in ("t5", "bart"):
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def model(family: str):
    set_seed(0)
    auto = AutoModelForSeq2SeqLM if family in ("t5", "bart") else AutoModelForCausalLM
    made = auto.from_config(MODELS[family]())
    made.name_or_path = made.config._name_or_path = family
    return made.eval()


def rows() -> list[dict]:
    return [{"prompt": " ".join(f"w{(i * j) % 60}" for j in range(1, 3 + i % 4))} for i in range(9)]


def trainer(family: str, settings: dict, folder: Path) -> CLPTrainer:
    config = CLPConfig(output_dir=str(folder), **{**SETTINGS, **settings})
    held_out = rows()[:3] if config.eval_strategy != "no" else None
    return CLPTrainer(
        model(family), [even, small], config, rows(), held_out, processing_class=tokenizer(family)
    )


def outcome(policy: ConditionedPolicy, folder: Path, family: str) -> dict:
    """What a run left: digests of its tensors, its log and completions, and what its policy says and scores."""
    found = {"files": {}, "log": [], "completions": []}
    with contextlib.suppress(Exception):  # forms that have no adapter; refusing is what the tests look at
        policy.export_adapter(folder / "exported", [0.25, 0.75][: len(policy.objectives)], rank=8)
    for path in sorted(folder.rglob("*.safetensors")):
        found["files"][path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    for name in ("log", "completions"):
        path = folder / f"{name}.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        found[name] = [without_times(json.loads(line)) for line in lines]
    found["text"] = policy.generate(["w1 w2 w3", "w4"], max_new_tokens=5, seed=3)
    found["report"] = report(policy)
    return found


def report(policy) -> dict:
    made = evaluate(
        policy,
        [even, small][: len(policy.objectives)],
        ["w1 w2", "w3"],
        grid=2,
        sampling=SamplingParams(4),
        bootstrap=10,
        progress=False,
    )
    return without_times(made.to_dict())


_TIMES = re.compile(r"time|second|runtime|per_sec|date|commit|versions|created|memory|rss", re.IGNORECASE)


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not _TIMES.search(str(k))}
    if isinstance(value, list):
        return [without_times(v) for v in value]
    if isinstance(value, float) and math.isfinite(value):
        return value.hex()
    return value


def once(family: str, settings: dict) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(family, settings, Path(folder) / "run")
        run.train()
        return outcome(run.policy, Path(folder) / "run", family)


def resumed(family: str, settings: dict) -> dict:
    settings = {**settings, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "run"
        trainer(family, settings, place).train()
        run = trainer(family, settings, place)
        run.train(resume_from_checkpoint=str(place / "checkpoint-2"))
        return outcome(run.policy, place, family)


def mixed() -> dict:
    """The soup of two specialists, the mixture of their logits, and a policy that begins with their adapters."""
    with tempfile.TemporaryDirectory() as folder:
        specialists, adapters = {}, {}
        for name, weights in (("even", [1.0, 0.0]), ("small", [0.0, 1.0])):
            settings = {"conditioning": "none", "weight_sampler": "fixed", "fixed_weights": weights}
            run = trainer("llama", settings, Path(folder) / name)
            run.train()
            specialists[name] = run.policy
            adapters[name] = Path(folder) / f"{name}-adapter"
            run.policy.export_adapter(adapters[name])
        soup = ConditionedPolicy.from_specialists(list(specialists.values()), list(specialists))
        begun = ConditionedPolicy.from_adapters(model("llama"), adapters, tokenizer=tokenizer("llama"))
        return {"soup": report(soup), "mixture": report(LogitMixture(soup)), "adapters": report(begun)}


def main(file: str, *names: str) -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    work = {name: lambda c=case: once(*c) for name, case in RUNS.items()}
    work |= {f"resumed {name}": lambda c=case: resumed(*c) for name, case in RESUMED.items()}
    work["mixed"] = mixed
    found = {}
    for name in names or work:
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                found[name] = work[name]()
            except Exception as error:  # a combination that is refused is refused afterwards, too
                found[name] = {"refused": f"{type(error).__name__}: {error}"}
        print(f"{name}: {found[name].get('refused', 'done')}", file=sys.stderr, flush=True)
    Path(file).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
