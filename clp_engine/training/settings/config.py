"""CLPConfig: every setting of a training run, flat, checked when it is made. Names are TRL's where the meaning is the same."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clp_engine.core.errors import ConfigError
from clp_engine.models.forms import Conditioning
from clp_engine.objectives.policy_gradient import LossSettings
from clp_engine.objectives.selection import SelectionSettings
from clp_engine.policy.prompt_conditioning import DEFAULT_TEMPLATE, TEMPLATE_WITH_KL
from clp_engine.rollouts.types import SamplingParams
from clp_engine.training.parallel.processes import TIMEOUT, world_size
from clp_engine.training.parallel.sharding import ShardSettings
from clp_engine.training.settings import checks
from clp_engine.training.settings.checks import KL_NAMES
from clp_engine.training.settings.groups import MicroBatching, OptimiserSettings, RolloutSettings
from clp_engine.training.settings.vllm import WITHOUT_EFFECT as OF_VLLM
from clp_engine.training.settings.vllm import VllmSettings
from clp_engine.training.settings.vllm import option as _option
from clp_engine.training.trl_compat import settings

DEFAULT_ALPHA = 0.1
# Settings without effect on the computation: a resumed run may change them, and runs that differ only in them count as equal.
WITHOUT_EFFECT = OF_VLLM | frozenset(
    """output_dir logging_steps logging_first_step eval_strategy eval_steps eval_delay save_strategy save_steps
    save_total_limit overwrite_output_dir log_completions report_to run_name disable_tqdm per_device_eval_batch_size
    reward_workers logging_strategy eval_on_start num_generations_eval ddp_timeout ddp_backend fsdp
    fsdp_config""".split()
)

# Settings that together say how large a batch is.
BATCHES = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")


def _takes_trl_s_fields(cls: type) -> type:
    """Make the constructor take the fields of TRL's GRPOConfig beside the class's own, see `trl_compat.settings`."""
    plain = cls.__init__
    names = [option.name for option in dataclasses.fields(cls) if not option.kw_only]
    defaults = {option.name: option.default for option in dataclasses.fields(cls)}

    @functools.wraps(plain)
    def __init__(self, *values, **given):
        by_place = dict(zip(names, values))
        twice = sorted(by_place.keys() & given.keys())
        if len(values) > len(names) or twice:
            plain(self, *values, **given)  # raises an error that names the problem
        own, self._trl = settings.understood(by_place | given, defaults)
        plain(self, **own)

    cls.__init__ = __init__
    cls.__annotations__ |= VllmSettings.__annotations__  # flags are read by them
    return cls


@_takes_trl_s_fields
@dataclass
class CLPConfig(VllmSettings):
    """Settings of `CLPTrainer`. The fields of TRL's GRPOConfig are accepted, too. Each of them is a setting of the same name,
    is translated into one, or is refused with the reason and the alternative (`trl_compat.fields`).

    Batches. One optimiser step takes `per_device_train_batch_size * gradient_accumulation_steps` completions of each process,
    `num_generations` for each of its prompts. The batch is cut into micro-batches of whole groups. N processes with a batch of
    n each take the steps of one process with a batch of N n.

    Rollouts. A rollout serves one step by default. It serves `num_iterations` passes, and each pass takes several steps if
    `steps_per_generation` makes the rollout larger. Every step but the first is then off-policy: `min(ratio A, clip(ratio) A)`
    with `ratio = pi / pi_sampled` by token, and `log pi_sampled` kept from sampling.

    KL coefficient. It is given as `alpha` (objective `(1 - alpha) w.R - alpha KL`) or `beta` (`w.R - beta KL`), never both.
    Either is a number, or a range or list from which one value is drawn per prompt.

    Duration. Training lasts for `max_steps`, for `num_train_epochs`, or until `max_generated_tokens` are generated.

    Raises ConfigError for a value that cannot be used.
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
        False,
        "leave out rows of the dataset that cannot be used, and count them (data/skipped_rows), instead of stopping",
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

    # several processes
    ddp_timeout: float = _option(float(TIMEOUT), "seconds that a process waits for the others at most")
    fsdp: str | None = _option(
        None,
        "shard the base model over the processes: full_shard, shard_grad_op, with offload (transformers')",
    )
    fsdp_config: dict[str, Any] | str | None = _option(
        None, "settings of fsdp, such as vocab_parallel (docs/scaling.md has all), or a JSON file's path"
    )
    ddp_backend: str | None = _option(
        None, "what the processes talk through: nccl, gloo; default nccl on GPUs, gloo on CPUs"
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
        checks.check(self)

    @property
    def loss_settings(self) -> LossSettings:
        return LossSettings(
            kl_estimator=self.kl_estimator,
            baseline=self.baseline,
            scale_rewards=self.scale_rewards,
            loss_type=self.loss_type,
            max_completion_length=self.max_completion_length,
            mask_truncated=self.mask_truncated_completions,
            epsilon=self.epsilon,
            epsilon_high=self.epsilon_high,
            delta=self.delta,
            kl_is_beta=self.kl_is_beta,
            log_kl=self.log_kl,
            correction=self.correction,
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
    def optimiser_settings(self) -> OptimiserSettings:
        return OptimiserSettings(
            self.learning_rate,
            self.value_learning_rate,
            (self.adam_beta1, self.adam_beta2),
            self.adam_epsilon,
            self.weight_decay,
            self.lr_scheduler_type,
            self.lr_scheduler_kwargs,
            self.warmup_steps,
            self.warmup_ratio,
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
        """The factor of w.R: the sum of reward_weights, whose shares are w. 1 without reward_weights."""
        return 1.0 if self.reward_weights is None else sum(self.reward_weights)

    @property
    def base_dtype(self) -> str | None:
        """The dtype the base model is loaded in. None lets the device decide."""
        asked = (self.model_init_kwargs or {}).get("dtype")
        if self.bf16 is None or not self.bf16 and asked is not None:
            return asked
        return "bfloat16" if self.bf16 else "float32"

    def steps_of(self, name: str, whole: int | None) -> int:
        """A setting as a number of steps. whole: the steps of the run, for a setting given as a share of them."""
        value = getattr(self, name)
        return value if isinstance(value, int) else math.ceil(value * whole)

    @property
    def evaluation_group(self) -> int:
        """Completions per prompt in evaluate()."""
        return self.num_generations_eval or self.num_generations

    @property
    def batch_size(self) -> int:
        """Completions per optimiser step, of all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * world_size()

    @property
    def rollout_steps(self) -> int:
        """Optimiser steps of one pass over a rollout."""
        return (
            self.steps_per_generation or self.gradient_accumulation_steps
        ) // self.gradient_accumulation_steps

    @property
    def steps_per_rollout(self) -> int:
        """Optimiser steps from one rollout to the next, in all passes over it."""
        return self.rollout_steps * self.num_iterations

    @property
    def rollout_size(self) -> int:
        """Completions per rollout."""
        return self.batch_size * self.rollout_steps

    @property
    def sharding(self) -> ShardSettings | None:
        """How the base model is sharded, by fsdp and fsdp_config or accelerate's environment; None for a single process."""
        found = ShardSettings.of(self.fsdp, self.fsdp_config)
        return found if world_size() > 1 else None

    @property
    def batches(self) -> list[int]:
        """Completions per optimiser step and per rollout: what `BATCHES` come to, whatever the number of processes."""
        return [self.batch_size, self.rollout_size]

    @property
    def rollout_share(self) -> float:
        """selected_rollouts as a share of the group. 1 without selection."""
        selected = self.selected_rollouts
        if selected is None:
            return 1.0
        return selected / self.num_generations if isinstance(selected, int) else selected

    @property
    def written_prompt(self) -> str | None:
        """The template of prompt conditioning, None without it. By default it has the KL coefficient if that varies."""
        if not Conditioning.parse(self.conditioning, self.carrier).prompt:
            return None
        return self.prompt_template or (DEFAULT_TEMPLATE if isinstance(self.kl, float) else TEMPLATE_WITH_KL)

    @property
    def kl_is_beta(self) -> bool:
        return any(getattr(self, name) is not None for name in KL_NAMES if name.startswith("beta"))

    @property
    def kl(self) -> float | tuple[float, float] | list[float]:
        """The KL coefficient: a number, a range (low, high), or a list of values to draw from."""
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
        """The policy's KL coefficient for calls that give none.

        It is the number, the geometric mean of the range's ends, or the list's median (the lower of two).
        """
        kl = self.kl
        if isinstance(kl, tuple):
            return math.sqrt(kl[0] * kl[1])
        return sorted(kl)[(len(kl) - 1) // 2] if isinstance(kl, list) else kl

    def __getattr__(self, name: str) -> Any:
        """A field of GRPOConfig that is no setting here: the value that describes this trainer."""
        return settings.read(self, name, self.__dict__.get("_trl", {}))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    to_sanitized_dict = to_dict  # the name transformers' reporting callbacks use

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLPConfig:
        """A configuration from a mapping, such as a YAML file. Raises ConfigError for unknown names and wrong types."""
        return cls(**values)
