"""Every function that copies a model, over models of which a copy could lose something."""

from __future__ import annotations

import collections
import functools
import pathlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import FLAVOURS

import tscnc_tf as tscnc
from tscnc_tf import gates, pruning
from tscnc_tf._keras import gated
from tscnc_tf._keras import layers as kernel_layers

REGULARIZER = tscnc.regularizers.TransformedL1(1e-3)
SEQUENCES = np.random.default_rng(1).normal(size=(3, 5, 4)).astype("float32")
VECTORS = np.random.default_rng(2).normal(size=(3, 4)).astype("float32")
WORDS = tf.constant([["red green"], ["green"], ["blue blue"]])


def doubled(x):
    return 2.0 * x


def softened(x):
    return tf.tanh(x) / 2.0


def filled(shape, dtype=None, **_):
    return tf.fill(shape, tf.cast(0.5, dtype))


# --- the models; each has a layer "head", which is what is regularized, gated and pruned ----------


def half_frozen(library):
    layers = library.layers
    model = library.Sequential(
        [
            library.Input((5, 4)),
            layers.Bidirectional(layers.SimpleRNN(3), name="both"),
            layers.BatchNormalization(name="norm"),
            layers.Dense(2, name="head"),
        ]
    )
    model.get_layer("both").forward_layer.trainable = False
    return model, SEQUENCES


def thawed_inside(library):
    """A nested model that is frozen, with one layer of it thawed again."""
    layers = library.layers
    inner = library.Sequential(
        [library.Input((4,)), layers.Dense(4, name="cold"), layers.Dense(4, name="warm")],
        name="inner",
    )
    inputs = library.Input((4,))
    model = library.Model(inputs, layers.Dense(2, name="head")(inner(inputs)))
    inner.trainable = False
    inner.layers[-1].trainable = True
    return model, VECTORS


def frozen_attention(library):
    layers = library.layers
    attention = layers.MultiHeadAttention(2, 3, name="attention")
    inputs = library.Input((5, 4))
    model = library.Model(inputs, layers.Dense(2, name="head")(attention(inputs, inputs)))
    attention._query_dense.trainable = False
    return model, SEQUENCES


def frozen_cells(library):
    layers = library.layers
    cells = [layers.GRUCell(3, name="first"), layers.LSTMCell(3, name="second")]
    inputs = library.Input((5, 4))
    model = library.Model(inputs, layers.Dense(2, name="head")(layers.RNN(cells)(inputs)))
    cells[0].trainable = False
    return model, SEQUENCES


def own_classes(library):
    """Unregistered classes: layers in lists and dictionaries, weights saved in ways of their own.

    They are in a wrapper as well, where Keras itself would have to find them by name.
    """
    layers = library.layers

    class Block(layers.Layer):
        def __init__(self, units, activation=None, **kwargs):
            super().__init__(**kwargs)
            self.units = units
            self.activation = library.activations.get(activation)
            self.parts = [layers.Dense(units), layers.Dense(units)]
            self.named = {"last": layers.Dense(units)}
            self.count = 0

        def build(self, shape):
            self.scales = [
                self.add_weight(name="scale", shape=(self.units,), initializer="ones"),
                self.add_weight(name="shift", shape=(self.units,), trainable=False),
            ]
            size = shape[-1]
            for part in (*self.parts, self.named["last"]):
                part.build((*shape[:-1], size))
                size = self.units
            super().build(shape)

        def call(self, x):
            x = self.parts[1](self.parts[0](x))
            x = self.activation(self.named["last"](x))
            return (x * self.scales[0] + self.scales[1]) * (1.0 + self.count)

        def compute_output_shape(self, shape):
            return (*shape[:-1], self.units)

        def get_config(self):
            activation = library.activations.serialize(self.activation)
            return {**super().get_config(), "units": self.units, "activation": activation}

        def save_own_variables(self, store):
            super().save_own_variables(store)
            store["count"] = np.array(self.count)

        def load_own_variables(self, store):
            self.count = int(store["count"])
            super().load_own_variables({key: store[key] for key in store if key != "count"})

    class Residual(layers.Layer):
        def __init__(self, inner, **kwargs):
            super().__init__(**kwargs)
            self._around = inner  # which the configuration has under another name
            self.text = "1.0"

        def call(self, x):
            return float(self.text) * x + self._around(x)

        def save_assets(self, folder):
            pathlib.Path(folder, "text").write_text(self.text)

        def load_assets(self, folder):
            self.text = pathlib.Path(folder, "text").read_text()

        def get_config(self):
            inner = library.saving.serialize_keras_object(self._around)
            return {**super().get_config(), "inner": inner}

        @classmethod
        def from_config(cls, config):
            inner = library.saving.deserialize_keras_object(config.pop("inner"))
            return cls(inner, **config)

    inputs = library.Input((5, 4))
    block, wrapped = Block(3, softened, name="block"), Block(3, name="wrapped")
    block.count, wrapped.count = 2, 1
    residual = Residual(layers.Dense(3, activation=lambda x: x**2, name="in"), name="residual")
    residual.text = "3.0"
    x = layers.TimeDistributed(wrapped, name="each")(residual(block(inputs)))
    model = library.Model(inputs, layers.Dense(2, name="head")(x))
    block.parts[0].trainable = False
    wrapped.named["last"].trainable = False
    return model, SEQUENCES


