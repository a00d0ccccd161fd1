"""What a model returns, as far as its graph tells."""

from __future__ import annotations

from typing import Any

from tscnc_tf._keras import is_graph_model, output_layer, wrappers


def classes(name: str, model: Any) -> int | None:
    """Return the number of logits of a model, None where a subclassed one does not tell.

    Raises:
        ValueError: the model is Sequential or functional, and its outputs are no logits.
    """
    if not is_graph_model(model):
        return None
    shape = model.output_shape
    if not isinstance(shape, tuple) or len(shape) != 2 or shape[-1] is None or shape[-1] < 2:
        raise ValueError(
            f"{name} must return logits of shape (batch, classes) with 2 classes or more, got "
            f"shape {shape}."
        )
    last = output_layer(model)
    last = last.layer if wrappers.is_wrapper(last) else last
    activation = getattr(getattr(last, "activation", None), "__name__", "")
    operation = str(getattr(last, "symbol", type(last).__name__)).rpartition(".")[2].lower()
    ending = activation or operation  # of a layer, or of a TensorFlow function in the graph
    if ending in ("softmax", "sigmoid"):
        raise ValueError(
            f"{name} must return logits, but its last layer {last.name!r} ends in a {ending}: "
            "leave that activation out."
        )
    return shape[-1]
