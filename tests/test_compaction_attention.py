"""Compaction of multi-head attention: dead heads, sizes of values, and what has to stay."""

from __future__ import annotations

import numpy as np
import pytest
from test_compaction import both, check, filters, kill, randomise, reasons, unread

import tscnc_tf as tscnc
from tscnc_tf._keras import keras

QUERY, VALUE = 5, 4  # channels


def network(library, *, heads=4, causal=False, around=True, **options):
    """Cross-attention, or causal self-attention, between dense layers."""
    layers = library.layers
    inputs, other = library.Input((6, 3), name="one"), library.Input((7, 3), name="two")
    query = layers.Dense(QUERY, activation="sigmoid", name="query")(inputs) if around else inputs
    value = layers.Dense(VALUE, activation="sigmoid", name="value")(other) if around else other
    options = {"num_heads": heads, "key_dim": 3, "value_dim": 2, **options}
    attention = layers.MultiHeadAttention(name="attention", **options)
    if causal:
        x = attention(query, query, use_causal_mask=True)
        value = inputs
    else:
        x = attention(query, value)
    x = layers.GlobalAveragePooling1D()(layers.Activation("tanh")(x))
    x = layers.Concatenate()([x, layers.GlobalAveragePooling1D()(value)])
    model = library.Model([inputs, other], layers.Dense(2, name="logits")(x))
    return randomise(model)


def part(model, name):
    return getattr(model.get_layer("attention"), f"_{name}_dense")


def kill_heads(model, heads, where="value", sizes=slice(None)):
    """Set the values of heads to zero, or the rows of the output that read them."""
    kernel = part(model, where).kernel
    values = kernel.numpy()
    if where == "output":
        values[heads, sizes] = 0
    else:
        values[:, heads, sizes] = 0
    kernel.assign(values)


def shapes(model, use_bias=True):
    """The shapes of the kernels of the attention; those of the biases fit them."""
    found = []
    for name in ("query", "key", "value", "output"):
        shape = tuple(part(model, name).kernel.shape)
        if use_bias:
            bias = part(model, name).bias.shape
            assert tuple(bias) == (shape[-1:] if name == "output" else shape[1:])
        else:
            assert part(model, name).bias is None
        found.append(shape)
    return found


def count(query, value, heads, key_dim, value_dim, out):
    """Count the parameters of an attention layer."""
    keys = heads * key_dim * (query + 1 + value + 1)
    return keys + heads * value_dim * (value + 1) + out * (heads * value_dim + 1)


@both
@pytest.mark.parametrize("causal", [False, True])
def test_dead_heads_go_and_their_constant_is_folded(library, causal):
    model = network(library, causal=causal)
    kill_heads(model, [1])
    kill_heads(model, [3], "output")
    size = QUERY if causal else VALUE
    bias, output = part(model, "value").bias.numpy(), part(model, "output")
    folded = output.bias.numpy() + bias[1] @ output.kernel.numpy()[1]
    before = [part(model, name).kernel.numpy() for name in ("query", "key", "value")]
    done = check(model)
    assert shapes(done.model) == [(5, 2, 3), (size, 2, 3), (size, 2, 2), (2, 2, 5)]
    for name, kernel in zip(("query", "key", "value"), before, strict=True):
        np.testing.assert_array_equal(part(done.model, name).kernel.numpy(), kernel[:, [0, 2]])
    np.testing.assert_allclose(part(done.model, "output").bias.numpy(), folded, rtol=1e-5)
    attention = done.model.get_layer("attention")
    assert attention.get_config()["num_heads"] == 2
    assert attention.get_config()["output_shape"] is None
    row = next(row for row in done.layers if row.name == "attention")
    assert row.parameters_before == count(5, size, 4, 3, 2, 5)
    assert row.parameters_after == count(5, size, 2, 3, 2, 5)
    assert (row.filters_before, row.filters_after) == (5, 5)
    assert not done.left_alone
    assert not done.kept


@both
def test_values_that_are_dead_in_all_heads_go(library):
    model = network(library, heads=3, value_dim=4)
    kill_heads(model, [0], sizes=[0, 1])
    kill_heads(model, [1], "output", sizes=[3])
    kill_heads(model, [1], sizes=[1])
    kill_heads(model, [2], sizes=[0, 2, 3])
    done = check(model)  # two, two and three of four
    assert shapes(done.model) == [(5, 3, 3), (4, 3, 3), (4, 3, 2), (3, 2, 5)]
    assert done.model.get_layer("attention").get_config()["value_dim"] == 2
    assert reasons(done, "attention") == {"'attention' has heads of equal size": 1}
    again = check(done.model)
    assert again.parameters_after == again.parameters_before


