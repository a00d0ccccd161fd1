"""ONNX: one file for ONNX Runtime and other runtimes that read the format."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _extras, _files
from tscnc_tf.export import preflight, writer
from tscnc_tf.export.constants import Constant, Converted
from tscnc_tf.export.report import ExportedTensor, FileExportReport
from tscnc_tf.export.served_file import ServedFile

__all__ = ["export_onnx", "load_onnx"]

_OLDEST_OPSET = 13
# External data, in bytes: the alignment of the tensors, and the largest one that stays inline.
_ALIGNMENT, _LARGEST_INLINE = 64, 4096
_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16"}


def export_onnx(
    model: Any,
    path: str | os.PathLike[str],
    *,
    expected_sparsity: float | None = None,
    probe: Any = None,
    opset: int | None = None,
    batch_size: int | None = None,
    external_data: bool = False,
    overwrite: bool = False,
) -> FileExportReport:
    """Write a model as an ONNX file, checked before and after.

    The model is stripped and checked as by `export_saved_model`, and converted by tf2onnx. The
    file is checked as by `export_litert`, in ONNX Runtime, and also that it is valid. The logits
    may differ by 1e-4 of the largest one (or of 1). Kernels are dense: ONNX Runtime has no others,
    so zeros make the file neither smaller nor faster.

    Needs `pip install ".[onnx]"` in a checkout.

    Args:
        model: a built model of either Keras, as for `export_saved_model`, that computes in float32.
        path: the file to write; its name usually ends in `.onnx`.
        expected_sparsity: as for `export_saved_model`.
        probe: as for `export_saved_model`.
        opset: the version of ONNX's operations, from 13 to the newest of tf2onnx (18); None for the
            default of tf2onnx (15).
        batch_size: the number of examples that the file takes, for runtimes that need a fixed one;
            None for any number: the first dimension of the inputs is then named `batch`.
        external_data: whether to store all tensors of more than 4 KiB in a second file beside
            `path`, `<name>.<8 hex digits>.data`, which a runtime can map into memory. The first
            file names it, so move the two together. It is complete before the first file appears
            at `path`. After that, the one of a replaced export is removed; if the export fails,
            the new one is. Models of more than 2 GB can't be exported this way either, as tf2onnx
            makes a single file first (its own `large_model` fails with NumPy 2).
        overwrite: as for `export_litert`.

    Returns:
        A `FileExportReport`: zeros per kernel, sizes in bytes, signature, versions. `print` it.

    Raises:
        ImportError: onnx, tf2onnx or ONNX Runtime is not installed.
        FileExistsError, TypeError, RuntimeError, OSError: as `export_saved_model`.
        ValueError: as `export_saved_model`; or a layer does not compute in float32; or ONNX has no
            equivalent of an operation of the model. What was at `path` is then unchanged.

    Example:
        >>> import os, tempfile, numpy as np, tf_keras
        >>> from tscnc_tf import export
        >>> model = tf_keras.Sequential([tf_keras.layers.Dense(3, input_shape=(4,), name="last")])
        >>> model.layers[0].kernel.assign(np.eye(4, 3)) is None
        False
        >>> path = os.path.join(tempfile.mkdtemp(), "tiny.onnx")
        >>> report = export.export_onnx(model, path)
        >>> [(row.name, row.shape, row.zeros) for row in report.kernels]
        [('last', (4, 3), 9)]
    """
    for module in ("onnx", "onnxruntime", "tf2onnx"):
        _extras.require_extra(module, "onnx")
    known = _extras.require_extra("tf2onnx.constants", "onnx")
    opset = known.PREFERRED_OPSET if opset is None else opset
    newest = max(known.OPSET_TO_IR_VERSION)
    if _checks.integer("opset", opset, minimum=_OLDEST_OPSET) > newest:
        raise ValueError(f"opset must be <= {newest}, the newest of tf2onnx, got {opset}.")
    settings = {"opset": opset}
    if _checks.boolean("external_data", external_data):
        settings["external_data"] = True
    if batch_size is not None:
        batch_size = settings["batch_size"] = _checks.integer("batch_size", batch_size, minimum=1)
    form = ONNX(settings, batch_size)
    return form.export(
        model, path, expected_sparsity=expected_sparsity, probe=probe, overwrite=overwrite
    )


def load_onnx(path: str | os.PathLike[str]) -> ServedFile:
    """Load an ONNX file as a function of batches, on all processor cores.

    The batches may have any size, unless the file has a fixed one (`batch_size`).

    Args:
        path: the file.

    Returns:
        A `ServedFile`: call it on a batch.

    Raises:
        ImportError: ONNX Runtime is not installed.
        FileNotFoundError: there is no file at `path`.
        ValueError: ONNX Runtime can't read it; its error is part of the message.

    Example:
        >>> import os, tempfile, tf_keras
        >>> from tscnc_tf import export
        >>> model = tf_keras.Sequential([tf_keras.layers.Dense(3, input_shape=(4,))])
        >>> path = os.path.join(tempfile.mkdtemp(), "tiny.onnx")
        >>> _ = export.export_onnx(model, path)
        >>> served = export.load_onnx(path)
        >>> served([[0.0, 0.0, 0.0, 0.0]]).numpy().tolist()
        [[0.0, 0.0, 0.0]]
    """
    library = _extras.require_extra("onnxruntime", "onnx")
    file = _files.require_file("path", path)
    try:
        session = library.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common base class
        raise ValueError(f"{file} can't be read by ONNX Runtime: {error}") from error
    return _ServedONNX(file, session)


class ONNX(writer.FileFormat):
    """The ONNX format; the settings are opset, external data and batch size.

    Each export gives its external data a new name. So the file at the path, whether the old or the
    new one, always finds its own weights.
    """

    name = "ONNX"
    distributions = ("onnx", "tf2onnx", "onnxruntime")
    load = staticmethod(load_onnx)

    def __init__(self, settings: Mapping[str, int], batch_size: int | None = None) -> None:
        super().__init__(settings, batch_size=batch_size)
        self._goal: pathlib.Path | None = None
        self._data: pathlib.Path | None = None
        self._files: set[pathlib.Path] = set()

    def export(self, model: Any, path: str | os.PathLike[str], **options: Any) -> Any:
        """Export, then remove the external data that the file at the path does not name."""
        try:
            return super().export(model, path, **options)
        finally:
            if self._goal is not None:
                for file in self._files - _external_data(self._goal):
                    file.unlink(missing_ok=True)

    def write(
        self, ready: preflight.Checked, goal: pathlib.Path, draft: pathlib.Path
    ) -> FileExportReport:
        """Write a draft, with external data if requested."""
        self._goal, self._files = goal, _external_data(goal)
        if "external_data" in self.settings:
            self._data = goal.with_name(f"{goal.name[:200]}.{secrets.token_hex(4)}.data")
            self._files.add(self._data)
        return super().write(ready, goal, draft)

    def convert(
        self,
        ready: preflight.Checked,  # noqa: ARG002 - `serve` is enough here
        serve: Callable[..., Any],
        signature: list[tf.TensorSpec],
    ) -> Converted:
        """Return the file that tf2onnx makes, with all weights in it or in the external data."""
        onnx = _extras.require_extra("onnx", "onnx")
        convert = _extras.require_extra("tf2onnx.convert", "onnx")
        function = tf.function(serve, input_signature=signature)
        with _inlined():
            concrete = function.get_concrete_function()
        proto, _ = convert.from_function(function, signature, opset=self.settings["opset"])
        _embed(onnx, proto.graph, concrete)
        for tensor in (*proto.graph.input, *proto.graph.output):
            dimensions = tensor.type.tensor_type.shape.dim
            if dimensions and dimensions[0].dim_param:
                dimensions[0].dim_param = "batch"  # tf2onnx names it by a running number
        if self._data is not None:
            _store(onnx, proto.graph, self._data)
        return Converted(proto.SerializeToString(), data_file=self._data)

    def constants(self, path: pathlib.Path) -> list[Constant]:
        """Return the weights in a valid file: its float32 constants, those in loops included."""
        onnx = _extras.require_extra("onnx", "onnx")
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except onnx.checker.ValidationError as error:
            raise ValueError(
                f"The model can't be written as ONNX with opset {self.settings['opset']}: {error} "
                "Replace the layer that uses the operation (Erfc: activation 'gelu' in Keras 3; "
                "take lambda x: gelu(x, approximate=True)), or try a newer opset."
            ) from error
        return [
            Constant(tensor.name, onnx.numpy_helper.to_array(tensor))
            for tensor in _tensors_in(onnx.load(path).graph)
            if tensor.data_type == onnx.TensorProto.FLOAT
        ]

    def holds(self, content: bytes) -> bool:
        """Tell whether it can be parsed: the format has no magic number, but requires a version."""
        onnx = _extras.require_extra("onnx", "onnx")
        try:
            found = onnx.load_model_from_string(content)
        except Exception:  # protobuf's parser has an error of its own
            return False
        # Other files, such as a SavedModel's graph, can be parsed, too.
        return found.ir_version > 0 and len(found.opset_import) > 0 and len(found.graph.output) > 0


class _ServedONNX(ServedFile):
    """An ONNX file. A session runs calls concurrently."""

    def __init__(self, path: pathlib.Path, session: Any) -> None:
        super().__init__(path, _tensors(session.get_inputs()), _tensors(session.get_outputs()))
        self._session = session

    def _run(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [tensor.name for tensor in self.outputs]
        return dict(zip(names, self._session.run(names, arrays), strict=True))


def _tensors(arguments: Any) -> list[ExportedTensor]:
    return [
        ExportedTensor(
            argument.name,
            tuple(size if isinstance(size, int) else None for size in argument.shape),
            _DTYPES.get(argument.type, argument.type.removeprefix("tensor(").removesuffix(")")),
        )
        for argument in arguments
    ]


@contextlib.contextmanager
def _inlined() -> Iterator[None]:
    """Trace nested functions as part of the outer one.

    Keras 3 compiles grouped convolutions by XLA, in a function that tf2onnx can't convert.
    """
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


def _embed(onnx: Any, graph: Any, concrete: Any) -> None:
    """Make constants of the tensors that a model captures, which tf2onnx turns into inputs."""
    captured = concrete.captured_inputs
    places = concrete.inputs[len(concrete.inputs) - len(captured) :]
    values = {place.name: value for place, value in zip(places, captured, strict=True)}
    for argument in list(graph.input):
        if argument.name in values:
            array = values[argument.name].numpy()
            graph.initializer.append(onnx.numpy_helper.from_array(array, argument.name))
            graph.input.remove(argument)


def _store(onnx: Any, graph: Any, path: pathlib.Path) -> None:
    """Move the large tensors of a graph to a file, and record their places in the graph.

    (tf2onnx's own argument for this, `large_model`, uses a function that NumPy 2 lacks.)
    """
    with path.open("xb") as stream:
        for tensor in _tensors_in(graph):
            values = tensor.raw_data
            if len(values) <= _LARGEST_INLINE:
                continue
            stream.write(bytes(-stream.tell() % _ALIGNMENT))
            place = {"location": path.name, "offset": stream.tell(), "length": len(values)}
            stream.write(values)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
        stream.flush()
        os.fsync(stream.fileno())


def _external_data(path: pathlib.Path) -> set[pathlib.Path]:
    """Return the external data that an ONNX file names and `export_onnx` wrote.

    The set is empty if there is no ONNX file at `path`.
    """
    onnx = _extras.require_extra("onnx", "onnx")
    if not path.is_file():
        return set()
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception:  # protobuf's parser has an error of its own
        return set()
    named = {
        entry.value
        for tensor in _tensors_in(graph)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    pattern = re.escape(path.name[:200]) + r"\.[0-9a-f]{8}\.data"
    return {path.with_name(name) for name in named if re.fullmatch(pattern, name)}


def _tensors_in(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("g"):
                yield from _tensors_in(attribute.g)
