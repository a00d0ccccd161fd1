"""Files of LiteRT and ONNX: the model's logits, its zeros, and its robust accuracy."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import warnings

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf
import tf_keras
from ai_edge_litert.interpreter import Interpreter
from helpers import FLAVOURS, images, interrupted, names

from tscnc_tf import (
    EvaluationWarning,
    _files,
    _keras,
    attacks,
    evaluate_robustness,
    export,
    inspection,
    pruning,
)
from tscnc_tf.export import calibration, constants, litert, preflight, writer
from tscnc_tf.export import onnx as export_onnx_module

tfmots = _keras.tfmot().sparsity.keras
SHAPE = (8, 8, 1)
CLASSES = 3
EXPORTS = {"litert": export.export_litert, "onnx": export.export_onnx}
LOADS = {"litert": export.load_litert, "onnx": export.load_onnx}
FORMS = {"litert": litert.LiteRT, "onnx": export_onnx_module.ONNX}
every_format = pytest.mark.parametrize("form", EXPORTS)
every_flavour = pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)


def network(library, sparsity=0.95, seed=0):
    """Conv, BatchNorm, depthwise and Dense, with random statistics, and zeros in its kernels."""
    layers = library.layers
    inputs = library.Input(SHAPE, name="image")
    x = layers.Conv2D(48, 3, padding="same", name="conv")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU()(x)
    x = layers.DepthwiseConv2D(3, padding="same", name="depth")(x)
    x = layers.BatchNormalization(name="norm2")(x)
    x = layers.ReLU()(x)
    x = layers.Flatten()(x)
    x = layers.Dense(64, "relu", name="hidden")(x)
    model = library.Model(inputs, layers.Dense(CLASSES, name="last")(x), name="net")
    randomize(model, sparsity, seed)
    return model


def randomize(model, sparsity, seed=0):
    """Give a model random weights, so many of each kernel zero, and return what is in them."""
    generator = np.random.default_rng(seed)
    for variable in model.weights:
        values = generator.normal(0, 0.5, variable.shape).astype("float32")
        if "variance" in variable.name:
            values = 0.5 + np.abs(values)
        if len(variable.shape) > 1:
            dead = generator.permutation(values.size) < round(sparsity * values.size)
            values[dead.reshape(values.shape)] = 0
        variable.assign(values)


def zeros(model):
    """Return by layer the number of zeros in each kernel, as NumPy counts them."""
    return {
        layer.name: int(np.count_nonzero(np.asarray(weight) == 0))
        for layer in model.layers
        for weight in layer.weights
        if len(weight.shape) > 1
    }


def trained(library):
    """A network that tells the bars of `images` apart, and can be fooled."""
    library.utils.set_random_seed(0)
    layers = library.layers
    inputs = library.Input(SHAPE, name="image")
    x = layers.Conv2D(6, 3, padding="same", name="conv")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(8, 3, name="conv2")(x))
    model = library.Model(inputs, layers.Dense(CLASSES, name="last")(x), name="net")
    loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(library.optimizers.Adam(0.02), loss)
    model.fit(*images(), batch_size=16, epochs=8, verbose=0)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """By flavour and format: a model with 95 % zeros, its file, its report; not to be changed."""
    found = {}

    def get(library, form):
        key = (library.__name__, form)
        if key not in found:
            model = network(library)
            path = tmp_path_factory.mktemp(form) / f"net.{form}"
            report = EXPORTS[form](model, path, expected_sparsity=0.94)
            found[key] = (model, path, report)
        return found[key]

    return get


@pytest.fixture
def batch(rng):
    return rng.random((5, *SHAPE), np.float32)


def small(library=tf_keras, units=6):
    return library.Sequential(
        [
            library.Input((4,), name="features"),
            library.layers.Dense(units, name="first"),
            library.layers.Dense(3, name="last"),
        ]
    )


def weights_in(path, form):
    """Return the constants of two axes or more in a file, by the format's own reader."""
    if form == "onnx":
        tensors = map(onnx.numpy_helper.to_array, onnx.load(path).graph.initializer)
        return [array for array in tensors if array.ndim > 1 and array.dtype == np.float32]
    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    found = []
    for detail in interpreter.get_tensor_details():
        try:
            found.append(interpreter.get_tensor(detail["index"]))
        except ValueError:
            continue  # no constant: it has no value before the first run
    return [array for array in found if array.ndim > 1 and array.dtype == np.float32]


# What is written


@every_flavour
@every_format
def test_logits_and_zeros_are_those_of_the_model(exported, library, form, batch):
    model, path, report = exported(library, form)
    counted = zeros(model)
    assert {row.name: row.model_zeros for row in report.kernels} == counted
    assert {row.name: row.zeros for row in report.kernels} == counted
    assert report.sparsity == pytest.approx(0.95, abs=0.01)
    found = [(array.size, np.count_nonzero(array == 0)) for array in weights_in(path, form)]
    for row in report.kernels:
        assert (row.weights, row.zeros) in found

    expected = np.asarray(model(batch, training=False))
    scale = max(1.0, np.abs(expected).max())
    assert report.max_logit_difference <= 1e-5 * scale
    served = LOADS[form](path)
    for size in (5, 1, 3, 5):
        logits = served(batch[:size])
        assert logits.dtype == tf.float32
        np.testing.assert_allclose(logits, expected[:size], rtol=0, atol=1e-5 * scale)
    assert np.ptp(expected, axis=0).max() > 0.05


@every_flavour
def test_the_file_serves_without_us(exported, library, batch):
    model, path, _ = exported(library, "onnx")
    expected = np.asarray(model(batch, training=False))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["output_0"], {"image": batch})
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    model, path, _ = exported(library, "litert")
    runner = Interpreter(str(path)).get_signature_runner("serving_default")
    logits = runner(image=batch)["output_0"]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@every_format
