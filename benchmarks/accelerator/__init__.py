"""Training where there is JAX only, by the programs that TensorFlow compiles.

`export_stage` writes the stages of an arm (train, prune, fine-tune, ...) from compiled trainers.
The folder `runner`, which needs Python, NumPy and JAX alone, runs them. `restore` brings back what
they end with.
"""

from benchmarks.accelerator.names import model_variables, restore, trainer_variables
from benchmarks.accelerator.programs import Program, export
from benchmarks.accelerator.stages import Augmentation, export_stage

__all__ = [
    "Augmentation",
    "Program",
    "export",
    "export_stage",
    "model_variables",
    "restore",
    "trainer_variables",
]
