"""Changing variables: functions for `strategy.extended.update(variable, function, args)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tscnc_tf._keras import optimizers
from tscnc_tf._keras.flavours import tensor_variable


def assign(variable: Any, value: Any) -> Any:
    """Set a variable to a value."""
    return variable.assign(value)


def keep(variable: Any, mask: Any) -> Any:
    """Set a variable to zero where its mask is False."""
    return variable.assign(kept(variable, mask))


def kept(value: Any, mask: Any) -> tf.Tensor:
    """Return values, and zero where their mask is False."""
    # Not by a product: that makes -0.0 of negative weights, and keeps NaN and infinity. And not by
    # `tf.where`, which is slower, as it looks for shapes to broadcast.
    value = tf.convert_to_tensor(value)
    return tf.raw_ops.Select(condition=tf.convert_to_tensor(mask), x=value, y=tf.zeros_like(value))


def act(variable: Any, dense: Any, mask: Any) -> Any:
    """Set a variable to dense weights, and to zero where their mask is False."""
    return variable.assign(kept(dense, mask))


def begin_companions(
    optimizer: Any, kernel: Any, value: Any, update: Callable[..., Any], past: Any
) -> None:
    """Set what an optimizer keeps for a kernel to what it is before any step.

    Args:
        optimizer: of either Keras.
        kernel: the variable that it is kept for.
        value: what that is to hold, from which averages begin.
        update: changes a variable, as `strategy.extended.update`.
        past: whether the optimizer has taken steps, so that what it keeps is to be forgotten.
    """
    average = optimizers.average(optimizer, kernel)
    for companion in optimizers.companions(optimizer, kernel):
        if companion is average:
            update(tensor_variable(companion), assign, args=(tensor_variable(value),))
        else:
            update(tensor_variable(companion), _forget, args=(past,))


def _forget(variable: Any, past: Any) -> Any:
    value = tf.convert_to_tensor(variable)
    return variable.assign(tf.where(past, tf.zeros_like(value), value))


def at_once(variable: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Change a variable as `strategy.extended.update` does, outside of any strategy's step."""
    return function(variable, *args)
