"""The writer that all formats share: checked before and after, put in place by one rename."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _files, _keras, _probe, inspection
from tscnc_tf._keras import flavours, layers
from tscnc_tf.export import constants, preflight
from tscnc_tf.export.report import ExportedKernel, FileExportReport
from tscnc_tf.export.served_file import ServedFile
from tscnc_tf.inspection import weights


class Kind(NamedTuple):
    """What is written: a folder or a file, and what of it may be replaced.

    Attributes:
        name: with its article, for error messages.
        new: `_files.new_directory` or `_files.new_file`.
        other: returns what is at a path if it is not of this kind, else an empty text.
        require_model: raises a ValueError for a stripped model that the format can't hold, if
            there are such.
    """

    name: str
    new: Callable[..., contextlib.AbstractContextManager[pathlib.Path]]
    other: Callable[[pathlib.Path], str]
    require_model: Callable[[Any], None] | None = None

    def require(self, path: pathlib.Path) -> None:
        """Raise a FileExistsError unless what is at a path is of this kind, and nothing else."""
        if other := self.other(path):
            raise FileExistsError(
                f"path is {other}: {path}. overwrite=True replaces {self.name}, and nothing else: "
                "remove it yourself, or choose another path."
            )


@contextlib.contextmanager
def checked_draft(
    model: Any,
    path: str | os.PathLike[str],
    kind: Kind,
    *,
    expected_sparsity: float | None,
    probe: Any,
    overwrite: bool,
) -> Iterator[tuple[preflight.Checked, pathlib.Path, pathlib.Path]]:
    """Check a model, and yield it with its final path and a draft to write; then rename the draft.

    If the block fails, the draft is removed, and what was at the path is as it was.

    Raises:
        FileExistsError, TypeError, ValueError, OSError, RuntimeError: see `export_saved_model`.
    """
    replacement = _files.Replacement(_checks.boolean("overwrite", overwrite), kind.require)
    goal = _files.free_path("path", path, replacement)
    ready = preflight.check(model, expected_sparsity, probe)
    if kind.require_model is not None:
        kind.require_model(ready.stripped)
    with kind.new("path", goal, replacement) as draft:
        yield ready, goal, draft


class Format(NamedTuple):
    """What the formats of single files differ in.

    Attributes:
        name: the name of the format.
        precision: "float32" or "int8".
        write: writes a `Checked`, given its endpoint and the specs of that, to a path.
        read: returns the constants in a file.
        load: returns a file as a function.
        holds: tells by the content of a file whether it is of this format.
        settings: for the report.
        distributions: for the report; by the names that pip knows.
    """

    name: str
    precision: str
    write: Callable[
        [preflight.Checked, Callable[..., Any], list[tf.TensorSpec], pathlib.Path], None
    ]
    read: Callable[[pathlib.Path], Iterable[constants.Constant]]
    load: Callable[[pathlib.Path], ServedFile]
    holds: Callable[[bytes], bool]
    settings: Mapping[str, int]
    distributions: tuple[str, ...]


def endpoint(
    model: Any, specs: Any
) -> tuple[Callable[..., dict[str, tf.Tensor]], list[tf.TensorSpec]]:
    """Return a model in inference mode as a function of flat tensors, and their named specs.

    It returns a dict: the model's own, or "output_0", "output_1" and so on.
    """
    flat = tf.nest.flatten(specs)
    signature = [
        tf.TensorSpec(spec.shape, spec.dtype, name=_name(spec, index))
        for index, spec in enumerate(flat)
    ]

    def serve(*tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs = model(tf.nest.pack_sequence_as(specs, tensors), training=False)
        if not isinstance(outputs, dict) or any(map(tf.nest.is_nested, outputs.values())):
            leaves = enumerate(tf.nest.flatten(outputs))
            outputs = {f"output_{index}": output for index, output in leaves}
        return {name: tf.identity(output) for name, output in outputs.items()}

    return serve, signature


def write_saved_model(
    ready: preflight.Checked,
    serve: Callable[..., Any],
    signature: list[Any],
    folder: pathlib.Path,
) -> None:
    """Write a SavedModel with the endpoint `serve`, a function of the stripped model.

    Args:
        ready: the model.
        serve: the function.
        signature: the specs of its arguments.
        folder: where to.
    """
    archive = ready.library.export.ExportArchive()
    archive.track(ready.stripped)
    archive.add_endpoint("serve", serve, signature)
    if ready.library is _keras.keras:
        archive.write_out(str(folder), verbose=False)
    else:
        with _silent_tf_keras():
            archive.write_out(str(folder))


def export_file(
    model: Any,
    path: str | os.PathLike[str],
    form: Format,
    *,
    expected_sparsity: float | None,
    probe: Any,
    overwrite: bool,
) -> FileExportReport:
    """Check a model, write it, check the file, and put it in its place."""
    exact = form.precision == "float32"
    kind = Kind(
        f"a file of {form.name}",
        _files.new_file,
        functools.partial(_is_other, form),
        _require_float32,
    )
    with checked_draft(
        model, path, kind, expected_sparsity=expected_sparsity, probe=probe, overwrite=overwrite
    ) as (ready, goal, draft):
        serve, signature = endpoint(ready.stripped, ready.specs)
        batch = tf.nest.flatten(ready.batch)
        named = {spec.name: array for spec, array in zip(signature, batch, strict=True)}
        with flavours.scope(model):
            originals = _probe.outputs(lambda arrays: serve(*arrays), batch)
            form.write(ready, serve, signature, draft)
        content = draft.read_bytes()
        kernels = _kernels(form.name, model, ready.weights, form.read(draft))
        served = form.load(draft)
        allowed = ready.tolerance if exact else float("inf")
        what = f"the {form.name} file"
        outputs = _probe.outputs(served, named)
        apart = preflight.require_same(what, outputs, originals, allowed)
        # A converter that has frozen the number of examples would show with another one.
        single = _probe.outputs(served, {name: array[:1] for name, array in named.items()})
        preflight.require_same(what, single, [array[:1] for array in originals], allowed)
        return FileExportReport(
            path=str(goal),
            format=form.name,
            precision=form.precision,
            weights=ready.weights,
            kernels=kernels,
            expected_sparsity=ready.expected_sparsity,
            inputs=served.inputs,
            outputs=served.outputs,
            max_logit_difference=apart,
            logit_tolerance=allowed if exact else None,
            same_class=_same_class(outputs, originals),
            probe_examples=ready.examples,
            file_bytes=len(content),
            gzip_bytes=len(gzip.compress(content, 9, mtime=0)),
            ideal_sparse_bytes=ready.ideal_sparse_bytes if exact else None,
            sha256=hashlib.sha256(content).hexdigest(),
            settings=dict(form.settings),
            versions=ready.versions(*form.distributions),
        )


def _is_other(form: Format, path: pathlib.Path) -> str:
    """Return what is at a path if it is no file of the format, nor an empty one."""
    if not path.is_file():
        return "no file"
    if path.stat().st_size and not form.holds(path.read_bytes()):
        return f"a file that is not {form.name}"
    return ""


def _kernels(
    form: str, model: Any, report: inspection.SparsityReport, found: Iterable[constants.Constant]
) -> tuple[ExportedKernel, ...]:
    """Return the rows of a report, after checking that all zeros are in the file."""
    held = constants.find([weight.values for weight in weights.listed(model)], found)
    rows, faults = [], []
    for row, constant in zip(report.rows, held, strict=True):
        if constant is None:
            if row.zeros:
                faults.append(f"{row.name} and its {row.zeros:,} zeros are not to be found")
            rows.append(ExportedKernel(row.name, None, (), "", row.weights, row.zeros, 0))
            continue
        if any(constant.zero_points):
            faults.append(f"{constant.name} does not store 0.0 as 0 but {constant.zero_points}")
        rows.append(
            ExportedKernel(
                name=row.name,
                tensor=constant.name,
                shape=tuple(map(int, constant.values.shape)),
                dtype=constant.values.dtype.name,
                weights=row.weights,
                model_zeros=row.zeros,
                zeros=constant.zeros,
            )
        )
    if faults:
        raise ValueError(
            f"The {form} file lacks zeros of the model: {'; '.join(faults)}. Its converter has "
            "computed with these weights; leave the layers out, or write them in another way."
        )
    return tuple(rows)


def _require_float32(model: Any) -> None:
    """Raise a ValueError if a layer computes in another precision than float32."""
    others = {
        layer.name: layer.compute_dtype
        for layer in layers.flatten(model)
        if getattr(layer, "compute_dtype", None) in ("float16", "bfloat16", "float64")
    }
    if others:
        name, dtype = next(iter(others.items()))
        raise ValueError(
            f"model {model.name!r} has {len(others)} layers that do not compute in float32, such "
            f"as {name!r} in {dtype}: build it with the dtype policy 'float32', and copy the "
            "weights (set_weights)."
        )


def _same_class(left: list[np.ndarray], right: list[np.ndarray]) -> float | None:
    """Return the share of examples with the same largest logit; None if that means nothing."""
    if len(left) != 1 or left[0].ndim != 2:
        return None
    return float(np.mean(left[0].argmax(axis=1) == right[0].argmax(axis=1)))


def _name(spec: tf.TensorSpec, index: int) -> str:
    """Return a name that every format takes for an input."""
    name = spec.name or f"input_{index}"
    return name if name[0].isalpha() else f"input_{name}"


@contextlib.contextmanager
def _silent_tf_keras() -> Iterator[None]:
    """Keep tf_keras from printing, in this thread, as far as it has a switch for that."""
    utils = _keras.tf_keras.utils
    was_enabled = utils.is_interactive_logging_enabled()
    utils.disable_interactive_logging()
    try:
        yield
    finally:
        if was_enabled:
            utils.enable_interactive_logging()
