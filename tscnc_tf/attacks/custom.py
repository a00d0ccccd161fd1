"""Attacks given as functions, such as those of other libraries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, final

import tensorflow as tf

from tscnc_tf.attacks.base import Attack
from tscnc_tf.attacks.search import Search


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Custom(Attack):
    """Any function `(model, x, y) -> x_adv`, with the ball that it declares.

    The result is returned unchanged: `epsilon`, `norm` and `bounds` declare the constraints that an
    evaluation checks. The function gets the model that the attack was called with, and x and y as
    tensors; `seed` is not passed to it.

    Args:
        function: may be passed by position.
        epsilon: the radius, a number or a fraction such as "8/255".
        norm: "linf", "l2" or "l1".
        name: a name for reports; if empty, the function's own and the ball.
        bounds: the smallest and the largest value that an input may take.

    Raises:
        TypeError: function is not callable, or name is not a string.
        ValueError: as in `Attack`; when called, the function returns another shape than that of x.

    Example:
        >>> import tensorflow as tf
        >>> def darker(model, x, y):
        ...     return tf.maximum(x - 8 / 255, 0.0)
        >>> attack = Custom(darker, epsilon="8/255")
        >>> attack.name
        'darker linf 8/255'
        >>> float(attack(lambda x: x, [[0.0, 0.5]])[0, 0])
        0.0
    """

    norms: ClassVar[tuple[str, ...]] = Search.norms

    function: Callable[[Any, tf.Tensor, Any], Any] = dataclasses.field(kw_only=False)
    name: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.function):
            raise TypeError(
                "function must be callable as function(model, x, y) -> x_adv, got "
                f"{self.function!r}."
            )
        if not isinstance(self.name, str):
            raise TypeError(f"name must be text, got {self.name!r}.")
        if not self.name:
            own = getattr(self.function, "__name__", type(self.function).__name__)
            self._set("name", f"{own} {self._ball}")

    def _generate(self, model: Any, x: tf.Tensor, y: Any, seed: tf.Tensor) -> tf.Tensor:  # noqa: ARG002
        result = tf.convert_to_tensor(self.function(model, x, y))
        if not result.shape.is_compatible_with(x.shape) or not result.dtype.is_floating:
            raise ValueError(
                f"{self.name} must return a float tensor of the shape of x, {x.shape}, got "
                f"{result.dtype.name} of shape {result.shape}."
            )
        return tf.cast(result, x.dtype)
