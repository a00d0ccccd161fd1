"""Reports: records as JSON values, tables as text and HTML, digests, versions of libraries."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import html
import importlib.metadata
import io
import math
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import rich.box
from rich.console import Console
from rich.table import Table as RichTable

Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution: 95 % lie within ±Z95
_WIDEST, _WIDTH_OF_NOTES = 10_000, 200  # characters
LIBRARIES = ("tensorflow", "keras", "tf_keras", "numpy", "tscnc_tf")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text with notes below it; `str()` is plain text.

    The first column is left-aligned, the others right-aligned.

    Attributes:
        title: the line above the table.
        columns: the headings.
        rows: the cells, one sequence per row.
        footer: a separate last row, such as totals.
        notes: the lines below the table.
    """

    title: str
    columns: Sequence[str]
    rows: Iterable[Sequence[str]]
    footer: Sequence[str] | None = None
    notes: Iterable[str] = ()

    def __str__(self) -> str:
        table = RichTable(box=rich.box.SIMPLE_HEAD, show_footer=self.footer is not None)
        for index, heading in enumerate(self.columns):
            table.add_column(
                heading,
                footer=self.footer[index] if self.footer else "",
                justify="left" if index == 0 else "right",
                no_wrap=True,
            )
        for row in self.rows:
            table.add_row(*row)
        stream = io.StringIO()
        # rich would cut off cells of a table that is wider than the console.
        console = Console(
            file=stream, width=_WIDEST, color_system=None, markup=False, highlight=False
        )
        console.print(self.title, soft_wrap=True)  # rich would wrap a table's title to its width
        console.print(table)
        for note in self.notes:
            console.print(note, width=_WIDTH_OF_NOTES)
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n")

    def _repr_html_(self) -> str:
        """Return the table as HTML, which notebooks show."""

        def line(tag: str, cells: Iterable[str]) -> str:
            sides = ("right" if index else "left" for index in range(len(self.columns)))
            return "".join(
                f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>'
                for side, cell in zip(sides, cells, strict=True)
            )

        return "\n".join(
            [
                "<table>",
                f'<caption style="text-align: left">{html.escape(self.title)}</caption>',
                f"<thead><tr>{line('th', self.columns)}</tr></thead>",
                "<tbody>",
                *(f"<tr>{line('td', row)}</tr>" for row in self.rows),
                "</tbody>",
                *([f"<tfoot><tr>{line('th', self.footer)}</tr></tfoot>"] if self.footer else []),
                "</table>",
                *(f"<p>{html.escape(note)}</p>" for note in self.notes),
            ]
        )


class Record:
    """A frozen dataclass with a conversion to JSON values.

    Attributes:
        _derived: names of the properties that `to_dict` adds to the fields.
        _omitted: names of the fields that `to_dict` leaves out.
    """

    _derived: ClassVar[tuple[str, ...]] = ()
    _omitted: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values; inf and nan become "inf", "-inf", "nan"."""
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        names = [name for name in (*names, *self._derived) if name not in self._omitted]
        return jsonable({name: getattr(self, name) for name in names})

    def _table(self) -> Table:
        """Return the record as a table; by default with a row per figure."""
        rows = [(name, str(value)) for name, value in self.to_dict().items()]
        return Table(type(self).__name__, ("figure", "value"), rows)

    def _repr_html_(self) -> str:
        """Return the table as HTML, which notebooks show."""
        return self._table()._repr_html_()


class WeightRecord(Record):
    """A record of a weight tensor.

    Attributes:
        weights: the number of entries.
        zeros: the number of entries that are zero.
    """

    _derived = ("sparsity",)

    weights: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """The fraction of zeros."""
        return self.zeros / self.weights


class Report(Record):
    """A record whose `str()` is its table; subclasses implement `_table`."""

    def __str__(self) -> str:
        return str(self._table())


def jsonable(value: Any) -> Any:
    """Return `value` as standard JSON values; inf and nan become "inf", "-inf", "nan".

    Mappings, sequences, records and NumPy values are converted recursively; anything else becomes
    its `repr`.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return jsonable(value.tolist())
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return repr(value)


def unique(names: Iterable[str]) -> list[str]:
    """Return the names made unique: repeated ones get " (2)", " (3)", ... appended."""
    seen: collections.Counter[str] = collections.Counter()
    taken: set[str] = set()
    result = []
    for name in names:
        candidate = name
        while candidate in taken:
            seen[name] += 1
            candidate = f"{name} ({seen[name] + 1})"
        taken.add(candidate)
        result.append(candidate)
    return result


def digest(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    """Return the SHA-256 digest of named arrays: their names, dtypes, shapes and values.

    Values are hashed in little-endian byte order, so the digest does not depend on the machine.
    """
    found = hashlib.sha256()
    for name, array in arrays:
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        found.update(f"{name} {little.dtype.str} {little.shape}\n".encode())
        found.update(little.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def versions(*distributions: str) -> dict[str, str]:
    """Return the versions of Python and of `distributions`; "unknown" if not installed.

    If a distribution is not found (tensorflow may come from tensorflow-cpu), the `__version__` of
    the imported module of that name is used.

    Args:
        distributions: their names; without any, `LIBRARIES`.
    """
    found = {"python": platform.python_version()}
    for name in distributions or LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = getattr(sys.modules.get(name), "__version__", "unknown")
    return found


def share(part: int, whole: int) -> float:
    """Return a part as a fraction of the whole; 0 if the whole is 0."""
    return part / whole if whole else 0.0


def percent(fraction: float) -> str:
    """Return a fraction as a percentage with two decimals: 0.95 as "95.00 %"."""
    return f"{100 * fraction:.2f} %"


def significant(value: float, digits: int = 3) -> str:
    """Return a number with the given count of significant digits; infinity as "∞"."""
    if value == float("inf"):
        return "∞"
    return f"{value:.{digits}g}"


def size(count: float | None) -> str:
    """Return a number of bytes in B, KiB or MiB; "–" for None."""
    if count is None:
        return "–"
    if count < 1024:
        return f"{count:.0f} B"
    return f"{count / 1024:.1f} KiB" if count < 1024**2 else f"{count / 1024**2:.2f} MiB"


def shape(sizes: Iterable[int]) -> str:
    """Return a shape as "3×3×16"."""
    return "×".join(map(str, sizes))


def sparsity_cells(weights: int, zeros: int) -> tuple[str, str, str]:
    """Return the cells of the columns "weights", "zeros" and "sparsity"."""
    return f"{weights:,}", f"{zeros:,}", percent(share(zeros, weights))


def whole_model(weights: int, zeros: int) -> str:
    """Return the note on the zeros of a whole model."""
    fraction = percent(share(zeros, weights))
    return f"Whole model: {zeros:,} of {weights:,} weights are zero, {fraction}."
