"""Training with masks on two logical devices of one GPU, with XLA and without.

`python -m benchmarks.two_devices FILE FORM...` tries the named forms in a process of its own: a
device can only be divided before it is used, and XLA may end the process.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf

import tscnc_tf as tscnc
from tscnc_tf import _keras
from tscnc_tf._keras import cloning, flavours, masks

ROOT = pathlib.Path(__file__).parents[1]
FORMS = ("tf_keras", "keras", "tf_keras, XLA", "keras, XLA")
SPARSITY = 0.75
_MEGABYTES = 1024  # of each of the two devices
_SECONDS = 600.0  # for all forms


def tried() -> dict[str, dict[str, Any]]:
    """Return by form how the training has ended.

    "outcome" is "ok", or the error. After "ok", "difference" is the largest difference of a weight
    from the same training on one device.
    """
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "found.jsonl"
        while left := [form for form in FORMS if form not in found]:
            file.write_text("")
            end = _run([sys.executable, "-m", "benchmarks.two_devices", str(file), *left])
            lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
            found |= {line.pop("form"): line for line in lines}
            if end and (untried := [form for form in FORMS if form not in found]):
                found[untried[0]] = {"outcome": end}
    return found


def _run(command: list[str]) -> str:
    """Run a process; return what went wrong, or an empty text."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"the process did not end within {_SECONDS:g} s"
    if done.returncode == 0:
        return ""
    last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    return f"the process ended with exit code {done.returncode}: {last}"


def main(file: pathlib.Path, forms: list[str]) -> None:
    """Try forms; append a line to a file after each."""
    kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    options = {"memory_limit": _MEGABYTES} if kind == "GPU" else {}
    halves = [tf.config.LogicalDeviceConfiguration(**options) for _ in range(2)]
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices(kind)[0], halves)
    devices = [each.name for each in tf.config.list_logical_devices(kind)[:2]]
    for form in forms:
        library, _, xla = form.partition(", ")
        try:
            result = _try(_keras.LIBRARIES[library], devices, bool(xla))
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            result = {"outcome": f"{type(error).__name__}: {lines[0]}"}
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"form": form, **result}) + "\n")


def _try(library: Any, devices: list[str], xla: bool) -> dict[str, Any]:
    alone, _ = _trained(library, tf.distribute.OneDeviceStrategy(devices[0]), False)
    # NCCL, the default, needs two physical devices.
    reduce = tf.distribute.ReductionToOneDevice()
    strategy = tf.distribute.MirroredStrategy(devices, cross_device_ops=reduce)
    weights, model = _trained(library, strategy, xla)
    for weight, mask in masks.masked_variables(model):
        copies = strategy.experimental_local_results(flavours.tensor_variable(weight))
        values = [value.numpy() for value in copies]
        kept = np.asarray(tf.cast(mask, tf.bool))
        if not np.array_equal(values[0], values[1]):
            return {"outcome": "the devices have different weights"}
        if np.any(values[0][~kept]) or abs(1.0 - kept.mean() - SPARSITY) > 0.05:
            return {"outcome": f"the masks do not hold: {np.mean(values[0] == 0):.3f} zeros"}
    pairs = zip(alone, weights, strict=True)
    difference = max(float(np.max(np.abs(one - other))) for one, other in pairs)
    return {"outcome": "ok", "difference": difference}


def _trained(library: Any, strategy: Any, xla: bool) -> tuple[list[np.ndarray], Any]:
    """Return the weights and the model after six steps of training on 64 examples."""
    library.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x, y = rng.random((64, 6), dtype=np.float32), rng.integers(0, 3, 64)
    layers = library.layers
    with strategy.scope():
        model = library.Sequential(
            [library.Input((6,)), layers.Dense(16, activation="relu"), layers.Dense(3)]
        )
        schedule = tscnc.schedules.CosineSparsity(0.0, SPARSITY, 1, 4, 1)
        model = tscnc.prune(model, schedule, engine="masks")
        attack = tscnc.attacks.PGD(epsilon=0.1, steps=2, start="none")
        trainer = tscnc.AdversarialTraining(model, attack=attack, loss=tscnc.losses.Madry())
        trainer.compile(library.optimizers.SGD(0.1, momentum=0.9), jit_compile=xla)
    trainer.fit(x, y, epochs=3, batch_size=32, shuffle=False, verbose=0)
    return cloning.bare(model).get_weights(), model


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2:])
