"""Which weights of a layer share a gate, by the layer's class."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import tensorflow as tf

from tscnc_tf import _keras
from tscnc_tf._keras import layers as kernel_layers

_CONVOLUTIONS = (
    *kernel_layers.CONVOLUTIONS,
    *kernel_layers.TRANSPOSED,
    *kernel_layers.DEPTHWISE,
    *kernel_layers.SEPARABLE,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Groups:
    """The groups of weights of a layer, one for each gate.

    Attributes:
        kind: "filter" (all that leads to one output channel) or "input" (all that reads one unit).
        kernel: the variable that the groups are parts of.
        bias: the variable that has a gate for each of its entries, too, or None.
        shape: that of the gates as they broadcast with the kernel.
    """

    kind: str
    kernel: Any
    bias: Any
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of groups."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """The number of weights of each group."""
        return math.prod(self.kernel.shape) // self.count

    def squared_norms(self) -> tf.Tensor:
        """Return the squared Euclidean norm of each group, as a float32 vector."""
        squares = tf.square(tf.cast(tf.convert_to_tensor(self.kernel), tf.float32))
        rank = len(self.kernel.shape)
        shape = (1,) * (rank - len(self.shape)) + self.shape
        axes = [axis for axis in range(rank) if shape[axis] == 1]
        return tf.reshape(tf.reduce_sum(squares, axis=axes), (-1,))


def kind_of(layer: Any) -> str:
    """Return the kind of groups of a layer that can have gates, else an empty text."""
    library = _keras.keras if _keras.flavour(layer) == "keras" else _keras.tf_keras
    if isinstance(layer, library.layers.Dense):
        return "input"
    classes = tuple(getattr(library.layers, name) for name in _CONVOLUTIONS)
    return "filter" if isinstance(layer, classes) else ""


def groups_of(layer: Any) -> Groups:
    """Return the groups of a built layer of a kind that can have gates."""
    kind = kind_of(layer)
    # A separable convolution has its filters in the last of its kernels.
    spec = kernel_layers.kernel_specs(layer)[-1]
    kernel = getattr(layer, spec.attribute)
    *_, first, last = kernel.shape
    if kind == "input":
        return Groups(kind, kernel, None, (first, 1))
    shapes = {"standard": (last,), "transposed": (first, 1), "depthwise": (first, last)}
    return Groups(kind, kernel, layer.bias, shapes[spec.layout])
