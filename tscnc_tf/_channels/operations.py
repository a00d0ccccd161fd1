r"""The operations of a network, and their effects on channels.

Two properties of each channel of each tensor are propagated. Forwards, its constant: its value at
every position for any input of the model (NaN if it is not constant). Backwards, whether it is
needed: whether an output depends on it other than as a constant. In addition, `ties` tells which
channels of inputs and outputs can only be removed together.
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
    """The kept channels of each tensor.

    Attributes:
        constants: the constant of each channel, NaN if it is not constant.
        keeps: masks, True for kept channels.
    """

    constants: dict[Tensor, Channels]
    keeps: dict[Tensor, Channels]


class Edit(NamedTuple):
    """Changes of a layer: entries of its configuration, and weights by their attributes."""

    config: dict[str, Any]
    weights: dict[str, np.ndarray]

    def __or__(self, other: Edit) -> Edit:
        return Edit(self.config | other.config, self.weights | other.weights)


class Tie(NamedTuple):
    """Channels that can only be removed together.

    Attributes:
        position: the number of the input.
        source: indices of its channels.
        target: indices of the output's channels, each tied to the entry of `source`.
    """

    position: int
    source: np.ndarray
    target: np.ndarray


@dataclasses.dataclass(eq=False)
class Step:
    """One step of the network; a layer may consist of several, such as convolution and activation.

    Attributes:
        call: the call of a layer that it is a part of.
        inputs, outputs: the tensors.
        obstacle: the reason for channels that must be kept because of this step.
    """

    call: Call
    inputs: list[Tensor]
    outputs: list[Tensor]
    obstacle: str = ""

    def ties(self) -> Iterator[Tie]:
        """Yield the ties of channels; without any, inputs and outputs are independent."""
        yield from ()

    def edit(self, plan: ChannelPlan) -> Edit:  # noqa: ARG002
        """Return the changes of the layer when only kept channels are left."""
        return Edit({}, {})


class Barrier(Step):
    """An unknown step, or the model's inputs and outputs: all channels are kept."""


class Followed(Step, abc.ABC):
    """A step with one output, whose channels depend on the inputs in a known way."""

    @abc.abstractmethod
    def constants(self, given: list[Channels]) -> Channels:
        """Return the constants of the output's channels, from those of the inputs."""

    def needed(self, wanted: Channels, given: list[Channels]) -> list[Channels]:
        """Return masks of the needed channels of each input.

        Args:
            wanted: mask of the output's channels that are needed and not constant.
            given: the constants of the inputs.
        """
        return [wanted] * len(given)


class Scaling(Barrier, Followed):
    """A fixed function of each channel, different for each; all channels are kept."""

    def constants(self, given: list[Channels]) -> Channels:
        """Return NaN for channels that are not constant, else 0."""
        return np.where(np.isnan(given[0]), np.nan, 0.0)


class Mixing(Barrier, Followed):
    """An activation in which each channel depends on all, such as softmax; all are kept."""

    def constants(self, given: list[Channels]) -> Channels:
        """Return NaN for all channels if any is not constant, else 0."""
        return np.full(given[0].shape, np.nan if np.isnan(given[0]).any() else 0.0)

    def needed(self, wanted: Channels, given: list[Channels]) -> list[Channels]:
        """Return all channels if any is wanted."""
        return [np.full(given[0].shape, bool(wanted.any()))]


class Operation(Followed):
    """A step whose channels can be removed."""

    @property
    def output(self) -> Tensor:
        """The only output."""
        return self.outputs[0]

    @property
    def form(self) -> str:
        """The reason why `completed` adds channels, for messages."""
        return ""

    def completed(self, held: list[Channels]) -> list[Channels]:
        """Return `held` with the channels that a Keras layer needs, such as groups of equal size.

        Args:
            held: masks of the kept channels of the inputs, followed by that of the output.
        """
        return held

    def ties(self) -> Iterator[Tie]:
        """Yield the ties: by default, each channel of an input with the same of the output."""
        for position in range(len(self.inputs)):
            every = np.arange(self.output.channels)
            yield Tie(position, every, every)


