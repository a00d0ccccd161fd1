"""Hard-concrete gates: the distribution, the gated layer, and models with gates."""

from __future__ import annotations

import contextlib
import math
import warnings

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import FLAVOURS, blobs, conv_model, dense_model, fresh_process, images
from hypothesis import given, settings
from hypothesis import strategies as st

import tscnc_tf as tscnc
from tscnc_tf import functional, gates, inspection, pruning, schedules
from tscnc_tf._keras import flavours, gated, masks
from tscnc_tf.functional.gates import uniform

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
LOCATIONS = [-4.0, -2.0, -0.5, 0.0, 0.847, 2.5, 4.0]
# Five standard errors: a sound generator misses them once in two million draws.
ERRORS = 5.0


@pytest.fixture(params=FLAVOURS)
def library(request):
    return FLAVOURS[request.param]


# The distribution, against NumPy in float64


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gate(log_alpha, u):
    s = sigmoid((np.log(u) - np.log1p(-u) + log_alpha) / BETA)
    return np.clip(s * (ZETA - GAMMA) + GAMMA, 0, 1)


def midpoints(count=200_000):
    return (np.arange(count) + 0.5) / count


def mean_gate(log_alpha):
    """E[z], by the midpoint rule over u."""
    return gate(log_alpha, midpoints()).mean()


def probability(log_alpha):
    return sigmoid(log_alpha - BETA * np.log(-GAMMA / ZETA))


def inference_gate(log_alpha):
    return np.clip(sigmoid(np.asarray(log_alpha, float)) * (ZETA - GAMMA) + GAMMA, 0, 1)


@pytest.mark.parametrize("log_alpha", LOCATIONS)
def test_samples_have_the_mean_and_the_zeros_of_the_distribution(log_alpha):
    count = 400_000
    z = functional.hard_concrete(log_alpha, uniform(count, 7, 3)).numpy().astype(float)
    assert abs(z.mean() - mean_gate(log_alpha)) < ERRORS * z.std() / math.sqrt(count)
    p = float(functional.open_probability(log_alpha))
    assert p == pytest.approx(np.count_nonzero(gate(log_alpha, midpoints())) / 200_000, abs=1e-5)
    assert abs((z > 0).mean() - p) < ERRORS * math.sqrt(p * (1 - p) / count)


@pytest.mark.parametrize("log_alpha", LOCATIONS)
def test_the_gradient_through_a_sample_is_on_average_that_of_the_mean(log_alpha):
    variable = tf.Variable(log_alpha, dtype=tf.float64)
    with tf.GradientTape() as tape:
        mean = tf.reduce_mean(functional.hard_concrete(variable, midpoints()))
    step = 1e-3
    slope = (mean_gate(log_alpha + step) - mean_gate(log_alpha - step)) / (2 * step)
    assert float(tape.gradient(mean, variable)) == pytest.approx(slope, abs=2e-5)


