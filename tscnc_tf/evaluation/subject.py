"""The model under evaluation: its logits, compiled, and what there is to doubt about it."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _keras, losses
from tscnc_tf._keras import outputs
from tscnc_tf.attacks import pgd
from tscnc_tf.inspection.inputs import one_tensor


class Subject:
    """A model as an evaluation sees it: float32 logits in inference mode, for batches of any size.

    Args:
        model: any callable `x -> logits`.
        x: a batch, to look at what the model returns.
        role: what it is called in errors.

    Raises:
        TypeError: the model is not callable, or does not return one tensor.
        ValueError: it does not return `(batch, classes)`.
    """

    def __init__(self, model: Any, x: np.ndarray, role: str = "model") -> None:
        self._eager = _keras.inference(model)
        self._role = role
        self.name = str(getattr(model, "name", None) or _type_name(model))
        shape = tuple(one_tensor(self._eager(tf.constant(x))).shape)
        if len(shape) != 2 or shape[0] != len(x) or shape[1] < 2:
            raise ValueError(
                f"{role} must return logits of shape (batch, classes) with 2 classes or more; for "
                f"{len(x)} examples it returned shape {shape}. A binary model with one output z "
                "has the logits (0, z)."
            )
        self.classes = shape[1]
        batch = tf.TensorSpec((None, *x.shape[1:]), tf.float32)
        labels = tf.TensorSpec((None,), tf.int64)
        self._logits = tf.function(self._call, input_signature=[batch])
        self._examine = tf.function(self._call_and_gradient, input_signature=[batch, labels])

    def compile(self) -> None:
        """Trace the model; an error of that gets a note that says what is asked of the model."""
        try:
            self._logits.get_concrete_function()
            self._examine.get_concrete_function()
        except Exception as error:
            error.add_note(
                f"The {self._role} is compiled by tf.function: only TensorFlow may run in it."
            )
            raise

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Return the logits of a batch, `(batch, classes)`."""
        return self._logits(tf.constant(x)).numpy()

    def examine(
        self, x: np.ndarray, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the logits, and per example whether the input gradient is zero, and whether NaN.

        The gradient is that of the log-odds, which attacks ascend: zero throughout, or not a number
        somewhere.
        """
        found = self._examine(tf.constant(x), tf.constant(labels))
        logits, is_zero, is_nan = (tensor.numpy() for tensor in found)
        return logits, is_zero, is_nan

    def is_repeatable(self, x: np.ndarray) -> bool:
        """Tell whether two calls of the model on one batch return the same, up to rounding."""
        # Not compiled: tracing would freeze what a model draws in Python.
        first, second = (one_tensor(self._eager(tf.constant(x))).numpy() for _ in range(2))
        size = np.max(np.abs(first), where=np.isfinite(first), initial=0.0)
        return bool(np.allclose(first, second, rtol=0.0, atol=1e-4 * size, equal_nan=True))

    def _call(self, x: tf.Tensor) -> tf.Tensor:
        # What runs outside of TensorFlow's sight has no known shape.
        return tf.ensure_shape(one_tensor(self._eager(x)), (None, self.classes))

    def _call_and_gradient(self, x: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, ...]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            logits = self._call(x)
        slope = pgd.slope(functools.partial(losses.log_odds, labels), logits)
        try:
            gradient = tape.gradient(logits, x, slope, unconnected_gradients="zero")
        except LookupError:  # an operation without a gradient
            gradient = tf.zeros_like(x)
        axes = list(range(1, x.shape.rank))
        is_zero = tf.reduce_all(tf.equal(gradient, 0.0), axis=axes)
        return logits, is_zero, tf.reduce_any(tf.math.is_nan(gradient), axis=axes)


def require_logits(logits: np.ndarray, role: str = "model") -> None:
    """Raise a ValueError if outputs are not finite, or are probabilities."""
    finite = np.all(np.isfinite(logits), axis=1)
    if not np.all(finite):
        raise ValueError(
            f"{role} returns NaN or infinity for {np.sum(~finite)} of {len(finite)} examples."
        )
    if bool(outputs.are_probabilities(logits)):
        raise ValueError(outputs.about_probabilities(role))


def within_unit_interval(logits: np.ndarray) -> bool:
    """Tell whether all outputs lie in [0, 1], up to rounding, as probabilities do."""
    return bool(np.min(logits) >= 0.0 and np.max(logits) <= 1.0 + 1e-6)


def _type_name(model: Any) -> str:
    return getattr(model, "__name__", type(model).__name__)
