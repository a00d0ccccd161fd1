"""Figures of reports, by matplotlib's object-oriented interface.

Each function returns a `matplotlib.figure.Figure`; `figure.savefig("name.png")` writes it. Nothing
is shown, or registered with `pyplot`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tscnc_tf._extras import require_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 4  # panels side by side
SMALLEST = 1e-6  # smaller singular values are drawn here, as the axis is logarithmic


class Point(NamedTuple):
    """The accuracies of one evaluation; the interval is that of the robust accuracy.

    Attributes:
        at: the position on the horizontal axis, such as a sparsity or a radius.
        clean, robust: the accuracies, in [0, 1].
        low, high: the ends of the interval.
    """

    at: float
    clean: float
    robust: float
    low: float
    high: float


def spectra(results: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Draw the singular values of kernels in descending order, a panel per kernel.

    Args:
        results: by label, the singular values by kernel, `(n,)` or `(groups, n)`; the values of
            all groups are sorted into one line. Results need not have all kernels.
    """
    names = list(dict.fromkeys(name for kernels in results.values() for name in kernels))
    figure, panels = _panels(names, sharey=True)
    for name, axes in zip(names, panels, strict=True):
        for colour, (label, kernels) in enumerate(results.items()):
            if name in kernels:
                values = np.maximum(np.sort(np.ravel(kernels[name]))[::-1], SMALLEST)
                index = np.arange(1, values.size + 1)
                axes.plot(index, values, f"C{colour}", marker=".", markersize=3, label=label)
        axes.set(xlabel="index", yscale="log")
        axes.locator_params(axis="x", integer=True)
    panels[0].set_ylabel(f"singular value (at least {SMALLEST:g})")
    if len(results) > 1:
        _legend(figure, results)
    return figure


def zeros(fractions: Mapping[str, float], whole: float) -> Figure:
    """Draw the fraction of zeros of each weight as a bar, and that of the pruned ones as a line.

    Args:
        fractions: by the name of the weight; the first is drawn at the top.
        whole: the fraction of zeros among the weights that are pruned together.
    """
    figure = _figure(6.0, 1.2 + 0.25 * len(fractions))
    axes = figure.subplots()
    axes.barh(range(len(fractions)), list(fractions.values()))
    axes.set_yticks(range(len(fractions)), list(fractions))
    axes.invert_yaxis()
    axes.axvline(whole, color="black", linestyle=":", label=f"together {whole:.2%}")
    axes.set(xlabel="sparsity (fraction of zeros)", xlim=(0, 1))
    axes.legend(fontsize="small")
    return figure


def curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the metrics of training against the epoch: losses, accuracies, and each other metric.

    Args:
        rows: the metrics of each epoch, by name, "epoch" among them. Infinity and NaN leave gaps.
    """
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        if name != "epoch":
            group = next((kind for kind in ("loss", "accuracy") if kind in name), name)
            groups.setdefault(group, []).append(name)
    figure, panels = _panels([group.replace("_", " ") for group in groups])
    epochs = [row["epoch"] for row in rows]
    for members, axes in zip(groups.values(), panels, strict=True):
        for name in members:
            values = np.array([float(row.get(name, math.nan)) for row in rows])
            values[~np.isfinite(values)] = math.nan
            axes.plot(epochs, values, marker=".", label=name.replace("_", " "))
        if len(members) > 1:
            axes.legend(fontsize="small")
        axes.set(xlabel="epoch")
        axes.locator_params(axis="x", integer=True)
        if members == ["condition_number"]:
            axes.set(yscale="log")
    return figure


def robustness(
    results: Mapping[str, Iterable[Point]], axis: str = "sparsity (fraction of zeros)"
) -> Figure:
    """Draw robust accuracy with its interval, and clean accuracy (dashed), against a quantity.

    Args:
        results: the evaluations of each method, by its label.
        axis: the label of the horizontal axis.
    """
    figure = _figure(6.0, 4.0)
    axes = figure.subplots()
    for label, points in results.items():
        at, clean, robust, low, high = np.array(sorted(points)).T
        (line,) = axes.plot(at, robust, marker="o", label=f"{label}, robust")
        axes.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.plot(at, clean, "--", color=line.get_color(), label=f"{label}, clean")
    axes.set(xlabel=axis, ylabel="accuracy", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _panels(titles: Sequence[str], sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure with one panel per title, up to `COLUMNS` in a row."""
    columns = min(COLUMNS, len(titles))
    lines = -(-len(titles) // columns)
    figure = _figure(3.2 * columns, 2.8 * lines)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=sharey).ravel()
    for title, axes in zip(titles, grid, strict=False):
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    for unused in grid[len(titles) :]:
        unused.remove()
    return figure, list(grid[: len(titles)])


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches."""
    figures = require_extra("matplotlib.figure", "plots")
    return figures.Figure(figsize=(width, height), layout="constrained")


def _legend(figure: Figure, labels: Iterable[str]) -> None:
    """Put a legend of the colours above the panels."""
    lines = require_extra("matplotlib.lines", "plots")
    handles = [lines.Line2D([], [], color=f"C{i}", label=label) for i, label in enumerate(labels)]
    figure.legend(handles=handles, loc="outside upper right", ncols=4, fontsize="small")
