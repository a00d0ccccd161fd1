"""The two constraints of TSCNC as functions of tensors, and baselines to compare with."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from tscnc_tf import _checks

# A matrix whose largest entry is smaller counts as zero: the gradient of a scale-free penalty
# grows as 1 / size, and would overflow.
_ZERO = 1e-20
# The relative ridge that keeps a factorisation defined in forms without an argument `ridge`.
_SINGULAR = 1e-10


def transformed_l1(x: Any, a: float = 1.0) -> tf.Tensor:
    r"""Return the transformed l1 penalty of each entry, :math:`T_a(x) = (a+1)|x| / (a+|x|)`.

    Concave in `|x|` and bounded by `a + 1`; `a -> inf` gives `|x|`, `a -> 0` the number of
    non-zeros. The derivative in `|x|` is :math:`(a+1)a/(a+|x|)^2`; at `x = 0` it is taken as 0.

    Args:
        x: a tensor of any shape.
        a: a number > 0.

    Returns:
        A tensor of the shape of `x`, of its dtype, float32 at least.

    Reference:
        Ma et al. 2019, arXiv 1901.01021, after Zhang & Xin 2018. The published code of TSCNC has
        `a - x` in the denominator, which has the opposite curvature and a pole at `x = a`.
    """
    return _transformed_l1(_lifted(tf.convert_to_tensor(x), tf.float32), a)


def _transformed_l1(x: tf.Tensor, a: float) -> tf.Tensor:
    @tf.custom_gradient
    def penalty(x: tf.Tensor) -> tuple[tf.Tensor, Any]:
        # Both terms of a + |x| are divided by the larger one, to avoid overflow for any `a` that is
        # a normal number of the dtype.
        magnitude = tf.abs(x)
        size = tf.maximum(magnitude, a)
        scale, rest = (a + 1.0) / size, a / size
        whole = magnitude / size + rest

        def gradient(upstream: tf.Tensor) -> tf.Tensor:
            return upstream * scale * rest / tf.square(whole) * tf.sign(x)

        return scale * magnitude / whole, gradient

    return penalty(x)


def log_ratio(matrix: Any, ridge: float = 1e-6) -> tf.Tensor:
    r"""Return the log-ratio condition penalty of each matrix in a stack.

    .. math:: C(M) = \log(\mathrm{tr}(G)/n) - \tfrac1n \log\det G, \qquad G = M^\top M

    the logarithm of the arithmetic over the geometric mean of the eigenvalues of the Gram matrix.
    It is >= 0, 0 exactly if all singular values are equal, invariant to scaling and rotation of the
    matrix, and it bounds the condition number: `kappa < 2 exp(n C / 2)`.

    With a ridge, G is replaced by `G n / tr(G) + ridge I`, so the value is at most
    `log((1 + ridge) / ridge)`, and the bound holds for
    `sqrt((lambda_max + ridge) / (lambda_min + ridge))` of the trace-normalised G.

    Dead filters: the gradient of a column that is exactly zero is zero (a stationary point), and
    that of a nearly zero column is at most `sqrt(n / tr(G) / ridge) / n`, away from zero. So the
    ridge bounds the effect of a dead filter on a training step, and this term alone does not revive
    a dead filter. The zero matrix has the value `log((1 + ridge) / ridge)` and the gradient 0.

    The factorisation runs in float64 whatever the dtype: a Gram matrix squares the condition
    number, and TensorFloat-32 products would make it indefinite. No SVD is used: its gradient is
    NaN where singular values coincide.

    Args:
        matrix: `(..., p, n)` with `p >= n`.
        ridge: relative to the mean eigenvalue of G; >= 0. Without a ridge the matrices must have
            full rank.

    Returns:
        A tensor of shape `(...)`, of the dtype of `matrix`, float32 at least.

    Raises:
        TypeError, ValueError: `ridge` is not a number >= 0, or `matrix` has less than two axes.

    Reference:
        Guggenheimer, Edelman & Johnson 1995, "A simple estimate of the condition number of a
        linear system", for the bound.
    """
    ridge = _checks.number("ridge", ridge, minimum=0.0)
    matrix, dtype = _as_float64(matrix)
    size = matrix.shape[-1]
    normalised = _trace_normalised(_gram(_scaled(matrix)))
    mean_log = _log_det(normalised + ridge * tf.eye(size, dtype=tf.float64)) / size
    value = math.log1p(ridge) - mean_log
    return tf.cast(tf.where(value < 0.0, tf.zeros_like(value), value), dtype)  # -1e-16 is 0


def authors_penalty(matrix: Any, nu: float = 1e-5) -> tf.Tensor:
    r"""Return the condition penalty of the authors' published code, for n columns.

    .. math:: \left(\log(\nu + \det(G/n))\right)^2, \qquad G = M^\top M

    It serves for comparison, and has two limits: it depends on the scale of the matrix but not on
    the spread of its singular values ((100, 0.01) cost as much as (1, 1)), and for 100 columns or
    more the determinant of a usual initialisation is far below `nu`, so that the gradient vanishes
    and the value stays at `log(nu)**2` = 132.55. It is computed by `log det` with a relative ridge
    of 1e-10, so a singular matrix does not raise, as it does in the gradient of `tf.linalg.det`.

    Args:
        matrix: `(..., p, n)` with `p >= n`.
        nu: the offset that keeps the logarithm finite; > 0.

    Returns:
        A tensor of shape `(...)`, of the dtype of `matrix`, float32 at least.

    Raises:
        TypeError, ValueError: `nu` is not a number > 0, or `matrix` has less than two axes.
    """
    nu = _checks.number("nu", nu, above=0.0)
    matrix, dtype = _as_float64(matrix)
    size = matrix.shape[-1]
    gram = _gram(matrix)
    mean = tf.linalg.trace(gram)[..., tf.newaxis, tf.newaxis] / size
    # The lower bound keeps the factorisation of a zero matrix defined; its determinant stays 0.
    lifted = gram + (_SINGULAR * mean + _ZERO**2) * tf.eye(size, dtype=tf.float64)
    log_det = _log_det(lifted) - size * math.log(size)
    value = tf.square(math.log(nu) + tf.math.softplus(log_det - math.log(nu)))
    return tf.cast(value, dtype)


def orthogonality(matrix: Any) -> tf.Tensor:
    r"""Return soft orthogonality up to scale, :math:`\|G n/\mathrm{tr}(G) - I\|_F^2`, per matrix.

    It is 0 exactly if all singular values are equal. It is dominated by the largest eigenvalues,
    `log_ratio` by the smallest. The zero matrix has the value `n` and the gradient 0.

    Args:
        matrix: `(..., p, n)` with `p >= n`.

    Returns:
        A tensor of shape `(...)`, of the dtype of `matrix`, float32 at least.

    Raises:
        ValueError: `matrix` has less than two axes.

    Reference:
        Bansal et al. 2018, arXiv 1810.09102 (there without the normalisation by the trace).
    """
    matrix, dtype = _as_float64(matrix)
    normalised = _trace_normalised(_gram(_scaled(matrix)))
    identity = tf.eye(matrix.shape[-1], dtype=tf.float64)
    return tf.cast(tf.reduce_sum(tf.square(normalised - identity), axis=(-2, -1)), dtype)


def _as_float64(matrix: Any) -> tuple[tf.Tensor, tf.DType]:
    matrix = tf.convert_to_tensor(matrix)
    if matrix.shape.rank is not None and matrix.shape.rank < 2:
        raise ValueError(f"matrix must have rank >= 2, got shape {matrix.shape}.")
    dtype = tf.float64 if matrix.dtype == tf.float64 else tf.float32
    return _lifted(matrix, tf.float64), dtype


def _lifted(x: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Return `x` cast to `dtype`, unless its own float dtype is at least as wide.

    The gradient is clipped to the range of the dtype of `x`, since that of a penalty at a small
    float16 matrix may exceed it.
    """
    if not x.dtype.is_floating:
        return tf.cast(x, dtype)
    if x.dtype.size >= dtype.size:
        return x

    @tf.custom_gradient
    def cast(x: tf.Tensor) -> tuple[tf.Tensor, Any]:
        limit = float(x.dtype.max)
        return tf.cast(x, dtype), lambda upstream: tf.cast(
            tf.clip_by_value(upstream, -limit, limit), x.dtype
        )

    return cast(x)


