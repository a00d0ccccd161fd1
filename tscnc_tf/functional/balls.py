"""Balls around inputs in the l1, l2 and linf norms, taken per example."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tscnc_tf import _checks

NORMS = ("linf", "l2")
_WITH_L1 = (*NORMS, "l1")


def project(delta: Any, epsilon: float, norm: str) -> tf.Tensor:
    """Return the point of the ball of radius `epsilon` around 0 that is nearest to each `delta`.

    Args:
        delta: `(batch, ...)`.
        epsilon: the radius.
        norm: "linf", "l2" or "l1".

    Raises:
        ValueError: there is no such norm.
    """
    _checks.one_of("norm", norm, _WITH_L1)
    delta = tf.convert_to_tensor(delta)
    if norm == "linf":
        return tf.clip_by_value(delta, -epsilon, epsilon)
    if norm == "l1":
        return _shrunk(delta, tf.fill(tf.shape(delta), delta.dtype.max), epsilon)
    # Measured in units of epsilon: the square of a tiny delta is zero in float32.
    return delta / tf.maximum(_l2(delta / epsilon), 1.0)


def project_within_box(point: Any, center: Any, epsilon: Any, bounds: Any) -> tf.Tensor:
    r"""Return the nearest point that is both in the l1 ball around `center` and within bounds.

    With :math:`\delta` the step from the center and :math:`r_i` the distance from there to the
    bound on its side, the nearest point is :math:`\min(\max(|\delta_i| - \lambda, 0), r_i)` away
    in each entry, and :math:`\lambda \ge 0` the smallest number for which their sum is at most
    epsilon.

    Args:
        point: `(batch, ...)`.
        center: within the bounds, of the shape of `point`.
        epsilon: the radius, a number or a tensor of one in the dtype of `point`.
        bounds: the smallest and the largest value of an entry.

    Example:
        >>> project_within_box([[0.75, 0.875]], [[0.5, 0.75]], 0.5, (0.0, 1.0)).numpy().tolist()
        [[0.75, 0.875]]
        >>> project_within_box([[1.5, 0.875]], [[0.5, 0.5]], 0.75, (0.0, 1.0)).numpy().tolist()
        [[1.0, 0.75]]

    Reference:
        Croce & Hein 2021, arXiv 2103.01208, section 2.
    """
    low, high = bounds
    point, center = tf.convert_to_tensor(point), tf.convert_to_tensor(center)
    delta = point - center
    limit = tf.where(delta > 0, high - center, center - low)
    return tf.clip_by_value(center + _shrunk(delta, limit, epsilon), low, high)


def _shrunk(delta: tf.Tensor, limit: tf.Tensor, epsilon: Any) -> tf.Tensor:
    """Return sign(delta) min(max(|delta| - λ, 0), limit), with λ >= 0 such that the l1 norm fits.

    λ is per example the smallest number for which the l1 norm is at most epsilon. The norm is
    piecewise linear and decreasing in λ, so Newton's method, safeguarded by a bracket, finds λ in
    finitely many steps.
    """
    sizes, axes = tf.abs(delta), _axes(delta)
    epsilon = tf.convert_to_tensor(epsilon, sizes.dtype)

    def left(number: tf.Tensor) -> tf.Tensor:
        return tf.clip_by_value(sizes - number, 0.0, limit)

    def excess_at(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        parts = left(number)
        moving = tf.cast((parts > 0) & (parts < limit), parts.dtype)
        excess = tf.reduce_sum(parts, axis=axes, keepdims=True) - epsilon
        return excess, tf.reduce_sum(moving, axis=axes, keepdims=True)

    def is_open(number: tf.Tensor, excess: tf.Tensor) -> tf.Tensor:
        # At λ = 0 the norm may be below epsilon.
        return tf.where(number > 0, tf.abs(excess), excess) > 1e-6 * epsilon

    def step(number: tf.Tensor, excess: tf.Tensor, moving: tf.Tensor, low: Any, high: Any) -> Any:
        low, high = tf.where(excess > 0, number, low), tf.where(excess > 0, high, number)
        newton = number + tf.math.divide_no_nan(excess, moving)
        is_inside = (newton > low) & (newton < high)
        new = tf.where(is_inside, newton, (low + high) / 2)
        number = tf.where(is_open(number, excess), new, number)
        return number, *excess_at(number), low, high

    zero = tf.zeros_like(tf.reduce_max(sizes, axis=axes, keepdims=True))
    number = tf.while_loop(
        lambda number, excess, *_: tf.reduce_any(is_open(number, excess)),
        step,
        (zero, *excess_at(zero), zero, tf.reduce_max(sizes, axis=axes, keepdims=True)),
        maximum_iterations=64,
        parallel_iterations=1,
    )[0]
    parts = left(number)
    sums = tf.reduce_sum(parts, axis=axes, keepdims=True)
    return tf.sign(delta) * parts * tf.minimum(tf.math.divide_no_nan(epsilon, sums), 1.0)


def round_inside(center: Any, point: Any, epsilon: float, norm: str) -> tf.Tensor:
    """Return points of the ball around `center` in the dtype of `center`, still inside the ball.

    Rounding to that dtype may move an entry out of the ball: by a tenth of the radius for float16
    and small balls, by the last bit for float32. Such an entry is replaced by the next
    floating-point number toward the center, so the result is never farther from it than `point`.

    Args:
        center: `(batch, ...)`, any float dtype.
        point: `(batch, ...)`, of the dtype of `center` or a wider one.
        epsilon: the radius.
        norm: "linf", "l2" or "l1".
    """
    center, point = tf.convert_to_tensor(center), tf.convert_to_tensor(point)
    wide = tf.cast(center, point.dtype)
    reach = tf.abs(project(point - wide, epsilon, norm))
    rounded = tf.cast(point, center.dtype)
    is_outside = tf.abs(tf.cast(rounded, point.dtype) - wide) > reach
    # Floats are stored as sign and magnitude, so subtracting 1 from the bits gives the next number
    # toward zero. Zero has no such number; it is kept, outside by at most 1e-7.
    integer = {2: tf.int16, 4: tf.int32, 8: tf.int64}[center.dtype.size]
    toward_zero = tf.equal(rounded > center, rounded > 0)
    bits = tf.bitcast(rounded, integer)
    back = tf.bitcast(tf.where(toward_zero, bits - 1, bits + 1), center.dtype)
    return tf.where(is_outside & (rounded != 0), back, rounded)


def steepest_ascent(gradient: Any, norm: str) -> tf.Tensor:
    """Return the step of length 1 in `norm` of steepest ascent; 0 for a zero gradient.

    Args:
        gradient: `(batch, ...)`.
        norm: "linf" (the sign) or "l2" (the normalised gradient).

    Raises:
        ValueError: there is no such norm.
    """
    _checks.one_of("norm", norm, NORMS)
    gradient = tf.convert_to_tensor(gradient)
    if norm == "linf":
        return tf.sign(gradient)
    # Scaled first: the square of a tiny gradient is zero in float32.
    axes = _axes(gradient)
    largest = tf.reduce_max(tf.abs(gradient), axis=axes, keepdims=True)
    unit = tf.math.divide_no_nan(gradient, largest)
    return tf.math.divide_no_nan(unit, _l2(unit))


def sparse_ascent(gradient: Any, share: Any) -> tf.Tensor:
    """Return steps of l1 norm 1: scaled signs of each gradient's largest entries; 0 for gradient 0.

    Args:
        gradient: `(batch, ...)`.
        share: `(batch,)`, the share of the entries that are non-zero in the step, at least one.
    """
    gradient = tf.convert_to_tensor(gradient)
    sizes = tf.reshape(tf.abs(gradient), (tf.shape(gradient)[0], -1))
    count = tf.shape(sizes)[1]
    first = tf.cast((1 - share) * tf.cast(count, share.dtype), tf.int32)
    least = tf.gather(tf.sort(sizes), tf.clip_by_value(first, 0, count - 1), batch_dims=1)
    signs = tf.sign(tf.reshape(gradient, tf.shape(sizes)))
    signs = tf.where(sizes >= least[:, tf.newaxis], signs, tf.zeros_like(signs))
    signs = tf.math.divide_no_nan(signs, tf.reduce_sum(tf.abs(signs), axis=1, keepdims=True))
    return tf.reshape(signs, tf.shape(gradient))


def random_start(shape: Any, epsilon: float, norm: str, seed: Any, dtype: Any) -> tf.Tensor:
    """Return points drawn uniformly from the ball of radius `epsilon` around 0, one per example.

    Args:
        shape: `(batch, ...)`, static or as a tensor.
        epsilon: the radius.
        norm: "linf" or "l2".
        seed: a pair of integers; the same seed gives the same points, with XLA and without.
        dtype: float32 or float64.

    Raises:
        ValueError: there is no such norm.
    """
    _checks.one_of("norm", norm, NORMS)
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
    """Return the norm of each example's `delta`, shape `(batch,)`: "linf", "l2" or "l1".

    Raises:
        ValueError: there is no such norm.
    """
    _checks.one_of("norm", norm, _WITH_L1)
    delta = tf.convert_to_tensor(delta)
    if norm == "linf":
        return tf.reduce_max(tf.abs(delta), axis=_axes(delta))
    if norm == "l1":
        return tf.reduce_sum(tf.abs(delta), axis=_axes(delta))
    return tf.norm(tf.reshape(delta, (tf.shape(delta)[0], -1)), axis=-1)


def uniform(shape: Any, seed: Any, dtype: Any) -> tf.Tensor:
    """Return draws from U(-1, 1), the same with XLA as without.

    TensorFlow's own random floats are not: XLA takes them from other bits of the same integers.

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
