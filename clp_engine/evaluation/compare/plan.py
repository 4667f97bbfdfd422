"""The plan of a comparison: its methods, the training runs that they need and share, and the evaluations.

A plan follows from the configuration, the data and the reward files; making it writes nothing. Methods that need the same
training share a run. The name of its folder holds a digest of everything that determines the training, so that a changed
setting never finds an older result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clp_engine.core import ranges
from clp_engine.core.conditions import parse_weights
from clp_engine.core.errors import ConfigError, shown
from clp_engine.evaluation.compare.methods import (
    SAMPLER_SETTINGS,
    Method,
    Weighting,
    mapping,
    read_methods,
    read_references,
    rounded,
    slug,
    weighting_name,
)
from clp_engine.evaluation.front import default_grid
from clp_engine.objectives.weightings import simplex_lattice
from clp_engine.training import runs
from clp_engine.training.config import KL_NAMES, WITHOUT_EFFECT, CLPConfig

OWN_KEYS = (
    "seeds",
    "methods",
    "evaluation",
    "reference_methods",
    "budget_tokens",
    "keep_checkpoints",
    "title",
)
# Checkpoints serve only to resume an interrupted run: they are frequent, and the newest is kept.
_RUN_DEFAULTS = {"save_steps": 20, "save_total_limit": 1}


@dataclass(frozen=True)
class EvaluationSettings:
    """The evaluation of every policy: on the same prompts, with the same random numbers.

    prompts: number of held-out prompts; None takes all
    split: of the task's data
    grid: as for `evaluate`; the weightings of specialists are added to it
    kl: a KL coefficient or a list; None takes the policy's own
    margin: the reference point is the base model's mean reward minus this
    kl_limit: the largest KL that counts in the volume of reward against KL
    max_new_tokens, temperature: of sampling; None takes those of training
    seed: of the choice of prompts, sampling and bootstrap
    """

    prompts: int | None = 256
    num_generations: int = 1
    grid: int | list | None = None
    kl: float | list[float] | None = None
    margin: float | dict[str, float] = 0.1
    kl_limit: float | None = None
    batch_rows: int = 128
    bootstrap: int = 1000
    split: str = "test"
    max_new_tokens: int | None = None
    temperature: float | None = None
    seed: int = 0

    @classmethod
    def from_values(cls, values: Mapping[str, Any] | None) -> EvaluationSettings:
        """From the entry `evaluation` of the configuration. Raises ConfigError for an unknown or invalid setting."""
        values = mapping("evaluation", values or {})
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigError(f"evaluation: unknown setting {name}; expected {', '.join(sorted(known))}")
        return cls(**values)

    def __post_init__(self) -> None:
        """Check the numbers. The plan checks the weightings of grid, and `evaluate` the objectives of margin."""
        table = dict(ranges.EVALUATION)
        if isinstance(self.grid, list | tuple):
            del table["grid"]
        try:
            ranges.check_fields(table, self)
        except ConfigError as error:
            raise ConfigError(f"evaluation: {error}") from error
        if not isinstance(self.split, str):
            raise ConfigError(f"evaluation: split={shown(self.split)}: expected the name of a split")


@dataclass(frozen=True)
class Run:
    """A training run. name: of its folder under runs/. spec.config: every setting, with the seed and the folder."""

    name: str
    spec: runs.RunSpec

    @property
    def config(self) -> dict[str, Any]:
        """The settings of training, by name."""
        return self.spec.config

    @property
    def budget(self) -> str:
        """The budget as text, such as "400,000 tokens"."""
        tokens = self.config.get("max_generated_tokens")
        return f"{tokens:,} tokens" if tokens else f"{self.config['max_steps']} steps"


@dataclass(frozen=True)
class Evaluation:
    """An evaluation: the policy that `assembly` makes of `runs`, measured at `grid`.

    name: of its folder under evaluations/
    assembly: "single" (the policy of the run), "soup" (one policy with a delta for each run), or "logit_mixing" (the
        specialists of a soup, whose logits are mixed while decoding)
    kl: as for `evaluate`
    """

    name: str
    method: str
    seed: int
    runs: tuple[str, ...]
    assembly: str
    grid: tuple[Weighting, ...]
    kl: float | tuple[float, ...] | None


@dataclass(frozen=True)
class Plan:
    """A comparison: its methods, and the runs and evaluations that they need, by name. references: names of the baselines."""

    output_dir: Path
    spec: runs.RunSpec
    kl_is_beta: bool
    seeds: tuple[int, ...]
    methods: tuple[Method, ...]
    references: tuple[str, ...]
    runs: dict[str, Run]
    evaluations: dict[str, Evaluation]
    evaluation: EvaluationSettings
    keep_checkpoints: bool
    config: dict[str, Any]

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.spec.objectives

    def method(self, name: str) -> Method:
        """The method of a name."""
        return next(m for m in self.methods if m.name == name)

    def of(self, method: str, seed: int) -> list[Evaluation]:
        """The evaluations of a method at a seed."""
        return [e for e in self.evaluations.values() if (e.method, e.seed) == (method, seed)]

    def run_folder(self, name: str) -> Path:
        return self.output_dir / "runs" / name

    def training_record(self, name: str) -> Path:
        """The file for the cost of a run, which exists when the run is done."""
        return self.output_dir / "trainings" / f"{name}.json"

    def evaluation_folder(self, name: str) -> Path:
        return self.output_dir / "evaluations" / name

    def users(self, run: str) -> list[str]:
        """The names of the methods that need the run `run`, in the order of the configuration."""
        needing = {e.method for e in self.evaluations.values() if run in e.runs}
        return [m.name for m in self.methods if m.name in needing]

    def evaluation_digest(self, evaluation: Evaluation | None) -> str:
        """A digest of everything that the report of an evaluation depends on. None stands for the base model."""
        return _digest(
            {
                "about": _about(self.spec, "eval_dataset"),
                "settings": dataclasses.asdict(self.evaluation),
                "sampling": self.sampling,
                "evaluation": None if evaluation is None else dataclasses.asdict(evaluation),
            }
        )

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of SamplingParams for every evaluation: those given, else those of the shared training settings."""
        e, trained = self.evaluation, self.spec.config
        return {
            "max_new_tokens": e.max_new_tokens or trained["max_completion_length"],
            "temperature": trained["temperature"] if e.temperature is None else e.temperature,
        }


