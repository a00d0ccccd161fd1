"""Argument checks: numbers, names, bounds, inputs and labels.

Each function returns the normalised value, or raises an error that names the argument, the value
and the accepted values. The values of tensors are checked by `require`: it raises at once in eager
code, and adds an assertion in a graph. XLA drops assertions, so such checks must run before the
part that XLA compiles.
"""

from __future__ import annotations

import math
import numbers
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

_NUMBER = r"\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*"
_FRACTION = re.compile(rf"{_NUMBER}(?:/{_NUMBER})?")
# The message of `require` in the error of an assertion; it begins with an argument's name.
_FAILED = re.compile(r"assertion failed: \[((?:x|y|model|teacher) must .*)\]\s*$", re.MULTILINE)


class DtypeError(TypeError, ValueError):
    """A tensor or array has a wrong dtype.

    It is both a TypeError and a ValueError, since attacks and losses document the latter.
    """


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
    try:
        result = float(value)
    except OverflowError:  # an integer above all floats
        result = math.inf
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


def seed(name: str, value: Any) -> int:
    """Return a seed as an int in [0, 2^31), the range of TensorFlow's int32 seeds."""
    return integer(name, value, minimum=0, maximum=2**31 - 1)


def boolean(name: str, value: Any) -> bool:
    """Return `value` if it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")
    return value


def one_of(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """Return `value` if it is one of `choices` (strings or None)."""
    choices = tuple(choices)
    if not isinstance(value, str | None) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    return value


def file_name(name: str, value: Any) -> str:
    """Return `value` if it is the name of a file or folder, without any other part of a path."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, got {value!r}.")
    parts = pathlib.PureWindowsPath(value)  # splits at drives and at the separators of all systems
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


def distance(name: str, value: Any) -> float:
    """Return an epsilon or a step size as a float > 0; it may be text: "8/255" or "1e-2"."""
    if isinstance(value, str):
        match = _FRACTION.fullmatch(value)
        divisor = float(match[2] or 1.0) if match else 0.0
        if not match or divisor == 0.0:
            raise ValueError(f'{name} must be a number or a fraction like "8/255", got {value!r}.')
        result = float(match[1]) / divisor
        if not 0.0 < result < float("inf"):
            raise ValueError(f"{name} must be > 0 and finite, got {value!r}.")
        return result
    return number(name, value, above=0.0)


def as_written(value: float | str) -> str:
    """Return a distance in its usual notation: 8/255 as "8/255", 0.3 as "0.3".

    A float within 1e-12 of k/255 for an integer k is written as that fraction, unless three digits
    suffice: 0.2 stays 0.2, though it is 51/255. A NumPy float is read in its own precision.
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


def require(condition: Any, text: str, *values: Any) -> list[tf.Operation]:
    """Raise a ValueError unless a condition holds.

    Args:
        condition: a boolean, or a scalar boolean tensor.
        text: the message; begins with "x must", "y must", "model must" or "teacher must", and has
            a "{}" for each value.
        *values: numbers or scalar tensors.

    Returns:
        In a graph, the assertion, as a control dependency for the operations that need it; an
        empty list in eager code.
    """
    if not tf.executing_eagerly():
        pieces = text.split("{}")
        data = [part for pair in zip(pieces, values, strict=False) for part in pair] + pieces[-1:]
        return [tf.debugging.Assert(condition, data)]
    if not bool(condition):
        raise ValueError(text.format(*(f"{float(value):g}" for value in values)))
    return []


def as_value_error(error: tf.errors.InvalidArgumentError) -> ValueError | None:
    """Return the error that `require` raises in eager code; None if it is not from `require`."""
    found = _FAILED.search(error.message)
    return ValueError(found[1].replace("] [", "").replace("\\'", "'")) if found else None


def one_array(name: str, value: Any) -> None:
    """Raise a TypeError for None and for collections of arrays or tensors."""
    if value is None:
        raise TypeError(f"{name} must be one array or tensor of inputs, got None.")
    if isinstance(value, Mapping | set):
        found, parts = f"a {type(value).__name__}", len(value)
    elif isinstance(value, list | tuple) and any(np.ndim(part) > 1 for part in value[:2]):
        if all(isinstance(part, list | tuple) for part in value):
            return  # nested lists of numbers
        found, parts = f"a {type(value).__name__} of arrays", len(value)
    else:
        return
    raise TypeError(
        f"{name} must be one array or tensor of inputs, got {found} ({parts} of them): wrap "
        "a model of several inputs into a function of one tensor; examples in a list become one "
        "array by np.stack."
    )


def inputs(x: Any, bounds: tuple[float, float]) -> np.ndarray | tf.Tensor:
    """Return inputs `(batch, ...)` of their own float dtype, checked against bounds.

    Arrays are not copied, since the data may take most of the memory; all else becomes a tensor.

    Raises:
        TypeError: x is not one array of floats.
        ValueError: x is not a batch, is empty, not finite, or outside of the bounds.
    """
    one_array("x", x)
    try:
        # Of a masked array all values, as the model is given.
        x = np.asarray(x) if isinstance(x, np.ndarray) else tf.convert_to_tensor(x)
        tf.as_dtype(x.dtype)
    except (TypeError, ValueError) as error:
        raise TypeError(f"x must be an array of floats, got {x!r}: {error}") from None
    require_floats(x.dtype)
    require_batch(tf.TensorShape(x.shape))
    if 0 in x.shape:
        raise ValueError(f"x must not be empty, got shape {x.shape}.")
    if isinstance(x, np.ndarray):
        extremes = np.array([x.min(), x.max()], np.float64)  # NaN if any value is
        is_finite = bool(np.all(np.isfinite(extremes)))
    else:
        extremes = widened(x)
        is_finite = bool(tf.reduce_all(tf.math.is_finite(extremes)))
    if not is_finite:
        each = tf.reduce_all(tf.math.is_finite(widened(x)), axis=range(1, len(x.shape)))
        bad = len(each) - int(tf.math.count_nonzero(each))
        raise ValueError(f"x must be finite, got NaN or infinity in {bad} of {len(x)} examples.")
    require_within(extremes, bounds)
    return x


def training_batch(x: Any, y: Any) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the inputs and labels of a batch as tensors, after checking shapes and dtypes.

    Labels of smaller integer dtypes, which not all TensorFlow operations support, become int64.

    Raises:
        TypeError: x is not one float tensor.
        ValueError: y is missing, or not one tensor of labels.
    """
    x = tf.convert_to_tensor(x) if isinstance(x, np.ndarray) else x
    if not tf.is_tensor(x):
        raise TypeError(
            f"x must be one tensor per batch, got a {type(x).__name__}: an attack changes one "
            "input. Wrap the model into one that takes one tensor."
        )
    require_floats(x.dtype)
    if y is None:
        raise ValueError("y must be given: adversarial training is supervised.")
    y = tf.convert_to_tensor(y) if isinstance(y, np.ndarray) else y
    if not tf.is_tensor(y) or y.shape.rank is None:
        form = "a tensor of unknown rank" if tf.is_tensor(y) else f"a {type(y).__name__}"
        raise ValueError(
            f"y must be one tensor of labels per batch, of shape (batch,) or (batch, classes), got "
            f"{form}."
        )
    if holds_indices("y", y) and y.dtype not in (tf.int32, tf.int64):
        y = tf.cast(y, tf.int64)
    return x, y


