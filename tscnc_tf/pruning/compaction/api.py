"""The function `compact`."""

from __future__ import annotations

import collections
import math
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

from tscnc_tf import _checks, _keras, _probe, regularizers
from tscnc_tf._channels.graph import Call, Graph, unroll
from tscnc_tf._channels.layers import Reader, count_flops
from tscnc_tf._channels.operations import Barrier, ChannelPlan, Edit, Step
from tscnc_tf._keras import cloning, flavours, gated, masks, wrappers
from tscnc_tf.pruning.compaction.channels import ChannelAnalysis
from tscnc_tf.pruning.compaction.report import Compaction, Kept, LayerChange, LeftAlone


def compact(model: Any, *, probe: Any = None, tolerance: float | None = None) -> Compaction:
    r"""Return a smaller model with the same logits, without the dead filters.

    Zeros in a kernel cost as much time as any other value. But a filter of zeros has a constant
    output, after bias, normalisation and activation, and the next layer can fold this constant into
    its bias. With :math:`w_{tio}` the kernel of the next layer (taps :math:`t`, inputs :math:`i`,
    outputs :math:`o`) and :math:`D` its dead inputs, which have the constant values :math:`c_i`,
    the outputs do not change without these inputs if the bias becomes

    .. math:: b'_o = b_o + \sum_{i \in D} c_i \sum_t w_{tio}.

    A filter or unit is removed (1) if its output is constant for every input, or (2) if its output
    is not read, because all weights for it are zero. This is repeated for the filters that become
    dead thereby. Constants are propagated through BatchNorm (in inference mode), element-wise
    activations, pooling, flattening, additions, products and concatenations. A layer without a bias
    gets one if it needs it.

    Some channels can only be removed together:

    * A channel that is added to others (as in a residual network) is removed from all branches or
      from none; one that is concatenated in several places, from all of them or from none.
    * Grouped convolutions have groups of equal size in Keras. Dead groups are removed. All others
      lose the same number of inputs, and of filters.
    * Heads of `MultiHeadAttention` are removed if their values are all constant, or not read by the
      output projection. The other heads lose the same number of values, and no keys.

    `kept` names the dead channels that can't be removed, with the reason. For example, a constant
    other than zero does not fold into a convolution with padding="same", which reads zeros at the
    border. Layers of unknown effect (recurrent layers, `LayerNormalization`, `Lambda`, your own
    classes, layers that are used twice, ...) keep all their channels, and `left_alone` names them.
    The inputs and outputs of the model keep their shapes, and layers keep their names, dtypes,
    regularizers and `trainable`. The result is for inference: in training, BatchNorm and dropout
    would have treated the constants differently.

    Args:
        model: a built Sequential or functional model of either Keras, without pruning wrappers and
            gates. Nested models are included. A subclass of these may add methods, but not override
            `call`. The result for a functional one has the same class, if the constructor is that
            of Keras, or in Keras 3 adds no argument to it; if not, Keras' class. Attributes of the
            model are not copied. The model is not changed, except that the masks of its `Pruner`,
            if any, are applied. The smaller model has no pruner: `pruning.freeze_mask` keeps its
            zeros in further training.
        probe: a batch of inputs, on which the logits before and after are compared; None for 8
            rows, or as many as the model names, drawn with a seed from U[0, 1), or from the range
            of the pixels if the model begins by scaling them. It has no masked positions.
        tolerance: the largest difference of an output, relative to its largest value (if above 1).
            None for 1e-5, or more if the arithmetic is less exact than float32: 5e-2 with layers
            that compute in 16 bits, 1e-2 on GPUs that multiply in TensorFloat-32.

    Returns:
        A `Compaction`; its `model` is new and not compiled.

    Raises:
        TypeError: `model` is no Keras model.
        ValueError: it overrides `call` or contains such a model, is a trainer (pass
            `trainer.model`), is not built, has pruning wrappers or gates, or has a layer that can't
            be rebuilt from its configuration; or `probe` does not fit it.
        RuntimeError: the logits differ by more than the tolerance; no model is returned.

    Example:
        >>> import numpy as np, tf_keras
        >>> import tscnc_tf as tscnc
        >>> model = tf_keras.Sequential([
        ...     tf_keras.layers.Dense(8, activation="relu", input_shape=(4,)),
        ...     tf_keras.layers.Dense(3)])
        >>> kernel = model.layers[0].kernel
        >>> _ = kernel.assign(kernel * ([1.0] * 2 + [0.0] * 6))
        >>> compaction = tscnc.pruning.compact(model)
        >>> compaction.model.layers[0].units, compaction.parameters_before
        (2, 67)
        >>> compaction.parameters_after  # 4 · 2 + 2 and 2 · 3 + 3
        19

    Reference:
        Hao Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, for removing filters and
        the weights that read them.
    """
    library = flavours.require_network(model)
    _keras.require_graph_model("model", model)
    _keras.require_built("model", model)
    if library is _keras.tf_keras and wrappers.wrapped_layers(model):
        raise ValueError(
            f"model {model.name!r} still has pruning wrappers: strip it first, "
            "compact(tscnc_tf.strip(model))."
        )
    gated.require_none(model, "compact")
    masks.apply(model)
    _, batch = _probe.prepare(model, probe)
    before = _logits(model, batch)
    if tolerance is None:
        tolerance = _probe.tolerance(model, float32=1e-5)
    tolerance = _checks.number("tolerance", tolerance, minimum=0.0)
    graph = unroll(library, model)
    operations = Reader(library, graph).operations()
    analysis = ChannelAnalysis(graph, operations)
    plan = analysis.plan
    rebuilder = _Compactor(library, graph, operations, plan)
    copy = rebuilder.rebuild(model)
    difference, scale = _probe.deviation(before, _logits(copy, batch))
    allowed = tolerance * scale
    if difference > allowed:
        raise RuntimeError(
            f"The compacted model {model.name!r} gives logits that differ by {difference:.3g} from "
            f"those of the given model, where {allowed:.3g} is allowed. If the model itself is "
            "that sensitive to rounding, pass tolerance=; else please report it."
        )
    return Compaction(
        model=copy,
        original=model,
        layers=_rows(graph, plan, rebuilder.stand_ins),
        kept=tuple(
            Kept(call.name, count, reason)
            for call, reasons in analysis.obstacles().items()
            for reason, count in reasons.items()
        ),
        left_alone=_left_alone(operations),
        max_logit_difference=difference,
        logit_tolerance=allowed,
        probe_examples=_probe.examples(batch),
    )