def test_the_report(exported, form):
    model, path, report = exported(keras, form)
    content = path.read_bytes()
    assert (report.path, report.file_bytes) == (str(path), len(content))
    assert report.sha256 == hashlib.sha256(content).hexdigest()
    assert report.gzip_bytes == len(gzip.compress(content, 9, mtime=0)) < len(content) / 2
    assert report.ideal_sparse_bytes == inspection.sizes(model).ideal_sparse_bytes
    assert report.ideal_sparse_bytes < report.gzip_bytes
    assert report.format == {"litert": "LiteRT", "onnx": "ONNX"}[form]
    assert report.precision == "float32" and report.expected_sparsity == 0.94
    assert [str(tensor) for tensor in report.inputs] == ["image (any, 8, 8, 1) float32"]
    assert [str(tensor) for tensor in report.outputs] == [f"output_0 (any, {CLASSES}) float32"]
    assert report.probe_examples == 8 and report.same_class == 1.0
    assert report.settings == ({"opset": 15} if form == "onnx" else {})
    extra = {"litert": {"ai-edge-litert"}, "onnx": {"onnx", "tf2onnx", "onnxruntime"}}[form]
    assert set(report.versions) == {"tscnc_tf", "tensorflow", "keras", "numpy", "python"} | extra
    as_json = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert as_json == report.to_dict()
    assert as_json["kernels"][2]["zeros"] == zeros(model)["hidden"]
    text = str(report)
    for words in ("hidden", f"{zeros(model)['hidden']:,}", "95.", "gzipped", "allowed", "100.0 %"):
        assert words in text
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.path = "elsewhere"


@every_format
def test_masks_are_applied_and_wrappers_left_out(tmp_path, form, rng):
    model = tfmots.prune_low_magnitude(
        small(), tfmots.ConstantSparsity(0.5, begin_step=0, frequency=1)
    )
    for layer in model.layers:
        layer.pruning_step.assign(1)
        layer.pruning_obj.conditional_mask_update()
    kernel, mask, _ = model.layers[0].pruning_vars[0]
    kernel.assign(np.where(mask.numpy() == 0, -7.0, kernel.numpy()))  # as after an optimizer's step
    report = EXPORTS[form](model, tmp_path / "file", expected_sparsity=0.5)
    assert [(row.name, row.zeros) for row in report.kernels] == [("first", 12), ("last", 9)]
    x = rng.random((4, 4), np.float32)
    logits = LOADS[form](tmp_path / "file")(x)
    np.testing.assert_allclose(logits, model(x, training=False), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"expected_sparsity=0\.9 is not reached"):
        EXPORTS[form](model, tmp_path / "other", expected_sparsity=0.9)
    assert names(tmp_path) == ["file"]


@every_flavour
@every_format
def test_a_model_that_was_pruned_at_once(tmp_path, library, form, rng):
    model = small(library)
    pruning.prune_now(model, 0.5)
    report = EXPORTS[form](model, tmp_path / "file", expected_sparsity=0.5)
    assert [(row.name, row.zeros) for row in report.kernels] == [("first", 12), ("last", 9)]
    x = rng.random((4, 4), np.float32)
    logits = LOADS[form](tmp_path / "file")(x)
    np.testing.assert_allclose(logits, model(x, training=False), rtol=1e-5, atol=1e-5)


def layer_of_each_kind(library):
    layers = library.layers
    return {
        "grouped": ((8, 8, 4), layers.Conv2D(6, 3, groups=2)),
        "dilated": ((8, 8, 2), layers.Conv2D(6, 3, dilation_rate=2)),
        "separable": ((8, 8, 3), layers.SeparableConv2D(5, 3)),
        "multiplied": ((8, 8, 3), layers.DepthwiseConv2D(3, depth_multiplier=2)),
        "transposed": ((4, 4, 2), layers.Conv2DTranspose(6, 3)),
        "1d": ((8, 4), layers.Conv1D(6, 3)),
        "3d": ((4, 4, 4, 2), layers.Conv3D(6, 3)),
        "einsum": ((4, 6), layers.EinsumDense("abc,cd->abd", output_shape=(4, 5))),
        "recurrent": ((6, 4), layers.LSTM(5, unroll=True)),
    }


@every_flavour
@every_format
@pytest.mark.parametrize("kind", layer_of_each_kind(keras))
def test_layers_of_all_kinds(tmp_path, library, form, kind, rng):
    shape, layer = layer_of_each_kind(library)[kind]
    model = library.Sequential([library.Input(shape), layer, library.layers.Flatten()])
    randomize(model, 0.7)
    report = EXPORTS[form](model, tmp_path / "file")
    assert report.kernels and all(row.zeros == row.model_zeros > 0 for row in report.kernels)
    assert report.max_logit_difference <= 1e-5 * max(1, report.logit_tolerance / 1e-4)
    x = rng.random((3, *shape), np.float32)
    logits = LOADS[form](tmp_path / "file")(x)
    np.testing.assert_allclose(logits, model(x, training=False), rtol=1e-5, atol=1e-5)


def test_recurrent_layers_in_onnx(tmp_path):
    model = keras.Sequential([keras.Input((6, 4)), keras.layers.LSTM(5), keras.layers.Dense(3)])
    randomize(model, 0.7)
    report = export.export_onnx(model, tmp_path / "file")  # the gates in another order
    assert [row.zeros for row in report.kernels] == [row.model_zeros for row in report.kernels]
    with pytest.raises(Exception, match="TensorList") as error:
        export.export_litert(model, tmp_path / "other")
    assert any("needs unroll=True" in note for note in error.value.__notes__)
    assert names(tmp_path) == ["file"]


