"""Reports as tables: one way from a list of rows to text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

import rich.box
from rich.console import Console
from rich.table import Table


def render(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    footer: Sequence[str] | None = None,
    notes: Iterable[str] = (),
) -> str:
    """Return a plain-text table; the first column is left-aligned, the others right-aligned.

    Args:
        title: the line above the table.
        columns: the headings.
        rows: cells as text, one sequence a row.
        footer: a last row, set apart (totals).
        notes: lines below the table.
    """
    table = Table(
        title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, show_footer=footer is not None
    )
    for index, heading in enumerate(columns):
        table.add_column(
            heading,
            footer=footer[index] if footer else "",
            justify="left" if index == 0 else "right",
            no_wrap=True,
        )
    for row in rows:
        table.add_row(*row)
    stream = io.StringIO()
    console = Console(file=stream, width=200, color_system=None, markup=False, highlight=False)
    console.print(table)
    for note in notes:
        console.print(note)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n")


def percent(fraction: float) -> str:
    """Return a fraction as a percentage with two decimals: 0.95 as "95.00 %"."""
    return f"{100 * fraction:.2f} %"


def significant(value: float, digits: int = 3) -> str:
    """Return a number with so many significant digits; infinity as "∞"."""
    if value == float("inf"):
        return "∞"
    return f"{value:.{digits}g}"


def size(count: float) -> str:
    """Return a number of bytes in KiB or MiB, as people read it."""
    if count < 1024:
        return f"{count:.0f} B"
    return f"{count / 1024:.1f} KiB" if count < 1024**2 else f"{count / 1024**2:.2f} MiB"
