"""What sparse LiteRT files save: bytes on convolutions, time on dense layers; and with int8."""

from __future__ import annotations

import itertools
import pathlib
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

import tscnc_tf as tscnc
from benchmarks import measure, networks, record

# Inferences that are timed together, as reading the clock takes longer than a fast one.
IN_A_ROW = 10
INTERPRETERS = 5
SPARSITIES = (0.9, 0.95, 0.99)
SIZES = (0.20, 0.13, 0.08)  # goals: bytes over those of the dense file, at most
BLOCKS, SINGLE = (2.5, 4.0, 10.0), (None, None, 5.0)  # goals: times as fast, at least
_STRUCTURES = {"blocks": tscnc.pruning.Block.for_litert(), "single weights": None}
_INT8 = "int8"
_EXAMPLES = 4  # for the ranges of int8, which affect neither sizes nor times


def run(options: record.Options) -> None:
    """Export files and time inferences; print a table and write `litert.json`."""
    large = options.pick("network", "resnet18", "tiny")
    dense_layers = "tiny" if options.smoke else "mlp1024"
    rounds = options.pick("rounds", 200, 2)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "At a sparsity of", UserWarning)  # dead filters
        place = pathlib.Path(folder)
        sizes = {f"{sparsity:g}": _size(large, sparsity, place) for sparsity in SPARSITIES}
        settings = {"dense": (None, 0.0)} | {
            f"{name} {sparsity:g}": (structure, sparsity)
            for name, structure in _STRUCTURES.items()
            for sparsity in SPARSITIES
        }
        settings |= {
            f"{_INT8} blocks {sparsity:g}" if sparsity else f"{_INT8} dense": (
                tscnc.pruning.Block.for_litert(_INT8) if sparsity else None,
                sparsity,
            )
            for sparsity in (0.0, *SPARSITIES)
        }
        functions, stored = {}, {}
        for name, (structure, sparsity) in settings.items():
            functions[name], stored[name] = _inference(
                dense_layers, structure, sparsity, place, is_int8=name.startswith(_INT8)
            )
        times = measure.interleaved(functions, rounds, warm_up=2 * INTERPRETERS)
    ratios = {
        name: measure.ratios([times["dense"]], [times[name]])
        for name in functions
        if name != "dense"
    }
    over_int8 = {
        name: measure.ratios([times[f"{_INT8} dense"]], [times[name]])
        for name in functions
        if name.startswith(f"{_INT8} blocks")
    }
    goals = {
        f"{name} {sparsity:g}": goal
        for name, wanted in zip(_STRUCTURES, (BLOCKS, SINGLE), strict=True)
        for sparsity, goal in zip(SPARSITIES, wanted, strict=True)
    }
    path = record.write(
        options,
        "litert",
        {
            "network": [large, dense_layers],
            "batch_size": 1,
            "rounds": rounds,
            "sizes": sizes,
            "stored": stored,
            "times": times,
            "ratios": ratios,
            "ratios_to_int8_dense": over_int8,
            "goals": {"sizes": SIZES, "times_as_fast": goals},
            "goal_met": all(
                found["share"] <= goal for found, goal in zip(sizes.values(), SIZES, strict=True)
            )
            and all(
                goal is None or ratios[name]["wall"].of_medians >= goal
                for name, goal in goals.items()
            ),
        },
    )
    rows = [
        (f"{dense_layers}: {name}", *record.milliseconds(timing)) for name, timing in times.items()
    ]
    notes = [
        f"{large}, {100 * float(sparsity):g} % zeros: {found['sparse']:,} of "
        f"{found['dense']:,} bytes, {record.against(found['share'], goal)}; in {_INT8} "
        f"{found[_INT8]['sparse']:,} of {found[_INT8]['dense']:,}: {found[_INT8]['share']:.3f} of "
        f"it, {found[_INT8]['share_of_float32']:.3f} of the dense one in float32"
        for (sparsity, found), goal in zip(sizes.items(), SIZES, strict=True)
    ]
    notes += [
        f"{dense_layers}, {name}, {stored[name]}: {ratio['wall'].of_medians:.1f} times as fast"
        + (f" (goal: at least {goals[name]:g})" if goals.get(name) else "")
        for name, ratio in ratios.items()
    ]
    notes += [
        f"{dense_layers}, {name}: {ratio['wall'].of_medians:.1f} times as fast as {_INT8} dense"
        for name, ratio in over_int8.items()
    ]
    title = f"{IN_A_ROW} inferences in a row, one thread, {rounds} rounds"
    record.show(title, record.COLUMNS, rows, notes, path)


def _size(network: str, sparsity: float, folder: pathlib.Path) -> dict[str, Any]:
    """Return the bytes of sparse and dense files of a network, in float32 and in int8."""
    found: dict[str, Any] = {}
    # On initial weights, global pruning removes whole layers, which int8 can't scale.
    for precision, scope in (("float32", "global"), (_INT8, "layer")):
        model = tscnc.prune_now(networks.build(network), sparsity, scope=scope)
        report = tscnc.export_litert(
            model,
            folder / "sized.tflite",
            sparse=True,
            overwrite=True,
            precision=precision,
            calibration=_examples(model) if precision == _INT8 else None,
        )
        dense, sparse = report.dense_bytes or 0, report.file_bytes
        found[precision] = {"sparse": sparse, "dense": dense, "share": sparse / dense}
    floats, ints = found["float32"], found[_INT8]
    return floats | {_INT8: ints | {"share_of_float32": ints["sparse"] / floats["dense"]}}


def _examples(model: Any) -> np.ndarray:
    return np.random.default_rng(0).random((_EXAMPLES, *model.input_shape[1:]), np.float32)


def _inference(
    network: str, structure: Any, sparsity: float, folder: pathlib.Path, *, is_int8: bool = False
) -> tuple[Callable[[], None], str]:
    """Export a network with pruned hidden layers; return a function that runs it on one example.

    The second result is how the file stores the pruned kernels. Those that are "dense on loading"
    take as long as dense ones.
    """
    model = networks.build(network)
    if sparsity:
        hidden = [layer.name for layer in model.layers if layer.name != "logits"]
        model = tscnc.prune_now(model, sparsity, layers=hidden, structure=structure)
    path = folder / f"{network}-{structure}-{sparsity}-{is_int8}.tflite"
    precision = {"precision": _INT8, "calibration": _examples(model)} if is_int8 else {}
    report = tscnc.export_litert(model, path, sparse=bool(sparsity), **precision)
    kinds = {kernel.stored for kernel in report.kernels if kernel.name != "logits"}
    return inference(path), ", ".join(sorted(kinds)) if sparsity else "dense"


def inference(path: str | pathlib.Path) -> Callable[[], None]:
    """Return a function that runs a file on one example `IN_A_ROW` times, on one thread.

    The calls take turns among several interpreters, because the place of an interpreter in memory
    changes its time by a tenth and more.
    """
    turns = itertools.cycle([_loaded(path) for _ in range(INTERPRETERS)])

    def run() -> None:
        interpreter = next(turns)
        for _ in range(IN_A_ROW):
            interpreter.invoke()

    return run


def _loaded(path: str | pathlib.Path) -> Interpreter:
    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    (given,) = interpreter.get_input_details()
    x = np.random.default_rng(0).random((1, *given["shape"][1:]), np.float32)
    interpreter.set_tensor(given["index"], x)
    return interpreter
