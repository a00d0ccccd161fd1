"""Compaction: the same logits without dead filters, exact counts, and what has to stay."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf
from helpers import FLAVOURS, dense_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tscnc_tf as tscnc
from tscnc_tf._keras import keras, tf_keras
from tscnc_tf.pruning import Compaction, compact

both = pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)


def randomise(model, seed=0):
    """Give every weight a value of the size it has in training, no moving average trivial."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        name = getattr(weight, "path", weight.name)
        values = rng.normal(0, 1, weight.shape)
        if "variance" in name:
            values = np.abs(values) + 0.5
        elif "kernel" in name:
            values /= np.sqrt(np.prod(weight.shape[:-1]))
        elif "gamma" in name:
            values = 1 + values / 5
        weight.assign(values.astype(weight.dtype if isinstance(weight.dtype, str) else "float32"))
    return model


def kill(model, name, filters, attribute="kernel"):
    """Set filters to zero (the last axis of a kernel); their biases stay."""
    variable = getattr(model.get_layer(name), attribute)
    values = variable.numpy()
    values[..., filters] = 0
    variable.assign(values)


def unread(model, name, channels):
    """Set all weights to zero by which a layer reads some of its input channels."""
    values = model.get_layer(name).kernel.numpy()
    values[..., channels, :] = 0
    model.get_layer(name).kernel.assign(values)


def set_bias(model, name, value):
    bias = model.get_layer(name).bias
    bias.assign(np.full(bias.shape, value, "float32"))


def probe(model, examples=5, seed=3):
    symbols = model.inputs
    rng = np.random.default_rng(seed)
    drawn = [rng.normal(size=(examples, *s.shape[1:])).astype("float32") for s in symbols]
    return drawn[0] if len(drawn) == 1 else drawn


def check(model, **options):
    """Compact a model, and compare the logits on data that compact() has not seen."""
    before = [weight.numpy() for weight in model.weights]
    done = compact(model, **options)
    x = probe(model)
    for old, new in zip(
        tf.nest.flatten(model(x, training=False)),
        tf.nest.flatten(done.model(x, training=False)),
        strict=True,
    ):
        scale = max(1.0, float(np.abs(old).max()))
        np.testing.assert_allclose(new, old, rtol=0, atol=1e-5 * scale)
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), value)
    assert done.parameters_before == model.count_params()
    assert done.parameters_after == done.model.count_params()
    assert done.model.name == model.name
    return done


def filters(done):
    return {row.name: (row.filters_before, row.filters_after) for row in done.layers}


def reasons(done, layer):
    return {row.reason: row.channels for row in done.kept if row.layer == layer}


# --- what goes ------------------------------------------------------------------------------------


def cnn(library, padding="valid", use_bias=True):
    layers = library.layers
    return randomise(
        library.Sequential(
            [
                library.Input((9, 9, 2), name="image"),
                layers.Conv2D(4, 3, padding=padding, use_bias=use_bias, name="first"),
                layers.BatchNormalization(name="norm"),
                layers.ReLU(name="relu"),
                layers.Conv2D(5, 3, padding=padding, use_bias=use_bias, name="second"),
                layers.MaxPooling2D(name="pool"),
                layers.Flatten(name="flat"),
                layers.Dropout(0.5, name="drop"),
                layers.Dense(3, use_bias=use_bias, name="logits"),
            ],
            name="network",
        )
    )


@both
def test_a_convolutional_network_counted_by_hand(library):
    model = cnn(library)
    kill(model, "first", [1, 3])
    kill(model, "second", [0])
    done = check(model)
    assert filters(done) == {"first": (4, 2), "norm": (4, 2), "second": (5, 4), "logits": (3, 3)}
    rows = {row.name: row for row in done.layers}
    # kernels: 3·3·2·4 and 3·3·2·2 at 7·7 places; 3·3·4·5 and 3·3·2·4 at 5·5; 2·2·5·3 and 2·2·4·3
    assert (rows["first"].parameters_before, rows["first"].parameters_after) == (76, 38)
    assert (rows["norm"].parameters_before, rows["norm"].parameters_after) == (16, 8)
    assert (rows["second"].parameters_before, rows["second"].parameters_after) == (185, 76)
    assert (rows["logits"].parameters_before, rows["logits"].parameters_after) == (63, 51)
    assert (rows["first"].flops_before, rows["first"].flops_after) == (2 * 72 * 49, 2 * 36 * 49)
    assert (rows["second"].flops_before, rows["second"].flops_after) == (2 * 180 * 25, 2 * 72 * 25)
    assert (rows["logits"].flops_before, rows["logits"].flops_after) == (120, 96)
    assert rows["norm"].flops_before is None
    assert (done.parameters_before, done.parameters_after) == (340, 173)
    assert (done.flops_before, done.flops_after) == (16176, 7224)
    assert not done.kept
    assert not done.left_alone
    assert done.max_logit_difference <= done.logit_tolerance
    assert not getattr(done.model, "compiled", False)
    assert [layer.name for layer in done.model.layers] == [layer.name for layer in model.layers]
    assert all(row.changed for row in done.layers)


@both
def test_the_folded_bias_is_the_sum_of_what_the_dead_filters_sent(library):
    model = cnn(library)
    kill(model, "first", [1, 3])
    first, norm, second = (model.get_layer(name) for name in ("first", "norm", "second"))
    norm.beta.assign([3.0] * 4)
    scale = norm.gamma.numpy() / np.sqrt(norm.moving_variance.numpy() + norm.epsilon)
    constant = (first.bias.numpy() - norm.moving_mean.numpy()) * scale + norm.beta.numpy()
    constant = np.maximum(constant, 0)[[1, 3]]
    assert constant.any()
    expected = second.bias.numpy() + constant @ second.kernel.numpy().sum((0, 1))[[1, 3]]
    new = compact(model).model.get_layer("second")
    np.testing.assert_allclose(new.bias.numpy(), expected, rtol=1e-6)
    np.testing.assert_array_equal(new.kernel.numpy(), second.kernel.numpy()[:, :, [0, 2]])


@both
def test_a_layer_gets_a_bias_only_if_it_needs_one(library):
    model = cnn(library, use_bias=False)
    kill(model, "first", [1])  # BatchNorm makes a constant of it
    model.get_layer("norm").beta.assign(np.full(4, 5.0, "float32"))
    done = check(model)
    assert done.model.get_layer("second").use_bias
    assert not done.model.get_layer("first").use_bias
    assert not done.model.get_layer("logits").use_bias
    assert done.parameters_after == done.model.count_params()


@both
def test_nothing_dead_nothing_removed(library):
    model = cnn(library, padding="same")
    done = check(model)
    for old, new in zip(model.weights, done.model.weights, strict=True):
        np.testing.assert_array_equal(old.numpy(), new.numpy())
    assert (done.parameters_before, done.flops_before) == (done.parameters_after, done.flops_after)
    assert not done.kept
    assert not any(row.changed for row in done.layers)
    assert done.max_logit_difference == 0.0


@both
def test_a_constant_behind_zero_padding_stays_and_is_reported(library):
    model = cnn(library, padding="same")
    kill(model, "first", [0, 1])
    model.get_layer("norm").beta.assign([9.0, -9.0, 0.0, 0.0])  # after ReLU: a constant, and zero
    done = check(model)
    assert filters(done)["first"] == (4, 3)
    assert reasons(done, "first") == {"'second' pads a constant with zeros (padding='same')": 1}
    assert "Kept: 1 of 'first'" in str(done)


@both
def test_inputs_that_nobody_reads_go_and_death_spreads_to_the_end(library):
    layers = library.layers
    model = library.Sequential(
        [
            library.Input((6,)),
            layers.Dense(7, activation="tanh", name="a"),
            layers.Dense(8, activation="sigmoid", name="b"),
            layers.Dense(9, activation="gelu", name="c"),
            layers.Dense(2, name="logits"),
        ]
    )
    randomise(model)
    unread(model, "b", [6])
    unread(model, "logits", [0, 1, 2])  # so c loses three, ...
    kernel = model.get_layer("c").kernel.numpy()
    kernel[3:, 3:] = 0  # ... without which b is read in three places only, ...
    model.get_layer("c").kernel.assign(kernel)
    kernel = model.get_layer("b").kernel.numpy()
    kernel[:2, :3] = 0  # ... for which a is not read in its first two
    model.get_layer("b").kernel.assign(kernel)
    done = check(model)
    assert filters(done) == {"a": (7, 4), "b": (8, 3), "c": (9, 6), "logits": (2, 2)}
    assert done.flops_after == 2 * (6 * 4 + 4 * 3 + 3 * 6 + 6 * 2)
    again = compact(done.model)
    assert again.parameters_after == again.parameters_before