@every_flavour
@every_format
def test_models_of_several_inputs(tmp_path, library, form, rng):
    second, first = library.Input((4,), name="b"), library.Input((3,), name="a")
    joined = library.layers.Concatenate()([second, first])
    outputs = {"y": library.layers.Dense(2, name="y")(joined), "x": library.layers.ReLU()(first)}
    model = library.Model([second, first], outputs)
    report = EXPORTS[form](model, tmp_path / "file")
    assert {str(tensor) for tensor in report.inputs} == {
        "a (any, 3) float32",
        "b (any, 4) float32",
    }
    x = {"a": rng.random((5, 3), np.float32), "b": rng.random((5, 4), np.float32)}
    served = LOADS[form](tmp_path / "file")
    expected = model([x["b"], x["a"]], training=False)
    assert set(served(x)) == {"x", "y"} and report.same_class is None
    for name, logits in served(x).items():
        np.testing.assert_allclose(logits, expected[name], rtol=1e-5, atol=1e-6)
    in_a_graph = tf.function(served)(x)["y"]
    np.testing.assert_allclose(in_a_graph, expected["y"], rtol=1e-5, atol=1e-6)
    for wrong in (x["a"], {"a": x["a"]}, [x["a"], x["b"]]):
        with pytest.raises(ValueError, match=r"a dict with the names \['"):
            served(wrong)
    with pytest.raises(ValueError, match="the same number of examples, got"):
        served({"a": x["a"], "b": x["b"][:2]})


@every_format
def test_a_subclassed_model_serves_in_inference_mode(tmp_path, form, rng):
    class Net(tf_keras.Model):
        def __init__(self):
            super().__init__()
            self.dense, self.dropout = tf_keras.layers.Dense(3), tf_keras.layers.Dropout(0.5)

        def call(self, x, training=True):
            return self.dropout(self.dense(x), training=training)

    model, x = Net(), rng.random((2, 4), np.float32)
    model(x)
    with pytest.raises(ValueError, match=r"Pass probe="):
        EXPORTS[form](model, tmp_path / "file")
    EXPORTS[form](model, tmp_path / "file", probe=x)
    logits = LOADS[form](tmp_path / "file")(x)
    np.testing.assert_allclose(logits, model(x, training=False), rtol=1e-5, atol=1e-6)


@every_format
def test_tensors_in_python_are_no_inputs(tmp_path, form, rng):
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Normalization(mean=[1.0, 2.0, 3.0, 4.0], variance=[1.0, 2.0, 3.0, 4.0]),
            layers.Dense(3),
        ]
    )
    report = EXPORTS[form](model, tmp_path / "file")
    assert len(report.inputs) == 1
    x = rng.random((2, 4), np.float32)
    logits = LOADS[form](tmp_path / "file")(x)
    np.testing.assert_allclose(logits, model(x, training=False), rtol=1e-5, atol=1e-5)


def test_the_opset(tmp_path):
    for opset in (13, 18):
        path = tmp_path / f"{opset}"
        assert export.export_onnx(small(), path, opset=opset).settings == {"opset": opset}
        assert onnx.load(path).opset_import[0].version == opset
    for opset in (12, 99):
        with pytest.raises(ValueError, match=rf"opset must be [<>]= 1[38], .*got {opset}"):
            export.export_onnx(small(), tmp_path / "file", opset=opset)
    with pytest.raises(TypeError, match="opset must be an integer"):
        export.export_onnx(small(), tmp_path / "file", opset="15")


@pytest.mark.parametrize("count", [1, 3, 20])  # fewer and more than the probe's 8
def test_an_onnx_file_of_one_batch_size(tmp_path, count, rng):
    model = tf_keras.Sequential([tf_keras.layers.Dense(3, input_shape=(4,), name="last")])
    report = export.export_onnx(model, tmp_path / "net.onnx", batch_size=count)
    assert report.inputs[0].shape == (count, 4) and report.outputs[0].shape == (count, 3)
    assert report.settings["batch_size"] == report.probe_examples == count
    assert "Kernels are dense, as ONNX Runtime has no others" in str(report)
    x = rng.random((count, 4), np.float32)
    served = export.load_onnx(tmp_path / "net.onnx")
    np.testing.assert_allclose(served(x), model(x), atol=1e-6)
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        export.export_onnx(model, tmp_path / "net.onnx", batch_size=0)


# int8


@every_flavour
def test_int8_keeps_the_zeros(tmp_path, library, batch, rng):
    model, path = network(library), tmp_path / "net.tflite"
    hidden = model.get_layer("hidden").kernel
    hidden.assign(hidden * (np.arange(64) != 3))  # a neuron that is dead altogether
    calibration = rng.random((40, *SHAPE))
    report = export.export_litert(model, path, precision="int8", calibration=calibration)
    counted = zeros(model)
    assert {row.name: row.model_zeros for row in report.kernels} == counted
    for row in report.kernels:
        assert row.dtype == "int8" and row.zeros >= row.model_zeros
    assert report.settings == {"calibration_examples": 40}
    assert report.ideal_sparse_bytes is None
    assert report.logit_tolerance is None and "(allowed: any)" in str(report)
    assert report.precision == "int8" and 0 < report.max_logit_difference < 0.2

    interpreter = Interpreter(str(path))
    found = {detail["name"]: detail for detail in interpreter.get_tensor_details()}
    for row in report.kernels:
        quantization = found[row.tensor]["quantization_parameters"]
        assert found[row.tensor]["dtype"] == np.int8 and not quantization["zero_points"].any()
        stored = interpreter.get_tensor(found[row.tensor]["index"])
        assert np.count_nonzero(stored == 0) == row.zeros
    kernel = tf.convert_to_tensor(hidden).numpy()
    stored = interpreter.get_tensor(found[report.kernels[2].tensor]["index"])
    assert not stored.T[kernel == 0].any()

    assert [str(tensor) for tensor in report.inputs] == ["image (any, 8, 8, 1) float32"]
    logits = export.load_litert(path)(batch)
    assert logits.dtype == tf.float32
    expected = np.asarray(model(batch, training=False))
    assert 0 < np.abs(logits - expected).max() < 0.05 * np.abs(expected).max() + 0.05
    exact = export.export_litert(model, tmp_path / "exact")
    assert report.file_bytes < exact.file_bytes / 2


