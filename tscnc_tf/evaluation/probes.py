"""Short attacks by which an evaluation checks whether the gradients of a model are reliable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tscnc_tf import _keras
from tscnc_tf.attacks import pgd
from tscnc_tf.functional import balls

EXAMPLES = 64  # of the ladder
_STEPS = 20
# Of the network that is trained for transfer attacks.
_HIDDEN_UNITS, _EPOCHS, _TRAINED_ON = 128, 20, 10_000


class Ladder(NamedTuple):
    """Accuracies under attack, on examples that the model classifies correctly.

    Attributes:
        by_radius: after 20 steps, by the radius of the ball, up to one that holds all inputs.
        by_steps: in the smallest ball, after a single step and after 20.
    """

    by_radius: dict[float, float]
    by_steps: dict[int, float]


class Probe:
    """A short attack by gradients, compiled once for every ball, on one model.

    Args:
        logits_fn: from x to logits, in inference mode.
        shape: of an input.
        norm: "linf", "l2" or "l1".
        bounds: the smallest and the largest value of an input.
    """

    def __init__(
        self,
        logits_fn: Callable[[tf.Tensor], Any],
        shape: tuple[int, ...],
        norm: str,
        bounds: tuple[float, float],
    ) -> None:
        self._logits_fn = logits_fn
        self._norm = norm
        self._bounds = bounds
        signature = [
            tf.TensorSpec((None, *shape), tf.float32),
            tf.TensorSpec((None,), tf.int64),
            tf.TensorSpec((), tf.float32),
            tf.TensorSpec((), tf.int32),
        ]
        # A concrete function, since TensorFlow warns if many evaluations trace functions.
        traced = tf.function(self._attack, signature, autograph=False)
        self._function = traced.get_concrete_function()

    def ladder(self, x: np.ndarray, y: np.ndarray, epsilon: float) -> Ladder:
        """Return the accuracies under attack in balls of radius `epsilon` and larger.

        Args:
            x: inputs that the model classifies correctly.
            y: their classes.
            epsilon: the first radius.
        """
        width = self._bounds[1] - self._bounds[0]
        size = float(x[0].size)
        widest = width * {"linf": 1.0, "l2": np.sqrt(size).item(), "l1": size}[self._norm]
        radii = [min(epsilon, widest)]
        while radii[-1] < widest:
            radii.append(min(2 * radii[-1], widest))
        found = {radius: self._accuracy(x, y, radius, _STEPS) for radius in radii}
        return Ladder(found, {1: self._accuracy(x, y, radii[0], 1), _STEPS: found[radii[0]]})

    def examples(self, x: np.ndarray, y: np.ndarray, epsilon: float) -> np.ndarray:
        """Return adversarial examples."""
        return self._run(x, y, epsilon, _STEPS)[0].numpy()

    def _accuracy(self, x: np.ndarray, y: np.ndarray, epsilon: float, steps: int) -> float:
        return 1.0 - float(np.mean(self._run(x, y, epsilon, steps)[1]))

    def _run(self, x: np.ndarray, y: np.ndarray, epsilon: float, steps: int) -> Any:
        numbers = tf.constant(epsilon, tf.float32), tf.constant(steps)
        return self._function(tf.constant(x), tf.constant(y, tf.int64), *numbers)

    def _attack(
        self, x: tf.Tensor, y: tf.Tensor, epsilon: tf.Tensor, steps: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the last points, and whether any iterate fooled the model."""
        ascent = pgd.Ascent(self._logits_fn, x, labels=y, objective="cross_entropy", targeted=False)
        step_size = 2.5 * epsilon / tf.cast(steps, tf.float32)
        # The steepest ascent of l1 moves one entry.
        steepest = "l2" if self._norm == "l1" else self._norm

        def step(count: Any, point: tf.Tensor, fooled: tf.Tensor) -> tuple[Any, ...]:
            direction = balls.steepest_ascent(ascent.gradient(point), steepest)
            moved = tf.clip_by_value(point + step_size * direction, *self._bounds)
            moved = x + balls.project(moved - x, epsilon, self._norm)
            fools = ascent.is_fooled(ascent.logits(moved))
            return count + 1, tf.ensure_shape(moved, x.shape), fooled | fools

        return tf.while_loop(
            lambda count, *_: count < steps,
            step,
            (0, x, tf.zeros_like(y, tf.bool)),
            parallel_iterations=1,
        )[1:]


def plain_network(
    x: np.ndarray, y: np.ndarray, classes: int, seed: int
) -> Callable[[tf.Tensor], tf.Tensor]:
    """Return a small network, trained without an adversary.

    Args:
        x: inputs; every k-th one is used, with the smallest k that gives at most 10,000.
        y: their classes.
        classes: the number of classes.
        seed: of the initial weights.

    Returns:
        A model that returns logits: of Keras 3, or of tf_keras if Keras 3 has another backend.
    """
    is_usable = _keras.keras.config.backend() == "tensorflow"
    k = _keras.keras if is_usable else _keras.tf_keras
    step = -(-len(x) // _TRAINED_ON)
    x, y = x[::step], y[::step]
    scale = 1.0 / (float(np.std(x)) + 1e-6)

    def dense(units: int, name: str, activation: str | None = None) -> Any:
        start = k.initializers.HeNormal(seed=seed)
        return k.layers.Dense(
            units, activation, kernel_initializer=start, name=name, dtype="float32"
        )

    # All are named, so that the names that Keras gives to other layers do not change.
    network = k.Sequential(
        [
            k.Input(x.shape[1:], name="inputs"),
            k.layers.Rescaling(scale, -float(np.mean(x)) * scale, name="scale", dtype="float32"),
            k.layers.Flatten(name="flat", dtype="float32"),
            dense(_HIDDEN_UNITS, "hidden", "relu"),
            dense(classes, "logits"),
        ],
        name="plain",
    )
    network.compile(
        k.optimizers.Adam(3e-3, name="adam"),
        k.losses.SparseCategoricalCrossentropy(from_logits=True, name="cross_entropy"),
    )
    network.fit(x, y, batch_size=128, epochs=_EPOCHS, shuffle=False, verbose=0)
    return _keras.inference(network)
