"""Slots, averages and step counts of the optimizers of either Keras."""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from tscnc_tf._keras import keras, tf_keras
from tscnc_tf._keras.flavours import sum_over_replicas, tensor_variable

Pairs = list[tuple[Any, Any]]  # (gradient, weight)

_SUMS = "_accumulated_gradients"  # Keras 3: sums of gradients since the last step

_INTERCEPTED: weakref.WeakKeyDictionary[Any, dict[Any, list[Any]]] = weakref.WeakKeyDictionary()

_STEP: contextvars.ContextVar[Any] = contextvars.ContextVar("step", default=None)


def innermost(optimizer: Any) -> Any:
    """Return the optimizer inside a LossScaleOptimizer, or the optimizer itself."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def companions(optimizer: Any, variables: Sequence[Any], *, sums: bool = True) -> list[list[Any]]:
    """Return an optimizer's state for each of some weights: the variables of the weight's shape.

    These are slots (momentum, second moments), accumulated gradients and moving averages, which
    optimizers hold in lists in the order of the trainable variables.

    Args:
        optimizer: an optimizer of either Keras, or None.
        variables: weights; the state of one that the optimizer does not train is empty.
        sums: whether to include accumulated gradients.
    """
    if optimizer is None:
        return [[] for _ in variables]
    optimizer = innermost(optimizer)
    if is_legacy(optimizer):
        names = optimizer.get_slot_names()

        def slots(variable: Any) -> list[Any]:
            try:
                return [optimizer.get_slot(variable, name) for name in names]
            except KeyError:  # it does not train this weight
                return []

        return [slots(variable) for variable in variables]
    positions = _positions(optimizer)
    lists = [
        kept
        for name, kept in vars(optimizer).items()
        if isinstance(kept, list | tuple) and len(kept) == len(positions)
        if sums or name != _SUMS
    ]

    def kept_for(variable: Any) -> list[Any]:
        position = positions.get(key(variable))
        return [] if position is None else _alike(variable, [kept[position] for kept in lists])

    return [kept_for(variable) for variable in variables]


def _alike(variable: Any, kept: list[Any]) -> list[Any]:
    """Return the objects that are variables of a weight's shape, each once."""
    found = {}
    for companion in kept:
        if not isinstance(companion, tf.Variable | keras.Variable):
            continue
        if key(companion) != key(variable) and tuple(companion.shape) == tuple(variable.shape):
            found[key(companion)] = companion
    return list(found.values())


def average(optimizer: Any, variable: Any) -> Any:
    """Return an optimizer's moving average of a weight, None if there is none."""
    optimizer = innermost(optimizer)
    averages: Any = getattr(optimizer, "_model_variables_moving_average", None)
    position = _positions(optimizer).get(key(variable)) if averages else None
    return None if position is None else averages[position]


def restart_averages(optimizer: Any, variables: Sequence[Any]) -> None:
    """Reset an optimizer's moving averages of some weights to the current weights."""
    for variable in variables:
        averaged = average(optimizer, variable)
        if averaged is not None:
            tensor_variable(averaged).assign(tf.convert_to_tensor(tensor_variable(variable)))


def is_optimizer(obj: Any) -> bool:
    """Return whether an object is an optimizer of either Keras."""
    kinds = (
        keras.optimizers.Optimizer,
        tf_keras.optimizers.Optimizer,
        tf_keras.optimizers.legacy.Optimizer,
    )
    return isinstance(obj, kinds)


def require(optimizer: Any) -> Any:
    """Return an optimizer; raise a TypeError for anything else."""
    if not is_optimizer(optimizer):
        raise TypeError(f"optimizer must be an optimizer of Keras, got {optimizer!r}.")
    return optimizer


def require_pairs(gradients_and_variables: Any) -> Pairs:
    """Return pairs of a gradient and a variable as a list.

    Raises:
        TypeError: they are no such pairs, or there are none.
    """
    try:
        pairs = [(gradient, variable) for gradient, variable in gradients_and_variables]
    except (TypeError, ValueError):
        pairs = []
    if not pairs or not all(
        isinstance(variable, tf.Variable | keras.Variable) for _, variable in pairs
    ):
        raise TypeError(
            "gradients_and_variables must be pairs of a gradient and a variable, got "
            f"{gradients_and_variables!r}."
        )
    return pairs


