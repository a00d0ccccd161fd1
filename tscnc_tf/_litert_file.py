"""LiteRT files as Python objects: graphs, operations by name, constants."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from tscnc_tf import _extras, _files

# Numbers that the format fixes: the dtypes of kernels, a dense axis.
DTYPES: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 9: np.dtype("i1")}
INT8 = 9
_DENSE_AXIS = 0
# Operations that unpack a constant when the file is loaded.
UNPACKING = ("DENSIFY", "DEQUANTIZE")
# The classes of options that several operations share, by the operations.
_OPTIONS = {"MAXIMUM": "MaximumMinimum"}


class File:
    """A LiteRT file, unpacked.

    Args:
        content: the file.
        source: where it comes from, for error messages.

    Raises:
        ValueError: it is damaged, or it has more than 2 GB, with its weights after the graph.
    """

    def __init__(self, content: bytes, source: str = "the LiteRT file") -> None:
        self.schema = _extras.require_extra("ai_edge_litert.schema_py_generated", "litert")
        utils = _extras.require_extra("ai_edge_litert.tools.flatbuffer_utils", "litert")
        try:
            self.model = utils.convert_bytearray_to_object(bytearray(content))
            _ = self.model.buffers[0], self.model.subgraphs[0]  # None, if it is damaged
        except Exception as error:  # of many kinds
            raise ValueError(
                f"{source} is cut off or damaged ({type(error).__name__}: {error}): export it "
                "again."
            ) from error
        self._packed = utils.convert_object_to_bytearray
        self._names = {
            number: name
            for name, number in vars(self.schema.BuiltinOperator).items()
            if not name.startswith("_")
        }
        if any(buffer.offset > 1 for buffer in self.model.buffers):
            raise ValueError(
                f"{source} has more than 2 GB, and its weights are stored after the graph, where "
                "they can't be read: export with sparse=False, and inspect the Keras model."
            )

    def content(self) -> bytes:
        """Return the file."""
        return bytes(self._packed(self.model))

    def constants(self) -> Iterator[tuple[Any, int]]:
        """Yield the constants of the dtypes of kernels: their graphs, and their numbers there."""
        for graph in self.model.subgraphs:
            for number, tensor in enumerate(graph.tensors):
                if tensor.type in DTYPES and (tensor.sparsity or len(self.values(tensor))):
                    yield graph, number

    def sparse(self) -> list[tuple[Any, int]]:
        """Return the graphs and numbers of the sparse constants."""
        return [(g, number) for g, number in self.constants() if g.tensors[number].sparsity]

    def read_constants(self, graph: Any) -> list[int]:
        """Return the numbers of a graph's constants in the order in which operations read them."""
        known = {number for each, number in self.constants() if each is graph}
        unpacked = {
            int(each.outputs[0]): int(each.inputs[0])
            for each in graph.operators
            if self.kind(each) in UNPACKING
        }
        found = []
        for operation in graph.operators:
            for number in () if self.kind(operation) in UNPACKING else map(int, operation.inputs):
                while number in unpacked:
                    number = unpacked[number]
                found += [number] if number in known else []
        return found

    def makes_dense(self) -> bool:
        """Tell whether a kernel is made dense on loading."""
        operators = (each for graph in self.model.subgraphs for each in graph.operators)
        return any(self.kind(each) == "DENSIFY" for each in operators)

    def size(self, tensor: Any) -> int:
        """Return the bytes of a constant, the indices of a sparse form included."""
        size = len(self.values(tensor))
        for axis in tensor.sparsity.dimMetadata if tensor.sparsity else ():
            if axis.format != _DENSE_AXIS:
                vectors = (axis.arraySegments, axis.arrayIndices)
                size += sum(np.asarray(vector.values).nbytes for vector in vectors)
        return size

    def values(self, tensor: Any) -> np.ndarray:
        """Return the bytes of a tensor's entries."""
        data = self.model.buffers[tensor.buffer].data
        return np.asarray([] if data is None else data, np.uint8)

    def array(self, tensor: Any) -> np.ndarray:
        """Return the dense array of a constant kernel."""
        values = self.values(tensor).view(DTYPES[tensor.type])
        shape = () if tensor.shape is None else tuple(map(int, tensor.shape))
        if tensor.sparsity is None:
            return values.reshape(shape)
        return expanded(tensor.sparsity, shape, values)

    @staticmethod
    def centered(tensor: Any, values: np.ndarray) -> np.ndarray:
        """Return the dense array of a constant, less its zero points."""
        points = zero_points(tensor)
        if not any(points):
            return values
        shape = [1] * values.ndim
        shape[tensor.quantization.quantizedDimension if len(points) > 1 else 0] = len(points)
        return values.astype(np.int64) - np.reshape(points, shape)

    def integers(self, graph: Any, number: int) -> list[int] | None:
        """Return the entries of a constant of 32-bit integers; None if it is not constant."""
        values = self.values(graph.tensors[number])
        return values.view("<i4").tolist() if len(values) else None

    def kind(self, operation: Any) -> str:
        """Return the kind of an operation by the format's name, such as `CONV_2D`."""
        return self._names[self.model.operatorCodes[operation.opcodeIndex].builtinCode]

    def readers(self, graph: Any, number: int) -> list[Any]:
        """Return the operations that read a tensor."""
        return [each for each in graph.operators if number in each.inputs]

    def kinds(self, graph: Any, number: int) -> set[str]:
        """Return the kinds of the operations that read a tensor."""
        return {self.kind(each) for each in self.readers(graph, number)}

    def consumer_kinds(self, graph: Any, number: int) -> set[str]:
        """Return the kinds of the operations that read a tensor, directly or unpacked."""
        found = set()
        for operation in self.readers(graph, number):
            kind, output = self.kind(operation), operation.outputs[0]
            found |= self.consumer_kinds(graph, output) if kind in UNPACKING else {kind}
        return found

    def add_constant(self, graph: Any, name: bytes, array: np.ndarray) -> int:
        """Add a constant of float32 or 32-bit integers to a graph; return its number."""
        dtype = 0 if array.dtype == np.float32 else 2
        shape = np.asarray(array.shape, np.int32)
        tensor = self.schema.TensorT(name=name, shape=shape, type=dtype, hasRank=True)
        buffer = self.schema.BufferT()
        buffer.data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.model.buffers.append(buffer)
        tensor.buffer = len(self.model.buffers) - 1
        graph.tensors.append(tensor)
        return len(graph.tensors) - 1

    def add_like(
        self,
        graph: Any,
        number: int,
        suffix: bytes,
        sizes: Callable[[np.ndarray], np.ndarray] = np.copy,
    ) -> int:
        """Add a computed tensor with the properties of another one; return its number.

        Args:
            graph: a graph.
            number: the number of the other tensor.
            suffix: the suffix that is added to its name.
            sizes: a function from the other tensor's shape to the new one.
        """
        given = graph.tensors[number]
        signature = given.shapeSignature
        tensor = self.schema.TensorT(
            name=given.name + suffix,
            shape=np.asarray(sizes(given.shape), np.int32),
            shapeSignature=None if signature is None else np.asarray(sizes(signature), np.int32),
            type=given.type,
            quantization=given.quantization,
            hasRank=True,
        )
        graph.tensors.append(tensor)
        return len(graph.tensors) - 1

    def insert_before(
        self, graph: Any, kind: str, inputs: Iterable[int], output: int, readers: Sequence[Any]
    ) -> Any:
        """Insert an operation in front of the first reader of its output; return it."""
        of_readers = [any(each is one for one in readers) for each in graph.operators]
        return self.insert(graph, kind, inputs, output, of_readers.index(True))

    def insert(self, graph: Any, kind: str, inputs: Iterable[int], output: int, place: int) -> Any:
        """Insert an operation at a place in the order of a graph; return it."""
        schema = self.schema
        codes, number = self.model.operatorCodes, getattr(schema.BuiltinOperator, kind)
        if number not in [code.builtinCode for code in codes]:
            codes.append(schema.OperatorCodeT(number, None, 1, number))
        name = _OPTIONS.get(kind, kind.title()) + "Options"
        operation = schema.OperatorT(
            opcodeIndex=[code.builtinCode for code in codes].index(number),
            inputs=np.array(list(inputs), np.int32),
            outputs=np.array([output], np.int32),
            builtinOptionsType=getattr(schema.BuiltinOptions, name),
            builtinOptions=getattr(schema, f"{name}T")(),
        )
        graph.operators.insert(place, operation)
        return operation


