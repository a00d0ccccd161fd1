"""Layers that all networks are built of, in either Keras, and checks of their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np

from tscnc_tf import _checks, _keras

MAX_WIDTH = 2**16  # filters, of the first stage


class Options(TypedDict, total=False):
    """The keyword arguments that all networks have in common; see `tscnc_tf.applications`."""

    input_shape: Sequence[int]
    classes: int
    mean: Sequence[float] | None
    std: Sequence[float] | None
    activation: Any
    kernel_initializer: Any
    library: str
    name: str | None
    seed: int | None


class Builder:
    """Builds the layers of one network, from its input to its logits.

    Args:
        kind: the default name of the model.
        smallest: the smallest height and width that the network's strides allow.
        input_shape, classes, mean, std, activation, kernel_initializer, library, name, seed: see
            `tscnc_tf.applications`.
    """

    def __init__(
        self,
        kind: str,
        smallest: int,
        *,
        input_shape: Sequence[int] = (32, 32, 3),
        classes: int = 10,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        activation: Any = "relu",
        kernel_initializer: Any = "he_normal",
        library: str = "keras",
        name: str | None = None,
        seed: int | None = None,
    ) -> None:
        self._library = _keras.LIBRARIES[_checks.one_of("library", library, _keras.LIBRARIES)]
        self.layers = self._library.layers
        if (order := self._library.backend.image_data_format()) != "channels_last":
            raise ValueError(
                f"image_data_format must be 'channels_last' for these networks, got {order!r}: "
                f"{library}.backend.set_image_data_format('channels_last') sets it."
            )
        self._classes = _checks.integer("classes", classes, minimum=2)
        shape = _image_shape(input_shape, smallest)
        statistics = _statistics(mean, std, shape[-1])
        self._name = kind if name is None else name
        self._activation = activation
        self._kernel_initializer = self._library.initializers.get(kernel_initializer)
        seed = None if seed is None else _checks.seed("seed", seed)
        self._seeds = None if seed is None else np.random.default_rng(seed)
        # A separate generator, so that dropout does not change the initial weights.
        self._seeds_of_dropout = None if seed is None else np.random.default_rng((seed, 1))
        # The dtype of the weights: float32 under a mixed precision policy.
        self._full_precision = self.layers.Layer().variable_dtype
        self._inputs = self._library.Input(shape, name="image")
        self.inputs = self._inputs if statistics is None else self._normalized_input(*statistics)

    def _normalized_input(self, mean: list[float], variance: list[float]) -> Any:
        # In half precision, a pixel would be rounded before the mean is subtracted.
        return self.layers.Normalization(
            mean=mean, variance=variance, dtype=self._full_precision, name="normalization"
        )(self._inputs)

    def stem(self, filters: int) -> Any:
        """Return the first convolution's output, normalised and activated."""
        x = self.normalized(self.convolution(self.inputs, "stem", filters), "stem_norm")
        return self.activated(x, "stem_activation")

    def convolution(
        self,
        x: Any,
        name: str,
        filters: int,
        *,
        size: int = 3,
        stride: int = 1,
        padding: str = "same",
        use_bias: bool = False,
    ) -> Any:
        """Return a convolution of x; by default its size is that of x divided by the stride."""
        return self.layers.Conv2D(
            filters,
            size,
            strides=stride,
            padding=padding,
            use_bias=use_bias,
            kernel_initializer=self._initializer(),
            name=name,
        )(x)

    def depthwise(self, x: Any, name: str, *, stride: int = 1, padding: str = "same") -> Any:
        """Return a 3x3 convolution of each channel of x by itself."""
        return self.layers.DepthwiseConv2D(
            3,
            strides=stride,
            padding=padding,
            use_bias=False,
            depthwise_initializer=self._initializer_per_channel(x.shape[-1]),
            name=name,
        )(x)

    def padded(self, x: Any, name: str) -> Any:
        """Return x with a row and a column of zeros on each side."""
        return self.layers.ZeroPadding2D(1, name=name)(x)

    def normalized(self, x: Any, name: str) -> Any:
        """Return x after BatchNorm."""
        # The literature has 1e-5; TensorFlow raises it to this, to exceed the minimum of cuDNN.
        return self.layers.BatchNormalization(momentum=0.9, epsilon=1.001e-5, name=name)(x)

    def activated(self, x: Any, name: str) -> Any:
        """Return x after the network's activation."""
        return self.layers.Activation(self._activation, name=name)(x)

    def dropout(self, x: Any, name: str, rate: float) -> Any:
        """Return x after dropout."""
        seeds = self._seeds_of_dropout
        seed = None if seeds is None else int(seeds.integers(2**31))
        return self.layers.Dropout(rate, seed=seed, name=name)(x)

    def hidden(self, x: Any, name: str, units: int) -> Any:
        """Return a dense layer's output, activated."""
        x = self.layers.Dense(units, kernel_initializer=self._initializer(), name=name)(x)
        return self.activated(x, f"{name}_activation")

    def added(self, x: Any, y: Any, name: str) -> Any:
        """Return x + y."""
        return self.layers.Add(name=name)([x, y])

    def model(self, x: Any) -> Any:
        """Return the model that computes its logits from x, `(batch, features)`."""
        # In half precision, small differences of logits, which attacks follow, would be lost.
        logits = self.layers.Dense(
            self._classes,
            kernel_initializer=self._initializer(),
            dtype=self._full_precision,
            name="logits",
        )(x)
        return self._library.Model(self._inputs, logits, name=self._name)

    def _initializer_per_channel(self, channels: int) -> Any:
        """Return an initializer for a depthwise kernel.

        Keras counts all channels as inputs of each filter, which has only one. Its weights would be
        too small by the square root of the number of channels.
        """
        initializer = self._initializer()
        scaling = self._library.initializers.VarianceScaling
        if not isinstance(initializer, scaling) or initializer.mode != "fan_in":
            return initializer
        return scaling(
            scale=initializer.scale * channels,
            mode=initializer.mode,
            distribution=initializer.distribution,
            seed=initializer.seed,
        )

    def _initializer(self) -> Any:
        """Return an initializer for one kernel; a shared one might draw the same for all."""
        shared = self._kernel_initializer
        if not isinstance(shared, self._library.initializers.Initializer):
            return shared
        config = shared.get_config()
        if self._seeds is not None and "seed" in config:
            config["seed"] = int(self._seeds.integers(2**31))
        return type(shared).from_config(config)


