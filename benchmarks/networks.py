"""Networks for the benchmarks, which return logits: those used for CIFAR-10, and MLPs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tf_keras

from tscnc_tf import applications

CLASSES = 10


def tiny() -> Any:
    """Return a network of one convolution and the logits on 8x8 inputs, for smoke runs."""
    layers = tf_keras.layers
    return tf_keras.Sequential(
        [
            layers.InputLayer(input_shape=(8, 8, 3)),
            layers.Conv2D(4, 3, padding="same", use_bias=False, name="stem"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(CLASSES, name="logits"),
        ],
        name="tiny",
    )


def mlp(units: int) -> Any:
    """Return an MLP with two hidden layers on 784 inputs, such as images of 28x28 pixels."""
    layers = tf_keras.layers
    return tf_keras.Sequential(
        [
            layers.InputLayer(input_shape=(784,)),
            layers.Dense(units, activation="relu"),
            layers.Dense(units, activation="relu"),
            layers.Dense(CLASSES, name="logits"),
        ],
        name=f"mlp{units}",
    )


def _of_the_literature(network: Callable[..., Any]) -> Callable[[], Any]:
    return functools.partial(network, classes=CLASSES, library="tf_keras")


NETWORKS: dict[str, Callable[[], Any]] = {
    "tiny": tiny,
    "mlp512": functools.partial(mlp, 512),
    "mlp1024": functools.partial(mlp, 1024),
    "resnet20": _of_the_literature(applications.ResNet20),
    "resnet18": _of_the_literature(applications.ResNet18),
    "vgg16": _of_the_literature(applications.VGG16),
    "wrn28_4": _of_the_literature(applications.WRN28x4),
    "mobilenet_v1": _of_the_literature(functools.partial(applications.MobileNetV1, width=0.5)),
    "mobilenet_v2": _of_the_literature(functools.partial(applications.MobileNetV2, width=0.5)),
    "tiny_mobilenet": _of_the_literature(
        functools.partial(applications.MobileNetV1, width=0.1, input_shape=(8, 8, 3))
    ),
}


def build(name: str, seed: int = 0) -> Any:
    """Return the network of that name; the same seed gives the same weights."""
    tf_keras.utils.set_random_seed(seed)
    return NETWORKS[name]()
