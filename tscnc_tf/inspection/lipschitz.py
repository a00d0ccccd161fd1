"""Lipschitz constants of a network: from below by gradient ascent, from above by its layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _keras, _reports, functional
from tscnc_tf._keras import flavours, gated, keras, tf_keras, wrappers
from tscnc_tf._keras import layers as kernel_layers
from tscnc_tf._keras.models import origin
from tscnc_tf.inspection import weights
from tscnc_tf.inspection.inputs import one_tensor
from tscnc_tf.inspection.operators import operator_singular_values


@dataclasses.dataclass(frozen=True, eq=False)
class LipschitzReport(_reports.Report):
    """Empirical local Lipschitz constants; `print` it for a table.

    Attributes:
        values: the largest quotient found for each example, float64: a lower bound of the true
            constant. Not in `to_dict()`.
        epsilon: the radius of the ball as given, such as "8/255".
        epsilon_value: the radius as a number.
        steps: the number of steps of the ascent.
        step_size: the size of a step, in the units of the inputs.
        bounds: the bounds of the inputs.
        seed: the seed of the random starts.
        batch_size: the examples per batch; a start depends on an example's place in its batch.
    """

    _derived = ("mean", "interval", "maximum", "examples")
    _omitted = ("values",)

    values: np.ndarray
    epsilon: str
    epsilon_value: float
    steps: int
    step_size: float
    bounds: tuple[float, float]
    seed: int
    batch_size: int

    @property
    def examples(self) -> int:
        """The number of examples."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """The mean over the examples, the figure that papers report."""
        return float(np.mean(self.values))

    @property
    def maximum(self) -> float:
        """The largest value among the examples."""
        return float(np.max(self.values))

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the mean, for a sample of this size; (0, inf) for one example."""
        if self.examples < 2:
            return 0.0, math.inf
        half = _reports.Z95 * float(np.std(self.values, ddof=1)) / math.sqrt(self.examples)
        return max(0.0, self.mean - half), self.mean + half

    def _table(self) -> _reports.Table:
        low, high = map(_reports.significant, self.interval)
        return _reports.Table(
            "Empirical local Lipschitz constant, ℓ1 of the outputs over ℓ∞ of the inputs",
            ("mean", "95 % interval", "maximum", "ε", "steps", "step size", "examples", "seed"),
            [
                (
                    _reports.significant(self.mean),
                    f"{low} to {high}",
                    _reports.significant(self.maximum),
                    self.epsilon,
                    f"{self.steps}",
                    _reports.significant(self.step_size),
                    f"{self.examples}",
                    f"{self.seed}",
                )
            ],
            notes=["Gradient ascent finds a lower bound of the true constant."],
        )


