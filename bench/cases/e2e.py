"""One whole training step (rollout, rewards, scoring, update): TRL's GRPOTrainer with PEFT against CLPTrainer.

Both train the same model on the same prompts (cut to exactly the same number of tokens) and sample exactly `new` tokens per
completion, with the same reward function, rank, optimiser, seed and KL to the reference. Each round makes some steps of the
one, then of the other, in one process. A step lasts from the end of the one before to its own end, seen by one and the same
callback in both trainers: nothing that a run does between two steps is left out. The first step of every round is.

Two variants of ours are measured: one objective (what TRL does too) and two with a weighting per prompt (what it cannot do).

    tokens per second    batch * (prompt + new) / median step: a prompt counts once for each of its completions, for both
    peak memory          that of a whole run, the model included
    phases               ours as the trainer logs them; TRL logs none, so its methods are timed from outside: `_generate`,
                         `_calculate_rewards`, clipping and the optimiser's step, and what is left of `training_step`
    log-prob gap         between rollout and training, where the trainer logs it (sampling/sampling_logp_difference)
    engine's own         see bench.step_profile

Models: "docsum", the trained one that is shipped; "qwen2-30m", Qwen2-shaped, 28 million parameters, a vocabulary of 32,000;
"qwen2.5-0.5b" and "qwen2.5-7b", the shapes of those. All but the first have random weights (from a fixed seed), since
nothing can be downloaded where this runs: a step takes the same time whatever the weights are. They write tokens that the
tokenizer has no text for, so rewards are nearly constant there.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType

import torch

from bench import schema, targets
from bench.measure import medians, summary
from bench.memory import extra_peak
from bench.peers import why_not_importable

OURS = targets.OURS
FLOAT32 = ("docsum", "tiny", "qwen2-30m")
_GAPS = {
    "sampling/sampling_logp_difference/mean": "logprob_gap_mean",
    "sampling/sampling_logp_difference/max": "logprob_gap_max",
}
REST = "rest"


@dataclass
class Steps:
    """What a run of some steps showed: seconds of each, seconds of each phase by step, numbers that the trainer logged."""

    seconds: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    logged: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, other: Steps) -> None:
        self.seconds += other.seconds
        self.phases += other.phases
        for name, values in other.logged.items():
            self.logged[name] += values

    def phase_medians(self) -> dict[str, float]:
        """Median seconds of each phase, and the rest of a step."""
        found = medians(self.phases)
        rest = statistics.median(s - sum(p.values()) for s, p in zip(self.seconds, self.phases))
        return {**found, REST: max(0.0, rest)} if found else {}


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

    def measure(
        self, modules: Mapping[str, ModuleType], quick: bool, share: float, result: schema.Result
    ) -> schema.Case:
        steps, least, most = (2, 2, 2) if quick else (self.steps, 2, 5)
        variants = {v.name: v for v in self._unavailable(modules)}
        runs = {n: run for n, run in self._variants(modules).items() if n not in variants}
        seen = {name: Steps() for name in runs}
        end = time.monotonic() + share
        for number in range(most):
            if number >= least and time.monotonic() > end:
                break
            for name, run in runs.items():
                if name in variants and variants[name].status != "ok":
                    continue
                found = Steps()

                def whole(run: Callable = run, found: Steps = found) -> None:
                    found.add(run(steps))

                try:
                    peak = extra_peak(whole, self.device)
                except Exception as error:
                    variants[name] = raised(name, error)
                    continue
                finally:
                    if self.device == "cuda":
                        torch.cuda.empty_cache()
                # The least of the rounds: the first one also pays for what a library loads once.
                before = variants.setdefault(name, schema.Variant(name, "ok", extra_peak_bytes=peak))
                if peak is not None:
                    before.extra_peak_bytes = min(before.extra_peak_bytes, peak)
                seen[name].add(found)
        self._engine_share(variants)
        return self._record(list(variants.values()), seen, result.environment)

    def _engine_share(self, variants: Mapping[str, schema.Variant]) -> None:
        """Of each variant of ours, in a run of its own: its spans cost time, little as it is."""
        from bench.runner import say
        from bench.step_profile import engine_share

        for name, rewards in OUR_REWARDS.items():
            if name in variants and variants[name].status == "ok":
                try:
                    variants[name].measures["engine_share"] = engine_share(self, rewards)
                except (
                    Exception
                ) as error:  # the times that were measured are worth keeping; the target is then not judged
                    say(f"{self.id}: {name}: no profile: {raised(name, error).reason}")

    def _record(self, variants, seen: Mapping[str, Steps], environment: Mapping) -> schema.Case:
        for variant in variants:
            if variant.status == "ok":
                found = seen[variant.name]
                variant.times = summary(found.seconds)
                variant.timing = (
                    "from the end of a step to the end of the next, the first of each run left out"
                )
                variant.phases = found.phase_medians()
                variant.measures |= {n: statistics.median(values) for n, values in found.logged.items()}
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

    def _variants(self, modules: Mapping[str, ModuleType]) -> dict[str, Callable[[int], Steps]]:
        found = {}
        if "trl" in modules:
            found["trl + peft"] = functools.partial(trl_steps, self, liger=False)
            if "liger" in modules:
                found["trl + peft + liger"] = functools.partial(trl_steps, self, liger=True)
        for name, rewards in OUR_REWARDS.items():
            found[name] = functools.partial(_ours, self, rewards=rewards)
        return found


def cases(device: str, sizes: str) -> list[StepCase]:
    if sizes == "tiny":
        return [StepCase("tiny", device, batch=4, group=2, prompt=12, new=4)]
    on_cpu = ("step-cpu", "engine-cpu") if device == "cpu" else ()
    docsum = StepCase("docsum", device, 32, 8, 120, 40, on_cpu)
    small = StepCase("qwen2-30m", device, 32, 8, 120, 40, on_cpu, steps=4)
    if sizes == "cpu":
        return [docsum, small]
    on_gpu = ("step-gpu", "step-gpu-memory", "engine-gpu")
    return [
        StepCase("qwen2.5-0.5b", device, 64, 8, 256, 128, on_gpu, steps=4),
        StepCase("qwen2.5-7b", device, 32, 8, 256, 128, on_gpu, steps=3),
        docsum,
        small,
    ]


def case_of(model: str, device: str) -> StepCase:
    """The case of a model's name, on any device. Raises ValueError naming those there are."""
    known = {case.model: case for sizes in ("tiny", "gpu") for case in cases(device, sizes)}
    if model not in known:
        raise ValueError(f"unknown model {model!r}; known: {', '.join(known)}")
    return known[model]


