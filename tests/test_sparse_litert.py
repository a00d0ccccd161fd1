"""Sparse kernels in LiteRT files: what they hold, how large they are, and that they are run."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from helpers import FLAVOURS

from tscnc_tf import _litert_file, attacks, evaluate_robustness, export, inspection, pruning
from tscnc_tf.export import sparse_litert

# Dead filters are no matter here.
pytestmark = pytest.mark.filterwarnings("ignore:At a sparsity of")
every_flavour = pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)
SHAPE = (8, 8, 3)


def network(library, width=32, units=64):
    """A 3x3, a depthwise and a 1x1 convolution, and two dense layers."""
    library.utils.set_random_seed(0)
    layers = library.layers
    return library.Sequential(
        [
            library.Input(SHAPE, name="image"),
            layers.Conv2D(width, 3, padding="same", activation="relu", name="conv"),
            layers.DepthwiseConv2D(3, padding="same", name="depth"),
            layers.Conv2D(2 * width, 1, activation="relu", name="point"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(units, activation="relu", name="hidden"),
            layers.Dense(10, name="logits"),
        ]
    )


def pruned(library, sparsity, structure=None, **options):
    """The network with so many zeros in its inner kernels, those of the dense layer in blocks."""
    model = network(library, **options)
    convolutions = ["conv", "depth", "point"]
    model = pruning.strip(pruning.prune_now(model, sparsity, layers=convolutions))
    return pruning.strip(pruning.prune_now(model, sparsity, layers="hidden", structure=structure))


@pytest.fixture
def images(rng):
    return rng.random((32, *SHAPE), np.float32)


def exported(model, path, **options):
    report = export.export_litert(model, path / "net.tflite", sparse=True, **options)
    return report, {kernel.name: kernel for kernel in report.kernels}


def loaded_kernels(path):
    """Return the constants that the interpreter has in the end, by its own kernels."""
    interpreter = Interpreter(
        str(path),
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    interpreter.allocate_tensors()
    interpreter.invoke()
    found = []
    for detail in interpreter.get_tensor_details():
        if len(detail["shape"]) > 1 and not detail["sparsity_parameters"]:
            found.append(interpreter.get_tensor(detail["index"]))
    return found


@every_flavour
def test_a_sparse_file_returns_the_logits_and_says_how_it_is_stored(library, tmp_path, images):
    model = pruned(library, 0.9, pruning.Block.for_litert())
    report, kernels = exported(model, tmp_path)
    dense = export.export_litert(model, tmp_path / "dense.tflite")
    assert {name: kernel.stored for name, kernel in kernels.items()} == {
        **dict.fromkeys(["conv", "depth", "point"], "dense on loading"),
        "hidden": "sparse",
        "logits": "dense",
    }
    few = "less than 30 % of its weights are zero: the converter writes no sparse form"
    assert kernels["logits"].reason == few
    for kernel in dense.kernels:
        mine = kernels[kernel.name]
        assert (mine.zeros, mine.shape) == (kernel.zeros, kernel.shape)
        assert (mine.stored_bytes < kernel.stored_bytes) == (mine.stored != "dense")
    for size in (1, 5):
        served = export.load_litert(tmp_path / "net.tflite")(images[:size])
        np.testing.assert_allclose(served, model(images[:size]), atol=1e-5)
    assert report.dense_bytes == pytest.approx(dense.file_bytes, rel=0.02)
    assert dense.dense_bytes is None and "stored" not in str(dense)
    shown = str(report)
    assert f"Dense ({few}): logits." in shown
    assert "Not for microcontrollers" in shown and "Not for micro" not in str(dense)
    assert f"this file is {report.file_bytes / report.dense_bytes:.2f} of that" in shown


@pytest.mark.filterwarnings("ignore:The logits of the probe batch")  # not trained
@pytest.mark.parametrize(("sparsity", "goal"), [(0.9, 0.2), (0.95, 0.13), (0.99, 0.08)])
def test_the_file_is_small(sparsity, goal, tmp_path):
    model = pruned(FLAVOURS["keras"], sparsity, width=256)
    report, _ = exported(model, tmp_path)
    assert report.file_bytes <= goal * report.dense_bytes


def test_the_converter_writes_a_sparse_form_from_30_percent_on(tmp_path):
    """What the reason says is its threshold."""
    model = network(FLAVOURS["keras"], units=100)
    kernel = model.get_layer("hidden").kernel
    found = {}
    for zeros in (1919, 1920):  # of 6,400 weights
        values = np.arange(1.0, 6401.0)
        values[np.random.default_rng(0).permutation(6400)[:zeros]] = 0
        kernel.assign(values.reshape(64, 100))
        (tmp_path / "net.tflite").unlink(missing_ok=True)
        found[zeros] = exported(model, tmp_path)[1]["hidden"]
    assert found[1919].stored == "dense" and found[1919].reason.startswith("less than 30 %")
    assert found[1920].stored == "dense on loading" and found[1920].reason == ""


@pytest.mark.parametrize(
    ("structure", "is_single"), [(None, True), (pruning.Block.for_litert(), False)]
)
def test_a_kernel_is_in_the_smaller_form(structure, is_single, tmp_path, rng):
    """At 99 % zeros in any place the converter takes blocks, of which 3 in 4 entries are zero."""
    library = FLAVOURS["keras"]
    inputs = library.Input((512,))
    x = library.layers.Dense(256, activation="relu", name="hidden")(inputs)
    model = library.Model(inputs, library.layers.Dense(10, name="logits")(x))
    model = pruning.strip(pruning.prune_now(model, 0.99, layers="hidden", structure=structure))
    _, kernels = exported(model, tmp_path)
    file = _litert_file.File((tmp_path / "net.tflite").read_bytes())
    ((graph, number),) = file.sparse()
    tensor = graph.tensors[number]
    assert kernels["hidden"].stored == "sparse" and file.kinds(graph, number) == {"FULLY_CONNECTED"}
    assert (tensor.sparsity.blockMap is None) == is_single
    kept = 512 * 256 - kernels["hidden"].zeros
    # 4 bytes an entry; an index of two bytes for each, or for 4 of them; where each row ends.
    indices = 2 * kept if is_single else kept // 4
    assert kernels["hidden"].stored_bytes <= 4 * kept + indices + 4 * 257
    x = rng.random((7, 512), np.float32)
    np.testing.assert_allclose(export.load_litert(tmp_path / "net.tflite")(x), model(x), atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_interpreter_makes_the_kernels_of_the_model_dense(precision, tmp_path):
    """In float16 the converter forgets to make blocks dense, and memory behind them is read."""
    model = pruned(FLAVOURS["tf_keras"], 0.9, pruning.Block(4, 1))
    _, kernels = exported(model, tmp_path, precision=precision)
    if precision == "float16":
        assert kernels["hidden"].stored == "dense on loading"
    found = [each for each in loaded_kernels(tmp_path / "net.tflite") if each.dtype == np.float32]
    for name, turned in (("conv", (3, 0, 1, 2)), ("point", (3, 0, 1, 2)), ("depth", (3, 0, 1, 2))):
        layer = model.get_layer(name)
        kernel = np.asarray(layer.depthwise_kernel if name == "depth" else layer.kernel)
        kernel = kernel.transpose(turned).astype("f2" if precision == "float16" else "f4")
        assert any(
            each.shape == kernel.shape and np.array_equal(each, kernel.astype("f4"))
            for each in found
        ), name


@pytest.mark.parametrize(
    ("rows", "stored", "reason"),
    [(16, "sparse", ""), (1, "dense", "LiteRT does not run this layer")],
)
def test_int8_has_blocks_of_its_own_and_runs_without(rows, stored, reason, tmp_path, images):
    assert pruning.Block.for_litert("int8") == pruning.Block(16, 1)
    model = pruned(FLAVOURS["keras"], 0.9, pruning.Block(rows, 1))
    options = {"precision": "int8", "calibration": images}
    report, kernels = exported(model, tmp_path, **options)
    assert kernels["hidden"].stored == stored
    assert kernels["hidden"].reason.startswith(reason)
    assert kernels["point"].stored == "dense on loading"
    dense = export.export_litert(model, tmp_path / "dense.tflite", **options)
    ours, theirs = (
        export.load_litert(tmp_path / name)(images) for name in ("net.tflite", "dense.tflite")
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)  # a step of 8 bits
    assert [each.zeros for each in report.kernels] == [each.zeros for each in dense.kernels]


def test_float16_halves_a_dense_file(tmp_path, images):
    model = network(FLAVOURS["keras"], width=128)
    reports = {
        precision: export.export_litert(model, tmp_path / precision, precision=precision)
        for precision in ("float32", "float16")
    }
    halves = reports["float16"]
    assert halves.file_bytes < 0.6 * reports["float32"].file_bytes
    assert {kernel.dtype for kernel in halves.kernels} == {"float16"}
    assert halves.ideal_sparse_bytes is None
    assert 0 < halves.max_logit_difference <= halves.logit_tolerance
    served = export.load_litert(tmp_path / "float16")(images)
    np.testing.assert_allclose(served, model(images), atol=1e-2)


def test_a_sparse_file_is_evaluated(tmp_path, images):
    model = pruned(FLAVOURS["keras"], 0.9)
    exported(model, tmp_path)
    labels = np.argmax(model(images), axis=1)
    served = export.load_litert(tmp_path / "net.tflite")

    square = attacks.Square(epsilon=1.0, queries=60)
    report = evaluate_robustness(served, images, labels, square, progress=False)
    of_network = evaluate_robustness(model, images, labels, square, progress=False)
    assert report.clean_accuracy == 1 > report.robust_accuracy
    np.testing.assert_array_equal(report.robust_correct, of_network.robust_correct)


class Axis:
    """An axis as the schema has it."""

    def __init__(self, size=None, ends=(), indices=()):
        self.format, self.denseSize = int(size is None), size or 0
        self.arraySegments, self.arrayIndices = Vector(ends), Vector(indices)


class Vector:
    """A list of indices."""

    def __init__(self, values):
        self.values = values


class Parameters:
    """How a tensor is sparse."""

    def __init__(self, order, blocks, axes):
        self.traversalOrder, self.blockMap, self.dimMetadata = order, blocks, axes


def test_sparse_tensors_are_read_by_their_definition():
    """The examples are those of the schema: rows, columns first, and blocks of two by two."""
    matrix = np.array([[1, 0, 2, 3], [0, 4, 0, 0], [0, 0, 5, 0]])
    by_rows = Parameters([0, 1], None, [Axis(3), Axis(None, [0, 3, 4, 5], [0, 2, 3, 1, 2])])
    by_columns = Parameters([1, 0], None, [Axis(4), Axis(None, [0, 1, 2, 4, 5], [0, 1, 0, 2, 0])])
    for parameters, values in ((by_rows, [1, 2, 3, 4, 5]), (by_columns, [1, 4, 2, 5, 3])):
        dense = _litert_file.expanded(parameters, matrix.shape, np.array(values))
        np.testing.assert_array_equal(dense, matrix)
    blocked = np.array([[1, 0, 0, 0], [0, 4, 0, 0], [0, 0, 2, 5], [0, 0, 3, 0]])
    axes = [Axis(2), Axis(None, [0, 1, 2], [0, 1]), Axis(2), Axis(2)]
    values = np.array([1, 0, 0, 4, 2, 5, 3, 0])
    dense = _litert_file.expanded(Parameters([0, 1, 2, 3], [0, 1], axes), (4, 4), values)
    np.testing.assert_array_equal(dense, blocked)
    # The columns of each block first.
    values = np.array([1, 0, 0, 4, 2, 3, 5, 0])
    dense = _litert_file.expanded(Parameters([0, 1, 3, 2], [0, 1], axes), (4, 4), values)
    np.testing.assert_array_equal(dense, blocked)


def test_what_cannot_be_is_refused(tmp_path):
    model = network(FLAVOURS["keras"])
    with pytest.raises(TypeError, match="sparse must be True or False, got 'yes'"):
        export.export_litert(model, tmp_path / "net.tflite", sparse="yes")
    with pytest.raises(ValueError, match="precision must be one of 'float32', 'int8'"):
        pruning.Block.for_litert("float16")
    with pytest.raises(ValueError, match="calibration is for precision='int8' only: float16"):
        export.export_litert(model, tmp_path / "m", precision="float16", calibration=np.ones(1))


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_a_kernel_of_zeros_stays_dense(precision, tmp_path, images):
    """The converter writes no entries at all for it."""
    model = pruned(FLAVOURS["keras"], 0.9)
    model.get_layer("point").kernel.assign(np.zeros((1, 1, 32, 64)))
    calibration = images if precision == "int8" else None
    _, kernels = exported(model, tmp_path, precision=precision, calibration=calibration)
    assert (kernels["point"].stored, kernels["point"].zeros) == ("dense", 2048)
    assert kernels["point"].reason == "it has no entries"


@pytest.mark.parametrize(
    ("precision", "stored", "reason"),
    [
        ("float32", "dense on loading", ""),
        ("float16", "dense", "LiteRT does not run this layer on a kernel that is made dense"),
    ],
)
def test_a_transposed_convolution_is_run(precision, stored, reason, tmp_path, images):
    layers = FLAVOURS["keras"].layers
    model = FLAVOURS["keras"].Sequential(
        [
            FLAVOURS["keras"].Input(SHAPE),
            layers.Conv2DTranspose(64, 3, padding="same", name="up"),
            layers.Conv2D(64, 3, name="conv"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10, name="logits"),
        ]
    )
    model = pruning.strip(pruning.prune_now(model, 0.9, layers=["up", "conv"]))
    _, kernels = exported(model, tmp_path, precision=precision)
    assert kernels["up"].stored == stored and kernels["up"].reason.startswith(reason)
    served = export.load_litert(tmp_path / "net.tflite")
    np.testing.assert_allclose(served(images), model(images), atol=1e-2)


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_the_size_with_dense_kernels_is_that_of_the_dense_file(precision, tmp_path, images):
    model = pruned(FLAVOURS["keras"], 0.9)
    options = {"precision": precision, "calibration": images if precision == "int8" else None}
    report, _ = exported(model, tmp_path, **options)
    dense = export.export_litert(model, tmp_path / "dense.tflite", **options)
    assert report.dense_bytes == pytest.approx(dense.file_bytes, rel=0.1)
    assert report.file_bytes < dense.file_bytes


def test_what_a_sparse_form_changes_is_noticed(tmp_path, images, monkeypatch):
    """Where any difference to the model is allowed, the dense file is what is compared with."""
    model = pruned(FLAVOURS["keras"], 0.9)
    corrected = sparse_litert.corrected

    def broken(content, dense):
        other = _litert_file.File(dense)
        for graph, number in other.constants():
            data = other.model.buffers[graph.tensors[number].buffer].data
            other.model.buffers[graph.tensors[number].buffer].data = data[::-1].copy()
        return corrected(content, dense)._replace(dense=other.content())

    monkeypatch.setattr(sparse_litert, "corrected", broken)
    with pytest.raises(ValueError, match="LiteRT file with sparse kernels"):
        exported(model, tmp_path, precision="int8", calibration=images)
    assert not (tmp_path / "net.tflite").exists()


@pytest.mark.parametrize("inputs", [1, 3, 6, 10, 24, 50])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_no_weight_is_lost_where_inputs_are_no_multiple_of_the_block(
    precision, inputs, tmp_path, rng
):
    """LiteRT's converter leaves out the last block of each row if it is not complete."""
    library = FLAVOURS["keras"]
    layers = library.layers
    model = library.Sequential(
        [library.Input((inputs,)), layers.Dense(64, "relu", name="hidden"), layers.Dense(10)]
    )
    x = rng.random((64, inputs), np.float32)
    block = pruning.Block.for_litert("int8" if precision == "int8" else "float32")
    model = pruning.strip(pruning.prune_now(model, 0.75, layers="hidden", structure=block))
    options = {"calibration": x} if precision == "int8" else {}
    report, kernels = exported(model, tmp_path, precision=precision, **options)
    export.export_litert(model, tmp_path / "dense.tflite", precision=precision, **options)
    sparse, dense = (
        export.load_litert(tmp_path / name)(x).numpy() for name in ("net.tflite", "dense.tflite")
    )
    quantum = np.abs(dense).max() / 64 if precision == "int8" else 1e-5  # a rounding or two
    np.testing.assert_allclose(sparse, dense, atol=quantum)
    kernel = kernels["hidden"]
    assert kernel.weights == 64 * inputs
    if precision != "int8":
        assert kernel.zeros == kernel.model_zeros
    elif inputs % 16 and kernel.zeros < kernel.weights:
        assert kernel.stored == "dense"
    twin = _litert_file.File((tmp_path / "dense.tflite").read_bytes())
    assert report.dense_bytes == len(twin.content())


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_sizes_of_a_file_are_what_the_export_has_counted(precision, images, tmp_path):
    model = pruned(FLAVOURS["keras"], 0.9)
    options = {"calibration": images} if precision == "int8" else {}
    report, kernels = exported(model, tmp_path, precision=precision, **options)
    path = tmp_path / "net.tflite"
    found = inspection.sizes(path)
    assert found.file_bytes == report.file_bytes == path.stat().st_size
    assert found.gzip_bytes == pytest.approx(report.gzip_bytes, abs=32)
    rows = {row.name: row for row in found.rows}
    assert len(rows) == len(kernels) == 5
    for kernel in kernels.values():
        row = rows[kernel.tensor]
        assert (row.weights, row.weights - row.nonzeros) == (kernel.weights, kernel.zeros)
        assert row.dense_bytes == row.weights * np.dtype(precision).itemsize
        assert row.stored_bytes == kernel.stored_bytes
    point, logits = rows[kernels["point"].tensor], rows[kernels["logits"].tensor]
    assert point.stored_bytes < point.dense_bytes
    assert logits.stored_bytes == logits.dense_bytes
    weights = sum(row.stored_bytes for row in found.rows) + found.other_bytes
    assert 0.3 * found.file_bytes < weights < found.file_bytes
    assert "whole file" in str(found)


