"""APGD: projected gradient ascent with adaptive step sizes."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple, Self, final

import tensorflow as tf

from tscnc_tf import _checks, _keras
from tscnc_tf.attacks.pgd import Ascent, GradientAttack, Plan, effort
from tscnc_tf.attacks.search import (
    TARGET_CLASSES,
    Draws,
    Examples,
    Search,
    choose,
    column,
    like,
)
from tscnc_tf.functional import balls

# The objective of `Ascent` for each loss.
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

# In l1: radii in units of epsilon, each with its share of the steps; the last takes the rest.
_RADII = ((3, 0.3), (2, 0.3), (1, 0.4))
_DENSER = 1.5  # the number of changed entries divided by the number that a step moves
_SPARSER = 0.95  # below this ratio to its last value, the number of changed entries has fallen


class _State(NamedTuple):
    """State of an attempt.

    `best` has the largest loss, `adversarial` fools the model; `memory` belongs to the step rule.
    """

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
    memory: Any

    @property
    def result(self) -> tf.Tensor:
        return choose(self.fooled, self.adversarial, self.best)

    def reset_to_best(self, is_reset: tf.Tensor, step_size: tf.Tensor, memory: Any) -> _State:
        """Return this state with new step sizes, at the best point so far where `is_reset`."""
        return self._replace(
            point=choose(is_reset, self.best, self.point),
            gradient=choose(is_reset, self.best_gradient, self.gradient),
            step_size=step_size,
            memory=memory,
        )


@final
@_keras.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class APGD(Search, GradientAttack):
    r"""Auto-PGD: projected gradient ascent with momentum and an adaptive step size.

    .. math:: z_{t+1} = \Pi\left(x'_t + \eta_t\,s(\nabla_x L(x'_t, y))\right), \qquad
        x'_{t+1} = \Pi\left(x'_t + 0.75\,(z_{t+1} - x'_t) + 0.25\,(x'_t - x'_{t-1})\right)

    with s and :math:`\Pi` as in `PGD`, and :math:`\eta_0 = 2 \epsilon`. After 22 % of the steps,
    and then at intervals that shrink by 3 % down to 6 % of them, an example's step size is halved
    if the objective grew in at most 75 % of the interval's steps, or if neither step size nor best
    objective has changed since the last check; it then continues from the best point so far.

    In l1 a step has the signs of the largest entries of the gradient, without momentum, and
    :math:`\Pi` projects onto the intersection of the ball and the bounds. The radius is 3 epsilon
    for 30 % of the steps, 2 epsilon for the next 30 %, and epsilon for the rest, each starting from
    the projection of the best point so far. The number of entries that a step moves is the number
    of entries in which the best point differs from x, divided by 1.5. At intervals of 4 % of a
    radius' steps, if that number has fallen by more than 5 %, the step size is reset to the radius,
    and the attack continues from the best point; otherwise the step size is divided by 1.5, down to
    a tenth of the radius.

    Args:
        epsilon: the radius, a number or a fraction such as "8/255".
        norm: "linf", "l2" or "l1".
        loss: the objective to ascend. "ce": cross-entropy; "dlr": difference of logits ratio; "kl":
            divergence from the clean output; "targeted_dlr": towards each of several wrong classes
            in turn, the most likely ones first. None for the default of `with_defaults`, or "ce".
        steps: the number of steps, >= 1.
        restarts: the number of attempts (per target class), >= 1.
        target_classes: the number of classes that "targeted_dlr" tries, at most all wrong ones;
            None for 9. It must be None for other losses.
        eot: the number of evaluations of the model at each point, for a model with random outputs.
            Losses and gradients are their means, and a point fools the model if all of them are
            wrong, so that no lucky draw ends the search.
        bounds: the smallest and the largest value that an input may take.

    Raises:
        TypeError, ValueError: an argument is not as described.
        ValueError: when called with loss "dlr", the model has fewer than 3 classes.

    Example:
        >>> import tensorflow as tf
        >>> network = tf.constant([[1.0, -1.0], [0.0, 2.0]])
        >>> attack = APGD(epsilon="8/255", steps=20)
        >>> attack.name
        'APGD-20 linf 8/255'
        >>> x = tf.constant([[0.9, 0.5]])
        >>> adversarial = attack(lambda x: x @ network, x, [0], seed=1)
        >>> [round(float(entry), 4) for entry in (adversarial - x)[0]]
        [-0.0314, 0.0314]

    Reference:
        Croce & Hein 2020, arXiv 2003.01690, section 3 and algorithm 1; in l1: Croce & Hein 2021,
        arXiv 2103.01208, section 3.
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
        """Return this attack with a default for its loss, if that is None."""
        if self.loss is not None or objective not in _LOSSES:
            return self
        return dataclasses.replace(self, loss=_LOSSES[objective])

    def describe(self) -> dict[str, Any]:
        """Return the description for reports, with defaults resolved."""
        return super().describe() | {"target_classes": self._targets, "eot": self.eot}

    @property
    def _objectives(self) -> tuple[str | None, ...]:
        return tuple(_LOSSES)

    @property
    def _plan(self) -> Plan:
        first = self.epsilon_value * (1 if self.norm == "l1" else 2)
        return Plan("uniform", self.steps, first, self.restarts)

    @property
    def _kind(self) -> str:
        return f"APGD-{effort(self.steps, self.restarts)}"

    @property
    def _targets(self) -> int | None:
        """The most classes to try, None if the loss has no targets."""
        if self.loss != "targeted_dlr":
            return None
        return TARGET_CLASSES if self.target_classes is None else self.target_classes

    @property
    def _rule(self) -> _DenseSteps | _SparseSteps:
        return (_SparseSteps if self.norm == "l1" else _DenseSteps)(self)

    @property
    def _iterations(self) -> int:
        return self._rule.iterations

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
        anchor, rule = examples.x, self._rule
        point = rule.start(anchor, draws)
        score, fooled, gradient = self._measured(ascent, point)
        return _State(
            point=point,
            previous=point,
            gradient=gradient,
            step_size=tf.fill(tf.shape(score), tf.constant(rule.first_step_size, anchor.dtype)),
            last_score=score,
            best=point,
            best_gradient=gradient,
            score=score,
            adversarial=point,
            fooled=fooled & rule.is_within(-1),
            memory=rule.memory(anchor, point, score),
        )

    def _advance(
        self,
        ascent: Ascent,
        examples: Examples,
        state: _State,
        index: Any,
        draws: Draws,  # noqa: ARG002
    ) -> _State:
        rule = self._rule
        moved, is_fresh = rule.step(examples.x, state, index)
        score, fools, gradient = self._measured(ascent, moved)
        fools = fools & rule.is_within(index)
        improves = (score > state.score) | is_fresh
        new = _State(
            point=moved,
            previous=state.point,
            gradient=gradient,
            step_size=state.step_size,
            last_score=score,
            best=choose(improves, moved, state.best),
            best_gradient=choose(improves, gradient, state.best_gradient),
            score=tf.where(improves, score, state.score),
            adversarial=choose(fools & ~state.fooled, moved, state.adversarial),
            fooled=state.fooled | fools,
            memory=state.memory,
        )
        return rule.review(examples.x, state, new, index)

    def _measured(self, ascent: Ascent, point: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Return the score at a point, whether the model is fooled there, and the gradient.

        Of `eot` evaluations: the means, and whether the model is fooled in all of them.
        """

        def measure() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            logits, gradient = ascent.logits_and_gradient(point)
            return ascent.score(logits), ascent.is_fooled(logits), gradient

        score, fooled, gradient = measure()
        if self.eot == 1:
            return score, fooled, gradient

        def add(count: Any, *sums: tf.Tensor) -> tuple[Any, ...]:
            score, fooled, gradient = measure()
            return count + 1, sums[0] + score, sums[1] & fooled, sums[2] + gradient

        _, score, fooled, gradient = tf.while_loop(
            lambda count, *_: count < self.eot,
            add,
            (1, score, fooled, gradient),
            parallel_iterations=1,
        )
        return score / self.eot, fooled, gradient / self.eot


class _Progress(NamedTuple):
    """State for halving step sizes in linf and l2.

    Attributes:
        gains: the number of steps of the current interval in which the score grew.
        checked_score: the best score at the last check.
        was_halved: whether the step size was halved at the last check.
    """

    gains: tf.Tensor
    checked_score: tf.Tensor
    was_halved: tf.Tensor


class _DenseSteps:
    """The step rule of linf and l2: all entries move, with momentum."""

    def __init__(self, attack: APGD) -> None:
        self._attack = attack
        self.iterations = attack.steps
        self.first_step_size = attack._plan.step_size

    def start(self, anchor: tf.Tensor, draws: Draws) -> tf.Tensor:
        attack = self._attack
        offset = draws.on_sphere(anchor, attack.norm, salt=0)
        return attack._feasible(anchor, anchor + attack.epsilon_value * offset)

    def memory(self, anchor: tf.Tensor, point: tf.Tensor, score: tf.Tensor) -> _Progress:  # noqa: ARG002
        zeros = tf.zeros_like(score, tf.int32)
        return _Progress(zeros, score, tf.equal(zeros, 0))

    def is_within(self, index: Any) -> tf.Tensor:  # noqa: ARG002
        """Return whether the points of an iteration lie inside the ball: always True."""
        return tf.constant(True)

    def step(self, anchor: tf.Tensor, state: _State, index: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the next point, and whether it replaces the best point regardless of its score."""
        attack, point = self._attack, state.point
        direction = balls.steepest_ascent(state.gradient, attack.norm)
        stepped = point + column(state.step_size, anchor.shape.rank) * direction
        stepped = attack._feasible(anchor, stepped)
        momentum = tf.where(index > 0, tf.cast(_MOMENTUM, anchor.dtype), 0.0)
        moved = (1 - momentum) * (stepped - point) + momentum * (point - state.previous)
        return attack._feasible(anchor, point + moved), tf.constant(False)

    def review(self, anchor: tf.Tensor, old: _State, new: _State, index: Any) -> _State:  # noqa: ARG002
        """Return the new state, with step sizes halved where progress was too slow."""
        lengths = intervals(self.iterations)
        ends = list(itertools.accumulate(lengths))
        interval = tf.reduce_sum(tf.where(tf.equal(ends, index + 1), lengths, 0))
        is_check = interval > 0
        progress: _Progress = old.memory
        gains = progress.gains + tf.cast(new.last_score > old.last_score, tf.int32)
        is_slow = tf.cast(gains, tf.float32) <= _RHO * tf.cast(interval, tf.float32)
        is_stuck = ~progress.was_halved & (progress.checked_score >= new.score)
        halves = is_check & (is_slow | is_stuck)
        memory = _Progress(
            gains=tf.where(is_check, 0, gains),
            checked_score=tf.where(is_check, new.score, progress.checked_score),
            was_halved=tf.where(is_check, halves, progress.was_halved),
        )
        return new.reset_to_best(halves, tf.where(halves, new.step_size / 2, new.step_size), memory)


class _Sparsity(NamedTuple):
    """State for the sparsity of steps in l1: the number of changed entries of the best point."""

    changed: tf.Tensor


class _SparseSteps:
    """The step rule of l1: few entries move, in balls that shrink to the radius epsilon."""

    def __init__(self, attack: APGD) -> None:
        self._attack = attack
        lengths = [int(share * attack.steps) for _, share in _RADII[:-1]]
        lengths.append(attack.steps - sum(lengths))
        # Per iteration: the radius, whether it is the first of a radius, whether step sizes change.
        self._radii, self._begins, self._checks = [], [], []
        for (factor, _), length in zip(_RADII, lengths, strict=True):
            if not length:
                continue
            interval = max(int(0.04 * length), 1)
            self._radii += [factor * attack.epsilon_value] * (length + 1)
            self._begins += [True] + [False] * length
            self._checks += [False] + [index % interval == 0 for index in range(1, length + 1)]
        # The first entry is the start.
        self.iterations = len(self._radii) - 1
        self.first_step_size = self._radii[0]

    def start(self, anchor: tf.Tensor, draws: Draws) -> tf.Tensor:
        noise = self._attack._width * draws.normal(anchor, salt=0)
        return self._projected(anchor, anchor + noise, -1)

    def memory(self, anchor: tf.Tensor, point: tf.Tensor, score: tf.Tensor) -> _Sparsity:  # noqa: ARG002
        return _Sparsity(_changed(anchor, point))

    def is_within(self, index: Any) -> tf.Tensor:
        """Return whether the points of an iteration lie inside the ball of radius epsilon."""
        return tf.equal(self._at(self._radii, index, tf.float64), self._radii[-1])

    def step(self, anchor: tf.Tensor, state: _State, index: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the next point, and whether it replaces the best point regardless of its score."""
        rank = anchor.shape.rank
        size = tf.cast(tf.reduce_prod(tf.shape(anchor)[1:]), anchor.dtype)
        share = state.memory.changed / size / _DENSER
        direction = balls.sparse_ascent(state.gradient, share)
        stepped = state.point + column(state.step_size, rank) * direction
        is_fresh = self._at(self._begins, index, tf.bool)
        return self._projected(anchor, tf.where(is_fresh, state.best, stepped), index), is_fresh

    def review(self, anchor: tf.Tensor, old: _State, new: _State, index: Any) -> _State:
        """Return the new state, with step sizes updated by the number of changed entries."""
        is_fresh, is_check = (
            self._at(values, index, tf.bool) for values in (self._begins, self._checks)
        )
        radius = self._at(self._radii, index, anchor.dtype)
        before = old.memory.changed
        changed = tf.where(is_check | is_fresh, _changed(anchor, new.best), before)
        falls = is_check & (changed < _SPARSER * before)
        reduced = tf.maximum(new.step_size / _DENSER, radius / 10)
        step_size = tf.where(is_check, reduced, new.step_size)
        step_size = tf.where(falls | is_fresh, radius, step_size)
        return new.reset_to_best(falls, step_size, _Sparsity(changed))

    def _projected(self, anchor: tf.Tensor, point: tf.Tensor, index: Any) -> tf.Tensor:
        radius = self._at(self._radii, index, anchor.dtype)
        return like(balls.project_within_box(point, anchor, radius, self._attack.bounds), anchor)

    def _at(self, values: list[Any], index: Any, dtype: Any) -> tf.Tensor:
        """Return the value for an iteration; -1 for the start."""
        return tf.gather(tf.constant(values, dtype), index + 1)


def _changed(anchor: tf.Tensor, point: tf.Tensor) -> tf.Tensor:
    """Return the number of entries that differ in each example, as floats."""
    differs = tf.cast(point != anchor, anchor.dtype)
    return tf.reduce_sum(differs, axis=list(range(1, anchor.shape.rank)))


def intervals(steps: int) -> list[int]:
    """Return the lengths of the intervals between checks of step sizes, for a number of steps."""
    length, shortest, decrease = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    found: list[int] = []
    while sum(found) + length <= steps:
        found.append(length)
        length = max(length - decrease, shortest)
    return found
