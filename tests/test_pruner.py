"""The mask engine: which weights it prunes, how many, when; in both Kerases."""

from __future__ import annotations

import itertools
import math

import keras
import numpy as np
import pytest
import scipy.optimize
import tensorflow as tf
import tf_keras
from helpers import FLAVOURS, blobs, conv_model, dense_model, images
from hypothesis import given, settings
from hypothesis import strategies as st

from tscnc_tf import inspection, pruning, schedules
from tscnc_tf._keras import flavours, optimizers
from tscnc_tf.pruning import NM, Block, Filters, Pruner, Unstructured
from tscnc_tf.pruning.scopes import scope_for
from tscnc_tf.pruning.targets import Target


def loss(library):
    return library.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.fixture(params=FLAVOURS)
def library(request):
    return FLAVOURS[request.param]


def values(model):
    """The pruned weights by name, and their masks."""
    pruner = model.pruner
    return {
        target.name: (np.asarray(target.variable), mask.numpy())
        for target, mask in zip(pruner.targets, pruner.state.masks, strict=True)
    }


def zeros(model):
    return {name: int(np.sum(weight == 0)) for name, (weight, _) in values(model).items()}


def assert_masked(model):
    for weight, mask in values(model).values():
        np.testing.assert_array_equal(weight == 0, ~mask)
        assert not np.any(np.signbit(weight) & (weight == 0)), "no zero is negative"


# What is pruned, whatever the model is made of


def own_layer(library):
    class TwoKernels(library.layers.Layer):
        """A layer with several kernels, that no list of layers knows."""

        def build(self, input_shape):
            width = input_shape[-1]
            for name in ("first", "second"):
                kernel = self.add_weight(
                    name=name, shape=(width, width), initializer="glorot_normal"
                )
                setattr(self, name, kernel)
            self.matrix_bias = self.add_weight(name="bias", shape=(1, width), initializer="ones")

        def call(self, inputs):
            return tf.matmul(tf.matmul(inputs, self.first), self.second) + self.matrix_bias

    return TwoKernels(name="own")


def subclassed(library):
    class Net(library.Model):
        def __init__(self):
            super().__init__(name="net")
            self.first = library.layers.Dense(5, name="first", activation="relu")
            self.block = library.Sequential([library.layers.Dense(4, name="inner")], name="block")
            self.last = library.layers.Dense(3, name="last")

        def call(self, inputs, training=False):
            return self.last(self.block(self.first(inputs)))

    model = Net()
    model(np.zeros((1, 6), "float32"))
    return model


def functional(library, shape, *layers):
    x = inputs = library.Input(shape)
    for layer in layers:
        x = layer(x)
    return library.Model(inputs, x)


def attention(library):
    inputs = library.Input((5, 4))
    layer = library.layers.MultiHeadAttention(2, 3, name="mha")
    return library.Model(inputs, layer(inputs, inputs))


def shared(library):
    inputs = library.Input((6,))
    layer = library.layers.Dense(6, name="twice")
    return library.Model(inputs, library.layers.Dense(3, name="once")(layer(layer(inputs))))


def nested(library):
    inner = functional(library, (6,), library.layers.Dense(5, name="deep"))
    return functional(library, (6,), inner, library.layers.Dense(3, name="last"))


def recurrent(library):
    layers = library.layers
    lstm = layers.LSTM(3, return_sequences=True, name="lstm")
    both = layers.Bidirectional(layers.GRU(2, name="gru"), name="both")
    return functional(library, (5, 4), lstm, both)


ZOO = {
    "subclassed": (subclassed, {"first": 30, "inner": 20, "last": 12}),
    "own layer": (
        lambda lib: functional(lib, (4,), own_layer(lib)),
        {"own/first": 16, "own/second": 16},
    ),
    "attention": (
        attention,
        {"mha/query/kernel": 24, "mha/key/kernel": 24, "mha/value/kernel": 24}
        | {"mha/attention_output": 24},
    ),
    "einsum": (
        lambda lib: functional(
            lib, (5, 4), lib.layers.EinsumDense("abc,cd->abd", (None, 6), name="einsum")
        ),
        {"einsum": 24},
    ),
    "depthwise": (
        lambda lib: functional(lib, (8, 8, 3), lib.layers.DepthwiseConv2D(3, name="depth")),
        {"depth": 27},
    ),
    "separable": (
        lambda lib: functional(lib, (8, 8, 3), lib.layers.SeparableConv2D(4, 3, name="sep")),
        {"sep/depthwise_kernel": 27, "sep/pointwise_kernel": 12},
    ),
    "grouped": (
        lambda lib: functional(lib, (8, 8, 4), lib.layers.Conv2D(6, 3, groups=2, name="groups")),
        {"groups": 9 * 2 * 6},
    ),
    "transposed": (
        lambda lib: functional(lib, (4, 4, 3), lib.layers.Conv2DTranspose(2, 3, name="up")),
        {"up": 54},
    ),
    "shared": (shared, {"twice": 36, "once": 18}),
    "nested": (nested, {"deep": 30, "last": 15}),
    "recurrent": (
        recurrent,
        {
            "lstm/lstm_cell/kernel": 48,
            "lstm/lstm_cell/recurrent_kernel": 36,
            "both/forward/kernel": 18,
            "both/forward/recurrent_kernel": 12,
            "both/backward/kernel": 18,
            "both/backward/recurrent_kernel": 12,
        },
    ),
}


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.filterwarnings("ignore:At a sparsity")
def test_every_kernel_is_pruned_to_its_exact_count(name, library):
    build, expected = ZOO[name]
    model = build(library)
    before = [np.asarray(weight) for weight in model.get_weights()]
    plain_class, weights = type(model), [id(variable) for variable in model.weights]
    pruned = pruning.prune_now(model, 0.75)
    assert pruned is model
    assert isinstance(model, plain_class)
    assert [id(variable) for variable in model.weights] == weights, "masks are no weights"
    found = values(model)
    sizes = sorted(weight.size for weight, _ in found.values())
    assert sizes == sorted(expected.values())
    if name != "recurrent":  # whose cells each Keras names in its own way
        assert {n: weight.size for n, (weight, _) in found.items()} == expected
    for weight, mask in found.values():
        assert np.sum(mask) == round(weight.size * 0.25)
    assert_masked(model)
    for was, now in zip(before, model.get_weights(), strict=True):
        kept = now != 0
        np.testing.assert_array_equal(now[kept], was[kept], "what is kept stays bit for bit")
    assert pruning.strip(model) is model
    assert type(model) is plain_class


def test_magnitude_keeps_the_largest_in_every_layer(library):
    model = conv_model(library)
    kernels = {k.name: np.asarray(k.kernel) for k in (model.get_layer("conv"), model.layers[-1])}
    pruning.prune_now(model, 0.5)
    for name, (weight, _) in values(model).items():
        kernel = kernels[name]
        kept = np.sort(np.abs(kernel).ravel())[-round(kernel.size / 2) :]
        np.testing.assert_array_equal(weight, np.where(np.abs(kernel) >= kept[0], kernel, 0))


