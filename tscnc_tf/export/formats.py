"""What all exports to a single file share: the way to write one and to check it."""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _files, _probe, inspection
from tscnc_tf.export import checked, constants, readiness
from tscnc_tf.export.file_report import ExportedKernel, FileExportReport
from tscnc_tf.export.file_serving import ServedFile
from tscnc_tf.inspection import weights


class Format(NamedTuple):
    """What formats differ in.

    Attributes:
        name: the name of the format.
        precision: "float32" or "int8".
        write: writes a checked model, given its endpoint, to a path.
        read: returns the constants in a file.
        load: returns a file as a function.
        holds: tells by the content of a file whether it is of this format.
        settings: for the report.
        distributions: for the report; by the names that pip knows.
    """

    name: str
    precision: str
    write: Callable[[checked.Checked, Callable[..., Any], list[tf.TensorSpec], pathlib.Path], None]
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


def export(
    model: Any,
    path: str | os.PathLike[str],
    form: Format,
    *,
    expected_sparsity: float | None,
    probe: Any,
    overwrite: bool,
) -> FileExportReport:
    """Check a model, write it, check the file, and put it in its place."""
    replacement = _files.Replacement(
        _checks.boolean("overwrite", overwrite), functools.partial(_require_format, form)
    )
    goal = _files.free_path("path", path, replacement)
    ready = checked.check(model, expected_sparsity, probe)
    _require_float32(ready.stripped)
    serve, signature = endpoint(ready.stripped, ready.specs)
    batch = tf.nest.flatten(ready.batch)
    named = {spec.name: array for spec, array in zip(signature, batch, strict=True)}
    exact = form.precision == "float32"
    with _files.new_file("path", goal, replacement) as draft:
        with readiness.scope(model):
            originals = _probe.outputs(lambda arrays: serve(*arrays), batch)
            form.write(ready, serve, signature, draft)
        content = draft.read_bytes()
        kernels = _kernels(form.name, model, ready.weights, form.read(draft))
        served = form.load(draft)
        allowed = ready.tolerance if exact else float("inf")
        what = f"the {form.name} file"
        outputs = _probe.outputs(served, named)
        apart = checked.require_same(what, outputs, originals, allowed)
        # A converter that has frozen the number of examples would show with another one.
        single = _probe.outputs(served, {name: array[:1] for name, array in named.items()})
        checked.require_same(what, single, [array[:1] for array in originals], allowed)
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
            versions=checked.versions(ready.library, *form.distributions),
        )


def _require_format(form: Format, path: pathlib.Path) -> None:
    """Raise a FileExistsError unless all that would be lost at a path is a file of the format."""
    if not path.is_file():
        what = "no file"
    elif path.stat().st_size and not form.holds(path.read_bytes()):
        what = f"a file that is not {form.name}"
    else:
        return
    raise FileExistsError(
        f"path is {what}: {path}. overwrite=True replaces a file of {form.name}, and nothing else: "
        "remove it yourself, or choose another path."
    )


def _kernels(
    form: str, model: Any, report: inspection.SparsityReport, found: Iterable[constants.Constant]
) -> tuple[ExportedKernel, ...]:
    """Return the rows of a report, after looking whether all zeros are in the file."""
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
        for layer in model._flatten_layers()
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
