"""Differences of the two Keras versions in training, callbacks, classes and variables."""

from __future__ import annotations

import contextlib
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf

from tscnc_tf import _keras
from tscnc_tf._keras import PACKAGE, keras, layers, tf_keras

_TRAINERS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def subclass_of_library(cls: type, public: type, kind: type) -> type:
    """Return the class to instantiate for one Keras.

    Args:
        cls: the class that was called.
        public: the class that users know, of no Keras.
        kind: the subclass of `public` for the Keras.

    Returns:
        `kind` for `public`, and `cls` if it is a subclass of `kind`.

    Raises:
        TypeError: `cls` is a user's subclass of `public`, and not of `kind`.
    """
    if cls is public:
        return kind
    if not issubclass(cls, kind):
        raise TypeError(
            f"{cls.__name__} derives from {public.__name__}, which is of no Keras by itself: "
            f"derive it from {kind.__module__}.{kind.__qualname__} for this one."
        )
    return cls


def registered_as(name: str) -> Callable[[type], type]:
    """Return a class decorator for a pair of classes, one per Keras, with one registered name.

    It registers the class by that name in its Keras, and sets `__name__`, from which Keras derives
    the names of layers, and of weights in `.keras` files. `__qualname__`, by which pickles find the
    class, is not changed.
    """

    def decorate(cls: type) -> type:
        cls.__name__ = name
        return library_of(cls).saving.register_keras_serializable(PACKAGE)(cls)

    return decorate


def library_of(cls: type) -> types.ModuleType:
    """Return the Keras that a class of models, layers or optimizers belongs to."""
    is_keras_3 = issubclass(cls, keras.layers.Layer | keras.optimizers.Optimizer)
    return keras if is_keras_3 else tf_keras


class Trainer:
    """Mixin of models that train another one, `model`, which is pruned and exported."""

    model: Any


def require_network(model: Any) -> types.ModuleType:
    """Return the Keras of a model; raise a ValueError for a trainer around one."""
    library = _keras.library("model", model)
    if isinstance(model, Trainer):
        raise ValueError(
            "model must be the network itself, not the trainer: pass trainer.model, and build a "
            "trainer around the returned model to train it."
        )
    return library


class Callback(tf_keras.callbacks.Callback, keras.callbacks.Callback):
    """Base of callbacks that `fit` of either Keras takes; `self.model` is the model in training."""

    model: Any = None  # in Keras 3 a property without a setter

    def __init__(self) -> None:
        keras.callbacks.Callback.__init__(self)
        tf_keras.callbacks.Callback.__init__(self)

    def set_model(self, model: Any) -> None:
        """Set the model; called by Keras."""
        self.model = model


def tensor_variable(variable: Any) -> Any:
    """Return the `tf.Variable` behind a variable of either Keras."""
    return variable.value if isinstance(variable, keras.Variable) else variable


@contextlib.contextmanager
def depending_on(values: Any) -> Iterator[None]:
    """Make all operations of a graph in this context depend on these values.

    At the end of a dataset of unknown length a compiled step fails to fetch its data. Without this
    dependency it would still run all operations that need no data, such as counting the step or
    renewing masks.

    Args:
        values: tensors and operations in any structure. Outside of a graph, nothing changes.
    """
    found = tf.nest.flatten(values, expand_composites=True)
    before = [each for each in found if tf.is_tensor(each) or isinstance(each, tf.Operation)]
    with tf.control_dependencies(before), tf.variable_creator_scope(_made_independently):
        yield


def _made_independently(make: Callable[..., Any], **arguments: Any) -> Any:
    """Create a variable, such as one of a metric, without control dependencies."""
    with tf.control_dependencies(None):
        return make(**arguments)


def depending_on_batch(model: Any, data: Any) -> contextlib.AbstractContextManager[Any]:
    """Make all operations of a model's training step depend on its batch.

    A function that XLA compiles as a whole does not run without its arguments.
    """
    return contextlib.nullcontext() if model.jit_compile else depending_on(data)


def register_trainer(trainer: Any, *models: Any) -> None:
    """Register a model that trains others, or parts of them, in its own compiled steps.

    Its steps are compiled again if it was not registered for all of them before.
    """
    is_new = False
    for model in models:
        for part in layers.flatten(model):
            if isinstance(part, keras.Model | tf_keras.Model) and part is not trainer:
                known = _TRAINERS.setdefault(part, weakref.WeakSet())
                is_new |= trainer not in known
                known.add(trainer)
    if is_new:
        reset_functions(trainer)


def trainers(model: Any) -> list[Any]:
    """Return the trainers registered for a model, or for a model that it is a part of."""
    return list(_TRAINERS.get(model, ()))


def reset_functions(model: Any) -> None:
    """Recompile the training and test steps of a model and of its trainers at their next call.

    `fit` may be running: it calls `model.train_function` at each step, so the attribute is set to a
    function that compiles the step when it is called. (A running evaluation of tf_keras finishes
    with the old step, as it reads the attribute once.)

    Args:
        model: of either Keras; nothing changes for a model that has not compiled its steps yet.
    """
    for each in (model, *trainers(model)):
        for name in ("train_function", "test_function"):
            if getattr(each, name, None) is not None:
                setattr(each, name, _compiled_when_called(each, name))


def _compiled_when_called(model: Any, name: str) -> Callable[..., Any]:
    def step(*args: Any) -> Any:
        function = getattr(model, name)
        if function is step or function is None:  # else it was compiled in the meantime
            setattr(model, name, None)
            made = getattr(model, f"make_{name}")()
            if made is not None:  # tf_keras returns it, Keras 3 sets it
                setattr(model, name, made)
            function = getattr(model, name)
        return function(*args)

    return step


