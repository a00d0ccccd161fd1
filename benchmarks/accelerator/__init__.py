"""Training where there is JAX only, with the programs that TensorFlow compiles.

`export_stage` exports the stages of an arm (train, prune, fine-tune, ...) from compiled trainers.
The folder `runner`, which needs only Python, NumPy and JAX, runs them. `restore` loads the trained
variables into a trainer.
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