@both
def test_of_a_layer_that_is_entirely_dead_one_filter_stays(library):
    model = cnn(library)
    kill(model, "second", range(5))
    done = check(model)
    assert filters(done) == {"first": (4, 1), "norm": (4, 1), "second": (5, 1), "logits": (3, 3)}
    assert reasons(done, "second") == {"Keras has no layers without any filter": 1}
    assert reasons(done, "first") == {"Keras has no layers without any filter": 1}


@both
def test_a_dead_residual_block_loses_its_inside(library):
    layers = library.layers
    inputs = library.Input((6, 6, 3))
    x = layers.Conv2D(4, 3, padding="same", name="stem")(inputs)
    y = layers.Conv2D(5, 3, padding="same", activation="relu", name="inner")(x)
    y = layers.Conv2D(4, 3, padding="same", name="outer")(y)
    x = layers.Add(name="add")([x, y])
    x = layers.GlobalAveragePooling2D(keepdims=True)(x)
    model = randomise(library.Model(inputs, layers.Conv2D(2, 1, name="logits")(x)))
    kill(model, "outer", range(4))
    done = check(model)
    assert filters(done) == {"stem": (4, 4), "inner": (5, 1), "outer": (4, 4), "logits": (2, 2)}
    assert reasons(done, "outer") == {"at 'add' another branch still uses the channel": 4}


@both
@pytest.mark.parametrize("projection", [False, True], ids=["identity", "projection"])
def test_residual_channels_go_if_every_branch_can_lose_them(library, projection):
    layers = library.layers

    def norm(x, name):
        return layers.BatchNormalization(name=name)(x)

    inputs = library.Input((8, 8, 3))
    x = layers.ReLU()(norm(layers.Conv2D(6, 1, name="stem")(inputs), "n0"))
    shortcut = x
    if projection:
        shortcut = norm(layers.Conv2D(6, 1, strides=2, use_bias=False, name="short")(x), "n1")
    y = layers.Conv2D(5, 1, strides=2 if projection else 1, name="one")(x)
    y = layers.Activation("relu")(norm(y, "n2"))
    y = norm(layers.Conv2D(6, 1, use_bias=False, name="two")(y), "n3")
    x = layers.Activation("relu")(layers.Add(name="add")([shortcut, y]))
    x = layers.GlobalAveragePooling2D()(x)
    model = randomise(library.Model(inputs, layers.Dense(4, name="logits")(x)))
    kill(model, "short" if projection else "stem", [0, 1, 2])
    kill(model, "two", [1, 2, 3])
    kill(model, "one", [4])
    done = check(model)
    sizes = filters(done)
    assert sizes["two"] == (6, 4)
    assert sizes["short" if projection else "stem"] == (6, 4)
    assert sizes["one"] == (5, 4)
    assert reasons(done, "two") == {"at 'add' another branch still uses the channel": 1}


@both
def test_concatenated_channels_go_one_by_one(library):
    layers = library.layers
    inputs = library.Input((6, 6, 2))
    a = layers.Conv2D(3, 3, name="a", activation="elu")(inputs)
    b = layers.Conv2D(4, 3, name="b", activation="softplus")(inputs)
    x = layers.Concatenate(name="joined")([a, b, a])
    x = layers.AveragePooling2D(padding="same", pool_size=3)(x)
    x = layers.Conv2D(5, 2, name="c")(x)
    model = randomise(library.Model(inputs, layers.Flatten()(x)))
    kill(model, "a", [2])
    kill(model, "b", [0, 3])
    done = check(model)
    assert filters(done) == {"a": (3, 2), "b": (4, 2), "c": (5, 5)}
    assert done.model.get_layer("c").kernel.shape == (2, 2, 6, 5)


def joined(library, tensors, how, axis=-1):
    """Join tensors by the layer, or by a function."""
    if how == "layer":
        return library.layers.Concatenate(axis=axis, name="joined")(tensors)
    return tf.concat(tensors, axis) if library is tf_keras else keras.ops.concatenate(tensors, axis)


@both
@pytest.mark.parametrize("axis", [-1, 3])
@pytest.mark.parametrize("how", ["layer", "function"])
def test_joined_channels_go_through_normalisation_and_activation(library, how, axis):
    layers = library.layers
    inputs = library.Input((6, 6, 2))
    a = layers.Conv2D(4, 3, activation="sigmoid", name="a")(inputs)
    b = layers.Conv2D(5, 3, use_bias=False, name="b")(inputs)
    x = joined(library, [a, b], how, axis)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Activation("sigmoid")(x)
    x = layers.Conv2D(3, 2, name="c")(x)
    x = layers.GlobalAveragePooling2D()(x)
    model = randomise(library.Model(inputs, layers.Dense(2, name="logits")(x)))
    kill(model, "a", [0, 3])
    kill(model, "b", [1])
    unread(model, "c", [4 + 2])
    norm, kernel = model.get_layer("norm"), model.get_layer("c").kernel.numpy()
    done = check(model)
    assert filters(done) == {
        **{"a": (4, 2), "b": (5, 3), "norm": (9, 5)},
        **{"c": (3, 3), "logits": (2, 2)},
    }
    assert not done.kept
    assert not done.left_alone
    # 9·2·2+2 and 9·2·3; 4·5; 4·5·3+3; 3·2+2
    assert done.parameters_after == 38 + 54 + 20 + 63 + 8
    sent = np.zeros(9)
    sent[[0, 3]] = 1 / (1 + np.exp(-model.get_layer("a").bias.numpy()[[0, 3]]))
    sent = (sent - norm.moving_mean) / np.sqrt(norm.moving_variance + norm.epsilon)
    sent = 1 / (1 + np.exp(-(sent * norm.gamma + norm.beta)))
    dead = [0, 3, 5]
    bias = model.get_layer("c").bias + sent[dead] @ kernel[:, :, dead].sum((0, 1))
    new = done.model.get_layer("c")
    np.testing.assert_allclose(new.bias.numpy(), bias, rtol=1e-5)
    np.testing.assert_array_equal(new.kernel.numpy(), kernel[:, :, [1, 2, 4, 7, 8]])


@both
@pytest.mark.parametrize("what", ["concatenation", "query", "value"])
def test_constants_among_the_inputs_leave_a_layer_alone(library, what):
    layers = library.layers
    inputs = library.Input((6, 4), batch_size=5)
    x = layers.Dense(5, activation="tanh", name="dense")(inputs)
    constant = tf.ones((5, 6, 3))
    if what == "concatenation":
        x, name = joined(library, [x, constant], "function"), "joins a constant to its inputs"
    else:
        attention, name = layers.MultiHeadAttention(3, 2), "has a constant for its query, key"
        x = attention(constant, x) if what == "query" else attention(x, constant)
    model = randomise(library.Model(inputs, layers.Dense(2, name="logits")(x)))
    kill(model, "dense", [1, 3])
    assert name in tscnc.inspection.sparsity(model).not_followed
    if library is tf_keras and what != "concatenation":
        with pytest.raises(ValueError, match="is called on a constant tensor: make that a weight"):
            compact(model)
        return
    done = check(model, probe=probe(model))
    assert filters(done)["dense"] == (5, 5)
    (left,) = done.left_alone
    assert name in left.reason


@both
def test_a_reshape_that_is_used_twice_keeps_its_shape(library):
    layers = library.layers
    inputs = library.Input((4,))
    shared = layers.Reshape((1, 6), name="shared")
    a, b = layers.Dense(6, name="a")(inputs), layers.Dense(6, name="b")(inputs)
    x = layers.Flatten()(layers.Concatenate()([shared(a), shared(b)]))
    model = randomise(library.Model(inputs, layers.Dense(2, name="logits")(x)))
    kill(model, "a", [1, 2])
    kill(model, "b", [4])
    done = check(model)
    assert filters(done) == {"a": (6, 6), "b": (6, 6), "logits": (2, 2)}
    assert {left.reason for left in done.left_alone} == {"'shared' (Reshape) is used 2 times"}


