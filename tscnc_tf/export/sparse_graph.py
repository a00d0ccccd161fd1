"""Which 1x1 convolutions of a LiteRT file are run sparsely, and changes after which more are.

LiteRT's library XNNPACK runs certain parts of a graph with the channels first, and their 1x1
convolutions sparsely. `sparse_inference.sparse_inference` describes the processors and the parts.
XNNPACK needs a hint for it: a kernel of any layer that is made dense on loading. In a file without
one, nothing is run sparsely. (Dense layers in sparse form are not run by XNNPACK.)

XNNPACK computes a part wrongly if an operation other than an end passes its result out of the part,
or if a mean keeps the axes of the image, whose order is another one with the channels first. Then
the file fails to load, or its results are wrong. `prepared` makes LiteRT run such parts dense.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tscnc_tf._litert_file import DTYPES, UNPACKING, File, replace, shape_of

_ELEMENTWISE = {
    *("ABS", "CEIL", "ELU", "EXP", "FLOOR", "GELU", "HARD_SWISH", "LEAKY_RELU", "LOGISTIC", "NEG"),
    *("RELU", "RELU6", "RELU_0_TO_1", "RELU_N1_TO_1", "ROUND", "RSQRT", "SQRT", "SQUARE", "TANH"),
}
# If one of these reads a result of a part, XNNPACK runs the part dense. Any other operation outside
# may read a wrong result.
_REJECTED_READERS = {
    *("AVERAGE_POOL_2D", "CONCATENATION", "DIV", "MAXIMUM", "MAX_POOL_2D", "MINIMUM", "POW"),
    *("SOFTMAX", "STRIDED_SLICE", "SUB"),
}
_SAME = 0
_FLOATS, _INTEGERS = (0, 1), (3, 7, 9, 17)  # dtypes of the format; integers of 8, 16, 8, 4 bits
_START, _INSIDE, _END = "start", "inside", "end"
_MEANS = ("MEAN", "SUM")
_CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D")
# The operation in front of a part that must not be run sparsely: the larger of x and x.
BARRIER = "MAXIMUM"
# Rows of zeros above and below an image, columns of zeros left and right of it.
Pads = tuple[int, int, int, int]


class Obstacle(NamedTuple):
    """An operation that keeps a part of a graph from being run sparsely and correctly.

    Attributes:
        tensor: the name of its kernel, or of the tensor that it returns.
        operation: its kind.
        why: what is wrong with it; empty if it is no obstacle.
        change: what would help, or an empty string.
    """

    tensor: str
    operation: str
    why: str
    change: str


@dataclasses.dataclass(eq=False)
class Node:
    """An operation, merged with the padding in front of it.

    Tensors are given by their numbers in the graph.

    Attributes:
        operation: the operation in the file.
        padding: the PAD operation that only it reads from, or None.
        inputs: the tensors that are not constant.
        output: the first tensor that it returns.
        kernel: the kernel of a 1x1 convolution; None for other operations.
        roles: what it can be in a part that is run sparsely; empty if it can't be in one.
        obstacle: why it can't.
    """

    operation: Any
    padding: Any
    inputs: list[int]
    output: int
    kernel: int | None
    roles: frozenset[str]
    obstacle: Obstacle

    @property
    def kind(self) -> str:
        """The kind of the operation, such as `CONV_2D`."""
        return self.obstacle.operation


@dataclasses.dataclass
class Part:
    """Operations that are run sparsely together, or could be.

    Attributes:
        nodes: the operations.
        obstacles: why they can't be run sparsely, or not correctly.
        faults: the operations whose results would be wrong.
        is_rejected: whether XNNPACK itself runs them dense.
        weights, zeros: of the 1x1 convolutions.
    """

    nodes: list[Node]
    obstacles: list[Obstacle] = dataclasses.field(default_factory=list)
    faults: list[Node] = dataclasses.field(default_factory=list)
    is_rejected: bool = False
    weights: int = 0
    zeros: int = 0

    @property
    def has_zeros(self) -> bool:
        """Whether enough weights are zero for LiteRT to run it sparsely."""
        return 3 * self.zeros > 2 * self.weights

    @property
    def is_run(self) -> bool:
        """Whether it is run sparsely and correctly."""
        return self.has_zeros and not self.obstacles

    @property
    def starts(self) -> list[Node]:
        """The convolutions that it begins with."""
        return [node for node in self.nodes if _START in node.roles]


class Graph:
    """A graph of a file, divided into parts as by XNNPACK.

    Attributes:
        nodes: its operations.
        parts: the operations that can be run sparsely, grouped by the parts they would be run in.
    """

    def __init__(self, file: File, graph: Any) -> None:
        self.file, self.graph = file, graph
        self._made = {int(out): each for each in graph.operators for out in each.outputs}
        operators = [each for each in graph.operators if len(each.outputs)]
        found = {id(each): self._node(each) for each in operators if not self._is_constant(each)}
        padded = {id(node.padding) for node in found.values()}
        self.nodes = [node for key, node in found.items() if key not in padded]
        self._makers = {int(out): node for node in self.nodes for out in node.operation.outputs}
        self._readers: dict[int, list[Node]] = {}
        for node in self.nodes:
            for number in node.inputs:
                self._readers.setdefault(number, []).append(node)
        self.parts = [self._part(nodes) for nodes in self._groups()]

    def name(self, number: int) -> str:
        """Return the name of a tensor."""
        return self.graph.tensors[number].name.decode()

    def constant(self, number: int) -> int | None:
        """Return the number of the constant that a tensor is, or is unpacked from; else None."""
        maker = self._made.get(number)
        if maker is not None and self.file.kind(maker) in UNPACKING:
            return self.constant(int(maker.inputs[0]))
        tensor = self.graph.tensors[number]
        has_entries = tensor.sparsity is not None or len(self.file.values(tensor))
        return number if has_entries else None

    def part_of(self, node: Node) -> Part | None:
        """Return the part that an operation belongs to, or None."""
        return next((part for part in self.parts if node in part.nodes), None)

    def shape(self, number: int) -> tuple[int, ...]:
        """Return the shape of a tensor, with -1 for a dimension of any size."""
        return shape_of(self.graph.tensors[number])

    def _is_constant(self, operation: Any) -> bool:
        """Tell whether an operation only unpacks a constant."""
        unpacks = self.file.kind(operation) in UNPACKING
        return unpacks and self.constant(operation.outputs[0]) is not None

    def _node(self, operation: Any) -> Node:
        padding = self._padding(operation)
        inputs = [int(each) for each in operation.inputs if each >= 0]
        inputs = [each for each in inputs if self.constant(each) is None]
        if padding is not None:
            inputs = [int(padding.inputs[0])]
        kind, kernel, output = self.file.kind(operation), None, int(operation.outputs[0])
        name = self.name(output)
        if (
            kind in (*_CONVOLUTIONS, "FULLY_CONNECTED")
            and (number := self.constant(int(operation.inputs[1]))) is not None
        ):
            name = self.name(number)
            is_known = self.graph.tensors[number].type in DTYPES
            if kind == "CONV_2D" and is_known and self._kernel_size(operation) == (1, 1):
                kernel = number
        roles, why, change = self._role(operation, inputs, self._pads(operation, padding))
        obstacle = Obstacle(name, kind, why, change)
        return Node(operation, padding, inputs, output, kernel, frozenset(roles), obstacle)

    def _padding(self, operation: Any) -> Any:
        """Return the PAD operation that only this convolution reads from, or None."""
        if self.file.kind(operation) not in _CONVOLUTIONS:
            return None
        given = int(operation.inputs[0])
        maker = self._made.get(given)
        if maker is None or self.file.kind(maker) != "PAD" or given in self.graph.outputs:
            return None
        sizes = self.file.integers(self.graph, int(maker.inputs[1]))
        is_only_reader = len(self.file.readers(self.graph, given)) == 1
        fits = sizes is not None and len(sizes) == 8 and not any(sizes[:2] + sizes[6:])
        is_valid = operation.builtinOptions.padding != _SAME
        return maker if is_only_reader and fits and is_valid else None

    def _pads(self, operation: Any, padding: Any) -> Pads | None:
        """Return the padding of a convolution; None if it depends on the size of the image."""
        if padding is not None:
            sizes = self.file.integers(self.graph, int(padding.inputs[1])) or []
            top, bottom, left, right = sizes[2:6]
            return top, bottom, left, right
        options = operation.builtinOptions
        if self.file.kind(operation) not in _CONVOLUTIONS:
            return None
        if options.padding != _SAME:
            return 0, 0, 0, 0
        if (options.strideH, options.strideW) != (1, 1):
            return None
        height, width = self._kernel_size(operation)
        return (height - 1) // 2, height // 2, (width - 1) // 2, width // 2

    def _kernel_size(self, operation: Any) -> tuple[int, int]:
        _, height, width, _ = self.shape(int(operation.inputs[1]))
        return height, width

    def _role(
        self, operation: Any, inputs: list[int], pads: Pads | None
    ) -> tuple[set[str], str, str]:
        """Return an operation's roles, why it has none, and what would help."""
        kind = self.file.kind(operation)
        if kind in ("RESHAPE", "SHAPE"):
            return set(), "it changes the axes", ""
        types = [self.graph.tensors[each].type for each in (*inputs, *operation.outputs)]
        is_float = self.graph.tensors[operation.outputs[0]].type in _FLOATS
        if not is_float or set(types) & set(_INTEGERS):
            return set(), "it does not compute in floats", ""
        if kind == "CONV_2D":
            return self._role_of_convolution(operation, pads)
        if kind == "DEPTHWISE_CONV_2D":
            return self._role_of_depthwise(operation, pads)
        has_image = all(len(self.shape(each)) == 4 for each in inputs)
        if kind == "DEPTH_TO_SPACE":
            return {_END}, "", ""
        if kind in _MEANS and has_image:
            return {_INSIDE, _END}, "", ""
        if kind in (*_ELEMENTWISE, "FULLY_CONNECTED", "RESIZE_BILINEAR") and has_image:
            return {_INSIDE}, "", ""
        if kind in ("ADD", "MUL"):
            first = self.constant(int(operation.inputs[0]))
            sizes = self.shape(int(operation.inputs[0]))
            if has_image and len(inputs) == 2:
                return {_INSIDE}, "", ""
            if has_image and first is not None and len(sizes) == 4 and sizes[:3] == (1, 1, 1):
                return {_INSIDE}, "", ""
            why = "its operands are not two images, or an image and a float32 constant per channel"
            return set(), why, ""
        if kind in ("MAX_POOL_2D", "AVERAGE_POOL_2D"):
            change = "a depthwise convolution of stride 2 instead"
            return set(), "LiteRT has no pooling with the channels first", change
        return set(), "LiteRT has no form of it with the channels first", ""

    def _role_of_convolution(self, operation: Any, pads: Pads | None) -> tuple[set[str], str, str]:
        size, channels = self._kernel_size(operation), self.shape(int(operation.inputs[1]))[3]
        options = operation.builtinOptions
        strides = (options.strideH, options.strideW)
        dilated = (options.dilationHFactor, options.dilationWFactor) != (1, 1)
        given = self.shape(int(operation.inputs[0]))
        if dilated or (len(given) == 4 and given[3] != channels):
            return set(), "it is a dilated or grouped convolution", "depthwise and 1x1 convolutions"
        if size == (1, 1):
            if strides != (1, 1):
                return set(), "it is a 1x1 convolution with strides", "strides in a layer before it"
            if pads is not None and any(pads):
                return set(), "it is a padded 1x1 convolution", "padding in a layer before it"
            return {_INSIDE}, "", ""
        if size == (3, 3) and strides == (2, 2) and channels == 3:
            if pads == (1, 1, 1, 1):
                return {_START}, "", ""
            return set(), *self._padding_fault(operation, pads, 1)
        name = f"{size[0]}x{size[1]} convolution of stride {strides[0]} on {channels} channels"
        change = "depthwise and 1x1 convolutions, and a 3x3 one of stride 2 on the image"
        return set(), f"it is a {name}", change

    def _role_of_depthwise(self, operation: Any, pads: Pads | None) -> tuple[set[str], str, str]:
        (height, width), options = self._kernel_size(operation), operation.builtinOptions
        if (options.dilationHFactor, options.dilationWFactor) != (1, 1):
            return set(), "it is a dilated depthwise convolution", "no dilation"
        if options.depthMultiplier != 1:
            return set(), "it has several filters per channel", "depth_multiplier=1"
        if options.strideH != options.strideW or options.strideH > 2:
            strides = f"{options.strideH}x{options.strideW}"
            return set(), f"it has strides of {strides}", "strides of 1 or 2"
        if (height, width) not in ((3, 3), (5, 5)):
            return set(), f"it has kernels of {height}x{width}", "kernels of 3x3 or 5x5"
        even = height // 2
        if pads == (even, even, even, even):
            return {_INSIDE}, "", ""
        return set(), *self._padding_fault(operation, pads, even)

    def _padding_fault(self, operation: Any, pads: Pads | None, even: int) -> tuple[str, str]:
        """Return what is wrong with a padding that is not even, and what would help."""
        change = f'ZeroPadding2D({even}) before it, and padding="valid"'
        maker = self._made.get(int(operation.inputs[0]))
        if (
            maker is not None
            and self.file.kind(maker) == "PAD"
            and self._padding(operation) is None
        ):
            return "its padding is also read by other layers", f"a ZeroPadding2D({even}) of its own"
        if pads is None and min(self.shape(int(operation.inputs[0]))[1:3]) < 1:
            return "its padding depends on the size of the image", change
        if pads is None:
            return "its padding is uneven, as with strides on an even size", change
        above, below, left, right = pads
        return (
            f"it is padded by {above} above, {below} below, {left} left and {right} right",
            change,
        )

    def _groups(self) -> Iterator[list[Node]]:
        """Yield the groups of connected operations that can be run sparsely."""
        groups = {id(node): [node] for node in self.nodes if node.roles}
        for node in self.nodes:
            for maker in self._predecessors(node) if node.roles & {_INSIDE, _END} else ():
                ours, theirs = groups[id(node)], groups[id(maker)]
                if ours is not theirs:
                    ours += theirs
                    groups.update((id(each), ours) for each in theirs)
        yield from {id(group): group for group in groups.values()}.values()

    def _predecessors(self, node: Node) -> list[Node]:
        """Return the operations of a part whose results an operation of the part reads."""
        makers = (self._makers.get(number) for number in node.inputs)
        return [maker for maker in makers if maker and maker.roles & {_START, _INSIDE}]

    def _part(self, nodes: list[Node]) -> Part:
        members = {id(node) for node in nodes if node.roles & {_INSIDE, _END}}
        part = Part(nodes)
        for node in nodes:
            if id(node) not in members:
                continue
            for number in node.inputs:
                self._check_input(part, number, members)
            self._check_output(part, node, members)
            if node.kernel is not None:
                kernel = self.file.array(self.graph.tensors[node.kernel])
                part.weights += kernel.size
                part.zeros += kernel.size - int(np.count_nonzero(kernel))
        part.obstacles = list(dict.fromkeys(part.obstacles))
        part.faults = list({id(node): node for node in part.faults}.values())
        return part

    def _check_input(self, part: Part, number: int, members: set[int]) -> None:
        """Record what is wrong with a tensor that an operation of a part reads."""
        maker = self._makers.get(number)
        if maker is None:
            why = "the input of the graph enters without a 3x3 convolution of stride 2"
            change = "such a convolution in front"
            part.obstacles.append(Obstacle(self.name(number), "INPUT", why, change))
            part.is_rejected = True
        elif not maker.roles & {_START, _INSIDE}:
            part.obstacles.append(_with_reason(maker, "it ends a part that is run sparsely"))
            part.is_rejected = True
        else:
            if number in self.graph.outputs:
                part.obstacles.append(self._output(number))
                part.faults.append(maker)
            for reader in self._readers.get(number, []):
                # A dense layer on features is no problem: without an image, there is one layout.
                if id(reader) not in members and reader.kind != "FULLY_CONNECTED":
                    part.obstacles.append(_with_reason(reader, "it begins another part"))
                    if reader.kind in _REJECTED_READERS:
                        part.is_rejected = True
                    else:
                        part.faults.append(maker)

    def _check_output(self, part: Part, node: Node, members: set[int]) -> None:
        """Record what LiteRT gets wrong about an operation, or that it is not a proper end."""
        readers = self._readers.get(node.output, [])
        if why := self._fault(node):
            part.obstacles.append(node.obstacle._replace(why=why))
            part.faults.append(node)
        elif _END not in node.roles and not any(id(each) in members for each in readers):
            outside = [_with_reason(each, "it begins another part") for each in readers]
            part.obstacles += outside or [self._output(node.output)]
            part.faults.append(node)

    def _fault(self, node: Node) -> str:
        """Return what LiteRT gets wrong about an operation with the channels first, or nothing."""
        if node.kind in ("FULLY_CONNECTED", "RESIZE_BILINEAR"):
            return "LiteRT computes it wrongly with the channels first"
        if node.kind in _MEANS and self._axes(node) != {1, 2}:
            return "it is a mean over other axes than those of the image"
        if self._keeps_axes(node):
            return "it keeps the axes of the image (keepdims=True), and LiteRT confuses their order"
        return ""

    def _output(self, number: int) -> Obstacle:
        return Obstacle(self.name(number), "OUTPUT", "it is an output of the graph", "")

    def _axes(self, node: Node) -> set[int]:
        """Return the axes that a mean is taken over; empty if they are not constant."""
        axes = self.file.integers(self.graph, int(node.operation.inputs[1]))
        return {axis % 4 for axis in axes or ()}

    def _keeps_axes(self, node: Node) -> bool:
        """Tell whether an operation is a mean that keeps the axes of the image."""
        return node.kind in _MEANS and len(self.shape(node.output)) == 4

    def means_to_flatten(self) -> list[Node]:
        """Return the means that keep the axes, and that improper ends are computed from."""
        found = [self._means_before(fault) or [] for part in self.parts for fault in part.faults]
        return list({id(mean): mean for means in found for mean in means}.values())

    def _means_before(self, node: Node) -> list[Node] | None:
        """Return the means that an operation is computed from; None if it has other inputs, too."""
        if self._keeps_axes(node):
            return [node] if self._axes(node) == {1, 2} else None
        found = []
        for number in node.inputs:
            maker = self._makers.get(number)
            if maker is None or _INSIDE not in maker.roles:
                return None
            if (means := self._means_before(maker)) is None:
                return None
            found += means
        return found

    def faulty_parts(self) -> list[Part]:
        """Return the parts that XNNPACK runs sparsely, with wrong results."""
        if not any(_END in node.roles and self._predecessors(node) for node in self.nodes):
            return []
        run = [part for part in self.parts if part.starts and part.has_zeros]
        return [part for part in run if part.faults and not part.is_rejected]

    def faults(self) -> list[Node]:
        """Return the operations that have wrong results, or make loading the file fail."""
        return [fault for part in self.faulty_parts() for fault in part.faults]


