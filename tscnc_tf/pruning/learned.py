"""Layer densities that are trained together with the scores (HARP): `scope="learned"`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from tscnc_tf import _checks, _configs, _keras, _reports
from tscnc_tf._keras import optimizers
from tscnc_tf._keras.flavours import sum_over_replicas, tensor_variable, update_everywhere
from tscnc_tf.pruning.scopes import SCOPES, ByCurve, fitting, in_proportion
from tscnc_tf.pruning.targets import Target

__all__ = ["Learned"]

_MOMENTUM = 0.9


@_keras.register
@dataclasses.dataclass(frozen=True)
class Learned(_configs.Configurable):
    r"""The scope that trains the share of kept weights of each layer, together with the scores.

    It is for `method="scores"`; `scope="learned"` means `scope=Learned()`. Let k be the share of
    weights that all layers keep together. Each weight tensor l of :math:`n_l` weights has a number
    :math:`s_l` and the share

    .. math:: r_l = k_{\min} + (1 - k_{\min})\,\sigma(s_l), \qquad k_{\min} = \text{minimum}\cdot k

    At each optimizer step t, :math:`s_l` takes a step of SGD with momentum 0.9 on the loss plus

    .. math:: \gamma_t \max\Bigl(\frac{\sum_l n_l r_l}{k \sum_l n_l} - 1,\; 0\Bigr),
        \qquad \gamma_t = \text{growth}\cdot t

    The gradient of the loss is straight-through: the gradient of :math:`r_l` is the sum of those of
    the entries of its mask, :math:`\sum_i \partial L/\partial(w\odot m)_i\, w_i`. The training logs
    do not include this penalty.

    **Counts are exact in every step**, not only in the last one: layer l keeps :math:`\lambda n_l
    r_l` weights, rounded. The factor :math:`\lambda` is the same for all layers, and such that the
    total is the number of weights that the sparsity leaves. No layer keeps more weights than it
    has, or fewer than its minima (`min_weights`, and `Unstructured(min_per_filter,
    min_per_input)`). With structures of several weights, each layer's count is then rounded to
    whole units.

    `ScorePruner.shares` has the shares, and `pruning.report` the resulting sparsity of each layer.
    When weights are set from outside, the shares are reset: to those of the zeros of these weights
    if these are as many as the sparsity asks for, else to those of `start`.

    Args:
        start: the scope that gives the first shares, by the first scores: "layer", "global", "erk",
            "igq", "lamp", or a dict of sparsities by name pattern.
        minimum: the smallest share of a layer, relative to that of all, in [0, 1).
        growth: the increase of the penalty factor per optimizer step, >= 0.
        learning_rate: for the numbers :math:`s_l`, > 0; independent of that of the optimizer.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> import keras
        >>> import tscnc_tf as tscnc
        >>> model = keras.Sequential(
        ...     [keras.Input((64,)), keras.layers.Dense(32), keras.layers.Dense(10)])
        >>> model = tscnc.prune(
        ...     model, method="scores", sparsity=0.75, scope=tscnc.pruning.Learned(start="erk"))
        >>> [round(share, 2) for share in model.pruner.shares.values()]
        [0.2, 0.56]

    Reference:
        Zhao & Wressnegger 2023, "Holistic adversarially robust pruning" (HARP), arXiv 2412.14714.
        There the counts are the shares themselves, and are made exact at the end.
    """

    start: str | Mapping[str, float] = "layer"
    minimum: float = 0.1
    growth: float = 0.01
    learning_rate: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.start, Mapping):
            _checks.one_of("start", self.start, SCOPES)
        _checks.number("minimum", self.minimum, minimum=0.0, below=1.0)
        _checks.number("growth", self.growth, minimum=0.0)
        _checks.number("learning_rate", self.learning_rate, above=0.0)


def normalized(scope: Any) -> Any:
    """Return `Learned()` for "learned", and any other scope unchanged."""
    return Learned() if isinstance(scope, str) and scope == "learned" else scope


def require_fixed(scope: Any) -> None:
    """Raise a ValueError if the shares of a scope are trained."""
    if isinstance(normalized(scope), Learned):
        raise ValueError(
            f"scope={scope!r} is for method='scores', which trains the shares together with the "
            "scores. Use another scope here, such as scope='global' or scope='erk'."
        )


def initial(scope: Any) -> Any:
    """Return the scope that chooses the first weights: `start` of `Learned`, else `scope`."""
    return scope.start if isinstance(scope, Learned) else scope


def restricted(scope: Any, targets: Sequence[Target]) -> Any:
    """Return a scope for some of the weights: without the name patterns that match none of them."""
    if isinstance(scope, Learned):
        return dataclasses.replace(scope, start=restricted(scope.start, targets))
    return scope if isinstance(scope, str) else fitting(scope, targets)


class TrainedShares:
    """The trained shares of a pruner's weight tensors.

    Args:
        scope: the options.
        targets: the pruned weights; vectors have one entry for each.
        sparsity: of all targets together.
        min_weights: the minimum number of kept weights of every weight tensor.
        state: holds the variables, see `masks.PruningState`.
    """

    def __init__(
        self,
        scope: Learned,
        targets: Sequence[Target],
        sparsity: float,
        min_weights: int,
        state: Any,
    ) -> None:
        self._scope = scope
        self._targets = targets
        self._min_weights = min_weights
        self._density = 1.0 - sparsity
        self._minimum = scope.minimum * self._density
        self._step = state.step
        self._variables = (state.share_logits, state.share_velocities)

    def reset(self, indices: list[int], masks: Sequence[tf.Tensor]) -> None:
        """Set the shares of some of the tensors to those of masks, and the velocities to zero.

        Shares at an end of their range are moved a little inward: at the end, the gradient of the
        sigmoid is zero.
        """
        shares = [tf.constant(self._density) for _ in self._targets]
        for index, mask in zip(indices, masks, strict=True):
            shares[index] = tf.reduce_mean(tf.cast(mask, tf.float32))
        sigmoids = (tf.stack(shares) - self._minimum) / (1.0 - self._minimum)
        sigmoids = tf.clip_by_value(sigmoids, 0.01 * self._density, 0.999)
        logits, velocities = self._variables
        logits.assign(tf.math.log(sigmoids) - tf.math.log1p(-sigmoids))
        velocities.assign(tf.zeros_like(sigmoids))

    def named(self, indices: list[int]) -> dict[str, float]:
        """Return the shares of some of the tensors, by name."""
        found = self._shares(self._variables[0]).numpy()
        names = _reports.unique(self._targets[index].name for index in indices)
        return {name: float(found[index]) for name, index in zip(names, indices, strict=True)}

    def scope(self, indices: list[int]) -> ByCurve:
        """Return the scope that distributes the kept weights of some of the tensors by shares."""
        logits = tf.convert_to_tensor(tensor_variable(self._variables[0]))
        sizes = tf.constant([self._targets[index].size for index in indices], tf.float64)
        shares = tf.cast(tf.gather(self._shares(logits), indices), tf.float64)
        return ByCurve(self._min_weights, in_proportion(shares * sizes))

    def gradients(self, optimizer: Any, products: Mapping[Any, tf.Tensor]) -> tf.Tensor:
        """Return the gradient of the loss with respect to the shares.

        Args:
            optimizer: the optimizer of the step.
            products: see `scores.products`.
        """
        found = [products.get(optimizers.key(each.variable), 0.0) for each in self._targets]
        sums = tf.stack([tf.cast(tf.reduce_sum(each), tf.float32) for each in found])
        (total,) = sum_over_replicas([sums])
        return total / tf.cast(optimizers.loss_scale(optimizer), tf.float32)

    def update(self, model: Any, indices: list[int], gradients: tf.Tensor) -> None:
        """Take a step of SGD; none if a gradient is not finite.

        Args:
            model: the model of the pruner.
            indices: of the tensors that are trained.
            gradients: the gradient of the loss with respect to the shares.
        """
        sizes = [each.size if i in indices else 0 for i, each in enumerate(self._targets)]
        parts = tf.constant(sizes, tf.float32) / (self._density * float(sum(sizes)))

        def update(strategy: Any) -> None:
            logits, velocities = (tf.identity(tensor_variable(v)) for v in self._variables)
            shares = self._shares(logits)
            steps = tf.cast(tf.identity(tensor_variable(self._step)) + 1, tf.float32)
            is_over = tf.reduce_sum(parts * shares) > 1.0
            penalty = tf.where(is_over, self._scope.growth * steps, 0.0) * parts
            sigmoids = tf.sigmoid(logits)
            gradient = (gradients + penalty) * (1.0 - self._minimum) * sigmoids * (1.0 - sigmoids)
            velocity = _MOMENTUM * velocities - self._scope.learning_rate * gradient
            is_finite = tf.reduce_all(tf.math.is_finite(gradient))
            before, after = (logits, velocities), (logits + velocity, velocity)
            for variable, old, new in zip(self._variables, before, after, strict=True):
                value = tf.where(is_finite, new, old)
                strategy.extended.update(
                    tensor_variable(variable), optimizers.assign, args=(value,)
                )

        update_everywhere(model, update)

    def _shares(self, logits: Any) -> tf.Tensor:
        return self._minimum + (1.0 - self._minimum) * tf.sigmoid(logits)
