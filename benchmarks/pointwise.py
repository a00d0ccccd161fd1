"""What zeros in 1x1 convolutions save on a processor where LiteRT skips them."""

from __future__ import annotations

import pathlib
import tempfile
import warnings
from typing import Any

import numpy as np

import tscnc_tf as tscnc
from benchmarks import emulation, measure, networks, record

SPARSITIES = (0.9, 0.95, 0.99)
GOAL = 3.0  # at least, times as fast at 95 %
_LAYERS = {
    "mobilenet_v1": "*_pointwise",
    "mobilenet_v2": ["*_expand", "*_project"],
    "tiny_mobilenet": "*_pointwise",
}


def run(options: record.Options) -> None:
    """Time one inference of each file; print a table and write `pointwise.json`.

    Raises:
        RuntimeError: QEMU is not installed.
    """
    if emulation.EMULATOR is None:
        raise RuntimeError("pointwise needs qemu-x86_64 (Debian: apt-get install qemu-user).")
    names, sparsities = ["mobilenet_v1", "mobilenet_v2"], SPARSITIES
    if options.smoke:
        names, sparsities = ["tiny_mobilenet"], (0.95,)
    rounds = options.pick("rounds", 20, 2)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "At a sparsity of", UserWarning)  # dead filters
        found = {name: _compared(name, sparsities, rounds, pathlib.Path(folder)) for name in names}
    ratios = [by_sparsity["0.95"]["ratio"] for by_sparsity in found.values()]
    path = record.write(
        options,
        "pointwise",
        {
            "networks": found,
            "processor": "x86-64 without AVX (Westmere), emulated by QEMU",
            "batch_size": 1,
            "rounds": rounds,
            "goal": GOAL,
            "goal_met": all(ratio.of_medians >= GOAL for ratio in ratios),
        },
    )
    rows, notes = [], []
    for name, by_sparsity in found.items():
        for sparsity, each in by_sparsity.items():
            what = f"{name}, {100 * float(sparsity):g} %"
            rows += [
                (f"{what}: {form}", *record.milliseconds(_timing(each["seconds"][form]))[:3])
                for form in ("dense", "sparse")
            ]
            goal = f" (goal: at least {GOAL:g})" if sparsity == "0.95" else ""
            notes.append(
                f"{what}: {each['sparse_convolutions']} of {each['convolutions']} 1x1 convolutions "
                f"sparse, {each['ratio'].of_medians:.1f} times as fast{goal}; "
                f"{each['share']:.3f} of the dense file"
            )
    title = f"One inference, one thread, float32, emulated processor without AVX, {rounds} rounds"
    record.show(title, record.COLUMNS[:4], rows, notes, path)


def _compared(
    name: str, sparsities: tuple[float, ...], rounds: int, folder: pathlib.Path
) -> dict[str, Any]:
    """Return the sizes and times of one network by sparsity."""
    files, reports = [], {}
    for sparsity in sparsities:
        model = networks.build(name)
        model = tscnc.prune_now(model, sparsity, layers=_LAYERS[name])
        for form in ("dense", "sparse"):
            path = folder / f"{name} {sparsity:g} {form}.tflite"
            report = tscnc.export_litert(model, path, sparse=form == "sparse")
            files.append(path)
        reports[f"{sparsity:g}"] = report
    outcomes = emulation.run(files, rounds)
    for sparsity in reports:
        outputs = [outcomes[f"{name} {sparsity} {form}"].outputs for form in ("dense", "sparse")]
        np.testing.assert_allclose(*outputs, atol=1e-4)
    found = {}
    for sparsity, report in reports.items():
        seconds = {
            form: measure.Summary.of(outcomes[f"{name} {sparsity} {form}"].seconds)
            for form in ("dense", "sparse")
        }
        times = {form: _timing(each) for form, each in seconds.items()}
        sparse, convolutions = report.pointwise or (0, 0)
        found[sparsity] = {
            "seconds": seconds,
            "ratio": measure.ratio([times["dense"]], [times["sparse"]]),
            "share": report.file_bytes / report.dense_bytes,
            "sparse_convolutions": sparse,
            "convolutions": convolutions,
        }
    return found


def _timing(seconds: measure.Summary) -> measure.Timing:
    """Return the times of an emulator, which has one clock."""
    return measure.Timing(seconds, seconds)
