"""Training under JAX: an exported arm is run by the runner, and held against TensorFlow."""

from __future__ import annotations

import json
import shutil
import subprocess
import time

import accelerator_arm
import numpy as np
import pytest
import tensorflow as tf
from accelerator_arm import STAGES, TEST, VALIDATION, accelerator
from batches import Epoch, Images
from helpers import FLAVOURS, dense_model
from prepare import prepare

import tscnc_tf as tscnc


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("accelerator")


@pytest.fixture(scope="module")
def data(folder):
    return accelerator_arm.write_data(folder)


@pytest.fixture(scope="module")
def arm(folder, data):
    """The arm of a Keras 3 model, trained by TensorFlow."""
    return accelerator_arm.Arm(FLAVOURS["keras"], folder / "arm", data)


@pytest.fixture(scope="module")
def finished(arm, data, folder):
    """What the runner wrote in one go."""
    begin = time.time()
    output = folder / "whole"
    done = accelerator_arm.run(
        arm.folder, "--data", data, "--output", output, "--cache", folder / "cache"
    )
    assert done.returncode == 0, done.stderr
    print(time.time() - begin)
    return output


def read(path):
    """The arrays of a file, its text apart."""
    with np.load(path) as held:
        return {name: held[name] for name in held.files if name != "about"}


def lines(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_jax_and_tensorflow_end_with_the_same_network(arm, finished, stage):
    chosen = json.loads((finished / "result.json").read_text())["chosen"]
    epochs = {"last": STAGES[stage]["epochs"], "best": chosen[list(STAGES).index(stage)]["epoch"]}
    for kind, epoch in epochs.items():
        found = read(finished / f"{stage}-{kind}.npz")
        expected = arm.networks[stage][epoch - 1]
        assert set(found) == set(expected)
        for name, value in expected.items():
            if name.startswith("pruner/"):
                np.testing.assert_array_equal(found[name], value, err_msg=name)
            else:
                np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=name)


def test_logs_are_tensorflows_and_means_over_the_epoch(arm, finished):
    found = {(line["stage"], line["epoch"]): line["logs"] for line in lines(finished)}
    assert list(found) == [(name, e + 1) for name in STAGES for e in range(STAGES[name]["epochs"])]
    for (name, epoch), logs in found.items():
        assert logs == pytest.approx(arm.logs[name][epoch - 1], rel=1e-4, abs=1e-5)


def test_counts_are_those_of_evaluate_robustness(arm, finished):
    result = json.loads((finished / "result.json").read_text())
    expected = arm.evaluate(TEST, "test", STAGES["tune"]["evaluation_seed"])
    assert 0 < expected["attacked"] < expected["clean"] <= 15
    assert {name: result["test"][name] for name in expected} == expected
    assert result["test"]["attacked_accuracy"] == expected["attacked"] / 15
    assert result["test"]["attack"] == TEST.describe()
    expected = arm.evaluate(VALIDATION, "validation", STAGES["tune"]["evaluation_seed"])
    assert lines(finished)[-1]["validation"] == expected


def test_masks_are_those_of_the_schedule_and_stay(finished):
    pruned, tuned = read(finished / "prune-best.npz"), read(finished / "tune-last.npz")
    for layer in ("conv", "logits"):
        kernel, mask = f"model/{layer}/kernel", f"pruner/mask/{layer}/kernel"
        assert np.mean(pruned[mask]) == pytest.approx(0.3, abs=1 / pruned[mask].size)
        np.testing.assert_array_equal(pruned[kernel] != 0, pruned[mask])
        np.testing.assert_array_equal(tuned[mask], pruned[mask])
        np.testing.assert_array_equal(tuned[kernel] != 0, pruned[mask])
        assert np.all(tuned[kernel][tuned[mask]] != pruned[kernel][tuned[mask]])


