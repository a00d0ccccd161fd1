"""Checks of the arrays of a source: pixels `(n, h, w, c)` of uint8 or float32, labels of int64."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tscnc_tf import _checks
from tscnc_tf.datasets.images import StoredImages


@dataclasses.dataclass(frozen=True)
class Raw:
    """The arrays of a source.

    Attributes:
        x_train, y_train: images (an array or `StoredImages`), and labels.
        x_test, y_test: the same of the test part; None if the source has none.
        class_names: in the order of the labels; None to use the numbers.
        augmentation: the default augmentation; None for "crop" for grey images, else
            "crop_and_flip".
        notes: remarks on how the data were read, for the provenance, one per line.
    """

    x_train: Any
    y_train: Any
    x_test: Any = None
    y_test: Any = None
    _: dataclasses.KW_ONLY
    class_names: tuple[str, ...] | None = None
    augmentation: str | None = None
    notes: tuple[str, ...] = ()


def checked(raw: Raw) -> Raw:
    """Return the arrays with normalised shapes and dtypes, after checking them.

    Raises:
        TypeError: pixels or labels are not of a numeric dtype that is supported.
        ValueError: shapes or values are not as required; the message says which.
    """
    x_train, y_train = _part("train", raw.x_train, raw.y_train)
    if raw.x_test is None:
        x_test, y_test = None, None
    else:
        x_test, y_test = _part("test", raw.x_test, raw.y_test)
        _require_same_kind(x_train, x_test)
    names = raw.class_names
    if names is None:
        # Checked first: a label of a billion would otherwise create a billion names below.
        if y_train.max() >= len(y_train):
            raise ValueError(
                f"y_train holds the label {y_train.max()}, with {len(y_train):,} images: number "
                "the classes 0, 1, 2, ... without gaps."
            )
        names = tuple(str(label) for label in range(int(y_train.max()) + 1))
    _require_all_classes(y_train, y_test, names)
    usual = "crop_and_flip" if x_train.shape[-1] > 1 else "crop"
    return Raw(
        *(x_train, y_train, x_test, y_test),
        class_names=names,
        augmentation=raw.augmentation or usual,
        notes=raw.notes,
    )


def _part(split: str, x: Any, y: Any) -> tuple[Any, np.ndarray]:
    pixels = x if isinstance(x, StoredImages) else _pixels(f"x_{split}", x)
    labels, _ = _checks.class_indices(f"y_{split}", y)
    if len(pixels) != len(labels):
        raise ValueError(
            f"x_{split} has {len(pixels):,} images, but y_{split} has {len(labels):,} labels."
        )
    return pixels, labels


def _pixels(name: str, x: Any) -> np.ndarray:
    array = np.asarray(x)
    if array.ndim == 3:
        array = array[..., np.newaxis]
    if array.ndim != 4:
        raise ValueError(
            f"{name} must hold images of shape (n, height, width, channels), or (n, height, width) "
            f"for grey ones, got shape {array.shape}."
        )
    if not array.size:
        raise ValueError(f"{name} holds no images: its shape is {array.shape}.")
    if array.shape[1] in (1, 3) and array.shape[-1] > 4:
        raise ValueError(
            f"{name} has shape {array.shape}, with the channels first: store "
            f"np.moveaxis({name}, 1, -1)."
        )
    if np.issubdtype(array.dtype, np.floating):
        return _floats(name, array)
    if np.issubdtype(array.dtype, np.integer):
        return _bytes(name, array)
    raise TypeError(f"{name} must hold numbers, uint8 or floats, got {array.dtype}.")


def _floats(name: str, array: np.ndarray) -> np.ndarray:
    low, high = float(array.min()), float(array.max())
    if not (low >= 0.0 and high <= 1.0):  # true for NaN as well
        raise ValueError(
            f"{name} holds floats from {low:g} to {high:g}, and floats must lie in [0, 1]: divide "
            "them by the value of white, or store 0 to 255 as uint8."
        )
    return np.ascontiguousarray(array, np.float32)


def _bytes(name: str, array: np.ndarray) -> np.ndarray:
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 255:
        raise ValueError(
            f"{name} holds integers from {low} to {high}, and integers must lie in 0 to 255."
        )
    if high <= 1:
        raise ValueError(
            f"{name} holds integers up to {high}, which as bytes (0 to 255) are black images. If 1 "
            f"means white, store {name}.astype('float32')."
        )
    return np.ascontiguousarray(array, np.uint8)


def _require_same_kind(train: np.ndarray, test: np.ndarray) -> None:
    if train.shape[1:] != test.shape[1:]:
        raise ValueError(
            f"x_train and x_test must hold images of one shape, got {train.shape[1:]} and "
            f"{test.shape[1:]}."
        )
    if train.dtype != test.dtype:
        raise ValueError(
            f"x_train and x_test must both hold bytes (0 to 255) or both floats in [0, 1], got "
            f"{train.dtype} and {test.dtype}."
        )


def _require_all_classes(y_train: np.ndarray, y_test: Any, names: tuple[str, ...]) -> None:
    classes = len(names)
    for split, labels in (("train", y_train), ("test", y_test)):
        if labels is not None and labels.max() >= classes:
            raise ValueError(
                f"y_{split} holds the label {labels.max()}, but there are {classes} classes, 0 to "
                f"{classes - 1}."
            )
    if classes < 2:
        raise ValueError(f"y_train must hold 2 classes or more, got {classes}.")
    absent = np.flatnonzero(np.bincount(y_train, minlength=classes) == 0)
    if len(absent):
        shown = ", ".join(names[label] for label in absent[:5])
        raise ValueError(
            f"y_train has no example of {len(absent)} of {classes} classes ({shown}"
            f"{', ...' if len(absent) > 5 else ''}): number the classes 0, 1, 2, ... without gaps, "
            "and give each a training image."
        )
