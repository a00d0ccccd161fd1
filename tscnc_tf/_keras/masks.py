"""The masks of a model, whichever engine made them: tfmot's wrappers, or a pruner.

The masks of a pruner belong to variables: each is the constraint of its variable, which both
Kerases apply after every optimizer step, whatever the model, the loop or the `train_step`. So they
hold in any model that the variable is a part of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import tensorflow as tf
from tf_keras.src.mixed_precision.autocast_variable import AutoCastVariable

from tscnc_tf._keras import keras, layers, wrappers

PRUNER = "_attached_pruner"  # where the object of a model holds its pruner


class AttachedPruner(Protocol):
    """What this package asks of the pruner of a model; `pruning` implements it.

    Attributes:
        model: the model that it was attached to.
        state: its variables, a layer of the model's Keras.
    """

    model: Any
    state: Any

    def masked_variables(self) -> list[tuple[Any, Any]]:
        """Return the pairs (weight, mask) of the weights that are pruned now."""

    def constrain(self, weight: tf.Tensor, mask: Any, own: Callable[[Any], Any] | None) -> Any:
        """Return what a weight is to be after an optimizer step, by its mask and own constraint."""

    def training(self, optimizer: Any = None) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which an optimizer is to train the weights."""

    def on_train_begin(self, optimizer: Any) -> None:
        """Take note of the optimizer that is about to train."""

    def register_optimizer(self, optimizer: Any) -> None:
        """Take note of an optimizer that may keep something for the weights."""

    def reset_step_count(self, optimizer: Any = None) -> None:
        """Count the steps of an optimizer from where it is now."""

    def is_behind(self, optimizer: Any) -> bool:
        """Tell whether an optimizer has taken steps that `step` has not been called for."""

    def step(self, optimizer: Any = None, *, is_constrained: bool = False) -> None:
        """Count a step of an optimizer, and renew the masks where that is due."""

    def apply(self, optimizer: Any = None) -> None:
        """Set what is pruned to zero: in weights, and in what an optimizer keeps for them."""

    def on_weights_set(self) -> None:
        """Act on weights that were set from outside."""

    def get_config(self) -> dict[str, Any]:
        """Return what brings the pruner back, given the same model."""


class MaskConstraint:
    """The constraint of a variable that has a mask.

    Args:
        pruner: whose mask it is.
        mask: True where the weight is kept.
        own: the constraint that the variable had before, which acts as well; None for none.
    """

    def __init__(self, pruner: AttachedPruner, mask: Any, own: Callable[[Any], Any] | None) -> None:
        self.pruner = pruner
        self.mask = mask
        self.own = own

    def __call__(self, weight: Any) -> tf.Tensor:
        """Return what the weight is to be after an optimizer step."""
        return self.pruner.constrain(tf.convert_to_tensor(weight), self.mask, self.own)


def constrain(variable: Any, pruner: AttachedPruner, mask: Any) -> None:
    """Give a variable of either Keras a mask, beside the constraint that it has."""
    _set_constraint(variable, MaskConstraint(pruner, mask, variable.constraint))


def release(variable: Any) -> None:
    """Give a variable back the constraint that it had before its mask."""
    if isinstance(variable.constraint, MaskConstraint):
        _set_constraint(variable, variable.constraint.own)


def _set_constraint(variable: Any, constraint: Any) -> None:
    if isinstance(variable, keras.Variable):
        variable.constraint = constraint
        return
    inner = variable._variable if isinstance(variable, AutoCastVariable) else variable
    replicas = inner.values if isinstance(inner, tf.distribute.DistributedValues) else [inner]
    for each in replicas:  # tf.Variable takes it in its constructor only
        each._constraint = constraint


def pruners(model: Any) -> list[Any]:
    """Return the pruners of a model, each once: its own, those of parts, and of single weights.

    The last are those of another model that a layer is a part of, too.
    """
    found = [vars(layer)[PRUNER] for layer in layers.flatten(model) if PRUNER in vars(layer)]
    for variable in model.weights:
        constraint = getattr(variable, "constraint", None)  # a look-up table has none
        if isinstance(constraint, MaskConstraint):
            found.append(constraint.pruner)
    return list({id(pruner): pruner for pruner in found}.values())


def masked_variables(model: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (weight, mask) for every pruned weight of `model`, or of models inside it."""
    yield from wrappers.pruned_variables(model)
    own = {id(variable) for variable in model.weights}
    for pruner in pruners(model):
        yield from (pair for pair in pruner.masked_variables() if id(pair[0]) in own)


def apply(model: Any, optimizer: Any = None) -> None:
    """Set every pruned weight of `model` to zero where its mask says so.

    Args:
        model: a model of either Keras, pruned or not.
        optimizer: what belongs to the weights in it is masked as well.
    """
    wrappers.apply_masks(model, optimizer)
    for pruner in pruners(model):
        pruner.apply(optimizer)


@contextlib.contextmanager
def training(model: Any, *optimizers: Any) -> Iterator[None]:
    """Let every pruner of `model` see to how optimizers train it, as long as this lasts."""
    with contextlib.ExitStack() as stack:
        for pruner in pruners(model):
            for optimizer in optimizers:
                stack.enter_context(pruner.training(optimizer))
        yield


def after_step(model: Any, optimizer: Any) -> None:
    """Let all masks of `model` act on what an optimizer's step, and nothing else, has changed."""
    wrappers.apply_masks(model, optimizer)
    for pruner in pruners(model):
        pruner.step(optimizer, is_constrained=True)


def names(model: Any) -> dict[int, str]:
    """Return what belongs to pruning and not to the network: names by the variables' ids."""
    found: dict[int, str] = {}
    for wrapper in wrappers.wrapped_layers(model):
        inner = {id(variable) for variable in wrapper.layer.weights}
        found |= {id(v): v.name for v in wrapper.weights if id(v) not in inner}
    for pruner in pruners(model):
        found |= {id(v): v.name for v in pruner.state.weights}
    return found
