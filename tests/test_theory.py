"""Every inequality of docs/theory.md, tried to be broken: at random, and where it is tight.

NumPy's SVD is the oracle, beside the package's own figures. Where a bound has a constant, there is
a case in which a slightly smaller one fails.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import math
import pathlib
import re
import sys
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import FLAVOURS, conv_model
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tscnc_tf as tscnc
from tscnc_tf import functional

ROOT = pathlib.Path(__file__).parent.parent
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


@functools.cache
def example(name="theory"):
    """A module of examples/, by its name."""
    folder = str(ROOT / "examples")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


# Absolute amplification: norms.


@pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)
def test_t1_a_relu_network_stretches_no_more_than_the_product_of_its_norms(library, rng):
    model, kernels = relu_network(library, (5, 8, 6, 3), seed=1)
    rows = tscnc.inspection.condition_numbers(model).rows
    product = math.prod(row.sigma_max for row in rows)
    assert product == pytest.approx(math.prod(map(norm, kernels)), rel=1e-6)
    x = rng.normal(size=(2000, 5)).astype("float32")
    near = (x + 1e-2 * rng.normal(size=x.shape)).astype("float32")
    moved = np.linalg.norm(np.asarray(model(near)) - np.asarray(model(x)), axis=1)
    quotients = moved / np.linalg.norm(near - x, axis=1)
    assert np.max(quotients) <= product * (1 + 1e-4)
    assert np.max(quotients) < 0.9 * product  # loose, as the document says


@given(st.lists(st.integers(1, 6), min_size=2, max_size=4), seeds)
@tries
def test_t1_the_product_is_reached_where_singular_vectors_meet_and_are_not_negative(widths, seed):
    rng = np.random.default_rng(seed)
    meets = [np.abs(rng.normal(size=width)) for width in widths]
    meets = [vector / np.linalg.norm(vector) for vector in meets]
    scales = rng.uniform(0.1, 3, size=len(widths) - 1)
    kernels = [
        s * np.outer(a, b) for s, (a, b) in zip(scales, itertools.pairwise(meets), strict=True)
    ]
    value = meets[0]
    for kernel in kernels:
        value = np.maximum(value @ kernel, 0.0)
    product = math.prod(map(norm, kernels))
    assert np.linalg.norm(value) == pytest.approx(product, rel=1e-9)  # f(0) = 0, |x| = 1


def circular(kernel, size):
    """The matrix of a circular convolution of stride 1, position by position."""
    positions = list(np.ndindex(*size))
    inputs, outputs = kernel.shape[-2:]
    matrix = np.zeros((len(positions), outputs, len(positions), inputs))
    for row, place in enumerate(positions):
        for offset in np.ndindex(*kernel.shape[:-2]):
            read = tuple((np.add(place, offset)) % size)
            matrix[row, :, positions.index(read), :] += kernel[offset].T
    return matrix.reshape(len(positions) * outputs, -1)


@given(st.sampled_from([(1, 1), (2, 2), (3, 3), (3, 1)]), seeds)
@tries
def test_t2_the_norm_of_a_convolution_lies_between_that_of_its_kernel_and_a_multiple(width, seed):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(*width, *rng.integers(1, 4, size=2))) * rng.choice([0, 1, 3])
    matrix = kernel.reshape(-1, kernel.shape[-1])
    operator = norm(circular(kernel, (4, 4)))
    assert tscnc.inspection.operator_singular_values(kernel, (4, 4))[0] == pytest.approx(operator)
    assert norm(matrix) <= operator * SLACK
    assert operator <= math.sqrt(math.prod(width)) * norm(matrix) * SLACK + 1e-12


def test_t2_both_ends_are_reached():
    impulse, box = np.zeros((3, 3, 1, 1)), np.ones((3, 3, 1, 1))
    impulse[1, 1] = 1.0
    spectrum = tscnc.inspection.operator_singular_values
    assert spectrum(impulse, (5, 5))[0] == pytest.approx(norm(impulse.reshape(9, 1)))
    assert spectrum(box, (5, 5))[0] == pytest.approx(3 * norm(box.reshape(9, 1)))
    moving_sum = np.ones((2, 1, 1))
    assert kappa(moving_sum[:, 0]) == 1.0
    assert spectrum(moving_sum, 4)[-1] == pytest.approx(0.0, abs=1e-12)
    edge = np.array([1.0, -1.0]).reshape(2, 1, 1)
    assert norm(edge[:, 0]) == pytest.approx(math.sqrt(2))
    assert spectrum(edge, 1)[0] == 0.0  # an image smaller than the kernel wraps it around


def as_matrix(layer, size, channels):
    """The linear map that a layer is, from its action on every unit image."""
    units = np.eye(size * size * channels, dtype="float32")
    images = units.reshape(-1, size, size, channels)
    return np.asarray(layer(images)).reshape(len(units), -1)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("strides", [1, 2, 3])
@pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)
def test_t3_padding_and_strides_make_a_part_of_a_larger_circle(library, strides, padding, rng):
    for width in (2, 3):
        layer = library.layers.Conv2D(3, width, strides, padding=padding, use_bias=False)
        layer.build((None, 6, 6, 2))
        kernel = rng.normal(size=(width, width, 2, 3))
        layer.set_weights([kernel])
        found = norm(as_matrix(layer, 6, 2))
        larger = (6 + width - 1,) * 2
        assert found <= tscnc.inspection.operator_singular_values(kernel, larger)[0] * (1 + 1e-5)
        overlaps = math.ceil(width / strides) ** 2
        assert found <= math.sqrt(overlaps) * norm(kernel.reshape(-1, 3)) * (1 + 1e-5)
        if strides == width:  # patches side by side: the kernel's own norm, exactly
            assert found == pytest.approx(norm(kernel.reshape(-1, 3)), rel=1e-5)


def test_t3_the_factor_is_needed():
    layer = keras.layers.Conv2D(1, 3, padding="same", use_bias=False, kernel_initializer="ones")
    layer.build((None, 12, 12, 1))
    assert norm(as_matrix(layer, 12, 1)) > 0.95 * math.sqrt(9) * 3  # 3 is the kernel's norm


@given(pairs(), seeds)
@tries
def test_t4_batch_norm_scales_the_columns(pair, seed):
    rng = np.random.default_rng(seed)
    matrix = pair[0] if pair[0].shape[0] >= pair[0].shape[1] else pair[0].T
    gain = rng.uniform(0.1, 5, size=matrix.shape[1]) * rng.choice([-1, 1], size=matrix.shape[1])
    assert norm(matrix * gain) <= norm(matrix) * np.max(np.abs(gain)) * SLACK + 1e-12
    spread = np.max(np.abs(gain)) / np.min(np.abs(gain))
    if kappa(matrix) < 1e6:
        assert kappa(matrix) / spread <= kappa(matrix * gain) * (1 + 1e-6)
        assert kappa(matrix * gain) <= kappa(matrix) * spread * (1 + 1e-6)


@pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)
def test_t4_batch_norm_is_that_scaling_and_can_undo_or_make_any_condition(library, rng):
    layer = library.layers.BatchNormalization(epsilon=1e-3)
    layer.build((None, 2))
    gamma, variance = np.array([3.0, -2.0]), np.array([4.0, 0.25])
    layer.set_weights([gamma, *rng.normal(size=(2, 2)), variance])
    x, y = rng.normal(size=(2, 5, 2)).astype("float32")
    moved = np.asarray(layer(x, training=False)) - np.asarray(layer(y, training=False))
    gain = gamma / np.sqrt(variance + 1e-3)
    np.testing.assert_allclose(moved, (x - y) * gain, rtol=1e-4, atol=1e-5)
    assert kappa(np.diag([1.0, 100.0]) * [100.0, 1.0]) == pytest.approx(1.0)
    assert kappa(np.eye(2) * [100.0, 1.0]) == pytest.approx(100.0)


# What pruning does to norms.


@given(pairs(), st.sampled_from([0.25, 0.5, 0.75]))
@few
def test_t5_pruning_lowers_the_frobenius_norm_and_magnitude_keeps_its_share(pair, sparsity):
    matrix, mask = pair
    whole = np.linalg.norm(matrix)
    assert np.linalg.norm(matrix * mask) <= whole * SLACK
    assume(np.all(np.abs(matrix[matrix != 0]) > 1e-100))
    kept = pruned(matrix, sparsity)
    count = max(round(matrix.size * (1 - sparsity)), 1)
    share = np.linalg.norm(kept) ** 2
    assert share >= count / matrix.size * whole**2 / SLACK
    assert share == pytest.approx(np.sum(np.sort(matrix.ravel() ** 2)[matrix.size - count :]))


def test_t5_equal_weights_keep_no_more_than_their_share():
    assert np.linalg.norm(pruned(np.ones((4, 5)), 0.5)) ** 2 == pytest.approx(10.0)


@given(pairs())
@tries
def test_t6_bounds_of_the_spectral_norm_under_a_mask(pair):
    matrix, mask = pair
    left = matrix * mask
    columns, rows = np.abs(left).sum(axis=0).max(), np.abs(left).sum(axis=1).max()
    bound = min(np.linalg.norm(left), math.sqrt(columns * rows), norm(np.abs(left)))
    assert norm(np.abs(left)) <= norm(np.abs(matrix)) * SLACK + 1e-12
    assert norm(left) <= bound * SLACK + 1e-12
    assert norm(left) >= np.sqrt((left**2).sum(axis=0).max()) / SLACK - 1e-12


@given(pairs(low=0.0))
@tries
def test_t6_without_negative_weights_pruning_only_lowers_the_spectral_norm(pair):
    matrix, mask = pair
    assert norm(matrix * mask) <= norm(matrix) * SLACK + 1e-12


def test_t6_each_bound_is_reached():
    rank_one = np.outer([1.0, -2.0, 0.5], [3.0, 1.0])
    assert norm(rank_one) == pytest.approx(np.linalg.norm(rank_one))
    signs = np.array([[1.0, 1.0], [-1.0, -1.0]])
    assert norm(signs) == pytest.approx(math.sqrt(2 * 2))
    assert norm(np.eye(5)) == pytest.approx(1.0)  # where the Frobenius norm is sqrt(5)


def hadamard(size):
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def test_t7_pruning_the_smallest_weight_raises_the_spectral_norm():
    matrix = np.array([[1.0, 1.0], [1.0, -0.9]])
    left = pruned(matrix, 0.25)
    np.testing.assert_array_equal(left, [[1, 1], [1, 0]])
    assert report(matrix).sigma_max == pytest.approx(1.4293, abs=1e-4)
    assert report(left).sigma_max == pytest.approx((1 + math.sqrt(5)) / 2)


@given(pairs())
@tries
def test_t7_it_rises_by_no_more_than_the_root_of_the_rank(pair):
    matrix, mask = pair
    rank = np.linalg.matrix_rank(matrix)
    assert norm(matrix * mask) <= math.sqrt(rank) * norm(matrix) * SLACK + 1e-9


@pytest.mark.parametrize("size", [4, 16, 64])
def test_t7_half_of_that_is_reached(size):
    matrix = hadamard(size)
    assert norm(matrix) == pytest.approx(math.sqrt(size))
    assert norm(matrix * (matrix > 0)) >= (size + 1) / 2
    matrix[matrix < 0] *= 1 - 1e-6  # so that these are the smallest
    left = pruned(matrix, (1 - 1 / size) / 2)
    assert np.all(left >= 0)
    assert norm(left) / norm(matrix) >= 0.5 * math.sqrt(size)


# Relative amplification: condition numbers.


@given(spectra, st.integers(0, 4), seeds)
@tries
def test_t8_relative_amplification_is_at_most_the_condition_number(values, rows, seed):
    matrix, rng = with_spectrum(values, rows, seed), np.random.default_rng(seed)
    condition = report(matrix).condition_number
    assert condition == pytest.approx(max(values) / min(values), rel=1e-6)
    length = np.linalg.norm
    left, _, _ = np.linalg.svd(matrix, full_matrices=False)
    noise, x = rng.normal(size=(2, len(matrix)))
    seen = left @ (left.T @ x)  # what the layer can see of x
    assume(length(seen) > 1e-3)
    amplified = (length(noise @ matrix) / length(x @ matrix)) / (length(noise) / length(x))
    assert amplified <= condition * length(x) / length(seen) * (1 + 1e-6)
    amplified = (length(noise @ matrix) / length(seen @ matrix)) / (length(noise) / length(seen))
    assert amplified <= condition * (1 + 1e-6)
    worst = length(left[:, 0] @ matrix) / length(left[:, -1] @ matrix)
    assert worst == pytest.approx(condition, rel=1e-6)


def test_t8_outside_of_the_range_the_condition_number_bounds_nothing():
    matrix = np.array([[1.0], [0.0]])  # two inputs, one output: condition number 1
    assert report(matrix).condition_number == 1.0
    x, noise = np.array([1e-3, 1.0]), np.array([1.0, 0.0])
    amplified = np.linalg.norm(noise @ matrix) / np.linalg.norm(x @ matrix) * np.linalg.norm(x)
    assert amplified == pytest.approx(1000.0, rel=1e-5)


@given(spectra, seeds, st.floats(0.0, 0.999))
@tries
def test_t9_the_inverse_condition_number_is_the_distance_to_rank_deficiency(values, seed, share):
    matrix = with_spectrum(values, 2, seed)
    left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
    away = np.random.default_rng(seed).normal(size=matrix.shape)
    away *= share * sigma[-1] / norm(away)
    assert svd(matrix + away)[-1] >= sigma[-1] - norm(away) - 1e-9 * sigma[0]
    nearest = -sigma[-1] * np.outer(left[:, -1], right[-1])
    assert norm(nearest) / sigma[0] == pytest.approx(1 / kappa(matrix), rel=1e-6)
    assert svd(matrix + nearest)[-1] <= 1e-12 * sigma[0]


@given(pairs())
@tries
def test_t9_what_pruning_takes_away_bounds_the_condition_number_after_it(pair):
    matrix, mask = pair
    before, after = svd(matrix), svd(matrix * mask)
    gone = norm(matrix * ~mask)
    assert np.all(np.abs(after - before) <= gone + 1e-9)
    if gone < 0.99 * before[-1]:
        assert kappa(matrix * mask) <= (before[0] + gone) / (before[-1] - gone) * (1 + 1e-6)


def test_t9_nine_tenths_of_what_is_taken_away_would_not_do():
    matrix = np.array([[3.0, 0.0], [0.0, 0.01], [0.0, 1.0]])
    mask = np.array([[1, 1], [1, 1], [1, 0]])
    gone = norm(matrix * (1 - mask))
    assert svd(matrix * mask)[-1] < svd(matrix)[-1] - 0.9 * gone


def test_t9_how_far_that_reaches_for_orthonormal_columns(rng):
    def taken(matrix, sparsity):
        return norm(matrix - pruned(matrix, sparsity))

    tall = np.linalg.qr(rng.normal(size=(576, 64)))[0]
    square = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    assert 0.9 < taken(tall, 0.9) < 1.0 < taken(tall, 0.95)
    assert taken(square, 0.7) < 1.0 < taken(square, 0.8)
    assert kappa(pruned(tall, 0.9)) == pytest.approx(1.8, abs=0.1)


def test_t10_pruning_can_cure_a_condition_number_and_make_it_infinite():
    matrix = np.array([[1.0, 0.9], [0.9, 1.0]])
    assert report(matrix).condition_number == pytest.approx(19.0)
    assert report(pruned(matrix, 0.5)).condition_number == 1.0
    assert report(pruned(np.diag([2.0, 1.0]) + 0.1, 0.75)).condition_number == math.inf
    perfect = hadamard(4)
    assert report(perfect).condition_number == pytest.approx(1.0)
    perfect[perfect < 0] *= 1 - 1e-6  # so that these are the smallest
    left = pruned(perfect, 6 / 16)
    assert report(left).condition_number == pytest.approx(2 + math.sqrt(3))


@pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)
def test_t11_a_dead_filter_makes_it_infinite_and_changes_nothing_when_it_is_taken_out(library, rng):
    model = conv_model(library)
    kernel = model.get_layer("conv").get_weights()
    kernel[0][..., 2] = 0.0
    model.get_layer("conv").set_weights(kernel)
    conditions = {row.name: row for row in tscnc.inspection.condition_numbers(model).rows}
    assert conditions["conv"].condition_number == math.inf
    assert conditions["conv"].dead_filters == 1
    smaller = tscnc.pruning.compact(model).model
    rows = {row.name: row for row in tscnc.inspection.condition_numbers(smaller).rows}
    assert rows["conv"].shape == (9, 5)
    living = np.delete(kernel[0].reshape(9, 6), 2, axis=1)
    assert rows["conv"].condition_number == pytest.approx(kappa(living), rel=1e-5)
    x = rng.uniform(size=(8, 8, 8, 1)).astype("float32")
    np.testing.assert_allclose(model(x), smaller(x), rtol=1e-4, atol=1e-5)


def test_t11_in_a_kernel_with_more_outputs_than_inputs_a_dead_filter_does_not_show(rng):
    matrix = rng.normal(size=(3, 6))
    matrix[:, 1] = 0.0
    row = report(matrix)
    assert row.dead_filters == 1
    assert row.condition_number == pytest.approx(kappa(np.delete(matrix, 1, axis=1)))


@given(spectra, seeds)
@tries
def test_t12_the_stable_rank_lies_between_what_condition_number_and_rank_allow(values, seed):
    row = report(with_spectrum(values, 1, seed))
    least = 1 + (len(values) - 1) / row.condition_number**2
    assert least / (1 + 1e-6) <= row.stable_rank <= row.rank * (1 + 1e-9)
    assert row.stable_rank == pytest.approx(np.sum(np.square(values)) / max(values) ** 2)


def test_t12_both_ends_are_reached():
    assert report(with_spectrum([4.0, 1.0, 1.0])).stable_rank == pytest.approx(1 + 2 / 16)
    assert report(with_spectrum([2.0, 2.0, 2.0])).stable_rank == pytest.approx(3.0)


# The condition number constraint.


@given(spectra, seeds, st.floats(1e-6, 1e6))
@tries
def test_t13_the_constraint_is_not_negative_and_knows_neither_scale_nor_rotation(values, seed, s):
    matrix = with_spectrum(values, 2, seed)
    squares = np.square(values)
    expected = math.log(np.mean(squares)) - np.mean(np.log(squares))
    rounding = 1e-9 + 1e-15 * np.max(squares) / np.min(squares)  # of λₙ, beside λ₁
    assert log_ratio(matrix) == pytest.approx(expected, abs=rounding)
    assert log_ratio(matrix) >= 0.0
    turned = s * with_spectrum(np.ones(len(matrix)), 0, seed + 1) @ matrix
    assert log_ratio(turned) == pytest.approx(expected, abs=10 * rounding)
    turned = matrix @ with_spectrum(np.ones(len(values)), 0, seed + 2)
    assert log_ratio(turned) == pytest.approx(expected, abs=10 * rounding)


@given(st.floats(1.0, 1.5), st.integers(2, 8), seeds)
@tries
def test_t13_it_is_zero_where_the_condition_number_is_one_and_nowhere_else(top, count, seed):
    value = log_ratio(with_spectrum([top] + [1.0] * (count - 1), 1, seed))
    # Of n eigenvalues one is off by a factor of h: at least (n-1) log(h)^2 / (2 n^2 h).
    least = (count - 1) * math.log(top**2) ** 2 / (2 * count**2 * top**2)
    assert value >= least * (1 - 1e-6) - 1e-12
    if top == 1.0:
        assert value == pytest.approx(0.0, abs=1e-12)


@given(spectra, seeds)
@tries
def test_t14_the_constraint_bounds_the_condition_number(values, seed):
    matrix, count = with_spectrum(values, 1, seed), len(values)
    growth, condition = math.exp(count * log_ratio(matrix) / 2), report(matrix).condition_number
    assert (condition + 1 / condition) / 2 <= growth * (1 + 1e-6)
    assert condition <= (growth + math.sqrt(max(growth**2 - 1, 0.0))) * (1 + 1e-4)
    assert condition < 2 * growth


@pytest.mark.parametrize("count", [2, 3, 7])
def test_t14_the_bound_is_reached_and_nothing_below_2_would_do(count):
    ends = np.array([100.0**2, 1.0])
    eigenvalues = np.concatenate([ends, np.full(count - 2, np.mean(ends))])
    growth = math.exp(count * log_ratio(with_spectrum(np.sqrt(eigenvalues))) / 2)
    assert growth == pytest.approx((100 + 1 / 100) / 2)
    assert 1.999 * growth < 100.0


def specht(h):
    """The largest ratio of arithmetic to geometric mean of numbers that lie within a factor h."""
    power = h ** (1 / (h - 1))
    return power / (math.e * math.log(power))


@given(spectra, seeds)
@tries
def test_t15_the_condition_number_bounds_the_constraint(values, seed):
    matrix = with_spectrum(values, 1, seed)
    value, condition = log_ratio(matrix), report(matrix).condition_number
    assert value <= math.log(condition) ** 2 / 2 + 1e-8
    assert value <= 2 * math.log(condition) + 1e-8
    if condition > 1.01:
        assert value <= math.log(specht(condition**2)) + 1e-6
        assert math.log(specht(condition**2)) <= math.log(condition) ** 2 / 2 + 1e-9


def test_t15_a_half_is_needed_near_1_and_specht_is_reached_everywhere():
    near = log_ratio(np.diag([1.02, 1.0]))
    assert near > 0.499 * math.log(1.02) ** 2
    for condition in (2.0, 10.0):
        h = condition**2
        share = ((h - 1) / math.log(h) - 1) / (h - 1)  # of eigenvalues that are h; the others are 1
        count = 200
        many = round(share * count)
        spread = np.concatenate([np.full(many, condition), np.ones(count - many)])
        assert log_ratio(np.diag(spread)) == pytest.approx(math.log(specht(h)), rel=1e-2)


@given(spectra.filter(lambda values: len(values) > 1), seeds)
@tries
def test_t16_the_gradient_of_the_constraint(values, seed):
    matrix, count = with_spectrum(values, 2, seed), len(values)
    gram = matrix.T @ matrix
    expected = 2 * matrix / np.trace(gram) - 2 / count * matrix @ np.linalg.inv(gram)
    found = slope(lambda m: functional.log_ratio(m, ridge=0.0), matrix)
    size = np.linalg.norm(expected)
    np.testing.assert_allclose(found, expected, atol=1e-6 * size + 1e-9)
    assert abs(np.sum(found * matrix)) <= 1e-6 * (1 + size * np.linalg.norm(matrix))
    left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
    along = np.einsum("pi,pn,in->i", left, found, right)
    mean = np.mean(sigma**2)
    clear = np.abs(sigma**2 - mean) > 1e-3 * mean
    assert np.all((along > 0)[clear] == (sigma**2 > mean)[clear])


def test_t16_the_gradient_is_the_limit_of_differences(rng):
    matrix, way = rng.normal(size=(2, 6, 4))
    spectrum = [np.square(svd(matrix + step * way)) for step in (1e-5, -1e-5)]
    up, down = (math.log(np.mean(values)) - np.mean(np.log(values)) for values in spectrum)
    found = np.sum(way * slope(lambda m: functional.log_ratio(m, ridge=0.0), matrix))
    assert found == pytest.approx((up - down) / 2e-5, rel=1e-6)


@given(pairs(), st.sampled_from([1e-6, 1e-3, 1.0]))
@tries
def test_t17_a_ridge_lowers_the_constraint_and_caps_it(pair, ridge):
    matrix = pair[0] if pair[0].shape[0] >= pair[0].shape[1] else pair[0].T
    value, squares = log_ratio(matrix, ridge), np.square(svd(matrix))
    assert 0.0 <= value <= math.log((1 + ridge) / ridge) + 1e-9
    assume(squares[0] > 1e-6)
    squares = squares * len(squares) / np.sum(squares)
    lifted = squares + ridge
    expected = math.log(np.mean(lifted)) - np.mean(np.log(lifted))
    assert value == pytest.approx(expected, abs=1e-6)
    if squares[-1] > 1e-6:
        assert value <= math.log(np.mean(squares)) - np.mean(np.log(squares)) + 1e-6
    growth = math.exp(len(squares) * value / 2)
    assert math.sqrt(lifted[0] / lifted[-1]) < 2 * growth * (1 + 1e-6)


def test_t17_the_zero_matrix_reaches_the_cap_and_a_dead_column_leaves_its_value_finite():
    assert log_ratio(np.zeros((3, 2)), 1e-3) == pytest.approx(math.log(1001))
    dead = log_ratio(np.diag([1.0, 0.0]), 1e-3)
    assert dead == pytest.approx(math.log(1.001) - (math.log(2.001) + math.log(1e-3)) / 2)


@pytest.mark.parametrize("dead", [1, 4])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2])
def test_t17_of_a_kernel_with_dead_filters_those_that_live_are_trained(dead, ridge, rng):
    def cost(matrix, ridge):
        variable = tf.Variable(matrix)
        with tf.GradientTape() as tape:
            value = functional.log_ratio(variable, ridge)
        return float(value), tape.gradient(value, variable).numpy()

    n, matrix = 6, rng.normal(size=(9, 6))
    alive = rng.permutation(n) >= dead
    share = alive.mean()
    whole, pull = cost(matrix * alive, ridge)
    part, pull_of_part = cost(matrix[:, alive], share * ridge)
    constant = math.log1p(ridge) - (1 - share) * math.log(ridge)
    constant -= share * (math.log1p(share * ridge) - math.log(share))
    assert whole == pytest.approx(share * part + constant, rel=1e-12)
    np.testing.assert_allclose(pull[:, alive], share * pull_of_part, rtol=1e-9)
    np.testing.assert_array_equal(pull[:, ~alive], 0)


# The sparse constraint, the authors' form, and gates.


@given(st.floats(-50, 50), st.floats(-50, 50), st.floats(0.01, 100))
@tries
def test_t18_bounds_of_the_transformed_l1(x, y, a):
    def t(value):
        return float(functional.transformed_l1(tf.constant(value, tf.float64), a))

    size = abs(x)
    assert 0.0 <= t(x) < a + 1
    assert t(x) - size == pytest.approx(size * (1 - size) / (a + size), abs=1e-9)
    assert (t(x) >= size - 1e-12) if size <= 1 else (t(x) <= size + 1e-12)
    assert abs(t(x) - size) <= size * abs(1 - size) / a + 1e-9
    if size > 1e-3:
        assert abs(t(x) - 1) <= a * abs(1 - 1 / size) + 1e-9
    middle = (abs(x) + abs(y)) / 2
    assert t(middle) >= (t(x) + t(y)) / 2 - 1e-9
    assert t(x + y) <= t(abs(x) + abs(y)) + 1e-9
    assert t(abs(x) + abs(y)) <= t(x) + t(y) + 1e-9


def test_t18_the_slope_and_what_it_prefers():
    x = np.array([0.0, 0.25, 1.0, 4.0])
    found = slope(lambda value: tf.reduce_sum(functional.transformed_l1(value, 0.5)), x[1:])
    np.testing.assert_allclose(found, 1.5 * 0.5 / (0.5 + x[1:]) ** 2)
    near_zero = float(functional.transformed_l1(1e-9, 0.5)) / 1e-9
    assert near_zero == pytest.approx(1.5 / 0.5, rel=1e-6)
    even, sparse = np.full(4, 0.5), np.array([2.0, 0.0, 0.0, 0.0])
    total = [float(tf.reduce_sum(functional.transformed_l1(v, 0.5))) for v in (even, sparse)]
    assert total[1] < total[0]
    assert np.sum(even) == np.sum(sparse)
    peaked, paired = np.array([0.98, 0.01, 0.01]), np.array([0.5, 0.5, 0.0])
    total = [float(tf.reduce_sum(functional.transformed_l1(v, 1.0))) for v in (peaked, paired)]
    assert total[0] < total[1], "more zeros, and yet dearer"


@given(st.lists(st.floats(0.2, 3), min_size=1, max_size=5), seeds)
@tries
def test_t19_the_gradient_of_the_authors_form_vanishes_with_the_determinant(values, seed):
    nu, matrix, count = 1e-5, with_spectrum(values, 2, seed), len(values)
    gram = matrix.T @ matrix
    det = np.linalg.det(gram / count)
    expected = 4 * math.log(nu + det) * det / (nu + det) * matrix @ np.linalg.inv(gram)
    found = slope(functional.authors_penalty, matrix)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    bound = 4 * abs(math.log(nu + det)) * det / nu * math.sqrt(count) / min(values)
    assert np.linalg.norm(found) <= bound * (1 + 1e-5)
    lengths = np.square(np.linalg.norm(matrix, axis=0))
    assert det <= np.prod(lengths) / count**count * SLACK
    assert float(functional.authors_penalty(matrix)) == pytest.approx(math.log(nu + det) ** 2)


def test_t19_where_the_determinant_goes_under(rng):
    assert np.float32(30.0**-30) > 0.0
    assert np.float32(31.0**-31) == 0.0
    orthogonal = np.linalg.qr(rng.normal(size=(64, 31)))[0]  # unit columns: Hadamard's equality
    assert np.linalg.det(orthogonal.T @ orthogonal / 31) == pytest.approx(31.0**-31)
    assert np.linalg.det((orthogonal.T @ orthogonal / 31).astype("float32")) == 0.0
    assert float(functional.authors_penalty(orthogonal)) == pytest.approx(132.547, abs=1e-3)
    assert np.abs(slope(functional.authors_penalty, orthogonal)).max() < 1e-37
    uneven, even = (float(functional.authors_penalty(np.diag(d))) for d in ([4, 0.25], [1.0, 1.0]))
    assert uneven == pytest.approx(even)


BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gates(log_alpha, u):
    s = sigmoid((np.log(u) - np.log1p(-u) + log_alpha) / BETA)
    return np.clip(s * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def open_chance(log_alpha, t=0.0):
    """The chance that a gate is above t, for 0 <= t < 1."""
    place = (t - GAMMA) / (ZETA - GAMMA)
    return sigmoid(log_alpha - BETA * np.log(place / (1 - place)))


@pytest.mark.parametrize("log_alpha", [-4.0, -1.0, 0.0, 0.8, 3.0])
def test_t20_a_gate_opens_as_often_as_the_formula_says(log_alpha):
    u = (np.arange(400_000) + 0.5) / 400_000  # not drawn, but laid out evenly
    z = gates(log_alpha, u)
    assert np.mean(z > 0) == pytest.approx(open_chance(log_alpha), abs=1e-5)
    assert open_chance(log_alpha) == pytest.approx(
        sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))
    )
    assert np.mean(z >= 1) == pytest.approx(
        1 - sigmoid(BETA * math.log((1 - GAMMA) / (ZETA - 1)) - log_alpha), abs=1e-5
    )
    t = (np.arange(20_000) + 0.5) / 20_000
    assert np.mean(z) == pytest.approx(np.mean(open_chance(log_alpha, t)), abs=1e-5)


@given(st.floats(-4, 4), st.floats(0.0, 5.0), st.floats(0.1, 10.0))
@tries
def test_t20_the_constraint_on_the_chance_is_above_the_expected_constraint(log_alpha, size, a):
    z = gates(log_alpha, (np.arange(20_000) + 0.5) / 20_000)

    def t(value):
        return np.asarray(functional.transformed_l1(np.asarray(value, float), a))

    chance = open_chance(log_alpha)
    expected = np.mean(t(z * size))
    assert expected <= t(np.mean(z) * size) + 1e-9
    assert t(np.mean(z) * size) <= t(chance * size) + 1e-4
    assert chance * t(size) <= t(chance * size) + 1e-9
    assert np.mean(t((z > 0) * size)) == pytest.approx(chance * t(size), abs=1e-3)


def test_t20_the_gate_of_inference_is_not_the_expected_one():
    inference = np.clip(sigmoid(-1.5) * (ZETA - GAMMA) + GAMMA, 0, 1)
    expected = np.mean(gates(-1.5, (np.arange(20_000) + 0.5) / 20_000))
    assert expected > 1.5 * inference


@given(entries(16), st.floats(0.05, 1.0), st.floats(1e-3, 1.0))
@tries
def test_t20_batch_normalisation_divides_a_gate_out(y, z, epsilon):
    d, v = y - y.mean(), y.var()
    assume(v > 1e-2)

    def normalised(z, epsilon=epsilon):
        outputs = z * y
        return (outputs - outputs.mean()) / np.sqrt(outputs.var() + epsilon)

    slope = (normalised(z + 1e-6) - normalised(z - 1e-6)) / 2e-6
    formula = d * epsilon / (z**2 * v + epsilon) ** 1.5
    np.testing.assert_allclose(slope, formula, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(normalised(z, 0.0), normalised(1.0, 0.0), rtol=1e-9, atol=1e-9)
    assert not normalised(0.0).any()


@pytest.mark.parametrize("log_alpha", [0.85, -0.5])
def test_t20_before_batch_normalisation_rare_draws_carry_the_gradient(log_alpha):
    count, h = 1_000_000, 1e-3
    u = (np.arange(count) + 0.5) / count

    def drawn(log_alpha, epsilon):
        """Gates, and the square of what is normalised of outputs of variance 1, as a loss."""
        z = functional.hard_concrete(tf.cast(log_alpha, tf.float64), u)
        return z, z**2 / (z**2 + epsilon)

    def slope(epsilon):
        above, below = (drawn(log_alpha + step, epsilon)[1] for step in (h, -h))
        return np.mean(above - below) / (2 * h)

    # Each draw has a log alpha of its own, so that each draw's gradient is seen.
    place = tf.fill([count], np.float64(log_alpha))
    with tf.GradientTape() as tape:
        tape.watch(place)
        z, loss = drawn(place, 1e-5)
    each = np.asarray(tape.gradient(loss, place))
    assert np.mean(each) == pytest.approx(slope(1e-5), rel=1e-3)
    chance = open_chance(log_alpha)
    assert slope(1e-5) == pytest.approx(chance * (1 - chance), rel=4e-2)
    assert slope(1e-7) == pytest.approx(chance * (1 - chance), rel=4e-3)
    # Few draws have all but a tenth of it; the usual one has next to nothing.
    near = (z > 0) & (z < 10 * math.sqrt(1e-5))
    assert np.mean(near) < 0.05
    assert np.sum(each[near]) > 0.9 * np.sum(each)
    assert np.median(each) < 1e-3 * np.mean(each)
    if log_alpha == 0.85:
        assert 1 / np.mean((z > 0) & (z < math.sqrt(1e-5))) == pytest.approx(600, rel=0.05)


# Local Lipschitz constants and margins.


def exact(matrix):
    """The largest l1 of the outputs over linf of the inputs of a linear map, over all corners."""
    corners = np.array(list(itertools.product([-1.0, 1.0], repeat=len(matrix))))
    return float(np.max(np.sum(np.abs(corners @ matrix), axis=1)))


@given(entries((4, 3)), entries((4,), 0.3, 0.7), seeds)
@tries
def test_t21_within_margin_over_lipschitz_no_prediction_changes(matrix, x, seed):
    logits = x @ matrix
    order = np.sort(logits)
    assume(exact(matrix) > 1e-3 and order[-1] - order[-2] > 1e-3)
    radius = (order[-1] - order[-2]) / exact(matrix)
    corners = np.array(list(itertools.product([-1.0, 1.0], repeat=4)))
    inner = np.random.default_rng(seed).uniform(-1, 1, size=(100, 4))
    for moved in (x + 0.999 * radius * step for step in (*corners, *inner)):
        assert np.argmax(moved @ matrix) == np.argmax(logits)


@given(entries((5,)), entries((5,), 0.3, 0.7))
@tries
def test_t21_for_two_opposite_logits_the_radius_is_exact(weights, x):
    assume(np.abs(weights).sum() > 1e-2 and abs(weights @ x) > 1e-3)
    matrix = np.stack([weights, -weights], axis=1)
    logits = x @ matrix
    radius = abs(logits[0] - logits[1]) / exact(matrix)
    beyond = x - 1.001 * radius * np.sign(weights) * np.sign(weights @ x)
    assert np.argmax(beyond @ matrix) != np.argmax(logits)


def test_t21_an_attack_within_the_certified_radius_finds_nothing(rng):
    model, _ = relu_network(keras, (6, 8, 3), seed=3)
    x = rng.uniform(0.2, 0.8, size=(50, 6)).astype("float32")
    logits = np.asarray(model(x))
    order = np.sort(logits, axis=1)
    lipschitz = math.sqrt(3 * 6) * example().upper_bound(model)
    radius = float(np.median((order[:, -1] - order[:, -2]) / lipschitz))
    safe = (order[:, -1] - order[:, -2]) / lipschitz >= radius
    attack = tscnc.attacks.PGD(epsilon=radius, step_size=radius / 4, steps=20)
    found = tscnc.evaluate_robustness(
        model, x[safe], np.argmax(logits[safe], axis=1), attack, progress=False
    )
    assert found.robust_accuracy == 1.0


def test_t21_the_constant_that_ascent_finds_certifies_nothing():
    def cliff(x):
        return tf.concat([1000.0 * tf.nn.relu(x - 0.599), 0.1 * tf.ones_like(x)], axis=1)

    x = np.full((20, 1), 0.5, "float32")
    found = tscnc.inspection.local_lipschitz(cliff, x, epsilon=0.1).values
    flat = x[found == 0.0]
    assert len(flat) >= 15  # ascent sees a constant, whose radius would be infinite
    assert np.all(np.argmax(cliff(flat), axis=1) == 1)
    assert np.all(np.argmax(cliff(flat + 0.1), axis=1) == 0)


@given(entries((4, 3)))
@few
def test_t22_what_is_found_is_below_the_true_constant_and_that_below_the_bound(matrix):
    assume(exact(matrix) > 1e-3)

    def linear(x):
        return tf.matmul(x, tf.constant(matrix, tf.float32))

    found = tscnc.inspection.local_lipschitz(linear, np.full((8, 4), 0.5), epsilon=0.2).maximum
    assert found <= exact(matrix) * (1 + 1e-4)
    assert found >= 0.5 * exact(matrix)
    assert exact(matrix) <= np.abs(matrix).sum() * SLACK
    assert exact(matrix) <= math.sqrt(4 * 3) * norm(matrix) * SLACK


def test_t22_the_factor_between_the_norms_is_needed():
    ones = np.ones((5, 3))
    assert exact(ones) == 15.0
    assert math.sqrt(5 * 3) * norm(ones) == pytest.approx(15.0)
    found = tscnc.inspection.local_lipschitz(
        lambda x: tf.matmul(x, tf.ones((5, 3))), np.full((4, 5), 0.5), epsilon=0.1
    )
    assert found.maximum == pytest.approx(15.0, rel=1e-4)


@pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)
def test_t22_the_bound_of_the_example_holds_for_a_convolutional_network(library, rng):
    model = conv_model(library)
    model.set_weights([rng.uniform(-1, 2, size=w.shape) for w in model.get_weights()])
    norm_layer = model.get_layer("norm")
    gamma, beta, mean, variance = norm_layer.get_weights()
    norm_layer.set_weights([gamma, beta, mean, np.abs(variance) + 0.1])
    require_bound(model, rng)


@pytest.mark.parametrize("name", FLAVOURS)
def test_t22_the_bound_of_the_example_holds_for_the_chains_of_applications(name, rng):
    images = {
        "input_shape": (8, 8, 1),
        "classes": 3,
        "mean": (0.5,),
        "std": (0.25,),
        "library": name,
    }
    require_bound(tscnc.applications.SmallCNN(width=4, seed=1, **images), rng)
    residual = tscnc.applications.ResNet20(**images)
    assert math.isnan(example().upper_bound(residual))


def require_bound(model, rng):
    """Make sure that no two images and no ascent show a model to be steeper than its bound."""
    bound = example().upper_bound(model)
    x = rng.uniform(size=(64, 8, 8, 1)).astype("float32")
    y = np.clip(x + 0.1 * rng.normal(size=x.shape), 0, 1).astype("float32")
    moved = np.linalg.norm(np.asarray(model(x)) - np.asarray(model(y)), axis=1)
    assert np.max(moved / np.linalg.norm((x - y).reshape(64, -1), axis=1)) <= bound
    found = tscnc.inspection.local_lipschitz(model, x, epsilon=0.1).maximum
    assert found <= math.sqrt(64 * 3) * bound


def test_t22_the_bound_of_the_example_is_exact_for_one_layer_and_unknown_for_strange_ones():
    upper_bound, layers = example().upper_bound, keras.layers
    matrix = np.arange(6.0).reshape(3, 2)
    single = keras.Sequential([keras.Input((3,)), layers.Dense(2, use_bias=False)])
    single.set_weights([matrix])
    assert upper_bound(single) == pytest.approx(norm(matrix))
    scaled = keras.Sequential([*single.layers, layers.BatchNormalization(epsilon=0.0)])
    scaled.build((None, 3))
    scaled.layers[-1].set_weights(list(np.array([[5.0, 1.0], [0, 0], [0, 0], [4.0, 1.0]])))
    assert upper_bound(scaled) == pytest.approx(norm(matrix * [2.5, 1.0]))
    std = layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[4.0, 0.25, 1.0])
    first = keras.Sequential([keras.Input((3,)), std, layers.Activation("relu")])
    assert upper_bound(first) == pytest.approx(2.0)
    for size, stride, known in ((2, 2, 1.0), (2, 3, 1.0), (3, 2, math.nan)):
        pool = layers.MaxPooling2D(size, stride, padding="same")
        pooled = keras.Sequential([keras.Input((6, 6, 2)), pool])
        assert upper_bound(pooled) == pytest.approx(known, nan_ok=True)
    bent = keras.Sequential([keras.Input((3,)), layers.Dense(2, activation="gelu")])
    assert math.isnan(upper_bound(bent))
    inputs, dense = keras.Input((3,)), layers.Dense(3)
    chain = keras.Model(inputs, layers.ReLU()(dense(inputs)))
    assert upper_bound(chain) == pytest.approx(norm(dense.kernel.numpy()))
    for outputs in (dense(dense(inputs)), layers.Dense(3)(inputs) + inputs):
        assert math.isnan(upper_bound(keras.Model(inputs, outputs)))


def test_the_example_takes_networks_and_data_of_ones_own(tmp_path, monkeypatch, capsys, rng):
    for name, library in FLAVOURS.items():
        conv_model(library).save(tmp_path / f"{name}.keras")
    x, y = rng.uniform(size=(12, 8, 8, 1)), np.arange(12) % 3
    np.savez(tmp_path / "data.npz", x=x, y=y, x_train=x, y_train=y)
    mine = ["--model", "keras.keras", "--other", "tf_keras.keras", "--data", "data.npz"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["theory.py", *mine, "--layers", "conv", "--smoke"])
    example().main()
    printed = capsys.readouterr().out
    assert "tf_keras, retrained" in printed
    record = json.loads((tmp_path / "outputs" / "theory" / "theory.json").read_text())
    assert record["layers"] == ["conv"]
    assert len(record["runs"]) == 4
    for run in record["runs"]:
        first, *_, last = run["steps"]
        assert last["bound"] < first["bound"]
        assert last["kernels"]["conv"]["condition_number"] == "inf"
        assert 0 < last["kernels"]["conv"]["dead_filters"] < last["kernels"]["conv"]["filters"]
        assert last["kernels"]["logits"]["condition_number"] != "inf"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--model", "none.keras"], r"none\.keras must be a \.keras file: .*No such file"),
        (["--model", "data.npz"], r"data\.npz must be a \.keras file: .*metadata\.json"),
        (["--model", "."], r" must be a \.keras file: "),
        (["--data", "none.npz"], r"--data must be an \.npz file, got none\.npz: .*No such file"),
        (["--data", "net.keras"], r"--data must hold arrays x and y, net\.keras holds \[\]"),
        (["--data", "bytes.npz"], r"in \[0, 1\], those of bytes\.npz are from 0 to 255: divide"),
        (["--layers", "nothing_*"], r"theory\.py: net: model .* has no weight that can be pruned"),
    ],
)
def test_the_example_names_what_it_cannot_take(tmp_path, monkeypatch, change, words):
    conv_model(keras).save(tmp_path / "net.keras")
    x, y = np.zeros((4, 8, 8, 1)), np.arange(4) % 3
    np.savez(tmp_path / "data.npz", x=x, y=y)
    x[0, 0, 0] = 255
    np.savez(tmp_path / "bytes.npz", x=x, y=y)
    monkeypatch.chdir(tmp_path)
    mine = ["--model", "net.keras", "--data", "data.npz", *change, "--smoke"]
    monkeypatch.setattr(sys, "argv", ["theory.py", *mine])
    with pytest.raises(SystemExit, match=words):
        example().main()


def test_the_example_calls_networks_by_what_tells_them_apart():
    folder = pathlib.Path("/runs")
    paths = [folder / name / "1-train" / "model.keras" for name in ("mine", "theirs")]
    assert example().titles(paths) == ["mine/1-train/model", "theirs/1-train/model"]
    assert example().titles([paths[0], folder / "other.keras"]) == ["model", "other"]


# The document.


def sections():
    text = (ROOT / "docs" / "theory.md").read_text()
    parts = re.split(r"^### T(\d+)\. ", text, flags=re.MULTILINE)[1:]
    bodies = (re.split(r"^##+ ", body, flags=re.MULTILINE)[0] for body in parts[1::2])
    return dict(zip(map(int, parts[::2]), bodies, strict=True))


def test_every_inequality_of_the_document_names_its_tests_and_they_exist():
    found = sections()
    assert list(found) == list(range(1, len(found) + 1))
    own = set(re.findall(r"^def (test_t\d+_\w+)", pathlib.Path(__file__).read_text(), re.MULTILINE))
    named = {
        number: set(re.findall(r"`(test_\w+)`", body.split("\nChecked by")[1]))
        for number, body in found.items()
    }
    for number, tests in named.items():
        assert tests == {name for name in own if name.startswith(f"test_t{number}_")}, number
        assert tests, number
    assert set().union(*named.values()) == own


def number(value):
    return f"{value:,.0f}" if 100 <= value < math.inf else f"{value:.2g}".replace("inf", "∞")


def rows_of(runs, way, name, levels):
    """The rows that the document's table should have, from what was measured."""
    keys = ("clean", "robust", "lipschitz", "bound", "product", "condition_number", "dead_filters")
    every = [np.median(runs.figures(name, way, key), axis=0) for key in keys]
    ends = runs.figures(name, way, "interval")
    for index, level in enumerate(runs.levels):
        if level in levels:
            clean, robust, *others, dead = (values[index] for values in every)
            low, high = ends[:, index, 0].min(), ends[:, index, 1].max()
            cells = [
                f"{name}, {way if level else 'dense'}",
                f"{100 * level:g} %",
                f"{100 * clean:.0f} %",
                f"{100 * robust:.0f} % ({100 * low:.0f} to {100 * high:.0f})",
                *map(number, others),
                f"{dead:.0f}",
            ]
            yield f"| {' | '.join(cells)} |"


