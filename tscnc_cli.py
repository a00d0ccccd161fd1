"""The command line, `tscnc`: a thin layer over the public functions of `tscnc_tf`.

The result is printed on stdout, as text or (`--json`) as one JSON document; progress and what the
libraries print go to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage.

This module is outside of the package, which it imports only when a command runs: importing
TensorFlow takes seconds, and `tscnc --help` does not wait for it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import os
import pathlib
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_type_hints

import click

Result = tuple[Mapping[str, Any], Any]  # values for --json, and an object whose str() is the text

FILE = click.Path(path_type=pathlib.Path)
EXISTING = click.Path(exists=True, path_type=pathlib.Path)
KERAS_FILES = (".keras", ".h5")


@click.group(
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "token_normalize_func": lambda token: token.replace("_", "-"),  # --image_size, --image-size
    }
)
@click.version_option(package_name="tscnc_tf", prog_name="tscnc")
def main() -> None:
    """Robust pruning of neural networks: train, prune, evaluate and export them.

    MODEL is a .keras or .h5 file of Keras 3 or tf_keras, a stage of an experiment such as
    runs/first/3-finetune, a SavedModel, or a .tflite or .onnx file (see each command).

    DATA is the name of a dataset ("digits", "cifar10", ...), an .npz file, or a folder of images
    or of TFRecord or IDX files, see tscnc_tf.datasets.load.

    \b
    tscnc run smoke --output runs/smoke
    tscnc evaluate runs/smoke/3-finetune digits --epsilon 0.1
    """


def _command(**settings: Any) -> Callable[[Callable[..., Result]], click.Command]:
    """Make a command of a function that returns its result as JSON values and as text."""

    def decorate(function: Callable[..., Result]) -> click.Command:
        @functools.wraps(function)
        def invoke(as_json: bool, **options: Any) -> None:
            with _one_line_errors(), contextlib.redirect_stdout(sys.stderr), _redirected(1, 2):
                _package()
                values, text = function(**options)
                if as_json:
                    from tscnc_tf._reports import jsonable

                    text = json.dumps(jsonable(values), indent=2, ensure_ascii=False)
            click.echo(text)

        option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
        return main.command(**settings)(option(invoke))

    return decorate


class _Distance(click.ParamType):
    """A number, or a fraction such as 8/255, which reports show as it was written."""

    name = "number"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return a float, or the fraction as text; `attacks` checks it."""
        if isinstance(value, str) and "/" not in value:
            try:
                return float(value)
            except ValueError:
                self.fail(f"{value!r} is neither a number nor a fraction like 8/255.", param, ctx)
        return value


class _RunCommand(click.Command):
    """A command with a flag for every value of a recipe; the flags are made when it is called."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Return the context of a call; with --sweep, of the command `sweep` and its options."""
        words = [word for each in args for word in re.split(r"(?<=^--sweep)=", each)]
        if "--sweep" not in words:
            return super().make_context(info_name, args, parent, **extra)
        words.remove("--sweep")
        return sweep.make_context(f"{info_name} --sweep", words, parent, **extra)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the parameters of the function, then those of the recipe."""
        return [*super().get_params(ctx), *_recipe_flags()]


@functools.cache
def _recipe_flags() -> list[click.Option]:
    """Return `--section.name` for every value of a recipe; `--name` too, where that is unique."""
    Recipe = _package().experiments.Recipe  # noqa: N806
    described = _documented_arguments(Recipe)
    for section, kind in get_type_hints(Recipe).items():
        inner = _documented_arguments(kind)
        described |= {f"{section}.{name}": text for name, text in inner.items()}
    leaves = dict(Recipe.leaves())
    last = [name.rpartition(".")[2] for name in leaves]
    flags = []
    for (name, default), short in zip(leaves.items(), last, strict=True):
        is_unique = last.count(short) == 1 and name != short
        help_text = f"{described[name]}  [{json.dumps(default)}]"
        names = [name.replace(".", "__"), f"--{name}", *([f"--{short}"] if is_unique else [])]
        flags.append(click.Option(names, metavar="VALUE", help=help_text))
    return flags


def _documented_arguments(cls: type) -> dict[str, str]:
    """Return the descriptions of arguments in the docstrings of a class and its bases, by name."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
        for entry in re.split(r"\n(?=    \S)", text):
            names, _, description = " ".join(entry.split()).partition(": ")
            found |= dict.fromkeys(names.split(", "), description)
    return found


