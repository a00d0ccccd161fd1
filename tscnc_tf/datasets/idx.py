"""IDX files, the format of MNIST: four files in a folder, gzipped or not."""

from __future__ import annotations

import gzip
import math
import pathlib
import zlib

import numpy as np

from tscnc_tf.datasets.arrays import Raw

UBYTE = 8  # the code of the one type of numbers that is read
TYPES = {8: "uint8", 9: "int8", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}
PARTS = tuple((split, kind) for split in ("train", "t10k") for kind in ("images", "labels"))
AXES = {"images": 3, "labels": 1}
SUFFIXES = ("", ".gz")


def holds(folder: pathlib.Path) -> bool:
    """Tell whether a folder has one of the four files."""
    return any(_found(folder, split, kind) for split, kind in PARTS)


def read(folder: pathlib.Path) -> Raw:
    """Read `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the same of `t10k`, the test.

    A name may have a dot in place of the hyphen before "idx", and `.gz` at its end. A file that is
    there with and without `.gz` is read from the latter. Whether it is gzipped is seen from its
    content.

    A file begins with two zero bytes, the type of its numbers (8: unsigned bytes), the number n of
    its axes, and n sizes as big-endian integers of 4 bytes; the numbers follow.

    Raises:
        FileNotFoundError: one of the four files is missing.
        ValueError: a file is damaged, is cut off, or holds something else than images or labels;
            or there are not as many labels as images. The message names the file.

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
    return next((file for file in files if file.is_file()), None)


def _required(folder: pathlib.Path, split: str, kind: str) -> pathlib.Path:
    found = _found(folder, split, kind)
    if found is None:
        raise FileNotFoundError(
            f"{folder} has no {_names(split, kind)[0]}, with or without .gz: a folder of IDX files "
            "needs images and labels of train and of t10k, the test."
        )
    return found


def _array(file: pathlib.Path, axes: int) -> np.ndarray:
    """Return the numbers of a file, which must have so many axes."""
    content = _content(file)
    header = 4 * (1 + axes)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in TYPES:
        raise ValueError(
            f"{file} is not an IDX file: it must begin with the bytes 00 00 08 {axes:02x}, got "
            f"{content[:4].hex(' ') or 'nothing'}."
        )
    if content[2] != UBYTE:
        raise ValueError(f"{file} must hold unsigned bytes, got {TYPES[content[2]]}.")
    if content[3] != axes:
        raise ValueError(f"{file} must hold an array of {axes} axes, got {content[3]}.")
    if len(content) < header:
        raise ValueError(f"{file} is cut off: it ends in its header, after {len(content)} bytes.")
    shape = tuple(np.frombuffer(content[4:header], ">u4").tolist())
    expected, got = math.prod(shape), len(content) - header
    if got != expected:
        fault = "cut off" if got < expected else "damaged"
        raise ValueError(
            f"{file} is {fault}: its header says {' x '.join(map(str, shape))}, {expected:,} "
            f"bytes, and {got:,} follow."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _content(file: pathlib.Path) -> bytes:
    content = file.read_bytes()
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{file} is damaged, or cut off: {error}.") from error
