"""The arithmetic of importance scores: initial values, gradients, perturbation."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from tscnc_tf._keras import optimizers
from tscnc_tf.pruning.targets import Target


def initial(weight: tf.Tensor, target: Target) -> tf.Tensor:
    """Return the initial scores of a weight tensor: sqrt(6 / fan-in) · w / max|w|."""
    if target.layout:
        _, positions, inputs, _ = target.canonical_shape
        fan_in = positions * inputs
    else:  # as in Keras' initializers
        fan_in = math.prod(target.shape[:-1])
    largest = tf.reduce_max(tf.abs(weight))
    return tf.math.divide_no_nan(weight, largest) * tf.cast(math.sqrt(6.0 / fan_in), weight.dtype)


def products(pairs: optimizers.Pairs, factors: dict[Any, tuple[Any, Any]]) -> dict[Any, tf.Tensor]:
    r"""Return :math:`\partial L/\partial(w\odot m) \odot w` by kernel, if it has a gradient.

    Args:
        pairs: gradients and variables; those of kernels are the gradients of :math:`w\odot m`.
        factors: (dense weights w, scores) of each kernel, by the keys of the kernels.
    """
    keys = [(slope, optimizers.key(variable)) for slope, variable in pairs]
    return {
        key: tf.convert_to_tensor(slope) * factors[key][0]
        for slope, key in keys
        if key in factors and slope is not None
    }


def gradient(product: tf.Tensor, score: Any) -> tf.Tensor:
    r"""Return the straight-through gradient of scores: product ⊙ sign(s)."""
    return product * tf.sign(score)


def gradients(
    pairs: optimizers.Pairs,
    products: dict[Any, tf.Tensor],
    factors: dict[Any, tuple[Any, Any]],
    frozen: set[Any],
) -> optimizers.Pairs:
    r"""Return pairs in which the gradients of kernels are replaced by those of their scores.

    .. math:: \partial L/\partial s = \partial L/\partial(w\odot m) \odot w \odot \text{sign}(s)

    Args:
        pairs: as in `products`.
        products: the result of `products`.
        factors: as in `products`.
        frozen: keys of variables that are left out.
    """
    result = []
    for slope, variable in pairs:
        key = optimizers.key(variable)
        if key in products:
            slope = gradient(products[key], factors[key][1])
        if key not in frozen:
            result.append((slope, variable))
    return result


def perturbed(score: Any, slope: tf.Tensor, radius: float) -> tf.Tensor:
    r"""Return :math:`s + \rho \|s\|_2\, g / \|g\|_2`, or s if g is zero or not finite.

    Args:
        score: the scores s of a weight tensor.
        slope: the gradient g of the loss with respect to s.
        radius: :math:`\rho`.
    """
    score = tf.convert_to_tensor(score)
    step = slope * tf.math.divide_no_nan(tf.norm(score), tf.norm(slope))
    is_finite = tf.reduce_all(tf.math.is_finite(step))
    return tf.where(is_finite, score + radius * step, score)
