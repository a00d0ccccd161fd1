"""Regrowth: which weights change places, by NumPy; that counts stay; saving; what is refused."""

from __future__ import annotations

import dataclasses
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import FLAVOURS, blobs, dense_model

import tscnc_tf as tscnc
from tscnc_tf import attacks, callbacks, losses, schedules
from tscnc_tf._keras import flavours, optimizers
from tscnc_tf.pruning import NM, Block, Filters, Pruner, Regrowth, Unstructured

X, Y = blobs(64)
MOVING = Regrowth(0.5, frequency=2, steps=40, until=0.5)


@pytest.fixture(params=FLAVOURS)
def library(request):
    return FLAVOURS[request.param]


def loss(library):
    return library.losses.SparseCategoricalCrossentropy(from_logits=True)


def pruned(library, regrowth=MOVING, sparsity=0.75, model=None, **options):
    library.utils.set_random_seed(0)
    model = dense_model(library) if model is None else model
    schedule = schedules.OneShot(sparsity)
    return tscnc.prune(model, schedule, engine="masks", regrowth=regrowth, **options)


def compiled(model, library, optimizer=None, **options):
    optimizer = library.optimizers.SGD(0.5, momentum=0.9) if optimizer is None else optimizer
    model.compile(optimizer, loss(library), **{"jit_compile": False} | options)
    return model


def kernels(model):
    return [np.asarray(target.variable) for target in model.pruner.targets]


def masks(model):
    return [mask.numpy() for mask in model.pruner.state.masks]


def counts(model):
    return [int(mask.sum()) for mask in masks(model)]


def gradients(model, x=X, y=Y):
    """The gradients of the mean cross-entropy at what is pruned."""
    variables = [flavours.tensor_variable(target.variable) for target in model.pruner.targets]
    with tf.GradientTape() as tape:
        logits = model(x, training=True)
        value = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits))
    return [np.asarray(gradient) for gradient in tape.gradient(value, variables)]


def first(scores, count, allowed):
    """True at the `count` largest scores among what is allowed, of equals the first ones."""
    order = np.argsort(-np.where(allowed, scores, -np.inf).ravel(), kind="stable")[:count]
    chosen = np.zeros(scores.size, bool)
    chosen[order] = True
    return chosen.reshape(scores.shape)


def moved(mask, weight, gradient, step, regrowth=MOVING, drop=0.0, growth=0.0):
    """The mask after a move, by algorithm 1 of RigL; what more is dropped and grows by FB+."""
    last = regrowth.until * regrowth.steps
    share = regrowth.fraction / 2 * (1 + np.cos(np.pi * step / last))
    count = int(mask.sum())
    going = min(round(share * count), mask.size - count)
    stays = first(np.abs(weight), count - going - round(share * drop * count), mask)
    return stays | first(np.abs(gradient), going + round(share * growth * count), ~stays)


def assert_follows(model, step_with, steps=8):
    """Each step leaves the masks that NumPy computes from the gradients before it."""
    pruner = model.pruner
    changes = 0
    for step in range(1, steps + 1):
        before, given = masks(model), gradients(model)
        step_with()
        assert pruner.steps == step
        after = masks(model)
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            kernel = kernels(model)[index]
            assert np.all(kernel[~new] == 0)
            assert np.all(kernel[new & ~old] == 0)
            if step % 2:
                np.testing.assert_array_equal(new, old)
                continue
            # What went is no more to be seen: what stays has the largest weights of all that did.
            wanted = moved(old, LAST[index], given[index], step)
            np.testing.assert_array_equal(new, wanted)
            changes += int((new != old).sum())
    assert changes > 10


LAST = []  # the kernels after an optimizer's step, before weights change places


@pytest.fixture
def watching(monkeypatch):
    """Keep the kernels as they are when weights change places."""
    original = Regrowth.masks

    def watched(self, structure, pairs, given, **options):
        values = [tf.convert_to_tensor(flavours.tensor_variable(t.variable)) for t, _ in pairs]

        def keep(*arrays):
            LAST[:] = [np.array(array) for array in arrays]
            return np.int32(0)

        with tf.control_dependencies([tf.py_function(keep, values, tf.int32)]):
            return original(self, structure, pairs, given, **options)

    monkeypatch.setattr(Regrowth, "masks", watched)


