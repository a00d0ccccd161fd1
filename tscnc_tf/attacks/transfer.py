"""An attack on one model, judged on another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Self, final

import tensorflow as tf

from tscnc_tf.attacks.base import Attack


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer(Attack):
    """Adversarial examples that are found on one model, for another one to be judged by.

    The attack runs on `source`, whatever model it is called with; the ball and the bounds are those
    of the attack inside. This is how to measure again what has no gradient, such as a network that
    was exported or quantised: let it face what was found on the network that it was made from.

    An adversary who attacks the model itself may find more, so the accuracy that is left is an
    upper bound of the robust accuracy; nor is it better than the gradient of `source`.

    Args:
        source: the model that is attacked: of either Keras, or any callable from x to logits.
        attack: the attack, one of `tscnc_tf.attacks`.

    Raises:
        TypeError: source is not callable, or attack is no attack (a function becomes one by
            `Custom`, which declares its ball).
        ValueError: attack is a `Transfer` itself.

    Example:
        >>> import tensorflow as tf
        >>> from tscnc_tf.attacks import FGSM
        >>> def smooth(x):
        ...     return tf.concat([x, 1.0 - x], axis=1)
        >>> def rounded(x):
        ...     return tf.round(8.0 * smooth(x))
        >>> attack = Transfer(source=smooth, attack=FGSM(epsilon=0.25))
        >>> attack.name
        'FGSM linf 0.25 from smooth'
        >>> attack(rounded, [[0.625]], [0]).numpy().tolist()
        [[0.375]]

    Reference:
        Papernot, McDaniel & Goodfellow 2016, arXiv 1605.07277.
    """

    epsilon: float | str = dataclasses.field(init=False, repr=False)
    norm: str = dataclasses.field(init=False, repr=False)
    bounds: tuple[float, float] = dataclasses.field(init=False, repr=False)
    source: Any
    attack: Attack

    def __post_init__(self) -> None:
        if isinstance(self.source, type) or not callable(self.source):
            raise TypeError(
                f"source must be a model, callable as source(x) -> logits, got {self.source!r}."
            )
        if not isinstance(self.attack, Attack):
            raise TypeError(
                "attack must be one of tscnc_tf.attacks, such as PGD(epsilon='8/255'), got "
                f"{self.attack!r}. A function becomes an attack by Custom, which declares its ball."
            )
        if isinstance(self.attack, Transfer):
            raise ValueError(
                f"attack must run on source itself, got {self.attack!r}, which runs on a source of "
                "its own."
            )
        for field in ("epsilon", "norm", "bounds"):
            self._set(field, getattr(self.attack, field))
        super().__post_init__()

    def with_defaults(self, *, objective: str | None = None, start: str | None = None) -> Self:
        """Return this attack with what the attack inside leaves open filled in."""
        inner = self.attack.with_defaults(objective=objective, start=start)
        return dataclasses.replace(self, attack=inner)

    @property
    def uses_gradient(self) -> bool:
        """False: the model that it is called with is not even looked at."""
        return False

    @property
    def name(self) -> str:
        """A short name for tables, such as "PGD-10 linf 8/255 from resnet"."""
        return f"{self.attack.name} from {self._source_name}"

    def describe(self) -> dict[str, Any]:
        """Return what the attack inside says of itself, and the name of the source besides."""
        return self.attack.describe() | {"name": self.name, "source": self._source_name}

    @property
    def _source_name(self) -> str:
        named = getattr(self.source, "name", None) or getattr(self.source, "__name__", None)
        return str(named or type(self.source).__name__)

    def _generate(self, model: Any, x: tf.Tensor, y: Any, seed: tf.Tensor) -> tf.Tensor:  # noqa: ARG002
        return self.attack(self.source, x, y, seed=seed)

    def _compiled(self, model: Any) -> Callable[..., tf.Tensor]:  # noqa: ARG002
        run = self.attack.bind(self.source)
        return lambda x, y, seed: run(x, y, seed=seed)
