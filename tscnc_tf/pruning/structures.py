"""Which weights are kept or pruned together: single ones, blocks, filters, n of every m.

A structure turns the scores of a weight tensor into those of its units, and a mask of units back
into a mask of weights. A unit's score is the mean of its weights' scores.
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
        """Tell whether all weights of a filter, or of several, are kept or go together."""
        return False

    def reachable(self, sparsity: float) -> float:
        """Return the sparsity that this structure gives where `sparsity` is asked for."""
        return sparsity

    def require(self, scope: Scope) -> None:
        """Raise a ValueError if this structure does not go with a scope."""

    @abc.abstractmethod
    def masks(
        self, scores: Sequence[tf.Tensor], targets: Sequence[Target], scope: Scope, sparsity: Any
    ) -> list[tf.Tensor]:
        """Return one mask per weight, True where it is kept.

        Args:
            scores: one tensor per weight, of its shape.
            targets: the weights.
            scope: how the kept weights are shared out.
            sparsity: fraction of zeros, a scalar, possibly a tensor.
        """

    def require_equal_units(self, targets: Sequence[Target]) -> None:
        """Raise a ValueError if weights are kept in units of several sizes."""

    @abc.abstractmethod
    def moved(self, moves: Sequence[Move], share: Any, across: int = 0) -> list[tf.Tensor]:
        """Return one mask per weight, in which as many weights are kept as before.

        A share of the units that are kept, those of the smallest worth, give their places to units
        of the largest gain, among which they are themselves.

        Args:
            moves: of the weights.
            share: fraction of the kept units, a scalar, possibly a tensor.
            across: 0: every weight tensor keeps as many as before. Else units of all tensors take
                each other's places, and each tensor keeps that many weights at least.
        """


class Move(NamedTuple):
    """What decides which entries of a weight tensor change places: float tensors of its shape.

    Attributes:
        target: the weight.
        mask: True where it is kept.
        worth: of what is kept; finite.
        gain: of what takes its place; finite.
    """

    target: Target
    mask: tf.Tensor
    worth: tf.Tensor
    gain: tf.Tensor

    @property
    def ranked(self) -> tf.Tensor:
        """The worth of what is kept, and -inf elsewhere."""
        return tf.where(self.mask, self.worth, tf.constant(-np.inf, self.worth.dtype))


class _Ranked(Structure):
    """Structures whose units compete by their scores, as the scope has it."""

    def masks(
        self, scores: Sequence[tf.Tensor], targets: Sequence[Target], scope: Scope, sparsity: Any
    ) -> list[tf.Tensor]:
        """Return one mask per weight, True where it is kept."""
        units = [self._units(*pair) for pair in zip(scores, targets, strict=True)]
        chosen = scope.choose(units, sparsity)
        return [self._spread(*pair) for pair in zip(chosen, targets, strict=True)]

    def moved(self, moves: Sequence[Move], share: Any, across: int = 0) -> list[tf.Tensor]:
        """Return one mask per weight, in which as many weights are kept as before."""
        units = [self._units(move.ranked, move.target) for move in moves]
        gains = [self._units(move.gain, move.target).scores for move in moves]
        kept = [unit.scores > -np.inf for unit in units]
        worth = [unit.ranks for unit in units]
        if across:
            fixed = [functional.largest(ranks, across) for ranks in worth]
            pairs = zip(fixed, worth, strict=True)
            worth = [tf.where(best, tf.constant(np.inf, r.dtype), r) for best, r in pairs]
            lengths = [int(ranks.shape[0]) for ranks in worth]
            joint = [tf.concat(each, axis=0) for each in (kept, worth, gains)]
            chosen = tf.split(_exchanged(joint[0], joint[1], joint[2], share), lengths)
        else:
            rows = zip(kept, worth, gains, strict=True)
            chosen = [_exchanged(mask, ranks, gain, share) for mask, ranks, gain in rows]
        return [self._spread(*pair) for pair in zip(chosen, (m.target for m in moves), strict=True)]

    @abc.abstractmethod
    def _units(self, scores: tf.Tensor, target: Target) -> Units:
        """Return the scores of a weight's units."""

    @abc.abstractmethod
    def _spread(self, mask: tf.Tensor, target: Target) -> tf.Tensor:
        """Return a mask of units as one of weights."""


