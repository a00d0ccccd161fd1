"""Adversarial training, pruning, export and evaluation of a small network, in minutes.

A network is trained adversarially on scikit-learn's bundled digits (1,797 images of 8x8 pixels),
once without and once with the constraints of TSCNC. Each is then pruned to 95 % and to 99 % zeros
during further training, by global pruning; the first one also by uniform pruning (the same sparsity
in each layer). Each result is exported as a SavedModel, loaded again and evaluated on test images.

    python examples/quickstart.py                 # about 4 minutes on 2 cores
    python examples/quickstart.py --output DIR --seed 1
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import shutil

import numpy as np
import tf_keras
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tscnc_tf as tscnc

EPSILON = 0.1  # of a grey scale from 0 to 1
ATTACK = tscnc.attacks.PGD(epsilon=EPSILON, step_size=0.05, steps=3)
# The rest of AutoAttack, FAB and Square, takes minutes more per network.
TEST_ATTACKS = tscnc.attacks.AutoAttack(epsilon=EPSILON).attacks[:2]
# The factors were chosen on a part of the training images, before the test images were looked at.
CONSTRAINTS = tscnc.regularizers.TSCNC(sparsity_factor=1e-5, condition_factor=1.0)
WEIGHT_DECAY = 0.01
# The rows of the table: whether the network has the constraints, and how the kept weights are
# distributed over the layers.
KINDS = {"uniform": (False, "layer"), "global": (False, "global"), "TSCNC": (True, "global")}


def digits(seed: int) -> tuple[np.ndarray, ...]:
    """Images in [0, 1] and labels, 80 % for training and 20 % for the test."""
    data = load_digits()
    x = (data.images[..., np.newaxis] / 16.0).astype("float32")
    return train_test_split(x, data.target, test_size=0.2, random_state=seed, stratify=data.target)


def network(constrained: bool) -> tf_keras.Model:
    """A convolutional network with 93,000 weights that returns logits."""
    layers = tf_keras.layers
    inputs = tf_keras.Input((8, 8, 1))
    x = layers.Conv2D(32, 3, padding="same", use_bias=False, name="stem")(inputs)
    for index, strides in enumerate((2, 1, 2)):
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
        x = layers.Conv2D(
            64, 3, strides=strides, padding="same", use_bias=False, name=f"conv_{index + 1}"
        )(x)
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    x = layers.GlobalAveragePooling2D()(x)
    model = tf_keras.Model(inputs, layers.Dense(10, name="logits")(x))
    return tscnc.pruning.add_regularizers(model, CONSTRAINTS) if constrained else model


class Advance(tf_keras.callbacks.Callback):
    """Advance a progress bar after every epoch."""

    def __init__(self, progress: Progress, task: int) -> None:
        super().__init__()
        self.progress, self.task = progress, task

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.progress.advance(self.task)


def train(model: tf_keras.Model, x, y, epochs: int, args, on_epoch) -> None:
    """Train a network adversarially; the callbacks prune a model that is to be pruned."""
    trainer = tscnc.AdversarialTraining(
        model, attack=ATTACK, loss=tscnc.losses.TRADES(beta=3.0), seed=args.seed
    )
    rate = tf_keras.optimizers.schedules.CosineDecay(0.1, epochs * steps_per_epoch(x, args))
    trainer.compile(
        optimizer=tscnc.training.SGDWithL2(
            rate, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY, library="tf_keras"
        )
    )
    trainer.fit(
        x,
        y,
        batch_size=args.batch_size,
        epochs=epochs,
        verbose=0,
        callbacks=[*tscnc.callbacks.pruning_callbacks(), on_epoch],
    )


def pruned(model: tf_keras.Model, sparsity: float, scope: str, x, args) -> tf_keras.Model:
    """Return the network prepared for training that prunes its inner convolutions.

    The first and the last layer stay dense, as usual: 99 % zeros would leave the stem 3 weights for
    32 filters, and the last layer 6 for 10 classes.
    """
    schedule = tscnc.schedules.CosineSparsity.from_epochs(
        0.0, sparsity, 0, 0.6 * args.epochs, steps_per_epoch=steps_per_epoch(x, args), frequency=5
    )
    return tscnc.prune(model, schedule, layers="conv_*", engine="masks", scope=scope)


def steps_per_epoch(x, args) -> int:
    """The number of batches in an epoch."""
    return -(-len(x) // args.batch_size)


def evaluate(model, path: pathlib.Path, x, y, expected: float | None, seed: int) -> dict:
    """Export a model, and evaluate the SavedModel."""
    export = tscnc.export_saved_model(model, path, expected_sparsity=expected, probe=x[:8])
    served = tscnc.load_saved_model(path)
    robustness = tscnc.evaluate_robustness(
        served, x, y, attacks=TEST_ATTACKS, batch_size=256, seed=seed, progress=False
    )
    conditions = tscnc.inspection.condition_numbers(model)
    return {"export": export, "robustness": robustness, "conditions": conditions}


def show(results: dict, console: Console) -> None:
    """Print the table."""
    table = Table(
        title="What is left after pruning", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    for name in ("network", "zeros", "clean", "robust", "worst κ", "dead", "gzipped"):
        table.add_column(name, justify="left" if name == "network" else "right", no_wrap=True)
    for name, result in results.items():
        robustness, conditions = result["robustness"], result["conditions"]
        low, high = robustness.robust_interval
        kappa = conditions.worst.condition_number
        table.add_row(
            name,
            f"{result['export'].sparsity:.1%}",
            f"{robustness.clean_accuracy:.1%}",
            f"{robustness.robust_accuracy:.1%} ({100 * low:.0f} to {100 * high:.0f})",
            "∞" if np.isinf(kappa) else f"{kappa:.3g}",
            str(conditions.dead_filters),
            f"{result['export'].gzip_bytes / 1024:.1f} KiB",
        )
    console.print(table)


def draw(results: dict, path: pathlib.Path) -> None:
    """Draw the singular values of every kernel, one panel per layer."""
    (label, first), *others = ((name, result["conditions"]) for name, result in results.items())
    first.plot(label=label, others=dict(others)).savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("outputs/quickstart"))
    parser.add_argument("--dense-epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=24, help="of training while pruning")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps only, to see that it runs"
    )
    args = parser.parse_args()
    x_train, x_test, y_train, y_test = digits(args.seed)
    levels = (0.95, 0.99)
    if args.smoke:
        levels = (0.99,)
        args.dense_epochs, args.epochs, args.batch_size = 1, 3, 16
        x_train, y_train, x_test, y_test = x_train[:48], y_train[:48], x_test[:32], y_test[:32]
    args.output.mkdir(parents=True, exist_ok=True)

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    results = {}
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(
            "", total=2 * args.dense_epochs + len(KINDS) * len(levels) * args.epochs
        )
        on_epoch = Advance(progress, task)
        for constrained in (False, True):
            progress.update(task, description="training")
            tf_keras.utils.set_random_seed(args.seed)
            dense = network(constrained)
            train(dense, x_train, y_train, args.dense_epochs, args, on_epoch)
            weights = dense.get_weights()
            kinds = [kind for kind, (needs, _) in KINDS.items() if needs == constrained]
            for kind, sparsity in itertools.product(kinds, levels):
                progress.update(task, description=f"pruning to {sparsity:.0%}, {kind}")
                model = network(constrained)
                model.set_weights(weights)
                model = pruned(model, sparsity, KINDS[kind][1], x_train, args)
                train(model, x_train, y_train, args.epochs, args, on_epoch)
                path = args.output / f"{kind}_{100 * sparsity:.0f}"
                shutil.rmtree(path, ignore_errors=True)  # of an earlier run
                name = f"{kind} {sparsity:.0%}"
                expected = sparsity if KINDS[kind][1] == "layer" else None  # of each layer
                results[name] = evaluate(model, path, x_test, y_test, expected, args.seed)

    show(results, console)
    draw(results, args.output / "singular_values.png")
    figures = {name: result["robustness"].to_dict() for name, result in results.items()}
    (args.output / "robustness.json").write_text(json.dumps(figures, indent=2))
    console.print(
        f"zeros: of the three inner convolutions. dead: filters. robust: under the "
        f"first two attacks of AutoAttack ({', '.join(attack.name for attack in TEST_ATTACKS)}), "
        f"with its 95 % interval; {len(x_test)} test images, seed {args.seed}, one training run a "
        "row."
    )
    console.print(f"SavedModels, singular_values.png and robustness.json are in {args.output}")


if __name__ == "__main__":
    main()