def functions(library):
    layers = library.layers
    recurrent = layers.SimpleRNN(3, activation=softened, return_sequences=True, name="rnn")
    inputs = library.Input((5, 4))
    x = layers.Dense(4, activation=lambda x: 3.0 * x, kernel_regularizer=lambda w: 0.0)(inputs)
    x = layers.Lambda(doubled, output_shape=(5, 4), name="named")(x)
    x = layers.TimeDistributed(layers.Lambda(lambda x: x + 1.0, output_shape=(4,)))(x)
    x = layers.TimeDistributed(layers.Dense(4, activation=lambda x: x**2, name="in"), name="td")(x)
    x = recurrent(x)
    x = layers.Activation(softened)(x)
    x = layers.Lambda(functools.partial(doubled), output_shape=(5, 3), name="partial")(x)
    x = layers.Dense(3, bias_initializer=filled, kernel_constraint=lambda w: w)(x)
    return library.Model(inputs, layers.Dense(2, name="head")(x)), SEQUENCES


def functions_in_both_directions(library):
    layers = library.layers
    inputs = library.Input((5, 4))
    with library.utils.custom_object_scope({"softened": softened}):
        backward = layers.GRU(3, return_sequences=True, go_backwards=True, name="back")
        recurrent = layers.SimpleRNN(3, activation=softened, return_sequences=True)
        x = layers.Bidirectional(recurrent, backward_layer=backward, name="two")(inputs)
        x = layers.Bidirectional(layers.SimpleRNN(3, activation=softened), name="both")(x)
    return library.Model(inputs, layers.Dense(2, name="head")(x)), SEQUENCES


def loaded(library, folder):
    layers = library.layers
    inputs = library.Input((5, 4))
    x = layers.Lambda(lambda x: 3.0 * x, output_shape=(5, 4))(inputs)
    x = layers.TimeDistributed(layers.Dense(4, activation=doubled))(x)
    with library.utils.custom_object_scope({"softened": softened}):
        x = layers.Bidirectional(layers.SimpleRNN(3, activation=softened), name="both")(x)
    model = library.Model(inputs, layers.Dense(2, activation=doubled, name="head")(x))
    names = {"softened": softened, "doubled": doubled}
    model.save(folder / "model.keras")
    model = library.models.load_model(folder / "model.keras", names, safe_mode=False)
    return model, SEQUENCES


def layers_as_activations(library):
    layers = library.layers
    inputs = library.Input((4,))
    x = layers.Dense(4, activation=layers.LeakyReLU(0.3, name="leaky"), name="a")(inputs)
    x = layers.PReLU(alpha_initializer="ones", name="prelu")(x)
    return library.Model(inputs, layers.Dense(2, name="head")(x)), VECTORS