@both
def test_a_densely_connected_network(library):
    layers = library.layers

    def norm(x, name):
        return layers.Activation("relu")(layers.BatchNormalization(name=name)(x))

    inputs = library.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, use_bias=False, name="stem")(inputs)
    for number in (1, 2):
        y = layers.Conv2D(6, 1, use_bias=False, name=f"narrow{number}")(norm(x, f"n{number}"))
        y = layers.Conv2D(3, 3, padding="same", name=f"wide{number}")(norm(y, f"m{number}"))
        x = layers.Concatenate(name=f"join{number}")([x, y])
    x = layers.Conv2D(5, 1, use_bias=False, name="transition")(norm(x, "n3"))
    x = layers.AveragePooling2D(2)(x)
    x = layers.GlobalAveragePooling2D()(norm(x, "n4"))
    model = randomise(library.Model(inputs, layers.Dense(3, name="logits")(x)))
    kill(model, "stem", [2])
    kill(model, "wide1", [0, 1])
    kill(model, "wide2", [2])
    kill(model, "narrow1", [5])
    kill(model, "transition", [4])
    model.get_layer("m1").beta.assign([1.0] * 5 + [-9.0])  # zero after ReLU, as "wide1" pads
    for name in ("n1", "n2", "n3"):
        beta = model.get_layer(name).beta
        beta.assign(np.full(beta.shape, 9.0, "float32"))  # not zero after ReLU
    unread(model, "transition", [3])  # which "narrow1" and "narrow2" still read
    done = check(model)
    assert filters(done) == {
        **{"stem": (4, 3), "n1": (4, 3), "narrow1": (6, 5), "m1": (6, 5), "wide1": (3, 1)},
        **{"n2": (7, 4), "narrow2": (6, 6), "m2": (6, 6), "wide2": (3, 2)},
        **{"n3": (10, 6), "transition": (5, 4), "n4": (5, 4), "logits": (3, 3)},
    }
    assert not done.kept
    assert not done.left_alone
    # "narrow1", "narrow2" and "transition" got a bias for what the dead channels sent
    blocks = [(12, 3 * 5 + 5, 20, 9 * 5 + 1), (16, 4 * 6 + 6, 24, 9 * 6 * 2 + 2)]
    rest = (9 * 3 * 3, 24, 6 * 4 + 4, 16, 4 * 3 + 3)
    assert done.parameters_after == sum(map(sum, [*blocks, rest]))


@both
def test_a_branch_joined_with_itself_and_read_elsewhere(library):
    layers = library.layers
    inputs = library.Input((5,))
    a = layers.Dense(6, activation="sigmoid", name="a")(inputs)
    twice = layers.Concatenate(name="twice")([a, a])
    x = layers.Dense(3, activation="tanh", name="first")(twice)
    y = layers.Dense(3, name="second")(a)
    x = layers.Concatenate(name="joined")([x, y, a])
    model = randomise(library.Model(inputs, layers.Dense(2, name="logits")(x)))
    kill(model, "a", [0])
    unread(model, "first", [1, 6 + 1])  # of both copies, ...
    unread(model, "first", [2, 6 + 2, 3])
    unread(model, "second", [1, 2])  # ... and here, ...
    unread(model, "logits", [6 + 1])  # ... and there; of 2 not there, and of 3 one copy only
    done = check(model)
    assert filters(done) == {"a": (6, 4), "first": (3, 3), "second": (3, 3), "logits": (2, 2)}
    assert done.model.get_layer("first").kernel.shape == (2 * 4, 3)
    assert done.model.get_layer("second").kernel.shape == (4, 3)
    assert done.model.get_layer("logits").kernel.shape == (3 + 3 + 4, 2)
    assert done.parameters_after == (5 * 4 + 4) + (8 * 3 + 3) + (4 * 3 + 3) + (10 * 2 + 2)
    assert not done.kept


@both
def test_of_a_branch_that_is_entirely_dead_one_channel_stays(library):
    layers = library.layers
    inputs = library.Input((5,))
    a = layers.Dense(4, activation="sigmoid", name="a")(inputs)
    x = layers.Concatenate(name="joined")([a, inputs])
    model = randomise(library.Model(inputs, layers.Dense(2, name="logits")(x)))
    kill(model, "a", range(4))
    done = check(model)
    assert filters(done) == {"a": (4, 1), "logits": (2, 2)}
    assert reasons(done, "a") == {"Keras has no layers without any filter": 1}


@both
@pytest.mark.parametrize("how", ["layer", "function"])
def test_what_is_joined_along_another_axis_stays(library, how):
    layers = library.layers
    inputs = library.Input((4, 5))
    a, b = (layers.Dense(6, name=name)(inputs) for name in "ab")
    x = joined(library, [a, b], how, axis=1)
    model = randomise(library.Model(inputs, layers.Dense(2, name="logits")(x)))
    kill(model, "a", [0])
    kill(model, "b", [0])
    done = check(model)
    assert done.parameters_after == done.parameters_before
    (left,) = done.left_alone
    assert left.reason.endswith(") joins axis 1, not the channels")
    assert reasons(done, "a") == reasons(done, "b") == {left.reason: 1}


@both
def test_depthwise_and_separable_convolutions(library):
    layers = library.layers
    inputs = library.Input((10, 10, 3))
    x = layers.Conv2D(6, 1, name="expand")(inputs)
    x = layers.BatchNormalization(name="n1")(x)
    x = layers.ReLU(6.0)(x)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, activation="relu", name="deep")(x)
    x = layers.Conv2D(4, 1, use_bias=False, name="project")(x)
    x = layers.SeparableConv2D(5, 3, depth_multiplier=2, name="separable")(x)
    x = layers.GlobalMaxPooling2D()(x)
    model = randomise(library.Model(inputs, layers.Dense(2, name="logits")(x)))
    kill(model, "expand", [0])
    attribute = "depthwise_kernel" if library is tf_keras else "kernel"
    deep = getattr(model.get_layer("deep"), attribute)
    values = deep.numpy()
    values[:, :, 1] = 0  # both filters of channel 1
    values[:, :, 2, 0] = 0  # one of the two of channel 2, which so stays
    deep.assign(values)
    kill(model, "project", [3])
    kill(model, "separable", [0, 4], "pointwise_kernel")
    done = check(model)
    assert filters(done) == {
        "expand": (6, 4),
        "n1": (6, 4),
        "deep": (12, 8),
        "project": (4, 3),
        "separable": (5, 3),
        "logits": (2, 2),
    }
    rows = {row.name: row for row in done.layers}
    assert reasons(done, "deep") == {"tied to a channel that 'project' reads": 1}
    # 3·3·6·2 at 8·8 places; 3·3·4·2 and 8·5 at 6·6
    assert (rows["deep"].flops_before, rows["deep"].flops_after) == (2 * 108 * 64, 2 * 72 * 64)
    assert rows["separable"].flops_before == 2 * (72 + 40) * 36
    assert rows["separable"].flops_after == 2 * (54 + 18) * 36


def grouped_network(library, padding="valid", **options):
    """A block of ResNeXt: 12 channels in 4 groups of 3, which make 2 each."""
    layers = library.layers
    inputs = library.Input((7, 7, 2))
    x = layers.Conv2D(12, 1, name="expand")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Activation("sigmoid")(x)
    options = {"groups": 4, "padding": padding, "activation": "softplus"} | options
    x = layers.Conv2D(8, 3, name="grouped", **options)(x)
    x = layers.Conv2D(3, 1, name="project")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return randomise(library.Model(inputs, layers.Dense(2, name="logits")(x)))


@both
@pytest.mark.parametrize("use_bias", [True, False])
def test_dead_groups_go_whole(library, use_bias):
    model = grouped_network(library, use_bias=use_bias)
    kill(model, "grouped", [2, 3])  # the second group
    unread(model, "project", [6, 7])  # the fourth
    kernel = model.get_layer("grouped").kernel.numpy()
    done = check(model)
    assert filters(done) == {
        **{"expand": (12, 6), "norm": (12, 6), "grouped": (8, 4)},
        **{"project": (3, 3), "logits": (2, 2)},
    }
    new = done.model.get_layer("grouped")
    assert (new.groups, new.use_bias) == (2, use_bias)
    np.testing.assert_array_equal(new.kernel.numpy(), kernel[..., [0, 1, 4, 5]])
    np.testing.assert_array_equal(
        done.model.get_layer("expand").kernel.numpy(),
        model.get_layer("expand").kernel.numpy()[..., [0, 1, 2, 6, 7, 8]],
    )
    # 2·6+6, 4·6, 3·3·3·4 (+4), 4·3+3, 3·2+2
    assert done.parameters_after == 18 + 24 + 108 + 4 * use_bias + 15 + 8
    rows = {row.name: row for row in done.layers}
    assert (rows["grouped"].flops_before, rows["grouped"].flops_after) == (
        2 * 216 * 25,
        2 * 108 * 25,
    )
    assert not done.kept
    assert not done.left_alone


@both
def test_groups_lose_equal_numbers_of_inputs_and_filters(library):
    model = grouped_network(library)
    kill(model, "expand", [0, 4, 8, 9])  # one of each group, a constant that is not zero
    kill(model, "grouped", [1, 2, 5, 7])
    kernel, bias = (variable.numpy() for variable in model.get_layer("grouped").weights)
    norm = model.get_layer("norm")
    sent = (model.get_layer("expand").bias - norm.moving_mean) * norm.gamma
    sent = (sent / np.sqrt(norm.moving_variance + norm.epsilon) + norm.beta).numpy()
    sent = 1 / (1 + np.exp(-sent))
    done = check(model)
    assert filters(done) == {
        **{"expand": (12, 8), "norm": (12, 8), "grouped": (8, 4)},
        **{"project": (3, 3), "logits": (2, 2)},
    }
    new = done.model.get_layer("grouped")
    assert new.groups == 4
    assert new.kernel.shape == (3, 3, 2, 4)
    for place, (filter_, dead) in enumerate(zip([0, 3, 4, 6], [0, 4, 8, 9], strict=True)):
        rest = np.delete(kernel[..., filter_], dead % 3, axis=-1)
        np.testing.assert_array_equal(new.kernel.numpy()[..., place], rest)
        folded = bias[filter_] + sent[dead] * kernel[:, :, dead % 3, filter_].sum()
        np.testing.assert_allclose(new.bias.numpy()[place], folded, rtol=1e-5)
    assert done.parameters_after == (2 * 8 + 8) + 32 + (9 * 2 * 4 + 4) + (4 * 3 + 3) + 8
    assert not done.kept


