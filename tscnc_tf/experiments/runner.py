"""Running an experiment from its recipe to its evaluation, resumably."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tscnc_tf import _checks, _files, _reports, datasets, inspection
from tscnc_tf.evaluation import evaluate_robustness
from tscnc_tf.experiments import fitting, folders, locks, stages
from tscnc_tf.experiments.parts import STAGES
from tscnc_tf.experiments.recipe import Recipe, errors_begin
from tscnc_tf.export import export_saved_model, preflight

_ENOUGH = 200  # validation images from which a network is compared with guessing


def run(
    recipe: Recipe,
    folder: str | pathlib.Path,
    *,
    dense: str | pathlib.Path | None = None,
    until: str = "evaluate",
    progress: bool = True,
) -> pathlib.Path:
    """Run an experiment: adversarial training, pruning, fine-tuning, evaluation and export.

    1. **train**: adversarial training of the dense network under the constraints.
    2. **prune**: by importance scores, or by magnitude along a schedule.
    3. **finetune**: training of the weights that are left, with fixed masks.
    4. **evaluate**: clean and robust accuracy on the test set, figures of the kernels, and a
       SavedModel.

    Each stage starts from the best epoch of the one before, chosen by the accuracy under PGD on the
    **validation** set; the test set is used once, at the end. A killed run continues when it is
    called again with the same recipe and folder; on a CPU it ends with the same weights, bit for
    bit, as an uninterrupted one. `open_stage` describes what each stage writes.

    Only one process at a time can run in a folder. Files of complete stages are checked against
    their recorded digests.

    Args:
        recipe: the settings.
        folder: a new folder, or that of the same experiment.
        dense: the folder of a complete first stage of another experiment, to be copied instead of
            trained, so that one dense network can be pruned in several ways. The recipes must be
            equal in everything that the first stage depends on.
        until: the last stage to run; a later call continues from there.
        progress: whether to show a progress bar on stderr, if that is a terminal.

    Returns:
        The folder.

    Raises:
        TypeError: `recipe` is not a recipe, or a path is not a path.
        ValueError: `folder` holds an experiment with another recipe or other data; `dense` has
            another recipe; a stage up to `until` can't be built, which is checked before anything
            is trained or written; or a file in `folder` is damaged: the message names it and what
            to do.
        RuntimeError: another process runs an experiment in `folder`; the message names it.
        OSError: the disk is full, or can't be written to; the message names the file.
        FileExistsError: `folder` holds something else.
        NotADirectoryError: `folder` is a file, or lies below one.
        FileNotFoundError: `dense` is not a complete stage; or see `datasets.load`.
        ImportError: the extra "experiments" is not installed; or see `datasets.load`.

    Example:
        >>> import tscnc_tf as tscnc
        >>> recipe = tscnc.experiments.Recipe.from_yaml("recipe.yaml")  # doctest: +SKIP
        >>> tscnc.experiments.run(recipe, "outputs/first")  # doctest: +SKIP
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe, got {recipe!r} of type {type(recipe).__name__}.")
    folder = _files.absolute("folder", folder)
    _checks.one_of("until", until, (*STAGES, "evaluate"))
    progress = _checks.boolean("progress", progress)
    new = folders.is_new(folder, recipe)
    source = None if dense is None else folders.open_dense(_files.absolute("dense", dense), recipe)
    data = stages.dataset(recipe)
    if new:
        stages.dry_run(recipe, data, _up_to(until))
    with locks.exclusive(folder):
        folders.claim(folder, recipe, data)
        if source is not None:
            folders.copy_dense(source, folder)
        _run(recipe, data, folder, until, progress)
    return folder


def _run(
    recipe: Recipe, data: datasets.Dataset, folder: pathlib.Path, until: str, progress: bool
) -> None:
    """Run the incomplete stages up to `until`; check the files of complete ones."""
    outputs: list[folders.StageOutput] = []
    wanted = _up_to(until)
    with _bar(recipe, wanted, data, progress) as show:
        for stage in wanted:
            goal = folders.stage_folder(folder, stage)
            if not folders.is_complete(goal):
                with errors_begin(f"{stage}: "):
                    _train(recipe, stage, data, goal, functools.partial(show, stage), outputs)
            folders.require_same_recipe(goal, recipe)  # first, as its files are another's, too
            folders.require_whole(goal)
            folders.tidy(goal)
            outputs.append(folders.open_stage(goal))
            folders.require_same_data(goal, outputs[-1].manifest["data"], data)
            if stage == "train":
                _warn_of_guessing(outputs[-1], data.y_validation)
            show(stage, stages.steps(recipe, stage, data))
    if until != "evaluate":
        return
    goal = folders.stage_folder(folder, "evaluate")
    if not folders.is_complete(goal):
        model = outputs[-1].model
        stages.freeze(recipe, model, outputs[-1].masks)  # reports say what is pruned
        with errors_begin("evaluate: "):
            _evaluate(recipe, data, model, goal, progress)
    folders.require_same_recipe(goal, recipe)
    folders.require_whole(goal)
    folders.tidy(goal)
    (goal / folders.EVALUATION_STATE).unlink(missing_ok=True)


