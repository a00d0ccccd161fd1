"""Rewriting of LiteRT files from other sources for sparse inference."""

from __future__ import annotations

import os
import pathlib
import tempfile

import numpy as np

from tscnc_tf import _checks, _files, _probe
from tscnc_tf._litert_file import File, read
from tscnc_tf.export import litert, sparse_inference, sparse_litert
from tscnc_tf.export.served_file import ServedFile

__all__ = ["rewrite_litert"]

_ALLOWED = 1e-4  # of the largest output, or of 1


def rewrite_litert(
    source: str | os.PathLike[str], path: str | os.PathLike[str], *, overwrite: bool = False
) -> sparse_inference.SparseInferenceReport:
    """Rewrite a sparse LiteRT file for sparse inference, without changing its function.

    `export_litert(sparse=True)` does this itself. The function is for files that LiteRT's converter
    has written with `tf.lite.Optimize.EXPERIMENTAL_SPARSITY`. Their graphs often lack the form in
    which LiteRT runs 1x1 convolutions sparsely (see `sparse_inference`), or LiteRT computes them
    wrongly on the processors where it does. These changes are made if they let LiteRT run more of
    the file sparsely:

    * "Same" padding of a strided convolution becomes a separate operation (PAD) before a "valid"
      convolution, if the size of the image makes it even, that is, equal on opposite sides.
    * A constant of shape (channels,) that is added to or multiplied with an image becomes the first
      operand, of shape (1, 1, 1, channels).
    * A mean over an image that keeps its axes (`keepdims=True`) returns the shape (examples,
      channels), and a RESHAPE makes it (examples, 1, 1, channels), if no sparse part follows.

    These are always made:

    * A part of the graph that LiteRT would run sparsely, with wrong results, is run dense: the
      operation max(x, x) = x is inserted after its first convolution.
    * A kernel in sparse form is made dense where that is no larger, or where LiteRT can't run it.
      Blocks become single entries where that is smaller.

    The new file is loaded and compared with the old one before it is renamed to `path`.

    Needs `pip install ".[litert]"` in a checkout.

    Args:
        source: a LiteRT file with sparse kernels and a signature, as Keras writes it.
        path: the file to write. It may be `source`, with `overwrite=True`.
        overwrite: as for `export_litert`.

    Returns:
        The `SparseInferenceReport` of the new file. Only a change of the network removes the
        obstacles that it still names.

    Raises:
        ImportError: LiteRT is not installed.
        FileNotFoundError: there is no file at `source`.
        FileExistsError, OSError: as `export_litert`.
        TypeError: `overwrite` is not a bool.
        ValueError: `source` is not a LiteRT file with a signature, is damaged, or has no sparse
            kernel; or the outputs of the new file, for 8 examples from U[0, 1), differ by more than
            1e-4 of the largest (or of 1). What was at `path` is then unchanged.

    Example:
        >>> import os, tempfile, pathlib, tensorflow as tf, tf_keras
        >>> from tscnc_tf import export, pruning
        >>> layers = tf_keras.layers
        >>> model = tf_keras.Sequential([
        ...     layers.Conv2D(8, 3, strides=2, padding="same", input_shape=(17, 17, 3)),
        ...     layers.Conv2D(64, 1, activation="relu", name="wide"),
        ...     layers.GlobalAveragePooling2D(),
        ...     layers.Dense(10),
        ... ])
        >>> model = pruning.strip(pruning.prune_now(model, 0.8, layers="wide"))
        >>> converter = tf.lite.TFLiteConverter.from_keras_model(model)
        >>> converter.optimizations = [tf.lite.Optimize.EXPERIMENTAL_SPARSITY]
        >>> path = os.path.join(tempfile.mkdtemp(), "net.tflite")
        >>> _ = pathlib.Path(path).write_bytes(converter.convert())
        >>> export.sparse_inference(path).sparse
        0
        >>> export.rewrite_litert(path, path, overwrite=True).sparse
        1

    Reference:
        XNNPACK, src/subgraph.c, `xnn_subgraph_rewrite_for_nchw`: which graphs are run sparsely.
    """
    overwrite = _checks.boolean("overwrite", overwrite)
    content = read("source", source)
    if not File(content, str(source)).sparse():
        raise ValueError(
            f"source has no sparse kernels: {source}. Convert with "
            "tf.lite.Optimize.EXPERIMENTAL_SPARSITY, or export by export_litert(sparse=True)."
        )
    form = litert.LiteRT({}, "float32", None, sparse=True)
    replacement = _files.Replacement(overwrite, form.require_replaceable)
    with _files.new_file("path", path, replacement) as draft, tempfile.TemporaryDirectory() as temp:
        old = pathlib.Path(temp) / "old.tflite"
        old.write_bytes(content)
        draft.write_bytes(sparse_litert.corrected(content).content)
        before, after = (_outputs(litert.load_litert(file)) for file in (old, draft))
        difference, scale = _probe.deviation(before, after)
        allowed = _ALLOWED * scale
        if difference > allowed:
            raise ValueError(
                f"The outputs of the rewritten file differ from those of {source} by up to "
                f"{difference:.3g}, and {allowed:.3g} is allowed: export the model by "
                "export_litert(sparse=True)."
            )
        return sparse_inference.inspected(draft.read_bytes(), {}, str(path))


def _outputs(served: ServedFile) -> list[np.ndarray]:
    """Return a file's outputs for examples from U[0, 1); axes of any size get the size 16."""
    rng = np.random.default_rng(0)
    batch = {}
    for tensor in served.inputs:
        sizes = [16 if size is None else size for size in tensor.shape[1:]]
        count = _probe.EXAMPLES if tensor.shape[0] is None else tensor.shape[0]
        batch[tensor.name] = rng.random((count, *sizes)).astype(tensor.dtype)
    return _probe.outputs(served, batch, "The file")
