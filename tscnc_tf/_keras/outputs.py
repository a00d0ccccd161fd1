"""What a model returns: logits, as far as its graph, its shapes or its values tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf._keras import is_graph_model, output_layer, wrappers


def classes(name: str, model: Any) -> int | None:
    """Return the number of logits of a model, None where a subclassed one does not tell.

    Raises:
        ValueError: the model is Sequential or functional, and its outputs are no logits.
    """
    if not is_graph_model(model):
        return None
    shape = model.output_shape
    if not isinstance(shape, tuple) or len(shape) != 2 or shape[-1] is None or shape[-1] < 2:
        raise ValueError(_wrong_shape(name, f"shape {shape}"))
    last = output_layer(model)
    last = last.layer if wrappers.is_wrapper(last) else last
    activation = getattr(getattr(last, "activation", None), "__name__", "")
    operation = str(getattr(last, "symbol", type(last).__name__)).rpartition(".")[2].lower()
    ending = activation or operation  # of a layer, or of a TensorFlow function in the graph
    if ending in ("softmax", "sigmoid"):
        raise ValueError(
            f"{name} must return logits, but its last layer {last.name!r} ends in a {ending}: "
            "leave that activation out."
        )
    return shape[-1]


def traced_classes(name: str, function: Callable[[Any], Any], x: tf.Tensor) -> int | None:
    """Return the number of logits that a function returns for batches such as x, None if unknown.

    Nothing is computed: the function is traced.

    Raises:
        ValueError: it returns no logits.
    """
    with tf.init_scope():  # so also from within a step
        spec = tf.TensorSpec((None, *x.shape[1:]), x.dtype)
        traced = tf.function(function, autograph=False).get_concrete_function(spec)
    return number_of_logits(name, traced.structured_outputs)


def number_of_logits(name: str, outputs: Any) -> int | None:
    """Return the number of logits in what a model returned, None if that is not known.

    Raises:
        ValueError: it is no tensor of logits, or there is but one of them.
    """
    if not isinstance(outputs, tf.Tensor | tf.TensorSpec | np.ndarray):
        raise ValueError(_wrong_shape(name, f"a {type(outputs).__name__}"))
    shape = tf.TensorShape(outputs.shape)
    if shape.rank is None:
        return None
    if shape.rank != 2 or (shape[1] is not None and shape[1] < 2):
        raise ValueError(_wrong_shape(name, f"shape {shape}"))
    return shape[1]


def are_probabilities(outputs: Any) -> tf.Tensor:
    """Tell whether all outputs `(batch, classes)` are in [0, 1] and each row sums to 1."""
    outputs = tf.cast(outputs, tf.float32)
    is_unit = tf.reduce_all((outputs >= 0.0) & (outputs <= 1.0 + 1e-6))
    return is_unit & tf.reduce_all(tf.abs(tf.reduce_sum(outputs, axis=-1) - 1.0) <= 1e-3)


def about_probabilities(name: str) -> str:
    """Return what is to be said of a model whose outputs are probabilities."""
    return (
        f"{name} must return logits, but returns probabilities: all outputs are in [0, 1], and "
        "each row sums to 1. Attacks need logits: a softmax that is certain has no gradient left, "
        "and makes a model look robust. Leave out the last softmax (activation=None), or pass the "
        "part of the model before it."
    )


def _wrong_shape(name: str, found: Any) -> str:
    return (
        f"{name} must return logits of shape (batch, classes) with 2 classes or more, got {found}. "
        "A network with one output z for two classes has the logits (0, z)."
    )
