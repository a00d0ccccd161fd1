"""Checks of what tensors hold: an error at once in eager code, an assertion in a graph.

XLA drops assertions, so a check belongs in front of what it compiles.
"""

from __future__ import annotations

import re
from typing import Any

import tensorflow as tf

# What stands in an assertion's error, and our way to begin a text.
_FAILED = re.compile(r"assertion failed: \[((?:x|y|model|teacher) must .*)\]\s*$", re.MULTILINE)


def require(condition: Any, text: str, *values: Any) -> list[tf.Operation]:
    """Raise a ValueError unless a condition holds.

    Args:
        condition: a boolean, or a tensor of one.
        text: begins with "x must", "y must", "model must" or "teacher must", and has a "{}" for
            each of the values.
        *values: numbers, or tensors of one.

    Returns:
        In a graph, the operation that checks, for what must not run before; else nothing.
    """
    if not tf.executing_eagerly():
        pieces = text.split("{}")
        said = [part for pair in zip(pieces, values, strict=False) for part in pair] + pieces[-1:]
        return [tf.debugging.Assert(condition, said)]
    if not bool(condition):
        raise ValueError(text.format(*(f"{float(value):g}" for value in values)))
    return []


def as_value_error(error: tf.errors.InvalidArgumentError) -> ValueError | None:
    """Return the error that `require` raises in eager code, None for an error of another kind."""
    found = _FAILED.search(error.message)
    return ValueError(found[1].replace("] [", "").replace("\\'", "'")) if found else None
