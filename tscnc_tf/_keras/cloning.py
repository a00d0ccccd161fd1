"""Copies of models in both Keras versions, made here only.

A copy is built layer by layer from the layers' configurations. Functions, nested layers, weights,
the state of preprocessing layers and the `trainable` flags, which a configuration lacks, are copied
from the old objects attribute by attribute. Weights are never matched by their position in a list:
tf_keras orders `get_weights()` by trainability.
"""

from __future__ import annotations

import inspect
import operator
import tempfile
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorflow as tf

from tscnc_tf import _keras
from tscnc_tf._keras import keras, layers, tf_keras, wrappers
from tscnc_tf._keras.flavours import is_variable, variables

_OBJECTS = ("activation", "regularizer", "constraint", "initializer")
_Pair = tuple[Any, Any]
_BARE: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class Rebuilder:
    """Builds a copy of one model; subclasses override hooks to change parts of the copy.

    The copy has the names, graph, weights and `trainable` flags of the old model; shared layers
    stay shared. It is not compiled and has no pruner, and a Sequential of any class is copied as a
    plain one. The old model is not changed.

    Args:
        library: the Keras that the model is made of.

    Attributes:
        stand_ins: the replacement of each layer or nested model in the graph, by the id of the old.
        pairs: (old, new) of all layers and models, once the copy is complete.
    """

    def __init__(self, library: types.ModuleType) -> None:
        self.library = library
        self.stand_ins: dict[int, Any] = {}
        self.pairs: list[_Pair] = []
        self._copies: dict[int, Any] = {}
        self._made: list[_Pair] = []

    # Hooks for subclasses

    def replacement(self, layer: Any) -> Any:
        """Return the replacement of a layer or operation in the graph; by default its copy."""
        return self.copied(layer)

    def configured(self, layer: Any, config: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Return the configuration from which the copy of a layer (or part of one) is made.

        Args:
            layer: the old layer.
            config: its configuration, a dictionary that may be changed; it holds function objects
                in place of their names.
        """
        return config

    def weights(self, layer: Any) -> Mapping[str, Any]:  # noqa: ARG002
        """Return new values for weights of the copy, by attribute name; all others are copied.

        A weight of a nested layer is named by the path of attributes, such as "part.kernel".
        """
        return {}

    def channels(self, model: Any) -> list[int | None]:
        """Return the sizes of the last axes of the inputs of the model or of a nested model."""
        return [symbol.shape[-1] if symbol.shape[1:] else None for symbol in model.inputs]

    def original(self, layer: Any) -> Any:
        """Return a copy of a layer without its weights; or the layer itself, to share it."""
        return self._from_config(layer)

    # Methods for callers and hooks

    def rebuild(self, model: Any) -> Any:
        """Return the copy of a built Sequential or functional model.

        Raises:
            ValueError: a layer can't be rebuilt from its configuration, a nested model is
                subclassed, or a weight has no counterpart in the copy.
        """
        copy = self.stand_in(model)
        self._complete(model, copy)
        return copy

    def stand_in(self, layer: Any) -> Any:
        """Return the replacement of a layer or nested model in the graph, made once."""
        if id(layer) not in self.stand_ins:
            if isinstance(layer, self.library.Model):
                _keras.require_graph_model("model: its part", layer)
                new = self._model(layer, self.stand_in)
            else:
                new = self.replacement(layer)
            self.stand_ins[id(layer)] = new
        return self.stand_ins[id(layer)]

    def copied(self, layer: Any) -> Any:
        """Return the copy of a layer, or of a layer or model inside of one, made once."""
        if id(layer) not in self._copies:
            if isinstance(layer, self.library.Model) and _keras.is_graph_model(layer):
                new = self._model(layer, self.copied)
            else:
                new = self.original(layer)
                self._made.append((layer, new))
            self._copies[id(layer)] = new
        return self._copies[id(layer)]

    # Layers

    def _from_config(self, layer: Any, packed: dict[str, Any] | None = None) -> Any:
        """Return a new layer, from its own configuration or from `packed`, that in another's."""
        if type(layer) is self.library.layers.Lambda:
            return rebuilt(layer, lambda: _same_lambda(layer))
        if packed is None:
            with warnings.catch_warnings():  # of functions that no file can hold
                warnings.simplefilter("ignore", UserWarning)
                packed = rebuilt(layer, layer.get_config)
        given = self._objects(layer, packed)
        config = self.configured(layer, packed | given)
        config = {key: self._unpacked(layer, key, value) for key, value in config.items()}
        with self.library.utils.custom_object_scope(_named(self.library, layer)):
            try:
                new = type(layer).from_config(dict(config))
            except Exception:  # a user's class may accept its serialized configuration only
                kept = {key: packed[key] for key in given if config[key] is given[key]}
                new = rebuilt(layer, lambda: type(layer).from_config(config | kept))
        for pair in _walk(layer, new):
            _adapt(self.library, *pair)
        return new

    def _objects(self, layer: Any, packed: dict[str, Any]) -> dict[str, Any]:
        """Return the function objects named in a configuration, which need not be registered.

        Keras' own functions are left to the configuration, except activations that are layers.
        """
        found = {}
        for name in packed:
            value = _attribute(layer, name) if name.endswith(_OBJECTS) else None
            if self._is_layer(value):
                if isinstance(packed[name], dict):
                    found[name] = self.copied(value)
            elif callable(value) and (_is_users(value) or _is_lambda(value)):
                found[name] = value
        return found

    def _unpacked(self, layer: Any, key: str, value: Any) -> Any:
        """Return an entry of a configuration with copies in place of the layers packed in it."""
        if isinstance(value, list | tuple):
            parts = getattr(layer, key, None)
            if not isinstance(parts, list | tuple) or len(parts) != len(value):
                parts = [None] * len(value)
            pairs = zip(parts, value, strict=True)
            copies = [self._copied_part(layer, part, packed) for part, packed in pairs]
            return value if all(map(operator.is_, copies, value)) else copies
        if isinstance(layer, self.library.layers.Bidirectional) and isinstance(value, dict):
            # Its layers have other names than the layers it was constructed from, and not every
            # Keras keeps both of the latter.
            patterns = {"layer": layer.forward_layer, "backward_layer": layer.backward_layer}
            if key in patterns:
                return _packed(self._from_config(patterns[key], value["config"]))
        return self._copied_part(layer, getattr(layer, key, None), value)

    def _copied_part(self, layer: Any, part: Any, packed: Any) -> Any:
        """Return the copy of a layer that is serialized in the configuration of another one.

        Args:
            layer: the outer layer.
            part: the outer layer's attribute of the entry's name.
            packed: the entry, or an element of it; returned as it is if it is not a known layer.
        """
        if not isinstance(packed, dict) or not isinstance(packed.get("config"), dict):
            return packed
        kind = str(packed.get("class_name")).rpartition(">")[2]
        named = [
            each
            for each in (layers.parts(layer) if self._is_layer(layer) else ())
            if each.name == packed["config"].get("name")
        ]
        for each in (part, *named):
            if self._is_layer(each) and type(each).__name__ == kind:
                return _packed(self.copied(each))
        return packed

    def _is_layer(self, value: Any) -> bool:
        return isinstance(value, self.library.layers.Layer)

    # Models

    def _model(self, model: Any, copy: Callable[[Any], Any]) -> Any:
        kind = _keras.plain_class(model)
        is_sequential = issubclass(kind, self.library.Sequential)
        if not _has_graph(self.library, model):
            return self._without_graph(model, copy)
        sizes = self.channels(model)
        inputs = [self._input(symbol, n) for symbol, n in zip(model.inputs, sizes, strict=True)]
        if self.library is tf_keras:
            given = inputs[0] if is_sequential and len(inputs) == 1 else inputs
            try:
                return tf_keras.models.clone_model(model, given, clone_function=copy)
            except TypeError as error:
                reason = " ".join(str(error).split())[:200]
                raise ValueError(
                    f"model {model.name!r} can't be rebuilt: tf_keras' own clone_model fails "
                    f"({reason}). If a layer is called on a constant tensor: make that a weight of "
                    "a layer, or an input."
                ) from error
        # Keras 3's clone_model would compile the copy as well.
        if is_sequential:
            return keras.Sequential([*inputs, *map(copy, model.layers)], name=model.name)
        if not _keras.takes_inputs_and_outputs(kind):
            kind = _keras.functional_base(kind)
        outputs = model._run_through_graph(inputs, operation_fn=copy)
        return kind(tf.nest.pack_sequence_as(model.input, inputs), outputs, name=model.name)

    def _without_graph(self, model: Any, copy: Callable[[Any], Any]) -> Any:
        """Return the copy of a Sequential whose input shape is not known."""
        new = self.library.Sequential([copy(layer) for layer in model.layers], name=model.name)
        shape = getattr(model, "_build_input_shape", None)
        if model.built and shape is not None:
            new.build(shape)
        return new

    def _input(self, symbol: Any, channels: int | None) -> Any:
        """Return a copy of a symbolic input with the given number of channels."""
        layer, shape = symbol._keras_history[0], tuple(symbol.shape)
        if shape[1:] and channels != shape[-1]:
            return self.library.Input(
                shape=(*shape[1:-1], channels),
                batch_size=shape[0],
                dtype=tf.as_dtype(symbol.dtype).name,
                name=layer.name,
            )
        return type(layer).from_config(layer.get_config()).output

    # Weights, flags and other state

    def _complete(self, model: Any, copy: Any) -> None:
        """Copy weights, other state and `trainable` flags."""
        self.pairs = self._paired([(model, copy), *self._made])
        flags = [(new, old.trainable) for old, new in self.pairs]
        pairs: dict[int, _Pair] = {}  # (old, new) variables by the ids of the new ones
        given: set[int] = set()
        for old, new in self._made:
            for name, value in self.weights(old).items():
                variable = operator.attrgetter(name)(new)
                variable.assign(value)
                given.add(id(variable))
        for old, new in self.pairs:
            if type(old) is type(new) and old is not new and not _keras.is_graph_model(old):
                _load_own(old, new)
                for before, after in _variables(old, new):
                    pairs.setdefault(id(after), (before, after))
        found = {id(before) for before, _ in pairs.values()}
        for old, new in self._made:
            if self._is_layer(old) and old is not new:
                for before, after in _by_name(old, new, found, pairs.keys() | given):
                    pairs.setdefault(id(after), (before, after))
        _require_untied(model, pairs)
        for number, (before, after) in pairs.items():
            if number not in given:
                _assign(before, after)
        for new, flag in flags:
            if new.trainable != flag:
                new.trainable = flag
        for before, after in pairs.values():
            if isinstance(before, keras.Variable) and after.trainable != before.trainable:
                after.trainable = before.trainable  # LoRA freezes single weights
        for old, new in self.pairs:
            if old is not new:
                _adapt(self.library, old, new)

    def _paired(self, roots: list[_Pair]) -> list[_Pair]:
        """Return (old, new) for all layers, nested ones included, each after its owner."""
        seen: set[tuple[int, int]] = set()
        order: list[_Pair] = []

        def descend(old: Any, new: Any) -> None:
            if (id(old), id(new)) in seen or not (self._is_layer(old) and self._is_layer(new)):
                return
            seen.add((id(old), id(new)))
            for pair in self._inside(old, new):
                descend(*pair)
            order.append((old, new))

        for root in reversed(roots):
            descend(*root)
        return order[::-1]

    def _inside(self, old: Any, new: Any) -> Iterator[_Pair]:
        """Yield (old, new) for the layers of a model, or the nested layers of a layer."""
        for part in (old, *layers.parts(old)):
            for known in (self.stand_ins, self._copies):
                if id(part) in known:
                    yield part, known[id(part)]
        if type(old) is type(new) and not _keras.is_graph_model(old):
            yield from _parts(old, new)


def _require_untied(model: Any, pairs: Mapping[int, _Pair]) -> None:
    """Raise a ValueError if a copy has several weights for one that layers of the model share."""
    copies: dict[int, Any] = {}
    for before, after in pairs.values():
        if copies.setdefault(id(before), after) is not after:
            raise ValueError(
                f"model {model.name!r} has a weight {before.name!r} that belongs to several "
                "layers, and a copy would have several weights: call one layer several times, or "
                "keep the layer that owns the weight as an attribute of the other."
            )


class _Unwrapping(Rebuilder):
    """Shares all layers with the old model, without tfmot's wrappers."""

    def original(self, layer: Any) -> Any:
        """Return the layer itself."""
        return layer

    def replacement(self, layer: Any) -> Any:
        """Return the layer in a wrapper, or the layer."""
        return self.copied(layer.layer if wrappers.is_wrapper(layer) else layer)


def unwrapped(model: Any) -> Any:
    """Return a graph model on the same layers as a tf_keras model, without tfmot's wrappers."""
    return _Unwrapping(tf_keras).rebuild(model)


def bare(model: Any) -> Any:
    """Return a view of `model` on the same layers and variables, without the pruning wrappers.

    A model without wrappers is returned itself. So is a subclassed model, whose graph is not known:
    its wrappers stay in the path (correct, only slower).
    """
    if not wrappers.wrapped_layers(model) or not _keras.is_graph_model(model):
        return model
    if model not in _BARE:
        _BARE[model] = unwrapped(model)
    return _BARE[model]


def rebuilt(layer: Any, build: Callable[[], Any]) -> Any:
    """Return the result of `build`, which reads the configuration of a layer.

    Raises:
        ValueError: `build` fails.
    """
    try:
        return build()
    except Exception as error:
        raise ValueError(
            f"layer {layer.name!r} of class {type(layer).__name__} can't be rebuilt from its "
            "configuration: give the class a get_config that returns all arguments of its "
            "constructor."
        ) from error


class _Reference:
    """Holds an object in a configuration; deep copies of it hold the same object."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> _Reference:
        return self


class _Given:
    """Class name in a configuration under which an existing layer is deserialized."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Return the existing layer."""
        return config["object"].value


_GIVEN = _keras.registered_name(_Given)


def _packed(layer: Any) -> dict[str, Any]:
    """Return the entry for an existing layer in the configuration of another one."""
    return {
        "class_name": _GIVEN,  # the legacy format of tf_keras looks this up
        "module": __name__,
        "registered_name": _GIVEN,
        "config": {"object": _Reference(layer)},
    }


def _attribute(layer: Any, name: str) -> Any:
    return getattr(layer, name, None) or getattr(layer, f"_{name}", None)


def _same_lambda(layer: Any) -> Any:
    """Return a Lambda with the same function object; its configuration holds only byte code."""
    return type(layer)(
        layer.function,
        output_shape=layer._output_shape,
        mask=layer.mask,
        arguments=dict(layer.arguments),
        name=layer.name,
        trainable=layer.trainable,
        dtype=layer.dtype_policy,
    )


def _named(library: types.ModuleType, layer: Any) -> dict[str, Any]:
    """Return the custom objects, by name, that a layer's configuration may refer to."""
    found: dict[str, Any] = {_GIVEN: _Given}
    if isinstance(layer, library.layers.Bidirectional):  # it serializes its layer again
        parts = list(layers.flatten(layer))
        values = [value for part in parts for value in vars(part).values()]
        objects = [type(part) for part in parts] + [v for v in values if inspect.isfunction(v)]
        found |= {value.__name__: value for value in objects if _is_users(value)}
    return found


def _is_users(value: Any) -> bool:
    """Return whether a class, a function, or an object's class is not defined in Keras."""
    return str(getattr(value, "__module__", "")).partition(".")[0] not in ("keras", "tf_keras")


def _is_lambda(value: Any) -> bool:
    """Return whether a function is a lambda; loaded lambdas have a module of Keras."""
    return getattr(value, "__name__", "") == "<lambda>"


def _has_graph(library: types.ModuleType, model: Any) -> bool:
    if library is keras:
        return not isinstance(model, keras.Sequential) or model._functional is not None
    return bool(model.inputs)


# Keras' own lists, whose elements other attributes hold as well; and the states of recurrent
# layers, which are not weights: the copy starts with fresh ones.
_SKIPPED = {
    *("states", "_states"),
    *("_layers", "_metrics", "_losses", "_trainable_variables", "_non_trainable_variables"),
    *("_seed_generators", "_functional", "_operations", "_operations_by_depth", "_nodes_by_depth"),
    *("_trainable_weights", "_non_trainable_weights", "_updates", "_callable_losses"),
    *("_input_layers", "_output_layers", "_inbound_nodes_value", "_outbound_nodes_value"),
}


def _held(old: Any, new: Any) -> Iterator[_Pair]:
    """Yield (old, new) variables and layers that two objects have in the same attributes."""
    others = vars(new)
    for name, value in vars(old).items():
        if name in others and name not in _SKIPPED and not name.startswith("_self_"):
            yield from _matching(value, others[name])


def _matching(old: Any, new: Any) -> Iterator[_Pair]:
    if isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        for pair in zip(old, new, strict=True):
            yield from _matching(*pair)
    elif isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() & new.keys():
            yield from _matching(old[key], new[key])
    elif (_is_layer(old) and _is_layer(new)) or (is_variable(old) and is_variable(new)):
        yield old, new
    elif isinstance(old, tf.Module) and isinstance(new, tf.Module):
        yield from _held(old, new)


def _is_layer(value: Any) -> bool:
    return isinstance(value, keras.layers.Layer | tf_keras.layers.Layer)


def _variables(old: Any, new: Any) -> Iterator[_Pair]:
    """Yield (old, new) variables that two layers hold themselves."""
    return (pair for pair in _held(old, new) if is_variable(pair[0]))


def _parts(old: Any, new: Any) -> Iterator[_Pair]:
    """Yield (old, new) layers that two layers hold themselves."""
    return (pair for pair in _held(old, new) if _is_layer(pair[0]))


def _walk(old: Any, new: Any) -> Iterator[_Pair]:
    """Yield (old, new) for two layers and all nested layers that exist in both."""
    waiting, seen = [(old, new)], set()
    while waiting:
        old, new = waiting.pop()
        if id(new) in seen:
            continue
        seen.add(id(new))
        yield old, new
        if _is_layer(old) and type(old) is type(new) and not _keras.is_graph_model(old):
            waiting += _parts(old, new)


def _assign(old: Any, new: Any) -> None:
    """Assign the value of one variable to another.

    Raises:
        ValueError: their shapes differ.
    """
    try:
        new.assign(old.numpy())
    except ValueError as error:
        raise ValueError(
            f"weight {old.name!r} is of shape {tuple(old.shape)}, and of shape {tuple(new.shape)} "
            "in a layer that is made from the same configuration: give the class of its layer a "
            "get_config that returns all arguments of its constructor."
        ) from error


def _by_name(old: Any, new: Any, found: set[int], taken: set[int]) -> Iterator[_Pair]:
    """Yield (old, new) weights of a layer and its copy that no attribute holds, by their names.

    Raises:
        ValueError: a weight has no counterpart, or several.
    """
    free = [weight for weight in variables(new) if id(weight) not in taken]
    for weight in variables(old):
        if id(weight) in found:
            continue
        name = str(weight.name).rpartition("/")[2]
        same = [other for other in free if str(other.name).rpartition("/")[2] == name]
        if len(same) != 1:
            raise ValueError(
                f"weight {weight.name!r} of layer {old.name!r} of class {type(old).__name__} "
                f"fits {len(same)} weights of a copy of the layer: let an attribute of the layer "
                "hold it, or give it a name that no other weight of the layer has."
            )
        yield weight, same[0]


def _adapt(library: types.ModuleType, old: Any, new: Any) -> None:
    """Copy the state of a layer other than its weights, such as that set by `adapt`."""
    kinds = library.layers
    if isinstance(old, kinds.StringLookup | kinds.IntegerLookup):
        vocabulary = old.get_vocabulary()
        if vocabulary != new.get_vocabulary():
            idf = old.idf_weights_const.numpy() if old.output_mode == "tf_idf" else None
            new.set_vocabulary(vocabulary, None if idf is None else idf[: len(vocabulary)])
    elif isinstance(old, kinds.Discretization):
        if old.bin_boundaries is not None:
            new.bin_boundaries = list(old.bin_boundaries)
    elif isinstance(old, kinds.Normalization):
        new.finalize_state()  # it computes with tensors derived from its weights
    elif getattr(old, "lora_enabled", False):
        new.lora_alpha = old.lora_alpha  # Keras sets it to the rank when it builds the layer


def _load_own(old: Any, new: Any) -> None:
    """Copy the variables and assets that a custom class saves by overridden methods."""
    if _is_users(type(old).save_own_variables):
        store: dict[str, Any] = {}
        old.save_own_variables(store)
        new.load_own_variables(store)
    save = getattr(type(old), "save_assets", None)
    if save is not None and _is_users(save):
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)
