"""A small part of `python -m benchmarks faults`: what is quick, and what it calls lost."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
import re
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
from benchmarks.faults import (
    calls,
    cluster,
    damage,
    disks,
    kills,
    memory,
    numbers,
    runs,
    strangers,
)
from benchmarks.faults.outcome import Outcome
from tscnc_tf import _files, attacks, evaluate_robustness, experiments, export_saved_model
from tscnc_tf.experiments import folders, stages


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
    found = damage.damages(content, {"another stage": b"other", "another recipe": content})
    assert content not in found.values()
    assert found["exchanged with that of another stage"] == b"other"
    assert found["gone"] is None
    assert found["a byte at 0%"] == bytes([content[0] ^ 0xFF]) + content[1:]
    assert found["a byte at 100%"] == content[:-1] + bytes([content[-1] ^ 0xFF])


def test_methods_are_called_and_not_those_of_keras():
    named = dict(calls.public_callables())
    methods = dict(calls.public_methods(named))
    assert {"datasets.Dataset.subset", "attacks.PGD.__call__", "experiments.Recipe.override"} < set(
        methods
    )
    assert not [name for name in methods if name.rpartition(".")[2] in ("build", "get_config")]
    arguments = calls._arguments()
    for name in ("experiments.Recipe.from_dict", "datasets.Dataset.steps_per_epoch"):
        outcome = Outcome("methods")
        calls.call(outcome, name, methods[name].bind(arguments), 0, -1, arguments)
        assert dict(outcome.ends) == {"refused, clearly": 1}


def test_a_file_is_exchanged_with_those_of_its_name(tmp_path):
    mine = {name: tmp_path / "mine" / name for name in (damage.COMPLETE, "2-prune")}
    others = {name: tmp_path / "other" / name for name in mine}
    for folder in (*mine.values(), *others.values()):
        for stage in runs.ALL_STAGES[:2]:
            (folder / stage).mkdir(parents=True)
            (folder / stage / "model.keras").write_text(f"{stage} of {folder.parent.name}")
    (mine["2-prune"] / "2-prune" / "state-1").write_text("state")
    file = pathlib.Path("1-train", "model.keras")
    assert damage._exchanged(file, damage.COMPLETE, mine, others) == {
        "another file": b"2-prune of mine",
        "another recipe": b"1-train of other",
        "2-prune": b"2-prune of mine",
    }
    found = damage._exchanged(pathlib.Path("1-train", "state-1"), damage.COMPLETE, mine, others)
    assert found == {"2-prune": b"state"}


@pytest.mark.parametrize("count", [4, 15, 50])
def test_signals_are_spread_over_the_stages(count):
    groups = kills.goals(count, np.random.default_rng(0))
    assert all(group == sorted(group) and len(group) <= kills.IN_A_RUN for group in groups)
    hits = [sum(group.count(stage) for group in groups) for stage in runs.ALL_STAGES]
    assert sum(hits) == count
    assert max(hits) - min(hits) <= 1


def test_the_stage_of_a_killed_run_is_the_first_without_a_manifest(tmp_path):
    (tmp_path / "recipe.json").touch()
    os.utime(tmp_path / "recipe.json", (100, 100))
    for index, stage in enumerate(runs.ALL_STAGES):
        assert kills.stage_of(tmp_path) == stage
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "manifest.json").touch()
        os.utime(tmp_path / stage / "manifest.json", (101 + 2 * index,) * 2)
    assert kills.stage_of(tmp_path) == "4-evaluate"
    assert list(kills.seconds_of_stages(tmp_path).values()) == [1, 2, 2, 2]


class Ended:
    """A process that has ended."""

    def __init__(self, exitcode):
        self.exitcode = exitcode

    def join(self):
        pass


def test_files_that_a_disk_refuses_are_counted_by_name(monkeypatch, tmp_path):
    errors, finished = [], []

    def process(recipe, run, before, until):
        name = folders.STAGE_FOLDERS[until]
        errors.append(
            "OSError: [Errno 28] No space left on device"
            + (f": '{run}/{name}/best.npz'\n..." if until != "prune" else "")
        )
        return Ended(int(before == 1))

    monkeypatch.setattr(runs, "process", process)
    monkeypatch.setattr(runs, "error_of", lambda run: errors[-1])
    monkeypatch.setattr(runs, "finish", lambda *arguments: finished.append(arguments))
    outcome = Outcome("a full disk")
    disks._refuse(outcome, tmp_path, tmp_path / "whole", (1, 2, 3), lambda amount: amount)
    assert outcome.ends == {
        f"{name}/best.npz is named": 1 for name in ("1-train", "3-finetune", "4-evaluate")
    }
    assert outcome.lost == [
        "2-prune, 1: exit 1, OSError: [Errno 28] No space left on device",
        "no file of 2-prune was refused",
    ]
    assert finished == [(outcome, tmp_path, tmp_path / "whole")]


def test_the_errors_of_values_that_are_not_finite():
    cases = list(numbers.spoiled_cases())
    assert {(case.stage, case.place) for case in cases} >= {
        *((stage, place) for stage in runs.STAGES for place in ("momentum", "data", "last kernel")),
        *((runs.ALL_STAGES[-1], place) for place in ("first kernel", "data")),
    }
    first = [(c.stage, c.step) for c in cases if c.place == "first kernel" and np.isnan(c.value)]
    assert len(set(first)) == 3 * numbers.STEPS + 1
    patterns = {
        numbers.Spoiled("1-train", "momentum", np.nan, 5): (
            "ValueError: train: After batch 2 of epoch 2 weights are NaN or infinite: a."
        ),
        numbers.Spoiled("2-prune", "data", np.inf, 4): (
            "ValueError: prune: x must lie within bounds=(0.0, 1.0), got values from 0.0 to inf: "
            "rescale x. This is batch 5 of the optimizer."
        ),
        numbers.Spoiled("4-evaluate", "last kernel", np.nan): (
            "ValueError: evaluate: model 'x' has weights that are NaN or infinite, in logits."
        ),
    }
    for case, error in patterns.items():
        assert [each for each in patterns if re.match(each.error(), error)] == [case]


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
