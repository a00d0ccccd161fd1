"""Compatibility with tfmot's pruning wrappers.

A wrapper (`PruneLowMagnitude`) holds a layer and, for each prunable weight, a mask and a threshold,
and re-assigns `weight * mask` at every call. After an optimizer step the weights are thus dense
until the next call; `apply_masks` masks them at once.
"""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from tscnc_tf._keras import optimizers, tfmot
from tscnc_tf._keras.flavours import update_everywhere


def is_wrapper(layer: Any) -> bool:
    """Return whether `layer` is a pruning wrapper. Does not import tfmot."""
    if sys.modules.get("tensorflow_model_optimization") is None:
        return False
    from tensorflow_model_optimization.python.core.sparsity.keras import pruning_wrapper

    return isinstance(layer, pruning_wrapper.PruneLowMagnitude)


def wrapped_layers(model: Any) -> list[Any]:
    """Return the pruning wrappers in `model` (or `model` itself, if it is one), each once."""
    return list(
        {id(layer): layer for layer in model._flatten_layers() if is_wrapper(layer)}.values()
    )


def pruned_variables(model: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (weight, mask) for every pruned weight of `model`."""
    for wrapper in wrapped_layers(model):
        for weight, mask, _ in wrapper.pruning_vars:
            yield weight, mask


def apply_masks(model: Any, optimizer: Any = None) -> None:
    """Set every wrapped weight to `weight * mask`, and likewise its moving average.

    Args:
        model: a model with pruning wrappers; without any, nothing happens.
        optimizer: a tf_keras optimizer. With `use_ema=True` its averages are masked as well, since
            an average over steps is not zero where a weight was pruned during them.
    """
    pairs = list(pruned_variables(model))
    if not pairs:
        return
    averaged = [(optimizers.average(optimizer, weight), mask) for weight, mask in pairs]
    pairs += [(average, mask) for average, mask in averaged if average is not None]

    def assign(variable: Any, mask: Any) -> Any:
        return variable.assign(tf.cast(variable, mask.dtype) * mask)

    def update(strategy: Any) -> None:
        for variable, mask in pairs:
            strategy.extended.update(variable, assign, args=(mask,))

    update_everywhere(model, update)


@contextlib.contextmanager
def step(model: Any, optimizer: Any) -> Iterator[None]:
    """Take an optimizer step in this context: each wrapper counts one step, and masks are applied.

    By itself, a wrapper counts its calls in training mode, which differ from the optimizer's steps
    for a layer that is called twice. A wrapper that has no step yet (-1) gets that of the
    optimizer, as from tfmot's callback; without it tfmot refuses to train.
    """
    for wrapper in wrapped_layers(model):
        count = wrapper.pruning_step
        first = tf.cast(optimizers.iterations(optimizer), count.dtype)
        count.assign(tf.where(count < 0, first, count))
    before = pruning_steps(model)
    yield
    for wrapper, count in zip(wrapped_layers(model), before, strict=True):
        wrapper.pruning_step.assign(count + 1)
    apply_masks(model, optimizer)


def pruning_steps(model: Any) -> list[tf.Tensor]:
    """Return the current step of each wrapper."""
    return [tf.identity(wrapper.pruning_step) for wrapper in wrapped_layers(model)]


def unprunable(layer: Any, block_size: Any = (1, 1), sparsity_m_by_n: Any = None) -> str:
    """Return why tfmot can't prune a layer with these options; an empty string if it can."""
    if not layer.trainable:
        return "it is frozen (trainable=False)"
    weights = prunable_weights(layer)
    if weights is None:
        return (
            f"tfmot does not know the class {type(layer).__name__}; give it a method "
            "get_prunable_weights() that returns the weights to prune"
        )
    if not weights:
        says = hasattr(layer, "get_prunable_weights")
        return "it names no weights to prune" if says else "tfmot prunes no weight of this class"
    ranks = sorted({len(weight.shape) for weight in weights})
    if tuple(block_size) != (1, 1) and ranks != [2]:
        return f"block_size={tuple(block_size)} is for weights of rank 2 only, it has rank {ranks}"
    if sparsity_m_by_n and not set(ranks) <= {2, 4}:
        return (
            f"sparsity_m_by_n={tuple(sparsity_m_by_n)} is for weights of rank 2 and 4 only, "
            f"it has rank {ranks}"
        )
    return ""


def prunable_weights(layer: Any) -> list[Any] | None:
    """Return the weights of a built layer that tfmot prunes, None if it does not know the class."""
    tfmot()
    from tensorflow_model_optimization.python.core.sparsity.keras import prune_registry

    registry = prune_registry.PruneRegistry

    def named(owner: Any, names: Any) -> list[Any]:
        return [operator.attrgetter(name)(owner) for name in names]

    if hasattr(layer, "get_prunable_weights"):  # tfmot takes any class that has it
        return layer.get_prunable_weights()
    if not registry.supports(layer):
        return None
    if not registry._is_rnn_layer(layer):
        return named(layer, registry._weight_names(layer))
    weights = []
    for cell in registry._get_rnn_cells(layer):
        if type(cell) in registry._RNN_CELLS_WEIGHTS_MAP:
            weights += named(cell, registry._RNN_CELLS_WEIGHTS_MAP[type(cell)])
        else:
            weights += cell.get_prunable_weights()
    return weights
