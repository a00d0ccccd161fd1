"""AutoAttack in torch with other seeds: how far from itself, and AutoAttack here from all of them.

On the network of `parity` on which the two differ most, that of 99 % zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks import parity, record
from benchmarks.parity import networks, reference
from benchmarks.parity.networks import EPSILONS
from benchmarks.parity.reference import Budget
from tscnc_tf import _reports

SEEDS = (0, 1, 2)
NETWORK, WITNESS = "pruned 99 %", "foolbox DDN"


def run(options: record.Options) -> None:
    """Judge the network by both sides; write `parity_seeds.json`."""
    smoke = options.smoke
    training, data = networks.examples(128 if smoke else 1000)
    budget = Budget(50, 300, 50) if smoke else Budget()
    folder = options.output / "parity" if smoke else parity.FOLDER
    model = networks.trained(NETWORK, training, 15 if smoke else 60, folder)
    found = {norm: _compared(model, data, norm, budget) for norm in EPSILONS}
    path = record.write(
        options,
        "parity_seeds",
        {
            "network": NETWORK,
            "examples": len(data.x),
            "epsilons": EPSILONS,
            "budget": budget._asdict(),
            "references": _reports.versions("torch", "torchattacks", "foolbox"),
            "norms": found,
        },
    )
    rows = [
        (norm, what, _reports.percent(each["accuracy"]), str(each.get("broken", "")))
        for norm, by_name in found.items()
        for what, each in by_name.items()
    ]
    notes = ["Broken: examples that are left, and that foolbox' DDN fools (l2 only)."]
    record.show(
        f"Robust accuracy, {NETWORK}", ("norm", "by", "accuracy", "broken"), rows, notes, path
    )


def _compared(model: Any, data: Any, norm: str, budget: Budget) -> dict[str, dict[str, Any]]:
    """Return what "standard" leaves with each seed, with all of them, and here."""
    left = {}
    for seed in SEEDS:
        attacks = reference.references(model, data, norm, budget, timed=False, seed=seed)
        left[f"reference, seed {seed}"] = np.logical_and.reduce([run() for run in attacks.values()])
    left["reference, all seeds"] = np.logical_and.reduce(list(left.values()))
    left["here, seed 0"] = parity.ours(model, data, norm, budget)[parity.STANDARD]()
    seen = reference.witnesses(model, data, norm, budget, timed=False).get(WITNESS)
    stands = None if seen is None else seen()
    return {
        name: {"accuracy": float(np.mean(each))}
        | ({} if stands is None else {"broken": int(np.sum(each & ~stands))})
        for name, each in left.items()
    }
