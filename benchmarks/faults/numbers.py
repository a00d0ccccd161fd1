"""Numerically hard matrices, and values that are not finite, in calls and in experiments."""

from __future__ import annotations

import functools
import itertools
import pathlib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tscnc_tf as tscnc
from benchmarks.faults import runs
from benchmarks.faults.outcome import Outcome
from tscnc_tf import callbacks, functional
from tscnc_tf.experiments import folders

MATRICES, FEW, STACKED = 10_000, 200, 50
STEPS = 24  # of the short experiment: four in each of two epochs of three stages
DTYPES = (tf.float16, tf.bfloat16, tf.float32, tf.float64)
PENALTIES: dict[str, Callable[[Any], tf.Tensor]] = {
    "transformed l1": functional.transformed_l1,
    "transformed l1, a = 1e-3": functools.partial(functional.transformed_l1, a=1e-3),
    "log-ratio": functional.log_ratio,
    "authors": functional.authors_penalty,
    "orthogonality": functional.orthogonality,
}


def scenarios(smoke: bool) -> Iterator[Outcome]:
    """Yield the outcomes of hard matrices, and of values that are not finite."""
    yield _matrices(FEW if smoke else MATRICES)
    yield _not_finite((np.nan,) if smoke else (np.nan, np.inf))
    if not smoke:
        yield _in_stages()


