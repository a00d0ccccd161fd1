"""The study: its plans, its statistics, and a tiny one from end to end."""

from __future__ import annotations

import collections
import dataclasses
import importlib
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf
import yaml
from accelerator_arm import HASTY
from batches import Epoch, Images
from scipy import stats

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import accelerator
from benchmarks.study import accelerate, report, results, table, work
from benchmarks.study.__main__ import DOCUMENT, RESULTS, main
from benchmarks.study.plan import HERE, PLACE, Plan
from benchmarks.study.results import Cell, Result
from benchmarks.study.table import Store
from tscnc_tf import datasets, experiments
from tscnc_tf.experiments import locks, stages

TINY = """
name: tiny
seeds: [0, 1]
settings:
  digits:
    data: {dataset: digits, train_examples: 128, test_examples: 32, validation: 64}
    network: {architecture: small-cnn, options: {width: 2}}
    adversary: {epsilon: 0.1, step_size: 0.05, steps: 1}
    train: &training {epochs: 1, batch_size: 64}
    prune: {<<: *training, method: magnitude}
    finetune: {<<: *training}
    evaluate: {attack: pgd, steps: 1, restarts: 1, validation_steps: 1}
arms:
  dense: {sparsities: [0.0]}
  uniform: {}
  cnc: {base: uniform, constraints.condition_factor: 0.1}
  later: {base: cnc, constraints.stages: [train, finetune]}
grid:
  digits: [{arms: every, sparsities: [0.8]}, {arms: [uniform], sparsities: [0.5]}]
against: [uniform]
"""

TUNED = f"""{TINY}
tuning:
  digits:
    seeds: [1000, 1001]
    sparsity: 0.8
    rounds:
      - every: {{names: [train.weight_decay, finetune.weight_decay], values: [0.01, 0.02]}}
      - every: {{names: [finetune.learning_rate], values: [0.1, 0.2]}}
        cnc: {{names: [constraints.condition_factor], values: [0.1, 1.0]}}
"""


def read(tmp_path, text):
    path = tmp_path / "tiny.yaml"
    path.write_text(text)
    return Plan.read(path)


@pytest.fixture
def plan(tmp_path):
    return read(tmp_path, TINY)


def result(seed=0, arm="uniform", robust=0.5, effective=2.0, sparsity=0.99, **values):
    figures = {
        "clean": 0.9,
        "pgd": np.nan,
        "zeros": 0.95,
        "lipschitz": 1.0,
        "condition": np.inf,
        "dead": 3,
    }
    place = (Cell("digits", sparsity), arm, seed)
    return Result(*place, robust=robust, effective=effective, **{**figures, **values})


def found_of(of_results):
    """Return the results as the table has them, by where they stand."""
    rows = [
        {
            "setting": each.cell.setting,
            "arm": each.arm,
            "trial": "",
            "sparsity": each.cell.sparsity,
            "seed": each.seed,
            "clean": each.clean,
            "robust": each.robust,
            "effective_zeros": each.zeros,
            "lipschitz": each.lipschitz,
            "pgd": {"worst": each.pgd},
            "kernels": {
                "a": {
                    "pruned": True,
                    "condition_number": each.condition,
                    "effective_condition_number": each.effective,
                    "dead_filters": each.dead,
                }
            },
            "versions": {"numpy": "2"},
        }
        for each in of_results
    ]
    return {tuple(row[name] for name in PLACE): row for row in rows}


# Plans


def trials_with(plan, robust):
    """Return what all trials leave, round by round, if a run's accuracy is that of a function."""
    found = {}
    while True:
        missing = [run for run in plan.trials(found) if run.place not in found]
        if not missing:
            return found
        for run in missing:
            found[run.place] = content(run, validation={"finetune": {"robust": robust(run)}})


