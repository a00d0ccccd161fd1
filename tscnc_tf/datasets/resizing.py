"""Resizing of images by NumPy, bit for bit reproducible on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np

from tscnc_tf import _checks
from tscnc_tf.datasets.pixels import chunks


def size(value: Any) -> tuple[int, int] | None:
    """Return `image_size` as a pair of ints, or None."""
    if value is None:
        return None
    try:
        height, width = value
    except (TypeError, ValueError):
        raise TypeError(f"image_size must be a pair (height, width), got {value!r}.") from None
    return (
        _checks.integer("image_size[0]", height, minimum=1),
        _checks.integer("image_size[1]", width, minimum=1),
    )


def resized(pixels: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    r"""Return images `(n, h, w, c)` at another size, of the same dtype.

    Bilinear with antialiasing: along each axis, new pixel i is the mean of the old pixels j with
    the weights

    .. math:: \max(0,\ 1 - |j + \tfrac12 - (i + \tfrac12)\,r| \,/ \max(r, 1)),
        \qquad r = \text{old size} / \text{new size}

    Each axis has its own ratio r. Bytes are rounded to bytes.
    """
    if pixels.shape[1:3] == image_size:
        return pixels
    result = np.empty((len(pixels), *image_size, pixels.shape[-1]), pixels.dtype)
    for part, target in zip(chunks(pixels), chunks(result), strict=True):
        values = _along(_along(part, 1, image_size[0]), 2, image_size[1])
        target[...] = np.rint(values) if target.dtype == np.uint8 else values
    return result


def _along(values: np.ndarray, axis: int, length: int) -> np.ndarray:
    """Return values with one axis resampled, in float64.

    It sums elementwise products in a fixed order; the order of summation in a matrix product
    depends on the machine.
    """
    places, weights = _taps(values.shape[axis], length)
    shape = [1] * values.ndim
    shape[axis] = length
    parts = zip(places.T, weights.T, strict=True)
    return sum(values.take(place, axis) * weight.reshape(shape) for place, weight in parts)


def _taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the old pixels of each new one, and their weights: `(new, taps)`."""
    ratio = old / new
    reach = max(ratio, 1.0)
    centres = (np.arange(new) + 0.5) * ratio
    first = np.floor(centres - reach).astype(int)
    places = first[:, np.newaxis] + np.arange(int(np.ceil(2 * reach)) + 1)
    distances = np.abs(places + 0.5 - centres[:, np.newaxis])
    weights = np.maximum(0.0, 1.0 - distances / reach)
    weights[(places < 0) | (places >= old)] = 0.0
    return np.clip(places, 0, old - 1), weights / weights.sum(axis=1, keepdims=True)
