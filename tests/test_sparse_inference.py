"""Which 1x1 convolutions LiteRT runs sparsely: what is said, what is mended, and what really runs.

Processors that do are asked by emulation of one, where `qemu-x86_64` is installed.
"""

from __future__ import annotations

import functools
import pathlib
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from helpers import FLAVOURS

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import emulation
from tscnc_tf import _litert_file, applications, export, pruning
from tscnc_tf.export import litert, sparse_graph, sparse_litert

pytestmark = pytest.mark.filterwarnings("ignore:At a sparsity of")
KERAS = FLAVOURS["keras"]
needs_emulator = pytest.mark.skipif(
    emulation.EMULATOR is None, reason="needs qemu-x86_64 (Debian: qemu-user)"
)


def network(rest, library=KERAS, *, size=16, padding="even", first=None):
    """An image, a strided convolution, a depthwise one, a 1x1 one, and the rest."""
    library.utils.set_random_seed(0)
    layers = library.layers
    image = x = library.Input((size, size, 3), name="image")
    if first is not None:
        x = first(layers, x)
    if padding == "even":
        x, padding = layers.ZeroPadding2D(1, name="pad")(x), "valid"
    x = layers.Conv2D(8, 3, strides=2, padding=padding, activation="relu", name="stem")(x)
    x = layers.DepthwiseConv2D(3, padding="same", activation="relu", name="depth")(x)
    x = layers.Conv2D(64, 1, activation="relu", name="point_1")(x)
    return library.Model(image, rest(layers, x))


def pruned(model, sparsity=0.9):
    return pruning.strip(pruning.prune_now(model, sparsity, layers="point_*"))


def mean(layers, x, **options):
    return layers.GlobalAveragePooling2D(name="mean", **options)(x)


def dense(layers, x):
    return layers.Dense(4, name="logits")(mean(layers, x))


def point(layers, x, number=2, **options):
    return layers.Conv2D(64, 1, name=f"point_{number}", **options)(x)


def head_of_convolution(layers, x):
    x = layers.Conv2D(4, 1, name="logits")(mean(layers, point(layers, x), keepdims=True))
    return layers.Reshape((4,), name="flat")(x)


def head_of_dense(layers, x):
    return layers.Dense(4, name="logits")(mean(layers, x, keepdims=True))


def enlarged(layers, x):
    x = layers.UpSampling2D(4, name="larger")(mean(layers, x, keepdims=True))
    return layers.GlobalMaxPooling2D()(layers.Conv2D(4, 3, name="last")(x))


def two_ways(layers, x):
    side = layers.MaxPooling2D(2, name="largest")(point(layers, x))
    both = [mean(layers, x), layers.Flatten()(side)]
    return layers.Dense(4, name="logits")(layers.Concatenate()(both))


def pooled(layers, x):
    return dense(layers, point(layers, layers.MaxPooling2D(2, name="largest")(x)))


def also_an_output(layers, x):
    return [x, dense(layers, point(layers, x))]


def read_elsewhere(layers, x):
    side = layers.GlobalMaxPooling2D()(layers.UpSampling2D(2, name="larger")(x))
    return layers.Concatenate()([dense(layers, point(layers, x)), side])


def two_heads(layers, x):
    both = [layers.GlobalAveragePooling2D(keepdims=True)(y) for y in (x, point(layers, x))]
    return layers.Flatten()(layers.Conv2D(4, 1, name="logits")(layers.Add()(both)))


def squeezed(layers, x):
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = layers.Conv2D(8, 1, activation="relu", name="point_4")(gate)
    gate = point(layers, gate, 2, activation="sigmoid")
    return dense(layers, point(layers, layers.Multiply(name="gated")([x, gate]), 3))


def residual(layers, x):
    return dense(layers, layers.Add(name="sum")([x, point(layers, x)]))


def normalised(layers, x):
    x = layers.Add(name="sum")([x, point(layers, x)])
    x = layers.BatchNormalization(name="norm", beta_initializer="ones")(x)
    return dense(layers, point(layers, layers.ReLU()(x), 3))


