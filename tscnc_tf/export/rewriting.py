"""LiteRT files from elsewhere, rewritten so that LiteRT runs what it can of them sparsely."""

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

    `export_litert(sparse=True)` does this to each file; here it is done to files that others have
    made, by LiteRT's converter with `tf.lite.Optimize.EXPERIMENTAL_SPARSITY`. Their graphs often
    miss the form in which LiteRT runs 1x1 convolutions by their nonzero weights (see
    `sparse_inference`), or are such that LiteRT gets them wrong on the processors that do so. What
    f(x) is for an input x of shape (examples, ...) stays. Where that makes more of the file run
    sparsely:

    * a "same" padding of a strided convolution that is even for the size of the image, p rows and
      columns on each side, becomes an operation of its own (PAD) before a "valid" convolution;
    * a constant c of shape (channels,) that is added to or multiplied with an image becomes the
      first operand, of shape (1, 1, 1, channels);
    * a mean over an image that keeps its axes (`keepdims=True`) returns shape (examples, channels),
      and a RESHAPE gives it (examples, 1, 1, channels) afterwards, if no part that is run sparsely
      follows.

    And always:

    * a part of the graph that LiteRT would run sparsely and get wrong is kept from it, by the
      operation max(x, x) = x behind its first convolution;
    * a kernel in sparse form is made dense where that is no larger, or where LiteRT does not run
      it; blocks become single entries where that is smaller.

    The new file is loaded and compared with the old one before it appears at `path`.

    Needs `pip install "tscnc_tf[litert]"`.

    Args:
        source: a LiteRT file with sparse kernels and a signature, as Keras writes it.
        path: the file to make. It may be `source`, with `overwrite=True`.
        overwrite: whether a LiteRT file at `path` is replaced, in one step; nothing else is.

    Returns:
        The `SparseInferenceReport` of the new file: which 1x1 convolutions it has run sparsely, and
        what stands in the way of the others, which only a change of the network removes.

    Raises:
        ImportError: LiteRT is not installed.
        FileNotFoundError: there is no file at `source`.
        FileExistsError, OSError: as `export_litert`.
        TypeError: `overwrite` is no bool.
        ValueError: `source` is no LiteRT file with a signature, is damaged, or has no sparse
            kernel; or the outputs of the new file, for 8 examples from U[0, 1), differ by more than
            1e-4 of the largest (or of 1). What was at `path` is as it was then.

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
        XNNPACK, src/subgraph.c, `xnn_subgraph_rewrite_for_nchw`: which graphs are run so.
    """
    overwrite = _checks.boolean("overwrite", overwrite)
    content = read(source)
    if not File(content, str(source)).sparse():
        raise ValueError(
            f"source has no sparse kernels: {source}. Convert with "
            "tf.lite.Optimize.EXPERIMENTAL_SPARSITY, or export by export_litert(sparse=True)."
        )
    form = litert.LiteRT({}, "float32", None, sparse=True)
    replacement = _files.Replacement(overwrite, form.require_replaceable)
    with _files.new_file("path", path, replacement) as draft, tempfile.TemporaryDirectory() as spot:
        old = pathlib.Path(spot) / "old.tflite"
        old.write_bytes(content)
        draft.write_bytes(sparse_litert.settle(content).content)
        before, after = (_outputs(litert.load_litert(file)) for file in (old, draft))
        apart, allowed = _probe.difference(before, after), _ALLOWED * _probe.scale(before)
        if apart > allowed:
            raise ValueError(
                f"The rewritten file returns other values than {source}, by up to {apart:.3g}, and "
                f"{allowed:.3g} is allowed: export the model by export_litert(sparse=True)."
            )
        return sparse_inference.inspected(draft.read_bytes(), {}, str(path))


def _outputs(served: ServedFile) -> list[np.ndarray]:
    """Return what a file returns for examples from U[0, 1); axes of any size have 16."""
    rng = np.random.default_rng(0)
    batch = {}
    for tensor in served.inputs:
        sizes = [16 if size is None else size for size in tensor.shape[1:]]
        first = [_probe.EXAMPLES if tensor.shape[0] is None else tensor.shape[0]]
        batch[tensor.name] = rng.random((*first, *sizes)).astype(tensor.dtype)
    return _probe.outputs(served, batch, "The file")
