"""What is exported is what was trained, whole or not there, and serves without us."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import FLAVOURS, interrupted, names

from tscnc_tf import (
    _files,
    _keras,
    _probe,
    attacks,
    export,
    inspection,
    losses,
    pruning,
    training,
)
from tscnc_tf._keras import wrappers
from tscnc_tf.export import manifest, preflight, saved_model

layers = tf_keras.layers
tfmots = _keras.tfmot().sparsity.keras

every_flavour = pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)

SPARSITY = 0.9
# Of each kernel's n weights, tfmot keeps max(round(n / 10), 1).
ZEROS = {"conv": (72, 65), "hidden": (6272, 5645), "last": (80, 72)}
VARIABLES = "variables/variables.data-00000-of-00001"


def prune(model, sparsity=SPARSITY):
    return tfmots.prune_low_magnitude(
        model, tfmots.ConstantSparsity(sparsity, begin_step=0, frequency=1)
    )


def classifier():
    return tf_keras.Sequential(
        [
            layers.Input((16, 16, 1), name="image"),
            layers.Conv2D(8, 3, name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(),
            layers.MaxPool2D(),
            layers.Flatten(),
            # swish has a gradient of its own in tf_keras, which a SavedModel must carry along
            layers.Dense(16, "swish", name="hidden"),
            layers.Dense(5, name="last"),
        ]
    )


def trained():
    tf_keras.utils.set_random_seed(0)
    model = prune(classifier())
    model.compile("adam", tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    generator = np.random.default_rng(0)
    x, y = generator.random((48, 16, 16, 1), np.float32), generator.integers(0, 5, 48)
    model.fit(x, y, batch_size=16, epochs=2, verbose=0, callbacks=[tfmots.UpdatePruningStep()])
    return model


def dense(sparsity=None, units=6):
    model = tf_keras.Sequential(
        [layers.Dense(units, input_shape=(4,), name="first"), layers.Dense(3, name="last")]
    )
    return model if sparsity is None else prune(model, sparsity)


def masked(sparsity=0.5):
    """A small model with its masks set, as training would set them at its first step."""
    model = dense(sparsity)
    for wrapper in wrappers.wrapped_layers(model):
        wrapper.pruning_step.assign(1)
        wrapper.pruning_obj.conditional_mask_update()
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A trained, pruned model and its export, not to be changed."""
    model = trained()
    folder = tmp_path_factory.mktemp("exported") / "model"
    report = export.export_saved_model(model, folder, expected_sparsity=SPARSITY)
    return model, folder, report


@pytest.fixture
def copy(exported, tmp_path):
    """A copy of the exported folder, to be damaged."""
    return pathlib.Path(shutil.copytree(exported[1], tmp_path / "copy"))


@pytest.fixture
def images(rng):
    return rng.random((6, 16, 16, 1), np.float32)


def read(folder):
    return json.loads((folder / manifest.NAME).read_text("utf-8"))


def reseal(folder, content):
    """Write a manifest as somebody would who knows how."""
    content.pop("sha256", None)
    content["sha256"] = manifest.seal(content)
    (folder / manifest.NAME).write_text(json.dumps(content), "utf-8")


# What is written


def test_a_trained_pruned_model_is_exported_with_its_zeros(exported, images):
    model, folder, report = exported
    assert {row.name: (row.weights, row.zeros) for row in report.kernels} == ZEROS
    assert all(row.masked for row in report.kernels)
    assert report.sparsity == (65 + 5645 + 72) / (72 + 6272 + 80)
    assert report.path == str(folder)
    assert report.expected_sparsity == SPARSITY

    loaded = tf.saved_model.load(str(folder))
    variables = {variable.name: variable.numpy() for variable in loaded.variables}
    assert sorted(variables) == sorted(
        [f"{layer}/{weight}:0" for layer in ZEROS for weight in ("kernel", "bias")]
        + [f"norm/{w}:0" for w in ("gamma", "beta", "moving_mean", "moving_variance")]
    )
    for name, (size, zeros) in ZEROS.items():
        kernel = variables[f"{name}/kernel:0"]
        assert (kernel.size, np.count_nonzero(kernel == 0)) == (size, zeros)
        assert not np.signbit(kernel[kernel == 0]).any()
    weights = np.concatenate([values.ravel() for values in variables.values()])
    assert report.weights.model_weights == weights.size
    assert report.weights.model_zeros == np.count_nonzero(weights == 0)
    assert report.model_sparsity == np.count_nonzero(weights == 0) / weights.size

    expected = model(images, training=False).numpy()
    np.testing.assert_allclose(loaded.serve(images), expected, rtol=1e-5, atol=1e-5)
    by_signature = loaded.signatures["serving_default"](image=tf.constant(images))
    np.testing.assert_allclose(by_signature["output_0"], expected, rtol=1e-5, atol=1e-5)


