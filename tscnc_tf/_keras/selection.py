"""Which layers a verb is meant for: by type, by name pattern, by predicate."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

from tscnc_tf._keras import keras, tf_keras
from tscnc_tf._keras import layers as kernel_layers

_LAYERS = (keras.layers.Layer, tf_keras.layers.Layer)


def selector(name: str, layers: Any, model: Any, able: Iterable[Any]) -> Callable[[Any], bool]:
    """Return a predicate on layers for an argument `layers`.

    Args:
        name: the argument's name, for the error.
        layers: None (all), a layer class or a tuple of them, a layer of the model or a model nested
            in it (that one and all inside), a name pattern with `*` and `?`, a predicate
            `layer -> bool`, or a list of any of these (a layer is chosen if one holds).
        model: the model whose layers these are.
        able: its layers that it makes sense to choose, for the error.

    Raises:
        TypeError: `layers` is none of these.
        ValueError: it is a list with something in it that fits no layer of the model. (What fits
            none by itself is an error of the caller's, as is what fits none of `able`.)
    """
    if layers is None:
        return lambda _: True
    single = _single(name, layers)
    if single is not None:
        return single
    every = list(kernel_layers.flatten(model))
    parts = list(_parts(name, layers))
    for part, holds in parts:
        by_name = isinstance(part, (str, type, *_LAYERS))  # what a predicate is for, is not known
        if by_name and not any(holds(layer) for layer in every):
            what = f"layer {part.name!r}" if isinstance(part, _LAYERS) else repr(part)
            raise ValueError(
                f"{name} has {what} in it, which fits no layer of model {model.name!r}; those "
                f"that can be chosen are {listed(able, part)}."
            )
    return lambda layer: any(holds(layer) for _, holds in parts)


def listed(able: Iterable[Any], asked: Any = None) -> str:
    """Return the names of layers that can be chosen, for an error.

    Args:
        able: the layers.
        asked: what was asked for instead; the nearest of the names is suggested for a name.
    """
    names = list(dict.fromkeys(layer.name for layer in able))
    near = difflib.get_close_matches(asked, names, n=1) if isinstance(asked, str) else []
    return f"{names}" + (f" (did you mean {near[0]!r}?)" if near else "")


def _parts(name: str, layers: list[Any] | tuple[Any, ...]) -> Iterable[tuple[Any, Any]]:
    """Yield what is in a list, or in lists inside it, and the predicate that it stands for."""
    for part in layers:
        single = _single(name, part)
        if single is None:
            yield from _parts(name, part)
        else:
            yield part, single


def _single(name: str, layers: Any) -> Callable[[Any], bool] | None:
    """Return the predicate that one class, layer, pattern or predicate stands for; None of a list.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(layers, list | tuple):
        return None
    if isinstance(layers, type):
        return lambda layer: isinstance(layer, layers)
    if isinstance(layers, _LAYERS):
        parts_of_it = list(kernel_layers.flatten(layers))
        return lambda layer: any(layer is part for part in parts_of_it)
    if isinstance(layers, str):
        return lambda layer: fnmatch.fnmatchcase(layer.name, layers)
    if callable(layers):
        return lambda layer: bool(layers(layer))
    raise TypeError(
        f"{name} must be a layer class, a layer, a name pattern, a predicate, or a list of these, "
        f"got {layers!r}."
    )
