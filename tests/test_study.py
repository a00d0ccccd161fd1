"""The study: its plans, its statistics, and a tiny one from end to end."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
from scipy import stats

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tscnc_tf as tscnc
from benchmarks import accelerator
from benchmarks.study import accelerate, choosing, flattery, report, results, table, work
from benchmarks.study.__main__ import DOCUMENT, RESULTS, main
from benchmarks.study.plan import HERE, Plan
from benchmarks.study.results import Cell, Layer, Result
from benchmarks.study.table import Store
from tscnc_tf import attacks
from tscnc_tf.experiments import locks, stages

TINY = """
name: tiny
seeds: [0, 1]
methods: [magnitude]
sparsities: [0.8]
settings:
  digits:
    data: {dataset: digits, train_examples: 128, test_examples: 32, validation: 64}
    network: {architecture: small-cnn, options: {width: 2}}
    adversary: {epsilon: 0.1, step_size: 0.05, steps: 1}
    train: &training {epochs: 1, batch_size: 64}
    prune: {<<: *training}
    finetune: {<<: *training}
    evaluate: {steps: 1, restarts: 1, validation_steps: 1}
arms:
  none: {}
  cnc: {constraints.condition_factor: 0.1}
  later: {constraints.condition_factor: 0.1, constraints.stages: [train, finetune]}
choices:
  cnc: {name: constraints.condition_factor, values: [0.1, 1.0]}
