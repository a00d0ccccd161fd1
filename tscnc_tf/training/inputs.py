"""What comes into training: an attack, a loss, batches and arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, attacks, losses


def require_attack(attack: Any) -> None:
    """Raise unless training can follow an attack."""
    if not isinstance(attack, attacks.GradientAttack):
        raise TypeError(
            f"attack must be one of tscnc_tf.attacks that follow the gradient, such as PGD, "
            f"got {attack!r}."
        )
    if attack.targeted:
        raise ValueError(
            "attack must be untargeted, got targeted=True: it would move each example towards "
            "its own label, and training would see examples easier than the clean ones."
        )


def require_loss(loss: Any) -> None:
    """Raise a TypeError unless `loss` is a robust loss."""
    if not isinstance(loss, losses.RobustLoss):
        raise TypeError(
            f"loss must be one of tscnc_tf.losses, such as TRADES(beta=6.0), got {loss!r}."
        )


def check_batch(x: Any, y: Any, bounds: tuple[float, float], classes: int | None) -> None:
    """Check a batch inside a compiled step; what it holds can be checked without XLA only."""
    if not tf.is_tensor(x):
        raise TypeError(
            f"x must be one tensor per batch, got a {type(x).__name__}: what is attacked is one "
            "input. Wrap the model into one that takes one tensor."
        )
    if not x.dtype.is_floating:
        raise TypeError(
            f"x must hold floats (adversarial examples need a gradient), got {x.dtype.name}: cast "
            f"images to float and scale them to the attack's bounds {bounds}."
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
