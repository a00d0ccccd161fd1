"""How many weights are zero, and where."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tscnc_tf import _reports
from tscnc_tf.inspection import weights


@dataclasses.dataclass(frozen=True)
class WeightSparsity:
    """The zeros of one kernel, or of another weight that is pruned or can be.

    Attributes:
        name: the layer's name, and which of its weights, where there are several.
        shape: the shape of the variable.
        weights: the number of entries.
        zeros: how many of them are zero.
        masked: whether a pruning mask holds zeros in place.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    zeros: int
    masked: bool

    @property
    def sparsity(self) -> float:
        """The fraction of zeros."""
        return self.zeros / self.weights

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        return _reports.jsonable(dataclasses.asdict(self) | {"sparsity": self.sparsity})


@dataclasses.dataclass(frozen=True)
class SparsityReport(_reports.Report):
    """The zeros of a model, weight by weight; `print` it for a table.

    Attributes:
        rows: one per kernel, then one per other weight that is pruned, or would be if nothing else
            were said: kernels of attention, weights of layers of your own.
        model_weights: the number of all weights: biases and normalisation included, the wrappers'
            masks and counters not.
        model_zeros: how many of those are zero. A bias that still has its initial value counts.
    """

    rows: tuple[WeightSparsity, ...]
    model_weights: int
    model_zeros: int

    @property
    def prunable(self) -> tuple[WeightSparsity, ...]:
        """The rows that carry a mask; all rows, if none does."""
        return tuple(row for row in self.rows if row.masked) or self.rows

    @property
    def sparsity(self) -> float:
        """The fraction of zeros among the prunable weights."""
        return sum(row.zeros for row in self.prunable) / sum(row.weights for row in self.prunable)

    @property
    def model_sparsity(self) -> float:
        """The fraction of zeros among all weights of the model."""
        return self.model_zeros / self.model_weights

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "sparsity": self.sparsity,
            "prunable_weights": sum(row.weights for row in self.prunable),
            "prunable_zeros": sum(row.zeros for row in self.prunable),
            "model_sparsity": self.model_sparsity,
            "model_weights": self.model_weights,
            "model_zeros": self.model_zeros,
            "rows": [row.to_dict() for row in self.rows],
        }

    def _table(self) -> _reports.Table:
        count, zeros = sum(r.weights for r in self.prunable), sum(r.zeros for r in self.prunable)
        return _reports.Table(
            "Sparsity (fraction of zeros)",
            ("weight", "shape", "weights", "zeros", "sparsity", "mask"),
            [
                (
                    row.name,
                    "×".join(map(str, row.shape)),
                    f"{row.weights}",
                    f"{row.zeros}",
                    _reports.percent(row.sparsity),
                    "yes" if row.masked else "no",
                )
                for row in self.rows
            ],
            ("prunable weights", "", f"{count}", f"{zeros}", _reports.percent(self.sparsity), ""),
            [
                f"Whole model: {self.model_zeros} of {self.model_weights} weights are zero, "
                f"{_reports.percent(self.model_sparsity)}."
            ],
        )


def sparsity(model: Any) -> SparsityReport:
    r"""Return how many weights of a model are zero: :math:`\#\{w_i = 0\} / \#\{w_i\}`.

    Sparsity is the fraction of **zeros**, never the fraction that is kept. Of a pruned weight, what
    is counted is `weight * mask`: right after an optimizer's step the variable itself is dense,
    until the next forward pass applies the mask. Of a Keras 3 layer with LoRA it is the sum that
    the layer computes with, and of a quantized one what its integers stand for; LoRA's factors,
    scales and statistics are no weights of their own.

    Args:
        model: a built Keras 3 or tf_keras model, with or without pruning wrappers.

    Returns:
        A `SparsityReport`. Its `sparsity` is that of the weights that carry masks, or of all rows
        if none does; its `model_sparsity` is that of everything, biases included.

    Raises:
        TypeError: `model` is no Keras model.
        ValueError: it has no weights yet, or neither kernels nor pruned weights.

    Example:
        >>> import numpy as np, tf_keras, tscnc_tf.inspection
        >>> model = tf_keras.Sequential([tf_keras.layers.Dense(2, input_shape=(2,), name="last")])
        >>> model.set_weights([np.array([[0.0, 1.0], [0.0, 0.0]]), np.ones(2)])
        >>> tscnc_tf.inspection.sparsity(model).sparsity
        0.75
    """
    weights.require_inspectable(model)
    found = weights.listed(model)
    names = _reports.unique(weight.name for weight in found)
    model_weights, model_zeros = weights.totals(model)
    return SparsityReport(
        rows=tuple(
            WeightSparsity(
                name=name,
                shape=weight.values.shape,
                weights=weight.values.size,
                zeros=_zeros(weight.values),
                masked=weight.masked,
            )
            for name, weight in zip(names, found, strict=True)
        ),
        model_weights=model_weights,
        model_zeros=model_zeros,
    )


def _zeros(values: np.ndarray) -> int:
    return int(values.size - np.count_nonzero(values))
