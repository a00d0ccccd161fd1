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
    """A tensor between two calls. Its channels are its last axis.

    Attributes:
        shape: with the batch axis; None for an axis of unknown size.
        dtype: the name of its dtype.
        masked: whether it has a Keras mask, as after an embedding with mask_zero=True.
    """

    shape: tuple[int | None, ...]
    dtype: str
    masked: bool = False

    @property
    def channels(self) -> int:
        """The number of channels; 0 if the tensor has no channel axis, or one of unknown size."""
        return (self.shape[-1] or 0) if len(self.shape) > 1 else 0

    @property
    def positions(self) -> int | None:
        """The number of spatial positions per example; None if not known."""
        count = 1
        for size in self.shape[1:-1]:
            if size is None:
                return None
            count *= size
        return count


@dataclasses.dataclass(eq=False)
class Call:
    """One call of a layer (or of a Keras operation).

    Attributes:
        layer: the layer.
        name: its name, prefixed by those of the nested models around it.
        inputs, outputs: the tensors, in the order of the arguments.
        args, kwargs: the arguments as stored by Keras, including its symbolic tensors.
        uses: the number of calls of the layer in the whole model.
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
        """The set arguments by their names, with a `Tensor` for each symbolic one."""
        symbols = filter(_is_symbolic, tf.nest.flatten((self.args, self.kwargs)))
        tensors = {id(symbol): t for symbol, t in zip(symbols, self.inputs, strict=True)}
        bound = inspect.signature(self.layer.call).bind(*self.args, **self.kwargs).arguments
        named = {name: tensors.get(id(value), value) for name, value in bound.items()}
        return {name: value for name, value in named.items() if not _is_unset(value)}

    def apply(self, value: Any) -> Any:
        """Return the layer's output with `value` in place of its only symbolic tensor."""
        args, kwargs = tf.nest.map_structure(
            lambda arg: value if _is_symbolic(arg) else arg, (self.args, self.kwargs)
        )
        return self.layer.call(*args, **kwargs)


@dataclasses.dataclass
class Graph:
    """An unrolled model.

    Attributes:
        inputs, outputs: the tensors of the model.
        calls: in topological order.
        unrolled: the input tensors of the nested models that are unrolled, by the models' ids.
        opaque: the reasons why other nested models are kept as one call, by the models' ids.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]
    calls: list[Call] = dataclasses.field(default_factory=list)
    unrolled: dict[int, list[Tensor]] = dataclasses.field(default_factory=dict)
    opaque: dict[int, str] = dataclasses.field(default_factory=dict)


def unroll(library: types.ModuleType, model: Any) -> Graph:
    """Return the graph of a built Sequential or functional model.

    Nested models that are Sequential or functional, and used once, are unrolled.

    Raises:
        ValueError: the model has no graph, or overrides `call`, which its graph does not show.
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
            continue  # not on a path from the inputs
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
    """Yield (layer, args, kwargs, outputs) for every call in a model, in topological order."""
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
    """Return why the graph of a model is not known; an empty text if it is."""
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
    """Return why a nested model is not unrolled; an empty text if it is."""
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
    dtypes = [tf.as_dtype(symbol.dtype) for symbol in model.inputs]
    if any(not d.is_floating and d.name != t.dtype for d, t in zip(dtypes, inputs, strict=True)):
        return "casts what it is called on"
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
