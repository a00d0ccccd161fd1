"""What masks, their updates, regrowth and tfmot's wrappers cost in a training step."""

from __future__ import annotations

import functools
from typing import Any

import tensorflow as tf

import tscnc_tf as tscnc
from benchmarks import measure, networks, parts, record
from tscnc_tf._keras import wrappers

GOAL = 0.05
REGROWTH_GOAL = 0.02

_LABELS = {
    "train": "a training pass: forward and backward",
    "update": "the optimizer's update",
    "masks": "masks, not updated: the constraints of the weights, and a pruner's step",
    "renewal, layer": "… that updates them, layer by layer",
    "renewal, global": "… that updates them, over the whole network",
    "regrowth": "masks, not updated, with regrowth, but not in this step",
    "move": "… with regrowth in this step",
    "tfmot": "tfmot's wrappers: masks applied after a step",
}


def run(options: record.Options) -> None:
    """Time the pruner beside a plain training step; print a table and write `masks.json`."""
    network = options.pick("network", "resnet18", "tiny")
    size = options.pick("batch_size", 16, 4)
    rounds = options.pick("rounds", 9, 2)

    floor = parts.Floor(network, size // 2, 1)
    functions: dict[str, Any] = {
        piece: functools.partial(floor.run, piece) for piece in ("train", "update")
    }
    functions |= {
        "masks": _pruner(network, "layer", updates_masks=False),
        "renewal, layer": _pruner(network, "layer", updates_masks=True),
        "renewal, global": _pruner(network, "global", updates_masks=True),
        "regrowth": _pruner(network, "layer", updates_masks=False, regrowth=_regrowth(moves=False)),
        "move": _pruner(network, "layer", updates_masks=False, regrowth=_regrowth(moves=True)),
        "tfmot": _wrapped(network),
    }
    times = measure.interleaved(functions, rounds)

    below = [times["train"], times["update"]]
    ratios = {
        name: measure.ratios([times[name]], below)
        for name in functions
        if name not in ("train", "update")
    }
    share = ratios["masks"]["wall"]
    # Mean over training: one step in `every` lets weights change places.
    every = tscnc.pruning.Regrowth().frequency
    median = {name: timing.wall.median for name, timing in times.items()}
    more = median["regrowth"] - median["masks"] + (median["move"] - median["regrowth"]) / every
    regrowth = more / (median["train"] + median["update"] + median["masks"])
    path = record.write(
        options,
        "masks",
        {
            "network": network,
            "batch_size": size,
            "rounds": rounds,
            "weights": networks.build(network).count_params(),
            "times": times,
            "ratios": ratios,
            "goal": GOAL,
            "goal_met": share.of_medians <= GOAL,
            "regrowth": regrowth,
            "regrowth_goal": REGROWTH_GOAL,
            "regrowth_goal_met": regrowth <= REGROWTH_GOAL,
        },
    )
    rows = [(_LABELS[name], *record.milliseconds(timing)) for name, timing in times.items()]
    notes = [
        f"A pruner's step over a plain training step, of medians: "
        f"{record.against(share.of_medians, GOAL)}; {record.spread(share)}",
        *(
            f"{_LABELS[name].strip('… ')}, over the same: {value['wall'].of_medians:.3f}; by CPU "
            f"time {value['cpu'].of_medians:.3f}"
            for name, value in ratios.items()
            if name != "masks"
        ),
        f"What regrowth adds to training, in which every {every}th step regrows: "
        f"{record.against(regrowth, REGROWTH_GOAL)}",
        f"By CPU time the first is {ratios['masks']['cpu'].of_medians:.3f}.",
        "A plain training step: no attack. With PGD-10 a step is about six times as long.",
    ]
    title = f"Masks beside a training step: {network}, batch {size}, {rounds} rounds"
    record.show(title, record.COLUMNS, rows, notes, path)


def _regrowth(*, moves: bool) -> Any:
    """Return a regrowth that acts in each step, or in no step that is timed."""
    return tscnc.pruning.Regrowth(frequency=1 if moves else 10**6, until=1.0, steps=10**6 + 1)


def _pruner(network: str, scope: str, *, updates_masks: bool, regrowth: Any = None) -> Any:
    """Return a compiled function of what masks add to a step of SGD with momenta, at 90 % zeros."""
    model = networks.build(network)
    optimizer = parts.optimizer()
    optimizer.build(model.trainable_variables)

    def schedule(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.equal(step, 1) | updates_masks, tf.constant(0.9)

    pruner = tscnc.pruning.Pruner(model, schedule, scope=scope, min_weights=64, regrowth=regrowth)
    targets = [target.variable for target in pruner.targets]
    gradients = [tf.random.stateless_normal(weight.shape, (0, 1)) for weight in targets]

    def update(_: Any = None) -> None:
        optimizer.iterations.assign_add(1)
        for weight in model.trainable_variables:  # as optimizers do after each update
            if weight.constraint is not None:
                weight.assign(weight.constraint(weight))

    @tf.function
    def step() -> None:
        if regrowth is None:
            update()
        else:  # calls what intercepts the optimizer's step; that step itself is not timed
            pruner._on_step(optimizer, list(zip(gradients, targets, strict=True)), update)
        pruner.step(optimizer, is_constrained=True)

    step()  # the first step always updates the masks
    return step


def _wrapped(network: str) -> Any:
    """Return a compiled function that applies the masks of tfmot's wrappers to the weights."""
    schedule = tscnc.schedules.OneShot(0.9)
    model = tscnc.prune(networks.build(network), schedule, engine="tfmot")
    return tf.function(lambda: wrappers.apply_masks(model))
