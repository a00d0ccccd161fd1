"""Regularizers, pruning and an attack in a training loop of your own, with tf_keras.

`AdversarialTraining` does this for you. Here each step is a compiled function with one forward pass
in training mode, and a schedule that counts steps.

    python examples/custom_training_loop.py [--epochs 20] [--seed 0]
"""

from __future__ import annotations

import argparse

import numpy as np
import tensorflow as tf
import tf_keras
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tscnc_tf as tscnc


def network() -> tf_keras.Model:
    """A perceptron with the constraints attached by hand, as in any Keras layer."""
    constraint = tscnc.regularizers.TSCNC(sparsity_factor=1e-5, condition_factor=1e-2)
    layers = tf_keras.layers
    return tf_keras.Sequential(
        [
            layers.Flatten(input_shape=(8, 8)),
            layers.Dense(256, activation="relu", kernel_regularizer=constraint),
            layers.Dense(64, activation="relu", kernel_regularizer=constraint),
            layers.Dense(10),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps only, to see that it runs"
    )
    args = parser.parse_args()
    if args.smoke:
        args.epochs = 2

    tf_keras.utils.set_random_seed(args.seed)
    data = load_digits()
    x, x_test, y, y_test = train_test_split(
        (data.images / 16).astype("float32"), data.target, test_size=0.2, random_state=args.seed
    )
    batches = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=args.seed)
    batches = batches.batch(128, drop_remainder=True)
    steps = args.epochs * len(batches)

    schedule = tscnc.schedules.CosineSparsity(0.0, 0.9, steps // 4, 3 * steps // 4, frequency=5)
    model = tscnc.prune(network(), schedule)
    attack = tscnc.attacks.PGD(epsilon=0.1, step_size=0.025, steps=7)
    loss = tscnc.losses.Madry()
    optimizer = tf_keras.optimizers.SGD(0.05, momentum=0.9)

    @tf.function
    def train_step(x, y, step):
        # The attack runs the model in inference mode and without its wrappers, by itself.
        x_adversarial = attack(model, x, y, seed=tf.stack([args.seed, step]))
        with tf.GradientTape() as tape:
            logits = model(x_adversarial, training=True)  # once: each such call counts a step
            value = tf.reduce_mean(loss.robust(y, None, logits)) + tf.add_n(model.losses)
        optimizer.minimize(value, model.trainable_variables, tape=tape)
        return value

    # Outside of `fit` the callbacks have to be called.
    model.optimizer = optimizer
    callbacks = tscnc.callbacks.pruning_callbacks(log_kernels=True)
    for callback in callbacks:
        callback.set_model(model)
        callback.on_train_begin()
    step = 0
    for epoch in range(args.epochs):
        for x_batch, y_batch in batches:
            value = train_step(x_batch, y_batch, tf.constant(step))
            for callback in callbacks:
                callback.on_train_batch_end(step)
            step += 1
        logs = {"loss": float(value)}
        for callback in callbacks:
            callback.on_epoch_end(epoch, logs)
        figures = {name: logs[name] for name in ("loss", "sparsity", "condition_number")}
        print(f"epoch {epoch + 1}:", {name: round(figure, 4) for name, figure in figures.items()})
    for callback in callbacks:
        callback.on_train_end()

    print(tscnc.pruning.report(model))
    print(tscnc.inspection.condition_numbers(model))
    print(tscnc.evaluate_robustness(model, x_test, np.asarray(y_test), attacks=[attack]))


if __name__ == "__main__":
    main()
