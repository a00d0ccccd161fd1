"""The one loop of all attacks that follow a gradient, and the places where they differ."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import tensorflow as tf

from tscnc_tf import _checks, _keras
from tscnc_tf.attacks._ascent import OBJECTIVES, Ascent
from tscnc_tf.attacks._base import Attack
from tscnc_tf.attacks._compiled import compiled
from tscnc_tf.functional import balls

STARTS = ("none", "uniform", "gaussian")

# Up to here the loop's steps are unrolled in the graph of a training step; see `_climb`.
_UNROLLED_STEPS = 10


class Plan(NamedTuple):
    """The numbers that an attack's loop runs by, with nothing left open."""

    start: str
    steps: int
    step_size: float
    restarts: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientAttack(Attack):
    """Base of attacks that follow a gradient: steepest steps, each projected back into the ball.

    Subclasses implement `_plan`, and may override `_climb`.

    Args:
        targeted: whether y are classes to reach; the objective is then descended.
        objective: what to ascend; None is open to `with_defaults`, and "cross_entropy" alone.
    """

    targeted: bool = False
    objective: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.boolean("targeted", self.targeted)
        _checks.one_of("objective", self.objective, (None, *OBJECTIVES))
        if self.objective == "kl" and self.targeted:
            raise ValueError(
                "objective='kl' can't be targeted: it leads away from the clean output, to no "
                "class in particular. Use objective='cross_entropy' or 'margin'."
            )

    @property
    @abc.abstractmethod
    def _plan(self) -> Plan:
        """The numbers that the loop runs by."""

    def perturb(
        self,
        logits_fn: Callable[[tf.Tensor], tf.Tensor],
        x: tf.Tensor,
        y: Any,
        seed: tf.Tensor,
        clean_logits: Any = None,
        unroll: int = _UNROLLED_STEPS,
    ) -> tf.Tensor:
        """Return adversarial examples: the pure graph of the attack, for a training step.

        Values are not checked. It compiles with `jit_compile=True`.

        Args:
            logits_fn: from x to logits, in inference mode.
            x: `(batch, ...)`, of a known rank and a float dtype.
            y: labels of any form; may be None for objective "kl".
            seed: two integers, int32.
            clean_logits: the logits at x in inference mode, if they are known already, or those
                of another network in their place; only objective "kl" looks at them.
            unroll: the largest number of steps that is unrolled rather than looped.

        Returns:
            A tensor of the shape and dtype of `x`, a constant to gradients.

        Raises:
            ValueError: y is missing, or the model has no gradient in x.
        """
        self._check_size(x.shape)
        self._check_labels(y)
        # Half precision can't hold steps of 1/255 near 1; the network still gets what it expects.
        anchor = x if x.dtype == tf.float64 else tf.cast(x, tf.float32)
        ascent = Ascent(
            logits_fn,
            x,
            labels=y,
            objective=self._objective,
            targeted=self.targeted,
            clean_logits=clean_logits,
        )

        def attempt(index: Any) -> tf.Tensor:
            start = self._start(anchor, tf.random.fold_in(seed, index, alg="philox"))
            return self._climb(ascent, anchor, start, unroll)

        adversarial = self._best_of(attempt, ascent)
        settled = balls.settle(x, adversarial, self.epsilon_value, self.norm)
        low, high = self.bounds
        return tf.stop_gradient(tf.clip_by_value(settled, low, high))

    def with_defaults(self, *, objective: str | None = None, start: str | None = None) -> Self:
        """Return this attack with the fields that are None filled in.

        A default that this attack can't use is passed over: "kl" has no gradient at x, so it fits
        neither an attack that starts there nor a targeted one.
        """
        _checks.one_of("objective", objective, (None, *OBJECTIVES))
        _checks.one_of("start", start, (None, *STARTS))
        chosen = self._with_start(start)
        if self.objective is not None or objective is None:
            return chosen
        if objective == "kl" and (self.targeted or chosen._plan.start == "none"):
            return chosen
        return dataclasses.replace(chosen, objective=objective)

    def _with_start(self, start: str | None) -> Self:  # noqa: ARG002
        """Return this attack with its start filled in, if it leaves that open."""
        return self

    def describe(self) -> dict[str, Any]:
        """Return what a report says of the attack, with nothing left open."""
        plan = self._plan
        return super().describe() | {
            "step_size": _checks.as_written(plan.step_size),
            "step_size_value": plan.step_size,
            "steps": plan.steps,
            "restarts": plan.restarts,
            "objective": self._objective,
            "targeted": self.targeted,
            "start": plan.start,
        }

    @property
    def name(self) -> str:
        """A short name for tables, such as "PGD-10 linf 8/255" or "PGD-50x5 l2 0.5 margin"."""
        extra = [] if self._objective == "cross_entropy" else [self._objective]
        return " ".join([self._kind, self._ball, *extra, *(["targeted"] if self.targeted else [])])

    @property
    def _kind(self) -> str:
        return type(self).__name__

    @property
    def _objective(self) -> str:
        return self.objective or "cross_entropy"

    def _generate(self, model: Any, x: tf.Tensor, y: Any, seed: tf.Tensor) -> tf.Tensor:
        if not tf.executing_eagerly():
            return self.perturb(_keras.inference(model), x, y, seed)
        self._check_labels(y)
        return compiled(self, self._looped, model, x, y)(x, y, seed)

    def _looped(self, logits_fn: Any, x: tf.Tensor, y: Any, seed: tf.Tensor) -> tf.Tensor:
        # A loop's graph is built in a sixth of the time, and may run but once here.
        return self.perturb(logits_fn, x, y, seed, unroll=1)

    def _check_labels(self, y: Any) -> None:
        if y is not None or self._objective == "kl":
            return
        if self.targeted:
            raise ValueError("y is missing: a targeted attack needs the classes to reach.")
        raise ValueError(
            f"y is missing: objective={self._objective!r} needs the labels. Without labels, use "
            "objective='kl', which leads away from the clean output, or pass the predicted classes."
        )

    def _start(self, anchor: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Return where an attempt starts, inside the ball and the bounds."""
        kind = self._plan.start
        if kind == "uniform":
            offset = balls.random_start(
                tf.shape(anchor), self.epsilon_value, self.norm, seed, anchor.dtype
            )
        elif kind == "gaussian":
            # 0.001 for inputs in [0, 1], and the same share of any other width.
            noise = balls.normal(tf.shape(anchor), seed, anchor.dtype)
            offset = (0.001 * self._width) * noise
        else:
            offset = tf.zeros_like(anchor)
        return self._feasible(anchor, anchor + tf.ensure_shape(offset, anchor.shape))

    def _climb(self, ascent: Ascent, anchor: tf.Tensor, start: tf.Tensor, unroll: int) -> tf.Tensor:
        """Return where the attempt that starts at `start` ends.

        Measured on the CPU with small convolutional networks and ten steps, a loop takes as long
        as unrolled steps or a few per cent longer in a plain graph, but two to three times as long
        under XLA. Unrolled, though, the graph grows with the steps, and so does the time to trace
        and compile it; hence the limit, at the ten steps of adversarial training.
        """
        plan = self._plan

        def step(point: tf.Tensor) -> tf.Tensor:
            direction = balls.steepest_ascent(ascent.gradient(point), self.norm)
            return self._feasible(anchor, point + plan.step_size * direction)

        if plan.steps <= unroll:
            for _ in range(plan.steps):
                start = step(start)
            return start
        return tf.while_loop(
            lambda count, point: count < plan.steps,  # noqa: ARG005
            lambda count, point: (count + 1, step(point)),
            (0, start),
            maximum_iterations=plan.steps,
            parallel_iterations=1,
        )[1]

    def _feasible(self, anchor: tf.Tensor, point: tf.Tensor) -> tf.Tensor:
        """Return the point moved into the bounds, then into the ball.

        The second goes straight towards the anchor, which lies inside the bounds itself, so the
        result is inside of both (but for the last bit, which `perturb` sees to).
        """
        inside = tf.clip_by_value(point, *self.bounds)
        return anchor + balls.project(inside - anchor, self.epsilon_value, self.norm)

    def _best_of(self, attempt: Callable[[Any], tf.Tensor], ascent: Ascent) -> tf.Tensor:
        """Return, per example, the best of all attempts: one that fools, then the largest score."""
        restarts = self._plan.restarts
        first = attempt(0)
        if restarts == 1:
            return first

        def judged(point: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            logits = ascent.logits(point)
            return point, ascent.is_fooled(logits), ascent.score(logits)

        def better(
            index: Any, point: tf.Tensor, fooled: tf.Tensor, score: tf.Tensor
        ) -> tuple[Any, tf.Tensor, tf.Tensor, tf.Tensor]:
            new_point, new_fooled, new_score = judged(attempt(index))
            gains = (new_fooled & ~fooled) | ((new_fooled == fooled) & (new_score > score))
            column = gains[(slice(None), *[tf.newaxis] * (point.shape.rank - 1))]
            return (
                index + 1,
                tf.ensure_shape(tf.where(column, new_point, point), point.shape),
                tf.where(gains, new_fooled, fooled),
                tf.where(gains, new_score, score),
            )

        return tf.while_loop(
            lambda index, *_: index < restarts,
            better,
            (1, *judged(first)),
            maximum_iterations=restarts - 1,
            parallel_iterations=1,
        )[1]
