"""Rules of the package: imports go down, one module imports Keras, public names are documented."""

from __future__ import annotations

import ast
import inspect
import pathlib
import re
import sys

import pytest
from helpers import FLAVOURS, conv_model, fresh_process, images

import tscnc_tf

PACKAGE = pathlib.Path(tscnc_tf.__file__).parent
LAYERS = {
    "_files": 0,
    "_keras": 1,
    "_checks": 1,
    "_configs": 1,
    "_reports": 1,
    "_extras": 1,
    "_channels": 2,
    "_plots": 2,
    "_litert_file": 2,
    "_probe": 2,
    "_timing": 2,
    "functional": 2,
    "losses": 2,
    "regularizers": 3,
    "schedules": 3,
    "attacks": 3,
    "inspection": 3,
    "gates": 3,
    "pruning": 4,
    "training": 4,
    "callbacks": 4,
    "evaluation": 4,
    "export": 5,
    "datasets": 5,
    "applications": 5,
    "experiments": 6,
    "__init__": 7,
    "__main__": 7,
}
KERAS = (
    *("__init__", "layers", "flavours", "optimizers"),
    *("wrappers", "gated", "models", "cloning", "masks", "files"),
)
FRAGILE = {"keras", "tf_keras", "tensorflow_model_optimization"}
FILES = sorted(PACKAGE.rglob("*.py"))


def package_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Every imported module, by its full name; for `from tscnc_tf import x` that is tscnc_tf.x."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module == "tscnc_tf":
                yield from (f"tscnc_tf.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = package_of(path)
    for name in imports(path):
        if not name.startswith("tscnc_tf."):
            continue
        there = name.split(".")[1]
        if there in LAYERS and there != here:
            assert LAYERS[there] < LAYERS[here], f"{here} must not import {there}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "_keras").glob("*.py")), ids=lambda p: p.stem)
def test_imports_go_down_among_the_modules_for_keras(path):
    """Those inside of functions aside, in `inference`, which the package itself offers."""
    below = KERAS[: KERAS.index(path.stem)]
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("tscnc_tf._keras"):
            _, _, module = node.module.partition("tscnc_tf._keras.")
            found = {module or alias.name for alias in node.names}
            assert not {name for name in found if name in KERAS} - set(below)


def test_every_package_has_a_layer():
    assert {package_of(path) for path in FILES} == set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_one_package_imports_each_keras(path):
    assert "tf.keras" not in path.read_text().replace("`tf.keras`", "").replace(
        "_ = tf.keras.layers", ""
    )
    if package_of(path) != "_keras":
        assert not FRAGILE & {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_library_neither_prints_nor_asserts(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print"


def public_objects():
    for name in tscnc_tf.__all__:
        value = getattr(tscnc_tf, name)
        yield name, value
        if inspect.ismodule(value):
            for inner in value.__all__:
                yield f"{name}.{inner}", getattr(value, inner)


@pytest.mark.parametrize(
    ("name", "value"), [pair for pair in public_objects() if callable(pair[1])]
)
def test_public_names_are_documented(name, value):
    doc = inspect.getdoc(value)
    assert doc, name
    assert len(doc.splitlines()[0]) > 20
    for method, function in vars(value).items() if inspect.isclass(value) else ():
        if inspect.isfunction(function) and not method.startswith("_"):
            assert inspect.getdoc(getattr(value, method)), f"{name}.{method}"


def test_files_are_read_at_a_sitting():
    lengths = {str(path): len(path.read_text().splitlines()) for path in FILES}
    assert not {path: length for path, length in lengths.items() if length > 700}


def test_the_guide_names_the_files_of_a_training_step():
    """Those of the package in which a function is called, for a masked Keras 3 model."""
    guide = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    section = guide.partition("## A training step, file by file")[2].partition("\n## ")[0]
    schedule = tscnc_tf.schedules.CosineSparsity(0.0, 0.5, begin_step=1, end_step=9, frequency=1)
    trainer = tscnc_tf.AdversarialTraining(
        tscnc_tf.prune(conv_model(FLAVOURS["keras"]), schedule),
        attack=tscnc_tf.attacks.PGD(epsilon=0.1, step_size=0.05, steps=2),
        loss=tscnc_tf.losses.TRADES(beta=6.0),
    )
    trainer.compile("adam")
    called = set()

    def note(frame, event, argument):
        path = pathlib.Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in path.parents:
            called.add(str(path.relative_to(PACKAGE)))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        trainer.fit(*images(8), batch_size=8, verbose=0)
    finally:
        sys.setprofile(before)
    assert called == set(re.findall(r"`([a-z_/]+\.py)`", section))


IMPORT = """
import os, sys
first = sys.argv[1]
before = dict(os.environ)
if first == "tfmot":
    import tensorflow_model_optimization
    before = dict(os.environ)  # it has chosen a Keras for itself
import tensorflow as tf
if first == "keras":
    import keras
    tf.keras.layers.Dense
imported = dict(os.environ)
import tscnc_tf.export
assert dict(os.environ) == imported, "importing changed an environment variable"
if first != "tfmot":
    assert "tensorflow_model_optimization" not in sys.modules, "tfmot imported unasked"
extras = {"ai_edge_litert", "onnx", "onnxruntime", "tf2onnx"} & set(sys.modules)
assert not extras, f"{extras} imported unasked"
changed = {k: v for k, v in os.environ.items() if before.get(k) != v and not k.startswith("TF2")}
assert not {k for k in changed if "KERAS" in k}, changed
print(tscnc_tf.schedules.OneShot(0.5))
assert "tensorflow_model_optimization" in sys.modules
assert os.environ.get("TF_USE_LEGACY_KERAS") == before.get("TF_USE_LEGACY_KERAS")
if first != "tfmot":
    import keras
    assert tf.keras.__version__ == keras.__version__, "tf.keras is no longer Keras 3"
"""


@pytest.mark.parametrize("first", ["nothing", "keras", "tfmot"])
def test_importing_leaves_the_process_as_it_was(first):
    """After TensorFlow alone; after `keras` and `tf.keras` in use; and after tfmot."""
    assert fresh_process(IMPORT, first).strip() == "OneShot(final_sparsity=0.5, begin_step=0)"


def test_keras_3_on_another_backend_is_refused(monkeypatch):
    from tscnc_tf import _keras

    model = _keras.keras.Sequential([_keras.keras.Input((2,)), _keras.keras.layers.Dense(2)])
    monkeypatch.setattr(_keras.keras.config, "backend", lambda: "jax")
    with pytest.raises(RuntimeError, match="on jax, and tscnc_tf works on TensorFlow: set KERAS_B"):
        tscnc_tf.prune_now(model, 0.5)
