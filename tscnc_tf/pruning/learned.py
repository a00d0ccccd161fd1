"""Kept shares of the layers that are trained together with scores (HARP): `scope="learned"`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from tscnc_tf import _checks, _configs, _keras, _reports
from tscnc_tf._keras import optimizers
from tscnc_tf._keras.flavours import sum_over_replicas, tensor_variable, update_everywhere
from tscnc_tf.pruning.scopes import SCOPES, SharedOut, fitting, in_proportion
from tscnc_tf.pruning.targets import Target

__all__ = ["Learned"]

_MOMENTUM = 0.9


@_keras.register
@dataclasses.dataclass(frozen=True)
class Learned(_configs.Configurable):
    r"""The scope whose shares are trained: how much each layer keeps, together with the scores.

    For `method="scores"`; `scope="learned"` stands for `scope=Learned()`. With k the share of the
    weights that all layers keep together, each weight tensor l of :math:`n_l` weights has a number
    :math:`s_l` and the share

    .. math:: r_l = k_{\min} + (1 - k_{\min})\,\sigma(s_l), \qquad k_{\min} = \text{minimum}\cdot k

    At each optimizer step t of the stage :math:`s_l` takes a step of SGD with momentum 0.9 on the
    loss plus

    .. math:: \gamma_t \max\Bigl(\frac{\sum_l n_l r_l}{k \sum_l n_l} - 1,\; 0\Bigr),
        \qquad \gamma_t = \text{growth}\cdot t

    where the gradient of the loss passes the choice of the masks as if it were the identity: that
    of :math:`r_l` is the sum of those of the entries of its mask, :math:`\sum_i \partial
    L/\partial(w\odot m)_i\, w_i`. (The logs of training do not hold this penalty.)

    **Counts are exact in every step**, not in the last one only: layer l keeps :math:`\lambda n_l
    r_l` weights, rounded, with the one :math:`\lambda` for all with which they are as many as the
    sparsity leaves. None keeps more than it has, nor fewer than its minima (`min_weights`, and
    `Unstructured(min_per_filter, min_per_input)`). With structures of several weights each layer's
    count is rounded to whole units after that.

    The shares are in `ScorePruner.shares`, and what they come to, layer by layer, in
    `pruning.report`. Where weights are set from outside, shares begin anew: from `start`, or, if
    the weights have as many zeros as the sparsity asks for, from where these are.

    Args:
        start: the scope whose shares are the first ones, by the first scores: "layer", "global",
            "erk", "igq", "lamp", or a dict of sparsities by name pattern.
        minimum: the smallest share of a layer, relative to that of all, in [0, 1).
        growth: how much the factor of the penalty grows in each optimizer step, >= 0.
        learning_rate: of the numbers :math:`s_l`, > 0, whatever that of the optimizer is.

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
        There the counts follow the shares as they are, and are made exact at the end.
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


def option(scope: Any) -> Any:
    """Return a scope as it is given, and `Learned()` for "learned"."""
    return Learned() if isinstance(scope, str) and scope == "learned" else scope


def require_fixed(scope: Any) -> None:
    """Raise a ValueError if the shares of a scope are to be trained."""
    if isinstance(option(scope), Learned):
        raise ValueError(
            f"scope={scope!r} is for method='scores', which trains the shares together with the "
            "scores. Take another one here, such as scope='global' or scope='erk'."
        )


def first(scope: Any) -> Any:
    """Return the scope by which the first weights are chosen: the start of one that is learned."""
    return scope.start if isinstance(scope, Learned) else scope


def among(scope: Any, targets: Sequence[Target]) -> Any:
    """Return a scope for some of the weights: without the patterns that fit none of them."""
    if isinstance(scope, Learned):
        return dataclasses.replace(scope, start=among(scope.start, targets))
    return scope if isinstance(scope, str) else fitting(scope, targets)


