"""Report on the 1x1 convolutions that LiteRT computes from their nonzero weights only."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from tscnc_tf import _reports
from tscnc_tf._keras import layers
from tscnc_tf._litert_file import File, read
from tscnc_tf.export import litert, sparse_graph
from tscnc_tf.export.report import PROCESSORS

__all__ = ["PointwiseConvolution", "SparseInferenceReport", "SparseObstacle", "sparse_inference"]

_FEW_ZEROS = "no more than two thirds of the weights in its part of the graph are zero"
_LAYER = "of the convolution itself"
_NOT_WRITTEN = "the file lacks the form for it, which export_litert(sparse=True) writes"
_NO_SPARSE = "no kernel of the file is made dense on loading: LiteRT then runs all of them dense"


@dataclasses.dataclass(frozen=True)
class PointwiseConvolution(_reports.WeightRecord):
    """A 1x1 convolution of a file, and how it is run.

    Attributes:
        name: the name of its layer.
        weights: the number of entries of its kernel.
        zeros: how many of them are zero.
        is_sparse: whether it is computed from its nonzero weights only.
        reason: why not; empty if it is.
    """

    name: str
    weights: int
    zeros: int
    is_sparse: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class SparseObstacle(_reports.Record):
    """One operation that keeps 1x1 convolutions from being run sparsely.

    Attributes:
        name: the name of its layer.
        operation: its kind, by LiteRT's name.
        why: what is wrong with it.
        change: what to use instead; empty if nothing is known to help.
    """

    name: str
    operation: str
    why: str
    change: str

    def __str__(self) -> str:
        change = f" What would help: {self.change}." if self.change else ""
        return f"{self.name} ({self.operation}): {self.why}.{change}"


@dataclasses.dataclass(frozen=True)
class SparseInferenceReport(_reports.Report):
    """How the 1x1 convolutions of a LiteRT file are run on processors with kernels for them.

    Attributes:
        rows: the convolutions, in the order of the graph.
        obstacles: the operations that keep convolutions from being run sparsely.
        faults: layers that have wrong results on such processors, or make loading the file fail;
            empty for files from `export_litert`, in which such parts are run dense.
    """

    rows: tuple[PointwiseConvolution, ...]
    obstacles: tuple[SparseObstacle, ...]
    faults: tuple[str, ...]

    @property
    def sparse(self) -> int:
        """How many of the convolutions are run sparsely."""
        return sum(row.is_sparse for row in self.rows)

    def _table(self) -> _reports.Table:
        columns = ["1x1 convolution", "weights", "zeros", "sparsity", "run", "because"]
        rows = [
            [
                row.name,
                *_reports.sparsity_cells(row.weights, row.zeros),
                "sparse" if row.is_sparse else "dense",
                row.reason,
            ]
            for row in self.rows
        ]
        notes = [f"On {PROCESSORS}. On x86 with AVX all are run dense."]
        notes += map(str, self.obstacles)
        if self.faults:
            notes.append(
                f"The file can't be loaded there, or has wrong results, because of these layers: "
                f"{', '.join(self.faults)}. Export it by export_litert(sparse=True)."
            )
        title = f"{self.sparse} of {len(self.rows)} 1x1 convolutions are run sparsely"
        return _reports.Table(title, columns, rows, None, notes)


def sparse_inference(model: Any, *, probe: Any = None) -> SparseInferenceReport:
    """Return which 1x1 convolutions LiteRT runs sparsely, and what prevents it for the others.

    On ARM, WebAssembly, RISC-V, and on x86 without AVX, LiteRT (by its library XNNPACK) computes
    1x1 convolutions from their nonzero weights only, in parts of a graph of this form:

    * The part begins with a 3x3 convolution of stride 2 on three channels, padded by 1 on each side
      (`ZeroPadding2D(1)`, then `padding="valid"`: "same" pads an even size on one side only).
    * It consists of 1x1 convolutions, depthwise ones of 3x3 or 5x5 with even padding, sums and
      products of images, constants per channel, and elementwise functions (activations).
    * It ends in a mean over the image (`GlobalAveragePooling2D`), or in a depth-to-space.
    * It has no other inputs, and its intermediate results are not used elsewhere.
    * More than two thirds of the weights of its 1x1 convolutions are zero.

    `applications.MobileNetV1` and `MobileNetV2` have this form. `export_litert(sparse=True)` makes
    "same" paddings explicit if they are even for the size of the image, reshapes constants per
    channel, and rewrites ends that LiteRT would compute wrongly; the function stays the same. Other
    parts that LiteRT would compute wrongly, as with squeeze and excitation, are run dense.

    Needs `pip install ".[litert]"` in a checkout.

    Args:
        model: a built model of either Keras, as for `export_litert`; or the path of a LiteRT file.
        probe: for a model, as for `export_litert`.

    Returns:
        A `SparseInferenceReport`. `print` it.

    Raises:
        ImportError: LiteRT is not installed.
        FileNotFoundError: there is no file at a path that is given.
        ValueError: the file is not a LiteRT file, or as for `export_litert`.
        TypeError, RuntimeError, OSError: as for `export_litert`.

    Example:
        >>> import tf_keras
        >>> from tscnc_tf import export, pruning
        >>> layers = tf_keras.layers
        >>> model = tf_keras.Sequential([
        ...     layers.ZeroPadding2D(1, input_shape=(16, 16, 3)),
        ...     layers.Conv2D(8, 3, strides=2, name="stem"),
        ...     layers.Conv2D(64, 1, activation="relu", name="wide"),
        ...     layers.GlobalAveragePooling2D(),
        ...     layers.Dense(10),
        ... ])
        >>> pruned = pruning.prune_now(model, 0.8, layers="wide")
        >>> [(row.name, row.is_sparse) for row in export.sparse_inference(pruned).rows]
        [('wide', True)]
    """
    if isinstance(model, str | os.PathLike):
        return inspected(read("model", model), {}, str(model))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.tflite"
        report = litert.export_litert(model, path, sparse=True, probe=probe)
        names = {layer.name: layer.name for layer in layers.flatten(model)}
        names |= {row.tensor: row.name for row in report.kernels if row.tensor is not None}
        return inspected(path.read_bytes(), names)


def inspected(
    content: bytes, names: Mapping[str, str], source: str = "the LiteRT file"
) -> SparseInferenceReport:
    """Return the report on a file, given the names of layers by the names of tensors."""
    file, changed = File(content, source), File(sparse_graph.changed(content, ends=False))
    makes_dense = file.makes_dense()
    rows, obstacles, faults = [], dict[SparseObstacle, None](), []
    graphs = zip(sparse_graph.graphs(file), sparse_graph.graphs(changed), strict=True)
    for graph, other in graphs:
        found = graph.faults() if makes_dense else []
        faults += [_layer(fault.obstacle.tensor, names) for fault in found]
        # What a rewritten file would not have is no obstacle.
        twins = {node.output: node for node in other.nodes}
        for node in graph.nodes:
            if node.kernel is None:
                continue
            kernel = file.array(graph.graph.tensors[node.kernel])
            part, reason = graph.part_of(node), ""
            if part is None or not part.is_run:
                seen = _obstacles(other, twins.get(node.output, node), names)
                obstacles |= dict.fromkeys(seen)
                reason = _reason(seen, node, part)
            elif not makes_dense:
                reason = _NO_SPARSE
            rows.append(
                PointwiseConvolution(
                    name=_layer(node.obstacle.tensor, names),
                    weights=kernel.size,
                    zeros=kernel.size - int(np.count_nonzero(kernel)),
                    is_sparse=not reason,
                    reason=reason,
                )
            )
    return SparseInferenceReport(tuple(rows), tuple(obstacles), tuple(dict.fromkeys(faults)))


def _obstacles(
    graph: sparse_graph.Graph, node: sparse_graph.Node, names: Mapping[str, str]
) -> list[SparseObstacle]:
    """Return what keeps a convolution from being run sparsely, apart from too few zeros."""
    part = graph.part_of(node)
    found = [node.obstacle] if part is None else part.obstacles
    # A barrier that `prepared` has inserted is there because of the other obstacles.
    found = [each for each in found if each.operation != sparse_graph.BARRIER] or found
    return [SparseObstacle(_layer(each.tensor, names), *each[1:]) for each in found]


def _reason(
    obstacles: list[SparseObstacle], node: sparse_graph.Node, part: sparse_graph.Part | None
) -> str:
    """Return why a convolution is run dense, as a cell of the table."""
    if obstacles and not node.roles:
        return _LAYER
    if obstacles:
        return f"of {obstacles[0].name} ({obstacles[0].operation})"
    return _NOT_WRITTEN if part is None or part.has_zeros else _FEW_ZEROS


def _layer(tensor: str, names: Mapping[str, str]) -> str:
    """Return the name of the layer that a tensor belongs to, as far as its name tells.

    A tensor is named by the operation and the layers around it, as `net/conv/Relu`, or by several
    operations that were merged, as `net/conv/Relu;net/conv/convolution`. Keras 3 appends numbers to
    the names of layers that are called repeatedly.
    """
    if tensor in names:
        return names[tensor]
    layers_of_model = frozenset(names.values())
    for name in reversed(tensor.split(";")):
        for each in reversed(name.split("/")):
            for candidate in (each, re.sub(r"_\d+$", "", each)):
                if candidate in layers_of_model:
                    return candidate
    scopes = tensor.split(";")[-1].split("/")
    return scopes[-2] if len(scopes) > 1 else tensor
