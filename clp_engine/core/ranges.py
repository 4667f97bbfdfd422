"""The range of every numeric setting.

Validation, the command line's flags and the tables of the documentation are made from these ranges. A setting with a range
needs no check of its own; a numeric setting without a range fails a test.

    TRAINING      the fields of `CLPConfig`
    SAMPLING      the fields of `SamplingParams`
    EVALUATION    the arguments of `evaluate`, and of a comparison's evaluations
    GENERATION    the further arguments of a call that generates completions
    ADAPTER       the numbers that describe an adapter
    COMMANDS      the numbers that only the command line has

If a setting is a list or a mapping, its range applies to each entry.
"""

from __future__ import annotations

import dataclasses
import numbers
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from clp_engine.core.errors import ConfigError, shown

LISTS, MAPPINGS = (list, tuple), (Mapping,)
_LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, without NaN and infinities.

    kind: int or float. A whole number is valid for either.
    open_low, open_high: the bound itself lies outside the range.
    off: the values that switch the setting off, in words.
    remedy: what to do instead of giving a value outside the range, as a clause that can end an error message.
    """

    kind: type
    low: float = -_LARGEST
    high: float = _LARGEST
    open_low: bool = False
    open_high: bool = False
    off: str = ""
    remedy: str = ""

    def __contains__(self, value: Any) -> bool:
        kind = numbers.Integral if self.kind is int else numbers.Real
        if not isinstance(value, kind) or isinstance(value, bool):
            return False
        number: Any = value  # any Real compares with floats
        above = number > self.low if self.open_low else number >= self.low
        return bool(above and (number < self.high if self.open_high else number <= self.high))

    def __str__(self) -> str:
        kind = "a whole number" if self.kind is int else "a number"
        low, high = (f"{bound:.12g}" if self.kind is float else str(bound) for bound in (self.low, self.high))
        if self.low == -_LARGEST:
            return kind
        if self.high == _LARGEST:
            return f"{kind} above {low}" if self.open_low else f"{kind}, at least {low}"
        if not self.open_low and not self.open_high:
            return f"{kind} from {low} to {high}"
        return f"{kind} {'above' if self.open_low else 'from'} {low} and {'below' if self.open_high else 'up to'} {high}"

    @property
    def described(self) -> str:
        """The range in words, and the values that switch the setting off."""
        return f"{self}; {self.off} is off" if self.off else str(self)

    def check(self, name: str, value: Any, several: tuple[type, ...] = ()) -> Any:
        """`value`, if it lies in the range. Otherwise raises ConfigError naming the setting.

        several: LISTS or MAPPINGS are also valid if they are not empty and every entry lies in the range.
        """
        entries: Collection[Any] = (value,)
        if isinstance(value, several):
            given: Any = value
            entries = tuple(given.values() if isinstance(given, Mapping) else given)
        if not entries or not all(one in self for one in entries):
            remedy = f"; {self.remedy}" if self.remedy else ""
            raise ConfigError(f"{name}={shown(value)}: expected {self}{remedy}")
        return value

    def parse(self, text: str) -> float:
        """The number written in `text`. Raises ConfigError, without a setting's name, if it lies outside the range."""
        try:
            value: Any = self.kind(text)
        except ValueError:
            value = text
        if value not in self:
            raise ConfigError(f"{shown(value)}: expected {self}")
        return value


def check(table: Mapping[str, Range], **values: Any) -> None:
    """Raises ConfigError for the first value outside its range."""
    for name, value in values.items():
        table[name].check(name, value)


