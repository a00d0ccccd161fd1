"""Which operations a layer stands for, in either Keras; what is not understood is a barrier."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _keras
from tscnc_tf._keras import layers as kernel_layers
from tscnc_tf.pruning.compaction import vocabulary
from tscnc_tf.pruning.compaction.graph import Call, Tensor
from tscnc_tf.pruning.compaction.operations import (
    Barrier,
    Combination,
    Concatenation,
    Elementwise,
    Operation,
    Rearrangement,
    Step,
)
from tscnc_tf.pruning.compaction.vocabulary import (
    bias_of,
    border_reason,
    evaluated,
    name_of,
    sees_no_border,
    values,
)
from tscnc_tf.pruning.compaction.weighted import Depthwise, Linear, Normalisation


class Reader:
    """Reads the calls of one model.

    Args:
        library: the Keras of the model.
        opaque: why nested models are not followed, by their ids.
        shared: the ids of variables that several layers hold.
    """

    def __init__(self, library: types.ModuleType, opaque: dict[int, str], shared: set[int]) -> None:
        self.library = library
        self.opaque = opaque
        self.shared = shared
        self._elementwise = {id(function) for function in vocabulary.TF_ELEMENTWISE}
        for name in vocabulary.ELEMENTWISE:
            if function := getattr(library.activations, name, None):
                self._elementwise.add(id(function))

    def read(self, call: Call) -> list[Step]:
        """Return the operations that a call stands for, in their order."""
        try:
            if reason := self._unclear(call):
                raise _NotUnderstoodError(reason)
            return self._understood(call)
        except _NotUnderstoodError as error:
            kind = type(call.layer).__name__
            reason = f"{call.name!r} ({kind}) {error}"
            return [Barrier(call, call.inputs, call.outputs, reason)]

    def _unclear(self, call: Call) -> str:
        """Return why a call is none to look into, or an empty text."""
        layer = call.layer
        if id(layer) in self.opaque:
            return self.opaque[id(layer)]
        weights = getattr(layer, "weights", [])
        if call.uses > 1 and weights:
            return f"is used {call.uses} times"
        if any(id(weight) in self.shared for weight in weights):
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
        if type(layer) is not getattr(self.library.layers, name, None):
            return self._function(call)  # a class of the same name is not the layer that we know
        if not call.is_plain:
            raise _NotUnderstoodError("is called with more than its inputs")
        if name in vocabulary.COMBINING:
            return [self._combination(call, name)]
        if name == "Concatenate":
            return [self._concatenation(call)]
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
        if name in vocabulary.ACTIVATIONS:
            return [self._activation(call)]
        if name == "Rescaling":
            return [self._rescaling(call)]
        return [self._rearrangement(call, name)]

    def _dense(self, call: Call) -> list[Step]:
        layer = call.layer
        if getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False):
            raise _NotUnderstoodError("is quantised, or has a low-rank addition")
        return self._activated(call, [self._linear(call, call.inputs, size="units")])

    def _convolution(self, call: Call, transposed: bool) -> list[Step]:
        layer = call.layer
        if getattr(layer, "groups", 1) != 1:
            raise _NotUnderstoodError(f"is a convolution of {layer.groups} groups")
        if getattr(layer, "lora_enabled", False):
            raise _NotUnderstoodError("has a low-rank addition")
        folds = sees_no_border(call)
        if transposed:  # its windows overlap differently at the border, whatever the padding
            folds = {*layer.kernel_size, *layer.strides} == {1}
        return self._activated(
            call,
            [self._linear(call, call.inputs, size="filters", folds=folds, transposed=transposed)],
        )

    def _depthwise(self, call: Call) -> list[Step]:
        attribute = "depthwise_kernel" if self.library is _keras.tf_keras else "kernel"
        return self._activated(
            call,
            [
                Depthwise(
                    call,
                    call.inputs,
                    [_like(call.outputs[0])],
                    border_reason(call),
                    attribute,
                    values(getattr(call.layer, attribute)),
                    bias_of(call.layer),
                    sees_no_border(call),
                )
            ],
        )

    def _separable(self, call: Call) -> list[Step]:
        layer = call.layer
        kernel = values(layer.depthwise_kernel)
        between = _like(call.outputs[0], kernel.shape[-2] * kernel.shape[-1])
        first = Depthwise(
            call,
            call.inputs,
            [between],
            border_reason(call),
            "depthwise_kernel",
            kernel,
            None,
            sees_no_border(call),
        )
        second = self._linear(call, [between], size="filters", attribute="pointwise_kernel")
        return self._activated(call, [first, second])

    def _linear(self, call: Call, inputs: list[Tensor], **options: Any) -> Linear:
        attribute = options.pop("attribute", "kernel")
        kernel = values(getattr(call.layer, attribute))
        output = _like(call.outputs[0])
        bias = bias_of(call.layer)
        return Linear(
            call, inputs, [output], border_reason(call), attribute, kernel, bias, **options
        )

    def _activated(self, call: Call, operations: list[Step]) -> list[Step]:
        """Return the operations with the layer's own activation after them."""
        function = call.layer.activation
        inner, outputs = operations[-1].outputs, call.outputs
        if function is None or function is self.library.activations.linear:
            operations[-1].outputs = outputs
            return operations
        if id(function) in self._elementwise:
            evaluate = evaluated(function, call)
            return [*operations, Elementwise(call, inner, outputs, function=evaluate)]
        reason = f"{call.name!r} has the activation {name_of(function)}, which may mix channels"
        return [*operations, Barrier(call, inner, outputs, reason)]

    def _activation(self, call: Call) -> Operation:
        function = getattr(call.layer, "activation", None)
        if function is not None and id(function) not in self._elementwise:
            raise _NotUnderstoodError(f"is {name_of(function)}, which may mix channels")
        evaluate = evaluated(call.apply, call)
        return Elementwise(call, call.inputs, call.outputs, function=evaluate)

    def _rescaling(self, call: Call) -> Operation:
        if np.ndim(call.layer.scale) or np.ndim(call.layer.offset):
            raise _NotUnderstoodError("scales each channel differently")
        evaluate = evaluated(call.apply, call)
        return Elementwise(call, call.inputs, call.outputs, function=evaluate)

    def _normalisation(self, call: Call) -> Operation:
        layer = call.layer
        axes = np.atleast_1d(layer.axis).tolist()
        if axes not in ([-1], [len(call.inputs[0].shape) - 1]):
            raise _NotUnderstoodError(f"normalises axis {axes}, not the last one")
        if getattr(layer, "renorm", False) or getattr(layer, "virtual_batch_size", None):
            raise _NotUnderstoodError("renormalises")
        names = ["moving_mean", "moving_variance"]
        names += ["gamma"] * bool(layer.scale) + ["beta"] * bool(layer.center)
        weights = {name: values(getattr(layer, name)) for name in names}
        return Normalisation(call, call.inputs, call.outputs, "", weights, layer.epsilon)

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
            # Row by row, entry t of the flat tensor is of channel t mod the number of channels.
            places = np.arange(target.channels) % source.channels
            argument = "target_shape" if name == "Reshape" else ""
            return Rearrangement(
                call, call.inputs, call.outputs, "", places, shape_argument=argument
            )
        if name.startswith(vocabulary.KEEPING) and same:
            return Rearrangement(call, call.inputs, call.outputs)
        raise _NotUnderstoodError("is not understood")

    def _combination(self, call: Call, name: str) -> Operation:
        if len({(len(tensor.shape), tensor.channels) for tensor in call.inputs}) != 1:
            raise _NotUnderstoodError("stretches one input over the channels of another")
        if call.inputs[0].channels != call.outputs[0].channels:
            raise _NotUnderstoodError("is not understood")
        reason = f"at {call.name!r} another branch still uses the channel"
        return Combination(call, call.inputs, call.outputs, reason, **vocabulary.COMBINING[name])

    def _concatenation(self, call: Call) -> Operation:
        if call.layer.axis not in (-1, len(call.inputs[0].shape) - 1):
            raise _NotUnderstoodError(f"joins axis {call.layer.axis}, not the channels")
        return Concatenation(call, call.inputs, call.outputs)

    def _function(self, call: Call) -> list[Step]:
        """Read one of Keras 3's operations, or a TensorFlow function in a tf_keras layer."""
        kind = type(call.layer)
        if kind.__module__.startswith(vocabulary.OPERATIONS):
            name = kind.__name__
        elif kind.__name__ == "TFOpLambda" and _keras.flavour(call.layer) == "tf_keras":
            name = call.layer.symbol or ""
        else:
            raise _NotUnderstoodError("is not understood")
        combining = vocabulary.ARITHMETIC.get(name, name)
        if combining in vocabulary.COMBINING and len(call.inputs) == 2:
            return [self._combination(call, combining)]
        scalars = tf.nest.flatten((call.args, list(call.kwargs.values())))
        numbers = sum(isinstance(value, int | float) for value in scalars)
        simple = numbers + sum(value is None for value in scalars) + 1 == len(scalars)
        if (
            len(call.inputs) == 1
            and simple
            and (combining in vocabulary.COMBINING or name in vocabulary.FUNCTIONS)
        ):
            evaluate = evaluated(call.apply, call)
            return [Elementwise(call, call.inputs, call.outputs, function=evaluate)]
        raise _NotUnderstoodError("is not understood")


class _NotUnderstoodError(Exception):
    """Why a layer is a barrier, as the end of a sentence that starts with its name."""


def _like(tensor: Tensor, channels: int | None = None) -> Tensor:
    """Return a tensor inside a layer, of the shape of its output, or of other channels."""
    return Tensor((*tensor.shape[:-1], channels or tensor.channels), tensor.dtype)
