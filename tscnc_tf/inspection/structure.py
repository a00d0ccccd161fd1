"""Patterns of the zeros of a kernel: dead channels, 2:4, blocks."""

from __future__ import annotations

import dataclasses

import numpy as np

from tscnc_tf import _reports

_BLOCKS = {"4×4": (4, 4), "1×16": (1, 16), "16×1": (16, 1)}


@dataclasses.dataclass(frozen=True)
class KernelStructure(_reports.Record):
    """The patterns of the zeros of one kernel.

    Blocks lie on a grid in the matrix (inputs × outputs) of each position, as for tfmot's
    `block_size`. Zeros at random places form whole blocks of 16, too: at sparsity s, a share s^15
    of them does (86 % at 99 %). A block format uses these as well.

    Attributes:
        filters: the number of output channels.
        dead_filters: how many of them have only zero weights.
        inputs: the number of input channels.
        dead_inputs: how many of them have only zero weights.
        two_of_four: the share of groups of four successive inputs (of one output, at one position)
            with at least two zeros; 1 is the pattern 2:4 of NVIDIA's sparse tensor cores. None if
            there are fewer than four inputs.
        blocks_4x4: the share of the zeros that lie in all-zero blocks of 4 inputs and 4 outputs; 1
            is a block-sparse kernel. None without zeros, or if a block is larger than the matrix.
        blocks_1x16: the same for blocks of one input and 16 outputs.
        blocks_16x1: the same for blocks of 16 inputs and one output, as for LiteRT's sparse fully
            connected kernel.
    """

    filters: int
    dead_filters: int
    inputs: int
    dead_inputs: int
    two_of_four: float | None
    blocks_4x4: float | None
    blocks_1x16: float | None
    blocks_16x1: float | None

    @classmethod
    def of(cls, kernel: np.ndarray) -> KernelStructure:
        """Return the structure of a kernel `(groups, positions, inputs, outputs)`."""
        zero = kernel == 0
        dead_filters, dead_inputs = zero.all(axis=(1, 2)), zero.all(axis=(1, 3))
        fours = _blocks(zero, 4, 1).sum(axis=(3, 5)) >= 2 if zero.shape[2] >= 4 else None
        return cls(
            *(dead_filters.size, int(dead_filters.sum())),
            *(dead_inputs.size, int(dead_inputs.sum())),
            None if fours is None else float(np.mean(fours)),
            *(_share_in_blocks(zero, *size) for size in _BLOCKS.values()),
        )

    @property
    def shares(self) -> tuple[float | None, ...]:
        """The shares of 2:4, 4×4, 1×16 and 16×1."""
        return self.two_of_four, self.blocks_4x4, self.blocks_1x16, self.blocks_16x1

    @property
    def words(self) -> tuple[str, ...]:
        """The complete patterns and the dead channels as phrases; empty if there are none."""
        patterns = ("2:4 along the inputs", *(f"all zeros in {name} blocks" for name in _BLOCKS))
        found = {
            f"{self.dead_filters} of {self.filters} filters dead": self.dead_filters > 0,
            f"{self.dead_inputs} of {self.inputs} inputs dead": self.dead_inputs > 0,
            **{text: share == 1.0 for text, share in zip(patterns, self.shares, strict=True)},
        }
        return tuple(text for text, is_so in found.items() if is_so)


def _blocks(zero: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the last two axes as blocks, `(..., down, height, across, width)`.

    Incomplete blocks at the edges are padded with zeros, as by runtimes.
    """
    missing = (-zero.shape[2] % height, -zero.shape[3] % width)
    pads = ((0, 0), (0, 0), (0, missing[0]), (0, missing[1]))
    padded = np.pad(zero, pads, constant_values=True)
    down, across = padded.shape[2] // height, padded.shape[3] // width
    return padded.reshape(*padded.shape[:2], down, height, across, width)


def _share_in_blocks(zero: np.ndarray, height: int, width: int) -> float | None:
    """Return the share of the zeros that lie in all-zero blocks; None as in `blocks_4x4`."""
    inputs, outputs = zero.shape[2:]
    count = int(zero.sum())
    if not count or inputs < height or outputs < width:
        return None
    is_empty = _blocks(zero, height, width).all(axis=(3, 5))
    inside = is_empty.repeat(height, axis=2).repeat(width, axis=3)[:, :, :inputs, :outputs]
    return int(inside.sum()) / count