@both
def test_groups_with_fewer_dead_channels_hold_those_of_others(library):
    model = grouped_network(library)
    kill(model, "expand", [0, 1, 3, 6, 7, 8, 9])  # two, one, three and one
    kill(model, "grouped", [0, 2, 4, 5])  # one, one, two and none
    done = check(model)  # the third group goes; of the first, a dead input stays, and two filters
    assert filters(done) == {
        **{"expand": (12, 6), "norm": (12, 6), "grouped": (8, 6)},
        **{"project": (3, 3), "logits": (2, 2)},
    }
    assert done.model.get_layer("grouped").groups == 3
    reason = "'grouped' has groups of equal size"
    assert reasons(done, "expand") == {reason: 1}
    assert reasons(done, "grouped") == {reason: 2}
    again = check(done.model)
    assert again.parameters_after == again.parameters_before


@both
def test_groups_whose_inputs_are_read_elsewhere_stay(library):
    layers = library.layers
    inputs = library.Input((7, 6))
    x = layers.Dense(6, activation="tanh", name="a")(inputs)
    y = layers.Conv1D(6, 2, groups=3, padding="same", name="grouped")(x)
    y = layers.Conv1D(4, 3, groups=2, name="second")(y)
    x = layers.Concatenate()([layers.Flatten()(y), layers.Flatten()(x)])
    model = randomise(library.Model(inputs, layers.Dense(2, name="logits")(x)))
    kill(model, "grouped", [0, 1])
    kill(model, "second", [0])
    kill(model, "a", [4])
    model.get_layer("a").bias.assign([1.0] * 6)
    done = check(model)
    assert filters(done)["grouped"] == (6, 6)
    reason = "'grouped' has groups of equal size"
    assert reasons(done, "grouped") == {reason: 2}
    assert reasons(done, "second") == {"'second' has groups of equal size": 1}
    assert reasons(done, "a") == {"'grouped' pads a constant with zeros (padding='same')": 1}


@both
def test_of_groups_that_are_all_dead_one_filter_stays(library):
    model = grouped_network(library, padding="same")
    kill(model, "grouped", range(8))
    done = check(model)
    assert filters(done) == {
        **{"expand": (12, 1), "norm": (12, 1), "grouped": (8, 1)},
        **{"project": (3, 1), "logits": (2, 2)},
    }
    assert done.model.get_layer("grouped").groups == 1
    assert reasons(done, "grouped") == {"Keras has no layers without any filter": 1}


@both
@pytest.mark.parametrize("kind", ["Conv1D", "Conv2D"])
def test_grouped_convolutions_one_after_the_other(library, kind):
    layers = library.layers
    convolution = getattr(layers, kind)
    inputs = library.Input((9,) * int(kind[4]) + (4,))
    x = convolution(8, 2, groups=2, activation="sigmoid", name="one")(inputs)
    x = convolution(8, 2, groups=4, activation="sigmoid", name="two")(x)
    x = convolution(6, 2, groups=2, name="three")(x)
    model = randomise(library.Model(inputs, layers.Dense(2, name="logits")(layers.Flatten()(x))))
    kill(model, "one", [0, 1, 4, 5])
    kill(model, "two", [2, 6])
    kill(model, "three", [0, 3])
    done = check(model)
    # The first and third group of "two" read constants only: they go with what "three" reads there.
    assert filters(done) == {"one": (8, 4), "two": (8, 2), "three": (6, 4), "logits": (2, 2)}
    assert [done.model.get_layer(name).groups for name in ("one", "two", "three")] == [2, 2, 2]
    assert not done.kept


@both
def test_squeeze_and_excite_lets_zero_channels_go(library):
    layers = library.layers
    inputs = library.Input((6, 6, 3))
    x = layers.Conv2D(6, 3, activation="relu", name="conv")(inputs)
    s = layers.GlobalAveragePooling2D(keepdims=True)(x)
    s = layers.Conv2D(3, 1, activation="relu", name="squeeze")(s)
    s = layers.Conv2D(6, 1, name="excite")(s)
    s = layers.ReLU(6.0)(s + 3.0) * (1.0 / 6.0)
    x = layers.Multiply(name="gate")([x, s])
    x = layers.Conv2D(2, 3, name="last")(x)
    model = randomise(library.Model(inputs, layers.Flatten()(x)))
    kill(model, "conv", [0, 5])
    bias = model.get_layer("conv").bias
    bias.assign([-1.0, 1, 1, 1, 1, 2.0])  # zero after ReLU; two, which the gate makes vary
    done = check(model)
    assert filters(done) == {"conv": (6, 5), "squeeze": (3, 3), "excite": (6, 5), "last": (2, 2)}
    assert reasons(done, "conv") == {"at 'gate' another branch still uses the channel": 1}
    assert not done.left_alone


@both
def test_dense_layers_on_many_positions_and_reshaping(library):
    layers = library.layers
    inputs = library.Input((4, 6))
    x = layers.Dense(5, activation="relu", name="wide")(inputs)
    x = layers.Reshape((2, 2, 5), name="image")(x)
    x = layers.Permute((2, 1, 3))(x)
    x = layers.UpSampling2D(2)(x)
    x = layers.Cropping2D(1)(x)
    x = layers.Reshape((-1,), name="flat")(x)
    x = layers.Dense(4, name="narrow")(x)
    x = layers.RepeatVector(3)(x)
    x = layers.Conv1D(3, 2, padding="causal", name="causal")(x)
    model = randomise(library.Model(inputs, layers.GlobalAveragePooling1D()(x)))
    kill(model, "wide", [1, 2])
    kill(model, "narrow", [0, 1])
    bias = model.get_layer("narrow").bias
    bias.assign([0.0, 1.0, 1.0, 1.0])
    done = check(model)
    assert filters(done) == {"wide": (5, 3), "narrow": (4, 3), "causal": (3, 3)}
    assert done.model.get_layer("image").target_shape[-1] == 3
    assert reasons(done, "narrow") == {"'causal' pads a constant with zeros (padding='causal')": 1}


@both
def test_other_convolutions(library):
    layers = library.layers
    inputs = library.Input((6, 6, 4, 2))
    x = layers.Conv3D(4, 2, name="three", activation="relu")(inputs)
    x = layers.MaxPooling3D((1, 1, 3))(x)
    x = layers.Reshape((5, 5, 4))(x)
    x = layers.Conv2DTranspose(3, 3, strides=2, name="up", use_bias=False)(x)
    x = layers.Conv2D(3, 3, strides=3, dilation_rate=1, padding="same", name="down")(x)
    x = layers.ZeroPadding2D(1, name="pad")(x)
    x = layers.Conv2D(2, 3, name="last")(x)
    model = randomise(library.Model(inputs, layers.Flatten()(x)))
    kill(model, "three", [0, 1])
    model.get_layer("three").bias.assign([-1.0, 1.0, 1.0, 1.0])
    kernel = model.get_layer("up").kernel.numpy()
    kernel[:, :, 2] = 0  # (taps, out, in)
    model.get_layer("up").kernel.assign(kernel)
    kill(model, "down", [0, 1])
    model.get_layer("down").bias.assign([0.0, 1.0, 1.0])
    done = check(model)
    assert filters(done) == {"three": (4, 3), "up": (3, 2), "down": (3, 2), "last": (2, 2)}
    assert list(reasons(done, "three")) == [
        "'up' adds up fewer windows at its border, so a constant does not stay one"
    ]
    assert reasons(done, "down") == {"'pad' puts zeros around a constant": 1}
    rows = {row.name: row for row in done.layers}
    assert rows["up"].flops_before == 2 * (9 * 3 * 4) * 25  # one product per place of the input


@both
def test_a_stride_that_never_meets_the_border_lets_constants_through(library):
    layers = library.layers
    inputs = library.Input((6, 6, 2))
    x = layers.Conv2D(3, 1, name="first")(inputs)
    x = layers.Conv2D(4, 3, strides=3, padding="same", name="second")(x)  # 6 = 2 · 3: no zeros
    model = randomise(library.Model(inputs, x))
    kill(model, "first", [0])
    assert filters(check(model))["first"] == (3, 2)


