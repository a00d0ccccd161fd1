"""Ways to train, load and save around a pruner: its zeros hold, and its report tells the truth."""

from __future__ import annotations

import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import FLAVOURS, blobs, dense_model, training_itself

from tscnc_tf import attacks, callbacks, inspection, losses, pruning, schedules
from tscnc_tf._keras import flavours, optimizers
from tscnc_tf.pruning import Block, Filters, Pruner
from tscnc_tf.training import AdversarialTraining

X, Y = blobs(64)


@pytest.fixture(params=FLAVOURS)
def library(request):
    return FLAVOURS[request.param]


def loss(library):
    return library.losses.SparseCategoricalCrossentropy(from_logits=True)


def compiled(model, library, optimizer="adam"):
    model.compile(optimizer, loss(library), jit_compile=False)
    return model


def zeros(model):
    """Counted on the variables, by nobody's report."""
    return [int(np.sum(np.asarray(t.variable) == 0)) for t in model.pruner.targets]


def assert_told(model, expected):
    assert zeros(model) == expected
    assert [row.zeros for row in pruning.report(model).pruned] == expected
    assert [row.zeros for row in inspection.sparsity(model).prunable] == expected


def unnamed(library):
    """A subclassed model that leaves the names of its layers to Keras."""

    @library.saving.register_keras_serializable("tests")
    class Unnamed(library.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.a, self.b, self.c = (library.layers.Dense(6) for _ in range(3))

        def call(self, inputs):
            return self.c(self.b(self.a(inputs)))

        def get_config(self):
            return {"name": self.name}

    model = Unnamed()
    model(X[:1])
    return model


def test_masks_come_back_to_their_places_whatever_the_names(library, tmp_path):
    library.layers.Dense(1)  # so that names are counted on from here
    model = unnamed(library)
    pruning.prune_now(model, 0.5, layers=[model.a, model.b])
    model.save(tmp_path / "model.keras")
    other = library.models.load_model(tmp_path / "model.keras")
    layers = [other.a, other.b, other.c]
    assert [int(np.sum(np.asarray(layer.kernel) == 0)) for layer in layers] == [18, 18, 0]
    compiled(other, library).fit(X, Y, verbose=0)
    assert [int(np.sum(np.asarray(layer.kernel) == 0)) for layer in layers] == [18, 18, 0]
    np.testing.assert_array_equal(other.a.kernel == 0, model.a.kernel == 0)


def test_weights_that_are_set_or_loaded_are_masked(library, tmp_path):
    model = dense_model(library)
    dense = model.get_weights()
    pruning.prune_now(model, 0.75)
    model.set_weights(dense)
    assert_told(model, [36, 18])
    plain = dense_model(library)
    for name in ("dense.weights.h5", "dense.h5")[: 2 if library is tf_keras else 1]:
        plain.save_weights(tmp_path / name)
        model.set_weights([2 * weight for weight in dense])
        model.load_weights(tmp_path / name)
        assert_told(model, [36, 18])
        mask = np.asarray(model.pruner.state.masks[0])
        kernel = np.asarray(plain.layers[-2].kernel)
        np.testing.assert_array_equal(np.asarray(model.layers[-2].kernel), kernel * mask)


def test_weights_that_fit_in_part_leave_a_sparse_model(library, tmp_path):
    model = pruning.prune_now(dense_model(library), 0.75)
    other = library.Sequential([library.Input((4,)), library.layers.Dense(5)])
    other.save_weights(tmp_path / "other.weights.h5")
    with pytest.raises((ValueError, KeyError)):
        model.load_weights(tmp_path / "other.weights.h5")
    assert_told(model, [36, 18])
    for layer in model.layers[-2:]:
        layer.kernel.assign(tf.ones_like(layer.kernel))
    assert_told(model, [0, 0])  # behind everybody's back: the report says what is


def test_early_stopping_that_restores_weights_leaves_a_sparse_model(library):
    model = compiled(dense_model(library), library)
    schedule = schedules.CosineSparsity(0.0, 0.75, 0, 8, frequency=1)
    pruning.prune(model, schedule, engine="masks")
    stopping = library.callbacks.EarlyStopping(
        "loss", mode="max", patience=1, restore_best_weights=True
    )
    used = [*callbacks.pruning_callbacks(), stopping]
    model.fit(X, Y, batch_size=16, epochs=3, verbose=0, callbacks=used)
    kept = [int(np.sum(mask)) for mask in model.pruner.state.masks]
    assert kept[0] < 48
    assert all(z >= n - k for z, n, k in zip(zeros(model), (48, 24), kept, strict=True))


def test_evaluation_changes_no_weights(library):
    model = dense_model(library)
    pruning.prune_now(model, 0.5)
    model.layers[-1].kernel.assign(tf.ones_like(model.layers[-1].kernel))
    attacks.PGD(epsilon=0.1)(model, X[:8], Y[:8])
    assert zeros(model)[1] == 0


def test_a_trainer_notices_that_its_model_was_pruned_or_stripped(library):
    model = dense_model(library)
    trainer = AdversarialTraining(
        model, attack=attacks.PGD(epsilon=0.1, steps=1), loss=losses.Madry()
    )
    trainer.compile(library.optimizers.SGD(0.1))
    trainer.fit(X, Y, verbose=0)
    pruning.prune_now(model, 0.75)
    trainer.fit(X, Y, verbose=0)
    assert_told(model, [36, 18])
    assert model.pruner.steps == 2
    pruning.strip(model)
    trainer.fit(X, Y, verbose=0, epochs=2)
    assert np.sum(np.asarray(model.layers[-1].kernel) == 0) < 9, "but for dead units"
    with pytest.raises(ValueError, match="not the trainer: prune"):
        pruning.prune_now(trainer, 0.5)


def test_a_model_with_an_optimizer_of_its_own_is_pruned_by_that_ones_steps(library):
    model = training_itself(library, library.layers.Dense(3))
    pruning.prune(model, schedules.OneShot(0.5, 3), engine="masks")
    model.compile(run_eagerly=False)
    model.fit(X, Y, batch_size=16, verbose=0)
    assert model.pruner.steps == 4
    assert zeros(model) == [9]


def test_a_step_before_the_optimizer_has_begun_leaves_no_slot_out(library):
    model = dense_model(library)
    pruner = Pruner(model, schedules.OneShot(0.5))
    optimizer = library.optimizers.Adam(0.1)
    pruner.step(optimizer)
    for _ in range(3):
        flavours.minimize(
            optimizer, lambda: tf.reduce_sum(model(X[:4]) ** 2), model.trainable_variables
        )
        pruner.step(optimizer)
    for target, mask in zip(pruner.targets, pruner.state.masks, strict=True):
        (kept,) = optimizers.companions(optimizer, [target.variable])
        assert len(kept) == 2
        assert not any(np.any(np.asarray(slot)[~mask.numpy()]) for slot in kept)


def test_every_optimizer_that_takes_over_is_counted_from_its_first_step(library):
    model = dense_model(library)
    pruning.prune(model, schedules.OneShot(0.5, 3), engine="masks")
    for expected in (1, 2, 3, 4):
        compiled(model, library).train_on_batch(X[:16], Y[:16])
        assert model.pruner.steps == expected
    assert zeros(model) == [24, 12]


def test_resumed_training_is_planned_from_its_current_step(library):
    schedule = schedules.CosineSparsity(0.0, 0.75, 0, 50, frequency=1)
    model = compiled(dense_model(library), library)
    pruning.prune(model, schedule, engine="masks")
    options = {"batch_size": 8, "verbose": 0, "callbacks": callbacks.pruning_callbacks()}
    with pytest.warns(UserWarning, match="planned, steps 1 to 16:"):
        model.fit(X, Y, epochs=2, **options)
    with pytest.warns(UserWarning, match="planned, steps 17 to 40:"):
        model.fit(X, Y, epochs=5, initial_epoch=2, **options)


def test_models_with_masks_can_be_pickled(library):
    model = pruning.prune_now(dense_model(library), 0.5)
    other = pickle.loads(pickle.dumps(model))
    assert zeros(other) == zeros(model)
    np.testing.assert_array_equal(other(X), model(X))


def test_the_legacy_weight_format_is_refused(tmp_path):
    model = pruning.prune_now(dense_model(tf_keras), 0.5)
    with pytest.raises(ValueError, match=r"must end in \.weights\.h5"):
        model.save_weights(tmp_path / "weights.h5")


def test_an_attribute_of_the_same_name_is_not_hidden(library):
    model = dense_model(library)
    model.pruner = "mine"
    with pytest.raises(ValueError, match="attribute 'pruner' of its own"):
        pruning.prune_now(model, 0.5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_any_criterion_ranks_weights_of_any_precision(dtype, scope):
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(8, dtype=dtype), layers.Dense(3, dtype="float32")]
    )
    pruning.prune_now(model, 0.5, criterion=tf.abs, scope=scope)
    assert sum(zeros(model)) == 36


