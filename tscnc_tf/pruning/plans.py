"""What a pruner is made of: whether it will do, what it leads to, and how it is saved."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tscnc_tf import _checks, _keras
from tscnc_tf._keras import flavours, masks, wrappers
from tscnc_tf.functional.scheduling import final_sparsity


def require_model(model: Any) -> None:
    """Raise unless a model is one of either Keras, built, and not pruned yet."""
    _keras.library("model", model)
    _keras.require_built("model", model)
    require_unpruned("model", model)


def require_unpruned(name: str, model: Any) -> None:
    """Raise a ValueError if a model, or one inside it, is pruned already, by whichever engine."""
    if isinstance(model, flavours.Trainer):
        raise ValueError(
            f"{name} must be the network itself, not the trainer: prune trainer.model."
        )
    if wrappers.wrapped_layers(model) or masks.pruners(model):
        raise ValueError(f"{name} {model.name!r} is pruned already: strip it first.")


def checked_selection(weights: Any, min_rank: Any) -> tuple[str | None, int]:
    """Return the arguments `weights` and `min_rank`, or raise an error."""
    if weights is not None and not isinstance(weights, str):
        raise TypeError(f"weights must be a name pattern such as '*kernel', got {weights!r}.")
    return weights, _checks.integer("min_rank", min_rank, minimum=1)


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
            "operations, "
            f"tf.where and not if, as it is compiled; {schedule!r} fails: {error}"
        ) from error
    final = final_sparsity(schedule)
    if not 0.0 <= final < 1.0:
        raise ValueError(
            f"schedule must lead to a sparsity in [0, 1), the fraction of zeros; {schedule!r} "
            f"leads to {final:g}."
        )


def serialize_schedule(schedule: Any, model: Any) -> dict[str, Any]:
    """Return a schedule as JSON values.

    Raises:
        ValueError: it is a lambda, which has no name to find it by.
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
    """Return an object as its model's Keras serializes it."""
    if getattr(obj, "__name__", "") == "<lambda>":
        raise ValueError(
            f"{obj!r} can't be saved with model {model.name!r}, as a lambda has no name: write it "
            "as a function, and register it with keras.saving.register_keras_serializable."
        )
    return _keras.library("model", model).saving.serialize_keras_object(obj)


def deserialize(config: Any, model: Any) -> Any:
    """Return the object that `serialize` was given."""
    return _keras.library("model", model).saving.deserialize_keras_object(config)
