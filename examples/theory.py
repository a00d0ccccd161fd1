"""What pruning does to a network's kernels and to its robustness, measured level by level.

Two networks are pruned level by level up to 99.9 % zeros, by magnitude: once without training, and
once with further training at each level. At each level it measures spectral norms and the bound
that follows from them, condition numbers, stable ranks, dead filters, the empirical local Lipschitz
constant, and the accuracy, clean and under attack. docs/theory.md says what is proven about these,
and what is not.

By default it trains two networks on scikit-learn's bundled digits (1,797 images of 8x8 pixels) for
each of three seeds, one without the constraints and one with them:

    python examples/theory.py                 # about 4 minutes on 2 cores
    python examples/theory.py --seeds 1 --finetune 0 --output DIR

Or it measures your own networks, `.keras` files of either Keras. The file of the data holds test
images and labels, the arrays `x` and `y`; and `x_train` and `y_train` for further training:

    python examples/theory.py --model plain.keras --other constrained.keras --data images.npz
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import itertools
import json
import math
import pathlib
import warnings
import zipfile

import keras
import numpy as np
import tensorflow as tf
import tf_keras
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from theory_figure import Runs, draw, save, table, wide_console

import tscnc_tf as tscnc

LEVELS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
# The columns of the report on each kernel that are stored.
KERNEL = ("sigma_max", "sigma_min", "condition_number", "effective_condition_number")
KERNEL += ("stable_rank", "filters", "dead_filters")
CONSTRAINTS = tscnc.regularizers.TSCNC(sparsity_factor=1e-5, condition_factor=1.0)


def network(seed: int) -> keras.Model:
    """A convolutional network with 93,000 weights that returns logits."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    x = inputs = keras.Input((8, 8, 1))
    for index, (filters, strides) in enumerate([(32, 1), (64, 2), (64, 1), (64, 2)]):
        name = f"conv_{index}"
        x = layers.Conv2D(filters, 3, strides, padding="same", use_bias=False, name=name)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    return keras.Model(inputs, layers.Dense(10, name="logits")(layers.GlobalAveragePooling2D()(x)))


def digits(seed: int, args) -> dict[str, np.ndarray]:
    """Images in [0, 1] and labels, 80 % for training and 20 % for the test."""
    x, y = load_digits(return_X_y=True)
    images = (x.reshape(-1, 8, 8, 1) / 16.0).astype("float32")
    parts = train_test_split(images, y, test_size=0.2, random_state=seed, stratify=y)
    names = ("x_train", "x", "y_train", "y")
    return {name: part[: args.examples] for name, part in zip(names, parts, strict=True)}


def loaded(path: pathlib.Path):
    """Load a network by the Keras that wrote it."""
    try:
        with zipfile.ZipFile(path) as archive:
            version = json.loads(archive.read("metadata.json"))["keras_version"]
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise SystemExit(f"theory.py: {path} must be a .keras file: {error}") from error
    return (tf_keras if version.startswith("2.") else keras).models.load_model(path, compile=False)


