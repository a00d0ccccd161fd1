"""Scopes: how the kept weights are distributed among the weight tensors."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, functional
from tscnc_tf._keras.models import fits
from tscnc_tf.pruning.targets import Target

SCOPES = ("layer", "global", "erk", "igq", "lamp")


class Units(NamedTuple):
    """The units of one weight tensor, each of which is kept or pruned as a whole.

    Attributes:
        scores: a float vector, one per unit.
        size: the number of weights in each unit; a vector if they differ.
        weights: the number of weights of the tensor.
        guard: a mask of units of one weight each that are kept at any sparsity; None for none.
    """

    scores: tf.Tensor
    size: int | np.ndarray
    weights: int
    guard: tf.Tensor | None = None

    @property
    def ranks(self) -> tf.Tensor:
        """The scores, with +inf for guarded units."""
        if self.guard is None:
            return self.scores
        return tf.where(self.guard, tf.constant(np.inf, self.scores.dtype), self.scores)


class Scope(abc.ABC):
    """Chooses the units to keep, at least `min_weights` weights of every weight tensor."""

    is_per_layer = False

    def __init__(self, min_weights: int) -> None:
        self.min_weights = min_weights

    @abc.abstractmethod
    def choose(self, units: Sequence[Units], sparsity: Any) -> list[tf.Tensor]:
        """Return a mask of units for each weight tensor, True where a unit is kept."""

    def _best(self, units: Units, count: Any) -> tf.Tensor:
        """Return a mask of the units with the largest scores, `count` weights in all."""
        minimum = min(self.min_weights, units.weights)
        count = tf.maximum(tf.cast(count, tf.int32), minimum)
        if units.guard is not None:
            count = tf.maximum(count, tf.reduce_sum(tf.cast(units.guard, tf.int32)))
        if isinstance(units.size, int):
            number = tf.round(tf.cast(count, tf.float32) / units.size)
            fewest = math.ceil(minimum / units.size)
            number = tf.maximum(tf.cast(number, tf.int32), fewest)
            exact = count if units.size == 1 else number
            return functional.largest(units.ranks, exact)
        # Units are kept while they fit into the count: this one makes sure of the minimum.
        sufficient = minimum + int(np.max(units.size)) - 1
        return functional.largest_within(units.scores, units.size, tf.maximum(count, sufficient))


class ByCounts(Scope):
    """Each weight tensor has its own sparsity: `rule` lists them, given that of the schedule."""

    def __init__(self, min_weights: int, rule: Any, is_per_layer: bool) -> None:
        super().__init__(min_weights)
        self._rule = rule
        self.is_per_layer = is_per_layer

    def counts(self, sizes: Sequence[int], sparsity: Any) -> list[tf.Tensor]:
        """Return the number of weights that each tensor keeps."""
        sparsities = self._rule(tf.cast(sparsity, tf.float32))
        return [
            tf.maximum(functional.kept_count(size, sparsities[index]), min(self.min_weights, size))
            for index, size in enumerate(sizes)
        ]

    def choose(self, units: Sequence[Units], sparsity: Any) -> list[tf.Tensor]:
        """Return a mask of units for each weight tensor."""
        counts = self.counts([unit.weights for unit in units], sparsity)
        return [self._best(*pair) for pair in zip(units, counts, strict=True)]


class ByCurve(Scope):
    """Distributes the kept weights of all tensors together by a curve; the total is exact.

    The total is what the sparsity leaves of all tensors together, or the sum of the minima, if that
    is more. No tensor keeps more weights at a higher sparsity. With units of several weights, each
    count is then rounded to whole units.

    Args:
        min_weights: the minimum number of kept weights of every weight tensor.
        curve: returns the number of kept weights of each tensor, a float64 vector, given a float64
            scalar. All numbers increase with the scalar, from none at -60 to all at 60.
    """

    def __init__(self, min_weights: int, curve: Callable[[tf.Tensor], tf.Tensor]) -> None:
        super().__init__(min_weights)
        self._curve = curve

    def choose(self, units: Sequence[Units], sparsity: Any) -> list[tf.Tensor]:
        """Return a mask of units for each weight tensor."""
        sizes = [unit.weights for unit in units]
        counts = self.counts(sizes, sparsity, [self._fewest(unit) for unit in units])
        return [self._best(*pair) for pair in zip(units, counts, strict=True)]

    def counts(self, sizes: Sequence[int], sparsity: Any, lowest: Sequence[Any]) -> list[tf.Tensor]:
        """Return the number of weights that each tensor keeps, given the minima."""
        total = functional.kept_count(sum(sizes), sparsity)
        return tf.unstack(share_out(self._curve, lowest, sizes, total))

    def _fewest(self, units: Units) -> tf.Tensor:
        minimum = tf.constant(min(self.min_weights, units.weights), tf.int32)
        if units.guard is None:
            return minimum
        return tf.maximum(minimum, tf.reduce_sum(tf.cast(units.guard, tf.int32)))


def in_proportion(parts: Any) -> Callable[[tf.Tensor], tf.Tensor]:
    """Return the curve of `ByCurve` for numbers in proportion to `parts`, which are positive."""
    parts = tf.cast(parts, tf.float64)
    return lambda log_factor: tf.exp(log_factor) * parts


def share_out(
    curve: Callable[[tf.Tensor], tf.Tensor], lowest: Any, highest: Any, total: Any
) -> Any:
    r"""Return integers that add up to `total`, each within its bounds.

    They are :math:`\text{clip}(\text{round}(f_l(t)))` with the largest t at which their sum is at
    most `total`. If several increase at this t, they are increased one after another, in order. So
    no number decreases if `total` increases. (With rounding down, and the rest given to the largest
    fractions, some would.) If `total` is out of reach, the sum is that of the nearer bounds.

    Args:
        curve: the functions f of t, see `ByCurve`.
        lowest: the lower bounds, a vector of integers.
        highest: the upper bounds, a vector of integers.
        total: an integer.

    Returns:
        An int32 vector.
    """
    lowest, highest, total = (tf.cast(each, tf.int32) for each in (lowest, highest, total))
    total = tf.clip_by_value(total, tf.reduce_sum(lowest), tf.reduce_sum(highest))

    def whole(at: tf.Tensor) -> tf.Tensor:
        # Clipped before the cast, as large values overflow int32.
        clipped = tf.minimum(tf.round(curve(at)), tf.cast(highest, tf.float64))
        return tf.maximum(tf.cast(clipped, tf.int32), lowest)

    def halve(low: tf.Tensor, high: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        middle = (low + high) / 2
        fits = tf.reduce_sum(whole(middle)) <= total
        return tf.where(fits, middle, low), tf.where(fits, high, middle)

    ends = tf.constant(-60.0, tf.float64), tf.constant(60.0, tf.float64)
    low, high = tf.while_loop(lambda *_: True, halve, ends, maximum_iterations=60)
    # The tolerance makes the result independent of rounding errors, which depend on the device.
    below, above = whole(low - 1e-10), whole(high + 1e-10)
    more = above - below
    left = total - tf.reduce_sum(below)
    return below + tf.clip_by_value(left - tf.cumsum(more, exclusive=True), 0, more)


class Global(Scope):
    """The units of all weight tensors compete by their scores."""

    def choose(self, units: Sequence[Units], sparsity: Any) -> list[tf.Tensor]:
        """Return a mask of units for each weight tensor."""
        kept = [self._best(unit, self.min_weights) for unit in units]
        guarded = [
            tf.where(mask, np.inf, self._compared(unit))
            for mask, unit in zip(kept, units, strict=True)
        ]
        scores = tf.concat(guarded, axis=0)
        count = functional.kept_count(sum(unit.weights for unit in units), sparsity)
        lengths = [int(unit.scores.shape[0]) for unit in units]
        if all(isinstance(unit.size, int) and unit.size == 1 for unit in units):
            mask = functional.largest(scores, count)
        else:
            sizes = [np.broadcast_to(u.size, n) for u, n in zip(units, lengths, strict=True)]
            mask = functional.largest_within(scores, np.concatenate(sizes), count)
        # The minima are kept even if their sum is more than the sparsity leaves.
        return tf.split(mask | tf.equal(scores, np.inf), lengths)

    def _compared(self, units: Units) -> tf.Tensor:
        """Return scores that are comparable between weight tensors."""
        return units.scores


class Lamp(Global):
    r"""The units of all weight tensors compete by layer-adaptive scores.

    The score of a unit is its square, divided by the sum of squares of the units of its tensor that
    are not smaller:

    .. math:: s_u^2 / \textstyle\sum_{v:\, s_v \ge s_u} s_v^2

    The order within a tensor does not change. The largest unit of each tensor has the score 1, so
    it is always kept.

    Reference:
        Lee et al. 2021, arXiv 2010.07611, equation 4.
    """

    def _compared(self, units: Units) -> tf.Tensor:
        alive = tf.math.is_finite(units.scores)
        sizes = tf.where(alive, tf.maximum(units.scores, 0.0), 0.0)
        # Divided by the largest, as squares of tiny scores would be zero in float32.
        squares = tf.square(tf.math.divide_no_nan(sizes, tf.reduce_max(sizes)))
        order = tf.argsort(squares, direction="DESCENDING", stable=True)
        ordered = tf.gather(squares, order)
        shares = tf.math.divide_no_nan(ordered, tf.cumsum(ordered))
        shares = tf.scatter_nd(order[:, tf.newaxis], shares, tf.shape(squares))
        return tf.where(alive, shares, units.scores)


def scope_for(
    value: str | Mapping[str, float],
    targets: Sequence[Target],
    final: float,
    minimum: int,
) -> Scope:
    """Return the scope for an argument `scope`.

    Args:
        value: one of `SCOPES`, or final sparsities by name pattern.
        targets: the pruned weights.
        final: the schedule's final sparsity.
        minimum: the minimum number of kept weights of every weight tensor.

    Raises:
        TypeError, ValueError: `value` is none of these, or a pattern matches no weight.
    """
    name = value if isinstance(value, str) else ""  # a tensor can't be compared with a text
    if name == "layer":
        return ByCounts(minimum, lambda sparsity: [sparsity] * len(targets), True)
    if name == "global":
        return Global(minimum)
    if name == "lamp":
        return Lamp(minimum)
    if name == "igq":
        return ByCurve(minimum, _igq([target.size for target in targets]))
    if name == "erk":
        return ByCurve(minimum, _erk([target.shape for target in targets]))
    if not isinstance(value, Mapping):
        raise ValueError(
            f"scope must be one of {', '.join(map(repr, SCOPES))}, or a dict of final sparsities "
            f"by name pattern, or 'learned' with method='scores', got {value!r}."
        )
    return ByCounts(minimum, _by_pattern(value, targets, final), False)


def fitting(ratios: Mapping[str, float], targets: Sequence[Target]) -> dict[str, float]:
    """Return the sparsities by name pattern, without patterns that match no weight."""
    return {
        pattern: ratio
        for pattern, ratio in ratios.items()
        if any(fits(target.name, pattern) for target in targets)
    }


def _by_pattern(ratios: Mapping[str, float], targets: Sequence[Target], final: float) -> Any:
    """Return the rule of `ByCounts` for sparsities by name, in proportion to the schedule's."""
    ratios = {name: _checks.sparsity(f"scope[{name!r}]", ratio) for name, ratio in ratios.items()}
    if final == 0.0:
        raise ValueError(
            f"scope={dict(ratios)!r} needs a schedule with a final sparsity above 0: the "
            "sparsities of scope are in proportion to it."
        )
    names = [target.name for target in targets]
    for pattern in ratios:
        if not any(fits(name, pattern) for name in names):
            raise ValueError(f"scope has a pattern {pattern!r} that fits none of {names}.")

    def part(name: str) -> float:
        found = [ratio for pattern, ratio in ratios.items() if fits(name, pattern)]
        return found[0] / final if found else 1.0

    parts = [part(name) for name in names]
    return lambda sparsity: [sparsity * share for share in parts]


def _erk(shapes: Sequence[tuple[int, ...]]) -> Callable[[tf.Tensor], tf.Tensor]:
    r"""Return the curve of Erdős–Rényi-Kernel: densities in proportion to Σ axes / Π axes.

    Densities are at most 1; the other layers then keep more, so that the total is exact.

    Reference:
        Evci et al. 2020, "Rigging the lottery", arXiv 1911.11134, section 3.
    """
    return in_proportion([sum(shape) for shape in shapes])


def _igq(sizes: Sequence[int]) -> Callable[[tf.Tensor], tf.Tensor]:
    r"""Return the curve of ideal-gas quotas: of n weights :math:`n / (1 + F n)` are kept.

    F is the same for all layers, and such that the total is exact. Small layers stay denser, and no
    layer keeps more than 1/F weights.

    Reference:
        Chen et al. 2022, "Sparsity winning twice", arXiv 2202.09844, section 3.2.
    """
    numbers = tf.constant(sizes, tf.float64)
    return lambda log_factor: numbers / (1.0 + tf.exp(-log_factor) * numbers)
