"""Attacks by gradient steps, each projected into the ball: FGSM, PGD, and their loop."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Self, final

import tensorflow as tf

from tscnc_tf import _checks, _keras, losses
from tscnc_tf.attacks.base import CompiledAttack, distance_field
from tscnc_tf.functional import balls

OBJECTIVES = ("cross_entropy", "kl", "margin", "dlr")
STARTS = ("none", "uniform", "gaussian")

# Up to this number, steps are unrolled in the graph of a training step; see `_ascend`.
_UNROLLED_STEPS = 10


class Plan(NamedTuple):
    """The parameters of an attack's loop, with defaults resolved."""

    start: str
    steps: int
    step_size: float
    restarts: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientAttack(CompiledAttack):
    """Base of attacks by steepest ascent steps, each projected into the ball.

    Subclasses implement `_plan`, and may override `_ascend`.

    Args:
        targeted: whether y are target classes; the objective is then descended.
        objective: the objective to ascend; None for that of `with_defaults`, or "cross_entropy".
    """

    targeted: bool = False
    objective: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.boolean("targeted", self.targeted)
        _checks.one_of("objective", self.objective, self._objectives)
        if self.objective == "kl" and self.targeted:
            raise ValueError(
                "objective='kl' can't be targeted: it moves away from the clean output, to no "
                "class in particular. Use objective='cross_entropy' or 'margin'."
            )

    @property
    def _objectives(self) -> tuple[str | None, ...]:
        """The values that `objective` may have."""
        return (None, *OBJECTIVES)

    @property
    @abc.abstractmethod
    def _plan(self) -> Plan:
        """The parameters of the loop."""

    def perturb(
        self,
        logits_fn: Callable[[tf.Tensor], tf.Tensor],
        x: tf.Tensor,
        y: Any,
        seed: tf.Tensor,
        clean_logits: Any = None,
        unroll: int = _UNROLLED_STEPS,
    ) -> tf.Tensor:
        """Return adversarial examples: the pure graph of the attack, for a training step.

        Values are not checked. It compiles with `jit_compile=True`.

        Args:
            logits_fn: from x to logits, in inference mode.
            x: `(batch, ...)`, of a known rank and a float dtype.
            y: labels of any form; may be None for objective "kl".
            seed: two integers, int32.
            clean_logits: the logits at x in inference mode, if already computed, or those of
                another network in their place; only objective "kl" uses them.
            unroll: the largest number of steps that is unrolled rather than looped.

        Returns:
            A tensor of the shape and dtype of `x`, without gradient.

        Raises:
            ValueError: y is missing, or the model has no gradient in x.
        """
        self._check_size(x.shape)
        self.check_labels(y)
        # Half precision can't represent steps of 1/255 near 1; the network's inputs are cast back.
        anchor = _checks.widened(x)
        ascent = Ascent(
            logits_fn,
            x,
            labels=y,
            objective=self._objective,
            targeted=self.targeted,
            clean_logits=clean_logits,
        )

        def attempt(index: Any) -> tf.Tensor:
            start = self._start(anchor, tf.random.fold_in(seed, index, alg="philox"))
            return self._ascend(ascent, anchor, start, unroll)

        adversarial = self._best_of(attempt, ascent)
        return tf.stop_gradient(self._rounded(x, adversarial))

    def with_defaults(self, *, objective: str | None = None, start: str | None = None) -> Self:
        """Return this attack with defaults for the fields that are None.

        Defaults that the attack can't use are ignored: "kl" has no gradient at x and no target
        class, so it is not used by attacks that start at x, nor by targeted ones.
        """
        _checks.one_of("objective", objective, (None, *OBJECTIVES))
        _checks.one_of("start", start, (None, *STARTS))
        chosen = self._with_start(start)
        if self.objective is not None or objective is None:
            return chosen
        if objective == "kl" and (self.targeted or chosen._plan.start == "none"):
            return chosen
        return dataclasses.replace(chosen, objective=objective)

    def _with_start(self, start: str | None) -> Self:  # noqa: ARG002
        """Return this attack with a default for its start, if it has one that is None."""
        return self

    def describe(self) -> dict[str, Any]:
        """Return the description for reports, with defaults resolved."""
        plan = self._plan
        return super().describe() | {
            "step_size": _checks.as_written(plan.step_size),
            "step_size_value": plan.step_size,
            "steps": plan.steps,
            "restarts": plan.restarts,
            "objective": self._objective,
            "targeted": self.targeted,
            "start": plan.start,
        }

    @property
    def name(self) -> str:
        """A short name for tables, such as "PGD-10 linf 8/255" or "PGD-50x5 l2 0.5 margin"."""
        extra = [] if self._objective == "cross_entropy" else [self._objective]
        return " ".join([self._kind, self._ball, *extra, *(["targeted"] if self.targeted else [])])

    @property
    def _kind(self) -> str:
        return type(self).__name__

    @property
    def _objective(self) -> str:
        return self.objective or "cross_entropy"

    def _run(self, model: Any, x: tf.Tensor, y: Any, seed: tf.Tensor) -> tf.Tensor:
        classes: list[int | None] = []
        result = self.perturb(recording_classes(_keras.inference(model), classes), x, y, seed)
        if tf.executing_eagerly() and y is not None:
            _checks.require_classes(y, classes[0])
        return result

    def _graph(self, recall: Callable[[], Any]) -> Callable[..., tf.Tensor]:
        return CompiledAscent(self, recall)

    def check_labels(self, y: Any) -> None:
        """Raise a ValueError if the labels that the objective needs are missing."""
        if y is not None or self._objective == "kl":
            return
        if self.targeted:
            raise ValueError("y is missing: a targeted attack needs the classes to reach.")
        raise ValueError(
            f"y is missing: objective={self._objective!r} needs the labels. Without labels, use "
            "objective='kl', which moves away from the clean output, or pass the predicted classes."
        )

    def _start(self, anchor: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Return the start of an attempt, inside the ball and the bounds."""
        kind = self._plan.start
        if kind == "uniform":
            offset = balls.random_start(
                tf.shape(anchor), self.epsilon_value, self.norm, seed, anchor.dtype
            )
        elif kind == "gaussian":
            # 0.001 for inputs in [0, 1], and the same share of any other width.
            noise = balls.normal(tf.shape(anchor), seed, anchor.dtype)
            offset = (0.001 * self._width) * noise
        else:
            offset = tf.zeros_like(anchor)
        return self._feasible(anchor, anchor + tf.ensure_shape(offset, anchor.shape))

    def _ascend(
        self, ascent: Ascent, anchor: tf.Tensor, start: tf.Tensor, unroll: int
    ) -> tf.Tensor:
        """Return the end point of the attempt that starts at `start`.

        Measured on the CPU with small convolutional networks and ten steps, a loop takes as long
        as unrolled steps or a few per cent longer in a plain graph, but two to three times as long
        under XLA. The size of an unrolled graph, and the time to trace and compile it, grow with
        the steps; hence the limit, at the ten steps of adversarial training.
        """
        plan = self._plan

        def step(point: tf.Tensor) -> tf.Tensor:
            direction = balls.steepest_ascent(ascent.gradient(point), self.norm)
            return self._feasible(anchor, point + plan.step_size * direction)

        if plan.steps <= unroll:
            for _ in range(plan.steps):
                start = step(start)
            return start
        return tf.while_loop(
            lambda count, point: count < plan.steps,  # noqa: ARG005
            lambda count, point: (count + 1, step(point)),
            (0, start),
            maximum_iterations=plan.steps,
            parallel_iterations=1,
        )[1]

    def _best_of(self, attempt: Callable[[Any], tf.Tensor], ascent: Ascent) -> tf.Tensor:
        """Return the best attempt per example: fooling ones first, then by the largest score."""
        restarts = self._plan.restarts
        first = attempt(0)
        if restarts == 1:
            return first

        def evaluated(point: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            logits = ascent.logits(point)
            return point, ascent.is_fooled(logits), ascent.score(logits)

        def better(
            index: Any, point: tf.Tensor, fooled: tf.Tensor, score: tf.Tensor
        ) -> tuple[Any, tf.Tensor, tf.Tensor, tf.Tensor]:
            new_point, new_fooled, new_score = evaluated(attempt(index))
            gains = (new_fooled & ~fooled) | ((new_fooled == fooled) & (new_score > score))
            column = gains[(slice(None), *[tf.newaxis] * (point.shape.rank - 1))]
            return (
                index + 1,
                tf.ensure_shape(tf.where(column, new_point, point), point.shape),
                tf.where(gains, new_fooled, fooled),
                tf.where(gains, new_score, score),
            )

        return tf.while_loop(
            lambda index, *_: index < restarts,
            better,
            (1, *evaluated(first)),
            maximum_iterations=restarts - 1,
            parallel_iterations=1,
        )[1]


def effort(steps: int, restarts: int) -> str:
    """Return the steps, and restarts if there are several, for names, such as "50x5"."""
    return f"{steps}x{restarts}" if restarts > 1 else str(steps)


class CompiledAscent:
    """An attack on one model as compiled graphs, each for all batch sizes.

    There is one graph per shape of the inputs (without the batch axis) and dtype.

    Args:
        attack: its `perturb` is compiled.
        recall: returns the model; it may hold a weak reference.
    """

    def __init__(self, attack: Any, recall: Callable[[], Any]) -> None:
        self._attack = attack
        self._recall = recall
        self._function = tf.function(self._run)
        self._classes: list[int | None] = []

    def __call__(self, x: tf.Tensor, y: tf.Tensor | None, seed: tf.Tensor) -> tf.Tensor:
        """Run, after checking the labels against the number of classes found by tracing."""
        _keras.inference(self._recall())  # builds the view without wrappers outside of the graph
        self._attack.check_labels(y)
        tensors = (x, seed) if y is None else (x, seed, y)
        forms = [(None, *x.shape[1:]), (2,)] + ([] if y is None else [(None, *y.shape[1:])])
        specs = tuple(tf.TensorSpec(s, t.dtype) for s, t in zip(forms, tensors, strict=True))
        concrete = self._function.get_concrete_function(specs)
        if y is not None:
            _checks.require_classes(y, self._classes[0])
        return concrete(tensors)

    def _run(self, tensors: tuple[tf.Tensor, ...]) -> tf.Tensor:
        logits_fn = recording_classes(_keras.inference(self._recall()), self._classes)
        x, seed, *labels = tensors
        y = labels[0] if labels else None
        # Tracing a loop takes a sixth of the time of unrolled steps, and the graph may run once.
        return self._attack.perturb(logits_fn, x, y, seed, unroll=1)


def recording_classes(
    logits_fn: Callable[[tf.Tensor], Any], found: list[int | None]
) -> Callable[[tf.Tensor], Any]:
    """Return `logits_fn` wrapped to append its number of logits (None if not known) to a list."""

    def recording(x: tf.Tensor) -> Any:
        logits = logits_fn(x)
        found.append(logits.shape[-1] if tf.is_tensor(logits) else None)
        return logits

    return recording


class Ascent:
    """The objective that an attack maximises on one batch, as a function of logits.

    Args:
        logits_fn: from x to logits, in inference mode.
        x: the clean inputs.
        labels: labels of any form; None where the objective needs none.
        objective: one of `OBJECTIVES`, or "targeted_dlr".
        targeted: whether the labels are target classes; the objective is then descended.
        clean_logits: the reference logits of "kl"; None to compute the logits at x.
        targets: the target classes of "targeted_dlr", integers `(batch,)`.
        dtype: of the inputs of `logits_fn`; None for that of x.
    """

    def __init__(
        self,
        logits_fn: Callable[[tf.Tensor], Any],
        x: tf.Tensor,
        *,
        labels: Any,
        objective: str,
        targeted: bool,
        clean_logits: Any = None,
        targets: Any = None,
        dtype: Any = None,
    ) -> None:
        self._logits_fn = logits_fn
        self._dtype = dtype or x.dtype
        self._objective = objective
        self._targeted = targeted
        self._labels = None if labels is None else tf.convert_to_tensor(labels)
        self.targets = targets
        if objective == "kl":
            clean_logits = self.logits(x) if clean_logits is None else _checks.widened(clean_logits)
            self._reference = tf.stop_gradient(clean_logits)

    def logits(self, x: tf.Tensor) -> tf.Tensor:
        """Return the network's logits in float32 (or float64)."""
        logits = self._logits_fn(tf.cast(x, self._dtype))
        if not tf.is_tensor(logits) or logits.shape.rank not in (None, 2):
            shape = logits.shape if tf.is_tensor(logits) else type(logits).__name__
            raise ValueError(
                f"model must return one tensor of logits of shape (batch, classes), got {shape}: "
                "wrap it in a function that does."
            )
        # The rank may have been unknown.
        return tf.ensure_shape(_checks.widened(logits), (None, None))

    def score(self, logits: tf.Tensor) -> tf.Tensor:
        """Return the objective per example, negated for a targeted attack: it is maximised."""
        value = self._value(logits)
        return -value if self._targeted else value

    def is_fooled(self, logits: tf.Tensor) -> tf.Tensor:
        """Return for each example whether the attack succeeds at these logits."""
        prediction = tf.argmax(logits, axis=-1)
        if self._labels is None:
            return prediction != tf.argmax(self._reference, axis=-1)
        classes = tf.argmax(losses.one_hot(self._labels, classes_of(logits)), axis=-1)
        return prediction == classes if self._targeted else prediction != classes

    def gradient(self, x: tf.Tensor) -> tf.Tensor:
        """Return the gradient of the score at x, as `logits_and_gradient` does."""
        return self.logits_and_gradient(x)[1]

    def logits_and_gradient(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the logits at x, and the gradient of the score up to a factor > 0 per example.

        Raises:
            ValueError: the model's output does not depend on x in a differentiable way.
        """
        return self.pull_back(x, lambda logits: slope(self.score, logits))

    def pull_back(
        self, x: tf.Tensor, weights: Callable[[tf.Tensor], tf.Tensor]
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the logits at x, and the gradient of their weighted sum with constant weights.

        Args:
            x: the inputs.
            weights: from logits to the weights of the sum, of the same shape.

        Raises:
            ValueError: the model's output does not depend on x in a differentiable way.
        """
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            logits = self.logits(x)
        try:
            gradient = tape.gradient(logits, x, output_gradients=weights(logits))
        except LookupError as error:  # an operation without a gradient, such as numpy_function
            raise ValueError(f"{_NOT_DIFFERENTIABLE} ({error})") from error
        if gradient is None:
            raise ValueError(_NOT_DIFFERENTIABLE)
        gradient = tf.ensure_shape(gradient, x.shape)
        # float16 may overflow in the backward pass. NaN becomes 0 and infinity the largest number,
        # since otherwise the whole example, and weights trained on it, would become NaN.
        gradient = tf.where(tf.math.is_nan(gradient), tf.zeros_like(gradient), gradient)
        return logits, tf.clip_by_value(gradient, gradient.dtype.min, gradient.dtype.max)

    def is_true_class(self, logits: tf.Tensor) -> tf.Tensor:
        """Return a mask of the shape of `logits` with True at each example's class."""
        return losses.is_true_class(self._labels, logits)

    def _value(self, logits: tf.Tensor) -> tf.Tensor:
        if self._objective == "kl":
            # The shift changes the rounding of the gradient only: that of the top class is computed
            # as minus the sum of the others, instead of 1 - 1 with a larger rounding error.
            top = tf.argmax(self._reference, axis=-1)
            shifted = logits - tf.gather(logits, top, batch_dims=1)[:, tf.newaxis]
            return losses.kl_divergence(self._reference, shifted)
        if self._labels is None:
            raise ValueError(f"labels must not be None for objective={self._objective!r}.")
        if self._objective == "margin":
            return losses.margin(self._labels, logits)
        if self._objective == "dlr":
            return losses.dlr(self._labels, logits)
        if self._objective == "targeted_dlr":
            return losses.targeted_dlr(self._labels, self.targets, logits)
        # Cross-entropy: the log-odds have the same direction of ascent, and do not saturate.
        return losses.log_odds(self._labels, logits)


def slope(score: Callable[[tf.Tensor], tf.Tensor], logits: tf.Tensor) -> tf.Tensor:
    """Return a score's gradient at the logits, its largest entry scaled to 1 per example.

    A positive factor per example changes neither sign nor normalised gradient steps; unscaled, the
    gradient of a well-fitted example would underflow in a float16 network.
    """
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(logits)
        value = score(logits)
    gradient = tape.gradient(value, logits)
    return tf.math.divide_no_nan(gradient, tf.reduce_max(tf.abs(gradient), axis=-1, keepdims=True))


_NOT_DIFFERENTIABLE = (
    "model is not differentiable in x, so there is no gradient to follow: pass a model that is "
    "TensorFlow operations from end to end, or an attack that needs no gradient, such as Square."
)


def classes_of(logits: tf.Tensor) -> Any:
    """Return the number of classes of logits, a tensor where it is not static."""
    return tf.shape(logits)[1] if logits.shape[1] is None else logits.shape[1]


@final
@_keras.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class FGSM(GradientAttack):
    r"""The fast gradient method: one step of length epsilon from x.

    .. math:: x' = x + \epsilon\,\mathrm{sign}(g) \ (\text{linf}), \qquad
        x' = x + \epsilon\, g / \|g\|_2 \ (\text{l2}), \qquad g = \nabla_x L(x, y)

    clipped to the bounds.

    Args:
        epsilon: the radius, a number or a fraction such as "8/255".
        norm: "linf" or "l2".
        targeted: whether y are target classes; the objective L is then descended.
        bounds: the smallest and the largest value that an input may take.
        objective: "cross_entropy", "margin" or "dlr"; None for the default of `with_defaults`, or
            "cross_entropy". ("kl" has no gradient at x.)

    Raises:
        TypeError, ValueError: an argument is not as described.

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
@_keras.register
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
        targeted: whether y are target classes; the objective L is then descended.
        restarts: the number of attempts, >= 1; the best is kept per example, fooling ones first,
            then by the largest objective.
        objective: "cross_entropy", "kl" (away from the clean output, as TRADES' adversary),
            "margin" or "dlr"; None for the default of `with_defaults`, or "cross_entropy".
        start: "none" (at x), "uniform" (in the ball) or "gaussian" (x + 0.001 N(0, 1), for inputs
            in [0, 1]); None for the default of `with_defaults`, or "uniform".
        bounds: the smallest and the largest value that an input may take.

    Raises:
        TypeError, ValueError: an argument is not as described; or start "none" is combined with
            several restarts, which would be equal, or with objective "kl", which has no gradient.

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
        return f"PGD-{effort(self.steps, self.restarts)}"

    def _with_start(self, start: str | None) -> Self:
        if self.start is not None or start is None or (start == "none" and self._needs_start):
            return self
        return dataclasses.replace(self, start=start)

    @property
    def _needs_start(self) -> bool:
        return self.restarts > 1 or self.objective == "kl"
