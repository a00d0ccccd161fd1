"""Structures: which weights are kept or pruned together (single ones, blocks, filters, N:M).

A structure computes the scores of units from those of weights, and a mask of weights from a mask of
units. A unit's score is the mean of its weights' scores.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _configs, _keras, functional
from tscnc_tf.pruning.scopes import Scope, Units
from tscnc_tf.pruning.targets import Target

__all__ = ["Block", "Filters", "NM", "Structure", "Unstructured"]


@dataclasses.dataclass(frozen=True)
class Structure(_configs.Configurable, abc.ABC):
    """Base of the structures."""

    def reason(self, target: Target) -> str:  # noqa: ARG002
        """Return why a weight can't be pruned in this structure, or an empty text."""
        return ""

    def removes_outputs(self, target: Target) -> bool:  # noqa: ARG002
        """Return whether a unit contains whole filters."""
        return False

    def reachable(self, sparsity: float) -> float:
        """Return the sparsity of this structure if `sparsity` is asked for."""
        return sparsity

    def require(self, scope: Scope) -> None:
        """Raise a ValueError if this structure does not support a scope."""

    @abc.abstractmethod
    def masks(
        self, scores: Sequence[tf.Tensor], targets: Sequence[Target], scope: Scope, sparsity: Any
    ) -> list[tf.Tensor]:
        """Return one mask per weight tensor, True where a weight is kept.

        Args:
            scores: one tensor per weight tensor, of its shape.
            targets: the weight tensors.
            scope: how the kept weights are distributed among the tensors.
            sparsity: fraction of zeros, a scalar, possibly a tensor.
        """

    def require_equal_units(self, targets: Sequence[Target]) -> None:
        """Raise a ValueError if units have different sizes."""

    @abc.abstractmethod
    def moved(self, moves: Sequence[Move], exchange: Exchange) -> list[tf.Tensor]:
        """Return one mask per weight tensor after an exchange.

        A share of the kept units, those with the smallest `keep_score`, is dropped. The same number
        of units with the largest `grow_score`, among all pruned and dropped ones, is kept instead.

        Args:
            moves: one per weight tensor.
            exchange: how many units are exchanged.
        """


class Exchange(NamedTuple):
    """How many units are exchanged; shares are scalars, possibly tensors.

    Attributes:
        share: fraction of the kept units that is dropped and replaced.
        min_units: the minimum number of kept units of each tensor; needed only if that number
            changes.
        across: whether units are exchanged between tensors, too.
        extra_drop: by what share more units are dropped, which are not replaced; None, as for
            `extra_growth`, if the number of kept units does not change.
        extra_growth: by what share more units grow.
    """

    share: Any
    min_units: int = 0
    across: bool = False
    extra_drop: Any = None
    extra_growth: Any = None


class Move(NamedTuple):
    """A weight tensor and the scores by which its entries are exchanged; tensors of its shape.

    Attributes:
        target: the weight tensor.
        mask: True where a weight is kept.
        keep_score: of kept weights; the smallest are dropped. Finite.
        grow_score: of pruned and dropped weights; the largest grow. Finite.
    """

    target: Target
    mask: tf.Tensor
    keep_score: tf.Tensor
    grow_score: tf.Tensor

    @property
    def ranked(self) -> tf.Tensor:
        """The keep scores of kept weights, and -inf elsewhere."""
        return tf.where(self.mask, self.keep_score, tf.constant(-np.inf, self.keep_score.dtype))


