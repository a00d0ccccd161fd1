"""FAB: projections onto the linearised decision boundary, close to the clean input."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, final

import tensorflow as tf

from tscnc_tf import _checks, _keras
from tscnc_tf.attacks.base import Attack
from tscnc_tf.attacks.pgd import Ascent, classes_of, effort
from tscnc_tf.attacks.search import TARGET_CLASSES, Draws, Examples, Search, choose, column, like
from tscnc_tf.functional import balls

_LARGEST_BIAS = 0.1  # the largest weight of the step that starts at the clean input
_OVERSHOOT = 1.05
_RETREAT = 0.9  # factor of the distance to the clean input, after a point that fools the model
_DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}


class _State(NamedTuple):
    """State of an attempt; `nearest` is the nearest adversarial example, at `distance` from x."""

    point: tf.Tensor
    nearest: tf.Tensor
    distance: tf.Tensor
    fooled: tf.Tensor

    @property
    def result(self) -> tf.Tensor:
        return choose(self.distance < self.distance.dtype.max, self.nearest, self.point)

    @property
    def best(self) -> tf.Tensor:
        return self.result

    @property
    def score(self) -> tf.Tensor:
        return -self.distance


@final
@_keras.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class FAB(Search):
    r"""The fast adaptive boundary attack, which searches for the nearest adversarial example.

    In each iteration the difference of two logits, :math:`f = z_t - z_y`, is linearised at the
    current point :math:`x'`; with P the projection onto the hyperplane where it is zero, within
    the bounds,

    .. math:: x' \leftarrow (1 - \alpha)\,(x' + 1.05\,(P(x') - x')) +
        \alpha\,(x + 1.05\,(P(x) - x)), \qquad
        \alpha = \min\left(\frac{\|P(x') - x'\|}{\|P(x') - x'\| + \|P(x) - x\|},\ 0.1\right)

    and from a point that fools the model the next iteration starts 10 % nearer to x. An adversarial
    example within epsilon is a success. Without one, the result is the nearest adversarial example
    (or the last point) projected into the ball.

    Args:
        epsilon: the radius, a number or a fraction such as "8/255".
        norm: "linf", "l2" or "l1".
        target_classes: the number of classes t that are tried in turn, the most likely ones first,
            at most all wrong ones; or None to use, in each iteration, the class of the nearest
            boundary, which needs the gradients of all logits.
        steps: the number of iterations of an attempt, >= 1.
        restarts: the number of attempts (per target class), >= 1: the first from x, others from
            random points at half the radius.
        bounds: the smallest and the largest value that an input may take.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> import tensorflow as tf
        >>> network = tf.constant([[1.0, -1.0], [0.0, 2.0]])
        >>> attack = FAB(epsilon=0.25, steps=10)
        >>> attack.name
        'FAB-10 linf 0.25 targeted'
        >>> x = tf.constant([[0.9, 0.7]])
        >>> adversarial = attack(lambda x: x @ network, x, [0])
        >>> [round(float(entry), 3) for entry in (adversarial - x)[0]]
        [-0.105, 0.105]

    Reference:
        Croce & Hein 2020, arXiv 1907.02044, algorithm 1; its targeted form: arXiv 2003.01690.
    """

    target_classes: int | None = TARGET_CLASSES
    steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("steps", _checks.integer("steps", self.steps, minimum=1))
        if self.target_classes is not None:
            count = _checks.integer("target_classes", self.target_classes, minimum=1)
            self._set("target_classes", count)

    def for_transfer(self) -> Attack:
        """Return this attack: its results are the nearest points by design."""
        return self

    @property
    def name(self) -> str:
        """A short name for tables, such as "FAB-100 linf 8/255 targeted"."""
        kind = "" if self.target_classes is None else " targeted"
        return f"FAB-{effort(self.steps, self.restarts)} {self._ball}{kind}"

    def describe(self) -> dict[str, Any]:
        """Return the description for reports."""
        return super().describe() | {
            "steps": self.steps,
            "target_classes": self.target_classes,
        }

    @property
    def _iterations(self) -> int:
        return self.steps

    @property
    def _targets(self) -> int | None:
        return self.target_classes

    def _begin(self, ascent: Ascent, examples: Examples, attempt: Any, draws: Draws) -> _State:  # noqa: ARG002
        x = examples.x
        point = x
        if self.restarts > 1:
            radius = self.epsilon_value / 2
            start = x + radius * draws.on_sphere(x, self.norm, salt=0)
            is_first = tf.convert_to_tensor(attempt) % self.restarts == 0
            point = tf.where(is_first, x, tf.clip_by_value(start, *self.bounds))
        zeros = tf.zeros(tf.shape(x)[:1], x.dtype)
        return _State(
            point=point,
            nearest=x,
            distance=zeros + x.dtype.max,
            fooled=tf.zeros_like(zeros, tf.bool),
        )

    def _advance(
        self,
        ascent: Ascent,
        examples: Examples,
        state: _State,
        index: Any,  # noqa: ARG002
        draws: Draws,  # noqa: ARG002
    ) -> _State:
        x, point = examples.x, state.point
        value, slope = self._boundary(ascent, point)
        level = tf.reduce_sum(slope * point, list(range(1, x.shape.rank))) - value
        # Both projections in one call, as one loop takes the iterations of the slower one.
        points, slopes, levels = (
            tf.concat(pair, axis=0) for pair in ((point, x), (slope, slope), (level, level))
        )
        steps = onto_hyperplane(points, slopes, levels, self.norm, self.bounds)
        lengths = tf.maximum(balls.lengths(steps, self.norm), 1e-8 * self._width)
        (here, there), (far, near) = tf.split(steps, 2), tf.split(lengths, 2)
        bias = column(tf.minimum(far / (far + near), _LARGEST_BIAS), x.shape.rank)
        moved = (1 - bias) * (point + _OVERSHOOT * here) + bias * (x + _OVERSHOOT * there)
        moved = like(tf.clip_by_value(moved, *self.bounds), x)

        fools = ascent.is_fooled(ascent.logits(moved))
        distance = balls.lengths(moved - x, self.norm)
        is_nearer = fools & (distance < state.distance) & ~state.fooled
        best = tf.where(is_nearer, distance, state.distance)
        return _State(
            point=choose(fools, x + _RETREAT * (moved - x), moved),
            nearest=choose(is_nearer, moved, state.nearest),
            distance=best,
            fooled=best <= self.epsilon_value,
        )

    def _boundary(self, ascent: Ascent, point: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the difference of logits that defines the boundary, and its gradient."""
        if self._targets is not None:
            return self._difference(ascent, point, ascent.targets)[1:]
        dual = _DUAL[self.norm]

        def measured(target: Any) -> tuple[tf.Tensor, ...]:
            targets = tf.fill(tf.shape(point)[:1], target)
            logits, value, slope = self._difference(ascent, point, targets)
            distance = tf.abs(value) / (1e-12 + balls.lengths(slope, dual))
            is_true = tf.gather(ascent.is_true_class(logits), targets, axis=1, batch_dims=1)
            return logits, tf.where(is_true, distance.dtype.max, distance), value, slope

        def nearer(target: Any, *best: tf.Tensor) -> tuple[Any, ...]:
            _, *new = measured(target)
            gains = new[0] < best[0]
            return target + 1, *(choose(gains, *pair) for pair in zip(new, best, strict=True))

        logits, *first = measured(0)
        classes = classes_of(logits)
        return tf.while_loop(
            lambda target, *_: target < classes, nearer, (1, *first), parallel_iterations=1
        )[2:]

    def _difference(
        self, ascent: Ascent, point: tf.Tensor, targets: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Return the logits, the difference z_t - z_y, and the gradient of the difference."""

        def weights(logits: tf.Tensor) -> tf.Tensor:
            chosen = tf.one_hot(targets, classes_of(logits), dtype=logits.dtype)
            return chosen - tf.cast(ascent.is_true_class(logits), logits.dtype)

        logits, gradient = ascent.pull_back(point, weights)
        # A logit of minus infinity, as of a masked class, times 0 would be NaN.
        value = tf.reduce_sum(tf.math.multiply_no_nan(logits, weights(logits)), axis=-1)
        return logits, tf.cast(value, point.dtype), gradient


def onto_hyperplane(
    x: tf.Tensor, w: tf.Tensor, b: tf.Tensor, norm: str, bounds: tuple[float, float]
) -> tf.Tensor:
    r"""Return the shortest steps from points onto hyperplanes, within the bounds.

    .. math:: \min_d \|d\| \quad \text{subject to} \quad \langle w, x + d\rangle = b,
        \ \text{low} \le x + d \le \text{high}

    All :math:`d_i w_i` have the same sign, and :math:`|d_i| = \min(\lambda v_i, r_i)` with
    :math:`r_i` the distance to the bound, v = 1 (linf) or |w| (l2), and :math:`\lambda` the root of
    a concave, piecewise linear function, which Newton's method finds in finitely many steps. In l1
    the entries of the largest |w| move first, up to their bounds. If a hyperplane can't be reached
    within the bounds, all entries move up to them.

    Args:
        x: `(batch, ...)`, within the bounds.
        w: the normals, of the shape of x.
        b: `(batch,)`.
        norm: "linf", "l2" or "l1".
        bounds: the smallest and the largest value of an entry.

    Returns:
        The steps d, of the shape of x.
    """
    low, high = bounds
    points = tf.reshape(x, (tf.shape(x)[0], -1))
    normals = tf.reshape(w, tf.shape(points))
    # Scaled, since the squares of tiny slopes are zero in float32.
    largest = tf.reduce_max(tf.abs(normals), axis=1, keepdims=True)
    gap = b[:, tf.newaxis] - tf.reduce_sum(normals * points, axis=1, keepdims=True)
    gap = tf.math.divide_no_nan(gap, largest)
    normals = tf.math.divide_no_nan(normals, largest)
    signs, gap, slopes = tf.sign(gap * normals), tf.abs(gap), tf.abs(normals)
    limits = tf.where(signs > 0, high - points, points - low) * tf.abs(signs)
    if norm == "l1":
        lengths = _greedy(slopes, limits, gap)
    else:
        speeds = slopes if norm == "l2" else tf.ones_like(slopes)
        lengths = tf.minimum(_newton(slopes, speeds, limits, gap) * speeds, limits)
    return tf.reshape(signs * lengths, tf.shape(x))


def _newton(slopes: tf.Tensor, speeds: tf.Tensor, limits: tf.Tensor, gap: tf.Tensor) -> tf.Tensor:
    """Return the root of sum(slopes * min(root * speeds, limits)) = gap; 1e30 if there is none."""
    huge = tf.cast(1e30, gap.dtype)

    def step(root: tf.Tensor, changed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        is_full = root * speeds >= limits
        left = gap - tf.reduce_sum(tf.where(is_full, slopes * limits, 0.0), axis=1, keepdims=True)
        speed = tf.reduce_sum(tf.where(~is_full, slopes * speeds, 0.0), axis=1, keepdims=True)
        new = tf.where(speed > 0, tf.math.divide_no_nan(left, speed), huge)
        new = tf.maximum(new, root)  # it decreases by rounding only
        return like(new, root), like(new > root, changed)

    return tf.while_loop(
        lambda root, changed: tf.reduce_any(changed),  # noqa: ARG005
        step,
        (tf.zeros_like(gap), tf.ones_like(gap, tf.bool)),
        maximum_iterations=64,
        parallel_iterations=1,
    )[0]


def _greedy(slopes: tf.Tensor, limits: tf.Tensor, gap: tf.Tensor) -> tf.Tensor:
    """Return the distance that each entry moves if those of the largest slopes move first."""
    order = tf.argsort(slopes, axis=1, direction="DESCENDING", stable=True)
    slopes, limits = (tf.gather(part, order, batch_dims=1) for part in (slopes, limits))
    before = tf.cumsum(slopes * limits, axis=1, exclusive=True)
    moved = tf.math.divide_no_nan(tf.maximum(gap - before, 0.0), slopes)
    return tf.gather(tf.minimum(moved, limits), tf.argsort(order, axis=1), batch_dims=1)