@_command(cls=_RunCommand, options_metavar="--output FOLDER [OPTIONS]")
@click.argument("recipe", default="recommended")
@click.option(
    "--output", required=True, type=FILE, help="Folder of a new experiment, or of one to resume."
)
@click.option("--dense", type=EXISTING, help="The 1-train of another experiment, to start from.")
@click.option("--baseline", is_flag=True, help="Without constraints and gates.")
def run(
    recipe: str,
    output: pathlib.Path,
    dense: pathlib.Path | None,
    baseline: bool,
    **values: str | None,
) -> Result:
    """Train, prune, fine-tune and evaluate a network by a RECIPE.

    RECIPE is "recommended" (the default, the simplest of the best in the study of this package),
    "paper" (the values of the method's authors, with constraints and gates), "cpu" (the
    recommended one, in minutes on two cores), "smoke" (seconds) or a YAML file. Every value of a
    recipe has a flag. In brackets is the value that a YAML file without `base` gets; "recommended",
    "paper", "cpu" and "smoke" set others. A run that was stopped continues when the same command is
    called again.

    `tscnc run --sweep FILE` is `tscnc sweep FILE`: it runs all experiments of a file, and has the
    options of that command.

    \b
    tscnc run --dataset cifar10 --architecture resnet-18 --sparsity 0.99 --output runs/first
    tscnc run mine.yaml --train.epochs 10 --prune.method magnitude --output runs/second
    """
    tscnc = _package()
    from tscnc_tf.experiments import folders

    folder = tscnc.experiments.run(
        _recipe(recipe, baseline, values), output, dense=dense, progress=True
    )
    *trained, last = folders.STAGE_FOLDERS.values()
    stages = {name: tscnc.experiments.open_stage(folder / name) for name in trained}
    evaluation = folder / last
    report = json.loads((evaluation / "report.json").read_text(encoding="utf-8"))
    text = (evaluation / "report.txt").read_text(encoding="utf-8").rstrip()
    chosen = {name: stage.chosen for name, stage in stages.items()}
    return {"folder": folder, "stages": chosen, "report": report}, "\n\n".join(
        [*map(str, stages.values()), text, f"Everything is in {folder}."]
    )


@_command(short_help="Run all experiments of a YAML file.")
@click.argument("plan", metavar="SWEEP", type=EXISTING)
@click.option("--output", required=True, type=FILE, help="Folder of the sweep.")
@click.option(
    "--engine",
    type=click.Choice(["process", "ray"]),
    default="process",
    show_default=True,
    help="Run the experiments one after the other in this process, or as tasks of Ray, on this "
    "machine or on a cluster.",
)
@click.option("--cpus", type=click.IntRange(1), default=1, show_default=True, help="Per task.")
@click.option("--gpus", type=click.FloatRange(0), default=0, show_default=True, help="Per task.")
def sweep(plan: pathlib.Path, output: pathlib.Path, engine: str, cpus: int, gpus: float) -> Result:
    """Run all experiments of SWEEP, a YAML file of recipes, seeds and values.

    A sweep that was stopped continues when the same command is called again.

    \b
    tscnc sweep sweep.yaml --output runs/sweep
    tscnc sweep sweep.yaml --output runs/sweep --engine ray --cpus 2
    """
    tscnc = _package()

    report = tscnc.experiments.sweep(
        tscnc.experiments.Sweep.from_yaml(plan), output, engine=engine, cpus=cpus, gpus=gpus
    )
    if report.failed:
        errors = "; ".join(f"{place}: {error}" for place, error in report.failed.items())
        raise ValueError(
            f"{len(report.failed)} runs have failed, {len(report.rows)} are complete. "
            f"Failed: {errors}"
        )
    return report.to_dict(), report


