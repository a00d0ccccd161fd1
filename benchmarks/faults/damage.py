"""Damaged files of experiments: changed, cut off, exchanged or removed."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from unittest import mock

import tscnc_tf as tscnc
from benchmarks.faults import runs
from benchmarks.faults.outcome import Outcome
from tscnc_tf.experiments import folders, runner

PLACES = (0.0, 0.5, 1.0)
COMPLETE = "complete"
DAMAGES = "damaged or exchanged"
OTHER = {"seed": 1, "adversary.epsilon": 0.05}  # another recipe, of networks of the same shapes


def scenarios(smoke: bool) -> Iterator[Outcome]:
    """Yield the outcomes of damaged files of a complete experiment, and of one stopped per stage.

    The experiment is run again for each damaged file. It, or opening its outputs, must raise an
    error that names the file, or end as if nothing had happened.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        stages = runs.ALL_STAGES[1:2] if smoke else runs.ALL_STAGES
        mine = _experiments(runs.recipe(True), folder / "mine", stages)
        others = _experiments(runs.recipe(True).override(OTHER), folder / "other", stages)
        whole = mine[COMPLETE]
        for name, damaged in mine.items():
            files = _files(damaged)
            if name != COMPLETE:  # earlier stages are complete, and tested as such
                files = [file for file in files if file.parts[0] in (name, file.name)]
            yield _tried(
                f"files of a complete experiment, {DAMAGES}"
                if name == COMPLETE
                else f"files of an experiment that was stopped in {name}, {DAMAGES}",
                {file: _exchanged(file, name, mine, others) for file in files},
                damaged,
                whole,
                smoke,
            )


def _experiments(
    recipe: tscnc.experiments.Recipe, folder: pathlib.Path, stages: Iterable[str]
) -> dict[str, pathlib.Path]:
    """Return the folders of a complete experiment, and of those that were stopped in a stage."""
    whole = tscnc.experiments.run(recipe, folder / COMPLETE, progress=False)
    stopped = {stage: runs.copy_before(stage, whole, folder / stage) for stage in stages}
    for stage, copy in stopped.items():
        _stop_in(stage, recipe, copy)
    return {COMPLETE: whole, **stopped}


def _stop_in(stage: str, recipe: tscnc.experiments.Recipe, folder: pathlib.Path) -> None:
    """Run an experiment until its next stage has written its first checkpoint.

    The evaluation is stopped before its manifest, when all its other files are written.
    """
    is_last = stage == runs.ALL_STAGES[-1]
    owner, name = (runner, "export_saved_model") if is_last else (folders, "write_state")
    original = getattr(owner, name)

    class _StoppedError(Exception):
        pass

    def stopping(*arguments: object, **keywords: object) -> None:
        original(*arguments, **keywords)
        raise _StoppedError

    with mock.patch.object(owner, name, stopping), contextlib.suppress(_StoppedError):
        tscnc.experiments.run(recipe, folder, progress=False)
        raise AssertionError(f"nothing was stopped in {folder}")


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the files of an experiment, relative to its folder."""
    return sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    )


def _exchanged(
    file: pathlib.Path,
    name: str,
    mine: Mapping[str, pathlib.Path],
    others: Mapping[str, pathlib.Path],
) -> dict[str, bytes]:
    """Return other files that a file may be exchanged with, by what they are.

    They have the same suffix, or the same name in other stages or in another experiment.

    Args:
        file: relative to the folder of an experiment.
        name: of this experiment in `mine`.
        mine: the experiments by this recipe.
        others: those by another recipe.
    """
    kin = [each for each in _files(mine[name]) if each.suffix == file.suffix and each != file]
    found = {"another file": mine[name] / kin[0]} if kin else {}
    found["another recipe"] = others[name] / file
    for stage in runs.ALL_STAGES if len(file.parts) > 1 else ():
        for folder in (mine[COMPLETE], mine.get(stage)):
            if stage != file.parts[0] and folder is not None:
                found[stage] = folder.joinpath(stage, *file.parts[1:])
    return {what: path.read_bytes() for what, path in found.items() if path.is_file()}


def damages(content: bytes, others: Mapping[str, bytes]) -> dict[str, bytes | None]:
    """Return damaged contents of a file by the kind of damage; None stands for a removed file.

    Args:
        content: of the file.
        others: the contents of other files, by what they are.
    """
    found: dict[str, bytes | None] = {"gone": None, "empty": b""}
    found |= {f"exchanged with that of {what}": other for what, other in others.items()}
    for share in PLACES:
        place = round(share * (len(content) - 1))
        flipped = bytes([content[place] ^ 0xFF])
        found[f"a byte at {share:.0%}"] = content[:place] + flipped + content[place + 1 :]
        if share > 0.0:
            found[f"cut off at {share:.0%}"] = content[:place]
    return {damage: each for damage, each in found.items() if each != content}


def _tried(
    name: str,
    exchanged: Mapping[pathlib.Path, Mapping[str, bytes]],
    folder: pathlib.Path,
    whole: pathlib.Path,
    smoke: bool,
) -> Outcome:
    outcome = Outcome(name)
    files = list(exchanged)
    for file in files[:: len(files) // 2] if smoke else files:
        for damage, content in damages((folder / file).read_bytes(), exchanged[file]).items():
            with tempfile.TemporaryDirectory() as place:
                copy = pathlib.Path(place) / "copy"
                shutil.copytree(folder, copy)
                (copy / file).unlink()
                if content is not None:
                    (copy / file).write_bytes(content)
                end = _end(copy, file)
                wrong = _wrong(copy, whole) if end == "recovered" else ""
                if wrong.startswith("metrics") and damage == "gone":
                    outcome.count("done without a file that may be removed")
                elif wrong:
                    outcome.lose(f"{file} {damage}: {wrong}")
                elif end in ("recovered", "named"):
                    outcome.count("the same end" if end == "recovered" else "the file is named")
                else:
                    outcome.lose(f"{file} {damage}: {end}")
    return outcome


def _end(folder: pathlib.Path, file: pathlib.Path) -> str:
    """Run an experiment again; return "recovered", "named" (by the error), or the error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tscnc.experiments.run(runs.recipe(True), folder, progress=False)
    except (ValueError, OSError) as error:
        # For a part of a checkpoint or of a SavedModel, the error may name the whole.
        is_part = any(part.startswith(("state-", "saved_model")) for part in file.parts)
        names = (str(folder / file), *([str((folder / file).parent)] if is_part else []))
        return "named" if any(name in str(error) for name in names) else f"{error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "recovered"


def _wrong(folder: pathlib.Path, whole: pathlib.Path) -> str:
    """Return what is wrong in a folder after a run without an error; empty if nothing is.

    An error on opening a stage is right if it names the folder.
    """
    try:
        return runs.differences(folder, whole)
    except (ValueError, OSError) as error:
        return "" if str(folder) in str(error) else f"{type(error).__name__}: {error}"