@_keras.register
@dataclasses.dataclass(frozen=True)
class Unstructured(_Ranked):
    """Single weights, wherever they are.

    A filter (all weights that lead to one output channel or unit) that loses its last weight is
    dead: its output no longer depends on the input, and the condition number of the kernel is
    infinite. With a minimum per filter no filter dies, at any sparsity: the largest weights of each
    are kept first, and the others compete for what is left. With a minimum per input, every input
    channel or unit leads to something, too: both together keep paths open from the inputs of the
    model to its outputs. Where the sparsity leaves fewer weights than all the minima together, that
    many are kept, and no more; with scope "layer", and sparsities by name, that holds for each
    weight tensor by itself, so that all together may keep more than either.

    Args:
        min_per_filter: how many weights every filter keeps at least (all, if it has fewer), >= 0.
        min_per_input: how many weights every input channel or unit keeps, likewise.

    Raises:
        TypeError, ValueError: a minimum is no such number.

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
        """Return why a weight has no filters and inputs, if these matter, or an empty text."""
        has_minimum = self.min_per_filter or self.min_per_input
        return _UNREAD if has_minimum and not target.layout else ""

    def _units(self, scores: tf.Tensor, target: Target) -> Units:
        flat = tf.reshape(scores, (-1,))
        # Of the axes (groups, positions, inputs, outputs), what a filter or an input is one of.
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
        if number == 1:  # under XLA the other is a sort
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
    """Whole filters: all weights that lead to one output channel or unit.

    What is left can be made smaller by `pruning.compact`, and is faster then on any hardware.

    The layers that make the model's outputs (its logits) are left out, unless `layers=` chooses
    them: half of their filters would be half of the classes. Of a subclassed model, or of a last
    layer of your own that holds others, it is not known which these are: leave them out by
    `layers=`.

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
        """Return why a weight has no filters, or an empty text."""
        return "" if target.layout else _UNREAD

    def removes_outputs(self, target: Target) -> bool:
        """Tell whether all weights of a filter are kept or go together: they do."""
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

    Blocks at the end of a matrix whose sides are no multiples are smaller. Where a block is as high
    as the matrix, whole filters go, so what `Filters` says of the model's outputs holds there.

    Args:
        rows: of a block, along positions and inputs, >= 1.
        columns: of a block, along outputs, >= 1.

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
            precision: of the file, "float32" or "int8"; in float16 there are none.

        Raises:
            ValueError: it is another one.

        Example:
            >>> import tscnc_tf as tscnc
            >>> tscnc.pruning.Block.for_litert()
            Block(rows=4, columns=1)
        """
        rows = {"float32": 4, "int8": 16}
        return cls(rows[_checks.one_of("precision", precision, tuple(rows))], 1)

    def reason(self, target: Target) -> str:
        """Return why a weight has no such blocks, or an empty text."""
        return "" if target.layout else _UNREAD

    def removes_outputs(self, target: Target) -> bool:
        """Tell whether a block is as high as the matrix: all weights of a filter, or of several."""
        if not target.layout:
            return False
        _, positions, inputs, _ = target.canonical_shape
        return self.rows >= positions * inputs

    def require_equal_units(self, targets: Sequence[Target]) -> None:
        """Raise a ValueError if there are smaller blocks at the end of a matrix."""
        for target in targets:
            _, positions, inputs, outputs = target.canonical_shape
            if positions * inputs % self.rows or outputs % self.columns:
                raise ValueError(
                    f"structure={self!r} makes blocks of several sizes of {target.name!r}, a "
                    f"matrix of {positions * inputs} x {outputs}, so that blocks can't take each "
                    "other's places: choose rows and columns that divide its sides, or leave it "
                    "out by layers=."
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
    """N of every M weights along the input axis: 2:4 is what sparse tensor cores compute with.

    At a sparsity s, ceil(M·(1 - s)) weights of every M are kept, never fewer than N: so a schedule
    that rises to 1 - N/M thins the groups out step by step. Of an incomplete group at the end of an
    axis the same number is kept, as far as it has so many.

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
        """Return why a weight has no such groups, or an empty text."""
        if not target.layout:
            return _UNREAD
        inputs = target.canonical_shape[2]
        if inputs < self.m:
            return f"it has {inputs} inputs per output, fewer than a group of {self.m}"
        return ""

    def reachable(self, sparsity: float) -> float:
        """Return the sparsity of the pattern, if that much or more is asked for."""
        return 1.0 - int(self._kept(sparsity)) / self.m

    def masks(
        self,
        scores: Sequence[tf.Tensor],
        targets: Sequence[Target],
        scope: Scope,  # noqa: ARG002
        sparsity: Any,
    ) -> list[tf.Tensor]:
        """Return one mask per weight; see the class."""
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
        # Less a tolerance before rounding up: in float32 4·(1 - 0.75) may be 1.0000001.
        kept = tf.math.ceil(self.m * (1.0 - tf.cast(sparsity, tf.float32)) - 1e-4)
        return tf.clip_by_value(tf.cast(kept, tf.int32), self.n, self.m)

    def moved(self, moves: Sequence[Move], share: Any, across: int = 0) -> list[tf.Tensor]:  # noqa: ARG002
        """Return one mask per weight, in which every group keeps as many as before."""

        def flat(values: tf.Tensor) -> tf.Tensor:
            return tf.reshape(values, (-1,))

        chosen = []
        for target, mask, worth, gain in moves:
            stays = functional.largest_share(flat(mask), flat(worth), share)
            ranks = tf.where(tf.reshape(stays, target.shape), np.inf, gain)
            lowest = tf.zeros((), gain.dtype)
            groups = self._groups(tf.cast(mask, gain.dtype), target, lowest)
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
        # Padding has the rank of pruned weights, and comes after them as it is last.
        rows = self._groups(scores, target, tf.constant(-np.inf, scores.dtype))
        mask = functional.largest_per_row(rows, kept)
        mask = tf.reshape(mask, (*rows.shape[:3], -1))[..., : target.canonical_shape[2]]
        return target.restore(tf.transpose(mask, (0, 1, 3, 2)))


def _exchanged(kept: tf.Tensor, worth: tf.Tensor, gains: tf.Tensor, share: Any) -> tf.Tensor:
    """Return a mask with as many entries as `kept`: those that stay, then the largest gains."""
    stays = functional.largest_share(kept, worth, share)
    count = tf.reduce_sum(tf.cast(kept, tf.int32))
    return functional.largest(tf.where(stays, tf.constant(np.inf, gains.dtype), gains), count)


def unfit(structure: Structure | None, layers: Any) -> Callable[[Target], str]:
    """Return a function that says why a weight is not pruned in a structure, if it is not.

    Args:
        structure: what is asked for; None for single weights.
        layers: the layers that are chosen, None for all: then outputs of the model are not pruned.
    """

    def reason(target: Target) -> str:
        if not isinstance(structure, Structure):
            return ""
        why = structure.reason(target)
        is_spared = layers is None and target.makes_outputs and structure.removes_outputs(target)
        if why or not is_spared:
            return why
        return (
            f"it makes the model's outputs, and {structure!r} would take whole ones away; choose "
            "it by layers= to prune it"
        )

    return reason


_UNREAD = "it is not known which of its axes are inputs and which outputs"
