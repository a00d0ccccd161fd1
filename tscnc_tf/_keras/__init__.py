"""Compatibility with Keras 3, tf_keras and tensorflow-model-optimization (tfmot).

No other module imports `keras`, `tf_keras` or `tensorflow_model_optimization`. The library of a
model is found from its classes, never an argument.
"""

from __future__ import annotations

import abc
import functools
import importlib
import importlib.util
import inspect
import os
import sys
import types
from collections.abc import Callable
from typing import Any, TypeVar

import keras
import tensorflow as tf
import tf_keras

__all__ = [
    "LIBRARIES",
    "Regularizer",
    "flavour",
    "inference",
    "is_graph_model",
    "keras",
    "library",
    "pruning_schedule_class",
    "register",
    "register_deferred",
    "registered_name",
    "require_built",
    "require_graph_model",
    "tf_keras",
    "tfmot",
    "tfmots_schedules",
]

PACKAGE = "tscnc_tf"
LIBRARIES: dict[str, types.ModuleType] = {"keras": keras, "tf_keras": tf_keras}
OWN = ("call", "train_step", "test_step", "predict_step")  # methods that a class may override
_Class = TypeVar("_Class", bound=type)


class Regularizer(tf_keras.regularizers.Regularizer, keras.regularizers.Regularizer):
    """Base of regularizers that both Keras versions accept, save and load.

    A plain callable suffices for `.keras` files; the legacy `.h5` format of tf_keras accepts only
    subclasses of its own base class. Regularizers of equal configurations are equal.
    """

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.get_config() == other.get_config()

    def __hash__(self) -> int:
        return hash((type(self), repr(self.get_config())))


def flavour(obj: Any) -> str | None:
    """Return "keras" or "tf_keras", the Keras of `obj` (a model, layer, ...); None for neither."""
    for base in type(obj).__mro__:
        root = base.__module__.partition(".")[0]
        if root in ("keras", "tf_keras"):
            return root
    return None


def library(name: str, model: Any) -> types.ModuleType:
    """Return the Keras module that `model` belongs to.

    Raises:
        TypeError: it is not a model of either Keras.
        RuntimeError: it is a Keras 3 model on a backend other than TensorFlow.
    """
    if isinstance(model, tf_keras.Model):
        return tf_keras
    if isinstance(model, keras.Model):
        if keras.config.backend() != "tensorflow":
            raise RuntimeError(
                f"{name} {model.name!r} is a Keras 3 model on {keras.config.backend()}, and "
                "tscnc_tf works on TensorFlow: set KERAS_BACKEND=tensorflow before importing Keras."
            )
        return keras
    raise TypeError(f"{name} must be a Keras 3 or tf_keras model, got {type(model).__name__}.")


def is_graph_model(model: Any) -> bool:
    """Return whether a model of either Keras is Sequential or functional, with a known graph."""
    if isinstance(model, keras.Sequential | tf_keras.Sequential):
        return True
    return any(base.__name__ == "Functional" for base in type(model).__mro__)


def require_graph_model(name: str, model: Any, way_out: str = "") -> None:
    """Raise a ValueError unless the model is Sequential or functional, and can be rebuilt.

    In both Keras versions a copy of a Sequential is a plain Sequential, whatever its class. A copy
    of a functional model has the model's class if its constructor takes inputs and outputs.

    Args:
        name: the argument's name, for the error message.
        model: of either Keras.
        way_out: a sentence that ends the error message.
    """
    if not is_graph_model(model):
        raise ValueError(
            f"{name} {model.name!r} is a subclassed model ({type(model).__name__}), whose layers "
            "can't be exchanged from outside: build it as a Sequential or functional model, or "
            f"change its layers in its constructor. {way_out}".rstrip()
        )
    kind = plain_class(model)
    plain = next((each for each in (keras, tf_keras) if issubclass(kind, each.Sequential)), None)
    base = plain.Sequential if plain else functional_base(kind)
    own = [method for method in OWN if getattr(kind, method) is not getattr(base, method)]
    if not own or (not plain and takes_inputs_and_outputs(kind)):
        return
    what = "functional model"
    out = (
        "build its graph outside of its constructor, and keep the constructor of Keras' own models"
    )
    if plain:
        what, out = "Sequential", "make it a functional model of a class with these methods"
    raise ValueError(
        f"{name} {model.name!r} is a {what} with {' and '.join(own)} of its own "
        f"({kind.__name__}), which a copy with other layers would not have: {out}. "
        f"{way_out}".rstrip()
    )


def plain_class(model: Any) -> Any:
    """Return the class of a model or layer; for a model with a pruner, its class before that."""
    return getattr(type(model), "_plain", type(model))


def functional_base(kind: Any) -> Any:
    """Return Keras' `Functional` class that a class of functional models derives from."""
    return next(base for base in kind.__mro__ if base.__name__ == "Functional")


