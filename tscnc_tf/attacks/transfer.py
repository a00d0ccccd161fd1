"""Transfer attacks: adversarial examples of one model, evaluated on another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self, final

import tensorflow as tf

from tscnc_tf.attacks.autoattack import AutoAttack
from tscnc_tf.attacks.base import Attack
from tscnc_tf.attacks.search import Search


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer(Attack):
    """Adversarial examples found on one model, to evaluate another.

    The attack runs on `source`, whatever model it is called with; the ball and the bounds are those
    of the inner attack. It evaluates a model without a gradient, such as an exported or quantised
    network, on adversarial examples of the network that it was made from.

    APGD and Square otherwise end at the first point that fools the model, next to its decision
    boundary, which may not fool another one. Here they take all their iterations, and the result is
    the strongest point. Of `AutoAttack` each part is run on the examples on which the evaluated
    model is right under all parts before.

    An attack on the model itself may find more, so the resulting accuracy is an upper bound of the
    robust accuracy, and only as reliable as the gradient of `source`.

    Args:
        source: the model that is attacked: of either Keras, or any callable from x to logits.
        attack: the attack, one of `tscnc_tf.attacks`.

    Raises:
        TypeError: source is not callable, or attack is not an attack (wrap a function in `Custom`,
            which declares its ball).
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

    norms: ClassVar[tuple[str, ...]] = Search.norms

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
                f"attack must run on source itself, got {self.attack!r}, which runs on its own "
                "source: pass its inner attack."
            )
        for field in ("epsilon", "norm", "bounds"):
            self._set(field, getattr(self.attack, field))
        super().__post_init__()

    def with_defaults(self, *, objective: str | None = None, start: str | None = None) -> Self:
        """Return this attack with defaults for the fields of the inner attack that are None."""
        inner = self.attack.with_defaults(objective=objective, start=start)
        return dataclasses.replace(self, attack=inner)

    @property
    def uses_gradient(self) -> bool:
        """False: it does not use the model that it is called with."""
        return False

    @property
    def name(self) -> str:
        """A short name for tables, such as "PGD-10 linf 8/255 from resnet"."""
        return f"{self.attack.name} from {self._source_name}"

    def describe(self) -> dict[str, Any]:
        """Return the description of the inner attack, and the name of the source."""
        return self.attack.describe() | {"name": self.name, "source": self._source_name}

    @property
    def _source_name(self) -> str:
        named = getattr(self.source, "name", None) or getattr(self.source, "__name__", None)
        return str(named or type(self.source).__name__)

    @functools.cached_property
    def _attacks(self) -> tuple[Attack, ...]:
        """The attacks that run on the source: those of an AutoAttack, else one."""
        inner = self.attack
        parts = inner.attacks if isinstance(inner, AutoAttack) else (inner,)
        return tuple(part.for_transfer() for part in parts)

    def _generate(self, model: Any, x: tf.Tensor, y: Any, seed: tf.Tensor) -> tf.Tensor:
        runs = [functools.partial(attack, self.source) for attack in self._attacks]
        return self._evaluated(model, runs)(x, y, seed)

    def _compiled(self, model: Any) -> Callable[..., tf.Tensor]:
        return self._evaluated(model, [attack.bind(self.source) for attack in self._attacks])

    def _evaluated(
        self, model: Any, runs: Sequence[Callable[..., tf.Tensor]]
    ) -> Callable[..., tf.Tensor]:
        """Return a function of (x, y, seed): the only run, or those of an AutoAttack in turn."""
        if isinstance(self.attack, AutoAttack):
            return self.attack.in_turn(model, runs)
        (run,) = runs
        return lambda x, y, seed: run(x, y, seed=seed)