def test_both_engines_choose_the_same_weights():
    x, y = blobs(16)
    first, second = dense_model(), dense_model()
    second.set_weights(first.get_weights())
    first = pruning.prune(first, schedules.OneShot(0.7), engine="tfmot")
    second = pruning.prune(second, schedules.OneShot(0.7), engine="masks")
    from tscnc_tf import callbacks

    for model in (first, second):
        model.compile(tf_keras.optimizers.SGD(0.0), loss(tf_keras))
        model.fit(x, y, verbose=0, callbacks=callbacks.pruning_callbacks())
    for one, other in zip(pruning.strip(first).get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_no_kernel_is_pruned_only_if_chosen(library):
    layers = library.layers
    model = functional(
        library,
        (4,),
        layers.Embedding(10, 6, name="words"),
        layers.PReLU(name="prelu"),
        layers.Dense(3, name="dense"),
    )
    report = pruning.report(pruning.prune_now(model, 0.5))
    assert [(row.name, row.pruned) for row in report.rows] == [
        ("words", False),
        ("prelu", False),
        ("dense", True),
    ]
    assert "'embeddings' is no kernel; choose its layer by layers=" in report.rows[0].reason
    assert "'alpha' is no kernel" in report.rows[1].reason
    pruning.strip(model)
    report = pruning.report(pruning.prune_now(model, 0.5, layers=["words", "dense"]))
    assert [row.reason for row in report.skipped] == ["not chosen"]
    assert report.sparsity == 0.5


def test_the_report_gives_every_weight_a_reason_and_both_figures(library):
    model = nested(library)
    model.layers[-1].trainable = False
    inner = model.layers[-2]
    pruning.prune_now(inner, 0.8)
    report = pruning.report(model)
    (deep, last) = report.rows
    assert (deep.name, deep.pruned, deep.reason, deep.zeros) == ("deep", True, "", 24)
    assert (last.name, last.pruned, last.zeros) == ("last", False, 0)
    assert report.sparsity == 0.8
    assert report.model_weights == 30 + 5 + 15 + 3
    assert report.model_zeros == 24 + 5 + 3, "biases begin at zero"
    assert report.model_sparsity == 32 / 53
    text = str(report)
    assert "80.00 %" in text
    assert "32 of 53 weights are zero" in text
    assert report.to_dict()["rows"][0]["shape"] == [6, 5]
    pruning.strip(model)
    with pytest.raises(ValueError, match=r"last.*it is frozen"):
        Pruner(model, schedules.OneShot(0.5), layers="last")


def test_weights_are_chosen_by_type_rank_and_name(library):
    def pruned(model=recurrent, **options):
        pruner = Pruner(model(library), schedules.OneShot(0.5), **options)
        return {len(target.shape) for target in pruner.targets}, [t.name for t in pruner.targets]

    _, names = pruned(weights="*recurrent_kernel")
    assert len(names) == 3
    assert all(name.endswith("recurrent_kernel") for name in names)
    _, names = pruned(layers="lstm", weights="*/kernel")
    assert len(names) == 1
    _, names = pruned(layers=library.layers.Bidirectional)
    assert len(names) == 4
    ranks, _ = pruned(conv_model, min_rank=3)
    assert ranks == {4}
    with pytest.raises(ValueError, match="min_rank must be >= 2, got 1"):
        pruned(min_rank=1)
    ranks, names = pruned(conv_model, layers=lambda layer: layer.name == "logits")
    assert names == ["logits"]


# How much of each: scopes


def sized(*shapes):
    variables = [tf.Variable(tf.zeros(shape)) for shape in shapes]
    return [Target(f"w{i}", None, v, "", 1) for i, v in enumerate(variables)]


def test_global_keeps_the_largest_of_all_and_a_floor_in_each(library):
    model = dense_model(library)
    hidden, last = (np.asarray(layer.kernel) for layer in model.layers[-2:])
    model.layers[-1].kernel.assign(last * 1e-3)
    pruning.prune_now(model, 0.5, scope="global", min_weights=5)
    found = values(model)
    kept = {name: int(mask.sum()) for name, (_, mask) in found.items()}
    assert sum(kept.values()) == 36, "of 72"
    assert kept["logits"] == 5, "its weights are a thousand times smaller, but for the minimum"
    expected = np.sort(np.abs(hidden).ravel())[-31:]
    np.testing.assert_array_equal(np.sort(np.abs(found["hidden"][0]).ravel())[-31:], expected)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5),
    st.floats(0.0, 0.99),
)
def test_erk_densities_follow_their_definition(shapes, sparsity):
    """Against a search for the factor by bisection."""
    sizes = np.array([a * b for a, b in shapes], float)
    raw = np.array([a + b for a, b in shapes]) / sizes
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        if np.sum(np.minimum(middle * raw, 1) * sizes) < (1 - sparsity) * sizes.sum():
            low = middle
        else:
            high = middle
    expected = np.minimum(high * raw, 1) * sizes
    scope = scope_for("erk", sized(*shapes), sparsity, 1)
    counts = scope.counts([int(size) for size in sizes], sparsity, [0] * len(sizes))
    # Each is within one of its share, but for the rounding of the sparsity in float32.
    np.testing.assert_allclose(counts, expected, atol=1 + 1e-5 * sizes.sum())
    assert sum(int(count) for count in counts) == max(round(sizes.sum() * (1 - sparsity)), 1)


def test_erk_leaves_small_layers_denser(library):
    model = functional(
        library,
        (40,),
        library.layers.Dense(40, name="large"),
        library.layers.Dense(4, name="small"),
    )
    pruning.prune_now(model, 0.9, scope="erk")
    report = pruning.report(model)
    assert report.sparsity == pytest.approx(0.9, abs=1e-3)
    large, small = report.rows
    # densities in proportion to (40 + 40) / 1600 and (40 + 4) / 160
    assert (1 - small.sparsity) / (1 - large.sparsity) == pytest.approx(5.5, rel=0.05)


@settings(max_examples=20)
@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=6), st.sampled_from([0.0, 0.5, 0.99]))
def test_ideal_gas_quotas_follow_their_definition(sizes, sparsity):
    """Against a solver; and no layer is starved, as the quotas grow with the sizes."""
    sizes = np.array(sizes, float)
    budget = (1 - sparsity) * sizes.sum()
    scope = scope_for("igq", sized(*((int(size), 1) for size in sizes)), sparsity, 1)
    given, lowest = [int(size) for size in sizes], [0] * len(sizes)
    counts = np.array([int(count) for count in scope.counts(given, sparsity, lowest)])
    assert counts.sum() == max(round(budget), 1) or sizes.sum() > 2**24
    if sparsity == 0.0:
        np.testing.assert_array_equal(counts, sizes)
        return
    factor = scipy.optimize.brentq(
        lambda log: np.sum(sizes / (1 + np.exp(log) * sizes)) - budget, -60, 60, xtol=1e-14
    )
    expected = sizes / (1 + np.exp(factor) * sizes)
    np.testing.assert_allclose(counts, expected, rtol=1e-4, atol=1)


