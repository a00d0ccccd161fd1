"""Stochastic gradient descent with L2 weight decay in the gradient."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tscnc_tf import _checks, _keras
from tscnc_tf._keras import flavours, keras, tf_keras

_Base: Any = object  # replaced by a Keras optimizer in the subclasses at the end of this file


class SGDWithL2(_Base):
    r"""SGD with coupled weight decay: a part of the gradient, and thus of the momentum.

    .. math:: g \leftarrow g + \lambda w, \quad m \leftarrow \mu m - \eta g, \quad
        w \leftarrow w + m

    (with `nesterov=True` :math:`w \leftarrow w + \mu m - \eta g`). It is Keras' SGD except for the
    first formula, and at a constant learning rate the SGD of PyTorch with
    `weight_decay` :math:`\lambda`: :math:`\lambda w` is the gradient of
    :math:`\frac\lambda2\|w\|^2`, which is not included in losses and logs. Keras' own
    `weight_decay` is decoupled: it subtracts :math:`\eta\lambda w` from the weight, outside of the
    momentum, so with momentum 0.9 the same number has a tenth of the effect.
    (`keras.regularizers.L2(c)` with :math:`c = \lambda / 2` is the same as a part of the loss.)

    It is applied once per step: after loss scaling, clipping, the accumulation of gradients and
    their sum over replicas. As in PyTorch, all trainable weights decay, including biases and those
    of normalization layers, except those named by Keras' `exclude_from_weight_decay`. It has no
    effect on attacks. Pruned weights stay zero; while scores are trained, the scores decay.

    It is an optimizer of the Keras that `library` names: a `keras.optimizers.SGD` or a
    `tf_keras.optimizers.SGD`. A subclass derives from the class for its Keras,
    `training.sgd.Keras3SGDWithL2` or `TfKerasSGDWithL2`.

    Args:
        learning_rate: a number, or a schedule of the same Keras.
        momentum: :math:`\mu`, in [0, 1].
        nesterov: whether the momentum is Nesterov's.
        weight_decay: :math:`\lambda` >= 0.
        library: "keras" (Keras 3) or "tf_keras".
        **options: further arguments of Keras' SGD, such as `use_ema`.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> import tscnc_tf as tscnc
        >>> optimizer = tscnc.training.SGDWithL2(0.1, momentum=0.9, weight_decay=5e-4)
        >>> optimizer.weight_decay
        0.0005

    Reference:
        Loshchilov & Hutter 2019, arXiv 1711.05101, for both kinds; Pang et al. 2021, arXiv
        2010.00467, for its effect in adversarial training.
    """

    def __new__(cls, *args: Any, library: str = "keras", **kwargs: Any) -> Any:  # noqa: ARG004
        """Return an optimizer of the Keras that `library` names."""
        _checks.one_of("library", library, _keras.LIBRARIES)
        kind = {"keras": Keras3SGDWithL2, "tf_keras": TfKerasSGDWithL2}[library]
        if cls is not SGDWithL2:  # also when Keras restores one
            return super().__new__(cls)
        return super().__new__(kind)

    def __init__(
        self,
        learning_rate: Any = 0.01,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        *,
        library: str = "keras",  # noqa: ARG002  read by __new__
        **options: Any,
    ) -> None:
        super().__init__(
            learning_rate,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=_checks.factor("weight_decay", weight_decay),
            **options,
        )

    def update_step(self, gradient: Any, variable: Any, *args: Any) -> Any:
        """Update a weight; Keras calls this with the final gradient."""
        if self.weight_decay and self._use_weight_decay(variable):
            weight = tf.convert_to_tensor(variable)
            factor = tf.cast(self.weight_decay, weight.dtype)
            gradient = tf.cast(tf.convert_to_tensor(gradient), weight.dtype) + factor * weight
        return super().update_step(gradient, variable, *args)

    def _apply_weight_decay(self, variables: Any) -> None:
        """Do nothing: Keras' own decay is the decoupled one."""


@flavours.registered_as("SGDWithL2")
class Keras3SGDWithL2(SGDWithL2, keras.optimizers.SGD):
    """`SGDWithL2` of Keras 3."""


@flavours.registered_as("SGDWithL2")
class TfKerasSGDWithL2(SGDWithL2, tf_keras.optimizers.SGD):
    """`SGDWithL2` of tf_keras."""