def test_an_int8_file_that_litert_cannot_run_is_explained(tmp_path, rng):
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.Conv2D(4, 3),
            keras.layers.Flatten(),
            keras.layers.Dense(4),
        ]
    )
    for layer, place in zip(model.layers, ((..., 0), (0, 0, 0, 0)), strict=False):
        kernel = layer.kernel.numpy() if place[0] is ... else np.zeros(layer.kernel.shape)
        kernel[place] = float(place[0] is not ...)  # the one weight left reads a dead filter
        layer.kernel.assign(kernel)
    x = rng.random((16, 8, 8, 3), np.float32)
    with pytest.raises(RuntimeError, match="failed to prepare") as caught:
        export.export_litert(model, tmp_path / "m.tflite", precision="int8", calibration=x)
    assert "pruning.compact removes such filters" in caught.value.__notes__[0]
    assert not list(tmp_path.iterdir())


def test_the_probe_of_int8_is_from_the_calibration_set(tmp_path, rng):
    data = rng.normal(0, 50, (20, 4))
    more = {"precision": "int8", "calibration": data}
    report = export.export_litert(small(), tmp_path / "a", **more)
    other = export.export_litert(small(), tmp_path / "b", probe=data[:3], **more)
    assert (report.probe_examples, other.probe_examples) == (8, 3)


def test_what_int8_asks_for(tmp_path):
    call = export.export_litert
    with pytest.raises(ValueError, match=r"calibration is missing.*hundred examples"):
        call(small(), tmp_path / "file", precision="int8")
    with pytest.raises(ValueError, match="calibration is for precision='int8' only"):
        call(small(), tmp_path / "file", calibration=np.ones((2, 4)))
    with pytest.raises(ValueError, match=r"calibration must be float32 \(any, 4\), got .*\(2, 5\)"):
        call(small(), tmp_path / "file", precision="int8", calibration=np.ones((2, 5)))
    with pytest.raises(
        ValueError, match="precision must be one of 'float32', 'float16', 'int8', got 'int4'"
    ):
        call(small(), tmp_path / "file", precision="int4")
    with pytest.raises(TypeError, match="model must be a Keras 3 or tf_keras model"):
        call(len, tmp_path / "file", precision="int8", calibration=np.ones((2, 4)))
    assert names(tmp_path) == []


CALIBRATIONS = {
    "a dataset of batches": lambda x, y: dataset(x).batch(7),
    "a dataset of pairs": lambda x, y: dataset((x, y)).batch(7),
    "a dataset with weights": lambda x, y: dataset((x, y, y)).batch(7),
    "a dataset of unknown size": lambda x, y: dataset(x).filter(lambda _: True).batch(7),
    "a part of an endless one": lambda x, y: dataset(x).batch(8).repeat().take(5),
    "a generator": lambda x, y: (x[i : i + 7] for i in range(0, 40, 7)),
    "a generator of pairs": lambda x, y: ((x[i : i + 7], y[i : i + 7]) for i in range(0, 40, 7)),
    "a list of batches": lambda x, y: [x[:30], x[30:]],
    "a list of pairs": lambda x, y: [(x[:30], y[:30]), (x[30:], y[30:])],
    "nested lists": lambda x, y: x.tolist(),
    "a tensor": lambda x, y: tf.constant(x),
    "a Keras 3 dataset": lambda x, y: batches_of(keras.utils.PyDataset, x, y),
    "a tf_keras sequence": lambda x, y: batches_of(tf_keras.utils.Sequence, x, y),
}
dataset = tf.data.Dataset.from_tensor_slices


def batches_of(kind, x, y):
    """What Keras calls a dataset in Python."""

    class Made(kind):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            if index >= 4:
                raise IndexError
            return x[10 * index : 10 * index + 10], y[10 * index : 10 * index + 10]

    return Made()


@every_flavour
@pytest.mark.parametrize("kind", CALIBRATIONS)
def test_batches_are_calibrated_by_as_an_array_is(library, kind, rng):
    x, y = rng.normal(0, 1, (40, 4)).astype(np.float32), np.arange(40)
    found = calibration.examples(small(library), CALIBRATIONS[kind](x, y))
    np.testing.assert_array_equal(found, x)
    assert found.dtype == np.float32


@every_flavour
def test_int8_takes_all_batches_of_a_dataset(tmp_path, library, rng):
    model = small(library)
    x, y = rng.normal(0, 1, (40, 4)).astype(np.float32), np.arange(40)
    x[-1] = 9.0  # this one decides on the ranges
    call = functools.partial(export.export_litert, model, precision="int8", probe=x[:3])
    wanted = call(tmp_path / "wanted", calibration=x)
    report = call(tmp_path / "file", calibration=dataset((x, y)).batch(7))
    assert report.sha256 == wanted.sha256
    assert report.settings == {"calibration_examples": 40}
    assert report.sha256 != call(tmp_path / "other", calibration=x[:39]).sha256