@pytest.mark.parametrize("scope", ["global", "lamp", "erk", "igq"])
def test_all_layers_together_keep_exactly_what_the_sparsity_leaves(scope, library):
    """Six layers of 100 weights with a fair share of 2.5 each."""
    model = functional(library, (10,), *(library.layers.Dense(10) for _ in range(6)))
    with pytest.warns(UserWarning, match="are dead"):
        pruning.prune_now(model, 0.975, scope=scope)
    counts = [int(mask.sum()) for _, mask in values(model).values()]
    assert sum(counts) == 15
    if scope in ("erk", "igq"):
        assert counts == [3, 3, 3, 2, 2, 2]


@pytest.mark.parametrize("scope", ["erk", "igq"])
@pytest.mark.parametrize("sizes", [(5, 3, 1, 7), (6, 6, 5, 1, 9)], ids=str)
@pytest.mark.filterwarnings("ignore:At a sparsity")
def test_on_the_way_down_totals_are_exact_and_no_weight_comes_back(scope, sizes):
    layers = [keras.layers.Dense(size, name=f"dense_{i}") for i, size in enumerate(sizes)]
    model = functional(keras, (7,), *layers)
    schedule = schedules.CosineSparsity(0.0, 0.9, begin_step=1, end_step=40, frequency=1)
    pruner = Pruner(model, schedule, scope=scope)
    before = [np.ones_like(mask) for _, mask in values(model).values()]
    total = sum(mask.size for mask in before)
    for step in range(1, 41):
        pruner.step()
        masks = [mask for _, mask in values(model).values()]
        left = np.float32(total) * (1 - np.float32(schedule(step)[1]))
        assert sum(int(mask.sum()) for mask in masks) == round(float(left))
        assert not any(np.any(new & ~old) for new, old in zip(masks, before, strict=True))
        before = masks
    twin = functional(keras, (7,), *(keras.layers.Dense(size) for size in sizes))
    pruning.prune_now(twin, 0.9, scope=scope)
    at_once = [int(mask.sum()) for _, mask in values(twin).values()]
    assert [int(mask.sum()) for mask in before] == at_once


@pytest.mark.parametrize(
    ("scope", "kept"),
    [
        ("layer", [240, 200]),
        ({"dense_0": 0.8}, [240, 200]),
        *((scope, None) for scope in ("global", "lamp", "erk", "igq")),
    ],
    ids=str,
)
def test_more_minima_than_the_sparsity_leaves(scope, kept, library):
    """A layer of 1,200 weights and one of 600: the sparsity leaves 360 of them."""
    layers = [library.layers.Dense(size, name=f"dense_{i}") for i, size in enumerate((200, 3))]
    model = functional(library, (6,), *layers)
    kernels = [np.abs(np.asarray(layer.kernel)) for layer in layers]

    def best(kernel):
        rows = np.arange(kernel.shape[0])[:, None] == kernel.argmax(axis=0)
        return rows | (np.arange(kernel.shape[1]) == kernel.argmax(axis=1)[:, None])

    minima = [int(best(kernel).sum()) for kernel in kernels]
    pruning.prune_now(model, 0.8, scope=scope, structure=Unstructured(1, 1))
    counts = [int(mask.sum()) for _, mask in values(model).values()]
    assert 360 < sum(minima) < 440
    assert counts == (minima if kept is None else kept)


def test_layer_adaptive_scores_follow_their_definition(library):
    model = dense_model(library)
    kernels = {layer.name: np.asarray(layer.kernel) for layer in model.layers if layer.weights}
    scores = {}
    for name, kernel in kernels.items():
        squares = kernel.ravel().astype(float) ** 2
        scores[name] = np.array([s / squares[squares >= s].sum() for s in squares])
    threshold = np.sort(np.concatenate(list(scores.values())))[-18]
    pruning.prune_now(model, 0.75, scope="lamp")
    assert sum(score.size for score in scores.values()) == 72
    for layer in model.layers:
        if layer.name in kernels:
            expected = (scores[layer.name] >= threshold).reshape(kernels[layer.name].shape)
            np.testing.assert_array_equal(np.asarray(layer.kernel) != 0, expected)


def test_layer_adaptive_scores_of_tiny_weights_and_with_a_minimum(library):
    """The order within a layer stays; what is pruned stays; each filter keeps what it must."""
    model = dense_model(library)
    for layer, factor in zip(model.layers, (1e-20, 1.0), strict=False):
        if layer.weights:
            layer.kernel.assign(factor * np.asarray(layer.kernel))
    schedule = schedules.CosineSparsity(0.0, 0.5, begin_step=1, end_step=3, frequency=1)
    pruner = Pruner(model, schedule, scope="lamp", structure=Unstructured(min_per_filter=1))
    last = [np.ones_like(mask) for _, mask in values(model).values()]
    for _ in range(4):
        pruner.step()
        masks = [mask for _, mask in values(model).values()]
        assert all(mask.any(axis=0).all() for mask in masks)
        assert not any(np.any(mask & ~before) for mask, before in zip(masks, last, strict=True))
        last = masks
    assert sum(int(mask.sum()) for mask in last) == 36


@pytest.mark.parametrize("scope", ["layer", "global", "lamp"])
def test_minima_of_filters_and_inputs_keep_paths_open(scope, library):
    layers = library.layers
    model = functional(
        library,
        (6, 6, 8),
        layers.Conv2D(12, 3, name="conv"),
        layers.GlobalAveragePooling2D(),
        layers.Dense(4, name="dense"),
    )
    kernels = {layer.name: np.asarray(layer.kernel) for layer in model.layers if layer.weights}
    structure = Unstructured(min_per_filter=2, min_per_input=1)
    pruning.prune_now(model, 0.97, scope=scope, structure=structure)
    for layer in model.layers:
        if layer.name not in kernels:
            continue
        sizes = np.abs(kernels[layer.name]).reshape(-1, *kernels[layer.name].shape[-2:])
        kept = (np.asarray(layer.kernel) != 0).reshape(sizes.shape)
        assert kept.sum(axis=(0, 1)).min() >= 2 and kept.sum(axis=(0, 2)).min() >= 1
        # The best two of each filter, and the best one of each input, are among what is kept.
        by_filter = sizes.reshape(-1, sizes.shape[-1])
        for column in range(sizes.shape[-1]):
            best = np.argsort(by_filter[:, column])[-2:]
            assert kept.reshape(by_filter.shape)[best, column].all()
        for row in range(sizes.shape[1]):
            assert kept[:, row].ravel()[np.argmax(sizes[:, row])]
    # 24 and 8 for the filters, and at most one more for each input that they leave out.
    assert sum(int(mask.sum()) for _, mask in values(model).values()) <= 24 + 8 + 8 + 12


def test_ratios_by_name_rise_with_the_schedule(library):
    model = dense_model(library)
    schedule = schedules.CosineSparsity(0.0, 0.75, 0, 2, 1)
    pruner = Pruner(model, schedule, scope={"log*": 0.5})
    pruner.step()
    half = float(schedule(1)[1])
    assert zeros(model) == {"hidden": round(48 * half), "logits": round(24 * half * 0.5 / 0.75)}
    pruner.step()
    assert zeros(model) == {"hidden": 36, "logits": 12}


# Which together: structures