def require_floats(dtype: Any) -> None:
    """Raise a DtypeError unless `dtype`, the dtype of the inputs, is a float dtype."""
    dtype = tf.as_dtype(dtype)
    if not dtype.is_floating:
        raise DtypeError(
            f"x must be of a float dtype, got {dtype.name}: integers can't be perturbed by less "
            "than 1. Images of bytes become floats in [0, 1] by x / 255; or cast them, and set "
            "bounds=(0, 255)."
        )


def require_batch(shape: tf.TensorShape) -> None:
    """Raise a ValueError unless the shape is known to have at least two axes, the batch first."""
    if shape.rank is None or shape.rank < 2:
        raise ValueError(
            f"x must be a batch, with a batch axis and at least one more, got shape {shape}. Pass "
            "a single example as x[None]."
        )


def within(smallest: Any, largest: Any, bounds: tuple[float, float]) -> Any:
    """Return whether float32 values are inside the bounds, up to rounding; False for NaN.

    The tolerance is relative to the bounds, with no absolute part: a bound such as 2.64 is not
    exact in float32, and an absolute tolerance could double a bound of 1e-6.
    """
    slack = 1e-6 * max(abs(bounds[0]), abs(bounds[1]))
    return (smallest >= bounds[0] - slack) & (largest <= bounds[1] + slack)


def require_within(x: Any, bounds: tuple[float, float]) -> list[tf.Operation]:
    """Raise a ValueError unless float inputs lie within the bounds; `require` in a graph."""
    smallest, largest = tf.reduce_min(x), tf.reduce_max(x)
    return require(
        within(smallest, largest, bounds),
        f"x must lie within bounds={bounds}, got values from {{}} to {{}}: rescale x, or pass the "
        "bounds of the data as they are (with normalisation by mean and deviation in the model, so "
        "that epsilon keeps its meaning).",
        smallest,
        largest,
    )


def holds_indices(name: str, labels: Any) -> bool:
    """Return whether labels are class indices, `(batch,)` or `(batch, 1)`, not `(batch, classes)`.

    Args:
        name: of the argument.
        labels: an array or tensor; only its shape and dtype are read.

    Raises:
        ValueError: the labels have neither shape.
        DtypeError: they have the shape of class indices, but are not integers.
    """
    shape, dtype = tf.TensorShape(labels.shape), tf.as_dtype(labels.dtype)
    if shape.rank not in (1, 2):
        raise ValueError(
            f"{name} must be integers (class indices) of shape (batch,) or (batch, 1), or one-hot "
            f"of shape (batch, classes), got {dtype.name} of shape {shape}."
        )
    if shape.rank == 2 and shape[1] != 1:
        return False
    if not dtype.is_integer:
        raise DtypeError(
            f"{name} must hold integers (class indices) if its shape is {shape}, got {dtype.name}: "
            "cast class indices to int32, or pass one-hot labels of shape (batch, classes)."
        )
    return True


