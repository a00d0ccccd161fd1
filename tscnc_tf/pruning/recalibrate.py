"""Moving statistics of BatchNorm, and the spread of channels, made to fit a pruned network."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _keras, _reports, functional
from tscnc_tf._keras import adapted, gated, masks, models
from tscnc_tf._keras import layers as kernel_layers
from tscnc_tf.pruning.score_pruner import ScorePruner

# The layers whose outputs have a kernel's channels along one axis.
_WITH_CHANNELS = kernel_layers.classes("Dense", *kernel_layers.ALL_CONVOLUTIONS)
_NORMS = (
    *kernel_layers.classes("BatchNormalization"),
    _keras.tf_keras.layers.experimental.SyncBatchNormalization,
)


class _Moments(NamedTuple):
    """The mean and the variance of each channel over data; float64."""

    mean: np.ndarray
    variance: np.ndarray


def recalibrate(model: Any, x: Any, *, dense: Any = None, batch_size: int = 128) -> Any:
    r"""Fit a pruned network's normalisation to what its layers return now; no training.

    Pruning changes the distribution of what each layer returns; after one-shot pruning at a high
    sparsity the moving statistics of BatchNorm no longer fit, and accuracy falls to chance. This
    sets the moving mean and variance of each BatchNormalization to those of its inputs on `x`, one
    layer after the other in the order in which they are called, each with those before it fixed.

    Given the dense network, first each channel of a dense or convolutional layer (grouped,
    transposed, depthwise and separable ones too, the last by their pointwise kernels) gets the mean
    and variance that it has there: with z the channel before its activation,

    .. math:: w \leftarrow \frac{\sigma_{\text{dense}}}{\sigma}\,w, \qquad
        b \leftarrow b + \mu_{\text{dense}} - \mu'

    where :math:`\mu'` is its mean with the new w (the latter where there is a bias). A channel that
    does not vary stays as it is. Zeros stay zeros. It is useful before fine-tuning, and alone after
    `prune_now`. The model runs once for each of these layers.

    Args:
        model: a built model of either Keras, pruned or stripped; changed in place.
        x: inputs of the model, `(examples, ...)`: a few hundred training examples.
        dense: the network before pruning, with the same layers by name; None to fit the
            statistics of BatchNorm only.
        batch_size: examples at a time; the result does not depend on it, but for rounding.

    Returns:
        The model.

    Raises:
        TypeError: `model` or `dense` is no Keras model.
        ValueError: one of them is not built, the layers of `dense` are others, there is nothing
            to fit, `x` is no input of the model, or a layer returns NaN or infinity. Or `dense` is
            given for a model that has gates, or whose scores are trained.

    Warns:
        UserWarning: `dense` is given, and layers of other kinds have weights: with their names.

    Example:
        >>> import keras, numpy as np
        >>> import tscnc_tf as tscnc
        >>> layers = [keras.layers.Dense(8), keras.layers.BatchNormalization()]
        >>> model = keras.Sequential([keras.Input((4,)), *layers])
        >>> model = tscnc.prune_now(model, 0.5)
        >>> x = np.random.default_rng(0).normal(size=(256, 4)).astype("float32")
        >>> model = tscnc.pruning.recalibrate(model, x)
        >>> bool(np.abs(np.mean(model(x))) < 1e-3)
        True

    Reference:
        For the statistics: arXiv 2502.15790; for the variances: arXiv 2605.21426.
    """
    _keras.library("model", model)
    _keras.require_built("model", model)
    batch_size = _checks.integer("batch_size", batch_size, minimum=1)
    inputs = np.asarray(x)
    if not inputs.shape or not len(inputs):
        raise ValueError(f"x must hold inputs, (examples, ...), at least one, got {x!r}.")
    batches = [inputs[start : start + batch_size] for start in range(0, len(inputs), batch_size)]
    try:
        model(batches[0][:1], training=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"x must hold inputs of model {model.name!r}, got shape {inputs.shape} of "
            f"{inputs.dtype}: {error}"
        ) from None
    if dense is not None:
        _match_channels(model, dense, batches)
    norms = [layer for layer in _unique(model) if isinstance(layer, _NORMS)]
    if not norms and dense is None:
        raise ValueError(
            f"model {model.name!r} has no BatchNormalization, so there is nothing to fit. Pass the "
            "network before pruning as dense= to fit the variance of each channel."
        )
    for layer in _in_order(model, norms, batches[0]):
        moments = _moments(model, layer, batches, _inputs)
        layer.moving_mean.assign(moments.mean)
        layer.moving_variance.assign(moments.variance)
    return model


def _match_channels(model: Any, dense: Any, batches: list[np.ndarray]) -> None:
    """Give each channel of dense and convolutional layers the moments of the dense network."""
    _keras.library("dense", dense)
    _keras.require_built("dense", dense)
    gated.require_none(model, "recalibrate")
    gated.require_none(dense, "recalibrate")
    if any(isinstance(pruner, ScorePruner) for pruner in masks.pruners(model)):
        raise ValueError(
            f"model {model.name!r} still has its scores trained, by which its masks, and so the "
            "moments of its channels, go on changing: call pruning.freeze_mask(model) first, then "
            "recalibrate(model, x, dense=...)."
        )
    own, others = _matched(model), _matched(dense)
    shapes = [
        {name: tuple(kernel.variable.shape) for name, kernel in each.items()}
        for each in (own, others)
    ]
    if shapes[0] != shapes[1] or not own:
        raise ValueError(
            "dense must be the network that was pruned, with the same dense and convolutional "
            f"layers by name and shape: model has {shapes[0]}, dense {shapes[1]}."
        )
    names = {id(kernel.layer): name for name, kernel in own.items()}
    order = _in_order(model, [kernel.layer for kernel in own.values()], batches[0])
    _warn_of_others(model, order)
    for name in (names[id(layer)] for layer in order):
        kernel, layer = own[name], own[name].layer
        wanted = _moments(dense, others[name].layer, batches, _before_activation)
        found = _moments(model, layer, batches, _before_activation)
        varies = (found.variance > 0) & (wanted.variance > 0)
        scale = np.where(varies, np.sqrt(wanted.variance / np.where(varies, found.variance, 1)), 1)
        kernel.variable.assign(_scaled(kernel, scale))
        if layer.use_bias:
            bias = np.asarray(layer.bias)
            shift = np.where(varies, wanted.mean - scale * (found.mean - bias) - bias, 0)
            layer.bias.assign(bias + shift.astype(bias.dtype))


def _matched(model: Any) -> dict[str, kernel_layers.Kernel]:
    """Return the kernels whose outputs are channels of layers, by the layers' unique names."""
    found = []
    for layer in _unique(model):
        if isinstance(layer, _WITH_CHANNELS) and not adapted.state(layer):
            found += list(kernel_layers.kernels(layer))[-1:]  # of two, the pointwise one
    return dict(zip(_reports.unique(kernel.layer.name for kernel in found), found, strict=True))