def update_everywhere(model: Any, update: Callable[[Any], None]) -> None:
    """Call `update(strategy)` in a context in which it can change variables on all devices.

    Works eagerly, in a graph, under XLA, and in the replica context of a distribution strategy.

    Args:
        model: a Keras model, for the strategy that its variables were made under.
        update: must change variables by `strategy.extended.update(variable, function, args)`.
    """
    context = tf.distribute.get_replica_context()
    if not tf.distribute.has_strategy():  # plain code, maybe on a model made under a strategy
        with model.distribute_strategy.scope():
            update(model.distribute_strategy)
    elif context is None:
        update(tf.distribute.get_strategy())
    else:
        context.merge_call(update)


def is_distributed(model: Any) -> bool:
    """Return whether a model was made under a distribution strategy, of one device or several."""
    return not type(model.distribute_strategy).__name__.startswith("_Default")


def require_one_worker(model: Any) -> None:
    """Raise if a Keras 3 model would be trained by several workers.

    Raises:
        NotImplementedError: it was made under `MultiWorkerMirroredStrategy` with several workers.
    """
    if not isinstance(model, keras.Model):
        return
    strategy = model.distribute_strategy
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return
    workers = sum(map(len, strategy.cluster_resolver.cluster_spec().as_dict().values()))
    if workers > 1:
        raise NotImplementedError(
            f"model {model.name!r} is a Keras 3 model, whose fit fails under "
            f"MultiWorkerMirroredStrategy (here {workers} workers), with and without this package: "
            "build it of tf_keras.layers, or train on the devices of one machine by "
            "MirroredStrategy."
        )


def require_xla(model: Any) -> None:
    """Raise if XLA would compile the steps of a model that is mirrored on several CPU devices.

    Raises:
        ValueError: `jit_compile` is set for such a model.
    """
    if not (model.jit_compile and is_distributed(model)):
        return
    devices = model.distribute_strategy.extended.worker_devices
    kinds = {tf.DeviceSpec.from_string(device).device_type for device in devices}
    if len(devices) > 1 and kinds == {"CPU"}:
        raise ValueError(
            f"jit_compile must be False on several CPU devices, got True with {len(devices)}: the "
            "compiled step of one device would use variables of another, with any Keras model. "
            "Leave jit_compile out, or train on one device."
        )


def sum_over_replicas(tensors: list[tf.Tensor]) -> list[tf.Tensor]:
    """Return the sums of tensors over all replicas, if called in the context of one of several."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return tensors
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tensors)


def without_trace(model: Any, loss: Callable[[], tf.Tensor]) -> tf.Tensor:
    """Return a loss, and restore the non-trainable variables that its computation changes.

    Args:
        model: of either Keras; its moving statistics are restored.
        loss: computes the loss.
    """
    changing = [tensor_variable(each) for each in model.non_trainable_variables]
    before = [tf.identity(each) for each in changing]
    value = loss()
    for variable, was in zip(changing, before, strict=True):
        variable.assign(was)
    return value


def scope(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which the variables of a model can be read and assigned.

    It is the scope of the distribution strategy that a tf_keras model was made under.
    """
    if isinstance(model, tf_keras.Model):
        return model.distribute_strategy.scope()
    return contextlib.nullcontext()


@contextlib.contextmanager
def zero_states(model: Any) -> Iterator[None]:
    """Set the states of stateful recurrent layers to zero during the block."""
    stateful = [each for each in layers.flatten(model) if getattr(each, "stateful", False)]
    found = tf.nest.flatten([getattr(each, "states", None) for each in stateful])
    states = [state for state in found if state is not None]
    before = [(state, state.numpy()) for state in states]
    for state in states:
        state.assign(tf.zeros_like(state))
    try:
        yield
    finally:
        for state, value in before:
            state.assign(value)


def is_variable(value: Any) -> bool:
    """Return whether an object is a variable of either Keras or of TensorFlow."""
    return isinstance(value, keras.Variable | tf.Variable)


def variables(layer: Any) -> list[Any]:
    """Return the weights of a layer that are variables.

    The weights of a tf_keras lookup layer also include the object that saves its vocabulary.
    """
    return [weight for weight in layer.weights if is_variable(weight)]


def scaled(optimizer: Any, loss: tf.Tensor) -> tf.Tensor:
    """Return a loss times the optimizer's loss scale, if it has one."""
    is_keras_3 = isinstance(optimizer, keras.optimizers.Optimizer)
    scale = getattr(optimizer, "scale_loss" if is_keras_3 else "get_scaled_loss", None)
    return loss if scale is None else scale(loss)


def minimize(optimizer: Any, loss: Callable[[], tf.Tensor], variables: Iterable[Any]) -> None:
    """Take one optimizer step that descends a loss, with the optimizer's loss scaling.

    Args:
        optimizer: an optimizer of either Keras.
        loss: computes the value to descend, a scalar.
        variables: the weights to train.
    """
    variables = list(variables)
    is_keras_3 = isinstance(optimizer, keras.optimizers.Optimizer)
    with tf.GradientTape() as tape:
        value = loss()
        if is_keras_3:
            value = optimizer.scale_loss(value)
    if is_keras_3:
        gradients = tape.gradient(value, variables)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
    else:
        optimizer.minimize(value, variables, tape=tape)
