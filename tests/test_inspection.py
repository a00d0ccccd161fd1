"""Reports on a model: values against NumPy, masks, both Kerases, errors."""

from __future__ import annotations

import fractions
import itertools
import json
import math
import re

import numpy as np
import pytest
import tensorflow as tf
from helpers import with_wrapper_masks

from tscnc_tf import _checks, _reports, inspection, pruning
from tscnc_tf._keras import keras, tf_keras, tfmot, wrappers

EPS32 = float(np.finfo(np.float32).eps)
both = pytest.mark.parametrize("k", [keras, tf_keras], ids=["keras", "tf_keras"])


def dense_model(k, *matrices, bias=False):
    model = k.Sequential([k.layers.Dense(m.shape[1], use_bias=bias) for m in matrices])
    model.build((None, matrices[0].shape[0]))
    for layer, matrix in zip(model.layers, matrices, strict=True):
        layer.kernel.assign(matrix)
    return model


def with_spectrum(rng, shape, spectrum):
    left, _ = np.linalg.qr(rng.normal(size=(shape[0], shape[0])))
    right, _ = np.linalg.qr(rng.normal(size=(shape[1], shape[1])))
    middle = np.zeros(shape)
    np.fill_diagonal(middle, spectrum)
    return left @ middle @ right


def masked_arrays(model):
    return [(w.numpy() * m.numpy()).astype(np.float64) for w, m in wrappers.pruned_variables(model)]


# --- sparsity -------------------------------------------------------------------------------------


@both
def test_sparsity_counts_zeros_per_kernel_and_in_the_whole_model(k):
    first, second = np.ones((4, 3)), np.ones((3, 2))
    first[0], second[:, 0] = 0.0, -0.0
    model = dense_model(k, first, second, bias=True)
    report = inspection.sparsity(model)
    assert [(r.weights, r.zeros, r.masked) for r in report.rows] == [(12, 3, False), (6, 3, False)]
    assert [r.shape for r in report.rows] == [(4, 3), (3, 2)]
    assert report.rows[0].sparsity == 0.25
    assert report.sparsity == 6 / 18
    # The biases, 3 + 2, start as zeros.
    assert (report.model_zeros, report.model_weights) == (6 + 5, 18 + 5)
    assert report.model_sparsity == 11 / 23


def test_sparsity_of_a_pruned_model_is_that_of_weight_times_mask(rng):
    model = tf_keras.Sequential(
        [
            tf_keras.layers.Embedding(10, 4, input_length=5, name="words"),
            tf_keras.layers.Conv1D(6, 3, name="conv"),
            tf_keras.layers.BatchNormalization(),
            tf_keras.layers.Flatten(),
            tf_keras.layers.Dense(2, name="last"),
        ]
    )
    plain = inspection.sparsity(model)
    wrapped = with_wrapper_masks(model, rng)
    report = inspection.sparsity(wrapped)
    zeros = {r.name: r.zeros for r in report.rows}
    expected = [int(np.sum(array == 0)) for array in masked_arrays(wrapped)]
    assert zeros == dict(zip(["words/embeddings", "conv", "last"], expected, strict=True))
    assert all(r.masked for r in report.rows)
    assert report.sparsity == sum(expected) / (40 + 72 + 36)
    assert 0.4 < report.sparsity < 0.6
    assert report.model_weights == plain.model_weights == 40 + 72 + 6 + 4 * 6 + 36 + 2
    assert report.model_zeros == plain.model_zeros + sum(expected)