"""


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return Plan.read(path)


def result(
    seed=0, arm="none", robust=0.5, effective=2.0, sparsity=0.99, method="magnitude", **values
):
    cell = Cell("digits", method, sparsity)
    figures = {"clean": 0.9, "lipschitz": 1.0, "condition": np.inf, "dead": 3, "stable_rank": 0.5}
    return Result(cell, arm, seed, robust=robust, effective=effective, **{**figures, **values})


# Plans


@pytest.mark.parametrize("name", ["cpu", "quick", "accelerator"])
def test_the_plans_are_paired_and_balanced(name):
    plan = Plan.read(HERE / f"{name}.yaml")
    runs = list(plan.runs())
    at_each = [len(plan.only.get(arm, plan.sparsities)) for arm in plan.arms]
    factors = (plan.seeds, plan.settings, plan.methods)
    assert len(runs) == np.prod([len(factor) for factor in factors]) * sum(at_each)
    assert set(plan.only) <= set(plan.arms)
    assert all(set(levels) <= set(plan.sparsities) for levels in plan.only.values())
    assert len({(run.setting, run.name) for run in runs}) == len(runs)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert all(run.recipe.seed == run.seed for run in runs)
    base = next(run for run in runs if run.arm == results.BASE)
    assert base.recipe == base.recipe.baseline()
    for run in runs:  # an arm changes constraints, the choice of weights and fine-tuning only
        same = {"data", "network", "adversary", "train", "evaluate", "seed"}
        place = (results.BASE, run.setting, run.seed)
        pair = next(other for other in runs if (other.arm, other.setting, other.seed) == place)
        for part in same:
            assert getattr(run.recipe, part) == getattr(pair.recipe, part)


def test_the_cpu_study_has_what_it_promises():
    plan = Plan.read(HERE / "cpu.yaml")
    assert plan.seeds == (0, 1, 2, 3, 4)
    assert plan.sparsities == (0.9, 0.95, 0.99)
    assert set(plan.methods) == {"magnitude", "scores"}
    assert set(plan.arms) == {
        "none",
        "cnc",
        "tsc",
        "both",
        "throughout",
        "alive",
        "budgets",
        "gates",
        "authors",
        "noise",
        "variant",
        "distilled",
        "combined",
        "penalty",
    }
    assert choosing.SEED not in plan.seeds
    by_arm = {run.arm: run.recipe for run in plan.runs() if run.setting == "digits"}
    assert by_arm["authors"].constraints.form == "authors"
    assert by_arm["authors"].constraints.layers == "logits"
    assert by_arm["gates"].gates.sparsity_factor > 0
    assert by_arm["tsc"].constraints.condition_factor == 0
    assert by_arm["cnc"].constraints.sparsity_factor == 0
    assert by_arm["alive"].prune.min_per_filter == 1
    assert by_arm["budgets"].prune.scope == "condition"
    assert by_arm["distilled"].finetune.loss == by_arm["combined"].finetune.loss == "rslad"
    assert by_arm["variant"].prune.min_per_filter == by_arm["combined"].prune.min_per_filter == 1
    assert 0 < by_arm["noise"].gates.sparsity_factor < 1e-6
    assert (
        by_arm["penalty"].override({"gates.drop_rate": by_arm["gates"].gates.drop_rate})
        == (by_arm["gates"])
    )
    for arm in ("alive", "budgets", "distilled"):
        assert by_arm[arm].first_stage() == by_arm["none"].first_stage()
    for arm in ("variant", "combined"):
        assert by_arm[arm].first_stage() == by_arm["gates"].first_stage()


def test_arms_that_train_the_same_dense_network_share_it(plan):
    dense = {run.arm: run.dense for run in plan.runs()}
    assert dense == {"none": "none", "cnc": "cnc", "later": "cnc"}
    assert len({run.group for run in plan.runs()}) == 4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: tiny", "name: ../tiny", r"^name must be usable as the name of a file"),
        ("  cnc: {constr", "  ../cnc: {constr", "a name in arms must be usable as .* got '../cnc'"),
        ("  digits:", "  a/b:", "a name in settings must be usable as .* got 'a/b'"),
        ("seeds: [0, 1]", "", r"tiny\.yaml is no plan: it must hold \['arms', .*'seeds'"),
        ("choices:", "chances:", r"tiny\.yaml is no plan"),
        ("seeds: [0, 1]", "seeds: [0]\nseeds: [1]", r"tiny\.yaml has seeds twice, in line 3 and"),
        (TINY, "", r"tiny\.yaml is empty"),
    ],
)
def test_a_plan_that_is_none_is_refused(tmp_path, old, new, message):
    assert TINY.count(old) == 1
    (tmp_path / "tiny.yaml").write_text(TINY.replace(old, new))
    with pytest.raises(ValueError, match=message):
        Plan.read(tmp_path / "tiny.yaml")


def test_one_process_at_a_time_works_on_a_group_and_on_the_choices(plan, tmp_path):
    scratch, store = tmp_path / "scratch", Store(tmp_path / "tiny.csv", tmp_path / "fresh")
    group = next(plan.runs()).group
    with (
        locks.exclusive(scratch / ".locks" / group),
        pytest.raises(RuntimeError, match=f"none-seed0 is in use by process {os.getpid()} on"),
    ):
        work.work(plan, store, scratch, group)
    with (
        locks.exclusive(scratch / "choices"),
        pytest.raises(RuntimeError, match="choices is in use by process"),
    ):
        choosing.choose(plan, ["digits"], tmp_path / "choices.csv", scratch)
    assert not (scratch / "digits").exists()


def content(run, **values):
    values = {"recipe": work.portable(run, {"name": "digits"}), "clean": 0.5, **values}
    return {**dict(zip(table.PLACE, table.place(run), strict=True)), **values}


def test_a_damaged_result_is_named(plan, tmp_path):
    store = Store(tmp_path / "tiny.csv", tmp_path / "fresh")
    run = next(plan.runs())
    store.add(run, {})
    (path,) = store.fresh.glob("*/*.json")
    path.write_text("{")
    with pytest.raises(ValueError, match=rf"{path} is damaged.*Remove it, and run the study"):
        work.require_current(plan.runs(), store)
    path.unlink()
    table.write(store.table, [content(run)])
    store.table.write_text(store.table.read_text().rpartition(",")[0] + "\n")
    with pytest.raises(ValueError, match=rf"{store.table} is damaged in line 2.*Restore it"):
        work.require_current(plan.runs(), store)


def test_results_of_another_plan_are_refused(tmp_path, plan):
    store = Store(tmp_path / "tiny.csv", tmp_path / "fresh")
    table.write(store.table, [content(next(plan.runs()))])
    work.require_current(plan.runs(), store)
    (tmp_path / "tiny.yaml").write_text(TINY.replace("epochs: 1", "epochs: 2"))
    with pytest.raises(ValueError, match=r"is by another plan: train\.epochs was 1, not 2; prune"):
        work.require_current(Plan.read(tmp_path / "tiny.yaml").runs(), store)


def test_results_of_runs_are_entered_into_the_table(plan, tmp_path):
    store = Store(tmp_path / "tiny.csv", tmp_path / "fresh")
    runs = list(plan.runs())
    store.enter()  # there is nothing
    assert not store.table.exists()
    for run in (runs[1], runs[0], runs[4]):
        store.add(run, content(run))
        before = store.read()
        store.enter()
        assert store.read() == before
        assert before[table.place(run)] == json.loads(json.dumps(content(run)))
        assert not list(store.fresh.glob("*/*.json"))
    assert store.missing(runs) == [runs[2], runs[3], runs[5]]
    assert list(store.read()) == sorted(store.read())


def test_a_table_holds_any_values(tmp_path):
    rows = [
        {"a": 0.1, "b": {"c": True, "d": {"e": None, "f": float("inf")}}, "z": {}},
        {"a": 1, "b": {"d": {"e": "1"}, "new": [1, "x,y", {"k": 'quo"ted'}]}, "text": "4/255"},
        {"a": "", "b": {"c": "true", "d": 'two\nlines, "quoted"'}, "text": "κ", "z": {"y": []}},
        {"a": -1e-300, "text": "null", "b": {"c": "NaN", "d": "[", "g": "{}"}},
    ]
    table.write(tmp_path / "any.csv", rows)
    found, same = (json.dumps(r, sort_keys=True) for r in (table.read(tmp_path / "any.csv"), rows))
    assert found == same
    with pytest.raises(ValueError, match="keys must have no ':' for a table, got 'a:b'"):
        table.write(tmp_path / "other.csv", [{"a:b": 1}])
    assert table.read(tmp_path / "other.csv") == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--settings", "digit"], r"--settings must be among \['digits', .*got 'digit'"),
        (["--data", "cifar10"], "--data must be NAME=FILE, .*got 'cifar10'"),
        (["--plan", "none.yaml"], "--plan must be a YAML file, got none.yaml: No such file"),
    ],
)
def test_the_command_line_names_what_it_cannot_take(words, message, capsys):
    with pytest.raises(SystemExit):
        main(["run", *words])
    assert re.search(message, capsys.readouterr().err)


def test_files_are_put_in_the_place_of_names(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    plan = Plan.read(path, {"digits": "/data/mine.npz"})
    assert next(plan.runs()).recipe.data.dataset == "/data/mine.npz"


# Statistics


def test_an_interval_is_students(rng):
    values = rng.normal(0.5, 0.1, 5)
    mean, half, count = results.estimate(values)
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert (mean - half, mean + half, count) == pytest.approx((low, high, 5))
    assert results.estimate([0.5]).half == np.inf
    assert np.isnan(results.estimate([]).mean)


def test_differences_are_taken_seed_by_seed():
    base = {seed: result(seed, robust=0.1 * seed) for seed in range(4)}
    arm = {seed: result(seed, "cnc", robust=0.1 * seed + 0.05) for seed in range(1, 6)}
    found = results.paired(arm, base)
    assert found.count == 3  # the seeds that both have
    assert found.mean == pytest.approx(0.05)
    assert found.half == pytest.approx(0.0, abs=1e-12)


def test_the_correlation_is_spearmans_and_knows_infinity(rng):
    x, y = rng.normal(size=12), rng.normal(size=12)
    found = results.correlation(x, x + y)
    assert found == pytest.approx(stats.spearmanr(x, x + y).statistic)
    with_infinity = np.where(x == x.max(), np.inf, x)
    assert results.correlation(with_infinity, x + y) == pytest.approx(found)
    tied = np.where(x > 0, np.inf, x)
    assert results.correlation(tied, y) == pytest.approx(stats.spearmanr(tied, y).statistic)
    assert np.isnan(results.correlation([1.0] * 6, y[:6]))


def test_correlations_are_taken_within_cells_seed_by_seed():
    """Neither what sparsity does nor what the seed does is taken for what the arms do."""
    signs = {0.9: (1, 1, -1), 0.99: (-1, -1, -1)}
    found = [
        result(
            seed,
            f"arm-{arm}",
            robust=0.3 * seed + sign * 0.01 * arm,
            effective=100.0 * seed + arm,
            sparsity=sparsity,
        )
        for sparsity, of_seeds in signs.items()
        for seed, sign in enumerate(of_seeds)
        for arm in range(5)
    ]
    found += [result(3, f"arm-{arm}", effective=2.0, sparsity=0.9) for arm in range(5)]  # alike
    found += [result(4, "arm-0", sparsity=0.9)]  # too few
    by_sparsity = {
        c.sparsity: value for c, value in results.within_cells(found, "effective").items()
    }
    mean, half, count = by_sparsity[0.9]
    assert (mean, count) == (pytest.approx(1 / 3), 3)
    assert half == pytest.approx(stats.t.ppf(0.975, 2) * np.std([1, 1, -1], ddof=1) / np.sqrt(3))
    assert by_sparsity[0.99] == pytest.approx((-1, 0, 3))
    assert "| +0.33 ± 2.87 (3) |" in report.tables(found, ["arm-0"])


# Tables


def test_the_table_says_what_was_found():
    found = [result(seed, robust=0.50 + 0.01 * seed) for seed in range(3)]
    found += [result(seed, "cnc", 0.55 + 0.01 * seed, condition=4.0, dead=0) for seed in range(3)]
    text = report.tables(found, ["none", "cnc", "tsc"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    (none,) = [row for row in rows if row and row[0] == "none"]
    (cnc,) = [row for row in rows if row and row[0] == "cnc"]
    assert "### digits, magnitude, 99 % zeros" in text
    half = 100 * stats.t.ppf(0.975, 2) * 0.01 / np.sqrt(3)
    assert none[1:7] == ["3", "90.0 ± 0.0", f"51.0 ± {half:.1f}", "", "", "∞"]
    assert cnc[4:9] == ["+0.0 ± 0.0", "+5.0 ± 0.0", "4", "2", "0.0"]
    assert not any(row and row[0] == "tsc" for row in rows)


def test_arms_are_held_against_pruning_alone_in_both_ways():
    found = [result(seed, robust=0.5 + 0.1 * seed) for seed in range(2)]
    found += [result(seed, robust=0.4, method="scores") for seed in range(2)]
    found += [result(seed, "cnc", 0.7, method="scores", clean=0.8) for seed in range(2)]
    found += [result(seed, robust=0.6, sparsity=0.5) for seed in range(2)]
    text = report.tables(found, ["none", "cnc"])
    table = text.split("### digits, 99 % zeros: against pruning alone\n\n")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    wide = f"{100 * stats.t.ppf(0.975, 1) * 0.05:.1f}"
    columns = [f"{w} − none, {m}" for m in ("magnitude", "scores") for w in ("clean", "robust")]
    assert rows[0] == ["arm, method", *columns]
    assert rows[2:] == [
        ["none, magnitude", "", "", "+0.0 ± 0.0", f"+15.0 ± {wide}"],
        ["none, scores", "+0.0 ± 0.0", f"-15.0 ± {wide}", "", ""],
        ["cnc, scores", "-10.0 ± 0.0", f"+15.0 ± {wide}", "-10.0 ± 0.0", "+30.0 ± 0.0"],
    ]


def test_kernels_are_looked_at_one_by_one():
    layers = [(Layer("a", np.inf, 2.0, 0.25, 3), Layer("b", 4.0, 4.0, 0.5, 0))]
    layers += [(Layer("a", 8.0, 4.0, 0.75, 0), Layer("b", 2.0, 2.0, 0.5, 0))]
    layers += [(Layer("a", 6.0, 6.0, 0.5, 0), Layer("b", 3.0, 3.0, 0.5, 0))]
    found = [result(seed, layers=each, versions=("x 1",)) for seed, each in enumerate(layers)]
    text = report.tables(found, ["none", "cnc"])
    assert "| a | 8 · 4 · 0.50 · 1.0 |\n| b | 3 · 3 · 0.50 · 0.0 |" in text
    assert text.endswith("Made with x 1.")


def test_tables_are_put_between_their_marks(tmp_path):
    path = tmp_path / "study.md"
    path.write_text("before\n<!-- begin: tiny -->\nold\n<!-- end: tiny -->\nafter\n")
    report.insert(path, "tiny", "new")
    report.insert(path, "tiny", "newer")
    assert path.read_text() == (
        "before\n<!-- begin: tiny -->\n\nnewer\n\n<!-- end: tiny -->\nafter\n"
    )
    with pytest.raises(ValueError, match="has no marks <!-- begin: other -->"):
        report.insert(path, "other", "new")


@pytest.mark.parametrize("name", ["cpu", "accelerator"])
def test_the_document_shows_the_results_that_are_there(name, tmp_path):
    plan, store = Plan.read(HERE / f"{name}.yaml"), Store(RESULTS / f"{name}.csv", tmp_path)
    work.require_current(plan.runs(), store)
    found = [Result.of(content) for content in store.read().values()]
    text = DOCUMENT.read_text(encoding="utf-8")
    if found:
        assert report.tables(found, list(plan.arms)) in text
    else:
        assert f"<!-- begin: {name} -->\n<!-- end: {name} -->" in text


def test_the_factors_are_those_that_the_validation_set_chose():
    plan = Plan.read(HERE / "cpu.yaml")
    chosen = choosing.best(plan, RESULTS / "cpu-choices.csv")
    constraint, sparse = "constraints.condition_factor", "constraints.sparsity_factor"
    for setting, arms in chosen.items():
        settled = plan.settled[setting]
        for arm, value in arms.items():
            assert arm in settled, "all values have been tried: settle it in the plan"
            assert settled[arm][plan.choices[arm]["name"]] == value
        for arm in ("both", "throughout", "gates", "noise"):
            assert settled[arm][constraint] == settled["cnc"][constraint]
        for arm in ("both", "throughout"):
            assert settled[arm][sparse] == settled["tsc"][sparse]
        for arm in ("variant", "combined", "penalty"):
            assert settled[arm] == settled["gates"]


# From end to end


def test_a_tiny_study_runs_goes_on_and_reports(tmp_path, plan, monkeypatch, capsys):
    values = {**yaml.safe_load(TINY), "seeds": [0]}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    folders = ["--results", str(tmp_path / "results"), "--scratch", str(tmp_path / "scratch")]
    options = ["--plan", str(path), *folders, "--workers", "2"]
    assert main(["run", *options]) == 0, list((tmp_path / "scratch").rglob("*.log"))
    store = Store(tmp_path / "results" / "tiny.csv", tmp_path / "scratch" / "tiny" / "results")
    assert list(store.read()) == [
        ("digits", arm, "magnitude", 0.8, 0) for arm in ("cnc", "later", "none")
    ]
    rows = table.read(store.table)
    contents = {row["arm"]: row for row in rows}
    none = contents["none"]
    assert none["examples"] == 32
    assert none["recipe"]["data"]["dataset"] == "digits"
    dense = [name for name, row in none["kernels"].items() if not row["pruned"]]
    assert dense == ["stem", "logits"]
    assert 0 <= none["robust"] <= none["clean"] <= 1
    # The two share a dense network, and part in the third stage.
    assert contents["cnc"]["validation"]["train"] == contents["later"]["validation"]["train"]
    assert contents["cnc"]["kernels"] != contents["later"]["kernels"]
    assert not list((tmp_path / "scratch" / "tiny").glob("digits/*"))  # tidied up
    table.write(store.table, [row for row in rows if row["arm"] != "none"])
    missing = store.missing(Plan.read(path).runs())
    assert [run.name for run in missing] == ["none-magnitude-80-seed0"]
    assert main(["run", *options, "--minutes", "0"]) == 75
    assert "More is to do" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"has no marks .* Leave out --write"):
        main(["report", *options, "--write"])
    with monkeypatch.context() as patched:
        patched.setattr(work.sys, "executable", "false")
        assert main(["run", *options]) == 1
    assert "Failed: digits/none-seed0" in capsys.readouterr().out
    path.write_text(TINY.replace("epochs: 1", "epochs: 2"))
    with pytest.raises(ValueError, match=r"is by another plan: train\.epochs was 1, not 2"):
        main(["report", *options])


ACCELERATED = """
name: accelerated
seeds: [0]
methods: [magnitude, scores]
sparsities: [0.8]
settings:
  images:
    data: {dataset: images, validation: 16}
    network: {architecture: small-cnn, options: {width: 2}}
    adversary: {epsilon: 8/255, step_size: 4/255, steps: 1}
    train: &training {epochs: 2, batch_size: 16}
    prune: {<<: *training, average: 0.0, frequency: 1, min_per_filter: 1}
    finetune: {<<: *training}
    evaluate: {steps: 1, restarts: 1, validation_steps: 1, batch_size: 16}
