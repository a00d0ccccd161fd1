"""The whole step as one XLA program, checked, and exported for `accelerator/runner`."""

from __future__ import annotations

import functools
import gzip
import json
import pathlib
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks import accelerator, measure, parts, record
from tscnc_tf import _files


def run(options: record.Options) -> None:
    """Compile the step, take some steps, export it and its floor; write `stablehlo.json`."""
    network = options.pick("network", "resnet20", "tiny")
    size = options.pick("batch_size", 32, 4)
    rounds = options.pick("rounds", 3, 2)
    folder = options.output / "stablehlo"
    folder.mkdir(parents=True, exist_ok=True)

    model = parts.pruned_model(network)
    trainer = parts.trainer(model, options.steps)
    step = parts.step(trainer, jit_compile=True)
    data = parts.batch(model, size)
    floor = parts.Floor(network, size, options.steps, jit_compile=True)
    arguments = {"step": data, **floor.arguments}
    calls = {"step": 1, **floor.calls}
    _export({"step": step, **floor.pieces}, arguments, calls, trainer, folder)

    # JAX's steps are compared with the states after the first and the last step.
    before = model.get_weights()
    step(*data)  # compiles
    first = _state(trainer)
    plain = parts.step(parts.trainer(parts.pruned_model(network), options.steps))
    plain(*data)
    functions = {"step": step, "plain": plain}
    times = measure.interleaved(
        {name: functools.partial(function, *data) for name, function in functions.items()},
        rounds,
        warm_up=0,
    )
    over_plain = measure.ratio([times["step"]], [times["plain"]])
    after = model.get_weights()
    finite = all(np.all(np.isfinite(weight)) for weight in after)
    moved = any(np.any(a != b) for a, b in zip(before, after, strict=True))
    expected = {
        f"{when}:{name}": value
        for when, state in (("first", first), ("last", _state(trainer)))
        for name, value in state.items()
    }
    np.savez(folder / "expected.npz", steps=rounds + 1, **expected)

    path = record.write(
        options,
        "stablehlo",
        {
            "network": network,
            "batch_size": size,
            "rounds": rounds,
            "compiles": True,
            "weights_finite": finite,
            "weights_moved": moved,
            "steps_taken": rounds + 1,
            "times": times,
            "jit_over_plain": over_plain,
            "programs": _measures(folder, calls),
            "folder": str(folder),
        },
    )
    rows = [
        (
            name,
            f"{program['lines']:,}",
            f"{program['inputs']}",
            f"{program['variables']}",
            f"{program['assigned']}",
            f"{program['calls']}",
        )
        for name, program in _measures(folder, calls).items()
    ]
    columns = ("program", "lines", "inputs", "variables", "assigned", "calls in a step")
    notes = [
        "The step compiles with jit_compile=True and takes "
        f"{1e3 * times['step'].wall.median:,.1f} ms; over the plain step's time: "
        f"{over_plain.of_medians:.3f}; {record.spread(over_plain)}",
        f"After {rounds + 1} steps all weights are finite: {finite}; they moved: {moved}.",
        f"Programs and their state are in {folder}; run_stablehlo.py runs them.",
    ]
    title = f"The step as StableHLO: {network}, batch {size}"
    record.show(title, columns, rows, notes, path)


def _export(
    functions: dict[str, Any],
    arguments: dict[str, Any],
    calls: dict[str, int],
    trainer: Any,
    folder: pathlib.Path,
) -> None:
    """Write the programs, `arguments.npz` (their arguments), and `calls.json` (calls per step)."""
    named = {
        name: {str(index): tf.convert_to_tensor(value) for index, value in enumerate(values)}
        for name, values in arguments.items()
    }
    programs = {
        name: accelerator.Program(
            function, {key: tf.TensorSpec.from_tensor(value) for key, value in named[name].items()}
        )
        for name, function in functions.items()
    }
    accelerator.export(programs, folder, lambda: accelerator.trainer_variables(trainer))
    fed = {
        f"{name}/{key}": v.numpy() for name, values in named.items() for key, v in values.items()
    }
    np.savez(folder / "arguments.npz", **fed)
    _files.write_text(folder / "calls.json", json.dumps(calls) + "\n")


def _measures(folder: pathlib.Path, calls: dict[str, int]) -> dict[str, dict[str, int]]:
    """Return the sizes of each program and its calls per step."""
    plans = json.loads((folder / "programs.json").read_text())["programs"]
    return {
        name: {
            "lines": gzip.decompress((folder / f"{name}.mlir.gz").read_bytes()).count(b"\n"),
            "inputs": len(plan["arguments"]) + len(plan["state"]),
            "variables": len(plan["state"]),
            "assigned": len(plan["assigned"]),
            "calls": calls[name],
        }
        for name, plan in plans.items()
    }


def _state(trainer: Any) -> dict[str, np.ndarray]:
    """Return the variables of a trainer by name, without metrics.

    Metrics count predictions, so that one that changes makes a difference of 1.
    """
    named = accelerator.trainer_variables(trainer)
    return {name: v.numpy() for name, v in named.items() if not name.startswith("metrics/")}
