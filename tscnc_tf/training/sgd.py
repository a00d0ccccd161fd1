"""Stochastic gradient descent whose weight decay is a part of the gradient."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tscnc_tf import _checks, _keras
from tscnc_tf._keras import flavours, keras, tf_keras

_Base: Any = object  # The subclasses at the end of this file put a Keras optimizer in its place.


class SGDWithL2(_Base):
    r"""SGD with the weight decay of the literature, in the gradient and so in the momentum.

    .. math:: g \leftarrow g + \lambda w, \quad m \leftarrow \mu m - \eta g, \quad
        w \leftarrow w + m

    (with `nesterov=True` :math:`w \leftarrow w + \mu m - \eta g`). It is Keras' SGD in all but the
    first formula, and at a constant learning rate the SGD of PyTorch with
    `weight_decay` :math:`\lambda`: the gradient of :math:`\frac\lambda2\|w\|^2`, which no loss or
    log shows. Keras' own `weight_decay` is decoupled: it takes :math:`\eta\lambda w` from the
    weight beside the momentum, so that with momentum 0.9 the same number acts a tenth as much.
    (`keras.regularizers.L2(c)` is half of this :math:`\lambda`, and is a part of the loss.)

    It acts once per step: after loss scaling, clipping, the accumulation of gradients and their
    sum over replicas. As in PyTorch, all trainable weights decay, biases and those of
    normalization layers among them; `exclude_from_weight_decay` of Keras names others. Attacks
    don't see it. What is pruned is zero, and stays so; while scores are trained, they decay.

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
        2010.00467, for what it is worth in adversarial training.
    """

    def __new__(cls, *args: Any, library: str = "keras", **kwargs: Any) -> Any:  # noqa: ARG004
        """Return an optimizer of the Keras that `library` names."""
        _checks.one_of("library", library, _keras.LIBRARIES)
        kind = {"keras": Keras3SGDWithL2, "tf_keras": TfKerasSGDWithL2}[library]
        if cls is not SGDWithL2:  # also where Keras restores one
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
        """Take a step on a weight; Keras calls this with the gradient as it is to act."""
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
