"""Prune by tfmot's wrappers, and take them off again."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from tscnc_tf import _keras, _tables
from tscnc_tf._keras import tf_keras, wrappers
from tscnc_tf.pruning.selection import selector


@dataclasses.dataclass(frozen=True)
class LayerStatus:
    """One layer of a model: whether it is pruned, and if not, why."""

    name: str
    kind: str
    weights: int
    pruned: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class PruningReport:
    """What of a model is pruned and what is not, layer by layer. Prints as a table."""

    layers: tuple[LayerStatus, ...]

    @property
    def skipped(self) -> tuple[LayerStatus, ...]:
        """The layers that have weights of rank 2 or more, but are not pruned."""
        return tuple(row for row in self.layers if not row.pruned)

    def __str__(self) -> str:
        return _tables.render(
            "Pruning",
            ("layer", "class", "weights", "pruned", "why not"),
            [
                (row.name, row.kind, f"{row.weights:,}", "yes" if row.pruned else "no", row.reason)
                for row in self.layers
            ],
        )


def prune(model: Any, schedule: Any, *, layers: Any = None, **options: Any) -> Any:
    """Return a model whose layers are pruned by magnitude as it is trained, through tfmot.

    Each layer with weights to prune is wrapped by `tfmot.sparsity.keras.prune_low_magnitude`.
    Layers that tfmot does not know, that are frozen, or that don't suit the options given don't
    abort it: they are left as they are, and a warning names them; `pruning.report(model)` says what
    was pruned and why the rest was not. A layer that is used in several places gets one wrapper.

    The pruned model shares its weights with the one given, as it does with tfmot's own verb.
    Train it with `callbacks.pruning_callbacks()`.

    Args:
        model: a Sequential or functional tf_keras model, built; nested models are followed.
        schedule: a `PruningSchedule` of `tscnc_tf.schedules` or tfmot.
        layers: which layers, as in `add_regularizers`; None for all that tfmot can prune.
        **options: `block_size`, `block_pooling_type`, `sparsity_m_by_n`, as tfmot takes them.
            tfmot forgets `sparsity_m_by_n` when the pruned model is saved: a warning says so.

    Returns:
        A new, uncompiled model.

    Raises:
        TypeError: `model` is no tf_keras model, or `schedule` no schedule.
        ValueError: the model is subclassed, not built or pruned already, or nothing can be pruned.

    Example:
        >>> import tf_keras
        >>> import tscnc_tf as tscnc
        >>> model = tf_keras.Sequential([tf_keras.layers.Dense(3, input_shape=(4,))])
        >>> pruned = tscnc.prune(model, tscnc.schedules.CosineSparsity(0.0, 0.5, 10, 100))

    Reference:
        Zhu & Gupta 2017, arXiv 1710.01878.
    """
    _keras.require_tf_keras_model("model", model)
    _keras.require_graph_model("model", model)
    _keras.require_built("model", model)
    tfmots = _keras.tfmot().sparsity.keras
    if not isinstance(schedule, tfmots.PruningSchedule):
        raise TypeError(
            "schedule must be a PruningSchedule, such as tscnc_tf.schedules.CosineSparsity, "
            f"got {schedule!r}."
        )
    if wrappers.wrapped_layers(model):
        raise ValueError(f"model {model.name!r} is pruned already: strip it first.")
    chosen = selector("layers", layers)
    m_by_n = options.get("sparsity_m_by_n")
    skipped: dict[str, str] = {}
    clones: dict[int, Any] = {}

    def wrap(layer: Any) -> Any:
        if id(layer) not in clones:
            clones[id(layer)] = wrapped(layer)
        return clones[id(layer)]

    def wrapped(layer: Any) -> Any:
        if isinstance(layer, tf_keras.Model):
            _keras.require_graph_model("model: its part", layer)
            return tf_keras.models.clone_model(layer, clone_function=wrap)
        if not _matrix_weights(layer) or not chosen(layer):
            return layer
        if reason := wrappers.unprunable(layer, options.get("block_size", (1, 1)), m_by_n):
            skipped[layer.name] = reason
            return layer
        return tfmots.prune_low_magnitude(layer, schedule, **options)

    pruned = tf_keras.models.clone_model(model, clone_function=wrap)
    if not wrappers.wrapped_layers(pruned):
        raise ValueError(
            f"model {model.name!r} has no layer that can be pruned"
            + (f" among layers={layers!r}" if layers is not None else "")
            + (f": {skipped}." if skipped else ".")
        )
    if skipped:
        listing = "; ".join(f"{name} ({reason})" for name, reason in skipped.items())
        warnings.warn(f"These layers are left unpruned: {listing}.", UserWarning, stacklevel=2)
    if m_by_n:
        warnings.warn(
            f"tfmot does not save sparsity_m_by_n={tuple(m_by_n)}: a model that is saved and "
            "loaded again goes on unstructured. Train it to the end before you save it, and save "
            "the stripped model.",
            UserWarning,
            stacklevel=2,
        )
    return pruned


def strip(model: Any) -> Any:
    """Return a pruned model without tfmot's wrappers, its masks applied to the weights.

    The stripped model shares its weights with the one given. A model without wrappers is returned
    as it is.

    Args:
        model: a Sequential or functional tf_keras model.

    Raises:
        TypeError: `model` is no tf_keras model.
        ValueError: `model` is subclassed and holds wrappers.

    Example:
        >>> import tf_keras
        >>> import tscnc_tf as tscnc
        >>> model = tf_keras.Sequential([tf_keras.layers.Dense(3, input_shape=(4,))])
        >>> pruned = tscnc.prune(model, tscnc.schedules.OneShot(0.5))
        >>> [layer.name for layer in tscnc.strip(pruned).layers] == [model.layers[0].name]
        True
    """
    _keras.require_tf_keras_model("model", model)
    if not wrappers.wrapped_layers(model):
        return model
    _keras.require_graph_model("model", model)
    wrappers.apply_masks(model)
    return _keras.tfmot().sparsity.keras.strip_pruning(model)


def report(model: Any) -> PruningReport:
    """Return which layers of a model are pruned, and why the others are not.

    Only layers that hold weights of rank 2 or more are listed: biases and normalisation weights
    are never pruned. A layer made of others, such as LSTM, Bidirectional or MultiHeadAttention, is
    one row; it counts as pruned if any of its weights is.

    Args:
        model: a tf_keras model, pruned or not.

    Raises:
        TypeError: `model` is no tf_keras model.
    """
    _keras.require_tf_keras_model("model", model)
    _keras.tfmot()
    masked = {id(weight) for weight, _ in wrappers.pruned_variables(model)}
    listed: set[int] = set()
    block_size, m_by_n = _options(model)
    rows = []
    for layer in model._flatten_layers(include_self=False):
        if wrappers.is_wrapper(layer) or isinstance(layer, tf_keras.Model):
            continue
        weights = [weight for weight in _matrix_weights(layer) if id(weight) not in listed]
        if not weights:
            continue
        listed |= {id(weight) for weight in weights}
        pruned = any(id(weight) in masked for weight in weights)
        reason = wrappers.unprunable(layer, block_size, m_by_n) or "not chosen"
        reason = "" if pruned else reason
        count = sum(weight.shape.num_elements() for weight in weights)
        rows.append(LayerStatus(layer.name, type(layer).__name__, count, pruned, reason))
    return PruningReport(tuple(rows))


def prune_scope() -> Any:
    """Return tfmot's scope, in which pruned models load, from whatever format.

    Example:
        >>> import tf_keras
        >>> import tscnc_tf as tscnc
        >>> with tscnc.pruning.prune_scope():  # doctest: +SKIP
        ...     model = tf_keras.models.load_model("pruned.keras")
    """
    return _keras.tfmot().sparsity.keras.prune_scope()


def _matrix_weights(layer: Any) -> list[Any]:
    """Return a layer's weights of rank 2 or more, frozen or not: what could be pruned at all."""
    return [weight for weight in layer.weights if weight.trainable and len(weight.shape) >= 2]


def _options(model: Any) -> tuple[Any, Any]:
    """Return the block size and the m-by-n pattern that all of a model's wrappers agree on."""
    every = wrappers.wrapped_layers(model)
    sizes = {tuple(wrapper.block_size) for wrapper in every}
    patterns = {wrapper.sparsity_m_by_n for wrapper in every}
    return (
        sizes.pop() if len(sizes) == 1 else (1, 1),
        patterns.pop() if len(patterns) == 1 else None,
    )
