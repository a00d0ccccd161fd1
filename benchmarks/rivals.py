"""The training step compared with one written by hand with cleverhans and tfmot."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from cleverhans.tf2.attacks.projected_gradient_descent import projected_gradient_descent

from benchmarks import measure, parts, record
from tscnc_tf import _checks

_KINDS = {
    "ours": "AdversarialTraining, as fit compiles it",
    "eager": "cleverhans and tfmot, eager",
    "function": "cleverhans and tfmot, in a tf.function",
}


def run(options: record.Options) -> None:
    """Time all three with TRADES and with Madry; print a table and write `rivals.json`."""
    network = options.pick("network", "resnet20", "tiny")
    size = options.pick("batch_size", 32, 4)
    rounds = options.pick("rounds", 7, 1)

    functions: dict[str, Callable[[], Any]] = {}
    for loss in parts.LOSSES:
        model = parts.pruned_model(network)
        data = parts.batch(model, size)
        step = parts.step(parts.trainer(model, options.steps, loss))
        functions[f"{loss} ours"] = functools.partial(step, *data)
        eager = written_by_hand(parts.pruned_model(network), options.steps, loss)
        functions[f"{loss} eager"] = functools.partial(eager, *data)
        graph = written_by_hand(parts.pruned_model(network), options.steps, loss)
        functions[f"{loss} function"] = functools.partial(tf.function(graph), *data)
    times = measure.interleaved(functions, rounds)

    ratios = {
        f"{loss} {rival}": measure.ratios([times[f"{loss} ours"]], [times[f"{loss} {rival}"]])
        for loss in parts.LOSSES
        for rival in ("eager", "function")
    }
    path = record.write(
        options,
        "rivals",
        {
            "network": network,
            "batch_size": size,
            "rounds": rounds,
            "attack": f"PGD-{options.steps} linf {parts.EPSILON}",
            "times": times,
            "ratios": ratios,
            "goal": 1.0,
            "goal_met": all(ratio["wall"].of_medians < 1 for ratio in ratios.values()),
        },
    )
    rows = []
    for name, timing in times.items():
        loss, kind = name.split()
        rows.append((f"{loss}: {_KINDS[kind]}", *record.milliseconds(timing)))
    notes = [
        f"{name.split()[0]}, ours over {_KINDS[name.split()[1]]}: "
        f"{record.against(ratio['wall'].of_medians, 1.0)}; {record.spread(ratio['wall'])}; "
        f"by CPU time {ratio['cpu'].of_medians:.3f}"
        for name, ratio in ratios.items()
    ]
    notes += [
        "All: the same network with TSCNC and tfmot's wrappers, as many attack steps, one "
        "forward pass in training mode. By hand there are no metrics.",
        "TRADES by hand: the clean probabilities stand in for cleverhans' labels, and the start is "
        "uniform within 0.001 instead of normal.",
    ]
    title = f"Rivals: {network}, batch {size}, {rounds} rounds"
    record.show(title, record.COLUMNS, rows, notes, path)


def written_by_hand(
    model: Any, steps: int, loss: str
) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """Return `(x, y) -> loss`, one step of TRADES or Madry on a tfmot-pruned model.

    The attack runs in inference mode, and each step has one forward pass in training mode (two
    would run the pruning schedule at twice its speed). The attack calls the wrapped model, so every
    forward pass assigns every masked weight.
    """
    optimizer = parts.optimizer()
    optimizer.build(model.trainable_variables)
    epsilon = _checks.distance("epsilon", parts.EPSILON)

    def logits_fn(x: tf.Tensor) -> tf.Tensor:
        return model(x, training=False)

    def divergence(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        logs = tf.math.log(tf.maximum(labels, 1e-30)) - tf.nn.log_softmax(logits)
        return tf.reduce_sum(labels * logs, axis=-1)

    attack = functools.partial(
        projected_gradient_descent,
        logits_fn,
        eps=epsilon,
        eps_iter=parts.STEP_SIZE,
        nb_iter=steps,
        norm=np.inf,
        clip_min=0.0,
        clip_max=1.0,
        rand_init=True,
        sanity_checks=False,
    )

    def trades(x: tf.Tensor, y: tf.Tensor) -> tuple[Any, Any]:
        clean = tf.nn.softmax(logits_fn(x))
        adversarial = attack(x, y=clean, loss_fn=divergence, rand_minmax=0.001)
        with tf.GradientTape() as tape:
            logits, other = tf.split(model(tf.concat([x, adversarial], axis=0), training=True), 2)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
            losses += 6.0 * divergence(tf.nn.softmax(logits), other)
            value = tf.reduce_mean(losses) + tf.add_n(model.losses)
        return tape, value

    def madry(x: tf.Tensor, y: tf.Tensor) -> tuple[Any, Any]:
        adversarial = attack(x, y=y)
        with tf.GradientTape() as tape:
            logits = model(adversarial, training=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
            value = tf.reduce_mean(losses) + tf.add_n(model.losses)
        return tape, value

    forward = {"TRADES": trades, "Madry": madry}[loss]

    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        tape, value = forward(x, y)
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return value

    return step
