"""Choosing the factors of the constraints: on the validation set, with a seed of its own."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from benchmarks.study import work
from benchmarks.study.plan import Plan, Run
from tscnc_tf import _files, experiments

SEED = 1000  # none that the study itself uses


def choose(plan: Plan, path: pathlib.Path, scratch: pathlib.Path) -> str:
    """Try every value of the plan's choices, note its validation accuracy, return a table.

    What is compared is the accuracy under PGD on the validation set after fine-tuning, at the
    highest sparsity. A trial that has been noted is not run again.

    Args:
        plan: the study.
        path: of the JSON file that holds the trials.
        scratch: the folder for the experiments.
    """
    trials: dict[str, Any] = {}
    if path.is_file():
        trials = json.loads(path.read_text(encoding="utf-8"))
    for setting in plan.settings:
        for arm, choice in plan.choices.items():
            for value in choice["values"]:
                changes = {choice["name"]: value}
                runs = plan.runs_of(setting, arm, SEED, changes)
                for run in runs:
                    key = f"{setting}/{arm}/{run.method}/{choice['name']}={value}"
                    if run.sparsity == max(plan.sparsities) and key not in trials:
                        trials[key] = _try(run, scratch / f"{arm}-{value}")
                        text = json.dumps(trials, indent=1)
                        _files.write_text(path, f"{text}\n")
    lines = [f"{key:60} {100 * value:5.1f} %" for key, value in sorted(trials.items())]
    return "\n".join(lines)


def _try(run: Run, scratch: pathlib.Path) -> float:
    folder = scratch / run.setting / run.name
    experiments.run(run.recipe, folder, progress=False)
    return work.summary(run, folder)["validation"]["finetune"]["robust"]
