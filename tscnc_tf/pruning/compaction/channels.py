"""The analysis of which channels of a network can be removed."""

from __future__ import annotations

import collections
from collections.abc import Iterable

import numpy as np

from tscnc_tf._channels.graph import Call, Graph, Tensor
from tscnc_tf._channels.operations import (
    ChannelPlan,
    Channels,
    Depthwise,
    Linear,
    Operation,
    Step,
)

AT_LEAST_ONE = "Keras has no layers without any filter"


class ChannelAnalysis:
    """Finds the channels of each tensor that are kept, and why they can't be removed.

    A channel can be removed if no kept channel depends on its value: later kernels have only zeros
    for it, or it is a constant that later layers fold into their biases. Needs are propagated from
    the outputs backwards, so that channels which only serve removed ones are found in one pass.

    Args:
        graph: the graph of the model.
        operations: its operations in topological order.

    Attributes:
        constants: the constants of the channels of each tensor, NaN if not constant.
        needed: masks of the channels whose values the outputs depend on.
        reasons: why the constants of channels can't be folded, at the next layer or a later one.
        held: why channels are kept; an empty text for removed ones.
    """

    def __init__(self, graph: Graph, operations: list[Step]) -> None:
        self.graph = graph
        self.operations = operations
        self.constants: dict[Tensor, Channels] = {}
        self.needed: dict[Tensor, Channels] = {}
        self.reasons: dict[Tensor, Channels] = {}
        self.held: dict[Tensor, Channels] = {}
        for tensor in (*graph.inputs, *(made for each in operations for made in each.outputs)):
            self.constants[tensor] = np.full(tensor.channels, np.nan)
            self.needed[tensor] = np.zeros(tensor.channels, bool)
            self.reasons[tensor] = np.full(tensor.channels, "", object)
            self.held[tensor] = np.full(tensor.channels, "", object)
        self._find_constants()
        self._find_needs()
        self._find_held()

    @property
    def plan(self) -> ChannelPlan:
        """The constants and the kept channels."""
        keeps = {tensor: held != "" for tensor, held in self.held.items()}
        return ChannelPlan(self.constants, keeps)

    def _find_constants(self) -> None:
        """Propagate the constants forwards."""
        for operation in self.operations:
            if isinstance(operation, Operation):
                given = [self.constants[tensor] for tensor in operation.inputs]
                with np.errstate(all="ignore"):  # a value that overflows is treated as unknown
                    found = operation.constants(given)
                self.constants[operation.output] = np.where(np.isfinite(found), found, np.nan)

    def _find_needs(self) -> None:
        """Propagate needs backwards, and the reasons why constants can't be folded."""
        self._require(self.graph.outputs, "it is an output of the model")
        for operation in reversed(self.operations):
            if not isinstance(operation, Operation):
                self._require(operation.inputs, operation.obstacle)
                continue
            given = [self.constants[tensor] for tensor in operation.inputs]
            wanted = self.needed[operation.output] & np.isnan(self.constants[operation.output])
            pairs = zip(operation.inputs, operation.needed(wanted, given), strict=True)
            for tensor, needed in pairs:
                self.needed[tensor] |= needed
                stopped = needed & np.isfinite(self.constants[tensor])
                self._explain(tensor, np.where(stopped, operation.obstacle, ""))
            after = self.reasons[operation.output]
            for position, source, target in operation.ties():
                behind = np.full_like(self.reasons[operation.inputs[position]], "")
                # Backwards, so that the first remains.
                known = np.flatnonzero(after[target] != "")[::-1]
                behind[source[known]] = after[target[known]]
                self._explain(operation.inputs[position], behind)

    def _require(self, tensors: list[Tensor], reason: str) -> None:
        for tensor in tensors:
            self.needed[tensor][:] = True
            self._explain(tensor, np.full(tensor.channels, reason, object))

    def _explain(self, tensor: Tensor, texts: Channels) -> None:
        """Set reasons for channels that have none yet."""
        before = self.reasons[tensor]
        self.reasons[tensor] = np.where(before == "", texts, before)

    def _find_held(self) -> None:
        """Hold the needed channels, and all channels that are tied to them."""
        self._hold(self.graph.inputs, "tied to an input of the model")
        self._hold(self.graph.outputs, "tied to an output of the model")
        for operation in self.operations:
            if not isinstance(operation, Operation):
                self._hold((*operation.inputs, *operation.outputs), operation.obstacle)
            elif isinstance(operation, Linear):
                reading = f"tied to a channel that {operation.call.name!r} reads"
                self._hold(operation.inputs, reading, self.needed[operation.inputs[0]])
        self._spread()
        for held in self.held.values():
            if held.size and not (held != "").any():
                # A Keras layer needs at least one filter. Keeping one is correct: its value is not
                # needed, or it is a constant for which the layers that read it keep their weights.
                held[0] = AT_LEAST_ONE
                self._spread()

    def _hold(self, tensors: Iterable[Tensor], reason: str, chosen: Channels | bool = True) -> None:
        for tensor in tensors:
            held = self.held[tensor]
            self.held[tensor] = np.where((held == "") & chosen, reason, held).astype(object)

    def _spread(self) -> None:
        """Hold the channels that are tied to held ones, or that Keras layers need with them."""
        self._carry()
        while sum(map(self._complete, self.operations)):  # unlike any(), completes all
            self._carry()

    def _complete(self, operation: Step) -> bool:
        """Hold the channels that a Keras layer needs; return whether there are new ones."""
        if not isinstance(operation, Operation):
            return False
        tensors = [*operation.inputs, operation.output]
        before = [self.held[tensor] != "" for tensor in tensors]
        changed = False
        for tensor, was, wanted in zip(tensors, before, operation.completed(before), strict=True):
            if (wanted & ~was).any():
                self._hold([tensor], operation.form if was.any() else AT_LEAST_ONE, wanted)
                changed = True
        return changed

    def _carry(self) -> None:
        """Propagate `held` along the ties, in both directions, until nothing changes."""
        changed = True
        while changed:
            changed = False
            for operations in (self.operations, self.operations[::-1]):
                for operation in operations:
                    changed |= self._carry_at(operation)

    def _carry_at(self, operation: Step) -> bool:
        changed = False
        for position, source, target in operation.ties():
            before, after = self.held[operation.inputs[position]], self.held[operation.outputs[0]]
            backwards = (before[source] == "") & (after[target] != "")
            before[source[backwards]] = after[target[backwards]]
            forwards = (after[target] == "") & (before[source] != "")
            after[target[forwards]] = before[source[forwards]]
            changed |= bool(backwards.any() or forwards.any())
        return changed

    def obstacles(self) -> dict[Call, collections.Counter[str]]:
        """Return the numbers of dead filters that are kept, by call and reason."""
        found: dict[Call, collections.Counter[str]] = {}
        for operation in self.operations:
            if not isinstance(operation, Linear | Depthwise) or not operation.counts:
                continue
            made = operation.output
            held, reasons = self.held[made], self.reasons[made]
            dead = (np.isfinite(self.constants[made]) | ~self.needed[made]) & (held != "")
            if dead.any():
                texts = collections.Counter(np.where(reasons == "", held, reasons)[dead].tolist())
                found[operation.call] = found.get(operation.call, collections.Counter()) + texts
        return found
