"""Kernels in sparse form in a LiteRT file: read back, and changed where the file would not do.

LiteRT's converter writes a kernel of many zeros as its other entries and where they are. A dense
layer takes the sparse form as it is if the zeros make blocks of inputs; before any other operation
the converter puts one that makes the kernel dense once the file is loaded (`DENSIFY`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tscnc_tf import _extras
from tscnc_tf.export.constants import Converted, Form

# Numbers of the format, which stay as they are: dtypes of kernels, a dense axis, operations.
DTYPES: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 9: np.dtype("i1")}
_FLOAT16, _INT8 = 1, 9
_DENSE_AXIS = 0
_CONV_2D, _DEPTHWISE_CONV_2D, _DEQUANTIZE, _FULLY_CONNECTED, _DENSIFY = 3, 4, 6, 9, 124
# Bytes that an operation takes which makes a kernel dense, its tensor and its lists included; and
# what the scales and zero points take that the tensor repeats, for each output.
_OVERHEAD, _PER_SCALE = 256, 12
# The only operations that read a sparse tensor; any other takes it for a dense one.
_READERS = (_DENSIFY, _FULLY_CONNECTED)
_EMPTY = "it has no entries"
_TOO_LARGE = "no smaller in sparse form"
_NOT_RUN = "LiteRT does not run this layer on a kernel that is made dense on loading"
_LEFT = "the converter has left it so"


def expanded(parameters: Any, shape: Sequence[int], values: np.ndarray) -> np.ndarray:
    """Return the dense array of a tensor in sparse form.

    Its axes, and the axes of its blocks behind them, are gone through in an order of its own. Each
    either has all indices, or lists those that there are (compressed sparse rows); the entries come
    in that order.

    Args:
        parameters: the tensor's `SparsityParametersT`.
        shape: of the dense array.
        values: the entries, one-dimensional.
    """
    places = np.zeros((1, 0), np.int64)  # of what there is so far: a row each, a column per axis
    for axis in parameters.dimMetadata:
        if axis.format == _DENSE_AXIS:
            inner = np.tile(np.arange(axis.denseSize), len(places))
            outer = np.repeat(places, axis.denseSize, axis=0)
        else:
            inner = np.asarray(axis.arrayIndices.values, np.int64)
            ends = np.asarray(axis.arraySegments.values, np.int64)
            outer = np.repeat(places, ends[1:] - ends[:-1], axis=0)
        places = np.column_stack([outer, inner])
    order = list(parameters.traversalOrder)
    index = [places[:, order.index(axis)] for axis in range(len(shape))]
    blocks = () if parameters.blockMap is None else parameters.blockMap
    for number, axis in enumerate(blocks, start=len(shape)):
        level = order.index(number)
        index[axis] = index[axis] * parameters.dimMetadata[level].denseSize + places[:, level]
    dense = np.zeros(tuple(shape), values.dtype)
    dense[tuple(index)] = values
    return dense


def settle(content: bytes) -> Converted:
    """Return a file whose sparse kernels pay and can be run.

    A kernel is made dense again that is no smaller in sparse form, with all that goes with it, and
    so is one whose sparse form LiteRT is known not to run. Where an operation would take a sparse
    kernel for a dense one, it is made dense in front of it.
    """
    file = _File(content)
    reasons = {}
    for graph, number in file.sparse():
        if reason := _fault(file, graph, number):
            reasons[graph.tensors[number].name.decode()] = reason
            file.make_dense(graph, number)
        elif file.kinds(graph, number) - set(_READERS):
            file.make_dense_on_loading(graph, number)
    forms = {}
    for graph, number in file.constants():
        tensor, name = graph.tensors[number], graph.tensors[number].name.decode()
        kind, reason = "dense", reasons.get(name, _LEFT)
        if tensor.sparsity is not None:
            is_run = _FULLY_CONNECTED in file.kinds(graph, number)
            kind, reason = "sparse" if is_run else "dense on loading", ""
        forms[name] = Form(kind, file.size(tensor), reason)
    settled = file.content()
    for graph, number in file.sparse():
        file.make_dense(graph, number)
    return Converted(settled, forms, file.content())


def _fault(file: _File, graph: Any, number: int) -> str:
    """Return why a sparse kernel is to be dense, or an empty text."""
    tensor = graph.tensors[number]
    is_run = file.kinds(graph, number) == {_FULLY_CONNECTED}
    size = file.size(tensor) + (0 if is_run else _OVERHEAD + _PER_SCALE * _scales(tensor))
    if not len(file.values(tensor)):
        return _EMPTY
    if size >= math.prod(map(int, tensor.shape)) * DTYPES[tensor.type].itemsize:
        return _TOO_LARGE
    readers = file.kinds_behind(graph, number)
    if tensor.type == _INT8 and not is_run and _FULLY_CONNECTED in readers:
        return _NOT_RUN
    if tensor.type == _FLOAT16 and readers - {_CONV_2D, _DEPTHWISE_CONV_2D, _FULLY_CONNECTED}:
        return _NOT_RUN
    return ""


class _File:
    """A LiteRT file, unpacked."""

    def __init__(self, content: bytes) -> None:
        self.schema = _extras.require_extra("ai_edge_litert.schema_py_generated", "litert")
        utils = _extras.require_extra("ai_edge_litert.tools.flatbuffer_utils", "litert")
        self.model = utils.convert_bytearray_to_object(bytearray(content))
        self._packed = utils.convert_object_to_bytearray
        if any(buffer.offset > 1 for buffer in self.model.buffers):
            raise ValueError(
                "sparse must be False for a file of more than 2 GB, whose weights stand behind it."
            )

    def content(self) -> bytes:
        """Return the file."""
        return bytes(self._packed(self.model))

    def constants(self) -> Iterator[tuple[Any, int]]:
        """Yield the constants of numbers that kernels have: their graphs and numbers there."""
        for graph in self.model.subgraphs:
            for number, tensor in enumerate(graph.tensors):
                if tensor.type in DTYPES and (tensor.sparsity or len(self.values(tensor))):
                    yield graph, number

    def sparse(self) -> list[tuple[Any, int]]:
        """Return those of them that are sparse."""
        return [(g, number) for g, number in self.constants() if g.tensors[number].sparsity]

    def values(self, tensor: Any) -> np.ndarray:
        """Return the bytes of a tensor's entries."""
        data = self.model.buffers[tensor.buffer].data
        return np.asarray([] if data is None else data, np.uint8)

    def dense(self, tensor: Any) -> np.ndarray:
        """Return the dense array of a sparse tensor."""
        values = self.values(tensor).view(DTYPES[tensor.type])
        return expanded(tensor.sparsity, tensor.shape, values)

    def size(self, tensor: Any) -> int:
        """Return the bytes of a constant, with those that say where its entries are."""
        size = len(self.values(tensor))
        for axis in tensor.sparsity.dimMetadata if tensor.sparsity else ():
            if axis.format != _DENSE_AXIS:
                vectors = (axis.arraySegments, axis.arrayIndices)
                size += sum(np.asarray(vector.values).nbytes for vector in vectors)
        return size

    def readers(self, graph: Any, number: int) -> list[tuple[int, Any]]:
        """Return the operations that take a tensor, with their kinds."""
        return [(self._kind(each), each) for each in graph.operators if number in each.inputs]

    def kinds(self, graph: Any, number: int) -> set[int]:
        """Return the kinds of the operations that take a tensor."""
        return {kind for kind, _ in self.readers(graph, number)}

    def kinds_behind(self, graph: Any, number: int) -> set[int]:
        """Return the kinds that take a tensor once it is dense, and of floats as they compute."""
        found = set()
        for kind, operation in self.readers(graph, number):
            passes_on = kind in (_DENSIFY, _DEQUANTIZE)
            found |= self.kinds_behind(graph, operation.outputs[0]) if passes_on else {kind}
        return found

    def make_dense(self, graph: Any, number: int) -> None:
        """Give a sparse tensor its dense array, and drop what made it dense on loading."""
        tensor, buffers = graph.tensors[number], self.model.buffers
        dense = self.dense(tensor)
        tensors = [each for other in self.model.subgraphs for each in other.tensors]
        if sum(each.buffer == tensor.buffer for each in tensors) > 1:
            buffers.append(self.schema.BufferT())
            tensor.buffer = len(buffers) - 1
        buffers[tensor.buffer].data = dense.reshape(-1).view(np.uint8)
        tensor.sparsity = None
        for kind, operation in self.readers(graph, number):
            if kind == _DENSIFY:
                graph.operators.remove(operation)
                unused = graph.tensors[operation.outputs[0]]
                unused.name, unused.quantization = b"", None
                for other in graph.operators:
                    _replace(other, operation.outputs[0], number)

    def make_dense_on_loading(self, graph: Any, number: int) -> None:
        """Put an operation between a sparse tensor and those that would take it for a dense one."""
        tensor = graph.tensors[number]
        graph.tensors.append(
            self.schema.TensorT(
                name=tensor.name + b"_dense",
                shape=tensor.shape,
                type=tensor.type,
                quantization=tensor.quantization,
                hasRank=True,
            )
        )
        made = len(graph.tensors) - 1
        others = [each for kind, each in self.readers(graph, number) if kind not in _READERS]
        for operation in others:
            _replace(operation, number, made)
        densify = self.schema.OperatorT(
            opcodeIndex=self._opcode(_DENSIFY),
            inputs=np.array([number], np.int32),
            outputs=np.array([made], np.int32),
            builtinOptionsType=self.schema.BuiltinOptions.DensifyOptions,
            builtinOptions=self.schema.DensifyOptionsT(),
        )
        graph.operators.insert(graph.operators.index(others[0]), densify)

    def _kind(self, operation: Any) -> int:
        return self.model.operatorCodes[operation.opcodeIndex].builtinCode

    def _opcode(self, kind: int) -> int:
        """Return the number of a kind of operation among those of the file."""
        codes = self.model.operatorCodes
        if kind not in [code.builtinCode for code in codes]:
            codes.append(self.schema.OperatorCodeT(kind, None, 1, kind))
        return [code.builtinCode for code in codes].index(kind)


def _replace(operation: Any, old: int, new: int) -> None:
    """Have an operation take another tensor."""
    operation.inputs = np.where(operation.inputs == old, new, operation.inputs).astype(np.int32)


def _scales(tensor: Any) -> int:
    """Return how many scales a quantised tensor has."""
    scale = None if tensor.quantization is None else tensor.quantization.scale
    return 0 if scale is None else len(scale)
