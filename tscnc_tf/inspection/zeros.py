"""The zeros of a model, weight by weight."""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from tscnc_tf import _channels, _plots, _reports
from tscnc_tf._keras import flavours
from tscnc_tf.inspection import weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class WeightSparsity(_reports.WeightRecord):
    """The zeros of one kernel, or of another weight that is pruned or can be.

    Attributes:
        name: the layer's name, and the weight's if the layer has several.
        shape: the shape of the variable.
        weights: the number of entries.
        zeros: how many of them are zero.
        masked: whether it has a pruning mask.
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
        model_weights: the number of all weights, including biases and normalisation, but not the
            masks and counters of pruning wrappers.
        model_zeros: how many of those are zero, including biases with their initial value.
        effective_zeros: for each row, how many weights are zero or on no path from an input of the
            model to an output; None if not computed.
        not_followed: why paths can't be followed in this model; an empty string if they can.
    """

    _derived = (
        *("sparsity", "prunable_weights", "prunable_zeros", "model_sparsity"),
        "effective_sparsity",
    )
    _effective = ("effective_zeros", "not_followed", "effective_sparsity")

    rows: tuple[WeightSparsity, ...]
    model_weights: int
    model_zeros: int
    effective_zeros: tuple[int, ...] | None = None
    not_followed: str = ""

    @property
    def prunable(self) -> tuple[WeightSparsity, ...]:
        """The rows with a mask; all rows if none has one."""
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

    @property
    def effective_sparsity(self) -> float | None:
        """The fraction of the prunable weights that are zero or on no path; None if not known."""
        if self.effective_zeros is None:
            return None
        pairs = zip(self.rows, self.effective_zeros, strict=True)
        return sum(zeros for row, zeros in pairs if row in self.prunable) / self.prunable_weights

    def without_paths(self) -> SparsityReport:
        """Return the report without the results on paths, as recorded by exports."""
        return dataclasses.replace(self, effective_zeros=None, not_followed="")

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values; those on paths if they were computed."""
        values = super().to_dict()
        if self.effective_zeros is None and not self.not_followed:
            return {name: value for name, value in values.items() if name not in self._effective}
        return values

    def _about_paths(self) -> list[str]:
        """Return a note on the effective sparsity; none if paths were not followed."""
        if self.not_followed:
            return [f"Effective sparsity: not known, as {self.not_followed}."]
        if self.effective_sparsity is None:
            return []
        share = _reports.percent(self.effective_sparsity)
        return [f"Effective sparsity (zeros, and weights on no path to an output): {share}."]

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
            [_reports.whole_model(self.model_weights, self.model_zeros), *self._about_paths()],
        )


def sparsity(model: Any) -> SparsityReport:
    r"""Return how many weights of a model are zero: :math:`\#\{w_i = 0\} / \#\{w_i\}`.

    Sparsity is the fraction of **zeros**, never the fraction that is kept. For a pruned weight,
    `weight * mask` is counted: after an optimizer's step, the variable itself is dense until the
    next forward pass applies the mask. For a Keras 3 layer with LoRA, the sum that the layer
    computes with is counted, and for a quantized layer the numbers that its integers represent.
    LoRA's factors, scales and statistics are not counted as weights.

    The **effective** sparsity also counts weights that are on no path of nonzero weights from an
    input of the model to an output: their results are constant, or never read. Paths are followed
    channel by channel in Sequential and functional models: through convolutions (grouped and
    depthwise ones, too), dense layers, BatchNorm (a scale of 0 ends a path), activations, pooling,
    flattening, additions, concatenations and `MultiHeadAttention`. A channel that no input reaches
    may pass on a constant, its bias, which is not a path. For a model with anything else, such as
    recurrent layers or gates and wrappers that are not folded, the effective sparsity is unknown,
    and the report says why.

    Args:
        model: a built Keras 3 or tf_keras model, with or without pruning wrappers.

    Returns:
        A `SparsityReport`. Its `sparsity` is that of the weights with masks, or of all rows if
        there are none; its `model_sparsity` is that of all weights, biases included.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: the model is not built, or has neither kernels nor pruned weights.

    Example:
        >>> import numpy as np, tf_keras, tscnc_tf.inspection
        >>> model = tf_keras.Sequential([tf_keras.layers.Dense(2, input_shape=(2,), name="last")])
        >>> model.set_weights([np.array([[0.0, 1.0], [0.0, 0.0]]), np.ones(2)])
        >>> tscnc_tf.inspection.sparsity(model).sparsity
        0.75

    Reference:
        Vysogorets & Kempe 2023, "Connectivity matters: neural network pruning through the lens of
        effective sparsity", arXiv 2107.02306.
    """
    found = weights.listed(model)
    rows = tuple(
        WeightSparsity(
            name=weight.name,
            shape=weight.values.shape,
            weights=weight.values.size,
            zeros=weight.values.size - int(np.count_nonzero(weight.values)),
            masked=weight.masked,
        )
        for weight in found
    )
    counts, not_followed = None, ""
    try:
        network = model.model if isinstance(model, flavours.Trainer) else model
        on_paths = _channels.weights_on_paths(network)
        counts = tuple(w.values.size - on_paths.get(id(w.variable), 0) for w in found)
    except _channels.NotFollowedError as error:
        not_followed = str(error)
    return SparsityReport(rows, *weights.totals(model), counts, not_followed)
