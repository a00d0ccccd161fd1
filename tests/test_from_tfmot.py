"""What users of tensorflow-model-optimization miss or complain of; and docs/from-tfmot.md runs.

The numbers are those of its issues (and pull requests, PR) on GitHub. What is checked elsewhere is
not repeated here:

* layers of all kinds, exact counts, ties, every way to run `fit`, freezing: test_pruner.py
* settings and masks that survive saving, training that was killed and goes on, other folders and
  processes (#456, #603): test_masks_saved.py
* checkpoints and averages in `AdversarialTraining`, layers that it calls twice: test_training.py
* networks of `keras.applications`, as in #864 and #1172: test_keras3_models.py
* layers that tfmot's own wrappers can't prune, and what they don't save: test_pruning.py
* the figures of the sizes, of the speed check and of compaction one by one:
  test_speed_and_sizes.py, test_compaction.py
* sparse LiteRT files: what they hold, and that they are run: test_sparse_litert.py,
  test_sparse_inference.py
"""

from __future__ import annotations

import gzip
import pathlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import FLAVOURS, blobs, dense_model, fresh_process, images, python_blocks

import tscnc_tf as tscnc
from tscnc_tf import _keras, _timing
from tscnc_tf.pruning import NM, Block, Filters

DOCUMENT = pathlib.Path(__file__).parent.parent / "docs" / "from-tfmot.md"
RISING = tscnc.schedules.CosineSparsity(0.0, 0.75, 0, 6, frequency=1)


@pytest.fixture(params=FLAVOURS)
def library(request):
    return FLAVOURS[request.param]


def loss(library):
    return library.losses.SparseCategoricalCrossentropy(from_logits=True)


def prune(model, schedule=RISING, **options):
    return tscnc.prune(model, schedule, engine="masks", **options)


def fit(library, model, data, *more, optimizer=None, epochs=2):
    """Train in steps of 16 as a user does: the model compiled after pruning, in plain `fit`."""
    optimizer = optimizer or library.optimizers.Adam(0.01)
    model.compile(optimizer, loss(library), jit_compile=False)
    used = [*more, *tscnc.callbacks.pruning_callbacks()]
    model.fit(*data, batch_size=16, epochs=epochs, verbose=0, callbacks=used)
    return model


def kernels(model):
    """The values of all weights of rank 2 or more."""
    return [weight for weight in model.get_weights() if weight.ndim >= 2]


def zeros(model):
    return [int(np.sum(kernel == 0)) for kernel in kernels(model)]


