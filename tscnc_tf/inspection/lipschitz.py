"""How fast a network's outputs can change near its inputs, found by gradient ascent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _keras, _reports, functional
from tscnc_tf.inspection.inputs import one_tensor


@dataclasses.dataclass(frozen=True, eq=False)
class LipschitzReport(_reports.Report):
    """Empirical local Lipschitz constants; `print` it for a table.

    Attributes:
        values: one per example, float64: the largest quotient that was found. A lower bound of the
            true constant.
        epsilon: the radius of the ball as written, such as "8/255".
        epsilon_value: the same as a number.
        steps: of the ascent.
        step_size: of the ascent, in the units of the inputs.
        bounds: of the inputs.
        seed: of the random starts.
        batch_size: of the ascent; a start depends on an example's place in its batch.
    """

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
        """The mean over the examples: the figure that is usually quoted."""
        return float(np.mean(self.values))

    @property
    def maximum(self) -> float:
        """The largest one among the examples."""
        return float(np.max(self.values))

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the mean, for a sample of this size; (0, inf) for one example."""
        if self.examples < 2:
            return 0.0, math.inf
        half = _reports.Z95 * float(np.std(self.values, ddof=1)) / math.sqrt(self.examples)
        return max(0.0, self.mean - half), self.mean + half

    def to_dict(self) -> dict[str, Any]:
        """Return the figures and how they came about as JSON values, without the single values."""
        described = dataclasses.asdict(self)
        del described["values"]
        figures = {"mean": self.mean, "interval": self.interval, "maximum": self.maximum}
        return _reports.jsonable(figures | {"examples": self.examples} | described)

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
            notes=["What was found by ascent is a lower bound of the true constant."],
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

    f are the logits in inference mode. The search starts at a random point of the ball, follows the
    sign of the gradient of the numerator, and keeps the largest quotient on its way. (The gradient
    of the quotient itself would pull the largest coordinate back at every step, although a larger
    perturbation in the same direction costs nothing.)

    Args:
        model: a Keras 3 or tf_keras model, or any differentiable callable `x -> outputs`.
        x: inputs `(examples, ...)`, floats within `bounds`; a NumPy array or a tensor.
        epsilon: the radius of the ball, a number or a fraction such as "8/255".
        steps: of the ascent.
        step_size: in the units of the inputs; `2.5 * epsilon / steps` if None, which is enough to
            cross the ball.
        batch_size: examples per step.
        bounds: the smallest and the largest value of an input; the search stays inside.
        seed: of the random starts.

    Returns:
        A `LipschitzReport` with the mean over x, its 95 % interval, and the value of each example.

    Raises:
        TypeError: `model` is not callable, or `x` does not hold floats.
        ValueError: `x` is empty, not finite or out of bounds; the outputs are not finite; `epsilon`
            is so small that float32 would measure its own rounding.

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
    bounds, seed = _checks.bounds("bounds", bounds), _checks.integer("seed", seed, minimum=0)
    least = 64 * float(np.finfo(np.float32).eps) * max(map(abs, bounds))
    if epsilon_value < least:
        raise ValueError(
            f"epsilon must be >= {least:.2g} within bounds {bounds}, got {written}: in so small a "
            "ball outputs differ by the rounding of float32."
        )
    inputs = _checks.inputs(x, bounds).numpy().astype(np.float32)
    start, step = _ascent(_keras.inference(model), inputs.shape[1:], epsilon_value, size, bounds)
    found = []
    for index, first in enumerate(range(0, len(inputs), batch_size)):
        batch = tf.constant(inputs[first : first + batch_size])
        outputs, point = start(batch, tf.constant([seed, index], tf.int64))
        best = tf.zeros(len(batch))
        # One more than the steps: the last one only looks at where the ascent has arrived.
        for _ in range(steps + 1):
            best, point = step(batch, outputs, point, best)
        if not (np.all(np.isfinite(outputs)) and np.all(np.isfinite(best))):
            raise ValueError(
                f"model returns NaN or infinity at or near x[{first}:{first + len(batch)}]."
            )
        found.append(best.numpy().astype(np.float64))
    values = np.concatenate(found)
    return LipschitzReport(values, written, epsilon_value, steps, size, bounds, seed, batch_size)


def _ascent(
    outputs: Callable[[Any], Any],
    shape: tuple[int, ...],
    epsilon: float,
    step_size: float,
    bounds: tuple[float, float],
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the compiled start and step of the search; they serve batches of any size."""
    batch = tf.TensorSpec((None, *shape), tf.float32)
    # Below this distance the quotient is mostly rounding error.
    shortest = 0.01 * min(epsilon, bounds[1] - bounds[0])

    @tf.function(input_signature=[batch, tf.TensorSpec((2,), tf.int64)])
    def start(x: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        noise = functional.random_start(tf.shape(x), epsilon, "linf", seed, x.dtype)
        # Turned inwards at the bounds: what is clipped may end at x, where the gradient is zero.
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
