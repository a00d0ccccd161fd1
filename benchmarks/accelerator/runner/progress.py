"""How far an arm has come: what a checkpoint holds, and how it is written so that it is whole."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np
from programs import typed

PHASES = ("begin", "train", "validate", "test", "done")
GROUPS = ("state", "best", "network")


@dataclasses.dataclass
class Position:
    """Where an arm is.

    Attributes:
        stage: counted from 0.
        phase: of `PHASES`; what the next piece of work belongs to.
        epoch: how many epochs of the stage are over, the validation excluded.
        batch: how many batches of the phase are done.
        counts: how many examples of the running evaluation are right, "clean" and "attacked".
        best: the best epoch of the stage so far, as its line among `lines` says it.
        chosen: of each stage that is over, the line of the epoch that was handed on.
        lines: what is known of each epoch.
        seconds: that the work has taken, waiting between slices not counted.
    """

    stage: int = 0
    phase: str = "begin"
    epoch: int = 0
    batch: int = 0
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    best: dict[str, Any] | None = None
    chosen: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    lines: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def enter(self, phase: str) -> None:
        """Begin a phase, with its first batch."""
        self.phase, self.batch, self.counts = phase, 0, {}


def save(
    path: pathlib.Path, arm: str, position: Position, arrays: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write a checkpoint in one piece: a reader finds this one or the one before.

    Args:
        path: of the file.
        arm: what the checkpoint belongs to, a hash.
        position: where the arm is.
        arrays: by name, in the `GROUPS`.
    """
    held = {
        f"{group}/{name}": np.asarray(a) for group in GROUPS for name, a in arrays[group].items()
    }
    dtypes = {name: array.dtype.name for name, array in held.items()}
    about = {"arm": arm, "position": dataclasses.asdict(position), "dtypes": dtypes}
    write(path, lambda stream: np.savez(stream, about=json.dumps(about), **held))


def load(path: pathlib.Path, arm: str) -> tuple[Position, dict[str, dict[str, np.ndarray]]]:
    """Read a checkpoint.

    Raises:
        ValueError: it belongs to another arm, or to other data.
    """
    with np.load(path) as held:
        about = json.loads(str(held["about"]))
        if about["arm"] != arm:
            raise ValueError(
                f"{path} belongs to another export of the arm, or to other data: remove it, or "
                "choose another folder by --output."
            )
        arrays: dict[str, dict[str, np.ndarray]] = {group: {} for group in GROUPS}
        for key, dtype in about["dtypes"].items():
            group, _, name = key.partition("/")
            arrays[group][name] = typed(held[key], dtype)
    return Position(**about["position"]), arrays


def write_arrays(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Write an `.npz` file in one piece."""
    write(path, lambda stream: np.savez(stream, **{n: np.asarray(a) for n, a in arrays.items()}))


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a text file in one piece."""
    write(path, lambda stream: stream.write(text.encode()))


def write(path: pathlib.Path, fill: Callable[[IO[bytes]], Any]) -> None:
    """Write a file under another name, wait until it is on the disk, and rename it."""
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("wb") as stream:
        fill(stream)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(path)
    if os.name == "posix":  # elsewhere a folder can't be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class Pace:
    """How long pieces of work of a kind take; the first of each kind, which is compiled, apart."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._taken: dict[tuple[int, str], list[float]] = {}

    def lap(self, stage: int, phase: str) -> float:
        """Note that a piece of work is done, and return the seconds since the one before."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._taken.setdefault((stage, phase), []).append(seconds)
        return seconds

    def is_new(self, stage: int, phase: str) -> bool:
        """Tell whether no piece of that kind has been done."""
        return (stage, phase) not in self._taken

    def mean(self, phase: str) -> float | None:
        """Return the seconds per piece in the latest stage that had such, None if not known."""
        known = [laps[1:] for (_, name), laps in self._taken.items() if name == phase]
        laps = next((each for each in reversed(known) if each), None)
        return sum(laps) / len(laps) if laps else None

    def left(self, pieces: Mapping[str, int]) -> float | None:
        """Return the seconds that pieces of these phases will take, None if too little is known."""
        means = {phase: self.mean(phase) for phase in pieces}
        if means["train"] is None:
            return None
        return sum(count * (means[phase] or means["train"]) for phase, count in pieces.items())
