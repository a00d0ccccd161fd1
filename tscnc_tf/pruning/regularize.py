"""Attach regularizers to the layers of a model that exists already."""

from __future__ import annotations

from typing import Any

from tscnc_tf import _keras, regularizers
from tscnc_tf._keras import layers as kernel_layers
from tscnc_tf._keras import wrappers
from tscnc_tf.pruning.selection import selector


def add_regularizers(model: Any, regularizer: Any, *, layers: Any = None) -> Any:
    """Return a copy of a model with a regularizer on its kernels; weights and outputs are the same.

    In Keras, setting `layer.kernel_regularizer` does nothing once the layer is built. So the layers
    are built anew from their configuration, with the regularizer in it, and given the old weights.

    What a layer has for a regularizer already stays: both are added up. Kernels of grouped,
    depthwise, separable and transposed convolutions are read as what they are.

    Args:
        model: a Sequential or functional model of either Keras, built; nested models are followed.
        regularizer: a regularizer of `tscnc_tf.regularizers`, or any other `kernel -> penalty`.
        layers: which layers: a layer class or a tuple of them, a name pattern such as "conv*", a
            predicate `layer -> bool`, or a list of these; None for all that have a kernel.

    Returns:
        A new, uncompiled model of the same Keras. The old one is not changed.

    Raises:
        TypeError: `model` is no Keras model, or `regularizer` is not callable.
        ValueError: the model is subclassed, not built, pruned already, holds a layer that can't be
            rebuilt from its configuration, or no layer is chosen.

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
    chosen = selector("layers", layers)
    touched = []

    def clone(layer: Any) -> Any:
        if isinstance(layer, library.Model):
            _keras.require_graph_model("model: its part", layer)
            return library.models.clone_model(layer, clone_function=clone)
        config = layer.get_config()
        for spec in kernel_layers.kernel_specs(layer) if chosen(layer) else ():
            if spec.regularizer in config:
                config[spec.regularizer] = _combined(
                    config[spec.regularizer], regularizer, spec, library
                )
                touched.append(layer)
        try:
            return type(layer).from_config(config)
        except Exception as error:
            raise ValueError(
                f"layer {layer.name!r} of class {type(layer).__name__} can't be rebuilt from its "
                "configuration: give the class a get_config that returns all arguments of its "
                "constructor."
            ) from error

    copy = library.models.clone_model(model, clone_function=clone)
    if not touched:
        raise ValueError(
            f"layers={layers!r} chooses no layer with a kernel in model {model.name!r}; it has "
            f"{[kernel.name for kernel in kernel_layers.kernels(model)]}."
        )
    copy.set_weights(model.get_weights())
    return copy


def _combined(existing: Any, new: Any, spec: kernel_layers.KernelSpec, library: Any) -> Any:
    """Return what a layer's configuration holds already and what comes, added up."""
    if hasattr(new, "for_kernel"):
        new = new.for_kernel(layout=spec.layout, channel_groups=spec.channel_groups)
    if existing is not None:
        before = library.regularizers.get(existing)
        new = regularizers.Sum([before, new], library.__name__)
    return new
