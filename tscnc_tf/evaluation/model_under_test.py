"""The model under test: its logits, compiled, and diagnostics of its outputs and gradients."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _keras, losses
from tscnc_tf._keras import models
from tscnc_tf.attacks import pgd
from tscnc_tf.evaluation import diagnostics
from tscnc_tf.inspection.inputs import one_tensor


class ModelUnderTest:
    """A model as an evaluation runs it: float32 logits in inference mode, for batches of any size.

    Args:
        model: any callable `x -> logits`.
        x: a batch, to check what the model returns.
        role: the name of the model in errors.

    Raises:
        TypeError: the model is not callable, or does not return one tensor.
        ValueError: it does not return `(batch, classes)`.
    """

    def __init__(self, model: Any, x: np.ndarray, role: str = "model") -> None:
        self._eager = _keras.inference(model)
        self._role = role
        self.name = str(
            getattr(model, "name", None) or getattr(model, "__name__", type(model).__name__)
        )
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
        self._examined = tf.function(self._call_and_gradient, input_signature=[batch, labels])

    def examine(
        self, batches: Sequence[tuple[np.ndarray, np.ndarray]], by_gradient: bool
    ) -> tuple[np.ndarray, list[str]]:
        """Return the logits of all examples, and diagnostics of attacks on the model.

        Args:
            batches: of inputs and class indices.
            by_gradient: whether an attack may follow the gradient of the model.

        Raises:
            ValueError: some logits are not finite, or all of them are probabilities.
        """
        repeatable = self._is_repeatable(batches[0][0])
        try:
            self._logits.get_concrete_function()
            self._examined.get_concrete_function()
        except Exception as error:
            error.add_note(
                f"The {self._role} is compiled by tf.function: only TensorFlow may run in it."
            )
            raise
        parts = (self._examined(*map(tf.constant, batch)) for batch in batches)
        logits, is_zero, is_nan = (
            np.concatenate([tensor.numpy() for tensor in tensors])
            for tensors in zip(*parts, strict=True)
        )
        finite = np.all(np.isfinite(logits), axis=1)
        if not np.all(finite):
            raise ValueError(
                f"{self._role} returns NaN or infinity for {np.sum(~finite)} of {len(finite)} "
                "examples."
            )
        if bool(models.are_probabilities(logits)):
            raise ValueError(models.about_probabilities(self._role))
        unit_interval = np.min(logits) >= 0.0 and np.max(logits) <= 1.0 + 1e-6
        return logits, diagnostics.of_model(
            repeatable, bool(unit_interval), is_zero & by_gradient, is_nan & by_gradient
        )

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Return the logits of a batch, `(batch, classes)`."""
        return self._logits(tf.constant(x)).numpy()

    def _is_repeatable(self, x: np.ndarray) -> bool:
        """Tell whether two calls of the model on one batch return the same, up to rounding."""
        # Not compiled: what a model draws in Python is drawn once, when it is traced.
        first, second = (one_tensor(self._eager(tf.constant(x))).numpy() for _ in range(2))
        size = np.max(np.abs(first), where=np.isfinite(first), initial=0.0)
        return bool(np.allclose(first, second, rtol=0.0, atol=1e-4 * size, equal_nan=True))

    def _call(self, x: tf.Tensor) -> tf.Tensor:
        # The shape of what runs outside of TensorFlow (py_function) is not known.
        return tf.ensure_shape(one_tensor(self._eager(x)), (None, self.classes))

    def _call_and_gradient(self, x: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Return the logits, and per example whether its gradient is zero, and whether it has NaN.

        The gradient is that of the log-odds at the input, which attacks ascend.
        """
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