@both
def test_inputs_and_outputs_of_attention_go(library):
    model = network(library)
    kill(model, "query", [0, 3])
    kill(model, "value", [1])
    unread(model, "logits", [2, 5 + 1])
    done = check(model)
    assert filters(done) == {
        **{"query": (5, 3), "value": (4, 3), "attention": (5, 4), "logits": (2, 2)}
    }
    assert shapes(done.model) == [(3, 4, 3), (3, 4, 3), (3, 4, 2), (4, 2, 4)]
    row = next(row for row in done.layers if row.name == "attention")
    assert row.parameters_after == count(3, 3, 4, 3, 2, 4)


@both
@pytest.mark.parametrize("constant", [True, False])
def test_attention_gets_biases_only_if_it_needs_them(library, constant):
    model = network(library, use_bias=False, bias_initializer="ones")
    kill_heads(model, [0, 2])
    if constant:
        kill(model, "value", [0])  # 0.5 and something, after the sigmoid
    done = check(model)
    assert shapes(done.model, use_bias=constant)[2] == (4 - constant, 2, 2)
    if constant:
        assert np.any(part(done.model, "key").bias.numpy())
        assert not np.any(part(done.model, "query").bias.numpy())
        assert not np.any(part(done.model, "output").bias.numpy())


@both
def test_of_heads_that_are_all_dead_one_stays(library):
    model = network(library)
    kill_heads(model, range(4))
    done = check(model)
    # The output of attention is a constant then, and one channel of it is enough.
    assert shapes(done.model) == [(1, 1, 3), (4, 1, 3), (4, 1, 1), (1, 1, 1)]
    assert reasons(done, "attention") == {"Keras has no layers without any filter": 2}


@both
@pytest.mark.parametrize("dead", [0.0, 1.0])
def test_where_positions_are_masked_only_zeros_are_constants(library, dead):
    layers = library.layers
    tokens = library.Input((6,))
    x = layers.Embedding(5, 4, mask_zero=True, name="embedding")(tokens)
    x = layers.MultiHeadAttention(3, 2, dropout=0.1, name="attention")(x, x)
    x = layers.Dense(3, name="last")(x)
    model = randomise(library.Model(tokens, x))
    kill_heads(model, [1])
    bias = part(model, "value").bias
    bias.assign(np.full(bias.shape, dead))
    rng = np.random.default_rng(0)
    batch = rng.integers(0, 5, (6, 6)).astype("float32")
    batch[0] = 0  # masked everywhere
    done = tscnc.pruning.compact(model, probe=batch)
    np.testing.assert_allclose(done.model(batch), model(batch), atol=1e-5)
    assert shapes(done.model)[3][0] == (3 if dead else 2)
    reason = "'attention' makes 0 of a constant where all positions are masked"
    assert reasons(done, "attention") == ({reason: 2} if dead else {})


@both
def test_attention_over_several_axes_and_to_another_size(library):
    layers = library.layers
    inputs = library.Input((3, 4, 2))
    x = layers.Dense(4, activation="tanh", name="a")(inputs)
    x = layers.MultiHeadAttention(3, 2, output_shape=6, name="attention")(x, x)
    model = library.Model(inputs, layers.Dense(2, name="logits")(layers.Flatten()(x)))
    randomise(model)
    kill(model, "a", [1])
    kill_heads(model, [0])
    output = part(model, "output").kernel
    output.assign(output.numpy() * ([1.0] * 4 + [0.0] * 2))
    done = check(model)
    assert shapes(done.model) == [(3, 2, 2), (3, 2, 2), (3, 2, 2), (2, 2, 4)]
    assert filters(done)["attention"] == (6, 4)


@both
def test_attention_in_a_transformer_block(library):
    layers = library.layers
    inputs = library.Input((5, 8))
    x = layers.LayerNormalization(name="n1")(inputs)
    x = layers.MultiHeadAttention(4, 3, name="attention")(x, value=x, key=x)
    x = y = layers.Add(name="add")([inputs, x])
    y = layers.Dense(16, activation="gelu", name="wide")(layers.LayerNormalization(name="n2")(y))
    x = layers.Add(name="sum")([x, layers.Dense(8, name="narrow")(y)])
    model = library.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling1D()(x)))
    randomise(model)
    kill_heads(model, [0, 1])
    kill(model, "wide", range(5))
    done = check(model)
    assert shapes(done.model)[3] == (2, 3, 8)
    assert filters(done)["wide"] == (16, 11)
    assert [row.layer for row in done.left_alone] == ["n1", "n2"]


