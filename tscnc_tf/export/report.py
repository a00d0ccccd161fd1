"""Reports of exports: to a SavedModel, whose manifest is the report, and to a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from tscnc_tf import _reports
from tscnc_tf.inspection import SparsityReport, WeightSparsity

__all__ = [
    "ExportReport",
    "ExportedKernel",
    "ExportedTensor",
    "ExportedVariable",
    "FileExportReport",
]

# The processors on which LiteRT has sparse kernels for 1x1 convolutions.
PROCESSORS = "ARM, WebAssembly, RISC-V, and x86 without AVX"


@dataclasses.dataclass(frozen=True)
class ExportedTensor(_reports.Record):
    """One input or output of the `serving_default` signature.

    Attributes:
        name: its keyword in the signature.
        shape: its shape; None for a dimension of any size.
        dtype: the name of its dtype.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    def __str__(self) -> str:
        sizes = ", ".join("any" if size is None else str(size) for size in self.shape)
        return f"{self.name} ({sizes}) {self.dtype}"


@dataclasses.dataclass(frozen=True)
class ExportedVariable(_reports.Record):
    """One variable of a SavedModel; reports list them in the order of the model's `variables`.

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
class ExportedKernel(_reports.WeightRecord):
    """One kernel, or another pruned weight, and the tensor that holds it in the file.

    Attributes:
        name: as `inspection.sparsity` calls it.
        tensor: the name of the tensor in the file; None for a weight without zeros that the
            converter has split.
        shape: the shape of the tensor, which is in the format's own layout.
        dtype: the name of its dtype.
        weights: the number of entries.
        model_zeros: how many of them are zero in the model.
        zeros: how many of them are zero in the file: at least `model_zeros`, since small weights
            may be rounded to zero, and zero scales of a BatchNorm multiplied into the kernel.
        stored: "dense"; "sparse" if it is also run in sparse form; "dense on loading" if it is
            sparse in the file only.
        stored_bytes: its bytes in the file, the indices of a sparse form included; None for a
            weight that the converter has split.
        reason: why it is dense although sparse kernels were requested; else an empty string.
    """

    name: str
    tensor: str | None
    shape: tuple[int, ...]
    dtype: str
    weights: int
    model_zeros: int
    zeros: int
    stored: str = "dense"
    stored_bytes: int | None = None
    reason: str = ""


class _Export(_reports.Report):
    """Base of both reports: the notes below the table."""

    expected_sparsity: float | None
    inputs: tuple[ExportedTensor, ...]
    outputs: tuple[ExportedTensor, ...]
    max_logit_difference: float
    probe_examples: int
    gzip_bytes: int
    ideal_sparse_bytes: int | None
    versions: Mapping[str, str]

    def _notes(self, size: int, comparison: str, *more: str) -> list[str]:
        """Return the notes.

        Args:
            size: the bytes of the files that were written.
            comparison: the text after the largest difference of logits.
            more: further notes, placed before the versions.
        """
        asked, ideal = self.expected_sparsity, ""
        if self.ideal_sparse_bytes is not None:
            ideal = f"; the weights alone, ideally sparse, {_reports.size(self.ideal_sparse_bytes)}"
        made_with = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return [
            f"Expected sparsity: {'none' if asked is None else _reports.percent(asked)}.",
            f"Size: {_reports.size(size)}, gzipped {_reports.size(self.gzip_bytes)}{ideal}.",
            f"Inputs: {'; '.join(map(str, self.inputs))}.",
            f"Outputs: {'; '.join(map(str, self.outputs))}.",
            f"Largest logit difference on {self.probe_examples} examples: "
            f"{_reports.significant(self.max_logit_difference)} {comparison}.",
            *more,
            f"Made with {made_with}.",
        ]


@dataclasses.dataclass(frozen=True)
class ExportReport(_Export):
    """What was exported: zeros kernel by kernel, sizes, signature, versions. `str()` is a table.

    Attributes:
        path: the folder, absolute.
        weights: the zeros of each kernel and of the whole model, as `inspection.sparsity` gives
            them for the model that was exported.
        variables: all variables of the SavedModel.
        expected_sparsity: the sparsity that was required, or None.
        inputs, outputs: the tensors of the `serving_default` signature.
        max_logit_difference: the largest absolute difference between the logits of the model and
            those of the written SavedModel, over the probe batch; of several outputs, in the one
            that differs most for its size.
        logit_tolerance: the largest difference of that output that would have passed.
        probe_examples: the number of examples in the probe batch.
        saved_model_bytes: the size of all files of the SavedModel, without the manifest.
        gzip_bytes: the size of the same files as one .tar.gz (level 9, without time stamps). Zeros
            make this size smaller; the SavedModel itself stores each of them.
        ideal_sparse_bytes: what the weights alone would take, each kernel in the smallest of a
            dense array, a bitmap with values and compressed rows, as `inspection.sizes` counts; no
            SavedModel is that small. None for an export by an older version without this count.
        files: for every file of the SavedModel, its size in bytes and its SHA-256 digest. Two
            exports of a model have the same files of variables, but not of the graph, since
            TensorFlow gives functions new numbers each time.
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
        """The prunable weights: every kernel, and every other weight that had a mask."""
        return self.weights.rows

    @property
    def sparsity(self) -> float:
        """The fraction of zeros among the weights that had masks, or all kernels if none had."""
        return self.weights.sparsity

    @property
    def model_sparsity(self) -> float:
        """The fraction of zeros among all weights, biases and normalisation included."""
        return self.weights.model_sparsity

    def to_dict(self) -> dict[str, Any]:
        """Return everything in the report as plain values, ready for JSON."""
        content = super().to_dict()
        weights = content.pop("weights")
        return {"kernels": weights.pop("rows"), **weights, **content}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the report whose `to_dict()` is `values`; derived values are recomputed.

        Raises:
            ValueError: a value is missing or of the wrong type.
        """
        try:
            parsed: dict[str, Any] = {
                "weights": SparsityReport(
                    rows=_rows(WeightSparsity, values["kernels"]),
                    model_weights=values["model_weights"],
                    model_zeros=values["model_zeros"],
                ),
                "variables": _rows(ExportedVariable, values["variables"]),
                "inputs": _rows(ExportedTensor, values["inputs"]),
                "outputs": _rows(ExportedTensor, values["outputs"]),
                "files": {name: dict(facts) for name, facts in values["files"].items()},
                "versions": dict(values["versions"]),
                "ideal_sparse_bytes": values.get("ideal_sparse_bytes"),  # missing in old manifests
            }
            names = [field.name for field in dataclasses.fields(cls)]
            return cls(**{name: values[name] for name in names if name not in parsed}, **parsed)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"This is not an export report: {error!r}.") from error

    def _table(self) -> _reports.Table:
        table = self.weights._table()
        allowed = _reports.significant(self.logit_tolerance)
        notes = self._notes(self.saved_model_bytes, f"(allowed: {allowed})")
        return dataclasses.replace(
            table, title=f"SavedModel {self.path}", notes=[*table.notes, *notes]
        )


@dataclasses.dataclass(frozen=True)
class FileExportReport(_Export):
    """What was exported to a file: zeros, sizes, signature, versions. `str()` is a table.

    Attributes:
        path: the file, absolute.
        format: "LiteRT" or "ONNX".
        precision: "float32"; "float16" for the weights, computing in float32; or "int8" for weights
            and activations.
        weights: the zeros of the model that was exported.
        kernels: the zeros of the file, kernel by kernel.
        inputs, outputs: the tensors that the file takes and returns.
        logit_tolerance: the largest difference of logits that would have passed; None for int8,
            where any finite one passes.
        same_class: the share of the probe's examples for which model and file return the same
            class; None for several outputs, or one logit.
        file_bytes: the size of the file; with `data_file`, of both.
        dense_bytes: its size with all kernels dense; None if sparse kernels were not requested.
        pointwise: of the 1x1 convolutions, how many LiteRT runs sparsely on some processors, and
            how many there are (see `sparse_inference`); None for a file without sparse kernels.
        gzip_bytes: its size gzipped (level 9, without time stamp); zeros make it smaller.
        ideal_sparse_bytes: as in `ExportReport`, for float32 only; else None.
        sha256: its SHA-256 digest; with `data_file`, that of both files, concatenated.
        settings: further settings: calibration examples, opset, batch size, external data.
        expected_sparsity, max_logit_difference, probe_examples, versions: as in `ExportReport`.
        data_file: the second file, with the weights (ONNX with `external_data`), absolute; None if
            there is none.
    """

    _derived = ("sparsity",)

    path: str
    format: str
    precision: str
    weights: SparsityReport
    kernels: tuple[ExportedKernel, ...]
    expected_sparsity: float | None
    inputs: tuple[ExportedTensor, ...]
    outputs: tuple[ExportedTensor, ...]
    max_logit_difference: float
    logit_tolerance: float | None
    same_class: float | None
    probe_examples: int
    file_bytes: int
    dense_bytes: int | None
    pointwise: tuple[int, int] | None
    gzip_bytes: int
    ideal_sparse_bytes: int | None
    sha256: str
    settings: Mapping[str, int]
    versions: Mapping[str, str]
    data_file: str | None = None

    @property
    def sparsity(self) -> float:
        """The fraction of zeros among the kernels in the file."""
        return sum(row.zeros for row in self.kernels) / sum(row.weights for row in self.kernels)

    def _table(self) -> _reports.Table:
        counts = [(row.weights, row.model_zeros, row.zeros) for row in self.kernels]
        columns = ["kernel", "shape in the file", "dtype", "weights", "zeros", "in the file"]
        columns.append("sparsity")
        rows = [
            [row.name, _reports.shape(row.shape), row.dtype, *_counted(*count)]
            for row, count in zip(self.kernels, counts, strict=True)
        ]
        footer = ["all kernels", "", "", *_counted(*map(sum, zip(*counts, strict=True)))]
        allowed = "any" if self.logit_tolerance is None else f"{self.logit_tolerance:.3g}"
        same = "" if self.same_class is None else f"; same class: {100 * self.same_class:.1f} %"
        notes = []
        if self.settings:
            given = ", ".join(f"{name} {value}" for name, value in self.settings.items())
            notes.append(f"Settings: {given}.")
        if self.data_file is not None:
            notes.append(f"Its weights are in {self.data_file}: move the two files together.")
        if self.dense_bytes is not None:
            columns += ["stored", "bytes"]
            for row, kernel in zip(rows, self.kernels, strict=True):
                row += [kernel.stored, _reports.size(kernel.stored_bytes)]
            footer += ["", _reports.size(sum(row.stored_bytes or 0 for row in self.kernels))]
            notes += self._storage(self.dense_bytes)
        if self.format == "ONNX":
            notes.append(
                "Kernels are dense, as ONNX Runtime has no others: zeros make the file neither "
                "smaller nor faster. `compact` and `export_litert(sparse=True)` do."
            )
        title = f"{self.format} ({self.precision}) {self.path}"
        noted = self._notes(self.file_bytes, f"(allowed: {allowed}){same}", *notes)
        return _reports.Table(title, columns, rows, footer, noted)

    def _storage(self, dense_bytes: int) -> list[str]:
        """Return the notes on sparse kernels."""
        share = f"{self.file_bytes / dense_bytes:.2f}"
        notes = [f"With dense kernels: {_reports.size(dense_bytes)}; this file is {share} of that."]
        for reason in dict.fromkeys(row.reason for row in self.kernels if row.reason):
            names = ", ".join(row.name for row in self.kernels if row.reason == reason)
            notes.append(f"Dense ({reason}): {names}.")
        stored = {row.stored for row in self.kernels}
        if "dense on loading" in stored:
            notes.append(
                "Kernels that are dense on loading make the file smaller, but only 1x1 "
                "convolutions faster."
            )
        if stored - {"dense"}:
            notes.append(
                "Not for microcontrollers: LiteRT can't load kernels there that are dense on "
                "loading, and returns wrong logits for sparse ones, without an error. Export with "
                "sparse=False for them, and make the network smaller by pruning.compact."
            )
        if self.pointwise is not None and self.pointwise[1]:
            sparse, count = self.pointwise
            why = "" if sparse == count else " `export.sparse_inference` says why."
            notes.append(
                f"1x1 convolutions run sparsely on {PROCESSORS}: {sparse} of {count}.{why}"
            )
        return notes


def _counted(weights: int, model_zeros: int, zeros: int) -> list[str]:
    """Return the cells of the last four columns: weights, zeros in model and file, sparsity."""
    share = _reports.percent(zeros / weights)
    return [f"{weights:,}", f"{model_zeros:,}", f"{zeros:,}", share]


def _rows(kind: type, rows: list[dict[str, Any]]) -> tuple[Any, ...]:
    """Return records of a dataclass from their dictionaries, ignoring derived values."""
    names = [field.name for field in dataclasses.fields(kind)]
    return tuple(
        kind(**{name: row[name] for name in names if name != "shape"}, shape=tuple(row["shape"]))
        for row in rows
    )
