"""`attacks.CleverHans` against CleverHans itself, and against closed forms."""

from __future__ import annotations

import gc
import importlib
import json
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

import tscnc_tf as tscnc
from tscnc_tf.attacks import CleverHans
from tscnc_tf.functional import balls

ORDERS = {"linf": np.inf, "l2": 2}
STEPS = {"eps_iter": 0.03, "nb_iter": 4}
# What each attack is tried with: its norms and options.
ATTACKS = {
    "basic_iterative_method": (("linf", "l2"), STEPS),
    "carlini_wagner_l2": (("l2",), {"max_iterations": 60, "learning_rate": 0.05}),
    "fast_gradient_method": (("linf", "l2"), {}),
    "madry_et_al": (("linf", "l2"), STEPS),
    "momentum_iterative_method": (("linf", "l2"), STEPS | {"decay_factor": 0.5}),
    "projected_gradient_descent": (("linf", "l2"), STEPS | {"rand_init": True}),
    "spsa": (("linf",), {"nb_iter": 3, "spsa_samples": 16}),
}
RANDOM = ("madry_et_al", "projected_gradient_descent", "spsa")
CASES = [(name, norm) for name, (norms, _) in ATTACKS.items() for norm in norms]
every_case = pytest.mark.parametrize(("name", "norm"), CASES)


def made(name, norm="linf", epsilon=0.1, **more):
    return CleverHans(name, epsilon=epsilon, norm=norm, **{"options": ATTACKS[name][1], **more})


@pytest.fixture
def kernel(rng):
    return tf.constant(rng.standard_normal((18, 3)), tf.float32)


@pytest.fixture
def model(kernel):
    return lambda x: tf.reshape(tf.tanh(x), (-1, 18)) @ kernel


@pytest.fixture
def batch(rng, model):
    """Images of two channels, and the classes that the model predicts."""
    x = tf.constant(rng.uniform(size=(5, 3, 3, 2)), tf.float32)
    return x, tf.argmax(model(x), axis=-1)


@every_case
def test_it_keeps_to_the_ball_and_follows_its_seed(name, norm, model, batch):
    x, y = batch
    epsilon = 0.1 if norm == "linf" else 1.5
    attack = made(name, norm, epsilon)
    found = attack(model, x, y, seed=(1, 2))
    assert found.dtype == x.dtype and found.shape == x.shape
    lengths = balls.lengths(found - x, norm).numpy()
    assert 0 < lengths.max() <= epsilon * (1 + 1e-6)
    assert found.numpy().min() >= 0 and found.numpy().max() <= 1
    bound = attack.bind(model)
    assert np.any(bound(x, y, seed=5) != found) == (name in RANDOM)
    np.testing.assert_allclose(bound(x, y, seed=(1, 2)), found, atol=1e-5)


@pytest.mark.parametrize("name", ["carlini_wagner_l2", "spsa"])
def test_bounds_scale_the_results(name, model, batch):
    x, y = batch
    norm, epsilon = ATTACKS[name][0][0], 0.1 if name == "spsa" else 1.5
    expected = made(name, norm, epsilon)(model, x, y, seed=2)
    scaled = made(name, norm, 255 * epsilon, bounds=(0.0, 255.0))
    found = scaled(lambda x: model(x / 255), 255 * x, y, seed=2)
    np.testing.assert_allclose(found / 255, expected, atol=1e-3)
    option = {"carlini_wagner_l2": "initial_const", "spsa": "delta"}[name]
    given = made(
        name, norm, 255 * epsilon, bounds=(0.0, 255.0), options=ATTACKS[name][1] | {option: 2.0}
    )
    assert given.arguments()[option] == 2.0


@pytest.mark.parametrize("name", RANDOM)
def test_no_generator_of_tensorflow_or_numpy_is_touched(name, model, batch):
    def draws(attack):
        tf.random.set_seed(3)
        np.random.seed(3)
        drawn = [tf.random.uniform((2,), seed=1), tf.random.normal((2,))]
        found = attack(model, *batch, seed=4)
        drawn += [tf.random.uniform((2,), seed=1), tf.random.normal((2,)), np.random.rand(2)]
        return found, np.stack(drawn)

    attack = made(name)
    found, expected = draws(attack)
    np.testing.assert_array_equal(expected, draws(lambda model, x, y, seed: x)[1])
    tf.random.set_seed(9)
    np.testing.assert_array_equal(attack(model, *batch, seed=4), found)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fast_gradient_method", {}),
        ("basic_iterative_method", STEPS),
        ("momentum_iterative_method", STEPS | {"decay_factor": 0.5}),
        ("projected_gradient_descent", STEPS),
    ],
)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_is_what_cleverhans_does(name, options, norm, targeted, model, batch):
    x, y = batch
    theirs = getattr(importlib.import_module(f"cleverhans.tf2.attacks.{name}"), name)
    options = options | {"targeted": targeted}
    bounds = {"clip_min": 0.1, "clip_max": 0.9}
    x = tf.clip_by_value(x, 0.1, 0.9)
    fixed = {"norm": ORDERS[norm], "sanity_checks": False, **bounds}
    expected = theirs(model, x, eps=0.2, y=y, **fixed, **options)
    attack = CleverHans(name, epsilon=0.2, norm=norm, bounds=(0.1, 0.9), options=options)
    np.testing.assert_allclose(attack(model, x, y), expected, atol=1e-6)
    for labels in (y[:, None], tf.one_hot(y, 3), 0.9 * tf.one_hot(y, 3) + 0.1 / 3):
        np.testing.assert_array_equal(attack(model, x, labels), attack(model, x, y))


