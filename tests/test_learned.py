"""Shares of layers that are learned with the scores, and scores that are perturbed."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import FLAVOURS, blobs, conv_model, dense_model, images
from hypothesis import given, settings
from hypothesis import strategies as st

import tscnc_tf as tscnc
from tscnc_tf import attacks, losses, pruning
from tscnc_tf.pruning import Learned, Unstructured
from tscnc_tf.pruning.scopes import in_proportion, share_out
from tscnc_tf.training import AdversarialTraining

X, Y = blobs(64)
SIZES = np.array([48, 24])  # of the kernels of `dense_model`


@pytest.fixture(params=FLAVOURS)
def library(request):
    return FLAVOURS[request.param]


def learned(library, model=None, sparsity=0.75, scope="learned", **options):
    model = dense_model(library) if model is None else model
    return tscnc.prune(model, method="scores", sparsity=sparsity, scope=scope, **options)


def compiled(model, library, optimizer=None, **options):
    loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = library.optimizers.SGD(0.5) if optimizer is None else optimizer
    model.compile(optimizer, loss, **{"jit_compile": False} | options)
    return model


def state(model, name):
    found = getattr(model.pruner.state, name)
    return [v.numpy() for v in found] if isinstance(found, list) else np.asarray(found)


def counts(model):
    return [int(np.sum(mask)) for mask in state(model, "masks")]


def kernels(model):
    return [np.asarray(target.variable) for target in model.pruner.targets]


def gradients(model, x=X, y=Y):
    variables = [target.variable for target in model.pruner.targets]
    with tf.GradientTape() as tape:
        values = tf.nn.sparse_softmax_cross_entropy_with_logits(y, model(x, training=True))
        value = tf.reduce_mean(values)
    return [np.asarray(gradient, "float64") for gradient in tape.gradient(value, variables)]


def top(score, count):
    mask = np.zeros(score.size, bool)
    mask[np.argsort(-np.abs(score).ravel(), kind="stable")[:count]] = True
    return mask.reshape(score.shape)


def shared_out(wanted, lowest, highest, total):
    """One by one, each to whom the smallest factor brings to the next half (Sainte-Laguë)."""
    found = np.array(lowest)
    while found.sum() < total:
        found[np.argmin(np.where(found < highest, (found + 0.5) / wanted, np.inf))] += 1
    return found


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_what_is_shared_out_is_in_proportion_within_bounds_and_exact(data):
    count = data.draw(st.integers(1, 6))
    highest = np.array(data.draw(st.lists(st.integers(1, 10**5), min_size=count, max_size=count)))
    lowest = np.minimum(
        highest, data.draw(st.lists(st.integers(0, 30), min_size=count, max_size=count))
    )
    shares = data.draw(st.lists(st.floats(1e-4, 1.0), min_size=count, max_size=count))
    total = data.draw(st.integers(0, int(highest.sum()) + 3))
    wanted = shares * highest
    found, before = (
        share_out(in_proportion(wanted), lowest, highest, each).numpy()
        for each in (total, total - 1)
    )
    assert found.sum() == np.clip(total, lowest.sum(), highest.sum())
    assert np.all(found >= lowest) and np.all(found <= highest)
    assert np.all(found >= before), "none falls as the total rises"
    # One factor rounds to all of them but those at a bound.
    least = np.max(((found - 0.5) / wanted)[found > lowest], initial=0.0)
    most = np.min(((found + 0.5) / wanted)[found < highest], initial=np.inf)
    assert least <= most * (1 + 1e-8)


def test_of_equals_the_first_are_given_what_is_left():
    found = share_out(in_proportion(np.full(6, 7.0)), [1] * 6, [100] * 6, 15)
    assert found.numpy().tolist() == [3, 3, 3, 2, 2, 2]


@pytest.mark.parametrize("growth", [0.0, 0.5])
def test_shares_move_as_in_a_calculation_by_hand(growth, library):
    """SGD with momentum 0.9 on the sums of the gradients of the masks' entries."""
    options = Learned(start="erk", minimum=0.2, growth=growth, learning_rate=20.0)
    model = compiled(learned(library, scope=options), library)
    density, least = 0.25, 0.05
    logits = state(model, "share_logits").astype("float64")
    velocity = np.zeros(2)
    np.testing.assert_allclose(
        list(model.pruner.shares.values()), np.divide([10, 8], SIZES), rtol=1e-5
    )
    scores = [score.astype("float64") for score in state(model, "scores")]
    for step in (1, 2, 3):
        slopes, dense = gradients(model), state(model, "dense")
        inner = 1 / (1 + np.exp(-logits))
        shares = least + (1 - least) * inner
        sums = np.array([np.sum(g * w) for g, w in zip(slopes, dense, strict=True)])
        if (SIZES * shares).sum() / (density * SIZES.sum()) > 1:
            sums += growth * step * SIZES / (density * SIZES.sum())
        velocity = 0.9 * velocity - 20.0 * sums * (1 - least) * inner * (1 - inner)
        logits = logits + velocity
        scores = [
            s - 0.5 * g * w * np.sign(s) for s, g, w in zip(scores, slopes, dense, strict=True)
        ]
        model.train_on_batch(X, Y)
        np.testing.assert_allclose(state(model, "share_logits"), logits, rtol=1e-4, atol=1e-5)
        shares = least + (1 - least) / (1 + np.exp(-logits))
        expected = shared_out(SIZES * shares, [1, 1], SIZES, 18)
        assert counts(model) == expected.tolist()
        for kernel, weight, score, count in zip(
            kernels(model), dense, scores, counts(model), strict=True
        ):
            np.testing.assert_array_equal(kernel, np.where(top(score, count), weight, 0))
    assert counts(model) != [10, 8] or growth, "the counts have moved"
    np.testing.assert_allclose(list(model.pruner.shares.values()), shares, rtol=1e-4)


