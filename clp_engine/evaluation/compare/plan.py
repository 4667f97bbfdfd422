"""What a comparison consists of: methods, the training runs they need, which of these they share, and what is evaluated.

A plan is made from the configuration alone and touches no file. Two methods that need the same training get the same run:
its folder carries a digest of everything that determines training, so a changed setting never finds an older result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clp_engine.core import ranges
from clp_engine.core.conditions import parse_weights
from clp_engine.core.errors import ConfigError, shown
from clp_engine.objectives.weightings import simplex_lattice
from clp_engine.training import runs
from clp_engine.training.config import WITHOUT_EFFECT, CLPConfig
from clp_engine.training.config_checks import KL_NAMES

KINDS = ("clp", "specialists", "soup", "logit_mixing", "kl_specialists")
BUDGETS = ("equal", "each")
OWN_KEYS = (
    "seeds",
    "methods",
    "evaluation",
    "reference_methods",
    "budget_tokens",
    "keep_checkpoints",
    "title",
)
# Settings of a run that do not change what is trained.
# A specialist has one weighting, so these mean nothing to it and must not make two of the same differ.
_SAMPLER_SETTINGS = (
    "weight_sampler",
    "concentration",
    "corner_probability",
    "grid_resolution",
    "fixed_weights",
)
# Checkpoints are there to go on from, nothing else: often, and one of them.
_RUN_DEFAULTS = {"save_steps": 20, "save_total_limit": 1}
Weighting = tuple[float, ...]


@dataclass(frozen=True)
class EvaluationSettings:
    """How every policy is measured: on the same prompts, with the same random numbers.

    prompts: how many held-out ones, None for all; split: of the task's data. grid: as for `evaluate`; the specialists'
    weightings are added to it. kl: one KL coefficient or a list, None for the policy's own. margin: the reference point is
    the base model's mean reward minus this. kl_limit: largest KL that counts in the volume of reward against KL.
    max_new_tokens, temperature: as in training unless given. seed: of prompts, sampling and bootstrap.
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
        values = _mapping("evaluation", values or {})
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigError(f"evaluation: unknown setting {name}; expected {', '.join(sorted(known))}")
        return cls(**values)

    def __post_init__(self) -> None:
        """The weightings of grid and the objectives of margin are checked where they are used."""
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
    """One training. name: its folder under runs/; spec.config holds every setting, seed and folder included."""

    name: str
    spec: runs.RunSpec

    @property
    def config(self) -> dict[str, Any]:
        return self.spec.config

    @property
    def budget(self) -> str:
        tokens = self.config.get("max_generated_tokens")
        return f"{tokens:,} tokens" if tokens else f"{self.config['max_steps']} steps"


@dataclass(frozen=True)
class Evaluation:
    """One report: the policy that `assembly` makes of `runs`, at `grid`.

    name: its folder under evaluations/. assembly: "single" (the run's policy), "soup" (one policy with a delta per run) or
    "logit_mixing" (the soup's specialists, mixed while decoding). kl: as for `evaluate`.
    """

    name: str
    method: str
    seed: int
    runs: tuple[str, ...]
    assembly: str
    grid: tuple[Weighting, ...]
    kl: float | tuple[float, ...] | None


@dataclass(frozen=True)
class Method:
    """One line of the report. settings: CLPConfig's, where they differ from the shared ones."""

    name: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    weightings: tuple[Weighting, ...] = ()
    kls: tuple[float, ...] = ()
    kl_name: str = "alpha"
    budget: str = "equal"

    @property
    def description(self) -> str:
        changed = ", ".join(f"{name} {_short(value)}" for name, value in self.settings.items())
        each = "each with a full budget" if self.budget == "each" else "sharing one budget"
        what = {
            "clp": "one conditioned run",
            "specialists": f"{len(self.weightings)} runs, one per weighting",
            "soup": f"a specialist per objective, deltas interpolated, {each}",
            "logit_mixing": f"a specialist per objective, logits mixed while decoding, {each}",
            "kl_specialists": f"{len(self.kls)} runs, one per {self.kl_name}",
        }[self.kind]
        return f"{what} ({changed})" if changed else what


