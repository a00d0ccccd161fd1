"""A small part of `python -m benchmarks faults`: what is quick, and what it calls lost."""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.__main__ import main
from benchmarks.faults import calls, damage, memory, numbers
from benchmarks.faults.outcome import Outcome


def test_hard_matrices_and_values_that_are_not_finite():
    matrices, values = numbers.scenarios(smoke=True)
    assert (matrices.lost, values.lost) == ([], [])
    assert matrices.ends == {"finite value and gradient": 200 * 4 * 5}
    assert values.ends == {"said at once": values.tried}


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