def transformer(library):
    """A block of attention, whose kernels are no single matrices, and a layer of one's own."""

    class Own(library.layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(name="w", shape=(shape[-1], 3))
            self.table = self.add_weight(name="embeddings", shape=(2, 3), initializer="zeros")
            self.fixed = self.add_weight(
                name="fixed", shape=(2, 3), initializer="zeros", trainable=False
            )

        def call(self, inputs):
            return tf.matmul(inputs, self.w)

    layers, inputs = library.layers, library.Input((5, 8))
    x = layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    x = layers.GlobalAveragePooling1D()(layers.Dense(8, name="up")(x))
    return library.Model(inputs, Own(name="own")(x))


@pytest.mark.parametrize("library", [keras, tf_keras])
def test_what_was_pruned_is_counted_after_stripping_as_before(library):
    model = pruning.prune_now(transformer(library), 0.75)
    reports = [(inspection.sparsity(model), inspection.sizes(model))]
    model = pruning.strip(model)
    reports.append((inspection.sparsity(model), inspection.sizes(model)))
    zeros, sizes = ([report[index] for report in reports] for index in (0, 1))
    counts = [[(row.name, row.weights, row.zeros) for row in report.rows] for report in zeros]
    assert counts[0] == counts[1]
    assert len(counts[0]) == 6
    assert {name for name, *_ in counts[0]} >= {"up", "query/kernel", "own/w"}
    assert all(zeros == 0.75 * weights for _, weights, zeros in counts[0])
    assert zeros[0].sparsity == zeros[1].sparsity == 0.75
    assert not any(row.masked for row in zeros[1].rows)
    assert sizes[0].ideal_sparse_bytes == sizes[1].ideal_sparse_bytes < sizes[1].dense_bytes / 2


def test_sparsity_is_that_of_the_masked_weights_if_there_are_any(rng):
    prune = tfmot().sparsity.keras.prune_low_magnitude
    model = tf_keras.Sequential(
        [
            tf_keras.layers.InputLayer((8,)),
            prune(tf_keras.layers.Dense(4, name="a")),
            tf_keras.layers.Dense(3, name="b"),
        ]
    )
    [(_, mask)] = wrappers.pruned_variables(model)
    mask.assign(np.eye(8, 4))
    report = inspection.sparsity(model)
    assert [(r.name, r.masked) for r in report.rows] == [("a", True), ("b", False)]
    assert report.sparsity == 28 / 32
    stripped = inspection.sparsity(tfmot().sparsity.keras.strip_pruning(model))
    assert not any(r.masked for r in stripped.rows)


def test_inspection_leaves_the_model_as_it_is(rng):
    model = with_wrapper_masks(dense_model(tf_keras, rng.normal(size=(5, 4))), rng)
    before = [w.copy() for w in model.get_weights()]
    inspection.sparsity(model)
    inspection.condition_numbers(model, operator=True)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    # This one runs the network, which means what it means to tfmot: masked weights become zero.
    ((kernel, mask),) = wrappers.pruned_variables(model)
    masked = kernel.numpy() * mask.numpy()
    inspection.local_lipschitz(model, np.full((2, 5), 0.5), 0.1, steps=1)
    np.testing.assert_array_equal(kernel.numpy(), masked)


@both
def test_layers_of_one_name_are_told_apart(k):
    def block(size):
        model = k.Sequential([k.layers.Dense(2, name="same")], name=f"block{size}")
        model.build((None, size))
        return model

    model = k.Sequential([block(3), block(2)])
    model.build((None, 3))
    assert [r.name for r in inspection.sparsity(model).rows] == ["same", "same (2)"]
    assert list(inspection.singular_values(model)) == ["same", "same (2)"]


# --- condition numbers ----------------------------------------------------------------------------


@both
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_condition_number_of_a_known_spectrum(k, shape, rng):
    spectrum = np.array([8.0, 4.0, 2.0, 0.5])
    model = dense_model(k, with_spectrum(rng, shape, spectrum))
    [row] = inspection.condition_numbers(model).rows
    assert row.shape == (6, 4)
    assert row.condition_number == pytest.approx(16.0, rel=1e-5)
    assert row.effective_condition_number == row.condition_number
    assert (row.sigma_max, row.sigma_min) == pytest.approx((8.0, 0.5), rel=1e-5)
    assert row.stable_rank == pytest.approx(np.sum(spectrum**2) / 64, rel=1e-5)
    assert (row.rank, row.groups, row.filters, row.dead_filters) == (4, 1, shape[1], 0)
    [found] = inspection.singular_values(model).values()
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, spectrum, rtol=1e-5)


