"""What is written is whole or not there."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from tscnc_tf import _files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


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


def test_free_path_is_absolute_and_knows_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _files.free_path("path", "goal") == tmp_path / "goal"
    assert _files.free_path("path", "~/goal") == tmp_path / "goal"


@pytest.mark.parametrize("path", [None, 3, b"bytes"])
def test_free_path_wants_a_path(path):
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
