"""Image files as arrays, by Pillow."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tscnc_tf._extras import require_extra
from tscnc_tf.datasets.resizing import resized

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_GREY = {"1", "L"}
_COLOUR = {"LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}


def decoded(
    items: Sequence[pathlib.Path | bytes],
    name: Callable[[int], str],
    image_size: tuple[int, int] | None,
) -> np.ndarray:
    """Return images as one array of bytes `(n, h, w, c)`: c is 1 if all are grey, else 3.

    Transparency is left out.

    Args:
        items: files, or their contents.
        name: of an item by its index, for error messages.
        image_size: what all are resized to; None: they must be of one size.

    Raises:
        ValueError: an image can't be read, or is not of the first one's size.
    """
    grey = True
    expected = None
    for index, item in enumerate(items):
        mode, found = _read(item, name(index), lambda image: (image.mode, image.size[::-1]))
        if mode not in _GREY | _COLOUR:
            raise ValueError(
                f"{name(index)} has pixels of the kind {mode!r}, which have no fixed white: save "
                "it with 8 bits per channel."
            )
        grey = grey and mode in _GREY
        expected = image_size or expected or found
        if image_size is None and found != expected:
            raise ValueError(
                f"{name(index)} is of size {found}, and {name(0)} of size {expected}: all images "
                "must be of one size, or be brought to one by image_size=(height, width)."
            )
    result = np.empty((len(items), *(expected or (0, 0)), 1 if grey else 3), np.uint8)
    kind = "L" if grey else "RGB"
    for index, item in enumerate(items):
        pixels = _read(item, name(index), lambda image: np.asarray(image.convert(kind)))
        pixels = pixels.reshape(1, *pixels.shape[:2], -1)
        result[index] = resized(pixels, image_size)[0] if image_size else pixels[0]
    return result


def _read(item: pathlib.Path | bytes, name: str, look: Callable[[Any], Any]) -> Any:
    pillow = require_extra("PIL.Image", "datasets")
    try:
        with pillow.open(io.BytesIO(item) if isinstance(item, bytes) else item) as image:
            return look(image)
    # Pillow's errors for damaged files depend on their format.
    except (OSError, SyntaxError, ValueError, EOFError, pillow.DecompressionBombError) as error:
        raise ValueError(f"{name} can't be read as an image: {error}") from error
