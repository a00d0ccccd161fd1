"""Prepare the images that `run.py` trains on.

    python prepare.py cifar10.npz DATA --validation 5000

The `.npz` has the layout of Keras' data sets: x_train, y_train, x_test, y_test, images as uint8. A
random part of the training set, drawn by the seed, becomes the validation set. Needs NumPy only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
from typing import Any

import numpy as np


def prepare(
    source: pathlib.Path, folder: pathlib.Path, validation: int, seed: int, train: int | None = None
) -> None:
    """Write x and y of "train", "validation" and "test" as `.npy` files, and `data.json`.

    Raises:
        ValueError: there are too few training images.
    """
    with np.load(source) as held:
        x, y, x_test, y_test = (held[k] for k in ("x_train", "y_train", "x_test", "y_test"))
    order = np.random.default_rng(seed).permutation(len(x))
    train = len(x) - validation if train is None else train
    if min(validation, train) < 1 or validation + train > len(x):
        raise ValueError(
            f"{source} has {len(x)} training images, too few for {train} to train on and "
            f"{validation} to validate with; both must be 1 at least."
        )
    parts = {"validation": order[:validation], "train": order[validation : validation + train]}
    arrays = {name: (x[chosen], y[chosen]) for name, chosen in parts.items()}
    write({**arrays, "test": (x_test, y_test)}, folder, {"source": source.name, "seed": seed})


def write(
    arrays: dict[str, tuple[np.ndarray, np.ndarray]], folder: pathlib.Path, about: dict[str, Any]
) -> None:
    """Write the parts as `.npy` files, and `data.json`.

    Args:
        arrays: images and labels of "train", "validation" and "test".
        folder: the folder to write to.
        about: other entries of `data.json`.

    Raises:
        ValueError: images are not uint8.
    """
    for name, (images, _) in arrays.items():
        if images.dtype != np.uint8:
            raise ValueError(f"images must be uint8, those of {name!r} are {images.dtype}.")
    folder.mkdir(parents=True, exist_ok=True)
    for name, (images, labels) in arrays.items():
        np.save(folder / f"x_{name}.npy", images)
        np.save(folder / f"y_{name}.npy", labels.reshape(-1).astype(np.int32))
    about = {
        **about,
        "examples": {name: len(images) for name, (images, _) in arrays.items()},
        "sha256": {
            name: hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
            for name, (images, labels) in arrays.items()
        },
    }
    (folder / "data.json").write_text(json.dumps(about, indent=1) + "\n")


def main() -> None:
    """Parse the command line, and prepare the data."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=pathlib.Path, help="an .npz file")
    parser.add_argument("folder", type=pathlib.Path, help="where to write")
    parser.add_argument("--validation", type=int, default=5000, help="number of validation images")
    parser.add_argument("--train", type=int, help="number of training images; default: all others")
    parser.add_argument("--seed", type=int, default=0, help="seed of the validation set")
    arguments = parser.parse_args()
    prepare(
        arguments.source, arguments.folder, arguments.validation, arguments.seed, arguments.train
    )


if __name__ == "__main__":
    main()
