"""How long two models take for the same batch, measured turn by turn."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

WARM_UP = 3


@dataclasses.dataclass(frozen=True)
class Latency:
    """The time of one forward pass before and after, in seconds.

    Attributes:
        before, after: the lower quartile, the median and the upper quartile over the rounds.
        ratio: the median over the rounds of time before / time after, both of one round: above 1
            the new model is faster. What slows the machine down for a while slows both.
        ratio_quartiles: the quartiles of the same.
        rounds: how often each was timed.
        examples: the size of the batch.
        device: what computed.
    """

    before: tuple[float, float, float]
    after: tuple[float, float, float]
    ratio: float
    ratio_quartiles: tuple[float, float]
    rounds: int
    examples: int
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Return the measurement as JSON values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

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


def measure(before: Any, after: Any, batch: Any, rounds: int) -> Latency:
    """Time two models in turns, A B A B, as compiled functions, in inference mode."""
    values = tf.nest.map_structure(tf.convert_to_tensor, batch)
    runs = [_compiled(model, values) for model in (before, after)]
    times = np.array([[run() for run in runs] for _ in range(WARM_UP + rounds)])[WARM_UP:]
    quartiles = np.quantile(times, (0.25, 0.5, 0.75), axis=0)
    low, middle, high = np.quantile(times[:, 0] / times[:, 1], (0.25, 0.5, 0.75)).tolist()
    first, second = (tuple(column) for column in quartiles.T.tolist())
    return Latency(
        before=first,
        after=second,
        ratio=middle,
        ratio_quartiles=(low, high),
        rounds=rounds,
        examples=int(tf.nest.flatten(values)[0].shape[0]),
        device=_device(),
    )


def _compiled(model: Any, values: Any) -> Callable[[], float]:
    """Return a function that runs the model once and returns the seconds it took."""
    forward = tf.function(lambda batch: model(batch, training=False), autograph=False)

    def run() -> float:
        start = time.perf_counter()
        outputs = forward(values)
        for output in tf.nest.flatten(outputs):
            output.numpy()  # a GPU is done when its result is here
        return time.perf_counter() - start

    return run


def _device() -> str:
    for gpu in tf.config.get_visible_devices("GPU"):
        details = tf.config.experimental.get_device_details(gpu)
        return str(details.get("device_name", gpu.name))
    threads = tf.config.threading.get_intra_op_parallelism_threads() or "all"
    return f"CPU ({platform.processor() or platform.machine()}, {threads} threads)"
