"""Networks to measure on: those of the literature on CIFAR-10, for 32x32x3 inputs, as logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tf_keras

CLASSES = 10

_layers = tf_keras.layers


def tiny() -> Any:
    """One convolution and the logits, on 8x8 inputs: not worth timing, for smoke runs."""
    return _resnet("tiny", size=8, stem=4, widths=(), blocks=0)


def resnet20() -> Any:
    """ResNet-20 for CIFAR, with projection shortcuts (He et al. 2016, section 4.2)."""
    return _resnet("resnet20", size=32, stem=16, widths=(16, 32, 64), blocks=3)


def resnet18() -> Any:
    """ResNet-18 in its CIFAR variant: a 3x3 stem of stride 1 and no pooling after it."""
    return _resnet("resnet18", size=32, stem=64, widths=(64, 128, 256, 512), blocks=2)


def wrn28_4() -> Any:
    """WRN-28-4: a wide residual network with pre-activation (Zagoruyko & Komodakis 2016)."""
    inputs = tf_keras.Input((32, 32, 3))
    x = _conv(inputs, 16)
    for stage, width in enumerate((64, 128, 256)):
        for block in range(4):
            stride = 2 if stage and not block else 1
            active = _norm_relu(x)
            y = _norm_relu(_conv(active, width, stride=stride))
            y = _conv(y, width)
            if x.shape[-1] != width:
                x = _conv(active, width, kernel=1, stride=stride)
            x = _layers.Add()([x, y])
    return _headed(inputs, _norm_relu(x), "wrn28_4")


def vgg16() -> Any:
    """VGG-16 with BatchNorm in its CIFAR form: 13 convolutions, two dense layers of 512, logits."""
    inputs = x = tf_keras.Input((32, 32, 3))
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            x = _norm_relu(_conv(x, width))
        x = _layers.MaxPooling2D()(x)
    x = _layers.Flatten()(x)
    for _ in range(2):
        x = _layers.Dense(512, activation="relu")(x)
    return tf_keras.Model(inputs, _layers.Dense(CLASSES)(x), name="vgg16")


NETWORKS: dict[str, Callable[[], Any]] = {
    build.__name__: build for build in (tiny, resnet20, resnet18, vgg16, wrn28_4)
}


def build(name: str, seed: int = 0) -> Any:
    """Return the network of that name; the same seed gives the same weights."""
    tf_keras.utils.set_random_seed(seed)
    return NETWORKS[name]()


def _resnet(name: str, *, size: int, stem: int, widths: tuple[int, ...], blocks: int) -> Any:
    inputs = tf_keras.Input((size, size, 3))
    x = _norm_relu(_conv(inputs, stem))
    for stage, width in enumerate(widths):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            y = _norm_relu(_conv(x, width, stride=stride))
            y = _layers.BatchNormalization()(_conv(y, width))
            if stride > 1 or x.shape[-1] != width:
                x = _layers.BatchNormalization()(_conv(x, width, kernel=1, stride=stride))
            x = _layers.ReLU()(_layers.Add()([x, y]))
    return _headed(inputs, x, name)


def _conv(x: Any, width: int, *, kernel: int = 3, stride: int = 1) -> Any:
    return _layers.Conv2D(
        width,
        kernel,
        strides=stride,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
    )(x)


def _norm_relu(x: Any) -> Any:
    return _layers.ReLU()(_layers.BatchNormalization()(x))


def _headed(inputs: Any, x: Any, name: str) -> Any:
    x = _layers.GlobalAveragePooling2D()(x)
    return tf_keras.Model(inputs, _layers.Dense(CLASSES)(x), name=name)