def test_the_report_says_what_is_in_the_folder(exported):
    _, folder, report = exported
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    del files[manifest.NAME]
    assert {"saved_model.pb", VARIABLES} <= set(files)
    assert report.files == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    assert report.saved_model_bytes == sum(map(len, files.values()))
    assert 0 < report.gzip_bytes < report.saved_model_bytes
    # The smallest is a bitmap, for each kernel; beside it the weights that are left.
    bitmaps = 72 // 8 + 6272 // 8 + 80 // 8
    others = 8 + 4 * 8 + 16 + 5  # biases and normalisation
    expected = bitmaps + 4 * (7 + 627 + 8 + others)
    assert report.ideal_sparse_bytes == expected < report.gzip_bytes
    assert report.inputs == (export.ExportedTensor("image", (None, 16, 16, 1), "float32"),)
    assert report.outputs == (export.ExportedTensor("output_0", (None, 5), "float32"),)
    assert report.variables[0] == export.ExportedVariable(
        "conv/kernel:0", (3, 3, 1, 8), "float32", 65
    )
    assert len(report.variables) == 10
    assert report.probe_examples == 8
    assert 0 <= report.max_logit_difference <= report.logit_tolerance < 1e-3
    assert report.versions["tensorflow"] == tf.__version__
    assert report.versions["tf_keras"] == tf_keras.__version__
    assert set(report.versions) == {"tscnc_tf", "tensorflow", "tf_keras", "numpy", "python"}


def test_the_report_as_table_and_as_json(exported):
    report = exported[2]
    table = str(report)
    sizes = ("gzipped", "ideally sparse")
    for text in ("conv", "3×3×1×8", "5,645", "90.28 %", "90.01 %", "whole model", *sizes):
        assert text.lower() in table.lower()
    assert "image (any, 16, 16, 1) float32" in table
    zeros, weights = report.weights.model_zeros, report.weights.model_weights
    assert f"Whole model: {zeros:,} of {weights:,} weights are zero" in table
    as_json = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert export.ExportReport.from_dict(as_json) == report
    content = read(exported[1])
    assert content.pop("format") == 1
    content.pop("sha256")
    assert {**content, "path": str(exported[1])} == as_json
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.path = "elsewhere"
    with pytest.raises(ValueError, match="not an export report: KeyError"):
        export.ExportReport.from_dict({"path": "somewhere"})


def test_exporting_again_gives_the_same_weights(exported, images, tmp_path):
    model, _, first = exported
    logits = model(images, training=False).numpy()
    second = export.export_saved_model(model, tmp_path / "again")
    assert second.files[VARIABLES] == first.files[VARIABLES]
    assert second.kernels == first.kernels
    assert second.expected_sparsity is None
    np.testing.assert_array_equal(model(images, training=False), logits)


def test_the_model_can_be_trained_on(tmp_path):
    model = masked()
    model.compile("sgd", "mse")
    export.export_saved_model(model, tmp_path / "model", expected_sparsity=0.5)
    assert len(wrappers.wrapped_layers(model)) == 2
    before = [variable.numpy() for variable, _ in wrappers.pruned_variables(model)]
    x = np.ones((4, 4))
    model.fit(x, x[:, :3], verbose=0, callbacks=[tfmots.UpdatePruningStep()])
    for (after, mask), values in zip(wrappers.pruned_variables(model), before, strict=True):
        assert (after.numpy() != values).any()
        assert np.count_nonzero(mask.numpy() == 0) == mask.shape.num_elements() / 2


def test_stale_weights_under_a_mask_become_zero(tmp_path):
    model = masked()
    kernel, mask = next(iter(wrappers.pruned_variables(model)))
    kernel.assign(np.where(mask.numpy() == 0, -7.0, kernel.numpy()))
    assert np.count_nonzero(kernel.numpy() == 0) == 0
    report = export.export_saved_model(model, tmp_path / "model", expected_sparsity=0.5)
    assert [row.zeros for row in report.kernels] == [12, 9]
    np.testing.assert_array_equal(kernel.numpy() == 0, mask.numpy() == 0)
    assert not np.signbit(kernel.numpy()[mask.numpy() == 0]).any()
    served = tf.saved_model.load(str(tmp_path / "model")).variables[0]
    np.testing.assert_array_equal(served.numpy(), kernel.numpy())


def test_zeros_pay_off_when_compressed(exported, tmp_path):
    tf_keras.utils.set_random_seed(0)
    full = export.export_saved_model(classifier(), tmp_path / "full")
    assert full.sparsity == 0.0
    assert not any(row.masked for row in full.kernels)
    assert exported[2].gzip_bytes < full.gzip_bytes / 2
    assert exported[2].saved_model_bytes > full.saved_model_bytes * 0.9


def test_the_gzipped_size_depends_on_contents_only(copy):
    size = manifest.gzip_size(copy)
    for path in copy.rglob("*"):
        os.utime(path, (0, 0))
    assert manifest.gzip_size(copy) == size


def test_negative_zeros_are_not_exported(tmp_path):
    model = dense()
    model.layers[0].kernel.assign(np.full((4, 6), -0.0))
    export.export_saved_model(model, tmp_path / "model")
    assert not np.signbit(model.layers[0].kernel.numpy()).any()


def test_nothing_is_printed(tmp_path, capfd):
    tf_keras.utils.enable_interactive_logging()
    export.export_saved_model(dense(0.5), tmp_path / "model")
    assert tf_keras.utils.is_interactive_logging_enabled()
    export.export_saved_model(k3_model(), tmp_path / "keras 3")
    assert capfd.readouterr().out == ""


# All or nothing


