"""The manifest: the report of a SavedModel as a JSON file in its folder, with digests.

It is checked on loading. The digests detect damage, such as a broken download, a file of another
export or a figure edited by hand. They do not protect against deliberate manipulation.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pathlib
import tarfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _files
from tscnc_tf.export.report import ExportedVariable, ExportReport

NAME = "tscnc_manifest.json"
FORMAT = 1


def write(folder: pathlib.Path, report: ExportReport) -> None:
    """Write the manifest into the folder of a SavedModel, without the path of the folder."""
    content = {"format": FORMAT, **report.to_dict()}
    del content["path"]
    content["sha256"] = seal(content)
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    _files.write_text(folder / NAME, text + "\n")


def read(folder: pathlib.Path) -> ExportReport:
    """Return the report in a folder's manifest, after checking its digest and the files it lists.

    Raises:
        ValueError: there is no manifest, it can't be read or was changed, or files differ from it.
    """
    file = folder / NAME
    if not file.is_file():
        raise ValueError(
            f"{folder} has no {NAME}: it was not written by export_saved_model. "
            "A SavedModel of another origin is loaded by tf.saved_model.load."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged, it is not JSON: {error}. Export again.") from error
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError(f"{file} is damaged, it is not a manifest. Export again.")
    if content["format"] != FORMAT:
        raise ValueError(
            f"{file} has format {content['format']!r}, and this version of tscnc_tf reads format "
            f"{FORMAT}: load it with the version that wrote it, or export again."
        )
    if content.pop("sha256", None) != seal(content):
        raise ValueError(
            f"{file} was changed after the export: its sha256 does not match its content. "
            "Export again."
        )
    report = ExportReport.from_dict({**content, "path": str(folder)})
    _check_files(folder, report)
    return report


def seal(content: dict[str, Any]) -> str:
    """Return the SHA-256 digest of a manifest's content, which must not have a key "sha256"."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_facts(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Return the size and SHA-256 digest of every file below `folder`, sorted by path."""
    return {name: _facts(folder / name) for name in _names(folder)}


def gzip_size(folder: pathlib.Path) -> int:
    """Return the bytes of `folder` as a .tar.gz of names and contents, without times or owners."""
    counter = _Counter()
    with (
        gzip.GzipFile("", "wb", compresslevel=9, fileobj=counter, mtime=0) as packed,
        tarfile.open(mode="w", fileobj=packed) as archive,
    ):
        for name in _names(folder):
            member = tarfile.TarInfo(name)
            member.size = (folder / name).stat().st_size
            with (folder / name).open("rb") as stream:
                archive.addfile(member, stream)
    return counter.count


def variables(loaded: Any) -> list[tf.Variable]:
    """Return the variables of a loaded SavedModel, in the order of the model's."""
    return [variable for variable in loaded.variables if isinstance(variable, tf.Variable)]


def values(variable: Any) -> np.ndarray:
    """Return a variable's values; for a variable mirrored over devices, those on the first."""
    return tf.convert_to_tensor(variable).numpy()


def is_finite(variable: Any) -> bool:
    """Tell whether a variable has neither NaN nor infinity; only floats can have them."""
    return not tf.as_dtype(variable.dtype).is_floating or bool(np.isfinite(values(variable)).all())


def variable_facts(loaded: Any) -> tuple[ExportedVariable, ...]:
    """Return the records of the variables of a loaded SavedModel."""
    return tuple(
        ExportedVariable(
            name=variable.name,
            shape=tuple(variable.shape),
            dtype=variable.dtype.name,
            zeros=int(np.count_nonzero(values(variable) == 0)),
        )
        for variable in variables(loaded)
    )


def check_variables(report: ExportReport, loaded: Any) -> None:
    """Check that the variables of a loaded SavedModel are finite and match the manifest.

    Raises:
        ValueError: some do not; the message names each of them.
    """
    found, recorded = variable_facts(loaded), report.variables
    faults = [
        f"{variable.name} holds NaN or infinity"
        for variable in variables(loaded)
        if not is_finite(variable)
    ]
    if len(found) != len(recorded):
        faults.append(f"there are {len(found)} variables, {len(recorded)} are recorded")
    for is_now, was in zip(found, recorded, strict=False):
        faults += [
            f"{was.name} has {field} {getattr(is_now, field)}, recorded as {getattr(was, field)}"
            for field in ("name", "shape", "dtype", "zeros")
            if getattr(is_now, field) != getattr(was, field)
        ]
    if faults:
        raise ValueError(
            f"The variables in {report.path} differ from its manifest: {'; '.join(faults)}. "
            "Export again."
        )


def fault(file: pathlib.Path, facts: Mapping[str, Any]) -> str:
    """Return how a file differs from its record, for an error message; empty if it does not."""
    if not file.is_file():
        return "is missing"
    found = _facts(file)
    if found["bytes"] != facts["bytes"]:
        return f"has {found['bytes']} bytes, recorded as {facts['bytes']}"
    return "has different content (its sha256 differs)" if found != facts else ""


def _check_files(folder: pathlib.Path, report: ExportReport) -> None:
    found = {name: fault(folder / name, facts) for name, facts in report.files.items()}
    if faults := [f"{name} {words}" for name, words in found.items() if words]:
        raise ValueError(
            f"The files in {folder} differ from its manifest: {'; '.join(faults)}. "
            "Copy the folder again, or export again."
        )


def _names(folder: pathlib.Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _facts(file: pathlib.Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


class _Counter(io.RawIOBase):
    """A file that only counts what is written to it."""

    count = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.count += len(data)
        return len(data)