# The options of `evaluate` that only some attacks have, and these attacks.
_OWNERS = {
    "version": ("autoattack",),
    "steps": ("pgd",),
    "step_size": ("pgd",),
    "restarts": ("pgd",),
    "objective": ("pgd", "fgsm"),
}


@_command(short_help="Measure clean and robust accuracy.")
@click.argument("model", type=EXISTING)
@click.argument("data")
@click.option(
    "--attack",
    "attacks",
    multiple=True,
    type=click.Choice(["autoattack", "apgd", "pgd", "fgsm"]),
    default=["autoattack"],
    show_default=True,
    help="apgd: the first two attacks of AutoAttack, which are much faster: APGD of 100 steps on "
    "cross-entropy and on the targeted DLR loss. Repeat --attack for several attacks; the report "
    "also has their worst case.",
)
@click.option(
    "--epsilon", type=_Distance(), required=True, help="Radius of the ball, such as 8/255."
)
@click.option(
    "--norm",
    type=click.Choice(["linf", "l2", "l1"]),
    default="linf",
    show_default=True,
    help="l1: for autoattack and apgd only.",
)
@click.option(
    "--version",
    type=click.Choice(["standard", "plus", "rand"]),
    help="For autoattack; standard by default. rand: for a model whose outputs are random.",
)
@click.option("--steps", type=click.IntRange(1), help="For pgd; 50 by default.")
@click.option("--step-size", type=_Distance(), help="For pgd; 2.5 epsilon / steps by default.")
@click.option("--restarts", type=click.IntRange(1), help="For pgd; 5 by default.")
@click.option(
    "--objective",
    type=click.Choice(["cross_entropy", "margin", "dlr"]),
    help="For pgd and fgsm; cross-entropy by default.",
)
@click.option(
    "--source",
    type=EXISTING,
    help="A model like MODEL, with gradients: examples that fool it are given to MODEL.",
)
@click.option(
    "--state",
    type=FILE,
    help="A file for the progress; an evaluation that was stopped continues from it.",
)
@click.option(
    "--split", type=click.Choice(["train", "validation", "test"]), default="test", show_default=True
)
@click.option(
    "--examples",
    type=click.IntRange(1),
    help="Number of examples, with about the same fraction of each class; all by default.",
)
@click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--diagnose/--no-diagnose",
    default=None,
    help="Whether to run short attacks that look for misleading gradients; by default with "
    "autoattack only.",
)
@click.option("--output", type=FILE, help="A JSON file for the report.")
@click.option("--overwrite", is_flag=True, help="Replace what is at --output.")
def evaluate(
    model: pathlib.Path,
    data: str,
    attacks: tuple[str, ...],
    epsilon: float | str,
    norm: str,
    source: pathlib.Path | None,
    state: pathlib.Path | None,
    split: str,
    examples: int | None,
    batch_size: int,
    seed: int,
    diagnose: bool | None,
    output: pathlib.Path | None,
    overwrite: bool,
    **of_attacks: Any,
) -> Result:
    """Measure the accuracy of MODEL on DATA, clean and under attack, by AutoAttack.

    If MODEL is a stage of an experiment on DATA, the parts are those of the experiment.

    For a MODEL without gradients (.tflite, .onnx), AutoAttack runs only Square, which finds fewer
    adversarial examples. With --source the attacks run on another model, such as the one that was
    exported to the file, and MODEL is given what they find; with autoattack, Square runs on MODEL
    as well.

    \b
    tscnc evaluate model.keras cifar10 --epsilon 8/255 --state state.json
    tscnc evaluate model.keras cifar10 --epsilon 8/255 --attack apgd --examples 1000
    tscnc evaluate model.keras cifar10 --epsilon 0.5 --norm l2 --attack pgd --steps 50
    tscnc evaluate model.tflite cifar10 --epsilon 8/255 --source model.keras
    """
    tscnc = _package()

    made = _attacks(attacks, epsilon, norm, of_attacks)
    _require_free(output, overwrite)
    if source is not None:
        loaded = _load(source)
        made = [tscnc.attacks.Transfer(source=loaded, attack=attack) for attack in made]
        if "autoattack" in attacks:
            made.append(tscnc.attacks.Square(epsilon=epsilon, norm=norm))
    found = _dataset(data, model)
    if examples is not None:
        try:
            found = found.subset(**{f"n_{split}": examples})
        except ValueError as error:
            raise click.UsageError(f"--examples: {error}") from error
    report = tscnc.evaluate_robustness(
        _load(model),
        *found.arrays(split),
        made,
        batch_size=batch_size,
        seed=seed,
        diagnose=diagnose,
        state_path=state,
    )
    if output is not None:
        report.save(output)
    return report.to_dict(), report


