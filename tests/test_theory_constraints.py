"""The constraints and gates: T13 to T20 of docs/theory.md, each inequality tested."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import assume, given
from hypothesis import strategies as st
from matrices import (
    SLACK,
    entries,
    log_ratio,
    pairs,
    report,
    seeds,
    slope,
    spectra,
    svd,
    tries,
    with_spectrum,
)

from tscnc_tf import functional

# The condition number constraint.


@given(spectra, seeds, st.floats(1e-6, 1e6))
@tries
def test_t13_the_constraint_is_not_negative_and_knows_neither_scale_nor_rotation(values, seed, s):
    matrix = with_spectrum(values, 2, seed)
    squares = np.square(values)
    expected = math.log(np.mean(squares)) - np.mean(np.log(squares))
    rounding = 1e-9 + 1e-15 * np.max(squares) / np.min(squares)  # of λₙ, beside λ₁
    assert log_ratio(matrix) == pytest.approx(expected, abs=rounding)
    assert log_ratio(matrix) >= 0.0
    turned = s * with_spectrum(np.ones(len(matrix)), 0, seed + 1) @ matrix
    assert log_ratio(turned) == pytest.approx(expected, abs=10 * rounding)
    turned = matrix @ with_spectrum(np.ones(len(values)), 0, seed + 2)
    assert log_ratio(turned) == pytest.approx(expected, abs=10 * rounding)


@given(st.floats(1.0, 1.5), st.integers(2, 8), seeds)
@tries
def test_t13_it_is_zero_where_the_condition_number_is_one_and_nowhere_else(top, count, seed):
    value = log_ratio(with_spectrum([top] + [1.0] * (count - 1), 1, seed))
    # Of n eigenvalues one is off by a factor of h: at least (n-1) log(h)^2 / (2 n^2 h).
    least = (count - 1) * math.log(top**2) ** 2 / (2 * count**2 * top**2)
    assert value >= least * (1 - 1e-6) - 1e-12
    if top == 1.0:
        assert value == pytest.approx(0.0, abs=1e-12)


@given(spectra, seeds)
@tries
def test_t14_the_constraint_bounds_the_condition_number(values, seed):
    matrix, count = with_spectrum(values, 1, seed), len(values)
    growth, condition = math.exp(count * log_ratio(matrix) / 2), report(matrix).condition_number
    assert (condition + 1 / condition) / 2 <= growth * (1 + 1e-6)
    assert condition <= (growth + math.sqrt(max(growth**2 - 1, 0.0))) * (1 + 1e-4)
    assert condition < 2 * growth


@pytest.mark.parametrize("count", [2, 3, 7])
def test_t14_the_bound_is_reached_and_nothing_below_2_would_do(count):
    ends = np.array([100.0**2, 1.0])
    eigenvalues = np.concatenate([ends, np.full(count - 2, np.mean(ends))])
    growth = math.exp(count * log_ratio(with_spectrum(np.sqrt(eigenvalues))) / 2)
    assert growth == pytest.approx((100 + 1 / 100) / 2)
    assert 1.999 * growth < 100.0


def specht(h):
    """The largest ratio of arithmetic to geometric mean of numbers that lie within a factor h."""
    power = h ** (1 / (h - 1))
    return power / (math.e * math.log(power))


@given(spectra, seeds)
@tries
def test_t15_the_condition_number_bounds_the_constraint(values, seed):
    matrix = with_spectrum(values, 1, seed)
    value, condition = log_ratio(matrix), report(matrix).condition_number
    assert value <= math.log(condition) ** 2 / 2 + 1e-8
    assert value <= 2 * math.log(condition) + 1e-8
    if condition > 1.01:
        assert value <= math.log(specht(condition**2)) + 1e-6
        assert math.log(specht(condition**2)) <= math.log(condition) ** 2 / 2 + 1e-9


def test_t15_a_half_is_needed_near_1_and_specht_is_reached_everywhere():
    near = log_ratio(np.diag([1.02, 1.0]))
    assert near > 0.499 * math.log(1.02) ** 2
    for condition in (2.0, 10.0):
        h = condition**2
        share = ((h - 1) / math.log(h) - 1) / (h - 1)  # of eigenvalues that are h; the others are 1
        count = 200
        many = round(share * count)
        spread = np.concatenate([np.full(many, condition), np.ones(count - many)])
        assert log_ratio(np.diag(spread)) == pytest.approx(math.log(specht(h)), rel=1e-2)


@given(spectra.filter(lambda values: len(values) > 1), seeds)
@tries
def test_t16_the_gradient_of_the_constraint(values, seed):
    matrix, count = with_spectrum(values, 2, seed), len(values)
    gram = matrix.T @ matrix
    expected = 2 * matrix / np.trace(gram) - 2 / count * matrix @ np.linalg.inv(gram)
    found = slope(lambda m: functional.log_ratio(m, ridge=0.0), matrix)
    size = np.linalg.norm(expected)
    np.testing.assert_allclose(found, expected, atol=1e-6 * size + 1e-9)
    assert abs(np.sum(found * matrix)) <= 1e-6 * (1 + size * np.linalg.norm(matrix))
    left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
    along = np.einsum("pi,pn,in->i", left, found, right)
    mean = np.mean(sigma**2)
    clear = np.abs(sigma**2 - mean) > 1e-3 * mean
    assert np.all((along > 0)[clear] == (sigma**2 > mean)[clear])


def test_t16_the_gradient_is_the_limit_of_differences(rng):
    matrix, way = rng.normal(size=(2, 6, 4))
    spectrum = [np.square(svd(matrix + step * way)) for step in (1e-5, -1e-5)]
    up, down = (math.log(np.mean(values)) - np.mean(np.log(values)) for values in spectrum)
    found = np.sum(way * slope(lambda m: functional.log_ratio(m, ridge=0.0), matrix))
    assert found == pytest.approx((up - down) / 2e-5, rel=1e-6)


@given(pairs(), st.sampled_from([1e-6, 1e-3, 1.0]))
@tries
def test_t17_a_ridge_lowers_the_constraint_and_caps_it(pair, ridge):
    matrix = pair[0] if pair[0].shape[0] >= pair[0].shape[1] else pair[0].T
    value, squares = log_ratio(matrix, ridge), np.square(svd(matrix))
    assert 0.0 <= value <= math.log((1 + ridge) / ridge) + 1e-9
    assume(squares[0] > 1e-6)
    squares = squares * len(squares) / np.sum(squares)
    lifted = squares + ridge
    expected = math.log(np.mean(lifted)) - np.mean(np.log(lifted))
    assert value == pytest.approx(expected, abs=1e-6)
    if squares[-1] > 1e-6:
        assert value <= math.log(np.mean(squares)) - np.mean(np.log(squares)) + 1e-6
    growth = math.exp(len(squares) * value / 2)
    assert math.sqrt(lifted[0] / lifted[-1]) < 2 * growth * (1 + 1e-6)


def test_t17_the_zero_matrix_reaches_the_cap_and_a_dead_column_leaves_its_value_finite():
    assert log_ratio(np.zeros((3, 2)), 1e-3) == pytest.approx(math.log(1001))
    dead = log_ratio(np.diag([1.0, 0.0]), 1e-3)
    assert dead == pytest.approx(math.log(1.001) - (math.log(2.001) + math.log(1e-3)) / 2)


@pytest.mark.parametrize("dead", [1, 4])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2])
def test_t17_of_a_kernel_with_dead_filters_those_that_live_are_trained(dead, ridge, rng):
    def cost(matrix, ridge):
        variable = tf.Variable(matrix)
        with tf.GradientTape() as tape:
            value = functional.log_ratio(variable, ridge)
        return float(value), tape.gradient(value, variable).numpy()

    n, matrix = 6, rng.normal(size=(9, 6))
    alive = rng.permutation(n) >= dead
    share = alive.mean()
    whole, pull = cost(matrix * alive, ridge)
    part, pull_of_part = cost(matrix[:, alive], share * ridge)
    constant = math.log1p(ridge) - (1 - share) * math.log(ridge)
    constant -= share * (math.log1p(share * ridge) - math.log(share))
    assert whole == pytest.approx(share * part + constant, rel=1e-12)
    np.testing.assert_allclose(pull[:, alive], share * pull_of_part, rtol=1e-9)
    np.testing.assert_array_equal(pull[:, ~alive], 0)


# The sparse constraint, the authors' form, and gates.


@given(st.floats(-50, 50), st.floats(-50, 50), st.floats(0.01, 100))
@tries
def test_t18_bounds_of_the_transformed_l1(x, y, a):
    def t(value):
        return float(functional.transformed_l1(tf.constant(value, tf.float64), a))

    size = abs(x)
    assert 0.0 <= t(x) < a + 1
    assert t(x) - size == pytest.approx(size * (1 - size) / (a + size), abs=1e-9)
    assert (t(x) >= size - 1e-12) if size <= 1 else (t(x) <= size + 1e-12)
    assert abs(t(x) - size) <= size * abs(1 - size) / a + 1e-9
    if size > 1e-3:
        assert abs(t(x) - 1) <= a * abs(1 - 1 / size) + 1e-9
    middle = (abs(x) + abs(y)) / 2
    assert t(middle) >= (t(x) + t(y)) / 2 - 1e-9
    assert t(x + y) <= t(abs(x) + abs(y)) + 1e-9
    assert t(abs(x) + abs(y)) <= t(x) + t(y) + 1e-9


def test_t18_the_slope_and_what_it_prefers():
    x = np.array([0.0, 0.25, 1.0, 4.0])
    found = slope(lambda value: tf.reduce_sum(functional.transformed_l1(value, 0.5)), x[1:])
    np.testing.assert_allclose(found, 1.5 * 0.5 / (0.5 + x[1:]) ** 2)
    near_zero = float(functional.transformed_l1(1e-9, 0.5)) / 1e-9
    assert near_zero == pytest.approx(1.5 / 0.5, rel=1e-6)
    even, sparse = np.full(4, 0.5), np.array([2.0, 0.0, 0.0, 0.0])
    total = [float(tf.reduce_sum(functional.transformed_l1(v, 0.5))) for v in (even, sparse)]
    assert total[1] < total[0]
    assert np.sum(even) == np.sum(sparse)
    peaked, paired = np.array([0.98, 0.01, 0.01]), np.array([0.5, 0.5, 0.0])
    total = [float(tf.reduce_sum(functional.transformed_l1(v, 1.0))) for v in (peaked, paired)]
    assert total[0] < total[1], "more zeros, and yet dearer"


@given(st.lists(st.floats(0.2, 3), min_size=1, max_size=5), seeds)
@tries
def test_t19_the_gradient_of_the_authors_form_vanishes_with_the_determinant(values, seed):
    nu, matrix, count = 1e-5, with_spectrum(values, 2, seed), len(values)
    gram = matrix.T @ matrix
    det = np.linalg.det(gram / count)
    expected = 4 * math.log(nu + det) * det / (nu + det) * matrix @ np.linalg.inv(gram)
    found = slope(functional.authors_penalty, matrix)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    bound = 4 * abs(math.log(nu + det)) * det / nu * math.sqrt(count) / min(values)
    assert np.linalg.norm(found) <= bound * (1 + 1e-5)
    lengths = np.square(np.linalg.norm(matrix, axis=0))
    assert det <= np.prod(lengths) / count**count * SLACK
    assert float(functional.authors_penalty(matrix)) == pytest.approx(math.log(nu + det) ** 2)


def test_t19_where_the_determinant_goes_under(rng):
    assert np.float32(30.0**-30) > 0.0
    assert np.float32(31.0**-31) == 0.0
    orthogonal = np.linalg.qr(rng.normal(size=(64, 31)))[0]  # unit columns: Hadamard's equality
    assert np.linalg.det(orthogonal.T @ orthogonal / 31) == pytest.approx(31.0**-31)
    assert np.linalg.det((orthogonal.T @ orthogonal / 31).astype("float32")) == 0.0
    assert float(functional.authors_penalty(orthogonal)) == pytest.approx(132.547, abs=1e-3)
    assert np.abs(slope(functional.authors_penalty, orthogonal)).max() < 1e-37
    uneven, even = (float(functional.authors_penalty(np.diag(d))) for d in ([4, 0.25], [1.0, 1.0]))
    assert uneven == pytest.approx(even)


BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gates(log_alpha, u):
    s = sigmoid((np.log(u) - np.log1p(-u) + log_alpha) / BETA)
    return np.clip(s * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def open_chance(log_alpha, t=0.0):
    """The chance that a gate is above t, for 0 <= t < 1."""
    place = (t - GAMMA) / (ZETA - GAMMA)
    return sigmoid(log_alpha - BETA * np.log(place / (1 - place)))


@pytest.mark.parametrize("log_alpha", [-4.0, -1.0, 0.0, 0.8, 3.0])
def test_t20_a_gate_opens_as_often_as_the_formula_says(log_alpha):
    u = (np.arange(400_000) + 0.5) / 400_000  # not drawn, but laid out evenly
    z = gates(log_alpha, u)
    assert np.mean(z > 0) == pytest.approx(open_chance(log_alpha), abs=1e-5)
    assert open_chance(log_alpha) == pytest.approx(
        sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))
    )
    assert np.mean(z >= 1) == pytest.approx(
        1 - sigmoid(BETA * math.log((1 - GAMMA) / (ZETA - 1)) - log_alpha), abs=1e-5
    )
    t = (np.arange(20_000) + 0.5) / 20_000
    assert np.mean(z) == pytest.approx(np.mean(open_chance(log_alpha, t)), abs=1e-5)


@given(st.floats(-4, 4), st.floats(0.0, 5.0), st.floats(0.1, 10.0))
@tries
def test_t20_the_constraint_on_the_chance_is_above_the_expected_constraint(log_alpha, size, a):
    z = gates(log_alpha, (np.arange(20_000) + 0.5) / 20_000)

    def t(value):
        return np.asarray(functional.transformed_l1(np.asarray(value, float), a))

    chance = open_chance(log_alpha)
    expected = np.mean(t(z * size))
    assert expected <= t(np.mean(z) * size) + 1e-9
    assert t(np.mean(z) * size) <= t(chance * size) + 1e-4
    assert chance * t(size) <= t(chance * size) + 1e-9
    assert np.mean(t((z > 0) * size)) == pytest.approx(chance * t(size), abs=1e-3)


def test_t20_the_gate_of_inference_is_not_the_expected_one():
    inference = np.clip(sigmoid(-1.5) * (ZETA - GAMMA) + GAMMA, 0, 1)
    expected = np.mean(gates(-1.5, (np.arange(20_000) + 0.5) / 20_000))
    assert expected > 1.5 * inference


@given(entries(16), st.floats(0.05, 1.0), st.floats(1e-3, 1.0))
@tries
def test_t20_batch_normalisation_divides_a_gate_out(y, z, epsilon):
    d, v = y - y.mean(), y.var()
    assume(v > 1e-2)

    def normalised(z, epsilon=epsilon):
        outputs = z * y
        return (outputs - outputs.mean()) / np.sqrt(outputs.var() + epsilon)

    slope = (normalised(z + 1e-6) - normalised(z - 1e-6)) / 2e-6
    formula = d * epsilon / (z**2 * v + epsilon) ** 1.5
    np.testing.assert_allclose(slope, formula, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(normalised(z, 0.0), normalised(1.0, 0.0), rtol=1e-9, atol=1e-9)
    assert not normalised(0.0).any()


@pytest.mark.parametrize("log_alpha", [0.85, -0.5])
def test_t20_before_batch_normalisation_rare_draws_carry_the_gradient(log_alpha):
    count, h = 1_000_000, 1e-3
    u = (np.arange(count) + 0.5) / count

    def drawn(log_alpha, epsilon):
        """Gates, and the square of what is normalised of outputs of variance 1, as a loss."""
        z = functional.hard_concrete(tf.cast(log_alpha, tf.float64), u)
        return z, z**2 / (z**2 + epsilon)

    def slope(epsilon):
        above, below = (drawn(log_alpha + step, epsilon)[1] for step in (h, -h))
        return np.mean(above - below) / (2 * h)

    # Each draw has a log alpha of its own, so that each draw's gradient is seen.
    place = tf.fill([count], np.float64(log_alpha))
    with tf.GradientTape() as tape:
        tape.watch(place)
        z, loss = drawn(place, 1e-5)
    each = np.asarray(tape.gradient(loss, place))
    assert np.mean(each) == pytest.approx(slope(1e-5), rel=1e-3)
    chance = open_chance(log_alpha)
    assert slope(1e-5) == pytest.approx(chance * (1 - chance), rel=4e-2)
    assert slope(1e-7) == pytest.approx(chance * (1 - chance), rel=4e-3)
    # Few draws have all but a tenth of it; the usual one has next to nothing.
    near = (z > 0) & (z < 10 * math.sqrt(1e-5))
    assert np.mean(near) < 0.05
    assert np.sum(each[near]) > 0.9 * np.sum(each)
    assert np.median(each) < 1e-3 * np.mean(each)
    if log_alpha == 0.85:
        assert 1 / np.mean((z > 0) & (z < math.sqrt(1e-5))) == pytest.approx(600, rel=0.05)
