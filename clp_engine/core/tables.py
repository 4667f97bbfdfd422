"""Text in columns: Markdown tables for reports, and plain columns for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """A Markdown table with aligned cells, so that it is readable as plain text too.

    header: a title for each column. rows: as many cells each. left: the first `left` columns are aligned to the left, the
    others to the right.
    """
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(_padded(line, widths, left))} |" for line in (header, rule, *rows))


def columns(rows: Sequence[Sequence[str]], widths: Sequence[int], left: int = 1) -> list[str]:
    """A line for each row. Cell i is padded to `widths[i]` characters: the first `left` cells on the right, others on the
    left. A longer cell is kept whole."""
    return ["".join(_padded(row, widths, left)) for row in rows]


def pairs(values: Mapping[str, str], width: int) -> list[str]:
    """A line `name value` for each entry, with the value at column `width`."""
    return columns(list(values.items()), (width, 0), left=2)


def _padded(cells: Sequence[str], widths: Sequence[int], left: int) -> list[str]:
    return [
        cell.ljust(width) if i < left else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths))
    ]
