"""Losses per example, as pure functions of labels and logits."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tscnc_tf import _checks


def one_hot(labels: Any, num_classes: int | tf.Tensor) -> tf.Tensor:
    """Return labels of any form as one row per example, `(batch, num_classes)`.

    Args:
        labels: integers of shape `(batch,)` or `(batch, 1)`; or one-hot or soft labels of shape
            `(batch, num_classes)` and any dtype.
        num_classes: the number of classes.

    Returns:
        A tensor of shape `(batch, num_classes)`, float32 (float64 for float64 labels).

    Raises:
        ValueError: the labels have neither of these forms.

    Example:
        >>> one_hot([2, 0], 3).numpy().tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    labels = tf.convert_to_tensor(labels)
    if _checks.holds_indices("labels", labels):
        if labels.dtype not in (tf.int32, tf.int64):  # tf.one_hot takes few others
            labels = tf.cast(labels, tf.int64)
        return tf.one_hot(tf.reshape(labels, (-1,)), num_classes, dtype=tf.float32)
    if _agree(labels.shape[1], num_classes):
        return tf.cast(labels, tf.float64 if labels.dtype == tf.float64 else tf.float32)
    raise ValueError(
        "labels must be integers of shape (batch,) or (batch, 1), or one-hot of shape (batch, "
        f"{_static(num_classes)}), got {labels.dtype.name} of shape {labels.shape}."
    )


def cross_entropy(labels: Any, logits: Any) -> tf.Tensor:
    r"""Return the cross-entropy per example, :math:`-\sum_k y_k \log \mathrm{softmax}(z)_k`.

    Args:
        labels: see `tscnc_tf.losses`.
        logits: `(batch, classes)`, any float dtype.

    Raises:
        ValueError: logits are not a float tensor of rank 2, or labels don't fit them.

    Example:
        >>> round(float(cross_entropy([0], [[0.0, 0.0]])[0]), 4)
        0.6931
    """
    logits = lifted(logits)
    return tf.nn.softmax_cross_entropy_with_logits(_rows(labels, logits), logits)


def kl_divergence(reference_logits: Any, logits: Any) -> tf.Tensor:
    r"""Return :math:`\mathrm{KL}(p \| q) = \sum_k p_k (\log p_k - \log q_k)` per example.

    p and q are the softmax of `reference_logits` and of `logits`. Both logarithms come from
    log-softmax, so the value stays finite where probabilities underflow.

    Args:
        reference_logits: `(batch, classes)`, any float dtype; the gradient flows into it as well.
        logits: `(batch, classes)`, any float dtype.

    Raises:
        ValueError: either is not a float tensor of rank 2, or they have different numbers of
            classes.

    Example:
        >>> float(kl_divergence([[1.0, 2.0]], [[3.0, 4.0]])[0])
        0.0
    """
    logits, reference = lifted(logits), lifted(reference_logits)
    if not reference.shape[1:].is_compatible_with(logits.shape[1:]):
        raise ValueError(
            "reference_logits must be for the same classes as logits, got shapes "
            f"{reference.shape} and {logits.shape}: teacher and student must have "
            "the same classes."
        )
    log_p = tf.nn.log_softmax(tf.cast(reference, logits.dtype))
    log_q = tf.nn.log_softmax(logits)
    return tf.reduce_sum(tf.exp(log_p) * (log_p - log_q), axis=-1)


