"""Choosing the factors of the constraints: on the validation set, with a seed of its own."""

from __future__ import annotations

import json
import pathlib

from benchmarks.study import work
from benchmarks.study.plan import Plan, Run
from tscnc_tf import _files, experiments
from tscnc_tf.experiments import locks

SEED = 1000  # none that the study itself uses


def choose(plan: Plan, settings: list[str], results: pathlib.Path, scratch: pathlib.Path) -> None:
    """Try every value of the plan's choices, and note what came of it.

    What is compared is the accuracy under PGD on the validation set after fine-tuning, at the
    highest sparsity and by the first method: the dense network, which the factors act on, is the
    same for all. A trial that has been noted is not run again.

    Args:
        plan: the study.
        settings: in which settings.
        results: the folder for the trials, a file each setting.
        scratch: the folder for the experiments.

    Raises:
        RuntimeError: another process notes trials in `results`.
    """
    with locks.exclusive(results):
        for setting in settings:
            _choose(plan, setting, results / f"{setting}.json", scratch / "choices")


def _choose(plan: Plan, setting: str, path: pathlib.Path, scratch: pathlib.Path) -> None:
    trials = _trials(path)
    for arm, choice in plan.choices.items():
        for value in choice["values"]:
            if str(value) not in trials.setdefault(arm, {}):
                run = _trial(plan, setting, arm, {choice["name"]: value})
                trials[arm][str(value)] = _try(run, scratch / f"{arm}-{value}")
                _files.write_text(path, f"{json.dumps(trials, indent=1)}\n")


def _trials(path: pathlib.Path) -> dict[str, dict[str, float]]:
    return work.read_result(path) if path.is_file() else {}


def best(plan: Plan, results: pathlib.Path) -> dict[str, dict[str, float]]:
    """Return the best value by setting and arm, where all have been tried; of equals the least."""
    found: dict[str, dict[str, float]] = {}
    for setting in plan.settings:
        trials = _trials(results / f"{setting}.json")
        found[setting] = {
            arm: float(max(sorted(scores, key=float), key=scores.__getitem__))
            for arm, scores in trials.items()
            if len(scores) == len(plan.choices[arm]["values"])
        }
    return found


def _trial(plan: Plan, setting: str, arm: str, changes: dict[str, float]) -> Run:
    wanted = (plan.methods[0], max(plan.sparsities))
    runs = plan.runs_of(setting, arm, SEED, changes)
    return next(run for run in runs if (run.method, run.sparsity) == wanted)


def _try(run: Run, scratch: pathlib.Path) -> float:
    folder = scratch / run.setting
    experiments.run(run.recipe, folder, progress=False)
    return work.summary(run, folder)["validation"]["finetune"]["robust"]