def test_rank_deficiency_is_infinite_and_the_effective_number_looks_past_it():
    matrix = np.array([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    [row] = inspection.condition_numbers(dense_model(keras, matrix)).rows
    assert row.condition_number == math.inf
    assert row.effective_condition_number == pytest.approx(3.0)
    assert (row.rank, row.dead_filters, row.filters) == (2, 1, 3)

    twins = np.array([[1.0, 1.0], [0.3, 0.3], [0.7, 0.7]])
    [row] = inspection.condition_numbers(dense_model(keras, twins)).rows
    assert (row.condition_number, row.rank, row.dead_filters) == (math.inf, 1, 0)
    assert row.effective_condition_number == pytest.approx(1.0)


def test_what_float32_cannot_resolve_is_finite_but_not_effective():
    matrix = np.diag([1.0, 0.5, 2 * EPS32]).astype(np.float32)  # below 3 eps, far above 3 eps64
    [row] = inspection.condition_numbers(dense_model(keras, matrix)).rows
    assert row.condition_number == pytest.approx(0.5 / EPS32)
    assert row.effective_condition_number == pytest.approx(2.0)
    assert row.rank == 3


def test_a_zero_matrix_has_no_condition_number():
    [row] = inspection.condition_numbers(dense_model(keras, np.zeros((4, 3)))).rows
    assert row.condition_number == row.effective_condition_number == math.inf
    assert (row.rank, row.stable_rank, row.dead_filters) == (0, 0.0, 3)


def test_dead_filters_are_output_channels_of_wide_kernels_too():
    wide = np.ones((2, 5))
    wide[:, [1, 3]] = 0.0
    wide[0, 0] = 2.0
    [row] = inspection.condition_numbers(dense_model(keras, wide)).rows
    assert (row.dead_filters, row.filters, row.shape) == (2, 5, (5, 2))


CONVOLUTIONS = {
    "conv2d": (lambda k: k.layers.Conv2D(5, 3, name="c"), lambda w: w.reshape(1, -1, 5)),
    "grouped": (
        lambda k: k.layers.Conv2D(6, 3, groups=2, name="c"),
        lambda w: np.stack([w[..., :3].reshape(-1, 3), w[..., 3:].reshape(-1, 3)]),
    ),
    "depthwise": (
        lambda k: k.layers.DepthwiseConv2D(3, depth_multiplier=2, name="c"),
        lambda w: np.stack([w[:, :, i].reshape(9, 2) for i in range(4)]),
    ),
    "transposed": (
        lambda k: k.layers.Conv2DTranspose(5, 3, name="c"),
        lambda w: np.swapaxes(w, 2, 3).reshape(1, -1, 5),
    ),
}


@both
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_are_decomposed_as_numpy_would(k, kind):
    build, reading = CONVOLUTIONS[kind]
    model = k.Sequential([k.layers.Input((6, 6, 4)), build(k)])
    stack = reading(np.asarray(model.layers[-1].get_weights()[0], np.float64))
    expected = np.linalg.svd(stack, compute_uv=False)
    [found] = inspection.singular_values(model).values()
    assert found.ndim == (1 if len(stack) == 1 else 2)
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-12)
    [row] = inspection.condition_numbers(model).rows
    quotients = expected[:, 0] / expected[:, -1]
    worst = np.argmax(quotients)
    assert row.condition_number == pytest.approx(quotients[worst])
    assert (row.sigma_max, row.sigma_min) == pytest.approx(
        (expected[worst, 0], expected[worst, -1])
    )
    assert row.groups == len(stack)
    assert row.filters == len(stack) * stack.shape[-1]


def test_a_dead_channel_does_not_hide_another_ones_condition():
    layer = keras.layers.DepthwiseConv2D(2, depth_multiplier=2, use_bias=False)
    model = keras.Sequential([keras.Input((4, 4, 2)), layer])
    kernel = np.zeros((2, 2, 2, 2), np.float32)
    kernel[0, 0, 0, 0] = 1.0  # channel 0: one filter alive, one dead
    kernel[0, 0, 1, 0], kernel[1, 1, 1, 1] = 1.0, 0.01
    layer.set_weights([kernel])
    [row] = inspection.condition_numbers(model).rows
    assert row.condition_number == math.inf
    assert row.effective_condition_number == pytest.approx(100.0)
    assert (row.dead_filters, row.filters) == (1, 4)


def test_a_pruned_model_is_measured_under_its_masks(rng):
    model = tf_keras.Sequential(
        [
            tf_keras.layers.InputLayer((6, 6, 3)),
            tf_keras.layers.Conv2D(4, 3, name="conv"),
            tf_keras.layers.Flatten(),
            tf_keras.layers.Dense(5, name="last"),
        ]
    )
    model = with_wrapper_masks(model, rng, 0.7)
    conv, last = (a.reshape(-1, a.shape[-1]) for a in masked_arrays(model))
    found = inspection.singular_values(model)
    for name, array in (("conv", conv), ("last", last)):
        expected = np.linalg.svd(array, compute_uv=False)
        np.testing.assert_allclose(found[name], expected, rtol=1e-10, atol=1e-12)
    # No forward pass has applied the masks yet: the variables themselves are dense.
    assert all(np.all(w.numpy() != 0) for w, _ in wrappers.pruned_variables(model))


def test_worst_kernel_and_worst_effective_kernel(rng):
    singular = with_spectrum(rng, (3, 3), [1.0, 0.5, 0.0])
    singular[:, 2] = singular[:, 1]
    poor = with_spectrum(rng, (3, 3), [1.0, 0.5, 1e-3])
    model = dense_model(tf_keras, singular, poor)
    report = inspection.condition_numbers(model)
    first, second = report.rows
    assert report.worst is first
    assert report.worst_effective is second
    described = report.to_dict()
    assert described["worst_condition_number"] == "inf"
    assert described["worst_effective"] == second.name
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    text = str(report)
    assert "∞" in text
    assert first.name in text
    assert "effective κ" in text
    assert "operator" not in text


# --- operators ------------------------------------------------------------------------------------


def circulant(kernel, size):
    """Return the matrix of a circular convolution, entry by entry: (size × out, size × in)."""
    *taps, inputs, outputs = kernel.shape
    matrix = np.zeros((*size, outputs, *size, inputs))
    for place in itertools.product(*map(range, size)):
        for tap in itertools.product(*map(range, taps)):
            source = tuple((p + t) % s for p, t, s in zip(place, tap, size, strict=True))
            matrix[(*place, slice(None), *source)] += kernel[tap].T
    count = math.prod(size)
    return matrix.reshape(count * outputs, count * inputs)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((3, 2, 3), (7,)),
        ((3, 3, 2, 3), (4, 5)),
        ((3, 3, 3, 2), (6, 4)),
        ((2, 3, 2, 2, 1), (3, 3, 2)),
        ((5, 5, 1, 2), (3, 4)),  # larger than the image: wrapped around
        ((1, 1, 3, 3), (2, 2)),
    ],
)
def test_operator_against_its_explicit_matrix(shape, size, rng):
    kernel = rng.normal(size=shape)
    expected = np.linalg.svd(circulant(kernel, size), compute_uv=False)
    found = inspection.operator_singular_values(kernel, size)
    assert found.shape == (math.prod(size) * min(shape[-2:]),)
    np.testing.assert_allclose(found, expected[: len(found)], atol=1e-10)


