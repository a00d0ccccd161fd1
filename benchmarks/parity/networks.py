"""The small networks and the examples that attacks are compared on."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np

import tscnc_tf as tscnc

EPSILONS = {"linf": 0.1, "l2": 0.5, "l1": 1.0}
_FACTORS = {"sparsity_factor": 1e-5, "condition_factor": 1e-3}


class Examples(NamedTuple):
    """Images `(n, 8, 8, 1)` in [0, 1] of scikit-learn's digits, and their classes."""

    x: np.ndarray
    y: np.ndarray


def examples(count: int) -> tuple[Examples, Examples]:
    """Return the training examples, and `count` other examples, at most 1,000."""
    data = tscnc.datasets.load("digits", validation=0.02, test=0.56)
    training = Examples(data.x_train.astype("float32"), data.y_train)
    return training, Examples(data.x_test[:count].astype("float32"), data.y_test[:count])


def build() -> Any:
    """Return the network: two convolutions and two dense layers, 35,000 weights."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(8, 3, padding="same", activation="relu", name="stem"),
            layers.Conv2D(16, 3, padding="same", activation="relu", name="conv"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(128, activation="relu", name="dense"),
            layers.Dense(10, name="logits"),
        ]
    )


def _standard(data: Examples, epochs: int) -> Any:
    model = build()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss)
    model.fit(*data, batch_size=64, epochs=epochs, verbose=0)
    return model


def _adversarial(data: Examples, epochs: int, model: Any = None) -> Any:
    """Train `model`, or a new network if it is None, against PGD."""
    attack = tscnc.attacks.PGD(epsilon=EPSILONS["linf"], steps=7)
    trainer = tscnc.AdversarialTraining(
        build() if model is None else model, attack=attack, loss=tscnc.losses.TRADES(beta=3.0)
    )
    trainer.compile(keras.optimizers.Adam(2e-3))
    trainer.fit(*data, batch_size=64, epochs=epochs, verbose=0)
    return trainer.model


def _pruned(sparsity: float) -> Callable[[Examples, int], Any]:
    def train(data: Examples, epochs: int) -> Any:
        # So that no layer dies: global pruning, and a weight kept in every filter.
        options = {"scope": "global", "structure": tscnc.pruning.Unstructured(min_per_filter=1)}
        pruned = tscnc.prune_now(_adversarial(data, epochs), sparsity, **options)
        return tscnc.strip(_adversarial(data, epochs, pruned))

    return train


def _tscnc(data: Examples, epochs: int) -> Any:
    penalty = tscnc.regularizers.TSCNC(**_FACTORS)
    model = tscnc.pruning.add_regularizers(build(), penalty)
    return tscnc.strip(_adversarial(data, epochs, model))


def _gates(data: Examples, epochs: int) -> Any:
    gated = tscnc.gates.add_gates(_adversarial(data, epochs), sparsity_factor=1e-3)
    return tscnc.gates.fold(_adversarial(data, epochs, gated))


NETWORKS: dict[str, Callable[[Examples, int], Any]] = {
    "standard": _standard,
    "adversarial": _adversarial,
    "pruned 95 %": _pruned(0.95),
    "pruned 99 %": _pruned(0.99),
    "TSCNC": _tscnc,
    "gates": _gates,
}


def trained(name: str, data: Examples, epochs: int, folder: pathlib.Path) -> Any:
    """Return a trained network with plain layers; load it from `folder` if it is there."""
    path = folder / f"{name.replace(' %', '').replace(' ', '-')}.weights.npz"
    model = build()
    if path.exists():
        stored = np.load(path)
        model.set_weights([stored[str(index)] for index in range(len(stored))])
        return model
    keras.utils.set_random_seed(0)
    model.set_weights(NETWORKS[name](data, epochs).get_weights())
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{str(index): array for index, array in enumerate(model.get_weights())})
    return model
