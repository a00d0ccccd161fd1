"""Robust accuracy: closed forms, worst cases, and every refusal and every diagnostic."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import tensorflow as tf

from tscnc_tf import attacks, evaluation
from tscnc_tf._keras import keras, tf_keras, tfmot
from tscnc_tf.evaluation import EvaluationWarning, evaluate_robustness, wilson_interval

both = pytest.mark.parametrize("k", [keras, tf_keras], ids=["keras", "tf_keras"])

SIZE, CLASSES, EXAMPLES = 6, 3, 300
RNG = np.random.default_rng(7)
WEIGHTS = RNG.normal(size=(SIZE, CLASSES)).astype(np.float32)
BIAS = (-0.5 * WEIGHTS.sum(axis=0)).astype(np.float32)  # no class is preferred at the centre
X = RNG.uniform(0.2, 0.8, size=(EXAMPLES, SIZE)).astype(np.float32)
Y = np.argmax(X @ WEIGHTS + BIAS, axis=1)
Y[::10] = (Y[::10] + 1) % CLASSES  # a tenth of the labels is wrong
EPSILON = 0.05


def linear(x):
    return tf.matmul(x, WEIGHTS) + BIAS


def margins(x=X, y=Y):
    """Return logit of the label minus the others', (examples, classes); inf at the label."""
    logits = x.astype(np.float64) @ WEIGHTS + BIAS
    found = logits[np.arange(len(x)), y][:, None] - logits
    found[np.arange(len(x)), y] = np.inf
    return found


def robust(epsilon, x=X, y=Y):
    """Return which examples no l-infinity perturbation can change, by hand."""
    reach = np.abs(WEIGHTS[:, y].T[:, :, None] - WEIGHTS[None]).sum(axis=1)
    return np.all(margins(x, y) > epsilon * reach, axis=1)


def best_corner(epsilon):
    """Return an attack on `linear` that is optimal: the corner that gains most on some class."""

    def attack(model, x, y):
        x, y = x.numpy(), y.numpy()
        step = WEIGHTS.T[None] - WEIGHTS.T[y][:, None]
        corners = x[:, None] + epsilon * np.sign(step)
        logits = corners @ WEIGHTS + BIAS
        own = logits[np.arange(len(x)), :, y]
        gain = np.stack([logits[:, c, c] - own[:, c] for c in range(CLASSES)], axis=1)
        gain[np.arange(len(x)), y] = -np.inf
        return tf.constant(corners[np.arange(len(x)), gain.argmax(axis=1)])

    return attack


def corner_attack(epsilon=EPSILON, **options):
    return attacks.Custom(best_corner(epsilon), epsilon=epsilon, **options)


def keras_model(k, activation=None):
    model = k.Sequential([k.layers.Input((SIZE,)), k.layers.Dense(CLASSES, activation=activation)])
    model.set_weights([WEIGHTS, BIAS])
    return model


def quiet(*arguments, **options):
    return evaluate_robustness(*arguments, progress=False, **options)


# --- the figures ----------------------------------------------------------------------------------


def test_accuracy_of_a_linear_model_is_known_in_closed_form():
    report = quiet(linear, X, Y, [corner_attack()])
    assert report.clean_accuracy == 0.9
    expected = robust(EPSILON)
    assert 0.3 < expected.mean() < 0.8
    np.testing.assert_array_equal(report.robust_correct, expected)
    assert report.robust_accuracy == expected.mean()
    assert report.robust_interval == wilson_interval(int(expected.sum()), EXAMPLES)
    assert report.clean_interval == wilson_interval(270, EXAMPLES)
    assert report.examples == EXAMPLES


def test_pgd_finds_the_closed_form_of_a_linear_model():
    pgd = attacks.PGD(epsilon=EPSILON, steps=10, objective="margin", restarts=2)
    report = quiet(linear, X, Y, pgd)
    [result] = report.attacks.values()
    truth = robust(EPSILON)
    assert not np.any(truth & ~report.robust_correct)
    assert report.robust_accuracy - truth.mean() < 0.02
    assert result.description["epsilon"] == "0.05"
    assert result.largest_distance["linf"] == pytest.approx(EPSILON, rel=1e-4)


