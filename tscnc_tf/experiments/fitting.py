"""Training one stage so that it can be killed at any moment and resumed, bit for bit."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import datasets, gates, inspection, pruning
from tscnc_tf._keras import flavours, gated, masks, optimizers
from tscnc_tf.callbacks import pruning_callbacks
from tscnc_tf.experiments import folders, stages
from tscnc_tf.experiments.recipe import Recipe
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

    After each epoch everything that the next one depends on is written: weights, slots and averages
    of the optimizer, masks and scores, counters of random draws. The order of the examples and
    their augmentation depend on seed and epoch only.

    Args:
        recipe: of the experiment.
        stage: "train", "prune" or "finetune".
        data: of the recipe.
        trainer: of the stage, before its first step; trained in place.
        folder: of the stage.
        on_batch: called after each step with the number of steps of the stage so far.
    """
    settings = getattr(recipe, stage)
    checkpoints = CheckpointCallback(recipe, stage, data, folder, on_batch)
    done = checkpoints.resume(trainer)
    if done == settings.epochs:
        return
    trainer.fit(
        data.training(
            settings.batch_size,
            seed=recipe.seed,
            augment=recipe.data.augment,
            first_epoch=done,
        ),
        steps_per_epoch=data.steps_per_epoch(settings.batch_size),
        initial_epoch=done,
        epochs=settings.epochs,
        shuffle=False,
        verbose=0,
        callbacks=[*pruning_callbacks(), checkpoints],
    )


def best(trained: Any, folder: pathlib.Path) -> tuple[Any, dict[str, np.ndarray], int]:
    """Return the best epoch's model, stripped, its masks by name, and the epoch, counted from 1.

    Args:
        trained: the model of the stage after the last epoch; it is changed.
        folder: of the stage.
    """
    arrays = folders.read_arrays(folder / folders.BEST)
    names = [t.name for pruner in masks.pruners(trained) for t, _ in pruner.masked_targets()]
    kept = {name: arrays[f"{MASKS}{index}"] for index, name in enumerate(names)}
    # A model that trains scores would take these weights for new dense ones.
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


class CheckpointCallback(flavours.Callback):
    """Validates after each epoch, and writes the best weights, the metrics and a checkpoint."""

    def __init__(
        self,
        recipe: Recipe,
        stage: str,
        data: datasets.Dataset,
        folder: pathlib.Path,
        on_batch: Callable[[int], None],
    ) -> None:
        super().__init__()
        self.settings = getattr(recipe, stage)
        self.recipe, self.data, self.folder = recipe, data, folder
        self.on_batch = on_batch
        self.rows: list[dict[str, Any]] = []
        self._validator: Any = None

    def resume(self, trainer: AdversarialTraining) -> int:
        """Restore the last checkpoint; return the number of epochs done."""
        trainer.optimizer.build(trainer.trainable_variables)
        found = folders.states(self.folder)
        done, state = found[0] if found else (0, None)
        folders.tidy(self.folder, keep=done)
        if state is None:
            return 0
        self.rows = folders.read_state(state, _checkpoint(trainer))
        folders.write_metrics(self.folder, self.rows)
        return done

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Let the perturbation of the weights begin with its first epoch."""
        self.model.awp = stages.awp(self.settings, epoch)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Report the progress."""
        self.on_batch(len(self.rows) * self.params["steps"] + batch + 1)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Validate; write the best weights, the metrics and the checkpoint, in this order."""
        trainer = self.model
        if epoch < self.settings.average_from:
            optimizers.restart_averages(trainer.optimizer, trainer.model.trainable_variables)
        with averaged(trainer.model, trainer.optimizer):
            row = {"epoch": epoch + 1, **(logs or {}), **self._validate(trainer.model)}
            if self._is_best(row):
                arrays = {"epoch": np.array(epoch + 1), **weights_and_masks(trainer.model)}
                folders.write_arrays(self.folder / folders.BEST, arrays)
        self.rows.append({name: float(value) for name, value in row.items()} | {"epoch": epoch + 1})
        folders.write_metrics(self.folder, self.rows)
        folders.write_state(self.folder, epoch + 1, _checkpoint(trainer), self.rows)
        folders.tidy(self.folder, keep=epoch + 1)

    def _validate(self, model: Any) -> dict[str, float]:
        if self._validator is None:
            self._validator = stages.validator(self.recipe, model)
        batches = self.data.evaluation("validation", self.recipe.evaluate.batch_size)
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
        """Tell whether an epoch is more robust than all before it that are as sparse, or more."""
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
    """Return the sparsity of what is pruned, 0 if nothing is."""
    kept = [mask.numpy() for _, mask in masks.masked_variables(model)]
    count = sum(mask.size for mask in kept)
    return 1.0 - sum(int(mask.sum()) for mask in kept) / count if count else 0.0