arms:
  none: {}
  gates: {gates.sparsity_factor: 1.0, gates.layers: "stage_*"}
only:
  gates: [0.8]
"""


@pytest.mark.parametrize("value", [("prune.scope", "condition"), ("finetune.loss", "rslad")])
def test_what_needs_the_dense_network_is_not_exported_before_it_is_there(tmp_path, plan, value):
    measured = dataclasses.replace(plan, arms={"none": {}, "other": dict([value])})
    with pytest.raises(ValueError, match="arm with {}={!r}, which needs the dense".format(*value)):
        accelerate.export(measured, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_an_arm_that_diverges_is_left_out_and_told_of(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(accelerate.RUNNER))
    run_all = importlib.import_module("run_all")
    needs = {"dense": (None, [0, 0]), "pruned": ("dense", [0, 1]), "plain": (None, [1, 0])}
    for arm, (dense, order) in needs.items():
        (tmp_path / "images" / arm / "run").mkdir(parents=True)
        about = {"order": order, "data": "data", "from": dense, "file": "train-best.npz"}
        (tmp_path / "images" / arm / "needs.json").write_text(json.dumps(about))
    begun = []

    def run(arguments):
        begun.append(pathlib.Path(arguments[0]).name)
        if begun[-1] == "dense":
            raise FloatingPointError("stage 'train' diverged in epoch 1: {'loss': nan}.")
        (pathlib.Path(arguments[0]) / "run" / "result.json").write_text("{}")
        return 0

    monkeypatch.setattr(run_all.run, "main", run)
    for _ in range(2):  # once more: what has failed is not tried again
        assert run_all.main([str(tmp_path)]) == 1
        assert "images/dense, images/pruned." in capsys.readouterr().err
    assert begun == ["dense", "plain"]
    failed = json.loads((tmp_path / "images" / "dense" / "run" / "failed.json").read_text())
    assert "diverged in epoch 1" in failed["error"]


def test_a_study_on_an_accelerator_is_exported_run_and_collected(tmp_path, capsys, monkeypatch):
    """On a CPU, in a process that has neither TensorFlow nor this package."""
    pairs = [("none", "magnitude"), ("none", "scores"), ("gates", "scores")]
    of_the_plan = Plan.runs
    monkeypatch.setattr(
        Plan,
        "runs",
        lambda plan: (run for run in of_the_plan(plan) if (run.arm, run.method) in pairs),
    )
    rng = np.random.default_rng(0)
    y = np.arange(96) % 3
    x = rng.integers(0, 100, (96, 8, 8, 3)).astype(np.uint8)
    for index, label in enumerate(y):
        x[index, :, 2 * label : 2 * label + 2] += 120
    images = tmp_path / "images.npz"
    np.savez(images, x_train=x[:64], y_train=y[:64], x_test=x[64:], y_test=y[64:])
    path = tmp_path / "plan.yaml"
    path.write_text(ACCELERATED)
    folders = ["--results", str(tmp_path / "results"), "--scratch", str(tmp_path / "scratch")]
    options = ["--plan", str(path), *folders, "--data", f"images={images}"]
    assert main(["export", *options]) == 0
    assert main(["export", *options]) == 0  # nothing is left to do
    path.write_text(
        ACCELERATED.replace("train: &training {epochs: 2", "train: &training {epochs: 1")
    )
    with pytest.raises(ValueError, match=r"another recipe: train\.epochs was 2, not 1"):
        main(["export", *options])
    path.write_text(ACCELERATED)
    folder = tmp_path / "scratch" / "accelerated"
    code = (
        "import runpy, sys; sys.modules.update(tensorflow=None, keras=None, tscnc_tf=None); "
        "sys.path[0] = 'runner'; runpy.run_path('runner/run_all.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "."]
    hasty = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    options_of_run = {"cwd": folder, "env": {**os.environ, "XLA_FLAGS": hasty}, "text": True}
    first = subprocess.run([*command, "--minutes", "0.001"], check=False, **options_of_run)
    assert first.returncode == 75
    done = subprocess.run(command, check=False, capture_output=True, **options_of_run)
    assert done.returncode == 0, done.stderr
    assert main(["collect", *options]) == 0
    store = Store(tmp_path / "results" / "accelerated.csv", folder / "results")
    contents = store.read()
    assert not store.fresh.exists() or not list(store.fresh.glob("*/*"))
    for arm, method in pairs:
        name = f"{arm}-{method}-80-seed0"
        content = contents[("images", arm, method, 0.8, 0)]
        run = folder / "images" / name / "run"
        test = json.loads((run / "result.json").read_text())["test"]
        assert (content["clean"], content["robust"]) == (
            test["clean_accuracy"],
            test["attacked_accuracy"],
        )
        # The network that came back, judged here, is right as often as it was there.
        found = Plan.read(path, {"images": str(images)})
        (same,) = [each for each in found.runs() if each.name == name]
        model = accelerate.network_of(same, run)
        xs, ys = stages.dataset(same.recipe).arrays("test")
        assert np.mean(np.argmax(model.predict(xs, verbose=0), 1) == ys) == content["clean"]
        for layer, row in content["kernels"].items():
            kernel = model.get_layer(layer).get_weights()[0]
            kept = kernel.size - round(0.8 * kernel.size) if row["pruned"] else kernel.size
            assert np.count_nonzero(kernel) == kept
    # What is pruned has begun with the network that the gated one is at inference.
    data = stages.dataset(same.recipe)
    trainer = stages.trainer(same.recipe, "train", data)
    dense = folder / "images" / "dense-gates-seed0" / "run"
    accelerator.restore(trainer, dense / "train-best.npz")
    plain = stages.plain(same.recipe, data, trainer.model)
    with np.load(dense / "train-plain.npz") as arrays:
        known = accelerator.model_variables(plain)
        assert set(arrays) == set(known)
        for name, variable in known.items():
            np.testing.assert_allclose(arrays[name], variable.numpy(), rtol=0, atol=1e-6)
    capsys.readouterr()


# AutoAttack


def short_attacks(ensemble):
    """A small ensemble in place of AutoAttack's own."""
    options = {"epsilon": ensemble.epsilon, "steps": 2}
    targeted = attacks.APGD(loss="targeted_dlr", target_classes=1, **options)
    return attacks.APGD(loss="ce", **options), targeted


