"""The maths of the constraints against NumPy's SVD, closed forms and finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tscnc_tf import functional

RIDGE = 1e-6
settings.register_profile("quick", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("quick")


def gradient(function, matrix):
    matrix = tf.constant(matrix)
    with tf.GradientTape() as tape:
        tape.watch(matrix)
        value = function(matrix)
    return value.numpy(), tape.gradient(value, matrix).numpy()


def finite_differences(function, matrix, step=1e-6):
    result = np.zeros_like(matrix)
    for index in np.ndindex(matrix.shape):
        shift = np.zeros_like(matrix)
        shift[index] = step
        up, down = function(matrix + shift), function(matrix - shift)
        result[index] = (float(up) - float(down)) / (2 * step)
    return result


def with_singular_values(rng, rows, values):
    left, _ = np.linalg.qr(rng.normal(size=(rows, len(values))))
    right, _ = np.linalg.qr(rng.normal(size=(len(values), len(values))))
    return left * np.asarray(values) @ right.T


# What METHOD asks every form to survive.
HARD = {
    "zero": np.zeros((5, 3)),
    "zero row": np.diag([1.0, 0.0, 2.0]),
    "zero column": np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]),
    "duplicate columns": np.array([[1.0, 1.0], [2.0, 2.0], [-1.0, -1.0]]),
    "rank 1": np.outer([1.0, 2.0, 3.0, 4.0], [1.0, -1.0, 2.0]),
    "rank 1, wide range": np.outer(np.logspace(-6, 6, 40), np.logspace(-3, 3, 20)),
    "1x1": np.array([[3.0]]),
    "1x1 zero": np.array([[0.0]]),
    "wide": np.arange(12.0).reshape(2, 6),
    "tall": np.arange(12.0).reshape(6, 2),
    "tiny": 1e-30 * np.arange(12.0).reshape(6, 2),
    "huge": 1e30 * np.arange(12.0).reshape(6, 2),
    "small": 1e-6 * np.arange(12.0).reshape(6, 2),
    "99.9 % zeros": np.where(np.random.default_rng(1).random((200, 100)) < 0.001, 1.0, 0.0),
    "all ones": np.ones((256, 256)),
}
FORMS = {
    "log_ratio": functional.log_ratio,
    "authors": functional.authors_penalty,
    "orthogonal": functional.orthogonality,
}


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32, tf.float64])
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("form", [*FORMS, "transformed_l1"])
def test_hard_matrices_have_a_finite_value_and_gradient(form, name, dtype):
    limit = float(dtype.max)
    matrix = functional.matrices(tf.cast(np.clip(HARD[name], -limit, limit), dtype))
    penalty = FORMS.get(form, functional.transformed_l1)
    with tf.GradientTape() as tape:
        tape.watch(matrix)
        value = penalty(matrix)
    slope = tape.gradient(value, matrix)
    assert value.dtype == (tf.float64 if dtype == tf.float64 else tf.float32)
    assert slope.dtype == dtype
    assert np.all(tf.math.is_finite(value))
    assert np.all(tf.math.is_finite(slope))


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
@pytest.mark.parametrize("form", [*FORMS, "transformed_l1"])
def test_integers_count_as_floats(form, dtype):
    matrix = np.arange(6).reshape(3, 2)
    penalty = FORMS.get(form, functional.transformed_l1)
    value = penalty(matrix.astype(dtype))
    assert value.dtype == tf.float32
    np.testing.assert_allclose(value, penalty(matrix.astype("float32")), rtol=1e-6)


@pytest.mark.parametrize("a", [1e-12, 1e-3, 1.0, 1e30])
def test_transformed_l1_and_its_slope_are_exact_at_every_scale(a):
    sizes = np.array([1e-30, 1e-12, 1e-3, 0.5, 65504.0, 1e30])
    x = tf.constant([*sizes, *-sizes, 0.0], tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = functional.transformed_l1(x, a)
    exact = np.abs(x.numpy().astype("float64"))
    np.testing.assert_allclose(value, (a + 1) * exact / (a + exact), rtol=1e-6)
    slope = np.sign(x.numpy().astype("float64")) * (a + 1) * a / (a + exact) ** 2
    np.testing.assert_allclose(tape.gradient(value, x), slope, rtol=1e-5, atol=1e-37)
    half = tf.constant([0.25, 65504.0], tf.float16)
    expected = (a + 1) * half.numpy().astype("float64") / (a + half.numpy().astype("float64"))
    np.testing.assert_allclose(functional.transformed_l1(half, a), expected, rtol=1e-6)


@pytest.mark.parametrize("compiled", [None, False, True], ids=["eager", "graph", "xla"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_broken_matrix_shows_and_leaves_its_neighbours_alone(form, dtype, compiled, rng):
    sound = rng.normal(size=(6, 4))
    one, beside_zeros, every = sound.copy(), np.zeros((6, 4)), np.full((6, 4), np.nan)
    one[2, 1] = beside_zeros[0, 0] = np.nan
    unbounded = sound.copy()
    unbounded[5, 3] = np.inf
    stack = np.stack([sound, one, beside_zeros, every, unbounded, np.zeros((6, 4))]).astype(dtype)
    function = FORMS[form]

    def both(matrix):
        with tf.GradientTape() as tape:
            tape.watch(matrix)
            value = function(matrix)
        return value, tape.gradient(value, matrix)

    run = both if compiled is None else tf.function(both, jit_compile=compiled)
    values, slopes = (part.numpy() for part in run(tf.constant(stack)))
    np.testing.assert_array_equal(np.isnan(values), [False, True, True, True, True, False])
    assert np.isnan(slopes[1:5]).any(axis=(1, 2)).all()
    for index in (0, 5):
        value, slope = gradient(function, stack[index])
        np.testing.assert_allclose(values[index], value, rtol=1e-6)
        np.testing.assert_allclose(slopes[index], slope, rtol=1e-4, atol=1e-6)


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=8),
        elements=st.floats(-1e6, 1e6, width=32),
    )
)
def test_any_matrix_has_a_finite_value_and_gradient(matrix):
    tall = functional.matrices(matrix).numpy()
    for function in FORMS.values():
        value, slope = gradient(function, tall)
        assert np.isfinite(value).all()
        assert np.isfinite(slope).all()
        assert (value >= 0).all()


@given(
    hnp.arrays(
        np.float64, st.tuples(st.integers(1, 9), st.integers(1, 6)), elements=st.floats(-10, 10)
    ),
)
def test_log_ratio_bounds_the_condition_number(matrix):
    """Check kappa < 2 exp(n C / 2) on the ridged spectrum (Guggenheimer, Edelman & Johnson)."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    size = tall.shape[1]
    constraint = float(functional.log_ratio(tall, ridge=RIDGE))
    eigenvalues = np.linalg.svd(tall, compute_uv=False) ** 2
    if eigenvalues.sum() < 1e-30:
        return
    ridged = eigenvalues * size / eigenvalues.sum() + RIDGE
    log_kappa = 0.5 * math.log(ridged.max() / ridged.min())
    assert log_kappa < math.log(2) + size * constraint / 2 + 1e-6


