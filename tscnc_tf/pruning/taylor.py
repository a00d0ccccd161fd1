"""Taylor importance: the gradient of the loss times the weight, measured on data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _keras, attacks, losses
from tscnc_tf._keras import models
from tscnc_tf._keras.flavours import tensor_variable
from tscnc_tf.functional import scheduling

__all__ = ["Taylor"]


class Taylor:
    r"""The importance of weights by the gradient of a loss on given data, for pruning at once.

    To first order, setting a weight w to zero changes the loss by -g w, with g the gradient of the
    loss. The importance is the root mean square of this over batches b,

    .. math:: s = |w| \sqrt{\textstyle\sum_b \frac{n_b}{N}\, g_b^2}, \qquad
        g_b = \frac{1}{n_b} \sum_{i \in b} \frac{\partial \ell(x_i', y_i)}{\partial w}

    with :math:`n_b` of the N examples in batch b. (Squares are averaged because the gradient of a
    trained network over all data is almost zero.) Structures compare the means over their units.
    With an attack, :math:`x_i'` are adversarial examples, so the weights that matter least for
    robustness are pruned. The network runs in inference mode.

    The importance is measured once, in the constructor of the pruner, which then prunes at once:
    `prune_now(model, sparsity, criterion=Taylor(...))`, or with regrowth
    `prune(model, OneShot(sparsity), criterion=..., regrowth=...)`. It is not saved with the pruner.

    Args:
        x: inputs of the model, `(examples, ...)`; a few hundred training examples.
        y: labels, as in `tscnc_tf.losses`.
        attack: a gradient attack of `tscnc_tf.attacks`, such as that of a trainer; None for clean
            inputs.
        loss: a loss of `tscnc_tf.losses`, such as that of a trainer; None for cross-entropy.
        batch_size: the number of examples in a batch.
        seed: the seed of the attack.

    Raises:
        TypeError: `attack` is no gradient attack, or `loss` is none of these; or, with an attack,
            `x` does not contain floats.
        ValueError: there are no examples, `y` has another number of them, or its values are no
            labels; or, with an attack, `x` is not finite or exceeds the attack's bounds. When the
            model is pruned: a label is none of its classes.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> import tscnc_tf as tscnc
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> x, y = np.zeros((8, 4), "float32"), np.arange(8) % 2
        >>> x[:, 1] = y  # the others are never seen
        >>> model = tscnc.prune_now(model, 0.75, criterion=tscnc.pruning.Taylor(x, y))
        >>> np.flatnonzero(np.any(model.layers[-1].kernel, axis=1)).tolist()
        [1]

    Reference:
        Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", arXiv 1906.10771,
        equation 8, without the square, which changes no order.
    """

    def __init__(
        self,
        x: Any,
        y: Any,
        *,
        attack: attacks.GradientAttack | None = None,
        loss: losses.RobustLoss | None = None,
        batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        if not isinstance(attack, attacks.GradientAttack | None):
            raise TypeError(
                "attack must be one of tscnc_tf.attacks that follow the gradient, such as PGD, or "
                f"None, got {attack!r}."
            )
        if not isinstance(loss, losses.RobustLoss | None):
            raise TypeError(
                f"loss must be one of tscnc_tf.losses, such as TRADES(beta=6.0), got {loss!r}."
            )
        self.x, self.y = np.asarray(x), np.asarray(y)
        shapes = self.x.shape, self.y.shape
        if not all(shapes) or not shapes[0][0] or shapes[0][0] != shapes[1][0]:
            raise ValueError(
                "x and y must be arrays of the same number of examples, at least one, got shapes "
                f"{shapes[0]} and {shapes[1]}."
            )
        _checks.labels(self.y, len(self.x))
        if attack is not None:
            _checks.inputs(self.x, attack.bounds)
        self.loss = losses.Madry() if loss is None else loss
        self.attack = attack and attack.with_defaults(
            objective=self.loss.objective, start=self.loss.start
        )
        self.batch_size = _checks.integer("batch_size", batch_size, minimum=1)
        self.seed = _checks.seed("seed", seed)

    def require(self, schedule: Any) -> None:
        """Raise a ValueError unless a schedule prunes at once."""
        if not scheduling.is_at_once(schedule):
            raise ValueError(
                f"criterion={self!r} is measured once, and {schedule!r} prunes later: take "
                "prune_now(model, sparsity, criterion=...), or schedules.OneShot(sparsity)."
            )

    def importance(self, model: Any, variables: Sequence[Any]) -> list[tf.Tensor]:
        """Return the importance of weights of a model, one tensor for each variable.

        Raises:
            ValueError: the model returns no logits, a label is none of its classes, or a gradient
                is not finite.
        """
        classes = models.traced_classes("model", _keras.inference(model), self.x)
        _checks.require_classes(self.y, classes)
        weights = [tensor_variable(variable) for variable in variables]
        signature = [
            tf.TensorSpec((None, *each.shape[1:]), each.dtype) for each in (self.x, self.y)
        ]
        # A concrete function, as many calls of `tf.function` at one place give a warning.
        gradient = tf.function(
            lambda x, y, seed: self._gradients(model, weights, x, y, seed),
            [*signature, tf.TensorSpec((2,), tf.int32)],
            autograph=False,
        ).get_concrete_function()
        squares = [np.zeros(weight.shape) for weight in weights]
        for batch, start in enumerate(range(0, len(self.x), self.batch_size)):
            x, y = (each[start : start + self.batch_size] for each in (self.x, self.y))
            found = gradient(tf.constant(x), tf.constant(y), tf.constant([self.seed, batch]))
            for total, each in zip(squares, found, strict=True):
                total += len(x) / len(self.x) * np.square(np.asarray(each, np.float64))
        if not all(np.isfinite(total).all() for total in squares):
            raise ValueError(
                f"criterion={self!r} has found a gradient of model {model.name!r} that is NaN or "
                "infinite: look for NaN in x and y, and in the weights."
            )
        return [
            tf.abs(tf.cast(weight, tf.float64)) * np.sqrt(total)
            for weight, total in zip(weights, squares, strict=True)
        ]

    def _gradients(self, model: Any, weights: list[Any], x: Any, y: Any, seed: Any) -> list[Any]:
        """Return the gradients of the mean loss of a batch."""
        adversarial, reference = x, self.loss.reference(x)
        if self.attack is not None:
            inference = _keras.inference(model)
            origin = inference(x) if reference is None else reference
            adversarial = self.attack.perturb(inference, x, y, seed=seed, clean_logits=origin)
            adversarial = tf.stop_gradient(adversarial)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            logits = model(adversarial, training=False)
            clean = model(x, training=False) if self.loss.uses_clean else logits
            extra = () if reference is None else (reference,)
            value = self.loss.robust(y, clean, logits, *extra)
            if self.loss.adds_clean_loss:
                value += losses.cross_entropy(y, clean)
            value = tf.reduce_mean(value)
        found = tape.gradient(value, weights, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return [tf.convert_to_tensor(each) for each in found]  # an embedding's is sparse

    def __repr__(self) -> str:
        return (
            f"Taylor(<{len(self.x)} examples>, attack={self.attack!r}, loss={self.loss!r}, "
            f"batch_size={self.batch_size}, seed={self.seed})"
        )