@pytest.mark.parametrize("kind", ["export", "file"])
def test_an_existing_path_is_not_touched(exported, tmp_path, kind):
    goal = tmp_path / "goal"
    if kind == "export":
        shutil.copytree(exported[1], goal)
    else:
        goal.write_bytes(b"mine")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(FileExistsError, match=r"path exists already: .*goal.*choose another"):
        export.export_saved_model(dense(), goal)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_a_writer_that_fails_leaves_nothing(tmp_path, monkeypatch):
    save = tf.saved_model.save

    def full(obj, folder, **kwargs):
        save(obj, folder, **kwargs)
        raise OSError("disk full")

    monkeypatch.setattr(tf.saved_model, "save", full)
    monkeypatch.setattr(tf.compat.v2.saved_model, "save", full)
    with pytest.raises(OSError, match="disk full"):
        export.export_saved_model(dense(0.5), tmp_path / "model")
    assert names(tmp_path) == []


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import tensorflow as tf, tf_keras
from tscnc_tf import export
model = tf_keras.Sequential([tf_keras.layers.Dense(3, input_shape=(4,))])
load = tf.saved_model.load
def killed(folder, **kwargs):
    load(folder)  # everything is written, and nothing renamed
    os.kill(os.getpid(), signal.SIGKILL)
tf.saved_model.load = killed
export.export_saved_model(model, sys.argv[2])
"""


def test_a_killed_process_leaves_nothing_at_the_path(tmp_path):
    goal = tmp_path / "model"
    root = str(pathlib.Path(export.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, root, str(goal)], check=False, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not goal.exists()
    (draft,) = names(tmp_path)
    assert (tmp_path / draft / "saved_model.pb").exists()
    with pytest.raises(ValueError, match=r"no tscnc_manifest\.json"):
        export.load_saved_model(tmp_path / draft)
    export.export_saved_model(dense(), goal)  # the draft is in nobody's way


# Overwriting


def network(library, value):
    """A model whose logits are all `value`."""
    model = library.Sequential([library.layers.Dense(3, name="last")])
    model.build((None, 4))
    model.layers[0].set_weights([np.zeros((4, 3)), np.full(3, value)])
    return model


def value_of(folder):
    return float(export.load_saved_model(folder)(np.ones((1, 4), np.float32))[0, 0])


@every_flavour
def test_an_export_is_replaced_if_that_is_asked_for(tmp_path, library):
    folder = tmp_path / "model"
    export.export_saved_model(network(library, 1.0), folder, overwrite=True)
    served = export.load_saved_model(folder)
    with pytest.raises(FileExistsError, match="Nothing is overwritten: pass overwrite=True, remo"):
        export.export_saved_model(network(library, 2.0), folder)
    assert value_of(folder) == 1.0
    report = export.export_saved_model(network(library, 2.0), folder, overwrite=True)
    assert value_of(folder) == 2.0 and report.path == str(folder)
    assert names(tmp_path) == ["model"]
    assert float(served(np.ones((1, 4), np.float32))[0, 0]) == 1.0  # what was loaded stays
    with pytest.raises(TypeError, match="overwrite must be True or False, got 1"):
        export.export_saved_model(network(library, 3.0), folder, overwrite=1)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "path is no folder"),
        (["notes.txt"], "path is a folder with 'notes.txt', which is no part of a SavedModel"),
        (["saved_model.pb", ".bashrc"], "path is a folder with '.bashrc', which is no part"),
        (["saved_model.pb", "assets.extra/tf_serving_warmup_requests"], "with 'assets.extra'"),
        (["variables/variables.index"], r"path is a folder without saved_model\.pb"),
        (["saved_model.pb", "variables/mine.csv"], "with 'variables/mine.csv', which is no part"),
    ],
)
def test_what_is_no_export_is_not_replaced(tmp_path, files, message):
    goal = tmp_path / "goal"
    if files is None:
        goal.write_text("mine")
    for file in files or ():
        (goal / file).parent.mkdir(parents=True, exist_ok=True)
        (goal / file).write_text("mine")
    with pytest.raises(FileExistsError, match=rf"{message}.*: .*goal.* remove it yourself, or cho"):
        export.export_saved_model(dense(), goal, overwrite=True)
    assert names(tmp_path) == ["goal"]
    assert all((goal / file).read_text() == "mine" for file in files or [""])


def test_a_model_of_a_list_of_one_input_takes_arrays(tmp_path, rng):
    inputs = keras.Input((4,))
    model = keras.Model([inputs], keras.layers.Dense(3)(inputs))
    x = rng.random((5, 4), np.float32)
    folder = tmp_path / "model"
    for probe in (x, [x]):
        export.export_saved_model(model, folder, probe=probe, overwrite=True)
    served = export.load_saved_model(folder)
    for batch in (x, [x], tf.constant(x)):
        np.testing.assert_allclose(served(batch), model([x]), atol=1e-6)
    assert not np.array_equal(attacks.FGSM(epsilon=0.1)(served, x, [0] * 5), x)


def test_frozen_attention_is_checked_as_if_it_was_not(tmp_path):
    inputs = keras.Input((6, 8))
    x = keras.layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    model = keras.Model(inputs, keras.layers.Dense(3, name="last")(x))
    model = pruning.strip(pruning.prune_now(model, 0.8, layers="last"))
    rows = inspection.sparsity(model).rows
    model.trainable = False
    assert inspection.sparsity(model).rows == rows and len(rows) == 5
    with pytest.raises(ValueError, match="query/kernel has 0 zeros"):
        export.export_saved_model(model, tmp_path / "model", expected_sparsity=0.9)


@pytest.mark.parametrize("file", [None, manifest.NAME, "saved_model.pb"])
def test_an_empty_folder_and_a_damaged_export_are_replaced(tmp_path, file):
    folder = tmp_path / "model"
    folder.mkdir()
    if file is not None:
        (folder / file).write_text("{")
    export.export_saved_model(network(tf_keras, 2.0), folder, overwrite=True)
    assert value_of(folder) == 2.0 and names(tmp_path) == ["model"]


FAILING = {
    "checking": lambda: (preflight, "check"),
    "writing": lambda: (saved_model, "_write"),
    "loading": lambda: (tf.saved_model, "load"),
    "comparing variables": lambda: (saved_model, "_require_same_variables"),
    "comparing logits": lambda: (preflight, "require_same"),
    "hashing": lambda: (manifest, "file_facts"),
    "compressing": lambda: (manifest, "gzip_size"),
    "describing": lambda: (manifest, "write"),
    "flushing": lambda: (_files, "_flush"),
    "putting": lambda: (_files, "_put"),
}


@pytest.mark.parametrize("step", FAILING)
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_whatever_fails_the_old_export_or_the_new_one_is_there(tmp_path, step, late, exported):
    folder = pathlib.Path(shutil.copytree(exported[1], tmp_path / "model"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with interrupted(*FAILING[step](), late):
        export.export_saved_model(network(tf_keras, 2.0), folder, overwrite=True)
    assert names(tmp_path) == ["model"]
    if (step, late) == ("putting", True):
        assert value_of(folder) == 2.0
    else:
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
        export.load_saved_model(folder)


def test_an_export_whose_replacement_was_cut_off_is_found(tmp_path):
    folder = tmp_path / "model"
    export.export_saved_model(network(tf_keras, 1.0), folder)
    folder.rename(_files._aside(folder))  # where folders can't change places, and it is killed here
    assert value_of(folder) == 1.0 and names(tmp_path) == ["model"]


def test_an_export_that_is_replaced_while_it_is_loaded_is_loaded_again(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    export.export_saved_model(network(tf_keras, 1.0), folder)
    load, seen = tf.saved_model.load, []

    def slow(path):
        if not seen:
            seen.append(path)
            monkeypatch.setattr(tf.saved_model, "load", load)
            export.export_saved_model(network(tf_keras, 2.0), folder, overwrite=True)
            monkeypatch.setattr(tf.saved_model, "load", slow)
            raise OSError("a file is gone")
        return load(path)

    monkeypatch.setattr(tf.saved_model, "load", slow)
    served = export.load_saved_model(folder)
    assert float(served(np.ones((1, 4), np.float32))[0, 0]) == 2.0
    assert served.report.variables == export.load_saved_model(folder).report.variables


PLAIN = """
import sys
BLOCKED = ("tscnc_tf", "tf_keras", "keras", "tensorflow_model_optimization")
class Blind:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        if name.partition(".")[0] not in BLOCKED:
            return self.finder.find_spec(name, *rest)
