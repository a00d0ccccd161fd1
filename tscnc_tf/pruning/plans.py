"""What a pruner is made of: whether it will do, what it leads to, and how it is saved."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tscnc_tf import _keras, _tables
from tscnc_tf.functional.scheduling import final_sparsity
from tscnc_tf.pruning.scopes import Scope
from tscnc_tf.pruning.targets import Target


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
    except Exception as error:
        raise TypeError(
            f"schedule must return (whether to prune, sparsity) for a step, {schedule!r} fails for "
            f"step 1: {error}"
        ) from error
    final = final_sparsity(schedule)
    if not 0.0 <= final < 1.0:
        raise ValueError(
            f"schedule must lead to a sparsity in [0, 1), the fraction of zeros; {schedule!r} "
            f"leads to {final:g}."
        )


def warn_of_starving(targets: Sequence[Target], scope: Scope, sparsity: float) -> None:
    """Warn of weight tensors that keep fewer weights than they have outputs in the end."""
    counts = scope.counts([target.size for target in targets], sparsity)
    if counts is None:
        return
    starving = []
    for target, count in zip(targets, counts, strict=True):
        outputs = target.outputs or 1
        if int(count) < outputs:
            starving.append(
                f"{target.name} keeps {int(count)} of {target.size} weights for {outputs} outputs, "
                f"so at least {outputs - int(count)} are dead"
            )
    if starving:
        warnings.warn(
            f"At a sparsity of {_tables.percent(sparsity)}, {'; '.join(starving)}. Leave these out "
            "by layers=, keep more by min_weights= or scope=, or prune less.",
            UserWarning,
            stacklevel=4,
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
