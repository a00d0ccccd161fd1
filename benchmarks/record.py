"""Options and results of the benchmarks: a printed table and a JSON file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import platform
from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from benchmarks.measure import Ratio, Timing
from tscnc_tf import _files, _reports

_DISTRIBUTIONS = (
    "tensorflow",
    "tf_keras",
    "keras",
    "tensorflow-model-optimization",
    "cleverhans",
    "numpy",
    "tscnc_tf",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the command line; None stands for the default of the benchmark.

    Attributes:
        smoke: run on a tiny network, to check that everything works.
        rounds: the number of timed rounds.
        batch_size: examples per step.
        network: a name in `networks.NETWORKS`.
        ablate: whether to time the step without regularizers and pruning, too.
        part: the part of the benchmark to run, if it has parts.
        output: the folder for the JSON files.
    """

    smoke: bool = False
    rounds: int | None = None
    batch_size: int | None = None
    network: str | None = None
    ablate: bool = False
    part: str | None = None
    output: pathlib.Path = pathlib.Path(__file__).parent / "results"

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Options:
        """Return the options among parsed arguments."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: getattr(arguments, name) for name in names})

    @property
    def steps(self) -> int:
        """The number of steps of the attack: 10, or 1 in a smoke run."""
        return 1 if self.smoke else 10

    def pick(self, name: str, default: Any, smoke: Any) -> Any:
        """Return the option `name` if it was given, else the default of a real or a smoke run."""
        asked = getattr(self, name)
        if asked is not None:
            return asked
        return smoke if self.smoke else default


def environment() -> dict[str, Any]:
    """Return the versions of libraries and the device."""
    devices = [device.device_type for device in tf.config.list_physical_devices()]
    return {
        "versions": _reports.versions(*_DISTRIBUTIONS),
        "device": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "tensorflow_devices": devices,
        },
    }


def write(options: Options, name: str, values: dict[str, Any]) -> pathlib.Path:
    """Write `<name>.json` into the output folder and return its path."""
    path = options.output / f"{name}.json"
    whole = {
        "benchmark": name,
        "smoke": options.smoke,
        **environment(),
        **_reports.jsonable(values),
    }
    _files.write_text(path, json.dumps(whole, indent=2) + "\n")
    return path


def show(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    notes: Iterable[str],
    path: pathlib.Path,
) -> None:
    """Print a table, its notes, and the path of the JSON file."""
    print(_reports.Table(title, columns, rows, None, [*notes, f"Written to {path}"]), flush=True)
    print(flush=True)


COLUMNS = ("what", "median", "lower quartile", "upper quartile", "median, CPU time")


def milliseconds(timing: Timing) -> list[str]:
    """Return the cells of all `COLUMNS` but the first."""
    wall = timing.wall
    seconds = (wall.median, wall.lower_quartile, wall.upper_quartile, timing.cpu.median)
    return [f"{1e3 * value:,.1f} ms" for value in seconds]


def against(value: float, goal: float, digits: int = 3) -> str:
    """Return a figure with its goal, and whether it is met."""
    outcome = "met" if value <= goal else "missed"
    return f"{value:.{digits}f} (goal: at most {goal:g}; {outcome})"


def spread(ratio: Ratio) -> str:
    """Return a ratio of the fastest rounds and the spread over single rounds as text."""
    rounds = ratio.of_rounds
    return (
        f"of the fastest rounds {ratio.of_fastest:.3f}, of single rounds {rounds.median:.3f} "
        f"(quartiles {rounds.lower_quartile:.3f} to {rounds.upper_quartile:.3f})"
    )


def _processor() -> str:
    """Return the processor's name, as far as the system gives it."""
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
