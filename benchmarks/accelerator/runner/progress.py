"""The progress of an arm: its position, checkpoints, atomic writing, and speed."""

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
    """The position of an arm.

    Attributes:
        stage: the current stage, counted from 0.
        phase: the phase, of `PHASES`, of the next piece of work.
        epoch: the number of epochs of the stage whose training is finished.
        batch: the number of batches of the phase that are done.
        counts: the numbers of correct examples in the current evaluation, "clean" and "attacked".
        best: the line of the best epoch of the stage so far.
        chosen: for each finished stage, the line of the epoch whose network was passed on.
        lines: the lines of `metrics.jsonl`, one per epoch.
        seconds: the time of the work, without pauses between slices.
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
    """Write a checkpoint atomically.

    Args:
        path: the path of the file.
        arm: the hash of the arm.
        position: the position of the arm.
        arrays: the arrays by group, of `GROUPS`, and name.
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
    """Write an `.npz` file atomically."""
    write(path, lambda stream: np.savez(stream, **{n: np.asarray(a) for n, a in arrays.items()}))


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a text file atomically."""
    write(path, lambda stream: stream.write(text.encode()))


def write(path: pathlib.Path, fill: Callable[[IO[bytes]], Any]) -> None:
    """Write a file atomically: under another name, which is renamed once it is on the disk."""
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("wb") as stream:
        fill(stream)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(path)
    if os.name == "posix":  # other systems can't open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class Pace:
    """Times of pieces of work by stage and phase; the first of each, which compiles, is apart."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._taken: dict[tuple[int, str], list[float]] = {}

    def lap(self, stage: int, phase: str) -> float:
        """Record that a piece of work is done; return the seconds since the previous one."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._taken.setdefault((stage, phase), []).append(seconds)
        return seconds

    def is_new(self, stage: int, phase: str) -> bool:
        """Tell whether no piece of this stage and phase has been done."""
        return (stage, phase) not in self._taken

    def mean(self, phase: str) -> float | None:
        """Return the seconds per piece of a phase in its latest stage; None if not known."""
        known = [laps[1:] for (_, name), laps in self._taken.items() if name == phase]
        laps = next((each for each in reversed(known) if each), None)
        return sum(laps) / len(laps) if laps else None

    def left(self, pieces: Mapping[str, int]) -> float | None:
        """Return the seconds for numbers of pieces by phase; None if too little is known."""
        means = {phase: self.mean(phase) for phase in pieces}
        if means["train"] is None:
            return None
        return sum(count * (means[phase] or means["train"]) for phase, count in pieces.items())
