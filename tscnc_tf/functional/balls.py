"""Balls around inputs, in the norms that attacks use; one norm per example."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

NORMS = ("linf", "l2")


def project(delta: Any, epsilon: float, norm: str) -> tf.Tensor:
    """Return the point of the ball of radius `epsilon` around 0 that is nearest to each `delta`.

    Args:
        delta: `(batch, ...)`.
        epsilon: the radius.
        norm: "linf" or "l2".
    """
    if norm == "linf":
        return tf.clip_by_value(delta, -epsilon, epsilon)
    # Measured in units of epsilon: the square of a tiny delta is zero in float32.
    return delta / tf.maximum(_l2(delta / epsilon), 1.0)


def settle(center: Any, point: Any, epsilon: float, norm: str) -> tf.Tensor:
    """Return points of the ball around `center` in the dtype of `center`, still inside the ball.

    Rounding to that dtype may carry an entry past the ball's surface: by a tenth of the radius for
    float16 and small balls, by a last bit for float32. Such an entry goes one floating-point
    number back toward the center; so the result is never farther from it than `point` is.

    Args:
        center: `(batch, ...)`, any float dtype.
        point: `(batch, ...)`, of the dtype of `center` or a wider one.
        epsilon: the radius.
        norm: "linf" or "l2".
    """
    center, point = tf.convert_to_tensor(center), tf.convert_to_tensor(point)
    wide = tf.cast(center, point.dtype)
    reach = tf.abs(project(point - wide, epsilon, norm))
    rounded = tf.cast(point, center.dtype)
    is_outside = tf.abs(tf.cast(rounded, point.dtype) - wide) > reach
    # Floats are stored as sign and magnitude: as integers, one less is one number toward zero.
    # Zero itself has no number of its sign below it; it stays, too far by 1e-7 at most.
    integer = {2: tf.int16, 4: tf.int32, 8: tf.int64}[center.dtype.size]
    toward_zero = tf.equal(rounded > center, rounded > 0)
    bits = tf.bitcast(rounded, integer)
    back = tf.bitcast(tf.where(toward_zero, bits - 1, bits + 1), center.dtype)
    return tf.where(is_outside & (rounded != 0), back, rounded)


def steepest_ascent(gradient: Any, norm: str) -> tf.Tensor:
    """Return the step of length 1 in `norm` that gains most along each gradient; 0 where it is 0.

    Args:
        gradient: `(batch, ...)`.
        norm: "linf" (the sign) or "l2" (the normalised gradient).
    """
    if norm == "linf":
        return tf.sign(gradient)
    # Scaled first: the square of a tiny gradient is zero in float32.
    axes = _axes(gradient)
    largest = tf.reduce_max(tf.abs(gradient), axis=axes, keepdims=True)
    unit = tf.math.divide_no_nan(gradient, largest)
    return tf.math.divide_no_nan(unit, _l2(unit))


def random_start(shape: Any, epsilon: float, norm: str, seed: Any, dtype: Any) -> tf.Tensor:
    """Return points drawn uniformly from the ball of radius `epsilon` around 0, one per example.

    Args:
        shape: `(batch, ...)`, static or as a tensor.
        epsilon: the radius.
        norm: "linf" or "l2".
        seed: a pair of integers; the same seed gives the same points, with XLA and without.
        dtype: float32 or float64.
    """
    if norm == "linf":
        return epsilon * uniform(shape, seed, dtype)
    first, second = tf.unstack(tf.random.split(seed, 2, alg="philox"))
    direction = normal(shape, first, dtype)
    size = tf.cast(tf.reduce_prod(tf.shape(direction)[1:]), dtype)
    radius_shape = tf.concat([tf.shape(direction)[:1], tf.ones_like(tf.shape(direction)[1:])], 0)
    radius = tf.abs(uniform(radius_shape, second, dtype))
    return steepest_ascent(direction, "l2") * epsilon * tf.pow(radius, 1.0 / size)


def normal(shape: Any, seed: Any, dtype: Any) -> tf.Tensor:
    """Return draws from N(0, 1), at most 5.3 from zero, the same with XLA as without.

    Args:
        shape: static or as a tensor.
        seed: a pair of integers.
        dtype: float32 or float64.
    """
    draws = uniform(shape, seed, dtype)
    return 2**0.5 * tf.math.erfinv(tf.clip_by_value(draws, -1 + 2**-24, 1 - 2**-24))


def lengths(delta: Any, norm: str) -> tf.Tensor:
    """Return the norm of each example's `delta`, shape `(batch,)`; "l1" too."""
    if norm == "linf":
        return tf.reduce_max(tf.abs(delta), axis=_axes(delta))
    if norm == "l1":
        return tf.reduce_sum(tf.abs(delta), axis=_axes(delta))
    return tf.norm(tf.reshape(delta, (tf.shape(delta)[0], -1)), axis=-1)


def uniform(shape: Any, seed: Any, dtype: Any) -> tf.Tensor:
    """Return draws from U(-1, 1), the same with XLA as without.

    TensorFlow's own floats are not: XLA makes them of other bits of the same integers.

    Args:
        shape: static or as a tensor.
        seed: a pair of integers.
        dtype: float32 or float64.
    """
    bits = tf.random.stateless_uniform(
        shape, seed, minval=None, maxval=None, dtype=tf.int32, alg="philox"
    )
    return tf.cast(bits, dtype) * 2.0**-31


def _l2(delta: Any) -> tf.Tensor:
    return tf.sqrt(tf.reduce_sum(tf.square(delta), axis=_axes(delta), keepdims=True))


def _axes(tensor: Any) -> list[int]:
    return list(range(1, tensor.shape.rank))
