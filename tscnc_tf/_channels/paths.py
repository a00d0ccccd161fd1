"""Which weights are on a path from the inputs of a network to its outputs, channel by channel."""

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
    """Why the paths of a model are not known, as the end of a sentence that begins with "as"."""


def weights_on_paths(model: Any) -> dict[int, int]:
    """Return how many weights of each kernel are on a path from an input to an output.

    A path leads through weights that are not zero. A channel is reached if a path from an input
    ends there; what biases and normalisation make of a channel that is not reached is a constant,
    and no path. A scale of 0 in normalisation ends all paths through its channel. Paths are those
    of channels: positions are not told apart, so that a weight which reads nothing but padding
    counts as if it read.

    Args:
        model: a built model of either Keras.

    Returns:
        The counts by the ids of the kernels' variables. Kernels that no path from an input reaches
        are left out.

    Raises:
        NotFollowedError: the model has no graph, or a layer that is not understood.
    """
    try:
        library = _keras.library("model", model)
        graph = unroll(library, model)
    except TypeError as error:
        raise NotFollowedError(f"{model.name!r} is a layer, and no model") from error
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
    """Return which channels of each tensor a path from an input leads to.

    By the analysis of constants: what depends on the inputs has no constant (NaN), and everything
    else counts as zero, which no bias, padding or activation is let to change.
    """
    found = {tensor: np.ones(tensor.channels, bool) for tensor in inputs}
    for step in steps:
        # A product with a branch that is not reached, a gate say, is still one with a constant.
        other = 1.0 if isinstance(step, Combination) else 0.0
        given = [np.where(found[tensor], np.nan, other) for tensor in step.inputs]
        with np.errstate(all="ignore"):
            found[step.outputs[0]] = np.isnan(step.constants(given))
    return found


def _wanted(
    outputs: list[Tensor], steps: list[Followed], reached: dict[Tensor, Channels]
) -> dict[Tensor, Channels]:
    """Return from which channels that are reached a path leads to an output."""
    found = {tensor: np.zeros(tensor.channels, bool) for tensor in reached}
    for tensor in outputs:
        found[tensor] = reached[tensor].copy()
    for step in reversed(steps):
        given = [np.full(tensor.channels, np.nan) for tensor in step.inputs]
        wanted = found[step.outputs[0]]
        for tensor, needed in zip(step.inputs, step.needed(wanted, given), strict=True):
            found[tensor] |= needed & reached[tensor]
    return found
