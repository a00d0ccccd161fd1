"""Losses of robust training: the adversary's objective, and the loss of a training step."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, final

import tensorflow as tf

from tscnc_tf import _checks, _configs, _keras
from tscnc_tf.losses.terms import cross_entropy, is_true_class, kl_divergence, lifted


@dataclasses.dataclass(frozen=True)
class RobustLoss(_configs.Configurable, abc.ABC):
    """Base of the losses of robust training.

    Per example, a training step descends `robust(labels, clean_logits, adversarial_logits)`, plus
    the clean loss if `adds_clean_loss`.

    Attributes:
        objective: the objective that the adversary ascends, "cross_entropy" or "kl".
        start: the adversary's start: "uniform" in the ball, or "gaussian", x + 0.001 N(0, 1).
        uses_clean: whether the training forward pass includes the clean batch.
        adds_clean_loss: whether cross-entropy on the clean batch is added to the robust term.
    """

    objective: ClassVar[str] = "cross_entropy"
    start: ClassVar[str] = "uniform"
    uses_clean: ClassVar[bool] = False
    adds_clean_loss: ClassVar[bool] = False

    @abc.abstractmethod
    def robust(self, labels: Any, clean_logits: Any, adversarial_logits: Any) -> tf.Tensor:
        """Return the robust term per example, shape `(batch,)`.

        A loss that has a `reference` takes it as a fourth argument, `reference_logits`.

        Args:
            labels: see `tscnc_tf.losses`.
            clean_logits: `(batch, classes)`; not used if `uses_clean` is False.
            adversarial_logits: `(batch, classes)`.
        """

    def reference(self, x: tf.Tensor) -> tf.Tensor | None:  # noqa: ARG002
        """Return logits to use in place of the network's clean logits; None (default) for none.

        A training step calls this once, outside of the attack. The adversary of objective "kl"
        maximises the divergence from them, and `robust` gets them as `reference_logits`.

        Args:
            x: the clean batch.
        """
        return None


@final
@_keras.register
@dataclasses.dataclass(frozen=True)
class TRADES(RobustLoss):
    r"""TRADES: accuracy on clean inputs, and an output that is stable in the ball around them.

    .. math:: \mathrm{CE}(y, f(x)) + \beta\,\mathrm{KL}(p(x) \| p(x'))

    with :math:`p = \mathrm{softmax}\, f` and x' found by ascent on that KL, from x + 0.001 N(0, 1).
    `robust` is the second term; the first is the model's clean loss.

    Args:
        beta: the weight of the second term, >= 0.

    Raises:
        TypeError, ValueError: beta is not a finite number >= 0.

    Example:
        >>> loss = TRADES(beta=6.0)
        >>> float(loss.robust([0], [[2.0, 1.0]], [[2.0, 1.0]])[0])
        0.0

    Reference:
        Zhang et al. 2019, arXiv 1901.08573, algorithm 1. The authors' beta for CIFAR-10 is 6.
    """

    objective: ClassVar[str] = "kl"
    start: ClassVar[str] = "gaussian"
    uses_clean: ClassVar[bool] = True
    adds_clean_loss: ClassVar[bool] = True

    beta: float = 6.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", _checks.factor("beta", self.beta))

    def robust(self, labels: Any, clean_logits: Any, adversarial_logits: Any) -> tf.Tensor:  # noqa: ARG002
        """Return beta times the KL divergence per example; labels are not used."""
        return self.beta * kl_divergence(clean_logits, adversarial_logits)


@final
@_keras.register
@dataclasses.dataclass(frozen=True)
class Madry(RobustLoss):
    r"""Madry's adversarial training: cross-entropy on the adversarial example only.

    .. math:: \mathrm{CE}(y, f(x'))

    with x' found by ascent on cross-entropy, from a uniform start in the ball.

    Example:
        >>> round(float(Madry().robust([0], None, [[0.0, 0.0]])[0]), 4)
        0.6931

    Reference:
        Madry et al. 2018, arXiv 1706.06083, equation 2.1.
    """

    def robust(self, labels: Any, clean_logits: Any, adversarial_logits: Any) -> tf.Tensor:  # noqa: ARG002
        """Return the cross-entropy of the adversarial logits; the clean ones are not used."""
        return cross_entropy(labels, adversarial_logits)


@final
@_keras.register
@dataclasses.dataclass(frozen=True)
class MART(RobustLoss):
    r"""MART: adversarial training that weights the KL divergence by the error on the clean example.

    .. math:: \mathrm{BCE}(y, p(x')) + \beta\,\mathrm{KL}(p(x) \| p(x'))\,(1 - p_y(x)), \qquad
        \mathrm{BCE}(y, p) = -\log p_y - \log(1 - \max_{k\ne y} p_k)

    with x' found by ascent on cross-entropy, from x + 0.001 N(0, 1).

    Args:
        beta: the weight of the second term, >= 0.

    Raises:
        TypeError, ValueError: beta is not a finite number >= 0.

    Example:
        >>> loss = MART(beta=5.0)
        >>> round(float(loss.robust([0], [[0.0, 0.0]], [[0.0, 0.0]])[0]), 3)
        1.386

    Reference:
        Wang et al. 2020, "Improving adversarial robustness requires revisiting misclassified
        examples", ICLR, with the small constants of the authors' code.
    """

    start: ClassVar[str] = "gaussian"
    uses_clean: ClassVar[bool] = True

    beta: float = 5.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", _checks.factor("beta", self.beta))

    def robust(self, labels: Any, clean_logits: Any, adversarial_logits: Any) -> tf.Tensor:
        """Return the boosted cross-entropy plus the weighted KL divergence per example."""
        clean, adversarial = lifted(clean_logits), lifted(adversarial_logits)
        is_true = is_true_class(labels, clean)
        wrong = tf.where(is_true, 0.0, tf.nn.softmax(adversarial))
        largest_wrong = tf.reduce_max(wrong, axis=-1)
        boosted = cross_entropy(labels, adversarial) - tf.math.log(1.0001 - largest_wrong + 1e-12)
        uncertainty = 1.0000001 - tf.reduce_sum(
            tf.where(is_true, tf.nn.softmax(clean), 0.0), axis=-1
        )
        return boosted + self.beta * kl_divergence(clean, adversarial) * uncertainty
