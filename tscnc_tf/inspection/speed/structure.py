"""Patterns of zeros that a runtime other than TensorFlow could use."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tscnc_tf import _reports


@dataclasses.dataclass(frozen=True)
class KernelStructure:
    """Where the zeros of one kernel are.

    Blocks lie on a grid in the matrix (inputs × outputs) of each position, as tfmot's `block_size`
    counts them. Zeros that were drawn at random fall into whole blocks of 16, too: at a sparsity s,
    a share of s^15 of them (86 % at 99 %). A block format gains by them all the same.

    Attributes:
        filters: the number of output channels.
        dead_filters: how many of them have no weight other than zero.
        inputs: the number of input channels.
        dead_inputs: how many of them are read by no weight other than zero.
        two_of_four: the share of groups of four successive inputs (of one output, at one position)
            with at least two zeros; 1 is the pattern 2:4 that NVIDIA's sparse tensor cores take.
            None where there are fewer than four inputs.
        blocks_4x4: the share of the zeros that lie in blocks of 4 inputs and 4 outputs that are
            zero altogether; 1 is a block-sparse kernel. None without zeros, or where a block is
            larger than the matrix.
        blocks_1x16: likewise with blocks of one input and 16 outputs.
        blocks_16x1: likewise with blocks of 16 inputs and one output, as LiteRT's sparse fully
            connected kernel takes them.
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
        return cls(
            filters=dead_filters.size,
            dead_filters=int(dead_filters.sum()),
            inputs=dead_inputs.size,
            dead_inputs=int(dead_inputs.sum()),
            two_of_four=_two_of_four(zero),
            blocks_4x4=_in_blocks(zero, 4, 4),
            blocks_1x16=_in_blocks(zero, 1, 16),
            blocks_16x1=_in_blocks(zero, 16, 1),
        )

    @property
    def shares(self) -> tuple[float | None, ...]:
        """The shares of 2:4, 4×4, 1×16 and 16×1."""
        return self.two_of_four, self.blocks_4x4, self.blocks_1x16, self.blocks_16x1

    @property
    def words(self) -> tuple[str, ...]:
        """What there is for a runtime to use, in words; nothing for zeros without a pattern."""
        patterns = ["2:4 along the inputs"]
        patterns += [f"all zeros in {block} blocks" for block in ("4×4", "1×16", "16×1")]
        dead = {
            "filters": (self.dead_filters, self.filters),
            "inputs": (self.dead_inputs, self.inputs),
        }
        return (
            *(f"{few} of {all_} {what} dead" for what, (few, all_) in dead.items() if few),
            *(text for text, share in zip(patterns, self.shares, strict=True) if share == 1.0),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return _reports.jsonable(dataclasses.asdict(self))


def _two_of_four(zero: np.ndarray) -> float | None:
    if zero.shape[2] < 4:
        return None
    zero = _padded(zero, 4, 1)
    groups = zero.reshape(*zero.shape[:2], -1, 4, zero.shape[3])
    return float(np.mean(groups.sum(axis=3) >= 2))


def _in_blocks(zero: np.ndarray, height: int, width: int) -> float | None:
    """Return the share of the zeros that lie in blocks of nothing else."""
    inputs, outputs = zero.shape[2:]
    count = int(zero.sum())
    if not count or inputs < height or outputs < width:
        return None
    padded = _padded(zero, height, width)
    down, across = padded.shape[2] // height, padded.shape[3] // width
    blocks = padded.reshape(*padded.shape[:2], down, height, across, width).all(axis=(3, 5))
    inside = blocks.repeat(height, axis=2).repeat(width, axis=3)[:, :, :inputs, :outputs]
    return int(inside.sum()) / count


def _padded(zero: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the array with its last two axes filled up by zeros to multiples, as runtimes do."""
    missing = (-zero.shape[2] % height, -zero.shape[3] % width)
    return np.pad(zero, ((0, 0), (0, 0), (0, missing[0]), (0, missing[1])), constant_values=True)
