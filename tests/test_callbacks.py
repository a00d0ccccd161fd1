"""The callbacks by themselves; what they do in training is in test_training.py."""

from __future__ import annotations

import contextlib
import importlib.util

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import FLAVOURS, blobs, dense_model

from tscnc_tf import _keras, attacks, callbacks, datasets, losses, pruning, schedules, training


def fitted(*more, **options):
    x, y = blobs(32)
    model = pruning.prune(dense_model(), schedules.OneShot(0.5))
    model.compile("sgd", tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    used = [*callbacks.pruning_callbacks(**options), *more]
    return model.fit(x, y, batch_size=16, epochs=2, verbose=0, callbacks=used).history


def test_all_that_pruning_needs_is_among_them():
    kinds = [type(callback) for callback in callbacks.pruning_callbacks(log_kernels=True)]
    assert kinds == [callbacks.UpdatePruning, callbacks.ConditionFeed, callbacks.KernelLogger]
    for kind in kinds:
        assert issubclass(kind, keras.callbacks.Callback)
        assert issubclass(kind, tf_keras.callbacks.Callback)


class Own(keras.layers.Layer):
    """A layer whose weight is not known to be one matrix."""

    def build(self, shape):
        self.w = self.add_weight(name="w", shape=(shape[-1], 3))

    def call(self, inputs):
        return tf.matmul(inputs, self.w)


def test_where_no_weight_is_known_as_a_matrix_loggers_go_on_and_gates_are_warned_of():
    x, y = blobs(32)
    model = keras.Sequential([keras.Input(x.shape[1:]), Own(name="own")])
    pruning.prune_now(model, 0.5)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    used = callbacks.pruning_callbacks(log_kernels=True)
    history = model.fit(x, y, epochs=2, verbose=0, callbacks=used).history
    assert history["sparsity"] == history["sparsity/own/w"] == [0.5, 0.5]
    assert np.isnan(history["condition_number"]).all()
    gate = schedules.ConditionGated(schedules.OneShot(0.75, 1), 2.0)
    model = pruning.prune(pruning.strip(model), gate, engine="masks")
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.warns(UserWarning, match="governs no weight that is read as a matrix"):
        model.fit(x, y, verbose=0, callbacks=callbacks.pruning_callbacks())


def test_with_wrappers_a_gate_governs_the_layers_that_have_a_matrix():
    def wrapped(names):
        layers = tf_keras.layers
        model = tf_keras.Sequential(
            [
                layers.Embedding(9, 4, input_length=3, name="embedding"),
                layers.Flatten(),
                layers.Dense(3, name="logits"),
            ]
        )
        gate = schedules.ConditionGated(schedules.OneShot(0.5, 1), 1e9)
        model = pruning.prune(model, gate, layers=names, engine="tfmot")
        loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss)
        return model

    x, y = np.arange(12).reshape(4, 3) % 9, np.arange(4) % 3
    model = wrapped(["embedding", "logits"])
    model.fit(x, y, epochs=2, verbose=0, callbacks=callbacks.pruning_callbacks())
    assert pruning.report(pruning.strip(model)).model_zeros == 36
    with pytest.warns(UserWarning, match="governs no weight that is read as a matrix"):
        wrapped(["embedding"]).fit(x, y, verbose=0, callbacks=callbacks.pruning_callbacks())


def test_a_training_that_is_too_short_by_accumulation_is_warned_of_also_with_a_loss_scale():
    x, y = blobs(32)
    for scaled in (False, True):
        model = keras.Sequential([keras.Input(x.shape[1:]), keras.layers.Dense(3)])
        model = pruning.prune(model, schedules.OneShot(0.5, 6))
        optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)
        if scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        with pytest.warns(UserWarning, match="does not reach its sparsity"):
            model.fit(x, y, batch_size=4, verbose=0, callbacks=callbacks.pruning_callbacks())


def test_tensorboard_gets_the_figures_of_the_history(tmp_path):
    history = fitted(log_dir=str(tmp_path))
    assert history["sparsity"] == [0.5, 0.5]
    (file,) = tmp_path.iterdir()
    found = {}
    for record in tf.data.TFRecordDataset(str(file)):
        event = tf.compat.v1.Event.FromString(record.numpy())
        for value in event.summary.value:
            found.setdefault(value.tag, []).append(float(tf.make_ndarray(value.tensor)))
    assert {"sparsity/hidden", "condition_number/logits", "condition_number"} <= set(found)
    for name, values in found.items():
        np.testing.assert_allclose(values, history[name], rtol=1e-6)


def test_a_logger_that_is_used_again_writes_again(tmp_path):
    x, y = blobs()
    model = dense_model(keras)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    logger = callbacks.KernelLogger(log_dir=str(tmp_path))
    for times in (1, 2):
        model.fit(x, y, verbose=0, callbacks=[logger])
        records = [
            record for file in tmp_path.iterdir() for record in tf.data.TFRecordDataset(str(file))
        ]
        figures = sum(
            len(tf.compat.v1.Event.FromString(record.numpy()).summary.value) for record in records
        )
        assert figures == times * len(logger.scalars())


