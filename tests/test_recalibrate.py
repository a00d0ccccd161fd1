"""Recalibration: moments of BatchNorm and of channels, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import FLAVOURS, conv_model, dense_model

import tscnc_tf as tscnc
from tscnc_tf import pruning

libraries = pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)


def network(library, first="relu"):
    """Return a network with two BatchNorms, one layer called twice, and random statistics."""
    layers = library.layers
    inputs = library.Input((6, 6, 2))
    shared = layers.Conv2D(4, 3, padding="same", activation=first, name="conv")
    x = shared(inputs)
    x = layers.BatchNormalization(name="norm_1")(x)
    x = layers.Dropout(0.5, name="drop")(x)
    x = layers.Conv2D(5, 3, use_bias=False, name="conv_2")(x)
    x = layers.BatchNormalization(name="norm_2")(x)
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    model = library.Model(inputs, layers.Dense(3, name="logits")(x))
    generator = np.random.default_rng(1)
    model.set_weights([0.1 + np.abs(generator.normal(size=w.shape)) for w in model.get_weights()])
    for name in ("conv", "conv_2", "logits"):
        kernel = model.get_layer(name).kernel
        kernel.assign(generator.normal(size=kernel.shape))
    return model


def outputs_of(library, model, name):
    """Return what a layer returns on the data."""
    part = library.Model(model.inputs, model.get_layer(name).output)
    return part.predict(DATA, verbose=0).astype(float)


DATA = np.random.default_rng(0).uniform(size=(50, 6, 6, 2)).astype("float32")


@libraries
@pytest.mark.parametrize("batch_size", [7, 64])
def test_moving_statistics_are_those_of_the_inputs(library, batch_size):
    model = pruning.prune_now(network(library), 0.5)
    before = model.get_layer("conv").get_weights()
    assert pruning.recalibrate(model, DATA, batch_size=batch_size) is model
    for norm, source in (("norm_1", "conv"), ("norm_2", "conv_2")):
        values = outputs_of(library, model, source).reshape(
            50 * 36 if norm == "norm_1" else 50 * 16, -1
        )
        layer = model.get_layer(norm)
        np.testing.assert_allclose(np.asarray(layer.moving_mean), values.mean(axis=0), rtol=1e-4)
        np.testing.assert_allclose(np.asarray(layer.moving_variance), values.var(axis=0), rtol=1e-4)
    for weight, same in zip(model.get_layer("conv").get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, same)
    assert "call" not in vars(model.get_layer("norm_1"))


@libraries
def test_channels_get_the_moments_of_the_dense_network(library):
    dense = network(library, first=None)
    model = network(library, first=None)
    model.set_weights(dense.get_weights())
    pruning.prune_now(model, 0.8)
    zeros = np.asarray(model.get_layer("conv_2").kernel) == 0
    pruning.recalibrate(model, DATA, dense=dense)
    for name, has_bias in (("conv", True), ("conv_2", False), ("logits", True)):
        ours, theirs = (outputs_of(library, each, name) for each in (model, dense))
        ours, theirs = (each.reshape(-1, each.shape[-1]) for each in (ours, theirs))
        if name == "conv":  # what comes after is changed by the statistics, fitted last
            np.testing.assert_allclose(ours.std(axis=0), theirs.std(axis=0), rtol=1e-3)
            np.testing.assert_allclose(ours.mean(axis=0), theirs.mean(axis=0), rtol=1e-3)
        assert model.get_layer(name).use_bias is has_bias
    np.testing.assert_array_equal(np.asarray(model.get_layer("conv_2").kernel) == 0, zeros)


@libraries
def test_a_dead_channel_and_an_activation_stay_as_they_are(library):
    dense, model = network(library), network(library)
    kernel = np.asarray(model.get_layer("conv").kernel).copy()
    kernel[..., 0] = 0
    model.get_layer("conv").kernel.assign(kernel)
    bias = np.asarray(model.get_layer("conv").bias)[0]
    activation = model.get_layer("conv").activation
    pruning.recalibrate(model, DATA, dense=dense)
    assert np.all(np.isfinite(model.predict(DATA, verbose=0)))
    assert np.asarray(model.get_layer("conv").bias)[0] == bias
    assert model.get_layer("conv").activation is activation


@libraries
def test_what_cannot_be_recalibrated(library):
    model = dense_model(library)
    x = np.zeros((4, 6), "float32")
    with pytest.raises(ValueError, match="has no BatchNormalization, so there is nothing to fit"):
        pruning.recalibrate(model, x)
    with pytest.raises(ValueError, match="the same dense and convolutional layers by name"):
        pruning.recalibrate(model, x, dense=network(library))
    pruned = pruning.prune_now(model, 0.5)
    with pytest.raises(ValueError, match="dense must be another network than model"):
        pruning.recalibrate(pruned, x, dense=model)
    with pytest.raises(ValueError, match="x must hold inputs"):
        pruning.recalibrate(network(library), DATA[:0])
    with pytest.raises(ValueError, match="batch_size must be >= 1"):
        pruning.recalibrate(network(library), DATA, batch_size=0)


KINDS = {  # all with as many inputs as outputs, so that no wrong axis is told by its length
    "conv": ("Conv2D", (4, 3), {}),
    "grouped": ("Conv2D", (4, 3), {"groups": 2}),
    "transposed": ("Conv2DTranspose", (4, 3), {}),
    "transposed_1d": ("Conv1DTranspose", (4, 3), {}),
    "transposed_3d": ("Conv3DTranspose", (4, 2), {}),
    "depthwise": ("DepthwiseConv2D", (3,), {"depth_multiplier": 2}),
    "depthwise_1d": ("DepthwiseConv1D", (3,), {"use_bias": False}),
    "separable": ("SeparableConv2D", (4, 3), {"depth_multiplier": 2}),
    "separable_1d": ("SeparableConv1D", (4, 3), {"activation": "tanh"}),
    "dense": ("Dense", (4,), {}),
}


@libraries
@pytest.mark.parametrize("kind", KINDS)
def test_channels_are_matched_in_every_kind_of_layer(library, kind):
    """The figures are NumPy's, of what the layer returns; zeros stay zeros."""
    name, arguments, options = KINDS[kind]
    rank = 1 if "1D" in name else 3 if "3D" in name else 2
    x = np.random.default_rng(1).random((40, *[5] * rank, 4)).astype("float32")

    def made():
        library.utils.set_random_seed(0)
        layer = getattr(library.layers, name)(*arguments, name="first", **options)
        inputs = library.Input(x.shape[1:])
        return library.Model(inputs, library.layers.Dense(3, name="last")(layer(inputs)))

    def outputs(model):
        layer = model.get_layer("first")
        activation, layer.activation = layer.activation, None
        values = np.asarray(layer(x), float).reshape(-1, layer(x).shape[-1])
        layer.activation = activation
        return values

    dense, model = made(), made()
    pruning.prune_now(model, 0.6, layers="first", structure=pruning.Unstructured(1))
    wanted = outputs(dense)
    weights = model.get_layer("first").get_weights()
    assert np.max(np.abs(outputs(model).std(axis=0) / wanted.std(axis=0) - 1)) > 0.05
    pruning.recalibrate(model, x, dense=dense)
    found = outputs(model)
    np.testing.assert_allclose(found.std(axis=0), wanted.std(axis=0), rtol=1e-3)
    if options.get("use_bias", True):
        np.testing.assert_allclose(found.mean(axis=0), wanted.mean(axis=0), atol=1e-5)
    for old, new in zip(weights, model.get_layer("first").get_weights(), strict=True):
        if old.ndim > 1:
            np.testing.assert_array_equal(new == 0, old == 0)


