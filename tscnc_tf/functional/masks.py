"""Which entries to keep: exact counts, whatever the ties. Masks are True where a weight is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf


def kept_count(size: Any, sparsity: Any) -> tf.Tensor:
    """Return how many of `size` weights are kept at a sparsity: max(round(size·(1 - sparsity)), 1).

    In float32 and with ties rounded to even, as tfmot counts, so that both prune alike; above 2^24
    weights, which float32 can't count, in float64.

    Args:
        size: number of weights, an integer or a vector of integers.
        sparsity: fraction of zeros, a scalar or a vector.

    Returns:
        An int32 tensor.
    """
    share = 1.0 - tf.cast(sparsity, tf.float32)
    kept = tf.cast(tf.round(tf.cast(size, tf.float32) * share), tf.int32)
    exact = tf.cast(tf.round(tf.cast(size, tf.float64) * tf.cast(share, tf.float64)), tf.int32)
    return tf.maximum(tf.where(tf.cast(size, tf.int32) > 2**24, exact, kept), 1)


def largest(scores: Any, count: Any) -> tf.Tensor:
    """Return a mask of the `count` largest entries of a vector; of equals the first ones.

    Exactly `count` entries are True (all, if there are fewer), also where scores are equal. Scores
    are to be free of NaN, which has no place in their order.

    The threshold is found bit by bit, by counting what lies above, and not by sorting: on millions
    of weights that is several times faster, and under XLA more; nor does the shape of anything
    depend on `count`.

    Args:
        scores: a vector, float32 or float64.
        count: a scalar, possibly a tensor.
    """
    ranks = _ordered_integers(tf.convert_to_tensor(scores))
    count = tf.clip_by_value(tf.cast(count, tf.int32), 0, tf.size(ranks))
    threshold = _nth_largest(ranks, tf.maximum(count, 1))
    above, level = ranks > threshold, tf.equal(ranks, threshold)
    left = count - _count(above)
    chosen = tf.cond(
        _count(level) > left,
        lambda: level & (tf.cumsum(tf.cast(level, tf.int32)) <= left),
        lambda: level,
    )
    return (above | chosen) & (count > 0)


def largest_share(kept: Any, scores: Any, share: Any) -> tf.Tensor:
    """Return a mask of what stays where a share of the kept entries of a vector goes.

    Of k entries that are kept, those with the largest scores stay, k - round(k·share) of them, and
    in any case those with a score of +inf. No more go than there are others to take their places.

    Args:
        kept: a boolean vector.
        scores: a float vector.
        share: a scalar, possibly a tensor.
    """
    scores = tf.convert_to_tensor(scores)
    count = _count(kept)
    going = tf.cast(tf.round(tf.cast(count, tf.float32) * tf.cast(share, tf.float32)), tf.int32)
    going = tf.minimum(going, tf.size(kept) - count)
    scores = tf.where(kept, scores, tf.constant(-np.inf, scores.dtype))
    fixed = _count(tf.equal(scores, np.inf))
    return largest(scores, tf.maximum(count - going, fixed)) & kept


def largest_within(scores: Any, sizes: Any, budget: Any) -> tf.Tensor:
    """Return a mask of the entries of largest score whose sizes add up to `budget` at most.

    Entries are taken in the order of their scores (of equals the first one first), until the next
    one would exceed the budget.

    Args:
        scores: a float vector.
        sizes: an int32 vector: what each entry costs.
        budget: a scalar.
    """
    scores = tf.ensure_shape(scores, (None,))
    order = tf.math.top_k(scores, k=scores.shape[0], sorted=True).indices
    fits = tf.cumsum(tf.gather(tf.cast(sizes, tf.int64), order)) <= tf.cast(budget, tf.int64)
    # Scattered as numbers: not every device scatters booleans.
    kept = tf.scatter_nd(order[:, tf.newaxis], tf.cast(fits, tf.int32), tf.shape(scores))
    return kept > 0


def largest_per_row(scores: Any, count: Any) -> tf.Tensor:
    """Return a mask of the `count` largest entries along the last axis; of equals the first ones.

    Meant for a short last axis (m of n:m sparsity): it compares all pairs along it.

    Args:
        scores: `(..., m)`, floats.
        count: a scalar, possibly a tensor.
    """
    scores = tf.convert_to_tensor(scores)
    mine, other = scores[..., :, tf.newaxis], scores[..., tf.newaxis, :]
    size = scores.shape[-1]
    earlier = tf.range(size)[tf.newaxis, :] < tf.range(size)[:, tf.newaxis]
    ahead = (other > mine) | (tf.equal(other, mine) & earlier)
    rank = tf.reduce_sum(tf.cast(ahead, tf.int32), axis=-1)
    return rank < tf.cast(count, tf.int32)


def _ordered_integers(scores: tf.Tensor) -> tf.Tensor:
    """Return integers that are in the same order as the floats: their bits, negatives mirrored."""
    integer = tf.int64 if scores.dtype == tf.float64 else tf.int32
    bits = tf.bitcast(scores, integer)
    bits = tf.where(tf.equal(bits, integer.min), tf.zeros_like(bits), bits)  # -0.0 is 0.0
    return tf.where(bits < 0, tf.bitwise.bitwise_xor(bits, integer.max), bits)


def _nth_largest(values: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Return the largest integer that `count` entries reach: their sign first, then bit by bit."""
    zero = tf.zeros((), values.dtype)
    found = tf.where(_count(values >= zero) >= count, zero, zero + values.dtype.min)

    def refine(bit: tf.Tensor, found: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        ahead = found + tf.bitwise.left_shift(tf.ones((), values.dtype), bit)
        return bit - 1, tf.where(_count(values >= ahead) >= count, ahead, found)

    bits = 8 * values.dtype.size - 1
    first = tf.constant(bits - 1, values.dtype)
    _, found = tf.while_loop(
        lambda bit, _: bit >= 0, refine, (first, found), maximum_iterations=bits
    )
    return found


def _count(mask: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.cast(mask, tf.int32))
