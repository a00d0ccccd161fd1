"""Images on the device, and batches of them.

The order and the augmentation of an epoch depend on its seed only, by NumPy's generator.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Epoch:
    """The order of the examples of an epoch, and the augmentation of each.

    Attributes:
        order: `(n,)`, the indices of the examples.
        shifts: `(n, 2)`, row and column of the crop in the padded image.
        flips: `(n,)`, whether the image is mirrored.
    """

    order: np.ndarray
    shifts: np.ndarray
    flips: np.ndarray

    @classmethod
    def drawn(cls, count: int, seed: tuple[int, ...], pad: int, flip: bool) -> Epoch:
        """Return a random epoch for training."""
        rng = np.random.default_rng(seed)
        order = rng.permutation(count).astype(np.int32)
        shifts = rng.integers(0, 2 * pad + 1, (count, 2)).astype(np.int32)
        flips = rng.integers(0, 2, count).astype(bool) & flip
        return cls(order, shifts, flips)

    @classmethod
    def plain(cls, count: int) -> Epoch:
        """Return all examples in their order, without augmentation."""
        order = np.arange(count, dtype=np.int32)
        return cls(order, np.zeros((count, 2), np.int32), np.zeros(count, bool))

    def batch(self, index: int, size: int) -> Epoch:
        """Return batch `index` of the epoch; the last one may be smaller than `size`."""
        part = slice(index * size, (index + 1) * size)
        return Epoch(self.order[part], self.shifts[part], self.flips[part])

    def filled(self, size: int) -> Epoch:
        """Return the batch, padded to `size` with copies of its first example."""
        spare = size - len(self.order)
        repeat = np.concatenate([np.arange(len(self.order)), np.zeros(spare, int)])
        return Epoch(self.order[repeat], self.shifts[repeat], self.flips[repeat])


class Images:
    """A set of images and labels on the device.

    Args:
        folder: the folder of `prepare.py`.
        part: "train", "validation" or "test".
    """

    def __init__(self, folder: pathlib.Path, part: str) -> None:
        x, y = np.load(folder / f"x_{part}.npy"), np.load(folder / f"y_{part}.npy")
        if x.dtype != np.uint8 or x.ndim != 4 or y.shape != x.shape[:1] or not len(x):
            raise ValueError(
                f"{folder}/x_{part}.npy must hold images (count, height, width, channels), uint8, "
                f"and y_{part}.npy as many labels, got {x.dtype} {x.shape} and {y.shape}: write "
                "them with prepare.py."
            )
        self.shape = x.shape
        self._x, self._y = jax.device_put(x), jax.device_put(y.astype(np.int32))

    def __len__(self) -> int:
        return self.shape[0]

    def cut(self, batch: Epoch, pad: int = 0) -> tuple[jax.Array, jax.Array]:
        """Return the images of a batch, float32 in [0, 1], and their labels, int32."""
        return _cut(self._x, self._y, batch.order, batch.shifts, batch.flips, pad=pad)


@functools.partial(jax.jit, static_argnames="pad")
def _cut(x: Any, y: Any, order: Any, shifts: Any, flips: Any, *, pad: int) -> Any:
    jnp = jax.numpy
    _, height, width, _ = x.shape
    rows = shifts[:, :1] + jnp.arange(height) - pad
    columns = shifts[:, 1:] + jnp.arange(width) - pad
    columns = jnp.where(flips[:, None], columns[:, ::-1], columns)
    inside = _within(rows, height)[:, :, None] & _within(columns, width)[:, None, :]
    rows, columns = jnp.clip(rows, 0, height - 1), jnp.clip(columns, 0, width - 1)
    pixels = x[order[:, None, None], rows[:, :, None], columns[:, None, :]]
    pixels = jnp.where(inside[..., None], pixels, 0)
    # By a table, since a compiler's division by 255 may round differently from NumPy's.
    return jnp.asarray(np.arange(256, dtype=np.float32) / np.float32(255))[pixels], y[order]


def _within(index: Any, size: int) -> Any:
    return (index >= 0) & (index < size)
