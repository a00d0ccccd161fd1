"""Robust accuracy against the radius of the ball."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tscnc_tf import _checks, _files, _plots, _reports, attacks
from tscnc_tf.evaluation import diagnostics
from tscnc_tf.evaluation.report import RobustnessReport, accuracy_cells, interval
from tscnc_tf.evaluation.run import evaluate_robustness, inputs_and_labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, eq=False)
class RobustnessCurve(_reports.Report):
    """Robust accuracy by the radius of the ball; `print` it for a table, `plot()` it.

    Attributes:
        epsilons: the radii as they were written, from the smallest to the largest.
        clean_correct: per example, whether the model is right on the input itself.
        correct: `(radii, examples)`, whether the model is right on the input and under attack. An
            example that is wrong at a radius is wrong at all larger ones.
        norm: of the balls.
        reports: the evaluation at each radius, of the examples that are robust at all smaller ones.
            There are fewer reports than radii if no robust examples remain.
    """

    _omitted = ("clean_correct", "correct")
    _derived = ("clean_accuracy", "accuracies", "intervals")

    epsilons: tuple[float | str, ...]
    clean_correct: np.ndarray
    correct: np.ndarray
    norm: str
    reports: tuple[RobustnessReport, ...]

    @property
    def clean_accuracy(self) -> float:
        """The accuracy on the inputs themselves."""
        return float(np.mean(self.clean_correct))

    @property
    def accuracies(self) -> tuple[float, ...]:
        """The robust accuracy at each radius."""
        return tuple(float(np.mean(row)) for row in self.correct)

    @property
    def intervals(self) -> tuple[tuple[float, float], ...]:
        """The 95 % interval of each robust accuracy."""
        return tuple(interval(row) for row in self.correct)

    def plot(self) -> Figure:
        """Return a figure of robust accuracy against the radius, with 95 % intervals.

        Raises:
            ImportError: matplotlib is not installed.
        """
        rows = zip(self.epsilons, self.accuracies, self.intervals, strict=True)
        points = [
            _plots.Point(_checks.distance("epsilon", radius), self.clean_accuracy, robust, *ends)
            for radius, robust, ends in rows
        ]
        clean = self.clean_accuracy
        start = _plots.Point(0.0, clean, clean, *interval(self.clean_correct))
        return _plots.robustness({"model": [start, *points]}, axis=f"ε ({self.norm})")

    def _table(self) -> _reports.Table:
        rows = [["0", *accuracy_cells(self.clean_correct)]]
        rows += [
            [_checks.as_written(radius), *accuracy_cells(row)]
            for radius, row in zip(self.epsilons, self.correct, strict=True)
        ]
        found = dict.fromkeys(itertools.chain.from_iterable(r.warnings for r in self.reports))
        return _reports.Table(
            f"Robust accuracy by ε ({self.norm}), {len(self.clean_correct)} examples",
            ["ε", "accuracy", "95 % interval"],
            rows,
            notes=[f"Warning: {text}" for text in found],
        )


def robustness_curve(
    model: Any,
    x: Any,
    y: Any,
    epsilons: Sequence[float | str],
    *,
    attack: Callable[[float | str], Any] | None = None,
    norm: str = "linf",
    batch_size: int = 128,
    seed: int = 0,
    bounds: tuple[float, float] = (0.0, 1.0),
    diagnose: bool | None = None,
    state_path: Any = None,
    progress: bool = True,
) -> RobustnessCurve:
    """Return robust accuracy at several radii.

    At each radius only the examples that are robust at all smaller ones are attacked: an
    adversarial example in a ball lies in every larger one. So the curve never rises. Compare models
    by whole curves, since their order may change with the radius.

    Args:
        model: as in `evaluate_robustness`.
        x: as in `evaluate_robustness`.
        y: as in `evaluate_robustness`.
        epsilons: the radii, numbers or fractions such as "8/255".
        attack: returns the attack, or a list of attacks, for a radius; None for
            `attacks.AutoAttack`.
        norm: "linf", "l2" or "l1"; it must be the norm of `attack`.
        batch_size: examples per batch.
        seed: as in `evaluate_robustness`.
        bounds: the smallest and the largest value of an input.
        diagnose: as in `evaluate_robustness`, at the smallest radius.
        state_path: a folder with the progress at each radius, `0.json` for the smallest; each file
            is as in `evaluate_robustness`. If it exists, the curve continues from it.
        progress: whether to show a bar on stderr while it runs, if that is a terminal.

    Raises:
        TypeError: `attack` is no function.
        NotADirectoryError: there is a file at `state_path`.
        ValueError: there are no radii, two of them are equal, or an attack has another norm or
            radius; and what `evaluate_robustness` raises.

    Warns:
        EvaluationWarning: as `evaluate_robustness`, at each radius; and "ladder", if examples are
            robust in a ball that holds all inputs within the bounds.

    Example:
        >>> import numpy as np, tensorflow as tf
        >>> from tscnc_tf.attacks import FGSM
        >>> def model(x):
        ...     return tf.concat([x - 0.5, 0.5 - x], axis=1)
        >>> x, y = np.array([[0.9], [0.6], [0.2], [0.35]]), np.array([0, 0, 1, 1])
        >>> curve = robustness_curve(
        ...     model, x, y, [0.05, 0.2, 0.35], attack=lambda e: FGSM(epsilon=e), progress=False
        ... )
        >>> curve.accuracies
        (1.0, 0.5, 0.25)
    """
    _checks.one_of("norm", norm, attacks.APGD.norms)
    if not isinstance(epsilons, Iterable):
        raise TypeError(f"epsilons must be a list of radii, got {epsilons!r}.")
    radii = list(epsilons)
    values = [_checks.distance("epsilons", radius) for radius in radii]
    if not radii or len(set(values)) < len(values):
        raise ValueError(f"epsilons must be one or more radii, all different, got {epsilons!r}.")
    radii = [radii[index] for index in np.argsort(values)]

    def default(radius: float | str) -> attacks.Attack:
        return attacks.AutoAttack(epsilon=radius, norm=norm, bounds=bounds)

    if attack is not None and (isinstance(attack, attacks.Attack) or not callable(attack)):
        raise TypeError(
            "attack must be a function that returns the attack for a radius, such as lambda "
            f"epsilon: attacks.APGD(epsilon=epsilon), got {attack!r}."
        )
    folder = None if state_path is None else _files.absolute("state_path", state_path)
    if folder is not None and folder.is_file():
        raise NotADirectoryError(
            f"state_path must be a folder, with a file for each radius, but {str(folder)!r} is a "
            "file: choose another path."
        )
    made = [(attack or default)(radius) for radius in radii]
    for radius, each in zip(radii, made, strict=True):
        _require_ball(each, radius, norm)
    inputs, labels = map(np.asarray, inputs_and_labels(x, y))
    rows = np.arange(len(inputs))
    correct = np.zeros((len(radii), len(inputs)), dtype=bool)
    clean = np.zeros(len(inputs), dtype=bool)
    reports: list[RobustnessReport] = []
    for index, opponent in enumerate(made):
        report = evaluate_robustness(
            model,
            inputs[rows],
            labels[rows],
            opponent,
            batch_size=batch_size,
            seed=seed,
            bounds=bounds,
            diagnose=diagnose if index == 0 else False,
            state_path=None if folder is None else folder / f"{index}.json",
            progress=progress,
        )
        if index == 0:
            clean = report.clean_correct
        reports.append(report)
        rows = rows[report.robust_correct]
        correct[index, rows] = True
        if not len(rows):
            break
    width = {"linf": 1.0, "l2": inputs[0].size ** 0.5, "l1": inputs[0].size}[norm]
    findings = diagnostics.of_curve(
        {radius: float(np.mean(row)) for radius, row in zip(sorted(values), correct, strict=True)},
        width * (bounds[1] - bounds[0]),
    )
    for text in map(str, findings):
        warnings.warn(text, diagnostics.EvaluationWarning, stacklevel=2)
        reports[-1] = dataclasses.replace(reports[-1], warnings=(*reports[-1].warnings, text))
    return RobustnessCurve(tuple(radii), clean, correct, norm, tuple(reports))


def _require_ball(made: Any, radius: float | str, norm: str) -> None:
    """Raise a ValueError unless all attacks of `made` have the radius and the norm."""
    several = made.values() if isinstance(made, Mapping) else made
    for each in several if isinstance(several, Iterable) else [made]:
        if not isinstance(each, attacks.Attack):
            continue
        if each.norm != norm:
            raise ValueError(
                f"attack returned an attack of norm {each.norm!r} for a curve of norm={norm!r}: "
                "pass the norm of the attack."
            )
        if not math.isclose(each.epsilon_value, _checks.distance("epsilons", radius)):
            raise ValueError(
                f"attack returned an attack of epsilon={each.epsilon!r} for the radius {radius!r}: "
                "it must use its argument, as lambda epsilon: attacks.APGD(epsilon=epsilon) does."
            )
