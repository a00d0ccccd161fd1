"""How a pruner counts the steps of the optimizers that train its model."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tscnc_tf._keras import optimizers
from tscnc_tf._keras.flavours import tensor_variable
from tscnc_tf.pruning.targets import Target


class StepCount:
    """Base of pruners: counts optimizer steps, by the `iterations` of one optimizer after another.

    Attributes:
        model: that is trained.
        targets: its weights that are pruned.
        state: variables, the counts among them: `step` of the pruner, `seen` of the optimizer.
    """

    model: Any
    targets: Sequence[Target]
    state: Any
    _optimizer: Any = None  # the last one, a weak reference
    _is_used = False  # by an optimizer whose step was intercepted

    @property
    def steps(self) -> int:
        """The number of optimizer steps that the pruner has seen."""
        return int(self.state.step.numpy())

    def on_train_begin(self, optimizer: Any) -> None:
        """Prepare for training by an optimizer; called before its steps are compiled.

        The step count is reset, unless the optimizer is the last one, or was restored together with
        this pruner. (To compile a model with an optimizer is not to train with it: a model may be
        evaluated by another trainer in between.)
        """
        if self._seen() >= 0 and self._optimizer is None and self.is_behind(optimizer):
            self.reset_step_count()
        self._reset_if_new(optimizer)

    def _reset_if_new(self, optimizer: Any) -> None:
        """Reset the step count if the optimizer is another one than in the last call."""
        known = self._optimizer is not None
        if known and optimizer is not None and self._optimizer() is not optimizer:
            self.reset_step_count()
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)

    def own_optimizer(self) -> Any:
        """Return the model's optimizer that trains the targets, None if there is none."""
        return optimizers.trainer_of(self.model, [target.variable for target in self.targets])

    def reset_step_count(self) -> None:
        """Count the steps of the next optimizer from its current count: it is new here."""
        self.state.seen.assign(-1)

    def skip_steps(self, optimizer: Any) -> None:
        """Ignore what an optimizer has counted since the last step.

        At the end of a dataset of unknown length a compiled step that gets no data may count.
        """
        if self._seen() >= 0:
            self.state.seen.assign(optimizers.iterations(optimizer))

    def _seen(self) -> int:
        return int(self.state.seen.numpy())

    def is_behind(self, optimizer: Any) -> bool:
        """Tell whether an optimizer has taken steps that `step` has not been called for."""
        return self._seen() != int(optimizers.iterations(optimizer))

    def _is_bypassed(self, optimizer: Any) -> bool:
        """Tell whether an optimizer has taken a step on the weights that was not intercepted.

        With masks that are frozen that does not matter.
        """
        with tf.init_scope():
            if bool(self.state.frozen.numpy()):
                return False
        if not tf.executing_eagerly():
            return not self._is_used
        if not optimizers.trains(optimizer, [target.variable for target in self.targets]):
            return False
        return int(optimizers.iterations(optimizer)) > max(self._seen(), 0)

    def _counted(self, optimizer: Any) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Return the step before, the step now, and the optimizer's own count."""
        before = tf.identity(tensor_variable(self.state.step))
        seen = tf.identity(tensor_variable(self.state.seen))
        count = tf.maximum(seen, 0) + 1 if optimizer is None else optimizers.iterations(optimizer)
        # The first time, only the step just taken is ours. A count that has fallen is that of
        # another optimizer, which began anew.
        first = tf.minimum(count, 1)
        taken = tf.where(seen < 0, first, tf.where(count >= seen, count - seen, count))
        return before, before + taken, count
