"""Keras 3 models as people have them go through all five lines, from training to a SavedModel."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.applications import resnet

import tscnc_tf as tscnc

SHAPE = (32, 32, 3)


def mobile_net():
    return keras.applications.MobileNetV3Small(
        weights=None,
        input_shape=SHAPE,
        classes=10,
        classifier_activation=None,
        include_preprocessing=False,
        dropout_rate=0.0,
    )


def res_net():
    """ResNet50 with fewer blocks in a row: each kind of block is there, at each of its widths."""

    def stacks(x):
        x = resnet.stack_residual_blocks_v1(x, 64, 2, stride1=1, name="conv2")
        for number, filters in enumerate((128, 256, 512), start=3):
            x = resnet.stack_residual_blocks_v1(x, filters, 1, name=f"conv{number}")
        return x

    return resnet.ResNet(
        stacks,
        preact=False,
        use_bias=True,
        name="resnet",
        weights=None,
        input_shape=SHAPE,
        classes=10,
        classifier_activation=None,
    )


class Positions(keras.layers.Layer):
    """Adds a trained vector to each patch."""

    def build(self, input_shape):
        self.table = self.add_weight(
            name="embeddings", shape=(1, *input_shape[1:]), initializer="random_normal"
        )

    def call(self, inputs):
        return inputs + self.table


def vision_transformer(width=32, heads=2, depth=2, patch=8):
    layers = keras.layers
    inputs = keras.Input(SHAPE)
    x = layers.Conv2D(width, patch, strides=patch, name="patches")(inputs)
    x = Positions(name="positions")(layers.Reshape((-1, width))(x))
    for index in range(depth):
        y = layers.LayerNormalization()(x)
        y = layers.MultiHeadAttention(heads, width // heads, name=f"attention_{index}")(y, y)
        x = layers.Add()([x, y])
        y = layers.LayerNormalization()(x)
        y = layers.Dense(2 * width, activation="gelu", name=f"expand_{index}")(y)
        x = layers.Add()([x, layers.Dense(width, name=f"contract_{index}")(y)])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(10, name="logits")(x))


@pytest.mark.parametrize(
    ("build", "constrained"),
    [
        (vision_transformer, ["patches", "expand_*", "contract_*", "logits"]),
        (mobile_net, None),
        (res_net, "conv2_*"),
    ],
    ids=["ViT", "MobileNetV3Small", "ResNet"],
)
# Untrained, and pruned at once to 90 %, depthwise kernels too: both are worth the warning.
@pytest.mark.filterwarnings(
    "ignore:At a sparsity", "ignore:zero-gradients", "ignore:saturated-logits"
)
def test_all_five_lines(build, constrained, tmp_path):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x, y = rng.uniform(size=(4, *SHAPE)).astype("float32"), rng.integers(0, 10, 4)
    attack = tscnc.attacks.PGD(epsilon="8/255", step_size="4/255", steps=1)

    model = tscnc.pruning.add_regularizers(
        build(), tscnc.regularizers.TSCNC(1e-6, 1e-3), layers=constrained
    )
    model = tscnc.prune(model, tscnc.schedules.OneShot(0.9, begin_step=1), min_weights=10)
    trainer = tscnc.AdversarialTraining(model, attack=attack, loss=tscnc.losses.Madry())
    trainer.compile(keras.optimizers.SGD(1e-3))
    history = trainer.fit(
        x, y, batch_size=4, verbose=0, callbacks=tscnc.callbacks.pruning_callbacks()
    )
    assert np.isfinite(history.history["loss"]).all()
    assert history.history["penalty"][0] > 0
    report = tscnc.evaluate_robustness(trainer.model, x, y, attacks=attack, progress=False)
    assert 0 <= report.robust_accuracy <= report.clean_accuracy <= 1
    export = tscnc.export_saved_model(trainer.model, tmp_path / "pruned", probe=x)

    weights = tscnc.pruning.report(model)
    for row in weights.pruned:
        assert row.weights - row.zeros == max(round(row.weights * np.float32(0.1)), 10), row.name
    assert weights.sparsity == pytest.approx(0.9, abs=2e-3)
    names = {row.name for row in weights.pruned}
    if build is vision_transformer:
        assert {f"attention_0/{part}/kernel" for part in ("query", "key", "value")} <= names
        assert {row.name: row.reason for row in weights.skipped}["positions"] == (
            "'embeddings' is no kernel; choose its layer by layers= to prune it"
        )
    else:  # every kernel, the depthwise ones among them
        kernels = {w.path for w in model.weights if w.path.endswith("kernel")}
        assert len(names) == len(kernels)
    assert export.sparsity == weights.sparsity
    loaded = tf.saved_model.load(str(tmp_path / "pruned"))
    np.testing.assert_allclose(loaded.serve(x), model(x, training=False), rtol=1e-3, atol=1e-4)
    stripped = tscnc.strip(trainer.model)
    assert type(stripped).__name__ == "Functional"
