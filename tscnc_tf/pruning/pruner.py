"""The mask engine: pruning on variables, for models of either Keras, without wrappers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import tensorflow as tf

from tscnc_tf import _keras
from tscnc_tf._keras import adapted, masks, optimizers
from tscnc_tf._keras import layers as kernel_layers
from tscnc_tf._keras.flavours import depending_on, tensor_variable, update_everywhere
from tscnc_tf._keras.masks import keep, kept
from tscnc_tf._keras.optimizers import assign
from tscnc_tf.functional import scheduling
from tscnc_tf.pruning import learned
from tscnc_tf.pruning.configs import (
    deserialize,
    deserialize_schedule,
    require_schedule,
    serialize,
    serialize_schedule,
)
from tscnc_tf.pruning.regrowth import Regrowth
from tscnc_tf.pruning.selection import Selection
from tscnc_tf.pruning.step_count import StepCount
from tscnc_tf.pruning.structures import Structure, unfit
from tscnc_tf.pruning.targets import (
    FROZEN,
    Candidate,
    Candidates,
    Target,
    candidates,
    found_again,
    require_model,
)
from tscnc_tf.pruning.taylor import Taylor

__all__ = ["Pruner"]

_KEPT_STEPS = 4  # compiled, of a pruner that several optimizers call in turn


@_keras.register
class Pruner(StepCount):
    r"""Prunes the weights of a model as it is trained, by masks on its variables.

    At each optimizer step t it asks the schedule; where the schedule says so, it chooses anew the
    weights to keep, by their scores. What is not kept is zero: in the weights,
    :math:`w \leftarrow m \odot w`, in the optimizer's slots, and in moving averages of weights. A
    pruned weight does not come back as long as the sparsity does not fall.

    **Zeros stay zero** wherever the weights are trained: a mask is the constraint of its variable
    (after the constraint that the layer has, if any), and Keras' optimizers apply constraints
    after each update. So they hold in another model that a pruned layer becomes a part of, such as
    a new head on a pruned body, too. (That model's files do not hold the masks, only the zeros:
    `freeze_mask` goes on with these after loading. And where its optimizer has averages that are
    put in place of weights when training ends, `use_ema=True`, it needs `pruning_callbacks()`.)

    **Masks are renewed** by `step`, which is called after each optimizer step, inside the compiled
    step, by the model's own `fit` and by `AdversarialTraining`. A training loop of your own calls
    it. Where the model is a part of another one that is trained, where its layers are, or where it
    has a `make_train_function` of its own, `callbacks.pruning_callbacks()` call it. Masks, step
    and schedule are saved with the model: in `.keras` files, in weight files, and in TensorFlow's
    checkpoints. `strip` takes the pruner off again.

    **What is frozen** (`layer.trainable = False`) when a step is taken does not change: its mask
    stays as it is, and scopes share out what is kept among the others. Once it is trained again it
    is pruned, at the first step: with Keras, changes of `trainable` act from the next `compile`.
    A layer that is given LoRA weights leaves the pruner: its kernel is frozen then, and what acts
    is the sum with the LoRA product, which has no zeros.

    Steps are counted by the optimizer's `iterations`: not by forward passes, so that a layer that
    is called twice counts once. A step that only accumulates gradients does not count, nor does one
    that a loss scale skips, where the optimizer does not count it (Keras 3). With a new optimizer
    the count continues where that of the last one stopped.

    Args:
        model: a built model of either Keras, subclassed ones too.
        schedule: a `PruningSchedule` of `tscnc_tf.schedules` or tfmot, or any callable from a step
            to (whether to choose anew, the sparsity) that consists of TensorFlow operations.
        layers: which layers: a class, a layer, a name pattern, a predicate, or a list of these, as
            in `add_regularizers`. None for all, but for what Keras' own layers hold that is no
            kernel, such as embeddings, and, where the structure takes whole filters away, for the
            layers that make the model's outputs. Kernels of layers with LoRA, or quantized to
            integers, are left out in any case.
        weights: a pattern for the names of weights, such as `"*kernel"`; None for all of them.
        min_rank: the smallest rank of a weight to prune.
        criterion: what weights are worth: a callable from a weight tensor to scores of its shape;
            or `Taylor(x, y)`, which is measured on data, for a schedule that has its final sparsity
            at step 1; `Magnitude()` if None.
        structure: `Unstructured()`, also with minima per filter and per input, `NM(2, 4)`,
            `Block(rows, columns)` or `Filters()`.
        scope: how what is kept is shared out: "layer" (each weight tensor has the schedule's
            sparsity), "global" (all compete by their scores), "lamp" (all compete by their squares
            over the sum of the larger ones of their tensor), "erk" (Erdős–Rényi-Kernel: small
            layers stay denser), "igq" (ideal-gas quotas: of n weights n / (1 + F n), so that no
            layer is starved), or a dict of final sparsities by name pattern (of several patterns
            that fit a weight the first one counts; weights that none fits follow the schedule).
            Numbers of weights are exact: of each tensor with "layer" and a dict, so that their sum
            is off by the rounding of each; of all tensors together with the others.
        min_weights: the number of weights that every weight tensor keeps at least.
        regrowth: a `Regrowth`, by which kept weights change places in training; None for none.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: the model is not built or has a pruner already, nothing is left to prune, what
            is in a list of layers fits none, an argument is out of range, or the regrowth does not
            go with the structure or schedule.

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
        measured = criterion if isinstance(criterion, Taylor) else None
        if measured:
            measured.require(schedule)
        found = candidates(model, layers, weights, min_rank, unfit(structure, layers))
        if found is not layers:  # else the pruner is restored, or follows one of scores
            learned.require_fixed(scope)
        self._set_up(
            model,
            schedule,
            found,
            criterion=None if measured else criterion,
            structure=structure,
            scope=scope,
            min_weights=min_weights,
            regrowth=regrowth,
        )
        if found is not layers:
            self._begin_new(measured)

    def begin(self) -> None:
        """Keep all weights; where the network is sparse from the start, choose them as they are.

        It is for a program of TensorFlow operations that is given the weights later, before the
        first step of a new pruner. An importance measured on data is not measured again.
        """
        for mask in self.state.masks:
            mask.assign(tf.ones_like(mask))
        if self._is_sparse_from_the_start:
            self._prune_to_the_end()

    @staticmethod
    def of_zeros(model: Any, layers: Any = None) -> Pruner:
        """Return a frozen pruner of a model whose masks are False where a kernel is zero now."""
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
            kept: masks of those that are, in their order; True where a weight is kept.
            sparsity: that was asked for.
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
        """Attach the pruner to its model.

        Args:
            model: the model.
            schedule: the schedule.
            found: its weights, and why some of them are not pruned.
            regrowth: how kept weights change places, None for not at all.
            **options: those of `Selection`.
        """
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
        # In a dense network weights would not change places.
        self._is_sparse_from_the_start = bool(regrowth) and scheduling.is_at_once(schedule)
        self._shares: learned.TrainedShares | None = None
        self._compiled: dict[Any, Any] = {}  # steps, for calls outside of any graph
        self.state = self._new_state()
        masks.attach(model, self)
        for target, mask in zip(self.targets, self.state.masks, strict=True):
            masks.constrain(target.variable, self, mask)

    def _begin_new(self, measured: Taylor | None = None) -> None:
        """Raise a ValueError if all is frozen; warn of dead outputs; prune if it is time to.

        Whatever is raised, the model is as it was then.
        """
        active = self._active()
        try:
            if not active:
                raise ValueError(self._nothing_to_prune())
            if self.regrowth is not None:
                self.regrowth.require_moves(self.schedule)
            _, judged = self._ranked(active)
            self._selection.only(active).warn_of_dead_outputs(self.target_sparsity, judged)
            if measured or self._is_sparse_from_the_start:
                self._prune_to_the_end(measured)
        except BaseException:  # an interrupt, too
            self.detach()
            raise

    def _nothing_to_prune(self) -> str:
        reasons = {target.name: reason or FROZEN for target, reason in self._found}
        return (
            f"model {self.model.name!r} has no weight that can be pruned as asked for: "
            f"{reasons or 'it has none of rank 2 or more'}."
        )

    def _new_state(self, dtypes: Sequence[str] = (), has_shares: bool = False) -> Any:
        return masks.new_state(
            self.model,
            shapes=[target.shape for target in self.targets],
            dtypes=dtypes,
            has_shares=has_shares,
            held=self._held,
            on_loaded=self.on_weights_set,
        )

    def detach(self) -> None:
        """Take the pruner off its model and its weights, which stay as they are."""
        for target, mask in zip(self.targets, self.state.masks, strict=True):
            masks.release(target.variable)
            mask.assign(tf.ones_like(mask))  # for steps of other models, compiled with it
        masks.detach(self.model)

    @property
    def is_attached(self) -> bool:
        """Whether the pruner is still that of its model."""
        return vars(self.model).get(masks.PRUNER) is self

    @property
    def structure(self) -> Structure:
        """The structure that was asked for."""
        return self._selection.structure

    @property
    def skipped(self) -> tuple[Candidate, ...]:
        """The weights of rank 2 or more that are not pruned now, and why."""
        pruned = {id(variable) for variable, _ in self.masked_variables()}
        return tuple(
            Candidate(target, reason or self._not_pruned(target))
            for target, reason in self._found
            if id(target.variable) not in pruned
        )

    def _not_pruned(self, target: Target) -> str:
        if id(target.variable) not in {id(weight) for weight in self.model.weights}:
            return "the model does not hold it any more"
        return adapted.reason(target.layer, target.variable) or FROZEN

    @property
    def frozen(self) -> bool:
        """Whether the masks stay as they are."""
        return bool(self.state.frozen.numpy())

    def masked_targets(self) -> list[tuple[Target, Any]]:
        """Return (target, mask) for what is pruned now; masks are True where a weight is kept.

        A weight that the model does not hold any more is not pruned, nor is one that has been
        frozen before it was.
        """
        active = {id(self.targets[index]) for index in self._active()}
        return [
            (target, mask)
            for target, mask in self._held_pairs()
            if id(target) in active or not np.all(mask.numpy())
        ]

    def masked_variables(self) -> list[tuple[Any, Any]]:
        """Return the pairs (weight, mask); masks are True where a weight is kept."""
        return [(target.variable, mask) for target, mask in self.masked_targets()]

    def _held(self) -> list[int]:
        """Return the places of the targets that the model holds, as plain kernels."""
        own = {id(weight) for weight in self.model.weights}
        return [
            index
            for index, target in enumerate(self.targets)
            if id(target.variable) in own and not adapted.reason(target.layer, target.variable)
        ]

    def _held_pairs(self) -> list[tuple[Target, Any]]:
        """Return (target, mask) for what the model holds."""
        return [(self.targets[index], self.state.masks[index]) for index in self._held()]

    def _active(self) -> list[int]:
        """Return the places of those that are trained, and not frozen."""
        trained = {optimizers.key(weight) for weight in self.model.trainable_variables}
        held = self._held()
        return [index for index in held if optimizers.key(self.targets[index].variable) in trained]

    def constrain(self, weight: tf.Tensor, mask: Any, own: Callable[[Any], Any] | None) -> Any:
        """Return the value of a weight after an optimizer step: zero where its mask is False.

        Args:
            weight: its value.
            mask: its mask.
            own: the constraint of its layer, None for none; it sees the masked weight.
        """
        weight = kept(weight, mask)
        return weight if own is None else kept(own(weight), mask)

    @tf.autograph.experimental.do_not_convert
    def step(self, optimizer: Any = None, *, is_constrained: bool = False) -> None:
        """Count an optimizer step, renew the masks if that is due, and apply them.

        To be called after each step; without a further step it only applies the masks.

        Args:
            optimizer: the one that has taken the step. None for the one that the model is compiled
                with, or another one of its own that trains these weights; if there is none, each
                call counts as a step.
            is_constrained: whether nothing but an optimizer of Keras has changed the weights, so
                that their constraints have masked them already.

        Raises:
            RuntimeError: regrowth needs the gradients of the step, and the step was not intercepted
                (`training`, `apply_gradients`).
        """
        optimizer = self.own_optimizer() if optimizer is None else optimizer
        if self._needs_gradients and self._is_bypassed(optimizer):
            raise RuntimeError(
                "an optimizer step was taken whose gradients the pruner was not given, and its "
                "regrowth needs them. Train the model by its own fit, by AdversarialTraining, as a "
                "part of another model with pruning_callbacks(), or by apply_gradients of its "
                "pruner; or take Regrowth(criterion='random')."
            )
        if self._needs_gradients and self._is_used and is_constrained:
            return  # all is done where the optimizer's step was intercepted
        self._step(optimizer, is_constrained and optimizer is not None)

    @tf.autograph.experimental.do_not_convert
    def apply_gradients(self, optimizer: Any, gradients_and_variables: Any) -> Any:
        """Take an optimizer's step, and the step of the pruner that belongs to it.

        For a training loop of your own, in place of `optimizer.apply_gradients` and `step`.

        Args:
            optimizer: of the model's Keras.
            gradients_and_variables: pairs of a gradient and a variable of the model.

        Returns:
            What the optimizer's `apply_gradients` returns.
        """
        with self.training(optimizer):
            result = optimizer.apply_gradients(gradients_and_variables)
        self.step(optimizer, is_constrained=True)
        return result

    @property
    def _needs_gradients(self) -> bool:
        """Whether masks are renewed by the gradients of a step."""
        return self.regrowth is not None and self.regrowth.needs_gradients

    def step_function(self, optimizer: Any) -> Callable[[], None]:
        """Return `step` for an optimizer, to be called many times outside of any graph.

        What `step` determines in Python at each call is determined once: which weights are trained,
        and what the optimizer keeps for them.
        """
        if self._needs_gradients:
            return functools.partial(self.step, optimizer)
        compiled = self._compiled_step(optimizer, False)

        def step() -> None:
            self._reset_if_new(optimizer)
            compiled()

        return step

    def _step(self, optimizer: Any, is_constrained: bool, gradients: Any = None) -> None:
        """Count a step, renew the masks where that is due, and let them act.

        Args:
            optimizer: that has taken it, None if not known.
            is_constrained: see `step`.
            gradients: of the step, one per target (None for none); None if they are not known.
        """
        if tf.executing_eagerly():
            self._reset_if_new(optimizer)
            self._compiled_step(optimizer, is_constrained)(gradients)
        else:
            self._act(optimizer, is_constrained, gradients)

    def _act(self, optimizer: Any, is_constrained: bool, gradients: Any = None) -> None:
        update_everywhere(
            self.model,
            lambda strategy: self._update(strategy, optimizer, is_constrained, gradients),
        )

    def _compiled_step(self, optimizer: Any, is_constrained: bool) -> Callable[..., None]:
        # What an optimizer keeps for each weight is there only once it has begun.
        kept = optimizers.companions(optimizer, [target.variable for target in self.targets])
        ids = (id(variable) for companions in kept for variable in companions)
        key = (id(optimizer), is_constrained, tuple(self._active()), *ids)
        if key not in self._compiled:
            if len(self._compiled) == _KEPT_STEPS:
                self._compiled.pop(next(iter(self._compiled)))
            act = functools.partial(self._act, optimizer, is_constrained)
            self._compiled[key] = tf.function(act, autograph=False)
        return self._compiled[key]

    def training(self, optimizer: Any = None) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which an optimizer is to train the model.

        `fit`, `AdversarialTraining` and the callbacks enter it by themselves. Regrowth by gradients
        needs it, and the legacy optimizers of tf_keras do: they refuse to apply constraints after
        sparse gradients.

        Args:
            optimizer: None for all that the model holds.
        """
        stack = contextlib.ExitStack()
        for each in optimizers.held(self.model) if optimizer is None else [optimizer]:
            if optimizers.is_legacy(each) or self._needs_gradients:
                stack.enter_context(optimizers.intercept(each, self._on_step))
        return stack

    def _on_step(self, optimizer: Any, pairs: optimizers.Pairs, step: Any) -> Any:
        """Make the gradients of the targets dense; take the step; let regrowth see them."""
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
        # A step without data, at the end of a dataset, would be counted.
        with depending_on(known):
            weights = [target.variable for target in self.targets]
            gradients = optimizers.summed_up(optimizer, gradients, weights)
            self._is_used = True
            result = step(pairs)
            self._step(optimizer, True, gradients)
        return result

    perturb_scores = 0.0  # it has none

    def perturbed(self, loss: Any) -> contextlib.AbstractContextManager[Any]:  # noqa: ARG002
        """Return the context in which the gradient of a loss is taken; here it does nothing."""
        return contextlib.nullcontext()

    @tf.autograph.experimental.do_not_convert
    def apply(self, optimizer: Any = None) -> None:
        """Set to zero what is not kept: in weights, in the optimizer's slots and averages."""
        update_everywhere(self.model, lambda strategy: self._apply(strategy, optimizer))

    def on_weights_set(self) -> None:
        """Set to zero what is not kept, after weights were set from outside."""
        self.apply()

    def finalize(self) -> None:
        """Prune to the schedule's final sparsity now, wherever the schedule is, and freeze."""
        self._prune_to_the_end()
        self.freeze()

    def _prune_to_the_end(self, measured: Taylor | None = None) -> None:
        """Prune to the final sparsity, by what a criterion has measured on data, if it is given."""
        judged = measured and measured.importance(self.model, [t.variable for t in self.targets])

        def update(strategy: Any) -> None:
            self._renew(strategy, tf.constant(self._asked), judged)
            self._apply(strategy, getattr(self.model, "optimizer", None))

        update_everywhere(self.model, update)

    def freeze(self) -> None:
        """Keep the masks as they are from now on, for fine-tuning: what is zero stays zero."""
        self.state.frozen.assign(True)

    def _update(
        self, strategy: Any, optimizer: Any, is_constrained: bool, gradients: Any = None
    ) -> None:
        before, now, count = self._counted(optimizer)
        due, sparsity = scheduling.due_between(self.schedule, before, now)
        active = self._among(self._active())
        # Weights that were frozen when masks were renewed, and are not now, are pruned now.
        due |= tf.reduce_any(tensor_variable(self.state.left_out) & active) & (now > before)
        is_free = ~tf.identity(tensor_variable(self.state.frozen))
        due &= is_free

        def renew() -> None:
            self._renew(strategy, sparsity)
            self._mask_weights(strategy)

        tf.cond(due, renew, lambda: None)
        if self.regrowth is not None and (gradients or not self._needs_gradients):
            due = self.regrowth.is_due(self.schedule, before, now) & is_free
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
        """Let kept weights change places, and start those that are new from zero."""
        chosen = [
            index for index in self._active() if gradients is None or gradients[index] is not None
        ]
        pairs = [(self.targets[index], self.state.masks[index]) for index in chosen]
        given = [gradients[index] for index in chosen] if gradients else []

        def move() -> None:
            self._apply(strategy, optimizer)  # what is pruned at present is what starts from zero
            moved = regrowth.masks(
                self.structure,
                pairs,
                given,
                share=regrowth.share(self.schedule, step),
                step=step,
                min_weights=self._selection.min_weights,
            )
            for (_, variable), mask in zip(pairs, moved, strict=True):
                strategy.extended.update(variable, assign, args=(mask,))
            self._mask_weights(strategy)

        finite = [tf.reduce_all(tf.math.is_finite(gradient)) for gradient in given]
        tf.cond(tf.reduce_all(tf.stack(finite or [True])), move, lambda: None)

    def _among(self, indices: list[int]) -> tf.Tensor:
        """Return a vector with True for those of the targets."""
        return tf.constant(np.isin(np.arange(len(self.targets)), indices))

    def _renew(self, strategy: Any, sparsity: tf.Tensor, importance: Any = None) -> None:
        """Choose the weights to keep among those that are trained, and write the masks."""
        active = self._active()
        if active:
            alive, judged = self._ranked(active)
            if importance is not None:
                judged = [importance[index] for index in active]
            scope = None if self._shares is None else self._shares.scope(active)
            chosen = self._selection.only(active).masks(sparsity, alive, judged, scope)
            for index, mask in zip(active, chosen, strict=True):
                variable = self.state.masks[index]
                strategy.extended.update(variable, assign, args=(mask,))
        left_out = ~self._among(active)
        variable = tensor_variable(self.state.left_out)
        strategy.extended.update(variable, assign, args=(left_out,))

    def _ranked(self, indices: list[int]) -> tuple[list[Any], list[Any] | None]:
        """Return which entries may be kept, and what the criterion judges; None for weights."""
        return [self.state.masks[index] for index in indices], None

    def _apply(self, strategy: Any, optimizer: Any) -> None:
        self._mask_weights(strategy)
        self._mask_companions(strategy, optimizer)

    def _mask_weights(self, strategy: Any) -> None:
        for target, mask in self._held_pairs():
            variable = tensor_variable(target.variable)
            strategy.extended.update(variable, keep, args=(mask,))

    def _mask_companions(self, strategy: Any, optimizer: Any) -> None:
        """Mask what an optimizer keeps for each weight: slots, sums of gradients, averages."""
        pairs = self._held_pairs()
        weights = [target.variable for target, _ in pairs]
        # Gradients that are summed up for regrowth are those of pruned weights, too.
        kept = optimizers.companions(optimizer, weights, sums=not self._needs_gradients)
        for (_, mask), companions in zip(pairs, kept, strict=True):
            for variable in companions:
                strategy.extended.update(tensor_variable(variable), keep, args=(mask,))

    def get_config(self) -> dict[str, Any]:
        """Return the configuration from which the pruner is restored; masks are saved beside it."""
        return {
            "schedule": serialize_schedule(self.schedule, self.model),
            "criterion": serialize(self._selection.criterion, self.model),
            **({"regrowth": self.regrowth.get_config()} if self.regrowth else {}),
            **self._shared_config(),
        }

    def _shared_config(self) -> dict[str, Any]:
        where = kernel_layers.weight_paths(self.model)
        targets = [target for target, _ in self._held_pairs()]
        return {
            "class_name": type(self).__name__,
            "structure": serialize(self.structure, self.model),
            "scope": serialize(learned.among(self._selection.scope, targets), self.model),
            "min_weights": self._selection.min_weights,
            "weights": [
                {
                    "path": where[id(target.variable)],
                    "name": target.name,
                    "shape": list(target.shape),
                }
                for target in targets
            ],
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], *, model: Any) -> Self:
        """Give `model` the pruner that `get_config` described.

        Weights are found by their paths, whose steps are attributes: a subclassed model names its
        layers anew when it is built.

        Raises:
            ValueError: the model lacks a weight that was pruned.
        """
        schedule = deserialize_schedule(config["schedule"], model)
        criterion = deserialize(config["criterion"], model)
        regrowth = Regrowth.from_config(config["regrowth"]) if "regrowth" in config else None
        options = cls._shared_options(config, model)
        return cls(model, schedule, criterion=criterion, regrowth=regrowth, **options)

    @staticmethod
    def _shared_options(config: dict[str, Any], model: Any) -> dict[str, Any]:
        """Return the arguments of the constructor that `_shared_config` describes."""
        return {
            "layers": found_again(model, config["weights"]),
            "structure": deserialize(config["structure"], model),
            "scope": deserialize(config["scope"], model),
            "min_weights": config["min_weights"],
        }

    def __repr__(self) -> str:
        return (
            f"Pruner({self.model.name!r}, {self.schedule!r}, "
            f"criterion={self._selection.criterion!r}, structure={self.structure!r}, "
            f"scope={self._selection.scope!r}, min_weights={self._selection.min_weights}"
            f"{f', regrowth={self.regrowth!r}' if self.regrowth else ''})"
        )
