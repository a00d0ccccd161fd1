"""Statistics of a study: means with intervals, paired differences, correlations."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats


class Estimate(NamedTuple):
    """A mean and the half width of its interval; infinite with fewer than three values."""

    mean: float
    half: float
    count: int


class Cell(NamedTuple):
    """A setting and sparsity, within which arms are compared."""

    setting: str
    sparsity: float


@dataclasses.dataclass(frozen=True)
class Result:
    """The figures of one run.

    Attributes:
        cell, arm, seed: its place in the study.
        clean, robust: accuracies on the test set.
        pgd: accuracy under PGD; NaN if `robust` is that.
        zeros: the effective sparsity: zeros, and weights on no path, among all kernels.
        lipschitz: the empirical local Lipschitz constant.
        condition: the worst condition number of the pruned kernels; inf if one is rank-deficient.
        effective: the worst effective condition number of the pruned kernels.
        dead: the number of dead filters in the pruned kernels.
        versions: the versions of libraries, such as "numpy 2.4.6".
    """

    cell: Cell
    arm: str
    seed: int
    clean: float
    robust: float
    pgd: float
    zeros: float
    lipschitz: float
    condition: float
    effective: float
    dead: float
    versions: tuple[str, ...] = ()

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Result:
        """Return the figures of the content that a run has written."""
        kernels = content["kernels"].values()
        kernels = [row for row in kernels if row["pruned"]] or list(kernels)
        return cls(
            Cell(content["setting"], content["sparsity"]),
            content["arm"],
            content["seed"],
            content["clean"],
            content["robust"],
            content.get("pgd", {}).get("worst", math.nan),
            content["effective_zeros"],
            float(content["lipschitz"]),
            max(float(row["condition_number"]) for row in kernels),
            max(float(row["effective_condition_number"]) for row in kernels),
            sum(row["dead_filters"] for row in kernels),
            tuple(f"{name} {version}" for name, version in content["versions"].items()),
        )


def by_cell(results: Iterable[Result]) -> dict[Cell, dict[str, dict[int, Result]]]:
    """Return results by cell, arm and seed."""
    found: dict[Cell, dict[str, dict[int, Result]]] = {}
    for result in results:
        found.setdefault(result.cell, {}).setdefault(result.arm, {})[result.seed] = result
    return dict(sorted(found.items()))


def estimate(values: Sequence[float], intervals: int = 1) -> Estimate:
    """Return the mean and Student's interval.

    Args:
        values: independent values.
        intervals: the number of simultaneous intervals. All of them hold with a probability of at
            least 95 % (Bonferroni).

    Returns:
        The estimate; with fewer than three values its interval is infinite, as that of two values
            would be misleading.
    """
    count = len(values)
    if count < 3:
        return Estimate(float(np.mean(values)) if count else math.nan, math.inf, count)
    quantile = stats.t.ppf(1 - 0.025 / intervals, count - 1)
    half = quantile * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Estimate(float(np.mean(values)), float(half), count)


def paired(
    arm: Mapping[int, Result],
    base: Mapping[int, Result],
    figure: str = "robust",
    intervals: int = 1,
) -> Estimate:
    """Return the mean difference between two arms over the seeds that both have."""
    seeds = sorted(set(arm) & set(base))
    differences = [getattr(arm[s], figure) - getattr(base[s], figure) for s in seeds]
    return estimate(differences, intervals)


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Spearman's rank correlation; infinity is the largest value.

    NaN if all values of `x`, or of `y`, are equal.
    """
    ranks = [stats.rankdata(values) for values in (x, y)]
    if any(np.ptp(each) == 0 for each in ranks):
        return math.nan
    return float(np.corrcoef(*ranks)[0, 1])


def within_cells(results: Iterable[Result], figure: str) -> dict[Cell, Estimate]:
    """Return the rank correlation of a figure of the kernels with robust accuracy, by cell.

    It is the mean over seeds, with its interval, of the correlation over the arms of a seed. Seeds
    are independent; runs of one seed are not, as they share data and partly networks. Seeds with
    fewer than five arms, or with equal values in all arms, are left out.
    """
    groups: dict[Cell, dict[int, list[Result]]] = collections.defaultdict(
        lambda: collections.defaultdict(list)
    )
    for result in results:
        groups[result.cell][result.seed].append(result)
    found = {}
    for cell, by_seed in sorted(groups.items()):
        of_seeds = [
            correlation([getattr(r, figure) for r in group], [r.robust for r in group])
            for group in by_seed.values()
            if len(group) >= 5
        ]
        found[cell] = estimate([rho for rho in of_seeds if not math.isnan(rho)])
    return found
