"""The command line: what it prints where, its exit codes, and that it is the public API."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import click
import click.testing
import keras
import numpy as np
import pytest
from helpers import FLAVOURS, TINY, conv_model, images

import tscnc_cli
import tscnc_tf as tscnc
from tscnc_tf._reports import jsonable
from tscnc_tf.experiments import Recipe

MODELS = ["keras.keras", "keras.h5", "tf_keras.keras", "tf_keras.h5"]


def test_the_scopes_are_those_of_pruning():
    (scope,) = [each for each in tscnc_cli.main.commands["prune"].params if each.name == "scope"]
    assert tuple(scope.type.choices) == tscnc.pruning.scopes.SCOPES


def call(*words):
    """Call the command in this process; return its exit code, stdout and stderr."""
    result = click.testing.CliRunner().invoke(tscnc_cli.main, [str(word) for word in words])
    return result.exit_code, result.stdout, result.stderr


def as_json(*words):
    code, out, err = call(*words, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with models of both Kerases, and their data."""
    folder = tmp_path_factory.mktemp("cli")
    for name in MODELS:
        tscnc_cli._save(conv_model(FLAVOURS[name.partition(".")[0]]), folder / name)
    (x, y), (x_test, y_test) = images(96), images(24, seed=1)
    np.savez(folder / "data.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    return folder


def load(path):
    return tscnc_cli._load(path)


# Streams and exit codes


def test_help_is_fast_and_the_module_is_a_command():
    """No TensorFlow for help, usage errors and the version; in a process of its own."""
    code = (
        "import sys, click.testing, tscnc_cli\n"
        "for words in (['--help'], ['prune', '--help'], ['--version'], ['prune'], ['nothing']):\n"
        "    result = click.testing.CliRunner().invoke(tscnc_cli.main, words)\n"
        "    print(result.exit_code)\n"
        "assert not {'tensorflow', 'keras', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout.split() == ["0", "0", "0", "2", "2"], done.stderr


def test_stdout_holds_json_alone_in_a_process_of_its_own(here):
    command = [sys.executable, "-m", "tscnc_tf", "inspect", here / "keras.keras", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {"sparsity", "condition_numbers", "sizes"}


def test_what_libraries_print_goes_to_stderr(capfd, here, monkeypatch):
    def loud(model):
        sys.stdout.write("in Python\n")
        os.write(1, b"below Python\n")
        return inspect(model)

    inspect = tscnc.inspection.sparsity
    monkeypatch.setattr(tscnc.inspection, "sparsity", loud)
    tscnc_cli.main(["inspect", str(here / "keras.keras"), "--json"], standalone_mode=False)
    out, err = capfd.readouterr()
    assert "in Python" in err
    assert "below Python" in err
    assert set(json.loads(out)) == {"sparsity", "condition_numbers", "sizes"}


@pytest.mark.parametrize("name", ["run", "evaluate", "inspect", "prune", "compact", "export"])
def test_every_command_has_help_with_an_example(name):
    code, out, _ = call(name, "--help")
    assert code == 0
    assert f"\n  tscnc {name} " in out
    assert "--json" in out


def test_the_version_is_that_of_the_package():
    assert call("--version") == (0, f"tscnc, version {tscnc.__version__}\n", "")


EXPORT = ["export", "HERE/keras.keras", "--output", "x", "--format"]


EVALUATE = ["evaluate", "HERE/keras.keras", "--epsilon", "0.1"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["evaluate", "none.keras", "digits"], 2, "'none.keras' does not exist"),
        (["evaluate", "HERE/keras.keras", "digits", "--epsilon", "8/0"], 2, "epsilon must be a"),
        (["evaluate", "HERE/keras.keras", "digits", "--epsilon", "x"], 2, "neither a number nor"),
        (["evaluate", "HERE/keras.keras", "digits"], 2, "Missing option '--epsilon'"),
        ([*EVALUATE, "digits", "--steps", "3"], 2, "--steps is for --attack"),
        (
            [*EVALUATE, "digits", "--attack", "apgd", "--objective", "dlr"],
            2,
            "--objective is for --attack pgd or --attack fgsm, got --attack apgd",
        ),
        (
            [*EVALUATE, "digits", "--attack", "pgd", "--version", "plus"],
            2,
            "--version is for --attack autoattack, got --attack pgd",
        ),
        ([*EVALUATE, "nothing"], 1, "there is nothing at that path"),
        (
            ["evaluate", "HERE/data.npz", "digits", "--epsilon", "0.1"],
            1,
            "data.npz is not a model in a .keras or",
        ),
        (["inspect", "HERE"], 1, "ValueError: "),
        (["inspect", "EXPERIMENT"], 1, "holds a whole experiment: open one of its stages, 1-tr"),
        (["prune", "HERE/keras.keras", "--sparsity", "1", "--output", "x.keras"], 2, "0<=x<1"),
        (["prune", "HERE/keras.keras", "--sparsity", "0.5", "--output", "x"], 2, "must end in .k"),
        (
            ["prune", "HERE/keras.keras", "--sparsity", "0.5", "--output", "HERE/tf_keras.h5"],
            1,
            "tf_keras.h5 exists already: pass --overwrite",
        ),
        (
            ["export", "HERE/keras.keras", "--format", "onnx", "--output", "HERE/data.npz"],
            1,
            "data.npz exists already: pass --overwrite",
        ),
        (
            [*EXPORT, "onnx", "--precision", "int8"],
            2,
            "are for --format litert only",
        ),
        (
            [*EXPORT, "litert", "--precision", "int8"],
            2,
            "need each other",
        ),
        (["run", "smoke"], 2, "Missing option '--output'"),
        (["run", "smoke", "--output", "x", "--train.epoch", "3"], 2, "--train.epochs"),
        (["run", "smoke", "--output", "x", "--train.epochs", "0"], 2, "train.epochs must be >= 1"),
        (["run", "smoke", "--output", "x", "--train.epochs", "[0"], 2, "--train.epochs is not Y"),
        (["run", "nothing.yaml", "--output", "x"], 1, "nothing.yaml"),
        (["run", "smoke", "--output", "x", "--prune.layers", "no_*"], 1, "ValueError: prune: "),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    here, finished, monkeypatch, tmp_path, words, code, message
):
    monkeypatch.chdir(tmp_path)
    text = "\0".join(words).replace("HERE", str(here)).replace("EXPERIMENT", str(finished))
    got, out, err = call(*text.split("\0"))
    assert (got, out) == (code, "")
    assert message in err
    assert "Traceback" not in err
    assert code == 2 or err.startswith("Error: ")
    assert code == 2 or err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# Commands


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_pruned_compacted_inspected_and_exported(here, tmp_path, name):
    suffix = name.rpartition(".")[2]
    pruned, small = tmp_path / f"pruned.{suffix}", tmp_path / f"small.{suffix}"
    options = ["--sparsity", 0.5, "--filters", "--layers", "conv*", "--output", pruned]
    report = as_json("prune", here / name, *options)
    assert {row["name"]: row["zeros"] for row in report["rows"]} == {"conv": 27, "logits": 0}
    assert (report["sparsity"], report["path"]) == (0.5, str(pruned))
    assert call("prune", here / name, *options)[0] == 1
    assert call("prune", here / name, *options, "--overwrite")[0] == 0
    smaller = as_json("compact", pruned, "--output", small)
    assert smaller["parameters_after"] < smaller["parameters_before"]
    x = images(4)[0]
    np.testing.assert_allclose(load(small)(x), load(pruned)(x), atol=1e-5)
    shown = as_json("inspect", pruned)
    assert shown["sparsity"] == tscnc.inspection.sparsity(load(pruned)).to_dict()
    assert shown["condition_numbers"]["dead_filters"] == 3
    code, text, _ = call("inspect", small)
    assert code == 0
    assert text.rstrip("\n") == "\n\n".join(
        str(report(load(small)))
        for report in (
            tscnc.inspection.sparsity,
            tscnc.inspection.condition_numbers,
            tscnc.inspection.sizes,
        )
    )
    served = as_json("export", small, "--format", "saved_model", "--output", tmp_path / "served")
    assert as_json("inspect", tmp_path / "served") == served
    np.testing.assert_allclose(load(tmp_path / "served")(x), load(small)(x), atol=1e-5)


def test_a_sparse_file_is_written(tmp_path):
    layers = keras.layers
    conv, logits = layers.Conv2D(64, 3, name="conv"), layers.Dense(3, name="logits")
    model = keras.Sequential([keras.Input((8, 8, 4)), conv, layers.Flatten(), logits])
    tscnc_cli._save(tscnc.prune_now(model, 0.9, layers="conv"), tmp_path / "pruned.keras")
    pruned, words = tmp_path / "pruned.keras", ("--format", "litert", "--output")
    dense = as_json("export", pruned, *words, tmp_path / "dense.tflite")
    sparse = as_json("export", pruned, "--sparse", *words, tmp_path / "sparse.tflite")
    assert {kernel["stored"] for kernel in dense["kernels"]} == {"dense"}
    assert "dense on loading" in {kernel["stored"] for kernel in sparse["kernels"]}
    assert sparse["file_bytes"] < 0.85 * dense["file_bytes"]  # most of the rest are the logits
    assert sparse["dense_bytes"] == pytest.approx(dense["file_bytes"], rel=0.01)


def test_files_of_other_formats_are_evaluated_on_what_fools_their_source(here, tmp_path):
    model, data = here / "keras.keras", here / "data.npz"
    exports = {
        tmp_path / "m.onnx": ["--format", "onnx"],
        tmp_path / "m.tflite": ["--format", "litert", "--precision", "int8", "--calibration", data],
    }
    attack = ["--attack", "pgd", "--epsilon", "0.1", "--steps", 2, "--restarts", 1]
    for path, options in exports.items():
        as_json("export", model, *options, "--output", path)
        report = as_json("evaluate", path, data, "--source", model, *attack)
        assert report["examples"] == 24
        assert "PGD-2 linf 0.1 from" in report["attacks"][0]["name"]
    shown = as_json("inspect", tmp_path / "m.tflite")
    nothing = {"rows": [], "obstacles": [], "faults": []}
    assert shown["sparse_inference"] == nothing  # it has no 1x1 convolutions
    assert shown["sizes"]["file_bytes"] == (tmp_path / "m.tflite").stat().st_size
    assert {row["dtype"] for row in shown["sizes"]["rows"]} == {"int8"}
    # Without a source, AutoAttack does what it can do without gradients.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tscnc.EvaluationWarning)
        report = as_json("evaluate", path, data, "--epsilon", "0.3", "--examples", 4)
    assert [part["name"] for part in report["attacks"][0]["attacks"]] == ["Square-5000 linf 0.3"]
    assert any(text.startswith("no-gradient: ") for text in report["warnings"])


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ((), ["AutoAttack-standard linf 0.1 from keras", "Square-5000 linf 0.1"]),
        (("--attack", "fgsm", "--no-diagnose"), ["FGSM linf 0.1 from keras"]),
    ],
)
def test_with_a_source_square_runs_on_the_model_itself(words, names, here, monkeypatch):
    given = {}

    def evaluated(model, x, y, attacks, **options):
        given.update(options, names=[attack.name for attack in attacks])
        raise ValueError("enough")

    monkeypatch.setattr(tscnc, "evaluate_robustness", evaluated)
    model, data = here / "keras.keras", here / "data.npz"
    code, _, err = call("evaluate", model, data, "--source", model, "--epsilon", "0.1", *words)
    assert code == 1 and "enough" in err
    assert [re.sub("from .*", "from keras", name) for name in given["names"]] == names
    assert given["diagnose"] is (False if words else None)


