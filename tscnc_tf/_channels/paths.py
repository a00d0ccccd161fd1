"""Counts of the weights on paths from the inputs of a network to its outputs, by channels."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from tscnc_tf import _keras
from tscnc_tf._channels.graph import Tensor, unroll
from tscnc_tf._channels.layers import Reader
from tscnc_tf._channels.operations import (
    Channels,
    Combination,
    Depthwise,
    Followed,
    Linear,
)


class NotFollowedError(Exception):
    """The paths of a model are not known; the message is a clause to follow "as"."""


def weights_on_paths(model: Any) -> dict[int, int]:
    """Return the number of weights of each kernel that are on a path from an input to an output.

    A path leads through non-zero weights. A channel is reached if a path from an input ends there.
    Biases and normalisation give unreached channels a constant value, which is not a path, and a
    scale of 0 in normalisation ends all paths through its channel. Paths connect channels,
    regardless of positions: a weight that only ever multiplies padding counts as well.

    Args:
        model: a built model of either Keras.

    Returns:
        The counts by the ids of the kernels' variables. Kernels that no path from an input reaches
        are left out.

    Raises:
        NotFollowedError: the model has no graph, or a layer of unknown effect on channels.
    """
    try:
        library = _keras.library("model", model)
        graph = unroll(library, model)
    except TypeError as error:
        raise NotFollowedError(f"{model.name!r} is a layer, not a model") from error
    except ValueError as error:
        raise NotFollowedError(str(error).partition(":")[0]) from error
    steps = []
    for step in Reader(library, graph).operations():
        if not isinstance(step, Followed):
            raise NotFollowedError(step.obstacle)
        steps.append(step)
    reached = _reached(graph.inputs, steps)
    wanted = _wanted(graph.outputs, steps, reached)
    return {
        id(operator.attrgetter(step.attribute)(step.call.layer)): step.between(
            reached[step.inputs[0]], wanted[step.outputs[0]]
        )
        for step in steps
        if isinstance(step, Linear | Depthwise)
    }


def _reached(inputs: list[Tensor], steps: list[Followed]) -> dict[Tensor, Channels]:
    """Return masks of the channels of each tensor that a path from an input leads to.

    They come from the analysis of constants: channels that depend on the inputs are NaN, and all
    others are set to 0 before each step, so that biases, padding and activations have no effect.
    """
    found = {tensor: np.ones(tensor.channels, bool) for tensor in inputs}
    for step in steps:
        # In a product an unreached branch, such as a gate, counts as the constant 1, not 0.
        other = 1.0 if isinstance(step, Combination) else 0.0
        given = [np.where(found[tensor], np.nan, other) for tensor in step.inputs]
        with np.errstate(all="ignore"):
            found[step.outputs[0]] = np.isnan(step.constants(given))
    return found


def _wanted(
    outputs: list[Tensor], steps: list[Followed], reached: dict[Tensor, Channels]
) -> dict[Tensor, Channels]:
    """Return masks of the reached channels from which a path leads to an output."""
    found = {tensor: np.zeros(tensor.channels, bool) for tensor in reached}
    for tensor in outputs:
        found[tensor] = reached[tensor].copy()
    for step in reversed(steps):
        given = [np.full(tensor.channels, np.nan) for tensor in step.inputs]
        wanted = found[step.outputs[0]]
        for tensor, needed in zip(step.inputs, step.needed(wanted, given), strict=True):
            found[tensor] |= needed & reached[tensor]
    return found
