"""Tests of faults: each must end as if nothing had happened, or with an error that names it.

`python -m benchmarks faults` tests all kinds in some hours on two cores, and
`python -m benchmarks faults --part kills` one kind. It fails if anything is lost.
"""

from __future__ import annotations

import importlib
import sys

from benchmarks import record
from benchmarks.faults.outcome import Outcome

KINDS = ("numbers", "calls", "memory", "strangers", "damage", "disks", "kills", "cluster")


def run(options: record.Options) -> None:
    """Test all kinds of faults, or one; for each, print a table and write `faults_KIND.json`.

    Raises:
        SystemExit: there is no such kind, or a case has ended wrongly.
    """
    if options.part not in (None, *KINDS):
        sys.exit(f"--part must be one of {', '.join(KINDS)}, got {options.part!r}.")
    tried = [_try(kind, options) for kind in (KINDS if options.part is None else [options.part])]
    if any(outcome.lost for outcomes in tried for outcome in outcomes):
        sys.exit(1)


def _try(kind: str, options: record.Options) -> list[Outcome]:
    module = importlib.import_module(f"benchmarks.faults.{kind}")
    outcomes: list[Outcome] = list(module.scenarios(options.smoke))
    path = record.write(options, f"faults_{kind}", {"faults": outcomes})
    rows = [
        (
            each.fault,
            f"{each.tried:,}",
            "; ".join(f"{end}: {count:,}" for end, count in each.ends.items()),
            str(len(each.lost)),
        )
        for each in outcomes
    ]
    lost = [f"lost: {each.fault}: {case}" for each in outcomes for case in each.lost]
    record.show("Faults", ("what went wrong", "tried", "how it ended", "lost"), rows, lost, path)
    return outcomes