def test_operator_of_the_other_layouts(rng):
    size = (4, 5)
    kernel = rng.normal(size=(3, 3, 2, 3))
    plain = inspection.operator_singular_values(kernel, size)
    swapped = inspection.operator_singular_values(kernel.swapaxes(2, 3), size, layout="transposed")
    np.testing.assert_allclose(swapped, plain)
    grouped = inspection.operator_singular_values(
        rng.normal(size=(3, 3, 2, 4)), size, channel_groups=2
    )
    assert grouped.shape == (2 * 20 * 2,)
    depthwise = inspection.operator_singular_values(kernel, size, layout="depthwise")
    parts = [inspection.operator_singular_values(kernel[:, :, [i]], size) for i in (0, 1)]
    np.testing.assert_allclose(depthwise, np.sort(np.concatenate(parts))[::-1])


def test_operator_bounds_what_tensorflow_does_to_an_image(rng):
    kernel = rng.normal(size=(3, 3, 2, 3)).astype(np.float32)
    norm = inspection.operator_singular_values(kernel, (6, 6))[0]
    image = rng.normal(size=(20, 6, 6, 2)).astype(np.float32)
    wrapped = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
    out = tf.nn.conv2d(wrapped, kernel, 1, "VALID").numpy()
    gain = np.linalg.norm(out.reshape(20, -1), axis=1) / np.linalg.norm(
        image.reshape(20, -1), axis=1
    )
    assert np.all(gain <= norm * (1 + 1e-5))
    assert np.max(gain) > 0.3 * norm


@both
def test_operator_column_where_it_is_defined(k):
    model = k.Sequential(
        [
            k.layers.Input((6, 6, 2)),
            k.layers.Conv2D(3, 3, padding="same", name="plain"),
            k.layers.Conv2D(3, 3, strides=2, name="strided"),
            k.layers.Flatten(),
            k.layers.Dense(2, name="last"),
        ]
    )
    report = inspection.condition_numbers(model, operator=True)
    plain, strided, last = report.rows
    kernel = np.asarray(model.get_layer("plain").kernel)
    expected = inspection.operator_singular_values(kernel, (6, 6))
    assert plain.operator_sigma_max == pytest.approx(expected[0])
    assert plain.operator_sigma_min == pytest.approx(expected[-1])
    assert strided.operator_sigma_max is last.operator_sigma_max is None
    assert "operator σ max" in str(report)
    assert inspection.condition_numbers(model).rows[0].operator_sigma_max is None


