r"""The operations that a network consists of, and what each does to channels.

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
import tensorflow as tf

from tscnc_tf._channels.graph import Call, Tensor

Channels = np.ndarray  # one value per channel: floats (constants, NaN: unknown) or booleans


class ChannelPlan(NamedTuple):
    """Which channels of each tensor stay.

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

    def __or__(self, other: Edit) -> Edit:
        return Edit(self.config | other.config, self.weights | other.weights)


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
        obstacle: why channels that it retains have to stay.
    """

    call: Call
    inputs: list[Tensor]
    outputs: list[Tensor]
    obstacle: str = ""

    def ties(self) -> Iterator[Tie]:
        """Yield which channels are one. Without ties, inputs and outputs part."""
        yield from ()

    def edit(self, plan: ChannelPlan) -> Edit:  # noqa: ARG002
        """Return what the layer has without the channels that are not kept: all that changes."""
        return Edit({}, {})


class Barrier(Step):
    """Whatever is not understood, and the model's own inputs and outputs: channels stay."""


class Followed(Step, abc.ABC):
    """A step of which it is known how the channels of its one output depend on its inputs."""

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


class Scaling(Barrier, Followed):
    """A fixed function of each channel by itself, another one for each; channels stay."""

    def constants(self, given: list[Channels]) -> Channels:
        """Return no constants where the channel is none."""
        return np.where(np.isnan(given[0]), np.nan, 0.0)


class Mixing(Barrier, Followed):
    """An activation in which each channel depends on all, such as softmax; channels stay."""

    def constants(self, given: list[Channels]) -> Channels:
        """Return no constants where any channel is none."""
        return np.full(given[0].shape, np.nan if np.isnan(given[0]).any() else 0.0)

    def needed(self, wanted: Channels, given: list[Channels]) -> list[Channels]:
        """Return all channels if any is wanted."""
        return [np.full(given[0].shape, bool(wanted.any()))]


class Operation(Followed):
    """A step that is understood, whose channels can be removed."""

    @property
    def output(self) -> Tensor:
        """The only output."""
        return self.outputs[0]

    @property
    def form(self) -> str:
        """Why `completed` adds channels."""
        return ""

    def completed(self, held: list[Channels]) -> list[Channels]:
        """Return which channels have to stay so that Keras has such a layer, groups of one size.

        Args:
            held: which channels of the inputs, and after them of the output, stay otherwise.
        """
        return held

    def ties(self) -> Iterator[Tie]:
        """Yield which channels are one: as a rule, each of an input and the same of the output."""
        for position in range(len(self.inputs)):
            every = np.arange(self.output.channels)
            yield Tie(position, every, every)


@dataclasses.dataclass(eq=False, kw_only=True)
class Elementwise(Operation):
    """The same function of each entry: activations, rescaling. It is evaluated on constants.

    Attributes:
        function: of a tensor; it computes in the dtype of the output.
    """

    function: Callable[[tf.Tensor], tf.Tensor]

    def constants(self, given: list[Channels]) -> Channels:
        """Return the function of each constant."""
        known = np.isfinite(given[0])
        result = np.full(known.shape, np.nan)
        if known.any():
            row = tf.cast(tf.constant(given[0][known][None]), self.output.dtype)
            result[known] = tf.cast(self.function(row), tf.float64)[0]
        return result


@dataclasses.dataclass(eq=False, kw_only=True)
class Rearrangement(Operation):
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

    def edit(self, plan: ChannelPlan) -> Edit:
        """Return the smaller shape, if the layer names one."""
        kept = plan.keeps[self.output]
        if not self.shape_argument or kept.all():
            return Edit({}, {})
        shape = list(self.call.layer.get_config()[self.shape_argument])
        shape[-1] = int(kept.sum()) if shape[-1] != -1 else -1
        return Edit({self.shape_argument: tuple(shape)}, {})


