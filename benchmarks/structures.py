"""What the structure of the zeros saves in LiteRT: bytes, and the time of one inference.

The networks are those of `benchmarks/study/structure.yaml`, a study of their accuracy. They are
pruned here without training, as their times depend on which weights are kept, not on the values.
"""

from __future__ import annotations

import pathlib
import tempfile
import warnings
from typing import Any

import tscnc_tf as tscnc
from benchmarks import measure, record
from benchmarks.litert import IN_A_ROW, INTERPRETERS, inference
from benchmarks.study.plan import HERE, Plan
from tscnc_tf.experiments import Recipe, stages
from tscnc_tf.experiments.parts import ARCHITECTURES

GOAL = 1 / 3  # of the dense network's time, at most
_PLAN = HERE / "structure.yaml"
_SIZES = {"digits": 8, "fashion_mnist": 28}  # of the images


def run(options: record.Options) -> None:
    """Export files and time inferences; print a table and write `structures.json`."""
    plan = Plan.read(_PLAN)
    rounds = options.pick("rounds", 300, 2)
    found = {setting: _measured(plan, setting, rounds, options.smoke) for setting in plan.settings}
    path = record.write(
        options,
        "structures",
        {
            "network": "tiny" if options.smoke else "those of structure.yaml",
            "batch_size": 1,
            "rounds": rounds,
            "settings": found,
            "goal": GOAL,
        },
    )
    rows = [
        (f"{setting}: {name}", *record.milliseconds(timing))
        for setting, each in found.items()
        for name, timing in each["times"].items()
    ]
    notes = [
        f"{setting}, {name}: {share:.2f} of the dense network's time, {each['bytes'][name]:,} "
        f"bytes, {each['weights'][name]:,} weights that are not zero"
        for setting, each in found.items()
        for name, share in each["share_of_dense"].items()
    ]
    title = f"{IN_A_ROW} inferences in a row, one thread, float32, {rounds} rounds"
    record.show(title, record.COLUMNS, rows, notes, path)


def _measured(plan: Plan, setting: str, rounds: int, smoke: bool) -> dict[str, Any]:
    """Return the bytes, weights and times of the networks of one setting, by arm and sparsity."""
    runs = [each for each in plan.runs({}) if (each.setting, each.seed) == (setting, plan.seeds[0])]
    if smoke:
        runs = [each for each in runs if each.sparsity in (0.0, 0.5)]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "At a sparsity of", UserWarning)  # dead filters
        made = {
            f"{each.arm} {each.sparsity:g}": exported(
                each.recipe, pathlib.Path(folder) / f"{place}.tflite", smoke
            )
            for place, each in enumerate(runs)
        }
        functions = {name: inference(report.path) for name, report in made.items()}
        times = measure.interleaved(functions, rounds, warm_up=2 * INTERPRETERS)
    dense = times["dense 0"]
    return {
        "bytes": {name: report.file_bytes for name, report in made.items()},
        "weights": {name: sum(k.weights - k.zeros for k in r.kernels) for name, r in made.items()},
        "times": times,
        "share_of_dense": {
            name: measure.ratios([timing], [dense])["wall"].of_medians
            for name, timing in times.items()
        },
    }


def exported(recipe: Recipe, path: pathlib.Path, smoke: bool) -> Any:
    """Return the report on an exported file with a recipe's network, pruned in one shot.

    Filters are removed; the other structures are exported with `sparse=True`.
    """
    build = getattr(tscnc.applications, ARCHITECTURES[recipe.network.architecture])
    size = _SIZES[recipe.data.dataset]
    shape = {"width": 4, "hidden": 16} if smoke else {}
    options = {**recipe.network.options, **shape}
    model = build(input_shape=(size, size, 1), classes=10, library="keras", **options)
    if not recipe.sparsity:
        return tscnc.export_litert(model, path)
    layers, structure = stages.pruned_layers(recipe.prune), stages.structure(recipe.prune)
    model = tscnc.prune_now(model, recipe.sparsity, layers=layers, structure=structure)
    if isinstance(structure, tscnc.pruning.Filters):
        return tscnc.export_litert(tscnc.pruning.compact(model).model, path)
    return tscnc.export_litert(model, path, sparse=True)
