"""Building models and layers anew, in both Kerases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tscnc_tf._keras import keras, layers


def cloned(library: Any, model: Any, clone: Callable[[Any], Any]) -> Any:
    """Return a clone that is not compiled; Keras 3 by itself would compile it as the model is.

    Args:
        library: the Keras that the model is made of.
        model: a Sequential or functional model.
        clone: returns the layer that stands for an old one.
    """
    if library is not keras:
        return library.models.clone_model(model, clone_function=clone)
    was_compiled, model.compiled = model.compiled, False
    try:
        return library.models.clone_model(model, clone_function=clone)
    finally:
        model.compiled = was_compiled


def rebuilt(layer: Any, build: Callable[[], Any]) -> Any:
    """Return what `build` makes of the configuration of a layer.

    Raises:
        ValueError: that is not possible.
    """
    try:
        return build()
    except Exception as error:
        raise ValueError(
            f"layer {layer.name!r} of class {type(layer).__name__} can't be rebuilt from its "
            "configuration: give the class a get_config that returns all arguments of its "
            "constructor."
        ) from error


def set_weights(library: Any, model: Any, weights: Any) -> None:
    """Give a model or layer its weights, and let its layers derive from them what they need."""
    model.set_weights(weights)
    for layer in layers.flatten(model):
        if isinstance(layer, library.layers.Normalization):
            layer.finalize_state()  # it computes with what it derives from its weights
