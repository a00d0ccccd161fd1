r"""What becomes of channels on their way through a network, one small class per kind of step.

Two facts are followed for each channel of each tensor. Forwards, its constant: the value that it
has at every position, whatever the input (NaN if there is none). Backwards, whether its value is
needed: whether something that counts would change with it. A third, `ties`, says which channels of
inputs and outputs can only be removed together.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tscnc_tf.pruning.compaction.graph import Call, Tensor

Channels = np.ndarray  # one value per channel: floats (constants, NaN: unknown) or booleans


@dataclasses.dataclass(eq=False)
class Fate:
    """What becomes of the channels of each tensor.

    Attributes:
        constants: the value that each channel has for every input, or NaN.
        keeps: which channels stay.
    """

    constants: dict[Tensor, Channels]
    keeps: dict[Tensor, Channels]


class Edit(NamedTuple):
    """What a layer is to have: entries of its configuration, weights by their attributes."""

    config: dict[str, Any]
    weights: dict[str, np.ndarray]


class Tie(NamedTuple):
    """Channel `source` of input number `position` and channel `target` of the output are one."""

    position: int
    source: np.ndarray
    target: np.ndarray


@dataclasses.dataclass(eq=False)
class Step:
    """One step of the network; a layer may be several, a convolution and its activation.

    Attributes:
        call: the use of a layer that it is part of.
        inputs, outputs: the tensors.
        obstacle: why channels that it holds back have to stay.
    """

    call: Call
    inputs: list[Tensor]
    outputs: list[Tensor]
    obstacle: str = ""

    def ties(self) -> Iterator[Tie]:
        """Yield which channels are one. Without ties, inputs and outputs part."""
        yield from ()


class Barrier(Step):
    """Whatever is not understood, and the model's own inputs and outputs: channels stay."""


class Operation(Step, abc.ABC):
    """A step that is understood; it has one output."""

    @property
    def output(self) -> Tensor:
        """The only output."""
        return self.outputs[0]

    @abc.abstractmethod
    def constants(self, given: list[Channels]) -> Channels:
        """Return the constants of the output, from those of the inputs."""

    def needed(self, wanted: Channels, given: list[Channels]) -> list[Channels]:
        """Return which values of each input are needed.

        Args:
            wanted: which values of the output are needed and no constants.
            given: the constants of the inputs.
        """
        return [wanted] * len(given)

    def ties(self) -> Iterator[Tie]:
        """Yield which channels are one: as a rule, each of an input and the same of the output."""
        for position in range(len(self.inputs)):
            every = np.arange(self.output.channels)
            yield Tie(position, every, every)


class Sized(Operation):
    """An operation whose layer has weights or arguments that go by the number of channels."""

    @abc.abstractmethod
    def edit(self, fate: Fate) -> Edit:
        """Return what the layer has without the channels that are not kept: all its weights."""


@dataclasses.dataclass(eq=False)
class Elementwise(Operation):
    """The same function of each entry: activations, rescaling. It is evaluated on constants."""

    function: Callable[[np.ndarray], np.ndarray] = np.asarray

    def constants(self, given: list[Channels]) -> Channels:
        """Return the function of each constant."""
        known = np.isfinite(given[0])
        result = np.full(known.shape, np.nan)
        if known.any():
            result[known] = self.function(given[0][known])
        return result


@dataclasses.dataclass(eq=False)
class Rearrangement(Sized):
    """Pooling, padding, flattening and the like: values move, and channels keep theirs.

    Attributes:
        places: the input channel of each output channel; None if they are the same.
        pads: whether zeros come in, so that no constant but zero stays one.
        shape_argument: what the layer's configuration calls the shape of its output, if it has one.
    """

    places: np.ndarray | None = None
    pads: bool = False
    shape_argument: str = ""

    def __post_init__(self) -> None:
        every = np.arange(self.output.channels)
        self._places = every if self.places is None else self.places

    def constants(self, given: list[Channels]) -> Channels:
        """Return the constants at their new places."""
        moved = given[0][self._places]
        return np.where(moved == 0, moved, np.nan) if self.pads else moved

    def needed(self, wanted: Channels, given: list[Channels]) -> list[Channels]:
        """Return the channels that are needed at some place."""
        return [np.bincount(self._places[wanted], minlength=given[0].size) > 0]

    def ties(self) -> Iterator[Tie]:
        """Yield each channel with all its places."""
        yield Tie(0, self._places, np.arange(self.output.channels))

    def edit(self, fate: Fate) -> Edit:
        """Return the smaller shape, if the layer names one."""
        kept = fate.keeps[self.output]
        if not self.shape_argument or kept.all():
            return Edit({}, {})
        shape = list(self.call.layer.get_config()[self.shape_argument])
        shape[-1] = int(kept.sum()) if shape[-1] != -1 else -1
        return Edit({self.shape_argument: tuple(shape)}, {})


@dataclasses.dataclass(eq=False)
class Combination(Operation):
    """Add, multiply, ... channel by channel: every branch loses a channel, or none does.

    Attributes:
        function: of two vectors of constants; folded over the inputs.
        mean: whether the result is divided by the number of inputs.
        absorbs: whether one zero makes the result zero, whatever the others are.
    """

    function: Callable[[Any, Any], Any] = np.add
    mean: bool = False
    absorbs: bool = False

    def constants(self, given: list[Channels]) -> Channels:
        """Return what the constants of all branches give together."""
        result = given[0]
        for more in given[1:]:
            result = self.function(result, more)
        if self.absorbs:
            result = np.where(np.any([vector == 0 for vector in given], axis=0), 0.0, result)
        return result / len(given) if self.mean else result


@dataclasses.dataclass(eq=False)
class Concatenation(Operation):
    """Channels of several tensors, one after the other."""

    def constants(self, given: list[Channels]) -> Channels:
        """Return the constants of all inputs."""
        return np.concatenate(given)

    def needed(self, wanted: Channels, given: list[Channels]) -> list[Channels]:
        """Return the part of each input."""
        return np.split(wanted, np.cumsum([vector.size for vector in given])[:-1])

    def ties(self) -> Iterator[Tie]:
        """Yield each channel with its place behind those of the inputs before."""
        start = 0
        for position, tensor in enumerate(self.inputs):
            every = np.arange(tensor.channels)
            yield Tie(position, every, every + start)
            start += tensor.channels
