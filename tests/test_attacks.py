"""Attacks: an admission suite for all, then each against closed forms and another library."""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import json
import pickle
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

from tscnc_tf import attacks, losses
from tscnc_tf.attacks import (
    APGD,
    FAB,
    FGSM,
    PGD,
    Attack,
    AutoAttack,
    CleverHans,
    Custom,
    GradientAttack,
    Square,
    Transfer,
)
from tscnc_tf.attacks.pgd import Ascent
from tscnc_tf.functional import balls

SHAPE, CLASSES, BATCH = (4, 4, 2), 3, 7
SEED = tf.constant([0, 1])


def network(library=tf_keras, width=4, gain=1.0):
    """Return a small convolutional network with a BatchNorm that has something to lose."""
    layers = library.layers
    model = library.Sequential(
        [
            library.Input(SHAPE),
            layers.Conv2D(width, 3, padding="same"),
            layers.BatchNormalization(),
            layers.Activation("softplus"),  # no kinks, where rounding would decide the way
            layers.Flatten(),
            layers.Dense(CLASSES, dtype="float32"),
        ]
    )
    generator = np.random.default_rng(2)
    shapes = [weight.shape for weight in model.get_weights()]
    weights = [0.4 * generator.standard_normal(shape).astype("float32") for shape in shapes]
    weights[5] = 1.0 + np.abs(weights[5])  # the moving variance
    weights[-2] *= gain
    model.set_weights(weights)
    # So that no class has the upper hand.
    weights[-1] -= model(tf.fill((1, *SHAPE), 0.5), training=False).numpy()[0]
    model.set_weights(weights)
    return model


def wavy(x):
    """Return three logits with many local maxima."""
    kernel = tf.constant(np.random.default_rng(3).standard_normal((32, 3)), tf.float32)
    return 3.0 * tf.sin(2.0 * tf.reshape(x, (-1, 32)) @ kernel)


@pytest.fixture
def batch(rng):
    x = rng.uniform(size=(BATCH, *SHAPE)).astype("float32")
    return tf.constant(x), tf.constant(np.arange(BATCH) % CLASSES)


def linear(w, bias=0.0):
    """Return the two-class model with logits (0, w.x + bias)."""
    w = tf.convert_to_tensor(w)

    def logits(x):
        z = tf.linalg.matvec(tf.reshape(x, (tf.shape(x)[0], -1)), tf.reshape(w, (-1,))) + bias
        return tf.stack([tf.zeros_like(z), z], axis=1)

    return logits


def darker(model, x, y):
    return tf.maximum(x - 0.1, 0.0)


# --- Admission: what holds for every attack ---------------------------------------------------

ATTACKS = {
    FGSM: lambda **more: FGSM(**{"epsilon": "8/255", **more}),
    PGD: lambda **more: PGD(**{"epsilon": "8/255", "steps": 3, **more}),
    APGD: lambda **more: APGD(**{"epsilon": "8/255", "steps": 3, **more}),
    FAB: lambda **more: FAB(**{"epsilon": "8/255", "steps": 3, **more}),
    Square: lambda **more: Square(**{"epsilon": "8/255", "queries": 5, **more}),
    # In so large a ball no example is left for the attacks that take long.
    AutoAttack: lambda **more: AutoAttack(**{"epsilon": 0.8, **more}),
    CleverHans: lambda **more: CleverHans(
        "projected_gradient_descent",
        **{"epsilon": "8/255", "options": {"nb_iter": 3, "eps_iter": "4/255"}, **more},
    ),
    Custom: lambda **more: Custom(
        darker, **{"epsilon": 0.1 if more.get("norm") != "l2" else 0.1 * 32**0.5, **more}
    ),
    Transfer: lambda **more: Transfer(
        source=wavy, attack=PGD(**{"epsilon": "8/255", "steps": 3, **more})
    ),
}
every_attack = pytest.mark.parametrize("make", ATTACKS.values(), ids=[a.__name__ for a in ATTACKS])
every_norm = pytest.mark.parametrize("norm", balls.NORMS)


def all_subclasses(cls):
    return {cls}.union(*map(all_subclasses, cls.__subclasses__()))


def test_the_list_of_attacks_is_complete():
    ours = {cls for cls in all_subclasses(Attack) if cls.__module__.startswith("tscnc_tf.")}
    assert {cls for cls in ours if not inspect.isabstract(cls)} == set(ATTACKS)
    assert {getattr(attacks, name) for name in attacks.__all__} == {
        *ATTACKS,
        *(cls for cls in (Attack, GradientAttack)),
    }
    assert all(not inspect.isabstract(cls) and not cls.__subclasses__() for cls in ATTACKS)


@pytest.mark.parametrize("base", [Attack, GradientAttack])
def test_bases_are_abstract(base):
    with pytest.raises(TypeError, match="abstract"):
        base(epsilon=0.1)


@every_attack
@every_norm
def test_admission(make, norm, batch):
    x, y = batch
    attack = make(norm=norm)
    result = attack(network(), x, y, seed=3)
    assert result.shape == x.shape and result.dtype == x.dtype
    assert balls.lengths(result - x, norm).numpy().max() <= attack.epsilon_value * (1 + 1e-5)
    assert result.numpy().min() >= 0 and result.numpy().max() <= 1
    assert np.all(balls.lengths(result - x, norm) > 0)
    np.testing.assert_array_equal(attack(network(), x, y, seed=3), result)


@every_attack
def test_admission_of_the_object(make):
    attack = make(bounds=(0, 2))
    assert attack == make(bounds=[0.0, 2.0]) and hash(attack) == hash(make(bounds=(0, 2)))
    assert repr(attack).startswith(f"{type(attack).__name__}(") and "epsilon=" in repr(attack)
    if isinstance(attack, Transfer):
        changed = dataclasses.replace(attack, attack=dataclasses.replace(attack.attack, norm="l2"))
    else:
        changed = dataclasses.replace(attack, norm="l2")
    assert changed.norm == "l2" and changed != attack
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.norm = "l2"
    description = attack.describe()
    assert json.loads(json.dumps(description)) == description
    assert (
        set(description)
        == set(make().describe())
        >= {
            *("name", "epsilon", "epsilon_value", "norm", "step_size", "steps", "restarts"),
            *("objective", "targeted", "start", "bounds"),
        }
    )
    assert description["name"] == attack.name and attack.norm in attack.name
    if isinstance(attack, Custom | Transfer):
        with pytest.raises(TypeError, match=r"(function|source) cannot be written to a config"):
            attack.get_config()
    else:
        assert type(attack).from_config(json.loads(json.dumps(attack.get_config()))) == attack
        for library in (keras, tf_keras):  # as a saved trainer holds it
            saved = json.loads(json.dumps(library.saving.serialize_keras_object(attack)))
            assert saved["registered_name"] == f"tscnc_tf>{type(attack).__name__}"
            assert library.saving.deserialize_keras_object(saved) == attack


