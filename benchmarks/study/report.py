"""Tables and plots of a study, for `docs/study.md`."""

from __future__ import annotations

import itertools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from benchmarks.study import results as figures
from benchmarks.study.plan import HERE, Found, Plan
from benchmarks.study.results import Cell, Estimate, Result
from tscnc_tf import _files

TIMES = HERE.parent / "results" / "structures.json"

ByArm = Mapping[str, Mapping[int, Result]]


class Choice(NamedTuple):
    """The time and robust accuracy of the networks of one arm and sparsity.

    Attributes:
        arm, sparsity: the networks.
        share: the time of one inference, as a share of the dense network's.
        robust: the robust accuracy, with its interval over the seeds.
        is_best: whether it is Pareto-optimal, that is, no other choice `beats` it.
    """

    arm: str
    sparsity: float
    share: float
    robust: Estimate
    is_best: bool = False

    def __str__(self) -> str:
        return f"{self.arm}, {100 * self.sparsity:g} %"

    def beats(self, other: Choice) -> bool:
        """Tell whether it is at least as fast and as robust as `other`, and better in one."""
        mine, theirs = ((-each.share, each.robust.mean) for each in (self, other))
        return mine != theirs and all(a >= b for a, b in zip(mine, theirs, strict=True))


BEGIN, END = "<!-- begin: {name} -->", "<!-- end: {name} -->"


def tables(plan: Plan, found: Found) -> str:
    """Return the report in Markdown.

    Each setting and sparsity has a table of its arms, and one of the differences to their bases.
    Then follow the tuned values and the correlations.
    """
    results = read(found)
    cells = figures.by_cell(results)
    parts = [_progress(plan, found)]
    for cell, by_arm in cells.items():
        parts += [_table(plan, cell, by_arm), _added(plan, cell, by_arm)]
    parts += [_tuned(plan, found, setting) for setting in plan.tuning]
    parts.append(_correlations(results))
    if versions := sorted({version for result in results for version in result.versions}):
        parts.append(f"Made with {', '.join(versions)}.")
    return "\n\n".join(part for part in parts if part)


def read(found: Found) -> list[Result]:
    """Return the results of the runs, without trials."""
    return [Result.of(content) for content in found.values() if not content["trial"]]


def insert(path: pathlib.Path, name: str, text: str) -> None:
    """Replace the text between the marks `name` in a document.

    Raises:
        ValueError: the document lacks the marks.
    """
    content = path.read_text(encoding="utf-8")
    begin, end = BEGIN.format(name=name), END.format(name=name)
    before, found, rest = content.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"{path} has no marks {begin} and {end}.")
    _files.write_text(path, f"{before}{begin}\n\n{text}\n\n{end}{after}")


def _progress(plan: Plan, found: Found) -> str:
    """Return a line about missing runs; an empty text if there are none."""
    arms = [(s, arm) for s in plan.settings for arm in plan.arms if plan.sparsities(s, arm)]
    total = len(plan.seeds) * sum(len(plan.sparsities(*each)) for each in arms)
    done = sum(not content["trial"] for content in found.values())
    if done == total:
        return ""
    trials = len({run.place for run in plan.trials(found)} & set(found))
    return (
        f"**Not complete:** {done} of {total} runs are complete, and {trials} trials of the tuning."
    )


def _table(plan: Plan, cell: Cell, by_arm: ByArm) -> str:
    head = ["arm", "seeds", "clean", "robust"]
    rivals = [arm for arm in plan.against if arm in by_arm]
    head += [f"{what} − {rival}" for rival in rivals for what in ("clean", "robust")]
    head += ["PGD − robust", "effective zeros", "worst κ", "effective κ", "dead", "local Lipschitz"]
    arms = [arm for arm in plan.arms if arm in by_arm]
    count = max(1, len(arms) - 1)
    rows = []
    for arm in arms:
        found = list(by_arm[arm].values())
        rows.append(
            [
                arm,
                str(len(found)),
                _points(_mean(found, "clean")),
                _points(_mean(found, "robust")),
                *(
                    "" if arm == rival else difference
                    for rival in rivals
                    for difference in _ahead(by_arm[arm], by_arm[rival], count)
                ),
                _overestimate(found),
                f"{100 * np.mean([result.zeros for result in found]):.2f}",
                _median(found, "condition"),
                _median(found, "effective"),
                f"{np.mean([result.dead for result in found]):.1f}",
                f"{np.mean([result.lipschitz for result in found]):.3g}",
            ]
        )
    return f"### {_title(cell)}\n\n{markdown(head, rows)}"


