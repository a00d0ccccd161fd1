"""Training, callbacks, classes and variables, where the two Kerases differ."""

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
    """Return the class to make where `cls` was called and `kind` is `public` in one of the Kerases.

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
    """Return a decorator of a class that is one of two, of both Kerases, known by one name.

    It registers the class by that name in its Keras, and sets `__name__` to it, by which Keras
    names layers, and weights in `.keras` files. The class's `__qualname__`, by which pickles find
    it, stays its own.
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
    """Marks models that train another one, `model`, which is pruned and exported."""

    model: Any


def require_network(model: Any) -> types.ModuleType:
    """Return the Keras of a model; raise a ValueError for a trainer around one."""
    library = _keras.library("model", model)
    if isinstance(model, Trainer):
        raise ValueError(
            "model must be the network itself, not the trainer: pass trainer.model, and make a "
            "trainer of what is returned if it is to be trained."
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
    """Make all operations of a graph depend on these values.

    A compiled step whose data can't be fetched, at the end of a dataset of unknown length, would
    otherwise run all operations that need no data: count a step, renew masks.

    Args:
        values: tensors and operations in any structure. Outside of a graph, nothing changes.
    """
    found = tf.nest.flatten(values, expand_composites=True)
    before = [each for each in found if tf.is_tensor(each) or isinstance(each, tf.Operation)]
    with tf.control_dependencies(before), tf.variable_creator_scope(_made_independently):
        yield


def _made_independently(make: Callable[..., Any], **arguments: Any) -> Any:
    """Make a variable, such as one of a metric, whose initial value depends on nothing."""
    with tf.control_dependencies(None):
        return make(**arguments)


def depending_on_batch(model: Any, data: Any) -> contextlib.AbstractContextManager[Any]:
    """Make all operations of a model's training step depend on its batch.

    A function that XLA compiles as a whole does not run without its arguments.
    """
    return contextlib.nullcontext() if model.jit_compile else depending_on(data)


def register_trainer(trainer: Any, *models: Any) -> None:
    """Register a model that trains others, or parts of them, in its own compiled steps.

    Its steps are compiled anew if it was not registered before.
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
    """Return the models that train a model, or parts of it, in steps of their own."""
    return list(_TRAINERS.get(model, ()))


def reset_functions(model: Any) -> None:
    """Let a model, and what trains it, compile its training and test step anew, from the next on.

    `fit` may be running: it calls `model.train_function` at each step, so the attribute is set to a
    function that compiles the step when it is called. (A running evaluation of tf_keras ends with
    the step that it began with, as it reads the attribute once.)

    Args:
        model: of either Keras; of one that has compiled nothing yet, nothing changes.
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
    """Call `update(strategy)` where it can change the model's variables on all devices.

    Works eagerly, in a graph, under XLA, and in the replica context of a distribution strategy.
    `update` is to change variables by `strategy.extended.update(variable, function, args)`.

    Args:
        model: a Keras model, for the strategy that its variables were made under.
        update: what to do.
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
    """Tell whether a model was made under a distribution strategy, maybe one of a single device."""
    return not type(model.distribute_strategy).__name__.startswith("_Default")


def require_one_worker(model: Any) -> None:
    """Raise if several workers are to train a model of Keras 3.

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
            f"model {model.name!r} is of Keras 3, whose fit fails under "
            f"MultiWorkerMirroredStrategy (here {workers} workers), with and without this package: "
            "build it of tf_keras.layers, or train on the devices of one machine by "
            "MirroredStrategy."
        )


def require_xla(model: Any) -> None:
    """Raise if XLA is to compile the steps of a model that is mirrored on several CPU devices.

    Raises:
        ValueError: it is to.
    """
    if not (model.jit_compile and is_distributed(model)):
        return
    devices = model.distribute_strategy.extended.worker_devices
    kinds = {tf.DeviceSpec.from_string(device).device_type for device in devices}
    if len(devices) > 1 and kinds == {"CPU"}:
        raise ValueError(
            f"jit_compile must be False on several CPU devices, got True with {len(devices)}: what "
            "XLA compiles runs on one of them and finds variables of another in it, whatever the "
            "Keras model. Leave jit_compile out, or train on one device."
        )


def sum_over_replicas(tensors: list[tf.Tensor]) -> list[tf.Tensor]:
    """Return the sums of tensors over all replicas, where this is the code of one of several."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return tensors
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tensors)


def without_trace(model: Any, loss: Callable[[], tf.Tensor]) -> tf.Tensor:
    """Return a loss, and put back what its computation changes in a model: moving statistics.

    Args:
        model: of either Keras.
        loss: computes it.
    """
    changing = [tensor_variable(each) for each in model.non_trainable_variables]
    before = [tf.identity(each) for each in changing]
    value = loss()
    for variable, was in zip(changing, before, strict=True):
        variable.assign(was)
    return value


def scope(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Return the scope in which the variables of a model can be read and assigned from outside.

    That matters for a tf_keras model that was made under a distribution strategy.
    """
    if isinstance(model, tf_keras.Model):
        return model.distribute_strategy.scope()
    return contextlib.nullcontext()


def is_variable(value: Any) -> bool:
    """Tell whether something is a variable of either Keras, or of TensorFlow."""
    return isinstance(value, keras.Variable | tf.Variable)


def variables(layer: Any) -> list[Any]:
    """Return the weights of a layer that are variables.

    tf_keras lists among the weights what saves the vocabulary of a lookup layer, too.
    """
    return [weight for weight in layer.weights if is_variable(weight)]


def minimize(optimizer: Any, loss: Callable[[], tf.Tensor], variables: Iterable[Any]) -> None:
    """Take one optimizer step on what `loss` returns; float16 losses are scaled on the way.

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
