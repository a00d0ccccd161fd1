"""Objectives of adversaries, and losses of robust training.

The functions take labels first: integers of shape `(batch,)` or `(batch, 1)`, or one-hot or soft
labels of shape `(batch, classes)`. They compute in float32 at least, whatever the dtype of the
logits, and return one value per example, of shape `(batch,)`.

`TRADES`, `Madry`, `MART` and `RSLAD` define the loss of a training step by them.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, Self, final

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _configs, _keras
from tscnc_tf._keras import models

__all__ = [
    "MART",
    "Madry",
    "RSLAD",
    "RobustLoss",
    "TRADES",
    "cross_entropy",
    "dlr",
    "kl_divergence",
    "log_odds",
    "margin",
    "one_hot",
    "targeted_dlr",
]


def one_hot(labels: Any, num_classes: int | tf.Tensor) -> tf.Tensor:
    """Return labels of any form as one row per example, `(batch, num_classes)`.

    Args:
        labels: integers of shape `(batch,)` or `(batch, 1)`; or one-hot or soft labels of shape
            `(batch, num_classes)` and any dtype.
        num_classes: the number of classes.

    Returns:
        A tensor of shape `(batch, num_classes)`, float32 (float64 for float64 labels).

    Raises:
        ValueError: the labels have neither of these forms.

    Example:
        >>> one_hot([2, 0], 3).numpy().tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    labels = tf.convert_to_tensor(labels)
    if _checks.holds_indices("labels", labels):
        if labels.dtype not in (tf.int32, tf.int64):  # tf.one_hot takes few others
            labels = tf.cast(labels, tf.int64)
        return tf.one_hot(tf.reshape(labels, (-1,)), num_classes, dtype=tf.float32)
    if _agree(labels.shape[1], num_classes):
        return tf.cast(labels, tf.float64 if labels.dtype == tf.float64 else tf.float32)
    raise ValueError(
        "labels must be integers of shape (batch,) or (batch, 1), or one-hot of shape (batch, "
        f"{_static(num_classes)}), got {labels.dtype.name} of shape {labels.shape}."
    )


def cross_entropy(labels: Any, logits: Any) -> tf.Tensor:
    r"""Return the cross-entropy per example, :math:`-\sum_k y_k \log \mathrm{softmax}(z)_k`.

    Args:
        labels: see `tscnc_tf.losses`.
        logits: `(batch, classes)`, any float dtype.

    Raises:
        ValueError: logits are not a float tensor of rank 2, or labels don't fit them.

    Example:
        >>> round(float(cross_entropy([0], [[0.0, 0.0]])[0]), 4)
        0.6931
    """
    logits = lifted(logits)
    return tf.nn.softmax_cross_entropy_with_logits(_rows(labels, logits), logits)


def kl_divergence(reference_logits: Any, logits: Any) -> tf.Tensor:
    r"""Return :math:`\mathrm{KL}(p \| q) = \sum_k p_k (\log p_k - \log q_k)` per example.

    p and q are the softmax of `reference_logits` and of `logits`. Both logarithms come from
    log-softmax, so the value stays finite where probabilities underflow. Classes with p = 0, as of
    a logit of -infinity, add nothing.

    Args:
        reference_logits: `(batch, classes)`, any float dtype; the gradient flows into it as well.
        logits: `(batch, classes)`, any float dtype.

    Raises:
        ValueError: either is not a float tensor of rank 2, or they have different numbers of
            classes.

    Example:
        >>> float(kl_divergence([[1.0, 2.0]], [[3.0, 4.0]])[0])
        0.0
    """
    logits, reference = lifted(logits), lifted(reference_logits)
    if not reference.shape[1:].is_compatible_with(logits.shape[1:]):
        raise ValueError(
            "reference_logits must be for the same classes as logits, got shapes "
            f"{reference.shape} and {logits.shape}: teacher and student must have "
            "the same classes."
        )
    log_p = tf.nn.log_softmax(tf.cast(reference, logits.dtype))
    log_q = tf.nn.log_softmax(logits)
    p = tf.exp(log_p)
    is_possible = p > 0  # elsewhere neither the difference nor its gradient may be NaN
    log_p, log_q = (tf.where(is_possible, each, 0.0) for each in (log_p, log_q))
    return tf.reduce_sum(p * (log_p - log_q), axis=-1)