def after_every_batch(library, look):
    """A callback that calls `look(model)` after each batch."""

    class Look(library.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            look(self.model)

    return Look()


# Which models are taken


def subclassed(library):
    class Twice(library.layers.Layer):
        """A layer made of layers (#638), kept in a list."""

        def __init__(self):
            super().__init__()
            self.parts = [library.layers.Dense(8, activation="relu") for _ in range(2)]

        def call(self, inputs):
            for part in self.parts:
                inputs = part(inputs)
            return inputs

    class Net(library.Model):
        def __init__(self):
            super().__init__()
            self.stem = library.layers.Conv2D(8, 3, activation="relu")
            self.flatten = library.layers.Flatten()
            self.twice = Twice()
            self.logits = library.layers.Dense(3)

        @tf.function
        def call(self, inputs, training=False):
            return self.logits(self.twice(self.flatten(self.stem(inputs))))

    model = Net()
    model(np.zeros((1, 8, 8, 1), "float32"))
    return model


def test_subclassed_models_are_pruned_and_stripped(library):
    """#155, #965: for these tfmot has neither. #1119: those of Keras 3 as well."""
    schedule = _keras.tfmot().sparsity.keras.PolynomialDecay(0.0, 0.75, 0, 6, frequency=2)
    model = subclassed(library)
    plain, sizes, count = type(model), [k.size for k in kernels(model)], model.count_params()
    engine = None if library is keras else "masks"
    model = fit(library, tscnc.prune(model, schedule, engine=engine), images(48))
    before = model(images(4)[0]).numpy()
    assert zeros(model) == [round(0.75 * size) for size in sizes]
    model = tscnc.strip(model)
    assert type(model) is plain
    assert model.count_params() == count
    assert zeros(model) == [round(0.75 * size) for size in sizes]
    np.testing.assert_array_equal(model(images(4)[0]), before)


BESIDE_TFMOT = """
import tensorflow_model_optimization as tfmot
import keras, numpy as np, tensorflow as tf
import tscnc_tf as tscnc
schedule = tfmot.sparsity.keras.PolynomialDecay(0.0, 0.5, begin_step=0, end_step=2, frequency=2)
layers = keras.layers
model = keras.Sequential([
    keras.Input((8, 8, 1)),
    layers.Conv2D(8, 3, activation="relu"), layers.MaxPooling2D(), layers.Conv2D(8, 3),
    layers.Flatten(), layers.Dense(3),
])
model = tscnc.prune(model, schedule)
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
model.fit(np.ones((8, 8, 8, 1)), np.zeros(8), batch_size=4, verbose=0,
          callbacks=tscnc.callbacks.pruning_callbacks())
legacy = tf.keras.Sequential([tf.keras.layers.Dense(4, input_shape=(6,))])
for model in (model, tscnc.prune_now(legacy, 0.5)):
    print([float((weight == 0).mean()) for weight in tscnc.strip(model).get_weights()[::2]])
"""


def test_a_script_that_imports_tfmot_first_prunes_models_of_keras_3():
    """#1119, #1141, #1167, #1172: "can only prune ... You passed an object of type: Sequential".

    In such a script `tf.keras` is not `keras`; models of both are pruned.
    """
    lines = fresh_process(BESIDE_TFMOT).splitlines()
    assert lines == ["[0.5, 0.5, 0.5]", "[0.5]"]


def test_a_backbone_inside_a_model_is_pruned_as_the_whole_is_trained(library):
    """#155, #656: all went through, and "no change at all to the sparsity" in the nested model."""
    layers = library.layers
    x = first = library.Input((8, 8, 1))
    x = layers.BatchNormalization()(layers.Conv2D(8, 3)(x))
    backbone = library.Model(first, layers.Conv2D(8, 3)(layers.ReLU()(x)), name="backbone")
    head = library.Sequential([layers.GlobalAveragePooling2D(), layers.Dense(3)], name="head")
    inputs = library.Input((8, 8, 1))
    model = prune(library.Model(inputs, head(backbone(inputs))))
    assert len(tscnc.pruning.report(model).pruned) == 3
    model = tscnc.strip(fit(library, model, images(48)))
    assert zeros(model) == [54, 432, 18]
    assert zeros(model.get_layer("backbone")) == [54, 432]


def test_one_layer_of_a_subclassed_model_is_pruned_where_it_is(library):
    """#662: wrapping one layer of a subclassed model ended in an error when it was trained."""
    model = subclassed(library)
    stem = model.stem
    model = prune(model, tscnc.schedules.OneShot(0.75), layers=model.stem)
    model(images(4)[0], training=True)
    model.pruner.step()
    assert model.stem is stem
    assert zeros(model) == [54, 0, 0, 0]


def test_a_layer_that_is_not_known_does_not_abort_all(library):
    """#165, #864, #1051: Rescaling, normalisation, an operation or your own layer did."""

    class Table(library.layers.Layer):
        """Holds integers, and a weight that is neither matrix nor kernel."""

        def build(self, input_shape):
            shape = (2, input_shape[-1])
            options = {"initializer": "ones", "trainable": False}
            self.codes = self.add_weight(name="codes", shape=shape, dtype="int32", **options)
            self.scale = self.add_weight(name="scale", shape=shape[1:], initializer="ones")

        def call(self, inputs):
            return inputs * self.scale

    layers = library.layers
    x = inputs = library.Input((8, 8, 1))
    x = layers.Rescaling(2.0, -1.0)(x)
    x = layers.Conv2D(8, 3, name="conv")(x)
    x = Table(name="table")(layers.BatchNormalization()(x))
    x = layers.GroupNormalization(4)(x + 1.0)
    x = layers.UnitNormalization()(layers.GlobalAveragePooling2D()(x))
    model = library.Model(inputs, layers.Dense(3, name="logits")(x))
    model = prune(model, tscnc.schedules.OneShot(0.75))
    model.pruner.step()
    report = tscnc.pruning.report(model)
    assert [(row.name, row.sparsity) for row in report.pruned] == [("conv", 0.75), ("logits", 0.75)]
    (skipped,) = report.skipped
    assert skipped.name == "table"
    assert "trainable=False" in skipped.reason


# Training loops and steps


def test_a_loop_of_your_own_needs_one_line(library):
    """#271, #387, #590: `model.optimizer = ...`, `set_model`, two callbacks and a dummy argument.

    And where a line of that was forgotten, nothing was pruned. The model is the one of #590:
    subclassed, its call a `tf.function`.
    """
    model = subclassed(library)
    sizes = [kernel.size for kernel in kernels(model)]
    optimizer = library.optimizers.Adam(0.01)
    optimizer.build(model.trainable_variables)
    pruner = tscnc.pruning.Pruner(model, RISING)
    of_batch = loss(library)

    @tf.function  # the document has the same loop without it
    def train_step(x, y):
        with tf.GradientTape() as tape:
            value = of_batch(y, model(x, training=True))
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        pruner.step(optimizer)
        return value

    x, y = images(96)
    values = []
    for step in range(1, 9):
        rows = slice(16 * (step % 6), 16 * (step % 6) + 16)
        values.append(float(train_step(x[rows], y[rows])))
        sparsity = float(RISING(min(step, 6))[1])
        assert zeros(model) == [size - round(size * (1 - sparsity)) for size in sizes]
    assert pruner.steps == 8
    assert np.isfinite(values).all()


def test_siamese_networks_count_steps_and_not_calls():
    """#270: weights that are used twice in a step; the counter ran twice as fast, or crashed."""
    library = tf_keras
    first = library.Input((6,))
    base = library.Model(first, library.layers.Dense(8, name="shared")(first))
    left, right = library.Input((6,)), library.Input((6,))
    distance = library.layers.Subtract()([base(left), base(right)])
    model = library.Model([left, right], library.layers.Dense(3)(distance))
    model = prune(model, tscnc.schedules.OneShot(0.5, begin_step=4))
    (x, y), seen = blobs(96), []
    look = after_every_batch(library, lambda model: seen.append(zeros(model)))
    fit(library, model, ([x, x[::-1].copy()], y), look, epochs=1)
    assert model.pruner.steps == 6
    assert seen == [[0, 0]] * 3 + [[24, 12]] * 3


@pytest.mark.parametrize(("flavour", "batch_size"), [("keras", 4), ("tf_keras", 64)])
def test_a_run_shorter_than_the_schedule_is_told_of_and_can_be_finished(flavour, batch_size):
    """#975, #973: "weights not updated to 0" with few images, or with large batches.

    A run of fewer than 100 steps ends before `ConstantSparsity` is asked for the first time.
    """
    library, (x, y) = FLAVOURS[flavour], blobs(64)
    schedule = _keras.tfmot().sparsity.keras.ConstantSparsity(0.75, begin_step=0)
    model = prune(dense_model(library), schedule)
    model.compile("adam", loss(library), jit_compile=False)
    steps = 2 * 64 // batch_size
    with pytest.warns(UserWarning, match=rf"sparsity of 0.75 in .* steps 1 to {steps}: .*finalize"):
        model.fit(
            *(x, y, batch_size),
            epochs=2,
            verbose=0,
            callbacks=tscnc.callbacks.pruning_callbacks(),
        )
    assert zeros(model) == [0, 0]
    model.pruner.finalize()
    assert zeros(model) == [36, 18]


# What keeps zeros zero


@pytest.mark.parametrize("ending", ["weights.h5", "keras"])
def test_a_checkpoint_of_any_batch_is_sparse(ending, tmp_path):
    """#206: the callback wrote between the optimizer's step and the masks. Here it comes first."""
    library = tf_keras if ending == "keras" else keras
    sizes = [kernel.size for kernel in kernels(dense_model(library))]
    checkpoint = library.callbacks.ModelCheckpoint(
        str(tmp_path / f"{{batch}}.{ending}"),
        save_freq=1,
        save_weights_only=ending == "weights.h5",
    )
    schedule = tscnc.schedules.CosineSparsity(0.0, 0.75, 0, 3, frequency=1)
    fit(library, prune(dense_model(library), schedule), blobs(48), checkpoint, epochs=1)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    for step, file in enumerate(files, start=1):
        if ending == "keras":
            loaded = tscnc.strip(library.models.load_model(file))
        else:  # a model without masks reads it too
            loaded = dense_model(library)
            loaded.load_weights(file)
        sparsity = float(schedule(step)[1])
        assert zeros(loaded) == [size - round(size * (1 - sparsity)) for size in sizes]


def test_zeros_stay_where_they_are_through_export_loading_and_fine_tuning(library, tmp_path):
    """PR #720, #721: zeros "drift away"; PR #847: the 2:4 pattern wandered in fine-tuning."""
    data, layers = blobs(48, inputs=8), library.layers
    inputs = library.Input((8,))
    model = library.Model(inputs, layers.Dense(3)(layers.Dense(8, activation="tanh")(inputs)))
    model = tscnc.strip(tscnc.prune_now(model, 0.5, structure=NM(2, 4)))
    model.save(tmp_path / "sparse.keras")
    pattern = [kernel == 0 for kernel in kernels(model)]
    assert [int(zero.sum()) for zero in pattern] == [32, 12]
    fit(library, model, data)
    assert zeros(model) == [0, 0], "this is what is to be prevented"

    def assert_same_zeros(model):
        for kernel, zero in zip(kernels(model), pattern, strict=True):
            np.testing.assert_array_equal(kernel == 0, zero)

    model = library.models.load_model(tmp_path / "sparse.keras")
    before = [kernel.copy() for kernel in kernels(model)]
    optimizer = library.optimizers.AdamW(
        0.01, weight_decay=0.01, use_ema=True, ema_overwrite_frequency=2
    )
    look = after_every_batch(library, assert_same_zeros)
    fit(library, tscnc.pruning.freeze_mask(model), data, look, optimizer=optimizer, epochs=3)
    assert_same_zeros(model)  # Keras puts the averages in place at the end
    assert all(np.any(was != now) for was, now in zip(before, kernels(model), strict=True))
    for kernel in kernels(model):
        np.testing.assert_array_equal((kernel.reshape(2, 4, -1) != 0).sum(axis=1), 2)


def test_averages_from_before_pruning_restore_no_pruned_weight(library):
    """PR #720: averages remember the weights as they were when they were not yet pruned."""
    sizes = [kernel.size for kernel in kernels(dense_model(library))]
    seen = []
    look = after_every_batch(library, lambda model: seen.append(zeros(model)))
    optimizer = library.optimizers.SGD(
        0.1, momentum=0.9, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=2
    )
    model = prune(dense_model(library), tscnc.schedules.OneShot(0.75, begin_step=4))
    model.compile(optimizer, loss(library), jit_compile=False)
    # Without our callbacks: Keras puts the averages in place at the end, and nothing masks them.
    model.fit(*blobs(48), batch_size=16, epochs=2, verbose=0, callbacks=[look])
    assert seen == [[0, 0]] * 3 + [[round(0.75 * size) for size in sizes]] * 3
    assert zeros(model) == seen[-1]


# Without training; settings


def test_a_trained_model_is_pruned_without_data_or_training(library):
    """#621, #888: the way was a dummy data set and a learning rate of 0."""
    x, y = blobs(48)
    model = dense_model(library)
    model.compile("adam", loss(library), metrics=["accuracy"], jit_compile=False)
    model.fit(x, y, epochs=3, verbose=0)
    model.predict(x, verbose=0)  # compiled with the dense weights
    before = [weight.copy() for weight in model.get_weights()]
    steps = int(model.optimizer.iterations)
    assert tscnc.prune_now(model, 0.5) is model
    after = model.get_weights()
    for was, now in zip(before, after, strict=True):
        if was.ndim == 1:
            np.testing.assert_array_equal(now, was)
        else:
            threshold = np.sort(np.abs(was).ravel())[was.size // 2]
            np.testing.assert_array_equal(now, np.where(np.abs(was) >= threshold, was, 0))
    assert int(model.optimizer.iterations) == steps
    logits = np.maximum(x @ after[0] + after[1], 0) @ after[2] + after[3]
    np.testing.assert_allclose(model.predict(x, verbose=0), logits, rtol=1e-5, atol=1e-6)
    accuracy = float(np.mean(np.argmax(logits, -1) == y))
    assert model.evaluate(x, y, verbose=0)[1] == pytest.approx(accuracy)


def test_two_of_four_by_a_schedule_of_tfmots_goes_on_after_loading(library, tmp_path):
    """#456: `PolynomialDecay` did not come back; and the wrapper forgets `sparsity_m_by_n`."""
    layers = library.layers
    inputs = library.Input((8,))
    model = library.Model(inputs, layers.Dense(3)(layers.Dense(8, activation="relu")(inputs)))
    schedule = _keras.tfmot().sparsity.keras.PolynomialDecay(0.0, 0.5, 0, 6, frequency=2)
    model = prune(model, schedule, structure=NM(2, 4))
    for _ in range(3):
        model.pruner.step()
    assert sum(zeros(model)) == 64 // 4 + 24 // 4, "three of four are kept so far"
    model.save(tmp_path / "half-way.keras")
    model = library.models.load_model(tmp_path / "half-way.keras")
    assert model.pruner.schedule.get_config() == schedule.get_config()
    for _ in range(3):
        model.pruner.step()
    for kernel in kernels(model):
        np.testing.assert_array_equal((kernel.reshape(2, 4, -1) != 0).sum(axis=1), 2)


def test_the_structures_are_those_that_the_document_names():
    """`sparsity_m_by_n` names the zeros, `NM` what is kept; blocks are judged by their mean."""
    tfmots = _keras.tfmot().sparsity.keras
    cases = [({"sparsity_m_by_n": (1, 4)}, NM(3, 4)), ({"block_size": (2, 4)}, Block(2, 4))]
    first = tf_keras.Sequential([tf_keras.layers.Dense(8, input_shape=(8,)) for _ in cases])
    second = tf_keras.models.clone_model(first)
    second.set_weights(first.get_weights())
    once = tfmots.ConstantSparsity(0.5, begin_step=0, frequency=1)
    wrapped = tf_keras.Sequential(
        [
            tfmots.prune_low_magnitude(layer, once, **options)
            for layer, (options, _) in zip(first.layers, cases, strict=True)
        ]
    )
    wrapped.compile(tf_keras.optimizers.SGD(0.0), "mse")
    x = np.ones((2, 8))
    wrapped.fit(x, x, verbose=0, callbacks=[tfmots.UpdatePruningStep()])
    theirs = kernels(tfmots.strip_pruning(wrapped))
    assert [int(np.sum(kernel == 0)) for kernel in theirs] == [16, 32]
    for layer, kernel, (_, structure) in zip(second.layers, theirs, cases, strict=True):
        tscnc.strip(tscnc.prune_now(second, 0.5, layers=layer, structure=structure))
        np.testing.assert_array_equal(layer.kernel, kernel)


# Sizes and speed


def wide(library):
    """A network whose first kernel is nearly all of it."""
    inputs = library.Input((64,))
    x = library.layers.Dense(128, activation="relu", name="wide")(inputs)
    return library.Model(inputs, library.layers.Dense(3, name="logits")(x))


def file_sizes(model, path):
    """The bytes of a model's `.keras` file, raw and gzipped."""
    model.save(path)
    return path.stat().st_size, len(gzip.compress(path.read_bytes()))


def test_a_file_is_smaller_only_if_compressed_and_the_report_says_by_how_much(library, tmp_path):
    """#722, #760: "pruning cannot reduce .h5 model size"; #162: it was larger, for the masks."""
    model = wide(library)
    dense, dense_gzip = file_sizes(model, tmp_path / "dense.keras")
    before = tscnc.inspection.sizes(model)
    model = tscnc.strip(tscnc.prune_now(model, 0.9))
    raw, compressed = file_sizes(model, tmp_path / "sparse.keras")
    after = tscnc.inspection.sizes(model)
    assert raw == pytest.approx(dense, rel=0.01)
    assert compressed < 0.3 * dense_gzip
    file = tscnc.export_litert(model, tmp_path / "sparse.tflite", sparse=True)
    assert file.file_bytes < 0.4 * file.dense_bytes

    count = 64 * 128 + 128 + 128 * 3 + 3
    assert after.dense_bytes == before.dense_bytes == 4 * count < raw
    assert after.gzip_bytes < 0.3 * before.gzip_bytes
    assert before.ideal_sparse_bytes == before.dense_bytes
    kept = [round(0.1 * size) for size in (64 * 128, 128 * 3)]
    assert [row.nonzeros for row in after.rows] == kept
    bitmaps = sum(4 * k + size // 8 for k, size in zip(kept, (64 * 128, 128 * 3), strict=True))
    assert after.ideal_sparse_bytes <= bitmaps + 4 * (128 + 3)
    assert max(after.ideal_sparse_bytes, after.gzip_bytes) < 0.2 * after.dense_bytes
    text = " ".join(str(after).split())  # lines of the report are wrapped
    for word in ("dense", "gzip", "bitmap", "CSR", "Compress the file"):
        assert word in text


def test_that_zeros_make_nothing_faster_is_said_and_what_does_as_well(monkeypatch):
    """#611, #173: "pruning does not reduce inference time". The clock here finds all alike."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(_timing.time, "perf_counter", lambda: float(next(ticks)))
    model = tscnc.strip(tscnc.prune_now(wide(keras), 0.9))
    report = tscnc.inspection.speed_check(model, batch_size=4, rounds=2)
    assert report.zeros_ratio == 1.0
    assert report.verdict == "no faster: dense kernels multiply zeros at the same speed"
    assert [row.zeros_ratio for row in report.rows] == [1.0, 1.0]
    text = str(report)
    for words in ("no faster", "tscnc.pruning.compact", "2:4", "tscnc.inspection.sizes"):
        assert words in text


def test_whole_filters_make_it_smaller_everywhere(library, tmp_path):
    """#611, #760, #67: what pruning leaves as zeros in place, compaction takes out."""
    model = wide(library)
    dense, _ = file_sizes(model, tmp_path / "dense.keras")
    model = tscnc.prune_now(model, 0.75, layers="wide", structure=Filters())
    x = np.random.default_rng(0).uniform(size=(32, 64)).astype("float32")
    compaction = tscnc.pruning.compact(tscnc.strip(model))
    assert compaction.model.get_layer("wide").units == 32
    assert compaction.parameters_before == 64 * 128 + 128 + 128 * 3 + 3
    assert compaction.parameters_after == 64 * 32 + 32 + 32 * 3 + 3
    np.testing.assert_allclose(compaction.model(x), model(x), rtol=1e-5, atol=1e-5)
    small, _ = file_sizes(compaction.model, tmp_path / "small.keras")
    assert small < 0.5 * dense


# The document


def network(library):
    """A network with the layers that the document names: a 1x1 convolution among them."""
    layers = library.layers
    x = inputs = library.Input((8, 8, 1))
    x = layers.Conv2D(16, 3, activation="relu", name="conv")(x)
    x = layers.Conv2D(16, 1, activation="relu", name="point")(x)
    return library.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))


BLOCKS = python_blocks(DOCUMENT.read_text())


def test_every_block_of_the_document_says_whose_it_is():
    text = DOCUMENT.read_text()
    assert text.count("```") == 2 * len(BLOCKS) > 0
    assert {block.partition("\n")[0] for block in BLOCKS} == {"# tfmot", "# tscnc_tf"}


def test_what_the_document_names_exists():
    text = DOCUMENT.read_text()
    modules = "callbacks|inspection|pruning|schedules"
    names = set(re.findall(rf"\b((?:{modules})\.(?!md\b)[A-Za-z_]+)", text))  # not pruning.md
    assert {"pruning.NM", "pruning.compact", "inspection.sizes", "callbacks.KernelLogger"} <= names
    for name in names:
        module, attribute = name.split(".")
        assert attribute in getattr(tscnc, module).__all__, name
    for link in re.findall(r"\]\((?!https:)([^)#]+)\)", text):
        assert (DOCUMENT.parent / link).is_file(), link


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_document_runs(number, tmp_path, monkeypatch, capfd):
    """Each block by itself; theirs as well, so that the comparison is true."""
    monkeypatch.chdir(tmp_path)
    block = BLOCKS[number]
    library = tf_keras if block.startswith("# tfmot") else keras
    x, y = images(192)
    names = {
        "keras": keras,
        "loss": loss(library),
        "model": network(library),
        "tf": tf,
        "tf_keras": tf_keras,
        "tfmot": _keras.tfmot(),
        "tscnc": tscnc,
        "x": x,
        "y": y,
    }
    exec(compile(block, f"{DOCUMENT.name}, block {number + 1}", "exec"), names)
