"""The schedules: exact at their ends, graph-safe, and themselves again after saving."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import blobs, dense_model, fresh_process
from hypothesis import given
from hypothesis import strategies as st

from tscnc_tf import _keras, pruning, schedules
from tscnc_tf._keras import wrappers

tfmots = _keras.tfmot().sparsity.keras


def examples():
    """One schedule of each kind; new ones each time, as a gate has a state."""
    return {
        "cosine": schedules.CosineSparsity(0.1, 0.5, 2, 9, frequency=3),
        "one shot": schedules.OneShot(0.5, 4),
        "gated": schedules.ConditionGated(schedules.CosineSparsity(0.0, 0.5, 1, 9, 2), 50.0),
        "gated tfmot": schedules.ConditionGated(
            tfmots.PolynomialDecay(0.0, 0.5, 1, 9, frequency=2),
            50.0,
            measure="effective_condition_number",
        ),
    }


def test_the_list_of_examples_is_complete():
    assert {type(example).__name__ for example in examples().values()} == set(schedules.__all__)
    for example in examples().values():
        assert isinstance(example, tfmots.PruningSchedule)


def values(schedule, steps):
    return [(bool(due), float(sparsity)) for due, sparsity in map(schedule, steps)]


def test_cosine_follows_its_formula_and_is_exact_at_both_ends():
    schedule = schedules.CosineSparsity(0.1, 0.95, begin_step=200, end_step=2000, frequency=70)
    for step in (0, 199, 200, 270, 1000, 1990, 2000, 2001, 10**9):
        due, sparsity = schedule(step)
        part = min(max((step - 200) / 1800, 0), 1)
        expected = 0.95 + (0.1 - 0.95) * 0.5 * (1 + math.cos(math.pi * part))
        assert float(sparsity) == pytest.approx(expected, abs=1e-6)
        assert bool(due) == ((200 <= step <= 2000 and (step - 200) % 70 == 0) or step == 2000)
    assert float(schedule(200)[1]) == np.float32(0.1)
    assert float(schedule(2000)[1]) == np.float32(0.95)
    assert float(schedule(10**9)[1]) == np.float32(0.95)


@given(
    st.floats(0, 0.99),
    st.floats(0, 0.99),
    st.integers(0, 10**6),
    st.integers(1, 10**6),
    st.integers(1, 1000),
)
def test_cosine_never_falls_and_always_prunes_at_its_end(first, second, begin, span, frequency):
    low, high = sorted((first, second))
    schedule = schedules.CosineSparsity(low, high, begin, begin + span, frequency)
    steps = np.linspace(begin, begin + span, 23).astype("int64")
    sparsity = [float(schedule(step)[1]) for step in steps]
    assert all(a <= b + 1e-6 for a, b in itertools.pairwise(sparsity))
    due, last = schedule(begin + span)
    assert bool(due)
    assert float(last) == np.float32(high)
    assert bool(schedule(begin)[0])
    assert not bool(schedule(begin - 1)[0])
    assert not bool(schedule(begin + span + 1)[0])


def test_one_shot_prunes_once():
    assert values(schedules.OneShot(0.5, 4), range(7)) == [(False, 0.0)] * 4 + [
        (True, 0.5),
        (False, 0.5),
        (False, 0.5),
    ]
    first = values(schedules.OneShot(0.5), range(3))
    assert first == [(False, 0.0), (True, 0.5), (False, 0.5)], "steps are counted from 1"


def test_a_gate_holds_and_catches_up():
    inside = schedules.CosineSparsity(0.0, 0.8, 0, 10, frequency=1)
    gate = schedules.ConditionGated(inside, max_condition_number=100.0)
    assert values(gate, range(12)) == values(inside, range(12)), "open until something is measured"
    with pytest.raises(TypeError, match="condition_number must be a number, got None"):
        gate.update(None, step=4)
    with pytest.raises(ValueError, match="step must be >= 0, got -1"):
        gate.update(100.5, step=-1)
    with pytest.raises(ValueError, match=r"end_epoch must be a step or more, got 0\.01"):
        schedules.ConditionGated.from_epochs(inside, 100.0, 0.01, steps_per_epoch=10)
    gate.update(100.5, step=4)
    assert not gate.is_open
    held = float(inside(4)[1])
    assert values(gate, (5, 6, 9)) == [(False, pytest.approx(held))] * 3
    gate.update(float("inf"), step=6)
    assert values(gate, (7,)) == [(False, pytest.approx(held))], "holds what it held at first"
    due, sparsity = gate(10)
    assert bool(due)
    assert float(sparsity) == np.float32(0.8), "the end is the end"
    gate.update(99.0, step=7)
    assert values(gate, (8,)) == values(inside, (8,)), "catches up at the next renewal"


def test_a_gate_prunes_at_its_end_even_where_the_schedule_inside_does_not():
    inside = tfmots.PolynomialDecay(0.0, 0.8, 0, 10, frequency=7)
    assert not bool(inside(10)[0])
    assert bool(schedules.ConditionGated(inside, 10.0)(10)[0])


@pytest.mark.parametrize("name", examples())
def test_graphs_and_xla_give_the_same_values(name):
    schedule = examples()[name]
    for jit in (False, True):
        compiled = tf.function(
            schedule, jit_compile=jit, input_signature=[tf.TensorSpec((), tf.int64)]
        )
        due, sparsity = zip(*values(compiled, range(12)), strict=True)
        due_eager, sparsity_eager = zip(*values(schedule, range(12)), strict=True)
        assert due == due_eager
        np.testing.assert_allclose(sparsity, sparsity_eager, atol=1e-7)


def test_a_compiled_gate_sees_later_measurements():
    gate = schedules.ConditionGated(schedules.CosineSparsity(0.0, 0.8, 0, 10, 1), 100.0)
    compiled = tf.function(gate)
    step = tf.constant(5, tf.int64)
    assert bool(compiled(step)[0])
    gate.update(1e9, step=5)
    assert not bool(compiled(step)[0])


def test_epochs_become_steps():
    assert schedules.CosineSparsity.from_epochs(
        0.0, 0.9, 1, 2.5, steps_per_epoch=100, frequency=7
    ) == schedules.CosineSparsity(0.0, 0.9, 100, 250, 7)
    often = schedules.CosineSparsity.from_epochs(0.0, 0.9, 0, 5, steps_per_epoch=20)
    assert often.frequency == 2, "a short schedule is no single shot"
    assert schedules.OneShot.from_epochs(0.9, 3, steps_per_epoch=10) == schedules.OneShot(0.9, 30)
    inside = schedules.CosineSparsity(0.0, 0.9, 0, 10)
    assert schedules.ConditionGated.from_epochs(
        inside, 5.0, 4, steps_per_epoch=10
    ) == schedules.ConditionGated(inside, 5.0, end_step=40)


@pytest.mark.parametrize("name", examples())
def test_from_config_takes_both_shapes(name):
    schedule = examples()[name]
    config = json.loads(json.dumps(schedule.get_config()))
    cls = type(schedule)
    assert cls.from_config(config).get_config() == schedule.get_config()
    assert cls.from_config(config["config"]).get_config() == schedule.get_config()


RESUME = """
import json, sys
import numpy as np, tensorflow as tf, tf_keras
import tscnc_tf as tscnc
from tscnc_tf._keras import wrappers
x, y = np.load(sys.argv[1]).values()
assert "tscnc_tf.schedules" not in sys.modules
import tensorflow_model_optimization as tfmot
for path in sys.argv[2:]:
    with tfmot.sparsity.keras.prune_scope():
        model = tf_keras.models.load_model(path)
    wrapper = wrappers.wrapped_layers(model)[0]
    before = int(wrapper.pruning_step)
    if model.optimizer is None:
        model.compile("sgd", tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, batch_size=8, verbose=0, callbacks=tscnc.callbacks.pruning_callbacks())
    zeros = [1 - float(np.mean(mask)) for _, mask in wrappers.pruned_variables(model)]
    config = wrapper.pruning_schedule.get_config()
    print(json.dumps([config, before, int(wrapper.pruning_step), zeros]))
