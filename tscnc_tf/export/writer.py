"""The steps that all formats share: check, write and check a draft, rename it into place."""

from __future__ import annotations

import abc
import contextlib
import functools
import gzip
import hashlib
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _files, _keras, _probe
from tscnc_tf._keras import flavours, layers
from tscnc_tf.export import constants, preflight
from tscnc_tf.export.report import ExportedKernel, FileExportReport
from tscnc_tf.export.served_file import ServedFile
from tscnc_tf.inspection import weights

# The allowed difference of logits, relative to that of float32.
_TOLERANCES = {"float32": 1.0, "float16": 100.0, "int8": math.inf}
# By how much logits may differ from 8-bit rounding alone, relative to the largest one.
_QUANTA = 0.05
_NOT_REPRESENTABLE = "The format can't represent this model: choose another precision or format."


class Format(abc.ABC):
    """A format, and the export to it.

    Attributes:
        kind: a noun with article for what is written, for error messages.
        new: `_files.new_directory` or `_files.new_file`.
    """

    kind: str
    new: ClassVar[Callable[..., contextlib.AbstractContextManager[pathlib.Path]]]

    def export(
        self,
        model: Any,
        path: str | os.PathLike[str],
        *,
        expected_sparsity: float | None,
        probe: Any,
        overwrite: bool,
    ) -> Any:
        """Check a model, write and check a draft of the export, and rename it to `path`.

        On failure, the draft is removed, and what was at the path is unchanged.

        Raises:
            FileExistsError, TypeError, ValueError, OSError, RuntimeError: see `export_saved_model`.
        """
        overwrite = _checks.boolean("overwrite", overwrite)
        replacement = _files.Replacement(overwrite, self.require_replaceable)
        goal = _files.free_path("path", path, replacement)
        ready = preflight.check(model, expected_sparsity, probe)
        with self.new("path", goal, replacement) as draft:
            return self.write(ready, goal, draft)

    @abc.abstractmethod
    def write(self, ready: preflight.Checked, goal: pathlib.Path, draft: pathlib.Path) -> Any:
        """Write and check a draft, which will be renamed to `goal`, and return the report."""

    @abc.abstractmethod
    def other(self, path: pathlib.Path) -> str:
        """Return what is at a path; an empty string if it is of this format, or empty."""

    def require_replaceable(self, path: pathlib.Path) -> None:
        """Raise a FileExistsError if what is at a path is neither of this format nor empty."""
        if other := self.other(path):
            raise FileExistsError(
                f"path is {other}: {path}. overwrite=True replaces {self.kind}, and nothing else: "
                "remove it yourself, or choose another path."
            )


class FileFormat(Format):
    """A format of single files.

    Attributes:
        name: the name of the format.
        distributions: the packages, by their names for pip, whose versions the report gives.
        precision: "float32", "float16" or "int8".
        settings: further settings, for the report.
        batch_size: the number of examples that the file takes; None for any.
        load: a function from the path of a file to a `ServedFile`.
    """

    name: str
    distributions: tuple[str, ...]
    load: ClassVar[Callable[..., ServedFile]]
    new = staticmethod(_files.new_file)

    def __init__(
        self,
        settings: Mapping[str, int],
        precision: str = "float32",
        batch_size: int | None = None,
    ) -> None:
        self.kind = f"a file of {self.name}"
        self.settings, self.precision, self.batch_size = settings, precision, batch_size

    @abc.abstractmethod
    def convert(
        self, ready: preflight.Checked, serve: Callable[..., Any], signature: list[tf.TensorSpec]
    ) -> constants.Converted:
        """Return the file for a model, given its endpoint and the specs of the arguments."""

    @abc.abstractmethod
    def constants(self, path: pathlib.Path) -> Iterable[constants.Constant]:
        """Return the weights in a file, and in its external data if there is any.

        Raises:
            ValueError: the file is not valid.
        """

    @abc.abstractmethod
    def holds(self, content: bytes) -> bool:
        """Tell whether `content` is a file of the format."""

    def other(self, path: pathlib.Path) -> str:
        """Return what is at a path; an empty string for a file of the format, or an empty one."""
        if not path.is_file():
            return "no file"
        if path.stat().st_size and not self.holds(path.read_bytes()):
            return f"a file that is not {self.name}"
        return ""

    def write(
        self, ready: preflight.Checked, goal: pathlib.Path, draft: pathlib.Path
    ) -> FileExportReport:
        """Write a draft, and compare its zeros and its logits with the model's."""
        _require_float32(ready.stripped)
        is_exact = self.precision == "float32"
        serve, signature = endpoint(ready.stripped, ready.specs)
        batch = tf.nest.flatten(ready.batch)
        if self.batch_size is not None:
            taken = np.arange(self.batch_size) % ready.examples
            batch = [array[taken] for array in batch]
            signature = [
                tf.TensorSpec((self.batch_size, *spec.shape[1:]), spec.dtype, name=spec.name)
                for spec in signature
            ]
        named = {spec.name: array for spec, array in zip(signature, batch, strict=True)}
        with flavours.scope(ready.model):
            originals = _probe.outputs(lambda arrays: serve(*arrays), batch)
            converted = self.convert(ready, serve, signature)
        draft.write_bytes(converted.content)
        kernels = _kernels(self.name, ready, self.constants(draft), converted.forms)
        served = self.load(draft)
        tolerance = ready.tolerance * _TOLERANCES[self.precision]
        what = f"the {self.name} file"
        served_outputs = functools.partial(
            _probe.outputs, what=f"The {self.name} file", way_out=_NOT_REPRESENTABLE
        )
        outputs = served_outputs(served, named)
        difference, allowed = preflight.require_same(what, outputs, originals, tolerance)
        if self.batch_size is None:
            # A converter may have fixed the number of examples: try another one.
            single = served_outputs(served, {name: array[:1] for name, array in named.items()})
            preflight.require_same(what, single, [array[:1] for array in originals], tolerance)
        if converted.dense is not None:
            # At any precision, sparse storage may change the logits by rounding only.
            with tempfile.TemporaryDirectory() as folder:
                twin = pathlib.Path(folder) / "dense"
                twin.write_bytes(converted.dense)
                dense = served_outputs(self.load(twin), named)
            largest = max(float(np.abs(array).max() / _probe.scale(array)) for array in dense)
            close = min(tolerance, max(ready.tolerance, _QUANTA * largest))
            preflight.require_same(f"{what} with sparse kernels", outputs, dense, close)
        data_file = converted.data_file
        content = converted.content + (b"" if data_file is None else data_file.read_bytes())
        return FileExportReport(
            path=str(goal),
            format=self.name,
            precision=self.precision,
            weights=ready.weights,
            kernels=kernels,
            expected_sparsity=ready.expected_sparsity,
            inputs=served.inputs,
            outputs=served.outputs,
            max_logit_difference=difference,
            logit_tolerance=allowed if math.isfinite(allowed) else None,
            same_class=_same_class(outputs, originals),
            probe_examples=self.batch_size or ready.examples,
            file_bytes=len(content),
            dense_bytes=None if converted.dense is None else len(converted.dense),
            pointwise=converted.pointwise,
            gzip_bytes=len(gzip.compress(content, 9, mtime=0)),
            ideal_sparse_bytes=ready.ideal_sparse_bytes if is_exact else None,
            sha256=hashlib.sha256(content).hexdigest(),
            settings=self.settings,
            versions=ready.versions(*self.distributions),
            data_file=None if data_file is None else str(data_file),
        )


