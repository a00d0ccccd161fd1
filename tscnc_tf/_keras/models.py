"""Inputs, outputs and kernels of models, and the selection of layers."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf._keras import (
    flavour,
    gated,
    is_graph_model,
    keras,
    tf_keras,
    wrappers,
)
from tscnc_tf._keras import layers as kernel_layers

# Weights of rank 2 or more with these names are not linear maps of the layer's input.
BIASES = ("bias", "beta", "gamma")
NO_KERNELS = ("embeddings", "alpha")
_LAYERS = (keras.layers.Layer, tf_keras.layers.Layer)


# Inputs


def symbols(model: Any) -> Any:
    """Return the symbolic inputs of a Sequential or functional model, in the model's structure."""
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


def draw(symbol: Any, examples: int, generator: np.random.Generator) -> np.ndarray | None:
    """Return examples of an input, drawn from U[0, 1); None if they can't be drawn.

    Args:
        symbol: a symbolic input, or another object with a shape and a dtype. Examples are drawn if
            the dtype is float and the shape known except for the batch.
        examples: the number of examples.
        generator: the source of random numbers.
    """
    shape, dtype = tf.TensorShape(symbol.shape), tf.as_dtype(symbol.dtype)
    if not shape.rank or None in shape[1:].as_list() or not dtype.is_floating:
        return None
    drawn = generator.random((examples, *shape[1:].as_list()), np.float32)
    return drawn.astype(dtype.as_numpy_dtype)


def draw_one(model: Any, examples: int, generator: np.random.Generator) -> np.ndarray | None:
    """Return examples for a built model, drawn from U[0, 1); None if its inputs are not known.

    They are known for a model of one float tensor; for a subclassed model only if Keras has
    recorded the shape that it was built with.
    """
    if is_graph_model(model):
        symbol = symbols(model)
    else:
        shape = (model.get_build_config() or {}).get("input_shape")
        if not isinstance(shape, tuple | tf.TensorShape):
            return None
        symbol = tf.TensorSpec(shape, tf.float32)
    if isinstance(symbol, list | tuple | dict):  # several tensors
        return None
    return draw(symbol, examples, generator)


# Outputs


def classes(name: str, model: Any) -> int | None:
    """Return the number of logits of a model, None for a subclassed one.

    Raises:
        ValueError: the model is Sequential or functional, and its outputs are not logits.
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


def output_layer(model: Any) -> Any:
    """Return the layer (or operation) that computes the first output of a graph model."""
    if isinstance(model, keras.Sequential | tf_keras.Sequential):
        return model.layers[-1]
    if flavour(model) == "tf_keras":
        return model._output_layers[0]
    return model.outputs[0]._keras_history.operation


def traced_classes(name: str, function: Callable[[Any], Any], x: tf.Tensor) -> int | None:
    """Return the number of logits that a function returns for batches such as x, None if unknown.

    The function is traced, not run.

    Raises:
        ValueError: it does not return logits.
    """
    with tf.init_scope():  # works within a compiled step as well
        spec = tf.TensorSpec((None, *x.shape[1:]), x.dtype)
        traced = tf.function(function, autograph=False).get_concrete_function(spec)
    return number_of_logits(name, traced.structured_outputs)


def number_of_logits(name: str, outputs: Any) -> int | None:
    """Return the number of logits in the output of a model, None if it is not known.

    Raises:
        ValueError: the output is not a tensor `(batch, classes)` with at least 2 classes.
    """
    if not isinstance(outputs, tf.Tensor | tf.TensorSpec | np.ndarray):
        raise ValueError(_wrong_shape(name, f"a {type(outputs).__name__}"))
    shape = tf.TensorShape(outputs.shape)
    if shape.rank is None:
        return None
    if shape.rank != 2 or (shape[1] is not None and shape[1] < 2):
        raise ValueError(_wrong_shape(name, f"shape {shape}"))
    return shape[1]


def _wrong_shape(name: str, found: Any) -> str:
    return (
        f"{name} must return logits of shape (batch, classes) with 2 classes or more, got {found}. "
        "A network with one output z for two classes has the logits (0, z)."
    )


def output_kernels(model: Any) -> list[Any] | None:
    """Return the kernels whose filters each compute one output of a model; None if not known.

    Layers without kernels are followed back to their inputs. Where tensors are added or multiplied,
    only kernels that all of them depend on count: removing a filter of another kernel leaves the
    output. The graph of a subclassed model is not known. A recurrent layer has no such kernels: its
    outputs depend on its state as well.
    """
    return list(_follow(model, None)[0].values()) if is_graph_model(model) else None


def _follow(model: Any, which: int | None) -> tuple[dict[int, Any], bool]:
    """Return the output kernels of a graph model, or of its output number `which`.

    Returns:
        The kernels by their ids; and whether a path without a kernel leads from an input of the
        model to an output.
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
    """Return the layer or operation of a symbolic tensor, its inputs, and the tensor's position."""
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
    """Return the output kernels of a layer without kernels, from those of its inputs."""
    first, *others = branches
    name = str(getattr(layer, "symbol", type(layer).__name__))  # of a TensorFlow function, or class
    if name.rpartition(".")[2].lower() in ("concat", "concatenate"):
        return first | {key: kernel for other in others for key, kernel in other.items()}
    return {key: kernel for key, kernel in first.items() if all(key in other for other in others)}


