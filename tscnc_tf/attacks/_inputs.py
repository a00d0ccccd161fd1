"""What is checked of an attack's inputs, and of a training batch: forms, bounds, labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _asserts, _checks


def examples(x: Any, bounds: tuple[float, float]) -> tf.Tensor:
    """Return x as a float tensor that is not empty and lies inside the bounds.

    Raises:
        ValueError: it is not, or does not.
    """
    _checks.one_array("x", x)
    x = tf.convert_to_tensor(x)
    if not x.dtype.is_floating:
        raise ValueError(
            f"x must be of a float dtype, got {x.dtype.name}: for 8-bit images pass "
            "tf.cast(x, tf.float32) / 255, or keep the scale and set bounds=(0, 255)."
        )
    if x.shape.num_elements() == 0:
        raise ValueError(f"x must not be empty, got shape {x.shape}.")
    wide = x if x.dtype == tf.float64 else tf.cast(x, tf.float32)
    if not bool(tf.reduce_all(tf.math.is_finite(wide))):
        raise ValueError("x must be finite, got NaN or infinity in it: clean the data first.")
    require_inside(wide, bounds)
    return x


def require_inside(x: Any, bounds: tuple[float, float]) -> list[tf.Operation]:
    """Raise a ValueError unless x lies inside the bounds; in a graph, return what checks it.

    Args:
        x: a tensor of floats; or its smallest and its largest entry.
        bounds: of the attack.
    """
    smallest, largest = x if isinstance(x, tuple) else (tf.reduce_min(x), tf.reduce_max(x))
    slack = _checks.slack(bounds)
    is_inside = (smallest >= bounds[0] - slack) & (largest <= bounds[1] + slack)
    return _asserts.require(
        is_inside,  # NaN is not
        f"x must lie inside the attack's bounds {bounds}, got values from {{}} to {{}}: scale x, "
        "or give the attack other bounds.",
        smallest,
        largest,
    )


def labels(y: Any, batch: int) -> tf.Tensor:
    """Return labels as int32 of shape `(batch,)`, or as float rows of shape `(batch, classes)`.

    Raises:
        ValueError: y is neither, or of another length than x.
    """
    y = tf.convert_to_tensor(y)
    if y.shape.rank not in (1, 2):
        raise ValueError(
            "y must be integers of shape (batch,) or (batch, 1), or one-hot of shape (batch, "
            f"classes), got shape {y.shape}."
        )
    if y.shape[0] != batch:
        raise ValueError(f"y must have one label per example of x, {batch}, got {y.shape[0]}.")
    if not are_indices(y):
        rows = y if y.dtype == tf.float64 else tf.cast(y, tf.float32)
        require_classes(rows, None)
        return rows
    if not y.dtype.is_integer:
        raise ValueError(
            f"y of shape {y.shape} must be integers, got {y.dtype.name}: cast class indices to "
            "int32, or pass one-hot labels."
        )
    indices = tf.cast(tf.reshape(y, (-1,)), tf.int64)
    smallest, largest = int(tf.reduce_min(indices)), int(tf.reduce_max(indices))
    if smallest < 0 or largest > tf.int32.max:
        raise ValueError(
            f"y must hold class indices >= 0, got labels from {smallest} to {largest}."
        )
    return tf.cast(indices, tf.int32)


def are_indices(y: Any) -> bool:
    """Tell by their shape whether labels are class indices, and not one row per example."""
    return y.ndim < 2 or (y.ndim == 2 and y.shape[1] == 1)


def require_classes(y: Any, classes: int | None) -> list[tf.Operation]:
    """Raise a ValueError unless labels belong to so many classes; in a graph, return what checks.

    Args:
        y: class indices, int32 or int64; or rows, of which it is asked that they sum to 1.
        classes: None where that is not known.
    """
    if are_indices(y):
        if classes is None:
            return []
        smallest, largest = tf.reduce_min(y), tf.reduce_max(y)
        return _asserts.require(
            (smallest >= 0) & (largest < classes),
            f"y must be in 0 ... {classes - 1}, for the model has {classes} outputs, got labels "
            "from {} to {}.",
            smallest,
            largest,
        )
    rows = y if y.dtype == tf.float64 else tf.cast(y, tf.float32)
    smallest, sums = tf.reduce_min(rows), tf.reduce_sum(rows, axis=-1)
    least, most = tf.reduce_min(sums), tf.reduce_max(sums)
    return _asserts.require(
        (smallest >= 0) & (least > 1 - 1e-3) & (most < 1 + 1e-3),
        "y must hold one-hot or soft labels if its shape is (batch, classes), rows that are >= 0 "
        "and sum to 1, got a smallest entry of {} and sums from {} to {}. Class indices have the "
        "shape (batch,).",
        smallest,
        least,
        most,
    )


def seed_pair(seed: Any) -> tf.Tensor:
    """Return a seed, an integer or a pair of them (or a tensor of either), as two int32."""
    wrong = f"seed must be an integer or a pair of integers, got {seed!r}."
    if tf.is_tensor(seed):
        if seed.shape.as_list() not in ([], [2]) or not seed.dtype.is_integer:
            raise ValueError(wrong)
        seed = tf.cast(seed, tf.int32)
        return tf.stack([0, seed]) if seed.shape.rank == 0 else seed
    parts = (seed,) if np.ndim(seed) == 0 else tuple(seed)
    if len(parts) not in (1, 2):
        raise ValueError(wrong)
    words = [_checks.integer("seed", part, minimum=-(2**63)) for part in parts]
    high, low = (words[0] >> 32, words[0]) if len(words) == 1 else words
    return tf.constant([_int32(high), _int32(low)], dtype=tf.int32)


def _int32(value: int) -> int:
    """Return the lower 32 bits of an integer, read with their sign."""
    return (value + 2**31) % 2**32 - 2**31
