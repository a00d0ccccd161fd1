"""One compiled function per model, attack and form of inputs: the last few of each model."""

from __future__ import annotations

import contextlib
import types
import weakref
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tscnc_tf import _keras
from tscnc_tf.attacks import _inputs

# A memory, not a switch: for a model that stays what it is, it holds what would be built again in
# the same way. What a function refers to may change without a sign: hence `forget`.
# Of each model it holds the functions that were used last: a graph takes megabytes.
_KEPT = 8
_COMPILED: weakref.WeakKeyDictionary[Any, dict[Any, Compiled]] = weakref.WeakKeyDictionary()


class Compiled:
    """An attack's `perturb` as one graph for every batch size.

    Args:
        perturb: `(logits_fn, x, y, seed) -> x_adv`.
        recall: returns the model; so that this object need not keep it alive.
        x, y: examples of the inputs; y may be None.
    """

    def __init__(
        self,
        perturb: Callable[..., tf.Tensor],
        recall: Callable[[], Any],
        x: tf.Tensor,
        y: tf.Tensor | None,
    ) -> None:
        forms = [(None, *x.shape[1:]), (2,)] + ([] if y is None else [(None, *y.shape[1:])])
        dtypes = [x.dtype, tf.int32] + ([] if y is None else [y.dtype])
        signature = tuple(map(tf.TensorSpec, forms, dtypes))
        classes: list[int | None] = []

        def run(tensors: tuple[tf.Tensor, ...]) -> tf.Tensor:
            logits_fn = _keras.inference(recall())

            def noting_classes(x: tf.Tensor) -> Any:
                logits = logits_fn(x)
                classes.append(logits.shape[-1] if tf.is_tensor(logits) else None)
                return logits

            images, seed, *labels = tensors
            return perturb(noting_classes, images, labels[0] if labels else None, seed)

        self._function = tf.function(run, input_signature=(signature,))
        self._classes = classes

    def __call__(self, x: tf.Tensor, y: tf.Tensor | None, seed: tf.Tensor) -> tf.Tensor:
        """Run; the labels are held against the number of classes, which is known once traced."""
        concrete = self._function.get_concrete_function()
        if y is not None:
            _inputs.require_classes(y, self._classes[0])
        return concrete((x, seed) if y is None else (x, seed, y))


def forget(model: Any) -> None:
    """Build anew, at next need, what attacks compile of a model; it may have changed inside."""
    owner = model.__self__ if isinstance(model, types.MethodType) else model
    with contextlib.suppress(TypeError):  # of such a model nothing is kept
        _COMPILED.pop(owner, None)


def compiled(
    attack: Any, perturb: Callable[..., tf.Tensor], model: Any, x: tf.Tensor, y: tf.Tensor | None
) -> Compiled:
    """Return the compiled function for this model and attack, built at first need.

    Of a model those of the last attacks are kept. One that can't be referred to weakly, or not be
    hashed, gets a new one at each call.
    """
    _keras.inference(model)  # raises for what is no model; builds its view outside of the graph
    is_method = isinstance(model, types.MethodType)
    owner = model.__self__ if is_method else model
    form = (tuple(x.shape[1:]), x.dtype, None if y is None else (y.shape.rank, y.dtype))
    key = (attack, model.__func__ if is_method else None, form)
    try:
        recall = weakref.WeakMethod(model) if is_method else weakref.ref(model)
        kept = _COMPILED.setdefault(owner, {})
    except TypeError:
        return Compiled(perturb, lambda: model, x, y)
    found = kept.pop(key, None) or Compiled(perturb, recall, x, y)
    kept[key] = found  # as the last one in the order of use
    while len(kept) > _KEPT:
        del kept[next(iter(kept))]
    return found
