"""A training step on a GPU over its floor, with XLA, and in mixed precision; and on two devices."""

from __future__ import annotations

import functools
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
import tf_keras

from benchmarks import measure, parts, record, two_devices
from benchmarks.study.report import insert
from tscnc_tf.experiments import stages

DOCUMENT = pathlib.Path(__file__).parents[1] / "docs" / "benchmarks.md"
POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")
FORMS = tuple((policy, xla) for policy in POLICIES for xla in (False, True))
GOAL = 1.10


def run(options: record.Options) -> None:
    """Time steps and their floors; print a table, and write `gpu.json` and a table in the docs.

    Both are written after each form of the step. An error in a form is written, too, and the other
    forms are timed.

    Raises:
        SystemExit: TensorFlow sees no GPU; or forms have failed.
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
    found: dict[str, Any] = {
        "gpus": [tf.config.experimental.get_device_details(each) for each in gpus],
        "network": network,
        "batch_size": size,
        "rounds": rounds,
        "attack": f"PGD-{options.steps} linf {parts.EPSILON}",
        "goal": GOAL,
        # First, while this process uses no memory of the GPU.
        "two_devices": two_devices.tried(),
        **{name: {} for name in ("times", "over_floor", "speed", "errors")},
    }
    path = _save(options, found)
    plain = functools.cache(lambda: _step(options, network, size, *FORMS[0]))
    for form in FORMS:
        try:
            _measure(found, form, options, plain)
        except Exception as error:
            found["errors"][_name(*form)] = f"{type(error).__name__}: {error}"
        _save(options, found)
    _show(found, f"A training step on {', '.join(devices) or 'no GPU'}", path)
    if found["errors"]:
        sys.exit(f"Forms of the step have failed: {', '.join(found['errors'])}.")


def _save(options: record.Options, found: dict[str, Any]) -> pathlib.Path:
    path = record.write(options, "gpu", found)
    if not options.smoke:
        insert(DOCUMENT, "gpu", table(json.loads(path.read_text(encoding="utf-8"))))
    return path


def _measure(
    found: dict[str, Any], form: tuple[str, bool], options: record.Options, plain: Any
) -> None:
    """Time a form of the step beside the first form, in float32 also beside its floor."""
    (policy, xla), name, first = form, _name(*form), _name(*FORMS[0])
    network, size = found["network"], found["batch_size"]
    functions = {first: plain()}
    if name != first:
        functions[name] = _step(options, network, size, policy, xla)
    pieces = {}
    if policy == "float32":
        floor = parts.Floor(network, size, options.steps, jit_compile=xla)
        pieces = {_piece(piece, xla): functools.partial(floor.run, piece) for piece in floor.pieces}
    times = measure.interleaved(functions | pieces, found["rounds"])
    found["times"] |= {each: timing for each, timing in times.items() if each in (name, *pieces)}
    found["speed"][name] = measure.ratio([times[first]], [times[name]])
    if pieces:
        below = [times[piece] for piece in pieces]
        found["over_floor"][name] = measure.ratio([times[name]], below)


def _show(found: Mapping[str, Any], title: str, path: pathlib.Path) -> None:
    rows = [(name, *record.milliseconds(timing)) for name, timing in found["times"].items()]
    notes = [
        *(
            f"{name} over its floor: {record.against(ratio.of_medians, GOAL)}; "
            f"{record.spread(ratio)}"
            for name, ratio in found["over_floor"].items()
        ),
        *(
            f"{name}: {ratio.of_medians:.2f} times as fast as float32 without XLA"
            for name, ratio in found["speed"].items()
        ),
        *(f"{name}: {error}" for name, error in found["errors"].items()),
        *(
            f"Trained on two logical devices, {form}: {result['outcome']}"
            for form, result in found["two_devices"].items()
        ),
    ]
    title = f"{title}: {found['network']}, batch {found['batch_size']}"
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
    rows += [f"| {name.removeprefix('step, ')} | failed | – |" for name in found["errors"]]
    rows += ["", "| training with masks on two logical devices of one GPU | |", "|---|---|"]
    for form, result in found["two_devices"].items():
        rows.append(f"| {form} | {result['outcome'].replace('|', ' ')} |")
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