@_command(name="inspect", short_help="Show zeros, condition numbers and sizes.")
@click.argument("model", type=EXISTING)
def inspect_model(model: pathlib.Path) -> Result:
    """Show the zeros, condition numbers, dead filters and sizes of MODEL.

    All of these are shown for a Keras model. For a SavedModel written by this package, the zeros
    and sizes in its manifest are shown. For a LiteRT file (.tflite), the zeros and sizes are shown,
    which 1x1 convolutions run sparsely, and why the others do not.

    \b
    tscnc inspect model.keras
    tscnc inspect runs/first/3-finetune --json
    """
    from tscnc_tf import export, inspection

    if model.suffix == ".tflite":
        reports = {
            "sizes": inspection.sizes(model),
            "sparse_inference": export.sparse_inference(model),
        }
    else:
        loaded = _load(model)
        if isinstance(loaded, export.ServedModel):
            return loaded.report.to_dict(), loaded.report
        reports = {
            "sparsity": inspection.sparsity(loaded),
            "condition_numbers": inspection.condition_numbers(loaded),
            "sizes": inspection.sizes(loaded),
        }
    return (
        {name: report.to_dict() for name, report in reports.items()},
        "\n\n".join(map(str, reports.values())),
    )


@_command()
@click.argument("model", type=EXISTING)
@click.option(
    "--sparsity",
    required=True,
    type=click.FloatRange(0, 1, max_open=True),
    help="Fraction of zeros.",
)
@click.option("--output", required=True, type=FILE, help="A .keras or .h5 file.")
@click.option("--layers", multiple=True, help="Pattern of layers' names; may be repeated.")
@click.option(
    "--scope",
    type=click.Choice(["layer", "global", "erk", "igq", "lamp"]),
    default="layer",
    show_default=True,
    help="layer: each layer has this sparsity; global: all layers together; erk, igq, lamp: see "
    "tscnc_tf.pruning.Pruner.",
)
@click.option("--filters", is_flag=True, help="Prune whole filters, which `compact` removes.")
@click.option("--overwrite", is_flag=True, help="Replace what is at --output.")
def prune(
    model: pathlib.Path,
    sparsity: float,
    output: pathlib.Path,
    layers: tuple[str, ...],
    scope: str,
    filters: bool,
    overwrite: bool,
) -> Result:
    """Set the smallest weights of MODEL to zero, without training.

    \b
    tscnc prune model.keras --sparsity 0.9 --output pruned.keras
    tscnc prune model.keras --sparsity 0.5 --filters --layers "conv*" --output pruned.keras
    """
    tscnc = _package()

    _require_keras_file(output)
    _require_free(output, overwrite)
    structure = tscnc.pruning.Filters() if filters else tscnc.pruning.Unstructured()
    pruned = tscnc.prune_now(
        _load(model), sparsity, layers=list(layers) or None, scope=scope, structure=structure
    )
    report = tscnc.inspection.sparsity(pruned)
    _save(tscnc.strip(pruned), output)
    return {**report.to_dict(), "path": output}, report


@_command()
@click.argument("model", type=EXISTING)
@click.option("--output", required=True, type=FILE, help="A .keras or .h5 file.")
@click.option("--overwrite", is_flag=True, help="Replace what is at --output.")
def compact(model: pathlib.Path, output: pathlib.Path, overwrite: bool) -> Result:
    """Remove the dead filters of MODEL; its outputs stay the same.

    \b
    tscnc compact pruned.keras --output small.keras
    """
    from tscnc_tf import pruning

    _require_keras_file(output)
    _require_free(output, overwrite)
    report = pruning.compact(_load(model))
    _save(report.model, output)
    return {**report.to_dict(), "path": output}, report