@settings(max_examples=50)
@given(st.floats(-10, 10), st.floats(0, 1, width=32), st.floats(0, 5))
def test_gates_are_between_0_and_1_and_grow_with_log_alpha(log_alpha, u, more):
    low, high = (float(functional.hard_concrete(x, u)) for x in (log_alpha, log_alpha + more))
    assert 0 <= low <= high <= 1
    assert high == pytest.approx(
        gate(np.float32(log_alpha + more), np.clip(u, 2**-24, 1 - 2**-24)), abs=1e-5
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_ends_of_the_interval_are_safe_in_all_dtypes(dtype):
    """0 and 1 are what low precision makes of numbers near them."""
    log_alpha = tf.Variable([-4.0, 0.0, 4.0], dtype=dtype)
    ends = tf.constant([[0.0], [1.0]], dtype)
    for function in (
        lambda: functional.hard_concrete(log_alpha, ends),
        lambda: functional.deterministic_gate(log_alpha),
        lambda: functional.open_probability(log_alpha),
    ):
        with tf.GradientTape() as tape:
            value = function()
        assert value.dtype == (tf.float64 if dtype == "float64" else tf.float32)
        assert np.isfinite(value).all()
        assert np.isfinite(tape.gradient(value, log_alpha)).all()
    np.testing.assert_array_equal(functional.hard_concrete(log_alpha, ends), [[0, 0, 0], [1, 1, 1]])


def test_gates_of_inference_close_at_log_11():
    edge = math.log(11)
    at = [-edge - 1e-3, -edge + 1e-3, 0.0, edge - 1e-3, edge + 1e-3]
    value = functional.deterministic_gate(at).numpy()
    np.testing.assert_allclose(value, inference_gate(at), atol=1e-6)
    assert (value[0], value[4]) == (0, 1)
    assert 0 < value[1] < value[3] < 1


def test_draws_are_uniform_and_the_same_eagerly_in_graphs_and_under_xla():
    count = 20_001

    @tf.function
    def graph(draw):
        return uniform(count, 5, draw)

    @tf.function(jit_compile=True)
    def compiled(draw):
        return uniform(count, 5, draw)

    draw = tf.constant(9, tf.int64)
    u = uniform(count, 5, 9).numpy()
    np.testing.assert_array_equal(u, graph(draw))
    np.testing.assert_array_equal(u, compiled(draw))
    assert 0 < u.min() < u.max() < 1
    distance = np.abs(np.sort(u) - midpoints(count)).max()
    assert distance < 1.95 / math.sqrt(count), "Kolmogorov and Smirnov, at 0.1 %"
    for other in (uniform(count, 5, 10), uniform(count, 6, 9)):
        assert abs(np.corrcoef(u, other)[0, 1]) < ERRORS / math.sqrt(count)


# The layer, of every kind


def grouped(library, **options):
    return library.layers.Conv2D(4, 3, groups=2, **options)


KINDS = {
    "Dense": ((5,), lambda library, **o: library.layers.Dense(3, **o)),
    "Conv1D": ((6, 2), lambda library, **o: library.layers.Conv1D(4, 3, **o)),
    "Conv2D": ((6, 6, 2), lambda library, **o: library.layers.Conv2D(4, 3, **o)),
    "Conv2D, grouped": ((6, 6, 2), grouped),
    "Conv3D": ((4, 4, 4, 2), lambda library, **o: library.layers.Conv3D(4, 2, **o)),
    "Conv2DTranspose": ((4, 4, 2), lambda library, **o: library.layers.Conv2DTranspose(4, 3, **o)),
    "DepthwiseConv2D": (
        (6, 6, 3),
        lambda library, **o: library.layers.DepthwiseConv2D(3, depth_multiplier=2, **o),
    ),
    "SeparableConv2D": ((6, 6, 2), lambda library, **o: library.layers.SeparableConv2D(4, 3, **o)),
}


def gated_model(library, kind, seed=0, spread=2.0, use_bias=True, activation=None, **options):
    """A model of one gated layer whose gates and biases are drawn widely; and the layer."""
    shape, make = KINDS[kind]
    inputs = library.Input(shape)
    layer = gates.Gated(
        make(library, use_bias=use_bias, activation=activation, name="only"), **options
    )
    model = library.Model(inputs, layer(inputs))
    rng = np.random.default_rng(seed)
    layer.log_alpha.assign(rng.uniform(-spread, spread, layer.log_alpha.shape) * 2)
    if use_bias:
        layer.layer.bias.assign(rng.normal(size=layer.layer.bias.shape))
    return model, layer


def inputs_of(kind, count=3, seed=1):
    return np.random.default_rng(seed).normal(size=(count, *KINDS[kind][0])).astype("float32")


def groups_by_hand(kind, layer):
    """The weights of each group, told apart by indexing the kernel."""
    if kind == "Dense":
        return list(np.asarray(layer.kernel))
    if kind == "DepthwiseConv2D":
        kernel = np.asarray(layer.weights[0])
        return [kernel[:, :, i, m] for i in range(3) for m in range(2)]
    if kind == "Conv2DTranspose":
        kernel = np.asarray(layer.kernel)
        return [kernel[:, :, o, :] for o in range(4)]
    kernel = np.asarray(getattr(layer, "pointwise_kernel", layer.weights[0]))
    return [kernel[..., o] for o in range(kernel.shape[-1])]


def penalty_by_hand(log_alpha, groups, factor, decay, l0, a):
    u = np.array([0.5 * decay * np.sum(np.square(w, dtype=float)) + l0 * w.size for w in groups])
    x = probability(np.asarray(log_alpha, float)) * u
    return factor * np.sum((a + 1) * x / (a + x))


def plain_outputs(kind, layer, x, z):
    """What the layer inside should return: its filters, or its inputs, times the gates."""
    if kind == "Dense":
        return np.asarray(layer(x * z.astype("float32")))
    return np.asarray(layer(x)) * z.astype("float32")


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_computes_with_gated_weights(library, kind):
    model, layer = gated_model(library, kind)
    x = inputs_of(kind)
    z = inference_gate(layer.log_alpha)
    assert (z == 0).any()
    assert (z > 0.1).any()
    expected = plain_outputs(kind, layer.layer, x, z)
    np.testing.assert_allclose(model(x), expected, atol=1e-5)
    z = gate(np.asarray(layer.log_alpha, float), uniform(z.size, layer.seed, 1).numpy())
    expected = plain_outputs(kind, layer.layer, x, z)
    np.testing.assert_allclose(model(x, training=True), expected, atol=1e-4)
    assert int(layer.draws) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_and_its_gradient(library, kind):
    """The value by hand, the slope in log alpha by finite differences, that in w by scaling it."""
    arguments = {"sparsity_factor": 3.0, "weight_decay": 0.4, "l0_factor": 0.02, "a": 0.7}
    model, layer = gated_model(library, kind, **arguments)
    groups = groups_by_hand(kind, layer.layer)
    at = np.asarray(layer.log_alpha, float)

    def value(log_alpha, scale=1.0):
        return penalty_by_hand(
            log_alpha, [w.astype(float) * scale for w in groups], *arguments.values()
        )

    kernel = layer.groups.kernel
    with tf.GradientTape() as tape:
        (penalty,) = model.losses
    over_log_alpha, over_kernel = tape.gradient(
        penalty, [flavours.tensor_variable(v) for v in (layer.log_alpha, kernel)]
    )
    assert len(groups) == layer.groups.count
    assert float(penalty) == pytest.approx(value(at), rel=1e-5)
    step = 1e-5
    slopes = [(value(at + d) - value(at - d)) / (2 * step) for d in step * np.eye(len(at))]
    np.testing.assert_allclose(over_log_alpha, slopes, rtol=1e-4, atol=1e-7)
    along = (value(at, 1 + step) - value(at, 1 - step)) / (2 * step)
    assert float(tf.reduce_sum(over_kernel * kernel)) == pytest.approx(along, rel=1e-4)


def test_the_penalty_between_l1_and_a_count(library):
    options = {"weight_decay": 2.0, "l0_factor": 0.0}
    model, layer = gated_model(library, "Conv2D", a=1e9, **options)
    kernel = np.asarray(layer.layer.kernel).copy()
    kernel[..., 2] = 0
    layer.layer.kernel.assign(kernel)
    cost = np.square(kernel.reshape(-1, 4)).sum(axis=0)
    (l1,) = model.losses
    assert float(l1) == pytest.approx(np.sum(probability(layer.log_alpha) * cost), rel=1e-5)
    model, layer = gated_model(library, "Conv2D", a=1e-9, **options)
    layer.layer.kernel.assign(kernel)
    (count,) = model.losses
    assert float(count) == pytest.approx(3.0, rel=1e-5)


def test_gates_begin_where_the_drop_rate_says_the_same_in_both_kerases():
    values = []
    for library in FLAVOURS.values():
        layer = gates.Gated(library.layers.Conv2D(4000, 1), drop_rate=0.2, seed=3)
        layer.build((None, 4, 4, 1))
        values.append(np.asarray(layer.log_alpha))
    np.testing.assert_array_equal(*values)
    assert values[0].mean() == pytest.approx(math.log(4), abs=ERRORS * 0.01 / math.sqrt(4000))
    assert values[0].std() == pytest.approx(0.01, rel=0.06)


def test_a_draw_is_shared_by_the_batch_and_new_in_each_step(library):
    model, layer = gated_model(library, "Dense", spread=0.2)
    x = np.repeat(inputs_of("Dense", 1), 8, axis=0)
    first, second = (np.asarray(model(x, training=True)) for _ in range(2))
    for out in (first, second):
        np.testing.assert_allclose(out, out[:1].repeat(8, axis=0), atol=1e-6)
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(model(x), model(x))
    assert int(layer.draws) == 2, "inference draws nothing"


def test_before_batch_normalisation_a_usual_draw_tells_gates_nothing(library):
    """The penalty does, and rare draws (T20); without normalisation, every draw does."""
    x = inputs_of("Conv2D", 16)
    slopes = {}
    for normalised in (True, False):
        inner = [library.layers.BatchNormalization(epsilon=1e-9)] if normalised else []
        layer = gates.Gated(library.layers.Conv2D(4, 3, use_bias=False), sparsity_factor=0.0)
        model = library.Sequential([library.Input(x.shape[1:]), layer, *inner])
        loss = np.random.default_rng(5).normal(size=(16, *model.output_shape[1:]))
        layer.log_alpha.assign([-0.5] * 4)  # so that most gates are drawn between 0 and 1
        slopes[normalised] = []
        for _ in range(8):
            with tf.GradientTape() as tape:
                value = tf.reduce_sum(model(x, training=True) * loss.astype("float32"))
            gradient = tape.gradient(value, flavours.tensor_variable(layer.log_alpha))
            slopes[normalised].append(np.abs(gradient).max())
    assert max(slopes[True]) < 1e-3 < 0.1 < max(slopes[False])


def test_graphs_and_xla_draw_alike(library):
    model, layer = gated_model(library, "Conv2D", spread=0.2)
    x = inputs_of("Conv2D")
    outputs = []
    for compiled in (None, False, True):
        layer.draws.assign(5)

        def step(x):
            return model(x, training=True), model(x, training=True)

        run = step if compiled is None else tf.function(step, jit_compile=compiled)
        outputs.append(np.asarray(run(x)))
        assert int(layer.draws) == 7
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-5)
    np.testing.assert_allclose(outputs[2], outputs[0], atol=1e-5)
    assert np.abs(outputs[0][0] - outputs[0][1]).max() > 1e-3