@every_flavour
def test_models_of_several_inputs_are_calibrated_by_batches(library, rng):
    inputs = [library.layers.Input((4,), name=name) for name in ("left", "right")]
    merged = library.layers.Concatenate()(inputs)
    model = library.Model(inputs, library.layers.Dense(3, name="last")(merged))
    a, b = rng.random((2, 20, 4), np.float32)
    y = np.arange(20)
    for batches in (
        [a, b],
        dataset(((a, b), y)).batch(8),
        dataset(((a, b),)).batch(8),
        iter([[a[:5], b[:5]], [a[5:], b[5:]]]),
    ):
        np.testing.assert_array_equal(calibration.examples(model, batches), [a, b])
    wrong = dataset((a, b)).batch(8)  # b would be labels
    with pytest.raises(ValueError, match=r"must have the structure .*or a tuple \(x, y\)"):
        calibration.examples(model, wrong)


@every_flavour
def test_models_of_named_inputs_are_calibrated_by_batches(library, rng):
    inputs = {name: library.layers.Input((4,), name=name) for name in ("a", "b")}
    merged = library.layers.Concatenate()(list(inputs.values()))
    model = library.Model(inputs, library.layers.Dense(3)(merged))
    batches = [{name: rng.random((8, 4), np.float32) for name in inputs} for _ in range(2)]
    wanted = {name: np.concatenate([batch[name] for batch in batches]) for name in inputs}
    for given in (batches, iter(batches), [(batch, np.zeros(8)) for batch in batches]):
        found = calibration.examples(model, given)
        assert found.keys() == wanted.keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, wanted[name])


@pytest.mark.parametrize("x", [np.full((9, 4), 0.5), np.full((1, 4), 0.5)], ids=["equal", "one"])
def test_a_calibration_of_one_input_is_warned_of(x):
    with pytest.warns(UserWarning, match="calibration holds one example, or equal ones only"):
        calibration.examples(small(), x)


def test_a_subclassed_model_is_calibrated_by_batches(rng):
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.last = keras.layers.Dense(3, name="last")

        def call(self, x, training=False):
            return self.last(x)

    model, x = Net(), rng.random((20, 4), np.float32)
    model(x)
    np.testing.assert_array_equal(calibration.examples(model, dataset(x).batch(8)), x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda x: dataset(x),
            r"got an array of shape \(4,\)\. Each element .* dataset\.batch\(32",
        ),
        (lambda x: dataset(x).batch(8).repeat(), r"an infinite dataset: .*calibration\.take"),
        (lambda x: itertools.repeat(x), r"4,100 examples, and its length .*islice\(batches, n\)"),
        (
            lambda x: dataset(x).repeat().filter(lambda _: True).batch(50),
            r"4,100 examples, and its length is unknown: .*dataset\.take",
        ),
        (lambda x: iter([]), "calibration is empty: .*can be read only once"),
        (lambda x: dataset(x).take(0).batch(8), "calibration is empty"),
        (lambda x: [], r"calibration (is empty|must be float32)"),
        (lambda x: (x, np.arange(50)), r"tuple whose parts differ in shape.*Of a pair .* pass x"),
        (lambda x: iter([(x, 1, 2, 3)]), r"must yield batches x or tuples .*got a tuple of 4"),
        (lambda x: iter([x, x[:, :2]]), r"got an array of shape \(50, 2\)\. Each element"),
        (lambda x: iter([x * np.nan]), "calibration must be finite"),
        (lambda x: 3, r"calibration must be float32 \(any, 4\), got an array of shape \(\)"),
    ],
)
def test_a_calibration_that_cannot_be_used_is_refused(tmp_path, make, message, rng):
    x = rng.random((50, 4), np.float32)
    with pytest.raises(ValueError, match=message):
        export.export_litert(small(), tmp_path / "file", precision="int8", calibration=make(x))
    assert names(tmp_path) == []


def test_a_large_dataset_that_says_its_size_is_taken_as_it_is(tmp_path, rng):
    x = rng.random((calibration.MOST + 1, 4), np.float32)
    report = export.export_litert(
        small(), tmp_path / "file", precision="int8", calibration=dataset(x).batch(2048)
    )
    assert report.settings == {"calibration_examples": calibration.MOST + 1}


# Robust accuracy of what was exported


@every_flavour
@every_format
def test_robust_accuracy_is_that_of_the_model(tmp_path, library, form):
    model = trained(library)
    x, y = images(48, seed=1)
    EXPORTS[form](model, tmp_path / "file")
    served = LOADS[form](tmp_path / "file")
    pgd = attacks.PGD(epsilon=0.15, steps=10)
    transfer = attacks.Transfer(source=model, attack=pgd)
    original = evaluate_robustness(model, x, y, pgd)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a model without a gradient, and nobody asks for it
        report = evaluate_robustness(served, x, y, transfer)
    assert report.model == "file" and report.warnings == ()
    np.testing.assert_array_equal(report.clean_correct, original.clean_correct)
    (found,), (expected,) = report.attacks.values(), original.attacks.values()
    np.testing.assert_array_equal(found.correct, expected.correct)
    assert 0.05 < report.robust_accuracy < report.clean_accuracy - 0.05
    assert "PGD-10 linf 0.15 from net" in str(report)
    assert any("No attack ran on this model" in note for note in report.notes)
    assert not any("No attack ran" in note for note in original.notes)


