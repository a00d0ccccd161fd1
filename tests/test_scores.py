"""Scores that choose which weights act: how they begin, move, are saved, and give way to masks."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import FLAVOURS, blobs, conv_model, dense_model, fresh_process, images
from hypothesis import given, settings
from hypothesis import strategies as st

import tscnc_tf as tscnc
from tscnc_tf import attacks, callbacks, inspection, losses, pruning, schedules
from tscnc_tf._keras import optimizers
from tscnc_tf.pruning import NM, Block, Filters, Pruner, ScorePruner, Unstructured
from tscnc_tf.training import AdversarialTraining

X, Y = blobs(64)


@pytest.fixture(params=FLAVOURS)
def library(request):
    return FLAVOURS[request.param]


def loss(library):
    return library.losses.SparseCategoricalCrossentropy(from_logits=True)


def scored(library, sparsity=0.5, model=None, **options):
    model = dense_model(library) if model is None else model
    return tscnc.prune(model, method="scores", sparsity=sparsity, **options)


def compiled(model, library, optimizer=None, **options):
    optimizer = library.optimizers.SGD(0.5, momentum=0.9) if optimizer is None else optimizer
    model.compile(optimizer, loss(library), **{"jit_compile": False} | options)
    return model


def kernels(model):
    return [np.asarray(target.variable) for target in model.pruner.targets]


def dense(model):
    return [variable.numpy() for variable in model.pruner.state.dense]


def scores(model):
    return [variable.numpy() for variable in model.pruner.state.scores]


def top(score, count):
    """True at the `count` largest magnitudes, of equals the first ones."""
    order = np.argsort(-np.abs(score).ravel(), kind="stable")[:count]
    mask = np.zeros(score.size, bool)
    mask[order] = True
    return mask.reshape(score.shape)


def assert_consistent(model, density=0.5):
    """Each kernel is its dense weights where the scores are largest, and zero elsewhere."""
    for kernel, weight, score in zip(kernels(model), dense(model), scores(model), strict=True):
        kept = top(score, round(score.size * density))
        np.testing.assert_array_equal(kernel, np.where(kept, weight, 0.0))


def assert_same(these, those):
    for one, other in zip(these, those, strict=True):
        np.testing.assert_array_equal(one, other)


def gradients(model, x=X, y=Y):
    """Of the mean cross-entropy, for the kernels as they act; in the order of the targets."""
    variables = [target.variable for target in model.pruner.targets]
    with tf.GradientTape() as tape:
        values = tf.nn.sparse_softmax_cross_entropy_with_logits(y, model(x, training=True))
        value = tf.reduce_mean(values)
    return [gradient.numpy() for gradient in tape.gradient(value, variables)]


# How it begins


def fans(library):
    layers = library.layers
    x = inputs = library.Input((8, 8, 4))
    x = layers.Conv2D(6, 3, groups=2, name="grouped")(x)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="depth")(x)
    x = layers.Conv2DTranspose(5, 2, name="up")(x)
    x = layers.Dense(3, name="dense")(layers.Flatten()(x))
    return library.Model(inputs, x)


def test_scores_begin_as_weights_over_the_largest_scaled_by_fan_in(library):
    model = fans(library)
    before = {k: np.asarray(model.get_layer(k).weights[0]) for k in ("grouped", "depth", "up")}
    scored(library, model=model, layers=list(before))
    fan_in = {"grouped": 9 * 2, "depth": 9, "up": 4 * 12}
    for target, score in zip(model.pruner.targets, scores(model), strict=True):
        weight = before[target.name].astype("float64")
        expected = np.sqrt(6 / fan_in[target.name]) * weight / np.abs(weight).max()
        np.testing.assert_allclose(score, expected, rtol=1e-5)
    assert_same(dense(model), before.values())
    assert_consistent(model)


def test_ties_are_no_reason_to_keep_more_or_fewer(library):
    model = dense_model(library)
    for layer in model.layers[-2:]:
        layer.kernel.assign(tf.ones_like(layer.kernel) * 0.5)
    scored(library, 0.75, model)
    assert [int(np.sum(kernel != 0)) for kernel in kernels(model)] == [12, 6]
    assert_consistent(model, 0.25)


@pytest.mark.parametrize(
    ("scope", "kept"),
    [("erk", None), ("global", None), ({"hidden": 0.5}, [24, 4])],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:At a sparsity")
def test_every_scope_keeps_its_exact_count_in_every_step(scope, kept, library):
    model = scored(library, 0.85, scope=scope, min_weights=4)
    twin = dense_model(library)  # as many as magnitude pruning keeps
    pruning.prune_now(twin, 0.85, scope=scope, min_weights=4)
    counts = [int(np.sum(mask)) for mask in twin.pruner.state.masks]
    counts = counts if kept is None else kept
    total = sum(counts)
    for _ in range(3):
        found = [int(np.sum(kernel != 0)) for kernel in kernels(model)]
        assert sum(found) == total
        if scope != "global":
            assert found == counts
        compiled(model, library).train_on_batch(X, Y)
    if scope == "global":  # the four largest of each, then the largest of all
        magnitudes = [np.abs(score) for score in scores(model)]
        floors = [top(score, 4) for score in magnitudes]
        ranked = [np.where(f, np.inf, m) for f, m in zip(floors, magnitudes, strict=True)]
        together = top(np.concatenate([each.ravel() for each in ranked]), total)
        found = np.concatenate([mask.numpy().ravel() for mask in model.pruner.state.masks])
        np.testing.assert_array_equal(found, together)


@pytest.mark.parametrize(
    "structure", [NM(2, 4), Block(2, 2), Filters(), Unstructured(), Unstructured(3)], ids=str
)
def test_every_structure_holds_as_scores_move(structure, library):
    model = scored(library, 0.5, structure=structure, layers="hidden")
    before = kernels(model)[0] != 0
    compiled(model, library).fit(X, Y, epochs=8, batch_size=16, verbose=0)
    mask = kernels(model)[0] != 0
    assert np.any(mask != before), "it has moved"
    if isinstance(structure, NM):
        assert mask[:4].sum(axis=0).tolist() == [2] * 8
        assert mask[4:].all(), "of an incomplete group as many"
    else:
        assert mask.sum() == 24
    if isinstance(structure, Block):
        blocks = mask.reshape(3, 2, 4, 2).sum(axis=(1, 3))
        assert set(blocks.ravel()) == {0, 4}
    if isinstance(structure, Filters):
        assert set(mask.sum(axis=0)) == {0, 6}


# How it moves


def test_the_gradient_passes_straight_through_to_all_weights(library):
    """By plain SGD: s moves by lr · dL/d(w⊙m) ⊙ w ⊙ sign(s), zeros included."""
    model = compiled(scored(library), library, library.optimizers.SGD(0.25))
    was, weights, slopes = scores(model), dense(model), gradients(model)
    model.train_on_batch(X, Y)
    for now, score, weight, slope, kernel in zip(
        scores(model), was, weights, slopes, kernels(model), strict=True
    ):
        np.testing.assert_allclose(
            now, score - 0.25 * slope * weight * np.sign(score), rtol=1e-5, atol=1e-7
        )
        moved = np.abs(now - score)[kernel == 0]
        assert np.any(moved > 1e-4), "also where the weight is zero"
    assert_same(dense(model), weights)
    assert_consistent(model)


def test_the_gradient_is_that_of_a_choice_with_a_straight_through_estimate():
    """Against TensorFlow's own: m(|s|) with a gradient of one, by tf.custom_gradient."""
    model = scored(keras, layers="hidden")
    hidden, last = model.layers[-2:]
    weight, score = (tf.constant(values(model)[0]) for values in (dense, scores))

    @tf.custom_gradient
    def choose(magnitude):
        return tf.cast(top(magnitude.numpy(), 24), tf.float32), lambda upstream: upstream

    with tf.GradientTape() as tape:
        tape.watch(score)
        kernel = weight * choose(tf.abs(score))
        logits = tf.nn.relu(X @ kernel + hidden.bias) @ last.kernel + last.bias
        value = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(Y, logits))
    expected = score - 0.5 * tape.gradient(value, score)
    compiled(model, keras, keras.optimizers.SGD(0.5)).train_on_batch(X, Y)
    np.testing.assert_allclose(scores(model)[0], expected, rtol=1e-5, atol=1e-7)


