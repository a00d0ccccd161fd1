"""The weights of a model that are matrices, and which of them pruning is meant for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tscnc_tf import _keras
from tscnc_tf._keras import adapted, gated, wrappers
from tscnc_tf._keras import layers as kernel_layers

# Weights of rank 2 or more that are called so are no linear map of their layer's input.
BIASES = ("bias", "beta", "gamma")
NO_KERNELS = ("embeddings", "alpha")


def owned(
    model: Any, chosen: Callable[[Any], bool]
) -> Iterator[tuple[tuple[str, ...], Any, Any, bool]]:
    """Yield (path of names, layer, weight, whether chosen) for each weight of rank 2 or more.

    The path begins below the innermost model. Who chooses a layer chooses the layers inside it; but
    the model itself is asked about for its own weights only: a predicate such as "not the last
    layer" holds for it, too, and means no less than all.
    """
    seen: set[int] = set()

    def walk(layer: Any, path: tuple[str, ...], taken: bool) -> Iterator[Any]:
        is_model = isinstance(layer, _keras.keras.Model | _keras.tf_keras.Model)
        above, taken = taken, taken or chosen(layer)
        inside = list(kernel_layers.parts(layer))
        theirs = {id(variable) for part in inside for variable in part.weights}
        here = (*path, layer.name) if not is_model or layer is model else (layer.name,)
        # What is tfmot's has masks for weights of its own, and what is gated has gates.
        if wrappers.is_wrapper(layer) or gated.is_gated(layer):
            yield from walk(layer.layer, path, taken)
            return
        for variable in layer.weights:
            is_variable = isinstance(variable, tf.Variable | _keras.keras.Variable)
            if not is_variable or id(variable) in theirs | seen or len(variable.shape) < 2:
                continue
            seen.add(id(variable))
            yield here, layer, variable, taken
        below = () if is_model else here
        for part in inside:
            yield from walk(part, below, above if layer is model else taken)

    yield from walk(model, (), False)


def is_no_kernel(layer: Any, name: str) -> bool:
    """Tell whether a weight of that name is none that pruning is meant for, unless asked to.

    Keras' own layers call their kernels so. What a layer of the user's calls its weights is not
    known, so all are taken but those with a name that says otherwise.
    """
    is_keras_own = type(layer).__module__.partition(".")[0] in ("keras", "tf_keras")
    return not name.endswith("kernel") if is_keras_own else name in NO_KERNELS


def leaf(variable: Any) -> str:
    """Return the last part of a variable's name."""
    return variable.name.rpartition("/")[2].partition(":")[0]


def is_kernel(layer: Any, variable: Any) -> bool:
    """Tell whether a weight of rank 2 or more is one that pruning takes unless told otherwise.

    So is a kernel that LoRA or quantization has brought into another form.
    """
    name = leaf(variable)
    if name in BIASES or is_no_kernel(layer, name):
        return False
    is_trained = variable.trainable and layer.trainable and not fixed(layer, variable)
    return is_trained or variable is adapted.weight(layer)


def fixed(layer: Any, variable: Any) -> str:
    """Return why a weight is never trained; an empty text if it is, unless its layer is frozen."""
    if why := adapted.reason(layer, variable):
        return why
    if isinstance(variable, _keras.keras.Variable):  # whose flag follows that of the layer
        is_fixed = any(variable is each for each in layer._non_trainable_variables)
    else:
        is_fixed = not variable.trainable
    if is_fixed:
        return "it was made with trainable=False"
    dtype = tf.as_dtype(variable.dtype)
    return "" if dtype.is_floating else f"it holds no floats, but {dtype.name}"
