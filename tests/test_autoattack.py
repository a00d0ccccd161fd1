"""APGD, FAB, Square and AutoAttack against closed forms, scipy and plain NumPy."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import tensorflow as tf
from helpers import FLAVOURS, blobs, dense_model
from scipy import optimize

import tscnc_tf as tscnc
from tscnc_tf import losses
from tscnc_tf.attacks import APGD, FAB, AutoAttack, Square, fab, search, square
from tscnc_tf.attacks.apgd import intervals
from tscnc_tf.attacks.base import seed_pair
from tscnc_tf.functional import balls

NORMS = ("linf", "l2", "l1")
ORDERS = {"linf": np.inf, "l2": 2, "l1": 1}
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}
EPSILON = {"linf": 0.06, "l2": 0.25, "l1": 0.8}
every_norm = pytest.mark.parametrize("norm", NORMS)

KERNEL = np.random.default_rng(4).standard_normal((6, 3))


def bent(x):
    """Return three logits of six entries, smooth and not linear."""
    hidden = tf.tanh(2.0 * tf.reshape(x, (tf.shape(x)[0], 6)) @ tf.cast(KERNEL, x.dtype))
    return hidden @ tf.cast([[2.0, -1, 0.5], [0.3, 1.5, -1], [-1, 0.2, 1.8]], x.dtype)


def planes(kernel, bias=0.0):
    """Return a linear model."""
    return lambda x: (
        tf.reshape(x, (tf.shape(x)[0], -1)) @ tf.cast(kernel, x.dtype) + tf.cast(bias, x.dtype)
    )


def examples(count, seed=0, dtype="float32"):
    """Return inputs of `bent`, with the labels that it gives them."""
    x = np.random.default_rng(seed).uniform(size=(count, 6)).astype(dtype)
    return tf.constant(x), tf.argmax(bent(x), axis=1)


def each_attack(norm, **more):
    """Return one attack of each kind, small."""
    ball = {"epsilon": EPSILON[norm], "norm": norm} | more
    return [
        APGD(steps=8, restarts=2, **ball),
        APGD(steps=8, loss="targeted_dlr", **ball),
        FAB(steps=5, **ball),
        FAB(steps=5, target_classes=None, restarts=2, **ball),
        Square(queries=30, **ball),
    ]


@functools.cache
def on_bent(attack):
    """Return an attack bound to `bent`; equal attacks share what is compiled."""
    return attack.bind(bent)


def is_fooled(model, x, y):
    return np.argmax(model(x), axis=1) != np.asarray(y)


# --- Projections ------------------------------------------------------------------------------


def shortest_step(x, w, b, norm, bounds):
    """Return the length of the shortest step onto a plane within bounds, by scipy; or None."""
    low, high = bounds
    size = len(x)
    if norm == "l2":
        found = optimize.minimize(
            lambda d: d @ d,
            np.zeros(size),
            jac=lambda d: 2 * d,
            bounds=[(low - each, high - each) for each in x],
            constraints={"type": "eq", "fun": lambda d: w @ (x + d) - b, "jac": lambda d: w},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        is_there = found.success and abs(w @ (x + found.x) - b) < 1e-6
        return np.sqrt(found.fun) if is_there else None
    # d = up - down; in linf one more variable is at least as large as they all.
    sides = [(0, high - each) for each in x] + [(0, each - low) for each in x]
    plane = np.concatenate([w, -w])[np.newaxis]
    if norm == "l1":
        found = optimize.linprog(np.ones(2 * size), A_eq=plane, b_eq=[b - w @ x], bounds=sides)
    else:
        found = optimize.linprog(
            np.eye(2 * size + 1)[-1],
            A_ub=np.hstack([np.eye(2 * size), -np.ones((2 * size, 1))]),
            b_ub=np.zeros(2 * size),
            A_eq=np.hstack([plane, [[0.0]]]),
            b_eq=[b - w @ x],
            bounds=[*sides, (0, None)],
        )
    return found.fun if found.success else None


@every_norm
def test_steps_onto_a_hyperplane_are_the_shortest(norm, rng):
    low, high = bounds = (-1.0, 2.0)
    x = rng.uniform(low, high, (40, 7))
    x[10:20] = np.where(rng.uniform(size=(10, 7)) < 0.5, rng.choice(bounds, (10, 7)), x[10:20])
    w = rng.standard_normal((40, 7))
    w[15:25] = np.where(rng.uniform(size=(10, 7)) < 0.6, 0.0, w[15:25])
    w[25:30] = np.sign(w[25:30])  # ties
    w[30:35] *= 1e-12
    b = np.sum(w * rng.uniform(low, high, x.shape), axis=1)  # within reach
    b[35:] = np.sum(np.where(w[35:] > 0, high, low) * w[35:], axis=1) * 0.999
    steps = fab.onto_hyperplane(*map(tf.constant, (x, w, b)), norm, bounds).numpy()
    assert np.all(x + steps >= low - 1e-9) and np.all(x + steps <= high + 1e-9)
    scale = np.abs(w).max(axis=1)
    np.testing.assert_allclose(np.sum(w * (x + steps), axis=1) / scale, b / scale, atol=1e-9)
    lengths = np.linalg.norm(steps, ORDERS[norm], axis=1)
    expected = [
        shortest_step(*row, norm, bounds)
        for row in zip(x, w / scale[:, np.newaxis], b / scale, strict=True)
    ]
    known = np.array([each is not None for each in expected])
    assert np.mean(known) > 0.9  # SLSQP does not find all
    expected = np.array(expected, dtype=float)[known]
    np.testing.assert_allclose(lengths[known], expected, rtol=1e-5, atol=1e-6)


@every_norm
def test_steps_onto_hyperplanes_that_are_none_or_out_of_reach(norm):
    x = tf.constant([[0.2, 0.9, 0.5], [0.2, 0.9, 0.5], [0.0, 1.0, 0.5]])
    w = tf.constant([[0.0, 0.0, 0.0], [1.0, -2.0, 0.0], [-1.0, 2.0, 0.0]])
    b = tf.constant([1.0, 50.0, 50.0])
    steps = fab.onto_hyperplane(x, w, b, norm, (0.0, 1.0))
    np.testing.assert_allclose(steps, [[0, 0, 0], [0.8, -0.9, 0], [0, 0, 0]], atol=1e-6)


def test_the_nearest_point_of_the_l1_ball_and_the_box(rng):
    center = rng.uniform(size=(30, 5))
    center[:10] = np.where(rng.uniform(size=(10, 5)) < 0.5, np.round(center[:10]), center[:10])
    point = center + rng.standard_normal(center.shape) * rng.choice([0.05, 0.5, 5.0], (30, 1))
    point[5] = center[5]
    point[6:8, 1:] = center[6:8, 1:] + 0.7 * np.sign(point[6:8, 1:] - center[6:8, 1:])  # ties
    found = balls.project_within_box(point, center, 0.6, (0.0, 1.0)).numpy()
    assert np.all(found >= 0) and np.all(found <= 1)
    assert np.all(np.abs(found - center).sum(axis=1) <= 0.6 * (1 + 1e-9))

    def nearest(point, center):
        """Return the nearest point by scipy, in variables for the way up and the way down."""

        def left(both):
            return center + both[:5] - both[5:] - point

        result = optimize.minimize(
            lambda both: np.sum(left(both) ** 2),
            np.zeros(10),
            jac=lambda both: 2 * np.concatenate([left(both), -left(both)]),
            bounds=[*((0, 1 - each) for each in center), *((0, each) for each in center)],
            constraints={
                "type": "ineq",
                "fun": lambda both: 0.6 - np.sum(both),
                "jac": lambda both: -np.ones(10),
            },
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 500},
        )
        return point + left(result.x)

    expected = [nearest(*pair) for pair in zip(point, center, strict=True)]
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_projections_in_l1_at_any_scale(rng):
    delta = rng.standard_normal((6, 50)).astype("float32")
    expected = balls.project(delta, 3.0, "l1").numpy()
    np.testing.assert_allclose(np.abs(expected).sum(axis=1), 3.0, rtol=1e-5)
    # A soft threshold: the same number has been taken from all that are left.
    taken = np.where(expected != 0, np.abs(delta) - np.abs(expected), np.nan)
    np.testing.assert_allclose(np.nanmin(taken, axis=1), np.nanmax(taken, axis=1), atol=1e-5)
    assert np.all(np.abs(delta)[expected == 0] <= np.nanmax(taken) + 1e-6)
    for scale in (1e-20, 1e15):
        scaled = balls.project(delta * scale, 3.0 * scale, "l1") / scale
        np.testing.assert_allclose(scaled, expected, atol=1e-5)
    compiled = tf.function(lambda delta: balls.project(delta, 3.0, "l1"), jit_compile=True)
    np.testing.assert_allclose(compiled(tf.constant(delta)), expected, atol=1e-5)


def test_sparse_steps():
    gradient = tf.constant([[3.0, -4, 0, 1], [0, 0, 0, 0], [1, 1, -1, 2]])
    steps = balls.sparse_ascent(gradient, tf.constant([0.5, 0.5, 0.5]))
    np.testing.assert_allclose(steps, [[0.5, -0.5, 0, 0], [0, 0, 0, 0], [0.25, 0.25, -0.25, 0.25]])
    steps = balls.sparse_ascent(gradient, tf.constant([0.0, 1.0, 1e-9]))
    np.testing.assert_allclose(steps, [[0, -1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]])


# --- APGD -------------------------------------------------------------------------------------


def test_intervals():
    assert intervals(100) == [22, 19, 16, 13, 10, 7, 6, 6]
    assert intervals(10) == [2, 1, 1, 1, 1, 1, 1, 1, 1]
    assert intervals(3) == [1, 1, 1] and intervals(1) == [1]


# A sum of waves that is never above zero: no input fools the model, so that every step counts.
WAVES = np.random.default_rng(7).standard_normal((4, 6)) * 6


def height(x):
    return np.sum(np.sin(x @ WAVES.T), axis=-1) - 9.0


def ascent(x):
    return np.cos(x @ WAVES.T) @ WAVES


def wavy(x):
    z = tf.reduce_sum(tf.sin(x @ WAVES.T), axis=1) - 9.0
    return tf.stack([tf.zeros_like(z), z], axis=1)


def start_of(x, attack):
    """Return where the first attempt with seed 0 starts."""
    seed = tf.random.fold_in(seed_pair(0), 0, alg="philox")
    draws = search.Draws(seed, len(x), tf.range(len(x)))
    return attack._rule.start(tf.constant(x), draws).numpy()


def plain_apgd(x, start, epsilon, steps, norm):
    """Return where APGD ends on one example, written as in the paper, and when it halved."""

    def feasible(z):
        z = np.clip(z, 0, 1) - x
        if norm == "linf":
            return x + np.clip(z, -epsilon, epsilon)
        return x + z * min(1, epsilon / np.linalg.norm(z))

    lengths = intervals(steps)
    looks = list(itertools.accumulate(lengths))
    step, halvings = 2 * epsilon, []
    best, best_value = start, height(start)
    values, last_best, was_halved = [best_value], best_value, True
    point, previous = start, start
    for count in range(1, steps + 1):
        slope = ascent(point)
        direction = np.sign(slope) if norm == "linf" else slope / np.linalg.norm(slope)
        momentum = 0.25 if count > 1 else 0.0
        reached = feasible(point + step * direction)
        new = feasible(point + (1 - momentum) * (reached - point) + momentum * (point - previous))
        previous, point = point, new
        values.append(height(new))
        if values[-1] > best_value:
            best, best_value = new, values[-1]
        if count in looks:
            interval = lengths[looks.index(count)]
            slow = np.sum(np.diff(values[-interval - 1 :]) > 0) <= 0.75 * interval
            stuck = not was_halved and last_best >= best_value
            was_halved, last_best = slow or stuck, best_value
            if was_halved:
                step, point = step / 2, best
                halvings.append(count)
    return best, halvings


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_is_that_of_the_paper(norm, rng):
    x = rng.uniform(size=(12, 6))
    epsilon, steps = 0.1, 60
    attack = APGD(epsilon=epsilon, norm=norm, steps=steps)
    found = attack.bind(wavy)(x, [0] * 12)
    starts = start_of(x, attack)
    plain = [plain_apgd(*pair, epsilon, steps, norm) for pair in zip(x, starts, strict=True)]
    np.testing.assert_allclose(found, [best for best, _ in plain], atol=1e-6)
    assert len({tuple(halvings) for _, halvings in plain}) > 1  # each at its own time


def plain_sparse_apgd(x, start, epsilon, steps):
    """Return where APGD in l1 ends on one example, written as in its paper."""

    def projected(z, radius):
        room = np.where(z > x, 1 - x, x)
        low, high = 0.0, np.abs(z - x).max()
        if np.minimum(np.abs(z - x), room).sum() <= radius:
            high = 0.0
        for _ in range(100):
            middle = (low + high) / 2
            left = np.clip(np.abs(z - x) - middle, 0, room).sum()
            low, high = (middle, high) if left > radius else (low, middle)
        return x + np.sign(z - x) * np.clip(np.abs(z - x) - high, 0, room)

    best = start
    for factor, count in ((3, 3 * steps // 10), (2, 3 * steps // 10), (1, steps - 6 * steps // 10)):
        radius = factor * epsilon
        point = best = projected(best, radius)
        best_value, step = height(best), radius
        changed = np.sum(best != x)
        for _ in range(count):
            slope = ascent(point)
            share = changed / x.size / 1.5
            least = np.sort(np.abs(slope))[min(int((1 - share) * x.size), x.size - 1)]
            signs = np.sign(slope) * (np.abs(slope) >= least)
            point = projected(point + step * signs / np.abs(signs).sum(), radius)
            if height(point) > best_value:
                best, best_value = point, height(point)
            before, changed = changed, np.sum(best != x)
            if changed < 0.95 * before:
                step, point = radius, best
            else:
                step = max(step / 1.5, radius / 10)
    return best


def test_apgd_in_l1_is_that_of_its_paper(rng):
    x = rng.uniform(size=(12, 6))
    attack = APGD(epsilon=0.3, norm="l1", steps=40)
    found = attack.bind(wavy)(x, [0] * 12)
    starts = start_of(x, attack)
    assert np.all(np.abs(starts - x).sum(axis=1) <= 0.9 + 1e-6)
    plain = [plain_sparse_apgd(*pair, 0.3, 40) for pair in zip(x, starts, strict=True)]
    np.testing.assert_allclose(found, plain, atol=1e-5)
    assert np.mean(found != x) < 0.9  # sparse


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_apgd_in_l1_with_few_steps_stays_in_the_ball(steps, rng):
    x, y = examples(8)
    lengths = balls.lengths(APGD(epsilon=0.3, norm="l1", steps=steps)(bent, x, y) - x, "l1")
    assert np.all(lengths <= 0.3 * (1 + 1e-5)) and np.all(lengths > 0)


def test_apgd_counts_only_what_lies_in_the_ball():
    # Only beyond 2 epsilon the model is fooled, which the first steps may look at.
    far = planes([[0.0, 1.0], [0.0, 1.0]], [0.0, -1.4])
    attack = APGD(epsilon=0.3, norm="l1", steps=30)
    found = attack.bind(far)([[0.5, 0.4]] * 3, [0] * 3)
    np.testing.assert_allclose(np.sum(found - [[0.5, 0.4]], axis=1), 0.3, rtol=1e-5)
    assert not np.any(is_fooled(far, found, [0] * 3))


def test_eot_sees_through_noise():
    kernel = np.random.default_rng(1).standard_normal((30, 3)).astype("float32")
    x = np.random.default_rng(2).uniform(0.3, 0.7, (60, 30)).astype("float32")
    model = planes(kernel)
    y = np.argmax(model(x), axis=1)

    @tf.custom_gradient
    def noisy(x):
        def backward(upstream):
            return upstream + 3.0 * tf.random.normal(tf.shape(upstream))

        return tf.identity(x), backward

    def found(eot):
        tf.random.set_seed(3)
        attack = APGD(epsilon=0.04, steps=8, eot=eot).bind(lambda x: model(noisy(x)))
        return np.mean(is_fooled(model, attack(x, y), y))

    without = np.mean(is_fooled(model, APGD(epsilon=0.04, steps=8).bind(model)(x, y), y))
    assert found(1) + 0.1 < found(20) <= without


def test_eot_takes_no_lucky_draw_for_success():
    # On the edge of the ball half of the calls are wrong, inside it fewer.
    def model(x):
        noise = tf.random.normal([tf.shape(x)[0], 1])
        return tf.concat([x - 0.4 + 0.1 * noise, tf.zeros_like(x), tf.zeros_like(x) - 1], axis=1)

    tf.random.set_seed(1)
    x = np.full((50, 1), 0.5, dtype="float32")
    attack = APGD(epsilon=0.1, steps=20, eot=20).bind(model)
    np.testing.assert_allclose(attack(x, np.zeros(50, "int64")), 0.4, rtol=1e-5)


def test_targeted_dlr_by_hand():
    z = [[5.0, 2.0, 3.0, 1.0, -7.0]]
    found = losses.targeted_dlr([0], [1], z)
    np.testing.assert_allclose(found, [-(5 - 2) / (5 - (2 + 1) / 2)], rtol=1e-6)
    np.testing.assert_allclose(losses.targeted_dlr([2], [0], z), [2 / 3.5], rtol=1e-6)
    three = losses.targeted_dlr([0], [2], [[5.0, 2.0, 3.0]])
    np.testing.assert_allclose(three, [3 - 5])  # there is no fourth logit
    shifted = losses.targeted_dlr([0], [1], 10 * np.array(z) + 4)
    np.testing.assert_allclose(shifted, found, rtol=1e-5)


def test_targets_are_the_most_likely_wrong_classes():
    logits = tf.constant([[1.0, 9, 3, 2], [9, 1, 2, 3]])
    given = search.Examples(logits, tf.constant([1, 3]), logits, tf.range(2))
    ranked = [search._ranked_class(given, rank).numpy().tolist() for rank in range(5)]
    assert ranked == [[2, 0], [3, 2], [0, 1], [0, 1], [0, 1]]


# --- Linear models: the closed form -----------------------------------------------------------


@every_norm
def test_apgd_reaches_the_best_point_of_a_linear_model(norm, rng):
    w = rng.standard_normal(12)
    x = rng.uniform(0.4, 0.6, (5, 12))
    epsilon = EPSILON[norm] if norm != "l1" else 0.3  # one entry has room for all of it
    model = planes(np.stack([np.zeros(12), w], axis=1), [0.0, -100.0])
    found = APGD(epsilon=epsilon, norm=norm, steps=50).bind(model)(x, [0] * 5)
    gains, best = (found.numpy() - x) @ w, epsilon * np.linalg.norm(w, DUAL[norm])
    assert np.all(gains <= best * (1 + 1e-9))
    assert np.all(gains >= {"linf": 0.999, "l2": 0.999, "l1": 0.95}[norm] * best)


@every_norm
@pytest.mark.parametrize("targets", [None, 9])
def test_fab_finds_the_nearest_point_of_a_linear_model(norm, targets, rng):
    kernel = rng.standard_normal((12, 4))
    x = rng.uniform(0.35, 0.65, (10, 12))
    model = planes(kernel)
    y = np.argmax(model(x), axis=1)
    z, rows = x @ kernel, np.arange(10)
    slopes = kernel[:, y].T[:, :, np.newaxis] - kernel[np.newaxis]
    gaps = z[rows, y][:, np.newaxis] - z
    reach = gaps / np.maximum(np.linalg.norm(slopes, DUAL[norm], axis=1), 1e-9)
    reach[rows, y] = np.inf
    reach = reach.min(axis=1)
    # So small a ball that no example leaves it before all steps are over.
    attack = FAB(epsilon=1e-4, norm=norm, target_classes=targets, steps=30, bounds=(-50, 50))

    @tf.function
    def distances(attempt):
        given = search.Examples(tf.constant(x), tf.constant(y), model(x), tf.range(10))
        ascent = attack._ascent(model, given, tf.float64, attempt)
        state = attack._begin(ascent, given, attempt, None)
        return attack._advanced(ascent, given, state, 0, 30, None).distance

    found = np.min([distances(tf.constant(rank)) for rank in range(3 if targets else 1)], axis=0)
    # From 10 % nearer it goes 5 % too far, again and again.
    np.testing.assert_allclose(found, 1.005 * reach, rtol=2e-3)


@every_norm
def test_square_comes_near_the_best_point_of_a_linear_model(norm, rng):
    w = rng.standard_normal((4, 4, 1))
    x = rng.uniform(0.4, 0.6, (6, 4, 4, 1))
    epsilon = 0.2 if norm == "l1" else EPSILON[norm]
    model = planes(np.stack([np.zeros(16), w.ravel()], axis=1), [0.0, -100.0])
    attack = Square(epsilon=epsilon, norm=norm, queries=600)
    gains = np.sum((attack.bind(model)(x, [0] * 6) - x) * w, axis=(1, 2, 3))
    best = epsilon * np.linalg.norm(w.ravel(), DUAL[norm])
    assert np.all(gains <= best * (1 + 1e-6))
    assert np.all(gains >= {"linf": 0.99, "l2": 0.6, "l1": 0.4}[norm] * best)


# --- FAB --------------------------------------------------------------------------------------


@every_norm
def test_fab_without_targets_is_fab_on_the_only_target(norm, rng):
    kernel = rng.standard_normal((6, 2))

    def model(x):
        return tf.tanh(planes(kernel)(x))

    x = rng.uniform(size=(20, 6))
    y = np.argmax(model(x), axis=1)
    found = [
        FAB(epsilon=EPSILON[norm], norm=norm, steps=10, target_classes=targets).bind(model)(x, y)
        for targets in (9, None)
    ]
    np.testing.assert_allclose(*found, atol=1e-9)
    assert 0 < np.mean(is_fooled(model, found[0], y)) < 1


def test_fab_with_targets_finds_what_fab_without_does():
    x, y = examples(150, dtype="float64")
    fooled = [
        is_fooled(bent, FAB(epsilon=0.1, steps=20, target_classes=targets).bind(bent)(x, y), y)
        for targets in (9, None)
    ]
    assert 0.2 < np.mean(fooled[0]) < 0.8
    assert np.mean(fooled[0] != fooled[1]) < 0.03


# --- Square -----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (5, 5), (6, 6), (7, 1)])
def test_the_profile_is_a_sum_of_rectangles(size, norm):
    def pyramid(rows, columns):
        values = np.zeros((rows, columns))
        for layer in range(max(rows // 2, columns // 2) + 1):
            top, left = rows // 2 - layer, columns // 2 - layer
            part = values[max(top, 0) : top + 2 * layer + 1, max(left, 0) : left + 2 * layer + 1]
            part += (layer + 1) ** (-2.0 if norm == "l2" else -4.0)
        return values / (np.linalg.norm(values.ravel(), ORDERS[norm]) if rows else 1)

    rows, columns = size
    both = np.concatenate([pyramid(rows // 2, columns), -pyramid(rows - rows // 2, columns)])
    found = square.profile(rows, columns, norm)
    np.testing.assert_allclose(found, both / np.linalg.norm(both.ravel(), ORDERS[norm]), rtol=1e-12)


@pytest.mark.parametrize(
    "shape", [(5, 5, 2), (4, 7, 1), (1, 1, 1), (2, 2, 3), (9, 1, 1), (1, 6, 1)]
)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_windows_lie_in_the_image_and_reach_all_of_it(shape, norm):
    x = tf.zeros((400, *shape))
    draws = search.Draws(tf.constant([1, 2]), 400, tf.range(400))
    attack = Square(epsilon=0.1, norm=norm, queries=100)
    sides = attack._sides(x)
    assert len(sides) == 100 and sides == sorted(sides, reverse=True)
    for side in set(sides):
        across = 1 if shape[1] == 1 else side
        windows = square._windows(x, tf.constant(side), draws, 3)
        inside = windows.inside.numpy()[..., 0]
        assert np.all(inside.sum(axis=(1, 2)) == side * across)
        assert np.all(inside.any(axis=2).sum(axis=1) == side)
        corners = inside.reshape(400, -1).argmax(axis=1)
        assert len(set(corners)) == (shape[0] - side + 1) * (shape[1] - across + 1)
        if norm == "l2":
            images = attack._profile(x, windows, tf.constant(side), tf.zeros((400, 1, 1, 1), bool))
            expected = square.profile(side, across, norm).ravel()
            for image, mask in zip(images.numpy()[:9, ..., 0], inside, strict=False):
                np.testing.assert_allclose(image[mask], expected, rtol=1e-5)
                assert np.all(image[~mask] == 0)


def test_sides_follow_the_schedule():
    x = tf.zeros((1, 20, 20, 3))
    sides = Square(epsilon=0.1, queries=10_000)._sides(x)
    expected = [max(round(20 * (0.8 / 2**k) ** 0.5), 1) for k in range(10)]
    looked_at = (0, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)
    assert [sides[query] for query in looked_at] == expected
    assert [sides[query] for query in (10, 50, 200)] == expected[:3]
    assert Square(epsilon=0.1, queries=5000, horizon=10_000)._sides(x) == sides[:5000]
    assert Square(epsilon=0.1, queries=5000)._sides(x) == sides[::2]
    odd = Square(epsilon=0.1, norm="l2", queries=100)._sides(x)
    assert odd[0] == 19 and odd[-1] == 3 and all(side % 2 for side in odd)


@every_norm
@pytest.mark.parametrize("shape", [(6,), (1,), (3, 5), (7, 3, 2), (1, 1, 1), (2, 3, 2, 2)])
def test_square_on_inputs_of_any_shape(shape, norm, rng):
    kernel = rng.standard_normal((int(np.prod(shape)), 2)) * 5
    x = rng.uniform(0.3, 0.7, (8, *shape)).astype("float32")
    model = planes(kernel)
    y = np.argmax(model(x), axis=1)
    epsilon = 0.1 * {"linf": 1, "l2": len(kernel) ** 0.5, "l1": len(kernel)}[norm]
    found = Square(epsilon=epsilon, norm=norm, queries=5)(model, x, y)
    assert np.all(np.isfinite(found)) and found.shape == x.shape
    lengths = balls.lengths(found - x, norm).numpy()
    assert np.all(lengths > 0) and np.all(lengths <= epsilon * (1 + 1e-5))


def test_square_needs_a_static_shape():
    graph = tf.function(
        lambda x: Square(epsilon=0.1, queries=2)(bent, x, [0]),
        input_signature=[tf.TensorSpec((1, None))],
    )
    with pytest.raises(ValueError, match="x must have a static shape except for the batch"):
        graph(tf.zeros((1, 6)))


def test_square_judges_what_has_no_gradient(rng):
    kernel = rng.standard_normal((6, 3)).astype("float32")

    def served(x):
        return tf.py_function(lambda x: np.round(x.numpy() @ kernel, 1), [x], tf.float32)

    x = rng.uniform(size=(30, 6)).astype("float32")
    y = np.argmax(served(x), axis=1)
    found = Square(epsilon=0.3, queries=40)(served, x, y)
    assert np.mean(is_fooled(served, found, y)) > 0.5


# --- Random numbers, graphs, traces, batches --------------------------------------------------


def test_draws_of_an_example_do_not_depend_on_which_others_are_there():
    rows = tf.constant([5, 1, 7])
    whole, part = (search.Draws(tf.constant([1, 2]), 9, row) for row in (tf.range(9), rows))
    for draw in (
        lambda draws, count: draws.uniform((2,), salt=3),
        lambda draws, count: draws.normal(tf.zeros((count, 2)), salt=3),
        lambda draws, count: draws.on_sphere(tf.zeros((count, 4)), "l1", salt=3),
        lambda draws, count: draws.on_sphere(tf.zeros((count, 4)), "linf", salt=3),
    ):
        np.testing.assert_array_equal(draw(part, 3), tf.gather(draw(whole, 9), rows))
    other = whole.uniform((2,), salt=4)
    assert np.all(other != whole.uniform((2,), salt=3)) and np.max(np.abs(other)) <= 1
    for norm, order in ORDERS.items():
        points = whole.on_sphere(tf.zeros((9, 4)), norm, salt=3)
        np.testing.assert_allclose(np.linalg.norm(points, order, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("index", "norm"),
    [(0, "linf"), (0, "l2"), (0, "l1"), (1, "l2"), (2, "l1"), (3, "l2"), (4, "linf"), (4, "l1")],
)
def test_a_graph_finds_what_the_loop_in_python_does(index, norm):
    x, y = examples(40, dtype="float64")
    attack = each_attack(norm)[index]
    expected = on_bent(attack)(x, y, seed=3)
    assert 0 < np.mean(is_fooled(bent, expected, y)) < 1
    graph = tf.function(lambda x, y: attack(bent, x, y, seed=3))
    np.testing.assert_allclose(graph(x, y), expected, atol=1e-7)


@pytest.mark.parametrize("attack", [*each_attack("linf")[1:], each_attack("l1")[0]], ids=str)
def test_xla_finds_as_much(attack):
    x, y = examples(40, dtype="float64")
    compiled = tf.function(lambda x, y: attack(bent, x, y, seed=3), jit_compile=True)
    np.testing.assert_allclose(compiled(x, y), on_bent(attack)(x, y, seed=3), atol=1e-6)


def test_nothing_is_traced_again():
    calls = []

    def counted(x):
        calls.append(x.shape[0])
        return bent(x)

    for attack in each_attack("linf"):
        bound = attack.bind(counted)
        bound(*examples(20))
        traced = len(calls)
        for count in (1, 7, 33):
            x, y = examples(count, seed=count)
            found = bound(x, y, seed=count)
            # Some examples have left the loop, so it has run on several sizes.
            assert count < 33 or 0 < np.mean(is_fooled(bent, found, y)) < 1
        assert len(calls) == traced and set(calls) == {None}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_call_of_autoattack_compiles_a_model_of_keras_once(flavour, monkeypatch):
    """With all of its kinds of attacks, shortened: what is compiled has loops of any length."""

    class Counted(FLAVOURS[flavour].layers.Layer):
        def call(self, x):
            calls.append(x.shape[0])
            return bent(x)

    k, calls = FLAVOURS[flavour], []
    inputs = k.Input((6,))
    model = k.Model(inputs, Counted()(inputs))
    ball = {"epsilon": 0.06, "norm": "linf"}
    parts = (
        APGD(steps=8, **ball),
        APGD(steps=8, loss="targeted_dlr", **ball),
        FAB(steps=5, **ball),
        Square(queries=30, **ball),
    )
    monkeypatch.setattr(AutoAttack, "attacks", parts)
    attack = AutoAttack(**ball)
    x, y = examples(12)
    first = attack(model, x, y, seed=1)
    traced = calls.count(None)
    np.testing.assert_allclose(attack.bind(model)(x, y, seed=1), first, atol=1e-6)
    bound = calls.count(None)
    assert bound > traced
    np.testing.assert_array_equal(attack(model, x, y, seed=1), first)
    assert calls.count(None) == bound


def test_the_batch_size_does_not_change_what_is_not_random():
    x, y = examples(12, dtype="float64")
    for attack in (FAB(epsilon=0.06, steps=8), FAB(epsilon=0.06, steps=8, target_classes=None)):
        bound = on_bent(attack)
        parts = [bound(x[at : at + 5], y[at : at + 5], seed=at) for at in (0, 5, 10)]
        np.testing.assert_allclose(bound(x, y), np.concatenate(parts), atol=1e-12)


def test_restarts_and_targets_never_lose():
    x, y = examples(200)
    for make, field in (
        (lambda **more: APGD(epsilon=0.06, steps=3, **more), "restarts"),
        (
            lambda **more: APGD(epsilon=0.06, steps=10, loss="targeted_dlr", **more),
            "target_classes",
        ),
        (lambda **more: FAB(epsilon=0.06, steps=4, **more), "target_classes"),
        (lambda **more: Square(epsilon=0.06, queries=10, **more), "restarts"),
    ):
        less, more = (is_fooled(bent, on_bent(make(**{field: count}))(x, y), y) for count in (1, 2))
        assert np.all(more >= less) and np.mean(less) > 0.02


# --- Models, classes, inputs ------------------------------------------------------------------


@every_norm
def test_bounds_scale_the_results(norm):
    x, y = examples(20, dtype="float64")
    plain = [on_bent(attack)(x, y, seed=2) for attack in each_attack(norm)[::2]]
    low, high = {"linf": (-1.0, 1.0), "l2": (0.0, 255.0), "l1": (-1.0, 3.0)}[norm]
    width = high - low

    def model(x):
        return bent((x - low) / width)

    scaled = each_attack(norm, epsilon=EPSILON[norm] * width, bounds=(low, high))[::2]
    for attack, expected in zip(scaled, plain, strict=True):
        found = attack.bind(model)(low + width * x, y, seed=2)
        # Where a profile and what it is added to cancel, Square normalises what rounding left.
        np.testing.assert_allclose((found - low) / width, expected, atol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_square_knows_images_with_the_channels_first(norm, rng):
    kernel = tf.constant(rng.standard_normal((108, 3)), tf.float32)
    x, y = tf.constant(rng.uniform(size=(8, 6, 6, 3)), tf.float32), rng.integers(0, 3, 8)

    def last(x):
        return tf.reshape(x, (-1, 108)) @ kernel

    def first(x):
        return last(tf.transpose(x, (0, 2, 3, 1)))

    attack = Square(epsilon=2 * EPSILON[norm], norm=norm, queries=40)
    found = attack(first, tf.transpose(x, (0, 3, 1, 2)), y, seed=2)
    expected = attack(last, x, y, seed=2)
    np.testing.assert_allclose(tf.transpose(found, (0, 2, 3, 1)), expected, atol=1e-6)


def test_two_classes():
    kernel, bias = np.array([[1.0, -1.0], [0.5, 0.0]], np.float32), [-0.1, 0.0]
    x, y = np.full((3, 2), 0.4, np.float32), [0] * 3
    model = planes(kernel, bias)
    with pytest.raises(ValueError, match="loss='dlr' needs 3 classes, got a model of 2"):
        APGD(epsilon=0.1, loss="dlr")(model, x, y)
    for version in ("plus", "rand"):
        with pytest.raises(ValueError, match=r"needs 3 classes.* Use version='standard'"):
            AutoAttack(epsilon=0.1, version=version)(model, x, y)
    for attack in (
        AutoAttack(epsilon=0.5),
        APGD(epsilon=0.5, steps=5, loss="targeted_dlr"),
        FAB(epsilon=0.5, steps=5),
        FAB(epsilon=0.5, steps=5, target_classes=None),
        Square(epsilon=0.5, queries=20),
    ):
        assert np.all(is_fooled(model, attack(model, x, y), y))


def test_autoattack_outside_of_its_reach():
    x, y = examples(3)
    with pytest.raises(ValueError, match=r"call it outside of tf\.function"):
        tf.function(lambda x: AutoAttack(epsilon=0.1)(bent, x, y))(x)
    with pytest.raises(ValueError, match="y is missing: this attack needs the labels"):
        AutoAttack(epsilon=0.1)(bent, x)
    with pytest.raises(ValueError, match="norm must be one of 'linf', 'l2', 'l1', got 'l0'"):
        AutoAttack(epsilon=0.1, norm="l0")


def test_the_official_constants():
    def names(**options):
        return [attack.name for attack in AutoAttack(epsilon="8/255", **options).attacks]

    assert names() == [
        "APGD-100 linf 8/255",
        "APGD-100 linf 8/255 targeted_dlr",
        "FAB-100 linf 8/255 targeted",
        "Square-5000 linf 8/255",
    ]
    assert names(version="plus", norm="l2") == [
        "APGD-100x5 l2 8/255",
        "APGD-100x5 l2 8/255 dlr",
        "FAB-100x5 l2 8/255",
        "Square-5000 l2 8/255",
        "APGD-100 l2 8/255 targeted_dlr",
        "FAB-100 l2 8/255 targeted",
    ]
    assert names(version="rand") == ["APGD-100 linf 8/255", "APGD-100 linf 8/255 dlr"]
    assert [part.eot for part in AutoAttack(epsilon=0.1, version="rand").attacks] == [20, 20]
    assert names(norm="l1")[0] == "APGD-100x5 l1 8/255"
    counts = {
        norm: [part._targets for part in AutoAttack(epsilon=0.1, norm=norm).attacks[1:3]]
        for norm in NORMS
    }
    assert counts == {"linf": [9, 9], "l2": [9, 9], "l1": [5, 9]}
    assert AutoAttack(epsilon=0.1).attacks[3].describe()["horizon"] == 10_000


@every_norm
def test_autoattack_is_the_worst_case_of_its_parts(norm):
    x, y = examples(30)
    y = tf.where(tf.range(30) < 3, (y + 1) % 3, y)  # misclassified from the start
    attack = AutoAttack(epsilon=EPSILON[norm], norm=norm)
    found = attack(bent, x, y) if norm == "l2" else on_bent(attack)(x, y)
    fooled = is_fooled(bent, found, y)
    assert np.all(fooled[:3]) and 0 < np.mean(fooled[3:]) < 1
    lengths = balls.lengths(found - x, norm).numpy()
    assert np.all(lengths <= EPSILON[norm] * (1 + 1e-5))
    for part in attack.attacks[:2]:
        assert np.all(fooled >= is_fooled(bent, on_bent(part)(x, y), y))


def test_all_fooled_at_once_and_none_at_all():
    x, y = examples(9)
    wrong = (y + 1) % 3

    def sure(x):  # what no input changes
        return bent(x) * 0.0 + tf.constant([[9.0, 0.0, 0.0]], x.dtype)

    for attack in each_attack("linf"):
        bound = on_bent(attack)
        assert np.all(is_fooled(bent, bound(x, wrong), wrong))
        found = bound(x[:1], wrong[:1])
        assert np.all(is_fooled(bent, found, wrong[:1])) and found.shape == (1, 6)
        kept = attack.bind(sure)(x, tf.zeros(9, tf.int32))
        assert balls.lengths(kept - x, "linf").numpy().max() <= 0.06 * (1 + 1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_inputs_of_other_dtypes(dtype):
    x, y = examples(20)
    x = tf.cast(x, dtype)
    seen = set()

    def model(x):
        seen.add(x.dtype.name)
        return bent(tf.cast(x, tf.float32))

    norm = {"float16": "linf", "bfloat16": "l1", "float64": "l2"}[dtype]
    for attack in each_attack(norm):
        found = attack.bind(model)(x, y)
        assert found.dtype == x.dtype
        offset = tf.cast(found, tf.float64) - tf.cast(x, tf.float64)
        assert balls.lengths(offset, norm).numpy().max() <= EPSILON[norm] * (1 + 1e-5)
        assert np.mean(is_fooled(model, found, y)) > 0.05
    assert seen == {dtype}


@pytest.mark.parametrize("index", [1, 2, 3])
def test_a_number_of_classes_that_no_graph_knows(index):
    x, y = examples(40, dtype="float64")

    def unknown(x):
        return tf.reshape(bent(x), tf.stack([tf.shape(x)[0], 3 + 0 * tf.shape(x)[0]]))

    attack = each_attack("linf")[index]
    expected = on_bent(attack)(x, y, seed=3)
    graph = tf.function(lambda x, y: attack(unknown, x, y, seed=3))
    np.testing.assert_allclose(graph(x, y), expected, atol=1e-7)
    np.testing.assert_allclose(attack.bind(unknown)(x, y, seed=3), expected, atol=1e-7)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_models_of_both_kerases_and_a_saved_one(flavour, tmp_path):
    model = dense_model(FLAVOURS[flavour])
    x, _ = blobs(40)
    *parts, bias = model.get_weights()
    model.set_weights([*parts, bias - np.mean(model(x), axis=0)])  # no class has the upper hand
    y = np.argmax(model(x), axis=1)
    module = tf.Module()
    module.parts = [tf.Variable(part) for part in model.get_weights()]

    def logits(x):
        kernel, bias, last_kernel, last_bias = module.parts
        return tf.nn.relu(x @ kernel + bias) @ last_kernel + last_bias

    module.logits = tf.function(logits, input_signature=[tf.TensorSpec((None, 6))])
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    for attack in each_attack("linf", epsilon=0.15):
        found = attack(model, x, y)
        assert np.mean(is_fooled(model, found, y)) > 0
        np.testing.assert_allclose(attack.bind(loaded.logits)(x, y), found, atol=1e-5)


def test_one_hot_labels_are_labels():
    x, y = examples(10)
    for attack in each_attack("l2")[::2]:
        bound = on_bent(attack)
        np.testing.assert_array_equal(bound(x, tf.one_hot(y, 3)), bound(x, y))
    with pytest.raises(ValueError, match=r"y must be in 0 \.\.\. 2, for the model has 3 outputs"):
        APGD(epsilon=0.1, steps=2)(bent, x, y + 3)


# --- Training ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flavour", "loss", "norm", "jit_compile"),
    [
        ("keras", "TRADES", "linf", False),
        ("tf_keras", "TRADES", "l2", True),
        ("keras", "Madry", "l1", False),
    ],
)
def test_apgd_in_training(flavour, loss, norm, jit_compile):
    library = FLAVOURS[flavour]
    x, y = blobs(64)
    trainer = tscnc.AdversarialTraining(
        dense_model(library),
        attack=APGD(epsilon=EPSILON[norm], norm=norm, steps=3),
        loss=getattr(tscnc.losses, loss)(),
    )
    trainer.compile(optimizer=library.optimizers.Adam(0.02), jit_compile=jit_compile)
    assert trainer._adversary.loss == ("kl" if loss == "TRADES" else "ce")
    history = trainer.fit(x, y, epochs=4, batch_size=32, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]


@pytest.mark.parametrize(
    ("attack", "score"),
    [
        (APGD(epsilon=0.1, steps=10), losses.log_odds),
        (Square(epsilon=0.1, queries=50), losses.margin),
    ],
    ids=lambda each: getattr(each, "name", ""),
)
def test_training_gets_the_largest_score(attack, score):
    x, y = examples(50)
    trained_on = attack.perturb(bent, x, y, seed_pair(0))
    first_found = attack.perturb(bent, x, y, seed_pair(0), until_fooled=True)
    most, first = (score(y, bent(points)).numpy() for points in (trained_on, first_found))
    assert np.all(most >= first - 1e-5) and np.mean(most > first + 0.1) > 0.1


def test_searches_for_transfer_are_not_equal_to_others():
    attack = Square(epsilon=0.1)
    assert attack.for_transfer() == attack.for_transfer() != attack


def test_defaults_of_training():
    assert APGD(epsilon=0.1).with_defaults(objective="kl", start="gaussian").loss == "kl"
    assert APGD(epsilon=0.1, loss="dlr").with_defaults(objective="kl").loss == "dlr"
    assert FAB(epsilon=0.1).with_defaults(objective="kl") == FAB(epsilon=0.1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: APGD(epsilon=0.1, steps=0), "steps must be >= 1, got 0"),
        (lambda: APGD(epsilon=0.1, eot=0), "eot must be >= 1, got 0"),
        (lambda: APGD(epsilon=0.1, restarts=0), "restarts must be >= 1, got 0"),
        (lambda: APGD(epsilon=0.1, loss="mse"), "loss must be one of None, 'ce', 'dlr', 'kl'"),
        (lambda: APGD(epsilon=0.1, target_classes=3), "target_classes must be None for loss=None"),
        (lambda: FAB(epsilon=0.1, target_classes=0), "target_classes must be >= 1, got 0"),
        (lambda: FAB(epsilon=0.1, steps=0), "steps must be >= 1, got 0"),
        (lambda: Square(epsilon=0.1, queries=0), "queries must be >= 1, got 0"),
        (lambda: Square(epsilon=0.1, horizon=0), "horizon must be >= 1, got 0"),
        (lambda: Square(epsilon=0.1, p_init=1.5), "p_init must be .*1.5"),
        (lambda: AutoAttack(epsilon=0.1, version="fast"), "version must be one of 'standard'"),
    ],
)
def test_arguments_that_make_no_sense(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_radius_in_l1_is_checked_against_the_box():
    with pytest.raises(ValueError, match="epsilon must be at most the l1 distance of the corners"):
        APGD(epsilon=7, norm="l1")(bent, *examples(2))