def _with_reason(node: Node, reason: str) -> Obstacle:
    """Return an operation as an obstacle, for its own reason if it has one, else for `reason`."""
    return node.obstacle if node.obstacle.why else node.obstacle._replace(why=reason)


def graphs(file: File) -> list[Graph]:
    """Return the graphs of a file."""
    return [Graph(file, graph) for graph in file.model.subgraphs]


def prepared(content: bytes) -> tuple[bytes, tuple[int, int]]:
    """Return a file of the same function, with its 1x1 convolutions run sparsely where possible.

    The changes of `changed` are made if more is then run sparsely. Parts that LiteRT would compute
    wrongly are run dense. The second value is how many 1x1 convolutions are run sparsely, and how
    many there are.
    """
    file = File(content)
    if not file.makes_dense():
        return content, counts(file)
    other = File(changed(content))
    count, count_of_other = counts(file), counts(other)
    if count_of_other > count:
        file, count = other, count_of_other
    for graph in file.model.subgraphs:
        for part in Graph(file, graph).faulty_parts():
            _insert_barrier(file, graph, part)
    return file.content(), count


def changed(content: bytes, *, ends: bool = True) -> bytes:
    """Return a file of the same function, in the form in which more can be run sparsely.

    "same" paddings that are even for the size of the image become explicit, and constants per
    channel get the shape that XNNPACK needs. With `ends`, means that keep the axes of the image
    become the ends of parts, followed by a RESHAPE, if nothing after them can be run sparsely.
    """
    file = File(content)
    for graph in file.model.subgraphs:
        _pad_evenly(file, graph)
        _reshape_constants(file, graph)
        while ends and (means := Graph(file, graph).means_to_flatten()):
            for mean in means:
                _flatten(file, graph, mean)
    return file.content()