@both
def test_normalisation_with_a_gamma_of_zero_kills_a_channel(library):
    model = cnn(library)
    gamma = model.get_layer("norm").gamma
    gamma.assign(gamma * np.array([1.0, 0.0, 1.0, 0.0], "float32"))
    assert filters(check(model))["first"] == (4, 2)


@both
@pytest.mark.parametrize("how", ["Multiply", "Maximum", "Minimum", "Add"])
def test_constants_at_masked_positions(library, how):
    """Keras 3 multiplies and compares valid entries only, so a constant is none there."""
    layers = library.layers
    inputs = library.Input((5, 4))
    masked = layers.Masking()(inputs)
    branches = [layers.Dense(6, name=name)(masked) for name in ("a", "b")]
    x = getattr(layers, how)(name="both")(branches)
    model = randomise(library.Model(inputs, layers.Dense(3, name="logits")(x)))
    for name in ("a", "b"):
        kill(model, name, [0, 1])
        set_bias(model, name, -1.5)
    done = compact(model)
    padded = probe(model)
    padded[:, 3:] = 0
    np.testing.assert_allclose(done.model(padded), model(padded), atol=1e-5)
    stays = library is keras and how != "Add"
    assert filters(done)["a"] == (6, 6 if stays else 4)
    # Masks are computed by operations of Keras, which are nobody's layers.
    alone = {row.layer for row in done.left_alone if not row.layer.startswith("masking")}
    assert alone == ({"both"} if stays else set())


@both
def test_a_layer_that_is_called_with_a_mask_is_left_alone(library):
    layers = library.layers
    inputs = library.Input((5, 4))
    x = layers.Dense(6, name="a")(layers.Masking()(inputs))
    x = layers.GlobalAveragePooling1D(name="mean")(x)
    model = randomise(library.Model(inputs, layers.Dense(3, name="logits")(x)))
    kill(model, "a", [0, 1])
    done = compact(model)
    reason = "'mean' (GlobalAveragePooling1D) is called with a mask"
    alone = [row.reason for row in done.left_alone if not row.layer.startswith("masking")]
    assert alone == [reason] * (library is keras)


@pytest.mark.parametrize("axis", [1, -1])
def test_the_mean_over_an_axis_is_no_average_of_branches(axis):
    inputs = keras.Input((6, 8))
    x = keras.layers.Dense(6, name="a")(inputs)
    x = keras.ops.average(x, axis=axis)
    model = randomise(keras.Model(inputs, keras.layers.Dense(3)(x)))
    kill(model, "a", [0, 1, 2])
    assert filters(check(model))["a"] == (6, 6)
    assert tscnc.inspection.sparsity(model).prunable


@both
def test_outputs_are_compared_each_by_its_own_size(library, monkeypatch):
    """A wrong logit is not hidden by an output that is a million times as large."""
    from tscnc_tf._channels import operations

    layers = library.layers
    inputs = library.Input((4,))
    x = layers.Dense(6, activation="sigmoid", name="a")(inputs)
    outputs = [layers.Dense(2, name="small")(x), layers.Rescaling(1e6)(layers.Dense(2)(inputs))]
    model = randomise(library.Model(inputs, outputs))
    kill(model, "a", [1])
    assert check(model).logit_tolerance == pytest.approx(1e-5, rel=2)
    monkeypatch.setattr(
        operations.Linear, "_folded", lambda self, *_: np.zeros(self.reads.shape[1])
    )
    with pytest.raises(RuntimeError, match=r"differ by .* where 1.* is allowed"):
        compact(model)


@both
@pytest.mark.parametrize("left", [3, 2])
def test_regularizers_of_groups_know_how_many_are_left(library, left):
    model = grouped_network(library)
    made = [tscnc.regularizers.ConditionNumber(0.1), library.regularizers.L2(0.1)]
    model = tscnc.pruning.add_regularizers(model, made[0], layers="grouped")
    layer = model.get_layer("grouped")
    kill(model, "grouped", range(2 * left, 8))
    new = compact(model).model.get_layer("grouped")
    assert (new.groups, new.kernel_regularizer.channel_groups) == (left, left)
    assert layer.kernel_regularizer.channel_groups == 4
    assert float(new.kernel_regularizer(new.kernel)) > 0
    # In a sum only this package's own depends on the groups.
    whole = tscnc.regularizers.RegularizerSum([layer.kernel_regularizer, made[1]])
    part, other = tscnc.regularizers.with_groups(whole, left).regularizers
    assert part.channel_groups == left and other is made[1]


@both
def test_the_shape_of_dropped_noise_follows(library):
    layers = library.layers
    model = randomise(
        library.Sequential(
            [
                library.Input((5, 5, 3)),
                layers.Conv2D(8, 3, name="a"),
                layers.Dropout(0.5, noise_shape=(None, 1, 1, 8), name="whole"),
                layers.Dropout(0.5, noise_shape=(None, 3, 3, 1)),
                layers.Flatten(),
                layers.Dense(2),
            ]
        )
    )
    kill(model, "a", [0, 1, 2])
    new = check(model).model
    assert tuple(new.get_layer("whole").noise_shape) == (None, 1, 1, 5)
    new.compile("sgd", "mse")
    new.fit(probe(model), np.zeros((5, 2)), verbose=0)


@both
def test_initializers_need_not_fit_the_smaller_shapes(library):
    start = np.arange(32.0).reshape(4, 8)
    layers, constant = library.layers, library.initializers.Constant(np.arange(8.0))
    hidden = layers.Dense(
        8, kernel_initializer=lambda *_, **__: start, bias_initializer=constant, name="a"
    )
    norm = layers.BatchNormalization(gamma_initializer=constant)
    model = library.Sequential([library.Input((4,)), hidden, norm, layers.Dense(2, name="logits")])
    kill(randomise(model), "a", [0, 5])
    done = check(model)
    assert filters(done)["a"] == (8, 6)
    kept = done.model.get_layer("logits").kernel_initializer
    assert isinstance(kept, library.initializers.GlorotUniform)


@both
def test_states_of_recurrent_layers_do_not_count_and_stay(library):
    layers = library.layers
    inputs = library.Input(batch_shape=(8, 3, 4))
    x = layers.LSTM(5, stateful=True, name="memory")(inputs)
    x = layers.Dense(6, activation="relu", name="a")(x)
    model = randomise(library.Model(inputs, layers.Dense(2)(x)))
    kill(model, "a", [0, 1])
    model.predict(probe(model, 8), verbose=0)
    before = [state.numpy() for state in model.get_layer("memory").states]
    assert all(np.any(state) for state in before)
    new = compact(model).model
    for state, old, fresh in zip(
        *(model.get_layer("memory").states, before, new.get_layer("memory").states), strict=True
    ):
        np.testing.assert_array_equal(state.numpy(), old)
        assert not np.any(fresh.numpy())


@both
def test_a_nested_model_that_casts_is_left_alone(library):
    layers = library.layers
    whole = library.Input((6,), dtype="int32")
    scaled = layers.Rescaling(0.5)(whole)
    inner = library.Model(whole, layers.Dense(5, name="b")(scaled), name="inner")
    inputs = library.Input((4,))
    model = library.Model(inputs, inner(layers.Dense(6, name="a")(inputs)))
    kill(randomise(model), "a", [0, 1])
    set_bias(model, "a", 1.7)
    assert reasons(check(model), "a") == {"'inner' (Functional) casts what it is called on": 2}


def test_tied_weights_are_refused():
    layers = tf_keras.layers
    inputs = tf_keras.Input((6,))
    first, second = (layers.Dense(6, use_bias=False, name=name) for name in "ab")
    model = tf_keras.Model(inputs, layers.Dense(2)(second(first(inputs))))
    second.kernel = first.kernel
    with pytest.raises(ValueError, match=r"weight 'a/kernel.*' that belongs to several layers"):
        compact(model)


@both
def test_activations_that_are_layers(library):
    layers = library.layers
    model = randomise(
        library.Sequential(
            [
                library.Input((4,)),
                layers.Dense(6, activation=layers.ReLU(max_value=1.0), name="a"),
                layers.Activation(layers.LeakyReLU()),
                layers.Dense(3),
                layers.Softmax(name="shares"),
            ]
        )
    )
    kill(model, "a", [0, 1])
    set_bias(model, "a", 0.3)
    done = check(model)
    assert filters(done)["a"] == (6, 4)
    assert [row.reason for row in done.left_alone] == ["'shares' mixes channels"]
    assert tscnc.inspection.sparsity(model).effective_sparsity is not None