def _made_by(layer: Any, which: int | None) -> tuple[dict[int, Any], bool]:
    """Return a layer's output kernels, and whether those of its inputs count as well."""
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
    made = [kernel_layers.stored(last, name) for name in names[-1:]]
    no_kernels = (*BIASES, *NO_KERNELS)
    passes = not any(
        len(weight.shape) >= 2 and leaf(weight) not in no_kernels
        for part in parts
        for weight in part.weights
    )
    return {id(kernel): kernel for kernel in made}, passes


# Weights


def owned(
    model: Any, chosen: Callable[[Any], bool]
) -> Iterator[tuple[tuple[str, ...], Any, Any, bool]]:
    """Yield (path of names, layer, weight, whether chosen) for each weight of rank 2 or more.

    The path begins below the innermost model. Choosing a layer chooses the layers inside it, except
    for `model` itself, of which only its own weights are chosen: a predicate such as "not the last
    layer" holds for the model as well, and would choose everything.
    """
    seen: set[int] = set()

    def walk(layer: Any, path: tuple[str, ...], taken: bool) -> Iterator[Any]:
        is_model = isinstance(layer, keras.Model | tf_keras.Model)
        above, taken = taken, taken or chosen(layer)
        inside = list(kernel_layers.parts(layer))
        theirs = {id(variable) for part in inside for variable in part.weights}
        here = (*path, layer.name) if not is_model or layer is model else (layer.name,)
        # The own variables of tfmot's wrappers are masks, those of gated layers are gates.
        if wrappers.is_wrapper(layer) or gated.is_gated(layer):
            yield from walk(layer.layer, path, taken)
            return
        for variable in layer.weights:
            is_variable = isinstance(variable, tf.Variable | keras.Variable)
            if not is_variable or id(variable) in theirs | seen or len(variable.shape) < 2:
                continue
            seen.add(id(variable))
            yield here, layer, variable, taken
        below = () if is_model else here
        for part in inside:
            yield from walk(part, below, above if layer is model else taken)

    yield from walk(model, (), False)


def is_no_kernel(layer: Any, name: str) -> bool:
    """Return whether a weight of that name is left out of pruning by default.

    Kernels of Keras' own layers have names that end in "kernel". The naming of user-defined layers
    is not known, so all their weights count as kernels except those named in `NO_KERNELS`.
    """
    is_keras_own = type(layer).__module__.partition(".")[0] in ("keras", "tf_keras")
    return not name.endswith("kernel") if is_keras_own else name in NO_KERNELS


