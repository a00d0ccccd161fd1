"""AutoAttack here beside AutoAttack in torch: the same networks, examples and constants.

Wants the extra `parity`: torch, torchattacks, foolbox and ART. What they did is kept in
`outputs/parity`, so that they are run once for each network.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import tscnc_tf as tscnc
from benchmarks import record
from benchmarks.parity import networks, reference
from benchmarks.parity.networks import EPSILONS, Examples
from benchmarks.parity.reference import Budget
from tscnc_tf import _reports

# The goals: |ours - reference| in the robust accuracy of "standard"; ours - reference for each
# attack; and the share of the examples that a witness breaks, and our "standard" does not.
GOALS = {"standard": 0.002, "single": 0.005, "witness": 0.001}
STANDARD = "standard"
FOLDER = pathlib.Path("outputs/parity")
_LIBRARIES = ("torch", "torchattacks", "foolbox", "adversarial-robustness-toolbox")


@dataclasses.dataclass(frozen=True)
class Run:
    """What an attack left: for each example, whether the network is right on it; and seconds."""

    correct: np.ndarray
    wall: float
    cpu: float

    @classmethod
    def of(cls, function: Callable[[], np.ndarray]) -> Run:
        """Return what a call of a function left, and its seconds."""
        wall, cpu = time.perf_counter(), time.process_time()
        correct = np.asarray(function())
        return cls(correct, time.perf_counter() - wall, time.process_time() - cpu)

    @classmethod
    def kept(cls, path: pathlib.Path, function: Callable[[], np.ndarray]) -> Run:
        """Return a run from a file, or else call a function and write the file."""
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, **dataclasses.asdict(cls.of(function)))
        with np.load(path) as found:
            return cls(found["correct"], float(found["wall"]), float(found["cpu"]))

    @property
    def accuracy(self) -> float:
        """The accuracy that is left."""
        return float(np.mean(self.correct))

    def figures(self) -> dict[str, float]:
        """Return the accuracy and the seconds."""
        return {"accuracy": self.accuracy, "wall": self.wall, "cpu": self.cpu}


def run(options: record.Options) -> None:
    """Run both sides on all networks; write `parity.json`."""
    smoke = options.smoke
    names = ["standard", "pruned 99 %"] if smoke else list(networks.NETWORKS)
    training, data = networks.examples(64 if smoke else 1000)
    budget = Budget(10, 100, 20) if smoke else Budget()
    folder = options.output / "parity" if smoke else FOLDER
    found = []
    for name in names:
        model = networks.trained(name, training, 2 if smoke else 60, folder)
        for norm in EPSILONS:
            with_art = not smoke and (name, norm) == ("adversarial", "linf")
            compared = compare(model, data, norm, budget, folder, with_art=with_art)
            found.append({"network": name, "norm": norm, **compared})
            print(_line(found[-1]), flush=True)
    path = record.write(
        options,
        "parity",
        {
            "examples": len(data.x),
            "epsilons": EPSILONS,
            "budget": budget._asdict(),
            "references": _reports.versions(*_LIBRARIES),
            "networks": found,
            "goals": GOALS,
            "goals_met": {goal: all(each["goals_met"][goal] for each in found) for goal in GOALS},
        },
    )
    columns = ("network", "norm", "attack", "ours", "reference", "difference", "CPU time, ours")
    record.show("Parity", columns, _rows(found), _notes(found), path)


def ours(norm: str, budget: Budget) -> dict[str, Any]:
    """Return the attacks of the package by the names of `reference.references`."""
    common = {"epsilon": EPSILONS[norm], "norm": norm}
    attacks = tscnc.attacks
    return {
        "apgd-ce": attacks.APGD(loss="ce", steps=budget.steps, **common),
        "apgd-t": attacks.APGD(loss="targeted_dlr", steps=budget.steps, **common),
        "fab-t": attacks.FAB(targeted=True, steps=budget.steps, **common),
        "square": attacks.Square(queries=budget.queries, **common),
        STANDARD: attacks.AutoAttack(version="standard", **common),
    }


def compare(
    model: Any, data: Examples, norm: str, budget: Budget, folder: pathlib.Path, *, with_art: bool
) -> dict[str, Any]:
    """Return what both sides and the witnesses did to one network, and which goals are met."""
    theirs, seen = reference_runs(model, data, norm, budget, folder, with_art=with_art)
    mine = {
        name: Run.of(functools.partial(reference.judge, attack, model, data))
        for name, attack in ours(norm, budget).items()
    }
    difference = {name: mine[name].accuracy - theirs[name].accuracy for name in mine}
    broken = {
        name: float(np.mean(mine[STANDARD].correct & ~witness.correct))
        for name, witness in seen.items()
    }
    return {
        "ours": {name: each.figures() for name, each in mine.items()},
        "reference": {name: each.figures() for name, each in theirs.items()},
        "witnesses": {
            name: {**each.figures(), "broken": broken[name]} for name, each in seen.items()
        },
        "difference": difference,
        "goals_met": {
            "standard": abs(difference[STANDARD]) <= GOALS["standard"],
            "single": all(value <= GOALS["single"] for value in difference.values()),
            "witness": all(value <= GOALS["witness"] for value in broken.values()),
        },
    }


def reference_runs(
    model: Any, data: Examples, norm: str, budget: Budget, folder: pathlib.Path, *, with_art: bool
) -> tuple[dict[str, Run], dict[str, Run]]:
    """Return the runs of the reference and of the witnesses, from files where there are some."""
    folder = folder / _hash(model, data, norm, budget)
    theirs = reference.references(model, data, norm, budget)
    seen = reference.witnesses(model, data, norm, budget)
    if with_art:
        seen["ART AutoAttack"] = functools.partial(reference.art, model, data, norm)
    runs = [
        {name: Run.kept(folder / f"{name}.npz", judged) for name, judged in part.items()}
        for part in (theirs, seen)
    ]
    return runs[0], runs[1]


def _hash(model: Any, data: Examples, *settings: Any) -> str:
    digest = hashlib.sha256(repr((EPSILONS, settings)).encode())
    for array in (*model.get_weights(), *data):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _line(found: dict[str, Any]) -> str:
    pairs = (
        f"{name} {100 * found['ours'][name]['accuracy']:.1f} "
        f"({100 * found['reference'][name]['accuracy']:.1f})"
        for name in found["ours"]
    )
    return f"{found['network']}, {found['norm']}: {', '.join(pairs)}"


def _rows(found: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            each["network"],
            each["norm"],
            name,
            _reports.percent(mine["accuracy"]),
            _reports.percent(each["reference"][name]["accuracy"]),
            f"{100 * each['difference'][name]:+.1f} points",
            f"{mine['cpu'] / each['reference'][name]['cpu']:.2f} of the reference's",
        )
        for each in found
        for name, mine in each["ours"].items()
    ]


def _notes(found: list[dict[str, Any]]) -> list[str]:
    largest = {
        "standard, largest difference, points": 100
        * max(abs(each["difference"][STANDARD]) for each in found),
        "any attack, ours over the reference, points": 100
        * max(value for each in found for value in each["difference"].values()),
        "broken by a witness alone, % of the examples": 100
        * max(each["broken"] for all_ in found for each in all_["witnesses"].values()),
    }
    notes = [
        f"{what}: {record.against(value, 100 * goal)}"
        for (what, value), goal in zip(largest.items(), GOALS.values(), strict=True)
    ]
    for clock in ("wall", "cpu"):
        mine, theirs = (
            sum(each[side][STANDARD][clock] for each in found) for side in ("ours", "reference")
        )
        notes.append(f"standard, {clock} seconds over torch's: {record.against(mine / theirs, 1)}")
        for each in found:
            if art := each["witnesses"].get("ART AutoAttack"):
                ratio = each["ours"][STANDARD][clock] / art[clock]
                notes.append(f"… and over ART's: {record.against(ratio, 1 / 3)}")
    return notes
