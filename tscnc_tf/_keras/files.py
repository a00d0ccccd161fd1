"""Loading of model files from untrusted sources: no code in a file is executed."""

from __future__ import annotations

import builtins
import importlib
import io
import json
import math
import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

from tscnc_tf import _files
from tscnc_tf._keras import keras, tf_keras

# Libraries whose classes a file may name.
_TRUSTED = ("keras", "tf_keras", "tensorflow_model_optimization", "tscnc_tf")
# Where tf_keras keeps functions that it names in files.
_FUNCTIONS = ("activations", "constraints", "initializers", "losses", "metrics", "regularizers")
# Submodules of TensorFlow whose functions only compute, and top-level functions that do.
_COMPUTING = {"math", "nn", "linalg", "signal", "image", "random", "bitwise", "strings"} | {
    *("sets", "ragged", "sparse", "__operators__", "dtypes", "quantization"),
}
_COMPUTING_TOO = set(
    """
    abs acos acosh add add_n argmax argmin argsort asin asinh atan atan2 atanh batch_to_space
    bitcast boolean_mask broadcast_static_shape broadcast_to cast clip_by_global_norm
    clip_by_norm clip_by_value complex concat constant convert_to_tensor cos cosh cumsum div
    div_no_nan divide dynamic_partition dynamic_stitch edit_distance eig einsum ensure_shape
    equal exp expand_dims eye fill fingerprint floor floordiv floormod gather gather_nd greater
    greater_equal guarantee_const histogram_fixed_width histogram_fixed_width_bins identity
    identity_n less less_equal linspace log log_sigmoid logical_and logical_not logical_or
    matmul matrix_square_root maximum meshgrid minimum mod multiply negative norm not_equal
    one_hot ones ones_like pad parallel_stack pow range rank realdiv reciprocal reduce_all
    reduce_any reduce_logsumexp reduce_max reduce_mean reduce_min reduce_prod reduce_sum repeat
    reshape reverse reverse_sequence reverse_v2 roll round rsqrt saturate_cast scalar_mul
    scatter_nd searchsorted sequence_mask shape shape_n sigmoid sign sin sinh size slice sort
    space_to_batch space_to_batch_nd space_to_depth split sqrt square squared_difference squeeze
    stack stop_gradient strided_slice subtract tan tanh tensor_scatter_nd_add
    tensor_scatter_nd_max tensor_scatter_nd_min tensor_scatter_nd_sub tensor_scatter_nd_update
    tensordot tile to_float to_int32 to_int64 transpose truediv truncatediv truncatemod unique
    unique_with_counts unravel_index unstack where where_v2 zeros zeros_like
    """.split()  # noqa: SIM905
)
_OPERATIONS = ("TFOpLambda", "SlicingOpLambda")  # layers that call a function of TensorFlow
# Layers that run any operation by its definition, or any method of a class.
_ANY_OPERATION = ("TensorFlowOpLayer", "ClassMethod")
_HDF5 = (".h5", ".hdf5")
_WEIGHTS = "model.weights.h5"  # in a .keras file
# Filters built into HDF5 and h5py; HDF5 loads others as libraries from the disk.
_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE} | {
    *(h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF),
}
_MAX_RATIO = 1100  # limit for the compression ratio of packed values: that of DEFLATE is < 1033
# Keys for the types of functions in the configuration of a `Lambda`, and the types with code.
_LAMBDAS = ("function_type", "output_shape_type", "mask_type")
_PYTHON = ("lambda", "function")


def load_model(path: pathlib.Path) -> Any:
    """Load a `.keras`, `.h5` or `.hdf5` file by the Keras that wrote it, without compiling it.

    Keras' safe mode refuses Python lambdas in `.keras` files. tf_keras applies it neither to `.h5`
    files nor to functions of any module that a file names, so these are checked first. So are the
    weights, for both Keras versions: see `_require_stored`.

    Raises:
        ValueError: it is not such a file, unpacks to more than the machine's memory, holds or
            names code, or declares weights that are not in it.
    """
    config, version = _read(path)
    if version.startswith("3."):
        return keras.models.load_model(path, compile=False)
    for part in _mappings(config):
        if reason := _code(part):
            raise ValueError(
                f"{path} {reason}, which would be run as code: it is not loaded. If you trust its "
                "source, load it by tf_keras.models.load_model(path, compile=False, "
                "safe_mode=False), and pass the model."
            )
    return tf_keras.models.load_model(path, compile=False)


