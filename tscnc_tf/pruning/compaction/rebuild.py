"""Build a model anew from its layers' configurations, with other sizes and given weights."""

from __future__ import annotations

import types
import warnings
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from tscnc_tf import _keras
from tscnc_tf._keras import cloning
from tscnc_tf.pruning.compaction.graph import Tensor
from tscnc_tf.pruning.compaction.operations import Channels, Edit

_OBJECTS = ("activation", "regularizer", "constraint")


def rebuild(
    library: types.ModuleType,
    model: Any,
    edits: Mapping[Any, Edit],
    nested_inputs: Mapping[int, list[Tensor]],
    keeps: Mapping[Tensor, Channels],
) -> tuple[Any, dict[int, Any]]:
    """Return a new model with the edits made, and its layers by the ids of the old ones.

    Args:
        library: the Keras of the model.
        model: a built Sequential or functional model. It is not changed.
        edits: for layers of the model, and of models nested in it, what they are to have.
        nested_inputs: for the ids of nested models, the tensors that they take.
        keeps: which channels of those tensors stay.

    Raises:
        ValueError: a layer can't be rebuilt from its configuration.
    """
    rebuilding = _Rebuilding(library, edits, nested_inputs, keeps)
    copy = rebuilding.clone(model)
    rebuilding.restore()
    pairs = rebuilding.layers | rebuilding.models
    return copy, {number: new for number, (_, new) in pairs.items()}


class _Rebuilding:
    def __init__(
        self,
        library: types.ModuleType,
        edits: Mapping[Any, Edit],
        nested_inputs: Mapping[int, list[Tensor]],
        keeps: Mapping[Tensor, Channels],
    ) -> None:
        self.library = library
        self.edits = edits
        self.nested_inputs = nested_inputs
        self.keeps = keeps
        self.layers: dict[int, tuple[Any, Any]] = {}  # old and new, by the id of the old one
        self.models: dict[int, tuple[Any, Any]] = {}

    def clone(self, layer: Any) -> Any:
        """Return the new layer or model that stands for an old one, the same one each time."""
        is_model = isinstance(layer, self.library.Model)
        if is_model:
            _keras.require_graph_model("model: its part", layer)
        known = self.models if is_model else self.layers
        if id(layer) not in known:
            known[id(layer)] = (layer, self._model(layer) if is_model else self._layer(layer))
        return known[id(layer)][1]

    def restore(self) -> None:
        """Give the new layers their weights, and layers and models their `trainable`."""
        for old, new in self.layers.values():
            edit = self.edits.get(old)
            if edit is None or not edit.weights:
                self._copy_weights(old, new)
                continue
            for attribute, value in edit.weights.items():
                getattr(new, attribute).assign(value)
        # A model hands its flag down to its layers, so theirs come after it.
        for old, new in (*reversed(self.models.values()), *self.layers.values()):
            flag = getattr(old, "trainable", None)
            if flag is not None and new.trainable != flag:
                new.trainable = flag

    def _copy_weights(self, old: Any, new: Any) -> None:
        if not isinstance(old, self.library.layers.Layer) or not old.weights:
            return
        cloning.set_weights(self.library, new, old.get_weights())

    def _layer(self, layer: Any) -> Any:
        return cloning.rebuilt(layer, lambda: self._from_config(layer))

    def _from_config(self, layer: Any) -> Any:
        with warnings.catch_warnings():  # that lambdas are not to be saved: nothing is
            warnings.simplefilter("ignore", UserWarning)
            config = layer.get_config()
        for name in config:
            # The objects themselves, which need not be registered to be used again.
            if name.endswith(_OBJECTS) and callable(value := getattr(layer, name, None)):
                config[name] = value
        if edit := self.edits.get(layer):
            config = {**config, **edit.config}
        if type(layer) is self.library.layers.Lambda:
            return self._lambda(layer, config)
        return type(layer).from_config(config)

    def _lambda(self, layer: Any, config: dict[str, Any]) -> Any:
        """Return a Lambda with the same function object: its configuration has only byte code."""
        general = {name: config[name] for name in ("name", "trainable", "dtype")}
        return type(layer)(
            layer.function,
            output_shape=layer._output_shape,
            mask=layer.mask,
            arguments=dict(layer.arguments),
            **general,
        )

    def _model(self, model: Any) -> Any:
        inputs = [
            self.library.Input(
                shape=(*symbol.shape[1:-1], channels) if symbol.shape[1:] else (),
                batch_size=symbol.shape[0],
                dtype=tf.as_dtype(symbol.dtype).name,
                name=symbol._keras_history[0].name,
            )
            for symbol, channels in zip(model.inputs, self._channels(model), strict=True)
        ]
        if self.library is _keras.tf_keras:
            if len(inputs) == 1 and isinstance(model, self.library.Sequential):
                inputs = inputs[0]
            return self.library.models.clone_model(model, inputs, clone_function=self.clone)
        # Keras 3's clone_model would compile the copy as well.
        if isinstance(model, self.library.Sequential):
            layers = [self.clone(layer) for layer in model.layers]
            return type(model)([*inputs, *layers], name=model.name)
        bases: tuple[Any, ...] = type(model).__mro__
        base = next(base for base in bases if base.__name__ == "Functional")
        kind = bases[0] if bases[0].__init__ is base.__init__ else base
        structure = tf.nest.pack_sequence_as(model.input, inputs)
        outputs = model._run_through_graph(inputs, operation_fn=self.clone)
        return kind(structure, outputs, name=model.name)

    def _channels(self, model: Any) -> list[int | None]:
        """Return the sizes of the last axes of a model's inputs."""
        if id(model) not in self.nested_inputs:
            return [symbol.shape[-1] for symbol in model.inputs]
        tensors = self.nested_inputs[id(model)]
        return [int(self.keeps[tensor].sum()) or tensor.shape[-1] for tensor in tensors]
