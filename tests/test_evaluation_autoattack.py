"""AutoAttack as the measure: closed forms, planted faults, stopped evaluations, curves."""

from __future__ import annotations

import functools
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import rich.console
import tensorflow as tf
from test_evaluation import (
    BIAS,
    CLASSES,
    EPSILON,
    WEIGHTS,
    X,
    Y,
    best_corner,
    linear,
    margins,
    quiet,
    robust,
)

import tscnc_tf as tscnc
from tscnc_tf import attacks, evaluation
from tscnc_tf._keras import keras
from tscnc_tf.evaluation import EvaluationWarning, diagnostics, evaluate_robustness, probes
from tscnc_tf.evaluation import run as run_module

FEW = 60


def robust_l2(epsilon, x=X, y=Y):
    """Return which examples no l2 perturbation can change, by hand."""
    reach = np.linalg.norm(WEIGHTS[:, y].T[:, :, None] - WEIGHTS[None], axis=1)
    return np.all(margins(x, y) > epsilon * reach, axis=1)


def flagged(model, *arguments, **options):
    """Evaluate a model of which warnings are expected."""
    with pytest.warns(EvaluationWarning):
        return quiet(model, *arguments, **options)


# --- The default ------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "expected"), [(None, robust), ("l2", robust_l2)])
def test_autoattack_is_the_default_and_exact_on_a_linear_model(norm, expected):
    radius = 0.12 if norm == "l2" else EPSILON
    report = quiet(linear, X[:FEW], Y[:FEW], epsilon=radius, norm=norm, batch_size=25)
    np.testing.assert_array_equal(report.robust_correct, expected(radius, X[:FEW], Y[:FEW]))
    assert report.flags == ()
    [(name, result)] = report.attacks.items()
    assert name == f"AutoAttack-standard {norm or 'linf'} {radius}"
    assert [part.name.split()[0] for part in result.stages] == [
        *("APGD-100", "APGD-100", "FAB-100", "Square-5000")
    ]
    # Each attack is run on what those before it left, beginning with what is right.
    left = int(np.sum(report.clean_correct))
    for part in result.stages:
        assert part.examples == left
        left -= part.fooled
    assert left == int(np.sum(report.robust_correct)) > 0
    [described] = json.loads(json.dumps(report.to_dict()))["attacks"]
    assert [part["fooled"] for part in described["attacks"]] == [
        part.fooled for part in result.stages
    ]
    assert f"fooled {result.stages[0].fooled} of {result.stages[0].examples}" in str(report)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "epsilon must be given, such as epsilon='8/255'"),
        ({"norm": "l2"}, "epsilon must be given"),
        ({"attacks": attacks.FGSM(epsilon=0.1), "epsilon": 0.1}, "epsilon=0.1 is for an eval"),
        ({"attacks": attacks.FGSM(epsilon=0.1), "norm": "l2"}, "norm='l2' is for an evaluation"),
        ({"epsilon": 0.1, "norm": "l3"}, "norm must be one of"),
        ({"epsilon": 2.0}, "epsilon must be at most the width of bounds"),
    ],
)
def test_arguments_that_contradict_each_other(options, words):
    with pytest.raises(ValueError, match=words):
        quiet(linear, X, Y, **options)


# --- Planted faults ---------------------------------------------------------------------------


def test_a_model_without_gradient_is_judged_by_the_part_that_needs_none():
    def quantised(x):
        return linear(tf.round(64 * x) / 64)

    report = flagged(quantised, X[:FEW], Y[:FEW], epsilon=EPSILON)
    assert set(report.flags) == {
        *("zero-gradients", "non-differentiable-operations", "no-gradient")
    }
    [result] = report.attacks.values()
    assert [part.name for part in result.stages] == [f"Square-5000 linf {EPSILON}"]
    # Rounding moves an input by 1/128 at most.
    least, most = (robust(EPSILON + shift, X[:FEW], Y[:FEW]) for shift in (1 / 128, -1 / 128))
    assert np.all(report.robust_correct >= least) and np.all(report.robust_correct <= most)
    rand = attacks.AutoAttack(epsilon=EPSILON, version="rand")
    with (
        pytest.warns(EvaluationWarning),
        pytest.raises(ValueError, match=r"AutoAttack-rand .* can't be run: .* no gradient"),
    ):
        quiet(quantised, X[:FEW], Y[:FEW], rand)


