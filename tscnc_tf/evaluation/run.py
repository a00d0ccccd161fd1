"""Robust accuracy: examine the model, run the attacks, check what they return, count."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import Progress

from tscnc_tf import _checks, _reports
from tscnc_tf.evaluation import diagnostics
from tscnc_tf.evaluation.adversaries import Adversary, Source, adversaries, checked
from tscnc_tf.evaluation.model_under_test import ModelUnderTest
from tscnc_tf.evaluation.report import AttackResult, RobustnessReport


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
    r"""Return the accuracy of a model, clean and under attack, with diagnostics.

    Robust accuracy is that of the worst case, taken example by example: an example counts if the
    model is right on it and under every attack,

    .. math:: \frac1n \sum_i \prod_{x' \in \{x_i, x'_{i1}, x'_{i2}, \dots\}}
        [\operatorname{argmax} f(x') = y_i]

    It is an upper bound of the true one: a better attack may lower it. Outputs that are no logits,
    and attacks that leave their ball or the bounds, are errors; an output that changes from call to
    call, or a gradient that is zero, is a warning.

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
    inputs, labels, width = _examples(x, y, bounds)
    batches = [
        (inputs[start : start + batch_size], labels[start : start + batch_size])
        for start in range(0, len(inputs), batch_size)
    ]
    examined = ModelUnderTest(model, batches[0][0])
    _checks.require_classes(labels, examined.classes)
    if width not in (None, examined.classes):
        raise ValueError(
            f"y is one-hot of {width} classes, but the model returns {examined.classes} logits per "
            "example."
        )

    by_gradient = any(opponent.uses_gradient for opponent in opponents)
    logits, warned = examined.examine(batches, by_gradient)
    clean = np.argmax(logits, axis=1) == labels
    for source in _sources(opponents):
        role = f"source {source.name!r} of a Transfer"
        _, texts = ModelUnderTest(source.model, batches[0][0], role).examine(
            batches, source.by_gradient
        )
        warned += [f"{role}: {text}" for text in texts]
    for text in warned:
        warnings.warn(text, diagnostics.EvaluationWarning, stacklevel=2)

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
        notes=tuple(diagnostics.of_results(clean, opponents, results)),
        versions=_reports.versions(),
        seconds=time.perf_counter() - begin,
    )


def _examples(
    x: Any, y: Any, bounds: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Return inputs `(n, ...)`, class indices `(n,)`, and the width of one-hot labels, else None.

    Args:
        x: inputs, or a batched `tf.data.Dataset` of pairs (inputs, labels).
        y: labels: integers `(n,)` or `(n, 1)`, or one-hot `(n, classes)`; None with a dataset.
        bounds: the smallest and the largest value of an input.

    Raises:
        TypeError: inputs are no floats, labels are no integers, or a dataset holds no pairs.
        ValueError: something about the values or shapes is wrong; the message says what.
    """
    if isinstance(x, tf.data.Dataset):
        if y is not None:
            raise ValueError("y must be None when x is a dataset: its labels are in the dataset.")
        x, y = _materialised(x)
    elif y is None:
        raise ValueError("y is None: robust accuracy needs labels (only a dataset brings its own).")
    inputs = _checks.inputs(x, bounds).numpy().astype(np.float32)
    labels, width = _checks.class_indices("y", y)
    if len(labels) != len(inputs):
        raise ValueError(f"x has {len(inputs)} examples, but y has {len(labels)} labels.")
    return inputs, labels, width


def _materialised(dataset: tf.data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    spec = dataset.element_spec
    if not isinstance(spec, tuple) or len(spec) != 2:
        raise TypeError(f"x must be a dataset of pairs (inputs, labels), got elements {spec}.")
    if not isinstance(spec[0], tf.TensorSpec):
        raise TypeError(
            f"x must be a dataset of one tensor of inputs and one of labels, got inputs {spec[0]}: "
            "what is attacked is one input. Wrap a model of several inputs into a function of one "
            "tensor."
        )
    if int(dataset.cardinality()) == tf.data.INFINITE_CARDINALITY:
        raise ValueError("x is a dataset without an end: limit it with dataset.take(batches).")
    if getattr(spec[1], "shape", tf.TensorShape(None)).rank == 0:
        raise ValueError("x must be a dataset of batches: use dataset.batch(batch_size).")
    batches = [(np.asarray(inputs), np.asarray(labels)) for inputs, labels in dataset]
    if not batches:
        raise ValueError("x is empty: the dataset has no batches.")
    inputs, labels = zip(*batches, strict=True)
    return np.concatenate(inputs), np.concatenate(labels)


def _sources(opponents: list[Adversary]) -> list[Source]:
    """Return the models that attacks run on other than the one evaluated, each once."""
    found: dict[int, Source] = {}
    for source in filter(None, (opponent.source for opponent in opponents)):
        known = found.get(id(source.model), source)
        found[id(source.model)] = known._replace(
            by_gradient=known.by_gradient or source.by_gradient
        )
    return list(found.values())


def _attack(
    opponent: Adversary,
    model: Any,
    examined: ModelUnderTest,
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
