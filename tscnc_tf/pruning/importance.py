"""What training by importance scores is made of: how they begin, what else is trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf._keras import adapted, optimizers
from tscnc_tf._keras import layers as kernel_layers
from tscnc_tf._keras.flavours import tensor_variable
from tscnc_tf.pruning import structures
from tscnc_tf.pruning.targets import Target

OTHERS = ("normalization", "all", "none")


def initial_scores(weight: tf.Tensor, target: Target) -> tf.Tensor:
    """Return the scores that a weight begins with: sqrt(6 / fan-in) · w / max|w|."""
    if target.layout:
        _, positions, inputs, _ = target.canonical_shape
        fan_in = positions * inputs
    else:  # as Keras' initializers have it
        fan_in = math.prod(target.shape[:-1])
    largest = tf.reduce_max(tf.abs(weight))
    return tf.math.divide_no_nan(weight, largest) * tf.cast(math.sqrt(6.0 / fan_in), weight.dtype)


@dataclasses.dataclass(frozen=True)
class Every:
    """The schedule of one sparsity throughout; masks are chosen every so many steps."""

    sparsity: float
    frequency: int

    def __call__(self, step: Any) -> tuple[tf.Tensor, float]:
        """Return whether to choose the masks anew at this step, and the sparsity."""
        return tf.equal((tf.cast(step, tf.int64) - 1) % self.frequency, 0), self.sparsity


def unfit(structure: Any, layers: Any) -> Callable[[Target], str]:
    """Return what tells why a weight can't be pruned by scores, in a structure."""
    otherwise = structures.unfit(structure, layers)

    def reason(target: Target) -> str:
        constraint = getattr(target.variable, "constraint", None)
        if constraint is not None:
            return (
                f"its constraint {type(constraint).__name__} would act on the scores, which are "
                "what is trained"
            )
        return otherwise(target)

    return reason


def require_no_lora(layers: Iterable[Any]) -> None:
    """Raise a ValueError if one of some layers has LoRA enabled, whose kernels get no gradients."""
    if names := [layer.name for layer in layers if adapted.has_lora(layer)]:
        raise ValueError(
            "method='scores' needs layers without LoRA, which freezes their kernels and trains "
            f"two factors in their place; it is enabled in {', '.join(names)}. save_weights writes "
            "the sums: load them into a model without LoRA, and prune that one."
        )


def require_rankable(target: Target, where: str) -> None:
    """Raise a ValueError if a kernel is all zero, or holds what is no number."""
    largest = float(np.max(np.abs(tensor_variable(target.variable).numpy())))  # NaN if there is any
    if not 0.0 < largest < math.inf:
        raise ValueError(
            f"{where}: kernel {target.name!r} has max|w| = {largest:g}, so there is nothing to "
            "rank its weights by. Scores are for a network that has been trained: train or load "
            "it first, or leave this kernel out by layers=."
        )


def score_gradients(
    pairs: optimizers.Pairs, factors: dict[Any, tuple[Any, Any]], frozen: set[Any]
) -> optimizers.Pairs:
    r"""Return the pairs to train scores by: gradients of kernels as those of their scores.

    .. math:: \partial L/\partial s = \partial L/\partial(w\odot m) \odot w \odot \text{sign}(s)

    Args:
        pairs: of a gradient and a weight, those of kernels as they act.
        factors: (dense weights, scores) of each kernel, by the keys of the kernels.
        frozen: keys of other weights, which are left out.
    """
    result = []
    for gradient, variable in pairs:
        key = optimizers.key(variable)
        if key in frozen:
            continue
        if key in factors and gradient is not None:
            dense, score = factors[key]
            gradient = tf.convert_to_tensor(gradient) * dense * tf.sign(score)
        result.append((gradient, variable))
    return result


def frozen_others(model: Any, also_train: str) -> set[Any]:
    """Return the keys of a model's weights that are frozen while scores are trained."""
    if also_train == "all":
        return set()
    trained: set[Any] = set()
    if also_train == "normalization":
        for layer in kernel_layers.flatten(model):
            if kernel_layers.is_normalization(layer):
                trained |= {optimizers.key(variable) for variable in layer.trainable_variables}
    return {optimizers.key(variable) for variable in model.trainable_variables} - trained
