"""The description of a run in run.json: the model, the data, the rewards and the settings."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from clp_engine.core import ranges, records
from clp_engine.core.errors import ConfigError, shown
from clp_engine.core.files import write_text
from clp_engine.data.sources import load_reward, read_rows
from clp_engine.training.runs.run_folder import note

if TYPE_CHECKING:
    from clp_engine.tasks.registry import Task


RUN_KEYS = ("model", "task", "dataset", "eval_dataset", "rewards", "objectives")


@dataclass(frozen=True)
class RunSpec:
    """The description of a run, with either `task`, or `dataset` and `rewards`.

    model: name or path, by default the task's own. objectives: names of the rewards, in the order of weight vectors.
    task: name of an embedded task. dataset, eval_dataset: JSON lines, each row with a `prompt`.
    command: the command that made the run, train or demo.
    rewards: objective -> "module:function", "file.py:function", or the name or path of a sequence classifier.
    config: the settings of training. train_seconds: the duration of training, None if unknown.
    run: the identity of the run, see `run_folder`. signature: evidence that it was trained here, see `trust`.
    """

    model: str
    objectives: tuple[str, ...]
    task: str | None = None
    dataset: str | None = None
    eval_dataset: str | None = None
    rewards: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    train_seconds: float | None = None
    command: str = "train"
    run: str | None = None
    signature: str | None = None

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> RunSpec:
        """A description from the values of RUN_KEYS, None where not given.

        Raises ConfigError for missing or contradictory values.
        """
        values = {name: value for name, value in values.items() if value is not None}
        for name in ("model", "task", "dataset", "eval_dataset"):
            if name in values and (not isinstance(values[name], str | Path) or not str(values[name]).strip()):
                raise ConfigError(f"{name}={shown(values[name])}: expected a text")
        task_name, objectives = values.get("task"), _names(values.get("objectives"))
        if task_name is not None:
            for other in ("dataset", "rewards"):
                if other in values:
                    raise ConfigError(f"task and {other} were both given; a task brings its own {other}")
            task = find_task(task_name)
            chosen = _select(task, objectives or task.default_objectives)
            return cls(str(values.get("model", task_name)), tuple(chosen), task=task_name)
        for name in ("model", "dataset", "rewards"):
            if name not in values:
                raise ConfigError(f"{name} is missing; give a task, or model, dataset and rewards")
        rewards = _reward_specs(values["rewards"])
        unknown = [name for name in objectives if name not in rewards]
        if unknown:
            raise ConfigError(f"unknown objective {unknown[0]!r}; the rewards are {', '.join(rewards)}")
        rewards = {name: rewards[name] for name in objectives or rewards}
        for name in ("dataset", "eval_dataset"):
            if name in values and not os.path.isfile(values[name]):
                raise ConfigError(f"{name}: there is no file {values[name]}")
        return cls(
            str(values["model"]),
            tuple(rewards),
            dataset=str(values["dataset"]),
            rewards=rewards,
            eval_dataset=None if "eval_dataset" not in values else str(values["eval_dataset"]),
        )

    @classmethod
    def load(cls, directory: str | Path) -> RunSpec | None:
        """The description in run.json of a run folder, or None if there is no such file."""
        path = Path(directory) / "run.json"
        if not path.is_file():
            return None
        spec = records.read(path, cls)
        try:
            for name in ranges.TRAINING.keys() & spec.config.keys():
                if spec.config[name] is not None:
                    ranges.TRAINING[name].check(name, spec.config[name], ranges.LISTS + ranges.MAPPINGS)
            records.finite({"train_seconds": spec.train_seconds}, path)
        except ConfigError as error:
            raise ConfigError(f"{path} is damaged or another's ({error}); {records.AGAIN}") from error
        return spec

    @classmethod
    def find(cls, folder: str | Path) -> RunSpec | None:
        """`load` of a run folder, or of the run folder around a checkpoint or a policy."""
        return cls.load(folder) or cls.load(Path(folder).parent)

    def save(self, directory: str | Path) -> None:
        path = Path(directory) / "run.json"
        note(directory, [path])
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    def same_training(self, other: RunSpec) -> bool:
        """Whether both describe the same training. Its place and its duration do not count."""

        def essence(spec: RunSpec) -> RunSpec:
            aside = ("output_dir", "overwrite_output_dir", "disable_tqdm")
            config = {k: v for k, v in spec.config.items() if k not in aside}
            return replace(spec, config=config, train_seconds=None, run=None, signature=None)

        return essence(self) == essence(other)

    def reward_functions(self) -> dict[str, Callable | str]:
        """Reward functions by objective, in order. A classifier stays a name, which RewardSet loads."""
        if self.task is not None:
            return _select(find_task(self.task), self.objectives)
        if not self.rewards:
            raise ConfigError(
                "this run names neither a task nor rewards; give --task, or --dataset and --rewards"
            )
        return {name: load_reward(spec) for name, spec in self.rewards.items()}

    def train_rows(self, limit: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
        """Training rows of the task or of the dataset, the first `limit` of them."""
        if self.task is not None:
            task = find_task(self.task)
            return task.load_dataset(task.rl_split, limit=limit, seed=seed)
        if self.dataset is None:
            raise ConfigError("this run names neither a task nor a dataset; train it with one")
        return read_rows(self.dataset)[:limit]

    def eval_rows(
        self, limit: int | None = None, seed: int = 0, split: str | None = None
    ) -> list[dict[str, Any]]:
        """Held-out rows: the task's split ("test" by default), or the first rows of eval_dataset."""
        if self.task is not None:
            try:
                return find_task(self.task).load_dataset(split or "test", limit=limit, seed=seed)
            except ValueError as error:
                raise ConfigError(str(error)) from error
        if split is not None:
            raise ConfigError(
                f"split {split!r}: splits are of a task's data, and this run has a dataset; leave --split out"
            )
        if self.eval_dataset is None:
            raise ConfigError("this run has no eval_dataset; give prompts to evaluate on with --dataset FILE")
        return read_rows(self.eval_dataset)[:limit]


