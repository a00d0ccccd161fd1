"""Folders of images: a folder for each class, or as in tiny-imagenet."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from tscnc_tf import _files
from tscnc_tf.datasets import images
from tscnc_tf.datasets.arrays import Raw

ANNOTATIONS = pathlib.PurePath("val", "val_annotations.txt")


def read(folder: pathlib.Path, image_size: tuple[int, int] | None) -> Raw:
    """Read a folder of class folders.

    Either `train/<class>/*` with `test/<class>/*` or `val/<class>/*` (the first of them that has
    class folders), or `<class>/*`. Classes are numbered in the order of their names, and images lie
    anywhere inside their class folder.

    Raises:
        ValueError: there are no classes, a class has no images, an image can't be read, or a
            symbolic link leads out of the folder.
    """
    if (folder / ANNOTATIONS).is_file():
        return read_tiny_imagenet(folder, image_size)
    root = folder / "train" if (folder / "train").is_dir() else folder
    classes = _folders(root)
    if not classes:
        raise ValueError(
            f"{root} has no class folders: images belong into {root}/<class>/, a folder per class."
        )
    train = [(_below(folder, root / name), label) for label, name in enumerate(classes)]
    held_out = [folder / name for name in ("test", "val") if root != folder]
    test_root = next((path for path in held_out if _folders(path)), None)
    if test_root is None:
        return _raw(folder, train, None, tuple(classes), image_size)
    found = _folders(test_root)
    if unknown := sorted(set(found) - set(classes)):
        raise ValueError(
            f"{test_root} has the class folder {unknown[0]!r}, which {root} has not: its classes "
            f"are {', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}."
        )
    test = [(_below(folder, test_root / name), classes.index(name)) for name in found]
    return _raw(folder, train, test, tuple(classes), image_size)


def read_tiny_imagenet(folder: pathlib.Path, image_size: tuple[int, int] | None) -> Raw:
    """Read the unpacked folder tiny-imagenet-200; its validation images are the test.

    Classes are numbered in the order of their WordNet ids, and named as in words.txt.

    Raises:
        FileNotFoundError: it has no train/ or no val/val_annotations.txt.
        ValueError: an annotation names no class, an image is missing or can't be read, or a path
            or symbolic link leads out of the folder.
    """
    for part in (pathlib.PurePath("train"), ANNOTATIONS):
        if not (folder / part).exists():
            raise FileNotFoundError(
                f"{folder} has no {part.as_posix()}: it must be the unpacked folder "
                "tiny-imagenet-200, of http://cs231n.stanford.edu/tiny-imagenet-200.zip."
            )
    ids = _folders(folder / "train")
    numbers = {wnid: label for label, wnid in enumerate(ids)}
    train = [(_below(folder, folder / "train" / wnid), numbers[wnid]) for wnid in ids]
    test = []
    for line in (folder / ANNOTATIONS).read_text(encoding="utf-8").splitlines():
        file, wnid = (*line.split("\t"), "")[:2]
        if wnid not in numbers:
            raise ValueError(
                f"{folder / ANNOTATIONS} has the line {line!r}, whose second column names none of "
                f"the {len(ids)} folders of {folder / 'train'}."
            )
        path = pathlib.PurePath("val", "images", file)
        _files.require_inside(folder, folder / path)
        test.append(([path.as_posix()], numbers[wnid]))
    return _raw(folder, train, test, _words(folder, ids), image_size)


# Paths of files, relative to the data set, with the label that they have.
_Groups = Sequence[tuple[Sequence[str], int]]


class _Files:
    """Image files below a folder. Their paths are kept as bytes, as there may be millions."""

    def __init__(self, root: pathlib.Path, groups: _Groups) -> None:
        self._root = root
        self._paths = np.concatenate(
            [np.array([os.fsencode(path) for path in paths]) for paths, _ in groups]
        )

    def __len__(self) -> int:
        return len(self._paths)

    def content(self, index: int) -> bytes:
        return self._path(index).read_bytes()

    def name(self, index: int) -> str:
        return str(self._path(index))

    def _path(self, index: int) -> pathlib.Path:
        return self._root / os.fsdecode(self._paths[index])


def _raw(
    root: pathlib.Path,
    train: _Groups,
    test: _Groups | None,
    names: tuple[str, ...],
    image_size: tuple[int, int] | None,
) -> Raw:
    """Return the images as they are stored: if any is in colour, all have three channels."""
    pixels = images.stored(_Files(root, [*train, *(test or ())]), image_size)
    y_train = _labels(train)
    if test is None:
        return Raw(pixels, y_train, class_names=names)
    count = len(y_train)
    return Raw(*(pixels[:count], y_train, pixels[count:], _labels(test)), class_names=names)


def _labels(groups: _Groups) -> np.ndarray:
    return np.repeat([label for _, label in groups], [len(paths) for paths, _ in groups])


def _folders(folder: pathlib.Path) -> list[str]:
    if not folder.is_dir():
        return []
    entries = (entry for entry in folder.iterdir() if entry.is_dir())
    return sorted(entry.name for entry in entries if not entry.name.startswith("."))


def _below(root: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """Return the paths, relative to `root`, of the images below a class folder; in their order."""
    found = []
    _files.require_inside(root, folder)
    for place, folders, files in os.walk(folder):
        for path in (pathlib.Path(place, name) for name in folders):
            if path.is_symlink():
                raise ValueError(
                    f"{path} is a symbolic link to a folder, which is not followed inside of a "
                    "class folder: put the images there, or remove it."
                )
        for path in (pathlib.Path(place, name) for name in files):
            if path.suffix.lower() in images.SUFFIXES and not path.name.startswith("."):
                if path.is_symlink():
                    _files.require_inside(root, path)
                found.append(path.relative_to(root).as_posix())
    if not found:
        raise ValueError(
            f"{folder} holds no images ({', '.join(sorted(images.SUFFIXES))}): fill or remove it."
        )
    return sorted(found)


def _words(folder: pathlib.Path, ids: list[str]) -> tuple[str, ...]:
    file = folder / "words.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    words = dict(line.split("\t", 1) for line in lines if "\t" in line)
    return tuple(words.get(wnid, wnid) for wnid in ids)