@pytest.mark.parametrize(
    ("make", "operation"),
    [
        (lambda x: tf.quantization.quantize_and_dequantize_v2(x, 0.0, 1.0), "DequantizeV4"),
        (lambda x: tf.raw_ops.QuantizeAndDequantizeV3(
            input=x, input_min=0.0, input_max=1.0, num_bits=8), "DequantizeV3"),
        (lambda x: x + 0.0 * tf.cast(tf.searchsorted([0.5], tf.reshape(x, [-1]))[0], x.dtype),
         "LowerBound"),
    ],
)  # fmt: skip
def test_operations_with_substitute_gradients_are_named(make, operation):
    report = flagged(lambda x: linear(make(x)), X[:FEW], Y[:FEW], attacks.FGSM(epsilon=EPSILON))
    assert "non-differentiable-operations" in report.flags
    assert any(operation in text for text in report.warnings)


@tf.custom_gradient
def misleading(x):
    """Return the logits of the linear model with gradients that point the wrong way."""
    return linear(x), lambda upstream: -upstream @ tf.transpose(tf.constant(WEIGHTS))


def test_gradients_that_mislead_are_found_in_five_ways():
    square = attacks.Square(epsilon=EPSILON, queries=200)
    apgd = attacks.APGD(epsilon=EPSILON, steps=10, loss="targeted_dlr")
    report = flagged(misleading, X, Y, [apgd, square], diagnose=True)
    assert {"black-box-wins", "ladder"} <= set(report.flags)
    options = {"nb_iter": 5, "spsa_samples": 64, "learning_rate": 0.05, "delta": 0.05}
    spsa = attacks.CleverHans("spsa", epsilon=EPSILON, options=options)
    assert "black-box-wins" in flagged(misleading, X[:FEW], Y[:FEW], [apgd, spsa]).flags
    alone = flagged(misleading, X, Y, apgd, diagnose=True)
    assert {"transfer-wins", "ladder"} <= set(alone.flags)
    transfer = attacks.Transfer(source=linear, attack=attacks.FGSM(epsilon=EPSILON))
    for without_gradient in (square, transfer):  # their ball will do
        assert "ladder" in flagged(misleading, X, Y, without_gradient, diagnose=True).flags
    with pytest.raises(ValueError, match="diagnose must be False for attacks without a radius"):
        quiet(misleading, X, Y, lambda model, x, y: x, diagnose=True)
    sound = quiet(linear, np.tile(X, (4, 1)), np.tile(Y, 4), [apgd, square], diagnose=True)
    assert sound.flags == ()


def test_a_detector_that_answers_with_equal_logits_is_flagged():
    def detector(x):
        is_clean = tf.reduce_any(tf.reduce_all(x[:, None] == X[None], axis=-1), axis=1)
        return tf.where(is_clean[:, None], linear(x), tf.zeros((1, CLASSES)))

    report = flagged(detector, X, Y, attacks.PGD(epsilon=EPSILON, steps=3))
    assert "tied-logits" in report.flags


def test_the_part_of_an_ensemble_without_gradient_is_watched_too(monkeypatch):
    """Square comes last in AutoAttack: what it finds alone is no good sign."""
    short = (
        attacks.APGD(epsilon=EPSILON, steps=5),
        attacks.Square(epsilon=EPSILON, queries=200),
    )
    monkeypatch.setattr(attacks.AutoAttack, "attacks", short)
    report = flagged(misleading, X, Y, epsilon=EPSILON)
    assert {"black-box-wins", "ladder"} <= set(report.flags)


def test_the_part_without_gradient_is_watched_wherever_it_comes(monkeypatch):
    """As in "plus", where attacks by gradients follow on what Square left."""
    short = (
        attacks.APGD(epsilon=EPSILON, steps=5),
        attacks.Square(epsilon=EPSILON, queries=200),
        attacks.APGD(epsilon=EPSILON, steps=5, loss="targeted_dlr"),
    )
    monkeypatch.setattr(attacks.AutoAttack, "attacks", short)
    report = flagged(misleading, X, Y, epsilon=EPSILON, diagnose=False)
    assert "black-box-wins" in report.flags


@pytest.mark.parametrize(
    ("fooled", "left", "examples", "notable"),
    [
        (12, 345, 1000, False),  # Square on a network of 99 % zeros, without masking: 3.5 %
        (18, 345, 1000, True),
        (2, 20, 20, False),
        (3, 20, 20, True),
        (20, 300, 10_000, False),
        (21, 300, 10_000, True),
    ],
)
def test_the_black_box_must_win_on_a_share_of_what_is_left(fooled, left, examples, notable):
    found = diagnostics.of_transfer(fooled, left, examples)
    assert [finding.name for finding in found] == ["transfer-wins"] * notable