def test_operator_column_of_unknown_sizes_and_of_wrapped_layers(rng):
    anysize = tf_keras.Sequential(
        [tf_keras.layers.InputLayer((None, None, 2)), tf_keras.layers.Conv2D(3, 3)]
    )
    [row] = inspection.condition_numbers(anysize, operator=True).rows
    assert row.operator_sigma_max is None

    prune = tfmot().sparsity.keras.prune_low_magnitude
    fresh = tf_keras.Sequential(
        [
            tf_keras.layers.InputLayer((6, 6, 2)),
            prune(tf_keras.layers.Conv2D(3, 3, name="conv")),
        ]
    )
    [(weight, mask)] = wrappers.pruned_variables(fresh)
    mask.assign((rng.uniform(size=mask.shape) > 0.5).astype(np.float32))
    [row] = inspection.condition_numbers(fresh, operator=True).rows
    expected = inspection.operator_singular_values(weight * mask, (6, 6))
    assert row.operator_sigma_max == pytest.approx(expected[0])


def test_operator_says_what_it_needs(rng):
    with pytest.raises(ValueError, match="one to three axes of positions"):
        inspection.operator_singular_values(np.ones((3, 2)), (4,))
    with pytest.raises(ValueError, match="input_size must have 2"):
        inspection.operator_singular_values(np.ones((3, 3, 1, 1)), 4)
    with pytest.raises(ValueError, match="NaN"):
        inspection.operator_singular_values(np.full((3, 1, 1), np.nan), 4)


# --- local Lipschitz constants --------------------------------------------------------------------


def linear(weights):
    weights = tf.constant(weights, tf.float32)
    return lambda x: tf.matmul(x, weights)


def test_lipschitz_of_one_linear_output_is_the_l1_norm(rng):
    weights = rng.normal(size=(7, 1))
    report = inspection.local_lipschitz(
        linear(weights), rng.uniform(0.3, 0.7, (10, 7)), "8/255", batch_size=4
    )
    np.testing.assert_allclose(report.values, np.sum(np.abs(weights)), rtol=1e-4)
    assert report.mean == pytest.approx(np.sum(np.abs(weights)), rel=1e-4)
    assert report.interval == pytest.approx((report.mean, report.mean), rel=1e-3)
    assert (report.epsilon, report.examples) == ("8/255", 10)
    assert report.epsilon_value == pytest.approx(8 / 255)


def test_lipschitz_of_many_linear_outputs_comes_close_to_the_best_corner(rng):
    weights = rng.normal(size=(6, 4))
    corners = np.array(list(itertools.product((-1.0, 1.0), repeat=6)))
    best = np.max(np.sum(np.abs(corners @ weights), axis=1))
    report = inspection.local_lipschitz(linear(weights), np.full((64, 6), 0.5), 0.1)
    assert report.maximum == pytest.approx(best, rel=1e-4)
    assert report.mean > 0.75 * best


def test_lipschitz_stays_within_the_bounds():
    # At the corner (1, 1) both inputs can only go down, and the weights pull apart.
    report = inspection.local_lipschitz(linear([[1.0], [-1.0]]), np.ones((8, 2)), 0.1)
    np.testing.assert_allclose(report.values, 1.0, rtol=1e-4)
    free = inspection.local_lipschitz(
        linear([[1.0], [-1.0]]), np.ones((8, 2)), 0.1, bounds=(0.0, 2.0)
    )
    np.testing.assert_allclose(free.values, 2.0, rtol=1e-4)


def test_lipschitz_of_a_square_lies_at_an_end_of_the_ball():
    report = inspection.local_lipschitz(tf.square, np.full((32, 1), 0.5), 0.1)
    # |x² - x'²| / |x - x'| = x + x'. Starts on the right end at 1.1; those on the left are led
    # away from the best point, to at most 1 (the slope at x itself).
    right = np.abs(report.values - 1.1) < 1e-3
    assert 5 < np.sum(right) < 27
    assert np.all((report.values[~right] > 0.9) & (report.values[~right] < 1.0))