def _scaled(matrix: tf.Tensor) -> tf.Tensor:
    """Return each matrix with its largest entry scaled to 1; zeros for one that counts as zero.

    A matrix with NaN or infinity gives NaN, so that a diverged training is noticed.
    """
    # (Not by `~(largest <= _ZERO)`: Grappler rewrites it to `largest > _ZERO`, which drops NaN.)
    size = tf.abs(matrix)
    largest = tf.stop_gradient(tf.reduce_max(size, axis=(-2, -1), keepdims=True))
    alive = ~tf.reduce_all(size <= _ZERO, axis=(-2, -1), keepdims=True)
    return tf.where(alive, matrix / tf.where(alive, largest, 1.0), 0.0)


def _trace_normalised(gram: tf.Tensor) -> tf.Tensor:
    """Return G n / tr(G), whose mean eigenvalue is 1; the zero matrix for G = 0."""
    trace = tf.linalg.trace(gram)[..., tf.newaxis, tf.newaxis]
    return gram * tf.math.divide_no_nan(tf.cast(gram.shape[-1], gram.dtype), trace)


@tf.custom_gradient
def _gram(matrix: tf.Tensor) -> tuple[tf.Tensor, Any]:
    """Return MᵀM; its gradient takes one product, where the automatic one takes two."""

    def gradient(upstream: tf.Tensor) -> tf.Tensor:
        return tf.matmul(matrix, upstream + tf.linalg.matrix_transpose(upstream))

    return tf.matmul(matrix, matrix, transpose_a=True), gradient


@tf.custom_gradient
def _log_det(positive: tf.Tensor) -> tuple[tf.Tensor, Any]:
    """Return log det of positive definite matrices by Cholesky; the gradient is the inverse."""
    factor = tf.linalg.cholesky(positive)
    value = 2.0 * tf.reduce_sum(tf.math.log(tf.linalg.diag_part(factor)), axis=-1)

    def gradient(upstream: tf.Tensor) -> tf.Tensor:
        identity = tf.eye(
            positive.shape[-1], batch_shape=tf.shape(positive)[:-2], dtype=positive.dtype
        )
        return upstream[..., tf.newaxis, tf.newaxis] * tf.linalg.cholesky_solve(factor, identity)

    return value, gradient
