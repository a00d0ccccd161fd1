"""Sweeps: what they run, that they go on, and their table; on Ray for real."""

from __future__ import annotations

import contextlib
import csv
import os
import pathlib
import signal
import sys
import tempfile
import threading
import time

import numpy as np
import pytest
import tensorflow as tf
from helpers import TINY

import tscnc_tf as tscnc
from tscnc_tf.experiments import Recipe, Sweep, engines, folders, sweep, sweeps

SHORT = {f"{stage}.epochs": 1 for stage in ("train", "finetune")} | {"prune.epochs": 1}


def tiny(**values):
    return Recipe.from_dict(TINY).override({**SHORT, **values})


DIVERGES = 7.0
failures = {
    "no weights": ValueError("nothing to prune"),
    "too large": tf.errors.ResourceExhaustedError(None, None, "OOM"),
    "disk": OSError(28, "No space left on device", "x"),
}


@pytest.fixture
def runs(monkeypatch):
    """Let experiments be files that say what was asked for; return what was run."""
    calls = []

    def run(recipe, folder, *, dense=None, until="evaluate", progress=True):
        calls.append((recipe, str(folder), dense, until))
        assert not progress
        folders.write_json(folders.pathlib.Path(folder) / "recipe.json", recipe.to_dict())
        if recipe.prune.layers in failures:
            raise failures[recipe.prune.layers]
        if recipe.train.beta == DIVERGES:
            raise ValueError("loss is NaN")
        name = {"train": "1-train", "evaluate": "4-evaluate"}[until]
        stage = folders.pathlib.Path(folder) / name
        stage.mkdir(parents=True, exist_ok=True)
        robust = 0.5 + 0.1 * recipe.seed
        folders.write_json(
            stage / "report.json", {"clean": {"accuracy": 0.9}, "robust": {"accuracy": robust}}
        )
        folders.write_json(stage / "sparsity.json", {"sparsity": recipe.sparsity})
        kernels = [{"condition_number": number, "dead_filters": 2} for number in ("inf", 3.0)]
        folders.write_json(stage / "kernels.json", {"rows": kernels})
        folders.write_manifest(stage, {"stage": until})

    monkeypatch.setattr(sweeps.runner, "run", run)
    return calls


def read(folder):
    with (folder / "results.csv").open() as stream:
        return list(csv.DictReader(stream))


PLAN = Sweep(
    {
        "plain": tiny(),
        "global": tiny(**{"prune.scope": "global"}),
        "other": tiny(**{"train.epochs": 2}),
    },
    seeds=[0, 2],
    grid={"sparsity": [0.9, 0.99]},
)


def test_all_combinations_are_run_once_and_dense_networks_are_shared(runs, tmp_path):
    report = sweep(PLAN, tmp_path)
    places = [run.place for run in PLAN.runs()]
    assert places[:3] == [
        "plain/sparsity=0.9/seed-0",
        "plain/sparsity=0.9/seed-2",
        "plain/sparsity=0.99/seed-0",
    ]
    finished = [(folder, recipe) for recipe, folder, _, until in runs if until == "evaluate"]
    assert [folder for folder, _ in finished] == [str(tmp_path / place) for place in places]
    assert [(r.sparsity, r.seed, r.prune.scope) for _, r in finished[:6]] == [
        *((0.9, 0, "layer"), (0.9, 2, "layer"), (0.99, 0, "layer"), (0.99, 2, "layer")),
        *((0.9, 0, "global"), (0.9, 2, "global")),
    ]
    dense = {folder: dense for _, folder, dense, until in runs if until == "evaluate"}
    # Of one seed, "plain" and "global" share one, at both sparsities, and "other" has its own.
    assert len(set(dense.values())) == 4
    at = [dense[str(tmp_path / f"{name}/sparsity=0.99/seed-2")] for name in PLAN.recipes]
    assert at[0] == at[1] != at[2]
    assert at[0] == dense[str(tmp_path / "plain/sparsity=0.9/seed-2")]
    rows = read(tmp_path)
    assert [row["folder"] for row in rows] == places
    assert rows[1] == {
        **{"name": "plain", "sparsity": "0.9", "seed": "2", "folder": places[1], "clean": "0.9"},
        **{"robust": "0.7", "zeros": "0.9", "condition_number": "inf"},
        "dead_filters": "4",
    }
    assert report.rows[1]["robust"] == 0.7
    assert report.failed == {}
    (line,) = [
        line
        for line in str(report).splitlines()
        if line.split()[:3] == ["plain", "sparsity", "0.99"]
    ]
    assert line.split() == [
        "plain",
        "sparsity",
        "0.99",
        "2",
        "90.0",
        "±",
        "0.0",
        "60.0",
        "±",
        "14.1",
        "99.00",
        "∞",
        "4.0",
    ]