@dataclasses.dataclass(eq=False, kw_only=True)
class Combination(Operation):
    """Add, multiply, ... channel by channel: every branch loses a channel, or none does.

    Attributes:
        function: of two vectors of constants; folded over the inputs.
        mean: whether the result is divided by the number of inputs.
        absorbs: whether one zero makes the result zero, whatever the others are.
    """

    function: Callable[[Any, Any], Any]
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


@dataclasses.dataclass(eq=False, kw_only=True)
class _Weighted(Operation):
    """An operation with a kernel.

    Attributes:
        attribute, kernel: the kernel and the layer's name for it; "part.kernel" if a layer inside
            of the layer has it.
        bias: or None.
        bias_attribute: the layer's name for it.
        folds: whether a constant c of an input channel adds the same c · Σ kernel everywhere.
            With zeros around the input it does not, unless c = 0.
        counts: whether its outputs are filters of the layer, and not only something in between.
    """

    attribute: str
    kernel: np.ndarray
    bias: np.ndarray | None
    bias_attribute: str = "bias"
    folds: bool = True
    counts: bool = True

    @property
    def taps(self) -> tuple[int, ...]:
        """The axes of positions of the kernel."""
        return tuple(range(self.kernel.ndim - 2))

    def foldable(self, constants: Channels) -> Channels:
        """Return which inputs have constants that fold into the bias."""
        return np.isfinite(constants) & (self.folds | (constants == 0))

    def biased(self, value: Channels) -> Channels:
        """Return values of the outputs with the bias added."""
        return value if self.bias is None else value + self.bias.astype(np.float64)


@dataclasses.dataclass(eq=False, kw_only=True)
class Linear(_Weighted):
    """A dense layer or convolution: reads some channels, makes others, and may fold constants.

    Its kernel is (taps..., in, out), or (taps..., out, in) if `transposed`.

    Attributes:
        size: what the layer's configuration calls the number of outputs.
        transposed: see above.
    """

    size: str
    transposed: bool = False

    def __post_init__(self) -> None:
        self.reads = self._by_channel((self._forwards() != 0).any(axis=self.taps))

    def _forwards(self) -> np.ndarray:
        return np.swapaxes(self.kernel, -1, -2) if self.transposed else self.kernel

    def _by_channel(self, entries: np.ndarray) -> np.ndarray:
        """Return entries for each input and output, from entries for the kernel's last two axes."""
        return entries

    def _sums(self, rows: np.ndarray) -> np.ndarray:
        """Return the sums over the taps for some inputs and all outputs."""
        return self._forwards()[..., rows, :].astype(np.float64).sum(self.taps)

    def _folded(self, constants: Channels, chosen: Channels) -> Channels:
        """Return what the chosen input channels add to the outputs, all being constants."""
        rows = np.flatnonzero(chosen & np.isfinite(constants) & (constants != 0))
        return constants[rows] @ self._sums(rows)

    def between(self, inputs: Channels, outputs: Channels) -> int:
        """Return how many weights that are not zero lead from these inputs to these outputs."""
        return int(np.count_nonzero(self._forwards()[..., inputs, :][..., outputs]))

    def constants(self, given: list[Channels]) -> Channels:
        """Return b + Σ c over the taps where no filter reads anything but foldable constants."""
        foldable = self.foldable(given[0])
        value = self.biased(self._folded(given[0], foldable))
        return np.where(self.reads[~foldable].any(axis=0), np.nan, value)

    def needed(self, wanted: Channels, given: list[Channels]) -> list[Channels]:
        """Return which inputs the wanted filters read, and can not fold."""
        return [self.reads[:, wanted].any(axis=1) & ~self.foldable(given[0])]

    def ties(self) -> Iterator[Tie]:
        """Yield nothing: inputs and filters go each by themselves."""
        yield from ()

    def _kept_kernel(self, plan: ChannelPlan) -> np.ndarray:
        """Return the kernel for the inputs and outputs that stay, of the shape that it has."""
        rows, columns = plan.keeps[self.inputs[0]], plan.keeps[self.output]
        kernel = self._forwards()[..., rows, :][..., columns]
        return np.swapaxes(kernel, -1, -2) if self.transposed else kernel

    def _kept_bias(self, bias: Channels, plan: ChannelPlan) -> np.ndarray:  # noqa: ARG002
        """Return the bias of the outputs that stay, of the shape that it has."""
        return bias

    def _sizes(self, plan: ChannelPlan) -> dict[str, Any]:
        """Return the configuration for the inputs and outputs that stay."""
        return {self.size: int(plan.keeps[self.output].sum())}

    def _added(self, plan: ChannelPlan) -> Channels:
        """Return what the inputs that go have added to the outputs that stay."""
        # What is removed is unread, or constant; of a constant that stays nothing is to be added.
        given, gone = plan.constants[self.inputs[0]], ~plan.keeps[self.inputs[0]]
        return self._folded(given, gone & self.foldable(given))[plan.keeps[self.output]]

    def _gets_bias(self, plan: ChannelPlan) -> bool:
        """Tell whether the layer needs a bias, and has none."""
        return self.bias is None and bool(self._added(plan).any())

    def edit(self, plan: ChannelPlan) -> Edit:
        """Return the rows and columns that stay, and the bias with what the others added."""
        config, added = self._sizes(plan), self._added(plan)
        weights = {self.attribute: self._kept_kernel(plan)}
        if self.bias is not None:
            bias = self.bias[plan.keeps[self.output]]
            shifted = (bias.astype(np.float64) + added).astype(bias.dtype)
            bias = np.where(added != 0, shifted, bias)
            weights[self.bias_attribute] = self._kept_bias(bias, plan)
        elif self._gets_bias(plan):
            config["use_bias"] = True
            weights[self.bias_attribute] = self._kept_bias(added.astype(self.kernel.dtype), plan)
        return Edit(config, weights)