def test_sizes_of_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="model must be a file"):
        inspection.sizes(tmp_path / "none.tflite")
    (tmp_path / "text.tflite").write_text("no such thing")
    with pytest.raises(ValueError, match=r"not the path of a LiteRT file: .*text\.tflite"):
        inspection.sizes(tmp_path / "text.tflite")
    for content in (b"\0\0\0\0TFL3", b"\x1c\0\0\0TFL3" + b"\x14" * 300):
        (tmp_path / "text.tflite").write_bytes(content)
        with pytest.raises(ValueError, match=r"text\.tflite is cut off or damaged"):
            inspection.sizes(tmp_path / "text.tflite")
        with pytest.raises(ValueError, match=r"text\.tflite is cut off or damaged"):
            export.sparse_inference(tmp_path / "text.tflite")


def converted(model, path, **options):
    """Write a file by LiteRT's converter alone; int8, if there are examples for it."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    for name, value in options.items():
        setattr(converter, name, value)
    path.write_bytes(converter.convert())
    return path


def test_sizes_of_files_without_kernels_and_of_nothing_but_zeros(tmp_path):
    layers = tf_keras.layers
    path = converted(tf_keras.Sequential([layers.ReLU(input_shape=(4,))]), tmp_path / "r.tflite")
    found = inspection.sizes(path)
    assert (found.rows, found.dense_bytes, found.ratio) == ((), 0, 1.0)
    assert "whole file" in str(found)
    dense = layers.Dense(64, use_bias=False, kernel_initializer="zeros", input_shape=(8,))
    found = inspection.sizes(converted(tf_keras.Sequential([dense]), tmp_path / "z.tflite"))
    assert (found.rows[0].nonzeros, found.rows[0].limit_bytes) == (0, 0)
    assert "inf×" in str(found)


@pytest.mark.filterwarnings("ignore:Statistics for quantized inputs")
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
def test_zeros_of_integers_are_what_stands_for_zero(tmp_path, rng):
    table = rng.uniform(0.5, 3.0, (50, 16)).astype(np.float32) * (rng.random((50, 16)) < 0.5)
    inputs = tf_keras.Input((), batch_size=1, dtype="int32")
    embedding = tf_keras.layers.Embedding(50, 16)
    model = tf_keras.Model(inputs, embedding(inputs))
    embedding.set_weights([table])
    path = converted(
        model,
        tmp_path / "e.tflite",
        optimizations=[tf.lite.Optimize.DEFAULT],
        representative_dataset=lambda: ([np.array([i], np.int32)] for i in range(50)),
    )
    (row,) = inspection.sizes(path).rows
    assert (row.dtype, row.dense_bytes) == ("int8", 800)
    assert row.sparsity == np.mean(table == 0)
