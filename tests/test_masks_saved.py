"""Masks, step and schedule travel with the model; nothing of them reaches who did not ask."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import FLAVOURS, conv_model, dense_model, fresh_process, images

import tscnc_tf
from tscnc_tf import export, pruning, schedules
from tscnc_tf._keras import masks as masking
from tscnc_tf.pruning import NM, Block, Filters, Unstructured


@pytest.fixture(params=FLAVOURS)
def library(request):
    return FLAVOURS[request.param]


def loss(library):
    return library.losses.SparseCategoricalCrossentropy(from_logits=True)


@tf_keras.saving.register_keras_serializable("tests")
@keras.saving.register_keras_serializable("tests")
def stairs(step):
    """A schedule of one's own."""
    step = tf.cast(step, tf.int32)
    return tf.equal(step % 2, 0), tf.minimum(0.1 * tf.cast(step, tf.float32), 0.8)


@tf_keras.saving.register_keras_serializable("tests")
@keras.saving.register_keras_serializable("tests")
def square(weight):
    """A criterion of one's own."""
    return tf.square(weight)


def half_trained(library, schedule=None, **options):
    model = conv_model(library)
    schedule = schedule or schedules.CosineSparsity(0.0, 0.75, 1, 6, frequency=1)
    model = pruning.prune(model, schedule, engine="masks", **options)
    model.compile(library.optimizers.Adam(0.01), loss(library), jit_compile=False)
    model.fit(*images(64), batch_size=16, verbose=0, shuffle=False)
    return model


def masks(model):
    return [mask.numpy() for mask in model.pruner.state.masks]