def _image_shape(shape: Any, smallest: int) -> tuple[int, int, int]:
    """Return a checked input shape."""
    if not isinstance(shape, Sequence) or isinstance(shape, str) or len(shape) != 3:
        raise ValueError(f"input_shape must be (height, width, channels), got {shape!r}.")
    height, width, channels = (
        _checks.integer(f"input_shape[{axis}]", size, minimum=1) for axis, size in enumerate(shape)
    )
    if min(height, width) < smallest:
        raise ValueError(
            f"input_shape must have a height and width of {smallest} or more, which this network's "
            f"strides reduce to 1, got {tuple(shape)}: enlarge the images, or take a network with "
            "fewer strides."
        )
    return height, width, channels


def _statistics(mean: Any, std: Any, channels: int) -> tuple[list[float], list[float]] | None:
    """Return means and variances per channel, or None if there are none."""
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise ValueError(f"mean and std must be given together, got mean={mean!r}, std={std!r}.")
    means = _per_channel("mean", mean, channels)
    deviations = _per_channel("std", std, channels, above=0.0)
    return means, [deviation**2 for deviation in deviations]


def _per_channel(name: str, values: Any, channels: int, **limits: Any) -> list[float]:
    try:
        values = list(values)
    except TypeError:
        raise TypeError(f"{name} must hold one number per channel, got {values!r}.") from None
    if len(values) != channels:
        raise ValueError(
            f"{name} must hold one number per channel of input_shape, {channels}, got {values!r}."
        )
    return [_checks.number(f"{name}[{i}]", value, **limits) for i, value in enumerate(values)]
