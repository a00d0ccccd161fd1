"""Importance by gradient times weight: values by hand, masks, attacks, what is refused."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import FLAVOURS, blobs, conv_model, dense_model, images

import tscnc_tf as tscnc
from tscnc_tf import attacks, losses, pruning, schedules
from tscnc_tf._keras.flavours import tensor_variable
from tscnc_tf.pruning import Filters, Pruner, Regrowth, Taylor, Unstructured

X, Y = blobs(20)


@pytest.fixture(params=FLAVOURS)
def library(request):
    return FLAVOURS[request.param]


def linear(library):
    """One dense layer, whose gradients are known in closed form."""
    library.utils.set_random_seed(1)
    return library.Sequential(
        [library.layers.InputLayer((6,)), library.layers.Dense(3, name="logits")]
    )


def errors(x, weight):
    """The gradient of each example's cross-entropy by its logits, of a layer without a bias."""
    logits = x @ weight
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True) - np.eye(3)[Y]


def importance(weight, x, batch_size):
    squares = 0.0
    for start in range(0, len(x), batch_size):
        batch = slice(start, start + batch_size)
        gradient = x[batch].T @ errors(x, weight)[batch] / len(x[batch])
        squares = squares + len(x[batch]) / len(x) * gradient**2
    return np.abs(weight) * np.sqrt(squares)


def best(scores, count):
    """True at the `count` largest scores."""
    return scores >= np.sort(scores.ravel())[-count]


@pytest.mark.parametrize("epsilon", [None, 0.1])
@pytest.mark.parametrize("batch_size", [20, 8])
def test_what_is_kept_is_what_the_loss_needs(library, epsilon, batch_size):
    model = linear(library)
    weight = np.asarray(model.layers[-1].kernel, np.float64)
    x, attack = X.astype(np.float64), None
    if epsilon:
        x = x + epsilon * np.sign(errors(x, weight) @ weight.T)
        attack = attacks.FGSM(epsilon=epsilon, bounds=(-1.0, 2.0))
    criterion = Taylor(X, Y, attack=attack, batch_size=batch_size)
    wanted = importance(weight, x, batch_size)
    (found,) = criterion.importance(model, [model.layers[-1].kernel])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-8)
    pruned = tscnc.prune_now(model, 0.75, criterion=criterion)
    kept = np.asarray(pruned.layers[-1].kernel)
    np.testing.assert_array_equal(kept, np.where(best(wanted, 4), weight, 0).astype(np.float32))
    assert np.any(best(wanted, 4) != best(np.abs(weight), 4))


def test_structures_and_scopes_take_it(library):
    x, y = images(24)
    library.utils.set_random_seed(0)
    model = conv_model(library)
    targets = [model.get_layer("conv").kernel, model.get_layer("logits").kernel]
    scores = [np.asarray(each) for each in Taylor(x, y).importance(model, targets)]
    every = np.concatenate([each.ravel() for each in scores])
    wanted = [each >= np.sort(every)[-36] for each in scores]
    single = tscnc.prune_now(clone(library, model), 0.5, criterion=Taylor(x, y), scope="global")
    for name, mask in zip(("conv", "logits"), wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(single.get_layer(name).kernel) != 0, mask)
    whole = tscnc.prune_now(clone(library, model), 0.5, criterion=Taylor(x, y), structure=Filters())
    alive = np.any(np.asarray(whole.get_layer("conv").kernel), axis=(0, 1, 2))
    np.testing.assert_array_equal(alive, best(scores[0].mean(axis=(0, 1, 2)), 3))


def clone(library, model):
    copy = library.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


@pytest.mark.parametrize("loss", [losses.TRADES(3.0), losses.MART(2.0)])
def test_the_loss_is_that_of_a_trainer(library, loss):
    """The update of plain SGD by a trainer is the gradient of its loss; there is no BatchNorm."""
    library.utils.set_random_seed(0)
    model = dense_model(library)
    attack = attacks.PGD(epsilon=0.1, steps=2, objective="cross_entropy", start="none")
    before = [np.asarray(layer.kernel, np.float64) for layer in model.layers[-2:]]
    kernels = [layer.kernel for layer in model.layers[-2:]]
    found = Taylor(X, Y, attack=attack, loss=loss).importance(model, kernels)
    trainer = tscnc.AdversarialTraining(model, attack=attack, loss=loss)
    trainer.compile(library.optimizers.SGD(1.0))
    trainer.train_on_batch(X, Y)
    for kernel, old, each in zip(kernels, before, found, strict=True):
        update = np.abs(np.asarray(kernel, np.float64) - old)
        np.testing.assert_allclose(each, np.abs(old) * update, atol=1e-6)


def test_the_network_runs_as_at_inference(library):
    model = conv_model(library)
    norm = model.get_layer("norm")
    norm.moving_mean.assign(np.linspace(-1, 1, 6))
    before = [np.asarray(weight) for weight in model.weights]
    kernel = model.get_layer("conv").kernel
    x, y = images(24)
    (found,) = Taylor(x, y).importance(model, [kernel])
    with tf.GradientTape() as tape:
        logits = model(x, training=False)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits))
    gradient = tape.gradient(loss, tensor_variable(kernel))
    np.testing.assert_allclose(found, np.abs(gradient * np.asarray(kernel)), rtol=1e-4, atol=1e-8)
    for weight, old in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(np.asarray(weight), old)


