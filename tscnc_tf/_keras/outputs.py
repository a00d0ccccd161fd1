"""What a model returns, as far as its graph tells."""

from __future__ import annotations

from typing import Any

from tscnc_tf._keras import (
    adapted,
    flavour,
    gated,
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
        raise ValueError(
            f"{name} must return logits of shape (batch, classes) with 2 classes or more, got "
            f"shape {shape}."
        )
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


def kernels(model: Any) -> list[Any] | None:
    """Return the kernels each of whose filters makes one output of a model; None if not known.

    Followed back from each output are layers without kernels of their own that take one tensor, and
    concatenations: where several tensors are added, an output does not hang on one filter. The
    graph of a subclassed model is not known. A recurrent layer has no such kernels: its outputs
    depend on its state as well.
    """
    if not is_graph_model(model):
        return None
    found: list[Any] = []
    _follow(model, None, found)
    return list({id(kernel): kernel for kernel in found}.values())


def _follow(model: Any, which: int | None, found: list[Any]) -> bool:
    """Collect the kernels that make the outputs of a graph model, or the one at position `which`.

    Returns:
        Whether there is nothing but layers without kernels between an input and an output.
    """
    if isinstance(model, keras.Sequential | tf_keras.Sequential):
        return all(_passes(layer, None, found) for layer in reversed(model.layers))
    seen: set[int] = set()

    def back(tensor: Any) -> bool:
        if id(tensor) in seen:
            return False
        seen.add(id(tensor))
        history = tensor._keras_history
        if flavour(model) == "tf_keras":
            layer = history.layer
            inputs = layer._inbound_nodes[history.node_index].keras_inputs
        else:
            layer = history.operation
            inputs = layer._inbound_nodes[history.node_index].input_tensors
        inputs = list({id(each): each for each in inputs if each is not tensor}.values())
        if not inputs:
            return True
        passes = _passes(layer, history.tensor_index, found)
        if not passes or (len(inputs) > 1 and not _concatenates(layer)):
            return False
        reached = [back(each) for each in inputs]  # all of them
        return any(reached)

    outputs = model.outputs if which is None else [model.outputs[which]]
    reached = [back(tensor) for tensor in outputs]
    return any(reached)


def _passes(layer: Any, which: int | None, found: list[Any]) -> bool:
    """Tell whether a layer has no kernels to make outputs with; collect those that it has."""
    if wrappers.is_wrapper(layer) or gated.is_gated(layer):
        layer = layer.layer
    library = keras if flavour(layer) == "keras" else tf_keras
    if is_graph_model(layer):
        return _follow(layer, which, found)
    if isinstance(layer, library.layers.RNN | library.layers.Bidirectional):
        return False
    if isinstance(layer, library.layers.Wrapper):  # such as TimeDistributed
        return _passes(layer.layer, None, found)
    if not isinstance(layer, library.layers.Layer):
        return True  # an operation
    parts = list(kernel_layers.flatten(layer))
    attention = [part for part in parts if part is not layer and part.name == "attention_output"]
    last = attention[-1] if attention else layer
    specs = kernel_layers.kernel_specs(last)
    if isinstance(last, library.layers.EinsumDense):
        found.append(adapted.stored(last, "kernel"))
    elif specs:
        found.append(adapted.stored(last, specs[-1].attribute))
    no_kernels = (*matrices.BIASES, *matrices.NO_KERNELS)
    return not any(
        len(weight.shape) >= 2 and matrices.leaf(weight) not in no_kernels
        for part in parts
        for weight in part.weights
    )


def _concatenates(layer: Any) -> bool:
    name = str(getattr(layer, "symbol", type(layer).__name__))  # of a TensorFlow function, or class
    return name.rpartition(".")[2].lower() in ("concat", "concatenate")