def leaf(variable: Any) -> str:
    """Return the last part of a variable's name."""
    return variable.name.rpartition("/")[2].partition(":")[0]


def is_kernel(layer: Any, variable: Any) -> bool:
    """Return whether pruning includes a weight of rank 2 or more by default, if it is trained.

    This holds for kernels that LoRA or quantization has changed as well. Whether the layer is
    frozen at the moment does not count.
    """
    name = leaf(variable)
    if name in BIASES or is_no_kernel(layer, name):
        return False
    return not fixed(layer, variable) or variable is kernel_layers.adapted_weight(layer)


def fixed(layer: Any, variable: Any) -> str:
    """Return why a weight is never trained; an empty string if it is trained with its layer."""
    if why := kernel_layers.unprunable(layer, variable):
        return why
    if isinstance(variable, keras.Variable):  # its own flag follows that of the layer
        is_fixed = any(variable is each for each in layer._non_trainable_variables)
    else:
        is_fixed = not variable.trainable
    if is_fixed:
        return "it was made with trainable=False"
    dtype = tf.as_dtype(variable.dtype)
    return "" if dtype.is_floating else f"it holds no floats, but {dtype.name}"


# The argument `layers`


def selector(name: str, layers: Any, model: Any, able: Iterable[Any]) -> Callable[[Any], bool]:
    """Return a predicate on layers for an argument `layers`.

    Args:
        name: the argument's name, for the error.
        layers: None (all), a layer class or a tuple of them, a layer of the model or a nested model
            (chosen with all layers inside), a name pattern with `*` and `?`, a predicate
            `layer -> bool`, or a list of any of these (a layer is chosen if one matches).
        model: the model whose layers these are.
        able: the layers of the model that can be chosen, for the error.

    Raises:
        TypeError: `layers` is none of these.
        ValueError: an element of a list matches no layer of the model. (The caller checks single
            values, and that something in `able` matches.)
    """
    if layers is None:
        return lambda _: True
    single = _single(name, layers)
    if single is not None:
        return single
    every = list(kernel_layers.flatten(model))
    parts = list(_parts(name, layers))
    for part, holds in parts:
        by_name = isinstance(part, (str, type, *_LAYERS))  # a predicate may match no layer
        if by_name and not any(holds(layer) for layer in every):
            what = f"layer {part.name!r}" if isinstance(part, _LAYERS) else repr(part)
            raise ValueError(
                f"{name} has {what} in it, which fits no layer of model {model.name!r}; those "
                f"that can be chosen are {listed(able, part)}."
            )
    return lambda layer: any(holds(layer) for _, holds in parts)


def fits(name: str, pattern: str) -> bool:
    """Return whether a name equals a pattern or matches its `*`, `?` and `[...]`."""
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def listed(able: Iterable[Any], asked: Any = None) -> str:
    """Return the names of the layers that can be chosen, for an error.

    Args:
        able: the layers.
        asked: the value that was passed; for a name, the most similar one is suggested.
    """
    names = list(dict.fromkeys(layer.name for layer in able))
    near = difflib.get_close_matches(asked, names, n=1) if isinstance(asked, str) else []
    return f"{names}" + (f" (did you mean {near[0]!r}?)" if near else "")


def _parts(name: str, layers: list[Any] | tuple[Any, ...]) -> Iterable[tuple[Any, Any]]:
    """Yield the elements of a list, nested lists flattened, each with its predicate."""
    for part in layers:
        single = _single(name, part)
        if single is None:
            yield from _parts(name, part)
        else:
            yield part, single


def _single(name: str, layers: Any) -> Callable[[Any], bool] | None:
    """Return the predicate for one class, layer, pattern or predicate; None for a list.

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
        return lambda layer: fits(layer.name, layers)
    if callable(layers):
        return lambda layer: bool(layers(layer))
    raise TypeError(
        f"{name} must be a layer class, a layer, a name pattern, a predicate, or a list of these, "
        f"got {layers!r}."
    )
