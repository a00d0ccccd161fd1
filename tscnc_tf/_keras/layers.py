r"""The layers of a model: their kernels, how these are read, and the paths to all weights.

A layer of Keras 3 may compute with another weight than it stores. With `enable_lora(rank)` it
computes with :math:`W + \tfrac{\alpha}{r} A B`, and stores W, A and B; quantized to int8 or int4 it
computes with scaled integers. `layer.kernel` is a property of such a layer, and does not always
return the effective weight. See `adaptation`.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tscnc_tf._keras import flavour, is_graph_model, keras, plain_class, tf_keras

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
            variable = stored(layer, spec.attribute)
            if variable is None or id(variable) in seen or len(variable.shape) < 2:
                continue
            seen.add(id(variable))
            name = layer.name if len(specs) == 1 else f"{layer.name}/{spec.attribute}"
            yield Kernel(name, layer, variable, spec)


def named_kernels(layer: Any) -> Iterator[tuple[str, Any]]:
    """Yield (attribute, variable) of a built layer's own kernels, also those without a spec."""
    for attribute in ("kernel", "depthwise_kernel", "pointwise_kernel", "recurrent_kernel"):
        variable = stored(layer, attribute)
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


# The layers that have `enable_lora`; all except the convolutions have `quantize` as well.
ADAPTABLE = (
    *(keras.layers.Dense, keras.layers.EinsumDense, keras.layers.Embedding),
    *(keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D),
)
_LORA = ("lora_kernel_a", "lora_kernel_b", "lora_embeddings_a", "lora_embeddings_b")
_QUANTIZATION = (
    *("kernel_scale", "kernel_zero", "g_idx", "awq_scales"),
    *("inputs_scale", "inputs_amax_history", "kernel_amax_history"),
    *("outputs_grad_scale", "outputs_grad_amax_history"),
    *("embeddings_scale", "embeddings_zero"),
    *("reverse_embeddings_scale", "reverse_embeddings_zero"),
)
_INTEGERS = ("int8", "int4")


def stored(layer: Any, attribute: str) -> Any:
    """Return the variable that holds a weight of a layer, None if there is none.

    Args:
        layer: of either Keras.
        attribute: the layer's name for the weight, such as "kernel".
    """
    value = getattr(layer, attribute, None)
    if isinstance(layer, ADAPTABLE) and adaptation(layer):
        return vars(layer).get(f"_{attribute}", value)
    return value


def adaptation(layer: Any) -> str:
    """Return why a layer's effective weight differs from the stored one, for messages.

    An empty string if they are equal, as in all layers of tf_keras. The layer need not be built.
    """
    if not isinstance(layer, ADAPTABLE):
        return ""
    found = [f"LoRA is enabled (lora_rank={layer.lora_rank})"] if has_lora(layer) else []
    if layer.quantization_mode:
        found.append(f"it is quantized ({layer.quantization_mode})")
    return " and ".join(found)


def has_lora(layer: Any) -> bool:
    """Return whether LoRA is enabled in a layer, or will be once it is built."""
    return isinstance(layer, ADAPTABLE) and bool(layer.lora_rank)


def companions(layer: Any) -> Iterator[Any]:
    """Yield the variables that LoRA and quantization add to a layer."""
    if isinstance(layer, ADAPTABLE):
        attributes = vars(layer)
        yield from (attributes[name] for name in (*_LORA, *_QUANTIZATION) if name in attributes)


def is_companion(layer: Any, variable: Any) -> bool:
    """Return whether a variable of a layer is one of `companions`."""
    return any(variable is companion for companion in companions(layer))


def adapted_weight(layer: Any) -> Any:
    """Return the stored kernel or embeddings of a layer if the effective ones differ, else None."""
    if not isinstance(layer, ADAPTABLE) or not layer.built or not adaptation(layer):
        return None
    return stored(layer, _attribute(layer))