@pytest.mark.parametrize("name", ["cpu", "recovery", "structure", "whole", "quick", "accelerator"])
def test_the_plans_are_paired_and_balanced(name):
    plan = Plan.read(HERE / f"{name}.yaml")
    runs = list(plan.runs(trials_with(plan, lambda run: 0.5)))
    levels = [len(plan.sparsities(s, arm)) for s in plan.settings for arm in plan.arms]
    assert len(runs) == len(plan.seeds) * sum(levels)
    assert len({(run.setting, run.name) for run in runs}) == len(runs)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert all(run.recipe.seed == run.seed for run in runs)
    found = {(run.setting, run.arm, run.seed): run.recipe for run in runs}
    for run in runs:
        arm = "uniform" if "uniform" in plan.arms else plan.base(run.arm) or run.arm
        pair = found[run.setting, arm, run.seed]
        for part in ("data", "network", "adversary", "evaluate", "seed"):
            assert getattr(run.recipe, part) == getattr(pair, part)
        for part in ("train", "prune", "finetune"):  # nobody trains longer, or against less
            for field in ("epochs", "batch_size", "beta", "decay"):
                mine, theirs = (getattr(getattr(each, part), field) for each in (run.recipe, pair))
                assert mine == theirs


def test_each_arm_of_the_study_has_as_many_trials():
    plan = Plan.read(HERE / "cpu.yaml")
    trials = [run for found in [trials_with(plan, lambda run: 0.5)] for run in plan.trials(found)]
    for setting, tuning in plan.tuning.items():
        counts = collections.Counter(run.arm for run in trials if run.setting == setting)
        arms = [arm for arm in plan.arms if plan.sparsities(setting, arm)]
        assert set(counts) == set(arms)
        assert len(set(counts.values())) == 1
        assert not set(tuning.seeds) & set(plan.seeds)
    assert {run.sparsity for run in trials if run.arm != "dense"} == {0.99}
    by_arm = {run.arm: run.recipe for run in trials if run.setting == "digits"}
    assert by_arm["dense"].sparsity == 0
    assert by_arm["authors"].constraints.layers == "logits"
    for arm in ("tsc", "cnc", "tscnc", "gates", "recalibrated", "distilled"):
        assert by_arm[arm].prune.scope == by_arm["global"].prune.scope == "global"
    assert by_arm["throughout"].constraints.stages == ("train", "prune", "finetune")


def test_arms_that_train_the_same_dense_network_share_it(plan):
    runs = [run for run in plan.runs({}) if run.seed == 0]
    dense = {run.arm: run.dense for run in runs}
    assert [run.name for run in runs] == [
        "dense-0-seed0",
        "uniform-80-seed0",
        "cnc-80-seed0",
        "later-80-seed0",
        "uniform-50-seed0",  # the second sparsity of an arm comes after the first one of all
    ]
    assert dense["dense"] == dense["uniform"] != dense["cnc"] == dense["later"]
    assert len({run.group for run in plan.runs({})}) == 4


def test_tuning_goes_round_by_round_and_takes_the_best(tmp_path):
    plan = read(tmp_path, TUNED)
    assert list(plan.runs({})) == []
    first = list(plan.trials({}))
    assert len(first) == 4 * 2 * 2  # arms, values, seeds
    assert {run.seed for run in first} == {1000, 1001}
    assert {run.trial for run in first} == {"train.weight_decay=0.01", "train.weight_decay=0.02"}
    for run in first:
        decay = float(run.trial.partition("=")[2])
        recipe = run.recipe
        assert decay == recipe.train.weight_decay == recipe.finetune.weight_decay
        assert recipe.prune.weight_decay == 0

    def robust(run):  # by one seed the other value would be the best
        bonus = run.recipe.train.weight_decay * (30 if run.seed == 1000 else -10)
        condition = run.recipe.constraints.condition_factor if run.arm == "cnc" else 0.0
        return bonus - condition - run.recipe.finetune.learning_rate

    found = trials_with(plan, robust)
    assert plan.tuned(found, "digits", "cnc") == {
        "train.weight_decay": 0.02,
        "constraints.condition_factor": 0.1,
    }
    assert plan.tuned(found, "digits", "later") == {
        "train.weight_decay": 0.02,
        "finetune.learning_rate": 0.1,
    }
    second = [run for run in plan.trials(found) if run not in first]
    assert len(second) == 14  # with its 0.1, "cnc" has been tried in the round before
    assert all(run.recipe.train.weight_decay == 0.02 for run in second)
    runs = list(plan.runs(found))
    assert len(runs) == 10
    assert all(run.recipe.finetune.weight_decay == 0.02 for run in runs)
    # An arm whose trials are not complete waits; the others don't.
    part = {place: row for place, row in found.items() if place[:2] != ("digits", "cnc")}
    assert {run.arm for run in plan.runs(part)} == {"dense", "uniform", "later"}
    # Of equals the first.
    assert set(plan.tuned(trials_with(plan, lambda run: 0.5), "digits", "dense").values()) == {
        0.01,
        0.1,
    }


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: tiny", "name: ../tiny", r"^name must be usable as the name of a file"),
        ("  cnc: {base", "  ../cnc: {base", "a name in arms must be usable as .* got '../cnc'"),
        ("  digits:\n", "  a/b:\n", "a name in settings must be usable as .* got 'a/b'"),
        ("seeds: [0, 1]", "", r"tiny\.yaml is not a plan: it must have \['against', .*'seeds'"),
        ("grid:", "grids:", r"tiny\.yaml is not a plan"),
        ("base: uniform", "base: other", "'other' is none of the arms"),
        ("arms: [uniform]", "arms: [other]", "'other' is none of the arms"),
        ("  digits: [{arms", "  digit: [{arms", "grid and tuning must be of the settings"),
        ("seeds: [0, 1]", "seeds: [0]\nseeds: [1]", r"tiny\.yaml has seeds twice, in line 3 and"),
        (TINY, "", r"tiny\.yaml is empty"),
    ],
)
def test_a_plan_that_is_none_is_refused(tmp_path, old, new, message):
    assert TINY.count(old) == 1
    (tmp_path / "tiny.yaml").write_text(TINY.replace(old, new))
    with pytest.raises(ValueError, match=message):
        Plan.read(tmp_path / "tiny.yaml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("values: [0.1, 1.0]", "values: [0.1]", r"the same number of values, .*'cnc': 1"),
        ("[1000, 1001]", "[1000, 1]", "seeds of the tuning must be none of the study, got {1}"),
    ],
)
def test_a_tuning_that_is_unfair_is_refused(tmp_path, old, new, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, TUNED.replace(old, new))


