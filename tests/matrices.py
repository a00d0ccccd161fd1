"""Matrices for the tests of docs/theory.md: drawn, of a spectrum, as layers; NumPy's SVD."""

from __future__ import annotations

import functools
import itertools
import math
import warnings

import keras
import numpy as np
import tensorflow as tf
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tscnc_tf as tscnc
from tscnc_tf import functional

SLACK = 1 + 1e-9
tries = settings(max_examples=60, deadline=None, derandomize=True)
few = settings(max_examples=15, deadline=None, derandomize=True)

seeds = st.integers(0, 10_000)
spectra = st.lists(st.floats(0.01, 100), min_size=1, max_size=8)


def entries(shape, low=-10.0, high=10.0):
    return hnp.arrays(np.float64, shape, elements=st.floats(low, high))


def pairs(low=-10.0, high=10.0):
    """A matrix and a mask of its shape, tall or wide."""
    shapes = st.tuples(st.integers(1, 7), st.integers(1, 7))
    masks = functools.partial(hnp.arrays, np.bool_)
    return shapes.flatmap(lambda shape: st.tuples(entries(shape, low, high), masks(shape)))


def svd(matrix):
    return np.linalg.svd(matrix, compute_uv=False)


def norm(matrix):
    return float(svd(matrix)[0])


def kappa(matrix):
    values = svd(matrix)
    return math.inf if values[-1] <= 1e-13 * values[0] else float(values[0] / values[-1])


def with_spectrum(values, rows=0, seed=0):
    """A tall matrix with these singular values, and random singular vectors."""
    rng, count = np.random.default_rng(seed), len(values)
    left = np.linalg.qr(rng.normal(size=(count + rows, count)))[0]
    right = np.linalg.qr(rng.normal(size=(count, count)))[0]
    return left * np.asarray(values) @ right.T


@functools.cache
def dense(inputs, outputs):
    """A Keras model of one dense kernel in float64, whatever was in it before."""
    layer = keras.layers.Dense(outputs, use_bias=False, name="kernel", dtype="float64")
    return keras.Sequential([keras.Input((inputs,), dtype="float64"), layer])


def report(matrix):
    """The package's own figures of a matrix."""
    model = dense(*matrix.shape)
    model.set_weights([matrix])
    return tscnc.inspection.condition_numbers(model).rows[0]


def pruned(matrix, sparsity):
    """The matrix after the package's pruning by magnitude."""
    model = dense(*matrix.shape)
    model.set_weights([matrix])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "At a sparsity of")  # filters die here, on purpose
        tscnc.prune_now(model, sparsity)
    return tscnc.strip(model).get_weights()[0]


def log_ratio(matrix, ridge=0.0):
    return float(functional.log_ratio(tf.constant(matrix, tf.float64), ridge=ridge))


def slope(function, value):
    value = tf.constant(value, tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(value)
        result = function(value)
    return tape.gradient(result, value).numpy()


def relu_network(library, widths, seed):
    """A network of dense layers and ReLUs, without biases, and its kernels."""
    layers, rng = library.layers, np.random.default_rng(seed)
    x = inputs = library.Input((widths[0],))
    for index, width in enumerate(widths[1:]):
        activation = "relu" if index < len(widths) - 2 else None
        x = layers.Dense(width, activation, use_bias=False)(x)
    model = library.Model(inputs, x)
    kernels = [rng.normal(size=shape) for shape in itertools.pairwise(widths)]
    model.set_weights(kernels)
    return model, kernels
