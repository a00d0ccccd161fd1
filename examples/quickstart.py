"""From a small network to pruned, robust SavedModels, on real handwritten digits, in minutes.

Four networks are trained adversarially on scikit-learn's bundled digits (1,797 images of 8x8
pixels), to 95 % and 99 % zeros, without and with the constraints of TSCNC. Each is evaluated on
images that it has not seen, exported, loaded back and measured again as a user of the file would.

    python examples/quickstart.py                 # about 3 minutes on 2 cores
    python examples/quickstart.py --output DIR --seed 1
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tf_keras
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tscnc_tf as tscnc

EPSILON = 0.1  # of a grey scale from 0 to 1
ATTACK = tscnc.attacks.PGD(epsilon=EPSILON, step_size=0.025, steps=7)
JUDGES = [
    tscnc.attacks.PGD(epsilon=EPSILON, step_size=0.02, steps=20, restarts=2),
    tscnc.attacks.PGD(epsilon=EPSILON, step_size=0.02, steps=20, objective="margin"),
]
CONSTRAINTS = tscnc.regularizers.TSCNC(sparsity_factor=1e-5, condition_factor=2e-2)


def digits(seed: int) -> tuple[np.ndarray, ...]:
    """Images in [0, 1] and labels, 80 % for training and 20 % for the test."""
    data = load_digits()
    x = (data.images[..., np.newaxis] / 16.0).astype("float32")
    return train_test_split(x, data.target, test_size=0.2, random_state=seed, stratify=data.target)


def network() -> tf_keras.Model:
    """A convolutional network with 75,000 weights that returns logits."""
    layers = tf_keras.layers
    inputs = tf_keras.Input((8, 8, 1))
    x = layers.Conv2D(32, 3, padding="same", use_bias=False, name="stem")(inputs)
    for index, filters in enumerate((32, 64, 64)):
        x = layers.ReLU()(layers.BatchNormalization()(x))
        x = layers.Conv2D(
            filters,
            3,
            strides=2 if index == 1 else 1,
            padding="same",
            use_bias=False,
            name=f"conv_{index + 1}",
        )(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.GlobalAveragePooling2D()(x)
    return tf_keras.Model(inputs, layers.Dense(10, name="logits")(x))


class Advance(tf_keras.callbacks.Callback):
    """Move a progress bar on after every epoch."""

    def __init__(self, progress: Progress, task: int) -> None:
        super().__init__()
        self.progress, self.task = progress, task

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.progress.advance(self.task)


def train(x, y, sparsity: float, constrained: bool, args, on_epoch) -> tf_keras.Model:
    """Train one network adversarially while it is pruned to `sparsity`; return it, pruned."""
    tf_keras.utils.set_random_seed(args.seed)
    steps_per_epoch = -(-len(x) // args.batch_size)
    model = network()
    if constrained:
        model = tscnc.pruning.add_regularizers(model, CONSTRAINTS)
    schedule = tscnc.schedules.CosineSparsity.from_epochs(
        0.0,
        sparsity,
        0.25 * args.epochs,
        0.75 * args.epochs,
        steps_per_epoch=steps_per_epoch,
        frequency=5,
    )
    # The stem's 288 weights are too few to spare 99 % of them; all else is pruned.
    model = tscnc.prune(model, schedule, layers=["conv_*", "logits"])
    trainer = tscnc.AdversarialTraining(
        model, attack=ATTACK, loss=tscnc.losses.TRADES(beta=3.0), seed=args.seed
    )
    rate = tf_keras.optimizers.schedules.CosineDecay(0.1, args.epochs * steps_per_epoch)
    trainer.compile(optimizer=tf_keras.optimizers.SGD(rate, momentum=0.9, nesterov=True))
    trainer.fit(
        x,
        y,
        batch_size=args.batch_size,
        epochs=args.epochs,
        verbose=0,
        callbacks=[*tscnc.callbacks.pruning_callbacks(), on_epoch],
    )
    return trainer.model


def judge(model, path: pathlib.Path, x, y, sparsity: float, seed: int) -> dict:
    """Export a model, load it back, and measure the file that a user would get."""
    export = tscnc.export_saved_model(model, path, expected_sparsity=sparsity, probe=x[:8])
    served = tscnc.load_saved_model(path)
    robustness = tscnc.evaluate_robustness(
        served, x, y, attacks=JUDGES, batch_size=256, seed=seed, progress=False
    )
    conditions = tscnc.inspection.condition_numbers(model)
    return {
        "export": export,
        "robustness": robustness,
        "conditions": conditions,
        "singular_values": tscnc.inspection.singular_values(model),
    }


def show(results: dict, console: Console) -> None:
    """Print the one table."""
    table = Table(title=f"Digits, linf epsilon {EPSILON:g}: what is left after pruning")
    columns = ("sparsity", "clean", "robust", "worst κ", "worst eff. κ", "dead filters", "gzipped")
    for name in ("network", *columns):
        table.add_column(name, justify="left" if name == "network" else "right")
    for name, result in results.items():
        robustness, conditions = result["robustness"], result["conditions"]
        low, high = robustness.robust_interval
        kappa = conditions.worst.condition_number
        table.add_row(
            name,
            f"{result['export'].sparsity:.2%}",
            f"{robustness.clean_accuracy:.1%}",
            f"{robustness.robust_accuracy:.1%} [{low:.1%}, {high:.1%}]",
            "∞" if np.isinf(kappa) else f"{kappa:.3g}",
            f"{conditions.worst_effective.effective_condition_number:.3g}",
            str(conditions.dead_filters),
            f"{result['export'].gzip_bytes / 1024:.1f} KiB",
        )
    console.print(table)


def draw(results: dict, path: pathlib.Path) -> None:
    """Draw the singular values of every kernel, one panel a layer."""
    names = list(next(iter(results.values()))["singular_values"])
    figure, axes = plt.subplots(1, len(names), figsize=(3 * len(names), 3.2), sharey=True)
    for axis, name in zip(axes, names, strict=True):
        for label, result in results.items():
            values = np.maximum(result["singular_values"][name], 1e-6)
            style = "-" if "TSCNC" in label else ":"
            axis.plot(values, style, marker=".", markersize=3, label=label)
        axis.set(title=name, xlabel="index", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("singular value (1e-6: zero)")
    axes[-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("outputs/quickstart"))
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps only, to see that it runs"
    )
    args = parser.parse_args()
    x_train, x_test, y_train, y_test = digits(args.seed)
    if args.smoke:
        args.epochs, x_train, y_train = 4, x_train[:64], y_train[:64]
        args.batch_size, x_test, y_test = 16, x_test[:32], y_test[:32]
    args.output.mkdir(parents=True, exist_ok=True)

    runs = {
        f"{sparsity:.0%} {'TSCNC' if constrained else 'plain'}": (sparsity, constrained)
        for sparsity in (0.95, 0.99)
        for constrained in (False, True)
    }
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    results = {}
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(runs) * args.epochs)
        for name, (sparsity, constrained) in runs.items():
            progress.update(task, description=f"training {name}")
            advance = Advance(progress, task)
            model = train(x_train, y_train, sparsity, constrained, args, advance)
            path = args.output / name.replace("% ", "_")
            shutil.rmtree(path, ignore_errors=True)  # of an earlier run
            results[name] = judge(model, path, x_test, y_test, sparsity, args.seed)

    show(results, console)
    draw(results, args.output / "singular_values.png")
    figures = {name: result["robustness"].to_dict() for name, result in results.items()}
    (args.output / "robustness.json").write_text(json.dumps(figures, indent=2))
    console.print(
        f"robust: the worst of {', '.join(a.name for a in JUDGES)}, with its 95 % interval; "
        f"{len(x_test)} test images, seed {args.seed}, one training run a row."
    )
    console.print(f"SavedModels, singular_values.png and robustness.json are in {args.output}")


if __name__ == "__main__":
    main()
