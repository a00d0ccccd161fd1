"""Choosing what to keep: exact counts whatever the ties, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tscnc_tf import functional
from tscnc_tf.functional import scheduling
from tscnc_tf.pruning.step_count import due_between

# Few distinct values, so that most vectors have ties.
TIED = hnp.arrays("float32", st.integers(1, 40), elements=st.integers(-1, 3).map(float))


def first_largest(scores, count):
    """The indices of the `count` largest entries, of equals the first ones."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


@given(TIED, st.integers(-2, 45))
def test_the_largest_are_exactly_so_many_and_of_equals_the_first(scores, count):
    mask = functional.largest(scores, count).numpy()
    np.testing.assert_array_equal(np.flatnonzero(mask), first_largest(scores, max(count, 0)))


@given(
    hnp.arrays(
        st.sampled_from(["float32", "float64"]),
        st.integers(1, 30),
        elements=st.floats(allow_nan=False, width=32),
    ),
    st.integers(0, 30),
)
def test_the_largest_of_any_floats_are_found(scores, count):
    """Tiny, huge, infinite and negative ones, and zeros of both signs."""
    mask = functional.largest(scores, count).numpy()
    np.testing.assert_array_equal(np.flatnonzero(mask), first_largest(scores, count))


@given(TIED, st.data())
def test_entries_are_taken_in_order_until_the_budget_is_spent(scores, data):
    sizes = data.draw(hnp.arrays("int32", len(scores), elements=st.integers(1, 9)))
    budget = data.draw(st.integers(0, int(sizes.sum()) + 3))
    taken, spent = [], 0
    for index in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        spent += sizes[index]
        if spent > budget:
            break
        taken.append(index)
    mask = functional.largest_within(scores, sizes, budget).numpy()
    np.testing.assert_array_equal(np.flatnonzero(mask), sorted(taken))


@given(
    hnp.arrays("float32", (3, 5), elements=st.integers(0, 2).map(float)),
    st.integers(0, 6),
)
def test_every_row_keeps_so_many(scores, count):
    mask = functional.largest_per_row(scores, count).numpy()
    for row, kept in zip(scores, mask, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(kept), first_largest(row, count))


@given(st.integers(1, 10**6), st.floats(0, 0.999))
def test_counts_are_those_of_tfmot(size, sparsity):
    """Its formula, in its own operations (pruning_impl.py)."""
    expected = tf.math.round(tf.cast(size, tf.float32) * (1 - tf.constant(sparsity, tf.float32)))
    count = functional.kept_count(size, sparsity)
    assert int(count) == int(tf.math.maximum(tf.cast(expected, tf.int32), 1))


@pytest.mark.parametrize("jit", [False, True])
def test_counts_may_be_tensors_under_a_compiler(jit):
    scores = np.array([3, 1, 3, 0, 3, 2], "float32")
    spec = [tf.TensorSpec((), tf.int32)]
    largest = tf.function(
        lambda count: functional.largest(scores, count), input_signature=spec, jit_compile=jit
    )
    within = tf.function(
        lambda count: functional.largest_within(scores, np.ones(6, "int32"), count),
        input_signature=spec,
        jit_compile=jit,
    )
    for count in range(7):
        expected = first_largest(scores, count)
        np.testing.assert_array_equal(np.flatnonzero(largest(tf.constant(count))), expected)
        np.testing.assert_array_equal(np.flatnonzero(within(tf.constant(count))), expected)


@pytest.mark.parametrize(
    ("shape", "layout", "groups"),
    [
        ((3, 4), "standard", 1),
        ((2, 3, 4, 6), "standard", 1),
        ((2, 3, 4, 6), "standard", 3),
        ((3, 4, 6), "transposed", 1),
        ((2, 3, 4, 2), "depthwise", 1),
        ((3, 2, 4), "ioo", 1),
        ((3, 2, 4), "oii", 1),
        ((3, 2, 4, 5), "opio", 1),
    ],
)
def test_restoring_is_the_inverse_of_reading(shape, layout, groups, rng):
    kernel = rng.normal(size=shape)
    read = functional.canonical(kernel, layout, groups)
    np.testing.assert_array_equal(functional.restore(read, shape, layout), kernel)


def test_layouts_of_letters_read_the_axes_that_they_name(rng):
    kernel = rng.normal(size=(3, 2, 4))
    read = functional.canonical(kernel, "ioo").numpy()
    np.testing.assert_array_equal(read, kernel.reshape(1, 1, 3, 8))
    read = functional.canonical(kernel, "oip").numpy()
    np.testing.assert_array_equal(read, kernel.transpose(2, 1, 0)[np.newaxis])
    for layout in ("io", "iix", "conv"):
        with pytest.raises(ValueError, match="layout must be one of"):
            functional.canonical(kernel, layout)


def stairs(step):
    """Prunes at steps 2, 4, 6, a quarter at a time."""
    step = tf.cast(step, tf.int64)
    due = (step % 2 == 0) & (step > 0) & (step <= 6)
    return due, tf.minimum(tf.cast(step // 2, tf.float32), 3.0) * 0.25


def scalar_stairs(step):
    """The same, for single steps only."""
    return tf.cond(stairs(step)[0], lambda: True, lambda: False), stairs(step)[1]


def test_what_a_schedule_says_of_its_end_and_renewals():
    assert scheduling.final_sparsity(stairs) == 0.75
    assert scheduling.final_sparsity(lambda step: (True, 0.9)) == 0.9, "not 0.89999998"
    for schedule in (stairs, scalar_stairs):
        assert scheduling.renewals(schedule, 5) == [(2, 0.25), (4, 0.5)]
        assert scheduling.renewals(schedule, 50)[-1] == (6, 0.75)
    assert scheduling.renewals(stairs, 1) == []
    assert scheduling.renewals(scalar_stairs, 10**5) is None


@pytest.mark.parametrize(
    ("before", "now", "due"),
    [(0, 1, False), (1, 2, True), (2, 2, False), (2, 5, True), (6, 9, False)],
)
def test_a_renewal_that_was_passed_over_is_still_due(before, now, due):
    found, sparsity = due_between(stairs, tf.constant(before, tf.int64), tf.constant(now, tf.int64))
    assert bool(found) == due
    assert float(sparsity) == float(stairs(now)[1])
