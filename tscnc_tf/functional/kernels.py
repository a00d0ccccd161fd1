"""Conversion of kernels to matrices and to groups of weights, for the constraints."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from tscnc_tf import _checks

LAYOUTS = ("standard", "transposed", "depthwise")
GROUPS = ("filter", "input")


def canonical(kernel: Any, layout: str = "standard", channel_groups: int = 1) -> tf.Tensor:
    r"""Return a kernel with its axes in the canonical order (groups, positions, inputs, outputs).

    * `"standard"`: `(..., in, out)`: Dense, Conv1D/2D/3D, pointwise, recurrent. With
      `channel_groups = g`, as in a grouped convolution, the outputs are divided into `g` successive
      groups, each with its own `in` input channels.
    * `"transposed"`: `(..., out, in)`: the transposed convolutions.
    * `"depthwise"`: `(..., in, multiplier)`: each input channel is a group.
    * any other string of the letters p, i and o, one per axis, marks axes of positions, inputs or
      outputs: "ioo" for a kernel (in, heads, size) of attention.

    Args:
        kernel: tensor or variable of rank >= 2, of fully known shape.
        layout: one of the three names above, or a string as described.
        channel_groups: number of groups of a grouped convolution; 1 for other kernels.

    Returns:
        A tensor of rank 4, `(groups, positions, inputs, outputs)`.

    Raises:
        TypeError: `channel_groups` is not an integer.
        ValueError: the rank is below 2, the shape is not known, the number of output channels is
            not a multiple of `channel_groups`, or there is no such layout.
    """
    kernel = tf.convert_to_tensor(kernel)
    channel_groups = _checks.integer("channel_groups", channel_groups, minimum=1)
    shape = kernel.shape
    if shape.rank is None or shape.rank < 2 or not shape.is_fully_defined():
        raise ValueError(
            f"kernel must have a known shape of rank >= 2 (it is read as a matrix), got {shape}. "
            "Biases and normalisation weights take no such regularizer."
        )
    if not _is_named(layout):
        order = _order(layout, shape.rank)
        sizes = [math.prod(shape[axis] for axis in axes) for axes in order]
        return tf.reshape(
            tf.transpose(kernel, [axis for axes in order for axis in axes]), (1, *sizes)
        )
    positions = shape[:-2].num_elements() if shape.rank > 2 else 1
    first, second = shape[-2], shape[-1]
    kernel = tf.reshape(kernel, (positions, first, second))
    if layout == "depthwise":
        return tf.transpose(kernel, (1, 0, 2))[:, :, tf.newaxis, :]
    if layout == "transposed":
        return tf.transpose(kernel, (0, 2, 1))[tf.newaxis]
    if second % channel_groups:
        raise ValueError(
            f"channel_groups must divide the output channels ({second}), got {channel_groups}."
        )
    kernel = tf.reshape(kernel, (positions, first, channel_groups, second // channel_groups))
    return tf.transpose(kernel, (2, 0, 1, 3))


def restore(values: Any, shape: Any, layout: str = "standard") -> tf.Tensor:
    """Return values in the kernel's own axes: the inverse of `canonical`.

    Args:
        values: `(groups, positions, inputs, outputs)`, of any dtype.
        shape: of the kernel.
        layout: as in `canonical`.
    """
    shape = tuple(tf.TensorShape(shape))
    if not _is_named(layout):
        order = [axis for axes in _order(layout, len(shape)) for axis in axes]
        values = tf.reshape(values, [shape[axis] for axis in order])
        return tf.transpose(values, [order.index(axis) for axis in range(len(order))])
    if layout == "depthwise":  # (in, positions, 1, multiplier)
        values = tf.transpose(values, (1, 0, 2, 3))
    elif layout == "transposed":  # (1, positions, in, out)
        values = tf.transpose(values, (0, 1, 3, 2))
    else:
        values = tf.transpose(values, (1, 2, 0, 3))
    return tf.reshape(values, shape)


def matrices(kernel: Any, layout: str = "standard", channel_groups: int = 1) -> tf.Tensor:
    """Return a kernel as a stack of tall matrices, `(groups, p, n)` with `p >= n`.

    Columns are the output channels, rows all other axes. Wide matrices are transposed, which does
    not change the singular values.

    Args:
        kernel: as in `canonical`.
        layout: as in `canonical`.
        channel_groups: as in `canonical`.

    Raises:
        ValueError: as in `canonical`.
    """
    kernel = canonical(kernel, layout, channel_groups)
    groups, positions, inputs, outputs = kernel.shape
    stacked = tf.reshape(kernel, (groups, positions * inputs, outputs))
    wide = positions * inputs < outputs
    return tf.linalg.matrix_transpose(stacked) if wide else stacked


def group_norms(
    kernel: Any, groups: str, layout: str = "standard", channel_groups: int = 1
) -> tf.Tensor:
    """Return the Euclidean norm of each group of weights, as a vector.

    A `"filter"` is the weights of one output channel, an `"input"` those of one input channel (a
    row of a dense kernel). The gradient at a group of zeros is zero.

    Args:
        kernel: as in `canonical`.
        groups: "filter" or "input".
        layout: as in `canonical`.
        channel_groups: as in `canonical`.

    Raises:
        ValueError: `groups` is neither.
    """
    _checks.one_of("groups", groups, GROUPS)
    kernel = canonical(kernel, layout, channel_groups)
    axes = (1, 2) if groups == "filter" else (1, 3)
    # Scaled before squaring, against underflow and overflow. The scale is a constant in the
    # gradient, which is exact since the norm is homogeneous.
    scale = tf.stop_gradient(tf.reduce_max(tf.abs(kernel), axis=axes, keepdims=True))
    unit = tf.math.divide_no_nan(kernel, scale)
    squared = tf.reduce_sum(tf.square(unit), axis=axes)
    alive = squared > 0
    norms = tf.where(alive, tf.sqrt(tf.where(alive, squared, 1.0)), 0.0)
    return tf.reshape(norms * tf.reshape(scale, tf.shape(norms)), (-1,))


def _is_named(layout: Any) -> bool:
    return isinstance(layout, str) and layout in LAYOUTS


def _order(layout: str, rank: int) -> list[list[int]]:
    """Return the axes of positions, of inputs and of outputs of a layout given by letters."""
    if not isinstance(layout, str) or len(layout) != rank or not set(layout) <= set("pio"):
        raise ValueError(
            f"layout must be one of {LAYOUTS}, or have a letter p, i or o for each of the kernel's "
            f"{rank} axes, got {layout!r}."
        )
    return [[axis for axis in range(rank) if layout[axis] == letter] for letter in "pio"]