def takes_inputs_and_outputs(kind: Any) -> bool:
    """Return whether a class of functional models has the constructor of Keras' `Functional`.

    In Keras 3 it may also have one that passes on inputs, outputs and further arguments.
    """
    own, plain = (inspect.getfullargspec(cls.__init__) for cls in (kind, functional_base(kind)))
    if own.args == plain.args:
        return True
    if not issubclass(kind, keras.Model) or own.varkw is None:  # tf_keras has the rule above
        return False
    takes_both = own.args[1:3] == plain.args[1:3] or (len(own.args) == 1 and own.varargs)
    return bool(takes_both) and {*own.args[3:], *own.kwonlyargs} <= {*plain.args[3:]}


def register(cls: _Class) -> _Class:
    """Register a class in both Keras versions as `tscnc_tf>ClassName`, for loading saved models.

    The legacy `.h5` format of tf_keras looks up regularizers by their bare class names, so they are
    registered under those as well.
    """
    tf_keras.utils.get_custom_objects().pop(registered_name(cls), None)  # of `register_deferred`
    keras.saving.register_keras_serializable(package=PACKAGE)(cls)
    if issubclass(cls, Regularizer):
        tf_keras.utils.get_custom_objects()[cls.__name__] = cls
    return tf_keras.saving.register_keras_serializable(package=PACKAGE)(cls)


def register_deferred(module: str, name: str) -> None:
    """Register a class by name only; its module is imported when a tf_keras model needs it."""

    class Deferred:
        """Placeholder that imports the class when a saved model is loaded."""

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            """Import the class, and build an object of it."""
            return getattr(importlib.import_module(module), name).from_config(config)

    tf_keras.utils.get_custom_objects()[f"{PACKAGE}>{name}"] = Deferred


def registered_name(cls: type) -> str:
    """Return the name under which `register` registers a class."""
    return f"{PACKAGE}>{cls.__name__}"


@functools.cache
def tfmot() -> types.ModuleType:
    """Import tfmot without its side effects on the process, and return it.

    Importing tfmot sets TF_USE_LEGACY_KERAS, and thereby chooses the Keras of `tf.keras` if that
    has not been accessed yet. So `tf.keras` is resolved first, and the environment restored
    afterwards.
    """
    name = "TF_USE_LEGACY_KERAS"
    before = os.environ.get(name)
    _ = tf.keras.layers  # any attribute resolves the lazy module
    try:
        import tensorflow_model_optimization
    except ImportError as error:
        raise ImportError(
            "This needs tensorflow-model-optimization: pip install tensorflow-model-optimization. "
            'Or prune with engine="masks", which does not need it.'
        ) from error
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
    return tensorflow_model_optimization


class PruningSchedule(abc.ABC):
    """The protocol of tfmot's schedules, used as their base where tfmot is not installed.

    A schedule is called with an optimizer step, counted from 1, and returns whether to renew the
    masks, and the sparsity (the fraction of zeros).
    """

    @abc.abstractmethod
    def __call__(self, step: Any) -> tuple[Any, Any]:
        """Return whether to renew the masks at this step, and the sparsity."""


def has_tfmot() -> bool:
    """Return whether tfmot is installed. Does not import it."""
    name = "tensorflow_model_optimization"
    if name in sys.modules:
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None


def pruning_schedule_class() -> type:
    """Return tfmot's `PruningSchedule`, or the class above if tfmot is not installed."""
    return tfmot().sparsity.keras.PruningSchedule if has_tfmot() else PruningSchedule


def tfmots_schedules() -> dict[str, type]:
    """Return tfmot's own schedules by name; none if it is not installed."""
    if not has_tfmot():
        return {}
    schedules = tfmot().sparsity.keras
    return {cls.__name__: cls for cls in (schedules.ConstantSparsity, schedules.PolynomialDecay)}


def require_built(name: str, model: Any) -> None:
    """Raise a ValueError unless the model is built."""
    if not model.built:
        raise ValueError(
            f"{name} {model.name!r} has no weights yet: give its first layer an input shape, "
            "or call it once on a batch."
        )


def inference(model: Any) -> Callable[[Any], Any]:
    """Return `x -> logits` for any callable model; Keras models run in inference mode.

    tfmot's pruning wrappers are bypassed, since they re-assign every masked weight at each call.
    Their masks are applied once here instead, unless a graph is being traced.

    Raises:
        TypeError: `model` is not callable, or is a class.
        RuntimeError: it is a Keras 3 model on a backend other than TensorFlow.
    """
    if flavour(model) is None:
        if isinstance(model, type) or not callable(model):
            shown = (
                f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
            )
            raise TypeError(f"model must be callable, got {shown}.")
        return model
    if library("model", model) is tf_keras:
        from tscnc_tf._keras import cloning, wrappers

        if tf.executing_eagerly():
            wrappers.apply_masks(model)
        model = cloning.bare(model)
    return functools.partial(model, training=False)
