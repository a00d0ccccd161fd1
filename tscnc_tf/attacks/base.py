"""The base of all attacks: ball, bounds, name, checks of inputs, seed."""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
import math
import operator
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _configs, _keras
from tscnc_tf._keras import layers
from tscnc_tf.functional import balls
from tscnc_tf.functional.balls import NORMS

# Attributes of layers whose values, if they change, change what is compiled.
_HELD = (tf.Variable, _keras.keras.Variable, tf.Tensor, np.ndarray)
_COMPILED = "_compiled_by_model"  # the attribute of an attack that holds its compiled functions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack(_configs.Configurable, abc.ABC):
    """Base of all attacks: a ball of radius `epsilon` around each input, within `bounds`.

    Subclasses are either final or abstract.

    Args:
        epsilon: the radius, a number or a fraction such as "8/255"; kept as written.
        norm: one of `norms`: "linf" or "l2", for some attacks also "l1".
        bounds: the smallest and the largest value that an input may take.

    Raises:
        TypeError, ValueError: epsilon is not > 0, or wider than the bounds; or another argument is
            not as described.
    """

    norms: ClassVar[tuple[str, ...]] = NORMS

    epsilon: float | str
    norm: str = "linf"
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        _checks.one_of("norm", self.norm, self.norms)
        self._set("bounds", _checks.bounds("bounds", self.bounds))
        self._set("epsilon", distance_field("epsilon", self.epsilon))
        if self.norm == "linf":
            self._check_radius(self._width, "the width of bounds")

    def __call__(self, model: Any, x: Any, y: Any = None, *, seed: Any = 0) -> tf.Tensor:
        """Return adversarial examples for `x`, inside the ball and the bounds.

        In eager code the inputs are checked; while a graph is traced, only their shapes are.

        On a Keras model an attack by gradients runs compiled. The compiled function is cached for
        later calls as long as the model exists, and compiled again when anything but the weights of
        a layer has changed. Python globals that a layer's `call` reads keep the values that they
        had at compilation, as in Keras. Any other callable runs eagerly, step by step: make it a
        `tf.function`, or use `bind`, to run it compiled.

        Args:
            model: a Keras model of either flavour, run in inference mode, or any callable from x
                to logits. On probabilities an attack is weaker, without a warning.
            x: `(batch, ...)`, a float tensor or array inside `bounds`.
            y: integer labels `(batch,)` or `(batch, 1)`, or one-hot or soft ones `(batch,
                classes)`; the target classes, for a targeted attack. Smoothed labels have the
                effect of hard ones, mixtures that of `losses.log_odds`; the objectives "margin"
                and "dlr" use the class of the largest entry.
            seed: an integer or a pair of integers, the seed of all random numbers.

        Returns:
            A tensor of the shape and dtype of `x`.

        Raises:
            ValueError: the inputs are not as described, or the attack can't use the model.
        """
        return self._checked(functools.partial(self._generate, model), x, y, seed)

    def bind(self, model: Any) -> Callable[..., tf.Tensor]:
        """Return this attack on one model, a function `(x, y=None, *, seed=0) -> x_adv`.

        It is equivalent to a call of the attack, but an attack by gradients compiles any model, not
        only those of Keras, at the first batch of each shape (except for the batch axis) and dtype.
        As with every `tf.function`, later calls read only the model's variables again. The compiled
        functions are cached in the result.

        Args:
            model: as in a call; TensorFlow must be able to compile it.
        """
        generate = self._compiled(model)

        def bound(x: Any, y: Any = None, *, seed: Any = 0) -> tf.Tensor:
            return self._checked(generate, x, y, seed)

        return bound

    def _checked(self, generate: Callable[..., tf.Tensor], x: Any, y: Any, seed: Any) -> tf.Tensor:
        """Return the result of `generate` for checked inputs."""
        if tf.executing_eagerly():
            x = tf.convert_to_tensor(_checks.inputs(x, self.bounds))
            y = None if y is None else _checks.labels(y, x.shape[0])
        else:
            x = tf.convert_to_tensor(x)
        self._check_size(x.shape)
        return generate(x, y, seed_pair(seed))

    @abc.abstractmethod
    def _generate(self, model: Any, x: tf.Tensor, y: Any, seed: tf.Tensor) -> tf.Tensor:
        """Return adversarial examples for checked inputs."""

    def _compiled(self, model: Any) -> Callable[..., tf.Tensor]:
        """Return `_generate` for one model as a function of (x, y, seed), compiled if possible."""
        return functools.partial(self._generate, model)

    def with_defaults(self, *, objective: str | None = None, start: str | None = None) -> Self:  # noqa: ARG002
        """Return this attack with defaults for the fields that are None.

        Defaults that do not apply to the attack are ignored.

        Args:
            objective: the default objective, as in `PGD`.
            start: the default start, as in `PGD`.
        """
        return self

    def for_transfer(self) -> Attack:
        """Return this attack in the form whose results `Transfer` evaluates on another model."""
        return self

    @property
    def uses_gradient(self) -> bool:
        """Whether it may use the gradient of the model that it is called with."""
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
        """Return the description for reports: JSON values, None where a key does not apply."""
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

    def _rounded(self, x: tf.Tensor, point: tf.Tensor) -> tf.Tensor:
        """Return points in the dtype of x, inside the ball around x and the bounds."""
        inside = balls.round_inside(x, point, self.epsilon_value, self.norm)
        return tf.clip_by_value(inside, *self.bounds)

    def _check_size(self, shape: tf.TensorShape) -> None:
        """Raise a ValueError unless the shape is a batch, and the radius fits its bounds."""
        _checks.require_batch(shape)
        size = shape[1:].num_elements()
        if self.norm == "l2" and size is not None:
            self._check_radius(self._width * math.sqrt(size), "the diagonal of the box of bounds")
        if self.norm == "l1" and size is not None:
            self._check_radius(self._width * size, "the l1 distance of the corners of bounds")

    def _check_radius(self, largest: float, what: str) -> None:
        # 8/255 in float32 may exceed the same fraction as text by the last bit.
        if self.epsilon_value > largest * (1 + 1e-6):
            raise ValueError(
                f"epsilon must be at most {what}, {largest:g} for bounds={self.bounds}, got "
                f'{self.epsilon!r}. For images in [0, 1] write "8/255"; for images in [0, 255] '
                "pass bounds=(0, 255)."
            )

    def _set(self, field: str, value: Any) -> None:
        """Set a field of this frozen object; for constructors only."""
        object.__setattr__(self, field, value)


