"""Numerically hard matrices, and values that are not finite, in calls and in experiments."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import re
import shutil
import tempfile
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tscnc_tf as tscnc
from benchmarks.faults import runs
from benchmarks.faults.outcome import Outcome
from tscnc_tf import callbacks, datasets, functional
from tscnc_tf._keras import optimizers
from tscnc_tf.experiments import folders, runner

MATRICES, FEW, STACKED = 10_000, 200, 50
BATCHES, STEPS = 4, 8  # of an epoch and of a stage of the short experiment
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
        yield from _in_stages(spoiled_cases())


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


@dataclasses.dataclass(frozen=True)
class Spoiled:
    """A value that becomes NaN or infinite in an experiment.

    Attributes:
        stage: the first stage that the process runs.
        place: a key of `VARIABLES`, or "data".
        value: NaN or infinity.
        step: the number of the step of the stage before which it happens, from 0; the evaluation
            has no steps.
    """

    stage: str
    place: str
    value: float
    step: int = 0

    def error(self) -> str:
        """Return a pattern of the error."""
        name = self.stage.partition("-")[2]
        not_finite = "(NaN|nan|infinite|inf)"
        if name == "evaluate":
            what = "x must" if self.place == "data" else "model .* has weights"
            return f"ValueError: {name}: {what} .*{not_finite}"
        if self.place == "data":
            return f"ValueError: {name}: x must .*{not_finite}.* batch {self.step + 1} of"
        batch, epoch = self.step % BATCHES + 1, self.step // BATCHES + 1
        return f"ValueError: {name}: After batch {batch} of epoch {epoch} .*{not_finite}"

    def prepare(self) -> None:
        """Replace functions of the package, so that it happens in this process."""
        steps = itertools.count()
        evaluate, training = runner._evaluate, datasets.Dataset.training

        def on_train_batch_begin(watch: Any, batch: int, logs: Any = None) -> None:  # noqa: ARG001
            if next(steps) == self.step:
                _spoil(VARIABLES[self.place](watch.model), self.value)

        def spoiled_training(data: Any, *args: Any, **kwargs: Any) -> tf.data.Dataset:
            batches = training(data, *args, **kwargs).enumerate()
            return batches.map(
                lambda step, batch: (tf.where(step == self.step, self.value, batch[0]), batch[1])
            )

        def spoiled_evaluate(recipe: Any, data: Any, model: Any, *rest: Any) -> None:
            if self.place == "data":
                x = np.where(np.arange(data.x_test.size) == 0, self.value, data.x_test.ravel())
                data = dataclasses.replace(data, x_test=x.reshape(data.x_test.shape))
            else:
                _spoil(VARIABLES[self.place](types.SimpleNamespace(model=model)), self.value)
            evaluate(recipe, data, model, *rest)

        if self.stage == runs.ALL_STAGES[-1]:
            runner._evaluate = spoiled_evaluate
        elif self.place == "data":
            datasets.Dataset.training = spoiled_training  # type: ignore[method-assign]
        else:
            watch: Any = callbacks.RaiseOnNaN
            watch.on_train_batch_begin = on_train_batch_begin


def _spoil(variable: Any, value: float) -> None:
    """Set the first entry of a variable."""
    values = variable.numpy()
    values.flat[0] = value
    variable.assign(values)


def _slot(name: str, trainer: Any) -> Any:
    """Return the optimizer's slot of a layer's kernel with this word in its name."""
    kernel = trainer.model.get_layer("logits").kernel
    slots = optimizers.companions(trainer.optimizer, [kernel])[0]
    return next(slot for slot in slots if name in slot.path)


VARIABLES: dict[str, Callable[[Any], Any]] = {
    "first kernel": lambda trainer: trainer.model.trainable_variables[0],
    "last kernel": lambda trainer: trainer.model.get_layer("logits").kernel,
    "moving average of a normalization": lambda trainer: next(
        v for v in trainer.model.non_trainable_variables if "moving" in v.path
    ),
    "momentum": functools.partial(_slot, "momentum"),
    "average of weights": functools.partial(_slot, "average"),
}


def spoiled_cases() -> Iterator[Spoiled]:
    """Yield NaN in the first kernel before each step, and others before one step of each stage."""
    rng = np.random.default_rng(0)
    for stage in runs.STAGES:
        for step in range(STEPS):
            yield Spoiled(stage, "first kernel", np.nan, step)
        yield Spoiled(stage, "first kernel", np.inf, int(rng.integers(STEPS)))
        for place in (*VARIABLES, "data"):
            is_there = place != "average of weights" or stage == runs.STAGES[0]
            for value in (np.nan, np.inf) if is_there and place != "first kernel" else ():
                yield Spoiled(stage, place, value, int(rng.integers(STEPS)))
    for place in ("first kernel", "last kernel", "moving average of a normalization", "data"):
        for value in (np.nan, -np.inf):
            yield Spoiled(runs.ALL_STAGES[-1], place, value)


def _in_stages(cases: Iterable[Spoiled]) -> Iterator[Outcome]:
    """Run an experiment in which a value is spoiled, and then again, for each case."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        whole = folder / "whole"
        runs.process(runs.recipe(True), whole).join()
        outcomes: dict[str, Outcome] = {}
        for index, case in enumerate(cases):
            outcome = outcomes.setdefault(
                case.place, Outcome(f"NaN and infinity in an experiment: {case.place}; run again")
            )
            run = runs.copy_before(case.stage, whole, folder / f"run-{index}")
            process = runs.process(runs.recipe(True), run, case.prepare)
            process.join()
            error = runs.error_of(run).partition("\n")[0]
            is_later = case.step >= BATCHES
            if not re.match(case.error(), error):
                outcome.lose(f"{case}: exit {process.exitcode}, {error[:300]}")
            elif _spoiled(run):
                outcome.lose(f"{case}: not finite in {_spoiled(run)}")
            elif is_later and not (run / case.stage / "state-1").is_dir():
                outcome.lose(f"{case}: no checkpoint of the epoch before")
            else:
                outcome.count(f"said in its step in {case.stage}, and in no file")
            runs.finish(outcome, run, whole)
            shutil.rmtree(run)
        yield from outcomes.values()


def _spoiled(run: pathlib.Path) -> list[str]:
    """Return the files of arrays and checkpoints that have values that are not finite."""
    found: dict[pathlib.Path, Iterable[np.ndarray]] = {
        path: folders.read_arrays(path).values() for path in run.rglob("*.npz")
    }
    for path in run.rglob("state-*/checkpoint.index"):
        reader = tf.train.load_checkpoint(str(path.with_suffix("")))
        kept = map(reader.get_tensor, reader.get_variable_to_shape_map())
        found[path] = [each for each in map(np.asarray, kept) if each.dtype.kind == "f"]
    return [
        str(path.relative_to(run))
        for path, arrays in found.items()
        if not all(np.all(np.isfinite(each)) for each in arrays)
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
