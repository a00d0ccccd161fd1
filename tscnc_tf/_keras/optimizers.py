"""What an optimizer of either Keras keeps for each weight, and how far it has come."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tscnc_tf._keras import keras, tf_keras
from tscnc_tf._keras.flavours import tensor_variable


def innermost(optimizer: Any) -> Any:
    """Return the optimizer inside a LossScaleOptimizer, or the optimizer itself."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def companions(optimizer: Any, variable: Any) -> list[Any]:
    """Return what an optimizer keeps for a weight in the weight's own shape.

    Those are its slots (momentum, second moments), accumulated gradients and moving averages. All
    optimizers keep them in lists in the order of the trainable variables.

    Args:
        optimizer: an optimizer of either Keras, or None.
        variable: one of the weights that it trains, or one that it does not know.
    """
    if optimizer is None:
        return []
    optimizer = innermost(optimizer)
    if isinstance(optimizer, tf_keras.optimizers.legacy.Optimizer):
        names = optimizer.get_slot_names()
        return [optimizer.get_slot(variable, name) for name in names]
    positions = _positions(optimizer)
    position = positions.get(_key(variable))
    if position is None:
        return []
    found = {}
    for kept in vars(optimizer).values():
        if not isinstance(kept, list | tuple) or len(kept) != len(positions):
            continue
        companion = kept[position]
        if not isinstance(companion, tf.Variable | keras.Variable):
            continue
        if _key(companion) != _key(variable) and tuple(companion.shape) == tuple(variable.shape):
            found[_key(companion)] = companion
    return list(found.values())


def trains(optimizer: Any, variables: list[Any]) -> bool:
    """Tell whether an object is an optimizer that has begun to train one of these weights."""
    kinds = (keras.optimizers.Optimizer, tf_keras.optimizers.Optimizer)
    if isinstance(optimizer, tf_keras.optimizers.legacy.Optimizer):
        return True  # it does not tell
    if not isinstance(optimizer, kinds):
        return False
    positions = _positions(innermost(optimizer))
    return any(_key(variable) in positions for variable in variables)


def iterations(optimizer: Any) -> tf.Tensor:
    """Return the number of steps that an optimizer has taken, int64."""
    return tf.cast(tf.convert_to_tensor(innermost(optimizer).iterations), tf.int64)


def _positions(optimizer: Any) -> dict[Any, int]:
    """Return the place of each weight in an optimizer's lists; empty if it is not built."""
    if isinstance(optimizer, keras.optimizers.Optimizer):
        known = getattr(optimizer, "_trainable_variables", None) or []
        return {_key(variable): index for index, variable in enumerate(known)}
    return dict(getattr(optimizer, "_index_dict", {}))


def _key(variable: Any) -> Any:
    return getattr(tensor_variable(variable), "_unique_id", None)
