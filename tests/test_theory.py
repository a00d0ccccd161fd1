"""Norms and condition numbers under pruning: T1 to T12 of docs/theory.md, each inequality tested.

At random, and where it is tight: where a bound has a constant, a slightly smaller one fails in some
case. NumPy's SVD is the oracle, beside the package's own figures.
"""

from __future__ import annotations

import itertools
import math

import keras
import numpy as np
import pytest
from helpers import FLAVOURS, conv_model
from hypothesis import assume, given
from hypothesis import strategies as st
from matrices import (
    SLACK,
    few,
    kappa,
    norm,
    pairs,
    pruned,
    relu_network,
    report,
    seeds,
    spectra,
    svd,
    tries,
    with_spectrum,
)

import tscnc_tf as tscnc

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
    if before[-1] > 1e-9 * before[0] and gone < 0.99 * before[-1]:
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
