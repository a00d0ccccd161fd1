"""How much each weight is worth: what pruning ranks.

A criterion is any callable from a weight tensor to scores of the same shape; the lowest go first.
One that is registered with Keras (a class with `get_config`, or a function) is saved with a model.
"""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from tscnc_tf import _configs, _keras

__all__ = ["Magnitude"]


@_keras.register
@dataclasses.dataclass(frozen=True)
class Magnitude(_configs.Configurable):
    """The magnitude of a weight: `|w|`.

    Example:
        >>> import tensorflow as tf
        >>> import tscnc_tf as tscnc
        >>> tscnc.pruning.Magnitude()(tf.constant([-2.0, 1.0])).numpy().tolist()
        [2.0, 1.0]

    Reference:
        Han et al. 2015, arXiv 1506.02626.
    """

    def __call__(self, weight: tf.Tensor) -> tf.Tensor:
        """Return the scores of a weight tensor, float32 or wider."""
        weight = weight if weight.dtype == tf.float64 else tf.cast(weight, tf.float32)
        return tf.abs(weight)