def test_attacks_in_larger_balls_are_not_held_against_those_in_smaller_ones(monkeypatch):
    gradient = attacks.APGD(epsilon=EPSILON / 4, steps=10)
    square = attacks.Square(epsilon=EPSILON, queries=200)
    assert quiet(linear, X, Y, [gradient, square]).flags == ()
    other = attacks.APGD(epsilon=EPSILON / 10, norm="l2", steps=10)
    assert quiet(linear, X, Y, [other, square]).flags == ()
    # Nor is what another network's examples find beside a model that has no gradient to follow.
    monkeypatch.setattr(
        attacks.AutoAttack, "attacks", (attacks.Square(epsilon=EPSILON, queries=2),)
    )
    transfer = attacks.Transfer(source=linear, attack=attacks.APGD(epsilon=EPSILON, steps=10))
    report = quiet(linear, X, Y, [attacks.AutoAttack(epsilon=EPSILON), transfer], diagnose=False)
    assert "black-box-wins" not in report.flags


def test_in_l1_a_sound_model_raises_no_flag_and_the_ladder_reaches_the_corners():
    radius = 0.15
    x, y = X[:120], Y[:120]
    reach = np.max(np.abs(WEIGHTS[:, y].T[:, :, None] - WEIGHTS[None]), axis=1)
    report = quiet(linear, x, y, epsilon=radius, norm="l1")
    assert report.flags == ()
    expected = np.all(margins(x, y) > radius * reach, axis=1)  # the bounds are further away
    np.testing.assert_array_equal(report.robust_correct, expected)
    ladder = probes.Probe(linear, (6,), "l1", (0.0, 1.0)).ladder(X, Y, radius)
    assert list(ladder.by_radius)[-1] == 6.0
    probe = probes.Probe(linear, (6,), "l1", (0.0, 1.0))
    moved = np.sum(np.abs(probe.examples(X, Y, radius) - X), axis=1)
    assert np.max(moved) == pytest.approx(radius, rel=1e-4)


def test_examples_with_equal_logits_are_counted_once(monkeypatch):
    """However many parts of an ensemble met them."""

    def often_tied(x):
        refused = tf.reduce_sum(x, axis=1) > limit
        return tf.where(refused[:, None], tf.zeros((1, CLASSES)), linear(x))

    limit = np.sort(np.sum(X, axis=1))[-len(X) // 20]
    short = tuple(attacks.Square(epsilon=1e-6, queries=2 + more) for more in range(4))
    monkeypatch.setattr(attacks.AutoAttack, "attacks", short)
    clean = quiet(often_tied, X, Y, attacks.Square(epsilon=1e-6, queries=2), diagnose=False)
    report = flagged(often_tied, X, Y, epsilon=1e-6, diagnose=False)
    [result] = report.attacks.values()
    [once] = clean.attacks.values()
    assert 0 < result.tied <= once.tied < 0.1 * len(X)
    assert "tied-logits" not in report.flags


@pytest.mark.parametrize("name", ["1-train", "3-finetune"])
def test_what_was_trained_and_pruned_by_this_package_raises_no_flag(finished, name):
    stage = tscnc.experiments.open_stage(finished / name)
    data = tscnc.datasets.load("digits")
    x, y = data.x_test[:128], data.y_test[:128]
    opponents = [
        attacks.APGD(epsilon=0.1, steps=20),
        attacks.APGD(epsilon=0.1, steps=20, loss="targeted_dlr", target_classes=3),
        attacks.Square(epsilon=0.1, queries=200),
    ]
    assert quiet(stage.model, x, y, opponents, diagnose=True).flags == ()


@pytest.mark.filterwarnings("ignore:At a sparsity of 99.00 %, hidden keeps:UserWarning")
def test_a_robust_network_of_99_percent_zeros_raises_no_flag():
    """Under the whole of AutoAttack, on 500 images, with all diagnostics."""
    keras.utils.set_random_seed(0)
    data, layers = tscnc.datasets.load("digits"), keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Flatten(),
            layers.Dense(256, "relu", name="hidden"),
            layers.Dense(10, name="logits"),
        ]
    )

    def train(network):
        attack = attacks.PGD(epsilon=0.05, steps=3)
        trainer = tscnc.AdversarialTraining(network, attack=attack, loss=tscnc.losses.Madry())
        trainer.compile(keras.optimizers.Adam(5e-3))
        trainer.fit(data.x_train, data.y_train, batch_size=128, epochs=20, verbose=0)
        return network

    pruned = train(tscnc.prune_now(train(model), 0.99, scope="global"))
    assert tscnc.inspection.sparsity(tscnc.strip(pruned)).sparsity > 0.98
    x = np.concatenate([data.x_test, data.x_validation])[:500]
    y = np.concatenate([data.y_test, data.y_validation])[:500]
    report = quiet(pruned, x, y, epsilon=0.05, batch_size=500)
    assert 0.3 < report.robust_accuracy < report.clean_accuracy and report.flags == ()


