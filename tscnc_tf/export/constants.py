"""The constants of a written file, matched to the kernels of the model.

A converter transposes kernels, merges their axes, multiplies the scales of BatchNorms into them,
and renames them. So a kernel's constant is found by its zeros: in some order of the axes, it is
zero wherever the kernel is.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

# The number of entries that are compared first: most constants that do not match differ there.
_HEAD = 4096


class Constant(NamedTuple):
    """A tensor of weights in a written file.

    Attributes:
        name: its name in the file.
        values: its entries as they are stored, floats or integers.
        zero_points: the integers that represent 0.0, empty for floats.
    """

    name: str
    values: np.ndarray
    zero_points: tuple[int, ...] = ()

    @property
    def zeros(self) -> int:
        """The number of stored entries that are 0."""
        return int(self.values.size - np.count_nonzero(self.values))


class Form(NamedTuple):
    """How a file stores a kernel.

    Attributes:
        kind: "dense", "sparse", or "dense on loading": sparse in the file only.
        size: its bytes in the file, the indices of a sparse form included.
        reason: why it is dense although sparse kernels were requested; else an empty string.
    """

    kind: str
    size: int
    reason: str = ""


class Converted(NamedTuple):
    """The result of a conversion.

    Attributes:
        content: the file.
        forms: how it stores its constants, by name; a constant without an entry is dense.
        dense: the same file with all kernels dense; None if sparse kernels were not requested.
        pointwise: how many 1x1 convolutions are run sparsely on some processors, and how many there
            are; None if no kernel is sparse.
        data_file: a second file with weights, which the first one names; None if there is none.
    """

    content: bytes
    forms: Mapping[str, Form] = {}
    dense: bytes | None = None
    pointwise: tuple[int, int] | None = None
    data_file: pathlib.Path | None = None


def find(kernels: Sequence[np.ndarray], constants: Iterable[Constant]) -> list[Constant | None]:
    """Return for each kernel the constant that holds it, or None.

    Of several constants with the zeros in place, the one most similar to the kernel is returned,
    if possible one that holds no other kernel. Where a converter has reordered the blocks of a
    kernel (as for the gates of a recurrent layer), the places of the zeros are unknown, and only
    their number is compared.
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
    """Return the similarity of a kernel and a constant, in [0, 1]; None if zeros are missing.

    It is the absolute cosine of the angle between them, for the best order of axes that has the
    zeros in place.
    """
    flat = values.ravel()
    best = None
    for order in _orders(kernel.shape, values.shape):
        transposed = kernel.transpose(order)
        is_zero = transposed.reshape(-1) == 0
        if flat[:_HEAD][is_zero[:_HEAD]].any() or flat[is_zero].any():
            continue
        floats, entries = flat.astype(np.float64), transposed.reshape(-1)
        length = float(np.linalg.norm(floats) * np.linalg.norm(entries))
        cosine = abs(float(floats @ entries)) / length if length else 0.0
        best = max(cosine, best or 0.0)
    return best


def _orders(shape: tuple[int, ...], goal: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield the orders of axes in which a shape, merged or split, gives another one."""
    for order in itertools.permutations(range(len(shape))):
        if _merges([shape[axis] for axis in order], goal):
            yield order


def _merges(sizes: Sequence[int], goal: Sequence[int]) -> bool:
    """Tell whether `goal` results from merging, or from splitting, neighbouring sizes."""
    ends = [set(itertools.accumulate(each, int.__mul__)) for each in (sizes, map(int, goal))]
    return ends[1] <= ends[0] or ends[0] <= ends[1]