def test_one_process_at_a_time_works_on_a_group(plan, tmp_path):
    scratch, store = tmp_path / "scratch", Store(tmp_path / "tiny.csv", tmp_path / "fresh")
    job = work.Job(tmp_path / "tiny.yaml", {}, store, scratch, ["digits"])
    group = next(plan.runs({})).group
    with (
        locks.exclusive(scratch / ".locks" / group),
        pytest.raises(RuntimeError, match=f"-seed0 is in use by process {os.getpid()} on"),
    ):
        work.work(job, group)
    assert not (scratch / "digits").exists()


def test_trials_that_make_others_of_their_group_wanted_are_no_failures(tmp_path, monkeypatch):
    read(tmp_path, TUNED)
    store = Store(tmp_path / "tiny.csv", tmp_path / "fresh")
    job = work.Job(tmp_path / "tiny.yaml", {}, store, tmp_path / "scratch", ["digits"])

    def finished(run, scratch):
        work.folder_of(run, scratch).mkdir(parents=True)
        robust = run.recipe.finetune.weight_decay  # the best is that of the last group
        return content(run, validation={"finetune": {"robust": robust}})

    monkeypatch.setattr(work, "finished", finished)
    assert work.run(job) == {}
    assert job.missing() == []


def test_a_group_of_which_nothing_comes_is_a_failure_and_is_not_tried_for_ever(
    plan, tmp_path, monkeypatch
):
    store = Store(tmp_path / "tiny.csv", tmp_path / "fresh")
    job = work.Job(tmp_path / "tiny.yaml", {}, store, tmp_path / "scratch", ["digits"])
    tried = []
    monkeypatch.setattr(work, "work", lambda job, group, end: tried.append(group))
    failed = work.run(job)
    assert sorted(failed) == sorted(tried) == sorted({run.group for run in plan.runs({})})
    assert all("do all machines share this disk?" in error for error in failed.values())


def content(run, **values):
    values = {"recipe": work.portable(run, {"name": "digits"}), "clean": 0.5, **values}
    return {**dict(zip(PLACE, run.place, strict=True)), **values}


def test_what_is_done_is_entered_when_the_command_is_interrupted(tmp_path, monkeypatch):
    """By Ctrl-C, which SIGTERM is like on Ray, in the middle of a group."""
    read(tmp_path, TINY)
    done = []

    def finished(run, scratch):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(run.place)
        work.folder_of(run, scratch).mkdir(parents=True)
        return content(run)

    monkeypatch.setattr(work, "finished", finished)
    options = ["--plan", tmp_path / "tiny.yaml", "--results", tmp_path, "--scratch", tmp_path]
    with pytest.raises(KeyboardInterrupt):
        main(["run", *map(str, options)])
    rows = table.read(tmp_path / "tiny.csv")
    assert sorted(tuple(row[name] for name in PLACE) for row in rows) == sorted(done)
    assert not list((tmp_path / "tiny" / "results").glob("*/*.json"))