@both
def test_branch_arithmetic(library):
    layers = library.layers
    inputs = library.Input((5,))
    parts = [layers.Dense(4, name=f"d{number}")(inputs) for number in range(6)]
    x = layers.Subtract()(parts[:2])
    x = layers.Average()([x, parts[2]])
    x = layers.Maximum()([x, parts[3]])
    x = layers.Minimum()([x, parts[4]])
    x = x + parts[5] if library is tf_keras else keras.ops.add(x, parts[5])
    x = layers.Rescaling(2.0, offset=-1.0)(x)
    x = layers.LeakyReLU()(x)
    model = randomise(library.Model(inputs, layers.Dense(2, name="logits")(x)))
    for number in range(6):
        kill(model, f"d{number}", [1, 3] if number else [1, 2, 3])
    sizes = filters(check(model))
    assert [sizes[f"d{number}"] for number in range(6)] == [(4, 2)] * 6


# --- what stays -----------------------------------------------------------------------------------


@both
def test_layers_that_are_not_understood_are_left_alone_and_named(library):
    layers = library.layers

    class Doubled(layers.Layer):
        def call(self, inputs):
            return 2.0 * inputs

    class MyConv(layers.Conv2D):
        def call(self, inputs):
            return super().call(inputs) + 1.0

    shared = layers.Conv2D(4, 3, padding="same", name="shared")
    inputs = library.Input((6, 6, 4))
    x = shared(shared(inputs))
    x = layers.Conv2D(4, 1, name="a")(x)
    x = layers.Lambda(lambda t: t[..., ::-1], name="flip")(x)
    x = layers.Conv2D(4, 1, name="b")(x)
    x = Doubled(name="doubled")(x)
    x = MyConv(4, 1, name="mine")(x)
    x = layers.Conv2D(4, 1, name="c")(x)
    x = layers.LayerNormalization(name="layernorm")(x)
    x = layers.Conv2D(4, 1, activation="softmax", name="d")(x)
    x = layers.Conv2D(4, 1, name="e")(x)
    model = randomise(library.Model(inputs, layers.GlobalAveragePooling2D()(x)))
    for name in ("shared", "a", "b", "mine", "c", "d"):
        kill(model, name, [0, 1])
    done = check(model)
    assert done.parameters_after == done.parameters_before
    assert {row.layer: row.reason for row in done.left_alone} == {
        "shared": "'shared' (Conv2D) is used 2 times",
        "flip": "'flip' (Lambda) is not understood",
        "doubled": "'doubled' (Doubled) is not understood",
        "mine": "'mine' (MyConv) is not understood",
        "layernorm": "'layernorm' (LayerNormalization) is not understood",
        "d": "'d' has the activation softmax, which may mix channels",
    }
    assert reasons(done, "a") == {"'flip' (Lambda) is not understood": 2}
    assert reasons(done, "b") == {"'doubled' (Doubled) is not understood": 2}
    assert reasons(done, "c") == {"'layernorm' (LayerNormalization) is not understood": 2}
    assert "Left alone: 'flip' (Lambda) is not understood." in str(done)


@both
def test_outputs_keep_their_shape_and_inputs_theirs(library):
    layers = library.layers
    first, second = library.Input((4,), name="one"), library.Input((4,), name="two")
    x = layers.Dense(4, name="hidden")(first)
    y = layers.Add(name="sum")([x, second])
    model = library.Model([first, second], [layers.Dense(3, name="head")(y), x])
    randomise(model)
    kill(model, "hidden", [0])
    kill(model, "head", [1])
    done = check(model)
    assert done.parameters_after == done.parameters_before
    assert reasons(done, "hidden") == {"it is an output of the model": 1}
    assert reasons(done, "head") == {"it is an output of the model": 1}


@both
def test_a_channel_of_an_input_holds_what_is_added_to_it(library):
    layers = library.layers
    inputs = library.Input((4,))
    x = layers.Add(name="sum")([inputs, layers.Dense(4, name="hidden")(inputs)])
    model = randomise(library.Model(inputs, layers.Dense(2, name="head")(x)))
    unread(model, "head", [0])
    done = check(model)
    assert filters(done)["hidden"] == (4, 4)
    assert reasons(done, "hidden") == {"tied to an input of the model": 1}


@both
def test_monte_carlo_dropout_is_no_inference(library):
    layers = library.layers
    inputs = library.Input((4,))
    x = layers.Dense(5, name="hidden")(inputs)
    x = layers.Dropout(0.0, name="drop")(x, training=True)
    model = randomise(library.Model(inputs, layers.Dense(2)(x)))
    kill(model, "hidden", [0])
    done = check(model)
    reason = "'drop' (Dropout) is called with more than its inputs"
    assert reasons(done, "hidden") == {reason: 1}


@both
def test_channels_first_is_left_alone(library):
    layers = library.layers
    inputs = library.Input((3, 6, 6))
    x = layers.ZeroPadding2D(1, data_format="channels_first", name="pad")(inputs)
    x = layers.Flatten()(x)
    model = randomise(library.Model(inputs, layers.Dense(2)(x)))
    assert [row.layer for row in check(model).left_alone] == ["pad"]


# --- what does not change otherwise ---------------------------------------------------------------


@both
def test_configurations_stay(library):
    layers = library.layers
    inputs = library.Input((6,), name="x")
    options = {"kernel_regularizer": tscnc.regularizers.TransformedL1(1e-3)}
    x = layers.Dense(5, activation="relu", name="frozen", trainable=False, **options)(inputs)
    x = layers.BatchNormalization(momentum=0.7, epsilon=1e-2, name="norm")(x)
    x = layers.Dense(4, bias_regularizer="l2", kernel_constraint="max_norm", name="free")(x)
    model = randomise(library.Model(inputs, layers.Dense(2, name="logits")(x)))
    kill(model, "frozen", [0])
    model.compile("sgd", "mse")
    new = check(model).model
    assert not getattr(new, "compiled", False)
    frozen, norm, free = (new.get_layer(name) for name in ("frozen", "norm", "free"))
    assert not frozen.trainable
    assert norm.trainable
    assert isinstance(frozen.kernel_regularizer, tscnc.regularizers.TransformedL1)
    assert (norm.momentum, norm.epsilon) == (0.7, 1e-2)
    assert type(free.bias_regularizer).__name__ == "L2"
    assert type(free.kernel_constraint).__name__ == "MaxNorm"
    assert len(new.losses) == len(model.losses) > 0
    assert len(new.trainable_weights) == len(model.trainable_weights)


@both
def test_a_frozen_model_stays_frozen(library):
    model = dense_model(library)
    model.trainable = False
    new = compact(model).model
    assert not new.trainable
    assert not new.trainable_weights


@both
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16"])
def test_sixteen_bits(library, policy):
    layers = library.layers
    inputs = library.Input((6, 6, 2))
    x = layers.Conv2D(6, 3, activation="relu", dtype=policy, name="conv")(inputs)
    x = layers.Flatten(dtype=policy)(x)
    model = library.Model(inputs, layers.Dense(3, dtype="float32", name="logits")(x))
    kill(model, "conv", [0, 5])
    set_bias(model, "conv", 0.5)
    done = compact(model)
    conv = done.model.get_layer("conv")
    assert conv.kernel.shape == (3, 3, 2, 4)
    assert conv.compute_dtype == policy.split("_")[-1]
    kinds = [tf.as_dtype(layer.kernel.dtype).name for layer in (conv, model.get_layer("conv"))]
    assert kinds[0] == kinds[1] == ("float16" if policy == "float16" else "float32")
    x = probe(model)
    np.testing.assert_allclose(done.model(x), model(x), atol=2e-2)


@both
def test_nested_models_are_followed(library):
    layers = library.layers
    image = library.Input((7, 7, 4), name="features")
    inside = layers.Conv2D(5, 3, activation="relu", name="conv")(image)
    inner = library.Model(image, layers.BatchNormalization(name="norm")(inside), name="inner")
    tail = library.Sequential(
        [library.Input((5, 5, 5)), layers.Conv2D(6, 3, name="conv"), layers.Flatten()], name="tail"
    )
    inputs = library.Input((9, 9, 2))
    x = layers.Conv2D(4, 3, name="stem")(inputs)
    model = library.Model(inputs, layers.Dense(3, name="head")(tail(inner(x))))
    randomise(model)
    kill(model, "stem", [0])
    kill(inner, "conv", [1, 2])
    kill(tail, "conv", [3])
    done = check(model)
    assert filters(done) == {
        "stem": (4, 3),
        "inner/conv": (5, 3),
        "inner/norm": (5, 3),
        "tail/conv": (6, 5),
        "head": (3, 3),
    }
    assert done.model.get_layer("inner").get_layer("conv").filters == 3
    assert type(done.model.get_layer("tail")) is library.Sequential


@both
def test_nested_models_with_several_inputs_and_outputs(library):
    layers = library.layers
    one, two = library.Input((4,)), library.Input((3,))
    outputs = [layers.Concatenate()([one, two]), layers.Dense(3, name="q")(one)]
    inner = library.Model([one, two], outputs, name="inner")
    inputs = library.Input((5,))
    joined, q = inner([layers.Dense(4, name="z")(inputs), layers.Dense(3, name="w")(inputs)])
    x = layers.Concatenate()([joined, q])
    model = randomise(library.Model(inputs, layers.Dense(2, name="head")(x)))
    kill(model, "z", [1])
    kill(model, "w", [0, 2])
    kill(inner, "q", [2])
    sizes = filters(check(model))
    assert sizes == {"z": (4, 3), "w": (3, 1), "inner/q": (3, 2), "head": (2, 2)}


