"""Folders of images: a folder for each class, or as in tiny-imagenet."""

from __future__ import annotations

import pathlib

from tscnc_tf.datasets import images
from tscnc_tf.datasets.arrays import Raw

ANNOTATIONS = pathlib.PurePath("val", "val_annotations.txt")


def read(folder: pathlib.Path, image_size: tuple[int, int] | None) -> Raw:
    """Read a folder of class folders.

    Either `train/<class>/*` with `test/<class>/*` or `val/<class>/*` (the first of them that has
    class folders), or `<class>/*`. Classes are numbered in the order of their names, and images lie
    anywhere inside their class folder.

    Raises:
        ValueError: there are no classes, a class has no images, or an image can't be read.
    """
    if (folder / ANNOTATIONS).is_file():
        return read_tiny_imagenet(folder, image_size)
    root = folder / "train" if (folder / "train").is_dir() else folder
    classes = _folders(root)
    if not classes:
        raise ValueError(
            f"{root} has no class folders: images belong into {root}/<class>/, a folder per class."
        )
    train = [(file, label) for label, name in enumerate(classes) for file in _files(root / name)]
    held_out = [folder / name for name in ("test", "val") if root != folder]
    test_root = next((path for path in held_out if _folders(path)), None)
    test = _test_files(test_root, classes) if test_root else None
    return _raw(train, test, tuple(classes), image_size)


def read_tiny_imagenet(folder: pathlib.Path, image_size: tuple[int, int] | None) -> Raw:
    """Read the unpacked folder tiny-imagenet-200; its validation images are the test.

    Classes are numbered in the order of their WordNet ids, and named as in words.txt.

    Raises:
        FileNotFoundError: it has no train/ or no val/val_annotations.txt.
        ValueError: an annotation names no class, or an image is missing or can't be read.
    """
    for part in (pathlib.PurePath("train"), ANNOTATIONS):
        if not (folder / part).exists():
            raise FileNotFoundError(
                f"{folder} has no {part.as_posix()}: it must be the unpacked folder "
                "tiny-imagenet-200, of http://cs231n.stanford.edu/tiny-imagenet-200.zip."
            )
    ids = _folders(folder / "train")
    numbers = {wnid: label for label, wnid in enumerate(ids)}
    train = [(file, numbers[wnid]) for wnid in ids for file in _files(folder / "train" / wnid)]
    test = []
    for line in (folder / ANNOTATIONS).read_text(encoding="utf-8").splitlines():
        file, wnid = (*line.split("\t"), "")[:2]
        if wnid not in numbers:
            raise ValueError(
                f"{folder / ANNOTATIONS} has the line {line!r}, whose second column names none of "
                f"the {len(ids)} folders of {folder / 'train'}."
            )
        test.append((folder / "val" / "images" / file, numbers[wnid]))
    return _raw(train, test, _words(folder, ids), image_size)


def _raw(
    train: list[tuple[pathlib.Path, int]],
    test: list[tuple[pathlib.Path, int]] | None,
    names: tuple[str, ...],
    image_size: tuple[int, int] | None,
) -> Raw:
    """Decode all images together: if any is in colour, all have three channels."""
    files = [file for file, _ in train + (test or [])]
    labels = [label for _, label in train + (test or [])]
    pixels = images.decoded(files, lambda index: str(files[index]), image_size)
    count = len(train)
    if test is None:
        return Raw(pixels, labels, class_names=names)
    return Raw(*(pixels[:count], labels[:count], pixels[count:], labels[count:]), class_names=names)


def _test_files(root: pathlib.Path, classes: list[str]) -> list[tuple[pathlib.Path, int]]:
    found = _folders(root)
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise ValueError(
            f"{root} has the class folder {unknown[0]!r}, which {root.parent / 'train'} has not: "
            f"its classes are {', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}."
        )
    return [(file, classes.index(name)) for name in found for file in _files(root / name)]


def _folders(folder: pathlib.Path) -> list[str]:
    if not folder.is_dir():
        return []
    entries = (entry for entry in folder.iterdir() if entry.is_dir())
    return sorted(entry.name for entry in entries if not entry.name.startswith("."))


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the images below a class folder, ordered by their paths."""
    files = [
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in images.SUFFIXES and not file.name.startswith(".")
    ]
    if not files:
        raise ValueError(
            f"{folder} holds no images ({', '.join(sorted(images.SUFFIXES))}): fill or remove it."
        )
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def _words(folder: pathlib.Path, ids: list[str]) -> tuple[str, ...]:
    file = folder / "words.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    words = dict(line.split("\t", 1) for line in lines if "\t" in line)
    return tuple(words.get(wnid, wnid) for wnid in ids)
