"""What is written is whole or not there."""

from __future__ import annotations

import errno
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from helpers import names

from tscnc_tf import _files


def test_a_new_directory_appears_when_the_block_ends(tmp_path):
    goal = tmp_path / "deep" / "er" / "goal"
    with _files.new_directory("path", goal) as draft:
        assert draft.parent == goal.parent
        (draft / "folder").mkdir()
        (draft / "folder" / "file").write_bytes(b"content")
        assert not goal.exists()
    assert (goal / "folder" / "file").read_bytes() == b"content"
    assert names(goal.parent) == ["goal"]


def test_a_block_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), _files.new_directory("path", tmp_path / "goal") as draft:
        (draft / "file").write_bytes(b"content")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "folder", "full folder", "dangling link"])
def test_what_exists_is_not_touched(tmp_path, kind):
    goal = tmp_path / "goal"
    if kind == "file":
        goal.write_bytes(b"old")
    elif kind == "dangling link":
        goal.symlink_to(tmp_path / "nowhere")
    else:
        goal.mkdir()
        if kind == "full folder":
            (goal / "file").write_bytes(b"old")
    entered = False
    with (
        pytest.raises(FileExistsError, match=r"report exists already: .*goal.*remove it"),
        _files.new_directory("report", goal),
    ):
        entered = True
    assert not entered
    assert names(tmp_path) == ["goal"]
    if kind == "file":
        assert goal.read_bytes() == b"old"
    if kind == "full folder":
        assert (goal / "file").read_bytes() == b"old"


@pytest.mark.parametrize("late", [False, True], ids=["before the check", "after the check"])
def test_a_rival_that_was_faster_wins(tmp_path, monkeypatch, late):
    goal = tmp_path / "goal"

    def rival():
        goal.mkdir()
        (goal / "file").write_bytes(b"rival")

    if late:  # between our last look and the renaming
        rename = pathlib.Path.rename
        monkeypatch.setattr(pathlib.Path, "rename", lambda *args: (rival(), rename(*args)))
    with (
        pytest.raises(FileExistsError, match="path exists already"),
        _files.new_directory("path", goal) as draft,
    ):
        (draft / "file").write_bytes(b"mine")
        if not late:
            rival()
    assert (goal / "file").read_bytes() == b"rival"
    assert names(tmp_path) == ["goal"]


KILLED = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
if sys.argv[3] == "folder":
    with files.new_directory("path", sys.argv[2]) as draft:
        (draft / "file").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
