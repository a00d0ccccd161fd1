"""What a gradient attack climbs: a score per example, and its gradient at the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tscnc_tf import losses

OBJECTIVES = ("cross_entropy", "kl", "margin", "dlr")


class Ascent:
    """The score that an attack climbs on one batch, as a function of logits.

    Args:
        logits_fn: from x to logits, in inference mode.
        x: the clean inputs, in the dtype that `logits_fn` takes.
        labels: labels of any form; None where the objective needs none.
        objective: one of `OBJECTIVES`.
        targeted: whether the labels are classes to reach; the objective is then descended.
        clean_logits: what "kl" leads away from; if it is None, the logits at x, computed here.
    """

    def __init__(
        self,
        logits_fn: Callable[[tf.Tensor], Any],
        x: tf.Tensor,
        *,
        labels: Any,
        objective: str,
        targeted: bool,
        clean_logits: Any = None,
    ) -> None:
        self._logits_fn = logits_fn
        self._dtype = x.dtype
        self._objective = objective
        self._targeted = targeted
        self._labels = None if labels is None else tf.convert_to_tensor(labels)
        if objective == "kl":
            clean_logits = self.logits(x) if clean_logits is None else _wide(clean_logits)
            self._reference = tf.stop_gradient(clean_logits)

    def logits(self, x: tf.Tensor) -> tf.Tensor:
        """Return the network's logits in float32 at least."""
        logits = self._logits_fn(tf.cast(x, self._dtype))
        if not tf.is_tensor(logits) or logits.shape.rank not in (None, 2):
            shape = logits.shape if tf.is_tensor(logits) else type(logits).__name__
            raise ValueError(
                f"model must return one tensor of logits of shape (batch, classes), got {shape}: "
                "wrap it in a function that does."
            )
        return tf.ensure_shape(_wide(logits), (None, None))  # the rank may have been unknown

    def score(self, logits: tf.Tensor) -> tf.Tensor:
        """Return what is climbed, per example: the objective, negated for a targeted attack."""
        value = self._value(logits)
        return -value if self._targeted else value

    def is_fooled(self, logits: tf.Tensor) -> tf.Tensor:
        """Tell for each example whether the attack has reached its end."""
        prediction = tf.argmax(logits, axis=-1)
        if self._labels is None:
            return prediction != tf.argmax(self._reference, axis=-1)
        classes = tf.argmax(losses.one_hot(self._labels, _classes(logits)), axis=-1)
        return prediction == classes if self._targeted else prediction != classes

    def gradient(self, x: tf.Tensor) -> tf.Tensor:
        """Return the gradient of the score at x, up to a positive factor per example.

        Raises:
            ValueError: the model's output does not depend on x in a differentiable way.
        """
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            logits = self.logits(x)
        try:
            gradient = tape.gradient(logits, x, output_gradients=slope(self.score, logits))
        except LookupError as error:  # an operation without a gradient, such as py_function's kin
            raise ValueError(f"{_NOT_DIFFERENTIABLE} ({error})") from error
        if gradient is None:
            raise ValueError(_NOT_DIFFERENTIABLE)
        gradient = tf.ensure_shape(gradient, x.shape)
        # float16 may overflow on its way back: such an entry stays where it is, or counts as the
        # largest number, instead of turning the whole example, and then the weights trained on it,
        # to NaN.
        gradient = tf.where(tf.math.is_nan(gradient), tf.zeros_like(gradient), gradient)
        return tf.clip_by_value(gradient, gradient.dtype.min, gradient.dtype.max)

    def _value(self, logits: tf.Tensor) -> tf.Tensor:
        if self._objective == "kl":
            # Softmax doesn't mind the shift, but its rounding does: the top class's gradient is
            # now minus the sum of the others', where 1 - 1 would be noise larger than they are.
            top = tf.argmax(self._reference, axis=-1)
            shifted = logits - tf.gather(logits, top, batch_dims=1)[:, tf.newaxis]
            return losses.kl_divergence(self._reference, shifted)
        if self._labels is None:
            raise ValueError(f"labels must not be None for objective={self._objective!r}.")
        if self._objective == "margin":
            return losses.margin(self._labels, logits)
        if self._objective == "dlr":
            return losses.dlr(self._labels, logits)
        # Cross-entropy. Its log-odds climb the same way, and do not saturate.
        return losses.log_odds(self._labels, logits)


def slope(score: Callable[[tf.Tensor], tf.Tensor], logits: tf.Tensor) -> tf.Tensor:
    """Return a score's gradient at the logits, its largest entry scaled to 1 per example.

    A positive factor per example changes neither the sign step nor the normalised one. But at its
    own scale the gradient of a well-fitted example would be lost in a float16 network.
    """
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(logits)
        value = score(logits)
    gradient = tape.gradient(value, logits)
    return tf.math.divide_no_nan(gradient, tf.reduce_max(tf.abs(gradient), axis=-1, keepdims=True))


_NOT_DIFFERENTIABLE = (
    "model is not differentiable in x, so there is no gradient to follow: pass a model that is "
    "TensorFlow operations from end to end, or an attack that needs no gradient."
)


def _wide(logits: Any) -> tf.Tensor:
    return logits if logits.dtype == tf.float64 else tf.cast(logits, tf.float32)


def _classes(logits: tf.Tensor) -> Any:
    return tf.shape(logits)[1] if logits.shape[1] is None else logits.shape[1]
