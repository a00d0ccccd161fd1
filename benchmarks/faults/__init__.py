"""What goes wrong outside of the code, tried: what ends well, what is said, and what is lost.

`python -m benchmarks faults` tries all of it, in about an hour on two cores, and
`python -m benchmarks faults --part kills` one kind; it fails if anything is lost.
"""

from __future__ import annotations

import importlib
import sys

from benchmarks import record
from benchmarks.faults.outcome import Outcome

KINDS = ("numbers", "calls", "memory", "damage", "disks", "kills", "cluster")


def run(options: record.Options) -> None:
    """Try all kinds of faults, or one; of each, print a table and write `faults_KIND.json`.

    Raises:
        SystemExit: there is no such kind; or something was lost, or not said.
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
