"""Training of one stage, which can be interrupted at any moment and resumed bit for bit."""

from __future__ import annotations

import contextlib
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import datasets, gates, inspection, pruning
from tscnc_tf._keras import flavours, gated, masks, optimizers
from tscnc_tf.callbacks import RaiseOnNaN, pruning_callbacks
from tscnc_tf.experiments import folders, stages
from tscnc_tf.experiments.folders import Progress
from tscnc_tf.experiments.recipe import Recipe, errors_begin
from tscnc_tf.training import AdversarialTraining

WEIGHTS, MASKS = "weight", "mask"


def fit(
    recipe: Recipe,
    stage: str,
    data: datasets.Dataset,
    trainer: AdversarialTraining,
    folder: pathlib.Path,
    on_batch: Callable[[int], None],
) -> None:
    """Train a stage to its end, from its beginning or from its last checkpoint.

    A checkpoint is written after each epoch. It holds everything that the next epoch depends on:
    weights, slots and averages of the optimizer, masks and scores, counters of random draws. The
    order of the examples and their augmentation depend on seed and epoch only.

    On SIGTERM or Ctrl-C a checkpoint is written after the current step, and then the signal takes
    effect. A second signal takes effect at once.

    Args:
        recipe: of the experiment.
        stage: "train", "prune" or "finetune".
        data: of the recipe.
        trainer: of the stage, before its first step; trained in place.
        folder: of the stage.
        on_batch: called after each step with the number of steps of the stage so far.

    Raises:
        ValueError: the loss, a weight or a slot stops being finite, see `callbacks.RaiseOnNaN`; or
            a batch has such values.
    """
    settings = getattr(recipe, stage)
    with SignalNote() as note:
        checkpoints = CheckpointCallback(recipe, stage, data, folder, on_batch, note)
        while (begin := checkpoints.resume(trainer)) < (settings.epochs,):
            batches = data.training(
                settings.batch_size,
                seed=recipe.seed,
                augment=recipe.data.augment,
                first_epoch=begin.epochs,
            )
            # The rest of an interrupted epoch is trained first, up to its checkpoint.
            trainer.fit(
                batches.skip(begin.steps),
                steps_per_epoch=checkpoints.steps - begin.steps,
                initial_epoch=begin.epochs,
                epochs=begin.epochs + 1 if begin.steps else settings.epochs,
                shuffle=False,
                verbose=0,
                callbacks=[
                    *(() if begin.steps else pruning_callbacks()),
                    RaiseOnNaN(first_batch=begin.steps),
                    checkpoints,
                ],
            )
            if not begin.steps:
                return


def best(trained: Any, folder: pathlib.Path) -> tuple[Any, dict[str, np.ndarray], int]:
    """Return the best epoch's model, stripped, its masks by name, and the epoch, counted from 1.

    Args:
        trained: the model of the stage after the last epoch; it is changed.
        folder: of the stage.
    """
    arrays = folders.read_arrays(folder / folders.BEST)
    names = [t.name for pruner in masks.pruners(trained) for t, _ in pruner.masked_targets()]
    kept = {name: arrays[f"{MASKS}{index}"] for index, name in enumerate(names)}
    # Stripped first: a model that trains scores would use these weights as new dense ones.
    model = pruning.strip(trained) if names else trained
    model.set_weights([arrays[f"{WEIGHTS}{index}"] for index in range(len(model.get_weights()))])
    return model, kept, int(arrays["epoch"])


@contextlib.contextmanager
def averaged(model: Any, optimizer: Any) -> Iterator[None]:
    """Replace the weights by the optimizer's moving averages during the block."""
    if not optimizers.innermost(optimizer).use_ema:
        yield
        return
    weights = model.get_weights()
    optimizer.finalize_variable_values(model.trainable_variables)
    masks.apply(model)
    try:
        yield
    finally:
        model.set_weights(weights)


class SignalNote:
    """Defers SIGTERM and SIGINT during a block, until `act` is called or the block ends.

    Only the first signal is deferred, and only in the main thread. A second one takes effect at
    once. Signals that are ignored, or handled outside of Python, are not deferred.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalNote:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._defer)
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the handlers, and raise the deferred signal."""
        self._restore()
        self.act()

    def __bool__(self) -> bool:
        """Return whether a signal is deferred."""
        return self._signal is not None

    def act(self) -> None:
        """Raise the deferred signal, if there is one."""
        if self._signal is not None:
            number, self._signal = self._signal, None
            signal.raise_signal(number)

    def _defer(self, number: int, frame: object) -> None:
        self._signal = number
        self._restore()

    def _restore(self) -> None:
        for number in list(self._before):
            if (before := self._before.pop(number, None)) is not None:  # a signal may interrupt
                signal.signal(number, before)