def words(library):
    layers = library.layers
    look = layers.StringLookup(name="look")
    look.adapt(["red", "green", "blue blue", "two\nlines"])
    counted = layers.TextVectorization(output_mode="tf_idf", name="counted")
    counted.adapt(WORDS)
    numbers = layers.TextVectorization(output_sequence_length=3, name="numbers")
    numbers.set_vocabulary(["green", "blue"])
    inputs = library.Input((1,), dtype="string")
    x = layers.Flatten()(layers.Embedding(8, 4)(look(inputs)))
    y = layers.Flatten()(layers.Embedding(8, 4)(numbers(inputs)))
    x = layers.Concatenate()([x, y, layers.Flatten()(counted(inputs))])
    return library.Model(inputs, layers.Dense(3, name="head")(x)), WORDS


def numbers(library):
    layers = library.layers
    look = layers.IntegerLookup(output_mode="multi_hot", name="look")
    look.adapt([[3], [5], [3], [7]])
    changed = layers.IntegerLookup(vocabulary=[1, 2, 3], name="changed")
    changed.set_vocabulary([7, 5, 3])
    inputs = library.Input((2,), dtype="int64")
    x = layers.Flatten()(layers.Embedding(8, 4)(changed(inputs)))
    x = layers.Concatenate()([x, look(inputs)])
    model = library.Model(inputs, layers.Dense(3, name="head")(x))
    return model, np.array([[3, 7], [1, 5], [9, 3]])


def bins(library):
    layers = library.layers
    values = np.random.default_rng(5).normal(size=(50, 4)).astype("float32")
    adapted = layers.Discretization(num_bins=4, output_mode="multi_hot", name="adapted")
    adapted.adapt(values)
    given = layers.Discretization(bin_boundaries=[-0.5, 0.5], name="given")
    normal = layers.Normalization(name="normal")
    normal.adapt(3.0 + 2.0 * values)
    inputs = library.Input((4,))
    x = adapted(inputs)
    y = layers.Flatten()(layers.Embedding(3, 2)(given(inputs)))
    x = layers.Concatenate()([x, y, normal(inputs)])
    return library.Model(inputs, layers.Dense(3, name="head")(x)), VECTORS


def shared(library):
    """A layer that is used in the graph, in a nested model, and in a model in a wrapper."""
    layers = library.layers
    dense = layers.Dense(4, name="shared")
    inner_inputs = library.Input((5, 4))
    inner = library.Model(inner_inputs, dense(inner_inputs), name="inner")
    deep = library.Sequential([library.Input((4,)), dense, layers.Dense(4, name="deep")])
    inputs = library.Input((5, 4))
    x = layers.TimeDistributed(deep, name="each")(inner(dense(inputs)))
    return library.Model(inputs, layers.Dense(2, name="head")(x)), SEQUENCES


def policies(library):
    layers = library.layers
    inputs = library.Input((5, 4))
    x = layers.Dense(4, dtype="mixed_bfloat16", name="mixed")(inputs)
    x = layers.TimeDistributed(layers.Dense(4, dtype="float16", name="half"), dtype="float16")(x)
    x = layers.Dense(3, dtype="float64")(x)
    return library.Model(inputs, layers.Dense(2, dtype="float32", name="head")(x)), SEQUENCES


def stateful(library):
    layers = library.layers
    inputs = library.Input((5, 4), batch_size=3)
    layer = layers.LSTM(3, stateful=True, name="lstm")
    model = library.Model(inputs, layers.Dense(2, name="head")(layer(inputs)))
    return model, SEQUENCES


def without_input(library):
    layers = library.layers
    model = library.Sequential([layers.Dense(3, name="first"), layers.Dense(2, name="head")])
    model(VECTORS)
    return model, VECTORS


def of_a_class(library):
    class Own(library.Model):
        def train_step(self, *args, **kwargs):
            return super().train_step(*args, **kwargs)

    one, two = library.Input((4,), name="one"), library.Input((4,), name="two")
    x = library.layers.Add()([library.layers.Dense(4)(one), two * 2.0])
    model = Own({"two": two, "one": one}, library.layers.Dense(2, name="head")(x))
    model.compile("sgd", "mse")
    return model, {"one": VECTORS, "two": VECTORS + 1.0}


