"""The report of a compaction: layers before and after, kept dead filters, latency."""

from __future__ import annotations

import dataclasses
from typing import Any

from tscnc_tf import _checks, _keras, _probe, _reports, _timing

NOTES = 20  # entries of `kept` below the table; a residual network has hundreds


@dataclasses.dataclass(frozen=True)
class LayerChange(_reports.Record):
    """One layer with weights, before and after.

    Attributes:
        name: the layer's name, prefixed by those of the nested models around it.
        kind: its class.
        filters_before, filters_after: the number of output channels; None if not known.
        parameters_before, parameters_after: the number of entries of all its weights.
        flops_before, flops_after: for one example; None for layers that are not counted.
    """

    name: str
    kind: str
    filters_before: int | None
    filters_after: int | None
    parameters_before: int
    parameters_after: int
    flops_before: int | None
    flops_after: int | None

    @property
    def changed(self) -> bool:
        """Whether the layer has become smaller, or got a bias."""
        return (self.filters_before, self.parameters_before) != (
            self.filters_after,
            self.parameters_after,
        )


@dataclasses.dataclass(frozen=True)
class Kept(_reports.Record):
    """Dead filters of a layer that could not be removed.

    Attributes:
        layer: the layer's name.
        channels: the number of filters; of attention, values of heads count as well.
        reason: why they are kept.
    """

    layer: str
    channels: int
    reason: str


@dataclasses.dataclass(frozen=True)
class LeftAlone(_reports.Record):
    """A layer of unknown effect on channels: all its input and output channels are kept.

    Attributes:
        layer: the layer's name.
        reason: why it is left alone.
    """

    layer: str
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Compaction(_reports.Report):
    """A compacted model, and the changes of its layers; `print` it for a table.

    FLOPs are those of the kernels of convolutions and dense layers for one example, two per
    multiply-add: `2 · kernel entries · positions`, with the positions of the output (of the input,
    for transposed convolutions). Multiplications by padding count. Biases, normalisation,
    activations, pooling and other layers are not counted.

    Attributes:
        model: the new model, uncompiled.
        original: the given model.
        layers: one row per layer with weights.
        kept: the dead filters that could not be removed, and why.
        left_alone: the layers of unknown effect, which keep all their channels.
        max_logit_difference: the largest absolute difference between the logits of both models on
            the probe batch; of several outputs, in the one that differs most for its size.
        logit_tolerance: the largest allowed difference of that output.
        probe_examples: the number of examples in the probe batch.
    """

    _derived = ("parameters_before", "parameters_after", "flops_before", "flops_after")
    _omitted = ("model", "original")

    model: Any = dataclasses.field(repr=False)
    original: Any = dataclasses.field(repr=False)
    layers: tuple[LayerChange, ...]
    kept: tuple[Kept, ...]
    left_alone: tuple[LeftAlone, ...]
    max_logit_difference: float
    logit_tolerance: float
    probe_examples: int

    @property
    def parameters_before(self) -> int:
        """The number of parameters of the given model."""
        return sum(row.parameters_before for row in self.layers)

    @property
    def parameters_after(self) -> int:
        """The number of parameters of the new model."""
        return sum(row.parameters_after for row in self.layers)

    @property
    def flops_before(self) -> int:
        """The FLOPs of the given model."""
        return sum(row.flops_before or 0 for row in self.layers)

    @property
    def flops_after(self) -> int:
        """The FLOPs of the new model."""
        return sum(row.flops_after or 0 for row in self.layers)

    def measure_latency(self, batch: Any, *, rounds: int = 50) -> _timing.Latency:
        """Measure the latency of a forward pass before and after.

        Both models are compiled by `tf.function` for the batch, warmed up, and then timed in turns
        (A B A B ...) in this process, so that other load affects both.

        Args:
            batch: inputs of the model; the latency depends on the batch size.
            rounds: the number of timed passes of each model.

        Returns:
            A `Latency`: medians, quartiles, the ratio, and the device.

        Raises:
            TypeError: `rounds` is no integer.
            ValueError: it is below 1, or the batch does not fit the model.

        Example:
            >>> import numpy as np, tf_keras, tscnc_tf as tscnc
            >>> model = tf_keras.Sequential([tf_keras.layers.Dense(3, input_shape=(4,))])
            >>> compaction = tscnc.pruning.compact(model)
            >>> compaction.measure_latency(np.zeros((2, 4), "float32"), rounds=3).examples
            2
        """
        rounds = _checks.integer("rounds", rounds, minimum=1)
        _, batch = _probe.prepare(self.original, batch, "batch")
        before, after = _keras.inference(self.original), _keras.inference(self.model)
        return _timing.latency(before, after, batch, rounds)

    def _table(self) -> _reports.Table:
        notes = ["FLOPs: two per multiply-add, one example; convolutions and dense layers only."]
        kept = [f"Kept: {row.channels} of {row.layer!r}: {row.reason}." for row in self.kept]
        notes += kept[:NOTES]
        if len(kept) > NOTES:
            notes.append(f"... and {len(kept) - NOTES} more like these, in `kept`.")
        notes += [f"Left alone: {row.reason}." for row in self.left_alone]
        notes.append(
            f"The largest difference between the logits of {self.probe_examples} examples is "
            f"{_reports.significant(self.max_logit_difference)} (at most "
            f"{_reports.significant(self.logit_tolerance)})."
        )
        return _reports.Table(
            f"Compaction of {self.model.name}",
            ("layer", "class", "filters", "parameters", "FLOPs"),
            [
                (
                    row.name,
                    row.kind,
                    _pair(row.filters_before, row.filters_after),
                    _pair(row.parameters_before, row.parameters_after),
                    _pair(row.flops_before, row.flops_after),
                )
                for row in self.layers
            ],
            (
                "all",
                "",
                "",
                _pair(self.parameters_before, self.parameters_after),
                _pair(self.flops_before, self.flops_after),
            ),
            notes,
        )


def _pair(before: int | None, after: int | None) -> str:
    """Return a count before and after, or once if it is the same."""
    if before is None or after is None:
        return "–"
    return f"{before:,}" if before == after else f"{before:,} → {after:,}"
