"""For the documentation: docstrings of this project as Markdown. A griffe extension, named in mkdocs.yml.

Their prose, formulas (indented) and `code` are Markdown already. What is not are the lines that say what an argument is,

    weight      (N, K);  bias (N,) or None
    seed: of everything random, which is
        a continued line

which become a list; and a `<`, which would begin an HTML tag.
"""

from __future__ import annotations

import re

import griffe

_NAME = r"[A-Za-z_]\w*"
_ENTRY = re.compile(rf"(?P<names>{_NAME}(?:, {_NAME})*)(?:: | {{2,}})(?P<text>\S.*)")
_ALONE = re.compile(rf"{_NAME}(?:, {_NAME})*")


def to_markdown(docstring: str) -> str:
    """The docstring with its argument lines as a list. Blocks that begin indented are left as they are: Markdown's code."""
    blocks = re.split(r"\n{2,}", docstring)
    return "\n\n".join(b if b.startswith("    ") else _block(b.split("\n")) for b in blocks)


def _block(lines: list[str]) -> str:
    written: list[str] = []
    in_list = False
    for i, line in enumerate(lines):
        follows = i + 1 < len(lines) and lines[i + 1].startswith("  ")
        entry = _ENTRY.fullmatch(line)
        if entry is None and follows and _ALONE.fullmatch(line):
            entry, names, text = True, line, ""
        elif entry is not None:
            names, text = entry["names"], entry["text"]
        if line.startswith(" ") and in_list:
            written[-1] += " " + _escaped(line.strip())
        elif entry is not None and (in_list or not written):
            listed = ", ".join(f"`{name}`" for name in names.split(", "))
            written.append(f"- {listed}: {_escaped(text)}".rstrip())
            in_list = True
        else:
            written += [""] if in_list else []
            written.append(_escaped(line))
            in_list = False
    return "\n".join(written)


def _escaped(text: str) -> str:
    """`<` outside of `code` as an entity."""
    return "".join(
        part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(re.split(r"(`[^`]*`)", text))
    )


class DocstringLists(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
