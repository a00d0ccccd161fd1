"""The command line: `python -m benchmarks [NAME ...]`."""

from __future__ import annotations

import argparse
import importlib
import os
import pathlib

# Before TensorFlow is imported: its start-up messages are not what is wanted here.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from benchmarks import networks, record

BENCHMARKS = (
    *("step", "rivals", "condition", "dense", "masks", "scores"),
    *("litert", "structures", "stablehlo"),
)
# They need what nothing else does, libraries, an emulator or a GPU, or measure no time.
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
    """Run the benchmarks that are named, or all but those of `BY_NAME_ONLY`."""
    known = BENCHMARKS + BY_NAME_ONLY
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--smoke", action="store_true", help="tiny networks; figures mean nothing")
    parser.add_argument("--rounds", type=_positive, help="rounds that are timed")
    parser.add_argument("--batch-size", type=_positive, help="examples a step")
    parser.add_argument("--network", choices=list(networks.NETWORKS))
    parser.add_argument("--ablate", action="store_true", help="step: also without its parts")
    parser.add_argument("--part", help="faults: one kind of them")
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
