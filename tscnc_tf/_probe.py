"""Probe batches: a model's inputs, a batch to run it on, how far its outputs may differ."""

from __future__ import annotations

import keyword
import re
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _keras
from tscnc_tf._keras import layers as model_layers
from tscnc_tf._keras import models

EXAMPLES = 8
_SCALING = model_layers.classes("Rescaling", "Normalization")


def input_specs(model: Any) -> Any:
    """Return a graph model's inputs as TensorSpecs, in its own structure; None for other models."""
    if not _keras.is_graph_model(model):
        return None
    return tf.nest.map_structure(
        lambda symbol: tf.TensorSpec(symbol.shape, symbol.dtype, name=_identifier(symbol.name)),
        models.symbols(model),
    )


def prepare(model: Any, values: Any, name: str = "probe") -> tuple[Any, Any]:
    """Return a model's inputs as TensorSpecs, and a batch of the same structure.

    The specs leave the number of examples open, whatever the model says: a Sequential model without
    an input layer keeps the size of the first batch as if it were part of its input shape.

    Args:
        model: a built Keras model. The specs of a subclassed model are taken from `values`.
        values: a batch given by the user, or None for one from `draw`.
        name: the user's name for the argument `values`, for error messages.

    Raises:
        ValueError: the batch does not fit the model, or none can be drawn for it.
    """
    specs = input_specs(model)
    if values is None:
        values = draw(model, name=name)
    specs = tf.nest.map_structure(_of_any_size, _specs_of(values) if specs is None else specs)
    return specs, fit(name, specs, values)


def draw(model: Any, examples: int | None = None, *, seed: int = 0, name: str = "probe") -> Any:
    """Return a batch drawn from U[0, 1), as arrays in the structure of the model's inputs.

    For a model that begins by scaling pixels (`Rescaling`, `Normalization`) they are drawn from
    U[0, b), where b is about its largest pixel.

    Args:
        model: a Keras model.
        examples: the number of examples; None for the number that the model names, or `EXAMPLES`.
        seed: the seed of the generator.
        name: the name of the argument by which the user can pass a batch, for error messages.

    Raises:
        ValueError: the shapes of the model's inputs are not known, or an input is not a float.
    """
    way_out = f"Pass {name}=, a batch of inputs as the model takes them."
    specs = input_specs(model)
    if specs is None:
        raise ValueError(
            f"model {model.name!r} is a subclassed model ({type(model).__name__}), so the shape of "
            f"its inputs is not known. {way_out}"
        )
    generator = np.random.default_rng(seed)
    largest = _largest_pixel(model)

    def drawn(spec: tf.TensorSpec) -> np.ndarray:
        count = examples or (spec.shape[0] if spec.shape.rank else None) or EXAMPLES
        values = models.draw(spec, count, generator)
        if values is None:
            raise ValueError(
                f"model {model.name!r} has an input {_describe(spec)}, and no batch can be drawn "
                f"for it: only floats of known shape can. {way_out}"
            )
        return values * values.dtype.type(largest)

    return tf.nest.map_structure(drawn, specs)


def _largest_pixel(model: Any) -> float:
    """Return what a model that begins by scaling pixels takes to 1, or to 2 deviations; else 1.

    Values up to 2 are taken for 1.
    """
    for layer in model_layers.flatten(model):
        if isinstance(layer, _SCALING):
            return _taken_to_the_top(layer)
        if layer.weights and not hasattr(layer, "layers"):
            break
    return 1.0


def _taken_to_the_top(scaling: Any) -> float:
    if hasattr(scaling, "offset"):
        largest = np.max((1.0 - np.asarray(scaling.offset)) / np.asarray(scaling.scale))
    else:
        largest = np.max(np.asarray(scaling.mean) + 2.0 * np.sqrt(np.asarray(scaling.variance)))
    return float(largest) if np.isfinite(largest) and largest > 2.0 else 1.0


def fit(name: str, specs: Any, values: Any) -> Any:
    """Return a batch given by the user as arrays of the dtypes that the model takes.

    Args:
        name: the user's name for the argument `values`, for error messages.
        specs: the model's inputs, as `input_specs` or `prepare` returns them.
        values: the batch.

    Raises:
        ValueError: the batch does not fit the model.
    """
    pairs = zip(leaves(name, specs, values), tf.nest.flatten(specs), strict=True)
    return tf.nest.pack_sequence_as(specs, [_fit(name, *pair) for pair in pairs])


def leaves(name: str, specs: Any, values: Any) -> list[Any]:
    """Return what `values` holds for each of `specs`, in the order of `tf.nest.flatten(specs)`.

    Args:
        name: the user's name for the argument `values`, for the error message.
        specs: a TensorSpec, or lists and dicts of them.
        values: the same structure of arrays or tensors; a tuple stands for a list, and a single
            array for a list of one, as Keras' models take it.

    Raises:
        ValueError: `values` has another structure.
    """
    if isinstance(specs, tf.TensorSpec):
        return [values]
    if isinstance(specs, dict):
        fits, keys = isinstance(values, dict) and set(values) == set(specs), sorted(specs)
    else:
        if len(specs) == 1 and not isinstance(values, list | tuple | dict):
            values = [values]
        fits = isinstance(values, list | tuple) and len(values) == len(specs)
        keys = list(range(len(specs)))
    if not fits:
        raise ValueError(
            f"{name} must have the structure of the model's inputs, {_describe(specs)}, got "
            f"{_describe(values)}."
        )
    return [leaf for key in keys for leaf in leaves(name, specs[key], values[key])]


