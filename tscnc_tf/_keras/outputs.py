"""What a model returns: logits, as far as its graph, its shapes or its values tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf._keras import (
    adapted,
    flavour,
    gated,
    inference,
    inputs,
    is_graph_model,
    keras,
    matrices,
    output_layer,
    tf_keras,
    wrappers,
)
from tscnc_tf._keras import layers as kernel_layers


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


def require_no_probabilities(
    name: str, model: Any, bounds: tuple[float, float] = (0.0, 1.0)
) -> None:
    """Raise a ValueError if a model returns probabilities for inputs drawn within bounds.

    A softmax may be nested in it, or followed by a layer that changes nothing. Where it is not
    known what the model takes, nothing is said.
    """
    drawn = inputs.draw_one(model, 4, np.random.default_rng(0))
    if drawn is None:
        return
    low, high = bounds
    returned = inference(model)(tf.constant(low + (high - low) * drawn, drawn.dtype))
    is_matrix = isinstance(returned, tf.Tensor) and returned.shape.rank == 2
    if is_matrix and bool(are_probabilities(returned)):
        raise ValueError(about_probabilities(name))


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


def kernels(model: Any) -> list[Any] | None:
    """Return the kernels each of whose filters makes one output of a model; None if not known.

    Followed back from each output are layers without kernels of their own. Where several tensors
    are added or multiplied, an output hangs on the filters that all of them hang on. The graph of a
    subclassed model is not known. A recurrent layer has no such kernels: its outputs depend on its
    state as well.
    """
    return list(_follow(model, None)[0].values()) if is_graph_model(model) else None


def _follow(model: Any, which: int | None) -> tuple[dict[int, Any], bool]:
    """Return the kernels that make the outputs of a graph model, or the one at position `which`.

    Returns:
        The kernels by their ids; and whether some path from an output ends at an input of the
        model, without a kernel in between.
    """
    if isinstance(model, keras.Sequential | tf_keras.Sequential):
        found: dict[int, Any] = {}
        for layer in reversed(model.layers):
            made, passes = _made_by(layer, None)
            found |= made
            if not passes:
                return found, False
        return found, True
    known: dict[int, dict[int, Any]] = {}
    ends_at_input = False

    def back(tensor: Any) -> dict[int, Any]:
        nonlocal ends_at_input
        if id(tensor) not in known:
            layer, inputs, position = origin(tensor)
            made, passes = _made_by(layer, position) if inputs else ({}, True)
            ends_at_input |= not inputs
            known[id(tensor)] = made | (_joined(layer, map(back, inputs)) if passes else {})
        return known[id(tensor)]

    found = {}
    for tensor in model.outputs if which is None else [model.outputs[which]]:
        found |= back(tensor)
    return found, ends_at_input


def origin(tensor: Any) -> tuple[Any, list[Any], int]:
    """Return what made a symbolic tensor, out of which others, and at which position."""
    history = tensor._keras_history
    if flavour(tensor) == "tf_keras":
        layer = history.layer
        inputs = layer._inbound_nodes[history.node_index].keras_inputs
    else:
        layer = history.operation
        inputs = layer._inbound_nodes[history.node_index].input_tensors
    inputs = list({id(each): each for each in inputs if each is not tensor}.values())
    return layer, inputs, history.tensor_index


def _joined(layer: Any, branches: Iterable[dict[int, Any]]) -> dict[int, Any]:
    """Return the kernels that make the outputs of a layer without any, of those of its inputs."""
    first, *others = branches
    name = str(getattr(layer, "symbol", type(layer).__name__))  # of a TensorFlow function, or class
    if name.rpartition(".")[2].lower() in ("concat", "concatenate"):
        return first | {key: kernel for other in others for key, kernel in other.items()}
    return {key: kernel for key, kernel in first.items() if all(key in other for other in others)}


def _made_by(layer: Any, which: int | None) -> tuple[dict[int, Any], bool]:
    """Return the kernels that make a layer's outputs, and whether what it reads makes them, too."""
    if wrappers.is_wrapper(layer) or gated.is_gated(layer):
        layer = layer.layer
    library = keras if flavour(layer) == "keras" else tf_keras
    if is_graph_model(layer):
        return _follow(layer, which)
    if isinstance(layer, library.layers.RNN | library.layers.Bidirectional):
        return {}, False
    if isinstance(layer, library.layers.Wrapper):  # such as TimeDistributed
        return _made_by(layer.layer, None)
    if not isinstance(layer, library.layers.Layer):
        return {}, True  # an operation
    parts = list(kernel_layers.flatten(layer))
    attention = [part for part in parts if part is not layer and part.name == "attention_output"]
    last = attention[-1] if attention else layer
    is_einsum = isinstance(last, library.layers.EinsumDense)
    names = ["kernel"] if is_einsum else [s.attribute for s in kernel_layers.kernel_specs(last)]
    made = [adapted.stored(last, name) for name in names[-1:]]
    no_kernels = (*matrices.BIASES, *matrices.NO_KERNELS)
    passes = not any(
        len(weight.shape) >= 2 and matrices.leaf(weight) not in no_kernels
        for part in parts
        for weight in part.weights
    )
    return {id(kernel): kernel for kernel in made}, passes