def spectral(library):
    layers = library.layers
    inner = layers.Dense(4, name="inner")
    inputs = library.Input((4,))
    x = layers.SpectralNormalization(inner, name="spectral")(inputs)
    model = library.Model(inputs, layers.Dense(2, name="head")(x))
    model(VECTORS, training=True)
    inner.bias.trainable = False
    return model, VECTORS


def low_rank(library):
    layers = library.layers
    dense, look = layers.Dense(4, name="dense"), layers.Embedding(5, 4, name="look")
    inputs = library.Input((4,), dtype="int32")
    x = layers.Flatten()(dense(look(inputs)))
    model = library.Model(inputs, layers.Dense(2, name="head")(x))
    dense.enable_lora(2, lora_alpha=8)
    dense.lora_kernel_b.assign(np.ones((2, 4)))
    look.enable_lora(2)
    look.lora_embeddings_b.assign(np.ones((2, 4)))
    return model, np.array([[0, 1, 2, 3], [4, 3, 2, 1]])


def quantized(library):
    layers = library.layers
    inputs = library.Input((4,))
    x = layers.Dense(5, name="eight")(inputs)
    x = layers.Dense(5, name="four")(x)
    model = library.Model(inputs, layers.Dense(2, name="head")(x))
    model.get_layer("eight").quantize("int8")
    model.get_layer("four").quantize("int4")
    return model, VECTORS


BOTH = [
    half_frozen,
    thawed_inside,
    frozen_attention,
    frozen_cells,
    own_classes,
    functions,
    functions_in_both_directions,
    loaded,
    layers_as_activations,
    words,
    numbers,
    bins,
    shared,
    policies,
    stateful,
    without_input,
    of_a_class,
]
KERAS_3 = [spectral, low_rank, quantized]  # tf_keras has no such layers that work
CASES = [("tf_keras", build) for build in BOTH] + [("keras", build) for build in BOTH + KERAS_3]


# --- what is compared -----------------------------------------------------------------------------


def outputs(model, x):
    y = np.asarray(tf.cast(model(x, training=False), tf.float64))
    for layer in kernel_layers.flatten(model):
        if getattr(layer, "stateful", False) and isinstance(layer, recurrent(model)):
            layer.reset_states() if isinstance(model, tf_keras.Model) else layer.reset_state()
    return y


def recurrent(model):
    return (tf_keras if isinstance(model, tf_keras.Model) else keras).layers.RNN


def trained(weights):
    """The weights by their names and values, however often; those of gates and masks left out."""
    found = collections.Counter()
    for weight in weights:
        if not isinstance(weight, tf.Variable | keras.Variable):
            continue  # tf_keras lists vocabularies among the weights
        name = weight.name.rpartition("/")[2].partition(":")[0]
        if name not in ("log_alpha", "draws"):
            found[name, weight.numpy().tobytes()] += 1
    return found


def flags(model):
    """The `trainable` of every layer and sublayer, by its names; Keras counts those it makes up."""
    layers = kernel_layers.flatten(model)
    return [(re.sub(r"_\d+$", "", layer.name), layer.trainable) for layer in layers]


def state(model, x):
    return (
        outputs(model, x).tobytes(),
        trained(model.trainable_weights),
        trained(model.non_trainable_weights),
        flags(model),
        [repr(vars(layer).get("activation")) for layer in model.layers],
        getattr(model, "compiled", None),
    )


# --- the functions that copy; each returns (copy, what is to give the same outputs) ---------------


def regularized(model):
    copy = pruning.add_regularizers(model, REGULARIZER, layers="head")
    assert copy.get_layer("head").kernel_regularizer is not None
    return copy, model


def open_gates(model):
    copy = gates.add_gates(model, layers="head")
    (layer,) = gated.gated_layers(copy)
    layer.log_alpha.assign(np.full(layer.log_alpha.shape, 4.0))
    return copy, model


def folded(model):
    gated_model = gates.add_gates(model, layers="head")
    return gates.fold(gated_model), gated_model


def compacted(model, x):
    return pruning.compact(model, probe=x).model, model


def stripped(model):
    """What tfmot's wrappers are around, and the model without them: they share the weights."""
    wrapped = tscnc.prune(model, tscnc.schedules.OneShot(0.5), layers="head", engine="tfmot")
    assert flags(pruning.strip(wrapped)) == flags(model)
    return wrapped, model