def endpoint(
    model: Any, specs: Any
) -> tuple[Callable[..., dict[str, tf.Tensor]], list[tf.TensorSpec]]:
    """Return a model in inference mode as a function of flat tensors, and their named specs.

    A tensor without a name is named by its key if the model takes a dict, else "input_0" and so on.
    The function returns a dict: the model's own, or one with keys "output_0" and so on.
    """
    flat = tf.nest.flatten(specs)  # a dict by its sorted keys
    is_flat_dict = isinstance(specs, dict) and len(specs) == len(flat)
    keys = sorted(specs) if is_flat_dict else [f"input_{index}" for index in range(len(flat))]
    signature: dict[str, tf.TensorSpec] = {}
    for index, (key, spec) in enumerate(zip(keys, flat, strict=True)):
        name = spec.name or re.sub(r"\W", "_", str(key))
        name = name if name[0].isalpha() else f"input_{name}"  # accepted by every format
        while name in signature:  # keys "a b" and "a_b" give the same name
            name += f"_{index}"
        signature[name] = tf.TensorSpec(spec.shape, spec.dtype, name=name)

    def serve(*tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs = model(tf.nest.pack_sequence_as(specs, tensors), training=False)
        if not isinstance(outputs, dict) or any(map(tf.nest.is_nested, outputs.values())):
            leaves = enumerate(tf.nest.flatten(outputs))
            outputs = {f"output_{index}": output for index, output in leaves}
        return {name: tf.identity(output) for name, output in outputs.items()}

    return serve, list(signature.values())


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
        folder: the folder to write.
    """
    archive = ready.library.export.ExportArchive()
    archive.track(ready.stripped)
    archive.add_endpoint("serve", serve, signature)
    if ready.library is _keras.keras:
        archive.write_out(str(folder), verbose=False)
    else:
        with _silent_tf_keras():
            archive.write_out(str(folder))


def _kernels(
    form: str,
    ready: preflight.Checked,
    found: Iterable[constants.Constant],
    forms: Mapping[str, constants.Form],
) -> tuple[ExportedKernel, ...]:
    """Return the rows of a report, after checking that the file has all zeros of the model."""
    held = constants.find([weight.values for weight in weights.listed(ready.model)], found)
    rows, faults = [], []
    for row, constant in zip(ready.weights.rows, held, strict=True):
        if constant is None:
            if row.zeros:
                faults.append(f"{row.name} and its {row.zeros:,} zeros are not found")
            rows.append(ExportedKernel(row.name, None, (), "", row.weights, row.zeros, 0))
            continue
        if any(constant.zero_points):
            faults.append(f"{constant.name} does not store 0.0 as 0 but {constant.zero_points}")
        stored = forms.get(constant.name, constants.Form("dense", constant.values.nbytes))
        rows.append(
            ExportedKernel(
                name=row.name,
                tensor=constant.name,
                shape=tuple(map(int, constant.values.shape)),
                dtype=constant.values.dtype.name,
                weights=row.weights,
                model_zeros=row.zeros,
                zeros=constant.zeros,
                stored=stored.kind,
                stored_bytes=stored.size,
                reason=stored.reason,
            )
        )
    if faults:
        raise ValueError(
            f"The {form} file lacks zeros of the model: {'; '.join(faults)}. Its converter has "
            "changed these weights: remove the layers, or build them in another way."
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
    """Return the share of examples of the same class; None without one output of several logits."""
    if len(left) != 1 or left[0].ndim != 2 or left[0].shape[1] == 1:
        return None
    return float(np.mean(left[0].argmax(axis=1) == right[0].argmax(axis=1)))


@contextlib.contextmanager
def _silent_tf_keras() -> Iterator[None]:
    """Keep tf_keras from printing in this thread, as far as its logging switch allows."""
    utils = _keras.tf_keras.utils
    was_enabled = utils.is_interactive_logging_enabled()
    utils.disable_interactive_logging()
    try:
        yield
    finally:
        if was_enabled:
            utils.enable_interactive_logging()
