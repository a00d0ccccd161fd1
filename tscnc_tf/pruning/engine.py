"""The mask engine: pruning on variables, for models of either Keras, without wrappers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import tensorflow as tf

from tscnc_tf import _checks, _keras
from tscnc_tf._keras import masked, optimizers, wrappers
from tscnc_tf._keras.distribution import update_everywhere
from tscnc_tf._keras.flavours import tensor_variable
from tscnc_tf.functional import scheduling
from tscnc_tf.pruning import plans
from tscnc_tf.pruning.criteria import Magnitude
from tscnc_tf.pruning.scopes import scope_for
from tscnc_tf.pruning.structures import Structure, Unstructured
from tscnc_tf.pruning.targets import Candidate, candidates

__all__ = ["Pruner"]


@_keras.register
class Pruner:
    r"""Prunes the weights of a model as it is trained, by masks on its variables.

    At each optimizer step t it asks the schedule; where the schedule says so, it chooses anew the
    weights to keep, by their scores, and in any case it sets to zero what is not kept: in the
    weights, :math:`w \leftarrow m \odot w`, in the optimizer's slots, and in moving averages of
    weights. A pruned weight does not come back as long as the sparsity does not fall.

    The model is given the pruner in place; no layer is wrapped or cloned, so subclassed models and
    layers of any class will do. From then on `fit`, and `AdversarialTraining`, call `step` after
    each optimizer step by themselves, inside the compiled step; a training loop of your own calls
    it. Masks, step and schedule are saved with the model: in `.keras` files, in weight files, and
    in TensorFlow's checkpoints. `strip` takes the pruner off again.

    Steps are counted by the optimizer's `iterations`: not by forward passes, so that a layer that
    is called twice counts once. A step that only accumulates gradients does not count, nor does one
    that a loss scale skips, where the optimizer does not count it (Keras 3). An optimizer that
    begins anew goes on where the last one stopped.

    Args:
        model: a built model of either Keras, subclassed ones too.
        schedule: a `PruningSchedule` of `tscnc_tf.schedules` or tfmot, or any callable from a step
            to (whether to choose anew, the sparsity) that consists of TensorFlow operations.
        layers: which layers: a class, a layer, a name pattern, a predicate, or a list of these, as
            in `add_regularizers`. None for all, but for what Keras' own layers hold that is no
            kernel, such as embeddings.
        weights: a pattern for the names of weights, such as "*kernel"; None for all of the layers.
        min_rank: the smallest rank of a weight to prune.
        criterion: what weights are worth: a callable from a weight tensor to scores of its shape;
            `Magnitude()` if None.
        structure: `Unstructured()`, `NM(2, 4)`, `Block(rows, columns)` or `Filters()`.
        scope: how what is kept is shared out: "layer" (each weight tensor has the schedule's
            sparsity), "global" (all compete by their scores), "erk" (Erdős–Rényi-Kernel: small
            layers stay denser), or a dict of final sparsities by name pattern (the others follow
            the schedule).
        min_weights: the number of weights that every weight tensor keeps at least.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: the model is not built or has a pruner already, nothing is left to prune, or an
            argument is out of range.

    Warns:
        UserWarning: a weight tensor would be left with fewer weights than it has outputs, so that
            some of them would be dead; with the figures.

    Example:
        >>> import keras
        >>> import tscnc_tf as tscnc
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8)])
        >>> pruner = tscnc.pruning.Pruner(model, tscnc.schedules.OneShot(0.75))
        >>> pruner.finalize()
        >>> tscnc.inspection.sparsity(model).sparsity
        0.75

    Reference:
        Zhu & Gupta 2017, arXiv 1710.01878, for gradual magnitude pruning.
    """

    def __init__(
        self,
        model: Any,
        schedule: Any,
        *,
        layers: Any = None,
        weights: str | None = None,
        min_rank: int = 2,
        criterion: Callable[[tf.Tensor], tf.Tensor] | None = None,
        structure: Structure | None = None,
        scope: str | Mapping[str, float] = "layer",
        min_weights: int = 1,
    ) -> None:
        _keras.library("model", model)
        _keras.require_built("model", model)
        require_unpruned("model", model)
        plans.require_schedule(schedule)
        structure = Unstructured() if structure is None else structure
        if not isinstance(structure, Structure):
            raise TypeError(
                "structure must be Unstructured(), NM(n, m), Block(rows, columns) or Filters(), "
                f"got {structure!r}."
            )
        min_rank = _checks.integer("min_rank", min_rank, minimum=1)
        found = candidates(model, layers, weights, min_rank, structure.reason)
        self._set_up(model, schedule, criterion, structure, scope, min_weights, found)
        plans.warn_of_starving(self.targets, self._scope, self.target_sparsity)

    @classmethod
    def of_zeros(cls, model: Any) -> Self:
        """Return a frozen pruner of a model whose masks are False where a kernel is zero now."""
        from tscnc_tf import schedules

        pruner = cls.__new__(cls)
        _keras.require_built("model", model)
        require_unpruned("model", model)
        found = candidates(model)
        pruner._set_up(model, schedules.OneShot(0.0), None, Unstructured(), "layer", 1, found)
        for target, mask in zip(pruner.targets, pruner.state.masks, strict=True):
            mask.assign(tf.not_equal(tensor_variable(target.variable), 0))
        pruner.freeze()
        return pruner

    def _set_up(
        self,
        model: Any,
        schedule: Any,
        criterion: Any,
        structure: Structure,
        scope: Any,
        min_weights: int,
        found: list[Candidate],
    ) -> None:
        self.model = model
        self.schedule = schedule
        self.criterion = Magnitude() if criterion is None else criterion
        if not callable(self.criterion):
            raise TypeError(f"criterion must be callable, got {criterion!r}.")
        self.targets = [target for target, reason in found if not reason]
        self._skipped = [candidate for candidate in found if candidate.reason]
        if not self.targets:
            reasons = {target.name: reason for target, reason in found}
            raise ValueError(
                f"model {model.name!r} has no weight that can be pruned as asked for: "
                f"{reasons or 'it has none of rank 2 or more'}."
            )
        self._structure = structure
        self._min_weights = _checks.integer("min_weights", min_weights, minimum=1)
        self._scope_name = scope
        self._asked = scheduling.final_sparsity(schedule)
        self.target_sparsity = structure.reachable(self._asked)
        self._scope = scope_for(scope, self.targets, self._asked, self._min_weights)
        self._functions: dict[int, Any] = {}
        self.state = masked.new_state(model, [target.shape for target in self.targets])
        masked.attach(model, self)

    @property
    def structure(self) -> Structure:
        """The structure that was asked for."""
        return self._structure

    @property
    def skipped(self) -> tuple[Candidate, ...]:
        """The weights of rank 2 or more that are not pruned, and why."""
        return tuple(self._skipped)

    @property
    def steps(self) -> int:
        """The number of optimizer steps that the pruner has seen."""
        return int(tensor_variable(self.state.step).numpy())

    @property
    def frozen(self) -> bool:
        """Whether the masks stay as they are."""
        return bool(tensor_variable(self.state.frozen).numpy())

    def masked_variables(self) -> list[tuple[Any, Any]]:
        """Return the pairs (weight, mask); masks are True where a weight is kept."""
        return list(
            zip((target.variable for target in self.targets), self.state.masks, strict=True)
        )

    def step(self, optimizer: Any = None) -> None:
        """Act on what an optimizer step has changed; to be called after each.

        Called again without a further step, it only applies the masks.

        Args:
            optimizer: the one that has taken the step. None for the one that the model is compiled
                with; if there is none, each call counts as a step.
        """
        optimizer = getattr(self.model, "optimizer", None) if optimizer is None else optimizer
        if not tf.executing_eagerly():
            self._step(optimizer)
            return
        key = id(optimizer)
        if key not in self._functions:
            self._functions[key] = (tf.function(lambda: self._step(optimizer)), optimizer)
        self._functions[key][0]()

    def is_behind(self, optimizer: Any) -> bool:
        """Tell whether an optimizer has taken steps that `step` has not been called for."""
        seen = int(tensor_variable(self.state.seen).numpy())
        return seen != int(optimizers.iterations(optimizer))

    def apply(self, optimizer: Any = None) -> None:
        """Set to zero what is not kept: in weights, in the optimizer's slots and averages."""
        update_everywhere(self.model, lambda strategy: self._apply(strategy, optimizer))

    def finalize(self) -> None:
        """Prune to the schedule's final sparsity now, wherever the schedule is, and freeze."""
        self.prune_to(self._asked)
        self.freeze()

    def prune_to(self, sparsity: float) -> None:
        """Choose the weights to keep at a sparsity now, and set the others to zero."""
        sparsity = _checks.sparsity("sparsity", sparsity)

        def update(strategy: Any) -> None:
            self._renew(strategy, tf.constant(sparsity))
            self._apply(strategy, getattr(self.model, "optimizer", None))

        update_everywhere(self.model, update)

    def freeze(self) -> None:
        """Keep the masks as they are from now on, for fine-tuning: what is zero stays zero."""
        tensor_variable(self.state.frozen).assign(True)

    def _step(self, optimizer: Any) -> None:
        update_everywhere(self.model, lambda strategy: self._update(strategy, optimizer))

    def _update(self, strategy: Any, optimizer: Any) -> None:
        before = tf.identity(tensor_variable(self.state.step))
        seen = tf.identity(tensor_variable(self.state.seen))
        count = tf.maximum(seen, 0) + 1 if optimizer is None else optimizers.iterations(optimizer)
        # The first time, only the step just taken is ours. A count that has fallen is that of
        # another optimizer, which began anew.
        first = tf.minimum(count, 1)
        taken = tf.where(seen < 0, first, tf.where(count >= seen, count - seen, count))
        now = before + taken
        due, sparsity = scheduling.due_between(self.schedule, before, now)
        due &= ~tf.identity(tensor_variable(self.state.frozen))
        tf.cond(due, lambda: self._renew(strategy, sparsity), lambda: None)
        for variable, value in ((self.state.step, now), (self.state.seen, count)):
            strategy.extended.update(tensor_variable(variable), _assign, args=(value,))
        self._apply(strategy, optimizer)

    def _renew(self, strategy: Any, sparsity: tf.Tensor) -> None:
        """Choose the weights to keep, and write the masks."""
        scores = []
        for target, mask in zip(self.targets, self.state.masks, strict=True):
            score = self.criterion(tf.convert_to_tensor(tensor_variable(target.variable)))
            # What is pruned ranks below all that is not, so that no tie brings it back.
            lowest = tf.constant(-1.0, score.dtype) + tf.minimum(tf.reduce_min(score), 0.0)
            scores.append(tf.where(mask, score, lowest))
        masks = self._structure.masks(scores, self.targets, self._scope, sparsity)
        for variable, mask in zip(self.state.masks, masks, strict=True):
            strategy.extended.update(variable, _assign, args=(mask,))

    def _apply(self, strategy: Any, optimizer: Any) -> None:
        for target, mask in zip(self.targets, self.state.masks, strict=True):
            kept = [target.variable, *optimizers.companions(optimizer, target.variable)]
            for variable in kept:
                strategy.extended.update(tensor_variable(variable), _keep, args=(mask,))

    def get_config(self) -> dict[str, Any]:
        """Return what brings the pruner back, given the same model; masks are saved beside it."""
        scope = self._scope_name
        return {
            "schedule": plans.serialize_schedule(self.schedule, self.model),
            "criterion": plans.serialize(self.criterion, self.model),
            "structure": plans.serialize(self._structure, self.model),
            "scope": scope if isinstance(scope, str) else dict(scope),
            "min_weights": self._min_weights,
            "weights": [target.name for target in self.targets],
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], *, model: Any) -> Self:
        """Give `model` the pruner that `get_config` described.

        Raises:
            ValueError: the model lacks a weight that was pruned.
        """
        config = dict(config)
        names = config.pop("weights")
        found = [
            Candidate(target, "" if target.name in names else reason or "not chosen")
            for target, reason in candidates(model)
        ]
        pruner = cls.__new__(cls)
        pruner._set_up(
            model,
            plans.deserialize_schedule(config["schedule"], model),
            plans.deserialize(config["criterion"], model),
            plans.deserialize(config["structure"], model),
            config["scope"],
            config["min_weights"],
            found,
        )
        have = [target.name for target in pruner.targets]
        if have != names:
            raise ValueError(
                f"model {model.name!r} does not have the weights that were pruned: {names} were, "
                f"it has {have}."
            )
        return pruner

    def __repr__(self) -> str:
        return (
            f"Pruner({self.model.name!r}, {self.schedule!r}, criterion={self.criterion!r}, "
            f"structure={self._structure!r}, scope={self._scope_name!r}, "
            f"min_weights={self._min_weights})"
        )


def require_unpruned(name: str, model: Any) -> None:
    """Raise a ValueError if a model, or one inside it, is pruned already, by whichever engine."""
    if wrappers.wrapped_layers(model) or any(masked.masked_models(model)):
        raise ValueError(f"{name} {model.name!r} is pruned already: strip it first.")


def _assign(variable: Any, value: tf.Tensor) -> Any:
    return variable.assign(value)


def _keep(variable: Any, mask: tf.Tensor) -> Any:
    # Not by a product: that makes -0.0 of negative weights, and keeps NaN and infinity. And not by
    # `tf.where`, which is slower, as it looks for shapes to broadcast.
    value = tf.convert_to_tensor(variable)
    kept = tf.raw_ops.Select(condition=tf.convert_to_tensor(mask), x=value, y=tf.zeros_like(value))
    return variable.assign(kept)