def test_what_is_complete_is_not_run_again_and_a_failure_does_not_end_the_others(runs, tmp_path):
    bad = {name: tiny(**{"prune.layers": name}) for name in ("no weights", "too large")}
    report = sweep(Sweep({**bad, "good": tiny()}), tmp_path)
    assert report.failed == {
        "no weights/seed-0": "ValueError: nothing to prune",
        "too large/seed-0": "ResourceExhaustedError: OOM",
    }
    assert [row["name"] for row in report.rows] == ["good"]
    assert "no weights/seed-0 has failed: ValueError: nothing to prune" in str(report)
    (dense,) = {dense for _, _, dense, until in runs if until == "evaluate"}
    runs.clear()
    sweep(Sweep({**bad, "good": tiny()}), tmp_path)
    # What is left begins with the same dense network as before.
    assert {dense for _, _, dense, until in runs if until == "evaluate"} == {dense}
    with pytest.raises(OSError, match="No space left"):  # the others would meet it as well
        sweep(Sweep({"full": tiny(**{"prune.layers": "disk"})}), tmp_path)
    before = len(runs)
    more = Sweep({"good": tiny()}, seeds=[0, 1])
    assert [row["seed"] for row in sweep(more, tmp_path).rows] == [0, 1]
    assert [folder for _, folder, _, _ in runs[before:]] == [str(tmp_path / "good/seed-1")]


def test_a_dense_network_that_diverges_is_tried_once(runs, tmp_path):
    bad = {
        name: tiny(**{"train.beta": DIVERGES, "prune.scope": name}) for name in ("layer", "global")
    }
    report = sweep(Sweep({**bad, "good": tiny()}), tmp_path)
    error = "ValueError: loss is NaN"
    assert report.failed == {"layer/seed-0": error, "global/seed-0": error}
    assert [until for *_, until in runs] == ["train", "evaluate"]
    assert [row["name"] for row in report.rows] == ["good"]


def test_a_run_by_another_recipe_is_not_taken_for_one_of_this(runs, tmp_path):
    sweep(Sweep({"a": tiny()}), tmp_path)
    before = len(runs)
    with pytest.raises(ValueError, match=r"a/seed-0 holds an experiment by another .*train.beta"):
        sweep(Sweep({"a": tiny(**{"train.beta": 2.0})}), tmp_path)
    assert len(runs) == before


def test_fractions_and_equal_texts_have_places():
    plan = Sweep({"a": tiny()}, grid={"adversary.epsilon": ["8/255", 0.1]})
    assert [run.place for run in plan.runs()] == [
        "a/adversary.epsilon=8:255/seed-0",
        "a/adversary.epsilon=0.1/seed-0",
    ]
    with pytest.raises(ValueError, match=r"grid\['prune.layers'\] must not have a value twice"):
        Sweep({"a": tiny()}, grid={"prune.layers": [None, "None"]})


