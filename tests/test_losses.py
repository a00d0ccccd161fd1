"""The losses against NumPy, finite differences, and their own laws."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from tscnc_tf import losses
from tscnc_tf.losses import MART, RSLAD, TRADES, Madry, RobustLoss

BATCH, CLASSES = 6, 5
LABELS = np.array([0, 4, 2, 2, 1, 3])


@pytest.fixture
def logits(rng):
    return 3.0 * rng.standard_normal((BATCH, CLASSES))


@pytest.fixture
def other_logits(rng):
    return 3.0 * np.random.default_rng(1).standard_normal((BATCH, CLASSES))


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def by_example(function):
    """Lift a NumPy function of (label, logits...) of one example to a batch."""
    return lambda labels, *logits: np.array(
        [function(y, *rows) for y, *rows in zip(labels, *logits, strict=True)]
    )


@by_example
def np_margin(y, z):
    return max(z[k] for k in range(len(z)) if k != y) - z[y]


@by_example
def np_dlr(y, z):
    descending = sorted(z, reverse=True)
    wrong = max(z[k] for k in range(len(z)) if k != y)
    return -(z[y] - wrong) / (descending[0] - descending[2])


@by_example
def np_mart(y, clean, adversarial):
    p, q = softmax(clean[None])[0], softmax(adversarial[None])[0]
    wrong = max(q[k] for k in range(len(q)) if k != y)
    boosted = -np.log(q[y]) - np.log(1.0001 - wrong + 1e-12)
    return boosted + 5.0 * np.sum(p * np.log(p / q)) * (1.0000001 - p[y])


def np_kl(reference, z):
    p, q = softmax(reference), softmax(z)
    return np.sum(p * (np.log(p) - np.log(q)), axis=1)


def np_cross_entropy(labels, z):
    return -np.log(softmax(z)[np.arange(len(z)), labels])


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (losses.cross_entropy, np_cross_entropy),
        (losses.margin, np_margin),
        (losses.dlr, np_dlr),
        (Madry().robust, None),
    ],
)
def test_values_are_numpys(function, expected, logits):
    if expected is None:
        value, expected = function(LABELS, None, logits), np_cross_entropy
    else:
        value = function(LABELS, logits)
    np.testing.assert_allclose(value, expected(LABELS, logits), rtol=1e-10)


def test_kl_trades_and_mart_are_numpys(logits, other_logits):
    np.testing.assert_allclose(
        losses.kl_divergence(logits, other_logits), np_kl(logits, other_logits), rtol=1e-9
    )
    np.testing.assert_allclose(
        TRADES(2.5).robust(LABELS, logits, other_logits), 2.5 * np_kl(logits, other_logits)
    )
    np.testing.assert_allclose(
        MART().robust(LABELS, logits, other_logits), np_mart(LABELS, logits, other_logits)
    )


def test_log_odds_are_cross_entropy_seen_otherwise(logits):
    p = softmax(logits)[np.arange(BATCH), LABELS]
    odds = losses.log_odds(LABELS, logits)
    np.testing.assert_allclose(odds, np.log((1 - p) / p), rtol=1e-9)
    np.testing.assert_allclose(tf.math.softplus(odds), losses.cross_entropy(LABELS, logits))


def test_log_odds_keep_their_slope_where_cross_entropy_has_none():
    sure = tf.constant([[200.0, 0.0, -1.0]])
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(sure)
        entropy, odds = losses.cross_entropy([0], sure), losses.log_odds([0], sure)
    assert np.all(tape.gradient(entropy, sure).numpy() == 0)
    q = 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(tape.gradient(odds, sure), [[-1, q, 1 - q]], rtol=1e-6)


def np_soft_log_odds(labels, z):
    """log((1 - P) / P), where P weighs each class by how far it is one of the example's own."""
    low, high = labels.min(axis=1, keepdims=True), labels.max(axis=1, keepdims=True)
    share = np.sum((labels - low) / (high - low) * softmax(z), axis=1)
    return np.log((1 - share) / share)


def smoothed(labels, amount):
    return (1 - amount) * labels + amount / labels.shape[1]


HARD = np.eye(CLASSES)[LABELS]
MIXED = 0.7 * HARD + 0.3 * np.eye(CLASSES)[(LABELS + 1) % CLASSES]


