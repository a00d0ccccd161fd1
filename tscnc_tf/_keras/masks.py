"""The masks of a model, of either engine, and the class of models that have a pruner.

A pruner's mask is the constraint of its variable. Both Keras versions apply constraints after every
optimizer step, whatever the model, the loop or the `train_step`, so masks hold in any model that
the variable is a part of. tfmot's masks belong to its wrappers.

`attach` gives a model a pruner by replacing its class with a subclass, as torch's parametrizations
do with modules: the object, its layers and its weights stay the same, so subclassed models are
supported too. This is the only place in the package where the class of an object is changed. The
subclass calls the pruner at each optimizer step in `fit`, which renews the masks; it writes the
pruner into the model's configuration, from which a `.keras` file restores it; and it adds the masks
to weight files and checkpoints, but not to SavedModels.

Masks are not weights of the model: `get_weights`, `count_params` and the summary leave them out.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state
from tf_keras.src.mixed_precision.autocast_variable import AutoCastVariable
from tf_keras.src.saving.serialization_lib import in_tf_saved_model_scope

from tscnc_tf._keras import PACKAGE, keras, layers, tf_keras, wrappers
from tscnc_tf._keras.flavours import (
    depending_on_batch,
    is_variable,
    library_of,
    require_one_worker,
    reset_functions,
    tensor_variable,
)
from tscnc_tf._keras.optimizers import build, key

PRUNER = "_attached_pruner"  # the attribute of a model that holds its pruner
_Base: Any = object  # replaced by a class of either Keras in subclasses


class AttachedPruner(Protocol):
    """Interface of the pruner of a model; `pruning.Pruner` implements it.

    Attributes:
        model: its model.
        targets: the pruned weights, each with its `variable`.
        state: its variables, a layer of the model's Keras.
        perturb_scores: the radius by which `perturbed` perturbs the scores, 0 for none.
    """

    model: Any
    targets: Sequence[Any]
    state: Any
    perturb_scores: float

    def held(self) -> list[int]:
        """Return the indices of the targets that the model holds at present."""

    def masked_variables(self) -> list[tuple[Any, Any]]:
        """Return the pairs (weight, mask) of the pruned weights."""

    def constrain(self, weight: tf.Tensor, mask: Any, own: Callable[[Any], Any] | None) -> Any:
        """Return a weight after an optimizer step, with its mask and own constraint applied."""

    def training(self, optimizer: Any = None) -> contextlib.AbstractContextManager[Any]:
        """Return a context to enter while an optimizer trains the weights."""

    def perturbed(self, loss: Callable[[], tf.Tensor]) -> contextlib.AbstractContextManager[Any]:
        """Return a context to enter while the gradient of a loss is taken."""

    def own_optimizer(self) -> Any:
        """Return the model's optimizer that trains the weights, or None."""

    def on_train_begin(self, optimizer: Any) -> None:
        """Prepare for training by an optimizer, which may be another one than before."""

    def reset_step_count(self) -> None:
        """Start counting the steps of the next optimizer from its current count."""

    def step(self, optimizer: Any = None, *, is_constrained: bool = False) -> None:
        """Count an optimizer step, and renew the masks if they are due."""

    def apply(self, optimizer: Any = None) -> None:
        """Set pruned entries to zero, in weights and in the optimizer's state for them."""

    def on_train_end(self, optimizer: Any) -> None:
        """Apply the masks once more when a `fit` has ended, and warn of what it lacked."""

    def on_weights_set(self) -> None:
        """Mask weights after they were set from outside."""

    def get_config(self) -> dict[str, Any]:
        """Return the configuration from which the pruner is restored, given the same model."""


