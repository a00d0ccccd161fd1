"""The fast gradient method and projected gradient ascent."""

from __future__ import annotations

import dataclasses
from typing import Self, final

from tscnc_tf import _checks
from tscnc_tf.attacks._base import distance_field
from tscnc_tf.attacks._gradient import STARTS, GradientAttack, Plan


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class FGSM(GradientAttack):
    r"""The fast gradient method: one step of length epsilon from x.

    .. math:: x' = x + \epsilon\,\mathrm{sign}(g) \ (\text{linf}), \qquad
        x' = x + \epsilon\, g / \|g\|_2 \ (\text{l2}), \qquad g = \nabla_x L(x, y)

    clipped to the bounds.

    Args:
        epsilon: the radius, a number or a fraction such as "8/255".
        norm: "linf" or "l2".
        targeted: whether y are classes to reach; the objective L is then descended.
        bounds: the smallest and the largest value that an input may take.
        objective: "cross_entropy", "margin" or "dlr"; None is open to `with_defaults`, and
            "cross_entropy" alone. ("kl" has no gradient at x.)

    Raises:
        ValueError: an argument is none of those above.

    Example:
        >>> import tensorflow as tf
        >>> network = tf.constant([[1.0, -1.0], [0.0, 2.0]])
        >>> attack = FGSM(epsilon=0.25)
        >>> attack(lambda x: x @ network, [[0.5, 0.5]], [0]).numpy().tolist()
        [[0.25, 0.75]]

    Reference:
        Goodfellow et al. 2015, arXiv 1412.6572, section 4.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective == "kl":
            raise ValueError(
                "objective='kl' has no gradient at x, where FGSM takes its only step: use "
                "PGD(steps=1, objective='kl'), which starts beside x, or another objective."
            )

    @property
    def _plan(self) -> Plan:
        return Plan(start="none", steps=1, step_size=self.epsilon_value, restarts=1)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class PGD(GradientAttack):
    r"""Projected gradient ascent in the ball.

    .. math:: x'_{t+1} = \Pi\left(x'_t + \alpha\,s(\nabla_x L(x'_t, y))\right)

    with s the sign (linf) or the gradient of length 1 (l2), and :math:`\Pi` the projection into the
    bounds, then into the ball.

    Args:
        epsilon: the radius, a number or a fraction such as "8/255".
        step_size: the length of a step, written likewise; None for 2.5 epsilon / steps.
        steps: the number of steps, >= 1.
        norm: "linf" or "l2".
        targeted: whether y are classes to reach; the objective L is then descended.
        restarts: the number of attempts, >= 1; per example, one that fools the model is kept
            first, then the one with the largest objective.
        objective: "cross_entropy", "kl" (away from the clean output, as TRADES' adversary),
            "margin" or "dlr"; None is open to `with_defaults`, and "cross_entropy" alone.
        start: "none" (at x), "uniform" (in the ball) or "gaussian" (x + 0.001 N(0, 1), for inputs
            in [0, 1]); None is open to `with_defaults`, and "uniform" alone.
        bounds: the smallest and the largest value that an input may take.

    Raises:
        ValueError: an argument is none of those above; or restarts would all be alike, or
            objective "kl" has no gradient, with start "none".

    Example:
        >>> import tensorflow as tf
        >>> network = tf.constant([[1.0, -1.0], [0.0, 2.0]])
        >>> attack = PGD(epsilon="8/255", steps=10)
        >>> attack.name
        'PGD-10 linf 8/255'
        >>> x = tf.constant([[0.5, 0.5]])
        >>> adversarial = attack(lambda x: x @ network, x, [0], seed=1)
        >>> [round(float(entry), 4) for entry in (adversarial - x)[0]]
        [-0.0314, 0.0314]

    Reference:
        Madry et al. 2018, arXiv 1706.06083, section 2.1.
    """

    step_size: float | str | None = None
    steps: int = 10
    restarts: int = 1
    start: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("steps", _checks.integer("steps", self.steps, minimum=1))
        self._set("restarts", _checks.integer("restarts", self.restarts, minimum=1))
        _checks.one_of("start", self.start, (None, *STARTS))
        if self.step_size is not None:
            self._set("step_size", distance_field("step_size", self.step_size))
            if self._plan.step_size > 2 * self.epsilon_value:
                raise ValueError(
                    "step_size must be at most 2 * epsilon, the width of the ball, "
                    f"{2 * self.epsilon_value:g}, got {self.step_size!r}. None takes "
                    "2.5 * epsilon / steps."
                )
        if self.start == "none" and self.objective == "kl":
            raise ValueError(
                "objective='kl' has no gradient at x: use start='gaussian' or 'uniform' with it."
            )
        if self.start == "none" and self.restarts > 1:
            raise ValueError(
                f"restarts={self.restarts} attempts are all the same with start='none': use "
                "start='uniform', or restarts=1."
            )

    @property
    def _plan(self) -> Plan:
        default = 2.5 * self.epsilon_value / self.steps
        step_size = (
            default if self.step_size is None else _checks.distance("step_size", self.step_size)
        )
        return Plan(self.start or "uniform", self.steps, step_size, self.restarts)

    @property
    def _kind(self) -> str:
        return f"PGD-{self.steps}" + (f"x{self.restarts}" if self.restarts > 1 else "")

    def _with_start(self, start: str | None) -> Self:
        if self.start is not None or start is None or (start == "none" and self._needs_start):
            return self
        return dataclasses.replace(self, start=start)

    @property
    def _needs_start(self) -> bool:
        return self.restarts > 1 or self.objective == "kl"
