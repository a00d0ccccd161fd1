"""The graph of a model: its tensors and the calls between them, nested models unrolled."""

from __future__ import annotations

import collections
import dataclasses
import inspect
import types
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from tscnc_tf import _keras
from tscnc_tf._keras import layers


@dataclasses.dataclass(eq=False)
class Tensor:
    """What flows between two calls. Its channels are its last axis.

    Attributes:
        shape: with the batch; None is an axis of any size.
        dtype: the name of its dtype.
        masked: whether Keras knows a mask for it, as behind an embedding with mask_zero=True.
    """

    shape: tuple[int | None, ...]
    dtype: str
    masked: bool = False

    @property
    def channels(self) -> int:
        """The number of channels; 0 if the tensor has no such axis, or one of unknown size."""
        return (self.shape[-1] or 0) if len(self.shape) > 1 else 0

    @property
    def positions(self) -> int | None:
        """The number of places at which a filter is applied, per example; None if not known."""
        count = 1
        for size in self.shape[1:-1]:
            if size is None:
                return None
            count *= size
        return count


@dataclasses.dataclass(eq=False)
class Call:
    """One use of a layer (or of one of Keras' operations).

    Attributes:
        layer: what is called.
        name: its name, after those of the nested models that it is in.
        inputs, outputs: the tensors, in the order of the arguments.
        args, kwargs: the arguments as Keras keeps them, with its symbolic tensors in them.
        uses: how often the layer is called in the whole model.
    """

    layer: Any
    name: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    uses: int

    @property
    def is_plain(self) -> bool:
        """Whether the arguments are tensors of the model alone: no constants, no training=True."""
        given = tf.nest.flatten((self.args, list(self.kwargs.values())))
        return all(_is_symbolic(arg) or _is_unset(arg) for arg in given)

    @property
    def named(self) -> dict[str, Any]:
        """The arguments that are given by their names, with the tensors for the symbolic ones."""
        symbols = filter(_is_symbolic, tf.nest.flatten((self.args, self.kwargs)))
        tensors = {id(symbol): t for symbol, t in zip(symbols, self.inputs, strict=True)}
        bound = inspect.signature(self.layer.call).bind(*self.args, **self.kwargs).arguments
        named = {name: tensors.get(id(value), value) for name, value in bound.items()}
        return {name: value for name, value in named.items() if not _is_unset(value)}

    def apply(self, value: Any) -> Any:
        """Return what the layer makes of `value` in the place of its one symbolic tensor."""
        args, kwargs = tf.nest.map_structure(
            lambda arg: value if _is_symbolic(arg) else arg, (self.args, self.kwargs)
        )
        return self.layer.call(*args, **kwargs)


