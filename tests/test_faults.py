"""A small part of `python -m benchmarks faults`: what is quick, and what it calls lost."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import time

import numpy as np
import pytest
from helpers import TINY, dense_model

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.__main__ import main
from benchmarks.faults import calls, cluster, damage, disks, memory, numbers, runs, strangers
from benchmarks.faults.outcome import Outcome
from tscnc_tf import _files, attacks, evaluate_robustness, experiments, export_saved_model
from tscnc_tf.experiments import stages


def test_hard_matrices_and_values_that_are_not_finite():
    matrices, values = numbers.scenarios(smoke=True)
    assert (matrices.lost, values.lost) == ([], [])
    assert matrices.ends == {"finite value and gradient": 200 * 4 * 5}
    assert values.ends == {"error that names NaN or infinity": values.tried}


def test_the_matrices_are_of_every_kind():
    rng = np.random.default_rng(1)
    stacks = [numbers.hard_matrices(rng, 20) for _ in range(40)]
    sizes = [np.abs(matrix).max() for stack in stacks for matrix in stack]
    assert min(size for size in sizes if size) < 1e-25
    assert max(sizes) > 1e25
    assert 0.0 in sizes
    full = [stack[0].shape[1] == np.linalg.matrix_rank(stack[0]) for stack in stacks]
    assert 0 < sum(full) < len(full)


def test_calls_with_one_wrong_argument():
    (outcome,) = calls.scenarios(smoke=True)
    assert outcome.lost == []
    assert outcome.tried == calls.FEW
    assert outcome.ends["refused, clearly"] > calls.FEW / 2


def test_what_is_no_clear_refusal_is_lost(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def silent(size):
        raise KeyError(size)

    def nameless(size):
        raise ValueError("that is wrong")

    def documented(size):
        """Do nothing.

        Raises:
            KeyError: always.
        """
        raise KeyError(size)

    def writes(size):
        pathlib.Path("left").touch()
        raise ValueError("size is wrong")

    def found(function):
        outcome = Outcome("calls")
        calls.call(outcome, "f", function, 0, -1, {})
        return outcome.lost

    assert found(silent) == ["f(size=-1): KeyError: -1"]
    assert found(nameless) == ["f(size=-1): ValueError: that is wrong"]
    assert found(documented) == []
    assert found(writes) == ["f(size=-1): refused, but has written {'left'}"]


@pytest.mark.parametrize("content", [b"0123456789", b"a"])
def test_damages_change_the_content(content):
    found = damage.damages(content, b"other")
    assert content not in found.values()
    assert found["gone"] is None
    assert found["a byte at 0%"] == bytes([content[0] ^ 0xFF]) + content[1:]
    assert found["a byte at 100%"] == content[:-1] + bytes([content[-1] ^ 0xFF])


def test_what_became_of_a_kind_is_written_down(tmp_path):
    main(["faults", "--smoke", "--part", "memory", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "faults_memory.json").read_text())
    assert [each["tried"] for each in found["faults"]] == [1, 1]
    assert all(each["lost"] == [] and sum(each["ends"].values()) == 1 for each in found["faults"])
    with pytest.raises(SystemExit, match=r"--part must be one of numbers, .*, got 'luck'"):
        main(["faults", "--part", "luck", "--output", str(tmp_path)])


def test_a_loss_is_shown_and_is_a_failure(tmp_path, monkeypatch, capsys):
    outcome = Outcome("a fault")
    outcome.lose("the third case: nothing was said")
    monkeypatch.setattr(memory, "scenarios", lambda smoke: [outcome])
    with pytest.raises(SystemExit):
        main(["faults", "--part", "memory", "--output", str(tmp_path)])
    assert "lost: a fault: the third case: nothing was said" in capsys.readouterr().out


def test_tests_of_files_from_strangers_are_counted_by_module():
    case = '<testcase classname="tests.test_{}" name="{}">{}</testcase>'
    cases = [("a", "one", ""), ("a", "two", "<failure/>"), ("b_c", "one", "<skipped/>")]
    text = "".join(case.format(*each) for each in [*cases, ("b_c", "two", "")])
    first, second = strangers.outcomes(f"<testsuites><testsuite>{text}</testsuite></testsuites>")
    assert (first.fault, first.tried, first.lost) == (
        *("files from strangers (a)", 2),
        ["test_a::two"],
    )
    assert (second.fault, second.tried, second.lost) == ("files from strangers (b c)", 1, [])


@contextlib.contextmanager
def closed(content=None):
    """Make a folder that this process may not write to: root gives up its rights during the block.

    Args:
        content: a folder to be copied into it.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if content is not None:
            shutil.copytree(content, folder, dirs_exist_ok=True)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(disks.NOBODY)
        try:
            yield folder
        finally:
            if is_root:
                os.seteuid(0)
            for path in (folder, *folder.rglob("*")):
                path.chmod(0o755)