@pytest.mark.parametrize("eager", [False, True])
def test_weights_move_to_where_the_gradient_is_largest(library, watching, eager):
    model = compiled(pruned(library), library, run_eagerly=eager)
    assert counts(model) == [12, 6]
    assert_follows(model, lambda: model.train_on_batch(X, Y), 4 if eager else 8)
    assert counts(model) == [12, 6]


def test_the_gradient_is_that_of_the_robust_loss(library, watching):
    model = pruned(library)
    attack = attacks.FGSM(epsilon=0.1)
    trainer = tscnc.AdversarialTraining(model, attack=attack, loss=losses.Madry())
    trainer.compile(library.optimizers.SGD(0.5, momentum=0.9))
    for step in range(1, 5):
        x = attack(model, X, Y)
        before, given = masks(model), gradients(model, x)
        trainer.train_on_batch(X, Y)
        if step % 2 == 0:
            rows = zip(before, LAST, given, strict=True)
            for new, row in zip(masks(model), rows, strict=True):
                np.testing.assert_array_equal(new, moved(*row, step))


@pytest.mark.parametrize("criterion", ["gradient", "random"])
@pytest.mark.parametrize(
    ("options", "sparsity"),
    [
        ({"scope": "global", "min_weights": 3}, 0.75),
        ({"scope": "erk", "structure": Unstructured(min_per_filter=1)}, 0.6),
        ({"structure": Unstructured(1, 1), "scope": "lamp"}, 0.5),
        ({"structure": Filters(), "layers": "hidden"}, 0.5),
        ({"structure": Block(2, 1), "layers": "*"}, 0.5),
        ({"structure": NM(2, 4)}, 0.5),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_counts_stay_whatever_the_structure_and_the_scope(options, sparsity, criterion):
    regrowth = Regrowth(0.5, criterion, frequency=1, steps=20)
    model = compiled(pruned(keras, regrowth, sparsity, **options), keras)
    before, changes = counts(model), 0
    for _ in range(4):
        old = masks(model)
        model.train_on_batch(X, Y)
        assert counts(model) == before
        changes += sum(np.sum(new != was) for new, was in zip(masks(model), old, strict=True))
        for target, mask in zip(model.pruner.targets, masks(model), strict=True):
            units = target.canonical(tf.constant(mask)).numpy()[0, 0]
            structure = model.pruner.structure
            if isinstance(structure, Filters):
                assert set(units.sum(axis=0)) == {0, units.shape[0]}
            elif isinstance(structure, Block):
                np.testing.assert_array_equal(units[::2], units[1::2])
            elif isinstance(structure, NM):
                groups = units[: len(units) // 4 * 4].reshape(-1, 4, units.shape[1])
                assert np.all(groups.sum(axis=1) == 2)
            else:
                assert np.all(units.sum(axis=0) >= structure.min_per_filter)
                assert np.all(units.sum(axis=1) >= structure.min_per_input)
    assert changes


def test_across_layers_the_counts_move_and_their_sum_stays(library):
    regrowth = Regrowth(0.5, frequency=1, steps=20, across_layers=True)
    model = compiled(pruned(library, regrowth, min_weights=4, scope="global"), library)
    start = counts(model)
    found = []
    for _ in range(6):
        model.train_on_batch(X, Y)
        found.append(counts(model))
        assert sum(found[-1]) == sum(start)
        assert min(found[-1]) >= 4
    assert any(each != start for each in found)


def test_the_weights_of_a_program_are_chosen_when_it_is_given_them():
    """By `begin`, a graph; where the schedule rises, all are there at first."""
    for schedule in (schedules.OneShot(0.75), schedules.CosineSparsity(0.5, 0.75, 1, 12)):
        model = dense_model(keras)
        pruner = Pruner(model, schedule, regrowth=Regrowth(frequency=2, steps=40))
        begin = tf.function(pruner.begin, jit_compile=True, autograph=False)
        weights = [flavours.tensor_variable(target.variable) for target in pruner.targets]
        others = [np.random.default_rng(1).normal(size=weight.shape) for weight in weights]
        for weight, other in zip(weights, others, strict=True):
            weight.assign(other)
        begin()
        for other, kernel, mask in zip(others, kernels(model), masks(model), strict=True):
            is_rising = isinstance(schedule, schedules.CosineSparsity)
            count = other.size if is_rising else other.size // 4
            np.testing.assert_array_equal(
                mask, first(np.abs(other), count, np.ones(mask.shape, bool))
            )
            np.testing.assert_array_equal(kernel, np.where(mask, np.float32(other), 0))


def test_a_schedule_that_rises_prunes_on_the_way():
    schedule = schedules.CosineSparsity(0.0, 0.75, 1, 12, frequency=3)
    model = pruned(keras, None, 0.0)
    model = tscnc.prune(
        tscnc.strip(model), schedule, regrowth=Regrowth(0.5, frequency=2, until=1.0)
    )
    compiled(model, keras)
    assert counts(model) == [48, 24]  # dense, as the schedule has it
    steps, sparsities = np.arange(1, 13), []
    for _ in steps:
        model.train_on_batch(X, Y)
        sparsities.append(1 - sum(counts(model)) / 72)
    asked = [float(schedule((step - 1) // 3 * 3 + 1)[1]) for step in steps[:-1]] + [0.75]
    np.testing.assert_allclose(sparsities, asked, atol=0.5 / 24)
    assert counts(model) == [12, 6]


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "legacy"])
def test_what_is_new_starts_from_zero_in_the_slots(optimizer):
    library = tf_keras if optimizer == "legacy" else keras
    made = {
        "SGD": lambda: keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True),
        "Adam": lambda: keras.optimizers.Adam(0.1),
        "legacy": lambda: tf_keras.optimizers.legacy.SGD(0.1, momentum=0.9),
    }[optimizer]()
    model = compiled(pruned(library), library, made)
    fresh = 0
    for _ in range(6):
        before = masks(model)
        model.train_on_batch(X, Y)
        variables = [target.variable for target in model.pruner.targets]
        rows = zip(optimizers.companions(made, variables), before, masks(model), strict=True)
        for companions, old, new in rows:
            assert companions
            for companion in companions:
                values = np.asarray(companion)
                assert np.all(values[~new] == 0)
                assert np.all(values[new & ~old] == 0)
                assert np.any(values[new & old] != 0)
            fresh += int((new & ~old).sum())
    assert fresh


@pytest.mark.parametrize("criterion", ["gradient", "random"])
def test_a_saved_run_goes_on_bit_for_bit(library, criterion, tmp_path):
    regrowth = Regrowth(0.5, criterion, frequency=1, steps=40, seed=3)

    def train(model, steps):
        for step in steps:
            model.train_on_batch(X[step::4], Y[step::4])

    straight = compiled(pruned(library, regrowth), library)
    train(straight, [0, 1])
    straight.save(tmp_path / "half.keras")
    train(straight, [2, 3])
    loaded = library.models.load_model(tmp_path / "half.keras")
    assert loaded.pruner.regrowth == regrowth
    assert repr(regrowth) in repr(loaded.pruner)
    train(loaded, [2, 3])
    for one, other in zip(straight.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    for one, other in zip(masks(straight), masks(loaded), strict=True):
        np.testing.assert_array_equal(one, other)


@functools.cache
def masks_after_four_steps(library):
    """The masks of a model that Keras trains without XLA."""
    model = compiled(pruned(library), library)
    for _ in range(4):
        model.train_on_batch(X, Y)
    return masks(model)


def test_xla_moves_the_same_weights(library):
    fast = compiled(pruned(library), library, jit_compile=True)
    for _ in range(4):
        fast.train_on_batch(X, Y)
    for one, other in zip(masks_after_four_steps(library), masks(fast), strict=True):
        np.testing.assert_array_equal(one, other)


def test_mixed_precision_with_a_loss_scale(library):
    policy = library.mixed_precision.global_policy()
    library.mixed_precision.set_global_policy("mixed_float16")
    try:
        model = pruned(library)
        optimizer = library.optimizers.SGD(0.1, momentum=0.9)
        optimizer = library.mixed_precision.LossScaleOptimizer(optimizer)
        compiled(model, library, optimizer)
        start, counted = masks(model), counts(model)
        for _ in range(4):
            model.train_on_batch(X, Y)
        assert counts(model) == counted
        assert any(np.any(new != old) for new, old in zip(masks(model), start, strict=True))
        bad = np.full_like(X, np.nan)
        before = masks(model)
        model.train_on_batch(bad, Y)
        model.train_on_batch(bad, Y)
        for old, new in zip(before, masks(model), strict=True):
            np.testing.assert_array_equal(old, new)
    finally:
        library.mixed_precision.set_global_policy(policy)


def test_of_accumulated_batches_the_sum_counts():
    optimizer = keras.optimizers.SGD(0.5, momentum=0.9, gradient_accumulation_steps=2)
    parts = compiled(pruned(keras), keras, optimizer)
    for _ in range(4):
        parts.train_on_batch(X[:32], Y[:32])
        parts.train_on_batch(X[32:], Y[32:])
    assert parts.pruner.steps == 4
    for one, other in zip(masks_after_four_steps(keras), masks(parts), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("criterion", ["gradient", "random"])
def test_two_replicas_move_what_one_moves(criterion):
    strategy = tf.distribute.MirroredStrategy(
        [device.name for device in tf.config.list_logical_devices("CPU")],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )
    regrowth = Regrowth(0.5, criterion, frequency=2, steps=40)
    found = []
    for scope in (strategy.scope(), tf.distribute.get_strategy().scope()):
        with scope:
            model = compiled(pruned(tf_keras, regrowth), tf_keras)
            data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(64).repeat(4)
            model.fit(data, steps_per_epoch=4, verbose=0)
            found.append(masks(model))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_in_a_model_with_gates_and_in_a_part_of_another_one(library):
    gated = tscnc.gates.add_gates(dense_model(library), layers="hidden")
    model = compiled(pruned(library, model=gated), library)
    start = masks(model)
    for _ in range(2):
        model.train_on_batch(X, Y)
    assert any(np.any(new != old) for new, old in zip(masks(model), start, strict=True))

    body = pruned(library)
    head = library.Sequential([body, library.layers.Dense(3)])
    head(X)
    compiled(head, library)
    start = masks(body)
    head.fit(X, Y, batch_size=16, verbose=0, callbacks=callbacks.pruning_callbacks())
    assert body.pruner.steps == 4
    assert counts(body) == [12, 6]
    assert any(np.any(new != old) for new, old in zip(masks(body), start, strict=True))


def test_a_loop_of_your_own_gives_the_gradients(library):
    model = pruned(library)
    optimizer = library.optimizers.SGD(0.5, momentum=0.9)
    optimizer.build(model.trainable_variables)

    def step():
        with tf.GradientTape() as tape:
            value = loss(library)(Y, model(X, training=True))
        gradients = tape.gradient(value, model.trainable_variables)
        return list(zip(gradients, model.trainable_variables, strict=True))

    act = tf.function(lambda: model.pruner.apply_gradients(optimizer, step()), autograph=False)
    model.pruner.apply_gradients(optimizer, step())
    for _ in range(3):
        act()
    for one, other in zip(masks_after_four_steps(library), masks(model), strict=True):
        np.testing.assert_array_equal(one, other)
    optimizer.apply_gradients(step())
    with pytest.raises(RuntimeError, match="apply_gradients of its pruner"):
        model.pruner.step(optimizer)

    def bypassing():
        optimizer.apply_gradients(step())
        model.pruner.step(optimizer)

    with pytest.raises(tf.errors.InvalidArgumentError, match="apply_gradients of its pruner"):
        tf.function(bypassing, autograph=False)()


def test_frozen_masks_and_those_at_the_end_stay(library):
    model = compiled(pruned(library, Regrowth(0.5, frequency=1, steps=4, until=0.5)), library)
    model.train_on_batch(X, Y)
    kept = masks(model)  # T is 2, so the first move was the last
    for _ in range(3):
        model.train_on_batch(X, Y)
    tscnc.pruning.freeze_mask(model)
    model.train_on_batch(X, Y)
    for one, other in zip(kept, masks(model), strict=True):
        np.testing.assert_array_equal(one, other)
    optimizer = library.optimizers.SGD(0.5)
    optimizer.build(model.trainable_variables)
    ones = [(tf.ones_like(weight), weight) for weight in model.trainable_variables]
    optimizer.apply_gradients(ones)
    model.pruner.step(optimizer)  # which needs no gradients any more
    model = compiled(pruned(library), library)
    kept = masks(tscnc.pruning.freeze_mask(model))
    for _ in range(3):
        model.train_on_batch(X, Y)
    for one, other in zip(kept, masks(model), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_share_falls_with_the_cosine():
    regrowth = Regrowth(0.4, steps=1000, until=0.5)
    steps = tf.constant([0, 125, 250, 500, 900], tf.int64)
    shares = regrowth.share(schedules.OneShot(0.9), steps)
    wanted = 0.2 * (1 + np.cos(np.pi * np.minimum(steps.numpy() / 500, 1)))
    np.testing.assert_allclose(shares, wanted, atol=1e-7)
    by_schedule = Regrowth(until=0.5)
    assert by_schedule.last_step(schedules.CosineSparsity(0.0, 0.9, 10, 600)) == 300


RISING = schedules.CosineSparsity(0.0, 0.5, 100, 200)


@pytest.mark.parametrize(
    ("schedule", "arguments", "first"),
    [  # T is 38, 37 or 75
        (schedules.OneShot(0.5), {"frequency": 38, "steps": 50}, 0),
        (schedules.OneShot(0.5), {"frequency": 100, "steps": 50}, 0),
        (schedules.OneShot(0.5), {"frequency": 37, "steps": 50}, 37),
        (schedules.OneShot(0.5), {"frequency": 7, "steps": 50}, 7),
        (schedules.OneShot(0.5, begin_step=30), {"frequency": 7, "steps": 50}, 35),
        (schedules.OneShot(0.5, begin_step=36), {"frequency": 7, "steps": 50}, 0),
        (schedules.OneShot(0.5, begin_step=100), {"frequency": 1}, 0),
        (RISING, {"frequency": 10, "steps": 50}, 0),
        (RISING, {"frequency": 10}, 0),  # T is 150, and the sparsity 0 up to the end
        (schedules.CosineSparsity(0.0, 0.5, 100, 200, frequency=5), {"frequency": 10}, 110),
        (lambda step: (step == 20, 0.5 * tf.cast(step > 19, tf.float32)), {"steps": 50}, 0),
        (
            lambda step: (step == 20, 0.5 * tf.cast(step > 19, tf.float32)),
            {"frequency": 3, "steps": 50},
            21,
        ),
    ],
)
def test_what_never_moves_is_refused_and_the_first_move_is_known(schedule, arguments, first):
    regrowth = Regrowth(fraction=0.9, **arguments)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)])
    assert regrowth.first_move(schedule) == first
    if first == 0:
        with pytest.raises(ValueError, match=r"would never move a weight .* Take a smaller freq"):
            Pruner(model, schedule, regrowth=regrowth)
        assert not hasattr(model, "pruner")
        return
    pruner = Pruner(model, schedule, regrowth=dataclasses.replace(regrowth, criterion="random"))
    for step in range(1, first + 1):
        before = masks(model)
        pruner.step()
        moved = any(np.any(new & ~old) for new, old in zip(masks(model), before, strict=True))
        assert moved == (step == first)


def test_a_training_in_which_nothing_moves_is_warned_of(library):
    model = compiled(pruned(library, Regrowth(frequency=5, steps=40)), library)

    def fit(model, epochs):
        watch = callbacks.pruning_callbacks()
        model.fit(X, Y, batch_size=32, epochs=epochs, verbose=0, callbacks=watch)

    with pytest.warns(UserWarning, match=r"moves no weight .* steps 1 to 4: .* is at step 5"):
        fit(model, 2)
    fit(model, 1)
    fit(compiled(pruned(library, Regrowth(frequency=4, steps=40)), library), 2)
    frozen = tscnc.pruning.freeze_mask(pruned(library, Regrowth(frequency=5, steps=40)))
    fit(compiled(frozen, library), 1)


def test_a_saved_regrowth_that_never_moves_loads(tmp_path):
    model = pruned(keras, Regrowth(frequency=2, steps=40))
    never = Regrowth(frequency=100, steps=50)
    model.pruner.regrowth = never  # as older versions took it
    model.save(tmp_path / "never.keras")
    assert keras.models.load_model(tmp_path / "never.keras").pruner.regrowth == never


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fraction": 1.0}, ValueError, "fraction"),
        ({"criterion": "magnitude"}, ValueError, "'gradient', 'random'"),
        ({"until": 0.0}, ValueError, "until"),
        ({"frequency": 0}, ValueError, "frequency"),
        ({"steps": 1}, ValueError, "steps"),
        ({"across_layers": 1}, TypeError, "across_layers"),
        ({"seed": -1}, ValueError, "seed"),
        ({"extra_drop": 1.1}, ValueError, "extra_drop"),
        ({"extra_growth": -0.1}, ValueError, "extra_growth"),
        ({"window": 0}, ValueError, "window"),
        ({"sparsity_range": (0.9, 0.8)}, ValueError, "sparsity_range"),
        ({"sparsity_range": (0.5, 1.5)}, ValueError, r"must lie in \[0, 1\]"),
    ],
)
def test_arguments_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        Regrowth(**arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: Pruner(m, schedules.OneShot(0.5), regrowth=0.3), TypeError, "Regrowth"),
        (
            lambda m: Pruner(m, schedules.OneShot(0.5), regrowth=Regrowth()),
            ValueError,
            "steps must be given",
        ),
        (
            lambda m: Pruner(m, schedules.OneShot(0.5), regrowth=MOVING, structure=Block(4, 4)),
            ValueError,
            "several sizes of 'hidden'",
        ),
        (
            lambda m: Pruner(
                m,
                schedules.OneShot(0.5),
                structure=Filters(),
                regrowth=Regrowth(steps=9, across_layers=True),
            ),
            ValueError,
            "across_layers must be False with structure",
        ),
        (
            lambda m: Pruner(
                m, schedules.OneShot(0.5), regrowth=Regrowth(steps=9, across_layers=True)
            ),
            ValueError,
            "across_layers must be False with scope='layer'.*scope='global'",
        ),
        (lambda m: tscnc.prune_now(m, 0.5, regrowth=MOVING), TypeError, "prune_now freezes"),
        (
            lambda m: tscnc.prune(m, method="scores", sparsity=0.5, regrowth=MOVING),
            TypeError,
            "come back anyway",
        ),
        (
            lambda m: tscnc.prune(
                dense_model(tf_keras), schedules.OneShot(0.5), engine="tfmot", regrowth=MOVING
            ),
            TypeError,
            "engine='masks'",
        ),
    ],
)
def test_what_does_not_work_is_refused_by_name(call, error, message):
    model = dense_model(keras)
    with pytest.raises(error, match=message):
        call(model)
    assert not hasattr(model, "pruner")