@_command(short_help="Write a SavedModel, LiteRT or ONNX file.")
@click.argument("model", type=EXISTING)
@click.option(
    "--format", "kind", required=True, type=click.Choice(["saved_model", "litert", "onnx"])
)
@click.option("--output", required=True, type=FILE, help="A folder (saved-model) or a file.")
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16", "int8"]),
    default="float32",
    show_default=True,
    help="For litert.",
)
@click.option("--calibration", metavar="DATA", help="Dataset whose training images calibrate int8.")
@click.option(
    "--probe",
    metavar="DATA",
    help="Dataset of whose training images 8, or one per class, are used to check the export; "
    "those of --calibration or random inputs by default.",
)
@click.option("--sparse", is_flag=True, help="Store kernels in sparse form, for litert.")
@click.option("--overwrite", is_flag=True, help="Replace an export at --output.")
def export(
    model: pathlib.Path,
    kind: str,
    output: pathlib.Path,
    precision: str,
    calibration: str | None,
    probe: str | None,
    sparse: bool,
    overwrite: bool,
) -> Result:
    """Write MODEL as a SavedModel, a LiteRT or an ONNX file, and check it against MODEL.

    \b
    tscnc export model.keras --format saved-model --output served
    tscnc export model.keras --format onnx --output model.onnx
    tscnc export m.keras --format litert --precision int8 --calibration cifar10 --output m.tflite
    tscnc export model.keras --format litert --sparse --output model.tflite
    """
    tscnc = _package()

    if kind != "litert" and (precision != "float32" or calibration or sparse):
        raise click.UsageError(
            "--precision, --calibration and --sparse are for --format litert only."
        )
    if (precision == "int8") != (calibration is not None):
        raise click.UsageError("--precision int8 and --calibration need each other.")
    _require_free(output, overwrite)
    loaded = _load(model)
    checked: Any = {
        "probe": None if probe is None else _some_images(probe, model, 8),
        "overwrite": overwrite,
    }
    if kind == "litert":
        inputs = None if calibration is None else _some_images(calibration, model, 512)
        report: Any = tscnc.export_litert(
            loaded, output, precision=precision, calibration=inputs, sparse=sparse, **checked
        )
    elif kind == "onnx":
        report = tscnc.export_onnx(loaded, output, **checked)
    else:
        report = tscnc.export_saved_model(loaded, output, **checked)
    return report.to_dict(), report


def _attacks(
    names: tuple[str, ...], epsilon: float | str, norm: str, options: Mapping[str, Any]
) -> list[Any]:
    """Return the attacks of these names, with their options; an option of None was not given.

    Raises:
        click.UsageError: an option belongs to another attack, or a value is out of range.
    """
    chosen: dict[str, dict[str, Any]] = {name: {} for name in ("autoattack", "apgd", "fgsm")}
    chosen["pgd"] = {"steps": 50, "restarts": 5}
    for option, value in options.items():
        if value is None:
            continue
        owners = _OWNERS[option]
        if not set(owners) & set(names):
            wanted = " or ".join(f"--attack {owner}" for owner in owners)
            raise click.UsageError(
                f"--{option.replace('_', '-')} is for {wanted}, got --attack {', '.join(names)}."
            )
        for owner in owners:
            chosen[owner][option] = value

    attacks = _package().attacks
    kinds = {"autoattack": attacks.AutoAttack, "pgd": attacks.PGD, "fgsm": attacks.FGSM}
    made: list[Any] = []
    try:
        for name in names:
            kind = kinds.get(name, attacks.AutoAttack)
            attack = kind(epsilon=epsilon, norm=norm, **chosen[name])
            made += attack.attacks[:2] if name == "apgd" else [attack]
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    return made


