"""How many operations the kernels of convolutions and dense layers take, from shapes alone."""

from __future__ import annotations

import math
from typing import Any

from tscnc_tf._keras import layers as kernel_layers
from tscnc_tf.pruning.compaction.graph import Call


def count(call: Call, layer: Any) -> int | None:
    """Return 2 · (entries of the kernels) · (positions) for one example; None if not counted.

    Args:
        call: where the layer, or the one that it stands for, is used. Only its places are looked
            at, which are the same before and after.
        layer: the layer whose kernels count.
    """
    name = type(layer).__name__
    convolutions = (*kernel_layers.CONVOLUTIONS, *kernel_layers.DEPTHWISE, *kernel_layers.SEPARABLE)
    if name in convolutions:
        positions = call.outputs[0].positions
    elif name == "Dense" or name in kernel_layers.TRANSPOSED:
        positions = call.inputs[0].positions
    else:
        return None
    if positions is None or getattr(layer, "data_format", None) == "channels_first":
        return None
    kernels = ("kernel", "depthwise_kernel", "pointwise_kernel")
    present = [getattr(layer, kernel, None) for kernel in kernels]
    entries = {id(kernel): math.prod(kernel.shape) for kernel in present if kernel is not None}
    return 2 * sum(entries.values()) * positions
