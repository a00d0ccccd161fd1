"""What zeros are worth: bytes by hand, sparse products against layers, verdicts from figures."""

from __future__ import annotations

import dataclasses
import gc
import gzip
import json
import math
import zipfile

import numpy as np
import pytest
import tensorflow as tf
from helpers import FLAVOURS, conv_model, dense_model, images, with_wrapper_masks

from tscnc_tf import _timing, gates, inspection
from tscnc_tf._keras import keras, tf_keras, tfmot, wrappers
from tscnc_tf.inspection import KernelStructure, LayerSpeed, SpeedReport, Times, speed, weights

both = pytest.mark.parametrize("k", list(FLAVOURS.values()), ids=list(FLAVOURS))
ITEM = 4  # bytes of a float32


def sparse_values(rng, shape, sparsity):
    """Normal values of which exactly the given share is zero."""
    values = rng.normal(size=shape).astype(np.float32)
    zeros = rng.choice(values.size, round(sparsity * values.size), replace=False)
    values.ravel()[zeros] = 0.0
    return values


def one_layer(layer, shape, rng, sparsity=0.8):
    """A model of one layer with zeros in its kernels, and biases that are not zero."""
    k = tf_keras if isinstance(layer, tf_keras.layers.Layer) else keras
    batch = k.Input(shape)
    model = k.Model(batch, layer(batch))
    for weight in weights.kernels(model):
        weight.variable.assign(sparse_values(rng, weight.values.shape, sparsity))
    if layer.use_bias:
        layer.bias.assign(rng.normal(size=layer.bias.shape))
    return model


def snapshot(model):
    return [np.array(weight) for weight in model.get_weights()]


def assert_unchanged(model, before):
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


# --- sizes ----------------------------------------------------------------------------------------


@both
def test_the_sizes_of_a_dense_kernel_by_hand(k, rng):
    kernel = np.zeros((20, 10), np.float32)
    kernel[[0, 5, 5, 19], [0, 3, 4, 9]] = [1.0, -2.0, 3.0, 0.5]
    model = k.Sequential([k.layers.Dense(10, name="last")])
    model.build((None, 20))
    model.set_weights([kernel, np.ones(10)])
    (row,) = inspection.sizes(model).rows
    assert (row.name, row.shape, row.dtype, row.weights, row.nonzeros) == (
        "last",
        (20, 10),
        "float32",
        200,
        4,
    )
    assert row.dense_bytes == 800
    assert row.bitmap_bytes == 200 // 8 + 4 * ITEM
    # A row per output: 11 pointers; a row per input: 21. Each index takes one byte.
    assert row.csr_bytes == 11 + 4 + 4 * ITEM
    entropy = -(0.02 * np.log2(0.02) + 0.98 * np.log2(0.98))
    assert row.limit_bytes == np.ceil(200 * entropy / 8) + 4 * ITEM
    assert row.sparsity == 0.98
    assert (row.ideal_sparse_bytes, row.ideal_format) == (31, "CSR")
    assert row.ratio == 800 / 31
    assert row.gzip_bytes == len(gzip.compress(kernel.tobytes(), 9, mtime=0))
    report = inspection.sizes(model)
    assert (report.other_weights, report.other_bytes) == (10, 40)
    assert (report.dense_bytes, report.ideal_sparse_bytes) == (840, 71)
    assert report.limit_bytes == row.limit_bytes + 40
    assert report.ratio == 840 / 71
    stream = kernel.tobytes() + np.ones(10, np.float32).tobytes()
    assert report.gzip_bytes == len(gzip.compress(stream, 9, mtime=0))
    assert report.gzip_ratio == 840 / report.gzip_bytes
    assert inspection.sizes(model) == report


@pytest.mark.parametrize(
    ("inputs", "outputs", "nonzeros", "expected"),
    [
        # The matrix is square, so there is one way only: (n + 1) pointers, one index per value.
        (255, 255, 255, 256 * 1 + 255 * 1),
        (256, 256, 255, 257 * 1 + 255 * 1),  # the largest index is 255
        (257, 257, 255, 258 * 1 + 255 * 2),
        (257, 257, 256, 258 * 2 + 256 * 2),
        (256, 256, 65536, 257 * 4 + 65536 * 1),
        # Wide: rows are the few inputs (indices of two bytes), or the many outputs.
        (3, 1000, 10, min(4 + 10 * 2, 1001 + 10)),
        (3, 1000, 2999, min(4 * 2 + 2999 * 2, 1001 * 2 + 2999)),
    ],
)
def test_pointers_and_indices_take_the_smallest_sufficient_integers(
    inputs, outputs, nonzeros, expected
):
    model = tf_keras.Sequential([tf_keras.layers.Dense(outputs, use_bias=False)])
    model.build((None, inputs))
    values = (np.arange(inputs * outputs) < nonzeros).astype(np.float32)
    model.set_weights([values.reshape(inputs, outputs)])
    assert inspection.sizes(model, gzip=False).rows[0].csr_bytes == expected + nonzeros * ITEM