def _recipe(name: str, baseline: bool, values: Mapping[str, str | None]) -> Any:
    """Return a recipe with the values of the flags, as YAML."""
    experiments = _package().experiments
    recipe = experiments.Recipe.from_yaml(name)

    def value(flag: str, text: str) -> Any:
        if text.startswith("*"):  # a pattern such as *conv*, which would be an alias in YAML
            return text
        parsed = experiments.parse(text, f"--{flag}")
        is_text = flag in ("name", "data.dataset", "data.folder")  # also a name such as 2024
        return text if is_text and isinstance(parsed, int | float) else parsed

    given = {flag.replace("__", "."): text for flag, text in values.items() if text is not None}
    try:
        recipe = recipe.override({flag: value(flag, text) for flag, text in given.items()})
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    return recipe.baseline() if baseline else recipe


def _load(path: pathlib.Path) -> Any:
    """Load a model of any kind."""
    tscnc = _package()
    from tscnc_tf.experiments import folders

    if path.suffix == ".tflite":
        return tscnc.load_litert(path)
    if path.suffix == ".onnx":
        return tscnc.load_onnx(path)
    if _is_stage(path) or (path / folders.RECIPE).is_file():
        return tscnc.experiments.open_stage(path).model
    if path.is_dir():
        return tscnc.load_saved_model(path)
    from tscnc_tf._keras import files

    return files.load_model(path)


def _save(model: Any, path: pathlib.Path) -> None:
    """Write a Keras model atomically."""
    from tscnc_tf.experiments import folders

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are saving your model as an HDF5 file")
        folders.write_model(path, model)


def _require_keras_file(output: pathlib.Path) -> None:
    if output.suffix not in KERAS_FILES:
        raise click.BadParameter(f"{output} must end in {' or '.join(KERAS_FILES)}.")


def _require_free(output: pathlib.Path | None, overwrite: bool) -> None:
    if output is not None and os.path.lexists(output) and not overwrite:
        raise click.ClickException(
            f"{output} exists already: pass --overwrite, or choose another --output."
        )


def _is_stage(model: pathlib.Path) -> bool:
    from tscnc_tf.experiments import folders

    return (model / folders.MANIFEST).is_file()


def _dataset(data: str, model: pathlib.Path) -> Any:
    """Return a dataset; for a stage of an experiment on it, with the parts of the experiment.

    Other parts would hold images that the stage was trained on. The same holds for a file in the
    folder of a stage. The same data at another path are known by their fingerprint.
    """
    tscnc = _package()
    from tscnc_tf.experiments import stages

    if stage := next(filter(_is_stage, (model, model.parent)), None):
        manifest = tscnc.experiments.open_stage(stage).manifest
        recipe = tscnc.experiments.Recipe.from_dict(manifest["recipe"])
        given, theirs = pathlib.Path(data), pathlib.Path(recipe.data.dataset)
        if given == theirs or (given.exists() and theirs.exists() and given.samefile(theirs)):
            return stages.dataset(recipe)
        with contextlib.suppress(ValueError, OSError):  # other data may not have such parts
            found = stages.dataset(recipe.override({"data.dataset": data}))
            if found.fingerprint == manifest["data"]["fingerprint"]:
                return found
    return tscnc.datasets.load(data)


def _some_images(data: str, model: pathlib.Path, count: int) -> Any:
    """Return about `count` training images, of every class and with about the same fraction."""
    found = _dataset(data, model)
    count = max(found.classes, min(count, len(found.y_train)))
    return found.subset(count).arrays("train")[0]


@functools.cache
def _package() -> types.ModuleType:
    """Import tscnc_tf without the messages that TensorFlow writes on being imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with pathlib.Path(os.devnull).open("w") as nowhere, _redirected(2, nowhere.fileno()):
        return importlib.import_module("tscnc_tf")


@contextlib.contextmanager
def _redirected(stream: int, goal: int) -> Iterator[None]:
    """Redirect a stream (1: stdout, 2: stderr) to a file descriptor, for Python and C++ code."""
    python = sys.stdout if stream == 1 else sys.stderr
    python.flush()
    kept = os.dup(stream)
    os.dup2(goal, stream)
    try:
        yield
    finally:
        python.flush()
        os.dup2(kept, stream)
        os.close(kept)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn an error into one line on stderr and exit code 1."""
    try:
        yield
    except click.ClickException:
        raise
    except Exception as error:
        words = " ".join(str(error).split()) or "no message"
        raise click.ClickException(f"{type(error).__name__}: {words}") from error
