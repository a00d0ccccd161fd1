"""Translation of layers of either Keras into operations; an unknown layer is a `Barrier`."""

from __future__ import annotations

import collections
import math
import types
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _keras
from tscnc_tf._channels.attention import Attention, Projection
from tscnc_tf._channels.graph import Call, Graph, Tensor
from tscnc_tf._channels.operations import (
    Barrier,
    Combination,
    Concatenation,
    Depthwise,
    Elementwise,
    Grouped,
    Linear,
    Mixing,
    Normalisation,
    Operation,
    Rearrangement,
    Scaling,
    Step,
)
from tscnc_tf._keras import layers as kernel_layers

# Names of layers, in both Keras versions.
_RECTIFIERS = ("ReLU", "LeakyReLU", "ELU", "ThresholdedReLU")
_ACTIVATIONS = (*_RECTIFIERS, "Activation")
_DROPOUT = ("Dropout", "SpatialDropout", "GaussianDropout", "GaussianNoise", "AlphaDropout")
_MOVING = ("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool", "UpSampling", "Cropping")
_KEEPING = (*_DROPOUT, *_MOVING, "Identity", "RepeatVector")
_COMBINING: dict[str, dict[str, Any]] = {
    "Add": {"function": np.add},
    "Subtract": {"function": np.subtract},
    "Average": {"function": np.add, "mean": True},
    "Maximum": {"function": np.maximum},
    "Minimum": {"function": np.minimum},
    "Multiply": {"function": np.multiply, "absorbs": True},
}
# Layers of Keras 3 that leave out masked entries; where all are masked, they give 0 or the first.
_REPLACING_MASKED = ("Multiply", "Maximum", "Minimum")
# Names of Keras 3's operations, and of the TensorFlow functions that tf_keras wraps as layers;
# first those that are equal to a layer.
_SAME_AS = {"__operators__.add": "Add", "math.add": "Add", "math.subtract": "Subtract"} | {
    "math.multiply": "Multiply",
    "math.maximum": "Maximum",
    "math.minimum": "Minimum",
    "concat": "Concatenate",
}
_FUNCTIONS = {"Negative", "Divide", "TrueDivide", "Relu", "ReLU", "Relu6", "ReLU6"} | {
    *("Sigmoid", "HardSigmoid", "Silu", "HardSilu", "Tanh"),
    *("math.negative", "math.divide", "math.truediv", "nn.relu", "nn.relu6", "math.sigmoid"),
    *("nn.silu", "math.tanh"),
}
_ELEMENTWISE = (
    *("linear", "relu", "relu6", "leaky_relu", "elu", "selu", "gelu", "silu", "swish", "celu"),
    *("mish", "sigmoid", "hard_sigmoid", "hard_silu", "hard_swish", "tanh", "hard_tanh"),
    *("softplus", "softsign", "exponential", "log_sigmoid", "squareplus", "tanh_shrink"),
)
_TF_ELEMENTWISE = (
    *(tf.nn.relu, tf.nn.relu6, tf.nn.leaky_relu, tf.nn.elu, tf.nn.selu, tf.nn.gelu, tf.nn.silu),
    *(tf.nn.softplus, tf.nn.sigmoid, tf.nn.tanh, tf.identity),
)
_OPERATIONS = ("keras.src.ops.numpy", "keras.src.ops.nn", "keras.src.activations")