class TrainedShares:
    """The shares of a pruner's weight tensors as they are trained.

    Args:
        scope: the options.
        targets: the weights that are pruned; vectors have an entry for each of them.
        sparsity: of all together.
        min_weights: what every weight tensor keeps at least.
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
        self._least = scope.minimum * self._density
        self._step = state.step
        self._variables = (state.share_logits, state.share_velocities)

    def begin(self, indices: list[int], masks: Sequence[tf.Tensor]) -> None:
        """Let the shares be what masks of some of the tensors keep, and begin anew.

        Those at an end of their range are moved a little inward: at the end itself they would not
        be trained, as the sigmoid has no slope there.
        """
        shares = [tf.constant(self._density) for _ in self._targets]
        for index, mask in zip(indices, masks, strict=True):
            shares[index] = tf.reduce_mean(tf.cast(mask, tf.float32))
        inner = (tf.stack(shares) - self._least) / (1.0 - self._least)
        inner = tf.clip_by_value(inner, 0.01 * self._density, 0.999)
        logits, velocities = self._variables
        logits.assign(tf.math.log(inner) - tf.math.log1p(-inner))
        velocities.assign(tf.zeros_like(inner))

    def named(self, indices: list[int]) -> dict[str, float]:
        """Return the shares of some of the tensors, by their names."""
        found = self._shares(self._variables[0]).numpy()
        names = _reports.unique(self._targets[index].name for index in indices)
        return {name: float(found[index]) for name, index in zip(names, indices, strict=True)}

    def scope(self, indices: list[int]) -> SharedOut:
        """Return the scope that shares out by them what some of the tensors keep."""
        logits = tf.convert_to_tensor(tensor_variable(self._variables[0]))
        sizes = tf.constant([self._targets[index].size for index in indices], tf.float64)
        shares = tf.cast(tf.gather(self._shares(logits), indices), tf.float64)
        return SharedOut(self._min_weights, in_proportion(shares * sizes))

    def slopes(self, optimizer: Any, products: Mapping[Any, tf.Tensor]) -> tf.Tensor:
        """Return the gradient of the loss with respect to the shares.

        Args:
            optimizer: that was given the gradients.
            products: those of kernels as they act times the dense weights, by the keys of kernels.
        """
        found = [products.get(optimizers.key(each.variable), 0.0) for each in self._targets]
        sums = tf.stack([tf.cast(tf.reduce_sum(each), tf.float32) for each in found])
        (total,) = sum_over_replicas([sums])
        return total / tf.cast(optimizers.loss_scale(optimizer), tf.float32)

    def move(self, model: Any, indices: list[int], slopes: tf.Tensor) -> None:
        """Take a step of SGD; none if a slope is not finite.

        Args:
            model: of the pruner.
            indices: of the tensors that are trained, which share what is kept.
            slopes: the gradient of the loss with respect to the shares.
        """
        sizes = [each.size if i in indices else 0 for i, each in enumerate(self._targets)]
        parts = tf.constant(sizes, tf.float32) / (self._density * float(sum(sizes)))

        def update(strategy: Any) -> None:
            logits, velocities = (tf.identity(tensor_variable(v)) for v in self._variables)
            shares = self._shares(logits)
            steps = tf.cast(tf.identity(tensor_variable(self._step)) + 1, tf.float32)
            is_over = tf.reduce_sum(parts * shares) > 1.0
            penalty = tf.where(is_over, self._scope.growth * steps, 0.0) * parts
            inner = tf.sigmoid(logits)
            gradient = (slopes + penalty) * (1.0 - self._least) * inner * (1.0 - inner)
            moved = _MOMENTUM * velocities - self._scope.learning_rate * gradient
            is_sound = tf.reduce_all(tf.math.is_finite(gradient))
            news = (logits + moved, moved)
            for variable, old, new in zip(self._variables, (logits, velocities), news, strict=True):
                value = tf.where(is_sound, new, old)
                strategy.extended.update(
                    tensor_variable(variable), optimizers.assign, args=(value,)
                )

        update_everywhere(model, update)

    def _shares(self, logits: Any) -> tf.Tensor:
        return self._least + (1.0 - self._least) * tf.sigmoid(logits)
