"""Whose run it is: run.json names Python files that evaluation executes, and may come from another person.

A training signs what its run.json would have executed and read: HMAC-SHA256 (RFC 2104) over `effects`, with a key that this
user's home holds, $XDG_STATE_HOME/clp-engine/key. A run that was made elsewhere, or whose run.json names something else by now,
has no such signature; it is trusted only where the user says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import importlib.util
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from clp_engine.core.errors import ConfigError

_KEY_BYTES = 32


class Described(Protocol):
    """What of a `run_spec.RunSpec` decides what following it does."""

    @property
    def task(self) -> str | None: ...

    @property
    def dataset(self) -> str | None: ...

    @property
    def eval_dataset(self) -> str | None: ...

    @property
    def rewards(self) -> Mapping[str, str]: ...

    @property
    def signature(self) -> str | None: ...


def effects(spec: Described) -> list[str]:
    """What following run.json does beyond loading the policy, a phrase each; empty for an embedded task."""
    if spec.task is not None:
        return []
    done = [
        f"load the classifier {reward}" if ":" not in reward else f"execute {_origin(reward)}"
        for reward in spec.rewards.values()
    ]
    return done + [f"read {Path(path).resolve()}" for path in (spec.dataset, spec.eval_dataset) if path]


def sign(spec: Described) -> str | None:
    """The signature of a run that is trained here; None where no key can be kept."""
    key = _key(make=True)
    return None if key is None else _signature(spec, key)


def is_own(spec: Described) -> bool:
    """Whether this user trained the run here, with the same files and data."""
    key = _key(make=False)
    own = key is not None and isinstance(spec.signature, str)
    return own and hmac.compare_digest(_signature(spec, key).encode(), spec.signature.encode())


def check(spec: Described, run: str | Path, trusted: bool, instead: str = "") -> None:
    """Raise ConfigError, naming what would be executed, for a run of somebody else that the user has not said to trust.

    instead: what else the user can do."""
    if trusted or not (done := effects(spec)) or is_own(spec):
        return
    raise ConfigError(
        f"{run} was not trained by you on this machine (or before runs were signed), and its run.json would "
        f"{', '.join(dict.fromkeys(done))}; give --trust-run to have that done{instead}"
    )


def _signature(spec: Described, key: bytes) -> str:
    return hmac.new(
        key, "\n".join(effects(spec)).encode("utf-8", "surrogatepass"), hashlib.sha256
    ).hexdigest()


def _origin(reward: str) -> str:
    """The function with the file that it is in: another folder's module of the same name is another file."""
    module, _, function = reward.rpartition(":")
    if module.endswith(".py"):
        return f"{function} of {Path(module).resolve()}"
    top, *_ = module.partition(".")
    here = os.getcwd()  # where `sources.load_reward` looks, too
    places = sys.path if here in sys.path else [here, *sys.path]
    found = next(
        (Path(p) / name for p in places for name in (top, f"{top}.py") if (Path(p) / name).exists()), None
    )
    if found is None:  # an extension or a frozen module
        with contextlib.suppress(ImportError, ValueError):
            found = getattr(importlib.util.find_spec(top), "origin", None)
    return f"{function} of {module} ({found})"


def _key(make: bool) -> bytes | None:
    """This user's key; None where there is none, or it cannot be kept."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        path = Path(state) / "clp-engine" / "key"
        if make and not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Made under another name and linked: whoever trains at the same time finds a whole key, or none.
            new = path.with_name(f"key.{os.getpid()}")
            try:
                with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(secrets.token_bytes(_KEY_BYTES))
                with contextlib.suppress(FileExistsError):
                    os.link(new, path)
            finally:
                new.unlink(missing_ok=True)
        key = path.read_bytes()
        return key if len(key) == _KEY_BYTES else None
    return None
