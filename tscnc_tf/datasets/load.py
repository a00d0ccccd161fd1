"""The function `load`, which reads, checks, resizes and splits a data set."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np

from tscnc_tf import _checks, _files
from tscnc_tf.datasets import arrays, folders, idx, npz, resizing, sources, splits, tfrecords
from tscnc_tf.datasets.dataset import Dataset
from tscnc_tf.datasets.images import StoredImages


def load(
    name_or_path: str | os.PathLike[str],
    *,
    validation: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
    test_seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    image_size: tuple[int, int] | None = None,
    stream: bool = False,
) -> Dataset:
    """Load a data set by its name, or a user's own by its path.

    Names:

    * `"digits"`: scikit-learn's 8x8 digits, which need no internet access.
    * `"mnist"`, `"fashion_mnist"`, `"cifar10"`, `"cifar100"`: by `keras.datasets`, which downloads
      them once. If that fails, the error says which file to put where. The first two are read from
      IDX files in `folder` if that is given; without it, `"fashion_mnist"` is read from
      /usr/share/datasets/fashion-mnist, the folder of Debian's package dataset-fashion-mnist, if
      that exists. The data are the same from all three sources. The classes of `"fashion_mnist"`
      are T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag and Ankle boot.
    * `"svhn"`: train_32x32.mat and test_32x32.mat, in `folder`.
    * `"tiny-imagenet"`: the unpacked folder tiny-imagenet-200, or its parent, as `folder`. Its
      validation images become the test part.

    Paths:

    * an `.npz` file of `x_train`, `y_train`, `x_test`, `y_test`: images `(n, height, width,
      channels)` or `(n, height, width)` as bytes 0 to 255 or as floats in [0, 1]; labels as
      integers or one-hot. Or an `.npz` file of packed JPEG or PNG files: `train_bytes` (all files
      concatenated, uint8), `train_offsets` (the start of each, and the end), `train_labels`, and
      the same for `test`. An entry `class_names` is optional.
    * a folder of IDX files, as those of MNIST: `train-images-idx3-ubyte`,
      `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte` and `t10k-labels-idx1-ubyte` (or
      `train-images.idx3-ubyte` and so on). Names of gzipped files end in `.gz`.
    * a folder of images: `train/<class>/*` and `<class>/*` in `test`, `val`, `validation` or
      `valid`; or only `<class>/*` (or `train/<class>/*`), from which a test part is split off.
      Symbolic links out of the folder are refused.
    * an uncompressed TFRecord file (`.tfrecord`, or `-00000-of-00001` at the end), or a folder of
      them. In a folder, each file name contains the word of its part: train; and test or, if there
      is none, validation. An example holds an encoded image (JPEG, PNG) and its class index, as the
      features `image` and `label` of TensorFlow Datasets, or `image/encoded` and
      `image/class/label`, with classes counted from 0 or 1. A file label.labels.txt with the names
      of the classes is optional.

    Args:
        name_or_path: one of the names, or a path; write `"./mnist"` for a folder with such a name.
        validation: the size of the validation part, split off the training images: a fraction
            below 1, or a count; 0 for none. The split is stratified by class.
        test: the size of the test part likewise, split off before the validation part. It is
            ignored if the source has a test part. (Digits, for example, have none.)
        seed: the seed of the validation split.
        test_seed: the seed of the test split; separate from `seed`, so that experiments with
            different seeds have the same test images, and none trains on test images of another.
        folder: the folder of the files of "svhn" and "tiny-imagenet", which require it, or of the
            IDX files of "mnist" or "fashion_mnist".
        image_size: `(height, width)` to resize to, antialiased; None for no resizing.
        stream: whether images stay in their files, and are decoded and resized on each access, for
            data that do not fit in memory. It is supported for folders of images (including
            tiny-imagenet) and TFRecord files; all results except `fingerprint` are the same, bit
            for bit. All files are opened once here, to read sizes and modes; the check that pixels
            are bytes up to 255, and not 0 and 1, is omitted.

    Returns:
        The data set. Equal input and arguments give equal parts on every machine.

    Raises:
        TypeError, ValueError: an argument is not as described; or the data is damaged, has other
            shapes or values than described, or lacks a class: the message says what and where.
        FileNotFoundError: there is no data set of that name or path, or its files are missing.
        ImportError: a required library is not installed; the message says how to install it.

    Example:
        >>> import tscnc_tf as tscnc
        >>> data = tscnc.datasets.load("digits", validation=200, seed=1)
        >>> data.x_validation.shape
        (200, 8, 8, 1)
        >>> data.provenance
        ('test: 359 of 1,797 images, seed 0', 'validation: 200 of 1,438 training images, seed 1')

    Reference:
        LeCun et al. 1998 (MNIST); Xiao et al. 2017, arXiv 1708.07747 (Fashion-MNIST); Krizhevsky
        2009 (CIFAR); Netzer et al. 2011 (SVHN); Le & Yang 2015 (Tiny ImageNet). Padded crops and
        flips: He et al. 2016, arXiv 1512.03385, section 4.2.
    """
    size = resizing.size(image_size)
    stream = _checks.boolean("stream", stream)
    seed, test_seed = splits.seed(seed), splits.seed(test_seed, "test_seed")
    splits.part_size("validation", validation, 0)  # errors come before anything is read
    splits.part_size("test", test, 0)
    name, raw = _read(name_or_path, folder, size)
    notes = list(raw.notes)
    if not stream:
        test_images = None if raw.x_test is None else np.asarray(raw.x_test)
        raw = dataclasses.replace(raw, x_train=np.asarray(raw.x_train), x_test=test_images)
    elif isinstance(raw.x_train, StoredImages):
        notes.append("images are read from their files when they are needed")
    else:
        raise ValueError(
            "stream is for folders of images and TFRecord files, got stream=True with "
            f"{name_or_path!r}: leave it out."
        )
    raw = arrays.checked(raw)
    if size is not None:
        raw = _resized(raw, size)
        notes.append(f"resized to {size[0]}x{size[1]}, antialiased")
    if raw.x_test is None:
        raw, note = _with_test(raw, test, test_seed)
        notes.append(note)
    count = len(raw.y_train)
    held_out = splits.part_size("validation", validation, count)
    stays, taken = splits.cut("validation", raw.y_train, held_out, seed, splits.VALIDATION)
    if held_out:
        notes.append(f"validation: {held_out:,} of {count:,} training images, seed {seed}")
    return Dataset(
        x_train=raw.x_train[stays] if held_out else raw.x_train,
        y_train=raw.y_train[stays],
        x_validation=raw.x_train[taken],
        y_validation=raw.y_train[taken],
        x_test=raw.x_test,
        y_test=raw.y_test,
        class_names=raw.class_names or (),
        name=name,
        augmentation=raw.augmentation or "none",
        provenance=tuple(notes),
    )


def _read(
    name_or_path: Any, folder: Any, image_size: tuple[int, int] | None
) -> tuple[str, arrays.Raw]:
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(
            f"name_or_path must be a name or a path, got {name_or_path!r} of type "
            f"{type(name_or_path).__name__}."
        )
    if folder is not None and name_or_path not in sources.IN_FOLDERS:
        raise ValueError(
            f"folder is for {', '.join(map(repr, sources.IN_FOLDERS))} only, got "
            f"{folder!r} with {name_or_path!r}. Pass a path of your own as the first argument."
        )
    if name_or_path in sources.NAMES:
        where = None if folder is None else _files.absolute("folder", folder)
        return str(name_or_path), sources.read(str(name_or_path), where, image_size)
    path = _files.absolute("name_or_path", name_or_path)
    if path.is_dir():
        name = path.resolve().name
        if idx.holds(path):
            return name, idx.read(path)
        reader = tfrecords if tfrecords.holds(path) else folders
        return name, reader.read(path, image_size)
    if not path.exists():
        raise FileNotFoundError(
            f"name_or_path must be one of {', '.join(map(repr, sources.NAMES))}, or the path of an "
            ".npz or TFRecord file or of a folder, got "
            f"{str(name_or_path)!r}: there is nothing at that path."
        )
    if path.suffix == ".npz":
        return path.stem, npz.read(path, image_size)
    if not tfrecords.is_one(path):
        raise ValueError(
            "name_or_path must be a folder, an .npz file or a TFRecord file (.tfrecord, or "
            f"-00000-of-00001 at the end), got {str(path)!r}."
        )
    return path.stem, tfrecords.read(path, image_size)


def _resized(raw: arrays.Raw, size: tuple[int, int]) -> arrays.Raw:
    test = None if raw.x_test is None else resizing.resized(raw.x_test, size)
    return dataclasses.replace(raw, x_train=resizing.resized(raw.x_train, size), x_test=test)


def _with_test(raw: arrays.Raw, test: float, seed: int) -> tuple[arrays.Raw, str]:
    """Return data with a test part split off the training part, and a note on the split."""
    count = len(raw.y_train)
    size = splits.part_size("test", test, count)
    if size < 1:
        raise ValueError(f"test must be > 0 where the source has no test part, got {test!r}.")
    stays, taken = splits.cut("test", raw.y_train, size, seed, splits.TEST)
    x, y = raw.x_train, raw.y_train
    split = dataclasses.replace(
        raw, x_train=x[stays], y_train=y[stays], x_test=x[taken], y_test=y[taken]
    )
    return split, f"test: {size:,} of {count:,} images, seed {seed}"