def test_a_sweep_is_read_from_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: smoke\ntrain: {epochs: 3}\n")
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "recipes:\n"
        "  a: smoke\n"
        "  b: mine.yaml\n"
        "  c: {base: mine.yaml, prune: {scope: global}}\n"
        "seeds: [0, 1]\n"
        "grid: {sparsity: [0.5], train.beta: [1.0, 2.0]}\n"
    )
    plan = Sweep.from_yaml(file)
    found = {run.place: run.recipe for run in plan.runs()}
    assert len(found) == 3 * 2 * 2
    recipe = found["c/sparsity=0.5/train.beta=2.0/seed-1"]
    assert (recipe.train.epochs, recipe.prune.scope, recipe.train.beta) == (3, "global", 2.0)
    assert found["a/sparsity=0.5/train.beta=1.0/seed-0"].train.epochs == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"recipes: {\xff: smoke}", "not YAML: it is not text in UTF-8"),
        ("seeds: [0]", "must have an entry recipes"),
        ("recipes: {a: smoke}\nsedes: [0]", "unknown: sedes"),
        ("recipes: [a]", "recipes must be a mapping of names to recipes"),
        ("recipes: {a: 3}", "recipes.a must be text or a mapping of names to values, got 3"),
        ("recipes: {a: {trian: 3}}", "recipes.a: .*trian"),
        ("recipes: {a/b: smoke}", "recipes must be usable as the name of a file"),
        ("recipes: {dense: smoke}", "must not have the name 'dense'"),
        ("recipes: {a: smoke}\nseeds: 3", "seeds must be a list of values"),
        ("recipes: {a: smoke}\nseeds: [1, 1]", "seeds must not have a value twice"),
        ("recipes: {a: smoke}\nseeds: [-1]", "a: .*seed must be >= 0"),
        ("recipes: {a: smoke}\ngrid: {seed: [1]}", "must not have the name 'seed'"),
        ("recipes: {a: smoke}\ngrid: {sparsity: []}", "at least one"),
        ("recipes: {a: smoke}\ngrid: {sparsity: [2]}", "a: sparsity must be < 1"),
        ("recipes: {a: smoke}\ngrid: {sparsty: [0.5]}", "a: .*sparsty"),
    ],
)
def test_what_is_no_sweep_is_refused_by_name(content, words, tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((TypeError, ValueError), match=rf"(?s){file}:? .*{words}"):
        Sweep.from_yaml(file)


def test_wrong_arguments_are_refused(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="plan must be a Sweep, got 3"):
        sweep(3, tmp_path)
    monkeypatch.setitem(engines._extras.importlib.sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[ray\]"'):
        sweep(PLAN, tmp_path, engine="ray")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def own_ray():
    """Ray, so that it starts a cluster of its own: none that runs here already is found."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_TMPDIR", folder)  # in a short path, which sockets need
        yield ray
        ray.shutdown()


@pytest.fixture(scope="module")
def ray_of_one_core(own_ray):
    """Ray with one core, so that one process imports TensorFlow."""
    own_ray.init(num_cpus=1, logging_level="ERROR", log_to_driver=False)
    return own_ray


@pytest.mark.filterwarnings("ignore")  # of Ray's own
def test_what_no_machine_has_is_refused(tmp_path, own_ray):
    words = r"what one machine of Ray has, got 1 and 99; there are \d"
    with pytest.raises(ValueError, match=words):
        sweep(Sweep({"layer": tiny()}), tmp_path, engine="ray", gpus=99)


@pytest.mark.filterwarnings("ignore")  # of Ray's own
def test_on_ray_runs_end_as_in_this_process(tmp_path, ray_of_one_core):
    """Two runs that share a dense network, and one that fails, in processes of Ray's."""
    recipes = {
        "layer": tiny(),
        "global": tiny(**{"prune.scope": "global"}),
        "bad": tiny(**{"prune.layers": "nothing*"}),
    }
    report = sweep(Sweep(recipes), tmp_path / "ray", engine="ray", progress=False)
    assert [row["name"] for row in report.rows] == ["layer", "global"]
    assert list(report.failed) == ["bad/seed-0"]
    assert "nothing*" in report.failed["bad/seed-0"]
    assert sweep(Sweep({"layer": tiny()}), tmp_path / "ray", engine="ray").rows[0] == report.rows[0]
    (dense,) = (tmp_path / "ray" / "dense").iterdir()
    alone = tscnc.experiments.run(
        tiny(), tmp_path / "alone", dense=dense / "1-train", progress=False
    )
    models = (
        tscnc.experiments.open_stage(folder / "3-finetune").model.get_weights()
        for folder in (alone, tmp_path / "ray" / "layer" / "seed-0")
    )
    for mine, theirs in zip(*models, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_task_that_is_interrupted_again_writes_its_state(tmp_path):
    def task(name):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10.0)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGINT)
            pathlib.Path(name).touch()
            raise

    before, folder = signal.getsignal(signal.SIGINT), pathlib.Path.cwd()
    try:
        with pytest.raises(KeyboardInterrupt):
            engines._in_folder(str(tmp_path), task, "written")
    finally:
        os.chdir(folder)
    assert (tmp_path / "written").exists()
    assert signal.getsignal(signal.SIGINT) is before


def note(place):
    """Leave a file; once it is interrupted, another one."""
    try:
        place.with_suffix(".begun").touch()  # the interrupt may come at once
        while True:  # in steps, as a training: Ray waits for the interpreter
            time.sleep(0.05)
    except KeyboardInterrupt:
        place.with_suffix(".ended").touch()
        raise


@pytest.mark.filterwarnings("ignore")  # of Ray's own
def test_sigterm_ends_tasks_of_ray_before_this_process(tmp_path, ray_of_one_core):
    """Ray's own handler would end Ray, and this process before it has entered what is done."""
    ray_of_one_core.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    before = signal.getsignal(signal.SIGTERM)
    calls = {
        "short": engines.Call(os.getcwd, ()),
        "long": engines.Call(note, (tmp_path / "long",)),
        "waiting": engines.Call(note, (tmp_path / "waiting",)),
    }

    def send():
        while not (tmp_path / "long.begun").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    ended = []
    thread = threading.Thread(target=send)
    thread.start()
    with (
        pytest.raises(KeyboardInterrupt),
        contextlib.closing(engines.run(calls, "ray")) as running,
    ):
        ended.extend(running)
    thread.join()
    assert ended == [("short", "")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.begun", "long.ended"]
    assert signal.getsignal(signal.SIGTERM) == before
