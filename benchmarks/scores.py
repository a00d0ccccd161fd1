"""What learned shares and perturbed scores cost a step of training by importance scores."""

from __future__ import annotations

import functools
from typing import Any

import tscnc_tf as tscnc
from benchmarks import measure, networks, parts, record

GOAL = 1.05

_OPTIONS: dict[str, dict[str, Any]] = {
    "scores": {},
    "learned": {"scope": "learned"},
    "perturbed": {"perturb_scores": 0.01},
}
_LABELS = {
    "scores": "one step of the scores, with the same sparsity in each layer (HYDRA)",
    "learned": "… with learned shares of the layers (HARP)",
    "perturbed": "… with perturbed scores (S2AP)",
}


def run(options: record.Options) -> None:
    """Time the steps; print a table and write `scores.json`."""
    network = options.pick("network", "resnet20", "tiny")
    size = options.pick("batch_size", 32, 4)
    rounds = options.pick("rounds", 9, 2)

    functions = {name: _step(options, network, size, **chosen) for name, chosen in _OPTIONS.items()}
    times = measure.interleaved(functions, rounds)

    ratios = {
        name: measure.ratios([times[name]], [times["scores"]]) for name in ("learned", "perturbed")
    }
    learned = ratios["learned"]["wall"]
    path = record.write(
        options,
        "scores",
        {
            "network": network,
            "batch_size": size,
            "rounds": rounds,
            "attack": f"PGD-{options.steps} linf {parts.EPSILON}",
            "times": times,
            "ratios": ratios,
            "goal": GOAL,
            "goal_met": learned.of_medians <= GOAL,
        },
    )
    rows = [(_LABELS[name], *record.milliseconds(timing)) for name, timing in times.items()]
    notes = [
        f"Learned shares, over none: {record.against(learned.of_medians, GOAL)}; "
        f"{record.spread(learned)}; by CPU time {ratios['learned']['cpu'].of_medians:.3f}",
        f"Perturbed scores, over none: {ratios['perturbed']['wall'].of_medians:.3f}; by CPU time "
        f"{ratios['perturbed']['cpu'].of_medians:.3f}",
        "The step: TRADES, 90 % zeros, masks that are updated in each step.",
    ]
    title = f"A step of the scores: {network}, batch {size}, {rounds} rounds"
    record.show(title, record.COLUMNS, rows, notes, path)


def _step(options: record.Options, network: str, size: int, **chosen: Any) -> Any:
    model = networks.build(network)
    model = tscnc.prune(model, method="scores", sparsity=0.9, min_weights=64, **chosen)
    step = parts.step(parts.trainer(model, options.steps))
    return functools.partial(step, *parts.batch(model, size))
