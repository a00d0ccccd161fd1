"""Effective sparsity: weights on paths, held against the gradient of a network of magnitudes."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import FLAVOURS, dense_model

import tscnc_tf as tscnc
from tscnc_tf import applications, inspection
from tscnc_tf._keras.flavours import tensor_variable


@pytest.fixture(params=FLAVOURS)
def library(request):
    return FLAVOURS[request.param]


def chain(k):
    """Convolutions of all kinds, BatchNorm, pooling, Flatten, dense layers; no padding."""
    layers = k.layers
    inputs = k.Input((10, 10, 4))
    x = layers.Conv2D(8, 3, name="conv")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU()(x)
    x = layers.DepthwiseConv2D(2, depth_multiplier=2, name="depthwise")(x)
    x = layers.Conv2D(8, 1, groups=4, activation="relu", name="grouped")(x)
    x = layers.MaxPooling2D(1)(x)
    x = layers.SeparableConv2D(6, 2, name="separable")(x)
    x = layers.Conv2DTranspose(5, 1, name="transposed")(x)
    x = layers.AveragePooling2D(3)(x)
    x = layers.Flatten()(x)
    x = layers.Dense(7, activation="relu", name="hidden")(x)
    return k.Model(inputs, layers.Dense(4, activation="softmax", name="last")(x))


def branches(k):
    """A residual block, a concatenation, and two outputs that share a part."""
    layers = k.layers
    inputs = k.Input((6, 6, 3))
    first = layers.Conv2D(5, 1, name="stem")(inputs)
    x = layers.BatchNormalization(name="norm")(first)
    x = layers.Activation("relu")(x)
    x = layers.Conv2D(5, 1, name="inner")(x)
    x = layers.Add()([first, x])
    y = layers.Conv2D(4, 1, name="side")(inputs)
    z = layers.Concatenate()([x, y])
    gate = layers.Dense(9, activation="sigmoid", name="gate")(layers.GlobalAveragePooling2D()(z))
    z = layers.Average()([layers.GlobalAveragePooling2D()(z), gate])
    return k.Model(inputs, [layers.Dense(3, name="one")(z), layers.Dense(2, name="two")(gate)])


def thin_out(model, rng, share):
    """Set a share of all kernels to zero, a scale as well; biases are not zero."""
    kernels = {id(variable) for variable in found(model)}
    for weight in model.weights:
        values = np.abs(rng.normal(1.0, 0.3, weight.shape)) + 0.1
        if id(weight) in kernels:
            values = values * rng.choice([-1, 1], weight.shape)
            values[rng.uniform(size=weight.shape) < share] = 0.0
        weight.assign(values)
    gamma = model.get_layer("norm").gamma
    gamma.assign(np.where(np.arange(gamma.shape[0]) == 1, 0.0, gamma))


def found(model):
    return [weight.variable for weight in inspection.weights.listed(model)]


def on_paths(model, kernels):
    """The weights by which the outputs change if all are taken by their magnitudes.

    Without biases, activations and gates, and with a 1 for each input.
    """
    before = model.get_weights()
    keep = {id(variable) for variable in kernels}
    for weight in model.weights:
        name = getattr(weight, "path", weight.name)
        values = np.abs(weight)
        if id(weight) not in keep and "gamma" not in name and "variance" not in name:
            values = np.zeros_like(values)
        weight.assign(values)
    linear = model.__class__.from_config(without_activations(model.get_config()))
    linear.set_weights(model.get_weights())
    model.set_weights(before)
    places = [index for index, weight in enumerate(model.weights) if id(weight) in keep]
    order = [next(i for i, w in enumerate(model.weights) if w is v) for v in kernels]
    assert sorted(order) == places
    watched = [tensor_variable(linear.weights[index]) for index in order]
    with tf.GradientTape() as tape:
        outputs = tf.nest.flatten(linear(np.ones((1, *model.input_shape[1:]), np.float32)))
        total = tf.add_n([tf.reduce_sum(each) for each in outputs])
    gradients = tape.gradient(total, watched, unconnected_gradients="zero")
    return [
        (np.asarray(gradient) > 0) & (np.asarray(variable) != 0)
        for gradient, variable in zip(gradients, kernels, strict=True)
    ]


def without_activations(config):
    text = json.dumps(config)
    for name in ("relu", "softmax", "sigmoid"):
        text = text.replace(f'"activation": "{name}"', '"activation": "linear"')
    return json.loads(text)


@pytest.mark.parametrize("build", [chain, branches])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_the_weights_on_paths_are_those_whose_gradient_is_not_zero(library, build, share, rng):
    for _ in range(3):
        model = build(library)
        thin_out(model, rng, share)
        report = inspection.sparsity(model)
        kernels = found(model)
        wanted = [int(mask.sum()) for mask in on_paths(model, kernels)]
        rows = zip(report.rows, report.effective_zeros, strict=True)
        assert [row.weights - zeros for row, zeros in rows] == wanted
        total = sum(row.weights for row in report.rows)
        assert report.effective_sparsity == pytest.approx(1 - sum(wanted) / total)
        assert report.effective_sparsity >= report.sparsity


def test_a_chain_that_is_cut_is_not_in_effect(library):
    """By hand: 6-8-3, one unit is not reached, one not read, and a bias is no path."""
    model = dense_model(library)
    hidden, last = model.layers[-2:]
    first, second = np.ones((6, 8)), np.ones((8, 3))
    first[:, 0] = 0.0  # 6 zeros; the 3 weights that read the unit are on no path
    second[1] = 0.0  # 3 zeros; the 6 weights that lead to the unit are on no path
    hidden.set_weights([first, np.ones(8)])
    last.set_weights([second, np.ones(3)])
    report = inspection.sparsity(model)
    assert [row.zeros for row in report.rows] == [6, 3]
    assert report.effective_zeros == (12, 6)
    assert report.effective_sparsity == 18 / 72
    assert "no path to an output): 25.00 %" in str(report)
    assert "25.00 %" in report._repr_html_()
    described = report.to_dict()
    assert json.loads(json.dumps(described)) == described
    assert (described["effective_zeros"], described["effective_sparsity"]) == ([12, 6], 0.25)
    assert "effective_zeros" not in report.without_paths().to_dict()


def test_of_pruned_weights_those_with_masks_count(library):
    model = dense_model(library)
    model = tscnc.prune_now(model, 0.5, layers="hidden")
    kernel = model.layers[-2].kernel
    kernel.assign(np.ones((6, 8)))
    model.pruner.state.masks[0].assign(np.arange(8) < np.full((6, 1), 4))
    model.pruner.apply()
    report = inspection.sparsity(model)
    assert np.count_nonzero(kernel) == 24
    assert report.effective_zeros == (24, 12)
    assert report.effective_sparsity == 0.5
    trainer = tscnc.AdversarialTraining(
        model, attack=tscnc.attacks.FGSM(epsilon=0.1), loss=tscnc.losses.Madry()
    )
    assert inspection.sparsity(trainer) == report


def test_a_product_with_a_constant_gate_is_a_path(library):
    """What a gate that reads nothing sends on is a constant by which the other branch is taken."""
    inputs = library.Input((3,))
    gate = library.layers.Dense(3, activation="sigmoid", name="gate")
    x = library.layers.Multiply()([inputs, gate(inputs)])
    model = library.Model(inputs, library.layers.Dense(2, name="last")(x))
    gate.kernel.assign(np.zeros((3, 3)))
    assert inspection.sparsity(model).effective_zeros == (9, 0)


@pytest.mark.parametrize("name", ["ResNet20", "VGG16", "WideResNet", "SmallCNN"])
def test_networks_of_the_literature_are_followed(name):
    options = {"depth": 10, "width": 1} if name == "WideResNet" else {}
    statistics = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1)}
    model = getattr(applications, name)(
        input_shape=(32, 32, 3), classes=10, **statistics, **options
    )
    report = inspection.sparsity(model)
    assert report.effective_sparsity == report.sparsity < 1e-6  # a few are drawn as 0


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            lambda k: k.Sequential(
                [k.layers.InputLayer((4,)), k.layers.Dense(3), k.layers.LayerNormalization()]
            ),
            r"\(LayerNormalization\) is not understood",
        ),
        (lambda k: tscnc.gates.add_gates(dense_model(k)), r"\(Gated\) is not understood"),
        (lambda k: k.layers.Dense(3, name="alone"), "'alone' is a layer, not a model"),
        (lambda k: subclassed(k), "is a subclassed model"),
    ],
)
def test_what_is_not_followed_says_so(library, build, reason):
    model = build(library)
    if not model.built:
        model.build((None, 4))
    report = inspection.sparsity(model)
    assert report.effective_sparsity is None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report.not_followed)
    assert f"not known, as {report.not_followed}." in str(report)
    assert report.to_dict()["effective_zeros"] is None


def subclassed(k):
    class Own(k.Model):
        def __init__(self):
            super().__init__()
            self.dense = k.layers.Dense(2)

        def call(self, x):
            return self.dense(x)

    model = Own()
    model(np.ones((1, 4), np.float32))
    return model


def test_exports_record_what_they_did(tmp_path):
    report = tscnc.export_saved_model(dense_model(keras), tmp_path / "model")
    assert not {"effective_zeros", "effective_sparsity", "not_followed"} & set(report.to_dict())
    assert report.weights.effective_zeros is None