def test_two_steps_of_momentum_are_those_of_a_calculation_by_hand(library):
    optimizer = library.optimizers.SGD(0.5, momentum=0.9, weight_decay=0.1)
    model = compiled(scored(library), library, optimizer)
    expected = [score.astype("float64") for score in scores(model)]
    velocity = [np.zeros_like(score) for score in expected]
    for _ in range(2):
        slopes = gradients(model)
        model.train_on_batch(X, Y)
        for i, weight in enumerate(dense(model)):
            slope = slopes[i] * weight * np.sign(expected[i])
            expected[i] = expected[i] * (1 - 0.5 * 0.1)
            velocity[i] = 0.9 * velocity[i] - 0.5 * slope
            expected[i] = expected[i] + velocity[i]
    for found, value in zip(scores(model), expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-6)
    assert_consistent(model)


def test_accumulated_gradients_are_those_of_scores():
    optimizer = keras.optimizers.SGD(0.5, gradient_accumulation_steps=2)
    model = compiled(scored(keras), keras, optimizer)
    was, weights, slopes = scores(model), dense(model), gradients(model)
    model.fit(X, Y, batch_size=32, verbose=0)
    assert model.pruner.steps == 1
    for now, score, weight, slope in zip(scores(model), was, weights, slopes, strict=True):
        expected = score - 0.5 * slope * weight * np.sign(score)
        np.testing.assert_allclose(now, expected, rtol=1e-4, atol=1e-6)


