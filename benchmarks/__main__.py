"""The command line: `python -m benchmarks [NAME ...]`."""

from __future__ import annotations

import argparse
import importlib
import os
import pathlib

# Hides TensorFlow's start-up messages, so it must precede the import.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from benchmarks import networks, record

BENCHMARKS = (
    *("step", "rivals", "condition", "dense", "masks", "scores"),
    *("litert", "structures", "stablehlo"),
)
# They need more (libraries, an emulator, a GPU), or measure something other than time.
BY_NAME_ONLY = (
    "faults",
    "gpu",
    "memory",
    "parity",
    "parity_authors",
    "pointwise",
    "runtimes",
    "streaming",
)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmarks that are named; without names, those of `BENCHMARKS`."""
    known = BENCHMARKS + BY_NAME_ONLY
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(known)}")
    parser.add_argument("--smoke", action="store_true", help="tiny networks, to check that all run")
    parser.add_argument("--rounds", type=_positive, help="number of timed rounds")
    parser.add_argument("--batch-size", type=_positive, help="examples per step")
    parser.add_argument("--network", choices=list(networks.NETWORKS))
    parser.add_argument("--ablate", action="store_true", help="step: also without its parts")
    parser.add_argument("--part", help="faults: the only kind to run")
    parser.add_argument(
        "--output", type=pathlib.Path, default=record.Options.output, help="folder for the results"
    )
    parsed = parser.parse_args(arguments)
    for name in parsed.names:
        if name not in known:
            parser.error(f"no benchmark {name!r}: choose from {', '.join(known)}")
    for name in parsed.names or BENCHMARKS:
        importlib.import_module(f"benchmarks.{name}").run(record.Options.of(parsed))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


if __name__ == "__main__":
    main()