EPOCHS = {  # of the accuracy gap and the validation loss: whether it overfits, and stagnates
    "neither": ([5, 4, 4, 3, 3], [9, 8, 7, 6, 5], False, False),
    "overfits in half of the epochs": ([1, 2, 2, 3, 3], [9, 8, 7, 6, 5], True, False),
    "stagnates in half of the epochs": ([5, 4, 4, 3, 3], [9, 9, 8, 8, 7], False, True),
    "both": ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], True, True),
    "overfits in one epoch": ([1, 2, 2, 2, 2], [9, 9, 8, 7, 6], False, False),
    "not known yet": ([np.nan, 1, 2, 3, 4], [np.nan, 1, 2, 3, 4], False, False),
}
FOLLOWING = dataclasses.replace(MOVING, extra_drop=0.4, extra_growth=0.25)


def record(model, gaps, validation_losses):
    for gap, loss in zip(gaps, validation_losses, strict=True):
        logs = {"accuracy": gap + 0.5, "val_accuracy": 0.5, "val_loss": loss}
        model.pruner.on_epoch_end(logs)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_number_of_weights_follows_the_validation(library, watching, scope, tmp_path):
    across = scope == "global"
    regrowth = dataclasses.replace(FOLLOWING, across_layers=across)
    model = compiled(pruned(library, regrowth, 0.5, scope=scope), library)
    model.optimizer.build(model.trainable_variables)
    everything = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    start, begun = everything.save(str(tmp_path / "start")), (model.get_weights(), masks(model))
    for epochs in EPOCHS.values():  # from the same start, by a step that is compiled once
        everything.restore(start)
        assert model.pruner.steps == int(model.optimizer.iterations) == 0
        for values, found in zip(begun, (model.get_weights(), masks(model)), strict=True):
            for one, other in zip(values, found, strict=True):
                np.testing.assert_array_equal(one, other)
        assert_follows_epochs(model, epochs, across)