def _logits(model: Any, batch: Any) -> list[np.ndarray]:
    """Return the outputs of a model whose stateful layers begin at zero; their states stay."""
    with flavours.zero_states(model):
        return _probe.outputs(lambda x: model(x, training=False), batch)


class _Compactor(cloning.Rebuilder):
    """Rebuilds a model with the kept channels.

    Args:
        library: the Keras of the model.
        graph: the graph of the model.
        operations: its operations.
        plan: its kept channels.
    """

    def __init__(
        self,
        library: types.ModuleType,
        graph: Graph,
        operations: list[Step],
        plan: ChannelPlan,
    ) -> None:
        super().__init__(library)
        self._nested_inputs, self._keeps = graph.unrolled, plan.keeps
        self._edits: dict[Any, Edit] = collections.defaultdict(lambda: Edit({}, {}))
        for operation in operations:
            self._edits[operation.call.layer] |= operation.edit(plan)

    def configured(self, layer: Any, config: dict[str, Any]) -> dict[str, Any]:
        """Return the edited configuration.

        Initializers that may need the old shapes are replaced, as all weights are given; and the
        package's own regularizers get the new number of groups.
        """
        edit = self._edits[layer]
        changes = {
            key: "zeros"
            for key in config
            if edit.weights
            and key.endswith("_initializer")
            and (initializer := getattr(layer, key, None)) is not None
            and _may_need_a_shape(self.library, initializer)
        }
        if "groups" in edit.config:
            changes["kernel_regularizer"] = regularizers.with_groups(
                layer.kernel_regularizer, edit.config["groups"]
            )
        return config | edit.config | changes

    def weights(self, layer: Any) -> Mapping[str, Any]:
        """Return the edited weights."""
        return self._edits[layer].weights

    def channels(self, model: Any) -> list[int | None]:
        """Return the numbers of kept channels of the inputs of a nested model."""
        if id(model) not in self._nested_inputs:
            return super().channels(model)
        tensors = self._nested_inputs[id(model)]
        return [int(self._keeps[tensor].sum()) or tensor.shape[-1] for tensor in tensors]


def _may_need_a_shape(library: types.ModuleType, initializer: Any) -> bool:
    """Return whether an initializer may hold an array, or is not one of Keras."""
    known = getattr(library.initializers, type(initializer).__name__, None)
    return type(initializer) is not known or np.ndim(getattr(initializer, "value", 0.0)) > 0


def _rows(graph: Graph, plan: ChannelPlan, layers: dict[int, Any]) -> tuple[LayerChange, ...]:
    """Return the change of each layer with weights, in the order of the model."""
    calls: dict[Any, list[Call]] = {}
    for call in graph.calls:
        if getattr(call.layer, "weights", None):
            calls.setdefault(call.layer, []).append(call)
    rows = []
    for layer, uses in calls.items():
        new, made = layers[id(layer)], uses[0].outputs[0]
        rows.append(
            LayerChange(
                name=uses[0].name,
                kind=type(layer).__name__,
                filters_before=made.channels or None,
                filters_after=int(plan.keeps[made].sum()) or None,
                parameters_before=_parameters(layer),
                parameters_after=_parameters(new),
                flops_before=_flops(uses, layer),
                flops_after=_flops(uses, new),
            )
        )
    return tuple(rows)


def _parameters(layer: Any) -> int:
    # A weight may have an unknown size, such as the summary of a Discretization.
    shapes = [tuple(weight.shape) for weight in flavours.variables(layer)]
    return sum(math.prod(shape) for shape in shapes if None not in shape)


def _flops(uses: list[Call], layer: Any) -> int | None:
    counts = [count for call in uses if (count := count_flops(call, layer)) is not None]
    return sum(counts) if len(counts) == len(uses) else None


def _left_alone(operations: list[Step]) -> tuple[LeftAlone, ...]:
    found = {
        (operation.call.name, operation.obstacle): None
        for operation in operations
        # Masks are computed by operations of Keras' own.
        if isinstance(operation, Barrier)
        and any(tensor.dtype != "bool" for tensor in operation.outputs)
    }
    return tuple(LeftAlone(name, reason) for name, reason in found)
