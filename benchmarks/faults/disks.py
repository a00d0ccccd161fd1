"""Full disks, folders that are removed or read-only, and wrong clocks."""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator

from benchmarks.faults import runs
from benchmarks.faults.outcome import Outcome
from tscnc_tf.experiments import locks, stages

SIZES = (100, 1_000, 5_000, 20_000, 50_000, 100_000, 200_000)  # of a file, in bytes
DISKS = (16, 100, 200, 400, 800, 1_600)  # of a file system, in kiB
NOBODY = 65534
HOUR, YEAR = 3600.0, 365.25 * 86400.0
ORDERS = {"reversed": -HOUR, "in-order": HOUR}  # difference in time from one file to the next
_WAIT = 300.0  # timeout in seconds


def scenarios(smoke: bool) -> Iterator[Outcome]:
    """Yield the outcomes of experiments under these faults."""
    recipe = runs.recipe(True)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        folder.chmod(0o755)
        whole = folder / "whole"
        runs.process(recipe, whole).join()
        yield _limited(folder, whole, SIZES[2:4] if smoke else SIZES)
        if _can_mount(folder / "full"):
            yield _full(folder / "full", whole, DISKS[1:2] if smoke else DISKS)
        yield _closed(folder)
        yield _removed(folder, runs.STAGES[:1] if smoke else runs.STAGES)
        yield _shared(folder, whole)
        yield _clocks(folder, whole, tuple(ORDERS)[: 1 if smoke else None])


def limit_files(size: int) -> None:
    """Limit the size of the files that this process writes, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def become_nobody() -> None:
    """Give up root's rights, if this process has them."""
    if os.getuid() == 0:
        stages.dry_run(runs.recipe(True), stages.dataset(runs.recipe(True)))  # imports all modules
        os.setuid(NOBODY)