class CompiledAttack(Attack):
    """Base of attacks that are implemented by TensorFlow operations.

    Their compiled functions for Keras models are cached as long as the model exists.
    """

    def _generate(self, model: Any, x: tf.Tensor, y: Any, seed: tf.Tensor) -> tf.Tensor:
        self.check_labels(y)
        if not tf.executing_eagerly() or _keras.flavour(model) is None:
            return self._run(model, x, y, seed)
        known = vars(self).setdefault(_COMPILED, weakref.WeakKeyDictionary())
        run, state = known.get(model, (None, None))
        if run is None or not _is_same_state(state, _state(model)):
            run = self._graph(weakref.ref(model))
            result = run(x, y, seed)
            known[model] = run, _state(model)  # read here, as the first call may change it
            return result
        return run(x, y, seed)

    def _compiled(self, model: Any) -> Callable[..., tf.Tensor]:
        _keras.inference(model)  # raises if it is not a model
        return self._graph(lambda: model)

    @abc.abstractmethod
    def _run(self, model: Any, x: tf.Tensor, y: Any, seed: tf.Tensor) -> tf.Tensor:
        """Return adversarial examples, without compiling anything here."""

    @abc.abstractmethod
    def _graph(self, recall: Callable[[], Any]) -> Callable[..., tf.Tensor]:
        """Return this attack on one model, compiled, as a function of (x, y, seed).

        Args:
            recall: returns the model; it may hold a weak reference.
        """

    def _feasible(self, anchor: tf.Tensor, point: tf.Tensor) -> tf.Tensor:
        """Return the point clipped to the bounds, then projected into the ball.

        The projection moves it straight towards the anchor, which lies inside the bounds, so the
        result is inside both (except for the last bit, see `balls.round_inside`). For l1 it is the
        nearest point of the intersection.
        """
        if self.norm == "l1":
            return balls.project_within_box(point, anchor, self.epsilon_value, self.bounds)
        inside = tf.clip_by_value(point, *self.bounds)
        return anchor + balls.project(inside - anchor, self.epsilon_value, self.norm)

    def check_labels(self, y: Any) -> None:
        """Raise a ValueError if labels are missing."""
        if y is None:
            raise ValueError("y is missing: this attack needs the labels.")

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields, without compiled functions, for copies and pickles."""
        return {name: value for name, value in vars(self).items() if name != _COMPILED}


def _state(model: Any) -> list[Any]:
    """Return the state of a model apart from the values of its weights, for `_is_same_state`.

    It consists of the attributes of each layer that are variables, tensors, arrays, callables or
    plain Python values, and of public lists, tuples and dicts of these. Sequential and functional
    models inside are left out, since their own attributes belong to training. A state keeps
    neither layers nor variables alive.
    """
    found: list[Any] = []
    for layer in layers.flatten(model):
        found.append(weakref.ref(layer))  # the same object each time, as long as the layer lives
        for name, value in () if _keras.is_graph_model(layer) else vars(layer).items():
            # The private containers are those of Keras, some of which change in each call.
            is_compared = not (name.startswith("_") and isinstance(value, dict | list | tuple))
            found += [name, *_parts(value)] if is_compared else []
    return found


def _parts(value: Any) -> list[Any]:
    """Return what a state compares of an attribute: itself, or the parts of a container."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        return list(itertools.chain.from_iterable(map(_parts, value)))
    if value is None or isinstance(value, bool | int | float | str):
        return [value]
    if not callable(value) and not isinstance(value, _HELD):
        return []
    try:
        return [weakref.ref(value)]
    except TypeError:  # functions of C, such as a ufunc
        return [value]


