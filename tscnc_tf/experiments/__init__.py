"""Experiments: recipes, the three stages of the method, and a run that can be stopped.

An experiment is a `Recipe`. `run` takes it through adversarial training under the constraints,
pruning, fine-tuning, evaluation and export, each in a folder that `open_stage` opens. `sweep` runs
many of them.
"""

from tscnc_tf.experiments.folders import StageOutput, open_stage
from tscnc_tf.experiments.recipe import Recipe, parse
from tscnc_tf.experiments.runner import run
from tscnc_tf.experiments.sweeps import Sweep, SweepReport, sweep

__all__ = [
    "Recipe",
    "StageOutput",
    "Sweep",
    "SweepReport",
    "open_stage",
    "parse",
    "run",
    "sweep",
]
