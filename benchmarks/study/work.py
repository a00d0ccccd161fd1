"""Running a study group by group, in this process or as Ray tasks."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import shutil
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from rich.console import Console

from benchmarks.study.plan import PLACE, Plan, Run
from benchmarks.study.table import Store
from tscnc_tf import _files, evaluate_robustness, experiments
from tscnc_tf._reports import jsonable, versions
from tscnc_tf.experiments import Recipe, engines, locks, stages
from tscnc_tf.experiments.folders import read_json
from tscnc_tf.experiments.recipe import differences

_TRAINING = ("train", "prune", "finetune")


def require_current(runs: Iterable[Run], store: Store) -> None:
    """Raise unless all results are those of the current plan.

    Raises:
        ValueError: a result has another recipe; the error names the differences.
    """
    found = store.read()
    for run in runs:
        if run.place in found:
            stored = found[run.place]["recipe"]
            dataset = {"data.dataset": stored["data"]["dataset"]}
            mine = run.recipe.override(dataset)
            if stored == jsonable(mine.to_dict()):
                continue
            # Through `Recipe`, so that values that were added later have their defaults.
            if changed := differences(Recipe.from_dict(stored).to_dict(), mine.to_dict()):
                raise ValueError(
                    f"{run.name} in {store.table} is by another plan: {'; '.join(changed)}. Remove "
                    f"the rows (and files in {store.fresh}) that the plan's change has made "
                    "invalid, and run it again."
                )


@dataclasses.dataclass(frozen=True)
class Job:
    """A study to run, and how.

    Attributes:
        plan: the path of the plan.
        files: the paths of data sets, by their names in the plan.
        store: the store of the results.
        scratch: the folder of the experiments; of finished ones only the dense networks are kept.
        settings: the settings of the plan that are run.
        minutes: the time after which no group is begun.
        engine: "process", one group after the other; or "ray", as many as there are cores for.
        cpus, gpus: with Ray, whose machines must share the disk: cores and GPUs per group.
    """

    plan: pathlib.Path
    files: Mapping[str, str]
    store: Store
    scratch: pathlib.Path
    settings: Sequence[str]
    minutes: float = math.inf
    engine: str = "process"
    cpus: int = 1
    gpus: float = 0.0

    def missing(self) -> list[Run]:
        """Return the trials and runs that can be begun now."""
        runs = Plan.read(self.plan, self.files).wanted(self.store.read())
        return self.store.missing(run for run in runs if run.setting in self.settings)


def run(job: Job) -> dict[str, str]:
    """Run what is missing until nothing is, or the time is over; return errors by failed group.

    A group is the runs that begin with the same dense network, and is one call of the engine. A run
    that is killed loses at most an epoch, and continues in the next call. Runs that wait for trials
    are begun when all groups that could be begun before have ended.
    """
    console, failed = Console(stderr=True), dict[str, str]()
    end = time.time() + 60 * job.minutes  # the only clock that all processes share
    while time.time() < end:
        begun = [each for each in job.missing() if each.group not in failed]
        if not begun:
            break
        calls = {each.group: engines.Call(work, (job, each.group, end)) for each in begun}
        ended = engines.run(calls, job.engine, cpus=job.cpus, gpus=job.gpus)
        with contextlib.closing(ended):
            for group, error in ended:
                missing = job.missing()  # finished trials may add new ones to the group
                left = any(each.group == group and each in missing for each in begun)
                if left and not error and time.time() < end:
                    folder = job.store.fresh
                    error = f"its results are not in {folder}: do all machines share this disk?"
                if error:
                    failed[group] = error
                how = f"failed: {error}" if error else "ended"
                line = f"{time.strftime('%H:%M:%S')}  {group} {how}, {len(missing)} left"
                console.print(line, markup=False)
    return failed


def work(job: Job, group: str, end: float = math.inf) -> None:
    """Run what is missing of one group, if `end`, in seconds of `time.time`, is not over.

    Raises:
        RuntimeError: another process works on the group.
    """
    if time.time() > end:
        return
    with locks.exclusive(job.scratch / ".locks" / group):
        for run in job.missing():
            if run.group != group:
                continue
            begin = time.monotonic()
            try:
                content = finished(run, job.scratch)
            except Exception:
                place = job.scratch / "errors" / run.setting / f"{run.name}.txt"
                _files.write_text(place, traceback.format_exc())
                raise
            job.store.add(run, {**content, "seconds": time.monotonic() - begin})
            shutil.rmtree(folder_of(run, job.scratch))


def finished(run: Run, scratch: pathlib.Path) -> dict[str, Any]:
    """Run an experiment, or what is missing of it; return its content for the study."""
    folder = folder_of(run, scratch)
    shared = scratch / "dense" / run.setting / run.dense
    experiments.run(run.recipe.first_stage(), shared, until="train", progress=False)
    until = "finetune" if run.trial else "evaluate"
    dense = shared / "1-train"
    experiments.run(run.recipe, folder, dense=dense, until=until, progress=False)
    return trained(run, folder) if run.trial else trained(run, folder) | judged(run, folder)


def folder_of(run: Run, scratch: pathlib.Path) -> pathlib.Path:
    """Return the folder of an experiment."""
    return scratch / run.setting / run.name


def portable(run: Run, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's recipe with the name of the data set in place of its path."""
    return run.recipe.override({"data.dataset": data["name"]}).to_dict()


