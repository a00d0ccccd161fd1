"""Checks of schedules, and serialization of a pruner's schedule, criterion and selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tscnc_tf import _keras
from tscnc_tf._keras import layers
from tscnc_tf.functional import scheduling
from tscnc_tf.pruning.learned import restricted
from tscnc_tf.pruning.selection import Selection
from tscnc_tf.pruning.targets import Target, found_again


def require_schedule(schedule: Any) -> None:
    """Raise unless `schedule(step)` returns whether to prune, and a sparsity in [0, 1)."""
    if not callable(schedule):
        raise TypeError(
            "schedule must be a PruningSchedule, such as tscnc_tf.schedules.CosineSparsity, or a "
            f"callable from a step to (whether to prune, sparsity), got {schedule!r}."
        )
    try:
        due, sparsity = schedule(tf.constant(1, tf.int64))
        _ = bool(due), float(sparsity)
        signature = [tf.TensorSpec((), tf.int64)]
        tf.function(schedule.__call__, signature, autograph=False).get_concrete_function()
    except Exception as error:
        raise TypeError(
            "schedule must return (whether to prune, sparsity) for a step, by TensorFlow "
            f"operations (tf.where, not if), as it is compiled; {schedule!r} fails: {error}"
        ) from error
    final = scheduling.final_sparsity(schedule)
    if not 0.0 <= final < 1.0:
        raise ValueError(
            f"schedule must end at a sparsity in [0, 1), the fraction of zeros; {schedule!r} "
            f"ends at {final:g}."
        )


def serialize_schedule(schedule: Any, model: Any) -> dict[str, Any]:
    """Return a schedule as JSON values.

    Raises:
        ValueError: it is a lambda.
    """
    from tscnc_tf import schedules

    if isinstance(schedule, schedules.PruningSchedule):
        return {"schedule": schedule.get_config()}
    return {"callable": serialize(schedule, model)}


def deserialize_schedule(config: dict[str, Any], model: Any) -> Any:
    """Return the schedule that `serialize_schedule` was given."""
    if "schedule" not in config:
        return deserialize(config["callable"], model)
    from tscnc_tf import schedules

    return schedules.deserialize(config["schedule"])


def serialize(obj: Any, model: Any) -> Any:
    """Return an object as its model's Keras serializes it; a string is returned unchanged."""
    if isinstance(obj, str):  # tf_keras does not take strings while it writes a SavedModel
        return obj
    if getattr(obj, "__name__", "") == "<lambda>":
        raise ValueError(
            f"{obj!r} can't be saved with model {model.name!r}, as a lambda has no name: write it "
            "as a function, and register it with keras.saving.register_keras_serializable."
        )
    return _keras.library("model", model).saving.serialize_keras_object(obj)


def deserialize(config: Any, model: Any) -> Any:
    """Return the object that `serialize` was given."""
    return _keras.library("model", model).saving.deserialize_keras_object(config)


def serialize_selection(
    selection: Selection, targets: Sequence[Target], model: Any
) -> dict[str, Any]:
    """Return how weights are selected, and which weights, as JSON values."""
    where = layers.weight_paths(model)
    return {
        "structure": serialize(selection.structure, model),
        "scope": serialize(restricted(selection.scope, targets), model),
        "min_weights": selection.min_weights,
        "weights": [
            {"path": where[id(target.variable)], "name": target.name, "shape": list(target.shape)}
            for target in targets
        ],
    }


def deserialize_selection(config: dict[str, Any], model: Any) -> dict[str, Any]:
    """Return the arguments of a pruner that `serialize_selection` describes.

    Raises:
        ValueError: the model lacks a weight that was pruned.
    """
    return {
        "layers": found_again(model, config["weights"]),
        "structure": deserialize(config["structure"], model),
        "scope": deserialize(config["scope"], model),
        "min_weights": config["min_weights"],
    }
