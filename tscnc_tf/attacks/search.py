"""Attacks by repeated iterative attempts; an example drops out once the model is fooled on it."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _keras, losses
from tscnc_tf.attacks import pgd
from tscnc_tf.attacks.base import Attack, CompiledAttack
from tscnc_tf.functional import balls

# The default number of wrong classes that targeted searches try.
TARGET_CLASSES = 9

# The iterations between checks for fooled examples: the first number, doubling up to the second.
_STRIDES = (4, 64)


class Examples(NamedTuple):
    """Inputs per example of an attempt; the first axis of all tensors is the batch.

    Attributes:
        x: the clean inputs, in float32 at least.
        labels: labels of any form, or None.
        clean_logits: the model's logits at x; None if the search does not use them.
        row: the index of each example in the whole batch, for which random numbers are drawn.
    """

    x: tf.Tensor
    labels: Any
    clean_logits: Any
    row: tf.Tensor


class State(Protocol):
    """State per example of an attempt: a named tuple of tensors whose first axis is the batch.

    Attributes:
        fooled: whether an adversarial example inside the ball has been found.
        result: the first one found, else the best candidate, which may lie outside of the ball.
        best: the candidate of the largest score.
        score: the objective of the best candidate, larger for a stronger candidate.
    """

    @property
    def fooled(self) -> tf.Tensor: ...  # noqa: D102

    @property
    def result(self) -> tf.Tensor: ...  # noqa: D102

    @property
    def best(self) -> tf.Tensor: ...  # noqa: D102

    @property
    def score(self) -> tf.Tensor: ...  # noqa: D102


class Draws(NamedTuple):
    """Random numbers for the examples of an attempt.

    They are drawn for the whole batch, so those of an example don't depend on which others remain.

    Attributes:
        seed: two integers.
        size: the number of examples of the whole batch.
        row: the index of each example in the whole batch.
    """

    seed: tf.Tensor
    size: Any
    row: tf.Tensor

    def uniform(self, shape: Any, salt: Any, dtype: Any = tf.float32) -> tf.Tensor:
        """Return draws from U(-1, 1), `(batch, *shape)`; `salt` numbers independent draws."""
        return self._drawn(balls.uniform, shape, salt, dtype)

    def normal(self, points: tf.Tensor, salt: Any) -> tf.Tensor:
        """Return draws from N(0, 1), of the shape and dtype of `points`."""
        return like(self._drawn(balls.normal, tf.shape(points)[1:], salt, points.dtype), points)

    def on_sphere(self, points: tf.Tensor, norm: str, salt: Any) -> tf.Tensor:
        """Return random points of length 1 in a norm, of the shape and dtype of `points`."""
        if norm == "linf":
            draws = self.uniform(tf.shape(points)[1:], salt, points.dtype)
        else:
            draws = self.normal(points, salt)
        lengths = column(balls.lengths(draws, norm), points.shape.rank)
        return like(draws / (lengths + 1e-12), points)

    def _drawn(
        self, draw: Callable[..., tf.Tensor], shape: Any, salt: Any, dtype: Any
    ) -> tf.Tensor:
        whole = tf.concat([[self.size], tf.cast(shape, tf.int32)], axis=0)
        seed = tf.random.fold_in(self.seed, salt, alg="philox")
        return tf.gather(draw(whole, seed=seed, dtype=dtype), self.row)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search(CompiledAttack):
    """Base of attacks that consist of attempts of many iterations.

    In eager code, examples on which the model is fooled are left out of further iterations; within
    a graph they are not, with the same result. The hooks for subclasses below are pure functions.

    The first point that fools the model is the result. It lies next to the model's decision
    boundary, and may not fool another model: `for_transfer` returns a search whose results are the
    points of the largest score after all iterations.
    """

    norms: ClassVar[tuple[str, ...]] = (*balls.NORMS, "l1")
    restarts: int = 1
    _until_fooled: bool = dataclasses.field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("restarts", _checks.integer("restarts", self.restarts, minimum=1))

    def for_transfer(self) -> Attack:
        """Return this search with all iterations for all examples."""
        found = dataclasses.replace(self)
        found._set("_until_fooled", False)
        return found

    def describe(self) -> dict[str, Any]:
        """Return the description for reports, including the restarts."""
        return super().describe() | {"restarts": self.restarts}

    @property
    @abc.abstractmethod
    def _iterations(self) -> int:
        """The number of iterations of an attempt."""

    @property
    def _targets(self) -> int | None:
        """The most wrong classes that are tried in turn; None for an untargeted search."""
        return None

    @property
    def _compared_by(self) -> str:
        """The objective of `pgd.Ascent` by which candidates are compared."""
        return "margin"

    @property
    def _needs_clean_logits(self) -> bool:
        """Whether an attempt needs the logits at x."""
        return self._targets is not None

    def _attempts(self, classes: int | None) -> int:
        """Return the number of attempts.

        Args:
            classes: the model's number of classes, None if not known.

        Raises:
            ValueError: the attack does not support that number of classes.
        """
        if self._targets is None:
            return self.restarts
        targets = self._targets if classes is None else min(self._targets, classes - 1)
        return self.restarts * targets

    def _ascent(self, logits_fn: Any, examples: Examples, dtype: Any, attempt: Any) -> pgd.Ascent:
        """Return the objective of an attempt; `dtype` is that of the model's inputs."""
        targets = None
        if self._targets is not None:
            targets = _ranked_class(examples, tf.convert_to_tensor(attempt) // self.restarts)
        return pgd.Ascent(
            logits_fn,
            examples.x,
            labels=examples.labels,
            objective=self._compared_by,
            targeted=False,
            clean_logits=examples.clean_logits,
            targets=targets,
            dtype=dtype,
        )

    @abc.abstractmethod
    def _begin(self, ascent: pgd.Ascent, examples: Examples, attempt: Any, draws: Draws) -> State:
        """Return the state at the start of an attempt; `attempt` is its index, a tensor."""

    @abc.abstractmethod
    def _advance(
        self, ascent: pgd.Ascent, examples: Examples, state: Any, index: Any, draws: Draws
    ) -> State:
        """Return the state after the iteration of number `index`, counted from 0."""

    def perturb(
        self,
        logits_fn: Callable[[tf.Tensor], tf.Tensor],
        x: tf.Tensor,
        y: Any,
        seed: tf.Tensor,
        clean_logits: Any = None,
        unroll: int = 0,  # noqa: ARG002
        *,
        until_fooled: bool = False,
    ) -> tf.Tensor:
        """Return adversarial examples: the pure graph of the attack, for a training step.

        As `GradientAttack.perturb`, but the iterations are always looped. The results are the
        candidates of the largest score, as training needs them; with `until_fooled`, the first
        candidates that fool the model, where there are any.
        """
        self._check_size(x.shape)
        self.check_labels(y)
        anchor = _checks.widened(x)
        size = tf.shape(x)[0]
        if clean_logits is None and self._needs_clean_logits:
            clean_logits = _checks.widened(logits_fn(x))
        labels = None if y is None else tf.convert_to_tensor(y)
        examples = Examples(anchor, labels, clean_logits, tf.range(size))

        def attempted(attempt: Any) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            draws = Draws(tf.random.fold_in(seed, attempt, alg="philox"), size, examples.row)
            ascent = self._ascent(logits_fn, examples, x.dtype, attempt)
            state = self._begin(ascent, examples, attempt, draws)
            state = self._advanced(ascent, examples, state, 0, self._iterations, draws)
            if until_fooled:
                return state.result, state.fooled, state.score
            return state.best, tf.zeros_like(state.fooled), state.score

        def better(attempt: Any, *best: tf.Tensor) -> tuple[Any, ...]:
            new = attempted(attempt)
            gains = ~best[1] & (new[1] | (new[2] > best[2]))
            return attempt + 1, *(choose(gains, *pair) for pair in zip(new, best, strict=True))

        classes = None if clean_logits is None else clean_logits.shape[-1]
        attempts = self._attempts(classes)
        best = attempted(0)
        if attempts > 1:
            best = tf.while_loop(
                lambda attempt, *_: attempt < attempts,
                better,
                (1, *best),
                maximum_iterations=attempts - 1,
                parallel_iterations=1,
            )[1:]
        return self._inside_ball(x, best[0])

    def _inside_ball(self, x: tf.Tensor, point: tf.Tensor) -> tf.Tensor:
        """Return points in the dtype of x, inside the ball and the bounds, without gradient."""
        return tf.stop_gradient(self._rounded(x, self._feasible(_checks.widened(x), point)))

    def _advanced(
        self,
        ascent: pgd.Ascent,
        examples: Examples,
        state: Any,
        begin: Any,
        end: Any,
        draws: Draws,
    ) -> Any:
        """Return the state after the iterations from `begin` to before `end`."""

        def body(index: Any, before: Any) -> tuple[Any, Any]:
            after = self._advance(ascent, examples, before, index, draws)
            return index + 1, tf.nest.map_structure(like, after, before)

        return tf.while_loop(
            lambda index, _: index < end, body, (begin, state), parallel_iterations=1
        )[1]

    def _run(self, model: Any, x: tf.Tensor, y: Any, seed: tf.Tensor) -> tf.Tensor:
        if tf.executing_eagerly() and self._until_fooled:
            return SearchRunner(self, lambda: model, compiled=False)(x, y, seed)
        logits_fn = _keras.inference(model)
        return self.perturb(logits_fn, x, y, seed, until_fooled=self._until_fooled)

    def _graph(self, recall: Callable[[], Any]) -> Callable[..., tf.Tensor]:
        if self._until_fooled:
            return SearchRunner(self, recall, compiled=True)
        return pgd.CompiledAscent(self, recall)


class SearchRunner:
    """A search on one model, run from Python, without the examples that are already fooled.

    Args:
        attack: the search.
        recall: returns the model; it may hold a weak reference.
        compiled: whether the parts of an attempt are compiled, for all batch sizes.
    """

    def __init__(self, attack: Search, recall: Callable[[], Any], *, compiled: bool) -> None:
        self._attack = attack
        self._recall = recall
        wrap: Callable[[Any], Any] = _CompiledPart if compiled else lambda function: function
        self._logits = wrap(self._trace_logits)
        self._begin = wrap(self._trace_begin)
        self._advance = wrap(self._trace_advance)

    def __call__(self, x: tf.Tensor, y: tf.Tensor | None, seed: tf.Tensor) -> tf.Tensor:
        """Return adversarial examples for a checked batch."""
        attack = self._attack
        _keras.inference(self._recall())  # builds the view without wrappers outside of the graphs
        attack.check_labels(y)
        clean_logits = self._logits(x)
        if y is not None:
            _checks.require_classes(y, clean_logits.shape[-1])
        size = tf.constant(x.shape[0])
        given = Examples(_checks.widened(x), y, clean_logits, tf.range(size))
        result = given.x.numpy()
        score = np.full(len(result), -np.inf)
        fooled = np.zeros(len(result), dtype=bool)
        # An empty tensor, which passes the dtype of the model's inputs.
        kind = tf.zeros(0, x.dtype)
        for attempt in map(tf.constant, range(attack._attempts(clean_logits.shape[-1]))):
            rows = np.flatnonzero(~fooled)
            if not len(rows):
                break
            examples = _taken(given, rows)
            seeds = tf.random.fold_in(seed, attempt, alg="philox")
            state = self._begin(kind, examples, attempt, seeds, size)
            done, stride = 0, _STRIDES[0]
            while True:
                is_robust = ~state.fooled.numpy()
                if not np.all(is_robust):
                    done_rows = rows[~is_robust]
                    result[done_rows], fooled[done_rows] = state.result.numpy()[~is_robust], True
                    keep = np.flatnonzero(is_robust)
                    rows, examples, state = rows[keep], _taken(examples, keep), _taken(state, keep)
                if not len(rows) or done == attack._iterations:
                    break
                end = min(done + stride, attack._iterations)
                ends = tf.constant(done), tf.constant(end)
                state = self._advance(kind, examples, state, attempt, *ends, seeds, size)
                done, stride = end, min(2 * stride, _STRIDES[1])
            if len(rows):
                gains = state.score.numpy() > score[rows]
                result[rows[gains]] = state.result.numpy()[gains]
                score[rows[gains]] = state.score.numpy()[gains]
        return attack._inside_ball(x, tf.constant(result))

    def _trace_logits(self, x: tf.Tensor) -> tf.Tensor:
        examples = Examples(x, None, None, tf.range(tf.shape(x)[0]))
        return pgd.Ascent(
            self._logits_fn, examples.x, labels=None, objective="margin", targeted=False
        ).logits(x)

    def _trace_begin(
        self, kind: tf.Tensor, examples: Examples, attempt: Any, seed: tf.Tensor, size: Any
    ) -> Any:
        ascent = self._attack._ascent(self._logits_fn, examples, kind.dtype, attempt)
        draws = Draws(seed, size, examples.row)
        return self._attack._begin(ascent, examples, attempt, draws)

    def _trace_advance(
        self,
        kind: tf.Tensor,
        examples: Examples,
        state: Any,
        attempt: Any,
        begin: Any,
        end: Any,
        seed: tf.Tensor,
        size: Any,
    ) -> Any:
        ascent = self._attack._ascent(self._logits_fn, examples, kind.dtype, attempt)
        draws = Draws(seed, size, examples.row)
        return self._attack._advanced(ascent, examples, state, begin, end, draws)

    @property
    def _logits_fn(self) -> Callable[[tf.Tensor], Any]:
        return _keras.inference(self._recall())


class _CompiledPart:
    """A function of tensors and tuples of them, compiled for all sizes of their first axes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = tf.function(function, autograph=False)

    def __call__(self, *values: Any) -> Any:
        specs = tf.nest.map_structure(_spec, values)
        concrete = self._function.get_concrete_function(*specs)
        return concrete(*(part for part in tf.nest.flatten(values) if part is not None))


def _spec(value: tf.Tensor | None) -> tf.TensorSpec | None:
    if value is None:
        return None
    shape = value.shape
    return tf.TensorSpec(shape if shape.rank == 0 else (None, *shape[1:]), value.dtype)


def _taken(parts: Any, rows: np.ndarray) -> Any:
    """Return the given rows of all tensors of a nested structure."""
    return tf.nest.map_structure(
        lambda part: None if part is None else tf.gather(part, rows), parts
    )


def like(new: Any, old: Any) -> tf.Tensor:
    """Return a tensor with the static shape of another one, as `tf.while_loop` requires it."""
    return tf.ensure_shape(new, old.shape)


def column(values: tf.Tensor, rank: int) -> tf.Tensor:
    """Return one number per example in a shape that broadcasts with tensors of this rank."""
    return values[(slice(None), *[tf.newaxis] * (rank - 1))]


def choose(condition: tf.Tensor, new: tf.Tensor, old: tf.Tensor) -> tf.Tensor:
    """Return the examples of `new` where a condition per example holds, else those of `old`."""
    return like(tf.where(column(condition, old.shape.rank), new, old), old)


def _ranked_class(examples: Examples, rank: Any) -> tf.Tensor:
    """Return per example the wrong class of the given rank in the clean logits, largest first.

    Args:
        examples: with labels and clean logits.
        rank: counted from 0; ranks beyond the last wrong class give the last one.
    """
    _, others = losses.split(examples.labels, examples.clean_logits)
    order = tf.argsort(others, axis=-1, direction="DESCENDING", stable=True)
    return order[:, tf.minimum(rank, tf.shape(order)[1] - 2)]