def test_an_evaluation_goes_on_from_its_state(here, tmp_path):
    model, data, state = here / "keras.keras", here / "data.npz", tmp_path / "state.json"
    words = ["evaluate", model, data, "--attack", "apgd", "--epsilon", "0.3", "--state", state]
    words += ["--examples", 8]
    report = as_json(*words)
    x, y = tscnc.datasets.load(data).subset(n_test=8).arrays("test")
    attacks = tscnc.attacks.AutoAttack(epsilon=0.3).attacks[:2]
    again = tscnc.evaluate_robustness(load(model), x, y, attacks).to_dict()
    assert without_seconds(report) == without_seconds(again)
    before = state.read_bytes()
    assert without_seconds(as_json(*words)) == without_seconds(report)
    assert state.read_bytes() == before, "nothing was run again"
    code, _, err = call(*words, "--seed", 1)
    assert code == 1
    assert "is of another evaluation" in err


@pytest.mark.parametrize(
    ("names", "options", "made"),
    [
        (["autoattack"], {}, [tscnc.attacks.AutoAttack(epsilon="8/255", norm="l2")]),
        (
            ["autoattack", "fgsm"],
            {"version": "plus", "objective": "dlr"},
            [
                tscnc.attacks.AutoAttack(epsilon="8/255", norm="l2", version="plus"),
                tscnc.attacks.FGSM(epsilon="8/255", norm="l2", objective="dlr"),
            ],
        ),
        (
            ["apgd"],
            {},
            [
                tscnc.attacks.APGD(epsilon="8/255", norm="l2", loss=loss)
                for loss in ("ce", "targeted_dlr")
            ],
        ),
        (["pgd"], {}, [tscnc.attacks.PGD(epsilon="8/255", norm="l2", steps=50, restarts=5)]),
    ],
)
def test_the_attacks_by_their_names(names, options, made):
    assert tscnc_cli._attacks(tuple(names), "8/255", "l2", options) == made