def test_worst_case_is_taken_example_by_example():
    def towards(target):
        def attack(model, x, y):
            step = tf.sign(WEIGHTS[:, target] - tf.gather(WEIGHTS.T, y))
            return x + EPSILON * step

        return attacks.Custom(attack, epsilon=EPSILON, name=f"to {target}")

    report = quiet(linear, X, Y, [towards(c) for c in range(CLASSES)])
    singles = [result.correct for result in report.attacks.values()]
    expected = np.all([report.clean_correct, *singles], axis=0)
    np.testing.assert_array_equal(report.robust_correct, expected)
    np.testing.assert_array_equal(report.robust_correct, robust(EPSILON))
    assert report.robust_accuracy < min(result.accuracy for result in report.attacks.values())


def test_what_is_wrong_on_the_clean_input_is_never_robust():
    def helpful(model, x, y):
        return tf.constant(WEIGHTS.T[y.numpy()] > 0, tf.float32)

    with pytest.warns(EvaluationWarning, match="^above-clean: Under helpful the model is right"):
        report = quiet(linear, X, Y, {"helpful": helpful})
    assert report.flags == ("above-clean",)
    assert report.attacks["helpful"].accuracy > report.clean_accuracy
    assert report.robust_accuracy <= report.clean_accuracy


@pytest.mark.parametrize("batch_size", [7, 128, 1000])
def test_batches_of_any_size_give_the_same(batch_size):
    report = quiet(linear, X, Y, corner_attack(), batch_size=batch_size)
    np.testing.assert_array_equal(report.robust_correct, robust(EPSILON))


def test_the_model_is_traced_once_for_all_batches():
    traces = []

    def model(x):
        if not tf.executing_eagerly():
            traces.append(x.shape)
        return linear(x)

    quiet(model, X, Y, corner_attack(), batch_size=64)
    # Once for logits, once with the gradient.
    assert traces == [(None, SIZE)] * 2


def test_forms_of_the_data():
    expected = quiet(linear, X, Y, corner_attack()).robust_correct
    one_hot = np.eye(CLASSES, dtype=np.float32)[Y]
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(32)
    for x, y in [
        (tf.constant(X), tf.constant(Y)),
        (X.astype(np.float64), Y[:, None].astype(np.uint8)),
        (X.tolist(), Y.tolist()),
        (X, one_hot),
        (dataset, None),
    ]:
        np.testing.assert_array_equal(quiet(linear, x, y, corner_attack()).robust_correct, expected)


def test_seeds_belong_to_batches_and_not_to_the_order_of_attacks():
    def pgd(name):
        return {name: attacks.PGD(epsilon=EPSILON, steps=1, step_size=0.01)}

    alone = quiet(linear, X, Y, pgd("a"), batch_size=100, seed=3).attacks["a"]
    both_ = quiet(linear, X, Y, pgd("b") | pgd("a"), batch_size=100, seed=3).attacks
    np.testing.assert_array_equal(alone.correct, both_["a"].correct)
    np.testing.assert_array_equal(alone.correct, both_["b"].correct)
    assert alone.largest_distance == both_["a"].largest_distance
    other = quiet(linear, X, Y, pgd("a"), batch_size=100, seed=4).attacks["a"]
    assert other.largest_distance != alone.largest_distance


def test_wilson_interval_against_known_values():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for successes, trials, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)


# --- models and attacks of all kinds --------------------------------------------------------------


def test_models_of_both_flavours_and_functions_give_the_same_report(tmp_path):
    saved = tf.Module()
    saved.weights = tf.Variable(WEIGHTS)
    saved.logits = tf.function(
        lambda x: tf.matmul(x, saved.weights) + BIAS,
        input_signature=[tf.TensorSpec((None, SIZE), tf.float32)],
    )
    tf.saved_model.save(saved, str(tmp_path / "saved"))
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    expected = quiet(linear, X, Y, corner_attack())
    for model in (keras_model(keras), keras_model(tf_keras), loaded.logits):
        report = quiet(model, X, Y, [corner_attack(), attacks.FGSM(epsilon=EPSILON)])
        np.testing.assert_array_equal(report.clean_correct, expected.clean_correct)
        np.testing.assert_array_equal(report.robust_correct, expected.robust_correct)
        assert report.warnings == ()


def test_pruning_wrappers_are_looked_through():
    wrapped = tfmot().sparsity.keras.prune_low_magnitude(keras_model(tf_keras))
    report = quiet(wrapped, X, Y, [corner_attack(), attacks.FGSM(epsilon=EPSILON)])
    np.testing.assert_array_equal(report.robust_correct, robust(EPSILON))
    assert report.model == wrapped.name


