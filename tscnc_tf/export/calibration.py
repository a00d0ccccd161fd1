"""Calibration sets: an int8 export takes the ranges of the activations from them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sized
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tensorflow as tf

from tscnc_tf import _probe
from tscnc_tf.export import preflight

MOST = 4096  # examples that are read from an iterable of unknown length


@runtime_checkable
class _Array(Protocol):
    """What NumPy converts to an array, such as tensors and data frames."""

    def __array__(self) -> np.ndarray: ...


def examples(model: Any, calibration: Any) -> Any:
    """Return a calibration set as arrays in the structure of the model's inputs.

    Args:
        model: a built Keras model.
        calibration: a batch as the model takes it, or an iterable of batches, see `export_litert`.

    Raises:
        TypeError, ValueError: the set is missing, empty, infinite, or does not fit the model.
    """
    if calibration is None:
        raise ValueError(
            "calibration is missing: precision='int8' takes the ranges of the activations from a "
            "batch of typical inputs. Pass some hundred examples of the training set."
        )
    preflight.require_exportable(model)
    if not _is_iterable_of_batches(model, calibration):
        found = _probe.prepare(model, calibration, "calibration")[1]
    else:
        found = _concatenated(model, calibration)
    if not any(np.ptp(array, axis=0).any() for array in tf.nest.flatten(found)):
        warnings.warn(
            "calibration holds one example, or equal ones only: the ranges of the activations are "
            "those of one input, and int8 cuts off what is outside. Pass some hundred different "
            "examples of the training set.",
            stacklevel=3,
        )
    return found


def _is_iterable_of_batches(model: Any, calibration: Any) -> bool:
    if isinstance(calibration, _Array | Mapping) or not isinstance(calibration, Iterable):
        return False
    if not isinstance(calibration, list | tuple):
        return True
    # Other lists are the inputs of a model with several inputs, or one batch as nested lists.
    specs = _probe.input_specs(model)
    if isinstance(specs, dict):
        firsts = [each[0] if isinstance(each, tuple) and each else each for each in calibration]
        return all(isinstance(each, Mapping) for each in firsts)
    return isinstance(specs, tf.TensorSpec) and all(
        isinstance(each, tuple) or (isinstance(each, _Array) and np.ndim(each) == specs.shape.rank)
        for each in calibration
    )


def _concatenated(model: Any, batches: Iterable[Any]) -> Any:
    sized = isinstance(batches, Sized)
    if isinstance(batches, tf.data.Dataset):  # its len() raises if the length is unknown
        cardinality = int(batches.cardinality())
        sized = cardinality >= 0
        if cardinality == tf.data.INFINITE_CARDINALITY:
            raise ValueError(
                "calibration is an infinite dataset: pass a part of it, calibration.take(n) with "
                "some hundred examples."
            )
    specs, found, count = None, [], 0
    for element in batches:
        x = _inputs(element)
        try:
            if specs is None:
                specs, batch = _probe.prepare(model, x, "calibration")
            else:
                batch = _probe.fit("calibration", specs, x)
        except ValueError as error:
            raise ValueError(
                f"{error} Each element of calibration must be a batch, as from dataset.batch(32), "
                "or a tuple (x, y) with a batch x."
            ) from error
        found.append(batch)
        count += len(tf.nest.flatten(batch)[0])
        if count > MOST and not sized:
            raise ValueError(
                f"calibration has yielded {count:,} examples, and its length is unknown: pass a "
                "part of it, dataset.take(n) or itertools.islice(batches, n), with some hundred "
                "examples."
            )
    if not found:
        raise ValueError(
            "calibration is empty: pass some hundred examples of the training set. (A generator "
            "can be read only once.)"
        )
    return tf.nest.map_structure(lambda *arrays: np.concatenate(arrays), *found)


def _inputs(element: Any) -> Any:
    """Return the inputs in an element, by Keras' convention: x, (x,), (x, y) or (x, y, weights)."""
    if not isinstance(element, tuple):
        return element
    if not 1 <= len(element) <= 3:
        raise ValueError(
            "calibration must yield batches x or tuples (x, y), got a tuple of "
            f"{len(element)}. Several inputs of a model must be a list, or a tuple in a tuple: "
            "((a, b), y)."
        )
    return element[0]