def is_litert(content: bytes) -> bool:
    """Tell whether `content` has the identifier of LiteRT's FlatBuffers schema."""
    return content[4:8] == b"TFL3"


def read(name: str, path: str | os.PathLike[str]) -> bytes:
    """Return the content of a LiteRT file, which the argument `name` gives.

    Raises:
        ImportError: LiteRT is not installed.
        FileNotFoundError: there is no file at `path`.
        ValueError: it is not a LiteRT file.
    """
    _extras.require_extra("ai_edge_litert.interpreter", "litert")
    file = _files.require_file(name, path)
    content = file.read_bytes()
    if not is_litert(content):
        raise ValueError(f"{name} is not the path of a LiteRT file: {file}.")
    return content


def zero_points(tensor: Any) -> tuple[int, ...]:
    """Return the integers that represent 0.0 in a constant; empty for floats."""
    quantization = tensor.quantization
    points = None if quantization is None else quantization.zeroPoint
    return () if points is None else tuple(map(int, points))


def shape_of(tensor: Any) -> tuple[int, ...]:
    """Return the shape of a tensor, with -1 for a dimension of any size."""
    signature = tensor.shape if tensor.shapeSignature is None else tensor.shapeSignature
    return () if signature is None else tuple(map(int, signature))


def replace(operation: Any, old: int, new: int) -> None:
    """Make an operation read another tensor."""
    operation.inputs = np.where(operation.inputs == old, new, operation.inputs).astype(np.int32)


def expanded(parameters: Any, shape: Sequence[int], values: np.ndarray) -> np.ndarray:
    """Return the dense array of a tensor in sparse form.

    The entries are stored in the order in which the axes, then those of the blocks, are traversed,
    which is part of the sparse form. Each axis has all indices, or lists those with entries
    (compressed sparse rows).

    Args:
        parameters: the tensor's `SparsityParametersT`.
        shape: the shape of the dense array.
        values: the entries, one-dimensional.
    """
    places = np.zeros((1, 0), np.int64)  # indices along the axes so far, a row per entry
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
