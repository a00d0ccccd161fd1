"""A batch on which the compacted model has to agree with the one that was given."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks
from tscnc_tf._keras import models as model_inputs

EXAMPLES = 8


def prepare(model: Any, probe: Any, name: str = "probe") -> Any:
    """Return a batch as the model takes it: the one given, or rows drawn from U[0, 1), seeded.

    Args:
        model: a built Sequential or functional model.
        probe: the batch, or None.
        name: what the caller calls it, for the error message.

    Raises:
        ValueError: the batch does not fit the model, or none can be drawn for it.
    """
    symbols = model_inputs.symbols(model)
    if probe is None:
        generator = np.random.default_rng(0)
        return tf.nest.map_structure(lambda symbol: _draw(model, symbol, generator), symbols)
    try:
        tf.nest.assert_same_structure(symbols, probe, check_types=False)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be of the structure of the inputs of model {model.name!r}, "
            f"{tf.nest.map_structure(lambda symbol: tuple(symbol.shape), symbols)}."
        ) from None
    pairs = zip(tf.nest.flatten(symbols), tf.nest.flatten(probe), strict=True)
    return tf.nest.pack_sequence_as(symbols, [_fit(name, *pair) for pair in pairs])


def outputs(model: Any, batch: Any) -> list[np.ndarray]:
    """Return a model's outputs for a batch, in inference mode, as float64.

    Raises:
        ValueError: one is not finite, which leaves nothing to compare.
    """
    values = tf.nest.flatten(model(batch, training=False))
    arrays = [np.asarray(tf.cast(value, tf.float64)) for value in values]
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError(
            f"The logits of model {model.name!r} on the probe batch hold NaN or infinity, so "
            "nothing can be compared with them. Mend the model, or pass another probe=."
        )
    return arrays


def tolerance(value: float | None, layers: list[Any], expected: list[np.ndarray]) -> float:
    """Return by how much the logits may differ.

    It is relative to the largest logit, if that is above 1: 1e-5 unless told, which is some dozens
    of roundings of a float32; 5e-2 if a layer computes in 16 bits; 1e-2 on a GPU that multiplies
    in TensorFloat-32.
    """
    if value is None:
        dtypes = {getattr(layer, "compute_dtype", None) for layer in layers}
        on_gpu = bool(tf.config.get_visible_devices("GPU"))
        value = 1e-5
        if on_gpu and tf.config.experimental.tensor_float_32_execution_enabled():
            value = 1e-2
        if dtypes & {"float16", "bfloat16"}:
            value = 5e-2
    scale = max(1.0, *(float(np.abs(array).max(initial=0.0)) for array in expected))
    return _checks.number("tolerance", value, minimum=0.0) * scale


def _draw(model: Any, symbol: Any, generator: np.random.Generator) -> np.ndarray:
    drawn = model_inputs.draw(symbol, symbol.shape[0] or EXAMPLES, generator)
    if drawn is None:
        raise ValueError(
            f"model {model.name!r} has an input of shape {tuple(symbol.shape)} and "
            f"{tf.as_dtype(symbol.dtype).name}, and no batch can be drawn for it: only floats of "
            "known shape can. Pass probe=, a batch of inputs as the model takes them."
        )
    return drawn


def _fit(name: str, symbol: Any, values: Any) -> np.ndarray:
    array = np.asarray(values)
    if not tf.TensorShape(symbol.shape).is_compatible_with(array.shape) or not array.shape[0]:
        raise ValueError(
            f"{name} must be of shape {tuple(symbol.shape)}, with at least one example, got "
            f"{array.shape}."
        )
    return array.astype(tf.as_dtype(symbol.dtype).as_numpy_dtype)
