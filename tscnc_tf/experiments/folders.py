"""The folders that an experiment writes; a manifest in one marks it as complete.

    EXPERIMENT/
        recipe.json
        data.json           name, fingerprint, numbers of images
        .lock               held by the process that runs the experiment
        1-train/ 2-prune/ 3-finetune/
            model.keras     the network of the best epoch: plain, pruned weights being zero
            last.keras      that of the last epoch
            best.npz        weights and masks of the best epoch as they were trained, with gates
            masks.npz       by weight, which entries are kept (not for the dense network)
            metrics.jsonl   a line for each epoch
            manifest.json   recipe, data, versions, the chosen epoch, digests of the other files
        4-evaluate/
            report.json     accuracy, clean and under attack, on the test set; report.txt, to read
            kernels.json    condition numbers, stable ranks, dead filters
            sparsity.json   zeros by weight
            lipschitz.json  the empirical local Lipschitz constant
            saved_model/    to serve
            manifest.json

While a stage runs, `state-EPOCH/` in its folder holds its last checkpoint (`state-EPOCH-STEP/` if
the run was interrupted within an epoch), and `evaluation.json` the progress of the attacks.

Files are checked against the manifest before they are used, so that errors name the damaged file.
Folders that were written before manifests had digests are read without these checks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorflow as tf

from tscnc_tf import _files, _plots, _reports
from tscnc_tf._keras import files
from tscnc_tf._reports import jsonable
from tscnc_tf.datasets import Dataset
from tscnc_tf.experiments import locks
from tscnc_tf.experiments.recipe import Recipe, differences, errors_begin, merged
from tscnc_tf.export import manifest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STAGE_FOLDERS = {
    "train": "1-train",
    "prune": "2-prune",
    "finetune": "3-finetune",
    "evaluate": "4-evaluate",
}
MANIFEST, RECIPE, DATA = "manifest.json", "recipe.json", "data.json"
BEST, MODEL, LAST, MASKS = "best.npz", "model.keras", "last.keras", "masks.npz"
_SHOWN = 10  # values in which recipes differ
METRICS, STATE, CHECKPOINT = "metrics.jsonl", "state", "checkpoint"
LOGS = "logs.npz"
EVALUATION_STATE = "evaluation.json"


# Experiments


def stage_folder(folder: pathlib.Path, stage: str) -> pathlib.Path:
    """Return the folder of a stage of an experiment."""
    return folder / STAGE_FOLDERS[stage]


def is_new(folder: pathlib.Path, recipe: Recipe) -> bool:
    """Return whether a folder holds no experiment yet.

    Raises:
        ValueError: it holds an experiment with another recipe; the message lists the differences.
        FileExistsError: it holds something else.
        NotADirectoryError: it is a file, or lies below one.
    """
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise NotADirectoryError(f"folder must be a folder, got {folder}: {place} is a file.")
    file = folder / RECIPE
    if file.is_file():
        theirs = read_json(
            file,
            "Choose another folder, or remove this one (a complete 1-train in it can be kept "
            "elsewhere, for dense=), and run again.",
        )
        if changed := differences(_completed(theirs), jsonable(recipe.to_dict())):
            more = f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
            raise ValueError(
                f"folder {folder} holds an experiment by another recipe, says {file}: "
                f"{'; '.join(changed[:_SHOWN])}{more}. Choose another folder, or the recipe that "
                "it began with."
            )
    elif any((folder / name).exists() for name in (DATA, *STAGE_FOLDERS.values())):
        raise FileExistsError(
            f"folder {folder} holds an experiment, but not {file} with its recipe: restore that "
            "file, or choose another folder."
        )
    elif folder.exists() and set(folder.iterdir()) - {*_drafts(folder), *locks.files(folder)}:
        raise FileExistsError(
            f"folder {folder} holds something else than an experiment: choose another one."
        )
    return not file.is_file()


def _completed(recipe: Any) -> Any:
    """Return a recipe that was read, with the values that have been added since it was written."""
    # Before there was a choice of the attack, it was PGD.
    known = Recipe().override({"evaluate.attack": "pgd"})
    return merged(jsonable(known.to_dict()), recipe)


def require_same_recipe(folder: pathlib.Path, recipe: Recipe) -> None:
    """Raise a ValueError if a complete stage is by another recipe, or its manifest is damaged.

    The first stage may be that of another experiment, whose later stages differ.
    """
    content = read_manifest(folder)
    mine, theirs = recipe, Recipe.from_dict(_completed(content["recipe"]))
    if content["stage"] == "train":
        mine, theirs = mine.first_stage(), theirs.first_stage()
    if changed := differences(jsonable(theirs.to_dict()), jsonable(mine.to_dict())):
        raise ValueError(
            f"folder {folder} holds a stage by another recipe: {'; '.join(changed)}, says "
            f"{folder / MANIFEST}. Put back what was there, or remove the folder and those of "
            "later stages, and run the experiment again."
        )


def claim(folder: pathlib.Path, recipe: Recipe, data: Dataset) -> None:
    """Write recipe and data into a folder, or check that it holds an experiment with the same.

    Raises:
        ValueError: the folder holds an experiment on other data.
        ValueError, FileExistsError, NotADirectoryError: see `is_new`.
    """
    if is_new(folder, recipe):
        write_json(folder / RECIPE, recipe.to_dict())
    tidy(folder)
    file = folder / DATA
    if file.is_file():
        known = read_json(file, "Remove it, and run again: it is then rewritten.")
        with errors_begin(f"{file}: "):
            require_same_data(folder, known, data)
    else:
        write_json(folder / DATA, data.metadata)


def require_there(folder: pathlib.Path) -> None:
    """Raise a FileNotFoundError if the folder of a stage, or that of its experiment, is gone."""
    recipe = folder.parent / RECIPE  # writing a later file may have recreated the folder
    if not folder.is_dir() or (folder.name in STAGE_FOLDERS.values() and not recipe.is_file()):
        raise FileNotFoundError(
            f"folder {folder} was removed or renamed while the experiment was running in it. Start "
            "the experiment again, with the new path if the folder was renamed."
        )


def require_same_data(folder: pathlib.Path, known: Mapping[str, Any], data: Dataset) -> None:
    """Raise a ValueError unless the metadata recorded in a folder are those of `data`."""
    theirs = known.get("fingerprint")
    if theirs != data.fingerprint:
        raise ValueError(
            f"the data are not those that {folder} was made with: their fingerprint is "
            f"{data.fingerprint[:12]}, not {str(theirs)[:12]}. Use the same files, or choose "
            "another folder."
        )


def open_dense(dense: pathlib.Path, recipe: Recipe) -> StageOutput:
    """Return the first stage of another experiment, to be used in one with this recipe.

    Raises:
        FileNotFoundError: there is no complete stage in `dense`.
        ValueError: it is another stage, its recipe differs in the first stage, or it is damaged.
    """
    output = open_stage(dense)
    require_whole(dense)
    if (stage := output.manifest["stage"]) != "train":
        raise ValueError(f"dense must be a stage of training, got {dense}: {stage}.")
    theirs = Recipe.from_dict(output.manifest["recipe"]).first_stage()
    mine = recipe.first_stage()
    if changed := differences(jsonable(theirs.to_dict()), jsonable(mine.to_dict())):
        raise ValueError(
            f"dense={str(dense)!r} was trained by another recipe: {'; '.join(changed)}."
        )
    return output


def copy_dense(dense: StageOutput, folder: pathlib.Path) -> None:
    """Copy the first stage of another experiment into a folder, unless it has one."""
    goal = stage_folder(folder, "train")
    if not is_complete(goal):
        shutil.rmtree(goal, ignore_errors=True)
        with _files.new_directory("folder", goal) as draft:
            shutil.copytree(dense.folder, draft, dirs_exist_ok=True)


def tidy(folder: pathlib.Path, keep: Progress | None = None) -> None:
    """Remove drafts of killed processes, and all checkpoints except the one at `keep`."""
    for progress, path in states(folder):
        if progress != keep:
            shutil.rmtree(path, ignore_errors=True)
    for draft in _drafts(folder):
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


def _drafts(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return unfinished files and folders of killed processes.

    In the folder of an experiment these are drafts of its own files; others may be the user's.
    """
    own = {RECIPE, DATA, locks.HOLDER, *STAGE_FOLDERS.values()}
    is_stage = folder.name in STAGE_FOLDERS.values()
    found = ((path, _files.DRAFT.fullmatch(path.name)) for path in folder.glob(".*"))
    return [path for path, match in found if match and (is_stage or match[1] in own)]


