"""Trust in a run: run.json names Python files that evaluation executes, and may come from another person.

A training signs the files and data that its run.json would have executed and read: HMAC-SHA256 (RFC 2104) over `effects`, with
a key in this user's home, $XDG_STATE_HOME/clp-engine/key. A run made elsewhere, or whose run.json names something else by now,
has no valid signature. Such a run is trusted only if the user says so.
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
    """The fields of a `run_spec.RunSpec` that determine the effects of following it."""

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
    """The effects of following run.json beyond loading the policy, one phrase each. Empty for an embedded task."""
    if spec.task is not None:
        return []
    done = [
        f"load the classifier {reward}" if ":" not in reward else f"execute {_origin(reward)}"
        for reward in spec.rewards.values()
    ]
    return done + [f"read {Path(path).resolve()}" for path in (spec.dataset, spec.eval_dataset) if path]


def sign(spec: Described) -> str | None:
    """The signature of a run that is trained here, or None if no key can be kept."""
    key = _key(make=True)
    return None if key is None else _signature(spec, key)


def is_own(spec: Described) -> bool:
    """Whether this user trained the run here, with the same files and data."""
    key = _key(make=False)
    own = key is not None and isinstance(spec.signature, str)
    return own and hmac.compare_digest(_signature(spec, key).encode(), spec.signature.encode())


def check(spec: Described, run: str | Path, trusted: bool, instead: str = "") -> None:
    """Raises ConfigError, naming the files that would be executed, for another person's run unless the user trusts it.

    trusted: the user trusts the run. instead: an alternative for the user, for the message.
    """
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
    """The function with its file, since a module of the same name in another folder is another file."""
    module, _, function = reward.rpartition(":")
    if module.endswith(".py"):
        return f"{function} of {Path(module).resolve()}"
    top, *_ = module.partition(".")
    here = os.getcwd()  # `sources.load_reward` searches this folder, too
    places = sys.path if here in sys.path else [here, *sys.path]
    found = next(
        (Path(p) / name for p in places for name in (top, f"{top}.py") if (Path(p) / name).exists()), None
    )
    if found is None:  # for an extension or a frozen module
        with contextlib.suppress(ImportError, ValueError):
            found = getattr(importlib.util.find_spec(top), "origin", None)
    return f"{function} of {module} ({found})"


def _key(make: bool) -> bytes | None:
    """This user's key, or None if there is none or it cannot be kept. make: create a missing key."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: the user has no home folder
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        path = Path(state) / "clp-engine" / "key"
        if make and not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # The key is written under another name and then linked, so that a concurrent training finds a whole key or none.
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
