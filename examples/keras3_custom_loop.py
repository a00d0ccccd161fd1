"""A training loop of your own in Keras 3: a subclassed model, a pruner, fine-tuning with its zeros.

`Pruner` works on the variables of any model without wrapping anything, so the loop needs one more
line after each optimizer step. Here the weights of the whole network are ranked together
(`scope="global"`), and the schedule is a plain function. Then the masks are frozen, and the
remaining weights are fine-tuned.

    python examples/keras3_custom_loop.py [--epochs 20] [--seed 0]
"""

from __future__ import annotations

import argparse

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tscnc_tf as tscnc


class Residual(keras.layers.Layer):
    """x + relu(x·A)·B: a layer of your own."""

    def __init__(self, units: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.units = units

    def build(self, input_shape) -> None:
        width = input_shape[-1]
        constraint = tscnc.regularizers.ConditionNumber(1e-2)
        options = {"initializer": "glorot_uniform", "regularizer": constraint}
        self.narrow = self.add_weight(name="narrow", shape=(width, self.units), **options)
        self.widen = self.add_weight(name="widen", shape=(self.units, width), **options)

    def call(self, inputs):
        return inputs + tf.matmul(tf.nn.relu(tf.matmul(inputs, self.narrow)), self.widen)


class Network(keras.Model):
    """A subclassed model; it returns logits."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten = keras.layers.Flatten()
        self.stem = keras.layers.Dense(128, activation="relu", name="stem")
        self.blocks = [Residual(64, name=f"block_{index}") for index in range(2)]
        self.logits = keras.layers.Dense(10, name="logits")

    def call(self, inputs):
        x = self.stem(self.flatten(inputs))
        for block in self.blocks:
            x = block(x)
        return self.logits(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps only, to see that it runs"
    )
    args = parser.parse_args()
    if args.smoke:
        args.epochs = 3

    keras.utils.set_random_seed(args.seed)
    data = load_digits()
    x, x_test, y, y_test = train_test_split(
        (data.images / 16).astype("float32"), data.target, test_size=0.2, random_state=args.seed
    )
    batches = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=args.seed)
    batches = batches.batch(128, drop_remainder=True)
    ramp = 2 * args.epochs // 3 * len(batches)  # steps; the last third is fine-tuning

    def schedule(step):
        """Return whether the masks are renewed in this step, and the sparsity."""
        progress = tf.minimum(tf.cast(step, tf.float32) / ramp, 1.0)
        return (step % 5 == 0) | (step == ramp), 0.9 * (1.0 - (1.0 - progress) ** 3)

    model = Network()
    model(x[:1])
    attack = tscnc.attacks.PGD(epsilon=0.1, step_size=0.025, steps=7)
    loss = tscnc.losses.Madry()
    optimizer = keras.optimizers.Adam(2e-3)
    pruner = tscnc.pruning.Pruner(model, schedule, scope="global", min_weights=10)

    @tf.function
    def train_step(x, y):
        # A seed for each step; the attack runs the model in inference mode.
        seed = tf.stack([args.seed, tf.cast(optimizer.iterations.value, tf.int32)])
        x_adversarial = attack(model, x, y, seed=seed)
        with tf.GradientTape() as tape:
            logits = model(x_adversarial, training=True)
            value = tf.reduce_mean(loss.robust(y, None, logits)) + tf.add_n(model.losses)
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        pruner.step(optimizer)  # masks the weights, and Adam's moments
        return value

    for epoch in range(args.epochs):
        for x_batch, y_batch in batches:
            value = train_step(x_batch, y_batch)
        if pruner.steps >= ramp and not pruner.frozen:
            pruner.finalize()
            print("the masks are frozen, fine-tuning begins")
        sparsity = tscnc.pruning.report(model).sparsity
        print(f"epoch {epoch + 1}: loss {float(value):.4f}, sparsity {sparsity:.4f}")

    print(tscnc.pruning.report(model))
    model = tscnc.strip(model)
    print(tscnc.inspection.condition_numbers(model))
    print(tscnc.evaluate_robustness(model, x_test, np.asarray(y_test), attacks=[attack]))


if __name__ == "__main__":
    main()
