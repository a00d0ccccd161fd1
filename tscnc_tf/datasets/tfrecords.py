"""Reader of TFRecord files of encoded images and labels, with random access to records."""

from __future__ import annotations

import io
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tscnc_tf import _files
from tscnc_tf.datasets import images
from tscnc_tf.datasets.arrays import Raw

# Names of the features (image, label): of TensorFlow Datasets, and of the ImageNet scripts, which
# count classes from 1.
FEATURES = (("image", "label"), ("image/encoded", "image/class/label"))
LABELS = "label.labels.txt"  # file of class names, as written by TensorFlow Datasets
PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
_FILE = re.compile(
    r"\A(?P<set>.+?)(?P<end>\.tfrecords?(\.gz)?)?(-(?P<shard>\d{5})-of-(?P<shards>\d{5}))?\Z",
    re.IGNORECASE | re.DOTALL,
)
# A record is its length (8 bytes), a checksum of that (4), the example, and a checksum of it (4).
_BEFORE, _AROUND = 12, 16
_AT_ONCE = 1024


class _Scan(NamedTuple):
    """Index of the records of a file: offsets and sizes of their examples in bytes, labels."""

    begins: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray


def is_one(path: pathlib.Path) -> bool:
    """Return whether a file has the name of a TFRecord file."""
    name = _named(path)
    return not path.name.startswith(".") and bool(name["end"] or name["shard"])


def _named(path: pathlib.Path) -> re.Match[str]:
    """Return the parts of a file's name."""
    return next(_FILE.finditer(path.name))  # all groups except the name of the set are optional


def holds(folder: pathlib.Path) -> bool:
    """Return whether a folder has TFRecord files."""
    return any(map(is_one, folder.iterdir()))


def read(path: pathlib.Path, image_size: tuple[int, int] | None) -> Raw:
    """Read a TFRecord file, or a folder of them.

    In a folder, the part of each file is given by a word of `PARTS` in its name. Validation files
    become the test part if there is no test part. A set without such a word is the training part if
    it is the only one.

    Raises:
        ValueError: a file is damaged, missing or compressed; its examples do not hold images and
            labels; or the part of a file can't be derived from its name.
    """
    notes: list[str] = []
    folder = path.parent if path.is_file() else path
    train, test = ([path], []) if path.is_file() else _parts(path, notes)
    names = None
    if (folder / LABELS).is_file():
        names = tuple(_files.read_inside(folder, folder / LABELS).splitlines())
    files = [*train, *test]
    features = _features(files[0])
    scans = [_scan(file, features) for file in files]
    pixels = images.stored(_Records(files, scans, features[0]), image_size)
    labels = np.concatenate([scan.labels for scan in scans])
    if features == FEATURES[1] and labels.min() > 0:
        labels -= 1
        notes.append("labels: counted from 1 in the files")
    count = sum(len(scan.labels) for scan in scans[: len(train)])
    held_out = (pixels[count:], labels[count:]) if test else ()
    parts = (pixels[:count], labels[:count], *held_out)
    return Raw(*parts, class_names=names, notes=tuple(notes))


class _Records:
    """The images in TFRecord files."""

    def __init__(self, files: Sequence[pathlib.Path], scans: Sequence[_Scan], feature: str) -> None:
        self._paths, self._feature = files, feature
        self._begins = np.concatenate([scan.begins for scan in scans])
        self._sizes = np.concatenate([scan.sizes for scan in scans])
        self._ends = np.cumsum([len(scan.begins) for scan in scans])  # indices, of each file

    def __len__(self) -> int:
        return len(self._begins)

    def open(self, index: int) -> io.BytesIO:
        with self._paths[self._file(index)].open("rb") as stream:
            stream.seek(self._begins[index])
            record = stream.read(self._sizes[index])
        try:
            example = tf.train.Example.FromString(record)
            (content,) = example.features.feature[self._feature].bytes_list.value
        except Exception as error:  # protobuf's own
            raise ValueError(
                "it has changed since the data set was loaded: load it again."
            ) from error
        return io.BytesIO(content)

    def name(self, index: int) -> str:
        file = self._file(index)
        first = self._ends[file - 1] if file else 0
        return f"{self._paths[file]}: record {index - first}"

    def _file(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))


def _parts(folder: pathlib.Path, notes: list[str]) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Return the files of the training and the test part; add notes on parts that are not read."""
    sets: dict[str, list[pathlib.Path]] = {}
    for path in sorted(folder.iterdir()):
        if is_one(path):
            if not path.is_file():
                raise ValueError(f"{path} is not a file, or a broken link: remove it.")
            _files.require_inside(folder, path)
            sets.setdefault(_named(path)["set"], []).append(path)
        elif path.is_dir() and not path.name.startswith("."):
            raise ValueError(
                f"{folder} has both TFRecord files and the folder {path.name}: give one of them."
            )
    by_part: dict[str, str] = {}
    for name, paths in sets.items():
        _require_all_shards(paths)
        part = _part(name, alone=len(sets) == 1)
        if part is None or part in by_part:
            raise ValueError(
                f"{paths[0]}: the names of TFRecord files must say which part they are of, by one "
                f"of the words {', '.join(PARTS)}, as in mine-train.tfrecord; got the sets "
                f"{', '.join(sets)}."
            )
        by_part[part] = name
    if "train" not in by_part:
        raise ValueError(f"{folder} must have TFRecord files of train; got {', '.join(sets)}.")
    held_out = [part for part in ("test", "validation") if part in by_part]
    notes += [f"{by_part[part]} is not read, as there is a test part" for part in held_out[1:]]
    return sets[by_part["train"]], sets[by_part[held_out[0]]] if held_out else []


def _part(name: str, *, alone: bool) -> str | None:
    """Return the part of a set of files, by the words in its name; None if it is ambiguous."""
    found = {PARTS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in PARTS}
    if len(found) == 1:
        return found.pop()
    return "train" if alone and not found else None


def _require_all_shards(paths: Sequence[pathlib.Path]) -> None:
    """Raise a ValueError unless a set is one file, or shards 0 to n - 1 of n."""
    names = [_named(path) for path in paths]
    counts = {name["shards"] for name in names}
    if counts == {None}:
        if len(paths) > 1:  # both .tfrecord and .tfrecords
            raise ValueError(f"{paths[0]} and {paths[1].name} differ in the ending: remove one.")
        return
    expected = int(names[0]["shards"] or 0)
    shards = [int(name["shard"] or 0) for name in names]
    if len(counts) > 1 or shards != list(range(expected)):
        raise ValueError(
            f"{paths[0]}: there must be all shards of the set, 0 to {expected - 1} of {expected}, "
            f"and none of another number; got {', '.join(path.name for path in paths[:5])}"
            f"{', ...' if len(paths) > 5 else ''}."
        )


def _features(path: pathlib.Path) -> tuple[str, str]:
    """Return the names of the features of image and label in a file, from its first example."""
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
    """Return the index of a file, which is read once; TensorFlow verifies the checksums."""
    image, label = features
    wanted = {
        image: tf.io.FixedLenFeature([], tf.string),
        label: tf.io.FixedLenFeature([], tf.int64),
    }

    def look(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.strings.length(record), tf.io.parse_single_example(record, wanted)[label]

    # Only one record at a time is in memory.
    batches = tf.data.TFRecordDataset(str(path)).map(look).batch(_AT_ONCE)
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
        f"{path} is damaged, compressed, or holds something other than examples of one image and "
        f"one label each: {error} Write a compressed file again without compression, as records "
        "are read in any order."
    )