def test_clipping_is_of_the_gradients_of_scores(library):
    model = compiled(
        scored(library, also_train="none"), library, library.optimizers.SGD(1.0, clipvalue=1e-3)
    )
    was = scores(model)
    model.train_on_batch(X, Y)
    steps = [np.abs(now - before) for now, before in zip(scores(model), was, strict=True)]
    assert max(step.max() for step in steps) == pytest.approx(1e-3, rel=1e-3)


def test_masked_weights_come_back_where_they_are_of_use(library):
    """Of both signs. The three inputs that count have small weights, those of noise large ones."""
    model = dense_model(library, classes=2)
    hidden, last = model.layers[-2:]
    signs = np.repeat([1.0, -1.0], 4)
    hidden.kernel.assign(np.repeat([[0.3], [0.6]], 3, axis=0) * signs)
    last.kernel.assign(np.stack([-signs, signs], axis=1))
    x = np.random.default_rng(0).uniform(-0.5, 0.5, (256, 6)).astype("float32")
    y = (x[:, :3].sum(axis=1) > 0).astype("int32")
    scored(library, model=model, layers="hidden")
    before, weights = kernels(model)[0], dense(model)
    assert not before[:3].any()
    assert before[3:].all(), "by magnitude, all that is of use goes"
    compiled(model, library, library.optimizers.Adam(0.1))
    first = model.evaluate(x, y, verbose=0)
    model.fit(x, y, epochs=15, batch_size=64, verbose=0)
    kernel = kernels(model)[0]
    assert np.mean(kernel[:3] != 0) > 0.9
    np.testing.assert_array_equal(np.sign(kernel[kernel != 0]), np.sign(weights[0][kernel != 0]))
    assert model.evaluate(x, y, verbose=0) < 0.7 * first
    assert_same(dense(model), weights)


@pytest.mark.parametrize(
    "options",
    [{"jit_compile": True}, {"run_eagerly": True}, {"steps_per_execution": 2}],
    ids=str,
)
def test_every_way_to_run_gives_the_same_scores(options, library):
    model = scored(library)
    twin = scored(library, model=dense_model(library))
    twin.set_weights(model.get_weights())
    for name in ("dense", "scores", "masks"):
        for mine, theirs in zip(
            getattr(model.pruner.state, name), getattr(twin.pruner.state, name), strict=True
        ):
            theirs.assign(mine)
    twin.pruner.apply()
    compiled(model, library, **options).fit(X, Y, batch_size=16, shuffle=False, verbose=0)
    compiled(twin, library)
    for start in range(0, 64, 16):
        twin.train_on_batch(X[start : start + 16], Y[start : start + 16])
    for one, other in zip(scores(model), scores(twin), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert model.pruner.steps == 4
    assert_consistent(model)


def test_a_loop_of_ones_own_trains_scores_by_the_pruners_step(library):
    model, twin = (scored(library, model=m) for m in (dense_model(library), dense_model(library)))
    optimizer = library.optimizers.SGD(0.5)

    def step():
        with tf.GradientTape() as tape:
            value = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(Y, model(X, training=True))
            )
        variables = model.trainable_variables
        found = tape.gradient(value, variables)
        model.pruner.apply_gradients(optimizer, zip(found, variables, strict=True))
        model.pruner.step(optimizer)  # not needed, and does no harm

    for run in (step, tf.function(step)):
        was, weights, slopes = scores(model), dense(model), gradients(model)
        run()
        for now, score, weight, slope in zip(scores(model), was, weights, slopes, strict=True):
            expected = score - 0.5 * slope * weight * np.sign(score)
            np.testing.assert_allclose(now, expected, rtol=1e-5, atol=1e-7)
        assert_consistent(model)
    assert model.pruner.steps == 2
    with pytest.raises(RuntimeError, match="has changed the kernels"):
        optimizer.apply_gradients([(tf.ones_like(v), v) for v in model.trainable_variables])
        model.pruner.step(optimizer)
    with pytest.raises(RuntimeError, match="has changed the kernels of model"):
        tf.function(lambda: twin.pruner.step(optimizer))()
    assert "apply" not in vars(optimizer), "the optimizer is left as it was"
    assert "apply_gradients" not in vars(optimizer)


def test_a_step_that_fails_leaves_no_scores_in_the_kernels(library):
    model = scored(library)
    before = kernels(model)

    class Broken(library.optimizers.SGD):
        def update_step(self, *args, **kwargs):
            raise ZeroDivisionError

    pairs = [(tf.ones_like(variable), variable) for variable in model.trainable_variables]
    with pytest.raises(ZeroDivisionError):
        options = {} if library is keras else {"jit_compile": False}
        model.pruner.apply_gradients(Broken(0.1, **options), pairs)
    assert_same(kernels(model), before)


