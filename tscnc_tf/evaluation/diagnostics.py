"""Diagnostics of an evaluation: signs that its robust accuracy is too high, by name."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tscnc_tf.evaluation.adversaries import Adversary
from tscnc_tf.evaluation.report import AttackResult, wilson_interval

# Smaller differences of accuracies, shares of examples without a usable gradient, and half widths
# of intervals are not reported.
_NOTABLE_GAIN = 0.01
_WIDE = 0.05
# Attacks without gradients may fool alone, without a finding, fewer examples than this number, up
# to this share of all, or up to this share of those on which the attacks by gradients failed: on
# small networks without any masking, Square finds a few more.
_BLACK_BOX_NUMBER, _BLACK_BOX_SHARE, _BLACK_BOX_SHARE_OF_LEFT = 3, 0.002, 0.05
# The share of examples above which a property of the model's outputs is reported.
_MANY = 0.1
# In a ladder: the accuracy that may be left in the largest ball, and by how much it may rise.
_LADDER_TOLERANCE = 0.05


class EvaluationWarning(UserWarning):
    """A sign, found during an evaluation, that its robust accuracy may be too high.

    Its text begins with a name, such as "zero-gradients", under which the guide to evaluation says
    what to do about it.
    """


class Finding(NamedTuple):
    """A sign that robust accuracy may be too high: its name, and a text with cause and remedy."""

    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.name}: {self.text} (docs/evaluation.md#{self.name})"


class Outputs(NamedTuple):
    """Properties of a model's outputs on the clean inputs.

    Attributes:
        repeatable: whether the model returns the same for the same input.
        unit_interval: whether all its outputs lie in [0, 1].
        zero_gradients: per example, whether the gradient that attacks use is exactly zero.
        undefined_gradients: per example, whether that gradient has NaN or infinite entries.
        saturated: per example, whether softmax is 1 for the label in float32, with a margin.
        tied: per example, whether the largest logit occurs twice.
        operations: the types of operations in its graph that have no useful gradient.
    """

    repeatable: bool
    unit_interval: bool
    zero_gradients: np.ndarray
    undefined_gradients: np.ndarray
    saturated: np.ndarray
    tied: np.ndarray
    operations: Sequence[str]


def of_model(outputs: Outputs) -> list[Finding]:
    """Return findings on the outputs of a model that make any attack unreliable."""
    found = []
    if not outputs.repeatable:
        found.append(
            Finding(
                "changing-outputs",
                "The model's output changes from call to call, and so does the objective of an "
                "attack: an example may count as robust by chance. Make the model deterministic, "
                "attack the mean over its randomness (attacks.APGD with eot=20), or use "
                "attacks.AutoAttack(version='rand').",
            )
        )
    if outputs.unit_interval:
        found.append(
            Finding(
                "probabilities",
                "All outputs of the model are in [0, 1], though its rows do not sum to 1: they "
                "look like probabilities, as of a sigmoid per class. Attacks need logits: a "
                "sigmoid that is saturated has no gradient left, and makes a model look robust. "
                "Leave out the last activation (activation=None), or pass the part of the model "
                "before it. If these are logits, the model is hardly trained, or something holds "
                "them in [0, 1].",
            )
        )
    if np.mean(outputs.zero_gradients) > _NOTABLE_GAIN:
        found.append(
            Finding(
                "zero-gradients",
                "The input gradient that attacks ascend is exactly zero for "
                f"{_share(outputs.zero_gradients)}. Attacks by gradients can't move there, which "
                "is gradient masking, not robustness: look for saturated, quantised or dead "
                "layers, and add an attack that needs no gradient, attacks.Square.",
            )
        )
    if np.mean(outputs.undefined_gradients) > _NOTABLE_GAIN:
        found.append(
            Finding(
                "undefined-gradients",
                "The input gradient that attacks ascend is NaN or infinite for "
                f"{_share(outputs.undefined_gradients)}. Attacks by gradients do not move there, "
                "which is not robustness: look for a square root, a norm or a division at 0, whose "
                "derivative is infinite though its value is finite, and add an attack that needs "
                "no gradient, attacks.Square.",
            )
        )
    if np.mean(outputs.saturated) > _MANY:
        found.append(
            Finding(
                "saturated-logits",
                f"The logits of {_share(outputs.saturated)} lie so far apart that softmax is 1 for "
                "the label in float32, and the gradient of cross-entropy 0: attacks of other "
                "libraries that ascend it find nothing. Those of tscnc_tf.attacks ascend what does "
                "not saturate; for others, divide the logits by a constant.",
            )
        )
    if np.mean(outputs.tied) > _MANY:
        found.append(_tied(outputs.tied, "clean"))
    if outputs.operations:
        found.append(
            Finding(
                "non-differentiable-operations",
                f"The model's graph has operations of the type {', '.join(outputs.operations)}, "
                "whose gradient is zero, missing or a substitute, so attacks by gradients may "
                "fail. Add an attack that needs no gradient, attacks.Square, and attack the model "
                "without these operations, by attacks.Transfer.",
            )
        )
    return found


def of_ladder(accuracies: Mapping[float, float], steps: Mapping[int, float]) -> list[Finding]:
    """Return findings from short attacks in growing balls and with more steps.

    Args:
        accuracies: the accuracy under attack by radius; the largest ball holds all inputs within
            the bounds.
        steps: the accuracy under attack in the smallest ball, by the number of steps.
    """
    radii, left = zip(*sorted(accuracies.items()), strict=True)
    rises = [after - before for before, after in itertools.pairwise(left)]
    found = []
    if left[-1] > _LADDER_TOLERANCE:
        found.append(
            f"in a ball of radius {radii[-1]:.3g}, which holds every input within the bounds, an "
            f"attack by gradients leaves {100 * left[-1]:.1f} %, but could fool every example"
        )
    if max(rises, default=0.0) > _LADDER_TOLERANCE:
        steps_up = ", ".join(f"{100 * value:.1f}" for value in left)
        found.append(
            f"larger balls do not lower the accuracy: from epsilon={radii[0]:.3g} to "
            f"{radii[-1]:.3g} an attack leaves {steps_up} %"
        )
    (few, before), (many, after) = min(steps.items()), max(steps.items())
    if after - before > _LADDER_TOLERANCE:
        found.append(f"{many} steps leave {100 * after:.1f} %, but {few} only {100 * before:.1f} %")
    return [
        Finding(
            "ladder",
            f"Attacks by the gradients of this model fail: {text}. That is gradient masking: look "
            "for operations that stop or distort the gradient, and rely on attacks without "
            "gradients (attacks.Square) and transferred ones.",
        )
        for text in found
    ]


def of_curve(accuracies: Mapping[float, float], widest: float) -> list[Finding]:
    """Return a finding if examples are robust in a ball that holds all inputs within the bounds.

    Args:
        accuracies: the robust accuracy by radius.
        widest: the radius of a ball around any input that holds all inputs.
    """
    return [
        Finding(
            "ladder",
            f"In a ball of radius {radius:.3g}, which holds every input within the bounds, "
            f"{100 * left:.1f} % are robust, but an attack could fool every example: the attack is "
            "too weak, or the gradients of the model mislead it. Add attacks.Square and "
            "transferred attacks.",
        )
        for radius, left in accuracies.items()
        if radius >= widest and left > _LADDER_TOLERANCE
    ][:1]


def of_transfer(fooled: int, left: int, examples: int) -> list[Finding]:
    """Return a finding if examples of another network fool the model where attacks failed.

    Args:
        fooled: the number of examples on which only they fool the model.
        left: the number of examples on which all attacks failed.
        examples: the number of examples of the evaluation.
    """
    if not _is_notable(fooled, left, examples):
        return []
    return [
        Finding(
            "transfer-wins",
            f"Adversarial examples of a small network, trained on the same inputs for this check, "
            f"fool the model on {fooled} examples where every attack on the model itself failed: "
            "its gradients are misleading. Attack it by attacks.Transfer from a plainly trained "
            "network too.",
        )
    ]


def of_results(
    clean: np.ndarray,
    adversaries: Sequence[Adversary],
    results: Mapping[str, AttackResult],
) -> list[Finding]:
    """Return findings from the results of the attacks.

    Args:
        clean: per example, whether the model is right on it.
        adversaries: the attacks.
        results: their results, by name.
    """
    found = []
    for name, result in results.items():
        if result.accuracy - np.mean(clean) > _NOTABLE_GAIN:
            found.append(
                Finding(
                    "above-clean",
                    f"Under {name} the model is right more often ({100 * result.accuracy:.1f} %) "
                    f"than on the inputs themselves ({100 * np.mean(clean):.1f} %): the attack "
                    "helps the model, as it does if gradients have the wrong sign, or if it "
                    "descends its loss. Check both.",
                )
            )
        if result.tied > _MANY * len(clean):
            found.append(_tied(np.arange(len(clean)) < result.tied, f"under {name}"))
        for before, stage in itertools.pairwise(result.stages):
            if "Square" in stage.name and "Square" not in before.name:
                found += _black_box(stage.name, stage.fooled, stage.examples, len(clean))
    by_gradient = [each for each in adversaries if _used_gradient(each, results[each.name])]
    for each in adversaries:
        if each.source is None and each.uses_gradient:
            continue
        at_least = [results[other.name].correct for other in by_gradient if _is_within(each, other)]
        if at_least:
            left = np.logical_and.reduce([clean, *at_least])
            fooled = int(np.sum(left & ~results[each.name].correct))
            found += _black_box(each.name, fooled, int(np.sum(left)), len(clean))
    found += itertools.chain.from_iterable(
        _order(*pair, results) for pair in itertools.permutations(adversaries, 2)
    )
    return found


def of_ensembles(
    adversaries: Sequence[Adversary], results: Mapping[str, AttackResult]
) -> list[Finding]:
    """Return a finding for each ensemble of which a part could not be run."""
    found = []
    for each in adversaries:
        names = [part.name for part in each.parts]
        run = [stage.name for stage in results[each.name].stages]
        missing = [name for name in names if name not in run]
        if missing:
            found.append(
                Finding(
                    "no-gradient",
                    f"The outputs of the model have no gradient in its inputs, so of {each.name} "
                    f"only {', '.join(run)} was run, and not {', '.join(missing)}: the robust "
                    "accuracy may be much too high. Attack the network that the model was made "
                    "from too, by attacks.Transfer(source=..., attack=attacks.AutoAttack(...)).",
                )
            )
    return found


def remarks(
    clean: np.ndarray, adversaries: Sequence[Adversary], results: Mapping[str, AttackResult]
) -> list[str]:
    """Return notes on the results that are not signs of a fault."""
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
    sources = {each.source.name for each in adversaries if each.source}
    if all(each.source for each in adversaries):
        found.append(
            "No attack ran on this model: all adversarial examples were found on another "
            f"({', '.join(sorted(sources))}). An attack on the model itself may find more."
        )
    robust = np.logical_and.reduce([clean, *(result.correct for result in results.values())])
    low, high = wilson_interval(int(np.sum(robust)), len(robust))
    if high - low > 2 * _WIDE:
        found.append(
            f"{len(robust)} examples: the worst case is only known to lie between "
            f"{100 * low:.1f} and {100 * high:.1f} %. With 1000 examples it is known to ±3 points."
        )
    return found


def _share(chosen: np.ndarray) -> str:
    """Return the number and the share of chosen examples as text."""
    return f"{np.sum(chosen)} of {len(chosen)} examples ({100 * np.mean(chosen):.2f} %)"


def _is_notable(fooled: int, left: int, examples: int) -> bool:
    most = max(_BLACK_BOX_SHARE * examples, _BLACK_BOX_SHARE_OF_LEFT * left)
    return fooled >= _BLACK_BOX_NUMBER and fooled > most


def _tied(chosen: np.ndarray, where: str) -> Finding:
    return Finding(
        "tied-logits",
        f"The largest logit occurs twice for {_share(chosen)}, {where}: the class is then "
        "decided by the order of the logits, and there is no gradient. A model that returns equal "
        "logits where it suspects an attack rejects the input, which is not robustness; count "
        "rejections separately.",
    )


def _used_gradient(adversary: Adversary, result: AttackResult) -> bool:
    """Return whether an attack has used the gradient of the evaluated model."""
    if not adversary.parts:
        return adversary.source is None and adversary.uses_gradient
    run = {stage.name for stage in result.stages}
    return any(part.uses_gradient for part in adversary.parts if part.name in run)


def _is_within(inner: Adversary, outer: Adversary) -> bool:
    """Return whether the declared ball of an attack lies within that of another."""
    if inner.epsilon is None or outer.epsilon is None:
        return inner.epsilon is None and outer.epsilon is None
    same = inner.description.get("norm") == outer.description.get("norm")
    return same and inner.epsilon <= outer.epsilon


def _black_box(name: str, fooled: int, left: int, examples: int) -> list[Finding]:
    if not _is_notable(fooled, left, examples):
        return []
    return [
        Finding(
            "black-box-wins",
            f"{name}, which does not use the gradient of the model, fools it on {fooled} of "
            f"{left} examples where all attacks by its gradient failed, in balls at least as "
            "large: these attacks are misled (gradient masking), or too weak. More queries may "
            "lower the accuracy further.",
        )
    ]


def _order(
    weak: Adversary, strong: Adversary, results: Mapping[str, AttackResult]
) -> list[Finding]:
    """Return a finding if the weaker attack of two, by epsilon or steps, fools more examples."""
    if weak.epsilon is None or not _is_within(weak, strong):
        return []
    same_ball = weak.epsilon == strong.epsilon
    one_step = weak.description.get("steps") == 1 and (strong.description.get("steps") or 0) > 1
    if same_ball and not one_step:
        return []
    ours, theirs = results[weak.name], results[strong.name]
    if theirs.accuracy - ours.accuracy <= _NOTABLE_GAIN:
        return []
    reason = "with a single step" if same_ball else "with a smaller epsilon"
    return [
        Finding(
            "weaker-attack-wins",
            f"{weak.name} fools more examples {reason} ({100 * ours.accuracy:.1f} % are left) than "
            f"{strong.name} ({100 * theirs.accuracy:.1f} %): a sign of gradient masking, or of a "
            "badly tuned attack. Give it more steps and restarts, and add attacks.Square.",
        )
    ]