def raised(name: str, error: Exception) -> schema.Variant:
    if isinstance(error, torch.OutOfMemoryError):
        return schema.Variant(name, "unavailable", "out of memory")
    first = (str(error).strip().splitlines() or [""])[0]
    return schema.Variant(name, "unavailable", f"raised {type(error).__name__}: {first[:200]}")


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


OUR_REWARDS = {
    f"{OURS}, one objective": (length_reward,),
    f"{OURS}, two objectives": (length_reward, other_reward),
}


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


class Phases:
    """Seconds of a step by phase; a phase inside another is not counted in the outer one."""

    def __init__(self, synchronise: Callable[[], None]):
        self.seconds: dict[str, float] = defaultdict(float)
        self._synchronise, self._open = synchronise, []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self.now()
        self._open.append(0.0)
        try:
            yield
        finally:
            spent = self.now() - start
            self.seconds[phase] += spent - self._open.pop()
            if self._open:
                self._open[-1] += spent

    def now(self) -> float:
        self._synchronise()
        return time.perf_counter()

    def time_methods(self, owner: object, methods: Mapping[str, str]) -> None:
        """Methods of `owner` by name, and the phase that each is. Raises AttributeError where one is not there."""
        for name, phase in methods.items():
            setattr(owner, name, self._timed(getattr(owner, name), phase))

    def _timed(self, method: Callable, phase: str) -> Callable:
        @functools.wraps(method)
        def timed(*arguments, **options):
            with self(phase):
                return method(*arguments, **options)

        return timed

    def drain(self) -> dict[str, float]:
        found, self.seconds = dict(self.seconds), defaultdict(float)
        return found


def _step_clock(device: str):
    """A callback that both trainers take: `seconds`, from the end of each step to the end of the next, and with
    `phases` those of each step but the first."""
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        def __init__(self):
            self.seconds: list[float] = []
            self.by_phase: list[dict[str, float]] = []
            self.phases = Phases(torch.cuda.synchronize if device == "cuda" else lambda: None)
            self._before: float | None = None
            self._optimiser = None

        def on_pre_optimizer_step(self, args, state, control, **_):
            self._optimiser = self.phases("optimizer")
            self._optimiser.__enter__()

        def on_optimizer_step(self, args, state, control, **_):
            self._optimiser.__exit__(None, None, None)

        def on_step_end(self, args, state, control, **_):
            now = self.phases.now()
            spent = self.phases.drain()
            if self._before is not None:
                self.seconds.append(now - self._before)
                self.by_phase.append(spent)
            self._before = now

    return StepClock()


# TRL 1.16; what is left of training_step is the reference's and the policy's scoring, and the backward pass.
_TRL_PHASES = {
    "_generate": "rollout",
    "_calculate_rewards": "reward",
    "training_step": "update",
    "_clip_grad_norm": "optimizer",
}


def trl_steps(case: StepCase, steps: int, liger: bool) -> Steps:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    tokenizer, clock = load_tokenizer(), _step_clock(case.device)
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
            callbacks=[clock],
        )
        clock.phases.time_methods(trainer, _TRL_PHASES)
        trainer.train()
        return _steps(case, trainer.state.log_history, clock.seconds, clock.by_phase)


def _ours(case: StepCase, steps: int, rewards: Sequence[Callable]) -> Steps:
    clock = _step_clock(case.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = our_trainer(case, steps, rewards, folder, [clock])
        trainer.train()
        history = trainer.state.log_history
        phases = [
            {name.removeprefix("time/"): value for name, value in entry.items() if name.startswith("time/")}
            for entry in history
            if "step_time" in entry
        ]
        return _steps(case, history, clock.seconds, phases[1:])


def our_trainer(
    case: StepCase, steps: int, rewards: Sequence[Callable], folder: str, callbacks: Sequence = ()
):
    from clp_engine.training.settings.config import CLPConfig
    from clp_engine.training.trainer import CLPTrainer

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


def _steps(
    case: StepCase, history: list[dict], seconds: list[float], phases: list[dict[str, float]]
) -> Steps:
    """Of a finished run, whose `history` a trainer logged. Raises RuntimeError where it read or wrote another number of tokens
    than the case says."""
    logged = defaultdict(list)
    entries = [entry for entry in history if "step_time" in entry]
    for number, entry in enumerate(entries, 1):
        length, tokens = entry["completions/mean_length"], entry["num_tokens"]
        if length != case.new or tokens != number * case.tokens:
            raise RuntimeError(
                f"completions of {length} tokens instead of {case.new}, {tokens} tokens after {number} steps instead of "
                f"{number * case.tokens}: not comparable"
            )
        for name, short in _GAPS.items():
            if name in entry:
                logged[short].append(entry[name])
    return Steps(seconds, phases, logged)
