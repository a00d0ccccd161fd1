"""Reader of folders of images: one folder per class, or the layout of tiny-imagenet."""

from __future__ import annotations

import array
import bisect
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np

from tscnc_tf import _files
from tscnc_tf.datasets import images, tfrecords
from tscnc_tf.datasets.arrays import Raw

ANNOTATIONS = pathlib.PurePath("val", "val_annotations.txt")
PARTS = ("train", "test", "val", "validation", "valid")


def read(folder: pathlib.Path, image_size: tuple[int, int] | None) -> Raw:
    """Read a folder of class folders.

    The layout is `train/<class>/*` with `<class>/*` in `test`, `val`, `validation` or `valid` (the
    first of these that has class folders), or `<class>/*`. Classes are numbered in the order of
    their names; images may be at any depth in their class folder.

    Raises:
        ValueError: there are no classes, or folders named as parts in their place; a class has no
            images, an image can't be read, or a symbolic link is broken or points out of the
            folder.
        OSError: a folder can't be read.
    """
    if (folder / ANNOTATIONS).is_file():
        return read_tiny_imagenet(folder, image_size)
    parts = [part for part in PARTS if part in _folders(folder)]
    root = folder / parts[0] if parts[:1] == ["train"] else folder
    classes = _folders(root)
    if classes and {name.casefold() for name in classes} <= tfrecords.PARTS.keys():
        raise ValueError(
            f"{root} has the folders {', '.join(classes)}, which look like parts of a data set, "
            f"not like classes: name them train and {', '.join(PARTS[1:-1])} or {PARTS[-1]}."
        )
    if not classes:
        raise ValueError(
            f"{root} has no class folders: images belong in {root}/<class>/, one folder per class."
        )
    files = _ImageFiles(folder)
    for label, name in enumerate(classes):
        files.add(root / name, label)
    count = len(files)
    held_out = [folder / part for part in parts[1:] if root != folder and _folders(folder / part)]
    notes = [f"{path.name}/ is not read, as there is {held_out[0].name}/" for path in held_out[1:]]
    for test_root in held_out[:1]:
        found = _folders(test_root)
        if unknown := sorted(set(found) - set(classes)):
            raise ValueError(
                f"{test_root} has the class folder {unknown[0]!r}, which {root} does not have: its "
                f"classes are {', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}."
            )
        for name in found:
            files.add(test_root / name, classes.index(name))
    return files.raw(count, tuple(classes), image_size, notes)


def read_tiny_imagenet(folder: pathlib.Path, image_size: tuple[int, int] | None) -> Raw:
    """Read the unpacked folder tiny-imagenet-200; its validation images become the test part.

    Classes are numbered in the order of their WordNet ids, and named as in words.txt.

    Raises:
        FileNotFoundError: it has no train/ or no val/val_annotations.txt.
        ValueError: an annotation names an unknown class, an image is missing or can't be read, or a
            path or symbolic link is broken or points out of the folder.
    """
    for part in (pathlib.PurePath("train"), ANNOTATIONS):
        if not (folder / part).exists():
            raise FileNotFoundError(
                f"{folder} has no {part.as_posix()}: it must be the unpacked folder "
                "tiny-imagenet-200, of http://cs231n.stanford.edu/tiny-imagenet-200.zip."
            )
    ids = _folders(folder / "train")
    numbers = {wnid: label for label, wnid in enumerate(ids)}
    files = _ImageFiles(folder)
    for wnid in ids:
        files.add(folder / "train" / wnid, numbers[wnid])
    count = len(files)
    annotations = folder / ANNOTATIONS
    for line in _files.read_inside(folder, annotations).splitlines():
        file, wnid = (*line.split("\t"), "")[:2]
        if wnid not in numbers:
            raise ValueError(
                f"{annotations} has the line {line!r}, whose second column names none of the "
                f"{len(ids)} folders of {folder / 'train'}."
            )
        files.add_file(folder / "val" / "images" / file, numbers[wnid])
    if len(files) == count:
        raise ValueError(f"{annotations} is empty: it must name the images of the test part.")
    return files.raw(count, _words(folder, ids), image_size)


