"""What the documentation shows runs: every docstring's example, and the README's code."""

from __future__ import annotations

import doctest
import importlib
import pathlib
import re
import tempfile

import numpy as np
import pytest
import tensorflow as tf
from helpers import FLAVOURS, conv_model, images, python_blocks

import tscnc_tf

PACKAGE = pathlib.Path(tscnc_tf.__file__).parent
README = PACKAGE.parent / "README.md"
EXAMPLE = re.compile(r"^ *>>> ", re.MULTILINE)


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


WITH_EXAMPLES = [p for p in sorted(PACKAGE.rglob("*.py")) if EXAMPLE.search(p.read_text())]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=module_name)
def test_the_examples_of_the_docstrings_run(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    module = importlib.import_module(module_name(path))
    found = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    # What a decorator hides from the finder would never be run.
    assert sum(len(test.examples) for test in found) == len(EXAMPLE.findall(path.read_text()))
    runner = doctest.DocTestRunner(verbose=False)
    for test in found:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0, capsys.readouterr().out


def section(title):
    (block,) = python_blocks(README.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0])
    return compile(block, str(README), "exec")


# The schedule of the README ends after 2,000 steps, which are not taken here; and 95 % of this tiny
# network is nearly all of it.
@pytest.mark.filterwarnings("ignore:.*does not reach its sparsity", "ignore:At a sparsity")
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_ten_lines_of_the_readme_run(flavour, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (x, y), (xv, yv) = images(48), images(16, seed=1)
    names = {"model": conv_model(FLAVOURS[flavour]), "x": x, "y": y, "xv": xv, "yv": yv}
    exec(section("Ten lines"), names)
    assert "PGD-50 linf 8/255" in capsys.readouterr().out
    served = tf.saved_model.load(str(tmp_path / "pruned"))
    (logits,) = served.signatures["serving_default"](tf.constant(xv)).values()
    expected = names["trainer"].model(xv, training=False)
    assert logits.shape == (16, 3)
    assert np.ptp(logits) > 0
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_pruning_and_nothing_else_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(section("Pruning, and nothing else"), names)
    printed = capsys.readouterr().out
    assert "logits" in printed
    assert "16 → 8" in printed
    assert names["small"].parameters_after < names["small"].parameters_before
    assert (tmp_path / "small.tflite").stat().st_size > 0
    assert (tmp_path / "sparse.keras").exists()


def test_the_method_as_a_whole_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(README.parent / "examples")
    names = {}
    exec(section("The method as a whole"), names)
    zeros = tscnc_tf.inspection.sparsity(names["model"])
    assert zeros.rows[1].sparsity == pytest.approx(0.95, abs=0.01)
    assert (tmp_path / "outputs" / "first" / "4-evaluate" / "saved_model").is_dir()