class CheckpointCallback(flavours.Callback):
    """Validates after each epoch, and writes the best weights, the metrics and a checkpoint."""

    def __init__(
        self,
        recipe: Recipe,
        stage: str,
        data: datasets.Dataset,
        folder: pathlib.Path,
        on_batch: Callable[[int], None],
        note: SignalNote,
    ) -> None:
        super().__init__()
        self.settings = getattr(recipe, stage)
        self.recipe, self.data, self.folder = recipe, data, folder
        self.on_batch, self.note = on_batch, note
        self.steps = data.steps_per_epoch(self.settings.batch_size)
        self.owner = folders.owner(recipe, stage)
        self.rows: list[dict[str, Any]] = []
        self._validator: Any = None
        self._begin = Progress(0)
        self._logs: dict[str, np.ndarray] = {}

    def resume(self, trainer: AdversarialTraining) -> Progress:
        """Restore the last checkpoint; return its progress."""
        trainer.optimizer.build(trainer.trainable_variables)
        found = folders.states(self.folder)
        self._begin, state = found[0] if found else (Progress(0), None)
        folders.tidy(self.folder, keep=self._begin)
        if state is not None:
            self.rows, self._logs = folders.read_state(state, _checkpoint(trainer), self.owner)
            folders.write_metrics(self.folder, self.rows)
        return self._begin

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Set the weight perturbation of this epoch; restore the metrics of an interrupted one."""
        self.model.awp = stages.awp(self.settings, epoch)
        if self._logs:
            for name, variable in self._log_variables().items():
                variable.assign(self._logs[name])
            self._logs = {}

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Report the progress; if a signal is deferred, write a checkpoint and raise it."""
        epochs = len(self.rows)
        done = batch + 1 + (self._begin.steps if epochs == self._begin.epochs else 0)
        self.on_batch(epochs * self.steps + done)
        if self.note and done < self.steps:
            folders.require_there(self.folder)
            state = {name: variable.numpy() for name, variable in self._log_variables().items()}
            self._write_state(Progress(epochs, done), state)
            self.note.act()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Validate; write the best weights, the metrics and the checkpoint, in this order.

        Raises:
            FileNotFoundError: the folder has been removed.
        """
        folders.require_there(self.folder)
        trainer = self.model
        if epoch < self.settings.average_from:
            optimizers.restart_averages(trainer.optimizer, trainer.model.trainable_variables)
        with averaged(trainer.model, trainer.optimizer):
            row = {"epoch": epoch + 1, **(logs or {}), **self._validate(trainer.model)}
            if self._is_best(row):
                arrays = weights_and_masks(trainer.model)
                arrays |= {"epoch": np.array(epoch + 1), "owner": self.owner}
                folders.write_arrays(self.folder / folders.BEST, arrays)
        self.rows.append({name: float(value) for name, value in row.items()} | {"epoch": epoch + 1})
        folders.write_metrics(self.folder, self.rows)
        self._write_state(Progress(epoch + 1), {})
        self.note.act()

    def _write_state(self, progress: Progress, logs: dict[str, np.ndarray]) -> None:
        checkpoint = _checkpoint(self.model)
        folders.write_state(self.folder, progress, checkpoint, self.rows, logs, self.owner)

    def _log_variables(self) -> dict[str, Any]:
        variables = [v for metric in self.model.metrics for v in metric.variables]
        return {f"variable{index}": variable for index, variable in enumerate(variables)}

    def _validate(self, model: Any) -> dict[str, float]:
        if self._validator is None:
            self._validator = stages.validator(self.recipe, model)
        batches = self.data.evaluation("validation", self.recipe.evaluate.batch_size)
        with errors_begin("validation: "):
            logs = self._validator.evaluate(batches, verbose=0, return_dict=True)
        conditions = inspection.condition_numbers(model)
        figures = {
            "validation_accuracy": logs["clean_accuracy"],
            "validation_robust_accuracy": logs["adversarial_accuracy"],
            "sparsity": _sparsity(model),
            "condition_number": conditions.worst.condition_number,
            "dead_filters": conditions.dead_filters,
        }
        if gated.gated_layers(model):
            opened = gates.report(model)
            figures |= {"expected_l0": opened.expected_l0, "open_gates": opened.open_share}
        return figures

    def _is_best(self, row: dict[str, Any]) -> bool:
        """Return whether an epoch is more robust than all earlier ones of at least its sparsity."""
        rivals = [old for old in self.rows if old["sparsity"] >= row["sparsity"]]
        score = row["validation_robust_accuracy"]
        return all(score > old["validation_robust_accuracy"] for old in rivals)


def weights_and_masks(model: Any) -> dict[str, np.ndarray]:
    """Return the weights of a model in their order, and its masks."""
    weights = {f"{WEIGHTS}{i}": value for i, value in enumerate(model.get_weights())}
    kept = [mask.numpy() for _, mask in masks.masked_variables(model)]
    return weights | {f"{MASKS}{i}": value for i, value in enumerate(kept)}


def _checkpoint(trainer: AdversarialTraining) -> tf.train.Checkpoint:
    return tf.train.Checkpoint(model=trainer.model, optimizer=trainer.optimizer)


def _sparsity(model: Any) -> float:
    """Return the sparsity of the masked weights, 0 if there are none."""
    kept = [mask.numpy() for _, mask in masks.masked_variables(model)]
    count = sum(mask.size for mask in kept)
    return 1.0 - sum(int(mask.sum()) for mask in kept) / count if count else 0.0
