"""What is said of an export: one frozen dataclass, shown as a table, written as the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from tscnc_tf import _reports
from tscnc_tf.inspection import SparsityReport, WeightSparsity

__all__ = ["ExportReport", "ExportedTensor", "ExportedVariable"]


@dataclasses.dataclass(frozen=True)
class ExportedTensor:
    """One input or output of the `serving_default` signature.

    Attributes:
        name: the keyword that the signature knows it by.
        shape: its shape; None is a dimension of any size.
        dtype: the name of its dtype.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    def __str__(self) -> str:
        sizes = ", ".join("any" if size is None else str(size) for size in self.shape)
        return f"{self.name} ({sizes}) {self.dtype}"


@dataclasses.dataclass(frozen=True)
class ExportedVariable:
    """One variable of the SavedModel; its place in the report is its place in `variables` there.

    Attributes:
        name: the name that TensorFlow gives it.
        shape: its shape.
        dtype: the name of its dtype.
        zeros: how many of its entries are exactly zero.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    zeros: int


@dataclasses.dataclass(frozen=True)
class ExportReport(_reports.Report):
    """What was exported: zeros kernel by kernel, sizes, signature, versions. `str()` is a table.

    Attributes:
        path: the folder, absolute.
        weights: the zeros of each kernel and of the whole model, as `inspection.sparsity` gives
            them for the model that was exported.
        variables: all variables of the SavedModel.
        expected_sparsity: what the export was held to, or None.
        inputs, outputs: the tensors of the `serving_default` signature.
        max_logit_difference: the largest absolute difference between the logits of the model and
            those of the written SavedModel, over the probe batch.
        logit_tolerance: the largest difference that would have passed.
        probe_examples: the number of examples in the probe batch.
        saved_model_bytes: the size of all files of the SavedModel, without the manifest.
        gzip_bytes: the size of the same files as one .tar.gz (level 9, without time stamps). This
            is where zeros pay off, in a download; the SavedModel itself stores each of them.
        ideal_sparse_bytes: what the weights alone would take, each kernel in the smallest of a
            dense array, a bitmap with values and compressed rows, as `inspection.sizes` counts; no
            SavedModel is that small. None for an export made before this was counted.
        files: for every file of the SavedModel, its size in bytes and its SHA-256 digest. If a
            model is exported twice, the variables' files are the same; that of the graph is not,
            since TensorFlow numbers its functions on.
        versions: of the libraries that made the export; "unknown" if not installed as a package.
    """

    path: str
    weights: SparsityReport
    variables: tuple[ExportedVariable, ...]
    expected_sparsity: float | None
    inputs: tuple[ExportedTensor, ...]
    outputs: tuple[ExportedTensor, ...]
    max_logit_difference: float
    logit_tolerance: float
    probe_examples: int
    saved_model_bytes: int
    gzip_bytes: int
    ideal_sparse_bytes: int | None
    files: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]

    @property
    def kernels(self) -> tuple[WeightSparsity, ...]:
        """The prunable weights: every kernel, and whatever else had a mask."""
        return self.weights.rows

    @property
    def sparsity(self) -> float:
        """The fraction of zeros among the weights that had masks, or all kernels if none had."""
        return self.weights.sparsity

    @property
    def model_sparsity(self) -> float:
        """The fraction of zeros among all weights, biases and normalisation included."""
        return self.weights.model_sparsity

    @property
    def _ideal_sparse(self) -> str:
        if self.ideal_sparse_bytes is None:
            return ""
        return f"; the weights alone, ideally sparse, {_reports.size(self.ideal_sparse_bytes)}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything in the report as plain values, ready for JSON."""
        weights = self.weights.to_dict()
        kernels = weights.pop("rows")
        return {
            "path": self.path,
            **weights,
            "expected_sparsity": self.expected_sparsity,
            "kernels": kernels,
            "variables": [_plain(variable) for variable in self.variables],
            "inputs": [_plain(tensor) for tensor in self.inputs],
            "outputs": [_plain(tensor) for tensor in self.outputs],
            "max_logit_difference": self.max_logit_difference,
            "logit_tolerance": self.logit_tolerance,
            "probe_examples": self.probe_examples,
            "saved_model_bytes": self.saved_model_bytes,
            "gzip_bytes": self.gzip_bytes,
            "ideal_sparse_bytes": self.ideal_sparse_bytes,
            "files": {name: dict(facts) for name, facts in self.files.items()},
            "versions": dict(self.versions),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the report whose `to_dict()` is `values`; what follows from others is recomputed.

        Raises:
            ValueError: a value is missing or of another kind.
        """
        try:
            return cls(
                weights=SparsityReport(
                    rows=_rows(WeightSparsity, values["kernels"]),
                    model_weights=values["model_weights"],
                    model_zeros=values["model_zeros"],
                ),
                variables=_rows(ExportedVariable, values["variables"]),
                inputs=_rows(ExportedTensor, values["inputs"]),
                outputs=_rows(ExportedTensor, values["outputs"]),
                files={name: dict(facts) for name, facts in values["files"].items()},
                versions=dict(values["versions"]),
                ideal_sparse_bytes=values.get("ideal_sparse_bytes"),
                **{name: values[name] for name in _SIMPLE},
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"This is no export report: {error!r}.") from error

    def _table(self) -> _reports.Table:
        prunable = self.weights.prunable
        counts = [sum(row.weights for row in prunable), sum(row.zeros for row in prunable)]
        asked = self.expected_sparsity
        return _reports.Table(
            f"SavedModel {self.path}",
            ("kernel", "shape", "weights", "zeros", "sparsity", "pruned"),
            [
                (
                    row.name,
                    "×".join(map(str, row.shape)),
                    f"{row.weights:,}",
                    f"{row.zeros:,}",
                    _reports.percent(row.sparsity),
                    "yes" if row.masked else "no",
                )
                for row in self.kernels
            ],
            (
                "all that is pruned" if prunable[0].masked else "all kernels",
                "",
                *(f"{count:,}" for count in counts),
                _reports.percent(self.sparsity),
                "",
            ),
            [
                f"Whole model: {self.weights.model_zeros:,} of {self.weights.model_weights:,} "
                f"weights are zero, {_reports.percent(self.model_sparsity)}.",
                f"Expected sparsity: {'none' if asked is None else _reports.percent(asked)}.",
                f"Size: {_reports.size(self.saved_model_bytes)}, "
                f"gzipped {_reports.size(self.gzip_bytes)}"
                f"{self._ideal_sparse}.",
                f"Inputs: {'; '.join(map(str, self.inputs))}.",
                f"Outputs: {'; '.join(map(str, self.outputs))}.",
                f"Largest logit difference on {self.probe_examples} examples: "
                f"{_reports.significant(self.max_logit_difference)} "
                f"(allowed: {_reports.significant(self.logit_tolerance)}).",
                "Made with "
                + ", ".join(f"{name} {version}" for name, version in self.versions.items())
                + ".",
            ],
        )


_SIMPLE = (
    "path",
    "expected_sparsity",
    "max_logit_difference",
    "logit_tolerance",
    "probe_examples",
    "saved_model_bytes",
    "gzip_bytes",
)


def _plain(row: ExportedTensor | ExportedVariable) -> dict[str, Any]:
    return {**dataclasses.asdict(row), "shape": list(row.shape)}


def _rows(kind: type, rows: list[dict[str, Any]]) -> tuple[Any, ...]:
    """Return dataclasses from their dictionaries, which may hold derived values besides."""
    names = [field.name for field in dataclasses.fields(kind)]
    return tuple(
        kind(**{name: row[name] for name in names if name != "shape"}, shape=tuple(row["shape"]))
        for row in rows
    )
