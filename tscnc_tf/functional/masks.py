"""Which entries to keep: exact counts, whatever the ties. Masks are True where a weight is kept."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def kept_count(size: Any, sparsity: Any) -> tf.Tensor:
    """Return how many of `size` weights are kept at a sparsity: max(round(size·(1 - sparsity)), 1).

    In float32 and with ties rounded to even, as tfmot counts, so that both prune alike.

    Args:
        size: number of weights, an integer or a vector of integers.
        sparsity: fraction of zeros, a scalar or a vector.

    Returns:
        An int32 tensor.
    """
    kept = tf.round(tf.cast(size, tf.float32) * (1.0 - tf.cast(sparsity, tf.float32)))
    return tf.maximum(tf.cast(kept, tf.int32), 1)


def largest(scores: Any, count: Any) -> tf.Tensor:
    """Return a mask of the `count` largest entries of a vector; of equals the first ones.

    Exactly `count` entries are True (all, if there are fewer), also where scores are equal. One
    sort, and no operation whose shape depends on `count`, so that XLA compiles it.

    Args:
        scores: a float vector.
        count: a scalar, possibly a tensor.
    """
    scores = tf.convert_to_tensor(scores)
    size = tf.size(scores)
    count = tf.clip_by_value(tf.cast(count, tf.int32), 0, size)
    ordered = tf.sort(scores, direction="DESCENDING")
    threshold = tf.gather(ordered, tf.maximum(count - 1, 0))
    above, level = scores > threshold, tf.equal(scores, threshold)
    room = count - tf.reduce_sum(tf.cast(above, tf.int32))
    place = tf.cumsum(tf.cast(level, tf.int32))
    return (above | (level & (place <= room))) & (count > 0)


def largest_within(scores: Any, sizes: Any, budget: Any) -> tf.Tensor:
    """Return a mask of the entries of largest score whose sizes add up to `budget` at most.

    Entries are taken in the order of their scores (of equals the first one first), until the next
    one would exceed the budget.

    Args:
        scores: a float vector.
        sizes: an int32 vector: what each entry costs.
        budget: a scalar.
    """
    scores = tf.convert_to_tensor(scores)
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