@every_attack
def test_admission_of_bad_arguments(make):
    for more, words in [
        ({"epsilon": 0.0}, "epsilon must be > 0"),
        ({"epsilon": "8:255"}, "a fraction like \"8/255\", got '8:255'"),
        ({"epsilon": 8}, r"the width of bounds, 1 for bounds=\(0.0, 1.0\), got 8.*8/255"),
        ({"norm": "l0"}, "norm must be one of 'linf', 'l2'.*, got 'l0'"),
        ({"bounds": (1, 0)}, "bounds must be .* with low < high"),
    ]:
        with pytest.raises(ValueError, match=words):
            make(**more)
    with pytest.raises(TypeError, match="epsilon must be a number"):
        make(epsilon=None)


@every_attack
def test_admission_of_bad_inputs(make, batch):
    x, y = batch
    attack, model = make(), linear(np.ones(32, "float32"))
    x3 = x[:3]
    for arguments, words in [
        ((tf.cast(x * 255, tf.uint8), y), r"float dtype, got uint8.*x / 255"),
        ((x * 255, y), r"within bounds=\(0.0, 1.0\), got values from .* to 25"),
        ((x[:0], y[:0]), "x must not be empty"),
        ((x * np.nan, y), "x must be finite"),
        ((x[:, 0, 0, 0], y), "a batch axis and at least one more"),
        ((x, y[:5]), "one label per example of x, 7, got 5"),
        ((x, {1}), "y must be an array or tensor of labels"),
        ((x, tf.cast(y, tf.float32)), "must hold integers .*, got float32"),
        ((x, y[:, None, None]), r"integers \(class indices\) of shape"),
        ((x3, tf.constant([[0.2, 0.2]] * 3)), "rows that are >= 0 and sum to 1.* 0.4 to 0.4"),
        ((x3, tf.constant([[1.2, -0.2]] * 3)), "sum to 1, got a smallest entry of -0.2"),
    ]:
        with pytest.raises(ValueError, match=words):
            attack(model, *arguments)
    with pytest.raises(ValueError, match="pair of integers"):
        attack(model, x, y, seed=(1, 2, 3))
    with pytest.raises(ValueError, match="pair of integers"):
        attack(model, x, y, seed=tf.constant([1, 2, 3]))
    for seed in (0.5, None, (1, "2")):
        with pytest.raises(TypeError, match="seed must be an integer"):
            attack(model, x, y, seed=seed)
    with pytest.raises(ValueError, match="epsilon must be at most the diagonal of the box"):
        make(epsilon=6.0, norm="l2")(model, x, y)