def set_clock(start: float, step: float = 0.0) -> None:
    """Replace the clock that Python code in this process reads.

    Locks of folders write down its time, as do writers of archives (`.keras`, `.npz`). The package
    makes no decision by it; pauses and timings use the monotonic clock.

    Args:
        start: the time now, in seconds since 1970.
        step: seconds that are added each time the clock is read; negative to go backwards.
    """
    begin, looks = time.monotonic(), itertools.count()

    def now() -> float:
        return start + time.monotonic() - begin + step * next(looks)

    class Moved(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return cls.fromtimestamp(now(), tz)

    time.time, time.time_ns = now, lambda: round(1e9 * now())
    datetime.datetime = Moved  # type: ignore[misc]


def date_files(folder: pathlib.Path, first: float, step: float) -> None:
    """Set the times of all files in a folder, in the order in which they were written."""
    there = sorted(folder.rglob("*"), key=lambda path: path.stat().st_mtime)
    for index, path in enumerate(there):
        os.utime(path, (first + step * index,) * 2)


def _limited(folder: pathlib.Path, whole: pathlib.Path, sizes: tuple[int, ...]) -> Outcome:
    outcome = Outcome("files that can't grow above a size; then run again")
    run = folder / "limited"
    for size in sizes:
        process = runs.process(runs.recipe(True), run, functools.partial(limit_files, size))
        process.join()
        error = runs.error_of(run)
        if process.exitcode == 0:
            outcome.count("nothing was larger")
        elif error.startswith("OSError") and str(run) in error.partition("\n")[0]:
            outcome.count("the file is named")
        else:
            outcome.lose(f"{size} bytes: {error[:300]}")
    runs.finish(outcome, run, whole)
    return outcome


def _full(run: pathlib.Path, whole: pathlib.Path, sizes: tuple[int, ...]) -> Outcome:
    """Run an experiment on a file system that becomes full, which grows from run to run."""
    outcome = Outcome("a file system that is full; then run again with more room")
    try:
        for size in sizes:
            _mount(run, size, again=size != sizes[0])
            process = runs.process(runs.recipe(True), run)
            process.join()
            error = runs.error_of(run).partition("\n")[0]
            if process.exitcode == 0:
                outcome.count("there was room enough")
            elif error.startswith("OSError") and "No space left" in error and str(run) in error:
                outcome.count("the file is named")
            else:
                outcome.lose(f"{size} kiB: exit {process.exitcode}, {error[:300]}")
        _mount(run, 100 * sizes[-1], again=True)
        runs.finish(outcome, run, whole)
    finally:
        subprocess.run(["umount", run], check=True)
    return outcome


def _can_mount(folder: pathlib.Path) -> bool:
    """Return whether this process may mount file systems."""
    try:
        _mount(folder, 16)
    except (OSError, subprocess.CalledProcessError):
        return False
    subprocess.run(["umount", folder], check=True)
    return True


def _mount(folder: pathlib.Path, kib: int, *, again: bool = False) -> None:
    """Mount a file system in memory of a size, or change its size."""
    folder.mkdir(exist_ok=True)
    options = f"{'remount,' if again else ''}size={kib}k"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def _closed(folder: pathlib.Path) -> Outcome:
    outcome = Outcome("a folder that can't be written to")
    closed = folder / "closed"
    closed.mkdir(mode=0o555)
    process = runs.process(runs.recipe(True), closed / "run", become_nobody)
    process.join()
    error = runs.error_of(closed / "run")
    if error.startswith("PermissionError") and str(closed / "run") in error.partition("\n")[0]:
        outcome.count("the folder is named")
    else:
        outcome.lose(f"exit {process.exitcode}, {error[:300]}")
    return outcome


def _removed(folder: pathlib.Path, names: tuple[str, ...]) -> Outcome:
    outcome = Outcome("the folder removed while the experiment runs")
    for stage in names:
        run = folder / f"removed-{stage}"
        process = runs.process(runs.recipe(True), run)
        _wait_for(lambda run=run, stage=stage: any((run / stage).glob("state-*")), process)
        shutil.rmtree(run, ignore_errors=True)
        process.join()
        error = runs.error_of(run)
        if process.exitcode and str(run) in error:
            outcome.count("the file is named")
        else:
            outcome.lose(f"in {stage}: exit {process.exitcode}, {error[:300]}")
    return outcome


def _shared(folder: pathlib.Path, whole: pathlib.Path) -> Outcome:
    outcome = Outcome("a second process in the same folder")
    run = folder / "shared"
    first = runs.process(runs.recipe(True), run)
    _wait_for(lambda: (run / ".lock").exists(), first)
    second = runs.process(runs.recipe(True), run)
    second.join()
    error = runs.error_of(run)
    if second.exitcode and error.startswith("RuntimeError") and f"process {first.pid}" in error:
        outcome.count("the other process is named")
    else:
        outcome.lose(f"exit {second.exitcode}, {error[:300]}")
    first.join()
    runs.finish(outcome, run, whole)
    return outcome


def _clocks(folder: pathlib.Path, whole: pathlib.Path, orders: tuple[str, ...]) -> Outcome:
    """Run an experiment in 1970, then with a clock that goes backwards until it is killed.

    Then set the times of its files to the future, leave a lock from the future, and finish it.
    """
    outcome = Outcome("clocks that go backwards or are decades off, files from the future")
    for order in orders:
        run, now = folder / order, time.time()
        process = runs.process(runs.recipe(True), run, functools.partial(set_clock, 0.0))
        process.join()
        error = runs.error_of(run)
        if process.exitcode and "timestamps before 1980" in error.partition("\n")[0]:
            outcome.count("an archive is refused before 1980, which is said")
        else:
            outcome.lose(f"in 1970: exit {process.exitcode}, {error[:300]}")
        process = runs.process(runs.recipe(True), run, functools.partial(set_clock, now, -HOUR))
        _wait_for(lambda run=run: any((run / runs.STAGES[1]).glob("state-*")), process)
        process.kill()
        process.join()
        left = {"pid": process.pid, "host": "elsewhere", "since": "2100-01-01 00:00:00 UTC"}
        (run / locks.HOLDER).write_text(json.dumps(left))
        date_files(run, now + 50 * YEAR, ORDERS[order])
        runs.finish(outcome, run, whole, functools.partial(set_clock, now - 20 * YEAR, -HOUR))
    return outcome


def _wait_for(condition: Callable[[], bool], process: object) -> None:
    deadline = time.monotonic() + _WAIT
    while not condition() and process.is_alive():  # type: ignore[attr-defined]
        if time.monotonic() > deadline:
            raise TimeoutError("a process has not begun to work")
        time.sleep(0.01)
