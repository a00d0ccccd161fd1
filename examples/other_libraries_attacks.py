"""Evaluate a network by attacks of CleverHans, foolbox and ART (Adversarial Robustness Toolbox).

`attacks.CleverHans` runs that library's attacks by name. For other libraries, any callable
`(model, x, y) -> x_adv` is an attack; `attacks.Custom` declares its ball, so that the evaluation
also checks that its outputs stay inside.

    pip install adversarial-robustness-toolbox foolbox
    python examples/other_libraries_attacks.py [--epochs 20] [--seed 0]
"""

from __future__ import annotations

import argparse

import foolbox
import numpy as np
import tensorflow as tf
import tf_keras
from art.attacks.evasion import AutoProjectedGradientDescent
from art.estimators.classification import TensorFlowV2Classifier
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tscnc_tf as tscnc

EPSILON = 0.1
L2_EPSILON = 0.5


def art_apgd(model, x, y):
    """Auto-PGD as ART runs it, on NumPy arrays."""
    classifier = TensorFlowV2Classifier(
        model=model,
        nb_classes=10,
        input_shape=x.shape[1:],
        clip_values=(0.0, 1.0),
        loss_object=tf_keras.losses.CategoricalCrossentropy(from_logits=True),
    )
    attack = AutoProjectedGradientDescent(
        classifier, eps=EPSILON, eps_step=EPSILON / 4, max_iter=20, nb_random_init=1, verbose=False
    )
    return attack.generate(np.asarray(x), np.asarray(y))


def foolbox_ddn(model, x, y):
    """The decoupled direction and norm attack, which looks for the nearest adversarial example."""
    network = foolbox.TensorFlowModel(model, bounds=(0.0, 1.0))
    attack = foolbox.attacks.DDNAttack(steps=100)
    _, x_adversarial, _ = attack(network, x, tf.cast(y, tf.int64), epsilons=L2_EPSILON)
    return x_adversarial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps only, to see that it runs"
    )
    args = parser.parse_args()

    tf_keras.utils.set_random_seed(args.seed)
    data = load_digits()
    x, x_test, y, y_test = train_test_split(
        (data.images / 16).astype("float32"), data.target, test_size=0.2, random_state=args.seed
    )
    if args.smoke:
        args.epochs, x_test, y_test = 2, x_test[:32], y_test[:32]
    model = tf_keras.Sequential(
        [
            tf_keras.layers.Flatten(input_shape=(8, 8)),
            tf_keras.layers.Dense(128, activation="relu"),
            tf_keras.layers.Dense(10),
        ]
    )
    attack = tscnc.attacks.PGD(epsilon=EPSILON, steps=7)
    trainer = tscnc.AdversarialTraining(model, attack=attack, loss=tscnc.losses.TRADES(beta=3.0))
    trainer.compile(tf_keras.optimizers.Adam(1e-3))
    trainer.fit(x, y, batch_size=64, epochs=args.epochs, verbose=0)

    attacks = [
        attack,
        tscnc.attacks.CleverHans(
            "momentum_iterative_method",
            epsilon=EPSILON,
            options={"nb_iter": 20, "eps_iter": EPSILON / 4},
        ),
        tscnc.attacks.Custom(art_apgd, epsilon=EPSILON, name="ART Auto-PGD"),
        tscnc.attacks.Custom(foolbox_ddn, epsilon=L2_EPSILON, norm="l2", name="foolbox DDN"),
    ]
    print(tscnc.evaluate_robustness(model, x_test, y_test, attacks=attacks, seed=args.seed))


if __name__ == "__main__":
    main()