@libraries
def test_layers_that_are_not_matched_are_named(library):
    layers = library.layers

    def made():
        library.utils.set_random_seed(0)
        inputs = library.Input((5, 4))
        x = layers.LSTM(4, name="recurrent")(inputs)
        x = layers.EinsumDense("ab,bc->ac", 4, name="einsum")(x)
        return library.Model(inputs, layers.Dense(3, name="logits")(x))

    dense = made()
    model = pruning.prune_now(made(), 0.5)
    x = np.random.default_rng(0).normal(size=(20, 5, 4)).astype("float32")
    before = np.asarray(model.get_layer("einsum").kernel)
    with pytest.warns(UserWarning, match=r"stay as they are: .*LSTMCell\), 'einsum' \(EinsumDense"):
        pruning.recalibrate(model, x, dense=dense)
    np.testing.assert_array_equal(np.asarray(model.get_layer("einsum").kernel), before)


@libraries
def test_layers_of_one_name_are_all_matched(library):
    def made():
        library.utils.set_random_seed(0)
        parts = [
            library.Sequential([library.Input((4,)), library.layers.Dense(4, name="same")])
            for _ in range(2)
        ]
        return library.Sequential([library.Input((4,)), *parts])

    dense = made()
    model = pruning.prune_now(made(), 0.5, structure=pruning.Unstructured(2))
    x = np.random.default_rng(0).normal(size=(40, 4)).astype("float32")
    pruning.recalibrate(model, x, dense=dense)
    for depth in (1, 2):
        ours, theirs = x, x
        for one, other in zip(model.layers[:depth], dense.layers, strict=False):
            ours, theirs = np.asarray(one(ours)), np.asarray(other(theirs))
        np.testing.assert_allclose(ours.std(axis=0), theirs.std(axis=0), rtol=1e-3)


@libraries
def test_a_network_with_gates_is_folded_first(library):
    dense = conv_model(library)
    gated = tscnc.gates.add_gates(conv_model(library))
    x = np.random.default_rng(0).random((8, 8, 8, 1)).astype("float32")
    with pytest.raises(ValueError, match=r"still has gates.*recalibrate\(tscnc_tf.gates.fold"):
        pruning.recalibrate(gated, x, dense=dense)
    pruning.recalibrate(gated, x)


@libraries
def test_scores_that_are_trained_are_frozen_first(library):
    dense, model = conv_model(library), conv_model(library)
    model.set_weights(dense.get_weights())
    pruning.prune(model, method="scores", sparsity=0.8, structure=pruning.Unstructured(1))
    x = np.random.default_rng(0).random((64, 8, 8, 1)).astype("float32")
    before = [np.array(weight) for weight in model.get_weights()]
    with pytest.raises(ValueError, match=r"scores trained.*freeze_mask\(model\) first"):
        pruning.recalibrate(model, x, dense=dense)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    pruning.recalibrate(model, x)  # which no mask depends on
    outputs = np.array(model(x))
    pruning.freeze_mask(model)
    np.testing.assert_array_equal(np.array(model(x)), outputs)
    pruning.recalibrate(model, x, dense=dense)
    outputs = np.array(model(x))
    np.testing.assert_array_equal(np.array(pruning.strip(model)(x)), outputs)
    part = conv_model(library)  # the scores of a part, too
    pruning.prune(part, method="scores", sparsity=0.5)
    whole = library.Sequential([part, library.layers.Dense(2)])
    whole(x)
    with pytest.raises(ValueError, match="scores trained"):
        pruning.recalibrate(whole, x, dense=whole)