class _Ranked(Structure):
    """Base of structures whose units compete by their scores, according to the scope."""

    def masks(
        self, scores: Sequence[tf.Tensor], targets: Sequence[Target], scope: Scope, sparsity: Any
    ) -> list[tf.Tensor]:
        """Return one mask per weight tensor, True where a weight is kept."""
        units = [self._units(*pair) for pair in zip(scores, targets, strict=True)]
        chosen = scope.choose(units, sparsity)
        return [self._spread(*pair) for pair in zip(chosen, targets, strict=True)]

    def moved(self, moves: Sequence[Move], exchange: Exchange) -> list[tf.Tensor]:
        """Return one mask per weight tensor after an exchange."""
        units = [self._units(move.ranked, move.target) for move in moves]
        grow = [self._units(move.grow_score, move.target).scores for move in moves]
        kept = [unit.scores > -np.inf for unit in units]
        keep = [unit.ranks for unit in units]
        if exchange.min_units:
            fixed = [functional.largest(ranks, exchange.min_units) for ranks in keep]
            pairs = zip(fixed, keep, strict=True)
            keep = [tf.where(best, tf.constant(np.inf, r.dtype), r) for best, r in pairs]
        if exchange.across:
            lengths = [int(ranks.shape[0]) for ranks in keep]
            joint = [tf.concat(each, axis=0) for each in (kept, keep, grow)]
            chosen = tf.split(_exchanged(joint[0], joint[1], joint[2], exchange), lengths)
        else:
            chosen = [_exchanged(*row, exchange) for row in zip(kept, keep, grow, strict=True)]
        return [self._spread(*pair) for pair in zip(chosen, (m.target for m in moves), strict=True)]

    @abc.abstractmethod
    def _units(self, scores: tf.Tensor, target: Target) -> Units:
        """Return the units of a weight tensor, with scores."""

    @abc.abstractmethod
    def _spread(self, mask: tf.Tensor, target: Target) -> tf.Tensor:
        """Return the mask of weights for a mask of units."""


@_keras.register
@dataclasses.dataclass(frozen=True)
class Unstructured(_Ranked):
    """Single weights, each kept or pruned by itself.

    A filter (all weights of one output channel or unit) without any kept weight is dead: its output
    does not depend on the input, and the condition number of the kernel is infinite. With a minimum
    per filter no filter dies, at any sparsity: the largest weights of each filter are kept first,
    and the others compete for the rest. With a minimum per input, every input channel or unit is
    read, too. Both together keep paths from the inputs of the model to its outputs. If the sparsity
    leaves fewer weights than all minima together, exactly the minima are kept. With scope "layer",
    and sparsities by name, this holds for each weight tensor separately, so that the total may
    exceed both numbers.

    Args:
        min_per_filter: the minimum number of kept weights of every filter (all, if it has fewer),
            >= 0.
        min_per_input: likewise, of every input channel or unit.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> import keras
        >>> import tscnc_tf as tscnc
        >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32)])
        >>> alive = tscnc.pruning.Unstructured(min_per_filter=1)
        >>> model = tscnc.prune_now(model, 0.95, structure=alive)
        >>> tscnc.inspection.condition_numbers(model).dead_filters
        0
    """

    min_per_filter: int = 0
    min_per_input: int = 0

    def __post_init__(self) -> None:
        _checks.integer("min_per_filter", self.min_per_filter, minimum=0)
        _checks.integer("min_per_input", self.min_per_input, minimum=0)

    def reason(self, target: Target) -> str:
        """Return why a weight tensor can't have these minima, or an empty text."""
        has_minimum = self.min_per_filter or self.min_per_input
        return _UNKNOWN_AXES if has_minimum and not target.layout else ""

    def _units(self, scores: tf.Tensor, target: Target) -> Units:
        flat = tf.reshape(scores, (-1,))
        # A filter is a slice along the axes 0 and 3 of (groups, positions, inputs, outputs), an
        # input along 0 and 2.
        guards = [
            self._guard(scores, target, number, axes)
            for number, axes in ((self.min_per_filter, (0, 3)), (self.min_per_input, (0, 2)))
            if number
        ]
        if not guards:
            return Units(flat, 1, target.size)
        guard = functools.reduce(tf.logical_or, guards)
        return Units(flat, 1, target.size, tf.reshape(guard, (-1,)))

    @staticmethod
    def _guard(scores: tf.Tensor, target: Target, number: int, axes: tuple[int, int]) -> tf.Tensor:
        """Return a mask of the largest scores of each slice along two of the canonical axes."""
        others = tuple(axis for axis in range(4) if axis not in axes)
        moved = tf.transpose(target.canonical(scores), (*axes, *others))
        slices = tf.reshape(moved, (moved.shape[0] * moved.shape[1], -1))
        size = slices.shape[1]
        number = min(number, size)
        if number == 1:  # under XLA, top_k is a sort
            best = tf.argmax(slices, axis=1, output_type=tf.int32)[:, tf.newaxis]
        else:
            best = tf.math.top_k(slices, number).indices
        mask = tf.reduce_any(tf.one_hot(best, size, True, False), axis=1)
        back = np.argsort((*axes, *others))
        return target.restore(tf.transpose(tf.reshape(mask, moved.shape), back))

    def _spread(self, mask: tf.Tensor, target: Target) -> tf.Tensor:
        return tf.reshape(mask, target.shape)