def test_two_processes_enter_one_after_the_other(plan, tmp_path, monkeypatch):
    store = Store(tmp_path / "tiny.csv", tmp_path / "fresh")
    one, two = itertools.islice(plan.runs({}), 2)
    store.add(one, content(one))
    begun, original = threading.Event(), table.write
    other = threading.Thread(target=store.enter)

    def slow(path, rows):
        if threading.current_thread() is not other:
            store.add(two, content(two))
            other.start()
            assert not begun.wait(0.3)  # it waits
        else:
            begun.set()
        original(path, rows)

    monkeypatch.setattr(table, "write", slow)
    store.enter()
    other.join(60)
    assert begun.is_set()
    assert sorted(store.read()) == sorted(run.place for run in (one, two))
    assert not list(store.fresh.glob("*/*.json"))


def test_results_can_be_read_while_another_process_enters_them(plan, tmp_path, monkeypatch):
    store = Store(tmp_path / "tiny.csv", tmp_path / "fresh")
    one, two, three = itertools.islice(plan.runs({}), 3)
    for run in (one, two, three):
        store.add(run, content(run))
    original, moments = table.read_json, [0, 1]

    def slow(file, way_out):
        if moments.pop(0) == 0:
            return original(file, way_out)  # one file is read, then the other process comes
        with monkeypatch.context() as patch:
            patch.setattr(table, "read_json", original)
            store.enter()
        patched.undo()
        return original(file, way_out)

    with monkeypatch.context() as patched:
        patched.setattr(table, "read_json", slow)
        found = store.read()
    assert not list(store.fresh.glob("*/*.json"))
    assert sorted(found) == sorted(run.place for run in (one, two, three))


def test_a_damaged_result_is_named(plan, tmp_path):
    store = Store(tmp_path / "tiny.csv", tmp_path / "fresh")
    run = next(plan.runs({}))
    store.add(run, {})
    (path,) = store.fresh.glob("*/*.json")
    path.write_text("{")
    with pytest.raises(ValueError, match=rf"{path} is damaged.*Remove it, and run the study"):
        work.require_current(plan.runs({}), store)
    path.unlink()
    table.write(store.table, [content(run)])
    store.table.write_text(store.table.read_text().rpartition(",")[0] + "\n")
    with pytest.raises(ValueError, match=rf"{store.table} is damaged in line 2.*Restore it"):
        work.require_current(plan.runs({}), store)


def test_results_of_another_plan_are_refused(tmp_path, plan):
    store = Store(tmp_path / "tiny.csv", tmp_path / "fresh")
    table.write(store.table, [content(next(plan.runs({})))])
    work.require_current(plan.runs({}), store)
    (tmp_path / "tiny.yaml").write_text(TINY.replace("epochs: 1", "epochs: 2"))
    with pytest.raises(ValueError, match=r"is by another plan: train\.epochs was 1, not 2; prune"):
        work.require_current(Plan.read(tmp_path / "tiny.yaml").runs({}), store)


def test_results_of_runs_are_entered_into_the_table(plan, tmp_path):
    store = Store(tmp_path / "tiny.csv", tmp_path / "fresh")
    runs = list(plan.runs({}))
    store.enter()  # there is nothing
    assert not store.table.exists()
    for run in (runs[1], runs[0], runs[4]):
        store.add(run, content(run))
        before = store.read()
        store.enter()
        assert store.read() == before
        assert before[run.place] == json.loads(json.dumps(content(run)))
        assert not list(store.fresh.glob("*/*.json"))
    assert store.missing(runs) == [runs[2], runs[3], *runs[5:]]
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
        (["--plan", "none.yaml"], "--plan must be a YAML file, got .*none.yaml: No such file"),
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
    assert next(plan.runs({})).recipe.data.dataset == "/data/mine.npz"


# Statistics


