"""Damaged files of experiments: changed, cut off, exchanged or removed."""

from __future__ import annotations

import pathlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator

import tscnc_tf as tscnc
from benchmarks.faults import runs
from benchmarks.faults.outcome import Outcome
from tscnc_tf.experiments import folders

PLACES = (0.0, 0.5, 1.0)


def scenarios(smoke: bool) -> Iterator[Outcome]:
    """Yield the outcomes of damaged files of a complete and of a stopped experiment.

    The experiment is run again for each damaged file. It, or opening its outputs, must raise an
    error that names the file, or end as if nothing had happened.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        whole = tscnc.experiments.run(runs.recipe(True), folder / "whole", progress=False)
        yield _tried("files of a complete experiment, damaged", whole, whole, smoke)
        begun = shutil.copytree(whole, folder / "begun")
        for stage in ("3-finetune", "4-evaluate"):
            shutil.rmtree(begun / stage)
        half = _half_of(runs.STAGES[1], begun, folder)
        yield _tried("files of an experiment that was stopped, damaged", half, whole, smoke)


def _half_of(stage: str, begun: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Return the folder of an experiment that was stopped after an epoch of `stage`."""
    original = folders.write_state

    class _StoppedError(Exception):
        pass

    def stopping(*arguments: object) -> None:
        original(*arguments)  # type: ignore[arg-type]
        raise _StoppedError

    shutil.rmtree(begun / stage)
    folders.write_state = stopping
    try:
        tscnc.experiments.run(runs.recipe(True), begun, progress=False)
    except _StoppedError:
        return begun
    finally:
        folders.write_state = original
    raise AssertionError(f"nothing was stopped in {folder}")


def damages(content: bytes, others: bytes) -> dict[str, bytes | None]:
    """Return damaged contents of a file by the kind of damage; None stands for a removed file."""
    found: dict[str, bytes | None] = {"gone": None, "empty": b"", "of another file": others}
    for share in PLACES:
        place = round(share * (len(content) - 1))
        flipped = bytes([content[place] ^ 0xFF])
        found[f"a byte at {share:.0%}"] = content[:place] + flipped + content[place + 1 :]
        if share > 0.0:
            found[f"cut off at {share:.0%}"] = content[:place]
    return found


def _tried(name: str, folder: pathlib.Path, whole: pathlib.Path, smoke: bool) -> Outcome:
    outcome = Outcome(name)
    files = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    )
    contents = {file: (folder / file).read_bytes() for file in files}
    for file in files[:: len(files) // 2] if smoke else files:
        kin = [each for each in files if each.suffix == file.suffix and each != file]
        others = contents[kin[0]] if kin else b"something else"
        for damage, content in damages(contents[file], others).items():
            if content == contents[file]:
                continue
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