files._flush = lambda draft: os.kill(os.getpid(), signal.SIGKILL)
files.write_text(sys.argv[2], "half")
"""


@pytest.mark.parametrize("kind", ["folder", "text"])
def test_a_killed_process_leaves_nothing_at_the_path(tmp_path, kind):
    goal = tmp_path / "goal"
    command = [sys.executable, "-c", KILLED, _files.__file__, str(goal), kind]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not goal.exists()
    (draft,) = names(tmp_path)
    assert draft.startswith(".goal.")
    # and the draft is in nobody's way
    if kind == "folder":
        with _files.new_directory("path", goal):
            pass
    else:
        _files.write_text(goal, "whole")
    assert goal.exists()


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with _files.new_directory("path", tmp_path / "folder"):
            pass
        _files.write_text(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_name_of_any_length_that_the_system_takes(tmp_path):
    with _files.new_directory("path", tmp_path / ("n" * 255)):
        pass
    assert names(tmp_path) == ["n" * 255]


def test_an_empty_path_is_refused():
    # It would be the working folder.
    with pytest.raises(ValueError, match="folder must be a path, got ''"):
        _files.absolute("folder", "")


def test_free_path_is_absolute_and_expands_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _files.free_path("path", "goal") == tmp_path / "goal"
    assert _files.free_path("path", "~/goal") == tmp_path / "goal"


@pytest.mark.parametrize("path", [None, 3, b"bytes"])
def test_free_path_requires_a_path(path):
    with pytest.raises(TypeError, match=r"report must be a path, got .*"):
        _files.free_path("report", path)


def test_free_path_below_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(NotADirectoryError, match=r"file is a file. Choose another path"):
        _files.free_path("path", tmp_path / "file" / "deep" / "goal")


def test_text_is_replaced_in_one_piece(tmp_path, monkeypatch):
    goal = tmp_path / "folder" / "goal"
    _files.write_text(goal, "alt: σ\n")
    _files.write_text(goal, "neu: κ\n")
    assert goal.read_bytes() == "neu: κ\n".encode()

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr(pathlib.Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        _files.write_text(goal, "newer")
    assert goal.read_bytes() == "neu: κ\n".encode()
    assert names(goal.parent) == ["goal"]


def test_text_that_cannot_be_encoded_leaves_nothing(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        _files.write_text(tmp_path / "goal", "\udcff")
    assert names(tmp_path) == []


def test_text_through_a_link_reaches_its_file(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    _files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"


# Replacing


def anything(path):
    """Let all be replaced."""


REPLACE = _files.Replacement(True, anything)


def fill(folder, content):
    (folder / "inner").mkdir(parents=True)
    (folder / "file").write_text(content)
    (folder / "inner" / "file").write_text(content)


def content(path):
    """What a file or a whole folder holds."""
    if path.is_file():
        return path.read_text()
    one, other = (path / "file").read_text(), (path / "inner" / "file").read_text()
    assert one == other, "half of the one, half of the other"
    return one


def put(kind, goal, text, replacement=REPLACE):
    if kind == "folder":
        with _files.new_directory("path", goal, replacement) as draft:
            draft.rmdir()
            fill(draft, text)
    else:
        with _files.new_file("path", goal, replacement) as draft:
            draft.write_text(text)


every_kind = pytest.mark.parametrize("kind", ["file", "folder"])


@pytest.fixture
def exchange(request, monkeypatch):
    """Whether the file system can let two folders change places."""
    if not request.param:
        monkeypatch.setattr(_files, "_exchange", lambda *paths: False)
    return request.param


@every_kind
@pytest.mark.parametrize("exchange", [True, False], indirect=True)
def test_what_is_there_is_replaced_if_it_may_be(tmp_path, kind, exchange):
    goal = tmp_path / "goal"
    put(kind, goal, "first")
    put(kind, goal, "second")
    assert content(goal) == "second" and names(tmp_path) == ["goal"]
    put(kind, tmp_path / "other", "new", REPLACE)
    with pytest.raises(FileExistsError, match="pass overwrite=True, remove it, or choose another"):
        put(kind, goal, "third", _files.Replacement(False, anything))

    def refuse(path):
        raise FileExistsError(f"not {path.name}")

    with pytest.raises(FileExistsError, match="not goal"):
        put(kind, goal, "third", _files.Replacement(True, refuse))
    assert content(goal) == "second" and names(tmp_path) == ["goal", "other"]


@every_kind
def test_of_a_link_what_it_leads_to_is_replaced(tmp_path, kind):
    put(kind, tmp_path / "deep" / "goal", "first")
    (tmp_path / "link").symlink_to("deep/goal")
    put(kind, tmp_path / "link", "second")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "deep" / "goal") == "second"
    assert names(tmp_path / "deep") == ["goal"]


@every_kind
@pytest.mark.parametrize("exchange", [True, False], indirect=True)
@pytest.mark.parametrize("early", [True, False])
def test_of_two_that_replace_the_last_one_wins(tmp_path, monkeypatch, kind, exchange, early):
    goal = tmp_path / "goal"
    if early:
        put(kind, goal, "first")
    flush = _files._flush

    def rival(path):
        monkeypatch.setattr(_files, "_flush", flush)
        put(kind, goal, "rival")
        flush(path)

    monkeypatch.setattr(_files, "_flush", rival)
    put(kind, goal, "mine")
    assert content(goal) == "mine" and names(tmp_path) == ["goal"]


@pytest.mark.parametrize("moment", [1, 2])
def test_a_rival_at_the_last_moment_is_replaced_as_well(tmp_path, monkeypatch, moment):
    """Where folders can't change places, somebody may put one there between two renamings."""
    monkeypatch.setattr(_files, "_exchange", lambda *paths: False)
    goal, calls, rename = tmp_path / "goal", [], pathlib.Path.rename
    put("folder", goal, "first")

    def slow(path, target):
        calls.append(path)
        if len(calls) == moment:  # 1: the old one goes; 2: the new one comes
            monkeypatch.setattr(pathlib.Path, "rename", rename)
            put("folder", goal, "rival")
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", slow)
    put("folder", goal, "mine")
    assert content(goal) == "mine" and names(tmp_path) == ["goal"]