def counts(file: File) -> tuple[int, int]:
    """Return how many 1x1 convolutions are run sparsely, and how many there are."""
    seen = graphs(file)
    parts = [part for graph in seen for part in graph.parts] if file.makes_dense() else []
    run = [node for part in parts if part.is_run for node in part.nodes]
    sparse, count = (
        sum(node.kernel is not None for node in nodes)
        for nodes in (run, [node for graph in seen for node in graph.nodes])
    )
    return sparse, count


def _flatten(file: File, graph: Any, mean: Node) -> None:
    """Let a mean drop the axes of the image, and restore them by a RESHAPE."""
    kept = graph.tensors[mean.output]
    made = file.add_like(graph, mean.output, b"_without_axes", lambda sizes: sizes[[0, 3]])
    sizes = np.array(kept.shape, np.int32)
    sizes[0] = -1  # any number of examples
    shape = file.add_constant(graph, kept.name + b"_shape", sizes)
    mean.operation.outputs = np.array([made], np.int32)
    mean.operation.builtinOptions.keepDims = False
    place = graph.operators.index(mean.operation) + 1
    reshape = file.insert(graph, "RESHAPE", [made, shape], mean.output, place)
    reshape.builtinOptions.newShape = sizes


def _insert_barrier(file: File, graph: Any, part: Part) -> None:
    """Insert `BARRIER` after the first convolutions of a part, so that it is run dense."""
    members = {id(each) for node in part.nodes for each in (node.operation, node.padding)}
    for start in part.starts:
        readers = [each for each in file.readers(graph, start.output) if id(each) in members]
        if not readers:
            continue
        made = file.add_like(graph, start.output, b"_passed_on")
        for each in readers:
            replace(each, start.output, made)
        file.insert_before(graph, BARRIER, [start.output] * 2, made, readers)


