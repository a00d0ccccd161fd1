"""Timing several things side by side, so that a busy machine is unjust to all of them alike."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Summary:
    """Times, or ratios of times, over the rounds of a run."""

    median: float
    lower_quartile: float
    upper_quartile: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Any) -> Summary:
        """Return the summary of a list of numbers."""
        values = tuple(float(value) for value in values)
        lower, median, upper = np.percentile(values, (25, 50, 75))
        return cls(float(median), float(lower), float(upper), values)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values; all numbers are kept, so that others can judge the spread."""
        return {**dataclasses.asdict(self), "values": list(self.values), "rounds": self.rounds}

    @property
    def rounds(self) -> int:
        """How many rounds there were."""
        return len(self.values)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one thing over the rounds of a run, by two clocks.

    Attributes:
        wall: seconds that passed: what a user waits for.
        cpu: seconds that all threads of this process computed. A neighbour on the machine makes
            the wall clock's figures larger, and leaves these nearly alone. They say nothing of an
            accelerator.
    """

    wall: Summary
    cpu: Summary

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"wall": self.wall.as_dict(), "cpu": self.cpu.as_dict()}


@dataclasses.dataclass(frozen=True)
class Ratio:
    """One time over another, seen in three ways.

    Attributes:
        of_medians: the median of the one over that of the other: the figure to report.
        of_fastest: the fastest round of the one over that of the other: the one that a busy
            machine disturbs least.
        of_rounds: the ratios within single rounds: the spread.
    """

    of_medians: float
    of_fastest: float
    of_rounds: Summary

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**dataclasses.asdict(self), "of_rounds": self.of_rounds.as_dict()}


def interleaved(
    functions: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1
) -> dict[str, Timing]:
    """Run the functions in rounds, A B C A B C ..., and return the seconds that each took.

    What else the machine does changes over minutes, and meets neighbours in a round about alike;
    so compare what stands in one answer, and nothing from two of them.

    Args:
        functions: what to time, by name; they are called without arguments.
        rounds: the number of rounds that are timed.
        warm_up: the number of rounds before, in which graphs are traced and memory is found.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for index in range(warm_up + rounds):
        gc.collect()  # so that no function pays for what another one left behind
        for name, function in functions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            tf.test.experimental.sync_devices()  # an accelerator may still be at work
            if index >= warm_up:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: Timing(*(Summary.of(clock) for clock in zip(*pairs, strict=True)))
        for name, pairs in seconds.items()
    }


def ratio(above: list[Timing], below: list[Timing], clock: str = "wall") -> Ratio:
    """Return how a sum of times compares with another sum of the same run."""
    tops, bottoms = ([getattr(timing, clock) for timing in part] for part in (above, below))
    rounds = np.sum([s.values for s in tops], axis=0) / np.sum([s.values for s in bottoms], axis=0)
    return Ratio(
        of_medians=sum(s.median for s in tops) / sum(s.median for s in bottoms),
        of_fastest=sum(min(s.values) for s in tops) / sum(min(s.values) for s in bottoms),
        of_rounds=Summary.of(rounds),
    )