def _is_same_state(before: list[Any], after: list[Any]) -> bool:
    """Return whether two states hold the same objects."""
    return len(before) == len(after) and all(map(operator.is_, before, after))


def distance_field(name: str, value: Any) -> float | str:
    """Return a distance unchanged after checking it; a NumPy number becomes a Python number."""
    number = _checks.distance(name, value)
    return value if isinstance(value, (str, int)) else number


def seed_pair(seed: Any) -> tf.Tensor:
    """Return a seed, an integer or a pair of them (or a tensor of either), as two int32."""
    wrong = f"seed must be an integer or a pair of integers, got {seed!r}."
    if tf.is_tensor(seed):
        if seed.shape.as_list() not in ([], [2]) or not seed.dtype.is_integer:
            raise ValueError(wrong)
        seed = tf.cast(seed, tf.int32)
        return tf.stack([0, seed]) if seed.shape.rank == 0 else seed
    is_pair = isinstance(seed, (tuple, list)) or (isinstance(seed, np.ndarray) and seed.ndim > 0)
    parts = tuple(seed) if is_pair else (seed,)
    if len(parts) not in (1, 2):
        raise ValueError(wrong)
    words = [_checks.integer("seed", part, minimum=-(2**63)) for part in parts]
    high, low = (words[0] >> 32, words[0]) if len(words) == 1 else words
    return tf.constant([_int32(high), _int32(low)], dtype=tf.int32)


def _int32(value: int) -> int:
    """Return the lower 32 bits of an integer as a signed number."""
    return (value + 2**31) % 2**32 - 2**31
