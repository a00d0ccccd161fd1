"""Evaluation of pruning schedules over many steps: final sparsity and renewals of the masks.

A schedule is any callable from a step, counted from 1, to (whether to renew the masks, sparsity).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

Schedule = Callable[[Any], tuple[Any, Any]]

_FAR = 2**31 - 1  # a step after the end of any schedule
_LOOK_AHEAD = 1_000_000  # the most steps that are evaluated, all in one call
_LOOK_AHEAD_ONE_BY_ONE = 20_000  # the most where each step takes a call


def final_sparsity(schedule: Schedule) -> float:
    """Return the final sparsity of a schedule: that at step 2^31 - 1."""
    # A float32 is converted to its shortest decimal: 0.9, not 0.89999998.
    return float(str(np.float32(schedule(tf.constant(_FAR, tf.int64))[1])))


def is_at_once(schedule: Schedule) -> bool:
    """Return whether a schedule reaches its final sparsity at step 1."""
    due, sparsity = schedule(tf.constant(1, tf.int64))
    return bool(due) and float(np.float32(sparsity)) == np.float32(final_sparsity(schedule))


def renewals(schedule: Schedule, last: int) -> list[tuple[int, float]] | None:
    """Return the steps up to `last` at which masks are renewed, with the sparsity at each.

    None if the schedule would have to be evaluated at too many steps.
    """
    if last > _LOOK_AHEAD:
        return None
    steps = tf.range(1, last + 1, dtype=tf.int64)
    try:  # most schedules are arithmetic, and accept a vector of steps as well
        due, sparsity = schedule(steps)
        due, sparsity = np.asarray(due), np.asarray(sparsity)
        is_vector = due.shape == (last,) and sparsity.shape in ((last,), ())
    except Exception:
        is_vector = False
    if not is_vector:
        if last > _LOOK_AHEAD_ONE_BY_ONE:
            return None
        due, sparsity = _one_by_one(schedule, steps)
    sparsity = np.broadcast_to(sparsity, (last,))
    return [(int(index) + 1, float(sparsity[index])) for index in np.flatnonzero(due)]


def _one_by_one(schedule: Schedule, steps: tf.Tensor) -> tuple[np.ndarray, np.ndarray]:
    def evaluate(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        due, sparsity = schedule(step)
        return tf.convert_to_tensor(due), tf.cast(sparsity, tf.float32)

    @tf.function
    def evaluate_all(steps: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        signature = (tf.TensorSpec((), tf.bool), tf.TensorSpec((), tf.float32))
        return tf.map_fn(evaluate, steps, fn_output_signature=signature)

    due, sparsity = evaluate_all(steps)
    return due.numpy(), sparsity.numpy()
