"""The run of an evaluation: examine the model, run the attacks, check them, count."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress

from tscnc_tf import _checks
from tscnc_tf.evaluation import data, doubts, subject
from tscnc_tf.evaluation.adversaries import Adversary, adversaries, checked
from tscnc_tf.evaluation.report import AttackResult, RobustnessReport, versions


def evaluate_robustness(
    model: Any,
    x: Any,
    y: Any = None,
    attacks: Any = (),
    *,
    batch_size: int = 128,
    seed: int = 0,
    bounds: tuple[float, float] = (0.0, 1.0),
    progress: bool = True,
) -> RobustnessReport:
    r"""Return the accuracy of a model, clean and under attack, and reasons to doubt it.

    Robust accuracy is that of the worst case, taken example by example: an example counts if the
    model is right on it and under every attack,

    .. math:: \frac1n \sum_i \prod_{x' \in \{x_i, x'_{i1}, x'_{i2}, \dots\}}
        [\operatorname{argmax} f(x') = y_i]

    It is an upper bound of the true one: a better attack may lower it. So the evaluation refuses
    what can't be right, and says what makes it doubtful: outputs that are no logits, attacks that
    leave their ball, an output that changes from call to call, gradients that are zero.

    Args:
        model: anything callable that returns logits `(batch, classes)` and that `tf.function` can
            compile: a Keras 3 or tf_keras model (run in inference mode), a loaded SavedModel,
            a loaded file of LiteRT or ONNX (without a gradient, so that attacks on it must be an
            `attacks.Transfer`), a function.
        x: inputs `(examples, ...)`, floats within `bounds`, given to the model as float32; or a
            batched `tf.data.Dataset` of pairs (inputs, labels), which is read into memory.
        y: labels, integers `(examples,)` or `(examples, 1)`, or one-hot `(examples, classes)`; None
            with a dataset.
        attacks: an attack, a list of them, or a dict by name. Each is an `attacks.Attack`, or a
            plain callable `(model, x, y) -> x_adv` that gets tensors; of the latter only the bounds
            are checked, since it declares no ball (`attacks.Custom` does that for a callable).
        batch_size: examples per batch.
        seed: batch i of each attack draws from the pair (seed, i), so that neither the order of the
            attacks nor their number matters. Plain callables seed themselves.
        bounds: the smallest and the largest value of an input.
        progress: whether to show a bar on stderr while it runs, if that is a terminal.

    Returns:
        A `RobustnessReport`: `print` it, read `robust_accuracy`, or `save` it as JSON.

    Raises:
        TypeError: an argument is of a wrong kind: inputs that are no floats, labels that are no
            integers, a model that can't be called, an attack that is none.
        ValueError: inputs or labels are out of range, the model returns probabilities or what is
            not finite, there are no attacks, one of them is targeted, or one of them returns what
            leaves its ball or the bounds.

    Warns:
        EvaluationWarning: the model's output changes from call to call, its outputs all lie in
            [0, 1] (as probabilities per class do), or the gradient that attacks ascend is exactly
            zero, or not a number, for some examples (if an attack may follow it; `attacks.Transfer`
            does not). Likewise for the source of a `Transfer`. Before the attacks are run.

    Example:
        >>> import numpy as np, tensorflow as tf
        >>> def model(x):
        ...     return tf.concat([x - 0.5, 0.5 - x], axis=1)
        >>> def attack(model, x, y):
        ...     return tf.where(y[:, None] == 0, x - 0.2, x + 0.2)
        >>> x, y = np.array([[0.9], [0.6], [0.2], [0.3]]), np.array([0, 0, 1, 0])
        >>> report = evaluate_robustness(model, x, y, attack)
        >>> report.clean_accuracy, report.robust_accuracy
        (0.75, 0.5)

    Reference:
        Croce & Hein 2020, arXiv 2003.01690, for the worst case and the checks; Athalye, Carlini &
        Wagner 2018, arXiv 1802.00420, for the signs of gradient masking.
    """
    begin = time.perf_counter()
    batch_size = _checks.integer("batch_size", batch_size, minimum=1)
    seed = _checks.integer("seed", seed, minimum=0)
    bounds = _checks.bounds("bounds", bounds)
    progress = _checks.boolean("progress", progress)
    opponents = adversaries(attacks, bounds)
    sources = _sources(opponents)
    inputs, labels, width = data.examples(x, y, bounds)
    batches = list(_batches(inputs, labels, batch_size))
    examined = subject.Subject(model, batches[0][0])
    _checks.require_classes(labels, examined.classes)
    if width not in (None, examined.classes):
        raise ValueError(
            f"y is one-hot of {width} classes, but the model returns {examined.classes} logits per "
            "example."
        )

    by_gradient = any(opponent.uses_gradient for opponent in opponents)
    logits, warned = _examine(examined, batches, by_gradient)
    clean = np.argmax(logits, axis=1) == labels
    for source in sources:
        said = f"source {source.name!r} of a Transfer"
        other = subject.Subject(source.model, batches[0][0], said)
        _, doubted = _examine(other, batches, source.by_gradient, said)
        warned += [f"{said}: {text}" for text in doubted]
    for text in warned:
        warnings.warn(text, doubts.EvaluationWarning, stacklevel=2)

    console = Console(stderr=True)
    shown = progress and console.is_terminal
    with Progress(console=console, transient=True, disable=not shown) as bar:
        results = {}
        for opponent in opponents:
            task = bar.add_task(opponent.name, total=len(batches))
            advance = functools.partial(bar.advance, task)
            results[opponent.name] = _attack(
                opponent, model, examined, batches, seed, bounds, advance
            )
    return RobustnessReport(
        clean_correct=clean,
        attacks=results,
        model=examined.name,
        seed=seed,
        batch_size=batch_size,
        bounds=bounds,
        warnings=tuple(warned),
        notes=tuple(doubts.after(clean, opponents, results)),
        versions=versions(),
        seconds=time.perf_counter() - begin,
    )


def _batches(
    inputs: np.ndarray, labels: np.ndarray, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(inputs), size):
        yield inputs[start : start + size], labels[start : start + size]


class _Source(NamedTuple):
    """A model that adversarial examples are found on, for another one to be judged by."""

    model: Any
    name: str
    by_gradient: bool


def _sources(opponents: list[Adversary]) -> list[_Source]:
    found: dict[int, _Source] = {}
    for opponent in opponents:
        if (transfer := opponent.transfer) is not None:
            model, by_gradient = transfer.source, transfer.attack.uses_gradient
            if id(model) in found:
                by_gradient |= found[id(model)].by_gradient
            found[id(model)] = _Source(model, str(opponent.source), by_gradient)
    return list(found.values())


def _examine(
    examined: subject.Subject,
    batches: list[tuple[np.ndarray, np.ndarray]],
    by_gradient: bool,
    role: str = "model",
) -> tuple[np.ndarray, list[str]]:
    """Return the logits of a model, and the reasons to doubt the attacks on it."""
    repeatable = examined.is_repeatable(batches[0][0])
    examined.compile()
    found = zip(*(examined.examine(*batch) for batch in batches), strict=True)
    logits, is_zero, is_nan = map(np.concatenate, found)
    subject.require_logits(logits, role)
    unit_interval = subject.within_unit_interval(logits)
    doubted = doubts.before(repeatable, unit_interval, is_zero & by_gradient, is_nan & by_gradient)
    return logits, doubted


def _attack(
    opponent: Adversary,
    model: Any,
    examined: subject.Subject,
    batches: list[tuple[np.ndarray, np.ndarray]],
    seed: int,
    bounds: tuple[float, float],
    advance: Callable[[], Any],
) -> AttackResult:
    """Run one attack on all batches and check what it returns."""
    begin, correct = time.perf_counter(), []
    run = opponent.on(model)
    farthest: dict[str, float] = {}
    for index, (x, y) in enumerate(batches):
        found, moved = checked(opponent, x, run(x, y, (seed, index)), bounds)
        farthest = {norm: max(moved[norm], farthest.get(norm, 0.0)) for norm in moved}
        logits = examined.logits(found)
        if not np.all(np.isfinite(logits)):
            raise ValueError(
                f"model returns NaN or infinity on what attack {opponent.name!r} found (batch "
                f"{index}): its logits overflow, so that neither gradients nor accuracy mean much."
            )
        correct.append(np.argmax(logits, axis=1) == y)
        advance()
    return AttackResult(
        name=opponent.name,
        description=opponent.description,
        correct=np.concatenate(correct),
        largest_distance=farthest,
        seconds=time.perf_counter() - begin,
    )
