"""What comes into training: batches, arrays, and a model that returns logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _keras, losses
from tscnc_tf._keras import wrappers


def check_batch(x: Any, y: Any, bounds: tuple[float, float], classes: int | None) -> None:
    """Check a batch inside a compiled step; what it holds can be checked without XLA only."""
    if not tf.is_tensor(x) or not x.dtype.is_floating:
        raise TypeError(
            "x must be one float tensor per batch (adversarial examples need a gradient), got "
            f"{getattr(x, 'dtype', type(x).__name__)}: cast images to float and scale them to "
            f"the attack's bounds {bounds}."
        )
    if y is None:
        raise ValueError("y must be given: adversarial training is supervised.")
    low, high = bounds
    slack = _checks.slack(bounds)
    message = f"x must lie inside the attack's bounds {bounds}"
    tf.debugging.assert_greater_equal(tf.reduce_min(x), tf.cast(low - slack, x.dtype), message)
    tf.debugging.assert_less_equal(tf.reduce_max(x), tf.cast(high + slack, x.dtype), message)
    if classes and y.dtype.is_integer and (y.shape.rank == 1 or y.shape[-1] == 1):
        number = tf.cast(classes, y.dtype)
        tf.debugging.assert_less(y, number, "y must be below the number of logits")
        tf.debugging.assert_non_negative(y, "y must not be negative")


def correct(y: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Return 1.0 where the largest logit is that of the label, else 0.0."""
    labels = losses.one_hot(y, logits.shape[-1])
    hit = tf.equal(tf.argmax(labels, axis=-1), tf.argmax(logits, axis=-1))
    return tf.cast(hit, tf.float32)


def classes(model: Any) -> int | None:
    """Return the number of logits, None where a subclassed model does not tell."""
    if not _keras.is_graph_model(model):
        return None
    shape = model.output_shape
    if not isinstance(shape, tuple) or len(shape) != 2 or shape[-1] is None or shape[-1] < 2:
        raise ValueError(
            "model must return logits of shape (batch, classes) with 2 classes or more, got shape "
            f"{shape}."
        )
    last = _keras.output_layer(model)
    last = last.layer if wrappers.is_wrapper(last) else last
    activation = getattr(getattr(last, "activation", None), "__name__", "")
    operation = str(getattr(last, "symbol", type(last).__name__)).rpartition(".")[2].lower()
    ending = activation or operation  # of a layer, or of a TensorFlow function in the graph
    if ending in ("softmax", "sigmoid"):
        raise ValueError(
            f"model must return logits, but its last layer {last.name!r} ends in a {ending}: "
            "leave that activation out."
        )
    return shape[-1]


def check_arrays(x: Any, y: Any, bounds: tuple[float, float], classes: int | None) -> None:
    """Check NumPy data as a whole before training; other data is checked batch by batch."""
    if isinstance(x, np.ndarray):
        if not len(x):
            raise ValueError(f"x must hold at least one example, got shape {x.shape}.")
        low, high = float(x.min()), float(x.max())
        slack = _checks.slack(bounds)
        if not (bounds[0] - slack <= low and high <= bounds[1] + slack):  # NaN fails it, too
            raise ValueError(
                f"x must lie inside the attack's bounds {bounds}, got values from {low:g} to "
                f"{high:g}: scale x, or give the attack other bounds."
            )
    if classes and isinstance(y, np.ndarray) and np.issubdtype(y.dtype, np.integer) and y.size:
        is_index = y.ndim == 1 or y.shape[-1] == 1
        if is_index and not (y.min() >= 0 and y.max() < classes):
            raise ValueError(
                f"y must hold labels from 0 to {classes - 1} (the model has {classes} logits), "
                f"got labels from {y.min()} to {y.max()}."
            )
