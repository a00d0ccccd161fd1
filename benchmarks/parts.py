"""The training step that is measured, and its floor: the pieces that any such step needs."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tf_keras

import tscnc_tf as tscnc
from benchmarks import networks
from tscnc_tf._keras import wrappers

EPSILON = "8/255"
STEP_SIZE = 0.0069
LOSSES = {"TRADES": tscnc.losses.TRADES(6.0), "Madry": tscnc.losses.Madry()}


class Batch(NamedTuple):
    """A batch of random images and labels, as their values do not change the time."""

    x: tf.Tensor
    y: tf.Tensor


def batch(model: Any, size: int) -> Batch:
    """Return a batch that fits a model."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (size, *model.input_shape[1:])).astype(np.float32)
    return Batch(tf.constant(x), tf.constant(rng.integers(0, networks.CLASSES, size), tf.int32))


def optimizer() -> Any:
    """Return the optimizer of the experiments, with a small rate, so that values stay usual."""
    return tf_keras.optimizers.SGD(1e-3, momentum=0.9, nesterov=True)


def pruned_model(network: str, *, regularized: bool = True, pruned: bool = True) -> Any:
    """Return a network with TSCNC on its kernels, in tfmot's pruning wrappers.

    The masks are updated in every 100th step, tfmot's default; the first step is one of those.
    """
    model = networks.build(network)
    if regularized:
        penalty = tscnc.regularizers.TSCNC(sparsity_factor=1e-5, condition_factor=1e-2)
        model = tscnc.pruning.add_regularizers(model, penalty)
    if pruned:
        schedule = tscnc.schedules.CosineSparsity(0.5, 0.95, 1, 10_000, frequency=100)
        model = tscnc.prune(model, schedule)
        for wrapper in wrappers.wrapped_layers(model):
            wrapper.pruning_step.assign(0)  # as tfmot's callback does when training begins
    return model


def trainer(model: Any, steps: int, loss: str = "TRADES") -> Any:
    """Return a compiled trainer with PGD in the ball that is usual for CIFAR-10."""
    attack = tscnc.attacks.PGD(epsilon=EPSILON, step_size=STEP_SIZE, steps=steps)
    made = tscnc.AdversarialTraining(model, attack=attack, loss=LOSSES[loss])
    made.compile(optimizer=optimizer())
    made.optimizer.build(model.trainable_variables)
    return made


def step(trainer: Any, *, jit_compile: bool = False) -> Any:
    """Return `(x, y) -> logs`, one optimizer step, compiled as `fit` compiles it.

    That is without AutoGraph, and for batches of any size, as the last one of an epoch may be
    smaller. With `jit_compile` it is compiled for each batch size.
    """

    def take(x: tf.Tensor, y: tf.Tensor) -> Any:
        return trainer.train_step((x, y))

    if jit_compile:
        return tf.function(take, jit_compile=True, autograph=False)
    images = tf.TensorSpec((None, *trainer.model.input_shape[1:]), tf.float32)
    labels = tf.TensorSpec((None,), tf.int32)
    return tf.function(take, input_signature=(images, labels), autograph=False)


class Floor:
    """The least that a TRADES step has to compute, each piece compiled on its own.

    The network has no pruning wrappers and no regularizers. No piece draws random numbers, computes
    a KL divergence or a metric, projects, or applies a mask.

    Args:
        network: a name in `networks.NETWORKS`.
        size: the batch size.
        steps: the number of steps of the attack.
        jit_compile: whether XLA compiles the pieces.

    Attributes:
        pieces: `tf.function`s by name. "gradient": one forward pass in inference mode and the
            gradient at the input (of a fixed combination of the logits). "forward": one forward
            pass in inference mode. "train": forward in training mode and backward to the weights,
            cross-entropy, on a batch of twice the size. "update": one optimizer update.
        arguments: tensors, the arguments of each piece.
        calls: how often a training step needs each piece.
    """

    def __init__(self, network: str, size: int, steps: int, *, jit_compile: bool = False) -> None:
        # A second network, so that updates do not change what the other pieces compute.
        model = networks.build(network)
        other = networks.build(network)
        variables = other.trainable_variables
        updater = optimizer()
        updater.build(variables)
        x, y = batch(model, size)

        def gradient(x: tf.Tensor, slope: tf.Tensor) -> tf.Tensor:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(x)
                logits = model(x, training=False)
            return tape.gradient(logits, x, output_gradients=slope)

        def forward(x: tf.Tensor) -> tf.Tensor:
            return model(x, training=False)

        def train(x: tf.Tensor, y: tf.Tensor) -> list[tf.Tensor]:
            with tf.GradientTape() as tape:
                logits = model(x, training=True)
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
                loss = tf.reduce_mean(losses)
            return tape.gradient(loss, model.trainable_variables)

        def update(*gradients: tf.Tensor) -> tf.Tensor:
            return updater.apply_gradients(zip(gradients, variables, strict=True))

        rng = np.random.default_rng(1)
        slope = tf.constant(rng.normal(size=(size, networks.CLASSES)), tf.float32)
        # Tiny gradients, so that a thousand updates hardly change the weights.
        tiny = [tf.constant(1e-6 * rng.normal(size=v.shape), tf.float32) for v in variables]
        self.pieces = {
            function.__name__: tf.function(function, jit_compile=jit_compile)
            for function in (gradient, forward, train, update)
        }
        self.arguments = {
            "gradient": (x, slope),
            "forward": (x,),
            "train": (tf.concat([x, x], axis=0), tf.concat([y, y], axis=0)),
            "update": tuple(tiny),
        }
        self.calls = {"gradient": steps, "forward": 1, "train": 1, "update": 1}

    def run(self, piece: str, calls: int | None = None) -> None:
        """Run a piece `calls` times in a row; None for as often as a step needs it."""
        for _ in range(self.calls[piece] if calls is None else calls):
            self.pieces[piece](*self.arguments[piece])
