"""The interface of layers that multiply the weights of a wrapped layer by gates."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from tscnc_tf._keras import layers


class GatedLayer(abc.ABC):
    """Interface of wrappers that compute like the wrapped layer, with some weights gated.

    Attributes:
        layer: the wrapped layer, whose variables hold the weights without their gates.
    """

    layer: Any

    @abc.abstractmethod
    def gated_variables(self) -> Iterator[tuple[Any, Any]]:
        """Yield (variable, gates) of inference; gates broadcast with the variable."""

    @abc.abstractmethod
    def own_variables(self) -> list[Any]:
        """Return the variables of the gates, without those of the wrapped layer."""


def is_gated(layer: Any) -> bool:
    """Return whether `layer` is a `GatedLayer`."""
    return isinstance(layer, GatedLayer)


def gated_layers(model: Any) -> list[Any]:
    """Return the gated layers in `model` (or `model` itself, if it is one), each once."""
    return list({id(part): part for part in layers.flatten(model) if is_gated(part)}.values())


def factors(model: Any) -> dict[int, Any]:
    """Return the inference gates of all gated variables, by the variable's id."""
    return {
        id(variable): gates
        for layer in gated_layers(model)
        for variable, gates in layer.gated_variables()
    }


def require_none(model: Any, function: str) -> None:
    """Raise a ValueError if a model has gates, which `function` does not support."""
    if gated_layers(model):
        raise ValueError(
            f"model {model.name!r} still has gates: fold them into its weights first, "
            f"{function}(tscnc_tf.gates.fold(model))."
        )


def times(value: tf.Tensor, gates: tf.Tensor) -> tf.Tensor:
    """Return a weight times its gates, in the dtype of the weight."""
    return value * tf.cast(gates, value.dtype)


def owners(model: Any) -> dict[int, Any]:
    """Return the gated layer around each wrapped layer, by the id of the latter."""
    return {id(gated.layer): gated for gated in gated_layers(model)}


def names(model: Any) -> dict[int, str]:
    """Return the names of the variables of gates, by the variables' ids."""
    return {
        id(variable): variable.name
        for layer in gated_layers(model)
        for variable in layer.own_variables()
    }


def with_values(layer: Any, values: dict[int, Any]) -> Any:
    """Return a view of a layer that computes with tensors in place of some of its variables.

    It shares all other attributes with the layer; see `layers.view`.

    Args:
        layer: a built layer of either Keras.
        values: the tensors, by the ids of the variables that they replace.

    Raises:
        ValueError: a variable is not an attribute of the layer, as with LoRA.
    """
    attributes = vars(layer)
    if missing := values.keys() - {id(value) for value in attributes.values()}:
        raise ValueError(
            f"layer {layer.name!r} of class {type(layer).__name__} does not compute with "
            f"{len(missing)} of the weights to be gated, but with values derived from them, as "
            "with LoRA or quantization: bring it into its plain form first."
        )
    held = {name: value for name, value in attributes.items() if id(value) in values}
    return layers.view(layer, **{name: values[id(value)] for name, value in held.items()})
