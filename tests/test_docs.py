"""What the documentation shows runs, and prints what it says: docstrings, README and guides."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import json
import pathlib
import pkgutil
import re
import shlex
import tempfile

import click.testing
import numpy as np
import pytest
import tensorflow as tf
from sphinx.ext.autosummary import generate

import tscnc_cli
import tscnc_tf

PACKAGE = pathlib.Path(tscnc_tf.__file__).parent
ROOT = PACKAGE.parent
EXAMPLE = re.compile(r"^ *>>> ", re.MULTILINE)


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
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


# A block of Python or of commands, and the block of text behind it, if there is one: its output.
SHOWN = re.compile(
    r"^```(python|console)\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL
)
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?")
FOOLED = re.compile(r"fooled (\d+) of (\d+)")


def run_page(path, folder, *replacements):
    """Run the blocks of a page in one namespace, compare what they print, and return the names.

    Of commands, those are run that begin with `$ tscnc`; their output is compared if it is shown.
    Words must be the same; numbers may differ by a tenth, and how many examples an attack fools by
    three, as training rounds differently on other machines.
    """
    text = path.read_text(encoding="utf-8")
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    names = {"__name__": "page"}
    for index, (language, code, expected) in enumerate(SHOWN.findall(text)):
        if language == "console":
            printed = "".join(map(command_output, re.findall(r"^\$ tscnc (.*)", code, re.M)))
            if not expected:
                continue
        else:
            source = folder / f"block_{index}.py"  # a file, where AutoGraph finds the code
            source.write_text(code, encoding="utf-8")
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                exec(compile(code, str(source), "exec"), names)
            printed = stream.getvalue()
        assert words(printed) == words(expected), f"{path.name}, block {index}"
        assert fooled(printed) == pytest.approx(fooled(expected), abs=3), code
        assert numbers(printed) == pytest.approx(numbers(expected), rel=0.1, abs=1e-4), code
    return names


def command_output(line):
    result = click.testing.CliRunner().invoke(tscnc_cli.main, shlex.split(line))
    assert result.exit_code == 0, result.stderr
    return result.stdout


def words(text):
    return re.sub("─+", "─", NUMBER.sub("0", text)).split()


def numbers(text):
    return [float(each.replace(",", "")) for each in NUMBER.findall(FOOLED.sub("", text))]


def fooled(text):
    return [int(count) for counts in FOOLED.findall(text) for count in counts]


def test_the_quick_start_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(ROOT / "README.md", tmp_path)
    assert (tmp_path / "digits.tflite").stat().st_size > 0


# from-tfmot.md is run by test_from_tfmot.py.
GUIDES = [
    path
    for path in sorted((ROOT / "docs").glob("*.md"))
    if "```python\n" in path.read_text(encoding="utf-8") and path.stem != "from-tfmot"
]


def test_the_guides_are_found():
    assert {path.stem for path in GUIDES} == {
        "adversarial-training",
        "command-line",
        "evaluation",
        "export",
        "first-steps",
        "method",
        "pruning",
    }


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_the_guide_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_page(path, tmp_path)
    if path.stem == "adversarial-training":
        check_the_export(names, tmp_path)
    if path.stem == "command-line":
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["attacks"][0]["name"] == "APGD-100 linf 0.05 from digits"
    if path.stem == "pruning":
        assert names["small"].parameters_after < names["small"].parameters_before
        assert (tmp_path / "sparse.keras").exists()
    if path.stem == "method":
        zeros = tscnc_tf.inspection.sparsity(names["model"])
        assert zeros.rows[1].sparsity == pytest.approx(0.95, abs=0.01)
        assert (tmp_path / "outputs" / "first" / "4-evaluate" / "saved_model").is_dir()


def test_every_diagnostic_has_its_heading():
    """A warning links to `docs/evaluation.md#name`."""
    source = (PACKAGE / "evaluation" / "diagnostics.py").read_text(encoding="utf-8")
    names = re.findall(r'Finding\(\s*"([a-z-]+)",', source)
    assert len(names) == source.count("Finding(") - source.count("class Finding(")
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    diagnostics = page.partition("\n## Diagnostics\n")[2].partition("\n## ")[0]
    assert set(re.findall("^### (.*)$", diagnostics, re.MULTILINE)) == set(names)


def test_adversarial_training_is_the_same_in_tf_keras(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "adversarial-training.md"
    names = run_page(page, tmp_path, ("import keras", "import tf_keras as keras"))
    check_the_export(names, tmp_path)


def check_the_export(names, folder):
    """The SavedModel of the guide serves the logits of the model that was trained."""
    xv = names["xv"]
    served = tf.saved_model.load(str(folder / "pruned"))
    (logits,) = served.signatures["serving_default"](tf.constant(xv)).values()
    expected = names["trainer"].model(xv, training=False)
    assert "PGD-50 linf 8/255" in str(names["report"])
    assert logits.shape == (32, 3)
    assert np.ptp(logits) > 0
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_every_public_name_has_a_page_of_its_own(tmp_path):
    docs = ROOT / "docs"
    options = ["--imported-members", "--respect-module-all", f"--templates={docs / '_templates'}"]
    generate.main([*options, f"--output-dir={tmp_path}", str(docs / "api" / "index.md")])
    modules = [
        module.name
        for module in pkgutil.iter_modules(tscnc_tf.__path__)
        if not module.name.startswith("_") and module.name != "cli"
    ]
    names = {f"tscnc_tf.{name}" for name in [*tscnc_tf.__all__, *modules]} - {
        "tscnc_tf.__version__"
    }
    for module in modules:
        public = importlib.import_module(f"tscnc_tf.{module}").__all__
        names |= {f"tscnc_tf.{module}.{name}" for name in public}
    assert {path.stem for path in tmp_path.iterdir()} == names