def test_a_log_dir_without_tensorboard_is_refused(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    with pytest.raises(ImportError, match="pip install tensorboard"):
        callbacks.pruning_callbacks(log_dir=str(tmp_path))


@pytest.mark.parametrize(("frequency", "error"), [(0, ValueError), (1.5, TypeError)])
def test_a_bad_frequency_is_named(frequency, error):
    with pytest.raises(error, match="frequency"):
        callbacks.pruning_callbacks(condition_frequency=frequency)


@pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)
def test_a_pruned_part_is_looked_at_once_an_epoch_and_not_in_each_batch(library, monkeypatch):
    inner, inputs = dense_model(library), library.Input((6,))
    pruner = pruning.Pruner(inner, schedules.CosineSparsity(0.0, 0.5, 1, 6, frequency=1))
    model = library.Model(inputs, inner(inputs))
    model.compile(library.optimizers.Adam(), "mse")
    made = []
    own = pruner.step_function
    monkeypatch.setattr(pruner, "step_function", lambda each: made.append(each) or own(each))
    x, y = blobs(24)
    model.fit(
        *(x, np.eye(3)[y]),
        batch_size=4,
        epochs=2,
        verbose=0,
        callbacks=callbacks.pruning_callbacks(),
    )
    assert made == [model.optimizer] * 2
    assert pruner.steps == 12
    assert pruning.report(model).sparsity == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
def test_what_is_not_finite_is_said_in_its_step(library, rng):
    """By the loss alone it would be seen one step later, or not at all."""
    x = rng.random((8, 6)).astype("float32")
    y = rng.integers(0, 3, 8)
    losses = library.losses.SparseCategoricalCrossentropy(from_logits=True)

    def fit(rate=0.1, weights=None):
        model = dense_model(library)
        model.compile(library.optimizers.SGD(rate), losses)
        watch = [callbacks.RaiseOnNaN()]
        options = {"batch_size": 4, "shuffle": False, "verbose": 0, "callbacks": watch}
        model.fit(x, y, sample_weight=weights, epochs=2, **options)
        return model

    assert all(np.isfinite(weight).all() for weight in fit().get_weights())
    with pytest.raises(
        ValueError,
        match=r"After batch 1 of epoch 1 weights are NaN or infinite: \S*hidden/kernel, ",
    ):
        fit(rate=float("inf"))
    later = library.Sequential([library.layers.Dense(3)])  # built by its first batch
    later.compile(library.optimizers.SGD(float("inf")), losses)
    watch = callbacks.RaiseOnNaN(first_batch=6)
    with pytest.raises(ValueError, match=r"After batch 7 of epoch 1 weights .*kernel, \S*bias\."):
        later.fit(x, y, batch_size=4, verbose=0, callbacks=[watch])
    bad = np.ones(8, "float32")
    bad[5] = np.nan
    words = "After batch 2 of epoch 1 loss is nan, and 4 of 4 weights are NaN or infinite. Lower"
    with pytest.raises(ValueError, match=words):
        fit(weights=bad)


class Spoil(_keras.flavours.Callback):
    """Puts a value into an optimizer's slot of the last kernel before the second batch."""

    def __init__(self, place, value):
        super().__init__()
        self.place, self.value = place, value

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 1:
            kernel, optimizer = self.model.trainable_variables[-2], self.model.optimizer
            average = _keras.optimizers.average(optimizer, kernel)
            (momentum,) = {
                id(slot): slot
                for slot in _keras.optimizers.companions(optimizer, [kernel])[0]
                if slot is not average
            }.values()
            slot = {"average": average, "momentum": momentum}[self.place]
            value = slot.numpy()
            value[0, 0] = self.value
            slot.assign(value)


@pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("average", np.nan, r"slots of the optimizer are NaN or infinite: \S*average\S*\. "),
        ("average", np.inf, r"slots of the optimizer are NaN or infinite: \S*average\S*\. "),
        ("momentum", np.nan, r"weights are NaN or infinite: \S*kernel\. "),
        ("momentum", np.inf, r"weights are NaN or infinite: \S*kernel\. "),
    ],
)
def test_a_slot_that_is_not_finite_is_said_in_its_step(place, value, words, library, rng):
    """Neither is in the loss of its step, and an average is in no loss of the training."""
    model = dense_model(library)
    optimizer = library.optimizers.SGD(0.1, momentum=0.9, use_ema=True)
    model.compile(optimizer, library.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = rng.random((8, 6)).astype("float32"), rng.integers(0, 3, 8)
    watch = [Spoil(place, value), callbacks.RaiseOnNaN()]
    with pytest.raises(ValueError, match=f"^After batch 2 of epoch 1 {words}Lower the learning"):
        model.fit(x, y, batch_size=4, shuffle=False, verbose=0, callbacks=watch)


# --- The position in the data -----------------------------------------------------------------


class Lost(_keras.flavours.Callback):
    """Ends the training after a number of batches, as a machine that fails."""

    def __init__(self, batches):
        super().__init__()
        self.left = batches

    def on_train_batch_begin(self, batch, logs=None):
        if not self.left:
            raise InterruptedError
        self.left -= 1


def trained_on_digits(k, *more, save_freq=None, folder=None):
    """The weights after two epochs of adversarial training of a pruned network."""
    k.backend.clear_session()
    k.utils.set_random_seed(0)
    data = datasets.load("digits")
    model = k.Sequential(
        [k.Input(data.image_shape), k.layers.Flatten(), k.layers.Dense(10, name="logits")]
    )
    model = pruning.prune(model, schedules.CosineSparsity(0.0, 0.5, 2, 30, 4), engine="masks")
    trainer = training.AdversarialTraining(
        model, attack=attacks.PGD(epsilon=0.1, steps=1), loss=losses.Madry()
    )
    trainer.compile(k.optimizers.SGD(0.1, momentum=0.9))
    position = callbacks.DataPosition()
    backup = [] if folder is None else [k.callbacks.BackupAndRestore(folder, save_freq=save_freq)]
    steps = data.steps_per_epoch(64)
    trainer.fit(
        data.training(64, seed=1, position=position),
        epochs=2,
        steps_per_epoch=steps,
        shuffle=False,
        verbose=0,
        callbacks=[*backup, position, *more],
    )
    return model.get_weights()


@pytest.mark.parametrize(
    ("library", "save_freq", "lost_after"),
    [("keras", "epoch", 33), ("tf_keras", "epoch", 33), ("tf_keras", 7, 33)],
)
def test_a_restored_training_goes_on_in_the_data(library, save_freq, lost_after, tmp_path):
    """After 20 of 40 batches, or after 28: the result is that of an undisturbed training."""
    k, options = FLAVOURS[library], {"save_freq": save_freq, "folder": str(tmp_path / "backup")}
    undisturbed = trained_on_digits(k)
    with pytest.raises(InterruptedError):
        trained_on_digits(k, Lost(lost_after), **options)
    rest = Lost(100)
    again = trained_on_digits(k, rest, **options)
    assert 100 - rest.left == (20 if save_freq == "epoch" else 12)
    for before, after in zip(undisturbed, again, strict=True):
        np.testing.assert_array_equal(before, after)


def test_the_position_is_that_of_the_optimizer_when_fit_begins():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    position, seen, found = callbacks.DataPosition(), [], []

    def epoch(number):
        rows = tf.range(3) + 10 * tf.cast(number, tf.int32)
        return tf.data.Dataset.from_tensor_slices(rows).repeat(2)  # longer than an epoch

    def noted(row):
        row = tf.numpy_function(lambda row: seen.append(int(row)) or row, [row], tf.int32)
        return tf.ones((1, 2)), tf.zeros((1, 2)) + 0.0 * tf.cast(
            tf.ensure_shape(row, ()), tf.float32
        )

    batches = position.batches(epoch, 3).map(noted)
    for steps in (2, 3, 2):
        model.fit(batches, steps_per_epoch=steps, verbose=0, callbacks=[position], shuffle=False)
        found.append(seen[:steps])
        seen.clear()
    assert found == [[0, 1], [2, 10, 11], [12, 20]]


def test_an_epoch_that_is_too_short_is_an_error_and_a_scaled_loss_a_warning():
    position = callbacks.DataPosition()
    short = position.batches(lambda number: tf.data.Dataset.range(2), 3)
    with pytest.raises(tf.errors.FailedPreconditionError, match="expected to contain 3 elements"):
        list(short.take(4))
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), "mse")
    with pytest.warns(UserWarning, match="steps that it skips do not count"):
        model.fit(np.ones((4, 2)), np.ones((4, 2)), verbose=0, callbacks=[position])


def test_a_backup_that_is_restored_after_the_position_is_an_error(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")

    def fit(epochs, *used):
        model.fit(np.ones((4, 2)), np.ones((4, 2)), epochs=epochs, verbose=0, callbacks=used)

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)

    fit(2, backup())
    model.optimizer.iterations.assign(0)
    with pytest.raises(ValueError, match=r"must come after BackupAndRestore .* batch 0, .* at 2"):
        fit(3, callbacks.DataPosition(), backup())
    fit(3, backup(), callbacks.DataPosition())


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"position": 3}, TypeError, "position must be a callbacks.DataPosition, got 3"),
        ({"position": None, "first_epoch": 1}, None, ""),
        ({"first_epoch": 1}, ValueError, "position gives the first batch .* first_epoch is 1"),
        ({"epochs": 1}, ValueError, "but first_epoch is 0 and epochs 1"),
    ],
)
def test_positions_that_are_refused(options, kind, words):
    data = datasets.load("digits")
    options = {"position": callbacks.DataPosition()} | options
    with pytest.raises(kind, match=words) if kind else contextlib.nullcontext():
        data.training(64, **options)
    with pytest.raises(ValueError, match="steps_per_epoch must be >= 1"):
        callbacks.DataPosition().batches(tf.data.Dataset.range, 0)
    with pytest.raises(TypeError, match="epoch must be a function from an epoch's number"):
        callbacks.DataPosition().batches(data, 3)