def test_the_probes_of_many_evaluations_give_no_warning_of_retracing(caplog):
    for _ in range(6):  # TensorFlow warns of five
        probes.Probe(linear, (6,), "linf", (0.0, 1.0)).ladder(X[:8], Y[:8], 0.5)
    assert "retracing" not in caplog.text


@pytest.mark.parametrize(
    ("accuracies", "steps", "words"),
    [
        ({0.1: 0.6, 0.2: 0.3, 1.0: 0.0}, {1: 0.7, 20: 0.6}, []),
        ({0.1: 0.6, 1.0: 0.2}, {1: 0.7, 20: 0.6}, ["in a ball of radius 1.* leaves 20.0 %"]),
        ({0.1: 0.3, 0.2: 0.5, 1.0: 0.0}, {1: 0.7, 20: 0.3}, ["larger balls do not.* 30.0, 50.0"]),
        ({0.1: 0.6, 1.0: 0.0}, {1: 0.2, 20: 0.6}, ["20 steps leave 60.0 %, but 1 only 20.0"]),
    ],
)
def test_what_a_ladder_says(accuracies, steps, words):
    found = diagnostics.of_ladder(accuracies, steps)
    assert [each.name for each in found] == ["ladder"] * len(words)
    for each, text in zip(found, words, strict=True):
        assert tf.strings.regex_full_match(each.text, f".*{text}.*")


def test_the_ladder_of_a_linear_model_is_its_closed_form():
    right = np.argmax(X @ WEIGHTS + BIAS, axis=1) == Y
    x, y = X[right][:64], Y[right][:64]
    ladder = probes.Probe(linear, (6,), "linf", (0.0, 1.0)).ladder(x, y, 0.05)
    assert list(ladder.by_radius) == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0]
    for radius in (0.05, 0.1):  # the bounds are 0.2 away
        expected = np.mean(robust(radius, x, y))
        assert ladder.by_radius[radius] == pytest.approx(expected, abs=0.05)
    assert ladder.by_radius[1.0] == 0.0
    assert ladder.by_steps[20] == ladder.by_radius[0.05] <= ladder.by_steps[1]


def test_the_plain_network_learns_and_leaves_no_trace():
    before = keras.layers.Dense(1).name
    network = probes.plain_network(X, Y, CLASSES, seed=0)
    accuracy = np.mean(np.argmax(network(tf.constant(X)), axis=1) == Y)
    assert accuracy > 0.75  # a tenth of the labels is wrong
    np.testing.assert_array_equal(
        network(tf.constant(X)), probes.plain_network(X, Y, CLASSES, seed=0)(tf.constant(X))
    )
    number = int(before.split("_")[-1]) if "_" in before else 0
    assert keras.layers.Dense(1).name == f"dense_{number + 1}"


# --- Evaluations that were stopped ------------------------------------------------------------


class Stopped(BaseException):
    """What stops an evaluation in these tests."""


def stop_after(monkeypatch, batches):
    """Let an evaluation run for so many batches; return the list of those that it ran."""
    done, count = [], run_module._Evaluation._record

    def counted(self, part, run, index, *arguments):
        if len(done) == batches:
            raise Stopped
        count(self, part, run, index, *arguments)
        done.append((part.name, index))

    monkeypatch.setattr(run_module._Evaluation, "_record", counted)
    return done


def same(first, second):
    np.testing.assert_array_equal(first.robust_correct, second.robust_correct)
    for name, result in first.attacks.items():
        other = second.attacks[name]
        np.testing.assert_array_equal(result.correct, other.correct)
        assert result.largest_distance == other.largest_distance
        assert [part.to_dict() | {"seconds": 0} for part in result.stages] == [
            part.to_dict() | {"seconds": 0} for part in other.stages
        ]


@pytest.mark.parametrize("batches", [4, 7])
def test_an_evaluation_continues_where_it_stopped(batches, monkeypatch, tmp_path):
    short = (
        attacks.APGD(epsilon=EPSILON, steps=5, loss="targeted_dlr"),
        attacks.Square(epsilon=EPSILON, queries=20),
    )
    monkeypatch.setattr(attacks.AutoAttack, "attacks", short)
    monkeypatch.setattr("tscnc_tf.evaluation.state._SECONDS_BETWEEN_WRITES", 0.0)
    opponents = [attacks.PGD(epsilon=EPSILON, steps=2), attacks.AutoAttack(epsilon=EPSILON)]
    options = {"batch_size": 100, "seed": 3, "diagnose": False}
    whole = quiet(linear, X, Y, opponents, **options)
    state = tmp_path / "new" / "state.json"
    with monkeypatch.context() as patch:
        before = stop_after(patch, batches)
        with pytest.raises(Stopped):
            quiet(linear, X, Y, opponents, state_path=state, **options)
    json.loads(state.read_text())
    with monkeypatch.context() as patch:
        after = stop_after(patch, 100)
        same(whole, quiet(linear, X, Y, opponents, state_path=state, **options))
    assert len(before) == batches and not set(before) & set(after)
    with monkeypatch.context() as patch:
        assert stop_after(patch, 0) == []
        same(whole, quiet(linear, X, Y, opponents, state_path=state, **options))