def test_without_labels_the_predicted_classes_are_left(model, batch):
    x, y = batch
    for name, norm in (("fast_gradient_method", "linf"), ("carlini_wagner_l2", "l2")):
        np.testing.assert_array_equal(
            made(name, norm, 0.5)(model, x), made(name, norm, 0.5)(model, x, y)
        )
    with pytest.raises(ValueError, match="y is missing: a targeted attack"):
        made("fast_gradient_method", options={"targeted": True})(model, x)


def hyperplane(x):
    """Two classes; the plane between them lies at the mean of 18 values of 0.5."""
    z = tf.reduce_mean(tf.reshape(x, (len(x) if x.shape[0] is None else x.shape[0], -1)), 1) - 0.5
    return 20 * tf.stack([-z, z], axis=1)


@pytest.mark.parametrize("shape", [(18,), (3, 6), (3, 3, 2)])
def test_the_nearest_example_of_carlini_and_wagner_counts_inside_the_ball(shape):
    """The way to the plane is sqrt(18) times the mean's distance from 0.5."""
    means = np.float32([0.55, 0.62, 0.45, 0.56])
    x = tf.constant(np.broadcast_to(means.reshape(-1, *[1] * len(shape)), (4, *shape)))
    y = [1, 1, 0, 0]  # the last is wrong as it is
    attack = CleverHans(
        "carlini_wagner_l2",
        epsilon=0.3,
        norm="l2",
        options={"max_iterations": 300, "learning_rate": 0.02},
    )
    found = attack(hyperplane, x, y)
    lengths = balls.lengths(found - x, "l2").numpy()
    np.testing.assert_allclose(lengths, [0.05 * 18**0.5, 0, 0.05 * 18**0.5, 0], rtol=0.05)
    assert np.array_equal(tf.argmax(hyperplane(found), -1), [0, 1, 1, 1])
    report = tscnc.evaluate_robustness(lambda x: hyperplane(x), x, y, attack, progress=False)
    np.testing.assert_array_equal(report.robust_correct, [False, True, False, False])


def test_carlini_and_wagner_reach_a_class(model, batch):
    x, y = batch
    goal = (y + 1) % 3
    options = ATTACKS["carlini_wagner_l2"][1] | {"targeted": True}
    found = made("carlini_wagner_l2", "l2", 4.0, options=options)(model, x, goal)
    np.testing.assert_array_equal(tf.argmax(model(found), -1), goal)


def test_spsa_judges_what_has_no_gradient(kernel, batch):
    """A function of Python's, of whose output TensorFlow knows neither gradient nor shape."""
    x, y = batch

    def steps(x):
        def rounded(x):
            return (np.round(32 * x) / 32).reshape(-1, 18) @ kernel.numpy()

        return tf.numpy_function(rounded, [x], tf.float32)

    y = tf.argmax(steps(x), axis=-1)
    attack = CleverHans(
        "spsa", epsilon=0.3, options={"nb_iter": 15, "learning_rate": 0.1, "delta": 0.1}
    )
    assert not attack.uses_gradient and made("fast_gradient_method").uses_gradient
    report = tscnc.evaluate_robustness(steps, x, y, attack, progress=False)
    assert report.clean_accuracy == 1 and report.robust_accuracy <= 0.4
    assert not report.warnings
    with pytest.raises(ValueError, match="not differentiable"):
        made("fast_gradient_method")(steps, x, y)


def test_spsa_moves_along_the_sign_of_the_gradient(rng):
    """On a linear model, where the estimate is right but for noise, as the closed form says."""
    w = np.float32([1, -1, 1, -1])

    def model(x):
        return tf.stack([tf.zeros(len(x)), 5 * tf.linalg.matvec(x, w)], axis=1)

    attack = CleverHans(
        "spsa", epsilon=0.1, options={"nb_iter": 30, "learning_rate": 0.05, "spsa_samples": 256}
    )
    x = tf.fill((3, 4), 0.5)
    up = attack(model, x, [0, 0, 1]) - x
    np.testing.assert_allclose(up, 0.1 * np.outer([1, 1, -1], w), atol=1e-6)


@pytest.mark.parametrize("name", ["projected_gradient_descent", "spsa"])
def test_a_bound_attack_is_traced_once_for_each_size(name, batch, kernel):
    x, y = batch
    calls = []

    def counted(x):
        calls.append(0 if tf.executing_eagerly() else 1)
        return tf.reshape(x, (-1, 18)) @ kernel

    bound = made(name).bind(counted)
    bound(x, y)
    traced = sum(calls)
    assert traced > 0
    bound(x, y, seed=1)
    assert sum(calls) == traced


