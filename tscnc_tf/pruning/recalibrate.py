"""Recalibration of a pruned network: moving statistics of BatchNorm, and moments of channels."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _keras, _reports, functional
from tscnc_tf._keras import gated, masks, models
from tscnc_tf._keras import layers as kernel_layers
from tscnc_tf.pruning.score_pruner import ScorePruner

# Layers whose output channels are those of a kernel, along one axis.
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
    r"""Fit the normalisation of a pruned network to its present activations, without training.

    Pruning changes the distribution of each layer's outputs. After one-shot pruning at a high
    sparsity the moving statistics of BatchNorm no longer fit, and accuracy falls to chance. This
    function sets the moving mean and variance of each BatchNormalization to those of its inputs on
    `x`, in the order in which the model calls them: each with the new statistics of those before.

    Given the dense network, it first gives each channel of a dense or convolutional layer the mean
    and variance of that channel in the dense network. This includes grouped, transposed, depthwise
    and separable convolutions, the last by their pointwise kernels. With :math:`\mu` and
    :math:`\sigma` the mean and deviation of the channel before its activation:

    .. math:: w \leftarrow \frac{\sigma_{\text{dense}}}{\sigma}\,w, \qquad
        b \leftarrow b + \mu_{\text{dense}} - \mu'

    where :math:`\mu'` is the mean with the new w. The second applies to layers with a bias. A
    constant channel is not changed. Zeros stay zeros. This is useful before fine-tuning, and alone
    after `prune_now`. The model runs once for each of these layers.

    Args:
        model: a built model of either Keras, pruned or stripped; changed in place.
        x: inputs of the model, `(examples, ...)`: a few hundred training examples.
        dense: the network before pruning, with the same layers by name; None to fit only the
            statistics of BatchNorm.
        batch_size: examples per batch; except for rounding, the result does not depend on it.

    Returns:
        The model.

    Raises:
        TypeError: `model` or `dense` is no Keras model.
        ValueError: one of them is not built, `dense` has different layers, there is nothing to fit,
            `x` is no input of the model, or a layer returns NaN or infinity. Or `dense` is given
            for a model that has gates, or whose scores are trained.

    Warns:
        UserWarning: `dense` is given, and some layers with weights are of other kinds.

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
            f"model {model.name!r} still has its scores trained, so its masks and the moments of "
            "its channels will change again: call pruning.freeze_mask(model) first, then "
            "recalibrate(model, x, dense=...)."
        )
    if {id(each) for each in model.weights} & {id(each) for each in dense.weights}:
        raise ValueError(
            "dense must be another network than model, got one with the same weights. Pruning is "
            "in place: pass a clone that was made before it, keras.models.clone_model(model), "
            "with the weights of that time."
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
    """Return the kernels that make the channels of layers, by the layers' unique names."""
    found = []
    for layer in _unique(model):
        if isinstance(layer, _WITH_CHANNELS) and not kernel_layers.adaptation(layer):
            found += list(kernel_layers.kernels(layer))[-1:]  # of a separable layer, the pointwise
    return dict(zip(_reports.unique(kernel.layer.name for kernel in found), found, strict=True))


def _warn_of_others(model: Any, matched: list[Any]) -> None:
    """Warn of other layers than `matched` that have weights of rank 2 or more."""
    every = {id(layer): layer for _, layer, _, _ in models.owned(model, lambda _: False)}
    left = [layer for layer in every.values() if not any(layer is each for each in matched)]
    if left:
        listing = ", ".join(f"{layer.name!r} ({type(layer).__name__})" for layer in left)
        warnings.warn(
            f"The channels of these layers stay as they are: {listing}. The moments of the dense "
            "network are given only to dense and convolutional layers that the model calls, "
            "without LoRA and quantization.",
            UserWarning,
            stacklevel=4,
        )


def _scaled(kernel: kernel_layers.Kernel, scale: np.ndarray) -> tf.Tensor:
    """Return a kernel with its output channels multiplied by factors."""
    values = functional.canonical(kernel.variable, **kernel.reading)
    factors = tf.reshape(tf.cast(scale, values.dtype), (values.shape[0], 1, 1, -1))
    return functional.restore(values * factors, kernel.variable.shape, kernel.spec.layout)


def _inputs(layer: Any, x: Any, call: Callable[[], Any]) -> tuple[Any, Any, int]:
    """Return the output of a BatchNorm layer, its input, and the channel axis of the input."""
    axis = layer.axis
    return call(), x, axis if isinstance(axis, int) else axis[0]


def _before_activation(layer: Any, x: Any, call: Callable[[], Any]) -> tuple[Any, Any, int]:  # noqa: ARG001
    """Return the output of a layer, its values before the activation, and their channel axis."""
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
    values_of: Callable[[Any, Any, Callable[[], Any]], tuple[Any, Any, int]],
) -> _Moments:
    """Return the moments of a layer's `_inputs` or `_before_activation` values over all calls."""
    count, total, squares = 0, np.zeros(1), np.zeros(1)

    def replaced(original: Callable[..., Any], x: Any, *args: Any, **options: Any) -> Any:
        nonlocal count, total, squares
        output, values, axis = values_of(layer, x, lambda: original(x, *args, **options))
        rows = np.moveaxis(np.asarray(values, np.float64), axis, -1)
        rows = rows.reshape(-1, rows.shape[-1])
        count += len(rows)
        total = total + rows.sum(axis=0)
        squares = squares + np.square(rows).sum(axis=0)
        return output

    with _with_call(layer, replaced):
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
    """Return those of some layers that a model calls, in the order of their first calls."""
    order: list[Any] = []

    def recorder(layer: Any) -> Callable[..., Any]:
        def replaced(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
            if not any(layer is each for each in order):
                order.append(layer)
            return original(*args, **options)

        return replaced

    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_with_call(layer, recorder(layer)))
        model(tf.constant(batch[:1]), training=False)
    return order


@contextlib.contextmanager
def _with_call(layer: Any, replaced: Callable[..., Any]) -> Iterator[None]:
    """Replace a layer's `call` by a function that is given the original as its first argument."""
    original = layer.call
    # Set in `vars`, as Keras tracks attributes.
    vars(layer)["call"] = lambda *args, **options: replaced(original, *args, **options)
    try:
        yield
    finally:
        del vars(layer)["call"]


def _unique(model: Any) -> list[Any]:
    """Return the layers of a model, each once."""
    return list({id(layer): layer for layer in kernel_layers.flatten(model)}.values())