def make_plan(config: Mapping[str, Any]) -> Plan:
    """The plan of a configuration file's content. Raises ConfigError for an invalid configuration."""
    config = dict(mapping("the configuration", config))
    about = {name: config.get(name) for name in runs.RUN_KEYS}
    own = {name: config.get(name) for name in OWN_KEYS}
    shared = {name: value for name, value in config.items() if name not in (*about, *own)}
    output = shared.pop("output_dir", None)
    if not output:
        raise ConfigError("output_dir is missing; it holds runs, evaluations and the report")
    if "seed" in shared:
        raise ConfigError("seed belongs to a single run; a comparison takes a list: seeds: [0, 1, 2]")
    if "max_generated_tokens" in shared:
        raise ConfigError("max_generated_tokens belongs to a single run; a comparison takes budget_tokens")
    seeds = _seeds(own["seeds"])
    spec = runs.RunSpec.from_values(about)
    if spec.task is not None:
        task = runs.find_task(spec.task)
        limits = ("max_completion_length", "max_prompt_length")
        shared = {**{name: getattr(task, name) for name in limits}, **shared}
    shared = {**_RUN_DEFAULTS, **shared}
    evaluation = EvaluationSettings.from_values(own["evaluation"])
    if spec.task is None and spec.eval_dataset is None:
        raise ConfigError("eval_dataset is missing; methods are compared on held-out prompts")
    methods = read_methods(own["methods"], spec.objectives)
    spec = dataclasses.replace(
        spec, command="compare", config=_settings(shared, "the shared settings").to_dict()
    )
    builder = _Builder(Path(output), spec, shared, _budget(own["budget_tokens"], shared), methods, evaluation)
    for seed in seeds:
        for method in methods:
            builder.add(method, seed)
    return Plan(
        Path(output),
        spec,
        _settings(shared, "the shared settings").kl_is_beta,
        seeds,
        methods,
        read_references(own["reference_methods"], methods),
        builder.runs,
        builder.evaluations,
        evaluation,
        bool(own["keep_checkpoints"]),
        config,
    )


