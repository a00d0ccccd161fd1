"""The layers of a model: their kernels, how these are read, and the paths to all weights."""

from __future__ import annotations

import collections
import contextlib
import operator
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from tscnc_tf._keras import adapted, flavour, is_graph_model, keras, plain_class, tf_keras

# The names of the classes of convolutions, in both Keras versions.
CONVOLUTIONS = ("Conv1D", "Conv2D", "Conv3D")
TRANSPOSED = ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")
DEPTHWISE = ("DepthwiseConv1D", "DepthwiseConv2D")
SEPARABLE = ("SeparableConv1D", "SeparableConv2D")
ALL_CONVOLUTIONS = (*CONVOLUTIONS, *TRANSPOSED, *DEPTHWISE, *SEPARABLE)


def classes(*names: str) -> tuple[type, ...]:
    """Return the classes of layers that have these names in Keras, those of both Keras versions."""
    return tuple(getattr(library.layers, name) for library in (keras, tf_keras) for name in names)


class KernelSpec(NamedTuple):
    """One kernel of a layer.

    Attributes:
        attribute: the name of the layer's attribute that holds it.
        regularizer: the name of the layer's argument that constrains it.
        layout: how to read its axes: "standard" (..., in, out), "transposed" (..., out, in),
            "depthwise" (..., in, multiplier).
        channel_groups: the number of groups of a grouped convolution, else 1.
    """

    attribute: str
    regularizer: str
    layout: str = "standard"
    channel_groups: int = 1


class Kernel(NamedTuple):
    """One kernel of a model: a readable name, its layer, the variable, how to read it."""

    name: str
    layer: Any
    variable: Any
    spec: KernelSpec

    @property
    def reading(self) -> dict[str, Any]:
        """The keyword arguments that tell `functional` how to read the variable."""
        return {"layout": self.spec.layout, "channel_groups": self.spec.channel_groups}


_KERNEL = KernelSpec("kernel", "kernel_regularizer")
_POINTWISE = KernelSpec("pointwise_kernel", "pointwise_regularizer")
_RECURRENT = KernelSpec("recurrent_kernel", "recurrent_regularizer")


def kernel_specs(layer: Any) -> list[KernelSpec]:
    """Return the kernels that a layer has, or will have once built, by its class and arguments.

    Weights that are not one matrix from inputs to outputs are not kernels here: embeddings, biases,
    and the weights of normalization and locally connected layers. Of EinsumDense (also inside
    MultiHeadAttention) only plain matrices are kernels: which axes of others are inputs depends on
    the equation.
    """
    names = [base.__name__ for base in type(layer).__mro__]
    if _any_starts(names, "LocallyConnected"):
        return []
    if isinstance(layer, keras.layers.EinsumDense | tf_keras.layers.EinsumDense):
        return _einsum_specs(layer.equation)
    attribute = "depthwise_kernel" if flavour(layer) == "tf_keras" else "kernel"
    if _any_starts(names, "SeparableConv"):
        return [
            KernelSpec("depthwise_kernel", "depthwise_regularizer", layout="depthwise"),
            _POINTWISE,
        ]
    if _any_starts(names, "DepthwiseConv"):
        return [KernelSpec(attribute, "depthwise_regularizer", layout="depthwise")]
    if not hasattr(layer, "kernel_regularizer"):
        return []
    if any(name.endswith("Transpose") for name in names):
        return [_KERNEL._replace(layout="transposed")]
    if hasattr(layer, "recurrent_regularizer"):  # ConvLSTM among them
        return [_KERNEL, _RECURRENT]
    if any("Conv" in name for name in names):
        return [_KERNEL._replace(channel_groups=getattr(layer, "groups", 1))]
    return [_KERNEL]


def kernels(model: Any) -> Iterator[Kernel]:
    """Yield the kernels of a built model or layer, each variable once, in the model's order."""
    seen: set[int] = set()
    for layer in flatten(model):
        specs = kernel_specs(layer)
        for spec in specs:
            variable = adapted.stored(layer, spec.attribute)
            if variable is None or id(variable) in seen or len(variable.shape) < 2:
                continue
            seen.add(id(variable))
            name = layer.name if len(specs) == 1 else f"{layer.name}/{spec.attribute}"
            yield Kernel(name, layer, variable, spec)


def named_kernels(layer: Any) -> Iterator[tuple[str, Any]]:
    """Yield (attribute, variable) of a built layer's own kernels, also those without a spec."""
    for attribute in ("kernel", "depthwise_kernel", "pointwise_kernel", "recurrent_kernel"):
        variable = adapted.stored(layer, attribute)
        if isinstance(variable, tf.Variable | keras.Variable) and len(variable.shape) >= 2:
            yield attribute, variable


def is_normalization(layer: Any) -> bool:
    """Return whether a layer is a normalization layer of Keras, which trains only γ and β."""
    kinds = ("Batch", "Layer", "Group", "RMS", "Unit")
    names = [base.__name__ for base in type(layer).__mro__]
    return any(f"{kind}Normalization" in name for name in names for kind in kinds)


def flatten(layer: Any) -> Iterator[Any]:
    """Yield a layer or model and all layers in it, in the model's order, possibly some twice."""
    if isinstance(layer, tf_keras.layers.Layer):
        yield from layer._flatten_layers()
        return
    yield layer
    for part in parts(layer):
        yield from flatten(part)


def parts(layer: Any) -> Iterator[Any]:
    """Yield the layers that a layer or model is made of, one level down."""
    if isinstance(layer, tf_keras.layers.Layer):
        yield from layer._flatten_layers(recursive=False, include_self=False)
        return
    if isinstance(layer, keras.Model):
        yield from layer.layers
    elif isinstance(layer, keras.layers.Layer):  # an operation of a graph has no parts
        yield from layer._layers