STEPS = """
import importlib.util, os, pathlib, signal, shutil, sys
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
goal, kind, step, how = pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5]
taken = 0
def counted(function):
    def call(*args, **keywords):
        global taken
        taken += 1
        if taken == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **keywords)
    return call
# Every step that changes or waits for something on the disk; the process is killed before it.
for owner, name in [
    (os, "mkdir"), (os, "rename"), (os, "replace"), (os, "link"), (os, "unlink"), (os, "fsync"),
    (os, "rmdir"), (files, "_exchange"),
]:
    setattr(owner, name, counted(getattr(owner, name)))
if how == "aside":
    files._exchange = lambda *paths: False
replacement = files.Replacement(True, lambda path: None)
if kind == "folder":
    with files.new_directory("path", goal, replacement) as draft:
        (draft / "inner").mkdir()
        (draft / "file").write_text("new")
        (draft / "inner" / "file").write_text("new")
else:
    with files.new_file("path", goal, replacement) as draft:
        draft.write_text("new")
"""


@pytest.mark.parametrize(
    ("kind", "how"), [("file", "exchange"), ("folder", "exchange"), ("folder", "aside")]
)
def test_killed_at_any_step_the_old_or_the_new_one_is_there(tmp_path, kind, how):
    seen, recovered = [], 0
    for step in range(1, 50):
        goal = tmp_path / str(step) / "goal"
        put(kind, goal, "old")
        command = [
            sys.executable,
            "-S",
            "-c",
            STEPS,
            _files.__file__,
            str(goal),
            kind,
            str(step),
            how,
        ]
        ended = subprocess.run(command, check=False, capture_output=True, text=True)
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        if how == "aside" and not goal.exists():
            recovered += 1
            _files.restore(goal)  # as whoever reads or writes does
        assert content(goal) in ("old", "new")
        seen.append(content(goal))
        assert all(name == "goal" or name.startswith(".goal.") for name in names(goal.parent))
        put(kind, goal, "newer")  # what is left behind is in nobody's way
        assert content(goal) == "newer"
    assert ended.returncode == 0 and content(goal) == "new" and names(goal.parent) == ["goal"]
    assert seen == sorted(seen, reverse=True) and {"old", "new"} == set(seen)  # and never back
    assert recovered == (how == "aside")


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "_exchange", lambda *paths: False)
    goal, rename = tmp_path / "goal", pathlib.Path.rename
    put("folder", goal, "old")

    def broken(path, target):
        if target == goal and ".old" not in path.name:
            raise OSError(errno.EIO, "broken")
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", broken)
    with pytest.raises(OSError, match=r"Input/output error: '.*goal'"):
        put("folder", goal, "new")
    assert content(goal) == "old" and names(tmp_path) == ["goal"]


def test_restoring_is_for_what_was_being_replaced(tmp_path):
    _files.restore(tmp_path / "goal")
    assert names(tmp_path) == []
    fill(_files._aside(tmp_path / "goal"), "old")
    fill(tmp_path / "other", "mine")
    _files.restore(tmp_path / "other")
    with pytest.raises(FileExistsError, match="path exists already"):
        _files.free_path("path", tmp_path / "goal")
    assert content(tmp_path / "goal") == "old" and names(tmp_path) == ["goal", "other"]


# A disk that is full


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize("kind", ["file", "folder", "text"])
def test_a_full_disk_is_named_by_the_path(tmp_path, monkeypatch, kind, number):
    goal = tmp_path / "goal"

    def full(*args):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
        patch.setattr(os, "fsync", full)
        if kind == "text":
            _files.write_text(goal, "text")
        else:
            put(kind, goal, "text")
    assert str(caught.value) == f"[Errno {number}] {os.strerror(number)}: {str(goal)!r}"
    assert "Free some space" in caught.value.__notes__[0]
    assert names(tmp_path) == []


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="there is no such device")
def test_a_stream_that_is_refused_is_named_by_the_path(tmp_path):
    with pytest.raises(OSError) as caught, _files.replaced(tmp_path / "goal") as draft:
        draft.symlink_to("/dev/full")
        with draft.open("w") as stream:
            stream.write("text")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "goal"))
    assert names(tmp_path) == []


def test_errors_of_other_libraries_are_told_by_the_words_of_the_system(tmp_path):
    words = os.strerror(errno.ENOSPC)
    with pytest.raises(OSError) as caught, _files.replaced(tmp_path / "goal") as draft:
        raise RuntimeError(f"{draft}; {words}")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "goal"))
    with pytest.raises(RuntimeError), _files.replaced(tmp_path / "goal"):
        raise RuntimeError(f"/another/place; {words}")
    with pytest.raises(FileNotFoundError, match="nowhere"), _files.replaced(tmp_path / "goal"):
        (tmp_path / "nowhere").read_text()
