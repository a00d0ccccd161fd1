"""How a pruner follows its schedule: the count of optimizer steps, and whether masks are due."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tscnc_tf._keras import optimizers
from tscnc_tf._keras.flavours import tensor_variable
from tscnc_tf.functional.scheduling import Schedule
from tscnc_tf.pruning.targets import Target


class StepCount:
    """Base of pruners: counts optimizer steps by `iterations`, also over several optimizers.

    Attributes:
        model: the trained model.
        targets: its pruned weights.
        state: variables, including the counts `step` (of the pruner) and `seen` (the last
            `iterations` of the optimizer, -1 for a new one).
    """

    model: Any
    targets: Sequence[Target]
    state: Any
    _optimizer: Any = None  # a weak reference to the last optimizer
    _is_used = False  # whether an optimizer step was intercepted

    @property
    def steps(self) -> int:
        """The number of counted optimizer steps."""
        return int(self.state.step.numpy())

    def on_train_begin(self, optimizer: Any) -> None:
        """Prepare for training by an optimizer; called before its steps are compiled.

        `reset_step_count` is called, unless the optimizer is the last one, or was restored together
        with this pruner. (It is not called by `compile`, as a model may be compiled with another
        optimizer only to evaluate it.)
        """
        if self._seen() >= 0 and self._optimizer is None and self.is_behind(optimizer):
            self.reset_step_count()
        self._reset_if_new(optimizer)

    def _reset_if_new(self, optimizer: Any) -> None:
        """Call `reset_step_count` if the optimizer is not that of the last call."""
        known = self._optimizer is not None
        if known and optimizer is not None and self._optimizer() is not optimizer:
            self.reset_step_count()
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)

    def own_optimizer(self) -> Any:
        """Return the model's optimizer that trains the targets, or None."""
        return optimizers.trainer_of(self.model, [target.variable for target in self.targets])

    def reset_step_count(self) -> None:
        """Prepare for a new optimizer, whose earlier steps do not count."""
        self.state.seen.assign(-1)

    def skip_steps(self, optimizer: Any) -> None:
        """Ignore the increase of an optimizer's count since the last step.

        At the end of a dataset of unknown length, it may count a compiled step without data.
        """
        if self._seen() >= 0:
            self.state.seen.assign(optimizers.iterations(optimizer))

    def _seen(self) -> int:
        return int(self.state.seen.numpy())

    def is_behind(self, optimizer: Any) -> bool:
        """Return whether an optimizer has taken steps without a call of `step`."""
        return self._seen() != int(optimizers.iterations(optimizer))

    def _require_intercepted(self, optimizer: Any, text: str) -> None:
        """Raise a RuntimeError if an optimizer step on the weights was not intercepted.

        In a graph of which that is known only as it runs, it is an assertion, which XLA and
        distribution strategies leave out. Frozen masks need no interception.
        """
        with tf.init_scope():
            if bool(self.state.frozen.numpy()):
                return
        if not tf.executing_eagerly() and not self._is_used:
            raise RuntimeError(text)
        if not optimizers.trains(optimizer, [target.variable for target in self.targets]):
            return
        seen = tf.maximum(tf.identity(tensor_variable(self.state.seen)), 0)
        is_known = optimizers.iterations(optimizer) <= seen
        if not tf.executing_eagerly():
            if not tf.distribute.has_strategy():
                tf.debugging.Assert(is_known, [text])
        elif not bool(is_known):
            raise RuntimeError(text)

    def _counted(self, optimizer: Any) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Return the step before, the step now, and the optimizer's own count."""
        before = tf.identity(tensor_variable(self.state.step))
        seen = tf.identity(tensor_variable(self.state.seen))
        count = tf.maximum(seen, 0) + 1 if optimizer is None else optimizers.iterations(optimizer)
        # Of a new optimizer only the last step counts. A count that has decreased was reset.
        first = tf.minimum(count, 1)
        taken = tf.where(seen < 0, first, tf.where(count >= seen, count - seen, count))
        return before, before + taken, count


def due_between(
    schedule: Schedule, before: tf.Tensor, now: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return whether masks were due at any step after `before` up to `now`, and the sparsity now.

    Args:
        schedule: a schedule of TensorFlow operations.
        before: int64 scalar, the last step at which masks were checked.
        now: int64 scalar, the current step, usually `before` + 1.
    """
    due, sparsity = schedule(now)
    due = tf.convert_to_tensor(due) & (now > before)

    def look_back(step: tf.Tensor, found: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return step - 1, found | tf.convert_to_tensor(schedule(step)[0])

    _, due = tf.while_loop(lambda step, found: (step > before) & ~found, look_back, (now - 1, due))
    return due, tf.cast(sparsity, tf.float32)
