"""The method's three stages on a dataset, from a recipe to the last figure.

    python examples/paper.py examples/recipes/cifar10-resnet-18-99.yaml --output runs/first
    python examples/paper.py --dataset cifar10.npz --arch wrn-28-4 --sparsity 0.99 --output runs/2
    python examples/paper.py RECIPE.yaml --baseline --train.epochs 10 --prune.method magnitude

Adversarial training under the constraints, pruning, fine-tuning, evaluation and export. Every value
of the recipe can be given on the command line by its name; without a recipe, all others are the
method's figures (recipes/paper.yaml), constraints and gates on. Stopped at any moment, by whatever
means, and started again by the same command, it goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import tscnc_tf as tscnc

HERE = pathlib.Path(__file__).parent
SHORT = {"dataset": "data.dataset", "arch": "network.architecture"}
PAPER, SMOKE = HERE / "recipes" / "paper.yaml", HERE / "recipes" / "smoke.yaml"


def main() -> None:
    """Read the recipe and the command line, run, and show what came out."""
    arguments = parser().parse_args()
    try:
        recipe = recipe_of(arguments)
        output = arguments.output or f"outputs/paper/{recipe.name}"
        folder = tscnc.experiments.run(recipe, output, dense=arguments.dense)
    except (TypeError, ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"paper.py: {error}")
    show(folder, Console())


def parser() -> argparse.ArgumentParser:
    """Return a parser that knows every value of a recipe."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("recipe", nargs="?", help="a YAML file; by itself recipes/paper.yaml")
    made.add_argument("--output", help="folder of the experiment, new or to go on with")
    made.add_argument("--dense", help="a finished 1-train of another experiment, to begin with")
    made.add_argument("--baseline", action="store_true", help="without constraints and gates")
    made.add_argument("--smoke", action="store_true", help="a tiny experiment, of seconds")
    for name, default in tscnc.experiments.Recipe.leaves():
        short = [f"--{key}" for key, full in SHORT.items() if full == name]
        names = [f"--{name}", *short]
        made.add_argument(*names, dest=name, metavar="VALUE", help=f"default {default!r}")
    return made


def recipe_of(arguments: argparse.Namespace) -> tscnc.experiments.Recipe:
    """Return the recipe of the file, with the values of the command line."""
    path = SMOKE if arguments.smoke else arguments.recipe or PAPER
    recipe = tscnc.experiments.Recipe.from_yaml(path)
    given = {
        # A pattern such as *conv* would be a reference in YAML.
        name: value if value.startswith("*") else tscnc.experiments.parse(value, f"--{name}")
        for name, _ in recipe.leaves()
        if (value := getattr(arguments, name)) is not None
    }
    recipe = recipe.override(given)
    return recipe.baseline() if arguments.baseline else recipe


def show(folder: pathlib.Path, console: Console) -> None:
    """Print each stage's chosen epoch, and the last evaluation."""
    table = Table(title=f"{folder}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("stage", "epoch", "zeros", "clean", "robust", "worst κ", "dead"):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    for stage in ("1-train", "2-prune", "3-finetune"):
        output = tscnc.experiments.open_stage(folder / stage)
        epoch = output.manifest["chosen_epoch"]
        row = output.metrics[epoch - 1]
        table.add_row(
            stage,
            str(epoch),
            f"{row['sparsity']:.2%}",
            f"{row['validation_accuracy']:.1%}",
            f"{row['validation_robust_accuracy']:.1%}",
            f"{float(row['condition_number']):.3g}",
            f"{row['dead_filters']:.0f}",
        )
    console.print(table)
    console.print("Accuracies above are those of the validation set, which chose the epochs.")
    report = (folder / "4-evaluate" / "report.txt").read_text(encoding="utf-8")
    console.print(report, markup=False, highlight=False, soft_wrap=True)
    console.print(f"All of it is in {folder}.", soft_wrap=True)


if __name__ == "__main__":
    main()
