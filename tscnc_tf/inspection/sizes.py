"""The bytes of weights: dense, compressed, in formats without zeros, and in a LiteRT file."""

from __future__ import annotations

import dataclasses
import math
import os
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _litert_file, _reports
from tscnc_tf.inspection import weights

NOTE = (
    "Zeros don't make a file saved by Keras (.keras, .h5, a SavedModel) smaller: each is stored in "
    "full width, uncompressed, and so is the optimizer's state, if there is one. Compress the "
    "file, or write a sparse one: tscnc.export_litert(sparse=True)."
)
FILE_NOTE = (
    "The whole file includes the graph; its gzip size is that of the whole file. "
    "export_litert(sparse=True) writes kernels without their zeros."
)


@dataclasses.dataclass(frozen=True)
class KernelSize(_reports.Record):
    """The bytes of one kernel, or of another weight that is pruned or can be, in several formats.

    Attributes:
        name: the layer's name, and the weight's if the layer has several; in a file, the tensor's
            name.
        shape: the shape of the variable, or of the tensor.
        dtype: the name of its dtype.
        weights: the number of entries, n.
        nonzeros: how many of them are not zero, k.
        dense_bytes: n times the size of an entry.
        gzip_bytes: the dense array as a separate gzip stream (level 9); None if not requested.
        bitmap_bytes: one bit per entry, which marks the zeros, and the nonzero entries.
        csr_bytes: compressed sparse rows: a pointer per row and one more, a column index per
            nonzero entry, and the nonzero entries; by rows or by columns, whichever is smaller.
            Pointers and indices are the smallest unsigned integers, of 1, 2, 4 or 8 bytes, that
            suffice.
        limit_bytes: n·H(k/n) bits for the places of the zeros, with the binary entropy H, and the
            nonzero entries. No format takes less if the places are independent of each other; gzip
            may, if they form a pattern or values repeat.
        stored_bytes: its bytes in a LiteRT file, the indices of a sparse form included; None for a
            model.
    """

    _derived = ("sparsity", "ratio", "ideal_sparse_bytes", "ideal_format")

    name: str
    shape: tuple[int, ...]
    dtype: str
    weights: int
    nonzeros: int
    dense_bytes: int
    gzip_bytes: int | None
    bitmap_bytes: int
    csr_bytes: int
    limit_bytes: int
    stored_bytes: int | None = None

    @property
    def sparsity(self) -> float:
        """The fraction of zeros."""
        return 1.0 - self.nonzeros / self.weights

    @property
    def ideal_sparse_bytes(self) -> int:
        """The smallest of dense, bitmap and CSR."""
        return min(self.dense_bytes, self.bitmap_bytes, self.csr_bytes)

    @property
    def ideal_format(self) -> str:
        """The name of the smallest: "dense", "bitmap" or "CSR"."""
        sizes = {"dense": self.dense_bytes, "bitmap": self.bitmap_bytes, "CSR": self.csr_bytes}
        return min(sizes, key=sizes.__getitem__)

    @property
    def ratio(self) -> float:
        """How many times smaller than dense the ideal sparse size is."""
        return self.dense_bytes / self.ideal_sparse_bytes


