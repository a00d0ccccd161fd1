"""Corrections of the sparse kernels that LiteRT's converter writes.

The converter stores a kernel of many zeros as its nonzero entries and their indices. A dense layer
is run in this form if the zeros form blocks of inputs. In front of any other operation the
converter inserts one that makes the kernel dense when the file is loaded (`DENSIFY`).

If the inputs of a dense layer are no multiple of the block, the converter loses the weights of the
last ones. So it also converts without sparse forms, and each kernel is compared with that file's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tscnc_tf._litert_file import DTYPES, INT8, File, replace
from tscnc_tf.export import sparse_graph
from tscnc_tf.export.constants import Converted, Form

_FLOAT32, _FLOAT16 = 0, 1
# The bytes of a DENSIFY operation with its tensor and lists; and those that the tensor's scale and
# zero point add per output channel.
_OVERHEAD, _PER_SCALE = 256, 12
# The only operations that read sparse tensors; any other misreads them as dense.
_READERS = ("DENSIFY", "FULLY_CONNECTED")
_EMPTY = "it has no entries"
_TOO_LARGE = "no smaller in sparse form"
_NOT_RUN = "LiteRT does not run this layer on a kernel that is made dense on loading"
# The converter writes a sparse form only where at least this share of the weights is zero.
_LEAST_SHARE = 0.3
_FEW = "less than 30 % of its weights are zero: the converter writes no sparse form"
_OTHER = "the converter has written it so"
_INCOMPLETE = "the converter loses weights, as its inputs are no multiple of the block"


def corrected(content: bytes, dense: bytes | None = None) -> Converted:
    """Return a file whose sparse kernels make it smaller and can be run.

    Kernels of which the converter has lost weights get those of the dense file. Blocks are stored
    entry by entry where that is smaller: the converter stores whole blocks even if few of their
    entries are nonzero. A kernel is made dense again if its sparse form, with its overhead, is no
    smaller, or if LiteRT is known not to run it. Where an operation would misread a sparse kernel
    as dense, `DENSIFY` is inserted in front of it. Finally, `sparse_graph.prepared` changes the
    graph so that LiteRT runs 1x1 convolutions sparsely where it can do so correctly.

    Args:
        content: the file by the converter.
        dense: that of the same model without sparse forms; None if there is none.

    Raises:
        ValueError: weights are lost, and there is no dense file, or one of another graph.
    """
    file = File(content)
    kernels = None if dense is None else _counterparts(file, File(dense))
    reasons = {}
    for graph, number in file.sparse():
        tensor, name = graph.tensors[number], graph.tensors[number].name.decode()
        if kernels is None and _is_cut(tensor):
            raise ValueError(
                f"the sparse kernel {name!r} of shape {tuple(map(int, tensor.shape))} lacks "
                "weights: its inputs are no multiple of its blocks. Export the model by "
                "export_litert(sparse=True)."
            )
        whole = file.array(tensor) if kernels is None else kernels[id(graph), number]
        is_lost = _is_cut(tensor) or not np.array_equal(file.array(tensor), whole)
        is_stored = _store_by_entries(file, tensor, whole, always=is_lost)
        if is_lost and not is_stored:
            reasons[name] = _INCOMPLETE
            _make_dense(file, graph, number, whole)
        elif reason := _why_made_dense(file, graph, number):
            reasons[name] = reason
            _make_dense(file, graph, number)
        elif file.kinds(graph, number) - set(_READERS):
            _make_dense_on_loading(file, graph, number)
    forms = {}
    for graph, number in file.constants():
        tensor, name = graph.tensors[number], graph.tensors[number].name.decode()
        if tensor.sparsity is None:
            kind, reason = "dense", reasons.get(name) or _why_converted_dense(file, tensor)
        else:
            is_run = "FULLY_CONNECTED" in file.kinds(graph, number)
            kind, reason = "sparse" if is_run else "dense on loading", ""
        forms[name] = Form(kind, file.size(tensor), reason)
    content, pointwise = file.content(), None
    if file.sparse():
        content, pointwise = sparse_graph.prepared(content)
    return Converted(content, forms, dense, pointwise)


def _counterparts(file: File, dense: File) -> dict[tuple[int, int], np.ndarray]:
    """Return the arrays in a dense file of a file's constants, by graph (its id) and number.

    The converter names tensors anew each time, so they are found by the operations that read them.

    Raises:
        ValueError: the files do not have the same operations.
    """
    found = {}
    pairs = zip(file.model.subgraphs, dense.model.subgraphs, strict=True)
    for graph, other in pairs:
        numbers, others = file.read_constants(graph), dense.read_constants(other)
        shapes = [
            [tuple(map(int, g.tensors[n].shape)) for n in listed]
            for g, listed in ((graph, numbers), (other, others))
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "LiteRT's converter has made another graph with sparse kernels than without: "
                "export with sparse=False."
            )
        for number, counterpart in zip(numbers, others, strict=True):
            found[id(graph), number] = dense.array(other.tensors[counterpart])
    return found


def _is_cut(tensor: Any) -> bool:
    """Return whether the blocks of a sparse tensor do not fill its last axis."""
    sparsity, size = tensor.sparsity, len(tensor.shape)
    blocks = () if sparsity.blockMap is None else sparsity.blockMap
    order = list(sparsity.traversalOrder)
    lengths = [sparsity.dimMetadata[order.index(size + n)].denseSize for n in range(len(blocks))]
    pairs = zip(blocks, lengths, strict=True)
    return any(int(tensor.shape[axis]) % length for axis, length in pairs)


def _why_converted_dense(file: File, tensor: Any) -> str:
    """Return why the converter has written a kernel in dense form."""
    kernel = file.array(tensor)
    zeros = kernel.size - np.count_nonzero(kernel)
    return _FEW if zeros < _LEAST_SHARE * kernel.size else _OTHER


def _why_made_dense(file: File, graph: Any, number: int) -> str:
    """Return why a sparse kernel must be made dense; empty if it need not."""
    tensor = graph.tensors[number]
    is_run = file.kinds(graph, number) == {"FULLY_CONNECTED"}
    size = file.size(tensor) + (0 if is_run else _OVERHEAD + _PER_SCALE * _scales(tensor))
    if not len(file.values(tensor)):
        return _EMPTY
    if size >= math.prod(map(int, tensor.shape)) * DTYPES[tensor.type].itemsize:
        return _TOO_LARGE
    readers = file.consumer_kinds(graph, number)
    if is_run and int(tensor.shape[-1]) == 1:
        return _NOT_RUN
    if tensor.type == INT8 and not is_run and "FULLY_CONNECTED" in readers:
        return _NOT_RUN
    if tensor.type == _FLOAT16 and readers - {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"}:
        return _NOT_RUN
    return ""


def _make_dense(file: File, graph: Any, number: int, values: np.ndarray | None = None) -> None:
    """Store a sparse tensor as its dense array, and remove the `DENSIFY` operations on it."""
    tensor = graph.tensors[number]
    _set_values(file, tensor, file.array(tensor) if values is None else values)
    tensor.sparsity = None
    for operation in file.readers(graph, number):
        if file.kind(operation) == "DENSIFY":
            graph.operators.remove(operation)
            unused = graph.tensors[operation.outputs[0]]
            unused.name, unused.quantization = b"", None
            for other in graph.operators:
                replace(other, operation.outputs[0], number)


def _make_dense_on_loading(file: File, graph: Any, number: int) -> None:
    """Insert `DENSIFY` between a sparse tensor and the operations that would misread it."""
    made = file.add_like(graph, number, b"_dense")
    others = [each for each in file.readers(graph, number) if file.kind(each) not in _READERS]
    for operation in others:
        replace(operation, number, made)
    file.insert_before(graph, "DENSIFY", [number], made, others)


def _store_by_entries(file: File, tensor: Any, dense: np.ndarray, *, always: bool) -> bool:
    """Store a matrix of floats in blocks entry by entry instead, if that is smaller, or always.

    Returns whether it is stored so.

    LiteRT runs dense layers in this form, too, and no slower: at 99 % zeros in any place, three of
    four entries of the blocks are zero.
    """
    is_of_floats = tensor.type in (_FLOAT32, _FLOAT16)
    if not is_of_floats or tensor.sparsity.blockMap is None or len(tensor.shape) != 2:
        return False
    size = file.size(tensor)
    rows, columns = np.nonzero(dense)
    schema = file.schema
    every_row = schema.DimensionMetadataT(denseSize=len(dense))
    listed = schema.DimensionMetadataT(format=schema.DimensionType.SPARSE_CSR)
    ends = np.searchsorted(rows, np.arange(len(dense) + 1))
    listed.arraySegmentsType, listed.arraySegments = _index_vector(schema, ends)
    listed.arrayIndicesType, listed.arrayIndices = _index_vector(schema, columns)
    values = dense[rows, columns]
    lists = (listed.arraySegments.values, listed.arrayIndices.values)
    is_better = always or values.nbytes + sum(each.nbytes for each in lists) < size
    if is_better:
        _set_values(file, tensor, values)
        order = np.arange(2, dtype=np.int32)
        tensor.sparsity = schema.SparsityParametersT(order, None, [every_row, listed])
    return is_better


def _index_vector(schema: Any, values: np.ndarray) -> tuple[int, Any]:
    """Return the type of an index vector in as few bytes as its values need, and the vector."""
    largest = int(values.max(initial=0))
    bits = next((bits for bits in (8, 16) if largest < 2**bits), None)
    name = f"Uint{bits}Vector" if bits else "Int32Vector"
    dtype = f"u{bits // 8}" if bits else "i4"
    vector = getattr(schema, f"{name}T")(values.astype(dtype))
    return getattr(schema.SparseIndexVector, name), vector


def _set_values(file: File, tensor: Any, values: np.ndarray) -> None:
    """Set the entries of a tensor, in a buffer that no other tensor shares."""
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