def test_huge_scores_and_nan_bring_nothing_back(library):
    def huge(weight):
        return -1e9 - 1e9 * tf.abs(weight)

    model = dense_model(library)
    pruner = Pruner(model, schedules.CosineSparsity(0.5, 0.75, 0, 2, 1), criterion=huge)
    pruner.step()
    first = [mask.numpy() for mask in pruner.state.masks]
    kernel = np.asarray(model.layers[-1].kernel).copy()
    kernel[tuple(np.argwhere(first[1])[0])] = np.nan
    model.layers[-1].kernel.assign(kernel)
    pruner.step()
    for was, mask in zip(first, pruner.state.masks, strict=True):
        assert np.all(was | ~mask.numpy())
        assert np.sum(mask) == mask.numpy().size // 4


def test_the_floor_holds_for_blocks_of_unequal_size(library):
    layers = [library.layers.Dense(7, name="square"), library.layers.Dense(2)]
    model = library.Sequential([library.layers.InputLayer((7,)), *layers])
    pruning.prune_now(model, 0.95, structure=Block(3, 3), min_weights=12, layers="square")
    assert 12 <= 49 - zeros(model)[0] < 12 + 9


@pytest.mark.parametrize("structure", [None, Filters()])
def test_floors_of_all_layers_hold_where_they_are_more_than_what_is_left(library, structure):
    model = dense_model(library)
    how = {"scope": "global", "min_weights": 30, "layers": ["hidden", "logits"]}
    pruning.prune_now(model, 0.9, structure=structure, **how)
    kept = [48 - zeros(model)[0], 24 - zeros(model)[1]]
    assert kept == [30, 24]


