"""The masks of a model, whichever engine made them: tfmot's wrappers, or a pruner."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tscnc_tf._keras import masked, wrappers


def masked_variables(model: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (weight, mask) for every pruned weight of `model`, or of models inside it."""
    yield from wrappers.pruned_variables(model)
    for part in masked.masked_models(model):
        yield from part.pruner.masked_variables()


def apply(model: Any, optimizer: Any = None) -> None:
    """Set every pruned weight of `model` to zero where its mask says so.

    Args:
        model: a model of either Keras, pruned or not.
        optimizer: what belongs to the weights in it is masked as well.
    """
    wrappers.apply_masks(model, optimizer)
    for part in masked.masked_models(model):
        part.pruner.apply(optimizer)


@contextlib.contextmanager
def training(model: Any, optimizer: Any) -> Iterator[None]:
    """Let every pruner of `model` see to how an optimizer trains it, as long as this lasts."""
    with contextlib.ExitStack() as stack:
        for part in masked.masked_models(model):
            stack.enter_context(part.pruner.training(optimizer))
        yield


def after_step(model: Any, optimizer: Any) -> None:
    """Let all masks of `model` act on what an optimizer step has changed."""
    wrappers.apply_masks(model, optimizer)
    for part in masked.masked_models(model):
        part.pruner.step(optimizer)


def names(model: Any) -> dict[int, str]:
    """Return what belongs to pruning and not to the network: names by the variables' ids."""
    found: dict[int, str] = {}
    for wrapper in wrappers.wrapped_layers(model):
        inner = {id(variable) for variable in wrapper.layer.weights}
        found |= {id(v): v.name for v in wrapper.weights if id(v) not in inner}
    for part in masked.masked_models(model):
        found |= {id(v): v.name for v in part.pruning_state.weights}
    return found
