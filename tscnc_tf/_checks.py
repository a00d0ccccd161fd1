"""Argument checks shared by every constructor.

Each function returns the normalised value, or raises an error that names the argument, the value
and what would have been accepted. They look at Python values only, never at tensors in a graph.
"""

from __future__ import annotations

import math
import numbers
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

_FRACTION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*/\s*(\d+(?:\.\d+)?)\s*")


def number(
    name: str,
    value: Any,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """Return `value` as a finite float inside the limits (`above` and `below` exclude the end)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
    result = float(value)
    if not math.isfinite(result):
        raise ValueError(f"{name} must be finite, got {value!r}.")
    if result < minimum or (above is not None and result <= above):
        limit = f"> {above:g}" if above is not None else f">= {minimum:g}"
        raise ValueError(f"{name} must be {limit}, got {value!r}.")
    if result > maximum or (below is not None and result >= below):
        limit = f"< {below:g}" if below is not None else f"<= {maximum:g}"
        raise ValueError(f"{name} must be {limit}, got {value!r}.")
    return result


def factor(name: str, value: Any) -> float:
    """Return a penalty's factor: finite and >= 0."""
    return number(name, value, minimum=0.0)


def sparsity(name: str, value: Any) -> float:
    """Return a sparsity: the fraction of zeros, in [0, 1)."""
    try:
        return number(name, value, minimum=0.0, below=1.0)
    except ValueError as error:
        raise ValueError(
            f"{error} A sparsity is the fraction of zeros: 0.95 keeps 5 % of the weights."
        ) from None


def integer(name: str, value: Any, *, minimum: int, maximum: int | None = None) -> int:
    """Return `value` as an int that is at least `minimum`, and at most `maximum`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}.")
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value!r}.")
    if maximum is not None and int(value) > maximum:
        raise ValueError(f"{name} must be <= {maximum}, got {value!r}.")
    return int(value)


def boolean(name: str, value: Any) -> bool:
    """Return `value` if it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")
    return value


def one_of(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """Return `value` if it is one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    return value


def file_name(name: str, value: Any) -> str:
    """Return `value` if it can be the name of a file or folder, and leads to no other place."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, got {value!r}.")
    parts = pathlib.PureWindowsPath(value)  # which knows the separators of all systems, and drives
    if not value.strip() or value == ".." or parts.name != value or not value.isprintable():
        raise ValueError(
            f"{name} must be usable as the name of a file or folder, got {value!r}: text that is "
            "not empty, not . or .., and has no /, \\, drive or line break in it."
        )
    return value


def bounds(name: str, value: Any) -> tuple[float, float]:
    """Return the smallest and the largest value an input may take, as two floats."""
    try:
        low, high = value
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a pair (low, high), got {value!r}.") from None
    low, high = number(f"{name}[0]", low), number(f"{name}[1]", high)
    if low >= high:
        raise ValueError(f"{name} must be (low, high) with low < high, got {value!r}.")
    return low, high


def slack(bounds: tuple[float, float]) -> float:
    """Return by how much a float32 value may miss the bounds and still count as inside.

    It is relative to their size alone: a bound such as 2.64 is not a float32, and one of 1e-6 must
    not grow to twice itself.
    """
    return 1e-6 * max(abs(bounds[0]), abs(bounds[1]))


def one_array(name: str, value: Any) -> None:
    """Raise a TypeError for a collection of arrays or tensors, as models of several inputs take."""
    if isinstance(value, Mapping | set):
        found, parts = f"a {type(value).__name__}", len(value)
    elif isinstance(value, list | tuple) and any(np.ndim(part) > 1 for part in value[:2]):
        if all(isinstance(part, list | tuple) for part in value):
            return  # numbers in lists
        found, parts = f"a {type(value).__name__} of arrays", len(value)
    else:
        return
    raise TypeError(
        f"{name} must be one array or tensor of inputs, got {found} ({parts} of them): wrap "
        "a model of several inputs into a function of one tensor; examples in a list become one "
        "array by np.stack."
    )


def distance(name: str, value: Any) -> float:
    """Return an epsilon or a step size as a float > 0; it may be written as a fraction, "8/255"."""
    if isinstance(value, str):
        match = _FRACTION.fullmatch(value)
        if not match or float(match[2]) == 0.0:
            raise ValueError(f'{name} must be a number or a fraction like "8/255", got {value!r}.')
        result = float(match[1]) / float(match[2])
        if result <= 0.0:
            raise ValueError(f"{name} must be > 0, got {value!r}.")
        return result
    return number(name, value, above=0.0)


def as_written(value: float | str) -> str:
    """Return a distance the way people write it: 8/255 as "8/255", 0.3 as "0.3".

    A float within 1e-12 of k/255, with a whole k, is read as that fraction, if its decimal form is
    no shorter: 0.2 stays 0.2, though it is 51/255. A NumPy float is read in its own precision.
    """
    if isinstance(value, str):
        return value.replace(" ", "")
    kind = type(value) if isinstance(value, np.floating) else float
    exact = float(value)
    if kind(f"{exact:.3g}") == kind(value):
        return f"{exact:g}"
    count = round(exact * 255)
    if count and abs(float(kind(count / 255)) - exact) < 1e-12:
        return f"{count}/255"
    return str(kind(value))


def class_indices(name: str, value: Any) -> tuple[np.ndarray, int | None]:
    """Return labels as class indices `(n,)` of int64, and the width of one-hot labels, else None.

    Integers `(n,)` or `(n, 1)` and one-hot rows `(n, classes)` are labels.
    """
    array = np.asarray(value)
    if array.ndim == 2 and array.shape[1] > 1:
        if array.dtype == object or not np.all(np.isin(array, (0, 1))):
            raise ValueError(
                f"{name} of shape (examples, classes) must be one-hot, got other values than 0 and "
                f"1. Soft labels have no accuracy: pass np.argmax({name}, axis=1)."
            )
        if not np.all(array.sum(axis=1, dtype=np.int64) == 1):
            raise ValueError(f"{name} must be one-hot: exactly one 1 in each row.")
        return np.argmax(array, axis=1).astype(np.int64), array.shape[1]
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(
            f"{name} must be class indices of shape (examples,) or (examples, 1), or one-hot of "
            f"shape (examples, classes), got shape {array.shape}."
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(
            f"{name} must hold integers (class indices), got {array.dtype}. If these are class "
            f"indices, pass {name}.astype(int); probabilities are no labels."
        )
    if array.size and array.min() < 0:
        raise ValueError(f"{name} must hold class indices >= 0, got {array.min()}.")
    return array.astype(np.int64), None
