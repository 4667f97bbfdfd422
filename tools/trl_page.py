"""The tables of the migration guide, made from `trl_compat.fields` and `CLPConfig`.

    python -m tools.trl_page docs/migrating-from-trl.md

writes anew what stands between `<!-- trl:NAME -->` and `<!-- /trl -->`; NAME is `defaults` or `fields`.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clp_engine.core.tables import compact
from clp_engine.training.settings.config import CLPConfig
from clp_engine.training.trl_compat.fields import ACCEPTED, ANYTHING, DEFAULT, FIELDS, SAME, TRANSLATED, Field

_BLOCK = re.compile(r"(<!-- trl:(?P<name>\w+) -->\n).*?(<!-- /trl -->)", re.DOTALL)
_OWN = {option.name: option.default for option in dataclasses.fields(CLPConfig)}


def render(text: str) -> str:
    """The page with every block made anew. Raises KeyError for a block of a name that is not there."""
    return _BLOCK.sub(lambda m: f"{m[1]}\n{_TABLES[m['name']]()}\n\n{m[3]}", text)


def defaults_table() -> str:
    """Settings whose default is another than TRL's, and why."""
    rows = [
        (f"`{name}`", _code(field.default), _code(_OWN[name]), field.note)
        for name, field in FIELDS.items()
        if field.fate == DEFAULT
    ]
    return "\n".join(compact(["setting", "TRL", "here", "why"], rows))


def fields_table() -> str:
    """Every field of GRPOConfig, in alphabetical order."""
    rows = [
        (f"`{name}`", _code(field.default), _fate(field), field.note)
        for name, field in sorted(FIELDS.items())
    ]
    return "\n".join(compact(["field", "TRL's default", "here", ""], rows))


def _fate(field: Field) -> str:
    if field.fate in (SAME, DEFAULT, TRANSLATED):
        return {SAME: "the same", DEFAULT: "the same, other default", TRANSLATED: "translated"}[field.fate]
    values = "anything" if field.accepts == ANYTHING else ", ".join(map(_code, field.accepts))
    return f"{'accepted' if field.fate == ACCEPTED else 'refused, except'} {values}"


def _code(value: Any) -> str:
    return f"`{value!r}`"


_TABLES: dict[str, Callable[[], str]] = {"defaults": defaults_table, "fields": fields_table}


def main(path: str) -> None:
    page = Path(path)
    page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
