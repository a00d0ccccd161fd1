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
    hidden name beside `path` and loaded from there by the LiteRT interpreter. Then it is checked
    that every zero of every kernel is a zero in the file, at the same place, and that the logits
    are those of the model. Only then is the file renamed to `path`.

    How far the logits may differ depends on the precision:

    * float32: by 1e-4 of the largest one (or of 1), as for a SavedModel. The converter multiplies
      BatchNorms into kernels, and LiteRT sums in another order. Small networks differ by 1e-7, a
      ResNet-50 of random weights by 6e-5.
    * float16: by 1e-2. Only the weights are float16.
    * int8: by any finite value, since the cost of 8 bits depends on data and training. Weights and
      activations are quantized, the weights per channel and symmetrically, so that 0.0 is stored
      as 0. Inputs and outputs stay float32. The report gives the difference, and how many classes
      are the same. Measure robust accuracy again, with `attacks.Transfer`.

    With `sparse=True`, a kernel of many zeros is stored as its nonzero entries and their indices,
    which makes the file smaller. Dense layers are also run in that form, and so faster, if their
    zeros form blocks of inputs: prune them with `pruning.Block.for_litert()`, or to 97 % zeros or
    more. Other kernels are made dense when the file is loaded. Of their layers, LiteRT runs only
    1x1 convolutions sparsely, and only on some processors (ARM, not x86 with AVX): see
    `sparse_inference`. The report says how each kernel is stored, and why. LiteRT for
    microcontrollers can't load such a file, or runs it wrongly without an error.

    Needs `pip install ".[litert]"` in a checkout.

    Args:
        model: a built model of either Keras, as for `export_saved_model`, that computes in float32.
            Only LiteRT's own operations are used, so that every interpreter runs the file: a
            recurrent layer must be built with `unroll=True`.
        path: the file to write; its name usually ends in `.tflite`.
        precision: "float32", "float16" or "int8".
        calibration: for int8 only: typical inputs, from which the ranges of the activations are
            taken, such as some hundred examples of the training set. Pass one batch as the model
            takes it, shape (examples, ...), or an iterable of batches: a batched
            `tf.data.Dataset`, a generator, a list. Of tuples (x, y) and (x, y, weights), x is used.
            All examples are used. An infinite dataset is refused, and an iterable of unknown length
            after 4,096 examples: pass `dataset.take(n)` or `itertools.islice(batches, n)`.
        sparse: whether to store kernels in sparse form where that makes them smaller.
        expected_sparsity: as for `export_saved_model`.
        probe: as for `export_saved_model`; for int8, None takes 8 examples of `calibration`,
            evenly spaced.
        overwrite: whether to replace a file at `path`, in one step, after the new one is written
            and checked. Only an empty file or one of this format is replaced. If `path` is a link,
            its target is replaced.

    Returns:
        A `FileExportReport`: zeros per kernel, sizes in bytes, signature, versions. `print` it.

    Raises:
        ImportError: LiteRT is not installed.
        FileExistsError, TypeError, RuntimeError, OSError: as `export_saved_model`.
        ValueError: as `export_saved_model`; or a layer does not compute in float32; or
            `calibration` is missing, empty, infinite, or does not fit. What was at `path` is then
            unchanged. LiteRT's converter raises errors of its own.

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
            # Spread over the set, which may be sorted by class.
            step = max(1, settings["calibration_examples"] // _probe.EXAMPLES)
            chosen = slice(None, step * _probe.EXAMPLES, step)
            probe = tf.nest.map_structure(lambda array: array[chosen], calibration)
    elif calibration is not None:
        raise ValueError(f"calibration is for precision='int8' only: {precision} needs none.")
    form = LiteRT(settings, precision, calibration, sparse=sparse)
    return form.export(
        model, path, expected_sparsity=expected_sparsity, probe=probe, overwrite=overwrite
    )


def load_litert(path: str | os.PathLike[str]) -> ServedFile:
    """Load a LiteRT file as a function of batches of any size, on all processor cores.

    The inputs are resized to each batch. The file needs a signature, as `export_litert` and Keras
    write it.

    Args:
        path: the file.

    Returns:
        A `ServedFile`: call it on a batch.

    Raises:
        ImportError: LiteRT is not installed.
        FileNotFoundError: there is no file at `path`.
        ValueError: it is not a LiteRT file with the signature "serving_default".

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
            f"{file} is not a LiteRT file with the signature {_SIGNATURE!r}: {error}"
        ) from error
    return _ServedLiteRT(file, runner)


class LiteRT(writer.FileFormat):
    """The LiteRT format.

    Args:
        settings: further settings, for the report.
        precision: "float32", "float16" or "int8".
        calibration: examples as arrays, for int8; else None.
        sparse: whether to store kernels in sparse form.
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
        """Return the file, converted from a SavedModel: otherwise it would have no signature."""
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            # The converter itself uses the deprecated interpreter, to calibrate.
            warnings.filterwarnings("ignore", r"\s*Warning: tf.lite.Interpreter is d", UserWarning)
            writer.write_saved_model(ready, serve, signature, pathlib.Path(folder))
            try:
                dense = self._converted(folder, signature, sparse=False)
                if not self._sparse:
                    return Converted(dense)
                content = self._converted(folder, signature, sparse=True)
            except Exception as error:
                error.add_note(
                    f"LiteRT's converter could not convert model {ready.stripped.name!r}. Only "
                    "LiteRT's own operations are used; a recurrent layer needs unroll=True."
                )
                raise
        return sparse_litert.corrected(content, dense)

    def _converted(self, folder: str, signature: list[tf.TensorSpec], *, sparse: bool) -> bytes:
        """Return the file that LiteRT's converter makes of a SavedModel."""
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=[_SIGNATURE])
        converter.optimizations = [
            *([tf.lite.Optimize.DEFAULT] if self.precision != "float32" else []),
            *([tf.lite.Optimize.EXPERIMENTAL_SPARSITY] if sparse else []),
        ]
        if self.precision == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if self._calibration is not None:
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter.representative_dataset = functools.partial(
                _batches, signature, self._calibration
            )
        content: bytes = converter.convert()
        return content

    def constants(self, path: pathlib.Path) -> list[Constant]:
        """Return the weights in a file: its constants of floats or int8."""
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
                "LiteRT can't run this file. In int8 this happens after filters without nonzero "
                "weights, whose outputs hardly vary: the ratio of two scales is out of LiteRT's "
                "range. pruning.compact removes such filters, and prune(..., "
                "structure=Unstructured(min_per_filter=1)) avoids them; or use "
                "precision='float32'."
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
    """Yield batches of the calibration set, as dicts by the names of the inputs."""
    arrays = tf.nest.flatten(calibration)
    for start in range(0, len(arrays[0]), _CALIBRATION_BATCH):
        batch = slice(start, start + _CALIBRATION_BATCH)
        yield {spec.name: array[batch] for spec, array in zip(signature, arrays, strict=True)}
