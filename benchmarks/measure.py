"""Interleaved timing of functions, by wall and CPU time; ratios of their times."""

from __future__ import annotations

import dataclasses
import pathlib
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _reports, _timing


@dataclasses.dataclass(frozen=True)
class Summary(_reports.Record):
    """Times, or ratios of times, over the rounds of a run."""

    _derived = ("fastest", "rounds")
    _omitted = ("values",)

    median: float
    lower_quartile: float
    upper_quartile: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Any) -> Summary:
        """Return the summary of a sequence of numbers."""
        values = tuple(float(value) for value in values)
        lower, median, upper = np.percentile(values, (25, 50, 75))
        return cls(float(median), float(lower), float(upper), values)

    @property
    def fastest(self) -> float:
        """The smallest value."""
        return min(self.values)

    @property
    def rounds(self) -> int:
        """The number of rounds."""
        return len(self.values)


@dataclasses.dataclass(frozen=True)
class Timing(_reports.Record):
    """Seconds of one function over the rounds of a run, by two clocks.

    Attributes:
        wall: wall time.
        cpu: CPU time of all threads of this process, without the time of an accelerator. Other
            processes change it little.
    """

    wall: Summary
    cpu: Summary


@dataclasses.dataclass(frozen=True)
class Ratio(_reports.Record):
    """The ratio of two times, in three ways.

    Attributes:
        of_medians: the ratio of the medians, which is the figure to report.
        of_fastest: the ratio of the fastest rounds, which the machine's load changes least.
        of_rounds: the ratios within single rounds, which show the spread.
    """

    of_medians: float
    of_fastest: float
    of_rounds: Summary


def interleaved(
    functions: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1
) -> dict[str, Timing]:
    """Run the functions in rounds and return the times of each function by name.

    A change of the machine's load affects all functions of a round about alike. So compare times of
    one call of `interleaved`, not of two. The order in a round is random, with a fixed seed, as a
    function depends on the state of the caches that its predecessor leaves.

    Args:
        functions: functions without arguments, by name.
        rounds: the number of rounds that are timed.
        warm_up: the number of rounds before, in which graphs are traced and memory is allocated.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    items, draws = list(functions.items()), random.Random(0)
    for index in range(warm_up + rounds):
        with _timing.no_garbage_collection():
            for name, function in draws.sample(items, len(items)):
                wall, cpu = time.perf_counter(), time.process_time()
                function()
                tf.test.experimental.sync_devices()  # waits for an accelerator
                if index >= warm_up:
                    seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: Timing(*(Summary.of(clock) for clock in zip(*pairs, strict=True)))
        for name, pairs in seconds.items()
    }


def ratio(above: list[Timing], below: list[Timing], clock: str = "wall") -> Ratio:
    """Return the ratio of two sums of times of the same run, by one clock."""
    tops, bottoms = ([getattr(timing, clock) for timing in part] for part in (above, below))
    rounds = np.sum([s.values for s in tops], axis=0) / np.sum([s.values for s in bottoms], axis=0)
    return Ratio(
        of_medians=sum(s.median for s in tops) / sum(s.median for s in bottoms),
        of_fastest=sum(s.fastest for s in tops) / sum(s.fastest for s in bottoms),
        of_rounds=Summary.of(rounds),
    )


def ratios(above: list[Timing], below: list[Timing]) -> dict[str, Ratio]:
    """Return the ratio of two sums of times by each clock: "wall" and "cpu"."""
    return {clock: ratio(above, below, clock) for clock in ("wall", "cpu")}


def peak_memory() -> int:
    """Return the peak memory of this process in bytes, on Linux.

    `resource.getrusage` can't be used, as it includes the parent process.
    """
    status = pathlib.Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 2**10
