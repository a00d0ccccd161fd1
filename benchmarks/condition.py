"""What the condition number constraint costs, as a share of an adversarial training step."""

from __future__ import annotations

import functools
from typing import Any

import tensorflow as tf

import tscnc_tf as tscnc
from benchmarks import measure, networks, parts, record
from tscnc_tf._keras import layers

GOAL = 0.03
BATCH_SIZE = 128
_WHEN = ("before", "after")


def run(options: record.Options) -> None:
    """Measure the term and the pieces of the step; print a table and write `condition.json`."""
    chosen = [options.network] if options.network else ["resnet18", "vgg16", "wrn28_4"]
    if options.smoke and not options.network:
        chosen = ["tiny"]
    batch_size = options.pick("batch_size", BATCH_SIZE, 8)
    sample = min(16, batch_size)
    rounds = options.pick("rounds", 5, 2)
    results = {name: _measure(name, batch_size, sample, options.steps, rounds) for name in chosen}

    smallest = min(results, key=lambda name: results[name]["step_seconds"])
    check = {"network": smallest, **_check(smallest, batch_size, sample, options.steps)}
    path = record.write(
        options,
        "condition",
        {
            "network": chosen,
            "batch_size": batch_size,
            "sample_batch_size": sample,
            "rounds": rounds,
            "networks": results,
            "check": check,
            "goal": GOAL,
            "goal_met": all(result["ratio"] <= GOAL for result in results.values()),
        },
    )
    rows = [
        (
            name,
            f"{result['kernels']}",
            f"{result['parameters']:,}",
            f"{1e3 * result['times']['term'].wall.median:,.1f} ms",
            f"{result['step_seconds']:,.1f} s",
            f"{100 * result['ratio']:.2f} %",
            f"{result['jit_over_plain']:.1f} x",
            f"{100 * result['jit_ratio']:.2f} %",
        )
        for name, result in results.items()
    ]
    columns = ("network", "kernels", "weights in them", "term", "step", "share", "XLA", "share")
    notes = [
        *(
            f"{name}: the term takes {record.against(result['ratio'], GOAL, 4)} of a step"
            for name, result in results.items()
        ),
        "term: value and gradient of ConditionNumber(1e-2), summed over all kernels, in a "
        "tf.function. XLA: the same with jit_compile=True, over the plain one's time; its share is "
        "of the plain step.",
        f"step: TRADES, PGD-{options.steps}, batch {batch_size}, without the term; from its parts, "
        f"measured at batch {sample} in the same rounds and scaled linearly.",
        f"Check: {smallest} scaled over one true step at batch {batch_size} "
        f"({check['true_seconds']['wall']:,.1f} s), its parts measured beside it, in random order: "
        f"{check['scaled_over_true']['wall']:.3f}; by CPU time "
        f"{check['scaled_over_true']['cpu']:.3f}",
    ]
    title = f"The condition number term in a training step, {rounds} rounds"
    record.show(title, columns, rows, notes, path)


def _measure(network: str, batch_size: int, sample: int, steps: int, rounds: int) -> dict[str, Any]:
    kernels = [kernel.variable for kernel in layers.kernels(networks.build(network))]
    term, compiled = _term(kernels, jit_compile=False), _term(kernels, jit_compile=True)
    floor = parts.Floor(network, sample, steps)
    functions: dict[str, Any] = {"term": term, "term, XLA": compiled}
    functions |= {piece: functools.partial(floor.run, piece, 1) for piece in floor.pieces}
    times = measure.interleaved(functions, rounds)

    medians = {name: timing.wall.median for name, timing in times.items()}
    step = _scaled(floor, medians, batch_size / sample)
    return {
        "kernels": len(kernels),
        "parameters": sum(kernel.shape.num_elements() for kernel in kernels),
        "times": times,
        "step_seconds": step,
        "ratio": medians["term"] / step,
        "jit_over_plain": medians["term, XLA"] / medians["term"],
        "jit_ratio": medians["term, XLA"] / step,
    }


def _term(kernels: list[Any], *, jit_compile: bool) -> Any:
    """Return a compiled function that computes the penalty of all kernels and its gradients."""
    penalty = tscnc.regularizers.ConditionNumber(1e-2)

    @tf.function(jit_compile=jit_compile)
    def value_and_gradients() -> tuple[tf.Tensor, list[tf.Tensor]]:
        with tf.GradientTape() as tape:
            value = tf.add_n([penalty(kernel) for kernel in kernels])
        return value, tape.gradient(value, kernels)

    return value_and_gradients


def _scaled(floor: parts.Floor, seconds: dict[str, float], scale: float) -> float:
    """Return the seconds of a step at `scale` times the batch size of its pieces."""
    calls = {
        piece: floor.calls[piece] * (1 if piece == "update" else scale) for piece in floor.calls
    }
    return sum(calls[piece] * seconds[piece] for piece in calls)


def _check(network: str, batch_size: int, sample: int, steps: int) -> dict[str, Any]:
    """Compare a scaled figure with one whole step without any penalty."""
    model = parts.pruned_model(network, regularized=False)
    step = parts.step(parts.trainer(model, steps))
    floor = parts.Floor(network, sample, steps)
    before, after = (
        {f"{piece}, {when}": functools.partial(floor.run, piece, 1) for piece in floor.pieces}
        for when in _WHEN
    )
    whole = functools.partial(step, *parts.batch(model, batch_size))
    functions: dict[str, Any] = {**before, "step": whole, **after}
    # The warm-up uses a single example, as a whole step takes a minute.
    step(*parts.batch(model, 1))
    for piece in floor.pieces:
        floor.run(piece, 1)
    times = measure.interleaved(functions, rounds=1, warm_up=0)
    true = {clock: getattr(times["step"], clock).median for clock in ("wall", "cpu")}
    scaled = {
        clock: _scaled(
            floor,
            {
                piece: sum(getattr(times[f"{piece}, {when}"], clock).median for when in _WHEN) / 2
                for piece in floor.pieces
            },
            batch_size / sample,
        )
        for clock in true
    }
    return {
        "times": times,
        "true_seconds": true,
        "scaled_over_true": {clock: scaled[clock] / true[clock] for clock in true},
    }
