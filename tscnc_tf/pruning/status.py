"""The report on which weight tensors of a model are pruned, and why the others are not."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tscnc_tf import _keras, _reports
from tscnc_tf._keras import layers as kernel_layers
from tscnc_tf._keras import masks, wrappers
from tscnc_tf.inspection import weights as acting
from tscnc_tf.inspection.zeros import ByWeight
from tscnc_tf.pruning import tfmot_engine
from tscnc_tf.pruning.targets import FROZEN, candidates


@dataclasses.dataclass(frozen=True)
class WeightStatus(_reports.WeightRecord):
    """One weight tensor of rank 2 or more: whether it is pruned, and if not, why.

    Attributes:
        name: the name of its layer, and that of the weight if the layer has several.
        kind: the class of the layer.
        shape: its shape.
        weights: the number of its entries.
        zeros: the number of zeros, with masks and closed gates applied.
        pruned: whether it has a mask.
        reason: why it has none; empty if it has one.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    zeros: int
    pruned: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class PruningReport(ByWeight):
    """Which weights of a model are pruned, and why the others are not; `print` it for a table.

    Biases and other weights of rank 1 have no rows, but count in `model_weights`.

    Attributes:
        rows: one per weight tensor of rank 2 or more.
        model_weights: the number of all weights of the model.
        model_zeros: the number of zeros among them.
    """

    _derived = ("sparsity", "model_sparsity")

    rows: tuple[WeightStatus, ...]
    model_weights: int
    model_zeros: int

    @property
    def pruned(self) -> tuple[WeightStatus, ...]:
        """The weight tensors that are pruned."""
        return tuple(row for row in self.rows if row.pruned)

    @property
    def skipped(self) -> tuple[WeightStatus, ...]:
        """The weight tensors that are not pruned."""
        return tuple(row for row in self.rows if not row.pruned)

    @property
    def sparsity(self) -> float:
        """The fraction of zeros among the weights that are pruned; 0 if none is."""
        return _reports.share(*self._zeros_and_weights())

    def _zeros_and_weights(self) -> tuple[int, int]:
        zeros = sum(row.zeros for row in self.pruned)
        return zeros, sum(row.weights for row in self.pruned)

    def _table(self) -> _reports.Table:
        zeros, weights = self._zeros_and_weights()
        return _reports.Table(
            "Pruning",
            ("weight", "layer class", "shape", "weights", "zeros", "sparsity", "pruned", "why not"),
            [
                (
                    row.name,
                    row.kind,
                    _reports.shape(row.shape),
                    *_reports.sparsity_cells(row.weights, row.zeros),
                    "yes" if row.pruned else "no",
                    row.reason,
                )
                for row in self.rows
            ],
            ("all pruned weights", "", "", *_reports.sparsity_cells(weights, zeros), "", ""),
            [_reports.whole_model(self.model_weights, self.model_zeros)],
        )


def report(model: Any) -> PruningReport:
    """Return which weight tensors of a model are pruned, and why the others are not.

    Args:
        model: a built model of either Keras, pruned by either engine, or not pruned.

    Raises:
        TypeError: `model` is no Keras model.
        ValueError: it is not built.

    Example:
        >>> import keras
        >>> import tscnc_tf as tscnc
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, name="last")])
        >>> model = tscnc.prune_now(model, 0.75)
        >>> [(row.name, row.zeros, row.pruned) for row in tscnc.pruning.report(model).rows]
        [('last', 24, True)]
    """
    _keras.library("model", model)
    _keras.require_built("model", model)
    read = acting.Reader(model)
    is_wrapped = bool(wrappers.wrapped_layers(model))
    reasons = {
        id(target.variable): reason
        for pruner in masks.pruners(model)
        for target, reason in pruner.skipped
    }
    trained = {id(variable) for variable in model.trainable_variables}
    rows = []
    for target, unfit in candidates(model):
        is_pruned = id(target.variable) in read.masked
        if kernel_layers.is_companion(target.layer, target.variable) and not is_pruned:
            continue
        unfit = unfit or ("not chosen" if id(target.variable) in trained else FROZEN)
        reason = reasons.get(id(target.variable)) or unfit
        if is_wrapped and not is_pruned:
            reason = tfmot_engine.reason(model, target.layer)
        values = read(target.variable)
        rows.append(
            WeightStatus(
                name=target.name,
                kind=type(target.layer).__name__,
                shape=values.shape,
                weights=values.size,
                zeros=int(np.count_nonzero(values == 0)),
                pruned=is_pruned,
                reason="" if is_pruned else reason,
            )
        )
    return PruningReport(tuple(rows), *acting.totals(model))