def test_without_options_the_attack_is_autoattack(here):
    words = [str(here / "keras.keras"), "digits", "--epsilon", "8/255"]
    with tscnc_cli.evaluate.make_context("evaluate", words) as context:
        values = dict(context.params)
    options = {name: values[name] for name in tscnc_cli._OWNERS}
    made = tscnc_cli._attacks(values["attacks"], values["epsilon"], values["norm"], options)
    assert made == [tscnc.attacks.AutoAttack(epsilon="8/255")]


def test_a_stage_is_evaluated_on_the_parts_of_its_experiment(finished):
    stage = finished / "3-finetune"
    data = tscnc_cli._dataset("digits", stage)
    manifest = tscnc.experiments.open_stage(stage).manifest
    assert data.fingerprint == manifest["data"]["fingerprint"]
    of_file = tscnc_cli._dataset("digits", stage / "model.keras")
    assert of_file.fingerprint == data.fingerprint
    elsewhere = tscnc_cli._dataset("digits", finished.parent / "model.keras")
    assert elsewhere.fingerprint == tscnc.datasets.load("digits").fingerprint != data.fingerprint


def test_the_same_data_at_another_path_have_the_parts_of_the_experiment(tmp_path):
    rng = np.random.default_rng(0)
    y = np.tile(np.arange(10), 40)
    x = rng.integers(0, 256, (400, 8, 8, 1), np.uint8)
    for name in ("mine", "same"):
        np.savez(tmp_path / f"{name}.npz", x_train=x, y_train=y, x_test=x[:60], y_test=y[:60])
    np.savez(tmp_path / "new.npz", x_train=x[::-1], y_train=y[::-1], x_test=x[:60], y_test=y[:60])
    own = {"data.dataset": str(tmp_path / "mine.npz"), "data.validation": 0.3, "train.epochs": 1}
    own |= {"data.train_examples": None, "data.test_examples": None, "seed": 3}
    recipe = Recipe.from_dict(TINY).override(own)
    folder = tscnc.experiments.run(recipe, tmp_path / "run", until="train", progress=False)
    stage = folder / "1-train"
    theirs = tscnc.experiments.open_stage(stage).manifest["data"]["fingerprint"]
    same, new = (tscnc_cli._dataset(str(tmp_path / f"{n}.npz"), stage) for n in ("same", "new"))
    assert same.fingerprint == theirs
    assert new.fingerprint == tscnc.datasets.load(tmp_path / "new.npz").fingerprint


