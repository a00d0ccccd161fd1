"""Singular values and condition numbers of a model's kernels, by SVD in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tscnc_tf import _checks, _plots, _reports
from tscnc_tf.inspection import operators, weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class KernelCondition(_reports.Record):
    r"""The spectrum of one kernel, read as a matrix.

    A grouped or depthwise kernel is several matrices. The two condition numbers are then the
    largest among them; :math:`\sigma_{max}`, :math:`\sigma_{min}`, rank and stable rank are those
    of the matrix with the largest condition number.

    Attributes:
        name: the layer's name, and the kernel's if the layer has several.
        shape: the shape of the matrix, `(p, n)` with `p >= n`.
        groups: the number of matrices.
        sigma_max: the largest singular value: worst-case absolute amplification.
        sigma_min: the smallest singular value.
        condition_number: `sigma_max / sigma_min`, worst-case relative amplification; inf if the
            rank is below n.
        effective_condition_number: `sigma_max` over the smallest singular value above
            `sigma_max * max(p, n) * eps(float32)`; inf for a zero matrix.
        rank: the number of singular values above `sigma_max * max(p, n) * eps(float64)`, the
            precision of the SVD.
        stable_rank: `||M||_F^2 / sigma_max^2`; 0 for a zero matrix.
        filters: the number of output channels.
        dead_filters: how many of them have only zero weights.
        operator_sigma_max: the largest singular value of the convolution as a map between images;
            None if not requested or not defined.
        operator_sigma_min: the smallest singular value of that map.
        singular_values: as the function `singular_values` returns them; not in `to_dict()`.
    """

    _omitted = ("singular_values",)

    name: str
    shape: tuple[int, int]
    groups: int
    sigma_max: float
    sigma_min: float
    condition_number: float
    effective_condition_number: float
    rank: int
    stable_rank: float
    filters: int
    dead_filters: int
    operator_sigma_max: float | None = None
    operator_sigma_min: float | None = None
    singular_values: np.ndarray = dataclasses.field(
        default_factory=lambda: np.empty(0), repr=False, compare=False
    )


@dataclasses.dataclass(frozen=True)
class ConditionReport(_reports.Report):
    """The spectra of a model's kernels, in the model's order; `print` it for a table.

    Attributes:
        rows: one per kernel.
    """

    rows: tuple[KernelCondition, ...]

    @property
    def worst(self) -> KernelCondition:
        """The kernel with the largest condition number; the effective one decides ties."""
        return max(self.rows, key=lambda r: (r.condition_number, r.effective_condition_number))

    @property
    def worst_effective(self) -> KernelCondition:
        """The kernel with the largest effective condition number."""
        return max(self.rows, key=lambda r: (r.effective_condition_number, r.condition_number))

    @property
    def dead_filters(self) -> int:
        """The number of filters with only zero weights, in all kernels."""
        return sum(row.dead_filters for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values; infinity as "inf"."""
        figures = {
            "worst": self.worst.name,
            "worst_condition_number": self.worst.condition_number,
            "worst_effective": self.worst_effective.name,
            "worst_effective_condition_number": self.worst_effective.effective_condition_number,
            "dead_filters": self.dead_filters,
        }
        return _reports.jsonable(figures) | super().to_dict()

    def plot(
        self, *, label: str = "this", others: Mapping[str, ConditionReport] | None = None
    ) -> Figure:
        """Return a figure of the singular values of each kernel, in descending order.

        Args:
            label: the name of this report in the legend, if there are others.
            others: reports to draw beside it, by their names in the legend.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return _plots.spectra(
            {
                name: {row.name: row.singular_values for row in report.rows}
                for name, report in {label: self, **(others or {})}.items()
            }
        )

    def _table(self) -> _reports.Table:
        number = _reports.significant
        columns = ["kernel", "matrix", "σ max", "σ min", "κ", "effective κ", "rank", "stable rank"]
        columns.append("dead filters")
        rows = []
        for row in self.rows:
            shape = _reports.shape(row.shape)
            rows.append(
                [
                    row.name,
                    shape if row.groups == 1 else f"{row.groups} of {shape}",
                    number(row.sigma_max),
                    number(row.sigma_min),
                    number(row.condition_number),
                    number(row.effective_condition_number),
                    f"{row.rank}/{row.shape[1]}",
                    number(row.stable_rank),
                    f"{row.dead_filters}/{row.filters}",
                ]
            )
        if any(row.operator_sigma_max is not None for row in self.rows):
            columns += ["operator σ max", "operator σ min"]
            for cells, row in zip(rows, self.rows, strict=True):
                both = (row.operator_sigma_max, row.operator_sigma_min)
                cells += ["–" if value is None else number(value) for value in both]
        worst, effective = self.worst, self.worst_effective
        return _reports.Table(
            "Condition of the kernels",
            columns,
            rows,
            notes=[
                f"Largest κ: {number(worst.condition_number)} ({worst.name}); largest effective κ: "
                f"{number(effective.effective_condition_number)} ({effective.name})."
            ],
        )


def condition_numbers(model: Any, *, operator: bool = False) -> ConditionReport:
    r"""Return the condition number of each kernel of a model, :math:`\sigma_{max}/\sigma_{min}`.

    It bounds how much more a relative error is amplified than a signal in the range of the layer;
    :math:`\sigma_{max}` bounds the absolute amplification. Pruning tends to lower
    :math:`\sigma_{max}`, and to raise the condition number by making filters similar or dead;
    neither is a theorem.

    Each kernel is read as a matrix of (everything else) × (output channels), a grouped or depthwise
    one as several (see `functional.matrices`), and decomposed in float64. Masked weights are read
    as zero, LoRA as merged, and quantized integers as the numbers they represent. The condition
    number is infinite if the matrix is rank-deficient to the precision of the decomposition, so
    finite values can be far beyond the precision of float32. The effective condition number leaves
    out directions that are lost in float32.

    Args:
        model: a built Keras 3 or tf_keras model, with or without pruning wrappers.
        operator: whether to add the largest and smallest singular value of each convolution as a
            map between images (`operator_singular_values`), if it has stride 1, no dilation, and an
            input of known size. For wide layers on large images, this takes seconds per layer.

    Returns:
        A `ConditionReport`; `report.worst.condition_number` is the largest.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: the model is not built, has no kernels, or has weights that are not finite.

    Example:
        >>> import numpy as np, tf_keras, tscnc_tf.inspection
        >>> model = tf_keras.Sequential([tf_keras.layers.Dense(2, input_shape=(2,), name="last")])
        >>> model.set_weights([np.diag([4.0, 0.5]), np.zeros(2)])
        >>> tscnc_tf.inspection.condition_numbers(model).worst.condition_number
        8.0
    """
    _checks.boolean("operator", operator)
    rows = []
    for weight in weights.kernels(model):
        if not np.all(np.isfinite(weight.values)):
            raise ValueError(
                f"kernel {weight.name!r} of model {model.name!r} holds NaN or infinity, so it has "
                "no singular values: the model has diverged."
            )
        extremes = operators.extremes(weight.kernel, weight.values, model) if operator else None
        rows.append(_row(weight, *(extremes or (None, None))))
    if not rows:
        raise ValueError(f"model {model.name!r} has no kernels: there is no matrix to decompose.")
    return ConditionReport(tuple(rows))


def singular_values(model: Any) -> dict[str, np.ndarray]:
    """Return the singular values of each kernel of a model, in descending order.

    Args:
        model: a built Keras 3 or tf_keras model, with or without pruning wrappers.

    Returns:
        For each kernel, by its name, a float64 vector of n values; for a kernel that is several
        matrices (grouped or depthwise), an array `(groups, n)`.

    Raises:
        TypeError, ValueError: as `condition_numbers`.

    Example:
        >>> import numpy as np, tf_keras, tscnc_tf.inspection
        >>> model = tf_keras.Sequential([tf_keras.layers.Dense(2, input_shape=(2,), name="last")])
        >>> model.set_weights([np.diag([4.0, 0.5]), np.zeros(2)])
        >>> tscnc_tf.inspection.singular_values(model)
        {'last': array([4. , 0.5])}
    """
    return {row.name: row.singular_values for row in condition_numbers(model).rows}


def _row(
    weight: weights.KernelWeight, operator_max: float | None, operator_min: float | None
) -> KernelCondition:
    stack = weight.matrices()
    groups, *shape = stack.shape
    spectra = np.linalg.svd(stack, compute_uv=False)
    single, double = (max(shape) * float(np.finfo(kind).eps) for kind in (np.float32, np.float64))
    figures = []
    for spectrum in spectra:
        largest = float(spectrum[0])
        rank = int(np.sum(spectrum > largest * double))
        resolved = spectrum[spectrum > largest * single]
        condition = largest / float(spectrum[-1]) if rank == len(spectrum) else math.inf
        effective = largest / float(resolved[-1]) if resolved.size else math.inf
        figures.append((condition, effective, rank, spectrum))
    condition, _, rank, spectrum = max(figures, key=lambda figure: figure[:2])
    largest = float(spectrum[0])
    alive = np.any(weight.canonical() != 0, axis=(1, 2))
    return KernelCondition(
        name=weight.name,
        shape=tuple(shape),
        groups=groups,
        sigma_max=largest,
        sigma_min=float(spectrum[-1]),
        condition_number=condition,
        effective_condition_number=max(figure[1] for figure in figures),
        rank=rank,
        stable_rank=float(np.sum((spectrum / largest) ** 2)) if largest > 0 else 0.0,
        filters=alive.size,
        dead_filters=int(np.sum(~alive)),
        operator_sigma_max=operator_max,
        operator_sigma_min=operator_min,
        singular_values=spectra[0] if groups == 1 else spectra,
    )
