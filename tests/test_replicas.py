"""An evaluation whose batches are shared out to the replicas of a strategy."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from helpers import FLAVOURS, dense_model

from tscnc_tf import attacks, evaluation
from tscnc_tf._keras import flavours
from tscnc_tf.evaluation import replicas, state
from tscnc_tf.evaluation import run as run_module

pytestmark = pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)


@pytest.fixture
def strategy():
    devices = [device.name for device in tf.config.list_logical_devices("CPU")]
    return tf.distribute.MirroredStrategy(devices)


@pytest.fixture
def networks(library, strategy):
    """A network on one device, and the same one on two."""
    one = dense_model(library)
    with strategy.scope():
        mirrored = dense_model(library)
    mirrored.set_weights(one.get_weights())
    return one, mirrored


@pytest.fixture
def report(rng, networks):
    """Return a function that evaluates a model on the same data by the same attacks."""
    x = rng.random((50, 6)).astype("float32")
    y = np.argmax(networks[0](x), axis=1)
    chosen = {
        "PGD": attacks.PGD(epsilon=0.05, steps=3),
        "APGD": attacks.APGD(epsilon=0.05, steps=5),
        "Square": attacks.Square(epsilon=0.05, queries=20),
        "own": lambda model, x, y: tf.clip_by_value(x + 0.05, 0.0, 1.0),
    }

    def evaluate(model, **options):
        options = {"batch_size": 8, "progress": False, **options}
        found = evaluation.evaluate_robustness(model, x, y, chosen, **options)
        assert 0.0 < found.robust_accuracy < 1.0
        return {
            name: (each.correct.tolist(), each.largest_distance, each.tied)
            for name, each in found.attacks.items()
        }

    return evaluate


@pytest.fixture
def seen(monkeypatch):
    """Return which replica has attacked which batch, and on which device."""
    calls = []
    original = replicas.Replicas._run

    def run(self, replica, function, arguments):
        result = original(self, replica, function, arguments)
        calls.append((replica, arguments[2][1], result.device[-5:]))
        return result

    monkeypatch.setattr(replicas.Replicas, "_run", run)
    return calls


def test_the_report_is_that_of_one_device(report, networks, strategy, seen):
    one, mirrored = networks
    alone = report(one)
    assert seen == []
    assert report(mirrored) == alone
    attacked = [(index % 2, index, f"CPU:{index % 2}") for index in range(7)]
    assert sorted(seen) == sorted(attacked * 3)  # what is not compiled has one place
    with strategy.scope():
        assert report(mirrored) == alone


def test_each_device_reads_its_own_variables(report, networks):
    one, mirrored = networks
    _, second = flavours.tensor_variable(mirrored.weights[0]).values
    second.assign(-second)
    assert report(mirrored) != report(one)


def test_what_was_stopped_goes_on(report, networks, tmp_path, monkeypatch):
    one, mirrored = networks
    count, path = run_module._Evaluation._record, tmp_path / "state.json"

    def stop(self, part, result, index, *rest):
        if (part.name, index) == ("APGD", 3):
            raise KeyboardInterrupt
        count(self, part, result, index, *rest)

    monkeypatch.setattr(state, "_SECONDS_BETWEEN_WRITES", 0.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module._Evaluation, "_record", stop)
        report(mirrored, state_path=path)
    assert report(mirrored, state_path=path) == report(one)


def test_autoattack_fools_the_same_also_if_it_was_stopped(
    rng, networks, seen, tmp_path, monkeypatch
):
    """All of its kinds of attacks, shortened; stopped and continued on two devices."""
    one, mirrored = networks
    x = rng.random((40, 6)).astype("float32")
    y = np.argmax(one(x), axis=1)
    ball = {"epsilon": 0.05}
    parts = (
        attacks.APGD(steps=3, **ball),
        attacks.APGD(loss="targeted_dlr", steps=2, **ball),
        attacks.FAB(steps=2, **ball),
        attacks.Square(queries=10, **ball),
    )
    monkeypatch.setattr(attacks.AutoAttack, "attacks", parts)
    monkeypatch.setattr(state, "_SECONDS_BETWEEN_WRITES", 0.0)
    count, stop_at = run_module._Evaluation._record, [(parts[2].name, 1)]

    def stop(self, part, result, index, *rest):
        if (part.name, index) in stop_at:
            stop_at.clear()
            raise KeyboardInterrupt
        count(self, part, result, index, *rest)

    def evaluate(model, **options):
        options = {"batch_size": 8, "seed": 3, "diagnose": False, "progress": False, **options}
        found = evaluation.evaluate_robustness(model, x, y, attacks.AutoAttack(**ball), **options)
        (result,) = found.attacks.values()
        stages = [(part.name, part.examples, part.fooled) for part in result.stages]
        return stages, result.correct.tolist(), result.largest_distance, result.tied

    alone = evaluate(one)
    assert seen == []
    stages = alone[0]
    assert [name for name, *_ in stages] == [part.name for part in parts]
    assert all(examples > 16 for _, examples, _ in stages)  # more batches than devices
    assert stages[0][2] > 0
    with monkeypatch.context() as patch:
        patch.setattr(run_module._Evaluation, "_record", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate(mirrored, state_path=tmp_path / "state.json")
        before = len(seen)
        assert evaluate(mirrored, state_path=tmp_path / "state.json") == alone
    assert {(replica, device) for replica, _, device in seen} == {(0, "CPU:0"), (1, "CPU:1")}
    # One batch of the third is counted before the stop: all others of it are attacked afterwards.
    batches = [-(-examples // 8) for _, examples, _ in stages]
    assert len(seen) - before == batches[2] - 1 + batches[3]
