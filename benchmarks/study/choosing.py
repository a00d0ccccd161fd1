"""Choosing the factors of the constraints: on the validation set, with a seed of its own."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from benchmarks.study import table, work
from benchmarks.study.plan import Plan, Run
from tscnc_tf import experiments
from tscnc_tf.experiments import locks

SEED = 1000  # none that the study itself uses


def choose(plan: Plan, settings: list[str], path: pathlib.Path, scratch: pathlib.Path) -> None:
    """Try every value of the plan's choices, and note what came of it.

    What is compared is the accuracy under PGD on the validation set after fine-tuning, at the
    highest sparsity and by the first method: the dense network, which the factors act on, is the
    same for all. A trial that has been noted is not run again.

    Args:
        plan: the study.
        settings: in which settings.
        path: the table (CSV) for the trials.
        scratch: the folder for the experiments.

    Raises:
        RuntimeError: another process makes choices in `scratch`.
    """
    scratch = scratch / "choices"
    with locks.exclusive(scratch):
        trials = _trials(path)
        for setting in settings:
            for arm, choice in plan.choices.items():
                for value in choice["values"]:
                    if value not in trials.get((setting, arm), {}):
                        run = _trial(plan, setting, arm, {choice["name"]: value})
                        robust = _try(run, scratch / f"{arm}-{value}")
                        trials.setdefault((setting, arm), {})[value] = robust
                        _write(path, trials)


def best(plan: Plan, path: pathlib.Path) -> dict[str, dict[str, float]]:
    """Return the best value by setting and arm, where all have been tried; of equals the least."""
    trials = _trials(path)
    return {
        setting: {
            arm: max(sorted(scores), key=scores.__getitem__)
            for arm, choice in plan.choices.items()
            if len(scores := trials.get((setting, arm), {})) == len(choice["values"])
        }
        for setting in plan.settings
    }


def _trials(path: pathlib.Path) -> dict[tuple[str, str], dict[float, float]]:
    """Return robust accuracies by setting and arm, then by value."""
    found: dict[tuple[str, str], dict[float, float]] = {}
    for row in table.read(path):
        found.setdefault((row["setting"], row["arm"]), {})[row["value"]] = row["robust"]
    return found


def _write(path: pathlib.Path, trials: Mapping[tuple[str, str], Mapping[float, float]]) -> None:
    table.write(
        path,
        (
            {"setting": setting, "arm": arm, "value": value, "robust": robust}
            for (setting, arm), scores in trials.items()
            for value, robust in scores.items()
        ),
    )


def _trial(plan: Plan, setting: str, arm: str, changes: dict[str, float]) -> Run:
    wanted = (plan.methods[0], max(plan.sparsities))
    runs = plan.runs_of(setting, arm, SEED, changes)
    return next(run for run in runs if (run.method, run.sparsity) == wanted)


def _try(run: Run, scratch: pathlib.Path) -> float:
    folder = scratch / run.setting
    experiments.run(run.recipe, folder, progress=False)
    return work.summary(run, folder)["validation"]["finetune"]["robust"]
