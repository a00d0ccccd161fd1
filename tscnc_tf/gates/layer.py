"""The wrapper layer that puts gates on the filters or input units of another layer."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tscnc_tf import _checks, _keras, functional
from tscnc_tf._keras import flavours, gated, keras, tf_keras, wrappers
from tscnc_tf._keras import layers as kernel_layers
from tscnc_tf.functional.gates import uniform

__all__ = ["Gated"]

LOG_ALPHA_RANGE = (math.log(0.01), math.log(100.0))
_INITIAL_DEVIATION = 0.01

_DENSE = kernel_layers.classes("Dense")
_CONVOLUTIONS = kernel_layers.classes(*kernel_layers.ALL_CONVOLUTIONS)

_Base: Any = object  # replaced by Keras' Wrapper in the subclasses at the end of this file


@dataclasses.dataclass(frozen=True, eq=False)
class Groups:
    """The groups of weights of a layer, one for each gate.

    Attributes:
        kind: "filter" (all weights of one output channel) or "input" (all that read one unit).
        kernel: the variable that contains the groups.
        bias: the variable whose entries have the same gates, or None.
        shape: the shape in which gates broadcast with the kernel.
    """

    kind: str
    kernel: Any
    bias: Any
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of groups."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """The number of weights of each group."""
        return math.prod(self.kernel.shape) // self.count

    def squared_norms(self) -> tf.Tensor:
        """Return the squared Euclidean norm of each group, as a float32 vector."""
        squares = tf.square(tf.cast(tf.convert_to_tensor(self.kernel), tf.float32))
        rank = len(self.kernel.shape)
        shape = (1,) * (rank - len(self.shape)) + self.shape
        axes = [axis for axis in range(rank) if shape[axis] == 1]
        return tf.reshape(tf.reduce_sum(squares, axis=axes), (-1,))


def kind_of(layer: Any) -> str:
    """Return the kind of groups of a layer; an empty text if it can't have gates."""
    if isinstance(layer, _DENSE):
        return "input"
    return "filter" if isinstance(layer, _CONVOLUTIONS) else ""


def groups_of(layer: Any) -> Groups:
    """Return the groups of a built layer that can have gates."""
    kind = kind_of(layer)
    # The filters of a separable convolution are in the last kernel.
    spec = kernel_layers.kernel_specs(layer)[-1]
    kernel = getattr(layer, spec.attribute)
    *_, first, last = kernel.shape
    if kind == "input":
        return Groups(kind, kernel, None, (first, 1))
    shapes = {"standard": (last,), "transposed": (first, 1), "depthwise": (first, last)}
    return Groups(kind, kernel, layer.bias, shapes[spec.layout])


