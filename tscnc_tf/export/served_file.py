"""Exported files, LiteRT or ONNX, as functions."""

from __future__ import annotations

import abc
import hashlib
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _probe
from tscnc_tf.export.report import ExportedTensor

__all__ = ["ServedFile"]


class ServedFile(abc.ABC):
    """An exported file, loaded: `served(x)` returns its logits in float32.

    It can be the `model` of an evaluation. It has no gradient, so attacks that need one can't run
    on it. `attacks.Transfer` evaluates it on adversarial examples of the model that was exported.

    Args:
        path: the file.
        inputs, outputs: the tensors that it takes and returns.

    Example:
        See `load_litert` and `load_onnx`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        inputs: Iterable[ExportedTensor],
        outputs: Iterable[ExportedTensor],
    ) -> None:
        self._path = pathlib.Path(path)
        with self._path.open("rb") as file:
            self._digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)

    @property
    def name(self) -> str:
        """The name of the file."""
        return self._path.name

    @property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return self._digest

    @property
    def inputs(self) -> tuple[ExportedTensor, ...]:
        """The tensors that the file takes."""
        return self._inputs

    @property
    def outputs(self) -> tuple[ExportedTensor, ...]:
        """The tensors that the file returns."""
        return self._outputs

    def __call__(self, inputs: Any) -> Any:
        """Return the logits for a batch of any size, also inside a `tf.function`.

        Args:
            inputs: tensor or array of shape (examples, ...); a dict of them, by name, if there are
                several inputs.

        Returns:
            A tensor of shape (examples, classes), in the dtype of the file's output; a dict of
            them, by name, if there are several outputs.

        Raises:
            ValueError: `inputs` does not match the file's inputs.
        """
        names = [tensor.name for tensor in self._inputs]
        if len(names) == 1 and not isinstance(inputs, dict):
            inputs = {names[0]: inputs}
        if not isinstance(inputs, dict) or set(inputs) != set(names):
            got = list(inputs) if isinstance(inputs, dict) else type(inputs).__name__
            raise ValueError(f"inputs must be a dict with the names {names}, got {got}.")
        values = [inputs[name] for name in names]
        dtypes = [tensor.dtype for tensor in self._outputs]
        if tf.executing_eagerly():
            results = [tf.constant(array) for array in self._arrays(*map(np.asarray, values))]
        else:
            results = tf.numpy_function(self._arrays, values, dtypes)
            for result, tensor in zip(results, self._outputs, strict=True):
                result.set_shape(_spec(tensor).shape)
        if len(results) == 1:
            return results[0]
        return {tensor.name: result for tensor, result in zip(self._outputs, results, strict=True)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._path)!r})"

    @abc.abstractmethod
    def _run(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name for arrays of the right shapes and dtypes."""

    def _arrays(self, *values: np.ndarray) -> list[np.ndarray]:
        """Return the outputs, in the order of `outputs`, for values in the order of `inputs`."""
        arrays = {
            tensor.name: np.ascontiguousarray(
                _probe.fit(f"inputs {tensor.name!r}", _spec(tensor), value)
            )
            for tensor, value in zip(self._inputs, values, strict=True)
        }
        if len({len(array) for array in arrays.values()}) > 1:
            sizes = ", ".join(f"{name}: {len(array)}" for name, array in arrays.items())
            raise ValueError(f"inputs must all have the same number of examples, got {sizes}.")
        results = self._run(arrays)
        return [results[tensor.name] for tensor in self._outputs]


def _spec(tensor: ExportedTensor) -> tf.TensorSpec:
    return tf.TensorSpec(tensor.shape, tensor.dtype)