def test_an_interval_is_students(rng):
    values = rng.normal(0.5, 0.1, 5)
    mean, half, count = results.estimate(values)
    for count in (1, 12):
        mean, half, number = results.estimate(values, count)
        low, high = stats.t.interval(1 - 0.05 / count, 4, np.mean(values), stats.sem(values))
        assert (mean - half, mean + half, number) == pytest.approx((low, high, 5))
    assert results.estimate([0.5, 0.6]).half == np.inf
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


# Tables


def table_after(text, title):
    """Return the cells of the rows of the table under a title."""
    lines = text.split(f"### {title}\n\n")[1].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return rows[0], {row[0]: row[1:] for row in rows[2:]}


def test_the_tables_say_what_was_found(plan):
    found = [result(seed, robust=0.50 + 0.01 * seed) for seed in range(3)]
    found += [result(seed, "dense", 0.60, 2.5) for seed in range(2)]
    found += [result(seed, "cnc", 0.55 + 0.02 * seed, condition=4.0, dead=0) for seed in range(3)]
    found = [
        dataclasses.replace(each, pgd=each.robust + 0.03) if each.arm == "cnc" else each
        for each in found
    ]
    text = report.tables(plan, found_of(found))
    assert "**Not complete:** 8 of 10 runs are complete, and 0 trials" in text
    head, rows = table_after(text, "digits, 99 % zeros")
    assert head[:6] == ["arm", "seeds", "clean", "robust", "clean − uniform", "robust − uniform"]
    half = 100 * stats.t.ppf(0.975, 2) * 0.01 / np.sqrt(3)
    assert rows["uniform"][:5] == ["3", "90.0 ± 0.0", f"51.0 ± {half:.1f}", "", ""]
    assert rows["uniform"][5:8] == ["–", "95.00", "∞"]  # judged by PGD itself
    # Two arms are compared with it, so that their intervals are wider.
    wide = 100 * stats.t.ppf(1 - 0.025 / 2, 2) * 0.01 / np.sqrt(3)
    assert rows["cnc"][3:5] == ["+0.0 ± 0.0", f"+6.0 ± {wide:.1f}"]
    assert rows["cnc"][5:10] == ["+3.0 ± 0.0", "95.00", "4", "2", "0.0"]
    assert list(rows) == ["dense", "uniform", "cnc"]
    _, added = table_after(text, "digits, 99 % zeros: what is added")
    assert added == {"cnc": ["uniform", "+0.0 ± 0.0", f"+6.0 ± {half:.1f}"]}
    assert text.endswith("Made with numpy 2.")


def test_the_tables_say_what_was_tuned(tmp_path):
    plan = read(tmp_path, TUNED)
    found = trials_with(plan, lambda run: run.recipe.finetune.weight_decay)
    text = report.tables(plan, found)
    assert f"0 of 10 runs are complete, and {len(found)} trials" in text
    _, rows = table_after(text, "digits: chosen values")
    assert rows["cnc"] == ["train.weight_decay 0.02, constraints.condition_factor 0.1"]
    assert rows["later"] == ["train.weight_decay 0.02, finetune.learning_rate 0.1"]