def test_an_attack_by_gradient_on_a_file_is_warned_of(exported):
    _, path, _ = exported(tf_keras, "onnx")
    x, y = images(16)
    pgd = attacks.PGD(epsilon=0.1, steps=1)
    with (
        pytest.warns(EvaluationWarning, match=r"gradient .* exactly zero for 16 of 16"),
        pytest.warns(EvaluationWarning, match="operations of the type PyFunc"),
        pytest.raises(ValueError, match="not differentiable"),
    ):
        evaluate_robustness(export.load_onnx(path), x, y, pgd)

    def flat(x):
        no_ties = tf.constant([0.0, 0.1, 0.2])
        return no_ties + tf.round(4 * tf.reshape(x, (-1, 64))[:, :CLASSES])

    transfer = attacks.Transfer(source=network(tf_keras), attack=pgd)
    idle = attacks.Custom(lambda model, x, y: x, epsilon=0.1)
    for opponents in (idle, [transfer, idle], lambda model, x, y: x):
        with (
            pytest.warns(EvaluationWarning, match="exactly zero for 16 of 16"),
            pytest.warns(EvaluationWarning, match="operations of the type Round"),
        ):
            report = evaluate_robustness(flat, x, y, opponents)
        assert not any("No attack ran" in note for note in report.notes)
    assert evaluate_robustness(flat, x, y, transfer).warnings == ()


# What is loaded


@every_format
def test_what_is_served(exported, form, batch):
    _, path, _ = exported(keras, form)
    served = LOADS[form](path)
    assert served.name == path.name and repr(path.as_posix())[1:-1] in repr(served)
    expected = served(batch).numpy()
    for same in (batch.astype(np.float64), batch.tolist(), tf.constant(batch)):
        np.testing.assert_allclose(served(same), expected, rtol=1e-6, atol=1e-6)
    graph = tf.function(served, input_signature=[tf.TensorSpec((None, *SHAPE), tf.float32)])
    assert graph.get_concrete_function().output_shapes.as_list() == [None, CLASSES]
    np.testing.assert_allclose(graph(batch), expected, rtol=1e-6, atol=1e-6)
    for wrong in (batch[0], batch[:0], batch[:, :7]):
        with pytest.raises(ValueError, match=r"inputs 'image' must be float32 \(any, 8, 8, 1\)"):
            served(wrong)
    with pytest.raises(FileNotFoundError, match="must be a file with an exported model"):
        LOADS[form](path.parent / "nothing")


@every_format
def test_a_file_of_another_kind_is_refused(tmp_path, form):
    (tmp_path / "file").write_bytes(b"neither flatbuffer nor protobuf")
    with pytest.raises(ValueError, match=r"file (is not a LiteRT|can't be read by ONNX Runtime)"):
        LOADS[form](tmp_path / "file")


# All or nothing


@every_format
def test_an_existing_path_is_not_touched(tmp_path, form):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="path exists already"):
        EXPORTS[form](small(), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"mine" and names(tmp_path) == ["file"]


def constant(library, value):
    """A model whose logits are all `value`."""
    model = small(library)
    for layer in model.layers:
        layer.set_weights([np.zeros_like(weight) for weight in layer.get_weights()])
    kernel, bias = model.layers[-1].get_weights()
    model.layers[-1].set_weights([kernel, np.full_like(bias, value)])
    return model


def value_of(form, path):
    return float(LOADS[form](path)(np.ones((1, 4), np.float32))[0, 0])


@every_flavour
@every_format
def test_a_file_is_replaced_if_that_is_asked_for(tmp_path, library, form):
    path, call = tmp_path / "file", EXPORTS[form]
    path.touch()  # an empty one may be replaced
    call(constant(library, 1.0), path, overwrite=True)
    with pytest.raises(FileExistsError, match="Nothing is overwritten: pass overwrite=True, remo"):
        call(constant(library, 2.0), path)
    assert value_of(form, path) == 1.0
    report = call(constant(library, 2.0), path, overwrite=True)
    assert value_of(form, path) == 2.0 and names(tmp_path) == ["file"]
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(TypeError, match="overwrite must be True or False, got 'yes'"):
        call(constant(library, 3.0), path, overwrite="yes")


@every_format
def test_what_is_no_file_of_the_format_is_not_replaced(tmp_path, form, exported):
    others = {"text": b"print('mine')\n" * 9, "zip": b"PK\x03\x04" + bytes(40), "zeros": bytes(64)}
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FileExistsError, match=r"path is a file that is not (LiteRT|ONNX): .*"):
            EXPORTS[form](small(), tmp_path / name, overwrite=True)
        assert (tmp_path / name).read_bytes() == content
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileExistsError, match="path is no file"):
        EXPORTS[form](small(), tmp_path / "folder", overwrite=True)
    other = "onnx" if form == "litert" else "litert"
    EXPORTS[other](small(), tmp_path / "other")
    with pytest.raises(FileExistsError, match="path is a file that is not"):
        EXPORTS[form](small(), tmp_path / "other", overwrite=True)
    LOADS[other](tmp_path / "other")
    export.export_saved_model(small(), tmp_path / "saved")
    with pytest.raises(FileExistsError, match="path is a file that is not"):
        EXPORTS[form](small(), tmp_path / "saved" / "saved_model.pb", overwrite=True)
    export.load_saved_model(tmp_path / "saved")
    assert names(tmp_path) == ["folder", "other", "saved", "text", "zeros", "zip"]


FAILING = {
    "checking": lambda form: (preflight, "check"),
    "writing": lambda form: (form, "convert"),
    "reading": lambda form: (form, "constants"),
    "loading": lambda form: (export.ServedFile, "__init__"),
    "comparing": lambda form: (preflight, "require_same"),
    "compressing": lambda form: (gzip, "compress"),
    "flushing": lambda form: (_files, "_flush"),
    "putting": lambda form: (pathlib.Path, "replace"),
}


@every_format
@pytest.mark.parametrize("step", FAILING)
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_whatever_fails_the_old_file_or_the_new_one_is_there(tmp_path, form, step, late, exported):
    (tmp_path / "file").write_bytes(exported(keras, form)[1].read_bytes())
    before = (tmp_path / "file").read_bytes()
    with interrupted(*FAILING[step](FORMS[form]), late):
        EXPORTS[form](constant(keras, 2.0), tmp_path / "file", overwrite=True)
    assert names(tmp_path) == ["file"]
    if (step, late) == ("putting", True):
        assert value_of(form, tmp_path / "file") == 2.0
    else:
        assert (tmp_path / "file").read_bytes() == before


