"""What zeros save in each runtime: bytes of the file, and the time of one inference.

The networks are pruned without training, as their times depend on which weights are kept, not on
the values.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnxruntime
import tensorflow as tf

import tscnc_tf as tscnc
from benchmarks import emulation, measure, networks, record
from benchmarks.litert import IN_A_ROW, INTERPRETERS, inference
from benchmarks.study.report import insert
from tscnc_tf.applications import LeNet5

DOCUMENT = pathlib.Path(__file__).parents[1] / "docs" / "export.md"
SPARSITIES = (0.9, 0.95, 0.99)
# By sparsity, the share of filters whose removal leaves about as many weights.
FILTERS = {0.9: 0.68, 0.95: 0.78, 0.99: 0.9}
_INNER = ["stage_2_conv_1", "hidden_1"]
# Runtimes that multiply by zeros, too: they run at one sparsity only, `_RUN_IN_ALL`.
_DENSE_ONLY = ("ONNX Runtime", "SavedModel", "SavedModel, XLA")
_RUN_IN_ALL = 0.99
_MICRO, _EMULATED = "LiteRT for microcontrollers", "LiteRT without AVX"
_SINGLE = (_MICRO, _EMULATED)  # timed one inference at a time
_COLUMNS = (_EMULATED, *_DENSE_ONLY, _MICRO)
_CANNOT, _WRONG = "can't be loaded", "returns wrong logits, without an error"
_CRASHES = "crashes"
_FAULTS = {_CANNOT: "not loaded", _WRONG: "wrong", _CRASHES: "crashes"}
_SCRIPT = """
import json, sys, time
import numpy as np
from tflite_micro.python.tflite_micro import runtime

interpreter = runtime.Interpreter.from_file(sys.argv[1])
x = np.random.default_rng(0).random(tuple(map(int, sys.argv[3:])), np.float32)
seconds = []
for _ in range(1 + int(sys.argv[2])):
    interpreter.set_input(x, 0)  # each time, as its memory is reused during an inference
    begin = time.perf_counter()
    interpreter.invoke()
    seconds.append(time.perf_counter() - begin)
