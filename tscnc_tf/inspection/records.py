"""What all reports share: names of rows, values that JSON can hold, the width of intervals."""

from __future__ import annotations

import collections
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

Z95 = 1.959963984540054  # the 97.5 % point of the normal distribution: 95 % lie within ±Z95


def unique(names: Iterable[str]) -> list[str]:
    """Return the names with " (2)", " (3)", ... after those that came before."""
    seen: collections.Counter[str] = collections.Counter()
    taken: set[str] = set()
    result = []
    for name in names:
        candidate = name
        while candidate in taken:
            seen[name] += 1
            candidate = f"{name} ({seen[name] + 1})"
        taken.add(candidate)
        result.append(candidate)
    return result


def jsonable(value: Any) -> Any:
    """Return `value` as what standard JSON can hold; inf and nan become "inf", "-inf", "nan".

    Mappings, sequences and NumPy values are converted through and through; what is none of these
    becomes its `repr`.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return jsonable(value.tolist())
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return repr(value)