@both
def test_a_compacted_attention_can_be_saved(library, tmp_path):
    model = network(library)
    kill_heads(model, [1])
    new = tscnc.pruning.compact(model).model
    new.save(tmp_path / "small.keras")
    loaded = library.models.load_model(tmp_path / "small.keras")
    x = [np.ones((2, 6, 3), "float32"), np.ones((2, 7, 3), "float32")]
    np.testing.assert_allclose(loaded(x), new(x), rtol=1e-6)


@both
@pytest.mark.parametrize("kind", ["mask", "scores", "axes"])
def test_other_uses_of_attention_are_left_alone(library, kind):
    layers = library.layers
    inputs, mask = library.Input((5, 4)), library.Input((5, 5))
    options = {"output_shape": (2, 3)} if kind == "axes" else {}
    attention = layers.MultiHeadAttention(2, 3, name="attention", **options)
    if kind == "mask":
        x = attention(inputs, inputs, attention_mask=mask)
    elif kind == "scores":
        x, _ = attention(inputs, inputs, return_attention_scores=True)
    else:
        x = attention(inputs, inputs)
    x = layers.Flatten()(x)
    model = randomise(library.Model([inputs, mask], layers.Dense(2)(x)))
    kill_heads(model, [0])
    (left,) = check(model).left_alone
    wanted = {
        "mask": "is called with more than its inputs",
        "scores": "has no single output",
        "axes": "makes several axes of its output",
    }
    assert left.reason == f"'attention' (MultiHeadAttention) {wanted[kind]}"


def test_attention_with_a_gate_and_a_window():
    model = network(keras, use_gate=True)
    kill_heads(model, [0])
    part(model, "value").bias.assign(np.arange(8).reshape(4, 2) * [[0], [1], [1], [1]])
    gate = part(model, "gate").kernel
    values = gate.numpy()
    values[:, 1] = 0
    gate.assign(values)  # the gate of a head is a constant, which does not change it
    done = check(model)
    assert shapes(done.model)[3] == (3, 2, 5)
    assert part(done.model, "gate").kernel.shape == (5, 3, 2)
    model = network(keras, use_gate=True)
    kill_heads(model, [0])
    done = check(model)
    assert shapes(done.model)[3] == (4, 2, 5)
    reason = "'attention' multiplies the constant of a head by a gate, which varies"
    assert reasons(done, "attention") == {reason: 2}
    model = network(keras, causal=True, sliding_window=2)
    kill_heads(model, [0])
    assert shapes(check(model).model)[3] == (4, 2, 5)


def test_grouped_query_attention_is_left_alone():
    layers = keras.layers
    inputs = keras.Input((5, 4))
    x = layers.GroupQueryAttention(3, 4, 2, name="attention")(inputs, inputs)
    model = randomise(keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x))))
    (left,) = check(model).left_alone
    assert left.reason == (
        "'attention' (GroupedQueryAttention) has heads that share keys and values"
    )


@both
def test_weights_of_attention_are_followed_for_the_effective_sparsity(library):
    model = network(library)
    kill_heads(model, [0], "output")
    kill(model, "value", [1])
    report = tscnc.inspection.sparsity(model)
    assert not report.not_followed
    zeros = {row.name: n for row, n in zip(report.rows, report.effective_zeros, strict=True)}
    # In "key" and "value", those of the dead head, and those that read the dead unit.
    wanted = {"query": 5 * 3, "key": 4 * 3 + 3 * 3, "value": 4 * 2 + 3 * 2, "attention_output": 10}
    assert {name: zeros[f"{name}/kernel"] for name in wanted} == wanted
    assert zeros["value"] == 3


@both
@pytest.mark.parametrize("seed", range(4))
def test_any_attention_keeps_its_outputs(library, seed):
    rng = np.random.default_rng(seed)
    options = {"use_bias": bool(seed % 2), "value_dim": 3, "causal": seed == 3}
    model = network(library, **options)
    for name in ("query", "key", "value", "output"):
        kernel = part(model, name).kernel
        values = kernel.numpy()
        for axis in range(3):
            dead = rng.uniform(size=values.shape[axis]) < 0.3
            np.moveaxis(values, axis, 0)[dead] = 0
        kernel.assign(values)
    kill(model, "query", [0])
    done = check(model)
    assert done.parameters_after < done.parameters_before
    again = check(done.model)
    assert again.parameters_after == again.parameters_before
