"""CLPConfig: every setting of a training run, flat, checked where it is made. Names are TRL's where the thing is the same."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from clp_engine.core import ranges
from clp_engine.core.conditions import KL_CONDITIONING
from clp_engine.core.errors import ConfigError, shown
from clp_engine.core.sizes import BOOKKEEPING, check_size
from clp_engine.models.forms import CARRIERS, Conditioning
from clp_engine.objectives.advantages import BASELINES, SCALE_REWARDS
from clp_engine.objectives.coefficients import ESTIMATORS
from clp_engine.objectives.losses import LOSS_TYPES
from clp_engine.objectives.policy_gradient import LossSettings
from clp_engine.objectives.selection import ROLLOUT_SELECTIONS, SCHEDULES, TOKEN_SELECTIONS, SelectionSettings
from clp_engine.policy.prompt_conditioning import DEFAULT_TEMPLATE, TEMPLATE_WITH_KL, check_template
from clp_engine.rollouts.types import SamplingParams
from clp_engine.training.settings import MicroBatching, RolloutSettings
from clp_engine.training.trl_compat import model_init_kwargs, settings

WEIGHT_SAMPLERS = ("dirichlet", "uniform", "grid", "fixed")
KL_NAMES = ("alpha", "alpha_range", "alpha_grid", "beta", "beta_range", "beta_grid")
DEFAULT_ALPHA = 0.1
INTERVALS = ("no", "steps", "epoch")
STEPS = ("logging_steps", "eval_steps", "save_steps")
# A whole number is a count in these, one with a point a share. (A union of types would be no flag of transformers'
# HfArgumentParser, which TRL's scripts use.)
COUNT_OR_SHARE = (*STEPS, "selected_rollouts")
# Settings that do not touch what is computed: a resumed run may change them, and runs that differ in them alone are the same.
WITHOUT_EFFECT = frozenset(
    """output_dir logging_steps logging_first_step eval_strategy eval_steps eval_delay save_strategy save_steps
    save_total_limit overwrite_output_dir log_completions report_to run_name disable_tqdm per_device_eval_batch_size
    reward_workers logging_strategy eval_on_start num_generations_eval""".split()
)


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _takes_trl_s_fields(cls: type) -> type:
    """Have the constructor take the fields of TRL's GRPOConfig beside the class's own, see `trl_compat.settings`."""
    plain = cls.__init__
    names = [option.name for option in dataclasses.fields(cls)]
    defaults = {option.name: option.default for option in dataclasses.fields(cls)}

    @functools.wraps(plain)
    def __init__(self, *values, **given):
        by_place = dict(zip(names, values))
        twice = sorted(by_place.keys() & given.keys())
        if len(values) > len(names) or twice:
            plain(self, *values, **given)  # says what is wrong
        own, self._trl = settings.understood(by_place | given, defaults)
        plain(self, **own)

    cls.__init__ = __init__
    return cls


@_takes_trl_s_fields
@dataclass
class CLPConfig:
    """Settings of `CLPTrainer`. The fields of TRL's GRPOConfig are taken as well: each is a setting of the same name, is
    translated into one, or is refused with the reason and the alternative (`trl_compat.fields`).

    One optimiser step takes `per_device_train_batch_size * gradient_accumulation_steps` completions, `num_generations` for
    each of its prompts; the batch is cut into micro-batches of whole groups. A rollout serves one step, or `num_iterations`
    passes, and several steps a pass where `steps_per_generation` makes it larger: every step but the first is off-policy,
    `min(ratio A, clip(ratio) A)` with `ratio = pi / pi_sampled` by token, `log pi_sampled` kept from sampling. The KL
    coefficient is given as `alpha` (objective `(1 - alpha) w.R - alpha KL`) or `beta` (`w.R - beta KL`), never both; either is
    a number, or a range or list from which one is drawn per prompt. Training lasts `max_steps`, `num_train_epochs`, or until
    `max_generated_tokens` are generated. Raises ConfigError for a value that cannot be used.
    """

    output_dir: str = _option("runs/clp", "folder of the run: logs, checkpoints, final policy")

    # the base model, where the trainer loads it
    bf16: bool | None = _option(
        None,
        "load the base model in bfloat16, or with false in float32; default float32 on a CPU, else as it is",
    )
    model_init_kwargs: dict[str, Any] | str | None = _option(
        None, "how transformers loads the base model: dtype, attn_implementation (eager or sdpa)"
    )
    use_cpu: bool = _option(False, "use the CPU although there is a GPU")
    chat_template_kwargs: dict[str, Any] | str | None = _option(
        None, "values for the tokenizer's chat template, such as enable_thinking; saved with the policy"
    )

    # the policy, where the trainer builds it from a model name
    conditioning: str = _option(
        "lora",
        "what carries the objectives' deltas: lora, full, attention, logit, prompt, none, or several joined by +",
    )
    carrier: str = _option(
        "lora", "what is trained where conditioning is prompt or none: lora, full, attention or logit"
    )
    prompt_template: str | None = _option(
        None, "what conditioning prompt writes into the prompt: text with {weights}, and {kl} where it varies"
    )
    rank: int = _option(16, "rank of each objective's adapter")
    lora_alpha: float | None = _option(None, "the adapters are scaled by lora_alpha / rank; default 2 * rank")
    target_modules: list[str] | None = _option(
        None, "names of the linear layers to condition; default all but the output projection"
    )
    kl_conditioning: str = _option(
        "none", "how the KL coefficient enters the blend: none, linear (1 - alpha) or odds"
    )

    # conditions: which (w, kl) training draws
    weight_sampler: str = _option("dirichlet", "distribution of w: dirichlet, uniform, grid or fixed")
    concentration: float = _option(
        1.0, "concentration of the Dirichlet; 1 is uniform, below 1 prefers single objectives"
    )
    corner_probability: float = _option(0.1, "share of prompts that get a single objective")
    grid_resolution: int = _option(10, "steps along an edge for weight_sampler grid")
    stratified_weights: bool = _option(
        False, "fill the simplex evenly within each step; for weight_sampler uniform"
    )
    fixed_weights: list[float] | None = _option(
        None, "the weights for weight_sampler fixed, in the order of the rewards"
    )
    reward_weights: list[float] | None = _option(
        None,
        "one fixed objective, sum_i weight_i R_i as in TRL, instead of a policy steerable between the rewards; "
        "one delta then carries it, on what conditioning names",
    )
    alpha: float | None = _option(
        None, f"KL coefficient in (1 - alpha) w.R - alpha KL; default {DEFAULT_ALPHA}"
    )
    alpha_range: list[float] | None = _option(None, "low, high: alpha drawn log-uniformly per prompt")
    alpha_grid: list[float] | None = _option(
        None, "values: alpha drawn from them per prompt, each equally likely"
    )
    beta: float | None = _option(None, "KL coefficient in w.R - beta KL (TRL's), instead of alpha")
    beta_range: list[float] | None = _option(None, "low, high: beta drawn log-uniformly per prompt")
    beta_grid: list[float] | None = _option(
        None, "values: beta drawn from them per prompt, each equally likely"
    )

    # the objective
    kl_estimator: str = _option(
        "return", "gradient of the KL: return, exact, mixed (unbiased); k2, k3 (biased, for comparison)"
    )
    baseline: str = _option(
        "leave_one_out", "baseline of the return: leave_one_out, group_mean, none or value (a learned head)"
    )
    value_learning_rate: float = _option(1e-3, "peak learning rate of the head of baseline value")
    scale_rewards: str = _option(
        "none", "divide rewards by a standard deviation: none, group or batch; changes what alpha means"
    )
    loss_type: str = _option("sequence", "how token terms are averaged: sequence, grpo, dapo or dr_grpo")
    num_iterations: int = _option(
        1, "passes over a rollout; after the first step on it the ratio to the sampled log-probs is clipped"
    )
    steps_per_generation: int | None = _option(
        None,
        "micro-batches per rollout, as in TRL: a multiple of gradient_accumulation_steps (the default), for several optimiser "
        "steps on one larger rollout",
    )
    epsilon: float = _option(0.2, "clipping of the ratio from below, and above unless epsilon_high is given")
    epsilon_high: float | None = _option(None, "clipping of the ratio from above")
    delta: float | None = _option(
        None,
        "leave a token out where the ratio is above this, whatever the advantage's sign (two-sided clipping)",
    )
    mask_truncated_completions: bool = _option(False, "leave completions that never ended out of the loss")
    log_kl: bool = _option(
        False,
        "measure the KL to the reference even where no coefficient is above 0, and nothing else needs it",
    )
    rollout_selection: str = _option(
        "none",
        "which completions of a group are trained on: none (all) or max_variance (of the advantages; biased)",
    )
    selected_rollouts: float | None = _option(
        None,
        "how many completions of each group, or which share (a number with a point), rollout_selection keeps",
    )
    token_selection: str = _option(
        "none",
        "which tokens stay in the loss: none (all) or advantage_entropy (largest |advantage| * entropy; biased)",
    )
    selected_tokens: float | None = _option(None, "share of each group's tokens that token_selection keeps")
    selection_schedule: str = _option(
        "constant", "shares of both selections over training: constant, or linear from the given one to 1"
    )

    # completions
    num_generations: int = _option(8, "completions per prompt")
    num_generations_eval: int | None = _option(None, "the same in evaluate(); default num_generations")
    max_completion_length: int = _option(512, "most tokens of a completion")
    partial_rollouts: bool = _option(
        False,
        "completions that are not done after max_completion_length_per_step tokens go on in a later step",
    )
    max_completion_length_per_step: int | None = _option(
        None, "most tokens of a completion at one go with partial_rollouts; divides max_completion_length"
    )
    max_prompt_length: int | None = _option(
        None, "keep the last so many tokens of a prompt; what conditioning prompt writes comes on top"
    )
    skip_bad_rows: bool = _option(
        False, "leave out rows of the dataset that cannot be used, and count them (data/skipped_rows), instead of stopping"
    )
    temperature: float = _option(1.0, "sampling temperature; log-probs are taken at it, too")
    top_k: int | None = _option(None, "draw from the k likeliest tokens only (biases the gradient)")
    top_p: float | None = _option(None, "draw from the nucleus of this mass only (biases the gradient)")
    min_p: float | None = _option(
        None, "draw from tokens with at least this share of the top probability (biases the gradient)"
    )

    stop_strings: list[str] | None = _option(None, "texts that end a completion, beside the end tokens")
    rollout_rows: int | None = _option(
        None,
        "completions decoded at once; prompts wait for places that ended ones leave; default all of a step",
    )

    # batches and optimisation
    per_device_train_batch_size: int = _option(8, "completions per micro-batch")
    gradient_accumulation_steps: int = _option(1, "micro-batches per optimiser step")
    max_tokens_per_microbatch: int | None = _option(
        None,
        "score whole groups together up to so many tokens, prompts once and completions, instead of a fixed number of rows",
    )
    gradient_checkpointing: bool = _option(
        False, "compute each layer again in the backward pass instead of keeping its activations"
    )
    per_device_eval_batch_size: int = _option(64, "completions per batch of evaluate()")
    num_train_epochs: float = _option(3.0, "passes over the training prompts, where max_steps is not given")
    max_steps: int = _option(-1, "optimiser steps; overrides num_train_epochs where positive")
    max_generated_tokens: int | None = _option(
        None,
        "end with the step in which so many completion tokens have been generated; overrides num_train_epochs",
    )
    learning_rate: float = _option(1e-4, "peak learning rate of AdamW")
    lr_scheduler_type: str = _option(
        "linear", "a schedule of transformers.get_scheduler: linear, cosine, constant, ..."
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = _option(
        None, "settings of that schedule, such as num_cycles or min_lr"
    )
    warmup_steps: int = _option(0, "steps of linear warm-up; below 1 a share of all steps")
    warmup_ratio: float = _option(0.0, "warm-up as a share of all steps, where warmup_steps is 0")
    weight_decay: float = _option(0.0, "AdamW's decoupled weight decay")
    adam_beta1: float = _option(0.9, "AdamW's beta1")
    adam_beta2: float = _option(0.999, "AdamW's beta2")
    adam_epsilon: float = _option(1e-8, "AdamW's epsilon")
    max_grad_norm: float = _option(1.0, "clip the gradient's norm; 0 for no clipping")
    shuffle_dataset: bool = _option(True, "draw prompts in a new order every epoch")
    seed: int = _option(42, "of everything random")
    reward_workers: int = _option(
        1,
        "threads that call reward functions while the device computes what needs no reward; 0 calls them in the main thread "
        "(async ones and classifiers need none)",
    )

    # keeping track
    logging_strategy: str = _option("steps", "when to log: no, steps or epoch")
    logging_steps: float = _option(10, "log the mean metrics of so many steps; below 1 a share of all steps")
    logging_first_step: bool = _option(False, "log the first step, too")
    eval_strategy: str = _option("no", "when to run evaluate(): no, steps or epoch")
    eval_steps: float = _option(100, "steps between evaluations; below 1 a share of all steps")
    eval_delay: float = _option(0, "steps (or epochs, with eval_strategy epoch) before the first evaluation")
    eval_on_start: bool = _option(False, "run evaluate() before the first step, too")
    save_strategy: str = _option("steps", "when to write a checkpoint: no, steps or epoch")
    save_steps: float = _option(500, "steps between checkpoints; below 1 a share of all steps")
    metric_for_best_model: str | None = _option(
        None, "metric of evaluate() by which the best policy is told, with or without eval_ in front"
    )
    greater_is_better: bool | None = _option(
        None, "whether more of metric_for_best_model is better; default yes, unless its name ends with loss"
    )
    load_best_model_at_end: bool = _option(
        False, "end with the policy of the best evaluation, which is kept in <output_dir>/best"
    )
    save_total_limit: int | None = _option(
        None, "keep the newest so many checkpoints of the run; None, 0 and less keep all"
    )
    overwrite_output_dir: bool = _option(
        False, "replace an earlier run in output_dir, once this one is built; else it is refused"
    )
    log_completions: bool = _option(False, "write every step's completions to completions.jsonl")
    report_to: str | list[str] = _option("none", "transformers' reporting callbacks: tensorboard, wandb, ...")
    run_name: str | None = _option(None, "name for the reporting callbacks")
    disable_tqdm: bool = _option(False, "no progress bar")

    def __post_init__(self) -> None:
        types = typing.get_type_hints(type(self))
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if option.name == "report_to" and value is None:
                value = "none"
            if (
                option.name in (*STEPS, "warmup_steps")
                and isinstance(value, float)
                and value >= 1
                and value.is_integer()
            ):
                value = int(value)
            # One form of every value: a tuple and a list, 1 and 1.0 must not look like different settings to a resumed run.
            setattr(self, option.name, _coerce(option.name, value, types[option.name]))
        ranges.check_fields(ranges.TRAINING, self)
        if not self.output_dir.strip():
            raise ConfigError(f"output_dir={self.output_dir!r}: expected a folder, such as runs/mine")
        self._fix_conditioning()
        self._check_best_model()
        self._check_choices()
        self._check_steps()
        self._check_sizes()
        self._check_kl()
        self._check_reward_weights()
        self._check_base_model()
        self._check_rollouts()
        self._check_selection()
        if self.batch_size % self.num_generations:
            raise ConfigError(
                f"per_device_train_batch_size * gradient_accumulation_steps = {self.batch_size} completions do not divide into "
                f"groups of num_generations = {self.num_generations}; make it a multiple"
            )
        if self.baseline in ("leave_one_out", "group_mean") and self.num_generations < 2:
            raise ConfigError(
                f"baseline={self.baseline!r} compares completions of one prompt; num_generations must be at least 2 "
                "(baseline='none' and 'value' work with 1)"
            )
        if self.scale_rewards == "group" and self.num_generations < 2:
            raise ConfigError(
                "scale_rewards='group' needs the spread within a group; num_generations must be at least 2"
            )

    def _fix_conditioning(self) -> None:
        """With reward_weights the objective is one for the whole run, and one delta says it all: what conditioning names is its
        carrier then."""
        if self.reward_weights is None or self.conditioning == "none":
            return
        if self.conditioning not in CARRIERS:
            raise ConfigError(
                f"reward_weights fix the objective, and conditioning={self.conditioning!r} is for several; give "
                "conditioning='none' and a carrier"
            )
        if self.conditioning != "lora":
            self.carrier = self.conditioning
        self.conditioning = "none"

    def _check_best_model(self) -> None:
        name = self.metric_for_best_model
        if self.load_best_model_at_end and (name is None or self.eval_strategy == "no"):
            raise ConfigError(
                f"load_best_model_at_end with metric_for_best_model={name!r} and eval_strategy={self.eval_strategy!r}: give a "
                "metric of evaluate(), such as 'eval_reward', and eval_strategy='steps'"
            )
        if self.greater_is_better is None and name is not None:
            self.greater_is_better = not name.endswith("loss")

    def _check_choices(self) -> None:
        choices = {
            "kl_conditioning": KL_CONDITIONING,
            "weight_sampler": WEIGHT_SAMPLERS,
            "kl_estimator": ESTIMATORS,
            "baseline": BASELINES,
            "scale_rewards": SCALE_REWARDS,
            "loss_type": LOSS_TYPES,
            "logging_strategy": INTERVALS,
            "eval_strategy": INTERVALS,
            "save_strategy": INTERVALS,
            "rollout_selection": ROLLOUT_SELECTIONS,
            "token_selection": TOKEN_SELECTIONS,
            "selection_schedule": SCHEDULES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        parsed = Conditioning.parse(self.conditioning, self.carrier)
        if self.prompt_template is not None:
            if not parsed.prompt:
                raise ConfigError(
                    f"prompt_template was given with conditioning={self.conditioning!r}, which writes no prompt"
                )
            check_template(self.prompt_template)
        if self.target_modules is not None and "lora" not in parsed.carriers:
            raise ConfigError(f"target_modules is for 'lora'; conditioning={self.conditioning!r} has none")
        if self.lora_alpha is not None and not parsed.has_ranks:
            raise ConfigError(
                f"lora_alpha scales low-rank factors; conditioning={self.conditioning!r} has none"
            )
        if parsed.prompt and self.kl_conditioning == "none" and not isinstance(self.kl, float):
            if "{kl}" not in (self.written_prompt or ""):
                raise ConfigError(
                    "the KL coefficient varies and nothing tells the policy: put {kl} into prompt_template, or give "
                    "kl_conditioning"
                )
        if self.weight_sampler == "fixed" and self.fixed_weights is None:
            raise ConfigError("weight_sampler='fixed' needs fixed_weights")
        if self.stratified_weights and self.weight_sampler != "uniform":
            raise ConfigError(
                f"stratified_weights is for weight_sampler='uniform'; got weight_sampler={self.weight_sampler!r}"
            )

    def _check_steps(self) -> None:
        for name in STEPS:
            value = getattr(self, name)
            if value > 1 and isinstance(value, float):
                raise ConfigError(f"{name}={value}: expected whole steps, or a share of all steps below 1")
            if isinstance(value, float) and self.max_generated_tokens is not None and self.max_steps <= 0:
                raise ConfigError(
                    f"{name}={value} is a share of all steps, which max_generated_tokens leaves open; give steps"
                )
        clipped = 1 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)
        if self.delta is not None and not self.delta > clipped:
            raise ConfigError(f"delta={self.delta}: expected more than 1 + epsilon_high = {clipped:g}")
        budget = self.max_generated_tokens
        if budget is None and self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ConfigError(
                f"max_steps={self.max_steps} and num_train_epochs={self.num_train_epochs}: one must be positive"
            )
        if budget is not None and self.warmup_steps:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps}: with max_generated_tokens the schedule runs over tokens; "
                "give warmup_ratio, a share of them"
            )

    def _check_sizes(self) -> None:
        tokens = self.rollout_size * self.max_completion_length
        check_size(
            f"per_device_train_batch_size * gradient_accumulation_steps = {self.batch_size:,} completions of up to "
            f"max_completion_length = {self.max_completion_length:,} tokens",
            tokens * BOOKKEEPING,
        )

    def _check_rollouts(self) -> None:
        steps, accumulated = self.steps_per_generation, self.gradient_accumulation_steps
        if steps is not None and steps % accumulated:
            raise ConfigError(
                f"steps_per_generation={steps}: expected a multiple of gradient_accumulation_steps = {accumulated}, "
                "the micro-batches of an optimiser step"
            )
        length, whole = self.max_completion_length_per_step, self.max_completion_length
        if self.partial_rollouts != (length is not None):
            raise ConfigError(
                f"partial_rollouts={self.partial_rollouts} and max_completion_length_per_step={length}: give both or neither"
            )
        if length is not None and whole % length:
            raise ConfigError(
                f"max_completion_length_per_step={length}: expected a number that divides max_completion_length = {whole}"
            )

    def _check_selection(self) -> None:
        for selection, name in (
            ("rollout_selection", "selected_rollouts"),
            ("token_selection", "selected_tokens"),
        ):
            selected, value = getattr(self, selection) != "none", getattr(self, name)
            if selected != (value is not None):
                raise ConfigError(
                    f"{selection}={getattr(self, selection)!r} and {name}={value}: give both or neither"
                )
            if isinstance(value, float) and value > 1:
                raise ConfigError(f"{name}={value}: expected a share, above 0 and at most 1")
        if self.selection_schedule != "constant" and self.rollout_selection == self.token_selection == "none":
            raise ConfigError(f"selection_schedule={self.selection_schedule!r}: nothing is selected")
        if self.rollout_selection == "none":
            return
        if (
            isinstance(self.selected_rollouts, int)
            and not 2 <= self.selected_rollouts <= self.num_generations
        ):
            raise ConfigError(
                f"selected_rollouts={self.selected_rollouts}: expected 2 to num_generations = {self.num_generations}, or a "
                "share such as 0.5; a single completion has no variance"
            )
        if self.num_generations < 2:
            raise ConfigError("rollout_selection chooses within a group; num_generations must be at least 2")
        if self.kl_estimator in ("exact", "mixed") or self.baseline == "value":
            raise ConfigError(
                f"rollout_selection needs the advantage before the policy's pass, and kl_estimator={self.kl_estimator!r} with "
                f"baseline={self.baseline!r} has it only after; use kl_estimator='return' and a baseline of the group"
            )

    def _check_reward_weights(self) -> None:
        weights = self.reward_weights
        if weights is None:
            return
        if not any(weights):
            raise ConfigError(f"reward_weights={weights}: expected weights of 0 or more, one above 0")
        drawn = {
            name: getattr(self, name) for name in ("weight_sampler", "fixed_weights", "stratified_weights")
        }
        odd = [name for name, value in drawn.items() if value not in (None, False, "dirichlet")]
        if odd:
            raise ConfigError(
                f"reward_weights fix the objective, and {' and '.join(odd)} draw it: give one. fixed_weights are weights that "
                "sum to 1; reward_weights are TRL's, whose sum scales the reward"
            )

    def _check_base_model(self) -> None:
        model_init_kwargs.check(self.model_init_kwargs)
        asked = (self.model_init_kwargs or {}).get("dtype")
        if self.bf16 and asked not in (None, "auto", "bfloat16"):
            raise ConfigError(
                f"bf16=True and model_init_kwargs dtype={asked!r}: the frozen base has one dtype, to be kept and "
                "computed in; give one of the two"
            )

    def _check_kl(self) -> None:
        given = [name for name in KL_NAMES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(
                f"{' and '.join(given)} were both given; the KL coefficient is one of {', '.join(KL_NAMES)}"
            )
        name, kl = (given or ["alpha"])[0], self.kl
        values = [kl] if isinstance(kl, float) else list(kl)
        if isinstance(kl, tuple) and values[0] > values[1]:
            raise ConfigError(f"{name}={values}: expected low before high")
        if isinstance(kl, tuple) and values[0] == 0:
            raise ConfigError(f"{name} is drawn log-uniformly and must start above 0; got {values}")
        if len(set(values)) < len(values) and isinstance(kl, list):
            raise ConfigError(f"{name}={values}: a value occurs twice; all are equally likely")
        if self.kl_conditioning == "odds":
            if min(values) == 0:
                raise ConfigError("kl_conditioning='odds' needs a KL coefficient above 0")
            if min(values) == 1 and not self.kl_is_beta:
                raise ConfigError(
                    "kl_conditioning='odds' needs an alpha below 1: at 1 there is only the reference"
                )

    @property
    def loss_settings(self) -> LossSettings:
        return LossSettings(
            self.kl_estimator,
            self.baseline,
            self.scale_rewards,
            self.loss_type,
            self.max_completion_length,
            self.mask_truncated_completions,
            self.epsilon,
            self.epsilon_high,
            self.delta,
            self.kl_is_beta,
            self.log_kl,
        )

    @property
    def selection_settings(self) -> SelectionSettings:
        return SelectionSettings(
            self.rollout_selection,
            self.rollout_share,
            self.token_selection,
            1.0 if self.selected_tokens is None else self.selected_tokens,
            self.selection_schedule,
            self.mask_truncated_completions,
        )

    @property
    def micro_batching(self) -> MicroBatching:
        return MicroBatching(
            self.per_device_train_batch_size, self.max_tokens_per_microbatch, self.temperature
        )

    @property
    def rollout_settings(self) -> RolloutSettings:
        sampling = SamplingParams(
            self.max_completion_length,
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            tuple(self.stop_strings or ()),
        )
        return RolloutSettings(
            self.rollout_size // self.num_generations,
            self.num_generations,
            self.batch_size // self.num_generations,
            self.steps_per_rollout,
            self.evaluation_group,
            sampling,
            self.seed,
            self.shuffle_dataset,
            self.max_completion_length_per_step,
            self.rollout_rows,
        )

    @property
    def reward_scale(self) -> float:
        """What w.R is multiplied by: the sum of reward_weights, whose shares are w; 1 without."""
        return 1.0 if self.reward_weights is None else sum(self.reward_weights)

    @property
    def base_dtype(self) -> str | None:
        """The dtype the base model is loaded in; None where the device decides."""
        asked = (self.model_init_kwargs or {}).get("dtype")
        if self.bf16 is None or not self.bf16 and asked is not None:
            return asked
        return "bfloat16" if self.bf16 else "float32"

    def steps_of(self, name: str, whole: int | None) -> int:
        """A setting in steps, of a run of `whole` steps where it is a share of them."""
        value = getattr(self, name)
        return value if isinstance(value, int) else math.ceil(value * whole)

    @property
    def evaluation_group(self) -> int:
        """Completions per prompt in evaluate()."""
        return self.num_generations_eval or self.num_generations

    @property
    def batch_size(self) -> int:
        """Completions per optimiser step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def rollout_steps(self) -> int:
        """Optimiser steps that one pass over a rollout takes."""
        return (
            self.steps_per_generation or self.gradient_accumulation_steps
        ) // self.gradient_accumulation_steps

    @property
    def steps_per_rollout(self) -> int:
        """Optimiser steps from one rollout to the next: all passes over it."""
        return self.rollout_steps * self.num_iterations

    @property
    def rollout_size(self) -> int:
        """Completions per rollout."""
        return self.batch_size * self.rollout_steps

    @property
    def rollout_share(self) -> float:
        """selected_rollouts as a share of the group; 1 where nothing is selected."""
        selected = self.selected_rollouts
        if selected is None:
            return 1.0
        return selected / self.num_generations if isinstance(selected, int) else selected

    @property
    def written_prompt(self) -> str | None:
        """The template of prompt conditioning, None without: the one given, or one with the KL coefficient if that varies."""
        if not Conditioning.parse(self.conditioning, self.carrier).prompt:
            return None
        return self.prompt_template or (DEFAULT_TEMPLATE if isinstance(self.kl, float) else TEMPLATE_WITH_KL)

    @property
    def kl_is_beta(self) -> bool:
        return any(getattr(self, name) is not None for name in KL_NAMES if name.startswith("beta"))

    @property
    def kl(self) -> float | tuple[float, float] | list[float]:
        """The KL coefficient: a number, a range (low, high), or a list to draw from."""
        span = self.alpha_range if self.alpha_range is not None else self.beta_range
        if span is not None:
            if len(span) != 2:
                raise ConfigError(f"a range of the KL coefficient has two ends; got {span}")
            return (float(span[0]), float(span[1]))
        grid = self.alpha_grid if self.alpha_grid is not None else self.beta_grid
        if grid is not None:
            return [float(value) for value in grid]
        value = self.beta if self.beta is not None else self.alpha
        return float(DEFAULT_ALPHA if value is None else value)

    @property
    def default_kl(self) -> float:
        """The policy's KL coefficient where none is asked for: the number, the geometric middle of the range, or the list's
        median (the lower of two)."""
        kl = self.kl
        if isinstance(kl, tuple):
            return math.sqrt(kl[0] * kl[1])
        return sorted(kl)[(len(kl) - 1) // 2] if isinstance(kl, list) else kl

    def __getattr__(self, name: str) -> Any:
        """Fields of GRPOConfig that are no settings: what holds of them here."""
        return settings.read(self, name, self.__dict__.get("_trl", {}))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    to_sanitized_dict = to_dict  # the name transformers' reporting callbacks use

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLPConfig:
        """From a mapping, such as a YAML file; raises ConfigError for unknown names and values of the wrong type."""
        return cls(**values)


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type, or ConfigError; integers pass for floats and YAML's '1e-4' is a number."""
    options = typing.get_args(hint) if typing.get_origin(hint) not in (list, None) else (hint,)
    if any(typing.get_origin(option) is dict for option in options):
        options = tuple(o for o in options if o is not str)  # a text is a mapping as JSON
    for option in options:
        if option is type(None) and value is None:
            return None
        if typing.get_origin(option) is dict and (mapping := _as_mapping(value)) is not None:
            return mapping
        if typing.get_origin(option) is list and isinstance(value, list | tuple):
            (element,) = typing.get_args(option)
            return [_coerce(name, v, element) for v in value]
        if option is bool and isinstance(value, bool) or option is str and isinstance(value, str):
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option is float and name in COUNT_OR_SHARE and type(value) is int:
            return value
        if option is float and not isinstance(value, bool | bytes | bytearray):
            try:
                return float(value)
            except (TypeError, ValueError, OverflowError):
                continue
    expected = " or ".join(
        "nothing"
        if o is type(None)
        else getattr(o, "__name__", str(o))
        if typing.get_origin(o) is None
        else str(o)
        for o in options
    )
    raise ConfigError(f"{name}={shown(value)}: expected {expected}")


def _as_mapping(value: Any) -> dict | None:
    """A mapping, or JSON text of one, which is how a mapping is given on a command line; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return dict(value) if isinstance(value, Mapping) else None