@both
def test_an_attack_as_a_plain_callable(k):
    cleverhans = attacks.CleverHans(
        "projected_gradient_descent",
        epsilon=EPSILON,
        options={"eps_iter": EPSILON / 4, "nb_iter": 10},
    )

    def pgd(model, x, y):
        return cleverhans(model, x, y)

    report = quiet(keras_model(k), X, Y, [pgd, cleverhans])
    plain, declared = report.attacks.values()
    assert (plain.name, plain.declared) == ("pgd", False)
    assert declared.declared
    np.testing.assert_array_equal(plain.correct, declared.correct)
    assert robust(EPSILON).mean() <= plain.accuracy < robust(EPSILON / 2).mean()
    assert plain.largest_distance["linf"] == pytest.approx(EPSILON, rel=1e-4)
    assert "not declared" in str(report)
    [note] = [text for text in report.notes if text.startswith("pgd: ")]
    assert "0.05 in linf" in note
    assert report.to_dict()["attacks"][0]["epsilon"] == "not declared"


def test_attacks_of_one_name_are_told_apart():
    same = corner_attack(name="same")
    report = quiet(linear, X, Y, (same, same, lambda model, x, y: x))
    assert list(report.attacks) == ["same", "same (2)", "attack"]
    assert [result.name for result in report.attacks.values()] == list(report.attacks)
    named = quiet(linear, X, Y, {"mine": same})
    assert named.to_dict()["attacks"][0]["name"] == "mine"


# --- the report -----------------------------------------------------------------------------------


def test_report_goes_through_json(tmp_path):
    report = quiet(
        keras_model(keras), X, Y, attacks.PGD(epsilon="8/255", steps=3), seed=5, batch_size=200
    )
    described = report.to_dict()
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    assert (described["seed"], described["batch_size"], described["bounds"]) == (5, 200, [0.0, 1.0])
    assert described["clean"]["accuracy"] == report.clean_accuracy
    assert described["robust"]["correct"] == int(report.robust_correct.sum())
    [attack] = described["attacks"]
    assert (attack["epsilon"], attack["norm"], attack["steps"]) == ("8/255", "linf", 3)
    assert attack["epsilon_value"] == pytest.approx(8 / 255)
    assert set(described["versions"]) >= {"python", "tensorflow", "keras", "tf_keras", "tscnc_tf"}
    assert described["versions"]["tensorflow"] == tf.__version__
    report.save(tmp_path / "new" / "report.json")
    text = (tmp_path / "new" / "report.json").read_text(encoding="utf-8")
    assert json.loads(text) == described


def test_report_as_a_table():
    pgd = attacks.PGD(epsilon="8/255", steps=3)
    report = quiet(linear, X, Y, pgd, seed=11)
    lines = str(report).splitlines()
    [row] = [line for line in lines if pgd.name in line]
    for cell in ("8/255", "linf", " 3 ", "300", "11", f"{100 * report.robust_accuracy:.2f} %"):
        assert cell in row
    [clean] = [line for line in lines if "none" in line]
    assert "90.00 %" in clean
    assert any("worst case" in line for line in lines)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (X * 255, ValueError, r"within bounds=\(0.0, 1.0\)"),
        (np.where(X > 0.7, np.nan, X), ValueError, "NaN or infinity"),
        ((X * 255).astype(np.uint8), TypeError, "x / 255"),
        (X[:0], ValueError, "empty"),
        (X[0], ValueError, "batch"),
        (X[:10], ValueError, "10 examples, but y has 300"),
        ({"x": X}, TypeError, "x must be one array or tensor of inputs, got a dict"),
        ([X, X], TypeError, r"got a list of arrays \(2 of them\): wrap a model of several inputs"),
        ((X, X), TypeError, "got a tuple of arrays"),
        ([tf.constant(X), X], TypeError, "got a list of arrays"),
    ],
)
def test_inputs_that_are_refused(x, error, message):
    with pytest.raises(error, match=message):
        quiet(linear, x, Y, corner_attack())


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (Y - 1, ValueError, ">= 0, got -1"),
        (Y + 1, ValueError, "y must be in 0 ... 2, .* got labels from 1 to 3"),
        (Y.astype(float), TypeError, "must hold integers"),
        (Y[:, None, None], ValueError, r"integers \(class indices\) of shape"),
        (np.full((EXAMPLES, CLASSES), 1 / CLASSES), ValueError, "must be one-hot"),
        (np.ones((EXAMPLES, CLASSES), int), ValueError, "exactly one 1"),
        (np.eye(4)[Y], ValueError, "one-hot of 4 classes"),
        (Y[:5], ValueError, "5 labels"),
        (None, ValueError, "needs labels"),
    ],
)
def test_labels_that_are_refused(y, error, message):
    with pytest.raises(error, match=message):
        quiet(linear, X, y, corner_attack())


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "uint32", "uint64"])
def test_labels_may_be_of_any_integer_dtype(dtype):
    expected = quiet(linear, X, Y, corner_attack()).robust_correct
    for labels in (Y.astype(dtype), np.eye(CLASSES, dtype=dtype)[Y]):
        np.testing.assert_array_equal(
            quiet(linear, X, labels, corner_attack()).robust_correct, expected
        )


