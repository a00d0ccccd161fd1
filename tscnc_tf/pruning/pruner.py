"""The masks engine: pruning by masks on variables, for models of either Keras."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _keras
from tscnc_tf._keras import masks, optimizers
from tscnc_tf._keras.flavours import depending_on, tensor_variable, update_everywhere
from tscnc_tf._keras.layers import unprunable
from tscnc_tf._keras.masks import keep, kept
from tscnc_tf._keras.optimizers import assign
from tscnc_tf.functional import scheduling
from tscnc_tf.pruning import learned
from tscnc_tf.pruning.configs import (
    deserialize,
    deserialize_schedule,
    deserialize_selection,
    require_schedule,
    serialize,
    serialize_schedule,
    serialize_selection,
)
from tscnc_tf.pruning.regrowth import Regrowth
from tscnc_tf.pruning.selection import Selection
from tscnc_tf.pruning.step_count import StepCount, due_between
from tscnc_tf.pruning.structures import Structure, unfit
from tscnc_tf.pruning.targets import (
    FROZEN,
    Candidate,
    Candidates,
    Target,
    candidates,
    require_model,
)
from tscnc_tf.pruning.taylor import Taylor

__all__ = ["Pruner"]

_KEPT_STEPS = 4  # compiled steps per pruner, for several optimizers that alternate


@_keras.register
class Pruner(StepCount):
    r"""Prunes the weights of a model during training, by masks on its variables.

    At each optimizer step t it asks the schedule whether to renew the masks. A renewal chooses the
    weights to keep by their scores. All others are zero: in the weights,
    :math:`w \leftarrow m \odot w`, in the optimizer's slots, and in moving averages of weights. A
    pruned weight does not come back as long as the sparsity does not fall.

    **Zeros stay zero** in any training. A mask is the constraint of its variable (after the layer's
    own constraint, if any), and Keras' optimizers apply constraints after each update. So masks
    also hold in another model that contains a pruned layer, such as a new head on a pruned body.
    Files of that model contain the zeros, but not the masks: call `freeze_mask` after loading. If
    its optimizer replaces weights by averages when training ends (`use_ema=True`), it needs
    `pruning_callbacks()`.

    **Masks are renewed** by `step`, after each optimizer step. The model's own `fit` and
    `AdversarialTraining` call it inside the compiled step; your own training loop must call it.
    `callbacks.pruning_callbacks()` call it if the model or its layers are part of another model
    that is trained, or if the model overrides `make_train_function`. Masks, step and schedule are
    saved with the model: in `.keras` files, in weight files, and in TensorFlow's checkpoints.
    `strip` removes the pruner.

    **Frozen weights** (`layer.trainable = False`) are not pruned: their masks do not change, and
    scopes distribute the kept weights among the others. Once they are trainable again, the next
    step prunes them. In Keras, changes of `trainable` take effect at the next `compile`. A layer
    that gets LoRA weights is no longer pruned: its kernel is frozen, and the layer computes with
    the sum of kernel and LoRA product, which has no zeros.

    Steps are counted by the optimizer's `iterations`, not by forward passes. A step that only
    accumulates gradients does not count, nor does one that a loss scale skips, if the optimizer
    does not count it (Keras 3). With a new optimizer the count continues.

    Args:
        model: a built model of either Keras; it may be subclassed.
        schedule: a `PruningSchedule` of `tscnc_tf.schedules` or tfmot, or any callable from a step
            to (whether to renew the masks, the sparsity) that consists of TensorFlow operations.
        layers: which layers: a class, a layer, a name pattern, a predicate, or a list of these, as
            in `add_regularizers`. None for all layers, without those weights of Keras' layers that
            are no kernels, such as embeddings, and, if the structure removes whole filters, without
            the layers that make the model's outputs. Kernels of layers with LoRA, or quantized to
            integers, are never pruned.
        weights: a pattern for the names of weights, such as `"*kernel"`; None for all of them.
        min_rank: the smallest rank of a weight to prune, >= 2.
        criterion: a callable from a weight tensor to scores of its shape; or `Taylor(x, y)`, which
            is measured on data, with a schedule that has its final sparsity at step 1;
            `Magnitude()` if None.
        structure: `Unstructured()`, also with minima per filter and per input, `NM(2, 4)`,
            `Block(rows, columns)` or `Filters()`.
        scope: how the kept weights are distributed among the weight tensors:

            * "layer": each tensor has the schedule's sparsity.
            * "global": all weights compete by their scores.
            * "lamp": all weights compete by their squares, divided by the sum of the squares of
              their tensor that are not smaller.
            * "erk" (Erdős–Rényi-Kernel): small layers stay denser.
            * "igq" (ideal-gas quotas): a tensor of n weights keeps n / (1 + F n), so that no layer
              loses all its weights.
            * a dict of final sparsities by name pattern. The first pattern that matches a weight
              counts; weights without a match follow the schedule.

            Numbers of weights are exact: for each tensor with "layer" and a dict, where the total
            is off by the rounding of each, and for all tensors together otherwise.
        min_weights: the minimum number of kept weights of every weight tensor.
        regrowth: a `Regrowth`, by which kept weights change places in training; None for none.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: the model is not built or already pruned, no weight is left to prune, an element
            of a list of layers matches none, an argument is out of range, or the regrowth does not
            fit the structure or schedule.

    Warns:
        UserWarning: a weight tensor would keep fewer weights than it has outputs, so that some
            outputs would be dead; or outputs of the model would no longer depend on its inputs; or
            the structure removes whole filters of a subclassed model, whose output layers are not
            known.

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
        criterion: Callable[[tf.Tensor], tf.Tensor] | Taylor | None = None,
        structure: Structure | None = None,
        scope: str | Mapping[str, float] | learned.Learned = "layer",
        min_weights: int = 1,
        regrowth: Regrowth | None = None,
    ) -> None:
        require_model(model)
        if not isinstance(regrowth, Regrowth | None):
            raise TypeError(f"regrowth must be a Regrowth(...) or None, got {regrowth!r}.")
        require_schedule(schedule)
        taylor = criterion if isinstance(criterion, Taylor) else None
        if taylor:
            taylor.require(schedule)
        found = candidates(model, layers, weights, min_rank, unfit(structure, layers))
        if found is not layers:  # else the pruner is restored, or replaces a ScorePruner
            learned.require_fixed(scope)
        self._set_up(
            model,
            schedule,
            found,
            criterion=None if taylor else criterion,
            structure=structure,
            scope=scope,
            min_weights=min_weights,
            regrowth=regrowth,
        )
        if found is not layers:
            self._begin_new(taylor)

    def begin(self) -> None:
        """Reset the masks for the present weights, before the first step of a new pruner.

        All weights are kept, unless the network is sparse from the start. It consists of TensorFlow
        operations, for a program that gets the weights at run time. A criterion that is measured on
        data is not measured again.
        """
        for mask in self.state.masks:
            mask.assign(tf.ones_like(mask))
        if self._is_sparse_from_the_start:
            self._prune_to_final_sparsity()

    @staticmethod
    def of_zeros(model: Any, layers: Any = None) -> Pruner:
        """Return a frozen pruner of a model, whose masks are False where a kernel is zero."""
        require_model(model)
        found = candidates(model, layers)
        variables = [tensor_variable(target.variable) for target, reason in found if not reason]
        return Pruner.of_masks(model, found, [tf.not_equal(each, 0) for each in variables], 0.0)

    @staticmethod
    def of_masks(
        model: Any, found: Candidates, kept: Sequence[Any], sparsity: float, **options: Any
    ) -> Pruner:
        """Return a frozen pruner of a model.

        Args:
            model: a built model of either Keras, not pruned.
            found: its weights, and why some of them are not pruned.
            kept: masks of the pruned ones, in the same order; True where a weight is kept.
            sparsity: the sparsity by which the masks were chosen.
            **options: how the masks were chosen: `structure`, `scope`, `min_weights`.
        """
        from tscnc_tf import schedules

        pruner = Pruner(model, schedules.OneShot(sparsity), layers=found, **options)
        for variable, mask in zip(pruner.state.masks, kept, strict=True):
            variable.assign(mask)
        pruner.freeze()
        return pruner

    def _set_up(
        self,
        model: Any,
        schedule: Any,
        found: Candidates,
        regrowth: Regrowth | None = None,
        **options: Any,
    ) -> None:
        """Attach the pruner to its model; see the constructor, `candidates` and `Selection`."""
        self.model = model
        self.schedule = schedule
        self.targets = [target for target, reason in found if not reason]
        self._found = found
        if not self.targets:
            raise ValueError(self._nothing_to_prune())
        self._asked = scheduling.final_sparsity(schedule)
        self._selection = Selection(self.targets, sparsity=self._asked, **options)
        self.target_sparsity = self.structure.reachable(self._asked)
        if regrowth is not None:
            regrowth.require(self.structure, options["scope"], self.targets, schedule)
        self.regrowth = regrowth
        # Regrowth needs pruned weights.
        self._is_sparse_from_the_start = bool(regrowth) and scheduling.is_at_once(schedule)
        self._shares: learned.TrainedShares | None = None
        self._compiled: dict[Any, Any] = {}  # steps for calls outside any graph
        self.state = self._new_state()
        masks.attach(model, self)
        for target, mask in zip(self.targets, self.state.masks, strict=True):
            masks.constrain(target.variable, self, mask)

    def _begin_new(self, taylor: Taylor | None = None) -> None:
        """Check for frozen weights and dead outputs, and prune if the schedule prunes at once.

        If it raises, the model is as before.
        """
        active = self._active()
        try:
            if not active:
                raise ValueError(self._nothing_to_prune())
            if self.regrowth is not None:
                self.regrowth.require_moves(self.schedule)
            _, values = self._ranked(active)
            self._selection.only(active).warn_of_dead_outputs(self.target_sparsity, values)
            if taylor or self._is_sparse_from_the_start:
                self._prune_to_final_sparsity(taylor)
        except BaseException:  # also an interrupt
            self.detach()
            raise

    def _nothing_to_prune(self) -> str:
        reasons = {target.name: reason or FROZEN for target, reason in self._found}
        return (
            f"model {self.model.name!r} has no weight that can be pruned as asked for: "
            f"{reasons or 'it has none of rank 2 or more'}."
        )

    def _new_state(self) -> Any:
        return masks.new_state(self, epochs=self.regrowth.epochs if self.regrowth else 0)

    def detach(self) -> None:
        """Remove the pruner from its model; the weights are not changed."""
        for target, mask in zip(self.targets, self.state.masks, strict=True):
            masks.release(target.variable)
            mask.assign(tf.ones_like(mask))  # compiled steps of other models still apply it
        masks.detach(self.model)

    @property
    def is_attached(self) -> bool:
        """Whether the model still has this pruner."""
        return vars(self.model).get(masks.PRUNER) is self

    @property
    def structure(self) -> Structure:
        """The structure of the masks."""
        return self._selection.structure

    @property
    def skipped(self) -> tuple[Candidate, ...]:
        """The weights of rank 2 or more that are not pruned at present, and why."""
        pruned = {id(variable) for variable, _ in self.masked_variables()}
        return tuple(
            Candidate(target, reason or self._not_pruned(target))
            for target, reason in self._found
            if id(target.variable) not in pruned
        )

    def _not_pruned(self, target: Target) -> str:
        if id(target.variable) not in {id(weight) for weight in self.model.weights}:
            return "the model does not hold it any more"
        return unprunable(target.layer, target.variable) or FROZEN

    @property
    def frozen(self) -> bool:
        """Whether the masks are frozen."""
        with tf.init_scope():  # also while a step is traced
            return bool(self.state.frozen.numpy())

    def masked_targets(self) -> list[tuple[Target, Any]]:
        """Return (target, mask) of the pruned weights; masks are True where a weight is kept.

        Weights that the model no longer holds are left out, and those that were frozen before they
        were pruned.
        """
        active = {id(self.targets[index]) for index in self._active()}
        return [
            (target, mask)
            for target, mask in self._held_pairs()
            if id(target) in active or not np.all(mask.numpy())
        ]

    def masked_variables(self) -> list[tuple[Any, Any]]:
        """Return (weight, mask) for each of `masked_targets`."""
        return [(target.variable, mask) for target, mask in self.masked_targets()]

    def held(self) -> list[int]:
        """Return the indices of the targets that the model holds, without LoRA or quantization."""
        own = {id(weight) for weight in self.model.weights}
        return [
            index
            for index, target in enumerate(self.targets)
            if id(target.variable) in own and not unprunable(target.layer, target.variable)
        ]

    def _held_pairs(self) -> list[tuple[Target, Any]]:
        """Return (target, mask) for the indices of `held`."""
        return [(self.targets[index], self.state.masks[index]) for index in self.held()]

    def _active(self) -> list[int]:
        """Return the indices of `held` whose weights are trainable."""
        trained = {optimizers.key(weight) for weight in self.model.trainable_variables}
        held = self.held()
        return [index for index in held if optimizers.key(self.targets[index].variable) in trained]

    def constrain(self, weight: tf.Tensor, mask: Any, own: Callable[[Any], Any] | None) -> Any:
        """Return the value of a weight after an optimizer step: zero where its mask is False.

        Args:
            weight: the value.
            mask: the mask.
            own: the constraint of its layer, which is given the masked weight; None for none.
        """
        weight = kept(weight, mask)
        return weight if own is None else kept(own(weight), mask)

    @tf.autograph.experimental.do_not_convert
    def step(self, optimizer: Any = None, *, is_constrained: bool = False) -> None:
        """Count an optimizer step, renew the masks if that is due, and apply them.

        Call it after each optimizer step. Without a step since the last call it applies the masks.

        Args:
            optimizer: the optimizer that took the step. None for the model's own optimizer that
                trains these weights; if there is none, each call counts as a step.
            is_constrained: whether only an optimizer of Keras has changed the weights, so that
                their constraints have masked them already.

        Raises:
            RuntimeError: regrowth needs the gradients of the step, and the step was not intercepted
                (`training`, `apply_gradients`); in a graph also tf.errors.InvalidArgumentError.
        """
        optimizer = self.own_optimizer() if optimizer is None else optimizers.require(optimizer)
        is_constrained = _checks.boolean("is_constrained", is_constrained)
        if self._needs_gradients:
            self._require_intercepted(
                optimizer,
                "an optimizer step was taken whose gradients the pruner was not given, and its "
                "regrowth needs them. Train the model by its own fit, by AdversarialTraining, as a "
                "part of another model with pruning_callbacks(), or by apply_gradients of its "
                "pruner; or take Regrowth(criterion='random').",
            )
        if self._needs_gradients and self._is_used and is_constrained:
            return  # `_on_step` has done this step
        self._step(optimizer, is_constrained and optimizer is not None)

    @tf.autograph.experimental.do_not_convert
    def apply_gradients(self, optimizer: Any, gradients_and_variables: Any) -> Any:
        """Take an optimizer step and the pruner's step.

        For your own training loop, in place of `optimizer.apply_gradients` and `step`.

        Args:
            optimizer: an optimizer of the model's Keras.
            gradients_and_variables: pairs of a gradient and a variable of the model.

        Returns:
            What the optimizer's `apply_gradients` returns.
        """
        with self.training(optimizers.require(optimizer)):
            result = optimizer.apply_gradients(optimizers.require_pairs(gradients_and_variables))
        self.step(optimizer, is_constrained=True)
        return result

    @property
    def _needs_gradients(self) -> bool:
        """Whether regrowth needs the gradients of a step."""
        return self.regrowth is not None and self.regrowth.needs_gradients

    def step_function(self, optimizer: Any) -> Callable[[], None]:
        """Return `step` for an optimizer, for many calls outside any graph.

        Which weights are trained, and the optimizer's variables for them, are determined only once.
        """
        if self._needs_gradients:
            return functools.partial(self.step, optimizer)
        compiled = self._compiled_step(optimizer, False)

        def step() -> None:
            self._reset_if_new(optimizer)
            compiled()

        return step

    def _step(self, optimizer: Any, is_constrained: bool, gradients: Any = None) -> None:
        """Count a step, renew the masks if that is due, and apply them.

        Args:
            optimizer: the optimizer that took it; None if not known.
            is_constrained: see `step`.
            gradients: of the step, one per target (None for none); None if they are not known.
        """
        if tf.executing_eagerly():
            self._reset_if_new(optimizer)
            self._compiled_step(optimizer, is_constrained)(gradients)
        else:
            self._run_step(optimizer, is_constrained, gradients)

    def _run_step(self, optimizer: Any, is_constrained: bool, gradients: Any = None) -> None:
        update_everywhere(
            self.model,
            lambda strategy: self._update(strategy, optimizer, is_constrained, gradients),
        )

    def _compiled_step(self, optimizer: Any, is_constrained: bool) -> Callable[..., None]:
        # Optimizers create their variables for each weight at their first step.
        kept = optimizers.companions(optimizer, [target.variable for target in self.targets])
        ids = (id(variable) for companions in kept for variable in companions)
        key = (id(optimizer), is_constrained, tuple(self._active()), *ids)
        if key not in self._compiled:
            if len(self._compiled) == _KEPT_STEPS:
                self._compiled.pop(next(iter(self._compiled)))
            act = functools.partial(self._run_step, optimizer, is_constrained)
            self._compiled[key] = tf.function(act, autograph=False)
        return self._compiled[key]

    def training(self, optimizer: Any = None) -> contextlib.AbstractContextManager[Any]:
        """Return the context for training the model, in which optimizer steps are intercepted.

        `fit`, `AdversarialTraining` and the callbacks enter it by themselves. Regrowth by gradients
        needs it, and so do the legacy optimizers of tf_keras: they refuse to apply constraints
        after sparse gradients.

        Args:
            optimizer: the optimizer; None for all that the model holds. Regrowth refuses Ftrl.
        """
        stack = contextlib.ExitStack()
        given = [] if optimizer is None else [optimizers.require(optimizer)]
        for each in given or optimizers.held(self.model):
            if self.regrowth is not None and not self.frozen:
                self.regrowth.require_optimizer(each)
            if optimizers.is_legacy(each) or self._needs_gradients:
                stack.enter_context(optimizers.intercept(each, self._on_step))
        return stack

    def _on_step(self, optimizer: Any, pairs: optimizers.Pairs, step: Any) -> Any:
        """Take a step with dense gradients of the targets, then regrow by these gradients."""
        ours = {optimizers.key(target.variable) for target in self.targets}
        pairs = [
            (tf.convert_to_tensor(gradient), variable)
            if isinstance(gradient, tf.IndexedSlices) and optimizers.key(variable) in ours
            else (gradient, variable)
            for gradient, variable in pairs
        ]
        given = {optimizers.key(weight): g for g, weight in pairs if g is not None}
        gradients = [given.get(optimizers.key(target.variable)) for target in self.targets]
        known = [gradient for gradient in gradients if gradient is not None]
        if not (known and self._needs_gradients and self.is_attached):
            return step(pairs)
        # Otherwise a step without data, at the end of a dataset, would count.
        with depending_on(known):
            weights = [target.variable for target in self.targets]
            gradients = optimizers.summed_up(optimizer, gradients, weights)
            self._is_used = True
            result = step(pairs)
            self._step(optimizer, True, gradients)
        return result

    perturb_scores = 0.0  # see `ScorePruner`
    _has_recorded = False  # whether this `fit` has recorded an epoch

    def perturbed(self, loss: Any) -> contextlib.AbstractContextManager[Any]:  # noqa: ARG002
        """Return the context in which the gradient of a loss is computed; it does nothing here."""
        return contextlib.nullcontext()

    @tf.autograph.experimental.do_not_convert
    def apply(self, optimizer: Any = None) -> None:
        """Apply the masks to weights, and to the optimizer's slots and averages."""
        optimizer = None if optimizer is None else optimizers.require(optimizer)
        update_everywhere(self.model, lambda strategy: self._apply(strategy, optimizer))

    def on_weights_set(self) -> None:
        """Apply the masks after weights were set from outside."""
        self.apply()

    def on_epoch_end(self, logs: Mapping[str, Any]) -> None:
        """Record the logs of an epoch, in a loop of your own, for a `Regrowth` that needs them."""
        epoch = self.regrowth.epoch(logs) if self.regrowth and self.regrowth.epochs else None
        if epoch is not None:
            self.state.history.assign(np.concatenate([self.state.history.numpy()[1:], epoch]))
            self._has_recorded = True

    def on_train_end(self, optimizer: Any) -> None:
        """Apply the masks when a `fit` has ended; warn if a `Regrowth` lacked its validation."""
        self.apply(optimizer)
        if self.regrowth is not None and not self.frozen and not self._has_recorded:
            self.regrowth.warn_of_no_validation(self.schedule, self.steps)
        self._has_recorded = False

    def finalize(self) -> None:
        """Prune to the schedule's final sparsity now, unless it follows the validation; freeze.

        Masks that are frozen stay as they are.
        """
        follows = self.regrowth is not None and bool(self.regrowth.epochs)
        if not (self.frozen or follows):
            self._prune_to_final_sparsity()
        self.freeze()

    def _prune_to_final_sparsity(self, taylor: Taylor | None = None) -> None:
        """Prune to the final sparsity, by `Taylor` importance if it is given."""
        importance = taylor and taylor.importance(self.model, [t.variable for t in self.targets])

        def update(strategy: Any) -> None:
            self._renew(strategy, tf.constant(self._asked), importance)
            self._apply(strategy, getattr(self.model, "optimizer", None))

        update_everywhere(self.model, update)

    def freeze(self) -> None:
        """Freeze the masks, for fine-tuning: zeros stay zeros."""
        self.state.frozen.assign(True)

    def _update(
        self, strategy: Any, optimizer: Any, is_constrained: bool, gradients: Any = None
    ) -> None:
        before, now, count = self._counted(optimizer)
        due, sparsity = due_between(self.schedule, before, now)
        active = self._among(self._active())
        # Weights that were frozen at the last renewal, and are trainable now, are pruned now.
        due |= tf.reduce_any(tensor_variable(self.state.left_out) & active) & (now > before)
        is_unfrozen = ~tf.identity(tensor_variable(self.state.frozen))
        due &= is_unfrozen

        def renew() -> None:
            self._renew(strategy, sparsity)
            self._mask_weights(strategy)

        tf.cond(due, renew, lambda: None)
        if self.regrowth is not None and (gradients or not self._needs_gradients):
            due = self.regrowth.is_due(self.schedule, before, now) & is_unfrozen
            move = functools.partial(
                self._regrow, self.regrowth, strategy, optimizer, gradients, now
            )
            tf.cond(due, move, lambda: None)
        for variable, value in ((self.state.step, now), (self.state.seen, count)):
            strategy.extended.update(tensor_variable(variable), assign, args=(value,))
        if not is_constrained:
            self._mask_weights(strategy)
        self._mask_companions(strategy, optimizer)

    def _regrow(
        self, regrowth: Regrowth, strategy: Any, optimizer: Any, gradients: Any, step: tf.Tensor
    ) -> None:
        """Exchange kept weights for others, which start from zero."""
        chosen = [
            index for index in self._active() if gradients is None or gradients[index] is not None
        ]
        pairs = [(self.targets[index], self.state.masks[index]) for index in chosen]
        given = [gradients[index] for index in chosen] if gradients else []

        def move() -> None:
            self._apply(strategy, optimizer)  # so that regrown weights start from zero
            moved = regrowth.masks(
                self.structure,
                pairs,
                given,
                share=regrowth.share(self.schedule, step),
                history=self.state.history if regrowth.epochs else None,
                step=step,
                min_weights=self._selection.min_weights,
            )
            for (_, variable), mask in zip(pairs, moved, strict=True):
                strategy.extended.update(variable, assign, args=(mask,))
            self._mask_weights(strategy)
            if regrowth.epochs:  # they are used once
                epochs = tensor_variable(self.state.history)
                used = regrowth.used(tf.convert_to_tensor(epochs))
                strategy.extended.update(epochs, assign, args=(used,))

        finite = [tf.reduce_all(tf.math.is_finite(gradient)) for gradient in given]
        tf.cond(tf.reduce_all(tf.stack(finite or [True])), move, lambda: None)

    def _among(self, indices: list[int]) -> tf.Tensor:
        """Return a boolean vector over the targets, True at these indices."""
        return tf.constant(np.isin(np.arange(len(self.targets)), indices))

    def _renew(self, strategy: Any, sparsity: tf.Tensor, importance: Any = None) -> None:
        """Choose the weights to keep among the trainable targets, and assign the masks."""
        active = self._active()
        if active:
            alive, values = self._ranked(active)
            if importance is not None:
                values = [importance[index] for index in active]
            scope = None if self._shares is None else self._shares.scope(active)
            chosen = self._selection.only(active).masks(sparsity, alive, values, scope)
            for index, mask in zip(active, chosen, strict=True):
                variable = self.state.masks[index]
                strategy.extended.update(variable, assign, args=(mask,))
        left_out = ~self._among(active)
        variable = tensor_variable(self.state.left_out)
        strategy.extended.update(variable, assign, args=(left_out,))

    def _ranked(self, indices: list[int]) -> tuple[list[Any], list[Any] | None]:
        """Return `alive` and `values` for `Selection.masks`."""
        return [self.state.masks[index] for index in indices], None

    def _apply(self, strategy: Any, optimizer: Any) -> None:
        self._mask_weights(strategy)
        self._mask_companions(strategy, optimizer)

    def _mask_weights(self, strategy: Any) -> None:
        for target, mask in self._held_pairs():
            variable = tensor_variable(target.variable)
            strategy.extended.update(variable, keep, args=(mask,))

    def _mask_companions(self, strategy: Any, optimizer: Any) -> None:
        """Mask the optimizer's variables for each weight: slots, sums of gradients, averages."""
        pairs = self._held_pairs()
        weights = [target.variable for target, _ in pairs]
        # Regrowth needs the summed gradients of pruned weights, too.
        kept = optimizers.companions(optimizer, weights, sums=not self._needs_gradients)
        for (_, mask), companions in zip(pairs, kept, strict=True):
            for variable in companions:
                strategy.extended.update(tensor_variable(variable), keep, args=(mask,))

    def get_config(self) -> dict[str, Any]:
        """Return the configuration of the pruner; its variables are saved separately."""
        return {
            "schedule": serialize_schedule(self.schedule, self.model),
            "criterion": serialize(self._selection.criterion, self.model),
            **({"regrowth": self.regrowth.get_config()} if self.regrowth else {}),
            **self._selection_config(),
        }

    def _selection_config(self) -> dict[str, Any]:
        targets = [target for target, _ in self._held_pairs()]
        found = serialize_selection(self._selection, targets, self.model)
        return {"class_name": type(self).__name__, **found}

    @classmethod
    def from_config(cls, config: dict[str, Any], *, model: Any) -> Self:
        """Attach the pruner of a configuration to `model`.

        Weights are found by their paths of attributes, not by layer names: a subclassed model
        gives its layers new names when it is built.

        Raises:
            ValueError: the model lacks a weight that was pruned.
        """
        schedule = deserialize_schedule(config["schedule"], model)
        criterion = deserialize(config["criterion"], model)
        regrowth = Regrowth.from_config(config["regrowth"]) if "regrowth" in config else None
        options = deserialize_selection(config, model)
        return cls(model, schedule, criterion=criterion, regrowth=regrowth, **options)

    def __repr__(self) -> str:
        return (
            f"Pruner({self.model.name!r}, {self.schedule!r}, "
            f"criterion={self._selection.criterion!r}, structure={self.structure!r}, "
            f"scope={self._selection.scope!r}, min_weights={self._selection.min_weights}"
            f"{f', regrowth={self.regrowth!r}' if self.regrowth else ''})"
        )