def test_a_layer_in_two_places_has_the_same_gates_in_both_and_costs_once(library):
    inputs = library.Input((4,))
    layer = library.layers.Dense(4, name="twice")
    inner_input = library.Input((4,))
    inner = library.Model(inner_input, library.layers.Dense(4, name="deep")(inner_input))
    hidden = inner(layer(layer(inputs)))
    model = gates.add_gates(
        library.Model(inputs, inner(hidden)), sparsity_factor=2.0, l0_factor=0.1
    )
    rows = {row.name: row for row in gates.report(model).rows}
    assert set(rows) == {"twice", "deep"}
    twice, deep = (gated_named(model, name) for name in ("twice", "deep"))
    for step in range(3):
        x = inputs_of("Dense")[:, :4]
        out = np.asarray(model(x, training=True))
        expected = x
        for each in (twice, twice, deep, deep):
            u = uniform(4, each.seed, 1 + step).numpy()
            z = gate(np.asarray(each.log_alpha, float), u)
            expected = (expected * z) @ np.asarray(each.layer.kernel)
        np.testing.assert_allclose(out, expected, atol=1e-5)
        assert int(twice.draws) == int(deep.draws) == 2 * (step + 1)
        assert len(model.losses) == 2
    assert twice.seed != deep.seed


def gated_named(model, name):
    return next(layer for layer in gated.gated_layers(model) if layer.name == name)


