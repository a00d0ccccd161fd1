"""Robust accuracy: the worst case over attacks, and diagnostics of the evaluation."""

from tscnc_tf.evaluation.curve import RobustnessCurve, robustness_curve
from tscnc_tf.evaluation.diagnostics import EvaluationWarning
from tscnc_tf.evaluation.report import (
    AttackResult,
    EnsemblePart,
    RobustnessReport,
    plot_robustness,
    wilson_interval,
)
from tscnc_tf.evaluation.run import evaluate_robustness

__all__ = [
    "AttackResult",
    "EnsemblePart",
    "EvaluationWarning",
    "RobustnessCurve",
    "RobustnessReport",
    "evaluate_robustness",
    "plot_robustness",
    "robustness_curve",
    "wilson_interval",
]