class Reader:
    """Translates the calls of one model into operations.

    Args:
        library: the Keras of the model.
        graph: of the model.
    """

    def __init__(self, library: types.ModuleType, graph: Graph) -> None:
        self.library = library
        self.graph = graph
        holders: collections.Counter[int] = collections.Counter()
        for layer in {call.layer for call in graph.calls}:
            holders.update({id(weight) for weight in getattr(layer, "weights", ())})
        self._is_masked = any(
            t.masked for call in graph.calls for t in (*call.inputs, *call.outputs)
        )
        self._shared = {weight for weight, count in holders.items() if count > 1}
        self._elementwise = {id(function) for function in _TF_ELEMENTWISE}
        for name in _ELEMENTWISE:
            if function := getattr(library.activations, name, None):
                self._elementwise.add(id(function))

    def operations(self) -> list[Step]:
        """Return the operations of the model in topological order."""
        return [operation for call in self.graph.calls for operation in self.read(call)]

    def read(self, call: Call) -> list[Step]:
        """Return the operations of a call, in topological order."""
        try:
            if reason := self._unclear(call):
                raise _NotUnderstoodError(reason)
            return self._understood(call)
        except _NotUnderstoodError as error:
            kind = type(call.layer).__name__
            reason = f"{call.name!r} ({kind}) {error}"
            return [Barrier(call, call.inputs, call.outputs, reason)]

    def _unclear(self, call: Call) -> str:
        """Return why a call can't be analysed; an empty text if it can."""
        layer = call.layer
        if id(layer) in self.graph.opaque:
            return self.graph.opaque[id(layer)]
        weights = getattr(layer, "weights", [])
        if call.uses > 1 and (weights or type(layer).__name__ == "Reshape"):
            return f"is used {call.uses} times"
        if any(id(weight) in self._shared for weight in weights):
            return "shares a weight with another layer"
        if len(call.outputs) != 1 or not call.inputs:
            return "has no single output"
        if any(not tensor.channels for tensor in (*call.inputs, *call.outputs)):
            return "has an input or output whose number of channels is not known"
        if getattr(layer, "data_format", None) == "channels_first":
            return "has its channels first"
        return ""

    def _understood(self, call: Call) -> list[Step]:
        layer, name = call.layer, type(call.layer).__name__
        if type(layer) is getattr(self.library.layers, "GroupQueryAttention", None):
            raise _NotUnderstoodError("has heads that share keys and values")
        if type(layer) is not getattr(self.library.layers, name, None):
            return self._function(call)  # a user's class may have the name of a Keras layer
        if name == "MultiHeadAttention":
            return self._attention(call)
        if not call.is_plain:
            raise _NotUnderstoodError("is called with more than its inputs")
        if call.kwargs.get("mask") is not None:
            raise _NotUnderstoodError("is called with a mask")
        if name in _COMBINING:
            replaces = name in _REPLACING_MASKED and self.library is _keras.keras
            if replaces and any(tensor.masked for tensor in call.inputs):
                raise _NotUnderstoodError("has other results at masked positions")
            return [self._combination(call, name)]
        if name == "Concatenate":
            return [self._concatenation(call, call.layer.axis)]
        if len(call.inputs) != 1:
            raise _NotUnderstoodError("is not understood")
        if name == "Dense":
            return self._dense(call)
        if name in kernel_layers.CONVOLUTIONS or name in kernel_layers.TRANSPOSED:
            return self._convolution(call, transposed=name in kernel_layers.TRANSPOSED)
        if name in kernel_layers.DEPTHWISE:
            return self._depthwise(call)
        if name in kernel_layers.SEPARABLE:
            return self._separable(call)
        if name == "BatchNormalization":
            return [self._normalisation(call)]
        if name in _ACTIVATIONS:
            return [self._activation(call)]
        if name == "Softmax" and layer.axis in (-1, len(call.inputs[0].shape) - 1):
            return [Mixing(call, call.inputs, call.outputs, f"{call.name!r} mixes channels")]
        if name == "Rescaling":
            return [self._rescaling(call)]
        if name == "Normalization":
            return [_scaling(call)]
        return [self._rearrangement(call, name)]

    def _dense(self, call: Call) -> list[Step]:
        _require_plain_kernel(call.layer)
        return self._activated(call, [_linear(call, call.inputs, size="units")])

    def _convolution(self, call: Call, transposed: bool) -> list[Step]:
        layer = call.layer
        if getattr(layer, "lora_enabled", False):
            raise _NotUnderstoodError("has a low-rank addition")
        options: dict[str, Any] = {"size": "filters", "folds": _needs_no_padding(call)}
        if getattr(layer, "groups", 1) != 1:
            options |= {"kind": Grouped, "groups": layer.groups}
        if transposed:  # its windows overlap differently at the border, whatever the padding
            folds = {*layer.kernel_size, *layer.strides} == {1}
            options |= {"transposed": True, "folds": folds}
        return self._activated(call, [_linear(call, call.inputs, **options)])

    def _depthwise(self, call: Call) -> list[Step]:
        attribute = "depthwise_kernel" if self.library is _keras.tf_keras else "kernel"
        return self._activated(call, [_depthwise(call, attribute, _bias_of(call.layer))])

    def _separable(self, call: Call) -> list[Step]:
        first = _depthwise(call, "depthwise_kernel", None, counts=False)
        second = _linear(call, first.outputs, "pointwise_kernel", size="filters")
        return self._activated(call, [first, second])

    def _attention(self, call: Call) -> list[Step]:
        layer, given, config = call.layer, call.named, call.layer.get_config()
        query, value, is_causal = given["query"], given["value"], given.get("use_causal_mask")
        key = given.get("key", value)
        if given.keys() - {"query", "value", "key", "use_causal_mask"}:
            raise _NotUnderstoodError("is called with more than its inputs")
        if not all(isinstance(each, Tensor) for each in (query, value, key)):
            raise _NotUnderstoodError("has a constant for its query, key or value")
        if len(layer._output_dense.kernel.shape) != 3:
            raise _NotUnderstoodError("makes several axes of its output")
        # If each position attends to itself at least, no row is masked completely.
        sees_itself = query is value and len(query.shape) == 3
        masks = self._is_masked or config.get("sliding_window") is not None
        masks |= bool(is_causal) and not sees_itself
        projections: list[Projection] = []

        def projected(part: str, source: Tensor, size: str, **options: Any) -> Projection:
            _require_plain_kernel(getattr(layer, f"_{part}_dense"))
            made = _projection(call, part, source, size=size, others=projections, **options)
            projections.append(made)
            return made

        steps: list[Step] = [
            projected("query", query, "key_dim", counts=False),
            projected("key", key, "key_dim", counts=False),
            projected("value", value, "value_dim"),
        ]
        heads = [_like(steps[2].outputs[0])]
        reason = f"{call.name!r} makes 0 of a constant where all positions are masked"
        inputs = [step.outputs[0] for step in steps]
        steps.append(Attention(call, inputs, heads, reason, heads=config["num_heads"], masks=masks))
        if config.get("use_gate"):
            steps.append(projected("gate", query, "value_dim", counts=False))
            gate, gated = [_like(heads[0])], [_like(heads[0])]
            function = self.library.activations.sigmoid
            steps.append(Elementwise(call, steps[-1].outputs, gate, function=function))
            reason = f"{call.name!r} multiplies the constant of a head by a gate, which varies"
            product = _COMBINING["Multiply"]
            steps.append(Combination(call, [*heads, *gate], gated, reason, **product))
            heads = gated
        steps.append(projected("output", heads[0], "output_shape", reads_heads=True))
        return steps

    def _activated(self, call: Call, operations: list[Step]) -> list[Step]:
        """Return the operations, followed by the layer's activation."""
        function = call.layer.activation
        inner, outputs = operations[-1].outputs, call.outputs
        if function is None or function is self.library.activations.linear:
            operations[-1].outputs = outputs
            return operations
        if self._is_elementwise(function):
            return [*operations, Elementwise(call, inner, outputs, function=function)]
        reason = f"{call.name!r} has the activation {_name_of(function)}, which may mix channels"
        kind = Mixing if self._mixes(function) else Barrier
        return [*operations, kind(call, inner, outputs, reason)]

    def _is_elementwise(self, function: Any) -> bool:
        """Return whether an activation is a known function, or a layer, of single entries."""
        kind = type(function)
        is_layer = kind is getattr(self.library.layers, kind.__name__, None)
        return id(function) in self._elementwise or (is_layer and kind.__name__ in _RECTIFIERS)

    def _mixes(self, function: Any) -> bool:
        """Return whether each channel of an activation depends on all channels."""
        known = vars(self.library.activations)  # tf_keras has no log_softmax
        return any(function is known[name] for name in ("softmax", "log_softmax") if name in known)

    def _activation(self, call: Call) -> Step:
        function = getattr(call.layer, "activation", None)
        if self._mixes(function):
            reason = f"{call.name!r} is {_name_of(function)}, which mixes channels"
            return Mixing(call, call.inputs, call.outputs, reason)
        if function is not None and not self._is_elementwise(function):
            raise _NotUnderstoodError(f"is {_name_of(function)}, which may mix channels")
        return Elementwise(call, call.inputs, call.outputs, function=call.apply)

    def _rescaling(self, call: Call) -> Step:
        if np.ndim(call.layer.scale) or np.ndim(call.layer.offset):
            return _scaling(call)
        return Elementwise(call, call.inputs, call.outputs, function=call.apply)

    def _normalisation(self, call: Call) -> Operation:
        layer = call.layer
        axes = np.atleast_1d(layer.axis).tolist()
        if axes not in ([-1], [len(call.inputs[0].shape) - 1]):
            raise _NotUnderstoodError(f"normalises axis {axes}, not the last one")
        if getattr(layer, "renorm", False) or getattr(layer, "virtual_batch_size", None):
            raise _NotUnderstoodError("renormalises")
        names = ["moving_mean", "moving_variance"]
        names += ["gamma"] * bool(layer.scale) + ["beta"] * bool(layer.center)
        weights = {name: _values(getattr(layer, name)) for name in names}
        return Normalisation(
            call, call.inputs, call.outputs, weights=weights, epsilon=layer.epsilon
        )

    def _rearrangement(self, call: Call, name: str) -> Operation:
        layer, (source,), (target,) = call.layer, call.inputs, call.outputs
        same = source.channels == target.channels
        if name.startswith("ZeroPadding"):
            pads = bool(np.any(layer.padding))
            reason = f"{call.name!r} puts zeros around a constant"
            return Rearrangement(call, call.inputs, call.outputs, reason, pads=pads)
        if name == "Permute" and layer.dims[-1] == len(layer.dims):
            return Rearrangement(call, call.inputs, call.outputs)
        if name in ("Flatten", "Reshape") and target.channels % source.channels == 0:
            # In row-major order entry t of the flat tensor belongs to channel t mod channels.
            places = np.arange(target.channels) % source.channels
            argument = "target_shape" if name == "Reshape" else ""
            return Rearrangement(
                call, call.inputs, call.outputs, places=places, shape_argument=argument
            )
        if name == "Dropout" and layer.noise_shape is not None and same:
            argument = "noise_shape"
            return Rearrangement(call, call.inputs, call.outputs, shape_argument=argument)
        if name.startswith(_KEEPING) and same:
            return Rearrangement(call, call.inputs, call.outputs)
        raise _NotUnderstoodError("is not understood")

    def _combination(self, call: Call, name: str) -> Operation:
        if len({(len(tensor.shape), tensor.channels) for tensor in call.inputs}) != 1:
            raise _NotUnderstoodError("stretches one input over the channels of another")
        if call.inputs[0].channels != call.outputs[0].channels:
            raise _NotUnderstoodError("is not understood")
        reason = f"at {call.name!r} another branch still uses the channel"
        return Combination(call, call.inputs, call.outputs, reason, **_COMBINING[name])

    def _concatenation(self, call: Call, axis: Any) -> Operation:
        if axis not in (-1, len(call.inputs[0].shape) - 1):
            raise _NotUnderstoodError(f"joins axis {axis}, not the channels")
        if sum(tensor.channels for tensor in call.inputs) != call.outputs[0].channels:
            raise _NotUnderstoodError("joins a constant to its inputs")
        return Concatenation(call, call.inputs, call.outputs)

    def _function(self, call: Call) -> list[Step]:
        """Translate an operation of Keras 3, or a TensorFlow function in a tf_keras layer."""
        kind = type(call.layer)
        if kind.__module__.startswith(_OPERATIONS):
            # The operation Average is a mean over an axis; only the layer combines tensors.
            name = "" if kind.__name__ == "Average" else kind.__name__
        elif kind.__name__ == "TFOpLambda" and _keras.flavour(call.layer) == "tf_keras":
            name = call.layer.symbol or ""
        else:
            raise _NotUnderstoodError("is not understood")
        combining = _SAME_AS.get(name, name)
        if combining == "Concatenate":
            return [self._concatenation(call, _axis_of(call))]
        if combining in _COMBINING and len(call.inputs) == 2:
            return [self._combination(call, combining)]
        scalars = tf.nest.flatten((call.args, list(call.kwargs.values())))
        numbers = sum(isinstance(value, int | float) for value in scalars)
        simple = numbers + sum(value is None for value in scalars) + 1 == len(scalars)
        if len(call.inputs) == 1 and simple and (combining in _COMBINING or name in _FUNCTIONS):
            return [Elementwise(call, call.inputs, call.outputs, function=call.apply)]
        raise _NotUnderstoodError("is not understood")


