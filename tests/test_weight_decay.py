"""Weight decay in the gradient, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from helpers import FLAVOURS, blobs, conv_model, dense_model, images

import tscnc_tf as tscnc
from tscnc_tf._keras import flavours
from tscnc_tf.training import SGDWithL2

RATE, MOMENTUM, DECAY = 0.1, 0.9, 0.05


@pytest.fixture(params=FLAVOURS)
def name(request):
    return request.param


def sgd(name, **options):
    options = {"momentum": MOMENTUM, "weight_decay": DECAY, "library": name, **options}
    return SGDWithL2(options.pop("learning_rate", RATE), **options)


def by_hand(weight, gradients, rates, momentum=MOMENTUM, nesterov=False, decay=DECAY):
    """Return a weight after steps by PyTorch's formula, whose momentum has the rate outside."""
    weight, velocity = weight.astype("float64"), np.zeros(weight.shape)
    for gradient, rate in zip(gradients, rates, strict=True):
        whole = gradient + decay * weight
        velocity = momentum * velocity + whole
        weight = weight - rate * (whole + momentum * velocity if nesterov else velocity)
    return weight


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_the_formula_of_pytorch(name, momentum, nesterov, rng):
    optimizer = sgd(name, momentum=momentum, nesterov=nesterov)
    shapes = [(3, 4), (4,)]
    values = [rng.normal(size=shape).astype("float32") for shape in shapes]
    make = FLAVOURS[name].Variable if name == "keras" else tf.Variable
    variables = [make(value) for value in values]
    steps = [[rng.normal(size=shape).astype("float32") for shape in shapes] for _ in range(6)]
    for gradients in steps:
        pairs = [(tf.constant(g), v) for g, v in zip(gradients, variables, strict=True)]
        optimizer.apply_gradients(pairs)
    for index, variable in enumerate(variables):
        expected = by_hand(
            values[index], [step[index] for step in steps], [RATE] * 6, momentum, nesterov
        )
        np.testing.assert_allclose(np.asarray(variable), expected, rtol=2e-5, atol=1e-6)
    assert int(optimizer.iterations) == 6


def penalized(name, decay=DECAY):
    """A network whose loss has half the decay times the squared norm of all its weights."""
    half = {"class_name": "L2", "config": {"l2": decay / 2}}
    model = conv_model(FLAVOURS[name])
    config = model.get_config()
    for layer in config["layers"]:
        for kind in ("kernel", "bias", "gamma", "beta"):
            if f"{kind}_regularizer" in layer["config"]:
                layer["config"][f"{kind}_regularizer"] = half
    return type(model).from_config(config)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_training_is_as_with_the_penalty_in_the_loss(name, jit_compile):
    x, y = images(64)
    ours, theirs = conv_model(FLAVOURS[name]), penalized(name)
    theirs.set_weights(ours.get_weights())
    plain = FLAVOURS[name].optimizers.SGD(RATE, momentum=MOMENTUM, nesterov=True)
    logs = []
    for model, optimizer in ((ours, sgd(name, nesterov=True)), (theirs, plain)):
        trainer = tscnc.AdversarialTraining(
            model,
            attack=tscnc.attacks.PGD(epsilon=0.1, steps=2),
            loss=tscnc.losses.TRADES(beta=3.0),
        )
        trainer.compile(optimizer=optimizer, jit_compile=jit_compile)
        logs.append(trainer.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0).history)
    for mine, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=2e-5)
    assert logs[0]["penalty"] == [0.0, 0.0]
    assert min(logs[1]["penalty"]) > 0.1
    np.testing.assert_allclose(logs[0]["robust_loss"], logs[1]["robust_loss"], rtol=1e-3)


def accumulating(name):
    return sgd(name, gradient_accumulation_steps=2)