@dataclasses.dataclass(eq=False, kw_only=True)
class Grouped(Linear):
    """A convolution in groups of channels: those that stay are of equal size, dead ones go whole.

    Its kernel is (taps..., in / groups, out), the outputs of one group after the other.

    Attributes:
        groups: the number of groups.
    """

    groups: int

    def _by_channel(self, entries: np.ndarray) -> np.ndarray:
        """Return entries for each input and output, 0 for those of different groups."""
        size, outputs = entries.shape
        result = np.zeros((self.groups, size, self.groups, outputs // self.groups), entries.dtype)
        every = np.arange(self.groups)
        result[every, :, every] = np.moveaxis(entries.reshape(size, self.groups, -1), 1, 0)
        return result.reshape(self.groups * size, outputs)

    def _sums(self, rows: np.ndarray) -> np.ndarray:
        return self._by_channel(self.kernel.astype(np.float64).sum(self.taps))[rows]

    def between(self, inputs: Channels, outputs: Channels) -> int:
        """Return how many weights that are not zero lead from these inputs to these outputs."""
        counts = self._by_channel(np.count_nonzero(self.kernel, axis=self.taps))
        return int(counts[inputs][:, outputs].sum())

    @property
    def form(self) -> str:
        """Why `completed` adds channels."""
        return f"{self.call.name!r} has groups of equal size"

    def completed(self, held: list[Channels]) -> list[Channels]:
        """Return as many inputs, and outputs, in each group of which anything stays."""
        rows, columns = (side.reshape(self.groups, -1) for side in held)
        alive = np.any(np.concatenate([rows, columns], axis=1), axis=1)
        return [filled(side, alive).reshape(-1) for side in (rows, columns)]

    def _by_group(self, kept: Channels) -> list[np.ndarray]:
        """Return the places in their group of the channels that stay, for each group."""
        return [np.flatnonzero(group) for group in kept.reshape(self.groups, -1)]

    def _kept_kernel(self, plan: ChannelPlan) -> np.ndarray:
        parts = [
            kernel[..., rows, :][..., columns]
            for kernel, rows, columns in zip(
                np.split(self.kernel, self.groups, axis=-1),
                self._by_group(plan.keeps[self.inputs[0]]),
                self._by_group(plan.keeps[self.output]),
                strict=True,
            )
            if columns.size
        ]
        return np.concatenate(parts, axis=-1)

    def _sizes(self, plan: ChannelPlan) -> dict[str, Any]:
        groups = sum(columns.size > 0 for columns in self._by_group(plan.keeps[self.output]))
        return super()._sizes(plan) | {"groups": groups}


def filled(held: np.ndarray, chosen: Channels) -> np.ndarray:
    """Return `held` with the first of the other columns, so that chosen rows have equally many.

    Args:
        held: booleans; a row that is not chosen has none.
        chosen: rows, which get one column at least.
    """
    counts = held.sum(axis=1)
    missing = max(1, counts.max()) - counts
    return held | (chosen[:, np.newaxis] & (np.cumsum(~held, axis=1) <= missing[:, np.newaxis]))


@dataclasses.dataclass(eq=False, kw_only=True)
class Depthwise(_Weighted):
    """A depthwise convolution: each channel has its own filters, and goes only with all of them.

    Its kernel is (taps..., in, multiplier), its bias (in · multiplier,).
    """

    def __post_init__(self) -> None:
        self.multiplier = self.kernel.shape[-1]
        self.reads = (self.kernel != 0).any(axis=self.taps).reshape(-1)

    def between(self, inputs: Channels, outputs: Channels) -> int:
        """Return how many weights that are not zero lead from these inputs to these outputs."""
        counts = np.count_nonzero(self.kernel, axis=self.taps)
        return int(counts[inputs[:, np.newaxis] & outputs.reshape(counts.shape)].sum())

    def constants(self, given: list[Channels]) -> Channels:
        """Return b + c Σ kernel, where no window reaches over the border."""
        inputs = np.repeat(given[0], self.multiplier)
        foldable = self.foldable(inputs)
        sums = self.kernel.astype(np.float64).sum(axis=self.taps).reshape(-1)
        value = self.biased(np.where(self.reads & foldable, inputs, 0.0) * sums)
        return np.where(self.reads & ~foldable, np.nan, value)

    def needed(self, wanted: Channels, given: list[Channels]) -> list[Channels]:
        """Return the channels of which a wanted filter is not zero."""
        return [(wanted & self.reads).reshape(given[0].size, self.multiplier).any(axis=1)]

    def ties(self) -> Iterator[Tie]:
        """Yield each channel with all its filters."""
        every = np.arange(self.output.channels)
        yield Tie(0, every // self.multiplier, every)

    def edit(self, plan: ChannelPlan) -> Edit:
        """Return the channels that stay, with their filters."""
        kept = plan.keeps[self.inputs[0]]
        weights = {self.attribute: self.kernel[..., kept, :]}
        if self.bias is not None:
            weights["bias"] = self.bias[np.repeat(kept, self.multiplier)]
        return Edit({}, weights)


@dataclasses.dataclass(eq=False, kw_only=True)
class Normalisation(Operation):
    r"""Batch normalisation in inference: :math:`γ (x - μ) / \sqrt{σ² + ε} + β`.

    Attributes:
        weights: the vectors by the layer's names for them.
        epsilon: ε.
    """

    weights: dict[str, np.ndarray]
    epsilon: float

    def __post_init__(self) -> None:
        vectors = {name: value.astype(np.float64) for name, value in self.weights.items()}
        self._scale = vectors.get("gamma", 1.0) / np.sqrt(vectors["moving_variance"] + self.epsilon)
        self._mean = vectors["moving_mean"]
        self._offset = vectors.get("beta", np.zeros_like(self._mean))

    def constants(self, given: list[Channels]) -> Channels:
        """Return the normalised constants; with γ = 0, that is β for any input."""
        value = (given[0] - self._mean) * self._scale + self._offset
        return np.where(self._scale == 0, self._offset, value)

    def edit(self, plan: ChannelPlan) -> Edit:
        """Return the entries of the channels that stay."""
        kept = plan.keeps[self.inputs[0]]
        return Edit({}, {name: value[kept] for name, value in self.weights.items()})