@dataclasses.dataclass(frozen=True)
class SizeReport(_reports.Report):
    """The bytes of a model's weights, kernel by kernel; `print` it for a table.

    Attributes:
        rows: one per kernel, then one per other weight, as in `sparsity`; for a file, one per
            constant of floats or int8 with two axes or more (equal ones are stored once, and have
            one row).
        other_weights: the number of all other weights: biases, normalisation, embeddings; for a
            file, of all other constants, shapes and axes included.
        other_bytes: their size; they are dense in every format.
        gzip_bytes: all weights, or the file, as one gzip stream (level 9); None if not requested.
        file_bytes: the size of the LiteRT file; None for a model.
    """

    _derived = ("dense_bytes", "ideal_sparse_bytes", "limit_bytes", "ratio", "gzip_ratio")

    rows: tuple[KernelSize, ...]
    other_weights: int
    other_bytes: int
    gzip_bytes: int | None
    file_bytes: int | None = None

    @property
    def dense_bytes(self) -> int:
        """All weights as dense arrays in their dtypes: about the size of a file saved by Keras."""
        return sum(row.dense_bytes for row in self.rows) + self.other_bytes

    @property
    def ideal_sparse_bytes(self) -> int:
        """Each row in its ideal format, other weights dense."""
        return sum(row.ideal_sparse_bytes for row in self.rows) + self.other_bytes

    @property
    def limit_bytes(self) -> int:
        """Each row at its lower limit, other weights dense."""
        return sum(row.limit_bytes for row in self.rows) + self.other_bytes

    @property
    def ratio(self) -> float:
        """How many times smaller than dense the ideal sparse size is."""
        return _ratio(self.dense_bytes, self.ideal_sparse_bytes)

    @property
    def gzip_ratio(self) -> float | None:
        """How many times smaller than dense the gzip stream is."""
        return None if self.gzip_bytes is None else self.dense_bytes / self.gzip_bytes

    def _table(self) -> _reports.Table:
        size = _reports.size
        packed = "" if self.gzip_ratio is None else f"gzip {_times(self.gzip_ratio)}, "
        is_file = self.file_bytes is not None
        columns = ["weight", "shape", "dtype", "zeros"]
        columns += [*(["in file"] if is_file else []), "dense", "gzip", "bitmap", "CSR"]
        rows = [
            (
                row.name,
                _reports.shape(row.shape),
                row.dtype,
                _reports.percent(row.sparsity),
                *([size(row.stored_bytes)] if is_file else []),
                *map(size, (row.dense_bytes, row.gzip_bytes, row.bitmap_bytes, row.csr_bytes)),
                f"{size(row.ideal_sparse_bytes)} ({row.ideal_format})",
                _times(row.ratio),
                size(row.limit_bytes),
            )
            for row in self.rows
        ]
        other = size(self.other_bytes)
        here = [other] if is_file else []  # the same in every format
        others = ("others", f"{self.other_weights}", "", "")
        rows.append((*others, *here, other, *[""] * 3, other, "", ""))
        return _reports.Table(
            "Bytes of the weights",
            [*columns, "ideal sparse", "ratio", "limit"],
            rows,
            (
                *("whole file" if is_file else "whole model", "", "", ""),
                *([size(self.file_bytes)] if is_file else []),
                *(size(self.dense_bytes), size(self.gzip_bytes), "", ""),
                *(size(self.ideal_sparse_bytes), _times(self.ratio), size(self.limit_bytes)),
            ),
            [
                f"Smaller than dense: {packed}ideal sparse {_times(self.ratio)}, at the lower "
                f"limit {_times(_ratio(self.dense_bytes, self.limit_bytes))}.",
                FILE_NOTE if is_file else NOTE,
            ],
        )


def sizes(model: Any, *, gzip: bool = True) -> SizeReport:
    r"""Return how many bytes a model's weights take: dense, compressed, and ideally sparse.

    Of a kernel with n entries of b bytes, k of which are not zero, these are compared:

    * dense: :math:`n b`
    * bitmap: :math:`\lceil n/8 \rceil + k b`
    * CSR, of the kernel as a matrix with r rows and c columns: :math:`(r + 1) p + k i + k b`, where
      an index of i bytes reaches c - 1, and a pointer of p bytes reaches k
    * the lower limit: :math:`\lceil n H(k/n) / 8 \rceil + k b` with the binary entropy
      :math:`H(q) = -q \log_2 q - (1 - q) \log_2 (1 - q)`

    The matrix has a row per output channel (or, for CSR by columns, a column). A pruned weight
    counts as `weight * mask`, in the dtype of its variable, and zeros have no sign. Weights that
    are neither kernels nor pruned count as dense. Values count in full: rounding them to fewer bits
    is not considered here. For a layer that Keras has quantized, the integers count, without scales
    and statistics. LoRA's factors count as merged into the kernel.

    For a LiteRT file, the rows are its constants of two axes or more, dense or in sparse form, by
    the names of their tensors, and `stored_bytes` is their size in the file.

    Args:
        model: a built Keras 3 or tf_keras model, with or without pruning wrappers; or the path of a
            LiteRT file.
        gzip: whether to compress all weights as well, which takes seconds for a hundred MiB.

    Returns:
        A `SizeReport`, with `dense_bytes`, `ideal_sparse_bytes` and `gzip_bytes`. The same weights
        give the same figures.

    Raises:
        TypeError: `model` is neither a Keras model nor a path, or `gzip` not a boolean.
        ValueError: the model has no weights yet, or neither kernels nor pruned weights; or the file
            is not a LiteRT file.
        FileNotFoundError: there is no file at the path.
        ImportError: LiteRT is not installed, and `model` is a path.

    Reference:
        Cover & Thomas, "Elements of Information Theory", 2nd ed. 2006, section 5.4 (the limit);
        Han, Mao & Dally 2016, "Deep Compression", arXiv 1510.00149 (what else can be saved).

    Example:
        >>> import numpy as np, tf_keras, tscnc_tf.inspection
        >>> model = tf_keras.Sequential([tf_keras.layers.Dense(8, input_shape=(8,), name="last")])
        >>> model.set_weights([np.eye(8), np.ones(8)])
        >>> report = tscnc_tf.inspection.sizes(model)
        >>> report.dense_bytes, report.ideal_sparse_bytes  # 64 and 8 floats; 64 bits, 16 floats
        (288, 72)
    """
    _checks.boolean("gzip", gzip)
    if isinstance(model, str | os.PathLike):
        return _of_file(model, gzip)
    rows = {id(weight.variable): _row(weight, gzip) for weight in weights.listed(model)}
    arrays = [(v, _stored(values, v)) for v, values in weights.all_weights(model)]
    others = [values for variable, values in arrays if id(variable) not in rows]
    return SizeReport(
        rows=tuple(rows.values()),
        other_weights=sum(values.size for values in others),
        other_bytes=sum(values.nbytes for values in others),
        gzip_bytes=_gzip_bytes(values for _, values in arrays) if gzip else None,
    )


