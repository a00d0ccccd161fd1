"""The square attack: random search by changes in windows, without gradients."""

from __future__ import annotations

import bisect
import dataclasses
import math
from typing import Any, NamedTuple, final

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _keras
from tscnc_tf.attacks.pgd import Ascent, effort
from tscnc_tf.attacks.search import Draws, Examples, Search, choose, column, like

# The queries, of 10,000, after which the area of the windows is halved.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_DRAWS_PER_ITERATION = 8


class _State(NamedTuple):
    """State of an attempt: the candidate of the largest score, and the first that fools."""

    best: tf.Tensor
    score: tf.Tensor
    fooled: tf.Tensor
    adversarial: tf.Tensor

    @property
    def result(self) -> tf.Tensor:
        return choose(self.fooled, self.adversarial, self.best)


class _Windows(NamedTuple):
    """A window of each example, with the coordinates of all pixels relative to its corner.

    Attributes:
        rows: `(batch, height, 1, 1)`, int32.
        columns: `(batch, 1, width, 1)`, int32.
        inside: `(batch, height, width, 1)`, whether a pixel lies in the window.
    """

    rows: tf.Tensor
    columns: tf.Tensor
    inside: tf.Tensor


@final
@_keras.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Square(Search):
    r"""The square attack: random changes in windows of the input, kept if they raise the margin.

    It needs the model's outputs only, so it also attacks models without a gradient, such as
    exported files, and models with gradient masking. A change is kept if the margin
    :math:`\max_{k \ne y} z_k - z_y` grows. In linf it sets a window to :math:`x \pm \epsilon`, with
    a random sign per channel; in l2 and l1 it moves the perturbation of one window to another, and
    adds a profile of two pyramids of opposite signs. The side of the windows decreases with the
    queries.

    Inputs of shape `(height, width)` or `(height, width, channels)` are images, and those of shape
    `(1, n, n)` or `(3, n, n)`, n > 4, are images with the channels first. For other shapes the
    windows are intervals of the flattened entries.

    Args:
        epsilon: the radius, a number or a fraction such as "8/255".
        norm: "linf", "l2" or "l1".
        queries: the number of changes that are tried, >= 1.
        horizon: the number of queries over which the windows shrink; None for `queries`.
            (`AutoAttack` runs 5,000 queries with a horizon of 10,000.)
        p_init: the share of the input that the first window covers, in (0, 1].
        restarts: the number of attempts, >= 1.
        bounds: the smallest and the largest value that an input may take.

    Raises:
        TypeError, ValueError: an argument is not as described.

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
        Andriushchenko et al. 2020, arXiv 1912.00049, algorithms 1 to 3; in l1: Croce & Hein 2021,
        arXiv 2103.01208, section 4.
    """

    queries: int = 5000
    horizon: int | None = None
    p_init: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("queries", _checks.integer("queries", self.queries, minimum=1))
        if self.horizon is not None:
            self._set("horizon", _checks.integer("horizon", self.horizon, minimum=1))
        share = _checks.number("p_init", self.p_init, above=0.0, maximum=1.0)
        self._set("p_init", share)

    @property
    def uses_gradient(self) -> bool:
        """False: it uses outputs only."""
        return False

    @property
    def name(self) -> str:
        """A short name for tables, such as "Square-5000 linf 8/255"."""
        return f"Square-{effort(self.queries, self.restarts)} {self._ball}"

    def describe(self) -> dict[str, Any]:
        """Return the description for reports."""
        return super().describe() | {
            "queries": self.queries,
            "horizon": self.horizon,
            "p_init": self.p_init,
        }

    @property
    def _iterations(self) -> int:
        return self.queries

    def _begin(self, ascent: Ascent, examples: Examples, attempt: Any, draws: Draws) -> _State:  # noqa: ARG002
        x = _grid(examples.x)
        if self.norm == "linf":
            # Vertical stripes; single entries if there is only one column.
            height, width, channels = x.shape[1:]
            stripes = (height, 1, channels) if width == 1 else (1, width, channels)
            delta = self.epsilon_value * tf.sign(draws.uniform(stripes, 0, x.dtype))
        else:
            delta = self._scaled(self._width * self._tiles(x, draws))
        return self._evaluated(ascent, examples, x + delta)

    def _advance(
        self, ascent: Ascent, examples: Examples, state: _State, index: Any, draws: Draws
    ) -> _State:
        x, best = _grid(examples.x), _grid(state.best)
        change = self._changed if self.norm == "linf" else self._moved
        candidate = change(x, best, index, draws)
        new = self._evaluated(ascent, examples, candidate)
        gains = new.score > state.score
        return _State(
            best=choose(gains, new.best, state.best),
            score=tf.where(gains, new.score, state.score),
            fooled=state.fooled | new.fooled,
            adversarial=choose(state.fooled, state.adversarial, new.adversarial),
        )

    def _evaluated(self, ascent: Ascent, examples: Examples, candidate: tf.Tensor) -> _State:
        if _is_channels_first(examples.x):
            candidate = tf.transpose(candidate, (0, 3, 1, 2))
        candidate = like(tf.reshape(candidate, tf.shape(examples.x)), examples.x)
        candidate = self._feasible(examples.x, candidate)
        logits = ascent.logits(candidate)
        score = ascent.score(logits)
        return _State(candidate, score, ascent.is_fooled(logits), adversarial=candidate)

    def _changed(self, x: tf.Tensor, best: tf.Tensor, index: Any, draws: Draws) -> tf.Tensor:
        """Return the candidates of an iteration in linf: one window set to x ± epsilon."""
        salt = _DRAWS_PER_ITERATION * (index + 1)
        side = tf.gather(self._sides(x), index)
        signs = tf.sign(draws.uniform((1, 1, x.shape[-1]), salt + 2, x.dtype))
        inside = _windows(x, side, draws, salt).inside
        return tf.where(inside, x + self.epsilon_value * signs, best)

    def _moved(self, x: tf.Tensor, best: tf.Tensor, index: Any, draws: Draws) -> tf.Tensor:
        """Return the candidates of an iteration in l2 and l1: a window's norm moved to another."""
        salt = _DRAWS_PER_ITERATION * (index + 1)
        side = tf.gather(self._sides(x), index)
        to, source = (_windows(x, side, draws, salt + 2 * window) for window in range(2))
        flips = draws.uniform((1, 1, 1), salt + 4, x.dtype) > 0
        signs = tf.sign(draws.uniform((1, 1, x.shape[-1]), salt + 5, x.dtype))
        delta = best - x
        here = tf.where(to.inside, delta, 0.0)
        shape = signs * self._profile(x, to, side, flips) + self._unit(here, (1, 2))
        windows = self._length(tf.where(to.inside | source.inside, delta, 0.0), (1, 2))
        # The norm of the windows, plus each channel's share of the unused norm of the ball.
        if self.norm == "l2":
            unused = tf.maximum(self.epsilon_value**2 - tf.square(self._length(delta)), 0.0)
            budget = tf.sqrt(unused / x.shape[-1] + tf.square(windows))
        else:
            unused = tf.maximum(self.epsilon_value - self._length(delta), 0.0)
            budget = unused + x.shape[-1] * windows
        rest = tf.where(~source.inside, delta, 0.0)
        return x + self._scaled(tf.where(to.inside, self._unit(shape, (1, 2)) * budget, rest))

    def _tiles(self, x: tf.Tensor, draws: Draws) -> tf.Tensor:
        """Return the initial perturbation in l2 and l1: tiled profiles with random signs."""
        height, width, channels = x.shape[1:]
        is_flat = width == 1
        side = max((height if is_flat else min(height, width)) // 5, 1)
        sizes = side, 1 if is_flat else side
        axes = list(zip((height, width), sizes, strict=True))
        # Coordinates of rows and columns relative to the first tile; the tiles are centred.
        places = [np.arange(length) - length % size // 2 for length, size in axes]
        inside = np.logical_and.outer(
            *((at >= 0) & (at < n // s * s) for at, (n, s) in zip(places, axes, strict=True))
        )
        tile = profile(*sizes, self.norm)
        within = np.ix_(*(at % size for at, size in zip(places, sizes, strict=True)))
        upright, turned = (
            tf.constant(np.where(inside, form[within], 0.0)[..., np.newaxis], x.dtype)
            for form in (tile, tile if is_flat else tile.T)
        )
        flips = draws.uniform((1, 1, 1), 0, x.dtype) > 0
        numbers = [length // size for length, size in axes]
        signs = tf.sign(draws.uniform((*numbers, channels), 1, x.dtype))
        for axis, (at, size, number) in enumerate(zip(places, sizes, numbers, strict=True)):
            signs = tf.gather(signs, np.clip(at // size, 0, number - 1), axis=1 + axis)
        return tf.where(flips, turned, upright) * signs

    def _scaled(self, delta: tf.Tensor) -> tf.Tensor:
        """Return perturbations scaled to length epsilon; unchanged in l1, for the projection."""
        return delta if self.norm == "l1" else self._unit(delta) * self.epsilon_value

    def _length(self, values: tf.Tensor, axes: tuple[int, ...] = (1, 2, 3)) -> tf.Tensor:
        """Return l2 or l1 norms over some axes, which are kept with size 1."""
        if self.norm == "l1":
            return tf.reduce_sum(tf.abs(values), axis=axes, keepdims=True)
        return tf.sqrt(tf.reduce_sum(tf.square(values), axis=axes, keepdims=True))

    def _unit(self, values: tf.Tensor, axes: tuple[int, ...] = (1, 2, 3)) -> tf.Tensor:
        """Return values scaled to length 1 over some axes; 0 for 0."""
        return values / (self._length(values, axes) + 1e-12)

    def _sides(self, x: tf.Tensor) -> list[int]:
        """Return the heights of the windows in all iterations; odd and >= 3 in l2 and l1."""
        height, width = x.shape[1:3]
        largest = height if width == 1 else min(height, width)
        sides = []
        for query in range(self.queries):
            place = int(query / (self.horizon or self.queries) * 10_000)
            share = self.p_init / 2 ** bisect.bisect_left(_HALVINGS, place)
            side = round(share * height if width == 1 else math.sqrt(share * height * width))
            side = max(side, 1) if self.norm == "linf" else max(side, 3) // 2 * 2 + 1
            sides.append(min(side, largest))
        return sides

    def _profile(
        self, x: tf.Tensor, windows: _Windows, side: tf.Tensor, flips: tf.Tensor
    ) -> tf.Tensor:
        """Return images that are zero except for the profile in the windows.

        Args:
            x: the images.
            windows: the windows.
            side: the height of the windows.
            flips: per example whether the pyramids are side by side instead of one above the
                other; only square windows are flipped.
        """
        sides = sorted(set(self._sides(x)))
        is_flat = x.shape[2] == 1
        across = 1 if is_flat else sides[-1]
        # All profiles, padded to the size of the largest and concatenated.
        table = np.zeros((len(sides), sides[-1], across))
        for number, each in enumerate(sides):
            table[number, :each, : 1 if is_flat else each] = profile(
                each, 1 if is_flat else each, self.norm
            )
        rows, columns = windows.rows, windows.columns
        if not is_flat:
            rows, columns = tf.where(flips, columns, rows), tf.where(flips, rows, columns)
        first = tf.searchsorted(sides, side[tf.newaxis])[0] * (sides[-1] * across)
        places = tf.where(windows.inside, first + rows * across + columns, 0)
        values = tf.gather(tf.constant(table.reshape(-1), x.dtype), places)
        return tf.where(windows.inside, values, 0.0)


def _grid(x: tf.Tensor) -> tf.Tensor:
    """Return inputs as images of static shape, `(batch, height, width, channels)`."""
    shape = tuple(x.shape[1:])
    if None in shape:
        raise ValueError(
            f"x must have a static shape except for the batch axis, got {x.shape}: the windows of "
            "Square depend on it."
        )
    if _is_channels_first(x):
        return tf.transpose(x, (0, 2, 3, 1))
    if len(shape) == 2:
        shape = (*shape, 1)
    elif len(shape) != 3:
        shape = (math.prod(shape), 1, 1)
    return tf.reshape(x, (-1, *shape))


def _is_channels_first(x: tf.Tensor) -> bool:
    """Return whether inputs are square images with the channels first."""
    shape = tuple(x.shape[1:])
    return len(shape) == 3 and shape[0] in (1, 3) and 4 < shape[1] == shape[2]


def _position(draw: tf.Tensor, last: Any) -> tf.Tensor:
    """Return integers uniform in 0 to `last`, from draws from U(-1, 1)."""
    choices = tf.cast(last + 1, draw.dtype)
    return tf.minimum(tf.cast(tf.floor((draw + 1) / 2 * choices), tf.int32), last)


def _windows(x: tf.Tensor, side: tf.Tensor, draws: Draws, salt: Any) -> _Windows:
    """Return windows at random positions of images: squares, or intervals if the width is 1."""
    height, width = x.shape[1:3]
    across = side if width > 1 else tf.ones_like(side)
    row, first = (
        column(_position(draws.uniform((), salt + axis), size - length), 4)
        for axis, (size, length) in enumerate(((height, side), (width, across)))
    )
    rows = tf.range(height)[:, tf.newaxis, tf.newaxis] - row
    columns = tf.range(width)[:, tf.newaxis] - first
    is_row, is_column = (rows >= 0) & (rows < side), (columns >= 0) & (columns < across)
    return _Windows(rows, columns, is_row & is_column)


def profile(height: int, width: int, norm: str) -> np.ndarray:
    """Return two pyramids of opposite signs, one in each half (upper, lower), of norm 1 in total.

    A pyramid is the sum of concentric rectangles with weights 1/k² in l2 and 1/k⁴ in l1, where k
    counts from 1 at the centre.

    Args:
        height: in pixels.
        width: in pixels.
        norm: "l2" or "l1".
    """
    order, power = (1, 4) if norm == "l1" else (2, 2)

    def pyramid(height: int) -> np.ndarray:
        distances = (np.abs(np.arange(size) - size // 2) for size in (height, width))
        ring = np.maximum.outer(*distances)
        weights = 1.0 / np.arange(1, 2 + max(height, width) // 2) ** power
        outside = np.concatenate([np.cumsum(weights[::-1])[::-1], [0.0]])
        values = outside[ring]
        return values / max(np.linalg.norm(values.ravel(), order), 1e-12)

    half = height // 2
    both = np.concatenate([pyramid(half), -pyramid(height - half)])
    return both / np.linalg.norm(both.ravel(), order)
