"""What is said of an export to a single file, as of LiteRT or ONNX."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tscnc_tf import _reports
from tscnc_tf.export.report import ExportedTensor
from tscnc_tf.inspection import SparsityReport

__all__ = ["ExportedKernel", "FileExportReport"]


@dataclasses.dataclass(frozen=True)
class ExportedKernel:
    """One kernel, or another pruned weight, and the tensor that holds it in the file.

    Attributes:
        name: as `inspection.sparsity` calls it.
        tensor: the name of the tensor in the file; None for a weight without zeros that the
            converter has taken to pieces.
        shape: the shape of the tensor, which is in the format's own layout.
        dtype: the name of its dtype.
        weights: the number of entries.
        model_zeros: how many of them are zero in the model.
        zeros: how many of them are zero in the file. At least as many: small weights may be
            rounded to zero, and the zeros of a BatchNorm may have been multiplied in.
    """

    name: str
    tensor: str | None
    shape: tuple[int, ...]
    dtype: str
    weights: int
    model_zeros: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """The fraction of zeros in the file."""
        return self.zeros / self.weights

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        row = dataclasses.asdict(self) | {"sparsity": self.sparsity}
        return row | {"shape": list(self.shape)}


@dataclasses.dataclass(frozen=True)
class FileExportReport(_reports.Report):
    """What was exported to a file: zeros, sizes, signature, versions. `str()` is a table.

    Attributes:
        path: the file, absolute.
        format: "LiteRT" or "ONNX".
        precision: of the weights and sums, "float32" or "int8".
        weights: the zeros of the model that was exported.
        kernels: the zeros of the file, kernel by kernel.
        expected_sparsity: what the export was held to, or None.
        inputs, outputs: the tensors that the file takes and returns.
        max_logit_difference: the largest absolute difference between the logits of the model and
            those of the written file, over the probe batch.
        logit_tolerance: the largest difference that would have passed; None for int8, where any is
            allowed.
        same_class: the share of the probe's examples for which model and file prefer the same
            class; None for several outputs.
        probe_examples: the number of examples in the probe batch.
        file_bytes: the size of the file.
        gzip_bytes: its size gzipped (level 9, without time stamp): where zeros pay off.
        ideal_sparse_bytes: what the weights alone would take, each kernel in the smallest of a
            dense array, a bitmap with values and compressed rows, as `inspection.sizes` counts; no
            file of these formats is that small. None for int8: it counts floats.
        sha256: its digest.
        settings: what else it was made with: the number of calibration examples, the opset.
        versions: of the libraries that made the export; "unknown" if not installed as a package.
    """

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
    gzip_bytes: int
    ideal_sparse_bytes: int | None
    sha256: str
    settings: Mapping[str, int]
    versions: Mapping[str, str]

    @property
    def sparsity(self) -> float:
        """The fraction of zeros among the kernels in the file."""
        return sum(row.zeros for row in self.kernels) / sum(row.weights for row in self.kernels)

    def to_dict(self) -> dict[str, Any]:
        """Return everything in the report as plain values, ready for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {
            "weights": self.weights.to_dict(),
            "sparsity": self.sparsity,
            "kernels": [row.to_dict() for row in self.kernels],
            "inputs": [_plain(tensor) for tensor in self.inputs],
            "outputs": [_plain(tensor) for tensor in self.outputs],
            "settings": dict(self.settings),
            "versions": dict(self.versions),
        }

    def _table(self) -> _reports.Table:
        allowed = "any" if self.logit_tolerance is None else f"{self.logit_tolerance:.3g}"
        same = "" if self.same_class is None else f"; same class: {100 * self.same_class:.1f} %"
        asked = self.expected_sparsity
        counts = (sum(row.weights for row in self.kernels), self._model_zeros, self._zeros)
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return _reports.Table(
            f"{self.format} ({self.precision}) {self.path}",
            ("kernel", "shape in the file", "dtype", "weights", "zeros", "in the file", "sparsity"),
            [
                (
                    row.name,
                    "×".join(map(str, row.shape)),
                    row.dtype,
                    f"{row.weights:,}",
                    f"{row.model_zeros:,}",
                    f"{row.zeros:,}",
                    _reports.percent(row.sparsity),
                )
                for row in self.kernels
            ],
            (
                *("all kernels", "", ""),
                *(f"{count:,}" for count in counts),
                _reports.percent(self.sparsity),
            ),
            [
                f"Expected sparsity: {'none' if asked is None else _reports.percent(asked)}.",
                f"Size: {_reports.size(self.file_bytes)}, gzipped {_reports.size(self.gzip_bytes)}"
                f"{self._ideal_sparse}.",
                f"Inputs: {'; '.join(map(str, self.inputs))}.",
                f"Outputs: {'; '.join(map(str, self.outputs))}.",
                f"Largest logit difference on {self.probe_examples} examples: "
                f"{_reports.significant(self.max_logit_difference)} (allowed: {allowed}){same}.",
                *([f"Settings: {settings}."] if settings else []),
                "Made with "
                + ", ".join(f"{name} {version}" for name, version in self.versions.items())
                + ".",
            ],
        )

    @property
    def _ideal_sparse(self) -> str:
        if self.ideal_sparse_bytes is None:
            return ""
        return f"; the weights alone, ideally sparse, {_reports.size(self.ideal_sparse_bytes)}"

    @property
    def _zeros(self) -> int:
        return sum(row.zeros for row in self.kernels)

    @property
    def _model_zeros(self) -> int:
        return sum(row.model_zeros for row in self.kernels)


def _plain(tensor: ExportedTensor) -> dict[str, Any]:
    return dataclasses.asdict(tensor) | {"shape": list(tensor.shape)}