def test_a_plot_of_any_part_of_the_results(plan, tmp_path):
    found = [result(seed, "uniform", sparsity=0.8) for seed in range(2)]
    for results_so_far in ([], found, [*found, result(0, "dense", sparsity=0.0)]):
        report.plot(plan, results_so_far, tmp_path / "study.png")
        assert (tmp_path / "study.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_as_fast_and_as_robust_as_no_other_is_the_best_choice(plan, tmp_path):
    found = [result(seed, "dense", 0.8, sparsity=0.0) for seed in range(2)]
    found += [result(seed, "uniform", 0.7 + 0.05 * seed, sparsity=0.8) for seed in range(3)]
    found += [result(0, "cnc", 0.7, sparsity=0.8), result(0, "later", 0.9, sparsity=0.8)]
    times = {"digits": {"dense 0": 1.0, "uniform 0.8": 0.5, "cnc 0.8": 0.5}}  # not of later
    choices = report.against_time(plan, found, times)
    assert [(c.arm, c.share, c.robust.mean, c.is_best) for c in choices["digits"]] == [
        ("uniform", 0.5, pytest.approx(0.75), True),
        ("cnc", 0.5, 0.7, False),  # as fast, and less robust
        ("dense", 1.0, 0.8, True),
    ]
    text = report.table_against_time(choices)
    half = 100 * stats.t.ppf(0.975, 2) * 0.05 / 3**0.5
    assert f"| **uniform, 80 %** | 0.50 | 75.0 ± {half:.1f} |" in text
    assert "| cnc, 80 % | 0.50 | 70.0 |" in text and "later" not in text
    report.plot_against_time(choices, tmp_path / "time.png")
    assert (tmp_path / "time.png").read_bytes()[:4] == b"\x89PNG"
    assert report.shares(plan) == {}


def test_the_times_are_those_of_the_plan():
    """Each network of the structure study has one; what was not measured is not to choose from."""
    plan = Plan.read(HERE / "structure.yaml")
    runs = list(plan.runs({}))
    for setting, times in report.shares(plan).items():
        wanted = {f"{run.arm} {run.sparsity:g}" for run in runs if run.setting == setting}
        assert wanted == set(times) and times["dense 0"] == 1.0


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


@pytest.mark.parametrize("name", ["cpu", "recovery", "structure", "whole", "accelerator"])
def test_the_document_shows_the_results_that_are_there(name, tmp_path):
    plan, store = Plan.read(HERE / f"{name}.yaml"), Store(RESULTS / f"{name}.csv", tmp_path)
    found = store.read()
    work.require_current(plan.wanted(found), store)
    text = DOCUMENT.read_text(encoding="utf-8")
    if found:
        assert report.tables(plan, found) in text
    else:
        assert f"<!-- begin: {name} -->\n<!-- end: {name} -->" in text


# From end to end


@pytest.mark.filterwarnings("ignore:zero-gradients")  # after a few steps
def test_a_tiny_study_runs_goes_on_and_reports(tmp_path, monkeypatch, capsys):
    """Of each arm there is one trial, and one run."""
    values = {**yaml.safe_load(TUNED), "seeds": [0], "grid": {}}
    values["grid"] = {"digits": [{"arms": ["cnc", "later"], "sparsities": [0.8]}]}
    choice = {"names": ["finetune.learning_rate"], "values": [0.2]}
    values["settings"]["digits"]["evaluate"]["attack"] = "apgd"
    values["tuning"]["digits"] = {"seeds": [9], "sparsity": 0.8, "rounds": [{"every": choice}]}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    folders = ["--results", str(tmp_path / "results"), "--scratch", str(tmp_path / "scratch")]
    options = ["--plan", str(path), *folders]
    assert main(["run", *options]) == 0
    assert "All done" in capsys.readouterr().out
    store = Store(tmp_path / "results" / "tiny.csv", tmp_path / "scratch" / "tiny" / "results")
    trial = "finetune.learning_rate=0.2"
    assert list(store.read()) == [
        ("digits", arm, *rest)
        for arm in ("cnc", "later")
        for rest in (("", 0.8, 0), (trial, 0.8, 9))
    ]
    rows = table.read(store.table)
    contents = {row["arm"]: row for row in rows if not row["trial"]}
    cnc = contents["cnc"]
    assert cnc["examples"] == 32
    assert cnc["recipe"]["data"]["dataset"] == "digits"
    assert cnc["recipe"]["finetune"]["learning_rate"] == 0.2
    dense = [name for name, row in cnc["kernels"].items() if not row["pruned"]]
    assert dense == ["stem", "logits"]
    assert 0 <= cnc["robust"] <= cnc["clean"] <= 1
    pgd = ["PGD-1 linf 0.1", "PGD-1 linf 0.1 margin"]
    assert list(cnc["pgd"]) == [*pgd, "worst"]
    assert cnc["robust"] <= cnc["pgd"]["worst"] <= min(cnc["pgd"][name] for name in pgd)
    assert all("robust" not in row for row in rows if row["trial"])
    # The two share a dense network, and part in the third stage.
    assert cnc["validation"]["train"] == contents["later"]["validation"]["train"]
    assert cnc["kernels"] != contents["later"]["kernels"]
    scratch = tmp_path / "scratch" / "tiny"
    assert not list(scratch.glob("digits/*"))  # tidied up, but for the two dense networks
    assert len(list(scratch.glob("dense/digits/*/1-train/manifest.json"))) == 2
    table.write(store.table, [row for row in rows if row["arm"] != "cnc" or row["trial"]])
    missing = store.missing(Plan.read(path).wanted(store.read()))
    assert [run.name for run in missing] == ["cnc-80-seed0"]
    assert main(["run", *options, "--minutes", "0"]) == 75
    assert "More is to do" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"has no marks .* Leave out --write"):
        main(["report", *options, "--write"])
    with monkeypatch.context() as patched:
        patched.setattr(work, "finished", lambda *arguments: 1 / 0)
        assert main(["run", *options]) == 1
    said = capsys.readouterr()
    assert f"{missing[0].group} has failed: ZeroDivisionError: division by zero" in said.out
    assert f"{missing[0].group} failed: ZeroDivisionError" in said.err.replace("\n", " ")
    values["settings"]["digits"]["train"]["epochs"] = 2
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=r"is by another plan: train\.epochs was 1, not 2"):
        main(["report", *options])


