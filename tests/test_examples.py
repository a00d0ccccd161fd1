"""Every example runs, as its docstring says, on a few steps."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

EXAMPLES = sorted((pathlib.Path(__file__).parent.parent / "examples").glob("*.py"))
SHOWS = {
    "quickstart": ["TSCNC 99%", "singular_values.png", "one training run a row"],
    "keras3_quickstart": ["Pruning", "Compaction", "95 % zeros", "times as fast"],
    "keras3_custom_loop": ["the masks are frozen", "block_1/widen", "PGD-7 linf 0.1"],
    "custom_training_loop": ["epoch 2:", "Pruning", "Robustness"],
    "pretrained_model": ["bit for bit: True", "Conv_1", "PGD-2 linf 8/255"],
    "paper": [
        "smoke, 1-train",
        "smoke, 3-finetune",
        "APGD-100 linf 0.1 targeted_dlr",
        "worst case",
    ],
    "theory": ["TSCNC, retrained", "99.9%", "worst κ", "theory.png and theory.json are in"],
    "theory_figure": ["TSCNC, retrained", "99.9%", "68.3% (57 to 81)", "theory.png is in"],
    "other_libraries_attacks": [
        *("CleverHans momentum_iterative_method linf 0.1", "ART Auto-PGD", "foolbox DDN")
    ],
}
WRITING = {"quickstart", "keras3_quickstart", "paper", "theory", "theory_figure"}


def test_every_example_is_listed():
    assert {path.stem for path in EXAMPLES} == set(SHOWS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_runs(path, tmp_path):
    done = subprocess.run(
        [sys.executable, path, "--smoke"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "COLUMNS": "160"},
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for words in SHOWS[path.stem]:
        assert words in done.stdout
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == ({"outputs"} if path.stem in WRITING else set())