def check_fields(table: Mapping[str, Range], settings: Any) -> None:
    """`Range.check` for every field of a dataclass that has a range.

    None is valid if the field's type has it. Several numbers are valid if the field is a list or mapping of them.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        hint = str(field.type)
        if field.name in table and not (value is None and (field.default is None or "None" in hint)):
            several = LISTS * ("list[" in hint) + MAPPINGS * ("dict[" in hint)
            table[field.name].check(field.name, value, several)


COUNT = Range(int, 1)
SHARE = Range(float, 0, 1)
NOT_NEGATIVE = Range(float, 0)
POSITIVE = Range(float, 0, open_low=True)
SEED = Range(int, 0, 2**32 - 1)  # the seeds that numpy's generators take
_TEMPERATURE = Range(float, 1e-6, 1e6)
_TOP_K = Range(int, 0, off="None or 0")
_TOP_P = Range(float, 0, 1, open_low=True, off="None or 1")
_MIN_P = Range(float, 0, 1, off="None or 0")

ADAPTER = {"rank": COUNT, "lora_alpha": POSITIVE, "min_kl": NOT_NEGATIVE, "default_kl": NOT_NEGATIVE}

SAMPLING = {
    "max_new_tokens": COUNT,
    "temperature": Range(float, 0, 1e6, off="0 (the likeliest token)"),
    "top_k": _TOP_K,
    "top_p": _TOP_P,
    "min_p": _MIN_P,
}

TRAINING = {
    "rank": COUNT,
    "lora_alpha": POSITIVE,
    "concentration": Range(float, 1e-6, 1e6),
    "corner_probability": SHARE,
    "grid_resolution": COUNT,
    "fixed_weights": NOT_NEGATIVE,
    "reward_weights": Range(
        float, 0, remedy="a reward to be made small is a reward function that returns minus it"
    ),
    "alpha": SHARE,
    "alpha_range": SHARE,
    "alpha_grid": SHARE,
    "beta": NOT_NEGATIVE,
    "beta_range": NOT_NEGATIVE,
    "beta_grid": NOT_NEGATIVE,
    "value_learning_rate": NOT_NEGATIVE,
    "ddp_timeout": POSITIVE,
    "num_iterations": COUNT,
    "steps_per_generation": COUNT,
    "epsilon": NOT_NEGATIVE,
    "epsilon_high": NOT_NEGATIVE,
    "delta": Range(float, 1, open_low=True, off="None"),
    "selected_rollouts": POSITIVE,
    "selected_tokens": Range(float, 0, 1, open_low=True, off="None"),
    "num_generations": COUNT,
    "num_generations_eval": COUNT,
    "max_completion_length": COUNT,
    "max_completion_length_per_step": COUNT,
    "max_prompt_length": Range(int, 1, off="None"),
    "temperature": _TEMPERATURE,
    "top_k": _TOP_K,
    "top_p": _TOP_P,
    "min_p": _MIN_P,
    "rollout_rows": COUNT,
    "per_device_train_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "max_tokens_per_microbatch": COUNT,
    "per_device_eval_batch_size": COUNT,
    "num_train_epochs": NOT_NEGATIVE,
    "max_steps": Range(int, -1, off="-1 or 0"),
    "max_generated_tokens": Range(int, 1, off="None"),
    "learning_rate": NOT_NEGATIVE,
    "warmup_steps": Range(int, 0, off="0"),
    "warmup_ratio": Range(float, 0, 1, off="0"),
    "weight_decay": Range(float, 0, off="0"),
    "adam_beta1": Range(float, 0, 1, open_high=True),
    "adam_beta2": Range(float, 0, 1, open_high=True),
    "adam_epsilon": POSITIVE,
    "max_grad_norm": Range(float, 0, off="0"),
    "seed": SEED,
    "reward_workers": Range(int, 0, 1024, off="0"),
    "logging_steps": POSITIVE,
    "eval_steps": POSITIVE,
    "eval_delay": NOT_NEGATIVE,
    "save_steps": POSITIVE,
    "save_total_limit": Range(int, off="None, 0 or less"),
    "vllm_server_port": Range(int, 1, 65535),
    "vllm_server_timeout": POSITIVE,
    "vllm_gpu_memory_utilization": Range(float, 0, 1, open_low=True),
    "vllm_max_model_length": COUNT,
    "vllm_importance_sampling_clip_max": Range(float, 0, open_low=True, off="None"),
    "vllm_importance_sampling_clip_min": Range(float, 0, off="None"),
}

EVALUATION = {
    "prompts": COUNT,
    "num_generations": COUNT,
    "grid": Range(int, 2),
    "kl": NOT_NEGATIVE,
    "kl_limit": POSITIVE,
    "margin": NOT_NEGATIVE,
    "reference_point": Range(float),
    "batch_rows": COUNT,
    "bootstrap": COUNT,
    "max_new_tokens": SAMPLING["max_new_tokens"],
    "temperature": SAMPLING["temperature"],
    "max_prompt_length": COUNT,
    "seed": SEED,
}

GENERATION = {
    "num_return_sequences": COUNT,
    "max_rows": COUNT,
    "seed": Range(int, -(2**63), 2**63 - 1),  # every int64 selects a stream of random numbers
}

COMMANDS = {
    "examples": COUNT,
    "steps": COUNT,
    "prompts": COUNT,
    "batches": Range(int, 3, remedy="fewer give no interval"),
    "completions": COUNT,
    "bootstrap": COUNT,
    "jobs": COUNT,
    "rank": COUNT,
    "port": Range(int, 0, 65535),
    "max_rows": COUNT,
    "queue": COUNT,
    "max_prompt_tokens": COUNT,
    "max_new_tokens": COUNT,
    "seed": SEED,
}


def parse_assignments(text: str, name: str) -> dict[str, float] | list[float]:
    """The mapping of 'a=0.7,b=0.3', or the list of '0.7,0.3'. Raises ConfigError for another text."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    pairs = [part.partition("=") for part in parts]
    named = [bool(equals) for _, equals, _ in pairs]
    try:
        if parts and all(named):
            values = {key.strip(): float(value) for key, _, value in pairs}
            if len(values) < len(pairs):
                raise ConfigError(f"{name}={text!r}: an objective occurs twice")
            return values
        if parts and not any(named):
            return [float(part) for part in parts]
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
    raise ConfigError(f"{name}={text!r}: expected numbers by objective, such as a=0.7,b=0.3")