sys.meta_path[:] = [Blind(finder) for finder in sys.meta_path]
import numpy as np
import tensorflow as tf
x = np.load("x.npy")
loaded = tf.saved_model.load("model")
by_name = loaded.signatures["serving_default"](image=tf.constant(x))["output_0"]
np.save("logits.npy", np.stack([loaded.serve(x), by_name]))
assert not set(BLOCKED) & set(sys.modules), set(BLOCKED) & set(sys.modules)
"""


def test_tensorflow_alone_serves_it(exported, images, tmp_path):
    shutil.copytree(exported[1], tmp_path / "model")
    np.save(tmp_path / "x.npy", images)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN],
        cwd=tmp_path,
        env=environment,
        check=False,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    expected = exported[0](images, training=False).numpy()
    for logits in np.load(tmp_path / "logits.npy"):
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


# What is refused


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("name", "index"), [("first/kernel:0", 0), ("last/bias:0", 3)], ids=["pruned", "bias"]
)
def test_weights_that_are_not_finite_are_refused(tmp_path, value, name, index):
    model = dense(0.5)
    variable = next(v for v in model.weights if v.name.endswith(name))
    variable.assign(np.full(variable.shape, value))
    with pytest.raises(ValueError, match=f"NaN or infinite, in .*{name}.*checkpoint"):
        export.export_saved_model(model, tmp_path / "model")
    assert names(tmp_path) == []


def test_overflowing_logits_are_refused(tmp_path):
    model = dense()
    for layer in model.layers:
        layer.kernel.assign(np.full(layer.kernel.shape, 1e38))
    with pytest.raises(ValueError, match="logits on the probe batch hold NaN or infinity"):
        export.export_saved_model(model, tmp_path / "model")
    assert names(tmp_path) == []


def test_missing_sparsity_is_refused_with_figures(tmp_path):
    model = masked()
    kernel, mask = list(wrappers.pruned_variables(model))[-1]
    mask.assign(np.ones(mask.shape))  # the masks of one layer have been lost
    kernel.assign(np.ones(mask.shape))
    with pytest.raises(ValueError, match=r"expected_sparsity=0\.5 is not reached") as error:
        export.export_saved_model(model, tmp_path / "model", expected_sparsity=0.5)
    assert "last has 0 zeros of 18 (0.00 %), 9 are needed" in str(error.value)
    assert "first" not in str(error.value)
    assert "expect less" in str(error.value)
    assert names(tmp_path) == []
    report = export.export_saved_model(model, tmp_path / "model")  # not asked, not refused
    assert [row.zeros for row in report.kernels] == [12, 0]


def test_without_masks_all_kernels_are_judged(tmp_path):
    model = dense()
    first, last = (layer.kernel for layer in model.layers)
    first.assign(np.where(np.arange(24).reshape(4, 6) < 12, 0, 1))
    with pytest.raises(ValueError, match=r"last has 0 zeros of 18 .*, 9 are needed") as error:
        export.export_saved_model(model, tmp_path / "model", expected_sparsity=0.5)
    assert "first" not in str(error.value)
    last.assign(np.where(np.arange(18).reshape(6, 3) < 9, 0, 1))
    report = export.export_saved_model(model, tmp_path / "model", expected_sparsity=0.5)
    assert [row.zeros for row in report.kernels] == [12, 9]


@pytest.mark.parametrize("size", [1, 2, 5, 27, 216, 1001, 70_001])
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9, 0.95, 0.99, 0.999])
def test_the_zeros_asked_for_are_those_that_tfmot_makes(size, sparsity):
    from tensorflow_model_optimization.python.core.sparsity.keras import pruning_impl

    schedule = tfmots.ConstantSparsity(sparsity, begin_step=0)
    pruning = pruning_impl.Pruning(lambda: 0, [], schedule, (1, 1), "AVG")
    mask = pruning._update_mask(tf.random.stateless_normal([size], seed=(0, 0)))[1].numpy()
    zeros = int(np.count_nonzero(mask == 0))

    def report(zeros):
        row = inspection.WeightSparsity("kernel", (size,), size, zeros, True)
        return inspection.SparsityReport((row,), size, zeros)

    preflight.require_sparsity(report(zeros), sparsity)
    if zeros:
        with pytest.raises(ValueError, match=f"{zeros:,} are needed"):
            preflight.require_sparsity(report(zeros - 1), sparsity)


@pytest.mark.parametrize(
    ("value", "error"),
    [(1.0, ValueError), (-0.1, ValueError), (90, ValueError), ("0.9", TypeError)],
)
def test_expected_sparsity_is_validated(tmp_path, value, error):
    with pytest.raises(error, match="expected_sparsity must be"):
        export.export_saved_model(dense(), tmp_path / "model", expected_sparsity=value)


def test_the_trainer_is_refused_and_its_model_named(tmp_path):
    trainer = training.AdversarialTraining(
        dense(0.5),
        attack=attacks.PGD(epsilon=8 / 255, step_size=2 / 255, steps=1),
        loss=losses.TRADES(),
    )
    with pytest.raises(TypeError, match=r"export trainer\.model"):
        export.export_saved_model(trainer, tmp_path / "model")
    export.export_saved_model(trainer.model, tmp_path / "model")


class Subclassed(tf_keras.Model):
    """Its default is training mode, in which dropout is at work."""

    def __init__(self, wrap=lambda layer: layer):
        super().__init__()
        self.dense = wrap(layers.Dense(3, name="inner"))
        self.dropout = layers.Dropout(0.5)

    def call(self, x, training=True):
        return self.dropout(self.dense(x), training=training)


class Holder(layers.Layer):
    def __init__(self):
        super().__init__()
        self.inner = prune(layers.Dense(3, name="inner"))

    def call(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: tf_keras.Sequential([layers.Dense(3)]), ValueError, "has no weights yet"),
        (lambda: layers.Dense(3), TypeError, "must be a Keras 3 or tf_keras model, got Dense"),
        (lambda: len, TypeError, "must be a Keras 3 or tf_keras model"),
        (lambda: tf_keras.Sequential([layers.ReLU(input_shape=(3,))]), ValueError, "kernels"),
        (
            lambda: tf_keras.Sequential([layers.Input((4,)), Holder()]),
            ValueError,
            "still has pruning wrappers after stripping: prune_low_magnitude_inner",
        ),
    ],
    ids=["unbuilt", "layer", "function", "no kernels", "wrapper inside a layer"],
)
def test_models_that_cannot_be_exported(tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        export.export_saved_model(make(), tmp_path / "model")
    assert names(tmp_path) == []


def test_a_subclassed_model_with_wrappers_is_refused(tmp_path, rng):
    model = Subclassed(wrap=prune)
    x = rng.random((2, 4), np.float32)
    model(x, training=False)
    with pytest.raises(ValueError, match=r"\['prune_low_magnitude_inner'\] can't be taken out"):
        export.export_saved_model(model, tmp_path / "model", probe=x)


def test_a_subclassed_model_without_wrappers_serves_in_inference_mode(tmp_path, rng):
    model = Subclassed()
    x = rng.random((2, 4))
    model(x)
    with pytest.raises(ValueError, match=r"shape of its inputs is not known\. Pass probe="):
        export.export_saved_model(model, tmp_path / "model")
    report = export.export_saved_model(model, tmp_path / "model", probe=x)
    assert str(report.inputs[0]) == "inputs (any, 4) float32"
    assert report.probe_examples == 2
    served = export.load_saved_model(tmp_path / "model")
    x = rng.random((5, 4))
    np.testing.assert_allclose(served(x), model(x, training=False), rtol=1e-5, atol=1e-6)


class Noise(layers.Layer):
    def call(self, x):
        return x + tf.random.normal(tf.shape(x))


def test_a_model_that_is_random_when_served_is_refused(tmp_path):
    model = tf_keras.Sequential([layers.Input((4,)), Noise(), layers.Dense(3)])
    with pytest.raises(ValueError, match=r"loaded again, differ .*random in inference mode"):
        export.export_saved_model(model, tmp_path / "model")
    assert names(tmp_path) == []


def test_a_mask_that_was_not_applied_is_noticed(tmp_path, monkeypatch):
    model = masked()
    monkeypatch.setattr(wrappers, "apply_masks", lambda model, optimizer=None: None)
    with pytest.raises(ValueError, match="first/kernel:0 has 12 weights that its mask does not"):
        export.export_saved_model(model, tmp_path / "model")


def test_a_savedmodel_that_differs_from_the_model_is_noticed(tmp_path, monkeypatch):
    write = saved_model._write

    def other(ready, folder):
        before = ready.stripped.get_weights()
        ready.stripped.set_weights([*before[:-1], before[-1] + 1e-7])
        write(ready, folder)
        ready.stripped.set_weights(before)

    monkeypatch.setattr(saved_model, "_write", other)
    with pytest.raises(ValueError, match=r"loaded again, differs from the model in last/bias:0"):
        export.export_saved_model(dense(0.5), tmp_path / "model")
    assert names(tmp_path) == []


def test_a_wrapper_left_in_the_savedmodel_is_noticed(tmp_path, monkeypatch):
    model = dense(0.5)
    write = saved_model._write
    monkeypatch.setattr(
        saved_model, "_write", lambda ready, folder: write(ready._replace(stripped=model), folder)
    )
    with pytest.raises(ValueError, match=r"differs from the model in .*first/mask:0"):
        export.export_saved_model(model, tmp_path / "model")
    assert names(tmp_path) == []


# Probes, inputs and kinds of models


def any_size():
    return tf_keras.Sequential(
        [
            layers.Conv2D(2, 3, input_shape=(None, None, 1), name="conv"),
            layers.GlobalAveragePooling2D(),
        ]
    )


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    ("kind", "options", "largest"),
    [
        ("Rescaling", {"scale": 1 / 255}, 255.0),
        ("Rescaling", {"scale": 1 / 127.5, "offset": -1}, 255.0),
        ("Rescaling", {"scale": 2.0, "offset": -1}, 1.0),
        ("Normalization", {"mean": [120.0], "variance": [3600.0]}, 240.0),
        ("Normalization", {"mean": [0.5], "variance": [0.09]}, 1.0),
    ],
)
def test_a_probe_has_the_pixels_that_the_model_scales(flavour, kind, options, largest):
    k = FLAVOURS[flavour]
    scaling = getattr(k.layers, kind)(**options)
    model = k.Sequential([k.layers.InputLayer((8, 8, 1)), scaling, k.layers.Flatten()])
    probe = _probe.draw(model)
    assert probe.dtype == np.float32
    assert 0.95 * largest < probe.max() <= largest


def test_a_probe_on_which_all_logits_are_equal_is_warned_of(tmp_path, rng):
    model = dense()
    model.set_weights([1e-6 * weight for weight in model.get_weights()])
    with pytest.warns(UserWarning, match=r"differ by at most .* between its examples.*Pass probe="):
        export.export_saved_model(model, tmp_path / "model")
    export.export_saved_model(model, tmp_path / "one", probe=rng.random((1, 4)))


def test_a_model_of_any_image_size_needs_a_probe(tmp_path, rng):
    with pytest.raises(ValueError, match=r"float32 \(any, any, any, 1\).*Pass probe="):
        export.export_saved_model(any_size(), tmp_path / "model")
    probe = rng.integers(0, 255, (3, 7, 5, 1), np.uint8)  # integers are fine for floats
    report = export.export_saved_model(any_size(), tmp_path / "model", probe=probe)
    assert report.inputs[0].shape == (None, None, None, 1)
    assert report.probe_examples == 3


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (np.ones((2, 5)), r"probe must be float32 \(any, 4\), got an array of shape \(2, 5\)"),
        (np.ones((0, 4)), r"got an array of shape \(0, 4\)"),
        (np.full((2, 4), np.nan), "probe must be finite"),
        (np.array([list("abcd")]), "got an array of <U1"),
        (3.0, r"got an array of shape \(\)"),
    ],
)
def test_a_probe_that_does_not_fit(tmp_path, probe, message):
    with pytest.raises(ValueError, match=message):
        export.export_saved_model(dense(), tmp_path / "model", probe=probe)


def two_inputs(kind, library=tf_keras):
    a, b = library.Input((4,), name="a"), library.Input((3,), name="b")
    joined = library.layers.Concatenate()([a, b])
    inputs = {"a": a, "b": b} if kind is dict else [a, b]
    model = library.Model(inputs, {"y": library.layers.Dense(2, name="last")(joined)})
    return prune(model, 0.5) if library is tf_keras else model


@pytest.mark.parametrize("kind", [dict, list])
@pytest.mark.parametrize("library", [tf_keras, keras], ids=["tf_keras", "keras"])
def test_models_of_several_inputs(tmp_path, rng, kind, library):
    model = two_inputs(kind, library)
    x = {"b": rng.random((2, 3), np.float32), "a": rng.random((2, 4), np.float32)}
    x = x if kind is dict else [x["a"], x["b"]]
    report = export.export_saved_model(model, tmp_path / "drawn")
    assert [str(tensor) for tensor in report.inputs] == ["a (any, 4) float32", "b (any, 3) float32"]
    assert [str(tensor) for tensor in report.outputs] == ["y (any, 2) float32"]
    assert export.export_saved_model(model, tmp_path / "given", probe=x).probe_examples == 2
    served = export.load_saved_model(tmp_path / "given")
    np.testing.assert_allclose(served(x)["y"], model(x, training=False)["y"], rtol=1e-5, atol=1e-6)
    wrong = [np.ones((2, 4)), {"a": np.ones((2, 4)), "c": np.ones((2, 3))}, [np.ones((2, 4))]]
    for values in wrong:
        with pytest.raises(ValueError, match=r"probe must have the structure of the model's inp"):
            export.export_saved_model(model, tmp_path / "wrong", probe=values)
        with pytest.raises(ValueError, match=r"inputs must have the structure of the model's inp"):
            served(values)


def k3_model():
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(3, "silu", name="first"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(2, name="last"),
        ]
    )


def test_a_keras_3_model(tmp_path, rng):
    keras.utils.set_random_seed(0)
    model = k3_model()
    x = rng.random((16, 4), np.float32)
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(x, x[:, :2], verbose=0)
    values = model.layers[1].kernel.numpy()
    model.layers[1].kernel.assign(np.where(np.arange(12).reshape(4, 3) % 2, values, 0))
    report = export.export_saved_model(model, tmp_path / "model")
    assert [(row.name, row.zeros) for row in report.kernels] == [("first", 6), ("last", 0)]
    assert report.versions["keras"] == keras.__version__
    assert "tf_keras" not in report.versions
    served = export.load_saved_model(tmp_path / "model")
    np.testing.assert_allclose(served(x), model(x, training=False), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"first has 6 zeros of 12 .*, 11 are needed"):
        export.export_saved_model(model, tmp_path / "other", expected_sparsity=0.9)


def test_nested_models_and_pruned_weights_that_are_no_kernels(tmp_path):
    inner = tf_keras.Sequential(
        [layers.Embedding(10, 4, name="words"), layers.SimpleRNN(3, name="memory")], name="inner"
    )
    tokens = layers.Input((5,), dtype="int32")
    model = prune(tf_keras.Model(tokens, layers.Dense(2, name="last")(inner(tokens))), 0.5)
    with pytest.raises(ValueError, match=r"int32 \(any, 5\).*only floats"):
        export.export_saved_model(model, tmp_path / "model")
    probe = np.arange(10).reshape(2, 5)
    with pytest.raises(ValueError, match=r"probe must be int32 .*got an array of float64"):
        export.export_saved_model(model, tmp_path / "model", probe=probe / 1.0)
    report = export.export_saved_model(model, tmp_path / "model", probe=probe)
    assert {row.name for row in report.kernels if row.masked} == {
        "simple_rnn_cell/kernel",
        "simple_rnn_cell/recurrent_kernel",
        "last",
        "words/embeddings",
    }
    served = export.load_saved_model(tmp_path / "model")
    np.testing.assert_allclose(served(probe.astype(np.int32)), model(probe), rtol=1e-5, atol=1e-6)


def test_half_precision_has_a_larger_tolerance_and_is_served_as_float32(tmp_path, rng):
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = dense(0.5)
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    report = export.export_saved_model(model, tmp_path / "model")
    assert report.logit_tolerance >= 5e-2
    assert {variable.dtype for variable in report.variables} == {"float32"}
    assert report.outputs[0].dtype == "bfloat16"
    x = rng.random((2, 4), np.float32)
    logits = export.load_saved_model(tmp_path / "model")(x)
    assert logits.dtype == tf.float32
    np.testing.assert_allclose(logits, tf.cast(model(x), tf.float32), rtol=2e-2, atol=2e-2)


def test_a_model_made_under_a_distribution_strategy(tmp_path, rng):
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = masked()
        with pytest.raises(RuntimeError, match=r"outside of strategy\.scope"):
            export.export_saved_model(model, tmp_path / "model")
    x = rng.random((8, 4), np.float32)
    report = export.export_saved_model(model, tmp_path / "model", expected_sparsity=0.5)
    assert [row.zeros for row in report.kernels] == [12, 9]
    served = export.load_saved_model(tmp_path / "model")
    np.testing.assert_allclose(served(x), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6)


def test_any_number_of_examples_whatever_the_first_batch_was(tmp_path, rng):
    model = tf_keras.Sequential([layers.Dense(3)])
    model(np.ones((2, 4)))
    report = export.export_saved_model(model, tmp_path / "model")
    assert report.inputs[0].shape == (None, 4)
    assert export.load_saved_model(tmp_path / "model")(rng.random((7, 4))).shape == (7, 3)


@pytest.mark.parametrize(("name", "keyword"), [("my-input", "my_input"), ("in", "in_")])
def test_names_that_no_argument_can_have(tmp_path, name, keyword):
    image = layers.Input((4,), name=name)
    model = tf_keras.Model(image, layers.Dense(3)(image))
    assert export.export_saved_model(model, tmp_path / "model").inputs[0].name == keyword


def test_the_tolerance_follows_the_largest_value_of_each_output():
    model = dense()
    assert _probe.tolerance(model, float32=1e-4) == 1e-4
    small, large = np.array([0.5]), np.array([3.0, -20.0])
    assert (_probe.scale(small), _probe.scale(large)) == (1.0, 20.0)
    # That of the output that differs most, relative to its scale.
    found = [small + 0.25, large + 4.0]
    assert _probe.deviation([small, large], found) == (0.25, 1.0)
    assert _probe.deviation([large, small], [large + 6.0, small + 0.25]) == (6.0, 20.0)
    assert _probe.deviation([np.zeros((2, 3))], [np.zeros((2, 1))])[0] == np.inf


# Loading


def test_a_served_model_computes_what_the_model_computes(exported, images):
    model, folder, report = exported
    served = export.load_saved_model(str(folder))
    assert served.report == report
    assert set(served.signatures) == {"serve", "serving_default"}
    assert repr(served) == f"ServedModel({str(folder)!r}, sparsity=0.9001)"
    expected = model(images, training=False)
    for x in (images, tf.constant(images), images.astype(np.float64), images.tolist()):
        logits = served(x)
        assert isinstance(logits, tf.Tensor)
        assert logits.dtype == tf.float32
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_a_served_model(exported, images):
    model, folder, _ = exported
    served = export.load_saved_model(folder)

    def gradient(function, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(function(x) ** 2)
        return tape.gradient(loss, x)

    x = tf.constant(images)
    expected = gradient(lambda x: model(x, training=False), x)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(gradient(served, x), expected, rtol=1e-4, atol=1e-6)
    compiled = tf.function(lambda x: gradient(served, x))
    np.testing.assert_allclose(compiled(x), expected, rtol=1e-4, atol=1e-6)


def test_a_served_model_is_attacked_like_the_model(exported, images):
    model, folder, _ = exported
    attack = attacks.FGSM(epsilon=8 / 255)
    x_adv = attack(export.load_saved_model(folder), images, np.arange(6) % 5)
    assert 0 < np.abs(x_adv - images).max() <= 8 / 255 + 1e-6
    np.testing.assert_allclose(x_adv, attack(model, images, np.arange(6) % 5), atol=1e-6)


def test_a_moved_export_has_its_new_path(exported, copy):
    report = export.load_saved_model(copy).report
    assert report == dataclasses.replace(exported[2], path=str(copy))


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip(f / VARIABLES), rf"{VARIABLES} has different content"),
        (lambda f: flip(f / "saved_model.pb"), r"saved_model\.pb has different content"),
        (lambda f: os.truncate(f / VARIABLES, 99), rf"{VARIABLES} has 99 bytes, recorded as"),
        (lambda f: (f / "variables/variables.index").unlink(), r"variables\.index is missing"),
        (lambda f: (f / manifest.NAME).unlink(), r"has no tscnc_manifest\.json"),
        (lambda f: os.truncate(f / manifest.NAME, 99), "is damaged, it is not JSON"),
        (lambda f: (f / manifest.NAME).write_bytes(b"\xff"), "is damaged, it is not JSON"),
        (lambda f: (f / manifest.NAME).write_text("[1]"), "is damaged, it is not a manifest"),
    ],
    ids=["variables", "graph", "truncated", "index", "no manifest", "cut", "binary", "list"],
)
def test_damage_is_found_on_loading(copy, damage, message):
    damage(copy)
    with pytest.raises(ValueError, match=message):
        export.load_saved_model(copy)


@pytest.mark.parametrize("key", ["max_logit_difference", "versions", "kernels", "files", "sha256"])
def test_a_changed_manifest_is_found_on_loading(copy, key):
    content = read(copy)
    del content[key]
    (copy / manifest.NAME).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="was changed after the export"):
        export.load_saved_model(copy)


def test_an_export_made_before_sparse_sizes_were_counted_is_read(copy):
    content = read(copy)
    assert content.pop("ideal_sparse_bytes") > 0
    reseal(copy, content)
    report = export.load_saved_model(copy).report
    assert report.ideal_sparse_bytes is None
    assert "ideal" not in str(report)
    assert f"gzipped {report.gzip_bytes / 1024:.1f} KiB." in str(report)


def test_a_manifest_of_another_format(copy):
    reseal(copy, {**read(copy), "format": 2})
    with pytest.raises(ValueError, match="format 2, and this version of tscnc_tf reads format 1"):
        export.load_saved_model(copy)


def test_variables_are_counted_even_if_all_digests_are_right(copy):
    content = read(copy)
    content["variables"][0]["zeros"] += 1
    content["variables"][1]["shape"] = [7]
    del content["variables"][-1]
    reseal(copy, content)
    with pytest.raises(ValueError, match="differ from its manifest") as error:
        export.load_saved_model(copy)
    for text in (
        "conv/kernel:0 has zeros 65, recorded as 66",
        "conv/bias:0 has shape (8,), recorded as (7,)",
        "there are 10 variables, 9 are recorded",
    ):
        assert text in str(error.value)


def test_variables_that_are_not_finite_are_found_even_if_all_digests_are_right(exported, tmp_path):
    model = dense()
    folder = tmp_path / "model"
    export.export_saved_model(model, folder)
    model.layers[0].bias.assign(np.full(6, np.nan))
    content = read(folder)
    shutil.rmtree(folder)
    model.export(str(folder))
    content["files"] = manifest.file_facts(folder)
    content["variables"][1]["zeros"] = 0
    reseal(folder, content)
    with pytest.raises(ValueError, match="first/bias:0 holds NaN or infinity"):
        export.load_saved_model(folder)


def test_extra_files_do_no_harm(copy):
    (copy / "README").write_text("mine")
    export.load_saved_model(copy)


def test_there_is_nothing_to_load(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path must be a folder .*nowhere"):
        export.load_saved_model(tmp_path / "nowhere")
    assert names(tmp_path) == []
