"""How an optimizer that is made for kernels trains scores instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from tscnc_tf._keras import optimizers
from tscnc_tf._keras.distribution import update_everywhere
from tscnc_tf._keras.flavours import tensor_variable
from tscnc_tf.pruning import importance, updates

if TYPE_CHECKING:
    from tscnc_tf.pruning.scores import ScorePruner


class Detour:
    """What an optimizer's doings go by way of, as `_keras.optimizers.diverted` has it.

    While the optimizer acts, the kernels' variables hold the scores: so all that it keeps for them
    (momenta, averages), and all that it does to them (weight decay), is for the scores.

    Args:
        pruner: the one whose scores are trained.
    """

    def __init__(self, pruner: ScorePruner) -> None:
        self._pruner = pruner

    def take(
        self, optimizer: Any, pairs: list[tuple[Any, Any]], go_on: Callable[[Any], Any]
    ) -> Any:
        """Let an optimizer take its step on scores.

        Args:
            optimizer: of either Keras.
            pairs: of gradients and weights, those of kernels as they act.
            go_on: has the optimizer take its step on pairs.
        """
        pruner = self._pruner
        kernels = {optimizers.key(target.variable) for target in pruner.targets}
        if not any(optimizers.key(variable) in kernels for _, variable in pairs):
            return go_on(pairs)
        pruner.meet(optimizer)
        optimizers.build(optimizer, [variable for _, variable in pairs])
        trained = self._of_scores(pairs)
        update_everywhere(pruner.model, lambda strategy: self._show_scores(strategy, optimizer))
        try:
            result = go_on(trained)
        except Exception:
            if tf.executing_eagerly():
                pruner.apply()  # the kernels hold scores at this moment
            raise
        pruner.take_back(optimizer)
        return result

    def settle(self, go_on: Callable[[], Any]) -> None:
        """Let an optimizer put its averages in place of scores."""
        for target, _, score in self._pruner.triples():
            tensor_variable(target.variable).assign(score)
        go_on()
        for target, _, score in self._pruner.triples():
            score.assign(tensor_variable(target.variable))
        self._pruner.choose()

    def _of_scores(self, pairs: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        """Return the pairs to train: kernels' gradients as those of scores, without the frozen."""
        factors = {optimizers.key(t.variable): (dense, s) for t, dense, s in self._pruner.triples()}
        frozen = importance.frozen_others(self._pruner.model, self._pruner.also_train) - set(
            factors
        )
        result = []
        for gradient, variable in pairs:
            key = optimizers.key(variable)
            if key in frozen:
                continue
            if key in factors and gradient is not None:
                dense, score = factors[key]
                gradient = tf.convert_to_tensor(gradient) * dense * tf.sign(score)
            result.append((gradient, variable))
        return result

    def _show_scores(self, strategy: Any, optimizer: Any) -> None:
        """Put the scores in the kernels' place, for the optimizer."""
        past = optimizers.iterations(optimizer) > 0

        def begin() -> None:
            for target, _, score in self._pruner.triples():
                updates.begin_companions(
                    optimizer, target.variable, score, strategy.extended.update, past
                )

        tf.cond(tf.identity(tensor_variable(self._pruner.state.seen)) < 0, begin, lambda: None)
        for target, _, score in self._pruner.triples():
            strategy.extended.update(
                tensor_variable(target.variable), updates.assign, args=(score,)
            )