def subtracted(layers, x):
    return dense(layers, layers.Subtract(name="difference")([x, point(layers, x)]))


def mean_of_rows(layers, x):
    x = layers.Lambda(_mean_of_rows, name="rows")(point(layers, x))
    return layers.GlobalMaxPooling2D()(layers.Conv2D(4, 1, name="logits")(x))


def _mean_of_rows(x):
    return tf.reduce_mean(x, 1, keepdims=True)


def strided(layers, x):
    return dense(layers, point(layers, x, strides=2))


def widened(layers, x):
    return dense(layers, layers.Conv2D(64, 3, padding="same", name="wide")(x))


# The rest of a network, its other options, the 1x1 convolutions that are run sparsely, and a part
# of what is said of the others.
NETWORKS = {
    "mean and dense": (dense, {}, {"point_1"}, ""),
    "convolution behind the mean": (
        head_of_convolution,
        {},
        {"point_1", "point_2"},
        "mean (RESHAPE)",
    ),
    "dense layer of an image of one pixel": (head_of_dense, {}, {"point_1"}, ""),
    "image behind the mean": (enlarged, {}, {"point_1"}, ""),
    "two ways": (two_ways, {}, set(), "largest (MAX_POOL_2D): LiteRT has no pooling"),
    "pooled": (pooled, {}, set(), "largest (MAX_POOL_2D): LiteRT has no pooling"),
    "also an output": (also_an_output, {}, set(), "(OUTPUT): it is an output of the graph"),
    "read elsewhere": (read_elsewhere, {}, set(), "LiteRT has no form of it with the channels"),
    "two heads": (two_heads, {}, {"point_1", "point_2"}, "(RESHAPE): it changes the axes"),
    "squeeze and excitation": (squeezed, {}, set(), "(MEAN): it keeps the axes of the image"),
    "residual": (residual, {}, {"point_1", "point_2"}, ""),
    "constants per channel": (normalised, {}, {"point_1", "point_2", "point_3"}, ""),
    "subtracted": (subtracted, {}, set(), "difference (SUB): LiteRT has no form of it"),
    "mean of rows": (mean_of_rows, {}, set(), "it is a mean over other axes than those of the"),
    "strided": (strided, {}, set(), "point_2 (CONV_2D): it is a 1x1 convolution with strides"),
    "widened": (widened, {}, set(), "wide (CONV_2D): it is a 3x3 convolution of stride 1 on 64"),
    "even size": (dense, {"padding": "same"}, set(), "stem (CONV_2D): its padding is uneven"),
    "odd size": (dense, {"padding": "same", "size": 17}, {"point_1"}, ""),
    "not padded": (dense, {"padding": "valid"}, set(), "padded by 0 above, 0 below, 0 left"),
}


class Inspected(NamedTuple):
    """A pruned network, the report on it, and the content of the file that the report is on."""

    model: Any
    report: export.SparseInferenceReport
    content: bytes


def inspected(name, library=KERAS, sparsity=0.9):
    """Return what several tests need of a network; it is made once, and not to be changed."""
    return _inspected(name, library, sparsity)


@functools.cache
def _inspected(name, library, sparsity):
    rest, options, *_ = NETWORKS[name]
    model = pruned(network(rest, library, **options), sparsity)
    written, contents = litert.export_litert, []

    def kept(model, path, **options):
        report = written(model, path, **options)
        contents.append(path.read_bytes())
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(litert, "export_litert", kept)
        report = export.sparse_inference(model)
    (content,) = contents  # what `export_litert(sparse=True)` writes
    return Inspected(model, report, content)


@pytest.fixture
def images(rng):
    return rng.random((3, 16, 16, 3), np.float32)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_report_says_what_is_run_sparsely_and_why_not(name):
    _, _, sparse, said = NETWORKS[name]
    report = inspected(name).report
    assert {row.name for row in report.rows if row.is_sparse} == sparse
    assert said in str(report)
    assert report.sparse == len(sparse) and report.faults == ()
    assert all(row.is_sparse == (row.reason == "") for row in report.rows)
    for row in report.rows:
        if row.name.startswith("point"):
            assert row.sparsity == pytest.approx(0.9, abs=0.01)