def trained(model, data, seed: int, args) -> keras.Model:
    """Train one of the built-in networks adversarially, and return it."""
    x, y = data["x_train"], data["y_train"]
    rate = keras.optimizers.schedules.CosineDecay(0.1, args.epochs * -(-len(x) // args.batch_size))
    trainer(model, rate, seed, args).fit(x, y, args.batch_size, args.epochs, verbose=0)
    return model


def trainer(model, rate, seed: int, args):
    """Return a compiled trainer for adversarial training of a network."""
    library = tf_keras if isinstance(model, tf_keras.Model) else keras
    attack = tscnc.attacks.PGD(epsilon=args.epsilon, step_size=args.epsilon / 2, steps=3)
    loss = tscnc.losses.TRADES(beta=3.0)
    training = tscnc.AdversarialTraining(model, attack=attack, loss=loss, seed=seed)
    training.compile(library.optimizers.SGD(rate, momentum=0.9, nesterov=True))
    return training


def upper_bound(model, x) -> float:
    """An upper bound of the Lipschitz constant from linf to l1; NaN for residual networks."""
    units = math.sqrt(model.output_shape[-1] * x[0].size)  # from l2 over l2 to l1 over linf
    try:
        return units * tscnc.inspection.lipschitz_upper_bound(model)
    except ValueError:  # not a chain of layers
        return math.nan


def measured(model, data, seed: int, args) -> dict:
    """Return the measurements of a network in its current state."""
    attack = tscnc.attacks.PGD(epsilon=args.epsilon, step_size=args.epsilon / 5, steps=20)
    x, y, many = data["x"], data["y"], {"batch_size": 512, "seed": seed}
    with unwarned():
        robustness = tscnc.evaluate_robustness(model, x, y, attack, progress=False, **many)
    conditions = tscnc.inspection.condition_numbers(model)
    return {
        "clean": robustness.clean_accuracy,
        "robust": robustness.robust_accuracy,
        "interval": robustness.robust_interval,
        "lipschitz": tscnc.inspection.local_lipschitz(model, x, args.epsilon, **many).mean,
        "bound": upper_bound(model, x),
        "product": math.prod(row.sigma_max for row in conditions.rows),
        "condition_number": conditions.worst.condition_number,
        "effective": conditions.worst_effective.effective_condition_number,
        "dead_filters": conditions.dead_filters,
        "warnings": robustness.warnings,
        "kernels": {
            row.name: {key: getattr(row, key) for key in KERNEL} for row in conditions.rows
        },
    }


@contextlib.contextmanager
def unwarned():
    """Ignore warnings about effects that are measured here: dead filters and zero gradients."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "At a sparsity of")
        warnings.simplefilter("ignore", tscnc.EvaluationWarning)
        yield


def pruned(model, data, seed: int, args, advance) -> list[dict]:
    """Prune a network to each level, and measure it; its weights are restored each time."""
    dense, results = model.get_weights(), []
    for level in args.levels:
        with unwarned():
            tscnc.prune_now(model, level, layers=args.layers)
        results.append(measured(model, data, seed, args))
        tscnc.strip(model).set_weights(dense)
        advance()
    return results


def retrained(model, data, seed: int, args, advance) -> list[dict]:
    """Prune a network from level to level, train it further at each, and measure it."""
    x, y = data["x_train"], data["y_train"]
    stay = args.finetune * -(-len(x) // args.batch_size)

    def stairs(step):
        """Return whether to prune at this step, the first one at a level, and the level."""
        level = tf.minimum((step - 1) // stay + 1, len(args.levels) - 1)
        return (step - 1) % stay == 0, tf.gather(args.levels, level)

    results = [measured(model, data, seed, args)]
    advance()
    with unwarned():
        tscnc.pruning.Pruner(model, stairs, layers=args.layers)
    training = trainer(model, args.rate, seed, args)
    for _ in args.levels[1:]:
        training.fit(x, y, args.batch_size, args.finetune, verbose=0)
        results.append(measured(model, data, seed, args))
        advance()
    tscnc.strip(model)
    return results


def jsonable(value):
    """Return a value for JSON: floats with six digits, and infinity as "inf"."""
    if isinstance(value, dict):
        return {key: jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=pathlib.Path, default=pathlib.Path("outputs/theory"))
    add("--model", type=pathlib.Path, help="your own network, a .keras file")
    add("--other", type=pathlib.Path, help="another one, to compare with it")
    add("--data", type=pathlib.Path, help="with --model: an .npz file with x and y")
    add("--layers", help="name pattern of the layers to prune; conv_[123], or all with --model")
    add("--epsilon", type=float, default=0.1, help="radius of the linf ball, for inputs in [0, 1]")
    add("--epochs", type=int, default=10, help="of training, before pruning")
    add("--finetune", type=int, default=3, help="epochs of training at each level")
    add("--rate", type=float, default=0.02, help="the learning rate at each level")
    add("--batch-size", type=int, default=64)
    add("--seeds", type=int, default=3, help="the number of seeds, without --model")
    add("--smoke", action="store_true", help="a few steps only, to see that it runs")
    args = parser.parse_args()
    if (args.model is None) != (args.data is None) or (args.other and not args.model):
        parser.error("--model goes with --data, and --other with both.")
    args.levels, args.examples = LEVELS, None
    if args.smoke:
        args.levels, args.examples = (0.0, 0.999), 48
        args.epochs, args.finetune, args.seeds = 1, 1, 1
    if args.model is not None:
        args.seeds = 1  # there is one network of a kind
    args.layers = args.layers or ("conv_[123]" if args.model is None else None)
    return args


def subjects(seed: int, args) -> tuple[dict, dict]:
    """Return the networks by name, trained or loaded, and the data."""
    if args.model is None:
        data = digits(seed, args)
        plain = trained(network(seed), data, seed, args)
        constrained = tscnc.pruning.add_regularizers(network(seed), CONSTRAINTS)
        return {"plain": plain, "TSCNC": trained(constrained, data, seed, args)}, data
    data = images(args.data)
    paths = [path.absolute() for path in (args.model, args.other) if path is not None]
    return {name: loaded(path) for name, path in zip(titles(paths), paths, strict=True)}, data


def images(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Read images in [0, 1] and labels from an .npz file."""
    kinds = {"x": "float32", "y": int, "x_train": "float32", "y_train": int}
    try:
        with np.load(path) as file:
            data = {name: file[name].astype(kind) for name, kind in kinds.items() if name in file}
    except (OSError, ValueError, AttributeError) as error:  # AttributeError: of a bare array
        raise SystemExit(f"theory.py: --data must be an .npz file, got {path}: {error}") from error
    if not {"x", "y"} <= set(data):
        raise SystemExit(f"theory.py: --data must hold arrays x and y, {path} holds {list(data)}.")
    low, high = np.min(data["x"]), np.max(data["x"])
    if not 0.0 <= low <= high <= 1.0:
        raise SystemExit(
            f"theory.py: images must be in [0, 1], those of {path} are from {low:g} to {high:g}: "
            "divide them by 255, if they are bytes."
        )
    return data


def titles(paths: list[pathlib.Path]) -> list[str]:
    """Return the shortest ends of the paths that differ."""
    parts = [path.with_suffix("").parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def main() -> None:
    args, console, runs = arguments(), wide_console(), []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=None)
        for seed in range(args.seeds):
            networks, data = subjects(seed, args)
            ways = {"pruned": pruned}
            if args.finetune and "x_train" in data:
                ways["retrained"] = retrained
            total = args.seeds * len(networks) * len(ways) * len(args.levels)
            for (name, model), (way, run) in itertools.product(networks.items(), ways.items()):
                progress.update(task, total=total, description=f"{name}, {way}, seed {seed}")
                try:
                    steps = run(model, data, seed, args, lambda: progress.advance(task))
                except ValueError as error:
                    raise SystemExit(f"theory.py: {name}: {error}") from error
                runs.append({"network": name, "way": way, "seed": seed, "steps": steps})

    layers = [name for name in steps[0]["kernels"] if fnmatch.fnmatch(name, args.layers or "*")]
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    record = jsonable({**settings, "layers": layers, "images": len(data["x"]), "runs": runs})
    save(args.output / "theory.json", lambda path: path.write_text(json.dumps(record, default=str)))
    save(args.output / "theory.png", lambda path: draw(Runs(record), path))
    console.print(table(Runs(record)))
    console.print(
        f"Medians over {args.seeds} seed(s). robust: PGD-20, linf, epsilon {args.epsilon:g}, with "
        f"what the seeds' 95 % intervals span; {len(data['x'])} test images a seed. Lipschitz: "
        "empirical and local, l1 over linf, in the same ball. zeros: of each kernel pruned."
    )
    console.print(f"theory.png and theory.json are in {args.output}")


if __name__ == "__main__":
    main()
