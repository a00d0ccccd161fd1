"""Growth of memory over many cycles of the same work in one process."""

from __future__ import annotations

import gc
import pathlib
import resource
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

import tscnc_tf as tscnc
from benchmarks.faults.outcome import Outcome

CYCLES, FEW = 200, 8
BEFORE = 0.5  # share of cycles before the measurement, in which caches fill
MOST = 0.05  # MiB per cycle
MOST_AT_FIRST = 30.0  # MiB per cycle in a smoke run, in which code is loaded and compiled


def scenarios(smoke: bool) -> Iterator[Outcome]:
    """Yield the growth in MiB of evaluations, and of cycles of pruning and stripping."""
    rng = np.random.default_rng(0)
    x, y = rng.random((16, 6)).astype("float32"), np.arange(16) % 3
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8), keras.layers.Dense(3)])

    def evaluate() -> None:
        attack = tscnc.attacks.PGD(epsilon=0.1, steps=2)
        tscnc.evaluate_robustness(model, x, y, attack, progress=False)

    def prune() -> None:
        tscnc.strip(tscnc.prune_now(keras.models.clone_model(model), 0.5))

    for name, cycle in {"evaluations": evaluate, "cycles of pruning and stripping": prune}.items():
        count = FEW if smoke else CYCLES
        yield _grown(f"{count} {name} in one process", cycle, count, smoke)


def _grown(name: str, cycle: Callable[[], Any], count: int, smoke: bool) -> Outcome:
    outcome = Outcome(name)
    first = int(BEFORE * count)
    begin = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(count):
            if number == first:
                begin = _resident()
            cycle()
    grown = (_resident() - begin) / (count - first)
    if grown <= (MOST_AT_FIRST if smoke else MOST):
        outcome.count(f"grown by {max(grown, 0.0):.3f} MiB a cycle")
    else:
        outcome.lose(f"grown by {grown:.3f} MiB a cycle")
    return outcome


def _resident() -> float:
    """Return the memory of this process in MiB."""
    gc.collect()
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize() / 2**20
