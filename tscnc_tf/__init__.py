"""Adversarial training, pruning and checked export of small, robust classifiers in Keras.

Each group of functions has a module. The functions used most, and `AdversarialTraining`, are also
at the top level:

    import tscnc_tf as tscnc

* `tscnc.regularizers`, `tscnc.schedules`, `tscnc.attacks`, `tscnc.losses`, `tscnc.training`,
  `tscnc.callbacks`, `tscnc.pruning`, `tscnc.gates`, `tscnc.inspection`, `tscnc.evaluation`,
  `tscnc.export`, `tscnc.applications`, `tscnc.datasets`, `tscnc.experiments`, `tscnc.functional`
* `tscnc.AdversarialTraining`, `tscnc.prune`, `tscnc.prune_now`, `tscnc.strip`,
  `tscnc.evaluate_robustness`
* `tscnc.export_saved_model`, `tscnc.export_litert`, `tscnc.export_onnx`, and `load_...` of each
"""

import importlib
from typing import TYPE_CHECKING, Any

from tscnc_tf import (
    _keras,
    applications,
    attacks,
    callbacks,
    datasets,
    evaluation,
    experiments,
    export,
    functional,
    gates,
    inspection,
    losses,
    pruning,
    regularizers,
    training,
)
from tscnc_tf.evaluation import EvaluationWarning, RobustnessReport, evaluate_robustness
from tscnc_tf.export import (
    export_litert,
    export_onnx,
    export_saved_model,
    load_litert,
    load_onnx,
    load_saved_model,
)
from tscnc_tf.pruning import prune, prune_now, strip
from tscnc_tf.training import AdversarialTraining

if TYPE_CHECKING:
    from tscnc_tf import schedules

# Models pruned by these schedules load wherever tscnc_tf is imported; tfmot is imported no sooner.
for _name in ("ConditionGated", "CosineSparsity", "OneShot"):
    _keras.register_deferred("tscnc_tf.schedules", _name)

__version__ = "0.1.0"

__all__ = [
    "AdversarialTraining",
    "EvaluationWarning",
    "RobustnessReport",
    "__version__",
    "applications",
    "attacks",
    "callbacks",
    "datasets",
    "evaluate_robustness",
    "evaluation",
    "experiments",
    "export",
    "export_litert",
    "export_onnx",
    "export_saved_model",
    "functional",
    "gates",
    "inspection",
    "load_litert",
    "load_onnx",
    "load_saved_model",
    "losses",
    "prune",
    "prune_now",
    "pruning",
    "regularizers",
    "schedules",
    "strip",
    "training",
]


def __getattr__(name: str) -> Any:
    """Import `schedules` when it is first asked for: its classes derive from tfmot's."""
    if name == "schedules":
        return importlib.import_module("tscnc_tf.schedules")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