class MaskConstraint(keras.constraints.Constraint):
    """The constraint of a variable that has a mask.

    A deep copy of a `tf.Variable` shares the constraint object of the original. On the copy it
    applies the variable's own constraint only, without the mask.

    Args:
        pruner: the owner of the mask.
        mask: True where the weight is kept.
        variable: the masked variable.

    Attributes:
        own: the variable's other constraint, which is applied as well; None for none.
    """

    def __init__(self, pruner: AttachedPruner, mask: Any, variable: Any) -> None:
        self.pruner = pruner
        self.mask = mask
        self.own = own_constraint(variable)
        self._keys = {key(each) for each in (variable, *_replicas(variable))}

    def is_of(self, variable: Any) -> bool:
        """Return whether the mask belongs to a variable; False for a copy of it."""
        return key(variable) in self._keys

    def __call__(self, weight: Any) -> tf.Tensor:
        """Return the value of the weight after an optimizer step."""
        value = tf.convert_to_tensor(weight)
        if is_variable(weight) and not self.is_of(weight):
            return value if self.own is None else self.own(value)
        return self.pruner.constrain(value, self.mask, self.own)


def own_constraint(variable: Any) -> Any:
    """Return the constraint of a variable other than a mask, None for none."""
    constraint = variable.constraint
    return constraint.own if isinstance(constraint, MaskConstraint) else constraint


def constrain(variable: Any, pruner: AttachedPruner, mask: Any) -> None:
    """Add a mask to a variable of either Keras, which keeps its own constraint."""
    _set_constraint(variable, MaskConstraint(pruner, mask, variable))


def release(variable: Any) -> None:
    """Remove the mask of a variable, which keeps its own constraint."""
    _set_constraint(variable, own_constraint(variable))


def _set_constraint(variable: Any, constraint: Any) -> None:
    if isinstance(variable, keras.Variable):
        variable.constraint = constraint
        return
    for each in _replicas(variable):  # tf.Variable has no setter for it
        each._constraint = constraint


def _replicas(variable: Any) -> Sequence[Any]:
    """Return the components of a variable on all devices, or the variable itself."""
    inner = tensor_variable(variable)
    inner = inner._variable if isinstance(inner, AutoCastVariable) else inner
    return inner.values if isinstance(inner, tf.distribute.DistributedValues) else [inner]


def pruners(model: Any) -> list[Any]:
    """Return the pruners of a model, each once: its own, those of parts, and of single weights.

    Pruners of single weights are those of another model that shares a layer with this one.
    """
    found = [vars(layer)[PRUNER] for layer in layers.flatten(model) if PRUNER in vars(layer)]
    for variable in model.weights:
        constraint = getattr(variable, "constraint", None)  # a look-up table has none
        if isinstance(constraint, MaskConstraint) and constraint.is_of(variable):
            found.append(constraint.pruner)
    return list({id(pruner): pruner for pruner in found}.values())