def test_inputs_in_nested_lists_are_one_array():
    assert quiet(linear, X.tolist(), Y, corner_attack()).clean_accuracy == 0.9


def test_datasets_that_are_refused():
    pairs = tf.data.Dataset.from_tensor_slices((X, Y))
    for dataset, error, message in [
        (pairs, ValueError, "dataset of batches"),
        (pairs.batch(10).repeat(), ValueError, "without an end"),
        (pairs.batch(10).take(0), ValueError, "no batches"),
        (tf.data.Dataset.from_tensor_slices(X).batch(10), TypeError, "pairs"),
        (tf.data.Dataset.from_tensor_slices(((X, X), Y)).batch(10), TypeError, "one tensor of inp"),
    ]:
        with pytest.raises(error, match=message):
            quiet(linear, dataset, None, corner_attack())
    with pytest.raises(ValueError, match="y must be None"):
        quiet(linear, pairs.batch(10), Y, corner_attack())


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda x: tf.nn.softmax(linear(x)), ValueError, "but returns probabilities"),
        (lambda x: linear(x)[:, :1], ValueError, "2 classes or more"),
        (lambda x: linear(x)[:, None], ValueError, r"shape \(batch, classes\)"),
        (lambda x: tf.reduce_sum(linear(x), axis=0, keepdims=True), ValueError, "shape"),
        (lambda x: tf.math.log(linear(x)), ValueError, "NaN or infinity for"),
        (lambda x: {"logits": linear(x)}, TypeError, "one tensor"),
        ("model", TypeError, "callable"),
    ],
)
def test_models_that_are_refused(model, error, message):
    with pytest.raises(error, match=message):
        quiet(model, X, Y, corner_attack())


@both
def test_a_softmax_at_the_end_is_refused_in_both_kerases(k):
    with pytest.raises(ValueError, match="Leave out the last softmax"):
        quiet(keras_model(k, activation="softmax"), X, Y, corner_attack())


@both
def test_a_sigmoid_per_class_at_the_end_is_diagnosed_in_both_kerases(k):
    with pytest.warns(EvaluationWarning, match=r"sigmoid per class.*activation=None") as caught:
        report = quiet(keras_model(k, activation="sigmoid"), X, Y, corner_attack())
    assert len(caught) == 1
    assert report.warnings == (str(caught[0].message),)
    assert report.clean_accuracy == np.mean(np.all(margins() > 0, axis=1))


def test_outputs_of_which_one_is_no_probability_are_not_diagnosed():
    def shifted(x, lowest):
        unit = tf.sigmoid(linear(x))
        return unit + (lowest - tf.reduce_min(unit))

    for lowest in (-0.01, 0.99):
        report = quiet(lambda x, lowest=lowest: shifted(x, lowest), X, Y, corner_attack())
        assert report.warnings == ()


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.0, 1e-4), (-255.0, 2.64)])
def test_inputs_may_miss_the_bounds_by_a_millionth_of_their_size(bounds):
    attack, size = attacks.FGSM(epsilon=1e-6, bounds=bounds), max(map(abs, bounds))
    x = np.full((1, 2), bounds[1])
    assert attack(lambda x: x, x + 0.9e-6 * size, [0]).shape == (1, 2)
    with pytest.raises(ValueError, match="within bounds"):
        attack(lambda x: x, x + 1.1e-6 * size, [0])


