"""The benchmarks run from end to end on tiny networks, and write down what they measured."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import pathlib
import sys

import numpy as np
import pytest
import tensorflow as tf

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import emulation, measure, memory, networks, streaming, two_devices
from benchmarks import gpu as gpu_module
from benchmarks import runtimes as runtimes_module
from benchmarks.__main__ import BENCHMARKS, main
from tscnc_tf._keras import layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder to which one smoke run of all benchmarks wrote; in this process, to save time."""
    output = tmp_path_factory.mktemp("benchmarks")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(["--smoke", "--output", str(output)])
    assert printed.getvalue().count("Written to") == len(BENCHMARKS)
    (output / "stdout.txt").write_text(printed.getvalue())
    return output


def result(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def assert_sound(summary, rounds):
    """The quartiles are in order, and nothing is faster than the fastest."""
    assert summary["rounds"] == rounds
    quartiles = [summary[name] for name in ("lower_quartile", "median", "upper_quartile")]
    assert 0 < summary["fastest"] <= quartiles[0] <= quartiles[1] <= quartiles[2]


def assert_times(times, rounds):
    for timing in times.values():
        assert_sound(timing["wall"], rounds)
        assert timing["cpu"]["median"] >= 0


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_file_says_what_was_measured_on_what(folder, name):
    found = result(folder, name)
    assert found["benchmark"] == name
    assert found["smoke"] is True
    assert {"tensorflow", "tf_keras", "tscnc_tf", "python"} <= set(found["versions"])
    assert found["device"]["cores"] >= 1
    assert found["device"]["tensorflow_devices"]
    assert found["batch_size"] >= 1
    assert found["rounds"] >= 1
    assert "tiny" in found["network"]


def test_a_step_is_held_against_the_sum_of_its_pieces(folder):
    found = result(folder, "step")
    assert set(found["times"]) == {"step", "gradient", "forward", "train", "update"}
    assert_times(found["times"], found["rounds"])
    medians = {name: timing["wall"]["median"] for name, timing in found["times"].items()}
    step = medians.pop("step")
    assert found["floor"] == pytest.approx(sum(medians.values()))
    assert found["ratio"]["of_medians"] == pytest.approx(step / sum(medians.values()))
    assert_sound(found["ratio"]["of_rounds"], found["rounds"])
    assert found["goal"] == 1.10
    assert found["goal_met"] == (found["ratio"]["of_medians"] <= 1.10)


def test_rivals_are_compared_for_both_losses(folder):
    found = result(folder, "rivals")
    assert_times(found["times"], found["rounds"])
    assert set(found["ratios"]) == {
        f"{loss} {rival}" for loss in ("TRADES", "Madry") for rival in ("eager", "function")
    }
    for name, ratio in found["ratios"].items():
        ours = found["times"][f"{name.split()[0]} ours"]["wall"]["median"]
        rival = found["times"][name]["wall"]["median"]
        assert ratio["wall"]["of_medians"] == pytest.approx(ours / rival)


def test_the_share_of_the_term_is_of_a_whole_step(folder):
    found = result(folder, "condition")
    inner = found["networks"]["tiny"]
    assert inner["kernels"] == len(list(layers.kernels(networks.build("tiny"))))
    assert_times(inner["times"], found["rounds"])
    term = inner["times"]["term"]["wall"]["median"]
    assert inner["ratio"] == pytest.approx(term / inner["step_seconds"])
    assert inner["step_seconds"] > inner["times"]["train"]["wall"]["median"]
    assert inner["jit_over_plain"] > 0
    assert found["check"]["network"] == "tiny"
    assert found["check"]["true_seconds"]["wall"] > 0
    assert found["check"]["scaled_over_true"]["wall"] > 0
    assert found["goal"] == 0.03


def test_masks_are_held_against_a_plain_step(folder):
    found = result(folder, "masks")
    assert_times(found["times"], found["rounds"])
    medians = {name: timing["wall"]["median"] for name, timing in found["times"].items()}
    plain = medians["train"] + medians["update"]
    assert set(found["ratios"]) == {
        *("masks", "renewal, layer", "renewal, global", "regrowth", "move", "tfmot")
    }
    assert found["regrowth_goal_met"] == (found["regrowth"] <= 0.02)
    for name, ratio in found["ratios"].items():
        assert ratio["wall"]["of_medians"] == pytest.approx(medians[name] / plain)
    assert found["goal_met"] == (found["ratios"]["masks"]["wall"]["of_medians"] <= 0.05)


def test_steps_of_scores_are_held_against_those_of_plain_ones(folder):
    found = result(folder, "scores")
    assert_times(found["times"], found["rounds"])
    medians = {name: timing["wall"]["median"] for name, timing in found["times"].items()}
    for name in ("learned", "perturbed"):
        ratio = found["ratios"][name]["wall"]["of_medians"]
        assert ratio == pytest.approx(medians[name] / medians["scores"])
    assert found["goal_met"] == (found["ratios"]["learned"]["wall"]["of_medians"] <= 1.05)


def test_the_condition_penalty_of_some_steps_is_held_against_steps_without(folder):
    found = result(folder, "dense")
    network = found["networks"]["tiny"]
    assert_times(network["times"], found["rounds"])
    medians = {name: timing["wall"]["median"] for name, timing in network["times"].items()}
    assert set(medians) == {"without", "each", "rarely"}
    for name in ("each", "rarely"):
        ratio = network["ratios"][name]["wall"]["of_medians"]
        assert ratio == pytest.approx(medians[name] / medians["without"])
    rarely = network["ratios"]["rarely"]["wall"]["of_medians"]
    assert found["goal_met"] == (rarely <= 1.05)


def test_sparse_files_are_held_against_dense_ones(folder):
    found = result(folder, "litert")
    assert_times(found["times"], found["rounds"])
    medians = {name: timing["wall"]["median"] for name, timing in found["times"].items()}
    assert len(medians) == 11
    for name, ratio in found["ratios"].items():
        assert ratio["wall"]["of_medians"] == pytest.approx(medians["dense"] / medians[name])
    assert list(found["sizes"]) == ["0.9", "0.95", "0.99"]
    for size in found["sizes"].values():
        for each in (size, size["int8"]):
            assert each["share"] == pytest.approx(each["sparse"] / each["dense"])
        whole = size["int8"]["sparse"] / size["dense"]
        assert size["int8"]["share_of_float32"] == pytest.approx(whole)
    for name, ratio in found["ratios_to_int8_dense"].items():
        expected = medians["int8 dense"] / medians[name]
        assert ratio["wall"]["of_medians"] == pytest.approx(expected)


@pytest.mark.skipif(emulation.EMULATOR is None, reason="needs qemu-x86_64 (Debian: qemu-user)")
def test_sparse_1x1_convolutions_are_held_against_dense_ones(tmp_path, capsys):
    main(["--smoke", "--output", str(tmp_path), "pointwise"])
    assert "13 of 13 1x1 convolutions sparse" in capsys.readouterr().out
    found = result(tmp_path, "pointwise")
    each = found["networks"]["tiny_mobilenet"]["0.95"]
    medians = {form: summary["median"] for form, summary in each["seconds"].items()}
    assert each["ratio"]["of_medians"] == pytest.approx(medians["dense"] / medians["sparse"])
    assert found["goal_met"] == (each["ratio"]["of_medians"] >= 3)


@pytest.mark.parametrize("kind", streaming.KINDS)
def test_streamed_data_are_measured(tmp_path, kind):
    streaming.KINDS[kind](tmp_path / "set", 300)
    found = streaming.measured(tmp_path / "set")
    assert all(found.pop(f"{name}_seconds") > 0 for name in ("load", "statistics", "epoch"))
    assert found["peak_mib"] > 100
    assert len(found["fingerprint"]) == 64


def test_the_memory_of_an_evaluation_is_measured():
    found = memory.measured(200)
    assert found["examples"] == 200 and found["data_bytes"] == 200 * (8 * 8 * 4 + 8)
    assert found["peak_bytes"] > 100 * 2**20
    first, *others = found["attacked"]
    assert first == 200 and len(others) == 3 and min(others) > 190


def test_the_step_is_exported_with_all_its_state(folder):
    found = result(folder, "stablehlo")
    assert found["compiles"] and found["weights_finite"] and found["weights_moved"]
    assert_times(found["times"], found["rounds"])
    assert found["jit_over_plain"]["of_medians"] > 0
    assert set(found["programs"]) == {"step", "gradient", "forward", "train", "update"}
    written = folder / "stablehlo"
    plans = json.loads((written / "programs.json").read_text())["programs"]
    state, fed = np.load(written / "state.npz"), np.load(written / "arguments.npz")
    variables = set(json.loads((written / "programs.json").read_text())["variables"])
    for name, program in found["programs"].items():
        assert b"stablehlo" in gzip.decompress((written / f"{name}.mlir.gz").read_bytes())
        inputs = [f"{name}/{each['name']}" for each in plans[name]["arguments"]]
        assert set(inputs) <= set(fed.files) and set(plans[name]["state"]) <= variables
        assert len(inputs) + len(plans[name]["state"]) == program["inputs"]
        assert set(plans[name]["assigned"]) <= set(plans[name]["state"])
        assert len(set(plans[name]["assigned"])) == program["assigned"]
    assert json.loads((written / "calls.json").read_text())["gradient"] == 1
    expected = np.load(written / "expected.npz")
    assert int(expected["steps"]) == found["rounds"] + 1
    for when in ("first", "last"):
        names = [name.partition(":")[2] for name in expected.files if name.startswith(when)]
        kernels = [name for name in names if name.startswith("model/") and "/kernel" in name]
        assert kernels
        assert all(np.any(state[name] != expected[f"{when}:{name}"]) for name in kernels)


def test_goals_stand_beside_figures(folder):
    printed = (folder / "stdout.txt").read_text()
    assert printed.count("(goal: at most 1.1; ") == 1
    assert printed.count("(goal: at most 1; ") == 4
    assert printed.count("(goal: at most 0.03; ") == 1
    assert printed.count("(goal: at most 0.05; ") == 1


def test_rounds_are_interleaved():
    calls = []
    times = measure.interleaved(
        {name: lambda name=name: calls.append(name) for name in "ABC"}, rounds=59, warm_up=1
    )
    rounds = ["".join(calls[begin : begin + 3]) for begin in range(0, 180, 3)]
    # Each order comes up, so that each function follows each other one.
    assert set(rounds) == set(map("".join, itertools.permutations("ABC")))
    assert {timing.wall.rounds for timing in times.values()} == {59}


def test_a_ratio_is_of_the_medians_and_its_spread_of_the_rounds():
    def timing(*values):
        return measure.Timing(measure.Summary.of(values), measure.Summary.of(values))

    ratio = measure.ratio([timing(2.0, 4.0, 9.0)], [timing(1.0, 1.0, 2.0), timing(1.0, 1.0, 1.0)])
    assert ratio.of_medians == 4.0 / 2.0
    assert ratio.of_fastest == 2.0 / 2.0
    assert ratio.of_rounds.values == (1.0, 2.0, 3.0)
    assert (ratio.of_rounds.lower_quartile, ratio.of_rounds.upper_quartile) == (1.5, 2.5)


# What the papers and their authors' code have, to a per cent; VGG-16 with dense layers of 512.
PARAMETERS = {"resnet20": 0.27e6, "resnet18": 11.17e6, "wrn28_4": 5.85e6, "vgg16": 15.25e6}


@pytest.mark.parametrize("name", PARAMETERS)
def test_networks_are_those_of_the_literature(name):
    model = networks.build(name)
    assert model.input_shape == (None, 32, 32, 3)
    assert model.output_shape == (None, 10)
    count = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    assert count == pytest.approx(PARAMETERS[name], rel=0.02)


@pytest.mark.parametrize("arguments", [["speed"], ["--rounds", "0"], ["--network", "lenet"]])
def test_a_wrong_command_line_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "error" in capsys.readouterr().err


def test_structures_are_held_against_the_dense_network(folder):
    whole = result(folder, "structures")
    assert set(whole["settings"]) == {"digits", "fashion"}
    for found in whole["settings"].values():
        assert set(found["times"]) == {"dense 0", "two of four 0.5", "filters 0.5"}
        assert_times(found["times"], whole["rounds"])
        medians = {name: timing["wall"]["median"] for name, timing in found["times"].items()}
        for name, share in found["share_of_dense"].items():
            assert share == pytest.approx(medians[name] / medians["dense 0"])
        # Filters take inputs of the next layer along: of its weights a quarter stays.
        weights, sizes = found["weights"], found["bytes"]
        assert weights["dense 0"] > 1.2 * weights["two of four 0.5"] > weights["filters 0.5"]
        assert sizes["dense 0"] > sizes["filters 0.5"]
    sizes = whole["settings"]["fashion"]["bytes"]
    assert sizes["dense 0"] > sizes["two of four 0.5"] > sizes["filters 0.5"]


@pytest.mark.filterwarnings("ignore:The logits of the probe batch")  # of tiny, untrained networks
@pytest.mark.skipif(emulation.EMULATOR is None, reason="needs qemu-x86_64 (Debian: qemu-user)")
def test_runtimes_are_held_against_the_dense_network(tmp_path):
    main(["--smoke", "--output", str(tmp_path), "runtimes"])
    found = result(tmp_path, "runtimes")
    runtimes = ("LiteRT", "LiteRT without AVX", "ONNX Runtime", "SavedModel", "SavedModel, XLA")
    forms = ["single weights 0.99", "blocks 0.99", "filters 0.99"]
    pairs = [("LeNet-5", form) for form in forms] + [("MobileNet", "1x1 0.99")]
    medians = {name: timing["cpu"]["median"] for name, timing in found["times"].items()}
    for runtime in runtimes:
        for network, form in pairs:
            dense = medians[f"{runtime}: {network}, dense"]
            name = f"{runtime}: {network}, {form}"
            ratio = found["times_as_fast_as_dense"][name]
            assert ratio == pytest.approx(dense / medians[name])
    sizes = found["bytes"]
    assert sizes["LeNet-5, dense"]["LiteRT"] > sizes["LeNet-5, filters 0.99"]["LiteRT"]
    blocks = sizes["LeNet-5, blocks 0.99"]["ONNX"]
    assert blocks == pytest.approx(sizes["LeNet-5, dense"]["ONNX"], rel=1e-2)
    assert found["microcontrollers"].keys() == sizes.keys()
    lines = runtimes_module.table(found).splitlines()
    row = next(line.split(" | ") for line in lines if line.startswith("| LeNet-5, blocks 0.99"))
    share = sizes["LeNet-5, blocks 0.99"]["LiteRT"] / sizes["LeNet-5, dense"]["LiteRT"]
    ratio = found["times_as_fast_as_dense"]["ONNX Runtime: LeNet-5, blocks 0.99"]
    assert (row[1], row[5]) == (f"{share:.3f}", f"{ratio:.2f}")


def test_the_table_of_runtimes_is_that_of_its_file():
    path = ROOT / "benchmarks" / "results" / "runtimes.json"
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    assert runtimes_module.table(json.loads(path.read_text(encoding="utf-8"))) in text


def test_all_forms_of_the_step_on_a_gpu_are_timed_and_it_is_refused_without_one(tmp_path):
    main(["gpu", "--smoke", "--output", str(tmp_path)])
    found = result(tmp_path, "gpu")
    assert_times(found["times"], 2)
    steps = [f"step, {policy}" for policy in ("float32", "mixed_float16", "mixed_bfloat16")]
    steps = [f"{step}{xla}" for step in steps for xla in ("", ", XLA")]
    assert [name for name in found["times"] if name.startswith("step")] == steps
    assert list(found["speed"]) == steps
    assert list(found["over_floor"]) == steps[:2]
    assert found["errors"] == {}
    assert found["speed"]["step, float32"]["of_medians"] == 1.0
    devices = found["two_devices"]
    for library in ("tf_keras", "keras"):
        assert devices[library]["outcome"] == "ok"
        assert devices[library]["difference"] < 1e-5
        words = "ValueError: jit_compile must be False on several CPU devices, got True with 2"
        assert devices[f"{library}, XLA"]["outcome"].startswith(words)
    text = gpu_module.table(found | {"gpus": [{"device_name": "NVIDIA T4"}]})
    assert text.startswith("On NVIDIA T4, tiny, batch 4, PGD-")
    over = found["over_floor"]["step, float32"]["of_medians"]
    assert f"\n| float32 | {over:.2f} | 1.00 |\n" in text
    assert "\n| tf_keras | ok |\n" in text
    assert "begin: gpu" in (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    if not tf.config.list_physical_devices("GPU"):
        with pytest.raises(SystemExit, match="TensorFlow sees no GPU here"):
            main(["gpu", "--output", str(tmp_path)])


def test_a_form_of_the_step_on_a_gpu_that_fails_loses_no_other(tmp_path, monkeypatch):
    def step(options, network, size, policy, xla):
        if xla:
            raise MemoryError("too large")
        return lambda: None

    monkeypatch.setattr(gpu_module, "_step", step)
    monkeypatch.setattr(two_devices, "_run", lambda command: "the process ended with exit code -6")
    with pytest.raises(SystemExit, match="have failed: step, float32, XLA, step, mixed_float16, X"):
        main(["gpu", "--smoke", "--output", str(tmp_path)])
    found = result(tmp_path, "gpu")
    assert len(found["speed"]) == 3
    assert list(found["errors"].values()) == ["MemoryError: too large"] * 3
    crashed = {"outcome": "the process ended with exit code -6"}
    assert found["two_devices"] == dict.fromkeys(two_devices.FORMS, crashed)
    text = gpu_module.table(found)
    assert "\n| float32, XLA | failed | – |\n" in text
    assert "\n| keras, XLA | the process ended with exit code -6 |" in text
