"""Readers of the data sets with a name."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tscnc_tf import _files, _keras
from tscnc_tf._extras import require_extra
from tscnc_tf.datasets import folders, idx
from tscnc_tf.datasets.arrays import Raw

_GOOGLE = "https://storage.googleapis.com/tensorflow/tf-keras-datasets"
_TORONTO = "https://www.cs.toronto.edu/~kriz"


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# The names of the classes, in the order of their labels.
DIGITS = _names("0 1 2 3 4 5 6 7 8 9")
CIFAR10 = _names("airplane automobile bird cat deer dog frog horse ship truck")
FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
CIFAR100 = _names(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
    cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
    lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """
)


class KerasSet(NamedTuple):
    """A data set of `keras.datasets`.

    Attributes:
        files: the path of each file, relative to Keras' home, by the URL that it is downloaded
            from.
        class_names: in the order of the labels.
        augmentation: the default augmentation.
    """

    files: dict[str, str]
    class_names: tuple[str, ...]
    augmentation: str


KERAS_SETS = {
    "mnist": KerasSet({f"{_GOOGLE}/mnist.npz": "datasets/mnist.npz"}, DIGITS, "crop"),
    "fashion_mnist": KerasSet(
        {
            f"{_GOOGLE}/{file}": f"datasets/fashion-mnist/{file}"
            for kind in ("labels-idx1", "images-idx3")
            for file in (f"train-{kind}-ubyte.gz", f"t10k-{kind}-ubyte.gz")
        },
        FASHION,
        "crop_and_flip",
    ),
    "cifar10": KerasSet(
        {f"{_TORONTO}/cifar-10-python.tar.gz": "datasets/cifar-10-batches-py-target_archive"},
        CIFAR10,
        "crop_and_flip",
    ),
    "cifar100": KerasSet(
        {f"{_TORONTO}/cifar-100-python.tar.gz": "datasets/cifar-100-python-target_archive"},
        CIFAR100,
        "crop_and_flip",
    ),
}
SVHN_FILES = ("train_32x32.mat", "test_32x32.mat")
NAMES = ("digits", *KERAS_SETS, "svhn", "tiny-imagenet")
# Data sets that can be read from IDX files, and those that accept the argument `folder`.
IN_IDX = ("mnist", "fashion_mnist")
IN_FOLDERS = (*IN_IDX, "svhn", "tiny-imagenet")
# The folder of the IDX files of Debian's package dataset-fashion-mnist.
FASHION_PACKAGE = pathlib.Path("/usr/share/datasets/fashion-mnist")
_IDX_WAY = "Or give the folder with its four IDX files as folder=... "
# Other sources of a data set of Keras, for the error if it is missing.
_OTHER_WAYS = {
    "mnist": _IDX_WAY,
    "fashion_mnist": (
        "Or install Debian's package: apt-get install dataset-fashion-mnist, which is found in "
        f"{FASHION_PACKAGE}. {_IDX_WAY}"
    ),
}


def read(name: str, folder: pathlib.Path | None, image_size: tuple[int, int] | None) -> Raw:
    """Read a data set by its name.

    Raises:
        FileNotFoundError: its files are missing; the message says which, and where to put them.
        ImportError: the library that reads it is not installed.
        ValueError: a file is damaged.
    """
    if name == "digits":
        return _digits()
    if name == "fashion_mnist" and folder is None and idx.holds(FASHION_PACKAGE):
        folder = FASHION_PACKAGE
    if name in IN_IDX and folder is not None:
        return _known(name, idx.read(folder))
    if name in KERAS_SETS:
        return _known(name, _from_keras(name))
    if name == "svhn":
        return _svhn(folder)
    return _tiny_imagenet(folder, image_size)


def _digits() -> Raw:
    """Read scikit-learn's 1,797 digits of 8x8 pixels, 0 to 16."""
    data = require_extra("sklearn.datasets", "datasets").load_digits()
    pixels = (data.images / 16.0).astype(np.float32)
    return Raw(pixels, data.target, class_names=DIGITS, augmentation="crop")


def _known(name: str, raw: Raw) -> Raw:
    """Return a set of `KERAS_SETS` with its class names and default augmentation."""
    known = KERAS_SETS[name]
    return dataclasses.replace(raw, class_names=known.class_names, augmentation=known.augmentation)


def _from_keras(name: str) -> Raw:
    load_data: Callable[[], Any] = getattr(_keras.keras.datasets, name).load_data
    try:
        (x_train, y_train), (x_test, y_test) = load_data()
    except Exception as error:  # Keras raises a bare Exception if a download fails
        home = pathlib.Path(os.environ.get("KERAS_HOME", "~/.keras"))
        files = KERAS_SETS[name].files
        targets = "; ".join(f"{url} as {home / target}" for url, target in files.items())
        raise FileNotFoundError(
            f"{name} is not on this machine, or damaged, and can't be fetched ({error}). Bring it "
            f"from a machine with internet access: {targets}. {_OTHER_WAYS.get(name, '')}Or pass "
            "the path of an .npz file that holds x_train, y_train, x_test and y_test."
        ) from error
    return Raw(x_train, y_train, x_test, y_test)


def _svhn(folder: pathlib.Path | None) -> Raw:
    """Read the cropped digits of SVHN, in which the label 10 means 0."""
    source = "http://ufldl.stanford.edu/housenumbers"
    parts: list[Any] = []
    for file in SVHN_FILES:
        path = None if folder is None else folder / file
        if path is None or not path.is_file():
            raise FileNotFoundError(
                f"svhn needs {' and '.join(SVHN_FILES)} in a folder, given as folder=..., got "
                f"folder={None if folder is None else str(folder)!r}: fetch {source}/{file}."
            )
        _files.require_inside(path.parent, path)
        parts.extend(_matlab(path))
    return Raw(*parts, class_names=DIGITS, augmentation="crop")


def _matlab(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels `(n, h, w, c)` and labels of one of SVHN's files, which hold `(h, w, c, n)`."""
    scipy = require_extra("scipy.io", "datasets")
    try:
        for _, shape, kind in scipy.whosmat(path):
            itemsize = np.dtype(kind).itemsize if kind in np.sctypeDict else 8
            _files.require_memory(path, math.prod(shape) * itemsize)
        content = scipy.loadmat(path)
        pixels, labels = content["X"], content["y"].ravel()
    except _files.TooLargeError:
        raise
    except Exception as error:  # SciPy's parser raises errors of many kinds
        raise ValueError(f"{path} is damaged, or not a file of SVHN: {error!r}.") from error
    if pixels.ndim != 4:
        raise ValueError(f"{path}: X must be of shape (32, 32, 3, n), got {pixels.shape}.")
    return np.moveaxis(pixels, -1, 0), np.where(labels == 10, 0, labels)


def _tiny_imagenet(folder: pathlib.Path | None, image_size: tuple[int, int] | None) -> Raw:
    if folder is None:
        raise FileNotFoundError(
            "tiny-imagenet needs the unpacked folder tiny-imagenet-200, or its parent, given as "
            "folder=...: fetch http://cs231n.stanford.edu/tiny-imagenet-200.zip."
        )
    inside = folder / "tiny-imagenet-200"
    return folders.read_tiny_imagenet(inside if inside.is_dir() else folder, image_size)
