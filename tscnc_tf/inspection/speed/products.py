"""What a layer computes, with its kernel in the sparse formats that TensorFlow can multiply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf._keras import keras, tf_keras
from tscnc_tf.inspection.weights import KernelWeight

Product = Callable[[tf.Tensor], tf.Tensor]
WORTH_TRYING = 0.5  # with fewer zeros, a sparse product takes seconds to lose

_DENSE = (keras.layers.Dense, tf_keras.layers.Dense)
_CONV = tuple(
    getattr(library.layers, name)
    for library in (keras, tf_keras)
    for name in ("Conv1D", "Conv2D", "DepthwiseConv1D", "DepthwiseConv2D")
)


def obstacle(weight: KernelWeight) -> str:
    """Return why a kernel's layer has no sparse product to compare with, or an empty text."""
    layer, spec = weight.kernel.layer, weight.kernel.spec
    kind = type(layer).__name__
    readable = isinstance(layer, (*_DENSE, *_CONV)) and spec.layout != "transposed"
    if not readable:
        return f"no sparse kernel in TensorFlow for {kind}"
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        return f"no sparse kernel in TensorFlow for {kind} with channels first"
    zeros = float(np.mean(weight.values == 0))
    if zeros < WORTH_TRYING:
        return f"a sparse product is not tried at {100 * zeros:.3g} % zeros"
    return ""


def products(weight: KernelWeight) -> dict[str, Product]:
    """Return functions that compute what a layer computes, by the operation that multiplies.

    A convolution becomes one product of matrices: of its kernel and the patches of the image. A
    grouped or depthwise kernel is a matrix of blocks along the diagonal then.

    Args:
        weight: the kernel of a layer without an `obstacle`.
    """
    layer = weight.kernel.layer
    patches = _rows if isinstance(layer, _DENSE) else _patches(layer)
    dtype = tf.as_dtype(layer.compute_dtype)
    matrix = _matrix(weight.canonical(), dtype)
    multiply = {"tf.sparse.sparse_dense_matmul": _coordinates(matrix)}
    if dtype in (tf.float32, tf.float64):  # the only ones it takes
        multiply["tf.raw_ops.SparseMatrixMatMul"] = _compressed_rows(matrix)

    def whole(product: Product) -> Product:
        def compute(x: tf.Tensor) -> tf.Tensor:
            inputs = patches(x)
            outputs = product(tf.reshape(inputs, (-1, inputs.shape[-1])))
            outputs = tf.reshape(outputs, (*inputs.shape[:-1], matrix.shape[0]))
            if layer.use_bias:
                outputs = tf.nn.bias_add(outputs, tf.cast(layer.bias, dtype))
            return outputs if layer.activation is None else layer.activation(outputs)

        return compute

    return {name: whole(product) for name, product in multiply.items()}


def _matrix(kernel: np.ndarray, dtype: tf.DType) -> tf.SparseTensor:
    """Return `(groups, positions, inputs, outputs)` as a matrix (all outputs × all inputs)."""
    groups, positions, inputs, outputs = kernel.shape
    group, position, channel, output = np.nonzero(kernel)
    row = group * outputs + output
    column = (position * groups + group) * inputs + channel
    order = np.lexsort((column, row))
    return tf.SparseTensor(
        np.stack([row, column], axis=1)[order].astype(np.int64),
        tf.cast(kernel[kernel != 0][order], dtype),
        (groups * outputs, positions * groups * inputs),
    )


def _coordinates(matrix: tf.SparseTensor) -> Product:
    def multiply(rows: tf.Tensor) -> tf.Tensor:
        return tf.transpose(tf.sparse.sparse_dense_matmul(matrix, rows, adjoint_b=True))

    return multiply


def _compressed_rows(matrix: tf.SparseTensor) -> Product:
    @tf.function
    def convert() -> tf.Tensor:  # what a function returns keeps its shape, where a graph takes it
        return tf.raw_ops.SparseTensorToCSRSparseMatrix(
            indices=matrix.indices, values=matrix.values, dense_shape=matrix.dense_shape
        )

    compressed = convert()

    def multiply(rows: tf.Tensor) -> tf.Tensor:
        return tf.raw_ops.SparseMatrixMatMul(
            a=compressed, b=rows, transpose_b=True, transpose_output=True
        )

    return multiply


def _rows(x: tf.Tensor) -> tf.Tensor:
    return x


def _patches(layer: Any) -> Product:
    """Return `(batch, *positions, channels) -> (batch, *positions, patch)` for a convolution."""
    sizes, strides, rates = layer.kernel_size, layer.strides, layer.dilation_rate
    if len(sizes) == 1:
        sizes, strides, rates = ((1, *number) for number in (sizes, strides, rates))
    causal = (sizes[1] - 1) * rates[1] if layer.padding == "causal" else 0
    padding = "SAME" if layer.padding == "same" else "VALID"

    def extract(images: tf.Tensor) -> tf.Tensor:
        if tuple(sizes) == (1, 1):
            return images[:, :: strides[0], :: strides[1]]
        return tf.image.extract_patches(
            images, (1, *sizes, 1), (1, *strides, 1), (1, *rates, 1), padding
        )

    def compute(x: tf.Tensor) -> tf.Tensor:
        if len(layer.kernel_size) == 2:
            return extract(x)
        x = tf.pad(x, ((0, 0), (causal, 0), (0, 0))) if causal else x
        return tf.squeeze(extract(x[:, tf.newaxis]), axis=1)

    return compute
