"""From a SavedModel on disk to a function that is called."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import tensorflow as tf

from tscnc_tf import _files, _probe
from tscnc_tf.export import manifest
from tscnc_tf.export.report import ExportReport

__all__ = ["ServedModel", "load_saved_model"]


class ServedModel:
    """An exported model, loaded: `served(x)` returns its logits in float32.

    It can be the `model` of every attack and evaluation: gradients with respect to `x` flow through
    it. It has no Keras layers and can't be trained.

    Args:
        loaded: what `tf.saved_model.load` returned.
        report: what its manifest says.

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
        """What is known of the export, as `export_saved_model` returned it."""
        return self._report

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
            model returns; what is no float keeps its dtype.

        Raises:
            ValueError: `inputs` is of another structure than the model takes.
        """
        leaves = _probe.leaves("inputs", self._specs, inputs)
        specs = tf.nest.flatten(self._specs)
        tensors = [_as(leaf, spec.dtype) for leaf, spec in zip(leaves, specs, strict=True)]
        outputs = self._loaded.serve(tf.nest.pack_sequence_as(self._specs, tensors))
        return tf.nest.map_structure(lambda output: _as(output, tf.float32), outputs)

    def __repr__(self) -> str:
        return f"ServedModel({self._report.path!r}, sparsity={self._report.sparsity:.4f})"


def load_saved_model(path: str | os.PathLike[str]) -> ServedModel:
    """Load what `export_saved_model` wrote, after checking that it still is what was written.

    Checked are the manifest itself, the size and SHA-256 digest of each file, and in the variables
    as loaded that all are finite and have as many zeros as when they were exported. This finds
    damage and mix-ups; it is no protection against somebody who means to deceive. As with every
    SavedModel: it is a program, load it only from where you would take a program.

    Args:
        path: the folder that `export_saved_model` made; it may have been moved since.

    Returns:
        A `ServedModel`: call it on a batch.

    Raises:
        FileNotFoundError: there is no folder at `path`.
        ValueError: there is no manifest, or something differs from it; the error names what.

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
    folder = pathlib.Path(path).expanduser().absolute()
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
        # An export has replaced the folder meanwhile: the files that were read are of two models.


def _load(folder: pathlib.Path) -> ServedModel:
    report = manifest.read(folder)
    loaded = tf.saved_model.load(str(folder))
    manifest.check_variables(report, loaded)
    return ServedModel(loaded, report)


def _identity(folder: pathlib.Path) -> tuple[int, int] | None:
    """Return what tells a folder from another one that takes its place; None if there is none."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _as(value: Any, dtype: tf.DType) -> tf.Tensor:
    """Return a tensor, in `dtype` if both are floats: another precision is no mistake."""
    tensor = tf.convert_to_tensor(value, dtype_hint=dtype)
    return tf.cast(tensor, dtype) if tensor.dtype.is_floating and dtype.is_floating else tensor
