"""What the condition number constraint costs in a step with wide dense layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tscnc_tf as tscnc
from benchmarks import measure, networks, parts, record

GOAL = 1.05
BATCH_SIZE = 128
EVERY = 50

_LABELS = {
    "without": "without the constraint",
    "each": "with it in each step",
    "rarely": f"with it in one of {EVERY} steps (`every={EVERY}`)",
}


def run(options: record.Options) -> None:
    """Time the steps of each network; print a table and write `dense.json`."""
    chosen = [options.network] if options.network else ["mlp512", "mlp1024"]
    if options.smoke and not options.network:
        chosen = ["tiny"]
    size = options.pick("batch_size", BATCH_SIZE, 4)
    rounds = options.pick("rounds", 5, 2)
    results = {name: _measure(options, name, size, rounds) for name in chosen}
    path = record.write(
        options,
        "dense",
        {
            "network": chosen,
            "batch_size": size,
            "rounds": rounds,
            "steps": EVERY,
            "attack": f"PGD-{options.steps} linf {parts.EPSILON}",
            "networks": results,
            "goal": GOAL,
            "goal_met": all(
                result["ratios"]["rarely"]["wall"].of_medians <= GOAL for result in results.values()
            ),
        },
    )
    rows = [
        (f"{name}: {label}", *record.milliseconds(result["times"][kind]))
        for name, result in results.items()
        for kind, label in _LABELS.items()
    ]
    notes = [
        note
        for name, result in results.items()
        for note in (
            f"{name}, in one of {EVERY} steps, over without: "
            f"{record.against(result['ratios']['rarely']['wall'].of_medians, GOAL)}; by CPU time "
            f"{result['ratios']['rarely']['cpu'].of_medians:.3f}",
            f"{name}, in each step, over without: "
            f"{result['ratios']['each']['wall'].of_medians:.2f}; by CPU time "
            f"{result['ratios']['each']['cpu'].of_medians:.2f}",
        )
    ]
    title = f"{EVERY} steps of TRADES with dense layers, batch {size}, {rounds} rounds"
    record.show(title, record.COLUMNS, rows, notes, path)


def _measure(options: record.Options, network: str, size: int, rounds: int) -> dict[str, Any]:
    penalties = {
        "without": None,
        "each": tscnc.regularizers.ConditionNumber(1e-2),
        "rarely": tscnc.regularizers.ConditionNumber(1e-2, every=EVERY),
    }
    functions = {kind: _steps(options, network, size, each) for kind, each in penalties.items()}
    times = measure.interleaved(functions, rounds)
    ratios = {
        kind: measure.ratios([times[kind]], [times["without"]]) for kind in ("each", "rarely")
    }
    return {"times": times, "ratios": ratios}


def _steps(options: record.Options, network: str, size: int, penalty: Any) -> Callable[[], None]:
    """Return a function that takes `EVERY` steps, one period of the constraint."""
    model = networks.build(network)
    if penalty is not None:
        model = tscnc.pruning.add_regularizers(model, penalty)
    step, batch = parts.step(parts.trainer(model, options.steps)), parts.batch(model, size)

    def steps() -> None:
        for _ in range(EVERY):
            step(*batch)

    return steps
