"""Attach regularizers to the layers of an existing model."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from tscnc_tf import _keras, regularizers
from tscnc_tf._keras import cloning, masks, wrappers
from tscnc_tf._keras import layers as kernel_layers
from tscnc_tf._keras.models import listed, selector


def add_regularizers(model: Any, regularizer: Any, *, layers: Any = None) -> Any:
    """Return a copy of a model with a regularizer on its kernels; weights and outputs are the same.

    In Keras, setting `layer.kernel_regularizer` has no effect once the layer is built. So the
    layers are rebuilt from their configurations with the regularizer, and the weights are copied.
    Frozen layers stay frozen; functions and adapted vocabularies are copied, too.

    If a layer already has a regularizer, both are added. The kernels of grouped, depthwise,
    separable and transposed convolutions are read with the right layout. Layers inside wrappers
    (TimeDistributed, Bidirectional, RNN) are included, and a layer that is used in several places
    remains one layer. A warning names the chosen kernels that get no regularizer, such as those of
    MultiHeadAttention: give these layers one by hand, with `layout="attention"`.

    Args:
        model: a built Sequential or functional model of either Keras; nested models are included.
        regularizer: a regularizer of `tscnc_tf.regularizers`, or any other `kernel -> penalty`.
        layers: which layers: a layer class or a tuple of them, a layer of the model, a name pattern
            such as "conv*", a predicate `layer -> bool`, or a list of these; None for all that
            have a kernel. A chosen layer includes the layers inside it. An element of a list that
            matches no layer of the model is an error.

    Returns:
        A new, uncompiled model of the same Keras. The given model is not changed.

    Raises:
        TypeError: `model` is no Keras model, or `regularizer` is not callable.
        ValueError: the model is subclassed, not built, already pruned (or a model inside it is), or
            has a layer that can't be rebuilt from its configuration; no layer is chosen, or one
            that is quantized or has LoRA enabled; or an element of a list matches no layer.

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
    if wrappers.wrapped_layers(model) or masks.pruners(model):
        raise ValueError(
            f"model {model.name!r} is pruned already, or a part of it: call add_regularizers "
            "before prune, or strip the model first."
        )
    chosen = selector("layers", layers, model, _able(model))
    rebuilding = _Rebuilding(library, model, regularizer, chosen)
    copy = rebuilding.rebuild(model)
    if not rebuilding.constrained:
        raise ValueError(
            f"layers={layers!r} chooses no layer with a kernel in model {model.name!r}; those that "
            f"have one are {listed(_able(model), layers)}."
        )
    if names := rebuilding.unconstrained():
        warnings.warn(
            f"These kernels are chosen, but stay unconstrained: {', '.join(names)}. They are not "
            "one matrix from inputs to outputs, or their layer's configuration has no entry for "
            "a regularizer. Give attention and EinsumDense layers one by hand, with layout= (see "
            "KernelRegularizer). To avoid this warning, choose the other layers by layers=.",
            UserWarning,
            stacklevel=2,
        )
    return copy


def _able(layer: Any) -> Iterator[Any]:
    """Yield the layers, of a model or in a layer, whose kernels take a regularizer."""
    specs = kernel_layers.kernel_specs(layer)
    if specs and any(spec.regularizer in layer.get_config() for spec in specs):
        yield layer  # parts such as a cell have no configuration of their own
        return
    for part in kernel_layers.parts(layer):
        yield from _able(part)


class _Rebuilding(cloning.Rebuilder):
    """Rebuilds the layers of one model with a regularizer on the chosen kernels."""

    def __init__(
        self,
        library: types.ModuleType,
        model: Any,
        regularizer: Any,
        chosen: Callable[[Any], bool],
    ) -> None:
        super().__init__(library)
        self.regularizer = regularizer
        self.constrained = 0
        self._graph = list(_layers(library, model))
        # A chosen layer includes the layers inside it.
        self._chosen = {
            id(inner)
            for layer in self._graph
            for part in kernel_layers.flatten(layer)
            if chosen(part)
            for inner in kernel_layers.flatten(part)
        }

    def configured(self, layer: Any, config: dict[str, Any]) -> dict[str, Any]:
        """Return the configuration, with the regularizer if the layer is chosen."""
        for spec in kernel_layers.kernel_specs(layer) if id(layer) in self._chosen else ():
            if spec.regularizer not in config:
                continue
            kernel_layers.require_plain(layer, "a regularizer on it")
            config[spec.regularizer] = _combined(
                config[spec.regularizer], self.regularizer, spec, self.library
            )
            self.constrained += 1
        return config

    def unconstrained(self) -> list[str]:
        """Return the names of the chosen kernels without the regularizer; call it after rebuild."""
        constrained = {
            id(getattr(before, spec.attribute, None))
            for before, after in self.pairs
            for spec in kernel_layers.kernel_specs(before)
            if _is_added(before, after, spec.regularizer)
        }
        # By the ids of the kernels, as wrappers have those of the layer inside, too.
        names: dict[int, str] = {}
        for layer in self._graph:
            for part in kernel_layers.flatten(layer):
                for attribute, variable in kernel_layers.named_kernels(part):
                    if id(part) in self._chosen and id(variable) not in constrained:
                        path = [layer.name] if part is layer else [layer.name, part.name]
                        names.setdefault(id(variable), "/".join([*path, attribute]))
        return list(names.values())


def _layers(library: types.ModuleType, model: Any) -> Iterator[Any]:
    """Yield the layers of a model and of the models nested in it."""
    for layer in model.layers:
        if isinstance(layer, library.Model):
            yield from _layers(library, layer)
        else:
            yield layer


def _is_added(before: Any, after: Any, argument: str) -> bool:
    """Return whether a rebuilt layer has another regularizer than before."""
    old, new = getattr(before, argument, None), getattr(after, argument, None)
    if old is None:
        return new is not None
    if not isinstance(new, regularizers.RegularizerSum):
        return False
    return type(old) is not type(new) or old.get_config() != new.get_config()


def _combined(existing: Any, new: Any, spec: kernel_layers.KernelSpec, library: Any) -> Any:
    """Return the sum of the regularizer in a layer's configuration and the new one."""
    if isinstance(new, regularizers.KernelRegularizer | regularizers.RegularizerSum):
        new = new.for_kernel(layout=spec.layout, channel_groups=spec.channel_groups)
    if existing is not None:
        before = library.regularizers.get(existing)
        new = regularizers.RegularizerSum([before, new], library.__name__)
    return new
