"""The masks of a model, of either engine, and the class of models that have a pruner.

The masks of a pruner belong to variables: each is the constraint of its variable, which both
Kerases apply after every optimizer step, whatever the model, the loop or the `train_step`. So they
hold in any model that the variable is a part of. tfmot's masks belong to its wrappers.

`attach` gives a model a pruner by exchanging its class for a subclass of it, as torch's
parametrizations do with modules: the object, its layers and its weights stay the same, so it works
on subclassed models too. This is the one place of the package where the class of an object changes.
The subclass does three things: in `fit` it calls the pruner at each optimizer step, which renews
the masks; it writes the pruner into the model's configuration, so that a `.keras` file restores it;
and it adds the masks to weight files and checkpoints, but not to SavedModels.

The masks are no weights of the model: `get_weights`, `count_params` and the summary leave them out.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

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

PRUNER = "_attached_pruner"  # where the object of a model holds its pruner
_Base: Any = object  # a class of either Keras, which subclasses put in its place


class AttachedPruner(Protocol):
    """What this module asks of the pruner of a model; `pruning.Pruner` implements it.

    Attributes:
        state: its variables, a layer of the model's Keras.
        perturb_scores: the radius of its step against training in `perturbed`, 0 for none.
    """

    state: Any
    perturb_scores: float

    def masked_variables(self) -> list[tuple[Any, Any]]:
        """Return the pairs (weight, mask) of the weights that are pruned now."""

    def constrain(self, weight: tf.Tensor, mask: Any, own: Callable[[Any], Any] | None) -> Any:
        """Return the value of a weight after an optimizer step, by its mask and own constraint."""

    def training(self, optimizer: Any = None) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which an optimizer trains the weights."""

    def perturbed(self, loss: Callable[[], tf.Tensor]) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which the gradient of a loss is taken."""

    def reset_step_count(self) -> None:
        """Count the steps of the next optimizer from its current count."""

    def step(self, optimizer: Any = None, *, is_constrained: bool = False) -> None:
        """Count a step of an optimizer, and renew the masks where that is due."""

    def apply(self, optimizer: Any = None) -> None:
        """Set what is pruned to zero: in weights, and in what an optimizer keeps for them."""

    def on_weights_set(self) -> None:
        """Act on weights that were set from outside."""

    def get_config(self) -> dict[str, Any]:
        """Return the configuration from which the pruner is restored, given the same model."""


class MaskConstraint:
    """The constraint of a variable that has a mask.

    A deep copy of a `tf.Variable` has the constraint of the original. For the copy it is the
    variable's own constraint, without the mask.

    Args:
        pruner: whose mask it is.
        mask: True where the weight is kept.
        variable: the variable.
    """

    def __init__(self, pruner: AttachedPruner, mask: Any, variable: Any) -> None:
        self.pruner = pruner
        self.mask = mask
        self.own = own_constraint(variable)  # which acts as well; None for none
        self._keys = {key(each) for each in (variable, *_replicas(variable))}

    def is_of(self, variable: Any) -> bool:
        """Tell whether the mask belongs to a variable, and not to one that this is a copy of."""
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
    """Give a variable of either Keras a mask, beside the constraint that it has."""
    _set_constraint(variable, MaskConstraint(pruner, mask, variable))


def release(variable: Any) -> None:
    """Give a variable back the constraint that it had before its mask."""
    _set_constraint(variable, own_constraint(variable))


def _set_constraint(variable: Any, constraint: Any) -> None:
    if isinstance(variable, keras.Variable):
        variable.constraint = constraint
        return
    for each in _replicas(variable):  # tf.Variable takes it in its constructor only
        each._constraint = constraint


def _replicas(variable: Any) -> Sequence[Any]:
    """Return the variables on the devices that a variable stands for, one without a strategy."""
    inner = tensor_variable(variable)
    inner = inner._variable if isinstance(inner, AutoCastVariable) else inner
    return inner.values if isinstance(inner, tf.distribute.DistributedValues) else [inner]


def pruners(model: Any) -> list[Any]:
    """Return the pruners of a model, each once: its own, those of parts, and of single weights.

    The last are those of another model that a layer is a part of, too.
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
    """Set every pruned weight of `model` to zero where its mask says so.

    Args:
        model: a model of either Keras, pruned or not.
        optimizer: what belongs to the weights in it is masked as well.
    """
    wrappers.apply_masks(model, optimizer)
    for pruner in pruners(model):
        pruner.apply(optimizer)


