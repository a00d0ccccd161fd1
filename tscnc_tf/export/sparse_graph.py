"""Which 1x1 convolutions of a LiteRT file are run sparsely, and graphs in which they are.

On processors where LiteRT has kernels for it (ARM, WebAssembly, RISC-V, x86 without AVX), its
library XNNPACK runs whole parts of a graph with the channels first, and the 1x1 convolutions in
them by their nonzero weights alone. Such a part begins with a 3x3 convolution of stride 2 on the
three channels of an image, consists of 1x1 convolutions, evenly padded depthwise ones and functions
of single entries, and ends in a mean over the image or in a depth-to-space. It must be closed:
whatever is computed in it comes from it, and goes nowhere else. And more than two thirds of the
weights of its 1x1 convolutions are zero.

XNNPACK looks at what comes into such a part, and not at what leaves it by another way than an end,
nor at whether a mean keeps the axes of the image, whose order is then another one: the file fails
to load, or its results are wrong. `prepared` sees to it that neither happens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tscnc_tf.export.litert_file import PASSING, File, replace

_ELEMENTWISE = {
    *("ABS", "CEIL", "ELU", "EXP", "FLOOR", "GELU", "HARD_SWISH", "LEAKY_RELU", "LOGISTIC", "NEG"),
    *("RELU", "RELU6", "RELU_0_TO_1", "RELU_N1_TO_1", "ROUND", "RSQRT", "SQRT", "SQUARE", "TANH"),
}
_SAME = 0
_FLOATS = (0, 1)
_START, _INSIDE, _END = "start", "inside", "end"
_MEANS = ("MEAN", "SUM")
# Rows of zeros before and behind an image, columns of zeros before and behind.
Pads = tuple[int, int, int, int]


class Obstacle(NamedTuple):
    """What keeps a part of a graph from being run sparsely.

    Attributes:
        tensor: the name of the tensor that the operation returns.
        operation: its kind.
        why: what is wrong with it.
        change: what would help, or an empty text.
    """

    tensor: str
    operation: str
    why: str
    change: str


@dataclasses.dataclass(eq=False)
class Node:
    """An operation, with the padding in front of it as its own.

    Attributes:
        operation: as the file has it.
        inputs: the tensors that are not constant.
        output: the tensor that it returns.
        kernel: of a 1x1 convolution, the number of the constant; else None.
        pads: the rows and columns of zeros around its input; None if they depend on its size.
        roles: what it can be in a part that is run sparsely, none of them if it can't be in one.
        obstacle: why not.
    """

    operation: Any
    inputs: list[int]
    output: int
    kernel: int | None
    pads: Pads | None
    roles: frozenset[str]
    obstacle: Obstacle


@dataclasses.dataclass
class Part:
    """Operations that are run sparsely together, or could be.

    Attributes:
        nodes: the operations.
        obstacles: what stands in the way.
        leaks: operations of it whose results leave it otherwise than by a proper end.
        leaving: what takes these results.
        weights, zeros: of its 1x1 convolutions.
    """

    nodes: list[Node]
    obstacles: list[Obstacle]
    leaks: list[Node]
    leaving: list[Obstacle]
    weights: int = 0
    zeros: int = 0

    @property
    def is_run(self) -> bool:
        """Whether LiteRT takes it for one that is to be run sparsely."""
        return not self.obstacles and 3 * self.zeros > 2 * self.weights


class Graph:
    """A graph of a file, as XNNPACK sees it.

    Attributes:
        nodes: its operations.
        parts: those of them that can be run sparsely, by the parts that they would be run in.
    """

    def __init__(self, file: File, graph: Any) -> None:
        self.file, self.graph = file, graph
        self._made = {int(out): each for each in graph.operators for out in each.outputs}
        found = {id(each): self._node(each) for each in graph.operators if not self._is_fixed(each)}
        padded = {id(self._padding(node.operation)) for node in found.values()}
        self.nodes = [node for key, node in found.items() if key not in padded]
        self._makers = {node.output: node for node in self.nodes}
        self._readers: dict[int, list[Node]] = {}
        for node in self.nodes:
            for number in node.inputs:
                self._readers.setdefault(number, []).append(node)
        self.parts = [self._part(nodes) for nodes in self._connected()]

    def name(self, number: int) -> str:
        """Return the name of a tensor."""
        return self.graph.tensors[number].name.decode()

    def constant(self, number: int) -> int | None:
        """Return the number of the constant that a tensor has its entries from, or None."""
        maker = self._made.get(number)
        if maker is not None and self.file.kind(maker) in PASSING:
            return self.constant(int(maker.inputs[0]))
        tensor = self.graph.tensors[number]
        has_entries = tensor.sparsity is not None or len(self.file.values(tensor))
        return number if has_entries else None

    def part_of(self, node: Node) -> Part | None:
        """Return the part that an operation belongs to."""
        return next((part for part in self.parts if node in part.nodes), None)

    def shape(self, number: int) -> tuple[int, ...]:
        """Return the shape of a tensor, with the size -1 for any."""
        tensor = self.graph.tensors[number]
        signature = tensor.shape if tensor.shapeSignature is None else tensor.shapeSignature
        return () if signature is None else tuple(map(int, signature))

    def _is_fixed(self, operation: Any) -> bool:
        """Tell whether an operation returns a constant."""
        return (
            self.file.kind(operation) in PASSING and self.constant(operation.outputs[0]) is not None
        )

    def _node(self, operation: Any) -> Node:
        padding, pads = self._padding(operation), self._pads(operation)
        inputs = [int(each) for each in operation.inputs if each >= 0]
        inputs = [each for each in inputs if self.constant(each) is None]
        if padding is not None:
            inputs = [int(padding.inputs[0])]
        kernel = None
        if self.file.kind(operation) == "CONV_2D" and self._kernel_size(operation) == (1, 1):
            kernel = self.constant(int(operation.inputs[1]))
        roles, why, change = self._role(operation, inputs, pads)
        output = int(operation.outputs[0])
        obstacle = Obstacle(self.name(output), self.file.kind(operation), why, change)
        return Node(operation, inputs, output, kernel, pads, frozenset(roles), obstacle)

    def _padding(self, operation: Any) -> Any:
        """Return the operation in front of a convolution that pads for it alone, or None."""
        if self.file.kind(operation) not in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            return None
        given = int(operation.inputs[0])
        maker = self._made.get(given)
        if maker is None or self.file.kind(maker) != "PAD" or given in self.graph.outputs:
            return None
        sizes = self.file.integers(self.graph, int(maker.inputs[1]))
        is_alone = len(self.file.readers(self.graph, given)) == 1
        fits = sizes is not None and len(sizes) == 8 and not any(sizes[:2] + sizes[6:])
        is_valid = operation.builtinOptions.padding != _SAME
        return maker if is_alone and fits and is_valid else None

    def _pads(self, operation: Any) -> Pads | None:
        """Return what a convolution is padded by, None if that depends on the size."""
        if (padding := self._padding(operation)) is not None:
            sizes = self.file.integers(self.graph, int(padding.inputs[1])) or []
            top, bottom, left, right = sizes[2:6]
            return top, bottom, left, right
        options = operation.builtinOptions
        if self.file.kind(operation) not in ("CONV_2D", "DEPTHWISE_CONV_2D"):
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
        """Return an operation's roles, or none, why not, and what would help."""
        kind = self.file.kind(operation)
        if kind in ("RESHAPE", "SHAPE"):
            return set(), "it changes the axes", ""
        tensors = [self.graph.tensors[each] for each in (*inputs, *operation.outputs)]
        if any(each.type not in _FLOATS for each in tensors):
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
        if kind in (*_ELEMENTWISE, "FULLY_CONNECTED") and has_image:
            return {_INSIDE}, "", ""
        if kind in ("ADD", "MUL"):
            first = self.constant(int(operation.inputs[0]))
            sizes = self.shape(int(operation.inputs[0]))
            if has_image and len(inputs) == 2:
                return {_INSIDE}, "", ""
            if has_image and first is not None and len(sizes) == 4 and sizes[:3] == (1, 1, 1):
                return {_INSIDE}, "", ""
            return set(), "it takes something else than two images or a constant per channel", ""
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
                return set(), "it is a 1x1 convolution with strides", "strides before it"
            if pads is not None and any(pads):
                return set(), "it is a padded 1x1 convolution", "padding before what is before it"
            return {_INSIDE}, "", ""
        if size == (3, 3) and strides == (2, 2) and channels == 3:
            if pads == (1, 1, 1, 1):
                return {_START}, "", ""
            return set(), _uneven(pads), 'ZeroPadding2D(1) before it, and padding="valid"'
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
        return set(), _uneven(pads), f'ZeroPadding2D({even}) before it, and padding="valid"'

    def _connected(self) -> Iterator[list[Node]]:
        """Yield the operations that can be run sparsely, connected by what they pass on."""
        groups = {id(node): [node] for node in self.nodes if node.roles}
        for node in self.nodes:
            for number in node.inputs if node.roles & {_INSIDE, _END} else ():
                maker = self._makers.get(number)
                if maker is None or not maker.roles & {_START, _INSIDE}:
                    continue
                ours, theirs = groups[id(node)], groups[id(maker)]
                if ours is not theirs:
                    ours += theirs
                    groups.update((id(each), ours) for each in theirs)
        yield from {id(group): group for group in groups.values()}.values()

    def _part(self, nodes: list[Node]) -> Part:
        obstacles, leaks = dict[Obstacle, None](), []
        members = {id(node) for node in nodes if node.roles & {_INSIDE, _END}}
        part = Part(nodes, [], [], [])
        for node in nodes:
            if id(node) not in members:
                continue
            for number in node.inputs:
                obstacles.update(dict.fromkeys(self._obstacles(number, members)))
            readers = self._readers.get(node.output, [])
            is_passed_on = any(id(each) in members for each in readers)
            if self._is_mean_of_channels(node):
                leaks.append(node)
                why = "it is a mean over other axes than those of the image"
                part.leaving.append(node.obstacle._replace(why=why))
            elif not is_passed_on and (_END not in node.roles or self.keeps_axes(node)):
                leaks.append(node)
                part.leaving += [each.obstacle for each in readers] or [self._output(node.output)]
            if node.kernel is not None:
                kernel = self.file.array(self.graph.tensors[node.kernel])
                part.weights += kernel.size
                part.zeros += kernel.size - int(np.count_nonzero(kernel))
        part.obstacles, part.leaks = list(obstacles), leaks
        return part

    def _obstacles(self, number: int, members: set[int]) -> Iterator[Obstacle]:
        """Yield what is wrong with a tensor that operations of a part take."""
        maker = self._makers.get(number)
        if maker is None:
            why = "the input of the graph comes into it without a 3x3 convolution of stride 2"
            yield Obstacle(self.name(number), "INPUT", why, "such a convolution in front")
        elif not maker.roles & {_START, _INSIDE}:
            yield maker.obstacle
        elif number in self.graph.outputs:
            yield self._output(number)
        for reader in self._readers.get(number, []):
            # Features without an image have one layout only.
            is_dense = reader.obstacle.operation == "FULLY_CONNECTED"
            if id(reader) not in members and not is_dense:
                yield reader.obstacle

    def _output(self, number: int) -> Obstacle:
        return Obstacle(self.name(number), "OUTPUT", "it is an output of the graph", "")

    def keeps_axes(self, node: Node) -> bool:
        """Tell whether an operation is a mean that returns an image of one pixel."""
        return node.obstacle.operation in _MEANS and len(self.shape(node.output)) == 4

    def _is_mean_of_channels(self, node: Node) -> bool:
        """Tell whether an operation is a mean that LiteRT takes over the wrong axes."""
        if node.obstacle.operation not in _MEANS:
            return False
        axes = self.file.integers(self.graph, int(node.operation.inputs[1]))
        return axes is None or {axis % 4 for axis in axes} != {1, 2}

    def means_to_end_in(self) -> list[Node]:
        """Return the means that keep the axes, and lead to nothing but improper ends of parts."""
        leaks = [leak for part in self.parts for leak in part.leaks]
        return [mean for leak in leaks for mean in self._means_before(leak) or ()]

    def _means_before(self, node: Node) -> list[Node] | None:
        """Return the means that keep the axes, and that all of an operation comes from, or None."""
        if self._is_mean_of_channels(node):
            return None
        if self.keeps_axes(node):
            return [node]
        found = []
        for number in node.inputs:
            maker = self._makers.get(number)
            if maker is None or _INSIDE not in maker.roles:
                return None
            if (means := self._means_before(maker)) is None:
                return None
            found += means
        return found

    def leaks(self) -> list[Node]:
        """Return what makes the file fail where it is run sparsely."""
        has_end = any(
            _END in node.roles
            and any(
                self._makers[each].roles & {_START, _INSIDE}
                for each in node.inputs
                if each in self._makers
            )
            for node in self.nodes
        )
        return [leak for part in self.parts if has_end and part.is_run for leak in part.leaks]


