"""Every numeric setting has a range (core/ranges.py): what lies outside is a ConfigError that names it, whoever asks."""

import dataclasses
import itertools
import json
import math
import typing

import numpy as np
import pytest
import torch
from engine.conftest import build_policy

from clp_engine import ConditionedPolicy
from clp_engine.core import ranges
from clp_engine.core.errors import ConfigError, shown
from clp_engine.core.ranges import Range
from clp_engine.core.sizes import check_size
from clp_engine.evaluation.compare.plan import EvaluationSettings
from clp_engine.evaluation.evaluate import evaluate
from clp_engine.objectives.weightings import simplex_lattice
from clp_engine.rollouts.engines import trials
from clp_engine.rollouts.rollout import rollout
from clp_engine.rollouts.types import SamplingParams
from clp_engine.serving.requests import GenerateRequest
from clp_engine.training.settings.config import CLPConfig
from clp_engine.training.trainer import CLPTrainer

CLASSES = {CLPConfig: ranges.TRAINING, SamplingParams: ranges.SAMPLING, EvaluationSettings: ranges.EVALUATION}
# Numbers and others that no setting of numbers takes, whatever its range.
NEVER = (
    math.nan, math.inf, -math.inf, -2, -1e-3, -(10**12), 10**400, -(10**400), 10**5000, "many", "nan", "", b"1", {}, {"a": 1},
    [], [[]], [None], object(), 1j,
)  # fmt: skip
# What another setting must be for a boundary of this one to be allowed.
BESIDE = {
    "delta": {"epsilon": 0.0},
    "fixed_weights": {"weight_sampler": "fixed"},
    "max_completion_length_per_step": {"partial_rollouts": True},
    "selected_rollouts": {"rollout_selection": "max_variance"},
    "selected_tokens": {"token_selection": "advantage_entropy"},
    "num_generations": {"baseline": "none"},
    "per_device_train_batch_size": {"num_generations": 1, "baseline": "none"},
    "max_steps": {"num_train_epochs": 1.0},
    "num_train_epochs": {"max_steps": 1},
}
LISTS = {
    name: (lambda value: [value]) for name in ("fixed_weights", "reward_weights", "alpha_grid", "beta_grid")
}
LISTS |= {name: (lambda value: [value, value]) for name in ("alpha_range", "beta_range")}


def numeric_fields(cls: type) -> list[str]:
    hints = typing.get_type_hints(cls)
    return [f.name for f in dataclasses.fields(cls) if {int, float} & _leaves(hints[f.name])]


def _leaves(hint) -> set:
    parts = typing.get_args(hint)
    return set().union(*map(_leaves, parts)) if parts else {hint}


# Fields that take something else beside a number: shares of all steps, weightings, numbers by objective.
OTHERWISE = {"warmup_steps": float, "grid": list, "margin": dict}
FIELDS = [(cls, name) for cls in CLASSES for name in numeric_fields(cls)]


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_a_number_out_of_range_is_refused_by_name_and_by_nothing_else(cls, name):
    values = CLASSES[cls][name]  # a field without a range fails here
    outside = [v for v in (*NEVER, *_just_outside(values)) if v not in values]
    outside = [v for v in outside if not isinstance(v, OTHERWISE.get(name, ()))]
    for value in outside:
        wrapped = LISTS[name](value) if name in LISTS and cls is CLPConfig else value
        with pytest.raises(ConfigError, match=rf"\b{name}=") as caught:
            cls(**{**(BESIDE.get(name, {}) if cls is CLPConfig else {}), name: wrapped})
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_the_ends_of_a_range_are_taken(cls, name):
    values = CLASSES[cls][name]
    for value in _ends(values):
        given = {**(BESIDE.get(name, {}) if cls is CLPConfig else {}), name: value}
        if name in LISTS and cls is CLPConfig:
            given[name] = LISTS[name](value)
        try:
            made = cls(**given)
        except (
            ConfigError
        ) as error:  # of settings that do not go together, or of what it takes, never of the range
            assert str(values) not in str(error)
            continue
        assert getattr(made, name) in (given[name], None)


def _just_outside(values: Range) -> list[float]:
    if values.kind is int:
        return [values.low - 1, *([values.high + 1] if values.high < 2**63 else []), values.low + 0.5]
    ends = [values.low if values.open_low else math.nextafter(values.low, -math.inf)]
    return ends + [values.high if values.open_high else math.nextafter(values.high, math.inf)]


def _ends(values: Range) -> list[float]:
    if values.kind is int:
        return [values.low, *([values.high] if values.high < 2**63 else [values.low + 1])]
    low = math.nextafter(values.low, math.inf) if values.open_low else values.low
    return [low, math.nextafter(values.high, -math.inf) if values.open_high else values.high]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_p": 0}, "top_p=0.0: expected a number above 0"),
        ({"top_p": True}, "top_p=True: expected float"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": False}, "top_k=False"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"max_prompt_length": 0}, "max_prompt_length=0"),
        ({"lora_alpha": 0}, "lora_alpha=0.0"),
        ({"lora_alpha": -1}, "lora_alpha=-1.0"),
        ({"warmup_ratio": 1.5}, "warmup_ratio=1.5"),
        ({"corner_probability": 1.01}, "corner_probability=1.01"),
        ({"epsilon_high": -0.1}, "epsilon_high=-0.1"),
        ({"eval_delay": math.nan}, "eval_delay=nan"),
        ({"seed": -1}, "seed=-1"),
        ({"adam_beta2": 1.0}, "adam_beta2=1.0"),
        ({"per_device_train_batch_size": 10**12}, r"1,000,000,000,000 completions .* takes 10 PiB of memory"),
        ({"max_completion_length": 10**12}, r"takes 160 TiB of memory, more than any machine has"),
        ({"output_dir": ""}, "output_dir='': expected a folder"),
    ],
)
def test_settings_of_training_that_once_ran(given, message):
    with pytest.raises(ConfigError, match=message):
        CLPConfig(**given)


