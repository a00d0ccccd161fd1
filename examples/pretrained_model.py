"""Constrain and prune an existing network of tf_keras.applications.

`add_regularizers` rebuilds the layers of a trained model with a regularizer on their kernels; the
weights and the outputs stay the same, bit for bit. Then the network is fine-tuned while it is
pruned. The images are scikit-learn's digits, enlarged. By default the network has random weights,
so that nothing is downloaded; `--weights imagenet` starts from weights that tf_keras downloads.

    python examples/pretrained_model.py [--weights imagenet] [--epochs 5] [--seed 0]
"""

from __future__ import annotations

import argparse

import numpy as np
import tensorflow as tf
import tf_keras
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tscnc_tf as tscnc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default=None, choices=[None, "imagenet"])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps only, to see that it runs"
    )
    args = parser.parse_args()

    tf_keras.utils.set_random_seed(args.seed)
    data = load_digits()
    images = tf.image.resize(data.images[..., np.newaxis] / 16, (32, 32), "nearest")
    images = tf.repeat(images, 3, axis=-1).numpy().astype("float32")
    x, x_test, y, y_test = train_test_split(
        images, data.target, test_size=0.2, random_state=args.seed
    )
    if args.smoke:
        args.epochs, x, y, x_test, y_test = 1, x[:32], y[:32], x_test[:16], y_test[:16]

    trunk = tf_keras.applications.MobileNetV2(
        input_shape=(32, 32, 3), alpha=0.35, include_top=False, pooling="avg", weights=args.weights
    )
    logits = tf_keras.layers.Dense(10, name="logits")(trunk.output)
    model = tf_keras.Model(trunk.input, logits)

    # Pointwise convolutions hold nearly all weights. They are chosen by name, since the small
    # depthwise ones are convolutions as well.
    pointwise = ["*expand", "*project", "Conv_1"]
    constrained = tscnc.pruning.add_regularizers(
        model,
        tscnc.regularizers.TSCNC(sparsity_factor=1e-6, condition_factor=1e-3),
        layers=pointwise,
    )
    same = np.array_equal(model(x[:8], training=False), constrained(x[:8], training=False))
    print(
        f"outputs are the same, bit for bit: {same}; penalties attached: {len(constrained.losses)}"
    )

    steps = args.epochs * -(-len(x) // 32)
    schedule = tscnc.schedules.CosineSparsity(0.0, 0.8, 0, max(1, steps // 2), frequency=5)
    pruned = tscnc.prune(constrained, schedule, layers=pointwise)
    attack = tscnc.attacks.FGSM(epsilon="8/255")
    trainer = tscnc.AdversarialTraining(pruned, attack=attack, loss=tscnc.losses.Madry())
    trainer.compile(tf_keras.optimizers.Adam(1e-3))
    trainer.fit(
        x,
        y,
        batch_size=32,
        epochs=args.epochs,
        verbose=2,
        callbacks=tscnc.callbacks.pruning_callbacks(),
    )
    print(tscnc.inspection.sparsity(pruned))
    attacks = [attack, tscnc.attacks.PGD(epsilon="8/255", steps=2 if args.smoke else 10)]
    print(tscnc.evaluate_robustness(pruned, x_test, y_test, attacks=attacks))


if __name__ == "__main__":
    main()