def test_the_penalty_keeps_the_shares_within_the_budget(library):
    def excess(growth):
        tf_keras.utils.set_random_seed(1)
        model = learned(library, scope=Learned(growth=growth, learning_rate=0.02))
        model.pruner.state.share_logits.assign([0.0, 0.0])  # a half of all
        compiled(model, library).fit(X, Y, epochs=10, verbose=0)
        assert sum(counts(model)) == 18
        shares = np.array(list(model.pruner.shares.values()))
        return (shares * SIZES).sum() / 18 - 1

    assert excess(0.0) > 0.5
    assert excess(1.0) < 0.1


@pytest.mark.filterwarnings("ignore:At a sparsity")
@pytest.mark.parametrize(
    "start", ["layer", "global", "erk", "igq", "lamp", {"hidden": 0.5, "logits": 0.6}], ids=str
)
def test_shares_begin_where_the_given_scope_has_them(start, library):
    model = learned(library, sparsity=0.6, scope=Learned(start=start))
    twin = dense_model(library)
    twin.set_weights(model.get_weights())
    for target, dense in zip(model.pruner.targets, state(model, "dense"), strict=True):
        twin.get_layer(target.name).kernel.assign(dense)
    pruning.prune_now(twin, 0.6, scope=start)
    if isinstance(start, str) and start not in ("global", "lamp"):
        assert counts(model) == counts(twin)
    elif start == "global":  # by scores, not weights, and of all as many
        assert sum(counts(model)) == sum(counts(twin))
    else:
        assert sum(counts(model)) == 29  # as many as 60 % of zeros leave


def test_counts_are_exact_in_every_step_with_floors_too(library):
    tf_keras.utils.set_random_seed(0)
    structure = Unstructured(min_per_filter=2, min_per_input=1)
    scope = Learned()
    model = learned(library, conv_model(library), 0.6, scope, structure=structure)
    compiled(model, library)
    x, y = images(32)
    seen = set()
    for logit in (-2.0, -1.0, 0.0, 1.0, 2.0, 20.0):
        model.pruner.state.share_logits.assign([logit, -logit])
        model.train_on_batch(x, y)
        seen.add(tuple(counts(model)))
        assert sum(counts(model)) == round(0.4 * (54 + 18))
        for kernel in kernels(model):
            assert np.all(np.sum(kernel != 0, axis=tuple(range(kernel.ndim - 1))) >= 2)
            assert np.all(np.any(kernel != 0, axis=(*range(kernel.ndim - 2), -1)))
    assert len(seen) > 1


def fitted(library, **options):
    tf_keras.utils.set_random_seed(1)
    keras.utils.set_random_seed(1)
    model = learned(library, scope=Learned(learning_rate=5.0))
    compiled(model, library, **options)
    model.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
    return model


in_graphs = functools.cache(fitted)


