"""Atomic writing of files and folders: under a hidden name beside the goal, then renamed.

A process that is killed on the way leaves its draft, `.<name>.<8 hex digits>`, beside the goal, and
the goal itself as it was. What is renamed has reached the disk before, so that holds for a power
cut as well. If the disk is full, the error names the goal.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import pathlib
import secrets
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class Replacement(NamedTuple):
    """What may be replaced, in functions that have an argument `overwrite`.

    Attributes:
        overwrite: the argument.
        require: raises a FileExistsError unless what is at a path is of the kind that is replaced.
    """

    overwrite: bool
    require: Callable[[pathlib.Path], None]


def free_path(
    name: str, path: str | os.PathLike[str], replacement: Replacement | None = None
) -> pathlib.Path:
    """Return `path` as an absolute Path, after making sure that something new can be put there.

    Args:
        name: what the caller calls the path, for the error messages.
        path: a path, `~` allowed. Folders on the way to it need not exist.
        replacement: what may be replaced; nothing, if it is None. If `path` is a link, what it
            leads to is replaced, and returned.

    Raises:
        TypeError: `path` is no path.
        FileExistsError: there is something at `path`, be it a link that leads nowhere, that may not
            be replaced.
        NotADirectoryError: one of the folders on the way is a file.
    """
    goal = absolute(name, path)
    if replacement is not None and replacement.overwrite:
        goal = goal.resolve()
    restore(goal)
    if os.path.lexists(goal):
        if replacement is None or not replacement.overwrite:
            offer = "" if replacement is None else "pass overwrite=True, "
            raise FileExistsError(
                f"{name} exists already: {goal}. Nothing is overwritten: {offer}remove it, or "
                "choose another path."
            )
        replacement.require(goal)
    nearest = next(parent for parent in goal.parents if os.path.lexists(parent))
    if not nearest.is_dir():
        raise NotADirectoryError(
            f"{name} must lie in a folder, got {goal}, but {nearest} is a file. "
            "Choose another path."
        )
    return goal


@contextlib.contextmanager
def new_directory(
    name: str, path: str | os.PathLike[str], replacement: Replacement | None = None
) -> Iterator[pathlib.Path]:
    """Yield an empty folder to fill; it becomes `path` when the block ends, and goes if it fails.

    A folder that is replaced is in its place until then. Where the system can, the two change
    places in one step (Linux and macOS, on their usual file systems). Elsewhere the old one is
    given a hidden name first: if the process is killed before the new one is renamed, `restore`
    finds it.

    Args:
        name: what the caller calls the path, for the error messages.
        path: where the folder is to be; missing folders on the way are made.
        replacement: see `free_path`.

    Raises:
        FileExistsError: there is something at `path` that may not be replaced, before or after the
            block.
        TypeError, NotADirectoryError: see `free_path`.
        OSError: the disk is full, or can't be written to; the error names `path`.
    """
    goal = free_path(name, path, replacement)
    goal.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft(goal)
    try:
        with _naming(goal, draft):
            draft.mkdir()
            yield draft
            for folder, _, files in os.walk(draft):
                for file in files:
                    _flush(pathlib.Path(folder, file))
                _flush_folder(pathlib.Path(folder))
            while not _put(draft, free_path(name, goal, replacement)):
                pass  # another process was faster: check again what is there
            _flush_folder(goal.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def new_file(
    name: str, path: str | os.PathLike[str], replacement: Replacement | None = None
) -> Iterator[pathlib.Path]:
    """Yield a path to write a file at; it becomes `path` when the block ends, and goes if it fails.

    A file that is replaced is in its place until then.

    Args:
        name: what the caller calls the path, for the error messages.
        path: where the file is to be; missing folders on the way are made.
        replacement: see `free_path`.

    Raises:
        FileExistsError: there is something at `path` that may not be replaced, before or after the
            block.
        TypeError, NotADirectoryError: see `free_path`.
        OSError: the disk is full, or can't be written to; the error names `path`.
    """
    goal = free_path(name, path, replacement)
    with _written(goal) as draft:
        yield draft
        _flush(draft)
        free_path(name, goal, replacement)
        if replacement is not None and replacement.overwrite:
            draft.replace(goal)
            return
        try:
            os.link(draft, goal)  # which, unlike a renaming, replaces nothing
        except OSError:
            free_path(name, goal)  # another process was faster
            draft.rename(goal)  # there are file systems without links


@contextlib.contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yield a path to write a file at; it replaces `path` at the end, and goes if the block fails.

    A reader sees the old file or the new one, whole. If `path` is a link, the file that it leads to
    is replaced.

    Raises:
        TypeError: `path` is no path.
        OSError: the disk is full, or can't be written to; the error names `path`.
    """
    goal = absolute("path", path).resolve()
    with _written(goal) as draft:
        yield draft
        _flush(draft)
        draft.replace(goal)


