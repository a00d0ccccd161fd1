"""Recalibration: moments of BatchNorm and of channels, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import FLAVOURS, dense_model

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
    with pytest.raises(ValueError, match="x must hold inputs"):
        pruning.recalibrate(network(library), DATA[:0])
    with pytest.raises(ValueError, match="batch_size must be >= 1"):
        pruning.recalibrate(network(library), DATA, batch_size=0)
