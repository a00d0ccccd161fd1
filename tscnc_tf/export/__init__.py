"""Ship a pruned model: a checked SavedModel with a manifest, and the way back.

`export_saved_model` takes the pruning wrappers off, checks what it writes, and puts a manifest
beside the graph; `load_saved_model` checks the folder against the manifest and returns a callable.
The folder itself is a plain SavedModel: TF-Serving and `tf.saved_model.load` need nothing of ours.
"""

from tscnc_tf.export.report import ExportedTensor, ExportedVariable, ExportReport
from tscnc_tf.export.saving import export_saved_model
from tscnc_tf.export.serving import ServedModel, load_saved_model

__all__ = [
    "export_saved_model",
    "load_saved_model",
    "ExportReport",
    "ExportedTensor",
    "ExportedVariable",
    "ServedModel",
]
