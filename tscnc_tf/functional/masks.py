"""Masks of kept entries, with exact counts despite ties. True marks a kept weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf


def kept_count(size: Any, sparsity: Any) -> tf.Tensor:
    """Return the number of kept weights at a sparsity, max(round(size·(1 - sparsity)), 1).

    It is computed in float32 with ties rounded to even, as in tfmot; above 2^24 weights, where
    float32 is not exact, in float64.

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
    """Return a mask of the `count` largest entries of a vector; among equals, the first ones.

    Exactly `count` entries are True (all, if there are fewer), also where scores are equal. The
    threshold is found bit by bit, by counting the larger entries, without sorting: for millions of
    weights this is several times faster, even more under XLA, and no shape depends on `count`.

    Args:
        scores: a vector, float32 or float64, without NaN.
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
    """Return a mask of the kept entries of a vector after removing a share of them.

    Of k kept entries, the k - round(k·share) with the largest scores stay, and all with the score
    +inf. No more are removed than there are other entries (not kept) to replace them.

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
    """Return a mask of the entries of largest score whose sizes add up to at most `budget`.

    Entries are taken in descending order of scores (among equals, the first one first), until the
    next one would exceed the budget.

    Args:
        scores: a float vector.
        sizes: an int32 vector, the cost of each entry.
        budget: a scalar.
    """
    scores = tf.ensure_shape(scores, (None,))
    order = tf.math.top_k(scores, k=scores.shape[0], sorted=True).indices
    fits = tf.cumsum(tf.gather(tf.cast(sizes, tf.int64), order)) <= tf.cast(budget, tf.int64)
    # Scattered as integers, since not every device scatters booleans.
    kept = tf.scatter_nd(order[:, tf.newaxis], tf.cast(fits, tf.int32), tf.shape(scores))
    return kept > 0


def largest_per_row(scores: Any, count: Any) -> tf.Tensor:
    """Return a mask of the `count` largest entries along the last axis; among equals, the first.

    It compares all pairs along the last axis, which should be short (m of n:m sparsity).

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
    """Return integers in the same order as the floats: their bits, mirrored for negative ones."""
    integer = tf.int64 if scores.dtype == tf.float64 else tf.int32
    bits = tf.bitcast(scores, integer)
    bits = tf.where(tf.equal(bits, integer.min), tf.zeros_like(bits), bits)  # -0.0 is 0.0
    return tf.where(bits < 0, tf.bitwise.bitwise_xor(bits, integer.max), bits)


def _nth_largest(values: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Return the largest integer that at least `count` entries reach, found bit by bit."""
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
