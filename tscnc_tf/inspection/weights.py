"""The weights of a model as they act, in float64: masks, gates and LoRA in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _reports, functional
from tscnc_tf._keras import (
    adapted,
    gated,
    keras,
    layers,
    matrices,
    require_built,
    tf_keras,
    wrappers,
)
from tscnc_tf._keras import masks as masking


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A weight as it acts: its variable times its mask and its gates, if it has any.

    Attributes:
        name: unique within the model.
        variable: the variable that was read.
        values: float64, of the variable's shape.
        masked: whether it carries a mask.
    """

    name: str
    variable: Any
    values: np.ndarray
    masked: bool


@dataclasses.dataclass(frozen=True, eq=False)
class KernelWeight(Weight):
    """A kernel as it acts.

    Attributes:
        kernel: how to read it as matrices.
    """

    kernel: layers.Kernel

    def canonical(self) -> np.ndarray:
        """Return the kernel as `(groups, positions, inputs, outputs)`."""
        return functional.canonical(self.values, **self.kernel.reading).numpy()

    def matrices(self) -> np.ndarray:
        """Return the kernel as tall matrices, `(groups, p, n)` with `p >= n`."""
        return functional.matrices(self.values, **self.kernel.reading).numpy()


def require_inspectable(model: Any) -> None:
    """Raise unless `model` is a built Keras model or layer, of either Keras."""
    if not isinstance(model, (keras.layers.Layer, tf_keras.layers.Layer)):
        raise TypeError(
            "model must be a Keras 3 or tf_keras model (or layer), got "
            f"{type(model).__name__}: weights are found through the layers that hold them."
        )
    require_built("model", model)


def masks(model: Any) -> dict[int, Any]:
    """Return the mask of each pruned variable, by the variable's id.

    Of tfmot's wrappers the mask itself, as the wrapper multiplies by it in every call. A pruner
    sets weights to zero and no more: they act as they are, so it is None.
    """
    wrapped = {id(weight): mask for weight, mask in wrappers.pruned_variables(model)}
    return {id(w): wrapped.get(id(w)) for w, _ in masking.masked_variables(model)}


def reader(model: Any) -> Callable[[Any], np.ndarray]:
    """Return `variable -> its values as they act` for the variables of a model.

    Of a layer with LoRA these are those of the sum, and of a quantized one the numbers that its
    integers stand for.
    """
    by_variable, gates, in_layer = masks(model), gated.factors(model), _adapted(model)

    def values(variable: Any) -> np.ndarray:
        if (layer := in_layer.get(id(variable))) is not None:
            return adapted.acting(layer)
        return read(variable, by_variable.get(id(variable)), gates.get(id(variable)))

    return values


def read(variable: Any, mask: Any = None, gates: Any = None) -> np.ndarray:
    """Return a variable's values in float64, times its mask, times its gates.

    Between an optimizer's step and the next forward pass, a pruned weight is not zero although its
    mask is; what acts is the product. Gates are those of inference.
    """
    value = tf.convert_to_tensor(variable)
    value = value if gates is None else gated.times(value, gates)
    values = np.asarray(tf.cast(value, tf.float64))
    if mask is None:
        return values
    return values * np.asarray(tf.cast(tf.convert_to_tensor(mask), tf.float64))


def kernels(model: Any) -> list[KernelWeight]:
    """Return the kernels of a built model; there may be none."""
    found = list(layers.kernels(model))
    names = _reports.unique(kernel.name for kernel in found)
    by_variable, acting = masks(model), reader(model)
    result = []
    for name, kernel in zip(names, found, strict=True):
        is_masked = id(kernel.variable) in by_variable
        values = acting(kernel.variable)
        result.append(KernelWeight(name, kernel.variable, values, is_masked, kernel))
    return result


def others(model: Any) -> list[Weight]:
    """Return what is pruned, or would be, and is none of `kernels`, as it is not one matrix.

    LoRA and quantization keep a kernel from being pruned, not from being listed.
    Those are kernels of attention and of layers of the user's; and whatever else carries a mask,
    such as an embedding.
    """
    by_variable, acting = masks(model), reader(model)
    known = {id(kernel.variable) for kernel in layers.kernels(model)}
    owners = {
        id(weight): (layer, weight)
        for _, layer, weight, _ in matrices.owned(model, lambda _: False)
        if id(weight) in by_variable or matrices.is_kernel(layer, weight)
    }
    vectors = by_variable.keys() - owners.keys()  # who asks for it has these pruned, too
    for layer in layers.flatten(model) if vectors else ():  # what comes later lies deeper
        if not wrappers.is_wrapper(layer):
            owners |= {id(v): (layer, v) for v in layer.weights if id(v) in vectors}
    return [
        Weight(f"{layer.name}/{matrices.leaf(weight)}", weight, acting(weight), key in by_variable)
        for key, (layer, weight) in owners.items()
        if key not in known
    ]


def listed(model: Any) -> list[Weight]:
    """Return the weights that reports have rows for: `kernels`, then `others`.

    Raises:
        ValueError: there are none.
    """
    found = [*kernels(model), *others(model)]
    if not found:
        raise ValueError(f"model {model.name!r} has neither kernels nor pruned weights to look at.")
    return found


def totals(model: Any) -> tuple[int, int]:
    """Return the number of weights that the network computes with, and how many are zero."""
    every = [(values.size, np.count_nonzero(values)) for _, values in all_weights(model)]
    count = sum(size for size, _ in every)
    return count, count - int(sum(alive for _, alive in every))


def all_weights(model: Any) -> Iterator[tuple[Any, np.ndarray]]:
    """Yield every weight that the network computes with: the variable, and its values as they act.

    What belongs to pruning is not among them (masks, thresholds, counters), nor to gates, nor are
    metrics, nor is what is no float (counters, seeds, look-up tables). LoRA's factors are part of
    the weights that they are added to, and scales of those that they multiply.
    """
    in_layer = _adapted(model)
    helpers: set[int] = set()
    for layer in model._flatten_layers():
        if isinstance(layer, tf_keras.Model):  # whose weights may hold its metrics' variables
            helpers |= {id(variable) for metric in layer.metrics for variable in metric.variables}
    helpers |= set(masking.names(model)) | set(gated.names(model))
    helpers |= {id(v) for layer in layers.flatten(model) for v in adapted.companions(layer)}
    acting = reader(model)
    seen: set[int] = set()
    for variable in model.weights:
        if id(variable) in helpers | seen or not hasattr(variable, "dtype"):
            continue  # (a look-up table's handler has no dtype)
        if not tf.as_dtype(variable.dtype).is_floating and id(variable) not in in_layer:
            continue
        seen.add(id(variable))
        yield variable, acting(variable)


def _adapted(model: Any) -> dict[int, Any]:
    """Return the layers whose weight acts in another form than it is stored, by the weight's id."""
    found = {id(adapted.weight(layer)): layer for layer in layers.flatten(model)}
    return {key: layer for key, layer in found.items() if key != id(None)}