def restore(goal: pathlib.Path) -> None:
    """Put back a folder that was to be replaced, if its writer was killed with nothing at `goal`.

    See `new_directory`.
    """
    if not os.path.lexists(goal):
        with contextlib.suppress(OSError):  # there is none, or a writer was faster
            _aside(goal).rename(goal)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file (UTF-8) in one piece, replacing what was there, see `replaced`."""
    with replaced(path) as draft, draft.open("x", encoding="utf-8", newline="\n") as stream:
        stream.write(text)


def absolute(name: str, path: str | os.PathLike[str]) -> pathlib.Path:
    """Return `path` as an absolute Path, `~` being the user's folder.

    Raises:
        TypeError: `path` is no path.
        ValueError: it holds a null character, which no system takes.
    """
    try:
        found = pathlib.Path(path).expanduser().absolute()
    except TypeError:
        raise TypeError(
            f"{name} must be a path, got {path!r} of type {type(path).__name__}."
        ) from None
    if "\0" in str(found):
        raise ValueError(f"{name} must be a path without null characters, got {path!r}.")
    return found


def require_file(name: str, path: str | os.PathLike[str]) -> pathlib.Path:
    """Return `path` as an absolute Path, if there is a file.

    Args:
        name: what the caller calls the path, for the error message.
        path: a path, `~` allowed.

    Raises:
        TypeError, ValueError: see `absolute`.
        FileNotFoundError: there is none.
    """
    file = absolute(name, path)
    if not file.is_file():
        raise FileNotFoundError(f"{name} must be a file with an exported model, got {file}.")
    return file


class TooLargeError(ValueError):
    """A file unpacks to more than there is memory."""


def memory() -> int | None:
    """Return the bytes of memory of this machine, None where it does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def require_memory(path: pathlib.Path, content: zipfile.ZipFile | int) -> None:
    """Raise if a file unpacks to more than the machine's memory. A few kilobytes can be terabytes.

    Args:
        path: of the file.
        content: the archive, of which no more is read than it says; or a number of bytes.

    Raises:
        TooLargeError: it does.
    """
    size = content if isinstance(content, int) else sum(i.file_size for i in content.infolist())
    there = memory()
    if there is not None and size > there:
        raise TooLargeError(
            f"{path} unpacks to {size / 2**30:,.1f} GiB, and this machine has "
            f"{there / 2**30:,.1f} GiB of memory: take a smaller file (of data a part, or smaller "
            "images)."
        )


def require_inside(folder: pathlib.Path, path: pathlib.Path) -> None:
    """Raise a ValueError if a path below a folder leads out of it, as by a symbolic link."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{path} leads to {path.resolve()}, outside of {folder}: what is elsewhere is not "
            "read. Copy it into the folder."
        )


def read_inside(folder: pathlib.Path, path: pathlib.Path) -> str:
    """Return the text of a file below a folder.

    Raises:
        ValueError: it is elsewhere, see `require_inside`.
        OSError: it can't be read.
    """
    require_inside(folder, path)
    return path.read_text(encoding="utf-8")


@contextlib.contextmanager
def _written(goal: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield the draft of a file, which goes when the block ends."""
    goal.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft(goal)
    try:
        with _naming(goal, draft):
            yield draft
            _flush_folder(goal.parent)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(goal: pathlib.Path, draft: pathlib.Path) -> Iterator[None]:
    """Let what the disk refuses be an OSError that names the goal.

    A stream's errors name nothing; those of TensorFlow are of its own kinds (a full disk is a
    "resource exhausted"), and have the draft and the system's words in their text.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError):
            number = error.errno if error.errno in OF_THE_DISK else None
        else:
            words = str(error) if str(draft) in str(error) else ""
            number = next((each for each in OF_THE_DISK if os.strerror(each) in words), None)
        if number is None:
            raise
        named = OSError(number, os.strerror(number), str(goal))
        named.add_note("What was at the path before is as it was. Free some space, and call again.")
        raise named from error


def _put(draft: pathlib.Path, goal: pathlib.Path) -> bool:
    """Give a folder the name `goal`; what was there, a folder as well, has the draft's name then.

    Returns:
        False if it can't be done since another process has put something there, or taken it away.
    """
    if not os.path.lexists(goal):
        return _renamed(draft, goal)
    if _exchange(draft, goal):
        return True
    aside = _aside(goal)
    shutil.rmtree(aside, ignore_errors=True)  # it was left over: there is something at the goal
    try:
        goal.rename(aside)
    except FileNotFoundError:
        return False
    try:
        done = _renamed(draft, goal)
    except OSError:
        restore(goal)
        raise
    if done:
        aside.rename(draft)  # no longer found by `restore`
    return done


def _renamed(draft: pathlib.Path, goal: pathlib.Path) -> bool:
    """Rename a folder, and return True; False if there is something."""
    try:
        draft.rename(goal)
    except OSError:
        if os.path.lexists(goal):
            return False
        raise
    return True


def _exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Let two paths change places in one step, and return True; False where that can't be done."""
    names = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "linux":
            at = -100  # AT_FDCWD; it has no say in absolute paths
            return ctypes.CDLL(None).renameat2(at, names[0], at, names[1], 2) == 0
        if sys.platform == "darwin":
            return ctypes.CDLL(None).renamex_np(*names, 2) == 0
    except AttributeError:  # an older system library
        return False
    return False


def _aside(goal: pathlib.Path) -> pathlib.Path:
    """Return the hidden name of a folder that is being replaced."""
    digest = hashlib.sha256(os.fsencode(goal.name)).hexdigest()
    return goal.with_name(f".{goal.name[:32]}.{digest[:8]}.old")


def _draft(goal: pathlib.Path) -> pathlib.Path:
    """Return a name beside `goal` that no other process uses (shortened: a file name has a limit).

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
