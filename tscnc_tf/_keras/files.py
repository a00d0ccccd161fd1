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

from tscnc_tf._keras import keras, tf_keras

# Whose classes a file may name.
_TRUSTED = ("keras", "tf_keras", "tensorflow_model_optimization", "tscnc_tf")
# Where tf_keras keeps functions that it names in files.
_FUNCTIONS = ("activations", "constraints", "initializers", "losses", "metrics", "regularizers")
# Parts of TensorFlow whose functions compute, and those outside of them that do more.
_COMPUTING = {"math", "nn", "linalg", "signal", "image", "random", "bitwise", "strings"} | {
    *("sets", "ragged", "sparse", "__operators__", "experimental", "dtypes", "quantization"),
}
_NOT_COMPUTING = {"py_function", "numpy_function", "py_func", "print", "function"} | {
    *("load_library", "load_op_library", "recompute_grad", "get_symbol_from_name"),
}
_OPERATIONS = ("TFOpLambda", "SlicingOpLambda")  # layers that call a function of TensorFlow
# What `Lambda` says of its functions in its configuration, and of those that are written in Python.
_LAMBDAS = ("function_type", "output_shape_type", "mask_type")
_PYTHON = ("lambda", "function")


def load_model(path: pathlib.Path) -> Any:
    """Load a `.keras` or `.h5` file by the Keras that wrote it, without its compilation.

    Keras' own safe mode refuses Python lambdas in `.keras` files. tf_keras applies it neither to
    `.h5` files nor to functions that a file names, of any module; so these are looked at first.

    Raises:
        ValueError: it is no such file, or it holds or names code.
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
    try:
        if path.suffix == ".h5":
            with h5py.File(path) as file:
                config, version = (
                    np.asarray(file.attrs[name]).astype(str).item()
                    for name in ("model_config", "keras_version")
                )
            return json.loads(config), version
        with zipfile.ZipFile(path) as archive:
            version = json.loads(archive.read("metadata.json"))["keras_version"]
            return json.loads(archive.read("config.json")), version
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
    return names[0] in _COMPUTING if len(names) > 1 else names[0] not in _NOT_COMPUTING


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
