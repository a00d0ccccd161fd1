"""Locks of folders, for one process at a time.

They are locks of the operating system (flock, on Windows LockFile), which end with the process. So
a leftover file `.lock` locks nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
import platform
from collections.abc import Iterator

from tscnc_tf import _extras, _files

LOCK, HOLDER = ".lock", ".lock.json"


@contextlib.contextmanager
def exclusive(folder: pathlib.Path) -> Iterator[None]:
    """Lock a folder during the block; create it if it is missing.

    Folders inside of it are not locked.

    Args:
        folder: of an experiment, or any other that only one process may write to.

    Raises:
        ImportError: filelock is not installed.
        RuntimeError: another process, or another thread of this one, holds the lock; the message
            gives the process, the host and the time.
    """
    library = _extras.require_extra("filelock", "experiments")
    folder.mkdir(parents=True, exist_ok=True)
    lock = library.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except library.Timeout:
        raise RuntimeError(
            f"folder {folder} is in use by {_holder(folder)}: two runs would overwrite each "
            "other's files. Wait until that one has ended, end it, or choose another folder."
        ) from None
    try:
        _files.write_text(folder / HOLDER, json.dumps(_this_process()) + "\n")
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the paths of the files of a folder's lock."""
    return [folder / LOCK, folder / HOLDER]


def _this_process() -> dict[str, object]:
    now = datetime.datetime.now(datetime.UTC)
    return {"pid": os.getpid(), "host": platform.node(), "since": f"{now:%Y-%m-%d %H:%M:%S} UTC"}


def _holder(folder: pathlib.Path) -> str:
    try:
        known = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return f"process {known['pid']} on {known['host']} since {known['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is being written or removed
        return "another process"
