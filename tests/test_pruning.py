"""The functions that prune models: what is changed, what is kept, and what is refused."""

from __future__ import annotations

import inspect
import re
import typing

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import FLAVOURS, blobs, conv_model, dense_model

from tscnc_tf import _keras, gates, inspection, pruning, regularizers, schedules
from tscnc_tf._keras import cloning, wrappers
from tscnc_tf._keras import layers as kernel_layers

TSCNC = regularizers.TSCNC(1e-4, 1e-2)
tfmots = _keras.tfmot().sparsity.keras


def nested_model(library):
    inputs = library.Input((8, 8, 1))
    inner = library.Sequential(
        [
            library.layers.Conv2D(4, 3, name="inner_conv"),
            library.layers.BatchNormalization(),
            library.layers.SeparableConv2D(4, 3, name="inner_separable"),
        ],
        name="inner",
    )
    x = library.layers.Flatten()(inner(inputs))
    return library.Model(inputs, library.layers.Dense(3, name="logits")(x))


BUILDERS = {
    "sequential": lambda library: dense_model(library),
    "functional": lambda library: conv_model(library),
    "nested": nested_model,
}


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("kind", BUILDERS)
def test_add_regularizers_keeps_weights_and_outputs_bit_for_bit(flavour, kind, rng):
    library = FLAVOURS[flavour]
    model = BUILDERS[kind](library)
    model.set_weights([rng.uniform(0.1, 1, w.shape) for w in model.get_weights()])
    x = rng.uniform(size=(5, *model.input_shape[1:])).astype("float32")
    new = pruning.add_regularizers(model, TSCNC)
    assert new is not model
    names = [[layer.name for layer in m.layers if layer.get_weights()] for m in (model, new)]
    assert names[0] == names[1]
    for before, after in zip(model.get_weights(), new.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(model(x, training=False), new(x, training=False))
    kernels = list(kernel_layers.kernels(new))
    assert len(new.losses) == len(kernels)
    assert not model.losses
    expected = sum(float(TSCNC.for_kernel(**k.reading)(k.variable)) for k in kernels)
    assert float(sum(new.losses)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_layers_are_chosen_by_type_name_predicate_and_list(flavour):
    library = FLAVOURS[flavour]
    model = nested_model(library)

    def touched(layers):
        new = pruning.add_regularizers(model, TSCNC, layers=layers)
        return [
            kernel.name
            for kernel in kernel_layers.kernels(new)
            if getattr(kernel.layer, kernel.spec.regularizer) is not None
        ]

    separable = ["inner_separable/depthwise_kernel", "inner_separable/pointwise_kernel"]
    assert touched(library.layers.Dense) == ["logits"]
    assert touched("inner_*") == ["inner_conv", *separable]
    assert touched(lambda layer: layer.name == "inner_conv") == ["inner_conv"]
    assert touched(["logits", library.layers.SeparableConv2D]) == [*separable, "logits"]
    with pytest.raises(ValueError, match=r"chooses no layer.*inner_conv"):
        touched("nothing*")
    with pytest.raises(TypeError, match="layers must be a layer class"):
        touched(3)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_regularizer_that_is_there_stays(flavour):
    library = FLAVOURS[flavour]
    model = dense_model(library, kernel_regularizer=library.regularizers.L2(0.1))
    new = pruning.add_regularizers(model, TSCNC, layers="logits")
    plain, both = new.losses
    kernel = model.layers[-1].get_weights()[0]
    assert float(plain) == pytest.approx(0.1 * np.sum(model.layers[-2].get_weights()[0] ** 2))
    assert float(both) == pytest.approx(float(TSCNC(kernel)) + 0.1 * np.sum(kernel**2), rel=1e-5)


def test_trainability_and_dtype_policies_are_kept():
    model = dense_model(dtype="mixed_bfloat16")
    model.layers[0].trainable = False
    new = pruning.add_regularizers(model, TSCNC)
    assert [layer.trainable for layer in new.layers] == [False, True]
    assert new.layers[0].dtype_policy.name == "mixed_bfloat16"


def test_prune_goes_through_tfmots_wrappers_and_shares_the_weights():
    model = conv_model()
    pruned = pruning.prune(model, schedules.OneShot(0.5))
    names = [wrapper.layer.name for wrapper in wrappers.wrapped_layers(pruned)]
    assert names == ["conv", "logits"]
    assert all(wrappers.is_wrapper(layer) for layer in wrappers.wrapped_layers(pruned))
    x = np.ones((2, 8, 8, 1), "float32")
    np.testing.assert_array_equal(model(x), pruned(x, training=False))
    assert wrappers.wrapped_layers(pruned)[0].layer.kernel is model.get_layer("conv").kernel


def test_the_zeros_are_exactly_those_of_numpy(rng):
    model = dense_model()
    kernels = [layer.kernel.numpy() for layer in model.layers]
    pruned = pruning.prune(model, schedules.OneShot(0.75))
    pruned.compile(tf_keras.optimizers.SGD(0.0), "mse")
    x = rng.uniform(size=(4, 6))
    pruned.fit(x, np.zeros((4, 3)), verbose=0, callbacks=[tfmots.UpdatePruningStep()])
    for layer, kernel in zip(pruning.strip(pruned).layers, kernels, strict=True):
        kept = np.sort(np.abs(kernel).ravel())[-round(kernel.size * 0.25) :]
        expected = np.where(np.abs(kernel) >= kept.min(), kernel, 0)
        np.testing.assert_array_equal(layer.kernel.numpy(), expected)


class Scale(tf_keras.layers.Layer):
    """A layer that tfmot has never heard of, with a weight of rank 2."""

    def build(self, input_shape):
        self.matrix = self.add_weight("matrix", (input_shape[-1], input_shape[-1]))

    def call(self, inputs):
        return tf.matmul(inputs, self.matrix)


def test_an_unprunable_layer_is_skipped_with_a_warning_and_a_reason():
    model = tf_keras.Sequential(
        [
            tf_keras.layers.Dense(4, input_shape=(3,), name="first"),
            Scale(name="scale"),
            tf_keras.layers.Dense(2, name="last"),
        ]
    )
    with pytest.warns(UserWarning, match=r"left unpruned: scale \(tfmot does not know.*Scale"):
        pruned = pruning.prune(model, schedules.OneShot(0.5), layers=["first", "scale"])
    report = pruning.report(pruned)
    assert [(row.name, row.pruned) for row in report.rows] == [
        ("first", True),
        ("scale", False),
        ("last", False),
    ]
    assert "get_prunable_weights" in report.rows[1].reason
    assert report.rows[2].reason == "not chosen"
    assert report.skipped == report.rows[1:]
    text = str(report)
    assert "scale" in text
    assert "not chosen" in text


def test_layers_that_tfmot_registers_without_weights_are_skipped_too():
    model = tf_keras.Sequential(
        [
            tf_keras.layers.DepthwiseConv2D(3, input_shape=(8, 8, 2), name="depthwise"),
            tf_keras.layers.Flatten(),
            tf_keras.layers.Dense(2),
        ]
    )
    with pytest.warns(UserWarning, match="depthwise"):
        pruned = pruning.prune(model, schedules.OneShot(0.5))
    assert [row.pruned for row in pruning.report(pruned).rows] == [False, True]


def test_nested_models_are_pruned_inside():
    pruned = pruning.prune(nested_model(tf_keras), schedules.OneShot(0.5))
    names = [wrapper.layer.name for wrapper in wrappers.wrapped_layers(pruned)]
    assert names == ["inner_conv", "inner_separable", "logits"]
    stripped = pruning.strip(pruned)
    assert not wrappers.wrapped_layers(stripped)
    x = np.ones((2, 8, 8, 1), "float32")
    np.testing.assert_array_equal(stripped(x, training=False), pruned(x, training=False))


def test_strip_applies_the_masks_first():
    pruned = pruning.prune(dense_model(), schedules.OneShot(0.5))
    for weight, mask in wrappers.pruned_variables(pruned):
        mask.assign(np.resize([0.0, 1.0], mask.shape))
        weight.assign(tf.ones_like(weight))
    for layer in pruning.strip(pruned).layers:
        np.testing.assert_array_equal(layer.kernel, np.resize([0.0, 1.0], layer.kernel.shape))


def test_strip_leaves_a_model_without_wrappers_alone():
    model = dense_model()
    assert pruning.strip(model) is model


def test_the_bare_view_shares_variables_and_changes_nothing():
    pruned = pruning.prune(conv_model(), schedules.OneShot(0.5))
    output = pruned.layers[1].output
    view = cloning.bare(pruned)
    assert not wrappers.wrapped_layers(view)
    assert cloning.bare(pruned) is view
    assert pruned.layers[1].output is output
    assert {id(w) for w in view.weights} < {id(w) for w in pruned.weights}
    x = np.ones((2, 8, 8, 1), "float32")
    np.testing.assert_array_equal(view(x, training=False), pruned(x, training=False))


def test_masks_reach_the_moving_averages_of_the_optimizer(rng):
    pruned = pruning.prune(dense_model(), schedules.OneShot(0.5))
    optimizer = tf_keras.optimizers.SGD(0.1, use_ema=True)
    optimizer.build(pruned.trainable_variables)
    pairs = list(wrappers.pruned_variables(pruned))
    for _, mask in pairs:
        mask.assign(np.resize([0.0, 1.0], mask.shape))
    for average in optimizer._model_variables_moving_average:
        average.assign(tf.ones_like(average))
    wrappers.apply_masks(pruned, optimizer)
    averages = optimizer._model_variables_moving_average
    assert len(averages) == 4
    sums = sorted(float(tf.reduce_mean(average)) for average in averages)
    assert sums == [0.5, 0.5, 1.0, 1.0], "two kernels are masked, two biases are not"


class Subclassed(tf_keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = tf_keras.layers.Dense(3)

    def call(self, inputs):
        return self.dense(inputs)


def subclassed():
    model = Subclassed()
    model.build((None, 4))
    return model


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_copy_of_a_compiled_model_with_adapted_layers_computes_the_same(flavour, rng):
    library = FLAVOURS[flavour]
    normalization = library.layers.Normalization()
    x = rng.normal(3.0, 2.0, size=(64, 4)).astype("float32")
    normalization.adapt(x)
    inputs = library.Input((4,))
    model = library.Model(inputs, library.layers.Dense(3)(normalization(inputs)))
    model.compile("sgd", loss=lambda y, prediction: prediction)
    copy = pruning.add_regularizers(model, TSCNC)
    np.testing.assert_array_equal(copy(x), model(x))
    assert getattr(copy, "optimizer", None) is None
    assert model.optimizer is not None


class Forgetful(tf_keras.layers.Dense):
    """A layer whose configuration lacks one of its constructor's arguments."""

    def __init__(self, units, secret, **kwargs):
        super().__init__(units, **kwargs)
        self.secret = secret


@pytest.mark.parametrize("method", ["call", "train_step"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_sequential_with_methods_of_its_own_is_not_copied_without_them(flavour, method, rng):
    library = FLAVOURS[flavour]

    def own(self, *args, **kwargs):
        return getattr(super(kind, self), method)(*args, **kwargs)

    kind = type("Own", (library.Sequential,), {method: own})
    model = kind([library.Input((4,)), library.layers.Dense(3)])
    words = f"is a Sequential with {method} of its own .Own., which a copy"
    with pytest.raises(ValueError, match=words):
        pruning.add_regularizers(model, TSCNC)
    with pytest.raises(ValueError, match=words):
        gates.add_gates(model)
    if library is tf_keras:
        with pytest.raises(ValueError, match=words):
            pruning.prune(model, schedules.OneShot(0.5), engine="tfmot")
    pruning.prune_now(model, 0.5)  # nothing is copied
    assert inspection.sparsity(model).sparsity == 0.5
    with pytest.raises(ValueError, match=words):
        pruning.add_regularizers(pruning.strip(model), TSCNC)


def test_bad_input_is_named():
    schedule = schedules.OneShot(0.5)
    add, prune = pruning.add_regularizers, pruning.prune
    cases = [
        (lambda: add(subclassed(), TSCNC), ValueError, "subclassed model"),
        (lambda: add("model", TSCNC), TypeError, "must be a Keras 3 or tf_keras model, got str"),
        (lambda: add(dense_model(), 0.1), TypeError, "regularizer must be callable"),
        (
            lambda: add(tf_keras.Sequential([tf_keras.layers.Dense(2)]), TSCNC),
            ValueError,
            "no weights yet",
        ),
        (lambda: add(prune(dense_model(), schedule), TSCNC), ValueError, "before prune"),
        (
            lambda: add(
                tf_keras.Sequential([Forgetful(2, 1, input_shape=(3,), name="odd")]), TSCNC
            ),
            ValueError,
            "layer 'odd' of class Forgetful can't be rebuilt.*get_config",
        ),
        (
            lambda: prune(dense_model(keras), schedule, engine="tfmot"),
            ValueError,
            "engine must be 'masks' for the Keras 3 model",
        ),
        (lambda: prune(subclassed(), schedule), ValueError, 'subclassed model.*engine="masks"'),
        (lambda: prune(dense_model(), schedule, engine="torch"), ValueError, "engine must be one"),
        (lambda: prune(dense_model(), 0.5), TypeError, "schedule must be a PruningSchedule"),
        (
            lambda: prune(dense_model(), sparsity=0.5),
            TypeError,
            "schedule must be given with method='magnitude'.* sparsity= is for method='scores'",
        ),
        (lambda: prune(dense_model(keras)), TypeError, "schedule must be given with method='mag"),
        (lambda: prune(prune(dense_model(), schedule), schedule), ValueError, "pruned already"),
        (
            lambda: prune(dense_model(), schedule, layers="no*"),
            ValueError,
            "no layer that can be pruned",
        ),
        (lambda: pruning.strip(3), TypeError, "got int"),
        (lambda: pruning.report(3), TypeError, "got int"),
    ]
    for build, error, words in cases:
        with pytest.raises(error, match=words):
            build()


@pytest.mark.parametrize("library", [tf_keras, keras], ids=["tf_keras", "keras"])
def test_options_of_another_way_to_prune_are_refused_by_name(library):
    once, masks = schedules.OneShot(0.5), "method='magnitude' by engine='masks'"
    tfmot, scores = "method='magnitude' by engine='tfmot'", "method='scores'"
    cases = [
        ({"schedule": once, "engine": "masks", "perturb_scores": 0.1}, masks, scores),
        ({"schedule": once, "engine": "masks", "also_train": "all"}, masks, scores),
        ({"schedule": once, "engine": "masks", "block_size": (2, 2)}, masks, tfmot),
        ({"method": "scores", "sparsity": 0.5, "criterion": abs}, scores, masks),
        ({"method": "scores", "sparsity": 0.5, "block_size": (2, 2)}, scores, tfmot),
    ]
    if library is tf_keras:
        cases += [
            ({"schedule": once, "structure": pruning.NM(2, 4)}, tfmot, f"{masks} and of {scores}"),
            ({"schedule": once, "frequency": 2}, tfmot, scores),
        ]
    for given, how, others in cases:
        name, value = list(given.items())[-1]
        words = f"{name} must be left out with {how}, got {value!r}: it is an option of {others}."
        model = dense_model(library)
        with pytest.raises(TypeError, match=f"^{re.escape(words)}$"):
            pruning.prune(model, **given)
        assert not hasattr(model, "pruner")
    for call in (
        lambda: pruning.prune_now(model, 0.5, engine="masks"),
        lambda: pruning.prune(model, once, engine="masks", scop="erk"),
    ):
        with pytest.raises(
            TypeError, match=r"got '\w+': the options there are criterion, min_rank"
        ):
            call()


def test_training_without_wrappers_ignores_the_callbacks():
    from tscnc_tf import callbacks

    x, y = blobs(16)
    model = dense_model()
    model.compile("sgd", tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = model.fit(x, y, verbose=0, callbacks=callbacks.pruning_callbacks())
    assert np.isfinite(history.history["loss"][0])


def test_masks_apply_outside_the_scope_of_a_strategy():
    devices = [device.name for device in tf.config.list_logical_devices("CPU")]
    strategy = tf.distribute.MirroredStrategy(
        devices, cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    with strategy.scope():
        pruned = pruning.prune(dense_model(), schedules.OneShot(0.5))
        for _, mask in wrappers.pruned_variables(pruned):
            mask.assign(np.resize([0.0, 1.0], mask.shape))
    wrappers.apply_masks(pruned)
    for weight, _ in wrappers.pruned_variables(pruned):
        for value in strategy.experimental_local_results(weight):
            assert np.mean(value.numpy() == 0) == 0.5


def constrained(model):
    """The kernels of a model that have a regularizer, by name."""
    return [
        kernel.name
        for kernel in kernel_layers.kernels(model)
        if getattr(kernel.layer, kernel.spec.regularizer) is not None
    ]


def sequence_model(library):
    layers = library.layers
    inputs = library.Input((5, 4))
    x = layers.TimeDistributed(layers.Dense(6, name="inner"), name="each")(inputs)
    sub = library.Sequential([library.Input((6,)), layers.Dense(3, name="deep")], name="sub")
    x = layers.TimeDistributed(sub, name="every")(x)
    x = layers.Bidirectional(layers.LSTM(3, name="lstm"), name="both")(x)
    x = layers.Reshape((2, 3))(x)
    cells = [layers.GRUCell(2, name="gru"), layers.SimpleRNNCell(2, name="simple")]
    x = layers.RNN(cells, name="rnn")(x)
    return library.Model(inputs, layers.Dense(2, name="logits")(x))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_kernels_inside_wrappers_are_constrained(flavour, rng):
    library = FLAVOURS[flavour]
    model = sequence_model(library)
    new = pruning.add_regularizers(model, TSCNC)
    kernels = list(kernel_layers.kernels(new))
    assert len(kernels) == 2 + 4 + 4 + 1
    assert constrained(new) == [kernel.name for kernel in kernels]
    assert not constrained(model)
    expected = sum(float(TSCNC.for_kernel(**k.reading)(k.variable)) for k in kernels)
    assert float(sum(new.losses)) == pytest.approx(expected, rel=1e-5)
    x = rng.normal(size=(2, 5, 4)).astype("float32")
    np.testing.assert_array_equal(model(x), new(x))
    assert constrained(pruning.add_regularizers(model, TSCNC, layers="inner")) == ["inner"]
    assert constrained(pruning.add_regularizers(model, TSCNC, layers="every")) == ["deep"]
    deep = pruning.add_regularizers(model, TSCNC, layers=model.get_layer("every"))
    assert constrained(deep) == ["deep"]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_chosen_kernels_that_stay_unconstrained_are_named(flavour, rng):
    library = FLAVOURS[flavour]
    inputs = library.Input((5, 4))
    attention = library.layers.MultiHeadAttention(2, 3, name="attention")
    outputs = library.layers.Dense(2, name="logits")(attention(inputs, inputs))
    model = library.Model(inputs, outputs)
    words = r"stay unconstrained: attention/query/kernel, .*attention/attention_output/kernel\."
    with pytest.warns(UserWarning, match=words):
        new = pruning.add_regularizers(model, TSCNC)
    kernel = model.get_layer("logits").kernel
    assert float(sum(new.losses)) == pytest.approx(float(TSCNC(kernel)), rel=1e-5)
    pruning.add_regularizers(model, TSCNC, layers="logits")  # no warning


def shared_model(library):
    """A layer and a nested model that are used in the outer model and in another nested one."""
    layers = library.layers
    inputs = library.Input((4,))
    shared = layers.Dense(4, name="shared")
    deep = library.Sequential([library.Input((4,)), layers.Dense(4, name="deep")], name="deepest")
    inner = library.Model(inputs, deep(shared(inputs)), name="inner")
    outer = library.Input((4,))
    x = deep(shared(inner(outer)))
    return library.Model(outer, layers.Dense(3, name="logits")(x))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_shared_layers_stay_shared_under_a_regularizer(flavour, rng):
    model = shared_model(FLAVOURS[flavour])
    new = pruning.add_regularizers(model, TSCNC)
    assert [w.shape for w in new.get_weights()] == [w.shape for w in model.get_weights()]
    assert new.get_layer("shared") is new.get_layer("inner").get_layer("shared")
    x = rng.normal(size=(5, 4)).astype("float32")
    np.testing.assert_array_equal(model(x), new(x))
    kernels = [kernel.variable for kernel in kernel_layers.kernels(new)]
    assert len(kernels) == 3
    expected = sum(float(TSCNC(kernel)) for kernel in kernels)
    assert float(sum(new.losses)) == pytest.approx(expected, rel=1e-5)


def test_shared_layers_get_one_mask():
    model = shared_model(tf_keras)
    pruned = pruning.prune(model, schedules.OneShot(0.5))
    pairs = list(wrappers.pruned_variables(pruned))
    assert len(pairs) == len({id(weight) for weight, _ in pairs}) == 3
    for _, mask in pairs:
        mask.assign(np.resize([0.0, 1.0], mask.shape))
    stripped = pruning.strip(pruned)
    x = np.ones((2, 4), "float32")
    np.testing.assert_array_equal(stripped(x), model(x))
    for weight, mask in pairs:
        np.testing.assert_array_equal(weight == 0, mask == 0)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_layers_are_chosen_by_identity(flavour):
    model = nested_model(FLAVOURS[flavour])

    def touched(layers):
        return constrained(pruning.add_regularizers(model, TSCNC, layers=layers))

    inner = model.get_layer("inner")
    separable = ["inner_separable/depthwise_kernel", "inner_separable/pointwise_kernel"]
    assert touched(model.get_layer("logits")) == ["logits"]
    assert touched([inner.layers[0], model.get_layer("logits")]) == ["inner_conv", "logits"]
    assert touched(inner) == ["inner_conv", *separable]
    with pytest.raises(ValueError, match="chooses no layer"):
        touched(dense_model(FLAVOURS[flavour]).layers[-1])


def test_prune_takes_a_layer_by_identity():
    model = dense_model()
    pruned = pruning.prune(model, schedules.OneShot(0.5), layers=model.layers[1])
    assert [w.layer for w in wrappers.wrapped_layers(pruned)] == [model.layers[1]]


def test_blocks_skip_what_is_not_a_matrix():
    with pytest.warns(UserWarning, match=r"conv \(block_size=\(2, 2\) is for weights of rank 2"):
        pruned = pruning.prune(conv_model(), schedules.OneShot(0.5), block_size=(2, 2))
    rows = pruning.report(pruned).rows
    assert [(row.name, row.pruned) for row in rows] == [("conv", False), ("logits", True)]
    assert "rank [4]" in rows[0].reason
    (wrapper,) = wrappers.wrapped_layers(pruned)
    assert tuple(wrapper.block_size) == (2, 2)


def test_patterns_of_m_by_n_skip_what_they_do_not_fit_and_are_not_saved(tmp_path):
    model = tf_keras.Sequential(
        [
            tf_keras.layers.Conv1D(3, 2, input_shape=(5, 2), name="conv"),
            tf_keras.layers.Flatten(),
            tf_keras.layers.Dense(4, name="logits"),
        ]
    )
    with (
        pytest.warns(UserWarning, match=r"conv \(sparsity_m_by_n=\(2, 4\) is for .*rank \[3\]"),
        pytest.warns(UserWarning, match=r"does not save sparsity_m_by_n=\(2, 4\)"),
    ):
        pruned = pruning.prune(model, schedules.OneShot(0.5), sparsity_m_by_n=(2, 4))
    with pytest.warns(UserWarning) as warned:  # tfmot counts zeros, NM what is kept
        pruning.prune(
            tf_keras.models.clone_model(model), schedules.OneShot(0.5), sparsity_m_by_n=(1, 4)
        )
    assert any("structure=NM(n=3, m=4), which is saved" in str(w.message) for w in warned)
    rows = pruning.report(pruned).rows
    assert [(row.name, row.pruned) for row in rows] == [("conv", False), ("logits", True)]
    pruned.save(tmp_path / "pruned.keras")
    with pruning.prune_scope():
        back = tf_keras.models.load_model(tmp_path / "pruned.keras")
    assert wrappers.wrapped_layers(pruned)[0].sparsity_m_by_n == (2, 4)
    assert wrappers.wrapped_layers(back)[0].sparsity_m_by_n is None, "then the warning is obsolete"


def test_frozen_layers_are_named_and_listed():
    model = dense_model()
    model.layers[0].trainable = False
    with pytest.warns(UserWarning, match=r"hidden \(it is frozen \(trainable=False\)\)"):
        pruned = pruning.prune(model, schedules.OneShot(0.5))
    rows = pruning.report(pruned).rows
    assert [(r.name, r.weights, r.pruned) for r in rows] == [
        ("hidden", 48, False),
        ("logits", 24, True),
    ]
    assert rows[0].reason == "it is frozen (trainable=False)"


def test_a_layer_made_of_others_is_listed_weight_by_weight():
    inputs = tf_keras.Input((5, 4))
    x = tf_keras.layers.LSTM(3, return_sequences=True, name="lstm")(inputs)
    x = tf_keras.layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    x = tf_keras.layers.Bidirectional(tf_keras.layers.LSTM(2), name="both")(x)
    model = tf_keras.Model(inputs, tf_keras.layers.Dense(2, name="logits")(x))
    with pytest.warns(UserWarning, match="left unpruned: both"):
        pruned = pruning.prune(model, schedules.OneShot(0.5))
    rows = {row.name: row for row in pruning.report(pruned).rows}
    assert len(rows) == 2 + 4 + 3 + 4 + 1
    assert {name: (row.weights, row.pruned) for name, row in rows.items() if row.pruned} == {
        "lstm/lstm_cell/kernel": (4 * 4 * 3, True),
        "lstm/lstm_cell/recurrent_kernel": (3 * 4 * 3, True),
        **{f"attention/{part}/kernel": (18, True) for part in ("query", "key", "value")},
        "attention/attention_output": (18, True),
        "logits": (8, True),
    }
    assert not rows["attention/query/bias"].pruned
    assert all("does not know" in row.reason for name, row in rows.items() if "both/" in name)
    assert sum("both/" in name for name in rows) == 4
    masked = sum(weight.shape.num_elements() for weight, _ in wrappers.pruned_variables(pruned))
    assert masked == 84 + 72 + 8


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_convolutional_recurrent_layers_have_both_of_their_kernels(flavour, dimensions):
    library = FLAVOURS[flavour]
    kind = getattr(library.layers, f"ConvLSTM{dimensions}D")
    inputs = library.Input((3, *[5] * dimensions, 2))
    x = library.layers.Flatten()(kind(2, 2, name="film")(inputs))
    model = library.Model(inputs, library.layers.Dense(2, name="logits")(x))

    regularizer = regularizers.ConditionNumber(1.0)
    copy = pruning.add_regularizers(model, regularizer, layers="film")
    cell = copy.get_layer("film").cell
    expected = [float(regularizer(each)) for each in (cell.kernel, cell.recurrent_kernel)]
    assert [float(loss) for loss in copy.losses] == pytest.approx(expected)
    conditions = inspection.singular_values(model)
    for name in ("kernel", "recurrent_kernel"):
        kernel = np.asarray(getattr(model.get_layer("film").cell, name), np.float64)
        spectrum = np.linalg.svd(kernel.reshape(-1, 8), compute_uv=False)
        (found,) = [v for k, v in conditions.items() if k.endswith(f"/{name}")]
        np.testing.assert_allclose(found, spectrum, rtol=1e-5, atol=1e-6)

    pruning.prune_now(model, 0.5, structure=pruning.Filters())
    zeros = {row.name.rpartition("/")[2]: row for row in pruning.report(model).rows if row.pruned}
    assert set(zeros) == {"kernel", "recurrent_kernel"}
    for name, row in zeros.items():
        kernel = np.asarray(getattr(model.get_layer("film").cell, name)).reshape(-1, 8)
        assert (~kernel.any(axis=0)).sum() == 4 and row.sparsity == 0.5


# `layers=` of every verb


VERBS = {
    "prune": lambda model, layers: pruning.prune(model, schedules.OneShot(0.5), layers=layers),
    "prune_now": lambda model, layers: pruning.prune_now(model, 0.5, layers=layers),
    "scores": lambda model, layers: pruning.prune(
        model, method="scores", sparsity=0.5, layers=layers
    ),
    "freeze_mask": lambda model, layers: pruning.freeze_mask(model, layers=layers),
    "condition_budgets": lambda model, layers: pruning.condition_budgets(model, 0.5, layers=layers),
    "add_regularizers": lambda model, layers: pruning.add_regularizers(model, TSCNC, layers=layers),
    "add_gates": gates.add_gates,
}


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("verb", VERBS)
def test_what_fits_no_layer_is_an_error_in_a_list_too(flavour, verb):
    library, call = FLAVOURS[flavour], VERBS[verb]
    can = r"\['hidden', 'logits'\]"
    other = library.layers.Dense(2, name="stranger")
    cases = [
        (["hidden", "logit"], rf"layers has 'logit' in it.*{can} \(did you mean 'logits'\?\)"),
        (["hid*", "no*"], rf"layers has 'no\*' in it, which fits no layer of model .*{can}\.$"),
        ((library.layers.Dense, library.layers.Conv2D), f"Conv2D'> in it, which fits no.*{can}"),
        ([["hidden"], [other]], f"layers has layer 'stranger' in it, which fits no layer.*{can}"),
        ("logit", rf"layers='logit'.*{can} \(did you mean 'logits'\?\)"),
        (other, f"layers=.*{can}"),
        (library.layers.Conv2D, f"layers=.*{can}"),
        (lambda layer: False, f"layers=.*{can}"),
    ]
    for layers, words in cases:
        with pytest.raises(ValueError, match=words):
            call(dense_model(library), layers)
    model = dense_model(library)
    call(model, ["hidden", lambda layer: False])  # what a predicate is for is not known


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_only_layers_that_can_be_chosen_are_listed(flavour):
    library = FLAVOURS[flavour]
    model = conv_model(library)
    for verb, call in VERBS.items():
        with pytest.raises(ValueError, match=r"\['conv', 'logits'\]") as error:
            call(model, ["norm*", "nothing"])
        assert "re_lu" not in str(error.value), verb
    recurrent = library.Sequential(
        [library.layers.InputLayer((3, 4)), library.layers.LSTM(2, name="lstm")]
    )
    with pytest.raises(ValueError, match=r"those that have one are \['lstm'\] \(did you mean"):
        pruning.add_regularizers(recurrent, TSCNC, layers="lsmt")
    assert pruning.add_regularizers(recurrent, TSCNC, layers="lstm").losses


def test_type_checkers_know_the_options_of_each_engine_and_method():
    callables = (pruning.Pruner, tfmots.prune_low_magnitude, pruning.ScorePruner)
    by_position = {"self", "model", "schedule", "to_prune", "pruning_schedule", "layers", "kwargs"}
    overloads = typing.get_overloads(pruning.prune)
    for function, overload in zip(callables, overloads, strict=True):
        hints = typing.get_type_hints(overload, include_extras=True)
        (options,) = typing.get_args(hints["options"])
        known = inspect.signature(function).parameters.keys() - by_position
        assert typing.get_type_hints(options).keys() == known
    engines = [typing.get_type_hints(overload)["engine"] for overload in overloads]
    assert [typing.get_args(typing.get_args(each)[0]) for each in engines] == [
        ("masks",),
        ("tfmot",),
        ("masks",),
    ]