@_keras.register
@dataclasses.dataclass(frozen=True)
class Filters(_Ranked):
    """Whole filters: all weights of one output channel or unit.

    `pruning.compact` makes the pruned network smaller, and so faster on any hardware.

    The layers that make the model's outputs (its logits) are not pruned, unless `layers=` chooses
    them: half of their filters would be half of the classes. In a subclassed model, or with a last
    layer of your own that contains others, these layers are not known: exclude them by `layers=`.

    Example:
        >>> import keras
        >>> import tscnc_tf as tscnc
        >>> model = keras.Sequential(
        ...     [keras.Input((64,)), keras.layers.Dense(32), keras.layers.Dense(10)])
        >>> model = tscnc.prune_now(model, 0.75, structure=tscnc.pruning.Filters())
        >>> tscnc.inspection.condition_numbers(model).dead_filters
        24
    """

    def reason(self, target: Target) -> str:
        """Return why the filters of a weight tensor are not known, or an empty text."""
        return "" if target.layout else _UNKNOWN_AXES

    def removes_outputs(self, target: Target) -> bool:
        """Return whether the filters of a weight tensor are known."""
        return bool(target.layout)

    def _units(self, scores: tf.Tensor, target: Target) -> Units:
        _, positions, inputs, _ = target.canonical_shape
        means = tf.reduce_mean(target.canonical(scores), axis=(1, 2))
        return Units(tf.reshape(means, (-1,)), positions * inputs, target.size)

    def _spread(self, mask: tf.Tensor, target: Target) -> tf.Tensor:
        groups, positions, inputs, outputs = target.canonical_shape
        mask = tf.reshape(mask, (groups, 1, 1, outputs))
        return target.restore(tf.broadcast_to(mask, (groups, positions, inputs, outputs)))