def test_networks_are_judged_by_pgd_and_by_autoattack_once(plan, tmp_path, monkeypatch, capsys):
    dense, pruned = flattery.NETWORKS[:2]
    monkeypatch.setattr(flattery, "NETWORKS", (dense, pruned))
    monkeypatch.setattr(attacks.AutoAttack, "attacks", property(short_attacks))
    words = ["flattery", "--plan", str(tmp_path / "tiny.yaml"), "--seeds", "1"]
    words += ["--results", str(tmp_path), "--scratch", str(tmp_path / "scratch")]
    assert main(words) == 0
    rows = table.read(tmp_path / "tiny-flattery.csv")
    assert [(row["setting"], row["network"], row["seed"]) for row in rows] == [
        ("digits", "dense", 1),
        ("digits", "magnitude", 1),
    ]
    for row in rows:
        assert row["images"] == 32
        assert row["worst"] <= min(row["pgd"], row["autoattack"]) <= row["clean"]
        assert row["clean"] - row["autoattack"] == sum(row["fooled"].values())
        assert row["attacks"] == ["PGD-1 linf 0.1", "PGD-1 linf 0.1 margin"]
    shown = capsys.readouterr().out
    monkeypatch.setattr(flattery.experiments, "run", None)
    assert main(words) == 0
    assert capsys.readouterr().out == shown


def test_the_difference_between_pgd_and_autoattack_is_over_all_seeds(tmp_path):
    figures = {"setting": "digits", "network": "dense", "images": 100, "clean": 90}
    figures |= {"autoattack": 50, "worst": 48, "versions": {"numpy": "2"}}
    rows = [{**figures, "seed": seed, "pgd": pgd} for seed, pgd in ((0, 52), (1, 56))]
    table.write(tmp_path / "table.csv", rows)
    low, high = (100 * end for end in tscnc.evaluation.wilson_interval(12, 200))
    expected = f"| dense | 2 | 200 | 90.0 | 54.0 | 50.0 | 6.0 ({low:.1f} to {high:.1f}) |"
    assert expected in flattery.tables(tmp_path / "table.csv")


def test_the_document_shows_what_autoattack_found():
    text = flattery.tables(RESULTS / "quick-flattery.csv")
    assert text in DOCUMENT.read_text(encoding="utf-8")
