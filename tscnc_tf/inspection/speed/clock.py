"""Timing several things side by side, so that a busy machine is unjust to all of them alike."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tscnc_tf.inspection import records

WARM_UP = 2


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one thing over the rounds of a run, by the wall clock.

    Attributes:
        median: half of the rounds took less.
        lower_quartile: a quarter of the rounds took less.
        upper_quartile: a quarter of the rounds took more.
        rounds: how many there were.
    """

    median: float
    lower_quartile: float
    upper_quartile: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        """Return the summary of the seconds of each round."""
        lower, median, upper = np.percentile(seconds, (25, 50, 75))
        return cls(float(median), float(lower), float(upper), len(seconds))

    def overlaps(self, other: Times) -> bool:
        """Tell whether the middle halves of both overlap: then neither is clearly faster."""
        return (
            self.lower_quartile <= other.upper_quartile
            and other.lower_quartile <= self.upper_quartile
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return records.jsonable(dataclasses.asdict(self))

    def __str__(self) -> str:
        size, unit = (1e3, "ms") if self.median >= 1e-3 else (1e6, "µs")
        figures = (self.median, self.lower_quartile, self.upper_quartile)
        median, lower, upper = (f"{size * seconds:.3g}" for seconds in figures)
        return f"{median} ({lower} to {upper}) {unit}"


class Timed(NamedTuple):
    """Something to time: `run`, after `prepare`, which isn't timed."""

    run: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None


def interleaved(functions: Mapping[str, Timed], rounds: int) -> dict[str, Times]:
    """Run the functions in rounds, A B C A B C ..., and return the seconds that each took.

    Before that come `WARM_UP` rounds, in which graphs are traced and memory is found.

    Args:
        functions: what to time, by name.
        rounds: the number of rounds that are timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    with _no_garbage_collection():
        for index in range(WARM_UP + rounds):
            for name, (run, prepare) in functions.items():
                prepare()
                _sync()
                start = time.perf_counter()
                run()
                _sync()
                if index >= WARM_UP:
                    seconds[name].append(time.perf_counter() - start)
    return {name: Times.of(values) for name, values in seconds.items()}


def fastest_call(function: Callable[[], Any]) -> float:
    """Return the seconds of the faster of two calls, the first one before them not counted."""
    function()
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        function()
        _sync()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _sync() -> None:
    tf.test.experimental.sync_devices()  # an accelerator may still be at work


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep Python from collecting garbage in the middle of a measurement, as `timeit` does."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