def dense(k, scale=1.0):
    model = k.Sequential([k.Input((6,)), k.layers.Dense(CLASSES)])
    model.set_weights([scale * WEIGHTS, scale * BIAS])
    return model


def test_a_state_of_another_evaluation_is_refused(tmp_path):
    state, attack = tmp_path / "state.json", attacks.FGSM(epsilon="1/20")
    given = {"model": dense(keras), "x": X, "y": Y, "attacks": attack, "seed": 1}

    def run(**changes):
        return evaluate_robustness(**(given | changes), state_path=state, progress=False)

    report = run()
    assert (
        json.loads(state.read_text())["identity"]["attacks"]["FGSM linf 1/20"]["epsilon"] == "1/20"
    )
    assert set(report.digests) == {"data", "weights", "graph"}
    assert report.to_dict()["digests"] == report.digests
    twin = dense(keras)  # the same weights and operations
    assert run(model=twin).digests == report.digests
    for changes, words in [
        ({"seed": 2}, r"what differs: seed \(was 1, is 2\)"),
        ({"attacks": attacks.FGSM(epsilon=0.06)}, "what differs: attacks"),
        ({"x": X[::-1].copy(), "y": Y[::-1].copy()}, "what differs: data"),
        ({"model": dense(keras, 1.001)}, "what differs: weights"),
        ({"model": lambda x: twin(tf.clip_by_value(x, 0.0, 1.0))}, "what differs: .*graph"),
        ({"model": lambda x: twin(x) + 1e-7}, "what differs: .*graph"),
        ({"batch_size": 7}, r"batch_size \(was 128, is 7\)"),
    ]:
        with pytest.raises(ValueError, match=words):
            run(**changes)
    content = json.loads(state.read_text())
    state.write_text(json.dumps(content | {"format": 1}))
    with pytest.raises(ValueError, match="what differs: format"):
        run()
    content["identity"]["versions"]["tensorflow"] = "1.0"
    state.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="what differs: versions"):
        run()
    for text in ("", "[]", "{}", '{"identity": {}, "format": 1}', "no JSON"):
        state.write_text(text)
        with pytest.raises(ValueError, match="is not the state of an evaluation"):
            run()


def test_a_state_of_a_transfer_from_another_source_is_refused(tmp_path):
    state = tmp_path / "state.json"

    def run(source):
        attack = attacks.Transfer(source=source, attack=attacks.FGSM(epsilon=EPSILON))
        return evaluate_robustness(dense(keras), X, Y, attack, state_path=state, progress=False)

    source, other = dense(keras, 2.0), dense(keras, 3.0)
    other.name = source.name
    report = run(source)
    assert set(report.digests) == {"data", "weights", "graph", f"source {source.name}"}
    with pytest.raises(ValueError, match=f"what differs: source {source.name}"):
        run(other)


def test_a_state_of_a_transfer_from_another_function_is_refused(tmp_path):
    def made(sign):
        def source(x):
            return sign * linear(x)

        return source

    def run(source, name):
        attack = attacks.Transfer(source=source, attack=attacks.FGSM(epsilon=EPSILON))
        return evaluate_robustness(
            dense(keras), X, Y, attack, state_path=tmp_path / name, progress=False
        )

    run(made(1.0), "functions")
    with pytest.raises(ValueError, match="what differs: source source"):
        run(made(-1.0), "functions")
    network = dense(keras, 2.0)
    network.name = "source"
    run(network, "network")
    with pytest.raises(ValueError, match="what differs: source source"):
        run(made(1.0), "network")


def test_a_state_of_a_cleverhans_attack_with_another_loss_is_refused(tmp_path):
    def run(sign):
        def loss(labels, logits):
            return sign * tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)

        attack = attacks.CleverHans(
            "fast_gradient_method", epsilon=EPSILON, options={"loss_fn": loss}
        )
        return quiet(linear, X, Y, attack, state_path=tmp_path / "state.json")

    run(1.0)
    with pytest.raises(ValueError, match="what differs: attacks"):
        run(-1.0)


