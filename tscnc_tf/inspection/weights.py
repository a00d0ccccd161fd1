"""The weights that a model computes with, in float64: masks, gates and LoRA applied."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _reports, functional
from tscnc_tf._keras import (
    gated,
    keras,
    layers,
    masks,
    models,
    require_built,
    tf_keras,
    wrappers,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A weight that a model computes with: its variable times its mask and gates, if any.

    Attributes:
        name: its name.
        variable: the variable that was read.
        values: its values, float64, of the variable's shape.
        masked: whether it has a mask.
    """

    name: str
    variable: Any
    values: np.ndarray
    masked: bool


@dataclasses.dataclass(frozen=True, eq=False)
class KernelWeight(Weight):
    """A kernel that a model computes with.

    Attributes:
        kernel: its layer, and how to read it as matrices.
    """

    kernel: layers.Kernel

    def canonical(self) -> np.ndarray:
        """Return the kernel as `(groups, positions, inputs, outputs)`."""
        return functional.canonical(self.values, **self.kernel.reading).numpy()

    def matrices(self) -> np.ndarray:
        """Return the kernel as tall matrices, `(groups, p, n)` with `p >= n`."""
        return functional.matrices(self.values, **self.kernel.reading).numpy()


class Reader:
    """Reads the values of variables that a model computes with at inference, in float64.

    A variable pruned by tfmot is read times its mask: between an optimizer's step and the next
    forward pass, the variable itself is not zero. (A pruner of this package sets the variable to
    zero.) Gates have their values at inference. The kernel of a layer with LoRA is the sum, that of
    a quantized layer the numbers that its integers represent.

    Args:
        model: a built Keras model or layer, of either Keras.

    Attributes:
        masked: the ids of the variables with masks.

    Raises:
        TypeError: `model` is neither a model nor a layer.
        ValueError: `model` is not built.
    """

    def __init__(self, model: Any) -> None:
        if not isinstance(model, (keras.layers.Layer, tf_keras.layers.Layer)):
            raise TypeError(
                "model must be a Keras 3 or tf_keras model (or layer), got "
                f"{type(model).__name__}: weights are found through the layers that hold them."
            )
        require_built("model", model)
        self.masked = {id(variable) for variable, _ in masks.masked_variables(model)}
        self._masks = {id(variable): mask for variable, mask in wrappers.pruned_variables(model)}
        self._gates = gated.factors(model)
        self._adapted = {
            id(variable): layer
            for layer in layers.flatten(model)
            if (variable := layers.adapted_weight(layer)) is not None
        }

    def __call__(self, variable: Any) -> np.ndarray:
        """Return the values of a variable."""
        key = id(variable)
        if key in self._adapted:
            return layers.effective_weight(self._adapted[key])
        value = tf.convert_to_tensor(variable)
        if key in self._gates:
            value = gated.times(value, self._gates[key])
        values = np.asarray(tf.cast(value, tf.float64))
        if key in self._masks:
            values = values * np.asarray(tf.cast(self._masks[key], tf.float64))
        return values

    def counts(self, variable: Any) -> bool:
        """Tell whether a variable holds weights: floats, or integers that represent floats."""
        return tf.as_dtype(variable.dtype).is_floating or id(variable) in self._adapted


def kernels(model: Any) -> list[KernelWeight]:
    """Return the kernels of a built model, with unique names; the list may be empty."""
    read, found = Reader(model), list(layers.kernels(model))
    names = _reports.unique(kernel.name for kernel in found)
    return [
        KernelWeight(
            name, kernel.variable, read(kernel.variable), id(kernel.variable) in read.masked, kernel
        )
        for name, kernel in zip(names, found, strict=True)
    ]


def others(model: Any) -> list[Weight]:
    """Return the weights that are pruned, or would be by default, and are not in `kernels`.

    These are kernels of attention and of user-defined layers, and all other weights with a mask,
    such as an embedding. A kernel with LoRA or quantization can't be pruned, but is listed. Names
    may repeat.
    """
    read = Reader(model)
    known = {id(kernel.variable) for kernel in layers.kernels(model)}
    owners = {
        id(weight): (layer, weight)
        for _, layer, weight, _ in models.owned(model, lambda _: False)
        if id(weight) in read.masked or models.is_kernel(layer, weight)
    }
    vectors = read.masked - owners.keys()  # weights of rank 1, which the user chose to prune
    for layer in layers.flatten(model) if vectors else ():  # inner layers come later
        if not wrappers.is_wrapper(layer):
            owners |= {id(v): (layer, v) for v in layer.weights if id(v) in vectors}
    return [
        Weight(f"{layer.name}/{models.leaf(weight)}", weight, read(weight), key in read.masked)
        for key, (layer, weight) in owners.items()
        if key not in known
    ]


def listed(model: Any) -> list[Weight]:
    """Return the weights that reports have rows for: `kernels`, then `others`; unique names.

    Raises:
        TypeError: `model` is not a Keras model or layer.
        ValueError: `model` is not built, or there are no such weights.
    """
    found = [*kernels(model), *others(model)]
    if not found:
        raise ValueError(f"model {model.name!r} has neither kernels nor pruned weights.")
    names = _reports.unique(weight.name for weight in found)
    return [dataclasses.replace(w, name=name) for w, name in zip(found, names, strict=True)]


def totals(model: Any) -> tuple[int, int]:
    """Return the number of weights in `all_weights`, and how many are zero."""
    every = [(values.size, np.count_nonzero(values)) for _, values in all_weights(model)]
    count = sum(size for size, _ in every)
    return count, count - int(sum(nonzeros for _, nonzeros in every))


def all_weights(model: Any) -> Iterator[tuple[Any, np.ndarray]]:
    """Yield every weight that the model computes with: the variable, and its values in `Reader`.

    Left out are variables of pruning (masks, thresholds, counters), of gates, and of metrics, and
    variables that are not floats (counters, seeds, look-up tables). LoRA's factors and the scales
    of quantization are not separate weights, but part of the kernels that they change.
    """
    read = Reader(model)
    left_out: set[int] = set()
    for layer in model._flatten_layers():
        if isinstance(layer, tf_keras.Model):  # `weights` may include metrics
            left_out |= {id(variable) for metric in layer.metrics for variable in metric.variables}
    left_out |= set(masks.names(model)) | set(gated.names(model))
    left_out |= {id(v) for layer in layers.flatten(model) for v in layers.companions(layer)}
    for variable in model.weights:
        if id(variable) in left_out or not hasattr(variable, "dtype"):
            continue  # (a look-up table's handler has no dtype)
        if read.counts(variable):
            left_out.add(id(variable))
            yield variable, read(variable)
