r"""Weights that Keras 3 computes with in another form than it stores them: LoRA, quantization.

With `enable_lora(rank)` a layer computes with :math:`W + \tfrac{\alpha}{r} A B`, and stores the
three; quantized to int8 or int4 it computes with integers times scales. `layer.kernel` is a
property there, and what it returns is not always what acts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf._keras import keras

# The layers that have `enable_lora`; all but the convolutions have `quantize` as well.
CLASSES = (
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
        attribute: what the layer calls the weight, such as "kernel".
    """
    value = getattr(layer, attribute, None)
    if isinstance(layer, CLASSES) and state(layer):
        return vars(layer).get(f"_{attribute}", value)
    return value


def state(layer: Any) -> str:
    """Return what keeps a layer, built or not, from computing with its weight as it is stored.

    An empty text if it does compute with it: all of tf_keras' layers do.
    """
    if not isinstance(layer, CLASSES):
        return ""
    found = [f"LoRA is enabled (lora_rank={layer.lora_rank})"] if has_lora(layer) else []
    if layer.quantization_mode:
        found.append(f"it is quantized ({layer.quantization_mode})")
    return " and ".join(found)


def has_lora(layer: Any) -> bool:
    """Tell whether LoRA is enabled in a layer, or will be once it is built."""
    return isinstance(layer, CLASSES) and bool(layer.lora_rank)


def companions(layer: Any) -> Iterator[Any]:
    """Yield the variables that LoRA and quantization keep beside a layer's weights."""
    if isinstance(layer, CLASSES):
        attributes = vars(layer)
        yield from (attributes[name] for name in (*_LORA, *_QUANTIZATION) if name in attributes)


def is_companion(layer: Any, variable: Any) -> bool:
    """Tell whether a variable of a layer is one of `companions`."""
    return any(variable is companion for companion in companions(layer))


def weight(layer: Any) -> Any:
    """Return the stored variable of a layer's kernel or embeddings if it acts in another form."""
    if not isinstance(layer, CLASSES) or not layer.built or not state(layer):
        return None
    return stored(layer, _attribute(layer))


def require_plain(layer: Any, what: str) -> None:
    """Raise a ValueError if a layer does not train its kernel as it is stored.

    Args:
        layer: of either Keras.
        what: what acts on the kernel, for the error.
    """
    if has_lora(layer):
        way_out = (
            "enable LoRA afterwards, or load the sums that save_weights writes into a model "
            "without LoRA"
        )
    elif isinstance(layer, CLASSES) and layer.quantization_mode not in (None, "float8"):
        way_out = "quantize the model afterwards"
    else:
        return
    raise ValueError(
        f"layer {layer.name!r}: {state(layer)}, so {what} would not act: {way_out}; or choose "
        "other layers by layers=."
    )


def reason(layer: Any, variable: Any) -> str:
    """Return why a layer's weight can't be pruned in the form it has; an empty text if it can.

    In float8 the weight is a float that is rounded in each call: it can.
    """
    if is_companion(layer, variable):
        return f"it is no weight of its own: {state(layer)}"
    if variable is not weight(layer):
        return ""
    if has_lora(layer):
        return (
            "LoRA is enabled, and adds to what is zero: save_weights writes the sum, so load that "
            "into a model without LoRA, and prune it"
        )
    mode = layer.quantization_mode
    return "" if mode == "float8" else f"it is quantized ({mode}): prune first, then quantize"


def acting(layer: Any) -> np.ndarray:
    """Return in float64 the kernel or embeddings that a layer computes with, LoRA merged.

    Raises:
        ValueError: its quantization is of a kind that is not read here.
    """
    mode = layer.quantization_mode
    if mode not in (None, "float8", *_INTEGERS):
        raise ValueError(
            f"layer {layer.name!r} is quantized by {mode!r}, whose weights can't be read: look at "
            "the model before it is quantized."
        )
    if isinstance(layer, keras.layers.Embedding):
        return _array(layer(tf.range(layer.input_dim)))
    values = _dequantized(layer) if mode in _INTEGERS else _array(layer._kernel)
    if layer.lora_enabled:
        # Releases of Keras without `lora_alpha` add the product as it is.
        scale = (getattr(layer, "lora_alpha", None) or layer.lora_rank) / layer.lora_rank
        values = values + scale * np.matmul(
            _array(layer.lora_kernel_a), _array(layer.lora_kernel_b)
        )
    return values


def _dequantized(layer: Any) -> np.ndarray:
    """Return the kernel that the integers and scales of a Dense or EinsumDense stand for."""
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
    """Return a layer that shares all attributes with another one but those replaced.

    It is a shallow copy, made without the constructor, which would make new variables: `copy.copy`
    does not serve, as Keras 3's layers define it by their configuration. The layer is not touched,
    so replicas and threads may compute with views of their own at the same time. Only what reads
    attributes, such as `call`, is meant to be used.
    """
    copy = object.__new__(type(layer))
    vars(copy).update({**vars(layer), **replaced})
    return copy


def _attribute(layer: Any) -> str:
    return "embeddings" if isinstance(layer, keras.layers.Embedding) else "kernel"


def _array(value: Any) -> np.ndarray:
    return np.asarray(tf.cast(tf.convert_to_tensor(value), tf.float64))
