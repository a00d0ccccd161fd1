"""Diagnostics of an evaluation: signs that its robust accuracy is too high, as texts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from tscnc_tf.evaluation.adversaries import Adversary
from tscnc_tf.evaluation.report import AttackResult, wilson_interval

# Below this difference of accuracies, or this half width of an interval, there is no remark.
_NOTABLE_GAIN = 0.01
_WIDE = 0.05


class EvaluationWarning(UserWarning):
    """A sign, found during an evaluation, that its robust accuracy may be too high."""


def of_model(
    repeatable: bool, unit_interval: bool, zero_gradients: np.ndarray, nan_gradients: np.ndarray
) -> list[str]:
    """Return what makes any attack on a model unreliable.

    Args:
        repeatable: whether the model returns the same for the same input.
        unit_interval: whether all its outputs lie in [0, 1].
        zero_gradients: per example, whether an attack would find its gradient exactly zero.
        nan_gradients: per example, whether it would find what is not a number.
    """
    found = []
    if not repeatable:
        found.append(
            "The model's output changes from call to call, and so does the objective of an attack: "
            "an example may count as robust by chance. Make the model deterministic, or attack the "
            "mean over its randomness (expectation over transformation)."
        )
    if unit_interval:
        found.append(
            "All outputs of the model are in [0, 1], though its rows do not sum to 1: they look "
            "like probabilities, as of a sigmoid per class. Attacks need logits: a sigmoid that is "
            "saturated has no gradient left, and makes a model look robust. Leave out the last "
            "activation (activation=None), or pass the part of the model before it. If these are "
            "logits, the model is hardly trained, or something holds them in [0, 1]."
        )
    if np.any(zero_gradients):
        found.append(
            f"The input gradient that attacks ascend is exactly zero for {_share(zero_gradients)}. "
            "Attacks by gradients can't move there, which is gradient masking and no robustness: "
            "look for saturated, quantised or dead layers, and add an attack "
            "that needs no gradient, by attacks.Custom from another library."
        )
    if np.any(nan_gradients):
        found.append(
            f"The input gradient that attacks ascend is not a number for {_share(nan_gradients)}. "
            "Attacks by gradients do not move there, which is no robustness: look for a square "
            "root, a norm or a division at 0, whose derivative is infinite though its value is "
            "finite, and add an attack that needs no gradient, by attacks.Custom."
        )
    return found


def _share(chosen: np.ndarray) -> str:
    """Return how many of all examples are chosen, in words."""
    return f"{np.sum(chosen)} of {len(chosen)} examples ({100 * np.mean(chosen):.2f} %)"


def of_results(
    clean: np.ndarray, attacks: Sequence[Adversary], results: Mapping[str, AttackResult]
) -> list[str]:
    """Return remarks on the results of the attacks.

    Args:
        clean: per example, whether the model is right on it.
        attacks: the attacks that were run.
        results: what they did, by name.
    """
    found = []
    for name, result in results.items():
        if not result.declared:
            far = ", ".join(f"{value:.3g} in {n}" for n, value in result.largest_distance.items())
            found.append(
                f"{name}: it declares no ball, so only bounds were checked; it moved an input by "
                f"at most {far}. attacks.Custom declares one."
            )
        if np.any(clean) and not np.any(clean & ~result.correct):
            found.append(
                f"{name}: it fooled the model on no example. Check its epsilon, steps and bounds "
                "before calling the model robust."
            )
    sources = {attack.source.name for attack in attacks if attack.source}
    if all(attack.source for attack in attacks):
        found.append(
            "No attack ran on this model: all adversarial examples were found on another "
            f"({', '.join(sorted(sources))}). An attack on the model itself may find more."
        )
    found += [_order(*pair, results) for pair in itertools.permutations(attacks, 2)]
    robust = np.logical_and.reduce([clean, *(result.correct for result in results.values())])
    low, high = wilson_interval(int(np.sum(robust)), len(robust))
    if high - low > 2 * _WIDE:
        found.append(
            f"{len(robust)} examples: the worst case is only known to lie between "
            f"{100 * low:.1f} and {100 * high:.1f} %. With 1000 examples it is known to ±3 points."
        )
    return [text for text in found if text]


def _order(weak: Adversary, strong: Adversary, results: Mapping[str, AttackResult]) -> str:
    """Return a remark if the weaker attack of two, by epsilon or steps, fools more examples."""
    small, large = weak.epsilon, strong.epsilon
    if small is None or large is None or small > large:
        return ""
    if weak.description.get("norm") != strong.description.get("norm"):
        return ""
    one_step = weak.description.get("steps") == 1 and (strong.description.get("steps") or 0) > 1
    if small == large and not one_step:
        return ""
    ours, theirs = results[weak.name], results[strong.name]
    if theirs.accuracy - ours.accuracy <= _NOTABLE_GAIN:
        return ""
    reason = "with a smaller epsilon" if small < large else "with a single step"
    return (
        f"{weak.name} fools more examples {reason} ({100 * ours.accuracy:.1f} % are left) than "
        f"{strong.name} ({100 * theirs.accuracy:.1f} %): a sign of gradient masking, or of a badly "
        "tuned attack."
    )
