"""Balls: closed forms, and the promise never to leave them."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tscnc_tf.functional import balls

NORMS = balls.NORMS


def test_projection_is_the_nearest_point():
    delta = tf.constant([[3.0, -4.0], [0.3, 0.4], [0.0, 0.0]])
    np.testing.assert_allclose(
        balls.project(delta, 1.0, "l2"), [[0.6, -0.8], [0.3, 0.4], [0, 0]], rtol=1e-6
    )
    np.testing.assert_allclose(balls.project(delta, 1.0, "linf"), [[1, -1], [0.3, 0.4], [0, 0]])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e18])
def test_projection_at_any_scale(norm, scale, rng):
    delta = tf.constant(rng.standard_normal((8, 3, 4)) * 10 * scale, tf.float32)
    reach = balls.lengths(balls.project(delta, scale, norm) / scale, norm)
    np.testing.assert_allclose(reach, np.ones(8), rtol=1e-5)


def test_steepest_ascent_has_length_one_and_gains_most(rng):
    gradient = rng.standard_normal((5, 7))
    gradient[2] = 0
    sign, unit = (balls.steepest_ascent(tf.constant(gradient), norm) for norm in ("linf", "l2"))
    np.testing.assert_array_equal(sign, np.sign(gradient))
    lengths = np.linalg.norm(gradient, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, gradient / np.where(lengths, lengths, 1), rtol=1e-12)


def test_steepest_ascent_of_a_tiny_gradient():
    gradient = tf.constant([[3e-30, -4e-30]])
    np.testing.assert_allclose(balls.steepest_ascent(gradient, "l2"), [[0.6, -0.8]], rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_are_uniform_in_the_ball(norm):
    points = balls.random_start((20000, 3), 0.5, norm, tf.constant([1, 2]), tf.float32)
    lengths = balls.lengths(points, norm).numpy()
    assert lengths.max() <= 0.5 * (1 + 1e-6)
    # In three dimensions the share of the ball within radius r is (r / epsilon)^3, in both norms.
    for radius in (0.2, 0.3, 0.4):
        assert abs(np.mean(lengths < radius) - (radius / 0.5) ** 3) < 0.012
    assert np.abs(points.numpy().mean(axis=0)).max() < 0.01


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_follow_their_seed(norm):
    def draw(*seed):
        return balls.random_start((4, 3), 0.5, norm, tf.constant(seed), tf.float32).numpy()

    np.testing.assert_array_equal(draw(1, 2), draw(1, 2))
    assert np.all(draw(1, 2) != draw(1, 3))


def test_normal_draws_are_normal():
    draws = balls.normal((40000,), tf.constant([3, 4]), tf.float32).numpy()
    assert abs(draws.mean()) < 0.02 and abs(draws.std() - 1) < 0.02
    for quantile, share in ((-1.0, 0.1587), (0.5, 0.6915), (2.0, 0.9772)):
        assert abs(np.mean(draws < quantile) - share) < 0.01


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64])
def test_draws_are_the_same_with_xla(dtype):
    def draw(seed):
        starts = [balls.random_start((5, 6), 0.5, norm, seed, dtype) for norm in NORMS]
        return *starts, balls.normal((5, 6), seed, dtype)

    seed = tf.constant([1, 2])
    for plain, compiled in zip(draw(seed), tf.function(draw, jit_compile=True)(seed), strict=True):
        np.testing.assert_allclose(plain, compiled, rtol=1e-4, atol=1e-6)


def test_lengths():
    delta = tf.constant([[[3.0], [-4.0]], [[0.0], [1.0]]])
    np.testing.assert_allclose(balls.lengths(delta, "l2"), [5, 1])
    np.testing.assert_allclose(balls.lengths(delta, "linf"), [4, 1])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    epsilon=st.floats(1e-4, 2.0),
    norm=st.sampled_from([*NORMS, "l1"]),
    dtype=st.sampled_from(["float16", "bfloat16", "float32", "float64"]),
    scale=st.sampled_from([1.0, 255.0]),
)
def test_points_rounded_inside_have_not_left_the_ball(seed, epsilon, norm, dtype, scale):
    generator = np.random.default_rng(seed)
    wide = tf.float64 if dtype == "float64" else tf.float32
    center = tf.cast(generator.uniform(-scale, scale, (4, 10)), dtype)
    delta = tf.constant(generator.standard_normal((4, 10)) * 2 * epsilon, wide)
    point = tf.cast(center, wide) + balls.project(delta, epsilon, norm)
    rounded = balls.round_inside(center, point, epsilon, norm)
    assert rounded.dtype == center.dtype
    offset = tf.cast(rounded, tf.float64) - tf.cast(center, tf.float64)
    assert balls.lengths(offset, norm).numpy().max() <= epsilon * (1 + 1e-6) + 1e-7
    # Nor has rounding taken away more than the last digit of the dtype.
    lost = tf.abs(tf.cast(rounded, tf.float64) - tf.cast(point, tf.float64))
    digit = {"float16": 2**-10, "bfloat16": 2**-7}.get(dtype, 2**-22)
    assert np.all(lost <= digit * np.maximum(np.abs(tf.cast(point, tf.float64)), 1e-3))