@pytest.mark.parametrize("amount", [0.0, 1e-4, 0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("labels", [HARD, MIXED], ids=["hard", "mixed"])
def test_log_odds_of_soft_labels_are_invariant_to_smoothing(labels, amount, logits):
    odds = losses.log_odds(smoothed(labels, amount), logits)
    np.testing.assert_allclose(odds, np_soft_log_odds(labels, logits), rtol=1e-7)
    if labels is HARD:
        np.testing.assert_allclose(odds, losses.log_odds(LABELS, logits), rtol=1e-7)
    in_half = tf.cast(smoothed(labels, amount), tf.float16)
    half = losses.log_odds(in_half, tf.cast(logits, tf.float32))
    np.testing.assert_allclose(half, odds, atol=0.02 / (1 - amount))


@pytest.mark.parametrize("amount", [0.0, 0.1])
def test_log_odds_of_a_mixture_lower_its_classes_however_sure_the_network_is(amount):
    """Cross-entropy's slope has the sign of p - q: it raises a class that is surer than its q."""
    sure = tf.constant([[50.0, 0.0, -1.0, 0.0], [0.0, 50.0, 0.0, 0.0], [7.0, 7.0, 7.0, 0.0]])
    labels = smoothed(np.array([[0.5, 0.5, 0.0, 0.0]] * 3), amount)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(sure)
        entropy = losses.cross_entropy(labels, sure)
        odds = losses.log_odds(labels, sure)
    assert tape.gradient(entropy, sure)[0, 0] > 0.4 * (1 - amount)
    q = 1 / (1 + np.exp(-1))
    r = 1 / (1 + np.exp(-7.0))
    expected = [[-1, 0, 1 - q, q], [0, -1, 0.5, 0.5], [-0.5, -0.5, r, 1 - r]]
    np.testing.assert_allclose(tape.gradient(odds, sure), expected, rtol=1e-5, atol=1e-6)


def test_log_odds_of_a_mixture_keep_their_slope_where_a_class_of_it_dominates():
    """P stays at the share of that class; what is left of the slope is no rounding noise."""
    logits = np.array([[0.0, 30.0, 1.0, -2.0]])
    labels = np.array([[0.7, 0.3, 0.0, 0.0]])

    def slope(dtype):
        z = tf.constant(logits, dtype)
        with tf.GradientTape() as tape:
            tape.watch(z)
            value = losses.log_odds(labels, z)
        gradient = tape.gradient(value, z).numpy()
        return gradient / np.abs(gradient).max()

    np.testing.assert_allclose(slope(tf.float32), slope(tf.float64), rtol=1e-4)


def test_log_odds_of_labels_that_say_nothing_are_those_of_the_first_class(logits):
    nothing = np.full((BATCH, CLASSES), 1 / CLASSES)
    expected = losses.log_odds(np.zeros(BATCH, int), logits)
    np.testing.assert_allclose(losses.log_odds(nothing, logits), expected)


INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_may_be_of_any_integer_dtype(dtype, logits, other_logits):
    labels, rows = LABELS.astype(dtype), HARD.astype(dtype)
    for function in (losses.cross_entropy, losses.margin, losses.dlr, losses.log_odds):
        for form in (labels, labels[:, None], rows):
            np.testing.assert_array_equal(function(form, logits), function(LABELS, logits))
    for loss in (TRADES(), Madry(), MART()):
        expected = loss.robust(LABELS, logits, other_logits)
        np.testing.assert_array_equal(loss.robust(labels, logits, other_logits), expected)


def test_the_last_of_256_classes_fits_into_a_byte():
    rows = losses.one_hot(np.array([255, 0], "uint8"), 256).numpy()
    assert rows[0].argmax() == 255 and rows[1].argmax() == 0 and rows.sum() == 2


@pytest.mark.parametrize("form", ["column", "one_hot", "int_one_hot", "int64", "uint8"])
def test_labels_may_have_any_form(form, logits, other_logits):
    labels = {
        "column": LABELS[:, None],
        "one_hot": np.eye(CLASSES, dtype=np.float32)[LABELS],
        "int_one_hot": np.eye(CLASSES, dtype=int)[LABELS],
        "int64": LABELS.astype(np.int64),
        "uint8": LABELS.astype(np.uint8),
    }[form]
    for function in (losses.cross_entropy, losses.margin, losses.dlr, losses.log_odds):
        np.testing.assert_array_equal(function(labels, logits), function(LABELS, logits))
    np.testing.assert_array_equal(
        MART().robust(labels, logits, other_logits), MART().robust(LABELS, logits, other_logits)
    )


def test_soft_labels_weigh_the_cross_entropy(logits):
    soft = softmax(logits[::-1].copy())
    expected = -np.sum(soft * np.log(softmax(logits)), axis=1)
    np.testing.assert_allclose(losses.cross_entropy(soft, logits), expected, rtol=1e-9)
    largest = soft.argmax(axis=1)
    np.testing.assert_allclose(losses.margin(soft, logits), np_margin(largest, logits))


def finite_differences(function, z, h=1e-6):
    result = np.zeros_like(z)
    for index in np.ndindex(z.shape):
        step = np.zeros_like(z)
        step[index] = h
        result[index] = (np.sum(function(z + step)) - np.sum(function(z - step))) / (2 * h)
    return result


@pytest.mark.parametrize(
    "name", ["cross_entropy", "margin", "dlr", "log_odds", "kl", "kl_clean", "mart", "mart_clean"]
)
def test_gradients_are_finite_differences(name, logits, other_logits):
    function = {
        "cross_entropy": lambda z: losses.cross_entropy(LABELS, z),
        "margin": lambda z: losses.margin(LABELS, z),
        "dlr": lambda z: losses.dlr(LABELS, z),
        "log_odds": lambda z: losses.log_odds(LABELS, z),
        "kl": lambda z: losses.kl_divergence(other_logits, z),
        "kl_clean": lambda z: losses.kl_divergence(z, other_logits),
        "mart": lambda z: MART().robust(LABELS, other_logits, z),
        "mart_clean": lambda z: MART().robust(LABELS, z, other_logits),
    }[name]
    z = tf.constant(logits)
    with tf.GradientTape() as tape:
        tape.watch(z)
        value = function(z)
    gradient = tape.gradient(value, z)
    np.testing.assert_allclose(gradient, finite_differences(function, logits), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_half_precision_is_lifted(dtype, logits, other_logits):
    low, other = tf.cast(logits, dtype), tf.cast(other_logits, dtype)
    wide = tf.cast(low, tf.float64)
    expected = tf.float64 if dtype == "float64" else tf.float32
    for function in (losses.cross_entropy, losses.margin, losses.dlr, losses.log_odds):
        value = function(LABELS, low)
        assert value.dtype == expected and value.shape == (BATCH,)
        np.testing.assert_allclose(value, function(LABELS, wide), rtol=1e-5)
    for loss in (TRADES(), Madry(), MART()):
        value = loss.robust(LABELS, low, other)
        assert value.dtype == expected
        in_graph = tf.function(loss.robust)(tf.constant(LABELS), low, other)
        np.testing.assert_allclose(in_graph, value, rtol=1e-5)


def test_saturated_logits_stay_finite():
    huge = tf.constant([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]])
    with tf.GradientTape() as tape:
        tape.watch(huge)
        value = (
            losses.kl_divergence(huge, huge[:, ::-1])
            + MART().robust([1, 1], huge, huge[:, ::-1])
            + losses.dlr([0, 0], huge)
            + losses.log_odds([0, 0], huge)
        )
    assert np.all(np.isfinite(value))
    assert np.all(np.isfinite(tape.gradient(value, huge)))


def test_kl_is_zero_only_for_equal_distributions(logits, other_logits):
    shifted = losses.kl_divergence(logits, logits + 7.0)
    np.testing.assert_allclose(shifted, np.zeros(BATCH), atol=1e-12)
    assert np.all(losses.kl_divergence(logits, other_logits) > 0.01)


def test_classes_that_both_networks_exclude_do_not_count_in_kl(logits, other_logits):
    excluded = [np.insert(each, 2, -np.inf, axis=1) for each in (logits, other_logits)]
    reference, student = map(tf.constant, excluded)
    with tf.GradientTape() as tape:
        tape.watch((reference, student))
        value = losses.kl_divergence(reference, student)
    np.testing.assert_allclose(value, np_kl(logits, other_logits), rtol=1e-9)
    p, q = (np.insert(softmax(each), 2, 0.0, axis=1) for each in (logits, other_logits))
    surplus = np.log(p + (p == 0)) - np.log(q + (q == 0)) - value.numpy()[:, None]
    for gradient, right in zip(
        tape.gradient(value, (reference, student)), (p * surplus, q - p), strict=True
    ):
        np.testing.assert_allclose(gradient, right, atol=1e-12)


def test_dlr_is_invariant_to_scale(logits):
    value = losses.dlr(LABELS, logits)
    np.testing.assert_allclose(losses.dlr(LABELS, 1000 * logits + 5), value, rtol=1e-9)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: losses.dlr([0], [[1.0, 2.0]]), "at least 3 classes here, got 2"),
        (lambda: losses.margin([0], [[1.0]]), "at least 2 classes here, got 1"),
        (lambda: losses.cross_entropy([0], [[1.0]]), r"one output z .* has the logits \(0, z\)"),
        (lambda: losses.kl_divergence([[1.0]], [[1.0]]), "at least 2 classes here, got 1"),
        (lambda: TRADES().robust([0], [[1.0]], [[1.0]]), "at least 2 classes here, got 1"),
        (lambda: MART().robust([0], [[1.0]], [[1.0]]), "at least 2 classes here, got 1"),
        (
            lambda: RSLAD(None).robust([0], [[1.0]], [[1.0]], [[1.0]]),
            "at least 2 classes here, got 1",
        ),
        (
            lambda: losses.cross_entropy([0], [1.0, 2.0]),
            r"float tensor of shape \(batch, classes\)",
        ),
        (lambda: losses.cross_entropy([0], [[1, 2]]), "got int32"),
        (lambda: losses.one_hot([0.0, 1.0], 3), "must hold integers .*, got float32"),
        (lambda: losses.one_hot([[0.0, 1.0]], 3), r"one-hot of shape \(batch, 3\)"),
        (lambda: losses.one_hot([[[1]]], 3), r"got int32 of shape \(1, 1, 1\)"),
        (lambda: TRADES(beta=-1.0), "beta must be >= 0, got -1.0"),
        (lambda: MART(beta=float("nan")), "beta must be finite"),
    ],
)
def test_errors_say_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words):
        call()


