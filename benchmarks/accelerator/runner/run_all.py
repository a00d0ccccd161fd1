"""Run all arms of a folder, one after the other, in slices.

    python run_all.py FOLDER --minutes 9    # again and again, while it returns 75

An arm is a folder with a `needs.json`, which names a folder of data beside it, and possibly another
arm beside it, whose network it begins with, and which is run first. Finished arms are not run
again. An arm that diverges leaves `run/failed.json`, and the arms that begin with its network are
skipped. Returns 0 when all arms are finished, 75 when the time is over and there is more to do, and
1 when there is nothing more to do, but some arms have failed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time

import progress
import run


def main(arguments: list[str] | None = None) -> int:
    """Run arms until all are finished or the time is over; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="time limit")
    parsed = parser.parse_args(arguments)
    begin = time.monotonic()
    failed = []
    for arm in ordered(parsed.folder):
        needs = json.loads((arm / "needs.json").read_text())
        dense = arm.parent / needs["from"] if needs["from"] else None
        if any(has_failed(each) for each in (arm, dense) if each):
            failed.append(str(arm.relative_to(parsed.folder)))
            continue
        if (arm / "run" / "result.json").exists():
            continue
        left = parsed.minutes - (time.monotonic() - begin) / 60
        if left <= 0:
            return run.UNFINISHED
        print(f"{arm.relative_to(parsed.folder)}:", flush=True)
        options = ["--data", str(arm.parent / needs["data"]), "--minutes", str(left)]
        options += ["--cache", str(parsed.folder / "cache")]
        if dense:
            options += ["--network", str(dense / "run" / needs["file"])]
        try:
            if run.main([str(arm), *options]) != 0:
                return run.UNFINISHED
        except FloatingPointError as error:
            progress.write_text(arm / "run" / "failed.json", json.dumps({"error": str(error)}))
            failed.append(str(arm.relative_to(parsed.folder)))
    if failed:
        print(f"Failed, or need a network that failed: {', '.join(failed)}.", file=sys.stderr)
        return 1
    return 0


def has_failed(arm: pathlib.Path) -> bool:
    """Tell whether an arm has diverged before; remove `run/failed.json` to run it again."""
    return (arm / "run" / "failed.json").exists()


def ordered(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the arms in their order, each after the arm whose network it begins with."""
    paths = folder.glob("*/*/needs.json")
    needs = {path.parent: json.loads(path.read_text()) for path in paths}
    arms: dict[pathlib.Path, None] = {}
    for arm in sorted(needs, key=lambda arm: (needs[arm]["order"], str(arm))):
        if needs[arm]["from"]:
            arms[arm.parent / needs[arm]["from"]] = None
        arms[arm] = None
    return list(arms)


if __name__ == "__main__":
    sys.exit(main())