class _Builder:
    """Collects the runs and evaluations of methods. Methods share a run whose settings are equal."""

    def __init__(self, output, spec, shared, budget, methods, evaluation):
        self.output, self.spec, self.shared, self.budget = output, spec, shared, budget
        self.runs: dict[str, Run] = {}
        self.evaluations: dict[str, Evaluation] = {}
        self.grid = _grid(evaluation.grid, spec.objectives, [w for m in methods for w in m.weightings])
        self.kl = _kl_grid(evaluation.kl, [k for m in methods for k in m.kls])

    def add(self, method: Method, seed: int) -> None:
        name = f"{slug(method.name)}-seed{seed}"
        count = len(self.spec.objectives)
        if method.kind == "clp":
            needed = (self.run(method, seed, {}),)
            self.evaluate(name, method, seed, needed, "single", self.grid, self.kl)
        elif method.kind in ("soup", "logit_mixing"):
            share = count if method.budget == "equal" else 1
            corners = [tuple(float(i == j) for j in range(count)) for i in range(count)]
            needed = tuple(self.specialist(method, seed, w, share) for w in corners)
            self.evaluate(name, method, seed, needed, method.kind, self.grid, self.kl)
        elif method.kind == "specialists":
            for w in method.weightings:
                needed = (self.specialist(method, seed, w),)
                self.evaluate(f"{name}/{weighting_name(w)}", method, seed, needed, "single", (w,), self.kl)
        else:
            for kl in method.kls:
                needed = (self.specialist(method, seed, (1.0,), kl=kl),)
                self.evaluate(
                    f"{name}/{method.kl_name}-{kl:g}", method, seed, needed, "single", ((1.0,),), kl
                )

    def specialist(
        self, method: Method, seed: int, weights: Weighting, share: int = 1, kl: float | None = None
    ) -> str:
        settings = {"conditioning": "none", "weight_sampler": "fixed", "fixed_weights": list(weights)}
        if kl is not None:
            settings |= {method.kl_name: kl, "kl_conditioning": "none"}
        label = (
            f"specialist-{weighting_name(weights)}" if kl is None else f"specialist-{method.kl_name}-{kl:g}"
        )
        return self.run(method, seed, settings, share, label)

    def run(
        self, method: Method, seed: int, settings: dict[str, Any], share: int = 1, label: str | None = None
    ) -> str:
        """Add a run with these settings and 1 / share of the full budget, unless there is one. Returns its name."""
        values = {**self.shared, **self.budget, **method.settings}
        if settings:  # a specialist
            dropped = (*SAMPLER_SETTINGS, *(KL_NAMES if method.kls else ()))
            values = {name: value for name, value in values.items() if name not in dropped}
        values |= settings
        for name in ("max_steps", "max_generated_tokens"):
            if values.get(name, 0) > 0:
                # Rounded up: the remainder goes to the baseline.
                values[name] = math.ceil(values[name] / share)
        where = f"method {method.name!r}"
        config = _settings({**values, "seed": seed}, where)
        digest = run_digest(self.spec, config)
        name = f"{slug(label or config.conditioning)}-{digest}-seed{seed}"
        folder = self.output / "runs" / name
        config = dataclasses.replace(config, output_dir=str(folder))
        self.runs.setdefault(name, Run(name, dataclasses.replace(self.spec, config=config.to_dict())))
        return name

    def evaluate(self, name, method, seed, needed, assembly, grid, kl) -> None:
        self.evaluations[name] = Evaluation(name, method.name, seed, needed, assembly, tuple(grid), kl)


