"""The class `Dataset`: training, validation and test parts, as arrays and as batches."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, final

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _reports, callbacks
from tscnc_tf.datasets import pipeline, pixels, splits
from tscnc_tf.datasets.augmentation import AUGMENTATIONS
from tscnc_tf.datasets.images import StoredImages

SPLITS = ("train", "validation", "test")


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Images and labels in three disjoint parts, as returned by `tscnc_tf.datasets.load`.

    Pixels are stored as uint8 (0 to 255) or as float32 in [0, 1], depending on the source; methods
    return float32 in [0, 1] in either case. The arrays are read-only.

    Attributes:
        x_train, x_validation, x_test: `(n, height, width, channels)`; arrays, or `StoredImages`,
            which are read from their files when they are needed.
        y_train, y_validation, y_test: class indices `(n,)`, int64.
        class_names: in the order of the labels.
        name: the name of the data set.
        augmentation: the default of `training`.
        provenance: the processing steps since the data were read, one per line.

    Raises:
        TypeError: images are neither arrays nor `StoredImages`, or labels are not arrays.

    Example:
        >>> import tscnc_tf as tscnc
        >>> data = tscnc.datasets.load("digits")
        >>> data
        Dataset(digits: 1,294 training, 144 validation and 359 test images, 8x8x1 as float32, \
10 classes, augmentation 'crop')
        >>> batches = data.training(batch_size=64, epochs=2)
        >>> int(batches.cardinality()) == 2 * data.steps_per_epoch(64)
        True
    """

    x_train: np.ndarray | StoredImages
    y_train: np.ndarray
    x_validation: np.ndarray | StoredImages
    y_validation: np.ndarray
    x_test: np.ndarray | StoredImages
    y_test: np.ndarray
    class_names: tuple[str, ...]
    name: str
    augmentation: str
    provenance: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for split in SPLITS:
            for field in (f"x_{split}", f"y_{split}"):
                array = getattr(self, field)
                if field.startswith("x") and isinstance(array, StoredImages):
                    continue
                if not isinstance(array, np.ndarray):
                    raise TypeError(
                        f"{field} must be a NumPy array, got a {type(array).__name__}. To load "
                        "data from a name or a path, call datasets.load."
                    )
                array = array.view()
                array.setflags(write=False)
                object.__setattr__(self, field, array)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self.x_train.shape[1:]

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The SHA-256 digest of all arrays: of pixels, labels and splits.

        It is equal on every machine, except for JPEG files whose decoders differ in the last bit.
        For `StoredImages` it covers the encoded files instead, all of which are read.
        """
        fields = [f"{kind}_{split}" for split in SPLITS for kind in ("x", "y")]
        parts = ((field, getattr(self, field)) for field in fields)
        return _reports.digest(
            (field, part.digest() if isinstance(part, StoredImages) else part)
            for field, part in parts
        )

    @property
    def metadata(self) -> dict[str, Any]:
        """The description of the data in manifests, as JSON values."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "image_shape": list(self.image_shape),
            "classes": self.classes,
            "images": {split: len(self._part(split)[1]) for split in SPLITS},
            "augmentation": self.augmentation,
            "provenance": list(self.provenance),
        }

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the number of full batches of an epoch; the remaining examples are left out.

        Raises:
            ValueError: there are fewer training images than `batch_size`.
        """
        size = _checks.integer("batch_size", batch_size, minimum=1)
        if size > len(self.y_train):
            raise ValueError(
                f"batch_size must be <= {len(self.y_train):,}, the number of training images, "
                f"got {size:,}."
            )
        return len(self.y_train) // size

    def training(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        augment: str | None = None,
        first_epoch: int = 0,
        epochs: int | None = None,
        position: callbacks.DataPosition | None = None,
    ) -> tf.data.Dataset:
        """Return training batches: shuffled in every epoch, augmented, of one fixed shape.

        A batch depends only on the seed, the number of the epoch and its index in the epoch: a run
        that was stopped after epoch e and resumes with `first_epoch=e` gets the same batches, bit
        for bit. The last examples of an epoch that do not fill a batch are left out; they differ
        from epoch to epoch. Pass `shuffle=False` to `fit`, since Keras 3 warns for any `tf.data`
        dataset otherwise.

        The batches are gathered from a copy of the training part, which is freed with the dataset.
        `StoredImages` are read from their files by several threads, ahead of the model, with the
        same batches bit for bit.

        A crop moves the image by up to 4 pixels of 32 (in proportion for other sizes, at least
        1) in each direction, with black at the border; a flip mirrors half of the images left to
        right.

        Args:
            batch_size: the number of examples of a batch.
            seed: the seed of orders and augmentation, >= 0.
            augment: "crop", "flip", "crop_and_flip" or "none"; None for `self.augmentation`.
            first_epoch: the number of the first epoch, counted from 0.
            epochs: the number of epochs; None for an infinite dataset, for which `fit` needs
                `steps_per_epoch=`. (Without `steps_per_epoch`, each epoch of `fit` iterates over
                the whole finite dataset from its beginning, in the same orders.)
            position: a callback of `fit` by which the data begin where the optimizer is; without
                `first_epoch` and `epochs`.

        Returns:
            A dataset of pairs x `(batch_size, height, width, channels)`, float32 in [0, 1], and
            class indices y `(batch_size,)`, int64.

        Raises:
            TypeError, ValueError: an argument is not as described.

        Example:
            >>> import keras
            >>> import tscnc_tf as tscnc
            >>> data = tscnc.datasets.load("digits")
            >>> model = keras.Sequential(
            ...     [keras.Input(data.image_shape), keras.layers.Flatten(), keras.layers.Dense(10)])
            >>> model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
            >>> history = model.fit(
            ...     data.training(64), epochs=2, steps_per_epoch=data.steps_per_epoch(64),
            ...     validation_data=data.evaluation("validation"), shuffle=False, verbose=0)
        """
        self.steps_per_epoch(batch_size)  # checks it
        if augment is None:
            augment = self.augmentation
        if epochs is not None:
            epochs = _checks.integer("epochs", epochs, minimum=1)
        first_epoch = _checks.integer("first_epoch", first_epoch, minimum=0)
        if not isinstance(position, callbacks.DataPosition | None):
            raise TypeError(
                f"position must be a callbacks.DataPosition, got {position!r}. For a number of "
                "epochs pass first_epoch=."
            )
        if position is not None and (first_epoch or epochs is not None):
            raise ValueError(
                f"position gives the first batch of data without an end, but first_epoch is "
                f"{first_epoch} and epochs {epochs}: leave them out, or leave out position."
            )
        return pipeline.training(
            self.x_train,
            self.y_train,
            batch_size=int(batch_size),
            seed=splits.seed(seed),
            augment=_checks.one_of("augment", augment, AUGMENTATIONS),
            first_epoch=first_epoch,
            epochs=epochs,
            position=position,
        )

    def evaluation(self, split: str = "test", batch_size: int = 256) -> tf.data.Dataset:
        """Return the batches of a part in order, all examples, without augmentation.

        Args:
            split: "test", "validation" or "train".
            batch_size: the size of all batches except the last, which may be smaller.

        Raises:
            ValueError: there is no such part, or it is empty.

        Example:
            >>> import tscnc_tf as tscnc
            >>> batches = tscnc.datasets.load("digits").evaluation("test", batch_size=100)
            >>> [len(y) for _, y in batches]
            [100, 100, 100, 59]
        """
        size = _checks.integer("batch_size", batch_size, minimum=1, maximum=2**31 - 1)
        return pipeline.evaluation(*self._filled(split), size)

    def arrays(self, split: str = "test") -> tuple[np.ndarray, np.ndarray]:
        """Return a part as x, float32 in [0, 1], and class indices y; in the order of `evaluation`.

        If pixels are stored as uint8, x is a new array with four times the bytes.

        Args:
            split: "test", "validation" or "train".

        Raises:
            ValueError: there is no such part, it is empty, or it exceeds the machine's memory.

        Example:
            >>> import tscnc_tf as tscnc
            >>> x, y = tscnc.datasets.load("digits").arrays("test")
            >>> x.shape, x.dtype.name, float(x.max())
            ((359, 8, 8, 1), 'float32', 1.0)
        """
        x, y = self._filled(split)
        pixels.require_memory(f"the {split} part of {self.name}", x.shape)
        return pixels.as_floats(np.asarray(x)), y

    def channel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of each channel over the training part only.

        They hold for pixels in [0, 1], and are computed in float64. The deviation has the divisor
        n, not n - 1.
        """
        return self._statistics

    @functools.cached_property
    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return pixels.statistics(self.x_train)

    def subset(
        self,
        n_train: int | None = None,
        n_test: int | None = None,
        *,
        n_validation: int | None = None,
        seed: int = 0,
    ) -> Dataset:
        """Return a stratified subset.

        Args:
            n_train: the number of examples of the training part to keep; None for all.
            n_test: likewise of the test part.
            n_validation: likewise of the validation part.
            seed: the seed of the choice.

        Raises:
            ValueError: a number exceeds the part, or is too small for one training image per class.

        Example:
            >>> import tscnc_tf as tscnc
            >>> small = tscnc.datasets.load("digits").subset(100, 50)
            >>> len(small.y_train), len(small.y_test)
            (100, 50)
        """
        seed = splits.seed(seed)
        parts: dict[str, Any] = {}
        notes = []
        for split, size, stream in (
            ("train", n_train, splits.SUBSET_TRAIN),
            ("validation", n_validation, splits.SUBSET_VALIDATION),
            ("test", n_test, splits.SUBSET_TEST),
        ):
            if size is None:
                continue
            x, y = self._part(split)
            name = f"n_{split}"
            size = _checks.integer(name, size, minimum=0)
            kept = splits.sample(name, y, size, seed, stream, every_class=split == "train")
            parts |= {f"x_{split}": x[kept], f"y_{split}": y[kept]}
            notes.append(f"{split}: {size:,} of {len(y):,} images kept, seed {seed}")
        return dataclasses.replace(self, **parts, provenance=(*self.provenance, *notes))

    def _part(self, split: str) -> tuple[np.ndarray | StoredImages, np.ndarray]:
        _checks.one_of("split", split, SPLITS)
        return getattr(self, f"x_{split}"), getattr(self, f"y_{split}")

    def _filled(self, split: str) -> tuple[np.ndarray | StoredImages, np.ndarray]:
        x, y = self._part(split)
        if not len(y):
            raise ValueError(
                f"the {split} part of {self.name} is empty: load the data set with one, as by "
                "validation=0.1."
            )
        return x, y

    def __repr__(self) -> str:
        train, validation, test = (len(self._part(split)[1]) for split in SPLITS)
        size = "x".join(str(side) for side in self.image_shape)
        return (
            f"Dataset({self.name}: {train:,} training, {validation:,} validation and {test:,} test "
            f"images, {size} as {self.x_train.dtype}, {self.classes} classes, augmentation "
            f"{self.augmentation!r})"
        )
