"""What all attacks have in common: a ball, bounds, a name, and checked inputs."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, Self

import tensorflow as tf

from tscnc_tf import _checks, _configs
from tscnc_tf.attacks import _inputs
from tscnc_tf.functional.balls import NORMS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack(_configs.Configurable, abc.ABC):
    """Base of all attacks: a ball of radius `epsilon` around each input, within `bounds`.

    Subclasses are final, or abstract as this one.

    Args:
        epsilon: the radius, a number or a fraction such as "8/255"; kept as written.
        norm: "linf" or "l2".
        bounds: the smallest and the largest value that an input may take.

    Raises:
        ValueError: epsilon is not > 0, wider than the bounds, or another argument is none of those
            above.
    """

    epsilon: float | str
    norm: str = "linf"
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        _checks.one_of("norm", self.norm, NORMS)
        self._set("bounds", _checks.bounds("bounds", self.bounds))
        self._set("epsilon", distance_field("epsilon", self.epsilon))
        if self.norm == "linf":
            self._check_radius(self._width, "the width of bounds")

    def __call__(self, model: Any, x: Any, y: Any = None, *, seed: Any = 0) -> tf.Tensor:
        """Return adversarial examples for `x`, inside the ball and the bounds.

        Called eagerly, the inputs are checked; called while a graph is traced, only their shapes.
        What is compiled at the first call is kept for the next ones: of each model, for the eight
        attacks and forms of inputs that were used last. So a function that refers to other weights
        later is still attacked as it was. (`evaluate_robustness` compiles it anew.)

        Args:
            model: a Keras model of either flavour, run in inference mode, or any callable from x
                to logits. Of probabilities an attack finds less, and says nothing.
            x: `(batch, ...)`, a float tensor or array inside `bounds`.
            y: integer labels `(batch,)` or `(batch, 1)`, or one-hot or soft ones `(batch,
                classes)`; the classes to reach, for a targeted attack. Smoothed labels are
                attacked as hard ones are, mixtures as `losses.log_odds` says; the objectives
                "margin" and "dlr" take the largest entry for the class.
            seed: an integer or a pair of integers; all randomness comes from it.

        Returns:
            A tensor of the shape and dtype of `x`.

        Raises:
            ValueError: the inputs are not of the form above, or the attack can't use the model.
        """
        if tf.executing_eagerly():
            x = _inputs.examples(x, self.bounds)
            y = None if y is None else _inputs.labels(y, x.shape[0])
        else:
            x = tf.convert_to_tensor(x)
        self._check_size(x.shape)
        return self._generate(model, x, y, _inputs.seed_pair(seed))

    @abc.abstractmethod
    def _generate(self, model: Any, x: tf.Tensor, y: Any, seed: tf.Tensor) -> tf.Tensor:
        """Return adversarial examples for checked inputs."""

    def with_defaults(self, *, objective: str | None = None, start: str | None = None) -> Self:  # noqa: ARG002
        """Return this attack with what it leaves open (None) filled in.

        A default that the attack has no use for is passed over.

        Args:
            objective: what to ascend, as in `PGD`.
            start: where to start, as in `PGD`.
        """
        return self

    @property
    def uses_gradient(self) -> bool:
        """Whether it may follow the gradient of the model that it is called with."""
        return True

    @property
    def epsilon_value(self) -> float:
        """The radius as a number."""
        return _checks.distance("epsilon", self.epsilon)

    @property
    def name(self) -> str:
        """A short name for tables, such as "PGD-10 linf 8/255"."""
        return f"{type(self).__name__} {self._ball}"

    def describe(self) -> dict[str, Any]:
        """Return what a report says of the attack: JSON values, None where it does not apply."""
        return {
            "name": self.name,
            "epsilon": _checks.as_written(self.epsilon),
            "epsilon_value": self.epsilon_value,
            "norm": self.norm,
            "step_size": None,
            "step_size_value": None,
            "steps": None,
            "restarts": None,
            "objective": None,
            "targeted": None,
            "start": None,
            "bounds": list(self.bounds),
        }

    @property
    def _ball(self) -> str:
        return f"{self.norm} {_checks.as_written(self.epsilon)}"

    @property
    def _width(self) -> float:
        return self.bounds[1] - self.bounds[0]

    def _check_size(self, shape: tf.TensorShape) -> None:
        """Raise unless an input of this shape can be attacked."""
        if shape.rank is None or shape.rank < 2:
            raise ValueError(f"x must have a batch axis and one more at least, got shape {shape}.")
        size = shape[1:].num_elements()
        if self.norm == "l2" and size is not None:
            self._check_radius(self._width * math.sqrt(size), "the diagonal of the box of bounds")

    def _check_radius(self, largest: float, what: str) -> None:
        # A float32 8/255 may be a last bit wider than the same fraction written out.
        if self.epsilon_value > largest * (1 + 1e-6):
            raise ValueError(
                f"epsilon must be at most {what}, {largest:g} for bounds={self.bounds}, got "
                f'{self.epsilon!r}. For images in [0, 1] write "8/255"; for images in [0, 255] '
                "pass bounds=(0, 255)."
            )

    def _set(self, field: str, value: Any) -> None:
        """Set a field of this frozen object; for constructors only."""
        object.__setattr__(self, field, value)


def distance_field(name: str, value: Any) -> float | str:
    """Return a checked distance as it was written; a NumPy number becomes one of Python's."""
    number = _checks.distance(name, value)
    return value if isinstance(value, (str, int)) else number