@given(st.lists(st.floats(0.05, 20), min_size=1, max_size=6), st.integers(0, 10_000))
def test_log_ratio_without_a_ridge_bounds_the_condition_number_itself(values, seed):
    matrix = with_singular_values(np.random.default_rng(seed), len(values) + 2, values)
    constraint = float(functional.log_ratio(matrix, ridge=0.0))
    kappa = np.linalg.cond(matrix)
    assert kappa < 2 * math.exp(len(values) * constraint / 2) * (1 + 1e-9)
    eigenvalues = np.linalg.svd(matrix, compute_uv=False) ** 2
    expected = math.log(eigenvalues.mean()) - np.log(eigenvalues).mean()
    assert constraint == pytest.approx(expected, abs=1e-9)


def test_log_ratio_is_zero_exactly_for_equal_singular_values(rng):
    equal = with_singular_values(rng, 7, [3.0] * 4)
    unequal = with_singular_values(rng, 7, [3.0, 3.0, 3.0, 2.9])
    assert float(functional.log_ratio(equal)) == pytest.approx(0.0, abs=1e-12)
    assert float(functional.log_ratio(unequal)) > 1e-4


@given(st.floats(1e-6, 1e6), st.integers(0, 1000))
def test_log_ratio_does_not_depend_on_scale_or_rotation(scale, seed):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(6, 4))
    rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    expected = float(functional.log_ratio(matrix))
    assert float(functional.log_ratio(scale * rotation @ matrix)) == pytest.approx(expected)