def assert_follows_epochs(model, epochs, across):
    gaps, validation_losses, overfits, stagnates = epochs
    record(model, gaps, validation_losses)
    model.train_on_batch(X, Y)
    before, given = masks(model), gradients(model)
    model.train_on_batch(X, Y)  # the step in which weights change places
    change = {"drop": 0.4 * overfits, "growth": 0.25 * stagnates}
    rows = [before, LAST, given]
    if across:
        rows = [[np.concatenate([each.ravel() for each in row])] for row in rows]
    wanted = [moved(*row, 2, **change) for row in zip(*rows, strict=True)]
    after = masks(model)
    if across:
        after = [np.concatenate([each.ravel() for each in after])]
    for new, expected in zip(after, wanted, strict=True):
        np.testing.assert_array_equal(new, expected)
    more = sum(counts(model)) - sum(mask.sum() for mask in before)
    assert np.sign(more) == np.sign(change["growth"] - change["drop"])
    held = counts(model)
    for _ in range(2):  # the next exchange, of the same epochs
        model.train_on_batch(X, Y)
    assert sum(counts(model)) == sum(held)


def test_the_sparsity_stays_in_its_range(library):
    regrowth = dataclasses.replace(FOLLOWING, fraction=0.9, frequency=1, sparsity_range=(0.4, 0.6))
    for gaps, losses_, limit in (([1, 2, 3, 4, 5], [5, 4, 3, 2, 1], 0.6), ([1] * 5, [1] * 5, 0.4)):
        model = compiled(pruned(library, regrowth, 0.5), library)
        for _ in range(12):
            record(model, gaps, losses_)
            model.train_on_batch(X, Y)
        assert 1 - sum(counts(model)) / 72 == pytest.approx(limit, abs=1.5 / 72)