def require_plain(layer: Any, what: str) -> None:
    """Raise a ValueError if a layer does not train its stored kernel.

    Args:
        layer: of either Keras.
        what: the name of the operation on the kernel, for the error.
    """
    if has_lora(layer):
        way_out = (
            "enable LoRA afterwards, or load the merged weights that save_weights writes into a "
            "model without LoRA"
        )
    elif isinstance(layer, ADAPTABLE) and layer.quantization_mode not in (None, "float8"):
        way_out = "quantize the model afterwards"
    else:
        return
    raise ValueError(
        f"layer {layer.name!r}: {adaptation(layer)}, so {what} would have no effect: {way_out}; or "
        "choose other layers by layers=."
    )


def unprunable(layer: Any, variable: Any) -> str:
    """Return why a layer's weight can't be pruned in its form; an empty string if it can.

    A float8 layer stores a float weight, rounded in each call, which can be pruned.
    """
    if is_companion(layer, variable):
        return f"it belongs to another weight: {adaptation(layer)}"
    if variable is not adapted_weight(layer):
        return ""
    if has_lora(layer):
        return (
            "LoRA is enabled, and adds to the zeros: save_weights writes the merged weights, so "
            "load these into a model without LoRA, and prune it"
        )
    mode = layer.quantization_mode
    return "" if mode == "float8" else f"it is quantized ({mode}): prune first, then quantize"


def effective_weight(layer: Any) -> np.ndarray:
    """Return the effective kernel or embeddings of a layer in float64, LoRA merged.

    Raises:
        ValueError: its quantization mode is not supported here.
    """
    mode = layer.quantization_mode
    if mode not in (None, "float8", *_INTEGERS):
        raise ValueError(
            f"layer {layer.name!r} is quantized by {mode!r}, whose weights can't be read: inspect "
            "the model before it is quantized."
        )
    if isinstance(layer, keras.layers.Embedding):
        return _array(layer(tf.range(layer.input_dim)))
    values = _dequantized(layer) if mode in _INTEGERS else _array(layer._kernel)
    if layer.lora_enabled:
        # Releases of Keras without `lora_alpha` add the product unscaled.
        scale = (getattr(layer, "lora_alpha", None) or layer.lora_rank) / layer.lora_rank
        values = values + scale * np.matmul(
            _array(layer.lora_kernel_a), _array(layer.lora_kernel_b)
        )
    return values


def _dequantized(layer: Any) -> np.ndarray:
    """Return the dequantized kernel of an int8 or int4 Dense or EinsumDense."""
    plain = view(layer, lora_enabled=False)
    integers, scale = _array(plain.kernel), _array(layer.kernel_scale)
    if layer.quantization_mode == "int8":
        if isinstance(layer, keras.layers.EinsumDense):
            scale = _array(layer._adjust_scale_for_dequant(layer.kernel_scale))
        return integers / scale
    matrix = integers.reshape(layer._kernel.shape[0], -1)
    zero = getattr(layer, "kernel_zero", None)
    if zero is None:
        return (matrix / scale).reshape(integers.shape)
    groups = _array(layer.g_idx).astype(int)
    return ((matrix - _array(zero)[groups]) * scale[groups]).reshape(integers.shape)


def view(layer: Any, **replaced: Any) -> Any:
    """Return a shallow copy of a layer with some attributes replaced.

    It is made without the constructor, which would create variables, and without `copy.copy`,
    which Keras 3's layers implement by their configuration. The layer itself is not changed, so
    replicas and threads can use separate views at the same time. Only methods that read attributes,
    such as `call`, are meant to be used.
    """
    copy = object.__new__(type(layer))
    vars(copy).update({**vars(layer), **replaced})
    return copy


def _attribute(layer: Any) -> str:
    return "embeddings" if isinstance(layer, keras.layers.Embedding) else "kernel"


def _array(value: Any) -> np.ndarray:
    return np.asarray(tf.cast(tf.convert_to_tensor(value), tf.float64))