def _pad_evenly(file: File, graph: Any) -> None:
    """Make "same" paddings of strided convolutions explicit where they are even."""
    for operation in list(graph.operators):
        if file.kind(operation) not in _CONVOLUTIONS:
            continue
        options, number = operation.builtinOptions, int(operation.inputs[0])
        signature = shape_of(graph.tensors[number])
        kernel = graph.tensors[operation.inputs[1]].shape
        dilated = (options.dilationHFactor, options.dilationWFactor) != (1, 1)
        strides = (options.strideH, options.strideW)
        if options.padding != _SAME or strides == (1, 1) or dilated or min(signature[1:]) < 1:
            continue
        sizes = zip(signature[1:3], map(int, kernel[1:3]), strides, strict=True)
        totals = [max((-(-size // stride) - 1) * stride + k - size, 0) for size, k, stride in sizes]
        if any(total % 2 for total in totals) or not any(totals):
            continue
        rows, columns = (total // 2 for total in totals)
        pads = np.array([[0, 0], [rows, rows], [columns, columns], [0, 0]], np.int32)
        made = file.add_like(graph, number, b"_padded", pads.sum(axis=1).__add__)
        sizes_of_pads = file.add_constant(graph, graph.tensors[number].name + b"_pads", pads)
        replace(operation, number, made)
        file.insert_before(graph, "PAD", [number, sizes_of_pads], made, [operation])
        options.padding = file.schema.Padding.VALID


def _reshape_constants(file: File, graph: Any) -> None:
    """Make constants per channel the first operands, in the shape (1, 1, 1, channels)."""
    seen = Graph(file, graph)
    for node in seen.nodes:
        operation = node.operation
        if file.kind(operation) not in ("ADD", "MUL") or len(node.inputs) != 1:
            continue
        image = node.inputs[0]
        (number,) = (int(each) for each in operation.inputs if each != image)
        constant = graph.tensors[number]
        channels = seen.shape(image)[-1:]
        if constant.type != 0 or len(seen.shape(image)) != 4 or constant.sparsity is not None:
            continue
        array = file.array(constant) if len(file.values(constant)) else None
        if array is None or array.size not in (1, *channels) or array.shape[-1:] != (array.size,):
            continue
        name = constant.name + b"_per_channel"
        reshaped = file.add_constant(graph, name, np.array(array).reshape(1, 1, 1, -1))
        operation.inputs = np.array([reshaped, image], np.int32)