def state(model: Any) -> list[Any]:
    """Return the state of a model apart from the values of its weights, for `is_same_state`.

    It consists of the attributes of each layer that are variables, callables or plain Python
    values. Sequential and functional models inside are left out, since their own attributes belong
    to training. A state keeps neither layers nor variables alive.
    """
    found: list[Any] = []
    for layer in flatten(model):
        found.append(weakref.ref(layer))  # the same object each time, as long as the layer lives
        for name, value in () if is_graph_model(layer) else vars(layer).items():
            if value is None or isinstance(value, bool | int | float | str):
                found += [name, value]
            elif callable(value) or isinstance(value, tf.Variable | keras.Variable):
                with contextlib.suppress(TypeError):  # functions of C, such as a ufunc
                    value = weakref.ref(value)
                found += [name, value]
    return found


def is_same_state(before: list[Any], after: list[Any]) -> bool:
    """Return whether two states hold the same objects."""
    return len(before) == len(after) and all(map(operator.is_, before, after))


def calls(model: Any) -> collections.Counter[int]:
    """Return how often a graph model calls each layer in a forward pass, by the layers' ids.

    Calls in nested models are counted; those inside of other layers are not known.
    """
    if isinstance(model, keras.Sequential | tf_keras.Sequential):
        called = list(model.layers)
    else:
        nodes = [node for depth in model._nodes_by_depth.values() for node in depth]
        attribute = "layer" if flavour(model) == "tf_keras" else "operation"
        called = [getattr(node, attribute) for node in nodes]
    counts: collections.Counter[int] = collections.Counter()
    for layer in called:
        counts[id(layer)] += 1
        if is_graph_model(layer):
            counts += calls(layer)
    return counts


def einsum_layout(equation: str, rank: int) -> str:
    """Return the layout of an EinsumDense kernel, a letter per axis, as in `functional.canonical`.

    It is empty if an axis of the kernel is neither summed over nor new: such a kernel is not a
    single matrix.
    """
    operands, _, outputs = equation.replace(" ", "").replace("...", "").partition("->")
    inputs, _, axes = operands.partition(",")
    if len(axes) != rank:
        return ""
    kinds = {(True, False): "i", (False, True): "o"}
    letters = [kinds.get((axis in inputs, axis in outputs), "") for axis in axes]
    return "".join(letters) if all(letters) else ""


def _einsum_specs(equation: str) -> list[KernelSpec]:
    """Return the kernel of an EinsumDense if it is a plain matrix, of rank 2."""
    layout = einsum_layout(equation, 2)
    if layout == "io":
        return [_KERNEL]
    return [_KERNEL._replace(layout="transposed")] if layout == "oi" else []


def _any_starts(names: list[str], prefix: str) -> bool:
    return any(name.startswith((prefix, "Base" + prefix)) for name in names)


def weight_paths(model: Any) -> dict[int, str]:
    """Return the path of each weight of a model or layer, by the weight's id.

    A path is a sequence of attributes, as in "encoder/blocks[2]/_kernel". The layers of Sequential
    and functional models are given by their names, which the configuration holds. Layers that the
    code of a subclassed model or layer creates get new names whenever it is built, so those of a
    Sequential or functional model inside of one are given by their positions.

    Args:
        model: a built model or layer of either Keras.
    """
    found: dict[int, str] = {}
    entered: set[int] = set()

    def walk(layer: Any, path: str, is_configured: bool) -> None:
        if id(layer) in entered:
            return
        entered.add(id(layer))
        inside = list(parts(layer))
        theirs = {id(weight) for part in inside for weight in getattr(part, "weights", ())}
        own = [weight for weight in layer.weights if id(weight) not in theirs]
        for step, weight in _steps(layer, own, "weights"):
            found.setdefault(id(weight), path + step)
        is_configured = is_configured and _is_kerass_own(layer)
        for step, part in _named_parts(layer, inside, is_configured):
            if hasattr(part, "weights"):  # an operation of a graph has none
                walk(part, f"{path}{step}/", is_configured)

    walk(model, "", True)
    return found


def _is_kerass_own(layer: Any) -> bool:
    return flavour(layer) == plain_class(layer).__module__.partition(".")[0]


def _named_parts(layer: Any, inside: list[Any], is_configured: bool) -> Iterator[tuple[str, Any]]:
    """Yield (name of the step, part) for the parts of a layer or model."""
    if not is_graph_model(layer):
        yield from _steps(layer, inside, "layers")
        return
    for index, part in enumerate(inside):
        yield part.name if is_configured else f"layers[{index}]", part


def _steps(layer: Any, objects: list[Any], others: str) -> Iterator[tuple[str, Any]]:
    """Yield (step, object): the layer's attribute that holds it, or `others[index]` without one."""
    by_id: dict[int, str] = {}
    for name, value in sorted(vars(layer).items(), key=lambda item: (item[0][0] == "_", item[0])):
        if not name.startswith(_TRACKING):
            for step, each in _unpacked(name, value):
                by_id.setdefault(id(each), step)
    for index, each in enumerate(objects):
        yield by_id.get(id(each), f"{others}[{index}]"), each


# Keras' own lists of all objects in a layer; the positions in them depend on how it was built.
_TRACKING = (
    "_layers",
    "_flattened_layers",
    "_self_",
    "_tracker",
    "_trainable_",
    "_non_trainable_",
    "_metrics",
    "_functional",
    "_inbound",
    "_outbound",
    "_nodes",
    "_operations",
)


def _unpacked(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _unpacked(f"{name}[{index}]", each)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _unpacked(f"{name}[{key!r}]", each)
    else:
        yield name, value
