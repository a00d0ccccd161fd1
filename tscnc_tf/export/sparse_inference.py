"""Which 1x1 convolutions of a model LiteRT runs by their nonzero weights alone, and why not."""

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
_NOT_WRITTEN = "the file is not written so; export_litert(sparse=True) would"
_NO_SPARSE = "no kernel of the file is made dense on loading, without which LiteRT runs all dense"


@dataclasses.dataclass(frozen=True)
class PointwiseConvolution(_reports.WeightRecord):
    """A 1x1 convolution of a file, and how it is run.

    Attributes:
        name: of its layer.
        weights: the number of entries of its kernel.
        zeros: how many of them are zero.
        is_sparse: whether it is run by its nonzero weights alone.
        reason: why not, or an empty text.
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
        name: of its layer.
        operation: its kind, as LiteRT calls it.
        why: what is wrong with it.
        change: what to have instead, or an empty text where nothing is known to help.
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
        obstacles: what stands in the way of those that are run dense.
        faults: layers whose results are wrong on such processors, or keep the file from being
            loaded; none in files that `export_litert` has written, where what LiteRT gets wrong is
            run dense.
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
                f"The file is faulty there: it can't be loaded, or returns wrong results, for what "
                f"{', '.join(self.faults)} return. Export it by export_litert(sparse=True)."
            )
        title = f"{self.sparse} of {len(self.rows)} 1x1 convolutions are run sparsely"
        return _reports.Table(title, columns, rows, None, notes)


def sparse_inference(model: Any, *, probe: Any = None) -> SparseInferenceReport:
    """Tell which 1x1 convolutions LiteRT runs sparsely, and what stands in the way of the others.

    On ARM, WebAssembly, RISC-V, and on x86 without AVX, LiteRT (by its library XNNPACK) runs 1x1
    convolutions by their nonzero weights alone, where the graph around them is of a certain form:

    * It begins with a 3x3 convolution of stride 2 on three channels, padded by 1 on each side
      (`ZeroPadding2D(1)`, then `padding="valid"`: "same" pads an even size on one side only).
    * In it are 1x1 convolutions, depthwise ones of 3x3 or 5x5 that are padded evenly, sums and
      products of images, constants per channel, and functions of single entries (activations).
    * It ends in a mean over the image (`GlobalAveragePooling2D`), or in a depth-to-space.
    * Nothing else comes into it, and what is computed in it is not needed elsewhere.
    * More than two thirds of the weights of its 1x1 convolutions are zero.

    `applications.MobileNetV1` and `MobileNetV2` are so. What can be changed without changing the
    function, `export_litert(sparse=True)` changes by itself: "same" paddings that are even for the
    size of the image, constants per channel, and ends that LiteRT would get wrong. Parts that it
    would get wrong otherwise, as with squeeze and excitation, are run dense in such files.

    Needs `pip install "tscnc_tf[litert]"`.

    Args:
        model: a built model of either Keras, as for `export_litert`; or the path of a LiteRT file.
        probe: for a model, as for `export_litert`.

    Returns:
        A `SparseInferenceReport`. `print` it.

    Raises:
        ImportError: LiteRT is not installed.
        FileNotFoundError: there is no file at a path that is given.
        ValueError: the file is none of LiteRT, or as for `export_litert`.
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
        return inspected(read(model), {}, str(model))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.tflite"
        report = litert.export_litert(model, path, sparse=True, probe=probe)
        names = {layer.name: layer.name for layer in layers.flatten(model)}
        names |= {row.tensor: row.name for row in report.kernels if row.tensor is not None}
        return inspected(path.read_bytes(), names)


def inspected(
    content: bytes, names: Mapping[str, str], source: str = "the LiteRT file"
) -> SparseInferenceReport:
    """Return the report on a file, given the names of the layers that its tensors are of."""
    file, better = File(content, source), File(sparse_graph.changed(content, ends=False))
    makes_dense = file.makes_dense()
    rows, obstacles, faults = [], dict[SparseObstacle, None](), []
    graphs = zip(sparse_graph.graphs(file), sparse_graph.graphs(better), strict=True)
    for graph, other in graphs:
        found = graph.faults() if makes_dense else []
        faults += [_layer(fault.obstacle.tensor, names) for fault in found]
        # What could be changed without changing the function is no reason.
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
    """Return what keeps a convolution from being run sparsely, but for its zeros."""
    part = graph.part_of(node)
    found = [node.obstacle] if part is None else part.obstacles
    # What `prepared` has put before a part is there for the other reasons.
    found = [each for each in found if each.operation != sparse_graph.BARRIER] or found
    return [SparseObstacle(_layer(each.tensor, names), *each[1:]) for each in found]


def _reason(
    obstacles: list[SparseObstacle], node: sparse_graph.Node, part: sparse_graph.Part | None
) -> str:
    """Return why a convolution is run dense, in few words."""
    if obstacles and not node.roles:
        return _LAYER
    if obstacles:
        return f"of {obstacles[0].name} ({obstacles[0].operation})"
    return _NOT_WRITTEN if part is None or part.has_zeros else _FEW_ZEROS


def _layer(tensor: str, names: Mapping[str, str]) -> str:
    """Return the name of the layer that a tensor is of, as far as its name says it.

    A name is that of the operation in the model, with the layers that it is in: `net/conv/Relu`,
    or of several that have become one: `net/conv/Relu;net/conv/convolution`. Keras 3 numbers what
    has been called before.
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