FUNCTIONS = [regularized, open_gates, folded, compacted, stripped]


@pytest.mark.parametrize(("flavour", "build"), CASES)
def test_copies_have_all_that_the_model_has(flavour, build, tmp_path):
    library = FLAVOURS[flavour]
    model, x = build(library, tmp_path) if build is loaded else build(library)
    before = state(model, x)
    for function in FUNCTIONS:
        if function is stripped and library is keras:
            continue  # tfmot's wrappers take models of tf_keras only
        what = function.__name__
        copy, same = function(model, x) if function is compacted else function(model)
        exact = function not in (open_gates, folded)
        expected = outputs(same, x)
        np.testing.assert_allclose(outputs(copy, x), expected, atol=0 if exact else 1e-5)
        assert state(model, x) == before, f"the model itself is changed by {what}"
        assert copy.name == model.name, what
        assert getattr(copy, "optimizer", None) is None, what
        if build is of_a_class:
            assert type(copy) is type(model), what
        if function not in (open_gates, stripped):
            assert flags(copy) == flags(model), what
        if function is not folded:
            assert trained(copy.trainable_weights) == trained(model.trainable_weights), what
        more = len(copy.trainable_weights) - len(model.trainable_weights)
        assert more == (function is open_gates), what
        if function is not stripped:
            mine = {id(weight) for weight in model.weights}
            assert not mine & {id(weight) for weight in copy.weights}, what


# --- where a copy would lose something ------------------------------------------------------------


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_what_is_pruned_takes_no_regularizer_be_it_a_part(flavour):
    library = FLAVOURS[flavour]
    inner = library.Sequential([library.Input((4,)), library.layers.Dense(8)], name="inner")
    model = library.Sequential([library.Input((4,)), inner, library.layers.Dense(3, name="head")])
    tscnc.prune_now(inner, 0.5)
    for each in (inner, model):
        with pytest.raises(ValueError, match=f"{each.name!r} is pruned already.*strip the model"):
            pruning.add_regularizers(each, REGULARIZER, layers=library.layers.Dense)
    kept = np.asarray(inner.layers[-1].kernel) != 0
    copy = pruning.add_regularizers(pruning.strip(model), REGULARIZER)
    np.testing.assert_array_equal(np.asarray(copy.layers[0].layers[-1].kernel) != 0, kept)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_what_is_compacted_has_its_masks_applied_and_no_pruner(flavour):
    library = FLAVOURS[flavour]
    layers = library.layers
    hidden = layers.Dense(8, activation="relu", name="hidden")
    model = library.Sequential([library.Input((4,)), hidden, layers.Dense(3, name="head")])
    tscnc.prune_now(model, 0.5, layers="hidden", structure=pruning.Filters())
    model.get_layer("hidden").kernel.assign(np.ones((4, 8)))  # past the masks
    small = pruning.compact(model).model
    assert small.get_layer("hidden").units == 4
    np.testing.assert_allclose(small(VECTORS), model(VECTORS), atol=1e-6)
    assert isinstance(small, library.Sequential)
    assert getattr(small, "pruner", None) is None
    assert model.pruner.frozen
    assert pruning.freeze_mask(small).pruner.frozen


@pytest.mark.parametrize(
    ("build", "layer", "words"),
    [
        (
            low_rank,
            "dense",
            "'dense': LoRA is enabled .*, or load the merged weights that save_weights.*",
        ),
        (quantized, "eight", "'eight': it is quantized .int8.* quantize the model afterwards"),
        (quantized, "four", "'four': it is quantized .int4.* quantize the model afterwards"),
    ],
)
def test_kernels_that_are_not_computed_with_are_refused_by_name(build, layer, words):
    model, _ = build(keras)
    with pytest.raises(ValueError, match=f"{words}; or choose other layers"):
        pruning.add_regularizers(model, REGULARIZER, layers=["head", layer])
    reason = words.partition(": ")[2].partition(" .")[0]
    with pytest.raises(ValueError, match=f"{layer!r} can't have gates: {reason}"):
        gates.add_gates(model, layers=["head", layer])


