"""What a network returns, checked: one tensor."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def one_tensor(outputs: Any) -> tf.Tensor:
    """Return what a model returned as a float32 tensor, or raise a TypeError if it is not one."""
    if isinstance(outputs, (dict, list, tuple)):
        raise TypeError(
            f"model must return one tensor, got a {type(outputs).__name__} of {len(outputs)}. Pass "
            "a function that picks one, such as `lambda x: model(x)['logits']`."
        )
    return tf.cast(outputs, tf.float32)