@both
def test_a_nested_model_that_is_used_twice_is_left_alone(library):
    layers = library.layers
    inner = library.Sequential([library.Input((4,)), layers.Dense(4, name="d")], name="inner")
    inputs = library.Input((4,))
    x = layers.Dense(4, name="first")(inputs)
    model = randomise(library.Model(inputs, layers.Dense(2)(inner(inner(x)))))
    kill(model, "first", [0])
    kill(inner, "d", [1])
    done = check(model)
    assert done.parameters_after == done.parameters_before
    assert [(row.layer, "2 times" in row.reason) for row in done.left_alone] == [("inner", True)]
    assert reasons(done, "first") == {"'inner' (Sequential) is used 2 times": 1}


def subclass(library, kind):
    """A built model of a class of its own, with methods that its copy may have or not."""
    layers = library.layers
    inputs = library.Input((5,))
    hidden = layers.Dense(4, activation="sigmoid", name="hidden")
    head = layers.Dense(2, name="logits")
    if kind == "sequential":

        class Own(library.Sequential):
            def describe(self):
                return "mine"

        return Own([inputs, hidden, head], name="own")
    if kind == "constructor":

        class Own(library.Model):
            def __init__(self, width=2, **options):
                outputs = head(hidden(inputs))
                super().__init__(inputs=inputs, outputs=outputs, **options)
                self.width = width

        return Own(name="own")

    class Own(library.Model):
        def train_step(self, data):
            return {"loss": tf.reduce_sum(data[0])}

    if kind == "passes on":

        class Own(library.Model):
            def __init__(self, inputs, outputs, **options):
                super().__init__(inputs, outputs, **options)

    elif kind == "own argument":

        class Own(library.Model):
            def __init__(self, inputs, outputs, temperature=1.0, **options):
                super().__init__(inputs, outputs, **options)
                self.temperature = temperature

    return Own(inputs, head(hidden(inputs)), name="own")


@both
@pytest.mark.parametrize(
    "kind", ["sequential", "constructor", "same constructor", "passes on", "own argument"]
)
@pytest.mark.parametrize("pruned", [False, True])
def test_subclasses_with_a_graph(library, kind, pruned):
    model = randomise(subclass(library, kind))
    own = type(model)
    kill(model, "hidden", [1, 3])
    if pruned:  # the pruner gives the model another class
        pruner = tscnc.pruning.Pruner(model, tscnc.schedules.OneShot(0.5), layers="logits")
        pruner.finalize()
        done = compact(model)
        np.testing.assert_allclose(done.model(probe(model)), model(probe(model)), atol=1e-5)
    else:
        done = check(model)
    read = model.get_layer("logits").kernel.numpy()[[0, 2]].any(axis=1)
    assert pruned or read.all()
    assert filters(done)["hidden"] == (4, read.sum())
    classes = {"sequential": library.Sequential, "constructor": None, "own argument": None}
    if library is tf_keras:
        classes["passes on"] = None
    plain = classes.get(kind, own)
    if plain is None:
        plain = type(library.Model(i := library.Input((1,)), library.layers.Dense(1)(i)))
    assert type(done.model) is plain
    assert done.model.name == "own"


@both
def test_a_subclass_with_a_graph_inside_of_another_model(library):
    layers = library.layers
    inputs = library.Input((3,))
    inner = subclass(library, "constructor")
    x = layers.Dense(5, activation="tanh", name="first")(inputs)
    model = randomise(library.Model(inputs, layers.Dense(2, name="last")(inner(x))))
    kill(inner, "hidden", [0])
    kill(inner, "logits", [1])
    kill(model, "first", [2])
    sizes = filters(check(model))
    assert sizes == {
        **{"first": (5, 4), "own/hidden": (4, 3), "own/logits": (2, 1), "last": (2, 2)}
    }


def tripled(x):
    return 3.0 * x


@both
def test_other_layers_come_along_as_they_are(library):
    layers = library.layers
    normalisation = layers.Normalization(name="adapted")
    normalisation.adapt(np.random.default_rng(1).normal(3, 2, (50, 4)).astype("float32"))
    inputs = library.Input((6, 4), batch_size=5)
    x = normalisation(inputs)
    x = layers.Dense(4, activation=tripled, name="own", kernel_regularizer=lambda w: 0.0)(x)
    x = layers.Dense(4, name="a")(x)
    x = layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    x = layers.Dense(5, name="b")(x)
    x = layers.Bidirectional(layers.LSTM(3), name="recurrent")(x)
    x = layers.Dense(6, activation=tf.nn.relu, name="c")(x)
    x = layers.PReLU(name="prelu")(layers.Dense(4, name="d")(x))
    model = library.Model(inputs, layers.Dense(2, name="logits")(x))
    for name in ("own", "a", "b", "c", "d"):
        kill(model, name, [0, 2])
    done = check(model)
    assert {name: sizes for name, sizes in filters(done).items() if sizes[0] != sizes[1]} == {
        **{"a": (4, 2), "c": (6, 4)}
    }
    names = ["adapted", "own", "recurrent", "prelu"]
    assert [row.layer for row in done.left_alone] == names
    assert {row.layer: row.channels for row in done.kept} == {"own": 2, "b": 2, "d": 2}
    assert done.model.inputs[0].shape[0] == 5
    assert done.model.get_layer("own").activation is tripled


@both
@pytest.mark.parametrize("deferred", ["called", "built"])
def test_a_sequential_model_without_an_input_layer(library, deferred):
    layers = library.layers
    model = library.Sequential([layers.Dense(5, activation="relu", name="a"), layers.Dense(2)])
    model(np.zeros((2, 3), "float32")) if deferred == "called" else model.build((None, 3))
    randomise(model)
    kill(model, "a", [0, 1])
    assert filters(check(model))["a"] == (5, 3)


@both
def test_inputs_and_outputs_may_have_names(library):
    layers = library.layers
    one, two = library.Input((3,), name="one"), library.Input((4,), name="two")
    x = layers.Concatenate()([layers.Dense(5, name="d")(one), two])
    outputs = {"logits": layers.Dense(2, name="head")(x), "second": layers.Dense(1)(x)}
    model = randomise(library.Model({"two": two, "one": one}, outputs))
    kill(model, "d", [0])
    rng = np.random.default_rng(0)
    batch = {"one": rng.normal(size=(3, 3)), "two": rng.normal(size=(3, 4))}
    done = compact(model, probe=batch)
    assert filters(done)["d"] == (5, 4)
    before, after = model(batch), done.model(batch)
    assert set(before) == set(after) == {"logits", "second"}
    for name, values in before.items():
        np.testing.assert_allclose(after[name], values, atol=1e-6)


# --- the report, and errors -----------------------------------------------------------------------


@both
def test_the_report_is_json_and_a_table(library):
    model = cnn(library, padding="same")
    kill(model, "first", [0])
    done = compact(model)
    assert isinstance(done, Compaction)
    values = json.loads(json.dumps(done.to_dict()))
    assert values["parameters_after"] == done.parameters_after
    assert [row["name"] for row in values["layers"]] == ["first", "norm", "second", "logits"]
    assert "Compaction of network" in str(done)
    assert "two per multiply-add" in str(done)
    assert "network" not in repr(done)  # the models' own repr would say nothing


@both
def test_latency_is_measured_in_turns_and_only_if_asked(library):
    model = dense_model(library)
    calls = []
    done = compact(model)
    measured = done.measure_latency(np.zeros((4, 6), "float32"), rounds=5)
    calls.append(measured)
    for low, middle, high in (measured.before, measured.after):
        assert 0 < low <= middle <= high
    assert measured.ratio_quartiles[0] <= measured.ratio <= measured.ratio_quartiles[1]
    assert (measured.rounds, measured.examples) == (5, 4)
    assert "CPU" in measured.device or tf.config.get_visible_devices("GPU")
    assert "4 examples" in str(measured)
    assert json.loads(json.dumps(measured.to_dict()))["rounds"] == 5
    with pytest.raises(ValueError, match=r"batch must be .*, got an array of shape \(4, 7\)"):
        done.measure_latency(np.zeros((4, 7)))
    with pytest.raises(ValueError, match="rounds must be >= 1"):
        done.measure_latency(np.zeros((4, 6)), rounds=0)