def kernels(conditions: Mapping[str, Any], pruned: Set[str]) -> dict[str, dict[str, Any]]:
    """Return the figures of a report on condition numbers that a study keeps, by kernel."""
    shown = ("sigma_max", "condition_number", "effective_condition_number")
    shown += ("stable_rank", "filters", "dead_filters")
    return {
        row["name"]: {name: row[name] for name in shown} | {"pruned": row["name"] in pruned}
        for row in conditions["rows"]
    }


def trained(run: Run, folder: pathlib.Path) -> dict[str, Any]:
    """Return a run's place, its recipe, and the figures of the chosen epoch of each stage."""
    outputs = _stages(folder)
    data = outputs["train"].manifest["data"]
    chosen = {
        stage: output.metrics[output.manifest["chosen_epoch"] - 1]
        for stage, output in outputs.items()
    }
    return {
        **dict(zip(PLACE, run.place, strict=True)),
        "validation": {
            stage: {
                "epoch": row["epoch"],
                "clean": row["validation_accuracy"],
                "robust": row["validation_robust_accuracy"],
                "condition_number": row["condition_number"],
                **{name: row[name] for name in ("expected_l0", "open_gates") if name in row},
            }
            for stage, row in chosen.items()
        },
        "recipe": portable(run, data),
        "data": data,
        "versions": versions(),
    }


def judged(run: Run, folder: pathlib.Path) -> dict[str, Any]:
    """Return the figures of a finished network on the test set, and those of its kernels."""
    place = folder / "4-evaluate"
    report, conditions, lipschitz, zeros = (
        read_json(place / f"{name}.json", f"Remove {place}, and run the study again.")
        for name in ("report", "kernels", "lipschitz", "sparsity")
    )
    weights = sum(row["weights"] for row in zeros["rows"])
    return {
        "clean": report["clean"]["accuracy"],
        "robust": report["robust"]["accuracy"],
        "examples": report["examples"],
        "epsilon": report["attacks"][0]["epsilon"],
        "attacks": {attack["name"]: attack["accuracy"] for attack in report["attacks"]},
        **({} if run.recipe.evaluate.attack == "pgd" else {"pgd": by_pgd(run, folder)}),
        "notes": [*report["warnings"], *report["notes"]],
        "lipschitz": lipschitz["mean"],
        "zeros": sum(row["zeros"] for row in zeros["rows"]) / weights,  # of all kernels
        "effective_zeros": zeros["effective_zeros"] and sum(zeros["effective_zeros"]) / weights,
        "kernels": kernels(conditions, set(_stages(folder)["prune"].masks)),
    }


def by_pgd(run: Run, folder: pathlib.Path) -> dict[str, float]:
    """Return the accuracies under PGD: of each attack, and of all together ("worst")."""
    x, y = stages.dataset(run.recipe).arrays("test")
    report = evaluate_robustness(
        experiments.open_stage(folder / "3-finetune").model,
        x,
        y,
        stages.test_attacks(run.recipe.override({"evaluate.attack": "pgd"})),
        batch_size=run.recipe.evaluate.batch_size,
        seed=run.seed,
        diagnose=False,
        state_path=folder / "pgd-state.json",
        progress=False,
    ).to_dict()
    by_attack = {attack["name"]: attack["accuracy"] for attack in report["attacks"]}
    return {**by_attack, "worst": report["robust"]["accuracy"]}


def _stages(folder: pathlib.Path) -> dict[str, experiments.StageOutput]:
    return {
        stage: experiments.open_stage(folder / f"{number}-{stage}")
        for number, stage in enumerate(_TRAINING, start=1)
    }