def test_a_state_of_another_function_is_refused(tmp_path):
    state, attack = tmp_path / "state.json", attacks.FGSM(epsilon=EPSILON)
    quiet(linear, X, Y, attack, state_path=state)
    with pytest.raises(ValueError, match="what differs: graph"):
        quiet(lambda x: linear(x) * 1.1, X, Y, attack, state_path=state)
    scale = tf.Variable(1.0)

    def scaled(x):  # a function whose weights can't be found
        return scale * linear(x)

    quiet(scaled, X, Y, attack, state_path=tmp_path / "scaled.json")
    scale.assign(1.1)
    with pytest.raises(ValueError, match="of another model: its logits on the first examples"):
        quiet(scaled, X, Y, attack, state_path=tmp_path / "scaled.json")


def test_an_evaluation_of_a_model_with_random_outputs_goes_on(monkeypatch, tmp_path):
    model = keras.Sequential(
        [keras.Input((6,)), dense(keras), keras.layers.Lambda(lambda z: z + tf.random.normal((3,)))]
    )
    attack, state = attacks.APGD(epsilon=EPSILON, steps=2, eot=2), tmp_path / "state.json"
    monkeypatch.setattr("tscnc_tf.evaluation.state._SECONDS_BETWEEN_WRITES", 0.0)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped), pytest.warns(EvaluationWarning, match="changing-outputs"):
            quiet(model, X, Y, attack, state_path=state, batch_size=50)
    with monkeypatch.context() as patch:
        after = stop_after(patch, 100)
        flagged(model, X, Y, attack, state_path=state, batch_size=50)
    assert len(after) == 4


def test_the_graph_of_a_model_is_the_same_in_another_process():
    """An evaluation is continued in another one."""
    code = """
import keras, numpy as np
from tscnc_tf.evaluation.model_under_test import ModelUnderTest
layers, k = keras.layers, keras
model = k.Sequential([k.Input((8, 8, 1)), layers.Conv2D(4, 3), layers.BatchNormalization(),
                      layers.Flatten(), layers.Dropout(0.1), layers.Dense(3)])
examined = ModelUnderTest(model, np.zeros((2, 8, 8, 1), "float32"))
list(examined.examine(iter([(np.zeros((2, 8, 8, 1), "float32"), np.array([0, 1]))]), True))
print(examined.graph)
"""
    found = [
        subprocess.run([sys.executable, "-c", text], capture_output=True, check=True).stdout
        for text in (code, f"import tf_keras\n{code}")
    ]
    assert found[0] == found[1] and len(found[0].split()[-1]) == 64


def test_a_state_of_an_attack_whose_code_has_changed_is_refused(tmp_path):
    def made(size, sign=1.0):
        return lambda model, x, y: tf.clip_by_value(x + sign * size, 0.0, 1.0)

    class Own:
        def __init__(self, size):
            self.size = size

        def attack(self, model, x, y):
            return made(self.size)(model, x, y)

    def by_default(size):
        return lambda model, x, y, size=size: made(size)(model, x, y)

    def of_arrays(size):
        sizes, source = np.full(2000, 0.01), np.random.default_rng(0)
        sizes[1000] = size
        return lambda model, x, y: made(sizes[1000] + 0 * source.integers(2))(model, x, y)

    pairs = [(make(0.01), make(0.02)) for make in (made, by_default, of_arrays)]
    pairs.append((Own(0.01).attack, Own(0.02).attack))
    pairs.append(tuple(tf.function(each, autograph=False) for each in pairs[0]))
    pairs += [tuple(attacks.Custom(each, epsilon=0.05) for each in pairs[0])]
    for index, (first, second) in enumerate(pairs):
        state = tmp_path / f"{index}.json"
        for _ in range(2):
            quiet(dense(keras), X, Y, {"mine": first}, state_path=state)
        with pytest.raises(ValueError, match="what differs: attacks"):
            quiet(dense(keras), X, Y, {"mine": second}, state_path=state)


def test_a_version_for_more_classes_is_refused_before_the_first_attack(monkeypatch):
    def never(*_args, **_more):
        pytest.fail("an attack has run")

    monkeypatch.setattr(attacks.APGD, "bind", never)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)])
    for version in ("plus", "rand"):
        with pytest.raises(ValueError, match=r"needs 3 classes.* Use version='standard'"):
            quiet(model, X, Y % 2, attacks.AutoAttack(epsilon=0.1, version=version))


# --- The bar ----------------------------------------------------------------------------------


@pytest.fixture
def lines(monkeypatch):
    """The lines that the bar of an evaluation shows, as on a terminal, one for each change.

    The clock goes on by 40 s with each batch.
    """
    shown = []

    class Recorded(run_module.Progress):
        def __init__(self, *columns, **options):
            self.seconds = 0.0
            super().__init__(*columns, **options, auto_refresh=False, get_time=lambda: self.seconds)

        def record(self):
            console = rich.console.Console(width=160, file=io.StringIO())
            console.print(self.make_tasks_table(self.tasks))
            shown.append(console.file.getvalue().strip())

        def add_task(self, *arguments, **options):
            task = super().add_task(*arguments, **options)
            self.record()
            return task

        def update(self, *arguments, **options):
            self.seconds += 40.0
            super().update(*arguments, **options)
            self.record()

    monkeypatch.setattr(run_module, "Progress", Recorded)
    return shown


