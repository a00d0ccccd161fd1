"""AutoAttack: an ensemble of attacks, each run on the examples still classified correctly."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, final

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _keras
from tscnc_tf.attacks.apgd import APGD
from tscnc_tf.attacks.base import Attack
from tscnc_tf.attacks.fab import FAB
from tscnc_tf.attacks.square import Square

VERSIONS = ("standard", "plus", "rand")


@final
@_keras.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoAttack(Attack):
    """AutoAttack: an ensemble of attacks, each run on the examples that are still robust.

    "standard": APGD by cross-entropy, APGD by the targeted difference of logits ratio, targeted
    FAB (each with 100 steps, the latter two with 9 target classes) and Square with 5,000 queries;
    in l1, the first with 5 restarts and the second with 5 target classes.
    "plus": APGD by cross-entropy and by the difference of logits ratio and untargeted FAB with 5
    restarts each, Square, then the two targeted attacks. "rand", for models with random outputs:
    APGD by both losses, with gradients averaged over 20 evaluations.

    It has no parameters to tune. `evaluate_robustness` runs it batch by batch over all examples and
    reports the result of each attack.

    Args:
        epsilon: the radius, a number or a fraction such as "8/255".
        norm: "linf", "l2" or "l1".
        version: "standard", "plus" or "rand".
        bounds: the smallest and the largest value that an input may take.

    Raises:
        TypeError, ValueError: an argument is not as described.
        ValueError: when called, the version is not "standard" and the model has two classes, for
            which the difference of logits ratio is not defined; or a graph is being traced.

    Example:
        >>> attack = AutoAttack(epsilon="8/255")
        >>> attack.name
        'AutoAttack-standard linf 8/255'
        >>> [part.name for part in attack.attacks][2:]
        ['FAB-100 linf 8/255 targeted', 'Square-5000 linf 8/255']

    Reference:
        Croce & Hein 2020, arXiv 2003.01690; in l1: Croce & Hein 2021, arXiv 2103.01208.
    """

    norms: ClassVar[tuple[str, ...]] = APGD.norms

    version: str = "standard"

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.one_of("version", self.version, VERSIONS)

    @functools.cached_property
    def attacks(self) -> tuple[Attack, ...]:
        """The attacks, in the order of execution."""
        ball: dict[str, Any] = {"epsilon": self.epsilon, "norm": self.norm, "bounds": self.bounds}
        if self.version == "rand":
            return tuple(APGD(loss=loss, eot=20, **ball) for loss in ("ce", "dlr"))
        square = Square(horizon=10_000, **ball)
        if self.version == "standard":
            restarts, classes = (5, 5) if self.norm == "l1" else (1, None)
            return (
                APGD(loss="ce", restarts=restarts, **ball),
                APGD(loss="targeted_dlr", target_classes=classes, **ball),
                FAB(**ball),
                square,
            )
        apgd = (APGD(loss=loss, restarts=5, **ball) for loss in ("ce", "dlr"))
        untargeted = FAB(target_classes=None, restarts=5, **ball)
        return (*apgd, untargeted, square, APGD(loss="targeted_dlr", **ball), FAB(**ball))

    @property
    def name(self) -> str:
        """A short name for tables, such as "AutoAttack-standard linf 8/255"."""
        return f"AutoAttack-{self.version} {self._ball}"

    def describe(self) -> dict[str, Any]:
        """Return the description for reports, including the names of all attacks."""
        return super().describe() | {
            "version": self.version,
            "attacks": [attack.name for attack in self.attacks],
        }

    def require_classes(self, classes: int | None) -> None:
        """Raise a ValueError if there are too few classes for this version."""
        if classes == 2 and self.version != "standard":
            raise ValueError(
                f"version={self.version!r} needs 3 classes, as its difference of logits ratio is "
                "not defined for 2. Use version='standard'."
            )

    def _generate(self, model: Any, x: tf.Tensor, y: Any, seed: tf.Tensor) -> tf.Tensor:
        if _keras.flavour(model) is None:
            return self._compiled(model)(x, y, seed)
        # Each attack caches its compiled function for a Keras model.
        return self.in_turn(model, [functools.partial(each, model) for each in self.attacks])(
            x, y, seed
        )

    def _compiled(self, model: Any) -> Callable[..., tf.Tensor]:
        return self.in_turn(model, [attack.bind(model) for attack in self.attacks])

    def in_turn(
        self, model: Any, runs: Sequence[Callable[..., tf.Tensor]]
    ) -> Callable[..., tf.Tensor]:
        """Return a function of (x, y, seed) that runs each attack on the still robust examples.

        Args:
            model: on which examples are robust; the attacks may run on another one.
            runs: the attacks, functions of (x, y, seed=).
        """
        logits_fn = _keras.inference(model)

        def run(x: tf.Tensor, y: Any, seed: tf.Tensor) -> tf.Tensor:
            if not tf.executing_eagerly():
                raise ValueError(
                    "AutoAttack drops fooled examples between its attacks, which a graph can't: "
                    "call it outside of tf.function, or use one of its attacks there, such as APGD."
                )
            if y is None:
                raise ValueError("y is missing: this attack needs the labels.")
            self.require_classes(logits_fn(x[:1]).shape[-1])
            found = x.numpy()
            truth = _checks.class_indices("y", y)[0]
            is_robust = np.ones(len(found), dtype=bool)
            for index, attack in enumerate(runs):
                rows = np.flatnonzero(is_robust)
                if not len(rows):
                    break
                seeds = tf.random.fold_in(seed, index, alg="philox")
                candidates = attack(tf.gather(x, rows), tf.gather(y, rows), seed=seeds)
                found[rows] = candidates.numpy()
                logits = np.asarray(logits_fn(candidates))
                is_robust[rows] = np.argmax(logits, axis=1) == truth[rows]
            return tf.constant(found)

        return run
