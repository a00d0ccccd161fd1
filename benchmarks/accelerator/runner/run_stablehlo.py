"""Run the programs of `python -m benchmarks stablehlo`.

    python run_stablehlo.py FOLDER --check       # the same weights as TensorFlow's?
    python run_stablehlo.py FOLDER --rounds 30   # the step beside its floor, timed

Needs this folder, Python, NumPy and JAX; neither TensorFlow nor tscnc_tf.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from programs import Bundle

PIECES = ("gradient", "forward", "train", "update")


class Programs:
    """The programs, their state on a device, and the arguments of all their calls.

    Args:
        folder: the folder of the benchmark.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        bundle = Bundle(folder)
        self.begin = bundle.initial()
        self._programs = {name: bundle.program(name) for name in ("step", *PIECES)}
        self.calls = json.loads((folder / "calls.json").read_text())
        # A copy, since a step writes to the memory of its inputs.
        self.state = {n: jax.numpy.array(v, copy=True) for n, v in self.begin.items()}
        with np.load(folder / "arguments.npz") as held:
            self._arguments = {
                name: [jax.device_put(held[f"{name}/{key}"]) for key in program.arguments]
                for name, program in self._programs.items()
            }

    def run(self, name: str, calls: int) -> None:
        """Run a program `calls` times in a row, and wait for the end."""
        program, arguments = self._programs[name], self._arguments[name]
        for _ in range(calls):
            outputs = program(self.state, *arguments)
        jax.block_until_ready((outputs, self.state))


def check(folder: pathlib.Path) -> bool:
    """Take the same steps as TensorFlow, and tell whether both end with the same weights.

    After the first step all variables must be equal within 1e-4. Later they differ more, mostly in
    a large network: where the gradient at an input is nearly zero, rounding decides its sign, and
    the attack steps by the sign. So after the last step, the distance between the kernels of both
    must be below 1 % of their distance from the initial kernels.
    """
    programs = Programs(folder)
    with np.load(folder / "expected.npz") as expected:
        steps = int(expected["steps"])
        programs.run("step", 1)
        first = _differences(programs, expected, "first")
        programs.run("step", steps - 1)
        last = _differences(programs, expected, "last")
        kernels = [name for name in last if name.startswith("model/") and "/kernel" in name]
        way = [expected[f"last:{name}"] - programs.begin[name] for name in kernels]
        share = _norm([last[name] for name in kernels]) / _norm(way)
        alike = all(
            np.all(difference <= 1e-4 + 1e-4 * np.abs(expected[f"first:{name}"]))
            for name, difference in first.items()
        )
    worst, where = max((float(np.max(value)), name) for name, value in first.items())
    print(f"{_device()}, {len(first)} variables:")
    print(f"after 1 step the largest difference is {worst:.1e}, in {where}; within 1e-4: {alike}")
    print(f"after {steps} steps the kernels differ by {share:.1e} of their change in training")
    return alike and share < 0.01


def _differences(programs: Programs, expected: Any, when: str) -> dict[str, np.ndarray]:
    """Return |JAX - TensorFlow| by the name of the variable."""
    keys = [key for key in expected.files if key.startswith(f"{when}:")]
    names = {key: key.partition(":")[2] for key in keys}
    return {
        name: np.abs(np.asarray(programs.state[name], np.float64) - expected[key])
        for key, name in names.items()
    }


def _device() -> str:
    return jax.devices()[0].device_kind


def _norm(arrays: list[np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in arrays)))


def measure(folder: pathlib.Path, rounds: int) -> dict[str, Any]:
    """Time the step and the pieces of its floor in interleaved rounds, and print the times."""
    programs = Programs(folder)
    seconds: dict[str, list[float]] = {name: [] for name in ("step", *PIECES)}
    for index in range(rounds + 2):  # two rounds to warm up
        for name in seconds:
            start = time.perf_counter()
            programs.run(name, programs.calls[name])
            if index > 1:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    ratios = np.array(seconds["step"]) / np.sum([seconds[name] for name in PIECES], axis=0)
    for name, calls in programs.calls.items():
        low, high = 1e3 * np.percentile(seconds[name], (25, 75))
        what = f"{calls} x {name}" if calls > 1 else name
        print(f"{what:15}{1e3 * medians[name]:10.3f} ms   quartiles {low:.3f} to {high:.3f}")
    ratio = medians["step"] / sum(medians[name] for name in PIECES)
    fastest = min(seconds["step"]) / sum(min(seconds[name]) for name in PIECES)
    quartiles = [float(value) for value in np.percentile(ratios, (25, 50, 75))]
    print(
        f"Step over floor, of medians: {ratio:.3f} (goal: at most 1.1; "
        f"{'met' if ratio <= 1.1 else 'missed'}); of the fastest rounds {fastest:.3f}, of single "
        f"rounds {quartiles[1]:.3f} (quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f}); "
        f"{rounds} rounds, "
        f"{_device()}, JAX {jax.__version__}"
    )
    return {
        "device": _device(),
        "jax": jax.__version__,
        "rounds": rounds,
        "seconds": seconds,
        "medians": medians,
        "ratio": ratio,
        "ratio_of_fastest": fastest,
        "ratio_quartiles": quartiles,
    }


def main() -> None:
    """Parse the command line, and check or measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--check", action="store_true", help="compare with TensorFlow's weights")
    parser.add_argument("--rounds", type=int, default=20, help="number of timed rounds")
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file for the times")
    arguments = parser.parse_args()
    if arguments.check:
        sys.exit(not check(arguments.folder))
    result = measure(arguments.folder, arguments.rounds)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
