"""APGD: gradient ascent whose step sizes adapt to its progress."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple, Self, final

import tensorflow as tf

from tscnc_tf import _checks
from tscnc_tf.attacks.pgd import Ascent, GradientAttack, Plan
from tscnc_tf.attacks.search import (
    TARGET_CLASSES,
    Draws,
    Examples,
    Search,
    choose,
    column,
)
from tscnc_tf.functional import balls

# What each loss is called as the objective of an ascent.
_OBJECTIVES = {
    None: None,
    "ce": "cross_entropy",
    "dlr": "dlr",
    "kl": "kl",
    "targeted_dlr": "targeted_dlr",
}
_LOSSES = {objective: loss for loss, objective in _OBJECTIVES.items()}
_MOMENTUM = 0.25
_RHO = 0.75  # the share of successful steps below which the step size is halved


class _State(NamedTuple):
    """Where an attempt is; `best` has the largest loss, `adversarial` fools the model."""

    point: tf.Tensor
    previous: tf.Tensor
    gradient: tf.Tensor
    step_size: tf.Tensor
    last_score: tf.Tensor
    best: tf.Tensor
    best_gradient: tf.Tensor
    score: tf.Tensor
    adversarial: tf.Tensor
    fooled: tf.Tensor
    gains: tf.Tensor
    checked_score: tf.Tensor
    was_halved: tf.Tensor

    @property
    def result(self) -> tf.Tensor:
        return choose(self.fooled, self.adversarial, self.best)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class APGD(Search, GradientAttack):
    r"""Auto-PGD: projected gradient ascent with momentum and a step size that adapts itself.

    .. math:: z_{t+1} = \Pi\left(x'_t + \eta_t\,s(\nabla_x L(x'_t, y))\right), \qquad
        x'_{t+1} = \Pi\left(x'_t + 0.75\,(z_{t+1} - x'_t) + 0.25\,(x'_t - x'_{t-1})\right)

    with s and :math:`\Pi` as in `PGD`, and :math:`\eta_0 = 2 \epsilon`. After 22 % of the steps,
    and then at intervals that shrink by 3 % down to 6 % of them, an example's step size is halved
    if the objective grew in at most 75 % of the interval's steps, or if neither step size nor best
    objective has changed since the last look; it then goes on from the best point so far.

    Args:
        epsilon: the radius, a number or a fraction such as "8/255".
        norm: "linf" or "l2".
        loss: what to ascend. "ce": cross-entropy; "dlr": difference of logits ratio; "kl": away
            from the clean output; "targeted_dlr": towards one other class after the other, the most
            likely ones first. None is open to `with_defaults`, and "ce" alone.
        steps: the number of steps, >= 1.
        restarts: the number of attempts (per target class), >= 1.
        target_classes: the number of classes that "targeted_dlr" tries, at most those that there
            are but for the true one; None for 9. None for the other losses.
        eot: over how many evaluations of the model a gradient is averaged, for a model whose output
            changes from call to call.
        bounds: the smallest and the largest value that an input may take.

    Raises:
        ValueError: an argument is none of those above; or, when called with loss "dlr", the model
            has fewer than 3 classes.

    Example:
        >>> import tensorflow as tf
        >>> network = tf.constant([[1.0, -1.0], [0.0, 2.0]])
        >>> attack = APGD(epsilon="8/255", steps=20)
        >>> attack.name
        'APGD-20 linf 8/255'
        >>> x = tf.constant([[0.5, 0.5]])
        >>> adversarial = attack(lambda x: x @ network, x, [0], seed=1)
        >>> [round(float(entry), 4) for entry in (adversarial - x)[0]]
        [-0.0314, 0.0314]

    Reference:
        Croce & Hein 2020, arXiv 2003.01690, section 3 and algorithm 1.
    """

    targeted: bool = dataclasses.field(init=False, repr=False, default=False)
    objective: str | None = dataclasses.field(init=False, repr=False, default=None)
    loss: str | None = None
    steps: int = 100
    target_classes: int | None = None
    eot: int = 1

    def __post_init__(self) -> None:
        _checks.one_of("loss", self.loss, _OBJECTIVES)
        self._set("objective", _OBJECTIVES[self.loss])
        super().__post_init__()
        for field in ("steps", "eot"):
            self._set(field, _checks.integer(field, getattr(self, field), minimum=1))
        if self.target_classes is not None:
            if self.loss != "targeted_dlr":
                raise ValueError(
                    f"target_classes must be None for loss={self.loss!r}, which has no targets, "
                    f"got {self.target_classes!r}. Use loss='targeted_dlr' with it."
                )
            count = _checks.integer("target_classes", self.target_classes, minimum=1)
            self._set("target_classes", count)

    def with_defaults(self, *, objective: str | None = None, start: str | None = None) -> Self:  # noqa: ARG002
        """Return this attack with its loss filled in, if it leaves that open."""
        if self.loss is not None or objective not in _LOSSES:
            return self
        return dataclasses.replace(self, loss=_LOSSES[objective])

    def describe(self) -> dict[str, Any]:
        """Return what a report says of the attack, with nothing left open."""
        return super().describe() | {"target_classes": self._targets, "eot": self.eot}

    @property
    def _objectives(self) -> tuple[str | None, ...]:
        return tuple(_LOSSES)

    @property
    def _plan(self) -> Plan:
        return Plan("uniform", self.steps, 2 * self.epsilon_value, self.restarts)

    @property
    def _kind(self) -> str:
        return f"APGD-{self.steps}" + (f"x{self.restarts}" if self.restarts > 1 else "")

    @property
    def _targets(self) -> int | None:
        """The number of classes to try, at most, if the loss has targets."""
        if self.loss != "targeted_dlr":
            return None
        return TARGET_CLASSES if self.target_classes is None else self.target_classes

    @property
    def _iterations(self) -> int:
        return self.steps

    def _attempts(self, classes: int | None) -> int:
        if classes is not None and classes < 3 and self._objective == "dlr":
            raise ValueError(
                f"loss={self.loss!r} needs 3 classes, got a model of {classes}. Use loss='ce' or "
                "'targeted_dlr'."
            )
        return super()._attempts(classes)

    @property
    def _compared_by(self) -> str:
        return self._objective

    @property
    def _needs_clean_logits(self) -> bool:
        return self._objective == "kl" or super()._needs_clean_logits

    def _begin(self, ascent: Ascent, examples: Examples, attempt: Any, draws: Draws) -> _State:  # noqa: ARG002
        anchor = examples.x
        offset = draws.on_sphere(anchor, self.norm, salt=0)
        point = self._feasible(anchor, anchor + self.epsilon_value * offset)
        score, fooled, gradient = self._measured(ascent, point)
        return _State(
            point=point,
            previous=point,
            gradient=gradient,
            step_size=tf.fill(tf.shape(score), tf.cast(2 * self.epsilon_value, anchor.dtype)),
            last_score=score,
            best=point,
            best_gradient=gradient,
            score=score,
            adversarial=point,
            fooled=fooled,
            gains=tf.zeros_like(score, tf.int32),
            checked_score=score,
            was_halved=tf.ones_like(fooled),
        )

    def _advance(
        self,
        ascent: Ascent,
        examples: Examples,
        state: _State,
        index: Any,
        draws: Draws,  # noqa: ARG002
    ) -> _State:
        anchor, point = examples.x, state.point
        rank = anchor.shape.rank
        direction = balls.steepest_ascent(state.gradient, self.norm)
        stepped = self._feasible(anchor, point + column(state.step_size, rank) * direction)
        momentum = tf.where(index > 0, tf.cast(_MOMENTUM, anchor.dtype), 0.0)
        moved = (1 - momentum) * (stepped - point) + momentum * (point - state.previous)
        moved = self._feasible(anchor, point + moved)

        score, fools, gradient = self._measured(ascent, moved)
        gains = state.gains + tf.cast(score > state.last_score, tf.int32)
        improves = score > state.score
        best = choose(improves, moved, state.best)
        best_gradient = choose(improves, gradient, state.best_gradient)
        best_score = tf.where(improves, score, state.score)

        interval = self._interval_at(index)
        is_check = interval > 0
        is_slow = tf.cast(gains, tf.float32) <= _RHO * tf.cast(interval, tf.float32)
        is_stuck = ~state.was_halved & (state.checked_score >= best_score)
        halves = is_check & (is_slow | is_stuck)
        return _State(
            point=choose(halves, best, moved),
            previous=point,
            gradient=choose(halves, best_gradient, gradient),
            step_size=tf.where(halves, state.step_size / 2, state.step_size),
            last_score=score,
            best=best,
            best_gradient=best_gradient,
            score=best_score,
            adversarial=choose(fools, moved, state.adversarial),
            fooled=state.fooled | fools,
            gains=tf.where(is_check, 0, gains),
            checked_score=tf.where(is_check, best_score, state.checked_score),
            was_halved=tf.where(is_check, halves, state.was_halved),
        )

    def _measured(self, ascent: Ascent, point: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Return the score at a point, whether that fools the model, and the gradient."""

        def measure() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            logits, gradient = ascent.logits_and_gradient(point)
            return ascent.score(logits), ascent.is_fooled(logits), gradient

        score, fooled, gradient = measure()
        if self.eot == 1:
            return score, fooled, gradient

        def add(count: Any, *sums: tf.Tensor) -> tuple[Any, ...]:
            score, fooled, gradient = measure()
            return count + 1, sums[0] + score, fooled, sums[2] + gradient

        _, score, fooled, gradient = tf.while_loop(
            lambda count, *_: count < self.eot,
            add,
            (1, score, fooled, gradient),
            parallel_iterations=1,
        )
        return score / self.eot, fooled, gradient / self.eot

    def _interval_at(self, index: Any) -> tf.Tensor:
        """Return the length of the interval that an iteration ends, or 0."""
        lengths = intervals(self.steps)
        ends = list(itertools.accumulate(lengths))
        return tf.reduce_sum(tf.where(tf.equal(ends, index + 1), lengths, 0))


def intervals(steps: int) -> list[int]:
    """Return the intervals after which step sizes are looked at, in so many steps."""
    length, shortest, decrease = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    found: list[int] = []
    while sum(found) + length <= steps:
        found.append(length)
        length = max(length - decrease, shortest)
    return found
