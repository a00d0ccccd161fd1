"""Functions that put gates into an existing model, and fold them into its weights."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _keras
from tscnc_tf._keras import cloning, flavours, gated, masks, wrappers
from tscnc_tf._keras import layers as kernel_layers
from tscnc_tf._keras.models import listed, selector
from tscnc_tf.gates.layer import Gated, kind_of


def add_gates(
    model: Any,
    layers: Any = None,
    *,
    drop_rate: float = 0.3,
    sparsity_factor: float = 1.0,
    weight_decay: float = 5e-4,
    l0_factor: float = 1e-6,
    a: float = 1.0,
    seed: int = 0,
) -> Any:
    r"""Return a copy of a model with gates on the filters and input units of its layers.

    Each chosen convolution or dense layer is wrapped by a `Gated` of the same name. The weights are
    the same, but not the outputs: gates are partly open at first (with a `drop_rate` of 0.3 they
    are about 0.74 at inference), so the model must be trained afterwards. With the defaults the
    penalty of a layer is :math:`\sum_g T_a(p_g u_g)`; `sparsity_factor` multiplies it.

    Train the copy like any model, then call `fold`. To prune single weights as well, add the gates
    first, then call `prune`: gates can't be added to a pruned model. Call Keras' `quantize` and
    `enable_lora` on the result of `fold`: layers with gates raise an error.

    Args:
        model: a built Sequential or functional model of either Keras. Nested models are included,
            and a layer that is used in several places has the same gates in each.
        layers: which layers, as in `pruning.add_regularizers`; None for all convolutions and dense
            layers, including that of the logits (whose gates are on its inputs, so that no class
            can be lost). Layers inside wrappers such as TimeDistributed get no gates.
        drop_rate: the initial probability that a gate is drawn below one half, in (0, 1); see
            `Gated`.
        sparsity_factor: the factor of the penalty, >= 0.
        weight_decay: the factor of the squared norm in the cost of a group, >= 0.
        l0_factor: the cost of each weight of a group, >= 0.
        a: the parameter of the transformed l1, > 0; see `Gated`.
        seed: of the initial values and of all draws; each layer gets its own seed from it.

    Returns:
        A new, uncompiled model of the same Keras. The given model is not changed.

    Raises:
        TypeError: `model` is no Keras model, or an argument has a wrong type.
        ValueError: the model is subclassed, not built, has gates already, is pruned, or has a layer
            that can't be rebuilt from its configuration; no chosen layer can have gates, an element
            of a list matches no layer, a chosen layer is quantized or has LoRA enabled, or an
            argument is out of range.

    Warns:
        UserWarning: some chosen kernels can't have gates.

    Example:
        >>> import keras
        >>> import tscnc_tf as tscnc
        >>> model = keras.Sequential([
        ...     keras.Input((8, 8, 1)), keras.layers.Conv2D(8, 3, name="conv"),
        ...     keras.layers.Flatten(), keras.layers.Dense(3, name="logits")])
        >>> model = tscnc.gates.add_gates(model, "conv", sparsity_factor=10.0)
        >>> [(row.name, row.gates) for row in tscnc.gates.report(model).rows]
        [('conv', 8)]

    Reference:
        Louizos, Welling & Kingma 2018, arXiv 1712.01312; TSCNC, arXiv 2503.20454.
    """
    library = _require_plain(model)
    options = {
        "drop_rate": drop_rate,
        "sparsity_factor": sparsity_factor,
        "weight_decay": weight_decay,
        "l0_factor": l0_factor,
        "a": a,
    }
    called = kernel_layers.calls(model)
    able = [part for part in kernel_layers.flatten(model) if kind_of(part) and id(part) in called]
    chosen = selector("layers", layers, model, able)
    gating = _Gating(library, model, chosen, options, seed)
    copy = gating.rebuild(model)
    if not gating.count:
        raise ValueError(
            f"layers={layers!r} chooses no layer of model {model.name!r} that can have gates; "
            f"those that can are {listed(able, layers)}."
        )
    if gating.skipped:
        warnings.warn(
            f"These kernels are chosen, but get no gates: {', '.join(gating.skipped)}. Gates are "
            "for convolutions and dense layers that are no part of another layer. To avoid this "
            "warning, choose the other layers by layers=.",
            UserWarning,
            stacklevel=2,
        )
    return copy


def fold(model: Any) -> Any:
    """Return a model without gates, with the outputs that the gated one has at inference.

    The gates are multiplied into the weights: into kernel and bias of a filter, or into the kernel
    row of an input unit. Filters with a closed gate become zero, and `pruning.compact` removes
    them. Masks of `prune` are applied before. `strip` and exports fold, too.

    Args:
        model: a built Sequential or functional model of either Keras. It is not changed, except
            that its masks are applied.

    Returns:
        A new, uncompiled model with its own weights, the layer classes and names from before
        `add_gates`, and no pruner. A model without gates is returned as it is.

    Raises:
        TypeError: `model` is no Keras model.
        ValueError: it has gates and is subclassed or a trainer, or a gated layer is inside a layer
            whose parts can't be replaced.

    Example:
        >>> import keras
        >>> import tscnc_tf as tscnc
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> folded = tscnc.gates.fold(tscnc.gates.add_gates(model))
        >>> type(folded.layers[-1]).__name__
        'Dense'
    """
    _keras.library("model", model)
    if not gated.gated_layers(model):
        return model
    library = flavours.require_network(model)
    _keras.require_graph_model(
        "model", model, "The gated layers' `gated_variables()` say which weights have which gates."
    )
    bare = cloning.bare(model)
    called = kernel_layers.calls(bare)
    if inside := [layer.name for layer in gated.gated_layers(bare) if id(layer) not in called]:
        raise ValueError(
            f"model {model.name!r} has gates that can't be folded, in {', '.join(inside)}: they "
            "are inside a layer whose parts can't be replaced."
        )
    masks.apply(model)
    return _Folding(library, gated.factors(bare)).rebuild(bare)


class _Gating(cloning.Rebuilder):
    """Rebuilds a model with gates on the chosen layers."""

    def __init__(
        self,
        library: types.ModuleType,
        model: Any,
        chosen: Callable[[Any], bool],
        options: dict[str, Any],
        seed: int,
    ) -> None:
        super().__init__(library)
        self._options = options
        self._seed = _checks.seed("seed", seed)
        self._calls = kernel_layers.calls(model)
        # A chosen layer includes the layers inside it. The model itself is not tested: a predicate
        # such as "not the last layer" holds for it, too.
        self._chosen = {
            id(inner)
            for part in kernel_layers.flatten(model)
            if part is not model and chosen(part)
            for inner in kernel_layers.flatten(part)
        }
        self.count = 0
        self._skipped: dict[int, str] = {}

    def replacement(self, layer: Any) -> Any:
        """Return the copy of a layer, with gates if it is chosen and can have them."""
        new = self.copied(layer)
        if id(layer) in self._chosen and kind_of(layer):
            seed = np.random.SeedSequence([self._seed, self.count]).generate_state(1)
            self.count += 1
            calls = self._calls[id(layer)]
            return Gated(new, seed=int(seed[0]), calls=calls, **self._options)
        for part in kernel_layers.flatten(layer):
            for attribute, kernel in kernel_layers.named_kernels(part):
                if id(part) in self._chosen:
                    self._skipped[id(kernel)] = f"{part.name}/{attribute}"
        return new

    @property
    def skipped(self) -> list[str]:
        """The names of the chosen kernels that can't have gates."""
        return list(self._skipped.values())