@pytest.mark.parametrize("name", ["momentum_iterative_method", "carlini_wagner_l2", "spsa"])
def test_a_model_out_of_use_is_gone(name, batch):
    x, y = batch
    attack = made(name, ATTACKS[name][0][0])

    def attacked():
        network = keras.Sequential(
            [keras.Input((3, 3, 2)), keras.layers.Flatten(), keras.layers.Dense(3)]
        )
        attack(network, x, y)
        return weakref.ref(network)

    reference = attacked()
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_inputs_of_other_dtypes(dtype, kernel, batch):
    x, y = tf.cast(batch[0], dtype), batch[1]

    def model(x):
        assert x.dtype == dtype
        return tf.reshape(x, (-1, 18)) @ tf.cast(kernel, dtype)

    for name in ("fast_gradient_method", "madry_et_al"):
        found = made(name)(model, x, y)
        assert found.dtype == dtype
        reach = np.abs(tf.cast(found, tf.float64) - tf.cast(x, tf.float64)).max()
        assert 0.09 < reach <= 0.1 * (1 + 1e-6)


def test_it_is_refused_in_a_graph(model, batch):
    attack = made("fast_gradient_method")
    with pytest.raises(ValueError, match=r"can't be called while a graph is traced"):
        tf.function(lambda x, y: attack(model, x, y))(*batch)


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("pgd", {}, "attack must be one of 'basic_iterative_method', .*, got 'pgd'"),
        ("spsa", {"norm": "l2"}, "norm must be 'linf' for 'spsa', got 'l2'"),
        ("carlini_wagner_l2", {}, "norm must be 'l2' for 'carlini_wagner_l2', got 'linf'"),
        ("madry_et_al", {"nb_iter": 3}, "options must hold 'eps_iter' and 'nb_iter', for which"),
        ("spsa", {"nb_iters": 3}, "'nb_iters' is not an option of spsa: did you mean"),
        ("spsa", {"zzz": 3}, "'zzz' is not an option of spsa: there are nb_iter, t"),
        ("spsa", {"eps": 0.1}, "options must not hold 'eps': epsilon, norm"),
        ("madry_et_al", STEPS | {"eps_iter": 0.3}, "at most epsilon, 0.1, for .*, got 0.3"),
        (
            "madry_et_al",
            STEPS | {"eps_iter": "2:255"},
            r"options\['eps_iter'\] must be .*\"8/255\"",
        ),
    ],
)
def test_arguments_that_make_no_sense(name, more, words):
    norm = more.get("norm", "linf")
    options = {key: value for key, value in more.items() if key != "norm"}
    with pytest.raises(ValueError, match=words):
        CleverHans(name, epsilon=0.1, norm=norm, options=options)


def test_options_that_are_no_mapping():
    with pytest.raises(TypeError, match="options must be a mapping from CleverHans' names"):
        CleverHans("spsa", epsilon=0.1, options="nb_iter")


def test_description_and_config():
    attack = CleverHans(
        "madry_et_al", epsilon="8/255", options={"nb_iter": 7, "eps_iter": "2/255"}, bounds=(-1, 1)
    )
    assert attack.name == "CleverHans madry_et_al linf 8/255"
    assert attack.options == (("eps_iter", "2/255"), ("nb_iter", 7))
    assert attack.describe() == {
        "name": attack.name,
        "epsilon": "8/255",
        "epsilon_value": 8 / 255,
        "norm": "linf",
        "step_size": "2/255",
        "step_size_value": 2 / 255,
        "steps": 7,
        "restarts": None,
        "objective": "cross_entropy",
        "targeted": False,
        "start": "uniform",
        "bounds": [-1.0, 1.0],
        "options": {"eps_iter": "2/255", "nb_iter": 7},
    }
    assert CleverHans.from_config(json.loads(json.dumps(attack.get_config()))) == attack
    momentum = CleverHans("momentum_iterative_method", epsilon=0.1, options={"targeted": True})
    assert momentum.name == "CleverHans momentum_iterative_method linf 0.1 targeted"
    known = momentum.describe()
    assert (known["step_size"], known["steps"], known["start"]) == ("0.06", 10, "none")
    wagner = made("carlini_wagner_l2", "l2").describe()
    assert (wagner["steps"], wagner["objective"]) == (60, "margin")


def test_a_loss_of_ones_own(model, batch):
    def negative(labels, logits):
        return -tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)

    x, y = batch
    attack = CleverHans("fast_gradient_method", epsilon=0.1, options={"loss_fn": negative})
    backward = CleverHans("fast_gradient_method", epsilon=0.1, options={"targeted": True})
    np.testing.assert_array_equal(attack(model, x, y), backward(model, x, y))
    assert attack.describe()["objective"] == "negative"
    with pytest.raises(TypeError, match=r"CleverHans.options cannot be written to a config"):
        attack.get_config()