print(json.dumps([seconds[1:], interpreter.get_output(0).tolist()]))
"""


def run(options: record.Options) -> None:
    """Export and time all networks; write `runtimes.json` and the table of `docs/export.md`.

    Raises:
        RuntimeError: QEMU is not installed.
    """
    if emulation.EMULATOR is None:
        raise RuntimeError("runtimes needs qemu-x86_64 (Debian: apt-get install qemu-user).")
    rounds = options.pick("rounds", 100, 2)
    functions: dict[str, dict[str, Callable[[], Any]]] = {name: {} for name in _DENSE_ONLY}
    functions["LiteRT"], files, sizes, micro = {}, {}, {}, {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "At a sparsity of", UserWarning)  # dead filters
        for name, model, sparsity in _networks(options.smoke):
            place = pathlib.Path(folder) / name
            place.mkdir()
            is_sparse = bool(sparsity) and "filters" not in name
            report = tscnc.export_litert(model, place / f"{name}.tflite", sparse=is_sparse)
            files[name], functions["LiteRT"][name] = report.path, inference(report.path)
            weights = sum(kernel.weights - kernel.zeros for kernel in report.kernels)
            sizes[name] = {"LiteRT": report.file_bytes, "weights": weights}
            micro[name] = _in_micro(report.path, model, rounds)
            if is_sparse and sparsity != _RUN_IN_ALL:
                continue
            onnx = tscnc.export_onnx(model, place / "net.onnx")
            saved = tscnc.export_saved_model(model, place / "saved")
            sizes[name] |= {"ONNX": onnx.file_bytes, "SavedModel": saved.saved_model_bytes}
            for runtime, function in _others(place).items():
                functions[runtime][name] = function
        times = measure.interleaved(
            {
                f"{runtime}: {name}": function
                for runtime, by_name in functions.items()
                for name, function in by_name.items()
            },
            rounds,
            warm_up=2 * INTERPRETERS,
        )
        outcomes = emulation.run(map(pathlib.Path, files.values()), options.pick("rounds", 20, 2))
    for name, outcome in outcomes.items():
        times[f"{_EMULATED}: {name}"] = _of_one_clock(outcome.seconds)
    for name, seconds in micro.items():
        if isinstance(seconds, list):
            times[f"{_MICRO}: {name}"] = _of_one_clock(seconds)
    ratios = {name: _times_as_fast(times, name) for name in times}
    path = record.write(
        options,
        "runtimes",
        {
            "network": "tiny" if options.smoke else "LeNet-5 of 28x28, MobileNetV1 x 0.5 of 32x32",
            "batch_size": 1,
            "rounds": rounds,
            "bytes": sizes,
            "times": times,
            "times_as_fast_as_dense": ratios,
            "microcontrollers": {
                name: "right" if isinstance(found, list) else found for name, found in micro.items()
            },
        },
    )
    if not options.smoke:
        insert(DOCUMENT, "runtimes", table(json.loads(path.read_text(encoding="utf-8"))))
    rows = [(name, *record.milliseconds(timing)) for name, timing in times.items()]
    notes = [f"{name}: {ratio:.2f} times as fast as dense" for name, ratio in ratios.items()]
    notes += [f"{name}: {found}" for name, found in sizes.items()]
    notes += [f"microcontrollers, {n}: {f}" for n, f in micro.items() if isinstance(f, str)]
    title = f"{IN_A_ROW} inferences in a row (the last two: one), float32, {rounds} rounds"
    record.show(title, record.COLUMNS, rows, notes, path)


def table(found: Mapping[str, Any]) -> str:
    """Return what `runtimes.json` holds as the table of `docs/export.md`, in Markdown.

    Bytes are relative to the dense file of the same network and format. Times are given as the
    number of times as fast as dense in the same runtime. For dense networks both are absolute.
    """
    head = ["network", "bytes: LiteRT", "ONNX", "time: LiteRT", *_COLUMNS]
    rows = []
    for name, sizes in found["bytes"].items():
        dense = found["bytes"][f"{name.partition(',')[0]}, dense"]
        is_dense = sizes is dense
        cells = [name]
        for form in ("LiteRT", "ONNX"):
            share = f"{sizes[form] / dense[form]:.3f}" if form in sizes else ""
            cells.append(f"{sizes[form] / 1000:,.0f} kB" if is_dense else share)
        for runtime in ("LiteRT", *_COLUMNS):
            place = f"{runtime}: {name}"
            outcome = found["microcontrollers"][name] if runtime == _MICRO else ""
            cells.append(_FAULTS.get(outcome.partition(":")[0], ""))
            if place in found["times"]:
                seconds = found["times"][place]["wall"]["median"]
                each = seconds / (1 if runtime in _SINGLE else IN_A_ROW)
                ratio = f"{found['times_as_fast_as_dense'][place]:.2f}"
                cells[-1] = f"{1e3 * each:.3g} ms" if is_dense else ratio
        rows.append(cells)
    lines = [head, ["---"] * len(head), *sorted(rows, key=lambda row: row[0].partition(",")[0])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _networks(smoke: bool) -> Iterator[tuple[str, Any, float]]:
    """Yield names, networks, and the share of inner weights that are zero or removed."""
    shape = {"width": 4, "hidden": 16} if smoke else {}
    levels = (_RUN_IN_ALL,) if smoke else SPARSITIES

    def lenet() -> Any:
        tf.keras.utils.set_random_seed(0)
        return LeNet5(input_shape=(28, 28, 1), kernel_size=3, library="tf_keras", **shape)

    def pruned(model: Any, sparsity: float, layers: Any, structure: Any = None) -> Any:
        return tscnc.strip(tscnc.prune_now(model, sparsity, layers=layers, structure=structure))

    mobilenet = "tiny_mobilenet" if smoke else "mobilenet_v1"
    yield "LeNet-5, dense", lenet(), 0.0
    yield "MobileNet, dense", networks.build(mobilenet), 0.0
    for level in levels:
        yield f"LeNet-5, single weights {level:g}", pruned(lenet(), level, _INNER), level
        blocks = pruned(lenet(), level, _INNER, tscnc.pruning.Block.for_litert())
        yield f"LeNet-5, blocks {level:g}", blocks, level
        filters = pruned(lenet(), FILTERS[level], _INNER, tscnc.pruning.Filters())
        yield f"LeNet-5, filters {level:g}", tscnc.pruning.compact(filters).model, level
        points = pruned(networks.build(mobilenet), level, "*_pointwise")
        yield f"MobileNet, 1x1 {level:g}", points, level


def _others(place: pathlib.Path) -> Mapping[str, Callable[[], Any]]:
    """Return functions by runtime that run the files in a folder on one example."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(place / "net.onnx"), options, providers=["CPUExecutionProvider"]
    )
    (given,) = session.get_inputs()
    x = np.random.default_rng(0).random((1, *given.shape[1:]), np.float32)
    saved = tf.saved_model.load(str(place / "saved"))
    signature, image = saved.signatures["serving_default"], tf.constant(x)
    (name,) = signature.structured_input_signature[1]
    compiled = tf.function(lambda value: signature(**{name: value}), jit_compile=True)
    single: dict[str, Callable[[], Any]] = {
        "ONNX Runtime": lambda: session.run(None, {given.name: x}),
        "SavedModel": lambda: signature(**{name: image}),
        "SavedModel, XLA": lambda: (saved, compiled(image)),
    }
    return {each: _in_a_row(function) for each, function in single.items()}


def _in_a_row(function: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(IN_A_ROW):
            function()

    return run


def _in_micro(path: str, model: Any, rounds: int) -> list[float] | str:
    """Return the seconds of inferences by LiteRT for microcontrollers, or why they failed.

    It runs as portable code on this computer, without the kernels of microcontroller vendors. It
    runs in its own process, as it reads past the end of sparse kernels that it takes for dense.
    """
    if importlib.util.find_spec("tflite_micro") is None:
        return "not tried: needs pip install tflite-micro"
    x = np.random.default_rng(0).random((1, *model.input_shape[1:]), np.float32)
    command = [sys.executable, "-c", _SCRIPT, path, str(min(rounds, 20)), *map(str, x.shape)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "DENSIFY" in line]
        return f"{_CANNOT}: {lines[0]}" if lines else f"{_CRASHES}: {done.returncode}"
    seconds, outputs = json.loads(done.stdout.splitlines()[-1])
    is_right = np.allclose(np.array(outputs, np.float32), model(x, training=False), atol=1e-4)
    return seconds if is_right else _WRONG


def _of_one_clock(seconds: list[float]) -> measure.Timing:
    return measure.Timing(measure.Summary.of(seconds), measure.Summary.of(seconds))


def _times_as_fast(times: Mapping[str, measure.Timing], name: str) -> float:
    """Return how many times as fast as dense a network runs in its runtime, by CPU time."""
    dense = f"{name.partition(',')[0]}, dense"
    if name.startswith("SavedModel, XLA"):
        dense = f"SavedModel, XLA: {name.split(': ')[1].partition(',')[0]}, dense"
    return measure.ratio([times[dense]], [times[name]], clock="cpu").of_medians
