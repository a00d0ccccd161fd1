"""AutoAttack of the package and of its authors: all attacks, versions and norms, several seeds.

Needs torch and pyautoattack, a package of the authors' code. Results are kept in `outputs/parity`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

import tscnc_tf as tscnc
from benchmarks import parity, record
from benchmarks.parity import networks, reference
from benchmarks.parity.networks import EPSILONS, Examples
from tscnc_tf import _reports

NETWORK = "pruned 99 %"  # on which the two differ most
# The norms of each version. In l1 the authors define "standard" only; "rand" attacks the network
# with noise at its inputs.
VERSIONS = {"standard": ("linf", "l2", "l1"), "plus": ("linf", "l2"), "rand": ("linf",)}
SEEDS = {"standard": (0, 1, 2), "plus": (0,), "rand": (0, 1, 2)}  # by version
NOISE, CALLS = 0.05, 20  # standard deviation of the noise; evaluations of each result under it
SINGLES = ("apgd-ce", "apgd-dlr", "fab", "apgd-t", "fab-t", "square")
GOALS = {"version": 0.002, "single": 0.005}

Attacks = dict[str, Callable[[], np.ndarray]]


def run(options: record.Options) -> None:
    """Run both sides; write `parity_authors.json` after each version and norm."""
    smoke = options.smoke
    training, data = networks.examples(64 if smoke else 1000)
    folder = options.output / "parity" if smoke else parity.FOLDER
    model = networks.trained(NETWORK, training, 15 if smoke else 60, folder)
    logging.getLogger("auto-attack").setLevel(logging.ERROR)  # hides warnings about gradients
    code = [path.read_text() for path in sorted(parity.ATTACKS.glob("*.py"))]
    left: dict[str, tuple[dict[str, np.ndarray], ...]] = {norm: ({}, {}) for norm in EPSILONS}
    for version, norms in VERSIONS.items():
        for norm in norms[:1] if smoke else norms:
            sides = (
                (ours(model, data, norm), parity.digest(model, data, norm, code)),
                (authors(model, data, norm), parity.digest(model, data, norm, "authors")),
            )
            for known, (functions, kept_in) in zip(left[norm], sides, strict=True):
                for name, function in functions.items():
                    if _belongs(name, version):
                        kept = parity.Run.kept(folder / kept_in / f"{name}.npz", function)
                        print(f"{norm}, {name}: {kept.accuracy:.4f}, {kept.cpu:.0f} s", flush=True)
                        known[name] = kept.correct
            found = {norm: _compared(*sides) for norm, sides in left.items() if sides[0]}
            path = record.write(
                options,
                "parity_authors",
                {
                    "network": NETWORK,
                    "examples": len(data.x),
                    "epsilons": EPSILONS,
                    "noise": NOISE,
                    "references": _reports.versions("torch", "pyautoattack"),
                    "goals": GOALS,
                    "norms": found,
                },
            )
    rows = [
        (norm, name, *_cells(figures))
        for norm, by_name in found.items()
        for name, figures in by_name.items()
    ]
    columns = ("norm", "attack", "ours", "authors'", "to the edges", "difference", "to the edges")
    notes = ["To the edges: the authors' code with windows of Square that reach them."]
    record.show(f"AutoAttack beside the authors' code, {NETWORK}", columns, rows, notes, path)


def _belongs(name: str, version: str) -> bool:
    """Tell whether a run belongs to a version; single attacks belong to "standard"."""
    others = [other for other in VERSIONS if other != "standard"]
    return next((other for other in others if name.startswith(other)), "standard") == version


def ours(model: Any, data: Examples, norm: str) -> Attacks:
    """Return functions by name that return the share of correct calls of each example.

    "rand reset" is "rand" with the clean examples in place of those that withstand another call,
    which is what the authors' code returns.
    """
    ball: dict[str, Any] = {"epsilon": EPSILONS[norm], "norm": norm}
    ce, targeted, fab, square = tscnc.attacks.AutoAttack(**ball).attacks
    dlr = dataclasses.replace(ce, loss="dlr")
    nearest = dataclasses.replace(fab, target_classes=None)
    network = functools.partial(model, training=False)

    def judged(
        attack: Any, seed: int = 0, *, noise: bool = False, reset: bool = False
    ) -> np.ndarray:
        tf.random.set_seed(seed)

        def noisy(x: tf.Tensor) -> tf.Tensor:
            return network(x + NOISE * tf.random.normal(tf.shape(x)))

        attacked = tf.function(noisy) if noise else model
        adversarial = np.asarray(attack(attacked, data.x, data.y, seed=seed))
        reference.require_ball(adversarial, data, norm)
        if reset:
            withstand = np.argmax(attacked(adversarial), axis=1) == data.y
            adversarial = np.where(withstand[:, None, None, None], data.x, adversarial)
        calls = [attacked(adversarial) for _ in range(CALLS)] if noise else [network(adversarial)]
        return np.mean([np.argmax(logits, axis=1) == data.y for logits in calls], axis=0)

    singles = zip(SINGLES, (ce, dlr, nearest, targeted, fab, square), strict=True)
    found: Attacks = {name: functools.partial(judged, each) for name, each in singles}
    for version, norms in VERSIONS.items():
        if norm in norms:
            attack = tscnc.attacks.AutoAttack(version=version, **ball)
            for seed in SEEDS[version]:
                of_seed = functools.partial(judged, attack, seed, noise=version == "rand")
                found[f"{version}, seed {seed}"] = of_seed
                if version == "rand":
                    found[f"rand reset, seed {seed}"] = functools.partial(of_seed, reset=True)
    return found


def authors(model: Any, data: Examples, norm: str) -> Attacks:
    """Return the same as `ours` for the authors' attacks.

    Names that end in "to the edges" are those of attacks with `reach_the_edges`.
    """
    import pyautoattack
    import torch

    network = reference.equal_network(model, data)
    x, y = reference.torch_images(data.x), torch.tensor(data.y.astype("int64"))

    class Noisy(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return network(x + NOISE * torch.randn_like(x))

    def judged(
        names: Sequence[str] | None = None,
        *,
        version: str = "standard",
        seed: int = 0,
        among: np.ndarray | None = None,
        to_the_edges: bool = False,
    ) -> np.ndarray:
        """Run the attacks `names`, or all of the version, on the examples that `among` selects."""
        if among is not None and not np.any(among):
            return np.zeros(len(x))
        attacked = Noisy() if version == "rand" else network
        attack = pyautoattack.AutoAttack(
            attacked, norm=reference.NORMS[norm], eps=EPSILONS[norm], seed=seed, version=version
        )
        attack.attacks_to_run = names or attack.attacks_to_run
        if to_the_edges:
            reach_the_edges(attack)
        rows = torch.arange(len(x)) if among is None else torch.tensor(np.flatnonzero(among))
        adversarial = x.clone()
        found, _ = attack.run_standard_evaluation(x[rows], y[rows], batch_size=len(x))
        adversarial[rows] = found
        reference.require_ball(np.moveaxis(adversarial.numpy(), 1, -1), data, norm)
        with torch.no_grad():
            calls = [attacked(adversarial) for _ in range(CALLS if version == "rand" else 1)]
        right = np.mean([(logits.argmax(1) == y).numpy() for logits in calls], axis=0)
        return right if among is None else right * among

    @functools.cache
    def before_square(seed: int) -> np.ndarray:
        return judged(["apgd-ce", "apgd-t", "fab-t"], seed=seed)

    def standard(seed: int, *, to_the_edges: bool = False) -> np.ndarray:
        options = {"seed": seed, "among": before_square(seed), "to_the_edges": to_the_edges}
        return judged(["square"], **options)

    found: Attacks = {name: functools.partial(judged, [name]) for name in SINGLES}
    found["square to the edges"] = functools.partial(judged, ["square"], to_the_edges=True)
    for seed in SEEDS["standard"]:
        found[f"standard, seed {seed}"] = functools.partial(standard, seed)
        edges = functools.partial(standard, seed, to_the_edges=True)
        found[f"standard, seed {seed} to the edges"] = edges
    for version in ("plus", "rand"):
        for seed in SEEDS[version]:
            found[f"{version}, seed {seed}"] = functools.partial(judged, version=version, seed=seed)
    return found


def reach_the_edges(attack: Any) -> None:
    """Make the authors' Square draw all places of a window, as algorithms 1 to 3 of the paper do.

    For a window of side s in an image of h rows, their code draws from 0 to h - s - 1. So it never
    touches the last row and the last column. The paper, and this package, draw from 0 to h - s. On
    images of 8x8 that makes a large difference.
    """
    draw = attack.square.random_int
    attack.square.random_int = lambda low, high: draw(low, high + 1)


def _compared(
    mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Return by name the accuracies of each side, one per seed, and the differences of means."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(key.partition(",")[0] for key in mine):
        sides = {
            "ours": _accuracies(mine, name, ""),
            "authors": _accuracies(theirs, name.removesuffix(" reset"), ""),
            "to_the_edges": _accuracies(theirs, name, " to the edges"),
        }
        sides = {side: values for side, values in sides.items() if values}
        means = {side: float(np.mean(values)) for side, values in sides.items()}
        difference = {side: means["ours"] - mean for side, mean in means.items() if side != "ours"}
        met = {
            side: value <= GOALS["single"] + 1e-9
            if name in SINGLES
            else abs(value) <= GOALS["version"] + 1e-9
            for side, value in difference.items()
        }
        found[name] = {**sides, "difference": difference, "goal_met": met}
    return found


def _accuracies(left: dict[str, np.ndarray], name: str, ending: str) -> list[float]:
    seeds = SEEDS.get(name.partition(" ")[0], ())
    names = {f"{name}{ending}", *(f"{name}, seed {seed}{ending}" for seed in seeds)}
    return [float(np.mean(each)) for key, each in left.items() if key in names]


def _cells(figures: dict[str, Any]) -> list[str]:
    cells = [
        ", ".join(map(_reports.percent, figures.get(side, []))) or "–"
        for side in ("ours", "authors", "to_the_edges")
    ]
    differences = (figures["difference"].get(side) for side in ("authors", "to_the_edges"))
    return cells + ["–" if each is None else f"{100 * each:+.2f} points" for each in differences]
