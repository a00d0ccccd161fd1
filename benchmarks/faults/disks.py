"""Full disks, folders that are removed or read-only, and wrong clocks."""

from __future__ import annotations

import datetime
import errno
import functools
import itertools
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.faults import runs
from benchmarks.faults.outcome import Outcome
from tscnc_tf.experiments import folders, locks, stages

SIZES = (200, 1_000, 5_000, 20_000, 50_000, 100_000)  # of a file, in bytes
DISKS = (4, 16, 64, 128, 256)  # what is free in a file system, in kiB
ENOUGH = 100_000  # kiB for an experiment
NOBODY = 65534
HOUR, YEAR = 3600.0, 365.25 * 86400.0
ORDERS = {"reversed": -HOUR, "in-order": HOUR}  # difference in time from one file to the next


def scenarios(smoke: bool) -> Iterator[Outcome]:
    """Yield the outcomes of experiments under these faults."""
    recipe = runs.recipe(True)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        folder.chmod(0o755)
        whole = folder / "whole"
        runs.process(recipe, whole).join()
        yield _limited(folder / "limited", whole, SIZES[1:2] if smoke else SIZES)
        if _can_mount(folder / "full"):
            yield _full(folder / "full", whole, DISKS[:1] if smoke else DISKS)
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


def _limited(run: pathlib.Path, whole: pathlib.Path, sizes: tuple[int, ...]) -> Outcome:
    outcome = Outcome("files that can't grow above a size, in each stage; then without a limit")

    def limit(size: int | None) -> Any:
        return None if size is None else functools.partial(limit_files, size)

    _refuse(outcome, run, whole, sizes, limit)
    return outcome


def _full(run: pathlib.Path, whole: pathlib.Path, free: tuple[int, ...]) -> Outcome:
    outcome = Outcome("a file system that is full, in each stage; then with more room")
    run.mkdir(exist_ok=True)
    _mount(run, ENOUGH)

    def limit(kib: int | None) -> None:
        used = shutil.disk_usage(run).used // 1024
        _mount(run, ENOUGH if kib is None else used + kib, again=True)

    try:
        _refuse(outcome, run, whole, free, limit)
    finally:
        subprocess.run(["umount", run], check=True)
    return outcome


def _refuse(
    outcome: Outcome,
    run: pathlib.Path,
    whole: pathlib.Path,
    amounts: tuple[int, ...],
    limit: Callable[[int | None], Any],
) -> None:
    """Run each stage of an experiment with growing limits, and then without one, to its end.

    Args:
        outcome: gets the files that were refused.
        run: the folder of the experiment.
        whole: that of one that was not disturbed.
        amounts: the limits, from the lowest.
        limit: sets a limit, None for none; returns what the next process calls before it runs.
    """
    for stage, name in folders.STAGE_FOLDERS.items():
        refused = 0
        for amount in (*amounts, None):
            process = runs.process(runs.recipe(True), run, limit(amount), until=stage)
            process.join()
            if process.exitcode == 0:
                break
            error = runs.error_of(run).partition("\n")[0]
            file = re.search(rf"'{run}/([^']+)'", error)
            is_said = any(os.strerror(number) in error for number in (errno.ENOSPC, errno.EFBIG))
            if amount is None or file is None or not (error.startswith("OSError") and is_said):
                outcome.lose(f"{name}, {amount}: exit {process.exitcode}, {error[:300]}")
            else:
                outcome.count(f"{file[1]} is named")
                refused += file[1].startswith(name)
        if not refused:
            outcome.lose(f"no file of {name} was refused")
    runs.finish(outcome, run, whole)


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
        runs.wait_for(lambda run=run, stage=stage: any((run / stage).glob("state-*")), process)
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
    runs.wait_for(lambda: (run / ".lock").exists(), first)
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
        runs.wait_for(lambda run=run: any((run / runs.STAGES[1]).glob("state-*")), process)
        process.kill()
        process.join()
        left = {"pid": process.pid, "host": "elsewhere", "since": "2100-01-01 00:00:00 UTC"}
        (run / locks.HOLDER).write_text(json.dumps(left))
        date_files(run, now + 50 * YEAR, ORDERS[order])
        runs.finish(outcome, run, whole, functools.partial(set_clock, now - 20 * YEAR, -HOUR))
    return outcome
