"""Selects the weights to keep, by a criterion, a structure and a scope."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _configs, _keras, _reports
from tscnc_tf._keras.flavours import tensor_variable
from tscnc_tf.pruning.learned import Learned, among, first
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
        return tf.abs(_checks.widened(weight))


class Selection:
    """Selects the weights to keep; see `Pruner` for the arguments.

    Args:
        targets: the weights that are pruned.
        criterion: returns the scores of weights, None for magnitude.
        structure: which weights are kept or pruned together, None for single weights.
        scope: how the kept weights are distributed among the layers.
        min_weights: what every weight tensor keeps at least.
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
        self._scope = scope_for(first(scope), self.targets, sparsity, self.min_weights)
        if isinstance(scope, Learned):  # from wherever they start, shares come to differ
            self._scope.is_per_layer = False
        self.structure.require(self._scope)

    def only(self, indices: Sequence[int]) -> Selection:
        """Return the choice among some of the targets: scopes share out what these keep."""
        if len(indices) == len(self.targets):
            return self
        targets = [self.targets[index] for index in indices]
        scope = among(self.scope, targets)
        return Selection(
            targets, self.criterion, self.structure, scope, self.min_weights, self._sparsity
        )

    def masks(
        self,
        sparsity: Any,
        alive: Sequence[Any],
        judged: Sequence[Any] | None = None,
        scope: Scope | None = None,
    ) -> list[tf.Tensor]:
        """Return a mask per weight, True where it is kept.

        Args:
            sparsity: fraction of zeros, a scalar, possibly a tensor.
            alive: the masks so far; what is pruned ranks below all that is not.
            judged: what the criterion is applied to, one variable or tensor per weight; None for
                the weights.
            scope: in place of the one that was asked for.
        """
        judged = [target.variable for target in self.targets] if judged is None else judged
        values = [tf.convert_to_tensor(tensor_variable(variable)) for variable in judged]
        scores = [self._scores(*pair) for pair in zip(self.targets, values, strict=True)]
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

    def warn_of_dead_outputs(self, sparsity: float, judged: Sequence[Any] | None = None) -> None:
        """Warn of weight tensors that keep fewer weights than outputs, or all, in the end.

        And of outputs of the model that will not depend on its inputs, where weights go by several.

        Judged by the weights as they are now, or by what `masks` is told to judge.
        """
        if sparsity == 0.0:
            return
        alive = [tf.ones(target.shape, tf.bool) for target in self.targets]
        found = []
        masks = self.masks(sparsity, alive, judged)
        by_several = not isinstance(self.structure, Unstructured | NM)
        for target, mask in zip(self.targets, masks, strict=True):
            kept, outputs = int(np.sum(mask)), target.outputs or 1
            dead = _dead(target, mask) if target.makes_outputs and by_several else 0
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
                f"{self.structure!r} takes whole filters away, and it is not known which layers "
                "make the outputs of a subclassed model, whose logits would be lost"
            )
        if found:
            warnings.warn(
                f"At a sparsity of {_reports.percent(sparsity)}, {'; '.join(found)}. Leave these "
                "out by layers=, keep more by min_weights=, scope= or structure=Unstructured("
                "min_per_filter=1), or prune less.",
                UserWarning,
                stacklevel=5,
            )


def finite(score: tf.Tensor) -> tf.Tensor:
    """Return scores without infinities and NaN.

    NaN, and -inf, are the lowest of what lives, and above what is pruned; +inf is left to what a
    structure keeps in any case.
    """
    score = tf.clip_by_value(score, score.dtype.min, score.dtype.max)
    return tf.where(tf.math.is_nan(score), score.dtype.min, score)


def _dead(target: Target, mask: tf.Tensor) -> int:
    """Return how many filters of a weight keep nothing; 0 if it is not known which they are."""
    if not target.layout:
        return 0
    alive = np.any(target.canonical(mask), axis=(1, 2))
    return int(alive.size - np.sum(alive))
