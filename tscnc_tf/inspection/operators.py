"""Singular values of convolutions as linear maps between images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tscnc_tf import _checks, functional
from tscnc_tf._keras import layers, wrappers

# The approximate maximum of bytes for the transfer matrices of one chunk of frequencies.
_CHUNK = 2**26


def operator_singular_values(
    kernel: Any,
    input_size: int | Sequence[int],
    *,
    layout: str = "standard",
    channel_groups: int = 1,
) -> np.ndarray:
    r"""Return the singular values of a convolution with stride 1 and circular padding.

    `singular_values` reads the kernel as a matrix, which shows how the filters relate to each
    other. This function reads it as a linear map between images. The singular values of the map are
    those of the transfer matrices

    .. math:: \hat K(f) = \sum_t K_t \, e^{-2\pi i \langle f / N,\, t \rangle}

    for all frequencies f of an image of N positions. Zero padding, as in `padding="same"`, gives
    another operator at the border. The circular one approximates it, the better the larger the
    image is. A kernel that is larger than the image is wrapped around.

    Args:
        kernel: `(*positions, in, out)`, with one to three axes of positions; or in one of the other
            layouts of `functional.canonical`.
        input_size: the number of positions along each axis, such as `(32, 32)`; an integer for
            one axis.
        layout: "standard", "transposed" or "depthwise".
        channel_groups: the number of groups of a grouped convolution.

    Returns:
        A float64 vector in descending order, with `prod(input_size) * min(in, out)` entries (per
        group). Its first entry is the operator's spectral norm.

    Raises:
        TypeError: the kernel holds no numbers.
        ValueError: the kernel does not have one to three axes of positions, the input size has
            another number of axes, or the kernel is not finite.

    Reference:
        Sedghi, Gupta & Long 2019, "The singular values of convolutional layers", arXiv 1805.10408.

    Example:
        >>> import numpy as np
        >>> moving_sum = np.ones((2, 1, 1))  # y[t] = x[t] + x[t + 1], around a ring of four
        >>> operator_singular_values(moving_sum, 4).round(3)
        array([2.   , 1.414, 1.414, 0.   ])
    """
    values = np.asarray(kernel)
    if not np.issubdtype(values.dtype, np.number):
        raise TypeError(f"kernel must hold numbers, got {kernel!r}.")
    values = values.astype(np.float64)
    axes = values.ndim - 2
    if not 1 <= axes <= 3:
        raise ValueError(
            "kernel must have one to three axes of positions before its two axes of channels, "
            f"got shape {values.shape}. A dense kernel is its own operator: use singular_values."
        )
    if not np.all(np.isfinite(values)):
        raise ValueError("kernel holds NaN or infinity: it has no singular values.")
    size = tuple(np.atleast_1d(np.asarray(input_size, dtype=object)))
    size = tuple(_checks.integer("input_size", number, minimum=1) for number in size)
    if len(size) != axes:
        raise ValueError(
            f"input_size must have {axes} number(s), one per axis of positions of the kernel of "
            f"shape {values.shape}, got {input_size!r}."
        )
    positions = np.stack(list(np.indices(values.shape[:-2])), axis=-1).reshape(-1, axes)
    frequencies, counts = _half_of_frequencies(size)
    result = []
    for group in functional.canonical(values, layout, channel_groups).numpy():
        chunk = max(1, _CHUNK // (16 * group[0].size))
        for start in range(0, len(frequencies), chunk):
            turns = (frequencies[start : start + chunk] / size) @ positions.T
            transfer = np.tensordot(np.exp(-2j * np.pi * turns), group, axes=1)
            spectrum = np.linalg.svd(transfer, compute_uv=False)
            result.append(np.repeat(spectrum, counts[start : start + chunk], axis=0).ravel())
    return np.sort(np.concatenate(result))[::-1]


def extremes(kernel: layers.Kernel, values: np.ndarray, model: Any) -> tuple[float, float] | None:
    """Return the largest and the smallest singular value of a layer's operator, or None.

    None is for layers other than convolutions with stride 1 and without dilation, and for inputs of
    unknown size.

    Args:
        kernel: the kernel, as found in `model`.
        values: its values, masked.
        model: the model, in which the layer may have a wrapper.
    """
    size = input_size(kernel, model)
    if size is None:
        return None
    spectrum = operator_singular_values(values, size, **kernel.reading)
    return float(spectrum[0]), float(spectrum[-1])


def input_size(kernel: layers.Kernel, model: Any) -> tuple[int, ...] | None:
    """Return the size of the images that a convolution reads, or None (see `extremes`)."""
    layer, rank = kernel.layer, len(kernel.variable.shape)
    strides, dilation = getattr(layer, "strides", None), getattr(layer, "dilation_rate", None)
    if kernel.spec.attribute == "pointwise_kernel" or not 3 <= rank <= 5:
        return None
    if strides is None or dilation is None:
        return None
    if any(math.prod(np.atleast_1d(step).tolist()) != 1 for step in (strides, dilation)):
        return None
    # A wrapped layer is called by its wrapper only, so it may not know its own input.
    owner = {id(w.layer): w for w in wrappers.wrapped_layers(model)}.get(id(layer), layer)
    try:
        shape = tuple(owner.input.shape)
    except (AttributeError, ValueError, RuntimeError):  # not connected, or called on several inputs
        return None
    if len(shape) != rank:
        return None
    size = shape[2:] if layer.data_format == "channels_first" else shape[1:-1]
    return None if None in size else size


def _half_of_frequencies(size: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return one of each pair of frequencies f and -f, `(count, axes)`, and the size of the pair.

    The kernel is real, so both have the same singular values.
    """
    frequencies = np.stack(list(np.indices(size)), axis=-1).reshape(-1, len(size))
    index = np.arange(len(frequencies))
    partner = np.ravel_multi_index(tuple((-frequencies % size).T), size)
    keep = index <= partner
    return frequencies[keep], np.where(index == partner, 1, 2)[keep]
