"""Attacks without gradients on files of LiteRT and ONNX: what they do to the network itself."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from helpers import dense_model

from tscnc_tf import EvaluationWarning, attacks, evaluate_robustness, export

FORMS = {
    "litert": (export.export_litert, export.load_litert),
    "onnx": (export.export_onnx, export.load_onnx),
}
EPSILON = 0.1
ATTACKS = {
    "Square": attacks.Square(epsilon=EPSILON, queries=60),
    "SPSA": attacks.CleverHans(
        "spsa",
        epsilon=EPSILON,
        options={"nb_iter": 6, "spsa_samples": 16, "learning_rate": 0.05, "delta": 0.05},
    ),
}
COUNT = 24


@pytest.fixture(scope="module")
def network():
    keras.utils.set_random_seed(3)
    return dense_model(keras)


@pytest.fixture(scope="module")
def examples(network):
    """Inputs, and the classes that the network predicts."""
    x = np.random.default_rng(1).uniform(size=(COUNT, 6)).astype("float32")
    return x, np.argmax(network(x), axis=1)


@pytest.fixture(scope="module", params=FORMS)
def served(request, network, tmp_path_factory):
    """The file of the network, loaded."""
    write, load = FORMS[request.param]
    path = tmp_path_factory.mktemp("served") / "network"
    write(network, path)
    return load(path)


@pytest.fixture(scope="module")
def expected(network, examples):
    """By attack, on which examples the network stays right."""
    found = {}
    for name, attack in ATTACKS.items():
        report = evaluate_robustness(network, *examples, attack, progress=False)
        assert report.clean_accuracy == 1 and 0.2 < report.robust_accuracy < 0.8
        found[name] = report.robust_correct
    return found


@pytest.mark.parametrize("name", ATTACKS)
def test_what_needs_no_gradient_finds_in_a_file_what_it_finds_in_the_network(
    served, network, examples, expected, name
):
    report = evaluate_robustness(served, *examples, ATTACKS[name], progress=False)
    assert report.warnings == ()
    np.testing.assert_array_equal(report.robust_correct, expected[name])
    # What fools the file fools the network: it is not the rounding of the file that was attacked.
    x, y = examples
    found = np.asarray(ATTACKS[name](served, x, y, seed=(0, 0)))
    assert np.max(np.abs(found - x)) == pytest.approx(EPSILON, rel=1e-4)
    np.testing.assert_array_equal(np.argmax(network(found), axis=1) == y, expected[name])


def test_of_autoattack_a_file_gets_square(served, examples, expected, monkeypatch):
    parts = (attacks.APGD(epsilon=EPSILON, steps=2), ATTACKS["Square"])
    monkeypatch.setattr(attacks.AutoAttack, "attacks", parts)
    with pytest.warns(EvaluationWarning):
        report = evaluate_robustness(served, *examples, epsilon=EPSILON, progress=False)
    assert "no-gradient" in report.flags
    [result] = report.attacks.values()
    [part] = result.stages
    assert (part.name, part.examples) == (ATTACKS["Square"].name, COUNT)
    np.testing.assert_array_equal(report.robust_correct, expected["Square"])


@pytest.mark.parametrize("form", [*FORMS, "saved model"])
def test_the_state_of_an_exported_model_is_refused_for_another(network, examples, form, tmp_path):
    forms = {**FORMS, "saved model": (export.export_saved_model, export.load_saved_model)}
    write, load = forms[form]
    other = keras.models.clone_model(network)
    other.set_weights([weight * np.float32(1 + 1e-5) for weight in network.get_weights()])
    square = attacks.Square(epsilon=EPSILON, queries=2)

    for model, name in ((network, "one"), (other, "other")):
        write(model, tmp_path / name)

    def run(name):
        state = tmp_path / "state.json"
        served = load(tmp_path / name)
        return evaluate_robustness(served, *examples, square, state_path=state, progress=False)

    report = run("one")
    assert set(report.digests) == {"data", "weights", "graph"}
    assert run("one").digests == report.digests
    with pytest.raises(ValueError, match="what differs: weights"):
        run("other")