@both
def test_lipschitz_runs_models_in_inference_mode(k, rng):
    model = k.Sequential(
        [
            k.layers.Input((4,)),
            k.layers.Dense(3),
            k.layers.BatchNormalization(),
            k.layers.Dropout(0.9),
        ]
    )
    x = rng.uniform(0.3, 0.7, (9, 4))
    first = inspection.local_lipschitz(model, x, 0.1, batch_size=4, seed=3)
    again = inspection.local_lipschitz(model, tf.constant(x), 0.1, batch_size=4, seed=3)
    np.testing.assert_array_equal(first.values, again.values)
    kernel = np.asarray(model.layers[-3 if k is tf_keras else 0].get_weights()[0], np.float64)
    corners = np.array(list(itertools.product((-1.0, 1.0), repeat=4)))
    best = np.max(np.sum(np.abs(corners @ kernel), axis=1)) / math.sqrt(1 + 1e-3)
    assert first.maximum == pytest.approx(best, rel=1e-3)


def test_lipschitz_report_as_text_and_json(rng):
    report = inspection.local_lipschitz(linear([[1.0]]), [[0.5]], 0.03, steps=3, seed=5)
    assert report.interval == (0.0, math.inf)
    described = report.to_dict()
    assert described["interval"] == [0.0, "inf"]
    assert described["epsilon"] == "0.03"
    assert described["seed"] == 5
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    assert "0.03" in str(report)
    spread = inspection.local_lipschitz(tf.square, rng.uniform(0.2, 0.8, (50, 1)), 0.1)
    half = 1.96 * np.std(spread.values, ddof=1) / math.sqrt(50)
    assert spread.interval == pytest.approx((spread.mean - half, spread.mean + half), rel=1e-4)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros((2, 3), np.uint8), TypeError, "x / 255"),
        (np.zeros(3), ValueError, "must be a batch"),
        (np.zeros((0, 3)), ValueError, "empty"),
        (np.full((2, 3), np.nan), ValueError, "in 2 of 2 examples"),
        (np.full((2, 3), 1.5), ValueError, "bounds"),
        ({"a": 1}, TypeError, "one array"),
    ],
)
def test_lipschitz_refuses_what_is_no_input(x, error, message):
    with pytest.raises(error, match=message):
        inspection.local_lipschitz(linear(np.ones((3, 1))), x, 0.1)


def test_lipschitz_refuses_models_without_one_finite_output():
    x = np.full((2, 3), 0.5)
    with pytest.raises(ValueError, match="NaN or infinity"):
        inspection.local_lipschitz(lambda x: x / 0.0, x, 0.1)
    with pytest.raises(TypeError, match="one tensor"):
        inspection.local_lipschitz(lambda x: {"a": x}, x, 0.1)
    with pytest.raises(TypeError, match="callable"):
        inspection.local_lipschitz("model", x, 0.1)
    with pytest.raises(ValueError, match="epsilon"):
        inspection.local_lipschitz(linear(np.ones((3, 1))), x, 0.0)


@pytest.mark.parametrize("epsilon", [None, True, [0.1]])
def test_lipschitz_names_an_epsilon_that_is_no_number(epsilon):
    with pytest.raises(
        TypeError, match=f"epsilon must be a number, got {re.escape(repr(epsilon))}"
    ):
        inspection.local_lipschitz(linear(np.ones((3, 1))), np.full((2, 3), 0.5), epsilon)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("8 / 255", "8/255"),
        (8 / 255, "8/255"),
        (0.2, "0.2"),
        (3, "3"),
        (0.12345, "0.12345"),
        (np.float64(8 / 255), "8/255"),
        (np.float32(8 / 255), "8/255"),
        (np.float16(8 / 255), "8/255"),
        (np.float32(0.3), "0.3"),
        (np.float32(0.12345), "0.12345"),
        (fractions.Fraction(8, 255), "8/255"),
    ],
)
def test_a_distance_is_written_as_people_write_it(value, written):
    assert _checks.as_written(value) == written
    report = inspection.local_lipschitz(linear([[1.0]]), [[0.5]], value, bounds=(-9, 9), steps=1)
    assert report.epsilon == written


def test_lipschitz_holds_small_bounds_to_their_own_scale():
    x, model = np.full((2, 3), 1e-7), linear(np.ones((3, 1)))
    report = inspection.local_lipschitz(model, x, 1e-8, bounds=(0.0, 1e-7))
    assert report.mean == pytest.approx(3.0, rel=1e-3)
    with pytest.raises(ValueError, match="bounds"):
        inspection.local_lipschitz(model, 5 * x, 1e-8, bounds=(0.0, 1e-7))