def test_the_best_epoch_is_that_of_the_validation_set(finished):
    chosen = json.loads((finished / "result.json").read_text())["chosen"]
    for name, line in zip(STAGES, chosen, strict=True):
        of_stage = [each for each in lines(finished) if each["stage"] == name]
        if STAGES[name].get("select") == "last":
            assert line == of_stage[-1]
            continue
        allowed = of_stage[STAGES[name].get("select_from", 1) - 1 :]
        best = max(each["validation"]["attacked"] for each in allowed)
        assert line == [each for each in allowed if each["validation"]["attacked"] == best][-1]


def test_a_run_that_is_killed_and_goes_on_ends_bit_for_bit_the_same(arm, data, folder, finished):
    output = folder / "slices"
    arguments = (arm.folder, "--data", data, "--output", output, "--cache", folder / "cache")
    always = ("--checkpoint-seconds", "0")
    process = subprocess.Popen(accelerator_arm.command(*arguments, *always))
    while not (output / "dense-last.npz").exists():  # the first stage is over
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (output / "result.json").exists()
    done = accelerator_arm.run(*arguments, "--minutes", "0")  # a single piece of work
    assert done.returncode == 75, done.stderr
    done = accelerator_arm.run(*arguments)
    assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in finished.iterdir())
    assert sorted(path.name for path in output.iterdir()) == files
    for name in files:
        if name.endswith(".npz"):
            whole, sliced = read(finished / name), read(output / name)
            assert set(whole) == set(sliced)
            for key, value in whole.items():
                assert value.tobytes() == sliced[key].tobytes(), (name, key)
    for whole, sliced in zip(lines(finished), lines(output), strict=True):
        assert whole | {"seconds": 0} == sliced | {"seconds": 0}
    results = [json.loads((path / "result.json").read_text()) for path in (finished, output)]
    assert results[0]["test"] == results[1]["test"]
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    done = accelerator_arm.run(*arguments)  # nothing is left to do
    assert done.returncode == 0 and "Finished: of 15 test images" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_a_checkpoint_of_another_arm_and_a_changed_file_are_refused(arm, data, folder, finished):
    other = folder / "other"
    shutil.copytree(arm.folder, other)
    settings = json.loads((other / "tune/stage.json").read_text())
    (other / "tune/stage.json").write_text(json.dumps(settings | {"seed": 1}))
    done = accelerator_arm.run(other, "--data", data, "--output", finished)
    assert done.returncode == 1 and "belongs to another export of the arm" in done.stderr
    with (other / "dense/programs.json").open("a") as stream:
        stream.write(" ")
    done = accelerator_arm.run(other, "--data", data)
    assert done.returncode == 1
    assert "dense/programs.json is not the file that was exported" in done.stderr


def test_a_stage_finds_all_of_its_network_in_the_one_before(arm):
    names = {
        stage: set(json.loads((arm.folder / stage / "programs.json").read_text())["variables"])
        for stage in STAGES
    }
    network = {"model/conv/kernel", "model/norm/moving_mean", "model/logits/bias"}
    for stage in STAGES:
        assert network <= {name for name in names[stage] if name.startswith("model/")}
        assert not {name for name in names[stage] if name.startswith("other/")}
    models = [{name for name in names[stage] if name.startswith("model/")} for stage in STAGES]
    assert models[0] == models[1] == models[2]
    assert {"optimizer/sgd/iteration", "optimizer/sgd/conv_kernel_average"} <= names["dense"]
    assert {"pruner/pruning_state/step", "pruner/mask/conv/kernel"} <= names["prune"] - names["dense"]


def test_a_network_comes_back_to_tensorflow(arm, finished):
    made = accelerator_arm.trainer(
        accelerator_arm.network(FLAVOURS["keras"]), tscnc.losses.Madry(), "sgd"
    )
    accelerator.restore(made, finished / "tune-last.npz")
    for mine, theirs in zip(made.model.get_weights(), arm.model.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)
    other = accelerator_arm.trainer(dense_model(FLAVOURS["keras"]), tscnc.losses.Madry(), "sgd")
    with pytest.raises(ValueError, match="'model/logits/kernel' has shape|nothing of that name"):
        accelerator.restore(other, finished / "tune-last.npz")
