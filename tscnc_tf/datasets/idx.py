"""Reader of IDX files, the format of MNIST: four files in a folder, gzipped or not."""

from __future__ import annotations

import gzip
import io
import math
import pathlib
import zlib

import numpy as np

from tscnc_tf import _files
from tscnc_tf.datasets.arrays import Raw

UBYTE = 8  # the type code of unsigned bytes, the only supported type
TYPES = {8: "uint8", 9: "int8", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}
PARTS = tuple((split, kind) for split in ("train", "t10k") for kind in ("images", "labels"))
AXES = {"images": 3, "labels": 1}
SUFFIXES = ("", ".gz")


def holds(folder: pathlib.Path) -> bool:
    """Return whether a folder has one of the four files."""
    return any(_found(folder, split, kind) for split, kind in PARTS)


def read(folder: pathlib.Path) -> Raw:
    """Read `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, and the same of `t10k` (test).

    A name may have a dot in place of the hyphen before "idx", and end in `.gz`; of two files with
    and without `.gz`, the latter is read. Compression is detected from the content.

    A file begins with two zero bytes, the type of its numbers (8: unsigned bytes), the number n of
    its axes, and n sizes as big-endian integers of 4 bytes; the numbers follow.

    Raises:
        FileNotFoundError: one of the four files is missing.
        ValueError: a file is damaged or cut off, or does not hold images or labels; or the numbers
            of labels and images differ. The message names the file.

    Reference:
        LeCun, Cortes & Burges, "The MNIST database of handwritten digits", file formats.
    """
    parts = []
    for split in ("train", "t10k"):
        files = [_required(folder, split, kind) for kind in ("images", "labels")]
        images, labels = (
            _array(file, AXES[kind]) for file, kind in zip(files, ("images", "labels"), strict=True)
        )
        if len(images) != len(labels):
            raise ValueError(
                f"{files[0]} holds {len(images):,} images, but {files[1]} {len(labels):,} labels: "
                "they must be of the same set."
            )
        parts += [images, labels]
    return Raw(*parts)


def _names(split: str, kind: str) -> list[str]:
    return [
        f"{split}-{kind}{mark}idx{AXES[kind]}-ubyte{suffix}"
        for suffix in SUFFIXES
        for mark in ("-", ".")
    ]


def _found(folder: pathlib.Path, split: str, kind: str) -> pathlib.Path | None:
    files = (folder / name for name in _names(split, kind))
    found = next((file for file in files if file.is_file()), None)
    if found is not None:
        _files.require_inside(folder, found)
    return found


def _required(folder: pathlib.Path, split: str, kind: str) -> pathlib.Path:
    found = _found(folder, split, kind)
    if found is None:
        raise FileNotFoundError(
            f"{folder} has no {_names(split, kind)[0]}, with or without .gz: a folder of IDX files "
            "needs images and labels of train and of t10k (test)."
        )
    return found


def _array(file: pathlib.Path, axes: int) -> np.ndarray:
    """Return the array of a file, which must have the given number of axes."""
    try:
        with _opened(file) as stream:
            return _parsed(file, stream, axes)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file} is damaged, or cut off: {error}.") from error


def _opened(file: pathlib.Path) -> io.BufferedIOBase:
    with file.open("rb") as stream:
        is_packed = stream.read(2) == b"\x1f\x8b"
    return gzip.open(file) if is_packed else file.open("rb")


def _parsed(file: pathlib.Path, stream: io.BufferedIOBase, axes: int) -> np.ndarray:
    """Return the array of an open file; at most one byte more than its header says is unpacked."""
    size = 4 * (1 + axes)
    header = stream.read(size)
    if len(header) < 4 or header[:2] != b"\0\0" or header[2] not in TYPES:
        raise ValueError(
            f"{file} is not an IDX file: it must begin with the bytes 00 00 08 {axes:02x}, got "
            f"{header[:4].hex(' ') or 'nothing'}."
        )
    if header[2] != UBYTE:
        raise ValueError(f"{file} must hold unsigned bytes, got {TYPES[header[2]]}.")
    if header[3] != axes:
        raise ValueError(f"{file} must hold an array of {axes} axes, got {header[3]}.")
    if len(header) < size:
        raise ValueError(f"{file} is cut off: it ends in its header, after {len(header)} bytes.")
    shape = tuple(np.frombuffer(header[4:], ">u4").tolist())
    expected = math.prod(shape)
    _files.require_memory(file, expected)
    content = stream.read(expected + 1)
    if len(content) != expected:
        is_short = len(content) < expected
        raise ValueError(
            f"{file} is {'cut off' if is_short else 'damaged'}: its header says "
            f"{' x '.join(map(str, shape))}, {expected:,} bytes, and "
            f"{f'{len(content):,}' if is_short else 'more'} follow."
        )
    return np.frombuffer(content, np.uint8).reshape(shape)
