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
    engine's own         see bench.step.profile

The models are those of bench.step.step_case.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch

from bench.core import schema, targets
from bench.core.environment import why_not_importable
from bench.core.measure import medians, summary
from bench.core.memory import extra_peak
from bench.core.runner import raised, say
from bench.step import step_case
from bench.step.phases import Phases
from bench.step.profile import engine_share
from bench.step.step_case import (
    StepCase,
    length_reward,
    load_model,
    load_tokenizer,
    other_reward,
    our_trainer,
    prompts_of,
)

OURS = targets.OURS
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


OUR_REWARDS = {
    f"{OURS}, one objective": (length_reward,),
    f"{OURS}, two objectives": (length_reward, other_reward),
}


class TimedStep(StepCase):
    """A StepCase that measures itself, beside TRL."""

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


def cases(device: str, sizes: str) -> list[TimedStep]:
    return step_case.cases(device, sizes, TimedStep)


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
