"""The report on the open gates of a model."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tscnc_tf import _keras, _reports, functional
from tscnc_tf._keras import gated


@dataclasses.dataclass(frozen=True)
class GateStatus(_reports.Record):
    """The gates of one layer.

    Attributes:
        name: the name of the layer.
        kind: the class of the layer inside.
        unit: what each gate is for, a "filter" or an "input".
        gates: the number of gates.
        weights: the number of kernel weights that have gates.
        expected_open: the expected number of open gates in training.
        open_gates: the number of gates above zero at inference.
        mean_gate: the mean of the gates at inference.
    """

    _derived = ("expected_l0", "open_share")

    name: str
    kind: str
    unit: str
    gates: int
    weights: int
    expected_open: float
    open_gates: int
    mean_gate: float

    @property
    def expected_l0(self) -> float:
        """The expected number of kernel weights whose gate is open in training."""
        return self.expected_open * self.weights / self.gates

    @property
    def open_share(self) -> float:
        """The share of gates that are above zero at inference."""
        return self.open_gates / self.gates


@dataclasses.dataclass(frozen=True)
class GateReport(_reports.Report):
    """The gates of a model, layer by layer; `print` it for a table.

    Attributes:
        rows: one per gated layer.
    """

    _derived = ("gates", "expected_open", "expected_l0", "open_gates", "open_share", "mean_gate")

    rows: tuple[GateStatus, ...]

    @property
    def gates(self) -> int:
        """The number of all gates."""
        return sum(row.gates for row in self.rows)

    @property
    def expected_open(self) -> float:
        """The expected number of open gates in training."""
        return sum(row.expected_open for row in self.rows)

    @property
    def expected_l0(self) -> float:
        """The expected number of kernel weights whose gate is open in training."""
        return sum(row.expected_l0 for row in self.rows)

    @property
    def open_gates(self) -> int:
        """The number of gates above zero at inference."""
        return sum(row.open_gates for row in self.rows)

    @property
    def open_share(self) -> float:
        """The share of gates that are above zero at inference."""
        return self.open_gates / self.gates

    @property
    def mean_gate(self) -> float:
        """The mean of all gates at inference."""
        return sum(row.mean_gate * row.gates for row in self.rows) / self.gates

    def _table(self) -> _reports.Table:
        weights = sum(row.weights for row in self.rows)
        columns = ("expected open", "weights", "expected L0", "open", "mean gate")
        return _reports.Table(
            "Gates",
            ("layer", "layer class", "gate per", "gates", *columns),
            [
                (row.name, row.kind, row.unit, f"{row.gates:,}", *_figures(row, row.weights))
                for row in self.rows
            ],
            ("all gates", "", "", f"{self.gates:,}", *_figures(self, weights)),
            ["Expected: in training, where gates are drawn. Open and mean gate: at inference."],
        )


def report(model: Any) -> GateReport:
    r"""Return how many gates of each layer are open, in training (expected) and at inference.

    In training, a gate is open with probability :math:`p_g`. The expected number of open gates is
    :math:`\sum_g p_g`, and that of their weights, the expected L0 norm, is :math:`\sum_g p_g |g|`.

    Args:
        model: a built model of either Keras that contains gated layers.

    Raises:
        TypeError: `model` is no Keras model.
        ValueError: it is not built, or has no gates.

    Example:
        >>> import keras
        >>> import tscnc_tf as tscnc
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> report = tscnc.gates.report(tscnc.gates.add_gates(model, drop_rate=0.5))
        >>> report.gates, report.open_share, round(report.expected_open, 1)
        (4, 1.0, 3.3)
    """
    _keras.library("model", model)
    _keras.require_built("model", model)
    rows = tuple(_row(layer) for layer in gated.gated_layers(model))
    if not rows:
        raise ValueError(f"model {model.name!r} has no gates: add them by add_gates(model).")
    return GateReport(rows)


def _row(layer: Any) -> GateStatus:
    groups = layer.groups
    at_inference = functional.deterministic_gate(layer.log_alpha).numpy()
    probability = functional.open_probability(layer.log_alpha).numpy().astype(np.float64)
    return GateStatus(
        name=layer.name,
        kind=type(layer.layer).__name__,
        unit=groups.kind,
        gates=groups.count,
        weights=groups.count * groups.size,
        expected_open=float(probability.sum()),
        open_gates=int(np.count_nonzero(at_inference)),
        mean_gate=float(at_inference.mean(dtype=np.float64)),
    )


def _figures(status: GateStatus | GateReport, weights: int) -> tuple[str, ...]:
    return (
        f"{status.expected_open:.1f}",
        f"{weights:,}",
        f"{status.expected_l0:,.1f}",
        _reports.percent(status.open_share),
        _reports.significant(status.mean_gate),
    )
