"""Which constant of a written file holds which kernel of the model, and whether it has its zeros.

A converter transposes kernels, merges their axes, multiplies the scales of BatchNorms into them,
and renames them. So a kernel's constant is found by its zeros: it is the one that, in some order of
the axes, is zero wherever the kernel is.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

# The entries that are compared first: most constants that do not fit differ there.
_HEAD = 4096


class Constant(NamedTuple):
    """A tensor of weights in a written file.

    Attributes:
        name: as the file calls it.
        values: as they are stored, floats or integers.
        zero_points: the integers that represent 0.0, empty for floats.
    """

    name: str
    values: np.ndarray
    zero_points: tuple[int, ...] = ()

    @property
    def zeros(self) -> int:
        """How many of its entries are zero, as stored."""
        return int(self.values.size - np.count_nonzero(self.values))


class Form(NamedTuple):
    """How a file holds a kernel.

    Attributes:
        kind: "dense", "sparse", or "dense on loading": sparse in the file only.
        size: its bytes in the file, with those that say where its entries are.
        reason: why it is dense where sparse kernels were asked for; else an empty text.
    """

    kind: str
    size: int
    reason: str = ""


class Converted(NamedTuple):
    """What a converter has made.

    Attributes:
        content: the file.
        forms: how it holds its constants, by their names; those that are missing are dense.
        dense: the file with all kernels dense; None if they are.
        pointwise: how many 1x1 convolutions are run sparsely on some processors, and how many there
            are; None if no kernel is sparse.
        beside: a file of weights that stands beside the file, and that it names; None if it holds
            all of them.
    """

    content: bytes
    forms: Mapping[str, Form] = {}
    dense: bytes | None = None
    pointwise: tuple[int, int] | None = None
    beside: pathlib.Path | None = None


def find(kernels: Sequence[np.ndarray], constants: Iterable[Constant]) -> list[Constant | None]:
    """Return for each kernel the constant that holds it, or None.

    Of several that have the zeros in place, it is the one most similar to the kernel, if possible
    one that holds no other kernel. Where a converter has reordered the blocks of a kernel (as for
    the gates of a recurrent layer), the place of each zero is not known, and only their number is
    compared.
    """
    by_size: dict[int, list[Constant]] = {}
    for constant in constants:
        by_size.setdefault(constant.values.size, []).append(constant)
    taken: set[int] = set()
    found: list[Constant | None] = []
    for kernel in kernels:
        near = by_size.get(kernel.size, [])
        similarity = {id(constant): _similarity(kernel, constant.values) for constant in near}
        fitting = [constant for constant in near if similarity[id(constant)] is not None]
        if not fitting:
            zeros = kernel.size - np.count_nonzero(kernel)
            fitting = [constant for constant in near if constant.zeros >= zeros > 0]
        free = [constant for constant in fitting if id(constant) not in taken] or fitting
        best = max(free, key=lambda constant: similarity[id(constant)] or 0.0, default=None)
        taken.add(id(best))
        found.append(best)
    return found


def _similarity(kernel: np.ndarray, values: np.ndarray) -> float | None:
    """Return the similarity of a kernel and some values, in [0, 1]; None if zeros are missing.

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
