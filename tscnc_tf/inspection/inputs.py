"""A check of a network's outputs: one tensor."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def one_tensor(outputs: Any) -> tf.Tensor:
    """Return a model's output as a float32 tensor; raise a TypeError if there are several."""
    if isinstance(outputs, (dict, list, tuple)):
        raise TypeError(
            f"model must return one tensor, got a {type(outputs).__name__} of {len(outputs)}. Pass "
            "a function that picks one, such as `lambda x: model(x)['logits']`."
        )
    return tf.cast(outputs, tf.float32)
