"""The folders that an experiment writes; a manifest in one says that it is complete.

    EXPERIMENT/
        recipe.json
        data.json           name, fingerprint, numbers of images
        1-train/ 2-prune/ 3-finetune/
            model.keras     the best epoch's network: plain, pruned weights being zero
            last.keras      the last epoch's
            best.npz        the best epoch's weights and masks as they were trained, gates and all
            masks.npz       by weight, which entries are kept (not for the dense network)
            metrics.jsonl   a line for each epoch
            manifest.json   recipe, data, versions, the epoch chosen
        4-evaluate/
            report.json     accuracy, clean and under attack, on the test set; report.txt, to read
            kernels.json    condition numbers, stable ranks, dead filters
            sparsity.json   zeros by weight
            lipschitz.json  the empirical local Lipschitz constant
            saved_model/    to serve
            manifest.json

While a stage runs, `state-EPOCH/` in its folder holds what it needs to go on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tscnc_tf import _files, _keras
from tscnc_tf.datasets import Dataset
from tscnc_tf.experiments.recipe import Recipe, differences
from tscnc_tf.inspection.records import jsonable

STEPS = ("train", "prune", "finetune", "evaluate")
MANIFEST = "manifest.json"
RECIPE, DATA = "recipe.json", "data.json"


def stage_folder(folder: pathlib.Path, stage: str) -> pathlib.Path:
    """Return the folder of a stage of an experiment."""
    return folder / f"{1 + STEPS.index(stage)}-{stage}"


def is_new(folder: pathlib.Path, recipe: Recipe) -> bool:
    """Tell whether an experiment is yet to begin in a folder.

    Raises:
        ValueError: the folder holds an experiment by another recipe, whose differences are said.
        FileExistsError: the folder holds something else.
        NotADirectoryError: it is, or lies below, a file.
    """
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise NotADirectoryError(f"folder must be a folder, got {folder}: {place} is a file.")
    file = folder / RECIPE
    if file.is_file():
        theirs = json.loads(file.read_text(encoding="utf-8"))
        if changed := differences(theirs, jsonable(recipe.to_dict())):
            raise ValueError(
                f"folder {folder} holds an experiment by another recipe: {'; '.join(changed)}. "
                "Choose another folder, or the recipe that it began with."
            )
    elif folder.exists() and set(folder.iterdir()) - set(_drafts(folder)):
        raise FileExistsError(
            f"folder {folder} holds something else than an experiment: choose another one."
        )
    return not file.is_file()


def claim(folder: pathlib.Path, recipe: Recipe, data: Dataset) -> None:
    """Note recipe and data in the folder, or make sure that they are those that it has.

    Raises:
        ValueError: the folder holds an experiment on other data.
        ValueError, FileExistsError, NotADirectoryError: see `is_new`.
    """
    if is_new(folder, recipe):
        write_json(folder / RECIPE, recipe.to_dict())
    tidy(folder)
    if (folder / DATA).is_file():
        known = json.loads((folder / DATA).read_text(encoding="utf-8"))
        require_same_data(folder, known, data)
    else:
        write_json(folder / DATA, data.metadata)


def require_same_data(folder: pathlib.Path, known: Mapping[str, Any], data: Dataset) -> None:
    """Raise a ValueError unless data are those that are known of a folder."""
    if known["fingerprint"] != data.fingerprint:
        raise ValueError(
            f"the data are not those that {folder} was made with: their fingerprint is "
            f"{data.fingerprint[:12]}, not {known['fingerprint'][:12]}. Bring the same files, or "
            "choose another folder."
        )


def open_dense(dense: pathlib.Path, recipe: Recipe) -> StageOutput:
    """Return the first stage of another experiment, which is to be that of this one.

    Raises:
        FileNotFoundError: there is no complete stage in `dense`.
        ValueError: it is another stage, or by a recipe whose first stage is another one.
    """
    output = open_stage(dense)
    if (stage := output.manifest["stage"]) != "train":
        raise ValueError(f"dense must be a stage of training, got {dense}: {stage}.")
    theirs = Recipe.from_dict(output.manifest["recipe"]).first_stage()
    if changed := differences(jsonable(theirs), jsonable(recipe.first_stage())):
        raise ValueError(
            f"dense={str(dense)!r} was trained by another recipe: {'; '.join(changed)}."
        )
    return output


def adopt(folder: pathlib.Path, dense: StageOutput) -> None:
    """Copy the first stage of another experiment into the folder, unless it has one."""
    goal = stage_folder(folder, "train")
    if not is_complete(goal):
        shutil.rmtree(goal, ignore_errors=True)
        with _files.new_directory("folder", goal) as draft:
            shutil.copytree(dense.folder, draft, dirs_exist_ok=True)


def is_complete(folder: pathlib.Path) -> bool:
    """Tell whether a stage has ended and left all its files."""
    return (folder / MANIFEST).is_file()


def write_json(path: pathlib.Path, content: Any) -> None:
    """Write a JSON file in one piece."""
    text = json.dumps(jsonable(content), indent=2, ensure_ascii=False, allow_nan=False)
    _files.write_text(path, text + "\n")


def write_metrics(folder: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the metrics of all epochs so far, a line each."""
    lines = [json.dumps(jsonable(row), ensure_ascii=False, allow_nan=False) for row in rows]
    _files.write_text(folder / "metrics.jsonl", "".join(f"{line}\n" for line in lines))