@both
def test_what_can_not_be_compacted_gets_an_error_with_a_way_out(library):
    with pytest.raises(TypeError, match="model must be a Keras 3 or tf_keras model, got object"):
        compact(object())
    with pytest.raises(ValueError, match="has no weights yet"):
        compact(library.Sequential([library.layers.Dense(2)]))
    model = dense_model(library)
    with pytest.raises(
        ValueError, match=r"probe must be float32 \(any, 6\), got an array of shape \(2, 5\)"
    ):
        compact(model, probe=np.zeros((2, 5)))
    with pytest.raises(ValueError, match=r"probe must be float32 .*\(2, 2, 6\)"):
        compact(model, probe=[np.zeros((2, 6)), np.zeros((2, 6))])
    with pytest.raises(ValueError, match="tolerance must be >= 0"):
        compact(model, tolerance=-1.0)
    with pytest.raises(ValueError, match="probe must be finite"):
        compact(model, probe=np.full((2, 6), np.nan))
    broken = dense_model(library)
    broken.layers[-1].bias.assign([np.nan] * 3)
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        compact(broken)
    sized = library.Model(inputs := library.Input((None, 3)), library.layers.Dense(2)(inputs))
    with pytest.raises(ValueError, match="Pass probe="):
        compact(sized)
    done = compact(sized, probe=np.zeros((2, 4, 3)))
    assert done.layers[0].flops_before is None
    assert done.flops_before == 0

    class Own(library.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(ValueError, match=r"subclassed model \(Own\).* build it as a Sequential"):
        compact(Own())
    trainer = tscnc.AdversarialTraining(
        dense_model(library), attack=tscnc.attacks.FGSM(epsilon=0.1), loss=tscnc.losses.Madry()
    )
    with pytest.raises(ValueError, match=r"not the trainer: pass trainer\.model"):
        compact(trainer)

    class Changed(library.Model):
        def call(self, inputs, training=None, mask=None):
            return 2.0 * super().call(inputs)

    inputs = library.Input((3,))
    with pytest.raises(ValueError, match=r"has a call\(\) of its own"):
        compact(Changed(inputs, library.layers.Dense(2)(inputs)))

    class Closed(library.layers.Layer):
        def __init__(self, secret):
            super().__init__(name="closed")

        def call(self, inputs):
            return inputs

        def get_config(self):
            return {}

    with pytest.raises(ValueError, match="layer 'closed' of class Closed can't be rebuilt"):
        compact(library.Model(inputs, Closed(1)(inputs)))


def test_pruning_wrappers_have_to_be_stripped_first():
    pruned = tscnc.prune(dense_model(), tscnc.schedules.OneShot(0.5))
    with pytest.raises(ValueError, match="strip it first"):
        compact(pruned)
    assert compact(tscnc.strip(pruned)).parameters_before == 8 * 7 + 3 * 9


@both
def test_a_wrong_model_is_never_returned(library, monkeypatch):
    from tscnc_tf._channels import operations

    model = cnn(library)
    kill(model, "first", [1])
    model.get_layer("norm").beta.assign(np.full(4, 3.0, "float32"))
    monkeypatch.setattr(
        operations.Linear, "_folded", lambda self, *_: np.zeros(self.reads.shape[1])
    )
    with pytest.raises(RuntimeError, match=r"differ by .* where .* is allowed"):
        compact(model)


@both
def test_a_compacted_model_can_be_saved_and_trained(library, tmp_path):
    model = cnn(library)
    kill(model, "first", [1, 3])
    new = compact(model).model
    new.save(tmp_path / "small.keras")
    loaded = library.models.load_model(tmp_path / "small.keras")
    x = probe(model, 8)
    np.testing.assert_allclose(loaded(x), new(x), rtol=1e-6)
    new.compile("sgd", "mse")
    new.fit(x, np.zeros((8, 3)), verbose=0)


# --- any small network ----------------------------------------------------------------------------


@st.composite
def networks(draw):
    """Steps of a random network, and which filters of it are dead."""
    kinds = (
        "conv",
        "same",
        "norm",
        "act",
        "depthwise",
        "residual",
        "concat",
        "pool",
        "gate",
        "grouped",
    )
    steps = draw(st.lists(st.sampled_from(kinds), min_size=2, max_size=6))
    return steps, draw(st.integers(0, 2**16)), draw(st.sampled_from([0.3, 0.6, 0.9]))


def build(library, steps, rng):
    layers = library.layers
    inputs = library.Input((7, 7, 2))
    x = layers.Conv2D(4, 1, name="stem")(inputs)
    for kind in steps:
        size, channels = x.shape[1], x.shape[-1]
        act = str(rng.choice(["relu", "tanh", "sigmoid", "linear"]))
        if kind in ("conv", "same"):
            padding = "same" if kind == "same" or size < 3 else "valid"
            bias = bool(rng.integers(2))
            x = layers.Conv2D(5, 3, padding=padding, activation=act, use_bias=bias)(x)
        elif kind == "norm":
            x = layers.BatchNormalization()(x)
        elif kind == "act":
            x = layers.Activation(act)(x)
        elif kind == "depthwise":
            x = layers.DepthwiseConv2D(2, depth_multiplier=2, padding="same", activation=act)(x)
        elif kind == "residual":
            y = layers.Conv2D(channels, 3, padding="same", activation=act)(x)
            x = layers.Add()([x, layers.Conv2D(channels, 1)(y)])
        elif kind == "concat":
            x = layers.Concatenate()([layers.Conv2D(3, 1, activation=act)(x), x])
        elif kind == "grouped":
            x = layers.Conv2D(6, 1, activation=act)(x)
            padding = "same" if size < 2 or rng.integers(2) else "valid"
            x = layers.Conv2D(9, 2, groups=3, padding=padding, activation=act)(x)
        elif kind == "pool":
            x = layers.MaxPooling2D(2, strides=1, padding="same")(x)
        else:
            gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
            gate = layers.Conv2D(channels, 1, activation="sigmoid")(gate)
            x = layers.Multiply()([x, gate])
    x = layers.Flatten()(x)
    return library.Model(inputs, layers.Dense(2)(layers.Dense(4, activation="relu")(x)))


@both
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(network=networks())
def test_any_network_keeps_its_logits(library, network):
    steps, seed, share = network
    rng = np.random.default_rng(seed)
    model = randomise(build(library, steps, rng), seed)
    for layer in model.layers[:-1]:
        for name in ("kernel", "depthwise_kernel", "gamma"):
            variable = getattr(layer, name, None)
            if variable is not None and rng.integers(3):
                values = variable.numpy()
                values[..., rng.uniform(size=values.shape[-1]) < share] = 0
                if values.ndim > 1 and rng.integers(2):
                    values[..., rng.uniform(size=values.shape[-2]) < share / 2, :] = 0
                variable.assign(values)
        if getattr(layer, "use_bias", False) and rng.integers(2):
            layer.bias.assign(np.zeros(layer.bias.shape, "float32"))
    done = check(model)
    assert done.parameters_after <= done.parameters_before + sum(
        row.filters_after for row in done.layers
    )  # a bias may have come
    again = compact(done.model)
    assert again.flops_after == again.flops_before  # it was the fixed point


# --- networks of the literature -------------------------------------------------------------------


def magnitude_prune(model, share=0.3):
    """Set the smallest filters of all convolutions to zero, the last layer's apart."""
    for layer in model.layers[:-1]:
        if type(layer).__name__ not in ("Conv2D", "DepthwiseConv2D") or layer.name == "logits":
            continue
        kernel = layer.kernel.numpy()
        axis = 3 if type(layer).__name__ == "Conv2D" else 2
        norms = np.abs(kernel).sum(axis=tuple(a for a in range(4) if a != axis))
        dead = np.argsort(norms)[: int(share * norms.size)]
        np.moveaxis(kernel, axis, 0)[dead] = 0
        layer.kernel.assign(kernel)
        if layer.use_bias:
            layer.bias.assign(np.where(np.isin(np.arange(norms.size), dead), 0, layer.bias.numpy()))


def test_mobilenet():
    model = keras.applications.MobileNetV3Small(
        weights=None, input_shape=(32, 32, 3), classes=10, classifier_activation=None
    )
    magnitude_prune(model)
    done = check(model)
    assert not done.left_alone
    assert done.parameters_after < 0.6 * done.parameters_before
    assert done.flops_after < 0.6 * done.flops_before
    names = {row.name for row in done.layers}
    assert {row.layer for row in done.kept} <= names


def test_resnet():
    model = keras.applications.ResNet50(
        weights=None, input_shape=(32, 32, 3), classes=10, classifier_activation=None
    )
    magnitude_prune(model)
    done = check(model)
    assert not done.left_alone
    assert done.parameters_after < 0.7 * done.parameters_before
    sizes = filters(done)
    for name, (before, after) in sizes.items():
        if name.endswith(("_1_conv", "_2_conv")):
            assert before - after >= int(0.3 * before)  # nothing else uses what is inside a block
    # In the stream, what stays dead stays for another branch alone.
    assert all("another branch" in row.reason or "tied" in row.reason for row in done.kept)
    assert "more like these" in str(done)
