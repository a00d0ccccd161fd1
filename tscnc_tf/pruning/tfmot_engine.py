"""The tfmot engine: wraps layers by tfmot's pruning wrappers, and removes these."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from tscnc_tf import _keras
from tscnc_tf._keras import cloning, flavours, gated, tf_keras, wrappers
from tscnc_tf._keras import layers as kernel_layers
from tscnc_tf._keras.models import listed, selector
from tscnc_tf.pruning.structures import NM


def wrap(model: Any, schedule: Any, layers: Any, options: dict[str, Any]) -> Any:
    """Return a copy of a tf_keras model whose prunable layers are in tfmot's wrappers.

    Args:
        model: a Sequential or functional tf_keras model, built.
        schedule: a `PruningSchedule`.
        layers: as in `models.selector`.
        options: arguments of `tfmot.sparsity.keras.prune_low_magnitude`.

    Raises:
        TypeError, ValueError: see `prune`.
    """
    _keras.require_graph_model("model", model, 'Or pass engine="masks", which prunes it as it is.')
    tfmots = _keras.tfmot().sparsity.keras
    if not isinstance(schedule, tfmots.PruningSchedule):
        raise TypeError(
            "schedule must be a PruningSchedule, such as tscnc_tf.schedules.CosineSparsity, "
            f"got {schedule!r}."
        )
    m_by_n = options.get("sparsity_m_by_n")
    called = kernel_layers.calls(model)
    every = [layer for layer in kernel_layers.flatten(model) if id(layer) in called]
    able = [layer for layer in every if not _unfit(layer, options)]
    chosen = selector("layers", layers, model, able)
    wrapping = _Wrapping(chosen, schedule, options)
    pruned = wrapping.rebuild(model)
    skipped = wrapping.skipped
    if not wrappers.wrapped_layers(pruned):
        raise ValueError(
            f"model {model.name!r} has no layer that can be pruned"
            + (f" among layers={layers!r}, of {listed(able, layers)}" if layers is not None else "")
            + (f": {skipped}." if skipped else ".")
        )
    if skipped:
        listing = "; ".join(f"{name} ({reason})" for name, reason in skipped.items())
        warnings.warn(
            f'These layers are left unpruned: {listing}. With engine="masks" they can be pruned.',
            UserWarning,
            stacklevel=3,
        )
    if m_by_n:
        warnings.warn(
            f"tfmot does not save sparsity_m_by_n={tuple(m_by_n)}: a model that is saved and "
            "loaded again is pruned without structure. Finish the training before you save it, and "
            'save the stripped model; or use engine="masks" with '
            f"structure={_same_pattern(*m_by_n)}, which is saved.",
            UserWarning,
            stacklevel=3,
        )
    return pruned


class _Wrapping(cloning.Rebuilder):
    """Rebuilds a model with the same layers, of which the chosen and prunable ones are wrapped."""

    def __init__(self, chosen: Callable[[Any], bool], schedule: Any, options: dict[str, Any]):
        super().__init__(tf_keras)
        self._chosen = chosen
        self._schedule = schedule
        self._options = options
        self.skipped: dict[str, str] = {}

    def original(self, layer: Any) -> Any:
        """Return the layer itself."""
        return layer

    def replacement(self, layer: Any) -> Any:
        """Return the layer, wrapped if it is chosen and prunable."""
        layer = self.copied(layer)
        inner = layer.layer if gated.is_gated(layer) else layer
        if not matrix_weights(inner) or not (self._chosen(layer) or self._chosen(inner)):
            return layer
        if reason := _unfit(layer, self._options):
            self.skipped[layer.name] = reason
            return layer
        prune_low_magnitude = _keras.tfmot().sparsity.keras.prune_low_magnitude
        return prune_low_magnitude(layer, self._schedule, **self._options)


def _unfit(layer: Any, options: dict[str, Any]) -> str:
    """Return why tfmot can't prune a layer with these options, or an empty text."""
    inner = layer.layer if gated.is_gated(layer) else layer
    if not matrix_weights(inner):
        return "it has no weights of rank 2 or more"
    block_size = options.get("block_size", (1, 1))
    return wrappers.unprunable(inner, block_size, options.get("sparsity_m_by_n"))


def _same_pattern(zeros: int, size: int) -> NM:
    """Return the structure for tfmot's m by n, where m is the number of zeros."""
    return NM(size - zeros, size)


def unwrap(model: Any) -> Any:
    """Return a copy of a tf_keras model without tfmot's wrappers, with the masks applied."""
    _keras.require_graph_model("model", model)
    wrappers.apply_masks(model)
    return cloning.unwrapped(model)


def reason(model: Any, layer: Any) -> str:
    """Return why tfmot does not prune a layer of a wrapped model."""
    every = wrappers.wrapped_layers(model)
    sizes = {tuple(wrapper.block_size) for wrapper in every}
    patterns = {wrapper.sparsity_m_by_n for wrapper in every}
    block_size = sizes.pop() if len(sizes) == 1 else (1, 1)
    m_by_n = patterns.pop() if len(patterns) == 1 else None
    return wrappers.unprunable(layer, block_size, m_by_n) or "not chosen"


def matrix_weights(layer: Any) -> list[Any]:
    """Return a layer's weights of rank 2 or more, in frozen layers too."""
    weights = flavours.variables(layer)
    return [weight for weight in weights if weight.trainable and len(weight.shape) >= 2]
