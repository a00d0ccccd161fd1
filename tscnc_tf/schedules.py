"""Pruning schedules: subclasses of tfmot's `PruningSchedule` that can be saved and loaded.

This module imports tfmot, if it is installed; `import tscnc_tf` loads the module on first access
only. Steps are counted from 1, the first optimizer step.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, Self

import tensorflow as tf

from tscnc_tf import _checks, _keras

__all__ = ["ConditionGated", "CosineSparsity", "OneShot"]

PruningSchedule: Any = _keras.pruning_schedule_class()  # tfmot has no types


class _Schedule(PruningSchedule):
    """Base of the schedules of this package.

    tfmot's wrapper saves the dictionary of `get_config` unchanged, and looks up its class name when
    the model is loaded, so that must be the registered name.
    """

    def _arguments(self) -> dict[str, Any]:
        raise TypeError(f"{type(self).__name__} is abstract: use one of its subclasses.")

    def get_config(self) -> dict[str, Any]:
        """Return `{"class_name": ..., "config": ...}`, the form that tfmot's wrapper saves."""
        return {
            "class_name": _keras.registered_name(type(self)),
            "config": self._arguments(),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build a schedule from `get_config()` or from the inner dictionary of arguments."""
        return cls(**config.get("config", config))

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self._arguments().items())
        return f"{type(self).__name__}({arguments})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.get_config() == other.get_config()

    def __hash__(self) -> int:
        return hash(repr(self))


@_keras.register
class CosineSparsity(_Schedule):
    r"""Sparsity that rises along half a period of a cosine, slowly at both ends.

    .. math:: s(t) = s_f + (s_i - s_f)\,\tfrac12\left(1 + \cos\pi\tfrac{t - b}{e - b}\right)

    with exactly :math:`s_i` up to `begin_step` and exactly :math:`s_f` from `end_step` on. The
    masks are renewed every `frequency` steps from `begin_step` on, and always at `end_step`.

    Args:
        initial_sparsity: fraction of zeros at `begin_step`, in [0, 1).
        final_sparsity: fraction of zeros at `end_step`, in [0, 1), not below the initial one.
        begin_step: first optimizer step that prunes, >= 0.
        end_step: last optimizer step that prunes, > `begin_step`.
        frequency: number of steps between two renewals of the masks, >= 1.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> import tscnc_tf as tscnc
        >>> schedule = tscnc.schedules.CosineSparsity(0.0, 0.95, begin_step=200, end_step=2000)
        >>> should_prune, sparsity = schedule(2000)

    Reference:
        The shape of the schedule is that of gradual pruning (Zhu & Gupta 2017, arXiv 1710.01878)
        with a cosine in the place of the cubic polynomial.
    """

    def __init__(
        self,
        initial_sparsity: float,
        final_sparsity: float,
        begin_step: int,
        end_step: int,
        frequency: int = 100,
    ) -> None:
        self.initial_sparsity = _checks.sparsity("initial_sparsity", initial_sparsity)
        self.final_sparsity = _checks.sparsity("final_sparsity", final_sparsity)
        if self.final_sparsity < self.initial_sparsity:
            raise ValueError(
                f"final_sparsity must not be below initial_sparsity ({initial_sparsity!r}), "
                f"got {final_sparsity!r}: pruned weights don't come back."
            )
        self.begin_step = _checks.integer("begin_step", begin_step, minimum=0)
        self.end_step = _checks.integer("end_step", end_step, minimum=self.begin_step + 1)
        self.frequency = _checks.integer("frequency", frequency, minimum=1)

    @classmethod
    def from_epochs(
        cls,
        initial_sparsity: float,
        final_sparsity: float,
        begin_epoch: float,
        end_epoch: float,
        *,
        steps_per_epoch: int,
        frequency: int | None = None,
    ) -> Self:
        """Build the schedule from epochs (or fractions of them).

        It begins after `begin_epoch` epochs, and ends with the last step of epoch `end_epoch`. With
        `frequency=None` the masks are renewed about 50 times.
        """
        begin_step, end_step = _steps(steps_per_epoch, begin_epoch=begin_epoch, end_epoch=end_epoch)
        if end_step <= begin_step:
            raise ValueError(
                f"end_epoch must be a step or more after begin_epoch={begin_epoch!r}, got "
                f"{end_epoch!r}: with steps_per_epoch={steps_per_epoch} it would begin at step "
                f"{begin_step} and end at {end_step}."
            )
        if frequency is None:
            frequency = max(1, (end_step - begin_step) // 50)
        return cls(initial_sparsity, final_sparsity, begin_step, end_step, frequency)

    def __call__(self, step: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Return (whether to renew the masks at this step, the sparsity at this step)."""
        step = tf.cast(step, tf.int64)
        since = step - self.begin_step
        span = self.end_step - self.begin_step
        fraction = tf.cast(since, tf.float32) / float(span)
        rest = 0.5 * (1.0 + tf.cos(math.pi * tf.clip_by_value(fraction, 0.0, 1.0)))
        between = self.final_sparsity + (self.initial_sparsity - self.final_sparsity) * rest
        sparsity = tf.where(since >= span, self.final_sparsity, between)
        sparsity = tf.where(since <= 0, self.initial_sparsity, sparsity)
        due = (since >= 0) & (since <= span) & (since % self.frequency == 0)
        return due | tf.equal(since, span), sparsity

    def _arguments(self) -> dict[str, Any]:
        names = ("initial_sparsity", "final_sparsity", "begin_step", "end_step", "frequency")
        return {name: getattr(self, name) for name in names}


@_keras.register
class OneShot(_Schedule):
    """All pruning at one step; the masks stay as they are from then on.

    Args:
        final_sparsity: fraction of zeros, in [0, 1).
        begin_step: the optimizer step that prunes, >= 0; 0 means the first one, which is 1.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> import tscnc_tf as tscnc
        >>> schedule = tscnc.schedules.OneShot(0.9, begin_step=1000)
    """

    def __init__(self, final_sparsity: float, begin_step: int = 0) -> None:
        self.final_sparsity = _checks.sparsity("final_sparsity", final_sparsity)
        self.begin_step = _checks.integer("begin_step", begin_step, minimum=0)

    @classmethod
    def from_epochs(
        cls, final_sparsity: float, begin_epoch: float, *, steps_per_epoch: int
    ) -> Self:
        """Build the schedule that prunes with the last step of epoch `begin_epoch`."""
        (begin_step,) = _steps(steps_per_epoch, begin_epoch=begin_epoch)
        return cls(final_sparsity, begin_step)

    @property
    def end_step(self) -> int:
        """The step at which the final sparsity is reached."""
        return max(self.begin_step, 1)

    def __call__(self, step: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Return (whether this is the step, the sparsity: 0 before it)."""
        step = tf.cast(step, tf.int64)
        return tf.equal(step, self.end_step), tf.where(
            step >= self.end_step, self.final_sparsity, 0.0
        )

    def _arguments(self) -> dict[str, Any]:
        return {"final_sparsity": self.final_sparsity, "begin_step": self.begin_step}


@_keras.register
class ConditionGated(_Schedule, tf.__internal__.tracking.Trackable):
    """A schedule that pauses while the network is ill-conditioned.

    While the measured condition number is above a limit, the masks are not renewed. Once it is
    below the limit, the next renewal applies the current sparsity of the inner schedule. At
    `end_step` the final sparsity is applied regardless of the condition number.

    `callbacks.pruning_callbacks()` measures the largest condition number of the pruned kernels of
    this schedule, when training begins and then every few steps. Before the first measurement the
    schedule is not paused.

    Args:
        schedule: the inner schedule, any `PruningSchedule`.
        max_condition_number: the limit, >= 1.
        end_step: the step by which the final sparsity must be reached; None for the `end_step` of
            the inner schedule.
        measure: "condition_number", which is infinite if a filter is dead (the schedule then pauses
            until `end_step`, since masks that are not renewed can't revive it), or
            "effective_condition_number", which leaves negligible singular values out.

    Raises:
        TypeError, ValueError: an argument is not as described, or there is no end step.

    Example:
        >>> import tscnc_tf as tscnc
        >>> schedule = tscnc.schedules.ConditionGated(
        ...     tscnc.schedules.CosineSparsity(0.0, 0.95, begin_step=200, end_step=2000),
        ...     max_condition_number=100.0)
    """

    def __init__(
        self,
        schedule: Any,
        max_condition_number: float,
        end_step: int | None = None,
        measure: str = "condition_number",
    ) -> None:
        if not isinstance(schedule, PruningSchedule):
            raise TypeError(f"schedule must be a PruningSchedule, got {type(schedule).__name__}.")
        self.schedule = schedule
        self.max_condition_number = _checks.number(
            "max_condition_number", max_condition_number, minimum=1.0
        )
        if end_step is None:
            end_step = getattr(schedule, "end_step", -1)
            if end_step < 0:
                raise ValueError(
                    f"schedule {schedule!r} never ends: give end_step, the step by which its "
                    "final sparsity must be reached."
                )
        self.end_step = _checks.integer("end_step", end_step, minimum=1)
        self.measure = _checks.one_of(
            "measure", measure, ("condition_number", "effective_condition_number")
        )
        # Written by the callback between steps, and read by the compiled step. Not part of the
        # configuration, since it is measured again whenever training begins.
        with tf.init_scope():
            self._open = tf.Variable(True, trainable=False, name="gate_open")
            self._held_sparsity = tf.Variable(0.0, trainable=False, name="held_sparsity")

    @classmethod
    def from_epochs(
        cls,
        schedule: Any,
        max_condition_number: float,
        end_epoch: float,
        *,
        steps_per_epoch: int,
        measure: str = "condition_number",
    ) -> Self:
        """Build the schedule with the last step of epoch `end_epoch` as its end step."""
        (end_step,) = _steps(steps_per_epoch, end_epoch=end_epoch)
        if not end_step:
            raise ValueError(f"end_epoch must be a step or more, got {end_epoch!r} epochs.")
        return cls(schedule, max_condition_number, end_step, measure)

    def update(self, condition_number: float, step: int) -> None:
        """Open or close the gate by the condition number measured after optimizer step `step`.

        Raises:
            TypeError, ValueError: an argument is no number, or `step` no integer >= 0.
        """
        if not isinstance(condition_number, numbers.Real):  # infinity is one
            raise TypeError(f"condition_number must be a number, got {condition_number!r}.")
        step = _checks.integer("step", step, minimum=0)
        is_open = condition_number <= self.max_condition_number
        if self.is_open and not is_open:
            self._held_sparsity.assign(self.schedule(step)[1])
        self._open.assign(is_open)

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict[str, Any]:
        """Add the gate's variables to a SavedModel, whose graphs read them, not to checkpoints.

        They need not be saved; and a schedule shared by several layers is loaded as several
        objects, which the checkpoint of a single one can't restore.
        """
        children = super()._trackable_children(save_type, **kwargs)
        if save_type == "savedmodel":
            children = {**children, "open": self._open, "held_sparsity": self._held_sparsity}
        return children

    @property
    def is_open(self) -> bool:
        """Whether the gate is open: whether the inner schedule is applied."""
        return bool(self._open.numpy())

    def __call__(self, step: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Return (whether to renew the masks at this step, the sparsity at this step)."""
        step = tf.cast(step, tf.int64)
        is_over = step >= self.end_step
        # The final sparsity, also if the inner schedule would reach it later.
        last = tf.constant(getattr(self.schedule, "end_step", -1), tf.int64)
        due, _ = self.schedule(step)
        _, sparsity = self.schedule(tf.where(is_over, tf.maximum(step, last), step))
        free = tf.convert_to_tensor(self._open) | is_over
        sparsity = tf.where(free, sparsity, tf.minimum(self._held_sparsity, sparsity))
        return (due & free) | tf.equal(step, self.end_step), sparsity

    def _arguments(self) -> dict[str, Any]:
        return {
            "schedule": self.schedule.get_config(),
            "max_condition_number": self.max_condition_number,
            "end_step": self.end_step,
            "measure": self.measure,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build a schedule from `get_config()` or from the inner dictionary of arguments."""
        config = dict(config.get("config", config))
        inside = config.pop("schedule")
        return cls(inside if isinstance(inside, PruningSchedule) else deserialize(inside), **config)

    def __repr__(self) -> str:
        return (
            f"ConditionGated({self.schedule!r}, max_condition_number={self.max_condition_number!r},"
            f" end_step={self.end_step!r}, measure={self.measure!r})"
        )


def deserialize(config: dict[str, Any]) -> Any:
    """Build any registered schedule, or one of tfmot's, from the dictionary of its `get_config`.

    Raises:
        ValueError: the class of the schedule is not registered.
    """
    known = _keras.tfmots_schedules()
    name = config["class_name"]
    cls = _keras.tf_keras.utils.get_registered_object(name, custom_objects=known)
    if cls is None:
        raise ValueError(
            f"schedule of class {name!r} is not known here: register the class with "
            "tf_keras.saving.register_keras_serializable, and load where it has been imported."
        )
    return cls.from_config(config["config"])


def _steps(steps_per_epoch: int, **epochs: float) -> list[int]:
    """Return numbers of epochs converted to numbers of steps."""
    steps_per_epoch = _checks.integer("steps_per_epoch", steps_per_epoch, minimum=1)
    return [
        round(_checks.number(name, value, minimum=0.0) * steps_per_epoch)
        for name, value in epochs.items()
    ]
