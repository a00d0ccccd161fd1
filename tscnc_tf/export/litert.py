"""LiteRT (TensorFlow Lite): one file for phones and microcontrollers, dense or sparse."""

from __future__ import annotations

import functools
import os
import pathlib
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _extras, _files, _litert_file, _probe
from tscnc_tf.export import preflight, sparse_litert, writer
from tscnc_tf.export.calibration import examples
from tscnc_tf.export.constants import Constant, Converted
from tscnc_tf.export.report import ExportedTensor, FileExportReport
from tscnc_tf.export.served_file import ServedFile

__all__ = ["export_litert", "load_litert"]

_SIGNATURE = "serving_default"
_CALIBRATION_BATCH = 32


def export_litert(
    model: Any,
    path: str | os.PathLike[str],
    *,
    precision: str = "float32",
    calibration: Any = None,
    sparse: bool = False,
    expected_sparsity: float | None = None,
    probe: Any = None,
    overwrite: bool = False,
) -> FileExportReport:
    """Write a model as a LiteRT file (`.tflite`), checked before and after.

    The model is stripped and checked as by `export_saved_model`. The file is written under a
    hidden name beside `path`, loaded from there by the LiteRT interpreter, and checked: every zero
    of every kernel is a zero in the file, in its place, and the logits are those of the model.
    Only then it appears at `path`, and replaces what was there.

    In float32 the logits may differ by 1e-4 of the largest one (or of 1), as for a SavedModel: the
    converter multiplies BatchNorms into kernels, and LiteRT takes sums in another order. (Small
    networks differ by 1e-7, a ResNet-50 of random weights by 6e-5.) In float16 only the weights are
    of that precision, and the logits may differ by 1e-2. In int8 weights and activations
    are quantised (per channel and symmetric the weights, so that 0.0 is stored as 0), input and
    output stay float32, and any finite difference is allowed: it depends on data and training what
    8 bits cost. The report says how much it was, and whether the classes are the same; robust
    accuracy is to be measured again, with `attacks.Transfer`.

    With `sparse=True` kernels of many zeros are written as their other entries and where these are,
    which makes the file smaller. Dense layers are then run in that form, and so faster, where their
    zeros come in blocks of inputs: prune them in `pruning.Block.for_litert()`, or to 99 %. Other
    kernels are made dense when the file is loaded, and run as ever; of these, LiteRT runs 1x1
    convolutions sparsely on some processors (ARM, not x86 with AVX). The report says how each
    kernel is stored, and why. LiteRT for microcontrollers can't load such a file.

    Needs `pip install "tscnc_tf[litert]"`.

    Args:
        model: a built model of either Keras, as for `export_saved_model`, that computes in float32.
            Only LiteRT's own operations are used, so that every interpreter runs the file: a
            recurrent layer must be built with `unroll=True`.
        path: the file to make; its name usually ends in `.tflite`.
        precision: "float32", "float16" or "int8".
        calibration: for int8, and only for it: typical inputs, from which the ranges of the
            activations are taken; some hundred examples of the training set. Either one batch as
            the model takes it, shape (examples, ...), or an iterable of batches: a batched
            `tf.data.Dataset`, a generator, a list. Of tuples (x, y) and (x, y, weights) x is taken,
            as Keras takes it. All examples are used; what is endless is refused, and so is what
            doesn't say how many it has, after 4,096 examples: pass `dataset.take(n)` or
            `itertools.islice(batches, n)`.
        sparse: whether kernels are in sparse form where that makes them smaller.
        expected_sparsity: as for `export_saved_model`.
        probe: a batch of inputs to compare logits on. None takes the first 8 examples of
            `calibration`, or draws 8 from U[0, 1), seeded.
        overwrite: whether a file of this format at `path` is replaced. It stays until the new one
            is written and checked, and is replaced in one step; nothing else is replaced but an
            empty file. If `path` is a link, it is the file that it leads to.

    Returns:
        A `FileExportReport`: zeros per kernel, sizes in bytes, signature, versions. `print` it.

    Raises:
        ImportError: LiteRT is not installed.
        FileExistsError, TypeError, RuntimeError, OSError: as `export_saved_model`.
        ValueError: as `export_saved_model`; or a layer computes in half precision, or `calibration`
            is missing, empty, endless or does not fit. LiteRT's converter has errors of its own.
            What was at `path` is as it was then.

    Example:
        >>> import os, tempfile, numpy as np, tf_keras
        >>> from tscnc_tf import export
        >>> model = tf_keras.Sequential([tf_keras.layers.Dense(3, input_shape=(4,), name="last")])
        >>> model.layers[0].kernel.assign(np.eye(4, 3)) is None
        False
        >>> path = os.path.join(tempfile.mkdtemp(), "tiny.tflite")
        >>> report = export.export_litert(model, path)
        >>> [(row.name, row.shape, row.zeros) for row in report.kernels]
        [('last', (3, 4), 9)]
    """
    _extras.require_extra("ai_edge_litert.interpreter", "litert")
    _checks.one_of("precision", precision, ("float32", "float16", "int8"))
    sparse = _checks.boolean("sparse", sparse)
    settings = {}
    if precision == "int8":
        calibration = examples(model, calibration)
        settings["calibration_examples"] = len(tf.nest.flatten(calibration)[0])
        if probe is None:
            probe = tf.nest.map_structure(lambda array: array[: _probe.EXAMPLES], calibration)
    elif calibration is not None:
        raise ValueError(f"calibration is for precision='int8' only: {precision} needs none.")
    form = LiteRT(settings, precision, calibration, sparse=sparse)
    return form.export(
        model, path, expected_sparsity=expected_sparsity, probe=probe, overwrite=overwrite
    )


