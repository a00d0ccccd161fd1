"""Layer budgets by condition numbers."""

import itertools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import FLAVOURS, dense_model
from hypothesis import given, settings
from hypothesis import strategies as st

import tscnc_tf as tscnc
from tscnc_tf import inspection, pruning
from tscnc_tf.pruning import Unstructured, budgets

SPARSITY = 0.9


@pytest.fixture(params=FLAVOURS.values(), ids=FLAVOURS)
def library(request):
    return request.param


def wider(library):
    """Three kernels that become ill-conditioned at different sparsities."""
    library.utils.set_random_seed(3)
    layers = library.layers
    return library.Sequential(
        [
            library.Input((8, 8, 3)),
            layers.Conv2D(16, 3, name="first"),
            layers.Conv2D(24, 3, groups=2, name="groups"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(20, name="square"),
        ]
    )


def pruned(model, scope, sparsity=SPARSITY):
    model = tscnc.prune_now(model, sparsity, scope=scope, structure=Unstructured(1))
    return tscnc.strip(model)


def log_conditions(model):
    rows = inspection.condition_numbers(model).rows
    return [math.log(min(row.condition_number, 1e6)) for row in rows]


def test_all_keep_as_much_as_at_one_sparsity_and_condition_numbers_are_lower(library):
    model, twin = wider(library), wider(library)
    twin.set_weights(model.get_weights())
    scope = pruning.condition_budgets(model, SPARSITY)
    report = pruning.report(
        tscnc.prune_now(model, SPARSITY, scope=scope, structure=Unstructured(1))
    )
    kept = {row.name: row.weights - row.zeros for row in report.rows}
    sizes = {row.name: row.weights for row in report.rows}
    assert set(scope) == set(kept)
    for name, share in scope.items():
        assert kept[name] == pytest.approx(sizes[name] * (1 - share), abs=1)
    total = sum(sizes.values())
    assert sum(size * (1 - scope[name]) for name, size in sizes.items()) == pytest.approx(
        round(total * (1 - SPARSITY)), abs=1e-6
    )
    mine, uniform = log_conditions(tscnc.strip(model)), log_conditions(pruned(twin, "layer"))
    assert sum(mine) < sum(uniform)


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_it_is_never_worse_than_one_sparsity_for_all(sparsity):
    costs = []
    for scope in (pruning.condition_budgets(wider(keras), sparsity), "layer"):
        costs.append(sum(log_conditions(pruned(wider(keras), scope, sparsity))))
    assert costs[0] <= costs[1] + 1e-6


def test_what_a_layer_costs_is_the_condition_number_that_its_pruned_kernel_has():
    model = dense_model(keras, inputs=20)
    (target, _), *_ = pruning.targets.candidates(model)
    curve = budgets._Measure(target, Unstructured(2)).curve(0.1)
    kernel = np.asarray(target.variable)
    filters = np.argsort(-np.abs(kernel), axis=0)[:2]
    assert curve.counts[0] == max(2 * kernel.shape[1], math.ceil(0.1 * kernel.size))
    assert curve.counts[-1] == kernel.size
    for count, cost in zip(curve.counts, curve.costs, strict=True):
        size = np.abs(kernel)
        np.put_along_axis(size, filters, np.inf, axis=0)
        masked = np.where(size >= np.sort(size.ravel())[-count], kernel, 0)
        s = np.linalg.svd(masked.astype(float), compute_uv=False)
        assert cost == pytest.approx(math.log(s[0] / s[-1]), rel=1e-6)


def test_a_singular_kernel_counts_as_one_at_the_limit_of_float32():
    limit = math.log(1 / (3 * np.finfo(np.float32).eps))
    for matrix in (np.diag([1.0, 1.0, 0.0]), np.zeros((3, 3)), np.diag([1.0, 1.0, 1e-12])):
        assert budgets._log_condition(tf.constant(matrix[None])) == pytest.approx(limit)
    two = np.stack([np.eye(3), np.diag([4.0, 2.0, 1.0])])
    assert budgets._log_condition(tf.constant(two)) == pytest.approx(math.log(4)), (
        "the worst of the groups"
    )


curves = st.lists(
    st.lists(st.tuples(st.integers(1, 9), st.floats(0, 5)), min_size=1, max_size=4).map(
        lambda points: budgets._Curve(
            list(itertools.accumulate(gap for gap, _ in points)), [cost for _, cost in points]
        )
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60)
@given(curves, st.floats(0, 1))
def test_no_other_way_to_share_is_better(curves, where):
    """Against all ways there are, on the numbers of weights that were tried."""
    least, most = sum(c.counts[0] for c in curves), sum(c.counts[-1] for c in curves)
    total = round(least + where * (most - least))
    kept = budgets._share(curves, total)
    assert sum(kept) == total
    assert all(c.counts[0] <= k <= c.counts[-1] for c, k in zip(curves, kept, strict=True))
    # After whole steps, nothing that takes as many weights is better; nor fewer, on the way down.
    steps = sorted((s, i, n) for i, c in enumerate(curves) for s, n in budgets._hull(c))
    reached = [c.counts[0] for c in curves]
    for slope, layer, count in steps:
        reached[layer] = count
        price = [dict(zip(c.counts, c.costs, strict=True)) for c in curves]
        mine = sum(p[k] for p, k in zip(price, reached, strict=True))
        for other in itertools.product(*(c.counts for c in curves)):
            if sum(other) == sum(reached) or (slope <= 0 and sum(other) < sum(reached)):
                assert mine <= sum(p[k] for p, k in zip(price, other, strict=True)) + 1e-9


def test_frozen_layers_take_no_part(library):
    model = wider(library)
    model.get_layer("first").trainable = False
    scope = pruning.condition_budgets(model, 0.8, min_per_filter=1)
    assert set(scope) == {"groups", "square"}
    pruning.prune_now(model, 0.8, scope=scope, structure=Unstructured(1))
    rows = {row.name: row for row in pruning.report(model).rows}
    assert not rows["first"].pruned and rows["first"].zeros == 0
    pruned_rows = rows["groups"], rows["square"]
    kept = sum(row.weights - row.zeros for row in pruned_rows)
    assert kept == round(0.2 * sum(row.weights for row in pruned_rows))


def test_names_that_read_as_patterns_are_names_first():
    layers = keras.layers
    named = [layers.Dense(8, name="head[0]"), layers.Dense(8, name="head*"), layers.Dense(4)]
    model = keras.Sequential([keras.Input((16,)), *named])
    scope = pruning.condition_budgets(model, 0.5, layers=["head[0]", "head*"])
    assert set(scope) == {"head[0]", "head*"}
    pruning.prune_now(model, 0.5, layers="head[0]", scope={"head[0]": 0.25})
    assert [row.zeros for row in pruning.report(model).rows] == [32, 0, 0]


def test_bad_input_is_named(library):
    model = dense_model(library)
    for value in (0.0, 1.0):
        with pytest.raises(ValueError, match="sparsity must be"):
            pruning.condition_budgets(model, value)
    with pytest.raises(ValueError, match="lowest must be > 0"):
        pruning.condition_budgets(model, 0.5, lowest=0.0)
    with pytest.raises(ValueError, match="min_per_filter must be >= 0"):
        pruning.condition_budgets(model, 0.5, min_per_filter=-1)
    with pytest.raises(ValueError, match=r"keep 7 weights in all, fewer than the 22 that"):
        pruning.condition_budgets(model, 0.9, min_per_filter=2)
    with pytest.raises(ValueError, match="chooses none of the layers that have some"):
        pruning.condition_budgets(model, 0.5, layers="nothing")
    kernel = np.asarray(model.layers[-1].kernel)
    model.layers[-1].kernel.assign(np.where(kernel == kernel.max(), np.nan, kernel))
    with pytest.raises(ValueError, match="that are NaN or infinite, in logits"):
        pruning.condition_budgets(model, 0.5)