def test_lipschitz_refuses_balls_in_which_it_would_measure_rounding():
    x, model = np.full((2, 3), 0.5), linear(np.ones((3, 1)))
    with pytest.raises(
        ValueError, match=r"epsilon must be >= 7\.6e-06 within bounds \(0\.0, 1\.0\)"
    ):
        inspection.local_lipschitz(model, x, 1e-6)
    report = inspection.local_lipschitz(model, x, 1e-5)
    assert report.maximum == pytest.approx(3.0, rel=0.05)
    for dtype, least in (("float16", "0.0039"), ("bfloat16", "0.031")):
        half = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, dtype=f"mixed_{dtype}")])
        half.layers[-1].kernel.assign(np.ones((3, 1)))
        with pytest.raises(ValueError, match=f"epsilon must be >= {least} .* rounding of {dtype}"):
            inspection.local_lipschitz(half, x, 1e-3)
        report = inspection.local_lipschitz(half, x, 0.25)
        assert report.maximum == pytest.approx(3.0, rel=0.05)


# --- all reports ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read", [inspection.sparsity, inspection.condition_numbers, inspection.singular_values]
)
def test_what_cannot_be_inspected(read):
    with pytest.raises(TypeError, match="must be a Keras 3 or tf_keras model"):
        read(lambda x: x)
    for k in (keras, tf_keras):
        with pytest.raises(ValueError, match="no weights yet"):
            read(k.Sequential([k.layers.Dense(2)]))
        bare = k.Sequential([k.layers.Input((3,)), k.layers.BatchNormalization()])
        with pytest.raises(ValueError, match="kernels"):
            read(bare)


def test_weights_that_are_not_finite_are_refused():
    model = dense_model(keras, np.array([[np.inf, 1.0], [1.0, 1.0]]))
    with pytest.raises(ValueError, match="NaN or infinity"):
        inspection.condition_numbers(model)


@both
def test_half_precision_weights_are_read(k):
    layer = k.layers.Dense(2, use_bias=False, dtype="bfloat16")
    model = k.Sequential([k.layers.Input((2,)), layer])
    layer.set_weights([np.diag([4.0, 0.5])])
    assert inspection.condition_numbers(model).worst.condition_number == 8.0
    assert inspection.sparsity(model).sparsity == 0.5


def test_sparsity_report_as_text_and_json():
    report = inspection.sparsity(dense_model(keras, np.eye(4)))
    described = report.to_dict()
    assert described["sparsity"] == 0.75
    assert json.loads(json.dumps(described)) == described
    assert "75.00 %" in str(report)
    assert "fraction of zeros" in str(report)


def test_values_for_json():
    value = {1: (np.float32(0.5), np.arange(2), -math.inf), "b": {"c": math.nan, "d": object}}
    assert _reports.jsonable(value) == {
        "1": [0.5, [0, 1], "-inf"],
        "b": {"c": "nan", "d": "<class 'object'>"},
    }


def test_unique_names():
    assert _reports.unique(["a", "b", "a", "a (2)", "a"]) == [
        "a",
        "b",
        "a (2)",
        "a (2) (2)",
        "a (3)",
    ]


def test_a_trainer_is_inspected_and_measured_like_the_model_inside(rng):
    inner = dense_model(tf_keras, rng.normal(size=(4, 3)))

    class Trainer(tf_keras.Model):
        def __init__(self):
            super().__init__()
            self.model = inner
            self.trackers = [tf_keras.metrics.Mean()]

        @property
        def metrics(self):
            return self.trackers

        def call(self, x, training=None):
            return self.model(x, training=training)

    trainer = Trainer()
    trainer(np.zeros((1, 4), np.float32))
    assert len(trainer.weights) > len(inner.weights)  # tf_keras counts the metric's variables
    # A model of one's own has no graph that paths could be followed in.
    assert inspection.sparsity(trainer).without_paths() == (
        inspection.sparsity(inner).without_paths()
    )
    assert inspection.condition_numbers(trainer) == inspection.condition_numbers(inner)


# --- layers of Keras 3 that compute with something else than the weight they store ----------------

adapted = pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])


def adapted_layer(kind, mode, lora, rng):
    """A model of one layer without bias, half of whose weights were zero to begin with."""
    shapes = {"dense": (6, 4), "einsum": (6, 2, 3)}
    if kind == "dense":
        layer = keras.layers.Dense(4, use_bias=False, name="layer")
    else:
        layer = keras.layers.EinsumDense("bi,ihs->bhs", (2, 3), name="layer")
    model = keras.Sequential([keras.Input((6,)), layer])
    kernel = rng.normal(size=shapes[kind])
    kernel[:3] = 0.0
    layer.kernel.assign(kernel)
    if mode:
        layer.quantize(mode)
    if lora:
        layer.enable_lora(2, lora_alpha=3)
        layer.lora_kernel_b.assign(rng.normal(size=layer.lora_kernel_b.shape))
    return model