def test_the_kernel_inside_spectral_normalization_is_constrained_without_a_warning():
    model, _ = spectral(keras)
    copy = pruning.add_regularizers(model, REGULARIZER)  # a warning would be an error
    kernels = [model.get_layer("spectral").layer.kernel, model.get_layer("head").kernel]
    expected = sum(float(REGULARIZER(kernel)) for kernel in kernels)
    assert float(sum(copy.losses)) == pytest.approx(expected, rel=1e-6)
    with pytest.warns(UserWarning, match="get no gates: inner/kernel. Gates are"):
        gates.add_gates(model)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_regularizers_reach_models_and_layers_in_wrappers(flavour):
    library = FLAVOURS[flavour]
    for build, count in ((half_frozen, 5), (functions, 6), (shared, 3)):
        model, x = build(library)
        copy = pruning.add_regularizers(model, REGULARIZER)
        np.testing.assert_array_equal(outputs(copy, x), outputs(model, x))
        kernels = list(kernel_layers.kernels(copy))
        assert len(kernels) == count
        for kernel in kernels:
            assert getattr(kernel.layer, kernel.spec.regularizer) is not None


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_predicate_does_not_choose_the_whole_model_for_gates(flavour):
    model, _ = half_frozen(FLAVOURS[flavour])
    with pytest.raises(ValueError, match="chooses no layer"):
        gates.add_gates(model, layers=lambda layer: layer.name not in ("head", "both"))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_functional_model_that_can_not_be_of_its_class_is_refused(flavour):
    library = FLAVOURS[flavour]

    class Own(library.Model):
        def __init__(self, units):
            inputs = library.Input((4,))
            super().__init__(inputs, library.layers.Dense(units)(inputs), name="mine")

    class Training(Own):
        def train_step(self, *args):
            return super().train_step(*args)

    copy = pruning.add_regularizers(Own(3), REGULARIZER)  # it has nothing to lose
    assert copy.name == "mine"
    words = "'mine' is a functional model with train_step of its own .Training.*build its graph out"
    for function in (lambda m: pruning.add_regularizers(m, REGULARIZER), gates.add_gates):
        with pytest.raises(ValueError, match=words):
            function(Training(3))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_weights_that_no_attribute_holds_are_found_by_name_or_not_at_all(flavour):
    library = FLAVOURS[flavour]

    class Hidden(library.layers.Layer):
        def __init__(self, names, **kwargs):
            super().__init__(**kwargs)
            self.names = list(names)

        def build(self, shape):
            made = [self.add_weight(name=name, shape=(shape[-1],)) for name in self.names]
            self.total = lambda: sum(tf.convert_to_tensor(weight) for weight in made)
            super().build(shape)

        def call(self, x):
            return x * self.total()

        def get_config(self):
            return {**super().get_config(), "names": list(self.names)}

    def model(names):
        layers = [Hidden(names, name="hidden"), library.layers.Dense(2, name="head")]
        return library.Sequential([library.Input((4,)), *layers])

    plain = model(["one", "two"])
    copy = pruning.add_regularizers(plain, REGULARIZER)
    np.testing.assert_array_equal(copy(VECTORS), plain(VECTORS))
    with pytest.raises(ValueError, match=r"of layer .hidden. of class Hidden fits 2 weights.*attr"):
        pruning.add_regularizers(model(["same", "same"]), REGULARIZER)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_configuration_that_makes_other_weights_is_refused(flavour):
    library = FLAVOURS[flavour]

    class Sized(library.layers.Layer):
        def __init__(self, size=2, **kwargs):
            super().__init__(**kwargs)
            self.size = size

        def build(self, shape):
            self.table = self.add_weight(name="table", shape=(self.size,))
            super().build(shape)

        def call(self, x):
            return x * tf.reduce_sum(tf.convert_to_tensor(self.table))

        def get_config(self):
            return library.layers.Layer.get_config(self)

    layers = [Sized(5, name="sized"), library.layers.Dense(2, name="head")]
    model = library.Sequential([library.Input((4,)), *layers])
    words = r"weight '.*table.*' is of shape \(5,\), and of shape \(2,\) .*get_config that returns"
    with pytest.raises(ValueError, match=words):
        pruning.add_regularizers(model, REGULARIZER)
