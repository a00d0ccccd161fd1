"""The folders that an experiment writes; a manifest in one says that it is complete.

    EXPERIMENT/
        recipe.json
        data.json           name, fingerprint, numbers of images
        .lock               held by the process that runs the experiment
        1-train/ 2-prune/ 3-finetune/
            model.keras     the best epoch's network: plain, pruned weights being zero
            last.keras      the last epoch's
            best.npz        the best epoch's weights and masks as they were trained, gates and all
            masks.npz       by weight, which entries are kept (not for the dense network)
            metrics.jsonl   a line for each epoch
            manifest.json   recipe, data, versions, the epoch chosen, digests of the other files
        4-evaluate/
            report.json     accuracy, clean and under attack, on the test set; report.txt, to read
            kernels.json    condition numbers, stable ranks, dead filters
            sparsity.json   zeros by weight
            lipschitz.json  the empirical local Lipschitz constant
            saved_model/    to serve
            manifest.json

While a stage runs, `state-EPOCH/` in its folder holds what it needs to go on.

Files are held against the manifest before they are used, so that a damaged one is named. What was
written before there were digests is read without them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _files, _keras, _plots, _reports
from tscnc_tf._reports import jsonable
from tscnc_tf.datasets import Dataset
from tscnc_tf.experiments import locks
from tscnc_tf.experiments.recipe import Recipe, differences, errors_begin
from tscnc_tf.export import manifest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = ("train", "prune", "finetune", "evaluate")
MANIFEST = "manifest.json"
RECIPE, DATA = "recipe.json", "data.json"
BEST, MODEL, LAST, MASKS = "best.npz", "model.keras", "last.keras", "masks.npz"
METRICS, STATE, CHECKPOINT = "metrics.jsonl", "state", "checkpoint"


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
        theirs = read_json(
            file,
            "Choose another folder, or remove this one (a complete 1-train in it can be kept "
            "elsewhere, for dense=), and run again.",
        )
        if changed := differences(theirs, jsonable(recipe.to_dict())):
            raise ValueError(
                f"folder {folder} holds an experiment by another recipe, says its {RECIPE}: "
                f"{'; '.join(changed)}. Choose another folder, or the recipe that it began with."
            )
    elif folder.exists() and set(folder.iterdir()) - {*_drafts(folder), *locks.files(folder)}:
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
    file = folder / DATA
    if file.is_file():
        known = read_json(file, "Remove it, and run again: it is written anew.")
        with errors_begin(f"{file}: "):
            require_same_data(folder, known, data)
    else:
        write_json(folder / DATA, data.metadata)


def require_same_data(folder: pathlib.Path, known: Mapping[str, Any], data: Dataset) -> None:
    """Raise a ValueError unless data are those that are known of a folder."""
    theirs = known.get("fingerprint")
    if theirs != data.fingerprint:
        raise ValueError(
            f"the data are not those that {folder} was made with: their fingerprint is "
            f"{data.fingerprint[:12]}, not {str(theirs)[:12]}. Bring the same files, or choose "
            "another folder."
        )


def open_dense(dense: pathlib.Path, recipe: Recipe) -> StageOutput:
    """Return the first stage of another experiment, which is to be that of this one.

    Raises:
        FileNotFoundError: there is no complete stage in `dense`.
        ValueError: it is another stage, or by a recipe whose first stage is another one, or
            damaged.
    """
    output = open_stage(dense)
    require_whole(dense)
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


def write_manifest(folder: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of a folder, which says that all else is there, with a digest of each."""
    found = manifest.file_facts(folder)
    files = {
        name: facts for name, facts in found.items() if not name.startswith((".", f"{STATE}-"))
    }
    whole = json.loads(json.dumps(jsonable({**content, "files": files})))
    write_json(folder / MANIFEST, {**whole, "sha256": manifest.seal(whole)})


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Return what `write_manifest` has written.

    Raises:
        ValueError: it is damaged.
    """
    file = folder / MANIFEST
    content = read_json(file, _way_out(file))
    if ("files" in content or "sha256" in content) and (
        content.pop("sha256", None) != manifest.seal(content)
    ):
        raise _damaged(file, "its sha256 does not match its content")
    return content


def require_whole(folder: pathlib.Path) -> None:
    """Raise a ValueError if a file in a folder that has a manifest differs from it.

    A file that is missing is no matter here: whoever needs it says so.
    """
    for name in read_manifest(folder).get("files", {}):
        if (folder / name).exists():
            _require_as_recorded(folder, name)


def read_json(path: pathlib.Path, way_out: str, kind: type = dict) -> Any:
    """Return what a JSON file holds.

    Args:
        path: of the file.
        way_out: what to do if it is damaged, for the error message.
        kind: what it must hold.

    Raises:
        OSError: there is no such file, or it can't be read.
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
    """Write a JSON file in one piece."""
    text = json.dumps(jsonable(content), indent=2, ensure_ascii=False, allow_nan=False)
    _files.write_text(path, text + "\n")


