"""The evaluation: it checks the model, runs the attacks, and checks and counts their results."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tscnc_tf import _checks, _reports
from tscnc_tf import attacks as attacks_
from tscnc_tf.evaluation import diagnostics, probes
from tscnc_tf.evaluation.adversaries import Adversary, Source, as_adversaries, checked
from tscnc_tf.evaluation.model_under_test import ModelUnderTest, are_tied
from tscnc_tf.evaluation.replicas import Replicas
from tscnc_tf.evaluation.report import AttackResult, EnsemblePart, RobustnessReport
from tscnc_tf.evaluation.state import AttackProgress, EvaluationState, digest_of_weights, digests


def evaluate_robustness(
    model: Any,
    x: Any,
    y: Any = None,
    attacks: Any = None,
    *,
    epsilon: float | str | None = None,
    norm: str | None = None,
    batch_size: int = 128,
    seed: int = 0,
    bounds: tuple[float, float] = (0.0, 1.0),
    diagnose: bool | None = None,
    state_path: Any = None,
    progress: bool = True,
) -> RobustnessReport:
    r"""Return the accuracy of a model, clean and under attack, with diagnostics.

    Robust accuracy is the accuracy in the worst case per example: an example counts if the model is
    right on it and under every attack,

    .. math:: \frac1n \sum_i \prod_{x' \in \{x_i, x'_{i1}, x'_{i2}, \dots\}}
        [\operatorname{argmax} f(x') = y_i]

    It is an upper bound of the true robust accuracy: a stronger attack may lower it. The default is
    `attacks.AutoAttack`, the standard of the field. Outputs that are not logits, and attacks that
    leave their ball or the bounds, are errors. Signs that the accuracy is too high, such as zero
    gradients, are warnings.

    For a model that was built under a `tf.distribute.MirroredStrategy`, or in the scope of one, the
    batches of compiled attacks, such as PGD and AutoAttack, are distributed over its replicas. The
    report is the same. They are not distributed over several workers
    (`MultiWorkerMirroredStrategy`): each evaluates all that it is given on one device. Give each
    worker a part, such as `x[worker::workers]`, and a `state_path` of its own, and average the
    accuracies by the numbers of examples.

    Args:
        model: anything callable that returns logits `(batch, classes)` and that `tf.function` can
            compile: a Keras 3 or tf_keras model (run in inference mode), a loaded SavedModel, a
            function, or a loaded LiteRT or ONNX file. Files have no gradient: use `attacks.Square`
            or `attacks.Transfer`; of `attacks.AutoAttack` only Square is run.
        x: inputs `(examples, ...)`, floats within `bounds`, given to the model as float32; or a
            batched `tf.data.Dataset` of pairs (inputs, labels), which is read into memory.
        y: labels, integers `(examples,)` or `(examples, 1)`, or one-hot `(examples, classes)`; None
            with a dataset.
        attacks: an attack, a list of them, or a dict by name. Each is an `attacks.Attack`, or a
            plain callable `(model, x, y) -> x_adv` that gets tensors. For a plain callable only the
            bounds are checked, since it declares no ball; `attacks.Custom` declares one. None for
            `attacks.AutoAttack` in the ball of `epsilon` and `norm`.
        epsilon: the radius of the ball, a number or a fraction such as "8/255"; only without
            `attacks`, which have their own.
        norm: "linf" (also for None), "l2" or "l1"; only without `attacks`.
        batch_size: examples per batch.
        seed: batch i of each attack uses the seed (seed, i), so results do not depend on the order
            and number of the attacks. Plain callables get no seed.
        bounds: the smallest and the largest value of an input.
        diagnose: whether to run the diagnostics "ladder" and "transfer-wins", which run attacks of
            their own, in the ball of an attack, for a few seconds; not on files, which have no
            gradient. None for True if there is an `attacks.AutoAttack`.
        state_path: a file to which the progress is written about once a second. If it exists, the
            evaluation continues from it, with the same result. Attacks of your own are known by
            their source and the numbers, text and arrays that they hold, not by what they call.
        progress: whether to show a bar on stderr while it runs, if that is a terminal.

    Returns:
        A `RobustnessReport`: `print` it, read `robust_accuracy`, or `save` it as JSON.

    Raises:
        TypeError: an argument is of a wrong type: inputs are not floats, labels are not integers,
            or the model or an attack is not callable.
        ValueError: inputs or labels are out of range; the model returns probabilities or values
            that are not finite; there are neither attacks nor epsilon, or both; an attack is
            targeted, or its result lies outside its ball or the bounds; `diagnose` is set, and no
            attack has a radius; or the file at `state_path` belongs to another model, other data,
            attacks, settings or versions.

    Warns:
        EvaluationWarning: a sign that the robust accuracy is too high, for the model or the source
            of a `Transfer`. It begins with a name ("zero-gradients", "black-box-wins", ...), under
            which the guide to evaluation gives cause and remedy.

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
    seed = _checks.seed("seed", seed)
    bounds = _checks.bounds("bounds", bounds)
    progress = _checks.boolean("progress", progress)
    adversaries = as_adversaries(_chosen(attacks, epsilon, norm, bounds), bounds)
    if diagnose is None:
        diagnose = any(adversary.parts for adversary in adversaries)
    diagnose = _checks.boolean("diagnose", diagnose)
    if diagnose and all(adversary.epsilon is None for adversary in adversaries):
        raise ValueError(
            "diagnose must be False for attacks without a radius, got True: its attacks run in "
            "their ball. Declare the ball of a function by attacks.Custom."
        )
    inputs, labels, width = _examples(x, y, bounds)
    examined = ModelUnderTest(model, inputs[:batch_size])
    _checks.require_classes(labels, examined.classes)
    for adversary in adversaries:
        adversary.require_classes(examined.classes)
    if width not in (None, examined.classes):
        raise ValueError(
            f"y is one-hot of {width} classes, but the model returns {examined.classes} logits per "
            "example."
        )

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(inputs), batch_size):
            yield inputs[start : start + batch_size], labels[start : start + batch_size]

    by_gradient = any(adversary.uses_gradient for adversary in adversaries)
    logits, outputs = examined.examine(batches(), by_gradient)
    clean = np.argmax(logits, axis=1) == labels
    warned = [str(finding) for finding in diagnostics.of_model(outputs)]
    sources, known_sources = _sources(adversaries), []
    for source in sources:
        role = f"source {source.name!r} of a Transfer"
        other = ModelUnderTest(source.model, inputs[:batch_size], role)
        _, of_source = other.examine(batches(), source.by_gradient)
        known_sources.append(f"{digest_of_weights(source.model)} {other.graph}".strip())
        warned += [
            str(finding._replace(text=f"{role}: {finding.text}"))
            for finding in diagnostics.of_model(of_source)
        ]
    for text in warned:
        warnings.warn(text, diagnostics.EvaluationWarning, stacklevel=2)

    found = digests(model, inputs, labels) | {"graph": examined.graph}
    names = _reports.unique(source.name for source in sources)
    found |= {f"source {name}": each for name, each in zip(names, known_sources, strict=True)}
    identity = {
        "attacks": {adversary.name: adversary.identity for adversary in adversaries},
        "seed": seed,
        "batch_size": batch_size,
        "bounds": bounds,
        "versions": _reports.versions(),
        **found,
    }
    state = EvaluationState(state_path, identity, logits if outputs.repeatable else None)
    evaluation = _Evaluation(model, examined, (inputs, labels), clean, batch_size, seed, bounds)
    results = evaluation.run(adversaries, state, progress=progress)
    findings = diagnostics.of_results(clean, adversaries, results)
    findings += diagnostics.of_ensembles(adversaries, results)
    if diagnose:
        findings += evaluation.probe(adversaries, results)
    for finding in findings:
        warnings.warn(str(finding), diagnostics.EvaluationWarning, stacklevel=2)
    return RobustnessReport(
        clean_correct=clean,
        attacks=results,
        model=examined.name,
        seed=seed,
        batch_size=batch_size,
        bounds=bounds,
        warnings=(*warned, *map(str, findings)),
        notes=tuple(diagnostics.remarks(clean, adversaries, results)),
        versions=_reports.versions(),
        seconds=time.perf_counter() - begin,
        digests=found,
    )


def _chosen(
    attacks: Any, epsilon: float | str | None, norm: str | None, bounds: tuple[float, float]
) -> Any:
    """Return the attacks to run: those given, or AutoAttack.

    Raises:
        ValueError: there are neither attacks nor a radius, or both.
    """
    if attacks is None:
        if epsilon is None:
            raise ValueError(
                "epsilon must be given, such as epsilon='8/255': without attacks the model is "
                "evaluated by attacks.AutoAttack, in a ball of that radius."
            )
        return attacks_.AutoAttack(epsilon=epsilon, norm=norm or "linf", bounds=bounds)
    if epsilon is not None or norm is not None:
        given = f"epsilon={epsilon!r}" if epsilon is not None else f"norm={norm!r}"
        raise ValueError(
            f"{given} is for an evaluation without attacks, by attacks.AutoAttack: leave it out, "
            "or leave out attacks, which have a ball of their own."
        )
    return attacks


def _examples(
    x: Any, y: Any, bounds: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Return inputs `(n, ...)`, class indices `(n,)`, and the width of one-hot labels, else None.

    Args:
        x: inputs, or a batched `tf.data.Dataset` of pairs (inputs, labels).
        y: labels: integers `(n,)` or `(n, 1)`, or one-hot `(n, classes)`; None with a dataset.
        bounds: the smallest and the largest value of an input.

    Raises:
        TypeError: inputs are not floats, labels are not integers, or a dataset holds no pairs.
        ValueError: a value or a shape is not as described.
    """
    x, y = inputs_and_labels(x, y)
    inputs = np.asarray(_checks.inputs(x, bounds), np.float32)
    labels, width = _checks.class_indices("y", y)
    if len(labels) != len(inputs):
        raise ValueError(f"x has {len(inputs)} examples, but y has {len(labels)} labels.")
    return inputs, labels, width


def inputs_and_labels(x: Any, y: Any) -> tuple[Any, Any]:
    """Return inputs and labels: those given, or all of a batched `tf.data.Dataset` x of pairs.

    Raises:
        TypeError: the dataset holds no pairs.
        ValueError: `y` is missing, or given with a dataset; or the dataset is infinite or empty.
    """
    if isinstance(x, tf.data.Dataset):
        if y is not None:
            raise ValueError("y must be None when x is a dataset: its labels are in the dataset.")
        return _materialised(x)
    if y is None:
        raise ValueError("y is None: robust accuracy needs labels (only a dataset brings its own).")
    return x, y


def _materialised(dataset: tf.data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    spec = dataset.element_spec
    if not isinstance(spec, tuple) or len(spec) != 2:
        raise TypeError(f"x must be a dataset of pairs (inputs, labels), got elements {spec}.")
    if not isinstance(spec[0], tf.TensorSpec):
        raise TypeError(
            f"x must be a dataset of one tensor of inputs and one of labels, got inputs {spec[0]}: "
            "attacks change a single tensor. Wrap a model of several inputs in a function of one "
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


def _bar(*, shown: bool) -> Progress:
    """Return a bar on stderr, which writes nothing unless that is a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[left]} examples left, {task.fields[accuracy]:.1%} robust so far"),
        TimeRemainingColumn(),
    )
    return Progress(
        *columns,
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
        # The default is 30 s: no time would be shown if a batch takes longer.
        speed_estimate_period=math.inf,
    )


def _sources(adversaries: Sequence[Adversary]) -> list[Source]:
    """Return the sources of all transfer attacks, each model once."""
    found: dict[int, Source] = {}
    for source in filter(None, (adversary.source for adversary in adversaries)):
        known = found.get(id(source.model), source)
        found[id(source.model)] = known._replace(
            by_gradient=known.by_gradient or source.by_gradient
        )
    return list(found.values())


class _Evaluation:
    """The attacks of an evaluation, run batch by batch.

    Args:
        model: as it was given.
        examined: the same model, for logits.
        data: inputs and class indices.
        clean: per example, whether the model is right on it.
        batch_size, seed, bounds: as in `evaluate_robustness`.
    """

    def __init__(
        self,
        model: Any,
        examined: ModelUnderTest,
        data: tuple[np.ndarray, np.ndarray],
        clean: np.ndarray,
        batch_size: int,
        seed: int,
        bounds: tuple[float, float],
    ) -> None:
        self._model = model
        self._replicas = Replicas(model)
        self._examined = examined
        self._inputs, self._labels = data
        self._clean = clean
        self._batch_size = batch_size
        self._seed = seed
        self._bounds = bounds

    def run(
        self, adversaries: Sequence[Adversary], state: EvaluationState, *, progress: bool
    ) -> dict[str, AttackResult]:
        """Return the results of all attacks, by name."""
        with _bar(shown=progress) as bar:
            return {
                adversary.name: self._attack(adversary, state, bar) for adversary in adversaries
            }

    def probe(
        self, adversaries: Sequence[Adversary], results: dict[str, AttackResult]
    ) -> list[diagnostics.Finding]:
        """Return findings from short attacks in other balls and from another network."""
        known = [each for each in adversaries if each.epsilon is not None]
        ball = max(known, key=lambda each: each.uses_gradient, default=None)  # the first of them
        rows = np.flatnonzero(self._clean)
        if ball is None or ball.epsilon is None or not len(rows) or not self._examined.has_gradient:
            return []
        norm, radius = ball.description["norm"], ball.epsilon
        shape = self._inputs.shape[1:]
        probe = probes.Probe(self._examined.call, shape, norm, self._bounds)
        few = rows[: probes.EXAMPLES]
        ladder = probe.ladder(self._inputs[few], self._labels[few], radius)
        found = diagnostics.of_ladder(ladder.by_radius, ladder.by_steps)
        network = probes.plain_network(
            self._inputs, self._labels, self._examined.classes, self._seed
        )
        transfer = probes.Probe(network, shape, norm, self._bounds)
        left = np.logical_and.reduce([self._clean, *(each.correct for each in results.values())])
        fooled = 0
        rows = np.flatnonzero(left)
        for start in range(0, len(rows), self._batch_size):
            chosen = rows[start : start + self._batch_size]
            y = self._labels[chosen]
            candidates = transfer.examples(self._inputs[chosen], y, radius)
            fooled += int(np.sum(np.argmax(self._examined.logits(candidates), axis=1) != y))
        return found + diagnostics.of_transfer(fooled, len(rows), len(left))

    def _attack(self, adversary: Adversary, state: EvaluationState, bar: Progress) -> AttackResult:
        """Run one attack; of an ensemble each part, on the examples still classified correctly."""
        parts = self._parts(adversary)
        start = self._clean if adversary.parts else np.ones_like(self._clean)
        so_far = state.of(adversary.name, start)
        for part in parts[so_far.part :]:
            if so_far.batch == 0:
                so_far.before = so_far.correct.copy()
            rows = np.flatnonzero(so_far.before) if adversary.parts else np.arange(len(start))
            chosen = [rows[i : i + self._batch_size] for i in range(0, len(rows), self._batch_size)]
            todo = list(enumerate(chosen))[so_far.batch :]
            task = bar.add_task(
                part.name, total=len(chosen), completed=so_far.batch, **self._shown(so_far, chosen)
            )
            batches = (
                (self._inputs[each], self._labels[each], (self._seed, index))
                for index, each in todo
            )
            make = functools.partial(part.bind, self._model)
            results = self._replicas.map(make, batches, together=part.is_compiled)
            begin = time.perf_counter()
            for (index, each), result in zip(todo, results, strict=True):
                self._record(part, result, index, each, so_far)
                so_far.batch = index + 1
                now = time.perf_counter()
                so_far.part_seconds, begin = so_far.part_seconds + now - begin, now
                state.save()
                bar.update(task, advance=1, **self._shown(so_far, chosen))
            bar.remove_task(task)
            if adversary.parts:
                fooled = int(np.sum(so_far.before & ~so_far.correct))
                so_far.stages.append(
                    EnsemblePart(part.name, len(rows), fooled, so_far.part_seconds)
                )
            so_far.seconds += so_far.part_seconds
            so_far.part, so_far.batch, so_far.part_seconds = so_far.part + 1, 0, 0.0
            state.save(now=True)
        return AttackResult(
            name=adversary.name,
            description=adversary.description,
            correct=so_far.correct,
            largest_distance=so_far.farthest,
            seconds=so_far.seconds,
            tied=int(np.sum(so_far.tied)),
            stages=tuple(so_far.stages),
        )

    def _shown(self, so_far: AttackProgress, batches: Sequence[np.ndarray]) -> dict[str, Any]:
        """Return the fields of the bar: the number of examples left, and the accuracy so far."""
        return {
            "left": sum(map(len, batches[so_far.batch :])),
            "accuracy": float(np.mean(so_far.correct & self._clean)),
        }

    def _parts(self, adversary: Adversary) -> list[Adversary]:
        """Return the attacks to run: of an ensemble those that the model supports."""
        if not adversary.parts:
            return [adversary]
        can_follow = self._examined.has_gradient
        parts = [part for part in adversary.parts if can_follow or not part.uses_gradient]
        if not parts:
            raise ValueError(
                f"{adversary.name} can't be run: the outputs of the model have no gradient in its "
                "inputs. Use attacks.Square, or attacks.Transfer from a model that has one."
            )
        return parts

    def _record(
        self, part: Adversary, result: Any, index: int, chosen: np.ndarray, so_far: AttackProgress
    ) -> None:
        """Check the result of an attack for a batch, and record it."""
        x, y = self._inputs[chosen], self._labels[chosen]
        found, moved = checked(part, x, result, self._bounds)
        for norm, distance in moved.items():
            so_far.farthest[norm] = max(distance, so_far.farthest.get(norm, 0.0))
        logits = self._examined.logits(found)
        if not np.all(np.isfinite(logits)):
            raise ValueError(
                f"model returns NaN or infinity on what attack {part.name!r} found (batch "
                f"{index}): its logits overflow, so neither gradients nor accuracy are meaningful."
            )
        so_far.tied[chosen] |= are_tied(logits)
        so_far.correct[chosen] = np.argmax(logits, axis=1) == y
