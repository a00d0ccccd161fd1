"""The selection of the weights to keep, by a criterion, a structure and a scope."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _configs, _keras, _reports
from tscnc_tf._keras.flavours import tensor_variable
from tscnc_tf.pruning.learned import Learned, initial, restricted
from tscnc_tf.pruning.scopes import Scope, scope_for
from tscnc_tf.pruning.structures import NM, Structure, Unstructured
from tscnc_tf.pruning.targets import Target, require_finite


@_keras.register
@dataclasses.dataclass(frozen=True)
class Magnitude(_configs.Configurable):
    """The magnitude of a weight: `|w|`.

    Example:
        >>> import tensorflow as tf
        >>> import tscnc_tf as tscnc
        >>> tscnc.pruning.Magnitude()(tf.constant([-2.0, 1.0])).numpy().tolist()
        [2.0, 1.0]

    Reference:
        Han et al. 2015, arXiv 1506.02626.
    """

    def __call__(self, weight: tf.Tensor) -> tf.Tensor:
        """Return the scores of a weight tensor, float32 or wider."""
        return tf.abs(_checks.widened(tf.convert_to_tensor(weight)))


class Selection:
    """Selects the weights to keep; see `Pruner` for the arguments.

    Args:
        targets: the pruned weights.
        criterion: returns the scores of weights, None for magnitude.
        structure: which weights are kept or pruned together, None for single weights.
        scope: how the kept weights are distributed among the layers.
        min_weights: the minimum number of kept weights of every weight tensor.
        sparsity: the final sparsity.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        criterion: Callable[[tf.Tensor], tf.Tensor] | None,
        structure: Structure | None,
        scope: str | Mapping[str, float] | Learned,
        min_weights: int,
        sparsity: float,
    ) -> None:
        self.targets = require_finite(list(targets))
        self.criterion = Magnitude() if criterion is None else criterion
        if not callable(self.criterion):
            raise TypeError(f"criterion must be callable, got {criterion!r}.")
        self.structure = Unstructured() if structure is None else structure
        if not isinstance(self.structure, Structure):
            raise TypeError(
                "structure must be Unstructured(), NM(n, m), Block(rows, columns) or Filters(), "
                f"got {structure!r}."
            )
        self.scope = scope
        self.min_weights = _checks.integer("min_weights", min_weights, minimum=1)
        self._sparsity = sparsity
        self._scope = scope_for(initial(scope), self.targets, sparsity, self.min_weights)
        if isinstance(scope, Learned):  # whatever the start, trained shares differ
            self._scope.is_per_layer = False
        self.structure.require(self._scope)

    def only(self, indices: Sequence[int]) -> Selection:
        """Return the selection for some of the targets, as if there were no others."""
        if len(indices) == len(self.targets):
            return self
        targets = [self.targets[index] for index in indices]
        scope = restricted(self.scope, targets)
        return Selection(
            targets, self.criterion, self.structure, scope, self.min_weights, self._sparsity
        )

    def masks(
        self,
        sparsity: Any,
        alive: Sequence[Any],
        values: Sequence[Any] | None = None,
        scope: Scope | None = None,
    ) -> list[tf.Tensor]:
        """Return a mask per weight tensor, True where a weight is kept.

        Args:
            sparsity: fraction of zeros, a scalar, possibly a tensor.
            alive: the present masks; pruned weights rank below all kept ones.
            values: inputs of the criterion, one variable or tensor per weight tensor; None for the
                weights.
            scope: replaces the scope of the constructor.
        """
        values = [target.variable for target in self.targets] if values is None else values
        tensors = [tf.convert_to_tensor(tensor_variable(variable)) for variable in values]
        scores = [self._scores(*pair) for pair in zip(self.targets, tensors, strict=True)]
        widest = tf.float64 if any(score.dtype == tf.float64 for score in scores) else tf.float32
        ranked = []
        for score, mask in zip(scores, alive, strict=True):
            score = finite(tf.cast(score, widest))
            ranked.append(tf.where(mask, score, tf.constant(-np.inf, widest)))
        return self.structure.masks(ranked, self.targets, scope or self._scope, sparsity)

    def _scores(self, target: Target, value: tf.Tensor) -> tf.Tensor:
        score = self.criterion(value)
        if not tf.is_tensor(score) or score.shape != value.shape:
            shape = score.shape if tf.is_tensor(score) else type(score).__name__
            raise ValueError(
                f"criterion must return a tensor of scores of the weight's shape, {value.shape} "
                f"for {target.name!r}, {self.criterion!r} returned {shape}."
            )
        return score

    def warn_of_dead_outputs(self, sparsity: float, values: Sequence[Any] | None = None) -> None:
        """Warn if outputs would be dead at a sparsity, by the present weights (or `values`).

        It warns of weight tensors that keep fewer weights than outputs, or all their weights. With
        structures of several weights it also warns of model outputs that do not depend on the
        inputs. `values` is as in `masks`.
        """
        if sparsity == 0.0:
            return
        alive = [tf.ones(target.shape, tf.bool) for target in self.targets]
        found = []
        masks = self.masks(sparsity, alive, values)
        has_units = not isinstance(self.structure, Unstructured | NM)
        for target, mask in zip(self.targets, masks, strict=True):
            kept, outputs = int(np.sum(mask)), target.outputs or 1
            dead = _dead(target, mask) if target.makes_outputs and has_units else 0
            if dead:
                found.append(
                    f"{target.name} makes the model's outputs, and {dead} of its {outputs} would "
                    "not depend on the inputs"
                )
            elif kept < outputs:
                found.append(
                    f"{target.name} keeps {kept} of {target.size} weights for {outputs} outputs, "
                    f"so at least {outputs - kept} are dead"
                )
            elif self.min_weights < target.size == kept and self._scope.is_per_layer:
                found.append(f"{target.name} keeps all of its {kept} weights in {self.structure!r}")
        if any(
            target.makes_outputs is None and self.structure.removes_outputs(target)
            for target in self.targets
        ):
            found.append(
                f"{self.structure!r} removes whole filters, and it is not known which layers "
                "make the outputs of a subclassed model: logits would be lost"
            )
        if found:
            warnings.warn(
                f"At a sparsity of {_reports.percent(sparsity)}, {'; '.join(found)}. Exclude these "
                "layers by layers=, keep more weights by min_weights=, scope= or "
                "structure=Unstructured(min_per_filter=1), or prune less.",
                UserWarning,
                stacklevel=5,
            )


def finite(score: tf.Tensor) -> tf.Tensor:
    """Return scores without infinities and NaN; NaN and -inf become the lowest finite value.

    So -inf is free for pruned weights, and +inf for those that a structure keeps in any case.
    """
    score = tf.clip_by_value(score, score.dtype.min, score.dtype.max)
    return tf.where(tf.math.is_nan(score), score.dtype.min, score)


def _dead(target: Target, mask: tf.Tensor) -> int:
    """Return the number of filters without any kept weight; 0 if the layout is not known."""
    if not target.layout:
        return 0
    alive = np.any(target.canonical(mask), axis=(1, 2))
    return int(alive.size - np.sum(alive))
