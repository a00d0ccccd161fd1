"""Two ways to prune a robust Keras 3 model, down to the LiteRT file for a small device.

A convolutional network is trained adversarially on scikit-learn's bundled digits. It is then pruned
in two ways during further training:

* single weights, 95 % of them, by global pruning: the network keeps its shape, and its file
  compresses well;
* whole filters, two thirds of them, which `compact` then removes: a smaller network, which is
  faster on any device.

Each is exported to LiteRT. The files are evaluated on test images, and on the adversarial examples
that the first two attacks of AutoAttack find on the network that was exported.

    python examples/keras3_quickstart.py                 # about 3 minutes on 2 cores
    python examples/keras3_quickstart.py --output DIR --seed 1
"""

from __future__ import annotations

import argparse
import pathlib

import keras
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tscnc_tf as tscnc

ATTACK = tscnc.attacks.PGD(epsilon=0.1, step_size=0.05, steps=3)
TEST_ATTACKS = tscnc.attacks.AutoAttack(epsilon=0.1).attacks[:2]


def network() -> keras.Model:
    """A convolutional network with 93,000 weights that returns logits."""
    layers = keras.layers
    x = inputs = keras.Input((8, 8, 1))
    for index, (filters, strides) in enumerate([(32, 1), (64, 2), (64, 1), (64, 2)]):
        name = f"conv_{index}"
        x = layers.Conv2D(filters, 3, strides, padding="same", use_bias=False, name=name)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    return keras.Model(inputs, layers.Dense(10, name="logits")(layers.GlobalAveragePooling2D()(x)))


def train(model: keras.Model, x, y, epochs: int, args) -> None:
    """Train a network adversarially; the callbacks prune a model that is to be pruned."""
    steps = epochs * -(-len(x) // args.batch_size)
    rate = keras.optimizers.schedules.CosineDecay(0.1, steps)
    trainer = tscnc.AdversarialTraining(
        model, attack=ATTACK, loss=tscnc.losses.TRADES(beta=3.0), seed=args.seed
    )
    trainer.compile(tscnc.training.SGDWithL2(rate, momentum=0.9, nesterov=True, weight_decay=0.01))
    callbacks = tscnc.callbacks.pruning_callbacks()
    trainer.fit(x, y, args.batch_size, epochs, verbose=0, callbacks=callbacks)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("outputs/keras3_quickstart")
    )
    parser.add_argument("--dense-epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=24, help="of training while pruning")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps only, to see that it runs"
    )
    args = parser.parse_args()
    data = load_digits()
    x, x_test, y, y_test = train_test_split(
        (data.images[..., np.newaxis] / 16.0).astype("float32"),
        data.target,
        test_size=0.2,
        random_state=args.seed,
        stratify=data.target,
    )
    if args.smoke:
        args.dense_epochs, args.epochs, args.batch_size = 1, 3, 16
        x, y, x_test, y_test = x[:48], y[:48], x_test[:32], y_test[:32]
    console = Console()
    keras.utils.set_random_seed(args.seed)

    dense = network()
    train(dense, x, y, args.dense_epochs, args)
    weights = dense.get_weights()

    def pruned(sparsity: float, **options) -> keras.Model:
        """The trained network, its inner convolutions pruned during further training."""
        model = network()
        model.set_weights(weights)
        schedule = tscnc.schedules.CosineSparsity.from_epochs(
            *(0.0, sparsity, 0, 0.6 * args.epochs),
            steps_per_epoch=-(-len(x) // args.batch_size),
            frequency=5,
        )
        model = tscnc.prune(model, schedule, layers="conv_[123]", **options)
        train(model, x, y, args.epochs, args)
        print(tscnc.pruning.report(model), end="\n\n")
        return tscnc.strip(model)

    single = pruned(0.95, scope="global")
    compaction = tscnc.pruning.compact(pruned(2 / 3, structure=tscnc.pruning.Filters()))
    print(compaction, end="\n\n")

    table = Table(title="What is left", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("network", "weights", "not zero", "clean", "robust", "file", "gzipped"):
        table.add_column(name, justify="left" if name == "network" else "right", no_wrap=True)
    models = {"dense": dense, "95 % zeros": single, "fewer filters": compaction.model}
    for name, model in models.items():
        path = args.output / f"{name.replace(' ', '_').replace('%', 'percent')}.tflite"
        path.unlink(missing_ok=True)  # of an earlier run
        export = tscnc.export_litert(model, path, probe=x_test[:8])
        attacks = [tscnc.attacks.Transfer(source=model, attack=each) for each in TEST_ATTACKS]
        robustness = tscnc.evaluate_robustness(
            tscnc.load_litert(path), x_test, y_test, attacks=attacks, seed=args.seed, progress=False
        )
        low, high = robustness.robust_interval
        table.add_row(
            name,
            f"{export.weights.model_weights:,}",
            f"{export.weights.model_weights - export.weights.model_zeros:,}",
            f"{robustness.clean_accuracy:.1%}",
            f"{robustness.robust_accuracy:.1%} ({100 * low:.0f}–{100 * high:.0f})",
            f"{export.file_bytes / 1024:.0f} KiB",
            f"{export.gzip_bytes / 1024:.0f} KiB",
        )
    console.print(table)
    print(compaction.measure_latency(x_test, rounds=5 if args.smoke else 50), end="\n\n")
    console.print(
        "robust: under the first two attacks of AutoAttack "
        f"({', '.join(attack.name for attack in TEST_ATTACKS)}), found on the network, with the "
        f"95 % interval of the file; {len(x_test)} test images, seed {args.seed}, one training "
        f"run a row. The files are in {args.output}"
    )


if __name__ == "__main__":
    main()
