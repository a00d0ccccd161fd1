"""How many weights are zero, and where."""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from tscnc_tf import _plots, _reports
from tscnc_tf.inspection import weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class WeightSparsity(_reports.WeightRecord):
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


class ByWeight(_reports.Report, abc.ABC):
    """Base of reports on the zeros of a model, weight by weight.

    Attributes:
        rows: records with a name and a sparsity.
        model_weights: the number of all weights of the model.
        model_zeros: how many of them are zero.
    """

    rows: tuple[Any, ...]
    model_weights: int
    model_zeros: int

    @property
    @abc.abstractmethod
    def sparsity(self) -> float:
        """The fraction of zeros among the weights that are pruned together."""

    @property
    def model_sparsity(self) -> float:
        """The fraction of zeros among all weights of the model; 0 if it has none."""
        return _reports.share(self.model_zeros, self.model_weights)

    def plot(self) -> Figure:
        """Return a figure of the fraction of zeros of each weight.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return _plots.zeros({row.name: row.sparsity for row in self.rows}, self.sparsity)


@dataclasses.dataclass(frozen=True)
class SparsityReport(ByWeight):
    """The zeros of a model, weight by weight; `print` it for a table.

    Attributes:
        rows: one per kernel, then one per other weight that is pruned or would be by default:
            kernels of attention, weights of user-defined layers.
        model_weights: the number of all weights: biases and normalisation included, masks and
            counters of pruning wrappers not.
        model_zeros: how many of those are zero. A bias that still has its initial value counts.
    """

    _derived = ("sparsity", "prunable_weights", "prunable_zeros", "model_sparsity")

    rows: tuple[WeightSparsity, ...]
    model_weights: int
    model_zeros: int

    @property
    def prunable(self) -> tuple[WeightSparsity, ...]:
        """The rows that carry a mask; all rows, if none does."""
        return tuple(row for row in self.rows if row.masked) or self.rows

    @property
    def prunable_weights(self) -> int:
        """The number of entries of the prunable weights."""
        return sum(row.weights for row in self.prunable)

    @property
    def prunable_zeros(self) -> int:
        """How many of them are zero."""
        return sum(row.zeros for row in self.prunable)

    @property
    def sparsity(self) -> float:
        """The fraction of zeros among the prunable weights."""
        return self.prunable_zeros / self.prunable_weights

    def _table(self) -> _reports.Table:
        return _reports.Table(
            "Sparsity (fraction of zeros)",
            ("weight", "shape", "weights", "zeros", "sparsity", "mask"),
            [
                (
                    row.name,
                    _reports.shape(row.shape),
                    *_reports.sparsity_cells(row.weights, row.zeros),
                    "yes" if row.masked else "no",
                )
                for row in self.rows
            ],
            (
                "prunable weights",
                "",
                *_reports.sparsity_cells(self.prunable_weights, self.prunable_zeros),
                "",
            ),
            [_reports.whole_model(self.model_weights, self.model_zeros)],
        )


def sparsity(model: Any) -> SparsityReport:
    r"""Return how many weights of a model are zero: :math:`\#\{w_i = 0\} / \#\{w_i\}`.

    Sparsity is the fraction of **zeros**, never the fraction that is kept. For a pruned weight
    `weight * mask` is counted: right after an optimizer's step the variable itself is dense, until
    the next forward pass applies the mask. For a Keras 3 layer with LoRA it is the sum that the
    layer computes with, and for a quantized layer the numbers that its integers stand for; LoRA's
    factors, scales and statistics are not counted as weights.

    Args:
        model: a built Keras 3 or tf_keras model, with or without pruning wrappers.

    Returns:
        A `SparsityReport`. Its `sparsity` is that of the weights that carry masks, or of all rows
        if none does; its `model_sparsity` is that of all weights, biases included.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: it is not built, or has neither kernels nor pruned weights.

    Example:
        >>> import numpy as np, tf_keras, tscnc_tf.inspection
        >>> model = tf_keras.Sequential([tf_keras.layers.Dense(2, input_shape=(2,), name="last")])
        >>> model.set_weights([np.array([[0.0, 1.0], [0.0, 0.0]]), np.ones(2)])
        >>> tscnc_tf.inspection.sparsity(model).sparsity
        0.75
    """
    rows = tuple(
        WeightSparsity(
            name=weight.name,
            shape=weight.values.shape,
            weights=weight.values.size,
            zeros=weight.values.size - int(np.count_nonzero(weight.values)),
            masked=weight.masked,
        )
        for weight in weights.listed(model)
    )
    return SparsityReport(rows, *weights.totals(model))