def local_lipschitz(
    model: Any,
    x: Any,
    epsilon: float | str,
    *,
    steps: int = 10,
    step_size: float | str | None = None,
    batch_size: int = 128,
    bounds: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
) -> LipschitzReport:
    r"""Return the empirical local Lipschitz constant of a network around each input.

    .. math:: \max_{x' \in B_\infty(x, \epsilon)} \frac{\|f(x) - f(x')\|_1}{\|x - x'\|_\infty}

    f are the logits in inference mode. Gradient ascent on the numerator starts at a random point of
    the ball and moves by the sign of the gradient; the largest quotient of all steps is kept. (The
    gradient of the quotient itself would move the largest coordinate back at every step, although
    the quotient does not fall with the length of a perturbation.)

    Args:
        model: a Keras 3 or tf_keras model, or any differentiable callable `x -> outputs`.
        x: inputs `(examples, ...)`, floats within `bounds`; a NumPy array or a tensor.
        epsilon: the radius of the ball, a number or a fraction such as "8/255".
        steps: the number of steps of the ascent.
        step_size: the size of a step, in the units of the inputs; `2.5 * epsilon / steps` if None,
            which is enough to cross the ball.
        batch_size: the number of examples per batch.
        bounds: the smallest and the largest value of an input; the search stays inside.
        seed: the seed of the random starts.

    Returns:
        A `LipschitzReport`: the mean over x, its 95 % interval, and the value of each example.

    Raises:
        TypeError: `model` is not callable, or `x` does not hold floats.
        ValueError: `x` is empty, not finite or out of bounds; the outputs are not finite; `epsilon`
            is so small that outputs differ by the rounding of float32, or of 16 bits.

    Reference:
        Yang et al. 2020, "A closer look at accuracy vs. robustness", arXiv 2003.02460.

    Example:
        >>> import numpy as np, tensorflow as tf
        >>> def model(x):
        ...     return tf.matmul(x, [[3.0], [-4.0]])
        >>> report = local_lipschitz(model, np.full((1, 2), 0.5), epsilon=0.1)
        >>> round(report.mean, 3)  # |3| + |-4|
        7.0
    """
    epsilon_value = _checks.distance("epsilon", epsilon)
    written = _checks.as_written(epsilon)
    steps = _checks.integer("steps", steps, minimum=1)
    size = 2.5 * epsilon_value / steps
    size = size if step_size is None else _checks.distance("step_size", step_size)
    batch_size = _checks.integer("batch_size", batch_size, minimum=1)
    bounds, seed = _checks.bounds("bounds", bounds), _checks.seed("seed", seed)
    dtype, share = _rounding(model)
    least = share * max(map(abs, bounds))
    if epsilon_value < least:
        raise ValueError(
            f"epsilon must be >= {least:.2g} within bounds {bounds}, got {written}: in so small a "
            f"ball outputs differ by the rounding of {dtype}."
        )
    inputs = np.asarray(_checks.inputs(x, bounds), np.float32)
    start, step = _ascent(_keras.inference(model), inputs.shape[1:], epsilon_value, size, bounds)
    found = []
    for index, first in enumerate(range(0, len(inputs), batch_size)):
        batch = tf.constant(inputs[first : first + batch_size])
        outputs, point = start(batch, tf.constant([seed, index], tf.int64))
        best = tf.zeros(len(batch))
        # The additional step evaluates the last point of the ascent.
        for _ in range(steps + 1):
            best, point = step(batch, outputs, point, best)
        if not (np.all(np.isfinite(outputs)) and np.all(np.isfinite(best))):
            raise ValueError(
                f"model returns NaN or infinity at or near x[{first}:{first + len(batch)}]."
            )
        found.append(best.numpy().astype(np.float64))
    values = np.concatenate(found)
    return LipschitzReport(values, written, epsilon_value, steps, size, bounds, seed, batch_size)


def _rounding(model: Any) -> tuple[str, float]:
    """Return the coarsest dtype of a model's layers, and the distance of inputs that it needs."""
    is_keras = _keras.flavour(model) is not None
    found = kernel_layers.flatten(model) if is_keras else ()
    dtypes = {getattr(layer, "compute_dtype", None) for layer in found}
    for dtype, spacing in {"bfloat16": 2.0**-7, "float16": 2.0**-10}.items():
        if dtype in dtypes:
            return dtype, 4 * spacing
    return "float32", 64 * float(np.finfo(np.float32).eps)