@dataclasses.dataclass(eq=False, kw_only=True)
class Elementwise(Operation):
    """The same function of each entry: activations, rescaling.

    Attributes:
        function: the function of a tensor, in the output's dtype; it is evaluated on constants.
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
    """Pooling, padding, flattening and the like: values move within their channels.

    Attributes:
        places: the input channel of each output channel; None if they are the same.
        pads: whether zeros are added, so that only the constant 0 stays constant.
        shape_argument: the key of the output's shape in the layer's configuration; "" for none.
    """

    places: np.ndarray | None = None
    pads: bool = False
    shape_argument: str = ""

    def __post_init__(self) -> None:
        every = np.arange(self.output.channels)
        self._places = every if self.places is None else self.places

    def constants(self, given: list[Channels]) -> Channels:
        """Return the constants of the output's channels."""
        moved = given[0][self._places]
        return np.where(moved == 0, moved, np.nan) if self.pads else moved

    def needed(self, wanted: Channels, given: list[Channels]) -> list[Channels]:
        """Return the channels with a needed output channel."""
        return [np.bincount(self._places[wanted], minlength=given[0].size) > 0]

    def ties(self) -> Iterator[Tie]:
        """Yield each input channel with all its output channels."""
        yield Tie(0, self._places, np.arange(self.output.channels))

    def edit(self, plan: ChannelPlan) -> Edit:
        """Return the smaller shape, if the layer's configuration has one."""
        kept = plan.keeps[self.output]
        if not self.shape_argument or kept.all():
            return Edit({}, {})
        shape = list(self.call.layer.get_config()[self.shape_argument])
        if shape[-1] not in (-1, 1, None):
            shape[-1] = int(kept.sum())
        return Edit({self.shape_argument: tuple(shape)}, {})


@dataclasses.dataclass(eq=False, kw_only=True)
class Combination(Operation):
    """A channelwise sum, product, ...: a channel is removed from all branches or from none.

    Attributes:
        function: of two vectors of constants; folded over the inputs.
        mean: whether the result is divided by the number of inputs.
        absorbs: whether the result is zero if one input is, as for a product.
    """

    function: Callable[[Any, Any], Any]
    mean: bool = False
    absorbs: bool = False

    def constants(self, given: list[Channels]) -> Channels:
        """Return the combined constants of all branches."""
        result = given[0]
        for more in given[1:]:
            result = self.function(result, more)
        if self.absorbs:
            result = np.where(np.any([vector == 0 for vector in given], axis=0), 0.0, result)
        return result / len(given) if self.mean else result


class Concatenation(Operation):
    """Concatenation of several tensors along the channels."""

    def constants(self, given: list[Channels]) -> Channels:
        """Return the concatenated constants of all inputs."""
        return np.concatenate(given)

    def needed(self, wanted: Channels, given: list[Channels]) -> list[Channels]:
        """Return the slice of each input."""
        return np.split(wanted, np.cumsum([vector.size for vector in given])[:-1])

    def ties(self) -> Iterator[Tie]:
        """Yield each channel with its index in the concatenation."""
        start = 0
        for position, tensor in enumerate(self.inputs):
            every = np.arange(tensor.channels)
            yield Tie(position, every, every + start)
            start += tensor.channels


@dataclasses.dataclass(eq=False, kw_only=True)
class _Weighted(Operation):
    """An operation with a kernel.

    Attributes:
        attribute, kernel: the layer's name for the kernel, and its values; "part.kernel" for the
            kernel of a nested layer.
        bias: the bias, or None.
        bias_attribute: the layer's name for the bias.
        folds: whether a constant c of an input channel adds c · Σ kernel at every position. With
            zero padding it does so only for c = 0.
        counts: whether its outputs are filters of the layer, not an intermediate result.
    """

    attribute: str
    kernel: np.ndarray
    bias: np.ndarray | None
    bias_attribute: str = "bias"
    folds: bool = True
    counts: bool = True

    @property
    def taps(self) -> tuple[int, ...]:
        """The spatial axes of the kernel."""
        return tuple(range(self.kernel.ndim - 2))

    def foldable(self, constants: Channels) -> Channels:
        """Return a mask of the inputs whose constants can be folded into the bias."""
        return np.isfinite(constants) & (self.folds | (constants == 0))

    def biased(self, value: Channels) -> Channels:
        """Return the values of the outputs with the bias added."""
        return value if self.bias is None else value + self.bias.astype(np.float64)


