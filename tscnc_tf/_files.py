"""Writing so that nothing is ever half-written: under a hidden name beside the goal, then renamed.

A process that is killed on the way leaves its draft, `.<name>.<8 hex digits>`, beside the goal, and
nothing at the goal itself. What is renamed has reached the disk before, so that holds for a power
cut as well.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator


def free_path(name: str, path: str | os.PathLike[str]) -> pathlib.Path:
    """Return `path` as an absolute Path, after making sure that something new can be put there.

    Args:
        name: what the caller calls the path, for the error messages.
        path: a path, `~` allowed. Folders on the way to it need not exist.

    Raises:
        TypeError: `path` is no path.
        FileExistsError: there is something at `path`, be it a link that leads nowhere.
        NotADirectoryError: one of the folders on the way is a file.
    """
    goal = _absolute(name, path)
    if os.path.lexists(goal):
        raise FileExistsError(
            f"{name} exists already: {goal}. Nothing is overwritten: remove it, or choose another "
            "path."
        )
    nearest = next(parent for parent in goal.parents if os.path.lexists(parent))
    if not nearest.is_dir():
        raise NotADirectoryError(
            f"{name} must lie in a folder, got {goal}, but {nearest} is a file. "
            "Choose another path."
        )
    return goal


@contextlib.contextmanager
def new_directory(name: str, path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yield an empty folder to fill; it becomes `path` when the block ends, and goes if it fails.

    Args:
        name: what the caller calls the path, for the error messages.
        path: where the folder is to be; missing folders on the way are made.

    Raises:
        FileExistsError: there is something at `path`, before or after the block.
        TypeError, NotADirectoryError: see `free_path`.
    """
    goal = free_path(name, path)
    goal.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft(goal)
    draft.mkdir()
    try:
        yield draft
        for folder, _, files in os.walk(draft):
            for file in files:
                _flush(pathlib.Path(folder, file))
            _flush_folder(pathlib.Path(folder))
        free_path(name, goal)
        try:
            draft.rename(goal)
        except OSError:
            free_path(name, goal)  # somebody was faster: say so, rather than "not empty"
            raise
        _flush_folder(goal.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def new_file(name: str, path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yield a path to write a file at; it becomes `path` when the block ends, and goes if it fails.

    Args:
        name: what the caller calls the path, for the error messages.
        path: where the file is to be; missing folders on the way are made.

    Raises:
        FileExistsError: there is something at `path`, before or after the block.
        TypeError, NotADirectoryError: see `free_path`.
    """
    goal = free_path(name, path)
    goal.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft(goal)
    try:
        yield draft
        _flush(draft)
        free_path(name, goal)
        try:
            os.link(draft, goal)  # which, unlike a renaming, replaces nothing
        except OSError:
            free_path(name, goal)  # somebody was faster
            draft.rename(goal)  # there are file systems without links
        _flush_folder(goal.parent)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yield a path to write a file at; it replaces `path` at the end, and goes if the block fails.

    A reader sees the old file or the new one, whole. If `path` is a link, the file that it leads to
    is replaced.
    """
    goal = _absolute("path", path).resolve()
    goal.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft(goal)
    try:
        yield draft
        _flush(draft)
        draft.replace(goal)
        _flush_folder(goal.parent)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file (UTF-8) in one piece, replacing what was there, see `replaced`."""
    with replaced(path) as draft, draft.open("x", encoding="utf-8", newline="\n") as stream:
        stream.write(text)


def _absolute(name: str, path: str | os.PathLike[str]) -> pathlib.Path:
    try:
        return pathlib.Path(path).expanduser().absolute()
    except TypeError:
        raise TypeError(
            f"{name} must be a path, got {path!r} of type {type(path).__name__}."
        ) from None


def _draft(goal: pathlib.Path) -> pathlib.Path:
    """Return a name beside `goal` that nobody else uses (shortened: a file name has a limit).

    Not by `tempfile`: its files are private to the user, while ours shall have the mode that the
    user's umask gives.
    """
    return goal.with_name(f".{goal.name[:32]}.{secrets.token_hex(4)}")


def _flush(file: pathlib.Path) -> None:
    """Wait until a file's content is on the disk."""
    with file.open("rb+" if os.name == "nt" else "rb") as stream:  # Windows flushes its own only
        os.fsync(stream.fileno())


def _flush_folder(folder: pathlib.Path) -> None:
    """Wait until the names in a folder are on the disk, where the system knows how to."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
