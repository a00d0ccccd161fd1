"""Operations with weights: convolutions, dense layers, batch normalisation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from tscnc_tf.pruning.compaction.operations import Channels, Edit, Fate, Sized, Tie


@dataclasses.dataclass(eq=False)
class Linear(Sized):
    """A dense layer or convolution: reads some channels, makes others, and may fold constants.

    Attributes:
        attribute, kernel: the kernel and the layer's name for it; (taps..., in, out), or
            (taps..., out, in) if `transposed`.
        bias: or None.
        size: what the layer's configuration calls the number of outputs.
        folds: whether a constant c of an input channel adds the same c · Σ kernel everywhere.
            With zeros around the input it does not, unless c = 0.
    """

    attribute: str = "kernel"
    kernel: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))
    bias: np.ndarray | None = None
    size: str = "units"
    folds: bool = True
    transposed: bool = False

    def __post_init__(self) -> None:
        self.reads = (self._forwards() != 0).any(axis=tuple(range(self.kernel.ndim - 2)))

    def _forwards(self) -> np.ndarray:
        return np.swapaxes(self.kernel, -1, -2) if self.transposed else self.kernel

    def _foldable(self, constants: Channels) -> Channels:
        return np.isfinite(constants) & (self.folds | (constants == 0))

    def _folded(self, constants: Channels, chosen: Channels) -> Channels:
        """Return what the chosen input channels add to the outputs, all being constants."""
        rows = np.flatnonzero(chosen & np.isfinite(constants) & (constants != 0))
        taps = tuple(range(self.kernel.ndim - 2))
        sums = self._forwards()[..., rows, :].astype(np.float64).sum(axis=taps)
        return constants[rows] @ sums

    def constants(self, given: list[Channels]) -> Channels:
        """Return b + Σ c over the taps where no filter reads anything but foldable constants."""
        foldable = self._foldable(given[0])
        value = self._folded(given[0], foldable)
        if self.bias is not None:
            value = value + self.bias.astype(np.float64)
        return np.where(self.reads[~foldable].any(axis=0), np.nan, value)

    def needed(self, wanted: Channels, given: list[Channels]) -> list[Channels]:
        """Return which inputs the wanted filters read, and can not fold."""
        return [self.reads[:, wanted].any(axis=1) & ~self._foldable(given[0])]

    def ties(self) -> Iterator[Tie]:
        """Yield nothing: inputs and filters go each by themselves."""
        yield from ()

    def edit(self, fate: Fate) -> Edit:
        """Return the rows and columns that stay, and the bias with what the others added."""
        rows, columns = fate.keeps[self.inputs[0]], fate.keeps[self.output]
        kernel = self._forwards()[..., rows, :][..., columns]
        kernel = np.swapaxes(kernel, -1, -2) if self.transposed else kernel
        config: dict[str, Any] = {self.size: int(columns.sum())}
        weights = {self.attribute: kernel}
        # What is removed is unread, or constant; of a constant that stays nothing is to be added.
        given = fate.constants[self.inputs[0]]
        added = self._folded(given, ~rows & self._foldable(given))[columns]
        if self.bias is not None:
            bias = self.bias[columns]
            shifted = (bias.astype(np.float64) + added).astype(bias.dtype)
            weights["bias"] = np.where(added != 0, shifted, bias)
        elif added.any():
            config["use_bias"] = True
            weights["bias"] = added.astype(self.kernel.dtype)
        return Edit(config, weights)


@dataclasses.dataclass(eq=False)
class Depthwise(Sized):
    """A depthwise convolution: each channel has its own filters, and goes only with all of them.

    Attributes:
        attribute, kernel: the kernel and the layer's name for it; (taps..., in, multiplier).
        bias: or None; (in · multiplier,).
        folds: as for `Linear`.
    """

    attribute: str = "kernel"
    kernel: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))
    bias: np.ndarray | None = None
    folds: bool = True

    def __post_init__(self) -> None:
        self.multiplier = self.kernel.shape[-1]
        self._taps = tuple(range(self.kernel.ndim - 2))
        self.reads = (self.kernel != 0).any(axis=self._taps).reshape(-1)

    def constants(self, given: list[Channels]) -> Channels:
        """Return b + c Σ kernel, where there is no border to be seen."""
        inputs = np.repeat(given[0], self.multiplier)
        foldable = np.isfinite(inputs) & (self.folds | (inputs == 0))
        sums = self.kernel.astype(np.float64).sum(axis=self._taps).reshape(-1)
        value = np.where(self.reads, np.where(foldable, inputs, 0.0) * sums, 0.0)
        if self.bias is not None:
            value = value + self.bias.astype(np.float64)
        return np.where(self.reads & ~foldable, np.nan, value)

    def needed(self, wanted: Channels, given: list[Channels]) -> list[Channels]:
        """Return the channels of which a wanted filter is not zero."""
        return [(wanted & self.reads).reshape(given[0].size, self.multiplier).any(axis=1)]

    def ties(self) -> Iterator[Tie]:
        """Yield each channel with all its filters."""
        every = np.arange(self.output.channels)
        yield Tie(0, every // self.multiplier, every)

    def edit(self, fate: Fate) -> Edit:
        """Return the channels that stay, with their filters."""
        kept = fate.keeps[self.inputs[0]]
        weights = {self.attribute: self.kernel[..., kept, :]}
        if self.bias is not None:
            weights["bias"] = self.bias[np.repeat(kept, self.multiplier)]
        return Edit({}, weights)


@dataclasses.dataclass(eq=False)
class Normalisation(Sized):
    r"""Batch normalisation in inference: :math:`γ (x - μ) / \sqrt{σ² + ε} + β`.

    Attributes:
        weights: the vectors by the layer's names for them.
        epsilon: ε.
    """

    weights: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        vectors = {name: value.astype(np.float64) for name, value in self.weights.items()}
        self._scale = vectors.get("gamma", 1.0) / np.sqrt(vectors["moving_variance"] + self.epsilon)
        self._mean = vectors["moving_mean"]
        self._offset = vectors.get("beta", np.zeros_like(self._mean))

    def constants(self, given: list[Channels]) -> Channels:
        """Return the normalised constants; with γ = 0, that is β for any input."""
        value = (given[0] - self._mean) * self._scale + self._offset
        return np.where(self._scale == 0, self._offset, value)

    def edit(self, fate: Fate) -> Edit:
        """Return the entries of the channels that stay."""
        kept = fate.keeps[self.inputs[0]]
        return Edit({}, {name: value[kept] for name, value in self.weights.items()})