@both
@pytest.mark.parametrize(
    ("name", "options", "shape", "matrix"),
    [
        ("Conv2D", {"filters": 12, "kernel_size": 3}, (8, 8, 5), (12, 45)),
        ("Conv2D", {"filters": 12, "kernel_size": 3, "groups": 2}, (8, 8, 6), (12, 27)),
        ("Conv2DTranspose", {"filters": 12, "kernel_size": 3}, (8, 8, 5), (12, 45)),
        ("DepthwiseConv2D", {"kernel_size": 3, "depth_multiplier": 2}, (8, 8, 6), (12, 9)),
    ],
)
def test_a_convolution_is_a_matrix_with_a_row_per_output(k, name, options, shape, matrix, rng):
    model = one_layer(getattr(k.layers, name)(**options), shape, rng, 0.9)
    (row,) = inspection.sizes(model, gzip=False).rows
    outputs, columns = matrix
    assert row.weights == outputs * columns
    assert row.nonzeros == row.weights - round(0.9 * row.weights)
    both_ways = min(outputs + 1, columns + 1) + row.nonzeros
    assert row.csr_bytes == both_ways + row.nonzeros * ITEM


def test_no_format_is_below_the_limit_and_the_ideal_is_never_above_dense(rng):
    for sparsity in (0.0, 0.01, 0.5, 0.9, 0.99, 1.0):
        model = one_layer(tf_keras.layers.Dense(50), (40,), rng, sparsity)
        (row,) = inspection.sizes(model, gzip=False).rows
        assert row.limit_bytes <= row.ideal_sparse_bytes <= row.dense_bytes
        assert row.limit_bytes <= min(row.bitmap_bytes, row.csr_bytes)
    assert row.limit_bytes == 0  # nothing but zeros
    dense = inspection.sizes(one_layer(tf_keras.layers.Dense(50), (40,), rng, 0.0)).rows[0]
    assert (dense.ideal_format, dense.ratio) == ("dense", 1.0)


def test_what_counts_of_a_pruned_weight_is_its_product_with_the_mask(rng):
    model = tf_keras.Sequential(
        [
            tf_keras.layers.Embedding(10, 4, input_length=5, name="words"),
            tf_keras.layers.Flatten(),
            tf_keras.layers.BatchNormalization(),
            tf_keras.layers.Dense(2, name="last"),
        ]
    )
    wrapped = with_wrapper_masks(model, rng, 0.8)
    before = snapshot(wrapped)
    report = inspection.sizes(wrapped)
    acting = [w.numpy() * m.numpy() + 0.0 for w, m in wrappers.pruned_variables(wrapped)]
    found = {row.name: row for row in report.rows}
    for name, values in zip(["words/embeddings", "last"], acting, strict=True):
        assert found[name].nonzeros == np.count_nonzero(values)
        assert found[name].gzip_bytes == len(gzip.compress(values.tobytes(), 9, mtime=0))
    assert report.other_bytes == (4 * 20 + 2) * ITEM  # no masks, no counters
    assert report.dense_bytes == 4 * inspection.sparsity(wrapped).model_weights
    assert_unchanged(wrapped, before)
    stripped = inspection.sizes(tfmot().sparsity.keras.strip_pruning(wrapped))
    # The same kernels; of the embedding, which is no kernel, nothing is known without its mask.
    assert [row.name for row in stripped.rows] == ["last"]


class WithMetric(tf_keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = tf_keras.layers.Dense(3)
        self.mean = tf_keras.metrics.Mean()

    def call(self, x):
        return self.hidden(x)


def test_metrics_are_no_weights():
    model = WithMetric()
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(np.ones((4, 2)), np.ones((4, 3)), verbose=0)
    report = inspection.sizes(model)
    assert report.dense_bytes == 4 * inspection.sparsity(model).model_weights == 4 * (6 + 3)


@both
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_bytes_are_those_of_the_dtype(k, dtype, rng):
    model = one_layer(k.layers.Dense(8, dtype=dtype), (8,), rng, 0.5)
    report = inspection.sizes(model)
    item = 8 if dtype == "float64" else 2
    (row,) = report.rows
    assert (row.dtype, row.dense_bytes, report.other_bytes) == (dtype, 64 * item, 8 * item)
    assert row.bitmap_bytes == 8 + 32 * item


@both
def test_a_file_saved_by_keras_is_as_large_with_zeros_as_without(k, rng, tmp_path):
    model = one_layer(k.layers.Dense(100), (200,), rng, 0.99)
    report = inspection.sizes(model)
    assert report.ideal_sparse_bytes < 0.04 * report.dense_bytes
    model.save(tmp_path / "sparse.keras")
    model.set_weights([rng.normal(size=(200, 100)), rng.normal(size=100)])
    model.save(tmp_path / "dense.keras")
    sparse, dense = ((tmp_path / f"{name}.keras").stat().st_size for name in ("sparse", "dense"))
    assert sparse == pytest.approx(dense, rel=0.01)
    assert sparse > report.dense_bytes
    with zipfile.ZipFile(tmp_path / "sparse.keras") as archive:
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}