def _names(value: str | Iterable[str] | None) -> tuple[str, ...]:
    """Names from 'a,b' or a list."""
    if not isinstance(value, str | list | tuple | NoneType) or not all(
        isinstance(n, str) for n in value or ()
    ):
        raise ConfigError(f"objectives={shown(value)}: expected names of rewards, such as coverage,brevity")
    parts = value.split(",") if isinstance(value, str) else list(value or ())
    return tuple(str(part).strip() for part in parts if str(part).strip())


def find_task(name: str) -> Task:
    from clp_engine.tasks.registry import get_task

    try:
        return get_task(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _select(task: Task, names: Iterable[str]) -> dict[str, Callable]:
    try:
        return task.select(tuple(names))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _reward_specs(value: Any) -> dict[str, str]:
    """objective -> specification, from a mapping, or from a list of 'name=specification' or plain specifications."""
    entries = [value] if isinstance(value, str) else value
    texts = entries.values() if isinstance(entries, Mapping) else entries
    if not isinstance(entries, list | tuple | Mapping) or not all(isinstance(t, str) and t for t in texts):
        raise ConfigError(
            f"rewards={shown(value)}: expected a reward by name (module:function, file.py:function or a classifier), or a list"
        )
    if isinstance(entries, Mapping):
        return {str(name): spec for name, spec in entries.items()}
    specs: dict[str, str] = {}
    for entry in entries:
        name, equals, spec = entry.partition("=")
        if not equals:
            # "module:function" gets the name function, "owner/model" the name model.
            name, spec = entry.rstrip("/").replace(":", "/").rsplit("/", 1)[-1], entry
        if name in specs:
            raise ConfigError(f"two rewards are called {name!r}; name them: --rewards first=... second=...")
        specs[name] = spec
    if not specs:
        raise ConfigError("rewards is empty; give at least one")
    return specs