ACCELERATED = """
name: accelerated
seeds: [0]
settings:
  images:
    data: {dataset: images, validation: 16}
    network: {architecture: lenet-5, options: {width: 2, hidden: 8, kernel_size: 3}}
    # So near that it matters little where rounding tips the sign of a gradient over.
    adversary: {epsilon: 1.0e-3, step_size: 1.0e-3, steps: 1}
    train: &training {epochs: 1, batch_size: 8, weight_decay_kind: l2}
    prune: {<<: *training, method: magnitude, average: 0.0}
    finetune: *training
    evaluate:
      {attack: pgd, epsilon: 8/255, steps: 1, restarts: 1, validation_steps: 1, batch_size: 16}
arms:
  uniform: {}
  regrowth: {prune.scope: global, prune.ramp: 0.0, prune.regrowth: {until: 0.9}}
  alive: {prune.method: scores, prune.min_per_filter: 1}
  harp: {base: alive, prune.scope: learned}
  gates: {gates.sparsity_factor: 1.0, gates.layers: "stage_*"}
grid:
  images: [{arms: every, sparsities: [0.6]}]
against: [uniform]
"""


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("prune.scope", "condition", "'learned'"),
        ("finetune.loss", "rslad", "'trades'"),
        ("finetune.recalibrate", True, "False"),
        ("evaluate.attack", "apgd", "'pgd'"),
        ("train.average_from", 1, "0"),
    ],
)
def test_what_cannot_be_exported_is_refused_by_name(tmp_path, plan, name, value, instead):
    arms = {**plan.arms, "other": {name: value, "train.epochs": 2}}
    message = f"arm 'other' of plan 'tiny' has {name}={value!r}, which can't be exported: "
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        accelerate.export(dataclasses.replace(plan, arms=arms), tmp_path / "there")
    assert f"Give it {name}={instead}, or run the plan where TensorFlow is" in str(raised.value)
    assert not (tmp_path / "there").exists()


def test_the_first_runs_on_an_accelerator_are_those_of_the_first_cell():
    plan = Plan.read(HERE / "accelerator.yaml")
    runs = accelerate.in_order(plan)
    assert sorted(map(str, runs)) == sorted(map(str, plan.runs({})))
    cells = [(run.setting, run.sparsity) for run in runs]
    levels = [(setting, level) for setting in plan.settings for level in (0.99, 0.95, 0.0)]
    assert list(dict.fromkeys(cells)) == levels and sorted(cells, key=levels.index) == cells
    for cell in levels:
        seeds = [run.seed for run, place in zip(runs, cells, strict=True) if place == cell]
        assert seeds == sorted(seeds)


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


