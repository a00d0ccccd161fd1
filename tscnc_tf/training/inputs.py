"""Checks of the inputs of training: attack, loss, batches and arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, attacks, losses
from tscnc_tf.training.perturbation import AWP


def require_attack(attack: Any) -> None:
    """Raise unless an attack can be used in training.

    Raises:
        TypeError: it is not a gradient attack.
        ValueError: it is targeted.
    """
    if not isinstance(attack, attacks.GradientAttack):
        raise TypeError(
            f"attack must be one of tscnc_tf.attacks that follow the gradient, such as PGD, "
            f"got {attack!r}."
        )
    if attack.targeted:
        raise ValueError(
            "attack must be untargeted, got targeted=True: it would move each example towards "
            "its own label, and the examples would be easier than the clean ones."
        )


def require_loss(loss: Any) -> None:
    """Raise a TypeError unless `loss` is a robust loss."""
    if not isinstance(loss, losses.RobustLoss):
        raise TypeError(
            f"loss must be one of tscnc_tf.losses, such as TRADES(beta=6.0), got {loss!r}."
        )


def require_awp(awp: Any) -> None:
    """Raise a TypeError unless `awp` is an `AWP` or None."""
    if not isinstance(awp, AWP | None):
        raise TypeError(f"awp must be None or an AWP, such as AWP(gamma=0.005), got {awp!r}.")


def as_batch(x: Any, y: Any) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the inputs and labels of a batch as tensors, after checking shapes and dtypes.

    Labels of smaller integer dtypes, which not all TensorFlow operations support, become int64.

    Raises:
        TypeError: x is not one float tensor.
        ValueError: y is missing, or not one tensor of labels.
    """
    x = tf.convert_to_tensor(x) if isinstance(x, np.ndarray) else x
    if not tf.is_tensor(x):
        raise TypeError(
            f"x must be one tensor per batch, got a {type(x).__name__}: an attack changes one "
            "input. Wrap the model into one that takes one tensor."
        )
    _checks.require_floats(x.dtype)
    if y is None:
        raise ValueError("y must be given: adversarial training is supervised.")
    y = tf.convert_to_tensor(y) if isinstance(y, np.ndarray) else y
    if not tf.is_tensor(y) or y.shape.rank is None:
        form = "a tensor of unknown rank" if tf.is_tensor(y) else f"a {type(y).__name__}"
        raise ValueError(
            f"y must be one tensor of labels per batch, of shape (batch,) or (batch, classes), got "
            f"{form}."
        )
    if _checks.holds_indices("y", y) and y.dtype not in (tf.int32, tf.int64):
        y = tf.cast(y, tf.int64)
    return x, y


def correct(y: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Return 1.0 for each example whose largest logit is that of its label, else 0.0."""
    labels = losses.one_hot(y, logits.shape[-1])
    hit = tf.equal(tf.argmax(labels, axis=-1), tf.argmax(logits, axis=-1))
    return tf.cast(hit, tf.float32)


def check_arrays(x: Any, y: Any, bounds: tuple[float, float], classes: int | None) -> None:
    """Check NumPy arrays completely before training; other data is checked batch by batch."""
    for name, array in (("x", x), ("y", y)):
        if isinstance(array, np.ndarray) and not (array.ndim and len(array)):
            raise ValueError(f"{name} must hold at least one example, got shape {array.shape}.")
    if isinstance(x, np.ndarray):
        # Keras names x for labels that it can't use.
        if y is not None and not getattr(y, "shape", ()):
            raise TypeError(f"y must be an array or tensor of labels, got {y!r}.")
        _checks.require_floats(x.dtype)
        _checks.require_within(np.array([x.min(), x.max()]), bounds)
    if isinstance(y, np.ndarray) and np.issubdtype(y.dtype, np.integer) and y.size:
        _checks.require_classes(y, classes)


class FirstBatch:
    """A flag for checks in the first batch of a compiled step, as a condition of its graph.

    Attributes:
        is_over: whether a first batch has passed the checks.
        flag: a boolean variable, True until then.
    """

    def __init__(self) -> None:
        self.is_over = False
        # TensorFlow traces a step twice if variables are created in it.
        with tf.init_scope():
            self.flag = tf.Variable(True, trainable=False, name="is_first_batch")

    def end(self) -> None:
        """Record that the first batch has passed the checks."""
        self.is_over = True
        self.flag.assign(False)