def test_n_of_m_along_the_inputs(library):
    layers = library.layers
    model = functional(
        library,
        (8, 8, 8),
        layers.Conv2D(6, 3, name="conv"),
        layers.GlobalAveragePooling2D(),
        layers.Dense(8, name="dense"),
        layers.Reshape((2, 4)),
        layers.EinsumDense("abc,cde->abde", (None, 2, 3), name="heads"),
    )
    kernels = {layer.name: np.asarray(layer.kernel) for layer in model.layers if layer.weights}
    pruning.prune_now(model, 0.5, structure=NM(2, 4))
    found = values(model)
    rows = {
        "conv": np.moveaxis(kernels["conv"], 2, -1).reshape(-1, 4),
        "heads": kernels["heads"].reshape(4, -1).T,
    }
    for name, row in rows.items():
        weight = found[name][0]
        now = np.moveaxis(weight, 2, -1) if name == "conv" else weight.reshape(4, -1).T
        expected = np.where(np.argsort(np.argsort(-np.abs(row), 1), 1) < 2, row, 0)
        np.testing.assert_array_equal(now.reshape(-1, 4), expected)
    kept = found["dense"][1]
    assert kept[:4].sum(axis=0).tolist() == [2] * 8
    assert kept[4:].sum(axis=0).tolist() == [2] * 8, "of an incomplete group as many"


def test_n_of_m_is_thinned_out_step_by_step(library):
    model = functional(library, (8,), library.layers.Dense(4, name="dense"))
    pruner = Pruner(model, schedules.CosineSparsity(0.0, 0.75, 0, 4, 1), structure=NM(1, 4))
    seen = []
    for _ in range(4):
        pruner.step()
        seen.append(int(np.sum(values(model)["dense"][1])))
    sparsities = [0.75 * (1 - math.cos(math.pi * t / 4)) / 2 for t in (1, 2, 3, 4)]
    assert seen == [8 * math.ceil(4 * (1 - s) - 1e-4) for s in sparsities]
    assert seen[-1] == 8


def test_blocks_are_kept_by_their_mean_magnitude(library):
    model = functional(library, (5,), library.layers.Dense(6, name="dense"))
    kernel = np.asarray(model.layers[-1].kernel)
    pruning.prune_now(model, 0.5, structure=Block(2, 4))
    blocks = {}  # of a 5 × 6 matrix: the last ones are smaller
    for row in range(0, 5, 2):
        for column in range(0, 6, 4):
            blocks[row, column] = kernel[row : row + 2, column : column + 4]
    expected, budget = np.zeros_like(kernel), 15
    for (row, column), block in sorted(blocks.items(), key=lambda item: -np.abs(item[1]).mean()):
        budget -= block.size
        if budget < 0:
            break
        expected[row : row + 2, column : column + 4] = block
    np.testing.assert_array_equal(values(model)["dense"][0], expected)


def test_whole_filters_go_by_their_mean_magnitude(library):
    model = functional(
        library,
        (8, 8, 4),
        library.layers.Conv2D(6, 3, groups=2, name="groups"),
        library.layers.DepthwiseConv2D(3, depth_multiplier=2, name="depth"),
    )
    kernels = {layer.name: layer for layer in model.layers if layer.weights}
    before = {t: np.asarray(layer.weights[0]) for t, layer in kernels.items()}
    with pytest.warns(UserWarning, match="depth makes the model's outputs, and 6 of its 12 would"):
        pruning.prune_now(model, 0.5, structure=Filters(), layers=["groups", "depth"])
    found = values(model)
    means = np.abs(before["groups"]).mean(axis=(0, 1, 2))
    kept = found["groups"][1].all(axis=(0, 1, 2))
    assert set(np.flatnonzero(kept)) == set(np.argsort(-means)[:3])
    means = np.abs(before["depth"]).mean(axis=(0, 1)).ravel()
    kept = found["depth"][1].all(axis=(0, 1)).ravel()
    assert set(np.flatnonzero(kept)) == set(np.argsort(-means)[:6])
    for _, mask in found.values():
        assert np.all(mask.all(axis=(0, 1)) | ~mask.any(axis=(0, 1)))
    report = inspection.condition_numbers(model)
    assert report.dead_filters == 3 + 6


def best_with_a_floor(kernel, groups, least, kept):
    """The `least` largest of every filter, then the largest of the rest, by a loop."""
    size = np.abs(kernel)
    filters = np.split(size, groups, axis=-1) if groups else [size]
    chosen = []
    for part in filters:
        rows = part.reshape(-1, part.shape[-1])
        best = np.zeros_like(rows, bool)
        for output, row in enumerate(rows.T):
            best[np.argsort(-row, kind="stable")[:least], output] = True
        chosen.append(best.reshape(part.shape))
    chosen = np.concatenate(chosen, axis=-1)
    rest = np.argsort(-np.where(chosen, -1.0, size).ravel(), kind="stable")
    chosen.ravel()[rest[: max(0, kept - chosen.sum())]] = True
    return chosen


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("least", [0, 1])
def test_scores_without_an_end_are_no_floor(scope, least, library):
    def infinite(weight):
        return tf.fill(tf.shape(weight), np.inf)

    model = dense_model(library)
    options = {"structure": Unstructured(least), "min_weights": 3}
    pruning.prune_now(model, 0.5, scope=scope, criterion=infinite, **options)
    masks = [mask for _, mask in values(model).values()]
    assert sum(mask.sum() for mask in masks) == 36, "of 72"
    assert least == 0 or all(mask.any(axis=0).all() for mask in masks)


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
def test_every_filter_keeps_its_floor_and_the_largest_the_rest(sparsity, least, library):
    model = functional(
        library,
        (8, 8, 4),
        library.layers.Conv2D(6, 3, groups=2, name="groups"),
        library.layers.Conv2D(12, 3, name="conv"),
        library.layers.Dense(7, name="dense"),
    )
    kernels = {layer.name: np.asarray(layer.weights[0]) for layer in model.layers if layer.weights}
    pruning.prune_now(model, sparsity, structure=Unstructured(min_per_filter=least))
    for name, (_, mask) in values(model).items():
        kept = round(kernels[name].size * (1 - sparsity))
        expected = best_with_a_floor(kernels[name], 2 if name == "groups" else 0, least, kept)
        np.testing.assert_array_equal(mask, expected, err_msg=name)
        assert mask.sum() == max(kept, least * mask.shape[-1])
    assert inspection.condition_numbers(model).dead_filters == 0


def test_a_floor_of_all_is_warned_of_and_depthwise_filters_are_by_channel(library):
    model = functional(library, (8, 8, 3), library.layers.DepthwiseConv2D(3, depth_multiplier=2))
    before = np.asarray(model.layers[-1].weights[0])
    pruning.prune_now(model, 0.99, structure=Unstructured(min_per_filter=2))
    ((_, mask),) = values(model).values()
    largest = np.sort(np.abs(before).reshape(9, 6), axis=0)[-2]
    np.testing.assert_array_equal(mask.reshape(9, 6), np.abs(before).reshape(9, 6) >= largest)
    pruning.strip(model)
    with pytest.warns(UserWarning, match="keeps all of its 54 weights"):
        pruning.prune_now(model, 0.5, structure=Unstructured(min_per_filter=100))
    assert all(mask.all() for _, mask in values(model).values())


