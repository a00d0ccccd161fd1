"""How much robust accuracy a study's attack, PGD, leaves that AutoAttack does not: by arm."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.study import report, table, work
from benchmarks.study.plan import Plan, Run
from tscnc_tf import attacks, evaluate_robustness, evaluation, experiments
from tscnc_tf.experiments import locks, stages

PLACE = ("setting", "network", "seed")
ENSEMBLE = "autoattack"


class Network(NamedTuple):
    """One of the networks that are judged.

    Attributes:
        name: in the table.
        arm: of the plan, at its highest sparsity.
        stage: the stage that leaves the network: "train" for the dense one, or "finetune".
    """

    name: str
    arm: str
    stage: str


NETWORKS = (
    Network("dense", "uniform", "train"),
    Network("magnitude", "uniform", "finetune"),
    Network("scores", "scores", "finetune"),
    Network("TSCNC, magnitude", "tscnc", "finetune"),
    Network("gates, magnitude", "gates", "finetune"),
)


def judge(
    plan: Plan,
    settings: Sequence[str],
    seeds: Sequence[int],
    path: pathlib.Path,
    scratch: pathlib.Path,
) -> None:
    """Train the sample of networks, and attack each by the study's PGD and by AutoAttack.

    What stands in the table is not run again; a network that was being judged goes on.

    Args:
        plan: the study.
        settings: in which settings.
        seeds: of which seeds.
        path: the table (CSV).
        scratch: the folder for the experiments, which are left there.

    Raises:
        ValueError: the plan lacks an arm, or its arms are tuned.
        RuntimeError: another process works in `scratch`.
    """
    arms = [network.arm for network in NETWORKS]
    if plan.tuning or not set(arms) <= set(plan.arms):
        raise ValueError(
            f"a plan with the arms {sorted(set(arms))} and without tuning is wanted, got "
            f"{plan.name!r}: take --quick."
        )
    scratch = scratch / "flattery"
    with locks.exclusive(scratch):
        rows = {tuple(row[name] for name in PLACE): row for row in table.read(path)}
        for seed in seeds:
            for setting in settings:
                for network in NETWORKS:
                    place = (setting, network.name, seed)
                    if place not in rows:
                        run = next(
                            run
                            for run in sorted(plan.runs({}), key=lambda run: -run.sparsity)
                            if (run.setting, run.arm, run.seed) == (setting, network.arm, seed)
                        )
                        figures = _judged(run, network, scratch)
                        rows[place] = {**dict(zip(PLACE, place, strict=True)), **figures}
                        table.write(path, (rows[each] for each in sorted(rows)))


def tables(path: pathlib.Path) -> str:
    """Return what is known, as a table in Markdown for each setting."""
    rows = table.read(path)
    parts = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        here = [row for row in rows if row["setting"] == setting]
        parts.append(report.markdown(_HEAD, list(_lines(here))))
    versions = sorted({f"{name} {v}" for row in rows for name, v in row["versions"].items()})
    return "\n\n".join([*parts, f"Made with {', '.join(versions)}."])


_HEAD = ["network", "seeds", "images", "clean", "PGD", "AutoAttack", "PGD − worst case"]


def _lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[str]]:
    rows = list(rows)
    for name in (network.name for network in NETWORKS):
        found = [row for row in rows if row["network"] == name]
        if not found:
            continue
        sums = {
            key: sum(row[key] for row in found)
            for key in ("images", "clean", "pgd", ENSEMBLE, "worst")
        }
        images = sums["images"]
        only = sums["pgd"] - sums["worst"]
        low, high = (100 * end for end in evaluation.wilson_interval(only, images))
        shares = [f"{100 * sums[key] / images:.1f}" for key in ("clean", "pgd", ENSEMBLE)]
        gap = f"{100 * only / images:.1f} ({low:.1f} to {high:.1f})"
        yield [name, str(len(found)), str(images), *shares, gap]


def _judged(run: Run, network: Network, scratch: pathlib.Path) -> dict[str, Any]:
    """Return how many images a network is right on: clean, under PGD, AutoAttack, and both."""
    work.finished(run, scratch)
    folder = work.folder_of(run, scratch)
    number = {"train": 1, "finetune": 3}[network.stage]
    model = experiments.open_stage(folder / f"{number}-{network.stage}").model
    pgd = {str(index): each for index, each in enumerate(stages.test_attacks(run.recipe))}
    x, y = stages.dataset(run.recipe).arrays("test")
    found = evaluate_robustness(
        model,
        x,
        y,
        {**pgd, ENSEMBLE: attacks.AutoAttack(epsilon=stages.epsilon(run.recipe))},
        batch_size=run.recipe.evaluate.batch_size,
        seed=run.seed,
        diagnose=False,
        state_path=folder / f"{network.stage}-state.json",
        progress=False,
    )
    judged = found.attacks[ENSEMBLE]
    by_pgd = found.clean_correct.copy()
    for name in pgd:
        by_pgd &= found.attacks[name].correct
    return {
        "images": len(y),
        "clean": int(found.clean_correct.sum()),
        "pgd": int(by_pgd.sum()),
        ENSEMBLE: int(judged.correct.sum()),
        "worst": int(found.robust_correct.sum()),
        "fooled": {part.name: part.fooled for part in judged.stages},
        "epsilon": stages.epsilon(run.recipe),
        "attacks": [each.name for each in pgd.values()],
        "warnings": list(found.warnings),
        "seconds": found.seconds,
        "versions": dict(found.versions),
    }