@adapted
@pytest.mark.parametrize("mode", [None, "int8", "int4"])
@pytest.mark.parametrize("kind", ["dense", "einsum"])
def test_reports_measure_the_kernel_that_acts(kind, mode, lora, rng):
    model = adapted_layer(kind, mode, lora, rng)
    acting = np.asarray(model(np.eye(6, dtype="float32")), np.float64)  # a row for each input
    zeros = int(np.sum(np.abs(acting) < 1e-7))
    assert zeros == (0 if lora else acting.size // 2 if mode is None else zeros)
    (row,) = inspection.sparsity(model).rows
    assert (row.shape, row.weights, row.zeros) == (acting.shape, acting.size, zeros)
    (status,) = pruning.report(model).rows
    assert (status.shape, status.zeros, status.pruned) == (acting.shape, zeros, False)
    assert inspection.sparsity(model).model_weights == acting.size
    assert inspection.sizes(model).other_weights == 0
    if kind == "dense":
        expected = np.linalg.svd(acting, compute_uv=False)
        np.testing.assert_allclose(
            inspection.singular_values(model)["layer"], expected, rtol=1e-5, atol=1e-6
        )
    stored = {None: 4.0, "int8": 1.0, "int4": 0.5}[mode]
    assert inspection.sizes(model).dense_bytes == pytest.approx(stored * acting.size, rel=0.35)


def test_a_convolution_with_lora_is_reported_with_the_sum(rng):
    model = keras.Sequential([keras.Input((5, 5, 3)), keras.layers.Conv2D(4, 3, name="conv")])
    layer = model.layers[0]
    pruning.strip(pruning.prune_now(model, 0.5))
    assert inspection.sparsity(model).sparsity == 0.5
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(rng.normal(size=(2, 4)))
    (row,) = inspection.sparsity(model).rows
    assert (row.name, row.zeros, row.shape) == ("conv", 0, (3, 3, 3, 4))
    acting = np.asarray(layer.kernel, np.float64).reshape(27, 4)
    (condition,) = inspection.condition_numbers(model).rows
    assert condition.condition_number == pytest.approx(np.linalg.cond(acting), rel=1e-5)


def test_statistics_of_quantized_layers_are_no_weights():
    def model():
        layers = [keras.layers.Embedding(5, 8, name="words"), keras.layers.Dense(4, name="last")]
        return keras.Sequential([keras.Input((3,), dtype="int32"), *layers])

    plain = inspection.sparsity(model())
    for mode in ("float8", "int8", "int4"):
        quantized = model()
        for layer in quantized.layers:
            if mode != "float8" or layer.name == "last":
                layer.quantize(mode)
        report = inspection.sparsity(quantized)
        assert [row.name for row in report.rows] == [row.name for row in plain.rows]
        assert report.model_weights == plain.model_weights == 5 * 8 + 8 * 4 + 4
        names = [row.name for row in pruning.report(quantized).rows]
        assert names == ["words", "last"], mode
        reasons = {row.name: row.reason for row in pruning.report(quantized).rows}
        expected = "not chosen" if mode == "float8" else f"it is quantized ({mode}): prune first"
        assert expected in reasons["last"]


def test_what_acts_of_an_embedding_is_what_it_looks_up(rng):
    for mode in (None, "int8", "int4"):
        model = keras.Sequential([keras.Input((1,), dtype="int32"), keras.layers.Embedding(5, 8)])
        layer = model.layers[0]
        layer.embeddings.assign(
            np.where(rng.uniform(size=(5, 8)) < 0.5, 0, rng.normal(size=(5, 8)))
        )
        if mode:
            layer.quantize(mode)
        layer.enable_lora(2)
        looked_up = np.asarray(model(np.arange(5)[:, None]))
        (row,) = pruning.report(model).rows
        assert (row.weights, row.zeros) == (40, np.sum(looked_up == 0)), mode


def test_weights_that_cannot_be_read_are_refused_by_name():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="packed")])
    config = keras.quantizers.GPTQConfig(dataset=[], tokenizer=None, weight_bits=4, group_size=4)
    model.layers[0].quantize("gptq", config=config)
    with pytest.raises(ValueError, match=r"layer 'packed' is quantized by 'gptq'.*before"):
        inspection.sparsity(model)