def _of_file(path: str | os.PathLike[str], gzip: bool) -> SizeReport:
    """Return the report on a LiteRT file."""
    content = _litert_file.read("model", path)
    file = _litert_file.File(content, str(path))
    rows, held, other_weights, other_bytes = [], set(), 0, 0
    for graph in file.model.subgraphs:
        for number, tensor in enumerate(graph.tensors):
            stored = file.size(tensor)
            if not stored or tensor.buffer in held:
                continue
            held.add(tensor.buffer)  # constants of the same content share a buffer
            name = (tensor.name or b"").decode() or f"tensor {number}"
            shape = _litert_file.shape_of(tensor)
            if tensor.type not in _litert_file.DTYPES or len(shape) < 2:
                other_weights += math.prod(shape)
                other_bytes += stored
                continue
            # The first axis is that of the filters, except for depthwise convolutions.
            outputs = shape[0] if shape[0] > 1 else shape[-1]
            values = file.array(tensor)
            centered = file.centered(tensor, values)
            rows.append(_sizes(name, centered, values, outputs, gzip, stored))
    return SizeReport(
        rows=tuple(rows),
        other_weights=other_weights,
        other_bytes=other_bytes,
        gzip_bytes=_gzip_bytes([np.frombuffer(content, np.uint8)]) if gzip else None,
        file_bytes=len(content),
    )


def _row(weight: weights.Weight, gzip: bool) -> KernelSize:
    outputs = weight.values.shape[-1]
    if isinstance(weight, weights.KernelWeight):
        groups, _, _, per_group = weight.canonical().shape
        outputs = groups * per_group
    stored = _stored(weight.values, weight.variable)
    return _sizes(weight.name, weight.values, stored, outputs, gzip)


def _sizes(
    name: str,
    values: np.ndarray,
    stored: np.ndarray,
    outputs: int,
    gzip: bool,
    stored_bytes: int | None = None,
) -> KernelSize:
    """Return the sizes of a weight, given its values as computed with and as stored."""
    count, nonzeros = values.size, int(np.count_nonzero(values))
    item = stored.nbytes / count  # two int4 values share a byte
    inputs = count // outputs
    alive = math.ceil(nonzeros * item)
    share = nonzeros / count
    entropy = -sum(q * math.log2(q) for q in (share, 1.0 - share) if q)
    return KernelSize(
        name=name,
        shape=values.shape,
        dtype=stored.dtype.name if stored.size == count else f"packed {stored.dtype.name}",
        weights=count,
        nonzeros=nonzeros,
        dense_bytes=stored.nbytes,
        gzip_bytes=_gzip_bytes([stored]) if gzip else None,
        bitmap_bytes=math.ceil(count / 8) + alive,
        csr_bytes=alive + min(_csr(outputs, inputs, nonzeros), _csr(inputs, outputs, nonzeros)),
        limit_bytes=math.ceil(count * entropy / 8) + alive,
        stored_bytes=stored_bytes,
    )


def _csr(rows: int, columns: int, nonzeros: int) -> int:
    """Return the bytes of the pointers and column indices of a matrix in CSR."""
    return (rows + 1) * _width(nonzeros) + nonzeros * _width(columns - 1)


def _width(largest: int) -> int:
    """Return the bytes of the smallest unsigned integer type that holds `largest`."""
    return next(width for width in (1, 2, 4, 8) if largest < 256**width)


def _stored(values: np.ndarray, variable: Any) -> np.ndarray:
    """Return float64 values in the variable's dtype, with zeros of positive sign.

    For quantized variables, the integers themselves are returned, which may be packed.
    """
    dtype = tf.as_dtype(variable.dtype)
    if not dtype.is_floating:
        return np.asarray(tf.convert_to_tensor(variable))
    return (values + 0.0).astype(dtype.as_numpy_dtype)


def _gzip_bytes(arrays: Iterable[np.ndarray]) -> int:
    """Return the length of arrays, one after the other, as a gzip stream without a file name."""
    stream = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    return sum(len(stream.compress(array.tobytes())) for array in arrays) + len(stream.flush())


def _ratio(dense: int, size: int) -> float:
    """Return how many times smaller a size is; 1 if both sizes are 0."""
    return dense / size if size else math.inf if dense else 1.0


def _times(ratio: float) -> str:
    return f"{ratio:.2f}×"