def _added(plan: Plan, cell: Cell, by_arm: ByArm) -> str:
    """Return a table of the differences between arms and their bases."""
    bases = {arm: plan.base(arm) for arm in plan.arms if arm in by_arm}
    pairs = [(arm, base) for arm, base in bases.items() if base in by_arm]
    if not pairs:
        return ""
    rows = [
        [arm, base, *_ahead(by_arm[arm], by_arm[base], len(pairs))] for arm, base in pairs if base
    ]
    head = ["arm", "added to", "clean", "robust"]
    return f"### {_title(cell)}: what is added\n\n{markdown(head, rows)}"


def _tuned(plan: Plan, found: Found, setting: str) -> str:
    """Return a table of the values that the tuning has chosen."""
    rows = [
        [arm, ", ".join(f"{name} {value:g}" for name, value in chosen.items())]
        for arm in plan.arms
        if (chosen := plan.tuned(found, setting, arm))
    ]
    return f"### {setting}: chosen values\n\n{markdown(['arm', 'values'], rows)}" if rows else ""


def _correlations(results: Sequence[Result]) -> str:
    names = {"effective": "effective κ", "condition": "κ", "lipschitz": "local Lipschitz"}
    found = {figure: figures.within_cells(results, figure) for figure in names}
    head = ["setting, zeros", *names.values()]
    rows = [
        [_title(cell), *(_correlation(found[figure][cell]) for figure in names)]
        for cell in found["effective"]
    ]
    if not rows:
        return ""
    title = "### Rank correlation with robust accuracy, over arms: the mean of the seeds"
    return f"{title}\n\n{markdown(head, rows)}"


def plot(plan: Plan, results: Sequence[Result], path: pathlib.Path) -> None:
    """Draw robust accuracy over sparsity, and over the effective condition number.

    The left panel shows the mean of each arm, and a dotted line for arms at sparsity 0. The right
    panel shows each run at the sparsity with most arms; if several are equal, at the highest.
    """
    cells = figures.by_cell(results)
    settings = list(dict.fromkeys(cell.setting for cell in cells))
    figure, axes = plt.subplots(
        max(1, len(settings)), 2, figsize=(9, 3.6 * max(1, len(settings))), squeeze=False
    )
    both = plt.get_cmap("tab20").colors  # each color, then its pale version
    styles = itertools.product("o^sv", [*both[::2], *both[1::2]])  # marker, colour
    looks = {
        arm: {"marker": marker, "color": colour, "markersize": 3}
        for arm, (marker, colour) in zip(plan.arms, styles, strict=False)
    }
    labels: dict[str, Any] = {}
    for (left, right), setting in zip(axes, settings, strict=False):
        here = {cell.sparsity: by_arm for cell, by_arm in cells.items() if cell.setting == setting}
        levels = sorted(level for level in here if level)
        most = max(levels, key=lambda level: (len(here[level]), level), default=0.0)
        for arm in plan.arms:
            found = {level: list(here[level].get(arm, {}).values()) for level in here}
            means = {s: 100 * _mean(each, "robust").mean for s, each in found.items() if each}
            if 0 in means:
                labels[arm] = left.axhline(means.pop(0), color=looks[arm]["color"], linestyle=":")
            if means:
                places = [levels.index(level) for level in means]
                (labels[arm],) = left.plot(places, means.values(), **looks[arm])
            shown = found.get(most, [])
            x, y = [each.effective for each in shown], [100 * each.robust for each in shown]
            right.plot(x, y, linestyle="", **looks[arm])
        left.set_title(setting, fontsize=9)
        left.set_ylim(0)
        left.set_xticks(range(len(levels)), [f"{100 * level:g} %" for level in levels])
        left.set_xlabel("zeros")
        left.set_ylabel("robust accuracy, %")
        right.set_title(f"{setting}, {100 * most:g} % zeros", fontsize=9)
        right.set_xscale("log")
        right.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        right.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        right.xaxis.set_minor_formatter(NullFormatter())
        right.set_xlabel("worst effective κ")
    figure.legend(labels.values(), labels, loc="lower center", ncols=6, frameon=False, fontsize=8)
    lines = math.ceil(len(labels) / 6)
    figure.tight_layout(rect=(0, (0.1 + 0.18 * lines) / figure.get_figheight(), 1, 1))
    with _files.replaced(path) as draft:
        figure.savefig(draft, dpi=110, format="png")
    plt.close(figure)