# --- reading -----------------------------------------------------------------------------------------------------------


def _settings(values: Mapping[str, Any], where: str) -> CLPConfig:
    try:
        return CLPConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _seeds(value: Any) -> tuple[int, ...]:
    good = isinstance(value, list | tuple) and value and all(seed in ranges.SEED for seed in value)
    if not good or len(set(value)) < len(value):
        given = "seeds is missing" if value is None else f"seeds={shown(value)}"
        raise ConfigError(f"{given}; expected a list of different whole numbers, such as [0, 1, 2]")
    return tuple(value)


def _budget(tokens: Any, shared: Mapping[str, Any]) -> dict[str, int]:
    """The setting for a full budget; none where the shared settings hold max_steps."""
    if tokens is None:
        if not isinstance(shared.get("max_steps"), int) or shared["max_steps"] < 1:
            raise ConfigError(
                "a comparison is at an equal budget; give budget_tokens (generated) or max_steps"
            )
        return {}
    if "max_steps" in shared:
        raise ConfigError("budget_tokens and max_steps were both given; a full budget is one of them")
    ranges.COUNT.check("budget_tokens", tokens)
    return {"max_generated_tokens": tokens}


def _grid(grid: Any, objectives: Sequence[str], added: Sequence[Weighting]) -> tuple[Weighting, ...]:
    """The weightings of every conditioned policy: those of the lattice or list, and those of the specialists."""
    if grid is None:
        weightings = default_grid(len(objectives)).tolist()
    elif isinstance(grid, int):
        weightings = simplex_lattice(len(objectives), grid).tolist()
    elif isinstance(grid, list | tuple) and grid:
        try:
            weightings = [parse_weights(w, objectives).tolist() for w in grid]
        except (ValueError, TypeError) as error:
            raise ConfigError(f"evaluation: grid: {error}") from error
    else:
        raise ConfigError(f"evaluation: grid={grid!r}: expected points per edge or a list of weightings")
    return tuple(sorted({rounded(w) for w in [*weightings, *added]}))


def _kl_grid(kl: Any, added: Sequence[float]) -> float | tuple[float, ...] | None:
    given = () if kl is None else tuple(kl) if isinstance(kl, list | tuple) else (kl,)
    values = tuple(sorted({float(k) for k in (*given, *added)}))
    return values if len(values) > 1 else values[0] if values else None


# --- names -------------------------------------------------------------------------------------------------------------


def run_digest(spec: runs.RunSpec, config: CLPConfig) -> str:
    """A digest of the model, the data, the rewards, and every setting with an effect but the seed.

    Settings at their default are left out, so that finished runs stay valid when a setting is added. `work.check_unchanged`
    detects a changed default by comparison with run.json.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(CLPConfig)}
    settings = {
        name: value
        for name, value in config.to_dict().items()
        if name != "seed" and value != defaults[name] and name not in WITHOUT_EFFECT
    }
    return _digest({"about": _about(spec, "dataset"), "settings": settings})


def _about(spec: runs.RunSpec, data: str) -> dict[str, Any]:
    """The model, objectives, task, data and rewards of a run or report, with digests of the content of files."""
    dataset = getattr(spec, data)
    return {
        "model": [spec.model, _model_files(spec.model)],
        "objectives": list(spec.objectives),
        "task": spec.task,
        "data": None if dataset is None else _content(Path(dataset)),
        "rewards": {
            name: [reward, _content(Path(reward.rpartition(":")[0]))] for name, reward in spec.rewards.items()
        },
    }


def _content(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _model_files(name: str) -> list | None:
    """Names and sizes of the files in a model folder. Reading gigabytes of weights would take too long."""
    folder = Path(name)
    if not (folder / "config.json").is_file():
        return None
    return sorted([p.name, p.stat().st_size] for p in folder.iterdir() if p.is_file())


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]
