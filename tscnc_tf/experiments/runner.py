"""An experiment from its recipe to its last figure; it can be stopped at any moment."""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tscnc_tf import _checks, _files, datasets, inspection
from tscnc_tf._reports import versions
from tscnc_tf.evaluation import evaluate_robustness
from tscnc_tf.experiments import fitting, folders, locks, stages
from tscnc_tf.experiments.parts import STAGES
from tscnc_tf.experiments.recipe import Recipe
from tscnc_tf.export import export_saved_model


def run(
    recipe: Recipe,
    folder: str | pathlib.Path,
    *,
    dense: str | pathlib.Path | None = None,
    progress: bool = True,
) -> pathlib.Path:
    """Run an experiment: adversarial training, pruning, fine-tuning, evaluation and export.

    1. **train**: adversarial training of the dense network under the constraints.
    2. **prune**: by importance scores, or by magnitude along a schedule.
    3. **finetune**: what is left is trained on, the masks fixed.
    4. **evaluate**: clean and robust accuracy on the test set, the kernels, and a SavedModel.

    Each stage begins with the best epoch of the one before, chosen by the accuracy under PGD on the
    **validation** set; the test set is looked at once, in the end. A run that was killed, at
    whatever moment, goes on where it was when it is called again with the same recipe and folder;
    on a CPU it ends with the same weights, bit for bit, as one that was never killed. What each
    stage writes is said in `open_stage`.

    A folder is for one run at a time: a second one is refused while the first is alive. A file that
    is needed, or was left by a complete stage, and is not what was written, is named.

    Args:
        recipe: what to do.
        folder: where; new, or that of the same experiment.
        dense: the folder of a complete first stage to begin with, that of another experiment whose
            recipe is the same in all that the first stage depends on; it is copied. So one dense
            network can be pruned in several ways.
        progress: whether to show a bar with the time that is left on stderr, if that is a terminal.

    Returns:
        The folder.

    Raises:
        TypeError: `recipe` is none.
        ValueError: `folder` holds an experiment by another recipe, or on other data; `dense` is of
            another recipe; or a stage of the recipe can't be built, which is found out before
            anything is trained or written; or a file in `folder` is damaged, and the error says
            which one and what to do.
        RuntimeError: another process runs an experiment in `folder`; the error says which one.
        OSError: the disk is full, or can't be written to; the error names the file.
        FileExistsError: `folder` holds something else.
        NotADirectoryError: `folder` is, or lies below, a file.
        FileNotFoundError: `dense` is no complete stage; or see `datasets.load`.
        ImportError: the extra "experiments" is not installed; or see `datasets.load`.

    Example:
        >>> import tscnc_tf as tscnc
        >>> recipe = tscnc.experiments.Recipe.from_yaml("recipe.yaml")  # doctest: +SKIP
        >>> tscnc.experiments.run(recipe, "outputs/first")  # doctest: +SKIP
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe, got {recipe!r} of type {type(recipe).__name__}.")
    folder = pathlib.Path(folder).expanduser().absolute()
    progress = _checks.boolean("progress", progress)
    new = folders.is_new(folder, recipe)
    source = None if dense is None else folders.open_dense(pathlib.Path(dense), recipe)
    data = stages.dataset(recipe)
    if new:
        stages.rehearse(recipe, data)
    with locks.exclusive(folder):
        folders.claim(folder, recipe, data)
        if source is not None:
            folders.adopt(folder, source)
        _run(recipe, data, folder, progress)
    return folder


def steps_of(recipe: Recipe, stage: str, data: datasets.Dataset) -> int:
    """Return the number of optimizer steps of a stage."""
    part = getattr(recipe, stage)
    return part.epochs * data.steps_per_epoch(part.batch_size)


def _run(recipe: Recipe, data: datasets.Dataset, folder: pathlib.Path, progress: bool) -> None:
    """Run the stages that are not complete; make sure that the others are as they were left."""
    previous, teacher = None, None
    with _bar(recipe, data, progress) as show:
        for stage in STAGES:
            goal = folders.stage_folder(folder, stage)
            if not folders.is_complete(goal):
                _train(recipe, stage, data, goal, show, previous, teacher)
            folders.require_whole(goal)
            output = folders.open_stage(goal)
            folders.require_same_data(output.folder, output.manifest["data"], data)
            show(stage, steps_of(recipe, stage, data))
            previous = output.model
            teacher = teacher or previous
    goal = folders.stage_folder(folder, "evaluate")
    if not folders.is_complete(goal):
        _evaluate(recipe, data, previous, goal, progress)
    folders.require_whole(goal)


def _train(
    recipe: Recipe,
    stage: str,
    data: datasets.Dataset,
    folder: pathlib.Path,
    show: Callable[[str, int], None],
    previous: Any,
    teacher: Any,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    trainer = stages.trainer(recipe, stage, data, previous=previous, teacher=teacher)
    fitting.fit(recipe, stage, data, trainer, folder, functools.partial(show, stage))
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
    folders.tidy(folder)
    x, y = data.arrays("test")
    report = evaluate_robustness(
        model,
        x,
        y,
        attacks=stages.judges(recipe),
        batch_size=recipe.evaluate.batch_size,
        seed=recipe.seed,
        progress=progress,
    )
    folders.write_json(folder / "report.json", report.to_dict())
    _files.write_text(folder / "report.txt", f"{report}\n")
    epsilon = stages.epsilon(recipe)
    lipschitz = inspection.local_lipschitz(model, x, epsilon, seed=recipe.seed)
    folders.write_json(folder / "kernels.json", inspection.condition_numbers(model).to_dict())
    folders.write_json(folder / "sparsity.json", inspection.sparsity(model).to_dict())
    folders.write_json(folder / "lipschitz.json", lipschitz.to_dict())
    export_saved_model(model, folder / "saved_model", probe=x[:8], overwrite=True)
    _complete(recipe, "evaluate", data, folder)


def _complete(
    recipe: Recipe, stage: str, data: datasets.Dataset, folder: pathlib.Path, **facts: Any
) -> None:
    """Write the manifest, which says that all else is there, and drop what was needed for that."""
    content = {
        "stage": stage,
        **facts,
        "recipe": recipe.to_dict(),
        "data": data.metadata,
        "versions": versions(),
    }
    folders.write_manifest(folder, content)
    folders.tidy(folder)


@contextlib.contextmanager
def _bar(
    recipe: Recipe, data: datasets.Dataset, show: bool
) -> Iterator[Callable[[str, int], None]]:
    """Yield a function to be told the stage, and how many of its steps are done."""
    console = Console(stderr=True)
    steps = {stage: steps_of(recipe, stage, data) for stage in STAGES}
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
