"""Wall-clock times of functions that run in turn, the latency of two models, the device."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tscnc_tf import _reports

WARM_UP = 2


@dataclasses.dataclass(frozen=True)
class Times(_reports.Record):
    """The wall-clock time of a function over several rounds, in seconds.

    Attributes:
        median: the median over the rounds.
        lower_quartile, upper_quartile: the quartiles over the rounds.
        rounds: the number of rounds.
    """

    median: float
    lower_quartile: float
    upper_quartile: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        """Return the quartiles of the seconds that the rounds took."""
        lower, median, upper = np.percentile(seconds, (25, 50, 75)).tolist()
        return cls(median, lower, upper, len(seconds))

    def overlaps(self, other: Times) -> bool:
        """Return whether the interquartile ranges overlap: then neither is clearly faster."""
        return (
            self.lower_quartile <= other.upper_quartile
            and other.lower_quartile <= self.upper_quartile
        )

    def __str__(self) -> str:
        size, unit = (1e3, "ms") if self.median >= 1e-3 else (1e6, "µs")
        figures = (self.median, self.lower_quartile, self.upper_quartile)
        median, lower, upper = (f"{size * seconds:.3g}" for seconds in figures)
        return f"{median} ({lower} to {upper}) {unit}"


@dataclasses.dataclass(frozen=True)
class Latency(_reports.Record):
    """The time of one forward pass before and after, in seconds.

    Attributes:
        before, after: the lower quartile, the median and the upper quartile over the rounds.
        ratio: the median over the rounds of time before / time after, both of one round: above 1
            the new model is faster.
        ratio_quartiles: the quartiles of these ratios.
        rounds: the number of rounds.
        examples: the size of the batch.
        device: the device, as TensorFlow names it.
    """

    before: tuple[float, float, float]
    after: tuple[float, float, float]
    ratio: float
    ratio_quartiles: tuple[float, float]
    rounds: int
    examples: int
    device: str

    def __str__(self) -> str:
        def times(values: tuple[float, float, float]) -> str:
            low, middle, high = (1e3 * value for value in values)
            return f"{middle:.3g} ms ({low:.3g} to {high:.3g})"

        low, high = self.ratio_quartiles
        return (
            f"{times(self.before)} before, {times(self.after)} after: {self.ratio:.2f} times as "
            f"fast ({low:.2f} to {high:.2f}), median and quartiles of {self.rounds} interleaved "
            f"rounds, {self.examples} examples a batch, on {self.device}."
        )


class Timed(NamedTuple):
    """A function to time, `run`, and `prepare`, which is called before it and is not timed."""

    run: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None


def interleaved(functions: Mapping[str, Timed], rounds: int) -> dict[str, list[float]]:
    """Run functions in rounds, A B C A B C ..., and return the seconds of each round by name.

    So a change of the machine's load affects all of them alike. `WARM_UP` rounds come first, in
    which graphs are traced and memory is allocated; they are not timed. Python's garbage collector
    is paused.

    Args:
        functions: the functions to time, by name.
        rounds: the number of rounds that are timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    with no_garbage_collection():
        for index in range(WARM_UP + rounds):
            for name, (run, prepare) in functions.items():
                prepare()
                taken = _seconds(run)
                if index >= WARM_UP:
                    seconds[name].append(taken)
    return seconds


def fastest_call(function: Callable[[], Any]) -> float:
    """Return the seconds of the faster of two calls, after one that is not timed."""
    function()
    return min(_seconds(function), _seconds(function))


def latency(
    before: Callable[[Any], Any], after: Callable[[Any], Any], batch: Any, rounds: int
) -> Latency:
    """Compile two models for a batch, and time them in turns, A B A B ...

    Args:
        before: the first model, a function of a batch.
        after: the second one.
        batch: the inputs of both, arrays or tensors.
        rounds: the number of timed rounds.
    """
    values = tf.nest.map_structure(tf.convert_to_tensor, batch)
    first, second = (Timed(compiled(model, values)) for model in (before, after))
    seconds = interleaved({"before": first, "after": second}, rounds)
    times = np.array(list(seconds.values()))
    quartiles = np.quantile(times, (0.25, 0.5, 0.75), axis=1).T.tolist()
    low, middle, high = np.quantile(times[0] / times[1], (0.25, 0.5, 0.75)).tolist()
    return Latency(
        before=tuple(quartiles[0]),
        after=tuple(quartiles[1]),
        ratio=middle,
        ratio_quartiles=(low, high),
        rounds=rounds,
        examples=int(tf.nest.flatten(values)[0].shape[0]),
        device=device(tf.nest.flatten(second.run())[0]),
    )


def compiled(function: Callable[[Any], Any], x: Any) -> Callable[[], Any]:
    """Return a call of `function` on `x`, compiled by `tf.function` (not by XLA)."""

    @tf.function(autograph=False)
    def run(batch: Any) -> Any:
        return function(batch)

    concrete = run.get_concrete_function(x)  # skips the check whether to retrace
    return lambda: concrete(x)


def device(tensor: tf.Tensor) -> str:
    """Return where a tensor was computed: the type of device, its number, and its name."""
    place = tf.DeviceSpec.from_string(tensor.device)
    kind, index = place.device_type or "CPU", place.device_index or 0
    if kind == "CPU":
        return f"{kind}:{index} ({platform.machine()}, {os.cpu_count()} cores)"
    physical = tf.config.list_physical_devices(kind)
    details = tf.config.experimental.get_device_details(physical[min(index, len(physical) - 1)])
    return f"{kind}:{index} ({details.get('device_name', 'of unknown make')})"


def _seconds(run: Callable[[], Any]) -> float:
    """Return how long a call takes until all devices are done."""
    tf.test.experimental.sync_devices()
    start = time.perf_counter()
    run()
    tf.test.experimental.sync_devices()
    return time.perf_counter() - start


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect Python's garbage, then pause its collector, as `timeit` does."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