def test_the_masks_may_be_chosen_every_so_many_steps_and_at_the_end(library):
    model = compiled(scored(library, frequency=3), library)
    renewed = []
    for _ in range(5):
        before = kernels(model)
        model.train_on_batch(X, Y)
        renewed.append(any(np.any(b != k) for b, k in zip(before, kernels(model), strict=True)))
    assert not renewed[1]
    assert not renewed[2]
    assert renewed[3], "step 4 is the next after step 1"
    last = scores(model)
    pruning.freeze_mask(model)
    for kernel, score in zip(kernels(model), last, strict=True):
        np.testing.assert_array_equal(kernel != 0, top(score, score.size // 2))


@pytest.mark.parametrize("also_train", ["normalization", "all", "none"])
def test_what_else_is_trained_is_ones_choice(also_train, library):
    x, y = images(48)
    model = scored(library, model=conv_model(library), layers="conv", also_train=also_train)
    names = [f"{variable.name}{i}" for i, variable in enumerate(model.trainable_variables)]
    before = dict(zip(names, map(np.asarray, model.trainable_variables), strict=True))
    moving = np.asarray(model.get_layer("norm").moving_mean)
    compiled(model, library).fit(x, y, batch_size=16, verbose=0)
    moved = {
        index
        for index, (name, variable) in enumerate(zip(names, model.trainable_variables, strict=True))
        if np.any(np.asarray(variable) != before[name])
    }
    # conv: kernel, bias; norm: gamma, beta; logits: kernel, bias. A bias before a BatchNorm does
    # nothing, so whether rounding moves it is left open.
    expected = {"normalization": {2, 3}, "all": {2, 3, 4, 5}, "none": set()}[also_train]
    assert moved - {0, 1} == expected
    assert also_train == "all" or 1 not in moved
    assert np.any(moving != np.asarray(model.get_layer("norm").moving_mean))
    assert_consistent(model)


def test_mixed_precision_scales_the_loss_and_skips_what_overflows(library):
    library.mixed_precision.set_global_policy("mixed_float16")
    try:
        model = dense_model(library)
    finally:
        library.mixed_precision.set_global_policy("float32")
    scored(library, model=model)
    compiled(model, library, library.optimizers.SGD(0.5))
    was, weights, slopes = scores(model), dense(model), gradients(model)
    model.fit(X, Y, batch_size=64, verbose=0)
    for now, score, weight, slope in zip(scores(model), was, weights, slopes, strict=True):
        assert now.dtype == np.float32
        change = 0.5 * slope * weight * np.sign(score)
        np.testing.assert_allclose(score - now, change, atol=2e-3 * np.abs(change).max())
    assert_consistent(model)
    was = scores(model)
    model.fit(np.full_like(X, np.inf), Y, batch_size=64, verbose=0)
    assert_same(scores(model), was)
    assert_consistent(model)


# EMA


@pytest.mark.parametrize("overwrite", [None, 2])
def test_averages_are_of_scores_and_become_the_scores(overwrite, library):
    optimizer = library.optimizers.SGD(
        0.5, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=overwrite
    )
    model = compiled(scored(library), library, optimizer)
    expected = [score.astype("float64") for score in scores(model)]
    averages = [score.copy() for score in expected]
    for step in (1, 2, 3):
        slopes = gradients(model)
        model.train_on_batch(X, Y)
        for i, weight in enumerate(dense(model)):
            expected[i] = expected[i] - 0.5 * slopes[i] * weight * np.sign(expected[i])
            first = step == 1 and library is keras  # whose averages begin after the first step
            averages[i] = expected[i] if first else 0.5 * averages[i] + 0.5 * expected[i]
            if overwrite and step % overwrite == 0:
                expected[i] = averages[i].copy()
        assert_consistent(model)
        for found, value in zip(scores(model), expected, strict=True):
            np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-6)
    model.fit(X, Y, batch_size=64, verbose=0)
    for target, score in zip(model.pruner.targets, scores(model), strict=True):
        average = optimizers.average(model.optimizer, target.variable)
        np.testing.assert_array_equal(score, np.asarray(average))
    assert_consistent(model)


def test_an_optimizer_with_a_past_begins_anew_with_scores(library):
    """Its first step on scores is that of momentum from rest, and its average begins with them."""
    optimizer = library.optimizers.SGD(0.5, momentum=0.9, use_ema=True, ema_momentum=0.5)
    model = compiled(dense_model(library), library, optimizer)
    model.fit(X, Y, batch_size=16, verbose=0)
    scored(library, model=model)
    was, weights, slopes = scores(model), dense(model), gradients(model)
    model.train_on_batch(X, Y)
    for target, now, before, weight, slope in zip(
        model.pruner.targets, scores(model), was, weights, slopes, strict=True
    ):
        expected = before - 0.5 * slope * weight * np.sign(before)
        np.testing.assert_allclose(now, expected, rtol=1e-5, atol=1e-6)
        average = np.asarray(optimizers.average(optimizer, target.variable))
        np.testing.assert_allclose(average, 0.5 * (before + now), rtol=1e-5, atol=1e-6)


def test_tf_keras_legacy_optimizers_train_scores_too():
    optimizer = tf_keras.optimizers.legacy.SGD(0.5, momentum=0.9)
    model = compiled(scored(tf_keras), tf_keras, optimizer)
    was, weights, slopes = scores(model), dense(model), gradients(model)
    model.fit(X, Y, batch_size=64, verbose=0)
    for now, score, weight, slope in zip(scores(model), was, weights, slopes, strict=True):
        expected = score - 0.5 * slope * weight * np.sign(score)
        np.testing.assert_allclose(now, expected, rtol=1e-5, atol=1e-6)
    assert_consistent(model)


# Adversarial training


def trainer_of(model):
    attack = attacks.PGD(epsilon=0.05, steps=1)
    return AdversarialTraining(model, attack=attack, loss=losses.TRADES(6.0))


def test_adversarial_training_trains_scores_and_saves_them(library, tmp_path):
    x, y = images(48)
    model = scored(library, 0.75, conv_model(library), also_train="all")
    weights, was = dense(model), scores(model)
    trainer = trainer_of(model)
    trainer.compile(library.optimizers.SGD(0.2, momentum=0.9))
    used = callbacks.pruning_callbacks()
    trainer.fit(x, y, batch_size=16, verbose=0, shuffle=False, callbacks=used)
    assert model.pruner.steps == 3
    assert any(np.any(one != other) for one, other in zip(was, scores(model), strict=True))
    assert_same(dense(model), weights)
    assert_consistent(model, 0.25)
    trainer.save(tmp_path / "trainer.keras")
    other = library.models.load_model(tmp_path / "trainer.keras")
    assert_same(scores(other.model), scores(model))
    for each in (trainer, other):
        each.fit(x, y, batch_size=16, verbose=0, shuffle=False)
    assert_same(scores(other.model), scores(model))
    assert_same(other.model.get_weights(), model.get_weights())
    # and from there to fine-tuning, without compiling
    again = library.models.load_model(tmp_path / "trainer.keras")
    pruning.freeze_mask(again.model)
    for target in again.model.pruner.targets:
        (kept,) = optimizers.companions(again.optimizer, [target.variable])
        assert kept
        assert not any(np.any(np.asarray(slot)) for slot in kept), "momenta of scores are gone"
    zeros = [kernel == 0 for kernel in kernels(again.model)]
    before = kernels(again.model)
    again.fit(x, y, batch_size=16, verbose=0)
    for was, now, zero in zip(before, kernels(again.model), zeros, strict=True):
        assert not np.any(now[zero])
        assert np.any(now != was)


def test_another_trainer_that_only_evaluates_costs_no_momentum(library):
    x, y = images(48)
    ends = []
    for evaluated in (False, True):
        library.utils.set_random_seed(0)
        model = scored(library, 0.75, conv_model(library))
        trainer = trainer_of(model)
        trainer.compile(library.optimizers.SGD(0.2, momentum=0.9))
        trainer.fit(x, y, batch_size=16, verbose=0, shuffle=False)
        if evaluated:
            judge = trainer_of(model)
            judge.compile()
            judge.evaluate(x, y, verbose=0)
        trainer.fit(x, y, batch_size=16, verbose=0, shuffle=False)
        assert model.pruner.steps == 6
        ends.append(scores(model))
    assert_same(*ends)
    # Another optimizer that trains does begin anew.
    trainer.compile(library.optimizers.SGD(0.2, momentum=0.9))
    trainer.fit(x[:16], y[:16], batch_size=16, verbose=0)
    assert model.pruner.steps == 7


def test_a_trainer_made_before_trains_scores_too(library):
    model = dense_model(library)
    trainer = trainer_of(model)
    trainer.compile(library.optimizers.SGD(0.2))
    trainer.fit(X, Y, verbose=0)
    scored(library, model=model)
    was = scores(model)
    trainer.fit(X, Y, verbose=0)
    assert any(np.any(one != other) for one, other in zip(was, scores(model), strict=True))
    assert_consistent(model)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_two_replicas_take_the_steps_of_one_device(flavour):
    library = FLAVOURS[flavour]
    x, y = blobs(32)

    def after(scope):
        tf_keras.utils.set_random_seed(3)
        with scope:
            model = scored(library)
            attack = attacks.PGD(epsilon=0.1, steps=1, objective="cross_entropy", start="none")
            trainer = AdversarialTraining(model, attack=attack, loss=losses.Madry())
            trainer.compile(library.optimizers.SGD(0.5, momentum=0.9))
        trainer.fit(x, y, batch_size=32, epochs=3, verbose=0, shuffle=False)
        assert_consistent(model)
        return scores(model)

    devices = [device.name for device in tf.config.list_logical_devices("CPU")]
    strategy = tf.distribute.MirroredStrategy(
        devices, cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    one, two = after(tf.distribute.get_strategy().scope()), after(strategy.scope())
    for mine, theirs in zip(one, two, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


# A part of another model


def test_a_part_is_trained_by_scores_in_the_training_of_the_whole(library):
    def whole(inner):
        inputs = library.Input((6,))
        outputs = library.layers.Dense(3, name="head")(inner(inputs))
        return compiled(library.Model(inputs, outputs), library)

    inner = scored(library, model=dense_model(library, classes=4), also_train="all")
    model = whole(inner)
    head, weights, was = np.asarray(model.layers[-1].kernel), dense(inner), scores(inner)
    with pytest.raises(ValueError, match="pruned already"):
        scored(library, model=model)
    model.fit(X, Y, batch_size=16, verbose=0, callbacks=callbacks.pruning_callbacks())
    assert inner.pruner.steps == 4
    assert not {"apply", "apply_gradients"} & set(vars(model.optimizer)), "left as it was"
    assert any(np.any(one != other) for one, other in zip(was, scores(inner), strict=True))
    assert np.any(head != np.asarray(model.layers[-1].kernel))
    assert_same(dense(inner), weights)
    assert_consistent(inner)
    # What was compiled before it was pruned is compiled anew.
    late = dense_model(library, classes=4)
    model = whole(late)
    model.fit(X, Y, verbose=0)
    scored(library, model=late)
    weights, was = dense(late), scores(late)
    model.fit(X, Y, batch_size=16, verbose=0, callbacks=callbacks.pruning_callbacks())
    assert late.pruner.steps == 4
    assert any(np.any(one != other) for one, other in zip(was, scores(late), strict=True))
    assert_same(dense(late), weights)
    assert_consistent(late)


# Files, and weights from outside


def stage(library, model=None):
    model = scored(library, 0.75, model or conv_model(library), structure=Unstructured())
    compiled(model, library, library.optimizers.Adam(0.02))
    model.fit(*images(64), batch_size=16, verbose=0, shuffle=False)
    return model


def assert_alike(model, other):
    assert model.pruner.steps == other.pruner.steps == 4

    def compare():
        for values in (kernels, dense, scores, lambda each: each.get_weights()):
            assert_same(values(model), values(other))

    compare()
    for each in (model, other):
        each.fit(*images(64), batch_size=16, verbose=0, shuffle=False)
    compare()
    assert_consistent(other, 0.25)


def test_a_keras_file_in_the_middle_of_the_stage_goes_on_bit_for_bit(library, tmp_path):
    model = stage(library)
    model.save(tmp_path / "model.keras")
    other = library.models.load_model(tmp_path / "model.keras")
    assert repr(other.pruner) == repr(model.pruner)
    assert isinstance(other.pruner, ScorePruner)
    assert_alike(model, other)


@pytest.mark.parametrize("kind", ["weights", "checkpoint"])
def test_weight_files_and_checkpoints_hold_the_scores(kind, library, tmp_path):
    model, other = stage(library), stage(library)
    path = str(tmp_path / "model.weights.h5")
    if kind == "weights":
        model.save_weights(path)
        optimizer = model.optimizer.variables
        optimizer = optimizer if isinstance(optimizer, list) else optimizer()
        values = [np.asarray(variable) for variable in optimizer]
        other.load_weights(path)
        theirs = other.optimizer.variables
        for variable, value in zip(
            theirs if isinstance(theirs, list) else theirs(), values, strict=True
        ):
            variable.assign(value)
    else:
        path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(path)
        status = tf.train.Checkpoint(model=other, optimizer=other.optimizer).restore(path)
        status.assert_existing_objects_matched()
    assert_alike(model, other)


LOAD = """
import importlib, sys
import numpy as np
import tscnc_tf as tscnc
for flavour in ("keras", "tf_keras"):
    library, folder = importlib.import_module(flavour), sys.argv[1] + "/" + flavour
    model = library.models.load_model(folder + "_scored.keras")
    print(type(model.pruner).__name__, model.pruner.steps, model.pruner.frequency)
    np.savez(folder + ".npz", *[score.numpy() for score in model.pruner.state.scores])
    model = library.models.load_model(folder + "_frozen.keras")
    print(type(model.pruner).__name__, model.pruner.frozen)
    print(tscnc.pruning.report(tscnc.strip(model)).model_zeros)
"""


def test_a_fresh_process_needs_nothing_but_the_import(tmp_path):
    expected, printed = {}, []
    for flavour, library in sorted(FLAVOURS.items()):
        model = stage(library)
        model.save(tmp_path / f"{flavour}_scored.keras")
        expected[flavour] = scores(model)
        pruning.freeze_mask(model).save(tmp_path / f"{flavour}_frozen.keras")
        zeros = sum(int(np.sum(weight == 0)) for weight in model.get_weights())
        printed += ["ScorePruner 4 1", "Pruner True", str(zeros)]
    assert fresh_process(LOAD, tmp_path).splitlines() == printed
    for flavour, found in expected.items():
        with np.load(tmp_path / f"{flavour}.npz") as saved:
            assert_same(saved.values(), found)


def test_weights_from_outside_become_the_dense_ones(library):
    model = scored(library)
    compiled(model, library).fit(X, Y, batch_size=16, verbose=0)
    kept = [scores(model), dense(model), kernels(model)]
    model.set_weights(model.get_weights())  # no news
    assert_same(scores(model), kept[0])
    plain = dense_model(library)
    model.set_weights(plain.get_weights())
    given = [np.asarray(layer.kernel) for layer in plain.layers[-2:]]
    assert_same(dense(model), given)
    assert_consistent(model)
    for score, weight in zip(scores(model), given, strict=True):
        np.testing.assert_array_equal(
            np.argsort(np.abs(score), None), np.argsort(abs(weight), None)
        )
    nothing = [np.zeros_like(weight) for weight in plain.get_weights()]
    for bad in (nothing, [*plain.get_weights()[:2], np.full((8, 3), np.nan), np.zeros(3)]):
        with pytest.raises(ValueError, match=r"kernel '(hidden|logits)' has max\|w\| = (0|nan)"):
            model.set_weights(bad)
        assert_consistent(model)
        assert_same(dense(model), given)


def test_early_stopping_restores_the_masks_of_the_best_epoch(library):
    model = scored(library)
    compiled(model, library)
    weights, seen = dense(model), []

    class Watch(library.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(kernels(model))

    stopping = library.callbacks.EarlyStopping(
        "loss", mode="max", patience=3, restore_best_weights=True
    )
    model.fit(X, Y, batch_size=16, epochs=8, verbose=0, callbacks=[Watch(), stopping])
    assert any(np.any(a != b) for a, b in zip(seen[0], seen[-1], strict=True))
    assert_same(kernels(model), seen[0])
    assert_same(dense(model), weights)
    assert_consistent(model)
    model.train_on_batch(X, Y)
    for score, kernel in zip(scores(model), kernels(model), strict=True):
        assert np.all(score[kernel == 0] != 0), "masked weights still learn"


# What comes after


OPTIMIZERS = {
    "momentum": lambda o: o.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda o: o.Adam(0.01),
    "adamw": lambda o: o.AdamW(0.01, weight_decay=0.1),
    "ema": lambda o: o.SGD(0.1, use_ema=True, ema_overwrite_frequency=2),
}


@pytest.mark.parametrize(
    ("name", "anew"),
    [("momentum", False), ("adam", False), ("adamw", True), ("ema", True), ("ema", False)],
)
def test_after_freezing_weights_are_trained_and_zeros_stay(name, anew, library):
    make = OPTIMIZERS[name]
    model = compiled(scored(library, 0.75), library, make(library.optimizers))
    model.fit(X, Y, batch_size=16, epochs=2, verbose=0)
    chosen, steps = kernels(model), model.pruner.steps
    assert pruning.freeze_mask(model) is model
    assert type(model.pruner) is Pruner
    assert model.pruner.frozen
    assert model.pruner.steps == steps
    assert_same(kernels(model), chosen)
    if anew:
        compiled(model, library, make(library.optimizers))
    model.fit(X, Y, batch_size=16, epochs=2, verbose=0)
    for was, now in zip(chosen, kernels(model), strict=True):
        assert not np.any(now[was == 0])
        changed = np.abs(now - was)[was != 0]
        assert np.any(changed > 0)
        assert changed.max() < 0.9, "no momentum or average of scores gets in"
    report = pruning.report(model)
    assert [row.zeros for row in report.pruned] == [36, 18]
    assert pruning.strip(model) is model
    assert [row.sparsity for row in inspection.sparsity(model).prunable] == [0.75, 0.75]


def test_the_stage_reports_strips_and_exports_what_acts(library, tmp_path):
    model = stage(library)
    expected = kernels(model)
    assert [row.sparsity for row in pruning.report(model).pruned] == pytest.approx([0.75] * 2, 0.1)
    assert inspection.sparsity(model).sparsity == pytest.approx(0.75, abs=0.02)
    plain = type(model).__mro__[2]
    count = len(model.weights)
    x = images(4)[0]
    assert pruning.strip(model) is model
    assert type(model) is plain
    assert len(model.weights) == count
    assert_same([np.asarray(model.get_layer(n).kernel) for n in ("conv", "logits")], expected)
    tscnc.export_saved_model(model, tmp_path / "folder", expected_sparsity=0.7)
    loaded = tf.saved_model.load(str(tmp_path / "folder"))
    np.testing.assert_allclose(loaded.serve(x), model(x, training=False), atol=1e-6)


def test_subclassed_models_learn_scores(library):
    class Net(library.Model):
        def __init__(self):
            super().__init__()
            self.hidden, self.last = library.layers.Dense(8), library.layers.Dense(3)
            self.own = library.optimizers.SGD(0.5)

        def call(self, inputs):
            return self.last(tf.nn.relu(self.hidden(inputs)))

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                value = tf.reduce_mean(
                    tf.nn.sparse_softmax_cross_entropy_with_logits(y, self(x, training=True))
                )
            variables = self.trainable_variables
            pairs = zip(tape.gradient(value, variables), variables, strict=True)
            self.own.apply_gradients(pairs)
            return {"value": value}

    model = Net()
    model(X[:1])
    scored(library, model=model)
    weights, was = dense(model), scores(model)
    model.compile(run_eagerly=False)  # its own optimizer is not the one that it is compiled with
    model.fit(X, Y, batch_size=16, verbose=0, callbacks=callbacks.pruning_callbacks())
    assert model.pruner.steps == 4
    assert any(np.any(one != other) for one, other in zip(was, scores(model), strict=True))
    assert_same(dense(model), weights)
    assert_consistent(model)


# Bad input


def test_bad_input_is_named(library):
    def build(**options):
        return scored(library, **options)

    def zero():
        model = dense_model(library)
        model.layers[-1].kernel.assign(tf.zeros_like(model.layers[-1].kernel))
        return model

    def prune(*args, **options):
        return tscnc.prune(dense_model(library), *args, **options)

    once = schedules.OneShot(0.5)
    cases = [
        (lambda: build(sparsity=1.0), ValueError, "sparsity must be < 1"),
        (lambda: build(sparsity=95), ValueError, "0.95 keeps 5 %"),
        (lambda: build(sparsity="0.9"), TypeError, "sparsity must be a number"),
        (lambda: build(frequency=0), ValueError, "frequency must be >= 1"),
        (lambda: build(also_train="biases"), ValueError, "also_train must be one of 'norm"),
        (lambda: build(model=zero()), ValueError, r"kernel 'logits' has max\|w\| = 0.*layers="),
        (lambda: build(layers="no*"), ValueError, "no weight that can be pruned as asked"),
        (lambda: build(weights=3), TypeError, "weights must be a name pattern"),
        (lambda: build(structure="2:4"), TypeError, "structure must be Unstructured"),
        (lambda: build(engine="tfmot"), ValueError, "engine must be 'masks'.*got 'tfmot'"),
        (lambda: prune(method="scores"), TypeError, "sparsity must be given with method='scores'"),
        (
            lambda: prune(once, method="scores", sparsity=0.5),
            TypeError,
            "schedule must be left out with method='scores'",
        ),
        (lambda: prune(method="score"), ValueError, "method must be one of 'magnitude', 'scores'"),
        (
            lambda: prune(engine="masks"),
            TypeError,
            "schedule must be given with method='magnitude'.*Got schedule=None",
        ),
        (
            lambda: prune(),
            TypeError,
            "schedule must be given with method='magnitude'.*Got schedule=None",
        ),
        (lambda: prune_twice(build()), ValueError, "pruned already: strip it first"),
    ]

    def prune_twice(model):
        return scored(library, model=model)

    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()


def test_a_constraint_on_weights_is_a_reason_not_to_prune(library):
    model = dense_model(library, kernel_constraint=library.constraints.MaxNorm(1.0))
    with pytest.raises(ValueError, match="its constraint MaxNorm would act on the scores"):
        scored(library, model=model)


@settings(max_examples=4)
@given(st.integers(0, 10**6), st.floats(0.1, 0.97), st.sampled_from(["float32", "float64"]))
def test_what_acts_is_always_the_dense_weights_of_the_largest_scores(seed, sparsity, dtype):
    rng = np.random.default_rng(seed)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(7, dtype=dtype)])
    kernel = rng.integers(-2, 3, (5, 7)).astype(dtype)
    kernel[0, 0] = 2
    model.layers[-1].kernel.assign(kernel)
    pruner = ScorePruner(model, sparsity, min_weights=7)
    moves = rng.integers(-1, 2, (5, 7)) * 0.5
    optimizer = keras.optimizers.SGD(1.0)
    pairs = [(tf.constant(moves, dtype), model.layers[-1].kernel)]
    pruner.apply_gradients(optimizer, pairs)
    begun = np.sqrt(6 / 5) * kernel / 2
    score = begun - moves * kernel * np.sign(begun)
    np.testing.assert_allclose(scores(model)[0], score, rtol=1e-5, atol=1e-6)
    kept = max(int(np.round(np.float32(35) * (np.float32(1) - np.float32(sparsity)))), 7)
    expected = np.where(top(scores(model)[0], kept), kernel, 0)
    np.testing.assert_array_equal(kernels(model)[0], expected)


def test_scores_of_layers_with_lora_are_refused_by_name():
    model = dense_model(keras)
    model.get_layer("hidden").enable_lora(2)
    with pytest.raises(ValueError, match=r"without LoRA.*enabled in hidden. save_weights writes"):
        scored(keras, model=model)
    model = compiled(scored(keras), keras)
    model.get_layer("logits").enable_lora(2)
    with pytest.raises(ValueError, match=r"without LoRA.*enabled in logits. save_weights writes"):
        model.fit(X, Y, verbose=0)
