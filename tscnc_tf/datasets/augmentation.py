"""Random crops and flips of whole batches, from integers drawn per example in advance."""

from __future__ import annotations

import tensorflow as tf

# The values of `augment=`: whether they crop, and whether they flip.
AUGMENTATIONS = {
    "none": (False, False),
    "crop": (True, False),
    "flip": (False, True),
    "crop_and_flip": (True, True),
}


def padding(augmentation: str, image_shape: tuple[int, ...]) -> tuple[int, int]:
    """Return a crop's (vertical, horizontal) padding in pixels: 1/8 of the size, at least 1."""
    if not AUGMENTATIONS[augmentation][0]:
        return 0, 0
    height, width = image_shape[:2]
    return max(1, round(height / 8)), max(1, round(width / 8))


def plans(draws: tf.Tensor, padding: tuple[int, int], augmentation: str) -> tf.Tensor:
    """Return the crop and the flip of each example: `(n, 3)` of int32.

    The first two are the corner of the crop in the padded image, uniform in 0 to 2 padding. The
    third is 1 for a flipped image, with probability 1/2 if the augmentation includes flips.

    Args:
        draws: `(3, n)` uniform random integers.
        padding: see `padding`.
        augmentation: one of `AUGMENTATIONS`.
    """
    choices = [2 * padding[0] + 1, 2 * padding[1] + 1, 1 + AUGMENTATIONS[augmentation][1]]
    numbers = tf.math.floormod(draws, tf.constant(choices, draws.dtype)[:, tf.newaxis])
    return tf.cast(tf.transpose(numbers), tf.int32)


def augmented(images: tf.Tensor, plans: tf.Tensor, padding: tuple[int, int]) -> tf.Tensor:
    """Return a batch `(n, h, w, c)` padded by zeros, cropped to its size, and flipped.

    It gathers rows and columns; a flip reverses the order of the columns.
    """
    down, across = padding
    height, width = images.shape[1:3]
    images = tf.pad(images, [[0, 0], [down, down], [across, across], [0, 0]])
    rows = plans[:, :1] + tf.range(height)
    columns = tf.range(width)
    columns = plans[:, 1:2] + tf.where(plans[:, 2:] == 1, width - 1 - columns, columns)
    images = tf.gather(images, rows, batch_dims=1)
    return tf.gather(images, columns, axis=2, batch_dims=1)
