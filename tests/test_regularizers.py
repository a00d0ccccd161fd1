"""The regularizers: values on real layers, saving in both Kerases, mixed precision, bad input."""

from __future__ import annotations

import itertools
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import FLAVOURS, fresh_process

from tscnc_tf import attacks, functional, losses, regularizers, training
from tscnc_tf._keras import layers as kernel_layers
from tscnc_tf._keras import optimizers

EXAMPLES = {
    "element": regularizers.TransformedL1(1e-3, a=0.5),
    "filter": regularizers.TransformedL1(1e-3, groups="filter"),
    "input": regularizers.TransformedL1(1e-3, groups="input"),
    "log_ratio": regularizers.ConditionNumber(1e-2, every=3),
    "authors": regularizers.ConditionNumber(1e-2, form="authors"),
    "orthogonal": regularizers.ConditionNumber(1e-2, form="orthogonal"),
    "TSCNC": regularizers.TSCNC(1e-3, 1e-2, a=2.0, groups="filter", every=2),
    "RegularizerSum": regularizers.RegularizerSum([regularizers.ConditionNumber(1e-2), "l2"]),
}
FINAL = {"TransformedL1", "ConditionNumber", "TSCNC", "RegularizerSum"}


def test_the_list_of_examples_is_complete():
    assert {type(example).__name__ for example in EXAMPLES.values()} == FINAL
    assert FINAL | {"KernelRegularizer"} == set(regularizers.__all__)


def layers_with_kernels(library):
    """A layer of each kind with its input shape, and its kernels as a list of matrices, by hand."""
    L = library.layers  # noqa: N806

    def conv(k):
        return [k.reshape(-1, k.shape[-1])]

    def depthwise(k):
        flat = k.reshape(-1, *k.shape[-2:])
        return [flat[:, channel] for channel in range(flat.shape[1])]

    def transposed(k):
        swapped = np.swapaxes(k, -1, -2)
        return [swapped.reshape(-1, swapped.shape[-1])]

    def grouped(k):
        return [part.reshape(-1, part.shape[-1]) for part in np.split(k, 2, axis=-1)]

    return {
        "Dense": (L.Dense(5), (None, 4), [conv]),
        "Conv1D": (L.Conv1D(5, 3), (None, 8, 4), [conv]),
        "Conv2D": (L.Conv2D(5, 3), (None, 8, 8, 4), [conv]),
        "Conv3D": (L.Conv3D(5, 2), (None, 4, 4, 4, 3), [conv]),
        "grouped": (L.Conv2D(6, 3, groups=2), (None, 8, 8, 4), [grouped]),
        "DepthwiseConv1D": (L.DepthwiseConv1D(3, depth_multiplier=2), (None, 8, 4), [depthwise]),
        "DepthwiseConv2D": (L.DepthwiseConv2D(3, depth_multiplier=2), (None, 8, 8, 4), [depthwise]),
        "SeparableConv1D": (L.SeparableConv1D(5, 3), (None, 8, 4), [depthwise, conv]),
        "SeparableConv2D": (L.SeparableConv2D(5, 3), (None, 8, 8, 4), [depthwise, conv]),
        "Conv1DTranspose": (L.Conv1DTranspose(5, 3), (None, 8, 4), [transposed]),
        "Conv2DTranspose": (L.Conv2DTranspose(5, 3), (None, 8, 8, 4), [transposed]),
        "Conv3DTranspose": (L.Conv3DTranspose(5, 2), (None, 4, 4, 4, 3), [transposed]),
        "LSTM": (L.LSTM(5), (None, 3, 4), [conv, conv]),
        "ConvLSTM1D": (L.ConvLSTM1D(3, 3), (None, 3, 8, 4), [conv, conv]),
        "ConvLSTM2D": (L.ConvLSTM2D(3, 3), (None, 3, 8, 8, 4), [conv, conv]),
        "ConvLSTM3D": (L.ConvLSTM3D(3, 2), (None, 3, 4, 4, 4, 2), [conv, conv]),
    }


