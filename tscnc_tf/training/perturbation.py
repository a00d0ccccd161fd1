"""Adversarial perturbation of the weights during training."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tscnc_tf import _checks, _configs, _keras
from tscnc_tf._keras import masks, optimizers
from tscnc_tf._keras.flavours import tensor_variable

Values = list[tuple[Any, tf.Tensor]]  # (variable, value)


@_keras.register
@dataclasses.dataclass(frozen=True)
class AWP(_configs.Configurable):
    r"""Adversarial weight perturbation: each step descends the loss at perturbed weights.

    .. math:: v_l = \gamma\,\|w_l\|\,\frac{\nabla_{w_l} L(w)}{\|\nabla_{w_l} L(w)\|}, \qquad
        w \leftarrow w - \eta\,\nabla L(w + v)

    for each weight tensor :math:`w_l` of two axes or more, where L is the robust loss, without
    penalties, on the batch's adversarial examples. Pruned entries stay zero in w + v. Penalties and
    weight decay are those of w. A step takes one more forward and backward pass.

    The direction is computed in inference mode, which does not change BatchNorm's averages (the
    authors compute it in training mode, on a copy of the network).

    Args:
        gamma: :math:`\gamma` > 0, the size of the perturbation relative to the weights.

    Raises:
        TypeError, ValueError: gamma is not a number > 0.

    Example:
        >>> AWP(gamma=0.005)
        AWP(gamma=0.005)

    Reference:
        Wu, Xia & Wang 2020, arXiv 2004.05884, equations 8 to 10; gamma 0.005 for TRADES on CIFAR,
        and without it in the first epochs, in the authors' code.
    """

    gamma: float = 0.005

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", _checks.number("gamma", self.gamma, above=0.0))

    def perturbed(self, model: Any, loss: Callable[[], tf.Tensor]) -> tuple[Values, Values]:
        """Return the weights before and after perturbation, each as pairs (variable, value).

        Args:
            model: its trainable weights of two axes or more are perturbed.
            loss: computes the loss that the perturbation raises, a scalar, times any factor.
        """
        weights = [
            tensor_variable(variable)
            for variable in model.trainable_variables
            if len(variable.shape) > 1
        ]
        with tf.GradientTape() as tape:
            value = loss()
        slopes = [
            (weight, tf.cast(tf.convert_to_tensor(gradient), weight.dtype))
            for weight, gradient in zip(weights, tape.gradient(value, weights), strict=True)
            if gradient is not None
        ]
        # If float16 overflows, the weights stay: the training's gradient will overflow as well, and
        # the optimizer will skip the step and lower its loss scale.
        finite = (tf.reduce_all(tf.math.is_finite(gradient)) for _, gradient in slopes)
        is_finite = functools.reduce(tf.logical_and, finite, True)
        kept = {optimizers.key(weight): mask for weight, mask in masks.masked_variables(model)}
        before, after = [], []
        for weight, slope in slopes:
            now = tf.identity(weight)
            mask = kept.get(optimizers.key(weight))
            gradient = tf.where(is_finite, slope, tf.zeros_like(slope))
            if mask is not None:
                gradient *= tf.cast(tf.convert_to_tensor(tensor_variable(mask)), now.dtype)
            size = self.gamma * tf.norm(now)
            before.append((weight, now))
            after.append((weight, now + size * tf.math.divide_no_nan(gradient, tf.norm(gradient))))
        return before, after


@contextlib.contextmanager
def at(before: Values, after: Values) -> Iterator[None]:
    """Set weights to the values `after` in this context, and back to `before` at its end."""
    for variable, value in after:
        variable.assign(value)
    try:
        yield
    finally:
        for variable, value in before:
            variable.assign(value)
