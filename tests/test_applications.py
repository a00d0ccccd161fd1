"""The networks of the literature: sizes, names, what they compute, and that they can be used."""

from __future__ import annotations

import fnmatch
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import FLAVOURS, fresh_process

import tscnc_tf as tscnc
from tscnc_tf import applications
from tscnc_tf._keras import layers as kernel_layers
from tscnc_tf.experiments.parts import ARCHITECTURES

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
LOOKS = {  # a small form of each family
    "resnet20": lambda **options: applications.ResNet20(input_shape=(8, 8, 3), **options),
    "wrn10x2": lambda **options: applications.WideResNet(10, 2, input_shape=(8, 8, 3), **options),
    "wrn16x1": lambda **options: applications.WideResNet(16, 1, input_shape=(8, 8, 3), **options),
    "small_cnn": lambda **options: applications.SmallCNN(input_shape=(8, 8, 3), **options),
    "vgg8": lambda **options: applications.VGG8(width=4, input_shape=(8, 8, 3), **options),
    "lenet5": lambda **options: applications.LeNet5(
        width=4, hidden=16, input_shape=(8, 8, 3), **options
    ),
    "mobilenetv1": lambda **options: applications.MobileNetV1(
        width=0.25, strides=2, input_shape=(8, 8, 3), **options
    ),
    "mobilenetv2": lambda **options: applications.MobileNetV2(
        width=0.125, strides=2, input_shape=(8, 8, 3), **options
    ),
}


@pytest.fixture(params=FLAVOURS)
def library(request):
    return request.param


def size(weights):
    return sum(int(np.prod(weight.shape)) for weight in weights)


def conv(size, inputs, outputs):
    """Weights of a convolution without a bias, and the scale and offset of its BatchNorm."""
    return size * size * inputs * outputs + 2 * outputs


def resnet_count(stem, widths, blocks, classes=10):
    total, before = conv(3, 3, stem), stem
    for width in widths:
        total += conv(3, before, width) + (2 * blocks - 1) * conv(3, width, width)
        total += conv(1, before, width) if before != width else 0
        before = width
    return total + (before + 1) * classes


def wrn_count(depth, width, classes=10):
    """As `conv` counts a BatchNorm behind each convolution; here they are before, so one is moved.

    A projection has none; each stage's first BatchNorm is as wide as the stage before.
    """
    blocks = (depth - 4) // 6
    total, before = 9 * 3 * 16, 16
    for now in (16 * width, 32 * width, 64 * width):
        kernels = 9 * now * (before + (2 * blocks - 1) * now)
        kernels += before * now if before != now else 0
        norms = 2 * before + 2 * (2 * blocks - 1) * now
        total, before = total + kernels + norms, now
    return total + 2 * before + (before + 1) * classes


def vgg_count(hidden):
    widths = [3, 64, 64, 128, 128, 256, 256, 256, *[512] * 6]
    total = sum(conv(3, a, b) for a, b in itertools.pairwise(widths))
    return total + hidden * (512 * 512 + 512) + 513 * 10


