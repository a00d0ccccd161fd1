"""Sweeps: experiments for all recipes, values and seeds, with one table of results."""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import io
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from tscnc_tf import _checks, _files, _reports
from tscnc_tf.experiments import engines, folders, runner
from tscnc_tf.experiments.recipe import Recipe, errors_begin, read_yaml, with_bases

RESULTS, DENSE = "results.csv", "dense"
FIGURES = ("clean", "robust", "zeros", "condition_number", "dead_filters")


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """An experiment of a sweep.

    Attributes:
        name: of its recipe in the sweep.
        values: of the grid, by name.
        recipe: with these values and the seed.
    """

    name: str
    values: Mapping[str, Any]
    recipe: Recipe

    @property
    def place(self) -> str:
        """The path of its folder, relative to that of the sweep."""
        chosen = [f"{name}={value}".replace("/", ":") for name, value in self.values.items()]
        return "/".join([self.name, *chosen, f"seed-{self.recipe.seed}"])


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Recipes by name, each with all combinations of values and several seeds.

    Args:
        recipes: recipes by names, which must be usable as names of folders.
        seeds: the seeds of each combination.
        grid: lists of values by their dotted names in a recipe, as `{"sparsity": [0.9, 0.99]}`.

    Raises:
        TypeError, ValueError: an argument is not as described, or a value does not fit a recipe.

    Example:
        >>> import tscnc_tf as tscnc
        >>> recipes = {"tscnc": tscnc.experiments.Recipe()}
        >>> plan = tscnc.experiments.Sweep(recipes, seeds=[0, 1], grid={"sparsity": [0.95, 0.99]})
        >>> [run.place for run in plan.runs()][:2]
        ['tscnc/sparsity=0.95/seed-0', 'tscnc/sparsity=0.95/seed-1']
    """

    recipes: Mapping[str, Recipe]
    seeds: Sequence[int] = (0,)
    grid: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.recipes, Mapping) or not self.recipes:
            raise TypeError(f"recipes must be a mapping of names to recipes, got {self.recipes!r}.")
        for name, recipe in self.recipes.items():
            _checks.file_name("recipes", name)
            if name == DENSE:
                raise ValueError(f"recipes must not have the name {DENSE!r}, which is reserved.")
            if not isinstance(recipe, Recipe):
                raise TypeError(f"recipes must be of Recipe, got {recipe!r} as {name!r}.")
        _require_list("seeds", self.seeds)
        if not isinstance(self.grid, Mapping):
            raise TypeError(
                f"grid must be a mapping of names to lists of values, got {self.grid!r}."
            )
        for name, values in self.grid.items():
            if name in ("name", "seed"):
                raise ValueError(f"grid must not have the name {name!r}: give recipes= and seeds=.")
            _require_list(f"grid[{name!r}]", values)
        for run in self.runs():  # each recipe checks its values
            for part in run.place.split("/"):
                _checks.file_name("grid", part)

    def runs(self) -> Iterator[SweepRun]:
        """Yield the experiments, in the order in which they are run."""
        for name, recipe in self.recipes.items():
            for combination in itertools.product(*self.grid.values()):
                values = dict(zip(self.grid, combination, strict=True))
                for seed in self.seeds:
                    with errors_begin(f"{name}: "):
                        yield SweepRun(name, values, recipe.override({**values, "seed": seed}))

    @classmethod
    def from_yaml(cls, path: str | pathlib.Path) -> Sweep:
        """Read a sweep from a YAML file.

        Its entries are `recipes`, `seeds` and `grid`. A recipe is written as in its own file,
        including `base`; a string is short for `{base: string}`.

        Raises:
            ImportError: PyYAML is not installed.
            OSError: a file is missing or can't be read.
            TypeError, ValueError: the file is not YAML, or not a sweep.
        """
        file = _files.absolute("path", path)
        content = read_yaml(file)
        known = [field.name for field in dataclasses.fields(cls)]
        with errors_begin(f"{file}: "):
            if not content.get("recipes"):
                raise ValueError("a sweep must have an entry recipes.")
            if unknown := sorted(map(str, set(content) - set(known))):
                raise ValueError(f"unknown: {', '.join(unknown)}. A sweep has {', '.join(known)}.")
            if not isinstance(content["recipes"], dict):
                raise TypeError(
                    f"recipes must be a mapping of names to recipes, got {content['recipes']!r}."
                )
            recipes = {
                str(name): _recipe(name, given, file) for name, given in content["recipes"].items()
            }
            return cls(**{**content, "recipes": recipes})


@dataclasses.dataclass(frozen=True)
class SweepReport(_reports.Report):
    """The results of a sweep; `print` it for a table of means over seeds.

    Attributes:
        folder: of the sweep; `results.csv` in it has a row for each run.
        rows: for each complete run its name, values, seed, folder, and `clean` and `robust`
            accuracy on the test set, the share of `zeros`, the largest `condition_number` and the
            number of `dead_filters`.
        failed: the error messages of failed runs, by folder.
    """

    folder: pathlib.Path
    rows: tuple[Mapping[str, Any], ...]
    failed: Mapping[str, str]

    def _table(self) -> _reports.Table:
        groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for row in self.rows:
            chosen = [
                f"{name} {value}"
                for name, value in row.items()
                if name not in ("name", "seed", "folder", *FIGURES)
            ]
            groups.setdefault((row["name"], ", ".join(chosen)), []).append(row)
        rows = [
            (name, values, str(len(found)), *(_spread(name_, found) for name_ in FIGURES))
            for (name, values), found in groups.items()
        ]
        columns = ("recipe", "values", "seeds", "clean", "robust", "zeros", "worst κ", "dead")
        notes = [f"{place} has failed: {why}" for place, why in self.failed.items()]
        notes.append("± is the standard deviation over seeds.")
        return _reports.Table(f"Sweep in {self.folder}", columns, rows, None, notes)


def sweep(
    plan: Sweep,
    folder: str | pathlib.Path,
    *,
    engine: str = "process",
    cpus: int = 1,
    gpus: float = 0,
    progress: bool = True,
) -> SweepReport:
    """Run all experiments of a sweep that are not complete, and collect the results of all.

    Each is a `run` in a folder of its own, such as `folder/NAME/sparsity=0.99/seed-0`. If the sweep
    is interrupted and called again, it continues. Recipes with an equal first stage share its dense
    network, which is trained once. A run that fails does not end the others.

    Args:
        plan: the sweep to run.
        folder: of the sweep.
        engine: "process": one after the other in this process, whose memory grows by some 20 MiB
            with each stage, since TensorFlow does not free all of it. "ray": as tasks of Ray, on
            the cluster that Ray is connected to or finds (RAY_ADDRESS), else on this machine;
            `folder` must be on a disk that all machines share. A task whose worker dies is started
            again.
        cpus: cores of each task, on Ray.
        gpus: GPUs of each task, on Ray; a fraction for several tasks on one.
        progress: whether to print on stderr when a run ends, if that is a terminal.

    Returns:
        A `SweepReport`; its rows are also in `folder/results.csv`, which is written after each run.

    Raises:
        TypeError, ValueError: an argument is not as described; the folder of a run holds an
            experiment with another recipe; or, on Ray, no machine has so many cores or GPUs.
        ImportError: the extra "experiments", or with engine="ray" the extra "ray", is not
            installed.
        OSError: the disk is full, or can't be written to; the message names the file.

    Example:
        >>> import tscnc_tf as tscnc
        >>> plan = tscnc.experiments.Sweep.from_yaml("sweep.yaml")  # doctest: +SKIP
        >>> tscnc.experiments.sweep(plan, "outputs/sweep", engine="ray")  # doctest: +SKIP
    """
    if not isinstance(plan, Sweep):
        raise TypeError(f"plan must be a Sweep, got {plan!r} of type {type(plan).__name__}.")
    goal = _files.absolute("folder", folder)
    progress = _checks.boolean("progress", progress)
    cpus, gpus = engines.require(engine, cpus, gpus)
    runs = {run.place: run for run in plan.runs()}
    for place, run in runs.items():
        folders.is_new(goal / place, run.recipe)  # raises if it holds another recipe
    calls = _calls(runs, goal)
    failed: dict[str, str] = {}
    console = Console(stderr=True)
    _write(runs, goal)
    with contextlib.closing(engines.run(calls, engine, cpus=cpus, gpus=gpus)) as ended:
        for place, error in ended:
            if error:
                failed[place] = error
            else:
                _write(runs, goal)
            if progress and console.is_terminal:
                console.print(f"{place}: {error or 'done'}", markup=False)
    return SweepReport(goal, tuple(_rows(runs, goal)), failed)


def _calls(runs: Mapping[str, SweepRun], folder: pathlib.Path) -> dict[str, engines.Call]:
    """Return the calls of runs that are not complete, by place.

    Whether a dense network is shared does not depend on which runs are complete, so that the result
    of a run does not either.
    """
    first = {place: run.recipe.dense_name() for place, run in runs.items()}
    counts = collections.Counter(first.values())
    dense: dict[str, engines.Call] = {}
    calls = {}
    for place, run in runs.items():
        if _is_complete(folder / place):
            continue
        after = None
        if counts[first[place]] > 1:
            arguments = (run.recipe.to_dict(), str(folder / DENSE / first[place]))
            after = dense.setdefault(first[place], engines.Call(_train_dense, arguments))
        calls[place] = engines.Call(_run, (run.recipe.to_dict(), str(folder / place)), after)
    return calls


def _train_dense(recipe: Mapping[str, Any], folder: str) -> str:
    """Train the dense network of a recipe; return the folder of that stage."""
    runner.run(Recipe.from_dict(recipe).first_stage(), folder, until="train", progress=False)
    return str(folders.stage_folder(pathlib.Path(folder), "train"))


def _run(recipe: Mapping[str, Any], folder: str, dense: str | None = None) -> None:
    runner.run(Recipe.from_dict(recipe), folder, dense=dense, progress=False)


def _is_complete(folder: pathlib.Path) -> bool:
    return folders.is_complete(folders.stage_folder(folder, "evaluate"))


def _rows(runs: Mapping[str, SweepRun], folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yield the results of the runs that are complete."""
    for place, run in runs.items():
        if not _is_complete(folder / place):
            continue
        stage = folders.stage_folder(folder / place, "evaluate")
        report, zeros, kernels = (
            folders.read_json(stage / f"{name}.json", f"Remove {stage}, and sweep again.")
            for name in ("report", "sparsity", "kernels")
        )
        worst = [float(row["condition_number"]) for row in kernels["rows"]]
        yield {
            "name": run.name,
            **run.values,
            "seed": run.recipe.seed,
            "folder": place,
            "clean": report["clean"]["accuracy"],
            "robust": report["robust"]["accuracy"],
            "zeros": zeros["sparsity"],
            "condition_number": max(worst),
            "dead_filters": sum(row["dead_filters"] for row in kernels["rows"]),
        }