@both
def test_the_size_report_as_table_and_as_json(k, rng):
    report = inspection.sizes(conv_model(k))
    table = str(report)
    for text in ("conv", "3×3×1×6", "others", "whole model", "ideal sparse", "Zeros don't make"):
        assert text in table
    as_json = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert as_json["ideal_sparse_bytes"] == report.ideal_sparse_bytes
    assert as_json["rows"][0]["ideal_format"] == report.rows[0].ideal_format
    assert [row["name"] for row in as_json["rows"]] == ["conv", "logits"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.gzip_bytes = 1
    quick = inspection.sizes(conv_model(k), gzip=False)
    assert (quick.gzip_bytes, quick.gzip_ratio, quick.rows[0].gzip_bytes) == (None, None, None)
    assert quick.ideal_sparse_bytes == report.ideal_sparse_bytes
    assert "gzip 1" not in str(quick)


def test_sizes_of_what_has_none():
    with pytest.raises(TypeError, match="model must be a Keras 3 or tf_keras model"):
        inspection.sizes(3)
    with pytest.raises(ValueError, match="has no weights yet"):
        inspection.sizes(tf_keras.Sequential([tf_keras.layers.Dense(2)]))
    with pytest.raises(ValueError, match="neither kernels nor pruned weights"):
        inspection.sizes(keras.Sequential([keras.Input((2,)), keras.layers.ReLU()]))
    with pytest.raises(TypeError, match="gzip must be True or False, got 1"):
        inspection.sizes(dense_model(), gzip=1)


# --- the sparse products --------------------------------------------------------------------------

LAYERS = {
    "dense": ("Dense", {"units": 7}, (11,)),
    "dense on a sequence": ("Dense", {"units": 7, "activation": "tanh"}, (5, 11)),
    "dense without bias": ("Dense", {"units": 7, "use_bias": False}, (11,)),
    "conv1d": ("Conv1D", {"filters": 6, "kernel_size": 3, "strides": 2}, (9, 4)),
    "conv1d same": (
        "Conv1D",
        {"filters": 6, "kernel_size": 4, "strides": 3, "padding": "same"},
        (10, 4),
    ),
    "conv1d causal": (
        "Conv1D",
        {"filters": 6, "kernel_size": 3, "dilation_rate": 2, "padding": "causal"},
        (9, 4),
    ),
    "conv2d": ("Conv2D", {"filters": 6, "kernel_size": 3, "activation": "relu"}, (7, 6, 4)),
    "conv2d same": ("Conv2D", {"filters": 6, "kernel_size": (2, 3), "padding": "same"}, (7, 6, 4)),
    "conv2d strides": ("Conv2D", {"filters": 6, "kernel_size": 3, "strides": (2, 3)}, (9, 8, 4)),
    "conv2d same strides": (
        "Conv2D",
        {"filters": 6, "kernel_size": 3, "strides": 2, "padding": "same"},
        (9, 8, 4),
    ),
    "conv2d pointwise": (
        "Conv2D",
        {"filters": 6, "kernel_size": 1, "strides": 2, "padding": "same"},
        (9, 8, 4),
    ),
    "conv2d dilated": (
        "Conv2D",
        {"filters": 6, "kernel_size": 3, "dilation_rate": 2, "padding": "same"},
        (9, 8, 4),
    ),
    "conv2d grouped": ("Conv2D", {"filters": 6, "kernel_size": 3, "groups": 2}, (7, 6, 4)),
    "depthwise": ("DepthwiseConv2D", {"kernel_size": 3, "depth_multiplier": 2}, (7, 6, 4)),
    "depthwise 1d": ("DepthwiseConv1D", {"kernel_size": 3, "padding": "same"}, (9, 4)),
}
OPERATIONS = {"tf.sparse.sparse_dense_matmul", "tf.raw_ops.SparseMatrixMatMul"}


@both
@pytest.mark.parametrize("case", LAYERS)
def test_the_sparse_product_is_the_layers_own_output(k, case, rng):
    name, options, shape = LAYERS[case]
    layer = getattr(k.layers, name)(**options)
    (weight,) = weights.kernels(one_layer(layer, shape, rng, 0.7))
    assert speed._obstacle(weight) == ""
    x = tf.constant(rng.normal(size=(3, *shape)).astype(np.float32))
    expected = layer(x)
    assert np.ptp(expected) > 0.1
    found = speed._products(weight)
    assert set(found) == OPERATIONS
    for product in found.values():
        outputs = tf.function(product)(x)
        assert outputs.shape == expected.shape
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


def test_a_kernel_of_nothing_but_zeros_gives_the_bias(rng):
    layer = tf_keras.layers.Dense(5)
    (weight,) = weights.kernels(one_layer(layer, (4,), rng, 1.0))
    for product in speed._products(weight).values():
        np.testing.assert_array_equal(product(tf.ones((2, 4))), [layer.bias.numpy()] * 2)


@both
def test_half_precision_is_multiplied_by_what_takes_it(k, rng):
    layer = k.layers.Dense(5, dtype="bfloat16")
    (weight,) = weights.kernels(one_layer(layer, (4,), rng))
    ((name, product),) = speed._products(weight).items()
    assert name == "tf.sparse.sparse_dense_matmul"
    outputs = product(tf.ones((2, 4), tf.bfloat16))
    assert outputs.dtype == tf.bfloat16
    np.testing.assert_allclose(
        tf.cast(outputs, tf.float32), tf.cast(layer(tf.ones((2, 4))), tf.float32), rtol=5e-2
    )


@both
@pytest.mark.parametrize(
    ("name", "options", "shape", "reason"),
    [
        ("Conv3D", {"filters": 2, "kernel_size": 2}, (3, 3, 3, 2), "TensorFlow for Conv3D"),
        ("Conv2DTranspose", {"filters": 2, "kernel_size": 2}, (3, 3, 2), "for Conv2DTranspose"),
        ("SeparableConv2D", {"filters": 2, "kernel_size": 2}, (3, 3, 2), "for SeparableConv2D"),
        (
            "Conv2D",
            {"filters": 2, "kernel_size": 2, "data_format": "channels_first"},
            (2, 3, 3),
            "for Conv2D with channels first",
        ),
    ],
)
def test_layers_without_a_sparse_kernel(k, name, options, shape, reason, rng):
    model = one_layer(getattr(k.layers, name)(**options), shape, rng)
    for weight in weights.kernels(model):
        assert speed._obstacle(weight).startswith("no sparse kernel in TensorFlow")
        assert speed._obstacle(weight).endswith(reason)


def test_few_zeros_are_not_worth_a_try(rng):
    (weight,) = weights.kernels(one_layer(tf_keras.layers.Dense(5), (4,), rng, 0.25))
    assert speed._obstacle(weight) == "a sparse product is not tried at 25 % zeros"


# --- structure ------------------------------------------------------------------------------------


def structure(matrix):
    return KernelStructure.of(np.asarray(matrix, np.float64)[np.newaxis, np.newaxis])


def test_dead_filters_and_inputs_by_hand():
    kernel = np.ones((2, 3, 4, 5))  # groups, positions, inputs, outputs
    kernel[0, :, :, 1] = kernel[1, :, :, 4] = 0.0
    kernel[1, :, 2] = 0.0
    kernel[0, 0, 0] = 0.0  # at one position only: not dead
    found = KernelStructure.of(kernel)
    assert (found.filters, found.dead_filters) == (10, 2)
    assert (found.inputs, found.dead_inputs) == (8, 1)
    assert found.words[:2] == ("2 of 10 filters dead", "1 of 8 inputs dead")


def test_two_of_four_goes_along_the_inputs():
    column = np.array([1, 0, 1, 0, 0, 1, 1, 0])
    assert structure(np.stack([column] * 8, axis=1)).two_of_four == 1.0
    assert "2:4 along the inputs" in structure(np.stack([column] * 8, axis=1)).words
    # Along the outputs the same pattern is none: whole inputs are full.
    assert structure(np.stack([column] * 8, axis=0)).two_of_four == 0.5
    three = np.array([1, 1, 1, 0, 1, 0, 0, 0])
    assert structure(three[:, np.newaxis]).two_of_four == 0.5
    assert structure(np.ones((6, 1))).two_of_four == 0.5  # 1 1 1 1, 1 1 and two of padding
    assert structure(np.ones((3, 9))).two_of_four is None


def test_two_of_four_as_tfmot_makes_it(rng):
    library = tfmot().sparsity.keras
    schedule = library.ConstantSparsity(0.5, begin_step=0, frequency=1)
    model = tf_keras.Sequential(
        [
            tf_keras.layers.Conv2D(6, 3, input_shape=(8, 8, 8), name="conv"),
            tf_keras.layers.Flatten(),
            tf_keras.layers.Dense(9, name="last"),
        ]
    )
    wrapped = library.prune_low_magnitude(model, schedule, sparsity_m_by_n=(2, 4))
    for wrapper in wrappers.wrapped_layers(wrapped):
        wrapper.pruning_step.assign(1)
        wrapper.pruning_obj.conditional_mask_update()
    for weight in weights.kernels(wrapped):
        assert 0.45 < np.mean(weight.values == 0) < 0.55
        assert KernelStructure.of(weight.canonical()).two_of_four == 1.0


@pytest.mark.parametrize(
    ("height", "width", "name"),
    [(4, 4, "blocks_4x4"), (1, 16, "blocks_1x16"), (16, 1, "blocks_16x1")],
)
def test_blocks_are_found_on_their_grid(height, width, name, rng):
    pattern = rng.uniform(size=(32 // height, 32 // width)) < 0.5
    kernel = np.kron(pattern, np.ones((height, width)))
    found = structure(kernel)
    assert getattr(found, name) == 1.0
    assert sum(share == 1.0 for share in found.shares[1:]) == 1
    shifted = np.roll(kernel, (height // 2, width // 2), axis=(0, 1))
    assert getattr(structure(shifted), name) < 1.0
    # One weight in a block of zeros: the other 15 are no longer in a block.
    row, column = np.argwhere(kernel == 0)[0]
    kernel[row, column] = 1.0
    zeros = np.sum(kernel == 0)
    assert getattr(structure(kernel), name) == (zeros - 15) / zeros


def test_blocks_at_the_edge_and_where_there_are_none():
    kernel = np.ones((6, 5))
    kernel[4:, 4:] = 0.0  # the block is cut to 2×1 by both edges
    assert structure(kernel).blocks_4x4 == 1.0
    assert structure(np.ones((6, 5))).blocks_4x4 is None
    assert structure(np.zeros((3, 5))).blocks_4x4 is None
    assert structure(np.zeros((6, 5))).blocks_16x1 is None


def test_random_zeros_fall_into_blocks_as_often_as_chance_has_it(rng):
    found = structure(rng.uniform(size=(512, 512)) < 0.05)
    for share in found.shares[1:]:
        assert share == pytest.approx(0.95**15, abs=0.02)
    assert found.two_of_four == pytest.approx(1 - 4 * 0.05**3 * 0.95 - 0.05**4, abs=0.002)


# --- times and verdicts ---------------------------------------------------------------------------


def test_functions_run_in_turn_after_a_warm_up():
    log = []
    timed = {
        name: _timing.Timed(lambda name=name: log.append(name), lambda name=name: log.append("-"))
        for name in "ab"
    }
    seconds = _timing.interleaved(timed, rounds=3)
    assert log == ["-", "a", "-", "b"] * (3 + _timing.WARM_UP)
    assert gc.isenabled()
    assert list(seconds) == ["a", "b"]
    for found in map(Times.of, seconds.values()):
        assert found.rounds == 3
        assert 0 < found.lower_quartile <= found.median <= found.upper_quartile < math.inf


def test_quartiles_are_numpys(rng):
    seconds = rng.uniform(size=9).tolist()
    found = Times.of(seconds)
    assert found.median == np.median(seconds)
    assert found.lower_quartile == sorted(seconds)[2]
    assert found.upper_quartile == sorted(seconds)[6]
    assert str(Times.of([0.002])) == "2 (2 to 2) ms"
    assert str(Times.of([2e-5])) == "20 (20 to 20) µs"


def times(median, spread=0.01):
    return Times(median, median * (1 - spread), median * (1 + spread), 30)


def row(as_is, filled, sparse=None, **options):
    known = {
        "name": "hidden",
        "kind": "Dense",
        "shape": (8, 8),
        "sparsity": 0.99,
        "input_shape": (32, 8),
        "structure": structure(np.eye(8)),
        "call": times(1e-4),
    }
    return LayerSpeed(**{**known, "as_is": as_is, "filled": filled, "sparse": sparse, **options})


@pytest.mark.parametrize(
    ("as_is", "filled", "sparse", "verdict"),
    [
        (1.0, 1.0, 3.1, "no faster: dense kernels multiply zeros at the same speed; "
         "sparse would be 3.1x slower here at 99 % zeros"),
        (1.8, 1.8, 1.0, "no faster: dense kernels multiply zeros at the same speed; "
         "sparse would be 1.8x faster here at 99 % zeros"),
        (1.0, 0.5, 1.001, "no faster: dense kernels multiply zeros at the same speed; "
         "sparse would be about as fast here at 99 % zeros"),
        (1.0, 1.09, 3.0, "no faster: dense kernels multiply zeros at the same speed; "
         "sparse would be 3x slower here at 99 % zeros"),
        (1.0, 2.0, 4.0, "2x faster than without zeros; sparse would be 4x slower here at 99 % "
         "zeros"),
        (1.5e-4, 1.5e-4, 1.2e-4, "no faster: dense kernels multiply zeros at the same speed; too "
         "small to tell whether sparse would be faster: most of it is the call"),
    ],
)  # fmt: skip
def test_the_verdict_follows_from_the_figures(as_is, filled, sparse, verdict):
    found = row(times(as_is), times(filled), times(sparse))
    assert found.zeros_ratio == as_is / filled
    assert found.sparse_ratio == sparse / as_is
    assert found.verdict == verdict


def test_the_verdict_on_times_that_differ_but_overlap():
    found = row(times(1.0, 0.9), times(1.0), times(1.5))
    assert found.verdict.endswith(
        "; too unsteady to tell: by the medians sparse would be 1.5x slower here at 99 % zeros"
    )


def test_the_verdict_where_something_was_not_timed():
    found = row(times(1.0), times(1.0), obstacle="no sparse kernel in TensorFlow for Conv3D")
    assert found.verdict.endswith("; no sparse kernel in TensorFlow for Conv3D")
    assert found.sparse_ratio is None
    assert row(None, None, obstacle="so").verdict == "not timed: so"
    dense = row(times(1.0), times(1.0), sparsity=0.0, obstacle="not tried")
    assert dense.verdict == "it has no zeros; not tried"


def test_the_speed_report_as_table_and_as_json():
    rows = (row(times(1.0), times(1.0), times(3.1)), row(None, None, obstacle="not called"))
    report = SpeedReport(rows, times(2.0), times(1.6), "CPU:0 (abacus)", 32, 30, 0)
    assert report.zeros_ratio == 1.25
    assert report.verdict == "no faster: dense kernels multiply zeros at the same speed"
    table = str(report)
    for text in ("3.10", "abacus", "batch of 32", "30 rounds", "3.1x slower", "pruning.compact"):
        assert text in table
    assert "hidden: 2:4 along the inputs." in table
    as_json = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert as_json["rows"][0]["sparse_ratio"] == pytest.approx(3.1)
    assert as_json["rows"][0]["verdict"] == rows[0].verdict
    assert as_json["rows"][1]["as_is"] is None
    assert as_json["as_is"]["median"] == 2.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.seed = 1


# --- the check ------------------------------------------------------------------------------------


def assert_timed(found):
    assert 0 < found.lower_quartile <= found.median <= found.upper_quartile < math.inf


@both
def test_a_model_is_checked_and_left_as_it_was(k, rng):
    model = conv_model(k)
    conv = model.get_layer("conv")
    conv.kernel.assign(sparse_values(rng, (3, 3, 1, 6), 0.9))
    before, calls = snapshot(model), [layer.call for layer in model.layers]
    report = inspection.speed_check(model, batch_size=4, rounds=3, seed=7)
    assert_unchanged(model, before)
    assert [layer.call for layer in model.layers] == calls
    assert (report.batch_size, report.rounds, report.seed) == (4, 3, 7)
    assert report.device.startswith("CPU:0 (")
    first, last = report.rows
    assert (first.name, first.kind, first.input_shape) == ("conv", "Conv2D", (4, 8, 8, 1))
    assert first.sparsity == 49 / 54
    assert first.structure == KernelStructure.of(weights.kernels(model)[0].canonical())
    assert first.sparse_operation in OPERATIONS
    for found in (first.call, first.as_is, first.filled, first.sparse, report.as_is, report.filled):
        assert_timed(found)
        assert found.rounds == 3
    assert first.sparse_ratio == first.sparse.median / first.as_is.median
    assert (last.input_shape, last.sparse) == ((4, 6), None)
    assert last.verdict == "it has no zeros; a sparse product is not tried at 0 % zeros"
    assert_timed(last.as_is)
    assert "whole model" in str(report)


def test_many_checks_give_no_warning_of_retracing(rng, caplog):
    model = one_layer(keras.layers.Dense(9), (6,), rng)
    for _ in range(6):  # TensorFlow warns of five
        inspection.speed_check(model, batch_size=1, rounds=1)
    assert "retracing" not in caplog.text


@both
def test_what_is_timed_without_zeros_has_none_and_all_comes_back(k, rng, monkeypatch):
    model = one_layer(k.layers.Dense(9), (6,), rng)
    before, seen = snapshot(model), []

    def spy(functions, rounds):
        for name, timed in functions.items():
            timed.prepare()
            seen.append((name, np.mean(model.layers[-1].kernel.numpy() == 0)))
        raise RuntimeError("stopped")

    monkeypatch.setattr(_timing, "interleaved", spy)
    with pytest.raises(RuntimeError, match="stopped"):
        inspection.speed_check(model)
    share = round(0.8 * 54) / 54
    assert seen == [("call", share), ("as_is", share), ("sparse", share), ("filled", 0.0)]
    assert_unchanged(model, before)


def test_wrapped_layers_are_timed_with_their_masks_applied(rng):
    model = with_wrapper_masks(dense_model(), rng, 0.8)
    for _ in range(2):
        report = inspection.speed_check(model, batch_size=2, rounds=1)
        assert [r.name for r in report.rows] == ["hidden", "logits"]
        for found, (kernel, mask) in zip(
            report.rows, wrappers.pruned_variables(model), strict=True
        ):
            assert found.sparsity == np.mean(mask.numpy() == 0) > 0.5
            np.testing.assert_array_equal(kernel.numpy() == 0, mask.numpy() == 0)
            assert found.sparse is not None


class Subclassed(tf_keras.Model):
    def __init__(self, rng):
        super().__init__()
        prune = tfmot().sparsity.keras.prune_low_magnitude
        self.hidden = prune(tf_keras.layers.Dense(5, name="hidden"))
        self.twice = tf_keras.layers.Dense(5, name="twice")
        self.unused = tf_keras.layers.Dense(5, name="unused")
        self.unused.build((None, 5))

    def call(self, x):
        return self.twice(self.twice(self.hidden(x)))


def test_a_subclassed_model_needs_inputs_and_its_wrappers_do_not_disturb(rng, monkeypatch):
    model = Subclassed(rng)
    model(np.ones((1, 4)))
    for _, mask in wrappers.pruned_variables(model):
        mask.assign(np.eye(4, 5))
    with pytest.raises(ValueError, match=r"subclassed model \(Subclassed\).* Pass x="):
        inspection.speed_check(model)
    shares, interleaved = [], _timing.interleaved

    def spy(functions, rounds):
        for timed in functions.values():
            timed.prepare()
            timed.run()
            shares.append(np.mean(model.hidden.layer.kernel.numpy() == 0))
        return interleaved(functions, rounds)

    monkeypatch.setattr(_timing, "interleaved", spy)
    report = inspection.speed_check(model, rng.random((3, 4)), batch_size=5, rounds=1)
    assert shares[-2:] == [0.8, 0.0]  # the whole model, with its wrapper, and then without zeros
    found = {r.name: r for r in report.rows}
    assert (found["hidden"].sparsity, found["hidden"].input_shape) == (0.8, (5, 4))
    assert found["twice"].input_shape == (5, 5)
    assert found["unused"].verdict == "not timed: it is not called with one tensor of known shape"
    ((kernel, mask),) = wrappers.pruned_variables(model)
    np.testing.assert_array_equal(mask.numpy(), np.eye(4, 5))
    np.testing.assert_array_equal(kernel.numpy() != 0, mask.numpy() != 0)


@both
def test_cells_of_recurrent_layers_are_not_timed_alone(k, rng):
    batch = k.Input((5, 3))
    model = k.Model(batch, k.layers.Dense(2, name="last")(k.layers.SimpleRNN(4)(batch)))
    report = inspection.speed_check(model, batch_size=2, rounds=1)
    *cells, last = report.rows
    assert len(cells) == 2
    assert all(found.verdict.startswith("not timed: ") for found in cells)
    assert_timed(last.as_is)


@keras.saving.register_keras_serializable("test")
class Doubled(keras.layers.Dense):
    def call(self, x):
        return 2 * super().call(x) + 10


@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have a `quantize` method")
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_layer_is_timed_and_filled(mode, rng, monkeypatch):
    model = one_layer(keras.layers.Dense(8), (8,), rng)
    model.quantize(mode)
    kernel, filled, interleaved = model.layers[-1]._kernel, [], _timing.interleaved
    before = kernel.numpy().copy()

    def spy(functions, rounds):
        functions["filled"].prepare()
        filled.append(kernel.numpy().copy())
        return interleaved(functions, rounds)

    monkeypatch.setattr(_timing, "interleaved", spy)
    (found,) = inspection.speed_check(model, batch_size=2, rounds=1).rows
    assert found.input_shape == (2, 8)
    assert_timed(found.as_is)
    for values in filled:  # two of int4 in a byte
        assert (values & 15).all() and (mode == "int8" or (values >> 4 & 15).all())
    np.testing.assert_array_equal(kernel.numpy(), before)


@both
def test_gates_are_to_be_folded_first(k, rng):
    model = gates.add_gates(one_layer(k.layers.Dense(4), (4,), rng))
    with pytest.raises(
        ValueError, match=r"has gates: .* speed_check\(tscnc_tf\.gates\.fold\(model"
    ):
        inspection.speed_check(model)
    assert_timed(inspection.speed_check(gates.fold(model), batch_size=2, rounds=1).as_is)


def test_a_layer_that_computes_something_else_is_not_compared(rng):
    report = inspection.speed_check(one_layer(Doubled(5), (4,), rng), rounds=1)
    assert report.rows[0].sparse is None
    assert report.rows[0].verdict.endswith("; Doubled does not compute the product with its kernel")


def test_an_operation_that_fails_is_not_the_end(rng, monkeypatch):
    def fail(x):
        raise tf.errors.ResourceExhaustedError(None, None, "no memory")

    monkeypatch.setattr(speed, "_products", lambda weight: {"tf.none": fail})
    report = inspection.speed_check(
        one_layer(tf_keras.layers.Dense(5), (4,), rng), batch_size=2, rounds=1
    )
    assert report.rows[0].obstacle == "tf.none fails here: ResourceExhaustedError"
    assert_timed(report.rows[0].as_is)


@both
def test_several_inputs_by_their_structure(k):
    a, b = k.Input((4,), name="a"), k.Input((3,), name="b")
    joined = k.layers.Concatenate()([a, b])
    model = k.Model({"a": a, "b": b}, k.layers.Dense(2, name="last")(joined))
    report = inspection.speed_check(model, batch_size=3, rounds=1)
    assert report.rows[0].input_shape == (3, 7)
    x = {"a": np.ones((1, 4)), "b": np.ones((1, 3))}
    assert inspection.speed_check(model, x, batch_size=6, rounds=1).rows[0].input_shape == (6, 7)


@pytest.mark.parametrize(("batch_size", "rows"), [(2, [0, 1]), (5, [0, 1, 2, 0, 1])])
def test_a_batch_is_cut_or_repeated(batch_size, rows, monkeypatch):
    seen, compiled = [], speed.compiled

    def spy(function, x):
        seen.append(x)
        return compiled(function, x)

    monkeypatch.setattr(speed, "compiled", spy)
    model = tf_keras.Sequential([tf_keras.layers.Dense(2, input_shape=(1,))])
    inspection.speed_check(model, np.arange(3.0)[:, np.newaxis], batch_size=batch_size, rounds=1)
    assert seen[-1].dtype == tf.float32
    np.testing.assert_array_equal(seen[-1][:, 0], rows)
    layers = [tf_keras.layers.Embedding(3, 2, input_length=1), tf_keras.layers.Dense(2)]
    tokens = tf_keras.Input((1,), dtype="int32")
    model = tf_keras.Model(tokens, layers[1](layers[0](tokens)))
    x = np.arange(3, dtype=np.int32)[:, np.newaxis]
    inspection.speed_check(model, x, batch_size=batch_size, rounds=1)
    assert seen[-1].dtype == tf.int32
    np.testing.assert_array_equal(seen[-1][:, 0], rows)


def test_a_model_made_under_a_distribution_strategy(rng):
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = dense_model()
    before = snapshot(model)
    report = inspection.speed_check(model, batch_size=2, rounds=1)
    assert_unchanged(model, before)
    assert_timed(report.as_is)


def any_size(k):
    return k.Sequential([k.Input((None, None, 1)), k.layers.Conv2D(2, 3)])


@both
def test_inputs_that_cannot_be_drawn_are_asked_for(k):
    with pytest.raises(ValueError, match=r"float32 \(any, any, any, 1\).* Pass x="):
        inspection.speed_check(any_size(k))
    report = inspection.speed_check(any_size(k), images(4)[0], batch_size=4, rounds=1)
    assert report.rows[0].input_shape == (4, 8, 8, 1)
    tokens = k.Input((5,), dtype="int32")
    embedded = k.layers.Embedding(4, 2)(tokens)
    with pytest.raises(ValueError, match=r"an input int32 \(any, 5\).* only floats of known shape"):
        inspection.speed_check(k.Model(tokens, k.layers.Dense(2)(embedded)))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
        ({"rounds": 1.5}, TypeError, "rounds must be an integer, got 1.5"),
        ({"seed": -1}, ValueError, "seed must be >= 0, got -1"),
        ({"x": np.ones((0, 6))}, ValueError, r"x must be float32 \(any, .*shape \(0, 6\)"),
    ],
)
def test_bad_arguments_of_the_check(options, kind, message):
    with pytest.raises(kind, match=message):
        inspection.speed_check(dense_model(), **options)


def test_the_check_of_what_cannot_be_timed():
    with pytest.raises(TypeError, match="model must be a Keras 3 or tf_keras model, got int"):
        inspection.speed_check(3)
    with pytest.raises(ValueError, match="has no weights yet"):
        inspection.speed_check(tf_keras.Sequential([tf_keras.layers.Dense(2)]))
    with pytest.raises(ValueError, match="has no kernels: there are no layers to time"):
        inspection.speed_check(keras.Sequential([keras.Input((2,)), keras.layers.ReLU()]))
