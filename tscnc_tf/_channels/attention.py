"""Multi-head attention as operations: input projections, attention heads, output projection.

The channels of the intermediate tensors are those of all heads, concatenated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from tscnc_tf._channels.graph import Tensor
from tscnc_tf._channels.operations import (
    ChannelPlan,
    Channels,
    Linear,
    Operation,
    Tie,
    filled,
)


@dataclasses.dataclass(eq=False, kw_only=True)
class Projection(Linear):
    """An input or output projection of an attention layer.

    The layer's kernel has the shape (in, heads, size), or (heads, size, out) if `reads_heads`; here
    it is a matrix.

    Attributes:
        heads: the number of heads.
        reads_heads: whether it is the output projection.
        shape: the key of the input's shape in the layer's configuration; "" for none.
        others: all projections of the layer, that of the query first.
    """

    heads: int
    reads_heads: bool = False
    shape: str = ""
    others: list[Projection]

    def _heads(self, plan: ChannelPlan) -> int:
        """Return the number of kept heads."""
        kept = plan.keeps[self.inputs[0] if self.reads_heads else self.output]
        return int(kept.reshape(self.heads, -1).any(axis=1).sum())

    def _kept_kernel(self, plan: ChannelPlan) -> np.ndarray:
        matrix = super()._kept_kernel(plan)
        if self.reads_heads:
            return matrix.reshape(self._heads(plan), -1, matrix.shape[-1])
        return matrix.reshape(matrix.shape[0], self._heads(plan), -1)

    def _kept_bias(self, bias: Channels, plan: ChannelPlan) -> np.ndarray:
        return bias if self.reads_heads else bias.reshape(self._heads(plan), -1)

    def _gets_bias(self, plan: ChannelPlan) -> bool:
        """Return whether the layer gets biases, which all or none of its projections have."""
        return any(Linear._gets_bias(other, plan) for other in self.others)

    def _sizes(self, plan: ChannelPlan) -> dict[str, Any]:
        if self.reads_heads:
            # The default is the size of the query.
            changed = any(not plan.keeps[each].all() for each in (*self._query, self.output))
            return {self.size: (int(plan.keeps[self.output].sum()),)} if changed else {}
        heads = self._heads(plan)
        sizes: dict[str, Any] = {"num_heads": heads}
        sizes |= {self.size: int(plan.keeps[self.output].sum()) // heads}
        if self.shape:
            rows = int(plan.keeps[self.inputs[0]].sum())
            sizes[self.shape] = (*self.inputs[0].shape[:-1], rows)
        return sizes

    @property
    def _query(self) -> list[Tensor]:
        return self.others[0].inputs


@dataclasses.dataclass(eq=False, kw_only=True)
class Attention(Operation):
    """Attention of each head: means of the values, weighted by softmax of query and key.

    Its inputs are queries, keys and values. The weights are positive and sum to 1, so the mean of a
    constant is the constant. A head is removed as a whole, if none of its values is needed or all
    are constants; kept heads keep their queries and keys, and an equal number of values.

    Attributes:
        heads: the number of heads.
        masks: whether all positions of an example may be masked, in which case the mean is 0.
    """

    heads: int
    masks: bool

    def constants(self, given: list[Channels]) -> Channels:
        """Return the constants of the values."""
        values = given[2]
        return np.where(values == 0, values, np.nan) if self.masks else values

    def needed(self, wanted: Channels, given: list[Channels]) -> list[Channels]:
        """Return the queries and keys of all heads with a wanted mean, and the wanted values."""
        heads = wanted.reshape(self.heads, -1).any(axis=1)
        keys = np.repeat(heads, given[0].size // self.heads)
        return [keys, keys, wanted]

    def ties(self) -> Iterator[Tie]:
        """Yield each value with its mean."""
        every = np.arange(self.output.channels)
        yield Tie(2, every, every)

    @property
    def form(self) -> str:
        """Why `completed` adds channels."""
        return f"{self.call.name!r} has heads of equal size"

    def completed(self, held: list[Channels]) -> list[Channels]:
        """Return all queries and keys of partly kept heads, and an equal number of values."""
        query, key, value, mean = (side.reshape(self.heads, -1) for side in held)
        alive = np.any(np.concatenate([query, key, value, mean], axis=1), axis=1)
        keys = np.repeat(alive, query.shape[1])
        values = filled(value, alive).reshape(-1)
        return [keys, keys, values, values]
