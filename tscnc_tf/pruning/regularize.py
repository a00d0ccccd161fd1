"""Attach regularizers to the layers of a model that exists already."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

from tscnc_tf import _keras, regularizers
from tscnc_tf._keras import cloning, wrappers
from tscnc_tf._keras import layers as kernel_layers
from tscnc_tf._keras.selection import listed, selector


def add_regularizers(model: Any, regularizer: Any, *, layers: Any = None) -> Any:
    """Return a copy of a model with a regularizer on its kernels; weights and outputs are the same.

    In Keras, setting `layer.kernel_regularizer` does nothing once the layer is built. So the layers
    are built anew from their configuration, with the regularizer in it, and given the old weights.

    What a layer has for a regularizer already stays: both are added up. Kernels of grouped,
    depthwise, separable and transposed convolutions are read as what they are. Layers inside
    wrappers (TimeDistributed, Bidirectional, RNN) are followed, and a layer that is used in several
    places stays one. A warning names the chosen kernels that stay unconstrained, such as those of
    MultiHeadAttention, which take a regularizer by hand, with `layout="attention"`.

    Args:
        model: a Sequential or functional model of either Keras, built; nested models are followed.
        regularizer: a regularizer of `tscnc_tf.regularizers`, or any other `kernel -> penalty`.
        layers: which layers: a layer class or a tuple of them, a layer of the model, a name pattern
            such as "conv*", a predicate `layer -> bool`, or a list of these; None for all that
            have a kernel. Who chooses a layer chooses the layers inside it. What is in a list and
            fits no layer of the model is an error.

    Returns:
        A new, uncompiled model of the same Keras. The old one is not changed.

    Raises:
        TypeError: `model` is no Keras model, or `regularizer` is not callable.
        ValueError: the model is subclassed, not built, pruned already, holds a layer that can't be
            rebuilt from its configuration, no layer is chosen, or a name, class or layer in a list
            fits none.

    Example:
        >>> import tf_keras
        >>> import tscnc_tf as tscnc
        >>> model = tf_keras.Sequential([tf_keras.layers.Dense(3, input_shape=(4,))])
        >>> model = tscnc.pruning.add_regularizers(
        ...     model, tscnc.regularizers.TSCNC(sparsity_factor=1e-5, condition_factor=1e-2))
        >>> len(model.losses)
        1
    """
    library = _keras.library("model", model)
    _keras.require_graph_model("model", model)
    _keras.require_built("model", model)
    if not callable(regularizer):
        raise TypeError(f"regularizer must be callable, got {regularizer!r}.")
    if wrappers.wrapped_layers(model):
        raise ValueError(
            f"model {model.name!r} is pruned already: call add_regularizers before prune, "
            "or strip the pruning wrappers first."
        )
    chosen = selector("layers", layers, model, _able(model))
    rebuilding = _Rebuilding(library, regularizer, chosen)
    copy = cloning.cloned(library, model, rebuilding.clone)
    if not rebuilding.constrained:
        raise ValueError(
            f"layers={layers!r} chooses no layer with a kernel in model {model.name!r}; those that "
            f"have one are {listed(_able(model), layers)}."
        )
    cloning.set_weights(library, copy, model.get_weights())
    if names := rebuilding.unconstrained():
        warnings.warn(
            f"These kernels are chosen, but stay unconstrained: {', '.join(names)}. They are not "
            "one matrix from inputs to outputs, or their layer's configuration has no place for "
            "a regularizer. Attention and EinsumDense take one by hand, with layout= (see "
            "KernelRegularizer). Choose the others by layers= if that is meant.",
            UserWarning,
            stacklevel=2,
        )
    return copy


def _able(layer: Any) -> Iterator[Any]:
    """Yield the layers, of a model or in a layer, whose kernels take a regularizer."""
    specs = kernel_layers.kernel_specs(layer)
    if specs and any(spec.regularizer in layer.get_config() for spec in specs):
        yield layer  # what is inside, such as a cell, has no configuration of its own
        return
    for part in kernel_layers.parts(layer):
        yield from _able(part)


class _Rebuilding:
    """Builds the layers of one model anew, with a regularizer on the kernels that are chosen."""

    def __init__(self, library: Any, regularizer: Any, chosen: Callable[[Any], bool]) -> None:
        self.library = library
        self.regularizer = regularizer
        self.chosen = chosen
        self.constrained = 0
        self._clones: dict[int, Any] = {}  # a layer may be shared by several models
        self._pairs: list[tuple[Any, Any]] = []

    def clone(self, layer: Any) -> Any:
        """Return the new layer or model that stands for an old one, the same one each time."""
        if id(layer) not in self._clones:
            self._clones[id(layer)] = self._rebuilt(layer)
        return self._clones[id(layer)]

    def _rebuilt(self, layer: Any) -> Any:
        if isinstance(layer, self.library.Model):
            _keras.require_graph_model("model: its part", layer)
            return self.library.models.clone_model(layer, clone_function=self.clone)
        config = self._with_regularizer(layer, layer.get_config(), False)
        new = cloning.rebuilt(layer, lambda: type(layer).from_config(config))
        self._pairs.append((layer, new))
        return new

    def _with_regularizer(self, layer: Any, config: dict[str, Any], taken: bool) -> dict[str, Any]:
        """Return a layer's configuration with the regularizer in it and in the layers inside."""
        taken = taken or self.chosen(layer)
        config = dict(config)
        for spec in kernel_layers.kernel_specs(layer) if taken else ():
            if spec.regularizer in config:
                config[spec.regularizer] = _combined(
                    config[spec.regularizer], self.regularizer, spec, self.library
                )
                self.constrained += 1
        if isinstance(layer, self.library.Model):
            named = {part.name: part for part in layer.layers}
            config["layers"] = [
                self._inside(named.get(packed["config"].get("name")), packed, taken)
                for packed in config.get("layers", ())
            ]
            return config
        for key, packed in config.items():
            if key == "layer" and isinstance(layer, self.library.layers.Bidirectional):
                # Not every Keras keeps the layer that both directions were made from.
                config[key] = self._inside(layer.forward_layer, packed, taken)
            elif isinstance(packed, dict):
                config[key] = self._inside(getattr(layer, key, None), packed, taken)
            elif isinstance(packed, list | tuple):  # the cells of a StackedRNNCells
                parts = getattr(layer, key, None)
                if isinstance(parts, list | tuple) and len(parts) == len(packed):
                    pairs = zip(parts, packed, strict=True)
                    config[key] = [self._inside(part, inner, taken) for part, inner in pairs]
        return config

    def _inside(self, part: Any, packed: Any, taken: bool) -> Any:
        """Return what `_with_regularizer` makes of a layer that is serialized in another's."""
        if not isinstance(part, self.library.layers.Layer) or not isinstance(packed, dict):
            return packed
        if not isinstance(packed.get("config"), dict):
            return packed
        return {**packed, "config": self._with_regularizer(part, packed["config"], taken)}

    def unconstrained(self) -> list[str]:
        """Return the names of the chosen kernels that got no regularizer. The copy is built."""
        names = []
        seen: set[int] = set()
        for layer, new in self._pairs:
            parts = list(kernel_layers.flatten(layer))
            taken = {
                id(inner)
                for part in parts
                if self.chosen(part)
                for inner in kernel_layers.flatten(part)
            }
            for before, after in zip(parts, kernel_layers.flatten(new), strict=False):
                specs = {spec.attribute: spec for spec in kernel_layers.kernel_specs(before)}
                for attribute, variable in kernel_layers.named_kernels(before):
                    if id(before) not in taken or id(variable) in seen:
                        continue
                    seen.add(id(variable))
                    spec = specs.get(attribute)
                    if spec is None or not _is_added(before, after, spec.regularizer):
                        path = [layer.name] if before is layer else [layer.name, before.name]
                        names.append("/".join([*path, attribute]))
        return names


def _is_added(before: Any, after: Any, argument: str) -> bool:
    """Tell whether a rebuilt layer has a regularizer in addition to what it had."""
    old, new = getattr(before, argument, None), getattr(after, argument, None)
    if old is None:
        return new is not None
    if not isinstance(new, regularizers.RegularizerSum):
        return False
    return type(old) is not type(new) or old.get_config() != new.get_config()


def _combined(existing: Any, new: Any, spec: kernel_layers.KernelSpec, library: Any) -> Any:
    """Return what a layer's configuration holds already and what comes, added up."""
    if isinstance(new, regularizers.KernelRegularizer | regularizers.RegularizerSum):
        new = new.for_kernel(layout=spec.layout, channel_groups=spec.channel_groups)
    if existing is not None:
        before = library.regularizers.get(existing)
        new = regularizers.RegularizerSum([before, new], library.__name__)
    return new