def test_what_switches_truncation_off_is_taken_and_draws_as_without_it():
    assert CLPConfig(top_k=0).top_k is None and CLPConfig(top_p=1).top_p is None
    policy = build_policy("qwen2")
    drawn = [
        policy_rollout(policy, SamplingParams(6, 1.0, *options)).completion_ids
        for options in ((), (0, 1.0, 0.0), (10**30, None, None))
    ]
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])


def test_numbers_of_numpy_become_plain_ones():
    sampling = SamplingParams(np.int64(4), np.float32(0.5), np.int32(3), np.float64(0.9))
    assert json.loads(json.dumps(dataclasses.asdict(sampling)))["temperature"] == 0.5
    assert CLPConfig(learning_rate=np.float32(0.5)).to_dict()["learning_rate"] == 0.5


@pytest.mark.parametrize("decoder", ["native", "torch"])
def test_both_decoders_draw_at_the_ends_of_the_ranges(monkeypatch, decoder):
    monkeypatch.setenv(trials.SWITCH, decoder)
    policy = build_policy("qwen2")
    ends = {name: _ends(values) for name, values in ranges.SAMPLING.items() if name != "max_new_tokens"}
    for name, value in [(n, v) for n, both in ends.items() for v in both]:
        drawn = policy_rollout(policy, SamplingParams(**{"max_new_tokens": 3, name: value}))
        assert drawn.logprobs.isfinite().all() or name == "temperature", (name, value)
        assert drawn.completion_ids.ge(0).all()


def policy_rollout(policy, sampling: SamplingParams):
    return rollout(policy, [[1, 2, 3]], policy.conditions(), num_generations=2, sampling=sampling, seed=3)


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_what_no_machine_has_room_for_is_refused_at_once_with_the_memory_it_takes(tmp_path):
    policy = build_policy("qwen2")
    tried = [
        lambda: policy.generate("w1", max_new_tokens=10**12),
        lambda: policy.generate("w1", num_return_sequences=10**12),
        lambda: evaluate(policy, [len] * 2, ["w1"], bootstrap=10**12),
        lambda: evaluate(policy, [len] * 2, ["w1"], grid=10**12),
        lambda: evaluate(policy, [len] * 2, ["w1"], num_generations=10**12),
        lambda: simplex_lattice(9, 1000),
        lambda: ConditionedPolicy.from_pretrained(policy.plain_copy(), ["a", "b"], rank=10**12),
        lambda: CLPTrainer(
            "nowhere", {"a": len}, CLPConfig(str(tmp_path), max_completion_length=10**10, use_cpu=True)
        ),
    ]
    for attempt in tried:
        with pytest.raises(
            ConfigError, match=r"takes [\d.e+]+ [TPE]iB of memory, more than this machine has"
        ):
            attempt()
    check_size("nothing", 0, "cpu")


# -- arguments that are no field ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, 0, -1, "8", None, True, 10**400])
def test_functions_check_their_numbers_by_the_same_table(value):
    policy = build_policy("qwen2")
    base = policy.plain_copy()
    arguments = {
        "rank": lambda: ConditionedPolicy.from_pretrained(base, ["a", "b"], rank=[8, value]),
        "lora_alpha": lambda: ConditionedPolicy.from_pretrained(base, ["a", "b"], lora_alpha=[8.0, value]),
        "num_return_sequences": lambda: policy.generate("w1", num_return_sequences=value),
        "batch_rows": lambda: evaluate(policy, [len] * 2, ["w1"], batch_rows=value),
        "bootstrap": lambda: evaluate(policy, [len] * 2, ["w1"], bootstrap=value),
        "kl_limit": lambda: evaluate(policy, [len] * 2, ["w1"], kl_limit=value),
        "grid": lambda: evaluate(policy, [len] * 2, ["w1"], grid=value),
    }
    for name, attempt in arguments.items():
        if value is None and name in ("grid", "kl_limit"):
            continue
        with pytest.raises(ConfigError, match=name):
            attempt()


def test_a_range_says_what_it_takes():
    said = {
        Range(int, 1): "a whole number, at least 1",
        Range(float, 0, open_low=True): "a number above 0",
        Range(float, 0, 1): "a number from 0 to 1",
        Range(float, 0, 1, open_low=True): "a number above 0 and up to 1",
        Range(float, 0, 1, open_high=True): "a number from 0 and below 1",
        Range(float): "a number",
    }
    assert all(str(values) == text for values, text in said.items())
    assert ranges.TRAINING["top_p"].described.endswith("; None or 1 is off")


def test_a_value_is_shown_short():
    deep = list(itertools.accumulate(range(40), lambda inner, _: [inner] * 2, initial=0))[-1]
    for value in (deep, "x" * 10**6, 10**5000, [[]] * 10**5, {i: i for i in range(10**5)}):
        assert len(shown(value)) < 300


@pytest.mark.parametrize("name", ["kl", "temperature", "max_new_tokens", "seed"])
def test_so_does_a_request_to_the_steering_page(name):
    for value in (*NEVER, -1, True, 10**12):
        if (name, value) == ("seed", 10**12) or value is None:
            continue
        with pytest.raises(ConfigError, match=rf"^{name}\b"):
            GenerateRequest.parse({"text": "w1", name: value})