def columns(line):
    """Return what a line of the bar says: attack, examples left, accuracy in %, and the time."""
    pattern = r"(.+?) [━╸╺ ]+ (\d+) examples left, ([\d.]+)% robust so far ([\d:-]+)"
    name, left, accuracy, time = re.fullmatch(pattern, line).groups()
    return name, int(left), float(accuracy), time


def test_the_bar_shows_attack_examples_left_robust_accuracy_so_far_and_time(lines):
    opponents = {"first": best_corner(EPSILON), "second": best_corner(2 * EPSILON)}
    evaluate_robustness(linear, X, Y, opponents, batch_size=80)
    clean, number = robust(0.0), np.arange(len(X))
    expected = []
    for name, epsilon in (("first", EPSILON), ("second", 2 * EPSILON)):
        for batch, time in enumerate(["-:--:--", "-:--:--", "0:01:20", "0:00:40", "0:00:00"]):
            attacked = min(80 * batch, len(X))
            right = clean & ((number >= attacked) | robust(epsilon))
            expected.append((name, len(X) - attacked, round(100 * np.mean(right), 1), time))
    assert [columns(line) for line in lines] == expected


def test_the_bar_of_autoattack_goes_on_with_what_stands(lines, monkeypatch, tmp_path):
    parts = (
        attacks.FGSM(epsilon=EPSILON),
        attacks.Custom(best_corner(EPSILON), epsilon=EPSILON, name="corner"),
    )
    monkeypatch.setattr(attacks.AutoAttack, "attacks", parts)
    monkeypatch.setattr("tscnc_tf.evaluation.state._SECONDS_BETWEEN_WRITES", 0.0)
    options = {"epsilon": EPSILON, "batch_size": 100, "diagnose": False}
    report = evaluate_robustness(linear, X, Y, **options)
    [result] = report.attacks.values()
    clean, robust_, stood = 270, int(np.sum(robust(EPSILON))), result.stages[1].examples
    assert robust_ < stood < clean
    shown = [columns(line)[:3] for line in lines]
    first, second = ([each for each in shown if each[0] == part.name] for part in parts)
    assert [left for _, left, _ in first] == [270, 170, 70, 0]
    assert [left for _, left, _ in second] == [max(stood - 100 * i, 0) for i in range(len(second))]
    assert first[0][2] == 90.0 and first[-1][2] == second[0][2] == round(stood / 3, 1)
    assert second[-1][2] == round(robust_ / 3, 1)
    # One that was stopped goes on where it was.
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 2)
        evaluate_robustness(linear, X, Y, state_path=tmp_path / "state.json", **options)
    lines.clear()
    evaluate_robustness(linear, X, Y, state_path=tmp_path / "state.json", **options)
    assert [columns(line)[:3] for line in lines] == shown[2:]


@pytest.mark.parametrize(
    ("terminal", "progress", "is_shown"),
    [(True, True, True), (True, False, False), (False, True, False)],
)
def test_a_bar_is_written_to_a_terminal_only(monkeypatch, capsys, terminal, progress, is_shown):
    """To stderr, while it runs: in the end nothing is left of it."""
    monkeypatch.setattr(
        run_module, "Console", functools.partial(rich.console.Console, force_terminal=terminal)
    )
    evaluate_robustness(linear, X, Y, attacks.FGSM(epsilon=EPSILON), progress=progress)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("FGSM linf 0.05" in captured.err) == is_shown
    assert (captured.err != "") == is_shown


# --- Curves -----------------------------------------------------------------------------------


