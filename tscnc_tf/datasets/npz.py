"""Reader of `.npz` files with arrays of pixels or packed image files."""

from __future__ import annotations

import io
import pathlib
import zipfile
import zlib
from typing import Any

import numpy as np

from tscnc_tf import _files
from tscnc_tf.datasets import images
from tscnc_tf.datasets.arrays import Raw

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
PACKED = tuple(f"{s}_{p}" for s in ("train", "test") for p in ("bytes", "offsets", "labels"))


def read(path: pathlib.Path, image_size: tuple[int, int] | None) -> Raw:
    """Read arrays of pixels or packed image files; see `tscnc_tf.datasets.load` for the entries.

    The i-th packed file is at `train_offsets[i]` to `train_offsets[i + 1]` of `train_bytes`.

    Raises:
        ValueError: the file is damaged, lacks entries, or has entries that can't be read.
    """
    entries = _entries(path)
    names = entries.get("class_names")
    class_names = None if names is None else tuple(str(name) for name in np.asarray(names).ravel())
    if set(ARRAYS) <= set(entries):
        return Raw(*(entries[key] for key in ARRAYS), class_names=class_names)
    if set(PACKED) <= set(entries):
        files = _PackedFiles(path, entries)
        decoded = np.asarray(images.stored(files, image_size))
        train, test = np.split(decoded, [files.counts["train"]])
        labels = entries["train_labels"], entries["test_labels"]
        return Raw(train, labels[0], test, labels[1], class_names=class_names)
    raise ValueError(
        f"{path} must hold {', '.join(ARRAYS)} (or packed image files: {', '.join(PACKED)}), "
        f"got {', '.join(sorted(entries)) or 'nothing'}."
    )


def _entries(path: pathlib.Path) -> dict[str, Any]:
    known = {*ARRAYS, *PACKED, "class_names"}
    try:
        # NumPy would not close a file that it opens itself if that is damaged.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            _files.require_memory(path, file.zip)
            return {key: file[key] if key in known else None for key in file.files}
    except _files.TooLargeError:
        raise
    except (
        *(OSError, ValueError, EOFError, AttributeError, TypeError),
        *(zipfile.BadZipFile, zlib.error, MemoryError, NotImplementedError),
    ) as error:
        raise ValueError(
            f"{path} can't be read as an .npz file of plain arrays: {error}. Arrays of Python "
            "objects are refused, as loading them can run any code."
        ) from error


class _PackedFiles:
    """The image files in an .npz file: those of the training part, then those of the test part."""

    def __init__(self, path: pathlib.Path, entries: dict[str, Any]) -> None:
        self._path = path
        self._parts = {
            split: (entries[f"{split}_bytes"], _offsets(path, entries, split))
            for split in ("train", "test")
        }
        self.counts = {split: len(offsets) - 1 for split, (_, offsets) in self._parts.items()}

    def __len__(self) -> int:
        return sum(self.counts.values())

    def open(self, index: int) -> io.BytesIO:
        split, place = self._find(index)
        content, offsets = self._parts[split]
        return io.BytesIO(content[offsets[place] : offsets[place + 1]])

    def name(self, index: int) -> str:
        split, place = self._find(index)
        return f"{self._path}: image {place} of {split}_bytes"

    def _find(self, index: int) -> tuple[str, int]:
        count = self.counts["train"]
        return ("train", index) if index < count else ("test", index - count)


def _offsets(path: pathlib.Path, entries: dict[str, Any], split: str) -> list[int]:
    """Return the offsets of the files of a part, and the end of the last one."""
    content, offsets = entries[f"{split}_bytes"], entries[f"{split}_offsets"]
    if content.dtype != np.uint8 or content.ndim != 1:
        raise ValueError(
            f"{path}: {split}_bytes must be a row of uint8, got {content.dtype} of shape "
            f"{content.shape}."
        )
    fits = offsets.ndim == 1 and np.issubdtype(offsets.dtype, np.integer) and len(offsets) > 1
    if not fits or offsets[0] < 0 or offsets[-1] > len(content) or np.any(np.diff(offsets) <= 0):
        raise ValueError(
            f"{path}: {split}_offsets must rise from 0 to the length of {split}_bytes, "
            f"{len(content):,}: one integer more than there are images."
        )
    return offsets.tolist()
