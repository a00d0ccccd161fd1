"""The table of a study: a CSV file with one row per run.

A run's result is a dictionary of dictionaries. A column is the path to a value in it, joined by
colons (`recipe:train:epochs`). A cell is the value as JSON; strings have no quotes unless they
would be read as another value. A cell is empty if the run lacks the value.

Several processes may run a study. So each run first writes its own JSON file, and `Store.enter`
moves these files into the table.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import filelock

from benchmarks.study.plan import PLACE, Run
from tscnc_tf import _files
from tscnc_tf.experiments.folders import read_json

SEPARATOR = ":"


@dataclasses.dataclass(frozen=True)
class Store:
    """The results of a study.

    Attributes:
        table: the CSV file, which git keeps.
        fresh: the folder of the JSON files of runs that are not in the table yet.
    """

    table: pathlib.Path
    fresh: pathlib.Path

    def read(self) -> dict[tuple[Any, ...], dict[str, Any]]:
        """Return all results by their places (`PLACE`), sorted.

        Raises:
            ValueError: the table or a file is damaged.
        """
        fresh = []
        for file in self.fresh.glob("*/*.json"):
            with contextlib.suppress(FileNotFoundError):  # another process has moved it
                fresh.append(read_json(file, "Remove it, and run the study again."))
        found = [*read(self.table), *fresh]  # the table last, as files move into it
        by_place = {tuple(row[name] for name in PLACE): row for row in found}
        return {place: by_place[place] for place in sorted(by_place)}

    def add(self, run: Run, content: Mapping[str, Any]) -> None:
        """Write the result of a run into a file of its own."""
        text = json.dumps(content, indent=1, ensure_ascii=False)
        _files.write_text(self.fresh / run.setting / f"{run.name}.json", f"{text}\n")

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Return those of the runs that have no result yet, in their order."""
        found = self.read()
        return [run for run in runs if run.place not in found]

    def enter(self) -> None:
        """Move the results in JSON files into the table, one process after the other."""
        if not self.fresh.is_dir():
            return
        with filelock.FileLock(self.fresh / ".lock"):
            if files := list(self.fresh.glob("*/*.json")):
                write(self.table, self.read().values())
                for file in files:
                    file.unlink()


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """Return the rows of a table as dictionaries; an empty list if there is no file.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            return [_nested(row) for row in reader]
        except (csv.Error, UnicodeDecodeError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged in line {reader.line_num}: {error}. Restore it (from git, "
                "say), or remove it and run the study again."
            ) from error


def write(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table atomically, in place of the previous one.

    Raises:
        ValueError: a key has a colon.
    """
    flat = [dict(_flat(row, "")) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(flat), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    _files.write_text(path, text.getvalue())


def _columns(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """Return all columns, those of one group (the part before the first colon) side by side."""
    groups: dict[str, dict[str, None]] = {}
    for row in rows:
        for name in row:
            groups.setdefault(name.partition(SEPARATOR)[0], {})[name] = None
    return [name for group in groups.values() for name in group]


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if SEPARATOR in key:
            raise ValueError(f"keys must have no {SEPARATOR!r} for a table, got {key!r}.")
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}{SEPARATOR}")
        else:
            yield prefix + key, _encode(value)


def _nested(row: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, cell in row.items():
        if cell != "":
            *groups, key = name.split(SEPARATOR)
            place = found
            for group in groups:
                place = place.setdefault(group, {})
            place[key] = _decode(cell)
    return found


def _encode(value: Any) -> str:
    if isinstance(value, str) and value and _decode(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def _decode(cell: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError:
        return cell