def masked_variables(model: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (weight, mask) for every pruned weight of `model`, or of models inside it."""
    yield from wrappers.pruned_variables(model)
    own = {id(variable) for variable in model.weights}
    for pruner in pruners(model):
        yield from (pair for pair in pruner.masked_variables() if id(pair[0]) in own)


def apply(model: Any, optimizer: Any = None) -> None:
    """Apply the masks of `model` to its weights.

    Args:
        model: a model of either Keras, pruned or not.
        optimizer: its state for the weights is masked as well; None for no optimizer.
    """
    _apply_wrappers(model, optimizer)
    for pruner in pruners(model):
        pruner.apply(optimizer)


def end_training(model: Any, optimizer: Any) -> None:
    """Apply the masks of `model` to its weights when a `fit` of it has ended."""
    _apply_wrappers(model, optimizer)
    for pruner in pruners(model):
        pruner.on_train_end(optimizer)


def on_weights_set(model: Any) -> None:
    """Mask the weights of `model` after they were set from outside."""
    for pruner in pruners(model):
        pruner.on_weights_set()


def _apply_wrappers(model: Any, optimizer: Any) -> None:
    if isinstance(model, tf_keras.Model):  # tfmot has wrappers for it only
        wrappers.apply_masks(model, optimizer)


@contextlib.contextmanager
def training(model: Any, *optimizers: Any) -> Iterator[None]:
    """Enter the training context of every pruner of `model`, for each optimizer."""
    with contextlib.ExitStack() as stack:
        for pruner in pruners(model):
            for optimizer in optimizers:
                stack.enter_context(pruner.training(optimizer))
        yield


@contextlib.contextmanager
def step(model: Any, optimizer: Any, loss: Callable[[], tf.Tensor]) -> Iterator[None]:
    """Take an optimizer step in this context; at its end, the masks are applied and renewed.

    Nothing but the optimizer may set weights in it.

    Args:
        model: a model of either Keras, pruned or not.
        optimizer: takes the step.
        loss: computes the value to descend, a scalar; each pruner calls it once at most.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(model, tf_keras.Model):
            stack.enter_context(wrappers.step(model, optimizer))
        stack.enter_context(training(model, optimizer))
        for pruner in pruners(model):
            stack.enter_context(pruner.perturbed(loss))
        yield
    for pruner in pruners(model):
        pruner.step(optimizer, is_constrained=True)


def keep(variable: Any, mask: Any) -> Any:
    """Set a variable to zero where its mask is False."""
    return variable.assign(kept(variable, mask))


def kept(value: Any, mask: Any) -> tf.Tensor:
    """Return values, and zero where their mask is False."""
    # A product would give -0.0 for negative weights, and NaN for NaN and infinity. `tf.where` is
    # slower, since it handles broadcasting.
    value = tf.convert_to_tensor(value)
    return tf.raw_ops.Select(condition=tf.convert_to_tensor(mask), x=value, y=tf.zeros_like(value))


def names(model: Any) -> dict[int, str]:
    """Return the names of variables that belong to pruning, not to the network, by their ids."""
    found: dict[int, str] = {}
    for wrapper in wrappers.wrapped_layers(model):
        inner = {id(variable) for variable in wrapper.layer.weights}
        found |= {id(v): v.name for v in wrapper.weights if id(v) not in inner}
    for pruner in pruners(model):
        found |= {id(v): v.name for v in pruner.state.weights}
    return found


class MaskedModel(_Base):
    """Mixin of the class of a model that has a pruner; `attach` derives a class from both."""

    _plain: Any  # the model's own class

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return a model of the plain class: a newly constructed model has no pruner."""
        return cls._plain(*args, **kwargs)

    @property
    def pruner(self) -> Any:
        """The pruner of this model."""
        return vars(self)[PRUNER]

    @property
    def pruning_state(self) -> Any:
        """The pruner's variables, as a layer, so that weight files include them."""
        return self.pruner.state

    def make_train_function(self, *args: Any, **kwargs: Any) -> Any:
        """Compile the training step, after creating the optimizer's variables.

        TensorFlow traces a step twice if variables are created in it.
        """
        if self.optimizer is not None:
            if self._has_step_of_keras:
                with self.distribute_strategy.scope():
                    build(self.optimizer, self.trainable_variables)
            if (own := self.pruner.own_optimizer()) is not None:
                self.pruner.on_train_begin(own)
        return super().make_train_function(*args, **kwargs)

    @property
    def _has_step_of_keras(self) -> bool:
        """Whether the training step is Keras' own, in which only the optimizer sets weights."""
        return self._plain.train_step is library_of(type(self)).Model.train_step

    def train_step(self, data: Any) -> Any:
        """Run the model's own training step, then the pruner's step on the weights it updated."""
        with depending_on_batch(self, data):
            with self.pruner.training():
                logs = super().train_step(data)
            # A custom training step may set weights after the optimizer's update.
            self.pruner.step(is_constrained=self._has_step_of_keras)
        return logs

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Train, then apply the masks, since a callback may have set other weights."""
        with self.pruner.training():
            history = super().fit(*args, **kwargs)
        if is_masked(self):  # a callback may have removed the pruner
            self.pruner.on_train_end(self.optimizer)
        return history

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Configure training; steps are counted from the optimizer's current count."""
        super().compile(*args, **kwargs)
        self.pruner.reset_step_count()

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Configure training with the configuration of a saved model."""
        with _as_plain(self):  # Keras does it for its own model classes only
            self.compile_from_config(config)

    def set_weights(self, weights: Any) -> None:
        """Set the weights, and apply the masks to them."""
        super().set_weights(weights)
        self.pruner.on_weights_set()

    def load_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """Load weights, and masks where the file has them, and apply the masks."""
        try:
            return super().load_weights(filepath, *args, **kwargs)
        finally:  # also after an error, as some weights may have been loaded
            self.pruner.on_weights_set()

    def save_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """Save weights and masks.

        Raises:
            ValueError: `filepath` names tf_keras' legacy format, which can't hold masks.
        """
        name = str(filepath)
        if name.endswith((".h5", ".hdf5", ".keras")) and not name.endswith(".weights.h5"):
            raise ValueError(
                f"filepath must end in .weights.h5, got {name!r}: the legacy format can't hold the "
                "masks of a model that is being pruned."
            )
        return super().save_weights(filepath, *args, **kwargs)

    def export(self, *args: Any, **kwargs: Any) -> Any:
        """Export the model with its masks applied."""
        self.pruner.apply()
        return super().export(*args, **kwargs)

    def __reduce__(self) -> Any:
        """Pickle like the plain class, since the generated class has no importable name."""
        function, *rest = super().__reduce__()
        if getattr(function, "__self__", None) is type(self):
            function = getattr(library_of(type(self)).Model, function.__name__)
        return (function, *rest)

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Save the model with its masks to a `.keras` file.

        Raises:
            ValueError: `filepath` has another suffix: other formats can't hold masks.
        """
        if not str(filepath).endswith(".keras"):
            raise ValueError(
                f"filepath must end in .keras, got {str(filepath)!r}: only that format holds the "
                "masks of a model that is being pruned. Strip the model first to save it in "
                "another one."
            )
        super().save(filepath, *args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """Return the configurations of the model without its pruner, and of the pruner.

        Every function that saves a model calls this before it saves the weights, so weights that
        were set from outside are masked here.

        Raises:
            ValueError: called for the legacy `.h5` format of Keras 3.
        """
        if global_state.get_global_attribute("use_legacy_config", False):
            raise ValueError(_refusal(self))
        self.pruner.on_weights_set()
        with _as_plain(self):
            plain = library_of(type(self)).saving.serialize_keras_object(self)
        plain.pop("compile_config", None)  # it is in the outer configuration
        return {"model": plain, "pruner": _ModernConfig(self.pruner.get_config(), _refusal(self))}

    # tf_keras' clone_model calls the constructor of models whose get_config is marked as Keras'
    # own, so a clone is a plain model, as in Keras 3.
    get_config._is_default = True  # type: ignore[attr-defined]

    @property
    def use_legacy_config(self) -> bool:
        """Always False: the legacy `.h5` format of tf_keras is not supported.

        tf_keras sets this attribute before it writes such a file, and leaves it set on models
        nested in the saved one.

        Raises:
            ValueError: it is set.
        """
        return False

    @use_legacy_config.setter
    def use_legacy_config(self, value: bool) -> None:  # noqa: ARG002
        raise ValueError(_refusal(self))

    def get_build_config(self) -> None:
        """Return None: the configuration of the plain model includes it."""

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Build the model, and attach its pruner."""
        library = library_of(cls)
        model = library.saving.deserialize_keras_object(config["model"], custom_objects)
        if not config["pruner"]["weights"]:  # the saved model held none of the pruned weights
            return model
        name = config["pruner"].get("class_name", "Pruner")
        pruner = library.saving.get_registered_object(f"{PACKAGE}>{name}")
        pruner.from_config(config["pruner"], model=model)
        return model

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict[str, Any]:
        """Add the masks to TensorFlow's checkpoints, but not to SavedModels."""
        children = super()._trackable_children(save_type, **kwargs)
        if save_type == "checkpoint":
            children = {**children, "pruning_state": self.pruning_state}
        return children


@contextlib.contextmanager
def _as_plain(model: Any) -> Iterator[None]:
    """Give a masked model its plain class within the context."""
    masked, model.__class__ = type(model), model._plain
    try:
        yield
    finally:
        model.__class__ = masked


def _refusal(model: Any) -> str:
    return (
        f"model {model.name!r} is being pruned, and the legacy .h5 format has no place for its "
        "masks: save it as .keras, or strip it first."
    )


class _ModernConfig(dict[str, Any]):
    """A dictionary in a configuration that makes the legacy serialization of tf_keras fail.

    A model nested in a Sequential can't detect the format that its configuration is written to; but
    only the legacy serialization calls `get_config` on a dictionary.

    Args:
        values: of the dictionary.
        refusal: the message of the error.
    """

    def __init__(self, values: dict[str, Any], refusal: str) -> None:
        super().__init__(values)
        self._refusal = refusal

    def get_config(self) -> dict[str, Any]:
        """Return the dictionary for a SavedModel, which uses the same serialization.

        Raises:
            NotImplementedError: the format is `.h5`.
        """
        if in_tf_saved_model_scope():
            return dict(self)
        raise NotImplementedError(self._refusal)


class PruningState(_Base):
    """The variables of a pruner, as a layer of the model's Keras.

    A weight file contains the variables for the weights that the model holds when it is saved; a
    layer may have been removed or quantized since it was pruned.

    Attributes:
        step: the number of optimizer steps since the pruner was attached.
        seen: the optimizer's step count when the pruner last acted; -1 before that.
        frozen: whether the masks are frozen.
        left_out: a vector, True for the weights that were frozen at the last renewal of the masks.
        masks: one TensorFlow variable per pruned weight, True where the weight is kept.
        dense: the weights before pruning, one variable each; empty unless scores are trained.
        scores: the trained scores of the weights, one variable each; empty likewise.
        share_logits: the logits of the layers' shares, a vector, if the shares are trained.
        share_velocities: the momentum of `share_logits`.
        history: results of the last epochs, `(epochs, 2)`, see `pruning.Regrowth`, if it needs any.

    Args:
        pruner: the pruner.
        is_scored: whether the scores of the weights are trained.
        has_shares: whether the shares of the layers are trained as well.
        epochs: the number of epochs in `history`.
    """

    def __init__(
        self,
        pruner: AttachedPruner,
        *,
        is_scored: bool = False,
        has_shares: bool = False,
        epochs: int = 0,
    ) -> None:
        super().__init__(name="pruning_state", dtype="float32", trainable=False)
        weights = [tensor_variable(target.variable) for target in pruner.targets]
        self._add("step", (), "int64")
        self._add("seen", (), "int64")
        self._add("frozen", (), "bool")
        self._add("left_out", (len(weights),), "bool")
        self.seen.assign(-1)
        names = ("share_logits", "share_velocities") if has_shares else ()
        shares = [self._add(name, (len(weights),), "float32") for name in names]
        if epochs:
            self._add("history", (epochs, 2), "float32").assign(np.full((epochs, 2), np.nan))
        masks = [self._add(f"mask_{i}", w.shape, "bool", "ones") for i, w in enumerate(weights)]
        scored = [
            tuple(self._add(f"{name}_{i}", w.shape, w.dtype.name) for name in ("dense", "score"))
            for i, w in enumerate(weights if is_scored else [])
        ]
        self.__dict__.update(  # bypasses Keras' tracking
            masks=masks,
            dense=[dense for dense, _ in scored],
            scores=[score for _, score in scored],
            _shares=shares,
            _epochs=epochs,
            _pruner=pruner,
        )
        self.built = True

    def _add(self, name: str, shape: Iterable[int], dtype: str, initializer: str = "zeros") -> Any:
        """Create a variable as an attribute, since checkpoints don't include those in lists."""
        variable = self.add_weight(
            name=name, shape=tuple(shape), dtype=dtype, initializer=initializer, trainable=False
        )
        setattr(self, name, variable)
        return tensor_variable(variable)

    def _saved(self) -> list[Any]:
        """Return the variables that precede the vectors in a weight file, in its order."""
        held = self._pruner.held()
        scored = list(zip(self.dense, self.scores, strict=True))
        return [
            *(self.step, self.seen, self.frozen),
            *(self.masks[index] for index in held),
            *(variable for index in held if scored for variable in scored[index]),
            *([self.history] if self._epochs else ()),
        ]

    def save_own_variables(self, store: Any) -> None:
        """Write the variables for the weights that the model holds."""
        values = [variable.numpy() for variable in self._saved()]
        values += [vector.numpy()[self._pruner.held()] for vector in (*self._shares, self.left_out)]
        for position, value in enumerate(values):
            store[str(position)] = value

    def load_own_variables(self, store: Any) -> None:
        """Load the variables of a weight file; a dense model's file has none, and masks stay.

        Raises:
            ValueError: the file belongs to a model with other pruned weights.
        """
        if not store.keys():
            self._pruner.on_weights_set()
            return
        saved, count = self._saved(), len(store.keys())
        vectors = (*self._shares, self.left_out)
        most = len(saved) + len(vectors)
        shapes = [np.shape(store[str(position)]) for position in range(min(count, len(saved)))]
        # Older files have no `left_out`.
        if count not in (most - 1, most) or shapes != [tuple(each.shape) for each in saved]:
            raise ValueError(
                f"The file has {count} variables of a pruner, and this model's has "
                f"{most}: other weights of the model were pruned when it was saved, or "
                "by another method. Load it into a model that is pruned in the same way."
            )
        for position, variable in enumerate(saved):
            variable.assign(store[str(position)])
        for position, vector in zip(range(len(saved), count), vectors, strict=False):
            value = vector.numpy()
            value[self._pruner.held()] = store[str(position)]
            vector.assign(value)


class _Keras3State(PruningState, keras.layers.Layer):
    """`PruningState` of a Keras 3 model."""


class _TfKerasState(PruningState, tf_keras.layers.Layer):
    """`PruningState` of a tf_keras model."""


def new_state(pruner: AttachedPruner, **options: Any) -> PruningState:
    """Return new variables for a pruner, by the arguments of `PruningState`."""
    kind = _Keras3State if isinstance(pruner.model, keras.Model) else _TfKerasState
    with pruner.model.distribute_strategy.scope():
        return kind(pruner, **options)


@functools.cache
def _masked_class(plain: Any) -> Any:
    """Return the class of masked models for a class of plain models."""
    name = f"Masked{plain.__name__}"
    names = {"__module__": __name__, "__doc__": MaskedModel.__doc__, "_plain": plain}
    return type(plain)(name, (MaskedModel, plain), names)


def attach(model: Any, pruner: AttachedPruner) -> None:
    """Attach a pruner to a model, in place.

    Raises:
        ValueError: the model already has an attribute `pruner`.
        NotImplementedError: it is a Keras 3 model that several workers would train.
    """
    require_one_worker(model)
    plain: Any = type(model)
    if hasattr(model, "pruner"):
        raise ValueError(
            f"model {model.name!r} has an attribute 'pruner' of its own, which is where its Pruner "
            "is found: give it another name."
        )
    masked = _masked_class(plain)
    _register(masked, library_of(plain))
    vars(model).pop("use_legacy_config", None)  # left by tf_keras; see MaskedModel
    vars(model)[PRUNER] = pruner  # bypasses Keras' tracking: it is not a part of the network
    model.__class__ = masked
    reset_functions(model)  # they may have been compiled from the plain training step


def detach(model: Any) -> None:
    """Remove a model's pruner, in place."""
    model.__class__ = model._plain
    del vars(model)[PRUNER]
    reset_functions(model)


def is_masked(model: Any) -> bool:
    """Return whether a model itself (not a nested model) has a pruner."""
    return isinstance(model, MaskedModel)


def _register(cls: type, library: Any) -> None:
    """Register a class for loading masked models; any class of masked models will do."""
    name = f"{PACKAGE}>MaskedModel"
    if library.saving.get_registered_name(cls) == name:
        return
    library.saving.get_custom_objects().pop(name, None)
    library.saving.register_keras_serializable(PACKAGE, "MaskedModel")(cls)


for _base in (keras.Model, tf_keras.Model):  # so that saved models load before one is made
    _register(_masked_class(_base), library_of(_base))