@dataclasses.dataclass(eq=False, kw_only=True)
class Linear(_Weighted):
    """A dense layer or convolution, which may fold constant inputs into its bias.

    Its kernel has the shape (taps..., in, out), or (taps..., out, in) if `transposed`.

    Attributes:
        size: the key of the number of outputs in the layer's configuration.
        transposed: whether it is a transposed convolution.
    """

    size: str
    transposed: bool = False

    def __post_init__(self) -> None:
        self.reads = self._by_channel((self._forwards() != 0).any(axis=self.taps))

    def _forwards(self) -> np.ndarray:
        return np.swapaxes(self.kernel, -1, -2) if self.transposed else self.kernel

    def _by_channel(self, entries: np.ndarray) -> np.ndarray:
        """Return a matrix (inputs, outputs) from a matrix of the kernel's last two axes."""
        return entries

    def _sums(self, rows: np.ndarray) -> np.ndarray:
        """Return the kernel summed over the taps, for some inputs and all outputs."""
        return self._forwards()[..., rows, :].astype(np.float64).sum(self.taps)

    def _folded(self, constants: Channels, chosen: Channels) -> Channels:
        """Return the sum that the chosen constant input channels add to the outputs."""
        rows = np.flatnonzero(chosen & np.isfinite(constants) & (constants != 0))
        return constants[rows] @ self._sums(rows)

    def between(self, inputs: Channels, outputs: Channels) -> int:
        """Return the number of non-zero weights from these inputs to these outputs."""
        return int(np.count_nonzero(self._forwards()[..., inputs, :][..., outputs]))

    def constants(self, given: list[Channels]) -> Channels:
        """Return b + Σ c · kernel for filters whose inputs are all foldable constants, else NaN."""
        foldable = self.foldable(given[0])
        value = self.biased(self._folded(given[0], foldable))
        return np.where(self.reads[~foldable].any(axis=0), np.nan, value)

    def needed(self, wanted: Channels, given: list[Channels]) -> list[Channels]:
        """Return the inputs that wanted filters read and that can't be folded."""
        return [self.reads[:, wanted].any(axis=1) & ~self.foldable(given[0])]

    def ties(self) -> Iterator[Tie]:
        """Yield nothing: inputs and filters are removed independently."""
        yield from ()

    def _kept_kernel(self, plan: ChannelPlan) -> np.ndarray:
        """Return the kernel of the kept inputs and outputs, in the layer's layout."""
        rows, columns = plan.keeps[self.inputs[0]], plan.keeps[self.output]
        kernel = self._forwards()[..., rows, :][..., columns]
        return np.swapaxes(kernel, -1, -2) if self.transposed else kernel

    def _kept_bias(self, bias: Channels, plan: ChannelPlan) -> np.ndarray:  # noqa: ARG002
        """Return the bias of the kept outputs, in the layer's layout."""
        return bias

    def _sizes(self, plan: ChannelPlan) -> dict[str, Any]:
        """Return the entries of the configuration for the kept inputs and outputs."""
        return {self.size: int(plan.keeps[self.output].sum())}

    def _added(self, plan: ChannelPlan) -> Channels:
        """Return the sum that the removed channels added to the kept outputs."""
        # Removed channels are unread or constant; kept constants still add their part themselves.
        given, gone = plan.constants[self.inputs[0]], ~plan.keeps[self.inputs[0]]
        return self._folded(given, gone & self.foldable(given))[plan.keeps[self.output]]

    def _gets_bias(self, plan: ChannelPlan) -> bool:
        """Return whether the layer needs a bias and has none."""
        return self.bias is None and bool(self._added(plan).any())

    def edit(self, plan: ChannelPlan) -> Edit:
        """Return the kept rows and columns, and the bias including folded constants."""
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
    """A grouped convolution: kept groups have equal sizes, and unused groups are removed.

    Its kernel has the shape (taps..., in / groups, out), with the outputs ordered by group.

    Attributes:
        groups: the number of groups.
    """

    groups: int

    def _by_channel(self, entries: np.ndarray) -> np.ndarray:
        """Return a matrix (inputs, outputs), 0 between different groups."""
        size, outputs = entries.shape
        result = np.zeros((self.groups, size, self.groups, outputs // self.groups), entries.dtype)
        every = np.arange(self.groups)
        result[every, :, every] = np.moveaxis(entries.reshape(size, self.groups, -1), 1, 0)
        return result.reshape(self.groups * size, outputs)

    def _sums(self, rows: np.ndarray) -> np.ndarray:
        return self._by_channel(self.kernel.astype(np.float64).sum(self.taps))[rows]

    def between(self, inputs: Channels, outputs: Channels) -> int:
        """Return the number of non-zero weights from these inputs to these outputs."""
        counts = self._by_channel(np.count_nonzero(self.kernel, axis=self.taps))
        return int(counts[inputs][:, outputs].sum())

    @property
    def form(self) -> str:
        """Why `completed` adds channels."""
        return f"{self.call.name!r} has groups of equal size"

    def completed(self, held: list[Channels]) -> list[Channels]:
        """Return equal numbers of inputs, and of outputs, in each group that is kept in part."""
        rows, columns = (side.reshape(self.groups, -1) for side in held)
        alive = np.any(np.concatenate([rows, columns], axis=1), axis=1)
        return [filled(side, alive).reshape(-1) for side in (rows, columns)]

    def _by_group(self, kept: Channels) -> list[np.ndarray]:
        """Return the indices of the kept channels within each group."""
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
    """Return `held` with the first free columns set, so that chosen rows have equal sums.

    Args:
        held: a boolean matrix; rows that are not chosen are all False.
        chosen: a mask of rows, which get at least one column.
    """
    counts = held.sum(axis=1)
    missing = max(1, counts.max()) - counts
    return held | (chosen[:, np.newaxis] & (np.cumsum(~held, axis=1) <= missing[:, np.newaxis]))


@dataclasses.dataclass(eq=False, kw_only=True)
class Depthwise(_Weighted):
    """A depthwise convolution: a channel can only be removed with all of its filters.

    Its kernel has the shape (taps..., in, multiplier), its bias (in · multiplier,).
    """

    def __post_init__(self) -> None:
        self.multiplier = self.kernel.shape[-1]
        self.reads = (self.kernel != 0).any(axis=self.taps).reshape(-1)

    def between(self, inputs: Channels, outputs: Channels) -> int:
        """Return the number of non-zero weights from these inputs to these outputs."""
        counts = np.count_nonzero(self.kernel, axis=self.taps)
        return int(counts[inputs[:, np.newaxis] & outputs.reshape(counts.shape)].sum())

    def constants(self, given: list[Channels]) -> Channels:
        """Return b + c Σ kernel for foldable constants c, else NaN where the kernel is not 0."""
        inputs = np.repeat(given[0], self.multiplier)
        foldable = self.foldable(inputs)
        sums = self.kernel.astype(np.float64).sum(axis=self.taps).reshape(-1)
        value = self.biased(np.where(self.reads & foldable, inputs, 0.0) * sums)
        return np.where(self.reads & ~foldable, np.nan, value)

    def needed(self, wanted: Channels, given: list[Channels]) -> list[Channels]:
        """Return the channels with a wanted filter that is not zero."""
        return [(wanted & self.reads).reshape(given[0].size, self.multiplier).any(axis=1)]

    def ties(self) -> Iterator[Tie]:
        """Yield each channel with all its filters."""
        every = np.arange(self.output.channels)
        yield Tie(0, every // self.multiplier, every)

    def edit(self, plan: ChannelPlan) -> Edit:
        """Return the kernel and bias of the kept channels."""
        kept = plan.keeps[self.inputs[0]]
        weights = {self.attribute: self.kernel[..., kept, :]}
        if self.bias is not None:
            weights["bias"] = self.bias[np.repeat(kept, self.multiplier)]
        return Edit({}, weights)


@dataclasses.dataclass(eq=False, kw_only=True)
class Normalisation(Operation):
    r"""Batch normalisation in inference: :math:`γ (x - μ) / \sqrt{σ² + ε} + β`.

    Attributes:
        weights: the vectors, by the layer's names for them.
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
        """Return the normalised constants; β for any input if γ = 0."""
        value = (given[0] - self._mean) * self._scale + self._offset
        return np.where(self._scale == 0, self._offset, value)

    def edit(self, plan: ChannelPlan) -> Edit:
        """Return the entries of the kept channels."""
        kept = plan.keeps[self.inputs[0]]
        return Edit({}, {name: value[kept] for name, value in self.weights.items()})
