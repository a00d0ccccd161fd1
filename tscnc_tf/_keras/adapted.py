r"""Effective weights of Keras 3 layers that differ from the stored ones: LoRA, quantization.

With `enable_lora(rank)` a layer computes with :math:`W + \tfrac{\alpha}{r} A B`, and stores W, A
and B; quantized to int8 or int4 it computes with scaled integers. `layer.kernel` is a property of
such a layer, and does not always return the effective weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf._keras import keras

# The layers that have `enable_lora`; all except the convolutions have `quantize` as well.
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
        attribute: the layer's name for the weight, such as "kernel".
    """
    value = getattr(layer, attribute, None)
    if isinstance(layer, CLASSES) and state(layer):
        return vars(layer).get(f"_{attribute}", value)
    return value


def state(layer: Any) -> str:
    """Return why a layer's effective weight differs from the stored one, for messages.

    An empty string if they are equal, as in all layers of tf_keras. The layer need not be built.
    """
    if not isinstance(layer, CLASSES):
        return ""
    found = [f"LoRA is enabled (lora_rank={layer.lora_rank})"] if has_lora(layer) else []
    if layer.quantization_mode:
        found.append(f"it is quantized ({layer.quantization_mode})")
    return " and ".join(found)


def has_lora(layer: Any) -> bool:
    """Return whether LoRA is enabled in a layer, or will be once it is built."""
    return isinstance(layer, CLASSES) and bool(layer.lora_rank)


def companions(layer: Any) -> Iterator[Any]:
    """Yield the variables that LoRA and quantization add to a layer."""
    if isinstance(layer, CLASSES):
        attributes = vars(layer)
        yield from (attributes[name] for name in (*_LORA, *_QUANTIZATION) if name in attributes)


def is_companion(layer: Any, variable: Any) -> bool:
    """Return whether a variable of a layer is one of `companions`."""
    return any(variable is companion for companion in companions(layer))


def weight(layer: Any) -> Any:
    """Return the stored kernel or embeddings of a layer if the effective ones differ, else None."""
    if not isinstance(layer, CLASSES) or not layer.built or not state(layer):
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
    elif isinstance(layer, CLASSES) and layer.quantization_mode not in (None, "float8"):
        way_out = "quantize the model afterwards"
    else:
        return
    raise ValueError(
        f"layer {layer.name!r}: {state(layer)}, so {what} would have no effect: {way_out}; or "
        "choose other layers by layers=."
    )


def reason(layer: Any, variable: Any) -> str:
    """Return why a layer's weight can't be pruned in its form; an empty string if it can.

    A float8 layer stores a float weight, rounded in each call, which can be pruned.
    """
    if is_companion(layer, variable):
        return f"it belongs to another weight: {state(layer)}"
    if variable is not weight(layer):
        return ""
    if has_lora(layer):
        return (
            "LoRA is enabled, and adds to the zeros: save_weights writes the merged weights, so "
            "load these into a model without LoRA, and prune it"
        )
    mode = layer.quantization_mode
    return "" if mode == "float8" else f"it is quantized ({mode}): prune first, then quantize"


def acting(layer: Any) -> np.ndarray:
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
