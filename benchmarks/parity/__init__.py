"""AutoAttack of the package and of torch on the same networks and examples.

Needs the extra `parity`: torch, torchattacks, foolbox and ART. Results are kept in
`outputs/parity`, so that each attack runs once per network.
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
from tscnc_tf import _files, _reports

# Upper bounds: of |ours - reference| in the robust accuracy of "standard"; of ours - reference for
# each attack; and of the share of examples that a witness breaks and our "standard" does not.
GOALS = {"standard": 0.002, "single": 0.005, "witness": 0.001}
STANDARD = "standard"
NORMS = ("linf", "l2")  # torchattacks has no APGD in l1
RESTARTS = 10  # of the targeted APGD on the examples that a witness breaks and "standard" does not
TIMED = ("adversarial", "linf")  # network and norm for the comparison of times
FOLDER = pathlib.Path("outputs/parity")
ATTACKS = pathlib.Path(tscnc.attacks.__file__).parent
_LIBRARIES = ("torch", "torchattacks", "foolbox", "adversarial-robustness-toolbox")


@dataclasses.dataclass(frozen=True)
class Run:
    """The result of an attack.

    Attributes:
        correct: for each example, whether the attacked network is correct; with noise, how often.
        wall, cpu: seconds of the attack.
    """

    correct: np.ndarray
    wall: float
    cpu: float

    @classmethod
    def of(cls, function: Callable[[], np.ndarray]) -> Run:
        """Return the result of a function, and its times."""
        wall, cpu = time.perf_counter(), time.process_time()
        correct = np.asarray(function())
        return cls(correct, time.perf_counter() - wall, time.process_time() - cpu)

    @classmethod
    def kept(cls, path: pathlib.Path, function: Callable[[], np.ndarray]) -> Run:
        """Return a run from a file; if there is none, call the function and write the file."""
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            result = dataclasses.asdict(cls.of(function))
            with _files.replaced(path) as draft, draft.open("wb") as stream:
                np.savez(stream, **result)
        with np.load(path) as found:
            return cls(found["correct"], float(found["wall"]), float(found["cpu"]))

    @property
    def accuracy(self) -> float:
        """The robust accuracy."""
        return float(np.mean(self.correct))

    def figures(self) -> dict[str, float]:
        """Return the accuracy and the seconds."""
        return {"accuracy": self.accuracy, "wall": self.wall, "cpu": self.cpu}


def run(options: record.Options) -> None:
    """Run both sides on all networks; print a table and write `parity.json`."""
    smoke = options.smoke
    names = ["standard", "adversarial"] if smoke else list(networks.NETWORKS)
    training, data = networks.examples(128 if smoke else 1000)
    budget = Budget(50, 300, 50) if smoke else Budget()
    folder = options.output / "parity" if smoke else FOLDER
    found = []
    for name in names:
        model = networks.trained(name, training, 15 if smoke else 60, folder)
        for norm in NORMS:
            timed = not smoke and (name, norm) == TIMED
            compared = compare(model, data, norm, budget, folder, timed=timed)
            found.append({"network": name, "norm": norm, **compared})
            print(_line(found[-1]), flush=True)
    path = record.write(
        options,
        "parity",
        {
            "examples": len(data.x),
            "epsilons": {norm: EPSILONS[norm] for norm in NORMS},
            "budget": budget._asdict(),
            "references": _reports.versions(*_LIBRARIES),
            "networks": found,
            "goals": GOALS,
            "goals_met": {goal: all(each["goals_met"][goal] for each in found) for goal in GOALS},
        },
    )
    columns = ("network", "norm", "attack", "ours", "reference", "difference", "CPU", "CPU of it")
    record.show("Parity", columns, _rows(found), _notes(found), path)


def ours(model: Any, data: Examples, norm: str, budget: Budget) -> dict[str, reference.Judged]:
    """Return the attacks of the package by the names of `reference.references`."""
    ball = {"epsilon": EPSILONS[norm], "norm": norm}
    attacks = {
        "apgd-ce": tscnc.attacks.APGD(loss="ce", steps=budget.steps, **ball),
        "apgd-t": tscnc.attacks.APGD(loss="targeted_dlr", steps=budget.steps, **ball),
        "fab-t": tscnc.attacks.FAB(steps=budget.steps, **ball),
        "square": tscnc.attacks.Square(queries=budget.queries, **ball),
        STANDARD: tscnc.attacks.AutoAttack(**ball),
    }
    return {
        name: functools.partial(reference.judge, attack, model, data)
        for name, attack in attacks.items()
    }


def compare(
    model: Any, data: Examples, norm: str, budget: Budget, folder: pathlib.Path, *, timed: bool
) -> dict[str, Any]:
    """Return the results of both sides and the witnesses on one network, and which goals are met.

    With `timed`, the reference's "standard" and ART's AutoAttack are run, too.
    """
    setting = (model, data, norm, budget)
    theirs = _runs(reference.references(*setting, timed=timed), folder / digest(*setting))
    seen = _runs(reference.witnesses(*setting, timed=timed), folder / digest(*setting))
    code = [path.read_text() for path in sorted(ATTACKS.glob("*.py"))]
    mine = _runs(ours(*setting), folder / digest(*setting, code))
    if STANDARD in theirs:
        left = theirs[STANDARD].correct
    else:
        left = np.logical_and.reduce([each.correct for each in theirs.values()])
    accuracy = {name: each.accuracy for name, each in theirs.items()}
    accuracy[STANDARD] = float(np.mean(left))
    difference = {name: each.accuracy - accuracy[name] for name, each in mine.items()}
    seen_by_all = np.logical_and.reduce([each.correct for each in seen.values()])
    broken, theirs_broken = (
        {name: float(np.mean(robust & ~each.correct)) for name, each in seen.items()}
        for robust in (mine[STANDARD].correct, left)
    )
    goals = {name: goal + 1e-9 for name, goal in GOALS.items()}  # tolerance of rounding
    return {
        "clean": float(np.mean(np.argmax(model(data.x, training=False), axis=1) == data.y)),
        "ours": {name: each.figures() for name, each in mine.items()},
        "reference": {STANDARD: {"accuracy": accuracy[STANDARD]}}
        | {name: each.figures() for name, each in theirs.items()},
        "witnesses": {
            name: {
                **each.figures(),
                "broken": broken[name],
                "broken_of_reference": theirs_broken[name],
            }
            for name, each in seen.items()
        },
        "missed": _again(model, data, norm, mine[STANDARD].correct & ~seen_by_all),
        "difference": difference,
        "goals_met": {
            "standard": abs(difference[STANDARD]) <= goals["standard"],
            "single": all(value <= goals["single"] for value in difference.values()),
            "witness": all(value <= goals["witness"] for value in broken.values()),
        },
    }


def _again(model: Any, data: Examples, norm: str, missed: np.ndarray) -> dict[str, int]:
    """Return how many examples "standard" missed, and how many are robust with `RESTARTS`, too."""
    attack = tscnc.attacks.APGD(
        loss="targeted_dlr", epsilon=EPSILONS[norm], norm=norm, restarts=RESTARTS
    )
    some = Examples(data.x[missed], data.y[missed])
    robust = reference.judge(attack, model, some) if np.any(missed) else missed[missed]
    return {"examples": len(some.x), "robust_with_restarts": int(np.sum(robust))}


def _runs(functions: dict[str, reference.Judged], folder: pathlib.Path) -> dict[str, Run]:
    return {name: Run.kept(folder / f"{name}.npz", each) for name, each in functions.items()}


def digest(model: Any, data: Examples, *settings: Any) -> str:
    """Return the name of the folder for runs with a model, examples and settings: a hash."""
    made = hashlib.sha256(repr((EPSILONS, settings)).encode())
    for array in (*model.get_weights(), *data):
        made.update(np.ascontiguousarray(array).tobytes())
    return made.hexdigest()[:16]


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
            f"{mine['cpu']:.0f} s",
            f"{each['reference'][name]['cpu']:.0f} s" if "cpu" in each["reference"][name] else "–",
        )
        for each in found
        for name, mine in each["ours"].items()
    ]


def _notes(found: list[dict[str, Any]]) -> list[str]:
    largest = {
        "standard, |ours - reference|": max(abs(each["difference"][STANDARD]) for each in found),
        "any attack, ours - reference": max(max(each["difference"].values()) for each in found),
        "broken by a witness, and not by ours": max(
            witness["broken"] for each in found for witness in each["witnesses"].values()
        ),
    }
    notes = [
        f"{what}, points: {record.against(round(100 * value, 9), 100 * goal, 2)}"
        for (what, value), goal in zip(largest.items(), GOALS.values(), strict=True)
    ]
    for each in found:
        art = each["witnesses"].get("ART AutoAttack")
        for clock in ("wall", "cpu") if art else ():
            mine = each["ours"][STANDARD][clock]
            torch = record.against(mine / each["reference"][STANDARD][clock], 1)
            notes.append(f"standard, {clock} seconds over those in torch: {torch}")
            notes.append(f"… over ART's AutoAttack: {record.against(mine / art[clock], 1 / 3)}")
    return notes
