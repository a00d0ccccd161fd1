"""Atomic writing of files and folders: under a hidden name beside the target, then renamed.

A process that is killed while writing leaves its draft, `.<name>.<8 hex digits>`, beside an
unchanged target. Drafts are flushed to the disk before they are renamed, so this holds for a power
failure as well. If the disk is full, the error names the target.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import pathlib
import re
import secrets
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class Replacement(NamedTuple):
    """The rule for replacing an existing file or folder, in functions with `overwrite=`.

    Attributes:
        overwrite: whether it may be replaced.
        require: raises a FileExistsError unless the object at a path is of the replaceable kind.
    """

    overwrite: bool
    require: Callable[[pathlib.Path], None]


def free_path(
    name: str, path: str | os.PathLike[str], replacement: Replacement | None = None
) -> pathlib.Path:
    """Return `path` as an absolute Path, after checking that it can be written to.

    Args:
        name: the caller's name for the path, for error messages.
        path: a path, `~` allowed. Its parent folders need not exist.
        replacement: the rule for replacing; with None, nothing is replaced. If `path` is a link,
            its target is replaced and returned.

    Raises:
        TypeError: `path` is not a path.
        FileExistsError: `path` exists (a broken link counts) and may not be replaced.
        NotADirectoryError: a parent of `path` is a file.
    """
    target = absolute(name, path)
    if replacement is not None and replacement.overwrite:
        target = target.resolve()
    restore(target)
    if os.path.lexists(target):
        if replacement is None or not replacement.overwrite:
            advice = "" if replacement is None else "pass overwrite=True, "
            raise FileExistsError(
                f"{name} exists already: {target}. Nothing is overwritten: {advice}remove it, or "
                "choose another path."
            )
        replacement.require(target)
    nearest = next(parent for parent in target.parents if os.path.lexists(parent))
    if not nearest.is_dir():
        raise NotADirectoryError(
            f"{name} must lie in a folder, got {target}, but {nearest} is a file. "
            "Choose another path."
        )
    return target


@contextlib.contextmanager
def new_directory(
    name: str, path: str | os.PathLike[str], replacement: Replacement | None = None
) -> Iterator[pathlib.Path]:
    """Yield an empty draft folder, renamed to `path` when the block ends, and removed if it fails.

    A folder that is replaced stays in place until then. Where the system supports it (Linux and
    macOS, on their usual file systems), the two folders are exchanged in one step. Elsewhere the
    old one is first renamed to a hidden name, from which `restore` recovers it if the process is
    killed before the new one is renamed.

    Args:
        name: the caller's name for the path, for error messages.
        path: of the new folder; missing parents are created.
        replacement: see `free_path`.

    Raises:
        FileExistsError: `path` exists before or after the block, and may not be replaced.
        TypeError, NotADirectoryError: see `free_path`.
        OSError: the disk is full or not writable; the error names `path`.
    """
    target = free_path(name, path, replacement)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft(target)
    try:
        with _naming(target, draft):
            draft.mkdir()
            yield draft
            for folder, _, files in os.walk(draft):
                for file in files:
                    _flush(pathlib.Path(folder, file))
                _flush_folder(pathlib.Path(folder))
            while not _put(draft, free_path(name, target, replacement)):
                pass  # another process wrote or removed the target: check it again
            _flush_folder(target.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def new_file(
    name: str, path: str | os.PathLike[str], replacement: Replacement | None = None
) -> Iterator[pathlib.Path]:
    """Yield a draft path; the file is renamed to `path` when the block ends, removed if it fails.

    A file that is replaced stays in place until then.

    Args:
        name: the caller's name for the path, for error messages.
        path: of the new file; missing parents are created.
        replacement: see `free_path`.

    Raises:
        FileExistsError: `path` exists before or after the block, and may not be replaced.
        TypeError, NotADirectoryError: see `free_path`.
        OSError: the disk is full or not writable; the error names `path`.
    """
    target = free_path(name, path, replacement)
    with _written(target) as draft:
        yield draft
        _flush(draft)
        free_path(name, target, replacement)
        if replacement is not None and replacement.overwrite:
            draft.replace(target)
            return
        try:
            os.link(draft, target)  # unlike a rename, a link never replaces a file
        except OSError:
            free_path(name, target)  # raises if another process has created the target
            draft.rename(target)  # some file systems have no hard links


@contextlib.contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yield a draft path; the file replaces `path` when the block ends, and is removed if it fails.

    Readers see the complete old or the complete new file. If `path` is a link, its target is
    replaced.

    Raises:
        TypeError: `path` is not a path.
        OSError: the disk is full or not writable; the error names `path`.
    """
    target = absolute("path", path).resolve()
    with _written(target) as draft:
        yield draft
        _flush(draft)
        draft.replace(target)