def _warn_of_others(model: Any, matched: list[Any]) -> None:
    """Warn of the layers of a model that have weights of rank 2 or more, but for those matched."""
    every = {id(layer): layer for _, layer, _, _ in models.owned(model, lambda _: False)}
    left = [layer for layer in every.values() if not any(layer is each for each in matched)]
    if left:
        listing = ", ".join(f"{layer.name!r} ({type(layer).__name__})" for layer in left)
        warnings.warn(
            f"The channels of these layers stay as they are: {listing}. Only those of dense and "
            "convolutional layers that the model calls, with kernels in their plain form, are "
            "given the moments of the dense network.",
            UserWarning,
            stacklevel=4,
        )


def _scaled(kernel: kernel_layers.Kernel, scale: np.ndarray) -> tf.Tensor:
    """Return a kernel whose output channels are multiplied by factors, in the layer's order."""
    values = functional.canonical(kernel.variable, **kernel.reading)
    factors = tf.reshape(tf.cast(scale, values.dtype), (values.shape[0], 1, 1, -1))
    return functional.restore(values * factors, kernel.variable.shape, kernel.spec.layout)


def _inputs(layer: Any, x: Any, call: Callable[[], Any]) -> tuple[Any, Any, int]:
    """Return the output of a BatchNorm, its input, and the axis of that's channels."""
    axis = layer.axis
    return call(), x, axis if isinstance(axis, int) else axis[0]


def _before_activation(layer: Any, x: Any, call: Callable[[], Any]) -> tuple[Any, Any, int]:  # noqa: ARG001
    """Return the output of a layer, what its activation takes, and the axis of that's channels."""
    activation = layer.activation
    layer.activation = None
    try:
        values = call()
    finally:
        layer.activation = activation
    is_first = getattr(layer, "data_format", "channels_last") == "channels_first"
    return (values if activation is None else activation(values)), values, 1 if is_first else -1


def _moments(
    model: Any,
    layer: Any,
    batches: list[np.ndarray],
    measured: Callable[[Any, Any, Callable[[], Any]], tuple[Any, Any, int]],
) -> _Moments:
    """Return the moments of what is measured at a layer in all its calls on all batches."""
    count, total, squares = 0, np.zeros(1), np.zeros(1)

    def replaced(original: Callable[..., Any], x: Any, *args: Any, **options: Any) -> Any:
        nonlocal count, total, squares
        output, values, axis = measured(layer, x, lambda: original(x, *args, **options))
        rows = np.moveaxis(np.asarray(values, np.float64), axis, -1)
        rows = rows.reshape(-1, rows.shape[-1])
        count += len(rows)
        total = total + rows.sum(axis=0)
        squares = squares + np.square(rows).sum(axis=0)
        return output

    with _watched(layer, replaced):
        for batch in batches:
            model(tf.constant(batch), training=False)
    mean = total / count
    if not np.isfinite(squares).all():
        raise ValueError(
            f"x must give finite values in the layers of model {model.name!r}, got NaN or infinity "
            f"at {layer.name!r}: look for NaN in x and in the weights before it."
        )
    return _Moments(mean, np.maximum(squares / count - mean**2, 0.0))


def _in_order(model: Any, layers: list[Any], batch: np.ndarray) -> list[Any]:
    """Return layers in the order in which the model calls them first; those that it does call."""
    order: list[Any] = []

    def noting(layer: Any) -> Callable[..., Any]:
        def replaced(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
            if not any(layer is each for each in order):
                order.append(layer)
            return original(*args, **options)

        return replaced

    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_watched(layer, noting(layer)))
        model(tf.constant(batch[:1]), training=False)
    return order


@contextlib.contextmanager
def _watched(layer: Any, replaced: Callable[..., Any]) -> Iterator[None]:
    """Let a function stand in for a layer's `call`, which it gets as its first argument."""
    original = layer.call
    # Past Keras, which would track what is set.
    vars(layer)["call"] = lambda *args, **options: replaced(original, *args, **options)
    try:
        yield
    finally:
        del vars(layer)["call"]


def _unique(model: Any) -> list[Any]:
    """Return the layers of a model, each once."""
    return list({id(layer): layer for layer in kernel_layers.flatten(model)}.values())
