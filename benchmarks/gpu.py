"""A training step on a GPU over its floor, with XLA, and in mixed precision."""

from __future__ import annotations

import functools
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
import tf_keras

from benchmarks import measure, parts, record
from benchmarks.study.report import insert
from tscnc_tf.experiments import stages

DOCUMENT = pathlib.Path(__file__).parents[1] / "docs" / "benchmarks.md"
POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")
GOAL = 1.10


def run(options: record.Options) -> None:
    """Time steps and their floors; print a table and write `gpu.json`.

    Raises:
        SystemExit: TensorFlow sees no GPU.
    """
    gpus = tf.config.list_physical_devices("GPU")
    devices = [each.name for each in gpus]
    if not devices and not options.smoke:
        sys.exit(
            "TensorFlow sees no GPU here: install it with CUDA, as make bench-gpu and pip install "
            "'tscnc_tf[gpu]' do, and check the output of nvidia-smi."
        )
    network = options.pick("network", "resnet18", "tiny")
    size = options.pick("batch_size", 128, 4)
    rounds = options.pick("rounds", 9, 2)
    forms = [(policy, xla) for policy in POLICIES for xla in (False, True)]
    if options.smoke:
        forms = forms[:3]
    floors = {
        xla: parts.Floor(network, size, options.steps, jit_compile=xla) for xla in (False, True)
    }
    functions: dict[str, Any] = {
        _name(*form): _step(options, network, size, *form) for form in forms
    }
    for xla, floor in floors.items():
        functions |= {
            _piece(piece, xla): functools.partial(floor.run, piece) for piece in floor.pieces
        }
    times = measure.interleaved(functions, rounds)
    below = {
        xla: [times[_piece(piece, xla)] for piece in floor.pieces] for xla, floor in floors.items()
    }
    over_floor = {
        _name("float32", xla): measure.ratio([times[_name("float32", xla)]], below[xla])
        for xla in (False, True)
    }
    plain = times[_name("float32", False)]
    speed = {_name(*form): measure.ratio([plain], [times[_name(*form)]]) for form in forms}
    path = record.write(
        options,
        "gpu",
        {
            "gpus": [tf.config.experimental.get_device_details(each) for each in gpus],
            "network": network,
            "batch_size": size,
            "rounds": rounds,
            "attack": f"PGD-{options.steps} linf {parts.EPSILON}",
            "times": times,
            "over_floor": over_floor,
            "speed": speed,
            "goal": GOAL,
        },
    )
    if not options.smoke:
        insert(DOCUMENT, "gpu", table(json.loads(path.read_text(encoding="utf-8"))))
    rows = [(name, *record.milliseconds(timing)) for name, timing in times.items()]
    notes = [
        *(
            f"{name} over its floor: {record.against(ratio.of_medians, GOAL)}; "
            f"{record.spread(ratio)}"
            for name, ratio in over_floor.items()
        ),
        *(
            f"{name}: {ratio.of_medians:.2f} times as fast as float32 without XLA"
            for name, ratio in speed.items()
        ),
    ]
    title = f"A training step on {', '.join(devices) or 'no GPU'}: {network}, batch {size}"
    record.show(title, record.COLUMNS, rows, notes, path)


def table(found: Mapping[str, Any]) -> str:
    """Return what `gpu.json` holds as the table of `docs/benchmarks.md`, in Markdown."""
    devices = ", ".join(each.get("device_name", "GPU") for each in found["gpus"])
    over_floor = found["over_floor"]
    rows = ["| step | over its floor (goal: at most 1.1) | speed over float32 without XLA |"]
    rows += ["|---|---|---|"]
    for name, speed in found["speed"].items():
        ratio = f"{over_floor[name]['of_medians']:.2f}" if name in over_floor else "–"
        rows.append(f"| {name.removeprefix('step, ')} | {ratio} | {speed['of_medians']:.2f} |")
    title = f"On {devices}, {found['network']}, batch {found['batch_size']}, {found['attack']}:"
    return "\n".join([title, "", *rows])


def _name(policy: str, xla: bool) -> str:
    return f"step, {policy}{', XLA' if xla else ''}"


def _piece(piece: str, xla: bool) -> str:
    return f"floor{', XLA' if xla else ''}: {piece}"


def _step(options: record.Options, network: str, size: int, policy: str, xla: bool) -> Any:
    with stages.precision(tf_keras, policy):
        model = parts.pruned_model(network)
        step = parts.step(parts.trainer(model, options.steps), jit_compile=xla)
    return functools.partial(step, *parts.batch(model, size))