@dataclass(frozen=True)
class Plan:
    """Methods and what they need. base: the evaluation that gives every other one its reference point."""

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
        return next(m for m in self.methods if m.name == name)

    def of(self, method: str, seed: int) -> list[Evaluation]:
        return [e for e in self.evaluations.values() if (e.method, e.seed) == (method, seed)]

    def run_folder(self, name: str) -> Path:
        return self.output_dir / "runs" / name

    def training_record(self, name: str) -> Path:
        return self.output_dir / "trainings" / f"{name}.json"

    def evaluation_folder(self, name: str) -> Path:
        return self.output_dir / "evaluations" / name

    def users(self, run: str) -> list[str]:
        """Methods that need this run, in order."""
        needing = {e.method for e in self.evaluations.values() if run in e.runs}
        return [m.name for m in self.methods if m.name in needing]

    def evaluation_digest(self, evaluation: Evaluation | None) -> str:
        """Of everything a report depends on; None is the base model's."""
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
        """SamplingParams of every evaluation: those of the shared training settings, unless given."""
        e, trained = self.evaluation, self.spec.config
        return {
            "max_new_tokens": e.max_new_tokens or trained["max_completion_length"],
            "temperature": trained["temperature"] if e.temperature is None else e.temperature,
        }


def make_plan(config: Mapping[str, Any]) -> Plan:
    """From a configuration file's content. Raises ConfigError for whatever cannot be meant."""
    config = dict(_mapping("the configuration", config))
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
    methods = _methods(own["methods"], spec.objectives)
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
        _references(own["reference_methods"], methods),
        builder.runs,
        builder.evaluations,
        evaluation,
        bool(own["keep_checkpoints"]),
        config,
    )


class _Builder:
    """Collects runs and evaluations; a run that is there already is shared."""

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
        """Name of the run with these settings, 1 / share of the full budget."""
        values = {**self.shared, **self.budget, **method.settings}
        if settings:  # a specialist
            dropped = (*_SAMPLER_SETTINGS, *(KL_NAMES if method.kls else ()))
            values = {name: value for name, value in values.items() if name not in dropped}
        values |= settings
        for name in ("max_steps", "max_generated_tokens"):
            if values.get(name, 0) > 0:
                # Rounded up: what does not divide goes to the baseline.
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


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}: expected names and values; got {value!r}")
    return {str(key): entry for key, entry in value.items()}


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
    """The setting that holds a full budget, if it is not max_steps among the shared ones."""
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


def _methods(value: Any, objectives: Sequence[str]) -> tuple[Method, ...]:
    if not value:
        raise ConfigError("methods is missing; name at least one, such as 'CLP: {conditioning: lora}'")
    methods = tuple(_method(name, raw or {}, objectives) for name, raw in _mapping("methods", value).items())
    slugs: dict[str, str] = {}
    for method in methods:
        other = slugs.setdefault(slug(method.name), method.name)
        if other != method.name:
            raise ConfigError(f"methods {other!r} and {method.name!r} would share a folder; rename one")
    return methods


def _method(name: str, raw: Any, objectives: Sequence[str]) -> Method:
    values = dict(_mapping(f"method {name!r}", raw))
    kind = values.pop("kind", "clp")
    if kind not in KINDS:
        raise ConfigError(f"method {name!r}: kind {kind!r}; expected one of {', '.join(KINDS)}")
    taken = [
        s
        for s in ("seed", "output_dir", "max_generated_tokens", "max_steps", "num_train_epochs")
        if s in values
    ]
    if kind != "clp":
        taken += [s for s in ("conditioning", *_SAMPLER_SETTINGS) if s in values]
    if taken:
        raise ConfigError(f"method {name!r}: {taken[0]} is set by the comparison itself; leave it out")
    own: dict[str, Any] = {}
    if kind == "specialists":
        own["weightings"] = _weightings(name, values.pop("weightings", None), objectives)
    elif kind in ("soup", "logit_mixing"):
        own["budget"] = values.pop("budget", "equal")
        if own["budget"] not in BUDGETS:
            raise ConfigError(f"method {name!r}: budget {own['budget']!r}; expected {' or '.join(BUDGETS)}")
        if len(objectives) < 2:
            raise ConfigError(
                f"method {name!r}: {kind} takes at least two objectives; there is {objectives[0]}"
            )
    elif kind == "kl_specialists":
        own |= _kls(name, values, objectives)
    return Method(name, kind, values, **own)


