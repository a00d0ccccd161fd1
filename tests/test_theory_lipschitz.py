"""Lipschitz constants: T21 and T22 of docs/theory.md; its example, its tests, its table."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import math
import pathlib
import re
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import FLAVOURS, conv_model, dense_model
from hypothesis import assume, given
from matrices import (
    SLACK,
    entries,
    few,
    norm,
    relu_network,
    seeds,
    tries,
)

import tscnc_tf as tscnc
from tscnc_tf._keras import tf_keras, tfmot, wrappers

ROOT = pathlib.Path(__file__).parent.parent


@functools.cache
def example(name="theory"):
    """A module of examples/, by its name."""
    folder = str(ROOT / "examples")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


# Local Lipschitz constants and margins.


def exact(matrix):
    """The largest l1 of the outputs over linf of the inputs of a linear map, over all corners."""
    corners = np.array(list(itertools.product([-1.0, 1.0], repeat=len(matrix))))
    return float(np.max(np.sum(np.abs(corners @ matrix), axis=1)))


@given(entries((4, 3)), entries((4,), 0.3, 0.7), seeds)
@tries
def test_t21_within_margin_over_lipschitz_no_prediction_changes(matrix, x, seed):
    logits = x @ matrix
    order = np.sort(logits)
    assume(exact(matrix) > 1e-3 and order[-1] - order[-2] > 1e-3)
    radius = (order[-1] - order[-2]) / exact(matrix)
    corners = np.array(list(itertools.product([-1.0, 1.0], repeat=4)))
    inner = np.random.default_rng(seed).uniform(-1, 1, size=(100, 4))
    for moved in (x + 0.999 * radius * step for step in (*corners, *inner)):
        assert np.argmax(moved @ matrix) == np.argmax(logits)


@given(entries((5,)), entries((5,), 0.3, 0.7))
@tries
def test_t21_for_two_opposite_logits_the_radius_is_exact(weights, x):
    assume(np.abs(weights).sum() > 1e-2 and abs(weights @ x) > 1e-3)
    matrix = np.stack([weights, -weights], axis=1)
    logits = x @ matrix
    radius = abs(logits[0] - logits[1]) / exact(matrix)
    beyond = x - 1.001 * radius * np.sign(weights) * np.sign(weights @ x)
    assert np.argmax(beyond @ matrix) != np.argmax(logits)


def test_t21_an_attack_within_the_certified_radius_finds_nothing(rng):
    model, _ = relu_network(keras, (6, 8, 3), seed=3)
    x = rng.uniform(0.2, 0.8, size=(50, 6)).astype("float32")
    logits = np.asarray(model(x))
    order = np.sort(logits, axis=1)
    lipschitz = math.sqrt(3 * 6) * tscnc.inspection.lipschitz_upper_bound(model)
    radius = float(np.median((order[:, -1] - order[:, -2]) / lipschitz))
    safe = (order[:, -1] - order[:, -2]) / lipschitz >= radius
    attack = tscnc.attacks.PGD(epsilon=radius, step_size=radius / 4, steps=20)
    found = tscnc.evaluate_robustness(
        model, x[safe], np.argmax(logits[safe], axis=1), attack, progress=False
    )
    assert found.robust_accuracy == 1.0


def test_t21_the_constant_that_ascent_finds_certifies_nothing():
    def cliff(x):
        return tf.concat([1000.0 * tf.nn.relu(x - 0.599), 0.1 * tf.ones_like(x)], axis=1)

    x = np.full((20, 1), 0.5, "float32")
    found = tscnc.inspection.local_lipschitz(cliff, x, epsilon=0.1).values
    flat = x[found == 0.0]
    assert len(flat) >= 15  # ascent sees a constant, whose radius would be infinite
    assert np.all(np.argmax(cliff(flat), axis=1) == 1)
    assert np.all(np.argmax(cliff(flat + 0.1), axis=1) == 0)


@given(entries((4, 3)))
@few
def test_t22_what_is_found_is_below_the_true_constant_and_that_below_the_bound(matrix):
    assume(exact(matrix) > 1e-3)

    def linear(x):
        return tf.matmul(x, tf.constant(matrix, tf.float32))

    found = tscnc.inspection.local_lipschitz(linear, np.full((8, 4), 0.5), epsilon=0.2).maximum
    assert found <= exact(matrix) * (1 + 1e-4)
    assert found >= 0.5 * exact(matrix)
    assert exact(matrix) <= np.abs(matrix).sum() * SLACK
    assert exact(matrix) <= math.sqrt(4 * 3) * norm(matrix) * SLACK


def test_t22_the_factor_between_the_norms_is_needed():
    ones = np.ones((5, 3))
    assert exact(ones) == 15.0
    assert math.sqrt(5 * 3) * norm(ones) == pytest.approx(15.0)
    found = tscnc.inspection.local_lipschitz(
        lambda x: tf.matmul(x, tf.ones((5, 3))), np.full((4, 5), 0.5), epsilon=0.1
    )
    assert found.maximum == pytest.approx(15.0, rel=1e-4)


@pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)
def test_t22_the_upper_bound_holds_for_a_convolutional_network(library, rng):
    model = conv_model(library)
    model.set_weights([rng.uniform(-1, 2, size=w.shape) for w in model.get_weights()])
    norm_layer = model.get_layer("norm")
    gamma, beta, mean, variance = norm_layer.get_weights()
    norm_layer.set_weights([gamma, beta, mean, np.abs(variance) + 0.1])
    require_bound(model, rng)


@pytest.mark.parametrize("name", FLAVOURS)
def test_t22_the_upper_bound_holds_for_the_chains_of_applications(name, rng):
    images = {
        "input_shape": (8, 8, 1),
        "classes": 3,
        "mean": (0.5,),
        "std": (0.25,),
        "library": name,
    }
    require_bound(tscnc.applications.SmallCNN(width=4, seed=1, **images), rng)
    residual = tscnc.applications.ResNet20(**images)
    with pytest.raises(ValueError, match="in a chain, with one input and one output"):
        tscnc.inspection.lipschitz_upper_bound(residual)
    assert math.isnan(example().upper_bound(residual, np.zeros((1, 8, 8, 1))))


def require_bound(model, rng):
    """Make sure that no two images and no ascent show a model to be steeper than its bound."""
    bound = tscnc.inspection.lipschitz_upper_bound(model)
    x = rng.uniform(size=(64, 8, 8, 1)).astype("float32")
    y = np.clip(x + 0.1 * rng.normal(size=x.shape), 0, 1).astype("float32")
    moved = np.linalg.norm(np.asarray(model(x)) - np.asarray(model(y)), axis=1)
    assert np.max(moved / np.linalg.norm((x - y).reshape(64, -1), axis=1)) <= bound
    found = tscnc.inspection.local_lipschitz(model, x, epsilon=0.1).maximum
    assert found <= math.sqrt(64 * 3) * bound


@pytest.mark.parametrize("k", [keras, tf_keras])
def test_an_input_that_never_varies_is_divided_by_keras_own_least_deviation(k):
    layer = k.layers.Normalization()
    layer.adapt(np.array([[0.0, 1.0], [0.0, 3.0]], np.float32))
    model = k.Sequential([k.Input((2,)), layer])
    steepest = np.ptp(model(np.array([[0.0, 2.0], [1e-3, 2.0]], np.float32))[:, 0]) / 1e-3
    bound = tscnc.inspection.lipschitz_upper_bound(model)
    assert bound == pytest.approx(1e7) and bound == pytest.approx(steepest, rel=1e-5)


def test_t22_the_upper_bound_is_exact_for_one_layer_and_unknown_for_others():
    upper_bound, layers = tscnc.inspection.lipschitz_upper_bound, keras.layers
    matrix = np.arange(6.0).reshape(3, 2)
    single = keras.Sequential([keras.Input((3,)), layers.Dense(2, use_bias=False)])
    single.set_weights([matrix])
    assert upper_bound(single) == pytest.approx(norm(matrix))
    scaled = keras.Sequential([*single.layers, layers.BatchNormalization(epsilon=0.0)])
    scaled.build((None, 3))
    scaled.layers[-1].set_weights(list(np.array([[5.0, 1.0], [0, 0], [0, 0], [4.0, 1.0]])))
    assert upper_bound(scaled) == pytest.approx(norm(matrix * [2.5, 1.0]))
    std = layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[4.0, 0.25, 1.0])
    first = keras.Sequential([keras.Input((3,)), std, layers.Activation("relu")])
    assert upper_bound(first) == pytest.approx(2.0)
    for size, stride in ((2, 2), (2, 3)):
        pool = layers.MaxPooling2D(size, stride, padding="same")
        assert upper_bound(keras.Sequential([keras.Input((6, 6, 2)), pool])) == 1.0
    inputs, dense = keras.Input((3,)), layers.Dense(3)
    chain = keras.Model(inputs, layers.ReLU()(dense(inputs)))
    assert upper_bound(chain) == pytest.approx(norm(dense.kernel.numpy()))
    twice = upper_bound(keras.Model(inputs, dense(dense(inputs))))
    assert twice == pytest.approx(norm(dense.kernel.numpy()) ** 2)
    slope = layers.ReLU(negative_slope=3.0)
    assert upper_bound(keras.Sequential([keras.Input((3,)), slope])) == 3.0


@pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)
def test_t22_the_upper_bound_is_exact_for_diagonal_kernels_and_scaled_channels(library):
    layers = library.layers
    first, last = layers.Dense(2, "relu", use_bias=False), layers.Dense(2, use_bias=False)
    scaled = layers.BatchNormalization(epsilon=0.0)
    model = library.Sequential([first, scaled, last])
    model.build((None, 2))
    first.set_weights([np.diag([3.0, 1.0])])
    scaled.set_weights(list(np.array([[1.0, -8.0], [0, 0], [0, 0], [4.0, 4.0]])))
    last.set_weights([np.diag([2.0, 5.0])])
    # After a ReLU the largest scale counts: 3, 8 / 2, 5.
    assert tscnc.inspection.lipschitz_upper_bound(model) == pytest.approx(3 * 4 * 5)
    pooled = library.Sequential([layers.Conv2D(1, 2, padding="same", use_bias=False)])
    pooled.add(layers.GlobalAveragePooling2D())
    pooled.build((None, 4, 4, 1))
    pooled.set_weights([np.ones((2, 2, 1, 1))])
    # A sum over 2×2 positions stretches a constant image by 4; the mean of 16 pixels by 1/4.
    assert tscnc.inspection.lipschitz_upper_bound(pooled) == pytest.approx(4 / 4)


def test_t22_the_upper_bound_is_that_of_the_weights_that_act():
    layers = keras.layers
    model = keras.Sequential([keras.Input((3,)), layers.Dense(3, use_bias=False)])
    model.set_weights([np.diag([1.0, 2.0, 3.0])])
    gated = tscnc.gates.add_gates(model)
    found = tscnc.inspection.lipschitz_upper_bound(gated)
    assert found == pytest.approx(tscnc.inspection.condition_numbers(gated).rows[0].sigma_max)
    wrapped = tfmot().sparsity.keras.prune_low_magnitude(dense_model(tf_keras))
    for _, mask in wrappers.pruned_variables(wrapped):
        mask.assign(tf.zeros_like(mask))
    assert tscnc.inspection.lipschitz_upper_bound(wrapped) == 0.0


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda k: k.MaxPooling2D(3, 2), "MaxPooling2D: no bound is known for it"),
        (lambda k: k.Dense(2, activation="gelu"), "Dense: no bound is known for its activation"),
        (lambda k: k.Activation("tanh"), "Activation: no bound is known for its activation"),
        (lambda k: k.Conv2D(2, 3, dilation_rate=2), "Conv2D: no bound is known for it"),
        (lambda k: k.Conv2D(2, 3, groups=2), "Conv2D: no bound is known for it"),
        (lambda k: k.ReLU(threshold=1.0), "ReLU: no bound is known for it"),
        (lambda k: k.LayerNormalization(), "LayerNormalization: no bound is known for it"),
    ],
)
def test_t22_layers_without_a_known_bound_are_named(layer, words):
    model = keras.Sequential([keras.Input((6, 6, 2)), layer(keras.layers)])
    with pytest.raises(ValueError, match=words):
        tscnc.inspection.lipschitz_upper_bound(model)


def test_t22_models_that_are_no_chain_of_finite_weights_are_refused():
    inputs = keras.Input((3,))
    branches = keras.Model(inputs, keras.layers.Dense(3)(inputs) + inputs)
    with pytest.raises(ValueError, match="must be a Sequential or functional model"):
        tscnc.inspection.lipschitz_upper_bound(branches)
    with pytest.raises(TypeError, match="model must be a Keras 3 or tf_keras model"):
        tscnc.inspection.lipschitz_upper_bound(np.tanh)
    single = keras.Sequential([inputs, keras.layers.Dense(2, use_bias=False)])
    single.set_weights([np.full((3, 2), np.nan)])
    with pytest.raises(ValueError, match="is not finite"):
        tscnc.inspection.lipschitz_upper_bound(single)
    norm = keras.layers.BatchNormalization(name="norm")
    model = keras.Sequential([inputs, keras.layers.Dense(2, "relu"), norm])
    norm.moving_variance.assign([1.0, np.nan])
    with pytest.raises(ValueError, match=r"norm.*its weights are not finite"):
        tscnc.inspection.lipschitz_upper_bound(model)


def test_the_example_takes_networks_and_data_of_ones_own(tmp_path, monkeypatch, capsys, rng):
    for name, library in FLAVOURS.items():
        conv_model(library).save(tmp_path / f"{name}.keras")
    x, y = rng.uniform(size=(12, 8, 8, 1)), np.arange(12) % 3
    np.savez(tmp_path / "data.npz", x=x, y=y, x_train=x, y_train=y)
    mine = ["--model", "keras.keras", "--other", "tf_keras.keras", "--data", "data.npz"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["theory.py", *mine, "--layers", "conv", "--smoke"])
    example().main()
    printed = capsys.readouterr().out
    assert "tf_keras, retrained" in printed
    record = json.loads((tmp_path / "outputs" / "theory" / "theory.json").read_text())
    assert record["layers"] == ["conv"]
    assert len(record["runs"]) == 4
    for run in record["runs"]:
        first, *_, last = run["steps"]
        assert last["bound"] < first["bound"]
        assert last["kernels"]["conv"]["condition_number"] == "inf"
        assert 0 < last["kernels"]["conv"]["dead_filters"] < last["kernels"]["conv"]["filters"]
        assert last["kernels"]["logits"]["condition_number"] != "inf"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--model", "none.keras"], r"none\.keras must be a \.keras file: .*No such file"),
        (["--model", "data.npz"], r"data\.npz must be a \.keras file: .*metadata\.json"),
        (["--model", "."], r" must be a \.keras file: "),
        (["--data", "none.npz"], r"--data must be an \.npz file, got none\.npz: .*No such file"),
        (["--data", "net.keras"], r"--data must hold arrays x and y, net\.keras holds \[\]"),
        (["--data", "bytes.npz"], r"in \[0, 1\], those of bytes\.npz are from 0 to 255: divide"),
        (["--layers", "nothing_*"], r"theory\.py: net: model .* has no weight that can be pruned"),
    ],
)
def test_the_example_names_what_it_cannot_take(tmp_path, monkeypatch, change, words):
    conv_model(keras).save(tmp_path / "net.keras")
    x, y = np.zeros((4, 8, 8, 1)), np.arange(4) % 3
    np.savez(tmp_path / "data.npz", x=x, y=y)
    x[0, 0, 0] = 255
    np.savez(tmp_path / "bytes.npz", x=x, y=y)
    monkeypatch.chdir(tmp_path)
    mine = ["--model", "net.keras", "--data", "data.npz", *change, "--smoke"]
    monkeypatch.setattr(sys, "argv", ["theory.py", *mine])
    with pytest.raises(SystemExit, match=words):
        example().main()


def test_the_example_calls_networks_by_what_tells_them_apart():
    folder = pathlib.Path("/runs")
    paths = [folder / name / "1-train" / "model.keras" for name in ("mine", "theirs")]
    assert example().titles(paths) == ["mine/1-train/model", "theirs/1-train/model"]
    assert example().titles([paths[0], folder / "other.keras"]) == ["model", "other"]


# The document.


def sections():
    text = (ROOT / "docs" / "theory.md").read_text()
    parts = re.split(r"^### T(\d+)\. ", text, flags=re.MULTILINE)[1:]
    bodies = (re.split(r"^##+ ", body, flags=re.MULTILINE)[0] for body in parts[1::2])
    return dict(zip(map(int, parts[::2]), bodies, strict=True))


def test_every_inequality_of_the_document_names_its_tests_and_they_exist():
    found = sections()
    assert list(found) == list(range(1, len(found) + 1))
    files = sorted(pathlib.Path(__file__).parent.glob("test_theory*.py"))
    tests = "".join(file.read_text() for file in files)
    own = set(re.findall(r"^def (test_t\d+_\w+)", tests, re.MULTILINE))
    named = {
        number: set(re.findall(r"`(test_\w+)`", body.split("\nChecked by")[1]))
        for number, body in found.items()
    }
    for number, tests in named.items():
        assert tests == {name for name in own if name.startswith(f"test_t{number}_")}, number
        assert tests, number
    assert set().union(*named.values()) == own


def number(value):
    return f"{value:,.0f}" if 100 <= value < math.inf else f"{value:.2g}".replace("inf", "∞")


def rows_of(runs, way, name, levels):
    """The rows that the document's table should have, from what was measured."""
    keys = ("clean", "robust", "lipschitz", "bound", "product", "condition_number", "dead_filters")
    every = [np.median(runs.figures(name, way, key), axis=0) for key in keys]
    ends = runs.figures(name, way, "interval")
    for index, level in enumerate(runs.levels):
        if level in levels:
            clean, robust, *others, dead = (values[index] for values in every)
            low, high = ends[:, index, 0].min(), ends[:, index, 1].max()
            cells = [
                f"{name}, {way if level else 'dense'}",
                f"{100 * level:g} %",
                f"{100 * clean:.0f} %",
                f"{100 * robust:.0f} % ({100 * low:.0f} to {100 * high:.0f})",
                *map(number, others),
                f"{dead:.0f}",
            ]
            yield f"| {' | '.join(cells)} |"


