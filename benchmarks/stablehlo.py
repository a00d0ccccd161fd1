"""The whole step as one XLA program, checked, and written out to be timed where there is JAX only.

`run_stablehlo.py` in this folder runs what is written here.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
from typing import Any

import numpy as np

from benchmarks import measure, parts, record
from tscnc_tf import _files

_ALIAS = re.compile(
    r"parameter_number = (?P<input>\d+) : i64\}, output_index = array<i64(?:: (?P<output>\d+))?>"
)


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
    programs = {"step": export(step, data, folder / "step")}
    floor = parts.Floor(network, size, options.steps, jit_compile=True)
    for name, piece in floor.pieces.items():
        programs[name] = export(piece, floor.arguments[name], folder / name, floor.calls[name])

    # What the other side's steps are held against: the state after the very first steps.
    before = model.get_weights()
    step(*data)  # compiles
    first = _state(step, data)
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
    # Not the metrics: they count, and one prediction that tips over is a whole 1.
    counters = {v.name for metric in trainer.metrics for v in metric.variables}
    expected = {
        f"{when}:{name}": value
        for when, state in (("first", first), ("last", _state(step, data)))
        for name, value in state.items()
        if name.partition("#")[0] not in counters
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
            "programs": programs,
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
        for name, program in programs.items()
    ]
    columns = ("program", "lines", "inputs", "variables", "assigned", "calls in a step")
    notes = [
        "The step compiles with jit_compile=True and takes "
        f"{1e3 * times['step'].wall.median:,.1f} ms here; over the plain step's time: "
        f"{over_plain.of_medians:.3f}; {record.spread(over_plain)}",
        f"After {rounds + 1} steps all weights are finite: {finite}; they moved: {moved}.",
        f"Programs and their state are in {folder}; run_stablehlo.py runs them.",
    ]
    title = f"The step as StableHLO: {network}, batch {size}"
    record.show(title, columns, rows, notes, path)


def export(function: Any, arguments: Any, path: pathlib.Path, calls: int = 1) -> dict[str, Any]:
    """Write `<path>.mlir`, the program, and `<path>.npz`, its inputs; return its measures.

    In the `.npz` stand the arguments ("arg0", ...), the variables (by name and a number, as names
    may repeat), and "plan", JSON text: "order" names the program's inputs one by one, "aliases"
    says which of them is assigned, and by which output; "calls" how often a step needs the program.

    Args:
        function: a `tf.function` with `jit_compile=True`; its arguments are tensors of known
            shape, all its state is in variables.
        arguments: the example arguments.
        path: where to write, without the ending.
        calls: how often a training step needs the program.

    Raises:
        ValueError: the program has other inputs than the arguments and variables.
    """
    inputs: dict[str, Any] = {
        f"arg{index}": np.asarray(value) for index, value in enumerate(arguments)
    }
    inputs |= _state(function, arguments)
    order = list(inputs)
    text = function.experimental_get_compiler_ir(*arguments)(stage="stablehlo")
    signature = re.search(r"func\.func (?:public )?@main\((.*?)\) -> ", text, re.S)
    count = len(re.findall(r"%arg\d+:", signature[1])) if signature else 0
    if count != len(order):
        raise ValueError(f"{path.name} takes {count} inputs, but {len(order)} are known: {order}")
    aliases = {order[int(m["input"])]: int(m["output"] or 0) for m in _ALIAS.finditer(text)}
    _files.write_text(path.with_suffix(".mlir"), text)
    plan = {"order": order, "aliases": aliases, "calls": calls}
    np.savez(path.with_suffix(".npz"), **inputs, plan=json.dumps(plan))
    return {
        "lines": text.count("\n"),
        "inputs": count,
        "variables": count - len(arguments),
        "assigned": len(aliases),
        "calls": calls,
    }


def _state(function: Any, arguments: Any) -> dict[str, Any]:
    """Return the values of a function's variables, in the order in which it captures them."""
    graph = function.get_concrete_function(*arguments)
    variables = {id(variable.handle): variable for variable in graph.variables}
    captured = [variables[id(tensor)] for tensor in graph.captured_inputs]
    return {f"{v.name}#{index}": v.numpy() for index, v in enumerate(captured)}
