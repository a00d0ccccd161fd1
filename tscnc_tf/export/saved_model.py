"""SavedModel: export with a manifest, and the exported model as a function."""

from __future__ import annotations

import functools
import os
import pathlib
import re
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _files, _probe, _reports
from tscnc_tf._keras import flavours, masks
from tscnc_tf.export import manifest, preflight, writer
from tscnc_tf.export.report import ExportedTensor, ExportReport

__all__ = ["ServedModel", "export_saved_model", "load_saved_model"]

_GRAPH = "saved_model.pb"
_VARIABLES = re.compile(r"variables\.(index|data-\d+-of-\d+)")
_PARTS = {_GRAPH, "fingerprint.pb", "keras_metadata.pb", "variables", "assets", manifest.NAME}


def export_saved_model(
    model: Any,
    path: str | os.PathLike[str],
    *,
    expected_sparsity: float | None = None,
    probe: Any = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a model as a SavedModel that needs no Keras to be served, checked before and after.

    The pruning masks are applied to the model's weights. The written model has no pruning wrappers,
    and its weights include the gates (`gates.fold`). Before it is written, it is checked that no
    variable of a wrapper is left, that every masked weight is exactly zero, that all weights are
    finite, that there are as many zeros as expected, and that the logits are unchanged.

    The SavedModel is written into a hidden folder beside `path`, loaded from there, compared with
    the model (all variables bit by bit, and the logits), and given a manifest,
    `tscnc_manifest.json`. Only then is it renamed to `path`. So `path` holds a complete, checked
    export or what was there before, even if the process is killed. The hidden folder,
    `.<name>.<8 hex digits>`, may then remain, and can be deleted.

    The SavedModel has the endpoint `serve` and the signatures `serve` and `serving_default`, all in
    inference mode: `tf.saved_model.load` and TF-Serving need neither Keras, tfmot nor this package.

    Args:
        model: a built tf_keras model, with or without pruning wrappers, or a built Keras 3 model
            (which has none). For an `AdversarialTraining`, pass its `model`. The model itself is
            changed in two ways only: its masks are applied, and zeros of negative sign become
            positive, since a mixture of both does not compress.
        path: the folder to write.
        expected_sparsity: the fraction s of zeros, in [0, 1), that every pruned weight must reach,
            or every kernel if the model has no masks. It is counted as tfmot prunes: of n weights,
            max(round(n·(1 - s)), 1) are kept. None requires nothing.
        probe: a batch of inputs to compare logits on, shape (examples, ...), in the structure that
            the model takes (array, list or dict). None draws 8 examples from U[0, 1), or U[0, 256)
            for a model that begins by scaling pixels of that range, seeded. It is required for a
            subclassed model, whose signature gets its shape from it, with any number of examples.
        overwrite: whether to replace a SavedModel at `path`. After the new one is written and
            checked, the two are swapped in one step. (On file systems that can't do that, the old
            one is first moved to a hidden name. If the process is killed at that moment,
            `load_saved_model` and the next export move it back.) Only an empty folder, or one that
            holds a SavedModel and nothing else, is replaced. If `path` is a link, its target is
            replaced.

    Returns:
        An `ExportReport`: zeros per kernel, sizes in bytes, signature, versions. `print` it.

    Raises:
        FileExistsError: `path` exists, and `overwrite` is False or it must not be replaced.
        TypeError: `model` is not a Keras model, or an argument has a wrong type.
        ValueError: the model is not built or has no kernels; its wrappers can't be stripped, since
            they are inside a subclassed model or layer; an argument is out of range; or a check
            fails, and the message names weights and figures. Nothing is written or replaced then.
        OSError: the disk is full or not writable; the message names `path`.
        RuntimeError: the call is inside the scope of a distribution strategy.

    Example:
        >>> import os, tempfile, tf_keras
        >>> from tscnc_tf import export
        >>> model = tf_keras.Sequential([tf_keras.layers.Dense(3, input_shape=(4,), name="last")])
        >>> folder = os.path.join(tempfile.mkdtemp(), "tiny")
        >>> report = export.export_saved_model(model, folder)
        >>> [(row.name, row.shape, row.zeros) for row in report.kernels]
        [('last', (4, 3), 0)]
    """
    form = _SavedModel()
    return form.export(
        model, path, expected_sparsity=expected_sparsity, probe=probe, overwrite=overwrite
    )


class ServedModel:
    """An exported model, loaded: `served(x)` returns its logits in float32.

    It can be the `model` of every attack and evaluation: gradients with respect to `x` flow through
    it. It has no Keras layers and can't be trained.

    Args:
        loaded: what `tf.saved_model.load` returned.
        report: the report in its manifest.

    Example:
        See `load_saved_model`.
    """

    def __init__(self, loaded: Any, report: ExportReport) -> None:
        self._loaded = loaded  # keeps the variables alive
        self._report = report
        (specs,), _ = loaded.serve.concrete_functions[0].structured_input_signature
        self._specs = specs

    @property
    def report(self) -> ExportReport:
        """The report of the export, as `export_saved_model` returned it."""
        return self._report

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        variables = self._loaded.serve.concrete_functions[0].variables
        return _reports.digest((each.name, each.numpy()) for each in variables)

    @property
    def signatures(self) -> Any:
        """The signatures by name, `serve` and `serving_default`: functions of keyword tensors."""
        return self._loaded.signatures

    def __call__(self, inputs: Any) -> Any:
        """Return the logits for a batch.

        Args:
            inputs: tensor or array of shape (examples, ...), floats of any precision where the
                model takes floats; a list or dict of them if the model has several inputs.

        Returns:
            A float32 tensor of shape (examples, classes), or the structure of tensors that the
            model returns; tensors other than floats keep their dtype.

        Raises:
            ValueError: `inputs` has another structure than the model takes.
        """
        leaves = _probe.leaves("inputs", self._specs, inputs)
        specs = tf.nest.flatten(self._specs)
        tensors = [_as(leaf, spec.dtype) for leaf, spec in zip(leaves, specs, strict=True)]
        outputs = self._loaded.serve(tf.nest.pack_sequence_as(self._specs, tensors))
        return tf.nest.map_structure(lambda output: _as(output, tf.float32), outputs)

    def __repr__(self) -> str:
        return f"ServedModel({self._report.path!r}, sparsity={self._report.sparsity:.4f})"


def load_saved_model(path: str | os.PathLike[str]) -> ServedModel:
    """Load what `export_saved_model` wrote, after checking that it is unchanged.

    Checked are the manifest, the size and SHA-256 digest of each file, and the loaded variables:
    all must be finite and have as many zeros as when they were exported. This detects damage and
    mix-ups, but not deliberate manipulation. A SavedModel is a program: load it only from sources
    that you would run a program from.

    Args:
        path: the folder that `export_saved_model` wrote; it may have been moved since.

    Returns:
        A `ServedModel`: call it on a batch.

    Raises:
        FileNotFoundError: there is no folder at `path`.
        ValueError: there is no manifest, or something differs from it; the message names what.

    Example:
        >>> import os, tempfile, tf_keras
        >>> from tscnc_tf import export
        >>> model = tf_keras.Sequential([tf_keras.layers.Dense(3, input_shape=(4,))])
        >>> folder = os.path.join(tempfile.mkdtemp(), "tiny")
        >>> _ = export.export_saved_model(model, folder)
        >>> served = export.load_saved_model(folder)
        >>> served([[0.0, 0.0, 0.0, 0.0]]).numpy().tolist()
        [[0.0, 0.0, 0.0]]
    """
    folder = _files.absolute("path", path)
    _files.restore(folder.resolve())
    if not folder.is_dir():
        raise FileNotFoundError(f"path must be a folder with an exported model, got {folder}.")
    while True:
        identity = _identity(folder)
        try:
            served = _load(folder)
        except Exception:
            if _identity(folder) == identity:
                raise
        else:
            if _identity(folder) == identity:
                return served
        # An export has replaced the folder meanwhile, so the files read may be of two models.


class _SavedModel(writer.Format):
    """The SavedModel format: a folder with a manifest."""

    kind = "a SavedModel"
    new = staticmethod(_files.new_directory)

    def other(self, path: pathlib.Path) -> str:
        """Return what is at a path; empty if it is only a SavedModel or an empty folder."""
        found = {file.name for file in path.iterdir()} if path.is_dir() else None
        if found is None:
            return "no folder"
        weights = path.glob("variables/*")
        found |= {f"variables/{f.name}" for f in weights if not _VARIABLES.fullmatch(f.name)}
        if others := sorted(found - _PARTS):
            return f"a folder with {others[0]!r}, which is no part of a SavedModel"
        if found and not found & {_GRAPH, manifest.NAME}:
            return f"a folder without {_GRAPH}"
        return ""

    def write(
        self, ready: preflight.Checked, goal: pathlib.Path, draft: pathlib.Path
    ) -> ExportReport:
        """Write a draft, and compare its variables and its logits with the model's."""
        with flavours.scope(ready.model):
            _write(ready, draft)
        loaded = tf.saved_model.load(str(draft))
        _require_same_variables(ready, loaded)
        served = _probe.outputs(loaded.serve, ready.batch)
        difference, allowed = preflight.require_same(
            "the SavedModel, loaded again,", served, ready.logits, ready.tolerance
        )
        files = manifest.file_facts(draft)
        signature = loaded.signatures["serving_default"]
        report = ExportReport(
            path=str(goal),
            weights=ready.weights,
            variables=manifest.variable_facts(loaded),
            expected_sparsity=ready.expected_sparsity,
            inputs=_tensors(signature.structured_input_signature[1]),
            outputs=_tensors(signature.structured_outputs),
            max_logit_difference=difference,
            logit_tolerance=allowed,
            probe_examples=ready.examples,
            saved_model_bytes=sum(facts["bytes"] for facts in files.values()),
            gzip_bytes=manifest.gzip_size(draft),
            ideal_sparse_bytes=ready.ideal_sparse_bytes,
            files=files,
            versions=ready.versions(),
        )
        manifest.write(draft, report)
        return report


def _require_same_variables(ready: preflight.Checked, loaded: Any) -> None:
    """Raise a ValueError unless a SavedModel has the stripped model's variables, bit by bit."""
    theirs = set(masks.names(ready.model).values())
    reachable = tf.train.TrackableView(loaded).descendants()
    faults = [v.name for v in reachable if isinstance(v, tf.Variable) and v.name in theirs]
    originals, restored = preflight.variables(ready.stripped), manifest.variables(loaded)
    if len(restored) != len(originals):
        faults.append(f"{len(restored)} instead of {len(originals)} variables")
    for before, after in zip(originals, restored, strict=False):
        if not np.array_equal(manifest.values(before), manifest.values(after)):
            faults.append(after.name)
    if faults:
        raise ValueError(
            f"The SavedModel, loaded again, differs from the model in {', '.join(faults)}."
        )


def _write(ready: preflight.Checked, folder: pathlib.Path) -> None:
    """Write the SavedModel that `model.export` writes, but always in inference mode."""

    def serve(inputs: Any) -> Any:
        return ready.stripped(inputs, training=False)

    writer.write_saved_model(ready, serve, [ready.specs], folder)


def _tensors(signature: dict[str, Any]) -> tuple[ExportedTensor, ...]:
    return tuple(
        ExportedTensor(name, tuple(spec.shape.as_list()), spec.dtype.name)
        for name, spec in sorted(signature.items())
    )


def _load(folder: pathlib.Path) -> ServedModel:
    report = manifest.read(folder)
    loaded = tf.saved_model.load(str(folder))
    manifest.check_variables(report, loaded)
    return ServedModel(loaded, report)


def _identity(folder: pathlib.Path) -> tuple[int, int] | None:
    """Return the device and inode of a folder, which a replacement changes; None if missing."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _as(value: Any, dtype: tf.DType) -> tf.Tensor:
    """Return a tensor, cast to `dtype` if both are floats."""
    tensor = tf.convert_to_tensor(value, dtype_hint=dtype)
    return tf.cast(tensor, dtype) if tensor.dtype.is_floating and dtype.is_floating else tensor