@every_format
def test_a_file_that_differs_is_noticed(tmp_path, form, monkeypatch):
    endpoint = writer.endpoint

    def other(model, specs):
        serve, signature = endpoint(model, specs)
        calls = itertools.chain([0.0], itertools.repeat(1e-2))
        return lambda *x: {k: v + next(calls) for k, v in serve(*x).items()}, signature

    monkeypatch.setattr(writer, "endpoint", other)
    with pytest.raises(ValueError, match=r"the logits of the \w+ file differ .* up to 0\.01"):
        EXPORTS[form](small(), tmp_path / "file")
    assert names(tmp_path) == []


@every_format
def test_zeros_that_are_lost_are_noticed(tmp_path, form, monkeypatch):
    model = small()
    randomize(model, 0.5)
    read = FORMS[form].constants

    def filled(self, content):
        found = read(self, content)
        values = next(constant.values for constant in found if constant.values.size == 24)
        lost = np.where(np.cumsum(values == 0).reshape(values.shape) == 1, 1e-9, values)
        return [c._replace(values=lost) if c.values is values else c for c in found]

    monkeypatch.setattr(FORMS[form], "constants", filled)
    with pytest.raises(ValueError, match=r"lacks zeros of the model: first and its 12 zeros are"):
        EXPORTS[form](model, tmp_path / "file")
    assert names(tmp_path) == []


def test_logits_of_other_shapes_are_refused_even_where_any_difference_is_allowed(
    tmp_path, monkeypatch
):
    run = litert._ServedLiteRT._run
    monkeypatch.setattr(
        litert._ServedLiteRT,
        "_run",
        lambda *args: {name: array[:, :2] for name, array in run(*args).items()},
    )
    message = r"LiteRT file have the shapes \[\(4, 2\)\], and .*4, 3"
    with pytest.raises(ValueError, match=message):
        export.export_litert(small(), tmp_path / "file", precision="int8", calibration=np.eye(4))
    assert names(tmp_path) == []


@every_format
def test_one_logit_makes_no_classes(tmp_path, form):
    model = tf_keras.Sequential([tf_keras.layers.Dense(1, input_shape=(4,))])
    report = EXPORTS[form](model, tmp_path / "file")
    assert report.same_class is None and "same class" not in str(report)


@every_flavour
@every_format
def test_inputs_whose_names_a_signature_takes_for_the_same(tmp_path, library, form, rng):
    first, second = library.Input((4,), name="a b"), library.Input((4,), name="a_b")
    model = library.Model([first, second], library.layers.Subtract()([first, second]))
    model = library.Model(model.inputs, library.layers.Dense(2)(model.outputs[0]))
    report = EXPORTS[form](model, tmp_path / "file")
    assert {tensor.name for tensor in report.inputs} == {"a_b", "a_b_1"}
    x = rng.random((2, 5, 4), np.float32)
    served = LOADS[form](tmp_path / "file")({"a_b": x[0], "a_b_1": x[1]})
    np.testing.assert_allclose(served, model([x[0], x[1]]), rtol=1e-5, atol=1e-6)


@every_flavour
@every_format
def test_inputs_of_a_subclassed_model_have_the_names_by_which_it_takes_them(
    tmp_path, library, form, rng
):
    class Net(library.Model):
        def __init__(self):
            super().__init__()
            self.left, self.right = library.layers.Dense(3), library.layers.Dense(3)

        def call(self, x):
            return self.left(x["the left"]) - self.right(x["right"])

    model, x = Net(), rng.random((2, 5, 4), np.float32)
    given = {"the left": x[0], "right": x[1, :, :2]}
    expected = model(given)
    EXPORTS[form](model, tmp_path / "file", probe=given)
    served = LOADS[form](tmp_path / "file")
    logits = served({"the_left": x[0], "right": x[1, :, :2]})
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_a_zero_point_is_refused(tmp_path, monkeypatch):
    read = litert.LiteRT.constants
    monkeypatch.setattr(
        litert.LiteRT,
        "constants",
        lambda *args: [c._replace(zero_points=(0, 3)) for c in read(*args)],
    )
    with pytest.raises(ValueError, match=r"does not store 0\.0 as 0 but \(0, 3\)"):
        export.export_litert(small(), tmp_path / "file", precision="int8", calibration=np.eye(4))
    assert names(tmp_path) == []


@every_format
def test_half_precision_is_refused(tmp_path, form):
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = small()
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    with pytest.raises(ValueError, match="3 layers that do not compute in float32, such as"):
        EXPORTS[form](model, tmp_path / "file")


def test_operations_that_onnx_lacks_are_named(tmp_path):
    model = tf_keras.Sequential([tf_keras.layers.Dense(3, "gelu", input_shape=(4,))])
    with pytest.raises(ValueError, match=r"can't be written as ONNX with opset 15: .*Erfc"):
        export.export_onnx(model, tmp_path / "file")
    assert names(tmp_path) == []


KILLED = """
import os, signal, sys
import tf_keras
from tscnc_tf import export
from tscnc_tf.export import litert, onnx
def killed(*args):
    os.kill(os.getpid(), signal.SIGKILL)  # everything is written, and nothing renamed
litert.LiteRT.constants = onnx.ONNX.constants = killed
model = tf_keras.Sequential([tf_keras.layers.Dense(3, input_shape=(4,))])
getattr(export, sys.argv[1])(model, sys.argv[2])
"""