def _ascent(
    outputs: Callable[[Any], Any],
    shape: tuple[int, ...],
    epsilon: float,
    step_size: float,
    bounds: tuple[float, float],
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the compiled start and step of the ascent, for batches of any size."""
    batch = tf.TensorSpec((None, *shape), tf.float32)
    # Below this distance the quotient is mostly rounding error.
    shortest = 0.01 * min(epsilon, bounds[1] - bounds[0])

    @tf.function(input_signature=[batch, tf.TensorSpec((2,), tf.int64)])
    def start(x: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        noise = functional.random_start(tf.shape(x), epsilon, "linf", seed, x.dtype)
        # Reflected at the bounds: clipping could end at x itself, where the gradient is zero.
        leaves = (x + noise < bounds[0]) | (x + noise > bounds[1])
        noise = tf.where(leaves, -noise, noise)
        return one_tensor(outputs(x)), tf.clip_by_value(x + noise, *bounds)

    clean = tf.TensorSpec(start.get_concrete_function().structured_outputs[0].shape, tf.float32)

    @tf.function(input_signature=[batch, clean, batch, tf.TensorSpec((None,), tf.float32)])
    def step(
        x: tf.Tensor, clean: tf.Tensor, point: tf.Tensor, best: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(point)
            moved = tf.abs(one_tensor(outputs(point)) - clean)
            change = tf.reduce_sum(tf.reshape(moved, (tf.shape(x)[0], -1)), axis=-1)
        gradient = tape.gradient(change, point, unconnected_gradients="zero")
        distance = functional.lengths(point - x, "linf")
        quotient = tf.where(distance >= shortest, tf.math.divide_no_nan(change, distance), 0.0)
        ahead = point + step_size * functional.steepest_ascent(gradient, "linf")
        ahead = x + functional.project(ahead - x, epsilon, "linf")
        return tf.maximum(best, quotient), tf.clip_by_value(ahead, *bounds)

    return start, step


def lipschitz_upper_bound(model: Any) -> float:
    r"""Return an upper bound of the global Lipschitz constant of a chain of layers, from l2 to l2.

    It is the product of the layers' constants:

    .. math:: \|f(x) - f(x')\|_2 \le \prod_i L_i \; \|x - x'\|_2.

    The constants are:

    * Dense: the spectral norm of the kernel.
    * Conv2D (not grouped, not dilated): the spectral norm of the convolution with circular padding
      on an image that is larger by the kernel's size less 1. With zero padding, or strides, the
      layer computes a part of that.
    * BatchNormalization: the factors :math:`\gamma / \sqrt{v + \epsilon}` of its channels are
      multiplied into a kernel directly before it; elsewhere it is the largest factor.
    * Normalization: the largest :math:`1 / \max(\sqrt v, 10^{-7})`, with the limit of Keras.
    * GlobalAveragePooling2D over n positions: :math:`1 / \sqrt n`.
    * ReLU (with a negative slope of at most 1), relu and linear activations, Dropout, Flatten, and
      MaxPooling2D with windows that don't overlap: 1.

    The bound is loose for networks of more than a few layers. From l-infinity to l1, as
    `local_lipschitz` measures, multiply it by the square root of (inputs · outputs).

    Args:
        model: a built Sequential or functional model of either Keras, of these layers in a chain
            (channels last); masks and gates are applied.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: the model is not built or not a chain, or has a layer of another kind; or
            weights are not finite.

    Reference:
        Szegedy et al. 2014, "Intriguing properties of neural networks", arXiv 1312.6199, section
        4.3; Gouk et al. 2021, "Regularisation of neural networks by enforcing Lipschitz
        continuity", arXiv 1804.04368.

    Example:
        >>> import numpy as np, tf_keras, tscnc_tf.inspection
        >>> first = tf_keras.layers.Dense(2, "relu", use_bias=False, input_shape=(2,))
        >>> model = tf_keras.Sequential([first, tf_keras.layers.Dense(1, use_bias=False)])
        >>> model.set_weights([np.diag([3.0, 1.0]), np.array([[0.0], [2.0]])])
        >>> tscnc_tf.inspection.lipschitz_upper_bound(model)  # 3 · 2
        6.0
    """
    read = weights.Reader(model)
    bound, gain = 1.0, np.ones(1)  # the channels' factors of the BatchNormalization that follows
    for layer, shape in _chain(model):
        if _is_a(layer, "BatchNormalization"):
            bound *= float(np.max(np.abs(gain)))
            gain = read(layer.gamma) if layer.scale else np.ones(1)
            gain = gain / np.sqrt(read(layer.moving_variance) + layer.epsilon)
            if not np.all(np.isfinite(gain)):
                raise ValueError(f"{_of(layer)}: its weights are not finite.")
            if np.ravel(layer.axis)[0] not in (-1, len(shape) - 1):
                gain = np.max(np.abs(gain), keepdims=True)
            continue
        is_linear = _is_a(layer, "Conv2D", "Dense") and layer.activation in _LINEAR
        if not is_linear:
            bound, gain = bound * float(np.max(np.abs(gain))), np.ones(1)
        bound *= _constant(layer, shape, read, gain)
        gain = np.ones(1)
    return bound * float(np.max(np.abs(gain)))


_LINEAR = (keras.activations.linear, tf_keras.activations.linear)
_RELU = (keras.activations.relu, tf_keras.activations.relu, tf.nn.relu)


def _is_a(layer: Any, *names: str) -> bool:
    """Tell whether a layer is exactly of one of these Keras classes, not of a subclass."""
    return type(layer) in kernel_layers.classes(*names)


def _chain(model: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield the layers of a chain from the last to the first, each with its input's shape.

    Raises:
        ValueError: the model has no graph, or its graph is not a chain.
    """
    not_a_chain = ValueError(
        f"model {model.name!r} must be a Sequential or functional model whose layers follow each "
        "other in a chain, with one input and one output: no bound is known for other graphs."
    )
    if not _keras.is_graph_model(model) or len(model.outputs) != 1 or len(model.inputs) != 1:
        raise not_a_chain
    tensor = model.outputs[0]
    while tensor is not model.inputs[0]:
        layer, inputs, _ = origin(tensor)
        if len(inputs) != 1:
            raise not_a_chain
        (tensor,) = inputs
        is_around = wrappers.is_wrapper(layer) or gated.is_gated(layer)
        yield layer.layer if is_around else layer, tuple(tensor.shape)


def _constant(layer: Any, shape: tuple[Any, ...], read: weights.Reader, gain: np.ndarray) -> float:
    """Return a bound of a layer's Lipschitz constant, its output channels scaled by `gain`.

    Raises:
        ValueError: no bound is known, or weights are not finite.
    """
    if _is_a(layer, "Dense", "Conv2D", "Activation") and layer.activation not in _LINEAR + _RELU:
        raise ValueError(f"{_of(layer)}: no bound is known for its activation.")
    if _is_a(layer, "Dense", "Conv2D"):
        kernel = read(kernel_layers.stored(layer, "kernel")) * gain
        if not np.all(np.isfinite(kernel)):
            raise ValueError(f"{_of(layer)}: its kernel, or a BatchNormalization, is not finite.")
        if _is_a(layer, "Dense"):
            return float(np.linalg.norm(kernel, 2))
        sizes = [n and n + k - 1 for n, k in zip(shape[1:3], layer.kernel_size, strict=True)]
        if layer.groups == 1 and set(layer.dilation_rate) == {1} and _is_known(layer, sizes):
            return float(operator_singular_values(kernel, sizes)[0])
    elif _is_a(layer, "Normalization") and not layer.invert:
        deviation = math.sqrt(np.min(layer.variance))
        return 1.0 / max(deviation, flavours.library_of(type(layer)).backend.epsilon())
    elif _is_a(layer, "GlobalAveragePooling2D") and _is_known(layer, shape[1:3]):
        return 1.0 / math.sqrt(math.prod(shape[1:3]))
    elif _is_a(layer, "MaxPooling2D"):
        if all(step >= size for step, size in zip(layer.strides, layer.pool_size, strict=True)):
            return 1.0
    elif _is_a(layer, "ReLU") and not layer.threshold:
        return max(1.0, float(layer.negative_slope))
    elif _is_a(layer, "Activation", "Dropout", "Flatten"):
        return 1.0
    raise ValueError(
        f"{_of(layer)}: no bound is known for it, or for its arguments; see the layers that "
        "lipschitz_upper_bound knows."
    )


def _is_known(layer: Any, sizes: Any) -> bool:
    return None not in sizes and layer.data_format == "channels_last"


def _of(layer: Any) -> str:
    return f"layer {layer.name!r} of class {type(layer).__name__}"