class _ImageFiles:
    """Image files below a folder, and their labels.

    As there may be millions, their names are stored as concatenated bytes, and each folder once for
    all files in it that follow each other.
    """

    def __init__(self, root: pathlib.Path) -> None:
        self._root = root
        self._folders: list[str] = []
        self._starts: list[int] = []  # of the first file of each folder
        self._names = bytearray()
        self._ends = array.array("q")
        self._labels = array.array("q")
        self._left_out: list[pathlib.Path] = []

    def add(self, folder: pathlib.Path, label: int) -> None:
        """Add the images at any depth in a class folder, in the order of their paths.

        Raises:
            ValueError: there are none; or an entry is not a file, or links out of the folder.
        """
        _files.require_inside(self._root, folder)
        found = []
        for entry in _entries(folder):
            path = pathlib.Path(entry.path)
            if path.suffix.lower() not in images.SUFFIXES or path.name.startswith("."):
                self._left_out.append(path)
                continue
            if not entry.is_file():
                raise ValueError(f"{path} is not a file, or a broken link: remove it.")
            if entry.is_symlink():
                _files.require_inside(self._root, path)
            found.append(path.relative_to(self._root).as_posix())
        if not found:
            raise ValueError(
                f"{folder} holds no images ({', '.join(sorted(images.SUFFIXES))}): fill or remove "
                "it."
            )
        for name in sorted(found):
            self._add(name, label)

    def add_file(self, path: pathlib.Path, label: int) -> None:
        """Add an image by its path.

        Raises:
            ValueError: it points out of the folder.
        """
        _files.require_inside(self._root, path)
        self._add(path.relative_to(self._root).as_posix(), label)

    def raw(
        self,
        count: int,
        names: tuple[str, ...],
        image_size: tuple[int, int] | None,
        notes: Sequence[str] = (),
    ) -> Raw:
        """Return the images as `StoredImages`, with three channels if any is in colour.

        Args:
            count: the number of training images, which come first.
            names: of the classes.
            image_size: (height, width) to resize to; None for no resizing.
            notes: see `Raw`.
        """
        if left_out := self._left_out:
            first = left_out[0].relative_to(self._root).as_posix()
            notes = [
                *notes,
                f"{len(left_out):,} files are left out, not named as images: {first} ...",
            ]
        pixels = images.stored(self, image_size)
        labels = np.frombuffer(self._labels, np.int64)
        held_out = (pixels[count:], labels[count:]) if len(self) > count else ()
        parts = (pixels[:count], labels[:count], *held_out)
        return Raw(*parts, class_names=names, notes=tuple(notes))

    def __len__(self) -> int:
        return len(self._labels)

    def open(self, index: int) -> BinaryIO:
        return self._path(index).open("rb")

    def name(self, index: int) -> str:
        return str(self._path(index))

    def _add(self, path: str, label: int) -> None:
        folder, _, name = path.rpartition("/")
        if not self._folders or folder != self._folders[-1]:
            self._folders.append(folder)
            self._starts.append(len(self))
        self._names += os.fsencode(name)
        self._ends.append(len(self._names))
        self._labels.append(label)

    def _path(self, index: int) -> pathlib.Path:
        folder = self._folders[bisect.bisect_right(self._starts, index) - 1]
        begin = self._ends[index - 1] if index else 0
        return self._root / folder / os.fsdecode(bytes(self._names[begin : self._ends[index]]))


def _folders(folder: pathlib.Path) -> list[str]:
    """Return the names of the folders in a folder, including links to folders."""
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{path} is a broken link: remove it.")
        if path.is_dir() and not path.name.startswith("."):
            found.append(path.name)
    return sorted(found)


def _entries(folder: str | os.PathLike[str]) -> Iterator[os.DirEntry[str]]:
    """Yield all entries at any depth of a folder, except folders."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(entry.path)
            elif entry.is_symlink() and entry.is_dir():
                raise ValueError(
                    f"{entry.path} is a symbolic link to a folder, which is not followed inside of "
                    "a class folder: put the images there, or remove it."
                )
            else:
                yield entry


def _words(folder: pathlib.Path, ids: list[str]) -> tuple[str, ...]:
    file = folder / "words.txt"
    lines = _files.read_inside(folder, file).splitlines() if file.is_file() else []
    words = dict(line.split("\t", 1) for line in lines if "\t" in line)
    return tuple(words.get(wnid, wnid) for wnid in ids)
