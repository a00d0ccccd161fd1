"""The names of what is understood, in both Kerases, and the few questions asked of every layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf._keras import layers
from tscnc_tf.pruning.compaction.graph import Call

ACTIVATIONS = ("ReLU", "LeakyReLU", "ELU", "ThresholdedReLU", "Activation")
DROPOUT = ("Dropout", "SpatialDropout", "GaussianDropout", "GaussianNoise", "AlphaDropout")
MOVING = ("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool", "UpSampling", "Cropping")
KEEPING = (*DROPOUT, *MOVING, "Identity", "RepeatVector")
COMBINING: dict[str, dict[str, Any]] = {
    "Add": {"function": np.add},
    "Subtract": {"function": np.subtract},
    "Average": {"function": np.add, "mean": True},
    "Maximum": {"function": np.maximum},
    "Minimum": {"function": np.minimum},
    "Multiply": {"function": np.multiply, "absorbs": True},
}
# Names of Keras 3's operations, and of the TensorFlow functions that tf_keras makes layers of.
ARITHMETIC = {"__operators__.add": "Add", "math.add": "Add", "math.subtract": "Subtract"} | {
    "math.multiply": "Multiply",
    "math.maximum": "Maximum",
    "math.minimum": "Minimum",
}
FUNCTIONS = {"Negative", "Divide", "TrueDivide", "Relu", "ReLU", "Relu6", "ReLU6"} | {
    *("Sigmoid", "HardSigmoid", "Silu", "HardSilu", "Tanh"),
    *("math.negative", "math.divide", "math.truediv", "nn.relu", "nn.relu6", "math.sigmoid"),
    *("nn.silu", "math.tanh"),
}
ELEMENTWISE = (
    *("linear", "relu", "relu6", "leaky_relu", "elu", "selu", "gelu", "silu", "swish", "celu"),
    *("mish", "sigmoid", "hard_sigmoid", "hard_silu", "hard_swish", "tanh", "hard_tanh"),
    *("softplus", "softsign", "exponential", "log_sigmoid", "squareplus", "tanh_shrink"),
)
TF_ELEMENTWISE = (
    *(tf.nn.relu, tf.nn.relu6, tf.nn.leaky_relu, tf.nn.elu, tf.nn.selu, tf.nn.gelu, tf.nn.silu),
    *(tf.nn.softplus, tf.nn.sigmoid, tf.nn.tanh, tf.identity),
)
OPERATIONS = ("keras.src.ops.numpy", "keras.src.ops.nn", "keras.src.activations")


def values(variable: Any) -> np.ndarray:
    """Return the entries of a variable of either Keras, in its own dtype."""
    return np.asarray(variable.numpy())


def bias_of(layer: Any) -> np.ndarray | None:
    """Return the bias of a layer, or None if it has none."""
    return values(layer.bias) if layer.use_bias else None


def sees_no_border(call: Call) -> bool:
    """Tell whether no window of a convolution reaches over the border, where zeros would be.

    With padding="same" and stride s, an axis of n gets max((⌈n / s⌉ - 1) s + k - n, 0) zeros in
    all, k being the size of the (dilated) kernel.
    """
    layer = call.layer
    if layer.padding == "valid":
        return True
    sizes = call.inputs[0].shape[1:-1]
    for size, taps, stride, dilation in zip(
        sizes,
        np.atleast_1d(layer.kernel_size).tolist(),
        np.atleast_1d(layer.strides).tolist(),
        np.atleast_1d(layer.dilation_rate).tolist(),
        strict=True,
    ):
        reach = (taps - 1) * dilation + 1
        if reach == 1:
            continue
        if layer.padding != "same" or size is None:
            return False
        if (-(-size // stride) - 1) * stride + reach > size:
            return False
    return True


def border_reason(call: Call) -> str:
    """Return what keeps a constant from being folded through a layer, where something does."""
    if type(call.layer).__name__ in layers.TRANSPOSED:
        return f"{call.name!r} adds up fewer windows at its border, so a constant is none after it"
    padding = getattr(call.layer, "padding", "valid")
    return f"{call.name!r} pads a constant with zeros (padding={padding!r})"


def evaluated(function: Callable[[Any], Any], call: Call) -> Callable[[np.ndarray], np.ndarray]:
    """Return an element-wise function on NumPy vectors; it computes in the dtype of the layer."""

    def evaluate(constants: np.ndarray) -> np.ndarray:
        row = tf.cast(tf.constant(constants[None]), call.outputs[0].dtype)
        return np.asarray(tf.cast(function(row), tf.float64))[0]

    return evaluate


def name_of(function: Any) -> str:
    """Return the name of an activation function, for people."""
    return getattr(function, "__name__", type(function).__name__)