def _uneven(pads: Pads | None) -> str:
    if pads is None:
        return "its padding is uneven, as that of strides on an even size is"
    return f"it is padded by {pads[0]} above, {pads[1]} below, {pads[2]} left and {pads[3]} right"


def graphs(file: File) -> list[Graph]:
    """Return the graphs of a file."""
    return [Graph(file, graph) for graph in file.model.subgraphs]


def prepared(content: bytes) -> bytes:
    """Return a file of the same function whose 1x1 convolutions are run sparsely where they can be.

    "same" paddings that are even for the size of the image are written as such, constants per
    channel in the form that is taken, and parts end in their means, if this makes more of the file
    run sparsely. What LiteRT would run wrongly is then run as ever.
    """
    original, changed = File(content), File(content)
    for graph in changed.model.subgraphs:
        _pad_evenly(changed, graph)
        _spread_constants(changed, graph)
        while means := Graph(changed, graph).means_to_end_in():
            _flatten(changed, graph, means[0])
    file = changed if counts(changed) > counts(original) else original
    for graph in file.model.subgraphs:
        while leaks := (seen := Graph(file, graph)).leaks():
            _keep_out(file, graph, seen.part_of(leaks[0]))
    return file.content()


def counts(file: File) -> tuple[int, int]:
    """Return how many 1x1 convolutions are run sparsely, and rightly, and how many there are."""
    seen = graphs(file)
    sound = [part for graph in seen for part in graph.parts if part.is_run and not part.leaks]
    nodes = (
        [node for part in sound for node in part.nodes],
        [n for graph in seen for n in graph.nodes],
    )
    sparse, total = (sum(node.kernel is not None for node in each) for each in nodes)
    return sparse, total