class Gated(gated.GatedLayer, _Base):
    r"""A convolution or dense layer with a hard-concrete gate on each filter or input unit.

    A convolution of any kind (also transposed, depthwise, separable or grouped) has one gate per
    output filter, for its kernel and bias. A dense layer has one per input unit, for a row of its
    kernel. The layer computes with :math:`z_g w_g` in place of :math:`w_g`:

    * in training with gates that are drawn once per forward pass, by `functional.hard_concrete`,
      and are the same for the whole batch;
    * at inference with `functional.deterministic_gate`, without randomness: attacks and evaluation
      see the same network.

    `losses` has the penalty

    .. math:: \text{sparsity\_factor} \cdot \sum_g T_a(p_g u_g), \qquad
              u_g = \tfrac12\,\text{weight\_decay}\,\|w_g\|^2 + \text{l0\_factor}\,|g|

    with :math:`p_g` the probability that the gate is open and :math:`|g|` the number of kernel
    weights of the group. It is a regularizer of :math:`\log\alpha`, so it is added exactly once,
    however often the layer is called. After each optimizer step a constraint clips
    :math:`\log\alpha` to [log 0.01, log 100].

    `l0_factor=1e-6` is about the value in the paper on gates for 60 000 examples (0.1/N).
    `weight_decay=5e-4` is usual for image classifiers. An optimizer's own weight decay is applied
    in addition, also to :math:`\log\alpha`: it moves this towards 0, where gates are half open.

    Gates are drawn by the Philox generator, from `seed` and the number of draws so far, which is an
    int64 weight of the layer. So training from a checkpoint continues with the same draws, and
    eager code, graphs and XLA draw the same. All replicas of a distribution strategy draw the same
    gates, as they train on parts of one batch. A layer that a model calls in several places has the
    same gates in all of them, if `calls` is the number of calls.

    Other regularizers are applied to the kernel without gates; `inspection` uses the kernel with
    the gates of inference. `prune` masks the kernel inside. If the weights of the layer inside are
    frozen when the gates are added, the gates are frozen, too.

    It is a layer of the same Keras as `layer`. A subclass derives from the class for its Keras,
    `gates.layer.Keras3Gated` or `TfKerasGated`.

    Args:
        layer: the layer to put gates on, built or not.
        drop_rate: the initial probability d that a gate is drawn below one half, in (0, 1):
            :math:`\log\alpha \sim N(\log((1-d)/d), 0.01^2)`. The probability that it is exactly
            closed is lower: 8 % with d = 0.3.
        sparsity_factor: the factor of the penalty, >= 0.
        weight_decay: the factor of the squared norm in the cost of a group, >= 0.
        l0_factor: the cost of each weight of a group, >= 0.
        a: the parameter of the transformed l1, > 0. The penalty is proportional to costs far below
            `a`, as with the defaults: about 1e-3 for a filter of 1000 weights. With an `a` of the
            size of the costs, its gradient is larger for groups of low cost.
        seed: of the initial values and of all draws; give each layer its own.
        calls: how often the model calls the layer in one forward pass.
        **kwargs: arguments of Keras' layers. The name is by default that of the layer inside.

    Raises:
        TypeError: `layer` is no Keras layer, or an argument has a wrong type.
        ValueError: `layer` is of a kind that can't have gates, is quantized or has LoRA enabled
            (also later: first `fold`, then `quantize` or `enable_lora`), or an argument is out of
            range.

    Example:
        >>> import keras
        >>> import tscnc_tf as tscnc
        >>> layer = tscnc.gates.Gated(keras.layers.Conv2D(8, 3, activation="relu"))
        >>> model = keras.Sequential([keras.Input((8, 8, 1)), layer])
        >>> tuple(layer.log_alpha.shape), len(model.losses)
        ((8,), 1)

    Reference:
        Louizos, Welling & Kingma 2018, arXiv 1712.01312; TSCNC, arXiv 2503.20454, for the
        transformed l1 of the expected cost.
    """

    def __new__(cls, layer: Any, **kwargs: Any) -> Any:  # noqa: ARG004
        """Return an object of the subclass for the Keras of `layer`.

        `Gated` is one name for two classes. Python then calls `__init__` of the chosen class.
        """
        if not isinstance(layer, keras.layers.Layer | tf_keras.layers.Layer):
            raise TypeError(f"layer must be a layer of Keras 3 or tf_keras, got {layer!r}.")
        kind = Keras3Gated if isinstance(layer, keras.layers.Layer) else TfKerasGated
        return super().__new__(flavours.subclass_of_library(cls, Gated, kind))

    def __init__(
        self,
        layer: Any,
        *,
        drop_rate: float = 0.3,
        sparsity_factor: float = 1.0,
        weight_decay: float = 5e-4,
        l0_factor: float = 1e-6,
        a: float = 1.0,
        seed: int = 0,
        calls: int = 1,
        **kwargs: Any,
    ) -> None:
        if not kind_of(layer):
            raise ValueError(
                f"layer {layer.name!r} of class {type(layer).__name__} can't have gates: they are "
                "for convolutions and dense layers."
            )
        if state := kernel_layers.adaptation(layer):
            raise ValueError(_not_plain(layer, f"can't have gates: {state}."))
        kwargs = {"name": layer.name, "dtype": layer.dtype_policy, **kwargs}
        # The layer inside is not called, so this layer does what Keras does around a call.
        kwargs.setdefault("activity_regularizer", layer.activity_regularizer)
        kwargs.setdefault("trainable", layer.trainable)
        super().__init__(layer, **kwargs)
        self.drop_rate = _checks.number("drop_rate", drop_rate, above=0.0, below=1.0)
        self.sparsity_factor = _checks.factor("sparsity_factor", sparsity_factor)
        self.weight_decay = _checks.factor("weight_decay", weight_decay)
        self.l0_factor = _checks.factor("l0_factor", l0_factor)
        self.a = _checks.number("a", a, above=0.0)
        self.seed = _checks.integer("seed", seed, minimum=0)
        self.calls = _checks.integer("calls", calls, minimum=1)
        self.supports_masking = layer.supports_masking
        if isinstance(layer, kernel_layers.ADAPTABLE):
            # Keras' `model.quantize` calls the method of the layer inside, not of this one.
            layer.quantize = _refusal(layer, "quantized")
            layer.enable_lora = _refusal(layer, "given LoRA")

    def build(self, input_shape: Any = None) -> None:
        """Build the layer inside, and create a gate for each of its groups."""
        super().build(input_shape)
        is_keras_3 = _keras.flavour(self) == "keras"
        first = "only_first_replica" if is_keras_3 else tf.VariableAggregation.ONLY_FIRST_REPLICA
        # These weights are not cast to float16, whatever the dtype policy.
        autocast = {"autocast" if is_keras_3 else "experimental_autocast": False}
        self.log_alpha = self.add_weight(
            name="log_alpha",
            shape=(self.groups.count,),
            dtype="float32",
            initializer=self._initial_log_alpha,
            regularizer=self._penalty,
            constraint=_clipped,
            aggregation=first,
            **autocast,
        )
        self.draws = self.add_weight(
            name="draws",
            shape=(),
            dtype="int64",
            initializer="zeros",
            trainable=False,
            aggregation=first,
            **autocast,
        )
        self.input_spec = self.layer.input_spec
        self.built = True

    @property
    def groups(self) -> Groups:
        """The groups of weights that have a gate each."""
        return groups_of(self.layer)

    def call(self, inputs: Any, training: Any = None) -> Any:
        """Return the output of the layer inside, computed with gated weights."""
        gates = self._gates(training)
        values = {}
        for variable, shape in self._shapes():
            value = tf.convert_to_tensor(variable)
            values[id(variable)] = gated.times(value, tf.reshape(gates, shape))
        acting = gated.with_values(self.layer, values)
        takes_training = "training" in inspect.signature(self.layer.call).parameters
        return acting.call(inputs, **({"training": training} if takes_training else {}))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the output shape of the layer inside."""
        return self.layer.compute_output_shape(input_shape)

    def gated_variables(self) -> Iterator[tuple[Any, Any]]:
        """Yield (variable, gates) for inference; gates broadcast with the variable."""
        gates = functional.deterministic_gate(self.log_alpha)
        for variable, shape in self._shapes():
            yield variable, tf.reshape(gates, shape)

    def own_variables(self) -> list[Any]:
        """Return the variables of the gates, without those of the layer inside."""
        return [self.log_alpha, self.draws]

    def get_prunable_weights(self) -> list[Any]:
        """Return the weights of the layer inside that tfmot prunes."""
        return wrappers.prunable_weights(self.layer) or []

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            **super().get_config(),
            "drop_rate": self.drop_rate,
            "sparsity_factor": self.sparsity_factor,
            "weight_decay": self.weight_decay,
            "l0_factor": self.l0_factor,
            "a": self.a,
            "seed": self.seed,
            "calls": self.calls,
        }

    def _shapes(self) -> list[tuple[Any, tuple[int, ...]]]:
        """Return the gated variables, and the shape of the gates for each."""
        groups = self.groups
        shapes: list[tuple[Any, tuple[int, ...]]] = [(groups.kernel, groups.shape)]
        return shapes if groups.bias is None else [*shapes, (groups.bias, (-1,))]

    def _gates(self, training: Any) -> tf.Tensor:
        if tf.is_tensor(training):
            return tf.cond(tf.cast(training, tf.bool), self._drawn, self._deterministic)
        return self._drawn() if training else self._deterministic()

    def _deterministic(self) -> tf.Tensor:
        return functional.deterministic_gate(self.log_alpha)

    def _drawn(self) -> tf.Tensor:
        draws = tf.identity(flavours.tensor_variable(self.draws))
        self.draws.assign_add(1)
        return functional.hard_concrete(self.log_alpha, self._uniform(1 + draws // self.calls))

    def _uniform(self, draw: Any) -> tf.Tensor:
        return uniform(self.groups.count, self.seed, draw)

    def _initial_log_alpha(self, shape: Any, dtype: Any = None, **_: Any) -> tf.Tensor:
        mean = math.log((1.0 - self.drop_rate) / self.drop_rate)
        normal = tf.math.ndtri(self._uniform(0))  # draw 0; gates use draws 1, 2, ...
        log_alpha = _clipped(mean + _INITIAL_DEVIATION * normal)
        return tf.cast(tf.reshape(log_alpha, shape), dtype or tf.float32)

    def _penalty(self, log_alpha: Any) -> tf.Tensor:
        """Return the penalty of all gates, a float32 scalar."""
        groups = self.groups
        cost = 0.5 * self.weight_decay * groups.squared_norms() + self.l0_factor * groups.size
        expected = functional.open_probability(log_alpha) * cost
        return self.sparsity_factor * tf.reduce_sum(functional.transformed_l1(expected, self.a))


def _refusal(layer: Any, what: str) -> Callable[..., None]:
    """Return a function that raises a ValueError, to replace a method of a gated layer."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError(_not_plain(layer, f"can't be {what}: it has gates."))

    return refuse


def _not_plain(layer: Any, problem: str) -> str:
    return (
        f"layer {layer.name!r} {problem} Gates multiply a kernel of floats that the layer itself "
        "computes with: add them first, and quantize, or enable LoRA in, the result of "
        "gates.fold(model)."
    )


def _clipped(log_alpha: Any) -> tf.Tensor:
    return tf.clip_by_value(tf.convert_to_tensor(log_alpha), *LOG_ALPHA_RANGE)


@flavours.registered_as("Gated")
class Keras3Gated(Gated, keras.layers.Wrapper):
    """`Gated` around a Keras 3 layer."""


@flavours.registered_as("Gated")
class TfKerasGated(Gated, tf_keras.layers.Wrapper):
    """`Gated` around a tf_keras layer."""
