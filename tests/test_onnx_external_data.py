"""ONNX files whose weights stand in a second file beside them."""

from __future__ import annotations

import hashlib
import pathlib
import shutil

import numpy as np
import onnx
import pytest
import tensorflow as tf
from helpers import FLAVOURS, interrupted, names

from tscnc_tf import _files, export, pruning
from tscnc_tf.export import onnx as module
from tscnc_tf.export import preflight

LARGE = 100  # inputs and units of the layer that goes into the second file


def network(library, value=1.0):
    """A large layer, half zeros, a small one, and logits that are `value` for an input of zeros."""
    library.utils.set_random_seed(0)
    layers = library.layers
    model = library.Sequential(
        [
            library.Input((LARGE,), name="features"),
            layers.Dense(LARGE, name="large"),
            layers.Dense(3, bias_initializer=library.initializers.Constant(value), name="logits"),
        ]
    )
    return pruning.strip(pruning.prune_now(model, 0.5, layers="large"))


def exported(model, path, **options):
    return export.export_onnx(model, path, external_data=True, **options)


def value_of(path):
    return float(export.load_onnx(path)(np.zeros((1, LARGE), np.float32))[0, 0])


@pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)
def test_the_weights_are_beside_the_file_and_the_logits_those_of_the_model(library, tmp_path, rng):
    model = network(library)
    report = exported(model, tmp_path / "net.onnx")
    alone = export.export_onnx(model, tmp_path / "alone.onnx")
    data = pathlib.Path(report.data_file)
    assert data.parent == tmp_path and data.name.startswith("net.onnx.")
    assert names(tmp_path) == sorted(["alone.onnx", "net.onnx", data.name])
    assert report.kernels == alone.kernels and report.kernels[0].zeros == LARGE**2 // 2
    assert alone.data_file is None and f"in {data}" in str(report)
    assert report.settings["external_data"] is True and "external_data" not in alone.settings

    # What is large is there, once, and the file itself holds next to nothing.
    assert data.stat().st_size == 4 * LARGE**2
    whole = (tmp_path / "net.onnx").read_bytes() + data.read_bytes()
    assert report.file_bytes == len(whole) == pytest.approx(alone.file_bytes, rel=0.02)
    assert report.sha256 == hashlib.sha256(whole).hexdigest()
    tensors = onnx.load(tmp_path / "net.onnx").graph.initializer
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in tensors]
    kernel = model.get_layer("large").get_weights()[0]
    assert any(np.array_equal(array, kernel) for array in arrays)

    x = rng.random((5, LARGE), np.float32)
    (tmp_path / "elsewhere").mkdir()
    for name in ("net.onnx", data.name):
        shutil.move(tmp_path / name, tmp_path / "elsewhere")
    served = export.load_onnx(tmp_path / "elsewhere" / "net.onnx")
    np.testing.assert_allclose(served(x), model(x), atol=1e-5)
    (tmp_path / "elsewhere" / data.name).unlink()
    with pytest.raises(ValueError, match="can't be read by ONNX Runtime"):
        export.load_onnx(tmp_path / "elsewhere" / "net.onnx")


def test_tensors_in_python_are_beside_the_file_too(tmp_path, rng):
    """tf2onnx takes them for inputs, and leaves them to us."""
    held = tf.constant(rng.random((LARGE, LARGE)), tf.float32)
    library = FLAVOURS["keras"]
    inputs = library.Input((LARGE,))
    x = library.layers.Lambda(lambda x: x @ held, name="held")(inputs)
    model = library.Model(inputs, library.layers.Dense(3)(x))
    report = exported(model, tmp_path / "net.onnx")
    assert pathlib.Path(report.data_file).stat().st_size >= 4 * LARGE**2
    x = rng.random((2, LARGE), np.float32)
    np.testing.assert_allclose(export.load_onnx(tmp_path / "net.onnx")(x), model(x), rtol=1e-4)


def test_a_file_of_weights_goes_with_the_file_that_names_it(tmp_path):
    path = tmp_path / "net.onnx"
    (tmp_path / "net.onnx.00000000.data").write_bytes(b"of somebody else")
    kept = ["net.onnx", "net.onnx.00000000.data"]
    first = exported(network(FLAVOURS["keras"], 1.0), path).data_file
    second = exported(network(FLAVOURS["keras"], 2.0), path, overwrite=True).data_file
    assert first != second and value_of(path) == 2.0
    assert names(tmp_path) == sorted([*kept, pathlib.Path(second).name])
    export.export_onnx(network(FLAVOURS["keras"], 3.0), path, overwrite=True)
    assert names(tmp_path) == kept and value_of(path) == 3.0
    with pytest.raises(FileExistsError, match="path exists already"):
        exported(network(FLAVOURS["keras"]), path)
    with pytest.raises(TypeError, match="external_data must be True or False, got 1"):
        export.export_onnx(network(FLAVOURS["keras"]), path, external_data=1)
    assert names(tmp_path) == kept


FAILING = {
    "writing": (module, "_store"),
    "reading": (module.ONNX, "constants"),
    "comparing": (preflight, "require_same"),
    "flushing": (_files, "_flush"),
    "putting": (pathlib.Path, "replace"),
}


@pytest.mark.parametrize("step", FAILING)
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_whatever_fails_a_file_and_its_weights_are_there(step, late, tmp_path):
    path = tmp_path / "net.onnx"
    exported(network(FLAVOURS["keras"], 1.0), path)
    with interrupted(*FAILING[step], late):
        exported(network(FLAVOURS["keras"], 2.0), path, overwrite=True)
    assert len(names(tmp_path)) == 2
    assert value_of(path) == (2.0 if (step, late) == ("putting", True) else 1.0)