def hard_matrices(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return matrices of one shape, of any rank, of scales from 1e-30 to 1e30, with zeros."""
    columns = int(rng.integers(1, 9))
    rows = columns + int(rng.integers(0, 9))
    stack = np.zeros((count, rows, columns))
    for matrix in stack:
        rank = int(rng.integers(0, columns + 1))
        matrix += rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns))
        if rng.random() < 0.3:  # columns of very different lengths
            matrix *= 10.0 ** rng.uniform(-8, 8, size=columns)
        matrix *= rng.random((rows, columns)) >= rng.choice([0.0, 0.5, 0.9, 0.99])
        size = np.abs(matrix).max()
        matrix *= 10.0 ** rng.uniform(-30, 30) / (size if size else 1.0)
    return stack


def _matrices(count: int) -> Outcome:
    outcome = Outcome(
        f"{count:,} matrices of rank 0 to full and scale 1e-30 to 1e30, in float16, bfloat16, "
        "float32 and float64, under five penalties"
    )
    rng = np.random.default_rng(0)
    for _ in range(count // STACKED):
        stack = hard_matrices(rng, STACKED)
        for dtype in DTYPES:
            limit = float(dtype.max)
            matrices = tf.cast(np.clip(stack, -limit, limit), dtype)
            for name, penalty in PENALTIES.items():
                with tf.GradientTape() as tape:
                    tape.watch(matrices)
                    value = penalty(matrices)
                slope = tape.gradient(value, matrices)
                are_finite = np.ones(STACKED, bool)
                for each in (value, slope):
                    rows = tf.reshape(tf.math.is_finite(each), (STACKED, -1))
                    are_finite &= np.all(rows, axis=1)
                for is_finite, matrix in zip(are_finite, stack, strict=True):
                    if is_finite:
                        outcome.count("finite value and gradient")
                    else:
                        size = np.abs(matrix).max()
                        outcome.lose(f"{name} of a {dtype.name} matrix of size {size:.1e}")
    return outcome


def _not_finite(values: tuple[float, ...]) -> Outcome:
    """Put NaN or infinity into weights, data, labels, sample weights and learning rates."""
    outcome = Outcome("NaN and infinity in weights, data, labels, losses and steps")
    for bad in values:
        for name, attempt in _attempts(bad).items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    attempt()
            except ValueError as error:
                if re.search(r"\b(NaN|nan|infinity|infinite|inf|finite)\b", str(error)):
                    outcome.count("error that names NaN or infinity")
                else:
                    outcome.lose(f"{name}, {bad}: {error}")
            else:
                outcome.lose(f"{name}, {bad}: taken")
    return outcome


def spoil_weight(step: int, note: pathlib.Path) -> None:
    """Have a weight become NaN before a step of the experiments of this process.

    Args:
        step: the number of the step, of all stages, from 0.
        note: a file to which the epoch and the batch are written, as errors name them.
    """
    steps, epoch = itertools.count(), [0]

    def on_epoch_begin(self: Any, number: int, logs: Any = None) -> None:
        remember(self, number, logs)
        epoch[0] = number

    def on_train_batch_begin(self: Any, batch: int, logs: Any = None) -> None:  # noqa: ARG001
        if next(steps) == step:
            self.model.trainable_variables[0].assign(np.nan * self.model.trainable_variables[0])
            note.write_text(f"After batch {batch + 1} of epoch {epoch[0] + 1} ")

    remember = callbacks.RaiseOnNaN.on_epoch_begin
    callbacks.RaiseOnNaN.on_epoch_begin = on_epoch_begin  # type: ignore[method-assign]
    callbacks.RaiseOnNaN.on_train_batch_begin = on_train_batch_begin  # type: ignore[method-assign]


def _in_stages() -> Outcome:
    """Put NaN into a weight before a step of an experiment, and run it again, for each step."""
    outcome = Outcome("NaN in a weight before a step of an experiment; then run again")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        runs.process(runs.recipe(True), folder / "whole").join()
        for step in range(STEPS):
            run, note = folder / f"run-{step}", folder / f"note-{step}"
            process = runs.process(
                runs.recipe(True), run, functools.partial(spoil_weight, step, note)
            )
            process.join()
            error = runs.error_of(run).partition("\n")[0]
            said = note.read_text() if note.exists() else "no such step"
            is_later = "epoch 1 " not in said
            if not error.startswith(f"ValueError: {said}") or not re.search("NaN|nan", error):
                outcome.lose(f"step {step}: exit {process.exitcode}, {error[:300]}")
            elif _spoiled(run):
                outcome.lose(f"step {step}: NaN in {_spoiled(run)}")
            elif is_later and not list(run.glob("*/state-1")):
                outcome.lose(f"step {step}: no checkpoint of the epoch before")
            else:
                outcome.count("said in its step, and in no file")
            runs.finish(outcome, run, folder / "whole")
    return outcome


def _spoiled(run: pathlib.Path) -> list[str]:
    """Return the files of arrays, of checkpoints too, that have values that are not finite."""
    return [
        str(path.relative_to(run))
        for path in run.rglob("*.npz")
        if not all(np.all(np.isfinite(each)) for each in folders.read_arrays(path).values())
    ]


def _attempts(bad: float) -> dict[str, Callable[[], Any]]:
    rng = np.random.default_rng(0)
    x, y = rng.random((16, 6)).astype("float32"), np.arange(16) % 3
    soft, weights = np.eye(3, dtype="float32")[y], np.ones(16, "float32")
    for array in (wrong := x.copy(), soft, weights):
        array.reshape(16, -1)[9, 0] = bad
    attack = tscnc.attacks.PGD(epsilon=0.1, steps=1)

    def model(value: float = bad) -> Any:
        layers = keras.layers
        made = keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(8, name="inner"),
                layers.BatchNormalization(),
                layers.Dense(3),
            ]
        )
        kernel = made.get_layer("inner").kernel
        kernel.assign(tf.tensor_scatter_nd_update(kernel.value, [[1, 2]], [value]))
        return made

    def fit(network: Any, x: Any = x, y: Any = y, weights: Any = None, rate: float = 0.1) -> None:
        loss = tscnc.losses.TRADES(beta=1.0)
        trainer = tscnc.AdversarialTraining(network, attack=attack, loss=loss)
        trainer.compile(keras.optimizers.SGD(rate))
        watch = [tscnc.callbacks.RaiseOnNaN()]
        data = {"x": x, "y": y, "sample_weight": weights}
        trainer.fit(**data, batch_size=8, verbose=0, shuffle=False, callbacks=watch)

    sound = 0.1
    return {
        "weights that are trained": lambda: fit(model()),
        "weights that are pruned": lambda: tscnc.prune_now(model(), 0.5),
        "weights that are to be pruned": lambda: tscnc.prune(
            model(), tscnc.schedules.OneShot(0.5), engine="masks"
        ),
        "weights that get scores": lambda: tscnc.prune(model(), method="scores", sparsity=0.5),
        "weights of a model that is recalibrated": lambda: tscnc.pruning.recalibrate(model(), x),
        "weights of a model that is compacted": lambda: tscnc.pruning.compact(model()),
        "weights whose budgets are asked for": lambda: tscnc.pruning.condition_budgets(
            model(), 0.5
        ),
        "weights that are measured": lambda: tscnc.inspection.condition_numbers(model()),
        "weights of a model that is judged": lambda: tscnc.evaluate_robustness(
            model(), x, y, attack, progress=False
        ),
        "weights that are exported": lambda: tscnc.export_litert(model(), "never.tflite"),
        "data for training": lambda: fit(model(sound), wrong),
        "soft labels": lambda: fit(model(sound), y=soft),
        "sample weights": lambda: fit(model(sound), weights=weights),
        "a learning rate": lambda: fit(model(sound), rate=bad),
        "data for an importance": lambda: tscnc.prune_now(
            model(sound), 0.5, criterion=tscnc.pruning.Taylor(wrong, y)
        ),
        "data for recalibration": lambda: tscnc.pruning.recalibrate(model(sound), wrong),
        "data to be judged on": lambda: tscnc.evaluate_robustness(
            model(sound), wrong, y, attack, progress=False
        ),
        "data for a Lipschitz constant": lambda: tscnc.inspection.local_lipschitz(
            model(sound), wrong, 0.1
        ),
    }