def restore(target: pathlib.Path) -> None:
    """Put back the old folder if its writer was killed while replacing it and `target` is missing.

    See `new_directory`.
    """
    if not os.path.lexists(target):
        with contextlib.suppress(OSError):  # nothing to restore, or another process has done it
            _aside(target).rename(target)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file (UTF-8) atomically, replacing an existing one; see `replaced`."""
    with replaced(path) as draft, draft.open("x", encoding="utf-8", newline="\n") as stream:
        stream.write(text)


def absolute(name: str, path: str | os.PathLike[str]) -> pathlib.Path:
    """Return `path` as an absolute Path, with `~` expanded.

    Raises:
        TypeError: `path` is not a path.
        ValueError: it is empty, or contains a null character.
    """
    try:
        found = pathlib.Path(path).expanduser().absolute()
    except TypeError:
        raise TypeError(
            f"{name} must be a path, got {path!r} of type {type(path).__name__}."
        ) from None
    if not os.fspath(path):
        raise ValueError(f"{name} must be a path, got {path!r}.")
    if "\0" in str(found):
        raise ValueError(f"{name} must be a path without null characters, got {path!r}.")
    return found


def require_file(name: str, path: str | os.PathLike[str]) -> pathlib.Path:
    """Return `path` as an absolute Path, after checking that it is a file.

    Args:
        name: the caller's name for the path, for error messages.
        path: a path, `~` allowed.

    Raises:
        TypeError, ValueError: see `absolute`.
        FileNotFoundError: there is no such file.
    """
    file = absolute(name, path)
    if not file.is_file():
        raise FileNotFoundError(f"{name} must be a file with an exported model, got {file}.")
    return file


class TooLargeError(ValueError):
    """A file unpacks to more than the machine's memory."""


def memory() -> int | None:
    """Return the physical memory of this machine in bytes; None if it is not known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def require_memory(path: pathlib.Path, content: zipfile.ZipFile | int) -> None:
    """Raise if a file unpacks to more than the machine's memory (kilobytes can become terabytes).

    Args:
        path: of the file.
        content: the archive, of which only the directory is read; or the unpacked size in bytes.

    Raises:
        TooLargeError: it does.
    """
    size = content if isinstance(content, int) else sum(i.file_size for i in content.infolist())
    available = memory()
    if available is not None and size > available:
        raise TooLargeError(
            f"{path} unpacks to {size / 2**30:,.1f} GiB, and this machine has "
            f"{available / 2**30:,.1f} GiB of memory: take a smaller file (a part of the data, or "
            "smaller images)."
        )


def require_inside(folder: pathlib.Path, path: pathlib.Path) -> None:
    """Raise a ValueError if a path below a folder resolves to outside of it, as by a link."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{path} leads to {path.resolve()}, outside of {folder}: files elsewhere are not "
            "read. Copy it into the folder."
        )


def read_inside(folder: pathlib.Path, path: pathlib.Path) -> str:
    """Return the text of a file below a folder.

    Raises:
        ValueError: it resolves to outside of the folder, see `require_inside`.
        OSError: it can't be read.
    """
    require_inside(folder, path)
    return path.read_text(encoding="utf-8")


@contextlib.contextmanager
def _written(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield the path of a draft beside `target`; a draft that is left is removed at the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft(target)
    try:
        with _naming(target, draft):
            yield draft
            _flush_folder(target.parent)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(target: pathlib.Path, draft: pathlib.Path) -> Iterator[None]:
    """Re-raise disk errors as an OSError that names the target path.

    Errors of a stream name no path. TensorFlow raises its own types (a full disk is a
    ResourceExhaustedError), whose text holds the draft's path and the system's error message.
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
        named = OSError(number, os.strerror(number), str(target))
        named.add_note("The previous content of the path is unchanged. Free some space, and retry.")
        raise named from error


def _put(draft: pathlib.Path, target: pathlib.Path) -> bool:
    """Rename the folder `draft` to `target`; a folder that was at `target` gets the draft's name.

    Returns:
        False if another process has created or removed `target` in the meantime.
    """
    if not os.path.lexists(target):
        return _renamed(draft, target)
    if _exchange(draft, target):
        return True
    aside = _aside(target)
    shutil.rmtree(aside, ignore_errors=True)  # a leftover, since the target exists
    try:
        target.rename(aside)
    except FileNotFoundError:
        return False
    try:
        done = _renamed(draft, target)
    except OSError:
        restore(target)
        raise
    if done:
        aside.rename(draft)  # no longer found by `restore`
    return done


def _renamed(draft: pathlib.Path, target: pathlib.Path) -> bool:
    """Rename a folder and return True; return False if `target` exists."""
    try:
        draft.rename(target)
    except OSError:
        if os.path.lexists(target):
            return False
        raise
    return True


def _exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Exchange two paths in one step and return True; return False where it is not supported."""
    names = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "linux":
            at = -100  # AT_FDCWD; ignored for absolute paths
            return ctypes.CDLL(None).renameat2(at, names[0], at, names[1], 2) == 0
        if sys.platform == "darwin":
            return ctypes.CDLL(None).renamex_np(*names, 2) == 0
    except AttributeError:  # an older system library
        return False
    return False


def _aside(target: pathlib.Path) -> pathlib.Path:
    """Return the hidden name of a folder that is being replaced."""
    digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()
    return target.with_name(f".{target.name[:32]}.{digest[:8]}.old")


# The name of a draft of `_draft`, with that of its target; Keras demands its own ending.
DRAFT = re.compile(r"\.(.+)\.[0-9a-f]{8}(\.keras)?")


def _draft(target: pathlib.Path) -> pathlib.Path:
    """Return a random name beside `target`, shortened to stay below the limit of file names.

    `tempfile` is not used: its files have mode 0600, where these follow the user's umask.
    """
    return target.with_name(f".{target.name[:32]}.{secrets.token_hex(4)}")


def _flush(file: pathlib.Path) -> None:
    """Wait until a file's content is on the disk."""
    # Windows flushes a file only through a handle that can write.
    with file.open("rb+" if os.name == "nt" else "rb") as stream:
        os.fsync(stream.fileno())


def _flush_folder(folder: pathlib.Path) -> None:
    """Wait until the entries of a folder are on the disk, where the system supports that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