def held(model: Any) -> list[Any]:
    """Return the optimizers in a model's attributes, the compiled one first."""
    found = [getattr(model, "optimizer", None), *vars(model).values()]
    return list({id(each): each for each in found if is_optimizer(each)}.values())


def trainer_of(model: Any, variables: list[Any]) -> Any:
    """Return the first optimizer of a model that trains one of some weights, None if none does."""
    return next((each for each in held(model) if trains(each, variables)), None)


def is_legacy(optimizer: Any) -> bool:
    """Return whether an optimizer is a legacy one of tf_keras."""
    return isinstance(innermost(optimizer), tf_keras.optimizers.legacy.Optimizer)


def build(optimizer: Any, variables: list[Any]) -> None:
    """Create an optimizer's variables for some weights, unless they exist."""
    if isinstance(optimizer, keras.optimizers.Optimizer) and optimizer.built:
        return
    with tf.init_scope():
        if isinstance(optimizer, tf_keras.optimizers.legacy.Optimizer):
            optimizer._create_all_weights(variables)
        else:
            optimizer.build(variables)


@contextlib.contextmanager
def intercept(
    optimizer: Any,
    on_step: Callable[[Any, Pairs, Callable[[Pairs], Any]], Any],
    on_finalize: Callable[[Callable[[], Any]], Any] | None = None,
) -> Iterator[None]:
    """Call functions in place of an optimizer's step and finalization, within this context.

    Keras' own training step computes the gradients and calls the optimizer in one statement. This
    intercepts the call for any `train_step` of a model.

    Args:
        optimizer: of either Keras; two methods of the object are replaced, while its class,
            configuration and variables do not change.
        on_step: `on_step(optimizer, pairs, step)` is called for each step with the pairs (gradient,
            weight), and must call `step(pairs)`, the optimizer's own step. A function that is
            already registered is not called twice.
        on_finalize: `on_finalize(finalize)` is called when training ends, and must call
            `finalize()`, which replaces weights by their averages. None not to intercept it.
    """
    users = _INTERCEPTED.setdefault(optimizer, {})
    if on_step not in users:
        users[on_step] = [0, _replace(optimizer, on_step, on_finalize)]
    users[on_step][0] += 1
    try:
        yield
    finally:  # may run late, when the generator of an interrupted training is collected
        users[on_step][0] -= 1
        if not users[on_step][0]:
            users.pop(on_step)[1]()


def _replace(optimizer: Any, on_step: Any, on_finalize: Any) -> Callable[[], None]:
    """Replace the optimizer's methods for `intercept`; return a function that restores them."""
    is_keras_3 = isinstance(optimizer, keras.optimizers.Optimizer)
    name = "apply" if is_keras_3 else "apply_gradients"
    own_step = getattr(optimizer, name)
    own_end = getattr(optimizer, "finalize_variable_values", None)  # not in legacy optimizers

    def apply(grads: Any, trainable_variables: Any = None) -> Any:
        known = optimizer._trainable_variables
        variables = known if trainable_variables is None else trainable_variables
        pairs = list(zip(grads, variables, strict=True))
        return on_step(optimizer, pairs, lambda pairs: own_step(*zip(*pairs, strict=True)))

    def apply_gradients(grads_and_vars: Any, *args: Any, **kwargs: Any) -> Any:
        pairs = list(grads_and_vars)
        return on_step(optimizer, pairs, lambda pairs: own_step(pairs, *args, **kwargs))

    replaced: dict[str, Any] = {name: apply if is_keras_3 else apply_gradients}
    if own_end is not None and on_finalize is not None:
        replaced["finalize_variable_values"] = lambda var_list: on_finalize(
            lambda: own_end(var_list)
        )
    before = {each: vars(optimizer)[each] for each in replaced if each in vars(optimizer)}
    vars(optimizer).update(replaced)  # bypasses Keras' tracking

    def restore() -> None:
        for each in replaced:
            del vars(optimizer)[each]
        vars(optimizer).update(before)

    return restore