def _read(path: pathlib.Path) -> tuple[Any, str]:
    """Return the configuration of the model in a file, and the version of its Keras."""
    if path.suffix not in (".keras", *_HDF5):  # Keras chooses its reader by the suffix as well
        raise ValueError(f"{path} is not a model in a .keras or .h5 file, by its name.")
    try:
        if path.suffix in _HDF5:
            with h5py.File(path) as file:
                _require_stored(path, file)
                config, version = (
                    np.asarray(file.attrs[name]).astype(str).item()
                    for name in ("model_config", "keras_version")
                )
            return json.loads(config), version
        with zipfile.ZipFile(path) as archive:
            _files.require_memory(path, archive)
            with h5py.File(io.BytesIO(archive.read(_WEIGHTS))) as file:
                _require_stored(path, file)
            version = json.loads(archive.read("metadata.json"))["keras_version"]
            return json.loads(archive.read("config.json")), version
    except (_files.TooLargeError, _NotStoredError):
        raise
    except (OSError, KeyError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a model in a .keras or .h5 file: {error}") from error


class _NotStoredError(ValueError):
    """An HDF5 file declares data that it does not contain, or stores it once for several names."""


def _require_stored(path: pathlib.Path, file: h5py.File) -> None:
    """Raise unless the weights that an HDF5 file declares are stored in it, each once.

    Otherwise a file of a few bytes could make Keras allocate all memory, or read other files of
    this machine.

    Args:
        path: for the messages.
        file: open; no values are read.

    Raises:
        TooLargeError: they are larger than the memory.
        _NotStoredError: they are not stored in the file; the message says which.
    """
    groups: list[h5py.Group] = []
    datasets: list[h5py.Dataset] = []
    reason, pending = "", [file["/"]]
    while pending and not reason:
        item = pending.pop()
        if reason := _fault(item):
            reason = f"{item.name} {reason}"
        elif isinstance(item, h5py.Dataset):
            datasets.append(item)
        elif isinstance(item, h5py.Group):
            groups.append(item)
            links = {name: item.get(name, getlink=True) for name in item}
            for name, link in links.items():
                if not isinstance(link, h5py.HardLink):
                    reason = f"{item.name} has {name}, a link to {link.path} elsewhere"
            if not reason:
                pending.extend(item[name] for name in links)
    if not reason:  # names are resolved only after links have been excluded
        named = [address for group in groups for address in _named(group)]
        reason = "it names a layer or weight twice" if len(set(named)) < len(named) else ""
    if reason:
        raise _NotStoredError(
            f"{path} has weights as Keras does not write them: {reason}. It is not loaded. If you "
            "trust its source, load it by Keras' own load_model, and pass the model."
        )
    _files.require_memory(path, sum(_sizes(dataset)[0] for dataset in datasets))


def _fault(item: Any) -> str:
    """Return how a group or dataset of an HDF5 file differs from Keras' format; "" if it doesn't.

    The text is a predicate of the item's name, such as "has several names".
    """
    if h5py.h5o.get_info(item.id).rc > 1:
        return "has several names"
    if not isinstance(item, h5py.Dataset):
        return ""
    if item.external or item.is_virtual:
        return "has its values in another file or dataset"
    if item.dtype.hasobject:
        return "has values of variable length"
    created = item.id.get_create_plist()
    filters = {created.get_filter(index)[0] for index in range(created.get_nfilters())}
    if unknown := filters - _FILTERS:
        return f"is packed by a filter that is not part of HDF5, {min(unknown)}"
    unpacked, stored = _sizes(item)
    if unpacked > stored * (_MAX_RATIO if filters else 1):
        return f"has {unpacked:,} bytes, of which {stored:,} are stored"
    return ""


def _sizes(dataset: h5py.Dataset) -> tuple[int, int]:
    """Return the bytes that reading a dataset takes (at least a chunk), and those in the file."""
    counts = [math.prod(shape) for shape in (dataset.shape, dataset.chunks) if shape is not None]
    return max(counts, default=0) * dataset.dtype.itemsize, dataset.id.get_storage_size()


def _named(group: h5py.Group) -> Iterator[int]:
    """Yield the addresses of the layers or weights that Keras reads from a group in `.h5`."""
    for key in group.attrs:
        if key.startswith(("layer_names", "weight_names")):
            for name in group.attrs[key]:
                yield h5py.h5o.get_info(group[name].id).addr


def _mappings(config: Any) -> Iterator[dict[str, Any]]:
    """Yield all mappings in a configuration."""
    pending = [config]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            yield part
        if isinstance(part, dict | list):
            pending.extend(part.values() if isinstance(part, dict) else part)


def _code(part: dict[str, Any]) -> str:
    """Return how a part of tf_keras' configuration would run code, for messages; "" if not."""
    kind, config, module = (part.get(name) for name in ("class_name", "config", "module"))
    if kind == "__lambda__" or any(part.get(name) in _PYTHON for name in _LAMBDAS):
        return "holds a Python function"
    if kind in _ANY_OPERATION:
        return f"has a layer {kind}"
    if kind in _OPERATIONS and isinstance(config, dict):
        function = str(config.get("function", ""))
        return "" if _computes(function) else f"calls tf.{function}"
    if not isinstance(module, str):
        return ""
    is_function = kind == "function"
    for name in (str(config) if is_function else kind, part.get("registered_name")):
        if isinstance(name, str) and not _is_harmless(module, name, is_function):
            return f"names {module}.{name}"
    return ""


def _computes(function: str) -> bool:
    """Return whether a function of TensorFlow, given by its name, only computes."""
    names = function.removeprefix("compat.v1.").split(".")
    return names[0] in (_COMPUTING if len(names) > 1 else _COMPUTING_TOO)


def _is_harmless(module: str, name: str, is_function: bool) -> bool:
    """Return whether a name in a file can be a function or class of the trusted libraries only."""
    # tf_keras writes "builtins" for its own functions, and for registered objects.
    if module == "builtins":
        return not hasattr(builtins, name)
    root, _, rest = module.partition(".")
    if root not in _TRUSTED or (is_function and (rest not in _FUNCTIONS or "." in name)):
        return False
    try:
        place = importlib.import_module(f"tf_{module}" if root == "keras" else module)
    except ImportError:
        return True  # tf_keras will raise for the unknown module
    found = getattr(place, name.partition(".")[0], None)
    if found is None:
        return True
    is_kind = callable(found) if is_function else isinstance(found, type)
    return is_kind and str(found.__module__).partition(".")[0] in _TRUSTED