def log_odds(labels: Any, logits: Any) -> tf.Tensor:
    r"""Return the log-odds of not being `y`, :math:`\log\sum_{k\ne y} e^{z_k} - z_y`, per example.

    With :math:`p = \mathrm{softmax}(z)` it is :math:`\log((1 - p_y)/p_y)`, so that cross-entropy is
    `softplus(log_odds)`: both rank all inputs equally, and their gradients have the same direction.
    But the gradient of cross-entropy has the factor :math:`1 - p_y`, which rounds to 0 where the
    network is confident, while that of the log-odds does not vanish.

    Soft labels q, of shape `(batch, classes)`, define the weight m of each class:

    .. math:: \log\frac{1 - P}{P}, \qquad P = \sum_k m_k p_k, \qquad
        m_k = \frac{q_k - \min q}{\max q - \min q}

    so label smoothing has no effect (m does not change), and for an equal mixture of two classes it
    is the log-odds of neither class. (Cross-entropy with q is minimal at p = q, and grows as p
    becomes more confident, so its ascent could raise the confidence.) If all entries are equal, y
    is the first class.

    Args:
        labels: see `tscnc_tf.losses`.
        logits: `(batch, classes)`, any float dtype, at least two classes.

    Raises:
        ValueError: logits are not a float tensor of rank 2, or labels don't fit them.

    Example:
        >>> float(log_odds([0], [[3.0, 1.0]])[0])
        -2.0
        >>> float(log_odds([[0.9, 0.1]], [[3.0, 1.0]])[0])
        -2.0
    """
    labels, logits = tf.convert_to_tensor(labels), lifted(logits)
    true, others = split(labels, logits)
    odds = tf.reduce_logsumexp(others, axis=-1) - true
    if _checks.holds_indices("labels", labels):
        return odds
    rows = _rows(labels, logits)
    is_hard = tf.equal(tf.reduce_max(rows, axis=-1), 1.0)
    return tf.where(is_hard, odds, _soft_log_odds(rows, logits))