@dataclasses.dataclass
class Graph:
    """A model unrolled.

    Attributes:
        inputs, outputs: the tensors of the model.
        calls: in an order in which they can be computed.
        unrolled: the nested models whose calls are among them, with the tensors that they take.
        opaque: why other nested models are one call instead, by their ids.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]
    calls: list[Call] = dataclasses.field(default_factory=list)
    unrolled: dict[int, list[Tensor]] = dataclasses.field(default_factory=dict)
    opaque: dict[int, str] = dataclasses.field(default_factory=dict)


def unroll(library: types.ModuleType, model: Any) -> Graph:
    """Return the graph of a built Sequential or functional model.

    A nested model that is Sequential or functional, and used once, is followed into.

    Raises:
        ValueError: the model has no graph, or a `call` of its own that its graph does not show.
    """
    if reason := _no_graph(library, model):
        raise ValueError(
            f"model {model.name!r} {reason}: build it as a Sequential with an Input, or as a "
            "functional model."
        )
    uses = layers.calls(model)
    known = {id(symbol): _tensor(symbol) for symbol in model.inputs}
    graph = Graph([known[id(symbol)] for symbol in model.inputs], [])
    _follow(library, model, "", known, uses, graph)
    graph.outputs = [known[id(symbol)] for symbol in model.outputs]
    return graph


def _follow(
    library: types.ModuleType,
    model: Any,
    prefix: str,
    known: dict[int, Tensor],
    uses: collections.Counter[int],
    graph: Graph,
) -> None:
    """Add the calls of a model to the graph; `known` has its tensors by the ids of the symbols."""
    for layer, args, kwargs, outputs in _nodes(library, model):
        symbols = [arg for arg in tf.nest.flatten((args, kwargs)) if _is_symbolic(arg)]
        if any(id(symbol) not in known for symbol in symbols):
            continue  # not on a way from the inputs
        inputs = [known[id(symbol)] for symbol in symbols]
        name = prefix + layer.name
        if isinstance(layer, library.Model):
            reason = _not_followed(library, layer, inputs, args, kwargs, uses[id(layer)])
            if not reason:
                graph.unrolled[id(layer)] = inputs
                inner = {id(s): t for s, t in zip(layer.inputs, inputs, strict=True)}
                _follow(library, layer, f"{name}/", inner, uses, graph)
                for symbol, inside in zip(outputs, layer.outputs, strict=True):
                    known[id(symbol)] = inner[id(inside)]
                continue
            graph.opaque[id(layer)] = reason
        for symbol in outputs:
            known[id(symbol)] = _tensor(symbol)
        made = [known[id(symbol)] for symbol in outputs]
        graph.calls.append(Call(layer, name, inputs, made, args, kwargs, uses[id(layer)]))


def _nodes(
    library: types.ModuleType, model: Any
) -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]]:
    """Yield (layer, args, kwargs, outputs) for every call in a model, inputs to outputs."""
    is_keras_3 = library is _keras.keras
    graph = model._functional if is_keras_3 and isinstance(model, library.Sequential) else model
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if node.is_input:
                continue
            if is_keras_3:
                arguments = node.arguments
                yield node.operation, arguments.args, arguments.kwargs, list(node.outputs)
            else:
                outputs = tf.nest.flatten(node.outputs)
                yield node.layer, node.call_args, node.call_kwargs, outputs


def _no_graph(library: types.ModuleType, model: Any) -> str:
    """Return why the graph of a model is not known, or an empty text if it is."""
    if not _keras.is_graph_model(model):
        return f"is a subclassed model ({type(model).__name__})"
    bases: tuple[Any, ...] = type(model).__mro__
    base = next(base for base in bases if base.__name__ in ("Sequential", "Functional"))
    if bases[0].call is not base.call:
        return f"has a call() of its own ({type(model).__name__}), which its graph does not show"
    if library is _keras.keras:
        missing = isinstance(model, library.Sequential) and model._functional is None
    else:
        missing = not model._is_graph_network
    return "does not know the shape of its input" if missing else ""


def _not_followed(
    library: types.ModuleType,
    model: Any,
    inputs: list[Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    uses: int,
) -> str:
    """Return why a nested model is left alone, or an empty text if it is followed into."""
    if reason := _no_graph(library, model):
        return reason
    if uses > 1:
        return f"is used {uses} times"
    is_one = len(args) == 1 and (_is_symbolic(args[0]) or isinstance(args[0], list | tuple))
    if not is_one or not all(map(_is_unset, tf.nest.flatten(list(kwargs.values())))):
        return "is called with more than a list of tensors"
    if isinstance(model.input, dict) or len(model.inputs) != len(inputs):
        return "takes its inputs by name"
    wanted = [_shape(symbol) for symbol in model.inputs]
    if any(len(w) != len(t.shape) for w, t in zip(wanted, inputs, strict=True)):
        return "changes the shape of what it is called on"
    return ""


def _is_symbolic(arg: Any) -> bool:
    return hasattr(arg, "_keras_history")


def _is_unset(arg: Any) -> bool:
    return arg is None or arg is False


def _tensor(symbol: Any) -> Tensor:
    masked = getattr(symbol, "_keras_mask", None) is not None
    return Tensor(_shape(symbol), tf.as_dtype(symbol.dtype).name, masked)


def _shape(symbol: Any) -> tuple[int | None, ...]:
    return tuple(tf.TensorShape(symbol.shape).as_list()) if symbol.shape is not None else ()