def _write(runs: Mapping[str, SweepRun], folder: pathlib.Path) -> None:
    """Write the table of the runs that are complete."""
    if rows := list(_rows(runs, folder)):
        stream = io.StringIO()
        table = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        _files.write_text(folder / RESULTS, stream.getvalue())


def _spread(figure: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the mean of a figure over seeds and its standard deviation; for κ the median."""
    values = np.array([float(row[figure]) for row in rows])
    if figure == "condition_number":
        return _reports.significant(float(np.median(values)))
    scale, digits = (1, 1) if figure == "dead_filters" else (100, 2 if figure == "zeros" else 1)
    text = f"{scale * values.mean():.{digits}f}"
    if figure in ("clean", "robust") and len(values) > 1:
        text += f" ± {scale * values.std(ddof=1):.{digits}f}"
    return text


def _recipe(name: Any, given: Any, file: pathlib.Path) -> Recipe:
    """Return a recipe of a sweep's file."""
    values = {"base": given} if isinstance(given, str) else given
    if not isinstance(values, dict):
        raise TypeError(
            f"recipes.{name} must be text or a mapping of names to values, got {given!r}."
        )
    with errors_begin(f"recipes.{name}: "):
        return Recipe.from_dict(with_bases(values, file))


def _require_list(name: str, values: Any) -> None:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise TypeError(f"{name} must be a list of values, at least one, got {values!r}.")
    if len({str(value) for value in values}) < len(values):
        raise ValueError(f"{name} must not have a value twice, got {list(values)!r}.")