def log_ratio_by_svd(matrix, ridge=1e-6):
    eigenvalues = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    ridged = eigenvalues / eigenvalues.mean() + ridge
    return np.log1p(ridge) - np.log(ridged).mean()


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("kind", layers_with_kernels(tf_keras))
def test_each_kind_of_layer_is_read_as_the_right_matrices(flavour, kind):
    layer, shape, readings = layers_with_kernels(FLAVOURS[flavour])[kind]
    layer.build(shape)
    kernels = list(kernel_layers.kernels(layer))
    assert len(kernels) == len(readings)
    for kernel, reading in zip(kernels, readings, strict=True):
        expected = np.mean([log_ratio_by_svd(m) for m in reading(np.asarray(kernel.variable))])
        regularizer = regularizers.ConditionNumber(2.0).for_kernel(**kernel.reading)
        assert float(regularizer(kernel.variable)) == pytest.approx(2 * expected, abs=1e-5)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_layer_adds_the_penalty_to_the_losses_of_its_model(flavour, name):
    library = FLAVOURS[flavour]
    model = library.Sequential([library.layers.Dense(5, kernel_regularizer=EXAMPLES[name])])
    model.build((None, 7))
    (loss,) = model.losses
    assert float(loss) == pytest.approx(float(EXAMPLES[name](model.weights[0])))
    assert float(loss) > 0


