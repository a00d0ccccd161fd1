"""Robust accuracy: the worst case over attacks, and reasons to doubt it."""

from tscnc_tf.evaluation.doubts import EvaluationWarning
from tscnc_tf.evaluation.report import (
    AttackResult,
    RobustnessReport,
    plot_robustness,
    wilson_interval,
)
from tscnc_tf.evaluation.run import evaluate_robustness

__all__ = [
    "AttackResult",
    "EvaluationWarning",
    "RobustnessReport",
    "evaluate_robustness",
    "plot_robustness",
    "wilson_interval",
]
