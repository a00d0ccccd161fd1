"""TFRecord files of encoded images and labels, whose records are read in any order."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tscnc_tf import _files
from tscnc_tf.datasets import images
from tscnc_tf.datasets.arrays import Raw

# What the features of an example are called: by TensorFlow Datasets, and by the ImageNet scripts.
FEATURES = (("image", "label"), ("image/encoded", "image/class/label"))
LABELS = "label.labels.txt"  # where TensorFlow Datasets writes the names of the classes
_FILE = re.compile(r"tfrecord|-\d{5}-of-\d{5}$", re.IGNORECASE)
_PART = re.compile(r"(?<![a-z])(train|test|validation|val)(?![a-z])", re.IGNORECASE)
_HELD_OUT = ("test", "validation", "val")
# A record is its length (8 bytes), a checksum of that (4), the example, and a checksum of it (4).
_BEFORE, _AROUND = 12, 16
_AT_ONCE = 1024  # records that are looked at together


class _Scan(NamedTuple):
    """What is known of the records of a file: where their examples begin, their sizes, labels."""

    begins: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray


def is_one(path: pathlib.Path) -> bool:
    """Tell whether a file is called as TFRecord files are."""
    return _FILE.search(path.name) is not None


def holds(folder: pathlib.Path) -> bool:
    """Tell whether a folder has TFRecord files."""
    return bool(_found(folder))


def read(path: pathlib.Path, image_size: tuple[int, int] | None) -> Raw:
    """Read a TFRecord file, or a folder of them.

    In a folder the part is said by a word in the name of each file: train; and test or, if there
    is no such file, validation or val. If no name has one, all are of the training part.

    Raises:
        ValueError: a file is damaged or compressed, its examples are not of images and labels, or
            the names in a folder don't say which part a file is of.
    """
    train, test = ([path], []) if path.is_file() else _parts(path)
    names = _class_names(path if path.is_dir() else path.parent)
    files = [*train, *test]
    features = _features(files[0])
    scans = [_scan(file, features) for file in files]
    pixels = images.stored(_Records(files, scans, features[0]), image_size)
    labels = np.concatenate([scan.labels for scan in scans])
    if not test:
        return Raw(pixels, labels, class_names=names)
    count = sum(len(scan.labels) for scan in scans[: len(train)])
    held_out = pixels[count:], labels[count:]
    return Raw(pixels[:count], labels[:count], *held_out, class_names=names)


class _Records:
    """The images in TFRecord files."""

    def __init__(self, files: Sequence[pathlib.Path], scans: Sequence[_Scan], feature: str) -> None:
        self._files, self._feature = files, feature
        self._begins = np.concatenate([scan.begins for scan in scans])
        self._sizes = np.concatenate([scan.sizes for scan in scans])
        self._ends = np.cumsum([len(scan.begins) for scan in scans])  # indices, of each file

    def __len__(self) -> int:
        return len(self._begins)

    def content(self, index: int) -> bytes:
        with self._files[self._file(index)].open("rb") as stream:
            stream.seek(self._begins[index])
            record = stream.read(self._sizes[index])
        try:
            example = tf.train.Example.FromString(record)
            (content,) = example.features.feature[self._feature].bytes_list.value
        except Exception as error:  # protobuf's own
            raise ValueError(
                "it is not what it was when the data set was loaded: load it anew."
            ) from error
        return content

    def name(self, index: int) -> str:
        file = self._file(index)
        first = self._ends[file - 1] if file else 0
        return f"{self._files[file]}: record {index - first}"

    def _file(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))


def _found(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and is_one(path))


def _parts(folder: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Return the files of the training part and those of the test part."""
    parts: dict[str, list[pathlib.Path]] = {}
    found = _found(folder)
    for path in found:
        _files.require_inside(folder, path)
        words = {word.lower() for word in _PART.findall(path.name)}
        parts.setdefault(words.pop() if len(words) == 1 else "", []).append(path)
    if set(parts) == {""}:
        return found, []
    if "" in parts or "train" not in parts:
        culprit = parts[""][0] if "" in parts else found[0]
        raise ValueError(
            f"{culprit}: the names of TFRecord files must say which part they are of, by one of "
            f"the words train, {', '.join(_HELD_OUT)}, as in mine-train.tfrecord, and there must "
            f"be one of train; got {', '.join(path.name for path in found[:5])}"
            f"{', ...' if len(found) > 5 else ''}."
        )
    held_out = next((word for word in _HELD_OUT if word in parts), None)
    return parts["train"], parts[held_out] if held_out else []


def _class_names(folder: pathlib.Path) -> tuple[str, ...] | None:
    file = folder / LABELS
    if not file.is_file():
        return None
    return tuple(file.read_text(encoding="utf-8").splitlines())


def _features(path: pathlib.Path) -> tuple[str, str]:
    """Return what image and label are called in a file, by its first example."""
    try:
        record = next(iter(tf.data.TFRecordDataset(str(path)).take(1))).numpy()
        features = tf.train.Example.FromString(record).features.feature
    except StopIteration:
        raise ValueError(f"{path} holds no records: remove it.") from None
    except Exception as error:  # TensorFlow's, or protobuf's own
        raise _damaged(path, error) from error
    for image, label in FEATURES:
        if image in features and label in features:
            return image, label
    known = " or ".join(f"{image!r} with {label!r}" for image, label in FEATURES)
    raise ValueError(
        f"{path} must hold examples with the features {known}, the first an encoded image (JPEG, "
        f"PNG), the second its class index; got {', '.join(map(repr, sorted(features)))}."
    )


def _scan(path: pathlib.Path, features: tuple[str, str]) -> _Scan:
    """Read a file once; TensorFlow compares the checksums."""
    image, label = features
    wanted = {
        image: tf.io.FixedLenFeature([], tf.string),
        label: tf.io.FixedLenFeature([], tf.int64),
    }

    def look(records: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.strings.length(records), tf.io.parse_example(records, wanted)[label]

    batches = tf.data.TFRecordDataset(str(path)).batch(_AT_ONCE).map(look)
    parts: list[Any] = []
    try:
        for sizes, labels in batches.as_numpy_iterator():
            parts.append((sizes, labels))
    except tf.errors.OpError as error:
        raise _damaged(path, error) from error
    if not parts:
        raise ValueError(f"{path} holds no records: remove it.")
    sizes, labels = map(np.concatenate, zip(*parts, strict=True))
    ends = np.cumsum(sizes.astype(np.int64) + _AROUND)
    begins = ends - sizes - (_AROUND - _BEFORE)
    return _Scan(begins, sizes, labels)


def _damaged(path: pathlib.Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is damaged, compressed, or holds something else than examples of one image and "
        f"one label each: {error} A compressed file must be written without compression, as its "
        "records are read in any order."
    )
