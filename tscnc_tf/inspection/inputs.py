"""What goes into a network and what comes out, checked: errors say what is wrong with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks


def as_inputs(x: Any, bounds: tuple[float, float]) -> np.ndarray:
    """Return a batch of inputs `(examples, ...)` as float32.

    Raises:
        TypeError: `x` is not one array of floats.
        ValueError: it is empty, not finite, or leaves the bounds.
    """
    if x is None:
        raise TypeError("x must be one array or tensor of inputs, got None.")
    _checks.one_array("x", x)
    array = np.asarray(x)
    if array.dtype == object or not tf.as_dtype(array.dtype).is_floating:
        raise TypeError(
            f"x must hold floats, got {array.dtype}. Integers can't be perturbed by less than 1: "
            "images of bytes become floats in [0, 1] by x / 255."
        )
    if array.ndim < 2:
        raise ValueError(
            f"x must be a batch, (examples, ...), got shape {array.shape}. One example is a batch "
            "as x[None]."
        )
    if array.size == 0:
        raise ValueError(f"x is empty: shape {array.shape}.")
    array = array.astype(np.float32)
    if not np.all(np.isfinite(array)):
        bad = int(np.sum(~np.all(np.isfinite(array.reshape(len(array), -1)), axis=1)))
        raise ValueError(f"x holds NaN or infinity, in {bad} of {len(array)} examples.")
    low, high = bounds
    smallest, largest = float(array.min()), float(array.max())
    slack = _checks.slack(bounds)
    if smallest < low - slack or largest > high + slack:
        raise ValueError(
            f"x must be within bounds={bounds}, its values go from {smallest:g} to {largest:g}. "
            "Rescale x, or pass the bounds of the data as they are (and put normalisation by mean "
            "and deviation into the model, so that epsilon keeps its meaning)."
        )
    return array


def one_tensor(outputs: Any) -> tf.Tensor:
    """Return what a model returned as a float32 tensor, or raise a TypeError if it is not one."""
    if isinstance(outputs, (dict, list, tuple)):
        raise TypeError(
            f"model must return one tensor, got a {type(outputs).__name__} of {len(outputs)}. Pass "
            "a function that picks one, such as `lambda x: model(x)['logits']`."
        )
    return tf.cast(outputs, tf.float32)
