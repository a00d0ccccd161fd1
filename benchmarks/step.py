"""One optimizer step of `AdversarialTraining` over its floor, see `parts.Floor`."""

from __future__ import annotations

import functools
from typing import Any

from benchmarks import measure, parts, record

GOAL = 1.10

_LABELS = {
    "step": "one step of AdversarialTraining",
    "forward": "floor: forward on the clean batch",
    "train": "floor: training forward and backward, double batch",
    "update": "floor: optimizer update",
}
_ABLATED = {
    "without regularizers": {"regularized": False},
    "without pruning": {"pruned": False},
    "without both": {"regularized": False, "pruned": False},
}


def run(options: record.Options) -> None:
    """Time the step and its floor; print a table and write `step.json`."""
    network = options.pick("network", "resnet20", "tiny")
    size = options.pick("batch_size", 32, 4)
    rounds = options.pick("rounds", 9, 2)

    floor = parts.Floor(network, size, options.steps)
    functions: dict[str, Any] = {"step": _step(options, network, size)}
    functions |= {piece: functools.partial(floor.run, piece) for piece in floor.pieces}
    if options.ablate:
        functions |= {
            name: _step(options, network, size, **kind) for name, kind in _ABLATED.items()
        }
    times = measure.interleaved(functions, rounds)

    below = [times[piece] for piece in floor.pieces]
    ratio = measure.ratio([times["step"]], below)
    cpu_ratio = measure.ratio([times["step"]], below, "cpu")
    ablations = {
        name: measure.ratios([times[name]], below) for name in _ABLATED if name in functions
    }
    path = record.write(
        options,
        "step",
        {
            "network": network,
            "batch_size": size,
            "rounds": rounds,
            "attack": f"PGD-{options.steps} linf {parts.EPSILON}",
            "times": times,
            "floor": sum(timing.wall.median for timing in below),
            "ratio": ratio,
            "cpu_ratio": cpu_ratio,
            "ablations": ablations,
            "goal": GOAL,
            "goal_met": ratio.of_medians <= GOAL,
        },
    )
    gradients = f"floor: {options.steps} x forward and input gradient"
    labels = {**_LABELS, "gradient": gradients}
    rows = [
        (labels.get(name, f"step {name}"), *record.milliseconds(timing))
        for name, timing in times.items()
    ]
    notes = [
        f"Step over floor, of medians: {record.against(ratio.of_medians, GOAL)}; "
        f"{record.spread(ratio)}",
        f"By CPU time: {cpu_ratio.of_medians:.3f}; {record.spread(cpu_ratio)}",
        *(
            f"Step {name} over floor: {value['wall'].of_medians:.3f}; "
            f"{record.spread(value['wall'])}; by CPU time {value['cpu'].of_medians:.3f}"
            for name, value in ablations.items()
        ),
        "The step: TRADES, TSCNC on all kernels, tfmot's pruning wrappers (a step that "
        "updates no mask, as 99 of 100), six metrics.",
        "The floor has no regularizers, no masks, no metrics and no loss but cross-entropy.",
    ]
    title = f"A training step and its floor: {network}, batch {size}, {rounds} rounds"
    record.show(title, record.COLUMNS, rows, notes, path)


def _step(options: record.Options, network: str, size: int, **kind: bool) -> Any:
    model = parts.pruned_model(network, **kind)
    step = parts.step(parts.trainer(model, options.steps))
    return functools.partial(step, *parts.batch(model, size))