# Manifests


def is_complete(folder: pathlib.Path) -> bool:
    """Return whether a stage has ended and written all its files."""
    return (folder / MANIFEST).is_file()


def write_manifest(folder: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of a folder, with a digest of each file; it marks it as complete."""
    files = {
        name: facts
        for name, facts in manifest.file_facts(folder).items()
        if not name.startswith((".", f"{STATE}-")) and name != EVALUATION_STATE
    }
    whole = jsonable({**content, "files": files})
    write_json(folder / MANIFEST, {**whole, "sha256": manifest.seal(whole)})


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Return the content of a manifest.

    Raises:
        ValueError: it is damaged, or of another stage.
    """
    file = folder / MANIFEST
    content = read_json(file, _way_out(file))
    if ("files" in content or "sha256" in content) and (
        content.pop("sha256", None) != manifest.seal(content)
    ):
        raise _damaged(file, "its sha256 does not match its content")
    stage = next((each for each, name in STAGE_FOLDERS.items() if name == folder.name), None)
    if stage is not None and content.get("stage") != stage:
        raise _damaged(file, f"it is not of the stage {stage!r}, but of {content.get('stage')!r}")
    return content


def require_whole(folder: pathlib.Path, *names: str) -> None:
    """Raise a ValueError if a file differs from what the manifest of its folder records.

    Args:
        folder: of a complete stage or a checkpoint.
        names: the files to check; if none are given, all that exist.
    """
    recorded = read_manifest(folder).get("files", {})
    for name in names or [name for name in recorded if (folder / name).exists()]:
        if name in recorded and (fault := manifest.fault(folder / name, recorded[name])):
            raise _damaged(folder / name, f"it {fault}")


def _damaged(file: pathlib.Path, why: str) -> ValueError:
    return ValueError(f"{file} is damaged: {why}. {_way_out(file)}")


def _way_out(file: pathlib.Path) -> str:
    """Return what to do about a damaged file of a stage."""
    names = STAGE_FOLDERS.values()
    stage = next((folder for folder in file.parents if folder.name in names), file.parent)
    stages = f"the folder {stage} and those of later stages, and run the experiment again."
    if is_complete(stage) and file.name not in (MODEL, MANIFEST):
        return f"Remove {file.name} alone if you can do without it; if not, remove {stages}"
    return f"Remove {stages}"


@contextlib.contextmanager
def _reading(file: pathlib.Path) -> Iterator[None]:
    """Turn any error of a library that reads a file into a ValueError that names the file."""
    try:
        yield
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # libraries raise their own kinds of errors for damaged files
        raise _damaged(file, f"it can't be read ({type(error).__name__}: {error})") from error


# Files


def read_json(path: pathlib.Path, way_out: str, kind: type = dict) -> Any:
    """Return the content of a JSON file.

    Args:
        path: of the file.
        way_out: what to do if it is damaged, for the error message.
        kind: the type that it must hold.

    Raises:
        OSError: the file is missing or can't be read.
        ValueError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is not JSON: {error}. {way_out}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} is damaged, it holds no {kind.__name__}. {way_out}")
    return content


def write_json(path: pathlib.Path, content: Any) -> None:
    """Write a JSON file in one piece, replacing what was there."""
    text = json.dumps(jsonable(content), indent=2, ensure_ascii=False, allow_nan=False)
    _files.write_text(path, text + "\n")


def write_metrics(folder: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the metrics of all epochs so far, a line each."""
    lines = [json.dumps(jsonable(row), ensure_ascii=False, allow_nan=False) for row in rows]
    _files.write_text(folder / METRICS, "".join(f"{line}\n" for line in lines))


def write_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz file in one piece, replacing what was there."""
    with _files.replaced(path) as draft, draft.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]


def read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file.

    Raises:
        ValueError: it can't be read.
    """
    # Given a path instead of a stream, NumPy leaves a file that it can't read open.
    with _reading(path), path.open("rb") as stream, np.load(stream) as held:
        return {name: held[name] for name in held.files}


def write_model(path: pathlib.Path, model: Any) -> None:
    """Write a .keras or .h5 file in one piece, replacing what was there."""
    with _files.replaced(path) as draft:
        whole = draft.with_name(f"{draft.name}{path.suffix or '.keras'}")  # Keras reads the suffix
        try:
            model.save(whole)
            whole.rename(draft)
        finally:
            whole.unlink(missing_ok=True)


def load_model(path: pathlib.Path) -> Any:
    """Load a network of an experiment.

    Raises:
        ValueError: it can't be loaded, or holds code.
    """
    with _reading(path):
        return files.load_model(path)


# Checkpoints of stages that are not complete


class Progress(NamedTuple):
    """The progress of a stage: whole epochs, and steps of the next one."""

    epochs: int
    steps: int = 0


def states(folder: pathlib.Path) -> list[tuple[Progress, pathlib.Path]]:
    """Return the progress and the folder of each checkpoint, the last one first."""
    name = re.compile(rf"{STATE}-(\d+)(?:-(\d+))?")
    found = [
        (Progress(*map(int, match.groups("0"))), path)
        for path in folder.glob(f"{STATE}-*")
        if (match := name.fullmatch(path.name))
    ]
    return sorted(found, reverse=True)


def owner(recipe: Recipe, stage: str) -> np.ndarray:
    """Return a digest of a recipe and a stage, by which files of another one are recognized."""
    sealed = manifest.seal({"stage": stage, "recipe": jsonable(recipe.to_dict())})
    return np.frombuffer(bytes.fromhex(sealed), np.uint8)


def read_state(
    state: pathlib.Path, checkpoint: tf.train.Checkpoint, owner: np.ndarray
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Restore a checkpoint; return the metrics of whole epochs, and `logs` of `write_state`.

    Args:
        state: the folder of the checkpoint.
        checkpoint: to restore.
        owner: of the stage.

    Raises:
        ValueError: a file of the checkpoint or of the best epoch so far is damaged, or of another
            stage, recipe or epoch.
    """
    if is_complete(state):
        require_whole(state)
        content = read_manifest(state)
        # Neither is in what was written before there were owners.
        if content.get("owner", owner.tolist()) != owner.tolist():
            raise _damaged(state, "it is of another stage or recipe")
        if content.get("name", state.name) != state.name:
            raise _damaged(state, f"it is {content['name']}, renamed")
    with _reading(state / CHECKPOINT):
        checkpoint.read(str(state / CHECKPOINT)).assert_consumed()
    rows = read_json(state / "metrics.json", _way_out(state / "metrics.json"), list)
    if rows:  # an error now rather than at the end of the stage
        best = state.parent / BEST
        if not np.array_equal(read_arrays(best).get("owner", owner), owner):
            raise _damaged(best, "it is of another stage or recipe")
    return rows, read_arrays(state / LOGS) if (state / LOGS).exists() else {}


def write_state(
    folder: pathlib.Path,
    progress: Progress,
    checkpoint: tf.train.Checkpoint,
    rows: Sequence[Mapping[str, Any]],
    logs: Mapping[str, np.ndarray],
    owner: np.ndarray,
) -> None:
    """Write the checkpoint of a stage, with the metrics of its epochs, and remove earlier ones.

    Args:
        folder: of the stage.
        progress: of the stage.
        checkpoint: to write.
        rows: the metrics of whole epochs.
        logs: the state of the metrics of an unfinished epoch; empty between two epochs.
        owner: of the stage.
    """
    place = f"{STATE}-{progress.epochs}" + (f"-{progress.steps}" if progress.steps else "")
    with _files.new_directory(STATE, folder / place) as draft:
        checkpoint.write(str(draft / CHECKPOINT))
        write_json(draft / "metrics.json", rows)
        if logs:
            write_arrays(draft / LOGS, logs)
        write_manifest(draft, {"owner": owner.tolist(), "name": place})
    tidy(folder, keep=progress)


# Outputs


@dataclasses.dataclass(frozen=True)
class StageOutput(_reports.Report):
    """What a stage has written; `print` it for a table of its epochs.

    Attributes:
        folder: of the stage.
        manifest: recipe, data, versions, the chosen epoch, size and digest of each file.
        metrics: a dict for each epoch.
    """

    folder: pathlib.Path
    manifest: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]

    @functools.cached_property
    def model(self) -> Any:
        """The network of the best epoch; for the evaluation, the one that was evaluated."""
        return self._load(MODEL)

    @functools.cached_property
    def last(self) -> Any:
        """The network of the last epoch."""
        return self._load(LAST)

    @property
    def masks(self) -> Mapping[str, np.ndarray]:
        """By weight, which entries are kept; empty for a dense network."""
        file = self._training_folder / MASKS
        if not file.is_file():
            return {}
        require_whole(file.parent, file.name)
        return read_arrays(file)

    @property
    def chosen(self) -> Mapping[str, Any]:
        """The metrics of the epoch whose network is `model`; empty for the evaluation."""
        epoch = self.manifest.get("chosen_epoch")
        return {} if epoch is None else self.metrics[epoch - 1]

    def plot(self) -> Figure:
        """Return a figure of the training metrics by epoch: losses, accuracies, and the others.

        Raises:
            ValueError: the stage has no metrics, as the evaluation.
            ImportError: matplotlib is not installed.
        """
        if not self.metrics:
            raise ValueError(f"stage {self.folder} has no metrics of epochs to draw.")
        return _plots.curves(self.metrics)

    def _load(self, name: str) -> Any:
        require_whole(self._training_folder, name)
        return load_model(self._training_folder / name)

    @property
    def _training_folder(self) -> pathlib.Path:
        """The folder with the networks: the evaluation has those of the stage before it."""
        evaluated = self.manifest["stage"] == "evaluate"
        return stage_folder(self.folder.parent, "finetune") if evaluated else self.folder

    def _table(self) -> _reports.Table:
        title = f"{self.folder.parent.name}, {self.folder.name}"
        if not self.metrics:
            file = self.folder / "report.json"
            report = read_json(file, _way_out(file))
            names = ("clean", "robust")
            rows = [(name, _reports.percent(report[name]["accuracy"])) for name in names]
            return _reports.Table(title, ["test set", "accuracy"], rows)
        return _reports.Table(
            title,
            ["epoch", "zeros", "clean", "robust", "worst κ", "dead filters"],
            [
                [
                    f"{row['epoch']}",
                    _reports.percent(row["sparsity"]),
                    _reports.percent(row["validation_accuracy"]),
                    _reports.percent(row["validation_robust_accuracy"]),
                    _reports.significant(float(row["condition_number"])),
                    f"{row['dead_filters']:.0f}",
                ]
                for row in self.metrics
            ],
            notes=[
                f"Epoch {self.chosen['epoch']} was chosen, by the accuracies on the validation set."
            ],
        )


def open_stage(folder: str | pathlib.Path) -> StageOutput:
    """Return what a complete stage has written.

    Args:
        folder: of the stage, such as "outputs/first/3-finetune"; in it are `model.keras` and
            `last.keras`, `best.npz`, `masks.npz`, `metrics.jsonl` and `manifest.json`.

    Returns:
        A `StageOutput`, which loads the networks on first access. That of "4-evaluate" has the
        networks of "3-finetune", which it evaluates; its results are in its files.

    Raises:
        FileNotFoundError: there is no complete stage in the folder.
        ValueError: its manifest or its metrics are damaged. The other files are checked on access.

    Example:
        >>> import tscnc_tf as tscnc
        >>> output = tscnc.experiments.open_stage("outputs/first/3-finetune")  # doctest: +SKIP
        >>> output.metrics[-1]["validation_robust_accuracy"]  # doctest: +SKIP
    """
    folder = _files.absolute("folder", folder)
    if (folder / RECIPE).is_file():
        raise FileNotFoundError(
            f"folder {folder} holds a whole experiment: open one of its stages, "
            f"{', '.join(STAGE_FOLDERS.values())}."
        )
    if not is_complete(folder):
        raise FileNotFoundError(
            f"folder {folder} holds no complete stage, as it lacks {MANIFEST}: run the experiment "
            "again in the folder above, and it continues where it was stopped."
        )
    content = read_manifest(folder)
    rows, file = [], folder / METRICS
    if file.is_file():
        require_whole(folder, METRICS)
        with _reading(file):
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return StageOutput(folder, content, tuple(rows))
