"""The report of an evaluation: its results, and the settings and versions to repeat it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tscnc_tf import _checks, _files, _plots, _reports
from tscnc_tf._reports import Z95, jsonable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NOT_DECLARED = "not declared"


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    r"""Return Wilson's 95 % score interval of a proportion.

    .. math:: \frac{1}{1 + z^2/n} \left(\hat p + \frac{z^2}{2n} \pm
        z \sqrt{\frac{\hat p (1 - \hat p)}{n} + \frac{z^2}{4 n^2}}\right)

    Unlike the textbook interval it stays inside [0, 1] and is not empty at 0 and at 100 %.

    Args:
        successes: the number of successful trials, >= 0.
        trials: the number n of trials, >= 1.

    Returns:
        The lower and the upper end, fractions.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> low, high = wilson_interval(9, 10)
        >>> round(low, 3), round(high, 3)
        (0.596, 0.982)

    Reference:
        Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    trials = _checks.integer("trials", trials, minimum=1)
    successes = _checks.integer("successes", successes, minimum=0, maximum=trials)
    share, spread = successes / trials, Z95**2 / trials
    half = Z95 * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    low, high = ((share + spread / 2 + sign * half) / (1 + spread) for sign in (-1, 1))
    # At the ends the exact value is 0 or 1; rounding must not miss that.
    return (0.0 if successes == 0 else low), (1.0 if successes == trials else high)


@dataclasses.dataclass(frozen=True)
class EnsemblePart(_reports.Record):
    """The result of one attack of an ensemble.

    Attributes:
        name: of the attack.
        examples: the number of examples that it was run on: those still classified correctly.
        fooled: on how many of them it fooled the model.
        seconds: how long that took.
    """

    name: str
    examples: int
    fooled: int
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class AttackResult:
    """The result of one attack of an evaluation.

    Attributes:
        name: of the attack, unique within the report.
        description: the result of `describe()`: epsilon as written, norm, steps, and so on; empty
            for a plain callable.
        correct: per example, whether the model is right under this attack; for an ensemble, also on
            the clean input, as wrong examples are not attacked.
        largest_distance: the size of the largest perturbation, by norm.
        seconds: how long the attack and its checks took.
        tied: for how many examples the largest logit occurred twice under the attack.
        stages: of an ensemble, the results of its attacks, in order.
    """

    name: str
    description: Mapping[str, Any]
    correct: np.ndarray
    largest_distance: Mapping[str, float]
    seconds: float
    tied: int = 0
    stages: tuple[EnsemblePart, ...] = ()

    @property
    def declared(self) -> bool:
        """Whether the attack declares a ball, so that its perturbations could be checked."""
        return self.description.get("epsilon") is not None

    @property
    def accuracy(self) -> float:
        """The accuracy on the attack's outputs."""
        return float(np.mean(self.correct))

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy."""
        return interval(self.correct)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures and the attack's description as JSON values."""
        ball = {} if self.declared else {"epsilon": _NOT_DECLARED, "norm": _NOT_DECLARED}
        return jsonable(
            {
                "name": self.name,
                **{key: value for key, value in self.description.items() if key != "name"},
                **ball,
                **_figures(self.correct),
                "largest_distance": self.largest_distance,
                **({"attacks": self.stages} if self.stages else {}),
                "seconds": self.seconds,
            }
        )


