"""Running a study: several processes, each taking one group of runs after the other."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from rich.console import Console

from benchmarks.study.plan import PLACE, Plan, Run
from benchmarks.study.table import Store
from tscnc_tf import evaluate_robustness, experiments
from tscnc_tf._reports import jsonable, versions
from tscnc_tf.experiments import Recipe, locks, stages
from tscnc_tf.experiments.folders import read_json
from tscnc_tf.experiments.recipe import differences

ROOT = pathlib.Path(__file__).resolve().parents[2]
_TRAINING = ("train", "prune", "finetune")


def require_current(runs: Iterable[Run], store: Store) -> None:
    """Make sure that the results are those of the plan as it is, and of none that it has been.

    Raises:
        ValueError: a result is by another recipe; the differences are said.
    """
    found = store.read()
    for run in runs:
        if run.place in found:
            stored = found[run.place]["recipe"]
            dataset = {"data.dataset": stored["data"]["dataset"]}
            mine = run.recipe.override(dataset)
            if stored == jsonable(mine.to_dict()):
                continue
            # Through a recipe, so that what it has gained since has its default.
            if changed := differences(Recipe.from_dict(stored).to_dict(), mine.to_dict()):
                raise ValueError(
                    f"{run.name} in {store.table} is by another plan: {'; '.join(changed)}. Remove "
                    f"the rows (and files in {store.fresh}) that the plan's change has made "
                    "invalid, and run it again."
                )


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be worked on, and how.

    Attributes:
        plan: the path of the plan.
        files: where data of the plan are, by their names there.
        store: for the results.
        scratch: the folder for the experiments themselves; of those that are done only the dense
            networks are kept.
        workers: how many processes.
        minutes: no group is begun after that.
        settings: which of the plan's settings.
    """

    plan: pathlib.Path
    files: Mapping[str, str]
    store: Store
    scratch: pathlib.Path
    workers: int
    minutes: float
    settings: Sequence[str]

    def missing(self) -> list[Run]:
        """Return the trials and runs that can be begun now."""
        runs = Plan.read(self.plan, self.files).wanted(self.store.read())
        return self.store.missing(run for run in runs if run.setting in self.settings)


def supervise(job: Job) -> list[str]:
    """Run what is missing until nothing is, or the time is over; return the groups that failed.

    A group, the runs that begin with the same dense network, is a process of its own, with a share
    of the cores. Whoever is killed loses at most an epoch: each run goes on where it was. Runs that
    wait for trials are begun when these are done.
    """
    console = Console(stderr=True)
    begin, failed = time.monotonic(), list[str]()
    running: dict[str, subprocess.Popen[bytes]] = {}
    missing = job.missing()
    while True:
        for group, process in list(running.items()):
            if process.poll() is not None:
                del running[group]
                missing = job.missing()
                elapsed = (time.monotonic() - begin) / 60
                how = "ended"
                if process.returncode:
                    how = f"failed ({process.returncode}), see {_log(job, group)}"
                    failed.append(group)
                console.print(f"{elapsed:6.1f} min  {group} {how}, {len(missing)} runs left")
        waiting = [run.group for run in missing if run.group not in (*running, *failed)]
        in_time = time.monotonic() - begin < 60 * job.minutes
        for group in list(dict.fromkeys(waiting))[: job.workers - len(running)] if in_time else ():
            running[group] = _start(job, group)
        if not running:
            return failed
        time.sleep(0.5)


def _start(job: Job, group: str) -> subprocess.Popen[bytes]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = str(max(1, (cores or 1) // job.workers))
    environment = {
        **os.environ,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_NUM_INTRAOP_THREADS": threads,
        "TF_NUM_INTEROP_THREADS": threads,
    }
    where = (job.store.table, job.store.fresh, job.scratch)
    arguments = [job.plan, json.dumps(dict(job.files)), *where, group]
    command = [sys.executable, "-m", "benchmarks.study.work", *map(str, arguments)]
    log = _log(job, group)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)


def _log(job: Job, group: str) -> pathlib.Path:
    """Return where a group's process says what it has to say."""
    return job.scratch / f"{group.replace('/', '-')}.log"


def work(plan: Plan, store: Store, scratch: pathlib.Path, group: str) -> None:
    """Run what is missing of one group: one dense network, pruned in every way of the plan.

    Raises:
        RuntimeError: another process works on the group.
    """
    with locks.exclusive(scratch / ".locks" / group):
        runs = [run for run in plan.wanted(store.read()) if run.group == group]
        for run in store.missing(runs):
            begin = time.monotonic()
            content = finished(run, scratch)
            store.add(run, {**content, "seconds": time.monotonic() - begin})
            shutil.rmtree(folder_of(run, scratch))


def finished(run: Run, scratch: pathlib.Path) -> dict[str, Any]:
    """Run an experiment, or what is missing of it; return what a study keeps."""
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
    """Return a run's recipe, the data by name: where its file is, is a matter of one machine."""
    return run.recipe.override({"data.dataset": data["name"]}).to_dict()


def kernels(conditions: Mapping[str, Any], pruned: Set[str]) -> dict[str, dict[str, Any]]:
    """Return what a study keeps of a report on condition numbers, by the names of kernels."""
    shown = ("sigma_max", "condition_number", "effective_condition_number")
    shown += ("stable_rank", "filters", "dead_filters")
    return {
        row["name"]: {name: row[name] for name in shown} | {"pruned": row["name"] in pruned}
        for row in conditions["rows"]
    }


def trained(run: Run, folder: pathlib.Path) -> dict[str, Any]:
    """Return where a run stands, its recipe, and the chosen epoch of each stage of training."""
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
    """Return the figures of a finished network: on the test set, and of its kernels."""
    place = folder / "4-evaluate"
    report, conditions, lipschitz, zeros = (
        read_json(place / f"{name}.json", f"Remove {place}, and run the study again.")
        for name in ("report", "kernels", "lipschitz", "sparsity")
    )
    return {
        "clean": report["clean"]["accuracy"],
        "robust": report["robust"]["accuracy"],
        "examples": report["examples"],
        "epsilon": report["attacks"][0]["epsilon"],
        "attacks": {attack["name"]: attack["accuracy"] for attack in report["attacks"]},
        **({} if run.recipe.evaluate.attack == "pgd" else {"pgd": by_pgd(run, folder)}),
        "notes": [*report["warnings"], *report["notes"]],
        "lipschitz": lipschitz["mean"],
        "zeros": zeros["sparsity"],
        "effective_zeros": zeros["effective_sparsity"],
        "kernels": kernels(conditions, set(_stages(folder)["prune"].masks)),
    }


def by_pgd(run: Run, folder: pathlib.Path) -> dict[str, float]:
    """Return the accuracies under PGD, which many reports rest on: of each attack and the worst."""
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


if __name__ == "__main__":
    _plan = Plan.read(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]))
    _table, _fresh, _scratch = map(pathlib.Path, sys.argv[3:6])
    work(_plan, Store(_table, _fresh), _scratch, sys.argv[6])
