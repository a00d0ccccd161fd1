"""Distillation of a robust network into a smaller one."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self, final

import tensorflow as tf

from tscnc_tf import _checks, _keras
from tscnc_tf._keras import models
from tscnc_tf.losses.robust import RobustLoss
from tscnc_tf.losses.terms import kl_divergence, lifted


@final
@_keras.register
@dataclasses.dataclass(frozen=True)
class RSLAD(RobustLoss):
    r"""Robust soft labels: a robust teacher's clean output is the target of both terms.

    .. math:: (1 - \alpha)\,\mathrm{KL}(T(x) \| S(x)) + \alpha\,\mathrm{KL}(T(x) \| S(x'))

    with T the softmax of the teacher's logits in inference mode, S that of the network in training,
    and x' found by ascent on :math:`\mathrm{KL}(T(x) \| S(x'))`, from x + 0.001 N(0, 1). (An attack
    that starts at x, such as FGSM, ascends cross-entropy instead, as with TRADES.) The temperature
    is 1, and labels are not used. A step runs the teacher once, on the clean batch.

    The teacher is not trained: neither its weights nor its moving averages change. It is not saved
    with the trainer; after loading a trainer, set it again by
    `trainer.robust_loss = trainer.robust_loss.with_teacher(teacher)` before training.

    The divergence is a sum over the classes. The authors' code takes the mean, so on CIFAR-10 its
    loss is a tenth of this one, and weight decay has ten times the relative weight.

    Args:
        teacher: returns logits for the same inputs and classes as the network in training. A built
            model of either Keras (not necessarily the network's), or a function of TensorFlow
            operations; None to set it later. Under a distribution strategy, build it in the
            strategy's scope, so that each device has a copy.
        alpha: the weight of the adversarial term, in [0, 1].

    Raises:
        TypeError: teacher is neither a model nor callable.
        ValueError: teacher is not built, or does not return logits; alpha is outside of [0, 1].

    Example:
        >>> loss = RSLAD(teacher=lambda x: x, alpha=0.5)
        >>> target = loss.reference([[2.0, 1.0]])
        >>> float(loss.robust([0], [[2.0, 1.0]], [[2.0, 1.0]], target)[0])
        0.0

    Reference:
        Zi et al. 2021, arXiv 2108.07969, and the authors' code for alpha, 5/6, and the start.
    """

    objective: ClassVar[str] = "kl"
    start: ClassVar[str] = "gaussian"
    uses_clean: ClassVar[bool] = True

    teacher: Any = dataclasses.field(repr=False)
    alpha: float = 5 / 6

    def __post_init__(self) -> None:
        alpha = _checks.number("alpha", self.alpha, minimum=0.0, maximum=1.0)
        object.__setattr__(self, "alpha", alpha)
        if self.teacher is not None:
            _require_logits(self.teacher)

    def with_teacher(self, teacher: Any) -> Self:
        """Return a copy of this loss with another teacher."""
        return dataclasses.replace(self, teacher=teacher)

    def reference(self, x: tf.Tensor) -> tf.Tensor:
        """Return the teacher's logits, a constant to gradients.

        Raises:
            ValueError: there is no teacher, or it does not return `(batch, classes)`.
        """
        if self.teacher is None:
            raise ValueError(
                "RSLAD has no teacher, which is not saved with a trainer: before training, set "
                "trainer.robust_loss = trainer.robust_loss.with_teacher(teacher)."
            )
        logits = _keras.inference(self.teacher)(tf.convert_to_tensor(x))
        models.number_of_logits("teacher", logits)
        return tf.stop_gradient(lifted(logits))

    def robust(
        self,
        labels: Any,  # noqa: ARG002
        clean_logits: Any,
        adversarial_logits: Any,
        reference_logits: Any = None,
    ) -> tf.Tensor:
        """Return the weighted sum of both divergences per example, shape `(batch,)`.

        Args:
            labels: not used.
            clean_logits: of the network in training, `(batch, classes)`.
            adversarial_logits: likewise, for the adversarial batch.
            reference_logits: the result of `reference` for the clean batch, `(batch, classes)`.

        Raises:
            ValueError: `reference_logits` are missing, or of another number of classes.
        """
        if reference_logits is None:
            raise ValueError("reference_logits must be given: those of RSLAD.reference(x).")
        clean = kl_divergence(reference_logits, clean_logits)
        adversarial = kl_divergence(reference_logits, adversarial_logits)
        return (1.0 - self.alpha) * clean + self.alpha * adversarial

    def get_config(self) -> dict[str, Any]:
        """Return alpha, and None for the teacher."""
        return {"teacher": None, "alpha": self.alpha}


def _require_logits(teacher: Any) -> None:
    """Raise unless the teacher returns logits, as far as can be checked before training."""
    if _keras.flavour(teacher) is not None:
        _keras.library("teacher", teacher)
        _keras.require_built("teacher", teacher)
        models.classes("teacher", teacher)
        models.require_no_probabilities("teacher", teacher)
    elif not callable(teacher):
        raise TypeError(
            "teacher must be a Keras 3 or tf_keras model or another callable from x to logits, got "
            f"{teacher!r}."
        )
    _keras.inference(teacher)  # builds its view without pruning wrappers outside of any graph
