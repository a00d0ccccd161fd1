"""Processes that get SIGKILL or SIGTERM at random moments."""

from __future__ import annotations

import collections
import os
import pathlib
import shutil
import signal
import tempfile
from collections.abc import Iterator

import numpy as np

from benchmarks.faults import runs
from benchmarks.faults.outcome import Outcome
from tscnc_tf.experiments import folders

KILLS, TERMS = 50, 15
FEW = 4
IN_A_RUN = 4  # signals to the processes of one experiment


def scenarios(smoke: bool) -> Iterator[Outcome]:
    """Yield the outcomes of experiments that get SIGKILL or SIGTERM again and again."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        whole = folder / "whole"
        runs.process(runs.recipe(smoke), whole).join()
        for number, count in ((signal.SIGKILL, KILLS), (signal.SIGTERM, TERMS)):
            yield _signalled(number, FEW if smoke else count, folder, whole, smoke)


def seconds_of_stages(whole: pathlib.Path) -> dict[str, float]:
    """Return how long each stage of an experiment took, by the times of its files."""
    ends = [whole / "recipe.json", *(whole / stage / folders.MANIFEST for stage in runs.ALL_STAGES)]
    return dict(zip(runs.ALL_STAGES, np.diff([end.stat().st_mtime for end in ends]), strict=True))


def stage_of(run: pathlib.Path) -> str:
    """Return the stage in which an experiment was stopped: the first without a manifest."""
    for stage in runs.ALL_STAGES:
        if not folders.is_complete(run / stage):
            return stage
    return runs.ALL_STAGES[-1]  # in its last lines


def goals(count: int, rng: np.random.Generator) -> list[list[str]]:
    """Return the stages in which the processes of each experiment get a signal, in their order.

    All stages get the same number of signals, up to one. An experiment may get several in a stage.
    """
    stages = np.resize(rng.permutation(runs.ALL_STAGES), count)
    shuffled = rng.permutation(stages).tolist()
    return [sorted(shuffled[begin : begin + IN_A_RUN]) for begin in range(0, count, IN_A_RUN)]


def _signalled(
    number: signal.Signals, count: int, folder: pathlib.Path, whole: pathlib.Path, smoke: bool
) -> Outcome:
    """Send a signal `count` times; run each experiment again until it has ended."""
    outcome = Outcome(f"{number.name} at {count} random moments of all stages")
    rng = np.random.default_rng(number)
    seconds = seconds_of_stages(whole)
    within = 0
    hit: collections.Counter[str] = collections.Counter()
    pending = goals(count, rng)
    while pending:
        run = folder / f"{number.name}-{len(pending)}"
        moments: list[str] = []
        missed: list[str] = []
        for goal in pending.pop():
            process = runs.process(runs.recipe(smoke), run)
            runs.wait_for((run / goal).is_dir, process)
            process.join(rng.uniform(0.0, seconds[goal]))
            if process.is_alive():
                os.kill(process.pid, number)
                process.join()
            if process.exitcode == 0:  # it had already ended
                missed.append(goal)
                continue
            stage = stage_of(run)
            hit[stage] += 1
            where = sorted(path.name for path in run.glob("*/state-*"))
            moments.append(" ".join((stage, *where)))
            within += any(name.count("-") > 1 for name in where)  # state-EPOCH-STEP
            if process.exitcode != -number:
                outcome.lose(f"{number.name} was followed by exit {process.exitcode}")
        if missed:
            pending.append(missed)
        wrong = runs.problem_of_end(runs.recipe(smoke), run, whole)
        if wrong:
            outcome.lose(f"after {', '.join(moments)}: {wrong}")
        for moment in moments if not wrong else ():
            outcome.count(f"in {moment.partition(' ')[0]}: same end, bit for bit")
        shutil.rmtree(run, ignore_errors=True)
    for stage in runs.ALL_STAGES:
        if not hit[stage]:
            outcome.lose(f"no process got {number.name} in {stage}")
    if number == signal.SIGTERM:
        if within:
            outcome.count(f"state written within an epoch, {within} times")
        else:
            outcome.lose("no state was written within an epoch")
    return outcome