WAYS = {
    "plain": (sgd, {}),
    "clipped": (lambda name: sgd(name, clipnorm=1e-3), {}),
    "float16": (sgd, {"dtype": "mixed_float16"}),
    "bfloat16": (sgd, {"dtype": "mixed_bfloat16"}),
    "averages": (lambda name: sgd(name, use_ema=True, ema_momentum=0.5), {}),
    "accumulated": (accumulating, {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_acts_once_in_each_step(name, way):
    """On black images the kernel's gradient is zero, so that all its change is decay."""
    if way == "accumulated" and name == "tf_keras":
        with pytest.raises(TypeError, match="gradient_accumulation_steps"):
            WAYS[way][0](name)  # there is no such thing in tf_keras
        return
    make, options = WAYS[way]
    model = dense_model(FLAVOURS[name], **options)
    before = np.asarray(model.get_layer("hidden").kernel)
    kernels = []

    class Recorder(flavours.Callback):
        def on_train_batch_end(self, batch, logs=None):
            kernels.append(model.get_layer("hidden").get_weights()[0])

    loss = FLAVOURS[name].losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = make(name)
    if way == "float16" and name == "tf_keras":
        optimizer = FLAVOURS[name].mixed_precision.LossScaleOptimizer(optimizer)
    if way == "float16" and name == "keras":
        optimizer = FLAVOURS[name].optimizers.LossScaleOptimizer(optimizer)
    model.compile(optimizer, loss)
    x, y = np.zeros((32, 6), np.float32), np.arange(32) % 3
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[Recorder()])
    steps = 2 if way == "accumulated" else 4
    expected = by_hand(before, [0.0] * steps, [RATE] * steps)
    assert np.max(np.abs(expected / before - 1)) > 0.01
    np.testing.assert_allclose(kernels[-1], expected, rtol=1e-5)


def test_it_acts_once_under_a_strategy_of_two_replicas(name):
    strategy = tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    with strategy.scope():
        model = dense_model(FLAVOURS[name])
        loss = FLAVOURS[name].losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(sgd(name), loss, jit_compile=False)
    before = np.asarray(model.get_layer("hidden").kernel)
    x, y = np.zeros((24, 6), np.float32), np.arange(24) % 3
    model.fit(x, y, batch_size=8, verbose=0)
    expected = by_hand(before, [0.0] * 3, [RATE] * 3)
    np.testing.assert_allclose(np.asarray(model.get_layer("hidden").kernel), expected, rtol=1e-5)


def test_what_is_pruned_stays_zero_and_the_rest_decays(name):
    model = tscnc.prune_now(dense_model(FLAVOURS[name]), 0.5, layers="hidden")
    before = np.asarray(model.get_layer("hidden").kernel)
    loss = FLAVOURS[name].losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(sgd(name), loss)
    model.fit(np.zeros((32, 6), np.float32), np.arange(32) % 3, batch_size=8, verbose=0)
    after = np.asarray(model.get_layer("hidden").kernel)
    assert np.mean(after == 0.0) == 0.5
    np.testing.assert_allclose(after, by_hand(before, [0.0] * 4, [RATE] * 4), rtol=1e-5)


def test_scores_decay_in_place_of_frozen_weights(name):
    model = dense_model(FLAVOURS[name])
    before = np.asarray(model.get_layer("hidden").kernel)
    model = tscnc.prune(model, method="scores", sparsity=0.5, layers="hidden")
    (_, _, score), *_ = model.pruner.triples()
    scores = np.asarray(score)
    loss = FLAVOURS[name].losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(sgd(name), loss)
    model.fit(np.zeros((32, 6), np.float32), np.arange(32) % 3, batch_size=8, verbose=0)
    np.testing.assert_allclose(np.asarray(score), by_hand(scores, [0.0] * 4, [RATE] * 4), rtol=1e-5)
    after = np.asarray(model.get_layer("hidden").kernel)
    np.testing.assert_array_equal(after, np.where(after == 0.0, 0.0, before))


def test_weights_can_be_left_out(name):
    model = dense_model(FLAVOURS[name])
    optimizer = sgd(name)
    optimizer.exclude_from_weight_decay(var_list=[model.get_layer("hidden").kernel])
    before = model.get_layer("hidden").get_weights()
    kernel = np.asarray(model.get_layer("logits").kernel)
    loss = FLAVOURS[name].losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    model.fit(np.zeros((8, 6), np.float32), np.arange(8) % 3, batch_size=8, verbose=0)
    np.testing.assert_array_equal(model.get_layer("hidden").get_weights()[0], before[0])
    assert np.all(np.abs(np.asarray(model.get_layer("logits").kernel)) < np.abs(kernel))


def test_a_saved_model_goes_on_with_its_optimizer(name, tmp_path):
    x, y = blobs(32)
    library = FLAVOURS[name]
    loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = dense_model(library)
    schedule = library.optimizers.schedules.CosineDecay(RATE, 20)
    model.compile(sgd(name, learning_rate=schedule, nesterov=True), loss)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    other = library.models.load_model(tmp_path / "model.keras")
    assert type(other.optimizer) is type(model.optimizer)
    assert other.optimizer.get_config() == model.optimizer.get_config()
    assert other.optimizer.get_config()["weight_decay"] == DECAY
    for each in (model, other):
        each.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    for mine, theirs in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_the_optimizer_is_one_of_its_keras(name):
    optimizer = sgd(name)
    assert isinstance(optimizer, FLAVOURS[name].optimizers.SGD)
    assert isinstance(optimizer, SGDWithL2)
    copy = type(optimizer).from_config(optimizer.get_config())
    assert type(copy) is type(optimizer)
    assert isinstance(SGDWithL2(), FLAVOURS["keras"].optimizers.SGD)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be >= 0, got -1"),
        ({"weight_decay": "much"}, TypeError, "weight_decay must be a number"),
        ({"library": "torch"}, ValueError, "library must be one of 'keras', 'tf_keras', got"),
    ],
)
def test_errors_name_the_argument(options, kind, words):
    with pytest.raises(kind, match=words):
        SGDWithL2(0.1, **options)
