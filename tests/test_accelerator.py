"""Training under JAX: an exported arm is run by the runner, and held against TensorFlow."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import time

import accelerator_arm
import numpy as np
import pytest
import tensorflow as tf
from accelerator_arm import STAGES, TEST, VALIDATION, accelerator
from batches import Epoch, Images
from helpers import FLAVOURS, dense_model, fresh_process
from prepare import prepare
from programs import Bundle

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
    output = folder / "whole"
    done = accelerator_arm.run(
        arm.folder, "--data", data, "--output", output, "--cache", folder / "cache"
    )
    assert done.returncode == 0, done.stderr
    return output


def read(path):
    """The arrays of a file, its text apart."""
    with np.load(path) as held:
        return {name: held[name] for name in held.files if name != "about"}


def lines(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def best_line(output, stage):
    """What is known of the epoch with the highest count under attack, of equals the first."""
    of_stage = [line for line in lines(output) if line["stage"] == stage]
    allowed = of_stage[STAGES[stage].get("select_from", 1) - 1 :]
    best = max(line["validation"]["attacked"] for line in allowed)
    return next(line for line in allowed if line["validation"]["attacked"] == best)


@pytest.mark.parametrize("stage", STAGES)
def test_jax_and_tensorflow_end_with_the_same_network(arm, finished, stage):
    epochs = {"last": STAGES[stage]["epochs"], "best": best_line(finished, stage)["epoch"]}
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
    """What came back in the last step of pruning is zero at first, and is trained, too."""
    pruned, tuned = read(finished / "prune-best.npz"), read(finished / "tune-last.npz")
    for layer in ("conv", "logits"):
        kernel, mask = f"model/{layer}/kernel", f"pruner/mask/{layer}/kernel"
        assert np.mean(pruned[mask]) == pytest.approx(0.3, abs=1 / pruned[mask].size)
        assert not np.any(pruned[kernel][~pruned[mask]])
        assert 0 < np.sum(pruned[kernel][pruned[mask]] == 0) < 0.1 * np.sum(pruned[mask])
        np.testing.assert_array_equal(tuned[mask], pruned[mask])
        np.testing.assert_array_equal(tuned[kernel] != 0, pruned[mask])
        assert np.all(tuned[kernel][tuned[mask]] != pruned[kernel][tuned[mask]])


def test_the_epoch_that_is_handed_on_is_told(finished):
    chosen = json.loads((finished / "result.json").read_text())["chosen"]
    for stage, line in zip(STAGES, chosen, strict=True):
        last = [each for each in lines(finished) if each["stage"] == stage][-1]
        assert line == (
            last if STAGES[stage].get("select") == "last" else best_line(finished, stage)
        )


def test_a_run_that_is_killed_and_goes_on_ends_bit_for_bit_the_same(arm, data, folder, finished):
    output = folder / "slices"
    arguments = (arm.folder, "--data", data, "--output", output, "--cache", folder / "cache")
    always = ("--checkpoint-seconds", "0")
    process = subprocess.Popen(
        accelerator_arm.command(*arguments, *always), env=accelerator_arm.HASTY
    )
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
    assert {"pruner/pruning_state/step", "pruner/mask/conv/kernel"} <= names["prune"] - names[
        "dense"
    ]


def test_a_network_comes_back_to_tensorflow(arm, finished):
    made = accelerator_arm.trainer(
        accelerator_arm.network(FLAVOURS["keras"]), tscnc.losses.Madry(), "sgd"
    )
    accelerator.restore(made, finished / "tune-last.npz")
    for mine, theirs in zip(made.model.get_weights(), arm.model.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)
    other = accelerator_arm.trainer(dense_model(FLAVOURS["keras"]), tscnc.losses.Madry(), "sgd")
    with pytest.raises(ValueError, match="does not fit the trainer: 'model/"):
        accelerator.restore(other, finished / "tune-last.npz")


RUN_STEPS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from programs import Bundle, jax
bundle = Bundle(__import__("pathlib").Path(sys.argv[2]))
state = {name: jax.numpy.array(value) for name, value in bundle.initial().items()}
batch, step = np.load(sys.argv[3]), bundle.program("step")
for _ in range(3):
    logs = step(state, batch["x"], batch["y"])
assert bundle.program("nothing")(state) == {}
np.savez(sys.argv[4], **{name: np.asarray(value, np.float64) for name, value in state.items()})
print(json.dumps({name: float(value) for name, value in logs.items()}))
"""


