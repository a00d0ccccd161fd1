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

from benchmarks.study.plan import Plan, Run
from benchmarks.study.table import PLACE, Store, place
from tscnc_tf import experiments
from tscnc_tf._reports import jsonable, versions
from tscnc_tf.experiments import Recipe, locks
from tscnc_tf.experiments.folders import read_json
from tscnc_tf.experiments.recipe import differences

ROOT = pathlib.Path(__file__).resolve().parents[2]


def require_current(runs: Iterable[Run], store: Store) -> None:
    """Make sure that the results are those of the plan as it is, and of none that it has been.

    Raises:
        ValueError: a result is by another recipe; the differences are said.
    """
    found = store.read()
    for run in runs:
        if place(run) in found:
            stored = found[place(run)]["recipe"]
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
        scratch: the folder for the experiments themselves, which are removed when they are done.
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


def supervise(job: Job) -> list[str]:
    """Run what is missing until nothing is, or the time is over; return the groups that failed.

    A group, the runs that begin with the same dense network, is a process of its own, with a share
    of the cores. Whoever is killed loses at most an epoch: each run goes on where it was.
    """
    console = Console(stderr=True)
    plan = Plan.read(job.plan, job.files)
    runs = [run for run in plan.runs() if run.setting in job.settings]
    begin, running = time.monotonic(), {}
    waiting = list(dict.fromkeys(run.group for run in job.store.missing(runs)))
    failed = []
    while True:
        for group, process in list(running.items()):
            if process.poll() is not None:
                del running[group]
                left = len(job.store.missing(runs))
                elapsed = (time.monotonic() - begin) / 60
                how = "ended"
                if process.returncode:
                    how = f"failed ({process.returncode}), see {_log(job, group)}"
                    failed.append(group)
                console.print(f"{elapsed:6.1f} min  {group} {how}, {left} runs left")
        in_time = time.monotonic() - begin < 60 * job.minutes
        while in_time and waiting and len(running) < job.workers:
            group = waiting.pop(0)
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
        _work([run for run in plan.runs() if run.group == group], store, scratch)


def _work(runs: Sequence[Run], store: Store, scratch: pathlib.Path) -> None:
    folders = {run.name: scratch / run.setting / run.name for run in runs}
    for run in store.missing(runs):
        begin = time.monotonic()
        trained = (folder / "1-train" for folder in folders.values())
        dense = next((stage for stage in trained if (stage / "manifest.json").is_file()), None)
        experiments.run(run.recipe, folders[run.name], dense=dense, progress=False)
        content = {**summary(run, folders[run.name]), "seconds": time.monotonic() - begin}
        store.add(run, content)
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)


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


def summary(run: Run, folder: pathlib.Path) -> dict[str, Any]:
    """Return what a study keeps of an experiment."""
    judged = folder / "4-evaluate"
    report, conditions, lipschitz, zeros = (
        read_json(judged / f"{name}.json", f"Remove {judged}, and run the study again.")
        for name in ("report", "kernels", "lipschitz", "sparsity")
    )
    stages = {
        stage: experiments.open_stage(folder / f"{number}-{stage}")
        for number, stage in enumerate(("train", "prune", "finetune"), start=1)
    }
    chosen = {
        stage: output.metrics[output.manifest["chosen_epoch"] - 1]
        for stage, output in stages.items()
    }
    data = stages["train"].manifest["data"]
    return {
        **dict(zip(PLACE, place(run), strict=True)),
        "clean": report["clean"]["accuracy"],
        "robust": report["robust"]["accuracy"],
        "examples": report["examples"],
        "epsilon": report["attacks"][0]["epsilon"],
        "attacks": {attack["name"]: attack["accuracy"] for attack in report["attacks"]},
        "notes": [*report["warnings"], *report["notes"]],
        "lipschitz": lipschitz["mean"],
        "zeros": zeros["sparsity"],
        "kernels": kernels(conditions, set(stages["prune"].masks)),
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


if __name__ == "__main__":
    _plan = Plan.read(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]))
    _table, _fresh, _scratch = map(pathlib.Path, sys.argv[3:6])
    work(_plan, Store(_table, _fresh), _scratch, sys.argv[6])
