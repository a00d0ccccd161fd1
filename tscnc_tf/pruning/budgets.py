"""Sparsities of layers that keep the sum of their log condition numbers low."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, functional
from tscnc_tf._keras import optimizers
from tscnc_tf._keras.flavours import tensor_variable
from tscnc_tf.pruning.selection import Selection
from tscnc_tf.pruning.structures import Filters, Unstructured
from tscnc_tf.pruning.targets import FROZEN, Target, candidates, require_model

__all__ = ["condition_budgets"]

_LEVELS = 24  # densities that are measured for each layer


def condition_budgets(
    model: Any,
    sparsity: float,
    *,
    layers: Any = None,
    weights: str | None = None,
    min_rank: int = 2,
    min_per_filter: int = 1,
    lowest: float = 0.25,
) -> dict[str, float]:
    r"""Return a sparsity for each layer, by its name, that keeps condition numbers low: a `scope`.

    Some kernels become ill-conditioned at a lower sparsity than others. Together, the layers
    (without frozen ones, which are not pruned) keep as many weights k as with the same `sparsity`
    for all. They are distributed so that

    .. math:: \sum_l \log \kappa\left(w_l \odot m_l(k_l)\right), \qquad \sum_l k_l = k

    is small, where :math:`m_l(k)` is the mask of the k largest weights of layer l. The condition
    number of each layer is measured at 24 numbers of kept weights, by singular values. A kernel
    that is singular in float32, such as one with a dead filter, counts with the largest condition
    number of float32. Then weights are added one step after another where each lowers the sum most,
    along the lower convex hulls of the measurements. The last step may end between two measured
    numbers. If the same sparsity for all is no worse, it is returned.

    This is a heuristic. The condition numbers of layers do not add up to that of the network. They
    are measured on the present weights, which later training changes. Accuracy is not measured.

    Args:
        model: a built model of either Keras, trained already.
        sparsity: of all layers together, the fraction of zeros, in (0, 1).
        layers: which layers, as in `Pruner`. Give the same to the pruner.
        weights: a pattern for the names of weights, as in `Pruner`.
        min_rank: the smallest rank of a weight to prune, >= 2.
        min_per_filter: the minimum number of weights per filter. Give it to the pruner too, as
            `structure=Unstructured(min_per_filter)`.
        lowest: the minimum density of each layer, relative to that of all together, in (0, 1].

    Returns:
        Sparsities by name, for the argument `scope` of `prune`, `prune_now` or a pruner with the
        same final `sparsity`.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument is out of range, no weight is left to prune, a kernel is not finite,
            or the minima together exceed the number of weights that the sparsity leaves.

    Example:
        >>> import keras
        >>> import tscnc_tf as tscnc
        >>> model = keras.Sequential(
        ...     [keras.Input((64,)), keras.layers.Dense(32), keras.layers.Dense(10)])
        >>> budgets = tscnc.pruning.condition_budgets(model, 0.9)
        >>> model = tscnc.prune_now(
        ...     model, 0.9, scope=budgets, structure=tscnc.pruning.Unstructured(min_per_filter=1))
    """
    require_model(model)
    sparsity = _checks.number("sparsity", sparsity, above=0.0, below=1.0)
    structure = Unstructured(min_per_filter)
    lowest = _checks.number("lowest", lowest, above=0.0, maximum=1.0)
    found = candidates(model, layers, weights, min_rank, Filters().reason)
    trained = {optimizers.key(variable) for variable in model.trainable_variables}
    targets = [
        target
        for target, reason in found
        if not reason and optimizers.key(target.variable) in trained
    ]
    if not targets:
        reasons = {target.name: reason or FROZEN for target, reason in found}
        raise ValueError(
            f"model {model.name!r} has no kernel with a condition number among layers={layers!r}, "
            f"weights={weights!r}: {reasons}."
        )
    total = int(functional.kept_count(sum(target.size for target in targets), sparsity))
    measures = [_Measure(target, structure) for target in targets]
    curves = [measure.curve(lowest * (1.0 - sparsity)) for measure in measures]
    minimum = sum(curve.counts[0] for curve in curves)
    if minimum > total:
        raise ValueError(
            f"at a sparsity of {sparsity:g} the layers keep {total:,} weights in all, fewer than "
            f"the {minimum:,} that min_per_filter={min_per_filter} and lowest={lowest:g} ask for: "
            "lower these, or prune less."
        )
    uniform = [int(functional.kept_count(target.size, sparsity)) for target in targets]
    limit = max(total, sum(uniform))
    allocations = [
        counts
        for counts in (uniform, _share(curves, total))
        if sum(counts) <= limit
        and all(count >= curve.counts[0] for count, curve in zip(counts, curves, strict=True))
    ]
    best = min(
        allocations,
        key=lambda counts: sum(m.cost(count) for m, count in zip(measures, counts, strict=True)),
    )
    return {
        target.name: 1.0 - kept / target.size for target, kept in zip(targets, best, strict=True)
    }


class _Curve(NamedTuple):
    """The condition number of a layer as a function of the number of kept weights.

    Attributes:
        counts: the numbers of weights, in increasing order; the last is all.
        costs: the logarithms of the condition numbers.
    """

    counts: list[int]
    costs: list[float]


class _Measure:
    """Measures the condition numbers of a weight that is pruned by magnitude.

    Args:
        target: the weight.
        structure: has the minimum per filter.
    """

    def __init__(self, target: Target, structure: Unstructured) -> None:
        self._target = target
        self._minimum = min(structure.min_per_filter * (target.outputs or 0), target.size)
        self._selection = Selection([target], None, structure, "layer", 1, 0.0)
        self._weight = tf.convert_to_tensor(tensor_variable(target.variable))

    def curve(self, lowest: float) -> _Curve:
        """Return the measurements at densities of at least `lowest`."""
        size = self._target.size
        first = max(1, self._minimum, math.ceil(lowest * size))
        counts = np.unique(np.round(np.geomspace(first, size, _LEVELS)).astype(int)).tolist()
        return _Curve(counts, [self.cost(count) for count in counts])

    def cost(self, count: int) -> float:
        """Return log κ for this number of kept weights."""
        target, alive = self._target, [tf.ones(self._target.shape, tf.bool)]
        (mask,) = self._selection.masks(1.0 - count / target.size, alive)
        kernel = tf.where(mask, self._weight, tf.zeros_like(self._weight))
        return _log_condition(functional.matrices(kernel, target.layout, target.channel_groups))


def _log_condition(matrices: tf.Tensor) -> float:
    """Return log κ of the worst of some matrices, at most the limit of float32."""
    matrices = np.asarray(tf.cast(matrices, tf.float64))
    spectra = np.linalg.svd(matrices, compute_uv=False)
    limit = max(matrices.shape[-2:]) * float(np.finfo(np.float32).eps)
    ratios = spectra[:, -1] / np.maximum(spectra[:, 0], np.finfo(np.float64).tiny)
    return -math.log(max(float(ratios.min()), limit))


def _share(curves: list[_Curve], total: int) -> list[int]:
    """Return the number of kept weights of each layer: its minimum, and more by steepest slope."""
    kept = [curve.counts[0] for curve in curves]
    left = total - sum(kept)
    steps = [
        (slope, layer, count) for layer, curve in enumerate(curves) for slope, count in _hull(curve)
    ]
    for _, layer, count in sorted(steps):  # the slopes of a layer increase with the count
        more = min(count - kept[layer], left)
        kept[layer] += more
        left -= more
    return kept


def _hull(curve: _Curve) -> list[tuple[float, int]]:
    """Return (slope, count at its end) of each edge of the lower convex hull of a curve."""
    points = list(zip(curve.counts, curve.costs, strict=True))
    steps, here = [], 0
    while here + 1 < len(points):
        count, cost = points[here]
        slopes = [(other - cost) / (more - count) for more, other in points[here + 1 :]]
        here += 1 + slopes.index(min(slopes))
        steps.append((min(slopes), points[here][0]))
    return steps
