"""The choice of the weights of a model that are pruned."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _keras, _reports, functional
from tscnc_tf._keras import flavours, masks, models, wrappers
from tscnc_tf._keras import layers as kernel_layers
from tscnc_tf._keras.models import listed, selector

FROZEN = "it is frozen (trainable=False)"


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A weight tensor that is pruned.

    Attributes:
        name: the name of the layer, and that of the weight if the layer has several.
        layer: the layer that holds it.
        variable: the weight tensor, a variable of the layer's Keras.
        layout: the layout of its axes, as in `functional.canonical`; empty if not known.
        channel_groups: the number of groups of a grouped convolution, else 1.
        makes_outputs: whether each of its filters makes one output of the model; None if not known
            (such as in a subclassed model) and not chosen by `layers`.
    """

    name: str
    layer: Any
    variable: Any
    layout: str
    channel_groups: int
    makes_outputs: bool | None = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight tensor."""
        return tuple(self.variable.shape)

    @property
    def size(self) -> int:
        """The number of its entries."""
        return math.prod(self.shape)

    @property
    def outputs(self) -> int | None:
        """The number of its output channels; None if not known."""
        if not self.layout:
            return None
        groups, _, _, outputs = self.canonical_shape
        return groups * outputs

    @property
    def canonical_shape(self) -> tuple[int, int, int, int]:
        """The shape of `canonical(...)`: groups, positions, inputs, outputs."""
        return tuple(self.canonical(tf.zeros(self.shape, tf.bool)).shape)

    def canonical(self, values: tf.Tensor) -> tf.Tensor:
        """Return values of this shape as `(groups, positions, inputs, outputs)`."""
        return functional.canonical(values, self.layout, self.channel_groups)

    def restore(self, values: tf.Tensor) -> tf.Tensor:
        """Return the inverse of `canonical`."""
        return functional.restore(values, self.shape, self.layout)


class Candidate(NamedTuple):
    """A weight tensor of rank 2 or more, and why it is not pruned; empty if it is."""

    target: Target
    reason: str


class Candidates(list[Candidate]):
    """The candidates of a model; a type of its own, to tell them from an argument `layers`."""


def require_model(model: Any) -> None:
    """Raise unless `model` is a built model of either Keras that is not pruned."""
    _keras.library("model", model)
    _keras.require_built("model", model)
    require_unpruned("model", model)


def require_unpruned(name: str, model: Any) -> None:
    """Raise a ValueError if a model, or one inside it, is already pruned by either engine."""
    if isinstance(model, flavours.Trainer):
        raise ValueError(
            f"{name} must be the network itself, not the trainer: prune trainer.model."
        )
    if wrappers.wrapped_layers(model) or masks.pruners(model):
        raise ValueError(f"{name} {model.name!r} is pruned already: strip it first.")


def require_finite(targets: list[Target]) -> list[Target]:
    """Return the targets after a check of their values, which is skipped in a graph.

    Raises:
        ValueError: a target has NaN or infinite values.
    """
    if not tf.executing_eagerly():
        return targets
    bad = [each.name for each in targets if not np.isfinite(np.asarray(each.variable)).all()]
    if bad:
        raise ValueError(
            f"model has weights to be pruned that are NaN or infinite, in {', '.join(bad)}. Go "
            "back to a checkpoint from before the training diverged."
        )
    return targets


def candidates(
    model: Any,
    layers: Any = None,
    weights: str | None = None,
    min_rank: int = 2,
    unfit: Callable[[Target], str] = lambda _: "",
) -> Candidates:
    """Return all weight tensors of rank 2 or more of a model, with the reason not to prune each.

    Args:
        model: a built model of either Keras.
        layers: which layers, see `models.selector`; None for every layer with kernels. Of a chosen
            layer, all weights of sufficient rank are pruned, except biases. `Candidates`, such as
            those of a saved pruner, are returned unchanged.
        weights: a pattern for the names of weights, such as "*kernel"; None for all but biases.
        min_rank: the smallest rank of a weight to prune, >= 2.
        unfit: returns why a structure can't prune a weight, or an empty text.

    Raises:
        TypeError: `layers`, `weights` or `min_rank` has a wrong type.
        ValueError: `layers` chooses no layer with weights to prune, an element of it matches no
            layer, or `min_rank` is below 2.
    """
    if isinstance(layers, Candidates):
        return layers
    if weights is not None and not isinstance(weights, str):
        raise TypeError(f"weights must be a name pattern such as '*kernel', got {weights!r}.")
    _checks.integer("min_rank", min_rank, minimum=2)
    able = _able(model) if layers is not None else []
    chosen = selector("layers", layers, model, able)
    found = []
    any_is_chosen = layers is None
    last = models.output_kernels(model)
    unknown = None if layers is None else False
    for path, layer, variable, is_chosen in models.owned(model, chosen):
        any_is_chosen |= is_chosen
        leaf = models.leaf(variable)
        layout, groups = _reading(layer, variable)
        is_last = unknown if last is None else any(variable is kernel for kernel in last)
        target = Target("/".join([*path, leaf]), layer, variable, layout, groups, is_last)
        if not is_chosen or (weights and not models.fits(target.name, weights)):
            reason = "not chosen"
        elif fixed := models.fixed(layer, variable):
            reason = fixed
        elif len(variable.shape) < min_rank:
            reason = f"its rank is {len(variable.shape)}, below min_rank={min_rank}"
        elif weights is None and leaf in models.BIASES:
            reason = f"{leaf!r} is no kernel"
        elif weights is None and layers is None and models.is_no_kernel(layer, leaf):
            reason = f"{leaf!r} is no kernel; choose its layer by layers= to prune it"
        else:
            reason = unfit(target)
        found.append(Candidate(target, reason))
    if not any_is_chosen:
        raise ValueError(
            f"model {model.name!r} has no weight that can be pruned as asked for: layers={layers!r}"
            f" chooses none of the layers that have some, which are {listed(able, layers)}."
        )
    return _named(found)


def _able(model: Any) -> list[Any]:
    """Return the layers of a model with weights that can be pruned."""
    return [
        layer
        for _, layer, variable, _ in models.owned(model, lambda _: False)
        if not models.fixed(layer, variable) and models.leaf(variable) not in models.BIASES
    ]


def found_again(model: Any, weights: list[dict[str, Any]]) -> Candidates:
    """Return the candidates of a model for the weights of a saved pruner, found by their paths.

    Args:
        model: a built model.
        weights: the path (`layers.weight_paths`), name and shape of each pruned weight. Older files
            have its position among all candidates in place of the path.

    Raises:
        ValueError: the model lacks one of them.
    """
    every = candidates(model)
    where = kernel_layers.weight_paths(model)
    by_path = {where[id(target.variable)]: target for target, _ in every}
    pruned: dict[int, Target] = {}
    lacking = []
    for weight in weights:
        if "path" in weight:
            target = by_path.get(weight["path"])
        else:
            position = weight["position"]
            target = every[position].target if position < len(every) else None
        if target is None or list(target.shape) != list(weight["shape"]):
            lacking.append((weight.get("path", weight["name"]), tuple(weight["shape"])))
        else:
            pruned[id(target.variable)] = dataclasses.replace(target, name=weight["name"])
    if lacking:
        held = [(path, target.shape) for path, target in by_path.items()]
        raise ValueError(
            f"model {model.name!r} does not have the weights that were pruned: it lacks {lacking}, "
            f"by path and shape; it has {held}."
        )
    chosen = [Candidate(target, "") for target in pruned.values()]
    rest = [each for each in every if id(each.target.variable) not in pruned]
    others = [Candidate(target, reason or "not chosen") for target, reason in rest]
    return Candidates([*chosen, *others])


def _named(found: list[Candidate]) -> Candidates:
    """Shorten each name to that of the layer if it has one such weight, and make names unique."""
    companions = [kernel_layers.is_companion(target.layer, target.variable) for target, _ in found]
    counts: dict[int, int] = {}
    for (target, _), is_companion in zip(found, companions, strict=True):
        counts[id(target.layer)] = counts.get(id(target.layer), 0) + (not is_companion)
    names = []
    for (target, _), is_companion in zip(found, companions, strict=True):
        single = counts[id(target.layer)] == 1 and "/" in target.name and not is_companion
        names.append(target.name.rpartition("/")[0] if single else target.name)
    unique = _reports.unique(names)
    return Candidates(
        Candidate(dataclasses.replace(target, name=name), reason)
        for name, (target, reason) in zip(unique, found, strict=True)
    )


def _reading(layer: Any, variable: Any) -> tuple[str, int]:
    """Return the layout of a weight (empty if not known) and its number of channel groups."""
    for spec in kernel_layers.kernel_specs(layer):
        if kernel_layers.stored(layer, spec.attribute) is variable:
            return spec.layout, spec.channel_groups
    if isinstance(layer, _keras.keras.layers.EinsumDense | _keras.tf_keras.layers.EinsumDense):
        return kernel_layers.einsum_layout(layer.equation, len(variable.shape)), 1
    return "", 1