def test_samples_have_all_classes_of_a_sorted_file(here, tmp_path):
    y = np.repeat([0, 1, 2], 40)
    x = np.tile(y[:, None, None, None] / 2, (1, 6, 6, 1)).astype("float32")
    np.savez(tmp_path / "sorted.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    images = tscnc_cli._some_images(str(tmp_path / "sorted.npz"), here / "keras.keras", 9)
    assert np.bincount((2 * images[:, 0, 0, 0]).astype(int)).tolist() == [3, 3, 3]
    words = ["evaluate", here / "keras.keras", here / "data.npz", "--epsilon", "0.1"]
    code, _, err = call(*words, "--examples", 25)
    assert (code, err.splitlines()[-1]) == (
        2,
        "Error: --examples: n_test must be from 0 to 24, got 25.",
    )


def test_only_some_attacks_have_l1():
    made = tscnc_cli._attacks(("autoattack",), 3.0, "l1", {})
    assert made == [tscnc.attacks.AutoAttack(epsilon=3.0, norm="l1")]
    with pytest.raises(click.UsageError, match="norm must be one of 'linf', 'l2', got 'l1'"):
        tscnc_cli._attacks(("pgd",), 3.0, "l1", {})


def without_seconds(values):
    """Return JSON values without what took how long."""
    if isinstance(values, dict):
        return {key: without_seconds(each) for key, each in values.items() if key != "seconds"}
    return [without_seconds(each) for each in values] if isinstance(values, list) else values


def test_an_evaluation_is_that_of_evaluate_robustness(here, tmp_path):
    model, data = here / "tf_keras.keras", here / "data.npz"
    file = tmp_path / "report.json"
    words = ["--attack", "pgd", "--attack", "fgsm", "--epsilon", "8/255", "--steps", 3]
    words += ["--restarts", 2, "--step-size", 0.02, "--objective", "margin", "--examples", 20]
    report = as_json("evaluate", model, data, *words, "--seed", 3, "--output", file)
    x, y = tscnc.datasets.load(data).subset(n_test=20).arrays("test")
    ball = {"epsilon": "8/255", "objective": "margin"}
    again = tscnc.evaluate_robustness(
        load(model),
        x,
        y,
        [
            tscnc.attacks.PGD(**ball, steps=3, restarts=2, step_size=0.02),
            tscnc.attacks.FGSM(**ball),
        ],
        seed=3,
    ).to_dict()
    assert report == json.loads(file.read_text())
    assert without_seconds(report) == without_seconds(again)
    code, _, err = call("evaluate", model, data, "--epsilon", "0.1", "--output", file)
    assert (code, "report.json exists already" in err) == (1, True)


def test_a_run_continues_and_shows_what_came_out(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    recipe = json.loads((folder / "recipe.json").read_text())
    (tmp_path / "mine.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    words = [tmp_path / "mine.yaml", "--output", folder, "--train.batch-size", 64]
    found = as_json("run", *words)
    assert found["folder"] == str(folder)
    assert found["report"] == json.loads((folder / "4-evaluate" / "report.json").read_text())
    stages = {name: tscnc.experiments.open_stage(folder / name) for name in found["stages"]}
    assert list(stages) == ["1-train", "2-prune", "3-finetune"]
    for name, stage in stages.items():
        assert found["stages"][name] == jsonable(stage.chosen)
        assert stage.chosen["epoch"] == stage.manifest["chosen_epoch"]
    code, text, _ = call("run", *words)
    assert code == 0
    for shown in (*stages.values(), (folder / "4-evaluate" / "report.txt").read_text()):
        assert str(shown) in text
    code, _, err = call("run", *words, "--seed", 1)
    assert (code, "by another recipe" in err) == (1, True)
    zeros = as_json("inspect", folder / "3-finetune")["sparsity"]
    assert zeros == tscnc.inspection.sparsity(stages["3-finetune"].model).to_dict()


# Recipes


def recipe_of(*words):
    """Return the recipe that the flags of `run` make."""
    words = [str(word) for word in words]
    above = click.Context(tscnc_cli.main, **tscnc_cli.main.context_settings)
    with tscnc_cli.run.make_context("run", [*words, "--output", "x"], parent=above) as context:
        values = dict(context.params)
    for name in ("as_json", "output", "dense"):
        del values[name]
    return tscnc_cli._recipe(values.pop("recipe"), values.pop("baseline"), values)


def test_every_value_of_a_recipe_has_a_flag():
    method = Recipe.from_yaml("paper")
    assert recipe_of("paper") == method
    for name, default in Recipe.leaves():
        text = json.dumps(jsonable(default))
        assert recipe_of("paper", f"--{name}", text) == method.override({name: default}), name


def test_flags_override_the_recipe(tmp_path):
    words = "--dataset mine.npz --architecture wrn-28-4 --sparsity 0.95 --train.learning-rate 1e-3"
    words += " --prune.layers [stage_1*,stage_2*] --baseline --evaluate.epsilon 4/255"
    recipe = recipe_of("paper", *words.split())
    assert recipe.data.dataset == "mine.npz"
    assert recipe.network.architecture == "wrn-28-4"
    assert (recipe.sparsity, recipe.train.learning_rate) == (0.95, 0.001)
    assert recipe.prune.layers == ["stage_1*", "stage_2*"]
    assert recipe.evaluate.epsilon == "4/255"
    assert recipe.constraints.condition_factor == 0.0
    pattern = recipe_of("paper", "--prune.layers", "*conv*")
    assert pattern == Recipe.from_yaml("paper").override({"prune.layers": "*conv*"})
    assert recipe_of("--sparsity", "0.9") == Recipe.from_yaml("recommended").override(
        {"sparsity": 0.9}
    )
    named = recipe_of("smoke", "--name", "2024", "--adversary.step_size", "1e-2")
    assert (named.name, named.adversary.step_size) == ("2024", "1e-2")
    with pytest.raises(FileNotFoundError, match=r"recipes by name are cpu, paper, recomm"):
        recipe_of("typo")
    (tmp_path / "mine.yaml").write_text("base: smoke\ntrain: {batch_size: 7}\n")
    mine = recipe_of(tmp_path / "mine.yaml", "--train.epochs", "9")
    assert (mine.train.epochs, mine.train.batch_size, mine.data.dataset) == (9, 7, "digits")


def test_every_flag_is_described():
    code, out, _ = call("run", "--help")
    assert code == 0
    for option in tscnc_cli._recipe_flags():
        assert len(option.help.partition("  [")[0]) > 8, option.name
        assert option.opts[0] in out


@pytest.mark.parametrize("command", ["sweep {}", "run --sweep {}", "run --sweep={}"])
def test_a_sweep_is_run_and_its_failures_are_errors(command, tmp_path, monkeypatch):
    file = tmp_path / "sweep.yaml"
    file.write_text("recipes: {a: smoke, b: smoke}\nseeds: [0, 3]\n")
    seen = {}

    def sweep(plan, folder, **options):
        seen.update(places=[run.place for run in plan.runs()], folder=folder, options=options)
        row = {"name": "a", "seed": 0, "folder": "a/seed-0", "clean": 0.9, "robust": 0.5}
        row |= {"zeros": 0.99, "condition_number": 2.5, "dead_filters": 0}
        return tscnc.experiments.SweepReport(folder, (row,), failed)

    monkeypatch.setattr(tscnc.experiments, "sweep", sweep)
    failed = {}
    options = ("--output", tmp_path / "out", "--engine", "ray", "--cpus", 2)
    words = (*command.format(file).split(), *options)
    found = as_json(*words)
    assert found["rows"][0]["robust"] == 0.5
    assert seen == {
        "places": ["a/seed-0", "a/seed-3", "b/seed-0", "b/seed-3"],
        "folder": tmp_path / "out",
        "options": {"engine": "ray", "cpus": 2, "gpus": 0.0},
    }
    failed = {"b/seed-0": "ValueError: no", "b/seed-3": "OSError: not even that"}
    code, _, err = call(*words)
    assert (code, err) == (
        1,
        "Error: ValueError: 2 runs have failed, 1 are complete. Failed: b/seed-0: ValueError: no; "
        "b/seed-3: OSError: not even that\n",
    )


def test_a_sweep_by_run_has_the_options_of_sweep(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("recipes: {a: smoke}\n")
    code, out, _ = call("run", "--sweep", "--help")
    assert code == 0
    assert "--engine" in out and "--train.epochs" not in out
    for wrong, words in (
        (("--sweep", file, "--baseline"), "--baseline"),
        (("smoke", "--sweep", file), "Path 'smoke' does not exist"),
        (("--sweep",), "Missing argument 'SWEEP'"),
    ):
        code, _, err = call("run", *wrong, "--output", tmp_path / "out")
        assert code == 2
        assert words in err
