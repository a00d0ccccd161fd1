"""The examples of an evaluation: inputs as float32, labels as class indices."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks


def examples(
    x: Any, y: Any, bounds: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Return inputs `(n, ...)`, class indices `(n,)`, and the width of one-hot labels, else None.

    Args:
        x: inputs, or a batched `tf.data.Dataset` of pairs (inputs, labels).
        y: labels: integers `(n,)` or `(n, 1)`, or one-hot `(n, classes)`; None with a dataset.
        bounds: the smallest and the largest value of an input.

    Raises:
        TypeError: inputs are no floats, labels are no integers, or a dataset holds no pairs.
        ValueError: something about the values or shapes is wrong; the message says what.
    """
    if isinstance(x, tf.data.Dataset):
        if y is not None:
            raise ValueError("y must be None when x is a dataset: its labels are in the dataset.")
        x, y = _materialised(x)
    elif y is None:
        raise ValueError("y is None: robust accuracy needs labels (only a dataset brings its own).")
    inputs = _checks.inputs(x, bounds).numpy().astype(np.float32)
    labels, width = _checks.class_indices("y", y)
    if len(labels) != len(inputs):
        raise ValueError(f"x has {len(inputs)} examples, but y has {len(labels)} labels.")
    return inputs, labels, width


def _materialised(dataset: tf.data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    spec = dataset.element_spec
    if not isinstance(spec, tuple) or len(spec) != 2:
        raise TypeError(f"x must be a dataset of pairs (inputs, labels), got elements {spec}.")
    if not isinstance(spec[0], tf.TensorSpec):
        raise TypeError(
            f"x must be a dataset of one tensor of inputs and one of labels, got inputs {spec[0]}: "
            "what is attacked is one input. Wrap a model of several inputs into a function of one "
            "tensor."
        )
    if int(dataset.cardinality()) == tf.data.INFINITE_CARDINALITY:
        raise ValueError("x is a dataset without an end: limit it with dataset.take(batches).")
    if getattr(spec[1], "shape", tf.TensorShape(None)).rank == 0:
        raise ValueError("x must be a dataset of batches: use dataset.batch(batch_size).")
    batches = [(np.asarray(inputs), np.asarray(labels)) for inputs, labels in dataset]
    if not batches:
        raise ValueError("x is empty: the dataset has no batches.")
    inputs, labels = zip(*batches, strict=True)
    return np.concatenate(inputs), np.concatenate(labels)