LOSSES = [TRADES(), TRADES(1.5), Madry(), MART(), MART(beta=2), RSLAD(None), RSLAD(None, 0.5)]


def test_the_list_of_losses_is_complete():
    assert set(RobustLoss.__subclasses__()) == {type(loss) for loss in LOSSES}


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_losses_are_frozen_and_survive_json(loss):
    assert type(loss).from_config(json.loads(json.dumps(loss.get_config()))) == loss
    assert hash(loss) == hash(type(loss)(**loss.get_config()))
    for library in (keras, tf_keras):  # as a saved trainer holds it
        saved = json.loads(json.dumps(library.saving.serialize_keras_object(loss)))
        assert saved["registered_name"] == f"tscnc_tf>{type(loss).__name__}"
        assert library.saving.deserialize_keras_object(saved) == loss
    with pytest.raises(AttributeError):
        loss.beta = 3.0


@pytest.mark.parametrize(
    ("loss", "facts"),
    [
        (TRADES(), ("kl", "gaussian", True, True)),
        (Madry(), ("cross_entropy", "uniform", False, False)),
        (MART(), ("cross_entropy", "gaussian", True, False)),
        (RSLAD(None), ("kl", "gaussian", True, False)),
    ],
    ids=repr,
)
def test_losses_define_the_objective_of_their_adversary(loss, facts):
    assert (loss.objective, loss.start, loss.uses_clean, loss.adds_clean_loss) == facts


def test_the_base_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        RobustLoss()


def test_unknown_batch_and_classes():
    @tf.function(input_signature=[tf.TensorSpec((None,), tf.int32), tf.TensorSpec((None, None))])
    def everything(labels, logits):
        return (
            losses.cross_entropy(labels, logits)
            + losses.margin(labels, logits)
            + losses.dlr(labels, logits)
            + losses.log_odds(labels, logits)
            + MART().robust(labels, logits, logits)
        )

    logits = tf.constant([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    labels = tf.constant([0, 1])
    assert np.allclose(everything(labels, logits), everything.python_function(labels, logits))