def log_odds(labels: Any, logits: Any) -> tf.Tensor:
    r"""Return the log-odds of not being `y`, :math:`\log\sum_{k\ne y} e^{z_k} - z_y`, per example.

    With :math:`p = \mathrm{softmax}(z)` it is :math:`\log((1 - p_y)/p_y)`, so that cross-entropy is
    `softplus(log_odds)`: both rank all inputs equally, and their gradients have the same direction.
    But the gradient of cross-entropy has the factor :math:`1 - p_y`, which rounds to 0 where the
    network is confident, while that of the log-odds does not vanish.

    Soft labels q, of shape `(batch, classes)`, define the weight m of each class:

    .. math:: \log\frac{1 - P}{P}, \qquad P = \sum_k m_k p_k, \qquad
        m_k = \frac{q_k - \min q}{\max q - \min q}

    so label smoothing has no effect (m does not change), and for an equal mixture of two classes it
    is the log-odds of neither class. (Cross-entropy with q is minimal at p = q, and grows as p
    becomes more confident, so its ascent could raise the confidence.) If all entries are equal, y
    is the first class.

    Args:
        labels: see `tscnc_tf.losses`.
        logits: `(batch, classes)`, any float dtype, at least two classes.

    Raises:
        ValueError: logits are not a float tensor of rank 2, or labels don't fit them.

    Example:
        >>> float(log_odds([0], [[3.0, 1.0]])[0])
        -2.0
        >>> float(log_odds([[0.9, 0.1]], [[3.0, 1.0]])[0])
        -2.0
    """
    labels, logits = tf.convert_to_tensor(labels), lifted(logits)
    true, others = split(labels, logits)
    odds = tf.reduce_logsumexp(others, axis=-1) - true
    if _checks.holds_indices("labels", labels):
        return odds
    rows = _rows(labels, logits)
    is_hard = tf.equal(tf.reduce_max(rows, axis=-1), 1.0)
    return tf.where(is_hard, odds, _soft_log_odds(rows, logits))


