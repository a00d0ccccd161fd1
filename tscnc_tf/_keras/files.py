"""Models from files, which may come from strangers: nothing in a file is run as code."""

from __future__ import annotations

import builtins
import importlib
import json
import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

from tscnc_tf import _files
from tscnc_tf._keras import keras, tf_keras

# Whose classes a file may name.
_TRUSTED = ("keras", "tf_keras", "tensorflow_model_optimization", "tscnc_tf")
# Where tf_keras keeps functions that it names in files.
_FUNCTIONS = ("activations", "constraints", "initializers", "losses", "metrics", "regularizers")
# Parts of TensorFlow whose functions only compute, and functions beside them.
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
# What `Lambda` says of its functions in its configuration, and of those that are written in Python.
_LAMBDAS = ("function_type", "output_shape_type", "mask_type")
_PYTHON = ("lambda", "function")


def load_model(path: pathlib.Path) -> Any:
    """Load a `.keras`, `.h5` or `.hdf5` file by the Keras that wrote it, without its compilation.

    Keras' own safe mode refuses Python lambdas in `.keras` files. tf_keras applies it neither to
    `.h5` files nor to functions that a file names, of any module; so these are looked at first.

    Raises:
        ValueError: it is no such file, unpacks to more than there is memory, or holds or names
            code.
    """
    config, version = _read(path)
    if version.startswith("3."):
        return keras.models.load_model(path, compile=False)
    for part in _mappings(config):
        if reason := _code(part):
            raise ValueError(
                f"{path} {reason}, which would be run as code: it is not loaded. If you trust "
                "whoever has made it, load it by tf_keras.models.load_model(path, compile=False, "
                "safe_mode=False), and pass the model."
            )
    return tf_keras.models.load_model(path, compile=False)


def _read(path: pathlib.Path) -> tuple[Any, str]:
    """Return the configuration of the model in a file, and the version of its Keras."""
    if path.suffix not in (".keras", *_HDF5):  # by which Keras, too, chooses how to read it
        raise ValueError(f"{path} is not a model in a .keras or .h5 file, by its name.")
    try:
        if path.suffix in _HDF5:
            with h5py.File(path) as file:
                config, version = (
                    np.asarray(file.attrs[name]).astype(str).item()
                    for name in ("model_config", "keras_version")
                )
            return json.loads(config), version
        with zipfile.ZipFile(path) as archive:
            _files.require_memory(path, archive)
            version = json.loads(archive.read("metadata.json"))["keras_version"]
            return json.loads(archive.read("config.json")), version
    except _files.TooLargeError:
        raise
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a model in a .keras or .h5 file: {error}") from error


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
    """Return what would be run as code of a part of tf_keras' configuration, "" for nothing."""
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
    """Tell whether a function of TensorFlow, given by its name, only computes."""
    names = function.removeprefix("compat.v1.").split(".")
    return names[0] in (_COMPUTING if len(names) > 1 else _COMPUTING_TOO)


def _is_harmless(module: str, name: str, is_function: bool) -> bool:
    """Tell whether what a file names can be a function of networks or a class of the libraries."""
    if module == "builtins":  # says tf_keras of its own functions, and of what is registered
        return not hasattr(builtins, name)
    root, _, rest = module.partition(".")
    if root not in _TRUSTED or (is_function and (rest not in _FUNCTIONS or "." in name)):
        return False
    try:
        place = importlib.import_module(f"tf_{module}" if root == "keras" else module)
    except ImportError:
        return True  # tf_keras says that it does not know it
    found = getattr(place, name.partition(".")[0], None)
    if found is None:
        return True
    is_kind = callable(found) if is_function else isinstance(found, type)
    return is_kind and str(found.__module__).partition(".")[0] in _TRUSTED