def test_log_ratio_of_the_zero_matrix_is_the_largest_value():
    assert float(functional.log_ratio(np.zeros((4, 3)))) == pytest.approx(
        math.log((1 + RIDGE) / RIDGE)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(3, 3), (6, 4), (5, 1)])
def test_gradients_equal_finite_differences_in_float64(form, shape, rng):
    matrix = rng.normal(size=shape)
    _, slope = gradient(FORMS[form], matrix)
    numeric = finite_differences(FORMS[form], matrix)
    np.testing.assert_allclose(slope, numeric, rtol=2e-5, atol=1e-6)


def test_log_ratio_pulls_on_a_dying_column_within_its_bound_and_not_on_a_dead_one(rng):
    matrix = rng.normal(size=(8, 4))
    strongest = 0.0
    for size in np.logspace(-8, 0, 60):
        dying = matrix.copy()
        dying[:, 2] *= size / np.linalg.norm(matrix[:, 2])
        _, slope = gradient(functional.log_ratio, dying)
        bound = math.sqrt(4 / np.sum(dying**2) / RIDGE) / 4
        pull = np.linalg.norm(slope[:, 2])
        strongest = max(strongest, pull / bound)
        assert pull <= bound
    assert strongest > 0.5, "the bound should be nearly met somewhere"
    matrix[:, 2] = 0.0
    _, slope = gradient(functional.log_ratio, matrix)
    assert np.all(slope[:, 2] == 0.0)


def test_authors_penalty_is_their_formula(rng):
    matrix = rng.normal(size=(9, 3))
    expected = math.log(1e-5 + np.linalg.det(matrix.T @ matrix / 3)) ** 2
    value = float(functional.authors_penalty(matrix))
    assert value == pytest.approx(expected, rel=1e-6)


def test_authors_penalty_is_blind_where_its_docstring_says_so(rng):
    glorot = rng.uniform(-1, 1, size=(512, 128)) * math.sqrt(6 / 640)
    value, slope = gradient(functional.authors_penalty, glorot.astype(np.float32))
    assert value == pytest.approx(132.55, abs=0.01)
    assert np.all(slope == 0.0)
    spread = float(functional.authors_penalty(np.diag([100.0, 0.01])))
    even = float(functional.authors_penalty(np.diag([1.0, 1.0])))
    assert spread == pytest.approx(even, rel=0.02)  # the ridge lifts 0.01 a little


def test_orthogonality_is_its_formula(rng):
    matrix = rng.normal(size=(9, 3))
    gram = matrix.T @ matrix
    expected = np.linalg.norm(gram * 3 / np.trace(gram) - np.eye(3)) ** 2
    assert float(functional.orthogonality(matrix)) == pytest.approx(expected)


def test_a_stack_of_matrices_is_a_stack_of_values(rng):
    stack = rng.normal(size=(5, 6, 4))
    for function in FORMS.values():
        singly = [float(function(matrix)) for matrix in stack]
        np.testing.assert_allclose(function(stack), singly)


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e6))
def test_transformed_l1_is_its_formula(x, a):
    expected = (a + 1) * abs(x) / (a + abs(x))
    value = float(functional.transformed_l1(tf.constant(x, tf.float64), a))
    assert value == pytest.approx(expected, rel=1e-12)
    assert value < a + 1


