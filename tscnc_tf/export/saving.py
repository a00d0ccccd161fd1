"""From a trained model to a checked SavedModel."""

from __future__ import annotations

import contextlib
import os
import pathlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _files, _keras, _probe
from tscnc_tf.export import checked, manifest, readiness
from tscnc_tf.export.report import ExportedTensor, ExportReport

__all__ = ["export_saved_model"]

_GRAPH = "saved_model.pb"
_PARTS = {_GRAPH, "fingerprint.pb", "keras_metadata.pb", "variables", "assets", manifest.NAME}


def export_saved_model(
    model: Any,
    path: str | os.PathLike[str],
    *,
    expected_sparsity: float | None = None,
    probe: Any = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a model as a SavedModel that serves without us, checked before and after.

    The pruning masks are applied to the model's weights and the pruning wrappers left out; gates
    are folded into the weights that are written (`gates.fold`). Before
    anything is written, it is checked that no variable of a wrapper is left, that every weight
    under a mask is exactly zero, that all weights are finite, that there are as many zeros as
    expected, and that the logits are still the same. The SavedModel is written into a hidden
    folder beside `path`, loaded from there, compared with the model (all variables bit by bit, and
    the logits), and given a manifest, `tscnc_manifest.json`. Only then it is renamed to `path`. So
    there is a whole, checked export at `path`, or what was there before, also if the process is
    killed (the hidden folder, `.<name>.<8 hex digits>`, stays behind then, and may be removed).

    The SavedModel has the endpoint `serve` and the signatures `serve` and `serving_default`, all in
    inference mode: `tf.saved_model.load` and TF-Serving need neither Keras, tfmot nor this package.

    Args:
        model: a built tf_keras model, with pruning wrappers or without, or a built Keras 3 model
            (which has none). Of an `AdversarialTraining`, pass its `model`. The model stays as it
            is, but for its masks being applied; zeros of negative sign become positive, since the
            two mixed don't compress.
        path: the folder to make.
        expected_sparsity: the fraction of zeros, in [0, 1), that every pruned weight must reach, or
            every kernel if the model has no masks. Counted as tfmot prunes: of n weights it keeps
            max(round(n·(1 - s)), 1). None asks for nothing.
        probe: a batch of inputs to compare logits on, shape (examples, ...), in the structure that
            the model takes (array, list or dict). None draws 8 examples from U[0, 1), seeded. A
            subclassed model needs one: the signature takes its shape, with any number of examples.
        overwrite: whether a SavedModel at `path` is replaced. It stays until the new one is written
            and checked, and the two change places in one step (on file systems that can't do that,
            the old one is moved to a hidden name first; if the process is killed right then,
            `load_saved_model` and the next export put it back). Only a folder that holds a
            SavedModel and nothing else is replaced, or an empty one; if `path` is a link, the
            folder that it leads to.

    Returns:
        An `ExportReport`: zeros per kernel, sizes in bytes, signature, versions. `print` it.

    Raises:
        FileExistsError: there is something at `path`, and `overwrite` is False or it is not what
            may be replaced.
        TypeError: `model` is no Keras model, or an argument is of a wrong type.
        ValueError: the model is not built or has no kernels, its wrappers can't be stripped (they
            are inside a subclassed model or layer), an argument is out of range, or a check fails:
            the error names weights and figures. Nothing is written then, and nothing replaced.
        OSError: the disk is full, or can't be written to; the error names `path`.
        RuntimeError: it is called inside the scope of a distribution strategy.

    Example:
        >>> import os, tempfile, tf_keras
        >>> from tscnc_tf import export
        >>> model = tf_keras.Sequential([tf_keras.layers.Dense(3, input_shape=(4,), name="last")])
        >>> folder = os.path.join(tempfile.mkdtemp(), "tiny")
        >>> report = export.export_saved_model(model, folder)
        >>> [(row.name, row.shape, row.zeros) for row in report.kernels]
        [('last', (4, 3), 0)]
    """
    replacement = _files.Replacement(_checks.boolean("overwrite", overwrite), _require_saved_model)
    goal = _files.free_path("path", path, replacement)
    ready = checked.check(model, expected_sparsity, probe)
    with _files.new_directory("path", goal, replacement) as draft:
        with readiness.scope(model):
            _write(ready.library, ready.stripped, ready.specs, draft)
        loaded = tf.saved_model.load(str(draft))
        _require_same_variables(model, ready.stripped, loaded)
        served = _probe.outputs(loaded.serve, ready.batch)
        apart = checked.require_same(
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
            max_logit_difference=apart,
            logit_tolerance=ready.tolerance,
            probe_examples=ready.examples,
            saved_model_bytes=sum(facts["bytes"] for facts in files.values()),
            gzip_bytes=manifest.gzip_size(draft),
            ideal_sparse_bytes=ready.ideal_sparse_bytes,
            files=files,
            versions=checked.versions(ready.library),
        )
        manifest.write(draft, report)
    return report


def _require_saved_model(path: pathlib.Path) -> None:
    """Raise a FileExistsError unless all that would be lost at a path is a SavedModel."""
    found = {file.name for file in path.iterdir()} if path.is_dir() else None
    if found is None:
        what = "no folder"
    elif others := sorted(found - _PARTS):
        what = f"a folder with {others[0]!r}, which is no part of a SavedModel"
    elif found and not found & {_GRAPH, manifest.NAME}:
        what = f"a folder without {_GRAPH}"
    else:
        return
    raise FileExistsError(
        f"path is {what}: {path}. overwrite=True replaces a SavedModel, and nothing else: remove "
        "it yourself, or choose another path."
    )


def _require_same_variables(model: Any, stripped: Any, loaded: Any) -> None:
    """Raise unless a loaded SavedModel has the variables of the stripped model, bit by bit."""
    theirs = set(readiness.wrapper_variables(model).values())
    reachable = tf.train.TrackableView(loaded).descendants()
    faults = [v.name for v in reachable if isinstance(v, tf.Variable) and v.name in theirs]
    originals, restored = readiness.variables(stripped), manifest.variables(loaded)
    if len(restored) != len(originals):
        faults.append(f"{len(restored)} instead of {len(originals)} variables")
    for before, after in zip(originals, restored, strict=False):
        if not np.array_equal(manifest.values(before), manifest.values(after)):
            faults.append(after.name)
    if faults:
        raise ValueError(
            f"The SavedModel, loaded again, differs from the model in {', '.join(faults)}."
        )


def write_endpoint(
    library: types.ModuleType,
    model: Any,
    serve: Callable[..., Any],
    signature: list[Any],
    folder: pathlib.Path,
) -> None:
    """Write a SavedModel with the endpoint `serve`, a function of the model.

    Args:
        library: the Keras that the model is made of.
        model: what the function uses.
        serve: the function.
        signature: the specs of its arguments.
        folder: where to.
    """
    archive = library.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", serve, signature)
    if library is _keras.keras:
        archive.write_out(str(folder), verbose=False)
    else:
        with _silent_tf_keras():
            archive.write_out(str(folder))


def _write(library: types.ModuleType, model: Any, specs: Any, folder: pathlib.Path) -> None:
    """Write what `model.export` writes, but in inference mode whatever the model's default is."""

    def serve(inputs: Any) -> Any:
        return model(inputs, training=False)

    write_endpoint(library, model, serve, [specs], folder)


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


def _tensors(signature: dict[str, Any]) -> tuple[ExportedTensor, ...]:
    return tuple(
        ExportedTensor(name, tuple(spec.shape.as_list()), spec.dtype.name)
        for name, spec in sorted(signature.items())
    )