@dataclasses.dataclass(frozen=True, eq=False)
class RobustnessReport(_reports.Report):
    """Accuracy of a model, clean and under attack; `print` it for a table.

    Attributes:
        clean_correct: per example, whether the model is right on the input itself.
        attacks: the result of each attack, by its name.
        model: the model's name.
        seed: batch i of each attack used the seed (seed, i).
        batch_size: examples per batch.
        bounds: the smallest and the largest value of an input.
        warnings: signs that the robust accuracy is too high, each a text that begins with the name
            of a diagnostic.
        notes: notes on the results.
        versions: of the libraries.
        seconds: how long the evaluation took.
        digests: SHA-256 of the data, and of the model's weights if they can be read.
    """

    clean_correct: np.ndarray
    attacks: Mapping[str, AttackResult]
    model: str
    seed: int
    batch_size: int
    bounds: tuple[float, float]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    versions: Mapping[str, str]
    seconds: float
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def flags(self) -> tuple[str, ...]:
        """The names of the diagnostics that raised a warning."""
        return tuple(text.partition(": ")[0] for text in self.warnings)

    @property
    def examples(self) -> int:
        """The number of examples."""
        return len(self.clean_correct)

    @property
    def clean_accuracy(self) -> float:
        """The accuracy on the inputs themselves."""
        return float(np.mean(self.clean_correct))

    @property
    def clean_interval(self) -> tuple[float, float]:
        """The 95 % interval of the clean accuracy."""
        return interval(self.clean_correct)

    @property
    def robust_correct(self) -> np.ndarray:
        """Per example, whether the model is right on the input and under every attack."""
        return np.logical_and.reduce(
            [self.clean_correct, *(result.correct for result in self.attacks.values())]
        )

    @property
    def robust_accuracy(self) -> float:
        """The accuracy in the worst case over all attacks, per example."""
        return float(np.mean(self.robust_correct))

    @property
    def robust_interval(self) -> tuple[float, float]:
        """The 95 % interval of the robust accuracy."""
        return interval(self.robust_correct)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values, without the single examples."""
        return jsonable(
            {
                "model": self.model,
                "examples": self.examples,
                "seed": self.seed,
                "batch_size": self.batch_size,
                "bounds": self.bounds,
                "clean": _figures(self.clean_correct),
                "attacks": [result.to_dict() for result in self.attacks.values()],
                "robust": _figures(self.robust_correct),
                "warnings": self.warnings,
                "notes": self.notes,
                "versions": dict(self.versions),
                "digests": dict(self.digests),
                "seconds": self.seconds,
            }
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict()` to a JSON file, replacing what was there."""
        _files.write_text(path, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")

    def _table(self) -> _reports.Table:
        columns = ["attack", "accuracy", "95 % interval", "ε", "norm", "steps", "restarts"]
        columns += ["examples", "seed"]
        always = [f"{self.examples}", f"{self.seed}"]
        rows = [["none", *accuracy_cells(self.clean_correct), "–", "–", "–", "–", *always]]
        for result in self.attacks.values():
            known = result.description
            epsilon = known["epsilon"] if result.declared else _NOT_DECLARED
            others = [known.get(key) for key in ("norm", "steps", "restarts")]
            cells = [str(epsilon), *("–" if value is None else str(value) for value in others)]
            rows.append([result.name, *accuracy_cells(result.correct), *cells, *always])
            rows += [_part_cells(part, len(columns)) for part in result.stages]
        return _reports.Table(
            f"Robustness of {self.model}",
            columns,
            rows,
            ["worst case", *accuracy_cells(self.robust_correct), "", "", "", "", *always],
            [*(f"Warning: {text}" for text in self.warnings), *self.notes],
        )


def interval(correct: np.ndarray) -> tuple[float, float]:
    """Return Wilson's 95 % interval of the share of examples that are right."""
    return wilson_interval(int(np.sum(correct)), len(correct))


def plot_robustness(
    evaluations: Mapping[str, Mapping[float, RobustnessReport | Mapping[str, Any]]],
) -> Figure:
    """Return a figure of accuracy, robust and clean, against sparsity.

    Robust accuracy is a line with its 95 % interval, clean accuracy a dashed one.

    Args:
        evaluations: by a name for the legend, and by sparsity, reports of `evaluate_robustness` or
            what their `to_dict()` returned, read from JSON for example.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> import tscnc_tf as tscnc
        >>> reports = {0.9: first, 0.99: second}  # doctest: +SKIP
        >>> figure = tscnc.evaluation.plot_robustness({"TSCNC": reports})  # doctest: +SKIP
        >>> figure.savefig("robustness.png")  # doctest: +SKIP
    """

    def point(sparsity: float, report: RobustnessReport | Mapping[str, Any]) -> _plots.Point:
        found = report.to_dict() if isinstance(report, RobustnessReport) else report
        low, high = found["robust"]["interval"]
        clean, robust = found["clean"]["accuracy"], found["robust"]["accuracy"]
        return _plots.Point(sparsity, clean, robust, low, high)

    if not isinstance(evaluations, Mapping) or not all(
        isinstance(by_sparsity, Mapping) for by_sparsity in evaluations.values()
    ):
        raise TypeError(
            f"evaluations must be a dict of names with dicts of sparsities, got {evaluations!r}."
        )
    return _plots.robustness(
        {
            name: [point(sparsity, report) for sparsity, report in by_sparsity.items()]
            for name, by_sparsity in evaluations.items()
        }
    )


def _figures(correct: np.ndarray) -> dict[str, Any]:
    count = int(np.sum(correct))
    return {"accuracy": count / len(correct), "correct": count, "interval": interval(correct)}


def _part_cells(part: EnsemblePart, columns: int) -> list[str]:
    text = f"fooled {part.fooled} of {part.examples}"
    return [f"· {part.name}", "", text, *[""] * (columns - 3)]


def accuracy_cells(correct: np.ndarray) -> list[str]:
    """Return an accuracy and its 95 % interval as the cells of a table."""
    low, high = interval(correct)
    return [_reports.percent(float(np.mean(correct))), f"{100 * low:.1f} to {100 * high:.1f} %"]
