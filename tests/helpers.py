"""Small models and data that several test files share."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from tscnc_tf._keras import flavours, tfmot, wrappers

FLAVOURS = {"tf_keras": tf_keras, "keras": keras}

# The recipe of the fixture `finished`, an experiment of seconds.
TINY = {
    "name": "tiny",
    "sparsity": 0.9,
    "data": {"dataset": "digits", "train_examples": 192, "test_examples": 48},
    "network": {"architecture": "small-cnn", "options": {"width": 4}},
    "adversary": {"epsilon": 0.1, "step_size": 0.05, "steps": 1},
    "constraints": {"sparsity_factor": 1e-5, "condition_factor": 0.1},
    "train": {"epochs": 2, "batch_size": 64},
    "prune": {"epochs": 4, "batch_size": 64},
    "finetune": {"epochs": 2, "batch_size": 64, "weight_decay_kind": "l2"},
    "evaluate": {"attack": "pgd", "steps": 1, "restarts": 1, "validation_steps": 1},
}


def dense_model(library=tf_keras, inputs=6, classes=3, **options):
    """A built network of two dense layers that returns logits."""
    layers = library.layers
    model = library.Sequential(
        [
            layers.InputLayer(input_shape=(inputs,))
            if library is tf_keras
            else keras.Input((inputs,)),
            layers.Dense(8, activation="relu", name="hidden", **options),
            layers.Dense(classes, name="logits", **options),
        ]
    )
    assert model.built
    return model


def conv_model(library=tf_keras, classes=3):
    """A built convolutional network with BatchNorm for 8x8 images, functional."""
    layers = library.layers
    inputs = library.Input((8, 8, 1))
    x = layers.Conv2D(6, 3, padding="same", name="conv")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU()(x)
    x = layers.GlobalAveragePooling2D()(x)
    return library.Model(inputs, layers.Dense(classes, name="logits")(x))


def with_wrapper_masks(model, rng, share=0.5):
    """Wrap a tf_keras model by tfmot, and set masks that the (dense) weights don't follow yet."""
    wrapped = tfmot().sparsity.keras.prune_low_magnitude(model)
    for _, mask in wrappers.pruned_variables(wrapped):
        mask.assign((rng.uniform(size=mask.shape) >= share).astype(np.float32))
    return wrapped


def blobs(count=96, inputs=6, classes=3, seed=0):
    """Points in [0, 1] around one centre per class, and their labels."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(1234).uniform(0.2, 0.8, (classes, inputs))
    y = rng.integers(0, classes, count)
    x = np.clip(centres[y] + rng.normal(0, 0.08, (count, inputs)), 0, 1)
    return x.astype("float32"), y


def images(count=96, classes=3, seed=0):
    """8x8 images in [0, 1] with a bright bar whose place is the class, and their labels."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, count)
    x = rng.uniform(0, 0.4, (count, 8, 8, 1))
    for index, label in enumerate(y):
        x[index, :, 2 * label + 1 : 2 * label + 3] += 0.5
    return np.clip(x, 0, 1).astype("float32"), y


def training_itself(library, part):
    """A built model around a layer or model, which it trains by an optimizer that it holds."""

    class TrainingItself(library.Model):
        def __init__(self):
            super().__init__()
            self.part, self.own = part, library.optimizers.SGD(0.1)

        def call(self, inputs):
            return self.part(inputs)

        def train_step(self, data):
            x, y = data

            def objective():
                return tf.reduce_mean(
                    tf.nn.sparse_softmax_cross_entropy_with_logits(y, self(x, training=True))
                )

            flavours.minimize(self.own, objective, self.part.trainable_variables)
            return {"done": tf.constant(1.0)}

    model = TrainingItself()
    model(np.ones((1, 6), np.float32))
    return model


def python_blocks(markdown):
    """Return the blocks of Python code of a document, in their order."""
    return re.findall(r"^```python\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL)


def names(folder):
    """Return the names of what is in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def interrupted(owner, name, late):
    """Expect a KeyboardInterrupt, raised in a function of `owner` before or after its work."""
    original = getattr(owner, name)

    def fails(*args, **kwargs):
        if late:
            original(*args, **kwargs)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, fails)
        yield


def fresh_process(code, *arguments, env=None, cwd=None):
    """Run Python code in a new process, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **(env or {})},
        cwd=cwd,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