@pytest.mark.parametrize(
    "options",
    [{"jit_compile": True}, {"run_eagerly": True}, {"steps_per_execution": 2}],
    ids=str,
)
def test_every_way_to_run_gives_the_same_shares(options, library):
    model, twin = fitted(library, **options), in_graphs(library)
    assert np.any(np.abs(state(model, "share_velocities")) > 1e-3)
    for name in ("share_logits", "share_velocities"):
        np.testing.assert_allclose(state(model, name), state(twin, name), rtol=1e-4, atol=1e-6)
    assert counts(model) == counts(twin)


def test_mixed_precision_scales_no_share_and_skips_what_overflows(library):
    library.mixed_precision.set_global_policy("mixed_float16")
    try:
        model = dense_model(library)
    finally:
        library.mixed_precision.set_global_policy("float32")
    learned(library, model, scope=Learned(growth=0.0, learning_rate=2.0))
    compiled(model, library)
    was = state(model, "share_logits")
    slopes, dense = gradients(model), state(model, "dense")
    sums = np.array([np.sum(g * w) for g, w in zip(slopes, dense, strict=True)])
    inner = 1 / (1 + np.exp(-was.astype("float64")))
    model.fit(X, Y, batch_size=64, verbose=0)
    moved = -2.0 * sums * 0.975 * inner * (1 - inner)
    np.testing.assert_allclose(state(model, "share_logits") - was, moved, rtol=0.02, atol=1e-4)
    was = state(model, "share_logits")
    model.fit(np.full_like(X, np.inf), Y, batch_size=64, verbose=0)
    np.testing.assert_array_equal(state(model, "share_logits"), was)
    assert sum(counts(model)) == 18


