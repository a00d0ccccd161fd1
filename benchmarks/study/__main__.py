"""The command line: `python -m benchmarks.study run|report|export|collect`."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from rich.console import Console

from benchmarks.study import accelerate, report, work
from benchmarks.study.plan import HERE, Plan
from benchmarks.study.table import Store
from tscnc_tf.experiments import engines

RESULTS = HERE.parent / "results" / "study"
DOCUMENT = HERE.parents[1] / "docs" / "study.md"

WHAT = ("run", "report", "export", "collect")


def main(arguments: list[str] | None = None) -> int:
    """Run, report, export or collect a study.

    Returns:
        The exit status: 0 if the command is done, 75 if runs are left, 1 if a group has failed.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    path = HERE / "quick.yaml" if options.quick else options.plan.resolve()
    if wrong := [pair for pair in options.data if "=" not in pair]:
        parser.error(f"--data must be NAME=FILE, as cifar10=cifar10.npz, got {wrong[0]!r}.")
    pairs = (pair.split("=", 1) for pair in options.data)
    files = {name: str(pathlib.Path(file).resolve()) for name, file in pairs}
    try:
        plan = Plan.read(path, files)
    except OSError as error:
        parser.error(f"--plan must be a YAML file, got {path}: {error.strerror}.")
    settings = options.settings or list(plan.settings)
    if unknown := [name for name in settings if name not in plan.settings]:
        parser.error(f"--settings must be among {list(plan.settings)}, got {unknown[0]!r}.")
    # Absolute, as a Ray process may have another working directory.
    scratch = options.scratch.resolve() / plan.name
    store = Store(options.results.resolve() / f"{plan.name}.csv", scratch / "results")
    console = Console()
    work.require_current(plan.wanted(store.read()), store)
    if options.what == "report":
        _report(plan, store, options, console)
        return 0
    if options.what in ("export", "collect"):
        if options.what == "export":
            accelerate.export(plan, scratch)
            console.print(f"{scratch}: where JAX is, run python runner/run_all.py . --minutes 9")
        else:
            console.print(accelerate.collect(plan, scratch, store))
        return 0
    by = (options.engine, options.cpus, options.gpus)
    try:
        engines.require(*by)
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    job = work.Job(path, files, store, scratch, settings, options.minutes, *by)
    try:
        failed = work.run(job)
    finally:
        store.enter()
    console.print(report.tables(plan, store.read()), markup=False, soft_wrap=True)
    if failed:
        for group, error in failed.items():
            console.print(f"{group} has failed: {error}", markup=False)
        return 1
    more = bool(job.missing())
    console.print("More is to do: run the same command again." if more else "All done.")
    return 75 if more else 0


def _report(plan: Plan, store: Store, options: argparse.Namespace, console: Console) -> None:
    found = store.read()
    if not found:
        sys.exit(f"{store.table} holds no results yet: python -m benchmarks.study run")
    text = report.tables(plan, found)
    choices = report.against_time(plan, report.read(found), report.shares(plan))
    if choices:
        text += f"\n\n{report.table_against_time(choices)}"
    console.print(text, markup=False, soft_wrap=True)
    if options.write:
        picture = DOCUMENT.with_name(f"study-{plan.name}.png")
        title = "Robust accuracy by sparsity and by effective condition number"
        results = report.read(found)  # none if there are only trials yet
        shown = f"![{title}]({picture.name})\n\n{text}" if results else text
        if choices:
            against_time = DOCUMENT.with_name(f"study-{plan.name}-time.png")
            shown = f"![Robust accuracy by time]({against_time.name})\n\n{shown}"
        try:
            report.insert(DOCUMENT, plan.name, shown)
        except ValueError as error:
            sys.exit(f"{error} Leave out --write: this plan has no place there.")
        if results:
            report.plot(plan, results, picture)
        if choices:
            report.plot_against_time(choices, against_time)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--plan", type=pathlib.Path, default=HERE / "cpu.yaml")
    parser.add_argument("--quick", action="store_true", help="run quick.yaml, about 10 minutes")
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME=FILE", help="as cifar10=cifar10.npz"
    )
    parser.add_argument("--settings", nargs="+", help="these settings only")
    parser.add_argument("--engine", choices=engines.ENGINES, default=engines.ENGINES[0])
    parser.add_argument("--cpus", type=int, default=1, help="with Ray: cores per group")
    parser.add_argument("--gpus", type=float, default=0.0, help="with Ray: GPUs per group")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="time limit")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--scratch", type=pathlib.Path, default=pathlib.Path("outputs/study"))
    parser.add_argument("--write", action="store_true", help="report: write docs/study.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