class _NotUnderstoodError(Exception):
    """The reason why a layer is a barrier, as a predicate of the layer's name."""


def _like(tensor: Tensor, channels: int | None = None) -> Tensor:
    """Return a new tensor of the same shape and dtype, with the given number of channels."""
    return Tensor((*tensor.shape[:-1], channels or tensor.channels), tensor.dtype)


def _projection(
    call: Call, part: str, source: Tensor, reads_heads: bool = False, **options: Any
) -> Projection:
    """Return a projection of an attention layer, with its kernel as a matrix."""
    inside, config = f"_{part}_dense", call.layer.get_config()
    weights = getattr(call.layer, inside)
    kernel = _values(weights.kernel)
    outputs = call.outputs
    if not reads_heads:
        outputs = [_like(source, kernel.shape[1] * kernel.shape[2])]
        options |= {"shape": f"{part}_shape" if f"{part}_shape" in config else ""}
    return Projection(
        call,
        [source],
        outputs,
        attribute=f"{inside}.kernel",
        bias_attribute=f"{inside}.bias",
        kernel=kernel.reshape(source.channels, -1),
        bias=_values(weights.bias).reshape(-1) if config["use_bias"] else None,
        heads=config["num_heads"],
        reads_heads=reads_heads,
        **options,
    )


