"""Text in columns: Markdown tables for reports, and padded columns for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

BAR = "\\|"  # in a cell


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """A Markdown table with aligned cells, readable as plain text too.

    header: one title per column. rows: one cell per column.
    left: the number of leading columns aligned to the left. The other columns are aligned to the right.
    """
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(_padded(line, widths, left))} |" for line in (header, rule, *rows))


def compact(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table whose cells are as wide as their text, for tables that are read on a page alone."""

    def line(cells: Sequence[object]) -> str:
        return f"| {' | '.join(str(cell).replace('|', BAR) for cell in cells)} |"

    return [line(header), "|" + "---|" * len(header), *map(line, rows)]


def columns(rows: Sequence[Sequence[str]], widths: Sequence[int], left: int = 1) -> list[str]:
    """One line per row, with cell i padded to `widths[i]` characters. A longer cell is kept whole.

    The first `left` cells are aligned to the left, the others to the right.
    """
    return ["".join(_padded(row, widths, left)) for row in rows]


def pairs(values: Mapping[str, str], width: int) -> list[str]:
    """One line `name value` per entry, with the value at column `width`."""
    return columns(list(values.items()), (width, 0), left=2)


def _padded(cells: Sequence[str], widths: Sequence[int], left: int) -> list[str]:
    return [
        cell.ljust(width) if i < left else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths))
    ]
