"""The model under test: its compiled logits, and properties of its outputs and gradients."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _keras, _reports, losses
from tscnc_tf.attacks import pgd
from tscnc_tf.evaluation import diagnostics
from tscnc_tf.inspection.inputs import one_tensor

# Operations on floats whose gradient is zero, missing or a substitute.
_BREAKING = (
    *("Round", "Rint", "Floor", "Ceil", "Sign", "FloorDiv", "Bucketize", "ArgMax", "ArgMin"),
    *("LowerBound", "UpperBound", "QuantizeV2", "QuantizeAndDequantizeV2"),
    *("QuantizeAndDequantizeV3", "QuantizeAndDequantizeV4", "FakeQuantWithMinMaxVars"),
    *("FakeQuantWithMinMaxArgs", "FakeQuantWithMinMaxVarsPerChannel", "PyFunc", "EagerPyFunc"),
)
# Log-odds below which softmax is 1 for the label in float32, with a margin.
_SATURATED = -50.0


class ModelUnderTest:
    """A model as an evaluation runs it: float32 logits in inference mode, for batches of any size.

    Args:
        model: any callable `x -> logits`.
        x: a batch, to check what the model returns.
        role: the name of the model in errors.

    Attributes:
        name: of the model.
        classes: the number of its logits.
        has_gradient: whether its outputs have a gradient in x; set by `examine`.
        graph: a digest of the operations that compute its logits; set by `examine`.

    Raises:
        TypeError: the model is not callable, or does not return one tensor.
        ValueError: it does not return `(batch, classes)`.
    """

    def __init__(self, model: Any, x: np.ndarray, role: str = "model") -> None:
        self._eager = _keras.inference(model)
        self._role = role
        self.name = str(
            getattr(model, "name", None) or getattr(model, "__name__", type(model).__name__)
        )
        shape = tuple(one_tensor(self._eager(tf.constant(x))).shape)
        if len(shape) != 2 or shape[0] != len(x) or shape[1] < 2:
            raise ValueError(
                f"{role} must return logits of shape (batch, classes) with 2 classes or more; for "
                f"{len(x)} examples it returned shape {shape}. A binary model with one output z "
                "has the logits (0, z)."
            )
        self.classes = shape[1]
        self._first = x
        self.has_gradient = True
        self.graph = ""
        batch = tf.TensorSpec((None, *x.shape[1:]), tf.float32)
        labels = tf.TensorSpec((None,), tf.int64)
        self._logits = tf.function(self.call, input_signature=[batch])
        self._examined = tf.function(self._call_and_gradient, input_signature=[batch, labels])

    def examine(
        self, batches: Iterator[tuple[np.ndarray, np.ndarray]], by_gradient: bool
    ) -> tuple[np.ndarray, diagnostics.Outputs]:
        """Return the logits of all examples, and properties of the outputs.

        Args:
            batches: of inputs and class indices.
            by_gradient: whether an attack may use the gradient of the model.

        Raises:
            ValueError: some logits are not finite, or all of them are probabilities.
        """
        repeatable = self._is_repeatable(self._first)
        try:
            definition = self._logits.get_concrete_function().graph.as_graph_def()
            self._examined.get_concrete_function()
        except Exception as error:
            error.add_note(
                f"The {self._role} is compiled by tf.function: it may use TensorFlow only."
            )
            raise
        nodes = _nodes(definition)
        self.graph = _digest(nodes)
        parts = (self._examined(*map(tf.constant, batch)) for batch in batches)
        logits, is_zero, is_undefined, is_saturated = (
            np.concatenate([tensor.numpy() for tensor in tensors])
            for tensors in zip(*parts, strict=True)
        )
        finite = np.all(np.isfinite(logits), axis=1)
        if not np.all(finite):
            raise ValueError(
                f"{self._role} returns NaN or infinity for {np.sum(~finite)} of {len(finite)} "
                "examples."
            )
        if bool(_checks.are_probabilities(logits)):
            raise ValueError(_checks.about_probabilities(self._role))
        return logits, diagnostics.Outputs(
            repeatable=repeatable,
            unit_interval=bool(np.min(logits) >= 0.0 and np.max(logits) <= 1.0 + 1e-6),
            zero_gradients=is_zero & by_gradient,
            undefined_gradients=is_undefined & by_gradient,
            saturated=is_saturated & by_gradient,
            tied=are_tied(logits),
            operations=_breaking_operations(nodes) if by_gradient else (),
        )

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Return the logits of a batch as TensorFlow operations."""
        # The shape of what runs outside of TensorFlow (py_function) is not known.
        return tf.ensure_shape(one_tensor(self._eager(x)), (None, self.classes))

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Return the logits of a batch, `(batch, classes)`."""
        return self._logits(tf.constant(x)).numpy()

    def _is_repeatable(self, x: np.ndarray) -> bool:
        """Return whether two calls on one batch give the same logits, up to rounding."""
        # Not compiled, since a graph repeats the random numbers that Python drew at tracing.
        first, second = (one_tensor(self._eager(tf.constant(x))).numpy() for _ in range(2))
        size = np.max(np.abs(first), where=np.isfinite(first), initial=0.0)
        return bool(np.allclose(first, second, rtol=0.0, atol=1e-4 * size, equal_nan=True))

    def _call_and_gradient(self, x: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Return the logits, and per example whether its gradient is 0, not finite, saturated.

        The gradient is that of the log-odds, which attacks ascend, in the input. It counts as
        saturated where the gradient of cross-entropy is zero in float32.
        """
        with tf.GradientTape() as tape:
            tape.watch(x)
            logits = self.call(x)
        slope = pgd.slope(functools.partial(losses.log_odds, labels), logits)
        try:
            gradient = tape.gradient(logits, x, slope)
        except LookupError:  # an operation without a gradient
            gradient = None
        if gradient is None:
            self.has_gradient = False
            gradient = tf.zeros_like(x)
        axes = list(range(1, x.shape.rank))
        is_zero = tf.reduce_all(tf.equal(gradient, 0.0), axis=axes)
        is_saturated = losses.log_odds(labels, logits) < _SATURATED
        is_undefined = tf.reduce_any(~tf.math.is_finite(gradient), axis=axes)
        return logits, is_zero, is_undefined, is_saturated