def test_the_activity_regularizer_and_the_mask_of_the_layer_inside_stay(library):
    inputs = library.Input((3, 2))
    masked = library.layers.Masking()(inputs)
    dense = library.layers.Dense(2, activity_regularizer="l2", name="dense")
    model = library.Model(inputs, library.layers.LSTM(2)(dense(masked)))
    copy = gates.add_gates(model, "dense")
    layer = gated_named(copy, "dense")
    layer.log_alpha.assign([4.0, 4.0])
    x = np.random.default_rng(0).normal(size=(2, 3, 2)).astype("float32")
    x[:, 2] = 0.0
    np.testing.assert_allclose(copy(x), model(x), atol=1e-6)
    (expected,) = model.losses
    assert len(copy.losses) == 2
    assert float(tf.add_n(copy.losses) - layer._penalty(layer.log_alpha)) == pytest.approx(
        float(expected), rel=1e-5
    )


# Training


def adversarial(library, model, **options):
    trainer = tscnc.AdversarialTraining(
        model,
        attack=tscnc.attacks.PGD(epsilon=0.1, step_size=0.1, steps=1),
        loss=tscnc.losses.TRADES(beta=1.0),
    )
    trainer.compile(optimizer=library.optimizers.SGD(0.5), **options)
    return trainer


def plain(library, model, learning_rate=0.5, **options):
    loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=library.optimizers.SGD(learning_rate), loss=loss, **options)
    return model


STRONG = {"sparsity_factor": 100.0, "l0_factor": 1e-2}


def test_a_strong_factor_closes_gates_in_adversarial_training(library):
    model = gates.add_gates(conv_model(library), seed=1, **STRONG)
    before = gates.report(model)
    trainer = adversarial(library, model)
    logs = trainer.fit(
        *images(64), batch_size=16, epochs=2, verbose=0, callbacks=[tscnc.callbacks.GateLogger()]
    ).history
    after = gates.report(model)
    assert np.isfinite(logs["loss"]).all()
    assert before.expected_l0 > logs["expected_l0"][0] > logs["expected_l0"][1]
    assert logs["expected_l0"][1] == after.expected_l0 < 0.2 * before.expected_l0
    for row in after.rows:
        assert logs[f"expected_l0/{row.name}"][1] == row.expected_l0
        assert logs[f"open_gates/{row.name}"][1] == row.open_share
    assert [int(layer.draws) for layer in gated.gated_layers(model)] == [8, 8], "one a step"


def test_training_is_the_same_under_xla(library):
    weights = []
    for compiled in (False, True):
        model = gates.add_gates(dense_model(library, kernel_initializer="ones"), **STRONG)
        plain(library, model, 0.1, jit_compile=compiled)
        model.fit(*blobs(32), batch_size=16, epochs=2, verbose=0, shuffle=False)
        weights.append(model.get_weights())
        assert [int(layer.draws) for layer in gated.gated_layers(model)] == [4, 4]
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train", [plain, adversarial])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_log_alpha_stays_in_its_range(library, train, policy, sign):
    with dtype_policy(library, policy):
        model = gates.add_gates(dense_model(library), seed=1)
        for layer in gated.gated_layers(model):
            layer.sparsity_factor = -sign * 1e4  # a penalty, or a prize, too strong to resist
            layer.weight_decay, layer.l0_factor = 0.0, 1e-2
        trained = train(library, model)
        assert policy == "float32" or "LossScale" in type(trained.optimizer).__name__
        trained.fit(*blobs(64), batch_size=16, epochs=1, verbose=0)
    limit = np.float32(sign * math.log(100))
    for layer in gated.gated_layers(model):
        np.testing.assert_array_equal(np.asarray(layer.log_alpha), limit)


@contextlib.contextmanager
def dtype_policy(library, name):
    if library is tf_keras:
        change = tf_keras.mixed_precision.set_global_policy
    else:
        change = library.config.set_dtype_policy
    change(name)
    try:
        yield
    finally:
        change("float32")