def test_values_are_the_sums_of_the_formulas(rng):
    kernel = rng.normal(size=(3, 3, 4, 6)).astype("float32")
    element = 1e-3 * np.sum(1.5 * np.abs(kernel) / (0.5 + np.abs(kernel)))
    assert float(EXAMPLES["element"](kernel)) == pytest.approx(element, rel=1e-5)
    norms = np.sqrt(np.sum(kernel**2, axis=(0, 1, 2)))
    filters = 1e-3 * np.sum(2 * norms / (1 + norms))
    assert float(EXAMPLES["filter"](kernel)) == pytest.approx(filters, rel=1e-5)
    both = regularizers.TransformedL1(1e-3, 2.0, "filter")(kernel) + EXAMPLES["log_ratio"](kernel)
    assert float(EXAMPLES["TSCNC"](kernel)) == pytest.approx(float(both))
    assert float(EXAMPLES["RegularizerSum"](kernel)) == pytest.approx(
        float(EXAMPLES["log_ratio"](kernel)) + 0.01 * np.sum(kernel**2), rel=1e-5
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_configuration_survives_json_in_both_kerases(name):
    example = EXAMPLES[name]
    for library in (keras, tf_keras):
        if name == "RegularizerSum" and library is keras:
            continue  # this one holds tf_keras' l2
        packed = json.loads(json.dumps(library.saving.serialize_keras_object(example)))
        back = library.saving.deserialize_keras_object(packed)
        assert type(back) is type(example)
        assert repr(back.get_config()) == repr(example.get_config())


LOAD = """
import importlib, pathlib, sys
import numpy as np
import tscnc_tf
kernel = np.arange(12.0, dtype="float32").reshape(4, 3) / 7
for path in sys.argv[1:]:
    library = importlib.import_module(pathlib.Path(path).parent.name)
    model = library.models.load_model(path)
    regularizer = model.layers[-1].kernel_regularizer
    print(repr(regularizer.get_config()), float(regularizer(kernel)), float(sum(model.losses)))
"""


def test_sums_of_equal_parts_are_equal():
    parts = ["l2", regularizers.TransformedL1(0.1)]
    one, other = (regularizers.RegularizerSum(parts) for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert one != regularizers.RegularizerSum(parts[::-1]) and one != parts[1]


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5:UserWarning")
def test_models_come_back_in_a_fresh_process(tmp_path):
    paths, expected = [], []
    kernel = np.arange(12.0, dtype="float32").reshape(4, 3) / 7
    for (flavour, library), (name, example) in itertools.product(
        FLAVOURS.items(), EXAMPLES.items()
    ):
        if name == "RegularizerSum":
            example = regularizers.RegularizerSum(
                [EXAMPLES["log_ratio"], library.regularizers.L2(0.1)]
            )
        model = library.Sequential([library.layers.Dense(3, kernel_regularizer=example)])
        model.build((None, 4))
        (tmp_path / flavour).mkdir(exist_ok=True)
        for ending in ("keras", "h5"):
            paths.append(tmp_path / flavour / f"{name}.{ending}")
            model.save(paths[-1])
            expected.append(
                (repr(example.get_config()), float(example(kernel)), float(sum(model.losses)))
            )
    printed = fresh_process(LOAD, *paths).strip().splitlines()
    assert len(printed) == len(expected)
    for line, (config, value, loss) in zip(printed, expected, strict=True):
        config_back, value_back, loss_back = line.rsplit(" ", 2)
        if "RegularizerSum" not in config and "regularizers" not in config:
            assert config_back == config
        assert float(value_back) == pytest.approx(value)
        assert float(loss_back) == pytest.approx(loss)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_mixed_precision_computes_in_float32(flavour, policy):
    library = FLAVOURS[flavour]
    plain = library.layers.Dense(40, kernel_regularizer=EXAMPLES["TSCNC"])
    mixed = library.layers.Dense(40, kernel_regularizer=EXAMPLES["TSCNC"], dtype=policy)
    for layer in (plain, mixed):
        layer.build((None, 50))
    mixed.set_weights(plain.get_weights())
    (loss,), (expected,) = mixed.losses, plain.losses
    assert loss.dtype == expected.dtype == tf.float32
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    half = EXAMPLES["TSCNC"](tf.cast(plain.kernel, tf.float16))
    assert half.dtype == tf.float32
    assert np.isfinite(float(half))


def test_the_regularizers_compile_under_xla(rng):
    kernel = tf.constant(rng.normal(size=(30, 20)), tf.float32)
    for example in EXAMPLES.values():
        compiled = tf.function(example, jit_compile=True)
        assert float(compiled(kernel)) == pytest.approx(float(example(kernel)), rel=1e-5)


def test_training_on_the_condition_number_lowers_it(rng):
    kernel = tf.Variable(rng.normal(size=(12, 8)) * np.logspace(0, -3, 8), dtype=tf.float32)
    regularizer = regularizers.ConditionNumber(1.0)
    before = np.linalg.cond(kernel.numpy())
    optimizer = tf_keras.optimizers.Adam(1e-2)
    for _ in range(200):
        with tf.GradientTape() as tape:
            loss = regularizer(kernel)
        optimizer.apply_gradients([(tape.gradient(loss, kernel), kernel)])
    after = np.linalg.cond(kernel.numpy())
    assert before > 500
    assert after < 3
    size = kernel.shape[1]
    assert after < 2 * np.exp(size * float(functional.log_ratio(kernel)) / 2)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_in_steps_of_training_every_third_has_three_times_the_condition_penalty(rng, jit_compile):
    kernel = tf.Variable(rng.normal(size=(6, 4)), dtype=tf.float32)
    sparse, condition = regularizers.TransformedL1(1e-3), regularizers.ConditionNumber(1e-2)
    both = regularizers.TSCNC(1e-3, 1e-2, every=3)

    @tf.function(jit_compile=jit_compile)
    def in_step(step):
        with tf.GradientTape() as tape, optimizers.in_step(step):
            value = both(kernel)
        return value, tape.gradient(value, kernel)

    def expected(times):
        with tf.GradientTape() as tape:
            value = sparse(kernel) + times * condition(kernel)
        return value, tape.gradient(value, kernel)

    for step, times in enumerate([3.0, 0.0, 0.0, 3.0]):
        for found, right in zip(in_step(tf.constant(step)), expected(times), strict=True):
            np.testing.assert_allclose(found, right, rtol=1e-5)
    np.testing.assert_allclose(both(kernel), expected(1.0)[0], rtol=1e-6)


def test_the_registered_names_hide_nothing_of_keras():
    registered = tf_keras.utils.get_custom_objects().items()
    bare = [
        name
        for name, value in registered
        if ">" not in name and value.__module__.startswith("tscnc_tf")
    ]
    assert set(bare) == FINAL
    rooms = ["metrics", "layers", "losses", "optimizers", "regularizers", "initializers"]
    for room in [*rooms, "callbacks"]:
        assert not [name for name in bare if name in dir(getattr(tf_keras, room))], room
    metric = tf_keras.metrics.get("Sum")
    metric.update_state([1.0, 2.0, 4.0])
    assert type(metric) is tf_keras.metrics.Sum
    assert float(metric.result()) == 7.0


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_einsum_kernels_are_read_only_where_they_are_one_matrix(flavour, rng):
    library = FLAVOURS[flavour]

    def build(equation, output, inputs):
        layer = library.layers.EinsumDense(equation, output_shape=output)
        layer(np.zeros(inputs, "float32"))
        return layer

    attention = library.layers.MultiHeadAttention(2, 3, name="attention")
    x = rng.normal(size=(2, 4, 6)).astype("float32")
    attention(x, x)
    assert not list(kernel_layers.kernels(attention))
    assert not list(kernel_layers.kernels(build("abc,cde->abde", (4, 2, 3), (1, 4, 6))))
    assert not list(kernel_layers.kernels(build("ab,ab->ab", (4,), (3, 4))))
    for equation in ("ab,bc->ac", "ab,cb->ac", "...x,xy->...y"):
        layer = build(equation, (7,), (3, 4))
        matrix = np.asarray(layer.kernel)
        (kernel,) = kernel_layers.kernels(layer)
        regularizer = regularizers.TransformedL1(1.0, groups="filter").for_kernel(**kernel.reading)
        norms = np.sqrt((matrix**2).sum(axis=matrix.shape.index(4)))
        assert norms.shape == (7,)
        expected = np.sum(2 * norms / (1 + norms))
        assert float(regularizer(kernel.variable)) == pytest.approx(expected, rel=1e-5)


def test_the_smallest_ridge_is_finite_on_a_singular_kernel():
    kernel = tf.ones((256, 256))
    value = regularizers.ConditionNumber(1.0, ridge=1e-12)(kernel)
    expected = -(np.log(256 + 1e-12) + 255 * np.log(1e-12)) / 256
    assert float(value) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: regularizers.TransformedL1(-1.0), ValueError, "factor must be >= 0"),
        (lambda: regularizers.TransformedL1(float("nan")), ValueError, "factor must be finite"),
        (lambda: regularizers.TransformedL1("0.1"), TypeError, "factor must be a number"),
        (lambda: regularizers.TransformedL1(1.0, a=0.0), ValueError, "a must be > 0"),
        (
            lambda: regularizers.TransformedL1(1.0, groups="row"),
            ValueError,
            "groups must be one of",
        ),
        (lambda: regularizers.ConditionNumber(1.0, form="det"), ValueError, "form must be one of"),
        (lambda: regularizers.TSCNC(1.0, 1.0, every=0), ValueError, "every must be >= 1, got 0"),
        (
            lambda: regularizers.ConditionNumber(1.0, ridge=0.0),
            ValueError,
            "ridge must be >= 1e-12.*default",
        ),
        (
            lambda: regularizers.ConditionNumber(1.0, ridge=1e-18),
            ValueError,
            "ridge must be >= 1e-12, got 1e-18.*1e-6",
        ),
        (
            lambda: regularizers.TSCNC(1.0, 1.0, ridge=9e-13),
            ValueError,
            "ridge must be >= 1e-12",
        ),
        (
            lambda: regularizers.ConditionNumber(1.0, layout="x"),
            ValueError,
            "layout must be one of",
        ),
        (
            lambda: regularizers.ConditionNumber(1.0, channel_groups=0),
            ValueError,
            "channel_groups must be >= 1",
        ),
        (lambda: regularizers.TSCNC(-1.0, 1.0), ValueError, "sparsity_factor must be >= 0"),
        (lambda: regularizers.TSCNC(1.0, -1.0), ValueError, "condition_factor must be >= 0"),
        (lambda: regularizers.RegularizerSum([]), ValueError, "at least one"),
        (
            lambda: regularizers.RegularizerSum(
                [keras.regularizers.L2(), tf_keras.regularizers.L2()]
            ),
            ValueError,
            "of one Keras",
        ),
        (lambda: EXAMPLES["TSCNC"](np.zeros(3, "float32")), ValueError, "rank >= 2"),
        (lambda: EXAMPLES["TSCNC"](np.zeros((3, 3), "int32")), TypeError, "float dtype"),
        (lambda: EXAMPLES["TSCNC"]([1.0, 0.0]), ValueError, "rank >= 2"),
        (lambda: regularizers.KernelRegularizer()(np.zeros((2, 2), "f")), TypeError, "abstract"),
    ],
)
def test_bad_input_is_named(build, error, words):
    with pytest.raises(error, match=words):
        build()