def test_a_curve_of_a_linear_model_is_its_closed_form():
    radii = ["8/255", 0.15, 0.01]
    draw = functools.partial(
        evaluation.robustness_curve,
        attack=lambda e: attacks.APGD(epsilon=e, steps=10, loss="targeted_dlr"),
        progress=False,
    )
    curve = draw(linear, X, Y, radii)
    assert curve.epsilons == (0.01, "8/255", 0.15)
    expected = [np.mean(robust(radius)) for radius in (0.01, 8 / 255, 0.15)]
    np.testing.assert_allclose(curve.accuracies, expected, atol=0.004)
    assert curve.clean_accuracy == 0.9 and np.all(np.diff(curve.correct.astype(int), axis=0) <= 0)
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(50)
    np.testing.assert_array_equal(draw(linear, data, None, [0.01]).correct, curve.correct[:1])
    with pytest.raises(ValueError, match="y is None: robust accuracy needs labels"):
        evaluation.robustness_curve(linear, X, None, [0.01])
    sizes = [report.examples for report in curve.reports]
    assert sizes == [300, *(int(row.sum()) for row in curve.correct[:-1])]
    lines = str(curve).splitlines()
    assert any("8/255" in line and f"{100 * curve.accuracies[1]:.2f} %" in line for line in lines)
    described = json.loads(json.dumps(curve.to_dict()))
    assert described["accuracies"] == list(curve.accuracies)
    pytest.importorskip("matplotlib")
    [axes] = curve.plot().axes
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [0, 0.01, 8 / 255, 0.15])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.9, *curve.accuracies])
    assert axes.get_xlabel() == "ε (linf)"


@pytest.mark.parametrize("attack", [3, attacks.FGSM(epsilon=0.1)])
def test_the_attack_of_a_curve_is_a_function_of_the_radius(attack):
    with pytest.raises(TypeError, match="attack must be a function that returns the attack for"):
        evaluation.robustness_curve(linear, X, Y, [0.1], attack=attack)


def test_a_curve_continues_where_it_stopped(monkeypatch, tmp_path):
    options = {"attack": lambda e: attacks.FGSM(epsilon=e), "batch_size": 100, "progress": False}
    draw = functools.partial(evaluation.robustness_curve, linear, X, Y, [0.2, 0.05], **options)
    whole, folder = draw(), tmp_path / "curve"
    with monkeypatch.context() as patch:
        stop_after(patch, 4)  # three at the smaller radius, one at the larger one
        with pytest.raises(Stopped):
            draw(state_path=folder)
    assert sorted(path.name for path in folder.iterdir()) == ["0.json", "1.json"]
    with monkeypatch.context() as patch:
        after = stop_after(patch, 100)
        again = draw(state_path=folder)
    assert 0 < len(after) <= 2
    np.testing.assert_array_equal(again.correct, whole.correct)
    for first, second in zip(whole.reports, again.reports, strict=True):
        same(first, second)
    with pytest.raises(ValueError, match="what differs: attacks"):
        evaluation.robustness_curve(linear, X, Y, [0.03], **options, state_path=folder)
    with pytest.raises(NotADirectoryError, match="state_path must be a folder"):
        draw(state_path=folder / "0.json")


def test_a_curve_that_ends_above_zero_is_flagged():
    with pytest.warns(EvaluationWarning) as found:
        curve = evaluation.robustness_curve(
            *(misleading, X, Y, [0.1, 1.0]),
            attack=lambda e: attacks.PGD(epsilon=e, steps=2),
        )
    expected = f"ladder: In a ball of radius 1, .*, {100 * curve.accuracies[-1]:.1f} % are robust"
    assert any(re.match(expected, str(each.message)) for each in found)
    assert "ladder" in curve.reports[-1].flags and "Warning: ladder" in str(curve)
    assert diagnostics.of_curve({0.99: 0.9, 1.0: 0.05}, 1.0) == []


def test_a_curve_ends_where_nothing_is_left():
    curve = evaluation.robustness_curve(
        linear, X[:20], Y[:20], [0.9, 0.8, 0.01], attack=lambda e: attacks.FGSM(epsilon=e)
    )
    assert curve.accuracies[1:] == (0.0, 0.0) and len(curve.reports) == 2


@pytest.mark.parametrize(
    ("radii", "options", "words"),
    [
        ([], {}, "epsilons must be one or more radii, all different"),
        ([0.1, "1/10"], {}, "all different"),
        ([0.0], {}, "epsilons must be > 0"),
        (0.5, {}, "epsilons must be a list of radii, got 0.5"),
        ([0.1], {"norm": np.zeros(2)}, "norm must be one of 'linf', 'l2', 'l1'"),
        (
            [0.1],
            {"attack": lambda e: attacks.FGSM(epsilon=e, norm="l2")},
            "attack returned an attack of norm 'l2' for a curve of norm='linf'",
        ),
        (
            [0.1],
            {"attack": lambda e: [attacks.PGD(epsilon=e), attacks.FGSM(epsilon=e, norm="l2")]},
            "attack returned an attack of norm 'l2'",
        ),
        (
            ["1/10", 0.2],
            {"attack": lambda e: attacks.FGSM(epsilon=0.1)},
            "attack of epsilon=0.1 for the radius 0.2: it must use its argument",
        ),
        ([0.1, 1.5], {}, "epsilon must be at most the width of bounds"),
    ],
)
def test_curves_that_are_refused(radii, options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        evaluation.robustness_curve(linear, X, Y, radii, **options)
