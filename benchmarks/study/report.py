"""Tables and plots of a study, for `docs/study.md`."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from benchmarks.study import results as figures
from benchmarks.study.results import BASE, Cell, Estimate, Result
from tscnc_tf import _files

BEGIN, END = "<!-- begin: {name} -->", "<!-- end: {name} -->"


def tables(results: Sequence[Result], arms: Sequence[str]) -> str:
    """Return what there is to see: all figures, those against pruning alone, kernel by kernel.

    Each setting, method and sparsity has a table of its arms. At the highest sparsity there is
    also what each arm and method are ahead of plain pruning, and a look at each kernel.
    """
    cells = figures.by_cell(results)
    highest = max((cell.sparsity for cell in cells), default=0.0)
    parts = [_table(cell, by_arm, arms) for cell, by_arm in cells.items()]
    for setting in dict.fromkeys(cell.setting for cell in cells):
        parts.append(_against_pruning(setting, highest, cells, arms))
    for cell, by_arm in cells.items():
        if cell.sparsity == highest:
            parts.append(_layers(cell, by_arm, arms))
    parts.append(_correlations(results))
    versions = sorted({version for result in results for version in result.versions})
    parts.append(f"Made with {', '.join(versions)}.")
    return "\n\n".join(part for part in parts if part)


def insert(path: pathlib.Path, name: str, text: str) -> None:
    """Put tables between the marks of that name in a document."""
    content = path.read_text(encoding="utf-8")
    begin, end = BEGIN.format(name=name), END.format(name=name)
    before, found, rest = content.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"{path} has no marks {begin} and {end}.")
    _files.write_text(path, f"{before}{begin}\n\n{text}\n\n{end}{after}")


def _table(cell: Cell, by_arm: dict[str, dict[int, Result]], arms: Sequence[str]) -> str:
    head = ["arm", "seeds", "clean", "robust", f"clean − {BASE}", f"robust − {BASE}"]
    head += ["worst κ", "effective κ", "dead", "stable rank / filters", "local Lipschitz"]
    rows = []
    for arm in arms:
        found = list(by_arm.get(arm, {}).values())
        if not found:
            continue
        base = {} if arm == BASE else by_arm.get(BASE, {})
        rows.append(
            [
                arm,
                str(len(found)),
                _points(_mean(found, "clean")),
                _points(_mean(found, "robust")),
                *("" if arm == BASE else difference for difference in _ahead(by_arm[arm], base)),
                _median(found, "condition"),
                _median(found, "effective"),
                f"{np.mean([result.dead for result in found]):.1f}",
                f"{np.mean([result.stable_rank for result in found]):.3f}",
                f"{np.mean([result.lipschitz for result in found]):.3g}",
            ]
        )
    return f"### {_title(cell)}\n\n{markdown(head, rows)}"


def _against_pruning(
    setting: str,
    sparsity: float,
    cells: Mapping[Cell, Mapping[str, Mapping[int, Result]]],
    arms: Sequence[str],
) -> str:
    """Return what each arm, in each way, is ahead of pruning alone in each way."""
    here = {
        cell.method: by_arm for cell, by_arm in cells.items() if cell[::2] == (setting, sparsity)
    }
    rivals = [method for method, by_arm in here.items() if BASE in by_arm]
    if len(rivals) < 2:
        return ""
    rows = [
        [
            f"{arm}, {method}",
            *(
                "" if (arm, method) == (BASE, rival) else difference
                for rival in rivals
                for difference in _ahead(by_arm[arm], here[rival][BASE])
            ),
        ]
        for arm in arms
        for method, by_arm in here.items()
        if arm in by_arm
    ]
    ahead = [f"{what} − {BASE}, {rival}" for rival in rivals for what in ("clean", "robust")]
    title = f"### {setting}, {100 * sparsity:g} % zeros: against pruning alone"
    return f"{title}\n\n{markdown(['arm, method', *ahead], rows)}"


def _layers(cell: Cell, by_arm: dict[str, dict[int, Result]], arms: Sequence[str]) -> str:
    """Return κ, effective κ, stable rank and dead filters of each pruned kernel in each arm."""
    arms = [arm for arm in arms if arm in by_arm]
    found = {arm: [result.layers for result in by_arm[arm].values()] for arm in arms}
    names = [layer.name for layer in next(iter(found.values()))[0]]
    rows = []
    for index, name in enumerate(names):
        row = [name]
        for arm in arms:
            layers = [run[index] for run in found[arm]]
            parts = [
                _significant(np.median([layer.condition for layer in layers])),
                _significant(np.median([layer.effective for layer in layers])),
                f"{np.mean([layer.stable_rank for layer in layers]):.2f}",
                f"{np.mean([layer.dead for layer in layers]):.1f}",
            ]
            row.append(" · ".join(parts))
        rows.append(row)
    title = f"### {_title(cell)}, kernel by kernel: κ · effective κ · stable rank / filters · dead"
    return f"{title}\n\n{markdown(['kernel', *arms], rows)}"


def _correlations(results: Sequence[Result]) -> str:
    names = {"effective": "effective κ", "condition": "κ", "lipschitz": "local Lipschitz"}
    found = {figure: figures.within_cells(results, figure) for figure in names}
    head = ["setting, method, zeros", *names.values()]
    rows = [
        [
            f"{cell.setting}, {cell.method}, {100 * cell.sparsity:g} %",
            *(_correlation(found[figure][cell]) for figure in names),
        ]
        for cell in found["effective"]
    ]
    title = "### Rank correlation with robust accuracy, over arms: the mean of the seeds"
    return f"{title}\n\n{markdown(head, rows)}"


def plot(results: Sequence[Result], arms: Sequence[str], path: pathlib.Path) -> None:
    """Draw robust accuracy and effective condition number over sparsity: a dot a run, the means."""
    cells = figures.by_cell(results)
    columns = sorted({(cell.setting, cell.method) for cell in cells})
    shape = (2, max(1, len(columns)))
    both = plt.get_cmap("tab20").colors  # each colour in full, then pale
    colours = [*both[::2], *both[1::2]]
    figure, axes = plt.subplots(*shape, figsize=(3.6 * shape[1], 6), squeeze=False, sharex="col")
    for column, (setting, method) in enumerate(columns):
        levels = sorted(c.sparsity for c in cells if (c.setting, c.method) == (setting, method))
        top, bottom = axes[:, column]
        for index, arm in enumerate(arms):
            label = arm if column == 0 else None
            offset = 0.8 * (index - (len(arms) - 1) / 2) / len(arms)
            for place, level in enumerate(levels):
                found = list(cells[Cell(setting, method, level)].get(arm, {}).values())
                robust = [100 * result.robust for result in found]
                effective = [result.effective for result in found]
                for axis, values in ((top, robust), (bottom, effective)):
                    x = [place + offset] * len(values)
                    axis.plot(x, values, ".", color=colours[index], markersize=4, alpha=0.5)
                if robust:
                    middle = np.mean(robust)
                    top.plot(place + offset, middle, "_", color=colours[index], label=label)
                    label = None  # once is enough
        top.set_title(f"{setting}, {method}", fontsize=9)
        top.set_ylim(0)
        bottom.set_yscale("log")
        bottom.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bottom.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        bottom.yaxis.set_minor_formatter(NullFormatter())
        bottom.set_xticks(range(len(levels)), [f"{100 * level:g} %" for level in levels])
        bottom.set_xlabel("zeros")
    axes[0, 0].set_ylabel("robust accuracy, %")
    axes[1, 0].set_ylabel("worst effective κ")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=7, frameon=False, markerscale=2)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    with _files.replaced(path) as draft:
        figure.savefig(draft, dpi=110, format="png")
    plt.close(figure)


def _title(cell: Cell) -> str:
    return f"{cell.setting}, {cell.method}, {100 * cell.sparsity:g} % zeros"


def _ahead(arm: Mapping[int, Result], base: Mapping[int, Result]) -> list[str]:
    """Return what an arm is ahead of another one in clean and robust accuracy, seed by seed."""
    return [
        _points(figures.paired(arm, base, figure), signed=True) for figure in ("clean", "robust")
    ]


def _mean(found: Sequence[Result], name: str) -> Estimate:
    return figures.estimate([getattr(result, name) for result in found])


def _points(value: Estimate, signed: bool = False) -> str:
    """Return percentage points with the half width of their interval."""
    if not value.count:
        return "–"
    mean = f"{100 * value.mean:+.1f}" if signed else f"{100 * value.mean:.1f}"
    return f"{mean} ± {100 * value.half:.1f}" if math.isfinite(value.half) else mean


def _median(found: Sequence[Result], name: str) -> str:
    return _significant(np.median([getattr(result, name) for result in found]))


def _significant(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.3g}"


def _correlation(value: Estimate) -> str:
    if not value.count:
        return "–"  # in each seed, one of the two is the same in all arms
    # Of two seeds, which can only be alike or not, an interval would be misread.
    interval = f" ± {value.half:.2f}" if value.count > 2 else ""
    return f"{value.mean:+.2f}{interval} ({value.count})"


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