def load_litert(path: str | os.PathLike[str]) -> ServedFile:
    """Load a LiteRT file, for batches of any size, on all processors.

    The inputs are resized to each batch. The file needs a signature, as `export_litert` and Keras
    write it.

    Args:
        path: the file.

    Returns:
        A `ServedFile`: call it on a batch.

    Raises:
        ImportError: LiteRT is not installed.
        FileNotFoundError: there is no file at `path`.
        ValueError: it is no LiteRT file with a signature.

    Example:
        >>> import os, tempfile, tf_keras
        >>> from tscnc_tf import export
        >>> model = tf_keras.Sequential([tf_keras.layers.Dense(3, input_shape=(4,))])
        >>> path = os.path.join(tempfile.mkdtemp(), "tiny.tflite")
        >>> _ = export.export_litert(model, path)
        >>> served = export.load_litert(path)
        >>> served([[0.0, 0.0, 0.0, 0.0]]).numpy().tolist()
        [[0.0, 0.0, 0.0]]
    """
    library = _extras.require_extra("ai_edge_litert.interpreter", "litert")
    file = _files.require_file("path", path)
    try:
        interpreter = library.Interpreter(str(file), num_threads=os.cpu_count())
        runner = interpreter.get_signature_runner(_SIGNATURE)
    except ValueError as error:
        raise ValueError(
            f"{file} is no LiteRT file with the signature {_SIGNATURE!r}: {error}"
        ) from error
    return _ServedLiteRT(file, runner)


class LiteRT(writer.FileFormat):
    """The format.

    Args:
        settings: for the report.
        precision: "float32", "float16" or "int8".
        calibration: examples as arrays, for int8; else None.
        sparse: whether kernels are in sparse form.
    """

    name = "LiteRT"
    distributions = ("ai-edge-litert",)
    load = staticmethod(load_litert)

    def __init__(
        self, settings: dict[str, int], precision: str, calibration: Any, *, sparse: bool = False
    ) -> None:
        super().__init__(settings, precision)
        self._calibration, self._sparse = calibration, sparse

    def convert(
        self, ready: preflight.Checked, serve: Callable[..., Any], signature: list[tf.TensorSpec]
    ) -> Converted:
        """Return the file, made by way of a SavedModel: only so it has a signature."""
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            # It is the converter itself that uses the interpreter, to calibrate.
            warnings.filterwarnings("ignore", r"\s*Warning: tf.lite.Interpreter is d", UserWarning)
            writer.write_saved_model(ready, serve, signature, pathlib.Path(folder))
            converter = tf.lite.TFLiteConverter.from_saved_model(
                folder, signature_keys=[_SIGNATURE]
            )
            reduces, is_sparse = self.precision != "float32", self._sparse
            converter.optimizations = [
                *([tf.lite.Optimize.DEFAULT] if reduces else []),
                *([tf.lite.Optimize.EXPERIMENTAL_SPARSITY] if is_sparse else []),
            ]
            if self.precision == "float16":
                converter.target_spec.supported_types = [tf.float16]
            if self._calibration is not None:
                converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
                converter.representative_dataset = functools.partial(
                    _batches, signature, self._calibration
                )
            try:
                content = converter.convert()
            except Exception as error:
                error.add_note(
                    f"LiteRT's converter could not convert model {ready.stripped.name!r}. Only "
                    "LiteRT's own operations are used; a recurrent layer needs unroll=True."
                )
                raise
        return sparse_litert.settle(content) if self._sparse else Converted(content)

    def constants(self, path: pathlib.Path) -> list[Constant]:
        """Return the weights in a file: its constants of floats and int8."""
        file = _litert_file.File(path.read_bytes())
        tensors = [graph.tensors[number] for graph, number in file.constants()]
        return [
            Constant(tensor.name.decode(), file.array(tensor), _litert_file.zero_points(tensor))
            for tensor in tensors
        ]

    def holds(self, content: bytes) -> bool:
        """Tell whether this is a file of the format."""
        return _litert_file.is_litert(content)


class _ServedLiteRT(ServedFile):
    """A LiteRT file. An interpreter runs one call at a time, hence the lock."""

    def __init__(self, path: pathlib.Path, runner: Any) -> None:
        super().__init__(
            path, _tensors(runner.get_input_details()), _tensors(runner.get_output_details())
        )
        self._runner, self._lock = runner, threading.Lock()

    def _run(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            with self._lock:
                return self._runner(**arrays)
        except RuntimeError as error:
            error.add_note(
                "LiteRT can't run this file. In int8 that happens behind filters without weights, "
                "where values hardly change: the ratio of two scales is out of LiteRT's range. "
                "pruning.compact removes such filters, prune(..., structure=Unstructured("
                "min_per_filter=1)) leaves none; or take precision='float32'."
            )
            raise


def _tensors(details: dict[str, Any]) -> list[ExportedTensor]:
    return [
        ExportedTensor(
            name,
            tuple(None if size < 0 else int(size) for size in found["shape_signature"]),
            np.dtype(found["dtype"]).name,
        )
        for name, found in sorted(details.items())
    ]


def _batches(signature: list[tf.TensorSpec], calibration: Any) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches of the calibration set by the names of the inputs."""
    arrays = tf.nest.flatten(calibration)
    for start in range(0, len(arrays[0]), _CALIBRATION_BATCH):
        batch = slice(start, start + _CALIBRATION_BATCH)
        yield {spec.name: array[batch] for spec, array in zip(signature, arrays, strict=True)}