@contextlib.contextmanager
def training(model: Any, *optimizers: Any) -> Iterator[None]:
    """Enter the training context of every pruner of `model`, for each optimizer."""
    with contextlib.ExitStack() as stack:
        for pruner in pruners(model):
            for optimizer in optimizers:
                stack.enter_context(pruner.training(optimizer))
        yield


@contextlib.contextmanager
def perturbed(model: Any, loss: Callable[[], tf.Tensor]) -> Iterator[None]:
    """Enter the context of every pruner of `model` in which the gradient of a loss is taken.

    Args:
        model: a model of either Keras, pruned or not.
        loss: computes the value to descend, a scalar; called once by each pruner that asks for it.
    """
    with contextlib.ExitStack() as stack:
        for pruner in pruners(model):
            stack.enter_context(pruner.perturbed(loss))
        yield


def after_step(model: Any, optimizer: Any) -> None:
    """Apply and renew the masks of `model` after an optimizer step, which alone changed weights."""
    wrappers.apply_masks(model, optimizer)
    for pruner in pruners(model):
        pruner.step(optimizer, is_constrained=True)


def keep(variable: Any, mask: Any) -> Any:
    """Set a variable to zero where its mask is False."""
    return variable.assign(kept(variable, mask))


def kept(value: Any, mask: Any) -> tf.Tensor:
    """Return values, and zero where their mask is False."""
    # Not by a product: that makes -0.0 of negative weights, and keeps NaN and infinity. And not by
    # `tf.where`, which is slower, as it looks for shapes to broadcast.
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
        """Return a model of the plain class: what is built by a constructor has no pruner yet."""
        return cls._plain(*args, **kwargs)

    @property
    def pruner(self) -> Any:
        """The pruner that this model was given."""
        return vars(self)[PRUNER]

    @property
    def pruning_state(self) -> Any:
        """The pruner's variables, as a layer: that is how weight files find them."""
        return self.pruner.state

    def make_train_function(self, *args: Any, **kwargs: Any) -> Any:
        """Compile the training step, for which the optimizer makes its variables first.

        A step in which variables are made is traced a second time by TensorFlow.
        """
        if self.optimizer is not None and self._has_step_of_keras:
            with self.distribute_strategy.scope():
                build(self.optimizer, self.trainable_variables)
        return super().make_train_function(*args, **kwargs)

    @property
    def _has_step_of_keras(self) -> bool:
        """Whether the training step is that of Keras, which alone changes weights in it."""
        return self._plain.train_step is library_of(type(self)).Model.train_step

    def train_step(self, data: Any) -> Any:
        """Take the model's own training step, then let the pruner act on what it has changed."""
        with depending_on_batch(self, data):
            with self.pruner.training():
                logs = super().train_step(data)
            # A step of the user's own may change weights after its optimizer has.
            self.pruner.step(is_constrained=self._has_step_of_keras)
        return logs

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and mask in the end: a callback may have put other weights in place."""
        with self.pruner.training():
            history = super().fit(*args, **kwargs)
        if is_masked(self):  # a callback may have taken the pruner off
            self.pruner.apply(self.optimizer)
        return history

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Configure training; steps are counted from the optimizer's current count."""
        super().compile(*args, **kwargs)
        self.pruner.reset_step_count()

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Configure training as a saved model was."""
        with _as_plain(self):  # Keras does it for models of its own only
            self.compile_from_config(config)

    def set_weights(self, weights: Any) -> None:
        """Set the weights, those that are pruned to zero."""
        super().set_weights(weights)
        self.pruner.on_weights_set()

    def load_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """Load weights, and masks where the file has them; what is pruned becomes zero."""
        try:
            return super().load_weights(filepath, *args, **kwargs)
        finally:  # also if a part of them did not fit
            self.pruner.on_weights_set()

    def save_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """Save weights and masks.

        Raises:
            ValueError: `filepath` names tf_keras' legacy format, which has no place for masks.
        """
        name = str(filepath)
        if name.endswith((".h5", ".hdf5", ".keras")) and not name.endswith(".weights.h5"):
            raise ValueError(
                f"filepath must end in .weights.h5, got {name!r}: the legacy format has no place "
                "for the masks of a model that is being pruned."
            )
        return super().save_weights(filepath, *args, **kwargs)

    def export(self, *args: Any, **kwargs: Any) -> Any:
        """Export the model with its masks applied."""
        self.pruner.apply()
        return super().export(*args, **kwargs)

    def __reduce__(self) -> Any:
        """Pickle as the plain class does: what stands in a pickle must be found by its name."""
        function, *rest = super().__reduce__()
        if getattr(function, "__self__", None) is type(self):
            function = getattr(library_of(type(self)).Model, function.__name__)
        return (function, *rest)

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Save the model with its masks to a `.keras` file.

        Raises:
            ValueError: `filepath` has another ending: other formats have no place for masks.
        """
        if not str(filepath).endswith(".keras"):
            raise ValueError(
                f"filepath must end in .keras, got {str(filepath)!r}: only that format holds the "
                "masks of a model that is being pruned. Strip the model first to save it in "
                "another one."
            )
        super().save(filepath, *args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """Return the configuration of the model without its pruner, and that of the pruner.

        Every function that saves a model calls this before it saves the weights; so weights that
        were set from outside are masked here.

        Raises:
            ValueError: it is for the legacy `.h5` format of Keras 3.
        """
        if global_state.get_global_attribute("use_legacy_config", False):
            raise ValueError(_refusal(self))
        self.pruner.on_weights_set()
        with _as_plain(self):
            plain = library_of(type(self)).saving.serialize_keras_object(self)
        plain.pop("compile_config", None)  # it is in the outer configuration
        return {"model": plain, "pruner": _ModernConfig(self.pruner.get_config(), _refusal(self))}

    # tf_keras' clone_model calls the constructor of models whose configuration is Keras' own. So it
    # does here, and a clone is a plain model, as in Keras 3.
    get_config._is_default = True  # type: ignore[attr-defined]

    @property
    def use_legacy_config(self) -> bool:
        """Whether the configuration is that of the legacy `.h5` format of tf_keras: it never is.

        tf_keras sets this attribute before it writes such a file, and leaves it set on the models
        inside the one that is saved.
        """
        return False

    @use_legacy_config.setter
    def use_legacy_config(self, value: bool) -> None:  # noqa: ARG002
        raise ValueError(_refusal(self))

    def get_build_config(self) -> None:
        """Return nothing: the configuration inside has it."""

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Build the model, and give it its pruner."""
        library = library_of(cls)
        model = library.saving.deserialize_keras_object(config["model"], custom_objects)
        if not config["pruner"]["weights"]:  # none of those that were pruned was left
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
    """Make a masked model one of its own class during the block."""
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
    """A part of a configuration that the legacy serialization of tf_keras refuses to write.

    The models in a Sequential can't know the format that their configuration is for. But only the
    legacy serialization calls the `get_config` of a dictionary.

    Args:
        values: of the dictionary.
        refusal: the message of the error.
    """

    def __init__(self, values: dict[str, Any], refusal: str) -> None:
        super().__init__(values)
        self._refusal = refusal

    def get_config(self) -> dict[str, Any]:
        """Return the dictionary for a SavedModel, which is written by this serialization, too.

        Raises:
            NotImplementedError: the format is `.h5`.
        """
        if in_tf_saved_model_scope():
            return dict(self)
        raise NotImplementedError(self._refusal)


class PruningState(_Base):
    """The variables of a pruner, as a layer of the model's Keras.

    A weight file has those of the weights that the model holds when it is saved: a layer may have
    been taken out of it, or quantized, since it was pruned.

    Attributes:
        step: the number of optimizer steps since the pruner was attached.
        seen: the optimizer's own count when the pruner last acted; -1 before that.
        frozen: whether the masks are to stay as they are.
        left_out: a vector, True for the weights that were frozen at the last renewal of the masks.
        masks: one TensorFlow variable per pruned weight, True where the weight is kept.
        dense: the weights before pruning, likewise; none unless scores are trained.
        scores: what the weights are worth, likewise.
        share_logits: a vector that the shares of the layers follow from, if these are trained.
        share_velocities: the momentum of these.

    Args:
        shapes: of the pruned weights.
        dtypes: of the pruned weights if their scores are trained, else empty.
        has_shares: whether the shares of the layers are trained, too.
        held: returns which of them the model holds, by their places.
        on_loaded: is called when the weight file of a dense model has been loaded.
    """

    def __init__(
        self,
        shapes: list[tuple[int, ...]],
        dtypes: list[str],
        has_shares: bool,
        held: Callable[[], list[int]],
        on_loaded: Callable[[], None],
    ) -> None:
        super().__init__(name="pruning_state", dtype="float32", trainable=False)
        self._add("step", (), "int64")
        self._add("seen", (), "int64")
        self._add("frozen", (), "bool")
        self._add("left_out", (len(shapes),), "bool")
        self.seen.assign(-1)
        names = ("share_logits", "share_velocities") if has_shares else ()
        shares = [self._add(name, (len(shapes),), "float32") for name in names]
        masks = [self._add(f"mask_{i}", shape, "bool", "ones") for i, shape in enumerate(shapes)]
        scored = [
            (self._add(f"dense_{i}", shapes[i], dtype), self._add(f"score_{i}", shapes[i], dtype))
            for i, dtype in enumerate(dtypes)
        ]
        self.__dict__.update(  # past Keras' own tracking
            masks=masks,
            dense=[dense for dense, _ in scored],
            scores=[score for _, score in scored],
            _shares=shares,
            _held=held,
            _on_loaded=on_loaded,
        )
        self.built = True

    def _add(
        self, name: str, shape: tuple[int, ...], dtype: str, initializer: str = "zeros"
    ) -> Any:
        """Make a variable; an attribute holds it, as checkpoints would not find it in a list."""
        variable = self.add_weight(
            name=name, shape=shape, dtype=dtype, initializer=initializer, trainable=False
        )
        setattr(self, name, variable)
        return tensor_variable(variable)

    def _saved(self) -> list[Any]:
        """Return the variables that a weight file has before `left_out`, in its order."""
        held = self._held()
        scored = list(zip(self.dense, self.scores, strict=True))
        return [
            *(self.step, self.seen, self.frozen),
            *(self.masks[index] for index in held),
            *(variable for index in held if scored for variable in scored[index]),
        ]

    def save_own_variables(self, store: Any) -> None:
        """Write what belongs to the weights that the model holds."""
        values = [variable.numpy() for variable in self._saved()]
        values += [vector.numpy()[self._held()] for vector in (*self._shares, self.left_out)]
        for position, value in enumerate(values):
            store[str(position)] = value

    def load_own_variables(self, store: Any) -> None:
        """Load what a weight file has; that of a dense model has nothing, and masks stay.

        Raises:
            ValueError: the file is that of a model with other weights pruned.
        """
        if not store.keys():
            self._on_loaded()
            return
        saved, count = self._saved(), len(store.keys())
        vectors = (*self._shares, self.left_out)
        most = len(saved) + len(vectors)
        if count not in (most - 1, most):  # older files lack what was left out
            raise ValueError(
                f"The file has {count} variables of a pruner, and this model's has "
                f"{most}: other weights of the model were pruned when it was saved, or "
                "by another method. Load it into a model that is pruned in the same way."
            )
        for position, variable in enumerate(saved):
            variable.assign(store[str(position)])
        for position, vector in zip(range(len(saved), count), vectors, strict=False):
            value = vector.numpy()
            value[self._held()] = store[str(position)]
            vector.assign(value)


class _Keras3State(PruningState, keras.layers.Layer):
    """`PruningState` of a Keras 3 model."""


class _TfKerasState(PruningState, tf_keras.layers.Layer):
    """`PruningState` of a tf_keras model."""


def new_state(model: Any, **arguments: Any) -> PruningState:
    """Return fresh variables for a pruner of `model`, given the arguments of `PruningState`."""
    kind = _Keras3State if isinstance(model, keras.Model) else _TfKerasState
    with model.distribute_strategy.scope():
        return kind(**arguments)


@functools.cache
def _masked_class(plain: Any) -> Any:
    """Return the class of masked models that derives from one of plain models."""
    name = f"Masked{plain.__name__}"
    names = {"__module__": __name__, "__doc__": MaskedModel.__doc__, "_plain": plain}
    return type(plain)(name, (MaskedModel, plain), names)


def attach(model: Any, pruner: AttachedPruner) -> None:
    """Give a model a pruner, in place.

    Raises:
        ValueError: the model has an attribute `pruner` of its own.
        NotImplementedError: it is of Keras 3, and several workers are to train it.
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
    vars(model)[PRUNER] = pruner  # past Keras' own tracking: it is no part of the network
    model.__class__ = masked
    reset_functions(model)  # they may have been compiled from the plain training step


def detach(model: Any) -> None:
    """Take a model's pruner away, in place."""
    model.__class__ = model._plain
    del vars(model)[PRUNER]
    reset_functions(model)


def is_masked(model: Any) -> bool:
    """Tell whether a model has a pruner itself; not whether a model inside has one."""
    return isinstance(model, MaskedModel)


def _register(cls: type, library: Any) -> None:
    """Register a class as the one that loads masked models; any of them does."""
    name = f"{PACKAGE}>MaskedModel"
    if library.saving.get_registered_name(cls) == name:
        return
    library.saving.get_custom_objects().pop(name, None)
    library.saving.register_keras_serializable(PACKAGE, "MaskedModel")(cls)


for _base in (keras.Model, tf_keras.Model):  # so that saved ones load before any is made
    _register(_masked_class(_base), library_of(_base))
