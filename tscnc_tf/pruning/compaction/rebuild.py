"""Build a model anew from its layers' configurations, with other sizes and given weights."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

from tscnc_tf._keras import cloning
from tscnc_tf.pruning.compaction.graph import Tensor
from tscnc_tf.pruning.compaction.operations import Channels, Edit


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
    return rebuilding.rebuild(model), rebuilding.stand_ins


class _Rebuilding(cloning.Rebuilder):
    def __init__(
        self,
        library: types.ModuleType,
        edits: Mapping[Any, Edit],
        nested_inputs: Mapping[int, list[Tensor]],
        keeps: Mapping[Tensor, Channels],
    ) -> None:
        super().__init__(library)
        self._edits = edits
        self._nested_inputs = nested_inputs
        self._keeps = keeps

    def configured(self, layer: Any, config: dict[str, Any]) -> dict[str, Any]:
        """Return the configuration with the edits in it."""
        edit = self._edits.get(layer)
        return config | edit.config if edit else config

    def weights(self, layer: Any) -> Mapping[str, Any]:
        """Return the weights of a layer that is edited."""
        edit = self._edits.get(layer)
        return edit.weights if edit else {}

    def channels(self, model: Any) -> list[int | None]:
        """Return the numbers of channels that stay, of the inputs of a nested model."""
        if id(model) not in self._nested_inputs:
            return super().channels(model)
        tensors = self._nested_inputs[id(model)]
        return [int(self._keeps[tensor].sum()) or tensor.shape[-1] for tensor in tensors]