def _soft_log_odds(rows: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    smallest = tf.reduce_min(rows, axis=-1, keepdims=True)
    width = tf.reduce_max(rows, axis=-1, keepdims=True) - smallest
    first = tf.one_hot(tf.zeros_like(width[:, 0], tf.int64), tf.shape(rows)[1], dtype=rows.dtype)
    share = tf.where(width > 0, tf.math.divide_no_nan(rows - smallest, width), first)
    # The shift changes the rounding of the gradient only: that of the top class is computed as
    # minus the sum of the others, instead of 1 - 1 with a larger rounding error.
    top = tf.argmax(logits, axis=-1)
    logits = logits - tf.gather(logits, top, batch_dims=1)[:, tf.newaxis]

    def log_sum(weights: tf.Tensor) -> tf.Tensor:
        is_in = weights > 0
        logs = tf.math.log(tf.where(is_in, weights, 1.0))
        return tf.reduce_logsumexp(tf.where(is_in, logits + logs, logits.dtype.min), axis=-1)

    return log_sum(1.0 - share) - log_sum(share)


def margin(labels: Any, logits: Any) -> tf.Tensor:
    r"""Return the lead of the best wrong class, :math:`\max_{k\ne y} z_k - z_y`, per example.

    It is negative if the example is classified correctly.

    Args:
        labels: see `tscnc_tf.losses`; y of soft labels is the largest entry.
        logits: `(batch, classes)`, any float dtype, at least two classes.

    Raises:
        ValueError: logits are not a float tensor of rank 2, or labels don't fit them.

    Example:
        >>> float(margin([0], [[3.0, 1.0, 2.0]])[0])
        -1.0

    Reference:
        Carlini & Wagner 2017, arXiv 1608.04644, objective f6 without its cut-off.
    """
    true, others = split(labels, lifted(logits))
    return tf.reduce_max(others, axis=-1) - true


def dlr(labels: Any, logits: Any) -> tf.Tensor:
    r"""Return the difference of logits ratio per example.

    .. math:: \mathrm{DLR}(y, z) = -\frac{z_y - \max_{k\ne y} z_k}{z_{\pi_1} - z_{\pi_3}}

    with :math:`z_{\pi_1} \ge z_{\pi_2} \ge \dots` the sorted logits. Unlike cross-entropy and
    margin it is invariant to shifting and scaling the logits; it lies in [-1, 0] if the example is
    classified correctly.

    Args:
        labels: see `tscnc_tf.losses`; y of soft labels is the largest entry.
        logits: `(batch, classes)`, any float dtype, at least three classes.

    Raises:
        ValueError: there are fewer than three classes, logits are not a float tensor of rank 2, or
            labels don't fit them.

    Example:
        >>> float(dlr([0], [[3.0, 1.0, 2.0]])[0])
        -0.5

    Reference:
        Croce & Hein 2020, arXiv 2003.01690, section 4.
    """
    logits = lifted(logits, classes=3)
    largest = tf.math.top_k(logits, k=3).values
    # The constant of the authors' code; it matters only if three logits are equal.
    return margin(labels, logits) / (largest[:, 0] - largest[:, 2] + 1e-12)


def targeted_dlr(labels: Any, targets: Any, logits: Any) -> tf.Tensor:
    r"""Return the difference of logits ratio towards a class t, per example.

    .. math:: \mathrm{DLR}(y, t, z) =
        -\frac{z_y - z_t}{z_{\pi_1} - \frac12 (z_{\pi_3} + z_{\pi_4})}

    with :math:`z_{\pi_1} \ge z_{\pi_2} \ge \dots` the sorted logits. It is positive if
    :math:`z_t > z_y`. With fewer than four classes it is the numerator only, :math:`z_t - z_y`:
    there is no fourth logit, and with three classes the ratio to :math:`z_{\pi_1} - z_{\pi_3}`
    would be constant if t is the least likely class.

    Args:
        labels: see `tscnc_tf.losses`; y of soft labels is the largest entry.
        targets: the classes t, integers `(batch,)`.
        logits: `(batch, classes)`, any float dtype, at least two classes.

    Raises:
        ValueError: logits are not a float tensor of rank 2, or labels don't fit them.

    Example:
        >>> round(float(targeted_dlr([0], [2], [[3.0, 1.0, 2.0, 0.0]])[0]), 4)
        -0.4

    Reference:
        Croce & Hein 2020, arXiv 2003.01690, section 4.
    """
    logits = lifted(logits)
    chosen = tf.gather(logits, tf.convert_to_tensor(targets), batch_dims=1)
    true, _ = split(labels, logits)
    sizes = tf.sort(logits, axis=-1, direction="DESCENDING")
    lowest = tf.reduce_sum(sizes[:, 2:4], axis=-1) / 2
    width = tf.where(tf.shape(logits)[1] >= 4, sizes[:, 0] - lowest, 1.0)
    return (chosen - true) / (width + 1e-12)


def lifted(logits: Any, classes: int = 2) -> tf.Tensor:
    """Return logits in float32 (or float64), after checking dtype, rank and number of classes."""
    logits = tf.convert_to_tensor(logits)
    if not logits.dtype.is_floating or logits.shape.rank != 2:
        raise ValueError(
            "logits must be a float tensor of shape (batch, classes), got "
            f"{logits.dtype.name} of shape {logits.shape}."
        )
    if logits.shape[1] is not None and logits.shape[1] < classes:
        raise ValueError(
            f"logits must have at least {classes} classes here, got {logits.shape[1]}: dlr needs "
            "3, the others 2. A network with one output z for two classes has the logits (0, z)."
        )
    return _checks.widened(logits)


def _rows(labels: Any, logits: tf.Tensor) -> tf.Tensor:
    classes = logits.shape[1]
    classes = tf.shape(logits)[1] if classes is None else classes
    return tf.cast(one_hot(labels, classes), logits.dtype)


def is_true_class(labels: Any, logits: tf.Tensor) -> tf.Tensor:
    """Return a mask of the shape of `logits` with True at each example's class."""
    rows = _rows(labels, logits)
    positions = tf.range(tf.shape(rows)[1], dtype=tf.int64)
    return positions == tf.argmax(rows, axis=-1)[:, tf.newaxis]


def split(labels: Any, logits: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the true class's logit `(batch,)`, and the logits with the dtype's minimum there."""
    is_true = is_true_class(labels, logits)
    true = tf.reduce_sum(tf.where(is_true, logits, 0.0), axis=-1)
    return true, tf.where(is_true, logits.dtype.min, logits)


def _agree(size: int | None, other: Any) -> bool:
    """Return whether two sizes are equal, or one of them is not known statically."""
    other = _static(other)
    return size is None or other is None or size == other


def _static(size: Any) -> int | None:
    return None if tf.is_tensor(size) else int(size)
