"""What a model takes, and batches drawn for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf._keras import is_graph_model, keras


def symbols(model: Any) -> Any:
    """Return the symbolic inputs of a Sequential or functional model, in its own structure."""
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


def draw(symbol: Any, examples: int, generator: np.random.Generator) -> np.ndarray | None:
    """Return examples of an input, drawn from U[0, 1); None if only the user knows what to give.

    Args:
        symbol: a symbolic input, or whatever else has a shape and a dtype; it is drawn if it holds
            floats of known shape.
        examples: how many.
        generator: draws.
    """
    shape, dtype = tf.TensorShape(symbol.shape), tf.as_dtype(symbol.dtype)
    if not shape.rank or None in shape[1:].as_list() or not dtype.is_floating:
        return None
    drawn = generator.random((examples, *shape[1:].as_list()), np.float32)
    return drawn.astype(dtype.as_numpy_dtype)


def draw_one(model: Any, examples: int, generator: np.random.Generator) -> np.ndarray | None:
    """Return examples for a built model, drawn from U[0, 1); None if it is not known what it takes.

    That is known of a model that takes one tensor of floats; of a subclassed one if Keras noted the
    shape that it was built by.
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
