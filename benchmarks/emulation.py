"""LiteRT files on a processor without AVX, emulated by QEMU: their outputs and times."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

EMULATOR = shutil.which("qemu-x86_64")
_SCRIPT = """
import json, sys, time
import numpy as np
from ai_edge_litert.interpreter import Interpreter

rounds, batch_size = map(int, sys.argv[1:3])
found, runs = {}, {}
for path in sys.argv[3:]:
    try:
        interpreter = Interpreter(path, num_threads=1)
        (given,) = interpreter.get_input_details()
        shape = [batch_size, *given["shape"][1:]]
        interpreter.resize_tensor_input(given["index"], shape)
        interpreter.allocate_tensors()
        x = np.random.default_rng(0).random(shape, np.float32)
        interpreter.set_tensor(given["index"], x)
        interpreter.invoke()
    except (RuntimeError, ValueError) as error:
        found[path] = [[], None, str(error)]
        continue
    indices = [output["index"] for output in interpreter.get_output_details()]
    found[path] = [[], [interpreter.get_tensor(index).tolist() for index in indices], ""]
    runs[path] = interpreter.invoke
for _ in range(rounds):
    for path, run in runs.items():
        begin = time.perf_counter()
        run()
        found[path][0].append(time.perf_counter() - begin)
print(json.dumps(found))
"""


class Outcome(NamedTuple):
    """The result of running a file.

    Attributes:
        seconds: the time of one inference on one thread, by round.
        outputs: the outputs for examples drawn from [0, 1) with seed 0; None if it failed.
        error: why it failed; an empty text if it did not.
    """

    seconds: list[float]
    outputs: list[Any] | None
    error: str


def run(paths: Iterable[pathlib.Path], rounds: int = 5, batch_size: int = 1) -> dict[str, Outcome]:
    """Run all files once in each round; return the outcomes by the stems of the files."""
    command = [str(EMULATOR), "-cpu", "Westmere", sys.executable, "-c", _SCRIPT]
    command += [str(rounds), str(batch_size)]
    command += map(str, paths)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {pathlib.Path(path).stem: Outcome(*outcome) for path, outcome in found.items()}