def _soft_log_odds(rows: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    smallest = tf.reduce_min(rows, axis=-1, keepdims=True)
    width = tf.reduce_max(rows, axis=-1, keepdims=True) - smallest
    first = tf.one_hot(tf.zeros_like(width[:, 0], tf.int64), tf.shape(rows)[1], dtype=rows.dtype)
    share = tf.where(width > 0, tf.math.divide_no_nan(rows - smallest, width), first)
    # The shift changes the rounding of the gradient only: that of the top class is computed as
    # minus the sum of the others, instead of 1 - 1 with a larger rounding error.
    top = tf.argmax(logits, axis=-1)
    logits = logits - tf.gather(logits, top, batch_dims=1)[:, tf.newaxis]

    def log_sum(weights: tf.Tensor) -> tf.Tensor:
        is_in = weights > 0
        logs = tf.math.log(tf.where(is_in, weights, 1.0))
        return tf.reduce_logsumexp(tf.where(is_in, logits + logs, logits.dtype.min), axis=-1)

    return log_sum(1.0 - share) - log_sum(share)


def margin(labels: Any, logits: Any) -> tf.Tensor:
    r"""Return the lead of the best wrong class, :math:`\max_{k\ne y} z_k - z_y`, per example.

    It is negative if the example is classified correctly.

    Args:
        labels: see `tscnc_tf.losses`; y of soft labels is the largest entry.
        logits: `(batch, classes)`, any float dtype, at least two classes.

    Raises:
        ValueError: logits are not a float tensor of rank 2, or labels don't fit them.

    Example:
        >>> float(margin([0], [[3.0, 1.0, 2.0]])[0])
        -1.0

    Reference:
        Carlini & Wagner 2017, arXiv 1608.04644, objective f6 without its cut-off.
    """
    true, others = split(labels, lifted(logits))
    return tf.reduce_max(others, axis=-1) - true


def dlr(labels: Any, logits: Any) -> tf.Tensor:
    r"""Return the difference of logits ratio per example.

    .. math:: \mathrm{DLR}(y, z) = -\frac{z_y - \max_{k\ne y} z_k}{z_{\pi_1} - z_{\pi_3}}

    with :math:`z_{\pi_1} \ge z_{\pi_2} \ge \dots` the sorted logits. Unlike cross-entropy and
    margin it is invariant to shifting and scaling the logits; it lies in [-1, 0] if the example is
    classified correctly.

    Args:
        labels: see `tscnc_tf.losses`; y of soft labels is the largest entry.
        logits: `(batch, classes)`, any float dtype, at least three classes.

    Raises:
        ValueError: there are fewer than three classes, logits are not a float tensor of rank 2, or
            labels don't fit them.

    Example:
        >>> float(dlr([0], [[3.0, 1.0, 2.0]])[0])
        -0.5

    Reference:
        Croce & Hein 2020, arXiv 2003.01690, section 4.
    """
    logits = lifted(logits, classes=3)
    largest = tf.math.top_k(logits, k=3).values
    # The constant of the authors' code; it matters only if three logits are equal.
    return margin(labels, logits) / (largest[:, 0] - largest[:, 2] + 1e-12)


def targeted_dlr(labels: Any, targets: Any, logits: Any) -> tf.Tensor:
    r"""Return the difference of logits ratio towards a class t, per example.

    .. math:: \mathrm{DLR}(y, t, z) =
        -\frac{z_y - z_t}{z_{\pi_1} - \frac12 (z_{\pi_3} + z_{\pi_4})}

    with :math:`z_{\pi_1} \ge z_{\pi_2} \ge \dots` the sorted logits. It is positive if
    :math:`z_t > z_y`. With fewer than four classes it is the numerator only, :math:`z_t - z_y`:
    there is no fourth logit, and with three classes the ratio to :math:`z_{\pi_1} - z_{\pi_3}`
    would be constant if t is the least likely class.

    Args:
        labels: see `tscnc_tf.losses`; y of soft labels is the largest entry.
        targets: the classes t, integers `(batch,)`.
        logits: `(batch, classes)`, any float dtype, at least two classes.

    Raises:
        ValueError: logits are not a float tensor of rank 2, or labels don't fit them.

    Example:
        >>> round(float(targeted_dlr([0], [2], [[3.0, 1.0, 2.0, 0.0]])[0]), 4)
        -0.4

    Reference:
        Croce & Hein 2020, arXiv 2003.01690, section 4.
    """
    logits = lifted(logits)
    chosen = tf.gather(logits, tf.convert_to_tensor(targets), batch_dims=1)
    true, _ = split(labels, logits)
    sizes = tf.sort(logits, axis=-1, direction="DESCENDING")
    lowest = tf.reduce_sum(sizes[:, 2:4], axis=-1) / 2
    width = tf.where(tf.shape(logits)[1] >= 4, sizes[:, 0] - lowest, 1.0)
    return (chosen - true) / (width + 1e-12)


def lifted(logits: Any, classes: int = 2) -> tf.Tensor:
    """Return logits in float32 (or float64), after checking dtype, rank and number of classes."""
    logits = tf.convert_to_tensor(logits)
    if not logits.dtype.is_floating or logits.shape.rank != 2:
        raise ValueError(
            "logits must be a float tensor of shape (batch, classes), got "
            f"{logits.dtype.name} of shape {logits.shape}."
        )
    if logits.shape[1] is not None and logits.shape[1] < classes:
        raise ValueError(
            f"logits must have at least {classes} classes here, got {logits.shape[1]}: dlr needs "
            "3, the others 2. A network with one output z for two classes has the logits (0, z)."
        )
    return _checks.widened(logits)


def require_no_probabilities(
    name: str, model: Any, bounds: tuple[float, float] = (0.0, 1.0)
) -> None:
    """Raise a ValueError if a model returns probabilities for inputs drawn within bounds.

    This finds a softmax that is nested, or followed by a layer that changes nothing. A model whose
    inputs are not known is not checked.
    """
    drawn = models.draw_one(model, 4, np.random.default_rng(0))
    if drawn is None:
        return
    low, high = bounds
    returned = _keras.inference(model)(tf.constant(low + (high - low) * drawn, drawn.dtype))
    is_matrix = isinstance(returned, tf.Tensor) and returned.shape.rank == 2
    if is_matrix and bool(_checks.are_probabilities(returned)):
        raise ValueError(_checks.about_probabilities(name))


def _rows(labels: Any, logits: tf.Tensor) -> tf.Tensor:
    classes = logits.shape[1]
    classes = tf.shape(logits)[1] if classes is None else classes
    return tf.cast(one_hot(labels, classes), logits.dtype)


def is_true_class(labels: Any, logits: tf.Tensor) -> tf.Tensor:
    """Return a mask of the shape of `logits` with True at each example's class."""
    rows = _rows(labels, logits)
    positions = tf.range(tf.shape(rows)[1], dtype=tf.int64)
    return positions == tf.argmax(rows, axis=-1)[:, tf.newaxis]


def split(labels: Any, logits: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the true class's logit `(batch,)`, and the logits with the dtype's minimum there."""
    is_true = is_true_class(labels, logits)
    true = tf.reduce_sum(tf.where(is_true, logits, 0.0), axis=-1)
    return true, tf.where(is_true, logits.dtype.min, logits)


def _agree(size: int | None, other: Any) -> bool:
    """Return whether two sizes are equal, or one of them is not known statically."""
    other = _static(other)
    return size is None or other is None or size == other


def _static(size: Any) -> int | None:
    return None if tf.is_tensor(size) else int(size)


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
    (Attacks that start at x, where the KL has no gradient, ascend the cross-entropy instead: FGSM,
    and others with start="none".) `robust` is the second term; the first is the model's clean loss.

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
        zero = tf.zeros((), clean.dtype)
        wrong = tf.where(is_true, zero, tf.nn.softmax(adversarial))
        largest_wrong = tf.reduce_max(wrong, axis=-1)
        boosted = cross_entropy(labels, adversarial) - tf.math.log(1.0001 - largest_wrong + 1e-12)
        uncertainty = 1.0000001 - tf.reduce_sum(
            tf.where(is_true, tf.nn.softmax(clean), zero), axis=-1
        )
        return boosted + self.beta * kl_divergence(clean, adversarial) * uncertainty


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
        require_no_probabilities("teacher", teacher)
    elif not callable(teacher):
        raise TypeError(
            "teacher must be a Keras 3 or tf_keras model or another callable from x to logits, got "
            f"{teacher!r}."
        )
    _keras.inference(teacher)  # builds its view without pruning wrappers outside of any graph