def test_an_attack_that_leaves_small_bounds_is_refused():
    def model(x):
        return linear(x * 1e5)

    attack = attacks.Custom(
        lambda m, x, y: x + 5e-7, epsilon=1e-6, bounds=(0.0, 1e-5), name="leaves"
    )
    inside = np.full_like(X, 1e-5)
    with pytest.raises(ValueError, match="left bounds"):
        quiet(model, inside, Y, {"leaves": lambda m, x, y: x + 5e-7}, bounds=(0.0, 1e-5))
    with pytest.raises(ValueError, match="must lie within bounds"):
        quiet(model, inside + 5e-7, Y, attack, bounds=(0.0, 1e-5))


def test_a_model_that_overflows_under_attack_is_refused():
    def brittle(x):
        return linear(x) / tf.where(tf.reduce_max(x, axis=1, keepdims=True) > 0.95, 0.0, 1.0)

    with pytest.raises(ValueError, match="on what attack 'ones' found"):
        quiet(brittle, X, Y, {"ones": lambda model, x, y: tf.ones_like(x)})


def test_a_model_that_cannot_be_compiled_gets_a_hint():
    with pytest.raises(Exception, match="numpy") as caught:
        quiet(lambda x: tf.constant(x.numpy() @ WEIGHTS), X, Y, corner_attack())
    assert "compiled by tf.function" in "".join(caught.value.__notes__)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (best_corner(EPSILON * 1.01), ValueError, "left its ball: it moved an input by 0.0505"),
        (lambda m, x, y: x + EPSILON * 20, ValueError, "left bounds"),
        (lambda m, x, y: x * float("nan"), ValueError, "returned NaN"),
        (lambda m, x, y: x[:, :2], ValueError, "shape"),
    ],
)
def test_adversaries_that_break_the_rules_are_refused(function, error, message):
    with pytest.raises(error, match=message):
        quiet(linear, X, Y, attacks.Custom(function, epsilon=EPSILON, name="bad"))


def test_a_ball_in_l2_is_held_to_as_well():
    def step(model, x, y):
        return x + 0.1 / math.sqrt(SIZE)

    quiet(linear, X, Y, attacks.Custom(step, epsilon=0.1, norm="l2"))
    with pytest.raises(ValueError, match=r"by 0\.1 in l2"):
        quiet(linear, X, Y, attacks.Custom(step, epsilon=0.099, norm="l2"))


def test_plain_callables_are_held_to_the_form_and_the_bounds():
    for function, error, message in [
        (lambda m, x, y: None, TypeError, "tensor of floats"),
        (lambda m, x, y: y, TypeError, "tensor of floats"),
        (lambda m, x, y: x[:2], ValueError, "shape of x"),
        (lambda m, x, y: x - 1.0, ValueError, "left bounds"),
        (lambda m, x, y: x.numpy() * np.nan, ValueError, "NaN"),
    ]:
        with pytest.raises(error, match=message):
            quiet(linear, X, Y, function)


def test_attacks_that_are_refused():
    for given, error, message in [
        ([], ValueError, "attacks is empty"),
        ({}, ValueError, "attacks is empty"),
        (attacks.PGD, TypeError, "must hold attacks"),
        ("PGD", TypeError, "must hold attacks"),
        ([attacks.FGSM(epsilon=0.1), 3], TypeError, "must hold attacks"),
        (attacks.PGD(epsilon=0.1, targeted=True), ValueError, "is targeted"),
        (attacks.PGD(epsilon=0.1, bounds=(-1, 1)), ValueError, "has bounds"),
    ]:
        with pytest.raises(error, match=message):
            quiet(linear, X, Y, given)
    with pytest.raises(ValueError, match="batch_size"):
        quiet(linear, X, Y, corner_attack(), batch_size=0)
    with pytest.raises(ValueError, match="seed"):
        quiet(linear, X, Y, corner_attack(), seed=-1)


def test_other_bounds():
    def shifted(x):
        return linear((x + 1) / 2)

    report = quiet(
        shifted, 2 * X - 1, Y, attacks.FGSM(epsilon=0.1, bounds=(-1, 1)), bounds=(-1.0, 1.0)
    )
    assert report.clean_accuracy == 0.9
    assert report.bounds == (-1.0, 1.0)


# --- diagnostics ----------------------------------------------------------------------------------