def class_indices(name: str, value: Any) -> tuple[np.ndarray, int | None]:
    """Return labels as int64 class indices `(n,)`, and the width of one-hot labels, else None.

    Integers `(n,)` or `(n, 1)` and one-hot rows `(n, classes)` are accepted; soft labels are not.

    Raises:
        ValueError: the labels are negative, or rows that are not one-hot.
    """
    array = np.asarray(value)
    if holds_indices(name, array):
        if array.size and array.min() < 0:
            raise ValueError(f"{name} must hold class indices >= 0, got {array.min()}.")
        return array.reshape(-1).astype(np.int64), None
    if array.dtype == object or not np.all(np.isin(array, (0, 1))):
        raise ValueError(
            f"{name} of shape (examples, classes) must be one-hot, got other values than 0 and "
            f"1. Soft labels have no accuracy: pass np.argmax({name}, axis=1)."
        )
    if not np.all(array.sum(axis=1, dtype=np.int64) == 1):
        raise ValueError(f"{name} must be one-hot: exactly one 1 in each row.")
    return np.argmax(array, axis=1).astype(np.int64), array.shape[1]


def labels(y: Any, batch: int) -> tf.Tensor:
    """Return labels as int32 of shape `(batch,)`, or as float rows of shape `(batch, classes)`.

    Raises:
        ValueError: y is neither, or has another length than x.
    """
    try:
        y = tf.convert_to_tensor(y)
    except (TypeError, ValueError) as error:
        raise ValueError(f"y must be an array or tensor of labels: {error}") from error
    are_indices = holds_indices("y", y)
    if y.shape[0] != batch:
        raise ValueError(f"y must have one label per example of x, {batch}, got {y.shape[0]}.")
    if not are_indices:
        require_classes(y, None)
        return widened(y)
    indices = tf.cast(tf.reshape(y, (-1,)), tf.int64)
    smallest, largest = int(tf.reduce_min(indices)), int(tf.reduce_max(indices))
    if smallest < 0 or largest > tf.int32.max:
        raise ValueError(
            f"y must hold class indices >= 0, got labels from {smallest} to {largest}."
        )
    return tf.cast(indices, tf.int32)


def require_classes(y: Any, classes: int | None) -> list[tf.Operation]:
    """Raise a ValueError unless labels are valid for a number of classes; `require` in a graph.

    Args:
        y: class indices in [0, classes), or rows, which must be >= 0 and sum to 1.
        classes: the number of classes; None if not known.
    """
    if holds_indices("y", y):
        if classes is None:
            return []
        indices = tf.cast(y, tf.int64)
        smallest, largest = tf.reduce_min(indices), tf.reduce_max(indices)
        return require(
            (smallest >= 0) & (largest < classes),
            f"y must be in 0 ... {classes - 1}, for the model has {classes} outputs, got labels "
            "from {} to {}.",
            smallest,
            largest,
        )
    rows = widened(y)
    smallest, sums = tf.reduce_min(rows), tf.reduce_sum(rows, axis=-1)
    least, most = tf.reduce_min(sums), tf.reduce_max(sums)
    return require(
        (smallest >= 0) & (least > 1 - 1e-3) & (most < 1 + 1e-3),
        "y must hold one-hot or soft labels if its shape is (batch, classes), rows that are >= 0 "
        "and sum to 1, got a smallest entry of {} and sums from {} to {}. Class indices have the "
        "shape (batch,).",
        smallest,
        least,
        most,
    )


def are_probabilities(outputs: Any) -> tf.Tensor:
    """Return whether all outputs `(batch, classes)` are in [0, 1] and each row sums to 1."""
    outputs = tf.cast(outputs, tf.float32)
    is_unit = tf.reduce_all((outputs >= 0.0) & (outputs <= 1.0 + 1e-6))
    return is_unit & tf.reduce_all(tf.abs(tf.reduce_sum(outputs, axis=-1) - 1.0) <= 1e-3)


def about_probabilities(name: str) -> str:
    """Return the error message for a model whose outputs are probabilities."""
    return (
        f"{name} must return logits, but returns probabilities: all outputs are in [0, 1], and "
        "each row sums to 1. Attacks need logits: the gradient of a saturated softmax vanishes, "
        "which makes a model look robust. Leave out the last softmax (activation=None), or pass "
        "the part of the model before it (docs/evaluation.md#probabilities)."
    )


def widened(values: Any) -> tf.Tensor:
    """Return a float tensor in float32, or float64 if it is float64; half precision is widened."""
    return values if values.dtype == tf.float64 else tf.cast(values, tf.float32)
