"""What a model and its layers are timed on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _keras
from tscnc_tf._keras import models as model_inputs


def fitted(x: Any, batch_size: int) -> Any:
    """Return `batch_size` examples of a batch, by cutting or repeating it, as tensors."""

    def fit(leaf: Any) -> tf.Tensor:
        array = np.asarray(leaf)
        if array.ndim == 0 or len(array) == 0:
            raise ValueError(
                f"x must be a batch of at least one example, (examples, ...), got an array of "
                f"shape {array.shape}."
            )
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        return tf.constant(array[np.arange(batch_size) % len(array)])

    return tf.nest.map_structure(fit, x) if tf.nest.is_nested(x) else fit(x)


def drawn(model: Any, batch_size: int, seed: int) -> Any:
    """Return a batch drawn from U[0, 1) in the structure of the model's inputs."""
    if not _keras.is_graph_model(model):
        raise ValueError(
            f"model {model.name!r} is a subclassed model ({type(model).__name__}), so the shape of "
            "its inputs is not known: pass x=, a batch of inputs as the model takes them."
        )
    generator = np.random.default_rng(seed)

    def draw(symbol: Any) -> tf.Tensor:
        values = model_inputs.draw(symbol, batch_size, generator)
        if values is None:
            raise ValueError(
                f"model {model.name!r} has an input of shape {tuple(symbol.shape)} and dtype "
                f"{tf.as_dtype(symbol.dtype).name}, and only floats of known shape can be drawn: "
                "pass x=, a batch of inputs as the model takes them."
            )
        return tf.constant(values)

    return tf.nest.map_structure(draw, model_inputs.symbols(model))


def input_shapes(layers: Iterable[Any], run: Callable[[], Any]) -> dict[int, tuple[int, ...]]:
    """Run a model once, and return the shape of what each layer was given first, by its id.

    Layers that were not called, or with more than one tensor, are left out.
    """
    shapes: dict[int, tuple[int, ...]] = {}

    def recorded(layer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            leaves = [leaf for leaf in tf.nest.flatten((args, kwargs)) if tf.is_tensor(leaf)]
            if len(leaves) == 1 and leaves[0].shape.is_fully_defined():
                shapes.setdefault(id(layer), tuple(leaves[0].shape))
            return call(*args, **kwargs)

        return record

    with contextlib.ExitStack() as stack:
        for layer in {id(layer): layer for layer in layers}.values():
            stack.enter_context(_attribute(layer, "call", recorded(layer, layer.call)))
        run()
    return shapes


@contextlib.contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put an attribute over an object's own for a while, unseen by Keras' tracking."""
    space, missing = vars(owner), object()
    before = space.get(name, missing)
    space[name] = value
    try:
        yield
    finally:
        if before is missing:
            del space[name]
        else:
            space[name] = before