@_keras.register
@dataclasses.dataclass(frozen=True)
class Block(_Ranked):
    """Blocks of the kernel as a matrix of (positions and inputs) × outputs.

    If the sides of the matrix are no multiples of these, the last blocks are smaller. A block as
    high as the matrix consists of whole filters: then the model's outputs are treated as with
    `Filters`.

    Args:
        rows: the height of a block, along positions and inputs, >= 1.
        columns: the width of a block, along outputs, >= 1.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> import tscnc_tf as tscnc
        >>> structure = tscnc.pruning.Block(4, 4)
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        _checks.integer("rows", self.rows, minimum=1)
        _checks.integer("columns", self.columns, minimum=1)

    @classmethod
    def for_litert(cls, precision: str = "float32") -> Self:
        """Return the blocks that LiteRT runs sparsely in dense layers, on x86 and ARM.

        4 inputs by 1 output in float32, 16 by 1 in int8; see `export_litert(sparse=True)`.

        Args:
            precision: of the file, "float32" or "int8"; there are no such blocks for float16.

        Raises:
            ValueError: `precision` is neither.

        Example:
            >>> import tscnc_tf as tscnc
            >>> tscnc.pruning.Block.for_litert()
            Block(rows=4, columns=1)
        """
        rows = {"float32": 4, "int8": 16}
        return cls(rows[_checks.one_of("precision", precision, tuple(rows))], 1)

    def reason(self, target: Target) -> str:
        """Return why the blocks of a weight tensor are not known, or an empty text."""
        return "" if target.layout else _UNKNOWN_AXES

    def removes_outputs(self, target: Target) -> bool:
        """Return whether a block is as high as the matrix."""
        if not target.layout:
            return False
        _, positions, inputs, _ = target.canonical_shape
        return self.rows >= positions * inputs

    def require_equal_units(self, targets: Sequence[Target]) -> None:
        """Raise a ValueError if a matrix has smaller blocks at its end."""
        for target in targets:
            _, positions, inputs, outputs = target.canonical_shape
            if positions * inputs % self.rows or outputs % self.columns:
                raise ValueError(
                    f"structure={self!r} makes blocks of several sizes of {target.name!r}, a "
                    f"matrix of {positions * inputs} x {outputs}, so regrowth can't exchange "
                    "blocks: choose rows and columns that divide its sides, or leave it out by "
                    "layers=."
                )

    def _units(self, scores: tf.Tensor, target: Target) -> Units:
        groups, positions, inputs, outputs = target.canonical_shape
        height = positions * inputs
        down, right = -height % self.rows, -outputs % self.columns
        matrix = tf.reshape(target.canonical(scores), (groups, height, outputs))
        padded = tf.pad(matrix, ((0, 0), (0, down), (0, right)))
        shape = (groups, (height + down) // self.rows, self.rows, -1, self.columns)
        sums = tf.reshape(tf.reduce_sum(tf.reshape(padded, shape), axis=(2, 4)), (-1,))
        heights = np.minimum(self.rows, height - np.arange(0, height, self.rows))
        widths = np.minimum(self.columns, outputs - np.arange(0, outputs, self.columns))
        sizes = np.tile(np.outer(heights, widths).ravel(), groups)
        size = int(sizes[0]) if np.all(sizes == sizes[0]) else sizes
        return Units(sums / tf.constant(sizes, sums.dtype), size, target.size)

    def _spread(self, mask: tf.Tensor, target: Target) -> tf.Tensor:
        groups, positions, inputs, outputs = target.canonical_shape
        height = positions * inputs
        mask = tf.reshape(mask, (groups, -(-height // self.rows), -(-outputs // self.columns)))
        mask = tf.repeat(tf.repeat(mask, self.rows, axis=1), self.columns, axis=2)
        mask = mask[:, :height, :outputs]
        return target.restore(tf.reshape(mask, target.canonical_shape))


@_keras.register
@dataclasses.dataclass(frozen=True)
class NM(Structure):
    """N of every M weights along the input axis; sparse tensor cores support 2:4.

    At a sparsity s, ceil(M·(1 - s)) weights of every M are kept, but at least N. So a schedule that
    rises to 1 - N/M prunes the groups step by step. An incomplete group at the end of an axis keeps
    the same number, or all its weights if it has fewer.

    Args:
        n: weights kept of each group, >= 1.
        m: size of a group, > n.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> import tscnc_tf as tscnc
        >>> structure = tscnc.pruning.NM(2, 4)

    Reference:
        Mishra et al. 2021, arXiv 2104.08378.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        _checks.integer("n", self.n, minimum=1)
        _checks.integer("m", self.m, minimum=self.n + 1)

    def reason(self, target: Target) -> str:
        """Return why a weight tensor has no such groups, or an empty text."""
        if not target.layout:
            return _UNKNOWN_AXES
        inputs = target.canonical_shape[2]
        if inputs < self.m:
            return f"it has {inputs} inputs per output, fewer than a group of {self.m}"
        return ""

    def reachable(self, sparsity: float) -> float:
        """Return the sparsity of the groups: at most that of the pattern, 1 - N/M."""
        return 1.0 - int(self._kept(sparsity)) / self.m

    def masks(
        self,
        scores: Sequence[tf.Tensor],
        targets: Sequence[Target],
        scope: Scope,  # noqa: ARG002
        sparsity: Any,
    ) -> list[tf.Tensor]:
        """Return one mask per weight tensor; see the class."""
        kept = self._kept(sparsity)
        return [self._mask(*pair, kept) for pair in zip(scores, targets, strict=True)]

    def require(self, scope: Scope) -> None:
        """Raise a ValueError unless the scope is per layer, and without a minimum."""
        if not scope.is_per_layer or scope.min_weights > 1:
            raise ValueError(
                f"scope must be 'layer' and min_weights 1 with structure={self!r}, which fixes how "
                f"many weights are kept in every group; got min_weights={scope.min_weights}."
            )

    def _kept(self, sparsity: Any) -> tf.Tensor:
        # The tolerance is for rounding errors: in float32 4·(1 - 0.75) may be 1.0000001.
        kept = tf.math.ceil(self.m * (1.0 - tf.cast(sparsity, tf.float32)) - 1e-4)
        return tf.clip_by_value(tf.cast(kept, tf.int32), self.n, self.m)

    def moved(self, moves: Sequence[Move], exchange: Exchange) -> list[tf.Tensor]:
        """Return one mask per weight tensor; the number of kept weights per group is unchanged."""

        def flat(values: tf.Tensor) -> tf.Tensor:
            return tf.reshape(values, (-1,))

        chosen = []
        for target, mask, keep, grow in moves:
            stays = functional.largest_share(flat(mask), flat(keep), exchange.share)
            ranks = tf.where(tf.reshape(stays, target.shape), np.inf, grow)
            groups = self._groups(tf.cast(mask, grow.dtype), target, tf.zeros((), grow.dtype))
            kept = tf.cast(tf.reduce_max(tf.reduce_sum(groups, axis=-1)), tf.int32)
            chosen.append(self._mask(ranks, target, kept))
        return chosen

    def _groups(self, values: tf.Tensor, target: Target, padding: tf.Tensor) -> tf.Tensor:
        """Return values as `(groups, positions, outputs, groups of m, m)`."""
        groups, positions, inputs, outputs = target.canonical_shape
        values = tf.transpose(target.canonical(values), (0, 1, 3, 2))
        missing = ((0, 0), (0, 0), (0, 0), (0, -inputs % self.m))
        values = tf.pad(values, missing, constant_values=padding)
        return tf.reshape(values, (groups, positions, outputs, -1, self.m))

    def _mask(self, scores: tf.Tensor, target: Target, kept: tf.Tensor) -> tf.Tensor:
        # Padding ranks as pruned weights do, and after them, as ties go to the first.
        rows = self._groups(scores, target, tf.constant(-np.inf, scores.dtype))
        mask = functional.largest_per_row(rows, kept)
        mask = tf.reshape(mask, (*rows.shape[:3], -1))[..., : target.canonical_shape[2]]
        return target.restore(tf.transpose(mask, (0, 1, 3, 2)))


