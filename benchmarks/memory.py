"""Peak memory of an evaluation by AutoAttack, by the number of examples."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np

from benchmarks import measure, record

COUNTS, FEW = (1_000, 10_000, 100_000), (200, 400)
SHAPE, CLASSES = (8, 8, 1), 4
EPSILON = 1e-4  # so small that nearly all examples are robust, and each attack gets them all
BATCH = 1_000
MOST = 2.0  # bytes of memory for each further byte of data, the data themselves included
ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(options: record.Options) -> None:
    """Evaluate each number of examples in its own process; print a table, write `memory.json`."""
    found = []
    for count in FEW if options.smoke else COUNTS:
        command = [sys.executable, "-m", "benchmarks.memory", str(count)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    first, last = found[0], found[-1]
    grown, data = (last[key] - first[key] for key in ("peak_bytes", "data_bytes"))
    path = record.write(
        options,
        "memory",
        {"sizes": found, "bytes_per_further_byte_of_data": grown / data, "goal": MOST},
    )
    record.show(
        "An evaluation by AutoAttack",
        ("examples", "data", "peak memory", "seconds"),
        [
            [
                f"{each['examples']:,}",
                *(f"{each[key] / 2**20:,.1f} MiB" for key in ("data_bytes", "peak_bytes")),
                f"{each['seconds']:.0f} s",
            ]
            for each in found
        ],
        [f"Bytes for each further byte of data: {record.against(grown / data, MOST)}"],
        path,
    )


def measured(count: int) -> dict[str, Any]:
    """Evaluate `count` examples; return the peak memory and the size of the data.

    The attacks of AutoAttack are cut to few iterations, which does not change what is kept of an
    example. All diagnostics are run.
    """
    import keras

    import tscnc_tf as tscnc

    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential([keras.Input(SHAPE), layers.Flatten(), layers.Dense(CLASSES)])
    x = np.random.default_rng(0).random((count, *SHAPE), np.float32)
    y = np.concatenate([np.argmax(model(part), axis=1) for part in np.array_split(x, count // 100)])
    ball: dict[str, Any] = {"epsilon": EPSILON, "norm": "linf"}
    attack = tscnc.attacks.AutoAttack(**ball)
    vars(attack)["attacks"] = (
        tscnc.attacks.APGD(loss="ce", steps=2, **ball),
        tscnc.attacks.APGD(loss="targeted_dlr", target_classes=1, steps=2, **ball),
        tscnc.attacks.FAB(target_classes=1, steps=2, **ball),
        tscnc.attacks.Square(queries=2, **ball),
    )
    report = tscnc.evaluate_robustness(model, x, y, attack, batch_size=BATCH, progress=False)
    [result] = report.attacks.values()
    return {
        "examples": count,
        "data_bytes": x.nbytes + y.nbytes,
        "peak_bytes": measure.peak_memory(),
        "attacked": [part.examples for part in result.stages],
        "flags": report.flags,
        "seconds": report.seconds,
    }


if __name__ == "__main__":
    print(json.dumps(measured(int(sys.argv[1]))))
