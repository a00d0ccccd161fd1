"""Run the programs that `python -m benchmarks stablehlo` wrote, where there is JAX only.

    python run_stablehlo.py FOLDER --check       # the same weights as TensorFlow's?
    python run_stablehlo.py FOLDER --rounds 30   # the step beside its floor, timed

Needs this file and the folder, NumPy and JAX; neither TensorFlow nor tscnc_tf.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import time
from typing import Any

import numpy as np

# Step counters are 64 bits wide. JAX reads this when it is imported, which is further below:
# the command line's help should work without it.
os.environ.setdefault("JAX_ENABLE_X64", "1")

PIECES = ("gradient", "forward", "train", "update")


class Program:
    """A compiled program and its state on a device; what it assigns is fed back to it.

    Args:
        path: of the files, without their ending.
    """

    def __init__(self, path: pathlib.Path) -> None:
        import jax
        from jax._src.lib import xla_client  # JAX has no public way to run a program as it is
        from jaxlib import _jax

        self.device = jax.devices()[0]
        with np.load(path.with_suffix(".npz")) as held:
            plan = json.loads(str(held["plan"]))
            self._order, self._aliases, self.calls = plan["order"], plan["aliases"], plan["calls"]
            self.values = {name: jax.device_put(held[name], self.device) for name in self._order}
        self._program = self.device.client.compile_and_load(
            path.with_suffix(".mlir").read_bytes(),
            _jax.DeviceList((self.device,)),
            xla_client.CompileOptions(),
        )

    def run(self, calls: int) -> None:
        """Run so many times in a row, and wait for the end."""
        import jax

        outputs: Any = ()
        for _ in range(calls):
            outputs = self._program.execute([self.values[name] for name in self._order])
            self.values |= {name: outputs[index] for name, index in self._aliases.items()}
        jax.block_until_ready(outputs)


def check(folder: pathlib.Path) -> bool:
    """Take the steps that TensorFlow took, and tell whether both end up with the same weights.

    After the first step all variables must be alike within 1e-4. Later the two may part company,
    and more so in a large network: where the gradient at an input is nearly zero, its sign hangs on
    rounding, and the attack steps by the sign. So after the last step the distance between the two
    must be below 1 % of the way that the kernels have gone.
    """
    program = Program(folder / "step")
    with np.load(folder / "step.npz") as begin, np.load(folder / "expected.npz") as expected:
        steps = int(expected["steps"])
        program.run(1)
        first = _differences(program, expected, "first")
        program.run(steps - 1)
        last = _differences(program, expected, "last")
        kernels = [name for name in last if "/kernel" in name]
        way = [expected[f"last:{name}"] - begin[name] for name in kernels]
        share = _norm([last[name] for name in kernels]) / _norm(way)
        alike = all(
            np.all(difference <= 1e-4 + 1e-4 * np.abs(expected[f"first:{name}"]))
            for name, difference in first.items()
        )
    worst, where = max((float(np.max(value)), name) for name, value in first.items())
    print(f"{program.device.device_kind}, {len(first)} variables:")
    print(f"after 1 step the largest difference is {worst:.1e}, in {where}; within 1e-4: {alike}")
    print(f"after {steps} steps the kernels differ by {share:.1e} of the way they have gone")
    return alike and share < 0.01


def _differences(program: Program, expected: Any, when: str) -> dict[str, np.ndarray]:
    """Return |JAX - TensorFlow| by the name of the variable."""
    keys = [key for key in expected.files if key.startswith(f"{when}:")]
    names = {key: key.partition(":")[2] for key in keys}
    return {
        name: np.abs(np.asarray(program.values[name], np.float64) - expected[key])
        for key, name in names.items()
    }


def _norm(arrays: list[np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in arrays)))


def measure(folder: pathlib.Path, rounds: int) -> dict[str, Any]:
    """Time the step and the pieces of its floor in rounds, A B C A B C ..., and print them."""
    import jax

    programs = {name: Program(folder / name) for name in ("step", *PIECES)}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for index in range(rounds + 2):  # two rounds to warm up
        for name, program in programs.items():
            start = time.perf_counter()
            program.run(program.calls)
            if index > 1:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    ratios = np.array(seconds["step"]) / np.sum([seconds[name] for name in PIECES], axis=0)
    for name, program in programs.items():
        low, high = 1e3 * np.percentile(seconds[name], (25, 75))
        what = f"{program.calls} x {name}" if program.calls > 1 else name
        print(f"{what:15}{1e3 * medians[name]:10.3f} ms   quartiles {low:.3f} to {high:.3f}")
    ratio = medians["step"] / sum(medians[name] for name in PIECES)
    fastest = min(seconds["step"]) / sum(min(seconds[name]) for name in PIECES)
    quartiles = [float(value) for value in np.percentile(ratios, (25, 50, 75))]
    print(
        f"Step over floor, of medians: {ratio:.3f} (goal: at most 1.1; "
        f"{'met' if ratio <= 1.1 else 'missed'}); of the fastest rounds {fastest:.3f}, of single "
        f"rounds {quartiles[1]:.3f} (quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f}); "
        f"{rounds} rounds, "
        f"{programs['step'].device.device_kind}, JAX {jax.__version__}"
    )
    return {
        "device": programs["step"].device.device_kind,
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
    parser.add_argument("--rounds", type=int, default=20, help="rounds that are timed")
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file for the times")
    arguments = parser.parse_args()
    if arguments.check:
        sys.exit(not check(arguments.folder))
    result = measure(arguments.folder, arguments.rounds)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