def _require_plain_kernel(layer: Any) -> None:
    """Raise a _NotUnderstoodError if a layer's effective kernel is not its stored kernel."""
    if getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False):
        raise _NotUnderstoodError("is quantised, or has a low-rank addition")


def _depthwise(call: Call, attribute: str, bias: np.ndarray | None, **options: Any) -> Depthwise:
    kernel = _values(getattr(call.layer, attribute))
    return Depthwise(
        call,
        call.inputs,
        [_like(call.outputs[0], kernel.shape[-2] * kernel.shape[-1])],
        _border_reason(call),
        attribute=attribute,
        kernel=kernel,
        bias=bias,
        folds=_needs_no_padding(call),
        **options,
    )


def _scaling(call: Call) -> Scaling:
    kind = type(call.layer).__name__
    reason = f"{call.name!r} ({kind}) scales each channel differently"
    return Scaling(call, call.inputs, call.outputs, reason)


def _linear(
    call: Call,
    inputs: list[Tensor],
    attribute: str = "kernel",
    kind: type[Linear] = Linear,
    **options: Any,
) -> Linear:
    return kind(
        call,
        inputs,
        [_like(call.outputs[0])],
        _border_reason(call),
        attribute=attribute,
        kernel=_values(getattr(call.layer, attribute)),
        bias=_bias_of(call.layer),
        **options,
    )


