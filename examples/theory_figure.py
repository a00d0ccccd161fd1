"""The figure and the table of what examples/theory.py has measured, from the file that it wrote.

python examples/theory_figure.py                           # of docs/theory.json
python examples/theory_figure.py outputs/theory/theory.json --output DIR
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

MEASURED = pathlib.Path(__file__).parent.parent / "docs" / "theory.json"
COLOURS = ("#c0392b", "#1f77b4")
LINES = ("-", "--")
FLOOR = 1e-3  # where zero is drawn on a logarithmic axis
TABLED = (0.0, 0.9, 0.95, 0.99, 0.999)
COLUMNS = {
    "Lipschitz": "lipschitz",
    "its bound": "bound",
    "Π σ max": "product",
    "worst κ": "condition_number",
    "effective": "effective",
    "dead": "dead_filters",
}
# Panels of a network: title, scale, the figure of the line, that of the dotted one.
WHOLE = (
    ("accuracy under attack (dotted: without)", "linear", "robust", "clean"),
    ("local Lipschitz constant (dotted: its bound)", "log", "lipschitz", "bound"),
    ("worst κ (dots: ∞; dotted: effective κ)", "log", "condition_number", "effective"),
    ("dead filters", "linear", "dead_filters", None),
)
# Rows of panels for each kernel.
KERNEL = {
    "sigma_max": ("σ max", "linear"),
    "condition_number": ("κ (dots: ∞)", "log"),
    "stable_rank": ("stable rank", "linear"),
}


class Runs:
    """What was measured, by network and way of pruning.

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
        """A figure at each step, of the whole network or of one kernel, (seeds, levels, ...)."""
        runs = [run["steps"] for run in self._runs if (run["network"], run["way"]) == (name, way)]
        return np.asarray(
            [
                [step[key] if layer is None else step["kernels"][layer][key] for step in run]
                for run in runs
            ],
            float,
        )


def table(runs: Runs) -> Table:
    """Medians over the seeds; the interval of the robust accuracy is the mean of the seeds'."""
    result = Table(
        title="Pruned by magnitude", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    for heading in ("network", "zeros", "clean", "robust", *COLUMNS):
        result.add_column(
            heading, justify="left" if heading == "network" else "right", no_wrap=True
        )
    for name in runs.names:
        for way in runs.ways:
            median = {
                key: np.median(runs.figures(name, way, key), axis=0)
                for key in ("clean", "robust", *COLUMNS.values())
            }
            intervals = 100 * np.mean(runs.figures(name, way, "interval"), axis=0)
            for index in np.flatnonzero(np.isin(runs.levels, TABLED)):
                low, high = intervals[index]
                result.add_row(
                    f"{name}, {way}",
                    f"{runs.levels[index]:.1%}",
                    f"{median['clean'][index]:.1%}",
                    f"{median['robust'][index]:.1%} ({low:.0f} to {high:.0f})",
                    *(f"{median[key][index]:.3g}".replace("inf", "∞") for key in COLUMNS.values()),
                )
            result.add_section()
    return result


def draw(runs: Runs, path: pathlib.Path) -> None:
    """Draw the networks as wholes, a row for each way of pruning, and three kernels below."""
    count = len(runs.ways) + len(KERNEL)
    figure, axes = plt.subplots(count, 4, figsize=(13, 2.6 * count))
    for row, way in zip(axes, runs.ways, strict=False):
        row[0].set_ylabel(f"the network, {way}")
        for axis, (title, scale, first, second) in zip(row, WHOLE, strict=True):
            panel(axis, title, scale)
            keys = [(first, "-")] if second is None else [(first, "-"), (second, ":")]
            lines(axis, runs, [(way, key, line) for key, line in keys])
    for column, layer in enumerate(runs.layers[:: math.ceil(len(runs.layers) / 3)]):
        for axis, (key, (title, scale)) in zip(axes[-3:, column], KERNEL.items(), strict=True):
            panel(axis, f"{layer}: {title}", scale)
            shown = [(way, key, line) for way, line in zip(runs.ways, LINES, strict=False)]
            lines(axis, runs, shown, layer)
    for axis in axes[-3:].flat:
        axis.set_visible(bool(axis.lines))
    legend(figure, runs, 1.5 / count)
    figure.tight_layout()
    figure.savefig(path, dpi=75)
    plt.close(figure)


def panel(axis, title: str, scale: str) -> None:
    """Set up a panel: zeros grow to the right, each factor of what is kept has the same room."""
    axis.set(xscale="log", yscale=scale, xlim=(1.15, 8e-4))
    axis.set_title(title, fontsize=9, pad=20 if "∞" in title else 6)
    axis.set_xticks([1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001])
    axis.set_xticklabels(["0", "50", "80", "90", "95", "98", "99", "99.9"], fontsize=7)
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.tick_params(axis="y", labelsize=7)


def lines(axis, runs: Runs, shown: list[tuple[str, str, str]], layer: str | None = None) -> None:
    """Draw figures, triples (way, key, line), of each network: median and range over the seeds.

    Where a figure is infinite there is a dot above the panel, the fuller the more seeds.
    """
    kept, height = 1.0 - runs.levels, 1.04
    for name, colour in zip(runs.names, COLOURS, strict=False):
        for way, key, line in shown:
            every = runs.figures(name, way, key, layer)
            infinite = np.isinf(every)
            for place, share in zip(kept, np.mean(infinite, axis=0), strict=True):
                axis.plot(
                    place,
                    height,
                    marker="o",
                    markersize=3.5,
                    color=colour,
                    markerfacecolor="none" if line == "--" else colour,
                    alpha=share,
                    transform=axis.get_xaxis_transform(),
                    clip_on=False,
                )
            height += 0.045 if np.any(infinite) else 0.0
            every = np.where(infinite, np.nan, every)
            every = np.maximum(every, FLOOR) if axis.get_yscale() == "log" else every
            axis.plot(kept, np.median(every, axis=0), line, color=colour, linewidth=1.4)
            edges = np.min(every, axis=0), np.max(every, axis=0)
            axis.fill_between(kept, *edges, color=colour, alpha=0.13, linewidth=0)


def legend(figure, runs: Runs, height: float) -> None:
    """Say in the free corner what colours and lines mean."""
    colours = zip(runs.names, COLOURS, strict=False)
    handles = [Line2D([], [], color=colour, linewidth=3, label=name) for name, colour in colours]
    ways = zip(runs.ways, LINES, strict=False)
    handles += [Line2D([], [], color="k", linestyle=line, label=way) for way, line in ways]
    seeds = len(runs.figures(runs.names[0], runs.ways[0], "robust"))
    figure.legend(
        handles=handles,
        title=f"Across: zeros in %.\nLines: the median of {seeds} seed(s);\nshaded: their range.\n",
        loc="center",
        bbox_to_anchor=(0.87, height),
        frameon=False,
        alignment="left",
    )


def save(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Let `write` make a file that nobody sees half-written."""
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
    parser.add_argument("--smoke", action="store_true", help="nothing is left out: it is quick")
    args = parser.parse_args()
    runs = Runs(json.loads(args.measured.read_text()))
    console = Console()
    console.print(table(runs))
    save(args.output / "theory.png", lambda path: draw(runs, path))
    console.print(f"theory.png is in {args.output}")


if __name__ == "__main__":
    main()
