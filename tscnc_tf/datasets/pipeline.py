"""Images as `tf.data`: reproducible training epochs, and evaluation in order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf.callbacks import DataPosition
from tscnc_tf.datasets import augmentation
from tscnc_tf.datasets.images import StoredImages, threads

_FOREVER = np.iinfo(np.int64).max
_PREFETCHED = 4  # batches


def training(
    x: np.ndarray | StoredImages,
    y: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    augment: str,
    first_epoch: int,
    epochs: int | None,
    position: DataPosition | None,
) -> tf.data.Dataset:
    """Return batches of fixed shape, epoch after epoch, from `first_epoch` or from `position`.

    All random numbers of an epoch are drawn at its start, from the seed and the epoch's number: an
    order of all examples, and, unless `augment` is "none", an augmentation for each position. The
    order is the same for all augmentations. All later steps are deterministic.
    """
    steps = len(x) // batch_size
    padding = augmentation.padding(augment, x.shape[1:])
    examples = _examples(x, y)

    def epoch(number: tf.Tensor) -> tf.data.Dataset:
        # The first row of draws does not depend on the number of rows.
        rows = 1 if augment == "none" else 4
        draws = tf.random.stateless_uniform(
            (rows, len(x)), [seed, number], minval=None, maxval=None, dtype=tf.int64, alg="philox"
        )
        order = tf.argsort(draws[0], stable=True)
        used = steps * batch_size
        slices = [tf.reshape(order[:used], (steps, batch_size))]
        if augment != "none":
            plans = augmentation.plans(draws[1:], padding, augment)
            slices.append(tf.reshape(plans[:used], (steps, batch_size, 3)))
        return tf.data.Dataset.from_tensor_slices(tuple(slices))

    def batch(order: tf.Tensor, *plans: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        images, labels = examples(order)
        for plan in plans:
            images = augmentation.augmented(images, plan, padding)
        return _scaled(images), labels

    if position is not None:
        return _prefetched(position.batches(epoch, steps), batch)
    end = _FOREVER if epochs is None else first_epoch + epochs
    batches = tf.data.Dataset.range(first_epoch, end).flat_map(epoch)
    count = tf.data.INFINITE_CARDINALITY if epochs is None else steps * epochs
    batches = batches.apply(tf.data.experimental.assert_cardinality(count))
    return _prefetched(batches, batch)


def evaluation(x: np.ndarray | StoredImages, y: np.ndarray, batch_size: int) -> tf.data.Dataset:
    """Return all examples in order; the last batch may be smaller."""
    examples = _examples(x, y)

    def batch(places: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        images, labels = examples(places)
        return _scaled(images), labels

    return _prefetched(tf.data.Dataset.range(len(x)).batch(batch_size), batch)


def _examples(
    x: np.ndarray | StoredImages, y: np.ndarray
) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """Return a function from indices to their images and labels."""
    with tf.device("CPU:0"):
        labels = tf.constant(y)
        read = (
            _reader(x)
            if isinstance(x, StoredImages)
            else functools.partial(tf.gather, tf.constant(x))
        )
    return lambda places: (read(places), tf.gather(labels, places))


def _reader(images: StoredImages) -> Callable[[tf.Tensor], tf.Tensor]:
    def read(places: tf.Tensor) -> tf.Tensor:
        pixels = tf.numpy_function(images.read, [places], tf.uint8, stateful=False)
        return tf.ensure_shape(pixels, (*places.shape, *images.shape[1:]))

    return read


def _prefetched(places: tf.data.Dataset, batch: Callable[..., Any]) -> tf.data.Dataset:
    """Return batches that are computed by several threads ahead of the model.

    Autotuning is off, since its thread sleeps for up to a minute, and the deletion of an iterator
    at the end of `fit` waits for it.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    batches = places.map(batch, num_parallel_calls=threads(), deterministic=True)
    return batches.prefetch(_PREFETCHED).with_options(options)


def _scaled(images: tf.Tensor) -> tf.Tensor:
    """Return float32 in [0, 1], like `pixels.as_floats`."""
    return tf.cast(images, tf.float32) / 255.0 if images.dtype == tf.uint8 else images
