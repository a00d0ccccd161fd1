"""Processes that get SIGKILL or SIGTERM at random moments."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator

import numpy as np

from benchmarks.faults import runs
from benchmarks.faults.outcome import Outcome

KILLS, TERMS = 50, 15
FEW = 2
START = 3.0  # seconds before the first step of training


def scenarios(smoke: bool) -> Iterator[Outcome]:
    """Yield the outcomes of experiments that get SIGKILL or SIGTERM again and again."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        whole = folder / "whole"
        begin = time.monotonic()
        runs.process(runs.recipe(smoke), whole).join()
        seconds = time.monotonic() - begin
        for number, count in ((signal.SIGKILL, KILLS), (signal.SIGTERM, TERMS)):
            yield _signalled(number, FEW if smoke else count, folder, whole, seconds, smoke)


def _signalled(
    number: signal.Signals,
    count: int,
    folder: pathlib.Path,
    whole: pathlib.Path,
    seconds: float,
    smoke: bool,
) -> Outcome:
    """Send a signal `count` times; run each experiment again until it has ended."""
    outcome = Outcome(f"{number.name} at {count} random moments of all stages")
    within = 0
    rng = np.random.default_rng(number)
    sent = began = 0
    while sent < count:
        began += 1
        run = folder / f"{number.name}-{began}"
        moments: list[str] = []
        while True:
            process = runs.process(runs.recipe(smoke), run)
            if sent < count:
                process.join(rng.uniform(START, max(seconds, 2 * START)))
            else:
                process.join()
            if not process.is_alive():
                break
            os.kill(process.pid, number)
            process.join()
            if process.exitcode == 0:  # it had already ended
                break
            sent += 1
            where = sorted(str(path.relative_to(run)) for path in run.glob("*/state-*"))
            complete = len(list(run.glob("*/manifest.json")))
            moments.append(where[0] if where else f"{complete} stages")
            within += bool(where) and where[0].count("-") > 2  # N-STAGE/state-EPOCH-STEP
            if process.exitcode != -number:
                outcome.lose(f"{number.name} was followed by exit {process.exitcode}")
        if process.exitcode:
            outcome.lose(f"after {', '.join(moments)}: {runs.error_of(run)[:300]}")
        elif wrong := runs.differences(run, whole):
            outcome.lose(f"after {', '.join(moments)}: {wrong}")
        else:
            for _ in moments:
                outcome.count("same end, bit for bit")
        shutil.rmtree(run, ignore_errors=True)
    if number == signal.SIGTERM:
        if within:
            outcome.count(f"state written within an epoch, {within} times")
        else:
            outcome.lose("no state was written within an epoch")
    return outcome