def _weightings(name: str, value: Any, objectives: Sequence[str]) -> tuple[Weighting, ...]:
    if value is None:
        value = simplex_lattice(len(objectives), 5 if len(objectives) == 2 else 3).flip(0).tolist()
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"method {name!r}: weightings={value!r}: expected a list, such as [[1, 0], [0, 1]]")
    try:
        parsed = tuple(_rounded(parse_weights(w, objectives).tolist()) for w in value)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"method {name!r}: {error}") from error
    if len(set(parsed)) < len(parsed):
        raise ConfigError(f"method {name!r}: a weighting occurs twice")
    return parsed


def _kls(name: str, values: dict[str, Any], objectives: Sequence[str]) -> dict[str, Any]:
    """kl_name and kls of `alphas` or `betas`, which leave `values`."""
    given = [(key, values.pop(key)) for key in ("alphas", "betas") if key in values]
    if len(given) != 1 or not isinstance(given[0][1], list | tuple) or not given[0][1]:
        raise ConfigError(f"method {name!r}: expected alphas: [0.01, 0.1, ...], or betas")
    if len(objectives) != 1:
        raise ConfigError(f"method {name!r}: kl_specialists takes one objective; got {', '.join(objectives)}")
    key, kls = given[0]
    ranges.TRAINING[key[:-1]].check(f"method {name!r}: {key}", kls, several=ranges.LISTS)
    return {"kl_name": key[:-1], "kls": tuple(float(k) for k in kls)}


def _references(value: Any, methods: Sequence[Method]) -> tuple[str, ...]:
    """Baselines that ratios are taken to: as given, else the first soup and the first specialists."""
    if value is None:
        kinds = [{"soup"}, {"specialists", "kl_specialists"}]
        firsts = [next((m.name for m in methods if m.kind in kind), None) for kind in kinds]
        return tuple(name for name in firsts if name is not None)
    if not isinstance(value, str | list | tuple):
        raise ConfigError(f"reference_methods={value!r}: expected names of methods")
    names = [value] if isinstance(value, str) else list(value)
    unknown = [n for n in names if n not in {m.name for m in methods}]
    if unknown:
        raise ConfigError(
            f"reference_methods: unknown method {unknown[0]!r}; the methods are {', '.join(m.name for m in methods)}"
        )
    return tuple(names)


def _grid(grid: Any, objectives: Sequence[str], added: Sequence[Weighting]) -> tuple[Weighting, ...]:
    """The weightings of every conditioned policy: the lattice or list asked for, and the specialists'."""
    from clp_engine.evaluation.evaluate import default_grid

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
    return tuple(sorted({_rounded(w) for w in [*weightings, *added]}))


def _kl_grid(kl: Any, added: Sequence[float]) -> float | tuple[float, ...] | None:
    given = () if kl is None else tuple(kl) if isinstance(kl, list | tuple) else (kl,)
    values = tuple(sorted({float(k) for k in (*given, *added)}))
    return values if len(values) > 1 else values[0] if values else None


def _rounded(weights: Sequence[float]) -> Weighting:
    # Six digits, as in reports: weights are float32, and 0.1 should be 0.1 wherever it comes from.
    return tuple(round(float(w), 6) for w in weights)


# --- names -------------------------------------------------------------------------------------------------------------


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.+]+", "-", text.lower()).strip("-") or "method"


def weighting_name(weights: Sequence[float]) -> str:
    return "-".join(f"{w:g}" for w in weights)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def run_digest(spec: runs.RunSpec, config: CLPConfig) -> str:
    """Of what is trained on what for which rewards, and of every setting with an effect, the seed apart.

    Settings at their default do not enter, so that a new one does not orphan finished runs; a changed default is noticed
    by comparing run.json (see `work.check_unchanged`).
    """
    defaults = {f.name: f.default for f in dataclasses.fields(CLPConfig)}
    settings = {
        name: value
        for name, value in config.to_dict().items()
        if name != "seed" and value != defaults[name] and name not in WITHOUT_EFFECT
    }
    return _digest({"about": _about(spec, "dataset"), "settings": settings})


def _about(spec: runs.RunSpec, data: str) -> dict[str, Any]:
    """What a run or a report is about; files by their content."""
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
    """Names and sizes of a model folder's files; reading gigabytes of weights would take too long."""
    folder = Path(name)
    if not (folder / "config.json").is_file():
        return None
    return sorted([p.name, p.stat().st_size] for p in folder.iterdir() if p.is_file())


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]
