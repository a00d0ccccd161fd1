"""Kernels in sparse form in a LiteRT file, changed where the file would not do.

LiteRT's converter writes a kernel of many zeros as its other entries and where they are. A dense
layer takes the sparse form as it is if the zeros make blocks of inputs; before any other operation
the converter puts one that makes the kernel dense once the file is loaded (`DENSIFY`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tscnc_tf._litert_file import DTYPES, INT8, File, replace
from tscnc_tf.export import sparse_graph
from tscnc_tf.export.constants import Converted, Form

_FLOAT32, _FLOAT16 = 0, 1
# Bytes that an operation takes which makes a kernel dense, its tensor and its lists included; and
# what the scales and zero points take that the tensor repeats, for each output.
_OVERHEAD, _PER_SCALE = 256, 12
# The only operations that read a sparse tensor; any other takes it for a dense one.
_READERS = ("DENSIFY", "FULLY_CONNECTED")
_EMPTY = "it has no entries"
_TOO_LARGE = "no smaller in sparse form"
_NOT_RUN = "LiteRT does not run this layer on a kernel that is made dense on loading"
# The converter writes a sparse form only where at least this share of the weights is zero.
_SHARE = 0.3
_FEW = "less than 30 % of its weights are zero, where the converter writes no sparse form"
_LEFT = "the converter has left it so"


def settle(content: bytes) -> Converted:
    """Return a file whose sparse kernels pay and can be run.

    Blocks are written entry by entry where that is smaller: of kernels with next to no zeros in
    place the converter takes whole blocks. A kernel is made dense again that is no smaller in
    sparse form, with all that goes with it, and so is one whose sparse form LiteRT is known not to
    run. Where an operation would take a sparse kernel for a dense one, it is made dense in front of
    it. Then the graph is changed, without changing its function, so that 1x1 convolutions are run
    sparsely where LiteRT can do that, and rightly.
    """
    file = File(content)
    reasons = {}
    for graph, number in file.sparse():
        _store_by_entries(file, graph.tensors[number])
        if reason := _fault(file, graph, number):
            reasons[graph.tensors[number].name.decode()] = reason
            _make_dense(file, graph, number)
        elif file.kinds(graph, number) - set(_READERS):
            _make_dense_on_loading(file, graph, number)
    forms = {}
    for graph, number in file.constants():
        tensor, name = graph.tensors[number], graph.tensors[number].name.decode()
        if tensor.sparsity is None:
            kind, reason = "dense", reasons.get(name) or _unwritten(file, tensor)
        else:
            is_run = "FULLY_CONNECTED" in file.kinds(graph, number)
            kind, reason = "sparse" if is_run else "dense on loading", ""
        forms[name] = Form(kind, file.size(tensor), reason)
    settled, pointwise = file.content(), None
    if file.sparse():
        settled, pointwise = sparse_graph.prepared(settled)
    for graph, number in file.sparse():
        _make_dense(file, graph, number)
    return Converted(settled, forms, file.content(), pointwise)


def _unwritten(file: File, tensor: Any) -> str:
    """Return why the converter has written no sparse form."""
    kernel = file.array(tensor)
    zeros = kernel.size - np.count_nonzero(kernel)
    return _FEW if zeros < _SHARE * kernel.size else _LEFT


def _fault(file: File, graph: Any, number: int) -> str:
    """Return why a sparse kernel is to be dense, or an empty text."""
    tensor = graph.tensors[number]
    is_run = file.kinds(graph, number) == {"FULLY_CONNECTED"}
    size = file.size(tensor) + (0 if is_run else _OVERHEAD + _PER_SCALE * _scales(tensor))
    if not len(file.values(tensor)):
        return _EMPTY
    if size >= math.prod(map(int, tensor.shape)) * DTYPES[tensor.type].itemsize:
        return _TOO_LARGE
    readers = file.kinds_behind(graph, number)
    if is_run and int(tensor.shape[-1]) == 1:
        return _NOT_RUN
    if tensor.type == INT8 and not is_run and "FULLY_CONNECTED" in readers:
        return _NOT_RUN
    if tensor.type == _FLOAT16 and readers - {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"}:
        return _NOT_RUN
    return ""


def _make_dense(file: File, graph: Any, number: int) -> None:
    """Give a sparse tensor its dense array, and drop what made it dense on loading."""
    tensor = graph.tensors[number]
    _give(file, tensor, file.array(tensor))
    tensor.sparsity = None
    for operation in file.readers(graph, number):
        if file.kind(operation) == "DENSIFY":
            graph.operators.remove(operation)
            unused = graph.tensors[operation.outputs[0]]
            unused.name, unused.quantization = b"", None
            for other in graph.operators:
                replace(other, operation.outputs[0], number)


def _make_dense_on_loading(file: File, graph: Any, number: int) -> None:
    """Put an operation between a sparse tensor and those that would take it for a dense one."""
    made = file.add_like(graph, number, b"_dense")
    others = [each for each in file.readers(graph, number) if file.kind(each) not in _READERS]
    for operation in others:
        replace(operation, number, made)
    file.put_in_front(graph, "DENSIFY", [number], made, others)


def _store_by_entries(file: File, tensor: Any) -> None:
    """Write a matrix of floats that is stored in blocks entry by entry, if that is smaller.

    LiteRT runs dense layers in this form, too, and no slower: at 99 % zeros in any place, three of
    four entries of the blocks are zero.
    """
    is_of_floats = tensor.type in (_FLOAT32, _FLOAT16)
    if not is_of_floats or tensor.sparsity.blockMap is None or len(tensor.shape) != 2:
        return
    size, dense = file.size(tensor), file.array(tensor)
    rows, columns = np.nonzero(dense)
    schema = file.schema
    every_row = schema.DimensionMetadataT(denseSize=len(dense))
    listed = schema.DimensionMetadataT(format=schema.DimensionType.SPARSE_CSR)
    ends = np.searchsorted(rows, np.arange(len(dense) + 1))
    listed.arraySegmentsType, listed.arraySegments = _vector(schema, ends)
    listed.arrayIndicesType, listed.arrayIndices = _vector(schema, columns)
    values = dense[rows, columns]
    lists = (listed.arraySegments.values, listed.arrayIndices.values)
    if values.nbytes + sum(each.nbytes for each in lists) < size:
        _give(file, tensor, values)
        order = np.arange(2, dtype=np.int32)
        tensor.sparsity = schema.SparsityParametersT(order, None, [every_row, listed])


def _vector(schema: Any, values: np.ndarray) -> tuple[int, Any]:
    """Return a list of indices in as few bytes as they need, and the kind that it is of."""
    largest = int(values.max(initial=0))
    bits = next((bits for bits in (8, 16) if largest < 2**bits), None)
    name = f"Uint{bits}Vector" if bits else "Int32Vector"
    dtype = f"u{bits // 8}" if bits else "i4"
    return getattr(schema.SparseIndexVector, name), getattr(schema, f"{name}T")(
        values.astype(dtype)
    )


def _give(file: File, tensor: Any, values: np.ndarray) -> None:
    """Have a tensor hold other entries, which are no other tensor's."""
    buffers = file.model.buffers
    tensors = [each for graph in file.model.subgraphs for each in graph.tensors]
    if sum(each.buffer == tensor.buffer for each in tensors) > 1:
        buffers.append(file.schema.BufferT())
        tensor.buffer = len(buffers) - 1
    buffers[tensor.buffer].data = values.reshape(-1).view(np.uint8)


def _scales(tensor: Any) -> int:
    """Return how many scales a quantised tensor has."""
    scale = None if tensor.quantization is None else tensor.quantization.scale
    return 0 if scale is None else len(scale)