def write_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz file in one piece, replacing what was there."""
    with _files.replaced(path) as draft, draft.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def write_model(path: pathlib.Path, model: Any) -> None:
    """Write a .keras file in one piece, replacing what was there."""
    with _files.replaced(path) as draft:
        whole = draft.with_name(f"{draft.name}.keras")  # Keras goes by the ending
        try:
            model.save(whole)
            whole.rename(draft)
        finally:
            whole.unlink(missing_ok=True)


def read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Return what `write_arrays` has written."""
    with np.load(path) as held:
        return {name: held[name] for name in held.files}


def states(folder: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
    """Return the states of a stage that is not complete, by epochs done, the last one first."""
    found = [(int(path.name.partition("-")[2]), path) for path in folder.glob("state-*")]
    return sorted(found, reverse=True)


def tidy(folder: pathlib.Path, keep: int | None = None) -> None:
    """Remove states that are no longer needed, and drafts of what was killed."""
    for epoch, path in states(folder):
        if epoch != keep:
            shutil.rmtree(path, ignore_errors=True)
    for draft in _drafts(folder):
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


def _drafts(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return what is left of files and folders whose writer was killed."""
    return [*folder.glob(".*.????????"), *folder.glob(".*.????????.keras")]


@dataclasses.dataclass(frozen=True)
class StageOutput:
    """What a stage has put out.

    Attributes:
        folder: where it is.
        manifest: recipe, data, versions, the epoch chosen.
        metrics: a dict for each epoch.
    """

    folder: pathlib.Path
    manifest: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]

    @functools.cached_property
    def model(self) -> Any:
        """The best epoch's network; of the evaluation, the one that was judged."""
        return load_model(self._of_training / "model.keras", self.manifest["recipe"])

    @functools.cached_property
    def last(self) -> Any:
        """The last epoch's network."""
        return load_model(self._of_training / "last.keras", self.manifest["recipe"])

    @property
    def masks(self) -> Mapping[str, np.ndarray]:
        """By weight, which entries are kept; empty for a dense network."""
        file = self._of_training / "masks.npz"
        return read_arrays(file) if file.is_file() else {}

    @property
    def _of_training(self) -> pathlib.Path:
        """The folder with the networks: the evaluation judges those of the stage before it."""
        judged = self.manifest["stage"] == "evaluate"
        return stage_folder(self.folder.parent, "finetune") if judged else self.folder


def open_stage(folder: str | pathlib.Path) -> StageOutput:
    """Return what a complete stage has put out.

    Args:
        folder: of the stage, such as "outputs/first/3-finetune"; in it are `model.keras` and
            `last.keras`, `best.npz`, `masks.npz`, `metrics.jsonl` and `manifest.json`.

    Returns:
        A `StageOutput`, which loads the networks when they are asked for. That of "4-evaluate" has
        the networks of "3-finetune", which it judges; its figures are in its files.

    Raises:
        FileNotFoundError: there is no complete stage in the folder.

    Example:
        >>> import tscnc_tf as tscnc
        >>> output = tscnc.experiments.open_stage("outputs/first/3-finetune")  # doctest: +SKIP
        >>> output.metrics[-1]["validation_robust_accuracy"]  # doctest: +SKIP
    """
    folder = pathlib.Path(folder)
    if (folder / RECIPE).is_file():
        names = [f"{index}-{stage}" for index, stage in enumerate(STEPS, start=1)]
        raise FileNotFoundError(
            f"folder {folder} holds a whole experiment: open one of its stages, {', '.join(names)}."
        )
    if not is_complete(folder):
        raise FileNotFoundError(
            f"folder {folder} holds no complete stage, as it lacks {MANIFEST}: run the experiment "
            "again in the folder above, and it goes on where it was stopped."
        )
    rows = []
    if (folder / "metrics.jsonl").is_file():
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return StageOutput(folder, manifest, tuple(rows))


def load_model(path: pathlib.Path, recipe: Mapping[str, Any]) -> Any:
    """Load a network of an experiment by the Keras that its recipe names."""
    library = _keras.keras if recipe["network"]["library"] == "keras" else _keras.tf_keras
    return library.models.load_model(path, compile=False)