def test_with_a_floor_no_filter_dies_along_a_schedule_or_under_one_threshold(library):
    model = dense_model(library)
    model.layers[-1].kernel.assign(1e-3 * np.asarray(model.layers[-1].kernel))
    schedule = schedules.CosineSparsity(0.0, 0.9, begin_step=1, end_step=5, frequency=1)
    structure = Unstructured(min_per_filter=1)
    pruner = Pruner(model, schedule, structure=structure, scope="global")
    last = 72
    for _ in range(6):
        pruner.step()
        masks = [mask for _, mask in values(model).values()]
        assert all(mask.any(axis=0).all() for mask in masks)
        assert sum(mask.sum() for mask in masks) <= last
        last = sum(mask.sum() for mask in masks)
    assert last == sum(mask.shape[-1] for mask in masks), "the minima are more than 7 of 72"


SCOPES = ["layer", "global", "erk", "igq", "lamp"]


@pytest.mark.parametrize(
    ("structure", "scope"),
    [
        *itertools.product([Unstructured(), Unstructured(2), Block(4, 3), Filters()], SCOPES),
        (Block(2, 4), "global"),  # to a scope, whole blocks are units as single weights are
        (NM(2, 4), "layer"),
    ],
    ids=str,
)
def test_a_compiled_step_chooses_what_is_chosen_at_once(structure, scope):
    twin = dense_model(keras)
    weights = twin.get_weights()
    pruning.prune_now(twin, 0.5, structure=structure, scope=scope)
    for jit in (False, True):
        model = dense_model(keras)
        model.set_weights(weights)
        pruner = Pruner(model, schedules.OneShot(0.5), structure=structure, scope=scope)
        tf.function(lambda pruner=pruner: pruner.step(), jit_compile=jit)()
        for one, other in zip(values(model).values(), values(twin).values(), strict=True):
            np.testing.assert_array_equal(one[0], other[0])
        assert any(not mask.all() for _, mask in values(model).values())


def test_a_weight_that_does_not_suit_a_structure_is_skipped_with_its_reason(library):
    model = functional(library, (4,), own_layer(library), library.layers.Dense(3, name="dense"))
    report = pruning.report(pruning.prune_now(model, 0.5, structure=NM(2, 4)))
    reasons = {row.name: row.reason for row in report.skipped}
    assert "not known which of its axes" in reasons["own/first"]
    assert [row.name for row in report.pruned] == ["dense"]
    small = functional(library, (3,), library.layers.Dense(2))
    with pytest.raises(ValueError, match="3 inputs per output, fewer than a group of 4"):
        pruning.prune_now(small, 0.5, structure=NM(2, 4))


@settings(max_examples=20)
@given(
    st.sampled_from([Unstructured(), Block(2, 3), Filters()]),
    st.sampled_from(["layer", "global", "erk", "igq", "lamp"]),
    st.floats(0.0, 0.95),
    st.integers(0, 10**6),
)
def test_sparsity_is_reached_in_every_structure_and_scope(structure, scope, sparsity, seed):
    generator = np.random.default_rng(seed)
    shapes = [(6, 9), (2, 2, 3, 5), (7, 4)]
    targets = [
        Target(f"w{i}", None, tf.Variable(generator.normal(size=shape)), "standard", 1)
        for i, shape in enumerate(shapes)
    ]
    scores = [tf.abs(target.variable) for target in targets]
    chooser = scope_for(scope, targets, sparsity, 1)
    masks = structure.masks(scores, targets, chooser, tf.constant(sparsity, tf.float32))
    kept = sum(int(tf.reduce_sum(tf.cast(mask, tf.int32))) for mask in masks)
    largest = {Unstructured: 1, Block: 6, Filters: 12}[type(structure)]
    total = sum(math.prod(shape) for shape in shapes)
    assert all(bool(tf.reduce_any(mask)) for mask in masks)
    assert abs(kept - total * (1 - sparsity)) <= 3 * largest + 3


# When: steps


def test_steps_are_those_of_the_optimizer(library):
    """A custom loop; calls without a step in between prune nothing, missed calls are caught up."""
    model = dense_model(library)
    pruner = Pruner(model, schedules.CosineSparsity(0.0, 0.75, 0, 10, frequency=4))
    optimizer = library.optimizers.SGD(0.1)

    def descend():
        variables = model.trainable_variables
        flavours.minimize(optimizer, lambda: tf.reduce_sum(model(np.ones((2, 6))) ** 2), variables)

    for _ in range(3):
        descend()
        pruner.step(optimizer)
        pruner.step(optimizer)
    assert pruner.steps == 3
    assert sum(zeros(model).values()) == 0
    assert not pruner.is_behind(optimizer)
    for _ in range(3):  # over step 4, which renews
        descend()
    assert pruner.is_behind(optimizer)
    pruner.step(optimizer)
    assert pruner.steps == 6
    expected = float(schedules.CosineSparsity(0.0, 0.75, 0, 10, 4)(6)[1])
    assert zeros(model)["hidden"] == round(48 * expected)
    optimizer = library.optimizers.Adam()  # begins anew at 0; the schedule does not
    for _ in range(4):
        descend()
        pruner.step(optimizer)
    assert pruner.steps == 10
    assert zeros(model) == {"hidden": 36, "logits": 18}
    assert_masked(model)


def test_without_an_optimizer_each_call_is_a_step(library):
    model = dense_model(library)
    pruner = Pruner(model, schedules.OneShot(0.5, 3))
    seen = []
    for _ in range(4):
        pruner.step()
        seen.append(sum(zeros(model).values()))
    assert seen == [0, 0, 36, 36]


def two_stairs(step):
    """A schedule of one's own: a half at step 2, three quarters at step 4."""
    step = tf.cast(step, tf.int32)
    return (step == 2) | (step == 4), tf.where(step >= 4, 0.75, tf.where(step >= 2, 0.5, 0.0))


