"""Which layers a verb is meant for: by type, by name pattern, by predicate."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any

from tscnc_tf._keras import keras, tf_keras
from tscnc_tf._keras import layers as kernel_layers


def selector(name: str, layers: Any) -> Callable[[Any], bool]:
    """Return a predicate on layers for an argument `layers`.

    Args:
        name: the argument's name, for the error.
        layers: None (all), a layer class or a tuple of them, a layer of the model or a model nested
            in it (that one and all inside), a name pattern with `*` and `?`, a predicate
            `layer -> bool`, or a list of any of these (a layer is chosen if one holds).

    Raises:
        TypeError: `layers` is none of these.
    """
    if layers is None:
        return lambda _: True
    if isinstance(layers, type):
        return lambda layer: isinstance(layer, layers)
    if isinstance(layers, keras.layers.Layer | tf_keras.layers.Layer):
        parts_of_it = list(kernel_layers.flatten(layers))
        return lambda layer: any(layer is part for part in parts_of_it)
    if isinstance(layers, str):
        return lambda layer: fnmatch.fnmatchcase(layer.name, layers)
    if isinstance(layers, list | tuple):
        parts = [selector(name, part) for part in layers]
        return lambda layer: any(part(layer) for part in parts)
    if callable(layers):
        return lambda layer: bool(layers(layer))
    raise TypeError(
        f"{name} must be a layer class, a layer, a name pattern, a predicate, or a list of these, "
        f"got {layers!r}."
    )