def test_a_sound_evaluation_has_no_diagnostics():
    x, y = np.tile(X, (4, 1)), np.tile(Y, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = quiet(
            keras_model(keras),
            x,
            y,
            [attacks.FGSM(epsilon=EPSILON), attacks.PGD(epsilon=EPSILON), corner_attack()],
        )
    assert report.warnings == report.notes == ()


@pytest.mark.parametrize("place", ["inputs", "outputs"])
def test_a_model_that_changes_from_call_to_call_is_diagnosed(place):
    generator = np.random.default_rng(0)

    def noisy(x):
        if place == "inputs":
            return linear(x + generator.normal(scale=0.1, size=x.shape[-1]).astype(np.float32))
        return linear(x) + generator.normal(size=CLASSES).astype(np.float32)

    with pytest.warns(EvaluationWarning, match="changes from call to call"):
        report = quiet(noisy, X, Y, corner_attack())
    assert "changes from call to call" in report.warnings[0]
    assert report.flags == ("changing-outputs",)
    assert "Warning: changing-outputs: The model's output changes" in str(report)
    assert report.to_dict()["warnings"] == list(report.warnings)


def test_dropout_is_off_unless_it_is_forced_on():
    def model(always):
        x = tf_keras.Input((SIZE,))
        out = tf_keras.layers.Dense(CLASSES)(tf_keras.layers.Dropout(0.5)(x, training=always))
        return tf_keras.Model(x, out)

    report = quiet(model(None), X, Y, attacks.FGSM(epsilon=EPSILON))
    assert report.warnings == ()
    with pytest.warns(EvaluationWarning) as caught:
        quiet(model(True), X, Y, attacks.FGSM(epsilon=EPSILON))
    assert "changes from call to call" in str(caught[0].message)


def is_cut(x):
    """Tell which examples are among the first 75 of 300, as they were."""
    return tf.reduce_any(tf.reduce_all(x[:, None] == X[None, :75], axis=-1), axis=1)


def masked(x):
    """Rounding has no slope: some examples are cut off from the gradient."""
    return tf.where(is_cut(x)[:, None], tf.round(100 * linear(x)) / 100, linear(x))


def test_gradients_that_are_zero_are_counted():
    with pytest.warns(EvaluationWarning):
        report = quiet(masked, X, Y, corner_attack())
    assert report.flags == ("zero-gradients", "non-differentiable-operations")
    assert "zero for 75 of 300 examples (25.00 %)" in report.warnings[0]
    assert "of the type Round," in report.warnings[1]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_gradients_that_are_not_finite_are_counted(value):
    @tf.custom_gradient
    def broken(x):
        def gradient(upstream):  # as of 0 times the square root of 0
            slope = upstream @ tf.transpose(tf.constant(WEIGHTS, tf.float32))
            return tf.where(is_cut(x)[:, None], value, slope)

        return linear(x), gradient

    with pytest.warns(
        EvaluationWarning, match=r"NaN or infinite for 75 of 300 examples \(25.00 %\)"
    ):
        report = quiet(broken, X, Y, corner_attack())
    assert report.flags == ("undefined-gradients",)


@pytest.mark.parametrize(("count", "flags"), [(3, ()), (4, ("zero-gradients",))])
def test_few_gradients_that_are_zero_are_not_reported(count, flags):
    x, cut = X[:300], np.arange(300) < count

    def masked_few(given):
        chosen = tf.reduce_any(tf.reduce_all(given[:, None] == x[None, cut], axis=-1), axis=1)
        return tf.where(chosen[:, None], tf.stop_gradient(linear(given)), linear(given))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EvaluationWarning)
        assert quiet(masked_few, x, Y[:300], corner_attack()).flags == flags


def test_logits_so_large_that_softmax_saturates_are_attacked_all_the_same():
    def sure(x):
        return 1e4 * linear(x)

    pgd = attacks.PGD(epsilon=EPSILON, steps=5)
    with pytest.warns(EvaluationWarning, match="^saturated-logits: The logits of .* of 300"):
        report = quiet(sure, X, Y, pgd)
    other = quiet(linear, X, Y, pgd)
    assert (report.flags, other.flags) == (("saturated-logits",), ())
    # Where it is surely wrong, cross-entropy has its largest gradient.
    assert quiet(sure, X, (Y + 1) % CLASSES, pgd).flags == ()
    assert np.mean(robust(EPSILON)) <= report.robust_accuracy <= other.robust_accuracy


