"""What a model takes, a batch to try it on, and how much its logits may differ."""

from __future__ import annotations

import keyword
import re
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _keras
from tscnc_tf._keras import models as model_inputs

EXAMPLES = 8
WAY_OUT = "Pass probe=, a batch of inputs as the model takes them."


def prepare(model: Any, probe: Any, name: str = "probe") -> tuple[Any, Any]:
    """Return the model's inputs as TensorSpecs, and a batch of the same structure.

    The specs leave the number of examples open, whatever the model says: a Sequential model without
    an input layer remembers the size of the first batch that it saw, as if it were meant.

    Args:
        model: a built Keras model.
        probe: a batch given by the user, or None for `EXAMPLES` rows drawn from U[0, 1), seeded (as
            many rows as the model takes, if it names a number).
        name: what the caller calls the batch, for the error messages.

    Raises:
        ValueError: the batch does not fit the model, or none can be drawn for it.
    """
    specs = known_inputs(model)
    if specs is None:
        if probe is None:
            raise ValueError(
                f"model {model.name!r} is a subclassed model ({type(model).__name__}), so the "
                f"shape of its inputs is not known. {WAY_OUT}"
            )
        specs = _inputs_of(probe)
    any_size = tf.nest.map_structure(_of_any_size, specs)
    if probe is None:
        generator = np.random.default_rng(0)
        return any_size, tf.nest.map_structure(lambda spec: _draw(model, spec, generator), specs)
    return any_size, fit(name, any_size, probe)


def fit(name: str, specs: Any, values: Any) -> Any:
    """Return a batch given by the user as arrays of the dtypes that the model takes.

    Args:
        name: what the caller calls the batch, for the error messages.
        specs: the model's inputs, as `prepare` returns them.
        values: the batch.

    Raises:
        ValueError: the batch does not fit the model.
    """
    pairs = zip(leaves(name, specs, values), tf.nest.flatten(specs), strict=True)
    return tf.nest.pack_sequence_as(specs, [_fit(name, *pair) for pair in pairs])


def leaves(name: str, specs: Any, values: Any) -> list[Any]:
    """Return what `values` holds for each of `specs`, in the order of `tf.nest.flatten(specs)`.

    Args:
        name: what the caller calls the values, for the error message.
        specs: a TensorSpec, or lists and dicts of them.
        values: the same structure of arrays or tensors; a tuple will do for a list.

    Raises:
        ValueError: `values` is of another structure.
    """
    if isinstance(specs, tf.TensorSpec):
        return [values]
    if isinstance(specs, dict):
        fits, keys = isinstance(values, dict) and set(values) == set(specs), sorted(specs)
    else:
        fits = isinstance(values, list | tuple) and len(values) == len(specs)
        keys = list(range(len(specs)))
    if not fits:
        raise ValueError(
            f"{name} must be of the structure of the model's inputs, {_describe(specs)}, got "
            f"{_describe(values)}."
        )
    return [leaf for key in keys for leaf in leaves(name, specs[key], values[key])]


def logits(function: Any, batch: Any) -> list[np.ndarray]:
    """Return a function's outputs for a batch as flat list of float64 arrays.

    Raises:
        ValueError: one is not finite, which leaves nothing to compare.
    """
    outputs = [np.asarray(output).astype(np.float64) for output in tf.nest.flatten(function(batch))]
    if not all(np.isfinite(output).all() for output in outputs):
        raise ValueError(
            "The model's logits on the probe batch hold NaN or infinity, so nothing can be "
            "compared with them. Mend the model, or pass another probe=."
        )
    return outputs


def difference(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    """Return the largest absolute difference between two lists of outputs; inf if shapes differ."""
    if [array.shape for array in left] != [array.shape for array in right]:
        return float("inf")
    return max((float(np.abs(a - b).max(initial=0.0)) for a, b in zip(left, right, strict=True)))


def tolerance(model: Any, outputs: list[np.ndarray]) -> float:
    """Return how far logits may be apart that come from the same weights by other kernels.

    A graph is optimised as a whole, so that its sums are taken in another order than layer by
    layer. It is relative to the largest logit (if that is above 1): 1e-4 for float32, which is
    hundreds of roundings; 1e-2 where a GPU multiplies in TensorFloat-32, which has 10 bits; 5e-2
    if a layer computes in 16 bits. Wrong weights are not looked for here: those are compared bit
    by bit.
    """
    scale = max(1.0, *(float(np.abs(output).max(initial=0.0)) for output in outputs))
    dtypes = {getattr(layer, "compute_dtype", None) for layer in model._flatten_layers()}
    if dtypes & {"float16", "bfloat16"}:
        return 5e-2 * scale
    on_gpu = bool(tf.config.get_visible_devices("GPU"))
    if on_gpu and tf.config.experimental.tensor_float_32_execution_enabled():
        return 1e-2 * scale
    return 1e-4 * scale


def known_inputs(model: Any) -> Any:
    """Return a graph model's inputs as TensorSpecs, in its own structure; None if not known."""
    if not _keras.is_graph_model(model):
        return None
    return tf.nest.map_structure(
        lambda tensor: tf.TensorSpec(tensor.shape, tensor.dtype, name=_identifier(tensor.name)),
        model_inputs.symbols(model),
    )


def _of_any_size(spec: tf.TensorSpec) -> tf.TensorSpec:
    """Return a spec with the number of examples left open."""
    if not spec.shape.rank:
        return spec
    return tf.TensorSpec((None, *spec.shape[1:]), spec.dtype, name=spec.name)


def _identifier(name: str) -> str:
    """Return a name that a function's argument can have, as which the signature uses it."""
    name = re.sub(r"\W", "_", name)
    return f"{name}_" if keyword.iskeyword(name) else name


def _inputs_of(probe: Any) -> Any:
    """Return TensorSpecs of the arrays in `probe`; float64, NumPy's default, becomes float32."""

    def spec(leaf: Any, name: str | None = None) -> tf.TensorSpec:
        array = np.asarray(leaf)
        dtype = tf.float32 if array.dtype == np.float64 else tf.as_dtype(array.dtype)
        return tf.TensorSpec(array.shape, dtype, name=name)

    if tf.nest.is_nested(probe):
        return tf.nest.map_structure(spec, probe)
    return spec(probe, "inputs")


def _draw(model: Any, spec: tf.TensorSpec, generator: np.random.Generator) -> np.ndarray:
    examples = spec.shape[0] if spec.shape.rank else None
    drawn = model_inputs.draw(spec, examples or EXAMPLES, generator)
    if drawn is None:
        raise ValueError(
            f"model {model.name!r} has an input {_describe(spec)}, and no batch can be drawn for "
            f"it: only floats of known shape can. {WAY_OUT}"
        )
    return drawn


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
    """Return a structure of arrays or TensorSpecs as people write it."""
    if isinstance(structure, dict):
        return "{" + ", ".join(f"{k!r}: {_describe(v)}" for k, v in structure.items()) + "}"
    if isinstance(structure, list | tuple):
        return "[" + ", ".join(map(_describe, structure)) + "]"
    if isinstance(structure, tf.TensorSpec):
        sizes = ", ".join("any" if size is None else str(size) for size in structure.shape)
        return f"{structure.dtype.name} ({sizes})"
    array = np.asarray(structure)
    return f"{array.dtype} {array.shape}"