def test_tf_keras_has_the_same_report():
    ours, theirs = (inspected("pooled", lib).report for lib in FLAVOURS.values())
    assert ours == theirs
    assert ours.to_dict()["obstacles"] == [
        {
            "name": "largest",
            "operation": "MAX_POOL_2D",
            "why": "LiteRT has no pooling with the channels first",
            "change": "a depthwise convolution of stride 2 instead",
        }
    ]
    assert "of largest (MAX_POOL_2D)" in ours._repr_html_()


def raw(model):
    """The content of the file as the converter writes it."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.EXPERIMENTAL_SPARSITY]
    return converter.convert()


@functools.cache
def raw_of(name):
    return raw(inspected(name).model)


def file_of(content, path):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "faults"),
    [
        ("convolution behind the mean", ["logits_1", "mean_1"]),
        ("dense layer of an image of one pixel", ["mean_1"]),
        ("image behind the mean", ["mean_1"]),
        ("two ways", ["point_2_1"]),
        ("mean of rows", ["logits_1", "rows_1"]),
        ("residual", []),
    ],
)
def test_faults_of_files_from_elsewhere_are_named(name, faults, tmp_path):
    report = export.sparse_inference(str(file_of(raw_of(name), tmp_path / "raw.tflite")))
    assert sorted(report.faults) == faults
    assert ("can't be loaded there, or has wrong results" in str(report)) == bool(faults)


def test_few_zeros_and_dense_files_are_run_dense(tmp_path):
    model = network(dense)
    half = pruned(model, 0.66)
    report = export.sparse_inference(half)
    assert not report.sparse and "no more than two thirds" in report.rows[0].reason
    assert export.sparse_inference(pruned(model, 0.68)).sparse == 1
    export.export_litert(inspected("mean and dense").model, tmp_path / "net.tflite")
    report = export.sparse_inference(tmp_path / "net.tflite")
    assert not report.sparse and "no kernel of the file is made dense" in report.rows[0].reason


def test_int8_is_run_dense(tmp_path, images):
    options = {"precision": "int8", "calibration": images, "sparse": True}
    model = inspected("mean and dense").model
    report = export.export_litert(model, tmp_path / "net.tflite", **options)
    assert "does not compute in floats" in str(export.sparse_inference(report.path))


@pytest.mark.filterwarnings("ignore:The logits of the probe batch")  # not trained
@pytest.mark.parametrize(("size", "strides"), [(16, 3), (96, 5)])
@pytest.mark.parametrize("network", [applications.MobileNetV1, applications.MobileNetV2])
def test_mobilenets_are_run_sparsely_throughout(network, size, strides, tmp_path):
    """Those of 32 pixels have the graph of these 16; and values agree after the export."""
    options = {"width": 0.35, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    model = network(input_shape=(size, size, 3), strides=strides, **options)
    layers = "*_pointwise" if "V1" in network.__name__ else ["*_expand", "*_project"]
    model = pruning.strip(pruning.prune_now(model, 0.9, layers=layers))
    if size == 96:  # a report on a model is one on the file that this writes
        export.export_litert(model, tmp_path / "net.tflite", sparse=True)
    report = export.sparse_inference(model if size == 16 else tmp_path / "net.tflite")
    assert report.sparse == len(report.rows) == (13 if "V1" in network.__name__ else 34)
    if size == 96:
        x = np.random.default_rng(0).random((2, 96, 96, 3), np.float32)
        served = export.load_litert(tmp_path / "net.tflite")
        np.testing.assert_allclose(served(x), model(x, training=False), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["odd size", "constants per channel", "image behind the mean"])
@pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)
def test_what_is_changed_keeps_the_function_for_any_number_of_examples(library, name, tmp_path):
    model, _, content = inspected(name, library)
    served = export.load_litert(file_of(content, tmp_path / "net.tflite"))
    for count in (1, 3):
        x = np.random.default_rng(count).random((count, *model.input_shape[1:]), np.float32)
        np.testing.assert_allclose(served(x), model(x), atol=1e-5)


def test_nothing_is_changed_where_nothing_is_gained():
    content = raw_of("even size")
    assert kinds_in(content) == kinds_in(sparse_graph.prepared(content)[0])


def kinds_in(content):
    file = _litert_file.File(content)
    return [file.kind(each) for each in file.model.subgraphs[0].operators]


@pytest.mark.parametrize(
    ("name", "sparsity", "is_kept_out"),
    [
        ("squeeze and excitation", 0.9, True),
        ("also an output", 0.9, True),
        ("also an output", 0.6, False),  # no more than two thirds are zero
        ("pooled", 0.9, True),
        ("subtracted", 0.9, False),  # LiteRT stops at the difference by itself
        ("widened", 0.9, False),  # no part has an end
    ],
)
def test_a_part_is_kept_out_only_where_litert_would_run_it(name, sparsity, is_kept_out):
    content = inspected(name, sparsity=sparsity).content
    assert (sparse_graph.BARRIER in kinds_in(content)) == is_kept_out


def with_two_ends(layers, x):
    """A part that LiteRT gets wrong if it runs it sparsely, and a dense layer beside it."""
    side = layers.Dense(64, name="hidden")(mean(layers, x))
    x = layers.GlobalAveragePooling2D(name="kept", keepdims=True)(point(layers, x))
    x = layers.Reshape((4,), name="flat")(layers.Conv2D(4, 1, name="logits")(x))
    return layers.Concatenate()([side, x])


@pytest.fixture(scope="module")
def hinted(tmp_path_factory):
    """Files with dense convolutions whose dense layer is run sparsely, or made dense on loading."""
    paths, folder = {}, tmp_path_factory.mktemp("hinted")
    for hint, structure in ((False, pruning.Block.for_litert()), (True, None)):
        model = pruned(network(with_two_ends))
        model = pruning.strip(pruning.prune_now(model, 0.9, layers="hidden", structure=structure))
        file = _litert_file.File(raw(model))
        for graph, number in file.sparse():
            if len(graph.tensors[number].shape) == 4:
                sparse_litert._make_dense(file, graph, number)
        paths[hint] = file_of(file.content(), folder / f"{hint}.tflite")
    return paths


def test_only_what_is_made_dense_on_loading_has_convolutions_run_sparsely(hinted):
    reports = {hint: export.sparse_inference(path) for hint, path in hinted.items()}
    assert "kept_1" in reports[True].faults and reports[False].faults == ()
    model = network(dense)
    model = pruned(model, 0.9)
    assert export.sparse_inference(model).sparse == 1


@needs_emulator
def test_on_a_processor_without_avx_that_is_so(hinted):
    found = emulation.run(hinted.values(), rounds=0)
    assert found["False"].error == "" and "failed to reshape" in found["True"].error


@pytest.mark.parametrize("name", ["odd size", "constants per channel", "two heads", "residual"])
def test_a_file_from_elsewhere_is_rewritten(name, tmp_path):
    """Into what `export_litert` writes; and its function stays."""
    (model, of_model, _), path = inspected(name), tmp_path / "net.tflite"
    source = file_of(raw_of(name), tmp_path / "raw.tflite")
    before = source.read_bytes()
    report = export.rewrite_litert(source, path)
    assert report == export.sparse_inference(path) and report.faults == ()
    assert report.sparse == len(NETWORKS[name][2]) == of_model.sparse
    if name != "residual":
        assert export.sparse_inference(source).sparse < report.sparse
    for count in (1, 3):
        x = np.random.default_rng(count).random((count, *model.input_shape[1:]), np.float32)
        np.testing.assert_allclose(export.load_litert(path)(x), model(x), atol=1e-5)
    with pytest.raises(FileExistsError, match="path exists already"):
        export.rewrite_litert(source, path)
    assert source.read_bytes() == before
    export.rewrite_litert(source, source, overwrite=True)
    assert source.read_bytes() == path.read_bytes()


def test_a_file_that_cannot_be_rewritten_is_refused(tmp_path, monkeypatch):
    path, source = tmp_path / "net.tflite", file_of(raw_of("residual"), tmp_path / "raw.tflite")
    export.export_litert(inspected("residual").model, tmp_path / "dense.tflite")
    with pytest.raises(ValueError, match=r"source has no sparse kernels: .*dense\.tflite"):
        export.rewrite_litert(tmp_path / "dense.tflite", path)
    with pytest.raises(FileNotFoundError, match="source"):
        export.rewrite_litert(tmp_path / "missing.tflite", path)
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"source is not the path of a LiteRT file: .*net\.tflite"):
        export.rewrite_litert(path, tmp_path / "other.tflite")
    with pytest.raises(FileExistsError, match="path is a file that is not LiteRT"):
        export.rewrite_litert(source, path, overwrite=True)
    path.unlink()
    corrected = sparse_litert.corrected

    def broken(content):
        file = _litert_file.File(corrected(content).content)
        for graph, number in file.constants():
            buffer = file.model.buffers[graph.tensors[number].buffer]
            buffer.data = -np.asarray(buffer.data).view("<f4")
            buffer.data = buffer.data.view(np.uint8)
        return corrected(content)._replace(content=file.content())

    monkeypatch.setattr(sparse_litert, "corrected", broken)
    with pytest.raises(ValueError, match="The outputs of the rewritten file differ from"):
        export.rewrite_litert(source, path)
    assert not path.exists()


def test_what_is_no_file_of_litert_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        export.sparse_inference(tmp_path / "missing.tflite")
    (tmp_path / "net.tflite").write_text("nothing of that kind")
    with pytest.raises(ValueError, match="not the path of a LiteRT file"):
        export.sparse_inference(tmp_path / "net.tflite")


@needs_emulator
def test_on_a_processor_without_avx_the_files_are_right(tmp_path):
    """All networks, as exported and, of those with faults, as the converter writes them."""
    models, paths, rights = {}, [], {1: {}, 3: {}}
    faulty = [
        *("convolution behind the mean", "image behind the mean", "two ways", "mean of rows"),
        *("also an output", "read elsewhere", "pooled"),
    ]
    for name in NETWORKS:
        models[name], _, content = inspected(name)
        paths.append(file_of(content, tmp_path / f"{name}.tflite"))
        if name in faulty:
            paths.append(file_of(raw_of(name), tmp_path / f"raw {name}.tflite"))
    for batch_size, right in rights.items():
        found = emulation.run(paths, rounds=0, batch_size=batch_size)
        for name, model in models.items():
            x = np.random.default_rng(0).random((batch_size, *model.input_shape[1:]), np.float32)
            wanted = [np.asarray(output) for output in tf.nest.flatten(model(x))]
            assert found[name].error == "", name
            outputs = sorted(map(np.array, found[name].outputs), key=np.ndim)
            for output, logits in zip(outputs, sorted(wanted, key=np.ndim), strict=True):
                np.testing.assert_allclose(output, logits, atol=1e-5, err_msg=name)
            if name in faulty:
                theirs = found[f"raw {name}"].outputs
                theirs = theirs and sorted(map(np.array, theirs), key=np.ndim)
                pairs = zip(theirs or (), outputs, strict=bool(theirs))
                right[name] = theirs is not None and all(
                    np.allclose(one, other, atol=1e-4) for one, other in pairs
                )
    for name in faulty:
        assert not (rights[1][name] and rights[3][name]), name


@needs_emulator
def test_on_a_processor_without_avx_zeros_are_worth_their_time(tmp_path):
    model = network(dense, size=64)
    small, large = tmp_path / "sparse.tflite", tmp_path / "dense.tflite"
    export.export_litert(pruned(model, 0.95), small, sparse=True)
    export.export_litert(pruned(model, 0.95), large)
    found = emulation.run([small, large])
    assert min(found["sparse"].seconds) < min(found["dense"].seconds)