def replace_text(path):
    _files.write_text(path, "text")


def make_folder(path):
    with _files.new_directory("folder", path):
        pass


def make_file(path):
    with _files.new_file("path", path) as draft:
        draft.touch()


def export(path):
    export_saved_model(dense_model(), path)


def evaluate(path):
    x, y = np.full((4, 6), 0.5, np.float32), np.zeros(4, int)
    attack = attacks.FGSM(epsilon=0.1)
    evaluate_robustness(dense_model(), x, y, attack, state_path=path, progress=False)


def run(path):
    experiments.run(experiments.Recipe.from_dict(TINY), path, progress=False)


needs_users = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="a system without users")


@needs_users
@pytest.mark.parametrize("write", [replace_text, make_folder, make_file, export, evaluate, run])
def test_a_folder_that_cannot_be_written_to_is_named(write):
    if write is run:
        recipe = experiments.Recipe.from_dict(TINY)
        stages.dry_run(recipe, stages.dataset(recipe))  # imports what it needs, as root still
    with closed() as folder:
        with pytest.raises(PermissionError) as error:
            write(folder / "below")
        assert list(folder.iterdir()) == []
    assert str(folder / "below") in str(error.value) or str(folder / ".below.") in str(error.value)


@needs_users
def test_an_experiment_in_a_folder_that_is_closed_can_be_read(finished):
    before = experiments.open_stage(finished / "3-finetune").model.get_weights()
    with closed(finished) as folder:
        after = experiments.open_stage(folder / "3-finetune").model.get_weights()
        with pytest.raises(PermissionError) as error:
            run(folder)
    assert str(folder) in str(error.value)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_clock_of_the_faults_goes_backwards(monkeypatch):
    for name in ("time", "time_ns"):
        monkeypatch.setattr(time, name, getattr(time, name))
    monkeypatch.setattr(datetime, "datetime", datetime.datetime)
    disks.set_clock(1000.0, -10.0)
    assert [round(time.time()), round(time.time_ns() / 1e9)] == [1000, 990]
    assert round(datetime.datetime.now(datetime.UTC).timestamp()) == 980


def test_the_times_of_files_are_set_in_their_order(tmp_path):
    for index, name in enumerate(("b", "a", "c")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (index, index))
    disks.date_files(tmp_path, 500.0, -100.0)
    assert [(tmp_path / name).stat().st_mtime for name in ("b", "a", "c")] == [500, 400, 300]


def test_what_two_machines_have_lost_is_said(monkeypatch):
    """A machine is killed once two runs are on the way; without Ray here."""
    killed = threading.Event()

    @contextlib.contextmanager
    def two_machines(folder):
        yield killed.set

    def sweep(folder, engine):
        for index in range(2):
            assert not killed.is_set()
            (folder / f"seed-{index}" / "1-train" / "state-1").mkdir(parents=True)
        assert killed.wait(10.0)
        return {"small/seed-1": "it was"}

    monkeypatch.setattr(cluster, "_two_machines", two_machines)
    monkeypatch.setattr(cluster, "_sweep", sweep)
    monkeypatch.setattr(cluster, "_in_one_process", lambda folder: None)
    differences = iter(["weights", ""])
    monkeypatch.setattr(runs, "differences", lambda one, other: next(differences))
    (outcome,) = cluster.scenarios(True)
    assert outcome.lost == ["small/seed-0: weights", "small/seed-1 has failed: it was"]
    assert outcome.tried == 2


def test_the_environment_is_as_it_was(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere")
    before = dict(os.environ)
    with cluster._environment({"RAY_TMPDIR": "/x"}):
        assert os.environ["RAY_TMPDIR"] == "/x"
        del os.environ["RAY_ADDRESS"]
    assert dict(os.environ) == before
