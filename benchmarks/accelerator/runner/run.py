"""Run an arm of training that `benchmarks.accelerator` has exported.

    python prepare.py cifar10.npz DATA
    python run.py ARM --data DATA --minutes 9    # again and again, while it returns 75

Needs this folder, Python, NumPy and JAX (0.4.38 or newer); neither TensorFlow nor tscnc_tf. Writes
to ARM/run, or --output: `checkpoint.npz`, `metrics.jsonl` (one line per epoch), for each stage
`STAGE-best.npz` and `STAGE-last.npz`, and in the end `result.json`. Returns 0 when the arm is
finished, 75 when the time is over and there is more to do.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time

UNFINISHED = 75  # EX_TEMPFAIL of sysexits.h: try again


def main(arguments: list[str] | None = None) -> int:
    """Run an arm until it is finished or the time is over; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arm", type=pathlib.Path, help="a folder of export_stage")
    parser.add_argument("--data", type=pathlib.Path, required=True, help="a folder of prepare.py")
    parser.add_argument("--output", type=pathlib.Path, help="folder for checkpoints and results")
    parser.add_argument(
        "--network", type=pathlib.Path, help="STAGE-best.npz of another arm, to begin with"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="time limit")
    parser.add_argument(
        "--checkpoint-seconds", type=float, default=60.0, help="seconds between two checkpoints"
    )
    parser.add_argument(
        "--reserve-seconds",
        type=float,
        default=60.0,
        help="with less time left, begin nothing that must be compiled",
    )
    parser.add_argument("--cache", type=pathlib.Path, help="folder for compiled programs of JAX")
    parsed = parser.parse_args(arguments)

    begin = time.monotonic()
    import jax  # here, so that --help works without it

    if parsed.cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(parsed.cache))
    from arms import Arm

    arm = Arm(parsed.arm, parsed.data, parsed.output or parsed.arm / "run", parsed.network)
    end = begin + 60 * parsed.minutes
    work(arm, end, parsed.checkpoint_seconds, parsed.reserve_seconds)
    if not arm.done:
        return UNFINISHED
    test = arm.result()["test"]
    print(
        f"Finished: of {test['examples']} test images {test['clean']} are classified correctly, "
        f"{test['attacked']} under {test['attack']['name']}."
    )
    return 0


def work(
    arm,
    end: float,
    checkpoint_seconds: float,
    reserve_seconds: float = 0.0,
    say_seconds: float = 10.0,
) -> None:
    """Do pieces of work, at least one, until the arm is done or the time is over."""
    saved = said = time.monotonic()
    while not arm.done:
        arm.advance()
        now = time.monotonic()
        over = now >= end - (reserve_seconds if arm.compiles_next else 0.0)
        if arm.done or over or now - saved >= checkpoint_seconds:
            arm.save()
            saved = time.monotonic()
        if over or now - said >= say_seconds:
            print(arm.describe(), flush=True)
            said = now
        if over:
            return


if __name__ == "__main__":
    sys.exit(main())