@every_format
def test_a_killed_process_leaves_nothing_at_the_path(tmp_path, form):
    goal = tmp_path / "model"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, f"export_{form}", str(goal)],
        check=False,
        capture_output=True,
        cwd=pathlib.Path(export.__file__).parents[2],
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not goal.exists()
    (draft,) = names(tmp_path)
    assert draft.startswith(".model.")
    EXPORTS[form](small(), goal)  # the draft is in nobody's way


def test_a_new_file_appears_when_the_block_ends(tmp_path):
    goal = tmp_path / "deep" / "goal"
    with _files.new_file("path", goal) as draft:
        draft.write_bytes(b"content")
        assert not goal.exists() and draft.parent == goal.parent
    assert goal.read_bytes() == b"content" and names(goal.parent) == ["goal"]
    assert goal.stat().st_nlink == 1


def test_a_block_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(KeyboardInterrupt), _files.new_file("path", tmp_path / "goal") as draft:
        draft.write_bytes(b"content")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_came_first_stays(tmp_path, links, monkeypatch):
    def no_links(*paths):
        raise OSError("no links here")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with _files.new_file("path", tmp_path / "other") as draft:
        draft.write_bytes(b"content")
    assert (tmp_path / "other").read_bytes() == b"content" and names(tmp_path) == ["other"]
    link, goal = os.link, tmp_path / "goal"

    def late(*paths):
        goal.write_bytes(b"first")  # after the last look
        link(*paths)

    monkeypatch.setattr(os, "link", late)
    with (
        pytest.raises(FileExistsError, match="path exists already"),
        _files.new_file("path", goal) as draft,
    ):
        draft.write_bytes(b"content")
    assert goal.read_bytes() == b"first" and names(tmp_path) == ["goal", "other"]


# The extras


@pytest.mark.parametrize(
    ("form", "module"),
    [
        ("litert", "ai_edge_litert.interpreter"),
        ("onnx", "onnx"),
        ("onnx", "tf2onnx"),
        ("onnx", "onnxruntime"),
    ],
)
def test_a_missing_extra_is_named(tmp_path, form, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'pip install "\.\[{form}\]"'):
        EXPORTS[form](small(), tmp_path / "file")
    if module in ("ai_edge_litert.interpreter", "onnxruntime"):
        with pytest.raises(ImportError, match=rf'pip install "\.\[{form}\]"'):
            LOADS[form](tmp_path / "file")


def test_exporting_leaves_the_process_as_it_was(tmp_path):
    pytest.importorskip("tf2onnx.convert")  # whose import sets a variable
    environment, printed = dict(os.environ), warnings.filters[:]
    eager = tf.config.functions_run_eagerly()
    export.export_onnx(small(), tmp_path / "a")
    export.export_litert(small(), tmp_path / "b", precision="int8", calibration=np.eye(4))
    assert dict(os.environ) == environment and warnings.filters[:] == printed
    assert tf.config.functions_run_eagerly() == eager


# Where the zeros are


def test_a_kernel_is_found_by_its_zeros_in_any_layout(rng):
    kernels = [rng.normal(size=(3, 3, 4, 8)) * (rng.random((3, 3, 4, 8)) < 0.3) for _ in range(4)]
    layouts = [(3, 0, 1, 2), (3, 2, 0, 1), (0, 1, 2, 3), (2, 3, 0, 1)]
    scaled = [rng.uniform(0.5, 2, 8) * kernel for kernel in kernels]
    stored = [
        constants.Constant(f"{index}", kernel.transpose(order).astype("float32"))
        for index, (kernel, order) in enumerate(zip(scaled, layouts, strict=True))
    ]
    found = constants.find(kernels, stored[::-1])
    assert [constant.name for constant in found] == ["0", "1", "2", "3"]
    flat = constants.Constant("flat", kernels[0].reshape(3, 3, 32))
    assert constants.find(kernels[:1], [flat]) == [flat]


def test_a_kernel_that_lost_a_zero_is_not_found(rng):
    kernel = rng.normal(size=(6, 5)) * (rng.random((6, 5)) < 0.5)
    filled = kernel.copy()
    filled[kernel == 0] += np.eye(1, np.count_nonzero(kernel == 0)).ravel() * 1e-9
    assert constants.find([kernel], [constants.Constant("w", filled)]) == [None]
    more = constants.Constant("w", np.where(kernel > 0.5, 0, kernel))
    assert constants.find([kernel], [more]) == [more]
    assert constants.find([kernel], [constants.Constant("w", kernel[:5])]) == [None]


def test_blocks_in_another_order_are_found_by_their_number(rng):
    kernel = rng.normal(size=(4, 20)) * (rng.random((4, 20)) < 0.5)
    gates = np.concatenate(np.split(kernel, 4, axis=1)[::-1], axis=1)
    constant = constants.Constant("w", gates.T[None])
    assert constants.find([kernel], [constant]) == [constant]


def test_kernels_without_zeros_are_told_apart_by_their_values(rng):
    kernels = [rng.normal(size=(6, 6)) for _ in range(3)]
    stored = [constants.Constant(f"{i}", kernel.T) for i, kernel in enumerate(kernels)]
    found = constants.find(kernels, [stored[2], stored[0], stored[1]])
    assert [constant.name for constant in found] == ["0", "1", "2"]
    assert constants.find([kernels[0]] * 2, stored[:1]) == [stored[0]] * 2  # a shared layer


def test_the_path_may_be_a_string_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    report = export.export_onnx(small(), "~/net.onnx")
    assert report.path == str(tmp_path / "net.onnx")
    assert export.load_onnx("~/net.onnx")(np.ones((1, 4))).shape == (1, 3)
    assert pathlib.Path(report.path).is_file()