def test_the_figures_of_the_document_are_those_that_were_measured():
    runs = example("theory_figure").Runs(json.loads((ROOT / "docs" / "theory.json").read_text()))
    high = (0.9, 0.95, 0.99, 0.999)
    expected = [
        *rows_of(runs, "pruned", "plain", (0.0, *high)),
        *rows_of(runs, "pruned", "TSCNC", (0.0, *high)),
        *rows_of(runs, "retrained", "plain", high),
        *rows_of(runs, "retrained", "TSCNC", high),
    ]
    text = (ROOT / "docs" / "theory.md").read_text()
    assert re.findall(r"^\| (?:plain|TSCNC).*$", text, re.MULTILINE) == expected

    def lead(way, levels):
        both = (runs.figures(name, way, "robust") for name in ("TSCNC", "plain"))
        return np.subtract(*both)[:, np.isin(runs.levels, levels)].round(3)

    sparse, full = lead("retrained", (0.95, 0.98, 0.99)), lead("retrained", (0.0, 0.5, 0.8))
    assert (np.sum(sparse > 0), np.sum(sparse == 0), np.sum(full < 0)) == (8, 1, 8)
    assert (np.sum(lead("retrained", (0.9, 0.995)) > 0), np.sum(lead("pruned", 0.8) < 0)) == (4, 3)
    kappas = runs.figures("TSCNC", "retrained", "condition_number")
    assert np.max(kappas[:, runs.levels <= 0.99]) < 2.1
    ratio = np.divide(
        *(np.median(runs.figures("plain", "pruned", k), 0) for k in ("bound", "lipschitz"))
    )
    assert ratio[0] == pytest.approx(400, rel=0.01)
