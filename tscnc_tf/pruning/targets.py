"""Which weights of a model are pruned, and why the others are not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _keras, _reports, functional
from tscnc_tf._keras import adapted, flavours, masks, models, wrappers
from tscnc_tf._keras import layers as kernel_layers
from tscnc_tf._keras.models import listed, selector

FROZEN = "it is frozen (trainable=False)"


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A weight that is pruned.

    Attributes:
        name: of the layer, and which of its weights, where there are several.
        layer: the layer that holds it.
        variable: the weight, a variable of the layer's Keras.
        layout: how to read its axes, as in `functional.canonical`; empty if that is not known.
        channel_groups: of a grouped convolution, else 1.
        makes_outputs: whether each of its filters makes one output of the model; None if that is
            not known, as the model is subclassed, and it was not chosen by name.
    """

    name: str
    layer: Any
    variable: Any
    layout: str
    channel_groups: int
    makes_outputs: bool | None = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return tuple(self.variable.shape)

    @property
    def size(self) -> int:
        """The number of its entries."""
        return math.prod(self.shape)

    @property
    def outputs(self) -> int | None:
        """The number of its output channels, None if that is not known."""
        if not self.layout:
            return None
        groups, _, _, outputs = self.canonical_shape
        return groups * outputs

    @property
    def canonical_shape(self) -> tuple[int, int, int, int]:
        """The shape of `canonical(...)`: groups, positions, inputs, outputs."""
        return tuple(self.canonical(tf.zeros(self.shape, tf.bool)).shape)

    def canonical(self, values: tf.Tensor) -> tf.Tensor:
        """Return values of the weight's shape as `(groups, positions, inputs, outputs)`."""
        return functional.canonical(values, self.layout, self.channel_groups)

    def restore(self, values: tf.Tensor) -> tf.Tensor:
        """Return the inverse of `canonical`."""
        return functional.restore(values, self.shape, self.layout)


class Candidate(NamedTuple):
    """A weight of rank 2 or more, and the reason not to prune it, empty if there is none."""

    target: Target
    reason: str


class Candidates(list[Candidate]):
    """The weights of a model, with the decision on each: which are pruned, and why others not."""


def require_model(model: Any) -> None:
    """Raise unless a model is one of either Keras, built, and not pruned yet."""
    _keras.library("model", model)
    _keras.require_built("model", model)
    require_unpruned("model", model)


def require_unpruned(name: str, model: Any) -> None:
    """Raise a ValueError if a model, or one inside it, is pruned already, by whichever engine."""
    if isinstance(model, flavours.Trainer):
        raise ValueError(
            f"{name} must be the network itself, not the trainer: prune trainer.model."
        )
    if wrappers.wrapped_layers(model) or masks.pruners(model):
        raise ValueError(f"{name} {model.name!r} is pruned already: strip it first.")


def require_finite(targets: list[Target]) -> list[Target]:
    """Return targets whose weights can be ranked; in a graph they are not looked at.

    Raises:
        ValueError: one is NaN or infinite somewhere.
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
    """Return all weights of rank 2 or more of a model, with the reason not to prune each.

    Args:
        model: a built model of either Keras.
        layers: which layers, see `models.selector`; None for every layer that has kernels. Of a
            layer that is chosen, all weights of the rank asked for are taken, but biases.
            `Candidates`, such as those of a saved pruner, are returned as they are.
        weights: a pattern for the names of weights, such as "*kernel"; None for all but biases.
        min_rank: the smallest rank of a weight to prune.
        unfit: returns why a weight does not suit the structure asked for, or an empty text.

    Raises:
        TypeError: `layers`, `weights` or `min_rank` is of a wrong kind.
        ValueError: `layers` chooses no layer that has weights to prune, an element of it fits no
            layer, or `min_rank` is below 1.
    """
    if isinstance(layers, Candidates):
        return layers
    if weights is not None and not isinstance(weights, str):
        raise TypeError(f"weights must be a name pattern such as '*kernel', got {weights!r}.")
    _checks.integer("min_rank", min_rank, minimum=1)
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
    """Return the layers of a model that have weights which are pruned if they are chosen."""
    return [
        layer
        for _, layer, variable, _ in models.owned(model, lambda _: False)
        if not models.fixed(layer, variable) and models.leaf(variable) not in models.BIASES
    ]


def found_again(model: Any, weights: list[dict[str, Any]]) -> Candidates:
    """Return the weights of a model, those to prune found by their paths.

    Args:
        model: a built model.
        weights: of each weight that is to be pruned its path (`layers.weight_paths`), name and
            shape; in older files its position among all candidates, in place of the path.

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
    """Shorten names to that of the layer where it has one such weight; keep all names apart."""
    beside = [adapted.is_companion(target.layer, target.variable) for target, _ in found]
    counts: dict[int, int] = {}
    for (target, _), is_companion in zip(found, beside, strict=True):
        counts[id(target.layer)] = counts.get(id(target.layer), 0) + (not is_companion)
    names = []
    for (target, _), is_companion in zip(found, beside, strict=True):
        single = counts[id(target.layer)] == 1 and "/" in target.name and not is_companion
        names.append(target.name.rpartition("/")[0] if single else target.name)
    unique = _reports.unique(names)
    return Candidates(
        Candidate(dataclasses.replace(target, name=name), reason)
        for name, (target, reason) in zip(unique, found, strict=True)
    )


def _reading(layer: Any, variable: Any) -> tuple[str, int]:
    """Return the layout and the channel groups of a weight; an empty layout if not known."""
    for spec in kernel_layers.kernel_specs(layer):
        if adapted.stored(layer, spec.attribute) is variable:
            return spec.layout, spec.channel_groups
    if isinstance(layer, _keras.keras.layers.EinsumDense | _keras.tf_keras.layers.EinsumDense):
        return kernel_layers.einsum_layout(layer.equation, len(variable.shape)), 1
    return "", 1
