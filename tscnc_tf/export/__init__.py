"""Export of a pruned model: a SavedModel with a manifest, or a file of LiteRT or ONNX.

`export_saved_model` removes the pruning wrappers, checks what it writes, and adds a manifest to the
folder. `load_saved_model` checks the folder against the manifest and returns a callable. The folder
is a plain SavedModel: TF-Serving and `tf.saved_model.load` do not need this package.

`export_litert` and `export_onnx` write one file with the same checks, and also check that every
zero of every kernel is in it. `load_litert` and `load_onnx` return a callable. They need the extras
`litert` and `onnx`.

`sparse_inference` reports which 1x1 convolutions of a model or a LiteRT file are computed from
their nonzero weights only, and why others are not. `rewrite_litert` rewrites a file so that more of
them are.
"""

from tscnc_tf.export.litert import export_litert, load_litert
from tscnc_tf.export.onnx import export_onnx, load_onnx
from tscnc_tf.export.report import (
    ExportedKernel,
    ExportedTensor,
    ExportedVariable,
    ExportReport,
    FileExportReport,
)
from tscnc_tf.export.rewriting import rewrite_litert
from tscnc_tf.export.saved_model import ServedModel, export_saved_model, load_saved_model
from tscnc_tf.export.served_file import ServedFile
from tscnc_tf.export.sparse_inference import (
    PointwiseConvolution,
    SparseInferenceReport,
    SparseObstacle,
    sparse_inference,
)

__all__ = [
    "export_litert",
    "export_onnx",
    "export_saved_model",
    "load_litert",
    "load_onnx",
    "load_saved_model",
    "rewrite_litert",
    "sparse_inference",
    "ExportReport",
    "ExportedKernel",
    "ExportedTensor",
    "ExportedVariable",
    "FileExportReport",
    "PointwiseConvolution",
    "ServedFile",
    "ServedModel",
    "SparseInferenceReport",
    "SparseObstacle",
]
