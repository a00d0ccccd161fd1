"""Whether the zeros of a model's kernels are in a written file, which has its own layout.

A converter transposes kernels, merges their axes, multiplies them by what a BatchNorm scales with,
and gives them other names. So a kernel's tensor in the file is found by its zeros: it is the one
that, in some order of the axes, is zero wherever the kernel is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

# What is looked at first: most that does not fit differs there.
_HEAD = 4096


class Constant(NamedTuple):
    """A tensor of weights in a written file.

    Attributes:
        name: as the file calls it.
        values: as they are stored, floats or integers.
        zero_points: the integers that stand for 0.0, empty for floats.
    """

    name: str
    values: np.ndarray
    zero_points: tuple[int, ...] = ()

    @property
    def zeros(self) -> int:
        """How many of its entries are zero, as stored."""
        return int(self.values.size - np.count_nonzero(self.values))


def find(kernels: Sequence[np.ndarray], constants: Iterable[Constant]) -> list[Constant | None]:
    """Return for each kernel the constant that holds it, or None.

    Of several that have the zeros in place, it is the one most like the kernel, preferably one that
    holds no other kernel. Where a converter has put a kernel's blocks into another order (as for
    the gates of a recurrent layer) the place of each zero is lost; then their number must do.
    """
    by_size: dict[int, list[Constant]] = {}
    for constant in constants:
        by_size.setdefault(constant.values.size, []).append(constant)
    taken: set[int] = set()
    found: list[Constant | None] = []
    for kernel in kernels:
        near = by_size.get(kernel.size, [])
        likeness = {id(constant): _likeness(kernel, constant.values) for constant in near}
        fitting = [constant for constant in near if likeness[id(constant)] is not None]
        if not fitting:
            zeros = kernel.size - np.count_nonzero(kernel)
            fitting = [constant for constant in near if constant.zeros >= zeros > 0]
        free = [constant for constant in fitting if id(constant) not in taken] or fitting
        best = max(free, key=lambda constant: likeness[id(constant)] or 0.0, default=None)
        taken.add(id(best))
        found.append(best)
    return found


def _likeness(kernel: np.ndarray, values: np.ndarray) -> float | None:
    """Return how like a kernel some values are, from 0 to 1; None if they lack zeros of it.

    It is the cosine of the angle between them, in the order of axes that has the zeros in place.
    """
    flat = values.ravel()
    best = None
    for order in _orders(kernel.shape, values.shape):
        turned = kernel.transpose(order)
        dead = turned.reshape(-1) == 0
        if flat[:_HEAD][dead[:_HEAD]].any() or flat[dead].any():
            continue
        floats, ours = flat.astype(np.float64), turned.reshape(-1)
        length = float(np.linalg.norm(floats) * np.linalg.norm(ours))
        cosine = abs(float(floats @ ours)) / length if length else 0.0
        best = max(cosine, best or 0.0)
    return best


def _orders(shape: tuple[int, ...], goal: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield the orders of axes in which a shape turns into another by merging neighbours."""
    for order in itertools.permutations(range(len(shape))):
        if _merges([shape[axis] for axis in order], goal):
            yield order


def _merges(sizes: Sequence[int], goal: Sequence[int]) -> bool:
    """Tell whether neighbouring sizes can be multiplied, or split, to give others of one size."""
    ends = [set(itertools.accumulate(each, int.__mul__)) for each in (sizes, map(int, goal))]
    return ends[1] <= ends[0] or ends[0] <= ends[1]
