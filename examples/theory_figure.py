"""A figure and a table of the measurements of examples/theory.py, from the file that it writes.

python examples/theory_figure.py                           # of docs/theory.json
python examples/theory_figure.py outputs/theory/theory.json --output DIR
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import sys
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

MEASURED = pathlib.Path(__file__).parent.parent / "docs" / "theory.json"
COLOURS = ("#c0392b", "#1f77b4")
LINES = ("-", "--")
LEAST = 1e-3  # smaller values are drawn here, as a logarithmic axis has no zero
TABLED = (0.0, 0.9, 0.95, 0.99, 0.999)
COLUMNS = {
    "Lipschitz": "lipschitz",
    "its bound": "bound",
    "Π σ max": "product",
    "worst κ": "condition_number",
    "effective": "effective",
    "dead": "dead_filters",
}
# Panels of a network: title, scale, key of the line, key of the dotted line.
WHOLE = (
    ("accuracy under attack (dotted: without)", "linear", "robust", "clean"),
    ("local Lipschitz constant (dotted: its bound)", "log", "lipschitz", "bound"),
    ("worst κ (dots: ∞; dotted: effective κ)", "log", "condition_number", "effective"),
    ("dead filters", "linear", "dead_filters", None),
)
# Panels of a kernel: key, title, scale.
KERNEL = {
    "sigma_max": ("σ max", "linear"),
    "condition_number": ("κ (dots: ∞)", "log"),
    "stable_rank": ("stable rank", "linear"),
    "dead_filters": ("dead filters", "linear"),
}


class Runs:
    """Measurements by network and way of pruning.

    Args:
        record: the content of `theory.json`.
    """

    def __init__(self, record: dict) -> None:
        self.levels = np.asarray(record["levels"])
        self.layers = record["layers"]
        self.names = list(dict.fromkeys(run["network"] for run in record["runs"]))
        self.ways = list(dict.fromkeys(run["way"] for run in record["runs"]))
        self._runs = record["runs"]

    def figures(self, name: str, way: str, key: str, layer: str | None = None) -> np.ndarray:
        """Return a measurement of the network or of one kernel, of shape (seeds, levels, ...)."""
        runs = [run["steps"] for run in self._runs if (run["network"], run["way"]) == (name, way)]
        if layer is not None:
            runs = [[step["kernels"][layer] for step in steps] for steps in runs]
        return np.asarray([[step[key] for step in steps] for steps in runs], float)

    def range(self, name: str, way: str, key: str, layer: str | None) -> tuple[np.ndarray, ...]:
        """Return minimum and maximum over the seeds; of robust accuracy, of the 95 % intervals."""
        if key == "robust":
            ends = self.figures(name, way, "interval")
            return np.min(ends[..., 0], axis=0), np.max(ends[..., 1], axis=0)
        every = self.figures(name, way, key, layer)
        return np.min(every, axis=0), np.max(every, axis=0)


def table(runs: Runs) -> Table:
    """Return medians over the seeds; for robust accuracy the union of the 95 % intervals, too."""
    result = Table(
        title="Pruned by magnitude", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    result.add_column("network", no_wrap=True)
    for heading in ("zeros", "clean", "robust", *COLUMNS):
        result.add_column(heading, justify="right", no_wrap=True)
    for name, way in itertools.product(runs.names, runs.ways):
        keys = ("clean", "robust", *COLUMNS.values())
        median = {key: np.median(runs.figures(name, way, key), axis=0) for key in keys}
        ends = 100 * np.stack(runs.range(name, way, "robust", None))
        for index in np.flatnonzero(np.isin(runs.levels, TABLED)):
            result.add_row(
                f"{name}, {way}",
                f"{runs.levels[index]:.1%}",
                f"{median['clean'][index]:.1%}",
                f"{median['robust'][index]:.1%} ({ends[0, index]:.0f} to {ends[1, index]:.0f})",
                *(f"{median[key][index]:.3g}".replace("inf", "∞") for key in COLUMNS.values()),
            )
        result.add_section()
    return result


def draw(runs: Runs, path: pathlib.Path) -> None:
    """Draw a row of panels for each way of pruning, of whole networks, and one for each kernel."""
    count = len(runs.ways) + len(runs.layers) + 1
    figure, axes = plt.subplots(count, 4, figsize=(13, 2.6 * count))
    for row, way in zip(axes, runs.ways, strict=False):
        row[0].set_ylabel(f"the network, {way}")
        for axis, (title, scale, first, second) in zip(row, WHOLE, strict=True):
            keys = [(first, "-")] if second is None else [(first, "-"), (second, ":")]
            panel(axis, runs, title, scale, [(way, key, line) for key, line in keys])
    ways = list(zip(runs.ways, LINES, strict=False))
    for row, layer in zip(axes[len(runs.ways) :], runs.layers, strict=False):
        for axis, (key, (title, scale)) in zip(row, KERNEL.items(), strict=True):
            shown = [(way, key, line) for way, line in ways]
            panel(axis, runs, f"{layer}: {title}", scale, shown, layer)
    shown = [(way, "product", line) for way, line in ways]
    panel(axes[-1, 0], runs, "product of all kernels' σ max", "log", shown)
    for axis in axes[-1, 1:]:
        axis.set_visible(False)
    legend(figure, runs, 0.5 / count)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(96).save(path, optimize=True)  # a third of the size


def panel(
    axis,
    runs: Runs,
    title: str,
    scale: str,
    shown: list[tuple[str, str, str]],
    layer: str | None = None,
) -> None:
    """Draw measurements of each network, (way, key, line): median and range over the seeds.

    The sparsity increases to the right, on a logarithmic axis of the density. A dot above the panel
    marks an infinite value; its opacity is the fraction of the seeds that have one.
    """
    axis.set(xscale="log", yscale=scale, xlim=(1.15, 8e-4))
    axis.set_xticks([1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001])
    axis.set_xticklabels(["0", "50", "80", "90", "95", "98", "99", "99.9"], fontsize=7)
    rows = 0
    for name, colour in zip(runs.names, COLOURS, strict=False):
        for way, key, line in shown:
            every = runs.figures(name, way, key, layer)
            if np.any(np.isinf(every)):
                shares = np.mean(np.isinf(every), axis=0)
                dots(axis, runs, shares, 1.04 + 0.045 * rows, line, colour)
                rows += 1
            middle, *edges = (
                np.maximum(np.where(np.isfinite(values), values, np.nan), LEAST)
                for values in (np.median(every, axis=0), *runs.range(name, way, key, layer))
            )
            axis.plot(1 - runs.levels, middle, line, color=colour, linewidth=1.4)
            axis.fill_between(1 - runs.levels, *edges, color=colour, alpha=0.13, linewidth=0)
    axis.set_title(title, fontsize=9, pad=6 + 7 * rows)
    axis.minorticks_off()
    if "κ" in title:
        axis.set_ylim(1)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    elif scale == "linear":
        axis.set_ylim(0)
    axis.grid(alpha=0.25)
    axis.tick_params(axis="y", labelsize=7)


def dots(axis, runs: Runs, shares: np.ndarray, height: float, line: str, colour: str) -> None:
    """Mark above a panel the levels with infinite values, by the fraction of such seeds."""
    for level, share in zip(runs.levels, shares, strict=True):
        axis.plot(
            1 - level,
            height,
            marker="o",
            markersize=3.5,
            color=colour,
            markerfacecolor="none" if line == "--" else colour,
            alpha=share,
            transform=axis.get_xaxis_transform(),
            clip_on=False,
        )


def legend(figure, runs: Runs, height: float) -> None:
    """Draw the legend of colours and lines in the free corner."""
    colours = zip(runs.names, COLOURS, strict=False)
    handles = [Line2D([], [], color=colour, linewidth=3, label=name) for name, colour in colours]
    ways = zip(runs.ways, LINES, strict=False)
    handles += [Line2D([], [], color="k", linestyle=line, label=way) for way, line in ways]
    seeds = len(runs.figures(runs.names[0], runs.ways[0], "robust"))
    words = (
        "Across: zeros in %.",
        f"Lines: the median of {seeds} seed(s);",
        "shaded: their range, and under",
        "attack that of their 95 % intervals.",
        "Dots, hollow if retrained: κ = ∞,",
        "pale if not for all seeds.\n",
    )
    figure.legend(
        handles=handles,
        title="\n".join(words),
        loc="center",
        bbox_to_anchor=(0.4, height),
        frameon=False,
        alignment="left",
    )


def wide_console() -> Console:
    """Return a console that is wide enough for the table, also without a terminal."""
    return Console(width=None if sys.stdout.isatty() else 120)


def save(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Write a file by `write(draft)`, and rename the draft when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_stem(f".{path.stem}")
    write(draft)
    draft.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("measured", type=pathlib.Path, nargs="?", default=MEASURED)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("outputs/theory"))
    parser.add_argument("--smoke", action="store_true", help="no effect; all examples take it")
    args = parser.parse_args()
    runs = Runs(json.loads(args.measured.read_text()))
    console = wide_console()
    console.print(table(runs))
    save(args.output / "theory.png", lambda path: draw(runs, path))
    console.print(f"theory.png is in {args.output}")


if __name__ == "__main__":
    main()