def are_tied(logits: np.ndarray) -> np.ndarray:
    """Return per example whether the largest logit occurs more than once."""
    highest = np.max(logits, axis=1, keepdims=True)
    return np.sum(logits == highest, axis=1) > 1


def _nodes(definition: Any) -> list[Any]:
    """Return the operations of a graph and of the functions that it calls."""
    return [*definition.node, *(n for f in definition.library.function for n in f.node_def)]


def _digest(nodes: list[Any]) -> str:
    """Return SHA-256 of the types of operations and of the constants among them, in any order."""
    found = sorted(
        (node.op, node.attr["value"].tensor.SerializeToString(deterministic=True))
        if node.op == "Const"
        else (node.op, b"")
        for node in nodes
    )
    return _reports.digest((op, np.frombuffer(value, np.uint8)) for op, value in found)


def _breaking_operations(nodes: list[Any]) -> list[str]:
    """Return the types of breaking operations."""
    return sorted({node.op for node in nodes if _is_breaking(node)})


def _is_breaking(node: Any) -> bool:
    """Return whether an operation on floats has a zero, missing or substitute gradient."""
    if node.op == "Cast":
        source, goal = (tf.as_dtype(node.attr[name].type) for name in ("SrcT", "DstT"))
        return source.is_floating and goal.is_integer
    kind = node.attr["T"].type  # 0 if it has none
    return node.op in _BREAKING and not (kind and tf.as_dtype(kind).is_integer)