def test_no_tensor_gets_fewer_than_the_minimum(library):
    regrowth = dataclasses.replace(FOLLOWING, fraction=0.9, extra_drop=1.0, frequency=1)
    model = compiled(pruned(library, regrowth, 0.5, min_weights=5), library)
    for _ in range(12):
        record(model, [1, 2, 3, 4, 5], [5, 4, 3, 2, 1])
        model.train_on_batch(X, Y)
    assert counts(model) == [5, 5]


def test_fit_records_its_epochs_and_a_saved_run_goes_on(library, tmp_path):
    regrowth = dataclasses.replace(FOLLOWING, window=2, frequency=1)
    how = {"verbose": 0, "shuffle": False, "validation_data": (X[::2], Y[::2])}

    class Save(library.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                self.model.save(tmp_path / "half.keras")

    def fit(model, start, *more):
        used = [*callbacks.pruning_callbacks(), *more]
        return model.fit(X, Y, epochs=5, initial_epoch=start, callbacks=used, **how).history

    straight = compiled(pruned(library, regrowth, 0.5), library, metrics=["accuracy"])
    logs = fit(straight, 0, Save())
    gaps = np.subtract(logs["accuracy"], logs["val_accuracy"])
    wanted = np.stack([gaps, logs["val_loss"]], axis=1)[-3:]
    np.testing.assert_allclose(np.asarray(straight.pruner.state.history), wanted, rtol=1e-5)
    loaded = library.models.load_model(tmp_path / "half.keras")
    assert loaded.pruner.regrowth == regrowth
    fit(loaded, 2)
    assert counts(straight) != [24, 12]
    for one, other in zip(straight.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    for one, other in zip(masks(straight), masks(loaded), strict=True):
        np.testing.assert_array_equal(one, other)


def test_under_adversarial_training_the_accuracy_under_attack_counts(library):
    model = pruned(library, dataclasses.replace(FOLLOWING, window=1), 0.5)
    attack = attacks.FGSM(epsilon=0.1)
    trainer = tscnc.AdversarialTraining(model, attack=attack, loss=losses.Madry())
    trainer.compile(library.optimizers.SGD(0.1))
    logs = trainer.fit(
        *(X, Y),
        epochs=2,
        verbose=0,
        validation_data=(X[::2], Y[::2]),
        callbacks=callbacks.pruning_callbacks(),
    ).history
    gaps = np.subtract(logs["adversarial_accuracy"], logs["val_adversarial_accuracy"])
    wanted = np.stack([gaps, logs["val_loss"]], axis=1)
    np.testing.assert_allclose(np.asarray(model.pruner.state.history), wanted, rtol=1e-6)


def test_following_no_validation_is_said(library):
    model = compiled(pruned(library, FOLLOWING), library, metrics=["accuracy"])
    update = {"callbacks": callbacks.pruning_callbacks()}
    validated = {"validation_data": (X, Y), "verbose": 0}
    for options in ({}, update):
        with pytest.warns(UserWarning, match="has recorded none: pass validation_data and callb"):
            model.fit(X, Y, verbose=0, **options)
    model.fit(X, Y, epochs=2, validation_freq=2, **validated, **update)
    with pytest.raises(ValueError, match=r"have none of .*metrics=\['accuracy'\].*\['loss"):
        compiled(pruned(library, FOLLOWING), library).fit(X, Y, **validated, **update)
    kept = counts(model)
    tscnc.pruning.freeze_mask(model)
    for options in ({}, update):
        model.fit(X, Y, verbose=0, **options)
    assert counts(model) == kept


def test_a_part_of_another_model_says_so_too():
    part = pruned(keras, FOLLOWING)
    whole = compiled(keras.Sequential([keras.Input((6,)), part]), keras)
    with pytest.warns(UserWarning, match="has recorded none"):
        whole.fit(X, Y, verbose=0, callbacks=callbacks.pruning_callbacks())


def test_a_window_that_ends_too_late_is_said():
    model = compiled(pruned(keras, dataclasses.replace(FOLLOWING, window=9)), keras)
    compiled(model, keras, metrics=["accuracy"])
    with pytest.warns(UserWarning, match="will not follow the validation: it needs 10 more"):
        model.fit(
            *(X, Y),
            epochs=2,
            validation_data=(X, Y),
            verbose=0,
            callbacks=callbacks.pruning_callbacks(),
        )


def test_the_sparsity_that_was_reached_is_final(library):
    model = compiled(pruned(library, FOLLOWING, 0.5), library)
    record(model, *EPOCHS["overfits in half of the epochs"][:2])
    for _ in range(2):
        model.train_on_batch(X, Y)
    kept = counts(model)
    assert kept != [24, 12]
    model.pruner.finalize()
    assert counts(model) == kept


def test_weights_of_another_regrowth_are_refused(library, tmp_path):
    pruned(library).save_weights(tmp_path / "plain.weights.h5")
    model = pruned(library, FOLLOWING)
    with pytest.raises(ValueError, match="variables of a pruner, and this model's has"):
        model.load_weights(tmp_path / "plain.weights.h5")


def test_following_the_validation_is_for_single_weights():
    for structure in (Filters(), NM(2, 4)):
        with pytest.raises(ValueError, match="extra_growth must be 0 with structure"):
            pruned(keras, FOLLOWING, 0.5, structure=structure, layers="hidden")
    with pytest.raises(ValueError, match=r"must be 0 with .*take schedules.OneShot"):
        Pruner(dense_model(keras), schedules.CosineSparsity(0.0, 0.5, 1, 20), regrowth=FOLLOWING)
    with pytest.raises(ValueError, match=r"sparsity_range must contain .* 0\.5, got"):
        pruned(keras, dataclasses.replace(FOLLOWING, sparsity_range=(0.7, 0.9)), 0.5)


@pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)
def test_an_optimizer_that_divides_by_what_it_has_accumulated_is_refused(library):
    model = dense_model(library)
    tscnc.prune(model, schedules.OneShot(0.5), engine="masks", regrowth=MOVING)
    compiled(model, library, library.optimizers.Ftrl(0.1))
    with pytest.raises(ValueError, match="optimizer must not be Ftrl"):
        model.fit(np.ones((4, 6), "float32"), np.zeros(4), verbose=0)
    tscnc.pruning.freeze_mask(model)
    compiled(model, library, library.optimizers.Ftrl(0.1))
    model.fit(np.ones((4, 6), "float32"), np.zeros(4), verbose=0)
    assert np.isfinite(model.get_weights()[0]).all()