@pytest.mark.parametrize("perturb", [0.0, 0.1])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_two_replicas_take_the_steps_of_one_device(flavour, perturb):
    library = FLAVOURS[flavour]

    def after(scope):
        tf_keras.utils.set_random_seed(3)
        with scope:
            model = dense_model(library)
            learned(library, model, scope=Learned(learning_rate=5.0), perturb_scores=perturb)
            attack = attacks.PGD(epsilon=0.1, steps=1, objective="cross_entropy", start="none")
            trainer = AdversarialTraining(model, attack=attack, loss=losses.Madry())
            trainer.compile(library.optimizers.SGD(0.5, momentum=0.9))
        trainer.fit(*blobs(32), batch_size=32, epochs=3, verbose=0, shuffle=False)
        return model

    devices = [device.name for device in tf.config.list_logical_devices("CPU")]
    strategy = tf.distribute.MirroredStrategy(
        devices, cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    one, two = after(tf.distribute.get_strategy().scope()), after(strategy.scope())
    assert strategy.num_replicas_in_sync == 2
    for name in ("scores", "share_logits"):
        for mine, theirs in zip(state(one, name), state(two, name), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert counts(one) == counts(two)


# Files, and what comes after


def stage(library):
    model = learned(
        library, conv_model(library), scope=Learned(start={"conv": 0.6}, learning_rate=3.0)
    )
    compiled(model, library, library.optimizers.Adam(0.02))
    model.fit(*images(64), batch_size=16, verbose=0, shuffle=False)
    return model


@pytest.mark.parametrize("kind", ["keras", "weights", "checkpoint"])
def test_a_stage_goes_on_bit_for_bit(kind, library, tmp_path):
    model, path = stage(library), str(tmp_path / f"model.{kind}")
    if kind == "keras":
        model.save(path)
        other = library.models.load_model(path)
        assert repr(other.pruner) == repr(model.pruner)
    else:
        other = learned(library, conv_model(library), scope=model.pruner._selection.scope)
        compiled(other, library, library.optimizers.Adam(0.02))
        other.optimizer.build(other.trainable_variables)
    if kind == "weights":
        model.save_weights(path + ".weights.h5")
        other.load_weights(path + ".weights.h5")
    elif kind == "checkpoint":
        path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(path)
        tf.train.Checkpoint(model=other, optimizer=other.optimizer).restore(path)

    def compare():
        for name in ("share_logits", "share_velocities", "scores", "dense", "masks"):
            for mine, theirs in zip(state(model, name), state(other, name), strict=True):
                np.testing.assert_array_equal(mine, theirs)

    compare()
    assert np.any(state(model, "share_velocities") != 0)
    if kind == "weights":  # which hold no momentum of scores
        return
    for each in (model, other):
        each.fit(*images(64), batch_size=16, verbose=0, shuffle=False)
    compare()


def test_freezing_keeps_what_was_learned_and_reports_it(library, tmp_path):
    model = stage(library)
    kept, total = counts(model), sum(counts(model))
    assert total == round(0.25 * (54 + 18))
    rows = pruning.report(model).rows
    assert [row.weights - row.zeros for row in rows] == kept
    pruning.freeze_mask(model).save(tmp_path / "model.keras")
    other = library.models.load_model(tmp_path / "model.keras")
    assert counts(other) == kept
    assert repr(other.pruner) == repr(model.pruner)
    assert type(other.pruner) is pruning.Pruner
    compiled(other, library).fit(*images(32), verbose=0)
    assert [int(np.sum(kernel != 0)) for kernel in kernels(other)] == kept


def test_weights_from_outside_bring_their_shares(library):
    model = learned(library)
    assert counts(model) == [12, 6]
    given = [np.ones_like(kernel) for kernel in kernels(model)]
    given[0].ravel()[9:] = 0
    given[1].ravel()[9:] = 0
    model.set_weights([given[0], np.zeros(8), given[1], np.zeros(3)])
    assert counts(model) == [9, 9]
    model.set_weights([np.ones((6, 8)), np.zeros(8), np.ones((8, 3)), np.zeros(3)])
    assert counts(model) == [12, 6]


def test_what_is_frozen_keeps_its_mask(library):
    model = learned(library, scope=Learned(learning_rate=50.0))
    model.get_layer("logits").trainable = False
    was, mask = state(model, "share_logits"), state(model, "masks")[1]
    compiled(model, library).fit(X, Y, epochs=4, verbose=0)
    assert state(model, "share_logits")[1] == was[1]
    np.testing.assert_array_equal(state(model, "masks")[1], mask)
    assert counts(model) == [12, 6]


def test_no_step_is_traced_anew_as_counts_change(library):
    traced = []

    class Counting(library.layers.Layer):
        def call(self, x):
            traced.append(1)
            return x

    layers = library.layers
    inputs = library.Input((6,))
    x = Counting()(layers.Dense(8, name="hidden")(inputs))
    model = library.Model(inputs, layers.Dense(3, name="logits")(x))
    compiled(learned(library, model, scope=Learned()), library)
    model.train_on_batch(X, Y)
    before, seen = len(traced), {tuple(counts(model))}
    for logit in (-2.0, 0.0, 2.0):
        model.pruner.state.share_logits.assign([logit, -logit])
        model.train_on_batch(X, Y)
        seen.add(tuple(counts(model)))
    assert len(seen) > 1
    assert len(traced) == before


# Perturbed scores


def perturbed(scores, slopes, dense, radius):
    """One step uphill, of the given radius relative to the scores of each weight tensor."""
    found = []
    for score, slope, weight in zip(scores, slopes, dense, strict=True):
        direction = slope * weight * np.sign(score)
        step = radius * np.linalg.norm(score) / np.linalg.norm(direction)
        found.append(score + step * direction)
    return found


def with_kernels(model, values):
    for target, value in zip(model.pruner.targets, values, strict=True):
        model.get_layer(target.name).kernel.assign(value)


@pytest.mark.parametrize("scope", ["layer", "learned"])
def test_the_gradient_is_that_at_perturbed_scores(scope, library):
    model = learned(library, scope=scope, perturb_scores=0.3)
    optimizer, variables = library.optimizers.SGD(0.5), model.trainable_variables

    def loss():
        values = tf.nn.sparse_softmax_cross_entropy_with_logits(Y, model(X, training=True))
        return tf.reduce_mean(values)

    def step():
        with model.pruner.perturbed(loss):
            with tf.GradientTape() as tape:
                value = loss()
            found = tape.gradient(value, variables)
            model.pruner.apply_gradients(optimizer, zip(found, variables, strict=True))

    for run in (step, tf.function(step)):
        scores, dense, acting = state(model, "scores"), state(model, "dense"), kernels(model)
        uphill = perturbed(scores, gradients(model), dense, 0.3)
        masks = [top(s, count) for s, count in zip(uphill, counts(model), strict=True)]
        values = [np.where(mask, w, 0) for mask, w in zip(masks, dense, strict=True)]
        assert any(np.any(v != k) for v, k in zip(values, acting, strict=True))
        with_kernels(model, values)
        slopes = gradients(model)
        with_kernels(model, acting)
        run()
        for now, score, slope, weight in zip(
            state(model, "scores"), scores, slopes, dense, strict=True
        ):
            expected = score - 0.5 * slope * weight * np.sign(score)
            np.testing.assert_allclose(now, expected, rtol=1e-4, atol=1e-6)
        for kernel, weight, score, count in zip(
            kernels(model), dense, state(model, "scores"), counts(model), strict=True
        ):
            np.testing.assert_array_equal(kernel, np.where(top(score, count), weight, 0))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_adversarial_training_perturbs_scores_and_moves_statistics_once(jit_compile, library):
    x, y = images(32)
    attack = attacks.PGD(epsilon=0.1, steps=1, objective="cross_entropy", start="none")

    def made(radius):
        tf_keras.utils.set_random_seed(2)
        keras.utils.set_random_seed(2)
        model = conv_model(library)
        tscnc.prune(model, method="scores", sparsity=0.5, perturb_scores=radius)
        trainer = AdversarialTraining(model, attack=attack, loss=losses.Madry())
        trainer.compile(library.optimizers.SGD(0.5), jit_compile=jit_compile)
        return model, trainer

    model, trainer = made(0.5)
    plain, other = made(0.0)
    scores, dense, acting = state(model, "scores"), state(model, "dense"), kernels(model)
    adversarial = attack(model, x, y)
    statistics = [np.asarray(v) for v in model.non_trainable_variables]
    uphill = perturbed(scores, gradients(model, adversarial, y), dense, 0.5)
    masks = [top(s, count) for s, count in zip(uphill, counts(model), strict=True)]
    with_kernels(model, [np.where(m, w, 0) for m, w in zip(masks, dense, strict=True)])
    slopes = gradients(model, adversarial, y)
    with_kernels(model, acting)
    for variable, value in zip(model.non_trainable_variables, statistics, strict=True):
        variable.assign(value)
    logs = trainer.fit(x, y, batch_size=32, verbose=0, shuffle=False).history
    for now, score, slope, weight in zip(
        state(model, "scores"), scores, slopes, dense, strict=True
    ):
        expected = score - 0.5 * slope * weight * np.sign(score)
        np.testing.assert_allclose(now, expected, rtol=1e-3, atol=1e-5)
    # One pass moved them, by 1 % of the way to the statistics of a batch.
    norm = model.get_layer("norm")
    assert 0 < np.max(1 - np.asarray(norm.moving_variance)) <= 0.01 + 1e-6
    logged = other.fit(x, y, batch_size=32, verbose=0, shuffle=False).history
    assert logs["loss"] == pytest.approx(logged["loss"], rel=1e-5), "the logs are of what acts"
    assert any(
        np.any(a != b) for a, b in zip(state(model, "scores"), state(plain, "scores"), strict=True)
    )


def test_perturbation_is_saved_and_keras_own_fit_refuses_it(library, tmp_path):
    model = learned(library, perturb_scores=0.25)
    model.save(tmp_path / "model.keras")
    other = library.models.load_model(tmp_path / "model.keras")
    assert other.pruner.perturb_scores == 0.25
    with pytest.raises(ValueError, match=r"perturb_scores=0\.25 needs a second gradient"):
        compiled(other, library).fit(X, Y, verbose=0)
    for kernel, expected in zip(kernels(other), kernels(model), strict=True):
        np.testing.assert_array_equal(kernel, expected)


# Bad input


def test_bad_input_is_named(library):
    def accumulating():
        optimizer = keras.optimizers.SGD(0.5, gradient_accumulation_steps=2)
        compiled(learned(keras), keras, optimizer).fit(X, Y, verbose=0)

    once = tscnc.schedules.OneShot(0.5)
    cases = [
        (
            lambda: tscnc.prune(dense_model(library), once, engine="masks", scope="learned"),
            "scope='learned' is for method='scores'",
        ),
        (lambda: tscnc.prune_now(dense_model(library), 0.5, scope=Learned()), "scope=Learned"),
        (lambda: learned(library, structure=pruning.NM(2, 4)), "scope must be 'layer'"),
        (lambda: learned(library, scope="learnt"), "or 'learned' with method='scores'"),
        (lambda: learned(library, perturb_scores=-1.0), "perturb_scores must be >= 0"),
        (accumulating, "gradient_accumulation_steps must be None with scope=Learned"),
        (lambda: Learned(start="learned"), "start must be one of 'layer', 'global'"),
        (lambda: Learned(minimum=1.0), "minimum must be < 1"),
        (lambda: Learned(growth=-0.1), "growth must be >= 0"),
        (lambda: Learned(learning_rate=0.0), "learning_rate must be > 0"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