def _flatten(file: File, graph: Any, mean: Node) -> None:
    """Have a mean return features without axes of an image, and give these to it afterwards."""
    kept = graph.tensors[mean.output]
    axes = {axis % 4 for axis in file.integers(graph, int(mean.operation.inputs[1])) or ()}
    made = file.add_tensor(
        graph,
        name=kept.name + b"_without_axes",
        shape=_without(kept.shape, axes),
        shapeSignature=_without(kept.shapeSignature, axes),
        type=kept.type,
    )
    sizes = np.array(kept.shape, np.int32)
    sizes[0] = -1  # any number of examples
    shape = file.add_constant(graph, kept.name + b"_shape", sizes)
    mean.operation.outputs = np.array([made], np.int32)
    mean.operation.builtinOptions.keepDims = False
    place = graph.operators.index(mean.operation) + 1
    reshape = file.put_in(graph, "RESHAPE", [made, shape], mean.output, place)
    reshape.builtinOptions.newShape = sizes


def _without(shape: Any, axes: set[int]) -> Any:
    return None if shape is None else [size for axis, size in enumerate(shape) if axis not in axes]


def _keep_out(file: File, graph: Any, part: Part | None) -> None:
    """Have a part begin with what is not run with channels first: the larger of x and x."""
    members = {id(node.operation) for node in part.nodes} if part else set()
    for number in {node.output for node in part.nodes if _START in node.roles} if part else ():
        given = graph.tensors[number]
        made = file.add_tensor(
            graph,
            name=given.name + b"_passed_on",
            shape=given.shape,
            shapeSignature=given.shapeSignature,
            type=given.type,
        )
        readers = [each for each in file.readers(graph, number) if id(each) in members]
        for each in readers:
            replace(each, number, made)
        file.put_in_front(graph, "MAXIMUM", [number, number], made, readers)