def test_a_function_that_refers_to_another_network_is_attacked_anew():
    def judged(scale):
        nonlocal weights
        weights = scale * WEIGHTS
        return quiet(model, X, Y, attacks.FGSM(epsilon=EPSILON)).robust_accuracy

    def model(x):
        return x @ weights + BIAS

    weights = WEIGHTS
    judged(-1.0)
    expected = quiet(linear, X, Y, attacks.FGSM(epsilon=EPSILON)).robust_accuracy
    assert judged(1.0) == expected < 0.5


def test_the_source_of_a_transfer_is_looked_at_too():
    def softmax(x):
        return tf.nn.softmax(linear(x))

    fgsm = attacks.FGSM(epsilon=EPSILON)
    with pytest.raises(ValueError, match="source 'softmax' of a Transfer must return logits, but"):
        quiet(linear, X, Y, attacks.Transfer(source=softmax, attack=fgsm))
    with pytest.warns(EvaluationWarning):
        report = quiet(linear, X, Y, attacks.Transfer(source=masked, attack=fgsm))
    assert report.flags == ("zero-gradients", "non-differentiable-operations")
    assert "source 'masked' of a Transfer: " in report.warnings[0]
    assert "zero for 75 of" in report.warnings[0]
    sound = quiet(masked, X, Y, attacks.Transfer(source=linear, attack=fgsm))
    assert sound.warnings == ()


def test_a_model_without_any_gradient_is_diagnosed():
    @tf.custom_gradient
    def opaque(x):
        def gradient(*_):
            raise LookupError("no gradient is defined")

        return linear(x), gradient

    with pytest.warns(EvaluationWarning, match="zero for 300 of 300"):
        report = quiet(opaque, X, Y, corner_attack())
    np.testing.assert_array_equal(report.robust_correct, robust(EPSILON))
    for model, operation in (
        (lambda x: tf.round(10 * linear(x)), "Round"),
        (lambda x: tf.one_hot(tf.argmax(linear(x), axis=1), CLASSES) * 9.0, "ArgMax"),
        (lambda x: linear(tf.cast(tf.cast(10 * x, tf.int32), tf.float32) / 10), "Cast"),
        (lambda x: tf.numpy_function(lambda x: x @ WEIGHTS + BIAS, [x], tf.float32), "PyFunc"),
    ):
        with pytest.warns(EvaluationWarning):
            report = quiet(model, X, Y, corner_attack())
        assert {"zero-gradients", "non-differentiable-operations"} <= set(report.flags)
        assert "zero for 300 of 300" in report.warnings[0]
        assert any(f"of the type {operation}," in text for text in report.warnings)


def test_few_examples_are_remarked_on():
    report = quiet(linear, X[:20], Y[:20], corner_attack())
    assert any("20 examples: the worst case is only known to lie" in note for note in report.notes)
    assert "20 examples: the worst case is only known to lie" in str(report)


def test_an_attack_without_effect_is_remarked_on():
    idle = attacks.Custom(lambda model, x, y: x, epsilon=EPSILON, name="idle")
    report = quiet(linear, X, Y, [idle, corner_attack(name="corner")])
    assert [note for note in report.notes if "on no example" in note] == [
        "idle: it fooled the model on no example. Check its epsilon, steps and bounds before "
        "calling the model robust."
    ]


def test_a_weak_attack_that_does_better_is_remarked_on():
    small = corner_attack(EPSILON / 2, name="small")
    lazy = attacks.Custom(best_corner(EPSILON / 10), epsilon=EPSILON, name="lazy")
    name = "weaker-attack-wins"
    with pytest.warns(EvaluationWarning, match=f"^{name}: small fools more .* a smaller epsilon"):
        report = quiet(linear, X, Y, [lazy, small])
    assert report.flags == (name,)

    one = attacks.FGSM(epsilon=EPSILON)
    short = attacks.PGD(epsilon=EPSILON, steps=2, step_size=EPSILON / 50, start="none")
    with pytest.warns(EvaluationWarning, match=f"^{name}: one fools more .* with a single step"):
        report = quiet(linear, X, Y, {"one": one, "short": short})
    assert report.flags == (name,)


def test_public_names():
    assert set(evaluation.__all__) <= set(dir(evaluation))


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (5, 3), (-1, 3)])
def test_an_interval_of_nothing_is_refused(successes, trials):
    with pytest.raises(ValueError, match="must be"):
        wilson_interval(successes, trials)
