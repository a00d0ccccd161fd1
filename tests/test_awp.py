"""Adversarial weight perturbation, against a computation by NumPy."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import FLAVOURS, blobs, conv_model, dense_model, images

import tscnc_tf as tscnc
from tscnc_tf.training import AWP

RATE, GAMMA = 0.5, 0.2


@pytest.fixture(params=FLAVOURS)
def name(request):
    return request.param


def trainer_for(model, name, *, awp=None, loss=None, jit_compile=False, **options):
    """A trainer whose adversary next to stands still."""
    trainer = tscnc.AdversarialTraining(
        model,
        attack=tscnc.attacks.PGD(epsilon=1e-7, steps=1, start="none"),
        loss=loss or tscnc.losses.Madry(),
        awp=awp,
    )
    trainer.compile(
        optimizer=FLAVOURS[name].optimizers.SGD(RATE, **options), jit_compile=jit_compile
    )
    return trainer


def linear(name, **options):
    library = FLAVOURS[name]
    inputs = library.Input((6,))
    return library.Model(inputs, library.layers.Dense(3, name="logits", **options)(inputs))


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def slopes(kernel, bias, x, y):
    error = (softmax(x @ kernel + bias) - np.eye(3)[y]) / len(x)
    return x.T @ error, error.sum(axis=0)


def by_hand(kernel, bias, x, y, mask, steps, penalty=0.0):
    """Return kernel and bias after steps of descent at the perturbed kernel.

    The penalty, times the square of each weight, is that of the kernel itself.
    """
    for _ in range(steps):
        slope = slopes(kernel, bias, x, y)[0] * mask
        perturbed = kernel + GAMMA * np.linalg.norm(kernel) * slope / np.linalg.norm(slope)
        of_kernel, of_bias = slopes(perturbed, bias, x, y)
        of_kernel = of_kernel + 2 * penalty * kernel
        kernel, bias = (kernel - RATE * of_kernel) * mask, bias - RATE * of_bias
    return kernel, bias


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_each_step_descends_at_the_perturbed_weights(name, sparsity, jit_compile):
    model = linear(name)
    if sparsity:
        tscnc.prune_now(model, sparsity)
    kernel, bias = (weight.astype("float64") for weight in model.get_weights())
    mask = kernel != 0
    assert mask.mean() == 1 - sparsity
    x, y = blobs(32)
    trainer = trainer_for(model, name, awp=AWP(GAMMA), jit_compile=jit_compile)
    trainer.fit(x, y, batch_size=32, epochs=5, verbose=0)
    expected = by_hand(kernel, bias, x.astype("float64"), y, mask, 5)
    for mine, theirs, start in zip(model.get_weights(), expected, (kernel, bias), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=2e-6)
        assert np.max(np.abs(mine - start)) > 1e-2
    np.testing.assert_array_equal(model.get_weights()[0] == 0, ~mask)


def test_penalties_are_those_of_the_weights_themselves(name):
    model = linear(name, kernel_regularizer=FLAVOURS[name].regularizers.L2(0.3))
    kernel, bias = model.get_weights()
    x, y = blobs(32)
    trainer_for(model, name, awp=AWP(GAMMA)).fit(x, y, batch_size=32, verbose=0)
    expected = by_hand(kernel, bias, x, y, np.ones_like(kernel), 1, penalty=0.3)
    for mine, theirs in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [tscnc.losses.TRADES(beta=3.0), tscnc.losses.MART()], ids=repr)
def test_batch_norm_and_the_schedule_see_one_step(name, loss):
    """At a tiny gamma a step is that without perturbation: moving statistics, masks, counters."""
    x, y = images(32)
    schedule = tscnc.schedules.CosineSparsity(0.0, 0.5, begin_step=0, end_step=4, frequency=1)
    ours, theirs = conv_model(FLAVOURS[name]), conv_model(FLAVOURS[name])
    theirs.set_weights(ours.get_weights())
    zeros = []
    for model, awp in ((ours, AWP(1e-7)), (theirs, None)):
        model = tscnc.prune(model, schedule, engine="masks")
        trainer = trainer_for(model, name, awp=awp, loss=loss)
        trainer.fit(x, y, batch_size=16, epochs=1, shuffle=False, verbose=0)
        zeros.append(tscnc.inspection.sparsity(model).sparsity)
    assert 0 < zeros[0] == zeros[1] < 0.5
    for mine, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-5)


def test_it_begins_when_it_is_set(name):
    x, y = blobs(32)
    ours, theirs = linear(name), linear(name)
    theirs.set_weights(ours.get_weights())
    trainer, other = trainer_for(ours, name), trainer_for(theirs, name)
    for each in (trainer, other):
        each.fit(x, y, batch_size=32, verbose=0)
    np.testing.assert_array_equal(ours.get_weights()[0], theirs.get_weights()[0])
    kernel, bias = ours.get_weights()
    trainer.awp = AWP(GAMMA)
    for each in (trainer, other):
        each.fit(x, y, batch_size=32, verbose=0)
    expected = by_hand(kernel, bias, x, y, np.ones_like(kernel), 1)
    np.testing.assert_allclose(ours.get_weights()[0], expected[0], rtol=1e-4, atol=1e-6)
    assert np.max(np.abs(ours.get_weights()[0] - theirs.get_weights()[0])) > 1e-3


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_in_half_precision_the_weights_stay_their_own(name, policy):
    """A kernel without a slope is put back as it was."""
    model = dense_model(FLAVOURS[name], dtype=policy)
    before = model.get_layer("hidden").get_weights()[0]
    trainer = trainer_for(model, name, awp=AWP(GAMMA))
    x, y = blobs(16)
    trainer.fit(np.zeros_like(x), y, batch_size=8, verbose=0)
    np.testing.assert_allclose(model.get_layer("hidden").get_weights()[0], before, atol=1e-6)
    trainer.fit(x, y, batch_size=8, verbose=0)
    after = model.get_layer("hidden").get_weights()[0]
    assert np.all(np.isfinite(after)) and np.max(np.abs(after - before)) > 1e-3


def test_an_overflow_in_float16_lowers_the_loss_scale_and_spoils_nothing(name):
    library = FLAVOURS[name]
    layers = library.layers
    model = library.Sequential(
        [
            library.Input((6,)),
            layers.Dense(8, dtype="mixed_float16"),
            layers.Dense(8, dtype="mixed_float16"),
            layers.BatchNormalization(dtype="mixed_float16"),
            layers.Dense(3, dtype="float32"),
        ]
    )
    attack = tscnc.attacks.PGD(epsilon=1.0, step_size=1.0, steps=1, bounds=(0.0, 255.0))
    loss = tscnc.losses.TRADES(beta=3.0)
    trainer = tscnc.AdversarialTraining(model, attack=attack, loss=loss, awp=AWP(0.005))
    optimizers = library.mixed_precision if name == "tf_keras" else library.optimizers
    optimizer = optimizers.LossScaleOptimizer(library.optimizers.SGD(1e-5))
    trainer.compile(optimizer)
    rng = np.random.default_rng(0)
    x = rng.uniform(150, 255, (512, 6)).astype("float32")
    history = trainer.fit(x, rng.integers(0, 3, 512), batch_size=512, epochs=20, verbose=0)
    assert np.isfinite(history.history["loss"][-1])
    assert all(np.all(np.isfinite(weight)) for weight in model.get_weights())
    assert int(np.asarray(optimizer.inner_optimizer.iterations)) > 5


def test_without_a_trainable_kernel_nothing_is_perturbed(name):
    x, y = blobs(16)
    start = linear(name).get_weights()

    def trained(awp):
        library, frozen = FLAVOURS[name], linear(name)
        frozen.set_weights(start)
        frozen.trainable = False
        inputs = library.Input((6,))
        model = library.Model(inputs, frozen(library.layers.BatchNormalization()(inputs)))
        trainer_for(model, name, awp=awp).fit(x, y, batch_size=8, shuffle=False, verbose=0)
        return model.get_weights()

    for mine, other in zip(trained(AWP(GAMMA)), trained(None), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_it_works_while_scores_are_trained(name):
    model = dense_model(FLAVOURS[name])
    model = tscnc.prune(model, method="scores", sparsity=0.5, layers="hidden")
    dense = np.asarray(model.pruner.triples()[0][1])
    x, y = blobs(32)
    trainer_for(model, name, awp=AWP(GAMMA), momentum=0.9).fit(x, y, batch_size=8, verbose=0)
    after = model.get_layer("hidden").get_weights()[0]
    assert np.mean(after == 0) == 0.5
    np.testing.assert_array_equal(after, np.where(after == 0, 0, dense))


def test_a_saved_trainer_has_it(name, tmp_path):
    trainer = trainer_for(linear(name), name, awp=AWP(GAMMA))
    trainer.save(tmp_path / "trainer.keras")
    loaded = FLAVOURS[name].models.load_model(tmp_path / "trainer.keras")
    assert loaded.awp == AWP(GAMMA)
    trainer.awp = None
    assert "awp" not in trainer.get_config()


def test_several_replicas_are_refused():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        trainer = trainer_for(linear("keras"), "keras", awp=AWP())
    x, y = blobs(16)
    with pytest.raises(ValueError, match="awp must be None under a strategy of several replicas"):
        trainer.fit(x, y, batch_size=16, verbose=0)
    keras.backend.clear_session()


def test_errors_name_the_argument():
    for gamma in (0.0, -1.0):
        with pytest.raises(ValueError, match="gamma must be > 0"):
            AWP(gamma)
    with pytest.raises(TypeError, match=r"awp must be None or an AWP, .*got 0\.005"):
        trainer_for(linear("keras"), "keras", awp=0.005)
    trainer = trainer_for(linear("keras"), "keras")
    with pytest.raises(TypeError, match="awp must be None or an AWP"):
        trainer.awp = "yes"


def test_weights_and_the_scores_that_choose_them_are_not_perturbed_together(name):
    model = tscnc.prune(
        dense_model(FLAVOURS[name]), method="scores", sparsity=0.5, perturb_scores=0.1
    )
    trainer = trainer_for(model, name, awp=AWP(GAMMA))
    with pytest.raises(ValueError, match=r"awp must be None for a model of perturb_scores=0\.1"):
        trainer.fit(*blobs(32), verbose=0)