# --- The objects ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PGD(epsilon=0.1, step_size=0.0), "step_size must be > 0"),
        (lambda: PGD(epsilon="8/255", step_size=2), r"at most 2 \* epsilon.*0.0627.*, got 2"),
        (lambda: PGD(epsilon=0.1, steps=0), "steps must be >= 1, got 0"),
        (lambda: PGD(epsilon=0.1, restarts=0), "restarts must be >= 1, got 0"),
        (lambda: PGD(epsilon=0.1, start="zero"), "start must be one of None, 'none', 'uniform'"),
        (lambda: PGD(epsilon=0.1, objective="mse"), "objective must be one of None, 'cross_ent"),
        (lambda: PGD(epsilon=0.1, objective="kl", targeted=True), "'kl' can't be targeted"),
        (lambda: PGD(epsilon=0.1, objective="kl", start="none"), "'kl' has no gradient at x"),
        (lambda: PGD(epsilon=0.1, restarts=2, start="none"), "restarts=2 attempts are all"),
        (lambda: FGSM(epsilon=0.1, objective="kl"), "'kl' has no gradient at x.*FGSM"),
        (lambda: FGSM(epsilon=0.1, objective="kl", targeted=True), "'kl' can't be targeted"),
    ],
)
def test_arguments_that_make_no_sense(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_arguments_of_the_wrong_type():
    with pytest.raises(TypeError, match="targeted must be True or False, got 1"):
        PGD(epsilon=0.1, targeted=1)
    with pytest.raises(TypeError, match="function must be callable"):
        Custom("pgd", epsilon=0.1)
    with pytest.raises(TypeError, match="positional"):
        PGD(0.1)


def test_epsilon_is_kept_as_written():
    attack = PGD(epsilon="8/255", step_size="2/255", steps=20, restarts=5, norm="l2")
    assert (attack.epsilon, attack.step_size, attack.epsilon_value) == ("8/255", "2/255", 8 / 255)
    assert attack.name == "PGD-20x5 l2 8/255"
    assert attack.describe() == {
        "name": "PGD-20x5 l2 8/255",
        "epsilon": "8/255",
        "epsilon_value": 8 / 255,
        "norm": "l2",
        "step_size": "2/255",
        "step_size_value": 2 / 255,
        "steps": 20,
        "restarts": 5,
        "objective": "cross_entropy",
        "targeted": False,
        "start": "uniform",
        "bounds": [0.0, 1.0],
    }
    numpys = PGD(epsilon=np.float32(0.25), step_size=np.float64(0.1))
    assert type(numpys.epsilon) is float and json.dumps(numpys.get_config())
    assert PGD(epsilon=8, bounds=(0, 255), steps=10).name == "PGD-10 linf 8"
    assert PGD(epsilon=8, bounds=(0, 255), steps=10).describe()["step_size"] == "2"


def test_names():
    assert FGSM(epsilon=8 / 255).name == "FGSM linf 8/255"
    assert PGD(epsilon=0.5, norm="l2", objective="margin").name == "PGD-10 l2 0.5 margin"
    assert FGSM(epsilon="1/255", targeted=True).name == "FGSM linf 1/255 targeted"
    assert Custom(darker, epsilon="8/255").name == "darker linf 8/255"
    assert Custom(darker, epsilon="8/255", name="Darker").describe()["name"] == "Darker"


def test_defaults_fill_what_is_open():
    pgd = PGD(epsilon=0.1)
    assert pgd.with_defaults(objective="kl", start="gaussian") == PGD(
        epsilon=0.1, objective="kl", start="gaussian"
    )
    assert pgd.with_defaults() == pgd
    chosen = PGD(epsilon=0.1, objective="margin", start="uniform")
    assert chosen.with_defaults(objective="kl", start="gaussian") == chosen
    assert (pgd.describe()["objective"], pgd.describe()["start"]) == ("cross_entropy", "uniform")


def test_defaults_that_do_not_fit_are_passed_over():
    fgsm = FGSM(epsilon=0.1)
    assert fgsm.with_defaults(objective="kl", start="gaussian") == fgsm
    assert fgsm.with_defaults(objective="margin").objective == "margin"
    targeted = PGD(epsilon=0.1, targeted=True)
    assert targeted.with_defaults(objective="kl").objective is None
    at_x = PGD(epsilon=0.1, start="none")
    assert at_x.with_defaults(objective="kl", start="gaussian") == at_x
    for attack in (PGD(epsilon=0.1, restarts=2), PGD(epsilon=0.1, objective="kl")):
        assert attack.with_defaults(start="none") == attack
    custom = Custom(darker, epsilon=0.1)
    assert custom.with_defaults(objective="kl", start="gaussian") is custom
    with pytest.raises(ValueError, match="objective must be one of"):
        fgsm.with_defaults(objective="mse")
    with pytest.raises(ValueError, match="start must be one of"):
        fgsm.with_defaults(start="zero")


# --- Closed forms: the adversary of a linear model --------------------------------------------

W = np.array([1.0, -2.0, 0.5, 0.0], dtype=np.float32)
DIRECTIONS = {"linf": np.sign(W), "l2": W / np.linalg.norm(W)}


@every_norm
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("objective", [None, "margin"])
@pytest.mark.parametrize("attack", [FGSM, PGD])
def test_linear_model(attack, objective, targeted, norm):
    # Up raises the logit of class 1: what an attack on label 0 wants, or one that targets 1.
    # (Projected on a sphere again and again, a random start comes near the best point only.)
    more = {} if attack is FGSM else {"steps": 4, "start": "none" if norm == "l2" else "uniform"}
    attack = attack(epsilon=0.1, norm=norm, objective=objective, targeted=targeted, **more)
    x = tf.fill((2, 4), 0.5)
    up = np.array([[1.0], [-1.0]])
    result = attack(linear(W), x, [1, 0] if targeted else [0, 1], seed=5)
    moved = W != 0 if norm == "linf" else slice(None)  # else PGD leaves it where it started
    expected = 0.1 * up * DIRECTIONS[norm]
    np.testing.assert_allclose((result - x).numpy()[:, moved], expected[:, moved], atol=1e-6)


def test_bounds_clip_the_step():
    x = tf.constant([[0.95, 0.05, 0.5, 0.5]])
    result = FGSM(epsilon=0.1)(linear(W), x, [0])
    np.testing.assert_allclose(result, [[1.0, 0.0, 0.6, 0.5]], atol=1e-7)
    wide = FGSM(epsilon=20, bounds=(0, 255))(linear(W), 255 * x, [0])
    np.testing.assert_allclose(wide, [[255, 0, 147.5, 127.5]], atol=1e-4)


def test_a_sure_model_is_attacked_all_the_same():
    # At a margin of 200 the softmax is exactly (1, 0), and so cross-entropy's gradient exactly 0.
    model = linear(W, bias=-200.0)
    x = tf.fill((1, 4), 0.5)
    np.testing.assert_allclose(
        FGSM(epsilon=0.1)(model, x, [0]), 0.5 + 0.1 * np.sign(W)[None], atol=1e-6
    )


def test_kl_of_a_sure_model_is_no_noise(rng):
    # All but 1e-9 of the probability is on one class: less than a float32 near 1 can tell apart.
    kernel, x = rng.standard_normal((6, 3)), rng.uniform(size=(5, 6))
    nearby = x + 0.001 * rng.standard_normal(x.shape)

    def direction(dtype):
        def model(x):
            return x @ tf.cast(kernel, dtype) + tf.constant([21, 0, 0], dtype)

        ascent = Ascent(model, tf.cast(x, dtype), labels=None, objective="kl", targeted=False)
        return balls.steepest_ascent(ascent.gradient(tf.cast(nearby, dtype)), "l2")

    np.testing.assert_allclose(direction(tf.float32), direction(tf.float64), atol=5e-3)


def rows(hard, amount):
    return (1 - amount) * tf.one_hot(hard, CLASSES) + amount / CLASSES


@pytest.mark.parametrize("amount", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("attack", [FGSM, PGD], ids=["FGSM", "PGD"])
def test_smoothed_labels_are_attacked_as_hard_ones(attack, targeted, amount, batch):
    """However sure the network is, where to ascend the smoothed loss would make it surer."""
    x, _ = batch
    model = network(gain=40.0)
    y = tf.argmax(model(x, training=False), axis=-1)
    made = attack(epsilon="8/255", targeted=targeted)
    np.testing.assert_array_equal(made(model, x, rows(y, amount)), made(model, x, y))


def np_mixture_slope(labels, z):
    """The gradient of log((1 - P) / P), P = sum m p, by the quotient rule in NumPy."""
    low, high = labels.min(1, keepdims=True), labels.max(1, keepdims=True)
    m = (labels - low) / (high - low)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    share = np.sum(m * p, axis=1, keepdims=True)
    return -p * (m - share) / (share * (1 - share))


@pytest.mark.parametrize("amount", [0.0, 0.1])
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_mixtures_are_led_away_from_their_classes(share, amount, rng):
    """One step on a linear model, whose slope at x is W times that at the logits."""
    kernel = rng.standard_normal((6, CLASSES)).astype("float32")
    x = rng.uniform(0.3, 0.7, (BATCH, 6)).astype("float32")
    one = np.eye(CLASSES, dtype="float32")[np.arange(BATCH) % CLASSES]
    labels = share * one + (1 - share) * np.roll(one, 1, axis=1)
    slope = np_mixture_slope(labels, 4 * x @ kernel) @ kernel.T
    assert np.abs(slope).min() > 1e-4
    given = (1 - amount) * labels + amount / CLASSES
    found = FGSM(epsilon=0.1)(lambda x: 4 * x @ kernel, x, given)
    np.testing.assert_allclose(found - x, 0.1 * np.sign(slope), atol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "uint32", "uint64"])
def test_labels_of_any_integer_dtype(dtype, batch):
    x, y = batch
    model, attack = network(), FGSM(epsilon=0.1)
    expected = attack(model, x, y)
    labels = tf.constant(y.numpy().astype(dtype))
    np.testing.assert_array_equal(attack(model, x, labels), expected)
    inside = tf.function(lambda x, y: attack(model, x, y))(x, labels)
    np.testing.assert_allclose(inside, expected, atol=1e-6)


def test_a_label_that_int32_would_wrap_is_out_of_range(batch):
    x, y = batch
    with pytest.raises(ValueError, match="got labels from 0 to 4294967297"):
        FGSM(epsilon=0.1)(network(), x, np.where(y == 1, 2**32 + 1, 0))


# --- Another library --------------------------------------------------------------------------


@every_norm
@pytest.mark.parametrize("targeted", [False, True])
def test_agrees_with_cleverhans(norm, targeted, batch):
    x, y = batch
    model = network()
    ball = {"epsilon": {"linf": 0.1, "l2": 0.5}[norm], "norm": norm}
    step = ball["epsilon"] / 3
    np.testing.assert_allclose(
        FGSM(targeted=targeted, **ball)(model, x, y),
        CleverHans("fast_gradient_method", options={"targeted": targeted}, **ball)(model, x, y),
        atol=1e-5,
    )
    options = {"eps_iter": step, "nb_iter": 6, "targeted": targeted, "rand_init": False}
    np.testing.assert_allclose(
        PGD(step_size=step, steps=6, targeted=targeted, start="none", **ball)(model, x, y),
        CleverHans("projected_gradient_descent", options=options, **ball)(model, x, y),
        atol=1e-5,
    )


def test_kl_is_the_adversary_of_trades(batch):
    x, _ = batch
    model = network()
    attack = PGD(epsilon=0.05, step_size=0.01, steps=4, objective="kl", start="gaussian")
    reference = tf.nn.softmax(model(x, training=False))
    inner = tf.random.fold_in(tf.constant([0, 7]), 0, alg="philox")
    point = x + 0.001 * balls.normal(x.shape, inner, x.dtype)
    for _ in range(4):
        with tf.GradientTape() as tape:
            tape.watch(point)
            logs = tf.nn.log_softmax(model(point, training=False))
            loss = tf.reduce_sum(reference * (tf.math.log(reference) - logs))
        point = point + 0.01 * tf.sign(tape.gradient(loss, point))
        point = tf.clip_by_value(tf.clip_by_value(point, x - 0.05, x + 0.05), 0, 1)
    result = attack(model, x, seed=7)
    assert np.mean(np.abs(result - point) < 1e-5) > 0.98  # but for signs of nearly nothing


# --- Never outside of the ball or the bounds --------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    epsilon=st.floats(1e-4, 1.0),
    step=st.floats(0.05, 2.0),
    norm=st.sampled_from(balls.NORMS),
    start=st.sampled_from(["none", "uniform", "gaussian"]),
    objective=st.sampled_from(["cross_entropy", "margin"]),
    bounds=st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (-2.1179, 2.64)]),
    dtype=st.sampled_from(["float16", "bfloat16", "float32", "float64"]),
    seed=st.integers(0, 2**31 - 1),
)
def test_never_outside(epsilon, step, norm, start, objective, bounds, dtype, seed):
    generator = np.random.default_rng(seed)
    low, high = bounds
    epsilon *= high - low
    attack = PGD(
        epsilon=epsilon,
        step_size=step * epsilon,
        steps=3,
        norm=norm,
        start=start,
        objective=objective,
        bounds=bounds,
    )
    x = tf.cast(generator.uniform(low, high, (3, 6)), dtype)
    x = tf.clip_by_value(x, low, high)
    model = linear(tf.cast(generator.standard_normal(6), dtype))
    result = attack.perturb(model, x, tf.constant([0, 1, 0]), tf.constant([seed, 0]))
    assert result.dtype == x.dtype
    reach = balls.lengths(tf.cast(result, tf.float64) - tf.cast(x, tf.float64), norm)
    assert reach.numpy().max() <= max(epsilon * (1 + 1e-5), epsilon + 1e-6)
    assert bool(tf.reduce_all((result >= low) & (result <= high)))