class _Folding(cloning.Rebuilder):
    """Rebuilds a model with plain layers in place of gated ones, the gates in their weights."""

    def __init__(self, library: types.ModuleType, gates: dict[int, tf.Tensor]) -> None:
        super().__init__(library)
        self._gates = gates

    def replacement(self, layer: Any) -> Any:
        """Return the copy of a layer, or of the layer in a gated one."""
        return self.copied(layer.layer if gated.is_gated(layer) else layer)

    def weights(self, layer: Any) -> dict[str, np.ndarray]:
        """Return the weights that have gates, multiplied by them."""
        return {
            name: _acting(value, self._gates[id(value)])
            for name, value in vars(layer).items()
            if id(value) in self._gates
        }


def _require_plain(model: Any) -> types.ModuleType:
    """Return the Keras of a model that can be given gates; raise for all others."""
    library = flavours.require_network(model)
    _keras.require_graph_model("model", model, "There, replace layers by `Gated(layer)`.")
    _keras.require_built("model", model)
    if found := [layer.name for layer in gated.gated_layers(model)]:
        raise ValueError(f"model {model.name!r} has gates already, in {found}: fold it first.")
    if wrappers.wrapped_layers(model) or masks.pruners(model):
        raise ValueError(
            f"model {model.name!r} is being pruned: add gates first, then call prune on the "
            "result, or strip the model before."
        )
    return library


def _acting(weight: Any, gates: tf.Tensor) -> np.ndarray:
    """Return a weight times its gates, with positive zeros: negative ones don't compress."""
    return np.asarray(gated.times(tf.convert_to_tensor(weight), gates) + 0.0)