def test_masks_begin_by_it_and_regrow(tmp_path):
    model = linear(keras)
    weight = np.asarray(model.layers[-1].kernel)
    regrowth = Regrowth(0.5, frequency=10, steps=100)
    schedule = schedules.OneShot(0.75)
    model = tscnc.prune(model, schedule, criterion=Taylor(X, Y), regrowth=regrowth)
    wanted = best(importance(weight, X, 128), 4)
    np.testing.assert_array_equal(np.asarray(model.layers[-1].kernel) != 0, wanted)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, jit_compile=False)
    model.train_on_batch(X, Y)
    np.testing.assert_array_equal(np.asarray(model.layers[-1].kernel) != 0, wanted)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.pruner.state.masks[0], wanted)


def test_floors_hold():
    model = linear(keras)
    structure = Unstructured(min_per_filter=1, min_per_input=1)
    model = tscnc.prune_now(model, 0.6, criterion=Taylor(X, Y), structure=structure)
    kept = np.asarray(model.layers[-1].kernel) != 0
    assert kept.any(axis=0).all()
    assert kept.any(axis=1).all()


def test_what_does_not_work_is_refused_by_name():
    model = dense_model(keras)
    with pytest.raises(ValueError, match=r"measured once.*prune_now"):
        Pruner(model, schedules.CosineSparsity(0.0, 0.5, 0, 10), criterion=Taylor(X, Y))
    with pytest.raises(ValueError, match="measured once"):
        pruning.prune(model, schedules.OneShot(0.5, begin_step=9), criterion=Taylor(X, Y))
    assert not hasattr(model, "pruner")
    with pytest.raises(TypeError, match="follow the gradient"):
        Taylor(X, Y, attack=attacks.Square(epsilon=0.1))
    with pytest.raises(TypeError, match=r"loss must be one of tscnc_tf\.losses"):
        Taylor(X, Y, loss=tf.reduce_mean)
    with pytest.raises(ValueError, match="same number of examples, at least one, got shapes"):
        Taylor(X, Y[:3])
    assert "<20 examples>" in repr(Taylor(X, Y))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (Y + 1, r"y must be in 0 \.\.\. 2, for the model has 3 outputs, got labels from 1 to 3"),
        (Y - 1, "y must hold class indices >= 0, got labels from -1 to 1"),
        (np.eye(3)[Y] * 2, "y must hold one-hot or soft labels"),
        (np.eye(4)[Y], r"one-hot of shape \(batch, 3\)"),
        (Y.astype("float32"), "y must hold integers"),
    ],
)
def test_labels_are_those_that_a_trainer_takes(library, labels, words):
    model = linear(library)
    with pytest.raises(ValueError, match=words):
        tscnc.prune_now(model, 0.5, criterion=Taylor(X, labels))
    assert not hasattr(model, "pruner")
    tscnc.prune_now(model, 0.5, criterion=Taylor(X, np.eye(3)[Y]))


def test_inputs_are_those_that_an_attack_takes(library):
    attack = attacks.FGSM(epsilon=0.1)
    for x, words in (
        (3 * X, r"x must lie within bounds=\(0\.0, 1\.0\), got values from .* to"),
        (np.where(X > 0.5, np.nan, X), "x must be finite"),
        (np.uint8(X), "x must be of a float dtype"),
    ):
        with pytest.raises(ValueError, match=words):
            Taylor(x, Y, attack=attack)
    with pytest.raises(ValueError, match="model must"):
        Taylor(X, Y).importance(library.Sequential([linear(library), library.layers.Dense(1)]), [])
    wide = Taylor(3 * X, Y, attack=attacks.FGSM(epsilon=0.1, bounds=(0.0, 3.0)))
    tscnc.prune_now(linear(library), 0.5, criterion=wide)


def test_many_importances_give_no_warning_of_retracing(caplog):
    model = linear(FLAVOURS["keras"])
    for _ in range(6):  # TensorFlow warns of five
        Taylor(X, Y).importance(model, [model.layers[-1].kernel])
    assert "retracing" not in caplog.text


def test_an_embedding_is_ranked_as_the_dense_layer_of_its_one_hot_words(library):
    rng, layers = np.random.default_rng(0), library.layers
    words, y = rng.integers(0, 20, (64, 5)), rng.integers(0, 3, 64)
    embedded = library.Sequential(
        [
            layers.InputLayer((5,), dtype="int32"),
            layers.Embedding(20, 8, name="words"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(3),
        ]
    )
    dense = library.Sequential(
        [layers.InputLayer((20,)), layers.Dense(8, use_bias=False, name="words"), layers.Dense(3)]
    )
    dense.set_weights(embedded.get_weights())
    inputs = np.eye(20, dtype="float32")[words].mean(axis=1)
    for model, x in ((embedded, words), (dense, inputs)):
        pruning.prune_now(model, 0.5, layers="words", criterion=Taylor(x, y))
    kept, wanted = (model.get_weights()[0] != 0 for model in (embedded, dense))
    np.testing.assert_array_equal(kept, wanted)
    assert kept.mean() == 0.5