def test_a_study_on_an_accelerator_is_exported_run_and_collected(tmp_path, monkeypatch, capsys):
    """On a CPU, in a process that has neither TensorFlow nor this package."""
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
    path.write_text(ACCELERATED.replace("method: magnitude", "method: magnitude, ramp: 0.5"))
    with pytest.raises(ValueError, match=r"another recipe: prune\.ramp was 0\.6, not 0\.5"):
        main(["export", *options])
    path.write_text(ACCELERATED)
    folder = tmp_path / "scratch" / "accelerated"
    code = (
        "import runpy, sys; sys.modules.update(tensorflow=None, keras=None, tscnc_tf=None); "
        "sys.path[0] = 'runner'; runpy.run_path('runner/run_all.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "."]
    options_of_run = {"cwd": folder, "env": HASTY, "text": True}
    first = subprocess.run([*command, "--minutes", "0.001"], check=False, **options_of_run)
    assert first.returncode == 75
    done = subprocess.run(command, check=False, capture_output=True, **options_of_run)
    assert done.returncode == 0, done.stderr
    assert main(["collect", *options]) == 0
    store = Store(tmp_path / "results" / "accelerated.csv", folder / "results")
    contents = store.read()
    assert not store.fresh.exists() or not list(store.fresh.glob("*/*"))
    assert main(["report", *options]) == 0
    assert "### images, 60 % zeros" in capsys.readouterr().out
    runs = {run.arm: run for run in Plan.read(path, {"images": str(images)}).runs({})}
    _train_on_the_batches_of_the_runner(monkeypatch, folder / "images" / "data-seed0")
    dense, counts = None, {}
    for arm, run in runs.items():
        content = contents["images", arm, "", 0.6, 0]
        there = folder / "images" / run.name / "run"
        test = json.loads((there / "result.json").read_text())["test"]
        assert (content["clean"], content["robust"]) == (
            test["clean_accuracy"],
            test["attacked_accuracy"],
        )
        # The network that came back, judged here, is right as often as it was there.
        model = accelerate.network_of(run, there)
        xs, ys = stages.dataset(run.recipe).arrays("test")
        assert np.mean(np.argmax(model.predict(xs, verbose=0), 1) == ys) == content["clean"]
        if arm == "gates":
            continue
        # And it is the one that the experiment makes here, from the same batches.
        here = experiments.run(
            run.recipe, tmp_path / arm, dense=dense, until="finetune", progress=False
        )
        dense = dense or here / "1-train"
        tuned = experiments.open_stage(here / "3-finetune")
        masks = tuned.masks
        with np.load(there / "finetune-best.npz") as found:
            for name, mask in masks.items():
                np.testing.assert_array_equal(found[f"pruner/mask/{name}/kernel"], mask)
        for mine, theirs in zip(tuned.model.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_allclose(theirs, mine, rtol=0, atol=1e-5)
        counts[arm] = {name: int(np.sum(mask)) for name, mask in masks.items()}
        assert set(counts[arm]) == {n for n, row in content["kernels"].items() if row["pruned"]}
    assert counts["uniform"] == counts["alive"]
    totals = {sum(each.values()) for each in counts.values()}
    assert totals == {sum(mask.size for mask in masks.values()) * 2 // 5}
    assert counts["uniform"] not in (counts["regrowth"], counts["harp"])
    # What is pruned has begun with the network that the gated one is at inference.
    gates = runs["gates"]
    data = stages.dataset(gates.recipe)
    trainer = stages.trainer(gates.recipe, "train", data)
    there = folder / "images" / f"dense-{gates.dense}" / "run"
    accelerator.restore(trainer, there / "train-best.npz")
    plain = stages.plain(gates.recipe, data, trainer.model)
    with np.load(there / "train-plain.npz") as arrays:
        known = accelerator.model_variables(plain)
        assert set(arrays) == set(known)
        for name, variable in known.items():
            np.testing.assert_allclose(arrays[name], variable.numpy(), rtol=0, atol=1e-6)


def _train_on_the_batches_of_the_runner(monkeypatch, images):
    """Let experiments that share a dense network have the batches that the runner draws."""
    numbers = itertools.chain([0], itertools.cycle([0, 1]))  # of stages, in their arms

    def training(_, size, *, seed, **options):
        assert options["first_epoch"] == 0
        there = Images(images, "train")
        epoch = Epoch.drawn(len(there), (seed, next(numbers), 0), pad=1, flip=True)
        cut = [there.cut(epoch.batch(i, size), pad=1) for i in range(len(there) // size)]
        return tf.data.Dataset.from_tensor_slices(tuple(map(np.stack, zip(*cut, strict=True))))

    monkeypatch.setattr(datasets.Dataset, "training", training)


def test_arms_run_after_those_that_they_begin_with(tmp_path, monkeypatch):
    """Whatever the order says: another plan may have been exported into the folder."""
    monkeypatch.syspath_prepend(str(accelerate.RUNNER))
    run_all = importlib.import_module("run_all")
    for name, order, dense in (("late", 0, "dense"), ("dense", 1, None), ("other", 2, "dense")):
        arm = tmp_path / "images" / name
        arm.mkdir(parents=True)
        (arm / "needs.json").write_text(json.dumps({"order": [order, 0], "from": dense}))
    found = run_all.ordered(tmp_path)
    assert [arm.name for arm in found] == ["dense", "late", "other"]