def assert_alike(model, other):
    assert model.pruner.steps == other.pruner.steps == 4
    for mine, theirs in zip(masks(model), masks(other), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert any(not mask.all() for mask in masks(model))
    for mine, theirs in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    # and both go on alike
    for each in (model, other):
        each.fit(*images(64), batch_size=16, verbose=0, shuffle=False)
    for mine, theirs in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_keras_file_brings_everything_back(library, tmp_path):
    model = half_trained(library)
    model.save(tmp_path / "model.keras")
    other = library.models.load_model(tmp_path / "model.keras")
    assert repr(other.pruner) == repr(model.pruner)
    assert isinstance(other, type(model).__mro__[2])
    assert_alike(model, other)


@pytest.mark.parametrize("kind", ["weights", "checkpoint"])
def test_weight_files_and_checkpoints_hold_the_masks(kind, library, tmp_path):
    model, other = half_trained(library), half_trained(library)
    other.pruner.finalize()
    path = str(tmp_path / "model.weights.h5")
    if kind == "weights":
        model.save_weights(path)
        other.load_weights(path)
    else:
        path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(path)
        status = tf.train.Checkpoint(model=other, optimizer=other.optimizer).restore(path)
        status.assert_existing_objects_matched()
    assert not other.pruner.frozen
    assert_alike(model, other)


@pytest.mark.parametrize(
    "options",
    [
        {"structure": NM(2, 4), "schedule": schedules.OneShot(0.5)},
        {"structure": Block(3, 2), "scope": "global"},
        {"structure": Filters(), "scope": "erk", "min_weights": 2},
        {"structure": Unstructured(1), "scope": {"conv": 0.5}, "layers": "conv"},
        {"criterion": square, "schedule": stairs},
        {"schedule": schedules.ConditionGated(schedules.OneShot(0.5), 100.0)},
    ],
    ids=["n of m", "blocks", "filters", "ratios", "own functions", "gated"],
)
def test_every_setting_survives_saving(options, library, tmp_path):
    model = pruning.add_regularizers(conv_model(library), tscnc_tf.regularizers.TSCNC(1e-4, 1e-2))
    options = {"schedule": schedules.CosineSparsity(0.0, 0.75, 1, 6)} | options
    model = pruning.prune(model, options.pop("schedule"), engine="masks", **options)
    model.save(tmp_path / "model.keras")
    other = library.models.load_model(tmp_path / "model.keras")
    assert repr(other.pruner) == repr(model.pruner)
    assert [t.name for t in other.pruner.targets] == [t.name for t in model.pruner.targets]
    for each in (model, other):
        each.pruner.finalize()
    for mine, theirs in zip(masks(model), masks(other), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_tfmots_own_schedules_survive_saving(library, tmp_path):
    from tscnc_tf import _keras

    schedule = _keras.tfmot().sparsity.keras.PolynomialDecay(0.1, 0.7, 2, 8, frequency=2)
    model = pruning.prune(dense_model(library), schedule, engine="masks")
    assert model.pruner.target_sparsity == 0.7
    model.save(tmp_path / "model.keras")
    other = library.models.load_model(tmp_path / "model.keras").pruner.schedule
    assert type(other) is type(schedule)
    for step in (1, 2, 5, 8, 9):
        assert [float(v) for v in other(step)] == [float(v) for v in schedule(step)]


LOAD = """
import importlib, sys
import numpy as np
for name in sys.argv[2:]:
    model = importlib.import_module(name).models.load_model(f"{sys.argv[1]}/{name}-stripped.keras")
    print(model.count_params())
assert "tscnc_tf" not in sys.modules
import tscnc_tf as tscnc
for name in sys.argv[2:]:
    library = importlib.import_module(name)
    model = library.models.load_model(f"{sys.argv[1]}/{name}.keras")
    print(type(model).__name__, model.pruner.steps, model.pruner.frozen)
    np.savez(f"{sys.argv[1]}/{name}.npz", *[mask.numpy() for mask in model.pruner.state.masks])
"""


@pytest.fixture(scope="module")
def afresh(tmp_path_factory):
    """Half-trained models, parameters of stripped ones, and what a fresh process finds of both."""
    folder, models, counts = tmp_path_factory.mktemp("afresh"), {}, []
    for name, library in FLAVOURS.items():
        models[name] = half_trained(library)
        models[name].save(folder / f"{name}.keras")
        stripped = pruning.prune(conv_model(library), schedules.OneShot(0.5), engine="masks")
        stripped.pruner.finalize()
        stripped = pruning.strip(stripped)
        stripped.save(folder / f"{name}-stripped.keras")
        counts.append(stripped.count_params())
    return folder, models, counts, fresh_process(LOAD, folder, *models).splitlines()


def test_a_fresh_process_needs_nothing_but_the_import(afresh):
    folder, models, _, lines = afresh
    assert lines[2:] == ["MaskedFunctional 4 False"] * 2
    for name, model in models.items():
        with np.load(folder / f"{name}.npz") as found:
            for mine, theirs in zip(masks(model), found.values(), strict=True):
                np.testing.assert_array_equal(mine, theirs)


TRAIN = """
import importlib, os, sys
import numpy as np
import tscnc_tf as tscnc


def train(flavour, folder, end, reach=None):
    library = importlib.import_module(flavour)
    library.backend.clear_session()
    library.utils.set_random_seed(0)
    layers = library.layers
    inputs = library.Input((6,))
    outputs = layers.Dense(3)(layers.Dense(8, activation="relu")(inputs))
    model = library.Model(inputs, outputs)
    tscnc.prune(model, tscnc.schedules.CosineSparsity(0.0, 0.75, 1, 30, 1), engine="masks")
    model.compile(library.optimizers.Adam(0.01),
                  library.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)

    class Reach(library.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if reach is not None and model.optimizer.iterations == 21:
                reach()

    rng = np.random.default_rng(0)
    x, y = rng.uniform(size=(64, 6)).astype("float32"), rng.integers(0, 3, 64)
    if os.path.exists(folder + "/last.keras"):
        model = library.models.load_model(folder + "/last.keras")
    done = int(model.optimizer.iterations) // 8
    keep = library.callbacks.ModelCheckpoint(folder + "/last.keras")
    model.fit(x, y, batch_size=8, epochs=5, initial_epoch=done, shuffle=False, verbose=0,
              callbacks=[Reach(), *tscnc.callbacks.pruning_callbacks(), keep])
    np.savez(end, *model.get_weights(), *[mask.numpy() for mask in model.pruner.state.masks])


def run(flavour, name, reach=None):
    folder = f"{sys.argv[1]}/{flavour}-{name}"
    os.makedirs(folder, exist_ok=True)
    train(flavour, folder, folder + ".npz", reach)


if sys.argv[2] == "killed":
    # One within a step of the other, so that the end of the process is in the middle of both.
    run("tf_keras", "killed", lambda: run("keras", "killed", lambda: os._exit(3)))
else:
    for flavour in ("tf_keras", "keras"):
        run(flavour, "whole")
        run(flavour, "killed")
"""


def test_training_that_was_killed_goes_on_bit_for_bit(tmp_path):
    """Killed in the middle of the third epoch, and begun again in a process of its own."""

    def train(how):
        done = subprocess.run(
            [sys.executable, "-c", TRAIN, str(tmp_path), how],
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode in (0, 3), done.stderr[-3000:]
        return done.returncode

    assert train("killed") == 3
    for flavour in FLAVOURS:
        assert (tmp_path / f"{flavour}-killed" / "last.keras").exists()
        assert not (tmp_path / f"{flavour}-killed.npz").exists()
    assert train("again") == 0
    for flavour in FLAVOURS:
        paths = [tmp_path / f"{flavour}-{name}.npz" for name in ("whole", "killed")]
        with np.load(paths[0]) as one, np.load(paths[1]) as other:
            for mine, theirs in zip(one.values(), other.values(), strict=True):
                np.testing.assert_array_equal(mine, theirs)


@tf_keras.saving.register_keras_serializable("tests")
class TfKerasNet(tf_keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden, self.last = (tf_keras.layers.Dense(n, name=f"d{n}") for n in (5, 3))

    def call(self, inputs):
        return self.last(self.hidden(inputs))

    def get_config(self):
        return {"name": self.name}


@keras.saving.register_keras_serializable("tests")
class KerasNet(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden, self.last = (keras.layers.Dense(n, name=f"d{n}") for n in (5, 3))

    def call(self, inputs):
        return self.last(self.hidden(inputs))

    def get_config(self):
        return {"name": self.name}


def test_subclassed_models_come_back_with_their_masks(library, tmp_path):
    model = KerasNet() if library is keras else TfKerasNet()
    x = np.ones((2, 4), "float32")
    model(x)
    pruning.prune_now(model, 0.5)
    model.save(tmp_path / "net.keras")
    other = library.models.load_model(tmp_path / "net.keras")
    assert isinstance(other, KerasNet | TfKerasNet)
    assert other.pruner.frozen
    np.testing.assert_array_equal(model(x), other(x))
    for mine, theirs in zip(masks(model), masks(other), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_pruned_part_comes_back_in_its_whole_and_a_clone_is_plain(library, tmp_path):
    first, inputs = library.Input((6,)), library.Input((6,))
    layers = library.layers
    inner = library.Model(first, layers.Dense(4)(layers.Dense(8)(first)))
    pruning.prune_now(inner, 0.5)
    model = library.Model(inputs, layers.Dense(2)(inner(inputs)))
    model.save(tmp_path / "whole.keras")
    other = library.models.load_model(tmp_path / "whole.keras")
    assert [row.sparsity for row in pruning.report(other).pruned] == [0.5, 0.5]
    clone = library.models.clone_model(inner)
    assert not hasattr(clone, "pruner")
    assert all(weight.constraint is None for weight in clone.weights)


def test_a_deep_copy_of_a_pruned_layer_is_plain(library):
    model = pruning.prune_now(dense_model(library), 0.5)
    layer = copy.deepcopy(model.layers[-1])
    twin = library.Sequential([library.Input((8,)), layer])
    if library is tf_keras:  # Keras 3 copies the configuration alone
        twin.set_weights(model.layers[-1].get_weights())
        assert np.count_nonzero(twin.get_weights()[0] == 0.0) == 12
    twin.compile("sgd", "mse")
    twin.fit(np.ones((4, 8)), np.ones((4, 3)), verbose=0)
    assert not np.any(twin.get_weights()[0] == 0.0)
    assert np.count_nonzero(model.get_weights()[2] == 0.0) == 12
    assert not [row for row in pruning.report(twin).rows if row.pruned]
    pruning.prune(twin, method="scores", sparsity=0.75)  # refuses layers with constraints
    pruning.strip(twin)
    assert not any(masking.own_constraint(weight) for weight in twin.weights)


def test_a_stripped_model_is_as_if_it_had_never_been_pruned(afresh):
    _, _, stripped, lines = afresh
    for library, count in zip(FLAVOURS.values(), stripped, strict=True):
        model = conv_model(library)
        plain, weights = type(model), len(model.weights)
        half_way = pruning.prune(model, schedules.OneShot(0.5), engine="masks")
        half_way.pruner.finalize()
        model = pruning.strip(half_way)
        assert type(model) is plain
        assert len(model.weights) == weights
        assert not hasattr(model, "pruner")
        assert model.count_params() == count
    assert [int(line) for line in lines[:2]] == stripped  # without this package


def test_other_formats_have_no_place_for_masks_and_say_so(library, tmp_path):
    model = pruning.prune_now(dense_model(library), 0.5)
    for name in ("model.h5", "folder"):
        with pytest.raises(ValueError, match=r"must end in \.keras.*Strip the model first"):
            model.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def assert_saved_with_masks(model, inner, library, tmp_path):
    """The `.keras` format holds a model and the pruner of its part, whatever was refused before."""
    x = np.linspace(-1, 1, 12, dtype="float32").reshape(2, 6)
    for name, each in {"model": model, "inner": inner}.items():
        each.save(tmp_path / f"{name}.keras")
        loaded = library.models.load_model(tmp_path / f"{name}.keras")
        np.testing.assert_array_equal(loaded(x), each(x))
        part = loaded if each is inner else loaded.layers[-1]
        assert part.pruner.frozen and len(part.pruner.masked_variables()) == 2


def test_a_part_that_a_legacy_file_was_written_of_is_saved_with_its_masks(library, tmp_path):
    inner, inputs = dense_model(library), library.Input((6,))
    model = library.Model(inputs, inner(inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the format is an old one
        library.models.save_model(model, tmp_path / "model.h5")
    pruning.prune_now(inner, 0.5)
    assert_saved_with_masks(model, inner, library, tmp_path)


@pytest.mark.parametrize("outer", ["sequential", "functional"])
def test_the_legacy_format_refuses_a_pruned_part(outer, library, tmp_path):
    inner, inputs = pruning.prune_now(dense_model(library), 0.5), library.Input((6,))
    is_functional = outer == "functional"
    model = (
        library.Model(inputs, inner(inputs))
        if is_functional
        else library.Sequential([inputs, inner])
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the format is an old one
        with pytest.raises(
            (ValueError, NotImplementedError), match=r"legacy \.h5 .* no place for its masks"
        ):
            library.models.save_model(model, tmp_path / "model.h5")
    assert_saved_with_masks(model, inner, library, tmp_path)
    if not is_functional and library is tf_keras:  # whose SavedModels hold no masks
        model.save(tmp_path / "folder", save_format="tf")
        loaded = tf_keras.models.load_model(tmp_path / "folder")
        x = np.ones((2, 6), "float32")
        np.testing.assert_allclose(loaded(x), model(x), rtol=1e-6)


def test_what_has_no_name_can_not_be_saved_and_says_so(library, tmp_path):
    model = dense_model(library)
    pruning.prune(model, lambda step: (step > 3, 0.5), engine="masks")
    with pytest.raises(ValueError, match="a lambda has no name: write it as a function"):
        model.save(tmp_path / "model.keras")


def test_a_saved_model_holds_no_masks(library, tmp_path):
    model = half_trained(library)
    model.pruner.finalize()
    x = images(4)[0]
    report = export.export_saved_model(model, tmp_path / "folder", expected_sparsity=0.7)
    assert model.pruner.steps == 4, "the model keeps its pruner"
    assert report.sparsity == pytest.approx(0.75, abs=0.01)
    loaded = tf.saved_model.load(str(tmp_path / "folder"))
    assert len(loaded.variables) == len(model.weights)
    reachable = tf.train.TrackableView(loaded).descendants()
    assert not [v for v in reachable if isinstance(v, tf.Variable) and v.dtype == tf.bool]
    np.testing.assert_allclose(loaded.serve(x), model(x, training=False), atol=1e-6)


WITHOUT = """
import sys
sys.modules["tensorflow_model_optimization"] = None  # as if it were not installed
import keras, numpy as np, tf_keras
import tscnc_tf as tscnc
for library in (keras, tf_keras):
    inputs = library.Input((6,))
    model = library.Model(inputs, library.layers.Dense(3)(inputs))
    schedule = tscnc.schedules.ConditionGated(tscnc.schedules.CosineSparsity(0, 0.5, 1, 4, 1), 1e9)
    model = tscnc.prune(model, schedule, engine="masks")
    trainer = tscnc.AdversarialTraining(
        model, attack=tscnc.attacks.PGD(epsilon=0.1, steps=1), loss=tscnc.losses.Madry())
    trainer.compile("sgd")
    x, y = np.full((32, 6), 0.5, "float32"), np.zeros(32, "int32")
    trainer.fit(x, y, batch_size=8, verbose=0, callbacks=tscnc.callbacks.pruning_callbacks())
    print(tscnc.inspection.sparsity(model).sparsity)
    trainer.save(sys.argv[1] + "/t.keras")
    print(library.models.load_model(sys.argv[1] + "/t.keras").model.pruner.schedule == schedule)
    print(tscnc.pruning.report(tscnc.strip(model)).sparsity)
try:
    tscnc.prune(model, tscnc.schedules.OneShot(0.5))
except ImportError as error:
    print(error)
"""


def test_everything_but_tfmots_wrappers_works_without_tfmot(tmp_path):
    printed = fresh_process(WITHOUT, tmp_path)
    assert printed.splitlines()[:6] == ["0.5", "True", "0.0"] * 2
    assert "pip install tensorflow-model-optimization" in printed
    assert 'engine="masks"' in printed


UNTOUCHED = """
import os, sys
if sys.argv[1] == "keras":
    import keras
import tensorflow as tf
before = dict(os.environ)
if sys.argv[1] == "tscnc_tf":
    import tscnc_tf as tscnc
    import keras
import tscnc_tf as tscnc
import numpy as np
assert keras.config.backend() == "tensorflow"
names, policy = set(dir(keras)), keras.config.dtype_policy().name
model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
model = tscnc.pruning.add_regularizers(model, tscnc.regularizers.TSCNC(1e-4, 1e-2))
model = tscnc.prune(model, tscnc.schedules.CosineSparsity(0.0, 0.5, 1, 4, 1))
trainer = tscnc.AdversarialTraining(
    model, attack=tscnc.attacks.PGD(epsilon=0.1, steps=1), loss=tscnc.losses.TRADES())
trainer.compile("sgd")
x, y = np.full((32, 6), 0.5, "float32"), np.zeros(32, "int32")
trainer.fit(x, y, batch_size=8, verbose=0, callbacks=tscnc.callbacks.pruning_callbacks())
attack = tscnc.attacks.PGD(epsilon=0.1, steps=1)
tscnc.evaluate_robustness(model, x, y, attack, progress=False)
tscnc.export_saved_model(model, sys.argv[2] + "/out")
changed = {k: v for k, v in os.environ.items() if before.get(k) != v}
assert not changed and set(before) <= set(os.environ), changed
assert set(dir(keras)) >= names and keras.config.dtype_policy().name == policy
assert tf.keras.layers.Dense is keras.layers.Dense, "tf.keras is Keras 3, as it was"
assert type(tscnc.strip(model)) is keras.Sequential
print("untouched")
"""


@pytest.mark.parametrize("first", ["keras", "tscnc_tf"])
def test_a_user_of_keras_3_sees_no_side_effects(first, tmp_path):
    assert fresh_process(UNTOUCHED, first, tmp_path).split()[-1] == "untouched"