def write_metrics(folder: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the metrics of all epochs so far, a line each."""
    lines = [json.dumps(jsonable(row), ensure_ascii=False, allow_nan=False) for row in rows]
    _files.write_text(folder / METRICS, "".join(f"{line}\n" for line in lines))


def write_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz file in one piece, replacing what was there."""
    with _files.replaced(path) as draft, draft.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def write_model(path: pathlib.Path, model: Any) -> None:
    """Write a .keras or .h5 file in one piece, replacing what was there."""
    with _files.replaced(path) as draft:
        whole = draft.with_name(f"{draft.name}{path.suffix or '.keras'}")  # Keras reads the suffix
        try:
            model.save(whole)
            whole.rename(draft)
        finally:
            whole.unlink(missing_ok=True)


def read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Return what `write_arrays` has written.

    Raises:
        ValueError: it can't be read.
    """
    # The stream is ours, as NumPy leaves a file open that it can't make out.
    with _reading(path), path.open("rb") as stream, np.load(stream) as held:
        return {name: held[name] for name in held.files}


def states(folder: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
    """Return the states of a stage that is not complete, by epochs done, the last one first."""
    found = [(int(path.name.partition("-")[2]), path) for path in folder.glob(f"{STATE}-*")]
    return sorted(found, reverse=True)


def read_state(state: pathlib.Path, checkpoint: tf.train.Checkpoint) -> list[dict[str, Any]]:
    """Restore a checkpoint, and return the metrics of the epochs before it.

    Raises:
        ValueError: a file of the state is damaged, or of the best epoch so far.
    """
    if is_complete(state):
        require_whole(state)
    with _reading(state / CHECKPOINT):
        checkpoint.read(str(state / CHECKPOINT)).assert_consumed()
    read_arrays(state.parent / BEST)  # if it can't be read, better to know now than in the end
    return read_json(state / "metrics.json", _way_out(state / "metrics.json"), list)


def write_state(
    folder: pathlib.Path,
    epochs: int,
    checkpoint: tf.train.Checkpoint,
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Write what a stage needs to go on after some epochs, given their metrics."""
    with _files.new_directory(STATE, folder / f"{STATE}-{epochs}") as draft:
        checkpoint.write(str(draft / CHECKPOINT))
        write_json(draft / "metrics.json", rows)
        write_manifest(draft, {})


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
class StageOutput(_reports.Report):
    """What a stage has written; printed, a table of its epochs.

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
        _require_as_recorded(file.parent, file.name)
        return read_arrays(file)

    @property
    def chosen(self) -> Mapping[str, Any]:
        """The metrics of the epoch whose network is `model`; empty for the evaluation."""
        epoch = self.manifest.get("chosen_epoch")
        return {} if epoch is None else self.metrics[epoch - 1]

    def plot(self) -> Figure:
        """Return a figure of the metrics of training by epoch: losses, accuracies, and the others.

        Raises:
            ValueError: the stage has no metrics, as that of the evaluation.
            ImportError: matplotlib is not installed.
        """
        if not self.metrics:
            raise ValueError(f"stage {self.folder} has no metrics of epochs to draw.")
        return _plots.curves(self.metrics)

    def _table(self) -> _reports.Table:
        title = f"{self.folder.parent.name}, {self.folder.name}"
        if not self.metrics:
            report = read_json(self.folder / "report.json", _way_out(self.folder / "report.json"))
            rows = [
                [name, _reports.percent(report[name]["accuracy"])] for name in ("clean", "robust")
            ]
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

    def _load(self, name: str) -> Any:
        _require_as_recorded(self._training_folder, name)
        return load_model(self._training_folder / name, self.manifest["recipe"])

    @property
    def _training_folder(self) -> pathlib.Path:
        """The folder with the networks: the evaluation has those of the stage before it."""
        evaluated = self.manifest["stage"] == "evaluate"
        return stage_folder(self.folder.parent, "finetune") if evaluated else self.folder


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
        ValueError: its manifest or its metrics are damaged; as is said of the other files when
            they are asked for.

    Example:
        >>> import tscnc_tf as tscnc
        >>> output = tscnc.experiments.open_stage("outputs/first/3-finetune")  # doctest: +SKIP
        >>> output.metrics[-1]["validation_robust_accuracy"]  # doctest: +SKIP
    """
    folder = pathlib.Path(folder)
    if (folder / RECIPE).is_file():
        raise FileNotFoundError(
            f"folder {folder} holds a whole experiment: open one of its stages, "
            f"{', '.join(_names())}."
        )
    if not is_complete(folder):
        raise FileNotFoundError(
            f"folder {folder} holds no complete stage, as it lacks {MANIFEST}: run the experiment "
            "again in the folder above, and it goes on where it was stopped."
        )
    content = read_manifest(folder)
    rows, file = [], folder / METRICS
    if file.is_file():
        _require_as_recorded(folder, METRICS)
        with _reading(file):
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return StageOutput(folder, content, tuple(rows))


def load_model(path: pathlib.Path, recipe: Mapping[str, Any]) -> Any:
    """Load a network of an experiment by the Keras that its recipe names.

    Raises:
        ValueError: it can't be loaded.
    """
    library = _keras.keras if recipe["network"]["library"] == "keras" else _keras.tf_keras
    with _reading(path):
        return library.models.load_model(path, compile=False)


@contextlib.contextmanager
def _reading(file: pathlib.Path) -> Iterator[None]:
    """Let whatever the reader of a file raises name the file and what to do about it."""
    try:
        yield
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # each library has errors of its own for what it can't make out
        raise _damaged(file, f"it can't be read ({type(error).__name__}: {error})") from error


def _require_as_recorded(folder: pathlib.Path, name: str) -> None:
    """Raise a ValueError if a file differs from what the manifest of its folder says of it."""
    facts = read_manifest(folder).get("files", {}).get(name)
    if facts is not None and (words := manifest.fault(folder / name, facts)):
        raise _damaged(folder / name, f"it {words}")


def _damaged(file: pathlib.Path, why: str) -> ValueError:
    return ValueError(f"{file} is damaged: {why}. {_way_out(file)}")


def _way_out(file: pathlib.Path) -> str:
    """Return what to do about a damaged file of a stage."""
    stage = next((folder for folder in file.parents if folder.name in _names()), file.parent)
    anew = f"emove the folder {stage} and those of later stages, and run the experiment again."
    if is_complete(stage) and file.name not in (MODEL, MANIFEST):
        return f"Remove {file.name} alone if you can do without it; if not, r{anew}"
    return f"R{anew}"


def _names() -> list[str]:
    return [stage_folder(pathlib.Path(), stage).name for stage in STEPS]