def _pad_evenly(file: File, graph: Any) -> None:
    """Write "same" paddings of strided convolutions out where they are even."""
    for operation in list(graph.operators):
        if file.kind(operation) not in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            continue
        options, number = operation.builtinOptions, int(operation.inputs[0])
        given = graph.tensors[number]
        signature = given.shape if given.shapeSignature is None else given.shapeSignature
        kernel = graph.tensors[operation.inputs[1]].shape
        dilated = (options.dilationHFactor, options.dilationWFactor) != (1, 1)
        strides = (options.strideH, options.strideW)
        if options.padding != _SAME or strides == (1, 1) or dilated or min(signature[1:]) < 1:
            continue
        sizes = zip(map(int, signature[1:3]), map(int, kernel[1:3]), strides, strict=True)
        totals = [max((-(-size // stride) - 1) * stride + k - size, 0) for size, k, stride in sizes]
        if any(total % 2 for total in totals) or not any(totals):
            continue
        (rows, columns), shape = (total // 2 for total in totals), np.array(given.shape)
        pads = np.array([[0, 0], [rows, rows], [columns, columns], [0, 0]], np.int32)
        padded = None if given.shapeSignature is None else given.shapeSignature + pads.sum(axis=1)
        made = file.add_tensor(
            graph,
            name=given.name + b"_padded",
            shape=shape + pads.sum(axis=1),
            shapeSignature=padded,
            type=given.type,
        )
        sizes_of_pads = file.add_constant(graph, given.name + b"_pads", pads)
        replace(operation, number, made)
        file.put_in_front(graph, "PAD", [number, sizes_of_pads], made, [operation])
        options.padding = file.schema.Padding.VALID


def _spread_constants(file: File, graph: Any) -> None:
    """Put the constant first, in the shape (1, 1, 1, channels), where an image meets it."""
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
        spread = file.add_constant(graph, name, np.array(array).reshape(1, 1, 1, -1))
        operation.inputs = np.array([spread, image], np.int32)