def test_starving_is_judged_by_what_comes_out(library):
    with pytest.warns(UserWarning, match="hidden keeps 6 of 48 weights for 8 outputs"):
        Pruner(dense_model(library), schedules.OneShot(0.9), structure=Filters())
    with pytest.warns(UserWarning, match=r"logits keeps all of its 24 weights in Block"):
        once = schedules.OneShot(0.5)
        Pruner(dense_model(library), once, structure=Block(8, 8), layers=["hidden", "logits"])
    model = dense_model(library)
    model.layers[-1].kernel.assign(1e-6 * np.asarray(model.layers[-1].kernel))
    with pytest.warns(UserWarning, match="logits keeps 1 of 24 weights for 3 outputs"):
        Pruner(model, schedules.OneShot(0.5), scope="global")


def test_a_model_that_was_never_pruned_is_reported_with_its_reasons(library):
    model = dense_model(library)
    model.layers[-1].trainable = False
    rows = pruning.report(model).rows
    assert [row.reason for row in rows] == ["not chosen", "it is frozen (trainable=False)"]


def test_masks_are_constraints_as_every_version_of_keras_takes_them():
    model = pruning.prune(
        dense_model(keras), schedules.OneShot(0.5), engine="masks", layers=keras.layers.Dense
    )
    (constraint, *_) = [target.variable.constraint for target in model.pruner.targets]
    assert isinstance(constraint, keras.constraints.Constraint)  # Keras 3.12 refuses others