def test_transformed_l1_tends_to_its_two_limits():
    x = np.array([-3.0, 0.0, 0.5])
    np.testing.assert_allclose(functional.transformed_l1(x, 1e12), np.abs(x), rtol=1e-9)
    np.testing.assert_allclose(functional.transformed_l1(x, 1e-12), [1, 0, 1], rtol=1e-9)


def test_transformed_l1_has_the_slope_of_its_docstring():
    x = np.array([-2.0, -0.1, 0.0, 0.3, 5.0])
    _, slope = gradient(lambda t: tf.reduce_sum(functional.transformed_l1(t, 0.7)), x)
    np.testing.assert_allclose(slope, np.sign(x) * 1.7 * 0.7 / (0.7 + np.abs(x)) ** 2)


def test_canonical_reads_each_layout(rng):
    conv = rng.normal(size=(3, 3, 4, 6))
    read = functional.canonical(conv).numpy()
    assert read.shape == (1, 9, 4, 6)
    assert read[0, 5, 2, 3] == conv[1, 2, 2, 3]
    transposed = functional.canonical(conv, "transposed").numpy()
    assert transposed.shape == (1, 9, 6, 4)
    assert transposed[0, 5, 3, 2] == conv[1, 2, 2, 3]
    depthwise = functional.canonical(conv, "depthwise").numpy()
    assert depthwise.shape == (4, 9, 1, 6)
    assert depthwise[2, 5, 0, 3] == conv[1, 2, 2, 3]
    grouped = functional.canonical(conv, channel_groups=2).numpy()
    assert grouped.shape == (2, 9, 4, 3)
    assert grouped[1, 5, 2, 0] == conv[1, 2, 2, 3]


def test_matrices_are_tall_and_keep_the_singular_values(rng):
    wide = rng.normal(size=(3, 8))
    tall = functional.matrices(wide).numpy()
    assert tall.shape == (1, 8, 3)
    np.testing.assert_allclose(
        np.linalg.svd(tall[0], compute_uv=False), np.linalg.svd(wide, compute_uv=False)
    )


@pytest.mark.parametrize("layout", ["standard", "transposed", "depthwise"])
@pytest.mark.parametrize("groups", ["filter", "input"])
def test_group_norms_cover_each_weight_once(layout, groups, rng):
    kernel = rng.normal(size=(3, 2, 4, 6))
    norms = functional.group_norms(kernel, groups, layout).numpy()
    assert np.sum(norms**2) == pytest.approx(np.sum(kernel**2))
    outputs = {"standard": 6, "transposed": 4, "depthwise": 24}[layout]
    inputs = {"standard": 4, "transposed": 6, "depthwise": 4}[layout]
    assert norms.shape == (outputs if groups == "filter" else inputs,)


def test_group_norms_of_a_dense_kernel_are_its_columns_and_rows(rng):
    kernel = rng.normal(size=(5, 3))
    np.testing.assert_allclose(
        functional.group_norms(kernel, "filter"), np.linalg.norm(kernel, axis=0)
    )
    np.testing.assert_allclose(
        functional.group_norms(kernel, "input"), np.linalg.norm(kernel, axis=1)
    )


def test_the_gradient_of_a_zero_group_is_zero_and_of_another_its_direction():
    kernel = np.array([[0.0, 3.0], [0.0, 4.0]])
    _, slope = gradient(lambda k: tf.reduce_sum(functional.group_norms(k, "filter")), kernel)
    np.testing.assert_allclose(slope, [[0.0, 0.6], [0.0, 0.8]])


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_group_norms_neither_vanish_nor_overflow_in_float32(size):
    kernel = tf.constant([[3.0], [4.0]]) * size
    assert float(functional.group_norms(kernel, "filter")[0]) == pytest.approx(5 * size)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="rank >= 2"):
        functional.canonical(np.zeros(3))
    with pytest.raises(ValueError, match="layout must be one of"):
        functional.canonical(np.zeros((3, 3)), "dense")
    with pytest.raises(ValueError, match="channel_groups must divide"):
        functional.canonical(np.zeros((3, 4)), channel_groups=3)
    with pytest.raises(ValueError, match="groups must be one of"):
        functional.group_norms(np.zeros((3, 4)), "row")