# Kernels of rank 3 that are no convolution's, with a regularizer that was given by hand


def attention(library, regularizer, name="own_name"):
    """A model of one layer of self-attention, and its kernels as matrices, by hand."""
    layer = library.layers.MultiHeadAttention(2, 4, name=name, kernel_regularizer=regularizer)
    inputs = library.Input((5, 6))
    model = library.Model(inputs, layer(inputs, inputs))
    return model, [kernel_as_matrix(weight) for weight in model.weights if len(weight.shape) == 3]


def kernel_as_matrix(variable):
    values, path = np.asarray(variable), getattr(variable, "path", variable.name)
    into_heads = "attention_output" not in path
    return (
        values.reshape(values.shape[0], -1) if into_heads else values.reshape(-1, values.shape[-1])
    )


def tall(matrix):
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


MISREAD = r"layout='standard' does not fit kernel '.*{}.*'.*Give layout='attention'.*layout='ioo'"


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_attention_is_refused_without_a_layout_and_read_right_with_it(flavour):
    library = FLAVOURS[flavour]
    for name, refused in EXAMPLES.items():
        if name not in ("element", "RegularizerSum"):
            with pytest.raises(ValueError, match=MISREAD.format("own_name/query/kernel")):
                _ = attention(library, refused)[0].losses
    with pytest.raises(ValueError, match=r"layout='ioo' does not fit kernel '.*attention_output"):
        _ = attention(library, regularizers.ConditionNumber(1.0, layout="ioo"))[0].losses
    model, matrices = attention(library, regularizers.ConditionNumber(1.0, layout="attention"))
    assert len(matrices) == 4
    expected = [log_ratio_by_svd(tall(matrix)) for matrix in matrices]
    assert [float(loss) for loss in model.losses] == pytest.approx(expected, abs=1e-5)
    filters = regularizers.TransformedL1(1.0, groups="filter", layout="attention")
    model, matrices = attention(library, filters)
    norms = [np.linalg.norm(matrix, axis=0) for matrix in matrices]
    expected = [np.sum(2 * norm / (1 + norm)) for norm in norms]
    assert [float(loss) for loss in model.losses] == pytest.approx(expected, rel=1e-5)
    plain = attention(library, regularizers.TransformedL1(1.0))[0]
    assert len(plain.losses) == 4  # single weights have no axes to mistake


