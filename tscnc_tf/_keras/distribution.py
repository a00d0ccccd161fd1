"""Changing variables so that all replicas of a distribution strategy change alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf


def update_everywhere(model: Any, update: Callable[[Any], None]) -> None:
    """Call `update(strategy)` where it can change the model's variables on all devices.

    Works eagerly, in a graph, under XLA, and in the replica context of a distribution strategy.
    `update` is to change variables by `strategy.extended.update(variable, function, args)`.

    Args:
        model: a Keras model, for the strategy that its variables were made under.
        update: what to do.
    """
    context = tf.distribute.get_replica_context()
    if not tf.distribute.has_strategy():  # plain code, maybe on a model made under a strategy
        with model.distribute_strategy.scope():
            update(model.distribute_strategy)
    elif context is None:
        update(tf.distribute.get_strategy())
    else:
        context.merge_call(update)