def vgg8_count(height, channels):
    pairs = itertools.pairwise([channels, 32, 32, 64, 64, 128, 128])
    return sum(conv(3, a, b) for a, b in pairs) + ((height // 8) ** 2 * 128 + 1) * 256 + 257 * 10


def lenet5_count(height, channels):
    convolutions = (25 * channels + 1) * 32 + (25 * 32 + 1) * 64
    return convolutions + ((height // 4) ** 2 * 64 + 1) * 1024 + 1025 * 10


def mobilenetv1_count():
    widths = [32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
    blocks = ((9 + 2) * before + conv(1, before, now) for before, now in itertools.pairwise(widths))
    return conv(3, 3, 32) + sum(blocks) + 1025 * 10


def mobilenetv2_count():
    widths = [16, *[24] * 2, *[32] * 3, *[64] * 4, *[96] * 3, *[160] * 3, 320]
    total = conv(3, 3, 32) + (9 + 2) * 32 + conv(1, 32, 16)
    for before, now in itertools.pairwise(widths):
        wide = 6 * before
        total += conv(1, before, wide) + (9 + 2) * wide + conv(1, wide, now)
    return total + conv(1, 320, 1280) + 1281 * 10


LITERATURE = 14_728_266  # VGG-16 with BatchNorm and one dense layer, its convolutions with biases
BIASES = 2 * 64 + 2 * 128 + 3 * 256 + 6 * 512
COUNTS = {
    "ResNet18": (resnet_count(64, (64, 128, 256, 512), 2), 11_173_962),
    # The paper's shortcuts have no weights (option A), which makes it 0.27 million, too.
    "ResNet20": (resnet_count(16, (16, 32, 64), 3), 269_722 + conv(1, 16, 32) + conv(1, 32, 64)),
    "WRN28x4": (wrn_count(28, 4), 5_849_050),
    "WRN28x10": (wrn_count(28, 10), 36_479_194),
    "WRN34x10": (wrn_count(34, 10), 46_160_474),
    "WRN40x4": (wrn_count(40, 4), 8_949_210),
    "VGG16": (vgg_count(0), LITERATURE - BIASES),
    "VGG8": (vgg8_count(32, 3), 814_570),
    "LeNet5": (lenet5_count(32, 3), 4_259_274),
    "MobileNetV1": (mobilenetv1_count(), 3_217_226),
    "MobileNetV2": (mobilenetv2_count(), 2_236_682),
    "SmallCNN": (
        conv(3, 3, 16) + conv(3, 16, 16) + conv(3, 16, 32) + conv(3, 32, 32) + 33 * 10,
        17_082,
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_those_of_the_literature(name):
    closed_form, known = COUNTS[name]
    options = {"head": "linear"} if name == "VGG16" else {}
    model = getattr(applications, name)(**options)
    assert size(model.trainable_weights) == closed_form == known
    assert f"{known:,}" in getattr(applications, name).__doc__
    assert model.input_shape == (None, 32, 32, 3) and model.output_shape == (None, 10)
    assert name.lower().replace("small", "small_") == model.name


def test_narrow_relatives_have_the_parameters_of_their_widths():
    resnet = applications.ResNet18(width=8)
    assert size(resnet.trainable_weights) == resnet_count(8, (8, 16, 32, 64), 2)
    vgg = applications.VGG16(width=8)
    widths = [3, 8, 8, 16, 16, 32, 32, 32, *[64] * 6]
    total = sum(conv(3, a, b) for a, b in itertools.pairwise(widths))
    assert size(vgg.trainable_weights) == total + 2 * (64 * 64 + 64) + 65 * 10
    for network in (applications.ResNet18, applications.VGG16):
        with pytest.raises(ValueError, match="width must be >= 1, got 0"):
            network(width=0)


def test_smaller_images_take_smaller_networks(library):
    for network, count in ((applications.VGG8, vgg8_count), (applications.LeNet5, lenet5_count)):
        model = network(input_shape=(28, 28, 1), library=library)
        assert size(model.trainable_weights) == count(28, 1)
        assert f"{count(28, 1):,}" in network.__doc__
    model = applications.LeNet5(width=6, hidden=10, kernel_size=3, library=library)
    assert model.get_layer("stem").kernel.shape == (3, 3, 3, 6)
    assert model.get_layer("stage_2_conv_1").kernel.shape == (3, 3, 6, 12)
    assert model.get_layer("hidden_1").kernel.shape == (8 * 8 * 12, 10)


@pytest.mark.parametrize("width", [0.35, 1.3])
def test_mobilenets_are_as_wide_as_those_of_keras(width):
    for ours, theirs in (
        (applications.MobileNetV1, keras.applications.MobileNet),
        (applications.MobileNetV2, keras.applications.MobileNetV2),
    ):
        shape = (96, 96, 3)
        model = ours(width=width, strides=5, input_shape=shape)
        other = theirs(input_shape=shape, alpha=width, weights=None, classes=10)
        if ours is applications.MobileNetV2:  # Keras' first one cuts off instead of rounding
            assert size(model.trainable_weights) == size(other.trainable_weights)
        assert len(convolutions_and_dense(model)) == len(convolutions_and_dense(other))


def test_a_mobilenet_has_as_many_strides_as_asked_for(library):
    for network in (applications.MobileNetV1, applications.MobileNetV2):
        for strides in (1, 4):
            model = network(width=0.1, strides=strides, input_shape=(16, 16, 3), library=library)
            assert model.get_layer("pool").input.shape[1:3] == (16 // 2**strides,) * 2
        with pytest.raises(ValueError, match="strides must be <= 5, got 6"):
            network(strides=6)
        with pytest.raises(ValueError, match="height and width of 32 or more"):
            network(strides=5, input_shape=(31, 32, 3))


def test_the_list_of_networks_is_complete():
    assert {*COUNTS, "WideResNet"} == set(applications.__all__) == set(ARCHITECTURES.values())


def test_vgg_has_two_hidden_layers_unless_its_head_is_linear():
    model = applications.VGG16(classes=100)
    assert size(model.trainable_weights) == vgg_count(2) + 513 * 90
    hidden = [layer for layer in model.layers if fnmatch.fnmatchcase(layer.name, "hidden_?")]
    assert [layer.units for layer in hidden] == [512, 512]


class ByHand:
    """Computes a network in inference mode from its weights' names and TensorFlow's functions."""

    def __init__(self, model):
        self.model = model

    def conv(self, x, name, stride=1):
        kernel = tf.convert_to_tensor(self.model.get_layer(name).kernel)
        return tf.nn.conv2d(x, kernel, stride, "SAME")

    def norm_relu(self, x, name):
        return tf.nn.relu(self.norm(x, name))

    def norm(self, x, name):
        gamma, beta, mean, variance = self.model.get_layer(name).get_weights()
        return gamma * (x - mean) / np.sqrt(variance + 1e-5) + beta

    def head(self, x):
        kernel, bias = self.model.get_layer("logits").get_weights()
        return tf.reduce_mean(x, (1, 2)) @ kernel + bias

    def has(self, name):
        return name in {layer.name for layer in self.model.layers}

    def resnet(self, x, stages, blocks):
        x = self.norm_relu(self.conv(x, "stem"), "stem_norm")
        for stage in range(1, stages + 1):
            for block in range(1, blocks + 1):
                place, stride = f"stage_{stage}_block_{block}", 2 if stage > 1 and block == 1 else 1
                y = self.norm_relu(self.conv(x, f"{place}_conv_1", stride), f"{place}_norm_1")
                y = self.norm(self.conv(y, f"{place}_conv_2"), f"{place}_norm_2")
                if stride == 2:
                    x = self.conv(x, f"{place}_shortcut", stride)
                    x = self.norm(x, f"{place}_shortcut_norm")
                x = tf.nn.relu(x + y)
        return self.head(x)

    def wide(self, x, blocks):
        x = self.conv(x, "stem")
        for stage in (1, 2, 3):
            for block in range(1, blocks + 1):
                place, stride = f"stage_{stage}_block_{block}", 2 if stage > 1 and block == 1 else 1
                active = self.norm_relu(x, f"{place}_norm_1")
                y = self.norm_relu(self.conv(active, f"{place}_conv_1", stride), f"{place}_norm_2")
                y = self.conv(y, f"{place}_conv_2")
                shortcut = f"{place}_shortcut"
                x = y + (self.conv(active, shortcut, stride) if self.has(shortcut) else x)
        return self.head(self.norm_relu(x, "final_norm"))

    def evenly(self, x, name, stride=1):
        """A strided convolution padded by 1 on each side, of each channel if it is depthwise."""
        layer = self.model.get_layer(name)
        x = tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]])
        kernel = tf.convert_to_tensor(layer.get_weights()[0])
        if type(layer).__name__ == "DepthwiseConv2D":
            return tf.nn.depthwise_conv2d(x, kernel, (1, stride, stride, 1), "VALID")
        return tf.nn.conv2d(x, kernel, stride, "VALID")

    def mobilenetv1(self, x):
        x = self.norm_relu(self.evenly(x, "stem", 2), "stem_norm")
        for stage, blocks in enumerate((1, 2, 2, 6, 2), start=1):
            for block in range(1, blocks + 1):
                place = f"stage_{stage}_block_{block}"
                stride = 2 if (stage, block) == (2, 1) else 1
                x = self.evenly(x, f"{place}_depthwise", stride)
                x = self.conv(self.norm_relu(x, f"{place}_depthwise_norm"), f"{place}_pointwise")
                x = self.norm_relu(x, f"{place}_norm")
        return self.head(x)

    def mobilenetv2(self, x):
        x = self.norm_relu(self.evenly(x, "stem", 2), "stem_norm")
        for stage, blocks in enumerate((1, 2, 3, 4, 3, 3, 1), start=1):
            for block in range(1, blocks + 1):
                place, y = f"stage_{stage}_block_{block}", x
                if stage > 1:
                    y = self.norm_relu(self.conv(y, f"{place}_expand"), f"{place}_expand_norm")
                y = self.evenly(y, f"{place}_depthwise", 2 if (stage, block) == (2, 1) else 1)
                y = self.norm_relu(y, f"{place}_depthwise_norm")
                y = self.norm(self.conv(y, f"{place}_project"), f"{place}_norm")
                x = x + y if x.shape == y.shape else y
        return self.head(self.norm_relu(self.conv(x, "stage_8_expand"), "stage_8_norm"))

    def vgg8(self, x):
        return self.dense(self.stages(x, 3))

    def lenet5(self, x):
        for name in ("stem", "stage_2_conv_1"):
            bias = tf.convert_to_tensor(self.model.get_layer(name).bias)
            x = tf.nn.max_pool2d(tf.nn.relu(self.conv(x, name) + bias), 2, 2, "VALID")
        return self.dense(x)

    def dense(self, x):
        for name in ("hidden_1", "logits"):
            kernel, bias = self.model.get_layer(name).get_weights()
            x = np.reshape(x, (len(x), -1)) @ kernel + bias
            x = np.maximum(x, 0) if name == "hidden_1" else x
        return x

    def plain(self, x):
        return self.head(self.stages(x, 2))

    def stages(self, x, count):
        for place in [f"stage_{stage + 1}" for stage in range(count)]:
            for index in (1, 2):
                is_stem = (place, index) == ("stage_1", 1)
                x = self.conv(x, "stem" if is_stem else f"{place}_conv_{index}")
                x = self.norm_relu(x, "stem_norm" if is_stem else f"{place}_norm_{index}")
            x = tf.nn.max_pool2d(x, 2, 2, "VALID")
        return x


FORMULAS = {
    "resnet20": lambda hand, x: hand.resnet(x, stages=3, blocks=3),
    "wrn10x2": lambda hand, x: hand.wide(x, blocks=1),
    "wrn16x1": lambda hand, x: hand.wide(x, blocks=2),
    "small_cnn": lambda hand, x: hand.plain(x),
    "vgg8": lambda hand, x: hand.vgg8(x),
    "lenet5": lambda hand, x: hand.lenet5(x),
    "mobilenetv1": lambda hand, x: hand.mobilenetv1(x),
    "mobilenetv2": lambda hand, x: hand.mobilenetv2(x),
}


def shake(model, seed=0):
    """Give BatchNorm's weights and averages, and all biases, values that are not 0 or 1."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        values = layer.get_weights()
        noise = [rng.uniform(0.5, 1.5, v.shape) if v.ndim == 1 else v for v in values]
        layer.set_weights(noise)
    return model


def pixels(count=4, shape=(8, 8, 3), seed=0):
    return np.random.default_rng(seed).uniform(0, 1, (count, *shape)).astype("float32")


@pytest.mark.parametrize("name", FORMULAS)
def test_the_networks_compute_what_their_papers_say(name, library):
    model = shake(LOOKS[name](library=library, seed=1))
    expected = FORMULAS[name](ByHand(model), pixels())
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(model(pixels()), expected, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("name", LOOKS)
def test_both_kerases_give_the_same_logits(name):
    ours, theirs = (shake(LOOKS[name](library=lib, seed=1)) for lib in FLAVOURS)
    theirs.set_weights(ours.get_weights())
    assert [layer.name for layer in ours.layers] == [layer.name for layer in theirs.layers]
    np.testing.assert_allclose(ours(pixels()), theirs(pixels()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LOOKS)
def test_the_normalisation_is_part_of_the_network(name, library):
    inside = LOOKS[name](library=library, mean=MEAN, std=STD)
    outside = LOOKS[name](library=library)
    outside.set_weights(inside.get_weights())
    x = pixels()
    normalised = ((x.astype("float64") - MEAN) / STD).astype("float32")
    np.testing.assert_allclose(inside(x), outside(normalised), rtol=1e-4, atol=1e-4)
    assert np.max(np.abs(inside(x) - outside(x))) > 1e-2
    clone = tscnc.pruning.add_regularizers(inside, tscnc.regularizers.TSCNC(1e-5, 1e-2))
    np.testing.assert_array_equal(clone(x), inside(x))


def convolutions_and_dense(model):
    return [kernel.name for kernel in kernel_layers.kernels(model)]


def test_patterns_choose_all_but_the_first_and_the_last(library):
    for model in (
        *(look(library=library) for look in LOOKS.values()),
        applications.VGG16(library=library),
    ):
        first, *between, last = convolutions_and_dense(model)
        assert (first, last) == ("stem", "logits")
        assert all(fnmatch.fnmatchcase(name, "stage_*") for name in between if "hidden" not in name)
        assert len(set(between)) == len(between) > 0


def test_layers_have_the_names_that_are_promised():
    names = {layer.name for layer in applications.ResNet18().layers}
    stages = [f"stage_{stage}_block_{block}" for stage in (1, 2, 3, 4) for block in (1, 2)]
    assert names >= {f"{place}_conv_{number}" for place in stages for number in (1, 2)}
    shortcuts = {name for name in names if name.endswith("_shortcut")}
    assert shortcuts == {f"stage_{stage}_block_1_shortcut" for stage in (2, 3, 4)}
    vgg = convolutions_and_dense(applications.VGG16(head="linear"))
    assert vgg[:4] == ["stem", "stage_1_conv_2", "stage_2_conv_1", "stage_2_conv_2"]
    assert vgg[-3:] == ["stage_5_conv_2", "stage_5_conv_3", "logits"]


def test_no_bias_stands_before_a_batch_norm():
    for model in (applications.VGG16(), applications.WideResNet(16, 2), applications.ResNet20()):
        for layer in model.layers:
            if type(layer).__name__ == "Conv2D":
                assert not layer.use_bias
            if type(layer).__name__ == "BatchNormalization":
                assert layer.momentum == 0.9 and layer.epsilon == pytest.approx(1e-5, rel=2e-3)


def test_the_seed_decides_the_weights_and_each_layer_has_its_own(library):
    def kernels(seed):
        model = applications.SmallCNN(library=library, width=4, seed=seed)
        return [np.asarray(kernel.variable) for kernel in kernel_layers.kernels(model)]

    first, again, other = kernels(3), kernels(3), kernels(4)
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.max(np.abs(a - c)) > 0.01
    assert np.max(np.abs(kernels(None)[0] - kernels(None)[0])) > 0.01


def test_networks_of_neighbouring_seeds_have_nothing_in_common(library):
    kernels = [
        np.asarray(kernel.variable).tobytes()
        for seed in (0, 1, 2)
        for kernel in kernel_layers.kernels(LOOKS["resnet20"](library=library, seed=seed))
    ]
    assert len(set(kernels)) == len(kernels)


@pytest.mark.parametrize("seed", [None, 0])
def test_one_initializer_draws_anew_for_each_layer(seed, library):
    initializer = FLAVOURS[library].initializers.HeNormal()
    model = applications.ResNet20(
        input_shape=(8, 8, 3), library=library, kernel_initializer=initializer, seed=seed
    )
    one, two = (model.get_layer(f"stage_3_block_{block}_conv_2").kernel for block in (2, 3))
    assert np.max(np.abs(np.asarray(one) - np.asarray(two))) > 0.01
    assert np.std(one) == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.05)


def test_activation_and_initializer_are_the_users(library):
    model = applications.SmallCNN(
        library=library, activation="silu", kernel_initializer="zeros", name="mine"
    )
    assert model.name == "mine"
    assert model.get_layer("stage_2_activation_1").get_config()["activation"] in ("silu", "swish")
    np.testing.assert_array_equal(model(pixels(shape=(32, 32, 3))), np.zeros((4, 10)))


def test_the_seed_decides_dropout_too(library):
    x = np.ones((2, 8, 8, 3), np.float32)
    outputs = []
    for seed in (0, 0, 1):
        model = applications.WideResNet(
            10, 1, dropout_rate=0.5, input_shape=(8, 8, 3), library=library, seed=seed
        )
        plain = applications.WideResNet(10, 1, input_shape=(8, 8, 3), library=library, seed=seed)
        for one, other in zip(model.get_weights(), plain.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)
        model.set_weights(outputs[0][1] if outputs else model.get_weights())
        if library == "tf_keras":  # there, a layer's seed is one beside the seed of all
            FLAVOURS[library].utils.set_random_seed(0)
        outputs.append((np.asarray(model(x, training=True)), model.get_weights()))
    np.testing.assert_array_equal(outputs[0][0], outputs[1][0])
    assert np.any(outputs[0][0] != outputs[2][0])


def test_dropout_lies_between_the_convolutions(library):
    model = applications.WideResNet(10, 1, dropout_rate=0.5, library=library)
    rates = {layer.name: layer.rate for layer in model.layers if "dropout" in layer.name}
    assert rates == {f"stage_{stage}_block_1_dropout": 0.5 for stage in (1, 2, 3)}
    x = pixels(shape=(32, 32, 3))
    np.testing.assert_array_equal(model(x), model(x))
    assert np.max(np.abs(model(x, training=True) - model(x, training=True))) > 1e-3


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_logits_and_normalisation_are_computed_in_full_precision(policy, library):
    module = FLAVOURS[library]
    plain = applications.SmallCNN(mean=MEAN, std=STD, library=library)
    set_policy = (
        getattr(module.mixed_precision, "set_global_policy", None) or module.config.set_dtype_policy
    )
    set_policy(policy)
    try:
        model = applications.SmallCNN(mean=MEAN, std=STD, library=library)
    finally:
        set_policy("float32")
    model.set_weights(plain.get_weights())
    x = pixels(shape=(32, 32, 3))
    logits = tf.convert_to_tensor(model(x))
    full = "float64" if policy == "float64" else "float32"
    half = policy.removeprefix("mixed_")
    assert logits.dtype.name == full
    assert model.get_layer("normalization").compute_dtype == full
    assert model.get_layer("stage_2_conv_1").compute_dtype == half
    np.testing.assert_allclose(logits, plain(x), atol=0.05)


LOAD = """
import sys, importlib
import numpy as np
for name in sys.argv[2:]:
    model = importlib.import_module(name).models.load_model(f"{sys.argv[1]}/{name}.keras")
    np.save(f"{sys.argv[1]}/{name}.npy", model(np.load(sys.argv[1] + "/x.npy")))
assert "tscnc_tf" not in sys.modules
"""


def test_files_load_where_tscnc_tf_is_not(tmp_path):
    x = pixels(shape=(32, 32, 3))
    np.save(tmp_path / "x.npy", x)
    models = {
        name: shake(applications.SmallCNN(mean=MEAN, std=STD, library=name)) for name in FLAVOURS
    }
    for name, model in models.items():
        model.save(tmp_path / f"{name}.keras")
    fresh_process(LOAD, tmp_path, *models)
    for name, model in models.items():
        np.testing.assert_allclose(
            np.load(tmp_path / f"{name}.npy"), model(x), rtol=1e-5, atol=1e-5
        )


def test_from_pruning_to_the_export(library, tmp_path):
    model = applications.SmallCNN(mean=MEAN, std=STD, library=library)
    tscnc.prune_now(model, 0.9, layers="stage_*")
    sparsity = {row.name: row.sparsity for row in tscnc.inspection.sparsity(model).rows}
    assert sparsity.pop("stem") == sparsity.pop("logits") == 0.0
    assert list(sparsity.values()) == pytest.approx([0.9] * 3, abs=1e-3)
    x = pixels(shape=(32, 32, 3))
    expected = np.asarray(model(x))
    tscnc.export_saved_model(tscnc.strip(model), tmp_path / "served")
    served = tf.saved_model.load(str(tmp_path / "served"))
    (logits,) = served.signatures["serving_default"](tf.constant(x)).values()
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_tfmots_wrappers_leave_the_normalisation_in_place():
    model = applications.SmallCNN(mean=MEAN, std=STD, library="tf_keras")
    schedule = tscnc.schedules.OneShot(0.5)
    wrapped = tscnc.prune(model, schedule, layers="stage_*", engine="tfmot")
    x = pixels(shape=(32, 32, 3))
    np.testing.assert_allclose(wrapped(x), model(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tscnc.strip(wrapped)(x), model(x), rtol=1e-5, atol=1e-6)


def test_attacks_work_on_pixels(library):
    """On the network with a normalisation, epsilon is one of pixels; without, of what it is fed."""
    inside = applications.SmallCNN(mean=MEAN, std=STD, library=library, seed=0)
    outside = applications.SmallCNN(library=library)
    outside.set_weights(inside.get_weights())
    x, y = pixels(8, (32, 32, 3)), np.arange(8) % 10
    attack = tscnc.attacks.PGD(epsilon="8/255", steps=3, start="none")
    adversarial = attack(inside, x, y).numpy()
    assert adversarial.min() >= 0.0 and adversarial.max() <= 1.0
    assert np.max(np.abs(adversarial - x)) == pytest.approx(8 / 255, abs=1e-6)
    by_hand = attack(lambda z: outside((z - np.float32(MEAN)) / np.float32(STD)), x, y).numpy()
    assert np.mean(np.abs(adversarial - by_hand) < 1e-5) > 0.98, "signs of small slopes may differ"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: applications.WideResNet(27, 2), ValueError, r"depth must be 6n \+ 4.*got 27"),
        (lambda: applications.WideResNet(4, 2), ValueError, "depth must be >= 10, got 4"),
        (lambda: applications.WideResNet(16, 0), ValueError, "width must be >= 1, got 0"),
        (lambda: applications.WideResNet(16, 1.5), TypeError, "width must be an integer"),
        (
            lambda: applications.WRN28x4(dropout_rate=1.0),
            ValueError,
            "dropout_rate must be < 1, got 1.0",
        ),
        (
            lambda: applications.VGG16(input_shape=(28, 28, 1)),
            ValueError,
            r"32 or more.*got \(28, 28, 1\): enlarge the images, or take",
        ),
        (lambda: applications.ResNet18(input_shape=(32, 4, 3)), ValueError, "8 or more"),
        (lambda: applications.WRN40x4(input_shape=(2, 8, 3)), ValueError, "4 or more"),
        (lambda: applications.SmallCNN(input_shape=(32, 32)), ValueError, "height, width, chan"),
        (
            lambda: applications.SmallCNN(input_shape=(None, None, 3)),
            TypeError,
            r"input_shape\[0\] must be an integer, got None",
        ),
        (lambda: applications.SmallCNN(width=0), ValueError, "width must be >= 1"),
        (lambda: applications.VGG8(width=0), ValueError, "width must be >= 1"),
        (lambda: applications.VGG8(input_shape=(7, 8, 1)), ValueError, "8 or more"),
        (lambda: applications.LeNet5(input_shape=(3, 8, 1)), ValueError, "4 or more"),
        (lambda: applications.LeNet5(hidden=0), ValueError, "hidden must be >= 1, got 0"),
        (lambda: applications.LeNet5(kernel_size=0), ValueError, "kernel_size must be >= 1, got 0"),
        (lambda: applications.SmallCNN(classes=1), ValueError, "classes must be >= 2, got 1"),
        (lambda: applications.SmallCNN(mean=MEAN), ValueError, "given together.*std=None"),
        (lambda: applications.SmallCNN(std=STD), ValueError, "given together, got mean=None"),
        (
            lambda: applications.SmallCNN(mean=(0.5,), std=STD),
            ValueError,
            r"mean must hold one number per channel of input_shape, 3, got \[0.5\]",
        ),
        (
            lambda: applications.SmallCNN(mean=MEAN, std=(0.1, 0.0, 0.1)),
            ValueError,
            r"std\[1\] must be > 0, got 0.0",
        ),
        (
            lambda: applications.SmallCNN(mean=MEAN, std=0.5),
            TypeError,
            "std must hold one number per channel, got 0.5",
        ),
        (
            lambda: applications.SmallCNN(library="torch"),
            ValueError,
            "library must be one of 'keras', 'tf_keras', got 'torch'",
        ),
        (
            lambda: applications.VGG16(head="none"),
            ValueError,
            "head must be one of 'hidden', 'linear', got 'none'",
        ),
        (lambda: applications.SmallCNN(seed=-1), ValueError, "seed must be >= 0"),
        (lambda: applications.SmallCNN(activation="rely"), ValueError, "rely"),
        (lambda: applications.SmallCNN(kernel_initializer="he"), ValueError, "he"),
        (lambda: applications.SmallCNN(klasses=3), TypeError, "klasses"),
    ],
)
def test_errors_say_what_is_wrong(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_the_default_is_keras_3():
    assert isinstance(applications.SmallCNN(), keras.Model)


@pytest.mark.parametrize("library", FLAVOURS)
def test_channels_first_is_refused(library):
    backend = FLAVOURS[library].backend
    backend.set_image_data_format("channels_first")
    try:
        with pytest.raises(ValueError, match="image_data_format must be 'channels_last'"):
            applications.SmallCNN(library=library)
    finally:
        backend.set_image_data_format("channels_last")
