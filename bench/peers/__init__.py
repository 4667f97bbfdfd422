"""The variants that a case is measured with: this project's, and the peers'.

A peer is a module with
    NAME                          as it appears in tables
    PACKAGE                       the distribution its version is read from, or None
    unavailable(device)           why it cannot be used here, or None
    <op>(case) -> {name: Prepare} the variants it offers for an op; raises Refused where it cannot serve the case at all
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType

MODULES = ("clp", "plain", "compiled", "peft", "trl", "liger", "cce", "torch_lce", "transformers")


def every() -> dict[str, ModuleType]:
    return {name: importlib.import_module(f"bench.peers.{name}") for name in MODULES}


def chosen(names: Iterable[str]) -> dict[str, ModuleType]:
    """ "auto" is all of them; clp and plain are always among them (the subject, and the yardstick of errors)."""
    known, names = every(), list(names)
    if names == ["auto"]:
        return known
    for name in names:
        if name not in known:
            raise SystemExit(f"unknown peer {name!r}; known: {', '.join(known)}, or auto")
    return {name: module for name, module in known.items() if name in names or name in ("clp", "plain")}