def count_flops(call: Call, layer: Any) -> int | None:
    """Return 2 · (entries of the kernels) · (positions) for one example; None if not counted.

    Args:
        call: a call of the layer, or of the layer that it replaces: only the numbers of positions
            are read, which are equal.
        layer: the layer whose kernels count.
    """
    name = type(layer).__name__
    convolutions = (*kernel_layers.CONVOLUTIONS, *kernel_layers.DEPTHWISE, *kernel_layers.SEPARABLE)
    if name in convolutions:
        positions = call.outputs[0].positions
    elif name == "Dense" or name in kernel_layers.TRANSPOSED:
        positions = call.inputs[0].positions
    else:
        return None
    if positions is None or getattr(layer, "data_format", None) == "channels_first":
        return None
    kernels = ("kernel", "depthwise_kernel", "pointwise_kernel")
    present = [getattr(layer, kernel, None) for kernel in kernels]
    entries = {id(kernel): math.prod(kernel.shape) for kernel in present if kernel is not None}
    return 2 * sum(entries.values()) * positions


def _axis_of(call: Call) -> Any:
    """Return the axis of a concatenation by a function of Keras 3 or TensorFlow."""
    given = (*call.args[1:], call.kwargs.get("axis"))  # tf.concat(values, axis)
    return getattr(call.layer, "axis", given[0])


def _values(variable: Any) -> np.ndarray:
    """Return the entries of a variable of either Keras, in its own dtype."""
    return np.asarray(variable.numpy())


def _bias_of(layer: Any) -> np.ndarray | None:
    """Return the bias of a layer, or None if it has none."""
    return _values(layer.bias) if layer.use_bias else None


def _needs_no_padding(call: Call) -> bool:
    """Return whether no window of a convolution extends into zero padding.

    With padding="same" and stride s, an axis of size n gets max((⌈n / s⌉ - 1) s + k - n, 0) zeros
    in total, where k is the size of the (dilated) kernel.
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


def _border_reason(call: Call) -> str:
    """Return why a constant input of a layer may not give a constant output, for messages."""
    if type(call.layer).__name__ in kernel_layers.TRANSPOSED:
        return f"{call.name!r} adds up fewer windows at its border, so a constant does not stay one"
    padding = getattr(call.layer, "padding", "valid")
    return f"{call.name!r} pads a constant with zeros (padding={padding!r})"


def _name_of(function: Any) -> str:
    """Return the name of an activation function, for messages."""
    return getattr(function, "__name__", type(function).__name__)