def examples(batch: Any) -> int:
    """Return the number of examples in a batch: the length of its first array."""
    return int(tf.nest.flatten(batch)[0].shape[0])


def outputs(
    function: Any,
    batch: Any,
    what: str = "The model",
    way_out: str = "Repair the model, or pass another probe=.",
) -> list[np.ndarray]:
    """Return a function's outputs for a batch as a flat list of float64 arrays.

    Args:
        function: the function.
        batch: its argument.
        what: the name of the function, for the error message.
        way_out: what the user can do, for the error message.

    Raises:
        ValueError: an output is not finite.
    """
    arrays = [np.asarray(output).astype(np.float64) for output in tf.nest.flatten(function(batch))]
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError(
            f"{what}'s logits on the probe batch hold NaN or infinity, so nothing can be compared "
            f"with them. {way_out}"
        )
    return arrays


def deviation(expected: list[np.ndarray], found: list[np.ndarray]) -> tuple[float, float]:
    """Return the difference and the `scale` of the output that differs most, relative to its scale.

    Args:
        expected: a list of outputs.
        found: as many, to compare with them; the difference is inf if their shapes differ.
    """
    if [array.shape for array in expected] != [array.shape for array in found]:
        return float("inf"), 1.0
    pairs = zip(expected, found, strict=True)
    each = [(float(np.abs(a - b).max(initial=0.0)), scale(a)) for a, b in pairs]
    return max(each, key=lambda pair: pair[0] / pair[1])


def tolerance(model: Any, *, float32: float) -> float:
    """Return by how much two computations of an output may differ, relative to its `scale`.

    It is `float32`; 1e-2 where a GPU multiplies in TensorFloat-32, which has 10 bits; 5e-2 if a
    layer computes in 16 bits.

    Args:
        model: a Keras model.
        float32: the tolerance if all layers compute in float32.
    """
    dtypes = {getattr(layer, "compute_dtype", None) for layer in model_layers.flatten(model)}
    on_gpu = bool(tf.config.get_visible_devices("GPU"))
    if dtypes & {"float16", "bfloat16"}:
        return 5e-2
    if on_gpu and tf.config.experimental.tensor_float_32_execution_enabled():
        return 1e-2
    return float32


def scale(output: np.ndarray) -> float:
    """Return the largest absolute value of an output, at least 1."""
    return float(np.abs(output).max(initial=1.0))


def _of_any_size(spec: tf.TensorSpec) -> tf.TensorSpec:
    """Return a spec with the number of examples left open."""
    if not spec.shape.rank:
        return spec
    return tf.TensorSpec((None, *spec.shape[1:]), spec.dtype, name=spec.name)


def _identifier(name: str) -> str:
    """Return `name` as a valid name of a function argument, as signatures need it."""
    name = re.sub(r"\W", "_", name)
    return f"{name}_" if keyword.iskeyword(name) else name


def _specs_of(values: Any) -> Any:
    """Return TensorSpecs of arrays; float64, NumPy's default, becomes float32."""

    def spec(leaf: Any, name: str | None = None) -> tf.TensorSpec:
        array = np.asarray(leaf)
        dtype = tf.float32 if array.dtype == np.float64 else tf.as_dtype(array.dtype)
        return tf.TensorSpec(array.shape, dtype, name=name)

    if tf.nest.is_nested(values):
        return tf.nest.map_structure(spec, values)
    return spec(values, "inputs")


def _fit(name: str, leaf: Any, spec: tf.TensorSpec) -> np.ndarray:
    try:
        array = np.asarray(leaf)
    except ValueError as error:
        raise ValueError(
            f"{name} must be {_describe(spec)}, got a {type(leaf).__name__} whose parts differ in "
            "shape. Of a pair (x, y), pass x."
        ) from error
    wanted = np.dtype(spec.dtype.as_numpy_dtype)
    if not spec.shape.is_compatible_with(array.shape) or array.shape[:1] == (0,):
        raise ValueError(f"{name} must be {_describe(spec)}, got an array of shape {array.shape}.")
    if not np.can_cast(array.dtype, wanted, "same_kind"):
        raise ValueError(f"{name} must be {_describe(spec)}, got an array of {array.dtype}.")
    array = array.astype(wanted)
    if spec.dtype.is_floating and not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got an array with NaN or infinity.")
    return array


def _describe(structure: Any) -> str:
    """Return a structure of arrays or TensorSpecs as text: dtypes and shapes."""
    if isinstance(structure, dict):
        return "{" + ", ".join(f"{k!r}: {_describe(v)}" for k, v in structure.items()) + "}"
    if isinstance(structure, list | tuple):
        return "[" + ", ".join(map(_describe, structure)) + "]"
    if isinstance(structure, tf.TensorSpec):
        sizes = ", ".join("any" if size is None else str(size) for size in structure.shape)
        return f"{structure.dtype.name} ({sizes})"
    array = np.asarray(structure)
    return f"{array.dtype} {array.shape}"