def test_the_figures_of_the_document_are_those_that_were_measured():
    runs = example("theory_figure").Runs(json.loads((ROOT / "docs" / "theory.json").read_text()))
    high = (0.9, 0.95, 0.99, 0.999)
    expected = [
        *rows_of(runs, "pruned", "plain", (0.0, *high)),
        *rows_of(runs, "pruned", "TSCNC", (0.0, *high)),
        *rows_of(runs, "retrained", "plain", high),
        *rows_of(runs, "retrained", "TSCNC", high),
    ]
    text = (ROOT / "docs" / "theory.md").read_text()
    assert re.findall(r"^\| (?:plain|TSCNC).*$", text, re.MULTILINE) == expected

    def lead(way, levels):
        both = (runs.figures(name, way, "robust") for name in ("TSCNC", "plain"))
        return np.subtract(*both)[:, np.isin(runs.levels, levels)].round(3)

    sparse, full = lead("retrained", (0.95, 0.98, 0.99)), lead("retrained", (0.0, 0.5, 0.8))
    assert (np.sum(sparse > 0), np.sum(sparse == 0), np.sum(full < 0)) == (8, 1, 8)
    assert (np.sum(lead("retrained", (0.9, 0.995)) > 0), np.sum(lead("pruned", 0.8) < 0)) == (4, 3)
    kappas = runs.figures("TSCNC", "retrained", "condition_number")
    assert np.max(kappas[:, runs.levels <= 0.99]) < 2.1
    ratio = np.divide(
        *(np.median(runs.figures("plain", "pruned", k), 0) for k in ("bound", "lipschitz"))
    )
    assert ratio[0] == pytest.approx(400, rel=0.01)