"""


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5:UserWarning")
def test_pruned_models_come_back_in_a_fresh_process_and_train_on(tmp_path):
    x, y = blobs(40)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    paths, expected = [], []
    for name, schedule in examples().items():
        model = pruning.prune(dense_model(), schedule)
        model.compile("sgd", tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(x, y, batch_size=8, verbose=0, callbacks=[tfmots.UpdatePruningStep()])
        for ending in (".keras", ".h5", ""):
            paths.append(tmp_path / (name.replace(" ", "_") + ending))
            model.save(paths[-1])
            expected.append(json.loads(json.dumps(schedule.get_config())))
    printed = fresh_process(RESUME, tmp_path / "data.npz", *paths).strip().splitlines()
    assert len(printed) == len(expected)
    for line, config in zip(printed, expected, strict=True):
        config_back, before, after, zeros = json.loads(line)
        assert config_back == config
        assert (before, after) == (5, 10)
        np.testing.assert_allclose(zeros, 0.5)  # the end step lies between the two


def test_the_step_at_the_end_prunes_through_the_wrapper():
    x, y = blobs(32)
    model = pruning.prune(dense_model(), schedules.CosineSparsity(0.0, 0.75, 1, 4, frequency=100))
    model.compile("sgd", tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[tfmots.UpdatePruningStep()])
    for _, mask in wrappers.pruned_variables(model):
        assert 1 - float(tf.reduce_mean(mask)) == 0.75


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (
            lambda: schedules.OneShot(1.0),
            ValueError,
            "final_sparsity must be < 1.*fraction of zeros",
        ),
        (lambda: schedules.OneShot(-0.1), ValueError, "final_sparsity must be >= 0"),
        (lambda: schedules.OneShot(0.5, 1.5), TypeError, "begin_step must be an integer"),
        (
            lambda: schedules.CosineSparsity(0.9, 0.5, 0, 10),
            ValueError,
            "must not be below initial",
        ),
        (lambda: schedules.CosineSparsity(0.0, 0.5, 10, 10), ValueError, "end_step must be >= 11"),
        (
            lambda: schedules.CosineSparsity(0.0, 0.5, 0, 10, 0),
            ValueError,
            "frequency must be >= 1",
        ),
        (lambda: schedules.ConditionGated(None, 5.0), TypeError, "must be a PruningSchedule"),
        (
            lambda: schedules.ConditionGated(schedules.OneShot(0.5), 0.5),
            ValueError,
            "max_condition_number must be >= 1",
        ),
        (
            lambda: schedules.ConditionGated(tfmots.ConstantSparsity(0.5, 0), 5.0),
            ValueError,
            "never ends: give end_step",
        ),
        (
            lambda: schedules.OneShot.from_epochs(0.5, 1, steps_per_epoch=0),
            ValueError,
            "steps_per_epoch must be >= 1",
        ),
    ],
)
def test_bad_input_is_named(build, error, words):
    with pytest.raises(error, match=words):
        build()


def test_epochs_that_are_none_are_named_as_epochs():
    with pytest.raises(ValueError, match=r"end_epoch must be a step or more after begin_epoch=1"):
        schedules.CosineSparsity.from_epochs(0.0, 0.5, 1, 1, steps_per_epoch=10)


def test_a_gate_that_ends_first_prunes_to_the_final_sparsity():
    inner = schedules.CosineSparsity(0.0, 0.9, 0, 100, frequency=10)
    gated = schedules.ConditionGated(inner, 10.0, end_step=50)
    for is_open in (True, False):
        gated.update(1.0 if is_open else 1e9, 10)
        found = {step: tuple(float(each) for each in gated(step)) for step in (50, 60, 100)}
        assert found == {step: (1.0, pytest.approx(0.9)) for step in (50, 60, 100)}
    gated.update(1.0, 10)
    assert float(gated(40)[1]) == pytest.approx(float(inner(40)[1]))
