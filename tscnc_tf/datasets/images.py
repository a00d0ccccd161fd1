"""Images that stay in their files, and are decoded by Pillow on access."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol, final

import numpy as np

from tscnc_tf._extras import require_extra
from tscnc_tf.datasets.resizing import resized

SUFFIXES = {
    *(".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
}
_GREY = {"1", "L"}
_COLOUR = {"LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
_MOST_THREADS = 8  # each may hold a batch in memory


class Files(Protocol):
    """A sequence of encoded images: JPEG, PNG and other formats of Pillow."""

    def __len__(self) -> int:
        """Return the number of images."""

    def open(self, index: int) -> BinaryIO:
        """Return an encoded image as an open file."""

    def name(self, index: int) -> str:
        """Return the name of an image for error messages."""


@final
class StoredImages:
    """Images that stay in their files, such as `x_train` of `datasets.load(..., stream=True)`.

    `len(images)` is their number, and `images[places]`, with a slice or an array of indices, a
    selection as `StoredImages`. `np.asarray(images)` decodes all of them; the methods of `Dataset`
    decode a batch at a time. Only the locations of the images are in memory.

    Attributes:
        shape: `(n, height, width, channels)`.
        dtype: uint8.

    Example:
        >>> import numpy as np
        >>> import tscnc_tf as tscnc
        >>> data = tscnc.datasets.load("photos", stream=True)  # doctest: +SKIP
        >>> pixels = np.asarray(data.x_train[:100])  # doctest: +SKIP
    """

    dtype = np.dtype(np.uint8)
    __iter__ = None  # iteration would decode the images one by one

    def __init__(
        self,
        files: Files,
        places: np.ndarray,
        image_shape: tuple[int, int, int],
        *,
        resize: bool,
    ) -> None:
        self._files, self._places, self._resize = files, places, resize
        self.shape = (len(places), *image_shape)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._places)

    def __getitem__(self, places: Any) -> StoredImages:
        """Return a selection of the images, by a slice or an array of indices.

        Raises:
            TypeError: `places` is something else, such as the index of one image.
        """
        chosen = self._places[places]
        if np.ndim(chosen) != 1:
            raise TypeError(
                f"stored images are taken by a slice or an array of indices, got {places!r}. The "
                "pixels of image i are np.asarray(images[i : i + 1])[0]."
            )
        return StoredImages(self._files, chosen, self.shape[1:], resize=self._resize)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Decode all images."""
        if copy is False:
            raise ValueError("stored images are decoded into a new array: copy must not be False.")
        result = np.empty(self.shape, self.dtype)
        spans = np.array_split(np.arange(len(self)), max(1, len(self) // 16))

        def fill(span: np.ndarray) -> None:
            result[span] = self.read(span)

        with concurrent.futures.ThreadPoolExecutor(threads()) as pool:
            list(pool.map(fill, spans))  # the first error is raised
        return result if dtype is None else result.astype(dtype, copy=False)

    def read(self, places: np.ndarray) -> np.ndarray:
        """Return images by their indices, decoded: bytes `(n, height, width, channels)`.

        Raises:
            ValueError: a file was removed, or is no longer an image of the same size.
        """
        result = np.empty((len(places), *self.shape[1:]), self.dtype)
        for target, index in zip(result, self._places[places].tolist(), strict=True):
            target[...] = self._decoded(index)
        return result

    def digest(self) -> np.ndarray:
        """Return the SHA-256 digest of shape and encoded images, as bytes; nothing is decoded."""
        found = hashlib.sha256(str(self.shape).encode())
        for index in self._places.tolist():
            with _opened(self._files, index) as stream:
                content = stream.read()
            found.update(len(content).to_bytes(8, "little"))
            found.update(content)
        return np.frombuffer(found.digest(), np.uint8)

    def _decoded(self, index: int) -> np.ndarray:
        height, width, channels = self.shape[1:]
        kind = "L" if channels == 1 else "RGB"
        pixels = _read(self._files, index, lambda image: np.asarray(image.convert(kind)))
        pixels = pixels.reshape(1, *pixels.shape[:2], channels)
        if self._resize:
            return resized(pixels, (height, width))[0]
        if pixels.shape[1:] != self.shape[1:]:
            raise ValueError(
                f"{self._files.name(index)} is of size {pixels.shape[1:3]} now, and was of size "
                f"{(height, width)} when the data set was loaded: load it again."
            )
        return pixels[0]


def stored(files: Files, image_size: tuple[int, int] | None) -> StoredImages:
    """Return `StoredImages` of some files, with 1 channel if all are grey, else 3.

    Transparency is dropped. All images are opened, to read their sizes and modes.

    Args:
        files: the encoded images.
        image_size: (height, width) to resize to; None if all have the same size.

    Raises:
        ValueError: an image can't be read, or its size differs from that of the first one.
    """
    grey = True
    expected = image_size
    for index in range(len(files)):
        mode, found = _read(files, index, lambda image: (image.mode, image.size[::-1]))
        if mode not in _GREY | _COLOUR:
            raise ValueError(
                f"{files.name(index)} has pixels of the kind {mode!r}, which have no fixed white: "
                "save it with 8 bits per channel."
            )
        grey = grey and mode in _GREY
        expected = expected or found
        if image_size is None and found != expected:
            raise ValueError(
                f"{files.name(index)} is of size {found}, and {files.name(0)} of size {expected}: "
                "all images must be of one size, or be resized by image_size=(height, width)."
            )
    height, width = expected or (0, 0)
    places = np.arange(len(files))
    shape = (height, width, 1 if grey else 3)
    return StoredImages(files, places, shape, resize=image_size is not None)


def threads() -> int:
    """Return the number of threads for decoding, during which Pillow releases Python's GIL."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, _MOST_THREADS)


def _read(files: Files, index: int, look: Callable[[Any], Any]) -> Any:
    pillow = require_extra("PIL.Image", "datasets")
    with _opened(files, index) as stream:
        try:
            with pillow.open(stream) as image:
                return look(image)
        # The types of Pillow's errors for damaged files depend on the format.
        except (OSError, SyntaxError, ValueError, EOFError, pillow.DecompressionBombError) as error:
            raise ValueError(f"{files.name(index)} can't be read as an image: {error}") from error


def _opened(files: Files, index: int) -> BinaryIO:
    try:
        return files.open(index)
    except (OSError, ValueError) as error:
        raise ValueError(f"{files.name(index)} can't be read: {error}") from error
