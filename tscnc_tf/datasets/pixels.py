"""Operations on arrays of pixels: scaling, chunks, means and standard deviations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from tscnc_tf import _files

CHUNK = 1000  # images that are decoded, or converted to a wider dtype, at a time


def as_floats(pixels: np.ndarray) -> np.ndarray:
    """Return pixels as float32 in [0, 1]: bytes divided by 255."""
    if pixels.dtype != np.uint8:
        return pixels
    return np.divide(pixels, np.float32(255), dtype=np.float32)


def statistics(pixels: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel, on the scale [0, 1].

    Sums of bytes are exact, as they are computed in integers.
    """
    if pixels.dtype == np.uint8:
        mean, deviation = zip(*map(_moments, _histograms(pixels)), strict=True)
        return mean, deviation
    count = pixels.size // pixels.shape[-1]
    axes = (0, 1, 2)
    means = sum(part.sum(axes, dtype=np.float64) for part in chunks(pixels)) / count
    squares = sum(((part - means) ** 2).sum(axes) for part in chunks(pixels))
    return tuple(means.tolist()), tuple(np.sqrt(squares / count).tolist())


def require_memory(name: str, shape: tuple[int, ...]) -> None:
    """Raise a ValueError if float32 pixels of that shape exceed the machine's memory."""
    size, available = 4 * math.prod(shape), _files.memory()
    if available is not None and size > available:
        raise ValueError(
            f"{name}, {shape[0]:,} images, takes {size / 2**30:,.1f} GiB as float32, and this "
            f"machine has {available / 2**30:,.1f} GiB of memory: take a sample."
        )


def chunks(pixels: Any) -> Iterator[np.ndarray]:
    """Yield images in order, in arrays of at most `CHUNK`; `StoredImages` are decoded."""
    for start in range(0, len(pixels), CHUNK):
        yield np.asarray(pixels[start : start + CHUNK])


def _histograms(pixels: Any) -> list[list[int]]:
    """Return the histograms of byte values, one per channel."""
    counts = np.zeros((pixels.shape[-1], 256), np.int64)
    for part in chunks(pixels):
        for channel, count in enumerate(counts):
            count += np.bincount(part[..., channel].reshape(-1), minlength=256)
    return counts.tolist()


def _moments(histogram: list[int]) -> tuple[float, float]:
    """Return mean and standard deviation of bytes / 255; all sums are exact, in integers."""
    count = sum(histogram)
    total = sum(value * times for value, times in enumerate(histogram))
    squares = sum(value * value * times for value, times in enumerate(histogram))
    variance = (count * squares - total * total) / (count * 255) ** 2
    return total / (count * 255), variance**0.5