def test_unrepresentable_bounds_and_a_last_bit():
    bounds = (-2.1179, 2.64)
    x = tf.constant([[-2.1179, 2.64]])  # in float32, 2.64 is a little more
    result = FGSM(epsilon=0.1, bounds=bounds)(linear([-1.0, 1.0]), x, [0])
    np.testing.assert_array_equal(result, x)


# --- Models of all kinds ----------------------------------------------------------------------


class Module(tf.Module):
    def __init__(self):
        super().__init__()
        self.kernel = tf.Variable(
            np.random.default_rng(0).standard_normal((32, 3)), dtype="float32"
        )

    def logits(self, x):
        return tf.reshape(x, (-1, 32)) @ self.kernel

    def __call__(self, x):
        return self.logits(x)


class Slotted:
    __slots__ = ()

    def __call__(self, x):
        return linear(np.ones(32, "float32"))(x)


class Branching(tf_keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = tf_keras.layers.Dense(CLASSES)

    def call(self, x, training=None):
        if tf.reduce_mean(x) > 0.25:
            x = 2.0 * x
        return self.dense(tf.reshape(x, (-1, 32)))


@pytest.mark.parametrize("kind", ["keras", "tf_keras", "branching", "lambda", "method", "module"])
def test_models_of_all_kinds_and_their_end(kind, batch):
    x, y = batch
    make = {
        "keras": lambda: network(keras),
        "tf_keras": network,
        "branching": Branching,
        "lambda": lambda: lambda x: tf.reshape(x, (-1, 32))[:, :CLASSES],
        "method": Module,
        "module": Module,
    }[kind]

    def attacked():
        owner = make()
        attack = PGD(epsilon="8/255", steps=2)
        assert np.any(attack(owner.logits if kind == "method" else owner, x, y) != x)
        return weakref.ref(owner)

    # Out of use, the model is gone: its compiled attack does not keep it.
    reference = attacked()
    gc.collect()
    assert reference() is None


def test_a_model_without_weak_references(batch):
    x, y = batch
    assert np.any(FGSM(epsilon=0.1)(Slotted(), x, y % 2) != x)


def test_both_kerases_agree(batch):
    x, y = batch
    attack = PGD(epsilon="8/255", steps=3)
    np.testing.assert_allclose(
        attack(network(keras), x, y), attack(network(tf_keras), x, y), atol=1e-5
    )


@pytest.mark.parametrize("library", [keras, tf_keras])
def test_batch_norm_is_left_alone(library, batch):
    x, y = batch
    model = network(library)
    before = [weight.copy() for weight in model.get_weights()]
    PGD(epsilon="8/255", steps=2, objective="kl", restarts=2)(model, x, y)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_weights_are_read_anew(batch):
    x, y = batch
    model, attack = network(), FGSM(epsilon=0.1)
    first = attack(model, x, y)
    model.set_weights([-weight for weight in model.get_weights()[:2]] + model.get_weights()[2:])
    assert np.any(attack(model, x, y) != first)


def test_errors_about_the_model(batch):
    x, y = batch
    attack = PGD(epsilon=0.1, steps=2)
    for model, words in [
        (lambda x: tf.one_hot(tf.cast(x[:, 0, 0, 0] > 0.5, tf.int32), 3), "not differentiable"),
        (lambda x: tf.numpy_function(lambda a: a, [x], tf.float32)[:, 0, 0], "not differentiable"),
        (lambda x: x, r"logits of shape \(batch, classes\), got \(7, 4, 4, 2\)"),
        (lambda x: {"logits": x[:, 0, 0]}, r"logits of shape \(batch, classes\), got dict"),
        (lambda x: tf.reshape(x, (-1, 32))[:, :1], "at least 2 classes"),
    ]:
        with pytest.raises(ValueError, match=words):
            attack(model, x, y % 2)
    with pytest.raises(ValueError, match="got dict"):
        PGD(epsilon=0.1, objective="kl")(lambda x: {"logits": x[:, 0, 0]}, x)
    with pytest.raises(ValueError, match="at least 3 classes"):
        PGD(epsilon=0.1, objective="dlr")(linear(np.ones(32, "float32")), x, y % 2)
    with pytest.raises(TypeError, match="model must be callable, got int"):
        attack(3, x, y)
    with pytest.raises(TypeError, match="model must be callable, got the class Mean"):
        attack(keras.metrics.Mean, x, y)
    with pytest.raises(TypeError, match="seed must be an integer, got <module 'numpy'"):
        attack(model, x, y, seed=np)


@every_attack
@pytest.mark.parametrize("collect", [list, tuple, lambda parts: dict(enumerate(parts))])
def test_several_inputs_are_refused(make, collect, batch):
    x, y = batch
    with pytest.raises(TypeError, match="x must be one array or tensor of inputs, got a"):
        make()(network(), collect([x, x]), y)


def test_a_function_is_attacked_as_it_is_now(batch):
    """A call compiles nothing of a function; a bound attack is as a tf.function is."""
    x, y = batch
    weights = np.linspace(-1.0, 1.0, 32).astype("float32")
    used, calls = [weights], []

    def logits(x):
        calls.append(x.shape[0])
        return linear(used[0])(x)

    attack = FGSM(epsilon=0.1)
    bound = attack.bind(logits)
    before = attack(logits, x, y % 2)
    np.testing.assert_array_equal(bound(x, y % 2), before)
    used[0] = -weights
    np.testing.assert_array_equal(attack(logits, x, y % 2), attack(linear(-weights), x, y % 2))
    np.testing.assert_array_equal(bound(x, y % 2), before)
    assert np.any(attack(logits, x, y % 2) != before)


@pytest.mark.parametrize("library", [keras, tf_keras])
def test_a_changed_layer_of_a_model_is_seen(library, batch):
    x, y = batch
    model, attack = network(library), PGD(epsilon=0.1, steps=2)
    before = attack(model, x, y)
    model.layers[0].activation = library.activations.tanh
    after = attack(model, x, y)
    assert np.any(after != before)
    np.testing.assert_array_equal(after, PGD(epsilon=0.1, steps=2)(model, x, y))


class Weighted(keras.layers.Layer):
    """A layer that multiplies by an array, its attribute `factors`."""

    def call(self, inputs):
        return inputs * self.factors


@pytest.mark.parametrize("library", [keras, tf_keras])
def test_statistics_that_are_adapted_again_are_those_that_are_attacked(library, batch):
    x, y = batch
    norm = library.layers.Normalization()
    norm.adapt(np.asarray(x))
    inner = network(library)
    model = library.Sequential([library.Input(x.shape[1:]), norm, inner])
    attack = PGD(epsilon=0.1, steps=2)
    before = attack(model, x, y)
    norm.adapt(1.0 - 10.0 * np.asarray(x))
    after = attack(model, x, y)
    assert np.any(after != before)
    np.testing.assert_array_equal(after, PGD(epsilon=0.1, steps=2)(model, x, y))


class Switched(Weighted):
    """A layer that multiplies by those of its arrays that its list of functions chooses."""

    @property
    def factors(self):
        return self.chosen[0](self.arrays["factors"][0])


@pytest.mark.parametrize("attribute", ["factors", "arrays", "chosen"])
def test_an_array_of_a_layer_is_the_one_that_is_attacked(attribute, batch):
    x, y = batch
    ones = np.ones(3, np.float32)
    layer = Weighted() if attribute == "factors" else Switched()
    if attribute == "factors":
        layer.factors = ones
    else:
        layer.chosen, layer.arrays = [np.abs], {"factors": (ones,)}
    model = keras.Sequential([keras.Input(x.shape[1:]), network(keras), layer])
    attack = PGD(epsilon=0.1, steps=2)
    before = attack(model, x, y)
    np.testing.assert_array_equal(attack(model, x, y), before)
    changed = {"factors": -ones, "arrays": {"factors": (0 * ones,)}, "chosen": [np.negative]}
    setattr(layer, attribute, changed[attribute])
    after = attack(model, x, y)
    assert np.any(after != before)
    np.testing.assert_array_equal(after, PGD(epsilon=0.1, steps=2)(model, x, y))


@pytest.mark.parametrize("kind", ["keras", "tf_keras", "branching"])
def test_an_attack_holds_what_it_compiles_for_a_model(kind, batch, monkeypatch):
    """Calls on other batches, and training in between, compile nothing more; a copy holds none."""
    x, y = batch
    model = {"keras": lambda: network(keras), "tf_keras": network, "branching": Branching}[kind]()
    model(x)
    library = keras if kind == "keras" else tf_keras
    attack, traces = PGD(epsilon=0.1, steps=2), []
    original = PGD.perturb

    def counted(*args, **kwargs):
        traces.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(PGD, "perturb", counted)
    attack(model, x, y)
    assert len(traces) == 1
    attack(model, x[:2], y[:2], seed=9)
    assert len(traces) == 1
    if kind != "branching":
        model.compile("sgd", library.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(x, y, verbose=0)
        attack(model, x, y)
        assert len(traces) == 1
    copies = [copy.deepcopy(attack), pickle.loads(pickle.dumps(attack)), copy.copy(attack)]
    assert all(each == attack and vars(each) == dataclasses.asdict(attack) for each in copies)
    attack(model, x, tf.one_hot(y, CLASSES))
    assert len(traces) == 2


def test_errors_about_the_labels(batch):
    x, y = batch
    model = network()
    for objective in ("cross_entropy", "margin", "dlr"):
        with pytest.raises(ValueError, match=f"y is missing: objective='{objective}' needs"):
            PGD(epsilon=0.1, objective=objective)(model, x)
    with pytest.raises(ValueError, match="y is missing: a targeted attack needs the classes"):
        PGD(epsilon=0.1, targeted=True)(model, x)
    attack = FGSM(epsilon=0.1)
    with pytest.raises(ValueError, match=r"y must be in 0 ... 2.* got labels from 0 to 3"):
        attack(model, x, [0, 1, 2, 0, 1, 2, 3])
    with pytest.raises(ValueError, match="got labels from -1"):
        attack(model, x, y - 1)
    with pytest.raises(ValueError, match=r"one-hot of shape \(batch, 3\), got .*, 2"):
        attack(model, x, tf.one_hot(y % 2, 2))


@pytest.mark.parametrize("form", ["column", "one_hot", "int64", "list"])
def test_labels_of_all_forms(form, batch):
    x, y = batch
    model, attack = network(), FGSM(epsilon=0.1)
    labels = {
        "column": y[:, None],
        "one_hot": tf.one_hot(y, CLASSES),
        "int64": tf.cast(y, tf.int64),
        "list": y.numpy().tolist(),
    }[form]
    np.testing.assert_array_equal(attack(model, x, labels), attack(model, x, y))


def test_custom_attacks(batch):
    x, y = batch
    seen = []

    def function(model, x, y):
        seen.append((model, y))
        return darker(model, x, y).numpy()

    attack = Custom(function, epsilon=0.1)
    model = network()
    np.testing.assert_allclose(attack(model, x, y), np.maximum(x - 0.1, 0))
    assert seen[0][0] is model and np.all(seen[0][1].numpy() == y.numpy())
    with pytest.raises(ValueError, match=r"half linf 0.1 must return .* of the shape of x"):
        Custom(lambda model, x, y: x[:2], epsilon=0.1, name="half linf 0.1")(model, x, y)


def test_transferred_attacks(batch):
    x, y = batch
    source, asked = network(), []

    def judged(x):
        asked.append(x)
        return wavy(x)

    inner = PGD(epsilon="8/255", steps=3, norm="l2", bounds=(0, 2))
    attack = Transfer(source=source, attack=inner)
    assert (attack.epsilon, attack.norm, attack.bounds) == ("8/255", "l2", (0.0, 2.0))
    assert attack.name == f"PGD-3 l2 8/255 from {source.name}"
    assert attack.describe() == inner.describe() | {"name": attack.name, "source": source.name}
    np.testing.assert_array_equal(attack(judged, x, y, seed=5), inner(source, x, y, seed=5))
    assert np.any(attack(judged, x, y, seed=6) != inner(source, x, y, seed=5))
    assert not attack.uses_gradient and inner.uses_gradient
    graph = tf.function(lambda x, y: attack(judged, x, y, seed=5))
    np.testing.assert_allclose(graph(x, y), inner(source, x, y, seed=5), atol=1e-6)
    assert not asked


def shifted(shift):
    """Logits (s, -s) of s = sum(x) - 2 + shift."""
    return lambda x: tf.stack([s := tf.reduce_sum(x, axis=1) - 2.0 + shift, -s], axis=1)


@pytest.mark.parametrize(
    "attack",
    [
        APGD(epsilon=0.1, steps=10),
        APGD(epsilon=0.1, steps=10, loss="targeted_dlr"),
        Square(epsilon=0.1, queries=200),
        AutoAttack(epsilon=0.1),
    ],
    ids=lambda attack: attack.name,
)
def test_the_strongest_points_are_transferred_and_not_the_first_ones(attack, rng, monkeypatch):
    """A model further away from its boundary is fooled where its own worst case fools it."""
    short = (APGD(epsilon=0.1, steps=1), Square(epsilon=0.1, queries=200))
    monkeypatch.setattr(AutoAttack, "attacks", short)
    x = rng.uniform(0.1, 0.9, (60, 4)).astype("float32")
    distance = x.sum(axis=1) - 2.0
    y = np.where(distance > 0, 0, 1)
    truth = np.where(y == 0, 1.0, -1.0)
    transfer = Transfer(source=shifted(0.0), attack=attack)
    # The target is right wherever the source is, by 0.2 more.
    target = lambda x: shifted(0.0)(x) + 0.2 * np.stack([truth, -truth], axis=1)[: len(x)]  # noqa: E731
    found = transfer.bind(target)(x, y, seed=3).numpy()
    fooled = truth * (found.sum(axis=1) - 2.0) + 0.2 < 0
    np.testing.assert_array_equal(fooled, np.abs(distance) < 0.4 - 0.2)
    np.testing.assert_array_equal(transfer.bind(target)(x, y, seed=3), found)
    if not isinstance(attack, AutoAttack):
        np.testing.assert_allclose(found, x - 0.1 * truth[:, None], atol=1e-6)
        early = attack.bind(transfer.source)(x, y, seed=3).numpy()
        assert np.sum(truth * (early.sum(axis=1) - 2.0) + 0.2 < 0) < np.sum(fooled)


@pytest.mark.parametrize("kind", [Transfer, Custom])
def test_attacks_in_l1_can_be_transferred_and_declared(kind, rng):
    if kind is Custom:
        attack = Custom(lambda model, x, y: x, epsilon=0.3, norm="l1")
    else:
        attack = Transfer(source=shifted(0.0), attack=APGD(epsilon=0.3, steps=10, norm="l1"))
    x = rng.uniform(0.2, 0.8, (8, 4)).astype("float32")
    found = attack(shifted(0.0), x, np.zeros(8, int)).numpy()
    assert attack.norm == "l1" and np.all(np.abs(found - x).sum(axis=1) <= 0.3 + 1e-5)


def test_transferred_attacks_take_defaults_and_names():
    transfer = Transfer(source=wavy, attack=PGD(epsilon=0.1))
    assert transfer.with_defaults(objective="kl", start="gaussian") == Transfer(
        source=wavy, attack=PGD(epsilon=0.1, objective="kl", start="gaussian")
    )
    assert transfer.name == "PGD-10 linf 0.1 from wavy"
    assert Transfer(source=Slotted(), attack=FGSM(epsilon=0.1)).describe()["source"] == "Slotted"
    targeted = Transfer(source=wavy, attack=FGSM(epsilon=0.1, targeted=True))
    assert targeted.describe()["targeted"] is True


def test_arguments_of_transferred_attacks():
    fgsm = FGSM(epsilon=0.1)
    for source in (3, None, Slotted):
        with pytest.raises(TypeError, match=r"source must be a model, callable as"):
            Transfer(source=source, attack=fgsm)
    for attack in (darker, FGSM):
        with pytest.raises(TypeError, match=r"attack must be one of .*becomes an attack by Custom"):
            Transfer(source=wavy, attack=attack)
    with pytest.raises(ValueError, match=r"attack must run on source itself, got Transfer\("):
        Transfer(source=wavy, attack=Transfer(source=wavy, attack=fgsm))
    with pytest.raises(TypeError, match="epsilon"):
        Transfer(source=wavy, attack=fgsm, epsilon=0.2)


# --- Graphs, seeds, restarts, precision -------------------------------------------------------


def test_one_trace_for_every_batch_size(batch):
    x, y = batch
    calls = []
    model = linear(np.ones(32, "float32"))

    def counted(x):
        calls.append(x.shape[0])
        return model(x)

    attack = PGD(epsilon=0.1, steps=3)
    bound = attack.bind(counted)
    bound(x, y % 2)
    assert set(calls) == {None}
    traced = len(calls)
    bound(x[:2], y[:2] % 2)
    np.testing.assert_array_equal(bound(x, y % 2, seed=9), attack(model, x, y % 2, seed=9))
    assert len(calls) == traced
    bound(x, tf.one_hot(y % 2, 2))
    assert len(calls) > traced
    compiled = tf.function(counted, reduce_retracing=True)
    attack(compiled, x, y % 2)
    attack(compiled, x[:2], y[:2] % 2)
    traced = len(calls)
    attack(compiled, x[:5], y[:5] % 2, seed=9)
    assert len(calls) == traced


def with_xla(attack, model, x, y):
    return tf.function(lambda x, y: attack(model, x, y, seed=4), jit_compile=True)(x, y)


@pytest.mark.parametrize(
    ("attack", "atol"),
    [
        (PGD(epsilon="8/255", steps=2, step_size="1/255"), 1e-5),
        # KL is flat near x: of its first gradient float32 leaves three digits.
        (PGD(epsilon=0.5, norm="l2", steps=12, objective="kl", start="gaussian"), 5e-3),
    ],
)
def test_xla_comes_to_the_same(attack, atol, batch):
    x, y = batch
    model = network()
    np.testing.assert_allclose(
        with_xla(attack, model, x, y), attack(model, x, y, seed=4), atol=atol
    )


def test_xla_and_restarts(batch):
    x, y = batch
    attack = PGD(epsilon=0.06, steps=2, restarts=3, targeted=True)
    np.testing.assert_allclose(with_xla(attack, wavy, x, y), attack(wavy, x, y, seed=4), atol=1e-5)


def test_inside_a_graph(batch):
    x, y = batch
    model, attack = network(), PGD(epsilon="8/255", steps=3)
    graph = tf.function(lambda x, y, seed: attack(model, x, y, seed=seed))
    np.testing.assert_allclose(
        graph(x, y, tf.constant([4, 2])), attack(model, x, y, seed=(4, 2)), atol=1e-6
    )
    np.testing.assert_allclose(graph(x, y, tf.constant(4)), attack(model, x, y, seed=4), atol=1e-6)


@pytest.mark.parametrize("steps", [2, 12])
def test_unrolled_and_looped_are_the_same(steps, batch):
    x, y = batch
    model, attack = network(), PGD(epsilon="8/255", steps=steps)
    ends = [attack.perturb(model, x, y, SEED, unroll=unroll) for unroll in (1, 20)]
    np.testing.assert_allclose(*ends, atol=1e-6)


def test_clean_logits_save_a_forward_pass(batch):
    x, _ = batch
    calls = []
    model = network()

    def counted(x):
        calls.append(0)
        return model(x, training=False)

    attack = PGD(epsilon=0.05, steps=3, objective="kl", start="gaussian")
    computed = attack.perturb(counted, x, None, SEED)
    assert len(calls) == 4
    given = attack.perturb(counted, x, None, SEED, clean_logits=model(x, training=False))
    assert len(calls) == 7
    np.testing.assert_array_equal(computed, given)
    PGD(epsilon=0.05, steps=3).perturb(counted, x, tf.zeros(BATCH, tf.int32), SEED)
    assert len(calls) == 10


def test_no_gradient_flows_through_the_attack(batch):
    x, y = batch
    kernel = tf.Variable(np.ones((32, 3)), dtype=tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        result = FGSM(epsilon=0.1).perturb(lambda x: tf.reshape(x, (-1, 32)) @ kernel, x, y, SEED)
    assert tape.gradient(result, [x, kernel]) == [None, None]


@every_norm
@pytest.mark.parametrize("start", ["uniform", "gaussian"])
def test_seeds(norm, start, batch):
    x, y = batch
    model, attack = network(), PGD(epsilon=0.1, steps=1, step_size=1e-4, norm=norm, start=start)
    first = attack(model, x, y, seed=1)
    np.testing.assert_array_equal(attack(model, x, y, seed=(0, 1)), first)
    for seed in (2, (1, 1), 2**40 + 1, -1):
        assert np.mean(attack(model, x, y, seed=seed) != first) > 0.5
    reach = np.abs(first - x).max()
    assert reach < 0.006 if start == "gaussian" else reach <= 0.1 + 1e-6


@pytest.mark.parametrize(
    ("objective", "targeted"), [("cross_entropy", False), ("margin", True), ("kl", False)]
)
def test_restarts_are_never_worse(objective, targeted, batch):
    x, _ = batch
    clean = wavy(x)
    y = tf.argmax(-clean if targeted else clean, axis=-1)
    labels = None if objective == "kl" else y
    ascent = Ascent(wavy, x, labels=labels, objective=objective, targeted=targeted)
    scores, fooled = [], []
    for restarts in (1, 2, 5):
        attack = PGD(
            epsilon=0.06, steps=2, restarts=restarts, objective=objective, targeted=targeted
        )
        logits = wavy(attack(wavy, x, labels, seed=11))
        scores.append(ascent.score(logits).numpy())
        fooled.append(ascent.is_fooled(logits).numpy())
        np.testing.assert_array_equal(fooled[-1], (np.argmax(logits, -1) == y) == targeted)
    for less, more in ((0, 1), (1, 2)):
        assert np.all(fooled[more] >= fooled[less])
        same = fooled[more] == fooled[less]
        assert np.all(scores[more][same] >= scores[less][same] - 1e-5)
    assert np.mean(fooled[2]) > np.mean(fooled[0])
    alike = fooled[2] == fooled[0]
    assert np.any(scores[2][alike] > scores[0][alike] + 0.1)


def test_restarts_of_a_single_example_in_a_graph(batch):
    x, y = batch[0][:1], batch[1][:1]
    attack = PGD(epsilon=0.06, steps=2, restarts=3)
    graph = tf.function(lambda x, y: attack(wavy, x, y, seed=4))
    np.testing.assert_allclose(graph(x, y), attack(wavy, x, y, seed=4), atol=1e-6)


def test_restarts_prefer_what_fools():
    def model(x):
        # Above 0.5 class 1 wins by a hair; below, two classes come close and cost more, in vain.
        up = tf.sigmoid(1e3 * (x - 0.5))
        return tf.concat([tf.zeros_like(up), 0.2 * up - 0.1, -9.9 * up - 0.1], axis=1)

    x = tf.fill((6, 1), 0.5)
    attack = PGD(epsilon=0.1, step_size=1e-6, steps=1, restarts=10)
    assert np.all(tf.argmax(model(attack(model, x, [0] * 6)), axis=-1) == 1)
    below, above = losses.cross_entropy([0, 0], model(tf.constant([[0.4], [0.6]])))
    assert below > above


def float16_network(gain):
    tf_keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        return network(gain=gain)
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")


def test_float16_networks_keep_their_gradient(batch):
    x, _ = batch
    wide, half = network(gain=300.0), float16_network(gain=300.0)
    y = tf.argmax(wide(x, training=False), axis=-1)
    # The examples are so well fitted that a loss computed as ever has no gradient left.
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(y, half(x, training=False))
    assert np.mean(tape.gradient(loss, x) == 0) > 0.9
    attack = FGSM(epsilon=0.05, bounds=(-1, 2))
    moved, expected = (attack(model, x, y) - x for model in (half, wide))
    assert np.all(moved.numpy()[expected != 0] != 0)
    assert np.mean(np.sign(moved) == np.sign(expected)) > 0.97


def test_float16_networks_keep_the_gradient_of_kl(batch):
    x, _ = batch
    half = float16_network(gain=100.0)
    attack = PGD(epsilon=0.05, steps=1, objective="kl", start="gaussian", bounds=(-1, 2))
    assert np.mean(np.abs(attack(half, x) - x) > 0.04) > 0.9


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_inputs_of_other_dtypes(dtype, batch):
    x, y = tf.cast(batch[0], dtype), batch[1]
    attack = PGD(epsilon="8/255", steps=4)
    result = attack(network(), x, y)
    assert result.dtype == x.dtype
    offset = np.abs((tf.cast(result, tf.float64) - tf.cast(x, tf.float64)).numpy())
    assert offset.max() <= 8 / 255 * (1 + 1e-5)
    assert np.median(offset) > 0.7 * 8 / 255


def test_a_nan_in_the_gradient_stays_where_it_is():
    @tf.custom_gradient
    def broken(x):
        return x, lambda upstream: upstream * tf.constant([[1.0, np.nan]])

    result = FGSM(epsilon=0.1)(lambda x: linear([1.0, 1.0])(broken(x)), [[0.5, 0.5]], [0])
    np.testing.assert_allclose(result, [[0.6, 0.5]], atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_infinite_slope_leaves_numbers(norm):
    def model(x):  # whose slope is infinite at 0
        return tf.sqrt(x) @ tf.constant([[1.0, -1.0], [-1.0, 1.0]])

    x = np.array([[0.0, 0.5], [0.25, 0.0], [0.25, 0.5]], np.float32)
    found = PGD(epsilon=0.1, norm=norm, steps=3, start="none")(model, x, [1, 0, 0])
    assert np.all(np.isfinite(found))
    assert np.all(np.any(found.numpy() != x, axis=1))