def shares(plan: Plan) -> dict[str, dict[str, float]]:
    """Return the times of `python -m benchmarks structures`; empty for plans other than its own.

    By setting, and by arm and sparsity ("filters 0.5"): the time of one inference as a share of the
    dense network's.
    """
    if plan.name != "structure" or not TIMES.is_file():
        return {}
    settings = json.loads(TIMES.read_text(encoding="utf-8")).get("settings", {})
    return {setting: each["share_of_dense"] for setting, each in settings.items()}


def against_time(
    plan: Plan, results: Sequence[Result], times: Mapping[str, Mapping[str, float]]
) -> dict[str, list[Choice]]:
    """Return the choices of each setting, the fastest first.

    Args:
        plan: the study.
        results: the results of its runs.
        times: as `shares` returns them.
    """
    found: dict[str, list[Choice]] = {}
    for cell, by_arm in figures.by_cell(results).items():
        for arm, by_seed in by_arm.items():
            share = times.get(cell.setting, {}).get(f"{arm} {cell.sparsity:g}")
            if share is not None:
                robust = _mean(list(by_seed.values()), "robust")
                found.setdefault(cell.setting, []).append(Choice(arm, cell.sparsity, share, robust))
    ordered = {
        s: sorted(found[s], key=lambda choice: choice.share) for s in plan.settings if s in found
    }
    return {
        setting: [
            choice._replace(is_best=not any(other.beats(choice) for other in choices))
            for choice in choices
        ]
        for setting, choices in ordered.items()
    }


def table_against_time(choices: Mapping[str, Sequence[Choice]]) -> str:
    """Return the choices as tables, with the best ones in bold."""
    head = ["arm, zeros", "time of one inference, of the dense network's", "robust"]
    parts = []
    for setting, of_setting in choices.items():
        rows = [
            [f"**{c}**" if c.is_best else str(c), f"{c.share:.2f}", _points(c.robust)]
            for c in of_setting
        ]
        parts.append(f"### {setting}: time and accuracy\n\n{markdown(head, rows)}")
    return "\n\n".join(parts)


def plot_against_time(choices: Mapping[str, Sequence[Choice]], path: pathlib.Path) -> None:
    """Draw robust accuracy over the time of one inference, with a line through the best choices."""
    figure, axes = plt.subplots(1, len(choices), figsize=(5.5 * len(choices), 4), squeeze=False)
    arms = dict.fromkeys(c.arm for of_setting in choices.values() for c in of_setting)
    colours = dict(zip(arms, plt.get_cmap("tab10").colors, strict=False))
    for (setting, of_setting), axis in zip(choices.items(), axes[0], strict=True):
        best = [choice for choice in of_setting if choice.is_best]
        axis.plot([c.share for c in best], [100 * c.robust.mean for c in best], color="0.8")
        for arm in arms:
            mine = [choice for choice in of_setting if choice.arm == arm]
            halves = [100 * c.robust.half if math.isfinite(c.robust.half) else 0.0 for c in mine]
            x, y = [c.share for c in mine], [100 * c.robust.mean for c in mine]
            axis.errorbar(x, y, halves, fmt="o", markersize=4, color=colours[arm], label=arm)
            for choice in mine:
                place = (choice.share, 100 * choice.robust.mean)
                axis.annotate(f" {100 * choice.sparsity:g} %", place, fontsize=7)
        axis.set_title(setting, fontsize=9)
        axis.set_xlabel("time of one inference in LiteRT on x86, as a share of the dense network's")
        axis.set_ylabel("robust accuracy, %")
        axis.set_xlim(0)
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    with _files.replaced(path) as draft:
        figure.savefig(draft, dpi=110, format="png")
    plt.close(figure)


def _title(cell: Cell) -> str:
    return f"{cell.setting}, {100 * cell.sparsity:g} % zeros"


def _ahead(arm: Mapping[int, Result], base: Mapping[int, Result], count: int) -> list[str]:
    """Return the paired differences between two arms in clean and robust accuracy.

    The 95 % intervals are simultaneous for `count` differences.
    """
    return [
        _points(figures.paired(arm, base, figure, count), signed=True)
        for figure in ("clean", "robust")
    ]


def _overestimate(found: Sequence[Result]) -> str:
    """Return by how much PGD overestimates the robust accuracy; "–" if PGD has measured it."""
    gaps = [result.pgd - result.robust for result in found]
    return "–" if any(map(math.isnan, gaps)) else _points(figures.estimate(gaps), signed=True)


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
        return "–"  # for each seed, one of the two figures is the same in all arms
    interval = f" ± {value.half:.2f}" if math.isfinite(value.half) else ""
    return f"{value.mean:+.2f}{interval} ({value.count})"


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
