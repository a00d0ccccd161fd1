"""A small experiment in its own process, and the check of its results."""

from __future__ import annotations

import json
import multiprocessing
import pathlib
import shutil
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.faults.outcome import Outcome
from tscnc_tf import experiments
from tscnc_tf.experiments import folders

STAGES = ("1-train", "2-prune", "3-finetune")  # of training
ALL_STAGES = tuple(folders.STAGE_FOLDERS.values())
RECIPE = {
    "name": "small",
    "sparsity": 0.9,
    "data": {"dataset": "digits", "train_examples": 512, "test_examples": 64},
    "network": {"architecture": "small-cnn", "options": {"width": 8}},
    "adversary": {"epsilon": 0.1, "step_size": 0.05, "steps": 2},
    "constraints": {"sparsity_factor": 1e-5, "condition_factor": 0.1},
    "train": {"epochs": 6, "batch_size": 32, "average": 0.9},
    "prune": {"epochs": 6, "batch_size": 32, "method": "magnitude"},
    "finetune": {"epochs": 6, "batch_size": 32, "weight_decay_kind": "l2"},
    "evaluate": {"attack": "apgd", "validation_steps": 2, "batch_size": 32},
}
_WAIT = 300.0  # timeout in seconds
SHORT = {"train.epochs": 2, "prune.epochs": 2, "finetune.epochs": 2, "data.train_examples": 128}


def recipe(short: bool) -> experiments.Recipe:
    """Return the recipe of the small experiment; with `short`, a shorter one."""
    return experiments.Recipe.from_dict(RECIPE).override(SHORT if short else {})


def copy_before(stage: str, whole: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Copy an experiment without the folder of a stage and those of later ones."""
    shutil.copytree(whole, folder)
    for later in ALL_STAGES[ALL_STAGES.index(stage) :]:
        shutil.rmtree(folder / later)
    return folder


def process(
    settings: experiments.Recipe,
    folder: pathlib.Path,
    before: Callable[[], None] | None = None,
    until: str = "evaluate",
) -> Any:
    """Start a process that runs an experiment, and writes an error to `folder.error`.

    Args:
        settings: the recipe.
        folder: the folder of the experiment.
        before: a function of a module that the process calls before the experiment.
        until: the last stage to run.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tscnc_tf", "scipy.linalg"])
    started = context.Process(target=_run, args=(settings.to_dict(), folder, before, until))
    started.start()
    return started


def wait_for(condition: Callable[[], bool], started: Any) -> None:
    """Wait until a condition is true, or a process has ended.

    Raises:
        TimeoutError: neither has happened in five minutes.
    """
    deadline = time.monotonic() + _WAIT
    while not condition() and started.is_alive():
        if time.monotonic() > deadline:
            raise TimeoutError("a process has not begun to work")
        time.sleep(0.01)


def error_of(folder: pathlib.Path) -> str:
    """Return the error of the last process in a folder, its type first; empty for none."""
    file = _error_file(folder)
    return file.read_text() if file.exists() else ""


def differences(folder: pathlib.Path, whole: pathlib.Path) -> str:
    """Return in what the results of two experiments differ; empty for nothing."""
    for stage in STAGES:
        mine, theirs = (experiments.open_stage(each / stage) for each in (folder, whole))
        if mine.metrics != theirs.metrics:
            return f"metrics of {stage}"
        for name in ("model", "last"):
            models = (getattr(each, name).get_weights() for each in (mine, theirs))
            if not all(np.array_equal(*pair) for pair in zip(*models, strict=True)):
                return f"weights of {name}.keras of {stage}"
    figures = [
        json.loads((each / "4-evaluate" / "report.json").read_text())["robust"]
        for each in (folder, whole)
    ]
    if figures[0] != figures[1]:
        return "robust accuracy"
    left = [
        str(path.relative_to(folder))
        for pattern in ("state-*", ".*.????????")
        for path in folder.glob(f"*/{pattern}")
    ]
    return f"left over: {', '.join(left)}" if left else ""


def finish(
    outcome: Outcome,
    folder: pathlib.Path,
    whole: pathlib.Path,
    before: Callable[[], None] | None = None,
) -> None:
    """Run an experiment to its end, and count whether its results are those of `whole`."""
    if problem := problem_of_end(recipe(True), folder, whole, before):
        outcome.lose(problem)
    else:
        outcome.count("same end, bit for bit")


def problem_of_end(
    planned: experiments.Recipe,
    folder: pathlib.Path,
    whole: pathlib.Path,
    before: Callable[[], None] | None = None,
) -> str:
    """Run an experiment to its end; return its error or how it differs from `whole`, or ""."""
    ended = process(planned, folder, before)
    ended.join()
    try:
        return error_of(folder)[:300] if ended.exitcode else differences(folder, whole)
    except (OSError, ValueError) as error:
        return str(error)


def _error_file(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(f"{folder.name}.error")


def _run(settings: dict[str, Any], folder: pathlib.Path, before: Any, until: str) -> None:
    # Opened first, as `before` may make writing impossible.
    with _error_file(folder).open("w") as stream:
        try:
            if before is not None:
                before()
            chosen = experiments.Recipe.from_dict(settings)
            experiments.run(chosen, folder, until=until, progress=False)
        except Exception as raised:
            stream.write(f"{type(raised).__name__}: {raised}\n{traceback.format_exc()}")
            raise SystemExit(1) from None
