"""Kernels in sparse form in a LiteRT file: read back, and changed where the file would not do.

LiteRT's converter writes a kernel of many zeros as its other entries and where they are. A dense
layer takes the sparse form as it is if the zeros make blocks of inputs; before any other operation
the converter puts one that makes the kernel dense once the file is loaded (`DENSIFY`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tensorflow.lite.python import schema_py_generated as schema
from tensorflow.lite.tools import flatbuffer_utils

from tscnc_tf.export.constants import Converted, Form

DTYPES: dict[int, np.dtype[Any]] = {
    schema.TensorType.FLOAT32: np.dtype("<f4"),
    schema.TensorType.FLOAT16: np.dtype("<f2"),
    schema.TensorType.INT8: np.dtype("i1"),
}
SPARSE, DENSIFIED = "sparse", "dense on loading"
# The only operations that read a sparse tensor; any other takes its entries for those of a dense
# one, and reads on behind them.
_READERS = (schema.BuiltinOperator.DENSIFY, schema.BuiltinOperator.FULLY_CONNECTED)
_TOO_LARGE = "no smaller in sparse form"
_NOT_RUN = "LiteRT runs no int8 dense layer whose kernel is made dense on loading"
_TOO_FEW = "too few zeros for the converter"


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
        if axis.format == schema.DimensionType.DENSE:
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

    A kernel that is no smaller in sparse form is made dense again, and so is one whose sparse form
    LiteRT is known not to run. Where an operation would take a sparse kernel for a dense one, it is
    made dense in front of it.
    """
    file = _File(content)
    reasons = {}
    for graph, number in file.sparse():
        tensor = graph.tensors[number]
        dense = file.dense(tensor)
        reason = _TOO_LARGE if file.size(tensor) >= dense.nbytes else ""
        if tensor.type == schema.TensorType.INT8 and not reason:
            readers = [
                kind
                for operation in file.readers(graph, number, schema.BuiltinOperator.DENSIFY)
                for kind in file.kinds(graph, operation.outputs[0])
            ]
            reason = _NOT_RUN if schema.BuiltinOperator.FULLY_CONNECTED in readers else ""
        if reason:
            reasons[tensor.name.decode()] = reason
            file.make_dense(graph, number, dense)
        elif set(file.kinds(graph, number)) - set(_READERS):
            file.make_dense_on_loading(graph, number)
    forms = {}
    for graph, number in file.constants():
        tensor, name = graph.tensors[number], graph.tensors[number].name.decode()
        kind, reason = "dense", reasons.get(name, _TOO_FEW)
        if tensor.sparsity is not None:
            is_run = schema.BuiltinOperator.FULLY_CONNECTED in file.kinds(graph, number)
            kind, reason = SPARSE if is_run else DENSIFIED, ""
        forms[name] = Form(kind, file.size(tensor), reason)
    settled = file.content()
    for graph, number in file.sparse():
        file.make_dense(graph, number, file.dense(graph.tensors[number]))
    return Converted(settled, forms, len(file.content()))


class _File:
    """A LiteRT file, unpacked."""

    def __init__(self, content: bytes) -> None:
        self.model = flatbuffer_utils.convert_bytearray_to_object(bytearray(content))

    def content(self) -> bytes:
        """Return the file."""
        return flatbuffer_utils.convert_object_to_bytearray(self.model)

    def constants(self) -> Iterator[tuple[Any, int]]:
        """Yield the constants of numbers that kernels have: their graphs and numbers there."""
        for graph in self.model.subgraphs:
            for number, tensor in enumerate(graph.tensors):
                if tensor.type in DTYPES and self.model.buffers[tensor.buffer].data is not None:
                    yield graph, number

    def sparse(self) -> list[tuple[Any, int]]:
        """Return those of them that are sparse."""
        return [(g, number) for g, number in self.constants() if g.tensors[number].sparsity]

    def dense(self, tensor: Any) -> np.ndarray:
        """Return the dense array of a sparse tensor."""
        values = np.asarray(self.model.buffers[tensor.buffer].data, np.uint8)
        return expanded(tensor.sparsity, tensor.shape, values.view(DTYPES[tensor.type]))

    def size(self, tensor: Any) -> int:
        """Return the bytes of a constant, with those that say where its entries are."""
        size = len(self.model.buffers[tensor.buffer].data)
        for axis in tensor.sparsity.dimMetadata if tensor.sparsity else ():
            if axis.format != schema.DimensionType.DENSE:
                vectors = (axis.arraySegments, axis.arrayIndices)
                size += sum(np.asarray(vector.values).nbytes for vector in vectors)
        return size

    def kinds(self, graph: Any, number: int) -> list[int]:
        """Return the kinds of the operations that take a tensor."""
        return [self._kind(each) for each in graph.operators if number in each.inputs]

    def readers(self, graph: Any, number: int, kind: int) -> list[Any]:
        """Return the operations of a kind that take a tensor."""
        readers = [each for each in graph.operators if number in each.inputs]
        return [each for each in readers if self._kind(each) == kind]

    def make_dense(self, graph: Any, number: int, dense: np.ndarray) -> None:
        """Give a sparse tensor its dense array, and drop what made it dense on loading."""
        tensor, buffers = graph.tensors[number], self.model.buffers
        tensors = [each for other in self.model.subgraphs for each in other.tensors]
        if sum(each.buffer == tensor.buffer for each in tensors) > 1:
            buffers.append(schema.BufferT())
            tensor.buffer = len(buffers) - 1
        buffers[tensor.buffer].data = dense.reshape(-1).view(np.uint8)
        tensor.sparsity = None
        for operation in self.readers(graph, number, schema.BuiltinOperator.DENSIFY):
            graph.operators.remove(operation)
            for other in graph.operators:
                _replace(other, operation.outputs[0], number)

    def make_dense_on_loading(self, graph: Any, number: int) -> None:
        """Put an operation between a sparse tensor and those that would take it for a dense one."""
        tensor = graph.tensors[number]
        graph.tensors.append(
            schema.TensorT(
                name=tensor.name + b"_dense",
                shape=tensor.shape,
                type=tensor.type,
                quantization=tensor.quantization,
                hasRank=True,
            )
        )
        made, first = len(graph.tensors) - 1, len(graph.operators)
        for place, operation in enumerate(graph.operators):
            if number in operation.inputs and self._kind(operation) not in _READERS:
                _replace(operation, number, made)
                first = min(first, place)
        densify = schema.OperatorT(
            opcodeIndex=self._opcode(schema.BuiltinOperator.DENSIFY),
            inputs=np.array([number], np.int32),
            outputs=np.array([made], np.int32),
            builtinOptionsType=schema.BuiltinOptions.DensifyOptions,
            builtinOptions=schema.DensifyOptionsT(),
        )
        graph.operators.insert(first, densify)

    def _kind(self, operation: Any) -> int:
        return self.model.operatorCodes[operation.opcodeIndex].builtinCode

    def _opcode(self, kind: int) -> int:
        """Return the number of a kind of operation among those of the file."""
        codes = self.model.operatorCodes
        if kind not in [code.builtinCode for code in codes]:
            codes.append(schema.OperatorCodeT(kind, None, 1, kind))
        return [code.builtinCode for code in codes].index(kind)


def _replace(operation: Any, old: int, new: int) -> None:
    """Have an operation take another tensor."""
    operation.inputs = np.where(operation.inputs == old, new, operation.inputs).astype(np.int32)