def test_grouped_query_attention_is_read_by_its_names():
    def losses(regularizer):
        options = {"kernel_regularizer": regularizer}
        layer = keras.layers.GroupQueryAttention(4, 4, 2, **options)
        inputs = keras.Input((5, 6))
        model = keras.Model(inputs, layer(inputs, inputs))
        return model, model.losses

    with pytest.raises(ValueError, match=MISREAD.format("query/kernel")):
        losses(EXAMPLES["TSCNC"])
    model, found = losses(regularizers.ConditionNumber(1.0, layout="attention"))
    kernels = [weight for weight in model.weights if len(weight.shape) == 3]
    expected = [log_ratio_by_svd(tall(kernel_as_matrix(kernel))) for kernel in kernels]
    assert [float(loss) for loss in found] == pytest.approx(expected, abs=1e-5)


def einsum(library, regularizer, name=None):
    layer = library.layers.EinsumDense(
        "abc,cde->abde", (5, 2, 3), kernel_regularizer=regularizer, name=name
    )
    return library.Sequential([library.layers.InputLayer((5, 6)), layer])


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_einsum_dense_takes_a_letter_for_each_axis(flavour):
    library = FLAVOURS[flavour]
    with pytest.raises(ValueError, match=MISREAD.format("einsum_dense.*/kernel")):
        _ = einsum(library, EXAMPLES["log_ratio"]).losses
    spectrum = np.array([10.0, 3.0, 2.0, 1.0, 1.0, 1.0])
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))
    for name in (None, "own_name"):
        model = einsum(library, regularizers.ConditionNumber(1.0, layout="ioo"), name)
        model.layers[-1].kernel.assign((q * spectrum).reshape(6, 2, 3))
        expected = log_ratio_by_svd(q * spectrum)
        assert float(model.losses[0]) == pytest.approx(expected, abs=1e-5)
        both = einsum(library, regularizers.TSCNC(1.0, 1.0, groups="input", layout="ioo"), name)
        kernel = np.asarray(both.layers[-1].kernel).reshape(6, 6)
        norms = np.linalg.norm(kernel, axis=1)
        expected = np.sum(2 * norms / (1 + norms)) + log_ratio_by_svd(kernel)
        assert float(both.losses[0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_convolutions_need_no_layout_whatever_they_are_called(flavour):
    library = FLAVOURS[flavour]
    for name in (None, "einsum", "my_query"):
        layer = library.layers.Conv1D(3, 2, name=name, kernel_regularizer=EXAMPLES["log_ratio"])
        model = library.Sequential([library.layers.InputLayer((5, 6)), layer])
        expected = 1e-2 * log_ratio_by_svd(np.asarray(layer.kernel).reshape(12, 3))
        assert float(model.losses[0]) == pytest.approx(expected, abs=1e-6)
    # One that is called as a part of attention is told apart by its letters.
    said = regularizers.ConditionNumber(1e-2, layout="pio")
    layer = library.layers.Conv1D(3, 2, name="query", kernel_regularizer=said)
    model = library.Sequential([library.layers.InputLayer((5, 6)), layer])
    expected = 1e-2 * log_ratio_by_svd(np.asarray(layer.kernel).reshape(12, 3))
    assert float(model.losses[0]) == pytest.approx(expected, abs=1e-6)
    kernel = np.asarray(layer.kernel)
    assert float(EXAMPLES["log_ratio"](kernel)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_layouts_are_saved_and_a_trainer_looks_at_the_layers(flavour, tmp_path):
    library = FLAVOURS[flavour]
    model, _ = attention(library, regularizers.ConditionNumber(1.0, layout="attention"))
    model.save(tmp_path / "attention.keras")
    loaded = library.models.load_model(tmp_path / "attention.keras")
    assert [float(loss) for loss in loaded.losses] == [float(loss) for loss in model.losses]

    def trained(regularizer):
        model = einsum(library, regularizer, "own_name")
        model.add(library.layers.Flatten())
        model.add(library.layers.Dense(3))
        return training.AdversarialTraining(
            model, attack=attacks.FGSM(epsilon=0.1), loss=losses.Madry()
        )

    with pytest.raises(ValueError, match=r"kernel_regularizer of layer 'own_name'.*layout='ioo'\."):
        trained(regularizers.RegularizerSum([EXAMPLES["TSCNC"]], library.__name__))
    trained(regularizers.TSCNC(1.0, 1.0, layout="ioo"))
    trained(regularizers.TransformedL1(1.0))
    with pytest.raises(ValueError, match=r"layout='attention' is for the kernels of MultiHeadAtt"):
        _ = einsum(library, regularizers.ConditionNumber(1.0, layout="attention")).losses
