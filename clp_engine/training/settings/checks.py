"""The checks of a configuration, with a remedy for each refusal, and the normal form of its values."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any

from clp_engine.core import ranges
from clp_engine.core.conditions import KL_CONDITIONING
from clp_engine.core.errors import ConfigError, shown
from clp_engine.core.sizes import BOOKKEEPING, check_size
from clp_engine.models.forms import CARRIERS, Conditioning
from clp_engine.objectives.advantages import BASELINES, SCALE_REWARDS
from clp_engine.objectives.coefficients import ESTIMATORS
from clp_engine.objectives.losses import LOSS_TYPES
from clp_engine.objectives.policy_gradient import PolicyGradient
from clp_engine.objectives.selection import ROLLOUT_SELECTIONS, SCHEDULES, TOKEN_SELECTIONS
from clp_engine.policy.prompt_conditioning import check_template
from clp_engine.training.settings import vllm
from clp_engine.training.trl_compat import model_init_kwargs

CLPConfig = Any  # the module of CLPConfig imports this one

WEIGHT_SAMPLERS = ("dirichlet", "uniform", "grid", "fixed")
KL_NAMES = ("alpha", "alpha_range", "alpha_grid", "beta", "beta_range", "beta_grid")
INTERVALS = ("no", "steps", "epoch")
STEPS = ("logging_steps", "eval_steps", "save_steps")
# In these settings a whole number is a count and a number with a decimal point is a share. (A union of types could not become a
# flag of transformers' HfArgumentParser, which TRL's scripts use.)
COUNT_OR_SHARE = (*STEPS, "selected_rollouts")


def check(c: CLPConfig) -> None:
    """Normalise the values of a new configuration in place. Raises ConfigError for values that cannot be used."""
    types = typing.get_type_hints(type(c))
    for option in dataclasses.fields(c):
        value = getattr(c, option.name)
        if option.name == "report_to" and value is None:
            value = "none"
        if (
            option.name in (*STEPS, "warmup_steps")
            and isinstance(value, float)
            and value >= 1
            and value.is_integer()
        ):
            value = int(value)
        # One form per value: a tuple and a list, or 1 and 1.0, must not look like different settings to a resumed run.
        setattr(c, option.name, _coerce(option.name, value, types[option.name]))
    ranges.check_fields(ranges.TRAINING, c)
    if not c.output_dir.strip():
        raise ConfigError(f"output_dir={c.output_dir!r}: expected a folder, such as runs/mine")
    _fix_conditioning(c)
    _check_best_model(c)
    _check_choices(c)
    _check_steps(c)
    _check_sizes(c)
    _check_kl(c)
    _check_reward_weights(c)
    _check_base_model(c)
    _check_rollouts(c)
    _check_selection(c)
    _check_groups(c)
    vllm.check(c)
    if (sharding := c.sharding) is not None and sharding.activation_checkpointing:
        c.gradient_checkpointing = True


def _check_groups(c: CLPConfig) -> None:
    if c.batch_size % c.num_generations:
        raise ConfigError(
            f"per_device_train_batch_size * gradient_accumulation_steps = {c.batch_size} completions do not divide into "
            f"groups of num_generations = {c.num_generations}; make it a multiple"
        )
    if PolicyGradient(c.loss_settings).needs.group and c.num_generations < 2:
        raise ConfigError(
            f"baseline={c.baseline!r} compares completions of one prompt; num_generations must be at least 2 "
            "(baseline='none' and 'value' work with 1)"
        )
    if c.scale_rewards == "group" and c.num_generations < 2:
        raise ConfigError(
            "scale_rewards='group' needs the spread within a group; num_generations must be at least 2"
        )


def _fix_conditioning(c: CLPConfig) -> None:
    """With reward_weights, the whole run has one objective and needs only one delta. `conditioning` then names its carrier."""
    if c.reward_weights is None or c.conditioning == "none":
        return
    if c.conditioning not in CARRIERS:
        raise ConfigError(
            f"reward_weights fix the objective, and conditioning={c.conditioning!r} is for several; give "
            "conditioning='none' and a carrier"
        )
    if c.conditioning != "lora":
        c.carrier = c.conditioning
    c.conditioning = "none"


def _check_best_model(c: CLPConfig) -> None:
    name = c.metric_for_best_model
    if c.load_best_model_at_end and (name is None or c.eval_strategy == "no"):
        raise ConfigError(
            f"load_best_model_at_end with metric_for_best_model={name!r} and eval_strategy={c.eval_strategy!r}: give a "
            "metric of evaluate(), such as 'eval_reward', and eval_strategy='steps'"
        )
    if c.greater_is_better is None and name is not None:
        c.greater_is_better = not name.endswith("loss")


def _check_choices(c: CLPConfig) -> None:
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
        if getattr(c, name) not in allowed:
            raise ConfigError(f"{name}={getattr(c, name)!r}: expected one of {', '.join(allowed)}")
    parsed = Conditioning.parse(c.conditioning, c.carrier)
    if c.prompt_template is not None:
        if not parsed.prompt:
            raise ConfigError(
                f"prompt_template was given with conditioning={c.conditioning!r}, which writes no prompt"
            )
        check_template(c.prompt_template)
    if c.target_modules is not None and "lora" not in parsed.carriers:
        raise ConfigError(f"target_modules is for 'lora'; conditioning={c.conditioning!r} has none")
    if c.lora_alpha is not None and not parsed.has_ranks:
        raise ConfigError(f"lora_alpha scales low-rank factors; conditioning={c.conditioning!r} has none")
    if parsed.prompt and c.kl_conditioning == "none" and not isinstance(c.kl, float):
        if "{kl}" not in (c.written_prompt or ""):
            raise ConfigError(
                "the KL coefficient varies and nothing tells the policy: put {kl} into prompt_template, or give "
                "kl_conditioning"
            )
    if c.weight_sampler == "fixed" and c.fixed_weights is None:
        raise ConfigError("weight_sampler='fixed' needs fixed_weights")
    if c.stratified_weights and c.weight_sampler != "uniform":
        raise ConfigError(
            f"stratified_weights is for weight_sampler='uniform'; got weight_sampler={c.weight_sampler!r}"
        )


def _check_steps(c: CLPConfig) -> None:
    for name in STEPS:
        value = getattr(c, name)
        if value > 1 and isinstance(value, float):
            raise ConfigError(f"{name}={value}: expected whole steps, or a share of all steps below 1")
        if isinstance(value, float) and c.max_generated_tokens is not None and c.max_steps <= 0:
            raise ConfigError(
                f"{name}={value} is a share of all steps, which max_generated_tokens leaves open; give steps"
            )
    clipped = 1 + (c.epsilon if c.epsilon_high is None else c.epsilon_high)
    if c.delta is not None and not c.delta > clipped:
        raise ConfigError(f"delta={c.delta}: expected more than 1 + epsilon_high = {clipped:g}")
    budget = c.max_generated_tokens
    if budget is None and c.max_steps <= 0 and c.num_train_epochs <= 0:
        raise ConfigError(
            f"max_steps={c.max_steps} and num_train_epochs={c.num_train_epochs}: one must be positive"
        )
    if budget is not None and c.warmup_steps:
        raise ConfigError(
            f"warmup_steps={c.warmup_steps}: with max_generated_tokens the schedule runs over tokens; "
            "give warmup_ratio, a share of them"
        )


def _check_sizes(c: CLPConfig) -> None:
    tokens = c.rollout_size * c.max_completion_length
    check_size(
        f"per_device_train_batch_size * gradient_accumulation_steps = {c.batch_size:,} completions of up to "
        f"max_completion_length = {c.max_completion_length:,} tokens",
        tokens * BOOKKEEPING,
    )


def _check_rollouts(c: CLPConfig) -> None:
    steps, accumulated = c.steps_per_generation, c.gradient_accumulation_steps
    if steps is not None and steps % accumulated:
        raise ConfigError(
            f"steps_per_generation={steps}: expected a multiple of gradient_accumulation_steps = {accumulated}, "
            "the micro-batches of an optimiser step"
        )
    length, whole = c.max_completion_length_per_step, c.max_completion_length
    if c.partial_rollouts != (length is not None):
        raise ConfigError(
            f"partial_rollouts={c.partial_rollouts} and max_completion_length_per_step={length}: give both or neither"
        )
    if length is not None and whole % length:
        raise ConfigError(
            f"max_completion_length_per_step={length}: expected a number that divides max_completion_length = {whole}"
        )


def _check_selection(c: CLPConfig) -> None:
    for selection, name in (
        ("rollout_selection", "selected_rollouts"),
        ("token_selection", "selected_tokens"),
    ):
        selected, value = getattr(c, selection) != "none", getattr(c, name)
        if selected != (value is not None):
            raise ConfigError(
                f"{selection}={getattr(c, selection)!r} and {name}={value}: give both or neither"
            )
        if isinstance(value, float) and value > 1:
            raise ConfigError(f"{name}={value}: expected a share, above 0 and at most 1")
    if c.selection_schedule != "constant" and c.rollout_selection == c.token_selection == "none":
        raise ConfigError(f"selection_schedule={c.selection_schedule!r}: nothing is selected")
    if c.rollout_selection == "none":
        return
    if isinstance(c.selected_rollouts, int) and not 2 <= c.selected_rollouts <= c.num_generations:
        raise ConfigError(
            f"selected_rollouts={c.selected_rollouts}: expected 2 to num_generations = {c.num_generations}, or a "
            "share such as 0.5; a single completion has no variance"
        )
    if c.num_generations < 2:
        raise ConfigError("rollout_selection chooses within a group; num_generations must be at least 2")
    if PolicyGradient(c.loss_settings).needs.exact_kl or c.baseline == "value":
        raise ConfigError(
            f"rollout_selection needs the advantage before the policy's pass, and kl_estimator={c.kl_estimator!r} with "
            f"baseline={c.baseline!r} has it only after; use kl_estimator='return' and a baseline of the group"
        )


def _check_reward_weights(c: CLPConfig) -> None:
    weights = c.reward_weights
    if weights is None:
        return
    if not any(weights):
        raise ConfigError(f"reward_weights={weights}: expected weights of 0 or more, one above 0")
    drawn = {name: getattr(c, name) for name in ("weight_sampler", "fixed_weights", "stratified_weights")}
    odd = [name for name, value in drawn.items() if value not in (None, False, "dirichlet")]
    if odd:
        raise ConfigError(
            f"reward_weights fix the objective, and {' and '.join(odd)} draw it: give one. fixed_weights are weights that "
            "sum to 1; reward_weights are TRL's, whose sum scales the reward"
        )


def _check_base_model(c: CLPConfig) -> None:
    model_init_kwargs.check(c.model_init_kwargs)
    asked = (c.model_init_kwargs or {}).get("dtype")
    if c.bf16 and asked not in (None, "auto", "bfloat16"):
        raise ConfigError(
            f"bf16=True and model_init_kwargs dtype={asked!r}: the frozen base has one dtype, to be kept and "
            "computed in; give one of the two"
        )


def _check_kl(c: CLPConfig) -> None:
    given = [name for name in KL_NAMES if getattr(c, name) is not None]
    if len(given) > 1:
        raise ConfigError(
            f"{' and '.join(given)} were both given; the KL coefficient is one of {', '.join(KL_NAMES)}"
        )
    name, kl = (given or ["alpha"])[0], c.kl
    values = [kl] if isinstance(kl, float) else list(kl)
    if isinstance(kl, tuple) and values[0] > values[1]:
        raise ConfigError(f"{name}={values}: expected low before high")
    if isinstance(kl, tuple) and values[0] == 0:
        raise ConfigError(f"{name} is drawn log-uniformly and must start above 0; got {values}")
    if len(set(values)) < len(values) and isinstance(kl, list):
        raise ConfigError(f"{name}={values}: a value occurs twice; all are equally likely")
    if c.kl_conditioning == "odds":
        if min(values) == 0:
            raise ConfigError("kl_conditioning='odds' needs a KL coefficient above 0")
        if min(values) == 1 and not c.kl_is_beta:
            raise ConfigError(
                "kl_conditioning='odds' needs an alpha below 1: at 1 there is only the reference"
            )


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type. An integer is valid for a float, and YAML's '1e-4' is a number. Raises ConfigError."""
    options = typing.get_args(hint) if typing.get_origin(hint) not in (list, None) else (hint,)
    if any(typing.get_origin(option) is dict for option in options):
        options = tuple(o for o in options if o is not str)  # the text is JSON of a mapping
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
    """A mapping, or a JSON text of one (the form on a command line). None for any other value."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return dict(value) if isinstance(value, Mapping) else None