@pytest.mark.parametrize(
    "options",
    [{}, {"jit_compile": True}, {"steps_per_execution": 2}, {"run_eagerly": True}],
    ids=str,
)
def test_plain_fit_prunes_by_any_callable_in_every_way_to_run(options, library):
    x, y = blobs(64)
    model = pruning.prune(dense_model(library), two_stairs, engine="masks")
    seen = []

    class Watch(library.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(zeros(self.model)["hidden"])
            assert_masked(self.model)

    model.compile(library.optimizers.Adam(), loss(library), **{"jit_compile": False} | options)
    model.fit(x, y, batch_size=16, verbose=0, callbacks=[Watch()])
    assert seen[-1] == 36
    assert seen == ([24, 36] if "steps_per_execution" in options else [0, 24, 24, 36])
    assert model.pruner.steps == 4


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_a_step_that_a_loss_scale_skips_does_not_count(policy, library):
    model = dense_model(library)
    pruner = Pruner(model, schedules.OneShot(0.5, 2))
    inner = library.optimizers.SGD(0.1)
    wrap = getattr(library.mixed_precision, "LossScaleOptimizer", None)
    wrap = wrap or library.optimizers.LossScaleOptimizer
    optimizer = wrap(inner) if policy != "float32" else inner
    for scale in (1.0, np.inf, 1.0):
        flavours.minimize(
            optimizer,
            lambda scale=scale: scale * tf.reduce_sum(model(np.ones((2, 6))) ** 2),
            model.trainable_variables,
        )
        pruner.step(optimizer)
    # tf_keras' optimizer counts what it skips.
    assert pruner.steps == int(optimizers.iterations(optimizer))
    assert pruner.steps == (2 if policy != "float32" and library is keras else 3)


def test_gradient_accumulation_counts_updates():
    x, y = blobs(64)
    model = pruning.prune(dense_model(keras), schedules.OneShot(0.5, 2))
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    model.compile(optimizer, loss(keras), jit_compile=False)
    model.fit(x, y, batch_size=16, verbose=0)
    assert model.pruner.steps == 2
    assert zeros(model) == {"hidden": 24, "logits": 12}


def test_a_pruned_part_is_pruned_on_in_the_training_of_the_whole(library):
    from tscnc_tf import callbacks

    x, y = blobs(32)
    inner = pruning.prune(dense_model(library, classes=4), schedules.OneShot(0.5), engine="masks")
    model = functional(library, (6,), inner, library.layers.Dense(3, name="head"))
    model.compile(library.optimizers.SGD(0.1), loss(library), jit_compile=False)
    model.fit(x, y, batch_size=16, verbose=0, callbacks=callbacks.pruning_callbacks())
    assert inner.pruner.steps == 2
    assert zeros(inner) == {"hidden": 24, "logits": 16}
    assert_masked(inner)


def test_training_too_short_for_the_schedule_is_warned_of_and_can_be_finished(library):
    from tscnc_tf import callbacks

    x, y = blobs(32)
    schedule = schedules.CosineSparsity(0.0, 0.75, 0, 100, frequency=2)
    model = pruning.prune(dense_model(library), schedule, engine="masks")
    model.compile(library.optimizers.SGD(0.1), loss(library), jit_compile=False)
    with pytest.warns(
        UserWarning, match=r"0.75 in the training planned, steps 1 to 4:.*step 4, to 0.00"
    ):
        model.fit(x, y, 16, epochs=2, verbose=0, callbacks=callbacks.pruning_callbacks())
    model.pruner.finalize()
    assert zeros(model) == {"hidden": 36, "logits": 18}
    model.fit(x, y, 16, verbose=0, callbacks=callbacks.pruning_callbacks())  # no warning now
    assert zeros(model) == {"hidden": 36, "logits": 18}


# What keeps zeros zero


OPTIMIZERS = {
    "momentum": lambda o: o.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda o: o.Adam(0.01, amsgrad=True, use_ema=True),
    "ema overwrites": lambda o: o.SGD(0.1, use_ema=True, ema_overwrite_frequency=2),
    "rmsprop": lambda o: o.RMSprop(0.01, momentum=0.9, centered=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_zero_in_weights_slots_and_averages(name, library):
    x, y = images(48)
    model = conv_model(library)
    optimizer = OPTIMIZERS[name](library.optimizers)
    model.compile(optimizer, loss(library), jit_compile=False)
    model.fit(x, y, batch_size=16, verbose=0)  # dense: slots and averages fill up
    pruning.prune_now(model, 0.75)
    before = {n: mask for n, (_, mask) in values(model).items()}
    model.fit(x, y, batch_size=16, epochs=2, verbose=0)
    slots = {"momentum": 1, "adam": 4, "ema overwrites": 1, "rmsprop": 3}[name]
    for target in model.pruner.targets:
        (kept,) = optimizers.companions(model.optimizer, [target.variable])
        assert len(kept) >= slots
        for companion in kept:
            assert np.all(np.asarray(companion)[~before[target.name]] == 0), companion.name
            assert np.any(np.asarray(companion) != 0)
    for n, (_, mask) in values(model).items():
        np.testing.assert_array_equal(mask, before[n])
    assert_masked(model)


def test_a_sparse_model_is_frozen_where_it_is_zero(library):
    x, y = blobs(32)
    model = pruning.strip(pruning.prune_now(dense_model(library), 0.5))
    before = [np.asarray(layer.kernel) == 0 for layer in model.layers[-2:]]
    assert pruning.freeze_mask(model) is model
    assert model.pruner.frozen
    model.compile(library.optimizers.Adam(0.1), loss(library), jit_compile=False)
    model.fit(x, y, verbose=0, epochs=3)
    after = [np.asarray(layer.kernel) == 0 for layer in model.layers[-2:]]
    for was, now in zip(before, after, strict=True):
        np.testing.assert_array_equal(was, now)


@pytest.mark.parametrize("kind", ["of zeros", "halfway", "learned"])
def test_what_is_frozen_stays_when_it_is_finalized(kind, library):
    model = dense_model(library)
    if kind == "learned":
        scope = pruning.Learned(start="erk", learning_rate=5.0)
        model = pruning.prune(model, method="scores", sparsity=0.6, scope=scope, engine="masks")
        model.compile("sgd", loss(library))
        model.fit(*blobs(64), batch_size=8, epochs=2, verbose=0)
    elif kind == "halfway":
        model = pruning.prune(model, schedules.OneShot(0.7, 5), engine="masks")
    else:
        model = pruning.strip(pruning.prune_now(model, 0.5))
    pruning.freeze_mask(model)
    before = [mask.numpy() for mask in model.pruner.state.masks]
    model.pruner.finalize()
    for mask, now in zip(before, model.pruner.state.masks, strict=True):
        np.testing.assert_array_equal(mask, now.numpy())
    assert model.pruner.frozen


def test_freezing_stops_the_schedule(library):
    model = dense_model(library)
    pruner = Pruner(model, schedules.CosineSparsity(0.0, 0.75, 0, 4, 1))
    pruner.step()
    pruner.step()
    held = zeros(model)
    pruning.freeze_mask(model)
    pruner.step()
    pruner.step()
    assert zeros(model) == held
    assert pruner.steps == 4


def test_what_is_pruned_does_not_come_back(library):
    """Not even where the survivors are zero as well, so that all are equal."""
    model = dense_model(library)
    pruner = Pruner(model, schedules.CosineSparsity(0.5, 0.75, 0, 4, 1))
    pruner.step()
    first = {n: mask for n, (_, mask) in values(model).items()}
    for target in pruner.targets:
        target.variable.assign(tf.zeros(target.shape))
    for _ in range(3):
        pruner.step()
    for n, (_, mask) in values(model).items():
        assert np.all(first[n] | ~mask)
        assert mask.sum() == mask.size // 4


def test_a_criterion_is_any_function_of_the_weights(library):
    model = dense_model(library)
    kernel = np.asarray(model.layers[-1].kernel)
    pruning.prune_now(model, 0.5, criterion=lambda weight: weight, layers="logits")
    expected = np.where(kernel >= np.sort(kernel.ravel())[-12], kernel, 0)
    np.testing.assert_array_equal(model.layers[-1].kernel, expected)


# Bad input, and what would go wrong


def test_a_layer_that_would_starve_is_named_with_its_figures(library):
    model = functional(
        library, (6,), library.layers.Dense(40), library.layers.Dense(10, name="last")
    )
    with pytest.warns(
        UserWarning, match=r"last keeps 4 of 400 weights for 10 outputs, so at least 6"
    ):
        pruner = Pruner(model, schedules.OneShot(0.99))
    pruner.finalize()
    pruning.strip(model)
    report = pruning.report(pruning.prune_now(dense_model(library), 0.95, min_weights=8))
    assert [row.weights - row.zeros for row in report.rows] == [8, 8]


def test_bad_input_is_named(library):
    once = schedules.OneShot(0.5)

    def build(schedule=once, model=None, **options):
        return Pruner(dense_model(library) if model is None else model, schedule, **options)

    unbuilt = library.Sequential([library.layers.Dense(2)])
    cases = [
        (lambda: build(model="model"), TypeError, "must be a Keras 3 or tf_keras model, got str"),
        (lambda: build(model=unbuilt), ValueError, "no weights yet"),
        (lambda: build(0.5), TypeError, "schedule must be a PruningSchedule.*got 0.5"),
        (lambda: build(lambda step: 1), TypeError, "must return .whether to prune, sparsity."),
        (lambda: build(lambda step: (True, 95.0)), ValueError, "sparsity in .0, 1.*95"),
        (lambda: build(structure="2:4"), TypeError, "structure must be Unstructured"),
        (lambda: Unstructured(-1), ValueError, "min_per_filter must be >= 0"),
        (lambda: build(criterion="magnitude"), TypeError, "criterion must be callable"),
        (lambda: build(scope="network"), ValueError, "scope must be one of 'layer', 'global'"),
        (lambda: build(scope=tf.constant(1.0)), ValueError, "scope must be one of 'layer'"),
        (lambda: build(scope={"conv*": 0.5}), ValueError, r"pattern 'conv\*' that fits none of"),
        (lambda: build(scope={"log*": 1.5}), ValueError, "log.*must be < 1"),
        (lambda: build(min_weights=0), ValueError, "min_weights must be >= 1"),
        (lambda: build(layers="no*"), ValueError, "no weight that can be pruned as asked"),
        (lambda: NM(4, 2), ValueError, "m must be >= 5"),
        (lambda: Block(0, 2), ValueError, "rows must be >= 1"),
        (
            lambda: build(structure=NM(2, 4), scope="global"),
            ValueError,
            "scope must be 'layer' and min_weights 1 with",
        ),
        (
            lambda: build(structure=NM(2, 4), min_weights=9),
            ValueError,
            "got min_weights=9",
        ),
        (lambda: build(weights=3), TypeError, "weights must be a name pattern"),
        (lambda: build(lambda step: (step > 2, 0.9 if step > 2 else 0.0)), TypeError, "tf.where"),
        (lambda: pruning.prune_now(dense_model(library), 0.0, scope={"l*": 0.5}), ValueError, "ab"),
        (
            lambda: build(criterion=lambda weight: tf.reduce_sum(weight)),
            ValueError,
            "criterion must return a tensor of scores of the weight's shape",
        ),
        (lambda: pruning.prune_now(dense_model(library), 95), ValueError, "0.95 keeps 5 %"),
        (lambda: pruning.freeze_mask(3), TypeError, "got int"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()
    model = build().model
    with pytest.raises(ValueError, match="pruned already: strip it first"):
        build(model=model)


@pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)
def test_a_predicate_that_holds_for_the_model_itself_does_not_choose_all_of_it(library):
    model = dense_model(library)
    pruning.prune_now(model, 0.5, layers=lambda layer: layer.name != "logits")
    assert [target.name for target in model.pruner.targets] == ["hidden"]
    assert np.all(model.get_layer("logits").get_weights()[0])


@pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)
@pytest.mark.parametrize("options", [{"schedule": schedules.OneShot(0.9)}, {"method": "scores"}])
def test_where_the_warning_is_an_error_the_model_is_as_it_was(library, options):
    model = dense_model(library)
    before, plain = model.get_weights(), type(model)
    sparsity = {"sparsity": 0.9} if "method" in options else {}
    with pytest.raises(UserWarning, match="logits keeps 2 of 24 weights for 3 outputs"):
        pruning.prune(model, engine="masks", **options, **sparsity)
    assert type(model) is plain
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    pruning.prune_now(model, 0.5)


# Layers of Keras 3 with LoRA, or quantized


def with_lora(rng):
    model = dense_model(keras)
    layer = model.get_layer("hidden")
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(rng.normal(size=(2, 8)))
    return model


def test_a_layer_with_lora_is_left_unpruned_and_the_report_says_why(rng):
    model = pruning.prune_now(with_lora(rng), 0.5)
    rows = {row.name: row for row in pruning.report(model).rows}
    assert list(rows) == ["hidden", "logits"]
    assert rows["logits"].pruned and rows["logits"].sparsity == 0.5
    assert "LoRA is enabled" in rows["hidden"].reason and rows["hidden"].zeros == 0
    for call in (pruning.freeze_mask, lambda m, layers: pruning.prune_now(m, 0.5, layers=layers)):
        with pytest.raises(ValueError, match="LoRA is enabled, and adds to the zeros: save_we"):
            call(with_lora(rng), layers="hidden")


def test_the_way_out_for_lora_is_to_load_the_sums(rng, tmp_path):
    model = with_lora(rng)
    model.save_weights(tmp_path / "sums.weights.h5")
    merged = dense_model(keras)
    merged.load_weights(tmp_path / "sums.weights.h5")
    x = blobs(8)[0]
    np.testing.assert_allclose(merged(x), model(x), rtol=1e-5, atol=1e-6)
    assert pruning.prune_now(merged, 0.5).pruner.targets[0].name == "hidden"


def test_lora_enabled_after_pruning_shows_in_the_report(rng):
    model = pruning.prune_now(dense_model(keras), 0.5)
    layer = model.get_layer("hidden")
    layer.enable_lora(2)
    assert pruning.report(model).rows[0].zeros == 24, "its product is zero at first"
    layer.lora_kernel_b.assign(rng.normal(size=(2, 8)))
    row = pruning.report(model).rows[0]
    assert (row.name, row.pruned, row.zeros) == ("hidden", False, 0)
    assert "LoRA is enabled" in row.reason
    assert inspection.sparsity(model).rows[0].zeros == 0


def test_quantized_integers_are_not_pruned():
    model = pruning.strip(pruning.prune_now(dense_model(keras), 0.5))
    for layer in model.layers:
        layer.quantize("int8")
    assert inspection.sparsity(model).sparsity >= 0.5, "zeros stay zero"
    with pytest.raises(ValueError, match=r"it is quantized \(int8\): prune first, then quantize"):
        pruning.freeze_mask(model)


# What makes the model's outputs, under structures that take whole ones away


def heads(library):
    """Models, and the names of the weights that make their outputs."""
    L = library.layers  # noqa: N806

    def conv(name, *more, filters=6):
        body = [L.Conv2D(8, 3, name="first"), L.ReLU(), L.Conv2D(filters, 3, name=name), *more]
        return library.Sequential([library.Input((8, 8, 1)), *body], name=f"of_{name}")

    yield "dense", dense_model(library), {"logits"}
    pooling = [L.BatchNormalization(), L.GlobalAveragePooling2D(), L.Softmax()]
    yield "convolutional", conv("last", *pooling), {"last"}
    yield "separable", conv("last", L.SeparableConv2D(4, 3, name="sep")), {"sep/pointwise_kernel"}

    inputs = library.Input((8, 8, 1))
    body, pool = conv("features"), library.Sequential([L.GlobalAveragePooling2D(), L.Dropout(0.5)])
    yield "nested", library.Model(inputs, pool(body(inputs))), {"features"}
    x = body(inputs)
    both = [x, L.Dense(3, name="head")(L.Flatten()(x))]
    yield "several outputs", library.Model(inputs, both), {"features", "head"}

    inputs = library.Input((4, 6))
    x = L.TimeDistributed(L.Dense(8, name="each"), name="time")(inputs)
    y = L.Concatenate()(
        [L.Dense(3, name="left")(x), L.Activation("relu")(L.Dense(2, name="right")(x))]
    )
    yield "concatenated", library.Model(inputs, y), {"left", "right"}
    y = L.TimeDistributed(L.Dense(3, name="every"), name="all")(x)
    yield "in time", library.Model(inputs, L.GlobalAveragePooling1D()(y)), {"all/every"}
    y = L.MultiHeadAttention(2, 4, name="mha")(x, x)
    yield "attention", library.Model(inputs, y), {"mha/attention_output"}
    y = L.Add()([L.Dense(3, name="one")(x), L.Dense(3, name="two")(x)])
    yield "added", library.Model(inputs, y), set()
    z = L.Dense(3, name="swish")(x)
    y = L.Multiply()([z, L.Activation("sigmoid")(z)])
    yield "by itself", library.Model(inputs, y), {"swish"}
    yield "recurrent", library.Model(inputs, L.LSTM(3, name="lstm")(x)), set()


@pytest.mark.parametrize("structure", [Filters(), Block(1000, 1), Block(1000, 2)], ids=str)
def test_what_makes_the_outputs_keeps_them_unless_it_is_chosen(library, structure):
    for kind, model, expected in heads(library):
        pruning.prune_now(model, 0.5, structure=structure)
        rows = {row.name: row for row in pruning.report(model).rows}
        spared = {name for name, row in rows.items() if "makes the model's outputs" in row.reason}
        assert spared == expected, kind
        assert not any(rows[name].zeros for name in spared)
        assert all("choose it by layers=" in rows[name].reason for name in spared)
        others = [row for name, row in rows.items() if name not in spared and not row.reason]
        assert any(row.zeros for row in others), kind
        pruning.strip(model)  # the next one shares layers with it


@pytest.mark.parametrize("scope", ["layer", "global", "igq", "lamp", {"hidden": 0.5}], ids=str)
@pytest.mark.parametrize("method", ["magnitude", "scores"])
def test_all_scopes_and_methods_leave_the_outputs(library, method, scope):
    model = dense_model(library)
    how = {"structure": Filters(), "scope": scope}
    if method == "scores":
        pruning.prune(model, method="scores", sparsity=0.5, **how)
    else:
        pruning.prune(model, schedules.OneShot(0.5), engine="masks", **how).pruner.finalize()
    logits = np.asarray(model.get_layer("logits").kernel)
    assert logits.all() and inspection.sparsity(model).sparsity == 0.5
    with pytest.raises(ValueError, match=r"'logits': \"it makes the model's outputs, and Filters"):
        pruning.prune_now(
            pruning.strip(dense_model(library)), 0.5, structure=Filters(), weights="l*"
        )


@pytest.mark.parametrize("structure", [Filters(), Block(8, 1), Block(4, 1)], ids=str)
def test_outputs_that_are_chosen_to_be_pruned_are_counted_in_a_warning(library, structure):
    model = dense_model(library)
    kernel = np.arange(1.0, 25.0).reshape(8, 3)
    kernel[:, 1] = 0.01
    model.get_layer("logits").kernel.assign(kernel)
    for prune in (
        lambda: pruning.prune_now(model, 0.4, structure=structure, layers="logits"),
        lambda: pruning.ScorePruner(model, 0.4, structure=structure, layers="logits"),
    ):
        with pytest.warns(UserWarning, match="logits makes the model's outputs, and 1 of its 3"):
            prune()
        dead = np.flatnonzero(~np.asarray(model.get_layer("logits").kernel).any(axis=0))
        assert dead.tolist() == [1]
        pruning.strip(model)
        model.get_layer("logits").kernel.assign(kernel)


def test_a_subclassed_model_does_not_tell_what_makes_its_outputs(library):
    class Net(library.Model):
        def __init__(self):
            super().__init__()
            self.one = library.layers.Dense(8, name="one")
            self.two = library.layers.Dense(4, name="two")

        def call(self, inputs):
            return self.two(self.one(inputs))

    def net():
        model = Net()
        model(np.zeros((1, 6), "float32"))
        return model

    with pytest.warns(UserWarning, match="not known which layers make the outputs of a subclassed"):
        pruning.prune_now(net(), 0.5, structure=Filters())
    model = pruning.prune_now(net(), 0.5, structure=Filters(), layers="one")
    assert {row.name: row.zeros for row in pruning.report(model).rows} == {"one": 24, "two": 0}
    pruning.prune_now(net(), 0.5)  # single weights: nothing to say


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_ranked(bad):
    model = dense_model(keras)
    kernel, bias = model.get_layer("hidden").get_weights()
    kernel[2, 3] = bad
    model.get_layer("hidden").set_weights([kernel, bias])
    for prune in (
        lambda: pruning.prune_now(model, 0.5),
        lambda: pruning.prune(model, schedules.OneShot(0.5), engine="masks"),
        lambda: pruning.condition_budgets(model, 0.5),
    ):
        with pytest.raises(
            ValueError, match=r"that are NaN or infinite, in hidden\. Go back to a ch"
        ):
            prune()
    assert np.isfinite(model.get_layer("logits").get_weights()[0]).all()
    pruning.prune_now(model, 0.5, layers="logits")  # the others may be pruned


@pytest.mark.parametrize("method", ["masks", "scores"])
def test_what_is_no_optimizer_is_refused_by_name(library, method):
    model = dense_model(library)
    if method == "masks":
        pruner = pruning.prune(model, schedules.OneShot(0.5), engine="masks").pruner
    else:
        pruner = pruning.prune(model, method="scores", sparsity=0.5).pruner
    for call in (pruner.step, pruner.apply, pruner.training):
        with pytest.raises(TypeError, match="optimizer must be an optimizer of Keras, got 'sgd'"):
            call("sgd")
    optimizer = library.optimizers.SGD()
    for pairs in (3, "x", [], {}, [1.0], [(0.0, 1.0)]):
        with pytest.raises(TypeError, match="gradients_and_variables must be pairs"):
            pruner.apply_gradients(optimizer, pairs)
    if method == "masks":
        with pytest.raises(TypeError, match="is_constrained must be True or False, got 'x'"):
            pruner.step(is_constrained="x")