@pytest.mark.parametrize(
    ("flavour", "policy"), [("tf_keras", None), ("keras", "mixed_bfloat16")], ids=str
)
def test_steps_of_tfmot_and_of_half_precision(flavour, policy, tmp_path, rng):
    """In bfloat16 the two sum up differently, so that only some digits agree."""
    library = FLAVOURS[flavour]
    if policy:
        model, shape = accelerator_arm.network(library, policy), (8, 8, 8, 3)
    else:
        model, shape = tscnc.prune(dense_model(library), tscnc.schedules.OneShot(0.5, 1)), (8, 6)
    made = accelerator_arm.trainer(model, tscnc.losses.TRADES(), library.optimizers.SGD(0.02, 0.9))
    x, y = rng.uniform(0, 1, shape).astype(np.float32), rng.integers(0, 3, 8).astype(np.int32)
    step = tf.function(lambda x, y: made.train_step((x, y)), jit_compile=True, autograph=False)
    specs = {"x": tf.TensorSpec(x.shape, x.dtype), "y": tf.TensorSpec(y.shape, y.dtype)}
    programs = {
        "step": accelerator.Program(step, specs),
        "nothing": accelerator.Program(lambda: None),
    }
    accelerator.export(programs, tmp_path, lambda: accelerator.trainer_variables(made))
    text = gzip.decompress((tmp_path / "step.mlir.gz").read_bytes())
    assert (b"bf16" in text) == bool(policy)
    for _ in range(3):
        logs = step(tf.constant(x), tf.constant(y))
    np.savez(tmp_path / "batch.npz", x=x, y=y)
    paths = (accelerator_arm.RUNNER, tmp_path, tmp_path / "batch.npz", tmp_path / "after.npz")
    found = json.loads(fresh_process(RUN_STEPS, *paths, env=accelerator_arm.HASTY))
    expected = {name: float(value) for name, value in logs.items()}
    assert found == pytest.approx(expected, rel=3e-2 if policy else 1e-5, abs=1e-6)
    begun, after = read(tmp_path / "state.npz"), read(tmp_path / "after.npz")
    network = {
        name: variable.numpy()
        for name, variable in accelerator.trainer_variables(made).items()
        if name.startswith(("model/", "pruner/")) and name in begun
    }
    way = [np.sum(np.square(value * 1.0 - begun[name])) for name, value in network.items()]
    gap = [np.sum(np.square(value * 1.0 - after[name])) for name, value in network.items()]
    assert np.sqrt(sum(gap) / sum(way)) < (0.1 if policy else 1e-5)


RUN_BEGIN = """
import sys
sys.path.insert(0, sys.argv[1])
import pathlib
import numpy as np
from programs import Bundle, jax
bundle = Bundle(pathlib.Path(sys.argv[2]))
state = {name: jax.numpy.array(value) + 1 for name, value in bundle.initial().items()}
bundle.program("begin")(state)
np.savez(sys.argv[3], **{name: np.asarray(value) for name, value in state.items()})
"""


def test_moving_averages_begin_with_the_weights_of_the_stage_before(tmp_path):
    library = FLAVOURS["tf_keras"]
    sgd = library.optimizers.SGD(0.1, use_ema=True)
    model = library.Sequential(
        [library.Input((4, 4, 3)), library.layers.Flatten(), library.layers.Dense(2, name="logits")]
    )
    made = tscnc.AdversarialTraining(model, attack=VALIDATION, loss=tscnc.losses.Madry())
    made.compile(sgd)
    stage = accelerator_arm.export(made, tmp_path, "stage", epochs=1)
    fresh_process(RUN_BEGIN, accelerator_arm.RUNNER, stage, tmp_path / "after.npz")
    after, kernel = read(tmp_path / "after.npz"), model.get_weights()[0]
    np.testing.assert_array_equal(after["optimizer/average/logits/kernel"], kernel + 1)
    np.testing.assert_array_equal(after["optimizer/m/logits/kernel"], np.ones_like(kernel))


