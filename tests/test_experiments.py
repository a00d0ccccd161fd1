"""Recipes and experiments: what they accept, that they go on after a kill, what they leave."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import filelock
import numpy as np
import pytest
import tensorflow as tf
import yaml
from helpers import TINY

import tscnc_tf as tscnc
from tscnc_tf._keras import masks
from tscnc_tf.experiments import fitting, folders, locks, runner, stages
from tscnc_tf.experiments.recipe import SHIPPED, Recipe

# Recipes


def test_defaults_are_the_figures_of_the_authors():
    recipe = Recipe()
    assert recipe.adversary.epsilon == "8/255"
    assert (recipe.adversary.steps, recipe.adversary.step_size) == (10, 0.0069)
    train = recipe.train
    assert (train.epochs, train.batch_size, train.learning_rate) == (200, 128, 0.1)
    assert [round(train.epochs * drop) for drop in train.drops] == [60, 120, 160]
    assert (train.drop, train.momentum, train.average) == (0.2, 0.9, 0.99)
    assert (train.loss, train.beta) == ("trades", 6.0)
    assert (recipe.prune.method, recipe.prune.epochs) == ("scores", 20)
    assert recipe.finetune.learning_rate == 0.01
    assert recipe.evaluate.attack == "autoattack"


def test_a_recipe_survives_json():
    recipe = Recipe.from_dict(TINY)
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe


@pytest.mark.parametrize("part", ["train", "prune", "data"])
def test_parts_of_a_recipe_are_no_dicts(part):
    with pytest.raises(
        TypeError, match=rf"{part} must be of .*: nested dicts are for Recipe\.from"
    ):
        Recipe(**{part: {}})


# 10 lists of 10 aliases each: 10^10 values in 400 bytes.
BILLION = "name: [&a0 [x], " + ", ".join(
    f"&a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 11)
)
BILLION = f"{BILLION}]".encode()


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (b"base: 3", TypeError, "base must be the name of a file or a list of them, got 3"),
        (b"name: \xff", ValueError, "mine.yaml is not YAML: it is not text in UTF-8"),
        (b"base: none.yaml", FileNotFoundError, "none.yaml"),
        (b"", ValueError, "mine.yaml is empty, or was cut off"),
        (b"# nothing", ValueError, "mine.yaml is empty, or was cut off"),
        (b"name: 2026-13-13", ValueError, "mine.yaml is not YAML: month must be in"),
        (b"seed: 1\nname: a\nseed: 2", ValueError, "yaml has seed twice, in line 1 and in line 3"),
        (b"train: {epochs: 1, epochs: 1}", ValueError, "has train.epochs twice, in line 1 and"),
        (b"train: {epochs: 1}\n\ntrain: {drop: 0.1}", ValueError, "has train twice, .* line 3"),
        (
            b"prune:\n  scope:\n    '*': 0.1\n    \"*\": 0.2",
            ValueError,
            "has prune.scope.\\* twice",
        ),
        (b"a: [{b: 1, c: 2, b: 3}]", ValueError, "has a.b twice"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, content, kind, words):
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(kind, match=words):
        Recipe.from_yaml(tmp_path / "mine.yaml")


@pytest.mark.strangers
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name: !!python/object/apply:os.mkdir [made]", "is not YAML: could not determine a cons"),
        (b"[" * 3000, "can't be read: its values are nested too deeply"),
        (BILLION, "can't be read: it has more than 10,000 values"),
        (b"name: &a [*a]", "an alias that contains itself"),
    ],
)
def test_a_file_that_would_do_harm_is_no_recipe(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("mine.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        Recipe.from_yaml("mine.yaml")
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.yaml"]


def test_what_lacks_is_default_and_text_of_a_number_is_one():
    recipe = Recipe.from_dict({"train": {"learning_rate": "1e-3"}})  # YAML 1.1 takes it for text
    assert recipe.train.learning_rate == 0.001
    assert recipe.train.epochs == Recipe().train.epochs


def test_a_value_may_stand_in_an_anchor_and_be_given_again(tmp_path):
    text = "train: &all {epochs: 3, batch_size: 7}\nfinetune: {<<: *all, epochs: 5}\n"
    (tmp_path / "mine.yaml").write_text(text + "prune: {<<: *all, method: magnitude}\n")
    recipe = Recipe.from_yaml(tmp_path / "mine.yaml")
    assert (recipe.train.epochs, recipe.prune.epochs, recipe.finetune.epochs) == (3, 3, 5)
    assert recipe.finetune.batch_size == 7


@pytest.mark.parametrize("name", ["vgg-16 99 %", "größe", "a.b_c", ".hidden", "...", "x" * 200])
def test_names_that_lead_nowhere_else(name, tmp_path):
    assert (tmp_path / Recipe(name=name).name).parent == tmp_path


def test_overriding_changes_that_value_only():
    recipe = Recipe.from_dict(TINY)
    other = recipe.override({"train.epochs": 7, "sparsity": 0.5})
    assert (other.train.epochs, other.sparsity) == (7, 0.5)
    assert other.override({"train.epochs": 2, "sparsity": 0.9}) == recipe


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("paper", ["AutoAttack-standard linf 8/255"]),
        ("cpu", ["APGD-100 linf 8/255", "APGD-100 linf 8/255 targeted_dlr"]),
        ("smoke", ["APGD-100 linf 0.1", "APGD-100 linf 0.1 targeted_dlr"]),
    ],
)
def test_the_attacks_of_the_shipped_recipes(recipe, names):
    attacks = stages.test_attacks(Recipe.from_yaml(recipe))
    assert [attack.name for attack in attacks] == names


def test_the_attack_on_the_test_set_is_nothing_to_the_first_stage():
    recipe = Recipe.from_dict(TINY)
    for name, value in (("attack", "autoattack"), ("steps", 7), ("restarts", 3)):
        assert recipe.override({f"evaluate.{name}": value}).first_stage() == recipe.first_stage()
    other = recipe.override({"evaluate.validation_steps": 9})
    assert other.first_stage() != recipe.first_stage()


def test_names_of_dense_networks_stay_as_they_were():
    assert Recipe(name="x").dense_name() == "98c35d8a-seed0"
    assert Recipe.from_yaml("paper").dense_name() == "bcf51582-seed0"


def test_gates_of_another_shape_are_another_first_stage():
    gated = {"gates": {"sparsity_factor": 1.0}, "constraints": {"stages": ["finetune"]}}
    recipe = Recipe.from_dict({**TINY, **gated})
    other = recipe.override({"constraints.a": 1e-3})
    assert other.first_stage() != recipe.first_stage()
    assert other.baseline().first_stage() == recipe.baseline().first_stage()


def test_the_baseline_has_no_constraints_and_is_otherwise_the_same():
    recipe = Recipe.from_dict({**TINY, "gates": {"sparsity_factor": 1e-3}})
    base = recipe.baseline()
    assert base.constraints.condition_factor == base.constraints.sparsity_factor == 0.0
    assert base.gates.sparsity_factor == 0.0
    assert base.train == recipe.train


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        ({"sparsity": 1.0}, ValueError, "sparsity must be < 1, got 1.0"),
        ({"train": {"epoch": 3}}, ValueError, "did you mean train.epochs"),
        ({"train": {"epochs": 0}}, ValueError, "train.epochs must be >= 1, got 0"),
        ({"train": 3}, TypeError, "train must be a mapping of names to values, got 3"),
        ({"train": {"loss": "rslad"}}, ValueError, "train.loss must be one of 'trades'"),
        ({"adversary": {"epsilon": "8/0"}}, ValueError, "adversary.epsilon must be a number or"),
        ({"network": {"architecture": "lenet"}}, ValueError, "'small-cnn'.*got 'lenet'"),
        ({"constraints": {"stages": ["test"]}}, ValueError, "stages must be one of 'train'"),
        ({"prune": {"method": "luck"}}, ValueError, "prune.method must be one of 'scores'"),
        ({"prune": {"scope": "kappa"}}, ValueError, "prune.scope must be one of 'layer'"),
        ({"prune": {"min_per_filter": -1}}, ValueError, "prune.min_per_filter must be >= 0"),
        ({"prune": {"structure": "rows"}}, ValueError, "prune.structure must be of weights, filt"),
        ({"prune": {"structure": {"block": 4}}}, ValueError, "structure.block must be two integ"),
        ({"prune": {"structure": {"nm": [4, 2]}}}, ValueError, "structure.nm: m must be >= 5"),
        ({"prune": {"structure": {"rows": [4, 2]}}}, ValueError, "structure must be of weights"),
        (
            {"prune": {"structure": "filters", "min_per_filter": 1}},
            ValueError,
            "min_per_filter must be 0 with structure='filters'",
        ),
        ({"prune": {"regrowth": 0.3}}, TypeError, "prune.regrowth must be a mapping of names"),
        ({"prune": {"regrowth": {"share": 0.3}}}, ValueError, r"prune.regrowth must have names of"),
        ({"prune": {"regrowth": {"until": 2}}}, ValueError, "prune.regrowth: until must be <= 1"),
        ({"prune": {"regrowth": {}}}, ValueError, "prune.regrowth must be null with method='sco"),
        *(
            ({"prune": {"method": "magnitude", **values}}, ValueError, "is for method='scores'")
            for values in ({"scope": "learned"}, {"perturb_scores": 0.1})
        ),
        ({"prune": {"perturb_scores": 0.1, "awp": 0.01}}, ValueError, "prune.awp must be 0 with"),
        ({"name": 3}, TypeError, "name must be text, got 3"),
        ({"evaluate": {"attack": "fgsm"}}, ValueError, "evaluate.attack must be one of 'pgd'"),
        *(
            ({"name": name}, ValueError, "name must be usable as the name of a file or folder, got")
            for name in ("", " ", ".", "..", "../../x", "/x", "a/b", "a\\b", "C:x", "a\nb", "a/")
        ),
        ({"data": {"image_size": 16}}, TypeError, "data.image_size must be a pair .* got 16"),
        ({"data": {"image_size": [16]}}, TypeError, r"data.image_size must be a pair .* \[16\]"),
        ({"prune": {"scope": {}}}, ValueError, "prune.scope must name at least one pattern"),
        ({"data": {"augment": "rotate"}}, ValueError, "data.augment must be one of 'none'"),
        ({"data": {"validation": 2.5}}, ValueError, "data.validation must be < 1, got 2.5"),
        ({"constraints": {"form": "foo"}}, ValueError, "constraints.form must be one of"),
        ({"constraints": {"a": -1}}, ValueError, "constraints.a must be > 0, got -1"),
        ({"gates": {"drop_rate": 3}}, ValueError, "gates.drop_rate must be < 1, got 3"),
        ({"prune": {"layers": 3}}, TypeError, "prune.layers must be a name pattern or a list"),
        ({"prune": {"scope": {"*": 7}}}, ValueError, r"prune.scope\['\*'\] must be < 1, got 7"),
        ({"finetune": {"drops": [0.6, 0.3]}}, ValueError, "finetune.drops must rise"),
        (
            {"sparsity": 0.0, "prune": {"scope": "condition"}},
            ValueError,
            "sparsity must be > 0 with prune.scope='condition'",
        ),
    ],
)
def test_a_bad_recipe_is_refused_by_name(values, kind, words):
    with pytest.raises(kind, match=words):
        Recipe.from_dict(values)


def test_an_unknown_override_is_refused():
    with pytest.raises(ValueError, match=r"did you mean train\.epochs"):
        Recipe().override({"train.epoch": 3})
    with pytest.raises(ValueError, match="is not a value of a recipe"):
        Recipe().override({"sparsity.more": 3})
    with pytest.raises(ValueError, match=r"train is a section.*such as train\.epochs"):
        Recipe().override({"train": {"epochs": 3}})  # all others would be the defaults again
    for values in (None, {1: 2}):
        with pytest.raises(TypeError, match="values must map names"):
            Recipe().override(values)
    with pytest.raises(TypeError, match=r"path must be a path, got 1\.5"):
        Recipe.from_yaml(1.5)


def test_data_are_read_again_in_the_same_process(tmp_path, rng):
    chosen = Recipe.from_dict({"data": {"dataset": str(tmp_path / "images.npz")}})
    found = []
    for _ in range(2):
        x = rng.random((60, 8, 8, 1)).astype("float32")
        labels = np.arange(60) % 3
        np.savez(tmp_path / "images.npz", x_train=x, y_train=labels, x_test=x, y_test=labels)
        found.append(stages.dataset(chosen).arrays("test")[0])
        np.testing.assert_array_equal(found[-1], x)
    assert np.any(found[0] != found[1])


def test_files_are_based_on_files(tmp_path):
    (tmp_path / "low.yaml").write_text("seed: 3\ntrain: {epochs: 5, batch_size: 7}\n")
    (tmp_path / "mid.yaml").write_text("train: {epochs: 6}\n")
    (tmp_path / "top.yaml").write_text("base: [low.yaml, mid.yaml]\nsparsity: 0.5\n")
    recipe = Recipe.from_yaml(tmp_path / "top.yaml")
    assert (recipe.seed, recipe.sparsity) == (3, 0.5)
    assert (recipe.train.epochs, recipe.train.batch_size) == (6, 7)
    (tmp_path / "low.yaml").write_text("base: top.yaml\n")
    with pytest.raises(ValueError, match="is based on itself"):
        Recipe.from_yaml(tmp_path / "top.yaml")
    (tmp_path / "low.yaml").write_text("seed: [\n")
    with pytest.raises(ValueError, match=r"low\.yaml is not YAML"):
        Recipe.from_yaml(tmp_path / "top.yaml")
    (tmp_path / "low.yaml").write_text("sparsity: 3\n")
    with pytest.raises(ValueError, match=r"low\.yaml: sparsity must be < 1"):
        Recipe.from_yaml(tmp_path / "low.yaml")


@pytest.mark.parametrize(
    ("section", "below", "above"),
    [
        (
            "prune",
            "method: magnitude, regrowth: {fraction: 0.5, criterion: random}",
            "method: magnitude, regrowth: {}",
        ),
        ("prune", "scope: {'stage_*': 0.8}", "scope: {'stage_1*': 0.5, 'stage_2*': 0.9}"),
        ("prune", "structure: {nm: [2, 4]}", "structure: {block: [4, 1]}"),
        ("network", "options: {width: 16}", "options: {}"),
    ],
)
def test_a_value_that_is_a_mapping_replaces_that_of_the_base(section, below, above, tmp_path):
    (tmp_path / "low.yaml").write_text(f"{section}: {{{below}}}\n")
    (tmp_path / "top.yaml").write_text(f"base: low.yaml\n{section}: {{{above}}}\n")
    (tmp_path / "alone.yaml").write_text(f"{section}: {{{above}}}\n")
    assert Recipe.from_yaml(tmp_path / "low.yaml") != Recipe.from_yaml(tmp_path / "alone.yaml")
    assert Recipe.from_yaml(tmp_path / "top.yaml") == Recipe.from_yaml(tmp_path / "alone.yaml")


def test_a_dense_network_needs_no_images_for_batches_of_later_stages(tmp_path):
    small = recipe(**{"data.train_examples": 100, "train.batch_size": 25, "train.epochs": 1})
    small = small.override({"prune.batch_size": 25, "finetune.batch_size": 25}).first_stage()
    assert small.prune.batch_size > 100
    folder = tscnc.experiments.run(small, tmp_path / "dense", until="train", progress=False)
    assert len(tscnc.experiments.open_stage(folder / "1-train").metrics) == 1
    with pytest.raises(ValueError, match=r"prune: batch_size must be <= 100"):
        tscnc.experiments.run(small, tmp_path / "all", progress=False)
    assert not (tmp_path / "all").exists()


def test_without_pyyaml_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match=r"pip install \"\.\[experiments\]\" in a"):
        tscnc.experiments.parse("a: 1", "text")


@pytest.mark.parametrize("data", ["cifar10", "cifar100", "tiny-imagenet"])
@pytest.mark.parametrize("network", ["vgg-16", "resnet-18", "wrn-28-4"])
def test_the_shipped_recipes_take_every_setting_of_the_paper(data, network):
    for name, epochs in (("recommended", 120), ("paper", 200), ("cpu", 8)):
        changes = {"data.dataset": data, "network.architecture": network, "sparsity": 0.95}
        recipe = Recipe.from_yaml(name).override(changes)
        assert (recipe.train.epochs, recipe.sparsity) == (epochs, 0.95)
        assert {getattr(recipe, stage).weight_decay_kind for stage in stages.STAGES} == {"l2"}
        same = {"train.epochs": 200, "train.batch_size": 128, "train.decay": "steps"}
        same["train.weight_decay_kind"] = Recipe().train.weight_decay_kind
        assert recipe.override(same).train == Recipe().train


def test_the_recommended_recipe_follows_the_study_at_the_cost_of_the_paper_s():
    recommended, paper, cpu = (Recipe.from_yaml(name) for name in ("recommended", "paper", "cpu"))
    assert recommended == recommended.baseline()
    assert (recommended.prune.method, recommended.prune.scope) == ("magnitude", "global")
    costs = [sum(getattr(r, stage).epochs for stage in stages.STAGES) for r in (recommended, paper)]
    assert costs[0] == costs[1]
    for recipe in (recommended, cpu):
        assert {getattr(recipe, stage).weight_decay for stage in stages.STAGES} == {5e-4}
    assert cpu.prune == dataclasses.replace(recommended.prune, epochs=3, batch_size=64)


@pytest.mark.parametrize(
    ("network", "options", "size", "full"),
    [
        ("vgg-16", {"width": 16}, [32, 32], 15_249_354),
        ("resnet-18", {"width": 16}, [16, 16], 11_173_962),
        ("wide-resnet", {"depth": 10, "width": 1}, [16, 16], 5_849_050),
    ],
)
def test_the_cpu_sized_recipe_takes_narrow_relatives_of_the_networks(network, options, size, full):
    changes = {"network.architecture": network, "network.options": options}
    recipe = Recipe.from_yaml("cpu").override({**changes, "data.image_size": size})
    shape = (*recipe.data.image_size, 3)
    model = stages.network(recipe, FakeData(shape))
    assert model.output_shape == (None, 10)
    assert model.count_params() < full / 10
    wrong = recipe.override({"network.options": {**options, "breadth": 3}})
    with pytest.raises(ValueError, match=r"network\.options={.*'breadth': 3}: .*'breadth'"):
        stages.network(wrong, FakeData(shape))


def test_shipped_recipes_go_by_name_also_as_a_base_and_files_by_path(tmp_path, monkeypatch):
    (tmp_path / "smoke").write_text("seed: 5\n")
    (tmp_path / "mine.yaml").write_text("base: [smoke, ./smoke]\n")
    monkeypatch.chdir(tmp_path)
    assert Recipe.from_yaml("smoke").override({"seed": 5}) == Recipe.from_yaml("mine.yaml")
    assert Recipe.from_yaml("./smoke") == Recipe(seed=5)
    assert Recipe.from_yaml(pathlib.Path("smoke")) == Recipe(seed=5)
    assert Recipe.from_yaml("smoke").name == "smoke"


def test_a_recipe_does_not_change_with_what_it_was_made_from():
    shares, plan = {"stage_*": 0.5}, {"fraction": 0.3}
    values = {"prune.method": "magnitude", "prune.scope": shares, "prune.regrowth": plan}
    made = recipe(**values)
    before = made.to_dict()
    shares["stage_*"], plan["fraction"] = 0.9, 0.1
    assert made.to_dict() == before


class FakeData:
    """What a network wants to know of a dataset."""

    classes = 10

    def __init__(self, image_shape):
        self.image_shape = image_shape

    def channel_statistics(self):
        return (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)


def leaves(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def test_the_paper_recipe_names_every_value_and_agrees_with_the_defaults():
    """All of them are in the file, so that nobody has to look for one in the code."""
    written = dict(leaves(yaml.safe_load((SHIPPED / "paper.yaml").read_text())))
    known = dict(Recipe.leaves())
    each_settings = {"name", "data.dataset", "network.architecture"}
    left_out = {f"data.{name}" for name in ("folder", "stream", "train_examples", "test_examples")}
    left_out |= {"network.options"}
    not_for_its_choices = {"prune.ramp", "prune.frequency"} | {
        f"{stage}.{name}" for stage in ("prune", "finetune") for name in ("drops", "drop")
    }
    compiler = {f"{stage}.jit_compile" for stage in ("train", "prune", "finetune")}
    assert set(known) - set(written) == (each_settings | left_out | not_for_its_choices | compiler)
    recipe = json.loads(json.dumps(Recipe.from_yaml("paper").to_dict()))
    default = json.loads(json.dumps(Recipe().to_dict()))
    gates, none = recipe.pop("gates"), default.pop("gates")
    for stage in stages.STAGES:
        kinds = (each[stage].pop("weight_decay_kind") for each in (recipe, default))
        # Recipes that were written before there was the kind mean what they meant.
        assert tuple(kinds) == ("l2", "decoupled")
    assert recipe == default
    assert gates["sparsity_factor"] > none["sparsity_factor"] == 0.0


# Experiments


def test_each_stage_leaves_what_the_next_or_a_user_can_open(finished):
    assert {path.name for path in finished.iterdir()} == {
        ".lock",
        "recipe.json",
        "data.json",
        "1-train",
        "2-prune",
        "3-finetune",
        "4-evaluate",
    }
    for stage in ("1-train", "2-prune", "3-finetune"):
        names = {path.name for path in (finished / stage).iterdir()}
        files = {"model.keras", "last.keras", "metrics.jsonl", "manifest.json", "best.npz"}
        assert names == files | ({"masks.npz"} if stage != "1-train" else set())
        output = tscnc.experiments.open_stage(finished / stage)
        epochs = TINY[stage[2:]]["epochs"]
        assert [row["epoch"] for row in output.metrics] == list(range(1, epochs + 1))
        assert output.manifest["recipe"]["name"] == "tiny"
        assert output.manifest["data"]["fingerprint"] == stages.dataset(recipe()).fingerprint
        assert output.model(np.zeros((1, 8, 8, 1), "float32")).shape == (1, 10)
        assert is_plain(output.model, "keras")


def test_the_evaluation_reports_the_sparsity_of_what_is_pruned(finished):
    pruned = tscnc.experiments.open_stage(finished / "3-finetune").chosen["sparsity"]
    report = json.loads((finished / "4-evaluate" / "sparsity.json").read_text())
    assert report["sparsity"] == pytest.approx(pruned, abs=1e-9)
    masked = [row["name"] for row in report["rows"] if row["masked"]]
    assert masked == list(tscnc.experiments.open_stage(finished / "3-finetune").masks)
    served = tscnc.load_saved_model(finished / "4-evaluate" / "saved_model")
    assert served.report.sparsity == pytest.approx(pruned, abs=1e-9)


def is_plain(model, library):
    """Tell whether nothing in a model is of this package."""
    parts = [model, *model.layers]
    return all(type(part).__module__.startswith(f"{library}.") for part in parts)


def recipe(**values):
    return Recipe.from_dict(TINY).override(values)


def test_the_kept_epoch_is_the_best_on_the_validation_set(finished):
    for stage in ("1-train", "2-prune", "3-finetune"):
        output = tscnc.experiments.open_stage(finished / stage)
        scores = [row["validation_robust_accuracy"] for row in output.metrics]
        assert output.manifest["chosen_epoch"] == 1 + int(np.argmax(scores))
        validator = stages.validator(recipe(), output.model)
        batches = stages.dataset(recipe()).evaluation("validation", 256)
        again = validator.evaluate(batches, verbose=0, return_dict=True)
        assert again["adversarial_accuracy"] == pytest.approx(max(scores), abs=1e-6)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of Keras and TensorFlow
def test_whoever_has_learned_nothing_is_warned_of_it(tmp_path):
    values = {"data.train_examples": None, "data.validation": 200, "train.epochs": 1}
    still = recipe(**values, **{"train.learning_rate": 1e-9})
    with pytest.warns(UserWarning, match=r"1-train is no better than guessing: it is right on "):
        tscnc.experiments.run(still, tmp_path / "still", until="train", progress=False)
    moving = recipe(**{**values, "train.epochs": 2})
    tscnc.experiments.run(moving, tmp_path / "moving", until="train", progress=False)


def test_zeros_are_exact_from_pruning_on(finished):
    kept = tscnc.experiments.open_stage(finished / "2-prune").masks
    assert kept
    assert not {"stem", "logits"} & set(kept)
    for stage in ("2-prune", "3-finetune"):
        output = tscnc.experiments.open_stage(finished / stage)
        for model in (output.model, output.last):
            for name, mask in kept.items():
                kernel = model.get_layer(name).get_weights()[0]
                assert mask.sum() == mask.size - round(0.9 * mask.size)
                if model is output.model or stage == "3-finetune":
                    assert not kernel[~mask].any()
                assert np.count_nonzero(kernel) == mask.sum()
            assert np.all(model.get_layer("stem").get_weights()[0])


def test_pruning_by_scores_keeps_the_values_of_the_dense_weights(finished):
    dense, pruned = (
        tscnc.experiments.open_stage(finished / stage).model for stage in ("1-train", "2-prune")
    )
    for name, mask in tscnc.experiments.open_stage(finished / "2-prune").masks.items():
        before, after = (model.get_layer(name).get_weights()[0] for model in (dense, pruned))
        np.testing.assert_array_equal(after, np.where(mask, before, 0))


def test_the_report_is_that_of_evaluate_robustness_on_the_test_set(finished):
    report = json.loads((finished / "4-evaluate" / "report.json").read_text())
    model = tscnc.experiments.open_stage(finished / "3-finetune").model
    x, y = stages.dataset(recipe()).arrays("test")
    again = tscnc.evaluate_robustness(
        model, x, y, attacks=stages.test_attacks(recipe()), batch_size=256, progress=False
    )
    assert report["examples"] == 48
    assert report["clean"]["accuracy"] == again.clean_accuracy
    assert report["robust"]["accuracy"] == again.robust_accuracy
    assert str(again.examples) in (finished / "4-evaluate" / "report.txt").read_text()
    served = tscnc.load_saved_model(finished / "4-evaluate" / "saved_model")
    np.testing.assert_allclose(served(x), model.predict(x, verbose=0), atol=1e-5)
    conditions = json.loads((finished / "4-evaluate" / "kernels.json").read_text())
    worst = tscnc.inspection.condition_numbers(model).to_dict()["worst_condition_number"]
    assert conditions["worst_condition_number"] == worst


def test_what_is_complete_is_not_run_again(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    tscnc.experiments.run(recipe(), finished, progress=False)
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert before == after


@pytest.mark.parametrize(
    ("stage", "name", "other"),
    [("1-train", "seed", 7), ("2-prune", "sparsity", 0.5), ("4-evaluate", "seed", 7)],
)
def test_a_stage_by_another_recipe_is_refused(stage, name, other, finished, tmp_path):
    """Though its files are whole and its data the same."""
    folder = shutil.copytree(finished, tmp_path / "tiny")
    content = folders.read_manifest(folder / stage)
    content["recipe"][name] = other
    (folder / stage / "manifest.json").unlink()
    folders.write_manifest(folder / stage, content)
    with pytest.raises(
        ValueError,
        match=rf"{stage} holds a stage by another recipe: .* was {other}.*{stage}/manifest\.json",
    ):
        tscnc.experiments.run(recipe(), folder, progress=False)


def test_a_run_by_a_recipe_without_a_newer_value_continues(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "tiny")
    older = json.loads((folder / "recipe.json").read_text())
    del older["evaluate"]["attack"], older["train"]["weight_decay_kind"]
    (folder / "recipe.json").write_text(json.dumps(older))
    tscnc.experiments.run(recipe(), folder, progress=False)
    with pytest.raises(ValueError, match=r"evaluate\.attack was 'pgd', not 'autoattack'"):
        tscnc.experiments.run(recipe(**{"evaluate.attack": "autoattack"}), folder, progress=False)
    with pytest.raises(ValueError, match=r"train\.weight_decay_kind was 'decoupled', not 'l2'"):
        tscnc.experiments.run(recipe(**{"train.weight_decay_kind": "l2"}), folder, progress=False)


@pytest.mark.parametrize("library", ["keras", "tf_keras"])
def test_the_kind_of_weight_decay_decides_the_optimizer(library):
    values = {"network.library": library, "train.weight_decay": 0.01}
    for kind, is_l2 in (("l2", True), ("decoupled", False)):
        chosen = recipe(**values, **{"train.weight_decay_kind": kind})
        optimizer = stages.trainer(chosen, "train", stages.dataset(chosen)).optimizer
        assert isinstance(optimizer, tscnc.training.SGDWithL2) == is_l2
        assert isinstance(optimizer, stages.library(chosen).optimizers.SGD)
        assert optimizer.weight_decay == 0.01
        assert (optimizer.momentum, optimizer.nesterov, optimizer.use_ema) == (0.9, True, True)
    with pytest.raises(ValueError, match="weight_decay_kind must be one of 'l2', 'decoupled'"):
        recipe(**{"train.weight_decay_kind": "torch"})


@pytest.mark.parametrize(
    ("module", "last"),
    [
        (tscnc.inspection, "condition_numbers"),
        (runner, "export_saved_model"),
        (folders, "write_manifest"),
    ],
    ids=["after the attacks", "before its end", "after its end"],
)
def test_an_evaluation_that_was_stopped_goes_on(module, last, finished, tmp_path, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "tiny")
    shutil.rmtree(folder / "4-evaluate")
    state = folder / "4-evaluate" / folders.EVALUATION_STATE
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        stop_after(patch, module, last, lambda *arguments: True)
        tscnc.experiments.run(recipe(), folder, progress=False)
    assert state.is_file()
    with monkeypatch.context() as patch:
        patch.setattr(tscnc.attacks.PGD, "bind", None)  # no attack is run again
        tscnc.experiments.run(recipe(), folder, progress=False)
    assert not state.exists()
    assert files_below(folder) == files_below(finished)
    mine, theirs = (
        json.loads((each / "4-evaluate" / "report.json").read_text()) for each in (folder, finished)
    )
    assert mine["robust"] == theirs["robust"]


def test_another_recipe_needs_another_folder(finished, tmp_path):
    with pytest.raises(ValueError, match=r"train\.epochs was 2, not 3"):
        tscnc.experiments.run(recipe(**{"train.epochs": 3}), finished)
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="something else than an experiment"):
        tscnc.experiments.run(recipe(), tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no complete stage"):
        tscnc.experiments.open_stage(tmp_path)
    with pytest.raises(TypeError, match="recipe must be a Recipe"):
        tscnc.experiments.run(TINY, tmp_path / "new")


def test_data_that_are_not_there_are_named_as_the_recipe_names_them(tmp_path):
    values = {"data.dataset": "svhn", "data.folder": str(tmp_path)}
    wanted = rf"data\.dataset='svhn', data\.folder='{tmp_path}'.*: svhn needs train_32x32\.mat"
    with pytest.raises(FileNotFoundError, match=wanted):
        tscnc.experiments.run(recipe(**values), tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"network.architecture": "vgg-16"}, r"network 'vgg-16' can't be built for images of \(8"),
        ({"data.validation": 0}, "data.validation must leave images to evaluate on, got 0"),
        ({"data.train_examples": 10**6}, "data.train_examples=1000000, .*: n_train must be from"),
        ({"data.folder": "/tmp"}, "^data.dataset='digits', data.folder='/tmp', .*: folder is for"),
        ({"gates.sparsity_factor": 1.0, "gates.layers": "no_*"}, "^train: .*no_"),
        ({"prune.layers": "no_*"}, "^prune: .*has no weight that can be pruned"),
        ({"prune.method": "magnitude", "prune.scope": {"no_*": 0.5}}, "^prune: .*no_"),
        ({"constraints.layers": "no_*", "constraints.stages": ["finetune"]}, "^finetune: .*no_"),
        ({"finetune.batch_size": 10**4}, "^finetune: batch_size must be <= "),
        (
            {"prune.method": "magnitude", "prune.epochs": 1, "prune.batch_size": 192},
            "^prune: method='magnitude' .* needs 2 optimizer steps or more, got 1",
        ),
    ],
)
def test_what_a_later_stage_cannot_do_is_said_before_the_first(tmp_path, values, words):
    with pytest.raises(ValueError, match=words):
        tscnc.experiments.run(recipe(**values), tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists(), "another recipe may begin there"


def test_data_of_two_classes_are_judged_by_autoattack_too(tmp_path):
    x = np.random.default_rng(0).uniform(size=(48, 8, 8, 1)).astype("float32")
    y = np.arange(48) % 2
    np.savez(tmp_path / "two.npz", x_train=x, y_train=y, x_test=x[:8], y_test=y[:8])
    values = {"data.dataset": str(tmp_path / "two.npz"), "evaluate.attack": "apgd"}
    values |= {"data.train_examples": None, "data.test_examples": None, "data.validation": 0.25}
    values |= {f"{stage}.batch_size": 12 for stage in stages.STAGES}
    folder = tscnc.experiments.run(recipe(**values), tmp_path / "new", progress=False)
    report = json.loads((folder / "4-evaluate" / "report.json").read_text())
    assert [each["name"] for each in report["attacks"]] == [
        "APGD-100 linf 0.1",
        "APGD-100 linf 0.1 targeted_dlr",
    ]


def test_a_folder_must_be_one(tmp_path):
    (tmp_path / "file").touch()
    for path in ("file", "file/below"):
        with pytest.raises(NotADirectoryError, match=r"folder must be a folder, got .* is a file"):
            tscnc.experiments.run(recipe(), tmp_path / path)


def test_a_dense_network_that_is_not_there_claims_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no complete stage"):
        tscnc.experiments.run(recipe(), tmp_path / "new", dense=tmp_path / "none")
    assert not (tmp_path / "new").exists()


def test_the_evaluation_opens_with_what_it_judged_and_an_experiment_says_what_to_open(finished):
    judged = tscnc.experiments.open_stage(finished / "4-evaluate")
    tuned = tscnc.experiments.open_stage(finished / "3-finetune")
    for mine, theirs in zip(judged.model.get_weights(), tuned.model.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert judged.masks.keys() == tuned.masks.keys()
    with pytest.raises(FileNotFoundError, match=r"open one of its stages, 1-train, 2-prune"):
        tscnc.experiments.open_stage(finished)


def test_scores_are_perturbed_and_shares_learned_as_the_recipe_says():
    chosen = recipe(**{"prune.scope": "learned", "prune.perturb_scores": 0.03})
    data = stages.dataset(chosen)
    trainer = stages.trainer(chosen, "prune", data, previous=stages.network(chosen, data))
    (pruner,) = masks.pruners(trainer.model)
    assert "scope=Learned(" in repr(pruner) and len(pruner.shares) == len(pruner.targets)
    assert pruner.perturb_scores == 0.03


@pytest.mark.parametrize(
    ("structure", "made"),
    [
        ("filters", tscnc.pruning.Filters()),
        ({"block": [4, 1]}, tscnc.pruning.Block.for_litert()),
        ({"nm": [2, 4]}, tscnc.pruning.NM(2, 4)),
    ],
)
@pytest.mark.parametrize("method", ["scores", "magnitude"])
def test_structures_are_pruned_as_the_recipe_says(method, structure, made):
    chosen = recipe(**{"prune.method": method, "prune.structure": structure, "sparsity": 0.5})
    assert type(chosen).from_dict(chosen.to_dict()) == chosen
    data = stages.dataset(chosen)
    trainer = stages.trainer(chosen, "prune", data, previous=stages.network(chosen, data))
    (pruner,) = masks.pruners(trainer.model)
    assert pruner.structure == made


def test_scores_choose_as_often_as_the_recipe_says():
    for given, taken in ((None, 1), (5, 5)):
        chosen = recipe(**{"prune.frequency": given})
        data = stages.dataset(chosen)
        trainer = stages.trainer(chosen, "prune", data, previous=stages.network(chosen, data))
        (pruner,) = masks.pruners(trainer.model)
        assert pruner.frequency == taken


def test_a_stage_that_is_sparse_from_the_start_lets_weights_come_back():
    changes = {"prune.method": "magnitude", "prune.ramp": 0, "prune.regrowth": {"until": 0.5}}
    chosen = recipe(**changes)
    data = stages.dataset(chosen)
    trainer = stages.trainer(chosen, "prune", data, previous=stages.network(chosen, data))
    (pruner,) = masks.pruners(trainer.model)
    assert tscnc.inspection.sparsity(trainer.model).sparsity == pytest.approx(0.9, abs=0.01)
    steps = stages.steps(chosen, "prune", data)
    assert pruner.regrowth == tscnc.pruning.Regrowth(until=0.5, frequency=1, steps=steps)


def test_a_dense_network_is_pruned_in_another_way(finished, tmp_path):
    changes = {
        "prune.method": "magnitude",
        "prune.min_per_filter": 2,
        "prune.min_per_input": 1,
        "prune.scope": "condition",
        "prune.regrowth": {"fraction": 0.5, "frequency": 1},
    }
    other = recipe(**changes, **{"sparsity": 0.8, "finetune.loss": "rslad"})
    folder = tmp_path / "other"
    options = {"dense": finished / "1-train", "progress": False}
    assert tscnc.experiments.run(other, folder, until="prune", **options) == folder
    assert {path.name for path in folder.glob("[1-4]-*")} == {"1-train", "2-prune"}
    tscnc.experiments.run(other, folder, until="finetune", **options)
    assert not (folder / "4-evaluate").exists()
    with pytest.raises(ValueError, match=r"until must be one of .train., .*, got .test."):
        tscnc.experiments.run(other, folder, until="test", **options)
    theirs = (finished / "1-train" / "model.keras").read_bytes()
    assert (folder / "1-train" / "model.keras").read_bytes() == theirs
    output = tscnc.experiments.open_stage(folder / "2-prune")
    assert [row["sparsity"] for row in output.metrics][-1] == pytest.approx(0.8, abs=0.01)
    for mask in output.masks.values():
        assert mask.reshape(-1, mask.shape[-1]).sum(axis=0).min() >= 2
        assert mask.sum(axis=(0, 1, 3)).min() >= 1
    # Of the epochs, only those at the full sparsity are candidates.
    chosen = output.metrics[output.manifest["chosen_epoch"] - 1]
    assert chosen["sparsity"] == max(row["sparsity"] for row in output.metrics)
    with pytest.raises(ValueError, match=r"another recipe: seed was 0, not 1"):
        changed = other.override({"seed": 1})
        tscnc.experiments.run(changed, tmp_path / "third", dense=finished / "1-train")
    with pytest.raises(ValueError, match="dense must be a stage of training"):
        tscnc.experiments.run(other, tmp_path / "fourth", dense=finished / "2-prune")


def test_fine_tuning_may_begin_with_the_channels_of_the_dense_network():
    chosen = recipe(**{"finetune.recalibrate": True})
    data = stages.dataset(chosen)
    dense, pruned, expected = (stages.network(chosen, data) for _ in range(3))
    for layer in (pruned.get_layer("stage_1_conv_2"), expected.get_layer("stage_1_conv_2")):
        kernel = layer.get_weights()[0]
        layer.set_weights([kernel * (np.abs(kernel) > np.quantile(np.abs(kernel), 0.8))])
    trainer = stages.trainer(chosen, "finetune", data, previous=pruned, teacher=dense)
    tscnc.pruning.recalibrate(expected, data.arrays("train")[0][:1024], dense=dense)
    found = stages.plain(chosen, data, trainer.model).get_weights()
    for mine, theirs in zip(found, expected.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    assert np.any(np.abs(found[-1] - dense.get_weights()[-1]) > 1e-3)


def test_fine_tuning_is_recalibrated_on_images_of_all_classes(monkeypatch):
    chosen = recipe(**{"finetune.recalibrate": True})
    data = stages.dataset(chosen)
    order = np.argsort(data.y_train, kind="stable")
    data = dataclasses.replace(data, x_train=data.x_train[order], y_train=data.y_train[order])
    monkeypatch.setattr(stages, "CALIBRATION", 40)
    seen = []
    monkeypatch.setattr(stages.pruning, "recalibrate", lambda _, x, dense: seen.append(x))
    network = stages.network(chosen, data)
    stages.trainer(chosen, "finetune", data, previous=network, teacher=network)
    (images,) = seen
    assert len(images) == 40
    x, y = data.arrays("train")
    found = {int(y[(x == image).all((1, 2, 3))][0]) for image in images}
    assert found == set(range(10))


def test_weights_that_have_just_come_back_are_trained_on():
    """They are zero as those are that are pruned, and only the masks know of them."""
    chosen = recipe()
    data = stages.dataset(chosen)
    pruned = stages.network(chosen, data)
    tscnc.prune_now(pruned, 0.9, layers=stages.pruned_layers(chosen.prune))
    (pruner,) = masks.pruners(pruned)
    kept = {target.name: mask.numpy() for target, mask in pruner.masked_targets()}
    previous = tscnc.strip(pruned)
    places = {}
    for name, mask in kept.items():
        places[name] = tuple(np.argwhere(~mask)[0])
        mask[places[name]] = True
    trainer = stages.trainer(chosen, "finetune", data, previous=previous, kept=kept)
    trainer.fit(*data.arrays("train"), batch_size=64, epochs=1, verbose=0)
    (pruner,) = masks.pruners(trainer.model)
    for target, mask in pruner.masked_targets():
        np.testing.assert_array_equal(mask, kept[target.name])
        assert target.variable.numpy()[places[target.name]] != 0


def test_other_data_are_refused(finished, tmp_path, monkeypatch):
    data = stages.dataset(recipe())
    monkeypatch.setattr(stages, "dataset", lambda _: data.subset(n_train=128))
    with pytest.raises(ValueError, match=r"data are not those that .*tiny was made with"):
        tscnc.experiments.run(recipe(), finished)
    dense = finished / "1-train"
    with pytest.raises(ValueError, match=r"data are not those that .*1-train was made with"):
        tscnc.experiments.run(recipe(), tmp_path / "adopted", dense=dense, progress=False)


def test_a_run_that_was_stopped_early_refuses_other_data_too(tmp_path):
    data = stages.dataset(recipe())
    folders.claim(tmp_path / "begun", recipe(), data)
    folders.claim(tmp_path / "begun", recipe(), data)
    with pytest.raises(ValueError, match=r"data are not those that .*begun was made with"):
        folders.claim(tmp_path / "begun", recipe(), data.subset(n_train=128))


def test_a_run_that_was_killed_before_its_first_file_begins_anew(tmp_path):
    folder = tmp_path / "begun"
    folder.mkdir()
    (folder / ".recipe.json.0123abcd").touch()
    (folder / ".1-train.0123abcd").mkdir()
    folders.claim(folder, recipe(), stages.dataset(recipe()))
    assert {path.name for path in folder.iterdir()} == {"recipe.json", "data.json"}


def test_drafts_of_what_was_killed_are_removed(tmp_path):
    stage = tmp_path / "1-train"
    stage.mkdir()
    for name in (".model.keras.0123abcd", ".model.keras.0123abcd.keras"):
        (stage / name).touch()
    (stage / ".state-1.0123abcd").mkdir()
    own = ["model.keras", "state-2.bak", "state-old"]
    for name in own:
        (stage / name).touch()
    (stage / "state-1-2").mkdir()
    (stage / "state-1").mkdir()
    assert [progress for progress, _ in folders.states(stage)] == [(1, 2), (1, 0)]
    folders.tidy(stage)
    assert sorted(path.name for path in stage.iterdir()) == own


@pytest.mark.parametrize(
    "name", [".env.template", ".notes.20250101", ".gitignore.override", ".mine.json.0123abcd"]
)
def test_hidden_files_of_the_user_stay(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(FileExistsError, match="holds something else"):
        folders.is_new(tmp_path, recipe())
    folders.tidy(tmp_path)
    assert (tmp_path / name).exists()


def test_tf_keras_runs_the_same_stages(tmp_path):
    values = {
        "network.library": "tf_keras",
        "gates.sparsity_factor": 1e-3,
        "gates.layers": "stage_*",
        "constraints.stages": ["train", "finetune"],
    }
    values |= {f"{stage}.epochs": 1 for stage in ("train", "prune", "finetune")}
    folder = tscnc.experiments.run(recipe(**values), tmp_path / "old", progress=False)
    for stage in ("1-train", "3-finetune"):
        model = tscnc.experiments.open_stage(folder / stage).model
        assert is_plain(model, "tf_keras")
    (row,) = tscnc.experiments.open_stage(folder / "1-train").metrics
    inner = [layer for layer in model.layers if layer.name.startswith("stage_")]
    kernels = sum(np.size(layer.get_weights()[0]) for layer in inner if "conv" in layer.name)
    assert 0.85 * kernels < row["expected_l0"] < kernels  # 92 % are open to begin with
    assert row["open_gates"] == 1.0
    zeros = tscnc.inspection.sparsity(model)
    inner = [row.sparsity for row in zeros.rows if row.name not in stages.ENDS]
    assert min(inner) >= 0.895


KILLED = """
import sys, yaml
from tscnc_tf import experiments
experiments.run(experiments.Recipe.from_dict(yaml.safe_load(sys.argv[1])), sys.argv[2])
"""


def run_killed(recipe, folder, *moments):
    """Run an experiment in processes that are killed as soon as there is something of a name."""
    command = [sys.executable, "-c", KILLED, json.dumps(recipe.to_dict()), str(folder)]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    for moment in moments:
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 200
        while not (folder / moment).exists():
            assert process.poll() is None, "it has ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(RuntimeError, match=rf"in use by process {process.pid} on \S+ since 20"):
            tscnc.experiments.run(recipe, folder, progress=False)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not folders.is_complete(folder / "4-evaluate")
    tscnc.experiments.run(recipe, folder, progress=False)


def require_same(folder, other, *stages):
    """Make sure that two experiments have ended with the same metrics and weights, bit for bit."""
    for stage in stages or ("1-train", "2-prune", "3-finetune"):
        mine, theirs = (tscnc.experiments.open_stage(f / stage) for f in (folder, other))
        assert mine.metrics == theirs.metrics
        for name in ("model", "last"):
            pairs = zip(
                getattr(mine, name).get_weights(), getattr(theirs, name).get_weights(), strict=True
            )
            for a, b in pairs:
                np.testing.assert_array_equal(a, b)
        assert not list((folder / stage).glob("state-*"))
        assert not list((folder / stage).glob(".*"))


def test_killed_in_each_stage_and_started_again_it_ends_with_the_same_weights(finished, tmp_path):
    moments = ["1-train/state-1", "2-prune/state-2", "3-finetune/best.npz"]
    run_killed(recipe(), tmp_path / "killed", *moments)
    require_same(tmp_path / "killed", finished)


class StoppedError(Exception):
    """What a test stops a run by."""


def stop_after(monkeypatch, owner, name, when):
    """Let a function raise after it has done its work, if its arguments say so."""
    original = getattr(owner, name)

    def stopping(*arguments, **keywords):
        original(*arguments, **keywords)
        if when(*arguments):
            raise StoppedError

    monkeypatch.setattr(owner, name, stopping)


def end(number, frame):
    """Do what a signal does in these tests."""
    raise StoppedError


@contextlib.contextmanager
def asked_to_end(monkeypatch, stage, epoch, batch):
    """Send SIGTERM to this process before a batch of a stage ends."""
    original = fitting.CheckpointCallback.on_train_batch_end

    def on_batch(self, number, logs=None):
        if (self.model.name, len(self.rows), number) == (stage, epoch, batch):
            signal.raise_signal(signal.SIGTERM)
        original(self, number, logs)

    before = signal.signal(signal.SIGTERM, end)
    try:
        with monkeypatch.context() as patch, pytest.raises(StoppedError):
            patch.setattr(fitting.CheckpointCallback, "on_train_batch_end", on_batch)
            yield
        assert signal.getsignal(signal.SIGTERM) is end
    finally:
        signal.signal(signal.SIGTERM, before)


def test_stopped_with_gates_and_by_magnitude_it_ends_with_the_same_weights_too(
    tmp_path, monkeypatch
):
    """At the end of an epoch; then, being asked to end, within one."""
    gated = recipe(
        **{"gates.sparsity_factor": 1e-3, "gates.layers": "stage_*", "prune.method": "magnitude"},
        **{"prune.epochs": 1, "finetune.epochs": 1, "train.average_from": 1},
        **{"train.awp": 0.01, "train.awp_from": 1},
    )
    run = functools.partial(tscnc.experiments.run, gated, until="finetune", progress=False)
    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        stop_after(patch, folders, "write_state", lambda _, progress, *rest: progress.epochs == 1)
        run(tmp_path / "stopped")
    assert not folders.is_complete(tmp_path / "stopped" / "1-train")
    for stage, epoch, batch, state in (
        ("train", 1, 0, "1-train/state-1-1"),
        ("train", 1, 0, "1-train/state-1-2"),  # the first batch of what was left
        ("prune", 0, 0, "2-prune/state-0-1"),
    ):
        with asked_to_end(monkeypatch, stage, epoch, batch):
            run(tmp_path / "stopped")
        (found,) = (tmp_path / "stopped" / state).parent.glob("state-*")
        assert found == tmp_path / "stopped" / state
    run(tmp_path / "stopped")
    require_same(tmp_path / "stopped", whole)


def test_a_signal_that_was_noted_acts_though_the_block_fails():
    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(StoppedError), fitting.SignalNote() as note:
            signal.raise_signal(signal.SIGTERM)
            assert note
            raise ValueError("of the block")
        with pytest.raises(StoppedError), fitting.SignalNote():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # the second one is not waited for
            raise AssertionError("not reached")
        assert signal.getsignal(signal.SIGTERM) is end
    finally:
        signal.signal(signal.SIGTERM, before)


def test_tf_keras_goes_on_within_an_epoch(tmp_path, monkeypatch):
    short = recipe(**{"network.library": "tf_keras", "train.average": 0.9})
    run = functools.partial(tscnc.experiments.run, short, until="train", progress=False)
    whole = run(tmp_path / "whole")
    with asked_to_end(monkeypatch, "train", 1, 0):
        run(tmp_path / "stopped")
    assert (tmp_path / "stopped" / "1-train" / "state-1-1").is_dir()
    run(tmp_path / "stopped")
    require_same(tmp_path / "stopped", whole, "1-train")


def test_a_weight_that_is_not_finite_ends_the_stage_and_the_last_checkpoint_stays(
    tmp_path, monkeypatch
):
    original = fitting.CheckpointCallback.on_epoch_begin

    def on_epoch_begin(self, epoch, logs=None):
        original(self, epoch, logs)
        if epoch == 1:
            self.model.optimizer.learning_rate = float("inf")

    with monkeypatch.context() as patch:
        patch.setattr(fitting.CheckpointCallback, "on_epoch_begin", on_epoch_begin)
        words = "^train: After batch 1 of epoch 2 weights are NaN or infinite: stem/kernel, "
        with pytest.raises(ValueError, match=words):
            tscnc.experiments.run(recipe(**{"train.decay": "constant"}), tmp_path, progress=False)
    (state,) = (tmp_path / "1-train").glob("state-*")
    assert state.name == "state-1"
    best = folders.read_arrays(tmp_path / "1-train" / "best.npz")
    assert all(np.isfinite(value).all() for value in best.values())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_batch_that_is_not_finite_is_said_with_its_stage_and_number(value, tmp_path, monkeypatch):
    original = tscnc.datasets.Dataset.training

    def training(self, *arguments, **keywords):
        batches = original(self, *arguments, **keywords).enumerate()
        return batches.map(lambda number, batch: (tf.where(number == 4, value, batch[0]), batch[1]))

    monkeypatch.setattr(tscnc.datasets.Dataset, "training", training)
    words = rf"^train: x must lie within .* to {value}: .* This is batch 5 of the optimizer\.$"
    with pytest.raises(ValueError, match=words):
        tscnc.experiments.run(recipe(), tmp_path, progress=False)
    (state,) = (tmp_path / "1-train").glob("state-*")
    assert state.name == "state-1"


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        ("weight", r"^evaluate: model '.*' has weights that are NaN or infinite, in logits/kernel"),
        ("data", r"^evaluate: x must be finite|^evaluate: x must lie within"),
    ],
)
def test_what_is_not_finite_is_said_before_the_evaluation(
    spoiled, words, finished, tmp_path, monkeypatch
):
    folder = shutil.copytree(finished, tmp_path / "tiny")
    shutil.rmtree(folder / "4-evaluate")
    evaluate = runner._evaluate

    def evaluate_spoiled(recipe, data, model, *rest):
        if spoiled == "weight":
            kernel = model.get_layer("logits").kernel
            kernel.assign(-np.inf * np.ones(kernel.shape))
        else:
            x = np.array(data.x_test)
            x[0, 0, 0] = np.inf
            data = dataclasses.replace(data, x_test=x)
        evaluate(recipe, data, model, *rest)

    monkeypatch.setattr(runner, "_evaluate", evaluate_spoiled)
    with pytest.raises(ValueError, match=words):
        tscnc.experiments.run(recipe(), folder, progress=False)
    assert not (folder / "4-evaluate" / "manifest.json").exists()


@pytest.mark.parametrize("library", ["keras", "tf_keras"])
def test_averages_begin_after_the_epochs_that_are_said(library, tmp_path):
    chosen = recipe(
        **{"network.library": library, "finetune.average": 0.5, "finetune.average_from": 2},
        **{"finetune.epochs": 4},
    )
    data = stages.dataset(chosen)
    pruned = tscnc.strip(tscnc.prune_now(stages.network(chosen, data), 0.8, layers="stage_*"))
    trainer = stages.trainer(chosen, "finetune", data, previous=pruned)
    recorded = []

    def record(_):
        recorded.append([np.asarray(weight) for weight in trainer.model.trainable_variables])

    fitting.fit(chosen, "finetune", data, trainer, tmp_path, record)
    steps = len(recorded) // 4
    expected = recorded[2 * steps - 1]
    for weights in recorded[2 * steps :]:
        expected = [0.5 * old + 0.5 * new for old, new in zip(expected, weights, strict=True)]
    found = [np.asarray(weight) for weight in trainer.model.trainable_variables]
    for mine, theirs, last in zip(found, expected, recorded[-1], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)
        assert np.any(mine != last)
    for variable, mine in zip(pruned.trainable_variables, found, strict=True):
        if len(mine.shape) > 1:
            np.testing.assert_array_equal(mine == 0.0, np.asarray(variable) == 0.0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"average": 0.0, "average_from": 1}, "average_from must be 0 with average=0, .* got 1"),
        ({"awp_from": 1}, r"awp_from must be 0 with awp=0, .* got 1\. Set awp, such as 0\.005"),
        ({"average_from": 2}, r"average_from must be less than epochs, 2, got 2"),
    ],
)
def test_what_would_never_begin_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        recipe(**{f"train.{name}": value for name, value in values.items()})


# Files that are not what was written


DAMAGES = {
    "empty": lambda content: b"",
    "cut off": lambda content: content[: len(content) // 2],
    "one byte": lambda content: flipped(content, 0xFF),
    "one bit": lambda content: flipped(content, 0x01),
}
every_damage = pytest.mark.parametrize("damage", DAMAGES)
SAVED = "4-evaluate/saved_model"
FILES = [
    "recipe.json",
    "data.json",
    *(
        f"{stage}/{name}"
        for stage in ("1-train", "2-prune", "3-finetune")
        for name in ("best.npz", "last.keras", "manifest.json", "metrics.jsonl", "model.keras")
    ),
    "2-prune/masks.npz",
    "3-finetune/masks.npz",
    *(
        f"4-evaluate/{name}.json"
        for name in ("kernels", "lipschitz", "manifest", "report", "sparsity")
    ),
    "4-evaluate/report.txt",
    *(f"{SAVED}/{name}" for name in ("fingerprint.pb", "saved_model.pb", "tscnc_manifest.json")),
    f"{SAVED}/variables/variables.data-00000-of-00001",
    f"{SAVED}/variables/variables.index",
]


def flipped(content, bits):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ bits]) + content[middle + 1 :]


def files_below(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return sorted(str(path.relative_to(folder)) for path in files)


@contextlib.contextmanager
def damaged(file, damage):
    content = file.read_bytes()
    file.write_bytes(DAMAGES[damage](content))
    try:
        yield
    finally:
        file.write_bytes(content)


@pytest.fixture(scope="module")
def copied(finished, tmp_path_factory):
    """A copy of the finished experiment, to be damaged and mended."""
    folder = tmp_path_factory.mktemp("copied") / "tiny"
    shutil.copytree(finished, folder)
    return folder


def test_the_files_of_a_finished_run(finished):
    assert files_below(finished) == sorted(FILES)


@every_damage
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_finished_run_is_named(copied, name, damage):
    with damaged(copied / name, damage), pytest.raises(ValueError) as caught:
        tscnc.experiments.run(recipe(), copied, progress=False)
    words = str(caught.value)
    assert str(copied / name) in words or (name, damage) == ("recipe.json", "one bit")
    assert name.rpartition("/")[2] in words
    assert "emove" in words or "hoose another folder" in words
    tscnc.experiments.run(recipe(), copied, progress=False)


def test_a_manifest_of_another_stage_and_a_recipe_that_is_gone_are_named(copied):
    stages = [copied / name for name in ("1-train", "3-finetune")]
    contents = [(stage / "manifest.json").read_bytes() for stage in stages]
    (stages[0] / "manifest.json").write_bytes(contents[1])
    message = r"1-train/manifest.json is damaged: it is not of the stage 'train', but of 'finetune'"
    with pytest.raises(ValueError, match=message):
        tscnc.experiments.run(recipe(), copied)
    with pytest.raises(ValueError, match=message):
        tscnc.experiments.open_stage(stages[0])
    (stages[0] / "manifest.json").write_bytes(contents[0])
    given = (copied / "recipe.json").read_bytes()
    (copied / "recipe.json").unlink()
    with pytest.raises(FileExistsError, match=r"holds an experiment, but not .*recipe.json"):
        tscnc.experiments.run(recipe(), copied)
    (copied / "recipe.json").write_text('{"other": 1}')
    with pytest.raises(ValueError, match=r"says .*/recipe.json: name was .*and \d+ more"):
        tscnc.experiments.run(recipe(), copied)
    (copied / "recipe.json").write_bytes(given)
    tscnc.experiments.run(recipe(), copied)


def test_what_to_remove_is_said_and_does(copied, finished, tmp_path):
    folder = shutil.copytree(copied, tmp_path / "tiny")
    (folder / "3-finetune" / "last.keras").write_bytes(b"")
    (folder / "data.json").write_bytes(b"")
    run = functools.partial(tscnc.experiments.run, recipe(), folder, progress=False)
    with pytest.raises(ValueError, match="Remove it, and run again"):
        run()
    (folder / "data.json").unlink()
    with pytest.raises(ValueError, match=r"Remove last\.keras alone .*3-finetune") as caught:
        run()
    assert f"the folder {folder / '3-finetune'} and those of later stages" in str(caught.value)
    (folder / "3-finetune" / "last.keras").unlink()
    run()
    shutil.rmtree(folder / "3-finetune")
    shutil.rmtree(folder / "4-evaluate")
    run()
    require_same(folder, finished)
    assert files_below(folder) == files_below(finished)


@every_damage
def test_an_output_names_its_damaged_file(copied, damage):
    stage = copied / "2-prune"
    for name, read in {
        "model.keras": lambda output: output.model,
        "last.keras": lambda output: output.last,
        "masks.npz": lambda output: output.masks,
    }.items():
        output = tscnc.experiments.open_stage(stage)
        with damaged(stage / name, damage), pytest.raises(ValueError, match=f"{name} is damaged"):
            read(output)
    for name in ("metrics.jsonl", "manifest.json"):
        with damaged(stage / name, damage), pytest.raises(ValueError, match=f"{name} is damaged"):
            tscnc.experiments.open_stage(stage)


def test_a_damaged_dense_network_is_not_copied(copied, tmp_path):
    dense = copied / "1-train"
    with (
        damaged(dense / "last.keras", "one bit"),
        pytest.raises(ValueError, match=r"last\.keras is"),
    ):
        tscnc.experiments.run(recipe(), tmp_path / "new", dense=dense, progress=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("library", ["keras", "tf_keras"])
def test_what_was_written_before_there_were_digests_is_read(copied, tmp_path, library, rng):
    stage = shutil.copytree(copied / "2-prune", tmp_path / "2-prune")
    old = json.loads((stage / "manifest.json").read_text())
    for name in ("files", "sha256"):
        del old[name]
    old["recipe"]["network"]["library"] = library
    (stage / "manifest.json").write_text(json.dumps(old))
    if library == "tf_keras":
        chosen = recipe(**{"network.library": library})
        network = stages.network(chosen, stages.dataset(chosen))
        for name in ("model.keras", "last.keras"):
            folders.write_model(stage / name, network)
    x = rng.random((2, 8, 8, 1), dtype="float32")
    output = tscnc.experiments.open_stage(stage)
    assert output.model(x).shape == output.last(x).shape == (2, 10)
    assert output.manifest == old
    assert len(output.metrics) == 4
    for name in ("model.keras", "last.keras", "masks.npz"):
        for damage in ("empty", "cut off"):
            output = tscnc.experiments.open_stage(stage)
            with (
                damaged(stage / name, damage),
                pytest.raises(ValueError, match=rf"{name} is damaged: it can't be read .*Remove"),
            ):
                getattr(output, name.partition(".")[0])
    with (
        damaged(stage / "metrics.jsonl", "cut off"),
        pytest.raises(ValueError, match=r"metrics\.jsonl is damaged"),
    ):
        tscnc.experiments.open_stage(stage)


@pytest.fixture(scope="module")
def half(copied, tmp_path_factory):
    """A run that was stopped in its second stage, after two epochs."""
    folder = tmp_path_factory.mktemp("half") / "tiny"
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(StoppedError):
        stop_after(
            monkeypatch, folders, "write_state", lambda _, progress, *rest: progress.epochs == 2
        )
        tscnc.experiments.run(recipe(), folder, dense=copied / "1-train", progress=False)
    return folder


def of_another_run(folder):
    (folder / STATE / "manifest.json").unlink()
    folders.write_manifest(folder / STATE, {"owner": [0] * 32, "name": "state-2"})


def of_another_epoch(folder):
    (folder / STATE).rename(folder / "2-prune" / "state-1")


def of_another_stage(folder):
    arrays = folders.read_arrays(folder / "2-prune" / "best.npz")
    other = folders.owner(recipe(), "finetune")
    assert np.any(arrays["owner"] != other)
    folders.write_arrays(folder / "2-prune" / "best.npz", arrays | {"owner": other})


@pytest.mark.parametrize(
    ("exchange", "words"),
    [
        (of_another_run, r"state-2 is damaged: it is of another stage or recipe\. Remove"),
        (of_another_epoch, r"state-1 is damaged: it is state-2, renamed\. Remove"),
        (of_another_stage, r"best\.npz is damaged: it is of another stage or recipe\. Remove"),
    ],
)
def test_whole_files_of_something_else_are_not_continued_from(exchange, words, half, tmp_path):
    """Though they have the right names, shapes and digests."""
    folder = shutil.copytree(half, tmp_path / "tiny")
    exchange(folder)
    with pytest.raises(ValueError, match=words):
        tscnc.experiments.run(recipe(), folder, progress=False)


STATE = "2-prune/state-2"
HALF = [
    "recipe.json",
    "data.json",
    *(name for name in FILES if name.startswith("1-train/")),
    "2-prune/best.npz",
    "2-prune/metrics.jsonl",
    f"{STATE}/checkpoint.data-00000-of-00001",
    f"{STATE}/checkpoint.index",
    f"{STATE}/manifest.json",
    f"{STATE}/metrics.json",
]


def test_the_files_of_a_run_that_was_stopped(half):
    names = files_below(half)
    assert [name for name in names if "state-1" not in name] == sorted(HALF)


@every_damage
@pytest.mark.parametrize("name", HALF)
def test_a_damaged_file_of_a_stopped_run_is_named_or_written_anew(
    half, name, damage, tmp_path, monkeypatch
):
    folder = shutil.copytree(half, tmp_path / "tiny")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(DAMAGES[damage](whole))
    # What is looked at is how it resumes, not the epochs after that.
    stop_after(monkeypatch, tscnc.datasets.Dataset, "training", lambda *arguments: True)
    if name == "2-prune/metrics.jsonl":
        with pytest.raises(StoppedError):
            tscnc.experiments.run(recipe(), folder, progress=False)
        assert (folder / name).read_bytes() == whole
        return
    with pytest.raises(ValueError) as caught:
        tscnc.experiments.run(recipe(), folder, progress=False)
    words = str(caught.value)
    assert str(folder / name) in words or (name, damage) == ("recipe.json", "one bit")
    assert "emove" in words or "hoose another folder" in words


def test_a_state_that_was_written_before_there_were_digests_is_read(half, tmp_path, monkeypatch):
    folder = shutil.copytree(half, tmp_path / "tiny")
    (folder / STATE / "manifest.json").unlink()
    stop_after(monkeypatch, tscnc.datasets.Dataset, "training", lambda *arguments: True)
    with pytest.raises(StoppedError):
        tscnc.experiments.run(recipe(), folder, progress=False)
    for name in (f"{STATE}/checkpoint.index", f"{STATE}/checkpoint.data-00000-of-00001"):
        with (
            damaged(folder / name, "cut off"),
            pytest.raises(ValueError, match=r"state-2/checkpoint is damaged: .*Remove the folder"),
        ):
            tscnc.experiments.run(recipe(), folder, progress=False)


def test_outputs_of_a_stage_that_was_stopped_at_its_end_are_written_anew(
    half, finished, tmp_path, monkeypatch
):
    folder = shutil.copytree(half, tmp_path / "tiny")
    write = folders.write_manifest
    for stage in ("3-finetune", "4-evaluate"):

        def stop(place, content, stage=stage):
            if place.name == stage:
                raise StoppedError
            write(place, content)

        with monkeypatch.context() as patch, pytest.raises(StoppedError):
            patch.setattr(folders, "write_manifest", stop)
            tscnc.experiments.run(recipe(), folder, progress=False)
        left = [path for path in (folder / stage).rglob("*") if path.is_file()]
        kept = {"best.npz", folders.EVALUATION_STATE}
        left = [path for path in left if "state-" not in str(path) and path.name not in kept]
        assert len(left) == (9 + 1 if stage == "4-evaluate" else 4)
        for path in left:
            path.write_bytes(DAMAGES["cut off"](path.read_bytes()))
    tscnc.experiments.run(recipe(), folder, progress=False)
    require_same(folder, finished)
    assert files_below(folder) == sorted(FILES)
    mine, theirs = (
        json.loads((each / "4-evaluate" / "report.json").read_text()) for each in (folder, finished)
    )
    assert mine["robust"] == theirs["robust"]
    tscnc.load_saved_model(folder / "4-evaluate" / "saved_model")


# One run at a time


def test_one_run_at_a_time_in_a_folder(copied):
    before = files_below(copied)
    with (
        locks.exclusive(copied),
        pytest.raises(RuntimeError, match=rf"{copied} is in use by process {os.getpid()} on .*"),
    ):
        tscnc.experiments.run(recipe(), copied, progress=False)
    assert files_below(copied) == before
    tscnc.experiments.run(recipe(), copied, progress=False)


def test_a_thread_is_kept_out_as_a_process_is(tmp_path):
    def enter(folder):
        try:
            with locks.exclusive(folder):
                return "entered"
        except RuntimeError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor() as pool, locks.exclusive(tmp_path / "a"):
        assert " UTC: two runs would" in pool.submit(enter, tmp_path / "a").result()
        for other in ("a/inner", "b", "."):
            assert pool.submit(enter, tmp_path / other).result() == "entered"
    assert enter(tmp_path / "a") == "entered"


def test_a_lock_goes_when_its_block_fails(tmp_path):
    with pytest.raises(StoppedError), locks.exclusive(tmp_path):
        raise StoppedError
    with locks.exclusive(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [locks.LOCK]


def test_a_folder_with_nothing_but_a_lock_is_new(tmp_path):
    (tmp_path / locks.LOCK).touch()
    (tmp_path / locks.HOLDER).write_text("{")
    assert folders.is_new(tmp_path, recipe())
    with (
        locks.exclusive(tmp_path),
        pytest.raises(RuntimeError, match=f"in use by process {os.getpid()} on"),
        locks.exclusive(tmp_path),
    ):
        pass
    (tmp_path / locks.HOLDER).write_text("{")
    with (
        filelock.FileLock(tmp_path / locks.LOCK),
        pytest.raises(RuntimeError, match="in use by another process"),
        locks.exclusive(tmp_path),
    ):
        pass


def test_without_filelock_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "filelock", None)
    with (
        pytest.raises(ImportError, match=r"pip install \"\.\[experiments\]\" in a"),
        locks.exclusive(tmp_path),
    ):
        pass


# A disk that is full


@contextlib.contextmanager
def small_files(limit=2048):
    """Let the system refuse to write more than so many bytes into a file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("library", ["keras", "tf_keras"])
