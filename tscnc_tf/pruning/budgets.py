"""How many weights each layer may keep, so that the condition numbers of all together stay low."""

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

_LEVELS = 24  # densities that are tried for each layer


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

    Layers differ in how soon their kernels become ill-conditioned as they are pruned. All together
    (but for frozen ones, which are not pruned) keep as many weights as at one `sparsity` for all,
    shared out so that

    .. math:: \sum_l \log \kappa\left(w_l \odot m_l(k_l)\right), \qquad \sum_l k_l = k

    is small, :math:`m_l(k)` being the k largest weights of layer l. For each layer the condition
    number is measured at 24 numbers of weights, by singular values (a kernel that is singular in
    float32, a dead filter being enough, counts as one at that limit). Then weights go where they
    lower the sum most, each, along the lower convex hulls of what was measured; the last step may
    end between two of these numbers. If one sparsity for all turns out no worse, it is that one.

    It is a heuristic: condition numbers of layers do not add up to one of the network, the weights
    are judged as they are when it is called, before training has gone on, and accuracy is not in
    it.

    Args:
        model: a built model of either Keras, trained already.
        sparsity: of all layers together, the fraction of zeros, in (0, 1).
        layers: which layers, as in `Pruner`: give both the same.
        weights: a pattern for the names of weights, as in `Pruner`.
        min_rank: the smallest rank of a weight to prune.
        min_per_filter: how many weights every filter keeps at least; to be given to the pruner too,
            as `structure=Unstructured(min_per_filter)`.
        lowest: what no layer falls below: this part of the density of all, in (0, 1].

    Returns:
        Sparsities by name, to be given as `scope=` to `prune`, `prune_now` or a pruner that leads
        to the same `sparsity`.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: an argument is out of range, nothing is left to prune, a kernel is not finite,
            or the minima alone are more than what the sparsity leaves.

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
    least = sum(curve.counts[0] for curve in curves)
    if least > total:
        raise ValueError(
            f"at a sparsity of {sparsity:g} the layers keep {total:,} weights in all, fewer than "
            f"the {least:,} that min_per_filter={min_per_filter} and lowest={lowest:g} ask for: "
            "lower these, or prune less."
        )
    alike = [int(functional.kept_count(target.size, sparsity)) for target in targets]
    ways = [alike, _share(curves, total)]
    fitting = [way for way in ways if sum(way) <= max(total, sum(alike)) and _above(way, curves)]
    best = min(
        fitting,
        key=lambda way: sum(m.cost(kept) for m, kept in zip(measures, way, strict=True)),
    )
    return {
        target.name: 1.0 - kept / target.size for target, kept in zip(targets, best, strict=True)
    }


class _Curve(NamedTuple):
    """The condition number of a layer as a function of the number of weights that it keeps.

    Attributes:
        counts: of weights, rising; the last is all.
        costs: the logarithms of the condition numbers.
    """

    counts: list[int]
    costs: list[float]


class _Measure:
    """Measures the condition numbers of a weight that is pruned by magnitude.

    Args:
        target: the weight.
        structure: with the minimum per filter.
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
        """Return log κ where so many weights are kept."""
        target, alive = self._target, [tf.ones(self._target.shape, tf.bool)]
        (mask,) = self._selection.masks(1.0 - count / target.size, alive)
        kernel = tf.where(mask, self._weight, tf.zeros_like(self._weight))
        return _log_condition(functional.matrices(kernel, target.layout, target.channel_groups))


def _log_condition(matrices: tf.Tensor) -> float:
    """Return log κ of the worst of some matrices; of singular ones, that at float32's limit."""
    matrices = np.asarray(tf.cast(matrices, tf.float64))
    spectra = np.linalg.svd(matrices, compute_uv=False)
    limit = max(matrices.shape[-2:]) * float(np.finfo(np.float32).eps)
    ratios = spectra[:, -1] / np.maximum(spectra[:, 0], np.finfo(np.float64).tiny)
    return -math.log(max(float(ratios.min()), limit))


def _above(counts: list[int], curves: list[_Curve]) -> bool:
    """Tell whether numbers of weights reach the minima of all layers."""
    return all(count >= curve.counts[0] for count, curve in zip(counts, curves, strict=True))


def _share(curves: list[_Curve], total: int) -> list[int]:
    """Return how many weights each layer keeps: the fewest, and more where a weight helps most."""
    kept = [curve.counts[0] for curve in curves]
    left = total - sum(kept)
    steps = [
        (slope, layer, count) for layer, curve in enumerate(curves) for slope, count in _hull(curve)
    ]
    for _, layer, count in sorted(steps):  # of one layer, the steeper come first
        more = min(count - kept[layer], left)
        kept[layer] += more
        left -= more
    return kept


def _hull(curve: _Curve) -> list[tuple[float, int]]:
    """Return (slope, count) along the lower convex hull of a curve."""
    points = list(zip(curve.counts, curve.costs, strict=True))
    steps, here = [], 0
    while here + 1 < len(points):
        count, cost = points[here]
        slopes = [(other - cost) / (more - count) for more, other in points[here + 1 :]]
        here += 1 + slopes.index(min(slopes))
        steps.append((min(slopes), points[here][0]))
    return steps