CHECKPOINT = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import progress
path, half = pathlib.Path(sys.argv[2]), progress.np.dtype("bfloat16")
state = {"model/w": np.array([1.5, -2.0], half), "model/n": np.int64(2**40)}
position = progress.Position(stage=1, phase="train", batch=7, lines=[{"epoch": 1}])
progress.save(path, "arm", position, {"state": state, "best": {}, "network": {}})
back, arrays = progress.load(path, "arm")
assert back == position and set(arrays["state"]) == set(state)
for name, value in state.items():
    assert arrays["state"][name].dtype == value.dtype and np.all(arrays["state"][name] == value)
progress.write_arrays(path, {"model/logits/bias": state["model/w"]})
assert [each.name for each in path.parent.iterdir()] == [path.name]
"""


def test_checkpoints_hold_any_dtype_and_bfloat16_comes_back(tmp_path):
    path = tmp_path / "checkpoint.npz"
    fresh_process(CHECKPOINT, accelerator_arm.RUNNER, path)
    library = FLAVOURS["keras"]
    layer = library.layers.Dense(2, use_bias=False, name="logits", dtype="bfloat16")
    model = library.Sequential([library.Input((1,)), layer], name="model")
    made = accelerator_arm.trainer(model, tscnc.losses.Madry(), "sgd")
    name = next(n for n in accelerator.trainer_variables(made) if n.startswith("model/"))
    with np.load(path) as held:
        np.savez(path, **{name: held["model/logits/bias"][None]})
    accelerator.restore(made, path)
    assert np.asarray(layer.kernel, np.float32).tolist() == [[1.5, -2.0]]


def test_randomness_that_is_not_in_the_state_is_refused(tmp_path):
    def draw():
        return {"noise": tf.random.uniform((3,))}

    with pytest.raises(ValueError, match="draws random numbers that don't follow from its state"):
        accelerator.export({"draw": accelerator.Program(draw)}, tmp_path)


@pytest.mark.parametrize("held", [True, False])
def test_the_value_of_a_variable_as_a_constant_is_refused(held, tmp_path):
    index, values = tf.Variable(1, name="index"), tf.Variable([1.0, 2.0, 3.0])
    count = tf.Variable(0, name="count")

    def take():
        found = values[index] if held else tf.gather(values, index)
        index.assign(0)
        count.assign(7)
        return {"found": found}

    programs = {"take": accelerator.Program(take)}
    if held:
        with pytest.raises(ValueError, match=r"'take' holds as a constant .* of \['index:0'\]:"):
            accelerator.export(programs, tmp_path)
    else:
        accelerator.export(programs, tmp_path)
        bundle = Bundle(tmp_path)
        state = bundle.initial()
        take = bundle.program("take")
        assert [float(take(state)["found"]) for _ in range(2)] == [2.0, 1.0]
    assert int(index) == 1


def test_tensors_from_outside_are_inputs_like_variables(tmp_path):
    outside = tf.constant([1.0, 2.0])
    plan = accelerator.export(
        {"add": accelerator.Program(lambda: {"sum": outside + 1.0})}, tmp_path
    )
    (name,) = plan["programs"]["add"]["state"]
    bundle = Bundle(tmp_path)
    state = bundle.initial()
    np.testing.assert_array_equal(state[name], [1.0, 2.0])
    np.testing.assert_array_equal(bundle.program("add")(state)["sum"], [2.0, 3.0])


def test_a_trainer_that_is_not_ready_is_refused(tmp_path):
    library = FLAVOURS["tf_keras"]
    made = tscnc.AdversarialTraining(
        dense_model(library), attack=VALIDATION, loss=tscnc.losses.Madry()
    )
    with pytest.raises(ValueError, match="must be compiled before it is exported"):
        accelerator_arm.export(made, tmp_path, "stage", epochs=1)
    made.compile(library.optimizers.legacy.SGD(0.1))
    with pytest.raises(ValueError, match="a legacy optimizer"):
        accelerator_arm.export(made, tmp_path, "stage", epochs=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "run"}, "name must not be 'run'"),
        ({"name": "a/b"}, "name must be usable as the name of a file or folder"),
        ({"evaluation_seed": -1}, "evaluation_seed must be"),
        ({"select": "first"}, "select must be one of"),
        ({"inherits": ("metrics",)}, "inherits must be one of"),
        ({"epochs": 0}, "epochs must be"),
        ({"select_from": 3}, "select_from must be at most epochs, 2, got 3"),
    ],
)
def test_wrong_settings_are_refused(settings, message, tmp_path):
    made = accelerator_arm.trainer(dense_model(), tscnc.losses.Madry(), "sgd")
    with pytest.raises(ValueError, match=message):
        accelerator_arm.export(made, tmp_path, **{"name": "stage", "epochs": 2, **settings})
    assert not list(tmp_path.iterdir())


def test_a_network_of_other_names_is_refused_when_it_is_exported(arm):
    layers = FLAVOURS["keras"].layers
    model = FLAVOURS["keras"].Sequential(
        [FLAVOURS["keras"].Input((8, 8, 3)), layers.Flatten(), layers.Dense(4, name="other")]
    )
    made = accelerator_arm.trainer(model, tscnc.losses.Madry(), "sgd")
    before = sorted(arm.folder.iterdir())
    with pytest.raises(ValueError, match="what stage 'tune' does not have, or not in this shape"):
        accelerator_arm.export(made, arm.folder, "more", epochs=1)
    assert sorted(arm.folder.iterdir()) == before


def test_variables_of_one_name_are_numbered():
    library = FLAVOURS["keras"]
    inner = library.Input((4,))
    parts = [
        library.Model(inner, library.layers.Dense(4, name="same")(inner), name=name)
        for name in ("one", "two")
    ]
    inputs = library.Input((4,))
    model = library.Model(inputs, parts[1](parts[0](inputs)))
    made = accelerator_arm.trainer(model, tscnc.losses.Madry(), "sgd")
    found = [name for name in accelerator.trainer_variables(made) if name.startswith("model/")]
    assert len(found) == 4 and sum(name.endswith("#2") for name in found) == 2


def test_the_validation_set_is_drawn_from_the_training_set(tmp_path, rng):
    x, y = rng.integers(0, 256, (30, 2, 2, 1)).astype(np.uint8), np.arange(30)[:, None]
    source = tmp_path / "source.npz"
    np.savez(source, x_train=x, y_train=y, x_test=x[:3], y_test=y[:3])
    prepare(source, tmp_path / "data", validation=7, seed=3, train=20)
    parts = {
        name: (np.load(tmp_path / f"data/x_{name}.npy"), np.load(tmp_path / f"data/y_{name}.npy"))
        for name in ("train", "validation", "test")
    }
    assert {name: len(labels) for name, (_, labels) in parts.items()} == {
        "train": 20,
        "validation": 7,
        "test": 3,
    }
    for images, labels in parts.values():
        np.testing.assert_array_equal(images, x[labels])
    assert not set(parts["train"][1]) & set(parts["validation"][1])
    with pytest.raises(ValueError, match="too few for 26 to train on and 5 to validate with"):
        prepare(source, tmp_path / "data", validation=5, seed=3, train=26)


def test_images_are_cut_out_and_mirrored_on_the_device(tmp_path, rng):
    x, y = rng.integers(0, 256, (9, 8, 8, 3)).astype(np.uint8), rng.integers(0, 10, 9)
    np.save(tmp_path / "x_train.npy", x)
    np.save(tmp_path / "y_train.npy", y)
    images, epoch = Images(tmp_path, "train"), Epoch.drawn(9, (1, 2, 3), pad=3, flip=True)
    assert set(epoch.shifts.ravel()) == set(range(7)) and set(epoch.flips) == {True, False}
    found, labels = images.cut(epoch, pad=3)
    cut = map(accelerator_arm.cut_out, x[epoch.order], [3] * 9, epoch.shifts, epoch.flips)
    expected = np.float32(list(cut)) / np.float32(255)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(labels, y[epoch.order])
    whole, _ = images.cut(Epoch.plain(9).batch(1, 6).filled(6))
    np.testing.assert_array_equal(whole, np.float32(x[[6, 7, 8, 6, 6, 6]]) / np.float32(255))
    assert np.any(Epoch.drawn(9, (1, 2, 4), 3, flip=False).order != epoch.order)
    assert not np.any(Epoch.drawn(9, (1, 2, 4), 3, flip=False).flips)
    np.save(tmp_path / "x_train.npy", x.astype(np.float32))
    with pytest.raises(ValueError, match="must hold images"):
        Images(tmp_path, "train")


def test_the_command_lines_explain_themselves(tmp_path):
    for script in ("run.py", "prepare.py"):
        done = subprocess.run(
            [sys.executable, accelerator_arm.RUNNER / script, "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "usage:" in done.stdout