@pytest.mark.parametrize("kind", ["json", "arrays", "model", "state"])
def test_what_a_full_disk_refuses_is_named(tmp_path, library, kind, rng):
    goal = tmp_path / ("state-1" if kind == "state" else "goal")
    values = rng.random(2000)
    chosen = recipe(**{"network.library": library})
    model = stages.network(chosen, stages.dataset(chosen))
    write = {
        "json": lambda: folders.write_json(goal, values.tolist()),
        "arrays": lambda: folders.write_arrays(goal, {"values": values}),
        "model": lambda: folders.write_model(goal, model),
        "state": lambda: folders.write_state(
            *(tmp_path, folders.Progress(1), tf.train.Checkpoint(model=model)),
            *([], {}, folders.owner(chosen, "train")),
        ),
    }[kind]
    with small_files(), pytest.raises(OSError) as caught:
        write()
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(goal))
    assert not list(tmp_path.iterdir())
    write()
    assert goal.exists()


def test_a_folder_that_is_removed_while_it_runs_is_named(tmp_path, monkeypatch):
    run = tmp_path / "run"
    original = folders.write_state

    def remove(*arguments):
        original(*arguments)
        shutil.rmtree(run)

    monkeypatch.setattr(folders, "write_state", remove)
    with pytest.raises(FileNotFoundError, match=f"{run}/1-train was removed or renamed while"):
        tscnc.experiments.run(recipe(), run, progress=False)
