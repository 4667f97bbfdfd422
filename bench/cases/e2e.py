"""One whole training step (rollout, rewards, scoring, update): TRL's GRPOTrainer with PEFT against CLPTrainer.

Both train the same model on the same prompts (cut to exactly the same number of tokens) and sample exactly `new` tokens per
completion, with the same reward function, rank, optimiser and KL to the reference. Each round makes some steps of the one,
then of the other, in one process; a time is that of one step as the trainer itself logs it, the first step of every round
left out. Two variants of ours are measured: one objective (what TRL does too) and two with a weighting per prompt (what it
cannot do). Peak memory is that of a whole run, the model included.

Models: "docsum", the trained one that is shipped; "qwen2.5-0.5b" and "qwen2.5-7b", their shapes with random weights, since
nothing can be downloaded where this runs: a step takes the same time whatever the weights are. Random weights write no text,
so rewards are constant there.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch

from bench import schema, targets
from bench.memory import extra_peak
from bench.peers import why_not_importable

OURS = targets.OURS


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
        return "float32" if self.model in ("docsum", "tiny") else "bfloat16"

    @property
    def shape(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("batch", "group", "prompt", "new")}

    @property
    def id(self) -> str:
        return schema.case_id("e2e", self.title, self.shape, self.dtype, {"model": self.model})

    def measure(
        self, modules: Mapping[str, ModuleType], quick: bool, share: float, environment: Mapping
    ) -> schema.Case:
        steps, least, most = (2, 2, 2) if quick else (self.steps, 2, 5)
        variants = {v.name: v for v in self._unavailable(modules)}
        runs = {n: run for n, run in self._variants(modules).items() if n not in variants}
        times: dict[str, list[float]] = {name: [] for name in runs}
        end = time.monotonic() + share
        for number in range(most):
            if number >= least and time.monotonic() > end:
                break
            for name, run in runs.items():
                if name in variants and variants[name].status != "ok":
                    continue
                found: list[float] = []

                def whole(run: Callable = run, found: list[float] = found) -> None:
                    found.extend(run(steps))

                try:
                    peak = extra_peak(whole, self.device)
                except Exception as error:
                    variants[name] = _raised(name, error)
                    continue
                finally:
                    if self.device == "cuda":
                        torch.cuda.empty_cache()
                # The least of the rounds: the first one also pays for what a library loads once.
                before = variants.setdefault(name, schema.Variant(name, "ok", extra_peak_bytes=peak))
                if peak is not None:
                    before.extra_peak_bytes = min(before.extra_peak_bytes, peak)
                times[name] += found
        return self._record(list(variants.values()), times, environment)

    def _record(self, variants, times, environment: Mapping) -> schema.Case:
        from bench.measure import summary

        for variant in variants:
            if variant.status == "ok":
                variant.times = summary(times[variant.name])
                variant.timing = "steps of a run, the first left out"
        options = {"model": self.model}
        record = schema.Case(self.id, "e2e", self.op, self.title, self.shape, self.dtype, variants, options)
        record.verdicts = targets.verdicts(self.targets, record, {}, environment)
        return record

    def _unavailable(self, modules: Mapping[str, ModuleType]):
        if "trl" in modules:
            for package in ("trl.trainer.utils", "peft", "datasets"):
                if reason := why_not_importable(package):
                    yield schema.Variant("trl + peft", "unavailable", reason)
                    break
        if "liger" in modules and "trl" in modules:
            reason = "needs CUDA (Triton kernels)" if self.device == "cpu" else None
            if (
                reason := reason
                or why_not_importable("liger_kernel")
                or why_not_importable("trl.trainer.utils")
            ):
                yield schema.Variant("trl + peft + liger", "unavailable", reason)

    def _variants(self, modules: Mapping[str, ModuleType]) -> dict[str, Callable[[int], list[float]]]:
        found = {}
        if "trl" in modules:
            found["trl + peft"] = lambda steps: _trl(self, steps, liger=False)
            if "liger" in modules:
                found["trl + peft + liger"] = lambda steps: _trl(self, steps, liger=True)
        found[f"{OURS}, one objective"] = lambda steps: _ours(self, steps, length_reward)
        found[f"{OURS}, two objectives"] = lambda steps: _ours(self, steps, [length_reward, other_reward])
        return found


def cases(device: str, sizes: str) -> list[StepCase]:
    if sizes == "tiny":
        return [StepCase("tiny", device, batch=4, group=2, prompt=12, new=4)]
    docsum = StepCase("docsum", device, 32, 8, 120, 40, targets=("step-cpu",) if device == "cpu" else ())
    if sizes == "cpu":
        return [docsum]
    on_gpu = ("step-gpu", "step-gpu-memory")
    return [
        StepCase("qwen2.5-0.5b", device, 64, 8, 256, 128, on_gpu, steps=4),
        StepCase("qwen2.5-7b", device, 32, 8, 256, 128, on_gpu, steps=3),
        docsum,
    ]


def _raised(name: str, error: Exception) -> schema.Variant:
    if isinstance(error, torch.OutOfMemoryError):
        return schema.Variant(name, "unavailable", "out of memory")
    first = (str(error).strip().splitlines() or [""])[0]
    return schema.Variant(name, "unavailable", f"raised {type(error).__name__}: {first[:200]}")


@functools.cache
def prompts_of(count: int, tokens: int) -> list[dict[str, str]]:
    """Prompts of exactly `tokens` tokens, from the text of the training split."""
    from clp_engine.tasks.docsum import load_dataset

    tokenizer = _tokenizer()
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


def _tokenizer():
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
        "tiny": dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=5000, tie_word_embeddings=True,
        ),
    }  # fmt: skip
    # The shipped tokenizer's special tokens: the ids that prompts are padded and ended with.
    config = Qwen2Config(**shapes[name], max_position_embeddings=4096, eos_token_id=0, pad_token_id=1)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if name == "tiny" else torch.bfloat16
        )


def _trl(case: StepCase, steps: int, liger: bool) -> list[float]:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = _tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=case.batch,
            num_generations=case.group,
            max_steps=steps,
            max_completion_length=case.new,
            beta=0.1,
            learning_rate=1e-4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=case.device == "cpu",
            use_liger_kernel=liger,
            bf16=False,
            fp16=False,
            gradient_checkpointing=False,
            generation_kwargs={"min_new_tokens": case.new},
            optim="adamw_torch_fused",
            seed=1,
        )
        trainer = GRPOTrainer(
            model=load_model(case.model, case.device),
            reward_funcs=length_reward,
            args=config,
            train_dataset=Dataset.from_list(prompts_of(256, case.prompt)),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.train()
        return _step_times(trainer.state.log_history, case.new)


def _ours(case: StepCase, steps: int, rewards) -> list[float]:
    from clp_engine.config import CLPConfig
    from clp_engine.trainer import CLPTrainer

    tokenizer = _tokenizer()
    with tempfile.TemporaryDirectory() as folder:
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
        rows = prompts_of(256, case.prompt)
        tokenizer.eos_token = None
        trainer = CLPTrainer(model, rewards, config, rows, processing_class=tokenizer)
        trainer.train()
        return _step_times(trainer.state.log_history, case.new)


def _step_times(history: list[dict], new_tokens: int) -> list[float]:
    steps = [entry for entry in history if "step_time" in entry]
    for entry in steps:
        if entry["completions/mean_length"] != new_tokens:
            raise RuntimeError(
                f"completions of {entry['completions/mean_length']} tokens instead of {new_tokens}: not comparable"
            )
    return [entry["step_time"] for entry in steps[1:]]
