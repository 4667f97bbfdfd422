"""One checkpoint: adapters, objective, optimiser, schedule, sampler, random states, position; safetensors and JSON, atomic."""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from clp_engine.core import files, records
from clp_engine.core.errors import ConfigError
from clp_engine.core.files import UNREADABLE, read_json, read_tensors
from clp_engine.models import fingerprint
from clp_engine.objectives.objective import Objective
from clp_engine.training.runs import run_folder
from clp_engine.training.runs.run_folder import STATE_FILE, checkpoints
from clp_engine.training.stepping.optimisation import Optimisation

_TENSORS, _POLICY = "training.safetensors", "policy"
_ADAPTERS = f"{_POLICY}/adapters.safetensors"
_ANOTHER = "resume from another checkpoint"
REFERENCE = "reference."  # in front of the tensors of a reference that moves
_UNFINISHED = "unfinished."  # in front of those of completions that go on (partial_rollouts.py)


@dataclass(frozen=True)
class _Objectives:
    """Of clp_config.json, what a resumed run compares with its own."""

    objectives: list[str] | None = None


@dataclass(frozen=True)
class _State:
    """What trainer_state.json holds, as far as its types are looked at before anything is restored."""

    config: dict[str, Any]
    step: int = 0
    run: str | None = None
    written: float = 0.0
    scheduler: dict[str, Any] = field(default_factory=dict)
    sampler: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)
    mix_controller: dict[str, float] = field(default_factory=dict)
    metric_log: dict[str, list[float]] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    num_generated_tokens: int = 0
    random: dict[str, list[Any]] = field(default_factory=dict)
    random_of_others: list[dict[str, list[Any]]] = field(default_factory=list)
    batches: list[int] | None = None
    sha256: dict[str, str] = field(default_factory=dict)


def random_states() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(JSON part, tensors) of Python's, numpy's and torch's global generators: reward functions may draw from them."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    plain = {
        "python": [version, list(words), gauss],
        "numpy": [kind, int(position), int(has_gauss), float(cached)],
    }
    tensors = {"rng.torch": torch.get_rng_state(), "rng.numpy": torch.from_numpy(keys.astype(np.int64))}
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        tensors[f"rng.cuda.{i}"] = torch.cuda.get_rng_state(i)
    return plain, tensors