def _exchanged(kept: tf.Tensor, keep: tf.Tensor, grow: tf.Tensor, exchange: Exchange) -> tf.Tensor:
    """Return a mask of the units that stay and the largest of `grow`; see `Structure.moved`."""

    def number(mask: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.cast(mask, tf.int32))

    def rounded(fraction: Any) -> tf.Tensor:
        share = exchange.share * fraction
        return tf.cast(tf.round(share * tf.cast(count, tf.float32)), tf.int32)

    stays, count = functional.largest_share(kept, keep, exchange.share), number(kept)
    new_count = count
    if exchange.extra_drop is not None:
        drop, growth = rounded(exchange.extra_drop), rounded(exchange.extra_growth)
        ranks = tf.where(stays, keep, tf.constant(-np.inf, keep.dtype))
        held = number(tf.equal(ranks, np.inf))
        left = tf.maximum(number(stays) - drop, held)
        new_count = tf.maximum(count - drop, left) + growth
        stays &= functional.largest(ranks, left)
    return functional.largest(tf.where(stays, tf.constant(np.inf, grow.dtype), grow), new_count)


def unfit(structure: Structure | None, layers: Any) -> Callable[[Target], str]:
    """Return a function that returns why a structure can't prune a weight, or an empty text.

    Args:
        structure: the structure; None for single weights.
        layers: the chosen layers. None for all: then outputs of the model are not removed.
    """

    def reason(target: Target) -> str:
        if not isinstance(structure, Structure):
            return ""
        why = structure.reason(target)
        is_spared = layers is None and target.makes_outputs and structure.removes_outputs(target)
        if why or not is_spared:
            return why
        return (
            f"it makes the model's outputs, and {structure!r} would remove whole ones; choose it "
            "by layers= to prune it"
        )

    return reason


_UNKNOWN_AXES = "it is not known which of its axes are inputs and which outputs"