def test_a_run_that_goes_on_from_a_checkpoint_draws_as_if_uninterrupted(library, tmp_path):
    x, y = blobs(32)
    options = {"batch_size": 16, "shuffle": False, "verbose": 0}

    def begun():
        return plain(library, gates.add_gates(dense_model(library), seed=2, **STRONG), 0.05)

    whole = begun()
    start = whole.get_weights()
    whole.fit(x, y, epochs=2, **options)
    first = begun()
    first.set_weights(start)
    first.fit(x, y, epochs=1, **options)
    path = tf.train.Checkpoint(model=first).write(str(tmp_path / "checkpoint"))
    second = begun()
    tf.train.Checkpoint(model=second).read(path).expect_partial()
    second.fit(x, y, epochs=1, **options)
    for a, b in zip(whole.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    gated_named(second, "hidden").draws.assign(0)  # and this is what the test would see otherwise
    assert np.abs(whole(x, training=True) - second(x, training=True)).max() > 1e-3


def test_replicas_draw_the_same_gates(library):
    strategy = tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    with strategy.scope():
        model = plain(library, gates.add_gates(dense_model(library), seed=1, **STRONG))
    model.fit(*blobs(32), batch_size=16, epochs=2, verbose=0)
    for layer in gated.gated_layers(model):
        for variable, steps in ((layer.log_alpha, None), (layer.draws, 4)):
            tensors = strategy.experimental_local_results(flavours.tensor_variable(variable))
            assert len(tensors) == 2
            np.testing.assert_array_equal(*tensors)
            assert steps is None or int(tensors[0]) == steps
        assert np.abs(np.asarray(layer.log_alpha) - math.log(0.7 / 0.3)).max() > 0.1

    drawn = strategy.run(tf.function(lambda: gated_named(model, "hidden")._gates(True)))
    one, other = strategy.experimental_local_results(drawn)
    np.testing.assert_array_equal(one, other)
    assert len(set(one.numpy())) > 1


# Into a model, and out of it


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_folding_keeps_the_outputs_and_closed_filters_are_zero(library, kind, use_bias):
    model, layer = gated_model(library, kind, use_bias=use_bias, activation="tanh")
    assert (inference_gate(layer.log_alpha) == 0).any()
    folded = gates.fold(model)
    x = inputs_of(kind)
    np.testing.assert_allclose(folded(x), model(x), atol=1e-5)
    plain_layer = folded.layers[-1]
    assert plain_layer.name == "only"
    assert type(plain_layer) is type(layer.layer)
    assert [w.shape for w in plain_layer.weights] == [w.shape for w in layer.layer.weights]
    closed = inference_gate(layer.log_alpha) == 0
    for group, is_closed in zip(groups_by_hand(kind, plain_layer), closed, strict=True):
        assert np.all(group == 0) == is_closed
        assert not np.signbit(group[group == 0]).any()
    if use_bias and kind != "Dense":
        np.testing.assert_array_equal(np.asarray(plain_layer.bias) == 0, closed)
    np.testing.assert_array_equal(model(x), gated_model_again(library, model)(x))


def gated_model_again(library, model):
    """A model from the same configuration, with the same weights."""
    again = type(model).from_config(model.get_config())
    again.set_weights(model.get_weights())
    return again


def with_spread_gates(library, seed=3, **options):
    """A convolutional network in which some gates are closed."""
    model = gates.add_gates(conv_model(library), **options)
    rng = np.random.default_rng(seed)
    for layer in gated.gated_layers(model):
        layer.log_alpha.assign(rng.permutation(np.linspace(-4, 4, layer.log_alpha.shape[0])))
        if layer.layer.name == "conv":
            layer.layer.bias.assign(rng.normal(size=6))
    return model


def test_add_gates_keeps_weights_and_names_and_leaves_the_model_alone(library):
    model = conv_model(library)
    before = [w.copy() for w in model.get_weights()]
    copy = gates.add_gates(model, "conv", drop_rate=0.4, a=2.0, seed=5)
    assert [layer.name for layer in copy.layers[1:]] == [layer.name for layer in model.layers[1:]]
    assert copy.name == model.name
    assert not getattr(copy, "optimizer", None)
    (layer,) = gated.gated_layers(copy)
    assert (layer.drop_rate, layer.a, layer.trainable) == (0.4, 2.0, True)
    layer.log_alpha.assign(np.full(6, 4.0))  # open
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    x, _ = images(4)
    np.testing.assert_allclose(copy(x), model(x), atol=1e-6)
    layer.layer.kernel.assign(layer.layer.kernel * 2.0)
    np.testing.assert_array_equal(model.get_weights()[0], before[0])


def test_layers_are_chosen_as_for_regularizers(library):
    model = conv_model(library)

    def chosen(layers):
        return [row.name for row in gates.report(gates.add_gates(model, layers)).rows]

    assert chosen(None) == ["conv", "logits"]
    assert chosen("log*") == chosen(library.layers.Dense) == ["logits"]
    assert chosen(model.layers[1]) == chosen(lambda layer: layer.name == "conv") == ["conv"]
    assert chosen(["conv", "logits"]) == ["conv", "logits"]
    nested = library.Sequential([library.Input((8, 8, 1)), model])
    assert chosen_in(nested, model) == ["conv", "logits"]
    frozen = conv_model(library)
    frozen.layers[1].trainable = False
    copy = gates.add_gates(frozen)
    assert [layer.trainable for layer in gated.gated_layers(copy)] == [False, True]
    assert len(copy.trainable_weights) == 2 + 3  # of the norm, and of the logits


def chosen_in(model, layers):
    return [row.name for row in gates.report(gates.add_gates(model, layers)).rows]


def test_kernels_that_can_have_no_gates_are_named(library):
    inputs = library.Input((5, 4))
    x = library.layers.LSTM(3, name="lstm", return_sequences=True)(inputs)
    x = library.layers.TimeDistributed(library.layers.Dense(2, name="each"), name="time")(x)
    model = library.Model(inputs, library.layers.Dense(2, name="last")(x))
    with pytest.warns(UserWarning, match="get no gates: .*kernel, .*, each/kernel. Gates are for"):
        copy = gates.add_gates(model)
    assert [row.name for row in gates.report(copy).rows] == ["last"]


def subclassed(library):
    class Net(library.Model):
        def __init__(self):
            super().__init__(name="net")
            self.one = gates.Gated(library.layers.Dense(3, name="one"))

        def call(self, inputs, training=None):
            return self.one(inputs, training=training)

    model = Net()
    model(np.zeros((1, 4), "float32"))
    return model


def test_a_subclassed_model_may_hold_gated_layers(library):
    model = subclassed(library)
    assert gates.report(model).gates == 4
    assert len(model.losses) == 1
    with pytest.raises(ValueError, match=r"subclassed model \(Net\).*`gated_variables\(\)` say"):
        gates.fold(model)
    with pytest.raises(ValueError, match=r"subclassed model \(Net\)"):
        tscnc.strip(model)


def test_errors_say_what_is_wrong_and_what_to_do(library):
    dense = dense_model(library)
    trainer = adversarial(library, gates.add_gates(dense))
    assert gates.fold(dense) is dense
    assert tscnc.strip(dense) is dense
    cases = [
        (lambda: gates.add_gates(subclassed(library)), ValueError, r"by `Gated\(layer\)`"),
        (lambda: gates.add_gates(gates.add_gates(dense)), ValueError, "gates already.*fold it"),
        (lambda: gates.add_gates(dense, "conv*"), ValueError, r"those that can are \['hidden', 'l"),
        (lambda: gates.add_gates(dense, 3), TypeError, "layers must be a layer class"),
        (lambda: gates.add_gates(3), TypeError, "model must be a Keras 3 or tf_keras model"),
        (lambda: gates.add_gates(dense, drop_rate=1.0), ValueError, "drop_rate must be < 1"),
        (lambda: gates.add_gates(dense, a=0), ValueError, "a must be > 0"),
        (lambda: gates.add_gates(dense, seed=-1), ValueError, "seed must be >= 0"),
        (lambda: gates.add_gates(dense, l0_factor=-1), ValueError, "l0_factor must be >= 0"),
        (lambda: gates.add_gates(adversarial(library, dense)), ValueError, "pass trainer.model"),
        (lambda: tscnc.strip(trainer), ValueError, "pass trainer.model"),
        (lambda: gates.report(dense), ValueError, "has no gates: add them"),
        (lambda: gates.Gated(library.layers.ReLU()), ValueError, "class ReLU can't have gates"),
        (lambda: gates.Gated(3), TypeError, "layer must be a layer of Keras 3 or tf_keras, got 3"),
        (lambda: pruning.compact(gates.add_gates(dense)), ValueError, "fold them into its weig"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    tscnc.prune_now(dense, 0.5)
    with pytest.raises(ValueError, match="is being pruned: add gates first"):
        gates.add_gates(dense)
    if library is tf_keras:
        wrapped = tscnc.prune(dense_model(library), schedules.OneShot(0.5))
        with pytest.raises(ValueError, match="is being pruned: add gates first"):
            gates.add_gates(wrapped)


def test_a_kernel_that_is_computed_is_not_left_without_gates_silently():
    class Halved(FLAVOURS["keras"].layers.Dense):
        @property
        def kernel(self):
            return 0.5 * self._kernel

    layer = Halved(4, name="halved")
    with pytest.raises(ValueError, match="layer 'halved' of class Halved does not compute with 1"):
        gates.Gated(layer)(np.ones((2, 4), "float32"))


@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_gated_layers_are_quantized_once_they_are_folded(mode):
    library = FLAVOURS["keras"]
    model = gates.add_gates(dense_model(library))
    x = blobs(16)[0]
    before = np.asarray(model(x))
    layer = gated_named(model, "hidden").layer
    for refused in (lambda: layer.quantize(mode), lambda: layer.enable_lora(2)):
        with pytest.raises(ValueError, match=r"layer 'hidden' can't be .*has gates.*gates\.fold\("):
            refused()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Keras says that inputs are not quantized
        with pytest.raises(ValueError, match="layer 'hidden' can't be quantized: it has gates"):
            model.quantize(mode)
        np.testing.assert_array_equal(model(x), before)
        folded = gates.fold(model)
        folded.quantize(mode)
    assert folded.layers[-1].quantization_mode == mode
    scale = np.abs(before).max()
    np.testing.assert_allclose(folded(x), before, atol=scale * (0.02 if mode == "int8" else 0.2))
    assert inspection.sparsity(folded).model_weights == 6 * 8 + 8 + 8 * 3 + 3
    with pytest.raises(ValueError, match=rf"'hidden' can't have gates: it is quantized \({mode}\)"):
        gates.add_gates(folded)


def test_a_loaded_gated_layer_refuses_to_be_quantized_too(tmp_path):
    library = FLAVOURS["keras"]
    gates.add_gates(dense_model(library)).save(tmp_path / "gated.keras")
    loaded = library.models.load_model(tmp_path / "gated.keras")
    with pytest.raises(ValueError, match="'logits' can't be quantized: it has gates"):
        gated_named(loaded, "logits").layer.quantize("int8")


def test_gates_and_lora_go_on_different_layers():
    model = dense_model(FLAVOURS["keras"])
    model.get_layer("hidden").enable_lora(2)
    with pytest.raises(ValueError, match=r"'hidden' can't have gates: LoRA is enabled"):
        gates.add_gates(model)
    copy = gates.add_gates(model, "logits")
    assert [row.name for row in gates.report(copy).rows] == ["logits"]
    assert [row.weights for row in inspection.sparsity(copy).rows] == [6 * 8, 8 * 3]


def test_gates_inside_another_layer_are_not_folded_silently(library):
    inputs = library.Input((3, 4))
    layer = library.layers.TimeDistributed(gates.Gated(library.layers.Dense(2, name="each")))
    model = library.Model(inputs, layer(inputs))
    with pytest.raises(ValueError, match="gates that can't be folded, in each: "):
        gates.fold(model)


def test_report_counts_by_hand(library):
    model = with_spread_gates(library)
    report = gates.report(model)
    expected = {}
    for row in report.rows:
        log_alpha = np.asarray(gated_named(model, row.name).log_alpha, float)
        p, z = probability(log_alpha), inference_gate(log_alpha)
        size = {"conv": 9, "logits": 3}[row.name]
        expected[row.name] = size * p.sum()
        assert (row.gates, row.weights) == (6, 6 * size)
        assert row.expected_open == pytest.approx(p.sum(), rel=1e-6)
        assert row.expected_l0 == pytest.approx(size * p.sum(), rel=1e-6)
        assert row.open_gates == np.count_nonzero(z) < 6
        assert row.mean_gate == pytest.approx(z.mean(), rel=1e-6)
    assert report.expected_l0 == pytest.approx(sum(expected.values()), rel=1e-6)
    assert report.open_share == report.open_gates / 12
    lines = [line.split() for line in str(report).splitlines()]
    assert ["conv", "Conv2D", "filter", "6"] in [line[:4] for line in lines]
    assert report.to_dict()["rows"][1]["open_share"] == report.rows[1].open_share


# With the rest of the package


def test_inspection_sees_kernels_as_they_act(library):
    model = with_spread_gates(library)
    folded = gates.fold(model)
    seen, plainly = inspection.sparsity(model), inspection.sparsity(folded)
    assert seen.not_followed
    assert seen.without_paths().rows == plainly.rows
    assert seen.model_sparsity == plainly.model_sparsity
    assert seen.rows[0].zeros == 9 * (6 - gates.report(model).rows[0].open_gates) > 0
    assert inspection.condition_numbers(model) == inspection.condition_numbers(folded)
    assert inspection.sizes(model) == inspection.sizes(folded)
    statuses = [
        [(row.name, row.zeros) for row in pruning.report(each).rows] for each in (model, folded)
    ]
    assert statuses[0] == statuses[1]


def test_regularizers_come_on_top(library):
    model = with_spread_gates(library)
    regularizer = tscnc.regularizers.TransformedL1(0.1)
    copy = pruning.add_regularizers(model, regularizer, layers="conv")
    x, _ = images(4)
    np.testing.assert_array_equal(copy(x), model(x))
    expected = sum(map(float, model.losses)) + float(regularizer(model.layers[1].layer.kernel))
    assert sum(map(float, copy.losses)) == pytest.approx(expected, rel=1e-5)
    assert len(copy.losses) == len(model.losses) + 1


ENGINES = [("tf_keras", "masks"), ("tf_keras", "tfmot"), ("keras", "masks")]


@pytest.mark.parametrize(("flavour", "engine"), ENGINES)
def test_gates_and_masks_together(flavour, engine, tmp_path):
    library = FLAVOURS[flavour]
    model = gates.add_gates(conv_model(library), seed=1, **STRONG)
    model = tscnc.prune(model, schedules.OneShot(0.5, begin_step=2), engine=engine)
    assert [row.name for row in pruning.report(model).pruned] == ["conv", "logits"]
    adversarial(library, model).fit(
        *images(64),
        batch_size=16,
        verbose=0,
        callbacks=tscnc.callbacks.pruning_callbacks(log_kernels=True),
    )
    pairs = list(masks.masked_variables(model))
    kept = [np.asarray(mask).astype(bool) for _, mask in pairs]
    for (weight, _), mask in zip(pairs, kept, strict=True):
        np.testing.assert_array_equal(np.asarray(weight) != 0, mask)
        assert mask.mean() == 0.5
    layer = gated_named(model, "conv")
    layer.log_alpha.assign([-4, -3, 3, 3, 4, 4])
    x, _ = images(8)
    expected = np.asarray(model(x))
    exported = tscnc.export_saved_model(model, tmp_path / "served")
    stripped = tscnc.strip(model)
    assert [type(part).__name__ for part in stripped.layers] == [
        type(part).__name__ for part in conv_model(library).layers
    ]
    np.testing.assert_allclose(stripped(x), expected, atol=1e-5)
    kernel = np.asarray(stripped.layers[1].kernel)
    np.testing.assert_array_equal(kernel != 0, kept[0] & np.array([0, 0, 1, 1, 1, 1], bool))
    assert exported.weights.rows[0].zeros == np.count_nonzero(kernel == 0)
    served = tf.saved_model.load(str(tmp_path / "served"))
    np.testing.assert_allclose(served.serve(x), expected, atol=1e-5)
    assert len(served.variables) == len(stripped.variables)


def test_tfmot_prunes_of_a_gated_layer_what_it_prunes_of_the_layer():
    inputs = tf_keras.Input((6, 6, 2))
    x = tf_keras.layers.DepthwiseConv2D(3, name="depthwise")(inputs)
    x = tf_keras.layers.SeparableConv2D(4, 3, name="separable")(x)
    model = tf_keras.Model(inputs, tf_keras.layers.Conv2D(3, 1, name="conv")(x))

    def pruned(model):
        with pytest.warns(UserWarning, match="unpruned: depthwise"):
            model = tscnc.prune(model, schedules.OneShot(0.5), engine="tfmot")
        return [(row.name, row.pruned, row.reason) for row in pruning.report(model).rows]

    assert pruned(gates.add_gates(model)) == pruned(model)
    chosen = tscnc.prune(
        gates.add_gates(model), schedules.OneShot(0.5), layers=tf_keras.layers.SeparableConv2D
    )
    names = [row.name for row in pruning.report(chosen).pruned]
    assert names == ["separable/pointwise_kernel"]


def test_schedules_that_are_gated_by_condition_measure_closed_filters(library, monkeypatch):
    model = gates.add_gates(conv_model(library))
    gated_named(model, "conv").log_alpha.assign([-4.0, *[4.0] * 5])
    schedule = schedules.ConditionGated(schedules.OneShot(0.5), max_condition_number=1e6)
    heard = []
    monkeypatch.setattr(
        schedules.ConditionGated, "update", lambda self, worst, step: heard.append(worst)
    )
    model = tscnc.prune(model, schedule, engine="masks")
    feed = tscnc.callbacks.ConditionFeed(1)
    plain(library, model, 0.0).fit(*images(16), verbose=0, callbacks=[feed])
    assert heard[0] == np.inf, "a filter that is zero"
    assert inspection.condition_numbers(gates.fold(model)).rows[0].condition_number == np.inf


def test_closed_filters_are_taken_out(library):
    model = with_spread_gates(library)
    x, _ = images(8)
    compaction = pruning.compact(gates.fold(model))
    left = compaction.model.get_layer("conv").filters
    both = [inference_gate(layer.log_alpha) > 0 for layer in gated.gated_layers(model)]
    assert left == np.count_nonzero(both[0] & both[1]) < 6
    np.testing.assert_allclose(compaction.model(x), model(x), atol=1e-5)


def test_exported_files_hold_what_acts(library, tmp_path):
    model = with_spread_gates(library)
    zeros = [row.zeros for row in inspection.sparsity(gates.fold(model)).rows]
    report = tscnc.export_litert(model, tmp_path / "model.tflite")
    assert [row.zeros for row in report.kernels] == zeros
    assert zeros[0] > 0
    x, _ = images(8)
    served = tscnc.load_litert(tmp_path / "model.tflite")
    np.testing.assert_allclose(served(x), model(x), atol=1e-5)
    assert gates.report(model).gates == 12, "the model itself keeps its gates"


FRESH = """
import pathlib, sys
import keras, numpy as np, tensorflow as tf, tf_keras
import tscnc_tf as tscnc
folder = pathlib.Path(sys.argv[1])
x = np.load(folder / "x.npy")
for library in (keras, tf_keras):
    name = library.__name__
    model = library.models.load_model(folder / f"{name}.keras")
    expected = np.load(folder / f"{name}.npy")
    def check(model):
        np.testing.assert_allclose(model(x), expected[0], atol=1e-6)
        np.testing.assert_allclose(model(x, training=True), expected[1], atol=1e-5)
    check(model)
    for load in (
        lambda m: m.load_weights(folder / f"{name}.weights.h5"),
        lambda m: tf.train.Checkpoint(model=m).read(str(folder / name)).expect_partial(),
    ):
        other = library.models.load_model(folder / f"{name}.keras")
        for weight in other.weights:
            weight.assign(tf.zeros_like(weight))
        load(other)
        check(other)
    assert tscnc.gates.report(model).to_dict()["expected_l0"] == float(sys.argv[2])
print("loaded")
"""


def test_gated_models_load_in_a_fresh_process(tmp_path):
    x, _ = images(8)
    np.save(tmp_path / "x.npy", x)
    for name, library in FLAVOURS.items():
        model = with_spread_gates(library, seed=3, sparsity_factor=7.0)
        model(x, training=True)
        model.save(tmp_path / f"{name}.keras")
        model.save_weights(tmp_path / f"{name}.weights.h5")
        tf.train.Checkpoint(model=model).write(str(tmp_path / name))
        np.save(tmp_path / f"{name}.npy", [model(x), model(x, training=True)])
    expected = gates.report(model).expected_l0
    assert fresh_process(FRESH, tmp_path, repr(expected)).strip() == "loaded"


def test_a_saved_trainer_goes_on(library, tmp_path):
    trainer = adversarial(library, gates.add_gates(dense_model(library), seed=1, **STRONG))
    x, y = blobs(32)
    trainer.fit(x, y, batch_size=16, verbose=0)
    trainer.save(tmp_path / "trainer.keras")
    back = library.models.load_model(tmp_path / "trainer.keras")
    for each in (trainer, back):
        each.fit(x, y, batch_size=16, verbose=0, shuffle=False)
    for a, b in zip(trainer.model.get_weights(), back.model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