def _of_rank(tensors: Mapping[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """The random states of a process among the tensors of a checkpoint."""
    ending = f"@{rank}" if rank else ""
    found = {name: tensor for name, tensor in tensors.items() if name.startswith("rng.")}
    return {n.partition("@")[0]: t for n, t in found.items() if n.endswith(ending) and (rank or "@" not in n)}


def _restore_random(plain: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    kind, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((kind, tensors["rng.numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["rng.torch"])
    for name, state in tensors.items():
        if name.startswith("rng.cuda.") and int(name.rpartition(".")[2]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(name.rpartition(".")[2]))


def save(
    output_dir: str | Path,
    step: int,
    run: str | None,
    policy,
    slots: Mapping[str, torch.Tensor],
    state: dict[str, Any],
    keep: int | None,
    own: Mapping[str, torch.Tensor] = MappingProxyType({}),
    unfinished: Mapping[str, torch.Tensor] = MappingProxyType({}),
    states: Sequence[tuple[dict[str, Any], dict[str, torch.Tensor]]] | None = None,
) -> Path:
    """Write <output_dir>/checkpoint-<step>; `state` must be JSON. run: its identity. Its older ones beyond `keep` go, see
    `run_folder.rotate`.

    slots: the optimiser's state, by "<parameter>.<slot>". own, unfinished: the tensors of the objective's and the collector's.
    states: `random_states` of each process; None: of this one alone.
    """
    path = Path(output_dir) / f"checkpoint-{step}"
    (plain, tensors), *others = states or [random_states()]
    tensors = {**tensors, **own}
    for rank, (_, more) in enumerate(others, 1):
        tensors |= {f"{name}@{rank}": tensor for name, tensor in more.items()}
    tensors |= {f"{_UNFINISHED}{name}": tensor for name, tensor in unfinished.items()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in slots.items()}
    state = {**state, "step": step, "run": run, "written": time.time(), "random": plain}
    state["random_of_others"] = [of_rank for of_rank, _ in others]
    with run_folder.writing(output_dir, path.name) as temporary:
        (temporary / _POLICY).mkdir()
        policy.write_files(temporary / _POLICY)
        save_file(tensors, temporary / _TENSORS)
        state["sha256"] = {name: files.digest(temporary / name) for name in (_TENSORS, _ADAPTERS)}
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    run_folder.rotate(output_dir, keep, newest=path)
    return path


def read_state(path: str | Path) -> dict[str, Any]:
    """The JSON state of a checkpoint. Raises ConfigError where there is none."""
    path = Path(path)
    if not (path / STATE_FILE).is_file():
        raise ConfigError(
            f"{path}: no {STATE_FILE} here; expected a folder checkpoint-<step> of an earlier run"
        )
    state = read_json(path / STATE_FILE)
    if "config" not in state:
        raise ConfigError(
            f"{path} was not written by this engine; expected a checkpoint of an earlier run of its own"
        )
    records.of(_State, state, path / STATE_FILE, _ANOTHER)
    return state


@contextlib.contextmanager
def restoring(path: str | Path) -> Iterator[None]:
    """What the block makes of the state of a checkpoint: where it cannot, a ConfigError that names the file."""
    try:
        yield
    except ConfigError:
        raise
    except (
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
        RuntimeError,
    ) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{Path(path) / STATE_FILE} is damaged or another's ({reason}); {_ANOTHER}"
        ) from error


def load_policy(path: str | Path, policy) -> None:
    """Set the policy's adapters to those of a checkpoint. Raises ConfigError for one of another base model, or of other
    objectives."""
    folder = Path(path) / _POLICY
    fingerprint.check(folder, policy.model)
    objectives = records.read(folder / "clp_config.json", _Objectives, _ANOTHER).objectives
    if objectives is not None and tuple(objectives) != policy.objectives:
        raise ConfigError(
            f"{path} has the objectives {', '.join(objectives)}, in this order, and this run {', '.join(policy.objectives)}; "
            "give the rewards as they were given then"
        )
    _verify(path, _ADAPTERS)
    policy.load_adapters(read_tensors(Path(path) / _ADAPTERS))


def load_objective(path: str | Path, objective: Objective) -> None:
    """Restore the objective as it was; raises ConfigError where its run had another."""
    objective.load_state_dict(_of_objective(path, objective, read_state(path), _training_tensors(path)))


def _of_objective(
    path: str | Path, objective: Objective, state: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """What the checkpoint holds of an objective's state."""
    names, held = objective.state_dict().keys(), {**state, **tensors}
    missing = sorted(names - held.keys())
    if missing:
        raise ConfigError(
            f"{path} holds no {missing[0]}, a part of the objective's state; its run had another baseline or estimator"
        )
    return {name: held[name] for name in names}


def _named(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def load(
    path: str | Path,
    policy,
    optimisation: Optimisation,
    objective: Objective | None = None,
    rank: int = 0,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Restore adapters, objective, optimiser and the random states of process `rank`, where the checkpoint has them; returns
    the tensors of the collector and of the reference.

    Raises ConfigError, before anything is changed, where a file is not as it was written, or is another run's.
    """
    path = Path(path)
    state, tensors = read_state(path), _training_tensors(path)
    parameters = {**policy.adapter_parameters(), **({} if objective is None else objective.parameters())}
    slots = _optimizer_slots(path, parameters, tensors)
    own = None if objective is None else _of_objective(path, objective, state, tensors)
    load_policy(path, policy)
    if objective is not None:
        with restoring(path):
            objective.load_state_dict(own)
    for name in parameters:
        optimisation.set_slots(name, slots[name])
    with restoring(path):
        plain = [state["random"], *state.get("random_of_others", [])]
        if rank < len(plain):
            _restore_random(plain[rank], _of_rank(tensors, rank))
    return _named(tensors, _UNFINISHED), _named(tensors, REFERENCE)


def _optimizer_slots(
    path: Path, parameters: dict[str, torch.nn.Parameter], tensors: dict[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """Each parameter's slots: of all the same names, each of the parameter's shape or a single number."""
    found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in parameters}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            name, _, slot = key.removeprefix("optimizer.").rpartition(".")
            if name not in found or tensor.shape not in (parameters[name].shape, torch.Size()):
                raise ConfigError(
                    f"{path / _TENSORS}: {key} of shape {list(tensor.shape)} fits no parameter of this run; resume with the "
                    "settings of that run, or from another checkpoint"
                )
            found[name][slot] = tensor
    names = {frozenset(slots) for slots in found.values()}
    if len(names) > 1:
        lacking = next(name for name, slots in found.items() if set(slots) != set().union(*names))
        raise ConfigError(
            f"{path / _TENSORS}: the optimiser's state of {lacking} is not whole; resume from another checkpoint"
        )
    return found


def _training_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    _verify(path, _TENSORS)
    try:
        return load_file(Path(path) / _TENSORS)
    except UNREADABLE as error:
        raise ConfigError(f"{Path(path) / _TENSORS} is damaged ({error}); {_ANOTHER}") from error


def _verify(path: str | Path, name: str) -> None:
    """Raises ConfigError where a file of a checkpoint is not as it was written; earlier versions noted no digests."""
    state = Path(path) / STATE_FILE  # the best policy of a run has none
    noted = read_state(path).get("sha256", {}).get(name) if state.is_file() else None
    if noted is not None and (not (Path(path) / name).is_file() or files.digest(Path(path) / name) != noted):
        raise ConfigError(f"{Path(path) / name} is not as it was written; resume from another checkpoint")


def resolve(output_dir: str | Path, resume: str | Path | bool) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means: a path, or True for the one that the run in the folder wrote last.

    None, for a new run, where True finds none under a launcher that starts failed runs again (torchrun --max-restarts): such a
    command is given once, for the first start and for every later one.
    """
    if resume is not True:
        files.finish(resume)
        return Path(resume)
    found = checkpoints(output_dir)
    if not found and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        return None
    if not found:
        raise ConfigError(f"{output_dir}: no checkpoint to resume from; give the path of one, or start anew")
    return found[-1]
