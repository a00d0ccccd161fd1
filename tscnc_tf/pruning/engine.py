"""The mask engine: pruning on variables, for models of either Keras, without wrappers."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import tensorflow as tf

from tscnc_tf import _keras
from tscnc_tf._keras import masked, optimizers
from tscnc_tf._keras.distribution import update_everywhere
from tscnc_tf._keras.flavours import tensor_variable
from tscnc_tf.functional import scheduling
from tscnc_tf.pruning import plans, updates
from tscnc_tf.pruning.choice import Choice
from tscnc_tf.pruning.structures import Structure, unfit
from tscnc_tf.pruning.targets import Candidate, candidates, found_again

__all__ = ["Pruner"]


@_keras.register
class Pruner:
    r"""Prunes the weights of a model as it is trained, by masks on its variables.

    At each optimizer step t it asks the schedule; where the schedule says so, it chooses anew the
    weights to keep, by their scores, and in any case it sets to zero what is not kept: in the
    weights, :math:`w \leftarrow m \odot w`, in the optimizer's slots, and in moving averages of
    weights. A pruned weight does not come back as long as the sparsity does not fall.

    The model is given the pruner in place; no layer is wrapped or cloned, so subclassed models and
    layers of any class will do. From then on the model's own `fit`, and `AdversarialTraining`, call
    `step` after each optimizer step by themselves, inside the compiled step. A training loop of
    your own calls it. Where the model is a part of another one that is trained, or has a
    `make_train_function` of its own, `callbacks.pruning_callbacks()` see to it. Masks, step and
    schedule are saved with the model: in `.keras` files, in weight files, and in TensorFlow's
    checkpoints. `strip` takes the pruner off again.

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
            kernel, such as embeddings, and, where the structure takes whole filters away, for the
            layers that make the model's outputs. Kernels of layers with LoRA, or quantized to
            integers, are left out in any case.
        weights: a pattern for the names of weights, such as "*kernel"; None for all of the layers.
        min_rank: the smallest rank of a weight to prune.
        criterion: what weights are worth: a callable from a weight tensor to scores of its shape;
            `Magnitude()` if None.
        structure: `Unstructured()`, also with a floor for every filter, `NM(2, 4)`, `Block(rows,
            columns)` or `Filters()`.
        scope: how what is kept is shared out: "layer" (each weight tensor has the schedule's
            sparsity), "global" (all compete by their scores), "erk" (Erdős–Rényi-Kernel: small
            layers stay denser), or a dict of final sparsities by name pattern (the others follow
            the schedule).
        min_weights: the number of weights that every weight tensor keeps at least.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: the model is not built or has a pruner already, nothing is left to prune, what
            is in a list of layers fits none, or an argument is out of range.

    Warns:
        UserWarning: a weight tensor would be left with fewer weights than it has outputs, so that
            some of them would be dead, or outputs of the model would no longer depend on its
            inputs; with the figures. Or the structure takes whole filters of a subclassed model, of
            which it is not known which make its outputs.

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
        plans.require_model(model)
        plans.require_schedule(schedule)
        selection = plans.checked_selection(weights, min_rank)
        found = candidates(model, layers, *selection, unfit(structure, layers))
        choice = {"criterion": criterion, "structure": structure, "scope": scope}
        self._set_up(model, schedule, found, {**choice, "min_weights": min_weights})
        self._warn_of_starving()

    @staticmethod
    def of_zeros(model: Any, layers: Any = None) -> Pruner:
        """Return a frozen pruner of a model whose masks are False where a kernel is zero now."""
        plans.require_model(model)
        found = candidates(model, layers)
        variables = [tensor_variable(target.variable) for target, reason in found if not reason]
        masks = [tf.not_equal(variable, 0) for variable in variables]
        choice = {"criterion": None, "structure": None, "scope": "layer", "min_weights": 1}
        return Pruner.of_masks(model, found, masks, 0.0, choice)

    @staticmethod
    def of_masks(
        model: Any,
        found: list[Candidate],
        masks: Sequence[Any],
        sparsity: float,
        choice: dict[str, Any],
    ) -> Pruner:
        """Return a frozen pruner of a model.

        Args:
            model: a built model of either Keras, not pruned.
            found: its weights, and why some of them are not pruned.
            masks: of those that are, in their order; True where a weight is kept.
            sparsity: that was asked for.
            choice: how the masks were chosen.
        """
        from tscnc_tf import schedules

        pruner = Pruner.__new__(Pruner)
        pruner._set_up(model, schedules.OneShot(sparsity), found, choice)
        for variable, mask in zip(pruner.state.masks, masks, strict=True):
            variable.assign(mask)
        pruner.freeze()
        return pruner

    def _set_up(
        self, model: Any, schedule: Any, found: list[Candidate], choice: dict[str, Any]
    ) -> None:
        self.model = model
        self.schedule = schedule
        self.targets = [target for target, reason in found if not reason]
        self._found = found
        if not self.targets:
            reasons = {target.name: reason for target, reason in found}
            raise ValueError(
                f"model {model.name!r} has no weight that can be pruned as asked for: "
                f"{reasons or 'it has none of rank 2 or more'}."
            )
        self._asked = scheduling.final_sparsity(schedule)
        self._choice = Choice(self.targets, sparsity=self._asked, **choice)
        self.target_sparsity = self.structure.reachable(self._asked)
        self._compiled: tuple[Any, Any] = (None, None)
        self._optimizer: Any = None
        self.state = self._new_state()
        masked.attach(model, self)

    def _new_state(self) -> Any:
        return masked.new_state(self.model, [target.shape for target in self.targets])

    def _warn_of_starving(self, *scores: Any) -> None:
        """Warn of what would be left with too little; where that is an error, nothing is done."""
        try:
            self._choice.warn_of_starving(self.target_sparsity, *scores)
        except UserWarning:
            masked.detach(self.model)
            raise

    @property
    def structure(self) -> Structure:
        """The structure that was asked for."""
        return self._choice.structure

    @property
    def skipped(self) -> tuple[Candidate, ...]:
        """The weights of rank 2 or more that are not pruned, and why."""
        return tuple(candidate for candidate in self._found if candidate.reason)

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
                with, or another one of its own that trains these weights; if there is none, each
                call counts as a step.
        """
        optimizer = self._own_optimizer() if optimizer is None else optimizer
        if not tf.executing_eagerly():
            self._step(optimizer)
            return
        self._meet(optimizer)
        # What an optimizer keeps for each weight is there only once it has begun.
        key = (id(optimizer), tuple(id(variable) for variable in self._companions(optimizer)))
        if self._compiled[0] != key:
            self._compiled = (key, tf.function(lambda: self._step(optimizer)))
        self._compiled[1]()

    def training(self, optimizer: Any = None) -> contextlib.AbstractContextManager[Any]:  # noqa: ARG002
        """Return the context in which an optimizer is to train the model; this pruner needs none.

        `fit`, `AdversarialTraining` and the callbacks enter it by themselves.
        """
        return contextlib.nullcontext()

    def hear_of(self, optimizer: Any) -> None:
        """Take note of an optimizer that may keep something for the weights; here nothing to do."""

    def take_over(self, optimizer: Any) -> None:
        """Take note of the optimizer that is about to train, before its compiled steps.

        It begins anew, unless it is the last one, or has been brought back with this pruner from
        where both were stopped. (To configure an optimizer is not to train with it: a model may be
        evaluated by another trainer in between.)
        """
        known = self._optimizer is not None
        begun = int(tensor_variable(self.state.seen).numpy()) >= 0
        if begun and not known and self.is_behind(optimizer):
            self.begin_anew(optimizer)
        self._meet(optimizer)

    def _meet(self, optimizer: Any) -> None:
        """Begin anew if, from one call to the next, another optimizer has taken over."""
        known = self._optimizer is not None
        if known and optimizer is not None and self._optimizer() is not optimizer:
            self.begin_anew(optimizer)
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)

    def _own_optimizer(self) -> Any:
        """Return the model's optimizer that trains the targets, None if there is none."""
        variables = [target.variable for target in self.targets]
        held = self._held_optimizers()
        return next((each for each in held if optimizers.trains(each, variables)), None)

    def _held_optimizers(self) -> list[Any]:
        """Return the optimizers that the model holds, the one that it is compiled with first."""
        held = [getattr(self.model, "optimizer", None), *vars(self.model).values()]
        return [each for each in held if optimizers.is_optimizer(each)]

    def begin_anew(self, optimizer: Any = None) -> None:  # noqa: ARG002
        """Take note that another optimizer takes over, whose steps so far were not counted."""
        tensor_variable(self.state.seen).assign(-1)

    def _companions(self, optimizer: Any) -> list[Any]:
        return optimizers.companions(optimizer, *(target.variable for target in self.targets))

    def is_behind(self, optimizer: Any) -> bool:
        """Tell whether an optimizer has taken steps that `step` has not been called for."""
        seen = int(tensor_variable(self.state.seen).numpy())
        return seen != int(optimizers.iterations(optimizer))

    def apply(self, optimizer: Any = None) -> None:
        """Set to zero what is not kept: in weights, in the optimizer's slots and averages."""
        update_everywhere(self.model, lambda strategy: self._apply(strategy, optimizer))

    def adopt(self) -> None:
        """Act on weights that were set from outside: what is not kept becomes zero."""
        self.apply()

    def finalize(self) -> None:
        """Prune to the schedule's final sparsity now, wherever the schedule is, and freeze."""

        def update(strategy: Any) -> None:
            self._renew(strategy, tf.constant(self._asked))
            self._apply(strategy, getattr(self.model, "optimizer", None))

        update_everywhere(self.model, update)
        self.freeze()

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
            strategy.extended.update(tensor_variable(variable), updates.assign, args=(value,))
        self._apply(strategy, optimizer)

    def _renew(self, strategy: Any, sparsity: tf.Tensor) -> None:
        """Choose the weights to keep, and write the masks."""
        masks = self._choice.masks(sparsity, self.state.masks)
        for variable, mask in zip(self.state.masks, masks, strict=True):
            strategy.extended.update(variable, updates.assign, args=(mask,))

    def _apply(self, strategy: Any, optimizer: Any) -> None:
        for target, mask in zip(self.targets, self.state.masks, strict=True):
            together = [target.variable, *optimizers.companions(optimizer, target.variable)]
            for variable in together:
                strategy.extended.update(tensor_variable(variable), updates.keep, args=(mask,))

    def get_config(self) -> dict[str, Any]:
        """Return what brings the pruner back, given the same model; masks are saved beside it."""
        return {
            "schedule": plans.serialize_schedule(self.schedule, self.model),
            "criterion": plans.serialize(self._choice.criterion, self.model),
            **self._shared_config(),
        }

    def _shared_config(self) -> dict[str, Any]:
        scope = self._choice.scope
        return {
            "class_name": type(self).__name__,
            "structure": plans.serialize(self.structure, self.model),
            "scope": scope if isinstance(scope, str) else dict(scope),
            "min_weights": self._choice.min_weights,
            "weights": [
                {"position": position, "name": target.name, "shape": list(target.shape)}
                for position, (target, reason) in enumerate(self._found)
                if not reason
            ],
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], *, model: Any) -> Self:
        """Give `model` the pruner that `get_config` described.

        Weights are found by their places: a subclassed model names its layers anew when it is
        built.

        Raises:
            ValueError: the model lacks a weight that was pruned.
        """
        found = found_again(model, config["weights"])
        pruner = cls.__new__(cls)
        choice = {
            "criterion": plans.deserialize(config["criterion"], model),
            "structure": plans.deserialize(config["structure"], model),
            "scope": config["scope"],
            "min_weights": config["min_weights"],
        }
        pruner._set_up(model, plans.deserialize_schedule(config["schedule"], model), found, choice)
        return pruner

    def __repr__(self) -> str:
        return (
            f"Pruner({self.model.name!r}, {self.schedule!r}, criterion={self._choice.criterion!r}, "
            f"structure={self.structure!r}, scope={self._choice.scope!r}, "
            f"min_weights={self._choice.min_weights})"
        )