def _up_to(until: str) -> Sequence[str]:
    """Return the training stages up to the last stage to run."""
    return STAGES[: STAGES.index(until) + 1] if until in STAGES else STAGES


def _warn_of_guessing(output: folders.StageOutput, labels: np.ndarray) -> None:
    """Warn if a stage's network is no better than guessing, given enough validation images."""
    share = np.bincount(labels).max() / len(labels)
    best = max((row["validation_accuracy"] for row in output.metrics), default=1.0)
    deviation = (share * (1 - share) / len(labels)) ** 0.5
    if len(labels) >= _ENOUGH and best < share + 2 * deviation:
        warnings.warn(
            f"the network in {output.folder} is no better than guessing: it is right on "
            f"{best:.1%} of the validation images at most, and the most frequent class has "
            f"{share:.1%}. Lower train.learning_rate, or train for longer.",
            stacklevel=2,
        )


def _train(
    recipe: Recipe,
    stage: str,
    data: datasets.Dataset,
    folder: pathlib.Path,
    on_batch: Callable[[int], None],
    outputs: Sequence[folders.StageOutput],
) -> None:
    """Run a training stage, given the outputs of earlier stages."""
    folder.mkdir(parents=True, exist_ok=True)
    previous = outputs[-1].model if outputs else None
    teacher = outputs[0].model if outputs else None
    kept = outputs[-1].masks if outputs else None
    trainer = stages.trainer(recipe, stage, data, previous=previous, teacher=teacher, kept=kept)
    fitting.fit(recipe, stage, data, trainer, folder, on_batch)
    model = trainer.model
    with fitting.averaged(model, trainer.optimizer):
        folders.write_model(folder / folders.LAST, stages.plain(recipe, data, model))
    model, kept, epoch = fitting.best(model, folder)
    folders.write_model(folder / folders.MODEL, stages.plain(recipe, data, model))
    if kept:
        folders.write_arrays(folder / folders.MASKS, kept)
    _complete(recipe, stage, data, folder, chosen_epoch=epoch)


def _evaluate(
    recipe: Recipe, data: datasets.Dataset, model: Any, folder: pathlib.Path, progress: bool
) -> None:
    preflight.require_finite(model)  # before hours of attacks, which need not notice it
    folders.tidy(folder)
    folder.mkdir(parents=True, exist_ok=True)
    x, y = data.arrays("test")
    report = evaluate_robustness(
        model,
        x,
        y,
        attacks=stages.test_attacks(recipe),
        batch_size=recipe.evaluate.batch_size,
        seed=recipe.seed,
        state_path=folder / folders.EVALUATION_STATE,
        progress=progress,
    )
    _files.write_text(folder / "report.txt", f"{report}\n")
    reports = {
        "report": report,
        "kernels": inspection.condition_numbers(model),
        "sparsity": inspection.sparsity(model),
        "lipschitz": inspection.local_lipschitz(model, x, stages.epsilon(recipe), seed=recipe.seed),
    }
    for name, each in reports.items():
        folders.write_json(folder / f"{name}.json", each.to_dict())
    export_saved_model(model, folder / "saved_model", probe=x[:8], overwrite=True)
    _complete(recipe, "evaluate", data, folder)


def _complete(
    recipe: Recipe, stage: str, data: datasets.Dataset, folder: pathlib.Path, **facts: Any
) -> None:
    """Write the manifest, which marks a stage as complete.

    Raises:
        FileNotFoundError: the folder of the experiment has been removed.
    """
    folders.require_there(folder)
    content = {
        "stage": stage,
        **facts,
        "recipe": recipe.to_dict(),
        "data": data.metadata,
        "versions": _reports.versions(),
    }
    folders.write_manifest(folder, content)


@contextlib.contextmanager
def _bar(
    recipe: Recipe, wanted: Sequence[str], data: datasets.Dataset, show: bool
) -> Iterator[Callable[[str, int], None]]:
    """Show a progress bar; yield a function that takes a stage and the number of its steps done."""
    console = Console(stderr=True)
    steps = {stage: stages.steps(recipe, stage, data) for stage in wanted}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    disable = not (show and console.is_terminal)
    with Progress(*columns, console=console, disable=disable) as progress:
        task = progress.add_task("", total=sum(steps.values()))

        def update(stage: str, done: int) -> None:
            before = sum(steps[earlier] for earlier in STAGES[: STAGES.index(stage)])
            progress.update(task, description=stage, completed=before + done)

        yield update
