"""The square attack: random search by windows, which needs no gradient."""

from __future__ import annotations

import bisect
import dataclasses
import math
from typing import Any, NamedTuple, final

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks
from tscnc_tf.attacks.pgd import Ascent
from tscnc_tf.attacks.search import Draws, Examples, Search, choose, column, like

# Of 10,000 queries, those after which the share of a window is halved.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_DRAWS_PER_ITERATION = 8


class _State(NamedTuple):
    """Where an attempt is: the best candidate."""

    result: tf.Tensor
    score: tf.Tensor
    fooled: tf.Tensor


class _Windows(NamedTuple):
    """A window of each example: its first row and column, and their numbers.

    Attributes:
        row: `(batch,)`, int32.
        column: `(batch,)`, int32.
        height: an int32, the same for all examples.
        width: likewise.
    """

    row: tf.Tensor
    column: tf.Tensor
    height: Any
    width: Any


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Square(Search):
    r"""The square attack: random changes in windows of the input, kept where they help.

    It asks the model for its outputs only, so it also judges models without a gradient, such as
    exported files, and models whose gradient misleads. A change is kept if the margin
    :math:`\max_{k \ne y} z_k - z_y` grows. In linf it sets a window to :math:`x \pm \epsilon`, with
    a random sign per channel; in l2 it moves the perturbation of one window to another one, with a
    profile of two pyramids of opposite signs added. The side of the windows falls with the queries.

    Inputs of shape `(height, width)` or `(height, width, channels)` are images; of others the
    windows are intervals of the entries in a row.

    Args:
        epsilon: the radius, a number or a fraction such as "8/255".
        norm: "linf" or "l2".
        queries: the number of changes that are tried, >= 1.
        p_init: the share of the input that the first window covers, in (0, 1].
        restarts: the number of attempts, >= 1.
        bounds: the smallest and the largest value that an input may take.

    Raises:
        ValueError: an argument is none of those above.

    Example:
        >>> import tensorflow as tf
        >>> network = tf.constant([[1.0, -1.0], [0.0, 2.0]])
        >>> attack = Square(epsilon=0.25, queries=50)
        >>> attack.name, attack.uses_gradient
        ('Square-50 linf 0.25', False)
        >>> x = tf.constant([[0.9, 0.7]])
        >>> adversarial = attack(lambda x: x @ network, x, [0])
        >>> [round(float(entry), 2) for entry in (adversarial - x)[0]]
        [-0.25, 0.25]

    Reference:
        Andriushchenko et al. 2020, arXiv 1912.00049, algorithms 1 to 3.
    """

    queries: int = 5000
    p_init: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("queries", _checks.integer("queries", self.queries, minimum=1))
        share = _checks.number("p_init", self.p_init, above=0.0, maximum=1.0)
        self._set("p_init", share)

    @property
    def uses_gradient(self) -> bool:
        """False: it asks for outputs only."""
        return False

    @property
    def name(self) -> str:
        """A short name for tables, such as "Square-5000 linf 8/255"."""
        times = f"x{self.restarts}" if self.restarts > 1 else ""
        return f"Square-{self.queries}{times} {self._ball}"

    def describe(self) -> dict[str, Any]:
        """Return what a report says of the attack."""
        return super().describe() | {
            "restarts": self.restarts,
            "queries": self.queries,
            "p_init": self.p_init,
        }

    @property
    def _iterations(self) -> int:
        return self.queries

    def _begin(self, ascent: Ascent, examples: Examples, attempt: Any, draws: Draws) -> _State:  # noqa: ARG002
        x = _grid(examples.x)
        if self.norm == "linf":
            # Stripes from the first row to the last; where there is one column, entries.
            height, width, channels = x.shape[1:]
            stripes = (height, 1, channels) if width == 1 else (1, width, channels)
            delta = self.epsilon_value * tf.sign(draws.uniform(stripes, 0, x.dtype))
        else:
            delta = self._scaled(self._tiles(x, draws))
        return self._judged(ascent, examples, tf.clip_by_value(x + delta, *self.bounds))

    def _advance(
        self, ascent: Ascent, examples: Examples, state: _State, index: Any, draws: Draws
    ) -> _State:
        x, best = _grid(examples.x), _grid(state.result)
        change = self._changed if self.norm == "linf" else self._moved
        candidate = change(x, best, index, draws)
        new = self._judged(ascent, examples, tf.clip_by_value(candidate, *self.bounds))
        gains = (new.score > state.score) | new.fooled
        return _State(
            result=choose(gains, new.result, state.result),
            score=tf.where(gains, new.score, state.score),
            fooled=state.fooled | new.fooled,
        )

    def _judged(self, ascent: Ascent, examples: Examples, candidate: tf.Tensor) -> _State:
        candidate = tf.reshape(candidate, tf.shape(examples.x))
        candidate = self._feasible(examples.x, like(candidate, examples.x))
        logits = ascent.logits(candidate)
        return _State(candidate, ascent.score(logits), ascent.is_fooled(logits))

    def _changed(self, x: tf.Tensor, best: tf.Tensor, index: Any, draws: Draws) -> tf.Tensor:
        """Return the candidates of an iteration in linf: one window at the surface of the ball."""
        salt = _DRAWS_PER_ITERATION * (index + 1)
        windows = self._windows(x, self._side(x, index, smallest=1), draws, salt)
        signs = tf.sign(draws.uniform((1, 1, x.shape[-1]), salt + 2, x.dtype))
        return tf.where(_inside(x, windows), x + self.epsilon_value * signs, best)

    def _moved(self, x: tf.Tensor, best: tf.Tensor, index: Any, draws: Draws) -> tf.Tensor:
        """Return the candidates of an iteration in l2: what one window has, moved to another."""
        salt = _DRAWS_PER_ITERATION * (index + 1)
        side = self._side(x, index, smallest=3)
        to, source = (self._windows(x, side, draws, salt + 2 * i) for i in range(2))
        inside = _inside(x, to)
        delta = best - x
        here = tf.where(inside, delta, 0.0)
        flips = draws.uniform((1, 1, 1), salt + 4, x.dtype) > 0
        signs = tf.sign(draws.uniform((1, 1, x.shape[-1]), salt + 5, x.dtype))
        shape = signs * _profile(x, to, flips) + _divided(here, _length(here, (1, 2)))
        squares = tf.square(_length(tf.where(inside | _inside(x, source), delta, 0.0)))
        unused = tf.maximum(self.epsilon_value**2 - tf.square(_length(delta)), 0.0)
        budget = tf.sqrt(unused / x.shape[-1] + squares)
        new = _divided(shape, _length(shape, (1, 2))) * budget
        rest = tf.where(_inside(x, source), 0.0, delta)
        return x + self._scaled(tf.where(inside, new, rest))

    def _tiles(self, x: tf.Tensor, draws: Draws) -> tf.Tensor:
        """Return the first perturbation in l2: profiles side by side, with random signs."""
        height, width, channels = x.shape[1:]
        side = max(height // 5, 1)
        across = side if width > 1 else 1
        first = (height - 5 * side) // 2 if height >= 5 * side else 0
        rows, columns = np.arange(height) - first, np.arange(width) - (first if width > 1 else 0)
        numbers = height // side, width // across
        is_tiled = ((rows >= 0) & (rows < numbers[0] * side))[:, np.newaxis, np.newaxis]
        is_tiled = is_tiled & ((columns >= 0) & (columns < numbers[1] * across))[:, np.newaxis]
        flips = draws.uniform((1, 1, 1), 0, x.dtype) > 0
        zeros = tf.zeros_like(draws.row)
        corner = _Windows(zeros, zeros, side, across)
        tile = _profile(x, corner, flips)[:, :side, :across]
        profile = tf.gather(tf.gather(tile, rows % side, axis=1), columns % across, axis=2)
        signs = tf.sign(draws.uniform((*numbers, channels), 1, x.dtype))
        at = np.clip(rows // side, 0, numbers[0] - 1), np.clip(columns // across, 0, numbers[1] - 1)
        signs = tf.gather(tf.gather(signs, at[0], axis=1), at[1], axis=2)
        return tf.where(is_tiled, profile * signs, 0.0)

    def _scaled(self, delta: tf.Tensor) -> tf.Tensor:
        """Return perturbations of the length epsilon."""
        return _divided(delta, _length(delta)) * self.epsilon_value

    def _side(self, x: tf.Tensor, index: Any, smallest: int) -> tf.Tensor:
        """Return the height of the windows in an iteration, at least `smallest`; odd from 3."""
        height, width = x.shape[1:3]
        sides = []
        for query in range(self.queries):
            halvings = bisect.bisect_left(_HALVINGS, int(query / self.queries * 10_000))
            share = self.p_init / 2**halvings
            side = share * height if width == 1 else math.sqrt(share * height * width)
            side = max(round(side), smallest)
            side += smallest == 3 and side % 2 == 0
            sides.append(min(side, height if width == 1 else min(height, width)))
        return tf.gather(tf.constant(sides, tf.int32), index)

    def _windows(self, x: tf.Tensor, side: tf.Tensor, draws: Draws, salt: Any) -> _Windows:
        """Return windows at random places."""
        height, width = x.shape[1:3]
        across = side if width > 1 else tf.ones_like(side)
        row, first = (
            _position(draws.uniform((), salt + axis), size - length)
            for axis, (size, length) in enumerate(((height, side), (width, across)))
        )
        return _Windows(row, first, side, across)


def _grid(x: tf.Tensor) -> tf.Tensor:
    """Return inputs as images of static shape, `(batch, height, width, channels)`."""
    shape = tuple(x.shape[1:])
    if None in shape:
        raise ValueError(
            f"x must have a static shape but for the batch axis, got {x.shape}: the windows of "
            "Square depend on it."
        )
    if len(shape) == 2:
        shape = (*shape, 1)
    elif len(shape) != 3:
        shape = (math.prod(shape), 1, 1)
    return tf.reshape(x, (-1, *shape))


def _position(draw: tf.Tensor, last: Any) -> tf.Tensor:
    """Return integers from 0 to `last`, each as likely, of draws from U(-1, 1)."""
    choices = tf.cast(last + 1, draw.dtype)
    return tf.minimum(tf.cast(tf.floor((draw + 1) / 2 * choices), tf.int32), last)


def _coordinates(x: tf.Tensor, windows: _Windows) -> tuple[tf.Tensor, tf.Tensor]:
    """Return rows and columns of all pixels, seen from the corner of each example's window."""
    rows, columns = (tf.range(x.shape[axis])[:, tf.newaxis] for axis in (1, 2))
    return rows[:, tf.newaxis] - column(windows.row, 4), columns - column(windows.column, 4)


def _inside(x: tf.Tensor, windows: _Windows) -> tf.Tensor:
    """Return a mask `(batch, height, width, 1)` of the pixels in the windows."""
    rows, columns = _coordinates(x, windows)
    is_row = (rows >= 0) & (rows < windows.height)
    return is_row & (columns >= 0) & (columns < windows.width)


def _profile(x: tf.Tensor, windows: _Windows, flips: tf.Tensor) -> tf.Tensor:
    """Return two pyramids of opposite signs, in the halves of each window, of length 1 in l2.

    Args:
        x: the images.
        windows: where; elsewhere the profile is zero.
        flips: per example whether the halves are left and right instead of upper and lower; only
            square windows are flipped.
    """
    rows, columns = _coordinates(x, windows)
    height, width = windows.height, windows.width
    if x.shape[2] > 1:
        rows, columns = tf.where(flips, columns, rows), tf.where(flips, rows, columns)
    half = height // 2
    sums = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, 2 + max(x.shape[1:3])) ** 2)])
    sums = tf.constant(sums, x.dtype)
    is_column = (columns >= 0) & (columns < width)

    def pyramid(first: Any, number: Any) -> tf.Tensor:
        """Return concentric rectangles of falling weights in so many rows, of length 1 in l2."""
        local = rows - first
        ring = tf.maximum(tf.abs(local - number // 2), tf.abs(columns - width // 2))
        outermost = tf.maximum(number // 2, width // 2) + 1
        value = tf.gather(sums, outermost) - tf.gather(sums, tf.minimum(ring, outermost))
        value = tf.where((local >= 0) & (local < number) & is_column, value, 0.0)
        return _divided(value, _length(value))

    both = pyramid(0, half) - pyramid(half, height - half)
    return _divided(both, _length(both))


def _length(values: tf.Tensor, axes: tuple[int, ...] = (1, 2, 3)) -> tf.Tensor:
    """Return l2 norms over some axes, which are kept."""
    return tf.sqrt(tf.reduce_sum(tf.square(values), axis=axes, keepdims=True))


def _divided(values: tf.Tensor, by: tf.Tensor) -> tf.Tensor:
    return values / (by + 1e-12)