def trains(optimizer: Any, variables: list[Any]) -> bool:
    """Return whether an object is an optimizer built for one of these weights."""
    if isinstance(optimizer, tf_keras.optimizers.legacy.Optimizer):
        return True  # it has no list of its weights
    if not is_optimizer(optimizer):
        return False
    positions = _positions(innermost(optimizer))
    return any(key(variable) in positions for variable in variables)


def iterations(optimizer: Any) -> tf.Tensor:
    """Return the number of steps that an optimizer has taken, int64."""
    return tf.cast(tf.convert_to_tensor(innermost(optimizer).iterations), tf.int64)


def loss_scale(optimizer: Any) -> Any:
    """Return the loss scale: the factor by which an optimizer's incoming gradients are multiplied.

    It is 1 for optimizers of tf_keras, whose incoming gradients are unscaled.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return tf.convert_to_tensor(optimizer.dynamic_scale)
    return getattr(optimizer, "loss_scale_factor", None) or 1.0


def batches(optimizer: Any) -> tf.Tensor:
    """Return the number of batches whose gradients an optimizer has received, int64.

    It exceeds `iterations` with gradient accumulation in Keras 3.
    """
    optimizer = innermost(optimizer)
    given = getattr(optimizer, "_iterations", optimizer.iterations)
    return tf.cast(tf.convert_to_tensor(given), tf.int64)


@contextlib.contextmanager
def in_step(step: Any) -> Iterator[None]:
    """Compute in this context for the training step of this number, an integer tensor.

    Regularizers that are computed in one of k steps use the number.
    """
    token = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(token)


def step_in_progress() -> Any:
    """Return the number of the training step of `in_step`; None outside of that context."""
    return _STEP.get()


def _positions(optimizer: Any) -> dict[Any, int]:
    """Return the index of each weight in an optimizer's lists; empty if it is not built."""
    if isinstance(optimizer, keras.optimizers.Optimizer):
        known = getattr(optimizer, "_trainable_variables", None) or []
        return {key(variable): index for index, variable in enumerate(known)}
    return dict(getattr(optimizer, "_index_dict", {}))


def summed_up(optimizer: Any, gradients: list[Any], variables: list[Any]) -> list[Any]:
    """Return gradients summed over replicas, and over batches since an optimizer's last step.

    A loss scale is removed only if the gradients of several batches are accumulated.

    Args:
        optimizer: of either Keras, before its step.
        gradients: of a batch, dense; None where there is none.
        variables: the weights of the gradients.
    """
    sums = getattr(innermost(optimizer), _SUMS, None)
    if sums:
        positions = _positions(innermost(optimizer))
        scale = optimizer.scale_loss(tf.ones(()))
        pairs = zip(gradients, variables, strict=True)
        gradients = [
            g if g is None else g / scale + tensor_variable(sums[positions[key(variable)]])
            for g, variable in pairs
        ]
    known = [gradient for gradient in gradients if gradient is not None]
    found = iter(sum_over_replicas(known))
    return [gradient if gradient is None else next(found) for gradient in gradients]


def key(variable: Any) -> Any:
    """Return the unique id of a variable, which is the same for all objects that wrap it."""
    return getattr(tensor_variable(variable), "_unique_id", None)


def reset_companions(
    strategy: Any, optimizer: Any, variable: Any, value: Any, past: Any = True
) -> None:
    """Reset an optimizer's state for a weight to its initial values.

    Args:
        strategy: the strategy that updates variables; see `flavours.update_everywhere`.
        optimizer: of either Keras.
        variable: the weight.
        value: the initial value of moving averages of the weight.
        past: whether the optimizer has taken steps, so that there is state to reset; a scalar,
            possibly a tensor.
    """
    averaged = average(optimizer, variable)
    for companion in companions(optimizer, [variable])[0]:
        variable = tensor_variable(companion)
        if companion is averaged:
            strategy.extended.update(variable, assign, args=(tensor_variable(value),))
        else:
            strategy.extended.update(variable, _reset, args=(past,))


def assign(variable: Any, value: Any) -> Any:
    """Set a variable to a value; for `strategy.extended.update`."""
    return variable.assign(value)


def _reset(variable: Any, past: Any) -> Any:
    value = tf.convert_to_tensor(variable)
    return variable.assign(tf.where(past, tf.zeros_like(value), value))
